"""Speculative sampling: exactly the main model's distribution, by algebra and by statistics, and no classic mistake."""

import math

import pytest
import torch
import transformers
from conftest import baseline, counts_of, ids_of, like, make_model, speculate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lossless import planted

import speculative_decoding as sd

# The sampler, by algebra: whether it accepts a draft token is a function of one random number with a single step.


def acceptance_probability(p, q, token):
    """For which share of the random numbers a draft token is accepted: found by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        accepted, _ = sd.accept_or_resample(p, q, torch.tensor([token]), torch.tensor([middle], dtype=p.dtype))
        low, high = (middle, high) if accepted.item() else (low, middle)
    return low


def emitted(p, q):
    """The distribution of the first token of a round that drafts one, computed from `accept_or_resample`."""
    total = torch.zeros_like(p[0])
    almost_1 = torch.tensor([1 - 2**-53], dtype=p.dtype)
    for token in range(q.shape[1]):
        share = acceptance_probability(p, q, token)
        total[token] += q[0, token] * share
        accepted, following = sd.accept_or_resample(p, q, torch.tensor([token]), almost_1)
        assert following.sum().item() == pytest.approx(1)
        if not accepted.item():
            total += q[0, token] * (1 - share) * following[0]
    return total


def distributions(size, rows, seed, sharpness):
    torch.manual_seed(seed)
    return (torch.randn(rows, size, dtype=torch.float64) * sharpness).softmax(dim=-1)


@pytest.mark.parametrize("seed", range(12))
def test_the_emitted_token_has_the_main_models_distribution(seed):
    p, q = distributions(7, 2, seed, 2.0), distributions(4 if seed % 3 == 2 else 7, 1, 100 + seed, 2.0)
    if seed % 3 == 1:  # as top-k leaves it: with zeros in both
        p, q = (of.where(of > 0.1, 0.0) for of in (p, q))
        p, q = (of / of.sum(dim=-1, keepdim=True) for of in (p, q))
    assert torch.allclose(emitted(p, q), p[0], atol=1e-6)


def test_edge_values():
    p = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    token, half = torch.tensor([1]), torch.tensor([0.5])
    for q in [
        p[:1],  # the same: always accepted, and the next token is drawn behind it
        torch.tensor([[0.0, 1.0, 0.0]]),  # certain, and 0.5 < 0.75
        torch.tensor([[0.5, 0.0, 0.5]]),  # one that the draft could not draw, but the main model could
    ]:
        accepted, following = sd.accept_or_resample(p, q, token, half)
        assert (accepted.tolist(), following.tolist()) == ([1], [[0.0, 0.0, 1.0]])
    # Certain, and 0.8 > 0.75: rejected, and the residual distribution is the main model's without it.
    accepted, following = sd.accept_or_resample(p, torch.tensor([[0.0, 1.0, 0.0]]), token, torch.tensor([0.8]))
    assert (accepted.tolist(), following.tolist()) == ([0], [[1.0, 0.0, 0.0]])
    # Disjoint: never accepted, not even at 0, and the residual distribution is p.
    disjoint = torch.tensor([[0.0, 0.0, 1.0]])
    accepted, following = sd.accept_or_resample(p, disjoint, torch.tensor([2]), torch.tensor([0.0]))
    assert (accepted.tolist(), following.tolist()) == ([0], [[0.25, 0.75, 0.0]])
    # Rounding has left no residual, and yet the token is rejected: p, not a division by zero.
    same = torch.tensor([[0.5, 0.5]])
    accepted, following = sd.accept_or_resample(same.repeat(2, 1), same, torch.tensor([0]), torch.tensor([1.0]))
    assert (accepted.tolist(), following.tolist()) == ([0], [[0.5, 0.5]])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 9),
    k=st.integers(0, 5),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["random", "same", "one-hot", "disjoint"]),
    data=st.data(),
)
def test_any_shapes_and_kinds(size, k, seed, kind, data):
    p, q = distributions(size, k + 1, seed, 3.0).float(), distributions(size, k, seed + 1, 3.0).float()
    if kind == "same":
        q = p[:-1].clone()
    elif kind == "one-hot":
        q = torch.nn.functional.one_hot(q.argmax(dim=-1), size).float()
    elif kind == "disjoint" and size > 1:
        left = torch.arange(size) < size // 2
        p, q = ((of * keep + 1e-9 * keep) for of, keep in ((p, left), (q, ~left)))
        p, q = (of / of.sum(dim=-1, keepdim=True) for of in (p, q))
    tokens = [data.draw(st.sampled_from(row.nonzero()[:, 0].tolist())) for row in q]
    draft_ids = torch.tensor(tokens, dtype=torch.long)
    uniform = torch.tensor(data.draw(st.lists(st.floats(0, 0.875, width=32), min_size=k, max_size=k)))
    accepted, following = sd.accept_or_resample(p, q, draft_ids, uniform)
    assert accepted.shape == (1,) and 0 <= accepted.item() <= k
    assert following.shape == (1, size) and following.min() >= 0 and following.sum().item() == pytest.approx(1)
    if kind == "same":
        assert accepted.item() == k
    if kind == "disjoint" and size > 1:
        assert accepted.item() == 0
    if accepted.item() == k:
        assert torch.allclose(following, p[-1:])
    else:  # a token that was rejected for good reason is not drawn after all
        assert following[0, draft_ids[accepted.item()]] == 0 or kind == "random"


def test_drawing_by_hand():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for uniform, token in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-24, 4)]:
        assert sd.draw(probabilities, torch.tensor([uniform])).tolist() == [[token]]
    assert sd.draw(probabilities / 2, torch.tensor([1 - 2**-24])).tolist() == [[4]]  # what does not quite sum to 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (8, 0.5), (100, 0.999), (1, 1e-6)])
def test_the_distribution_is_the_librarys(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(6, 40) * 4
    warped = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    warped = transformers.TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = transformers.TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    distribution = sd.Sampling(temperature, top_k, top_p).distribution(logits)
    assert torch.allclose(distribution, warped.softmax(dim=-1), atol=1e-6)
    assert ((distribution > 0) == (warped > -math.inf)).all()
    assert sd.Sampling(1.0).distribution(logits.bfloat16()).dtype == torch.float32


# The whole loop, by statistics: three tokens of a tiny vocabulary, all their combinations enumerated exactly.

TINY = 5
PROMPT = [1, 3]
SAMPLER = {"temperature": 0.8, "top_k": 4, "top_p": 0.9}


def tiny_models():
    models = []
    for seed, size in ((1, TINY), (2, TINY), (3, 3)):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=size, n_embd=8, n_layer=1, n_head=1, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        config.tie_word_embeddings = False
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for weight in (model.transformer.wte.weight, model.transformer.wpe.weight):
                weight.normal_(0, 1)
            model.lm_head.weight.normal_(0, 0.4)
        models.append(model)
    return models


MAIN, DRAFT, SMALL_DRAFT = tiny_models()  # the last knows three tokens of five, and not the prompt's last


def exact_distribution(tokens=3):
    """The probability of each text of so many tokens by the main model alone, from passes over all of it."""
    sampler, texts = sd.Sampling(**SAMPLER), {(): 1.0}
    for _ in range(tokens):
        longer = {}
        for text, probability in texts.items():
            with torch.inference_mode():
                logits = MAIN(input_ids=ids_of([*PROMPT, *text])).logits[0, -1:]
            for token, share in enumerate(sampler.distribution(logits)[0].double().tolist()):
                if share:
                    longer[*text, token] = probability * share
        texts = longer
    return texts


def p_value(counts, expected):
    """Of a chi-squared test; texts that are expected fewer than five times count as one."""
    total = sum(counts.values())
    if set(counts) - set(expected):
        return 0.0  # impossible texts
    cells = [(counts.get(text, 0), total * share) for text, share in expected.items()]
    rare = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5]
    if rare:
        cells.append(tuple(map(sum, zip(*rare, strict=True))))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    return torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)).item()


def sample(samples, sampler, draft=DRAFT, k=2, decode=sd.decode_speculatively):
    main = sd.CachedModel(MAIN)
    draft = draft if draft == "ngram" else sd.CachedModel(draft)
    counts = {}
    for number in range(samples):
        run = speculate(main, draft, PROMPT, k, 3, sampler=sampler, number=number, decode=decode)
        counts[tuple(run.token_ids)] = counts.get(tuple(run.token_ids), 0) + 1
    return counts


EXPECTED = exact_distribution()


class EveryOther(sd.FixedLength):
    """Drafts one token in the second round of each two, and none in the first."""

    rounds = 0

    def wants_another(self, confidences):
        return self.rounds % 2 == 1 and super().wants_another(confidences)

    def learn(self, drafted, accepted):
        assert drafted == self.rounds % 2
        self.rounds += 1


@pytest.mark.parametrize(
    ("draft", "k", "samples"),
    [(DRAFT, 2, 2000), (DRAFT, 1, 600), (DRAFT, EveryOther(1), 600), ("ngram", 2, 600), (SMALL_DRAFT, 2, 1000)],
)
def test_texts_have_the_main_models_distribution(draft, k, samples):
    assert len(EXPECTED) > 20
    assert p_value(sample(samples, sd.Sampling(**SAMPLER), draft, k), EXPECTED) > 0.01


def test_the_baselines_texts_have_it_too():
    counts, main, sampler = {}, sd.CachedModel(MAIN), sd.Sampling(**SAMPLER)
    for number in range(600):
        text = tuple(baseline(main, PROMPT, 3, sampler=sampler, number=number).token_ids)
        counts[text] = counts.get(text, 0) + 1
    assert p_value(counts, EXPECTED) > 0.01


def with_methods(**methods):
    return type("Broken", (sd.Sampling,), methods)(**SAMPLER)


def with_mistake(*replacements):
    """A sampler whose `accept` calls an `accept_or_resample` with a mistake."""
    method = planted(sd.Sampling.accept)
    method.__globals__["accept_or_resample"] = planted(sd.accept_or_resample, *replacements)
    return with_methods(accept=method)


def without_normalising():
    sampler = with_mistake(("residual / total", "residual"))
    bounded = ("keepdim=True)", f"keepdim=True).clamp(max={TINY - 1})")
    drawing = planted(sd.draw, ("uniform * cumulative[:, -1:]", "uniform"), bounded)
    sampler.accept.__func__.__globals__["draw"] = drawing
    return sampler


def with_score_at_temperature_only():
    distribution = ("self.distribution(logits)", "(logits / self.settings['temperature']).softmax(dim=-1)")
    return with_methods(score=planted(sd.Sampling.score, distribution))


MISTAKES = {
    "the draft's share is not subtracted": lambda: with_mistake(
        ("torch.where(total > 0, residual / total, p_next)", "p_next")
    ),
    "the residual distribution is not normalised": without_normalising,
    "the ratio upside down": lambda: with_mistake(
        ("uniform * q_drafted < p_drafted", "uniform * p_drafted < q_drafted")
    ),
    "the bonus token is drawn one place early": lambda: with_mistake(
        ("p_next = p.index_select(0, accepted)", "p_next = p.index_select(0, accepted.clamp(max=len(q) - 1))")
    ),
    "one random number for two tokens": lambda: with_methods(
        accept=planted(sd.Sampling.accept, ("uniform[-1:]", "uniform[:1]"))
    ),
    "top-p for the draft only": with_score_at_temperature_only,
    "every draft token is accepted": lambda: with_mistake(("uniform * q_drafted < p_drafted", "uniform < 2")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_out(mistake):
    samples = 1500 if "two tokens" in mistake else 600  # a mistake that shows only in what goes together
    broken = sample(samples, MISTAKES[mistake](), k=1)  # with two draft tokens, the bonus token would be the fourth
    assert p_value(broken, EXPECTED) < 1e-4


def test_what_is_planted_in_is_right_without_a_mistake():
    sampler = with_mistake(("accepted", "accepted"))
    assert sample(50, sampler) == sample(50, sd.Sampling(**SAMPLER))


def test_a_seed_makes_a_text_again():
    model = make_model("gemma2")
    draft = like(model, 0.05)

    def texts(seed, k=3):
        sampler = sd.Sampling(1.0, seed=seed)
        both = (
            baseline(model, [5, 9], 24, sampler=sampler, number=7),
            speculate(model, draft, [5, 9], k, 24, sampler=sampler, number=7),
        )
        return [run.token_ids for run in both]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)


def test_each_turn_has_random_numbers_of_its_own():
    sampler, drawn = sd.Sampling(1.0, seed=5), {}
    for number, turn in ((7, None), (7, 1), (7, 2), (8, None), (8, 2)):
        sampler.restart(number, turn)
        drawn[number, turn] = sampler.uniform(4).tolist()
    assert (
        drawn[7, None] == drawn[7, 1] == torch.rand(4, generator=torch.Generator().manual_seed(5 * 2**20 + 7)).tolist()
    )
    assert len(set(map(tuple, drawn.values()))) == 4


def test_a_low_temperature_is_greedy_in_the_end():
    model = make_model("llama")
    draft = like(model, 0.05)
    cold = sd.Sampling(1e-6)
    assert speculate(model, draft, [5, 9], 3, 24, sampler=cold).token_ids == baseline(model, [5, 9], 24).token_ids


def test_log_likelihoods_are_of_the_plain_distribution():
    """A cold sampler generates the greedy text: so whatever the temperature, the figure is the same."""
    model = make_model("llama")
    draft = like(model, 0.05)
    greedy = speculate(model, draft, [5, 9], 3, 24)
    cold = speculate(model, draft, [5, 9], 3, 24, sampler=sd.Sampling(1e-6, top_k=1))
    assert counts_of(cold) == counts_of(greedy)
    assert cold.log_likelihood == pytest.approx(greedy.log_likelihood, rel=1e-5)


def test_auto_works_with_sampling():
    model = make_model("llama")
    chooser = sd.AutoLength({"draft_pass_s": {1: 0.1, 2: 0.1}, "main_pass_s": {1: 1.0, 9: 1.3}}, longest=8)
    result = speculate(model, model, [5, 9], chooser, 64, sampler=sd.Sampling(0.8))
    assert len(result.token_ids) == 64
    assert all(
        drafted == accepted for drafted, accepted in counts_of(result)
    )  # the same distribution: all are accepted
    assert max(drafted for drafted, _ in counts_of(result)) > 1

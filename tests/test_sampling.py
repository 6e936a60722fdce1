"""Speculative sampling: exactly the main model's distribution, by algebra and by statistics, and no classic mistake."""

import math

import numpy
import pytest
import torch
import transformers
from helpers import Scripted, baseline, counts_of, ids_of, pair_of, speculate
from hypothesis import given, settings
from hypothesis import strategies as st

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


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 9),
    k=st.integers(0, 5),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["random", "same", "one-hot"]),
    data=st.data(),
)
def test_any_shapes_and_kinds(size, k, seed, kind, data):
    p, q = distributions(size, k + 1, seed, 3.0).float(), distributions(size, k, seed + 1, 3.0).float()
    if kind == "same":
        q = p[:-1].clone()
    elif kind == "one-hot":
        q = torch.nn.functional.one_hot(q.argmax(dim=-1), size).float()
    tokens = [data.draw(st.sampled_from(row.nonzero()[:, 0].tolist())) for row in q]
    uniform = torch.tensor(data.draw(st.lists(st.floats(0, 0.875, width=32), min_size=k, max_size=k)))
    accepted, following = sd.accept_or_resample(p, q, torch.tensor(tokens, dtype=torch.long), uniform)
    assert accepted.shape == (1,) and 0 <= accepted.item() <= k
    assert following.shape == (1, size) and following.min() >= 0 and following.sum().item() == pytest.approx(1)
    assert accepted.item() == k or kind != "same"
    if accepted.item() == k:
        assert torch.allclose(following, p[-1:])
    else:  # a token that was rejected for good reason is not drawn after all
        assert following[0, tokens[accepted.item()]] == 0 or kind == "random"


def test_drawing_by_hand():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for uniform, token in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-24, 4)]:
        assert sd.draw(probabilities, torch.tensor([uniform])).tolist() == [[token]]
    assert sd.draw(probabilities / 2, torch.tensor([1 - 2**-24])).tolist() == [[4]]  # what does not quite sum to 1


def test_drawing_from_a_large_vocabulary():
    """Where sums of float32 would be off by some tokens."""
    torch.manual_seed(0)
    probabilities, uniform = torch.randn(1, 2**18).softmax(dim=-1), torch.rand(100)
    sums = probabilities[0].double().numpy().cumsum()
    expected = numpy.searchsorted(sums, uniform.double().numpy() * sums[-1], side="right")
    assert [sd.draw(probabilities, each).item() for each in uniform.split(1)] == expected.tolist()


def by_hand(logits, temperature, top_k, top_p):
    """What tokens are drawn from, [vocabulary]: the likeliest k, and of these the likeliest that add up to p."""
    shares = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -shares[token])[: top_k or None]
    total, kept, likelier = sum(shares[token] for token in order), [], 0.0
    for token in order:
        if top_p < 1 and kept and likelier >= top_p * total:
            break
        kept.append(token)
        likelier += shares[token]
    return [shares[token] / likelier if token in kept else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (8, 0.5), (100, 0.999), (1, 1e-6)])
def test_the_distribution_by_hand(top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(6, 40) * 4
    for temperature in (0.3, 1.0, 1.7):
        distribution = sd.Sampling(temperature, top_k, top_p).distribution(logits)
        rows = [by_hand(row, temperature, top_k, top_p) for row in logits.tolist()]
        expected = torch.tensor(rows, dtype=torch.float64)
        assert torch.allclose(distribution.double(), expected, atol=1e-6)
        assert (distribution[expected == 0] == 0).all() and (distribution[expected > 1e-30] > 0).all()
    assert sd.Sampling(1.0).distribution(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("sampler", [sd.Greedy(), sd.Sampling(2.0)], ids=["greedy", "sampled"])
def test_a_draft_token_comes_with_what_it_is_drawn_from(sampler):
    torch.manual_seed(0)
    logits, drawn = torch.randn(1, 40) * 4, set()
    is_greedy = isinstance(sampler, sd.Greedy)
    shares = by_hand(logits[0].tolist(), 2.0, 0, 1.0)
    for uniform in torch.tensor([[0.1], [0.5], [0.9]]):
        token, q = sampler.sample_draft(logits, ids_of([1]), uniform)
        assert token.equal(sampler.sample(logits, ids_of([1]), uniform)) and token.shape == (1, 1)
        assert q is None if is_greedy else q[0].tolist() == pytest.approx(shares, abs=1e-6)
        drawn.add(token.item())
    assert drawn == {shares.index(max(shares))} if is_greedy else len(drawn) == 3


# The whole loop, by statistics: three tokens of a tiny vocabulary, all their combinations enumerated exactly.

TINY = 5
PROMPT = [1, 3]
SAMPLER = {"temperature": 0.9, "top_k": 4, "top_p": 0.95}


def tiny_model(seed, size, sharpness):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=size, n_embd=8, n_layer=1, n_head=1, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    config.tie_word_embeddings = False
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in (model.transformer.wte.weight, model.transformer.wpe.weight):
            weight.normal_(0, 1)
        model.lm_head.weight.normal_(0, sharpness)
    return model


MAIN, DRAFT = tiny_model(1, TINY, 0.4), tiny_model(7, TINY, 0.8)
SMALL_DRAFT = tiny_model(3, 3, 0.4)  # knows three tokens of five, and not the prompt's last


def exact_distribution():
    """The probability of each text of three tokens by the main model alone, from passes over all of it."""
    texts = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, probability in texts.items():
            with torch.inference_mode():
                logits = MAIN(input_ids=ids_of([*PROMPT, *text])).logits[0, -1]
            shares = by_hand(logits.tolist(), **SAMPLER)
            longer |= {(*text, token): probability * share for token, share in enumerate(shares) if share}
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


def test_the_p_value_by_tables():
    fair = {side: 1 / 6 for side in range(6)}
    seen = {0: 16, 1: 25, 2: 18, 3: 24, 4: 20, 5: 17}  # of 120: χ² = 3.5 with 5 degrees of freedom
    assert p_value(seen, fair) == pytest.approx(0.6234, abs=1e-4)
    assert p_value(seen | {6: 1}, fair) == 0.0


def sample(samples, draft=DRAFT, schedule=2):
    """How often each text comes up; `draft`: as `speculate` takes it; None: of the baseline."""
    main, sampler, counts = sd.CachedModel(MAIN), sd.Sampling(**SAMPLER), {}
    draft = sd.CachedModel(draft) if isinstance(draft, torch.nn.Module) else draft  # once for all texts
    for number in range(samples):
        if draft is None:
            text = baseline(main, PROMPT, 3, sampler=sampler, number=number).token_ids
        else:
            text = speculate(main, draft, PROMPT, schedule, 3, sampler=sampler, number=number).token_ids
        counts[text] = counts.get(text, 0) + 1
    return counts


EXPECTED = exact_distribution()


WAYS = {  # a draft, a schedule, and how many texts
    "baseline": (None, 0, 200),
    "two": (DRAFT, 2, 400),
    "every other": (DRAFT, Scripted([0, 1]), 200),
    "ngram": ("ngram", 2, 200),
    "knows fewer ids": (SMALL_DRAFT, 2, 300),
}


@pytest.mark.parametrize("way", WAYS)
def test_texts_have_the_main_models_distribution(way):
    draft, schedule, samples = WAYS[way]
    assert len(EXPECTED) > 20 and sum(EXPECTED.values()) == pytest.approx(1)
    assert p_value(sample(samples, draft, schedule), EXPECTED) > 0.01


# The classic mistakes: each in place of what is right.


def a_rule(
    accepts=lambda uniform, p, q: uniform * q < p,
    residual=lambda p, q: (p - q).clamp(min=0),  # `draw` normalises it
    bonus=lambda p: p[-1],
):
    """An `accept_or_resample` of the test's own, right unless a part is replaced."""

    def accept_or_resample(p, q, draft_ids, uniform):
        for n, token in enumerate(draft_ids.tolist()):
            if not accepts(uniform[n], p[n, token], q[n, token]):
                return torch.tensor([n]), residual(p[n], q[n])[None]
        return torch.tensor([len(q)]), bonus(p)[None]

    return accept_or_resample


class OneRandomNumberForTwoTokens(sd.Sampling):
    def uniform(self, count):
        numbers = super().uniform(count)
        numbers[-1] = numbers[0]
        return numbers


class TopPForTheDraftOnly(sd.Sampling):
    def score(self, logits, ids, uniform):
        plain = sd.Sampling(SAMPLER["temperature"]).distribution(logits)
        return plain, super().score(logits, ids, uniform)[1]


MISTAKES = {  # what replaces the program's own, and in how many texts it shows
    "the draft's share is not subtracted": (400, {"accept_or_resample": a_rule(residual=lambda p, q: p)}),
    "the ratio upside down": (60, {"accept_or_resample": a_rule(accepts=lambda uniform, p, q: uniform * p < q)}),
    "the bonus token is drawn one place early": (60, {"accept_or_resample": a_rule(bonus=lambda p: p[-2])}),
    "one random number for two tokens": (250, {"Sampling": OneRandomNumberForTwoTokens}),
    "top-p for the draft only": (60, {"Sampling": TopPForTheDraftOnly}),
    "every draft token is accepted": (60, {"accept_or_resample": a_rule(accepts=lambda *_: True)}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_out(mistake, monkeypatch):
    samples, replacements = MISTAKES[mistake]
    for name, replacement in replacements.items():
        monkeypatch.setattr(sd, name, replacement)
    assert p_value(sample(samples, schedule=1), EXPECTED) < 1e-4  # with two, the bonus token would be the fourth


def test_the_rule_that_mistakes_are_made_in_is_right_without_one(monkeypatch):
    right = sample(50)
    monkeypatch.setattr(sd, "accept_or_resample", a_rule())
    assert sample(50) == right


# Random numbers, and what does not depend on them.


def test_a_seed_makes_a_text_again():
    """Whatever the sampler has drawn before."""
    main, draft = map(sd.CachedModel, pair_of("gemma2", 0.05))

    def texts(sampler, number=7):
        runs = (
            baseline(main, [5, 9], 24, sampler=sampler, number=number),
            speculate(main, draft, [5, 9], 3, 24, sampler=sampler, number=number),
        )
        return [run.token_ids for run in runs]

    sampler = sd.Sampling(0.03)
    first, other, again, seeded = texts(sampler), texts(sampler, 8), texts(sampler), texts(sd.Sampling(0.03, seed=1))
    assert again == first == texts(sd.Sampling(0.03))
    assert not set(first).intersection(other + seeded)


def test_random_numbers_depend_on_the_prompts_number_and_the_seed():
    sampler = sd.Sampling(1.0, seed=5)
    for number in (7, 8, 7):
        sampler.restart(sd.Prompt("", number))
        expected = torch.rand(4, generator=torch.Generator().manual_seed(5 * 2**20 + number))
        assert sampler.uniform(4).equal(expected)


def test_a_low_temperature_is_greedy_in_the_end():
    """And log-likelihoods are of the plain distribution, whatever the temperature."""
    main, draft = map(sd.CachedModel, pair_of("llama", 0.05))
    greedy = speculate(main, draft, [5, 9], 3, 24)
    assert greedy.token_ids == baseline(main, [5, 9], 24).token_ids
    for cold in (sd.Sampling(1e-6), sd.Sampling(1e-6, top_k=1)):
        result = speculate(main, draft, [5, 9], 3, 24, sampler=cold)
        assert (result.token_ids, counts_of(result)) == (greedy.token_ids, counts_of(greedy))
        assert result.log_likelihood == pytest.approx(greedy.log_likelihood, rel=1e-5)
        assert result.log_likelihood < -1


def test_a_draft_with_the_same_distribution_is_always_accepted():
    """Long rounds and short ones."""
    model = pair_of("llama", 0.05)[0]
    result = speculate(model, model, [5, 9], Scripted([8, 1, 2, 3]), 48, sampler=sd.Sampling(0.03))
    assert len(result.token_ids) == 48
    assert all(drafted == accepted for drafted, accepted in counts_of(result))
    assert {drafted for drafted, _ in counts_of(result)} >= {1, 2, 3}

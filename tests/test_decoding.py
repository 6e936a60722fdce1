"""The loops: exact on every architecture and at every edge, their invariant kept, their figures right."""

import math

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, alone, always_wrong, ids_of, like, make_model, prompt_of, speculate
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]


class Watched(sd.CachedModel):
    """Notes how many tokens it has read whenever a round ends, and how many it reads in each pass."""

    def new_text(self, rolls_back=True):
        super().new_text(rolls_back)
        self.noted, self.passes = [], []

    def read(self, ids, last=0):
        self.passes.append(ids.shape[1])
        return super().read(ids, last)

    def roll_back(self, tokens):
        super().roll_back(tokens)
        self.noted.append(self.cache.get_seq_length())


def check(main, draft, prompt, new, end, k):
    """Decode speculatively; assert that the text is the baseline's, the invariant after every round, and the shapes."""
    watched, helper = Watched(main), Watched(draft)
    result = speculate(watched, helper, prompt, k, new, end)
    assert result.token_ids == alone(main, prompt, new, end).token_ids
    text = len(prompt) + 1
    for (drafted, accepted), main_length, draft_length in zip(result.rounds, watched.noted, helper.noted, strict=True):
        assert drafted == k and 0 <= accepted <= k
        text += accepted + 1
        assert (main_length, draft_length) == (text - 1, text - 2)
    rounds, prefill = len(result.rounds), [len(prompt) - 1] if len(prompt) > 1 else []
    assert watched.passes == [len(prompt)] + [k + 1] * rounds
    assert helper.passes == prefill + ([2] + [1] * (k - 1)) * rounds
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact_and_agrees_with_generate(family):
    main = make_model(family)
    expected = main.generate(ids_of(PROMPT), max_new_tokens=32, do_sample=False, pad_token_id=0)[0, len(PROMPT) :]
    assert alone(main, PROMPT).token_ids == expected.tolist()
    assert len(set(expected.tolist())) > 1  # a varied text, or the test says little
    for k in (1, 3, 8):
        check(main, like(main, 0.05), PROMPT, 32, set(), k)
    right = check(main, main, PROMPT, 32, set(), 4)
    assert all(accepted == 4 for _, accepted in right.rounds)
    wrong = check(main, always_wrong(main), PROMPT, 8, set(), 4)
    assert all(accepted == 0 for _, accepted in wrong.rounds) and len(wrong.rounds) == 7


PAIRS = {
    (family, noise): (make_model(family), like(make_model(family), noise))
    for family in ("llama", "gemma2", "mistral", "gpt2", "bloom")
    for noise in (0.0, 0.02, 0.1)
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pair=st.sampled_from(sorted(PAIRS)),
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=24),
    new=st.integers(1, 24),
    end=st.sets(st.integers(0, VOCABULARY - 1), max_size=6),
    k=st.integers(1, 8),
)
def test_exact_for_any_prompt_limit_end_and_draft_length(pair, prompt, new, end, k):
    result = check(*PAIRS[pair], prompt, new, end, k)
    assert 1 <= len(result.token_ids) <= new
    assert not end.intersection(result.token_ids[:-1])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_end_of_text_at_every_place_of_a_round(gemma2, noise, k):
    draft = like(gemma2, noise)
    whole = alone(gemma2, PROMPT, 24).token_ids
    places = set()
    for index in range(24):
        if whole[index] in whole[:index]:
            continue  # the text would end earlier
        result = check(gemma2, draft, PROMPT, 24, {whole[index]}, k)
        assert result.token_ids == whole[: index + 1]
        before = 1 + sum(accepted + 1 for _, accepted in result.rounds[:-1])
        places.add((index - before, result.rounds[-1][1]) if result.rounds else "prefill")
    assert "prefill" in places
    if noise == 0:  # every place of a round that is right throughout, from the first drafted token to the bonus token
        assert {(place, k) for place in range(k + 1)} <= places
    else:  # a correction
        assert any(place != "prefill" and place[0] == place[1] < k for place in places)


def test_the_limit_cuts_a_round_anywhere(gemma2):
    whole = alone(gemma2, PROMPT, 24).token_ids
    for new in range(1, 24):
        assert check(gemma2, gemma2, PROMPT, new, set(), 4).token_ids == whole[:new]


def test_a_prompt_of_one_token(llama):
    for k in (1, 4):
        check(llama, like(llama, 0.05), [7], 16, set(), k)


def test_the_models_can_be_used_again_for_another_text(gemma2):
    main, draft = sd.CachedModel(gemma2), sd.CachedModel(like(gemma2, 0.05))
    for prompt in (PROMPT, [3], PROMPT * 4, PROMPT):
        assert speculate(main, draft, prompt, 3, 20).token_ids == alone(gemma2, prompt, 20).token_ids


def test_only_the_shared_vocabulary_is_ever_chosen(gemma2):
    cut = max(alone(gemma2, PROMPT).token_ids)  # this token can no longer be written
    main, draft = sd.CachedModel(gemma2, cut), sd.CachedModel(like(gemma2, 0.05), cut)
    result = speculate(main, draft, PROMPT, 3)
    assert max(result.token_ids) < cut
    assert result.token_ids == alone(main, PROMPT).token_ids


# Every figure, by an independent reference: no cache, each logit from a pass over the whole text.


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(input_ids=ids_of(tokens), use_cache=False).logits[0].float()


def reference(main, draft, prompt, new, end, k):
    """Token ids, (drafted, accepted) of each round, and the sum of the drafted tokens' log-likelihoods."""
    text = prompt + [logits_of(main, prompt)[-1].argmax().item()]
    rounds, log_likelihood = [], 0.0

    def complete():
        written = text[len(prompt) :]
        ends = [i + 1 for i, token in enumerate(written) if token in end] + [new]
        return written[: min(ends)] if len(written) >= min(ends) else None

    while complete() is None:
        guesses = []
        for _ in range(k):
            guesses.append(logits_of(draft, text + guesses)[-1].argmax().item())
        logits = logits_of(main, text + guesses)[len(text) - 1 :]
        log_probabilities = logits.double().log_softmax(-1)
        log_likelihood += sum(log_probabilities[i, guess].item() for i, guess in enumerate(guesses))
        accepted = 0
        while accepted < k and guesses[accepted] == logits[accepted].argmax().item():
            accepted += 1
        text += guesses[:accepted] + [logits[accepted].argmax().item()]
        rounds.append((k, accepted))
    return complete(), rounds, log_likelihood


@pytest.mark.parametrize(("family", "noise"), [("gemma2", 0.1), ("llama", 0.03), ("gpt2", 0.15)])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_every_figure_against_a_cacheless_reference(family, noise, k):
    main = make_model(family)
    draft = like(main, noise)
    whole = alone(main, PROMPT, 29).token_ids
    end = {max(whole, key=whole.index)}  # the one that comes latest
    tokens, rounds, log_likelihood = reference(main, draft, PROMPT, 29, end, k)
    result = speculate(main, draft, PROMPT, k, 29, end)
    assert (result.token_ids, result.rounds) == (tokens, rounds)
    assert result.log_likelihood == pytest.approx(log_likelihood, rel=1e-4)

    figures = sd.acceptance([result])
    accepted = sum(a for _, a in rounds)
    tested = sum(a + (a < k) for _, a in rounds)
    assert 0 < accepted < tested  # a draft that is right and wrong
    assert figures["rounds"] == len(rounds) and figures["drafted"] == k * len(rounds)
    assert figures["accepted"] == accepted
    assert figures["acceptance_rate"] == pytest.approx(accepted / (k * len(rounds)))
    assert figures["alpha"] == pytest.approx(accepted / tested)
    assert figures["tokens_per_round"] == pytest.approx((len(tokens) - 1) / len(rounds))
    assert figures["log_likelihood"] == pytest.approx(log_likelihood, rel=1e-4)
    assert figures["log_likelihood_per_token"] == pytest.approx(log_likelihood / (k * len(rounds)), rel=1e-4)
    assert 0 < result.draft_s + result.verify_s < result.latency_s and result.first_token_s < result.latency_s


def run_of(tokens, latency, first, rounds=(), prefill_s=0.0, draft_s=0.0, verify_s=0.0):
    run = sd.Decoded(list(range(tokens)), latency, first, list(rounds), -3.0, prefill_s, draft_s, verify_s)
    return sd.Measured([run])


def test_the_summary_by_hand():
    baselines = [run_of(21, 2.5, 0.5), run_of(11, 1.5, 0.5)]
    runs = [run_of(21, 1.25, 0.5, [(3, 3)] * 5, 0.3, 0.3, 0.55), run_of(11, 1.75, 0.5, [(3, 0)] * 10, 0.0, 0.6, 1.1)]
    runs[1].divergence = sd.Divergence(1, 1, 2, 0, 1, "tie")
    both = [dict(zip(("baseline", "K"), pair, strict=True)) for pair in zip(baselines, runs, strict=True)]
    summary = sd.summarise(both, "K", "speculative")
    counts = summary["speculative"]
    expected = {"new_tokens": 32, "latency_s": 2.0, "tokens_per_s": 8.0, "latency_min_s": 2.0, "latency_max_s": 2.0}
    assert summary["baseline"] == expected
    assert counts["latency_s"] == 1.5
    assert summary["speedup_percent"] == pytest.approx(100 * (4.0 / 3.0 - 1))
    # 15 accepted of 25 tested: α = 0.6. A baseline step takes 3 / 30 s, a draft step 0.9 / 45, a verify pass 1.65 / 15.
    assert counts["alpha"] == pytest.approx(0.6)
    assert summary["draft_cost"] == pytest.approx(0.2) and summary["verify_cost"] == pytest.approx(1.1)
    tokens = 1 + 0.6 + 0.6**2 + 0.6**3
    assert summary["predicted_speedup_percent"] == pytest.approx(100 * (tokens / (3 * 0.2 + 1.1) - 1))
    assert summary["ideal_speedup_percent"] == pytest.approx(100 * (tokens / (3 * 0.2 + 1) - 1))
    assert (summary["identical"], summary["ties"], summary["mismatches"]) == (1, 1, 0)
    assert counts["drafted_per_round"] == 3 and counts["drafted_histogram"] == {"3": 15}
    assert counts["other_s"] == pytest.approx(3.0 - 0.3 - 0.9 - 1.65)
    assert sd.promised_percent(1.0, [3], 0.1, 1.0) == pytest.approx(100 * (4 / 1.3 - 1))
    mixed = 100 * ((1 + 1.5) / (0 * 0.1 + 1 * 0.1 + 2 * 1.2) - 1)  # a round that drafts none, and one that drafts 1
    assert sd.promised_percent(0.5, [0, 1], 0.1, 1.2) == pytest.approx(mixed)
    assert summary["speedup_interval_percent"] is None  # one repeat: no claim


def test_figures_that_cannot_be_had_are_none(llama):
    one = speculate(llama, llama, PROMPT, 3, 1)
    assert one.rounds == [] and len(one.token_ids) == 1
    figures = sd.acceptance([one])
    assert figures["acceptance_rate"] is figures["alpha"] is figures["tokens_per_round"] is None
    baseline = alone(llama, PROMPT, 1)
    summary = sd.summarise([{"baseline": sd.Measured([baseline]), "K": sd.Measured([one])}], "K", "speculative")
    assert summary["predicted_speedup_percent"] is None
    assert sd.ratio(math.inf, 2) is None


def test_the_interval_covers_the_spread_and_little_else():
    def repeated(latencies, tokens=100):
        return sd.Measured([sd.Decoded(list(range(tokens)), latency) for latency in latencies])

    exact = sd.speedup_interval([repeated([2.0, 2.0, 2.0])] * 4, [repeated([1.0, 1.0, 1.0])] * 4)
    assert exact == pytest.approx([100.0, 100.0])
    # Two prompts that gain 100 % and 300 %: drawn anew, both may be the one or the other.
    baselines = [repeated([2.0] * 3), repeated([4.0] * 3)]
    low, high = sd.speedup_interval(baselines, [repeated([1.0] * 3), repeated([1.0] * 3)])
    assert (low, high) == pytest.approx((100.0, 300.0))
    # Repeats that vary by a tenth: the interval lies within what they can give, and is not a point.
    low, high = sd.speedup_interval([repeated([1.9, 2.0, 2.1])] * 4, [repeated([0.95, 1.0, 1.05])] * 4)
    assert 100 * (1.9 / 1.05 - 1) <= low < 100 < high <= 100 * (2.1 / 0.95 - 1) and high - low > 3


def test_methods_take_turns_and_the_median_counts(llama):
    latencies = iter([9.0, 9.0, 3.0, 1.0, 2.0, 4.0, 6.0, 5.0, 0.0, 7.0, 8.0, 9.0, 1.0, 2.0])  # of the runs, in order

    def timed(run):
        run.latency_s = next(latencies)
        return run

    main, draft = sd.CachedModel(llama), sd.CachedModel(llama)
    methods = {
        "baseline": lambda prompt: timed(alone(main, prompt.ids[0].tolist(), 3)),
        "other": lambda prompt: timed(speculate(main, draft, prompt.ids[0].tolist(), 2, 3)),
    }
    order = []
    prompts = [prompt_of(PROMPT, 1), prompt_of([4], 2)]
    announce = lambda prompt, name: order.append((prompt.number, name))  # noqa: E731
    results = list(sd.measure(main, prompts, methods, 3, 1, True, announce))
    assert order[:2] == [(1, "warm-up, baseline"), (1, "warm-up, other")]
    b, o = "baseline", "other"
    assert [name for number, name in order[2:] if number == 1] == [b, o, o, b, b, o]
    assert [name for number, name in order[2:] if number == 2] == [o, b, b, o, o, b]
    assert [(r[b].run.latency_s, r[o].run.latency_s) for r in results] == [(4.0, 2.0), (7.0, 1.0)]
    assert [run.latency_s for run in results[0][b].runs] == [3.0, 4.0, 6.0]
    assert all(result[o].divergence is None for result in results)


def test_a_prompt_that_fails_does_not_end_the_rest():
    """A real model that runs out of memory, as its first layer says, wherever it reads the token 13."""
    model = make_model("llama")

    def out_of_memory(module, arguments):
        if (arguments[0] == 13).any():
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    model.get_input_embeddings().register_forward_pre_hook(out_of_memory)
    main = sd.CachedModel(model)
    prompts = [prompt_of([1, 2], 1), prompt_of([13, 5], 2), prompt_of([4], 3)]
    results = list(sd.measure(main, prompts, {"baseline": lambda prompt: alone(main, prompt.ids[0].tolist(), 2)}))
    assert results[1] == "CUDA out of memory."
    assert [len(results[place]["baseline"].run.token_ids) for place in (0, 2)] == [2, 2]

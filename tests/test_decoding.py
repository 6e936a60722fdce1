"""The two loops: exact on every architecture and at every edge, their invariant kept, their figures right."""

import statistics
import time

import pytest
import torch
import transformers
from conftest import (
    FAMILIES,
    SHAPE,
    VOCABULARY,
    always_wrong,
    baseline,
    counts_of,
    ids_of,
    like,
    make_model,
    prompt_of,
    speculate,
    with_more_tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]


class Watched(sd.CachedModel):
    """Notes how many tokens its cache holds whenever a round ends, and how many it reads in each pass."""

    def reset(self, rolls_back=True):
        super().reset(rolls_back)
        self.noted, self.passes = [], []

    def forward(self, ids, logits_to_keep=0):
        self.passes.append(ids.shape[1])
        return super().forward(ids, logits_to_keep)

    def roll_back(self, tokens):
        super().roll_back(tokens)
        self.noted.append(self.cache.get_seq_length())


def check(main, draft, prompt, new, end, k):
    """Decode speculatively; assert that the text is the baseline's, the invariant after every round, and the shapes."""
    watched, helper = Watched(main), Watched(draft)
    result = speculate(watched, helper, prompt, k, new, end)
    assert result.token_ids == baseline(main, prompt, new, end).token_ids
    text = len(prompt) + 1
    for (drafted, accepted), main_length, draft_length in zip(
        counts_of(result), watched.noted, helper.noted, strict=True
    ):
        assert drafted == k and 0 <= accepted <= k
        text += accepted + 1
        assert (main_length, draft_length) == (text - 1, text - 2)
    rounds, prefill = len(result.rounds), [len(prompt) - 1] if len(prompt) > 1 else []
    assert watched.passes == [len(prompt)] + [k + 1] * rounds
    assert helper.passes == prefill + ([2] + [1] * (k - 1)) * rounds
    return result


def check_family(main):
    """The baseline is the library's greedy text; speculative decoding is exact with good, perfect and bad drafts."""
    expected = main.generate(ids_of(PROMPT), max_new_tokens=32, do_sample=False, pad_token_id=0)[0, len(PROMPT) :]
    assert baseline(main, PROMPT).token_ids == expected.tolist()
    assert len(set(expected.tolist())) > 1  # a varied text, or the test says little
    for k in (1, 3, 8):
        check(main, like(main, 0.05), PROMPT, 32, set(), k)
    right = check(main, main, PROMPT, 32, set(), 4)
    assert all(accepted == 4 for _, accepted in counts_of(right))
    wrong = check(main, always_wrong(main), PROMPT, 8, set(), 4)
    assert all(accepted == 0 for _, accepted in counts_of(wrong)) and len(wrong.rounds) == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact_and_agrees_with_generate(family):
    check_family(make_model(family))


GEMMA4_SHAPE = SHAPE | {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "sliding_window": 8,
    "head_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
GEMMA4 = {
    "dense": {},
    "layers that share keys and values, wide and soft-capped, as E2B": {
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
    },
    "keys that are values, as 31B": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "experts, as 26B-A4B": EXPERTS | {"hidden_size_per_layer_input": 0},
}


@pytest.mark.parametrize("kind", GEMMA4)
def test_gemma_4_is_exact_and_agrees_with_generate(monkeypatch, kind):
    config = transformers.Gemma4TextConfig(**GEMMA4_SHAPE | GEMMA4[kind])
    monkeypatch.setitem(FAMILIES, "gemma4", lambda: config)
    main = make_model("gemma4")
    kinds = {type(layer).__name__ for layer in sd.CachedModel(main).cache.layers}
    shared = {"DummyLayer"} if "share" in kind else set()
    assert kinds == {"DynamicSlidingWindowLayer", "DynamicLayer"} | shared
    check_family(main)


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
    whole = baseline(gemma2, PROMPT, 24).token_ids
    places = set()
    for index in range(24):
        if whole[index] in whole[:index]:
            continue  # the text would end earlier
        result = check(gemma2, draft, PROMPT, 24, {whole[index]}, k)
        assert result.token_ids == whole[: index + 1]
        before = 1 + sum(accepted + 1 for _, accepted in counts_of(result)[:-1])
        places.add((index - before, result.rounds[-1].accepted) if result.rounds else "prefill")
    assert "prefill" in places
    if noise == 0:  # every place of a round whose tokens are all accepted, from the first draft token to the bonus one
        assert {(place, k) for place in range(k + 1)} <= places
    else:  # a correction
        assert any(place != "prefill" and place[0] == place[1] < k for place in places)


def test_the_limit_cuts_a_round_anywhere(gemma2):
    whole = baseline(gemma2, PROMPT, 24).token_ids
    for new in range(1, 24):
        assert check(gemma2, gemma2, PROMPT, new, set(), 4).token_ids == whole[:new]


def test_a_prompt_of_one_token(llama):
    for k in (1, 4):
        check(llama, like(llama, 0.05), [7], 16, set(), k)


def test_the_models_can_be_used_again_for_another_text(gemma2):
    main, draft = sd.CachedModel(gemma2), sd.CachedModel(like(gemma2, 0.05))
    for prompt in (PROMPT, [3], PROMPT * 4, PROMPT):
        assert speculate(main, draft, prompt, 3, 20).token_ids == baseline(gemma2, prompt, 20).token_ids


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_tokens_that_only_the_main_model_knows(family):
    """In the prompt and in what it generates: the draft cannot read them, nor propose them."""
    known, emitted, accepted = make_model(family), [], 0
    for prompt in ([70, 5, 61, 9, 79], [5, 9, 13, 2], [79]):
        for k in (1, 3, 8):
            result = check(with_more_tokens(known), like(known, 0.02), prompt, 48, set(), k)
            emitted += result.token_ids
            accepted += sum(count for _, count in counts_of(result))
    assert sum(token >= VOCABULARY for token in emitted) > 40 and accepted > 40


# Every figure, by an independent reference: no cache, each logit from a pass over the whole text.


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(input_ids=ids_of(tokens), use_cache=False).logits[0].float()


def reference(main, draft, prompt, new, end, k):
    """Token ids, (drafted, accepted) of each round, and the sum of the draft tokens' log-likelihoods."""
    text = prompt + [logits_of(main, prompt)[-1].argmax().item()]
    rounds, log_likelihood = [], 0.0

    def complete():
        written = text[len(prompt) :]
        ends = [i + 1 for i, token in enumerate(written) if token in end] + [new]
        return written[: min(ends)] if len(written) >= min(ends) else None

    while complete() is None:
        draft_ids = []
        for _ in range(k):
            draft_ids.append(logits_of(draft, text + draft_ids)[-1].argmax().item())
        logits = logits_of(main, text + draft_ids)[len(text) - 1 :]
        log_probabilities = logits.double().log_softmax(-1)
        log_likelihood += sum(log_probabilities[i, token].item() for i, token in enumerate(draft_ids))
        accepted = 0
        while accepted < k and draft_ids[accepted] == logits[accepted].argmax().item():
            accepted += 1
        text += draft_ids[:accepted] + [logits[accepted].argmax().item()]
        rounds.append((k, accepted))
    return complete(), rounds, log_likelihood


@pytest.mark.parametrize(("family", "noise"), [("gemma2", 0.1), ("llama", 0.03), ("gpt2", 0.15)])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_every_figure_against_a_cacheless_reference(family, noise, k):
    main = make_model(family)
    draft = like(main, noise)
    whole = baseline(main, PROMPT, 29).token_ids
    end = {max(whole, key=whole.index)}  # the one that comes latest
    tokens, rounds, log_likelihood = reference(main, draft, PROMPT, 29, end, k)
    result = speculate(main, draft, PROMPT, k, 29, end)
    assert (result.token_ids, counts_of(result)) == (tokens, rounds)
    assert result.log_likelihood == pytest.approx(log_likelihood, rel=1e-4)

    figures = sd.acceptance([result])
    accepted = sum(a for _, a in rounds)
    tested = sum(a + (a < k) for _, a in rounds)
    assert 0 < accepted < tested  # a draft that is right and wrong
    assert figures["rounds"] == len(rounds) and figures["drafted"] == k * len(rounds)
    assert figures["accepted"] == accepted
    assert figures["acceptance_rate"] == pytest.approx(accepted / (k * len(rounds)))
    assert figures["alpha"] == pytest.approx(accepted / tested)
    assert figures["mean_acceptance_length"] == pytest.approx(1 + accepted / len(rounds))
    assert figures["tokens_per_round"] == pytest.approx((len(tokens) - 1) / len(rounds))
    assert figures["log_likelihood"] == pytest.approx(log_likelihood, rel=1e-4)
    assert figures["log_likelihood_per_token"] == pytest.approx(log_likelihood / (k * len(rounds)), rel=1e-4)
    assert figures["acceptance_histogram"] == [sum(a == n for _, a in rounds) for n in range(k + 1)]
    passed = [len(rounds), *(sum(a >= i for _, a in rounds) for i in range(1, k + 1))]
    by_position = figures["acceptance_by_position"]
    assert by_position["joint"] == pytest.approx([count / len(rounds) for count in passed[1:]])
    conditional = [passed[i] / passed[i - 1] if passed[i - 1] else None for i in range(1, k + 1)]
    assert by_position["conditional"] == pytest.approx(conditional)
    assert 0 < figures["draft_s"] + figures["verify_s"] < result.latency_s and result.first_token_s < result.latency_s


# The seconds of each round.


class Slow(sd.CachedModel):
    """A model whose passes over so many tokens take longer, by so many seconds."""

    def forward(self, ids, logits_to_keep=0):
        time.sleep(self.seconds.get(ids.shape[1], 0.0))
        return super().forward(ids, logits_to_keep)


def slow(model, seconds):
    cached = Slow(model)
    cached.seconds = seconds
    return cached


def test_the_seconds_of_a_round_are_those_of_its_parts(llama):
    """Passes that sleep: the prompt's 50 and 300 ms, verify passes 30 ms, the draft's 20 (two tokens) and 10 ms."""
    main, draft = slow(llama, {5: 0.05, 4: 0.03}), slow(like(llama, 0.05), {4: 0.3, 2: 0.02, 1: 0.01})
    result = speculate(main, draft, PROMPT, 3, 12)
    rounds = result.rounds
    assert all(one.draft_s >= 0.04 and one.verify_s >= 0.03 for one in rounds)
    assert all(one.draft_s + one.verify_s <= one.round_s for one in rounds)
    assert statistics.median(one.draft_s for one in rounds) < 0.04 + 0.03  # not the verify pass, too
    assert statistics.median(one.verify_s for one in rounds) < 0.03 + 0.03
    assert 0.05 <= result.first_token_s < 0.3  # without the draft's prefill
    figures = sd.acceptance([result])
    assert figures["prefill_s"] >= 0.35  # of both models
    assert figures["prefill_s"] + sum(one.round_s for one in rounds) == pytest.approx(result.latency_s)
    assert figures["draft_s"] == pytest.approx(sum(one.draft_s for one in rounds))
    assert figures["verify_s"] == pytest.approx(sum(one.verify_s for one in rounds))
    parts = [figures[part] for part in ("prefill_s", "draft_s", "verify_s", "other_s")]
    assert sum(parts) == pytest.approx(result.latency_s) and min(parts) > 0
    assert figures["round_s"]["median"] == pytest.approx(statistics.median(one.round_s for one in rounds))
    assert figures["round_s"]["median"] <= figures["round_s"]["p95"] <= max(one.round_s for one in rounds)


class NothingOnce(sd.FixedLength):
    """Drafts nothing in the second round."""

    rounds = 0

    def wants_another(self, confidences):
        return self.rounds != 1 and super().wants_another(confidences)

    def learn(self, drafted, accepted):
        self.rounds += 1


def test_a_round_without_draft_tokens_is_a_baseline_step(gemma2):
    """One pass over one token, whose logits choose the next: nothing is verified, and nothing rolled back."""
    main, draft = Watched(gemma2), Watched(like(gemma2, 0.05))
    result = speculate(main, draft, PROMPT, NothingOnce(3), 20)
    assert result.token_ids == baseline(gemma2, PROMPT, 20).token_ids
    rounds = len(result.rounds)
    assert counts_of(result)[1] == (0, 0) and rounds > 3
    assert main.passes == [len(PROMPT), 4, 1, *[4] * (rounds - 2)]
    assert draft.passes == [len(PROMPT) - 1, 2, 1, 1, 3, 1, 1, *[2, 1, 1] * (rounds - 3)]  # it reads on: three tokens
    assert len(main.noted) == len(draft.noted) == rounds - 1
    text = len(PROMPT) + 1
    lengths = iter(zip(main.noted, draft.noted, strict=True))
    for drafted, accepted in counts_of(result):
        text += accepted + 1
        if drafted:
            assert next(lengths) == (text - 1, text - 2)
    assert result.rounds[1].verify_s > 0  # the step's seconds count as the main model's


def test_a_generation_stops_at_its_end():
    generation = sd.Generation(prompt_of([1], new=4, end={9}))
    generation.append([3, 5])
    assert (generation.token_ids, generation.ended) == ([3, 5], False)
    generation.append([7, 2, 9])
    assert (generation.token_ids, generation.ended) == ([3, 5, 7, 2], True)  # the limit
    generation = sd.Generation(prompt_of([1], new=4, end={9}))
    generation.append([3, 9, 5])
    assert (generation.token_ids, generation.ended) == ([3, 9], True)  # an end-of-text token

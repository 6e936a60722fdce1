"""The two loops: exact on every architecture and at every edge, their invariant kept, their rounds and times right."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from helpers import (
    FAMILIES,
    SHAPE,
    VOCABULARY,
    Scripted,
    Watched,
    always_wrong,
    baseline,
    counts_of,
    ids_of,
    like,
    make_model,
    pair_of,
    speculate,
    with_more_tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]


def check(pair, prompt, new, end, k, expected=None, rests=()):
    """Decode speculatively; assert that the text is the baseline's, the invariant after every round, and the shapes."""
    main, draft = map(Watched, pair)
    expected = expected or baseline(main, prompt, new, end).token_ids
    schedule = Scripted([0 if number in rests else k for number in range(new)])
    result = speculate(main, draft, prompt, schedule, new, end)
    assert result.token_ids == expected
    counts, text, has_read = counts_of(result), len(prompt) + 1, len(prompt) - 1
    assert schedule.learnt == counts
    main_passes, draft_passes = [len(prompt)], [has_read] if has_read else []
    main_held, draft_held = [], []
    for number, (drafted, accepted) in enumerate(counts):
        assert drafted == (0 if number in rests else k) and 0 <= accepted <= drafted
        main_passes.append(drafted + 1)
        draft_passes += [text - has_read, *[1] * (k - 1)] if drafted else []  # what it has missed, in one pass
        text += accepted + 1
        has_read = text - 2 if drafted else has_read
        main_held.append(text - 1)
        draft_held += [has_read] if has_read else []
    assert (main.passes, main.held) == (main_passes, main_held)
    assert (draft.passes, list(filter(None, draft.held))) == (draft_passes, draft_held)
    return result


def check_family(main):
    """The baseline is the library's greedy text; speculative decoding is exact with good, perfect and bad drafts."""
    expected = main.generate(ids_of(PROMPT), max_new_tokens=24, do_sample=False, pad_token_id=0)[0, len(PROMPT) :]
    expected = tuple(expected.tolist())
    assert baseline(main, PROMPT, 24).token_ids == expected
    assert len(set(expected)) > 1  # a varied text, or the test says little
    good = like(main, 0.05)
    for k in (1, 5):
        check((main, good), PROMPT, 24, set(), k, expected)
    right = check((main, main), PROMPT, 24, set(), 4, expected)
    assert all(accepted == 4 for _, accepted in counts_of(right))
    wrong = check((main, always_wrong(main)), PROMPT, 6, set(), 4, expected[:6])
    assert counts_of(wrong) == [(4, 0)] * 5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact_and_agrees_with_generate(family):
    check_family(make_model(family))


GEMMA4_SHAPE = SHAPE | {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
GEMMA4_SHAPE |= {"sliding_window": 8, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
SHARED = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 30.0}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
GEMMA4 = {
    "dense": {},
    "layers that share keys and values, wide and soft-capped, as E2B": SHARED,
    "keys that are values, as 31B": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "experts, as 26B-A4B": EXPERTS | {"hidden_size_per_layer_input": 0},
}


@pytest.mark.parametrize("kind", GEMMA4)
def test_gemma_4_is_exact_and_agrees_with_generate(kind):
    shape = {**GEMMA4_SHAPE, "vocab_size_per_layer_input": VOCABULARY, **GEMMA4[kind]}
    main = make_model(transformers.Gemma4TextConfig(**shape))
    kinds = {type(layer).__name__ for layer in sd.CachedModel(main).cache.layers}
    assert ("DummyLayer" in kinds) == ("share" in kind)
    check_family(main)


def test_a_model_for_images_and_text_with_a_draft_of_its_text_part_the_other_way_round_and_with_n_grams():
    """Past a window of 8 tokens."""
    whole = make_model("mistral3")
    text = transformers.MistralForCausalLM(whole.config.text_config).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    for pair in ((whole, like(text, 0.03)), (text, like(whole, 0.03))):
        result = check(pair, PROMPT, 32, set(), 3)
        assert 0.2 < sum(accepted for _, accepted in counts_of(result)) / (3 * len(result.rounds)) < 0.9
    found = speculate(whole, "ngram", PROMPT * 3, 3, 32)
    assert found.token_ids == baseline(text, PROMPT * 3, 32).token_ids
    assert sum(drafted for drafted, _ in counts_of(found)) > 3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["llama", "gemma2", "mistral", "gpt2", "bloom"]),
    noise=st.sampled_from([0.0, 0.02, 0.1]),
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=24),
    new=st.integers(1, 24),
    end=st.sets(st.integers(0, VOCABULARY - 1), max_size=6),
    k=st.integers(1, 8),
)
def test_exact_for_any_prompt_limit_end_and_draft_length(family, noise, prompt, new, end, k):
    result = check(pair_of(family, noise), prompt, new, end, k)
    assert 1 <= len(result.token_ids) <= new
    assert not end.intersection(result.token_ids[:-1])


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_end_of_text_or_the_limit_at_every_place_of_a_round(noise, k):
    pair = pair_of("gemma2", noise)
    whole = baseline(pair[0], PROMPT, 24).token_ids
    places = set()
    for index in range(24):
        if whole[index] in whole[:index]:  # a text would end before it
            check(pair, PROMPT, index + 1, set(), k, whole[: index + 1])
            continue
        result = check(pair, PROMPT, 24, {whole[index]}, k, whole[: index + 1])
        before = 1 + sum(accepted + 1 for _, accepted in counts_of(result)[:-1])
        places.add((index - before, result.rounds[-1].accepted) if result.rounds else "prefill")
    assert "prefill" in places
    if noise == 0:  # every place of a round whose tokens are all accepted, from the first draft token to the bonus one
        assert {(place, k) for place in range(k + 1)} <= places
    else:  # a correction
        assert any(place != "prefill" and place[0] == place[1] < k for place in places)


@pytest.mark.parametrize("prompt", [PROMPT, [7]], ids=["prompt", "one token"])
@pytest.mark.parametrize("rests", [{1}, {0, 1, 2, 3}, {1, 2, 3, 4, 5, 8}], ids=str)
def test_a_draft_that_missed_rounds_catches_up_in_one_pass(rests, prompt):
    """A round in which nothing is drafted is a baseline step: one pass over one token, of the main model alone."""
    for family, noise in (("gemma2", 0.05), ("llama", 0.0)):
        result = check(pair_of(family, noise), prompt, 28, set(), 2, rests=rests)
        if noise == 0:  # a perfect draft stays perfect
            assert all(accepted == drafted for drafted, accepted in counts_of(result))


def test_the_models_can_be_used_again_for_another_text():
    main, draft = map(sd.CachedModel, pair_of("gemma2", 0.05))
    for prompt in (PROMPT, [3], PROMPT * 4, PROMPT):
        assert speculate(main, draft, prompt, 3, 20).token_ids == baseline(main, prompt, 20).token_ids


# Vocabularies that differ.


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_tokens_that_only_the_main_model_knows(family):
    """In the prompt and in what it generates: the draft cannot read them, nor propose them."""
    known, draft = pair_of(family, 0.02)
    main, emitted, accepted = with_more_tokens(known), [], 0
    for prompt, k in (([70, 5, 61, 9, 79], 1), ([5, 9, 13, 2], 8), ([79], 8)):
        result = check((main, draft), prompt, 40, set(), k)
        emitted += result.token_ids
        accepted += sum(count for _, count in counts_of(result))
    assert sum(token >= VOCABULARY for token in emitted) > 12 and accepted > 12


@pytest.mark.parametrize("sampler", [sd.Greedy(), sd.Sampling(0.05)], ids=["greedy", "sampled"])
def test_ids_that_only_the_draft_knows_are_never_proposed(sampler, monkeypatch):
    main = pair_of("llama", 0.0)[0]
    draft = with_more_tokens(like(main, 0.02), 80)
    noted = []  # what is proposed, and of what distribution
    accept = sampler.accept
    monkeypatch.setattr(sampler, "accept", lambda *given: noted.append(given[1:]) or accept(*given))
    for known in (None, VOCABULARY):  # not told what the main model knows, it does propose others
        noted.clear()
        with nullcontext() if known else pytest.raises((IndexError, RuntimeError)):
            result = speculate(main, sd.CachedModel(draft, None, known), PROMPT, 3, 40, sampler=sampler)
    assert 0 < sum(accepted for _, accepted in counts_of(result))
    assert all(q is None or q.shape[1] == VOCABULARY for _, q in noted)
    if isinstance(sampler, sd.Greedy):
        assert result.token_ids == baseline(main, PROMPT, 40).token_ids


# The rounds and the log-likelihood, by an independent reference: no cache, each logit from a pass over the whole text.


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(input_ids=ids_of(tokens), use_cache=False).logits[0].float()


def reference(main, draft, prompt, new, k):
    """Token ids, (drafted, accepted) of each round, and the sum of the draft tokens' log-likelihoods."""
    text, rounds, log_likelihood = prompt + [logits_of(main, prompt)[-1].argmax().item()], [], 0.0
    while len(text) < len(prompt) + new:
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
    return tuple(text[len(prompt) : len(prompt) + new]), rounds, log_likelihood


@pytest.mark.parametrize(("family", "noise", "k"), [("gemma2", 0.1, 3), ("llama", 0.03, 6), ("gpt2", 0.15, 1)])
def test_rounds_and_log_likelihood_against_a_reference_without_a_cache(family, noise, k):
    main, draft = pair_of(family, noise)
    for prompt in (PROMPT, PROMPT[::-1]):
        result = speculate(main, draft, prompt, k, 25)
        token_ids, rounds, log_likelihood = reference(main, draft, prompt, 25, k)
        assert (result.token_ids, counts_of(result)) == (token_ids, rounds)
        assert result.log_likelihood == pytest.approx(log_likelihood, rel=1e-4)
        assert 0 < sum(accepted for _, accepted in rounds) < k * len(rounds)  # a draft that is right and wrong


# The seconds of each round, by a clock that only passes, accepting and beginning advance.


class Timed(sd.CachedModel):
    """A model whose passes over so many tokens take so many seconds of a clock."""

    seconds, pass_s = [0.0], {}

    def forward(self, ids, logits_to_keep=0):
        self.seconds.append(self.pass_s[ids.shape[1]])
        return super().forward(ids, logits_to_keep)


class TimedGreedy(sd.Greedy):
    """Accepts in one second, and begins a text in 32."""

    def accept(self, *given):
        Timed.seconds.append(1)
        return super().accept(*given)

    def restart(self, prompt):
        Timed.seconds.append(32)


def test_the_seconds_of_a_round_are_those_of_its_parts(monkeypatch):
    monkeypatch.setattr(sd.time, "perf_counter", lambda: sum(Timed.seconds))
    main, draft = map(Timed, pair_of("llama", 0.05))
    main.pass_s = {5: 512.0, 4: 128.0, 1: 64.0}
    draft.pass_s = {4: 1024.0, 3: 16.0, 2: 8.0, 1: 4.0}
    result = speculate(main, draft, PROMPT, Scripted([3, 0] + [3] * 16), 16, sampler=TimedGreedy())
    accepted = [each.accepted for each in result.rounds]
    expected = [(3, accepted[0], 8.0 + 4 + 4, 128.0, 16.0 + 128 + 1)]
    expected.append((0, 0, 0.0, 64.0, 64.0))  # a step: its seconds count as the main model's
    expected.append((3, accepted[2], 16.0 + 4 + 4, 128.0, 24.0 + 128 + 1))  # the draft catches up: three tokens
    expected += [(3, count, 16.0, 128.0, 145.0) for count in accepted[3:]]
    assert list(result.rounds) == expected and len(expected) > 3
    assert result.first_token_s == 32 + 512  # without the draft's prefill
    assert result.latency_s == 32 + 512 + 1024 + sum(each.seconds for each in result.rounds)

    alone = baseline(main, PROMPT, 16, sampler=TimedGreedy())
    assert (alone.first_token_s, alone.latency_s, alone.rounds) == (32 + 512, 32 + 512 + 15 * 64, ())
    assert alone.token_ids == result.token_ids

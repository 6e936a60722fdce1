"""The two loops: exact on every architecture and at every edge, their invariant kept, their figures right."""

import pytest
import torch
import transformers
from helpers import (
    FAMILIES,
    SHAPE,
    VOCABULARY,
    Watched,
    always_wrong,
    baseline,
    counts_of,
    ids_of,
    like,
    make_model,
    pair_of,
    prompt_of,
    speculate,
    with_more_tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]


def check(main, draft, prompt, new, end, k, expected=None):
    """Decode speculatively; assert that the text is the baseline's, the invariant after every round, and the shapes."""
    main, draft = Watched(main), Watched(draft)
    expected = expected or baseline(main, prompt, new, end).token_ids
    result = speculate(main, draft, prompt, k, new, end)
    assert result.token_ids == expected
    text, held = len(prompt) + 1, []
    for drafted, accepted in counts_of(result):
        assert drafted == k and 0 <= accepted <= k
        text += accepted + 1
        held.append((text - 1, text - 2))
    assert list(zip(main.held, draft.held, strict=True)) == held
    rounds, prefill = len(result.rounds), [len(prompt) - 1] if len(prompt) > 1 else []
    assert main.passes == [len(prompt)] + [k + 1] * rounds
    assert draft.passes == prefill + ([2] + [1] * (k - 1)) * rounds
    return result


def check_family(main):
    """The baseline is the library's greedy text; speculative decoding is exact with good, perfect and bad drafts."""
    expected = main.generate(ids_of(PROMPT), max_new_tokens=32, do_sample=False, pad_token_id=0)[0, len(PROMPT) :]
    expected = tuple(expected.tolist())
    assert baseline(main, PROMPT).token_ids == expected
    assert len(set(expected)) > 1  # a varied text, or the test says little
    good = like(main, 0.05)
    for k in (1, 3, 8):
        check(main, good, PROMPT, 32, set(), k, expected)
    right = check(main, main, PROMPT, 32, set(), 4, expected)
    assert all(accepted == 4 for _, accepted in counts_of(right))
    wrong = check(main, always_wrong(main), PROMPT, 8, set(), 4, expected[:8])
    assert counts_of(wrong) == [(4, 0)] * 7


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


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["llama", "gemma2", "mistral", "gpt2", "bloom"]),
    noise=st.sampled_from([0.0, 0.02, 0.1]),
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=24),
    new=st.integers(1, 24),
    end=st.sets(st.integers(0, VOCABULARY - 1), max_size=6),
    k=st.integers(1, 8),
)
def test_exact_for_any_prompt_limit_end_and_draft_length(family, noise, prompt, new, end, k):
    result = check(*pair_of(family, noise), prompt, new, end, k)
    assert 1 <= len(result.token_ids) <= new
    assert not end.intersection(result.token_ids[:-1])


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_end_of_text_at_every_place_of_a_round(noise, k):
    main, draft = pair_of("gemma2", noise)
    whole = baseline(main, PROMPT, 24).token_ids
    places = set()
    for index in range(24):
        if whole[index] in whole[:index]:
            continue  # the text would end earlier
        result = check(main, draft, PROMPT, 24, {whole[index]}, k, whole[: index + 1])
        before = 1 + sum(accepted + 1 for _, accepted in counts_of(result)[:-1])
        places.add((index - before, result.rounds[-1].accepted) if result.rounds else "prefill")
    assert "prefill" in places
    if noise == 0:  # every place of a round whose tokens are all accepted, from the first draft token to the bonus one
        assert {(place, k) for place in range(k + 1)} <= places
    else:  # a correction
        assert any(place != "prefill" and place[0] == place[1] < k for place in places)


def test_the_limit_cuts_a_round_anywhere(gemma2):
    whole = baseline(gemma2, PROMPT, 24).token_ids
    for new in range(1, 14):  # two rounds, at each place
        check(gemma2, gemma2, PROMPT, new, set(), 4, whole[:new])


def test_a_prompt_of_one_token():
    for k in (1, 4):
        check(*pair_of("llama", 0.05), [7], 16, set(), k)


def test_the_models_can_be_used_again_for_another_text():
    main, draft = map(sd.CachedModel, pair_of("gemma2", 0.05))
    for prompt in (PROMPT, [3], PROMPT * 4, PROMPT):
        assert speculate(main, draft, prompt, 3, 20).token_ids == baseline(main, prompt, 20).token_ids


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_tokens_that_only_the_main_model_knows(family):
    """In the prompt and in what it generates: the draft cannot read them, nor propose them."""
    known, draft = pair_of(family, 0.02)
    main, emitted, accepted = with_more_tokens(known), [], 0
    for prompt in ([70, 5, 61, 9, 79], [5, 9, 13, 2], [79]):
        for k in (1, 8):
            result = check(main, draft, prompt, 40, set(), k)
            emitted += result.token_ids
            accepted += sum(count for _, count in counts_of(result))
    assert sum(token >= VOCABULARY for token in emitted) > 25 and accepted > 25


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
        return tuple(written[: min(ends)]) if len(written) >= min(ends) else None

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


def figures_of(runs, k):
    """What the program says of these texts' draft tokens, as of the prompts of one method."""
    results = []
    for number, run in enumerate(runs):
        outcome = sd.Outcome((run,), verdict=sd.Verdict("identical"))
        results.append(sd.Result(prompt_of(PROMPT, number), {sd.BASELINE: outcome, "ours": outcome}))
    return sd.figures_of(tuple(results), sd.Method("ours", decode=None, draft="a draft", draft_tokens=k))


@pytest.mark.parametrize(("family", "noise"), [("gemma2", 0.1), ("llama", 0.03), ("gpt2", 0.15)])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_every_figure_against_a_cacheless_reference(family, noise, k):
    main, draft = pair_of(family, noise)
    whole = baseline(main, PROMPT, 25).token_ids
    latest = {max(whole, key=whole.index)}  # the token that comes latest
    runs, tokens, rounds, log_likelihood = [], [], [], 0.0
    for prompt, end in ((PROMPT, latest), (PROMPT[::-1], set())):
        expected = reference(main, draft, prompt, 25, end, k)
        runs.append(speculate(main, draft, prompt, k, 25, end))
        assert (runs[-1].token_ids, counts_of(runs[-1])) == expected[:2]
        assert runs[-1].log_likelihood == pytest.approx(expected[2], rel=1e-4)
        tokens += expected[0][1:]  # without the prefill's
        rounds += expected[1]
        log_likelihood += expected[2]

    figures = figures_of(runs, k)
    accepted = sum(a for _, a in rounds)
    tested = sum(a + (a < k) for _, a in rounds)
    assert 0 < accepted < tested  # a draft that is right and wrong
    assert figures.rounds == len(rounds) and figures.drafted == k * len(rounds)
    assert figures.accepted == accepted
    assert figures.acceptance_rate == pytest.approx(accepted / (k * len(rounds)))
    assert figures.alpha == pytest.approx(accepted / tested)
    assert figures.mean_acceptance_length == pytest.approx(len(tokens) / len(rounds))
    assert figures.log_likelihood == pytest.approx(log_likelihood, rel=1e-4)
    assert figures.log_likelihood_per_token == pytest.approx(log_likelihood / (k * len(rounds)), rel=1e-4)
    passed = [len(rounds), *(sum(a >= i for _, a in rounds) for i in range(1, k + 1))]
    by_position = figures.acceptance_by_position
    assert by_position["joint"] == pytest.approx([count / len(rounds) for count in passed[1:]])
    conditional = [passed[i] / passed[i - 1] if passed[i - 1] else None for i in range(1, k + 1)]
    assert by_position["conditional"] == pytest.approx(conditional)


# The seconds of each round, by a clock that only passes, accepting and learning advance.


class Clock:
    seconds = 0.0

    def perf_counter(self):
        return self.seconds


class Timed(sd.CachedModel):
    """A model whose passes over so many tokens take so many seconds of a clock."""

    clock, pass_s = None, {}

    def forward(self, ids, logits_to_keep=0):
        self.clock.seconds += self.pass_s[ids.shape[1]]
        return super().forward(ids, logits_to_keep)


def timed(model, clock, pass_s):
    model = Timed(model)
    model.clock, model.pass_s = clock, pass_s
    return model


class TimedGreedy(sd.Greedy):
    """Accepts in one second, and begins a text in 32."""

    def __init__(self, clock):
        self.clock = clock

    def accept(self, *given):
        self.clock.seconds += 1
        return super().accept(*given)

    def restart(self, prompt):
        self.clock.seconds += 32


class NothingOnce(sd.FixedSchedule):
    """Drafts nothing in the second round; keeps what it is told."""

    def __init__(self, draft_tokens):
        super().__init__(draft_tokens)
        self.learnt, self.ended = [], []

    def wants_another(self, confidences):
        return len(self.learnt) != 1 and super().wants_another(confidences)

    def learn(self, drafted, accepted):
        self.learnt.append((drafted, accepted))

    def end_text(self, rounds):
        self.ended.append(rounds)


def test_the_seconds_of_a_round_are_those_of_its_parts(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sd, "time", clock)
    model, draft = pair_of("llama", 0.05)
    main = timed(model, clock, {5: 512.0, 4: 128.0, 1: 64.0})
    draft = timed(draft, clock, {4: 1024.0, 3: 16.0, 2: 8.0, 1: 4.0})
    sampler, schedule = TimedGreedy(clock), NothingOnce(3)
    result = speculate(main, draft, PROMPT, schedule, 16, sampler=sampler)
    accepted = [each.accepted for each in result.rounds]
    expected = [(3, accepted[0], 8.0 + 4 + 4, 128.0, 16.0 + 128 + 1)]
    expected.append((0, 0, 0.0, 64.0, 64.0))  # a step: its seconds count as the main model's
    expected.append((3, accepted[2], 16.0 + 4 + 4, 128.0, 24.0 + 128 + 1))  # the draft reads on: three tokens
    expected += [(3, count, 16.0, 128.0, 145.0) for count in accepted[3:]]
    assert list(result.rounds) == expected and len(expected) > 3
    assert result.first_token_s == 32 + 512  # without the draft's prefill
    assert result.latency_s == 32 + 512 + 1024 + sum(each.round_s for each in result.rounds)

    alone = baseline(main, PROMPT, 16, sampler=sampler)
    assert (alone.first_token_s, alone.latency_s, alone.rounds) == (32 + 512, 32 + 512 + 15 * 64, ())
    assert alone.token_ids == result.token_ids


def test_parts_of_a_round_are_known_where_the_devices_clock_tells_them():
    marks = (1.0, 2.0, 4.0, 8.0)
    assert sd.timed_round(torch.device("cpu"), 3, 2, *marks) == (3, 2, 1.0, 2.0, 7.0)
    assert sd.timed_round(torch.device("mps"), 3, 2, *marks) == (3, 2, None, None, 7.0)


def test_a_round_without_draft_tokens_is_a_baseline_step():
    """One pass over one token, whose logits choose the next: nothing is verified, and no token rolled back."""
    main, draft = map(Watched, pair_of("gemma2", 0.05))
    schedule = NothingOnce(3)
    result = speculate(main, draft, PROMPT, schedule, 20)
    assert counts_of(result)[1] == (0, 0) and len(result.rounds) > 3
    rounds = len(result.rounds)
    assert main.passes == [len(PROMPT), 4, 1, *[4] * (rounds - 2)]
    assert draft.passes == [len(PROMPT) - 1, 2, 1, 1, 3, 1, 1, *[2, 1, 1] * (rounds - 3)]  # it reads on: three tokens
    text, main_held, draft_held = len(PROMPT) + 1, [], []
    for drafted, accepted in counts_of(result):
        text += accepted + 1
        main_held += [text - 1] if drafted else []
        draft_held += [text - 2] if drafted else []
    assert (main.held, draft.held) == (main_held, draft_held)
    assert schedule.learnt == counts_of(result) and schedule.ended == [result.rounds]
    assert result.token_ids == baseline(main, PROMPT, 20).token_ids


def test_an_output_ends_at_its_limit_or_an_end_of_text_token():
    prompt, output = prompt_of([1], new=4, end={9}), []
    assert not sd.emit(prompt, output, [3, 5]) and output == [3, 5]
    assert sd.emit(prompt, output, [7, 2, 8]) and output == [3, 5, 7, 2]  # the limit
    output = []
    assert sd.emit(prompt, output, [3, 9, 5]) and output == [3, 9]
    output = []
    assert sd.emit(prompt, output, [1, 2, 3, 9]) and output == [1, 2, 3, 9]  # both at once

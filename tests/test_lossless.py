"""The lossless check: a fault in either loop is a mismatch and is laid at the right door, and rounding is a tie."""

import copy
import functools
import math

import pytest
import torch
import transformers
from helpers import always_wrong, baseline, bundled, ids_of, like, make_model, speculate

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]
OTHER_TEXT = [7] * 40
NEW, K = 36, 2


@functools.cache
def pair(family, dtype):
    """A model, and a draft that is right now and then."""
    model = make_model(family, dtype=dtype)
    return model, like(model, 0.1)


@functools.cache
def right_outputs(family, dtype):
    """What both loops generate without a fault."""
    model, draft = pair(family, dtype)
    return baseline(model, PROMPT, NEW).token_ids, speculate(model, draft, PROMPT, K, NEW).token_ids


def assert_mismatch(divergence, at_fault, margin=2.0):
    """A mismatch of the loop that is broken, whose gap is more than `margin` times the noise."""
    assert (divergence.kind, divergence.at_fault) == ("mismatch", at_fault)
    gaps = {"baseline": divergence.baseline_gap, "speculative": divergence.gap}
    for loop, gap in gaps.items():
        if at_fault in (loop, "both"):
            assert gap > margin * divergence.noise
        else:
            assert gap <= divergence.noise


def assert_parts(divergence, first, second):
    """It says where two outputs part."""
    place = divergence.index
    assert first[:place] == second[:place] and first[place] != second[place]
    assert (divergence.baseline_token, divergence.speculative_token) == (first[place], second[place])


PAIRS = [("gemma2", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.bfloat16)]
on_all_pairs = pytest.mark.parametrize(("family", "dtype"), PAIRS, ids=str)


# Faults of the speculative loop: in rolling back, in verifying, in accepting, in emitting.


def broken_roll_back(tokens_dropped):
    """A model that drops another number of tokens than the loop asks for."""

    class Broken(sd.CachedModel):
        def roll_back(self, tokens):
            super().roll_back(tokens_dropped(tokens))

    return Broken


TooLittle, Never = broken_roll_back(lambda tokens: max(0, tokens - 1)), broken_roll_back(lambda tokens: 0)


def broken_verify(ids_read):
    """A model whose verify pass reads other tokens than the loop asks for."""

    class Broken(sd.CachedModel):
        def verify(self, score, ids, width):
            return super().verify(score, ids_read(ids), width)

    return Broken


class ReadsTheLastTokenTwice(sd.CachedModel):
    def verify(self, score, ids, width):
        self.forward(ids[:, :1])
        return super().verify(score, ids, width)


def broken_accept(emitted):
    """A sampler that emits what a function of the draft tokens, the main model's choices and the right number says."""

    class Broken(sd.Greedy):
        def accept(self, target, draft_ids, q):
            return emitted(draft_ids.tolist(), target.tolist(), len(super().accept(target, draft_ids, q)) - 1)

    return Broken()


def one_place_off(drafted, chosen, accepted):
    return [*drafted[:accepted], *chosen[accepted + 1 : accepted + 2]] or chosen[:1]


def emit_no_correction(prompt, output, tokens, emit=sd.emit):
    return emit(prompt, output, tokens[: max(1, len(tokens) - 1)])


# Of each what is broken: the main model's class, the draft's, the sampler, or the function `emit`.
SPECULATIVE_BUGS = {
    "one stale token stays in both caches": {"main": TooLittle, "draft": TooLittle},
    "one stale token stays in the main model's cache": {"main": TooLittle},
    "one token too many is rolled back": {"main": broken_roll_back(lambda tokens: tokens + 1)},
    "nothing is rolled back": {"main": Never},
    "what was accepted is rolled back": {"main": broken_roll_back(lambda tokens: K - tokens)},
    "the verify pass reads its tokens in the wrong order": {"main": broken_verify(lambda ids: ids.roll(-1, dims=1))},
    "the verify pass reads another token than the last": {
        "main": broken_verify(lambda ids: torch.cat([ids[:, :1] // 2, ids[:, 1:]], dim=1))
    },
    "the text's last token is read twice": {"main": ReadsTheLastTokenTwice},
    "the last draft token is accepted unseen": {
        "sampler": broken_accept(lambda drafted, chosen, n: chosen if n >= K - 1 else chosen[: n + 1])
    },
    "the main model's choices are read one place off": {"sampler": broken_accept(one_place_off)},
    "one wrong draft token is accepted": {
        "sampler": broken_accept(lambda drafted, chosen, n: drafted[: n + 1] + chosen[n + 1 : n + 2])
    },
    "the correction is lost": {"emit": emit_no_correction},
}


@on_all_pairs
@pytest.mark.parametrize("bug", SPECULATIVE_BUGS)
def test_a_broken_speculative_loop_is_a_mismatch(bug, family, dtype, monkeypatch):
    (model, draft), broken = pair(family, dtype), SPECULATIVE_BUGS[bug]
    right, _ = right_outputs(family, dtype)
    main, helper = broken.get("main", sd.CachedModel)(model), broken.get("draft", sd.CachedModel)(draft)
    monkeypatch.setattr(sd, "emit", broken.get("emit", sd.emit))
    wrong = speculate(main, helper, PROMPT, K, NEW, sampler=broken.get("sampler")).token_ids
    divergence = sd.find_divergence(main, PROMPT, right, wrong)
    assert_mismatch(divergence, "speculative")
    assert_parts(divergence, right, wrong)


def broken_pass(**how):
    """A model whose verify pass is told something wrong."""

    class Broken(sd.CachedModel):
        @torch.inference_mode()
        def verify(self, score, ids, width):
            return score(self.model(ids, cache=self.cache, use_cache=True, **how).logits[0], ids, None)

    return Broken


BROKEN_PASSES = {
    "as if the text began with it": broken_pass(position_ids=torch.arange(5)[None]),
    "each token sees those behind it": broken_pass(attention_mask=torch.zeros(1, 1, 1, 1)),
}


@pytest.mark.parametrize("bug", BROKEN_PASSES)
def test_a_verify_pass_that_sees_the_wrong_tokens_is_a_mismatch(bug):
    for main, helper, prompt in ((*bundled()[:2], bundled()[2][0]), (*pair("llama", torch.float32), PROMPT)):
        main = BROKEN_PASSES[bug](main)
        outputs = baseline(main, prompt, NEW // 2).token_ids, speculate(main, helper, prompt, 4, NEW // 2).token_ids
        assert_mismatch(sd.find_divergence(main, prompt, *outputs), "speculative")


# Faults of the baseline.


class ReadsAWrongToken(sd.CachedModel):
    """In its fifth step, if there are as many."""

    def prefill(self, prompt_ids, rolls_back=True):
        self.steps = 0
        return super().prefill(prompt_ids, rolls_back)

    def step(self, then, ids, uniform=None, logits_to_keep=1):
        self.steps += 1
        return super().step(then, (ids + 1) % 61 if self.steps == 5 else ids, uniform, logits_to_keep)


class KeepsNothing(sd.CachedModel):
    def step(self, then, ids, uniform=None, logits_to_keep=1):
        before = copy.deepcopy(self.cache)
        token = super().step(then, ids, uniform, logits_to_keep)
        self.cache = before
        return token


class KeepsTheTextBefore(sd.CachedModel):
    def prefill(self, prompt_ids, rolls_back=True):
        return self.forward(prompt_ids, logits_to_keep=1)


class LosesThePromptsLastToken(sd.CachedModel):
    def prefill(self, prompt_ids, rolls_back=True):
        return super().prefill(prompt_ids[:, :-1], rolls_back)


BASELINE_BUGS = {
    "one wrong token is read": ReadsAWrongToken,
    "what a step has read is not kept": KeepsNothing,
    "the cache of the text before is not emptied": KeepsTheTextBefore,
    "the prompt's last token is not read": LosesThePromptsLastToken,
}


@on_all_pairs
@pytest.mark.parametrize("bug", BASELINE_BUGS)
def test_a_broken_baseline_is_a_mismatch_of_the_baseline(bug, family, dtype):
    broken, (_, right) = BASELINE_BUGS[bug](pair(family, dtype)[0]), right_outputs(family, dtype)
    broken.forward(ids_of(OTHER_TEXT))  # the text before
    wrong = baseline(broken, PROMPT, NEW).token_ids
    divergence = sd.find_divergence(sd.CachedModel(broken.model), PROMPT, wrong, right)
    assert_mismatch(divergence, "baseline", 2.0 if dtype == torch.float32 else 1.4)  # the narrowest had 1.5
    assert_parts(divergence, wrong, right)


# Faults of the KV cache that both loops share.


def after_each_pass(change):
    """A model whose cache is changed behind each pass: `change` of a layer, and of how many tokens were read."""

    class Broken(sd.CachedModel):
        def forward(self, ids, logits_to_keep=0):
            begun = self.cache.get_seq_length() > 0
            logits = super().forward(ids, logits_to_keep)
            for layer in self.cache.layers if begun else ():
                change(layer, ids.shape[1])
            return logits

    return Broken


def lose_what_was_read(layer, read):
    layer.values = torch.cat([layer.values[:, :, :-read], torch.zeros_like(layer.values[:, :, -read:])], dim=2)


def repeat_the_token_before(layer, read):
    for part in ("keys", "values"):
        stored = getattr(layer, part)
        setattr(layer, part, torch.cat([stored[:, :, :-1], stored[:, :, -2:-1]], dim=2))


def shift_the_values(layer, read):
    layer.values = layer.values.roll(1, dims=2)


class SwapsLayers(sd.CachedModel):
    def prefill(self, prompt_ids, rolls_back=True):
        logits = super().prefill(prompt_ids, rolls_back)
        first, second = self.cache.layers
        first.keys, second.keys, first.values, second.values = second.keys, first.keys, second.values, first.values
        return logits


CACHE_BUGS = {
    "what a pass has read is lost": after_each_pass(lose_what_was_read),
    "a stale token stands where the latest should": after_each_pass(repeat_the_token_before),
    "the values are shifted by one place": after_each_pass(shift_the_values),
    "the layers' caches are swapped": SwapsLayers,
    "the cache of the text before is not emptied": KeepsTheTextBefore,
}


@on_all_pairs
@pytest.mark.parametrize("bug", CACHE_BUGS)
def test_a_broken_cache_of_both_loops_is_a_mismatch_of_both(bug, family, dtype):
    """What the fault does to the logits must not pass for rounding."""
    model, draft = pair(family, dtype)
    main = CACHE_BUGS[bug](model)
    main.forward(ids_of(OTHER_TEXT))  # the text before
    outputs = baseline(main, PROMPT, NEW).token_ids, speculate(main, draft, PROMPT, K, NEW).token_ids
    divergence = sd.find_divergence(main, PROMPT, *outputs)
    assert_mismatch(divergence, "both")
    assert (divergence.index is None) == (outputs[0] == outputs[1])


def test_a_fault_in_the_drafts_cache_costs_time_and_never_changes_the_output():
    model, draft = pair("llama", torch.float32)
    main, right = sd.CachedModel(model), baseline(model, PROMPT, NEW).token_ids
    correct = speculate(main, draft, PROMPT, K, NEW)
    # A cache that is not emptied is none: a draft empties it itself.
    for kind in (TooLittle, Never, *(set(CACHE_BUGS.values()) - {KeepsTheTextBefore})):
        output = speculate(main, kind(draft), PROMPT, K, NEW)
        assert output.token_ids == right
        assert len(output.rounds) > len(correct.rounds)


def test_what_is_planted_in_is_right_without_a_bug():
    """The classes that the faults are made of, with no fault in them."""
    right_sampler = broken_accept(lambda drafted, chosen, accepted: chosen[: accepted + 1])
    unchanged = broken_roll_back(lambda tokens: tokens), broken_verify(lambda ids: ids), broken_pass()
    model, draft = pair("gemma2", torch.float32)
    right, _ = right_outputs("gemma2", torch.float32)
    for kind in (after_each_pass(lambda layer, read: None), *unchanged):
        main = kind(model)
        assert baseline(main, PROMPT, NEW).token_ids == right
        same = speculate(main, draft, PROMPT, K, NEW, sampler=right_sampler).token_ids
        assert sd.find_divergence(main, PROMPT, right, same) is None


class SecondBest(sd.Greedy):
    """Takes the second best token once in a while."""

    def sample(self, logits, ids, uniform):
        return self.choose(logits)[:, None]

    def score(self, logits, ids, uniform):
        return self.choose(logits), sd.log_likelihood(logits, ids)

    def choose(self, logits):
        best = logits.topk(2, dim=-1).indices
        return torch.where(best[:, 0] % 5 == 0, best[:, 1], best[:, 0])


def test_a_wrong_sampler_of_both_loops_is_found_though_the_outputs_are_equal():
    model, draft = pair("llama", torch.float32)
    right = baseline(model, PROMPT, NEW, sampler=SecondBest()).token_ids
    assert right == speculate(model, draft, PROMPT, K, NEW, sampler=SecondBest()).token_ids
    divergence = sd.find_divergence(sd.CachedModel(model), PROMPT, right, right)
    assert_mismatch(divergence, "both")
    assert divergence.index is divergence.baseline_token is divergence.speculative_token is None


# Rounding.


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_rounding_in_bfloat16_is_a_tie_and_never_a_mismatch(family):
    kinds, equal_but_tied = [], 0
    for seed in range(3):
        model = make_model(family, seed, torch.bfloat16)
        main, draft = sd.CachedModel(model), sd.CachedModel(like(model, 0.02))
        for prompt in (PROMPT, [token + seed for token in PROMPT]):
            outputs = baseline(main, prompt, 2 * NEW).token_ids, speculate(main, draft, prompt, K, 2 * NEW).token_ids
            divergence = sd.find_divergence(main, prompt, *outputs)
            if outputs[0] == outputs[1]:
                assert divergence is None
                equal_but_tied += sd.certify(main, prompt, outputs[0]) > 0
            else:
                assert 0 <= divergence.gap <= divergence.noise and 0 <= divergence.baseline_gap <= divergence.noise
                assert divergence.at_fault is None
                kinds.append(divergence.kind)
    assert set(kinds) == {"tie"}  # it does happen
    assert equal_but_tied  # and so does this: both round alike, and unlike the certifying pass


def test_a_tie_of_two_equal_logits():
    """Two tokens with the same output weights always tie: whichever is chosen, it is the main model's own."""
    model = make_model("llama")
    main = sd.CachedModel(model)
    right = baseline(main, PROMPT, NEW).token_ids
    place = next(i for i in range(8, NEW) if right[i] not in right[:i])
    twin = next(token for token in range(61) if token not in right)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[twin] = head[right[place]]
    text = (*right[:place], twin)  # and the main model's own text after it
    text += baseline(main, [*PROMPT, *text], NEW - place - 1).token_ids
    for outputs in ((right, text), (text, right)):
        divergence = sd.find_divergence(main, PROMPT, *outputs)
        assert (divergence.index, divergence.kind, divergence.at_fault) == (place, "tie", None)
        assert_parts(divergence, *outputs)
    # And a text that goes wrong only behind its tie is found out: every token is certified, of both.
    wrong = (*text[:-1], logits_by_hand(model, text)[-1].argmin().item())
    for outputs, at_fault in (((right, wrong), "speculative"), ((wrong, right), "baseline"), ((wrong, wrong), "both")):
        assert_mismatch(sd.find_divergence(main, PROMPT, *outputs), at_fault)


def test_a_text_that_stops_early_or_late_is_a_mismatch():
    """Though each of its tokens is right: rounding ends no text."""
    main = sd.CachedModel(make_model("gemma2"))
    right = baseline(main, PROMPT, NEW).token_ids
    for outputs, tokens in (((right, right[:-2]), (right[-2], None)), ((right[:-2], right), (None, right[-2]))):
        divergence = sd.find_divergence(main, PROMPT, *outputs)
        assert (divergence.kind, divergence.at_fault, divergence.index) == ("mismatch", "speculative", NEW - 2)
        assert (divergence.baseline_token, divergence.speculative_token) == tokens


# The figures of the check.


def logits_by_hand(model, output, stepwise=False):
    """The logits before each token of an output: in one pass without a cache, or one token at a time with one."""
    text = ids_of([*PROMPT, *output[:-1]])
    with torch.no_grad():
        if not stepwise:
            return model(input_ids=text, use_cache=False).logits[0, len(PROMPT) - 1 :]
        cache, rows = transformers.DynamicCache(config=model.config), []
        for token in text.split(1, dim=1):
            rows.append(model(token, cache=cache, use_cache=True).logits[0])
        return torch.cat(rows)[len(PROMPT) - 1 :]


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_the_gaps_by_hand(family):
    model = make_model(family)
    main = sd.CachedModel(model)
    right, other = (baseline(one, PROMPT, 20).token_ids for one in (model, always_wrong(model)))
    logits = logits_by_hand(model, other)
    gap = (logits.amax(-1) - logits[range(20), other]).max().item()
    one, swapped = (sd.find_divergence(main, PROMPT, *both) for both in ((right, other), (other, right)))
    assert (one.gap, one.baseline_gap) == (pytest.approx(gap, rel=1e-4), 0) and gap > 0.1
    assert (swapped.baseline_gap, swapped.gap) == (pytest.approx(gap, rel=1e-4), 0)
    assert (one.index, swapped.index) == (0, 0) and 0 < one.noise < 1e-3


@on_all_pairs
def test_the_noise_is_what_rounding_does(family, dtype):
    """An independent measure: how far the logits move if the same text is read one token at a time."""
    model, _ = pair(family, dtype)
    right = baseline(model, PROMPT, NEW).token_ids
    noise = sd.rounding_noise(sd.CachedModel(model), PROMPT, right)
    single, _ = pair(family, torch.float32)
    moved = (logits_by_hand(single, right, stepwise=True) - logits_by_hand(single, right)).abs().max().item()
    unit = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert unit * moved / 10 < noise < unit * moved * 10
    assert not any(module._forward_hooks for module in model.modules())


def test_the_check_shares_no_cache_with_the_loops():
    """Certifying neither reads nor changes the cache."""
    model, _ = pair("llama", torch.float32)
    main = sd.CachedModel(model)
    right = baseline(main, PROMPT, NEW).token_ids
    for layer in main.cache.layers:
        layer.keys, layer.values = layer.keys * math.nan, layer.values * math.nan
    kept = [(layer.keys, layer.values, layer.keys.shape) for layer in main.cache.layers]
    assert sd.certify(main, PROMPT, right) == 0 < sd.rounding_noise(main, PROMPT, right) < 1e-4
    for layer, (keys, values, shape) in zip(main.cache.layers, kept, strict=True):
        assert layer.keys is keys and layer.values is values and keys.isnan().all() and keys.shape == shape


# Logits that are not finite.


def with_bias(model, value, ids):
    """A model whose output layer adds so much to the logits of some ids, as to those that only pad a vocabulary."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight), dtype=head.weight.dtype))
    with torch.no_grad():
        head.bias[list(ids)] = value
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [-math.inf, -1e9])
def test_tokens_that_are_ruled_out_hide_no_mistake(value, dtype):
    """How rounding moves their logits says nothing: what is right stays right, and a wrong token is no tie."""
    model, draft = (with_bias(of, value, range(50, 61)) for of in pair("llama", dtype))
    main = sd.CachedModel(model)
    for prompt in (PROMPT, OTHER_TEXT):
        right, same = baseline(main, prompt, NEW).token_ids, speculate(main, draft, prompt, K, NEW).token_ids
        divergence = sd.find_divergence(main, prompt, right, same)
        assert divergence is None if right == same else divergence.kind == "tie"
        with torch.inference_mode():
            worst = model(ids_of([*prompt, *right[:9]])).logits[0, -1, :50].argmin().item()
        for token in (worst, 55):  # allowed, and not
            wrong = (*right[:9], token, *right[10:])
            assert_mismatch(sd.find_divergence(main, prompt, right, wrong), "speculative")
            assert_mismatch(sd.find_divergence(main, prompt, wrong, wrong), "both")


def test_a_noise_that_is_not_finite_is_no_tie():
    """Rounded again, the logits of a token that is always chosen are infinite."""
    model, _ = pair("llama", torch.bfloat16)
    main = sd.CachedModel(with_bias(model, torch.finfo(torch.bfloat16).max, [60]))
    right = baseline(main, PROMPT, NEW).token_ids
    wrong = (*right[:9], 5, *right[10:])
    for outputs in ((right, wrong), (wrong, right), (wrong, wrong)):
        with pytest.raises(ArithmeticError, match="finite|infin"):
            sd.find_divergence(main, PROMPT, *outputs)
    assert sd.find_divergence(main, PROMPT, right, right) is None


def broken_weights(model, value):
    """A copy with one weight of its last layer replaced."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        [weight for weight in model.parameters() if weight.dim() > 1][-2].view(-1)[0] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_main_model_that_is_not_finite_certifies_nothing(value):
    model, _ = pair("llama", torch.bfloat16)
    main = sd.CachedModel(broken_weights(model, value))
    output = baseline(main, PROMPT, 8).token_ids
    with pytest.raises(ArithmeticError, match="finite"):
        sd.find_divergence(main, PROMPT, output, output)


@pytest.mark.parametrize("schedule", [sd.FixedSchedule(3), sd.AutoSchedule([1.0, 1.1, 1.2])], ids=["3", "auto"])
def test_a_draft_that_is_not_finite_costs_time_and_never_changes_the_output(schedule):
    model, draft = pair("llama", torch.float32)
    for value in (math.nan, math.inf):
        output = speculate(model, broken_weights(draft, value), PROMPT, schedule, NEW).token_ids
        assert output == baseline(model, PROMPT, NEW).token_ids


def test_a_check_that_fails_leaves_the_model_as_it_was():
    model = make_model("llama")
    main, passes = sd.CachedModel(model), []
    right, wrong = baseline(main, PROMPT, NEW).token_ids, baseline(always_wrong(model), PROMPT, NEW).token_ids

    def out_of_memory(*_):  # two passes certify, one is exact, and in the fourth each layer's output is rounded
        passes.append(1)
        if len(passes) == 4:
            raise MemoryError

    hook = model.register_forward_pre_hook(out_of_memory)
    with pytest.raises(MemoryError):
        sd.find_divergence(main, PROMPT, right, wrong)
    hook.remove()
    assert not any(module._forward_hooks for module in model.modules())

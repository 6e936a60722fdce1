"""The lossless check: a fault in either loop is a mismatch and is laid at the right door, and rounding is a tie."""

import copy
import dataclasses
import functools
import math
import pathlib

import pytest
import torch
import transformers
from helpers import FAMILIES, always_wrong, baseline, ids_of, like, make_model, prompt_of, speculate

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]
OTHER_TEXT = [7] * 40
NEW, K = 36, 2
BUNDLED = pathlib.Path(__file__).resolve().parent / "tiny_gemma2"


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


on_all_pairs = pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, dtype) for family in ("gemma2", "llama", "gpt2") for dtype in (torch.float32, torch.bfloat16)],
    ids=str,
)


# Faults of the speculative loop: in rolling back, in verifying, in accepting, in emitting.


def broken_roll_back(tokens_dropped):
    """A model that drops another number of tokens than the loop asks for."""

    class Broken(sd.CachedModel):
        def roll_back(self, tokens):
            super().roll_back(tokens_dropped(tokens))

    return Broken


RollsBackTooLittle = broken_roll_back(lambda tokens: max(0, tokens - 1))
RollsBackTooMuch = broken_roll_back(lambda tokens: tokens + 1)
NeverRollsBack = broken_roll_back(lambda tokens: 0)
RollsBackWhatWasAccepted = broken_roll_back(lambda tokens: K - tokens)


def broken_verify(ids_read):
    """A model whose verify pass reads other tokens than the loop asks for."""

    class Broken(sd.CachedModel):
        def verify(self, score, ids):
            return super().verify(score, ids_read(ids))

    return Broken


class ReadsTheLastTokenTwice(sd.CachedModel):
    def verify(self, score, ids):
        self.forward(ids[:, :1])
        return super().verify(score, ids)


def broken_accept(emitted):
    """A sampler that emits what a function of the draft tokens, the main model's choices and the right number says."""

    class Broken(sd.Greedy):
        def accept(self, target, draft_ids, q):
            accepted = len(super().accept(target, draft_ids, q)) - 1
            return emitted(draft_ids.tolist(), target.tolist(), accepted)

    return Broken()


def last_draft_token_unseen(drafted, chosen, accepted):
    return chosen if accepted >= K - 1 else chosen[: accepted + 1]


def one_place_off(drafted, chosen, accepted):
    return [*drafted[:accepted], *chosen[accepted + 1 : accepted + 2]] or chosen[:1]


def one_too_many(drafted, chosen, accepted):
    return drafted[: accepted + 1] + chosen[accepted + 1 : accepted + 2]


def emit_no_correction(prompt, output, tokens, emit=sd.emit):
    return emit(prompt, output, tokens[: max(1, len(tokens) - 1)])


# Of each what is broken: the main model's class, the draft's, the sampler, or the function `emit`.
SPECULATIVE_BUGS = {
    "one stale token stays in both caches": {"main": RollsBackTooLittle, "draft": RollsBackTooLittle},
    "one stale token stays in the main model's cache": {"main": RollsBackTooLittle},
    "one token too many is rolled back": {"main": RollsBackTooMuch},
    "nothing is rolled back": {"main": NeverRollsBack},
    "what was accepted is rolled back": {"main": RollsBackWhatWasAccepted},
    "the verify pass reads its tokens in the wrong order": {"main": broken_verify(lambda ids: ids.roll(-1, dims=1))},
    "the verify pass reads another token than the last": {
        "main": broken_verify(lambda ids: torch.cat([ids[:, :1] // 2, ids[:, 1:]], dim=1))
    },
    "the text's last token is read twice": {"main": ReadsTheLastTokenTwice},
    "the last draft token is accepted unseen": {"sampler": broken_accept(last_draft_token_unseen)},
    "the main model's choices are read one place off": {"sampler": broken_accept(one_place_off)},
    "one wrong draft token is accepted": {"sampler": broken_accept(one_too_many)},
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
    place = divergence.index
    assert right[:place] == wrong[:place]
    assert (divergence.baseline_token, divergence.speculative_token) == (right[place], wrong[place])
    assert right[place] != wrong[place]


class VerifiesWithWrongPositions(sd.CachedModel):
    """As if the text began with the verify pass."""

    @torch.inference_mode()
    def verify(self, score, ids):
        positions = torch.arange(ids.shape[1])[None]
        output = self.model(ids, position_ids=positions, past_key_values=self.cache, use_cache=True)
        return score(output.logits[0], ids, None)


class VerifiesWithoutCausalMask(sd.CachedModel):
    """Each draft token sees those behind it, too."""

    @torch.inference_mode()
    def verify(self, score, ids):
        mask = torch.zeros(1, 1, 1, 1, dtype=self.model.dtype)
        output = self.model(ids, attention_mask=mask, past_key_values=self.cache, use_cache=True)
        return score(output.logits[0], ids, None)


@functools.cache
def bundled(dtype, **changes):
    """The bundled pair, and the ids of a prompt."""
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=dtype, **changes)
    tokenizer = sd.load_tokenizer(str(BUNDLED / "main"))
    chat = sd.Chat(tokenizer, {}, NEW, frozenset(), 0, 1024, "main", 4096)
    prompt = chat.encode(sd.Question("What does list.sort do?", 1))
    return load(BUNDLED / "main"), load(BUNDLED / "draft"), prompt.ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [VerifiesWithWrongPositions, VerifiesWithoutCausalMask])
@pytest.mark.parametrize("which", ["llama", "bundled"])
def test_a_verify_pass_that_sees_the_wrong_tokens_is_a_mismatch(which, kind, dtype):
    model, draft, prompt = bundled(dtype) if which == "bundled" else (*pair(which, dtype), PROMPT)
    main = kind(model)
    outputs = baseline(main, prompt, NEW // 2).token_ids, speculate(main, draft, prompt, 4, NEW // 2).token_ids
    assert_mismatch(sd.find_divergence(main, prompt, *outputs), "speculative")


# Faults of the baseline.


class BrokenStep(sd.CachedModel):
    """A model whose fifth step is broken, if there are as many."""

    steps = 0

    def prefill(self, prompt_ids, rolls_back=True):
        self.steps = 0
        return super().prefill(prompt_ids, rolls_back)

    def step(self, then, ids, uniform=None, logits_to_keep=1):
        self.steps += 1
        return (self.broken_step if self.steps == 5 else super().step)(then, ids, uniform, logits_to_keep)


class ReadsAWrongToken(BrokenStep):
    def broken_step(self, then, ids, uniform, logits_to_keep):
        return sd.CachedModel.step(self, then, (ids + 1) % 61, uniform, logits_to_keep)


class ChoosesTheLeastLikely(BrokenStep):
    def broken_step(self, then, ids, uniform, logits_to_keep):
        return self.forward(ids, logits_to_keep).argmin(dim=-1, keepdim=True)


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
    "the least likely token is chosen once": ChoosesTheLeastLikely,
    "one token is replaced": None,  # behind the loop
}


@on_all_pairs
@pytest.mark.parametrize("bug", BASELINE_BUGS)
def test_a_broken_baseline_is_a_mismatch_of_the_baseline(bug, family, dtype):
    model, kind = pair(family, dtype)[0], BASELINE_BUGS[bug]
    wrong, right = right_outputs(family, dtype)
    if kind:
        broken = kind(model)
        broken.forward(ids_of(OTHER_TEXT))  # the text before
        wrong = baseline(broken, PROMPT, NEW).token_ids
    else:
        wrong = (*wrong[:5], (wrong[5] + 1) % 61, *wrong[6:])
    divergence = sd.find_divergence(sd.CachedModel(model), PROMPT, wrong, right)
    assert_mismatch(divergence, "baseline", 2.0 if dtype == torch.float32 else 1.4)  # the narrowest had 1.5
    place = divergence.index
    assert wrong[:place] == right[:place] and wrong[place] != right[place]
    assert (divergence.baseline_token, divergence.speculative_token) == (wrong[place], right[place])
    if bug in ("one token is replaced", "the least likely token is chosen once"):
        assert place == 5


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_cache_of_the_library_is_a_mismatch(monkeypatch, dtype):
    """With a window of one token, the library's cache keeps all of a text where it should keep nothing.

    Only in steps of the baseline: in a cache that can be rolled back, it does this right. With two it is right, too.
    """
    for window, at_fault in ((1, "baseline"), (2, None)):
        shape = FAMILIES["gemma2"]()
        shape.sliding_window = window
        monkeypatch.setitem(FAMILIES, "narrow", lambda shape=shape: shape)
        model = make_model("narrow", dtype=dtype)
        random = model, like(model, 0.1), PROMPT
        for model, draft, prompt in (random, bundled(dtype, sliding_window=window)):
            assert model.config.sliding_window == window
            main = sd.CachedModel(model)
            outputs = baseline(main, prompt, NEW // 2).token_ids, speculate(main, draft, prompt, K, NEW // 2).token_ids
            divergence = sd.find_divergence(main, prompt, *outputs)
            if at_fault:
                assert_mismatch(divergence, at_fault)
            else:
                assert divergence is None or divergence.kind == "tie"


def test_a_fault_in_the_drafts_cache_costs_time_and_never_changes_the_output():
    model, draft = pair("llama", torch.float32)
    main, right = sd.CachedModel(model), baseline(model, PROMPT, NEW).token_ids
    correct = speculate(main, draft, PROMPT, K, NEW)
    # A cache that is not emptied is none: a draft empties it itself.
    for kind in (RollsBackTooLittle, NeverRollsBack, *(set(CACHE_BUGS.values()) - {KeepsTheTextBefore})):
        output = speculate(main, kind(draft), PROMPT, K, NEW)
        assert output.token_ids == right
        assert len(output.rounds) > len(correct.rounds)
        assert sd.find_divergence(main, PROMPT, right, output.token_ids) is None


def test_what_is_planted_in_is_right_without_a_bug():
    """The classes that the faults are made of, with no fault in them."""

    class UnbrokenStep(BrokenStep):
        broken_step = sd.CachedModel.step

    right_sampler = broken_accept(lambda drafted, chosen, accepted: chosen[: accepted + 1])
    unchanged = broken_roll_back(lambda tokens: tokens), broken_verify(lambda ids: ids)
    for family in ("gemma2", "llama", "gpt2"):
        model, draft = pair(family, torch.float32)
        right = baseline(model, PROMPT, NEW).token_ids
        for kind in (sd.CachedModel, UnbrokenStep, after_each_pass(lambda layer, read: None), *unchanged):
            main = kind(model)
            assert baseline(main, PROMPT, NEW).token_ids == right
            same = speculate(main, draft, PROMPT, K, NEW, sampler=right_sampler).token_ids
            assert sd.find_divergence(main, PROMPT, right, same) is None


# Equal outputs that are wrong together.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [0, 5, NEW - 1])
def test_two_equal_outputs_with_the_same_wrong_token_are_a_mismatch_of_both(place, dtype):
    model, _ = pair("llama", dtype)
    main = sd.CachedModel(model)
    right = baseline(main, PROMPT, NEW).token_ids
    logits = model(input_ids=ids_of([*PROMPT, *right[:place]])).logits[0, -1]
    wrong = (*right[:place], logits.argmin().item())
    wrong += baseline(main, [*PROMPT, *wrong], NEW).token_ids[: NEW - place - 1]  # and right from there on
    divergence = sd.find_divergence(main, PROMPT, wrong, wrong)
    assert_mismatch(divergence, "both")
    assert divergence.index is divergence.baseline_token is divergence.speculative_token is None
    below = (logits.max() - logits.min()).item()
    assert divergence.gap == divergence.baseline_gap == pytest.approx(below, rel=2e-2 if dtype.itemsize == 2 else 1e-4)


def test_a_wrong_sampler_of_both_loops_is_found_though_the_outputs_are_equal():
    """The whole way: both loops take the second best token once in a while, and agree."""

    class SecondBest(sd.Greedy):
        def sample(self, logits, ids, uniform):
            return self.choose(logits)[:, None]

        def score(self, logits, ids, uniform):
            return self.choose(logits), sd.log_likelihood(logits, ids)

        def choose(self, logits):
            best = logits.topk(2, dim=-1).indices
            return torch.where(best[:, 0] % 5 == 0, best[:, 1], best[:, 0])

    model, draft = pair("llama", torch.float32)
    main, sampler = sd.CachedModel(model), SecondBest()
    _, (result,) = results_of(main, sd.CachedModel(draft), sampler)
    first, second = result.outcomes.values()
    assert first.run.token_ids == second.run.token_ids
    for outcome in (first, second):
        assert_mismatch(outcome.verdict.divergence, "both")
        assert outcome.verdict.divergence.index is None


# Rounding.


@pytest.mark.parametrize("family", ["llama", "gpt_bigcode", "olmo2"])
def test_rounding_in_bfloat16_is_a_tie_and_never_a_mismatch(family):
    kinds, equal_but_tied = [], 0
    for seed in range(4):
        model = make_model(family, seed, torch.bfloat16)
        main, draft = sd.CachedModel(model), sd.CachedModel(like(model, 0.02))
        for prompt in (PROMPT, PROMPT[::-1], [token + seed for token in PROMPT]):
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

    def logits_after(written):
        return model(input_ids=ids_of([*PROMPT, *written])).logits[0, -1]

    text = [*right[:place], twin]
    while len(text) < NEW:  # the main model's own text after the twin, from passes over everything
        text.append(logits_after(text).argmax().item())
    text = tuple(text)
    divergence = sd.find_divergence(main, PROMPT, right, text)
    assert (divergence.index, divergence.kind, divergence.at_fault) == (place, "tie", None)
    assert (divergence.baseline_token, divergence.speculative_token) == (right[place], twin)
    swapped = sd.find_divergence(main, PROMPT, text, right)
    assert (swapped.index, swapped.kind, swapped.at_fault) == (place, "tie", None)
    # And a text that goes wrong only behind its tie is found out: every token is certified, of both.
    wrong = (*text[:-1], logits_after(text[:-1]).argmin().item())
    for outputs, at_fault in (((right, wrong), "speculative"), ((wrong, right), "baseline"), ((wrong, wrong), "both")):
        assert_mismatch(sd.find_divergence(main, PROMPT, *outputs), at_fault)


def test_a_text_that_stops_early_or_late_is_a_mismatch():
    """Though each of its tokens is right: rounding ends no text."""
    main = sd.CachedModel(make_model("gemma2"))
    right = baseline(main, PROMPT, NEW).token_ids
    early = sd.find_divergence(main, PROMPT, right, right[:-2])
    assert (early.kind, early.at_fault, early.index) == ("mismatch", "speculative", NEW - 2)
    assert (early.baseline_token, early.speculative_token) == (right[-2], None)
    late = sd.find_divergence(main, PROMPT, right[:-2], right)
    assert (late.kind, late.at_fault, late.index) == ("mismatch", "speculative", NEW - 2)
    assert (late.baseline_token, late.speculative_token) == (None, right[-2])


# The figures of the check.


def logits_by_hand(model, output, stepwise=False):
    """The logits before each token of an output: in one pass without a cache, or one token at a time with one."""
    text = ids_of([*PROMPT, *output[:-1]])
    with torch.no_grad():
        if not stepwise:
            return model(input_ids=text, use_cache=False).logits[0, len(PROMPT) - 1 :]
        cache, rows = transformers.DynamicCache(config=model.config), []
        for token in text.split(1, dim=1):
            rows.append(model(token, past_key_values=cache, use_cache=True).logits[0])
        return torch.cat(rows)[len(PROMPT) - 1 :]


def gap_by_hand(model, output):
    logits = logits_by_hand(model, output)
    return (logits.amax(-1) - logits[range(len(output)), output]).max().item()


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_the_gaps_by_hand(family):
    model = make_model(family)
    main = sd.CachedModel(model)
    right, other = (baseline(one, PROMPT, 20).token_ids for one in (model, always_wrong(model)))
    one, swapped = (sd.find_divergence(main, PROMPT, *both) for both in ((right, other), (other, right)))
    assert one.gap == pytest.approx(gap_by_hand(model, other), rel=1e-4) and one.gap > 0.1
    assert swapped.baseline_gap == pytest.approx(one.gap, rel=1e-6)
    assert one.baseline_gap == swapped.gap == gap_by_hand(model, right) == 0
    assert (one.index, swapped.index) == (0, 0)
    assert 0 < one.noise < 1e-3 and 0 < swapped.noise < 1e-3


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


def test_the_check_leaves_nothing_on_the_model():
    """Or what transformers compiles of it would be compiled anew, in a timed run."""
    for family in ("llama", "gemma2"):
        model = make_model(family)
        sd.certify(sd.CachedModel(model), tuple(PROMPT), (1, 2, 3))
        decoder = model.get_decoder()
        assert "forward" not in vars(decoder)
        hooked = lambda *inputs, forward=decoder.forward, **options: forward(*inputs, **options)  # noqa: E731
        decoder.forward = hooked  # as accelerate does for weights that it moves
        sd.certify(sd.CachedModel(model), tuple(PROMPT), (1, 2, 3))
        assert vars(decoder)["forward"] is hooked


def test_the_check_shares_no_cache_with_the_loops():
    """Certifying neither reads nor changes the cache."""
    model, _ = pair("llama", torch.float32)
    main = sd.CachedModel(model)
    right = baseline(main, PROMPT, NEW).token_ids
    for layer in main.cache.layers:
        layer.keys, layer.values = torch.full_like(layer.keys, math.nan), torch.full_like(layer.values, math.nan)
    kept = [part for layer in main.cache.layers for part in (layer.keys, layer.values)]
    shapes = [part.shape for part in kept]
    assert sd.certify(main, PROMPT, right) == 0 < sd.rounding_noise(main, PROMPT, right) < 1e-4
    after = [part for layer in main.cache.layers for part in (layer.keys, layer.values)]
    assert all(part is same and part.isnan().all() for part, same in zip(kept, after, strict=True))
    assert shapes == [part.shape for part in after]


def test_what_a_broken_cache_does_is_no_noise():
    """Read one token at a time, its logits are far off; the noise is what it is without that fault."""
    model, _ = pair("llama", torch.float32)
    right = baseline(model, PROMPT, NEW).token_ids
    logits, correct = logits_by_hand(model, right), sd.rounding_noise(sd.CachedModel(model), PROMPT, right)
    for kind in CACHE_BUGS.values():
        main = kind(model)
        main.forward(ids_of(OTHER_TEXT))
        main.prefill(ids_of(PROMPT[:-1]))
        rows = [main.forward(ids_of([token])) for token in [PROMPT[-1], *right[:-1]]]
        assert (torch.cat(rows) - logits).abs().max() > 0.1
        assert sd.rounding_noise(main, PROMPT, right) == correct < 1e-4


# The check as the benchmark runs it.


class Texts:
    """A chat that has no further turns."""

    context, behind = 10_000, 0

    def decode(self, ids):
        return str(ids)

    def follow_up(self, question, answer):
        return None


def results_of(main, draft, sampler, lengths=(K,), repeats=1, new=NEW):
    """What the program measures, and finds in it, for one prompt."""
    questions = [dataclasses.replace(prompt_of(PROMPT, 1, new), longest=len(PROMPT))]
    heat = 0.8 if isinstance(sampler, sd.Sampling) else 0.0
    settings = sd.Settings(main="m", draft=("d",), draft_tokens=lengths, repeats=repeats, warmup=0, temperature=heat)
    methods = sd.our_methods(main, {"d": sd.ModelDraft(draft, sampler)}, sampler, settings, questions[0])
    return methods, list(sd.benchmark(questions, methods, main, Texts(), settings, lambda *_: None))


def judged(main, runs, is_sampled=False):
    """The verdicts on these runs."""
    return sd.judge(main, is_sampled, prompt_of(PROMPT, 1, NEW), runs, dict.fromkeys(runs))


def test_every_repeat_is_checked():
    """Not the median run only."""
    model, _ = pair("llama", torch.float32)
    main = sd.CachedModel(model)
    right, wrong = baseline(main, PROMPT, NEW), baseline(always_wrong(model), PROMPT, NEW)
    verdicts = judged(main, {"baseline": [right], "K = 2": [right, right, wrong]})
    assert_mismatch(verdicts["K = 2"].divergence, "speculative")
    assert verdicts["K = 2"].kind == "mismatch" and verdicts["baseline"] == sd.Verdict("identical")


def only_without_cache(model, act):
    """Call `act` with the number of the pass before each pass without a cache: those of the check, and no others."""
    passes = []

    def hook(module, arguments, keywords):
        if not keywords["use_cache"]:
            passes.append(1)
            act(len(passes))

    return model.register_forward_pre_hook(hook, with_kwargs=True)


def out_of_memory(*_):
    raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")


@pytest.mark.parametrize("sampler", [sd.Greedy(), sd.Sampling(0.8, seed=3)], ids=["greedy", "sampled"])
def test_a_check_that_fails_costs_the_verdict_and_no_timing(sampler):
    model = make_model("llama")
    draft = like(model, 0.1)
    only_without_cache(model, out_of_memory)
    methods, (result,) = results_of(sd.CachedModel(model), sd.CachedModel(draft), sampler, repeats=3)
    for outcome in result.outcomes.values():
        assert len(outcome.runs) == 3 and all(len(run.token_ids) == NEW for run in outcome.runs)
        assert outcome.verdict == sd.Verdict("unchecked", None, "CUDA out of memory. Tried to allocate 2 GiB")
        assert outcome.error is None
    figures = sd.figures_of((result,), methods[1])
    assert figures.unchecked == 1 and figures.identical == 0 and figures.speedup_percent is not None


def test_a_check_that_fails_in_the_noise_leaves_the_model_as_it_was():
    model = make_model("llama")
    main = sd.CachedModel(model)
    runs = {"baseline": [baseline(main, PROMPT, NEW)], "K = 2": [baseline(always_wrong(model), PROMPT, NEW)]}
    # Of the baseline's output one pass; of the other two, a third, and one in which each layer's output is rounded.
    hook = only_without_cache(model, lambda number: number == 5 and out_of_memory())
    verdicts = judged(main, runs)
    hook.remove()
    assert verdicts["baseline"] == sd.Verdict("identical")
    assert verdicts["K = 2"] == sd.Verdict("unchecked", None, "CUDA out of memory. Tried to allocate 2 GiB")
    assert not any(module._forward_hooks for module in model.modules())
    assert_mismatch(judged(main, runs)["K = 2"].divergence, "speculative")
    assert not any(module._forward_hooks for module in model.modules())


# Logits that are not finite.

CHEAP = [1.0 + 0.13 * length for length in range(16)]
SAMPLERS = {"greedy": sd.Greedy(), "sampled": sd.Sampling(0.8), "cut": sd.Sampling(0.8, top_k=5, top_p=0.9)}


def broken_weights(model, value=math.nan):
    """A copy with one weight of its last layer replaced."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        [weight for weight in model.parameters() if weight.dim() > 1][-2].view(-1)[0] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_main_model_that_is_not_finite_is_an_error(sampler, value):
    model, draft = pair("llama", torch.bfloat16)
    main = sd.CachedModel(broken_weights(model, value))
    _, (result,) = results_of(main, sd.CachedModel(draft), SAMPLERS[sampler], (K, "auto"), new=8)
    for label in ("baseline", "K = 2", "K = auto"):
        outcome = result.outcomes[label]
        assert outcome.error == "the main model's logits are not finite; try --dtype float32 or bfloat16"
        assert outcome.verdict is None


@pytest.mark.parametrize("length", [sd.FixedSchedule(1), sd.FixedSchedule(3), "auto"], ids=["1", "3", "auto"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_draft_that_is_not_finite_is_an_error(sampler, length):
    model, draft = pair("llama", torch.float32)
    late = copy.deepcopy(draft)  # finite up to a token that comes late in the text
    text = baseline(model, PROMPT, NEW).token_ids
    with torch.no_grad():
        late.get_input_embeddings().weight[max(text, key=text.index)] = math.nan
    drafts = [broken_weights(draft)] if sampler != "greedy" else [broken_weights(draft), late]
    for broken in drafts:
        chooser = sd.AutoSchedule(CHEAP, True) if length == "auto" else length
        with pytest.raises(ArithmeticError, match="^the draft model's logits are not finite"):
            speculate(model, broken, PROMPT, chooser, NEW, sampler=SAMPLERS[sampler])
    assert speculate(model, draft, PROMPT, length if length != "auto" else sd.AutoSchedule(CHEAP, True), NEW)


def test_a_draft_that_is_not_finite_costs_its_own_outcome_only():
    model, draft = pair("llama", torch.float32)
    broken = sd.CachedModel(broken_weights(draft))
    _, (result,) = results_of(sd.CachedModel(model), broken, sd.Greedy(), (K, "auto"))
    assert result.outcomes["baseline"].error is None
    assert result.outcomes["baseline"].verdict == sd.Verdict("identical")
    for label in ("K = 2", "K = auto"):
        outcome = result.outcomes[label]
        assert outcome.error == "the draft model's logits are not finite; try --dtype float32 or bfloat16"
        assert outcome.runs == ()

"""The lossless check: a broken loop is caught, a rounding tie is called a tie, and equal outputs are passed over."""

import inspect
import textwrap

import pytest
import torch
from conftest import alone, always_wrong, ids_of, like, make_model, speculate

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]
NEW, K = 48, 2


def planted(function, *replacements):
    """A function of the program with pieces of its source replaced: a bug planted on purpose."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in replacements:
        assert old in source
        source = source.replace(old, new)
    defined = {}
    exec(source, dict(vars(sd)), defined)
    return defined[function.__name__]


def broken_loop(*replacement):
    return {"decode": planted(sd.decode_speculatively, replacement)}


def broken_rule(*replacement):
    return {"rule": type("Broken", (sd.Greedy,), {"emit": planted(sd.Greedy.emit, replacement)})()}


BUGS = {
    "one stale token stays in both caches": broken_loop(
        "roll_back(drafted - accepted)", "roll_back(max(0, drafted - accepted - 1))"
    ),
    "one token too many is rolled back": broken_loop(
        "main.roll_back(drafted - accepted)", "main.roll_back(drafted - accepted + 1)"
    ),
    "the last guess is accepted unseen": broken_rule("for i in range(len(d)) if", "for i in range(len(d) - 1) if"),
    "the main model's choices are read one place off": broken_rule(
        "g[: n + 1]", "[*d[:n], *g[n + 1 : n + 2]] or g[:1]"
    ),
    "one wrong guess is accepted": broken_rule("g[: n + 1]", "d[: n + 1] + g[n + 1 : n + 2]"),
    "the correction is lost": broken_loop(
        "text += emitted\n        room", "text += emitted[: max(1, accepted)]\n        room"
    ),
}


@pytest.mark.parametrize("family", ["gemma2", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bug", BUGS)
def test_a_broken_loop_is_a_mismatch(bug, family, dtype):
    model = make_model(family, dtype=dtype)
    main = sd.CachedModel(model)
    baseline = alone(main, PROMPT, NEW)
    broken = speculate(main, like(model, 0.1), PROMPT, K, NEW, **BUGS[bug])
    divergence = sd.find_divergence(main, ids_of(PROMPT), baseline.token_ids, broken.token_ids)
    assert divergence.kind == "mismatch"
    assert divergence.gap > 2 * divergence.noise


def test_what_is_planted_in_is_right_without_a_bug():
    model = make_model("gemma2")
    baseline = alone(model, PROMPT, NEW)
    for unbroken in (broken_loop("accepted", "accepted"), broken_rule("n", "n")):
        same = speculate(model, like(model, 0.1), PROMPT, K, NEW, **unbroken)
        assert sd.find_divergence(sd.CachedModel(model), ids_of(PROMPT), baseline.token_ids, same.token_ids) is None


def test_rounding_in_bfloat16_is_a_tie_and_never_a_mismatch():
    kinds = []
    for seed in range(12):
        model = make_model("llama", seed, torch.bfloat16)
        main, draft = sd.CachedModel(model), sd.CachedModel(like(model, 0.02))
        for prompt in (PROMPT, PROMPT[::-1], [token + seed for token in PROMPT]):
            baseline = alone(main, prompt, NEW).token_ids
            speculative = speculate(main, draft, prompt, K, NEW).token_ids
            if divergence := sd.find_divergence(main, ids_of(prompt), baseline, speculative):
                assert 0 <= divergence.gap <= divergence.noise
                kinds.append(divergence.kind)
    assert set(kinds) == {"tie"}  # it does happen


def test_a_tie_of_two_equal_logits():
    """Two tokens with the same output weights always tie: whichever is written, it is the main model's own."""
    model = make_model("llama")
    main = sd.CachedModel(model)
    baseline = alone(main, PROMPT, NEW).token_ids
    place = next(i for i in range(8, NEW) if baseline[i] not in baseline[:i])
    twin = next(token for token in range(61) if token not in baseline)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[twin] = head[baseline[place]]

    def logits_after(written):
        return model(input_ids=ids_of(PROMPT + written)).logits[0, -1]

    text = baseline[:place] + [twin]
    while len(text) < NEW:  # the main model's own text after the twin, from passes over everything
        text.append(logits_after(text).argmax().item())
    divergence = sd.find_divergence(main, ids_of(PROMPT), baseline, text)
    assert (divergence.index, divergence.kind) == (place, "tie")
    assert (divergence.baseline_token, divergence.speculative_token) == (baseline[place], twin)
    # And a text that goes wrong only behind its tie is found out: every token is certified.
    wrong = [*text[:-1], logits_after(text[:-1]).argmin().item()]
    assert sd.find_divergence(main, ids_of(PROMPT), baseline, wrong).kind == "mismatch"


def test_a_text_that_stops_early_or_late_is_a_mismatch():
    main = sd.CachedModel(make_model("gemma2"))
    baseline = alone(main, PROMPT, NEW).token_ids
    early = sd.find_divergence(main, ids_of(PROMPT), baseline, baseline[:-2])
    assert (early.kind, early.index, early.speculative_token) == ("mismatch", NEW - 2, None)
    late = sd.find_divergence(main, ids_of(PROMPT), baseline[:-2], baseline)
    assert (late.kind, late.baseline_token) == ("mismatch", None)


def test_the_gap_and_the_noise_by_hand():
    model = make_model("gemma2")
    main = sd.CachedModel(model)
    baseline = alone(main, PROMPT, 20).token_ids
    other = alone(always_wrong(model), PROMPT, 20).token_ids
    divergence = sd.find_divergence(main, ids_of(PROMPT), baseline, other)
    logits = model(input_ids=ids_of(PROMPT + other), use_cache=False).logits[0, 4:-1]
    below = logits.amax(-1) - logits[range(20), other]
    assert divergence.gap == pytest.approx(below.max().item(), rel=1e-4)
    assert divergence.index == 0 and 0 < divergence.noise < 1e-3

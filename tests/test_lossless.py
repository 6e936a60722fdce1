"""The lossless check: a broken loop is caught, a rounding tie is called a tie, and equal outputs are passed over."""

import inspect

import pytest
import torch
from conftest import always_wrong, like, make_model

import speculative_decoding as sd

PROMPT = torch.tensor([[5, 9, 13, 2, 40]])
NEW, K = 48, 2


def loop_with(old, new):
    """`speculative_decode` with one piece of its source replaced: a bug planted on purpose."""
    source = inspect.getsource(sd.speculative_decode)
    assert source.count(old) >= 1
    namespace = dict(vars(sd))
    exec(source.replace(old, new), namespace)
    return namespace["speculative_decode"]


BUGS = {
    "one stale token stays in both caches": (
        "roll_back(drafted - accepted)",
        "roll_back(max(0, drafted - accepted - 1))",
    ),
    "one token too many is rolled back": (
        "main.roll_back(drafted - accepted)",
        "main.roll_back(drafted - accepted + 1)",
    ),
    "the last guess is accepted unseen": ("for i in range(drafted) if", "for i in range(drafted - 1) if"),
    "the main model's choices are read one place off": ("g[: accepted + 1]", "g[1 : accepted + 2]"),
    "one wrong guess is accepted": ("g[: accepted + 1]", "(d[: accepted + 1] + g[accepted + 1 : accepted + 2])"),
    "the correction is lost": ("g[: accepted + 1]", "g[: max(1, accepted)]"),
}


@pytest.mark.parametrize("family", ["gemma2", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bug", BUGS)
def test_a_broken_loop_is_a_mismatch(bug, family, dtype):
    model = make_model(family, dtype=dtype)
    main, draft = sd.CachedModel(model), sd.CachedModel(like(model, 0.1))
    baseline = sd.greedy_decode(main, PROMPT, NEW, set())
    broken = loop_with(*BUGS[bug])(main, draft, PROMPT, NEW, set(), sd.FixedLength(K))
    divergence = sd.find_divergence(main, PROMPT, baseline.token_ids, broken.token_ids)
    assert divergence.kind == "mismatch"
    assert divergence.gap > 2 * divergence.noise


def test_the_loop_that_is_planted_in_is_right_without_a_bug():
    model = make_model("gemma2")
    main, draft = sd.CachedModel(model), sd.CachedModel(like(model, 0.1))
    same = loop_with("accepted", "accepted")(main, draft, PROMPT, NEW, set(), sd.FixedLength(K))
    baseline = sd.greedy_decode(main, PROMPT, NEW, set())
    assert sd.find_divergence(main, PROMPT, baseline.token_ids, same.token_ids) is None


def test_rounding_in_bfloat16_is_a_tie_and_never_a_mismatch():
    kinds = []
    for seed in range(12):
        model = make_model("llama", seed, torch.bfloat16)
        main, draft = sd.CachedModel(model), sd.CachedModel(like(model, 0.02))
        for prompt in (PROMPT, PROMPT.flip(1), PROMPT + seed):
            baseline = sd.greedy_decode(main, prompt, NEW, set())
            speculative = sd.speculative_decode(main, draft, prompt, NEW, set(), sd.FixedLength(K))
            if divergence := sd.find_divergence(main, prompt, baseline.token_ids, speculative.token_ids):
                assert 0 <= divergence.gap <= divergence.noise
                kinds.append(divergence.kind)
    assert set(kinds) == {"tie"}  # it does happen


def test_a_tie_of_two_equal_logits():
    """Two tokens with the same output weights always tie: whichever is written, it is the main model's own."""
    model = make_model("llama")
    main = sd.CachedModel(model)
    baseline = sd.greedy_decode(main, PROMPT, NEW, set()).token_ids
    place = next(i for i in range(8, NEW) if baseline[i] not in baseline[:i])
    twin = next(token for token in range(61) if token not in baseline)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[twin] = head[baseline[place]]
    text = baseline[:place] + [twin]
    while len(text) < NEW:  # the main model's own text after the twin, from passes over everything
        logits = model(input_ids=torch.tensor([PROMPT[0].tolist() + text])).logits[0, -1]
        text.append(logits.argmax().item())
    divergence = sd.find_divergence(main, PROMPT, baseline, text)
    assert (divergence.index, divergence.kind) == (place, "tie")
    assert (divergence.baseline_token, divergence.speculative_token) == (baseline[place], twin)
    # And a text that goes wrong only behind its tie is found out: every token is certified.
    wrong = [*text[:-1], model(input_ids=torch.tensor([PROMPT[0].tolist() + text[:-1]])).logits[0, -1].argmin().item()]
    assert sd.find_divergence(main, PROMPT, baseline, wrong).kind == "mismatch"


def test_a_text_that_stops_early_or_late_is_a_mismatch():
    main = sd.CachedModel(make_model("gemma2"))
    baseline = sd.greedy_decode(main, PROMPT, NEW, set()).token_ids
    early = sd.find_divergence(main, PROMPT, baseline, baseline[:-2])
    assert (early.kind, early.index, early.speculative_token) == ("mismatch", NEW - 2, None)
    late = sd.find_divergence(main, PROMPT, baseline[:-2], baseline)
    assert (late.kind, late.baseline_token) == ("mismatch", None)


def test_the_gap_and_the_noise_by_hand():
    model = make_model("gemma2")
    main = sd.CachedModel(model)
    baseline = sd.greedy_decode(main, PROMPT, 20, set()).token_ids
    other = sd.greedy_decode(sd.CachedModel(always_wrong(model)), PROMPT, 20, set()).token_ids
    divergence = sd.find_divergence(main, PROMPT, baseline, other)
    logits = model(input_ids=torch.cat([PROMPT, torch.tensor([other])], 1), use_cache=False).logits[0, 4:-1]
    below = logits.amax(-1) - logits[range(20), other]
    assert divergence.gap == pytest.approx(below.max().item(), rel=1e-4)
    assert divergence.index == 0 and 0 < divergence.noise < 1e-3

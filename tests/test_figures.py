"""Every figure, computed anew: from token ids, rounds and times made by hand, and from those of a real run's JSON."""

import dataclasses
import json
import math

import numpy
import pytest
import torch
import transformers
from helpers import ROOT, SHAPE, baseline, generation_of, ids_of, like, make_model, prompt_of, speculate

import speculative_decoding as sd

MAIN, DRAFT = ROOT / "tests/tiny_gemma2/main", ROOT / "tests/tiny_gemma2/draft"
PROMPT = [5, 9, 13, 2, 40]


def agree(actual, expected, where=""):
    """Assert that figures are the same: exact counts and None, and floats up to rounding."""
    if isinstance(expected, dict):
        assert set(actual) == set(expected), where
        for key, value in expected.items():
            agree(actual[key], value, f"{where} {key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for place, value in enumerate(expected):
            agree(actual[place], value, f"{where} {place}")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-9), where
    else:
        assert actual == expected and type(actual) is type(expected), where


def outcome(*runs, verdict="identical", divergence=None, why=None, error=None):
    return sd.Outcome(tuple(runs), "", None if error else sd.Verdict(verdict, divergence, why), error)


def figures(own, ours, draft_tokens=3, step_bytes=2_000_000_000, library=None):
    """The figures of the baseline and of another method, over prompts; `own`, `ours`: their outcomes, in this order."""
    methods = (
        sd.Method("baseline", None, step_bytes=step_bytes),
        sd.Method("K", None, None if library else "D", draft_tokens, library),
    )
    results = tuple(
        sd.Result(prompt_of([1], number), {"baseline": before, "K": after})
        for number, (before, after) in enumerate(zip(own, ours, strict=True), 1)
    )
    found = tuple(sd.figures_of(results, method) for method in methods)
    json.dumps([each and dataclasses.asdict(each) for each in found], allow_nan=False)  # whatever it is computed from
    return found


def first_that_pays(k, c, v):
    """The α from which drafting K tokens pays: the positive root of α + … + α^K = K·c + v - 1; above 1 none does."""
    roots = numpy.roots([*[1.0] * k, 1 - k * c - v])
    return min((root.real for root in roots if abs(root.imag) < 1e-9 and root.real > 0), default=0.0)


# By hand


def test_every_figure_by_hand():
    own = [outcome(generation_of(range(21), 2.5, 0.5)), outcome(generation_of(range(11), 1.5, 0.5))]
    first = generation_of(range(21), 1.25, 0.5, [(3, 3, 0.06, 0.11, 0.19)] * 5, -3.0)
    second = generation_of(range(11), 1.75, 0.5, [(3, 0, 0.06, 0.11, 0.175)] * 10, -3.0)
    before, after = figures(own, [outcome(first), outcome(second, verdict="tie")])
    speed = {"prompts": 2, "new_tokens": 32, "time_to_first_token_s": 0.5}
    fields = [field.name for field in dataclasses.fields(sd.Figures)]
    none = dict.fromkeys(fields) | speed | {"identical": 2, "ties": 0, "mismatches": 0, "unchecked": 0}
    of_steps = {"latency_s": 2.0, "tokens_per_s": 8.0, "time_per_output_token_s": 0.1, "weight_bandwidth_gb_s": 20.0}
    agree(dataclasses.asdict(before), none | of_steps)
    # For 32 tokens the baseline takes 4 s, of which 3 s for 30 steps; this took 3 s, 2 s of them for 30 tokens.
    expected = {"latency_s": 1.5, "tokens_per_s": 32 / 3, "time_per_output_token_s": 2 / 30}
    expected |= {"speedup_percent": 100 / 3, "decode_speedup_percent": 50.0, "speedup_interval_percent": None}
    # Of the second prompt 1.5 s against 1.75 s, of the first 2.5 s against 1.25 s
    assert after.speedup_range_percent == pytest.approx((100 * (1.5 / 1.75 - 1), 100.0))
    # 15 rounds; 15 accepted of 45 drafted and of 5 · 3 + 10 · 1 tested.
    expected |= {"rounds": 15, "drafted": 45, "accepted": 15, "acceptance_rate": 1 / 3, "alpha": 0.6}
    expected |= {"mean_acceptance_length": 2.0}  # 20 + 10 tokens behind the first, in 15 rounds
    expected |= {"acceptance_by_position": {"joint": [1 / 3] * 3, "conditional": [1 / 3, 1.0, 1.0]}}
    expected |= {"log_likelihood": -6.0, "log_likelihood_per_token": -6 / 45}
    # A baseline step takes 0.1 s, a draft step 0.9 s / 45, a verify pass 1.65 s / 15.
    expected |= {"draft_cost": 0.2, "verify_cost": 1.1}
    tokens = 1 + 0.6 + 0.36 + 0.216
    expected |= {"predicted_speedup_percent": 100 * (tokens / 1.7 - 1)}
    expected |= {"ideal_speedup_percent": 100 * (tokens / 1.6 - 1)}
    # 2.7 s in 15 rounds, which yielded 30 tokens, and could have yielded 60.
    seconds = {"free_draft": 3 - 0.9, "perfect_draft": 3 - 2.7 / 2, "free_verify": 3 - 1.65 + 15 * 0.1}
    expected |= {"speedup_if_percent": {kind: 100 * (4 / value - 1) for kind, value in seconds.items()}}
    # 1 + α > 0.2 + 1.1 from α = 0.3 on, 1 + α + α² > 0.4 + 1.1 only from 0.366 on.
    expected |= {"break_even_alpha": 0.3, "identical": 1, "ties": 1}
    expected |= {"speedup_range_percent": after.speedup_range_percent}
    agree(dataclasses.asdict(after), none | expected)


def test_rounds_of_different_lengths():
    """An n-gram draft, with a fixed K: what it drafts differs, and a round without draft tokens verifies nothing."""
    rounds = [(3, 2, 0.03, 0.2, 0.25), (0, 0, 0.01, 0.1, 0.12), (1, 1, 0.01, 0.1, 0.11), (3, 0, 0.05, 0.3, 0.4)]
    ours, own = generation_of(range(8), 1.0, 0.1, rounds, -4.0), generation_of(range(8), 0.8, 0.1)
    (_, fixed), (_, auto) = (figures([outcome(own)], [outcome(ours)], k) for k in (3, "auto"))
    assert (fixed.rounds, fixed.drafted, fixed.accepted) == (4, 7, 3)
    assert fixed.alpha == pytest.approx(3 / 5)  # tested: 3, 0, 1, 1
    assert fixed.mean_acceptance_length == pytest.approx(7 / 4)
    # Of three rounds that drafted anything, one has two accepted. Of two that drafted a second token, one came so far.
    joint, conditional = [2 / 3, 1 / 3, 0.0], [2 / 3, 1.0, 0.0]
    agree(fixed.acceptance_by_position, {"joint": joint, "conditional": conditional})
    c, v = (0.03 + 0.01 + 0.05) / 7 / 0.1, (0.2 + 0.1 + 0.3) / 3 / 0.1
    assert (fixed.draft_cost, fixed.verify_cost) == pytest.approx((c, v))
    for kind in ("predicted", "ideal"):  # there is no one K
        assert getattr(fixed, f"{kind}_speedup_percent") is None
        assert getattr(auto, f"{kind}_speedup_percent") is None
    seconds = {"free_draft": 1 - 0.09, "perfect_draft": 1 - 0.88 * 4 / 11, "free_verify": 1 - 0.6 + 3 * 0.1}
    agree(fixed.speedup_if_percent, {kind: 100 * (0.8 / value - 1) for kind, value in seconds.items()})
    same = {"predicted_speedup_percent": None, "ideal_speedup_percent": None}
    assert dataclasses.replace(fixed, **same) == auto


def test_a_token_that_is_cut_off_was_not_yielded():
    """Two rounds could have yielded 6 tokens; the text ends behind 4. What was accepted still counts whole."""
    own = [outcome(generation_of(range(5), 0.5, 0.1))]
    _, right = figures(own, [outcome(generation_of(range(5), 1.0, 0.1, [(2, 2, 0.02, 0.1, 0.2)] * 2))], 2)
    assert right.mean_acceptance_length == 2 and right.acceptance_rate == right.alpha == 1
    agree(right.acceptance_by_position, {"joint": [1.0, 1.0], "conditional": [1.0, 1.0]})
    assert right.predicted_speedup_percent == pytest.approx(100 * (3 / (2 * 0.1 + 1.0) - 1))


def test_a_draft_that_is_always_wrong():
    own = [outcome(generation_of(range(5), 0.5, 0.1))]
    _, wrong = figures(own, [outcome(generation_of(range(5), 1.0, 0.1, [(2, 0, 0.02, 0.1, 0.2)] * 4))], 2)
    assert wrong.acceptance_rate == wrong.alpha == 0 and wrong.mean_acceptance_length == 1
    agree(wrong.acceptance_by_position, {"joint": [0.0, 0.0], "conditional": [0.0, None]})
    assert wrong.predicted_speedup_percent == pytest.approx(100 * (1 / (2 * 0.1 + 1.0) - 1))


def test_joint_acceptance_never_rises_whatever_was_drafted():
    """Against a walk through each round, token by token."""
    random = numpy.random.default_rng(1)
    for _ in range(50):
        pairs = [(k, int(random.integers(k + 1))) for k in random.integers(0, 7, size=random.integers(1, 9)).tolist()]
        drafting, tested, passed = sum(k > 0 for k, _ in pairs), [0] * 7, [0] * 7
        for k, n in pairs:
            for place in range(min(n + 1, k)):
                tested[place] += 1
                passed[place] += place < n
        longest = max(k for k, _ in pairs)
        expected = {
            "joint": [count / drafting for count in passed[:longest]],
            "conditional": [a / b if b else None for a, b in zip(passed[:longest], tested, strict=False)],
        }
        run = generation_of(range(99), 1.0, 0.1, [(k, n, 0.1, 0.1, 0.2) for k, n in pairs])
        _, found = figures([outcome(run)], [outcome(run)], "auto")
        agree(found.acceptance_by_position, expected)
        joint = found.acceptance_by_position["joint"]
        assert joint == sorted(joint, reverse=True)
        assert found.alpha == (sum(passed) / sum(tested) if sum(tested) else None)


def test_the_predicted_speedup():
    """Leviathan et al. 2023, theorem 3.8, in its closed form, with the cost of a verify pass."""
    assert sd.predicted_speedup(1.0, 3, 0.1, 1.0) == pytest.approx(100 * (4 / 1.3 - 1))
    assert sd.predicted_speedup(0.8, 5, 0.1, 1.2) == pytest.approx(100 * ((1 - 0.8**6) / (0.2 * (0.5 + 1.2)) - 1))
    assert sd.predicted_speedup(0.0, 2, 0.1, 1.2) == pytest.approx(100 * (1 / 1.4 - 1))
    for unknown in ((math.nan, 3, 0.1, 1.0), (0.5, 3, math.nan, 1.0), (0.5, 3, 0.1, math.nan)):
        assert math.isnan(sd.predicted_speedup(*unknown))
    assert sd.predicted_speedup(0.5, "auto", 0.1, 1.0) is None


def test_the_alpha_from_which_drafting_pays():
    assert sd.break_even_alpha(0.0, 2.0) == pytest.approx(0.5, abs=1e-6)  # with the longest: 1 / (1 - α) > 2
    assert sd.break_even_alpha(0.4, 1.2) == pytest.approx(0.6)  # K = 1; two want 1 + α + α² > 2, from 0.618 on
    three = first_that_pays(3, 0.2, 1.6)
    assert three < min(first_that_pays(k, 0.2, 1.6) for k in (1, 2, 4, 5))
    assert sd.break_even_alpha(0.2, 1.6) == pytest.approx(three)
    assert sd.break_even_alpha(0.1, 0.8) == pytest.approx(0.0, abs=1e-9)
    assert sd.break_even_alpha(1.0, 1.0) is sd.break_even_alpha(0.5, 20.0) is None
    assert sd.break_even_alpha(math.nan, 1.0) is sd.break_even_alpha(0.1, math.nan) is None


# Repeats


def test_of_repeats_the_median_counts():
    three = outcome(*(generation_of(range(5), latency, 0.1) for latency in (3.0, 1.0, 2.0)))
    assert three.latency_s == three.run.latency_s == 2.0
    four = outcome(*(generation_of(range(5), latency, latency / 10) for latency in (9.0, 1.0, 4.0, 2.0)))
    assert four.latency_s == 3.0 and four.run.latency_s == 2.0  # the faster of the two middle ones
    two = outcome(generation_of(range(5), 5.0, 0.5), generation_of(range(5), 2.0, 0.2))
    before, after = figures([four], [two])
    assert (before.latency_s, after.latency_s) == (3.0, 3.5)
    assert after.speedup_percent == pytest.approx(100 * (3.0 / 3.5 - 1))
    assert before.time_to_first_token_s == pytest.approx(0.2)  # of the run that counts
    assert before.time_per_output_token_s == pytest.approx(1.8 / 4)


def test_of_repeats_of_different_lengths_the_median_by_the_token_counts():
    """Sampled texts differ: the run that counts is the middle one by seconds per token."""
    runs = [generation_of(range(tokens), latency) for tokens, latency in ((10, 2.0), (2, 1.0), (10, 1.0))]
    assert outcome(*runs).run is runs[0] and outcome(*runs).latency_s == 1.0


# Figures that cannot be had: None, never a number made up

OF_COSTS = "draft_cost verify_cost predicted_speedup_percent ideal_speedup_percent speedup_if_percent break_even_alpha"
OF_TOKENS = "acceptance_rate alpha log_likelihood_per_token"


def known(found, names):
    """Those of these figures that are not None."""
    return {name: value for name in names.split() if (value := getattr(found, name)) is not None}


def test_one_token_and_no_round():
    before, after = figures([outcome(generation_of([7], 1.0, 0.9))], [outcome(generation_of([7], 0.5, 0.4))])
    assert before.time_per_output_token_s is before.weight_bandwidth_gb_s is None
    assert known(after, f"{OF_COSTS} {OF_TOKENS} decode_speedup_percent mean_acceptance_length") == {}
    assert (after.rounds, after.drafted, after.accepted, after.log_likelihood) == (0, 0, 0, 0.0)
    assert after.acceptance_by_position == {"joint": [], "conditional": []}
    assert after.speedup_percent == pytest.approx(100.0) and after.speedup_range_percent == pytest.approx((100, 100))


def test_a_real_run_of_one_token(llama):
    one = speculate(llama, llama, PROMPT, 3, 1)
    assert one.rounds == () and len(one.token_ids) == 1
    _, after = figures([outcome(baseline(llama, PROMPT, 1))], [outcome(one)])
    assert known(after, f"{OF_COSTS} {OF_TOKENS}") == {} and after.speedup_percent is not None


@pytest.mark.parametrize("draft_tokens", [3, "auto"])
def test_rounds_in_which_nothing_was_drafted(draft_tokens):
    ours = generation_of(range(4), 1.0, 0.1, [(0, 0, 0.0, 0.1, 0.2)] * 3)
    _, after = figures([outcome(generation_of(range(4), 1.0, 0.1))], [outcome(ours)], draft_tokens)
    assert known(after, f"{OF_COSTS} {OF_TOKENS}") == {} and after.mean_acceptance_length == 1.0
    assert (after.rounds, after.drafted) == (3, 0) and after.acceptance_by_position["joint"] == []


def test_a_clock_that_cannot_tell_a_rounds_parts_apart():
    """As on MPS: what needs them is None, also the ideal speedup, which needs c; all else is there."""
    ours = generation_of(range(9), 1.0, 0.2, [(3, 1, None, None, 0.2)] * 4, -2.0)
    _, after = figures([outcome(generation_of(range(9), 1.8, 0.2))], [outcome(ours)])
    assert known(after, OF_COSTS) == {}
    assert after.decode_speedup_percent == pytest.approx(100.0) and after.alpha == pytest.approx(0.5)
    assert after.mean_acceptance_length == 2 and after.log_likelihood_per_token == pytest.approx(-2 / 12)


def test_a_round_on_a_device_with_a_clock_of_the_host_only():
    assert sd.timed_round(torch.device("mps"), 3, 1, 1.0, 2.0, 4.0, 8.0) == sd.Round(3, 1, None, None, 7.0)
    assert sd.timed_round(torch.device("cpu"), 3, 1, 1.0, 2.0, 4.0, 8.0) == sd.Round(3, 1, 1.0, 2.0, 7.0)


def test_without_a_baseline_a_method_has_figures_of_its_own():
    """They are over the prompts that it decoded; what compares is over those that both did."""
    ours = [outcome(generation_of(range(11), 0.5, 0.1, [(3, 1, 0.05, 0.1, 0.2)] * 5, -2.0))] * 2
    own = [outcome(error="CUDA out of memory."), outcome(generation_of(range(11), 1.1, 0.1))]
    before, after = figures(own[:1], ours[:1])
    assert before is None and known(after, f"{OF_COSTS} speedup_percent decode_speedup_percent") == {}
    assert after.speedup_range_percent is None is after.speedup_interval_percent
    assert (after.prompts, after.tokens_per_s, after.alpha) == (1, 22.0, 0.5)
    before, after = figures(own, ours)
    assert (before.prompts, after.prompts, after.drafted) == (1, 2, 30)
    assert after.speedup_percent == pytest.approx(120.0)
    assert after.draft_cost == pytest.approx(0.05 / 3 / 0.1)
    nothing = figures(own, [outcome(error="CUDA out of memory.")] * 2)
    assert nothing[1] is None and nothing[0] == before


def test_a_method_that_failed_in_a_repeat_has_no_figures():
    half = sd.Outcome((generation_of(range(11), 0.5, 0.1),), "", None, "CUDA out of memory.")
    assert figures([outcome(generation_of(range(11), 1.1, 0.1))], [half])[1] is None


def test_numbers_that_are_no_numbers_become_none():
    """The likeliest of them: a draft token that is impossible under the main model, whose log p is -∞."""
    ours = generation_of(range(4), 1.0, 0.1, [(3, 0, 0.1, 0.1, 0.2)], -math.inf)
    _, after = figures([outcome(generation_of(range(4), 1.0, 0.1))], [outcome(ours)])
    assert after.log_likelihood is after.log_likelihood_per_token is None
    assert sd.known({"a": [math.inf, math.nan, 0.0], "b": None}) == {"a": [None, None, 0.0], "b": None}
    assert sd.as_percent(1.5) == 50


@pytest.mark.parametrize("draft_tokens", [None, 3])
def test_of_a_method_of_the_library_only_the_speed_is_known(draft_tokens):
    own, other = generation_of(range(4), 1.0, 0.1), generation_of(range(4), 2.0)
    _, after = figures([outcome(own)], [outcome(other)], draft_tokens, library="generate()")
    told = {name for name, value in dataclasses.asdict(after).items() if value is not None}
    speed = "prompts new_tokens latency_s tokens_per_s speedup_percent speedup_range_percent"
    assert told == {*speed.split(), *COUNTS} and after.speedup_percent == pytest.approx(-50)


COUNTS = ("identical", "ties", "mismatches", "unchecked")


@pytest.mark.parametrize(
    ("verdicts", "counts", "word"),
    [
        ("identical", (1, 0, 0, 0), "yes"),
        ("tie", (0, 1, 0, 0), "tie"),
        ("mismatch", (0, 0, 1, 0), "NO"),
        ("unchecked", (0, 0, 0, 1), "?"),
        ("sampled", (None, 0, 0, 0), "sampled"),
        ("tie tie tie", (0, 3, 0, 0), "0/3"),
        ("identical tie mismatch unchecked unchecked", (1, 1, 1, 2), "1/5"),
        ("sampled sampled", (None, 0, 0, 0), "sampled"),
    ],
)
def test_verdicts_are_counted(verdicts, counts, word):
    run = generation_of(range(4), 1.0, 0.1, [(3, 3, 0.1, 0.1, 0.2)])
    ours = [outcome(run, verdict=verdict) for verdict in verdicts.split()]
    _, after = figures([outcome(run)] * len(ours), ours)
    assert tuple(getattr(after, name) for name in COUNTS) == counts and after.verdict == word


# The interval


def repeated(latencies, tokens=100):
    return outcome(*(generation_of(range(tokens), latency, 0.1) for latency in latencies))


def interval(own, ours):
    return sd.speedup_interval(list(zip(own, ours, strict=True)))


def test_the_interval_covers_the_spread_of_the_prompts_and_nothing_else():
    assert interval([repeated([2.0])] * 10, [repeated([1.0])] * 10) == pytest.approx((100.0, 100.0))
    # Prompts that gain 100 % and 300 %, five of each: of ten drawn anew, m are of the second kind, and all gain
    # 100 + 20 m %. m has a binomial distribution, in which 2.5 % lie below 2, and as many above 8: 140 to 260 %. Over
    # ten prompts this is widened by Student's t of 9 degrees of freedom, 2.262 instead of 1.96, and by √(10 / 9).
    own, ours = [repeated([2.0]), repeated([4.0])] * 5, [repeated([1.0])] * 10
    found, wider = interval(own, ours), 2.262 / 1.96 * math.sqrt(10 / 9)
    assert found == pytest.approx((200 - 60 * wider, 200 + 60 * wider), rel=2e-3)
    assert interval(own, ours) == found  # the same each time
    # Repeats, however they vary, are not drawn anew: each prompt has its median.
    spread = [repeated([1.0, 2.0, 9.0]), repeated([3.0, 4.0, 4.5])] * 5
    assert interval(spread, [repeated([0.1, 1.0, 1.5])] * 10) == found


@pytest.mark.parametrize("repeats", [1, 3])
def test_no_interval_is_claimed_for_fewer_than_ten_prompts(repeats):
    latencies = [1.0, 1.1, 1.2][:repeats]
    for prompts in (1, 2, 9):
        own = [repeated([2.0 + number / 10]) for number in range(prompts)]
        _, after = figures(own, [repeated(latencies)] * prompts)
        assert after.speedup_interval_percent is None
        lowest, median = 2.0, latencies[repeats // 2]
        expected = (100 * (lowest / median - 1), 100 * ((2.0 + (prompts - 1) / 10) / median - 1))
        assert after.speedup_range_percent == pytest.approx(expected)
    own = [repeated([2.0 + number / 10]) for number in range(10)]
    _, after = figures(own, [repeated(latencies)] * 10)
    low, high = after.speedup_interval_percent
    assert low < after.speedup_percent < high
    ten = [*own[:9], outcome(error="out of memory")], [repeated(latencies)] * 10  # nine pairs
    assert figures(*ten)[1].speedup_interval_percent is None


@pytest.mark.parametrize("prompts", [10, 20, 40])
def test_the_interval_covers_what_it_says(prompts):
    """1,000 simulated runs, whose speedups are lognormal: 95 % of the intervals, but for 2 points, hold the true one.

    Over many prompts, the speedup comes to all seconds of the baseline / all seconds: 1 / E[1 / speedup].
    """
    random, two = numpy.random.default_rng(0), generation_of(range(2))
    sigma, runs, below, above = 0.2, 1000, 0, 0
    true_percent = 100 * (1 / math.exp(-math.log(1.5) + sigma**2 / 2) - 1)
    for _ in range(runs):
        own_s = random.lognormal(0.0, 0.2, size=prompts)
        ours_s = own_s / random.lognormal(math.log(1.5), sigma, size=prompts)
        pairs = []
        for seconds in zip(own_s.tolist(), ours_s.tolist(), strict=True):
            pairs.append([sd.Outcome((dataclasses.replace(two, latency_s=latency_s),)) for latency_s in seconds])
        low, high = sd.speedup_interval(pairs)
        below, above = below + (high < true_percent), above + (true_percent < low)
    assert 0.93 <= 1 - (below + above) / runs <= 0.97, (below, above)
    assert 0 < below / runs < 0.05 and 0 < above / runs < 0.05  # and it errs to both sides


# What a step reads

LAYER = 2 * (32 * 32 + 32 * 16) + 3 * 32 * 48 + 2 * 32  # q, o, k, v; gate, up, down; two norms


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_the_layers_and_the_head(tied):
    """An embedding is only looked up, unless it is the head, too."""
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == 2 * LAYER + 32 + 61 * 32 * (1 if tied else 2)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert sd.bytes_per_step(model.to(dtype)) == size * (2 * LAYER + 32 + 61 * 32)


def test_it_is_not_known_of_experts_and_of_weights_on_several_devices(llama):
    assert sd.bytes_per_step(make_model("mixtral")) is sd.bytes_per_step(make_model("gpt_oss")) is None
    spread = like(llama, 0)
    for places, is_known in (({"": 0}, True), ({"model": 0, "lm_head": "cpu"}, False), ({"a": "disk", "b": 0}, False)):
        spread.hf_device_map = places
        assert (sd.bytes_per_step(spread) is not None) is is_known


def test_a_step_reads_no_vision_tower():
    text = {key: value for key, value in SHAPE.items() if key != "max_position_embeddings"} | {"head_dim": 8}
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=1)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    parts = {name.split(".")[1] for name, _ in model.named_parameters()}
    assert "vision_tower" in parts  # there is one
    of_gemma = LAYER + 2 * 32 + 2 * 8  # two more norms, and those of q and k
    assert sd.bytes_per_step(model) == 4 * (2 * of_gemma + 32 + 61 * 32)


def test_a_step_reads_no_embedding_of_a_layer():
    """Gemma 3n has further embeddings, more than all its layers, of which a step looks up one row."""
    config = transformers.Gemma3nTextConfig(
        **{key: value for key, value in SHAPE.items() if key != "num_hidden_layers"},
        num_hidden_layers=5,
        head_dim=8,
        vocab_size_per_layer_input=61,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 5,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    weights = {name: weight.numel() for name, weight in model.named_parameters()}  # tied: the head is not among them
    assert weights["model.embed_tokens_per_layer.weight"] == 61 * 5 * 8
    assert sd.bytes_per_step(model) == 4 * (sum(weights.values()) - 61 * 5 * 8)


# A real run: each figure from the token ids and the rounds of its JSON


def outcomes_of(measured, label):
    return [prompt["outcomes"][label] for prompt in measured["prompts"]]


def speed_of(outcomes):
    """`outcomes`: of the JSON, one of each prompt; of one repeat, so that a latency is what was measured."""
    tokens, n = sum(len(each["token_ids"]) for each in outcomes), len(outcomes)
    each_s, each_first_s = ([each["figures"][name] for each in outcomes] for name in ("latency_s", TTFT))
    return {
        "prompts": n,
        "new_tokens": tokens,
        "latency_s": sum(each_s) / n,
        "tokens_per_s": tokens / sum(each_s),
        TTFT: sum(each_first_s) / n,
        TPOT: (sum(each_s) - sum(each_first_s)) / (tokens - n),
    }


TTFT, TPOT = "time_to_first_token_s", "time_per_output_token_s"


def acceptance_of(outcomes):
    """What became of the draft tokens, by walking through each round token by token."""
    tested, passed, k_of, likelihoods = [0] * 99, [0] * 99, [], []
    for did in outcomes:
        k_of += did["rounds"]["drafted"]
        likelihoods.append(did["figures"]["log_likelihood"])
        for k, n in zip(did["rounds"]["drafted"], did["rounds"]["accepted"], strict=True):
            assert 0 <= n <= k
            for place in range(min(n + 1, k)):
                tested[place] += 1
                passed[place] += place < n
    drafting, longest = sum(k > 0 for k in k_of), max(k_of)
    return {
        "rounds": len(k_of),
        "drafted": sum(k_of),
        "accepted": sum(passed),
        "acceptance_rate": sum(passed) / sum(k_of),
        "alpha": sum(passed) / sum(tested),
        "mean_acceptance_length": sum(len(did["token_ids"]) - 1 for did in outcomes) / len(k_of),
        "acceptance_by_position": {
            "joint": [count / drafting for count in passed[:longest]],
            "conditional": [a / b if b else None for a, b in zip(passed[:longest], tested, strict=False)],
        },
        "log_likelihood": sum(likelihoods),
        "log_likelihood_per_token": sum(likelihoods) / sum(k_of),
    }


def comparison_of(own, ours, k, costs):
    """How the two compare. `costs`: c and v, as measured, since the JSON has no times of a round's parts."""
    before, after, did, (c, v) = speed_of(own), speed_of(ours), acceptance_of(ours), costs
    gains = [
        100 * (len(b["token_ids"]) / b["figures"]["latency_s"] / (len(a["token_ids"]) / a["figures"]["latency_s"]) - 1)
        for a, b in zip(own, ours, strict=True)
    ]
    step_s, seconds = before[TPOT], sum(each["figures"]["latency_s"] for each in ours)
    drafting = sum(k > 0 for each in ours for k in each["rounds"]["drafted"])
    rounds_s = sum(second for each in ours for second in each["rounds"]["seconds"])
    could_be = did["rounds"] + did["drafted"]  # tokens, if every draft token had been right
    if_s = {
        "free_draft": seconds - c * step_s * did["drafted"],
        "perfect_draft": seconds - rounds_s * (1 - (did["rounds"] + did["accepted"]) / could_be),
        "free_verify": seconds - drafting * (v - 1) * step_s,
    }
    alpha, predicted = did["alpha"], {"predicted": None, "ideal": None}
    if k != "auto":
        tokens = (1 - alpha ** (k + 1)) / (1 - alpha)
        predicted = {"predicted": 100 * (tokens / (k * c + v) - 1), "ideal": 100 * (tokens / (k * c + 1) - 1)}
    pays = min(first_that_pays(k, c, v) for k in range(1, 33))
    return {
        "speedup_percent": 100 * (after["tokens_per_s"] / before["tokens_per_s"] - 1),
        "decode_speedup_percent": 100 * (step_s / after[TPOT] - 1),
        "speedup_interval_percent": None,
        "speedup_range_percent": [min(gains), max(gains)],
        "draft_cost": c,
        "verify_cost": v,
        "predicted_speedup_percent": predicted["predicted"],
        "ideal_speedup_percent": predicted["ideal"],
        "speedup_if_percent": {
            kind: 100 * (after["new_tokens"] / value / before["tokens_per_s"] - 1) for kind, value in if_s.items()
        },
        "break_even_alpha": float(pays) if pays <= 1 else None,
        "weight_bandwidth_gb_s": None,
    }


@pytest.mark.parametrize("label", ["K = 3", "K = auto"])
def test_every_figure_of_a_real_run(demo, label):
    """Of each prompt alone, and of all: no figure of the JSON is left out here."""
    _, measured = demo
    (method,) = [method for method in measured["methods"] if method["label"] == label]
    own, ours = outcomes_of(measured, "baseline"), outcomes_of(measured, label)
    assert len(ours) == 5 and all(each["verdict"] == "identical" for each in own + ours)
    alone = [([a], [b], b["figures"]) for a, b in zip(own, ours, strict=True)]
    for some_own, some_ours, found in [*alone, (own, ours, method["summary"])]:
        counts = {"identical": len(some_ours), "ties": 0, "mismatches": 0, "unchecked": 0}
        costs = found["draft_cost"], found["verify_cost"]
        if costs == (None, None):  # of a prompt for which auto drafted nothing
            assert label == "K = auto" and not any(some_ours[0]["rounds"]["drafted"])
            continue
        assert min(costs) > 0
        compared = comparison_of(some_own, some_ours, method["draft_tokens"], costs)
        agree(found, speed_of(some_ours) | acceptance_of(some_ours) | compared | counts)


def test_the_baseline_of_a_real_run_has_its_own_figures(demo):
    _, measured = demo
    summary, own = measured["methods"][0]["summary"], outcomes_of(measured, "baseline")
    told = {name: value for name, value in summary.items() if value is not None}
    model = transformers.AutoModelForCausalLM.from_pretrained(MAIN, dtype=torch.float32)
    weights = sum(weight.numel() for weight in model.parameters())  # the head is the embedding: it is all read
    bandwidth = 4 * weights / 1e9 / speed_of(own)[TPOT]
    counts = {"identical": 5, "ties": 0, "mismatches": 0, "unchecked": 0}
    agree(told, speed_of(own) | counts | {"weight_bandwidth_gb_s": bandwidth})
    assert all(0 < each["figures"][TTFT] < each["figures"]["latency_s"] for each in own)


def test_the_rounds_of_a_real_run_fit_into_its_text_and_its_time(demo):
    _, measured = demo
    for label, drafted in (("K = 3", {3}), ("K = auto", set(range(16)))):
        for prompt, did in zip(measured["prompts"], outcomes_of(measured, label), strict=True):
            rounds, found = did["rounds"], did["figures"]
            assert set(rounds["drafted"]) <= drafted
            yielded = [accepted + 1 for accepted in rounds["accepted"]]
            assert 1 + sum(yielded[:-1]) < len(did["token_ids"]) <= 1 + sum(yielded)
            assert min(rounds["seconds"]) > 0 and sum(rounds["seconds"]) < found["latency_s"] - found[TTFT]
            assert did["token_ids"] == prompt["outcomes"]["baseline"]["token_ids"]


def test_the_rounds_and_the_log_likelihood_of_a_real_run_without_any_cache(demo):
    """The demo's shortest answer, with K = 3, by a reference: each logit from a pass over the whole text."""
    _, measured = demo
    prompt = min(measured["prompts"], key=lambda prompt: len(prompt["outcomes"]["K = 3"]["token_ids"]))
    did = prompt["outcomes"]["K = 3"]
    main, draft = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (MAIN, DRAFT)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(MAIN)
    message = [{"role": "user", "content": prompt["prompt"]}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    text = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(text) == prompt["prompt_tokens"]
    assert did["text"] == tokenizer.decode(did["token_ids"], skip_special_tokens=True)
    whole, text = text + did["token_ids"], text + did["token_ids"][:1]
    log_likelihood = 0.0
    with torch.inference_mode():
        for drafted, accepted in zip(did["rounds"]["drafted"], did["rounds"]["accepted"], strict=True):
            draft_ids = []
            for _ in range(drafted):
                draft_ids.append(draft(ids_of(text + draft_ids), use_cache=False).logits[0, -1].argmax().item())
            logits = main(ids_of(text + draft_ids), use_cache=False).logits[0, len(text) - 1 :].double()
            log_likelihood += sum(logits.log_softmax(-1)[i, token].item() for i, token in enumerate(draft_ids))
            choices = logits.argmax(dim=-1).tolist()
            assert draft_ids[:accepted] == choices[:accepted]
            assert accepted == drafted or draft_ids[accepted] != choices[accepted]
            text += choices[: accepted + 1]
    assert text[: len(whole)] == whole and len(text) - len(whole) <= 3  # the last round may go beyond the end
    assert did["figures"]["log_likelihood"] == pytest.approx(log_likelihood, rel=1e-4)

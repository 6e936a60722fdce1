"""The benchmark: who is measured when, what a failure costs, and every figure, computed anew from what was measured."""

import functools
import itertools
import json
import math

import numpy
import psutil
import pytest
import safetensors
import torch
import transformers
from conftest import baseline, generation_of, ids_of, like, make_model, prompt_of, speculate
from test_command_line import DRAFT, MAIN, QUICK, run

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]
OUT_OF_MEMORY = "CUDA out of memory."


def agree(actual, expected, where=""):
    """Assert that figures are the same: the same keys, exact counts and None, and floats up to rounding."""
    if isinstance(expected, dict):
        assert set(actual) == set(expected), where
        for key, value in expected.items():
            agree(actual[key], value, f"{where} {key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for place, value in enumerate(expected):
            agree(actual[place], value, f"{where} {place}")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-9, abs=1e-12), where
    else:
        assert actual == expected and type(actual) is type(expected), where


# Every figure of a real run, from its token ids, its rounds and its times


def speed_of(runs):
    """What one method did with several prompts; `runs`: of the JSON, one of each prompt."""
    tokens, n = [len(run["token_ids"]) for run in runs], len(runs)
    total_s, first_s = (sum(run[key] for run in runs) for key in ("latency_s", "first_token_s"))
    return {
        "new_tokens": sum(tokens),
        "latency_s": total_s / n,
        "latency_min_s": sum(run["latency_min_s"] for run in runs) / n,
        "latency_max_s": sum(run["latency_max_s"] for run in runs) / n,
        "tokens_per_s": sum(tokens) / total_s,
        "mean_tokens_per_s": sum(count / run["latency_s"] for count, run in zip(tokens, runs, strict=True)) / n,
        "time_to_first_token_s": first_s / n,
        "time_per_output_token_s": (total_s - first_s) / (sum(tokens) - n),
        "peak_memory_gb": max(run["peak_memory_gb"] for run in runs),
    }


def quotient(numerator, denominator):
    return numerator / denominator if denominator else None


def acceptance_of(runs):
    """What became of the draft tokens of several runs, by walking through each round token by token."""
    drafted, accepted, tested, rounds = 0, 0, 0, 0
    drafted_at, reached_at, passed_at = [0] * 1000, [0] * 1000, [0] * 1000
    by_accepted, by_drafted = {}, {}
    for did in runs:
        for k, n in zip(did["rounds_drafted"], did["rounds_accepted"], strict=True):
            assert 0 <= n <= k
            rounds, drafted = rounds + 1, drafted + k
            by_accepted[n], by_drafted[k] = by_accepted.get(n, 0) + 1, by_drafted.get(k, 0) + 1
            for place in range(k):
                drafted_at[place] += 1
                if place <= n:  # all before it were accepted: it was looked at
                    reached_at[place] += 1
                    tested += 1
                if place < n:
                    passed_at[place] += 1
                    accepted += 1
    longest, round_s = max(by_drafted, default=0), [seconds for did in runs for seconds in did["rounds_s"]]
    total = {key: sum(run[key] for run in runs) for key in ("log_likelihood", "draft_s", "verify_s", "other_s")}
    return {
        "rounds": rounds,
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_rate": quotient(accepted, drafted),
        "alpha": quotient(accepted, tested),
        "mean_acceptance_length": 1 + accepted / rounds if drafted else None,
        "acceptance_by_position": {
            "joint": [passed_at[place] / drafted_at[place] for place in range(longest)],
            "conditional": [quotient(passed_at[place], reached_at[place]) for place in range(longest)],
        },
        "acceptance_histogram": [by_accepted.get(n, 0) for n in range(longest + 1)] if rounds else [],
        "tokens_per_round": quotient(sum(len(run["token_ids"]) - 1 for run in runs), rounds),
        "drafted_per_round": quotient(drafted, rounds),
        "drafted_histogram": {str(k): by_drafted[k] for k in sorted(by_drafted)},
        "log_likelihood_per_token": quotient(total["log_likelihood"], drafted),
        "prefill_s": sum(run["prefill_s"] for run in runs),
        "round_s": {"median": float(numpy.median(round_s)), "p95": float(numpy.quantile(round_s, 0.95))},
        **total,
    }


def first_that_pays(k, c, v):
    """The α from which drafting K tokens pays: the positive root of α + … + α^K = K·c + v - 1; above 1 none does."""
    roots = numpy.roots([*[1.0] * k, 1 - k * c - v])
    return min((root.real for root in roots if abs(root.imag) < 1e-9 and root.real > 0), default=0.0)


def comparison_of(prompts, k):
    """How the two methods compare over several prompts, where each round drafted."""
    own, ours = ([prompt[role] for prompt in prompts] for role in ("baseline", "speculative"))
    before, after, did = speed_of(own), speed_of(ours), acceptance_of(ours)
    gains = [
        (len(b["token_ids"]) / b["latency_s"]) / (len(a["token_ids"]) / a["latency_s"])
        for a, b in zip(own, ours, strict=True)
    ]
    with safetensors.safe_open(f"{MAIN}/model.safetensors", "pt") as stored:
        weights = sum(math.prod(stored.get_slice(key).get_shape()) for key in stored.keys())
    step_s, total_s = before["time_per_output_token_s"], sum(run["latency_s"] for run in ours)
    rounds, drafted, accepted = (did[key] for key in ("rounds", "drafted", "accepted"))
    rounds_s = sum(seconds for run in ours for seconds in run["rounds_s"])
    if_s = {
        "free_draft": total_s - did["draft_s"],
        "perfect_draft": total_s - rounds_s + rounds_s * (rounds + accepted) / (rounds + drafted),
        "free_verify": total_s - did["verify_s"] + rounds * step_s,
    }
    draft_step_s, verify_pass_s = did["draft_s"] / did["drafted"], did["verify_s"] / did["rounds"]
    c, v, alpha = draft_step_s / step_s, verify_pass_s / step_s, did["alpha"]
    predicted = ideal = None
    if k != "auto":  # Leviathan et al. 2023, theorem 3.8, in its closed form
        tokens = (1 - alpha ** (k + 1)) / (1 - alpha)
        predicted, ideal = (100 * (tokens / (k * c + pass_cost) - 1) for pass_cost in (v, 1))
    return {
        "speedup_percent": 100 * (after["tokens_per_s"] / before["tokens_per_s"] - 1),
        "decode_speedup_percent": 100 * (step_s / after["time_per_output_token_s"] - 1),
        "speedup_interval_percent": None,
        "speedup_range_percent": [100 * (min(gains) - 1), 100 * (max(gains) - 1)],
        "geometric_mean_speedup_percent": 100 * (math.exp(sum(map(math.log, gains)) / len(gains)) - 1),
        "predicted_speedup_percent": predicted,
        "ideal_speedup_percent": ideal,
        "speedup_if_percent": {
            kind: 100 * (after["new_tokens"] / seconds / before["tokens_per_s"] - 1) for kind, seconds in if_s.items()
        },
        "break_even_alpha": float(min(first_that_pays(k, c, v) for k in range(1, 33))),
        "weight_bandwidth_gb_s": weights * 4 / 1e9 / step_s,  # float32
        "baseline_step_s": step_s,
        "draft_step_s": draft_step_s,
        "verify_pass_s": verify_pass_s,
        "draft_cost": c,
        "verify_cost": v,
        "identical": sum(a["token_ids"] == b["token_ids"] for a, b in zip(own, ours, strict=True)),
        "ties": 0,
        "mismatches": 0,
        "unchecked": 0,
    }


OF_ONE_PROMPT = {"first_token_s", "text", "token_ids", "rounds_drafted", "rounds_accepted", "rounds_s"}
ABOUT_A_PROMPT = {"prompt", "prompt_tokens", "number", "turn", "category", "question_id", "error", "divergence"}


@pytest.mark.parametrize("index", [0, 1], ids=["K = 3", "auto"])
def test_every_figure_follows_from_what_was_measured(demo, index):
    """Of each prompt alone, and of all: no figure of the JSON is left out here."""
    _, report = demo
    measured = report["runs"][index]
    prompts, summary, k = measured["prompts"], measured["summary"], measured["draft_tokens"]
    assert len(prompts) == 5 and k == (3, "auto")[index]
    for some, figures in [([prompt], prompt) for prompt in prompts] + [(prompts, summary)]:
        left = {key: value for key, value in figures.items() if key not in ABOUT_A_PROMPT}
        before, after = ({**left.pop(role)} for role in ("baseline", "speculative"))
        for did in (before, after):
            for key in OF_ONE_PROMPT:
                did.pop(key, None)
        own, ours = ([prompt[role] for prompt in some] for role in ("baseline", "speculative"))
        agree(before, speed_of(own), "baseline")
        agree(after, speed_of(ours) | acceptance_of(ours), "speculative")
        expected = comparison_of(some, k)
        if index == 1 and 0 in [drafted for run in ours for drafted in run["rounds_drafted"]]:
            # Rounds without draft tokens, whose seconds the JSON does not tell apart, are no verify passes.
            for key in ("draft_step_s", "verify_pass_s", "draft_cost", "verify_cost", "break_even_alpha"):
                assert 0 < left.pop(key)
                expected.pop(key)
            for kind in ("free_draft", "free_verify"):
                left["speedup_if_percent"].pop(kind)
                expected["speedup_if_percent"].pop(kind)
        if some is not prompts:
            assert left["identical"] is True and left["unchecked"] is None
            left |= {"identical": 1, "unchecked": 0}
        agree(left, expected, "compared")


def test_a_prompts_seconds_add_up(demo):
    _, report = demo
    for measured in report["runs"]:
        for prompt in measured["prompts"]:
            own, ours = prompt["baseline"], prompt["speculative"]
            parts = [ours[f"{part}_s"] for part in ("prefill", "draft", "verify", "other")]
            assert sum(parts) == pytest.approx(ours["latency_s"]) and min(parts) > 0
            assert 0 < ours["first_token_s"] < ours["prefill_s"]  # the draft reads the prompt, too
            assert 0 < own["first_token_s"] < own["latency_s"]
            for did in (own, ours):  # one repeat
                assert did["latency_min_s"] == did["latency_s"] == did["latency_max_s"]
                assert did["time_to_first_token_s"] == did["first_token_s"]


def test_the_rounds_and_the_log_likelihood_of_a_real_run_without_any_cache(demo):
    """The demo's shortest answer, with K = 3, by a reference: each logit from a pass over the whole text."""
    _, report = demo
    prompt = min(report["runs"][0]["prompts"], key=lambda prompt: prompt["speculative"]["new_tokens"])
    did = prompt["speculative"]
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    main, draft = load(MAIN).eval(), load(DRAFT).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MAIN)
    message = [{"role": "user", "content": prompt["prompt"]}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    text = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(text) == prompt["prompt_tokens"]
    whole, text = text + did["token_ids"], text + did["token_ids"][:1]
    log_likelihood = 0.0
    with torch.inference_mode():
        for drafted, accepted in zip(did["rounds_drafted"], did["rounds_accepted"], strict=True):
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
    assert did["log_likelihood"] == pytest.approx(log_likelihood, rel=1e-4)


def test_the_summary_follows_from_the_prompts(demo):
    _, report = demo
    prompts, summary = report["runs"][0]["prompts"], report["runs"][0]["summary"]
    for method in ("baseline", "speculative"):
        tokens = sum(prompt[method]["new_tokens"] for prompt in prompts)
        seconds = sum(prompt[method]["latency_s"] for prompt in prompts)
        assert summary[method]["new_tokens"] == tokens
        assert summary[method]["latency_s"] == pytest.approx(seconds / 5)
        assert summary[method]["tokens_per_s"] == pytest.approx(tokens / seconds)
    faster = summary["speculative"]["tokens_per_s"] / summary["baseline"]["tokens_per_s"]
    assert summary["speedup_percent"] == pytest.approx(100 * (faster - 1))
    counts = summary["speculative"]
    for key in ("rounds", "drafted", "accepted", "log_likelihood", "draft_s", "verify_s", "other_s"):
        assert counts[key] == pytest.approx(sum(prompt["speculative"][key] for prompt in prompts))
    assert counts["drafted"] == 3 * counts["rounds"]
    assert (summary["identical"], summary["ties"], summary["mismatches"]) == (5, 0, 0)


def test_with_two_repeats_the_latency_is_their_mean_and_the_parts_are_the_fasters(tmp_path):
    out = tmp_path / "out.json"
    assert run(*QUICK, "--limit", 2, "--repeats", 2, "--json", out) == 0
    (measured,) = json.loads(out.read_text())["runs"]
    for prompt in measured["prompts"]:
        for did in (prompt["baseline"], prompt["speculative"]):
            assert did["latency_min_s"] < did["latency_max_s"]
            assert did["latency_s"] == pytest.approx((did["latency_min_s"] + did["latency_max_s"]) / 2)
            assert did["tokens_per_s"] == pytest.approx(12 / did["latency_s"])
        ours = prompt["speculative"]
        parts = [ours[f"{part}_s"] for part in ("prefill", "draft", "verify", "other")]
        assert sum(parts) == pytest.approx(ours["latency_min_s"])


# Figures by hand


def outcome(*runs, **verdict):
    return sd.Outcome(list(runs), **verdict)


def divergence(kind="tie", gap=0.0, at_fault=None, index=1):
    return sd.Divergence(index, 1, 2, gap, 0.25, 1.0, kind, at_fault)


def compared(baselines, outcomes, draft_tokens=3, library=None):
    """The comparison of two methods' outcomes, in the order of the prompts."""
    method = sd.Method("K", lambda prompt: None, draft_tokens, weights_gb=2.0, library=library)
    results = [
        sd.Result(prompt_of([1], number), {"baseline": own, "K": ours})
        for number, (own, ours) in enumerate(zip(baselines, outcomes, strict=True), 1)
    ]
    one = sd.Comparison(results, method)
    json.dumps([one.baseline, one.method, one.figures], allow_nan=False)  # whatever it is computed from
    return one


def test_the_summary_by_hand():
    baselines = [outcome(generation_of(range(21), 2.5, 0.5)), outcome(generation_of(range(11), 1.5, 0.5))]
    peaks = {"peak_memory_gb": 3.0}, {"peak_memory_gb": 4.0}
    first = generation_of(range(21), 1.25, 0.5, [(3, 3, 0.06, 0.11, 0.19)] * 5, -3.0)
    second = generation_of(range(11), 1.75, 0.5, [(3, 0, 0.06, 0.11, 0.175)] * 10, -3.0)
    one = compared(baselines, [outcome(first, **peaks[0]), outcome(second, divergence=divergence(), **peaks[1])])
    before = {"new_tokens": 32, "latency_s": 2.0, "tokens_per_s": 8.0, "latency_min_s": 2.0, "latency_max_s": 2.0}
    before |= {"mean_tokens_per_s": (21 / 2.5 + 11 / 1.5) / 2, "time_to_first_token_s": 0.5}
    agree(one.baseline, before | {"time_per_output_token_s": 0.1, "peak_memory_gb": None})
    after = {"new_tokens": 32, "latency_s": 1.5, "tokens_per_s": 32 / 3, "latency_min_s": 1.5, "latency_max_s": 1.5}
    after |= {"mean_tokens_per_s": (21 / 1.25 + 11 / 1.75) / 2, "time_to_first_token_s": 0.5}
    after |= {"time_per_output_token_s": 2 / 30, "rounds": 15, "drafted": 45, "accepted": 15}
    # 15 accepted of 25 tested: α = 0.6. A baseline step takes 3 / 30 s, a draft step 0.9 / 45, a verify pass 1.65 / 15.
    after |= {"acceptance_rate": 1 / 3, "alpha": 0.6, "mean_acceptance_length": 2.0, "tokens_per_round": 2.0}
    after |= {"acceptance_by_position": {"joint": [1 / 3] * 3, "conditional": [1 / 3, 1.0, 1.0]}}
    after |= {"acceptance_histogram": [10, 0, 0, 5], "drafted_histogram": {"3": 15}, "drafted_per_round": 3.0}
    after |= {"log_likelihood": -6.0, "log_likelihood_per_token": -6 / 45}
    after |= {"prefill_s": 0.3, "draft_s": 0.9, "verify_s": 1.65, "other_s": 3.0 - 0.3 - 0.9 - 1.65}
    after |= {"peak_memory_gb": 4.0}
    agree(one.method, after | {"round_s": {"median": 0.175, "p95": 0.19}})
    tokens = 1 + 0.6 + 0.6**2 + 0.6**3
    figures = {"speedup_percent": 100 * (4.0 / 3.0 - 1), "decode_speedup_percent": 100 * (0.1 / (2 / 30) - 1)}
    figures |= {"speedup_range_percent": [100 * (1.5 / 1.75 - 1), 100.0], "speedup_interval_percent": None}
    figures |= {"geometric_mean_speedup_percent": 100 * (math.sqrt(2 * 1.5 / 1.75) - 1)}
    figures |= {"predicted_speedup_percent": 100 * (tokens / (3 * 0.2 + 1.1) - 1)}
    figures |= {"ideal_speedup_percent": 100 * (tokens / (3 * 0.2 + 1) - 1)}
    # For 32 tokens the baseline takes 4 s, this took 3 s: 2.7 s in 15 rounds, which yielded 30 tokens, at best 60.
    seconds = {"free_draft": 3 - 0.9, "perfect_draft": 3 - 2.7 / 2, "free_verify": 3 - 1.65 + 15 * 0.1}
    figures |= {"speedup_if_percent": {kind: 100 * (4 / value - 1) for kind, value in seconds.items()}}
    # 1 + α > 0.2 + 1.1 from α = 0.3 on, 1 + α + α² > 0.4 + 1.1 only from 0.366 on.
    figures |= {"break_even_alpha": 0.3, "weight_bandwidth_gb_s": 20.0}
    figures |= {"baseline_step_s": 0.1, "draft_step_s": 0.02, "verify_pass_s": 0.11}
    figures |= {"draft_cost": 0.2, "verify_cost": 1.1}
    agree(one.figures, figures | {"identical": 1, "ties": 1, "mismatches": 0, "unchecked": 0})


def test_the_expected_speedup():
    """Leviathan et al. 2023, theorem 3.8, with the cost of a verify pass, and for rounds of different lengths."""
    assert sd.expected_speedup(1.0, [3], 0.1, 1.0) == pytest.approx(4 / 1.3)
    assert sd.expected_speedup(0.8, [5] * 7, 0.1, 1.2) == pytest.approx((1 - 0.8**6) / (0.2 * (5 * 0.1 + 1.2)))
    # A round that drafts none, which is a baseline step, and one that drafts 1.
    assert sd.expected_speedup(0.5, [0, 1], 0.1, 1.2) == pytest.approx((1 + 1.5) / (1 + 0.1 + 1.2))
    assert sd.expected_speedup(0.0, [2], 0.1, 1.2) == pytest.approx(1 / 1.4)
    for unknown in ((None, [3], 0.1, 1.0), (0.5, [3], None, 1.0), (0.5, [3], 0.1, None), (0.5, [], 0.1, 1.0)):
        assert sd.expected_speedup(*unknown) is None
    assert sd.expected_speedup(0.5, [0, 0], 0.1, 1.0) is None


def test_the_alpha_from_which_drafting_pays():
    golden = (math.sqrt(5) - 1) / 2
    assert sd.break_even_alpha(0.0, 2.0) == pytest.approx(0.5, abs=1e-6)  # with the longest: 1 / (1 - α) > 2
    assert sd.break_even_alpha(0.4, 1.2) == pytest.approx(0.6)  # K = 1; two want 1 + α + α² > 2, from golden on
    assert golden > 0.6 and sd.break_even_alpha(0.2, 1.6) == pytest.approx(first_that_pays(3, 0.2, 1.6))
    assert sd.break_even_alpha(0.1, 0.8) == pytest.approx(0.0, abs=1e-9)
    assert sd.break_even_alpha(1.0, 1.0) is sd.break_even_alpha(0.5, 20.0) is None
    assert sd.break_even_alpha(None, 1.0) is sd.break_even_alpha(0.1, None) is None


def test_rounds_of_different_lengths_by_hand():
    """An n-gram draft, with a fixed K: what it drafts differs, and a round without draft tokens verifies nothing."""
    rounds = [(3, 2, 0.03, 0.2, 0.25), (0, 0, 0.01, 0.1, 0.12), (1, 1, 0.01, 0.1, 0.11), (3, 0, 0.05, 0.3, 0.4)]
    ours = generation_of(range(8), 1.0, 0.1, rounds, -4.0)
    own = generation_of(range(8), 0.8, 0.1)
    fixed, auto = (compared([outcome(own)], [outcome(ours)], k) for k in (3, "auto"))
    did = fixed.method
    assert (did["rounds"], did["drafted"], did["accepted"]) == (4, 7, 3)
    assert did["alpha"] == pytest.approx(3 / 5)  # tested: 3, 0, 1, 1
    assert did["mean_acceptance_length"] == pytest.approx(1 + 3 / 4)
    assert did["tokens_per_round"] == pytest.approx(7 / 4)
    agree(did["acceptance_by_position"], {"joint": [2 / 3, 1 / 2, 0.0], "conditional": [2 / 3, 1.0, 0.0]})
    assert did["acceptance_histogram"] == [2, 1, 1, 0]
    assert did["drafted_histogram"] == {"0": 1, "1": 1, "3": 2} and did["drafted_per_round"] == pytest.approx(7 / 4)
    agree(did["round_s"], {"median": 0.185, "p95": float(numpy.percentile([0.25, 0.12, 0.11, 0.4], 95))})
    assert did["prefill_s"] == pytest.approx(1.0 - 0.88) and did["other_s"] == pytest.approx(0.88 - 0.1 - 0.7)
    step_s = 0.7 / 7
    c, v = (0.03 + 0.01 + 0.05) / 7 / step_s, (0.2 + 0.1 + 0.3) / 3 / step_s
    assert fixed.figures["draft_cost"] == pytest.approx(c) and fixed.figures["verify_cost"] == pytest.approx(v)
    tokens = 2 * (1 + 0.6 + 0.6**2 + 0.6**3) + (1 + 0.6) + 1
    for kind, cost in (("predicted", v), ("ideal", 1.0)):
        expected = 100 * (tokens / (2 * (3 * c + cost) + (c + cost) + 1) - 1)
        assert fixed.figures[f"{kind}_speedup_percent"] == pytest.approx(expected)
        assert auto.figures[f"{kind}_speedup_percent"] is None
    assert auto.method == did and auto.figures["draft_cost"] == fixed.figures["draft_cost"]


def test_of_an_even_number_of_repeats_the_two_middle_ones_count():
    four = outcome(*(generation_of(range(5), latency, latency / 10) for latency in (9.0, 1.0, 4.0, 2.0)))
    assert four.latency_s == 3.0 and four.run.latency_s == 2.0  # the faster of the two middle ones
    two = outcome(generation_of(range(5), 5.0, 0.5), generation_of(range(5), 2.0, 0.2))
    assert two.latency_s == 3.5 and two.run.latency_s == 2.0
    three = outcome(*(generation_of(range(5), latency, 0.1) for latency in (3.0, 1.0, 2.0)))
    assert three.latency_s == three.run.latency_s == 2.0
    one = compared([four], [two])
    assert (one.baseline["latency_s"], one.method["latency_s"]) == (3.0, 3.5)
    assert (one.baseline["latency_min_s"], one.baseline["latency_max_s"]) == (1.0, 9.0)
    assert one.figures["speedup_percent"] == pytest.approx(100 * (3.0 / 3.5 - 1))
    assert one.baseline["time_to_first_token_s"] == pytest.approx(0.2)  # of the run that counts


def test_of_repeats_of_different_lengths_the_median_by_the_token_counts():
    """Sampled texts differ: the run that counts is the middle one by seconds per token."""
    runs = [generation_of(range(tokens), latency) for tokens, latency in ((10, 2.0), (2, 1.0), (10, 1.0))]
    assert outcome(*runs).run is runs[0] and outcome(*runs).latency_s == 1.0


# Figures that cannot be had

NOTHING = {"acceptance_by_position": {"joint": [], "conditional": []}, "log_likelihood": 0.0}
NOTHING |= dict.fromkeys(["acceptance_rate", "alpha", "mean_acceptance_length", "log_likelihood_per_token"])
NO_COSTS = dict.fromkeys(["draft_step_s", "verify_pass_s", "draft_cost", "verify_cost"])
NO_COSTS |= dict.fromkeys(["predicted_speedup_percent", "ideal_speedup_percent", "speedup_interval_percent"])
NO_COSTS |= {"speedup_if_percent": dict.fromkeys(["free_draft", "perfect_draft", "free_verify"])}
NO_COSTS |= {"break_even_alpha": None}


def part_of(figures, keys):
    return {key: figures[key] for key in keys}


def test_one_token_and_no_round():
    one = compared([outcome(generation_of([7], 1.0, 0.9))], [outcome(generation_of([7], 0.5, 0.4))])
    none = NOTHING | {"acceptance_histogram": [], "drafted_histogram": {}, "round_s": None, "rounds": 0, "drafted": 0}
    none |= dict.fromkeys(["tokens_per_round", "drafted_per_round", "time_per_output_token_s"])
    none |= {"draft_s": 0, "verify_s": 0, "other_s": 0, "prefill_s": 0.5}
    agree(part_of(one.method, none), none)
    none = NO_COSTS | dict.fromkeys(["baseline_step_s", "decode_speedup_percent", "weight_bandwidth_gb_s"])
    agree(part_of(one.figures, none), none)
    assert one.figures["speedup_percent"] == pytest.approx(100.0)
    assert one.figures["speedup_range_percent"] == pytest.approx([100.0, 100.0])
    assert one.baseline["time_per_output_token_s"] is None


def test_rounds_without_a_draft_token():
    ours = generation_of(range(4), 1.0, 0.1, [(0, 0, 0.0, 0.1, 0.2)] * 3)
    one = compared([outcome(generation_of(range(4), 1.0, 0.1))], [outcome(ours)], "auto")
    none = NOTHING | {"acceptance_histogram": [3], "drafted_histogram": {"0": 3}, "rounds": 3, "drafted": 0}
    none |= {"tokens_per_round": 1.0, "drafted_per_round": 0.0, "round_s": {"median": 0.2, "p95": 0.2}}
    agree(part_of(one.method, none), none)
    agree(part_of(one.figures, NO_COSTS), NO_COSTS)
    fixed = compared([outcome(generation_of(range(4), 1.0, 0.1))], [outcome(ours)], 3)  # an n-gram draft finds nothing
    agree(part_of(fixed.figures, NO_COSTS), NO_COSTS)


def test_a_draft_that_is_always_wrong_or_always_right():
    own = outcome(generation_of(range(5), 0.5, 0.1))
    wrong = compared([own], [outcome(generation_of(range(5), 1.0, 0.1, [(2, 0, 0.02, 0.1, 0.2)] * 4))], 2)
    assert wrong.method["acceptance_rate"] == wrong.method["alpha"] == 0
    assert wrong.method["mean_acceptance_length"] == 1 and wrong.method["acceptance_histogram"] == [4, 0, 0]
    agree(wrong.method["acceptance_by_position"], {"joint": [0.0, 0.0], "conditional": [0.0, None]})
    assert wrong.figures["predicted_speedup_percent"] == pytest.approx(100 * (1 / (2 * 0.1 + 1.0) - 1))
    right = compared([own], [outcome(generation_of(range(5), 1.0, 0.1, [(2, 2, 0.02, 0.1, 0.2)] * 2))], 2)
    assert right.method["acceptance_rate"] == right.method["alpha"] == 1
    agree(right.method["acceptance_by_position"], {"joint": [1.0, 1.0], "conditional": [1.0, 1.0]})
    assert right.method["mean_acceptance_length"] == 3 and right.method["acceptance_histogram"] == [0, 0, 2]
    assert right.method["tokens_per_round"] == 2  # the last round was cut off, and still counts whole above
    assert right.figures["predicted_speedup_percent"] == pytest.approx(100 * (3 / (2 * 0.1 + 1.0) - 1))


COUNTS = ("identical", "ties", "mismatches", "unchecked")


def test_ties_mismatches_and_what_was_not_checked_are_counted():
    run = generation_of(range(4), 1.0, 0.1, [(3, 3, 0.1, 0.1, 0.2)])
    ties = [outcome(run, divergence=divergence()) for _ in range(3)]
    one = compared([outcome(run)] * 3, ties)
    assert part_of(one.figures, COUNTS) == dict(zip(COUNTS, (0, 3, 0, 0), strict=True))
    mixed = [outcome(run), ties[0], outcome(run, divergence=divergence("mismatch", 9.0, "speculative"))]
    mixed += [outcome(run, unchecked=OUT_OF_MEMORY), outcome(run, unchecked="the compiler failed")]
    one = compared([outcome(run)] * 5, mixed)
    assert part_of(one.figures, COUNTS) == dict(zip(COUNTS, (1, 1, 1, 2), strict=True))
    one = compared([outcome(run)] * 2, [outcome(run, unchecked=sd.SAMPLED)] * 2)
    assert part_of(one.figures, COUNTS) == dict(zip(COUNTS, (None, 0, 0, 0), strict=True))


def test_numbers_that_are_no_numbers_become_none():
    """The likeliest of them: a draft token that is impossible under the main model, whose log p is -∞."""
    ours = generation_of(range(4), 1.0, 0.1, [(3, 0, 0.1, 0.1, 0.2)], -math.inf)
    one = compared([outcome(generation_of(range(4), 1.0, 0.1))], [outcome(ours)])
    assert one.method["log_likelihood"] is one.method["log_likelihood_per_token"] is None
    assert sd.ratio(math.inf, 2) is sd.ratio(1, 0) is sd.ratio(None, 2) is sd.ratio(2, None) is sd.ratio(0, 0) is None
    assert math.isclose(sd.ratio(1, 4), 0.25) and sd.ratio(0, 4) == 0
    assert sd.as_percent(None) is None and sd.as_percent(1.5) == 50


def test_a_method_of_the_library_has_no_rounds():
    one = compared(
        [outcome(generation_of(range(4), 1.0, 0.1))], [outcome(generation_of(range(4), 2.0))], library="generate()"
    )
    assert set(one.method) == set(one.baseline)  # only what is known of it: the speed
    assert one.method["time_to_first_token_s"] is one.method["time_per_output_token_s"] is None
    assert one.figures["decode_speedup_percent"] is None and one.figures["speedup_percent"] == pytest.approx(-50)
    agree(part_of(one.figures, NO_COSTS), NO_COSTS)


def test_figures_that_cannot_be_had_are_none(llama):
    one = speculate(llama, llama, PROMPT, 3, 1)
    assert one.rounds == [] and len(one.token_ids) == 1
    figures = sd.acceptance([one])
    assert figures["acceptance_rate"] is figures["alpha"] is figures["tokens_per_round"] is None
    assert figures["mean_acceptance_length"] is None
    summary = compared([outcome(baseline(llama, PROMPT, 1))], [outcome(one)]).figures
    assert summary["predicted_speedup_percent"] is None


# The machine


def test_the_peak_of_memory_is_the_processs_or_the_accelerators(monkeypatch):
    before = sd.peak_memory_gb(torch.device("cpu"))
    held = torch.ones(2**28, dtype=torch.uint8)  # 0.27 GB
    rss = psutil.Process().memory_info().rss / 1e9
    assert before <= sd.peak_memory_gb(None) and sd.peak_memory_gb(None) >= 0.99 * rss > held.nbytes / 1e9
    calls = []  # no accelerator here: see what it would be asked
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda device: calls.append(("reset", device)))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: calls.append(device) or 3e9)
    cuda = torch.device("cuda:1")
    assert sd.peak_memory_gb(cuda, reset=True) == sd.peak_memory_gb(cuda) == 3.0 and calls == [
        ("reset", cuda),
        cuda,
        cuda,
    ]


def test_each_outcome_has_the_peak_of_its_runs(llama):
    methods = [sd.Method("baseline", lambda prompt: baseline(llama, PROMPT, 2))]
    (result,) = sd.benchmark([prompt_of(PROMPT, 2)], methods, lambda result: None)
    assert 0.1 < result.baseline.peak_memory_gb <= sd.peak_memory_gb(None)


# The interval

INTERVAL = "speedup_interval_percent"


def repeated(latencies, tokens=100):
    return outcome(*(generation_of(range(tokens), latency) for latency in latencies))


def test_the_interval_covers_the_spread_and_little_else():
    exact = sd.speedup_interval([repeated([2.0, 2.0, 2.0])] * 10, [repeated([1.0, 1.0, 1.0])] * 10)
    assert exact == pytest.approx([100.0, 100.0])
    # Prompts that gain 100 % and 300 %, five of each: of ten drawn anew, m are of the second kind, and all gain
    # 100 + 20 m %. m has a binomial distribution, in which 2.5 % lie below 2, and as many above 8: 140 to 260 %. Over
    # ten prompts this is widened by Student's t of 9 degrees of freedom, 2.262 instead of 1.96, and by √(10 / 9).
    baselines = [repeated([2.0]), repeated([4.0])] * 5
    interval = sd.speedup_interval(baselines, [repeated([1.0])] * 10)
    wider = 2.262 / 1.96 * math.sqrt(10 / 9)
    assert interval == pytest.approx([200 - 60 * wider, 200 + 60 * wider], rel=2e-3)
    assert sd.speedup_interval(baselines, [repeated([1.0])] * 10) == interval  # the same each time
    # Repeats that vary by a tenth: the interval lies within what they can give, and is not a point.
    low, high = sd.speedup_interval([repeated([1.9, 2.0, 2.1])] * 10, [repeated([0.95, 1.0, 1.05])] * 10)
    assert 100 * (1.9 / 1.05 - 1) <= low < 100 < high <= 100 * (2.1 / 0.95 - 1) and high - low > 2


@pytest.mark.parametrize("repeats", [1, 3])
def test_no_interval_is_claimed_for_fewer_than_ten_prompts(repeats):
    latencies = [1.0, 1.1, 1.2][:repeats]
    for prompts in (1, 2, 9):
        assert compared([repeated(latencies)] * prompts, [repeated(latencies)] * prompts).figures[INTERVAL] is None
    low, high = compared([repeated([2.0])] * 10, [repeated(latencies)] * 10).figures[INTERVAL]
    assert low <= 100 * (2.0 / latencies[repeats // 2] - 1) + 1e-6 and low <= high


@pytest.mark.parametrize("prompts", [10, 20, 40])
def test_the_interval_covers_what_it_says(prompts):
    """1,000 simulated runs, whose speedups are lognormal: 95 % of the intervals, but for 2 points, hold the true one.

    Over many prompts, the speedup comes to all seconds of the baseline / all seconds: 1 / E[1 / speedup].
    """
    random = numpy.random.default_rng(0)
    sigma, runs, below, above = 0.2, 1000, 0, 0
    true_percent = 100 * (1 / math.exp(-math.log(1.5) + sigma**2 / 2) - 1)
    for _ in range(runs):
        own_s = random.lognormal(0.0, 0.2, size=prompts)
        ours_s = own_s / random.lognormal(math.log(1.5), sigma, size=prompts)
        own, ours = ([repeated([one], 2) for one in seconds.tolist()] for seconds in (own_s, ours_s))
        low, high = sd.speedup_interval(own, ours)
        below, above = below + (high < true_percent), above + (true_percent < low)
    assert 0.93 <= 1 - (below + above) / runs <= 0.97, (below, above)
    assert below / runs < 0.05 and above / runs < 0.05  # and it errs to both sides


# Who is measured when


def test_methods_take_turns_and_the_median_counts(llama):
    latencies = iter([9.0, 3.0, 9.0, 1.0, 2.0, 4.0, 6.0, 5.0, 0.0, 7.0, 8.0, 9.0, 1.0, 2.0])  # of the runs, in order

    def timed(run):
        run.latency_s = next(latencies)
        return run

    main, draft = sd.CachedModel(llama), sd.CachedModel(llama)
    methods = [
        sd.Method("baseline", lambda prompt: timed(baseline(main, prompt.ids, 3))),
        sd.Method("other", lambda prompt: timed(speculate(main, draft, prompt.ids, 2, 3)), 2),
    ]
    order = []
    prompts = [prompt_of(PROMPT, 1), prompt_of([4], 2)]
    announce = lambda prompt, what: order.append((prompt.number, what))  # noqa: E731
    check = functools.partial(sd.check_outputs, main, False)
    results = list(sd.benchmark(prompts, methods, check, 3, 1, announce))
    b, o = "baseline", "other"
    assert [what for _, what in order[:4]] == ["warm-up, baseline", b, "warm-up, other", o]  # each before its first run
    runs = [(number, what) for number, what in order if not what.startswith("warm-up")]
    assert len(runs) == len(order) - 2
    assert [what for number, what in runs if number == 1] == [b, o, o, b, b, o]
    assert [what for number, what in runs if number == 2] == [o, b, b, o, o, b]
    outcomes = [(result.outcomes[b], result.outcomes[o]) for result in results]
    assert [(own.run.latency_s, ours.run.latency_s) for own, ours in outcomes] == [(4.0, 2.0), (7.0, 1.0)]
    assert [run.latency_s for run in results[0].baseline.runs] == [3.0, 4.0, 6.0]
    assert all(ours.divergence is None and ours.unchecked is None for _, ours in outcomes)


# What a failure costs


def failing(model, when):
    """The model, which runs out of memory where `when` says so of the ids that it is to read."""

    def out_of_memory(module, arguments):
        if when(arguments[0]):
            raise torch.OutOfMemoryError(f"{OUT_OF_MEMORY}\nTried to allocate 2 GiB")

    model.get_input_embeddings().register_forward_pre_hook(out_of_memory)
    return model


def test_a_prompt_that_fails_does_not_end_the_rest():
    """A real model that runs out of memory, as its first layer says, wherever it reads the token 13."""
    main = sd.CachedModel(failing(make_model("llama"), lambda ids: (ids == 13).any()))
    prompts = [prompt_of([1, 2], 1), prompt_of([13, 5], 2), prompt_of([4], 3)]
    methods = [sd.Method("baseline", lambda prompt: baseline(main, prompt.ids, 2))]
    check = functools.partial(sd.check_outputs, main, False)
    results = list(sd.benchmark(prompts, methods, check))
    assert [result.baseline.error for result in results] == [None, OUT_OF_MEMORY, None]
    assert results[1].baseline.runs == [] and results[1].error(methods[0]) == OUT_OF_MEMORY
    assert [len(results[place].baseline.run.token_ids) for place in (0, 2)] == [2, 2]


class Failing:
    """A pair whose main model runs out of memory in the verify passes of K = 3, in one chosen run of it."""

    def __init__(self, fails_at):
        self.announced, self.fails_at = [], fails_at
        model = make_model("llama")
        draft_model = like(model, 0.05)
        self.main = sd.CachedModel(failing(model, lambda ids: ids.shape[1] == 4 and self.fails()))
        draft = sd.ModelDraft(sd.CachedModel(draft_model), sd.Greedy())
        self.prompts = [prompt_of(PROMPT, 1, 12), prompt_of([4, 8], 2, 12), prompt_of([17], 3, 12)]
        self.methods = sd.our_methods(self.main, draft, sd.Greedy(), (3, "auto"), self.prompts[0])

    def fails(self):
        """Whether what was announced last is what shall fail: a prompt's number, the method, and which of its runs."""
        return bool(self.announced) and (*self.announced[-1], self.announced.count(self.announced[-1])) == self.fails_at

    def run(self, repeats=1):
        announce = lambda prompt, what: self.announced.append((prompt.number, what))  # noqa: E731
        check = functools.partial(sd.check_outputs, self.main, False)
        return list(sd.benchmark(self.prompts, self.methods, check, repeats, 1, announce))


def test_a_method_that_fails_costs_its_own_outcome_only():
    pair = Failing((2, "K = 3", 1))
    results = pair.run()
    own, fixed, auto = pair.methods
    assert [method.label for method in pair.methods] == ["baseline", "K = 3", "K = auto"]
    assert [result.error(fixed) for result in results] == [None, OUT_OF_MEMORY, None]
    assert results[1].outcomes["K = 3"].runs == []
    for result in results:
        assert result.error(auto) is None is result.error(own)
        expected = result.baseline.run.token_ids
        assert len(expected) == 12 and result.outcomes["K = auto"].run.token_ids == expected
        assert result.error(fixed) or result.outcomes["K = 3"].run.token_ids == expected
    of_three = sd.Comparison(results, auto)
    assert of_three.prompts == of_three.figures["identical"] == 3 and of_three.baseline["new_tokens"] == 36


def test_a_method_that_fails_in_a_repeat_is_not_run_again():
    pair = Failing((2, "K = 3", 2))
    results = pair.run(repeats=3)
    assert [len(result.outcomes["K = 3"].runs) for result in results] == [3, 1, 3]
    assert [result.outcomes["K = 3"].error for result in results] == [None, OUT_OF_MEMORY, None]
    assert pair.announced.count((2, "K = 3")) == 2
    for label in ("baseline", "K = auto"):
        assert [len(result.outcomes[label].runs) for result in results] == [3, 3, 3]


def test_a_method_that_fails_while_it_is_warmed_up_is_warmed_up_again():
    pair = Failing((1, "warm-up, K = 3", 1))
    results = pair.run()
    assert [result.outcomes["K = 3"].error for result in results] == [OUT_OF_MEMORY, None, None]
    warmed_up = [(number, what) for number, what in pair.announced if what.startswith("warm-up")]
    expected = [(1, "warm-up, baseline"), (1, "warm-up, K = 3"), (1, "warm-up, K = auto"), (2, "warm-up, K = 3")]
    assert warmed_up == expected


def test_costs_that_cannot_be_measured_cost_the_automatic_length_only():
    model = failing(make_model("llama"), lambda ids: ids.shape[1] == 16)  # the longest verify pass that is measured
    main, draft = sd.CachedModel(model), sd.ModelDraft(sd.CachedModel(make_model("llama")), sd.Greedy())
    prompts = [prompt_of(PROMPT, 1, 8), prompt_of([4, 8], 2, 8)]
    methods = sd.our_methods(main, draft, sd.Greedy(), (3, "auto"), prompts[0])
    results = list(sd.benchmark(prompts, methods, functools.partial(sd.check_outputs, main, False)))
    for result in results:
        assert result.error(methods[2]) == f"what passes cost cannot be measured: {OUT_OF_MEMORY}"
        assert result.error(methods[1]) is None and len(result.outcomes["K = 3"].run.token_ids) == 8


def test_a_baseline_that_fails_leaves_nothing_to_compare_with():
    main = sd.CachedModel(make_model("llama"))
    broken = sd.CachedModel(failing(make_model("llama"), lambda ids: True))
    methods = [
        sd.Method("baseline", lambda prompt: baseline(broken, prompt.ids, 2)),
        sd.Method("K = 2", lambda prompt: speculate(main, main, prompt.ids, 2, 2), 2),
    ]
    (result,) = sd.benchmark([prompt_of(PROMPT, 1)], methods, functools.partial(sd.check_outputs, main, False))
    assert result.error(methods[1]) == OUT_OF_MEMORY and result.outcomes["K = 2"].error is None


def checked(when=lambda ids: False, spoil=None, sampled=False):
    """A result of two methods with a real model, after its check; `spoil`: does something to the model before that.

    The outcome of K = 2, why it cannot be compared, if so, and the figures.
    """
    model = failing(make_model("llama"), when)
    main = sd.CachedModel(model)
    methods = [
        sd.Method("baseline", lambda prompt: baseline(main, prompt.ids, 12)),
        sd.Method("K = 2", lambda prompt: speculate(main, make_model("llama"), prompt.ids, 2, 12), 2),
    ]

    def check(result):
        if spoil:
            spoil(model)
        sd.check_outputs(main, sampled, result)

    (result,) = sd.benchmark([prompt_of(PROMPT, 1)], methods, check)
    assert all(len(one.runs) == 1 and one.run.latency_s > 0 for one in result.outcomes.values())
    return result.outcomes["K = 2"], result.error(methods[1]), sd.Comparison([result], methods[1]).figures


def test_a_check_that_fails_costs_the_verdict_and_not_the_timings():
    """Out of memory in the certifying pass over the whole text, of 5 + 12 - 1 tokens."""
    outcome, error, figures = checked(lambda ids: ids.shape[1] == 16)
    assert error is None and outcome.unchecked == OUT_OF_MEMORY and outcome.divergence is None
    assert (figures["identical"], figures["unchecked"]) == (0, 1) and figures["speedup_percent"] is not None


def nan_weights(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = math.nan


@pytest.mark.parametrize("sampled", [False, True])
def test_logits_that_are_not_finite_are_an_error(sampled):
    _, error, _ = checked(spoil=nan_weights, sampled=sampled)
    assert error == "the main model's logits are not finite; try --dtype float32 or bfloat16"
    outcome, error, figures = checked(sampled=sampled)
    assert error is None and figures["identical"] == (None if sampled else 1)
    assert outcome.unchecked == (sd.SAMPLED if sampled else None)


def test_the_worst_of_all_repeats_is_what_a_method_is_judged_by(llama):
    """Two of three repeats write something else, in one place: the worse is found, whichever of them the median is."""
    main = sd.CachedModel(llama)
    right = baseline(main, PROMPT, 6)
    logits = main.forward_without_cache(ids_of([*PROMPT, *right.token_ids[:5]]), 1)[0]
    assert logits.argmax() == right.token_ids[5]
    second, *_, last = logits.argsort(descending=True)[1:].tolist()
    for order in itertools.permutations([right.token_ids[5], second, last]):
        runs = []
        for latency, token in zip((1.0, 2.0, 3.0), order, strict=True):
            runs.append(generation_of([*right.token_ids[:5], token], latency, 0.1))
        result = sd.Result(prompt_of(PROMPT, 1), {"baseline": outcome(right), "K": outcome(*runs)})
        sd.check_outputs(main, False, result)
        found = result.outcomes["K"].divergence
        assert (found.kind, found.index, found.at_fault) == ("mismatch", 5, "speculative")
        assert found.speculative_token == last and found.baseline_token == right.token_ids[5]
        assert found.gap == pytest.approx((logits.max() - logits[last]).item(), abs=1e-3)

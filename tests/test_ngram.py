"""Drafting without a model: what followed the text's last tokens before."""

import json
import re

import pytest
import torch
from conftest import VOCABULARY, baseline, counts_of, ids_of, make_model, speculate
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_decoding as sd


def looked_up(text, k):
    """What the last earlier occurrence of the last 3, 2 or 1 tokens was followed by: by looking everywhere."""
    for n in (3, 2, 1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:] and len(text) > n:
                return text[start + n : start + n + k]
    return []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=40), k=st.integers(1, 6), steps=st.integers(1, 8))
def test_it_finds_what_a_search_of_everything_finds(text, k, steps):
    draft = sd.NgramDraft(torch.device("cpu"))
    draft.reset(ids_of(text[:1]))
    for end in sorted({*range(1, len(text), steps), len(text)}):  # the text grows by some tokens a round
        draft_ids, q = draft.propose(text[:end], sd.FixedLength(k))
        assert draft_ids.tolist() == [looked_up(text[:end], k)] and q is None


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["llama", "gemma2", "mistral", "bloom"]),
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12),
    k=st.integers(1, 6),
)
def test_exact_and_what_was_drafted_is_counted(family, prompt, k):
    main = MODELS[family]
    result = speculate(main, "ngram", prompt * 2, k, 40)
    assert result.token_ids == baseline(main, prompt * 2, 40).token_ids
    assert sum(accepted + 1 for _, accepted in counts_of(result)) >= 39
    text = prompt * 2 + result.token_ids[:1]
    for drafted, accepted in counts_of(result):  # rounds with nothing drafted are rounds
        assert drafted == len(looked_up(text, k))
        text = (prompt * 2 + result.token_ids)[: len(text) + accepted + 1]


MODELS = {family: make_model(family) for family in ("llama", "gemma2", "mistral", "bloom")}


def test_auto_leaves_it_alone_where_it_is_never_right_and_uses_it_where_it_is():
    free = {"draft_pass_s": {1: 0.0, 2: 0.0}, "main_pass_s": {1: 1.0, 16: 2.0}}

    def rounds(text, right):
        draft, chooser = sd.NgramDraft(torch.device("cpu")), sd.AutoLength(free)
        draft.reset(ids_of(text))
        drafted = []
        for _ in range(80):
            draft_ids, _ = draft.propose(text, chooser)
            drafted.append(draft_ids.shape[1])
            chooser.learn(drafted[-1], drafted[-1] if right else 0)
        return drafted

    text = list(range(30)) * 2
    assert rounds(text, right=True)[-1] == 15
    assert sum(rounds(text, right=False)[20:]) <= 6


def test_the_program_runs_it(tmp_path, capsys):
    out, prompts = tmp_path / "out.json", tmp_path / "p.txt"
    prompts.write_text("What does list.sort do?\n")
    arguments = ["--demo", "--draft", "ngram", "--prompts", prompts, "--draft-tokens", "3,auto", "--json", out]
    arguments += ["--max-new-tokens", 40, "--warmup", 0]
    assert sd.main([str(argument) for argument in [*arguments, "--compare", "transformers"]]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["settings"]["draft"] == "ngram" and report["settings"]["demo"] is True
    fixed, auto = report["runs"]
    assert [run["draft_tokens"] for run in report["runs"]] == [3, "auto"]
    for run in report["runs"]:
        summary = run["summary"]
        assert summary["draft_step_s"] > 0 and summary["identical"] == 1
        assert summary["draft_cost"] < summary["verify_cost"] / 4  # it costs next to nothing
        assert summary["draft_cost"] == pytest.approx(summary["draft_step_s"] / summary["baseline_step_s"])
    # A round that finds nothing to draft is a baseline step: it yields one token, and costs one step.
    summary, alpha = fixed["summary"], fixed["summary"]["speculative"]["alpha"]
    counts = {int(length): count for length, count in summary["speculative"]["drafted_histogram"].items()}
    assert set(counts) <= {0, 1, 2, 3} and sum(counts.values()) == summary["speculative"]["rounds"]
    tokens = sum(count * sum(alpha**i for i in range(length + 1)) for length, count in counts.items())
    for key, v in (("predicted_speedup_percent", summary["verify_cost"]), ("ideal_speedup_percent", 1)):
        costs = {length: length * summary["draft_cost"] + v if length else 1 for length in counts}
        steps = sum(count * costs[length] for length, count in counts.items())
        assert summary[key] == pytest.approx(100 * (tokens / steps - 1))
        assert auto["summary"][key] is None  # there is no one K
    assert fixed["costs"] is None and set(auto["costs"]) == {"draft_pass_s", "main_pass_s"}
    assert [other["method"] for other in report["compared"]][0] == "transformers' generate(), eager"
    assert len(report["compared"]) == 3
    assert all(other["summary"]["identical"] == 1 for other in report["compared"])
    assert "ngram" in printed
    chart = printed.split("Times as fast as the baseline")[1].split("Draft tokens accepted")[0]
    bars = [re.match(r" *(K = \w+|predicted)", line)[1] for line in chart.splitlines() if "█" in line]
    assert bars == ["K = 3", "predicted", "K = auto"]


def test_finding_nothing_is_no_rejected_draft():
    chooser = sd.AutoLength({"draft_pass_s": {1: 0.0, 2: 0.0}, "main_pass_s": {1: 1.0, 16: 1.5}})
    for _ in range(200):
        chooser.wants_another([])
        chooser.learn(0, 0)
    assert chooser.rest == 0 and chooser.next_rest == 4 and chooser.alpha == 0.75

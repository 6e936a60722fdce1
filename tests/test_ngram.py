"""Drafting without a model: what followed the text's last tokens before."""

import json

import torch
from conftest import VOCABULARY, alone, ids_of, make_model, speculate
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
    draft.new_text(ids_of(text[:1]))
    for end in sorted({*range(1, len(text), steps), len(text)}):  # the text grows by some tokens a round
        guesses, q = draft.propose(text[:end], sd.FixedLength(k))
        assert guesses.tolist() == [looked_up(text[:end], k)] and q is None


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["llama", "gemma2", "mistral", "bloom"]),
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12),
    k=st.integers(1, 6),
)
def test_exact_and_what_was_drafted_is_counted(family, prompt, k):
    main = MODELS[family]
    result = speculate(main, "ngram", prompt * 2, k, 40)
    assert result.token_ids == alone(main, prompt * 2, 40).token_ids
    assert sum(accepted + 1 for _, accepted in result.rounds) >= 39
    text = prompt * 2 + result.token_ids[:1]
    for drafted, accepted in result.rounds:  # rounds with nothing drafted are rounds
        assert drafted == len(looked_up(text, k))
        text = (prompt * 2 + result.token_ids)[: len(text) + accepted + 1]


MODELS = {family: make_model(family) for family in ("llama", "gemma2", "mistral", "bloom")}


def test_auto_leaves_it_alone_where_it_is_never_right_and_uses_it_where_it_is():
    free = {"draft_pass_s": {1: 0.0, 2: 0.0}, "main_pass_s": {1: 1.0, 17: 2.0}}

    def rounds(text, right):
        draft, chooser = sd.NgramDraft(torch.device("cpu")), sd.AutoLength(16, free)
        draft.new_text(ids_of(text))
        drafted = []
        for _ in range(80):
            guesses, _ = draft.propose(text, chooser)
            drafted.append(guesses.shape[1])
            chooser.learn(drafted[-1], drafted[-1] if right else 0)
        return drafted

    text = list(range(30)) * 2
    assert rounds(text, right=True)[-1] == 16
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
    for run in report["runs"]:
        summary = run["summary"]
        assert summary["predicted_speedup_percent"] is summary["ideal_speedup_percent"] is None
        assert summary["draft_step_s"] is summary["draft_cost"] is None and summary["identical"] == 1
    assert [other["method"] for other in report["compared"]][0] == "transformers' generate()"
    assert all(other["summary"]["identical"] == 1 for other in report["compared"])
    assert "ngram" in printed and "predicted" not in printed.split("By draft length")[1].split("\n")[-6]


def test_finding_nothing_to_guess_is_no_failed_guess():
    chooser = sd.AutoLength(16, {"draft_pass_s": {1: 0.0, 2: 0.0}, "main_pass_s": {1: 1.0, 17: 1.5}})
    for _ in range(200):
        chooser.wants_another([])
        chooser.learn(0, 0)
    assert chooser.rest == 0 and chooser.next_rest == 4 and chooser.alpha == 0.75

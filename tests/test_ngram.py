"""Drafting from the text itself: what followed its last tokens before."""

import json

import torch
from helpers import VOCABULARY, Watched, baseline, counts_of, ids_of, pair_of, speculate
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_decoding as sd

CPU = torch.device("cpu")


def looked_up(text, k):
    """What the last earlier occurrence of the last 3, 2 or 1 tokens was followed by: by looking everywhere."""
    for n in (3, 2, 1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                return text[start + n : start + n + k]
    return []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=40), k=st.integers(1, 6), steps=st.integers(1, 8))
def test_it_finds_what_a_search_of_everything_finds(text, k, steps):
    draft = sd.NgramDraft(CPU)
    draft.reset(ids_of(text[:1]))
    for end in sorted({*range(1, len(text), steps), len(text)}):  # the text grows by some tokens a round
        proposal = draft.propose(text[:end], k)
        assert proposal.ids.tolist() == [looked_up(text[:end], k)] and proposal.q is None
        assert proposal.ids.dtype == torch.long


def proposed(draft, text, k=2):
    return draft.propose(text, k).ids[0].tolist()


def test_it_finds_the_longest_and_the_latest_and_forgets_the_last_text():
    draft = sd.NgramDraft(CPU)
    draft.reset(ids_of([1]))
    assert proposed(draft, [1, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3]) == [5, 8]  # the latest
    draft.reset(ids_of([1]))
    assert proposed(draft, [1, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3]) == [4, 9]  # the longest, though it is earlier
    draft.reset(ids_of([2]))
    assert proposed(draft, [2, 8]) == []
    draft.reset(ids_of([7]))
    assert proposed(draft, [7, 3, 6, 6, 2]) == []  # 2 stood in the last text only
    assert proposed(draft, [7, 3, 6, 6, 2, 7]) == [3, 6]
    assert proposed(draft, [7, 3, 6, 6, 2, 7, 5, 5]) == [5]  # no further than the text goes


FEW = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(family=st.sampled_from(["llama", "gemma2", "mistral", "bloom"]), prompt=FEW, k=st.integers(1, 6))
def test_exact_and_what_was_drafted_is_counted(family, prompt, k):
    main = Watched(pair_of(family, 0.05)[0])
    prompt = prompt * 2
    result = speculate(main, "ngram", prompt, k, 32)
    passes, text, whole = [len(prompt)], len(prompt) + 1, prompt + list(result.token_ids)
    for drafted, accepted in counts_of(result):  # rounds with nothing drafted are rounds
        assert drafted == len(looked_up(whole[:text], k))
        passes.append(drafted + 1)
        text += accepted + 1
    assert main.passes == passes and text >= len(prompt) + 32
    assert result.token_ids == baseline(main, prompt, 32).token_ids


# With the automatic draft length.


def auto():
    """A schedule for rounds of 0, 1, … 15 draft tokens that take 1, 1.5, … 2 seconds."""
    return sd.AutoSchedule([1.0, *(1.5 + k / 28 for k in range(15))])


def drafted_by(schedule, text, right, rounds):
    """How many tokens each of so many rounds drafts behind a text, of which all are right or none."""
    draft, drafted = sd.NgramDraft(CPU), []
    draft.reset(ids_of(text[:1]))
    for _ in range(rounds):
        drafted.append(draft.propose(text, schedule.draft_tokens).ids.shape[1])
        schedule.learn(drafted[-1], drafted[-1] if right else 0)
    return drafted


REPEATS = list(range(30)) * 2


def test_auto_leaves_it_alone_where_it_is_never_right_and_uses_it_where_it_is():
    assert drafted_by(auto(), REPEATS, right=True, rounds=80)[-1] == 15
    assert sum(drafted_by(auto(), REPEATS, right=False, rounds=80)[40:]) == 0


def test_finding_nothing_is_no_rejected_draft():
    schedule = auto()
    assert drafted_by(schedule, list(range(60)), right=False, rounds=200) == [0] * 200
    rounds = drafted_by(auto(), REPEATS, right=True, rounds=20)
    assert drafted_by(schedule, REPEATS, right=True, rounds=20) == rounds


def test_the_program_runs_it(tmp_path, capsys, monkeypatch):
    """And the library's prompt lookup beside it."""
    monkeypatch.setattr(sd, "memory_bandwidth_gb_s", lambda device: 20.0)  # which takes a second
    out, prompts = tmp_path / "out.json", tmp_path / "p.txt"
    prompts.write_text("What does list.sort do?\n")
    arguments = ["--demo", "--draft", "ngram", "--prompts", prompts, "--draft-tokens", 3, "--json", out]
    arguments += ["--device", "cpu", "--max-new-tokens", 40, "--warmup", 0, "--compare", "transformers"]
    assert sd.main([str(argument) for argument in arguments]) == 0
    report = json.loads(out.read_text())
    (prompt,), methods = report["prompts"], {method["label"]: method for method in report["methods"]}
    assert [bool(method["library"]) for method in methods.values()] == [False, False, True, True]
    assert all(method["summary"]["identical"] == 1 for method in methods.values())
    (label,) = (label for label, method in methods.items() if method["draft"] == "ngram" and not method["library"])
    rounds = prompt["outcomes"][label]["rounds"]
    assert set(rounds["drafted"]) <= {0, 1, 2, 3} and 0 in rounds["drafted"]
    assert sum(rounds["accepted"]) + len(rounds["accepted"]) >= 39
    assert methods[label]["summary"]["rounds"] == len(rounds["drafted"]) < 39
    assert label in capsys.readouterr().out

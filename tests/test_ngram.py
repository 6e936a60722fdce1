"""Drafting from the text itself: what followed its last tokens before; alone, and with a model for the other rounds."""

import copy
import json

import pytest
import torch
from helpers import ROOT, VOCABULARY, Watched, baseline, counts_of, ids_of, mixed, pair_of, speculate
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_decoding as sd

CPU = torch.device("cpu")


def looked_up(text, k, shortest=1):
    """What the last earlier occurrence of the last 3, 2 or 1 tokens was followed by: by looking everywhere."""
    for n in range(3, shortest - 1, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                return text[start + n : start + n + k]
    return []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    k=st.integers(1, 6),
    steps=st.integers(1, 8),
    shortest=st.integers(1, 3),
)
def test_it_finds_what_a_search_of_everything_finds(text, k, steps, shortest):
    draft = sd.NgramDraft(CPU, shortest)
    draft.reset(ids_of(text[:1]))
    for end in sorted({*range(1, len(text), steps), len(text)}):  # the text grows by some tokens a round
        draft_ids, q = draft.propose(text[:end], sd.FixedSchedule(k))
        assert draft_ids.tolist() == [looked_up(text[:end], k, shortest)] and q is None
        assert draft_ids.dtype == torch.long


def test_it_finds_the_longest_and_the_latest_and_forgets_the_last_text():
    draft = sd.NgramDraft(CPU)

    def found(text):
        return draft.propose(text, sd.FixedSchedule(2))[0].tolist()[0]

    draft.reset(ids_of([1]))
    assert found([1, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3]) == [5, 8]  # the latest
    draft.reset(ids_of([1]))
    assert found([1, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3]) == [4, 9]  # the longest, though it is earlier
    draft.reset(ids_of([2]))
    assert found([2, 8]) == []
    draft.reset(ids_of([7]))
    assert found([7, 3, 6, 6, 2]) == []  # 2 stood in the last text only
    assert found([7, 3, 6, 6, 2, 7]) == [3, 6]
    assert found([7, 3, 6, 6, 2, 7, 5, 5]) == [5]  # no further than the text goes


class Asked(sd.FixedSchedule):
    """Keeps how sure the draft says it is of each token."""

    def wants_another(self, confidences):
        self.confidences = list(confidences)
        return super().wants_another(confidences)


@pytest.mark.parametrize(
    ("text", "confidence"),
    [([1, 2, 3, 4, 1, 2, 3], 0.95), ([1, 2, 3, 4, 2, 3], 0.75), ([1, 2, 3, 4, 5, 3], 0.45)],
)
def test_it_is_the_surer_the_more_tokens_match(text, confidence):
    draft, schedule = sd.NgramDraft(CPU), Asked(2)
    draft.reset(ids_of(text))
    assert draft.propose(text, schedule)[0].shape == (1, 2)
    assert schedule.confidences == [confidence] * 2


FEW = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None, derandomize=True)
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


# With a model where it finds nothing.


def check_mixed(main, draft, prompt, k, new=40):
    """Exact; the model is asked exactly where n-grams find nothing, and reads just what it has not read.

    Returns for each round of the model how many tokens it had not read, and how many of its tokens were accepted.
    """
    main, draft = Watched(main), Watched(draft)
    result = speculate(main, mixed(draft), prompt, k, new)
    whole = prompt + list(result.token_ids)
    text, has_read = len(prompt) + 1, len(prompt) - 1
    passes, held, main_held, asked = [has_read] if has_read else [], [], [], []
    for drafted, accepted in counts_of(result):
        found = looked_up(whole[:text], k, shortest=2)
        assert drafted == (len(found) if found else k)
        if not found:
            asked.append((text - has_read, accepted))
            passes += [text - has_read] + [1] * (k - 1)
        text += accepted + 1
        if not found:  # the invariant: all but the last two tokens
            has_read = text - 2
            held.append(has_read)
        main_held.append(text - 1)
    assert (draft.passes, draft.held) == (passes, held)
    assert main.held == main_held
    assert result.token_ids == baseline(main, prompt, new).token_ids
    return asked


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2", "bloom"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_with_a_model_it_is_exact_and_the_model_reads_on(family, k):
    """Prompts that hold what the main model says to them: n-grams and the model both propose within one text."""
    main, draft = pair_of(family, 0.05)
    unread = []
    for start in ([33, 8, 50], [5, 9, 13, 2, 40]):
        own = list(baseline(main, start, 14).token_ids)
        asked = check_mixed(main, draft, start + own + start, k, 32)
        assert 0 < len(asked)
        unread += [count for count, _ in asked]
    assert min(unread) == 2 < max(unread)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["llama", "gemma2", "gpt2"]),
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=16),
    k=st.integers(1, 6),
)
def test_with_a_model_it_is_exact_for_any_prompt(family, prompt, k):
    check_mixed(*pair_of(family, 0.02), prompt, k, 24)


@pytest.mark.parametrize("family", ["gemma2", "mistral", "gpt2"])
def test_a_perfect_model_stays_perfect_where_n_grams_have_drafted(family):
    """It would not, had it missed a token that they drafted, or read one twice."""
    main, _ = pair_of(family, 0.05)
    own = list(baseline(main, [33, 8, 50], 14).token_ids)
    asked = check_mixed(main, main, [33, 8, 50, *own, 33, 8, 50], 2, 32)
    assert max(count for count, _ in asked) > 2
    assert all(accepted == 2 for _, accepted in asked)


def test_a_model_beside_n_grams_is_checked_like_any_other():
    main, draft = pair_of("gemma2", 0.05)
    draft = copy.deepcopy(draft)
    assert mixed(draft).models[0].model is draft
    draft.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="^the draft model's logits are not finite"):
        speculate(main, mixed(draft), [5, 9, 13, 2, 40] * 2, 3, 24)


# With the automatic draft length.


def auto(reads=False):
    """The automatic schedule for rounds of 0, 1, … 15 draft tokens that take 1, 1.5, … 2 seconds."""
    return sd.AutoSchedule([1.0, *(1.5 + k / 28 for k in range(15))], reads)


def drafted_by(schedule, text, right, rounds):
    """How many tokens each of so many rounds drafts behind a text, of which all are right or none."""
    draft, drafted = sd.NgramDraft(CPU), []
    draft.reset(ids_of(text[:1]))
    for _ in range(rounds):
        drafted.append(draft.propose(text, schedule)[0].shape[1])
        schedule.learn(drafted[-1], drafted[-1] if right else 0)
    return drafted


REPEATS = list(range(30)) * 2


@pytest.mark.parametrize("reads", [True, False])
def test_auto_leaves_it_alone_where_it_is_never_right_and_uses_it_where_it_is(reads):
    """Whether it reads from the device or not: how sure n-grams are is known on the host."""
    assert drafted_by(auto(reads), REPEATS, right=True, rounds=80)[-1] == 15
    assert sum(drafted_by(auto(reads), REPEATS, right=False, rounds=80)[40:]) <= 4


def test_finding_nothing_is_no_rejected_draft():
    schedule = auto()
    assert drafted_by(schedule, list(range(60)), right=False, rounds=200) == [0] * 200
    assert drafted_by(schedule, REPEATS, right=True, rounds=20) == drafted_by(auto(), REPEATS, right=True, rounds=20)


class Kept(sd.MixedDraft):
    """The program's draft of n-grams and a model."""

    def __init__(self, ngram, model):
        super().__init__(ngram, model)
        type(self).latest = self


def test_the_program_runs_it(tmp_path, capsys, monkeypatch):
    """Alone and with a model, and as the library's prompt lookup."""
    monkeypatch.setattr(sd, "MixedDraft", Kept)
    out, prompts = tmp_path / "out.json", tmp_path / "p.txt"
    prompts.write_text("What does list.sort do?\n")
    both = f"ngram,ngram+{ROOT / 'tests' / 'tiny_gemma2' / 'draft'}"
    arguments = ["--demo", "--draft", both, "--prompts", prompts, "--draft-tokens", 3, "--json", out]
    arguments += ["--device", "cpu", "--max-new-tokens", 40, "--warmup", 0, "--compare", "transformers"]
    assert sd.main([str(argument) for argument in arguments]) == 0
    report = json.loads(out.read_text())
    assert report["settings"]["draft"] == both.split(",")
    methods = {method["label"]: method for method in report["methods"]}
    libraries = [method["library"] for method in methods.values()]
    lookup = "transformers' assisted generation, K = 3, eager"
    assert libraries == [None, None, None, "transformers' generate(), eager", lookup]  # the library mixes none
    assert all(method["summary"]["identical"] == 1 for method in methods.values())

    (prompt,) = report["prompts"]
    alone, together = (label for label in methods if methods[label]["draft"] and not methods[label]["library"])
    assert [methods[label]["draft"] for label in (alone, together)] == both.split(",")
    counts = {label: prompt["outcomes"][label]["rounds"] for label in (alone, together)}
    assert set(counts[alone]["drafted"]) <= {0, 1, 2, 3} and 0 in counts[alone]["drafted"]
    assert set(counts[together]["drafted"]) <= {1, 2, 3}  # where n-grams find nothing, the model drafts three
    for label, rounds in counts.items():
        assert sum(rounds["accepted"]) + len(rounds["accepted"]) >= 39
        assert methods[label]["summary"]["rounds"] == len(rounds["drafted"]) < 39
    Kept.latest.ngram.reset(ids_of([1]))  # where a model stands by, one token that matches is not enough
    for text, found in (([1, 2, 1], []), ([1, 2, 3, 1, 2], [3, 1, 2])):
        assert Kept.latest.ngram.propose(text, sd.FixedSchedule(3))[0].tolist() == [found]
    assert alone in (printed := capsys.readouterr().out) and together in printed

"""How many tokens to draft: the automatic choice is exact, does what costs say, and leaves a useless draft alone."""

import json
import re

import pytest
import torch
from conftest import always_wrong, baseline, counts_of, ids_of, like, make_model, speculate
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]
WIDTHS = {1: 1.0, 2: 1.05, 16: 1.5}
CHEAP = {"draft_pass_s": {1: 0.1, 2: 0.1}, "main_pass_s": WIDTHS}  # a draft that costs a tenth of the main model
DEAR = {"draft_pass_s": {1: 1.2, 2: 1.2}, "main_pass_s": WIDTHS}  # one that can never pay


def confidences(*values):
    return [torch.tensor([value]) for value in values]


class Scripted(sd.FixedLength):
    """Drafts as many tokens in each round as a list says, none included."""

    def __init__(self, lengths):
        super().__init__(max(lengths))
        self.lengths = lengths
        self.round = 0

    def wants_another(self, confidences):
        return len(confidences) < self.lengths[self.round % len(self.lengths)]

    def learn(self, drafted, accepted):
        assert drafted == self.lengths[self.round % len(self.lengths)]
        self.round += 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    family=st.sampled_from(["llama", "gemma2", "mistral"]),
    noise=st.sampled_from([0.0, 0.03, 0.2]),
)
def test_any_sequence_of_lengths_is_exact_none_included(lengths, family, noise):
    main = make_model(family)
    result = speculate(main, like(main, noise), PROMPT, Scripted(lengths), 24)
    assert result.token_ids == baseline(main, PROMPT, 24).token_ids
    assert [drafted for drafted, _ in counts_of(result)] == [
        lengths[i % len(lengths)] for i in range(len(result.rounds))
    ]
    if noise == 0:  # a perfect draft stays perfect behind a round without it
        assert all(drafted == accepted for drafted, accepted in counts_of(result))


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.2])
def test_auto_is_exact(noise):
    main = make_model("gemma2")
    result = speculate(main, like(main, noise), PROMPT, sd.AutoLength(CHEAP), 64)
    assert result.token_ids == baseline(main, PROMPT, 64).token_ids


def test_auto_drafts_long_with_a_perfect_draft():
    main = make_model("gemma2")
    with torch.no_grad():
        main.get_output_embeddings().weight.mul_(20)  # a model that is sure of itself
    result = speculate(main, main, PROMPT, sd.AutoLength(CHEAP), 128)
    assert all(drafted == accepted for drafted, accepted in counts_of(result))
    assert max(drafted for drafted, _ in counts_of(result)) == 15


def test_auto_leaves_a_useless_draft_alone_and_probes_it_now_and_then():
    main = make_model("llama")
    result = speculate(main, always_wrong(main), PROMPT, sd.AutoLength(CHEAP), 200)
    drafted = [count for count, _ in counts_of(result)]
    assert result.token_ids == baseline(main, PROMPT, 200).token_ids
    first = drafted.index(0)
    probes = [i for i, count in enumerate(drafted) if count and i > first]
    assert first < 20 and probes  # it gives up soon, and tries again
    rests = [later - earlier - 1 for earlier, later in zip([first - 1, *probes], probes, strict=False)]
    assert rests[:5] == [4, 8, 16, 32, 64][: len(rests)] and len(rests) >= 4
    assert all(drafted[i] == 1 for i in probes)


def test_auto_never_asks_a_draft_that_cannot_pay():
    main = make_model("llama")
    result = speculate(main, main, PROMPT, sd.AutoLength(DEAR), 40)
    assert sum(drafted for drafted, _ in counts_of(result)) <= 3  # the probes


def test_auto_takes_up_a_draft_that_has_become_good():
    chooser = sd.AutoLength(CHEAP)

    def rounds(count, right):
        for _ in range(count):
            drafted = 0
            while chooser.wants_another(confidences(*[0.95] * drafted)):
                drafted += 1
            chooser.learn(drafted, drafted if right else 0)
        return drafted

    rounds(100, right=False)
    assert chooser.alpha < 0.1 and chooser.next_rest == 128
    assert rounds(150, right=True) >= 8
    assert chooser.alpha > 0.9 and chooser.next_rest == 4


def test_the_decision_by_hand():
    costs = {"draft_pass_s": {1: 0.2, 2: 0.3}, "main_pass_s": {4: 1.15, 1: 1.0}}  # each further token of a pass: 0.05
    chooser = sd.AutoLength(costs, longest=3)
    assert chooser.round_s == pytest.approx([1.0, 1.35, 1.6, 1.85])
    assert chooser.alpha == 0.75
    # Fixed lengths at α = 0.75: what a round costs, by the tokens that it yields.
    per_token = [1 / 1, 1.35 / 1.75, 1.6 / 2.3125, 1.85 / 2.734375]
    assert chooser.worth_s == pytest.approx(min(per_token)) == pytest.approx(per_token[3])
    # One drafted, of probability p: one more yields 0.75 p for 0.25, two more yield (0.75 + 0.5625) p for 0.5.
    assert per_token[3] * 0.75 * 0.5 > 0.25 > per_token[3] * 0.75 * 0.49  # so p = 0.493 is where it begins to pay
    for tenth, pays in [(9, True), (5, True), (4, False), (0, False)]:
        assert chooser.wants_another([])
        assert chooser.wants_another(confidences(tenth / 10 + 0.05)) is pays  # nothing seen: taken at its word
    assert chooser.wants_another([]) and chooser.wants_another(confidences(0.95))
    assert chooser.wants_another(confidences(0.95, 0.55)) and not chooser.wants_another(confidences(0.95, 0.55, 0.95))


def test_probabilities_are_put_right_by_what_became_of_them():
    chooser = sd.AutoLength(CHEAP, longest=3)
    chooser.wants_another([])
    chooser.wants_another(confidences(0.95))
    chooser.wants_another(confidences(0.95, 0.31))
    chooser.wants_another(confidences(0.95, 0.31, 0.77))
    chooser.learn(3, 1)  # the first was right, the second wrong, the third never tested
    assert chooser.by_tenth[9] == pytest.approx([0.98 * 0.95 * 2 + 1, 0.98 * 2 + 1])
    assert chooser.by_tenth[3] == pytest.approx([0.98 * 0.35 * 2, 0.98 * 2 + 1])
    assert chooser.by_tenth[7] == pytest.approx([0.75 * 2, 2.0])
    assert chooser.alpha == pytest.approx((0.9 * 6 + 1) / (0.9 * 8 + 2))


# What passes cost.

MEASURED = {1, 2, 3, 4, 5, 6, 9, 10, 16}  # both sides of each step of the ladder


def test_costs_are_measured_at_the_widths_that_come_up():
    main, draft = sd.CachedModel(make_model("gemma2")), sd.CachedModel(make_model("gemma2"))
    costs = sd.measure_costs(main, sd.ModelDraft(draft, sd.Greedy()), sd.Greedy(), ids_of(PROMPT))
    assert set(costs) == {"main_pass_s", "draft_pass_s"}
    assert set(costs["main_pass_s"]) == MEASURED and set(costs["draft_pass_s"]) == {1, 2}
    assert all(seconds > 0 for times in costs.values() for seconds in times.values())


class Watched(sd.CachedModel):
    """Notes every step by its head and its number of tokens, and every verify pass; moves a clock of its own on."""

    seconds, clock = {}, 0.0

    def __init__(self, model):
        super().__init__(model)
        self.steps, self.verified = [], []

    def step(self, head, ids, uniform=None, logits_to_keep=1):
        self.steps.append((head.__name__, ids.shape[1]))
        Watched.clock += self.seconds.get(ids.shape[1], 0.0)
        return super().step(head, ids, uniform, logits_to_keep)

    def verify(self, score, ids):
        self.verified.append(ids.shape[1])
        return super().verify(score, ids)


@pytest.mark.parametrize("sampler", [sd.Greedy(), sd.Sampling(0.5)], ids=["greedy", "sampled"])
def test_costs_are_those_of_the_steps_that_decoding_runs(llama, sampler, monkeypatch):
    """By a clock that steps alone move on: 5 ms for a token, 10 for more; 8 for a draft's first two, 4 for another."""
    monkeypatch.setattr(sd, "now", lambda device: Watched.clock)
    main, draft = Watched(llama), Watched(like(llama, 0.05))
    main.seconds = {width: 0.005 if width == 1 else 0.010 for width in MEASURED}
    draft.seconds = {2: 0.008, 1: 0.004}
    costs = sd.measure_costs(main, sd.ModelDraft(draft, sampler), sampler, ids_of(PROMPT))
    assert set(main.steps) == {("sample", 1), *(("score", width) for width in MEASURED - {1})}
    assert set(main.verified) == MEASURED - {1}
    assert set(draft.steps) == {("sample_draft", 1), ("sample_draft", 2)}
    assert main.cache.get_seq_length() == len(PROMPT)  # all behind the prompt: rolled back each time
    assert draft.cache.get_seq_length() == len(PROMPT) - 1
    assert costs["main_pass_s"] == pytest.approx(main.seconds)
    assert costs["draft_pass_s"] == pytest.approx(draft.seconds)


def test_the_costs_of_a_draft_without_a_model(llama):
    main = sd.CachedModel(llama)
    costs = sd.measure_costs(main, sd.NgramDraft(main.device), sd.Sampling(0.5), ids_of(PROMPT))
    assert set(costs["main_pass_s"]) == MEASURED and set(costs["draft_pass_s"]) == {1, 2}
    assert 0 <= costs["draft_pass_s"][1] and 0 < costs["draft_pass_s"][2]


# How often it decides.


class Probability(float):
    """A draft token's probability that notes when it is read from the device."""

    reads = []

    def __float__(self):
        self.reads.append(float.__float__(self))
        return float.__float__(self)


def test_the_stride_decides_only_after_so_many_tokens(monkeypatch):
    sure, unsure = Probability(0.95), Probability(0.05)
    chooser = sd.AutoLength(CHEAP, longest=8, stride=3)
    for values, wants, reads in [
        ([], True, 0),
        ([unsure], True, 0),  # it will not pay, but that is not looked at yet
        ([unsure] * 2, True, 0),
        ([unsure] * 3, False, 3),
        ([], True, 0),
        ([sure], True, 0),
        ([sure] * 3, True, 3),
        ([sure] * 3 + [unsure], True, 0),
        ([sure] * 3 + [unsure] * 3, False, 3),  # each is read once
        ([], True, 0),
        ([sure] * 3, True, 3),
        ([sure] * 6, True, 3),
        ([sure] * 7, True, 0),
        ([sure] * 8, False, 2),  # the limit, though it is no multiple of three
    ]:
        monkeypatch.setattr(Probability, "reads", [])
        assert chooser.wants_another(values) is wants, values
        assert len(Probability.reads) == reads, values
    chooser.learn(8, 8)
    assert chooser.by_tenth[9] == pytest.approx([counted(1.9, 8), counted(2.0, 8)])  # of all, read late or not


def counted(assumed, times):
    """A decaying count after so many more."""
    for _ in range(times):
        assumed = 0.98 * assumed + 1
    return assumed


@pytest.mark.parametrize(
    ("stride", "longest", "lengths"),
    [(1, 7, {0, 1, 2, 3, 4, 5, 6, 7}), (2, 7, {0, 2, 4, 6, 7}), (3, 8, {0, 3, 6, 8}), (4, 15, {0, 4, 8, 12, 15})]
    + [(9, 5, {0, 5})],
)
def test_a_stride_drafts_multiples_of_it_and_never_more_than_the_limit(stride, longest, lengths):
    main = make_model("gemma2")
    with torch.no_grad():
        main.get_output_embeddings().weight.mul_(20)  # a model that is sure of itself
    seen = set()
    for noise in (0.0, 0.01, 0.3):
        chooser = sd.AutoLength(CHEAP, longest=longest, stride=stride)
        result = speculate(main, like(main, noise), PROMPT, chooser, 128)
        assert result.token_ids == baseline(main, PROMPT, 128).token_ids
        seen |= {drafted for drafted, _ in counts_of(result)}
    assert {longest} < seen <= lengths


@pytest.mark.parametrize("sampler", [sd.Greedy(), sd.Sampling(0.8)], ids=["greedy", "sampled"])
def test_a_resting_round_is_a_step_and_no_verify_pass(sampler):
    model = make_model("llama")
    main, draft = Watched(model), Watched(model)
    result = speculate(main, draft, PROMPT, sd.AutoLength(DEAR), 40, sampler=sampler)
    counts = counts_of(result)
    assert counts[:5] == [(0, 0)] * 4 + [(1, 1)]  # four rounds of rest, and a probe, of a perfect draft
    assert main.steps == [("score", drafted + 1) if drafted else ("sample", 1) for drafted, _ in counts]
    assert main.verified == [drafted + 1 for drafted, _ in counts if drafted]
    assert len(draft.steps) == sum(drafted for drafted, _ in counts)  # the draft does nothing in a round of rest
    assert draft.steps[0] == ("sample_draft", 1 + 5)  # it reads on: what the rest has left unread
    assert result.log_likelihood < 0


def test_several_lengths_share_one_baseline(tmp_path, capsys):
    out = tmp_path / "out.json"
    prompts = tmp_path / "p.txt"
    prompts.write_text("What does list.sort do?\nWhat does re.split do?\n")
    arguments = ["--demo", "--prompts", prompts, "--draft-tokens", "1,4,auto", "--max-new-tokens", "24", "--json", out]
    assert sd.main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [run["draft_tokens"] for run in report["runs"]] == [1, 4, "auto"]
    baselines = [[prompt["baseline"] for prompt in run["prompts"]] for run in report["runs"]]
    assert baselines[0] == baselines[1] == baselines[2] and len(baselines[0]) == 2
    for run in report["runs"]:
        counts = run["summary"]["speculative"]
        histogram = counts["drafted_histogram"]
        assert sum(histogram.values()) == counts["rounds"]
        assert sum(int(length) * times for length, times in histogram.items()) == counts["drafted"]
        assert run["summary"]["identical"] == 2
    assert set(report["runs"][0]["summary"]["speculative"]["drafted_histogram"]) == {"1"}
    assert report["runs"][0]["costs"] is report["runs"][1]["costs"] is None
    costs = report["runs"][2]["costs"]
    assert set(costs["draft_pass_s"]) == {"1", "2"} and set(costs["main_pass_s"]) == set(map(str, MEASURED))
    assert "By draft length" in printed and "The fastest draft length in this run was" in printed
    assert "All 6 outputs are the main model's own" in printed
    chart = printed.split("Times as fast as the baseline")[1].split("Draft tokens accepted")[0]
    bars = [re.match(r" *(K = \w+|predicted)", line)[1] for line in chart.splitlines() if "█" in line]
    # Measured and predicted side by side, for each length; with auto there is no one K, and no prediction.
    assert bars == ["K = 1", "predicted", "K = 4", "predicted", "K = auto"]


def test_a_draft_that_rests_from_the_start_and_has_nothing_to_forget():
    """A prompt of one token, of which the draft reads nothing; its layers have windows."""
    model = make_model("gemma2")
    result = speculate(model, model, [3], sd.AutoLength(DEAR), 20)
    assert result.token_ids == baseline(model, [3], 20).token_ids
    assert counts_of(result)[:4] == [(0, 0)] * 4

"""How many tokens to draft: the automatic choice is exact, follows its rule, and leaves a useless draft alone."""

import json
import re

import pytest
import torch
from conftest import alone, always_wrong, ids_of, like, make_model, speculate
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]
WIDTHS = {1: 1.0, 2: 1.05, 17: 1.5}
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
    assert result.token_ids == alone(main, PROMPT, 24).token_ids
    assert [drafted for drafted, _ in result.rounds] == [lengths[i % len(lengths)] for i in range(len(result.rounds))]
    if noise == 0:  # a perfect draft stays perfect behind a round without it
        assert all(drafted == accepted for drafted, accepted in result.rounds)


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.2])
def test_auto_is_exact(noise):
    main = make_model("gemma2")
    result = speculate(main, like(main, noise), PROMPT, sd.AutoLength(16, CHEAP), 64)
    assert result.token_ids == alone(main, PROMPT, 64).token_ids


def test_auto_drafts_long_with_a_perfect_draft():
    main = make_model("gemma2")
    with torch.no_grad():
        main.get_output_embeddings().weight.mul_(20)  # a model that is sure of itself
    result = speculate(main, main, PROMPT, sd.AutoLength(16, CHEAP), 128)
    assert all(drafted == accepted for drafted, accepted in result.rounds)
    assert max(drafted for drafted, _ in result.rounds) == 16


def test_auto_leaves_a_useless_draft_alone_and_probes_it_now_and_then():
    main = make_model("llama")
    result = speculate(main, always_wrong(main), PROMPT, sd.AutoLength(16, CHEAP), 200)
    drafted = [count for count, _ in result.rounds]
    assert result.token_ids == alone(main, PROMPT, 200).token_ids
    first = drafted.index(0)
    probes = [i for i, count in enumerate(drafted) if count and i > first]
    assert first < 20 and probes  # it gives up soon, and tries again
    rests = [later - earlier - 1 for earlier, later in zip([first - 1, *probes], probes, strict=False)]
    assert rests[:5] == [4, 8, 16, 32, 64][: len(rests)] and len(rests) >= 4
    assert all(drafted[i] == 1 for i in probes)


def test_auto_never_asks_a_draft_that_cannot_pay():
    main = make_model("llama")
    result = speculate(main, main, PROMPT, sd.AutoLength(16, DEAR), 40)
    assert sum(drafted for drafted, _ in result.rounds) <= 3  # the probes


def test_auto_takes_up_a_draft_that_has_become_good():
    chooser = sd.AutoLength(16, CHEAP)

    def rounds(count, right):
        for _ in range(count):
            drafted = 0
            while chooser.wants_another(confidences(*[0.95] * drafted)):
                drafted += 1
            chooser.learn(drafted, drafted if right else 0)
        return drafted

    rounds(100, right=False)
    assert chooser.alpha < 0.1 and chooser.next_rest == 64
    assert rounds(150, right=True) >= 8
    assert chooser.alpha > 0.9 and chooser.next_rest == 4


def test_the_rule_by_hand():
    costs = {"draft_pass_s": {1: 0.2, 2: 0.3}, "main_pass_s": {4: 1.15, 1: 1.0}}  # each further token of a pass: 0.05
    chooser = sd.AutoLength(3, costs)
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
    chooser = sd.AutoLength(3, CHEAP)
    chooser.wants_another([])
    chooser.wants_another(confidences(0.95))
    chooser.wants_another(confidences(0.95, 0.31))
    chooser.wants_another(confidences(0.95, 0.31, 0.77))
    chooser.learn(3, 1)  # the first was right, the second wrong, the third never tested
    assert chooser.by_tenth[9] == pytest.approx([0.98 * 0.95 * 2 + 1, 0.98 * 2 + 1])
    assert chooser.by_tenth[3] == pytest.approx([0.98 * 0.35 * 2, 0.98 * 2 + 1])
    assert chooser.by_tenth[7] == pytest.approx([0.75 * 2, 2.0])
    assert chooser.alpha == pytest.approx((0.9 * 6 + 1) / (0.9 * 8 + 2))


def test_costs_are_measured_at_the_widths_that_come_up():
    main, draft = sd.CachedModel(make_model("gemma2")), sd.CachedModel(make_model("gemma2"))
    costs = sd.measure_costs(main, draft, sd.Greedy(), ids_of(PROMPT), 16)
    assert set(costs["main_pass_s"]) == {1, 2, 3, 5, 9, 17} and set(costs["draft_pass_s"]) == {1, 2}
    assert all(seconds > 0 for times in costs.values() for seconds in times.values())
    assert set(sd.measure_costs(main, draft, sd.Greedy(), ids_of(PROMPT), 4)["main_pass_s"]) == {1, 2, 3, 5}
    no_model = sd.measure_costs(main, None, sd.Sampling(0.5), ids_of(PROMPT), 4)
    assert max(no_model["draft_pass_s"].values()) < min(no_model["main_pass_s"].values())


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
    costs = report["runs"][2]["costs"]
    assert set(costs["draft_pass_s"]) == {"1", "2"} and set(costs["main_pass_s"]) == {"1", "2", "3", "5", "9", "17"}
    assert "By draft length" in printed and "The fastest draft length in this run was" in printed
    assert "All 6 outputs are the main model's own" in printed
    bars = [line for line in printed.splitlines() if "█" in line]
    kinds = [re.search("measured|predicted", line)[0] for line in bars]
    assert kinds == ["measured", "predicted"] * 3  # side by side, for each length


def test_a_draft_that_rests_from_the_start_and_has_nothing_to_forget():
    """A prompt of one token, of which the draft reads nothing; its layers have windows."""
    model = make_model("gemma2")
    result = speculate(model, model, [3], sd.AutoLength(16, DEAR), 20)
    assert result.token_ids == alone(model, [3], 20).token_ids and result.rounds[:4] == [(0, 0)] * 4

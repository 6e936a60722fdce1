"""How many tokens to draft: exact whatever the lengths, close to the best fixed K, and a useless draft is left alone.

What pays is a question of time. Here a model of a device tells it, not a clock: so many baseline steps for a round of K
draft tokens, and for each probability that the host reads in the middle of drafting.
"""

import itertools
import random

import pytest
import torch
from helpers import always_wrong, baseline, counts_of, ids_of, like, make_model, speculate
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def costs_of(c, v, widest=None):
    """What a round of 0 to 15 draft tokens costs, in baseline steps: K · c + v; `widest`: v of the widest pass."""
    slope = ((widest or v) - v) / 14
    return [1.0] + [k * c + v + slope * (k - 1) for k in range(1, 16)]


CHEAP, DEAR = costs_of(0.1, 1.05, 1.5), costs_of(1.2, 1.05, 1.5)  # one that can never pay


class Scripted(sd.FixedSchedule):
    """Drafts as many tokens in each round as a list says, none included; notes what it is told."""

    def __init__(self, lengths):
        super().__init__(max(lengths))
        self.lengths, self.told, self.texts = lengths, [], []

    def wants_another(self, confidences):
        return len(confidences) < self.lengths[len(self.told) % len(self.lengths)]

    def learn(self, drafted, accepted):
        self.told.append((drafted, accepted))

    def end_text(self, rounds):
        self.texts.append(rounds)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    family=st.sampled_from(["llama", "gemma2", "mistral"]),
    noise=st.sampled_from([0.0, 0.03, 0.2]),
)
def test_any_sequence_of_lengths_is_exact_none_included(lengths, family, noise):
    main, schedule = make_model(family), Scripted(lengths)
    result = speculate(main, like(main, noise), PROMPT, schedule, 24)
    assert result.token_ids == baseline(main, PROMPT, 24).token_ids
    assert schedule.told == counts_of(result) and [tuple(rounds) for rounds in schedule.texts] == [tuple(result.rounds)]
    assert [drafted for drafted, _ in schedule.told] == [lengths[i % len(lengths)] for i in range(len(result.rounds))]
    if noise == 0:  # a perfect draft stays perfect behind a round without it
        assert all(drafted == accepted for drafted, accepted in schedule.told)


@pytest.mark.parametrize("reads", [True, False], ids=["token by token", "before the round"])
@pytest.mark.parametrize("noise", [0.0, 0.03, 0.2])
def test_auto_is_exact(noise, reads):
    main, schedule = make_model("gemma2"), sd.AutoSchedule(CHEAP, reads)
    for tokens in (PROMPT, [3]):  # what it learns from one text it takes to the next
        result = speculate(main, like(main, noise), tokens, schedule, 64)
        assert result.token_ids == baseline(main, tokens, 64).token_ids


# On a device that is a model of time.


def simulate(schedule, alphas, costs, *, texts=20, tokens=128, read_s=0.0, catch_up_s=0.0, seed=0):
    """Decode texts; return baseline steps' worth of tokens by time, and how many tokens each round drafted.

    `alphas`: how often the draft token of each position is accepted. `costs`: what rounds cost in truth. `read_s`: what
    reading a probability costs. `catch_up_s`: what a draft's first pass costs more after a round that drafted nothing.
    """
    chance, spent, lengths = random.Random(seed), 0.0, []
    for _ in range(texts):
        made, rounds = 1, []
        while made < tokens:
            Read.times, confidences = 0, []
            while schedule.wants_another(confidences):
                confidences.append(torch.full((1,), 0.5))
            drafted = accepted = len(confidences)
            for position in range(drafted):
                if chance.random() >= alphas[position]:
                    accepted = position
                    break
            round_s = costs[drafted] + read_s * Read.times
            if drafted and rounds and not rounds[-1].drafted:
                round_s += catch_up_s
            schedule.learn(drafted, accepted)
            rounds.append(sd.Round(drafted, accepted, None, None, round_s))
            made += accepted + 1
        schedule.end_text(tuple(rounds))
        spent += sum(one.round_s for one in rounds)
        lengths += [one.drafted for one in rounds]
    return texts * (tokens - 1) / spent, lengths


class Read:
    times = 0


@pytest.fixture(autouse=True)
def count_reads(monkeypatch):
    """Count how often the host reads a tensor's values."""

    def counting(name):
        read = getattr(torch.Tensor, name)

        def method(self, *arguments):
            Read.times += 1
            return read(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, method)

    for name in ("__float__", "__int__", "__bool__", "item", "tolist", "numpy", "cpu"):
        counting(name)


FALLING = [0.85 * 0.9**i for i in range(15)]
MACHINES = [costs_of(0.55, 1.06, 1.13), costs_of(0.44, 1.06, 1.13), costs_of(0.28, 1.06), costs_of(0.1, 1.1, 1.4)]


@pytest.mark.parametrize("costs", MACHINES, ids=["c = 0.55", "c = 0.44", "c = 0.28", "c = 0.1"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, FALLING], ids=str)
def test_on_an_accelerator_auto_is_as_fast_as_the_best_fixed_length(alpha, costs):
    alphas = alpha if alpha is FALLING else [alpha] * 15
    yields = itertools.accumulate(itertools.accumulate(alphas, lambda chance, rate: chance * rate), initial=1.0)
    best = max(tokens / round_s for tokens, round_s in zip(yields, costs, strict=True))  # without a draft: 1
    factor, _ = simulate(sd.AutoSchedule(costs, False), alphas, costs, texts=5, tokens=1000, read_s=0.5)
    assert factor >= 0.98 * best


@pytest.mark.parametrize("costs", [*MACHINES, DEAR], ids=["c = 0.55", "c = 0.44", "c = 0.28", "c = 0.1", "dear"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.55])
def test_a_useless_draft_costs_little_and_is_tried_again(costs, alpha):
    """Over the five prompts of the default run; also where a draft must read on for long after a rest."""
    factor, lengths = simulate(sd.AutoSchedule(costs, False), [alpha] * 15, costs, texts=5, read_s=0.5, catch_up_s=3)
    assert factor >= 0.97
    if alpha == 0:
        rests = [len(list(same)) for drafts, same in itertools.groupby(lengths, key=bool) if not drafts]
        assert rests[0] == 256 and len(rests) >= 2  # it learned that in one text, and rested beyond it


@pytest.mark.parametrize("reads", [True, False], ids=["token by token", "before the round"])
def test_a_draft_that_has_become_good_is_taken_up(reads):
    schedule = sd.AutoSchedule(costs_of(0.3, 1.06), reads)
    assert simulate(schedule, [0.05] * 15, schedule.costs)[1][-1] == 0
    assert simulate(schedule, [0.9] * 15, schedule.costs)[0] > 1.5


@pytest.mark.parametrize(
    ("alpha", "measured"),
    [
        (0.75, [1.0] + [2 * cost for cost in costs_of(0.44, 1.06)[1:]]),  # rounds seem to cost too much
        (0.75, [1.0, 1.5, 4.0, *costs_of(0.44, 1.06)[3:]]),  # one of them
        (0.75, costs_of(0.05, 1.06)),  # long ones too little
        (0.3, [1.5, *costs_of(0.44, 1.06)[1:]]),  # a plain step too much
        (0.3, [1.0] + [0.5 * cost for cost in costs_of(0.44, 1.06)[1:]]),
        (0.75, [3 * cost for cost in costs_of(0.44, 1.06)]),  # all of them, as on a machine that was busy
    ],
)
def test_a_wrong_estimate_does_not_last(alpha, measured):
    schedule, costs, alphas = sd.AutoSchedule(measured, False), costs_of(0.44, 1.06), [alpha] * 15
    simulate(schedule, alphas, costs)
    best = max(1, simulate(sd.FixedSchedule(2), alphas, costs)[0])
    assert simulate(schedule, alphas, costs, seed=1)[0] >= 0.97 * best


# By hand.


def test_the_length_before_the_round_by_hand():
    schedule = sd.AutoSchedule([1.0, 1.35, 1.65, 2.25], False)
    # At α = 0.75: what a round costs, by the tokens that it yields.
    per_token = [1 / 1, 1.35 / 1.75, 1.65 / 2.3125, 2.25 / 2.734375]
    assert schedule.worth_s == pytest.approx(min(per_token)) == pytest.approx(per_token[2]) and schedule.best == 2
    unread = []
    while schedule.wants_another(unread):
        unread.append(torch.full((1,), 0.01))
    assert len(unread) == 2 and Read.times == 0
    for _ in range(60):  # the first is always accepted, the second never
        schedule.learn(2, 1)
    assert schedule.best == 1 and schedule.rates[0] > 0.7 > 0.4 > schedule.rates[1]


def test_the_decision_token_by_token_by_hand():
    schedule = sd.AutoSchedule([1.0, 1.35, 1.6, 1.85], True)
    worth_s = 1.85 / 2.734375
    # One drafted, of probability p: one more yields 0.75 p for 0.25, two more yield (0.75 + 0.5625) p for 0.5.
    assert worth_s * 0.75 * 0.5 > 0.25 > worth_s * 0.75 * 0.49  # so p = 0.493 is where it begins to pay
    for probability, pays in [(0.95, True), (0.55, True), (0.45, False), (0.05, False), (float("nan"), False)]:
        for kind in (float, lambda value: torch.full((1,), value)):  # nothing seen: taken at its word
            assert schedule.wants_another([])
            assert schedule.wants_another([kind(probability)]) is pays
    assert schedule.wants_another([]) and schedule.wants_another([0.95])
    assert schedule.wants_another([0.95, 0.55]) and not schedule.wants_another([0.95, 0.55, 0.95])
    schedule.rates, schedule.worth_s = [0.9, 0.5, 0.5], 1.0  # 0.45 · 0.5 for 0.25, or 0.45 · (0.5 + 0.25) for 0.5
    assert schedule.wants_another([]) and not schedule.wants_another([0.45])


def test_probabilities_are_put_right_by_what_became_of_them():
    schedule = sd.AutoSchedule(CHEAP[:4], True)
    for confidences in ([], [0.95], [0.95, 0.31], [0.95, 0.31, 0.77]):
        schedule.wants_another(confidences)
    schedule.learn(3, 1)  # the first was right, the second wrong, the third never tested
    assert schedule.by_tenth[9] == pytest.approx([0.98 * 0.95 * 2 + 1, 0.98 * 2 + 1])
    assert schedule.by_tenth[3] == pytest.approx([0.98 * 0.35 * 2, 0.98 * 2 + 1])
    assert schedule.by_tenth[7] == pytest.approx([0.75 * 2, 2.0])
    assert schedule.accepted == pytest.approx([0.98 * 6 + 1, 0, 0])
    assert schedule.tested == pytest.approx([0.98 * 8 + 1, 1, 0])


def test_probabilities_of_ngrams_decide_on_an_accelerator_too():
    schedule = sd.AutoSchedule(costs_of(0.0, 1.2, 2.5), False)  # numbers on the host: reading them costs nothing
    assert schedule.wants_another([]) and schedule.wants_another([0.95] * 5)
    assert schedule.wants_another([]) and not schedule.wants_another([0.05] * 2)


def test_costs_are_corrected_by_medians():
    schedule = sd.AutoSchedule([1.0, 2.0, 3.0, 4.0], False)
    schedule.end_text(tuple(sd.Round(1, 0, None, None, 3.0) for _ in range(2)))
    assert schedule.round_s == [1, 2, 3, 4]  # two rounds say nothing yet
    slow = [sd.Round(1, 0, None, None, 100.0)]
    schedule.end_text((*slow, *(sd.Round(k, 0, None, None, 1.5 * k + 1.5) for k in (1, 1, 3, 3, 3)), *slow))
    assert schedule.round_s == pytest.approx([1.5, 3, 4.5, 6])  # 2 and 0 are as wrong as those beside them
    schedule.end_text(tuple(sd.Round(0, 0, None, None, 0.5) for _ in range(20)))
    assert schedule.round_s == pytest.approx([0.5, 3, 4.5, 6])
    schedule.end_text(tuple(sd.Round(0, 0, None, None, 2.0) for _ in range(15)))  # what was long ago is forgotten
    schedule.end_text(())
    assert schedule.round_s == pytest.approx([2, 3, 4.5, 6])


# With models.


@pytest.mark.parametrize("reads", [True, False], ids=["token by token", "before the round"])
def test_auto_drafts_long_with_a_perfect_draft(reads):
    main = make_model("gemma2")
    with torch.no_grad():
        main.get_output_embeddings().weight.mul_(20)  # a model that is sure of itself
    result = speculate(main, main, PROMPT, sd.AutoSchedule(CHEAP, reads), 128)
    assert all(drafted == accepted for drafted, accepted in counts_of(result))
    assert max(drafted for drafted, _ in counts_of(result)) == 15


@pytest.mark.parametrize("helper", ["model", "useless", "ngram"])
def test_on_an_accelerator_the_host_reads_once_in_a_round(llama, helper):
    schedule = sd.AutoSchedule(CHEAP, False)
    drafts = {"model": like(llama, 0.03), "useless": always_wrong(llama), "ngram": "ngram"}
    per_round, learn = [], schedule.learn

    def learn_and_note(drafted, accepted):
        per_round.append((Read.times, drafted))
        learn(drafted, accepted)
        Read.times = 0

    schedule.learn = learn_and_note
    speculate(llama, drafts[helper], PROMPT, schedule, 100)
    assert {reads for reads, _ in per_round[1:]} == {1}  # rounds of rest, too
    assert helper == "ngram" or max(drafted for _, drafted in per_round) > 3


class Watched(sd.CachedModel):
    """Notes every step by its function and its number of tokens; moves a clock of its own on."""

    seconds, clock = {}, 0.0

    def __init__(self, model):
        super().__init__(model)
        self.steps, self.verified, self.prompts = [], [], []

    def prefill(self, prompt_ids, rolls_back=True):
        self.prompts.append(prompt_ids.shape[1])
        return super().prefill(prompt_ids, rolls_back)

    def step(self, then, ids, uniform=None, logits_to_keep=1):
        self.steps.append((then.__name__, ids.shape[1]))
        Watched.clock += self.seconds.get(ids.shape[1], 0.0)
        return super().step(then, ids, uniform, logits_to_keep)

    def verify(self, score, ids):
        self.verified.append(ids.shape[1])
        return super().verify(score, ids)


@pytest.mark.parametrize("sampler", [sd.Greedy(), sd.Sampling(0.8)], ids=["greedy", "sampled"])
def test_a_resting_round_is_a_step_and_no_verify_pass(llama, sampler):
    main, draft = Watched(llama), Watched(llama)
    schedule = sd.AutoSchedule(CHEAP, False)
    schedule.rest = 4
    result = speculate(main, draft, PROMPT, schedule, 40, sampler=sampler)
    counts = counts_of(result)
    assert counts[:4] == [(0, 0)] * 4 and counts[4][0] > 1
    assert all(drafted == accepted for drafted, accepted in counts)
    assert main.steps == [("score", drafted + 1) if drafted else ("sample", 1) for drafted, _ in counts]
    assert main.verified == [drafted + 1 for drafted, _ in counts if drafted]
    assert len(draft.steps) == sum(drafted for drafted, _ in counts)  # the draft does nothing in a round of rest
    assert draft.prompts == [len(PROMPT) + 4 + 1 - 2]  # nor does it read the prompt before it is asked
    assert draft.steps[0] == ("sample_draft", 2)


def test_a_draft_reads_on_after_a_rest_in_the_middle_of_a_text(llama):
    draft, schedule = Watched(llama), sd.FixedSchedule(3)
    asked = iter([True] * 5 + [False] * 4 + [True] * 400)  # one round of three draft tokens, then four without
    schedule.wants_another = lambda confidences: next(asked) and len(confidences) < 3
    result = speculate(Watched(llama), draft, PROMPT, schedule, 40)
    assert counts_of(result)[:6] == [(3, 3)] + [(0, 0)] * 4 + [(3, 3)]
    assert draft.prompts == [len(PROMPT) - 1]
    assert draft.steps[:6] == [("sample_draft", n) for n in (2, 1, 1, 2 + 4, 1, 1)]


def test_a_draft_that_rests_from_the_start_and_has_nothing_to_forget():
    """A prompt of one token, of which the draft reads nothing; its layers have windows."""
    model, schedule = make_model("gemma2"), sd.AutoSchedule(CHEAP, True)
    schedule.rest = 4
    result = speculate(model, model, [3], schedule, 20)
    assert result.token_ids == baseline(model, [3], 20).token_ids
    assert counts_of(result)[:4] == [(0, 0)] * 4 and counts_of(result)[4][0] > 0


# What rounds cost.


def test_the_widths_of_verify_passes():
    assert sd.verify_widths(3, CPU) == sd.verify_widths(3, GPU) == (4,)
    assert sd.verify_widths("auto", CPU) == (3, 5, 9, 16)
    for kind in ("cuda", "xpu", "mps"):
        assert sd.verify_widths("auto", torch.device(kind)) == (5, 16)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("sampler", [sd.Greedy(), sd.Sampling(0.5)], ids=["greedy", "sampled"])
def test_costs_are_those_of_the_steps_that_decoding_runs(llama, sampler, device, monkeypatch):
    """By a clock that steps alone move on: 5 ms for a token; 8 for a draft's first two, 4 for another."""
    monkeypatch.setattr(sd, "now", lambda device: Watched.clock)
    widths = sd.verify_widths("auto", device)
    main, draft = Watched(llama), Watched(like(llama, 0.05))
    padded = {width: min(one for one in widths if one >= width) for width in range(2, 17)}  # as compiled steps are
    main.seconds = {1: 0.005} | {width: 0.01 + 0.001 * padded[width] for width in padded}
    draft.seconds = {2: 0.008, 1: 0.004}
    costs = sd.measure_costs(main, sd.ModelDraft(draft, sampler), sampler, ids_of(PROMPT), widths)
    expected = [0.005] + [0.008 + 0.004 * (k - 1) + main.seconds[k + 1] for k in range(1, 16)]
    assert costs == pytest.approx(expected)  # also of those between the measured ones
    assert {then for then, _ in main.steps} == {"sample", "score"} and {then for then, _ in draft.steps} == {
        "sample_draft"
    }
    assert set(main.verified) >= set(widths)
    assert main.cache.get_seq_length() == len(PROMPT)  # all behind the prompt: rolled back each time
    assert draft.cache.get_seq_length() == len(PROMPT) - 1


def test_the_costs_of_a_draft_without_a_model(llama, monkeypatch):
    monkeypatch.setattr(sd, "now", lambda device: Watched.clock)
    main = Watched(llama)
    main.seconds = {width: 0.005 * width for width in range(1, 17)}
    costs = sd.measure_costs(main, sd.NgramDraft(main.device), sd.Sampling(0.5), ids_of(PROMPT), (2, 3, 5, 9, 16))
    assert costs == pytest.approx([0.005 * (k + 1) for k in range(16)])  # verifying alone

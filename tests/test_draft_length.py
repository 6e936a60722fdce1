"""How many tokens to draft: exact whatever the lengths, close to the best fixed K, and a useless draft is left alone.

What pays is a question of time. Here a model of a device tells it, not a clock: so many baseline steps for a round of K
draft tokens.
"""

import copy
import itertools
import random

import numpy
import pytest
import torch
from helpers import baseline, counts_of, ids_of, like, make_model, pair_of, speculate
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
AUTO = [sd.AutoSchedule, sd.ConfidenceSchedule]
SAMPLERS = {"greedy": sd.Greedy(), "sampled": sd.Sampling(0.5), "ngram": sd.Sampling(0.5)}


def costs_of(c, v, widest=None):
    """What a round of 0 to 15 draft tokens costs, in baseline steps: K · c + v; `widest`: v of the widest pass."""
    slope = ((widest or v) - v) / 14
    return [1.0] + [k * c + v + slope * (k - 1) for k in range(1, 16)]


CHEAP, DEAR = costs_of(0.1, 1.05, 1.5), costs_of(1.2, 1.05, 1.5)  # one that can never pay


class Scripted(sd.FixedSchedule):
    """Drafts as many tokens in each round as a list says, none included; notes what it is told."""

    def __init__(self, lengths):
        super().__init__(max(lengths))
        self.lengths, self.learnt, self.texts = lengths, [], []

    def wants_another(self, confidences):
        return len(confidences) < self.lengths[len(self.learnt) % len(self.lengths)]

    def learn(self, confidences, accepted):
        self.learnt.append((len(confidences), accepted))

    def end_text(self, rounds):
        self.texts.append(rounds)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    family=st.sampled_from(["llama", "gemma2", "mistral"]),
    noise=st.sampled_from([0.0, 0.03, 0.2]),
)
def test_any_sequence_of_lengths_is_exact_none_included(lengths, family, noise):
    (main, draft), schedule = pair_of(family, noise), Scripted(lengths)
    result = speculate(main, draft, PROMPT, schedule, 24)
    assert result.token_ids == baseline(main, PROMPT, 24).token_ids
    assert schedule.learnt == counts_of(result) and schedule.texts == [result.rounds]
    assert [each.drafted for each in result.rounds] == [lengths[i % len(lengths)] for i in range(len(result.rounds))]
    if noise == 0:  # a perfect draft stays perfect behind a round without it
        assert all(drafted == accepted for drafted, accepted in counts_of(result))


@pytest.mark.parametrize("kind", AUTO)
def test_auto_is_exact(kind):
    """What it learns from one text it takes to the next."""
    schedule = kind(CHEAP)
    for noise, tokens in itertools.product((0.0, 0.03, 0.2), (PROMPT, [3])):
        main, draft = pair_of("gemma2", noise)
        result = speculate(main, draft, tokens, schedule, 64)
        assert result.token_ids == baseline(main, tokens, 64).token_ids


# On a device that is a model of time.


def simulate(schedule, alphas, costs, *, texts=20, tokens=128, catch_up_s=0.0, seed=0):
    """Decode texts; return baseline steps' worth of tokens by time, and how many tokens each round drafted.

    `alphas`: how often the draft token of each position is accepted. `costs`: what rounds cost in truth. `catch_up_s`:
    what a draft's first pass costs more after a round that drafted nothing. Only ConfidenceSchedule reads confidences.
    """
    chance, spent, lengths = random.Random(seed), 0.0, []
    confidence = 0.5 if isinstance(schedule, sd.ConfidenceSchedule) else None
    for _ in range(texts):
        made, rounds = 1, []
        while made < tokens:
            confidences = []
            while schedule.wants_another(confidences):
                confidences.append(confidence)
            drafted = accepted = len(confidences)
            for position in range(drafted):
                if chance.random() >= alphas[position]:
                    accepted = position
                    break
            late = drafted and rounds and not rounds[-1].drafted
            rounds.append(sd.Round(drafted, accepted, seconds=costs[drafted] + (catch_up_s if late else 0)))
            schedule.learn(confidences, accepted)
            made += accepted + 1
        schedule.end_text(tuple(rounds))
        spent += sum(each.seconds for each in rounds)
        lengths += [each.drafted for each in rounds]
    return texts * (tokens - 1) / spent, lengths


FALLING = [0.85 * 0.9**i for i in range(15)]
MACHINES = {c: costs_of(c, 1.06, 1.4 if c < 0.2 else 1.13) for c in (0.55, 0.44, 0.28, 0.1)}


@pytest.mark.parametrize("c", MACHINES)
def test_auto_is_as_fast_as_the_best_fixed_length(c):
    costs = MACHINES[c]
    for alphas in [FALLING, *([alpha] * 15 for alpha in (0.0, 0.3, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9))]:
        yields = itertools.accumulate(itertools.accumulate(alphas, lambda chance, rate: chance * rate), initial=1.0)
        best = max(tokens / seconds for tokens, seconds in zip(yields, costs, strict=True))  # without a draft: 1
        factor, _ = simulate(sd.AutoSchedule(costs), alphas, costs, texts=5, tokens=1000)
        assert factor >= 0.98 * best, alphas[:2]


@pytest.mark.parametrize("costs", [*MACHINES.values(), DEAR], ids=[*map(str, MACHINES), "dear"])
def test_a_useless_draft_costs_little_and_is_tried_again(costs):
    """Over the five prompts of the default run; also where a draft must catch up for long after a rest."""
    for alpha in (0.0, 0.3, 0.55):
        factor, lengths = simulate(sd.AutoSchedule(costs), [alpha] * 15, costs, texts=5, catch_up_s=3)
        assert factor >= 0.97
        if alpha == 0:
            rests = [len(list(same)) for drafts, same in itertools.groupby(lengths, key=bool) if not drafts]
            assert rests[0] == 256 and len(rests) >= 2  # it learned that in one text, and rested beyond it


@pytest.mark.parametrize("kind", AUTO)
def test_a_draft_that_has_become_good_is_taken_up(kind):
    costs = costs_of(0.3, 1.06)
    schedule = kind(costs)
    assert simulate(schedule, [0.05] * 15, costs)[1][-1] == 0
    assert simulate(schedule, [0.9] * 15, costs)[0] > 1.5
    _, lengths = simulate(kind(costs), [1.0] * 15, costs, texts=1, tokens=5000)
    assert [number for number, drafted in enumerate(lengths) if not drafted][:2] == [127, 255]  # compared with


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
    schedule, costs, alphas = sd.AutoSchedule(measured), costs_of(0.44, 1.06), [alpha] * 15
    simulate(schedule, alphas, costs)
    best = max(1, simulate(sd.FixedSchedule(2), alphas, costs)[0])
    assert simulate(schedule, alphas, costs, seed=1)[0] >= 0.97 * best


@pytest.mark.parametrize("factor", [1.5, 2.0])
@pytest.mark.parametrize("kind", AUTO)
def test_the_rest_is_over_when_corrected_costs_say_that_some_length_pays(kind, factor):
    """It rests within a text, for costs that seem too high; at its end they are known, and the next text drafts."""
    costs, alphas = costs_of(0.3, 1.06), [0.85] * 15
    schedule = kind([1.0] + [factor * cost for cost in costs[1:]])
    assert simulate(schedule, alphas, costs, texts=1)[1][-1] == 0
    assert schedule.wants_another([])
    assert sum(map(bool, simulate(schedule, alphas, costs, texts=1, seed=1)[1][:16])) >= 15  # one may be a probe


# By hand.


def length_of(schedule):
    """How many tokens the next round drafts, whatever the host could read."""
    return next(drafted for drafted in range(20) if not schedule.wants_another([None] * drafted))


def test_the_length_before_the_round_by_hand():
    schedule = sd.AutoSchedule([1.0, 1.35, 1.65, 2.25])
    # At α = 0.75: what a round costs, by the tokens that it yields.
    per_token = [1 / 1, 1.35 / 1.75, 1.65 / 2.3125, 2.25 / 2.734375]
    assert schedule.worth_s == pytest.approx(min(per_token)) == pytest.approx(per_token[2])
    assert length_of(schedule) == 2
    for _ in range(60):  # the first is always accepted, the second never
        schedule.learn([None] * 2, 1)
    assert length_of(schedule) == 1 and schedule.rates[0] > 0.7 > 0.4 > schedule.rates[1]


def test_the_decision_token_by_token_by_hand():
    schedule = sd.ConfidenceSchedule([1.0, 1.35, 1.6, 1.85])
    before, worth_s = copy.deepcopy(vars(schedule)), 1.85 / 2.734375
    # One drafted, of probability p: one more yields 0.75 p for 0.25, two more yield (0.75 + 0.5625) p for 0.5.
    assert worth_s * 0.75 * 0.5 > 0.25 > worth_s * 0.75 * 0.49  # so p = 0.493 is where it begins to pay
    for probability, pays in [(0.95, True), (0.55, True), (0.45, False), (0.05, False), (float("nan"), False)]:
        assert schedule.wants_another([]) and schedule.wants_another([probability]) is pays
    assert schedule.wants_another([0.95, 0.55]) and not schedule.wants_another([0.95, 0.55, 0.95])
    assert str(vars(schedule)) == str(before)  # asking changes nothing
    # 0.45 · 0.5 for 0.25, or 0.45 · (0.5 + 0.25) for 0.5
    schedule.rates, schedule.worth_s = numpy.array([0.9, 0.5, 0.5]), 1.0
    assert schedule.wants_another([]) and not schedule.wants_another([0.45])
    sure = sd.ConfidenceSchedule(costs_of(0.0, 1.2, 2.5))
    assert sure.wants_another([0.95] * 5) and not sure.wants_another([0.05] * 2)


def test_probabilities_are_put_right_by_what_became_of_them():
    schedule = sd.ConfidenceSchedule(CHEAP[:4])
    schedule.learn([0.95, 0.31, 0.77], 1)  # the first was right, the second wrong, the third never tested
    assert list(schedule.by_tenth[9]) == pytest.approx([0.98 * 0.95 * 2 + 1, 0.98 * 2 + 1])
    assert list(schedule.by_tenth[3]) == pytest.approx([0.98 * 0.35 * 2, 0.98 * 2 + 1])
    assert list(schedule.by_tenth[7]) == pytest.approx([0.75 * 2, 2.0])
    assert list(schedule.accepted) == pytest.approx([0.98 * 6 + 1, 0, 0])
    assert list(schedule.tested) == pytest.approx([0.98 * 8 + 1, 1, 0])


def test_costs_are_corrected_by_medians():
    def rounds(drafted, seconds, count):
        return tuple(sd.Round(drafted, 0, seconds=seconds) for _ in range(count))

    schedule = sd.AutoSchedule([1.0, 2.0, 3.0, 4.0])
    schedule.end_text(rounds(1, 3.0, schedule.ENOUGH - 1))
    assert list(schedule.round_s) == [1, 2, 3, 4]  # so few rounds say nothing yet
    schedule.end_text((*rounds(1, 100.0, 1), *rounds(1, 3.0, 3), *rounds(3, 6.0, 3), *rounds(1, 100.0, 1)))
    assert list(schedule.round_s) == pytest.approx([1.5, 3, 4.5, 6])  # 2 and 0 are as wrong as those beside them
    schedule.end_text(rounds(0, 0.5, 20))
    assert list(schedule.round_s) == pytest.approx([0.5, 3, 4.5, 6])
    schedule.end_text(rounds(0, 2.0, 15))  # what was long ago is forgotten
    schedule.end_text(())
    assert list(schedule.round_s) == pytest.approx([2, 3, 4.5, 6])


# With models.


@pytest.mark.parametrize("kind", AUTO)
def test_auto_drafts_long_with_a_perfect_draft_and_not_at_all_while_it_rests(kind):
    main = make_model("gemma2")
    with torch.no_grad():
        main.get_output_embeddings().weight.mul_(20)  # a model that is sure of itself
    schedule = kind(CHEAP)
    schedule.rest = 5
    schedule.learn([], 0)  # the first of them
    counts = counts_of(speculate(main, main, PROMPT, schedule, 128))
    assert all(drafted == accepted for drafted, accepted in counts)
    assert counts[:4] == [(0, 0)] * 4 and counts[4][0] and max(drafted for drafted, _ in counts) == 15


def test_on_an_accelerator_the_host_reads_nothing_while_it_drafts(llama):
    """On a device whose tensors have no values: to read one is an error."""
    draft = sd.ModelDraft(sd.CachedModel(copy.deepcopy(llama).to("meta")), sd.Greedy())
    schedule, text = sd.AutoSchedule(CHEAP), list(PROMPT)
    draft.reset(ids_of(text[:-1]).to("meta"))
    for _ in range(3):
        proposal = draft.propose(text, schedule)
        drafted = length_of(schedule)
        assert proposal.ids.shape == (1, drafted) and drafted > 1
        draft.roll_back(drafted - 1)
        schedule.learn(proposal.confidences, 1)
        text += [1, 2]


# What rounds cost.


class Watched(sd.CachedModel):
    """Notes its steps by their functions, and its verify passes by their widths; moves a clock on."""

    seconds, clock = {}, 0.0

    def __init__(self, model):
        super().__init__(model)
        self.steps, self.widths = set(), set()

    def step(self, then, ids, uniform=None, logits_to_keep=1):
        self.steps.add(then.__name__)
        Watched.clock += self.seconds.get(ids.shape[1], 0.0)
        return super().step(then, ids, uniform, logits_to_keep)

    def verify(self, score, ids, width):
        assert width >= ids.shape[1]
        self.widths.add(width)
        Watched.clock += self.seconds[width] - self.seconds[ids.shape[1]]  # as a pass of constant shape is padded
        return super().verify(score, ids, width)


def test_the_widths_of_verify_passes():
    assert sd.verify_widths(3, CPU) == sd.verify_widths(3, GPU) == (4,)
    assert sd.verify_widths("auto", CPU) == (3, 5, 9, 16)
    for kind in ("cuda", "xpu", "mps"):
        assert sd.verify_widths("auto", torch.device(kind)) == (5, 16)
    padded, plain = sd.FixedSchedule(3, (3, 5, 9)), sd.FixedSchedule(3)
    assert [padded.width(drafted) for drafted in (1, 2, 3, 4, 8, 9)] == [3, 3, 5, 5, 9, 10]
    assert [plain.width(drafted) for drafted in (1, 2, 3)] == [2, 3, 4]


@pytest.mark.parametrize("widths", [(), (5, 16), (4,)], ids=str)
@pytest.mark.parametrize("kind", ["greedy", "sampled", "ngram"])
def test_costs_are_those_of_the_steps_that_decoding_runs(llama, kind, widths, monkeypatch):
    """By a clock that steps alone move on: 5 ms for a token; 8 for a draft's first two, 4 for another."""
    monkeypatch.setattr(sd, "now", lambda device: Watched.clock)
    monkeypatch.setattr(sd.time, "monotonic", itertools.count().__next__)  # it may measure for seconds
    main, draft, sampler = Watched(llama), Watched(like(llama, 0.05)), SAMPLERS[kind]
    main.seconds = {1: 0.005} | {width: 0.01 + 0.001 * width for width in range(2, 17)}
    draft.seconds = {2: 0.008, 1: 0.004}
    helper = sd.NgramDraft(CPU) if kind == "ngram" else sd.ModelDraft(draft, sampler)
    costs = sd.measure_costs(main, helper, sampler, ids_of(PROMPT), widths)
    width, most = sd.FixedSchedule(0, widths).width, widths[-1] - 1 if widths else 15
    drafting = [0.0] * most if kind == "ngram" else [0.008 + 0.004 * k for k in range(most)]
    expected = [0.005] + [drafting[k - 1] + main.seconds[width(k)] for k in range(1, most + 1)]
    assert costs == pytest.approx(expected)
    assert (main.steps, draft.steps) == ({"sample", "score"}, set() if kind == "ngram" else {"sample_draft"})
    assert main.widths == set(widths) if widths else main.widths >= {2, 16}
    assert main.cache.get_seq_length() == len(PROMPT)  # all behind the prompt: rolled back each time
    assert kind == "ngram" or draft.cache.get_seq_length() == len(PROMPT) - 1

"""The replay: from one pass over a finished text, the rounds that decoding with each K takes, exactly."""

import copy
import functools

import numpy
import pytest
import torch
import transformers
from helpers import VOCABULARY, baseline, bundled, like, make_model, pair_of, prompt_of, speculate, with_more_tokens
from test_recurrent import HYBRIDS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]
KS = (1, 2, 3, 5, 8, 15)
ONES = numpy.ones(sd.LONGEST + 1)  # every round costs 1: rounds are counted
GREEDY = sd.Greedy()


def texts_of(main, draft, *how, prompts=(PROMPT,), new=32, end=()):
    """What to decode; `how`: what else the draft's CachedModel takes."""
    return sd.cached_model(main), sd.ModelDraft(sd.cached_model(draft, *how), GREEDY), prompts, new, end


def with_state(name):
    main = make_model(HYBRIDS[name]())
    return texts_of(main, like(main, 0.06), new=20)


def of_ngrams(family):
    """One prompt holds what the main model says to it, so that they find something."""
    main = sd.CachedModel(pair_of(family, 0.0)[0])
    own = baseline(main, PROMPT, 14).token_ids
    return main, sd.NgramDraft(main.device), ([*PROMPT, *own, *PROMPT], PROMPT * 3), 24, ()


def perfect():
    """The ends of three texts, each in the middle of a run of accepted tokens; and a text of two tokens."""
    main, _ = pair_of("qwen3", 0.0)
    whole = baseline(main, PROMPT, 30).token_ids
    ends = [token for place, token in enumerate(whole) if place > 6 and token not in whole[:place]][:3]
    return [texts_of(main, main, new=2), *(texts_of(main, main, end={end}) for end in ends)]


def other_vocabularies(more):
    """Drafts that know fewer ids than the main model, or more."""
    main, draft = pair_of("llama", 0.02)
    if more:
        return texts_of(main, with_more_tokens(draft), None, VOCABULARY)
    return texts_of(with_more_tokens(main), draft, prompts=([70, 5, 61], PROMPT), new=24)


FAMILIES = {"llama": 0.12, "cohere": 0.1, "bloom": 0.05, "gpt2": 0.1}  # and the noise of their drafts
CASES = {
    "the bundled pair": lambda: [texts_of(*bundled()[:2], prompts=bundled()[2], new=16)],
    **{of: lambda of=of, noise=noise: [texts_of(*pair_of(of, noise))] for of, noise in FAMILIES.items()},
    "past windows": lambda: [texts_of(*pair_of("mistral", 0.05))],
    "n-grams": lambda: map(of_ngrams, ("llama", "gemma2")),
    "a state": lambda: map(with_state, ("mamba2", "qwen3_next")),
    "other vocabularies": lambda: map(other_vocabularies, (True, False)),
    "an end in the middle of a round": perfect,
}


@functools.cache
def measured(case):
    """Of each text the Replay, and the rounds that decoding took with each of KS."""
    texts = []
    for main, draft, prompts, new, end in CASES[case]():
        for tokens in prompts:
            output = baseline(main, tokens, new, end).token_ids
            found = sd.replay(main, draft, GREEDY, prompt_of(tokens, 0, new, end), output)
            texts.append((found, [len(speculate(main, draft, tokens, k, new, end).rounds) for k in KS]))
    return texts


def replayed(found):
    return sd.replayed(found, ONES)[[k - 1 for k in KS]].tolist()


@pytest.mark.parametrize("case", CASES)
def test_replayed_rounds_are_those_that_decoding_takes(case):
    for found, rounds in measured(case):
        assert replayed(found) == pytest.approx(rounds, abs=1e-9)
    assert any(len(set(rounds)) > 1 for _, rounds in measured(case))  # it does depend on K


def test_the_drafts_are_right_now_and_then():
    alphas = [found.chances[:, 0].mean() for case in FAMILIES for found, _ in measured(case)]
    assert 0.15 < min(alphas) < 0.35 and 0.8 < max(alphas) < 1


def simulated(found, prices, k, random, bonus=1):
    """What a text's rounds cost, if what is accepted is drawn; `bonus`: what a wholly accepted one emits besides."""
    place = cost = 0
    while place < len(found.drafted):
        drafted = min(k, found.drafted[place])
        accepted = 0
        while accepted < drafted and random.random() < found.chances[place, accepted]:
            accepted += 1
        cost += prices[drafted]
        place += accepted + (bonus if accepted == drafted > 0 else 1)
    return cost


@pytest.mark.parametrize("case", ["cohere", "gpt2", "the bundled pair"])
def test_a_wrong_replay_is_found_out(case):
    wrong = {"shifted by one position": [], "without the bonus token": []}
    for found, rounds in measured(case):
        shifted = found._replace(chances=numpy.roll(found.chances, 1, axis=0))
        wrong["shifted by one position"].append(replayed(shifted) != rounds)
        counts = {bonus: [simulated(found, ONES, k, numpy.random, bonus) for k in KS] for bonus in (0, 1)}
        wrong["without the bonus token"].append(counts[0] != rounds)
        assert counts[1] == rounds
    assert all(map(any, wrong.values()))


# Sampled.


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampled_rounds_are_on_average_those_replayed(temperature):
    """Of 400 texts, with K = 1 and 4; each text is replayed itself, which leaves chance less room."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=1, n_positions=32)
    config.tie_word_embeddings, config.bos_token_id, config.eos_token_id = False, 0, 0
    model, sampler = transformers.GPT2LMHeadModel(config).eval(), sd.Sampling(temperature, top_k=6)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.7)
    main, draft = sd.CachedModel(model), sd.ModelDraft(sd.CachedModel(like(model, 0.4)), sampler)
    rounds, expected, alphas = [], [], []
    for number in range(400):
        k = (1, 4)[number % 2]
        run = speculate(main, draft, [1], k, 6, sampler=sampler, number=number)
        found = sd.replay(main, draft, sampler, prompt_of([1], number, 6), run.token_ids)
        rounds.append(len(run.rounds))
        expected.append(sd.replayed(found, ONES)[k - 1])
        alphas.append(found.chances[:, 0].mean())
    assert 0.4 < numpy.mean(alphas) < 0.8
    differences = numpy.array(rounds) - expected
    for each in (differences, differences[::2], differences[1::2]):
        assert abs(each.mean()) < 3 * each.std() / len(each) ** 0.5


def test_a_draft_that_is_not_finite_is_never_right():
    main, draft = pair_of("llama", 0.05)
    draft, sampler = copy.deepcopy(draft).requires_grad_(False), sd.Sampling(0.05)
    draft.get_output_embeddings().weight.fill_(numpy.nan)
    run = speculate(main, draft, PROMPT, 3, 12, sampler=sampler)
    helper = sd.ModelDraft(sd.CachedModel(draft), sampler)
    found = sd.replay(sd.CachedModel(main), helper, sampler, prompt_of(PROMPT), run.token_ids)
    assert len(run.rounds) == 11 and sd.replayed(found, ONES).tolist() == [11.0] * sd.LONGEST


# The recursions.


def some_replay(random, places=24):
    """Any chances, and fewer draft tokens than LONGEST at some places, as n-grams have."""
    drafted = random.integers(0, sd.LONGEST + 1, places)
    chances = random.random((places, sd.LONGEST)) ** 0.5
    for place in range(places):
        chances[place, min(drafted[place], places - place) :] = 0
    return sd.Replay(chances, drafted)


PRICES = numpy.array([1.0, *(1.3 + 0.2 * k + (k > 4) for k in range(sd.LONGEST))])


def test_the_recursion_against_a_simulation_that_draws():
    random = numpy.random.default_rng(0)
    found = some_replay(random)
    expected = sd.replayed(found, PRICES)
    assert sd.replayed(found, PRICES[:4]) == pytest.approx(expected[:3])  # no further than there are prices
    for k in (1, 3, 8, 15):
        costs = [simulated(found, PRICES, k, random) for _ in range(2000)]
        assert abs(numpy.mean(costs) - expected[k - 1]) < 3 * numpy.std(costs) / 2000**0.5


def test_the_oracle_drafts_what_is_right_as_far_as_it_pays():
    @functools.cache
    def cost_from(place):
        if place >= len(found.drafted):
            return 0.0
        total, chance = 0.0, 1.0
        for right, further in enumerate([*found.chances[place], 0.0]):  # so many tokens, and no more, are right
            cheapest = min(PRICES[drafted] + cost_from(place + drafted + 1) for drafted in range(right + 1))
            total += chance * (1 - further) * cheapest
            chance *= further
        return total

    for seed in range(3):
        found = some_replay(numpy.random.default_rng(seed))
        cost_from.cache_clear()
        assert sd.oracle_cost(found, PRICES) == pytest.approx(cost_from(0))
    for case in ("llama", "n-grams", "a state"):
        for found, _ in measured(case):
            assert 0 < sd.oracle_cost(found, PRICES) <= min([*sd.replayed(found, PRICES), len(found.drafted)])


# Long texts.


class Rows(TorchDispatchMode):
    """Notes the most tokens of which there is a tensor over the vocabulary."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for each in tree_leaves(output):
            if isinstance(each, torch.Tensor) and each.shape[-1:] == (VOCABULARY,):
                self.most = max(self.most, each.shape[:-1].numel())
        return output


@pytest.mark.parametrize("sampler", [GREEDY, sd.Sampling(0.05, top_k=20)], ids=["greedy", "sampled"])
def test_a_long_text_is_replayed_in_slices(sampler, monkeypatch):
    main, draft, *_ = texts_of(*pair_of("llama", 0.05))
    output = tuple((7 * i * i + 3 * i) % VOCABULARY for i in range(1100))
    chances, most = [], []
    for tokens in (sd.SLICE, 2000):  # and all at once
        monkeypatch.setattr(sd, "SLICE", tokens)
        with Rows() as rows:
            chances.append(sd.replay(main, draft, sampler, prompt_of(PROMPT), output).chances)
        most.append(rows.most)
    assert most == [512, 1099]
    assert numpy.allclose(*chances, atol=1e-3) and 0 < chances[0].mean() < 1

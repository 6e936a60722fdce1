"""Every figure, computed anew from the JSON: from token ids, rounds, times and replays, made up or of a real run."""

import dataclasses
import json
import re
from collections import Counter

import numpy
import pytest
import torch
import transformers
from helpers import ROOT, SHAPE, generation_of, ids_of, like, make_model, prompt_of

import speculative_decoding as sd

MAIN, DRAFT = ROOT / "tests/tiny_gemma2/main", ROOT / "tests/tiny_gemma2/draft"
PROMPT = [5, 9, 13, 2, 40]
COSTS = (0.1, 0.125, 0.15, 0.2, 0.3)
TTFT, TPOT = "time_to_first_token_s", "time_per_output_token_s"
FIELDS = [field.name for field in dataclasses.fields(sd.Figures)]


def agree(actual, expected, where=""):
    """Assert that figures are the same: exact counts and None, and floats up to rounding."""
    if isinstance(expected, dict | list | tuple):
        assert len(actual) == len(expected), where
        for key, value in expected.items() if isinstance(expected, dict) else enumerate(expected):
            agree(actual[key], value, f"{where} {key}")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-9), where
    else:
        assert actual == expected and type(actual) is type(expected), where


# All figures anew, with their names: these functions are the one place for them. `outcomes`: of the JSON. What was
# measured and stands nowhere else is taken from a prompt's figures: the time to the first token, the log-likelihood.


def ratio(a, b):
    return None if a is None or not b else a / b


def gain(a, b):
    return None if a is None or not b else 100 * (a / b - 1)


def speed_anew(outcomes):
    """Of repeats of as many tokens, the median counts; of an even number, the faster of the middle two."""
    tokens, n = sum(len(did["token_ids"]) for did in outcomes), len(outcomes)
    seconds = sum(sorted(did["latencies_s"])[(len(did["latencies_s"]) - 1) // 2] for did in outcomes)
    firsts = [did["figures"][TTFT] for did in outcomes]
    first_s = None if None in firsts else sum(firsts)
    return {
        "prompts": n,
        "new_tokens": tokens,
        "latency_s": seconds / n,
        "tokens_per_s": tokens / seconds,
        TTFT: ratio(first_s, n),
        TPOT: None if first_s is None else ratio(seconds - first_s, tokens - n),
        **dict.fromkeys(("identical", "ties", "mismatches", "unchecked"), 0),
        **Counter({"tie": "ties", "mismatch": "mismatches"}.get(did["verdict"], did["verdict"]) for did in outcomes),
    }


def acceptance_anew(outcomes):
    """What became of the draft tokens, by walking through each round token by token."""
    tested, passed, k_of, each = Counter(), Counter(), [], [did["rounds"] for did in outcomes]
    for k, n in [pair for of in each for pair in zip(of["drafted"], of["accepted"], strict=True)]:
        assert 0 <= n <= k
        k_of.append(k)
        for place in range(min(n + 1, k)):
            tested[place] += 1
            passed[place] += place < n
    accepted, places, drafting = passed.total(), range(max(k_of, default=0)), sum(k > 0 for k in k_of)
    log_likelihood = sum(did["figures"]["log_likelihood"] for did in outcomes)
    return {
        "rounds": len(k_of),
        "drafted": sum(k_of),
        "accepted": accepted,
        "acceptance_rate": ratio(accepted, sum(k_of)),
        "alpha": ratio(accepted, tested.total()),
        "mean_acceptance_length": ratio(sum(len(did["token_ids"]) - 1 for did in outcomes), len(k_of)),
        "acceptance_by_position": {
            "joint": [passed[place] / drafting for place in places],
            "conditional": [ratio(passed[place], tested[place]) for place in places],
        },
        "log_likelihood": float(log_likelihood),
        "log_likelihood_per_token": ratio(log_likelihood, sum(k_of)),
    }


def comparison_anew(own, ours):
    """How the two compare, over the same prompts."""
    before, after, count = speed_anew(own), speed_anew(ours), len(own)
    rates = [[speed_anew([did])["tokens_per_s"] for did in outcomes] for outcomes in (ours, own)]
    gains, low_high = list(map(gain, *rates)), None
    if count >= 10:
        samples = numpy.random.default_rng(0).integers(count, size=(2000, count))
        sides = [
            [speed_anew([side[place] for place in each])["tokens_per_s"] for each in samples] for side in (ours, own)
        ]
        low_high = numpy.percentile(list(map(gain, *sides)), [2.5, 97.5]).tolist()
    rounds = [each for did in ours for each in zip(*did["rounds"].values(), strict=True) if each[0]]
    drafted, _, draft_s, verify_s, _ = zip(*rounds, strict=True) if rounds else [[None]] * 5
    costs = None, None
    if None not in draft_s:
        costs = ratio(sum(draft_s) / sum(drafted), before[TPOT]), ratio(sum(verify_s) / len(rounds), before[TPOT])
    return {
        "speedup_percent": gain(after["tokens_per_s"], before["tokens_per_s"]),
        "decode_speedup_percent": gain(before[TPOT], after[TPOT]),
        "speedup_range_percent": [min(gains), max(gains)],
        "speedup_interval_percent": low_high,
        "draft_cost": costs[0],
        "verify_cost": costs[1],
    }


def predicted_anew(told, prompts, method):
    """The steps of the baseline, by the rounds of a fixed K that the replay says there would be."""
    name, k = method["draft"], method["draft_tokens"]
    costs = next(draft["costs"] for draft in told["drafts"] if draft["draft"] == name)
    if k == "auto" or k >= len(costs):
        return None
    replayed = [prompt for prompt in prompts if name in prompt["replays"]]
    steps = sum(len(prompt["outcomes"]["baseline"]["token_ids"]) - 1 for prompt in replayed)
    return gain(steps * costs[0], sum(prompt["replays"][name][k - 1] for prompt in replayed) * costs[k])


def figures_anew(told, prompts, method, step_bytes):
    """Every figure of a method over some prompts of the JSON: over those that the baseline decoded, too, if any."""
    label, is_ours = method["label"], method["draft"] and not method["library"]
    done = [prompt for prompt in prompts if not prompt["outcomes"][label]["error"]]
    paired = [prompt for prompt in done if not prompt["outcomes"]["baseline"]["error"]]
    ours, own = ([prompt["outcomes"][of] for prompt in paired or done] for of in (label, "baseline"))
    if not ours:
        return None
    anew = dict.fromkeys(FIELDS) | speed_anew(ours)
    anew["identical"] = None if anew.pop("sampled", None) else anew["identical"]
    if is_ours:
        anew |= acceptance_anew(ours)
    if label == "baseline":
        anew["weight_bandwidth_gb_s"] = ratio(step_bytes / 1e9, anew[TPOT])
    elif paired:
        anew |= comparison_anew(own, ours)
        anew["predicted_speedup_percent"] = predicted_anew(told, paired, method) if is_ours else None
    assert set(anew) == set(FIELDS)
    return anew


def check_all_figures(told, step_bytes):
    """Of each prompt alone, of each category, and of all."""
    for method in told["methods"]:
        rows = [(told["prompts"], method["summary"])]
        rows += [([prompt], prompt["outcomes"][method["label"]]["figures"]) for prompt in told["prompts"]]
        for name, row in method["categories"].items():
            rows.append(([prompt for prompt in told["prompts"] if prompt["category"] == name], row))
        for prompts, found in rows:
            agree(found, figures_anew(told, prompts, method, step_bytes), method["label"])


def cost_anew(replay, prices, k=None):
    """What a text costs with rounds of K; None: of one who knows how many are right, and drafts the best of up to that.

    Over all that can happen, weighted by its chance, from the end of the text.
    """
    behind = [0.0] * (len(replay.drafted) + 20)
    for place in reversed(range(len(replay.drafted))):
        chance, options, last = 1.0, [], len(prices) - 1 if k is None else k
        for m in range(last + 1):  # exactly m are accepted, or right
            goes_on = replay.chances[place][m] if m < last else 0.0
            options.append(prices[m] + behind[place + m + 1])
            cost = min(options) if k is None else prices[min(k, replay.drafted[place])] + behind[place + m + 1]
            behind[place] += chance * (1 - goes_on) * cost
            chance *= goes_on
    return behind[0]


def draft_figures_anew(name, costs, replays):
    """All that DraftFigures has, from replays of texts; a text of n tokens was n - 1 steps."""
    steps_s, rows = sum(len(replay.drafted) for replay in replays) * costs[0], []
    seconds = [sum(cost_anew(replay, costs, k) for replay in replays) for k in range(1, len(costs))]
    for k, cost in enumerate(seconds, 1):
        rounds = sum(cost_anew(replay, [1.0] * len(costs), k) for replay in replays)
        lengths = {"draft_tokens": k, "mean_acceptance_length": steps_s / costs[0] / rounds}
        rows.append(lengths | {"speedup_percent": gain(steps_s, cost)})
    firsts = [row[0] for replay in replays for row, count in zip(replay.chances, replay.drafted, strict=True) if count]
    return {
        "draft": name,
        "costs": costs,
        "alpha": ratio(float(sum(firsts)), len(firsts)),
        "best_draft_tokens": 1 + seconds.index(min(seconds)),
        "oracle_speedup_percent": gain(steps_s, sum(cost_anew(replay, costs) for replay in replays)),
        "by_draft_tokens": rows,
        "error": None,
    }


def model_replay(right):
    """The replay of a draft model whose token has these chances, behind each token of a text."""
    behind = [*right, *[0.0] * sd.LONGEST]
    rows = [behind[place : place + sd.LONGEST] for place in range(len(right))]
    return sd.Replay(numpy.array(rows), numpy.full(len(right), sd.LONGEST))


# Made-up records


def outcome(*runs, verdict="identical", error=None):
    return sd.Outcome(error, tuple(runs), "", None if error else verdict)


CONTENDER, OTHER = sd.Contender("D", None, COSTS), sd.Contender("E", None, COSTS[:3])
FAILED = outcome(error="CUDA out of memory.")


def results_of(own, ours, k=3, library=None, replays=()):
    """Of the baseline and another method, from their outcomes, in the order of the prompts."""
    methods = sd.Method("baseline", None, step_bytes=2 * 10**9), sd.Method("K", None, CONTENDER, k, library)
    prompts = []
    for number, (before, after) in enumerate(zip(own, ours, strict=True)):
        replay = {"D": replays[number]} if number < len(replays) else {}
        prompts.append(sd.Result(prompt_of([1], number + 1), {"baseline": before, "K": after}, replay))
    return sd.Results({}, sd.Settings(), methods, (CONTENDER,), tuple(prompts), True)


def figures(own, ours, k=3, **how):
    """The figures of both, which are what the records in the JSON say."""
    results = results_of(own, ours, k, **how)
    check_all_figures(json.loads(sd.to_json(results)), 2 * 10**9)
    return tuple(sd.figures_of(results.prompts, method) for method in results.methods)


def random_outcome(random, repeats, method):
    """Some failed; the others have rounds, if the method is ours, whatever was accepted; with 4 repeats they sample."""
    if random.uniform() < 0.2:
        return FAILED
    tokens, runs = int(random.integers(1, 30)), []
    for latency_s in random.uniform(0.5, 2.0, size=repeats):
        lengths = random.integers(5, size=random.integers(1, 9)) if method.draft and not method.library else ()
        rounds = [(int(k), int(random.integers(k + 1)), *random.uniform(0.01, 0.1, size=3)) for k in lengths]
        first_s = None if method.library else latency_s / 10
        runs.append(generation_of(range(tokens), latency_s, first_s, rounds, -random.uniform(1, 9)))
    verdicts = ["sampled"] if repeats == 4 else ["identical", "tie", "mismatch", "unchecked"]
    return outcome(*runs, verdict=str(random.choice(verdicts)))


@pytest.mark.parametrize("seed", range(9))
def test_every_figure_of_random_records(seed):
    """1 to 4 repeats, failures of all methods at some prompts, categories, texts that were replayed and others."""
    random, made = numpy.random.default_rng(seed), []
    methods = [sd.Method("baseline", None, step_bytes=10**9)]
    for of, k in ((CONTENDER, 2), (CONTENDER, "auto"), (OTHER, 1), (OTHER, 3)):
        methods.append(sd.Method(f"{of.name} {k}", None, of, k))
    methods += [sd.Method("generate()", None, library="alone"), sd.Method("assist", None, CONTENDER, 2, "assisted")]
    for number in range([1, 5, 14][seed % 3]):
        outcomes = {method.label: random_outcome(random, 1 + seed % 4, method) for method in methods}
        own, replays = outcomes["baseline"], {}
        for name in "DE":
            if not own.error and len(own.run.token_ids) > 1 and random.uniform() < 0.8:
                replays[name] = model_replay(random.uniform(0, 1, size=len(own.run.token_ids) - 1))
        question = sd.Question("?", number, ids=(1,), category=str(random.choice(["a", "b"])))
        made.append(sd.Result(question, outcomes, replays))
    results = sd.Results({}, sd.Settings(), tuple(methods), (CONTENDER, OTHER), tuple(made), True)
    told = json.loads(sd.to_json(results))
    check_all_figures(told, 10**9)
    for contender, found in zip((CONTENDER, OTHER), told["drafts"], strict=True):
        if replays := [each.replays[contender.name] for each in made if contender.name in each.replays]:
            agree(found, draft_figures_anew(contender.name, contender.costs, replays))


def test_figures_by_hand():
    """As plain numbers, so that nothing is right by the functions above alone."""
    own = [outcome(generation_of(range(21), 2.5, 0.5)), outcome(generation_of(range(11), 1.5, 0.5))]
    first = generation_of(range(21), 1.25, 0.5, [(3, 3, 0.06, 0.11, 0.19)] * 5, -3.0)
    second = generation_of(range(11), 1.75, 0.5, [(3, 0, 0.06, 0.11, 0.175)] * 10, -3.0)
    replays = [model_replay([1.0, 1.0, 1.0, 0.0] * 5), model_replay([0.0] * 10)]
    before, after = figures(own, [outcome(first), outcome(second, verdict="tie")], replays=replays)
    # For 32 tokens the baseline takes 4 s, 3 of them for 30 steps; this took 3 s, 2 of them for 30 tokens.
    assert (before.tokens_per_s, before.weight_bandwidth_gb_s) == pytest.approx((8.0, 20.0))
    assert (after.speedup_percent, after.decode_speedup_percent) == pytest.approx((100 / 3, 50.0))
    # 15 rounds; 15 accepted of 45 drafted and of 5 · 3 + 10 · 1 tested; 20 + 10 tokens behind the first.
    assert (after.acceptance_rate, after.alpha, after.mean_acceptance_length) == pytest.approx((1 / 3, 0.6, 2.0))
    agree(after.acceptance_by_position, {"joint": [1 / 3] * 3, "conditional": [1 / 3, 1.0, 1.0]})
    # A baseline step takes 0.1 s, a draft step 0.9 s / 45, a verify pass 1.65 s / 15.
    assert (after.draft_cost, after.verify_cost) == pytest.approx((0.2, 1.1))
    # Replayed, 30 steps of 0.1 s become 5 + 10 rounds of 0.2 s.
    assert after.predicted_speedup_percent == pytest.approx(0.0)
    assert (after.identical, after.ties, after.log_likelihood) == (1, 1, -6.0)


@pytest.mark.parametrize(("digits", "counts"), [("75", 1), ("726", 2), ("5291", 1), ("95817", 4)])
def test_every_figure_of_a_prompt_is_that_of_one_run(digits, counts):
    """The median by the time per token; of an even number, the faster of the middle two. Nothing is of another run."""
    runs = []
    for place, digit in enumerate(map(int, digits)):
        rounds = [(3, place % 4, 0.01 * (place + 1), 0.02, 0.5)] * (place + 1)
        runs.append(generation_of(range(5 + place), digit * (5 + place), digit / 9 + place, rounds, -1.0 - place))
    several, alone, run = outcome(*runs), outcome(runs[counts]), runs[counts]
    assert several.run is run
    found, *others = (
        sd.prompt_figures(results.prompts[0], method)
        for results in (results_of([a], [b]) for a, b in ((several, several), (several, alone), (alone, several)))
        for method in results.methods[1:]
    )
    assert others == [found] * 2 and found.speedup_percent == 0
    assert found.time_per_output_token_s == pytest.approx((run.latency_s - run.first_token_s) / (4 + counts), rel=1e-12)
    told = json.loads(sd.to_json(results_of([several], [several])))["prompts"][0]["outcomes"]["K"]
    assert told["latencies_s"] == [run.latency_s for run in runs] and told["token_ids"] == list(run.token_ids)
    columns = [[each[at] for each in run.rounds] for at in range(5)]
    assert told["rounds"] == dict(zip("drafted accepted draft_s verify_s seconds".split(), columns, strict=True))


def test_all_figures_of_a_method_are_of_the_same_prompts():
    """Of those that the baseline decoded, too: α and lengths as well as c and v. Without any baseline, of its own."""
    slow = generation_of(range(11), 0.5, 0.1, [(3, 1, 0.05, 0.1, 0.2)] * 5, -2.0)
    fast = generation_of(range(31), 0.25, 0.1, [(4, 4, 0.01, 0.02, 0.03)] * 6, -1.0)
    own = [FAILED, outcome(generation_of(range(11), 1.1, 0.1))]
    before, after = figures(own[:1], [outcome(slow)])
    assert before is None and (after.tokens_per_s, after.speedup_percent, after.draft_cost) == (22.0, None, None)
    before, after = figures(own, [outcome(fast), outcome(slow)])
    assert after.prompts == 1 and figures(own[1:], [outcome(slow)]) == (before, after)  # nothing is of the other prompt
    assert figures(own[1:], [sd.Outcome("CUDA out of memory.", (slow,))])[1] is None  # it failed in a repeat


OF_COSTS = "draft_cost verify_cost predicted_speedup_percent"
OF_TOKENS = f"acceptance_rate alpha log_likelihood_per_token {OF_COSTS}"
OF_MORE = f"{TPOT} decode_speedup_percent mean_acceptance_length {OF_TOKENS}"


@pytest.mark.parametrize(
    ("k", "tokens", "rounds", "unknown"),
    [
        pytest.param(3, 1, [], OF_MORE, id="one token, and no round"),
        pytest.param(3, 4, [(0, 0, 0.0, 0.1, 0.2)] * 3, OF_TOKENS, id="nothing drafted"),
        pytest.param("auto", 4, [(0, 0, 0.0, 0.1, 0.2)] * 3, OF_TOKENS, id="auto drafted nothing"),
        pytest.param(3, 9, [(3, 1, None, None, 0.2)] * 4, OF_COSTS, id="a clock that cannot tell parts apart"),
    ],
)
def test_what_cannot_be_had_is_none_and_never_made_up(k, tokens, rounds, unknown):
    own, ours = generation_of(range(tokens), 1.8, 0.2), generation_of(range(tokens), 1.0, 0.2, rounds, -2.0)
    _, after = figures([outcome(own)], [outcome(ours)], k)
    of_others = {"speedup_interval_percent", "weight_bandwidth_gb_s"}
    assert {name for name in FIELDS if getattr(after, name) is None} == {*unknown.split(), *of_others}


def test_a_round_on_a_device_with_a_clock_of_the_host_only():
    assert sd.timed_round(torch.device("mps"), 3, 1, 1.0, 2.0, 4.0, 8.0) == sd.Round(3, 1, None, None, 7.0)
    assert sd.timed_round(torch.device("cpu"), 3, 1, 1.0, 2.0, 4.0, 8.0) == sd.Round(3, 1, 1.0, 2.0, 7.0)


# The interval


def interval(own, ours):
    """`own`, `ours`: the latencies of each prompt's repeats."""
    sides = ([outcome(*(generation_of(range(100), each, 0.1) for each in of)) for of in side] for side in (own, ours))
    return figures(*sides)[1].speedup_interval_percent


def test_the_interval_covers_the_spread_of_the_prompts_and_nothing_else():
    assert interval([[2.0]] * 10, [[1.0]] * 10) == pytest.approx([100.0, 100.0])
    # Prompts that gain 100 % and 300 %, five of each: of ten drawn anew, m are of the second kind, and all gain
    # 100 + 20 m %. m has a binomial distribution, in which 2.5 % lie below 2, and as many above 8: 140 to 260 %.
    found = interval([[2.0], [4.0]] * 5, [[1.0]] * 10)
    assert found == pytest.approx([140.0, 260.0])
    # Repeats, however they vary, are not drawn anew: each prompt has its median.
    assert interval([[1.0, 2.0, 9.0], [3.0, 4.0, 4.5]] * 5, [[0.1, 1.0, 1.5]] * 10) == found
    assert interval([[2.0], [4.0], [4.0]] * 3, [[1.0]] * 9) is None  # of fewer than ten none is claimed


# What replays say


def test_what_a_draft_would_do_by_hand():
    """Ten new tokens behind the first; the draft is wrong at the fourth and at the eighth of them."""
    replay = model_replay([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    own = outcome(generation_of(range(11), 1.1, 0.1))
    found = sd.draft_figures(results_of([own] * 2, [own] * 2, replays=[replay]).prompts, CONTENDER)
    agree(dataclasses.asdict(found), draft_figures_anew("D", COSTS, [replay]))  # of the prompt that was replayed
    assert found.alpha == 0.8 and found.best_draft_tokens == 3
    lengths = [row["mean_acceptance_length"] for row in found.by_draft_tokens]
    assert lengths == pytest.approx([10 / 5, 10 / 5, 10 / 3, 10 / 3])  # with K = 2: 1 2 3, 4, 5 6 7, 8, 9 10
    gains = [row["speedup_percent"] for row in found.by_draft_tokens]
    assert gains == pytest.approx([gain(1.0, seconds) for seconds in (0.125 * 5, 0.15 * 5, 0.2 * 3, 0.3 * 3)])
    # It knows: two rounds of three right ones, then one of one; behind the tenth token, none is needed.
    assert found.oracle_speedup_percent == pytest.approx(gain(1.0, 0.2 + 0.2 + 0.125))


def test_of_n_grams_a_round_costs_what_it_can_draft():
    """At some places they know nothing to draft, or less than K."""
    random, own = numpy.random.default_rng(3), outcome(generation_of(range(13), 1.1, 0.1))
    drafted = random.integers(0, 6, size=12)
    chances = numpy.array([[float(m < n) * random.integers(2) for m in range(sd.LONGEST)] for n in drafted])
    for replay in (sd.Replay(chances, drafted), sd.Replay(0 * chances, 0 * drafted)):
        found = sd.draft_figures(results_of([own], [own], replays=[replay]).prompts, CONTENDER)
        agree(dataclasses.asdict(found), draft_figures_anew("D", COSTS, [replay]))
    assert found.alpha is None and found.oracle_speedup_percent == pytest.approx(0)  # each round is a step
    for contender in (CONTENDER, sd.Contender("G", None, error="cannot load G")):  # nothing of theirs was replayed
        found = sd.draft_figures(results_of([own], [own]).prompts, contender)
        assert found == sd.DraftFigures(contender.name, contender.costs, error=contender.error)


# What a step reads


@pytest.mark.parametrize("which", ["untied", "tied", "with a vision tower", "with embeddings of its layers"])
def test_a_step_reads_the_layers_and_the_head_and_no_embedding_that_is_only_looked_up(which):
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes = {"vision_config": eyes | {"image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 1}
    gemma3n = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "head_dim": 8}
    gemma3n |= {"num_hidden_layers": 5, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 5}
    config, unread, count = {  # the names of weights that are not read, and how many there are
        "untied": (transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False), "embed_tokens", 1),
        "tied": (transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True), "nothing", 0),
        "with a vision tower": (transformers.Gemma3Config(text_config=SHAPE, **eyes), "vision_tower|projector", 34),
        "with embeddings of its layers": (transformers.Gemma3nTextConfig(**SHAPE | gemma3n), "tokens_per_layer", 1),
    }[which]
    model = transformers.AutoModelForCausalLM.from_config(config)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    left_out = [size for name, size in sizes.items() if re.search(unread, name)]
    read = sum(sizes.values()) - sum(left_out)
    assert len(left_out) == count
    assert (sd.bytes_per_step(model.float()), sd.bytes_per_step(model.bfloat16())) == (4 * read, 2 * read)


def test_it_is_not_known_of_experts_and_of_weights_on_several_devices(llama):
    assert sd.bytes_per_step(make_model("mixtral")) is sd.bytes_per_step(make_model("gpt_oss")) is None
    spread = like(llama, 0)
    for places, is_known in (({"": 0}, True), ({"model": 0, "lm_head": "cpu"}, False), ({"a": "disk", "b": 0}, False)):
        spread.hf_device_map = places
        assert (sd.bytes_per_step(spread) is not None) is is_known


# A real run


@pytest.fixture(scope="module")
def bundled():
    """Main and draft model, without any cache of this project."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return [load(folder, dtype=torch.float32).eval() for folder in (MAIN, DRAFT)]


def test_every_figure_of_a_real_run(demo, bundled):
    """No figure of the JSON is left out here. And the rounds fit into the text and its time."""
    _, told = demo
    weights = sum(weight.numel() for weight in bundled[0].parameters())  # the head is the embedding: it is all read
    check_all_figures(told, 4 * weights)
    for label, drafted in (("K = 3", {3}), ("K = auto", set(range(16)))):
        for prompt in told["prompts"]:
            did, own = (prompt["outcomes"][of] for of in (label, "baseline"))
            assert did["token_ids"] == own["token_ids"] and 0 < own["figures"][TTFT] < own["figures"]["latency_s"]
            assert set(did["rounds"]["drafted"]) <= drafted
            yielded = [accepted + 1 for accepted in did["rounds"]["accepted"]]
            assert 1 + sum(yielded[:-1]) < len(did["token_ids"]) <= 1 + sum(yielded)
            assert sum(did["rounds"]["seconds"]) < did["figures"]["latency_s"] - did["figures"][TTFT]
            for _, _, draft_s, verify_s, seconds in zip(*did["rounds"].values(), strict=True):
                assert 0 < draft_s < draft_s + verify_s < seconds


def test_the_replay_of_a_real_run(demo, bundled):
    """Greedily the draft's token is right or wrong: by a pass of it over each text. K = 3 really took so many."""
    _, told = demo
    (found,), replays, tokenizer = told["drafts"], [], transformers.AutoTokenizer.from_pretrained(MAIN)
    for prompt in told["prompts"]:
        start, output = prompt["prompt_tokens"], prompt["outcomes"]["baseline"]["token_ids"]
        message = [{"role": "user", "content": prompt["prompt"]}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = ids_of([*tokenizer(text, add_special_tokens=False)["input_ids"], *output])
        with torch.inference_mode():
            choices = bundled[1](ids, use_cache=False).logits[0, start:-1].argmax(dim=-1).tolist()
        replays.append(model_replay([float(own == drafted) for own, drafted in zip(output[1:], choices, strict=True)]))
        rounds = [cost_anew(replays[-1], [1.0] * 16, k) for k in range(1, sd.LONGEST + 1)]
        agree(prompt["replays"], {found["draft"]: rounds})
        assert rounds[2] == prompt["outcomes"]["K = 3"]["figures"]["rounds"]
    agree(found, draft_figures_anew(told["settings"]["draft"][0], found["costs"], replays))
    assert len(found["costs"]) == sd.LONGEST + 1 and min(found["costs"]) > 0
    predicted = told["methods"][1]["summary"]["predicted_speedup_percent"]
    assert predicted == pytest.approx(found["by_draft_tokens"][2]["speedup_percent"])

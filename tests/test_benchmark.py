"""The benchmark: who is measured when, what a failure costs, what outputs are judged to be, and what is compared."""

import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import types
import weakref

import pytest
import torch
import transformers
from helpers import ROOT, baseline, counts_of, generation_of, ids_of, like, make_model, prompt_of, speculate
from rich.console import Console

import speculative_decoding as sd

MAIN = ROOT / "tests/tiny_gemma2/main"
PROMPT = [5, 9, 13, 2, 40]
CPU = torch.device("cpu")
COSTS = tuple(1.0 + k / 10 for k in range(16))
NGRAMS, GONE = sd.Contender("ngram", sd.NgramDraft(CPU), COSTS), sd.Contender("gone", None, error="it is gone")
OUT_OF_MEMORY = "CUDA out of memory."


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MAIN)


def settings(**given):
    return sd.Settings(**{"main": "M", "draft": ("D",), "draft_tokens": (3, "auto"), "warmup": 0} | given)


def contender(model, name="D", **fields):
    return sd.Contender(name, sd.ModelDraft(sd.CachedModel(model), sd.Greedy()), COSTS, **fields)


def models_of(main, *contenders, sampler=None, tokenizer=None):
    main = main if isinstance(main, sd.CachedModel) else sd.CachedModel(main)
    return sd.Models(main, contenders, sampler or sd.Greedy(), tokenizer)


def measured(questions, methods, models, announce=lambda *_: None, **given):
    return list(sd.benchmark(questions, methods, models, settings(**given), announce))


def autoregressive(model, new, label="baseline"):
    return sd.Method(label, lambda prompt: baseline(model, prompt.ids, new))


# Who is measured when


def test_methods_take_turns_and_each_is_warmed_up_before_its_first_run(llama, tokenizer):
    other = sd.Method("other", lambda prompt: speculate(llama, llama, prompt.ids, 2, 3), draft_tokens=2)
    methods, models = [autoregressive(llama, 3), other], models_of(llama, tokenizer=tokenizer)
    order, questions = [], [prompt_of(PROMPT, 1, 3), prompt_of([4], 2, 3)]
    announce = lambda question, what: order.append((question.number, what))  # noqa: E731
    results = measured(questions, methods, models, announce, repeats=3, warmup=2)
    (b, o), warm = ("baseline", "other"), ("warm-up, baseline", "warm-up, other")
    assert [what for _, what in order[:6]] == [warm[0], warm[0], b, warm[1], warm[1], o]
    runs = [(number, what) for number, what in order if what not in warm]
    assert len(runs) == len(order) - 4
    assert [what for number, what in runs if number == 1] == [b, o, o, b, b, o]
    assert [what for number, what in runs if number == 2] == [o, b, b, o, o, b]
    for result, question in zip(results, questions, strict=True):
        expected = baseline(llama, question.ids, 3).token_ids
        assert result.question is question and list(result.outcomes) == [b, o]
        for outcome in result.outcomes.values():
            assert [run.token_ids for run in outcome.runs] == [expected] * 3 and outcome.verdict == "identical"
            assert outcome.text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_method_is_first_equally_often(count):
    methods = list(range(count))
    for repeats in (1, 3):
        orders = [list(sd.in_turns(methods, repeats, number)) for number in range(12 * count)]
        rounds = [order[at : at + count] for order in orders for at in range(0, count * repeats, count)]
        assert all(sorted(each) == methods for each in rounds)
        firsts = [each[0] for each in rounds]
        assert {firsts.count(method) for method in methods} == {len(rounds) / count}


def test_the_first_token_and_the_last_are_timed(llama, monkeypatch):
    """By a clock of the test's own, which goes on by one second whenever it is read."""
    seconds = itertools.count(100.0)
    monkeypatch.setattr(sd, "time", types.SimpleNamespace(perf_counter=lambda: next(seconds)))
    own = baseline(llama, PROMPT, 4)
    assert (own.first_token_s, own.latency_s) == (1.0, 2.0)  # it is read three times
    ours = speculate(llama, llama, PROMPT, 2, 7)
    assert counts_of(ours) == [(2, 2), (2, 2)]
    # Start, first token; of each round begun, drafted, verified, finished; the end.
    assert (ours.first_token_s, ours.latency_s) == (1.0, 10.0)
    assert ours.rounds == (sd.Round(2, 2, 1.0, 1.0, 3.0),) * 2


# What a failure costs


def failing(model, when=lambda ids: True):
    """The model, which runs out of memory where `when` says so of the ids that it is to read."""

    def out_of_memory(module, arguments):
        if when(arguments[0]):
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    model.get_input_embeddings().register_forward_pre_hook(out_of_memory)
    return model


class Failing:
    """A pair whose main model runs out of memory in the verify passes of K = 3, in one chosen run of it."""

    def __init__(self, *fails_at):
        self.announced, self.fails_at, model = [], fails_at, make_model("llama")
        draft = contender(like(model, 0.05))
        self.models = models_of(failing(model, lambda ids: ids.shape[1] == 4 and self.fails()), draft)
        self.questions = [prompt_of(PROMPT, 1, 12), prompt_of([4, 8], 2, 12), prompt_of([17], 3, 12)]
        self.methods = sd.our_methods(self.models, settings(), ())

    def fails(self):
        """Whether what was announced last is what shall fail: a prompt's number, the method, and which of its runs."""
        return bool(self.announced) and (*self.announced[-1], self.announced.count(self.announced[-1])) == self.fails_at

    def run(self, **given):
        announce = lambda question, what: self.announced.append((question.number, what))  # noqa: E731
        return measured(self.questions, self.methods, self.models, announce, **given)


def test_a_method_that_fails_costs_its_own_outcome_only():
    pair = Failing(2, "K = 3", 1)
    results = pair.run()
    assert [result.outcomes["K = 3"].error for result in results] == [None, OUT_OF_MEMORY, None]
    assert results[1].outcomes["K = 3"] == sd.Outcome(OUT_OF_MEMORY)
    for result in results:
        expected = result.outcomes["baseline"].run.token_ids
        assert len(expected) == 12 and result.outcomes["K = auto"].run.token_ids == expected
        assert result.outcomes["K = 3"].error or result.outcomes["K = 3"].run.token_ids == expected
    fixed, auto = (sd.figures_of(results, method) for method in pair.methods[1:])
    assert (fixed.prompts, fixed.identical, auto.prompts, auto.identical) == (2, 2, 3, 3)


def test_a_method_that_fails_in_a_repeat_is_not_run_again():
    pair = Failing(2, "K = 3", 2)
    results = pair.run(repeats=3)
    outcomes = [result.outcomes["K = 3"] for result in results]
    assert [len(outcome.runs) for outcome in outcomes] == [3, 1, 3] and outcomes[1].verdict is None
    assert [outcome.error for outcome in outcomes] == [None, OUT_OF_MEMORY, None]
    assert pair.announced.count((2, "K = 3")) == 2
    for label in ("baseline", "K = auto"):
        assert [len(result.outcomes[label].runs) for result in results] == [3, 3, 3]


def test_a_method_that_fails_while_it_is_warmed_up_is_warmed_up_again():
    pair = Failing(1, "warm-up, K = 3", 1)
    results = pair.run(warmup=1)
    assert [result.outcomes["K = 3"].error for result in results] == [OUT_OF_MEMORY, None, None]
    warmed_up = [(number, what) for number, what in pair.announced if what.startswith("warm-up")]
    expected = [(1, "warm-up, baseline"), (1, "warm-up, K = 3"), (1, "warm-up, K = auto"), (2, "warm-up, K = 3")]
    assert warmed_up == expected


def test_what_a_failed_run_held_is_given_back_before_the_next_begins(llama):
    """Also what holds itself, by way of the error: nothing but the garbage collector finds that."""
    held, alive = [], []

    def fails(prompt):
        cache, error = torch.nn.Module(), ValueError("no \x1b room")
        cache.error = error
        held.append(weakref.ref(cache))
        raise error

    def watches(prompt):
        alive.extend(each() is not None for each in held)
        return baseline(llama, prompt.ids, 2)

    gc.disable()  # or it might come by chance
    try:
        methods = [sd.Method("baseline", watches), sd.Method("K", fails), sd.Method("L", watches)]
        (result,) = measured([prompt_of(PROMPT, 1, 2)], methods, models_of(llama))
    finally:
        gc.enable()
    assert alive == [False]
    assert [outcome.error for outcome in result.outcomes.values()] == [None, "no � room", None]


def test_drafts_go_on_where_the_baseline_fails():
    """Nothing of theirs is compared, but all that is theirs is measured; the exit status is 1."""
    model = make_model("llama")
    draft, broken = contender(like(model, 0.05)), sd.CachedModel(failing(make_model("llama")))
    models = models_of(model, draft)
    methods = [autoregressive(broken, 6), *sd.our_methods(models, settings(draft_tokens=(2,)), ())[1:]]
    (result,) = measured([prompt_of(PROMPT, 1, 6)], methods, models)
    own, ours = result.outcomes["baseline"], result.outcomes["K = 2"]
    assert own == sd.Outcome(OUT_OF_MEMORY) and ours.run.token_ids == baseline(model, PROMPT, 6).token_ids
    assert ours.verdict == "unchecked" and "no baseline" in ours.unchecked and result.replays == {}
    results = sd.Results({}, settings(), tuple(methods), (draft,), (result,), True)
    told = [method["summary"] for method in json.loads(sd.to_json(results))["methods"]]
    assert told[0] is None and told[1]["tokens_per_s"] > 0 and told[1]["speedup_percent"] is None
    assert sd.exit_status(results) == 1


def test_the_baseline_stands_where_all_drafts_fail(tokenizer):
    """It has a row, figures and a place in the JSON as any method; the exit status is 1."""
    model = make_model("llama")
    models = models_of(model, contender(failing(make_model("llama"))), tokenizer=tokenizer)
    methods = sd.our_methods(models, settings(draft_tokens=(2, 3)), ())
    prompts = measured([prompt_of(PROMPT, 1, 6), prompt_of([4], 2, 6)], methods, models)
    results = sd.Results({}, settings(), tuple(methods), models.contenders, tuple(prompts), True)
    told = json.loads(sd.to_json(results))
    first, *others = [method["summary"] for method in told["methods"]]
    assert (first["new_tokens"], first["identical"], others) == (12, 2, [None, None])
    assert {told["prompts"][1]["outcomes"][f"K = {k}"]["error"] for k in (2, 3)} == {OUT_OF_MEMORY}
    console = Console(width=120, markup=False)
    with console.capture() as capture:
        sd.print_report(console, results)
    lines = capture.get().splitlines()
    assert lines[1].startswith("    baseline ") and lines[1].rstrip().endswith(" 2/2")
    assert lines[-1].endswith("2 of 2 outputs.") and sd.exit_status(results) == 1


def test_a_draft_that_fails_before_it_decodes_is_a_row_of_each_length(monkeypatch):
    """Whatever step fails; its memory is given back before the next draft's turn, which is not kept from going on."""
    order, real = [], sd.give_back_memory
    monkeypatch.setattr(sd, "give_back_memory", lambda device: (order.append("given back"), real(device)))
    drafts = sd.Drafts((name, name) for name in ("a/A", "b/B", "ngram"))

    def step(fails):
        def make(so_far):
            name = getattr(so_far, "name", so_far)
            order.append(name)
            if name in fails:
                raise fails[name]
            return sd.Contender(name, sd.NgramDraft(CPU), COSTS)

        return make

    drafts.advance(step({"a/A": sd.UsageError("cannot load a/A: it is gone")}), CPU)
    assert order == ["a/A", "given back", "b/B", "given back", "ngram", "given back"]
    drafts.advance(step({"a/A": KeyError(), "b/B": torch.OutOfMemoryError("no\nroom \x1b")}), CPU)
    assert order.count("a/A") == 1 and order[-4:] == ["b/B", "given back", "ngram", "given back"]
    models = models_of(make_model("llama"), *drafts.values())
    methods = sd.our_methods(models, settings(draft=tuple(drafts), draft_tokens=(2, "auto")), ())
    (result,) = measured([prompt_of(PROMPT, 1, 4)], methods, models)
    errors = [(label, outcome.error) for label, outcome in result.outcomes.items()]
    whys = {"A": "cannot load a/A: it is gone", "B": "no room �", "ngram": None}
    assert errors == [("baseline", None), *((f"{of}, K = {k}", why) for of, why in whys.items() for k in (2, "auto"))]


def test_a_draft_whose_replay_fails_is_only_missing_there():
    """The replay's pass, over the whole text, is longer than all others of the draft. One token is not replayed."""
    model = make_model("llama")
    broken, right = failing(like(model, 0.05), lambda ids: ids.shape[1] > 6), like(model, 0.1)
    models = models_of(model, contender(broken), contender(right, "E"), GONE)
    methods = sd.our_methods(models, settings(draft=("D", "E", "gone"), draft_tokens=(3,)), ())
    questions = [prompt_of(PROMPT, 1, 12), prompt_of(PROMPT, 2, 1)]
    result, of_one_token = measured(questions, methods, models)
    assert result.outcomes["D, K = 3"].error is None and list(result.replays) == ["E"] and of_one_token.replays == {}
    rounds = sd.replayed(result.replays["E"], torch.ones(16).numpy())
    assert rounds[2] == len(result.outcomes["E, K = 3"].run.rounds)
    of_broken, of_right = (sd.prompt_figures(result, method).predicted_speedup_percent for method in methods[1:3])
    assert of_broken is None and of_right is not None


def test_a_tokenizer_that_cannot_decode_costs_the_text_only(llama, tokenizer):
    broken = copy.copy(tokenizer)
    broken.decode = lambda *_, **__: {}["no such id"]
    models = models_of(llama, tokenizer=broken)
    (result,) = measured([prompt_of(PROMPT, 1, 4)], [autoregressive(llama, 4)], models)
    outcome = result.outcomes["baseline"]
    assert (outcome.error, outcome.text, outcome.verdict) == (None, None, "identical")
    console = Console(width=120)
    with console.capture() as capture:
        sd.print_text(console, broken, outcome.run)
    assert "accepted draft token" in capture.get()


# What outputs are judged to be


def judged(runs, model, sampler=None):
    """What `judge` says of them; it changes nothing that it is given."""
    before = {label: tuple(of) for label, of in runs.items()}
    verdicts = sd.judge(models_of(model, sampler=sampler), prompt_of(PROMPT, 1), runs)
    assert {label: tuple(of) for label, of in runs.items()} == before and list(verdicts) == list(runs)
    return verdicts


def test_of_all_repeats_the_worst_is_what_a_method_is_judged_by(llama):
    """Two of three repeats write something else, in one place: the worse is found, whichever of them the median is."""
    right = baseline(llama, PROMPT, 6)
    logits = llama(ids_of([*PROMPT, *right.token_ids[:5]])).logits[0, -1]
    assert logits.argmax() == right.token_ids[5]
    second, *_, last = logits.argsort(descending=True)[1:].tolist()
    for order in itertools.permutations([right.token_ids[5], second, last]):
        runs = {"baseline": [right], "K": [generation_of([*right.token_ids[:5], token]) for token in order]}
        verdicts = judged(runs, llama)
        assert verdicts["baseline"] == {"verdict": "identical", "divergence": None}
        found = verdicts["K"]["divergence"]
        assert (verdicts["K"]["verdict"], found.kind, found.index) == ("mismatch", "mismatch", 5)
        assert (found.baseline_token, found.speculative_token) == (right.token_ids[5], last)
        assert found.gap == pytest.approx((logits.max() - logits[last]).item(), abs=1e-3)


def test_a_mismatch_counts_for_more_than_a_tie_with_a_larger_gap(llama, monkeypatch):
    """Whichever came first; and a tie for more than no divergence at all."""
    tie = sd.Divergence(1, 2, 3, 0.9, 0.0, 1.0, "tie", None)
    mismatch = dataclasses.replace(tie, gap=0.5, kind="mismatch")
    found = {(1, 2): tie, (1, 3): mismatch, (1, 4): None}
    monkeypatch.setattr(sd, "find_divergence", lambda main, prompt_ids, baseline, output: found[output])
    for order in itertools.permutations(found):
        runs = {"baseline": [generation_of((1, 4))], "K": [generation_of(tokens) for tokens in order]}
        assert judged(runs, llama)["K"] == {"verdict": "mismatch", "divergence": mismatch}
        runs["K"] = [run for run in runs["K"] if run.token_ids != (1, 3)]
        assert judged(runs, llama)["K"] == {"verdict": "tie", "divergence": tie}


def with_nan(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = math.nan


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("spoil", "why"), [(failing, OUT_OF_MEMORY), (with_nan, "not finite"), (id, None)])
def test_a_check_that_fails_costs_the_verdict_and_not_the_timings(temperature, spoil, why):
    model, sampler = make_model("llama"), sd.Sampling(temperature) if temperature else sd.Greedy()

    def last(prompt):
        run = speculate(model, make_model("llama"), prompt.ids, 2, 12, sampler=sampler)
        spoil(model)
        return run

    methods = [autoregressive(model, 12), sd.Method("K = 2", last, sd.Contender("D", None, COSTS), 2)]
    (result,) = measured([prompt_of(PROMPT, 1, 12)], methods, models_of(model, sampler=sampler))
    for method in methods:
        outcome, found = result.outcomes[method.label], sd.figures_of((result,), method)
        kind = "unchecked" if why else "sampled" if temperature else "identical"
        assert (outcome.error, outcome.verdict, found.unchecked) == (None, kind, bool(why))
        assert found.tokens_per_s > 0 and (why or "") in (outcome.unchecked or "")
    assert found.speedup_percent is not None


def test_the_text_of_an_outcome_is_that_of_the_run_that_counts(llama, tokenizer):
    """Repeats can differ, by ties; ids and text in the JSON are of the same one."""
    runs = [generation_of([7 + n] * 6, latency_s) for n, latency_s in enumerate((3.0, 1.0, 2.0))]
    repeats = iter(runs)
    methods = [autoregressive(llama, 6), sd.Method("K", lambda prompt: next(repeats), draft_tokens=2)]
    (result,) = measured([prompt_of(PROMPT, 1, 6)], methods, models_of(llama, tokenizer=tokenizer), repeats=3)
    outcome = result.outcomes["K"]
    assert outcome.runs == tuple(runs) and outcome.run is runs[2]
    assert outcome.text == tokenizer.decode([9] * 6, skip_special_tokens=True)


# The library's methods


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_librarys_texts_are_ours(family):
    """Alone, assisted by a model and by n-grams: the same tokens, up to the end of the text, whatever their generation
    configs ask for (here, to repeat nothing)."""
    model = make_model(family)
    assistant, whole = like(model, 0.05), baseline(model, PROMPT, 12).token_ids
    for each in (model, assistant):
        each.generation_config = transformers.GenerationConfig(repetition_penalty=9.0, num_assistant_tokens=2)
    models = models_of(model, contender(assistant), NGRAMS, GONE)
    methods = sd.library_methods(models, settings(draft=("D", "ngram", "gone")), False)
    labels = [f"{name}, {k}" for name in ("D", "ngram", "gone") for k in ("assist 3", "assisted")]
    assert [method.label for method in methods] == ["generate()", *labels]
    assert [(method.draft, method.draft_tokens) for method in methods[:3]] == [(None, None), ("D", 3), ("D", "auto")]
    assert [method.error for method in methods] == [None] * 5 + ["it is gone"] * 2 and all(of.library for of in methods)
    end = next(place for place in range(4, 12) if whole[place] not in whole[:place])
    for method in methods[:5]:
        run = method.decode(prompt_of(PROMPT, 1, 12, {whole[end], 60} - set(whole[:end])))
        assert run.token_ids == whole[: end + 1] and run.rounds == () and run.first_token_s is None
    model._is_stateful = True  # such models the library cannot assist
    assert [method.label for method in sd.library_methods(models, settings(), False)] == ["generate()"]


def test_generate_drafts_as_many_tokens_as_it_is_told():
    """By the widths of the main model's passes: of the prompt and K draft tokens, and of the last one and K more."""
    model, widths = make_model("llama"), []
    models = models_of(model, contender(like(model, 0.0)))  # always right: it drafts all it may
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    methods = sd.library_methods(models, settings(draft_tokens=(3, 2)), False)
    for method, k in zip(methods[1:], (3, 2), strict=True):
        widths.clear()
        method.decode(prompt_of(PROMPT, 1, 2 * (k + 1)))
        assert widths == [5 + k, 1 + k]


def test_what_recompiles_is_warmed_up_with_each_prompt(llama, monkeypatch):
    """So that no timed run has a cache of another size, for which a compiled step would be compiled again."""
    made, runs = [], []
    real = transformers.cache_utils.StaticLayer.lazy_initialization

    def sized(layer, *arguments, **options):
        made.append((*runs[-1], layer.max_cache_len))
        return real(layer, *arguments, **options)

    monkeypatch.setattr(transformers.cache_utils.StaticLayer, "lazy_initialization", sized)
    models = models_of(llama)
    decode = functools.partial(sd.decode_by_generate, models, None, {"cache_implementation": "static"})
    methods = [autoregressive(llama, 4), sd.Method("generate()", decode, library="generate()", recompiles=True)]
    questions = [prompt_of(PROMPT[:n], n, 4) for n in (2, 5, 3)]
    announce = lambda question, what: runs.append((question.number, what))  # noqa: E731
    results = measured(questions, methods, models, announce, warmup=1)
    sizes = {what: {number: size for number, kind, size in made if kind == what} for what in {run[1] for run in runs}}
    assert set(sizes["generate()"]) == {2, 5, 3} and sizes["generate()"] == sizes["warm-up, generate()"]
    assert [run for run in runs if run[1] == "warm-up, baseline"] == [(2, "warm-up, baseline")]
    assert all(result.outcomes["generate()"].verdict == "identical" for result in results)


def test_sampled_texts_of_the_library_are_the_same_each_time(llama):
    models = models_of(llama, sampler=sd.Sampling(1.0, 0, 1.0, 7))
    decode = functools.partial(sd.decode_by_generate, models, None, {})
    first, again, other = (decode(prompt_of(PROMPT, number, 12)).token_ids for number in (1, 1, 2))
    assert first == again != other


# Names


@pytest.mark.parametrize(
    ("drafts", "names"),
    [
        (("google/gemma-2-2b-it",), ("",)),
        (("Qwen/Qwen3-0.6B", "ngram"), ("Qwen3-0.6B, ", "ngram, ")),
        (("B/small", "C/small"), ("B/small, ", "C/small, ")),  # which only their folders tell apart
        (("x/", "ngram"), ("x, ", "ngram, ")),  # as the main model's own folder, x/
        (("/", "ngram"), ("/, ", "ngram, ")),
        (("models/a\x1b[2J\u202e", "ngram"), ("a�[2J�, ", "ngram, ")),
        (("x/a\x1b", "y/a\x07"), ("x/a�, ", "y/a�, ")),
        (("x/a\x1b", "x/a\x07"), ("draft 1, ", "draft 2, ")),  # one label would be one row for both
    ],
)
def test_short_names_of_drafts(drafts, names):
    assert [sd.short_name(draft, settings(main="x/", draft=drafts)) for draft in drafts] == list(names)


def test_methods_are_labelled_by_draft_and_length(llama):
    models = models_of(llama, contender(llama, "x/m-1"), NGRAMS)
    methods = sd.our_methods(models, settings(draft=("x/m-1", "ngram"), draft_tokens=(2, "auto")), ())
    labels = [f"{name}, K = {k}" for name in ("m-1", "ngram") for k in (2, "auto")]
    assert [method.label for method in methods] == ["baseline", *labels]
    pairs = [(name, k) for name in ("x/m-1", "ngram") for k in (2, "auto")]
    assert [(method.draft, method.draft_tokens) for method in methods] == [(None, None), *pairs]
    assert [method.step_bytes for method in methods] == [sd.bytes_per_step(llama), *[None] * 4]
    for method in methods:
        assert method.decode(prompt_of(PROMPT, 1, 5)).token_ids == baseline(llama, PROMPT, 5).token_ids


def test_what_a_question_is_called():
    ids = {None: "7", "": "7", 0: "0", "81": "81", "a\x1b[2J\nb": "a�[2J b"}
    assert [sd.Question("?", 7, question_id=each).label for each in ids] == list(ids.values())

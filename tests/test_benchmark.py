"""The benchmark: who is measured when, what a failure costs, what outputs are judged to be, and what is compared."""

import dataclasses
import functools
import itertools
import json
import math
import types

import pytest
import torch
import transformers
from helpers import (
    ROOT,
    baseline,
    counts_of,
    generation_of,
    ids_of,
    like,
    make_model,
    mixed,
    prompt_of,
    speculate,
)

import speculative_decoding as sd

MAIN = ROOT / "tests/tiny_gemma2/main"
PROMPT = [5, 9, 13, 2, 40]
OUT_OF_MEMORY = "CUDA out of memory."
NOT_FINITE = "the {} model's logits are not finite; try --dtype float32 or bfloat16"
SILENT = lambda *_: None  # noqa: E731


def settings(**given):
    return sd.Settings(**{"main": "M", "draft": ("D",), "draft_tokens": (3, "auto"), "warmup": 0} | given)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MAIN)


@pytest.fixture(scope="module")
def chat(tokenizer):
    """The bundled pair's chat; answers are short."""
    return sd.Chat(tokenizer, {}, 8, frozenset(), 15, 1024, "main", 4096)


def measured(questions, methods, main, chat, announce=SILENT, **given):
    return list(sd.benchmark(questions, methods, main, chat, settings(**given), announce))


# Who is measured when


def test_methods_take_turns_and_each_is_warmed_up_before_its_first_run(llama, chat):
    main, draft = sd.CachedModel(llama), sd.CachedModel(llama)
    methods = [
        sd.Method("baseline", lambda prompt: baseline(main, prompt.ids, 3)),
        sd.Method("other", lambda prompt: speculate(main, draft, prompt.ids, 2, 3), "D", 2),
    ]
    order, questions = [], [prompt_of(PROMPT, 1, 3), prompt_of([4], 2, 3)]
    announce = lambda question, what: order.append((question.number, what))  # noqa: E731
    results = measured(questions, methods, main, chat, announce, repeats=3, warmup=2)
    b, o = "baseline", "other"
    warm = "warm-up, baseline", "warm-up, other"
    assert [what for _, what in order[:6]] == [warm[0], warm[0], b, warm[1], warm[1], o]
    runs = [(number, what) for number, what in order if what not in warm]
    assert len(runs) == len(order) - 4
    assert [what for number, what in runs if number == 1] == [b, o, o, b, b, o]
    assert [what for number, what in runs if number == 2] == [o, b, b, o, o, b]
    for result, question in zip(results, questions, strict=True):
        expected = baseline(llama, question.ids, 3).token_ids
        assert result.question is question and set(result.outcomes) == {b, o}
        for outcome in result.outcomes.values():
            assert [run.token_ids for run in outcome.runs] == [expected] * 3
            assert outcome.text == chat.tokenizer.decode(expected, skip_special_tokens=True)
            assert outcome.verdict == sd.Verdict("identical")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_method_is_first_equally_often(count):
    """Also if every other prompt is a second turn."""
    methods = list(range(count))
    for repeats, second in itertools.product((1, 3), (0, 1)):
        places = [number for number in range(24 * count) if number % 2 == second]
        orders = [list(sd.in_turns(methods, repeats, number)) for number in places]
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


def failing(model, when):
    """The model, which runs out of memory where `when` says so of the ids that it is to read."""

    def out_of_memory(module, arguments):
        if when(arguments[0]):
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    model.get_input_embeddings().register_forward_pre_hook(out_of_memory)
    return model


def test_a_prompt_that_fails_does_not_end_the_rest(chat):
    """A real model that runs out of memory, as its first layer says, wherever it reads the token 13."""
    main = sd.CachedModel(failing(make_model("llama"), lambda ids: (ids == 13).any()))
    methods = [sd.Method("baseline", lambda prompt: baseline(main, prompt.ids, 2))]
    questions = [prompt_of([1, 2], 1), prompt_of([13, 5], 2), prompt_of([4], 3)]
    outcomes = [result.outcomes["baseline"] for result in measured(questions, methods, main, chat)]
    assert [outcome.error for outcome in outcomes] == [None, OUT_OF_MEMORY, None]
    assert outcomes[1] == sd.Outcome(error=OUT_OF_MEMORY)
    assert [len(outcomes[place].run.token_ids) for place in (0, 2)] == [2, 2]


class Failing:
    """A pair whose main model runs out of memory in the verify passes of K = 3, in one chosen run of it."""

    def __init__(self, fails_at, chat):
        self.announced, self.fails_at, self.chat = [], fails_at, chat
        model = make_model("llama")
        draft_model = like(model, 0.05)
        self.main = sd.CachedModel(failing(model, lambda ids: ids.shape[1] == 4 and self.fails()))
        drafts = {"D": sd.ModelDraft(sd.CachedModel(draft_model), sd.Greedy())}
        self.questions = [prompt_of(PROMPT, 1, 12), prompt_of([4, 8], 2, 12), prompt_of([17], 3, 12)]
        self.methods = sd.our_methods(self.main, drafts, sd.Greedy(), settings(), self.questions[0])

    def fails(self):
        """Whether what was announced last is what shall fail: a prompt's number, the method, and which of its runs."""
        return bool(self.announced) and (*self.announced[-1], self.announced.count(self.announced[-1])) == self.fails_at

    def run(self, **given):
        announce = lambda question, what: self.announced.append((question.number, what))  # noqa: E731
        return measured(self.questions, self.methods, self.main, self.chat, announce, **given)


def test_a_method_that_fails_costs_its_own_outcome_only(chat):
    pair = Failing((2, "K = 3", 1), chat)
    results = pair.run()
    assert [method.label for method in pair.methods] == ["baseline", "K = 3", "K = auto"]
    assert [result.outcomes["K = 3"].error for result in results] == [None, OUT_OF_MEMORY, None]
    assert results[1].outcomes["K = 3"] == sd.Outcome(error=OUT_OF_MEMORY)
    for result in results:
        expected = result.outcomes["baseline"].run.token_ids
        assert len(expected) == 12 and result.outcomes["K = auto"].run.token_ids == expected
        assert result.outcomes["K = 3"].error or result.outcomes["K = 3"].run.token_ids == expected
    fixed, auto = (sd.figures_of(results, method) for method in pair.methods[1:])
    assert (fixed.prompts, fixed.identical, fixed.new_tokens) == (2, 2, 24)
    assert (auto.prompts, auto.identical, auto.new_tokens) == (3, 3, 36)


def test_a_method_that_fails_in_a_repeat_is_not_run_again(chat):
    pair = Failing((2, "K = 3", 2), chat)
    results = pair.run(repeats=3)
    outcomes = [result.outcomes["K = 3"] for result in results]
    assert [len(outcome.runs) for outcome in outcomes] == [3, 1, 3] and outcomes[1].verdict is None
    assert [outcome.error for outcome in outcomes] == [None, OUT_OF_MEMORY, None]
    assert pair.announced.count((2, "K = 3")) == 2
    for label in ("baseline", "K = auto"):
        assert [len(result.outcomes[label].runs) for result in results] == [3, 3, 3]


def test_a_method_that_fails_while_it_is_warmed_up_is_warmed_up_again(chat):
    pair = Failing((1, "warm-up, K = 3", 1), chat)
    results = pair.run(warmup=1)
    assert [result.outcomes["K = 3"].error for result in results] == [OUT_OF_MEMORY, None, None]
    warmed_up = [(number, what) for number, what in pair.announced if what.startswith("warm-up")]
    expected = [(1, "warm-up, baseline"), (1, "warm-up, K = 3"), (1, "warm-up, K = auto"), (2, "warm-up, K = 3")]
    assert warmed_up == expected


def test_costs_that_cannot_be_measured_cost_the_automatic_length_only(chat):
    model = failing(make_model("llama"), lambda ids: ids.shape[1] == 16)  # the longest verify pass that is measured
    main = sd.CachedModel(model)
    drafts = {"D": sd.ModelDraft(sd.CachedModel(make_model("llama")), sd.Greedy())}
    questions = [prompt_of(PROMPT, 1, 8), prompt_of([4, 8], 2, 8)]
    methods = sd.our_methods(main, drafts, sd.Greedy(), settings(), questions[0])
    why = f"what passes cost cannot be measured: {OUT_OF_MEMORY}"
    assert [method.error for method in methods] == [None, None, why] and methods[2].costs is None
    for result in measured(questions, methods, main, chat):
        assert result.outcomes["K = auto"] == sd.Outcome(error=why)
        assert len(result.outcomes["K = 3"].run.token_ids) == 8


def test_drafts_go_on_where_the_baseline_fails(chat):
    """Nothing of theirs is compared, but all that is theirs is measured; the exit status is 1."""
    model = make_model("llama")
    main, broken = sd.CachedModel(model), sd.CachedModel(failing(make_model("llama"), lambda ids: True))
    methods = [
        sd.Method("baseline", lambda prompt: baseline(broken, prompt.ids, 6)),
        sd.Method("K = 2", lambda prompt: speculate(main, like(model, 0.05), prompt.ids, 2, 6), "D", 2),
    ]
    (result,) = measured([prompt_of(PROMPT, 1, 6)], methods, main, chat)
    own, ours = result.outcomes["baseline"], result.outcomes["K = 2"]
    assert own == sd.Outcome(error=OUT_OF_MEMORY)
    assert ours.run.token_ids == baseline(model, PROMPT, 6).token_ids
    assert ours.verdict == sd.Verdict("unchecked", why="there is no baseline to compare it with")
    results = sd.Results({"memory_bandwidth_gb_s": 9.0}, settings(), tuple(methods), (result,), True)
    told = sd.to_json(results)
    assert told["methods"][0]["summary"] is None and told["methods"][1]["summary"]["tokens_per_s"] > 0
    assert told["methods"][1]["summary"]["speedup_percent"] is None
    assert sd.exit_status(results) == 1


def with_nan(model, row=3):
    """The model, whose logits are not finite."""
    with torch.no_grad():
        model.get_output_embeddings().weight[row] = math.nan
    return model


def test_the_baseline_stands_where_all_drafts_fail(chat, tokenizer):
    """Drafts of NaN: the baseline has a row, figures and a place in the JSON as any method; the exit status is 1."""
    main, questions = sd.CachedModel(make_model("llama")), [prompt_of(PROMPT, 1, 6), prompt_of([4], 2, 6)]
    drafts = {"D": sd.ModelDraft(sd.CachedModel(with_nan(make_model("llama"))), sd.Greedy())}
    methods = sd.our_methods(main, drafts, sd.Greedy(), settings(draft_tokens=(2, 3)), questions[0])
    prompts = tuple(measured(questions, methods, main, chat))
    results = sd.Results({"memory_bandwidth_gb_s": 9.0}, settings(), tuple(methods), prompts, True)
    told = json.loads(json.dumps(sd.to_json(results), allow_nan=False))
    first, *others = told["methods"]
    assert first["summary"]["new_tokens"] == 12 and first["summary"]["identical"] == 2
    assert first["summary"]["weight_bandwidth_gb_s"] > 0
    assert [method["summary"] for method in others] == [None, None]
    for prompt, result in zip(told["prompts"], prompts, strict=True):
        own = prompt["outcomes"]["baseline"]
        assert own["token_ids"] == list(baseline(main, result.question.ids, 6).token_ids)
        assert own["verdict"] == "identical" and own["error"] is None
        assert {prompt["outcomes"][label]["error"] for label in ("K = 2", "K = 3")} == {NOT_FINITE.format("draft")}
    console = sd.Console(width=120, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        sd.print_prompt(console, results, prompts[0], tokenizer)
        sd.print_report(console, results)
    lines = capture.get().splitlines()
    assert lines[1].startswith("    baseline ") and lines[1].rstrip().endswith(" yes")
    assert lines[2:4] == [f"    K = {k}: {NOT_FINITE.format('draft')}" for k in (2, 3)]
    assert lines[4] == "    mean" and lines[5].startswith("    baseline ") and lines[5].rstrip().endswith(" 2/2")
    assert lines[-1] == "All 2 outputs are the main model's own, token for token."
    assert sd.exit_status(results) == 1


def test_a_draft_that_could_not_be_loaded_is_a_row_of_each_length(chat):
    main, questions = sd.CachedModel(make_model("llama")), [prompt_of(PROMPT, 1, 4)]
    drafts = {"A": "cannot load A: it is gone", "ngram": sd.NgramDraft(torch.device("cpu"))}
    both = settings(draft=("A", "ngram"), draft_tokens=(2, 3))
    methods = sd.our_methods(main, drafts, sd.Greedy(), both, questions[0])
    outcomes = measured(questions, methods, main, chat)[0].outcomes
    assert {label: outcome.error for label, outcome in outcomes.items()} == {
        "baseline": None,
        "A, K = 2": "cannot load A: it is gone",
        "A, K = 3": "cannot load A: it is gone",
        "ngram, K = 2": None,
        "ngram, K = 3": None,
    }


def test_the_costs_of_a_mixed_draft_are_those_of_its_model():
    """Also behind a prompt whose last pair of tokens stands in it before, where n-grams would do all the drafting."""
    model, read = make_model("llama"), []
    draft = mixed(like(model, 0.05))
    draft.model.model.model.get_input_embeddings().register_forward_pre_hook(lambda *_: read.append(1))
    prompt = prompt_of([7, 7, 3, 9, 7], 1, 4)
    (_, method) = sd.our_methods(
        sd.CachedModel(model),
        {"ngram+A": draft},
        sd.Greedy(),
        settings(draft=("ngram+A",), draft_tokens=("auto",)),
        prompt,
    )
    assert method.costs and len(read) > 8 * 15  # in each of the rounds with 15 draft tokens, 15 passes


# What outputs are judged to be


def judged(spoil=SILENT, when=lambda ids: False, temperature=0.0, chat=None):
    """The outcomes of a real model's runs; `spoil`: does something to the model before its outputs are judged."""
    model = failing(make_model("llama"), when)
    main = sd.CachedModel(model)

    def last(prompt):
        run = speculate(main, make_model("llama"), prompt.ids, 2, 12)
        spoil(model)
        return run

    own = sd.Method("baseline", lambda prompt: baseline(main, prompt.ids, 12))
    methods = [own, sd.Method("K = 2", last, "D", 2)]
    (result,) = measured([prompt_of(PROMPT, 1, 12)], methods, main, chat, temperature=temperature)
    assert all(len(outcome.runs) == 1 for outcome in result.outcomes.values())
    return result, methods


def test_a_check_that_fails_costs_the_verdict_and_not_the_timings(chat):
    """Out of memory in the certifying pass over the whole text, of 5 + 12 - 1 tokens."""
    result, methods = judged(when=lambda ids: ids.shape[1] == 16, chat=chat)
    for label, method in zip(("baseline", "K = 2"), methods, strict=True):
        assert result.outcomes[label].error is None
        assert result.outcomes[label].verdict == sd.Verdict("unchecked", None, OUT_OF_MEMORY)
        found = sd.figures_of((result,), method)
        assert (found.identical, found.unchecked) == (0, 1) and found.tokens_per_s > 0
    assert found.speedup_percent is not None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(temperature, chat):
    result, methods = judged(spoil=with_nan, temperature=temperature, chat=chat)
    assert {outcome.error for outcome in result.outcomes.values()} == {NOT_FINITE.format("main")}
    assert [sd.figures_of((result,), method) for method in methods] == [None, None]
    result, _ = judged(temperature=temperature, chat=chat)
    kinds = {(outcome.error, outcome.verdict.kind) for outcome in result.outcomes.values()}
    assert kinds == {(None, "sampled" if temperature else "identical")}


def test_of_all_repeats_the_worst_is_what_a_method_is_judged_by(llama):
    """Two of three repeats write something else, in one place: the worse is found, whichever of them the median is."""
    main, right = sd.CachedModel(llama), baseline(llama, PROMPT, 6)
    logits = llama(ids_of([*PROMPT, *right.token_ids[:5]])).logits[0, -1]
    assert logits.argmax() == right.token_ids[5]
    second, *_, last = logits.argsort(descending=True)[1:].tolist()
    for order in itertools.permutations([right.token_ids[5], second, last]):
        tokens = [[*right.token_ids[:5], token] for token in order]
        runs = {"baseline": [right], "K": [generation_of(each) for each in tokens]}
        verdicts = sd.judge(main, False, prompt_of(PROMPT, 1), runs, {"baseline": None, "K": None})
        assert verdicts["baseline"] == sd.Verdict("identical") and verdicts["K"].kind == "mismatch"
        found = verdicts["K"].divergence
        assert (found.kind, found.index, found.at_fault) == ("mismatch", 5, "speculative")
        assert (found.baseline_token, found.speculative_token) == (right.token_ids[5], last)
        assert found.gap == pytest.approx((logits.max() - logits[last]).item(), abs=1e-3)


def test_a_mismatch_counts_for_more_than_a_tie_with_a_larger_gap(llama, monkeypatch):
    """Whichever came first; and a tie for more than no divergence at all."""
    tie, mismatch = (
        sd.Divergence(1, 2, 3, gap, 0.0, 1.0, kind, None) for gap, kind in ((0.9, "tie"), (0.5, "mismatch"))
    )
    found = {(1, 2): tie, (1, 3): mismatch, (1, 4): None}
    monkeypatch.setattr(sd, "find_divergence", lambda main, prompt_ids, baseline, output: found[tuple(output)])
    for order in itertools.permutations(found):
        runs = {"baseline": [generation_of((1, 4))], "K": [generation_of(tokens) for tokens in order]}
        judge = functools.partial(sd.judge, sd.CachedModel(llama), False, prompt_of(PROMPT, 1))
        assert judge(runs, {"baseline": None, "K": None})["K"] == sd.Verdict("mismatch", mismatch)
        runs["K"] = [run for run in runs["K"] if run.token_ids != (1, 3)]
        assert judge(runs, {"baseline": None, "K": None})["K"] == sd.Verdict("tie", tie)


def test_two_tokens_that_are_tied_are_a_tie(chat):
    """A model whose two best tokens are the same but for rounding: either is its own."""
    model = make_model("llama")
    right = baseline(model, PROMPT, 6).token_ids
    twin = next(token for token in range(61) if token not in right)
    with torch.no_grad():
        model.get_output_embeddings().weight[twin] = model.get_output_embeddings().weight[right[5]] * (1 - 1e-7)
    main = sd.CachedModel(model)
    runs = {"baseline": [generation_of(right)], "K": [generation_of([*right[:5], twin])]}
    verdict = sd.judge(main, False, prompt_of(PROMPT, 1), runs, {"baseline": None, "K": None})["K"]
    assert verdict.kind == "tie" and verdict.divergence.index == 5 and verdict.divergence.at_fault is None
    assert 0 <= verdict.divergence.gap <= verdict.divergence.noise


def test_the_text_of_an_outcome_is_that_of_the_run_that_counts(llama, chat):
    """Repeats can differ, by ties; ids and text in the JSON are of the same one."""
    own = baseline(llama, PROMPT, 6)
    runs = [generation_of([7 + n] * 6, latency) for n, latency in enumerate((3.0, 1.0, 2.0))]
    repeats = iter(runs)
    methods = [sd.Method("baseline", lambda prompt: own), sd.Method("K", lambda prompt: next(repeats), "D", 2)]
    (result,) = measured([prompt_of(PROMPT, 1, 6)], methods, sd.CachedModel(llama), chat, repeats=3)
    outcome = result.outcomes["K"]
    assert outcome.runs == tuple(runs) and outcome.run is runs[2]
    assert outcome.text == chat.tokenizer.decode([9] * 6, skip_special_tokens=True)


# Conversations


@pytest.fixture(scope="module")
def bundled():
    return transformers.AutoModelForCausalLM.from_pretrained(MAIN, dtype=torch.float32).eval()


def test_each_turn_follows_the_baselines_answer(chat, bundled, tokenizer):
    """Three turns of one question, then another question: prompts, texts, and the ids of the chat's template."""
    main = sd.CachedModel(bundled)
    methods = [
        sd.Method("baseline", functools.partial(sd.decode_autoregressively, main, sd.Greedy())),
        sd.Method("K = 3", lambda prompt: speculate(main, "ngram", prompt.ids, 3, 8), "ngram", 3),
    ]
    asked = "What does list.sort do?", "And sorted?", "Which is faster?"
    talk = chat.encode(sd.Question(asked[0], 1, 1, later=asked[1:], question_id="q"))
    results = measured([talk, chat.encode(sd.Question("What is zip?", 2))], methods, main, chat)
    assert [result.question.label for result in results] == ["q.1", "q.2", "q.3", "2"]
    assert [result.question.text for result in results] == [*asked, "What is zip?"]
    messages = []
    for result in results[:3]:
        messages.append({"role": "user", "content": result.question.text})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert list(result.question.ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
        own, ours = result.outcomes["baseline"], result.outcomes["K = 3"]
        assert own.run.token_ids == ours.run.token_ids and len(own.run.token_ids) == 8
        assert own.text == ours.text == tokenizer.decode(own.run.token_ids, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": own.text})
    assert results[2].question.longest <= talk.longest  # what was promised before any answer was known


def test_a_turn_whose_baseline_failed_leaves_the_next_without_an_answer(chat, bundled):
    """The drafts of the turn itself go on; the turns behind it fail, and so does nothing else."""
    main = sd.CachedModel(bundled)

    def own(prompt):
        if prompt.number == 1:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return sd.decode_autoregressively(main, sd.Greedy(), prompt)

    methods = [
        sd.Method("baseline", own),
        sd.Method("K = 3", lambda prompt: speculate(main, "ngram", prompt.ids, 3, 4), "ngram", 3),
    ]
    talk = chat.encode(sd.Question("What does list.sort do?", 1, 1, later=("And sorted?", "Why?")))
    results = measured([talk, chat.encode(sd.Question("What is zip?", 2))], methods, main, chat)
    errors = [[result.outcomes[label].error for label in ("baseline", "K = 3")] for result in results]
    gone = [[f"turn {turn} has no answer to go on from"] * 2 for turn in (1, 2)]
    assert errors == [[OUT_OF_MEMORY, None], *gone, [None, None]]
    assert [result.question.ids != () for result in results] == [True, False, False, True]


def test_a_turn_that_does_not_fit_fails_alone(chat, bundled):
    short = dataclasses.replace(chat, context=60)
    main = sd.CachedModel(bundled)
    methods = [sd.Method("baseline", functools.partial(sd.decode_autoregressively, main, sd.Greedy()))]
    talk = short.encode(sd.Question("What does list.sort do?", 1, 1, later=("And sorted? " * 9,)))
    first, second = measured([talk], methods, main, short)
    assert first.outcomes["baseline"].error is None
    assert "exceeds the context of 60 (the main model's limit)" in second.outcomes["baseline"].error


# The library's methods


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_librarys_texts_are_ours(family):
    """Alone, assisted by a model and by n-grams: the same tokens, up to the end of the text."""
    model = make_model(family)
    main, draft = sd.CachedModel(model), sd.ModelDraft(sd.CachedModel(like(model, 0.05)), sd.Greedy())
    drafts = {"D": draft, "ngram": sd.NgramDraft(torch.device("cpu")), "gone": "it is gone"}
    drafts["ngram+D"] = sd.MixedDraft(drafts["ngram"], draft)
    several = settings(draft=tuple(drafts))
    methods = sd.library_methods(main, drafts, sd.Greedy(), several)
    labels = ["generate()"] + [f"{name}, {k}" for name in ("D", "ngram") for k in ("assist 3", "assisted")]
    assert [method.label for method in methods] == labels  # it mixes none, and runs none that is gone
    assert [(method.draft, method.draft_tokens) for method in methods[1:3]] == [("D", 3), ("D", "auto")]
    text = "transformers' assisted generation, "
    kinds = ["transformers' generate(), eager"] + [f"{text}K = 3, eager", f"{text}its default K, eager"] * 2
    assert [method.library for method in methods] == kinds
    whole = baseline(model, PROMPT, 12).token_ids
    end = next(place for place in range(4, 12) if whole[place] not in whole[:place])
    for method in methods:
        run = method.decode(prompt_of(PROMPT, 1, 12, {whole[end], 60} - set(whole[:end])))
        assert run.token_ids == whole[: end + 1] and run.rounds == () and run.first_token_s is None


def test_generate_leaves_the_models_as_they_were():
    """What their generation configs ask for, here to repeat nothing, takes no part, and is there again afterwards."""
    model, sampler = make_model("llama"), sd.Greedy()
    assistant = like(model, 0.05)
    plain = baseline(model, PROMPT, 12).token_ids
    for each, penalty in ((model, 9.0), (assistant, 7.0)):
        each.generation_config = transformers.GenerationConfig(repetition_penalty=penalty, num_assistant_tokens=2)
    kept = model.generation_config, assistant.generation_config
    was = [config.to_dict() for config in kept]
    main, draft = sd.CachedModel(model), sd.ModelDraft(sd.CachedModel(assistant), sampler)
    for draft_of, options in ((None, {}), (draft, {"num_assistant_tokens": 3})):
        run = sd.decode_by_generate(main, draft_of, sampler, options, prompt_of(PROMPT, 1, 12))
        assert run.token_ids == plain
        assert (model.generation_config, assistant.generation_config) == kept
        assert [config.to_dict() for config in kept] == was
    failing(model, lambda ids: True)
    with pytest.raises(torch.OutOfMemoryError):
        sd.decode_by_generate(main, draft, sampler, {}, prompt_of(PROMPT, 1, 12))
    assert (model.generation_config, assistant.generation_config) == kept


def test_generate_drafts_as_many_tokens_as_it_is_told():
    """By the widths of the main model's passes: of the prompt and K draft tokens, and of the last one and K more."""
    model, widths = make_model("llama"), []
    drafts = {"D": sd.ModelDraft(sd.CachedModel(like(model, 0.0)), sd.Greedy())}  # always right: it drafts all it may
    main = sd.CachedModel(model)
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    methods = sd.library_methods(main, drafts, sd.Greedy(), settings(draft_tokens=(3, 2)))
    for method, k in zip(methods[1:], (3, 2), strict=True):
        widths.clear()
        method.decode(prompt_of(PROMPT, 1, 2 * (k + 1)))
        assert widths == [5 + k, 1 + k]


def test_what_recompiles_is_warmed_up_with_each_prompt(llama, chat, monkeypatch):
    """So that no timed run has a cache of another size, for which a compiled step would be compiled again."""
    made, runs = [], []
    real = transformers.cache_utils.StaticLayer.lazy_initialization

    def sized(layer, *arguments, **options):
        made.append((*runs[-1], layer.max_cache_len))
        return real(layer, *arguments, **options)

    monkeypatch.setattr(transformers.cache_utils.StaticLayer, "lazy_initialization", sized)
    main = sd.CachedModel(llama)
    decode = functools.partial(sd.decode_by_generate, main, None, sd.Greedy(), {"cache_implementation": "static"})
    methods = [
        sd.Method("baseline", functools.partial(sd.decode_autoregressively, main, sd.Greedy())),
        sd.Method("generate()", decode, library="transformers' generate()", recompiles=True),
    ]
    questions = [prompt_of(PROMPT[:n], n, 4) for n in (2, 5, 3)]
    told = lambda question, what: runs.append((question.number, what))  # noqa: E731
    results = measured(questions, methods, main, chat, told, warmup=1)
    sizes = {what: {number: size for number, kind, size in made if kind == what} for what in {run[1] for run in runs}}
    assert set(sizes["generate()"]) == {2, 5, 3} and sizes["generate()"] == sizes["warm-up, generate()"]
    assert [run for run in runs if run[1] == "warm-up, baseline"] == [(2, "warm-up, baseline")]
    assert all(result.outcomes["generate()"].verdict.kind == "identical" for result in results)


def test_sampled_texts_of_the_library_are_the_same_each_time(llama):
    sampler = sd.Sampling(1.0, 0, 1.0, 7, torch.device("cpu"))
    decode = functools.partial(sd.decode_by_generate, sd.CachedModel(llama), None, sampler, {})
    first, again, other = (decode(prompt_of(PROMPT, number, 12)).token_ids for number in (1, 1, 2))
    assert first == again != other


# Names


@pytest.mark.parametrize(
    ("main", "drafts", "names"),
    [
        ("google/gemma-2-9b-it", ("google/gemma-2-2b-it",), ("",)),
        ("google/gemma-2-9b-it", ("google/gemma-2-2b-it", "ngram"), ("2b-it, ", "ngram, ")),
        ("google/gemma-2-9b-it", ("ngram", "ngram+google/gemma-2-2b-it"), ("ngram, ", "ngram+2b-it, ")),
        ("Qwen/Qwen3-8B", ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"), ("0.6B, ", "1.7B, ")),
        ("A/big", ("B/small", "C/tiny"), ("small, ", "tiny, ")),  # nothing in common: without the folders
        ("A/big", ("B/small", "C/small"), ("B/small, ", "C/small, ")),  # which only their folders tell apart
        ("models/big/", ("models/small/", "models/tiny/"), ("small, ", "tiny, ")),
        ("A/big", ("B/small", "ngram+B/small"), ("small, ", "ngram+small, ")),
    ],
)
def test_short_names_of_drafts(main, drafts, names):
    assert sd.short_names(settings(main=main, draft=drafts)) == dict(zip(drafts, names, strict=True))


def test_methods_are_labelled_by_draft_and_length(llama):
    main, sampler = sd.CachedModel(llama), sd.Greedy()
    drafts = {"x/m-1": sd.ModelDraft(sd.CachedModel(llama), sampler), "ngram": sd.NgramDraft(main.device)}
    several = settings(main="x/m-9", draft=tuple(drafts), draft_tokens=(2, "auto"))
    methods = sd.our_methods(main, drafts, sampler, several, prompt_of(PROMPT, 1, 4))
    assert [method.label for method in methods] == [
        "baseline",
        *(f"{name}, K = {k}" for name in ("1", "ngram") for k in (2, "auto")),
    ]
    assert [(method.draft, method.draft_tokens) for method in methods] == [
        (None, None),
        *((name, k) for name in drafts for k in (2, "auto")),
    ]
    assert [bool(method.costs) for method in methods] == [False, False, True, False, True]
    assert methods[0].step_bytes == sd.bytes_per_step(llama) and not any(method.step_bytes for method in methods[1:])
    for method in methods:
        assert method.decode(prompt_of(PROMPT, 1, 5)).token_ids == baseline(llama, PROMPT, 5).token_ids


@pytest.mark.parametrize(
    ("question", "label"),
    [
        (sd.Question("?", 7), "7"),
        (sd.Question("?", 7, 2), "7.2"),
        (sd.Question("?", 7, question_id=81, turn=1), "81.1"),
        (sd.Question("?", 7, question_id=""), "7"),
        (sd.Question("?", 7, question_id=0), "0"),
        (sd.Question("?", 7, question_id="a\x1b[2J\nb"), "a�[2J b"),
    ],
)
def test_what_a_question_is_called(question, label):
    assert question.label == label

"""The report: the JSON, the tables, the texts and every sentence, as they follow from the results."""

import dataclasses
import io
import itertools
import json
import math
import re
import types
from collections import Counter

import numpy
import pytest
import transformers
from helpers import ROOT, baseline, generation_of, prompt_of
from rich.console import Console

import speculative_decoding as sd

MAIN = ROOT / "tests/tiny_gemma2/main"
HOSTILE = "[red]\x1b[2J\u202e\x07x\u200b[/red]"
HARMLESS = "[red]�[2J��x�[/red]"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MAIN)


def console_of(width=120, **options):
    return Console(width=width, markup=False, emoji=False, highlight=False, **options)


COSTS = (0.1, 0.125, 0.15, 0.2, 0.3)
DRAFT = sd.Contender("D", None, COSTS)
BASELINE = sd.Method("baseline", None, step_bytes=990_000_000)
FIXED, AUTO = sd.Method("K = 3", None, DRAFT, 3), sd.Method("K = auto", None, DRAFT, "auto")
GENERATE = sd.Method("generate()", None, library="transformers' generate(), eager")
METHODS, PAIR = (BASELINE, FIXED, AUTO, GENERATE), (BASELINE, FIXED)
TOKENS = tuple(range(10, 21))
ROUNDS = [(3, 3, 0.03, 0.1, 0.15), (3, 1, 0.03, 0.1, 0.15), (3, 0, 0.03, 0.1, 0.15)]
RUNS = {
    "baseline": generation_of(TOKENS, 1.0, 0.01),
    "K = 3": generation_of(TOKENS, 0.5, 0.01, ROUNDS, -9.0),
    "K = auto": generation_of(TOKENS, 1.0, 0.02, [(4, 3, 0.1, 0.2, 0.3)] * 3, -6.0),
    "generate()": generation_of(TOKENS, 1.0),
    "assist 3": generation_of(TOKENS, 0.8),
}
NAMES = {"baseline": "own", "K = 3": "fixed", "K = auto": "auto", "generate()": "library", "assist 3": "assisted"}


def outcome_of(run, verdict="identical", divergence=None, why=None):
    return sd.Outcome(None, (run,), "a text", verdict, divergence, why)


def changed(label, **fields):
    """An outcome of one of the runs above with other fields."""
    return outcome_of(dataclasses.replace(RUNS[label], **fields))


def failed(why="CUDA out of memory."):
    return sd.Outcome(why)


def result_of(number=1, methods=METHODS, factor=1.0, question=None, replays=None, **other):
    """What the methods did with a prompt, `factor` times as slow; `other`: other outcomes by "fixed", "auto", …"""
    outcomes = {}
    for method in methods:
        label = method.label.rpartition(", ")[2]
        first_s = RUNS[label].first_token_s and RUNS[label].first_token_s * factor
        made = changed(label, latency_s=RUNS[label].latency_s * factor, first_token_s=first_s)
        outcomes[method.label] = other.get(NAMES[label], made)
    return sd.Result(question or sd.Question("What?", number, ids=(1, 2, 3)), outcomes, replays or {})


def results_of(*prompts, methods=METHODS, memory=None, can_compile=True, contenders=(DRAFT,), **settings):
    given = {"main": "M", "draft": tuple(of.name for of in contenders), "draft_tokens": (3, "auto"), "compile": "off"}
    environment = {"device": "cpu", "threads": 1, "memory_bandwidth_gb_s": memory, "can_compile": can_compile}
    return sd.Results(environment, sd.Settings(**given | settings), tuple(methods), contenders, prompts)


def printed(results, tokenizer=None, width=120):
    """All that is printed of results: headings, each prompt, and the report. The JSON is the same before and after."""
    console, told = console_of(width, color_system=None), sd.to_json(results)
    with console.capture() as capture:
        sd.print_figures(console, sd.PROMPT_COLUMNS, "  # prompt", {}, results.methods)
        for result in results.prompts:
            sd.print_prompt(console, results, result, tokenizer)
        sd.print_report(console, results)
    assert max(map(len, capture.get().splitlines())) <= width and sd.to_json(results) == told
    return capture.get()


def sentences(results):
    """Those at the end of the report, each on a line of its own."""
    return printed(results, width=4000).rpartition("\n\n")[2].splitlines()


def spoken(word, results):
    """The one sentence that has this word, or None."""
    found = [line for line in sentences(results) if word in line] or [None]
    assert len(found) == 1
    return found[0]


def table_of(text, title):
    """The headings of a table, and its cells by the labels, without spaces within cells."""
    lines = text[text.index(title) :].replace(" %", "%").partition("\n\n")[0].splitlines()
    headings = lines[0].removeprefix(title).split()
    rows = [line.rsplit(maxsplit=len(headings)) for line in lines[1:]]
    return headings, {label.strip(): cells for label, *cells in rows}


def judged_as(kind, gap=0.1, at_fault=None, why=None, index=16, label="K = 3"):
    """An outcome with this verdict."""
    found = sd.Divergence(index, 4, 5, gap, 0.0625, 0.25, kind, at_fault) if kind in ("tie", "mismatch") else None
    return outcome_of(RUNS[label], kind, found, why)


def replay_of(chances):
    """The replay of a draft model whose token has these chances, behind each token of a text."""
    behind = [*chances, *[0.0] * sd.LONGEST]
    rows = [behind[place : place + sd.LONGEST] for place in range(len(chances))]
    return sd.Replay(numpy.array(rows), numpy.full(len(chances), sd.LONGEST))


# The JSON


def json_of(results):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(sd.to_json(results), parse_constant=refuse)


def test_the_json_of_a_real_run_holds_what_the_design_promises(demo):
    _, told = demo
    assert list(told) == "schema environment settings methods drafts complete prompts".split()
    assert told["schema"] == 3 and told["complete"] is True
    about = "device device_name threads cores processes python torch transformers compiled can_compile "
    assert set(told["environment"]) == {*about.split(), "memory_bandwidth_gb_s"}
    assert 0.5 < told["environment"]["memory_bandwidth_gb_s"] < 20_000
    kinds = sd.Settings, sd.DraftFigures, sd.Figures
    of_settings, of_draft, figures = ({field.name for field in dataclasses.fields(kind)} for kind in kinds)
    assert set(told["settings"]) == of_settings and [set(draft) for draft in told["drafts"]] == [of_draft]
    labels, name = ["baseline", "K = 3", "K = auto"], told["settings"]["draft"][0]
    for method, *about in zip(told["methods"], labels, (None, name, name), (None, 3, "auto"), strict=True):
        assert list(method) == "label draft draft_tokens library error summary categories".split()
        assert list(method.values())[:5] == [*about, None, None] and set(method["summary"]) == figures
    for number, prompt in enumerate(told["prompts"], 1):
        names = "number question_id category prompt prompt_tokens replays outcomes"
        assert list(prompt) == names.split() and list(prompt.values())[:3] == [number, None, None]
        assert {draft: len(rounds) for draft, rounds in prompt["replays"].items()} == {name: sd.LONGEST}
        assert list(prompt["outcomes"]) == labels and prompt["prompt_tokens"] > 3
        for did in prompt["outcomes"].values():
            names = "error figures token_ids text latencies_s rounds verdict divergence unchecked"
            assert set(did) == set(names.split()) and set(did["figures"]) == figures
            assert did["verdict"] == "identical" and did["divergence"] is did["error"] is did["unchecked"] is None
            assert len(did["token_ids"]) == did["figures"]["new_tokens"] and did["text"]
            assert len(did["latencies_s"]) == 1
            assert list(did["rounds"]) == list(sd.Round._fields)


def test_the_json_says_what_each_method_did():
    tie, half = judged_as("tie", 0.125), sd.Outcome("CUDA out of memory.", (RUNS["K = auto"],), "a text")
    first = result_of(question=sd.Question("Who?", 7, (1, 2), category="c", question_id="q"), fixed=tie, auto=half)
    last = result_of(3, own=failed("the disk is gone"), fixed=judged_as("unchecked", why="no baseline"))
    told = json_of(results_of(first, result_of(2, fixed=failed()), last))
    first, second, last = told["prompts"]
    about = {"number": 7, "question_id": "q", "category": "c", "prompt": "Who?", "prompt_tokens": 2, "replays": {}}
    assert {key: value for key, value in first.items() if key != "outcomes"} == about and not told["complete"]
    did = first["outcomes"]["K = 3"]
    assert (did["verdict"], did["text"], did["token_ids"]) == ("tie", "a text", list(TOKENS))
    assert did["divergence"] == dataclasses.asdict(tie.divergence) and did["rounds"]["accepted"] == [3, 1, 0]
    did = first["outcomes"]["K = auto"]  # what a method did before it failed is there; it has no figures
    assert (did["error"], did["figures"], did["verdict"]) == ("CUDA out of memory.", None, None)
    assert did["token_ids"] == list(TOKENS) and did["rounds"]["drafted"] == [4, 4, 4]
    known = {key: value for key, value in second["outcomes"]["K = 3"].items() if value is not None}
    assert known == {"error": "CUDA out of memory.", "latencies_s": [], "rounds": dict.fromkeys(sd.Round._fields, [])}
    did = last["outcomes"]["K = 3"]
    assert (did["verdict"], did["unchecked"], did["figures"]["speedup_percent"]) == ("unchecked", "no baseline", None)
    assert [method["summary"]["prompts"] for method in told["methods"]] == [2, 1, 1, 2]


def test_nothing_that_is_not_finite_reaches_the_json():
    """Wherever it stands: in records of any kind, and what follows from them."""
    bad, odd = [math.nan, math.inf, -math.inf], sd.Contender("D", None, (math.inf, math.nan, 0.1))
    run = generation_of(TOKENS, 0.5, math.nan, [(3, 1, *bad)] * 3, -math.inf)
    broken = outcome_of(run, "tie", sd.Divergence(1, 2, 3, *bad, "tie", None))
    methods, replays = (BASELINE, sd.Method("K = 3", None, odd, 3)), {"D": replay_of([math.nan] * 10)}
    arguments = {"contenders": (odd,), "memory": math.nan, "chat_template_args": {"x": [math.inf]}}
    told = json_of(results_of(result_of(1, PAIR, fixed=broken, replays=replays), methods=methods, **arguments))
    assert told["environment"]["memory_bandwidth_gb_s"] is None
    assert told["settings"]["chat_template_args"] == {"x": [None]} and told["drafts"][0]["costs"] == [None, None, 0.1]
    did = told["prompts"][0]["outcomes"]["K = 3"]
    assert [did["divergence"][name] for name in ("gap", "baseline_gap", "noise")] == [None] * 3
    assert did["rounds"]["seconds"] == [None] * 3 and did["figures"]["log_likelihood"] is None
    assert told["prompts"][0]["replays"]["D"] == [None] * 15


def test_a_prompts_json_and_figures_are_made_once(monkeypatch):
    """However often it is printed and saved: what is made of one prompt is counted."""
    made = Counter()

    def count(name, is_of_one_prompt):
        real = getattr(sd, name)

        def counted(*given):
            made[name] += is_of_one_prompt(given[0])
            return real(*given)

        monkeypatch.setattr(sd, name, counted)

    count("figures_of", lambda prompts: len(prompts) == 1)
    count("replayed", lambda replay: True)
    count("finite", lambda figure: isinstance(figure, dict) and "outcomes" in figure)  # the last step to the JSON
    results = replayed(result_of(1), result_of(2), result_of(3))
    for prompts in (2, 2, 3, 3):
        printed(dataclasses.replace(results, prompts=results.prompts[:prompts]))
        assert (made["figures_of"], made["finite"]) == (4 * prompts, prompts) and made["replayed"] <= 3 * prompts


def measured(llama, monkeypatch, labels=("baseline",), prompt_s=1.0, save_s=0.0, stderr=None, **question):
    """Forty prompts of a real model, by a clock of the test's own: when it saved, (begun, ended); what it printed."""
    seconds, saves, out = [1000.0], [], io.StringIO()
    clock = types.SimpleNamespace(monotonic=lambda: seconds[0], perf_counter=lambda: seconds[0])

    def decode(prompt):
        run = baseline(llama, prompt.ids, 2)
        seconds[0] += prompt_s / len(labels)
        return run

    def save(results):
        saves.append((seconds[0], seconds[0] + save_s))
        seconds[0] += save_s

    monkeypatch.setattr(sd, "time", clock)
    monkeypatch.setattr(sd, "save_json", save)
    questions = [dataclasses.replace(prompt_of([5, 9], number, 2), **question) for number in range(1, 41)]
    models = sd.Models(sd.CachedModel(llama), (), sd.Greedy(), None)
    results = results_of(methods=[sd.Method(label, decode) for label in labels], warmup=0)
    ready = sd.Ready(results, questions, models, console_of(file=out), stderr or console_of(file=io.StringIO()))
    results, problem = sd.measure(ready, sd.Peers())
    assert problem is None and results.complete and len(results.prompts) == 40
    return saves, out.getvalue()


@pytest.mark.parametrize(("prompt_s", "save_s", "pause_s"), [(1.0, 0.01, 5.0), (10.0, 10.0, 90.0)])
def test_saving_takes_a_tenth_of_the_time_at_most(llama, monkeypatch, prompt_s, save_s, pause_s):
    """Every five seconds, or less often the longer a save takes; the first prompt is saved at once."""
    saves, _ = measured(llama, monkeypatch, prompt_s=prompt_s, save_s=save_s)
    pauses = [begun - ended for (_, ended), (begun, _) in itertools.pairwise(saves)]
    assert saves[0][0] == 1000.0 + prompt_s and len(pauses) >= 3
    assert all(pause_s <= pause < pause_s + prompt_s + 0.01 for pause in pauses[:-1])  # the last is at the end


def test_names_that_run_along_are_safe(llama, monkeypatch):
    """On a terminal, the progress line says what is run: with rich's own escapes, and no others."""
    stderr = console_of(200, file=io.StringIO(), force_terminal=True, color_system=None)
    names = "models/\x1b[2J\x07", "ngram"
    labels = "baseline", f"{sd.short_name(names[0], sd.Settings(draft=names))}K = 3"
    _, out = measured(llama, monkeypatch, labels, stderr=stderr, text=HOSTILE, question_id=HOSTILE)
    progress = stderr.file.getvalue()
    assert f"39 of 40 prompts done, now {HARMLESS}: baseline" in progress and ": �[2J�, K = 3" in progress
    assert out.count(f"{HARMLESS} {HARMLESS}\n") == out.count("    �[2J�, K = 3 ") == 40
    assert not any(hostile in out + progress for hostile in ("\x1b[2J", "\x07", "\u202e"))


# The exit status


def test_the_exit_status():
    """A failure of the library is none of ours."""
    wrong, gone = judged_as("mismatch", 3.0, "both"), judged_as("unchecked", why="CUDA out of memory.")
    for fixed in map(judged_as, ("identical", "tie", "sampled")):
        assert sd.exit_status(results_of(result_of(1), result_of(2, fixed=fixed))) == 0
    for fixed in (wrong, gone, failed()):
        for other in ({"fixed": fixed}, {"own": fixed}):
            assert sd.exit_status(results_of(result_of(1), result_of(2, **other))) == 1
        assert sd.exit_status(results_of(result_of(1, library=fixed))) == 0
    nothing = results_of(result_of(1, own=failed(), fixed=failed("worse"), auto=failed()))
    with pytest.raises(sd.UsageError, match=r"no prompt could be decoded \(CUDA out of memory\.\)"):
        sd.exit_status(nothing)


# Tables


def test_numbers():
    values = {0.01234: "0.012", 0.5: "0.500", 3.14159: "3.14", 42.42: "42.4", 1234.5: "1234", -7.654: "-7.65"}
    assert {value: sd.three_digits(value) for value in values} == values
    assert sd.three_digits(None) == sd.percent(None) == sd.share(None) == "–" == str(sd.gain(None))
    assert (sd.percent(12.4, "+"), sd.percent(-12.6, "+"), sd.share(0.719)) == ("+12 %", "-13 %", "72 %")
    assert (sd.gain(3.0).style, sd.gain(-3.0).style) == ("green", "red")
    assert sd.counted(1, "layer") == "1 layer" and sd.counted(2048, "layer") == "2,048 layers"


def test_the_rows_of_prompts_and_their_mean():
    first = result_of(question=sd.Question("first\n\x1b[2J  line", 1, ids=(1,)))
    lines = [line.rstrip() for line in printed(results_of(first, result_of(2, factor=2.0))).splitlines()]
    assert lines[0].split() == ["#", "prompt", *sd.PROMPT_COLUMNS]
    assert lines[1] == "  1 first �[2J line" and lines[6] == "  2 What?" and lines[11] == "    mean"
    expected = {
        2: "    baseline 11 1.00 0.010 11.0 – – – – yes",
        3: "    K = 3 11 0.500 0.010 22.0 +100 % 44 % 3.33 -1.00 yes",
        5: "    generate() 11 1.00 – 11.0 +0 % – – – yes",
        12: "    baseline 11 1.50 0.015 7.33 – – – – 2/2",
        14: "    K = auto 11 1.50 0.030 7.33 +0 % 75 % 3.33 -0.500 2/2",
    }
    for place, row in expected.items():
        assert lines[place].split() == row.split() and lines[place][:9] == row[:9]
        assert len(lines[place]) == len(lines[0])  # they end where their headings do
    assert "    mean\n" not in printed(results_of(result_of(1)))


def test_methods_by_speed_and_the_best_by_category():
    questions = [sd.Question("?", n, ids=(1,), category=kind) for n, kind in enumerate((HOSTILE, "b", "b"))]
    prompts = [result_of(question=of, factor=factor) for of, factor in zip(questions, (1.0, 3.0, 3.0), strict=True)]
    text = printed(results_of(*prompts))
    headings, rows = table_of(text, "By speed")
    assert headings == [*sd.SUMMARY_COLUMNS] and list(rows) == ["K = 3", "K = auto"]
    # A baseline step of (0.99 + 2.97 + 2.97) / 30 s; c = 0.01 and v = 0.1 s; decoding of 6.93 and 3.43 s.
    c, v = 0.01 / (6.93 / 30), 0.1 / (6.93 / 30)
    expected = f"9.43 +100% {100 * (6.93 / 3.43 - 1):+.0f}% – 3.33 0.667 {c:.3f} {v:.3f}"
    assert rows["K = 3"] == expected.split() and rows["K = auto"][:2] == ["4.71", "+0%"]
    headings, rows = table_of(text, "By category")
    assert headings == [*sd.SUMMARY_COLUMNS] and list(rows) == [HARMLESS, "b"]
    assert [cells[0] for cells in rows.values()] == ["22.0", "7.33"]  # of K = 3, the fastest


def test_whether_a_text_is_the_same_is_one_word():
    words = {"identical": "yes green 2/2", "tie": "tie yellow 0/2", "mismatch": "NO bold red 0/2"}
    for kind, word in (words | {"unchecked": "? bold red 0/2", "sampled": "sampled  sampled"}).items():
        one, two = (sd.figures_of([result_of(fixed=judged_as(kind))] * count, FIXED).verdict for count in (1, 2))
        assert f"{one} {sd.in_colour(one).style} {two}" == word


def test_a_method_that_failed_is_a_line_that_says_why():
    """In its prompt; if its draft could not run at all, once for all prompts, by a name that is safe."""
    gone = sd.Contender("x/\x1b[2Jgone", None, error="it is gone")
    prompts = [result_of(1, fixed=failed("why not"), auto=failed()), result_of(2)]
    for result in prompts:
        result.outcomes["gone, K = 3"] = failed("it is gone")
    methods = (*METHODS, sd.Method("gone, K = 3", None, gone, 3))
    lines = printed(results_of(*prompts, methods=methods, contenders=(DRAFT, gone))).splitlines()
    at = lines.index("    K = 3: why not")
    assert lines[at + 1] == "    K = auto: CUDA out of memory." and lines[at + 2] == "  2 What?"
    assert [line for line in lines if "it is gone" in line] == ["    x/�[2Jgone: it is gone"]


WIDEST = generation_of(range(99999), 12345.6, 1234.5, [(3, 3, 1.0, 2.0, 4.0)] * 30, -12.3 * 90)


@pytest.mark.parametrize("width", [40, 50, 60, 80, 100, 160])
@pytest.mark.parametrize("draft", ["", "gemma-2-2b-it, "])
def test_columns_are_left_out_in_order_and_no_figure_is_cut(width, draft):
    """The widest figures. Of a label, at least 12 characters can be read; from 80 columns on, which K it is."""
    slow = dataclasses.replace(WIDEST, latency_s=12345.6 * 13.345, rounds=(), log_likelihood=0.0)
    methods = (BASELINE, dataclasses.replace(FIXED, label=f"{draft}K = 3"))
    question = sd.Question("A prompt of some length that must be cut " * 9, 123, ids=(1,))
    result = result_of(1, methods, question=question, own=outcome_of(slow), fixed=outcome_of(WIDEST))
    text = printed(results_of(result, methods=methods), width=width)
    line, step_s = text.splitlines()[1], (12345.6 * 13.345 - 1234.5) / 99998
    assert line.startswith("123 A prompt of some length") and line.endswith("…") and len(line) == width
    cells = "99999 12346 1234 8.10 +1234% 100% 3333 -12.3 yes".split()
    below = [f"{100 * (step_s * 99998 / 11111.1 - 1):+.0f}%", *"– 3333 1.00".split()]
    below = ["8.10", "+1234%", *below, f"{1 / 3 / step_s:.3f}", f"{2 / step_s:.2f}"]
    for title, columns, values in (("  # prompt", sd.PROMPT_COLUMNS, cells), ("By speed", sd.SUMMARY_COLUMNS, below)):
        headings, rows = table_of(text, title)
        gone = [heading for heading in sd.LEFT_OUT_FIRST if heading in columns][: len(columns) - len(headings)]
        assert headings == [heading for heading in columns if heading not in gone] and (width < 100 or not gone)
        label, found = rows.popitem()
        assert found == [value for heading, value in zip(columns, values, strict=True) if heading in headings]
        assert label == methods[1].label or (width < 80 and label.endswith("…") and len(label) >= 12)


def test_as_many_prompts_as_a_file_can_have_are_counted_uncut():
    """In the last column, and in the label, which says over how many. A long category gives way."""
    row = dataclasses.replace(sd.prompt_figures(result_of(), FIXED), prompts=1000, identical=1000, new_tokens=11000)
    results = results_of(*[result_of()] * 1001)
    for width in (40, 80, 120):
        console = console_of(width, color_system=None)
        with console.capture() as capture:
            rows = sd.over_how_many(results, {"K = 3": row})
            sd.print_figures(console, sd.PROMPT_COLUMNS, "", rows, results.methods)
        assert capture.get().rstrip().endswith(" 1000/1000")
        assert width < 80 or capture.get().startswith("    K = 3 (1000 of 1001) ")
    questions = [sd.Question("?", number, ids=(1,), category=kind) for number, kind in ((1, "c" * 100), (2, "short"))]
    _, rows = table_of(printed(results_of(*(result_of(question=of) for of in questions)), width=80), "By category")
    assert rows["short"] in rows.values() and [label[:5] for label in rows] == ["ccccc", "short"]


# A draft by K, replayed

RIGHT = [1.0, 1.0, 1.0, 0.0] * 2 + [1.0, 1.0]  # of which K = 3 makes 3 rounds


def replayed(*prompts, contenders=(DRAFT,), methods=METHODS):
    """Results whose prompts are replayed with all drafts that there are."""
    replays = {of.name: replay_of(RIGHT) for of in contenders if not of.error}
    made = [dataclasses.replace(result, replays=replays) for result in prompts]
    return results_of(*made, methods=methods, contenders=contenders)


def test_by_k_replayed():
    """Ten steps of 0.1 s become 5, 5, 3 and 3 rounds. What has no cost has no figure."""
    results = replayed(result_of(1), result_of(2))
    seconds = (5 * 0.125, 5 * 0.15, 3 * 0.2, 3 * 0.3, 0.2 + 0.2 + 0.125)
    *gains, oracle = [f"{100 * (1 / each - 1):+.0f}%" for each in seconds]
    headings, rows = table_of(printed(results), "By K, replayed")
    assert headings == "1 2 3 4 6 8 12 15".split()
    assert rows == {"draft": [*gains[:2], f"{gains[2]}*", gains[3], *["–"] * 4]}
    assert table_of(printed(results), "By speed")[1]["K = 3"][3] == gains[2]  # predicted
    said = spoken("Replayed", results).replace(" %", "%")
    assert f"is 3: {gains[2]}" in said and oracle in said and "K = auto gave +1%" in said
    assert "gave" not in spoken("Replayed", replayed(result_of(1, PAIR), methods=PAIR))  # without auto
    assert "By K" not in printed(results_of(result_of())) and spoken("Replayed", results_of(result_of())) is None


def test_by_k_of_several_drafts_on_a_narrow_terminal():
    """A row a draft, but for one that failed, or whose replay did. No figure is cut."""
    long = sd.Contender("x/a\x1b[2J-long-draft", None, tuple(0.1 + k / 1e3 for k in range(16)))
    gone, broken = sd.Contender("gone", None, error="it is gone"), sd.Contender("broken", None, COSTS)
    methods = (BASELINE, FIXED, sd.Method("a�[2J-long-draft, K = 3", None, long, 3))
    results = replayed(result_of(1, methods), contenders=(DRAFT, long, gone), methods=methods)
    results = dataclasses.replace(results, contenders=(*results.contenders, broken))
    whole, rows = table_of(printed(results), "By K, replayed")
    assert list(rows) == ["D", "a�[2J-long-draft"] and all("*" in "".join(cells) for cells in rows.values())
    for width, most in ((80, 8), (60, 7), (40, 3)):
        headings, cut = table_of(printed(results, width=width), "By K, replayed")
        assert headings == [k for k in whole if k in headings] and 1 < len(headings) <= most
        for (label, cells), (whole_label, all_cells) in zip(cut.items(), rows.items(), strict=True):
            assert label[:11] == whole_label[:11] and cells == [all_cells[whole.index(k)] for k in headings]
    assert "of x/a�[2J-long-draft is 3" in spoken("Replayed", results)  # the best K of the best draft
    assert [draft["best_draft_tokens"] for draft in json_of(results)["drafts"]] == [3, 3, None, None]


def test_a_measured_k_that_differs_from_its_replay():
    """By more than the prompts differ among each other, and than 5 points: the replay says +67 %, it was +102 %."""
    words, said = ("K = 3", "+102 %", "+67 %"), spoken("its replay", replayed(result_of(1), result_of(2)))
    assert all(word in said for word in words)
    fast, near = changed("K = 3", latency_s=0.3), changed("K = 3", latency_s=0.602)
    for alike in (
        replayed(result_of(1), result_of(2, fixed=fast)),  # they differ by more
        replayed(result_of(1, fixed=near), result_of(2, fixed=near)),
        replayed(result_of(1)),  # of one prompt, there is no spread
        results_of(result_of(1), result_of(2)),
    ):
        assert spoken("its replay", alike) is None


# Hostile text, and texts


def test_text_from_outside_is_made_safe(tokenizer):
    """In prompts, ids and outputs: no escapes, no overrides, no markup that is obeyed."""
    assert sd.safe(f"{HOSTILE}\n") == f"{HARMLESS}\n" and sd.plain(f" {HOSTILE}\n  y ") == f"{HARMLESS} y"
    assert sd.one_line(ValueError(f"{HOSTILE}\nbad")) == f"{HARMLESS} bad" and sd.one_line(KeyError()) == "KeyError"
    question = sd.Question(f"{HOSTILE} :smile: ?", 1, (1,), question_id=HOSTILE)
    ids = tokenizer(HOSTILE, add_special_tokens=False)["input_ids"]
    second = result_of(2, fixed=outcome_of(generation_of(ids, 0.5, 0.1, [(len(ids) - 1, len(ids) - 1, 0.1, 0.1, 0.2)])))
    text = printed(results_of(result_of(question=question, fixed=judged_as("tie")), second, show_text=True), tokenizer)
    assert not set(text) & {"\x1b", "\u202e", "\x07", "\u200b"}
    assert text.splitlines()[1] == f"{HARMLESS} {HARMLESS} :smile: ?" and HARMLESS in text.splitlines()
    assert f"The largest: prompt {HARMLESS}, K = 3, new token 17" in " ".join(text.split())


def shown(run, console, tokenizer):
    with console.capture() as capture:
        sd.print_text(console, tokenizer, run)
    return capture.get()


def test_show_text_says_where_each_token_comes_from(tokenizer):
    ids = tokenizer("Sort the list in place.", add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode(ids[: n + 1])[len(tokenizer.decode(ids[:n])) :] for n in range(len(ids))]
    assert len(pieces) >= 6
    run = generation_of(ids[:7], rounds=[(2, 1), (2, 2), (0, 0), (1, 1)])  # the last one is cut off
    marked = [pieces[0], pieces[1], f"«{pieces[2]}»", pieces[3], pieces[4], f"‹{pieces[5]}›", *pieces[6:7]]
    text, _, legend = shown(run, console_of(200), tokenizer).partition("\n")
    assert text == "".join(marked)
    legend = re.split(" {2,}", legend.strip())
    assert [each[0] for each in legend] == ["a", "«", "‹", "i"] and "nothing drafted" in legend[3]
    coloured = console_of(100, force_terminal=True, color_system="standard", no_color=False)
    text = shown(run, coloured, tokenizer)
    for code, piece in (("32", pieces[1]), ("1;31", f"«{pieces[2]}»"), ("36", f"‹{pieces[5]}›")):
        assert f"\x1b[{code}m{piece}\x1b[0m" in text


def test_show_text_with_characters_of_several_tokens(tokenizer):
    ids = tokenizer("é日本\n", add_special_tokens=False)["input_ids"]
    assert len(ids) > len("é日本\n")  # in bytes
    run = generation_of(ids, rounds=[(len(ids) - 1, len(ids) - 1)])
    assert shown(run, console_of(100), tokenizer).startswith("é日本\n")
    half = generation_of(ids[:1], rounds=[])  # the text may end within one: a sign says so
    assert shown(half, console_of(100), tokenizer).startswith("�\n")


def test_the_texts_of_our_methods_are_shown_below_their_prompt(tokenizer):
    text = printed(results_of(result_of(1, auto=failed()), show_text=True), tokenizer)
    assert [text.count(f"\n{label}:\n") for label in NAMES] == [0, 1, 0, 0, 0] and "accepted draft" in text
    assert "accepted draft" not in printed(results_of(result_of(1)), tokenizer)


# The sentences: each where it is true, and silent where it is not


def numbered(*outcomes, **how):
    """Results whose K = 3 have these outcomes, of prompts 1, 2, …; without other methods but the baseline."""
    return results_of(*(result_of(n, PAIR, fixed=each) for n, each in enumerate(outcomes, 1)), methods=PAIR, **how)


def alone(own, fixed):
    """Results of one prompt, with these outcomes of the baseline and of K = 3."""
    return results_of(result_of(1, PAIR, own=own, fixed=fixed), methods=PAIR)


def of_two_drafts(*latencies):
    """Results of a and b with K = 3 and 4, which took so long, or failed (None)."""
    drafts, outcomes = [sd.Contender(name, None, COSTS) for name in "ab"], {"baseline": outcome_of(RUNS["baseline"])}
    methods = [BASELINE, *(sd.Method(f"{of.name}, K = {k}", None, of, k) for of in drafts for k in (3, 4))]
    for method, latency_s in zip(methods[1:], latencies, strict=True):
        outcomes[method.label] = changed("K = 3", latency_s=latency_s) if latency_s else failed()
    return results_of(sd.Result(sd.Question("?", 1, ids=(1,)), outcomes, {}), methods=methods, contenders=tuple(drafts))


def with_library():
    """Results with three methods of the library's."""
    assisted = [sd.Method(label, None, DRAFT, k, "generation") for label, k in (("assist 3", 3), ("assisted", "auto"))]
    methods = (*METHODS, *assisted)
    result = result_of(1, methods[:-1])
    result.outcomes["assisted"] = outcome_of(RUNS["assist 3"])
    return results_of(result, methods=methods)


FAST, SLOW, QUICK = outcome_of(RUNS["K = 3"]), changed("K = 3", latency_s=4.0), changed("K = auto", latency_s=0.01)
IDLE = changed("K = 3", rounds=(sd.Round(0, 0, 0.0, 0.05, 0.05),) * 10, log_likelihood=0.0, latency_s=1.2)
UNTIMED = changed("K = 3", rounds=tuple(sd.Round(k, n, seconds=seconds) for k, n, *_, seconds in ROUNDS))
ONE = {"token_ids": (7,), "rounds": (), "log_likelihood": 0.0, "first_token_s": 0.4}
TIE, WRONG = judged_as("tie", 0.125), [judged_as("mismatch", *how) for how in ((2.0, "both"), (3.0, "baseline"))]
ALIKE, UNCHECKED = judged_as("mismatch", 0.5, "both", index=None), judged_as("unchecked", why="no memory")
APART = results_of(result_of(1, PAIR, own=failed()), result_of(2, PAIR, fixed=failed()), methods=PAIR)
HALF = sd.Outcome("CUDA out of memory.", (RUNS["baseline"],), "a text")  # it failed in its second repeat: not judged
NOT_BOTH = result_of(1, library=failed()), result_of(2, fixed=failed(), auto=failed())
SAMPLED = numbered(judged_as("sampled"))


@pytest.mark.parametrize(
    ("word", "results", "words"),
    [
        ("Speculative", numbered(FAST), "2.00 times as fast. | !over | 3.33 tokens | α = 0.667 | v = 1.01 | c = 0.101"),
        ("Speculative", numbered(FAST, SLOW), "0.44 times | over the prompts 0.25 to 2.00"),
        ("Speculative", numbered(*[FAST] * 9, SLOW), "95 % interval | !over"),
        ("Speculative", numbered(UNTIMED), "2.00 times | !v = | !c ="),
        ("never drafted", numbered(IDLE), "K = 3 never"),
        ("Too few", alone(changed("baseline", **ONE), changed("K = 3", **ONE)), "--max-new-tokens"),
        ("Too few", APART, None),  # more tokens would not help
        ("times as fast", APART, None),
        ("No draft pays", numbered(SLOW, draft_tokens=(3,)), "--draft-tokens auto"),
        ("No draft pays", numbered(SLOW), "!auto"),
        ("No draft pays", numbered(FAST), None),
        # 990 MB in a step of 0.099 s: 10 GB/s
        ("The baseline reads", numbered(FAST, memory=18.0), "10.0 GB | deliver 18.0 | speculation pays"),
        ("The baseline reads", numbered(FAST, memory=40.0), "--compile on"),
        ("The baseline reads", numbered(FAST, memory=40.0, compile="on"), "something else | !--compile"),
        ("The baseline reads", numbered(FAST, memory=40.0, can_compile=False), "something else | !--compile"),
        ("The baseline reads", numbered(FAST, memory=5.0), "cache of the processor"),
        ("The baseline reads", numbered(FAST), None),
        # The best: its lead over the next draft, not over its own other length; none that failed on any prompt
        ("The best", results_of(result_of()), "K = 3: 2.00 times | K = auto. | picked"),
        ("The best", of_two_drafts(0.5, 0.6, 0.8, 4.0), "a, K = 3: 1.60 times | b, K = 3."),
        ("The best", of_two_drafts(None, 0.6, 0.8, 4.0), "a, K = 4: 1.33 times"),
        ("The best", numbered(FAST), None),
        ("The best", results_of(result_of(1, auto=failed()), result_of(2, fixed=failed())), None),
        ("The best", results_of(result_of(1), result_of(2, fixed=failed())), None),
        ("The best", results_of(result_of(1), result_of(2, own=failed(), auto=QUICK)), "K = 3: 2.00 times"),
        # Each method of the library is compared with ours of the same draft and K, over the prompts that both decoded
        ("generate()", with_library(), "K = 3 was 2.00 times"),
        ("assist 3", with_library(), "K = 3 was 1.60 times"),
        ("assisted:", with_library(), "K = auto was 0.800 times"),
        ("generate()", results_of(result_of(library=failed())), None),
        ("generate()", results_of(result_of(1), result_of(2, fixed=IDLE, auto=SLOW, library=failed())), "3 was 2.00"),
        ("generate()", results_of(*NOT_BOTH), None),
        # Whether it is right: our outputs, or the baseline's where none of ours ran
        ("token for token", numbered(FAST), "1 of 1"),
        ("token for token", numbered(FAST, TIE), "1 of 2"),
        ("token for token", numbered(*WRONG, ALIKE, UNCHECKED), None),
        ("token for token", results_of(result_of(library=WRONG[0])), "2 of 2"),
        ("token for token", numbered(failed(), failed()), "2 of 2"),
        ("token for token", SAMPLED, None),
        ("Sampled", SAMPLED, "distribution"),
        ("main model's own", alone(HALF, HALF), None),
        ("Ties", numbered(FAST, TIE), ": 1 of 2 | prompt 2, K = 3, new token 17, | 0.125 | 0.0625 | noise 0.25"),
        ("Ties", numbered(*WRONG), None),
        (
            "Mismatches",
            numbered(*WRONG, ALIKE),
            ": 3 of 3 | prompt 2, K = 3, new token 17, at fault: baseline | gap 3 ",
        ),
        ("Mismatches", numbered(ALIKE), "both alike, at fault: both"),
        ("Could not be checked", numbered(ALIKE, UNCHECKED, UNCHECKED), "2 of 3 | no memory"),
        ("Could not be checked", alone(UNCHECKED, failed()), "1 of 1"),
    ],
)
def test_a_sentence_is_said_where_it_is_true(word, results, words):
    """The one sentence with a word has further words, but none that stands behind a !; None: there is no such."""
    said = spoken(word, results)
    assert (said is None) == (words is None)
    for each in (words or "").split(" | "):
        assert each.removeprefix("!") not in said if each.startswith("!") else each in (said or "")


def test_a_row_says_over_how_many_prompts_it_is():
    results = results_of(result_of(1), result_of(2, fixed=failed()), result_of(3))
    for width in (80, 120):
        text = printed(results, width=width)
        mean = text[text.index("    mean\n") :]
        assert "\n    K = 3 (2 of 3) " in mean and "\n    baseline " in mean and "2/2" in mean
        assert list(table_of(text, "By speed")[1]) == ["K = auto", "K = 3 (2 of 3)"]


# A real run


def test_the_report_of_a_real_run(demo):
    """What is printed is what the JSON says: each prompt's rows, the mean's, and the sentences."""
    done, told = demo
    text = done.stdout[done.stdout.index("  # prompt ") :]
    labels = [method["label"] for method in told["methods"]]
    rows = [prompt["outcomes"][label]["figures"] for prompt in told["prompts"] for label in labels]
    rows += [method["summary"] for method in told["methods"]]
    lines = [line for line in text.splitlines()[1:] if line.startswith("    ") and line != "    mean"]
    for line, row, label in zip(lines, rows, labels * 6, strict=True):
        cells = [str(round(row["new_tokens"] / row["prompts"]))]
        cells += [sd.three_digits(row[name]) for name in ("latency_s", "time_to_first_token_s", "tokens_per_s")]
        cells += [sd.percent(row["speedup_percent"], "+"), sd.share(row["acceptance_rate"])]
        cells += [sd.three_digits(row[name]) for name in ("mean_acceptance_length", "log_likelihood_per_token")]
        assert line.split() == " ".join([label, *cells, "yes" if row["prompts"] == 1 else "5/5"]).split()
    best = max(told["methods"][1:], key=lambda method: method["summary"]["tokens_per_s"])
    assert f"\nThe best in this run was {best['label']}: " in text and "10 of 10 outputs" in text
    headings, replays = table_of(text, "By K, replayed")
    gains = [row["speedup_percent"] for row in told["drafts"][0]["by_draft_tokens"]]
    assert [cell.rstrip("*") for cell in replays["draft"]] == [f"{gains[int(k) - 1]:+.0f}%" for k in headings]

"""The report: the JSON, the tables, the texts and every sentence, as they follow from the results."""

import copy
import dataclasses
import json
import re

import pytest
import transformers
from helpers import ROOT, generation_of
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


BASELINE = sd.Method("baseline", None, step_bytes=990_000_000)
FIXED = sd.Method("K = 3", None, "D", 3)
AUTO = sd.Method("K = auto", None, "D", "auto", costs=[0.1, 0.2, 0.3])
GENERATE = sd.Method("generate()", None, library="transformers' generate(), eager")
ASSISTED = sd.Method("assist 3", None, "D", 3, "transformers' assisted generation, K = 3, eager")
METHODS = (BASELINE, FIXED, AUTO, GENERATE)
TOKENS = tuple(range(10, 21))
ROUNDS = [(3, 3, 0.03, 0.1, 0.15), (3, 1, 0.03, 0.1, 0.15), (3, 0, 0.03, 0.1, 0.15)]
RUNS = {
    "baseline": generation_of(TOKENS, 1.0, 0.01),
    "K = 3": generation_of(TOKENS, 0.5, 0.01, ROUNDS, -9.0),
    "K = auto": generation_of(TOKENS, 1.0, 0.02, [(4, 3, 0.1, 0.2, 0.3)] * 3, -6.0),
    "generate()": generation_of(TOKENS, 1.0),
    "assist 3": generation_of(TOKENS, 0.8),
}


def outcome_of(run, verdict="identical", divergence=None, why=None):
    return sd.Outcome((run,), "a text", sd.Verdict(verdict, divergence, why))


def result_of(number=1, methods=METHODS, factor=1.0, question=None, **changed):
    """What the methods did with a prompt, `factor` times as slow; `changed`: outcomes by "fixed", "auto", …"""
    names = {"baseline": "own", "K = 3": "fixed", "K = auto": "auto", "generate()": "library", "assist 3": "assisted"}
    outcomes = {}
    for method in methods:
        run = RUNS[method.label.rpartition(", ")[2]]
        first_token_s = run.first_token_s and run.first_token_s * factor
        run = dataclasses.replace(run, latency_s=run.latency_s * factor, first_token_s=first_token_s)
        outcomes[method.label] = changed.get(names.get(method.label), outcome_of(run))
    return sd.Result(question or sd.Question("What?", number, ids=(1, 2, 3)), outcomes)


def results_of(*prompts, methods=METHODS, memory=None, complete=True, can_compile=True, **settings):
    given = {"main": "M", "draft": ("D",), "draft_tokens": (3, "auto"), "compile": "off"} | settings
    environment = {"device": "cpu", "memory_bandwidth_gb_s": memory, "can_compile": can_compile}
    return sd.Results(environment, sd.Settings(**given), tuple(methods), prompts, complete)


def printed(results, tokenizer=None, width=120, console=None):
    """All that is printed of results: headings, each prompt, and the report."""
    console = console or console_of(width, color_system=None)
    with console.capture() as capture:
        sd.print_table(console, sd.PROMPT_COLUMNS, "  # prompt", {}, sd.label_width(results.methods))
        for result in results.prompts:
            sd.print_prompt(console, results, result, tokenizer)
        sd.print_report(console, results)
    json.dumps(sd.to_json(results), allow_nan=False)  # whatever it reports
    return capture.get()


def sentences(results):
    """Those at the end of the report, each on a line of its own."""
    return printed(results, width=4000).rpartition("\n\n")[2].splitlines()


def spoken(prefix, results):
    """The one sentence that begins so, or None."""
    found = [line for line in sentences(results) if line.startswith(prefix)]
    assert len(found) <= 1
    return found[0] if found else None


def changed(label, **fields):
    """An outcome of one of the runs above with other fields."""
    return outcome_of(dataclasses.replace(RUNS[label], **fields))


def failed(why="CUDA out of memory."):
    return sd.Outcome(error=why)


def divergence(kind, gap, at_fault=None, index=16, noise=0.25):
    return sd.Divergence(index, 4, 5, gap, 0.0625, noise, kind, at_fault)


def judged_as(kind, gap=0.1, at_fault=None, why=None, label="K = 3", **where):
    """An outcome of K = 3 with this verdict."""
    found = divergence(kind, gap, at_fault, **where) if kind in ("tie", "mismatch") else None
    return outcome_of(RUNS[label], kind, found, why)


# The JSON

FIGURES = """prompts new_tokens latency_s tokens_per_s time_to_first_token_s time_per_output_token_s speedup_percent
decode_speedup_percent speedup_range_percent speedup_interval_percent rounds drafted accepted acceptance_rate alpha
mean_acceptance_length acceptance_by_position log_likelihood log_likelihood_per_token draft_cost verify_cost
predicted_speedup_percent ideal_speedup_percent speedup_if_percent break_even_alpha weight_bandwidth_gb_s identical ties
mismatches unchecked"""
OF_A_METHOD = "label draft draft_tokens library costs error summary categories"
OF_A_PROMPT = "number question_id turn category prompt prompt_tokens outcomes"
OF_AN_OUTCOME = "error figures token_ids text rounds verdict divergence unchecked"


def test_the_json_of_a_real_run_holds_what_the_design_promises(demo):
    _, told = demo
    assert list(told) == "schema environment settings methods prompts complete".split()
    assert told["schema"] == 2 and told["complete"] is True
    about = "device device_name threads processes python torch transformers compiled can_compile compile_s "
    about += "memory_bandwidth_gb_s"
    assert set(told["environment"]) == set(about.split()) and told["environment"]["device"] == "cpu"
    assert 0.5 < told["environment"]["memory_bandwidth_gb_s"] < 20_000
    assert set(told["settings"]) == {field.name for field in dataclasses.fields(sd.Settings)}
    assert told["settings"]["demo"] is True and told["settings"]["draft_tokens"] == [3, "auto"]
    labels = ["baseline", "K = 3", "K = auto"]
    assert [method["label"] for method in told["methods"]] == labels
    drafts = [told["settings"]["draft"][0]] * 2
    assert [method["draft"] for method in told["methods"]] == [None, *drafts]
    assert [method["draft_tokens"] for method in told["methods"]] == [None, 3, "auto"]
    for method in told["methods"]:
        assert set(method) == set(OF_A_METHOD.split()) and set(method["summary"]) == set(FIGURES.split())
        assert method["error"] is method["library"] is None and method["categories"] == {}
    costs = told["methods"][2]["costs"]
    assert told["methods"][0]["costs"] is told["methods"][1]["costs"] is None
    assert len(costs) > max(max(prompt["outcomes"]["K = auto"]["rounds"]["drafted"]) for prompt in told["prompts"])
    assert min(costs) > 0  # the seconds of a round of 0, 1, … draft tokens
    assert [prompt["number"] for prompt in told["prompts"]] == [1, 2, 3, 4, 5]
    for prompt in told["prompts"]:
        assert set(prompt) == set(OF_A_PROMPT.split()) and list(prompt["outcomes"]) == labels
        assert prompt["prompt_tokens"] > 3 and prompt["turn"] is prompt["category"] is prompt["question_id"] is None
        for label, outcome in prompt["outcomes"].items():
            assert set(outcome) == set(OF_AN_OUTCOME.split()) and set(outcome["figures"]) == set(FIGURES.split())
            assert outcome["verdict"] == "identical" and outcome["divergence"] is outcome["error"] is None
            assert len(outcome["token_ids"]) == outcome["figures"]["new_tokens"] and outcome["text"]
            counts = [len(outcome["rounds"][name]) for name in ("drafted", "accepted", "seconds")]
            assert set(counts) == {outcome["figures"]["rounds"] or 0} and (label == "baseline") is (counts[0] == 0)


def test_the_json_says_what_each_method_did():
    tie = divergence("tie", 0.125)
    question = sd.Question("Who?", 7, 2, (1, 2), category="c", question_id="q")
    half = sd.Outcome((RUNS["K = auto"],), "a text", None, "CUDA out of memory.")
    first = result_of(question=question, fixed=outcome_of(RUNS["K = 3"], "tie", tie), auto=half)
    (prompt,) = sd.to_json(results_of(first))["prompts"]
    about = {"number": 7, "question_id": "q", "turn": 2, "category": "c", "prompt": "Who?", "prompt_tokens": 2}
    assert {key: value for key, value in prompt.items() if key != "outcomes"} == about
    told = prompt["outcomes"]["K = 3"]
    assert told["verdict"] == "tie" and told["divergence"] == dataclasses.asdict(tie) and told["text"] == "a text"
    assert told["token_ids"] == TOKENS and told["rounds"] == {
        "drafted": [3, 3, 3],
        "accepted": [3, 1, 0],
        "seconds": [0.15, 0.15, 0.15],
    }
    told = prompt["outcomes"]["K = auto"]  # what a method did before it failed is there; it has no figures
    assert (told["error"], told["figures"], told["verdict"]) == ("CUDA out of memory.", None, None)
    assert told["token_ids"] == TOKENS and told["rounds"]["drafted"] == [4, 4, 4]


def test_the_json_of_a_prompt_that_failed_is_null_and_not_counted():
    """One whose method failed, and one whose baseline did; what was measured of the rest stays as it is."""
    last = result_of(3, own=failed("the disk is gone"), fixed=judged_as("unchecked", why="no baseline"))
    told = sd.to_json(results_of(result_of(1), result_of(2, fixed=failed()), last))
    outcomes = [prompt["outcomes"] for prompt in told["prompts"]]
    assert [each["K = 3"]["error"] for each in outcomes] == [None, "CUDA out of memory.", None]
    assert [each["baseline"]["error"] for each in outcomes] == [None, None, "the disk is gone"]
    assert {key for key, value in outcomes[1]["K = 3"].items() if value is not None} == {"error"}
    assert outcomes[2]["K = 3"]["figures"]["speedup_percent"] is None
    assert (outcomes[2]["K = 3"]["verdict"], outcomes[2]["K = 3"]["unchecked"]) == ("unchecked", "no baseline")
    assert [method["summary"]["prompts"] for method in told["methods"]] == [2, 2, 3, 3]
    assert [method["summary"]["identical"] for method in told["methods"]] == [2, 1, 3, 3]
    gone = sd.to_json(results_of(result_of(1, fixed=failed())))
    assert [method["summary"] is None for method in gone["methods"]] == [False, True, False, False]


def test_the_json_is_a_pure_function_of_the_results():
    results = results_of(result_of(1), result_of(2, fixed=judged_as("mismatch", 3.0, "both")), memory=18.0)
    before = copy.deepcopy(results)
    told = json.dumps(sd.to_json(results), allow_nan=False)
    printed(results)
    assert results == before and json.dumps(sd.to_json(results), allow_nan=False) == told
    other = dataclasses.replace(results, prompts=results.prompts[:1], complete=False)
    told = sd.to_json(other)
    assert told["complete"] is False and len(told["prompts"]) == 1
    assert told["methods"][1]["summary"]["new_tokens"] == 11  # of what there is


def test_categories_have_figures_of_their_own():
    kinds = {1: "a", 2: "b", 3: "a", 4: None}
    prompts = [
        result_of(question=sd.Question("?", number, ids=(1,), category=kind), factor=number)
        for number, kind in kinds.items()
    ]
    for place in (1, 2):
        prompts[place].outcomes["K = auto"] = failed()
    told = sd.to_json(results_of(*prompts))["methods"]
    tokens = [{kind: row["new_tokens"] for kind, row in method["categories"].items()} for method in told]
    assert tokens == [{"a": 22, "b": 11}, {"a": 22, "b": 11}, {"a": 11}, {"a": 22, "b": 11}]
    assert told[0]["categories"]["a"]["latency_s"] == pytest.approx(2.0)


# The exit status


@pytest.mark.parametrize(
    ("fixed", "status"),
    [
        (outcome_of(RUNS["K = 3"]), 0),
        (judged_as("tie"), 0),
        (judged_as("sampled"), 0),
        (judged_as("mismatch", 3.0, "speculative"), 1),
        (judged_as("unchecked", why="CUDA out of memory."), 1),
        (failed(), 1),
    ],
    ids=["all well", "tie", "sampled", "mismatch", "unchecked", "failed"],
)
def test_the_exit_status(fixed, status):
    assert sd.exit_status(results_of(result_of(1), result_of(2, fixed=fixed))) == status


def test_the_exit_status_where_the_baseline_or_the_library_fails():
    assert sd.exit_status(results_of(result_of(1, own=failed()))) == 1
    assert sd.exit_status(results_of(result_of(1, own=judged_as("mismatch", 1.0, "both", label="baseline")))) == 1
    for library in (failed("the library refuses"), judged_as("mismatch", 9.0, "speculative", label="generate()")):
        results = results_of(result_of(1, library=library))
        assert sd.exit_status(results) == 0  # no failure of ours, and still told
        assert not library.error or "    generate(): the library refuses\n" in printed(results)
    nothing = results_of(result_of(1, own=failed(), fixed=failed("worse"), auto=failed()))
    with pytest.raises(sd.UsageError, match=r"no prompt could be decoded \(CUDA out of memory\.\)"):
        sd.exit_status(nothing)


# Tables


def test_numbers():
    values = {
        0.01234: "0.012",
        0.5: "0.500",
        3.14159: "3.14",
        42.42: "42.4",
        1234.5: "1234",
        -7.654: "-7.65",
        0: "0.000",
    }
    assert {value: sd.three_digits(value) for value in values} == values
    assert sd.three_digits(None) == sd.percent(None) == sd.share(None) == "–" == str(sd.gain(None))
    assert (sd.percent(12.4, "+"), sd.percent(-12.6, "+"), sd.percent(71.9), sd.share(0.719)) == (
        "+12 %",
        "-13 %",
        "72 %",
        "72 %",
    )
    assert (sd.gain(3.0).style, sd.gain(-3.0).style) == ("green", "red")
    assert (sd.counted(1, "layer"), sd.counted(2048, "layer")) == ("1 layer", "2,048 layers")


def test_the_rows_of_prompts_and_their_mean():
    first = result_of(question=sd.Question("first\n\x1b[2J  line", 1, ids=(1,)))
    lines = [line.rstrip() for line in printed(results_of(first, result_of(2, factor=2.0))).splitlines()]
    assert lines[0].split() == "# prompt tokens s TTFT tok/s faster accept length log-l. same".split()
    assert lines[1] == "  1 first �[2J line" and lines[6] == "  2 What?" and lines[11] == "    mean"
    expected = {
        2: "baseline | 11 1.00 0.010 11.0 – – – – yes",
        3: "K = 3 | 11 0.500 0.010 22.0 +100 % 44 % 3.33 -1.00 yes",
        4: "K = auto | 11 1.00 0.020 11.0 +0 % 75 % 3.33 -0.500 yes",
        5: "generate() | 11 1.00 – 11.0 +0 % – – – yes",
        12: "baseline | 11 1.50 0.015 7.33 – – – – 2/2",
        13: "K = 3 | 11 0.750 0.015 14.7 +100 % 44 % 3.33 -1.00 2/2",
        14: "K = auto | 11 1.50 0.030 7.33 +0 % 75 % 3.33 -0.500 2/2",
        15: "generate() | 11 1.50 – 7.33 +0 % – – – 2/2",
    }
    for place, row in expected.items():
        label, _, cells = row.partition(" | ")
        assert lines[place].startswith(f"    {label} ") and lines[place].split() == [*label.split(), *cells.split()]
        assert len(lines[place]) == len(lines[0])  # they end where their headings do
    assert printed(results_of(result_of(1))).count("    mean\n") == 0


def test_methods_by_speed_and_the_best_by_category():
    kinds = ["[bold]a\x1b[2J", "b", "b"]
    factors = [1.0, 3.0, 3.0]
    prompts = [
        result_of(question=sd.Question("?", number, ids=(1,), category=kind), factor=factor)
        for number, (kind, factor) in enumerate(zip(kinds, factors, strict=True), 1)
    ]
    lines = printed(results_of(*prompts)).splitlines()
    headings = "tok/s faster decode predicted length α c v".split()
    table = lines[lines.index(next(line for line in lines if line.startswith("By speed"))) :]
    assert table[0].split() == ["By", "speed", *headings] and table[3].split() == []
    # α = 4 / 6; a baseline step of (0.99 + 2.97 + 2.97) / 30 s; c = 0.01 and v = 0.1 s; decoding of 6.93 and 3.43 s.
    step_s, alpha = 6.93 / 30, 4 / 6
    c, v = 0.01 / step_s, 0.1 / step_s
    predicted = 100 * ((1 - alpha**4) / ((1 - alpha) * (3 * c + v)) - 1)
    cells = ["9.43", "+100", "%", f"{100 * (6.93 / 3.43 - 1):+.0f}", "%", f"{predicted:+.0f}", "%", "3.33", "0.667"]
    assert table[1].split() == ["K", "=", "3", *cells, f"{c:.3f}", f"{v:.3f}"]
    assert table[2].startswith("  K = auto ") and table[2].split()[3:8] == "4.71 +0 % +1 %".split()
    assert table[2].split()[8:] == ["–", "3.33", "0.750", f"{0.025 / step_s:.3f}", f"{0.2 / step_s:.3f}"]
    table = table[4:]
    assert table[0].split() == ["By", "category", *headings]
    assert table[1].startswith("  [bold]a�[2J ") and table[2].startswith("  b ")
    assert [row.removeprefix("  [bold]a�[2J").split()[0] for row in table[1:2]] == ["22.0"]  # of K = 3, the fastest
    assert table[2].split()[1] == "7.33" and table[3] == ""


@pytest.mark.parametrize(
    ("fixed", "word", "style"),
    [
        (outcome_of(RUNS["K = 3"]), "yes", "green"),
        (judged_as("tie"), "tie", "yellow"),
        (judged_as("mismatch", 9.0, "both"), "NO", "bold red"),
        (judged_as("unchecked", why="CUDA out of memory."), "?", "bold red"),
        (judged_as("sampled"), "sampled", ""),
    ],
)
def test_whether_a_text_is_the_same_is_one_word(fixed, word, style):
    shown = sd.in_colour(sd.figures_of((result_of(fixed=fixed),), FIXED).verdict)
    assert (str(shown), shown.style) == (word, style)


def test_a_method_that_failed_is_a_line_that_says_why():
    lines = printed(results_of(result_of(1, fixed=failed("first \x1b line"), auto=failed()), result_of(2))).splitlines()
    at = lines.index("    K = 3: first � line")
    assert lines[at + 1] == "    K = auto: CUDA out of memory." and lines[at + 2] == "  2 What?"
    assert lines[at - 2].startswith("    baseline ") and lines[at - 1].startswith("    generate() ")


HEADINGS = "tokens s TTFT tok/s faster accept length log-l. same".split()
SUMMARY = "tok/s faster decode predicted length α c v".split()
WIDEST = dict.fromkeys(
    ["K = 3"], generation_of(range(99999), 12345.6, 1234.5, [(3, 3, 1.0, 2.0, 4.0)] * 25000, -9.26e5)
)


@pytest.mark.parametrize(
    ("width", "left_out", "left_out_below"),
    [
        (160, [], []),
        (100, [], []),
        (80, [], []),
        (78, ["TTFT"], []),
        (66, ["TTFT", "log-l."], ["predicted"]),
        (60, ["TTFT", "log-l.", "length"], ["predicted", "decode"]),
    ],
)
def test_columns_are_left_out_in_order_and_no_figure_is_cut(width, left_out, left_out_below):
    """The widest figures, on terminals of several widths."""
    slow = dataclasses.replace(WIDEST["K = 3"], latency_s=12345.6 * 13.345, rounds=(), log_likelihood=0.0)
    methods = (BASELINE, FIXED)
    question = sd.Question("A prompt of some length that must be cut " * 9, 123, ids=(1,))
    result = result_of(methods=methods, question=question, own=outcome_of(slow), fixed=outcome_of(WIDEST["K = 3"]))
    results = results_of(result, methods=methods)
    lines = printed(results, width=width).splitlines()
    assert max(map(len, lines)) <= width
    cells = {"tokens": "99999", "s": "12346", "TTFT": "1234", "tok/s": "8.10", "faster": "+1234 %"}
    cells |= {"accept": "100 %", "length": "4.00", "log-l.": "-12.3", "same": "yes"}
    baseline = {"tokens": "99999", "s": "164752", "TTFT": "1234", "tok/s": "0.607"} | dict.fromkeys(HEADINGS[4:8], "–")
    shown = [heading for heading in HEADINGS if heading not in left_out]
    assert lines[0].split() == ["#", "prompt", *shown]
    assert lines[1].startswith("123 A prompt of some length") and lines[1].endswith("…") and len(lines[1]) == width
    assert lines[2].split() == ["baseline", *((baseline | {"same": "yes"})[heading] for heading in shown)]
    assert lines[3].split() == ["K", "=", "3", *" ".join(cells[heading] for heading in shown).split()]
    assert len({len(line.rstrip()) for line in (lines[0], *lines[2:4])}) == 1
    summary = [heading for heading in SUMMARY if heading not in left_out_below]
    at = next(place for place, line in enumerate(lines) if line.startswith("By speed"))
    assert lines[at].split() == ["By", "speed", *summary]
    step_s = (12345.6 * 13.345 - 1234.5) / 99998
    cells = {"tok/s": "8.10", "faster": "+1234 %", "length": "4.00", "α": "1.00", "c": f"{1 / 3 / step_s:.3f}"}
    cells |= {"v": sd.three_digits(2 / step_s), "decode": f"{100 * (step_s * 99998 / (12345.6 - 1234.5) - 1):+.0f} %"}
    cells["predicted"] = f"{100 * (4 / (1 / step_s + 2 / step_s) - 1):+.0f} %"
    assert lines[at + 1].split() == ["K", "=", "3", *" ".join(cells[heading] for heading in summary).split()]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("draft", ["2b-it, ", "ngram+a-draft-with-a-long-name, "])
def test_long_labels_push_columns_out_and_cut_no_figure(width, draft):
    methods = [BASELINE, *(dataclasses.replace(method, label=draft + method.label) for method in (FIXED, AUTO))]
    prompts = [result_of(number, methods, question=sd.Question("?", number, ids=(1,))) for number in (1, 2)]
    lines = printed(results_of(*prompts, methods=methods), width=width).splitlines()
    assert max(map(len, lines)) <= width
    shown = lines[0].split()[2:]
    assert shown == [heading for heading in HEADINGS if heading in shown]  # in their order
    order = [heading for heading in sd.LEFT_OUT_FIRST if heading in HEADINGS]
    assert [heading for heading in order if heading not in shown] == order[: len(HEADINGS) - len(shown)]
    cells = {"tokens": "11", "s": "0.500", "TTFT": "0.010", "tok/s": "22.0", "faster": "+100 %", "accept": "44 %"}
    cells |= {"length": "3.33", "log-l.": "-1.00", "same": "yes"}
    assert lines[3].startswith(f"    {draft[:12]}")  # a label may be cut
    expected = " ".join(cells[heading] for heading in shown).split()
    assert lines[3].split()[-len(expected) :] == expected


def test_as_many_prompts_as_a_file_can_have_are_counted_uncut():
    """The last column, of which nothing may be cut: with 1,000 prompts "999/1000" are the same."""
    row = dataclasses.replace(sd.figures_of((result_of(),), FIXED), prompts=1000, identical=999, new_tokens=11000)
    console = console_of(120, color_system=None)
    with console.capture() as capture:
        sd.print_table(console, sd.PROMPT_COLUMNS, "", {"    K = 3": row}, 14)
    assert capture.get().rstrip().endswith(" 999/1000")


def test_a_long_category_gives_way_to_its_figures():
    questions = [sd.Question("?", number, ids=(1,), category=kind) for number, kind in ((1, "c" * 100), (2, "short"))]
    text = printed(results_of(*(result_of(question=question) for question in questions)), width=80)
    table = text[text.index("By category") :].splitlines()[1:3]
    assert table[0].startswith("  ccc") and table[0].split()[0].endswith("…")
    assert table[0].split()[1:] == table[1].split()[1:] and max(map(len, text.splitlines())) <= 80


# Hostile text


def test_text_from_outside_is_made_safe(tokenizer):
    """In prompts, categories, ids, errors and outputs: no escapes, no overrides, no markup that is obeyed."""
    assert sd.safe(f"{HOSTILE}\n") == f"{HARMLESS}\n" and sd.plain(f" {HOSTILE}\n  y ") == f"{HARMLESS} y"
    question = sd.Question(f"{HOSTILE} :smile: ?", 1, 1, (1,), category=HOSTILE, question_id=HOSTILE)
    first = result_of(question=question, fixed=judged_as("tie"), auto=failed(HOSTILE))
    ids = tokenizer(HOSTILE, add_special_tokens=False)["input_ids"]
    run = generation_of(ids, 0.5, 0.1, [(len(ids) - 1, len(ids) - 1, 0.1, 0.1, 0.2)])
    second = result_of(2, fixed=outcome_of(run), question=sd.Question("?", 2, ids=(1,)))
    text = printed(results_of(first, second, show_text=True), tokenizer)
    assert not set(text) & {"\x1b", "\u202e", "\x07", "\u200b"}
    lines = text.splitlines()
    assert lines[1] == f"{HARMLESS}.1 {HARMLESS} :smile: ?"
    assert f"    K = auto: {HARMLESS}" in lines and HARMLESS in lines
    assert any(line.startswith("  [red]�[2J") for line in lines[lines.index("    mean") :])  # the category
    assert f"The largest: prompt {HARMLESS}.1, K = 3, new token 17" in " ".join(lines)


# The texts


def shown(run, console, tokenizer):
    with console.capture() as capture:
        sd.print_text(console, tokenizer, run)
    return capture.get()


def test_show_text_says_where_each_token_comes_from(tokenizer):
    ids = tokenizer("Sort the list in place.", add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode(ids[: n + 1])[len(tokenizer.decode(ids[:n])) :] for n in range(len(ids))]
    assert len(pieces) >= 6
    rounds = [(2, 1), (2, 2), (0, 0)]  # first; draft, correction; draft, draft, bonus; its own; …
    run = generation_of(ids[:7], rounds=[*rounds, (1, 1)])
    marked = [pieces[0], pieces[1], f"«{pieces[2]}»", pieces[3], pieces[4], f"‹{pieces[5]}›", *pieces[6:7]]
    text = shown(run, console_of(200), tokenizer)
    assert text.partition("\n")[0] == "".join(marked)
    legend = (
        "accepted draft token",
        "«the main model's own, after a rejection»",
        "‹its bonus token›",
        "its own, nothing drafted",
    )
    assert re.split(" {2,}", text.partition("\n")[2].strip()) == [*legend]
    coloured = console_of(100, force_terminal=True, color_system="standard", no_color=False)
    text = shown(run, coloured, tokenizer)
    assert f"\x1b[32m{pieces[1]}\x1b[0m\x1b[1;31m{pieces[2]}\x1b[0m" in text and f"\x1b[36m{pieces[5]}\x1b[0m" in text
    assert "«" not in text and text.startswith(pieces[0])


def test_show_text_with_characters_of_several_tokens(tokenizer):
    text = "é日本\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)  # in bytes
    run = generation_of(ids, rounds=[(len(ids) - 1, len(ids) - 1)])
    assert shown(run, console_of(100), tokenizer).startswith("é日本\n")
    half = generation_of(ids[:1], rounds=[])  # the text may end within one: a sign says so
    assert shown(half, console_of(100), tokenizer).startswith("�\n")


def test_the_texts_of_our_methods_are_shown_below_their_prompt(tokenizer):
    runs = {"fixed": outcome_of(RUNS["K = 3"]), "auto": failed()}
    text = printed(results_of(result_of(1, **runs), show_text=True), tokenizer)
    assert [text.count(f"\n{label}:\n") for label in ("baseline", "K = 3", "K = auto", "generate()")] == [0, 1, 0, 0]
    assert text.count("accepted draft token") == 1
    assert "accepted draft token" not in printed(results_of(result_of(1)), tokenizer)


# The sentences: each where it is true, and silent where it is not


def test_the_sentences_are_the_figures_in_words():
    step_s = (3.0 - 0.03) / 20
    c, v, alpha = 0.01 / step_s, 0.1 / step_s, 4 / 6
    two = results_of(result_of(1), result_of(2, factor=2.0), methods=METHODS[:2], draft_tokens=(3,))
    expected = [
        "Speculative decoding was 2.00 times as fast (over the prompts 2.00 to 2.00). A pass of the main model yielded "
        f"3.33 tokens, and α = {alpha:.3f} of the tested draft tokens were accepted. A verify pass cost v = {v:.3f} "
        f"baseline steps, a draft step c = {c:.3f}.",
        "Rounds in which at least 1, 2, … draft tokens were accepted: 67 %, 33 %, 33 %.",
        # Of 1.5 s, the baseline's 3 s, 0.6 of verify passes and 0.18 of drafting; rounds of 0.9 s in all. 8 of 18 draft
        # tokens are accepted: 14 of 24 rounds' tokens.
        f"With a draft that cost nothing it would be {100 * (3 / (1.5 - 0.18) - 1):+.0f} %, with one that is always "
        f"right {100 * (3 / (1.5 - 0.9 * 10 / 24) - 1):+.0f} %, and with verify passes as cheap as baseline steps "
        f"{100 * (3 / (1.5 - 0.6 + 6 * step_s) - 1):+.0f} %.",
        "At these c and v a draft pays from α = 0.000 on, with the best K.",
        "All 2 outputs are the main model's own, token for token.",
    ]
    assert c + v < 1  # a verify pass faster than a step: the machine was busy, and that is said
    assert [line for line in sentences(two) if not line.startswith(CANNOT_BE)] == expected
    one = sentences(results_of(result_of(1), methods=METHODS[:2]))
    assert one[0].startswith("Speculative decoding was 2.00 times as fast. A pass")  # of one prompt, there is no range
    assert one[-1] == "The output is the main model's own, token for token."


CANNOT_BE = "These figures cannot all be right: the machine was busy with something else. Try --repeats 5."


def test_ten_prompts_have_an_interval():
    fixed = [changed("K = 3", latency_s=0.5 + number / 40) for number in range(10)]
    said = spoken("Speculative decoding", results_of(*(result_of(n, fixed=run) for n, run in enumerate(fixed, 1))))
    low, high = map(float, re.search(r"\(95 % interval (\d\.\d\d) to (\d\.\d\d)\)", said).groups())
    assert 1.38 < low < 10 / 6.125 < high < 2.0 and "over the prompts" not in said


def test_figures_that_cannot_be_right_are_said_to_be_noise():
    """A verify pass below a step, or a speedup above the mean acceptance length: only another load explains them."""

    def said(rounds, latency_s=0.5):
        """With a step of 0.089 s."""
        fixed = changed("K = 3", rounds=tuple(rounds), latency_s=latency_s)
        result = result_of(own=changed("baseline", latency_s=0.9), fixed=fixed, methods=METHODS[:2])
        return spoken("These", results_of(result, methods=METHODS[:2]))

    calm = [sd.Round(*each) for each in ROUNDS]  # a verify pass takes 0.1 s
    assert said(calm) is None
    assert said(each._replace(verify_s=0.07) for each in calm) == CANNOT_BE
    assert said(calm, 0.2) == CANNOT_BE  # 0.89 / 0.19 = 4.68, but 3.33 tokens a pass
    assert said(each._replace(draft_s=None, verify_s=None) for each in calm) is None


def test_where_the_clock_cannot_tell_a_rounds_parts_apart_nothing_is_said_of_them():
    rounds = tuple(sd.Round(k, n, round_s=round_s) for k, n, _, _, round_s in ROUNDS)
    said = sentences(results_of(result_of(fixed=changed("K = 3", rounds=rounds)), methods=METHODS[:2]))
    assert said == [
        "Speculative decoding was 2.00 times as fast. A pass of the main model yielded 3.33 tokens, and α = 0.667 of "
        "the tested draft tokens were accepted.",
        "Rounds in which at least 1, 2, … draft tokens were accepted: 67 %, 33 %, 33 %.",
        "The output is the main model's own, token for token.",
    ]


def test_where_nothing_was_drafted_nothing_is_said_of_drafts():
    idle = changed("K = 3", rounds=(sd.Round(0, 0, 0.0, 0.05, 0.05),) * 10, log_likelihood=0.0, latency_s=1.2)
    assert sentences(results_of(result_of(fixed=idle), methods=METHODS[:2])) == [
        "Nothing was ever drafted: no draft token was worth its cost here, or none was found.",
        "The output is the main model's own, token for token.",
    ]


def test_too_few_tokens_to_tell():
    """One token, which the prefill gave, and no round: it is not that no draft token was worth its cost."""
    one = {"token_ids": (7,), "rounds": (), "log_likelihood": 0.0, "first_token_s": 0.4}
    result = result_of(own=changed("baseline", **one), fixed=changed("K = 3", **one), methods=METHODS[:2])
    assert sentences(results_of(result, methods=METHODS[:2])) == [
        "Too few tokens to tell how fast it is: raise --max-new-tokens, or ask for longer answers.",
        "The output is the main model's own, token for token.",
    ]
    row = re.search(r"^    K = 3 .*$", printed(results_of(result, methods=METHODS[:2])), re.MULTILINE)[0]
    assert row.split() == "K = 3 1 0.500 0.400 2.00 +100 % – – – yes".split()


def test_without_any_prompt_that_both_decoded_no_speed_is_claimed():
    """The baseline failed at one prompt, the draft at the other: more tokens would not help."""
    prompts = result_of(1, METHODS[:2], own=failed()), result_of(2, METHODS[:2], fixed=failed())
    said = " ".join(sentences(results_of(*prompts, methods=METHODS[:2])))
    assert "times as fast" not in said and "Too few tokens" not in said


@pytest.mark.parametrize(
    ("memory", "compile", "expected"),
    [
        (18.0, "off", "this is what it waits for, and where speculation pays."),
        (18.0, "on", "this is what it waits for, and where speculation pays."),
        (40.0, "off", "as eager steps do, it waits for Python, kernels and their launches (--compile on)."),
        (40.0, "on", "it waits for something else."),
        (5.0, "off", "so they come from a cache of the processor, or the machine was busy with something else."),
    ],
)
def test_how_near_the_baseline_is_to_the_memorys_limit(memory, compile, expected):
    """990 MB in a step of 0.099 s: 10 GB/s."""
    said = spoken("The baseline reads", results_of(result_of(), memory=memory, compile=compile))
    rates = f"10.0 GB of weights a second, memory can deliver {sd.three_digits(memory)}"
    assert said == f"The baseline reads {rates}: {expected}"


def test_nothing_is_said_of_memory_where_nothing_is_known():
    unknown = dataclasses.replace(BASELINE, step_bytes=None)  # a mixture of experts, or offloaded weights
    for methods, memory in (((BASELINE, FIXED), None), ((unknown, FIXED), 40.0)):
        assert (
            spoken("The baseline reads", results_of(result_of(methods=methods), methods=methods, memory=memory)) is None
        )


def test_what_cannot_be_compiled_is_not_told_to_be():
    """Offloaded weights, also if all of them fit on one device; models with a state."""
    assert "(--compile on)" in spoken("The baseline reads", results_of(result_of(), memory=40.0))
    said = spoken("The baseline reads", results_of(result_of(), memory=40.0, can_compile=False))
    assert said.endswith("it waits for something else.")


def test_what_to_try_where_no_draft_pays():
    slow = result_of(fixed=changed("K = 3", latency_s=4.0), methods=METHODS[:2])
    said = sentences(results_of(slow, methods=METHODS[:2], draft_tokens=(3,)))
    assert said[0] == "No draft pays here. Try --draft-tokens auto, or a draft that is smaller, or right more often."
    assert said[1].startswith("Speculative decoding was 0.25 times as fast. A pass")
    said = sentences(results_of(slow, methods=METHODS[:2], draft_tokens=(3, "auto")))
    assert said[0] == "No draft pays here. Try a draft that is smaller, or right more often."
    assert spoken("No draft pays", results_of(result_of(), methods=METHODS[:2])) is None


def test_from_which_acceptance_a_draft_pays():
    # A step of 0.1 s: c = 0.2 and v = 1.1, of which one draft token pays from α = 0.3 on.
    rounds = tuple(sd.Round(k, n, 0.06, 0.11, 0.19) for k, n, *_ in ROUNDS)
    own = changed("baseline", latency_s=1.01)
    pays = results_of(
        result_of(own=own, fixed=changed("K = 3", rounds=rounds), methods=METHODS[:2]), methods=METHODS[:2]
    )
    assert spoken("At these", pays) == "At these c and v a draft pays from α = 0.300 on, with the best K."
    rounds = tuple(sd.Round(k, n, 0.6, 0.11, 0.75) for k, n, *_ in ROUNDS)  # each draft step takes two others
    never = results_of(
        result_of(own=own, fixed=changed("K = 3", rounds=rounds), methods=METHODS[:2]), methods=METHODS[:2]
    )
    assert spoken("At these", never) == "At these c and v no draft pays, however often it is right."


def test_the_first_sentence_names_the_best_draft_and_its_lead():
    assert sentences(results_of(result_of()))[0] == (
        "The best draft length in this run was K = 3, 2.00 times as fast as the next, K = auto. "
        "The data that measured it also picked it."
    )
    # Two drafts, two lengths of the best: what counts is its lead over the next draft, not over its own other length.
    rates = {"a, K = 3": 0.5, "a, K = 4": 0.6, "b, K = 3": 0.8, "b, K = 4": 4.0}
    methods = [BASELINE, *(sd.Method(name, None, name[0], int(name[-1])) for name in rates)]
    outcomes = {name: changed("K = 3", latency_s=latency_s) for name, latency_s in rates.items()}
    result = sd.Result(sd.Question("?", 1, ids=(1,)), {"baseline": outcome_of(RUNS["baseline"])} | outcomes)
    results = results_of(result, methods=methods, draft=("a", "b"), draft_tokens=(3, 4))
    said = sentences(results)
    assert said[0] == (
        "The best draft in this run was a, K = 3, 1.60 times as fast as the next, b, K = 3. "
        "The data that measured it also picked it."
    )
    assert [method.label for method in sd.find(results)[1]] == list(rates)
    table = printed(results).partition("By speed")[2].splitlines()[1:5]
    assert [line[2:10] for line in table] == list(rates)
    assert spoken("The best", results_of(result_of(methods=METHODS[:2]), methods=METHODS[:2])) is None


def test_how_the_library_did():
    methods = (*METHODS, ASSISTED)
    said = sentences(results_of(result_of(methods=methods), methods=methods))
    assert said[-3:-1] == [
        "K = 3 was 2.00 times as fast as generate(): transformers' generate(), eager.",
        "K = 3 was 1.60 times as fast as assist 3: transformers' assisted generation, K = 3, eager.",
    ]
    # Each is compared with ours of the same draft and length, generate() alone with our best.
    assisted = dataclasses.replace(ASSISTED, label="assisted", draft_tokens="auto")
    result = result_of()
    result.outcomes["assisted"] = outcome_of(RUNS["assist 3"])
    said = sentences(results_of(result, methods=(*METHODS, assisted)))
    assert said[-2].startswith("K = auto was 0.800 times as fast as assisted: ")
    gone = results_of(result_of(library=failed()))
    assert not [line for line in sentences(gone) if "generate()" in line]


# Whether it is right


def numbered(*outcomes):
    """Results whose K = 3 have these outcomes, of prompts 1, 2, …; without other methods but the baseline."""
    return results_of(
        *(result_of(n, METHODS[:2], fixed=each) for n, each in enumerate(outcomes, 1)), methods=METHODS[:2]
    )


def test_a_tie_is_shown_with_its_figures():
    said = sentences(numbered(outcome_of(RUNS["K = 3"]), judged_as("tie", 0.125)))
    assert said[-2:] == [
        "1 of 2 outputs are the main model's own, token for token.",
        "Ties, the main model's own within its rounding: 1. The largest: prompt 2, K = 3, new token 17, gap 0.125 (of "
        "the baseline 0.0625), rounding noise 0.25.",
    ]


def test_mismatches_say_which_is_the_worst_and_whose():
    outcomes = [judged_as("mismatch", gap, whose) for gap, whose in ((2.0, "both"), (3.0, "baseline"))]
    alike = judged_as("mismatch", 0.5, "both", index=None)
    said = sentences(numbered(*outcomes, alike, judged_as("unchecked", why="no memory")))
    assert said[-3:] == [
        "0 of 4 outputs are the main model's own, token for token.",
        "Mismatches, NOT the main model's own (please report this as a bug): 3. The largest: prompt 2, K = 3, new "
        "token 17 (at fault: baseline), gap 3 (of the baseline 0.0625), rounding noise 0.25.",
        "1 output could not be checked: no memory.",
    ]
    assert "The largest: prompt 1, K = 3, both alike (at fault: both), gap 0.5 " in sentences(numbered(alike))[-1]


def test_sampled_texts_are_not_compared():
    said = sentences(numbered(judged_as("sampled")))
    assert said[-1] == "The texts are sampled, so they differ: all methods draw from the main model's own distribution."
    assert not [line for line in said if "token for token" in line]


def test_what_the_librarys_outputs_are_is_its_own_affair():
    library = judged_as("mismatch", 9.0, "speculative", label="generate()")
    said = sentences(results_of(result_of(library=library)))
    assert said[-1] == "All 2 outputs are the main model's own, token for token."


def test_where_no_draft_ran_the_baselines_outputs_are_what_is_told():
    said = sentences(numbered(failed(), failed()))
    assert said == ["All 2 outputs are the main model's own, token for token."]
    results = results_of(result_of(1, own=judged_as("unchecked", why="no memory", label="baseline"), fixed=failed()))
    alone = dataclasses.replace(results, methods=METHODS[:2])
    assert sentences(alone)[-1] == "1 output could not be checked: no memory."


def test_where_the_baseline_failed_nothing_is_said_of_speed():
    unchecked = judged_as("unchecked", why="there is no baseline")
    prompts = (result_of(number, METHODS[:2], own=failed(), fixed=unchecked) for number in (1, 2))
    results = results_of(*prompts, methods=METHODS[:2], memory=40.0)
    assert sentences(results) == [
        "0 of 2 outputs are the main model's own, token for token.",
        "2 outputs could not be checked: there is no baseline.",
    ]
    lines = printed(results).splitlines()
    assert "    baseline: CUDA out of memory." in lines and lines[2].startswith("    K = 3 ")


def test_of_no_output_nothing_is_said():
    """All methods failed in their second repeats: what the first ones wrote was not judged."""
    half = sd.Outcome((RUNS["baseline"],), "a text", None, "CUDA out of memory.")
    said = printed(results_of(result_of(1, METHODS[:2], own=half, fixed=half), methods=METHODS[:2]))
    assert "main model's own" not in said


# A real run


def test_the_report_of_a_real_run(demo):
    """What is printed is what the JSON says: each prompt's rows, the mean's, and the sentences."""
    done, told = demo
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    start = next(place for place, line in enumerate(lines) if line.startswith("  # prompt "))
    labels = [method["label"] for method in told["methods"]]
    rows = [prompt["outcomes"][label]["figures"] for prompt in told["prompts"] for label in labels]
    rows += [method["summary"] for method in told["methods"]]
    printed_rows = [line for line in lines[start + 1 :] if line.startswith("    ") and line != "    mean"]
    assert len(printed_rows) == len(rows) == 18
    for line, row, label in zip(printed_rows, rows, labels * 6, strict=True):
        cells = [str(round(row["new_tokens"] / row["prompts"]))]
        cells += [sd.three_digits(row[name]) for name in ("latency_s", "time_to_first_token_s", "tokens_per_s")]
        cells += [sd.percent(row["speedup_percent"], "+"), sd.share(row["acceptance_rate"])]
        cells += [sd.three_digits(row[name]) for name in ("mean_acceptance_length", "log_likelihood_per_token")]
        same = "yes" if row["prompts"] == 1 else "5/5"
        assert line.split() == " ".join([label, *cells, same]).split()
    best = max(told["methods"][1:], key=lambda method: method["summary"]["tokens_per_s"])
    assert any(line.startswith(f"The best draft length in this run was {best['label']}, ") for line in lines)
    assert "All 10 outputs are the main model's own, token for token." in lines

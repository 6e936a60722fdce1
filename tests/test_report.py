"""The report: rows, tables, chart, texts, conclusions, picture and JSON, as they follow from the results."""

import dataclasses
import io
import itertools
import json
import re
import xml.etree.ElementTree

import pytest
import transformers
from conftest import generation_of
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_command_line import MAIN, QUICK, refused, run, write

import speculative_decoding as sd


def console_of(width=120, **options):
    return Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MAIN)


METHODS = [sd.Method("baseline", None), sd.Method("K = 3", None, 3), sd.Method("K = auto", None, "auto", {"main": 1})]
METHODS += [sd.Method("generate()", None, library="transformers' generate(), eager")]


def outcomes_of(factor=1.0, label="K = 3"):
    """What the methods did with one prompt: the baseline took factor × 1 s, K = 3 half of it, the others all of it."""
    tokens, rounds = range(10, 21), [(3, 3, 0.03, 0.1, 0.15), (3, 1, 0.03, 0.1, 0.15), (3, 0, 0.03, 0.1, 0.15)]
    own, ours = (generation_of(tokens, seconds * factor, 0.01) for seconds in (1.0, 0.5))
    ours.rounds, ours.log_likelihood = [sd.Round(*one) for one in rounds], -9.0
    auto = generation_of(tokens, factor, 0.02, [(4, 3, 0.1, 0.2, 0.3)] * 3, -6.0)
    runs = {"baseline": own, "K = 3": ours, "K = auto": auto, "generate()": generation_of(tokens, factor)}
    return {label: sd.Outcome([run]) for label, run in runs.items()}


def result_of(number=1, category=None, factor=1.0, text="What?", methods=METHODS):
    prompt = sd.Question(text, number, category=category, ids=(1, 2, 3))
    outcomes = outcomes_of(factor)
    return sd.Result(prompt, {method.label: outcomes[method.label] for method in methods})


def report_of(results, tokenizer, methods=METHODS, width=120, finish=True):
    """A finished report of results, and what it printed."""
    console = console_of(width)
    report = sd.Report(console, methods, tokenizer)
    for result in results:
        report.add(result, show_text=False)
    if finish:
        report.finish()
    json.dumps(report.parts, allow_nan=False)  # whatever it reports
    return report, console.file.getvalue()


def conclusions_of(results, tokenizer, methods=METHODS[:2]):
    """The sentences at the end of a report, on one line."""
    _, printed = report_of(results, tokenizer, methods, width=4000)
    return printed.rpartition("\n\n")[2]


# The JSON

BOTH = {"new_tokens", "latency_s", "tokens_per_s", "mean_tokens_per_s", "latency_min_s", "latency_max_s"}
BOTH |= {"time_to_first_token_s", "time_per_output_token_s", "peak_memory_gb"}
RATES = {"rounds", "drafted", "accepted", "acceptance_rate", "alpha", "tokens_per_round", "mean_acceptance_length"}
RATES |= {"acceptance_by_position", "acceptance_histogram", "drafted_per_round", "drafted_histogram", "round_s"}
RATES |= {"log_likelihood", "log_likelihood_per_token", "prefill_s", "draft_s", "verify_s", "other_s"}
OUTPUT = BOTH | {"first_token_s", "text", "token_ids"}
FIGURES = {"speedup_percent", "decode_speedup_percent", "geometric_mean_speedup_percent", "speedup_range_percent"}
FIGURES |= {"speedup_interval_percent", "predicted_speedup_percent", "ideal_speedup_percent", "baseline_step_s"}
FIGURES |= {"draft_step_s", "verify_pass_s", "draft_cost", "verify_cost", "identical", "ties", "mismatches"}
FIGURES |= {"unchecked", "speedup_if_percent", "break_even_alpha", "weight_bandwidth_gb_s"}


def test_the_json_holds_what_the_design_promises(demo):
    _, report = demo
    environment = {"device", "device_name", "dtype", "threads", "processes", "python", "torch", "transformers"}
    assert set(report) == {"environment", "settings", "runs", "compared", "complete"}
    assert set(report["environment"]) >= environment and report["complete"] is True
    assert 0.5 < report["environment"]["memory_bandwidth_gb_s"] < 20_000
    options = "main draft demo prompts max_new_tokens draft_tokens device dtype repeats warmup ignore_eos json"
    assert set(report["settings"]) >= {*options.split(), "no_chat_template", "compile", "compile_s", "seed"}
    fixed, auto = report["runs"]
    assert fixed["draft_tokens"] == 3 and auto["draft_tokens"] == "auto" and report["compared"] == []
    assert fixed["costs"] is None and set(auto["costs"]) == {"draft_pass_s", "main_pass_s"}
    assert list(map(int, auto["costs"]["main_pass_s"])) == [1, 2, 3, 4, 5, 6, 9, 10, 16]
    for measured in report["runs"]:
        assert len(measured["prompts"]) == 5 and measured["categories"] == measured["by_length"] == {}
        for prompt in measured["prompts"]:
            keys = {"prompt", "prompt_tokens", "number", "turn", "category", "question_id", "error", "divergence"}
            assert set(prompt) == keys | FIGURES | {"baseline", "speculative"}
            assert set(prompt["baseline"]) == OUTPUT
            assert set(prompt["speculative"]) == OUTPUT | RATES | {"rounds_drafted", "rounds_accepted", "rounds_s"}
            assert prompt["identical"] is True and prompt["divergence"] is prompt["error"] is None
        summary = measured["summary"]
        assert set(summary) == {"baseline", "speculative"} | FIGURES
        assert set(summary["baseline"]) == BOTH and set(summary["speculative"]) == BOTH | RATES


def test_the_json_grows_by_prompts_and_has_summaries_at_the_end(tokenizer):
    results = [result_of(number, category) for number, category in ((1, "a"), (2, "b"), (3, "a"))]
    report, _ = report_of(results[:2], tokenizer, finish=False)
    for method in METHODS[1:]:
        part = report.parts[method.label]
        assert part["method"] == method.library and part["draft_tokens"] == method.draft_tokens
        assert part["costs"] == method.costs  # in every run
        assert [prompt["number"] for prompt in part["prompts"]] == [1, 2]
        assert part["summary"] is None and part["categories"] == part["by_length"] == {}
    report.add(results[2], show_text=False)
    report.finish()
    for label, part in report.parts.items():
        role = "compared" if label == "generate()" else "speculative"
        assert [prompt["number"] for prompt in part["prompts"]] == [1, 2, 3]
        assert part["summary"]["baseline"]["new_tokens"] == part["summary"][role]["new_tokens"] == 33
        assert {name: of["baseline"]["new_tokens"] for name, of in part["categories"].items()} == {"a": 22, "b": 11}


def test_a_prompt_that_was_not_compared_is_null_and_not_counted(tokenizer):
    """One whose method failed, and one whose baseline did; what was measured of the rest stays as it is."""
    results = [result_of(1, "x"), result_of(2, "x"), result_of(3, "y")]
    results[1].outcomes["K = 3"].error = "CUDA out of memory."
    results[2].baseline.error = "the disk is gone"
    report, printed = report_of(results, tokenizer)
    errors = {label: [prompt["error"] for prompt in part["prompts"]] for label, part in report.parts.items()}
    gone = "the disk is gone"
    assert errors == {
        "K = 3": [None, "CUDA out of memory.", gone],
        "K = auto": [None, None, gone],
        "generate()": [None, None, gone],
    }
    failed = report.parts["K = 3"]["prompts"][1]
    assert failed["baseline"] is failed["speculative"] is failed["speedup_percent"] is failed["identical"] is None
    assert report.parts["generate()"]["prompts"][2]["compared"] is None
    counted = {label: part["summary"]["identical"] for label, part in report.parts.items()}
    assert counted == {"K = 3": 1, "K = auto": 2, "generate()": 2}
    assert {label: list(part["categories"]) for label, part in report.parts.items()} == dict.fromkeys(counted, ["x"])
    assert "    K = 3: CUDA out of memory.\n    K = auto " in printed and printed.count(f": {gone}\n") == 3
    assert report.status() == 1


def test_nothing_measured_is_a_report_without_figures(tokenizer):
    result = result_of()
    result.baseline.error = "CUDA out of memory."
    report, printed = report_of([result], tokenizer)
    assert all(part["summary"] is None for part in report.parts.values()) and "times as fast" not in printed
    with pytest.raises(sd.UsageError, match=r"no prompt could be decoded \(CUDA out of memory\.\)"):
        report.status()


def test_one_token_and_no_round_is_a_report_too(tokenizer):
    result = result_of(methods=METHODS[:3])
    for outcome in result.outcomes.values():
        outcome.runs = [generation_of([7], 1.0, 0.9)]
    report, printed = report_of([result], tokenizer, METHODS[:3])  # and JSON without NaN
    assert report.parts["K = 3"]["summary"]["speculative"]["alpha"] is None and report.status() == 0
    assert re.search(r"^    K = 3 +1 +1\.00 +0\.900 +1\.00 +\+0 % +– +– +– +yes$", printed, re.MULTILINE)
    assert "Too few tokens to tell how fast it is: raise --max-new-tokens" in printed
    assert "outputs are the main model's own, token for token." in printed


class Interrupted(io.StringIO):
    """A file whose reader presses Ctrl-C when he sees a row."""

    row = "K = 3"

    def write(self, text):
        if self.row and self.row in text:
            self.row = None
            raise KeyboardInterrupt
        return super().write(text)


def test_an_interrupted_report_counts_what_its_json_has(tokenizer):
    """Ctrl-C in the middle of a prompt's rows: the report of what is done, and the JSON, agree on how much that is."""
    console = Console(file=Interrupted(), width=120)
    report = sd.Report(console, METHODS, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        report.add(result_of(), show_text=False)
    assert {len(part["prompts"]) for part in report.parts.values()} == {len(report.results)}


# The exit status


def spoiled(**verdict):
    """A result with something found in the outcome of K = 3."""
    result = result_of()
    for key, value in verdict.items():
        setattr(result.outcomes["K = 3"], key, value)
    return result


def divergence(kind, gap, at_fault=None, index=16, noise=0.25):
    return sd.Divergence(index, 4, 5, gap, 0.0625, noise, kind, at_fault)


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        ({}, 0),
        ({"divergence": divergence("tie", 0.125)}, 0),
        ({"divergence": divergence("mismatch", 3.0, "speculative")}, 1),
        ({"unchecked": "CUDA out of memory."}, 1),
        ({"unchecked": sd.SAMPLED}, 0),
        ({"error": "CUDA out of memory."}, 1),
    ],
    ids=["all well", "tie", "mismatch", "unchecked", "sampled", "failed"],
)
def test_the_exit_status(verdict, status, tokenizer):
    report, _ = report_of([result_of(), spoiled(**verdict)], tokenizer)
    assert report.status() == status


def test_what_the_library_cannot_do_is_no_failure_of_ours(tokenizer):
    result = result_of()
    result.outcomes["generate()"].error = "the library refuses"
    report, printed = report_of([result], tokenizer)
    assert report.status() == 0 and "    generate(): the library refuses\n" in printed


# Rows and tables


def test_figures():
    values = {
        0.01234: "0.012",
        0.5: "0.500",
        3.14159: "3.14",
        42.42: "42.4",
        1234.5: "1234",
        -7.654: "-7.65",
        0: "0.000",
    }
    assert {value: sd.number(value) for value in values} == values
    assert sd.number(None) == sd.percent(None) == "–" == str(sd.gain(None))
    assert (sd.percent(12.4, "+"), sd.percent(-12.6, "+"), sd.percent(71.9)) == ("+12 %", "-13 %", "72 %")
    assert sd.percent(0.719, whole=1) == sd.percent(1.438, whole=2) == "72 %"
    assert (sd.gain(3.0).style, sd.gain(-3.0).style) == ("green", "red")
    assert (sd.counted(1, "layer"), sd.counted(2048, "layer")) == ("1 layer", "2,048 layers")


WIDE = generation_of(range(99999), 12345.6, 1234.5, [(3, 3, 1.0, 2.0, 4.0)] * 25000, -12.345 * 75000)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_the_terminal(width, tokenizer):
    """The widest figures: none is cut, and they end at the right edge."""
    slow = generation_of(range(99999), 12345.6, 1234.5)
    slow.latency_s = 12345.6 * 13.345
    outcomes = {"baseline": sd.Outcome([slow]), "K = 3": sd.Outcome([WIDE])}
    result = sd.Result(sd.Question("A prompt of some length that must be cut " * 9, 123), outcomes)
    console = console_of(width, color_system=None)
    sd.print_row(console, sd.COLUMNS, "  # prompt", None)
    rows = {"K = 3": sd.Comparison([result], METHODS[1])}
    sd.print_prompt(console, f"123 {result.prompt.text}", rows)
    headings, title, own, ours = console.file.getvalue().splitlines()
    assert headings.endswith("tokens      s   TTFT  tok/s  faster accept length log-l.    same")
    assert len(title) == width and title.startswith("123 A prompt of some length") and title.endswith("…")
    assert own.startswith("    baseline ") and ours.startswith("    K = 3 ")
    assert own.rstrip().endswith(" 99999 164752   1234  0.607") and len(own) == width
    assert ours.endswith(" 99999  12346   1234   8.10 +1234 %  100 %   4.00  -12.3     yes") and len(ours) == width


@pytest.mark.parametrize("columns", [sd.COLUMNS, sd.SUMMARY_COLUMNS], ids=["prompts", "summary"])
@pytest.mark.parametrize("label", ["    baseline", "    K = auto", "    generate()", "    assist 100"])
def test_no_width_cuts_a_label_or_a_figure(columns, label):
    """On terminals of 30 to 120 columns: a table where there is room for it, else a list."""
    own, ours = outcomes_of()["baseline"], outcomes_of()["K = 3"]
    result = sd.Result(sd.Question("?", 1), {"baseline": own, "K = 3": ours})
    figures = sd.row_of(sd.Comparison([result], METHODS[1]))
    shown = [column.show(figures[column.key]) for column in columns]
    for width in range(30, 121):
        console = console_of(width, color_system=None)
        sd.print_row(console, columns, label, figures)
        lines = console.file.getvalue().splitlines()
        printed = " ".join(" ".join(lines).split())
        assert max(map(len, lines)) <= width and printed.startswith(label.strip()), width
        assert all(f" {cell}" in printed for cell in shown), width
        console = console_of(width, color_system=None)
        sd.print_row(console, columns, "  # prompt", None)
        assert max(map(len, console.file.getvalue().splitlines())) <= width


def test_the_rows_of_a_prompt_and_of_all(tokenizer):
    _, printed = report_of([result_of(1, text="first\n\x1b[2J  line"), result_of(2, factor=2.0)], tokenizer)
    lines = [line.rstrip() for line in printed.splitlines()]
    assert lines[0] == "" and lines[1].startswith("  # prompt ") and lines[1].endswith(" same")
    row = r"    {} +11 +{} +{} +{}"
    step = r" +{} +{} +{} +{} +{}"
    assert lines[2] == "  1 first �[2J line"
    assert re.fullmatch(row.format("baseline", "1.00", "0.010", "11.0"), lines[3])
    cells = step.format(r"\+100 %", "44 %", "2.33", "-1.00", "yes")
    assert re.fullmatch(row.format("K = 3", "0.500", "0.010", "22.0") + cells, lines[4])
    cells = step.format(r"\+0 %", "75 %", "4.00", "-0.500", "yes")
    assert re.fullmatch(row.format("K = auto", "1.00", "0.020", "11.0") + cells, lines[5])
    cells = r" +\+0 % +yes"  # what it does not tell stays empty, or is a dash
    assert re.fullmatch(row.format(r"generate\(\)", "1.00", "–", "11.0") + cells, lines[6])
    assert lines[7] == "  2 What?" and lines[12] == "    mean"
    assert re.fullmatch(row.format("baseline", "1.50", "0.010", "7.33"), lines[13])
    cells = step.format(r"\+100 %", "44 %", "2.33", "-1.00", "2/2")
    assert re.fullmatch(row.format("K = 3", "0.750", "0.010", "14.7") + cells, lines[14])


@pytest.mark.parametrize(
    ("verdict", "word"),
    [
        ({}, "yes"),
        ({"divergence": divergence("tie", 0.1)}, "tie"),
        ({"divergence": divergence("mismatch", 9.0, "both")}, "NO"),
        ({"unchecked": "CUDA out of memory."}, "?"),
        ({"unchecked": sd.SAMPLED}, "sampled"),
    ],
)
def test_whether_a_text_is_the_same_is_one_word(verdict, word):
    row = sd.row_of(sd.Comparison([spoiled(**verdict)], METHODS[1]))
    assert str(sd.Text.from_markup(row["same"])) == word


def test_draft_lengths_and_categories_are_compared(tokenizer):
    results = [result_of(1, "[bold]a\x1b[2J"), result_of(2, "b", 3.0), result_of(3, "b", 3.0)]
    _, printed = report_of(results, tokenizer)
    headings = r" +tok/s +faster +decode +predicted +length +α +c +v"
    table = re.search(rf"^By category, K = 3{headings}\n((?:  .*\n)+)\n", printed, re.MULTILINE)[1].splitlines()
    assert [re.split(" {2,}", line.strip())[0] for line in table] == ["[bold]a�[2J", "b", "all prompts"]
    assert [re.split(" {2,}", line.strip())[1] for line in (table[0], table[2])] == ["22.0", "9.43"]
    table = re.search(rf"^By draft length{headings}\n((?:  .*\n)+)\n", printed, re.MULTILINE)[1].splitlines()
    assert [re.split(" {2,}", line.strip())[0] for line in table] == ["K = 3", "K = auto"]  # ours
    # α = 4 / 6; a baseline step of (0.99 + 2.99 + 2.99) / 30 s; c = 0.01 and v = 0.1 s; decoding, of 6.97 and 3.47 s.
    step_s, alpha = 6.97 / 30, 4 / 6
    c, v = 0.01 / step_s, 0.1 / step_s
    predicted = 100 * ((1 - alpha**4) / ((1 - alpha) * (3 * c + v)) - 1)
    expected = ["9.43", "+100 %", sd.percent(100 * (6.97 / 3.47 - 1), "+"), sd.percent(predicted, "+"), "2.33", "0.667"]
    assert table[0].split() == " ".join(["K = 3", *expected, sd.number(c), sd.number(v)]).split()
    assert re.split(" {2,}", table[1].strip())[4] == "–"  # with auto there is no one K, and no prediction


def of_length(tokens, factor):
    result = result_of(tokens, factor=factor)
    result.prompt = dataclasses.replace(result.prompt, ids=tuple(range(tokens)))
    return result


def test_prompts_of_very_different_lengths_are_compared(tokenizer):
    """Thirds of 10 to 79 tokens on a log scale: from 10, 20 and 40 tokens on."""
    results = [of_length(tokens, factor) for tokens, factor in ((79, 4.0), (20, 2.0), (10, 1.0), (19, 1.0), (40, 4.0))]
    report, printed = report_of(results, tokenizer, width=80)
    part = report.parts["K = 3"]["by_length"]
    assert list(part) == ["10 to 19 tokens", "20 to 39 tokens", "40 to 79 tokens"]
    assert [of["baseline"]["new_tokens"] for of in part.values()] == [22, 11, 22]
    assert part["10 to 19 tokens"] == sd.Comparison(results[2:4], METHODS[1]).json
    assert report.parts["generate()"]["by_length"].keys() == part.keys()
    headings = r" +tok/s +faster +decode +predicted +length +α +c +v"
    table = re.search(rf"^By prompt, K = 3{headings}\n((?:  .*\n)+)\n", printed, re.MULTILINE)[1].splitlines()
    cells = [re.split(" {2,}", line.strip())[:2] for line in table]
    assert cells == [[*part][:1] + ["22.0"], [*part][1:2] + ["11.0"], [*part][2:] + ["5.50"], ["all prompts", "9.17"]]
    results[3].outcomes["K = 3"].error = results[1].baseline.error = "CUDA out of memory."
    report, _ = report_of(results, tokenizer)  # a group without results is left out, a failure is in no group
    part = report.parts["K = 3"]["by_length"]
    assert {name: of["baseline"]["new_tokens"] for name, of in part.items()} == {
        "10 to 19 tokens": 11,
        "40 to 79 tokens": 22,
    }


def test_prompts_of_similar_lengths_are_not_told_apart(tokenizer):
    for tokens, groups in ((39, 0), (40, 2)):
        report, printed = report_of([of_length(10, 1.0), of_length(tokens, 1.0)], tokenizer)
        assert len(report.parts["K = 3"]["by_length"]) == groups and ("By prompt" in printed) is bool(groups)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_each_prompt_is_in_the_group_of_its_length(lengths):
    results = [sd.Result(sd.Question("?", 1, ids=(1,) * tokens), {}) for tokens in lengths]
    groups = sd.group_by_length(results)
    assert bool(groups) is (max(lengths) >= 4 * min(lengths)) and len(groups) <= 3
    for name, group in groups.items():
        low, high = map(int, re.fullmatch(r"(\d+) to (\d+) tokens", name).groups())
        assert group and all(low <= len(one.prompt.ids) <= high for one in group)
    assert sum(map(len, groups.values())) == (len(results) if groups else 0)


def test_a_chart_shows_values_by_the_length_of_bars():
    console = console_of(64, color_system=None)
    sd.print_chart(console, "Title", [("one", 1.0), ("none", None), ("half", 0.5), ("little", 0.0001)], sd.number)
    title, *lines, last = console.file.getvalue().splitlines()
    assert title == "Title" and last == "" and [line.split()[0] for line in lines] == ["one", "half", "little"]
    bars = [line.count("█") for line in lines]
    assert bars[:2] == [40, 20] and bars[2] <= 1 and lines[1].endswith("█ 0.500")
    for nothing in ([], [("none", None)], [("zero", 0.0)]):
        console = console_of()
        sd.print_chart(console, "Title", nothing, sd.number)
        assert console.file.getvalue() == ""


def test_the_charts_show_what_was_measured_and_predicted(tokenizer):
    _, printed = report_of([result_of()], tokenizer)
    chart = printed.partition("Times as fast as the baseline\n")[2].partition("\n\n")[0].splitlines()
    assert [line.partition("█")[0].rstrip() for line in chart] == ["  K = 3", "    predicted", "  K = auto"]
    values = [line.split()[-2] for line in chart]
    assert values[0] == "2.00" and values[2] == "1.00" and all(line.endswith(" ×") for line in chart)
    bars, factors = [line.count("█") for line in chart], list(map(float, values))
    for (one, value), (other, another) in itertools.combinations(zip(bars, factors, strict=True), 2):
        assert one / other == pytest.approx(value / another, rel=0.05)
    joint = printed.partition("by position in a round (K = 3)\n")[2].partition("\n\n")[0].splitlines()
    assert [re.split(" █+ ", line) for line in joint] == [
        [f"  token {place:<5}", value] for place, value in ((1, "67 %"), (2, "33 %"), (3, "33 %"))
    ]


# The texts


def shown(run, console, tokenizer):
    sd.print_text(console, tokenizer, run)
    return console.file.getvalue()


def test_show_text_says_where_each_token_comes_from(tokenizer):
    ids = tokenizer("Sort the list in place.", add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode(ids[: n + 1])[len(tokenizer.decode(ids[:n])) :] for n in range(len(ids))]
    assert len(pieces) >= 6
    rounds = [(2, 1), (2, 2), (0, 0)]  # first; draft, correction; draft, draft, bonus; its own; …
    run = generation_of(ids[:7], rounds=[*rounds, (1, 1)])
    marked = [pieces[0], pieces[1], f"«{pieces[2]}»", pieces[3], pieces[4], f"‹{pieces[5]}›", *pieces[6:7]]
    assert shown(run, console_of(100), tokenizer).startswith("".join(marked))
    coloured = console_of(100, force_terminal=True, color_system="standard", no_color=False)
    assert f"\x1b[32m{pieces[1]}\x1b[0m\x1b[1;31m{pieces[2]}\x1b[0m" in shown(run, coloured, tokenizer)


def test_show_text_with_characters_of_several_tokens_and_hostile_ones(tokenizer):
    text = "é日\x1b[2J\u202e\x07[red]x[/red]\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)  # in bytes
    printed = shown(generation_of(ids, rounds=[(len(ids) - 1, len(ids) - 1)]), console_of(100), tokenizer)
    assert printed.startswith("é日�[2J��[red]x[/red]\n") and "\x1b" not in printed


def test_the_texts_of_our_methods_are_shown_below_their_prompt(tokenizer):
    console = console_of()
    report = sd.Report(console, METHODS, tokenizer)
    report.add(result_of(), show_text=True)
    printed = console.file.getvalue()
    assert [printed.count(f"\n{label}:\n") for label in ("K = 3", "K = auto", "generate()")] == [1, 1, 0]
    assert printed.count("accepted draft token · «the main model's own, after a rejection»") == 2


# The conclusions


def test_a_tie_is_shown_with_its_figures(tokenizer):
    results = [result_of(1), spoiled(divergence=divergence("tie", 0.125))]
    results[1].prompt = sd.Question("p", 2, ids=(1, 2, 3, 4))
    lines = conclusions_of(results, tokenizer).splitlines()
    assert lines[-2] == "1 of 2 outputs are the main model's own, token for token."
    assert lines[-1].startswith("Ties, the main model's own within its rounding: 1.")
    end = "prompt 2, K = 3, new token 17, gap 0.125 (of the baseline 0.0625), rounding noise 0.25."
    assert lines[-1].endswith(end)


def test_mismatches_say_which_is_the_worst_and_whose(tokenizer):
    results = [
        spoiled(divergence=divergence("mismatch", gap, whose)) for gap, whose in ((2.0, "both"), (3.0, "baseline"))
    ]
    results += [spoiled(divergence=divergence("mismatch", 0.5, "both", index=None)), spoiled(unchecked="no memory")]
    for number, result in enumerate(results, 1):
        result.prompt = sd.Question("p", number, ids=(1,))
    lines = conclusions_of(results, tokenizer).splitlines()
    assert lines[-3] == "0 of 4 outputs are the main model's own, token for token."
    assert lines[-2].startswith("Mismatches, NOT the main model's own (please report this as a bug): 3. ")
    assert (
        "The largest: prompt 2, K = 3, new token 17 (at fault: baseline), gap 3 (of the baseline 0.0625)" in lines[-2]
    )
    assert lines[-1] == "1 output could not be checked: no memory."
    lines = conclusions_of(results[2:3], tokenizer).splitlines()
    assert "The largest: prompt 3, K = 3, both alike (at fault: both), gap 0.5 " in lines[-1]


def test_the_conclusions_are_the_figures_in_words(tokenizer):
    said = conclusions_of([result_of(1), result_of(2, factor=2.0)], tokenizer)
    step_s = (3.0 - 0.02) / 20
    c, v = 0.01 / step_s, 0.1 / step_s
    alpha = 4 / 6
    predicted, ideal = (100 * ((1 - alpha**4) / ((1 - alpha) * (3 * c + cost)) - 1) for cost in (v, 1))
    expected = [
        "Speculative decoding was 2.00 times as fast (over the prompts 2.00 to 2.00). A pass of the main model yielded "
        f"2.33 tokens, and α = 0.667 of the tested draft tokens were accepted. A verify pass cost v = {v:.3f} baseline "
        f"steps, a draft step c = {c:.3f}.",
        f"With K = 3, these predict {predicted:+.0f} %; ideal, if verifying cost one step: {ideal:+.0f} %.",
        # Of 1.5 s: 0.6 of verify passes, 0.18 of drafting; rounds of 0.9 s in all.
        "Its time went to 40 % verifying, 12 % drafting, 40 % reading the prompts, 8 % all else.",
        # The baseline takes 3 s for as many tokens. 8 of 18 draft tokens are accepted: 14 of 24 rounds' tokens.
        f"With a draft that cost nothing it would be {100 * (3 / (1.5 - 0.18) - 1):+.0f} %, with one that is always "
        f"right {100 * (3 / (1.5 - 0.9 * 10 / 24) - 1):+.0f} %, and with verify passes as cheap as baseline steps "
        f"{100 * (3 / (1.5 - 0.6 + 6 * step_s) - 1):+.0f} %.",
        f"At these c and v a draft pays from α = {c + v - 1 if c + v > 1 else 0:.3f} on, with the best K.",
        "All 2 outputs are the main model's own, token for token.",
    ]
    assert [line for line in said.splitlines() if not line.startswith("These figures cannot all be right")] == expected


def test_how_near_the_baseline_is_to_the_memorys_limit(tokenizer):
    methods = [METHODS[0], sd.Method("K = 3", None, 3, weights_gb=0.99)]  # in 0.099 s: 10 GB/s
    for memory, expected in (
        (18.0, "is what it waits for, and where speculation pays"),
        (40.0, "(--compile on)"),
        (5.0, "from a cache"),
    ):
        report = sd.Report(console := console_of(4000), methods, tokenizer)
        report.add(result_of(methods=methods), show_text=False)
        report.finish(memory)
        said = console.file.getvalue()
        assert (
            f"reads 10.0 GB of weights a second, memory can deliver {sd.number(memory)}: " in said and expected in said
        )
    assert "GB of weights" not in conclusions_of([result_of()], tokenizer)  # where nothing is known of the memory


def test_a_draft_that_no_acceptance_could_save(tokenizer):
    result = result_of()
    result.outcomes["K = 3"].runs[0].rounds = [sd.Round(3, 3, 0.6, 0.1, 0.75)] * 3  # each draft step takes two others
    said = conclusions_of([result], tokenizer)
    assert "At these c and v no draft pays, however often it is right." in said


def test_a_draft_that_does_not_pay_comes_with_advice(tokenizer):
    result = result_of()
    result.outcomes["K = 3"].runs[0].latency_s = 4.0
    said = conclusions_of([result], tokenizer)
    assert "Speculative decoding was 0.25 times as fast. A pass" in said  # of one prompt, there is no range
    assert "The draft does not pay here. Try --draft-tokens auto, or a draft that is smaller" in said
    assert "The output is the main model's own, token for token." in said


def test_the_best_of_several_draft_lengths_is_named_as_picked(tokenizer):
    said = conclusions_of([result_of()], tokenizer, METHODS)
    assert said.startswith("The fastest draft length in this run was K = 3, picked by the data that measured it.")
    assert "was 2.00 times as fast as transformers' generate(), eager." in said
    assert "All 2 outputs" in said  # ours: the library's are its own affair


def test_sampled_texts_are_not_compared(tokenizer):
    result = result_of()
    for outcome in result.outcomes.values():
        outcome.unchecked = sd.SAMPLED
    said = conclusions_of([result], tokenizer)
    assert said.endswith(
        "The texts are sampled, so they differ: both methods draw from the main model's own distribution.\n"
    )
    assert "token for token" not in said


def test_figures_that_cannot_be_right_are_said_to_be_noise(tokenizer):
    """A speedup above the mean acceptance length, and a verify pass below a step: only another load explains them."""
    result = result_of()
    result.outcomes["K = 3"].runs[0].latency_s = 0.1
    assert "the machine was busy" in conclusions_of([result], tokenizer)
    calm = result_of()
    calm.baseline.runs[0].latency_s = 0.5  # a step of 0.049 s, a verify pass of 0.1
    assert "the machine was busy" not in conclusions_of([calm], tokenizer)


# Repeats, intervals and the picture of real runs


def test_repeats_give_a_spread(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert run(*QUICK, "--limit", 2, "--repeats", 3, "--json", out) == 0
    summary = (measured := json.loads(out.read_text())["runs"][0])["summary"]
    for prompt in measured["prompts"]:
        for method in (prompt["baseline"], prompt["speculative"]):
            assert 0 < method["latency_min_s"] <= method["latency_s"] <= method["latency_max_s"]
    assert summary["speedup_interval_percent"] is None  # of two prompts: no claim
    low, high = summary["speedup_range_percent"]
    printed = " ".join(capsys.readouterr().out.split())
    assert low < high and f"(over the prompts {1 + low / 100:.2f} to {1 + high / 100:.2f})" in printed
    spread = [sd.number(summary["baseline"][f"latency_{end}_s"]) for end in ("min", "max")]
    assert f"slowest of 3 repeats: {spread[0]} to {spread[1]} s (baseline)" in printed


def test_ten_prompts_give_an_interval(tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ("sum", "zip", "map", "len", "max", "min", "abs", "any", "all", "ord")
    path = write(tmp_path / "p.txt", *(f"What does {word} do?" for word in words))
    assert run(*QUICK, "--max-new-tokens", 6, "--prompts", path, "--json", out) == 0
    summary = json.loads(out.read_text())["runs"][0]["summary"]
    low, high = summary["speedup_interval_percent"]
    printed = " ".join(capsys.readouterr().out.split())
    assert low < high and f"(95 % interval {1 + low / 100:.2f} to {1 + high / 100:.2f})" in printed
    least, most = summary["speedup_range_percent"]
    assert least <= low < summary["speedup_percent"] < high <= most and "over the prompts" not in printed


def test_the_picture_shows_the_report(tmp_path, capsys):
    path = write(tmp_path / "p.txt", "What <does> & list.sort [bold]do[/bold]?\x1b[2J")
    out = tmp_path / "report.svg"
    assert run(*QUICK, "--prompts", path, "--draft-tokens", "1,2", "--svg", out) == 0
    svg = xml.etree.ElementTree.parse(out)  # whole, and well-formed
    text = "".join(svg.getroot().itertext()).replace("\xa0", " ")
    assert "What <does> & list.sort [bold]do[/bold]?�[2J" in text
    assert "Times as fast as the baseline" in text and "K = 1" in text and "predicted" in text and "█" in text
    assert "token for token" in text and "Loading" not in text
    assert "cannot write" in refused(capsys, *QUICK, "--limit", 1, "--svg", tmp_path / "no" / "folder.svg")


def test_a_long_category_gives_way_to_its_figures(tokenizer):
    """Of two alike but for their categories' names, the rows have the same figures."""
    _, printed = report_of([result_of(1, "c" * 100), result_of(2, "short")], tokenizer)
    table = printed[printed.index("By category") :].splitlines()[1:3]
    assert all(len(row) <= 120 for row in table) and re.match(r"  c{30,}… ", table[0])
    assert table[0].split()[1:] == table[1].split()[1:]

"""The program as people run it: its options, every way it can refuse and end, terminals, and several processes."""

import contextlib
import dataclasses
import functools
import json
import os
import pty
import re
import resource
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import tomllib
import traceback
import xml.etree.ElementTree
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import ROOT, make_model

import speculative_decoding as sd

PROGRAM = ROOT / "speculative_decoding.py"
MAIN, DRAFT = ROOT / "tests/tiny_gemma2/main", ROOT / "tests/tiny_gemma2/draft"
PAIR = ["--main", MAIN, "--draft", DRAFT]
SHORT = ["--warmup", 0, "--draft-tokens", 3, "--max-new-tokens", 12]
QUICK = ["--demo", *SHORT]
PATIENCE = 120


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Signals are this process's own again after a test; and no run here measures the memory, but the plain command."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sd, "memory_bandwidth_gb_s", lambda device: 20.0)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(*arguments):
    return sd.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """Run, see it refused, return the one line that it says."""
    status = run(*arguments)
    said = capsys.readouterr().err.splitlines()
    if said[0].startswith("Loading "):
        said.pop(0)
    assert status == 2 and len(said) == 1 and said[0].startswith("error: "), said
    return said[0]


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def read(path):
    return json.loads(path.read_text())


def outcomes_of(report, label):
    """What a method did with each prompt."""
    return [prompt["outcomes"][label] for prompt in report["prompts"]]


def summaries_of(report):
    return {method["label"]: method["summary"] for method in report["methods"]}


def ids_of(report, label):
    return [outcome["token_ids"] for outcome in outcomes_of(report, label)]


# The program as a process of its own


def run_the_file(arguments):
    sys.argv = [str(PROGRAM), *arguments]
    for library in torch.library._keep_alive:  # what this process has imported defines its operators again
        if library.ns == PROGRAM.stem:
            library._destroy()
    runpy.run_path(str(PROGRAM), run_name="__main__")


def become_the_program(arguments, descriptors, environment, begin):
    """End this process as the program does. What Python does at its start and its end is done here by hand."""
    for place, descriptor in enumerate(descriptors, 1):
        if descriptor is None:
            os.close(place)
        else:
            os.dup2(descriptor, place)
    streams = [None if descriptor is None else open(place, "w") for place, descriptor in enumerate(descriptors, 1)]
    sys.stdout, sys.stderr = streams
    for name, value in {"TOKENIZERS_PARALLELISM": "false", **environment}.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    torch.set_num_threads(1)  # makes the pool anew that a fork loses, before several threads ask for it at once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        begin(arguments)
        status = 0
    except SystemExit as ended:
        status = ended.code
        if callable(signal.getsignal(signal.SIGINT)):  # Python, shutting down, forgets what functions it was to call
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # nothing may come of it
    with contextlib.suppress(OSError):  # Python says that it cannot flush stdout, and ends with status 120
        for stream in filter(None, streams):
            stream.flush()
        return 98 if torch.distributed.is_initialized() else status
    return 120


class Started:
    """The program, started. Of the imports that would take ten seconds it has what this process has: it is forked.

    `out`: where its stdout goes, a descriptor; None: it is closed; by default it is read here. `err`: as `out`, but by
    default it goes to a file. `environment`: variables of its own; None: without that one. `begin`: what runs; by
    default the file, as it is.
    """

    def __init__(self, *arguments, out="pipe", err="file", environment=None, begin=run_the_file):
        arguments, self.printed, self.status = [str(argument) for argument in arguments], "", None
        self.errors, (self.reads, writes) = tempfile.TemporaryFile("w+"), os.pipe()
        descriptors = [writes if out == "pipe" else out, self.errors.fileno() if err == "file" else err]
        if (pid := os.fork()) == 0:
            status = 97
            try:
                status = become_the_program(arguments, descriptors, environment or {}, begin)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        self.pid = pid
        os.close(writes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.reads)
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def read(self):
        """Read on; False at the end."""
        assert select.select([self.reads], [], [], PATIENCE)[0], self.printed
        chunk = os.read(self.reads, 65536)
        self.printed += chunk.decode()
        return bool(chunk)

    def wait_for(self, row):
        """Wait until it has printed what the pattern `row` finds."""
        while not re.search(row, self.printed, re.MULTILINE):
            assert self.read(), (self.finish(), self.status)

    def finish(self):
        """Wait for its end; return all that it printed and said."""
        while self.read():
            pass
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.errors.seek(0)
        said = self.errors.read()
        assert "Traceback" not in said and "Exception ignored" not in said, said
        return self.printed, said


def finished(*arguments, **how):
    """The program, run to its end: its status, what it printed, and what it said."""
    with Started(*arguments, **how) as program:
        printed, said = program.finish()
    return program.status, printed, said


# The options


def test_the_packages_at_the_top_of_the_file_are_those_of_requirements_txt():
    """So that `uv run speculative_decoding.py` needs no environment by hand."""
    block = re.search(r"(?ms)^# /// script\n(.*?)^# ///$", PROGRAM.read_text())[1]
    script = tomllib.loads("".join(line.removeprefix("# ") for line in block.splitlines(keepends=True)))
    assert script["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    assert script["requires-python"] == ">=3.11"


OPTIONS = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(sd.Settings)]


def test_the_readme_lists_every_option_and_no_other():
    listed = [
        re.findall(r"--[a-z-]+", row) for row in re.findall(r"(?m)^\| (`--.*?) \|", (ROOT / "README.md").read_text())
    ]
    assert sorted(sum(listed, [])) == sorted(OPTIONS)


def test_the_readmes_commands_are_understood():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python speculative_decoding\.py((?:\s[^\s`#…]+)*)", text)
    commands = [
        shlex.split(command.partition("\n\n")[0].partition("This is")[0]) for command in commands if "-" in command
    ]
    assert len(commands) >= 3
    for command in commands:
        sd.parse(command)


def test_the_help_names_every_option_and_the_exit_statuses(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help")
    printed, said = capsys.readouterr()
    assert ended.value.code == 0 and said == ""
    assert re.findall(r"(?m)^  (--[a-z-]+)", printed) == OPTIONS
    statuses = "Exit status: 0 all well; 1 some prompt failed, or some output is not the main model's own; 2 it could"
    assert f"{statuses} not run; 130 interrupted." in " ".join(printed.split())


def test_paths_are_told_from_here_where_there_is_a_way(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sd.near(tmp_path / "a" / "b") == os.path.join("a", "b")

    def other_drive(path):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(os.path, "relpath", other_drive)
    assert sd.near(tmp_path / "a") == str(tmp_path / "a")


def test_options_become_settings():
    assert sd.parse([]) == sd.Settings()
    assert sd.Settings().draft_tokens == ("auto",) and sd.Settings().max_new_tokens == 128
    given = ["--draft-tokens", "3,auto,1,3", "--draft", "A, B,ngram,ngram+A,A", "--top-p", "0.9", "--temperature", "1"]
    settings = sd.parse([*given, "--chat-template-args", '{"enable_thinking": false}', "--no-chat-template"][:-1])
    assert settings == sd.Settings(
        draft_tokens=(3, "auto", 1),
        draft=("A", "B", "ngram", "ngram+A"),
        top_p=0.9,
        temperature=1.0,
        chat_template_args={"enable_thinking": False},
    )


def test_a_folder_with_a_comma_in_its_name_is_one_draft(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert sd.parse(["--draft", str(tmp_path / "a,b")]).draft == (str(tmp_path / "a,b"),)
    assert sd.parse(["--draft", str(tmp_path / "c,b")]).draft == (str(tmp_path / "c"), "b")


K_HELP = "is not auto, or a number from 1 to 1000, or several with commas between them"
ARGS_HELP = 'is no JSON object for the template, as {"enable_thinking": false}'
DRAFT_HELP = "name a model, ngram, ngram+MODEL, or several with commas between them"
BAD = [
    (["--draft-tokens", "0"], f"argument --draft-tokens: '0' {K_HELP}"),
    (["--draft-tokens", "three"], f"argument --draft-tokens: 'three' {K_HELP}"),
    (["--draft-tokens", "3,,4"], f"argument --draft-tokens: '' {K_HELP}"),
    (["--draft-tokens", "1001"], f"argument --draft-tokens: '1001' {K_HELP}"),
    (["--draft", "A,,B"], f"argument --draft: 'A,,B': {DRAFT_HELP}"),
    (["--draft", "A,ngram+"], f"argument --draft: 'A,ngram+': {DRAFT_HELP}"),
    (["--max-new-tokens", "-1"], "argument --max-new-tokens: '-1' is not a whole number of at least 1"),
    (["--repeats", "0"], "argument --repeats: '0' is not a whole number of at least 1"),
    (["--limit", "0"], "argument --limit: '0' is not a whole number of at least 1"),
    (["--warmup", "-1"], "argument --warmup: '-1' is not a whole number of at least 0"),
    (["--seed", "1.5"], "argument --seed: '1.5' is not a whole number of at least 0"),
    (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8' (choose from"),
    (["--temperature", "-1"], "argument --temperature: '-1' is not a number from 0 to 100"),
    (["--temperature", "nan"], "argument --temperature: 'nan' is not a number from 0 to 100"),
    (["--top-p", "0"], "argument --top-p: '0' is not a number above 0, up to 1"),
    (["--top-p", "1.1"], "argument --top-p: '1.1' is not a number above 0, up to 1"),
    (["--chat-template-args", "{'a': 1}"], f"argument --chat-template-args: \"{{'a': 1}}\" {ARGS_HELP}"),
    (["--chat-template-args", "[1]"], f"argument --chat-template-args: '[1]' {ARGS_HELP}"),
    (["--chat-template-args", "[" * 100_000], "argument --chat-template-args: '[[["),
    (["--chat-template-args", '{"x": NaN}'], f"argument --chat-template-args: '{{\"x\": NaN}}' {ARGS_HELP}"),
    (["--chat-template-args", '{"x": 1e999}'], f"argument --chat-template-args: '{{\"x\": 1e999}}' {ARGS_HELP}"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--temp", "1"], "unrecognized arguments: --temp 1"),  # no abbreviations
    (["stray"], "unrecognized arguments: stray"),
    (["--top-k", "5"], "--top-k and --top-p cut what tokens are sampled from: add a --temperature"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_option_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    printed, said = capsys.readouterr()
    assert ended.value.code == 2 and printed == ""
    assert said.startswith(f"error: {message}") and said.endswith("; see --help\n") and said.count("\n") == 1


SAMPLED = "--top-k and --top-p cut what tokens are sampled from: add a --temperature"
ROUNDED = "--temperature is 0 or at least 0.001: less is rounded away"
CONTRADICTIONS = [  # what contradicts, and what is so near that it could be taken for it
    (
        "--demo brings its own main model: leave out --main, or --demo",
        [{"demo": True, "main": "A"}],
        [{"demo": True, "draft": ("A",)}, {"main": "A"}],
    ),
    (SAMPLED, [{"top_k": 5}, {"top_p": 0.9}], [{"top_k": 5, "top_p": 0.9, "temperature": 1.0}, {"temperature": 1.0}]),
    (ROUNDED, [{"temperature": 0.0009}], [{"temperature": 0.001}, {"temperature": 0.0}]),
    (
        "--no-chat-template leaves no template for --chat-template-args: leave out one of them",
        [{"no_chat_template": True, "chat_template_args": {"a": 1}}],
        [{"no_chat_template": True}, {"chat_template_args": {"a": 1}}],
    ),
    (
        "--device-map auto moves weights while it runs, which cannot be compiled: leave out --compile on",
        [{"device_map": "auto", "compile": "on"}],
        [{"device_map": "auto"}, {"compile": "on"}, {"device_map": "auto", "compile": "off"}],
    ),
    (
        "--max-memory says how --device-map auto spreads the main model: add that",
        [{"max_memory": "1GB"}],
        [{"max_memory": "1GB", "device_map": "auto"}],
    ),
    (
        "--json and --svg need files of their own, which are not the prompts'; name others",
        [
            {"json": "a", "svg": "b/../a"},
            {"prompts": "a", "json": "./a"},
            {"prompts": "a", "svg": "a"},
            {"json": str(ROOT / "prompts.txt")},
            {"svg": str(ROOT / "tests/tiny_gemma2/prompts.txt")},
        ],
        [{"prompts": "a", "json": "b", "svg": "c"}, {"prompts": str(ROOT / "prompts.txt")}],
    ),
]


@pytest.mark.parametrize(("message", "contradictory", "fine"), CONTRADICTIONS, ids=range(len(CONTRADICTIONS)))
def test_options_that_contradict_each_other(message, contradictory, fine):
    assert [sd.find_contradiction(sd.Settings(**given)) for given in contradictory] == [message] * len(contradictory)
    assert [sd.find_contradiction(sd.Settings(**given)) for given in fine] == [None] * len(fine)


SLOW = "huggingface_hub numpy psutil rich tokenizers torch transformers".split()
BEFORE_THE_IMPORTS = """
import runpy, signal, sys

class Instead:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in SLOW:
            AT_THE_FIRST

sys.meta_path.insert(0, Instead())
for arguments in CASES:
    sys.argv[1:] = arguments
    try:
        runpy.run_path(PROGRAM, run_name="__main__")
    except SystemExit as ended:
        print("ended with", ended.code)
    except RuntimeError as error:
        print(error)
"""


def before_the_imports(at_the_first, *cases):
    """Run the program, for several cases of options; what happens at the first import of those that take seconds."""
    about = f"SLOW, PROGRAM, CASES = {SLOW!r}, {str(PROGRAM)!r}, {cases!r}\n"
    command = [sys.executable, "-c", about + BEFORE_THE_IMPORTS.replace("AT_THE_FIRST", at_the_first)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_help_and_mistakes_are_answered_before_the_slow_imports():
    cases = ["--help"], ["--draft-tokens", "0"], ["--top-k", "5"], ["--nonsense"], ["--demo"]
    done = before_the_imports("raise RuntimeError(name)", *cases)
    assert done.returncode == 0, done.stderr
    *usage, helped, mistake, contradiction, unknown, good = done.stdout.splitlines()
    assert [helped, mistake, contradiction, unknown] == ["ended with 0", *["ended with 2"] * 3]
    assert good == "huggingface_hub" and usage[0].startswith("usage: ")  # good options get as far as the imports
    assert done.stderr.count("error: ") == 3 == done.stderr.count("\n")


def test_control_c_while_it_imports_ends_it_at_once_and_quietly():
    done = before_the_imports("signal.raise_signal(signal.SIGINT)", ["--demo"])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# What it does


def test_the_plain_command_shows_five_prompts_and_a_result(demo):
    done, report = demo
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "No GPU in use: this is the bundled pair of tiny models. Its speed says nothing about Gemma's."
    assert lines[1] == "Speculative decoding: which draft pays?"
    assert lines[5] == "  K = 3 / auto, up to 128 new tokens, 5 prompts"
    titles = [place for place, line in enumerate(lines) if re.match(r"  [1-5] \S", line)]
    assert len(titles) == 5
    for place in titles:
        for row, label in zip(lines[place + 1 : place + 4], ("baseline", "K = 3", "K = auto"), strict=True):
            assert row.startswith(f"    {label} ") and row.endswith(" yes")
    mean = lines.index("    mean")
    assert mean == titles[-1] + 4 and [line[-4:] for line in lines[mean + 1 : mean + 4]] == [" 5/5"] * 3
    assert lines[-1] == "All 10 outputs are the main model's own, token for token."
    assert max(map(len, lines)) <= 120
    assert "\x1b" not in done.stdout + done.stderr  # piped: no colours, no cursor movements
    assert re.fullmatch(r"Loading \S+/main and \S+/draft …\n", done.stderr)  # nor a progress bar
    assert report["settings"]["demo"] is True and report["complete"] is True
    assert report["settings"]["device"] == "cpu" and report["settings"]["dtype"] == "float32"


def test_texts_do_not_depend_on_how_they_are_decoded(demo, tmp_path):
    """Of the file as its own process: shorter texts are the beginnings of longer ones, whatever K."""
    out = tmp_path / "out.json"
    status, printed, said = finished(*QUICK, "--draft-tokens", "2,5", "--json", out)
    assert (status, said.count("\n")) == (0, 1)
    assert printed.startswith("This is the bundled pair of tiny models. Its speed says nothing about Gemma's.\n")
    for label in ("baseline", "K = 2", "K = 5"):
        assert ids_of(read(out), label) == [ids[:12] for ids in ids_of(demo[1], "baseline")]


def counting(monkeypatch, *names):
    """Let functions of the program note what they are given and what they return: [(name, given, returned)]."""
    calls = []

    def noted(name, function, *given, **further):
        returned = function(*given, **further)
        calls.append((name, given, returned))
        return returned

    for name in names:
        monkeypatch.setattr(sd, name, functools.partial(noted, name, getattr(sd, name)))
    return calls


def test_the_options_do_what_they_say(tmp_path, one_prompt, capsys, monkeypatch):
    out, svg = tmp_path / "out.json", tmp_path / "out.svg"
    calls = counting(monkeypatch, "decode_autoregressively", "decode_speculatively")
    options = ["--max-new-tokens", 16, "--draft-tokens", 5, "--ignore-eos", "--no-chat-template", "--dtype", "float32"]
    files = ["--prompts", one_prompt, "--json", out, "--svg", svg]
    assert run(*PAIR, *files, *options, "--repeats", 2, "--warmup", 2, "--show-text") == 0
    printed, report = capsys.readouterr().out, read(out)
    names = [name for name, _, _ in calls]
    assert names[:3] == ["decode_autoregressively"] * 3 and names[3:6] == ["decode_speculatively"] * 3  # 2 to warm up
    assert names[6:] == ["decode_speculatively", "decode_autoregressively"]  # they take turns at being the first
    assert {given[-1].end_ids for _, given, _ in calls} == {frozenset()}
    assert "bundled pair" not in printed  # models named on the command line are the models that run
    settings = report["settings"]
    assert (settings["main"], settings["draft"], settings["demo"]) == (str(MAIN), [str(DRAFT)], False)
    assert (settings["repeats"], settings["warmup"], settings["ignore_eos"]) == (2, 2, True)
    (prompt,) = report["prompts"]
    ids = transformers.AutoTokenizer.from_pretrained(MAIN)("What does heapq.merge do?")["input_ids"]
    assert prompt["prompt_tokens"] == len(ids)
    for label in ("baseline", "K = 5"):
        outcome = prompt["outcomes"][label]
        assert (len(outcome["token_ids"]), outcome["verdict"]) == (16, "identical")
    assert set(prompt["outcomes"]["K = 5"]["rounds"]["drafted"]) == {5}
    assert "\nK = 5:\n" in printed and "accepted draft token  «the main model's own, after a rejection»" in printed
    assert "\x1b" not in printed
    rows = [text.text or "" for text in xml.etree.ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]
    words = " ".join(rows).split()
    assert words[words.index("Speculative") :] == printed.split()  # the picture is the report


def test_bfloat16_outputs_are_the_main_models_own(tmp_path, capsys):
    """The type that the default pair runs in: whatever parts, parts at a tie."""
    out = tmp_path / "out.json"
    assert run("--demo", "--dtype", "bfloat16", "--draft-tokens", 4, "--warmup", 0, "--limit", 2, "--json", out) == 0
    summary = summaries_of(read(out))["K = 4"]
    assert summary["identical"] + summary["ties"] == 2 and summary["mismatches"] == 0 == summary["unchecked"]
    assert ", bfloat16, eager\n" in capsys.readouterr().out


def test_sampled_runs_are_repeated_by_their_seed(tmp_path, capsys, one_prompt):
    def sampled(seed):
        out = tmp_path / "out.json"
        assert run(*QUICK, "--prompts", one_prompt, "--temperature", 3, "--seed", seed, "--json", out) == 0
        return read(out)

    first, again, other = sampled(1), sampled(1), sampled(2)
    printed = capsys.readouterr().out
    assert "  temperature 3, top-k off, top-p 1, seed 1; log-likelihoods are at temperature 1, uncut\n" in printed
    for label in ("baseline", "K = 3"):
        assert ids_of(first, label) == ids_of(again, label) != ids_of(other, label)
        (outcome,) = outcomes_of(first, label)
        assert (outcome["verdict"], outcome["divergence"]) == ("sampled", None)
    assert ids_of(first, "baseline") != ids_of(first, "K = 3")
    assert summaries_of(first)["K = 3"]["identical"] is None
    assert printed.count(" sampled\n") == 6
    assert "The texts are sampled, so they differ: all methods draw from the main model's own distribution." in printed


def test_transformers_own_methods_stand_beside_ours(tmp_path, capsys, one_prompt):
    out = tmp_path / "out.json"
    assert run(*QUICK, "--prompts", one_prompt, "--compare", "transformers", "--json", out) == 0
    report, printed = read(out), capsys.readouterr().out
    library = {method["label"]: method["library"] for method in report["methods"]}
    assert library == {
        "baseline": None,
        "K = 3": None,
        "generate()": "transformers' generate(), eager",
        "assist 3": "transformers' assisted generation, K = 3, eager",
    }
    for label in library:
        assert ids_of(report, label) == ids_of(report, "baseline")
        assert [outcome["verdict"] for outcome in outcomes_of(report, label)] == ["identical"]
    for label in ("generate()", "assist 3"):
        assert re.search(rf"(?m)^    {re.escape(label)} +12 .* yes$", printed)
        assert re.search(
            rf"(?m)^K = 3 was [\d.]+ times as fast as {re.escape(f'{label}: {library[label]}.')}$", printed
        )
    assert "The output is the main model's own, token for token." in printed  # ours


def test_a_mismatch_ends_with_status_1(monkeypatch, capsys, tmp_path):
    """Of a loop that leaves one rejected token in the main model's cache."""
    decode = sd.decode_speculatively

    def forgetful(main, *further):
        roll_back = main.roll_back
        monkeypatch.setattr(main, "roll_back", lambda tokens: roll_back(max(0, tokens - 1)))
        try:
            return decode(main, *further)
        finally:
            monkeypatch.delattr(main, "roll_back")

    monkeypatch.setattr(sd, "decode_speculatively", forgetful)
    out = tmp_path / "out.json"
    assert run("--demo", "--draft-tokens", 3, "--max-new-tokens", 40, "--warmup", 0, "--json", out) == 1
    printed, report = " ".join(capsys.readouterr().out.split()), read(out)
    wrong = {}
    for prompt in report["prompts"]:
        outcome = prompt["outcomes"]["K = 3"]
        if outcome["verdict"] == "mismatch":
            assert outcome["divergence"]["at_fault"] == "speculative"
            wrong[prompt["number"]] = outcome["divergence"]["gap"]
    summaries = summaries_of(report)
    assert wrong and summaries["K = 3"]["mismatches"] == len(wrong) and summaries["baseline"]["identical"] == 5
    assert "All 5" not in printed and f"{5 - len(wrong)} of 5 outputs are the main model's own" in printed
    lead = f"Mismatches, NOT the main model's own (please report this as a bug): {len(wrong)}. The largest: prompt "
    assert f"{lead}{max(wrong, key=wrong.get)}, K = 3, new token " in printed and printed.count(" NO ") == len(wrong)


def broken_copy(folder):
    """A draft that cannot be loaded: everything but its weights."""
    shutil.copytree(DRAFT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_drafts_that_cannot_be_loaded_are_rows_and_the_others_go_on(tmp_path, capsys, one_prompt):
    """One that is found out before any weights are read, and one afterwards; each alone and beside n-grams."""
    missing, broken, out = tmp_path / "missing", broken_copy(tmp_path / "broken"), tmp_path / "out.json"
    drafts = f"{DRAFT},{missing},{broken},ngram,ngram+{DRAFT},ngram+{broken}"
    assert run("--main", MAIN, "--draft", drafts, "--prompts", one_prompt, *SHORT, "--json", out) == 1
    printed, said = capsys.readouterr()
    report = read(out)
    labels = [f"{name}, K = 3" for name in ("draft", "missing", "broken", "ngram", "ngram+draft", "ngram+broken")]
    assert [method["label"] for method in report["methods"]] == ["baseline", *labels]
    assert [method["draft"] for method in report["methods"]] == [None, *drafts.split(",")]
    good = {"baseline", "draft, K = 3", "ngram, K = 3", "ngram+draft, K = 3"}
    (prompt,) = report["prompts"]
    for method in report["methods"]:
        outcome = prompt["outcomes"][method["label"]]
        assert outcome["error"] == method["error"]
        if method["label"] in good:
            assert method["error"] is None and outcome["verdict"] == "identical" and method["summary"]["identical"] == 1
            assert re.search(rf"(?m)^    {re.escape(method['label'])} +12 .* yes$", printed)
        else:
            assert method["summary"] is None is outcome["figures"] is outcome["verdict"]
            assert f" {method['label']}: {method['error']} " in " ".join(printed.split())
    errors = {method["label"]: method["error"] for method in report["methods"]}
    assert errors["missing, K = 3"].startswith(f"there is no folder {missing}, and the hub shows no model of that name")
    assert errors["broken, K = 3"].startswith(f"cannot load {broken}: ")
    assert errors["broken, K = 3"] == errors["ngram+broken, K = 3"]
    assert "All 3 outputs are the main model's own" in printed and report["complete"] is True
    assert "error" not in said


def test_without_any_draft_that_can_be_loaded_nothing_is_measured(tmp_path, capsys, one_prompt):
    missing, broken, prompts = tmp_path / "missing", broken_copy(tmp_path / "broken"), ["--prompts", one_prompt]
    nowhere, unusable = f"error: there is no folder {missing}, ", f"error: cannot load {broken}: "
    assert refused(capsys, "--main", MAIN, "--draft", missing, *prompts).startswith(nowhere)
    assert refused(capsys, "--main", MAIN, "--draft", broken, *prompts).startswith(unusable)
    assert refused(capsys, "--main", MAIN, "--draft", f"ngram+{broken}", *prompts).startswith(unusable)
    assert refused(capsys, "--main", MAIN, "--draft", f"{missing},{broken}", *prompts).startswith("error: ")
    assert refused(capsys, "--main", missing, "--draft", f"{DRAFT},ngram", *prompts).startswith(nowhere)
    assert refused(capsys, "--main", broken, "--draft", f"{DRAFT},ngram", *prompts).startswith(unusable)


def test_a_model_can_be_its_own_draft(tmp_path, one_prompt):
    """Which is always right: the two share their weights, but not their caches."""
    out = tmp_path / "out.json"
    assert run("--main", MAIN, "--draft", MAIN, "--prompts", one_prompt, *SHORT, "--json", out) == 0
    (outcome,) = outcomes_of(read(out), "K = 3")
    assert outcome["verdict"] == "identical" and outcome["rounds"]["accepted"] == outcome["rounds"]["drafted"]


# What must be refused: status 2, one line that says what and how, no traceback


def test_devices_and_files_that_are_not_there_are_refused(tmp_path, capsys):
    for device in ["abacus", "meta"] + ["cuda"] * (not torch.cuda.is_available()):
        message = refused(capsys, "--demo", "--device", device)
        assert message.startswith(f"error: cannot use the device '{device}': ") and message.endswith("--device auto")
    none = tmp_path / "none.txt"
    message = f"error: cannot read {none}: No such file or directory; name a text file with --prompts"
    assert refused(capsys, "--demo", "--prompts", none) == message


def test_no_file_is_replaced_that_should_stay(tmp_path, capsys):
    prompts, folder = write(tmp_path / "p.txt", "What does re.split do?"), tmp_path / "no" / "file"
    for option in ("--json", "--svg"):
        with pytest.raises(SystemExit):  # before the imports
            run(*QUICK, "--prompts", prompts, option, prompts)
        capsys.readouterr()
        is_none = f"error: {{}} is not a file that can be replaced; name another with {option}"
        assert refused(capsys, *QUICK, option, "/dev/null") == is_none.format("/dev/null")
        assert refused(capsys, *QUICK, option, tmp_path) == is_none.format(tmp_path)
        nowhere = f"error: cannot write {folder}: No such file or directory; name another file with {option}"
        assert refused(capsys, *QUICK, option, folder) == nowhere
    assert refused(capsys, *QUICK, "--json", "/proc/out").startswith("error: cannot write /proc/out: ")
    assert prompts.read_text() == "What does re.split do?\n" and not os.path.isfile("/dev/null")
    earlier, link = write(tmp_path / "earlier.json", {}), tmp_path / "link.json"
    link.symlink_to(earlier)
    refused(capsys, *QUICK, "--prompts", tmp_path / "none.txt", "--json", link)
    assert earlier.read_text() == "{}\n"  # until there is something to write
    assert run(*QUICK, "--prompts", prompts, "--json", link) == 0
    assert link.is_symlink() and read(earlier)["complete"] is True
    assert sorted(file.name for file in tmp_path.iterdir()) == ["earlier.json", "link.json", "p.txt"]


# While it runs


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB"


def failing(monkeypatch, fails):
    """Let every model that is loaded run out of memory where `fails` is true of the ids that it reads."""
    load = sd.load_model

    def out_of_memory(module, arguments):
        if fails(arguments[0]):
            raise torch.OutOfMemoryError(OUT_OF_MEMORY.replace(". ", ".\n"))

    def load_model(*arguments):
        model = load(*arguments)
        model.get_input_embeddings().register_forward_pre_hook(out_of_memory)
        return model

    monkeypatch.setattr(sd, "load_model", load_model)


def failing_at(monkeypatch, word):
    token = transformers.AutoTokenizer.from_pretrained(MAIN)(word)["input_ids"][-1]
    failing(monkeypatch, lambda ids: (ids == token).any())


def test_a_prompt_that_fails_is_a_row_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "p.txt", "What does list.sort do?", "What does zip do?", "What does re.split do?")
    failing_at(monkeypatch, "zip")
    assert run(*QUICK, "--prompts", path, "--json", tmp_path / "out.json") == 1
    printed, report = capsys.readouterr().out, read(tmp_path / "out.json")
    rows = f"    baseline: {OUT_OF_MEMORY}\n    K = 3: {OUT_OF_MEMORY}\n"
    assert f"\n  2 What does zip do?\n{rows}  3 What does re.split do?\n" in printed
    for label in ("baseline", "K = 3"):
        first, failed, last = outcomes_of(report, label)
        assert failed["error"] == OUT_OF_MEMORY and first["error"] is None is last["error"]
        assert failed["figures"] is failed["verdict"] is failed["token_ids"] is failed["rounds"] is None
        assert summaries_of(report)[label]["identical"] == 2 == summaries_of(report)[label]["prompts"]
    assert "All 2 outputs are the main model's own" in printed and report["complete"] is True


def test_a_method_that_fails_costs_its_own_rows_only(tmp_path, capsys, monkeypatch):
    """A model that runs out of memory in passes of 21 tokens: the verify passes of K = 20, and no others."""
    failing(monkeypatch, lambda ids: ids.shape[1] == 21)
    path = write(tmp_path / "p.txt", "What does list.sort do?", "What does re.split do?")
    out = tmp_path / "out.json"
    assert run(*QUICK, "--prompts", path, "--draft-tokens", "20,3,auto", "--json", out) == 1
    printed, report = capsys.readouterr().out, read(out)
    assert 21 not in [prompt["prompt_tokens"] for prompt in report["prompts"]]
    assert [outcome["error"] for outcome in outcomes_of(report, "K = 20")] == [OUT_OF_MEMORY] * 2
    summaries = summaries_of(report)
    assert summaries.pop("K = 20") is None and report["complete"] is True
    assert {label: row["identical"] for label, row in summaries.items()} == {"baseline": 2, "K = 3": 2, "K = auto": 2}
    good = r"^    baseline +12 .* yes\n    K = 3 +12 .* yes\n    K = auto +12 .* yes\n"
    rows = good + re.escape(f"    K = 20: {OUT_OF_MEMORY}\n")
    assert len(re.findall(rows, printed, re.MULTILINE)) == 2
    assert re.search(r"(?m)^    mean\n    baseline .* 2/2\n    K = 3  .* 2/2\n    K = auto  .* 2/2\n\n", printed)
    assert "All 4 outputs are the main model's own" in printed


def test_too_little_memory_for_measuring_costs_is_a_row_of_that_method(tmp_path, capsys, monkeypatch):
    """Costs are measured behind a prompt of middle length; here the one that fails."""
    path = write(
        tmp_path / "p.txt",
        "What does re do?",
        "What does the function zip do?",
        "What does the built-in function sorted do in Python?",
    )
    failing_at(monkeypatch, "zip")
    assert run(*QUICK, "--prompts", path, "--draft-tokens", "3,auto", "--json", tmp_path / "out.json") == 1
    printed, report = capsys.readouterr().out, read(tmp_path / "out.json")
    why = f"what passes cost cannot be measured: {OUT_OF_MEMORY}"
    assert [outcome["error"] for outcome in outcomes_of(report, "K = auto")] == [why] * 3
    assert [outcome["error"] for outcome in outcomes_of(report, "K = 3")] == [None, OUT_OF_MEMORY, None]
    *_, auto = report["methods"]
    assert auto["error"] == why and auto["costs"] is None is auto["summary"]
    assert printed.count(f"    K = auto: {why}\n") == 3 and "All 2 outputs are the main model's own" in printed


def test_if_every_prompt_fails_nothing_can_be_said(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "p.txt", "What does zip do?")
    failing_at(monkeypatch, "zip")
    message = f"error: no prompt could be decoded ({OUT_OF_MEMORY})"
    assert refused(capsys, *QUICK, "--prompts", path) == message


def test_what_the_library_refuses_is_its_own_row(tmp_path, capsys, one_prompt):
    """The same tokenizer, but vocabularies that are padded differently: ours runs, assisted generation does not."""
    draft = transformers.AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32)
    draft.resize_token_embeddings(2112)
    draft.save_pretrained(tmp_path / "padded")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DRAFT / name, tmp_path / "padded" / name)
    pair = ["--main", MAIN, "--draft", tmp_path / "padded", "--prompts", one_prompt, *SHORT]
    assert run(*pair, "--compare", "transformers", "--json", tmp_path / "out.json") == 0
    printed, report = capsys.readouterr().out, read(tmp_path / "out.json")
    (refusal,) = outcomes_of(report, "assist 3")
    assert "different tokenizers" in refusal["error"] and refusal["figures"] is None
    assert f" assist 3: {refusal['error']} " in " ".join(printed.split())
    for label in ("baseline", "K = 3", "generate()"):
        assert [outcome["verdict"] for outcome in outcomes_of(report, label)] == ["identical"]
    assert "times as fast as generate()" in printed and "times as fast as assist 3" not in printed


def test_steps_that_cannot_be_compiled_run_eagerly_and_that_is_said(tmp_path, capsys, one_prompt):
    """OPT reads a number from the device while it is traced: the compiler finds no single graph."""
    model = make_model("opt")
    model.resize_token_embeddings(2048)
    folders = [tmp_path / "main", tmp_path / "draft"]
    for folder in folders:
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(MAIN / name, folder / name)
    pair = ["--main", folders[0], "--draft", folders[1], "--prompts", one_prompt, "--json", tmp_path / "out.json"]
    assert run(*pair, *SHORT, "--compile", "on") == 0
    printed, said = capsys.readouterr()
    assert "warning: compiling failed, so this runs eagerly: " in printed and "\nCompiling step 1 of 4 …\n" in said
    report = read(tmp_path / "out.json")
    assert report["environment"]["compiled"] is False and report["settings"]["compile"] == "on"
    assert summaries_of(report)["K = 3"]["identical"] == 1


# Conversations

TALK = {"question_id": 81, "turns": ["What does list.sort do?", "What does re.split do?", "And what does zip do?"]}


def asked(tokenizer, questions, answers):
    """The ids of a conversation, by hand."""
    text = "<bos>"
    for question, answer in zip(questions, [*answers, None], strict=True):
        text += f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"
        if answer is not None:
            text += tokenizer.decode(answer, skip_special_tokens=True).strip() + "<end_of_turn>\n"
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("sampling", [[], ["--temperature", 2]], ids=["greedy", "sampled"])
def test_turns_go_on_from_the_baselines_answers(tmp_path, capsys, monkeypatch, sampling):
    """Three turns of one question, for all methods with the same ids; and --limit counts questions."""
    calls = counting(monkeypatch, "decode_autoregressively", "decode_speculatively", "decode_by_generate")
    path, out = write(tmp_path / "q.jsonl", TALK, {"prompt": "What is zip?"}), tmp_path / "out.json"
    assert run(*QUICK, "--prompts", path, "--json", out, *sampling, "--limit", 1, "--compare", "transformers") == 0
    printed, report = capsys.readouterr().out, read(out)
    told = [(prompt["number"], prompt["question_id"], prompt["turn"], prompt["prompt"]) for prompt in report["prompts"]]
    assert told == [(1, 81, turn, text) for turn, text in enumerate(TALK["turns"], 1)]
    tokenizer, answers = transformers.AutoTokenizer.from_pretrained(MAIN), ids_of(report, "baseline")
    expected = [asked(tokenizer, TALK["turns"][: turn + 1], answers[:turn]) for turn in range(3)]
    assert [prompt["prompt_tokens"] for prompt in report["prompts"]] == list(map(len, expected))
    assert [given[-1].ids for _, given, _ in calls] == [ids for ids in expected for _ in range(4)]
    assert re.findall(r"(?m)^(81\.\d) \S", printed) == ["81.1", "81.2", "81.3"] and ", 3 prompts\n" in printed
    if sampling:
        assert ids_of(report, "K = 3")[0] != answers[0]  # so it is seen whose answer it is
        assert run(*QUICK, "--prompts", write(path, {"prompt": TALK["turns"][0]}), "--json", out, *sampling) == 0
        (alone,) = read(out)["prompts"]
        assert alone["turn"] is None and alone["outcomes"]["baseline"]["token_ids"] == answers[0]
    else:
        assert [row["identical"] for row in summaries_of(report).values()] == [3] * 4


def test_a_turn_that_does_not_fit_is_a_row_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    """Nor does one without an answer to go on from, of a baseline that failed."""
    failing_at(monkeypatch, "zip")
    long = {"turns": [TALK["turns"][0], "word " * 1000, "Why?"]}
    fails = {"turns": [TALK["turns"][1], TALK["turns"][2], "Why?"]}
    path, out = write(tmp_path / "q.jsonl", long, fails, {"prompt": "What is it?"}), tmp_path / "out.json"
    assert run(*QUICK, "--prompts", path, "--json", out) == 1
    printed, report = capsys.readouterr().out, read(out)
    too_long = "with 14 tokens for output and draft, it exceeds the context of 1024 (the main model's limit)"
    too_long += "; shorten it, or lower --max-new-tokens or --draft-tokens"
    for label in ("baseline", "K = 3"):
        outcomes = zip(report["prompts"], outcomes_of(report, label), strict=True)
        assert {(prompt["number"], prompt["turn"]): outcome["error"] for prompt, outcome in outcomes} == {
            (1, 1): None,
            (1, 2): too_long,
            (1, 3): "turn 2 has no answer to go on from",
            (2, 1): None,
            (2, 2): OUT_OF_MEMORY,
            (2, 3): "turn 2 has no answer to go on from",
            (3, None): None,
        }
        assert f" {label}: {too_long} " in " ".join(printed.split()) and summaries_of(report)[label]["identical"] == 3
    assert report["prompts"][2]["prompt_tokens"] is None and report["complete"] is True


# The JSON on the disk


def test_the_json_is_written_every_few_seconds_and_at_the_end(tmp_path, monkeypatch):
    """By a clock of the test's own, which each prompt takes two seconds of."""
    clock, out, written, save = [0.0], tmp_path / "out.json", [], sd.save
    monkeypatch.setattr(sd, "time", SimpleNamespace(perf_counter=sd.time.perf_counter, monotonic=lambda: clock[0]))

    def print_prompt(*_):
        clock[0] += 2

    def note(path, option, text):
        save(path, option, text)
        if path and text is not None:
            report = read(out)
            written.append((len(report["prompts"]), report["complete"]))

    monkeypatch.setattr(sd, "print_prompt", print_prompt)
    monkeypatch.setattr(sd, "save", note)
    assert run(*QUICK, "--max-new-tokens", 2, "--json", out) == 0
    assert written == [(1, False), (4, False), (5, True)]


def test_a_disk_that_fills_up_in_the_middle_loses_nothing(tmp_path, capsys):
    """With a limit on the size of files, which is enough for the JSON of two prompts, but not of all."""
    out = tmp_path / "out.json"
    assert run(*QUICK, "--limit", 2, "--json", out) == 0
    most = out.stat().st_size
    out.unlink()

    def on_a_small_disk(arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        run_the_file(arguments)

    status, printed, said = finished(*QUICK, "--json", out, begin=on_a_small_disk)
    assert status == 2 and said.endswith(
        f"\nerror: cannot write {out}: File too large; name another file with --json\n"
    )
    assert "\n    mean\n" in printed and "Speculative decoding was " in printed
    report = read(out)
    assert 1 <= len(report["prompts"]) < 5 and report["complete"] is False
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


# Outputs that nobody reads


def test_closed_outputs_leave_no_traceback(tmp_path):
    out = tmp_path / "out.json"
    status, printed, said = finished(*QUICK, "--limit", 1, "--json", out, out=None)
    assert (status, printed) == (0, "") and said.startswith("Loading ") and said.count("\n") == 1
    assert read(out)["complete"] is True
    status, printed, said = finished(*QUICK, "--limit", 1, "--json", out, err=None)
    assert (status, said) == (0, "") and printed.endswith("\nThe output is the main model's own, token for token.\n")
    assert read(out)["complete"] is True


def test_a_reader_that_goes_away_leaves_no_traceback():
    reads, writes = os.pipe()
    os.close(reads)
    status, _, said = finished(*QUICK, "--limit", 1, out=writes)
    os.close(writes)
    assert status == 2 and "error" not in said


def test_output_that_cannot_be_printed_is_one_line():
    with open("/dev/full", "w") as full:
        status, _, said = finished(*QUICK, "--limit", 1, out=full.fileno())
    why = "No space left on device, where the report or temporary files go; make room, or send them elsewhere"
    assert status == 2 and said.endswith(f"error: cannot go on: {why}\n") and said.count("error") == 1


# Ctrl-C


def interrupting(monkeypatch, name, count, number=signal.SIGINT):
    """Let Ctrl-C come right before a function of the program is called for the so-many-th time."""
    function, calls = getattr(sd, name), []

    def interrupted(*given, **further):
        calls.append(given)
        if len(calls) == count:
            signal.raise_signal(number)
        return function(*given, **further)

    monkeypatch.setattr(sd, name, interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_control_c_reports_what_is_done(tmp_path, capsys, monkeypatch, number):
    """While the second prompt is decoded, of which the baseline has been."""
    interrupting(monkeypatch, "decode_speculatively", 2, number)
    out, svg = tmp_path / "out.json", tmp_path / "out.svg"
    assert run(*QUICK, "--json", out, "--svg", svg) == 130
    printed, said = capsys.readouterr()
    assert said.endswith("\nInterrupted after 1 of 5 prompts.\n")
    assert re.findall(r"(?m)^  (\d) \S", printed) == ["1"]
    assert "\nOnly 1 of 5 prompts: a part of the result.\n" in printed and "Speculative decoding was " in printed
    report = read(out)
    assert report["complete"] is False and [prompt["number"] for prompt in report["prompts"]] == [1]
    assert summaries_of(report)["K = 3"]["identical"] == 1 and svg.stat().st_size


def test_control_c_while_a_prompt_is_printed_keeps_it(tmp_path, capsys, monkeypatch):
    interrupting(monkeypatch, "print_prompt", 2)
    assert run(*QUICK, "--json", tmp_path / "out.json") == 130
    printed, said = capsys.readouterr()
    assert said.endswith("\nInterrupted after 2 of 5 prompts.\n")
    assert re.findall(r"(?m)^  (\d) \S", printed) == ["1", "2"] and len(read(tmp_path / "out.json")["prompts"]) == 2


def test_control_c_in_a_conversation_keeps_the_turns_that_are_done(tmp_path, capsys, monkeypatch):
    interrupting(monkeypatch, "decode_speculatively", 3)
    out, path = tmp_path / "out.json", write(tmp_path / "q.jsonl", TALK, {"prompt": "What is zip?"})
    assert run(*QUICK, "--prompts", path, "--json", out) == 130
    printed, said = capsys.readouterr()
    assert said.endswith("\nInterrupted after 2 of 4 prompts.\n")
    assert "\nOnly 2 of 4 prompts: a part of the result.\n" in printed
    assert [prompt["turn"] for prompt in read(out)["prompts"]] == [1, 2]


@pytest.mark.parametrize("name", ["load_model", "decode_autoregressively"])
def test_control_c_before_anything_is_done_leaves_all_as_it_was(tmp_path, capsys, monkeypatch, name):
    earlier = write(tmp_path / "out.json", {"earlier": True})
    interrupting(monkeypatch, name, 1)
    assert run(*QUICK, "--json", earlier) == 130
    printed, said = capsys.readouterr()
    assert said.endswith("\nInterrupted.\n" if name == "load_model" else "\nInterrupted after 0 of 5 prompts.\n")
    assert "yes" not in printed and read(earlier) == {"earlier": True}


def test_control_c_when_all_is_measured_changes_nothing(tmp_path, capsys, monkeypatch):
    interrupting(monkeypatch, "print_report", 1)
    assert run(*QUICK, "--max-new-tokens", 2, "--json", tmp_path / "out.json") == 0
    assert "Interrupted" not in capsys.readouterr().err and read(tmp_path / "out.json")["complete"] is True


def many_prompts(tmp_path):
    """More prompts than any machine decodes while a test waits."""
    return write(tmp_path / "many.txt", *(f"What does number {number} do?" for number in range(2000)))


def test_control_c_from_outside_ends_the_measuring(tmp_path):
    out = tmp_path / "out.json"
    with Started(*QUICK, "--prompts", many_prompts(tmp_path), "--json", out) as program:
        program.wait_for("^  2 What ")
        os.kill(program.pid, signal.SIGINT)
        printed, said = program.finish()
    assert program.status == 130
    done = len(re.findall(r"(?m)^ +\d+ What ", printed))
    assert said.endswith(f"\nInterrupted after {done} of 2000 prompts.\n") and 2 <= done < 2000
    assert f"\nOnly {done} of 2000 prompts: a part of the result.\n" in printed and "\n    mean\n" in printed
    report = read(out)
    assert len(report["prompts"]) == done and report["complete"] is False


def test_a_second_control_c_ends_it_at_once_and_the_json_is_whole(tmp_path):
    """The second one comes right before the report."""
    out = tmp_path / "out.json"

    def begin(arguments):
        with pytest.MonkeyPatch.context() as patch:
            interrupting(patch, "decode_speculatively", 3)
            interrupting(patch, "print_report", 1)
            sd.main(arguments)

    status, printed, said = finished(*QUICK, "--json", out, begin=begin)
    assert status == 130 and said.count("\n") == 1  # that it loads
    assert re.findall(r"(?m)^  (\d) \S", printed) in (["1", "2"], []) and "Speculative decoding was" not in printed
    report = read(out)
    assert 1 <= len(report["prompts"]) <= 2 and report["complete"] is False


# Terminals


def in_a_terminal(columns, *arguments, environment=None):
    """Run the program with a terminal of so many columns as its stdout and stderr; return the lines it sends there."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (40, columns))
    settings = {"TERM": "xterm-256color", "COLUMNS": None, "LINES": None, **(environment or {})}

    with Started(*arguments, out=child, err=child, environment=settings) as program:
        os.close(child)
        seen = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while chunk := os.read(parent, 65536):
                seen += chunk
        program.finish()
    os.close(parent)
    assert program.status == 0, seen
    return seen.decode().replace("\r\n", "\n").split("\n")


def shown(line):
    """What is left of a line in a terminal: without colours, and without progress that was erased."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", re.split(r"\x1b\[2K", line)[-1]).strip("\r")


def test_in_a_terminal_of_80_columns():
    sent = in_a_terminal(80, *QUICK, "--limit", 1, "--draft-tokens", "2,auto", "--show-text")
    seen = "\n".join(sent)
    assert "run 1 of 3, prompt 1: baseline\r" in seen and "run 3 of 3, prompt 1: K = auto\r" in seen
    assert re.search(r"\x1b\[[0-9;]*m", seen)
    report = list(map(shown, sent))
    assert max(map(len, report)) <= 80 and not any("run 1 of 3" in line for line in report)
    table = report.index("  1 What does list.sort do?")
    headings = "# prompt tokens s TTFT tok/s faster accept length log-l. same".split()
    assert report[table - 1].split() == headings
    assert re.fullmatch(r"    baseline +12( +[\d.]+){3}( +–){4} +yes", report[table + 1])  # no figure is cut or wrapped
    for label, row in zip(("2", "auto"), report[table + 2 : table + 4], strict=True):
        columns = r" +12( +[\d.]+){3} +[+-]\d+ % +\d+ % +\d\.\d\d +-\d+\.\d+ +yes"
        assert re.fullmatch(rf"    K = {label}{columns}", row)
    assert "By speed        tok/s  faster  decode predicted length     α     c     v" in report
    assert report[-2] == "All 2 outputs are the main model's own, token for token."


def test_in_a_terminal_of_120_columns_without_colours():
    sent = in_a_terminal(120, *QUICK, "--limit", 1, "--show-text", environment={"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", "\n".join(sent))
    report = list(map(shown, sent))
    assert 80 < max(map(len, report)) <= 120
    headings = "# prompt tokens s TTFT tok/s faster accept length log-l. same".split()
    assert headings in [line.split() for line in report]
    assert any("«the main model's own, after a rejection»" in line for line in report)


def test_a_dumb_terminal_gets_rows_alone():
    sent = in_a_terminal(100, *QUICK, "--limit", 2, environment={"TERM": "dumb"})
    assert "\x1b" not in "".join(sent) and "prompt 1: " not in "".join(sent)  # no progress: it could not be taken back
    first = next(place for place, line in enumerate(sent) if line.startswith("  # prompt"))
    last = sent.index("    mean")
    assert [line.split()[0] for line in sent[first:last]] == ["#", "1", "baseline", "K", "2", "baseline", "K"]


# Text from outside is data

HOSTILE = [
    "\x1b[2J\x1b]0;owned\x07 clear the screen",
    "[bold red]markup[/] [link=https://example.org]x[/link] :smile:",
    "\u202eright to left override\u202c and \u200bzero\u200dwidth",
    "שלום עולם مرحبا بالعالم",
    "\x9b31mC1 control\x00null\x08backspace",
    "日本語のとても長い文章" * 20,
    "x" * 3000,
]


def test_hostile_prompts_do_not_reach_the_terminal(tmp_path, capsys):
    path, out = tmp_path / "p.txt", tmp_path / "out.json"
    path.write_text("\n".join(HOSTILE) + "\n", encoding="utf-8")
    options = ["--max-new-tokens", 2, "--no-chat-template", "--json", out, "--show-text"]
    assert run(*QUICK, "--prompts", path, *options) == 0
    printed, _ = capsys.readouterr()
    left_out = "1 prompt left out (first: 7): with 4 tokens for output and draft, it exceeds the context of 1024"
    assert f"{left_out} (the main model's limit); shorten it, or" in " ".join(printed.split())
    assert not set(printed) - {"\n"} & set(map(chr, [*range(32), *range(127, 160), 0x202E, 0x202C, 0x200B, 0x200D]))
    assert "\n  2 [bold red]markup[/] [link=https://example.org]x[/link] :smile:\n" in printed
    assert all(sd.Text(line).cell_len <= 120 for line in printed.splitlines())
    assert [prompt["prompt"] for prompt in read(out)["prompts"]] == HOSTILE[:-1]
    assert not re.search(r"[^\n -~]", out.read_text())  # escaped, all of it


def test_hostile_names_and_categories_do_not_reach_the_terminal(tmp_path, capsys):
    """Folders and categories with escapes in their names: in the report, in a refusal, in an option."""
    folder = tmp_path / "ma\x1b[2Jin"
    shutil.copytree(MAIN, folder)
    path = write(tmp_path / "p.jsonl", {"prompt": "What does zip do?", "category": "\x1b]0;owned\x07[bold]x"})
    assert run("--main", folder, "--draft", DRAFT, "--prompts", path, *SHORT) == 0
    assert run("--main", tmp_path / "no\x1b[2J", "--draft", DRAFT, "--prompts", path) == 2
    with pytest.raises(SystemExit):
        run("--draft-tokens", "\x1b[2J")
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed and "\x07" not in printed
    assert "ma�[2Jin" in printed and "�]0;owned�[" in printed and "no�[2J" in printed


def test_safe_and_plain():
    assert sd.plain("a\tb\r\nc\x1b[31m\u202e\ue000") == "a b c�[31m��"
    assert sd.plain("é 日本 שלום 🙂") == "é 日本 שלום 🙂"
    assert sd.safe("a\n  b\u2028c\r\x07") == "a\n  b�c��"


# More than one process


@contextlib.contextmanager
def launched(*arguments):
    """Two processes of the program, as torchrun starts them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": "2"}
    with contextlib.ExitStack() as stack:
        ranks = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        yield [stack.enter_context(Started(*arguments, environment=rank)) for rank in ranks]


def texts_of(path):
    texts = {}
    for prompt in read(path)["prompts"]:
        for label, outcome in prompt["outcomes"].items():
            texts[prompt["number"], prompt["turn"], label] = outcome["token_ids"]
    return texts


def test_two_processes_give_what_one_gives(tmp_path, capsys):
    """The first takes the questions 1 and 3, with four turns, the second the question 2, with one. What is drawn
    depends on the prompt, not on the process."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    path = write(tmp_path / "q.jsonl", TALK, {"prompt": "What is zip?"}, {"prompt": "What does re.split do?"})
    options = [*QUICK, "--prompts", path, "--temperature", 0.9]
    assert run(*options, "--json", one) == 0
    with launched(*options, "--json", two) as processes:
        (printed, said), silent = [process.finish() for process in processes]
    assert [process.status for process in processes] == [0, 0] and silent == ("", "")
    assert texts_of(one) == texts_of(two) and len(texts_of(two)) == 10
    assert re.findall(r"(?m)^ *([\d.]+) \S+ (?:is|what|does) ", printed) == ["81.1", "2", "81.2", "81.3", "3"]
    assert printed.count("Speculative decoding: which draft pays?") == 1 and said.count("\n") == 1  # one of them speaks
    assert " in each of 2 processes, float32, eager\n" in printed
    assert read(two)["environment"]["processes"] == 2 and read(two)["complete"] is True


def test_more_processes_than_questions(tmp_path):
    out = tmp_path / "out.json"
    with launched(*QUICK, "--limit", 1, "--json", out) as processes:
        said = [process.finish()[1] for process in processes]
    assert [process.status for process in processes] == [0, 0], said
    assert len(read(out)["prompts"]) == 1 and read(out)["complete"] is True


def test_an_interrupt_of_one_process_ends_all_with_the_report(tmp_path):
    out = tmp_path / "out.json"
    with launched(*QUICK, "--prompts", many_prompts(tmp_path), "--json", out) as processes:
        first, second = processes
        first.wait_for("^  2 What ")
        os.kill(second.pid, signal.SIGINT)
        (printed, said), silent = first.finish(), second.finish()
    assert (first.status, second.status) == (130, 0) and silent == ("", "")
    done = len(read(out)["prompts"])
    assert said.endswith(f"\nInterrupted after {done} of 2000 prompts.\n") and done >= 2
    assert f"\nOnly {done} of 2000 prompts: a part of the result.\n" in printed and "\n    mean\n" in printed


def test_a_process_that_dies_ends_the_run_with_a_message(tmp_path):
    out = tmp_path / "out.json"
    with launched(*QUICK, "--prompts", many_prompts(tmp_path), "--json", out) as (first, second):
        first.wait_for("^  2 What ")
        os.kill(second.pid, signal.SIGKILL)
        printed, said = first.finish()
    assert first.status == 2 and "\nerror: cannot hear from the other processes: " in said
    assert "\n    mean\n" in printed and "Speculative decoding was " in printed  # what was measured is reported
    assert len(read(out)["prompts"]) >= 2


def test_processes_that_cannot_find_each_other_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sd, "PROCESSES", 2)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    message = refused(capsys, *QUICK, "--limit", 2, "--max-new-tokens", 2)
    assert (
        message.startswith("error: cannot hear from the other processes: ") and not torch.distributed.is_initialized()
    )

"""The program as people run it: its options, every way it can refuse and end, terminals, and several processes."""

import contextlib
import dataclasses
import json
import logging
import os
import pty
import re
import resource
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
import weakref
import xml.etree.ElementTree
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import ROOT

import speculative_decoding as sd

PROGRAM = ROOT / "speculative_decoding.py"
MAIN, DRAFT = ROOT / "tests/tiny_gemma2/main", ROOT / "tests/tiny_gemma2/draft"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PAIR = ["--main", MAIN, "--draft", DRAFT]
SHORT = ["--warmup", 0, "--draft-tokens", 3, "--max-new-tokens", 12]
QUICK = ["--demo", *SHORT]
PATIENCE = 120


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Nothing of a run in this process stays behind it. And it does not do what takes a second and is tested elsewhere:
    how a model reads on, and what memory and rounds of many tokens cost. The plain command does it all."""
    monkeypatch.setattr(sd, "memory_bandwidth_gb_s", lambda device: 20.0)
    monkeypatch.setattr(sd, "check_reading", lambda model, name, device: None)
    monkeypatch.setattr(sd, "LONGEST", 3)
    yield
    logging.disable(logging.NOTSET)
    logging.captureWarnings(False)


def run(*arguments):
    return sd.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """Run, see it refused, return the one line that it says."""
    status = run(*arguments)
    said = capsys.readouterr().err.removeprefix("Loading …\n").splitlines()
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


def program(arguments):
    sd.RANK, sd.PROCESSES = sd.launched()
    sys.exit(sd.main(arguments))


def become_the_program(arguments, descriptors, environment, begin):
    """End this process as the program does. What Python does at its start and its end is done here by hand."""
    for place, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, place)
    streams = sys.stdout, sys.stderr = [open(place, "w", buffering=1) for place in (1, 2)]
    for name, value in {"TOKENIZERS_PARALLELISM": "false", **environment}.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    torch.set_num_threads(1)  # makes the pool anew that a fork loses, before several threads ask for it at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        begin(arguments)
    except SystemExit as ended:
        status = ended.code
    try:
        for stream in streams:
            stream.flush()
    except OSError:  # Python says that it cannot flush stdout, and ends with status 120
        return 120
    return status


class Started:
    """The program, started. Of the imports that would take ten seconds it has what this process has: it is forked.

    `out`, `err`: where these streams go, descriptors; by default stdout is read here, and stderr goes to a file.
    `environment`: variables of its own; None: without that one. `begin`: what runs.
    """

    def __init__(self, *arguments, out=None, err=None, environment=None, begin=program):
        arguments, self.printed, self.status = [str(argument) for argument in arguments], "", None
        self.errors, (reads, writes) = tempfile.TemporaryFile("w+"), os.pipe()
        descriptors = [writes if out is None else out, self.errors.fileno() if err is None else err]
        if (pid := os.fork()) == 0:
            status = 97
            try:
                os.close(reads)
                status = become_the_program(arguments, descriptors, environment or {}, begin)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        self.pid, self.output = pid, os.fdopen(reads, "rb", buffering=0)
        os.close(writes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.output.close()
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def read(self):
        """Read on; False at the end."""
        assert select.select([self.output], [], [], PATIENCE)[0], self.printed
        chunk = self.output.read(65536)
        self.printed += chunk.decode()
        return bool(chunk)

    def wait_for(self, row):
        """Wait until it has printed what the pattern `row` finds."""
        while not re.search(row, self.printed, re.MULTILINE):
            assert self.read(), (self.finish(), self.status)

    def finish(self):
        """Wait for its end; return all that it printed and said."""
        while not self.output.closed and self.read():
            pass
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.errors.seek(0)
        said = self.errors.read()
        assert "Traceback" not in said and "Exception ignored" not in said, said
        return self.printed, said


def finished(*arguments, **how):
    """The program, run to its end: its status, what it printed, and what it said."""
    with Started(*arguments, **how) as process:
        printed, said = process.finish()
    return process.status, printed, said


# The options


def test_the_packages_at_the_top_of_the_file_are_those_of_requirements_txt():
    """So that `uv run speculative_decoding.py` needs no environment by hand."""
    block = re.search(r"(?ms)^# /// script\n(.*?)^# ///$", PROGRAM.read_text())[1]
    script = tomllib.loads("".join(line.removeprefix("# ") for line in block.splitlines(keepends=True)))
    assert script["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    assert script["requires-python"] == ">=3.11"


OPTIONS = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(sd.Settings)]


def test_the_readme_lists_every_option_and_no_other_and_its_commands_are_understood():
    text = (ROOT / "README.md").read_text()
    listed = [re.findall(r"--[a-z-]+", row) for row in re.findall(r"(?m)^\| (`--.*?) \|", text)]
    assert sorted(sum(listed, [])) == sorted(OPTIONS)
    commands = re.findall(r"python speculative_decoding\.py((?:\s[^\s`#…]+)*)", text.replace("\\\n", " "))
    commands = [command.partition("\n\n")[0].partition("This is")[0] for command in commands if "-" in command]
    assert len(commands) >= 2
    for command in commands:
        sd.parse(shlex.split(command))


def test_options_become_settings():
    assert sd.parse([]) == sd.Settings()
    assert sd.Settings().draft_tokens == ("auto",) and sd.Settings().max_new_tokens == 128
    given = ["--draft-tokens", "3,auto,1,3", "--draft", "A, B,ngram,A", "--top-p", "0.9", "--temperature", "1"]
    settings = sd.parse([*given, "--chat-template-args", '{"enable_thinking": false}'])
    several = {"draft_tokens": (3, "auto", 1), "draft": ("A", "B", "ngram")}
    how = {"top_p": 0.9, "temperature": 1.0, "chat_template_args": {"enable_thinking": False}}
    assert settings == sd.Settings(**several, **how)


BAD = {  # what is given to an option, and not taken
    "--draft-tokens": ["0", "three", "3,,4", "1001"],
    "--draft": ["A,,B", ""],
    "--chat-template-args": ["{'a': 1}", "[1]", "[" * 100_000],
    "--temperature": ["-1", "nan"],
    "--top-p": ["0", "1.1"],
    "--dtype": ["int8"],
    **{f"--{name}": ["-1", "1.5", "²"] for name in ("max-new-tokens", "repeats", "limit", "warmup", "seed")},
}


@pytest.mark.parametrize("option", BAD)
def test_a_bad_option_is_one_line_and_status_2(option, capsys):
    cases = [[option, value] for value in BAD[option]]
    for arguments in cases + [["--nonsense"], ["--temp", "1"], ["stray"], ["--top-k", "5"]]:  # no abbreviations
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        printed, said = capsys.readouterr()
        assert ended.value.code == 2 and printed == ""
        assert said.startswith("error: ") and said.endswith("; see --help\n") and said.count("\n") == 1
        assert arguments[0] in said


CONTRADICTIONS = [  # the option that is named; what contradicts, and what is so near that it could be taken for it
    ("--main", [{"demo": True, "main": "A"}], [{"demo": True, "draft": ("A",)}, {"main": "A"}]),
    ("--temperature", [{"top_k": 5}, {"top_p": 0.9}], [{"top_k": 5, "top_p": 0.9, "temperature": 1.0}]),
    ("--temperature", [{"temperature": 0.0009}], [{"temperature": 0.001}, {"temperature": 0.0}]),
    ("--no-chat", [{"no_chat_template": True, "chat_template_args": {"a": 1}}], [{"chat_template_args": {"a": 1}}]),
    ("--compile on", [{"device_map": "auto", "compile": "on"}], [{"device_map": "auto"}, {"compile": "on"}]),
    ("--prompts", [{"json": "a", "svg": "./a"}, {"prompts": "a", "svg": "a"}], [{"prompts": "a", "json": "b"}, {}]),
]


@pytest.mark.parametrize(("named", "contradictory", "fine"), CONTRADICTIONS, ids=range(len(CONTRADICTIONS)))
def test_options_that_contradict_each_other(named, contradictory, fine):
    for given in contradictory:
        assert named in sd.find_contradiction(sd.Settings(**given))
    assert [sd.find_contradiction(sd.Settings(**given)) for given in fine] == [None] * len(fine)


SLOW = "huggingface_hub numpy psutil rich tokenizers torch transformers".split()
BEFORE_THE_IMPORTS = """
import runpy, signal, sys

class Instead:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in SLOW:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Instead())
for arguments in CASES:
    sys.argv[1:] = arguments
    try:
        runpy.run_path(PROGRAM, run_name="__main__")
    except SystemExit as ended:
        print("ended with", ended.code, flush=True)
"""


def test_help_and_mistakes_are_answered_before_the_slow_imports_which_control_c_ends_quietly():
    cases = ["--help"], ["--draft-tokens", "0"], ["--top-k", "5"], ["--nonsense"], ["--demo"]
    about = f"SLOW, PROGRAM, CASES = {SLOW!r}, {str(PROGRAM)!r}, {cases!r}\n"
    command = [sys.executable, "-c", about + BEFORE_THE_IMPORTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == -signal.SIGINT and done.stderr.count("error: ") == 3 == done.stderr.count("\n")
    helped, *mistakes = done.stdout.split("ended with ")
    assert mistakes == ["0\n", "2\n", "2\n", "2\n"] and re.findall(r"(?m)^  (--[a-z-]+)", helped) == OPTIONS
    assert re.search("Exit status: 0 .*; 1 .*; 2 .*; 130 interrupted", " ".join(helped.split()))


SENSELESS = [{}, {"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "0"}]
SENSELESS += [{"RANK": "²", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "", "WORLD_SIZE": "2"}]


def test_variables_of_a_launcher_that_make_no_sense_mean_one_process(monkeypatch):
    for variables in [*SENSELESS, {"RANK": "1", "WORLD_SIZE": "3"}]:
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert sd.launched() == ((0, 1) if variables in SENSELESS else (1, 3))


# What it does


def test_the_plain_command_shows_five_prompts_and_a_result(demo):
    done, report = demo
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("No GPU in use: this runs the bundled models")
    assert lines[4] == "  K = 3 / auto, up to 128 new tokens, 5 prompts"
    titles = [place for place, line in enumerate(lines) if re.match(r"  [1-5] \S", line)]
    assert len(titles) == 5
    for place in titles:
        for row, label in zip(lines[place + 1 : place + 4], ("baseline", "K = 3", "K = auto"), strict=True):
            assert row.startswith(f"    {label} ") and row.endswith(" yes")
    mean = lines.index("    mean")
    assert mean == titles[-1] + 4 and [line[-4:] for line in lines[mean + 1 : mean + 4]] == [" 5/5"] * 3
    assert lines[-1] == "The main model's own, token for token: 10 of 10 outputs."
    assert max(map(len, lines)) <= 120
    assert "\x1b" not in done.stdout + done.stderr and done.stderr == "Loading …\n"  # piped: no colours, no progress
    assert report["settings"]["demo"] is True and report["complete"] is True and report["schema"] == 3
    assert report["settings"]["device"] == "cpu" and report["settings"]["dtype"] == "float32"
    threads, cores = (report["environment"][name] for name in ("threads", "cores"))  # OMP_NUM_THREADS is kept
    assert (threads, cores) == (1, sd.usable_cores()) and f", 1 of {cores} CPU threads, " in done.stdout


def counting(monkeypatch, *names):
    """Let functions of the program note what they are given: [(name, given)]."""
    calls = []

    def noted(name, function, *given, **further):
        calls.append((name, given))
        return function(*given, **further)

    for name in names:
        monkeypatch.setattr(sd, name, partial(noted, name, getattr(sd, name)))
    return calls


def test_the_options_do_what_they_say(tmp_path, one_prompt, capsys, monkeypatch, demo):
    out, svg = tmp_path / "out.json", tmp_path / "out.svg"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models--a--b").symlink_to(MAIN)
    calls = counting(monkeypatch, "decode_autoregressively", "decode_speculatively")
    options = ["--max-new-tokens", 16, "--draft-tokens", 5, "--ignore-eos", "--no-chat-template", "--dtype", "float32"]
    files = ["--main", "~/models--a--b", "--draft", DRAFT, "--prompts", one_prompt, "--json", out, "--svg", svg]
    assert run(*files, *options, "--repeats", 2, "--warmup", 2, "--show-text") == 0
    printed, report = capsys.readouterr().out, read(out)
    names = [name for name, _ in calls]
    assert names[:3] == ["decode_autoregressively"] * 3 and names[3:6] == ["decode_speculatively"] * 3  # 2 to warm up
    assert names[6:] == ["decode_speculatively", "decode_autoregressively"]  # they take turns at being the first
    assert {given[-1].end_ids for _, given in calls} == {frozenset()}
    assert "bundled pair" not in printed  # models named on the command line are the models that run
    settings = report["settings"]
    assert settings["main"] == str(tmp_path / "models--a--b") and settings["draft"] == [str(DRAFT)]
    assert (settings["repeats"], settings["warmup"], settings["ignore_eos"], settings["demo"]) == (2, 2, True, False)
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
    assert "".join("".join(rows).split()).endswith("".join(printed.split()))  # the picture is the report
    # Shorter texts are the beginnings of longer ones, whatever K.
    assert run(*QUICK, "--draft-tokens", "2,5", "--json", out, "--limit", 3) == 0
    assert capsys.readouterr().out.startswith("This runs the bundled models")
    for label in ("baseline", "K = 2", "K = 5"):
        assert ids_of(read(out), label) == [ids[:12] for ids in ids_of(demo[1], "baseline")[:3]]


def test_bfloat16_outputs_are_the_main_models_own(tmp_path, capsys):
    """The type that the default pair runs in: whatever parts, parts at a tie. And a model can be its own draft, which
    is nearly always right: the two do not share their caches."""
    out, options = tmp_path / "out.json", ["--dtype", "bfloat16", "--limit", 1, "--max-new-tokens", 24]
    assert run("--demo", "--draft", f"{DRAFT},{MAIN}", *SHORT[:4], *options, "--json", out) == 0
    for label in ("draft, K = 3", "main, K = 3"):
        summary = summaries_of(read(out))[label]
        assert summary["identical"] + summary["ties"] == 1 and summary["mismatches"] == 0 == summary["unchecked"]
    assert summary["acceptance_rate"] > 0.8 and ", bfloat16, eager\n" in capsys.readouterr().out


def copied(folder, model, **files):
    """A model in a folder with the bundled tokenizer, and some of its files changed: {name: the function}."""
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        change = files.get(name.partition(".")[0], str)
        (folder / name).write_text(change((DRAFT / name).read_text()))
    return folder


def test_transformers_own_methods_stand_beside_ours_and_what_it_refuses_is_its_row(tmp_path, capsys, one_prompt):
    """The same tokenizer, but vocabularies that are padded differently: ours runs, assisted generation does not."""
    draft = transformers.AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32)
    draft.resize_token_embeddings(2112)
    padded, out = copied(tmp_path / "padded", draft), tmp_path / "out.json"
    drafts = ["--main", MAIN, "--draft", f"{DRAFT},{padded}", "--prompts", one_prompt]
    assert run(*drafts, *SHORT, "--compare", "transformers", "--json", out) == 0
    report, printed = read(out), capsys.readouterr().out
    library = {method["label"]: method["library"] for method in report["methods"] if method["library"]}
    assert list(library) == ["generate()", "draft, assist 3", "padded, assist 3"]
    assert "generate()" in library["generate()"] and "assisted" in library["draft, assist 3"]
    (prompt,) = report["prompts"]
    failed = prompt["outcomes"].pop("padded, assist 3")
    assert "different tokenizers" in failed["error"] and failed["figures"] is None
    for label, outcome in prompt["outcomes"].items():
        assert outcome["verdict"] == "identical" and re.search(rf"(?m)^    {re.escape(label)} +12 .* yes$", printed)
    assert re.search(r"(?m)^draft, K = 3 was [\d.]+ times as fast as draft, assist 3: ", printed)
    assert f" padded, assist 3: {failed['error']} " in " ".join(printed.split())
    assert "times as fast as padded, assist 3" not in printed


def test_a_mismatch_ends_with_status_1(monkeypatch, capsys, tmp_path):
    """Of a loop that leaves one rejected token in the main model's cache."""
    decode, out = sd.decode_speculatively, tmp_path / "out.json"

    def forgetful(main, *further):
        main.roll_back = lambda tokens: type(main).roll_back(main, max(0, tokens - 1))
        try:
            return decode(main, *further)
        finally:
            del main.roll_back

    monkeypatch.setattr(sd, "decode_speculatively", forgetful)
    options = ["--draft-tokens", 3, "--max-new-tokens", 30, "--warmup", 0, "--limit", 3, "--json", out]
    assert run("--demo", *options) == 1
    printed, report = capsys.readouterr().out, read(out)
    verdicts = [outcome["verdict"] for outcome in outcomes_of(report, "K = 3")]
    assert len(re.findall(r"(?m) NO$", printed)) == verdicts.count("mismatch") > 0
    assert summaries_of(report)["K = 3"]["mismatches"] == verdicts.count("mismatch")
    assert "NOT the main model's own" in printed and "All 3" not in printed


# Drafts that fail are rows, wherever they fail

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB"


def failing(monkeypatch, fails, name=""):
    """Let each model of that name that is loaded run out of memory where `fails` is true of the ids that it reads."""
    load, models = sd.load_model, []

    def out_of_memory(module, arguments):
        if fails(arguments[0]):
            raise torch.OutOfMemoryError(OUT_OF_MEMORY.replace(". ", ".\n"))

    def load_model(files, *further):
        model = load(files, *further)
        if files.name.endswith(name):
            model.get_input_embeddings().register_forward_pre_hook(out_of_memory)
            models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(sd, "load_model", load_model)
    return models


def renamed(text):
    """One of the bundled tokenizer's files with its special tokens renamed, and with two more."""
    content = json.loads(text)
    for place, token in enumerate(content.get("added_tokens", [])[:2]):
        content["added_tokens"].append(token | {"id": 2048 + place, "content": f"<more {place}>"})
    for name in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"):
        text = (text if name != "<pad>" else json.dumps(content)).replace(name, "|" + name)
    return text


def test_drafts_that_cannot_run_are_rows_and_the_others_go_on(tmp_path, capsys, one_prompt, monkeypatch):
    """What goes wrong as they are read, loaded, and measured."""
    missing, broken, other, late = (tmp_path / name for name in ("missing", "broken", "\x1b[31mother", "late"))
    draft = transformers.AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32)
    shutil.copytree(DRAFT, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    copied(other, draft, tokenizer=lambda text: text.replace('"vocab": {', '"vocab": {"zebra": 2048,'))
    shutil.copytree(DRAFT, late)
    alike = copied(tmp_path / "alike", draft, tokenizer=renamed, tokenizer_config=renamed)
    short = tmp_path / "short"
    shutil.copytree(DRAFT, short)
    write(short / "config.json", json.dumps(read(short / "config.json") | {"max_position_embeddings": 16}))
    models, seen = failing(monkeypatch, lambda ids: True, "late"), []

    def measure_costs(main, draft, *further):
        """Note whether the failing model is gone as each draft is measured."""
        seen.append([model() is None for model in models])
        return measure(main, draft, *further)

    measure, out = sd.measure_costs, tmp_path / "out.json"
    monkeypatch.setattr(sd, "measure_costs", measure_costs)
    drafts = f"{DRAFT},{missing},{broken},{other},{late},{short},ngram,{alike}"
    assert run("--main", MAIN, "--draft", drafts, "--prompts", one_prompt, *SHORT, "--json", out) == 1
    printed, said = capsys.readouterr()
    report, printed = read(out), " ".join(printed.split())
    reasons = {"draft": None, "missing": "no model", "broken": "model.safetensors", "�[31mother": "'zebra'"}
    reasons |= {"late": "out of memory", "short": "context of 16", "ngram": None, "alike": None}
    assert [method["label"] for method in report["methods"]] == ["baseline", *(f"{name}, K = 3" for name in reasons)]
    assert [method["draft"] for method in report["methods"]] == [None, *drafts.split(",")]
    (prompt,) = report["prompts"]
    for reason, figures, method in zip(reasons.values(), report["drafts"], report["methods"][1:], strict=True):
        outcome = prompt["outcomes"][method["label"]]
        assert outcome["error"] == method["error"] == figures["error"]
        if reason:
            assert reason in method["error"] and method["error"] in printed
            assert method["summary"] is None is outcome["figures"] is outcome["verdict"]
            assert figures["costs"] == [] == figures["by_draft_tokens"]
        else:
            assert method["error"] is None and outcome["verdict"] == "identical" and method["summary"]["identical"] == 1
            assert f" {method['label']} 12 " in printed and figures["by_draft_tokens"]
    assert "3 of 3 outputs" in printed and report["complete"] is True
    assert (
        said.endswith("Loading …\n") and "\x1b" not in printed and summaries_of(report)["alike, K = 3"]["accepted"] > 0
    )
    assert seen[2:] == [[True]] * 2  # its memory was given back


def test_only_the_main_model_and_the_prompts_end_a_run(tmp_path, capsys, one_prompt):
    missing, prompts, out = tmp_path / "missing", ["--prompts", one_prompt], tmp_path / "out.json"
    assert run("--main", MAIN, "--draft", missing, *prompts, *SHORT, "--json", out) == 1  # and no draft at all
    assert "1 of 1 output." in capsys.readouterr().out
    assert summaries_of(read(out))["baseline"]["identical"] == 1 and summaries_of(read(out))["K = 3"] is None
    assert str(missing) in refused(capsys, "--main", missing, "--draft", f"{DRAFT},ngram", *prompts)
    none = tmp_path / "none.txt"
    assert refused(capsys, "--demo", "--prompts", none).startswith(f"error: cannot read {none}: No such file ")
    for device in ["abacus", "meta"] + ["cuda"] * (not torch.cuda.is_available()):
        message = refused(capsys, "--demo", "--device", device)
        assert f"'{device}'" in message and message.endswith("--device auto")


def test_what_fails_in_a_prompt_is_a_row_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    """A model that runs out of memory in passes of 20 tokens, the verify passes of K = 19, and where it reads zip."""
    path, out = write(tmp_path / "p.txt", "What is re?", "What does zip do?", "What is abc?"), tmp_path / "out.json"
    tokenizer = transformers.AutoTokenizer.from_pretrained(MAIN)
    zipped = tokenizer("zip")["input_ids"][-1]

    def reads_zip(ids):
        return ids[0, 0] == tokenizer.bos_token_id and zipped in ids  # in a prompt: a draft may propose it anywhere

    failing(monkeypatch, lambda ids: ids.shape[1] == 20 or reads_zip(ids))
    assert run(*QUICK, "--prompts", path, "--draft-tokens", "19,3,auto", "--json", out) == 1
    printed, report = capsys.readouterr().out, read(out)
    assert 20 not in [prompt["prompt_tokens"] for prompt in report["prompts"]] and report["complete"] is True
    for label in ("baseline", "K = 19", "K = 3", "K = auto"):
        fails = [place == 1 or label == "K = 19" for place in range(3)]
        for outcome, is_failed in zip(outcomes_of(report, label), fails, strict=True):
            assert outcome["error"] == (OUT_OF_MEMORY if is_failed else None)
            for field in ("figures", "verdict", "token_ids"):
                assert (outcome[field] is None) == is_failed
        summary = summaries_of(report)[label]
        assert summary is None if label == "K = 19" else (summary["prompts"], summary["identical"]) == (2, 2)
    good = [rf"    {label} +12 .* yes\n" for label in ("baseline", "K = 3", "K = auto")]
    rows = "".join(good) + re.escape(f"    K = 19: {OUT_OF_MEMORY}\n")
    assert len(re.findall(rows, printed)) == 2 and printed.count(f": {OUT_OF_MEMORY}\n") == 6
    assert "4 of 4 outputs" in printed
    failing(monkeypatch, reads_zip)
    assert OUT_OF_MEMORY in refused(capsys, *QUICK, "--draft", "ngram", "--prompts", write(path, "What does zip do?"))


# The files that it writes


def test_no_file_is_replaced_that_should_stay(tmp_path, capsys):
    prompts, folder = write(tmp_path / "p.txt", "What does re.split do?"), tmp_path / "no" / "file"
    for option in ("--json", "--svg"):
        for path in ("/dev/null", tmp_path):
            message = refused(capsys, *QUICK, option, path)
            assert message.startswith(f"error: cannot write {path}: ") and message.endswith(option)
        message = refused(capsys, *QUICK, option, folder)
        assert message.startswith(f"error: cannot write {folder}: No such file ") and message.endswith(option)
    assert not os.path.isfile("/dev/null")
    earlier, link = write(tmp_path / "earlier.json", {}), tmp_path / "link.json"
    link.symlink_to(earlier)
    refused(capsys, *QUICK, "--prompts", tmp_path / "none.txt", "--json", link)
    assert earlier.read_text() == "{}\n"  # until there is something to write
    assert run(*QUICK, "--prompts", prompts, "--json", link) == 0
    assert link.is_symlink() and read(earlier)["complete"] is True
    assert sorted(file.name for file in tmp_path.iterdir()) == ["earlier.json", "link.json", "p.txt"]


def test_the_json_is_written_every_few_seconds_and_at_the_end(tmp_path, monkeypatch):
    """By a clock of the test's own, which each prompt takes two seconds of, and the second time it is written one: so
    the pause grows to nine."""
    clock, out, written, save = [10.0], tmp_path / "out.json", [], sd.save
    path = write(tmp_path / "p.txt", *(f"What is {number}?" for number in range(10)))
    monkeypatch.setattr(sd, "time", SimpleNamespace(perf_counter=sd.time.perf_counter, monotonic=lambda: clock[0]))

    def print_prompt(*_):
        clock[0] += 2

    def note(path, option, text):
        save(path, option, text)
        if path and text is not None:
            report = read(out)
            written.append((len(report["prompts"]), report["complete"]))
            clock[0] += len(written) == 2

    monkeypatch.setattr(sd, "print_prompt", print_prompt)
    monkeypatch.setattr(sd, "save", note)
    assert run(*QUICK, "--max-new-tokens", 2, "--prompts", path, "--json", out) == 0
    assert written == [(1, False), (4, False), (9, False), (10, True)]


def test_a_disk_that_fills_up_in_the_middle_loses_nothing(tmp_path, capsys):
    """With a limit on the size of files, which is enough for the JSON of two prompts, but not of all."""
    out = tmp_path / "out.json"
    assert run(*QUICK, "--limit", 2, "--json", out) == 0
    most = out.stat().st_size
    out.unlink()

    def on_a_small_disk(arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        program(arguments)

    status, printed, said = finished(*QUICK, "--json", out, begin=on_a_small_disk)
    assert status == 2 and f"\nerror: cannot write {out}: File too large; " in said
    assert "\n    mean\n" in printed and "Speculative decoding was " in printed
    report = read(out)
    assert 1 <= len(report["prompts"]) < 5 and report["complete"] is False
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_a_reader_that_goes_away_and_a_full_disk_at_the_end_lose_no_json(tmp_path):
    """As `| head` does it, and as where stdout is a file. Without a traceback, and with a line of the disk alone."""
    out, reads = tmp_path / "out.json", os.open("/dev/full", os.O_WRONLY)

    def full_at_the_end(arguments):
        report = sd.report
        sd.report = lambda *given: (os.dup2(reads, 1), report(*given))[1]
        program(arguments)

    for how in ({"begin": full_at_the_end}, {}):
        with Started(*QUICK, "--limit", 2, "--json", out, **how) as process:
            process.wait_for("^  2 What .*\n.*\n    K = 3 .*\n")
            if not how:
                process.output.close()
            _, said = process.finish()
        assert process.status == 2 and ("\nerror: " in said) == bool(how) and said.count("\n") == 1 + bool(how)
        assert read(out)["complete"] is True and len(read(out)["prompts"]) == 2
        out.unlink()
    os.close(reads)
    with open("/dev/full", "w") as full:
        status, _, said = finished(*QUICK, out=full.fileno())
    assert status == 2 and "No space left on device" in said and said.count("\n") == 1


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


@pytest.mark.parametrize(
    ("name", "count", "number", "done"),
    [
        ("load_model", 1, signal.SIGINT, None),
        ("decode_autoregressively", 1, signal.SIGTERM, 0),
        ("decode_speculatively", 2, signal.SIGINT, 1),  # while the second prompt is decoded, of which the baseline is
        ("print_prompt", 2, signal.SIGTERM, 2),  # which keeps it
    ],
)
def test_control_c_reports_what_is_done(tmp_path, capsys, monkeypatch, name, count, number, done):
    interrupting(monkeypatch, name, count, number)
    out, svg = write(tmp_path / "out.json", {"earlier": True}), tmp_path / "out.svg"
    assert run(*QUICK, "--json", out, "--svg", svg) == 130
    printed, said = capsys.readouterr()
    assert said.endswith("\nInterrupted.\n")
    if done:
        assert f"\nOnly {done} of 5 prompts: " in printed and "Speculative decoding was " in printed
        report = read(out)
        assert report["complete"] is False and svg.stat().st_size
        assert len(report["prompts"]) == done == summaries_of(report)["K = 3"]["identical"]
    else:
        assert "yes" not in printed and read(out) == {"earlier": True}


def many_prompts(tmp_path):
    """More prompts than any machine decodes while a test waits."""
    return write(tmp_path / "many.txt", *(f"What does number {number} do?" for number in range(2000)))


def test_a_second_control_c_ends_it_at_once_and_the_json_is_whole(tmp_path):
    """The first comes from outside, the second right before the report."""
    out = tmp_path / "out.json"

    def begin(arguments):
        with pytest.MonkeyPatch.context() as patch:
            interrupting(patch, "print_report", 1)
            program(arguments)

    with Started(*QUICK, "--prompts", many_prompts(tmp_path), "--json", out, begin=begin) as process:
        process.wait_for("^  2 What ")
        os.kill(process.pid, signal.SIGINT)
        printed, said = process.finish()
    assert process.status == -signal.SIGINT and said == "Loading …\n"
    done = len(set(re.findall(r"(?m)^ +\d+ What ", printed)))  # a row that was interrupted stands there twice
    assert 2 <= done < 2000 and "Speculative decoding was" not in printed
    report = read(out)
    assert len(report["prompts"]) == done and report["complete"] is False


# Terminals


def in_a_terminal(columns, *arguments, environment=None):
    """Run the program with a terminal of so many columns as its stdout and stderr; return the lines it sends there."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (40, columns))
    settings = {"TERM": "xterm-256color", "COLUMNS": None, "LINES": None, **(environment or {})}

    with Started(*arguments, out=child, err=child, environment=settings) as process:
        os.close(child)
        seen = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while chunk := os.read(parent, 65536):
                seen += chunk
        process.finish()
    os.close(parent)
    assert process.status == 0, seen
    return seen.decode().replace("\r\n", "\n").split("\n")


def shown(line):
    """What is left of a line in a terminal: without colours, and without progress that was erased."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", re.split(r"\x1b\[2K", line)[-1]).strip("\r")


HEADINGS = "# prompt tokens s TTFT tok/s faster accept length log-l. same".split()


def test_in_a_terminal_of_80_columns():
    sent = in_a_terminal(80, *QUICK, "--limit", 1, "--draft-tokens", "2,auto", "--show-text")
    seen = "\n".join(sent)
    assert " 1: baseline\r" in seen and " 1: K = auto\r" in seen
    assert re.search(r"\x1b\[[0-9;]*m", seen) and "\x1b[2mLoading …" in seen
    report = list(map(shown, sent))
    assert max(map(len, report)) <= 80 and not any(": baseline" in line for line in report)
    table = report.index("  1 What does list.sort do?")
    assert report[table - 1].split() == [*HEADINGS]
    assert re.fullmatch(r"    baseline +12( +[\d.]+){3}( +–){4} +yes", report[table + 1])  # no figure is cut or wrapped
    for label, row in zip(("2", "auto"), report[table + 2 : table + 4], strict=True):
        columns = r" +12( +[\d.]+){3} +[+-]\d+ % +\d+ % +\d\.\d\d +-\d+\.\d+ +yes"
        assert re.fullmatch(rf"    K = {label}{columns}", row)
    assert report[-2].endswith("2 of 2 outputs.")


def test_in_a_terminal_of_120_columns_without_colours_and_in_a_dumb_one():
    sent = in_a_terminal(120, *QUICK, "--limit", 1, "--show-text", environment={"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", "\n".join(sent))
    report = list(map(shown, sent))
    assert 80 < max(map(len, report)) <= 120 and HEADINGS in [line.split() for line in report]
    assert any("«the main model's own, after a rejection»" in line for line in report)
    sent = in_a_terminal(100, *QUICK, "--limit", 2, environment={"TERM": "dumb"})
    assert "\x1b" not in "".join(sent) and " 1: baseline" not in "".join(
        sent
    )  # no progress: it could not be taken back
    first = next(place for place, line in enumerate(sent) if line.startswith("  # prompt"))
    last = sent.index("    mean")
    assert [line.split()[0] for line in sent[first:last]] == ["#", "1", "baseline", "K", "2", "baseline", "K"]


# Text from outside is data

HOSTILE = [
    "\x1b[2J\x1b]0;owned\x07 clear the screen",
    "[bold red]markup[/] [link=https://example.org]x[/link] :smile:",
    "\u202eright to left override\u202c and \u200bzero\u200dwidth",
    "שלום עולם مرحبا بالعالم",
    "\x9b31mC1 control\x7f\x08backspace",
    "日本語のとても長い文章" * 20,
]


def test_hostile_text_does_not_reach_the_terminal(tmp_path, capsys, monkeypatch):
    """In prompts, folders, categories, ids and keys; in the report, the progress, refusals, options."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    folder, draft, wrong = (tmp_path / f"{name}\x1b[2J{name}" for name in ("main", "draft", "wrong"))
    shutil.copytree(MAIN, folder)
    shutil.copytree(DRAFT, draft)
    rows = [{"prompt": text, "category": "\x1b]0;owned\x07[bold]x", "\x1b[2Jkey": "x"} for text in HOSTILE]
    rows[0]["question_id"], out = "\x1b[2Jid", tmp_path / "out.json"
    options = ["--prompts", write(tmp_path / "p.jsonl", *rows), *SHORT, "--max-new-tokens", 2, "--no-chat-template"]
    drafts = ["--draft", f"{draft},{wrong},ngram", "--compare", "transformers", "--show-text", "--json", out]
    assert run("--main", folder, *drafts, *options) == 1
    assert run("--main", tmp_path / "no\x1b[2J", "--draft", DRAFT) == 2
    with pytest.raises(SystemExit):
        run("--draft-tokens", "\x1b[2J")
    printed, said = capsys.readouterr()
    assert "\x1b[0m" in printed and "no�[2J" in said and " �[2Jid: draft�[2Jdraft, K = 3" in said
    printed = re.sub(r"\x1b\[[\d;]*m", "", printed)  # the colours, which are ours
    assert not set(printed) - {"\n"} & set(map(chr, [*range(32), *range(127, 160), 0x202E, 0x202C, 0x200B, 0x200D]))
    assert "\x1b[2J" not in said and "\x07" not in said
    names = ["main�[2Jmain", "draft�[2Jdraft, K = 3", "wrong�[2Jwrong", "�]0;owned", "�[2Jid", "�[2Jkey (6)"]
    for name in [*names, "2 [bold red]markup[/] [link=https://example.org]x[/link] :smile:\n"]:
        assert name in printed
    assert all(sd.Text(line).cell_len <= 120 for line in printed.splitlines())
    assert [prompt["prompt"] for prompt in read(out)["prompts"]] == HOSTILE and out.read_text().isascii()


# More than one process


@contextlib.contextmanager
def launched(*arguments, begins=(program, program), own=((), ())):
    """Processes of the program, as torchrun starts them; `begins`: what each runs, `own`: further arguments of each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    place["WORLD_SIZE"] = str(len(begins))
    with contextlib.ExitStack() as stack:
        processes = []
        for rank, begin in enumerate(begins):
            variables = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = Started(*arguments, *own[rank % 2], environment=variables, begin=begin)
            processes.append(stack.enter_context(process))
        yield processes


def test_two_processes_give_what_one_gives(tmp_path, capsys):
    """The first takes the questions 1 and 3. What is drawn depends on the seed and the prompt, not on the process."""
    one, two, other = (tmp_path / name for name in ("one.json", "two.json", "other.json"))
    options = [*QUICK, "--limit", 3, "--temperature", 3, "--seed"]
    assert run(*options, 2, "--json", other) == run(*options, 1, "--json", one) == 0
    alone = capsys.readouterr().out
    with launched(*options, 1, "--json", two) as processes:
        (printed, said), silent = [process.finish() for process in processes]
    assert [process.status for process in processes] == [0, 0] and silent == ("", "")
    for label in ("baseline", "K = 3"):
        assert ids_of(read(one), label) == ids_of(read(two), label) != ids_of(read(other), label)
        assert [outcome["verdict"] for outcome in outcomes_of(read(two), label)] == ["sampled"] * 3
    assert ids_of(read(one), "baseline") != ids_of(read(one), "K = 3")
    assert re.findall(r"(?m)^ *(\d) What ", printed) == ["1", "2", "3"] and said == "Loading …\n"  # one of them speaks
    assert "  temperature 3, top-k 0, top-p 1, seed 1; " in printed and alone.count(" sampled\n") == 16
    assert ", float32, eager\n" in printed and printed.count("which draft pays?") == 1
    assert read(two)["environment"]["processes"] == 2 and read(two)["complete"] is True
    assert summaries_of(read(two))["K = 3"]["identical"] is None and "Sampled, so" in printed


def test_a_draft_that_fails_in_one_process_is_a_row_in_all(tmp_path):
    """Of three, for two questions."""
    out, drafts = tmp_path / "out.json", ["--main", MAIN, "--draft", f"{DRAFT},ngram", "--limit", 2]

    def without_memory(arguments):
        with pytest.MonkeyPatch.context() as patch:
            failing(patch, lambda ids: True, "draft")
            program(arguments)

    options = [*drafts, "--compare", "transformers", *SHORT, "--json", out]
    with launched(*options, begins=(program, without_memory, program)) as processes:
        said = [process.finish()[1] for process in processes]
    assert [process.status for process in processes] == [1, 0, 0] and said[0] == "Loading …\n"
    report = read(out)
    assert len(report["prompts"]) == 2 and report["complete"] is True
    for label, summary in summaries_of(report).items():
        errors = [outcome["error"] for outcome in outcomes_of(report, label)]
        assert errors == [OUT_OF_MEMORY if label.startswith("draft, ") else None] * 2
        assert (summary is None) == label.startswith("draft, ")


def test_every_process_says_why_it_ends_and_one_that_fails_ends_all(tmp_path):
    prompts, none = write(tmp_path / "p.txt", "What is zip?"), tmp_path / "none.txt"
    with launched(*QUICK, "--prompts", none) as processes:
        said = [process.finish()[1] for process in processes]
    for rank in range(2):
        assert re.fullmatch(rf"error.*: cannot read {none}: .*\n", said[rank])
    with launched(*QUICK, own=(["--prompts", prompts], ["--prompts", none])) as processes:
        said += [process.finish()[1] for process in processes]
    assert re.fullmatch(r"Loading …\nerror.*\n", said[2]) and said[3] == said[1]
    with launched(*QUICK, "--limit", 2, own=([], ["--no-chat-template"])) as processes:
        said += [process.finish()[1] for process in processes]
    assert re.fullmatch(
        r"(Loading …\nerror.*: the processes read different prompts.*\n){2}", said[4] + "Loading …\n" + said[5]
    )
    assert {process.status for process in processes} == {2}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_ends_early_ends_all_with_the_report(tmp_path, number):
    """By Ctrl-C, or so that it cannot say anything any more."""
    out = tmp_path / "out.json"

    def begin(arguments):
        sd.Peers.PATIENCE_S = 3  # instead of a minute
        program(arguments)

    options = [*QUICK, "--prompts", many_prompts(tmp_path), "--json", out]
    with launched(*options, begins=(begin, begin)) as (first, second):
        first.wait_for("^  2 What ")
        os.kill(second.pid, number)
        (printed, said), silent = first.finish(), second.finish()
    done = len(read(out)["prompts"])
    tells = number == signal.SIGINT
    assert first.status == 2 and silent == ("", "Interrupted.\n" if tells else "")
    assert re.fullmatch(f"Loading …\nerror: {'another process failed' if tells else 'process 1 is gone'}: .*\n", said)
    assert f"\nOnly {done} of 2000 prompts: " in printed and "\n    mean\n" in printed and done >= 2


def test_a_process_that_is_alone_says_so_and_can_be_ended_as_it_waits():
    """RANK and WORLD_SIZE are set, as in a pod, but nobody else is started."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    variables |= {"RANK": "0", "WORLD_SIZE": "2"}
    rendezvous = torch.distributed.rendezvous

    def begin(arguments, patience=60):
        sd.Peers.PATIENCE_S = patience
        torch.distributed.rendezvous = lambda *given, **further: (print("waits"), rendezvous(*given, **further))[1]
        program(arguments)

    for own in ({}, {"MASTER_ADDR": None}):
        waits = partial(begin, patience=2)  # instead of a minute
        status, _, said = finished(*QUICK, environment=variables | own, begin=waits)
        assert status == 2 and said.startswith("error") and said.count("\n") == 1
        assert "RANK=0" in said and "WORLD_SIZE=2" in said and ("MASTER_ADDR" in said or "1/2 clients" in said)
    for number in (signal.SIGINT, signal.SIGTERM):
        with Started(*QUICK, environment=variables, begin=begin) as process:
            process.wait_for("waits")
            os.kill(process.pid, number)
            assert process.finish() == ("waits\n", "") and process.status == -number

"""The program as people run it: its options, every way it can refuse and end, terminals, and several processes."""

import functools
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import psutil
import pytest
import torch
import transformers
from conftest import ROOT, make_model
from test_lossless import planted

import speculative_decoding as sd

PROGRAM = ROOT / "speculative_decoding.py"
MAIN, DRAFT = ROOT / "tests/tiny_gemma2/main", ROOT / "tests/tiny_gemma2/draft"
PAIR = ["--main", str(MAIN), "--draft", str(DRAFT)]
QUICK = ["--demo", "--warmup", 0, "--draft-tokens", 3, "--max-new-tokens", 12]


def run(*arguments):
    return sd.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """Run, see it refused, return the one line that it says."""
    status = run(*arguments)
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if not line.startswith("Loading ")]
    assert status == 2 and len(errors) == 1 and errors[0].startswith("error: "), said
    return errors[0]


def command(*arguments):
    """The program as a command of its own."""
    return list(map(str, [sys.executable, PROGRAM, *arguments]))


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_the_packages_at_the_top_of_the_file_are_those_of_requirements_txt():
    """So that `uv run speculative_decoding.py` needs no environment by hand."""
    block = re.search(r"(?ms)^# /// script\n(.*?)^# ///$", PROGRAM.read_text())[1]
    script = tomllib.loads("".join(line.removeprefix("# ") for line in block.splitlines(keepends=True)))
    assert script["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    assert script["requires-python"] == ">=3.11"


# What it does


def test_the_plain_command_shows_five_prompts_and_a_result(demo):
    done, report = demo
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "No GPU in use: this is the bundled pair of tiny models. Its speed says nothing about Gemma's."
    titles = [place for place, line in enumerate(lines) if re.match(r" +[1-5] \S", line)]
    assert len(titles) == 5
    for place in titles:
        assert re.match(r"    baseline +\d+ ", lines[place + 1])
        for row, label in zip(lines[place + 2 : place + 4], ("K = 3", "K = auto"), strict=True):
            assert row.startswith(f"    {label} ") and row.endswith(" yes")
    mean = lines.index("    mean")
    assert mean == titles[-1] + 4 and [line.endswith(" 5/5") for line in lines[mean + 2 : mean + 4]] == [True, True]
    assert "All 10 outputs are the main model's own, token for token." in lines
    assert max(map(len, lines)) <= 120
    assert "\x1b" not in done.stdout + done.stderr  # piped: no colours, no cursor movements
    assert "prompt 1: " not in done.stderr  # nor a progress bar
    assert report["settings"]["demo"] is True and report["complete"] is True


def test_the_options_do_what_they_say(tmp_path, one_prompt, capsys):
    out = tmp_path / "out.json"
    options = ["--max-new-tokens", 130, "--draft-tokens", 5, "--ignore-eos", "--no-chat-template", "--repeats", 2]
    assert run(*PAIR, "--prompts", one_prompt, *options, "--warmup", 0, "--json", out, "--dtype", "float32") == 0
    assert "bundled pair" not in capsys.readouterr().out  # models named on the command line are the models that run
    report = json.loads(out.read_text())
    assert report["settings"]["main"] == str(MAIN) and report["settings"]["demo"] is False
    (prompt,) = report["runs"][0]["prompts"]
    assert prompt["speculative"]["new_tokens"] == 130
    ids = transformers.AutoTokenizer.from_pretrained(MAIN)("What does heapq.merge do?")["input_ids"]
    assert prompt["prompt_tokens"] == len(ids) and report["runs"][0]["draft_tokens"] == 5


def test_what_is_compared_is_kept_apart(tmp_path, capsys, one_prompt):
    """Ours in `runs`, the library's in `compared`, in the same form."""
    out = tmp_path / "out.json"
    assert run(*QUICK, "--prompts", one_prompt, "--compare", "transformers", "--json", out) == 0
    report = json.loads(out.read_text())
    (ours,), (alone, assisted) = report["runs"], report["compared"]
    assert ours["method"] is None and ours["prompts"][0]["speculative"]["token_ids"]
    assert alone["method"] == "transformers' generate(), eager" and alone["draft_tokens"] is None
    assert assisted["method"] == "transformers' assisted generation, K = 3, eager" and assisted["draft_tokens"] == 3
    for other in (alone, assisted):
        (prompt,) = other["prompts"]
        assert prompt["compared"]["token_ids"] == ours["prompts"][0]["speculative"]["token_ids"]
        assert prompt["identical"] is True and other["summary"]["identical"] == 1
        assert other["summary"]["compared"]["time_to_first_token_s"] is None  # generate() does not tell
        assert "alpha" not in prompt["compared"] and other["summary"]["predicted_speedup_percent"] is None
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"With K = 3 it was [\d.]+ times as fast as transformers' generate\(\), eager\.", printed)
    assert re.search(r"With K = 3 it was [\d.]+ times as fast as transformers' assisted generation, K = 3", printed)


def test_a_mismatch_ends_with_status_1(monkeypatch, capsys, tmp_path):
    mistake = ("roll_back(drafted - accepted)", "roll_back(max(0, drafted - accepted - 1))")
    monkeypatch.setattr(sd, "decode_speculatively", planted(sd.decode_speculatively, mistake))
    out = tmp_path / "out.json"
    options = ["--draft-tokens", 3, "--max-new-tokens", 40, "--warmup", 0]
    assert run("--demo", *options, "--json", out) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "NOT the main model's own" in printed and "5 outputs are" in printed and "All 5" not in printed
    (measured,) = json.loads(out.read_text())["runs"]
    assert measured["summary"]["mismatches"] > 0
    parted = [report for report in measured["prompts"] if report["divergence"]]
    assert all(report["identical"] is False for report in parted)
    assert all(report["divergence"]["at_fault"] == "speculative" for report in parted)
    wrong = {report["number"]: report["divergence"]["gap"] for report in parted}
    assert f"The largest: prompt {max(wrong, key=wrong.get)}, K = 3" in printed


def test_bfloat16_outputs_are_the_same_or_tied(capsys):
    """The type that the default pair runs in: on the bundled pair, whatever parts, parts at a tie."""
    assert run("--demo", "--dtype", "bfloat16", "--draft-tokens", 4, "--warmup", 0, "--max-new-tokens", 64) == 0
    printed = capsys.readouterr().out
    assert "bfloat16" in printed and "NOT the main model's own" not in printed


# What must be refused: status 2, one line that says what and how, no traceback


def test_devices_and_files_that_are_not_there_are_refused(tmp_path, capsys):
    for device in ["abacus", "meta"] + ["cuda"] * (not torch.cuda.is_available()):
        message = refused(capsys, "--demo", "--device", device)
        assert f"cannot use the device '{device}'" in message and "--device auto" in message
    assert "--json" in refused(capsys, "--demo", "--json", tmp_path / "no" / "folder.json")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--draft-tokens", "0"],
        ["--draft-tokens", "three"],
        ["--draft-tokens", "3,,4"],
        ["--max-new-tokens", "-1"],
        ["--repeats", "0"],
        ["--warmup", "-1"],
        ["--dtype", "int8"],
        ["--nonsense"],
        ["--demo", "--main", "x"],
        ["--demo", "--draft", "x"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-p", "0"],
        ["--top-p", "1.1"],
        ["--limit", "0"],
        ["--top-k", "5"],
        ["--temperature", "1e-38"],
        ["--device-map", "auto", "--compile", "on"],
        ["--max-memory", "1GB"],
        ["--chat-template-args", "{'enable_thinking': false}"],
        ["--chat-template-args", "[1]"],
        ["--chat-template-args", "[" * 100_000],
        ["--chat-template-args", '{"x": NaN}'],
        ["--chat-template-args", '{"x": 1e999}'],
        ["--chat-template-args", '{"x": 1, "chat_template": "x"}'],
        ["--chat-template-args", '{"tokenize": false}'],
        ["--chat-template-args", '{"x": 1}', "--no-chat-template"],
        ["--device-map", "auto", "--max-memory", "plenty"],
        ["stray"],
    ],
)
def test_bad_options_are_refused(arguments, capsys):
    try:
        status = run(*arguments)
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr().err.splitlines()
    assert status == 2 and len(said) == 1 and said[0].startswith("error: ")


def test_help_and_mistakes_are_answered_before_the_slow_imports():
    """-S leaves out site-packages, so that torch and the rest cannot even be found."""
    bad = (["--draft-tokens", "0"], ["--chat-template-args", "x"])
    for arguments, status in ((["--help"], 0), *((one, 2) for one in bad), (["--demo"], 1)):
        command = [sys.executable, "-I", "-S", sd.__file__, *arguments]
        assert subprocess.run(command, capture_output=True).returncode == status


def test_the_help_names_the_exit_statuses(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help")
    printed, said = capsys.readouterr()
    assert ended.value.code == 0 and said == ""
    statuses = (
        "Exit status: 0 all well; 1 .* failed, or .* is not the main model's own; 2 it could not run; 130 interrupted"
    )
    assert re.search(statuses, " ".join(printed.split()))


def test_no_file_is_replaced_that_should_stay(tmp_path, capsys):
    prompts = write(tmp_path / "p.txt", "What does re.split do?")
    for option in ("--json", "--svg"):
        assert "files of their own" in refused(capsys, *QUICK, "--prompts", prompts, option, prompts)
        assert "is not a file" in refused(capsys, *QUICK, option, "/dev/null")
        assert "cannot write" in refused(capsys, *QUICK, option, tmp_path / "no" / "file")
    assert "files of their own" in refused(capsys, *QUICK, "--json", tmp_path / "both", "--svg", tmp_path / "both")
    assert "is not a file" in refused(capsys, *QUICK, "--json", "/")
    assert prompts.read_text() == "What does re.split do?\n" and not os.path.isfile("/dev/null")
    line = " ".join([*command(*QUICK, "--limit", 1, "--json", tmp_path / "both"), ">", str(tmp_path / "both")])
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and "is not a file that can be replaced" in done.stderr  # where the report goes
    earlier, link = write(tmp_path / "earlier.json", {}), tmp_path / "link.json"
    link.symlink_to(earlier)
    refused(capsys, *QUICK, "--prompts", tmp_path / "none.txt", "--json", link)
    assert earlier.read_text() == "{}\n"  # until there is something to write
    assert run(*QUICK, "--prompts", prompts, "--json", link) == 0
    assert link.is_symlink() and json.loads(earlier.read_text())["complete"] is True


# While it runs, and when it stops


def failing_at(word):
    """The program's own loading, of a model that runs out of memory wherever it reads a word."""
    load = sd.load_model
    token = transformers.AutoTokenizer.from_pretrained(MAIN)(word)["input_ids"][-1]

    def out_of_memory(module, arguments):
        if (arguments[0] == token).any():
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    def load_model(*arguments, **options):
        model = load(*arguments, **options)
        model.get_input_embeddings().register_forward_pre_hook(out_of_memory)
        return model

    return load_model


def test_a_prompt_that_fails_is_a_row_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "p.txt", tmp_path / "out.json"
    path.write_text("What does list.sort do?\nWhat does zip do?\nWhat does re.split do?\n")
    monkeypatch.setattr(sd, "load_model", failing_at("zip"))
    assert run(*QUICK, "--prompts", path, "--json", out) == 1
    printed = capsys.readouterr().out
    assert "\n  2 What does zip do?\n    K = 3: CUDA out of memory.\n  3 What does re.split do?\n" in printed
    report = json.loads(out.read_text())
    first, failed, last = report["runs"][0]["prompts"]
    assert failed["error"] == "CUDA out of memory." and failed["baseline"] is None is failed["speculative"]
    assert failed["speedup_percent"] is failed["identical"] is failed["divergence"] is None
    assert first["error"] is None is last["error"] and report["runs"][0]["summary"]["identical"] == 2
    assert "All 2 outputs" in printed and report["complete"] is True


def test_a_method_that_fails_costs_its_own_rows_only(tmp_path, capsys, monkeypatch):
    """A model that runs out of memory in passes of 21 tokens: the verify passes of K = 20, and no others."""
    load = sd.load_model

    def out_of_memory(module, arguments):
        if arguments[0].shape[1] == 21:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    def load_model(*arguments, **options):
        model = load(*arguments, **options)
        model.get_input_embeddings().register_forward_pre_hook(out_of_memory)
        return model

    monkeypatch.setattr(sd, "load_model", load_model)
    path, out = write(tmp_path / "p.txt", "What does list.sort do?", "What does re.split do?"), tmp_path / "out.json"
    assert run(*QUICK, "--prompts", path, "--draft-tokens", "20,3,auto", "--json", out) == 1
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    failed, fixed, auto = report["runs"]
    assert 21 not in [prompt["prompt_tokens"] for prompt in fixed["prompts"]]
    assert [prompt["error"] for prompt in failed["prompts"]] == ["CUDA out of memory."] * 2
    assert failed["summary"] is None and failed["categories"] == {} and report["complete"] is True
    for good in (fixed, auto):
        assert [prompt["error"] for prompt in good["prompts"]] == [None, None]
        assert all(prompt["baseline"]["new_tokens"] == 12 for prompt in good["prompts"])
        assert good["summary"]["identical"] == 2 and good["summary"]["speedup_percent"] is not None
    rows = r" {5,}12 .*\n    K = 20: CUDA out of memory\.\n    K = 3  .* yes\n    K = auto  .* yes\n"
    assert len(re.findall(r"^    baseline" + rows, printed, re.MULTILINE)) == 2
    assert re.search(r"^    mean\n    baseline .*\n    K = 3  .* 2/2\n    K = auto  .* 2/2\n", printed, re.MULTILINE)
    assert "All 4 outputs are the main model's own" in printed


# Conversations

TALK = {"question_id": 81, "turns": ["What does list.sort do?", "What does re.split do?", "And what does zip do?"]}
SHORT = ["--demo", "--warmup", 0, "--draft-tokens", 3, "--max-new-tokens", 8]


def asked(tokenizer, questions, answers):
    """The ids of a conversation, by hand."""
    text = "<bos>"
    for question, answer in zip(questions, [*answers, None], strict=True):
        text += f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"
        if answer is not None:
            text += tokenizer.decode(answer, skip_special_tokens=True).strip() + "<end_of_turn>\n"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("sampling", [[], ["--temperature", 2]], ids=["greedy", "sampled"])
def test_turns_go_on_from_the_baselines_answers(tmp_path, capsys, monkeypatch, sampling):
    """Three turns of one question, for all methods with the same ids; and --limit counts questions."""
    read, seeds = [], set()

    def record(*given, decode):
        run = decode(*given)
        read.append(given[-1].ids)
        seeds.add(torch.initial_seed())  # of the library's methods
        return run

    for name in ("decode_autoregressively", "decode_speculatively", "decode_by_generate"):
        monkeypatch.setattr(sd, name, functools.partial(record, decode=getattr(sd, name)))
    path, out = write(tmp_path / "q.jsonl", TALK, {"prompt": "What is zip?"}), tmp_path / "out.json"
    options = ["--prompts", path, "--json", out, *sampling]
    assert run(*SHORT, *options, "--limit", 1, "--compare", "transformers") == 0
    printed, report = capsys.readouterr().out, json.loads(out.read_text())
    tokenizer, prompts = transformers.AutoTokenizer.from_pretrained(MAIN), report["runs"][0]["prompts"]
    assert [(prompt["number"], prompt["turn"], prompt["prompt"]) for prompt in prompts] == [
        (1, turn, text) for turn, text in enumerate(TALK["turns"], 1)
    ]
    answers = [prompt["baseline"]["token_ids"] for prompt in prompts]
    expected = [asked(tokenizer, TALK["turns"][: turn + 1], answers[:turn]) for turn in range(3)]
    assert [prompt["prompt_tokens"] for prompt in prompts] == list(map(len, expected))
    assert read == [tuple(ids) for ids in expected for _ in range(4)]
    assert re.findall(r"^(81\.\d) \S", printed, re.MULTILINE) == ["81.1", "81.2", "81.3"] and ", 3 prompts\n" in printed
    if not sampling:
        assert all(part["summary"]["identical"] == 3 for part in report["runs"] + report["compared"])
        return
    assert seeds >= {1, 1 + 2**16, 1 + 2 * 2**16}
    assert prompts[0]["speculative"]["token_ids"] != answers[0]  # so it is seen whose answer it is
    assert run(*SHORT, "--prompts", write(path, {"prompt": TALK["turns"][0]}), "--json", out, *sampling) == 0
    (alone,) = json.loads(out.read_text())["runs"][0]["prompts"]
    assert alone["turn"] is None and alone["baseline"]["token_ids"] == answers[0]


def test_a_turn_that_does_not_fit_is_a_row_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    """Nor does one without an answer to go on from, of a baseline that failed."""
    monkeypatch.setattr(sd, "load_model", failing_at("zip"))
    long = {"turns": [TALK["turns"][0], "word " * 1000, "Why?"]}
    failing = {"turns": [TALK["turns"][1], TALK["turns"][2], "Why?"]}
    path, out = write(tmp_path / "q.jsonl", long, failing, {"prompt": "What is it?"}), tmp_path / "out.json"
    assert run(*SHORT, "--prompts", path, "--json", out) == 1
    printed, report = capsys.readouterr().out, json.loads(out.read_text())
    prompts = {(prompt["number"], prompt["turn"]): prompt for prompt in report["runs"][0]["prompts"]}
    errors = {place: prompt["error"] for place, prompt in prompts.items()}
    too_long = re.fullmatch(
        r"turn 2: (\d+) tokens, and 10 for output and .* the context of 1024: .*", errors.pop((1, 2))
    )
    assert int(too_long[1]) > 1024 and f" K = 3: {too_long[0]} 1.3 Why? " in " ".join(printed.split())
    assert errors == {
        (1, 1): None,
        (1, 3): "turn 2 has no answer to go on from",
        (2, 1): None,
        (2, 2): "CUDA out of memory.",
        (2, 3): "turn 2 has no answer to go on from",
        (3, None): None,
    }
    assert prompts[1, 3]["prompt_tokens"] is None and report["complete"] is True
    assert report["runs"][0]["summary"]["identical"] == 3


def test_if_every_prompt_fails_nothing_can_be_said(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "p.txt", "What does zip do?")
    monkeypatch.setattr(sd, "load_model", failing_at("zip"))
    assert run(*QUICK, "--prompts", path) == 2
    assert "no prompt could be decoded (CUDA out of memory.)" in capsys.readouterr().err


def test_too_little_memory_for_measuring_costs_is_a_row_of_that_method(tmp_path, capsys, monkeypatch):
    """Costs are measured behind a prompt of middle length; here the one that fails."""
    lines = [
        "What does re do?",
        "What does the function zip do?",
        "What does the built-in function sorted do in Python?",
    ]
    path, out = write(tmp_path / "p.txt", *lines), tmp_path / "out.json"
    monkeypatch.setattr(sd, "load_model", failing_at("zip"))
    assert run(*QUICK, "--prompts", path, "--draft-tokens", "3,auto", "--json", out) == 1
    printed = capsys.readouterr().out
    fixed, auto = json.loads(out.read_text())["runs"]
    why = "what passes cost cannot be measured: CUDA out of memory."
    assert [prompt["error"] for prompt in auto["prompts"]] == [why, "CUDA out of memory.", why]
    assert auto["costs"] is None is auto["summary"] and printed.count(f"    K = auto: {why}\n") == 2
    assert [prompt["error"] for prompt in fixed["prompts"]] == [None, "CUDA out of memory.", None]
    assert fixed["summary"]["identical"] == 2 and "All 2 outputs are the main model's own" in printed


def test_pairs_that_the_library_refuses_are_a_row_that_says_why(tmp_path, capsys, one_prompt):
    """The same tokenizer, but vocabularies that are padded differently: ours runs, assisted generation does not."""
    draft = transformers.AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32)
    draft.resize_token_embeddings(2112)
    draft.save_pretrained(tmp_path / "padded")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DRAFT / name, tmp_path / "padded" / name)
    out = tmp_path / "out.json"
    pair = ["--main", MAIN, "--draft", tmp_path / "padded", "--prompts", one_prompt, "--draft-tokens", 3]
    assert run(*pair, "--compare", "transformers", "--max-new-tokens", 12, "--json", out) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    alone, assisted = report["compared"]
    assert alone["method"] == "transformers' generate(), eager" and alone["summary"]["identical"] == 1
    (refusal,) = [prompt["error"] for prompt in assisted["prompts"]]
    assert "different tokenizers" in refusal and f" assist 3: {refusal} mean " in " ".join(printed.split())
    assert assisted["summary"] is None and assisted["prompts"][0]["compared"] is None
    assert report["runs"][0]["summary"]["identical"] == 1
    assert "K = 3, eager" not in printed.partition("times as fast")[2]  # nothing is said of what did not run


def test_closed_outputs_leave_no_traceback(tmp_path):
    for closed in (">&-", "2>&-"):
        out = tmp_path / "out.json"
        line = " ".join([*command(*QUICK, "--limit", 1, "--max-new-tokens", 4, "--json", out), closed])
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0
        assert "Traceback" not in done.stdout + done.stderr and "Exception" not in done.stdout + done.stderr
        assert json.loads(out.read_text())["complete"] is True
        assert bool(done.stdout) is (closed == "2>&-") and bool(done.stderr) is (closed == ">&-")
        out.unlink()


def test_a_reader_that_goes_away_leaves_no_traceback():
    line = " ".join([*command(*QUICK, "--limit", 1), "| head -1; exit ${PIPESTATUS[0]}"])
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_output_that_cannot_be_printed_is_one_line():
    with open("/dev/full", "w") as full:
        arguments = command(*QUICK, "--limit", 1)
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100, check=False)
    assert done.returncode == 2 and "error: cannot go on: No space left on device, where the report" in done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_disk_that_fills_up_in_the_middle_loses_nothing(tmp_path, capsys):
    """With a limit on the size of files, which is enough for the JSON of two prompts, but not of all."""
    out = tmp_path / "out.json"
    assert run(*QUICK, "--limit", 2, "--json", out) == 0
    most = out.stat().st_size
    out.unlink()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    arguments = command(*QUICK, "--json", out)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=100, preexec_fn=limit, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"^error: cannot write .*out.json: File too large", done.stderr, re.MULTILINE)
    assert re.search(r"^ +mean$", done.stdout, re.MULTILINE) and "times as fast" in done.stdout
    kept = json.loads(out.read_text())
    assert 1 <= len(kept["runs"][0]["prompts"]) < 5 and kept["complete"] is False
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def interrupted(out, row, *seconds, options=()):
    """The program, interrupted after a row of its report, and again after some seconds; all that it printed and said.

    `row`: a pattern of the line.
    """
    arguments = command("--demo", "--draft-tokens", 3, "--warmup", 0, "--json", out, *options)
    environment, pipe = os.environ | {"PYTHONUNBUFFERED": "1"}, subprocess.PIPE
    with subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        printed = ""
        while not re.search(row, printed, re.MULTILINE):
            assert (line := process.stdout.readline())
            printed += line
        process.send_signal(signal.SIGINT)
        for pause in seconds:
            time.sleep(pause)
            process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and "Exception ignored" not in errors
    return printed + rest, errors


def test_control_c_reports_what_is_done(tmp_path):
    out = tmp_path / "out.json"
    printed, errors = interrupted(out, "^ +1 ")
    assert "Interrupted after 1 of 5 prompts" in errors and "Only 1 of 5 prompts: a part of the result." in printed
    assert re.search(r"^ +mean$", printed, re.MULTILINE) and "times as fast" in printed
    report = json.loads(out.read_text())
    (measured,) = report["runs"]
    assert len(measured["prompts"]) == 1 and report["complete"] is False
    assert measured["summary"]["identical"] == 1  # of what was measured, as the report has it


def test_control_c_in_a_conversation_keeps_the_turns_that_are_done(tmp_path):
    out, path = tmp_path / "out.json", write(tmp_path / "q.jsonl", TALK, {"prompt": "What is zip?"})
    printed, errors = interrupted(out, r"^81\.1 ", options=["--prompts", path])
    assert "Interrupted after 1 of 4 prompts" in errors and "Only 1 of 4 prompts: a part of the result." in printed
    (prompt,) = json.loads(out.read_text())["runs"][0]["prompts"]
    assert prompt["turn"] == 1 and prompt["identical"] is True and re.search(r"^ +mean$", printed, re.MULTILINE)


@pytest.mark.parametrize("pause", [0.005, 0.01, 0.2])
def test_two_control_cs_end_it_as_one_does(tmp_path, pause):
    out = tmp_path / "out.json"
    printed, errors = interrupted(out, "^ +2 ", pause)
    assert re.search(r"^Interrupted after [23] of 5 prompts\.$", errors, re.MULTILINE)
    assert re.search(r"^ +mean$", printed, re.MULTILINE) and "times as fast" in printed
    report = json.loads(out.read_text())
    assert len(report["runs"][0]["prompts"]) in (2, 3) and report["complete"] is False


# Terminals


def in_a_terminal(columns, *arguments, environment=None):
    """Run the program with a terminal of so many columns as its output; return what arrives there."""
    parent, child = pty.openpty()
    settings = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color"} | (environment or {})
    with subprocess.Popen(command(*arguments), stdin=child, stdout=child, stderr=child, env=settings) as process:
        os.close(child)
        seen = b""
        while True:
            try:
                seen += (chunk := os.read(parent, 65536))
            except OSError:
                break
            if not chunk:
                break
        assert process.wait(60) == 0
    os.close(parent)
    return seen.decode()


def report_in(seen):
    """The report's lines in what a terminal was sent: without colours, cursor movements and progress."""
    lines = [
        re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).split("\r")[-1] for line in seen.replace("\r\n", "\n").split("\n")
    ]
    return [line for line in lines if not line.startswith(("Loading", "prompt 1: ", "prompt 2: "))]


def test_in_a_terminal_of_80_columns():
    seen = in_a_terminal(80, *QUICK, "--limit", 1, "--show-text", "--draft-tokens", "2,auto")
    assert "prompt 1: K = 2" in seen and "\x1b[" in seen  # progress, and colours
    report = report_in(seen)
    assert max(map(len, report)) <= 80
    mean = report.index("    mean")
    assert re.fullmatch(r"    baseline +12( +[\d.]+){3} *", report[mean + 1])  # no figure is cut or wrapped
    for label, row in zip(("2", "auto"), report[mean + 2 : mean + 4], strict=True):
        columns = r" +12( +[\d.]+){3} +[+-]\d+ % +\d+ % +\d\.\d\d +-\d+\.\d+ +yes"
        assert re.fullmatch(rf"    K = {label}{columns}", row)
    (headings,) = [line for line in report if line.startswith("By draft length")]
    assert re.fullmatch(r"By draft length +tok/s +faster +decode +predicted +length +α +c +v", headings)
    of_lengths = r"  K = \w+ +[\d.]+ +[+-]\d+ % +[+-]\d+ % +([+-]\d+ %|–) +\d\.\d\d( +\d+\.\d+){3}"
    assert sum(bool(re.fullmatch(of_lengths, line)) for line in report) == 2


def test_in_a_terminal_of_50_columns_the_table_is_a_list():
    seen = in_a_terminal(50, *QUICK, "--limit", 2, "--draft-tokens", "2,auto")
    report = report_in(seen)
    assert max(map(len, report)) <= 50
    text = " ".join(" ".join(report).split())
    values = r"tokens 12, s [\d.]+, TTFT [\d.]+, tok/s [\d.]+"
    more = r", faster [+-]\d+ %, accept \d+ %, length \d\.\d\d, log-l\. -\d+\.\d+, same "
    assert len(re.findall(rf" baseline[:,] {values}(?!,)", text)) == 3  # two prompts, and the mean
    for label in ("2", "auto"):
        assert len(re.findall(rf" K = {label}[:,] {values}{more}yes", text)) == 2
        assert len(re.findall(rf" K = {label}[:,] {values}{more}2/2", text)) == 1
        summary = r"faster [+-]\d+ %, decode [+-]\d+ %, predicted ([+-]\d+ %|–), length \d\.\d\d, α \d"
        assert re.search(rf" K = {label}[:,] tok/s [\d.]+, {summary}", text)


def test_a_dumb_terminal_gets_rows_without_blank_lines():
    seen = in_a_terminal(100, *QUICK, "--limit", 2, environment={"TERM": "dumb"})
    assert "\x1b" not in seen and "prompt 1: " not in seen  # no progress: it could not be taken back
    lines = seen.replace("\r\n", "\n").split("\n")
    first, last = (
        next(i for i, line in enumerate(lines) if line.startswith(start)) for start in ("  # prompt", "    mean")
    )
    assert [" ".join(line.split()[:1]) for line in lines[first:last]] == [
        "#",
        "1",
        "baseline",
        "K",
        "2",
        "baseline",
        "K",
    ]


def test_no_color_is_respected():
    seen = in_a_terminal(100, *QUICK, "--limit", 1, "--show-text", environment={"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", seen)
    assert "«the main model's own, after a rejection»" in seen


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
    options = ["--max-new-tokens", 2, "--warmup", 0, "--no-chat-template", "--json", out]
    status = run("--demo", "--prompts", path, *options, "--show-text")
    printed, said = capsys.readouterr()
    assert status == 0 and "1 of 7 prompts" in said and "left out" in said  # the last is too long
    assert not set(printed) - {"\n"} & set(map(chr, [*range(32), *range(127, 160), 0x202E, 0x202C, 0x200B, 0x200D]))
    assert "[bold red]markup[/] [link=https://" in printed
    assert all(sd.Text(line).cell_len <= 120 for line in printed.splitlines())
    assert [prompt["prompt"] for prompt in json.loads(out.read_text())["runs"][0]["prompts"]] == HOSTILE[:-1]
    assert not re.search(r"[^\n -~]", out.read_text())  # escaped, all of it


def test_hostile_names_and_categories_do_not_reach_the_terminal(tmp_path, capsys):
    """Folders and categories with escapes in their names: in the report, in a refusal, in an option."""
    folder = tmp_path / "ma\x1b[2Jin"
    shutil.copytree(MAIN, folder)
    path = write(tmp_path / "p.jsonl", {"prompt": "What does zip do?", "category": "\x1b]0;owned\x07[bold]x"})
    assert run("--main", folder, "--draft", DRAFT, "--prompts", path, *QUICK[1:]) == 0
    assert run("--main", tmp_path / "no\x1b[2J", "--draft", DRAFT, "--prompts", path) == 2
    with pytest.raises(SystemExit):
        run("--draft-tokens", "\x1b[2J")
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed and "\x07" not in printed
    assert "ma�[2Jin" in printed and "�]0;owned�[bold]x" in printed and "no�[2J" in printed


def test_plain():
    assert sd.plain("a\tb\r\nc\x1b[31m\u202e\ue000") == "a b c�[31m��"
    assert sd.plain("é 日本 שלום 🙂") == "é 日本 שלום 🙂"
    assert sd.safe("a\n  b\u2028c\r\x07") == "a\n  b�c��"


# More than one process


def launched(*arguments, **options):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    arguments = list(map(str, [*launcher, PROGRAM, *arguments]))
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def texts_of(path):
    (measured,) = json.loads(path.read_text())["runs"]
    return [(prompt["prompt"], prompt["speculative"]["token_ids"]) for prompt in measured["prompts"]]


def test_two_processes_give_what_one_gives(tmp_path, capsys):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    sampled = ["--temperature", 0.9]  # what is drawn depends on the prompt, not on the process
    assert run(*QUICK, *sampled, "--json", one) == 0
    with launched(*QUICK, *sampled, "--json", two) as process:
        printed, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert texts_of(one) == texts_of(two) and len(texts_of(two)) == 5
    assert printed.count("Speculative decoding: does the draft pay?") == 1  # one process prints
    assert re.findall(r"^ +([1-5]) What|^ +(5) Explain", printed, re.MULTILINE)
    assert [int(row) for row in re.findall(r"^ +(\d) \S", printed, re.MULTILINE)] == [1, 2, 3, 4, 5]
    assert "in each of 2 processes" in printed
    assert json.loads(two.read_text())["environment"]["processes"] == 2


def test_two_processes_take_all_turns_of_their_questions(tmp_path):
    """The first takes the questions 1 and 3, with four turns, the second the question 2, with one."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    path = write(tmp_path / "q.jsonl", TALK, {"prompt": "What is zip?"}, {"prompt": "What does re.split do?"})
    assert run(*SHORT, "--prompts", path, "--json", one) == 0
    with launched(*SHORT, "--prompts", path, "--json", two) as process:
        printed, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert sorted(texts_of(one)) == sorted(texts_of(two)) and len(texts_of(two)) == 5
    assert re.findall(r"^ *([\d.]+) \S+ (?:is|what|does) ", printed, re.MULTILINE) == ["81.1", "2", "81.2", "81.3", "3"]


def test_a_process_that_dies_ends_the_run_with_a_message(tmp_path):
    out = tmp_path / "out.json"
    with launched("--demo", "--warmup", 0, "--draft-tokens", 3, "--repeats", 2, "--json", out) as process:
        while not (out.exists() and json.loads(out.read_text())["runs"][0]["prompts"]):
            assert process.poll() is None
            time.sleep(0.1)
        workers = [
            child for child in psutil.Process(process.pid).children() if PROGRAM.name in " ".join(child.cmdline())
        ]
        second = next(child for child in workers if child.environ()["RANK"] == "1")
        second.send_signal(signal.SIGKILL)
        printed, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "cannot hear from the other processes" in said or "Interrupted after" in said
    assert re.search(r"^ +mean$", printed, re.MULTILINE)  # what was measured is reported
    assert len(texts_of(out)) >= 2


def test_steps_that_cannot_be_compiled_run_eagerly_and_that_is_said(tmp_path, capsys, one_prompt):
    """OPT reads a number from the device while it is traced: the compiler finds no single graph."""
    model = make_model("opt")
    model.resize_token_embeddings(2048)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MAIN / name, tmp_path / name)
    pair = ["--main", tmp_path, "--draft", tmp_path, "--prompts", one_prompt, "--json", tmp_path / "out.json"]
    assert run(*pair, "--compile", "on", "--draft-tokens", 2, "--max-new-tokens", 8, "--warmup", 0) == 0
    printed, said = capsys.readouterr()
    assert "warning: compiling failed, so this runs eagerly: " in printed and "Compiling step 1 of 4, after 0 s" in said
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["settings"]["compile"] == "off" and report["runs"][0]["summary"]["identical"] == 1

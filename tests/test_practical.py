"""What people meet on their own machines: prompt sets, little memory, the hub, offloading, failures, terminals."""

import io
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree

import psutil
import pytest
import torch
import transformers
from conftest import ROOT, alone, ids_of, like, make_model, speculate
from rich.console import Console
from test_command_line import DRAFT, MAIN, refused, run

import speculative_decoding as sd

PROGRAM = ROOT / "speculative_decoding.py"
BUNDLED = ROOT / "tests/tiny_gemma2"
QUICK = ["--demo", "--warmup", 0, "--draft-tokens", 3, "--max-new-tokens", 12]


# Prompt sets


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["What does list.sort do?", "And now in French."]},
    {"question_id": 82, "category": "writing", "turns": ["What does re.split do?"]},
    {"question_id": "x", "category": "coding", "prompt": "What is collections.defaultdict?", "reference": [1]},
    {"category": "writing", "prompt": "What is the itertools module for?"},
]


def test_question_files_run_as_they_are(tmp_path, capsys):
    path, out = write(tmp_path / "q.jsonl", *QUESTIONS, ""), tmp_path / "out.json"
    assert run(*QUICK, "--prompts", path, "--json", out) == 0
    printed = capsys.readouterr().out
    (measured,) = json.loads(out.read_text())["runs"]
    prompts, categories = measured["prompts"], measured["categories"]
    assert [prompt["prompt"] for prompt in prompts] == [
        QUESTIONS[0]["turns"][0],
        QUESTIONS[1]["turns"][0],
        QUESTIONS[2]["prompt"],
        QUESTIONS[3]["prompt"],
    ]
    assert [prompt["question_id"] for prompt in prompts] == [81, 82, "x", None]
    assert [prompt["category"] for prompt in prompts] == ["writing", "writing", "coding", "writing"]
    assert set(categories) == {"writing", "coding"} and categories["writing"]["identical"] == 3
    tokens = [prompt["speculative"]["new_tokens"] for prompt in prompts]
    assert categories["coding"]["speculative"]["new_tokens"] == tokens[2]
    assert categories["writing"]["speculative"]["new_tokens"] == sum(tokens) - tokens[2]
    for name in ("writing", "coding", "all prompts"):
        assert re.search(rf"^ {name} +[\d.]+ +[+-]\d+ %", printed, re.MULTILINE)


@pytest.mark.parametrize(("limit", "chosen"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (9, [1, 2, 3, 4])])
def test_a_limit_is_spread_over_the_categories(tmp_path, limit, chosen):
    path = write(tmp_path / "q.jsonl", *QUESTIONS)
    assert [prompt.number for prompt in sd.read_prompts(str(path), limit)] == chosen


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{not json", "this is not JSON"),
        ("[" * 100_000, "this is not JSON"),
        ('["a list"]', "no text"),
        ({"category": "x"}, "no text"),
        ({"turns": []}, "no text"),
        ({"turns": "a string"}, "no text"),
        ({"prompt": 7}, "no text"),
        ({"prompt": " "}, "the prompt is empty"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path, capsys, line, expected):
    path = write(tmp_path / "q.jsonl", QUESTIONS[0], "", line)
    message = refused(capsys, "--demo", "--prompts", path)
    assert f"{path}, line 3: {expected}" in message


# Before loading


def test_weights_are_counted_from_the_configuration_alone():
    gemma = {"vocab_size": 256000, "head_dim": 256}
    nine = {"hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}
    two = {"hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}
    main = transformers.Gemma2Config(**gemma, **nine, intermediate_size=14336)
    draft = transformers.Gemma2Config(**gemma, **two, intermediate_size=9216)
    assert sd.count_parameters(main) * 2 / 1e9 == pytest.approx(18.48, abs=0.01)
    assert sd.count_parameters(draft) * 2 / 1e9 == pytest.approx(5.23, abs=0.01)
    for folder in (MAIN, DRAFT):  # and against real models
        config = sd.load_config(str(folder))
        model = sd.load_model(str(folder), config, torch.float32)
        assert sd.count_parameters(config) == model.num_parameters()
        cached = sd.CachedModel(model)
        cached.read(ids_of(range(50)))  # shorter than the window
        stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cached.cache.layers)
        assert sd.cache_gb(config, torch.float32, 50) * 1e9 == pytest.approx(stored)


def giant(folder):
    """A folder that looks like a model of 10^13 parameters, without its weights."""
    shape = {"hidden_size": 2**16, "intermediate_size": 2**18, "num_hidden_layers": 128, "num_attention_heads": 128}
    transformers.Gemma2Config(vocab_size=2048, **shape).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MAIN / name).read_bytes())
    return folder


def test_too_little_memory_is_said_before_anything_is_loaded(tmp_path, capsys):
    message = refused(capsys, "--main", giant(tmp_path / "giant"), "--draft", DRAFT)
    needed, free = (float(number) for number in re.findall(r"([\d.]+) GB (?:in float32|free)", message))
    assert needed > 20_000 > free
    assert re.search(rf"main {tmp_path}/giant \d+\.\d \+ \d+\.\d, draft {DRAFT} 0\.0 \+ 0\.0\)", message)
    assert "try a smaller pair" in message and "--device-map" not in message  # nothing else would help on a CPU


def test_the_hubs_answers_are_told_apart_in_one_line(tmp_path):
    options = ["--prompts", BUNDLED / "prompts.txt", "--limit", 1, "--max-new-tokens", 4, "--warmup", 0]
    command = [sys.executable, ROOT / "tests/hub.py", DRAFT, "--main", MAIN, *options, "--draft-tokens", 2]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100, env=environment)
    results = {case: (status, said) for case, status, _, said in json.loads(done.stdout)}
    assert done.stderr == ""  # nothing of the client's own
    assert results["whole"][0] == results["late"][0] == 0  # downloaded, and then used without the hub
    for case, expected in {
        "gated": "accept its licence at https://huggingface.co/someone/gated, then `hf auth login`",
        "gated-too": "is a gated model",
        "gated-files": "is a gated model",
        "hidden": "check the spelling",
        "missing": "check the spelling",
        "forbidden": "does not let you read someone/forbidden (status 403)",
        "broken": "answers with status 500",
        "cut": "cannot download someone/cut",
        "silent": "cannot be reached: check the connection",
        "refused": "cannot be reached: check the connection",
    }.items():
        status, said = results[case]
        errors = [line for line in said.splitlines() if not line.startswith("Loading ")]
        assert status == 2 and len(errors) == 1 and expected in errors[0], case
    silent = next(seconds for case, _, seconds, _ in json.loads(done.stdout) if case == "silent")
    assert silent < 15  # not the client's half minute; the server itself never answers


def test_a_full_disk_is_named(tmp_path, capsys, monkeypatch):
    """The one trouble that no test can make without a disk of its own: the client's error is put in its place."""
    monkeypatch.setattr(sd, "hub_refuses", lambda name: None)

    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sd.huggingface_hub, "snapshot_download", no_space)
    message = refused(capsys, "--main", "someone/large", "--draft", DRAFT)
    assert "the disk is full" in message and "HF_HOME" in message


def test_what_differs_between_tokenizers_is_said(tmp_path, capsys):
    tokenizer = json.loads((DRAFT / "tokenizer.json").read_text())
    added = next(token for token in tokenizer["added_tokens"] if token["content"] == "<end_of_turn>")
    added["content"] = "<|im_end|>"
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<|im_end|>"] = vocabulary.pop("<end_of_turn>")
    folder = tmp_path / "draft"
    folder.mkdir()
    for file in DRAFT.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    text = json.dumps(config).replace("<end_of_turn>", "<|im_end|>")
    (folder / "tokenizer_config.json").write_text(text)
    message = refused(capsys, "--main", MAIN, "--draft", folder)
    assert "different tokenizers" in message and re.search(r"'<end_of_turn>' is \d+ and nothing", message)
    assert "family, or --draft ngram" in message


def test_a_padded_vocabulary_of_one_family_is_fine(tmp_path):
    """Both ways: the models' sizes differ, their tokenizers do not."""
    larger = make_model("gemma2")
    larger.resize_token_embeddings(80)
    main = make_model("gemma2")
    for one, other in ((main, larger), (larger, main)):
        result = speculate(sd.CachedModel(one, 61), sd.CachedModel(other, 61), [5, 9], 3)
        assert result.token_ids == alone(sd.CachedModel(one, 61), [5, 9]).token_ids
        assert max(result.token_ids) < 61


def test_a_main_model_on_the_disk_writes_the_same(tmp_path, capsys):
    texts = []
    for name, options in {"whole": [], "disk": ["--device-map", "auto", "--max-memory", "6MB"]}.items():
        out = tmp_path / f"{name}.json"
        assert run(*QUICK, "--limit", 2, "--json", out, *options) == 0
        report = json.loads(out.read_text())
        texts.append([prompt["speculative"]["token_ids"] for prompt in report["runs"][0]["prompts"]])
        assert report["runs"][0]["summary"]["identical"] == 2
    assert texts[0] == texts[1]
    assert "offload" not in "".join(capsys.readouterr())


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
    assert "  2 What does zip do?: CUDA out of memory." in printed and re.search(r"^ +3 What", printed, re.MULTILINE)
    report = json.loads(out.read_text())
    first, failed, last = report["runs"][0]["prompts"]
    assert failed["error"] == "CUDA out of memory." and failed["baseline"] is None is failed["speculative"]
    assert first["error"] is None is last["error"] and report["runs"][0]["summary"]["identical"] == 2
    assert "All 2 outputs" in printed and report["complete"] is True


def test_if_every_prompt_fails_nothing_can_be_said(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "p.txt", "What does zip do?")
    monkeypatch.setattr(sd, "load_model", failing_at("zip"))
    assert run(*QUICK, "--prompts", path) == 2
    assert "no prompt could be decoded (CUDA out of memory.)" in capsys.readouterr().err


def test_too_little_memory_for_measuring_costs_is_one_line(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "p.txt", "What does zip do?", "What does the built-in function zip do in Python?")
    monkeypatch.setattr(sd, "load_model", failing_at("zip"))
    message = refused(capsys, *QUICK, "--prompts", path, "--draft-tokens", "auto")
    assert "cannot decode with this pair: CUDA out of memory.; lower --max-new-tokens" in message


def test_no_file_is_replaced_that_should_stay(tmp_path, capsys):
    prompts = write(tmp_path / "p.txt", "What does re.split do?")
    for option in ("--json", "--svg"):
        assert "files of their own" in refused(capsys, *QUICK, "--prompts", prompts, option, prompts)
        assert "is not a file" in refused(capsys, *QUICK, option, "/dev/null")
        assert "cannot write" in refused(capsys, *QUICK, option, tmp_path / "no" / "file")
    assert "files of their own" in refused(capsys, *QUICK, "--json", tmp_path / "both", "--svg", tmp_path / "both")
    assert "is not a file" in refused(capsys, *QUICK, "--json", "/")
    assert prompts.read_text() == "What does re.split do?\n" and not os.path.isfile("/dev/null")
    earlier, link = write(tmp_path / "earlier.json", {}), tmp_path / "link.json"
    link.symlink_to(earlier)
    refused(capsys, *QUICK, "--prompts", tmp_path / "none.txt", "--json", link)
    assert earlier.read_text() == "{}\n"  # until there is something to write
    assert run(*QUICK, "--prompts", prompts, "--json", link) == 0
    assert link.is_symlink() and json.loads(earlier.read_text())["complete"] is True


def test_output_that_cannot_be_printed_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, PROGRAM, *QUICK, "--limit", 1]
        done = subprocess.run(
            list(map(str, command)), stdout=full, stderr=subprocess.PIPE, text=True, timeout=100, check=False
        )
    assert done.returncode == 2 and "error: cannot go on: No space left on device, where the report" in done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_repeats_give_a_spread_and_an_interval(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert run(*QUICK, "--limit", 2, "--repeats", 3, "--json", out) == 0
    summary = (measured := json.loads(out.read_text())["runs"][0])["summary"]
    for prompt in measured["prompts"]:
        for method in (prompt["baseline"], prompt["speculative"]):
            assert 0 < method["latency_min_s"] <= method["latency_s"] <= method["latency_max_s"]
    low, high = summary["speedup_interval_percent"]
    printed = " ".join(capsys.readouterr().out.split())
    assert low < high and f"95 % interval {1 + low / 100:.2f} to {1 + high / 100:.2f}" in printed
    spread = [sd.figure(summary["baseline"][f"latency_{end}_s"]) for end in ("min", "max")]
    assert f"slowest of 3 repeats: {spread[0]} to {spread[1]} s (baseline)" in printed


def test_a_disk_that_fills_up_in_the_middle_loses_nothing(tmp_path):
    """With a limit on the size of files, which the third prompt's JSON exceeds."""
    out = tmp_path / "out.json"
    command = [sys.executable, PROGRAM, *QUICK, "--json", out]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000))

    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=100, preexec_fn=limit, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"^error: cannot write .*out.json: File too large", done.stderr, re.MULTILINE)
    assert re.search(r"^ +mean ", done.stdout, re.MULTILINE) and "times as fast" in done.stdout
    kept = json.loads(out.read_text())
    assert 1 <= len(kept["runs"][0]["prompts"]) < 5 and kept["complete"] is False
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def in_a_terminal(columns, *arguments, environment=None):
    """Run the program with a terminal of so many columns as its output; return what arrives there."""
    parent, child = pty.openpty()
    settings = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color"} | (environment or {})
    command = list(map(str, [sys.executable, PROGRAM, *arguments]))
    with subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=settings) as process:
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
    return seen.decode()


def test_in_a_terminal_of_80_columns():
    seen = in_a_terminal(80, *QUICK, "--limit", 1, "--show-text", "--draft-tokens", "2,auto")
    assert "prompt 1: K = 2" in seen and "\x1b[" in seen  # progress, and colours
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in seen.splitlines()]
    report = [line for line in lines if not line.startswith(("Loading", "prompt 1: "))]
    assert max(map(len, report)) <= 80
    (mean,) = [line for line in report if re.match(r" +mean ", line)]
    assert re.fullmatch(r" +mean +12 +[\d.]+ +[\d.]+ *", mean)  # no figure is cut or wrapped
    assert sum(bool(re.match(r" +K = \w+ .* 1/1 *$", line)) for line in report) == 2
    (headings,) = [line for line in report if line.endswith("tokens/round ")]
    assert re.fullmatch(r" +tok/s +faster +predicted +accept +tokens/round ", headings)
    assert sum(bool(re.fullmatch(r" K = \w+ +[\d.]+( +[+-]?\d+ %){3} +[\d.]+ ", line)) for line in report) == 2


def test_no_color_is_respected():
    seen = in_a_terminal(100, *QUICK, "--limit", 1, "--show-text", environment={"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", seen)
    assert "«the main model's own, in place of a wrong guess»" in seen


def shown(run, console):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MAIN)
    sd.print_text(console, tokenizer, run)
    return console.file.getvalue()


def test_show_text_says_where_each_token_comes_from():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MAIN)
    ids = tokenizer("Sort the list in place.", add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode(ids[: n + 1])[len(tokenizer.decode(ids[:n])) :] for n in range(len(ids))]
    assert len(pieces) >= 6
    rounds = [(2, 1), (2, 2), (0, 0)]  # first; guess, correction; guess, guess, bonus; without a draft; …
    decoded = sd.Decoded(ids[:7], rounds=[*rounds, (1, 1)])
    marked = [pieces[0], pieces[1], f"«{pieces[2]}»", pieces[3], pieces[4], f"‹{pieces[5]}›", *pieces[6:7]]
    plainly = Console(file=io.StringIO(), width=100)
    assert shown(decoded, plainly).startswith("".join(marked))
    coloured = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard", no_color=False)
    assert f"\x1b[32m{pieces[1]}\x1b[0m\x1b[1;31m{pieces[2]}\x1b[0m" in shown(decoded, coloured)


def test_show_text_with_characters_of_several_tokens_and_hostile_ones():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MAIN)
    text = "é日\x1b[2J\u202e\x07[red]x[/red]\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)  # in bytes
    printed = shown(sd.Decoded(ids, rounds=[(len(ids) - 1, len(ids) - 1)]), Console(file=io.StringIO(), width=100))
    assert printed.startswith("é日�[2J��[red]x[/red]\n") and "\x1b" not in printed


def test_the_picture_shows_the_report(tmp_path, capsys):
    path = write(tmp_path / "p.txt", "What <does> & list.sort [bold]do[/bold]?\x1b[2J")
    out = tmp_path / "report.svg"
    assert run(*QUICK, "--prompts", path, "--draft-tokens", "1,2", "--svg", out) == 0
    svg = xml.etree.ElementTree.parse(out)  # whole, and well-formed
    text = "".join(svg.getroot().itertext()).replace("\xa0", " ")
    assert "What <does> & list.sort [bold]do[/bold]?�[2J" in text
    assert "Times as fast as the baseline" in text and "measured" in text and "predicted" in text and "█" in text
    assert "cannot write" in refused(capsys, *QUICK, "--limit", 1, "--svg", tmp_path / "no" / "folder.svg")


# More than one process


def launched(*arguments, **options):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = list(map(str, [*launcher, PROGRAM, *arguments]))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


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
    assert re.search(r"^ +mean ", printed, re.MULTILINE)  # what was measured is reported
    assert len(texts_of(out)) >= 2


def test_bfloat16_outputs_are_the_same_or_tied(capsys):
    """The type that the default pair runs in: on the bundled pair, whatever parts, parts at a tie."""
    assert run("--demo", "--dtype", "bfloat16", "--draft-tokens", 4, "--warmup", 0, "--max-new-tokens", 64) == 0
    printed = capsys.readouterr().out
    assert "bfloat16" in printed and "NOT the main model's own" not in printed


def test_the_noise_draft_of_a_model_is_loaded_like_any_other(tmp_path):
    """A round trip through a folder: what is saved is what is run."""
    model = make_model("llama")
    like(model, 0.05).save_pretrained(tmp_path / "draft")
    config = sd.load_config(str(tmp_path / "draft"))
    loaded = sd.load_model(str(tmp_path / "draft"), config, torch.float32)
    assert speculate(model, loaded, [5, 9], 3).rounds == speculate(model, like(model, 0.05), [5, 9], 3).rounds

"""The program as people run it: what it prints, what it writes, how it ends, and every way it can refuse."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, ids_of, make_model
from rich.console import Console
from test_lossless import planted

import speculative_decoding as sd

MAIN, DRAFT = ROOT / "tests/tiny_gemma2/main", ROOT / "tests/tiny_gemma2/draft"
PAIR = ["--main", str(MAIN), "--draft", str(DRAFT)]
QUICK = ["--max-new-tokens", "8", "--warmup", "0"]


def run(*arguments):
    return sd.main([str(argument) for argument in arguments])


@pytest.fixture
def one_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n\nWhat does heapq.merge do?\n")
    return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The plain command, as a process of its own, in another folder: on a machine with no accelerator, the demo."""
    folder = tmp_path_factory.mktemp("demo")
    command = [
        sys.executable,
        ROOT / "speculative_decoding.py",
        "--device",
        "cpu",
        "--draft-tokens",
        "3",
        "--json",
        "out.json",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    return done, json.loads((folder / "out.json").read_text())


def test_the_plain_command_shows_five_prompts_and_a_result(demo):
    done, _ = demo
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "No GPU in use: this is the bundled pair of tiny models. Its speed says nothing about Gemma's."
    rows = [line for line in lines if re.match(r" +[1-5] \S", line)]
    assert len(rows) == 5 and all(row.endswith(" yes") for row in rows)
    assert any(re.match(r" +mean .* 5/5$", line) for line in lines)
    assert "All 5 outputs are the main model's own, token for token." in lines
    assert max(map(len, lines)) <= 120
    assert "\x1b" not in done.stdout + done.stderr  # piped: no colours, no cursor movements
    assert "prompt 1 of 5" not in done.stderr  # nor a progress bar


def test_the_bundled_pair_is_what_it_should_be(demo):
    _, report = demo
    assert report["settings"]["demo"] is True
    (measured,) = report["runs"]
    assert 0.55 <= measured["summary"]["speculative"]["acceptance_rate"] <= 0.90
    tokenizer = transformers.AutoTokenizer.from_pretrained(MAIN)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<eos>", "<bos>", "<unk>"]
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    model = sd.load_model(str(MAIN), sd.load_config(str(MAIN)), torch.float32)
    assert sorted(ends) == sorted(sd.end_tokens(model))
    for prompt in measured["prompts"]:
        assert 60 <= prompt["speculative"]["new_tokens"] <= 128
        assert prompt["speculative"]["token_ids"][-1] == ends[1]
    sizes = [file.stat().st_size for folder in (MAIN, DRAFT) for file in folder.glob("*.safetensors")]
    assert len(sizes) == 2 and sum(sizes) < 16_000_000


BOTH = {"new_tokens", "latency_s", "tokens_per_s"}
RATES = {"rounds", "drafted", "accepted", "acceptance_rate", "alpha", "tokens_per_round"}
RATES |= {"log_likelihood", "log_likelihood_per_token", "draft_s", "verify_s", "other_s"}
OUTPUT = BOTH | {"first_token_s", "text", "token_ids"}


def test_the_json_holds_what_the_design_promises(demo):
    _, report = demo
    environment = {"device", "device_name", "dtype", "threads", "python", "torch", "transformers"}
    assert set(report) >= {"environment", "settings", "runs"} and set(report["environment"]) >= environment
    options = "main draft demo prompts max_new_tokens draft_tokens device dtype repeats warmup ignore_eos json"
    assert set(report["settings"]) >= {*options.split(), "no_chat_template"}
    (measured,) = report["runs"]
    assert measured["draft_tokens"] == 3 and len(measured["prompts"]) == 5 and report["compared"] == []
    for prompt in measured["prompts"]:
        keys = {"prompt", "prompt_tokens", "baseline", "speculative", "speedup_percent", "identical", "divergence"}
        assert set(prompt) >= keys
        assert set(prompt["baseline"]) >= OUTPUT and set(prompt["speculative"]) >= OUTPUT | RATES
        assert prompt["identical"] is True and prompt["divergence"] is None
    summary = measured["summary"]
    promises = {"speedup_percent", "predicted_speedup_percent", "ideal_speedup_percent"}
    assert set(summary) >= {"baseline", "speculative", "identical", "ties", "mismatches"} | promises
    assert set(summary["baseline"]) >= BOTH and set(summary["speculative"]) >= BOTH | RATES


def test_the_summary_follows_from_the_prompts(demo):
    _, report = demo
    prompts, summary = report["runs"][0]["prompts"], report["runs"][0]["summary"]
    for method in ("baseline", "speculative"):
        tokens = sum(prompt[method]["new_tokens"] for prompt in prompts)
        seconds = sum(prompt[method]["latency_s"] for prompt in prompts)
        assert summary[method]["new_tokens"] == tokens
        assert summary[method]["latency_s"] == pytest.approx(seconds / 5)
        assert summary[method]["tokens_per_s"] == pytest.approx(tokens / seconds)
    faster = summary["speculative"]["tokens_per_s"] / summary["baseline"]["tokens_per_s"]
    assert summary["speedup_percent"] == pytest.approx(100 * (faster - 1))
    counts = summary["speculative"]
    for key in ("rounds", "drafted", "accepted", "log_likelihood", "draft_s", "verify_s", "other_s"):
        assert counts[key] == pytest.approx(sum(prompt["speculative"][key] for prompt in prompts))
    assert counts["drafted"] == 3 * counts["rounds"]
    assert (summary["identical"], summary["ties"], summary["mismatches"]) == (5, 0, 0)


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


def test_the_chat_template_is_the_models_own():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MAIN)
    ids = sd.encode(tokenizer, "Hello!", chat=True)
    assert tokenizer.decode(ids) == "<bos><start_of_turn>user\nHello!<end_of_turn>\n<start_of_turn>model\n"


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
    wrong = {report["number"]: report["divergence"]["gap"] for report in measured["prompts"] if report["divergence"]}
    assert f"The largest: prompt {max(wrong, key=wrong.get)}, K = 3" in printed


def measured(divergence=None):
    return sd.Measured([sd.Decoded([1, 2, 3], 1.0, 0.5, [(3, 1)], -1.0, 0.1, 0.2, 0.3)], divergence)


def test_a_tie_is_shown_with_its_figures():
    results = [measured(), measured(sd.Divergence(16, 4, 5, 0.125, 0.25, "tie"))]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MAIN)
    prompts = [sd.Prompt("p", number, ids=ids_of([1, 2, 3, 4])) for number in (1, 2)]
    reports = [
        sd.report_prompt(prompt, {"baseline": measured(), "K": result}, "K", "speculative", False, tokenizer)
        for prompt, result in zip(prompts, results, strict=True)
    ]
    summary = sd.summarise([{"baseline": measured(), "K": result} for result in results], "K", "speculative")
    words = sd.in_words([{"draft_tokens": 3, "prompts": reports, "summary": summary}], [])
    assert words[-2] == "1 of 2 outputs are the main model's own, token for token."
    assert words[-1].startswith("Ties, the main model's own within its rounding: 1.")
    assert words[-1].endswith("prompt 2, K = 3, new token 17, gap 0.125, rounding noise 0.25.")


# What must be refused: status 2, one line that says what and how, no traceback.


def saved(folder, config, tokenizer=True):
    """A folder with a small random model, and the bundled tokenizer."""
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(MAIN / name, folder / name)
    return folder


def copied(folder, change):
    """A copy of the bundled draft with something done to it."""
    shutil.copytree(DRAFT, folder)
    change(folder)
    return folder


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def drop_a_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def to_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save(make_model("gemma2").state_dict(), folder / "pytorch_model.bin")


def swap_two_tokens(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(token for token in vocabulary if token.isalpha() and len(token) > 5)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def demand_remote_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")


BROKEN_DRAFTS = {
    "truncated weights": (truncate, "cannot load"),
    "a weight is missing": (drop_a_weight, "lacks 1 of its weights"),
    "pickled weights": (to_pickle, "safetensors"),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot load"),
    "another tokenizer": (swap_two_tokens, "different tokenizers"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "remote code": (demand_remote_code, "cannot load"),
}


def refused(capsys, *arguments):
    """Run, see it refused, return the one line that it says."""
    status = run(*arguments)
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if not line.startswith("Loading ")]
    assert status == 2 and len(errors) == 1 and errors[0].startswith("error: "), said
    return errors[0]


@pytest.mark.parametrize("case", BROKEN_DRAFTS)
def test_broken_models_are_refused(case, tmp_path, capsys, one_prompt):
    change, expected = BROKEN_DRAFTS[case]
    folder = copied(tmp_path / "draft", change)
    message = refused(capsys, "--main", MAIN, "--draft", folder, "--prompts", one_prompt)
    assert expected in message and str(folder) in message


def test_models_that_cannot_roll_back_are_refused(tmp_path, capsys, one_prompt):
    small = {"vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 2}
    mamba = saved(tmp_path / "mamba", transformers.MambaConfig(**small, state_size=4))
    message = refused(capsys, "--main", mamba, "--draft", DRAFT, "--prompts", one_prompt)
    assert "mamba" in message and "cannot be rolled back" in message
    t5 = saved(tmp_path / "t5", transformers.T5Config(vocab_size=2048, d_model=32, d_kv=8, d_ff=32, num_layers=1))
    assert "encoder-decoder" in refused(capsys, "--main", t5, "--draft", DRAFT, "--prompts", one_prompt)


def test_models_that_are_not_there_are_refused(capsys, one_prompt):
    message = refused(capsys, "--main", "nobody/nothing", "--prompts", one_prompt)
    assert "nobody/nothing" in message and "--demo" in message
    assert "no folder" in refused(capsys, "--main", "./no/such/folder", "--draft", DRAFT, "--prompts", one_prompt)


def test_bad_prompt_files_are_refused(tmp_path, capsys):
    path = tmp_path / "p.txt"
    assert "cannot read" in refused(capsys, "--demo", "--prompts", path)
    assert "cannot read" in refused(capsys, "--demo", "--prompts", tmp_path)
    path.write_text("# only a comment\n\n")
    assert "no prompts" in refused(capsys, "--demo", "--prompts", path)
    path.write_bytes(b"caf\xe9\n")
    assert "UTF-8" in refused(capsys, "--demo", "--prompts", path)
    assert "line 1" in refused(capsys, "--demo", "--prompts", path)
    path.write_text("What is a list? " * 400 + "\n")
    message = refused(capsys, "--demo", "--prompts", path)
    assert "1 of 1 prompts" in message and "context of 1024" in message


def test_the_context_is_used_to_its_end(tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_text("word " * 300)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MAIN)
    tokens = len(sd.encode(tokenizer, path.read_text().strip(), chat=True))
    fits = 1024 - tokens - 3 + 1
    common = [*PAIR, "--prompts", path, "--warmup", 0, "--draft-tokens", 3, "--ignore-eos", "--max-new-tokens"]
    assert "exceed" in refused(capsys, *common, fits + 1)
    sd.settle(options := sd.parse_options([str(o) for o in [*common, fits]]), torch.device("cpu"))
    prompts = [sd.Prompt(path.read_text().strip(), 1), sd.Prompt("word " * 301, 2)]
    fitting, left_out = sd.encode_all(options, prompts, tokenizer, 1024, torch.device("cpu"))
    assert [prompt.number for prompt in fitting] == [1] and left_out.startswith("1 of 2 prompts")


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
        ["--max-new-tokens", "-1"],
        ["--repeats", "0"],
        ["--warmup", "-1"],
        ["--dtype", "int8"],
        ["--nonsense"],
        ["--demo", "--main", "x"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-p", "0"],
        ["--top-p", "1.1"],
        ["--limit", "0"],
        ["--top-k", "5"],
        ["--temperature", "1e-38"],
        ["--device-map", "auto", "--compile", "on"],
        ["--max-memory", "1GB"],
        ["--device-map", "auto", "--max-memory", "plenty"],
        ["stray"],
    ],
)
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) == 1 and said[0].startswith("error: ")


# Text from outside is data.

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


def test_plain():
    assert sd.plain("a\tb\r\nc\x1b[31m\u202e\ue000") == "a b c�[31m��"
    assert sd.plain("é 日本 שלום 🙂") == "é 日本 שלום 🙂"
    assert sd.safe("a\n  b\u2028c\r\x07") == "a\n  b�c��"


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
    assert {value: sd.figure(value) for value in values} == values
    assert sd.figure(None) == sd.percent(None) == "–"
    assert (sd.percent(12.4, "+"), sd.percent(-12.6, "+"), sd.percent(71.9)) == ("+12 %", "-13 %", "72 %")
    assert math.isclose(sd.ratio(1, 4), 0.25)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_the_terminal(width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    slow = {"new_tokens": 99999, "latency_s": 12345.6, "tokens_per_s": 8.1}
    rates = {"acceptance_rate": 1.0, "log_likelihood_per_token": -12.345}
    report = {"baseline": slow, "speculative": slow | rates, "speedup_percent": 1234.5, "identical": True}
    report["error"] = None
    sd.print_headings(console)
    sd.print_reports(console, "123", "A prompt of some length that must be cut", {"K = 3": report})
    *_, headings, row = console.file.getvalue().splitlines()
    assert len(row) <= width and len(headings) <= width
    assert row.endswith(" 99999  12346   8.10  12346   8.10 +1234 %  100 %  -12.3     yes")


def test_control_c_reports_what_is_done(tmp_path):
    out = tmp_path / "out.json"
    options = ["--demo", "--draft-tokens", "3", "--warmup", "0", "--json", out]
    command = [sys.executable, ROOT / "speculative_decoding.py", *options]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        printed = ""
        while not re.search(r"^ +1 ", printed, re.MULTILINE):
            printed += process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and "Interrupted after 1 of 5 prompts" in errors
    assert re.search(r"^ +mean ", rest, re.MULTILINE) and "times as fast" in rest
    assert len(json.loads(out.read_text())["runs"][0]["prompts"]) == 1


def test_pairs_that_the_library_refuses_are_compared_with_generate_alone(tmp_path, capsys, one_prompt):
    """The same tokenizer, but vocabularies that are padded differently: ours runs, assisted generation would not."""
    draft = transformers.AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32)
    draft.resize_token_embeddings(2112)
    draft.save_pretrained(tmp_path / "padded")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DRAFT / name, tmp_path / "padded" / name)
    out = tmp_path / "out.json"
    pair = ["--main", MAIN, "--draft", tmp_path / "padded", "--prompts", one_prompt, "--draft-tokens", 3]
    assert run(*pair, "--compare", "transformers", "--max-new-tokens", 12, "--json", out) == 0
    assert "refuses this pair" in (said := capsys.readouterr().err) and "2,048 and 2,112" in said
    report = json.loads(out.read_text())
    assert [other["method"] for other in report["compared"]] == ["transformers' generate()"]
    assert report["runs"][0]["summary"]["identical"] == 1


def test_a_chat_template_that_fails_is_one_line(tmp_path, capsys, one_prompt):
    for name, folder in (("main", MAIN), ("draft", DRAFT)):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    pair = ["--main", tmp_path / "main", "--draft", tmp_path / "draft", "--prompts", one_prompt]
    assert "cannot put prompt 1 into the chat template: no such role; --no-chat" in refused(capsys, *pair)

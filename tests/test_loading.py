"""Prompts, the hub, memory, configurations, tokenizers and encodings: what is read before anything is decoded."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import types

import compressed_tensors
import pytest
import torch
import transformers
from conftest import (
    ROOT,
    baseline,
    counts_of,
    generation_of,
    ids_of,
    like,
    make_model,
    prompt_of,
    speculate,
    with_more_tokens,
)
from safetensors.torch import load_file, save_file
from test_command_line import DRAFT, MAIN, PAIR, QUICK, refused, run, write

import speculative_decoding as sd

BUNDLED = ROOT / "tests/tiny_gemma2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def tokenizer_of(folder=MAIN):
    return transformers.AutoTokenizer.from_pretrained(folder)


def model_of(folder):
    config = sd.read_model_files(str(folder), torch.float32).config
    return sd.load_model(str(folder), config, torch.float32)


def saved(folder, config, tokenizer=True):
    """A folder with a small random model, and the bundled tokenizer."""
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    if tokenizer:
        for name in TOKENIZER_FILES:
            shutil.copy(MAIN / name, folder / name)
    return folder


# The bundled pair


def test_the_bundled_pair_is_what_it_should_be(demo):
    _, report = demo
    assert report["settings"]["demo"] is True
    measured, _ = report["runs"]
    assert 0.55 <= measured["summary"]["speculative"]["acceptance_rate"] <= 0.90
    tokenizer = tokenizer_of()
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<eos>", "<bos>", "<unk>"]
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert sorted(ends) == sorted(sd.end_tokens(model_of(MAIN), tokenizer))
    for prompt in measured["prompts"]:
        assert 60 <= prompt["speculative"]["new_tokens"] <= 128
        assert prompt["speculative"]["token_ids"][-1] == ends[1]
    sizes = [file.stat().st_size for folder in (MAIN, DRAFT) for file in folder.glob("*.safetensors")]
    assert len(sizes) == 2 and sum(sizes) < 16_000_000


# Prompt sets

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
        *QUESTIONS[0]["turns"],
        QUESTIONS[1]["turns"][0],
        QUESTIONS[2]["prompt"],
        QUESTIONS[3]["prompt"],
    ]
    assert [prompt["question_id"] for prompt in prompts] == [81, 81, 82, "x", None]
    assert [(prompt["number"], prompt["turn"]) for prompt in prompts] == [
        (1, 1),
        (1, 2),
        (2, None),
        (3, None),
        (4, None),
    ]
    assert re.findall(r"^ *(\S+) (?:What|And) ", printed, re.MULTILINE) == ["81.1", "81.2", "82", "x", "4"]
    assert [prompt["category"] for prompt in prompts] == ["writing", "writing", "writing", "coding", "writing"]
    assert set(categories) == {"writing", "coding"} and categories["writing"]["identical"] == 4
    tokens = [prompt["speculative"]["new_tokens"] for prompt in prompts]
    assert categories["coding"]["speculative"]["new_tokens"] == tokens[3]
    assert categories["writing"]["speculative"]["new_tokens"] == sum(tokens) - tokens[3]
    for name in ("writing", "coding", "all prompts"):
        assert re.search(rf"^  {name} +[\d.]+ +[+-]\d+ %", printed, re.MULTILINE)


@pytest.mark.parametrize(("limit", "chosen"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (9, [1, 2, 3, 4])])
def test_a_limit_is_spread_over_the_categories(tmp_path, limit, chosen):
    path = write(tmp_path / "q.jsonl", *QUESTIONS)
    assert [prompt.number for prompt in sd.read_prompts(str(path), limit)] == chosen


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{not json", ": this is not JSON"),
        ("[" * 100_000, ": this is not JSON"),
        ('["a list"]', ", prompt: no text"),
        ({"category": "x"}, ", prompt: no text"),
        ({"turns": []}, ", turns: no text"),
        ({"turns": {"a": "b"}, "problem": "p"}, ", turns: no text"),
        ({"turns": ["a", 7]}, ", turns[1]: no text"),
        ({"turns": ["a", " "]}, ", turns[1]: no text"),
        ({"prompt": 7}, ", prompt: no text"),
        ({"prompt": " "}, ", prompt: no text"),
        ('{"prompt": "\\ud800"}', ", prompt: half of a surrogate pair"),
        ('{"turns": ["a", "b", "\\ud800"]}', ", turns[2]: half of a surrogate pair"),
        ({"instruction": "a", "input": ["b"]}, ", input: no text"),
        ({"instruction": ["a"], "input": "b"}, ", instruction: no text"),
        ({"messages": []}, ", messages: no text"),
        ({"messages": ["a"]}, ", messages[0].role: not user"),
        ({"messages": [{"content": "a"}]}, ", messages[0].role: not user"),
        ({"messages": [{"role": "user"}]}, ", messages[0].content: no text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, ", messages[0].content: no text"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, ", messages[1].role: not user"),
        ({"messages": [{"role": ["user"]}, {"role": "user"}]}, ", messages[0].role: not system or user or assistant"),
    ],
)
def test_a_bad_line_is_named(tmp_path, capsys, line, expected):
    path = write(tmp_path / "q.jsonl", QUESTIONS[0], "", line)
    message = refused(capsys, "--demo", "--prompts", path)
    assert f"{path}, line 3{expected}" in message


TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("line", "text", "earlier", "later"),
    [
        ({"turns": ["t"], "prompt": "p", "question": "q"}, "p", [], []),
        ({"prompt": None, "question": "q", "turns": ["t", "u", "v"]}, "t", [], ["u", "v"]),
        ({"turns": ["t"]}, "t", [], []),
        ({"turns": "t"}, "t", [], []),
        ({"problem": "r", "question": "q", "messages": TALK}, "q", [], []),
        ({"instruction": "i", "problem": "r", "input": "n"}, "r", [], []),
        ({"instruction": "i", "input": ""}, "i", [], []),
        ({"messages": TALK, "input": "n", "instruction": "i"}, "i\n\nn", [], []),
        ({"messages": [*TALK, {"role": "user", "name": "x", "content": "v"}]}, "v", TALK, []),
    ],
)
def test_the_text_of_a_line_is_its_first_key(line, text, earlier, later):
    prompt = sd.parse_prompt(json.dumps(line), "q.jsonl, line 1", 1)
    assert (prompt.text, list(prompt.earlier), list(prompt.later)) == (text, earlier, later)
    assert prompt.turn == (1 if later else None)


def test_bad_prompt_files_are_refused(tmp_path, capsys):
    path = tmp_path / "p.txt"
    assert "cannot read" in refused(capsys, "--demo", "--prompts", path)
    assert "cannot read" in refused(capsys, "--demo", "--prompts", tmp_path)
    path.write_text("# only a comment\n\n")
    assert "no prompts" in refused(capsys, "--demo", "--prompts", path)
    path.write_bytes(b"caf\xe9\n")
    assert "UTF-8" in refused(capsys, "--demo", "--prompts", path)
    assert "line 1" in refused(capsys, "--demo", "--prompts", path)
    path.write_bytes(b"\xef\xbb\xbffirst\nsecond\ncaf\xe9\n")
    assert "line 3" in refused(capsys, "--demo", "--prompts", path)
    path.write_text("What is a list? " * 400 + "\n")
    message = refused(capsys, "--demo", "--prompts", path)
    assert f"exceed the context of 1024: shorten all prompts of {path}, or lower" in message


def test_the_context_is_used_to_its_end(tmp_path, capsys):
    """To the last token: also by a run that generates, and drafts, until there."""
    path, tokenizer = tmp_path / "p.txt", tokenizer_of()
    path.write_text("word " * 300)
    tokens = len(sd.encode(tokenizer, path.read_text().strip(), chat=True))
    fits = 1024 - tokens - 3 + 1
    common = [*PAIR, "--prompts", path, "--warmup", 0, "--draft-tokens", 3, "--ignore-eos", "--max-new-tokens"]
    assert "exceed" in refused(capsys, *common, fits + 1)
    given = sd.parse([str(option) for option in [*common, fits]])
    settings, _ = sd.resolve_defaults(given, torch.device("cpu"))
    prompts = [sd.Question(path.read_text().strip(), 1), sd.Question("word " * 301, 2)]
    (fitting,) = sd.encode_prompts(prompts, tokenizer, settings, 1024, 2048)
    assert fitting.number == 1 and len(fitting.ids) == tokens and fitting.max_new_tokens == fits

    shortest = next(n for n in range(300, 1000) if len(sd.encode(tokenizer, "word " * n, chat=True)) > 990)
    path.write_text("word " * shortest + "\n" + "word " * 999 + "\n")
    fits = 1024 - len(sd.encode(tokenizer, ("word " * shortest).strip(), chat=True)) - 3 + 1
    assert 2 <= fits < 40
    out = tmp_path / "out.json"
    assert run(*common, fits, "--json", out) == 0
    assert "warning: 1 of 2 prompts exceed the context of 1024: left out" in capsys.readouterr().err
    (prompt,) = json.loads(out.read_text())["runs"][0]["prompts"]
    assert prompt["number"] == 1 and prompt["speculative"]["new_tokens"] == fits and prompt["identical"] is True


# Configurations and memory, before any weights are loaded


def gemma_files(folder):
    """Folders with the configurations of gemma-2-9b and gemma-2-2b, read in bfloat16."""
    gemma = {"vocab_size": 256000, "head_dim": 256}
    nine = {"hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}
    two = {"hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}
    files = {}
    for role, shape, width in (("main", nine, 14336), ("draft", two, 9216)):
        transformers.Gemma2Config(**gemma, **shape, intermediate_size=width).save_pretrained(folder / role)
        files[role] = sd.read_model_files(str(folder / role), torch.bfloat16)
    return files


def test_weights_and_memory_are_counted_from_the_configuration_alone(tmp_path):
    files = gemma_files(tmp_path)
    for role, weights_gb, heads in (("main", 18.48, 42 * 8), ("draft", 5.23, 26 * 4)):
        assert files[role].parameters * 2 / 1e9 == pytest.approx(weights_gb, abs=0.01)
        peak, stored = sd.prefill_memory(files[role].model, 4096)
        assert stored == pytest.approx(
            4096 * 2 * heads * 256 * 2, abs=1000
        )  # keys and values, of 256 numbers of 2 bytes
    # The main model's attention has scores of 16 heads, [4096, 4096], and their softmax in float32.
    scores = 16 * 4096**2
    assert stored + (2 + 4) * scores < sd.prefill_memory(files["main"].model, 4096)[0] < 4.0e9


def test_memory_at_its_peak():
    with sd.PeakMemory(weights := torch.nn.Linear(10, 10)) as memory:
        first = torch.zeros(1000)
        first.view(10, 100)[0].add_(1)  # the same memory
        second = first + 1
        del first
        third = torch.zeros(500)
        weights.weight.t()
    assert memory.peak == 4 * 2000 and len(memory.storages) == 2  # the first was gone before the third came
    del second, third
    assert len(memory.storages) == 0


@pytest.mark.parametrize("folder", [MAIN, DRAFT], ids=["main", "draft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_takes_what_was_counted(folder, dtype):
    """The weights, the cache of 200 tokens, and the peak of reading them, to the byte."""
    of = sd.read_model_files(str(folder), dtype)
    model = sd.load_model(str(folder), of.config, dtype)
    assert of.parameters == model.num_parameters() and of.name == str(folder)
    cached = sd.CachedModel(model)
    with sd.PeakMemory(model) as memory:
        cached.prefill(ids_of(range(200)))
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cached.cache.layers)
    peak, left = sd.prefill_memory(of.model, 200)
    assert peak == memory.peak > 1.2 * stored and stored <= left < stored + 100


@pytest.mark.parametrize("shared", [0, 2], ids=["own caches", "shared caches"])
def test_layers_of_different_kinds_are_counted_and_decoded(tmp_path, capsys, one_prompt, shared):
    """Gemma 4: heads of two sizes, and layers that read the cache of another layer instead of one of their own."""
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16}
    sizes = {"vocab_size": 2048, "vocab_size_per_layer_input": 2048, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"hidden_size_per_layer_input": 8, "max_position_embeddings": 256, "num_kv_shared_layers": shared}
    config = transformers.Gemma4TextConfig(**layers, **heads, **sizes, pad_token_id=0)
    torch.manual_seed(0)
    folder = tmp_path / "main"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(MAIN / name, folder / name)
    of = sd.read_model_files(str(folder), torch.float32)
    assert type(of.config) is transformers.Gemma4TextConfig
    model = sd.load_model(str(folder), of.config, torch.float32)
    assert of.parameters == model.num_parameters()
    cached = sd.CachedModel(model)
    cached.prefill(ids_of(range(1, 8)))
    stored = [layer for layer in cached.cache.layers if getattr(layer, "keys", None) is not None]
    assert len(stored) == 4 - shared
    counted = sum(layer.keys.nbytes + layer.values.nbytes for layer in stored)
    assert counted <= sd.prefill_memory(of.model, 7)[1] < counted + 100
    options = ["--prompts", one_prompt, "--draft-tokens", 3, "--max-new-tokens", 12, "--warmup", 0]
    assert run("--main", folder, "--draft", DRAFT, *options) == 0
    assert "The output is the main model's own, token for token." in capsys.readouterr().out


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
    parts = rf"main {tmp_path}/giant \d+\.\d \+ \d+\.\d, draft {DRAFT} 0\.0 \+ 0\.0"
    assert re.search(rf"\(weights \+ KV cache: {parts}; working memory for a prompt of \d+ tokens: \d+\.\d\)", message)
    assert "try a smaller pair" in message and "--device-map" not in message  # nothing else would help on a CPU


def test_pairs_that_fit_are_named(tmp_path, capsys, monkeypatch):
    gemma, qwen = "google/gemma-2-9b-it --draft google/gemma-2-2b-it", "Qwen/Qwen2.5-7B-Instruct"
    for free, dtype, refused_pair, gated, named, absent in [
        (30, torch.bfloat16, [], True, [f"--main {gemma} (23.7 GB) or --main {qwen} --draft"], "27b"),
        (30, torch.bfloat16, [sd.DEFAULT_MAIN, sd.DEFAULT_DRAFT], True, [qwen], "gemma"),  # not what was refused
        (30, torch.bfloat16, [], False, [qwen], "gemma"),
        (24, torch.bfloat16, [], True, [f"{qwen} --draft Qwen/Qwen2.5-0.5B-Instruct (16.2 GB)"], " or "),
        (24, torch.float32, [], True, ["SmolLM2-1.7B-Instruct", "(7.4 GB)"], " or "),
        (4, torch.bfloat16, [], True, [], "-"),
    ]:
        monkeypatch.setattr(sd, "free_memory", lambda device, free=free: free * 10**9)
        said = sd.pairs_that_fit(torch.device("cpu"), dtype, refused_pair, gated)
        assert all(part in said for part in named) and absent not in said
    monkeypatch.setattr(sd, "free_memory", lambda device: 24 * 10**9)
    message = refused(capsys, "--main", giant(tmp_path / "giant"), "--draft", DRAFT, "--dtype", "bfloat16")
    assert f"cpu has 24.0 GB free: try a smaller pair: --main {qwen} --draft" in message


# Quantised checkpoints


def quantised(folder, stated):
    """The bundled main model as if it were quantised: by its config.json only."""
    shutil.copytree(MAIN, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    return folder


PACKED = (MAIN / "model.safetensors").stat().st_size


def test_a_quantised_checkpoint_takes_what_its_files_take(tmp_path, monkeypatch):
    folder, dense = quantised(tmp_path / "main", {"quant_method": "bitnet"}), 4 * model_of(MAIN).num_parameters()
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in another form")
    of = sd.read_model_files(str(folder), torch.float32)
    assert (of.weight_bytes, of.quantization) == (PACKED, "bitnet") and of.parameters * 4 == dense
    assert (sd.read_model_files(str(MAIN), torch.float32).weight_bytes) == dense
    # On a CPU, the library decompresses these.
    folder = quantised(tmp_path / "fp8", {"quant_method": "fp8", "weight_block_size": [8, 8]})
    of = sd.read_model_files(str(folder), torch.float32)
    assert (of.weight_bytes, of.quantization) == (dense, "fp8, decompressed to run")
    # As the hub states it, while the weights are not here yet.
    files = {"model-1.safetensors": 5, "model-2.safetensors": 6, "config.json": 7, "other/model.safetensors": 8}
    siblings = [{"rfilename": name, "size": size} for name, size in files.items()]
    monkeypatch.setattr(sd, "ask_hub", lambda name: sd.huggingface_hub.ModelInfo(id=name, siblings=siblings))
    monkeypatch.setattr(sd, "fetch", lambda name: str(tmp_path / "main"))
    assert sd.read_model_files("someone/quantised", torch.float32).weight_bytes == 11


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "`pip install optimum`"),
        ({"load_in_4bit": True}, "`pip install -U bitsandbytes"),
        ({"quant_method": "no such format"}, "Unknown quantization type"),
        ({"quant_method": ["awq"]}, "which is quantised"),
        ("4 bit", "cannot load"),
    ],
)
def test_a_quantised_model_that_cannot_run_here_is_one_line(tmp_path, capsys, one_prompt, stated, said):
    folder = quantised(tmp_path / "main", stated)
    message = refused(capsys, "--main", folder, "--draft", DRAFT, "--prompts", one_prompt)
    assert str(folder) in message and said in message


def test_a_package_that_is_missing_is_named():
    with pytest.raises(
        sd.UsageError, match="cannot do it: No module named 'no_such_package'; `pip install no_such_pac"
    ):
        with sd.cli_errors("do it", "some other hint"):
            import no_such_package.part  # noqa: F401


def quantise_by_compressed_tensors(folder):
    """Write the bundled main model to a folder, its linear layers in 4 bits."""
    library = compressed_tensors
    weights = library.quantization.QuantizationArgs(num_bits=4, strategy="group", group_size=64)
    scheme = library.quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    how = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"], "format": "pack-quantized"}
    model = transformers.AutoModelForCausalLM.from_pretrained(MAIN, dtype=torch.bfloat16)
    library.quantization.apply_quantization_config(model, library.quantization.QuantizationConfig(**how))
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            blocks = layer.weight.data.unflatten(1, (-1, 64))
            layer.weight_scale.data = blocks.abs().amax(dim=-1) / 7
    compressor = library.compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder, state_dict=model.state_dict())
    compressor.update_config(folder)


def test_a_quantised_main_model_runs_with_an_unquantised_draft(tmp_path, capsys, one_prompt):
    folder = tmp_path / "main"
    quantise_by_compressed_tensors(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(MAIN / name, folder / name)
    options = ["--prompts", one_prompt, "--draft-tokens", 3, "--max-new-tokens", 24, "--warmup", 0]
    assert run("--main", folder, "--draft", DRAFT, *options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 bit, compressed-tensors, decompressed to run" in printed
    assert "The output is the main model's own, token for token." in printed
    of = sd.read_model_files(str(folder), torch.float32)
    model, size = model_of(folder), (folder / "model.safetensors").stat().st_size
    sd.CachedModel(model).prefill(ids_of([5, 9]))
    assert size < 0.6 * PACKED
    # So much is what it takes once it runs.
    assert of.weight_bytes == pytest.approx(sum(weight.nbytes for weight in model.parameters()), rel=0.1)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_pair_is_refused_from_the_byte_on_that_it_lacks(monkeypatch, device, is_compiled):
    """Weights, both caches, and the larger peak; a compiled model's own cache is beside the one it is filled from."""
    files = {
        role: sd.read_model_files(str(folder), torch.bfloat16) for role, folder in (("main", MAIN), ("draft", DRAFT))
    }
    prompt, text = 2000, 2144
    peaks, caches = zip(*[sd.prefill_memory(of.model, prompt) for of in files.values()], strict=True)
    needed = sum(2 * of.parameters for of in files.values()) + sum(caches) * text / prompt + (device != "cpu") * 1e9
    needed += max(peaks) if is_compiled else max(peaks) - caches[0]
    for free in (needed - 1, needed + 1):
        monkeypatch.setattr(sd, "free_memory", lambda of, free=free: free)
        if free > needed:
            sd.check_memory(files, torch.device(device), prompt, text, is_compiled)
            continue
        with pytest.raises(
            sd.UsageError, match=f"need {needed / 1e9:.1f} GB in bfloat16 .* of 2,000 tokens: "
        ) as refusal:
            sd.check_memory(files, torch.device(device), prompt, text, is_compiled)
        assert ("--device-map auto" in str(refusal.value)) == (device != "cpu")


def test_memory_is_asked_of_the_device_alone(monkeypatch):
    """Of an accelerator's own; MPS and the CPU share one; `--device-map auto` may fill nine tenths of each."""
    asked, ram = [], sd.psutil.virtual_memory()

    def of_device(device):
        asked.append(device)
        return 1000 * (1 + device.index), 10**12

    monkeypatch.setattr(torch.accelerator, "get_memory_info", of_device)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(sd.psutil, "virtual_memory", lambda: ram._replace(available=500))
    assert sd.free_memory(torch.device("cuda:1")) == 2000 and asked == [torch.device("cuda:1")]
    assert sd.free_memory(torch.device("mps")) == sd.free_memory(torch.device("cpu")) == 500 and len(asked) == 1
    assert sd.memory_limits(torch.device("cuda:0")) == {0: 900, 1: 1800, "cpu": 450}
    assert sd.memory_limits(torch.device("mps")) == {"mps": 450}
    assert sd.memory_limits(torch.device("cpu")) == {"cpu": 450}


def test_the_main_model_is_spread_into_what_the_draft_has_left(monkeypatch):
    """Memory is asked for once the draft has been loaded, and a tenth of it stays free."""
    placements, load_model = [], sd.load_model

    def load(name, config, dtype, **placement):
        placements.append(placement)
        return load_model(name, config, dtype, **placement)

    monkeypatch.setattr(sd, "load_model", load)
    monkeypatch.setattr(sd, "free_memory", lambda device: 10**9 - 10**8 * len(placements))
    assert run(*QUICK, "--limit", 1, "--device-map", "auto") == 0
    draft, main = placements
    assert draft == {"device_map": torch.device("cpu")}
    assert main["device_map"] == "auto" and main["max_memory"] == {"cpu": 810_000_000}


@pytest.mark.parametrize(
    ("dtype", "has_it"), [("auto", False), ("bfloat16", False), ("auto", True), ("float32", False)]
)
def test_a_gpu_without_bfloat16_is_named_and_nothing_switched(monkeypatch, dtype, has_it):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it or including_emulation)
    given = sd.parse([*PAIR, "--dtype", dtype])
    settings, notices = sd.resolve_defaults(given, torch.device("cuda"))
    assert settings.dtype == ("bfloat16" if dtype == "auto" else dtype)
    slow = dtype != "float32" and not has_it
    assert ["emulates bfloat16" in notice and "--dtype float32" in notice for notice in notices] == [True] * slow


# Models that are broken, or of another kind: status 2, and one line that says what and how


def copied(folder, change):
    """A copy of the bundled draft with something done to it."""
    shutil.copytree(DRAFT, folder)
    change(folder)
    return folder


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def drop_a_weight(folder):
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


HEADS = {
    "LlamaForCausalLMEagle3": {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"},
    "draft_vocab_size": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "draft_vocab_size": 32},
    "Eagle3Speculator": {"architectures": ["Eagle3Speculator"], "speculators_config": {"algorithm": "eagle3"}},
    "medusa_num_heads": {"medusa_num_heads": 2, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"},
    "gemma4_assistant": {"architectures": ["?"], "model_type": "gemma4_assistant", "text_config": None},
    "DFlashDraftModel": {"architectures": ["DFlashDraftModel"], "model_type": "qwen3"},
    "DeepSeekMTPModel": {"architectures": ["DeepSeekMTPModel"], "model_type": "deepseek_mtp"},
    "mlp_speculator": {"architectures": 7, "model_type": "mlp_speculator"},
}


@pytest.mark.parametrize("head", HEADS)
def test_drafts_that_are_no_models_of_their_own_are_refused(tmp_path, capsys, one_prompt, head):
    (tmp_path / "config.json").write_text(json.dumps(HEADS[head]))
    for pair in (["--main", MAIN, "--draft", tmp_path], ["--main", tmp_path, "--draft", "ngram"]):
        message = refused(capsys, *pair, "--prompts", one_prompt)
        assert f"{tmp_path} is no model of its own but works within another ({head}): take a small model" in message
        assert message.endswith("or --draft ngram")


def test_a_model_that_brings_such_heads_is_a_whole_one(tmp_path):
    """As DeepSeek V3 and GLM 4.5 do: layers that predict further tokens, which stay out of use here."""
    folder = shutil.copytree(DRAFT, tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_mtp_layers": 1, "mtp_loss_scaling_factor": 0.1}))
    assert sd.read_model_files(str(folder), torch.float32).parameters


def test_models_that_are_not_there_are_refused(capsys, one_prompt):
    message = refused(capsys, "--main", "nobody/nothing", "--prompts", one_prompt)
    assert "nobody/nothing" in message and "--demo" in message
    assert "no folder" in refused(capsys, "--main", "./no/such/folder", "--draft", DRAFT, "--prompts", one_prompt)


# The hub


def test_the_hubs_answers_are_told_apart_in_one_line(tmp_path):
    options = ["--prompts", BUNDLED / "prompts.txt", "--limit", 1, "--max-new-tokens", 4, "--warmup", 0]
    command = [sys.executable, ROOT / "tests/hub.py", DRAFT, "--main", MAIN, *options, "--draft-tokens", 2]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=100, env=environment, check=False
    )
    results = {case: (status, said) for case, status, _, said in json.loads(done.stdout)}
    assert done.stderr == ""  # nothing of the client's own
    assert results["whole"][0] == results["late"][0] == 0  # downloaded, and then used without the hub
    for case, expected in {
        "gated": "accept its licence at https://huggingface.co/someone/gated, then `hf auth login`",
        "gated-too": "is a gated model, and you have no access: accept its licence",
        "gated-files": "is a gated model, and you have no access: accept its licence",
        "hidden": "check the spelling",
        "missing": "check the spelling",
        "forbidden": "does not let you read someone/forbidden (status 403): accept its licence",
        "broken": "answers with status 500",
        "cut": "cannot download someone/cut",
        "silent": "cannot be reached: check the connection",
        "refused": "cannot be reached: check the connection",
    }.items():
        status, said = results[case]
        errors = [line for line in said.splitlines() if not line.startswith("Loading ")]
        assert status == 2 and len(errors) == 1 and expected in errors[0], case
        ungated = "licence" in expected and sd.pairs_that_fit(torch.device("cpu"), torch.float32, [], gated=False)
        assert ("; or take a pair that needs none: --main " in errors[0]) == bool(ungated), case
    silent = next(seconds for case, _, seconds, _ in json.loads(done.stdout) if case == "silent")
    assert silent < 15  # not the client's half minute; the server itself never answers


def test_a_full_disk_is_named(tmp_path, capsys, monkeypatch):
    """The one trouble that no test can make without a disk of its own: the client's error is put in its place."""
    monkeypatch.setattr(sd, "ask_hub", lambda name: None)

    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sd.huggingface_hub, "snapshot_download", no_space)
    message = refused(capsys, "--main", "someone/large", "--draft", DRAFT)
    assert "the disk is full" in message and "HF_HOME" in message


# Tokenizers and encodings


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


def tokenizer_with(folder, special=(), ordinary=()):
    """A folder with the bundled tokenizer, and further tokens behind its 2,048."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(MAIN / name, folder / name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {token: 2048 + place for place, token in enumerate(ordinary)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tokenizer = tokenizer_of(folder)
    tokenizer.add_tokens(list(special))
    tokenizer.save_pretrained(folder)
    return str(folder)


TAILS = {  # what main and draft add; how many tokens both know alike, or what is said
    "nothing": ([], [], sys.maxsize),
    "one of main's": (["<x>"], [], 2048),
    "two of the draft's": ([], ["<x>", "<y>"], 2048),
    "one that both have, and one of main's": (["<x>", "<y>"], ["<x>"], 2049),
    "two in one place": (["<x>"], ["<y>"], "'<x>' is 2048 and nothing"),
    "two the other way round": (["<x>", "<y>"], ["<y>", "<x>"], "'<x>' is 2048 and 2049"),
}


@pytest.mark.parametrize("case", TAILS)
def test_tokenizers_may_differ_in_added_tokens_at_the_tail(tmp_path, case):
    *added, expected = TAILS[case]
    folders = [tokenizer_with(tmp_path / name, tokens) for name, tokens in zip("md", added, strict=True)]
    if isinstance(expected, int):
        assert sd.load_tokenizer(folders)[1] == expected
    else:
        with pytest.raises(sd.UsageError, match=f"different tokenizers .*{expected}"):
            sd.load_tokenizer(folders)


def test_ordinary_tokens_at_the_tail_are_another_tokenizer(tmp_path):
    folders = [tokenizer_with(tmp_path / "m", ordinary=["zebra"]), tokenizer_with(tmp_path / "d", ["<x>"])]
    for names in (folders, folders[::-1], [folders[0], str(MAIN)]):
        with pytest.raises(sd.UsageError, match="different tokenizers"):
            sd.load_tokenizer(names)


def test_a_fine_tune_with_a_token_of_its_own_runs_with_its_familys_draft(tmp_path, capsys):
    """In prompts, and where it generates it: its output row is that of a common token, twice as long."""
    folder, out = tmp_path / "main", tmp_path / "out.json"
    tokenizer, model = tokenizer_of(MAIN), transformers.AutoModelForCausalLM.from_pretrained(MAIN)
    model.resize_token_embeddings(2056, mean_resizing=False)
    head = model.get_output_embeddings().weight
    head.data[2048:] = 0
    head.data[2048] = 2 * head.data[tokenizer.convert_tokens_to_ids("▁the")]
    model.save_pretrained(folder)
    tokenizer_with(folder, ["<think>"])
    path = write(tmp_path / "p.txt", "What does <think> zip do?", "What does list.sort do?")
    options = ["--prompts", path, "--draft-tokens", 3, "--warmup", 0, "--max-new-tokens", 24, "--json", out]
    assert run("--main", folder, "--draft", DRAFT, *options) == 0
    assert "All 2 outputs are the main model's own" in capsys.readouterr().out
    prompts = json.loads(out.read_text())["runs"][0]["prompts"]
    assert 2048 in [token for prompt in prompts for token in prompt["speculative"]["token_ids"]]


def test_a_multimodal_gemma_3_runs_with_a_draft_for_text_only(tmp_path, capsys):
    """Its tokenizer has an image token more, its model some rows more, and a vision tower that stays unused."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"head_dim": 8, "intermediate_size": 48, "sliding_window": 16, "tie_word_embeddings": False}
    text = transformers.Gemma3TextConfig(vocab_size=2056, layer_types=["sliding_attention", "full_attention"], **shape)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    torch.manual_seed(0)
    main = transformers.AutoModelForCausalLM.from_config(config)
    for weight in main.model.language_model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, 0, 2 / weight.shape[-1] ** 0.5)
    torch.nn.init.normal_(main.lm_head.weight, 0, 0.3).data[2048] *= 3
    draft = transformers.Gemma3ForCausalLM(copy.deepcopy(text))
    draft.model.load_state_dict(main.model.language_model.state_dict())
    draft.lm_head.load_state_dict(main.lm_head.state_dict())
    draft.resize_token_embeddings(2048)
    main.save_pretrained(tmp_path / "main")
    like(draft, 0.02).save_pretrained(tmp_path / "draft")
    pair = ["--main", tokenizer_with(tmp_path / "main", ["<image>"]), "--draft", tokenizer_with(tmp_path / "draft")]
    out, how = tmp_path / "out.json", ["--prompts", BUNDLED / "prompts.txt", "--ignore-eos", "--max-new-tokens", 32]
    assert run(*pair, *how, "--draft-tokens", 3, "--limit", 2, "--json", out) == 0
    assert "All 2 outputs are the main model's own, token for token." in capsys.readouterr().out
    measured = json.loads(out.read_text())["runs"][0]
    tokens = {token for prompt in measured["prompts"] for token in prompt["speculative"]["token_ids"]}
    assert len(tokens) > 20 and 2048 in tokens and measured["summary"]["speculative"]["acceptance_rate"] > 0.1


def test_the_chat_template_is_the_models_own():
    tokenizer = tokenizer_of()
    ids = sd.encode(tokenizer, "Hello!", chat=True)
    assert tokenizer.decode(ids) == "<bos><start_of_turn>user\nHello!<end_of_turn>\n<start_of_turn>model\n"


def test_without_a_template_a_conversation_is_its_texts():
    """An answer goes on from what was asked, anything else begins after a blank line."""
    tokenizer = tokenizer_of()
    for earlier, expected in (([], "b"), (TALK, "s\n\nua\n\nb"), (TALK[2:], "a\n\nb"), (TALK[1:2], "u\n\nb")):
        assert tokenizer.decode(sd.encode(tokenizer, "b", False, tuple(earlier))) == expected


def turns_of(questions, *options):
    """The tokenizer, the settings, and the first turns of a question with several; what these options make of them."""
    tokenizer = tokenizer_of()
    settings, _ = sd.resolve_defaults(sd.parse(["--demo", *map(str, options)]), torch.device("cpu"))
    prompt = sd.parse_prompt(json.dumps({"turns": questions}), "q", 1)
    (prompt,) = sd.encode_prompts([prompt], tokenizer, settings, 1024, 2048)
    return tokenizer, settings, prompt


@pytest.mark.parametrize("template", [[], ["--no-chat-template"]], ids=["template", "none"])
def test_no_turn_is_longer_than_the_room_that_is_made_for_it(template):
    """After answers of full length, whose text is as many tokens again; only the first has come to its end."""
    tokenizer, settings, prompt = turns_of(["a", "What is zip?", "b", "c"], "--max-new-tokens", 20, *template)
    longest = prompt.longest
    for text, end in (("the" + " list" * 18, "<end_of_turn>"), ("the" + " list" * 19, ""), ("the" + " list" * 19, "")):
        answer = tokenizer(text + end, add_special_tokens=False)["input_ids"]
        result = sd.Result(prompt, {"baseline": sd.Outcome([generation_of(answer)])})
        prompt = sd.next_turn(tokenizer, settings, 1024, 2048, result)
        assert len(answer) == 20 == prompt.max_new_tokens and prompt.error is None
        assert prompt.earlier[-1] == {"role": "assistant", "content": text}
    assert prompt.turn == 4 and longest - 3 * 8 <= len(prompt.ids) <= longest
    assert sd.next_turn(tokenizer, settings, 1024, 2048, sd.Result(prompt, {})) is None


def adding_a_bos(folder):
    """A copy of the bundled main model, whose tokenizer begins each text with <bos>, as Gemma's own does."""
    shutil.copytree(MAIN, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    tokenizer["post_processor"]["single"].insert(0, first)
    tokenizer["post_processor"]["special_tokens"] = {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_text_that_begins_with_a_bos_has_it_once(tmp_path):
    """As the prompts of some data sets begin: whether the tokenizer would add one or not."""
    text = tokenizer_of()("Hello!")["input_ids"]
    assert 2 not in text  # the bundled one adds none
    for tokenizer, first in ((tokenizer_of(), []), (tokenizer_of(adding_a_bos(tmp_path / "main")), [2])):
        assert tokenizer("Hello!")["input_ids"] == first + text and tokenizer.bos_token_id == 2
        assert sd.encode(tokenizer, "Hello!", chat=False) == first + text
        assert sd.encode(tokenizer, "<bos>Hello!", chat=False) == [2, *text]
        assert sd.encode(tokenizer, "<bos><bos>Hello!", chat=False) == [2, 2, *text]  # what was written stays
        assert sd.encode(tokenizer, "Hello!<bos>", chat=False) == [*first, *text, 2]
        assert sd.encode(tokenizer, "Hello!", chat=True).count(2) == 1


def test_a_prompt_with_a_bos_of_its_own_runs_like_one_without(tmp_path):
    path, out = write(tmp_path / "p.txt", "<bos>What does zip do?", "What does zip do?"), tmp_path / "out.json"
    pair = ["--main", adding_a_bos(tmp_path / "main"), "--draft", DRAFT, "--prompts", path, *QUICK[1:]]
    assert run(*pair, "--no-chat-template", "--json", out) == 0
    written, added = json.loads(out.read_text())["runs"][0]["prompts"]
    assert written["prompt_tokens"] == added["prompt_tokens"]
    assert written["speculative"]["token_ids"] == added["speculative"]["token_ids"]


def test_a_text_ends_at_the_tokenizers_end_of_text_too(tmp_path):
    """Models whose generation config names no end of text, or another, still end where their tokenizer says."""
    tokenizer, model = tokenizer_of(), model_of(MAIN)
    eos, turn = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    for named, expected in (([eos, turn], {eos, turn}), (turn, {eos, turn}), ([turn], {eos, turn}), (None, {eos})):
        model.generation_config.eos_token_id = named
        assert sd.end_tokens(model, tokenizer) == expected
    tokenizer.eos_token = None
    assert sd.end_tokens(model, tokenizer) == set()
    # And where a run ends: a main model whose generation config names only <eos>, with a tokenizer whose end of text is
    # what these answers end with.
    folder = tmp_path / "main"
    shutil.copytree(MAIN, folder)
    for file in ("generation_config.json", "config.json"):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | {"eos_token_id": eos}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<end_of_turn>"}))
    out = tmp_path / "out.json"
    options = ["--prompts", BUNDLED / "prompts.txt", "--limit", 1, "--draft-tokens", 3, "--warmup", 0]
    assert run("--main", folder, "--draft", DRAFT, *options, "--json", out) == 0
    (prompt,) = json.loads(out.read_text())["runs"][0]["prompts"]
    assert prompt["speculative"]["token_ids"][-1] == turn and prompt["speculative"]["new_tokens"] < 128


def test_a_chat_template_that_fails_is_one_line(tmp_path, capsys, one_prompt):
    for name, folder in (("main", MAIN), ("draft", DRAFT)):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    pair = ["--main", tmp_path / "main", "--draft", tmp_path / "draft", "--prompts", one_prompt]
    assert "cannot put prompt 1 into the chat template: no such role; --no-chat" in refused(capsys, *pair)


SWITCH = (
    "{{ '<think>' if enable_thinking | default(true) else '' }}{{ messages[0]['content'] + 'x' * more | default(0) }}"
)


def test_arguments_for_the_chat_template_reach_it(tmp_path, capsys, one_prompt):
    for name, folder in (("main", MAIN), ("draft", DRAFT)):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(SWITCH)
    pair = ["--main", tmp_path / "main", "--draft", tmp_path / "draft", "--prompts", one_prompt, *QUICK[1:]]
    tokens = []
    for given in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        out = tmp_path / "out.json"
        assert run(*pair, "--chat-template-args", json.dumps(given), "--json", out) == 0
        report, printed = json.loads(out.read_text()), capsys.readouterr().out
        assert report["settings"]["chat_template_args"] == given
        assert (f"  chat template with {json.dumps(given)}\n" in printed) is bool(given)
        tokens.append(report["runs"][0]["prompts"][0]["prompt_tokens"])
    without = len(tokenizer_of()("What does heapq.merge do?")["input_ids"])
    assert tokens[0] == tokens[1] > tokens[2] == without
    for bad in ({"more": "x"}, {"tools": 3}, {"continue_final_message": True}):
        message = refused(capsys, *pair, "--chat-template-args", json.dumps(bad))
        assert "cannot put prompt 1 into the chat template: " in message and "check --chat-template-args" in message
    (tmp_path / "main" / "chat_template.jinja").unlink()
    message = refused(capsys, *pair, "--chat-template-args", '{"enable_thinking": false}')
    assert "chat_template is not set" in message and "check --chat-template-args" in message


SIZES = {"the main model has more": (80, 61), "the draft has more": (61, 80), "both have more": (80, 80)}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_draft_proposes_what_both_know_and_the_main_model_is_never_cut(case, temperature):
    known = make_model("gemma2")
    models = [
        with_more_tokens(model, size) for model, size in zip((known, like(known, 0.05)), SIZES[case], strict=True)
    ]
    settings = types.SimpleNamespace(temperature=temperature, top_k=0, top_p=1.0, seed=0, draft="a model")
    pair = dict(zip(("main", "draft"), models, strict=True))
    main, draft, sampler = sd.wrap_pair(settings, pair, 61, torch.device("cpu"), [])
    propose, proposed = draft.propose, []

    def watched(text, length):
        ids, q = propose(text, length)
        proposed.extend(ids[0].tolist())
        return ids, q

    draft.propose = watched
    texts = [sd.decode_speculatively(main, draft, sampler, sd.FixedLength(3), prompt_of([5, 9], n)) for n in range(4)]
    texts = [text.token_ids for text in texts]
    assert max(proposed) < 61 and (max(max(text) for text in texts) >= 61) == (SIZES[case][0] > 61)
    if not temperature:
        assert texts == [baseline(models[0], [5, 9]).token_ids] * 4


# Weights


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


def test_the_noise_draft_of_a_model_is_loaded_like_any_other(tmp_path):
    """A round trip through a folder: what is saved is what is run."""
    model = make_model("llama")
    like(model, 0.05).save_pretrained(tmp_path / "draft")
    loaded = model_of(tmp_path / "draft")
    expected = counts_of(speculate(model, like(model, 0.05), [5, 9], 3))
    assert counts_of(speculate(model, loaded, [5, 9], 3)) == expected and expected


ABSURD = [("num_hidden_layers", 1_000_000), ("num_hidden_layers", 0), ("sliding_window", 0), ("sliding_window", -3)]
ABSURD += [("max_position_embeddings", -5), ("num_attention_heads", 0), ("vocab_size", 10**12), ("hidden_size", "wide")]


@pytest.mark.parametrize(("field", "value"), ABSURD)
def test_an_absurd_configuration_is_refused_unbuilt(tmp_path, capsys, one_prompt, monkeypatch, field, value):
    folder = shutil.copytree(DRAFT, tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config | {field: value}))

    def build(*arguments, **options):
        raise AssertionError("nothing must be built")

    monkeypatch.setattr(sd.AutoModelForCausalLM, "from_config", build)
    message = refused(capsys, "--main", folder, "--draft", folder, "--prompts", one_prompt)
    assert str(folder) in message and field in message

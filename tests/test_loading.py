"""Devices, the hub, configurations, memory, threads, weights and tokenizers: what is read before a run."""

import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import compressed_tensors
import pytest
import torch
import transformers
from helpers import FAMILIES, ROOT, SHAPE, baseline, counts_of, like, make_model, speculate
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import speculative_decoding as sd

MAIN, DRAFT = ROOT / "tests/tiny_gemma2/main", ROOT / "tests/tiny_gemma2/draft"
CPU = torch.device("cpu")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SMALL = SHAPE | {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "num_hidden_layers": 4}


def read(folder, dtype=torch.float32):
    return sd.read_model(str(folder), dtype)


def edit(folder, file="config.json", **changes):
    """Change keys of a JSON file in a folder; None removes one."""
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {key: value for key, value in (content | changes).items() if value is not None}
    path.write_text(json.dumps(content))
    return folder


def saved(folder, model):
    model.save_pretrained(folder)
    return folder


def draft_in(folder, **changes):
    """A copy of the bundled draft, with changes of its config.json."""
    return edit(pathlib.Path(shutil.copytree(DRAFT, folder, dirs_exist_ok=True)), **changes)


def refusal(function, *arguments):
    """The one line that a call is refused with."""
    with pytest.raises(sd.UsageError) as refused:
        function(*arguments)
    said = str(refused.value)
    assert "\n" not in said and len(said) < 800
    return said


# Devices


def test_devices():
    assert sd.choose_device("cpu") == sd.choose_device("auto") == CPU and sd.device_name(CPU)
    for wanted in ("nonsense", "cuda:7", "cpu:x", "meta"):
        assert refusal(sd.choose_device, wanted).endswith("PyTorch finds cpu here: use --device auto")


def test_memory_is_asked_of_the_device_alone(monkeypatch):
    """Of an accelerator's own; MPS and the CPU share one."""
    asked, ram = [], sd.psutil.virtual_memory()

    def of_device(device):
        asked.append(device)
        return 1000 * (1 + device.index), 10**12

    monkeypatch.setattr(torch.accelerator, "get_memory_info", of_device)
    monkeypatch.setattr(sd.psutil, "virtual_memory", lambda: ram._replace(available=500))
    assert sd.free_memory(torch.device("cuda:1")) == 2000 and asked == [torch.device("cuda:1")]
    assert sd.free_memory(torch.device("mps")) == sd.free_memory(CPU) == 500 and len(asked) == 1


# Threads


def test_usable_cores_are_those_of_the_affinity_and_of_the_quota(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8, 16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(sd, "pathlib", SimpleNamespace(Path=lambda path: quota))
    assert sd.usable_cores() == 8
    for most, cores in (("max", 8), (200000, 2), (150000, 2), (20000, 1), (6400000, 8)):
        quota.write_text(f"{most} 100000\n")
        assert sd.usable_cores() == cores
    monkeypatch.delattr(os, "sched_getaffinity")
    assert sd.usable_cores() == 64


@pytest.fixture
def one_thread_again():
    yield
    torch.set_num_threads(1)


SECONDS = {  # of a step with 1, 2, 4 and 8 threads; what is chosen
    "more are faster": ([8.0, 4.0, 2.0, 1.0], 8),
    "they wait for each other": ([1.0, 2.0, 4.0, 9.0], 1),
    "two of eight": ([2.0, 1.0, 1.0, 3.0], 2),
    "4 % slower with half of them": ([4.0, 2.0, 1.04, 1.0], 4),
    "6 % slower with half of them": ([4.0, 2.0, 1.06, 1.0], 8),
}


@pytest.mark.parametrize("case", SECONDS)
def test_as_few_threads_compute_as_are_hardly_slower_than_the_fastest(monkeypatch, one_thread_again, llama, case):
    """By a clock of the test's own, to which a step takes as long as the case says."""
    (seconds, chosen), clock, tried = SECONDS[case], [0.0], []

    def read_clock():
        clock[0] += dict(zip((1, 2, 4, 8), seconds, strict=True))[torch.get_num_threads()]
        tried.append(torch.get_num_threads())
        return clock[0]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sd, "usable_cores", lambda: 8)
    monkeypatch.setattr(sd, "time", SimpleNamespace(perf_counter=read_clock))
    assert sd.choose_threads(sd.CachedModel(llama)) == chosen == torch.get_num_threads()
    assert set(tried) == {1, 2, 4, 8} and len(tried) <= 40


def test_a_number_of_threads_that_is_given_is_kept(monkeypatch, one_thread_again, llama):
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(sd, "usable_cores", lambda: 1)
    main = sd.CachedModel(llama)
    monkeypatch.setattr(main, "forward", None)  # nothing is measured
    assert sd.choose_threads(main) == 2 == torch.get_num_threads()


# The hub


def test_the_hubs_answers_are_told_apart_and_what_is_here_is_not_fetched_again(tmp_path):
    model, folder = transformers.AutoModelForCausalLM.from_pretrained(DRAFT), tmp_path / "model"
    shutil.copytree(DRAFT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder, max_shard_size="300KB")
    expected = {path.name for path in folder.iterdir()}
    shards = sorted(name for name in expected if name.endswith(".safetensors"))
    (folder / "original").mkdir()
    for duplicate in ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin"):
        (folder / duplicate).write_text("the same weights in another form")
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, str(ROOT / "tests/hub.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    results = json.loads(done.stdout or done.stderr)
    assert len(shards) > 1
    for case, fetched in {"whole": expected, "whole, offline": [], "a shard is missing": shards[1:2]}.items():
        assert results[case] == [sorted(expected), sorted(fetched)]
    for case in ("excluded", "excluded, offline"):  # by another program, and without the duplicates
        assert set(shards) < set(results[case][0]) and results[case][1] == []
    unreached = "check the connection, the token (`hf auth login`) and the disk (HF_HOME), name local folders"
    for case, parts in {
        "gated": ["someone/gated is a gated model", "https://huggingface.co/someone/gated, then `hf auth login`"],
        "gated-too": ["is a gated model"],
        "gated-files": ["is a gated model"],
        "hidden": ["there is no folder someone/hidden, and the hub shows no model", "check the spelling", "private"],
        "missing": ["there is no folder someone/missing, and the hub shows no model", "check the spelling"],
        "forbidden": ["cannot get someone/forbidden from the hub: ", "403", unreached],
        "broken": ["cannot get someone/broken from the hub: ", "500", unreached],
        "cut": ["cannot get someone/cut from the hub: ", "connection", unreached],
        "refused, offline": ["cannot get someone/refused from the hub: ", "refused", unreached],
        "a shard is missing, offline": ["someone/whole", shards[1]],
    }.items():
        said = results[case][0]
        assert isinstance(said, str) and "\n" not in said and all(part in said for part in parts), (case, said)


def test_a_full_disk_is_named(monkeypatch):
    """The one trouble that no test can make without a disk of its own: the client's error is put in its place."""

    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sd.huggingface_hub, "snapshot_download", no_space)
    said = refusal(sd.fetch, "someone/large")
    assert "No space left on device" in said and "the disk (HF_HOME)" in said


def test_what_names_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cached = tmp_path / "hub/models--google--gemma-2-2b-it"
    for name, model in {
        "~/models/x": f"{tmp_path}/models/x",
        "https://huggingface.co/Qwen/Qwen3-8B": "Qwen/Qwen3-8B",
        "https://huggingface.co/Qwen/Qwen3-8B/tree/main": "Qwen/Qwen3-8B",
        str(cached): "google/gemma-2-2b-it",
        "~/hub/models--google--gemma-2-2b-it/": "google/gemma-2-2b-it",
        "Qwen/Qwen3-8B": "Qwen/Qwen3-8B",
        "./models/m": "./models/m",
        "ngram": "ngram",
    }.items():
        assert sd.model_name(name) == model
    folder = cached / "snapshots/0123"
    shutil.copytree(DRAFT, folder)
    assert sd.model_name(str(folder)) == str(folder) == sd.fetch(str(folder))
    for name in ("model.Q4_K_M.gguf", "model.safetensors", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / name).touch()
        said = refusal(read, tmp_path / name)
        assert str(tmp_path / name) in said and "config.json and safetensors" in said.replace(", tokenizer.json", "")
    assert "there is no folder ./no/such/folder, and the hub shows no model" in refusal(read, "./no/such/folder")


# Configurations


def gemma3n():
    """One size for each layer's feed-forward network."""
    more = {"head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 4}
    lists = {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0]}
    return transformers.Gemma3nTextConfig(**SMALL | SLIDING | more | lists, vocab_size_per_layer_input=61)


KINDS = {family: FAMILIES[family] for family in ("gemma2", "mixtral", "gpt_bigcode", "mistral3")}
KINDS |= {"tied": lambda: transformers.Qwen2Config(**SHAPE | {"tie_word_embeddings": True})}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_is_is_known_before_its_weights_are_read(tmp_path, kind):
    config = KINDS[kind]()
    auto = transformers.AutoModelForImageTextToText if kind == "mistral3" else transformers.AutoModelForCausalLM
    saved(tmp_path, auto.from_config(config))
    files = read(tmp_path, torch.bfloat16)
    model = sd.load_model(files, CPU)
    assert files.parameters == sum(weight.numel() for weight in model.parameters())
    assert {weight.dtype for weight in model.parameters()} == {files.dtype} == {torch.bfloat16}
    assert (files.vocabulary, files.keeps_state, files.quantization) == (61, False, "")
    assert isinstance(model, auto._model_mapping[type(files.config)])


SWITCHED_OFF = {"sliding_window": 0, "use_sliding_window": False}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
REAL = {
    "qwen2_moe": (lambda: transformers.Qwen2MoeConfig(**SMALL, **EXPERTS), SWITCHED_OFF),
    "starcoder2": (lambda: transformers.Starcoder2Config(**SMALL), SWITCHED_OFF),
    "gemma3n": (gemma3n, {"sliding_window": 8}),
}


@pytest.mark.parametrize("case", REAL)
def test_real_configurations_run_exactly(tmp_path, case):
    """A window of 0 that is switched off, and a list of sizes."""
    config, written = REAL[case]
    edit(saved(tmp_path, make_model(config())), layer_types=None, **written)
    model = sd.load_model(read(tmp_path), CPU)
    expected = baseline(model, range(1, 13), new=16).token_ids
    run = speculate(model, like(model, 0.05), range(1, 13), 3, new=16)
    assert list(run.token_ids) == list(expected) and len(set(expected)) > 3
    assert 0 < sum(accepted for _, accepted in counts_of(run)) < sum(drafted for drafted, _ in counts_of(run))


def scaled(kind, most=64, original=None, **rope):
    """A model's configuration whose rotary positions are scaled; `original`: the length before that."""
    stated = {"original_max_position_embeddings": original} if original else {}
    return kind(**SHAPE | {"max_position_embeddings": most}, rope_parameters={"rope_theta": 100.0, **stated, **rope})


SWITCH = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
QWEN, LLAMA, PHI3 = transformers.Qwen2Config, transformers.LlamaConfig, transformers.Phi3Config
CONTEXTS = [
    (lambda: QWEN(**SHAPE), 256),
    (lambda: FAMILIES["gpt2"](), 256),
    (lambda: FAMILIES["bloom"](), float("inf")),
    (lambda: scaled(QWEN, rope_type="yarn", factor=4.0, original=64), 256),  # as Qwen's model cards advise it
    (lambda: scaled(QWEN, 80, rope_type="yarn", factor=4.0, original=64), 256),
    (lambda: scaled(QWEN, 300, rope_type="yarn", factor=4.0, original=64), 300),  # it says more by itself
    (lambda: scaled(LLAMA, rope_type="linear", factor=4.0), 256),
    (lambda: scaled(LLAMA, rope_type="dynamic", factor=4.0), 64),
    (lambda: scaled(LLAMA, 512, original=64, **LLAMA3), 512),
    (lambda: FAMILIES["mistral3_scaled"](), 64),
    (lambda: scaled(LLAMA, 256, original=64, **SWITCH), 64),
    (lambda: PHI3(**SHAPE, rope_scaling={**SWITCH}, original_max_position_embeddings=32), 32),
]


@pytest.mark.parametrize("case", range(len(CONTEXTS)))
def test_the_context_is_that_of_the_scaled_positions(tmp_path, case):
    config, expected = CONTEXTS[case]
    config = config()
    assert sd.context_of(config) == expected
    config.save_pretrained(tmp_path)
    assert sd.context_of(read(tmp_path).config) == expected  # as it is read again, too


def test_within_the_context_before_the_switch_a_model_runs_exactly_and_beyond_it_would_not():
    model = make_model(scaled(transformers.LlamaConfig, 256, original=64, **SWITCH))
    draft, same = like(model, 0.3), {}
    for size in (31, 50):
        ids = tuple(i % 61 for i in range(size))
        runs = baseline(model, ids, new=30), speculate(model, draft, ids, 3, new=30)
        same[size] = runs[0].token_ids == runs[1].token_ids
    assert same == {31: True, 50: False} and sd.context_of(model.config) == 64


def test_only_the_librarys_own_attention_is_taken(tmp_path):
    """What names a kernel on the hub, would have the library fetch its code and run it."""
    vision = saved(tmp_path / "vision", make_model("mistral3"))
    content = json.loads((vision / "config.json").read_text())
    cases = [draft_in(tmp_path / "a", _attn_implementation="org/kernel")]
    cases += [draft_in(tmp_path / "b", attn_implementation="flash_attention_2")]
    cases += [edit(vision, text_config=content["text_config"] | {"_attn_implementation": "org/kernel"})]
    for folder in cases:
        model = sd.load_model(read(folder), CPU)
        assert {model.config._attn_implementation, model.config.get_text_config()._attn_implementation} <= {
            "eager",
            "sdpa",
        }
    kept = sd.load_model(read(draft_in(tmp_path / "c", _attn_implementation="eager")), CPU)
    assert kept.config._attn_implementation == "eager" and os.environ["USE_HUB_KERNELS"] == "0"


# Memory and quantised checkpoints

PACKED = (MAIN / "model.safetensors").stat().st_size


def quantised(folder, stated):
    """The bundled main model as if it were quantised: by its config.json only."""
    return edit(pathlib.Path(shutil.copytree(MAIN, folder)), quantization_config=stated)


def test_too_little_memory_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    """From the byte on that is lacking: of the weights, a tenth more and 1 GB; of quantised ones, their files'."""
    folder, files = quantised(tmp_path / "q", {"quant_method": "bitnet"}), read(MAIN, torch.bfloat16)
    for other in ("consolidated.safetensors", "adapter_model.safetensors"):
        (folder / other).write_bytes(b"the same weights in another form, or others")
    for of, weights in ((files, 2 * files.parameters), (read(folder), PACKED)):
        monkeypatch.setattr(sd, "free_memory", lambda device, weights=weights: 1.1 * weights + 1e9 + 1)
        sd.check_memory(of, CPU)
        monkeypatch.setattr(sd, "free_memory", lambda device, weights=weights: 1.1 * weights + 1e9 - 1)
        said = refusal(sd.load_model, of, CPU)
        assert f"too little memory for {of.name}: cpu has 1.0 GB free" in said and "--dtype bfloat16" in said


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": ["awq"]}, ""),
        ("4 bit", ""),
    ],
)
def test_a_quantised_model_that_cannot_run_here_is_one_line(tmp_path, stated, said):
    folder = quantised(tmp_path / "main", stated)
    message = refusal(lambda: sd.load_model(read(folder), CPU))
    assert message.startswith(f"cannot load {folder}: ") and said in message


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


def test_a_quantised_model_runs_with_an_unquantised_draft(tmp_path):
    quantise_by_compressed_tensors(tmp_path)
    files = read(tmp_path)
    model, draft = sd.load_model(files, CPU), sd.load_model(read(DRAFT), CPU)
    assert files.quantization == "compressed-tensors"
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * PACKED
    texts = [baseline(model, range(100, 110), new=12), speculate(model, draft, range(100, 110), 3, new=12)]
    assert list(texts[0].token_ids) == list(texts[1].token_ids)


# Models that are broken, or of another kind: one line that says what and how


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


def demand_remote_code(folder):
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(folder, model_type="evil", auto_map=auto)
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")


def to_adapter(folder):
    """As peft writes one, with its base's config."""
    about = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", "r": 8, "target_modules": ["q_proj"]}
    edit(folder, "adapter_config.json", **about)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


BROKEN = {
    "truncated weights": (truncate, "cannot load"),
    "a weight is missing": (drop_a_weight, "lacks some weights, as model.layers.0.mlp.up_proj.weight"),
    "pickled weights": (to_pickle, "no file named model.safetensors"),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "cannot load"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "a shard is missing": (
        lambda folder: (
            edit(folder, "model.safetensors.index.json", metadata={}, weight_map={"a": "b.safetensors"})
            and (folder / "model.safetensors").unlink()
        ),
        "b.safetensors",
    ),
    "a broken index": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.index.json"),
        "cannot load",
    ),
    "remote code": (demand_remote_code, "cannot load"),
    "an adapter": (to_adapter, "no file named model.safetensors"),
    "a size that is no number": (lambda folder: edit(folder, hidden_size="wide"), "hidden_size"),
    "a draft head": (lambda folder: edit(folder, draft_vocab_size=32, vocab_size=64, num_hidden_layers=1), "cannot"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_models_are_refused(case, tmp_path):
    change, expected = BROKEN[case]
    folder = draft_in(tmp_path / "draft")
    change(folder)
    said = refusal(lambda: sd.load_model(read(folder), CPU))
    assert expected in said and str(folder) in said and ("safetensors" in said or case == "a weight is missing")


def test_models_of_other_kinds_are_refused_unbuilt(tmp_path):
    for config in (transformers.T5Config(vocab_size=61, d_model=32), transformers.ViTConfig()):
        config.save_pretrained(tmp_path)
        assert f"{tmp_path} ({config.model_type}) is not a decoder" in refusal(read, tmp_path)


# Models that run, and yet are none for this

BERT = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
BERT |= {"intermediate_size": 48, "pad_token_id": 0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR, CONV = (["linear_attention", "full_attention"], ["conv", "full_attention"])
COMPRESSED = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 6}
V4 = {"moe_intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16, "q_lora_rank": 16}
V4 |= {"num_experts_per_tok": 2, "n_routed_experts": 4, "sliding_window": 8, "o_groups": 2, "o_lora_rank": 8}
V4 |= {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64, "hc_mult": 2, "partial_rotary_factor": 0.5}
V4 |= {"layer_types": ["sliding_attention", *COMPRESSED], "compress_rates": COMPRESSED, "mlp_layer_types": ["moe"] * 3}
ZAYA = {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 8, "head_dim": 8, "router_hidden_size": 16}
ZAYA |= {"num_experts": 4, "moe_intermediate_size": 16}
RIGHT = FAMILIES | {
    "twelve tokens": lambda: transformers.LlamaConfig(**SHAPE | {"vocab_size": 12}),
    "two tokens": lambda: transformers.LlamaConfig(**SHAPE | {"vocab_size": 2}),
    "bert_decoder": lambda: transformers.BertConfig(**BERT, is_decoder=True),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**SHAPE, **DELTA, layer_types=LINEAR, head_dim=8),
    "falcon_h1": lambda: transformers.FalconH1Config(**SHAPE, **MAMBA, mamba_d_ssm=64),
    "granite_hybrid": lambda: transformers.GraniteMoeHybridConfig(
        **SHAPE, **MAMBA, layer_types=["mamba", "attention"], num_local_experts=4, shared_intermediate_size=16
    ),
    "lfm2": lambda: transformers.Lfm2Config(**SHAPE, layer_types=CONV),
    "zaya": lambda: transformers.ZayaConfig(**SHAPE, **ZAYA),
    "deepseek_v4": lambda: transformers.DeepseekV4Config(
        vocab_size=61, hidden_size=32, max_position_embeddings=256, **V4
    ),
}
WRONG = {
    "bert": lambda: transformers.BertConfig(**BERT),
    "roberta": lambda: transformers.RobertaConfig(**BERT),
    "electra": lambda: transformers.ElectraConfig(**BERT, embedding_size=32),
    "xlnet": lambda: transformers.XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "jamba": lambda: transformers.JambaConfig(
        **SHAPE, mamba_d_state=8, num_experts=2, attn_layer_period=2, attn_layer_offset=1
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=8),
    "openai-gpt": lambda: transformers.OpenAIGPTConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", RIGHT)
def test_decoders_read_on_from_their_cache(kind, dtype):
    """In each type: what rounding does to them is not taken for anything else."""
    model = make_model(RIGHT[kind](), dtype=dtype)
    sd.check_reading(model, kind, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WRONG)
def test_models_that_do_not_read_on_from_a_cache_as_from_the_text_are_refused(tmp_path, kind, dtype):
    saved(tmp_path, make_model(WRONG[kind]()))
    model = sd.load_model(read(tmp_path, dtype), CPU)
    said = refusal(lambda: sd.check_reading(model, str(tmp_path), CPU))
    assert said.startswith((f"{tmp_path} does not go on from a cache ", f"cannot run {tmp_path} "))


def test_the_program_refuses_such_a_main_model_and_makes_such_a_draft_a_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sd, "memory_bandwidth_gb_s", lambda device: 20.0)
    folder, reason = draft_in(tmp_path / "bert"), "does not go on from a cache"
    saved(folder, make_model(transformers.BertConfig(**BERT | {"vocab_size": 2048, "max_position_embeddings": 512})))
    how = ["--demo", "--device", "cpu", "--limit", "1", "--max-new-tokens", "4", "--draft-tokens", "2"]
    assert sd.main([*how[1:], "--prompts", str(MAIN.parent / "prompts.txt"), "--main", str(folder)]) == 2
    assert reason in capsys.readouterr().err
    assert sd.main([*how, "--draft", f"{folder},ngram"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count(reason) == 1 and "ngram, K = 2" in printed


def test_models_that_cannot_run_on_ids_alone_are_refused(tmp_path):
    saved(tmp_path, make_model(transformers.XmodConfig(**BERT, is_decoder=True)))
    model = sd.load_model(read(tmp_path), CPU)
    said = refusal(lambda: sd.check_reading(model, str(tmp_path), CPU))
    assert f"cannot run {tmp_path} on token ids alone, with a cache: Input language unknown" in said


# Tokenizers


def tokenizer_of(folder):
    return sd.load_tokenizer(read(folder))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    """As model.save_pretrained leaves it: the library makes a tokenizer of a few tokens, or fails."""
    for kind in ("gemma2", "llama", "gpt2"):
        folder = saved(tmp_path / kind, make_model(kind))
        for file in (None, "tokenizer_config.json"):
            if file:
                (folder / file).write_text("{}")
            said = refusal(tokenizer_of, folder)
            assert "tokenizer.json" in said and str(folder) in said
    for text in ("{", "{}", "[]"):
        folder = draft_in(tmp_path / "draft")
        (folder / "tokenizer.json").write_text(text)
        assert f"cannot load the tokenizer of {folder}: " in refusal(tokenizer_of, folder)
    with pytest.raises(sd.UsageError, match=r"cannot try: one of: \(1\) this, or \(2\) that; try again"):
        with sd.cli_errors("try", "try again"):
            raise ValueError("one of:\n(1) this, or\n(2) that")
    assert len(sd.one_line(ValueError("long " * 1000))) == 300 and sd.one_line(KeyError()) == "KeyError"


def tokenizer_with(folder, added=(), ordinary=(), renamed=False):
    """A folder with the bundled draft whose tokenizer has further tokens behind its 2,048, and, if they are renamed,
    other names for all that were added to it before."""
    draft_in(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {token: 2048 + place for place, token in enumerate(ordinary)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for file in TOKENIZER_FILES if renamed else ():
        text = (folder / file).read_text()
        for token in content["added_tokens"]:
            text = text.replace(token["content"], "|" + token["content"])
        (folder / file).write_text(text)
    tokenizer = tokenizer_of(folder)
    tokenizer.add_tokens(list(added))
    return tokenizer


X, XY, YX = ["<x>"], ["<x>", "<y>"], ["<y>", "<x>"]
ADDED = {  # what main and draft add
    "nothing": ({}, {}),
    "one of main's": ({"added": X}, {}),
    "two of the draft's": ({}, {"added": XY}),
    "one that both have, and one of main's": ({"added": XY}, {"added": X}),
    "two in one place": ({"added": X}, {"added": ["<y>"]}),
    "two the other way round": ({"added": XY}, {"added": YX}),
    "all renamed, and two more": ({}, {"added": XY, "renamed": True}),
}


@pytest.mark.parametrize("case", ADDED)
def test_tokenizers_may_differ_in_any_added_token(tmp_path, case):
    pair = [tokenizer_with(tmp_path / name, **each) for name, each in zip("md", ADDED[case], strict=True)]
    sd.check_tokenizers(*pair, "m and d")


def test_ordinary_tokens_that_differ_are_another_tokenizer(tmp_path):
    main = tokenizer_with(tmp_path / "m", ordinary=["zebra"])
    drafts = [tokenizer_of(DRAFT), *(tokenizer_with(tmp_path / name, [name]) for name in ("<x>", "zebra"))]
    for pair in ((main, drafts[0]), (drafts[0], main), (main, drafts[1])):
        said = refusal(sd.check_tokenizers, *pair, "m and d")
        assert "'zebra' is " in said and said.endswith("family, or --draft ngram")
    sd.check_tokenizers(main, drafts[2], "m and d")  # the same token, in the same place


# Generation settings


def settings_of(folder, **settings):
    """The bundled draft with a generation_config.json of these settings."""
    (draft_in(folder) / "generation_config.json").write_text(json.dumps(settings))
    return read(folder)


SETTINGS = {
    "nothing": ({"eos_token_id": 1, "max_length": 4096, "use_cache": True, "repetition_penalty": 1.0}, [], []),
    "text": ({"repetition_penalty": 1.1, "suppress_tokens": [7]}, ["repetition_penalty", "suppress_tokens"], "same"),
    "sampling": ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, ["do_sample", "temperature", "top_p"], []),
    "both": ({"do_sample": True, "bad_words_ids": [[5]]}, ["do_sample", "bad_words_ids"], ["bad_words_ids"]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_applied_are_named(tmp_path, case):
    settings, greedy, sampled = SETTINGS[case]
    files = settings_of(tmp_path / "draft", **settings)
    for temperature, expected in ((0.0, greedy), (0.7, greedy if sampled == "same" else sampled)):
        said = sd.unapplied_settings(files, temperature)
        assert (str(tmp_path / "draft") in said) == bool(expected)
        assert [name for name in settings if f"{name} " in said] == expected


def test_the_ends_of_a_text(tmp_path):
    tokenizer, folder = tokenizer_of(DRAFT), tmp_path / "draft"
    for stated, expected in (([1, 6], {1, 6}), (6, {1, 6}), (None, {1}), ([None, 6], {1, 6})):
        assert sd.end_tokens(settings_of(folder, eos_token_id=stated), tokenizer) == expected
    (folder / "generation_config.json").unlink()
    assert sd.end_tokens(read(edit(folder, eos_token_id=6)), tokenizer) == {1, 6}  # of an old config.json
    tokenizer.eos_token = None
    assert sd.end_tokens(settings_of(folder), tokenizer) == set()


def test_that_a_tekken_tokenizer_was_saved_wrongly_is_said_once_and_dim(tmp_path, capsys, monkeypatch):
    """Of a Mistral folder from before transformers 5, main model and draft alike; the library looks for so many tokens.
    Without weights, it is read, and no more."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map(str, range(10, 100_000))]
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    pattern = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+")
    parts = [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    edit(tmp_path, **SHAPE | {"model_type": "mistral", "transformers_version": "4.57.1", "vocab_size": len(letters)})
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert sd.main(["--main", str(tmp_path), "--draft", f"{tmp_path},ngram"]) == 2
    logging.captureWarnings(False)
    warning, loading, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("\x1b[2mThe tokenizer") and "fix_mistral_regex" in warning and "safetensors" in error


def test_a_broken_generation_config_is_one_line(tmp_path):
    folder = draft_in(tmp_path / "draft")
    for text in ("{", "[]", "null", '{"cache_implementation": "nonsense"}'):
        (folder / "generation_config.json").write_text(text)
        assert f"cannot load {folder}: " in refusal(read, folder)


# Weights


def test_a_model_that_is_spread_to_the_disk_writes_the_same(tmp_path, monkeypatch):
    """As --device-map auto does it, where there is too little memory: here for accelerate alone."""
    files = read(MAIN)
    memory = {"max_memory": {"cpu": "6MB"}, "device_map": "auto", "offload_folder": str(tmp_path)}
    monkeypatch.setattr(sd, "free_memory", lambda device: 0)  # it does not refuse what is spread
    spread = sd.load_model(files, CPU, memory)
    monkeypatch.undo()
    assert "disk" in spread.hf_device_map.values()
    texts = [baseline(model, range(100, 110), new=4).token_ids for model in (spread, sd.load_model(files, CPU))]
    assert list(texts[0]) == list(texts[1])

"""Devices, the hub, configurations, memory, weights and tokenizers: the models' half of what is read before a run."""

import copy
import json
import os
import shutil
import subprocess
import sys

import compressed_tensors
import pytest
import torch
import transformers
from helpers import FAMILIES, ROOT, SHAPE, baseline, counts_of, ids_of, like, make_model, speculate
from safetensors.torch import load_file, save_file

import speculative_decoding as sd

MAIN, DRAFT = ROOT / "tests/tiny_gemma2/main", ROOT / "tests/tiny_gemma2/draft"
CPU = torch.device("cpu")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SMALL = SHAPE | {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}


def read(folder, dtype=torch.float32):
    return sd.read_model(str(folder), dtype, CPU)


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
    """Of an accelerator's own; MPS and the CPU share one; `--device-map auto` may fill nine tenths of each."""
    asked, ram = [], sd.psutil.virtual_memory()

    def of_device(device):
        asked.append(device)
        return 1000 * (1 + device.index), 10**12

    monkeypatch.setattr(torch.accelerator, "get_memory_info", of_device)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(sd.psutil, "virtual_memory", lambda: ram._replace(available=500))
    assert sd.free_memory(torch.device("cuda:1")) == 2000 and asked == [torch.device("cuda:1")]
    assert sd.free_memory(torch.device("mps")) == sd.free_memory(CPU) == 500 and len(asked) == 1
    for device, size, expected in [
        ("cuda:0", None, {0: 900, 1: 1800, "cpu": 450}),
        ("cuda", "0.0008MB", {0: 800, 1: 1800, "cpu": 450}),
        ("cuda:1", "0.0008MB", {0: 900, 1: 800, "cpu": 450}),
        ("mps", "0.0003MB", {"mps": 300}),
        ("cpu", "1GB", {"cpu": 450}),
    ]:
        how = sd.spread(torch.device(device), size, "/tmp/there")
        assert how == {"device_map": "auto", "max_memory": expected, "offload_folder": "/tmp/there"}
    for size in ("ten", "-5GB", "5 parsecs"):
        assert f"cannot take --max-memory {size}: " in refusal(sd.spread, CPU, size, "")


# The hub


def test_the_hubs_answers_are_told_apart_in_one_line(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, str(ROOT / "tests/hub.py"), str(DRAFT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=True)
    results = json.loads(done.stdout)
    assert done.stderr == ""  # nothing of the client's own
    fetched = [path.name for path in DRAFT.iterdir() if path.suffix in (".json", ".jinja", ".safetensors", ".txt")]
    assert results["whole"][0] == results["late"][0] == sorted(fetched)  # downloaded, and then used without the hub
    licence = "is a gated model, and you have no access: accept its licence at https://huggingface.co/someone/gated"
    unreached = "check the connection, the token (`hf auth login`) and the disk (HF_HOME), name local folders"
    for case, expected in {
        "gated": [licence, "then `hf auth login`; or take a pair that needs none, as --main Qwen"],
        "gated-too": [licence],
        "gated-files": [licence],
        "hidden": ["there is no folder someone/hidden, and the hub shows no model", "check the spelling", "private"],
        "missing": ["there is no folder someone/missing, and the hub shows no model", "check the spelling"],
        "forbidden": ["cannot get someone/forbidden from the hub: ", "403", unreached],
        "broken": ["cannot get someone/broken from the hub: ", "500", unreached],
        "cut": ["cannot get someone/cut from the hub: ", unreached],
        "silent": ["cannot get someone/silent from the hub: ", "timed out", unreached],
        "refused": ["cannot get someone/refused from the hub: ", "refused", unreached],
    }.items():
        said = results[case][0]
        assert isinstance(said, str) and "\n" not in said and all(part in said for part in expected), (case, said)
    assert results["silent"][1] < 15  # not the client's half minute; the server itself never answers


def test_a_full_disk_is_named(monkeypatch):
    """The one trouble that no test can make without a disk of its own: the client's error is put in its place."""
    monkeypatch.setattr(sd, "ask_hub", lambda name: None)

    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sd.huggingface_hub, "snapshot_download", no_space)
    said = refusal(sd.fetch, "someone/large")
    assert "No space left on device" in said and "the disk (HF_HOME)" in said


def test_a_name_that_no_model_can_have():
    assert "there is no folder ./no/such/folder, and the hub shows no model" in refusal(read, "./no/such/folder")


# Configurations


def test_sizes_are_known_from_the_configuration_alone(tmp_path):
    """Those of gemma-2-9b in bfloat16."""
    shape = {"hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}
    shape |= {"vocab_size": 256000, "head_dim": 256, "intermediate_size": 14336, "max_position_embeddings": 8192}
    transformers.Gemma2Config(**shape).save_pretrained(tmp_path)
    files = read(tmp_path, torch.bfloat16)
    assert files.weight_bytes / 1e9 == pytest.approx(18.48, abs=0.01) and files.context == 8192
    assert files.quantization == files.notice == ""
    per_token = 2 * 8 * 256 * 2  # keys and values, of 8 heads, of 256 numbers, of 2 bytes: in each layer
    assert sd.cache_bytes(files.model, 5000) == per_token * (21 * 5000 + 21 * 4096)  # half of them have a window
    assert (
        sd.cache_bytes(files.model, 5000, is_compiled=True) == 2 * per_token * 42 * 5000
    )  # the prompt is read into another


def gemma4(shared):
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
    more = {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": shared}
    return transformers.Gemma4TextConfig(**SMALL | layers | more, vocab_size_per_layer_input=61)


def gemma3n():
    """One size for each layer's feed-forward network."""
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
    more = {"head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 4}
    lists = {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0]}
    return transformers.Gemma3nTextConfig(**SMALL | layers | more | lists, vocab_size_per_layer_input=61)


KINDS = {family: FAMILIES[family] for family in ("gemma2", "mixtral", "gpt_bigcode", "falcon", "phi3")}
KINDS |= {"gemma4": lambda: gemma4(0), "gemma4, shared caches": lambda: gemma4(2), "gemma3n": gemma3n}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_takes_what_was_counted(tmp_path, kind):
    """The weights and the cache, to the byte: heads of two sizes, windows, caches that layers share, experts."""
    torch.manual_seed(0)
    saved(tmp_path, transformers.AutoModelForCausalLM.from_config(KINDS[kind]()))
    for dtype in (torch.float32, torch.bfloat16):
        files = read(tmp_path, dtype)
        model = sd.load_model(files, CPU)
        assert files.weight_bytes == sum(weight.nbytes for weight in model.parameters())
        cache = transformers.DynamicCache(config=model.config)
        model(ids_of(range(1, 8)), past_key_values=cache)
        stored = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        assert sd.cache_bytes(files.model, 7) == sum(layer.keys.nbytes + layer.values.nbytes for layer in stored) > 0


def varied(config):
    """A random model with weights large enough that its greedy text is varied."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 2 / weight.shape[-1] ** 0.5)
    return model


SWITCHED_OFF = {"sliding_window": 0, "use_sliding_window": False}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
REAL = {
    "qwen2": (lambda: transformers.Qwen2Config(**SMALL), SWITCHED_OFF),
    "qwen2_moe": (lambda: transformers.Qwen2MoeConfig(**SMALL, **EXPERTS), SWITCHED_OFF),
    "starcoder2": (lambda: transformers.Starcoder2Config(**SMALL), SWITCHED_OFF),
    "gemma3n": (gemma3n, {"sliding_window": 8}),
}


@pytest.mark.parametrize("case", REAL)
def test_real_configurations_run_exactly(tmp_path, case):
    """A window of 0 that is switched off, and a list of sizes."""
    config, written = REAL[case]
    edit(saved(tmp_path, varied(config())), layer_types=None, **written)
    model = sd.load_model(read(tmp_path), CPU)
    expected = baseline(model, range(1, 13), new=16).token_ids
    run = speculate(model, like(model, 0.05), range(1, 13), 3, new=16)
    assert list(run.token_ids) == list(expected) and len(set(expected)) > 3
    assert 0 < sum(accepted for _, accepted in counts_of(run)) < sum(drafted for drafted, _ in counts_of(run))


def test_too_little_memory_is_said_before_anything_is_loaded(monkeypatch):
    """From the byte on that is lacking: of weights and caches, a twentieth more; and 1 GB on an accelerator."""
    files = [read(MAIN, torch.bfloat16), read(DRAFT, torch.bfloat16)]
    models = sum(of.weight_bytes + sd.cache_bytes(of.model, 500) for of in files)
    for device, needed in (("cpu", 1.05 * models), ("mps", 1.05 * models + 1e9), ("cuda", 1.05 * models + 1e9)):
        monkeypatch.setattr(sd, "free_memory", lambda of, needed=needed: needed + 1)
        sd.check_memory(files, torch.device(device), 500)
        monkeypatch.setattr(sd, "free_memory", lambda of, needed=needed: needed - 1)
        said = refusal(sd.check_memory, files, torch.device(device), 500)
        assert f"{device} has " in said and f"KV cache of 500 tokens: {MAIN} 0.0 + 0.0, {DRAFT} 0.0 + 0.0" in said
        assert "try --dtype bfloat16, --device-map auto, or a smaller pair" in said
    # Compiled steps on a CPU keep a second copy of the weights.
    twice = 1.05 * sum(2 * of.weight_bytes + sd.cache_bytes(of.model, 500, True) for of in files)
    monkeypatch.setattr(sd, "free_memory", lambda of: twice + 1)
    sd.check_memory(files, torch.device("cpu"), 500, True)
    monkeypatch.setattr(sd, "free_memory", lambda of: twice - 1)
    assert refusal(sd.check_memory, files, torch.device("cpu"), 500, True).startswith("too little memory: cpu has ")


# Quantised checkpoints


def quantised(folder, stated):
    """The bundled main model as if it were quantised: by its config.json only."""
    return edit(shutil.copytree(MAIN, folder), quantization_config=stated)


PACKED = (MAIN / "model.safetensors").stat().st_size


def test_a_quantised_checkpoint_takes_what_its_files_take(tmp_path, monkeypatch):
    folder, dense = quantised(tmp_path / "main", {"quant_method": "bitnet"}), read(MAIN).weight_bytes
    for other in ("consolidated.safetensors", "adapter_model.safetensors"):
        (folder / other).write_bytes(b"the same weights in another form, or others")
    files = read(folder)
    assert (files.weight_bytes, files.quantization) == (PACKED, "bitnet") and PACKED < dense
    # On a CPU, the library decompresses these.
    files = read(quantised(tmp_path / "fp8", {"quant_method": "fp8", "weight_block_size": [8, 8]}))
    assert (files.weight_bytes, files.quantization) == (dense, "fp8, decompressed to run")
    # As the hub states it, while the weights are not here yet.
    sizes = {"model-1.safetensors": 5, "model-2.safetensors": 6, "config.json": 7, "other/model.safetensors": 8}
    siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
    monkeypatch.setattr(sd, "ask_hub", lambda name: sd.huggingface_hub.ModelInfo(id=name, siblings=siblings))
    monkeypatch.setattr(sd, "fetch", lambda name: str(folder))
    assert read("someone/quantised").weight_bytes == 11


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
def test_a_quantised_model_that_cannot_run_here_is_one_line(tmp_path, stated, said):
    folder = quantised(tmp_path / "main", stated)
    message = refusal(read, folder)
    assert str(folder) in message and said in message


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
    assert files.quantization == "compressed-tensors, decompressed to run"
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * PACKED
    # So much is what it takes once it runs.
    assert files.weight_bytes == pytest.approx(sum(weight.nbytes for weight in model.parameters()), rel=0.1)
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


def to_adapter(folder, *gone):
    """As peft writes one; `gone`: what is not there beside it."""
    about = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", "r": 8, "target_modules": ["q_proj"]}
    edit(folder, "adapter_config.json", **about)
    save_file({"base_model.model.x": torch.zeros(2)}, folder / "adapter_model.safetensors")
    for file in gone:
        (folder / file).unlink()


def to_gguf(folder, *gone):
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")
    for file in gone:
        (folder / file).unlink()


ADAPTER = "is an adapter (LoRA): merge it into its base"
GGUF = "has GGUF files only, which are not loaded here: name the model's original weights"
BROKEN = {
    "truncated weights": (truncate, "cannot load"),
    "a weight is missing": (drop_a_weight, "lacks 1 of its weights (model.layers.0.mlp.up_proj.weight"),
    "pickled weights": (to_pickle, "safetensors"),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "cannot load"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it needs memory, and config.json and safetensors"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "safetensors weights of a whole causal language model",
    ),
    "remote code": (demand_remote_code, "cannot load"),
    "an adapter": (lambda folder: to_adapter(folder, "model.safetensors", "config.json"), ADAPTER),
    "an adapter with its base's config": (lambda folder: to_adapter(folder, "model.safetensors"), ADAPTER),
    "GGUF": (lambda folder: to_gguf(folder, "config.json"), GGUF),
    "GGUF with a config": (to_gguf, GGUF),
    "flash attention": (
        lambda folder: edit(folder, attn_implementation="flash_attention_2"),
        'take "attn_implementation": "flash_attention_2" out of its config.json',
    ),
    "flash attention by an older key": (
        lambda folder: edit(folder, _attn_implementation="flash_attention_3"),
        'take "_attn_implementation": "flash_attention_3" out of its config.json',
    ),
    "a size that is no number": (lambda folder: edit(folder, hidden_size="wide"), "hidden_size"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_models_are_refused(case, tmp_path):
    change, expected = BROKEN[case]
    folder = shutil.copytree(DRAFT, tmp_path / "draft")
    change(folder)
    said = refusal(lambda: sd.load_model(read(folder), CPU))
    assert expected in said and str(folder) in said


def test_an_adapter_beside_whole_weights_is_ignored_and_said(tmp_path, monkeypatch):
    """Also where peft is installed, with which the library would load it, too."""
    folder = shutil.copytree(DRAFT, tmp_path / "draft")
    to_adapter(folder)
    for module in (transformers.integrations.peft, transformers.models.auto.auto_factory):
        monkeypatch.setattr(module, "is_peft_available", lambda: True)
    files = read(folder)
    assert files.notice == f"The adapter beside the weights of {folder} is ignored."
    weights, plain = (sd.load_model(of, CPU).state_dict() for of in (files, read(DRAFT)))
    assert weights.keys() == plain.keys() and all(torch.equal(weights[name], plain[name]) for name in plain)


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
def test_drafts_that_are_no_models_of_their_own_are_refused(tmp_path, head):
    (tmp_path / "config.json").write_text(json.dumps(HEADS[head]))
    said = refusal(read, tmp_path)
    assert f"{tmp_path} is no model of its own but works within another ({head}): take a small model" in said
    assert said.endswith("or --draft ngram")


def test_a_model_that_brings_such_heads_is_a_whole_one(tmp_path):
    """As DeepSeek V3 and GLM 4.5 do: layers that predict further tokens, which stay out of use here."""
    folder = shutil.copytree(DRAFT, tmp_path / "draft")
    assert read(edit(folder, num_mtp_layers=1, mtp_loss_scaling_factor=0.1)).weight_bytes


# Models that run, and yet are none for this


BERT = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
BERT |= {"intermediate_size": 48, "pad_token_id": 0}
BOTH_WAYS = {
    "bert": lambda: transformers.BertConfig(**BERT),
    "roberta": lambda: transformers.RobertaConfig(**BERT),
    "electra": lambda: transformers.ElectraConfig(**BERT, embedding_size=32),
    "xlnet": lambda: transformers.XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48),
}


def drafted(folder, config, dtype=torch.float32):
    """Save a random model of a configuration, and load it as the program does."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return sd.load_model(read(folder, dtype), CPU)


@pytest.mark.parametrize("kind", BOTH_WAYS)
def test_models_that_read_both_ways_are_refused(tmp_path, kind):
    said = refusal(drafted, tmp_path, BOTH_WAYS[kind]())
    assert said.startswith(f"{tmp_path} reads both ways: a later token changes what it says of earlier ones; take a d")


def test_a_bert_that_reads_from_left_to_right_is_a_decoder(tmp_path):
    assert drafted(tmp_path, transformers.BertConfig(**BERT, is_decoder=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_read_from_left_to_right(family, dtype):
    """In each type: what rounding does to them is not taken for that."""
    sd.check_reading(make_model(family, dtype=dtype), family, CPU)


def test_models_that_cannot_run_on_ids_with_a_cache_are_refused(tmp_path):
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4}
    said = refusal(drafted, tmp_path / "a", transformers.OpenAIGPTConfig(**sizes))  # it has no cache at all
    assert "does not go on from a cache as from the text itself; take a decoder" in said
    small = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    said = refusal(drafted, tmp_path / "b", transformers.XmodConfig(**small, intermediate_size=48, is_decoder=True))
    assert f"cannot run {tmp_path}/b on token ids alone, with a cache: Input language unknown" in said


def test_models_of_other_kinds_are_refused_unbuilt(tmp_path):
    for config, expected in [
        (transformers.T5Config(vocab_size=61, d_model=32), "(t5) is an encoder-decoder, or not"),
        (transformers.WhisperConfig(vocab_size=61), "(whisper) is an encoder-decoder, or not"),
        (transformers.ViTConfig(), "(vit) is an encoder-decoder, or not a text-generation model; take a decoder"),
    ]:
        config.save_pretrained(tmp_path)
        assert f"{tmp_path} {expected}" in refusal(read, tmp_path)


# Models that change how they read positions


def longrope(kind, **more):
    """A configuration that reads positions by other factors in texts of more than 64 tokens."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 100.0}
    scaling = factors | {"original_max_position_embeddings": 64} | more
    # Phi's configurations have it outside, too, and there it counts.
    outside = {"original_max_position_embeddings": 64} if "phi" in kind.__name__.lower() else {}
    return kind(**SMALL, rope_parameters=scaling, **outside)


def test_the_switch_is_asked_of_the_configuration():
    mscale = {"short_mscale": 1.2, "long_mscale": 1.2}
    for config in (longrope(transformers.LlamaConfig), longrope(transformers.Phi3Config)):
        assert sd.rotary_switch(config) == 64
    assert sd.rotary_switch(longrope(transformers.PhimoeConfig, **mscale)) == 64
    older = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = transformers.Phi3Config(**SMALL, rope_scaling=older, original_max_position_embeddings=32)
    assert sd.rotary_switch(config) == 32
    for family in ("llama", "gemma3", "gpt2", "opt", "phi3"):  # gemma3: two sets; gpt2, opt: none
        assert sd.rotary_switch(FAMILIES[family]()) == float("inf")
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 100.0}
    kinds = {"full_attention": factors | {"original_max_position_embeddings": 48}}
    kinds["sliding_attention"] = {"rope_type": "default", "rope_theta": 100.0}
    assert sd.rotary_switch(transformers.Gemma3TextConfig(**SMALL, head_dim=8, rope_parameters=kinds)) == 48
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    assert sd.rotary_switch(transformers.LlamaConfig(**SMALL, rope_parameters=dynamic)) == float("inf")


def chat_of(files, new):
    """A chat that would leave out what crosses these models' switches, of questions that are fed as they are."""
    switches = tuple((sd.rotary_switch(each.config), each.name) for each in files)
    return sd.Chat(WordTokenizer(), None, new, frozenset(), 3, 256, "main", 61, switches)


class WordTokenizer:
    """Each number is a word, and its own id."""

    bos_token = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize("kind", [transformers.Phi3Config, transformers.LlamaConfig])
def test_prompts_that_cross_the_switch_are_left_out_and_others_run_exactly(tmp_path, kind):
    files = read(saved(tmp_path, varied(longrope(kind))))
    model = sd.load_model(files, CPU)
    prompts = [sd.Question(" ".join(str(i % 61) for i in range(n)), n) for n in (31, 32, 63, 64, 65, 90)]
    staying, told = sd.fitting(chat_of([read(MAIN), files], 30), prompts)  # 30 new tokens, and 3 of the last draft
    assert [prompt.number for prompt in staying] == [31, 65, 90]
    assert len(told) == 1 and told[0].startswith("3 prompts left out (first: 32)")
    assert f"crosses 64, where {tmp_path} reads differently" in told[0]
    assert sd.fitting(chat_of([read(MAIN)], 30), prompts)[1] == []
    draft, same = like(model, 0.3), {}
    for size in (31, 63, 65, 90):
        ids = tuple(i % 61 for i in range(size))
        runs = baseline(model, ids, new=30), speculate(model, draft, ids, 3, new=30)
        same[size] = runs[0].token_ids == runs[1].token_ids
    assert same == {31: True, 63: False, 65: True, 90: True}  # the second is why they are left out


# Tokenizers


def tokenizer_of(folder=MAIN):
    return sd.load_tokenizer(str(folder))


@pytest.mark.parametrize("kind", ["gemma2", "llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"], ["special_tokens_map.json"]])
def test_a_folder_without_a_tokenizer_is_named(tmp_path, kind, left):
    """As model.save_pretrained leaves it: the library would make a tokenizer of a few tokens, or fail in many lines."""
    saved(tmp_path, make_model(kind))
    for file in left:
        (tmp_path / file).write_text("{}")
    said = refusal(tokenizer_of, tmp_path)
    assert said.startswith(f"{tmp_path} has no tokenizer: {tmp_path} lacks tokenizer.json (or vocab.json and merges.")
    assert "copy it from the model that this one was made from" in said


def test_a_broken_tokenizer_is_one_line(tmp_path):
    for text in ("{", "{}", "[]"):
        folder = shutil.copytree(DRAFT, tmp_path / "draft", dirs_exist_ok=True)
        (folder / "tokenizer.json").write_text(text)
        assert f"cannot load the tokenizer of {folder}: " in refusal(tokenizer_of, folder)


def test_an_error_of_several_lines_is_told_whole():
    """What follows "one of:" on the next lines is the point of it."""
    with pytest.raises(sd.UsageError, match=r"cannot try: one of: \(1\) this, or \(2\) that; try again"):
        with sd.cli_errors("try", "try again"):
            raise ValueError("one of:\n(1) this, or\n(2) that")
    assert len(sd.one_line(ValueError("long " * 1000))) == 300 and sd.one_line(KeyError()) == "KeyError"


def tokenizer_with(folder, special=(), ordinary=()):
    """A folder with the bundled tokenizer, and further tokens behind its 2,048."""
    folder.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(MAIN / name, folder / name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {token: 2048 + place for place, token in enumerate(ordinary)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tokenizer = tokenizer_of(folder)
    tokenizer.add_tokens(list(special))
    return tokenizer


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
    pair = [tokenizer_with(tmp_path / name, tokens) for name, tokens in zip("md", added, strict=True)]
    if isinstance(expected, int):
        assert sd.shared_ids(*pair, "m and d") == expected
    else:
        assert "m and d have different tokenizers (" in (said := refusal(sd.shared_ids, *pair, "m and d"))
        assert expected in said and said.endswith("family, or --draft ngram")


def test_ordinary_tokens_at_the_tail_are_another_tokenizer(tmp_path):
    main, draft = tokenizer_with(tmp_path / "m", ordinary=["zebra"]), tokenizer_with(tmp_path / "d", ["<x>"])
    for pair in ((main, draft), (draft, main), (main, tokenizer_of()), (tokenizer_of(), main)):
        assert "different tokenizers" in refusal(sd.shared_ids, *pair, "m and d")


def test_a_draft_is_read_with_what_it_shares(tmp_path):
    """What tokenizers and models both have; and what is wrong with one draft is said of that one."""
    main, tokenizer = read(MAIN), tokenizer_of()
    assert sd.read_draft(str(DRAFT), main, tokenizer, CPU)[1] == 2048
    smaller = shutil.copytree(DRAFT, tmp_path / "smaller")
    model = transformers.AutoModelForCausalLM.from_pretrained(smaller)
    model.resize_token_embeddings(2000)
    model.save_pretrained(smaller)
    files, shared = sd.read_draft(str(smaller), main, tokenizer, CPU)
    assert (files.name, shared) == (str(smaller), 2000)
    bare = saved(tmp_path / "bare", make_model("gemma2"))
    assert f"{bare} has no tokenizer" in refusal(sd.read_draft, str(bare), main, tokenizer, CPU)


# Generation settings


def settings_of(folder, **settings):
    """The bundled draft with a generation_config.json of these settings."""
    shutil.copytree(DRAFT, folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return read(folder)


SETTINGS = {
    "nothing": ({"eos_token_id": 1, "max_length": 4096, "use_cache": True}, "", ""),
    "greedy": ({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 50}, "", ""),
    "neutral": ({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "guidance_scale": 1}, "", ""),
    "text": ({"repetition_penalty": 1.1, "suppress_tokens": [7]}, "repetition_penalty, suppress_tokens.", "the same"),
    "forced": ({"forced_eos_token_id": 1, "min_new_tokens": 3}, "min_new_tokens, forced_eos_token_id.", "the same"),
    "words": ({"bad_words_ids": [[5]], "sequence_bias": [[[5], 1.0]]}, "bad_words_ids, sequence_bias.", "the same"),
    "sampling": (
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "min_p": 0.1},
        "do_sample True, temperature 0.6, top_p 0.9, min_p 0.1 (--temperature, --top-k, --top-p sample).",
        "",
    ),
    "both": (
        {"do_sample": True, "no_repeat_ngram_size": 3},
        "no_repeat_ngram_size, do_sample True (--temperature, --top-k, --top-p sample).",
        "no_repeat_ngram_size.",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_applied_are_named(tmp_path, case):
    settings, greedy, sampled = SETTINGS[case]
    files = settings_of(tmp_path / "draft", **settings)
    for temperature, expected in ((0.0, greedy), (0.7, greedy if sampled == "the same" else sampled)):
        said = sd.unapplied_settings(files, temperature)
        start = f"Not applied of the generation settings of {tmp_path}/draft: "
        assert said == (start + expected if expected else "")


def test_settings_in_an_old_config_json_are_named_too(tmp_path):
    folder = shutil.copytree(DRAFT, tmp_path / "draft")
    (folder / "generation_config.json").unlink()
    files = read(edit(folder, repetition_penalty=1.3, eos_token_id=6))
    assert sd.unapplied_settings(files, 0.0).endswith(": repetition_penalty.")
    assert sd.end_tokens(files, tokenizer_of()) == {1, 6}


def test_the_ends_of_a_text(tmp_path):
    tokenizer, folder = tokenizer_of(), tmp_path / "draft"
    for stated, expected in (([1, 6], {1, 6}), (6, {1, 6}), ([6], {1, 6}), (None, {1}), ([None, 6], {1, 6})):
        assert sd.end_tokens(settings_of(folder, eos_token_id=stated), tokenizer) == expected
    for stated in ([[1, 2]], "abc", 1.5, {"a": 1}, ["1"], [1, [2]]):
        files = settings_of(folder, eos_token_id=stated)
        said = refusal(sd.end_tokens, files, tokenizer)
        assert said.startswith("cannot take eos_token_id ") and "write an id, or a list, in generation_conf" in said
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    assert sd.end_tokens(settings_of(folder), bare) == set()


@pytest.mark.parametrize("text", ["{", "[]", "null", "7", '{"cache_implementation": "nonsense"}'])
def test_a_broken_generation_config_is_one_line(tmp_path, text):
    folder = shutil.copytree(DRAFT, tmp_path / "draft")
    (folder / "generation_config.json").write_text(text)
    assert f"cannot read the generation_config.json of {folder}: " in refusal(read, folder)


# Weights


def test_a_model_on_the_disk_writes_the_same(tmp_path):
    """--device-map auto, with too little memory for it."""
    files = read(MAIN)
    spread = sd.load_model(files, CPU, sd.spread(CPU, "6MB", str(tmp_path)))
    assert "disk" in spread.hf_device_map.values()
    texts = [baseline(model, range(100, 110), new=4).token_ids for model in (spread, sd.load_model(files, CPU))]
    assert list(texts[0]) == list(texts[1])

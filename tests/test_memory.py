"""What is asked of memory before loading; how little prefill and the check need; and the cache of a compiled model."""

import contextlib
import json
import math
import weakref

import pytest
import torch
import transformers
from helpers import ROOT, SHAPE, baseline, counts_of, ids_of, like, make_model, sd, speculate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROMPT = [5, 9, 13, 2, 40]
LONG = [(7 * i * i + 3 * i) % 61 for i in range(1100)]
NEW = 12
BUNDLED = ROOT / "tests/tiny_gemma2"


# Before a model is loaded: its weights, a tenth more, and 1 GB.


def check_needs(files, weights, monkeypatch):
    """That a model needs what it does with so many bytes of weights, and not a kilobyte less."""
    for more, refused in ((1, False), (-1000, True)):
        monkeypatch.setattr(sd, "free_memory", lambda device, free=1.1 * weights + 1e9 + more: free)
        with pytest.raises(sd.UsageError, match="memory") if refused else contextlib.nullcontext():
            sd.check_memory(files, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_counted_by_their_type(dtype, monkeypatch):
    files = sd.read_model(str(BUNDLED / "main"), dtype)
    parameters = sum(weight.numel() for weight in sd.load_model(files, torch.device("cpu")).parameters())
    check_needs(files, parameters * dtype.itemsize, monkeypatch)


def test_of_a_quantised_model_the_files_are_counted(tmp_path, monkeypatch):
    """Those of its weights that are there, and no others."""
    config = json.loads((BUNDLED / "main/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    for name, size in (("model-1.safetensors", 20_000_000), ("model-2.safetensors", 30_000_000), ("other", 90_000_000)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    check_needs(sd.read_model(str(tmp_path), torch.bfloat16), 50_000_000, monkeypatch)


def test_too_little_memory_ends_the_run_for_a_main_model_and_is_a_row_for_a_draft(tmp_path, monkeypatch, capsys):
    """What is free is enough for the smaller model of the bundled pair."""
    small, large, out = str(BUNDLED / "draft"), str(BUNDLED / "main"), tmp_path / "out.json"
    monkeypatch.setattr(sd, "free_memory", lambda device: 1e9 + 5e6)
    monkeypatch.setattr(sd, "memory_bandwidth_gb_s", lambda device: 20.0)
    how = ["--prompts", str(BUNDLED / "prompts.txt"), "--limit", "1", "--max-new-tokens", "4", "--draft-tokens", "2"]
    assert sd.main(["--main", large, "--draft", small, *how]) == 2
    assert capsys.readouterr().err.count("too little memory") == 1
    assert sd.main(["--main", small, "--draft", f"{large},ngram", *how, "--json", str(out)]) == 1
    methods = {method["draft"]: method["error"] for method in json.loads(out.read_text())["methods"]}
    assert methods.pop(large).startswith("too little memory") and methods == {None: None, "ngram": None}


# What passes need, beside the weights.


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made within it held at one time."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given = {part.untyped_storage()._cdata for part in tree_leaves((args, kwargs)) if torch.is_tensor(part)}
        for part in tree_leaves(output):
            if torch.is_tensor(part) and (storage := part.untyped_storage())._cdata not in given:
                if storage not in self.known:
                    self.known.add(storage)
                    self.held += storage.nbytes()
                    weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return output

    def free(self, size):
        self.held -= size


@pytest.fixture(scope="module")
def wide():
    """A model of 20,000 tokens: a slice of 512 logits takes 41 MB, and all logits of 1,100 tokens 88 MB."""
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": 20_000, "max_position_embeddings": 2048, "num_hidden_layers": 1}
    return sd.CachedModel(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)))


def test_the_check_of_a_long_output_holds_few_slices_of_logits(wide):
    """Though it compares five passes: at most four and a half slices at a time, with what it computes of them."""
    output = tuple(LONG)
    with Allocated() as memory:
        divergence = sd.find_divergence(wide, tuple(PROMPT), output[:-1], output)
    assert (divergence.kind, divergence.index) == ("mismatch", len(LONG) - 1)
    assert 41e6 < memory.peak < 4.5 * 41e6


def test_prefill_makes_logits_of_the_last_token_alone(wide):
    expected = wide.model(ids_of(LONG), use_cache=False, logits_to_keep=1).logits[0]
    for cached in (wide, sd.CompiledModel(wide, len(LONG))):
        with Allocated() as memory:
            logits = cached.prefill(ids_of(LONG))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert 0 < memory.peak < 40e6


def llama4():
    attention = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 64}
    return transformers.Llama4TextConfig(**SHAPE, **attention, head_dim=8, num_local_experts=2, moe_layers=[])


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "mistral3", "gpt2", llama4])
def test_logits_in_slices_are_those_of_one_pass(family, monkeypatch):
    monkeypatch.setattr(sd, "SLICE", 7)
    model = make_model(family if isinstance(family, str) else family())
    main, text = sd.CachedModel(model, vocabulary=60), ids_of([*PROMPT, *LONG[:24]])
    slices = list(sd.logits_along(main, text, len(PROMPT)))
    assert [len(logits) for logits in slices] == [7, 7, 7, 3]
    expected = model(text[:, :-1], use_cache=False).logits[0, len(PROMPT) - 1 :, :60]
    torch.testing.assert_close(torch.cat(slices), expected, rtol=1e-4, atol=1e-4)


# A compiled model's prompts are read eagerly, and copied into its cache. Its steps are not compiled here: they run as
# they are, with the same cache.


@pytest.mark.parametrize("family", ["gemma2", "llama", "mistral", "gpt_oss", "gpt2"])
def test_a_cache_of_fixed_size_takes_over_a_prompt(family):
    """One prompt after the other; windows are 8 tokens. What was read eagerly is not kept."""
    model = make_model(family)
    draft, capacity = like(model, 0.05), 40 + NEW + 2
    main, helper = (sd.CompiledModel(sd.CachedModel(each), capacity) for each in (model, draft))
    storage = [part.data_ptr() for part in sd.keys_and_values(main.cache) + main.lengths]
    for length in (40, 3, 17, 1, 33):
        prompt = LONG[:length]
        logits = main.prefill(ids_of(prompt))
        torch.testing.assert_close(logits, sd.CachedModel(model).prefill(ids_of(prompt)), rtol=1e-3, atol=1e-4)
        assert {layer.get_seq_length().item() for layer in main.cache.layers} == {length}
        assert sd.keys_and_values(main.eager.cache) == []
        right = baseline(model, prompt, NEW).token_ids
        assert baseline(main, prompt, NEW).token_ids == right
        run, reference = speculate(main, helper, prompt, 3, NEW), speculate(model, draft, prompt, 3, NEW)
        assert (run.token_ids, counts_of(run)) == (right, counts_of(reference))
    assert storage == [part.data_ptr() for part in sd.keys_and_values(main.cache) + main.lengths]


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_it_is_copied_in_one_operation_whatever_the_number_of_layers(monkeypatch):
    main, prompt = sd.CompiledModel(sd.CachedModel(make_model("gemma2")), 40), ids_of(LONG[:30])
    logits = main.eager.prefill(prompt, rolls_back=False)
    monkeypatch.setattr(main.eager, "prefill", lambda ids, rolls_back: logits)
    with Counted() as counted:
        main.prefill(prompt)
    at_work = [name for name in counted.names if name not in ("slice", "detach", "tensor", "lift_fresh")]
    assert at_work == ["_foreach_zero_", "_foreach_zero_", "_foreach_copy_", "_foreach_add_"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("family", "attention"), [("gemma2", "eager"), ("llama", "sdpa")])
def test_what_is_not_finite_in_one_text_does_not_reach_the_next(family, attention, value):
    """Masked, its weight is 0; but 0 times infinity is NaN."""
    model = make_model(family)
    model.set_attn_implementation(attention)
    right = baseline(model, PROMPT, NEW).token_ids
    broken = next(token for token in range(61) if token not in (*PROMPT, *right))
    model.get_input_embeddings().weight.data[broken] = value
    main, draft = (sd.CompiledModel(sd.CachedModel(model), 64) for _ in range(2))
    for once in (baseline, lambda main, *prompt: speculate(main, draft, *prompt[:1], 3, NEW)):
        for cached in (main, draft):
            assert not cached.prefill(ids_of([*LONG[:50], broken])).isfinite().all()
            assert not torch.cat([part.view(-1) for part in sd.keys_and_values(cached.cache)]).isfinite().all()
        assert once(main, PROMPT, NEW).token_ids == right


def test_a_step_that_fails_half_way_leaves_nothing_for_the_next_text():
    model = make_model("llama")
    main, right = sd.CompiledModel(sd.CachedModel(model), 32), baseline(model, PROMPT, NEW).token_ids

    def fail(*_):
        raise RuntimeError("CUDA out of memory.")

    main.prefill(ids_of(LONG[:9]))
    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        main.step(sd.Greedy().sample, ids_of([3]))
    hook.remove()
    first, second = (layer.get_seq_length().item() for layer in main.cache.layers)
    assert first == second + 1  # the first layer has read it, the second has not
    assert baseline(main, PROMPT, NEW).token_ids == right

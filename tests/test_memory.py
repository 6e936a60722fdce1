"""Prefill in chunks; the check's memory; and how a compiled model takes over what was read eagerly."""

import math
import sys
import weakref

import pytest
import torch
import transformers
from helpers import FAMILIES, SHAPE, baseline, counts_of, ids_of, like, make_model, speculate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import speculative_decoding as sd

PROMPT = [5, 9, 13, 2, 40]
LONG = [(7 * i * i + 3 * i) % 61 for i in range(2100)]
CHUNK, NEW = 5, 12


def in_one_pass(model):
    main = sd.CachedModel(model)
    main.chunk = sys.maxsize
    return main


def count_passes(main, monkeypatch):
    """A list that grows by the number of tokens that each pass reads."""
    passes, forward = [], main.forward

    def counting(ids, logits_to_keep=0):
        passes.append(ids.shape[1])
        return forward(ids, logits_to_keep)

    monkeypatch.setattr(main, "forward", counting)
    return passes


# Prefill in chunks.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_read_in_chunks_is_read_as_a_whole(family, monkeypatch):
    """Windows are 8 tokens: chunks of 5 fill one, go past it, and end with a single token."""
    monkeypatch.setattr(sd, "PREFILL_CHUNK", CHUNK)
    model = make_model(family)
    draft, main, whole = like(model, 0.05), sd.CachedModel(model), in_one_pass(model)
    for length in (1, CHUNK, CHUNK + 1, 3 * CHUNK + 1, 40):
        prompt = LONG[:length]
        expected = whole.prefill(ids_of(prompt))
        for rolls_back in (True, False):
            torch.testing.assert_close(main.prefill(ids_of(prompt), rolls_back), expected, rtol=1e-3, atol=1e-4)
        right = baseline(whole, prompt, NEW).token_ids
        assert baseline(main, prompt, NEW).token_ids == right
        assert speculate(main, draft, prompt, 3, NEW).token_ids == right


@pytest.mark.parametrize("family", ["gemma2", "llama"])
@pytest.mark.parametrize("length", [1023, 1024, 1025, 2049])
def test_chunks_have_1024_tokens(family, length, monkeypatch):
    model, prompt = make_model(family), LONG[:length]
    main, whole = sd.CachedModel(model), in_one_pass(model)
    passes = count_passes(main, monkeypatch)
    for rolls_back in (True, False):
        passes.clear()
        logits = main.prefill(ids_of(prompt), rolls_back)
        assert passes == [1024] * ((length - 1) // 1024) + [(length - 1) % 1024 + 1]
        torch.testing.assert_close(logits, whole.prefill(ids_of(prompt)), rtol=1e-3, atol=1e-4)
    right = baseline(whole, prompt, NEW).token_ids
    assert baseline(main, prompt, NEW).token_ids == right
    assert speculate(main, like(model, 0.05), prompt, 3, NEW).token_ids == right


def test_a_window_that_is_recorded_does_not_grow_with_the_prompt(monkeypatch):
    monkeypatch.setattr(sd, "PREFILL_CHUNK", CHUNK)
    main = sd.CachedModel(make_model("gemma2"))
    for length in (2 * CHUNK, 10 * CHUNK, 10 * CHUNK + 1):
        main.prefill(ids_of(LONG[:length]))
        sliding, full = main.cache.layers
        assert (full.keys.shape[2], sliding.get_seq_length()) == (length, length)
        assert sliding.keys.shape[2] <= 7 + CHUNK
        # All of what was read since can be undone, and what is then read sees a whole window.
        expected = main.forward(ids_of([3]))
        main.roll_back(1)
        for tokens in (1, 4):
            main.forward(ids_of([1] * tokens))
            main.roll_back(tokens)
            torch.testing.assert_close(main.forward(ids_of([3])), expected, rtol=1e-4, atol=1e-4)
            main.roll_back(1)


def rotated(kind, nested):
    """A model whose rotary embedding depends on whether a text is longer than 16 tokens."""
    half = [float(i + 1) for i in range(4)]
    factors = {"long_factor": half, "short_factor": [1.0] * 4, "original_max_position_embeddings": 16}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 16.0, **(factors if kind == "longrope" else {})}
    shape = SHAPE | ({} if kind == "longrope" else {"max_position_embeddings": 16})
    if not nested:
        return transformers.LlamaConfig(**shape, rope_parameters=rope)
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
    rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    return transformers.Gemma3TextConfig(**shape, **layers, rope_parameters=rope)


@pytest.mark.parametrize(("kind", "nested"), [("longrope", False), ("dynamic", False), ("longrope", True)])
def test_a_rotation_that_depends_on_the_texts_length_is_read_in_one_pass(kind, nested, monkeypatch):
    monkeypatch.setattr(sd, "PREFILL_CHUNK", CHUNK)
    monkeypatch.setitem(FAMILIES, "rotated", lambda: rotated(kind, nested))
    main, prompt = sd.CachedModel(make_model("rotated")), ids_of(LONG[:40])
    passes = count_passes(main, monkeypatch)
    expected = main.model(prompt, use_cache=False).logits[0, -1:]
    torch.testing.assert_close(main.prefill(prompt), expected, rtol=1e-4, atol=1e-4)
    assert passes == [40]
    main.chunk = CHUNK
    assert (main.prefill(prompt) - expected).abs().max() > 1e-3  # chunks would be wrong


RECURRENT = {
    "mamba2": lambda: transformers.Mamba2Config(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=16, n_groups=1
    ),
    "jamba": lambda: transformers.JambaConfig(
        **SHAPE, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, num_experts=2
    ),
}


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_state_is_read_in_one_pass(family, monkeypatch):
    """The library's Mamba begins each pass of several tokens with an empty state."""
    monkeypatch.setattr(sd, "PREFILL_CHUNK", CHUNK)
    monkeypatch.setitem(FAMILIES, family, RECURRENT[family])
    main, prompt = sd.CachedModel(make_model(family)), ids_of(LONG[:33])
    passes = count_passes(main, monkeypatch)
    expected = main.model(prompt, use_cache=False).logits[0, -1:]
    torch.testing.assert_close(main.prefill(prompt, rolls_back=False), expected, rtol=1e-4, atol=1e-4)
    assert passes == [33]
    main.chunk = CHUNK
    assert (main.prefill(prompt, rolls_back=False) - expected).abs().max() > 0.01  # chunks would be wrong


# The check runs the layers once for each output, and never holds the logits of all of a long one.


def wrapped(family):
    """Configurations of models that are wrapped: with a vision tower, or without a decoder of their own."""
    if family == "llama4":  # its text model alone does not tell which of its parts are the layers
        attention = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 64}
        return transformers.Llama4TextConfig(**SHAPE, **attention, head_dim=8, num_local_experts=2, moe_layers=[])
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = FAMILIES["gemma3"]().to_dict() | {"pad_token_id": 0, "final_logit_softcapping": 5.0}
    return transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3 with images", "llama4"])
def test_logits_in_slices_are_those_of_one_pass(family, monkeypatch):
    monkeypatch.setattr(sd, "SLICE", 7)
    if family not in FAMILIES:
        monkeypatch.setitem(FAMILIES, family, lambda: wrapped(family))
    model, output = make_model(family), LONG[:24]
    main = sd.CachedModel(model, vocabulary=60)
    attention = next(module for module in model.get_decoder().modules() if "Attention" in type(module).__name__)
    before, calls = dict(vars(model.get_decoder())), []
    hook = attention.register_forward_hook(lambda *_: calls.append(1))
    slices = list(sd.sliced_logits(main, PROMPT, output))
    hook.remove()
    assert len(calls) == (4 if family == "llama4" else 1)
    assert [len(ids) for ids, _ in slices] == [7, 7, 7, 3]
    assert torch.cat([ids for ids, _ in slices]).tolist() == output
    expected = model(ids_of([*PROMPT, *output[:-1]]), use_cache=False).logits[0, len(PROMPT) - 1 :, :60]
    torch.testing.assert_close(torch.cat([logits for _, logits in slices]), expected, rtol=1e-4, atol=1e-4)
    assert vars(model.get_decoder()).keys() - before.keys() <= {"forward"}
    assert model.get_decoder().forward(ids_of(PROMPT))[0].shape[1] == len(PROMPT)  # and it reads other texts again


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_the_figures_do_not_depend_on_the_slices(family, monkeypatch):
    model = make_model(family, dtype=torch.bfloat16)
    main, found = sd.CachedModel(model), []
    wrong = (LONG[0], *baseline(model, PROMPT, 40).token_ids[1:])
    for size in (64, 7):
        monkeypatch.setattr(sd, "SLICE", size)
        found.append((sd.certify(main, PROMPT, wrong), sd.rounding_noise(main, PROMPT, wrong)))
    assert found[0][0] == pytest.approx(found[1][0], rel=0.05) and found[0][0] > 0.1
    assert found[1][1] / 2 < found[0][1] < found[1][1] * 2  # other random numbers, of the same size


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


def test_the_check_of_a_long_output_needs_little_memory():
    """2,000 new tokens and 50,000 ids: all logits once would be 400 MB."""
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": 50_000, "max_position_embeddings": 4096}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    main = sd.CachedModel(model)
    output = tuple(LONG[:2000])
    with Allocated() as memory:
        divergence = sd.find_divergence(main, PROMPT, output[:-1], output)
    assert (divergence.kind, divergence.index) == ("mismatch", 1999)
    assert 50e6 < memory.peak < 300e6


# A compiled model's prompts are read eagerly, and copied.


def compiled(model, capacity=96):
    """Its steps are not compiled here: they run as they are, with the same cache."""
    return sd.CompiledModel(model, None, None, capacity)


@pytest.mark.parametrize("family", ["gemma2", "llama", "mistral", "gemma3", "gpt2"])
def test_a_cache_of_fixed_size_takes_over_a_prompt(family, monkeypatch):
    monkeypatch.setattr(sd, "PREFILL_CHUNK", 16)
    model = make_model(family)
    draft = like(model, 0.05)
    main, helper = compiled(model), compiled(draft)
    storage = [part.data_ptr() for part in sd.keys_and_values(main.cache) + main.lengths]
    for length in (40, 3, 17, 1, 33):
        prompt = LONG[:length]
        torch.testing.assert_close(
            main.prefill(ids_of(prompt)), in_one_pass(model).prefill(ids_of(prompt)), rtol=1e-3, atol=1e-4
        )
        assert {layer.get_seq_length().item() for layer in main.cache.layers} == {length} == {main.cache.filled}
        right = baseline(model, prompt, NEW).token_ids
        assert baseline(main, prompt, NEW).token_ids == right
        run, reference = speculate(main, helper, prompt, 3, NEW), speculate(model, draft, prompt, 3, NEW)
        assert run.token_ids == right
        assert counts_of(run) == counts_of(reference)
    assert storage == [part.data_ptr() for part in sd.keys_and_values(main.cache) + main.lengths]


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_it_is_copied_in_one_operation_whatever_the_number_of_layers(monkeypatch):
    main, prompt = compiled(make_model("gemma2")), ids_of(LONG[:30])
    logits = main.eager.prefill(prompt, rolls_back=False)
    monkeypatch.setattr(main.eager, "prefill", lambda ids, rolls_back: logits)
    with Counted() as counted:
        main.prefill(prompt)
    at_work = [name for name in counted.names if name not in ("slice", "detach", "tensor", "lift_fresh")]
    assert at_work == ["_foreach_zero_", "_foreach_zero_", "_foreach_copy_", "_foreach_add_"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("family", "attention"), [("gemma2", "eager"), ("llama", "eager"), ("llama", "sdpa")])
def test_what_is_not_finite_in_one_text_does_not_reach_the_next(family, attention, value):
    """Masked, its weight is 0; but 0 times infinity is NaN."""
    model = make_model(family)
    model.set_attn_implementation(attention)
    right = baseline(model, PROMPT, NEW).token_ids
    broken = next(token for token in range(61) if token not in (*PROMPT, *right))
    model.get_input_embeddings().weight.data[broken] = value
    main, draft = compiled(model), compiled(model)
    for text in ([broken] * 30, [*LONG[:50], broken]):
        for once in (baseline, lambda main, *prompt: speculate(main, draft, *prompt[:1], 3, NEW)):
            for cached in (main, draft):
                assert not cached.prefill(ids_of(text)).isfinite().all()
                assert not torch.cat([part.view(-1) for part in sd.keys_and_values(cached.cache)]).isfinite().all()
            assert once(main, PROMPT, NEW).token_ids == right


def test_a_step_that_fails_half_way_leaves_nothing_for_the_next_text():
    model = make_model("llama")
    main, right = compiled(model), baseline(model, PROMPT, NEW).token_ids
    layer = model.model.layers[1]

    def fail(*_):
        raise RuntimeError("CUDA out of memory.")

    main.prefill(ids_of(LONG[:9]))
    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        main.step(sd.Greedy().sample, ids_of([3]))
    hook.remove()
    first, second = (layer.get_seq_length().item() for layer in main.cache.layers)
    assert first == second + 1  # the first layer has read it, the second has not
    assert baseline(main, PROMPT, NEW).token_ids == right

"""Recurrent and hybrid models: exact as main model and as draft, or refused in one line."""

import copy

import pytest
import torch
import transformers
from helpers import PLAIN, SHAPE, VOCABULARY, Scripted, baseline, counts_of, ids_of, like, make_model, sd, speculate

DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
DELTA["layer_types"] = ["linear_attention", "full_attention"]
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
QWEN = {"head_dim": 8, "shared_expert_intermediate_size": 16, "num_experts": 4, **EXPERTS}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
FULL_HEADS = {**SHAPE, "num_key_value_heads": 4}
ZAMBA = {"mamba_d_state": 8, "n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid"]}
NEVER_CLAMPED = {"time_step_min": 1e-9}  # the library clamps time steps in passes of several tokens, not of one
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}
KIMI = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_local_experts": 4}
KIMI |= {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
KIMI |= {"mlp_layer_types": ["dense", "sparse"]}
ZAYA = {
    "layer_types": ["hybrid", "hybrid_sliding"],
    "sliding_window": 8,
    "head_dim": 8,
    "num_experts": 4,
}  # with states
ZAYA |= {"moe_intermediate_size": 16, "router_hidden_size": 16}
DEEPSEEK = {**EXPERTS, "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "n_routed_experts": 4}
DEEPSEEK |= {"num_attention_heads": 4, "head_dim": 16, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8}
DEEPSEEK |= {"partial_rotary_factor": 0.5, "hc_mult": 2, "sliding_window": 8, "max_position_embeddings": 256}
DEEPSEEK |= {
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
}  # chosen from fewer, or a pass's length matters
DEEPSEEK |= {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 6}}
COMPRESSED = ["sliding", "heavily_compressed", "compressed_sparse", "heavily_compressed"]
DEEPSEEK |= {"layer_types": [f"{kind}_attention" for kind in COMPRESSED], "mlp_layer_types": ["moe"] * 4}
HYBRIDS = {
    "qwen3_5_text": lambda: transformers.Qwen3_5TextConfig(**SHAPE, **DELTA, head_dim=8),
    "qwen3_5_moe_text": lambda: transformers.Qwen3_5MoeTextConfig(**SHAPE, **DELTA, **QWEN),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**SHAPE, **DELTA, **QWEN),
    "bamba": lambda: transformers.BambaConfig(**SHAPE, **MAMBA, attn_layer_indices=[1]),
    "falcon_h1": lambda: transformers.FalconH1Config(**SHAPE, **MAMBA, mamba_d_ssm=64),
    "nemotron_h": lambda: nemotron_h(**NEVER_CLAMPED),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **SHAPE, **MAMBA, layer_types=["mamba", "attention"], num_local_experts=4, shared_intermediate_size=16
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        **PLAIN, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8
    ),
    "zamba2": lambda: transformers.Zamba2Config(**FULL_HEADS, **ZAMBA, chunk_size=8, **NEVER_CLAMPED),
    "olmo_hybrid": lambda: transformers.OlmoHybridConfig(**SHAPE, **DELTA),
    "lfm2": lambda: transformers.Lfm2Config(**SHAPE, **CONVOLUTIONS),
    "lfm2_moe": lambda: transformers.Lfm2MoeConfig(
        **SHAPE, **EXPERTS, **CONVOLUTIONS, num_dense_layers=1, num_experts=4
    ),
    "kimi_linear": lambda: transformers.KimiLinearConfig(**FULL_HEADS, **EXPERTS, **KIMI),
    "zaya": lambda: transformers.ZayaConfig(**SHAPE, **ZAYA),
    "deepseek_v4": lambda: transformers.DeepseekV4Config(**DEEPSEEK),
}
# Mamba 1, as the library has it, begins each pass of several tokens with an empty state; Recurrent Gemma and RWKV keep
# no state in the library's cache, and MiniMax takes a cache of its own.
REFUSED = {
    "jamba": lambda: transformers.JambaConfig(
        **SHAPE, mamba_d_state=8, num_experts=2, attn_layer_period=2, attn_layer_offset=1
    ),
    "mamba": lambda: transformers.MambaConfig(**PLAIN, state_size=8),
    "nemotron_h_clamped": lambda: nemotron_h(),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
        **SHAPE | {"num_hidden_layers": 3, "num_key_value_heads": 1}
    ),
    "rwkv": lambda: transformers.RwkvConfig(**PLAIN),
    "minimax": lambda: transformers.MiniMaxConfig(**SHAPE, layer_types=["linear_attention", "full_attention"]),
}
PROMPTS = [[5], [7, 3, 9, 2, 11, 4, 8, 1, 30, 31, 32, 33], list(range(3, 40))]
NEW = 16


def nemotron_h(**more):
    shape = {**SHAPE, "layers_block_type": ["mamba", "mlp", "attention", "mamba"], "head_dim": 8, "chunk_size": 8}
    del shape["num_hidden_layers"]
    return transformers.NemotronHConfig(
        **shape, ssm_state_size=8, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, **more
    )


def without_cache(model, prompt, new=NEW):
    """Greedy decoding that reads the whole text anew for each token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(new):
            ids.append(model(ids_of(ids), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def logits_without_cache(main, text, count):
    """The logits of the last so many tokens of a text (0: of all), by a pass that has no cache."""
    with torch.no_grad():
        return main.model(text, use_cache=False).logits[0, -count:]


@pytest.fixture(scope="session")
def hybrid(request):
    """A random model, what decodes with it, its noisy copy as a draft, and its own greedy texts."""
    model = make_model(HYBRIDS[request.param]())
    noise = 0.12 if request.param.startswith("lfm2") else 0.06
    draft = sd.cached_model(like(model, noise))
    return model, sd.cached_model(model), draft, [without_cache(model, prompt) for prompt in PROMPTS]


def over(*names):
    return pytest.mark.parametrize("hybrid", names, indirect=True)


@over(*HYBRIDS)
def test_speculative_output_is_that_of_a_loop_without_any_cache(hybrid):
    _, main, draft, texts = hybrid
    for draft_tokens in (1, 4):
        runs = [speculate(main, draft, prompt, draft_tokens, NEW) for prompt in PROMPTS]
        assert [list(run.token_ids) for run in runs] == texts
        rounds = [one for run in runs for one in run.rounds]
        assert 0.1 < sum(one.accepted for one in rounds) / sum(one.drafted for one in rounds) < 0.9
    assert [list(baseline(main, prompt, NEW).token_ids) for prompt in PROMPTS] == texts


@over("qwen3_next", "mamba2", "zamba2", "zaya")
def test_sampled_tokens_are_drawn_from_the_distributions_of_a_pass_without_a_cache(hybrid):
    _, main, draft, _ = hybrid
    targets = []

    class Recording(sd.Sampling):
        def accept(self, target, draft_ids, q):
            tokens = super().accept(target, draft_ids, q)
            targets.append(target[: len(tokens)])
            return tokens

    sampler = Recording(0.05, seed=3)  # random models have flat logits
    run = speculate(main, draft, PROMPTS[2], 3, NEW, sampler=sampler)
    assert 0 < sum(one.accepted for one in run.rounds) < sum(one.drafted for one in run.rounds)
    text = ids_of([*PROMPTS[2], *run.token_ids[:-1]])
    wanted = sampler.distribution(logits_without_cache(main, text, NEW))[1:]
    torch.testing.assert_close(torch.cat(targets)[: NEW - 1], wanted, atol=1e-4, rtol=0)


@over(*HYBRIDS)
def test_the_check_of_reading_accepts_it_in_every_type(hybrid):
    """Some (Mamba 2, Nemotron H) return logits in float32, whatever their weights are."""
    for dtype in (torch.float32, torch.bfloat16):
        sd.check_reading(copy.deepcopy(hybrid[0]).to(dtype), "m", torch.device("cpu"))


@over("qwen3_next")
@pytest.mark.parametrize("most_unread", [0, 100])
def test_accepted_tokens_are_read_again_by_themselves_or_with_the_next(hybrid, most_unread, monkeypatch):
    _, main, draft, texts = hybrid
    monkeypatch.setattr(main, "MOST_UNREAD", most_unread)
    widths = []
    read = main.read
    monkeypatch.setattr(main, "read", lambda ids, keep: (widths.append(ids.shape[1]), read(ids, keep))[1])
    run = speculate(main, draft, PROMPTS[1], 3, NEW)
    assert list(run.token_ids) == texts[1]
    rejected = sum(one.accepted < one.drafted for one in run.rounds[:-1])
    assert rejected
    passes = 1 + len(run.rounds)
    assert len(widths) == (passes + rejected if most_unread == 0 else passes)
    assert max(widths[1:]) > 4 if most_unread else max(widths[1:]) == 4


@over("qwen3_5_text", "mamba2", "zaya")
def test_a_draft_that_rests_catches_up(hybrid):
    _, main, draft, texts = hybrid
    for prompt, text in zip(PROMPTS, texts, strict=True):
        for helper in (draft, sd.cached_model(main.model)):
            run = speculate(main, helper, prompt, Scripted([0, 0, 0, 3]), NEW)
            assert list(run.token_ids) == text
            assert [drafted for drafted, _ in counts_of(run)][:8] == [0, 0, 0, 3] * 2
            if helper is not draft:  # perfect, also behind a rest
                assert all(accepted == drafted for drafted, accepted in counts_of(run))


@over("bamba", "kimi_linear", "mamba2", "zaya", "deepseek_v4")
@pytest.mark.parametrize("prompt_tokens", [0, 20])
def test_a_roll_back_goes_to_any_token_since_the_last_one(hybrid, prompt_tokens):
    _, main, _, _ = hybrid
    text = ids_of(PROMPTS[2])[:, : prompt_tokens + 8]
    plain = logits_without_cache(main, text, 0)
    for kept in range(8):
        main.reset()
        if prompt_tokens:
            logits = main.prefill(text[:, :prompt_tokens])
            torch.testing.assert_close(logits[0], plain[prompt_tokens - 1], atol=1e-4, rtol=0)
        main.forward(text[:, prompt_tokens : prompt_tokens + 2])
        for place in range(prompt_tokens + 2, prompt_tokens + 7):
            main.forward(text[:, place, None])
        main.roll_back(7 - kept)
        assert not main.saved  # no copies of states are left
        logits = main.forward(text[:, prompt_tokens + kept :])
        torch.testing.assert_close(logits, plain[prompt_tokens + kept :], atol=1e-4, rtol=0)


def test_a_model_without_a_state_or_with_short_convolutions_is_cropped(llama):
    assert type(sd.cached_model(make_model(HYBRIDS["lfm2"]()))) is sd.CachedModel
    assert type(sd.cached_model(llama, None, 50)) is sd.CachedModel


SEEN = [(name, dtype) for name in REFUSED for dtype in (torch.float32, torch.bfloat16)]
SEEN.remove(("nemotron_h_clamped", torch.bfloat16))  # what the clamp changes is less than rounding


@pytest.mark.parametrize(("name", "dtype"), SEEN)
def test_a_model_that_does_not_go_back_is_refused_in_one_line(name, dtype):
    with pytest.raises(sd.UsageError, match=f"{name} .*cache") as refused:
        sd.check_reading(make_model(REFUSED[name](), dtype=dtype), name, torch.device("cpu"))
    assert "\n" not in str(refused.value)

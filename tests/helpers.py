"""Real models for the tests, small random ones of many architectures, and what decodes with them."""

import copy
import functools
import os
import pathlib
import sys

import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tests run in several processes, whose threads would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"

import speculative_decoding as sd  # noqa: E402

VOCABULARY = 61
PLAIN = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
SHAPE = {**PLAIN, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
SHAPE |= {"max_position_embeddings": 256, "pad_token_id": 0}
GPT2_SHAPE = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
WINDOW = {"sliding_window": 8}  # far shorter than the texts
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}

FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, **WINDOW),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, **ALTERNATING, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SHAPE, **ALTERNATING, head_dim=8),
    "phi": lambda: transformers.PhiConfig(**SHAPE),
    "phi3": lambda: transformers.Phi3Config(**SHAPE, **WINDOW),
    "opt": lambda: transformers.OPTConfig(**PLAIN, word_embed_proj_dim=32, num_attention_heads=4, ffn_dim=48),
    "gpt2": lambda: transformers.GPT2Config(**GPT2_SHAPE),
    "gptj": lambda: transformers.GPTJConfig(**GPT2_SHAPE, rotary_dim=4),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(**GPT2_SHAPE),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(**PLAIN, num_attention_heads=4),
    "cohere": lambda: transformers.CohereConfig(**SHAPE),
    "cohere2": lambda: transformers.Cohere2Config(**SHAPE, **ALTERNATING),
    "olmo": lambda: transformers.OlmoConfig(**SHAPE),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
    "granite": lambda: transformers.GraniteConfig(**SHAPE),
    "stablelm": lambda: transformers.StableLmConfig(**SHAPE),
    "starcoder2": lambda: transformers.Starcoder2Config(**SHAPE, **WINDOW),
    "gpt_oss": lambda: transformers.GptOssConfig(**SHAPE, **ALTERNATING, head_dim=8, num_local_experts=4),
    "mistral3": lambda: mistral3(transformers.MistralConfig(**SHAPE, **WINDOW, head_dim=8)),
    "mistral3_scaled": lambda: mistral3(transformers.Ministral3Config(**SHAPE | SCALED, head_dim=8)),
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
YARN |= {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
SCALED = {"rope_parameters": YARN, "max_position_embeddings": 64}  # behind the 16th token, queries are scaled, too


def mistral3(text):
    """A model for images and text with a tiny vision tower."""
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=2)


def make_model(family, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A random model of a family, or of a configuration, with weights large enough that its greedy text is varied."""
    torch.manual_seed(seed)
    config = FAMILIES[family]() if isinstance(family, str) else family
    for each in (config, config.get_text_config()):
        each.tie_word_embeddings = False  # tied, random models repeat one token for ever
        each.bos_token_id = each.eos_token_id = None
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    model = next(kind for kind in kinds if type(config) in kind._model_mapping).from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight is model.get_input_embeddings().weight:
                weight.normal_(0, 1)
            elif weight.dim() > 1 and weight is not model.get_output_embeddings().weight:
                weight.normal_(0, 2 / weight.shape[-1] ** 0.5)
    return model.to(dtype)


def like(model, noise: float, seed: int = 1):
    """A draft for a model: its copy with noise on the weights, so that it is right as often as the noise is small."""
    draft = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn_like(weight) * weight.std() * noise if weight.numel() > 1 else 0)
    return draft


def with_more_tokens(model, tokens=80):
    """A model with further tokens at the end of its vocabulary, as likely as the others."""
    model, known = copy.deepcopy(model), model.config.vocab_size
    model.resize_token_embeddings(tokens, mean_resizing=False)
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[known:].normal_(0, layer.weight[:known].std().item())
    return model


def always_wrong(model):
    """A draft that never chooses what the model chooses: its copy, with the rows of the output layer moved by one."""
    draft = copy.deepcopy(model)
    head = draft.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().roll(1, dims=0))
    return draft


def ids_of(tokens):
    """Token ids as a model reads them: [1, n]."""
    return torch.tensor([list(tokens)])


def prompt_of(tokens, number=0, new=32, end=frozenset()):
    return sd.Question("?", number, ids=tuple(tokens), max_new_tokens=new, end_ids=frozenset(end))


def generation_of(tokens, latency=1.0, first=None, rounds=(), log_likelihood=0.0):
    """A generation as if it had been measured; rounds: (drafted, accepted[, draft_s, verify_s, seconds]) of each."""
    return sd.Generation(tuple(tokens), latency, first, tuple(sd.Round(*each) for each in rounds), log_likelihood)


def counts_of(run):
    """(drafted, accepted) of each round."""
    return [(each.drafted, each.accepted) for each in run.rounds]


def baseline(model, prompt, new=32, end=frozenset(), sampler=None, number=0):
    """The baseline's generation for a prompt; `model`: the library's, or one with a cache."""
    model = model if isinstance(model, sd.CachedModel) else sd.CachedModel(model)
    return sd.decode_autoregressively(model, sampler or sd.Greedy(), prompt_of(prompt, number, new, end))


def speculate(main, draft, prompt, schedule, new=32, end=frozenset(), sampler=None, number=0):
    """Speculative decoding; `draft`: a model of either kind, a Draft or "ngram"; `schedule`: a number or a schedule."""
    sampler = sampler or sd.Greedy()
    main = main if isinstance(main, sd.CachedModel) else sd.CachedModel(main)
    if draft == "ngram":
        draft = sd.NgramDraft(main.device)
    elif not isinstance(draft, sd.Draft):
        draft = sd.ModelDraft(draft if isinstance(draft, sd.CachedModel) else sd.CachedModel(draft), sampler)
    schedule = sd.FixedSchedule(schedule) if isinstance(schedule, int) else schedule
    return sd.decode_speculatively(main, draft, sampler, schedule, prompt_of(prompt, number, new, end))


class Scripted(sd.FixedSchedule):
    """Drafts as many tokens in each round as a list says, again and again; notes what it is told."""

    def __init__(self, lengths, widths=()):
        super().__init__(lengths[0], widths)
        self.lengths, self.learnt = lengths, []

    def learn(self, drafted, accepted):
        self.learnt.append((drafted, accepted))
        self.draft_tokens = self.lengths[len(self.learnt) % len(self.lengths)]


class Watched(sd.CachedModel):
    """Notes how many tokens it reads in each pass, and how many its cache holds after each roll-back."""

    def reset(self, rolls_back=True):
        super().reset(rolls_back)
        self.passes, self.held = [], []

    def forward(self, ids, logits_to_keep=0):
        self.passes.append(ids.shape[1])
        return super().forward(ids, logits_to_keep)

    def roll_back(self, tokens):
        super().roll_back(tokens)
        self.held.append(self.cache.get_seq_length())


@functools.cache
def pair_of(family, noise):
    """A random model of a family, and a draft that is right as often as the noise is small: made once for all tests."""
    model = make_model(family)
    return model, like(model, noise)


@functools.cache
def bundled():
    """The bundled pair, and the ids of its own prompts."""
    load, folder = transformers.AutoModelForCausalLM.from_pretrained, ROOT / "tests" / "tiny_gemma2"
    template = transformers.AutoTokenizer.from_pretrained(folder / "main").apply_chat_template
    ask = functools.partial(template, add_generation_prompt=True, return_dict=False)
    lines = [line for line in (folder / "prompts.txt").read_text().splitlines() if not line.startswith("#")]
    prompts = [ask([{"role": "user", "content": line}]) for line in lines]
    return load(folder / "main").float(), load(folder / "draft").float(), prompts

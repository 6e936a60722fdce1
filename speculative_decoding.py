#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch~=2.13.0", "transformers~=5.23.0", "accelerate~=1.15.0", "huggingface_hub~=2.4", "numpy~=2.0",
#   "psutil~=7.0", "rich~=15.0"]
# ///
"""Which draft pays for this main model on this machine, how much, and is the output still the main model's own?

    python speculative_decoding.py                       gemma-2-9b-it and gemma-2-2b-it on the GPU, prompts.txt
    python speculative_decoding.py --demo                a bundled pair of tiny models: anywhere, offline, in seconds
    python speculative_decoding.py --main A --draft B,C,ngram --prompts my.txt

A large language model generates text by *autoregressive decoding*: one forward pass for each token, and most of a pass
is spent reading the weights from memory. To read them once for five tokens takes hardly longer than for one. This is
what speculative decoding uses (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). A small
*draft model* proposes K *draft tokens*, one after the other. The large *main model* (or target model) *verifies* them
in one forward pass, which gives its own choice at K + 1 positions, each behind the draft tokens before it. Draft tokens
are *accepted* while they are what the main model chose; the first that is not is *rejected*, and the main model's own
token takes its place. If all are accepted, the pass has yielded one token more, the *bonus token*.

    the text so far             The capital of France is
    draft tokens, K = 4         Paris , which is
    the main model's choices    Paris . which is also           (one pass, K + 1 positions)
    emitted                     Paris .                         (one accepted draft token, one of its own)

The text is what the main model would have generated alone, whatever the draft; a bad draft only costs time. Two figures
say how good a draft is: the *acceptance rate*, accepted / drafted tokens, and the *mean acceptance length*, the tokens
that a pass of the main model yields. With sampling (--temperature), a draft token x is accepted with probability min(1,
p(x) / q(x)), and after a rejection the next token is drawn from the *residual distribution*: the text has exactly the
main model's distribution. Each model has a *KV cache*, the attention's keys and values of all tokens that it has read;
what it holds of rejected tokens is removed by rolling it back.

Begin with part 1, and read on; parts 1 to 5 are the whole algorithm:

     1  a model with a KV cache that can be rolled back      7  compiled steps, and further kinds of models and drafts
     2  tokens from logits: greedy, or sampled               8  the benchmark: raw records of what was measured
     3  autoregressive decoding, the baseline                9  figures, computed from these records
     4  speculative decoding                                10  the report: tables, sentences, JSON
     5  is it lossless?                                     11  loading: prompts, devices, models
     6  how many tokens to draft                            12  the run: prepare, measure, report

Part 0 holds the options; it stands before the imports, so that --help need not wait for them.

What is deliberately not here: batches of more than one text, and trees of draft tokens.
"""

import argparse
import bisect
import contextlib
import copy
import dataclasses
import datetime
import functools
import inspect
import itertools
import json
import logging
import math
import operator
import os
import pathlib
import platform
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import timeit
import unicodedata
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# ruff: noqa: E402

# 0  Options -----------------------------------------------------------------------------------------------------------

DEFAULT_MAIN, DEFAULT_DRAFT = "google/gemma-2-9b-it", "google/gemma-2-2b-it"
HERE = pathlib.Path(__file__).resolve().parent
BUNDLED = HERE / "tests" / "tiny_gemma2"
# One process, or those that torchrun or `accelerate launch` started: the prompts are dealt out to them.
RANK, PROCESSES = 0, 1
if os.environ.get("RANK", "").isdigit() and os.environ.get("WORLD_SIZE", "").isdigit():
    RANK, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class UsageError(Exception):
    """The program cannot do what was asked; the message is one line that says what is wrong and how to mend it."""


def safe(text: str) -> str:
    """Text from outside that is safe to print: � instead of escapes, bidirectional overrides, zero-width marks, …"""
    unsafe = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, format, surrogate, private, unassigned, separators
    return "".join("�" if unicodedata.category(char) in unsafe and char != "\n" else char for char in text)


def plain(text: str) -> str:
    """The same as one line."""
    return safe(" ".join(text.split()))


def number_from(kind: type, least: float, most: float, what: str) -> Callable[[str], float]:
    """An argparse type: a number from `least` to `most`."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return convert


NATURAL = number_from(int, 0, 2**40, "a whole number of at least 0")
POSITIVE = number_from(int, 1, 2**40, "a whole number of at least 1")
DRAFT_TOKENS = number_from(int, 1, 1000, "auto, or a number from 1 to 1000, or several with commas between them")


def draft_lengths(text: str) -> tuple[int | str, ...]:
    """An argparse type: auto, a number, or several of these with commas between them."""
    return tuple(dict.fromkeys("auto" if part == "auto" else DRAFT_TOKENS(part) for part in text.split(",")))


def draft_names(text: str) -> tuple[str, ...]:
    """An argparse type: a model, ngram, ngram+MODEL, or several of these with commas between them."""
    names = (text,) if os.path.isdir(text) else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if all(name.removeprefix("ngram+") for name in names):
        return names
    raise argparse.ArgumentTypeError(f"{text!r}: name a model, ngram, ngram+MODEL, or several with commas between them")


def template_arguments(text: str) -> dict:
    """An argparse type: a JSON object, arguments of the chat template; without NaN, as it is written as JSON again."""
    with contextlib.suppress(ValueError, RecursionError):
        json.dumps(given := json.loads(text), allow_nan=False)
        if isinstance(given, dict):
            return given
    raise argparse.ArgumentTypeError(f'{text!r} is no JSON object for the template, as {{"enable_thinking": false}}')


def option(group: str, default: Any, help: str, **how: Any) -> Any:
    """A field of Settings; `how`: further arguments of argparse's add_argument, such as its type and metavar."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **how})


PAIR, DECODE, PLACE, SHOW = "the pair and the prompts", "how to decode", "where to decode", "what to measure and show"
TEMPERATURE = number_from(float, 0, 100, "a number from 0 to 100")
PROBABILITY = number_from(float, 1e-6, 1, "a number above 0, up to 1")
DTYPES = ("auto", "float32", "bfloat16", "float16")
FLAG = {"action": "store_true"}
DRAFTS_HELP = f"a smaller model, ngram (no model), ngram+MODEL, or several: A,B,ngram (default: {DEFAULT_DRAFT})"
TEMPLATE_HELP = """of the chat template, e.g. '{"enable_thinking": false}'"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every option once: its name, type, default, check and help. `parse` makes the parser from these fields.

    `resolve_settings`, in part 12, replaces what is left open here (None, "auto") by what this machine has.
    """

    main: str | None = option(PAIR, None, f"Hugging Face id or local folder (default: {DEFAULT_MAIN})", metavar="MODEL")
    draft: tuple[str, ...] | None = option(PAIR, None, DRAFTS_HELP, metavar="MODEL", type=draft_names)
    demo: bool = option(PAIR, False, "the bundled pair and its own prompts, offline, in seconds", **FLAG)
    prompts: str | None = option(PAIR, None, "one a line, or .jsonl, .json (default: prompts.txt)", metavar="FILE")
    limit: int | None = option(PAIR, None, "take N questions, from all categories alike", metavar="N", type=POSITIVE)
    no_chat_template: bool = option(PAIR, False, "feed the prompts as they are", **FLAG)
    chat_template_args: dict | None = option(PAIR, None, TEMPLATE_HELP, metavar="JSON", type=template_arguments)

    max_new_tokens: int = option(DECODE, 128, "default: 128", metavar="N", type=POSITIVE)
    ignore_eos: bool = option(DECODE, False, "generate exactly N tokens, past the end of a text", **FLAG)
    draft_tokens: tuple[int | str, ...] = option(
        DECODE,
        ("auto",),
        "of a round: auto (the default), a number, or several: 1,2,4",
        metavar="K",
        type=draft_lengths,
    )
    temperature: float = option(DECODE, 0.0, "sample (default: 0, greedy)", metavar="T", type=TEMPERATURE)
    top_k: int = option(DECODE, 0, "sample from the N likeliest (default: 0, all)", metavar="N", type=NATURAL)
    top_p: float = option(
        DECODE, 1.0, "from the likeliest that add up to P (default: 1)", metavar="P", type=PROBABILITY
    )
    seed: int = option(DECODE, 0, "of the random numbers (default: 0)", metavar="S", type=NATURAL)

    compile: str = option(PLACE, "auto", "compile the steps (auto: on CUDA)", choices=("auto", "on", "off"))
    device: str = option(PLACE, "auto", "cpu, cuda, cuda:1, mps, … (default: a GPU, else cpu)", metavar="D")
    dtype: str = option(PLACE, "auto", "default: bfloat16 on a GPU, float32 on a CPU", choices=DTYPES)
    device_map: str | None = option(PLACE, None, "spread the main model: GPUs, CPU and disk", choices=("auto",))
    max_memory: str | None = option(PLACE, None, "of that, on the first device: at most, e.g. 10GB", metavar="SIZE")

    compare: str | None = option(
        SHOW, None, "also measure its generate(), alone and assisted", choices=("transformers",)
    )
    repeats: int = option(SHOW, 1, "of each run; the median counts (default: 1)", metavar="N", type=POSITIVE)
    warmup: int = option(SHOW, 1, "runs of each before any counts (default: 1)", metavar="N", type=NATURAL)
    show_text: bool = option(SHOW, False, "print the texts, each token by where it comes from", **FLAG)
    json: str | None = option(SHOW, None, "write all that was measured", metavar="FILE")
    svg: str | None = option(SHOW, None, "write the report as a picture", metavar="FILE")


def find_contradiction(given: Settings) -> str | None:
    """What two options contradict each other, and how to mend it: all such rules are here."""
    outputs = [os.path.realpath(path) for path in (given.json, given.svg) if path]
    read = (given.prompts or "prompts.txt", HERE / "prompts.txt", BUNDLED / "prompts.txt")
    prompts = [os.path.realpath(path) for path in read if outputs]
    rules = (
        (given.demo and given.main, "--demo brings its own main model: leave out --main, or --demo"),
        (
            given.temperature == 0 and (given.top_k or given.top_p < 1),
            "--top-k and --top-p cut what tokens are sampled from: add a --temperature",
        ),
        (0 < given.temperature < 0.001, "--temperature is 0 or at least 0.001: less is rounded away"),
        (
            given.no_chat_template and given.chat_template_args,
            "--no-chat-template leaves no template for --chat-template-args: leave out one of them",
        ),
        (
            given.device_map and given.compile == "on",
            "--device-map auto moves weights while it runs, which cannot be compiled: leave out --compile on",
        ),
        (
            given.max_memory and not given.device_map,
            "--max-memory says how --device-map auto spreads the main model: add that",
        ),
        (
            len(set(outputs)) < len(outputs) or set(outputs) & set(prompts),
            "--json and --svg need files of their own, which are not the prompts'; name others",
        ),
    )
    return next((message for applies, message in rules if applies), None)


def parse(arguments: list[str] | None) -> Settings:
    """The options, as given. A bad one ends the program with one line and status 2."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        allow_abbrev=False,
        description=(__doc__ or "").partition("\n")[0],
        epilog="With no accelerator and no model named, the bundled pair of tiny models runs, as with --demo. Exit "
        "status: 0 all well; 1 some prompt failed, or some output is not the main model's own; 2 it could not run; "
        "130 interrupted.",
    )
    parser.error = lambda message: parser.exit(2, f"error: {plain(message)}; see --help\n")
    for name, fields in itertools.groupby(dataclasses.fields(Settings), lambda field: field.metadata["group"]):
        group = parser.add_argument_group(name)
        for field in fields:
            how = {key: value for key, value in field.metadata.items() if key != "group"}
            group.add_argument("--" + field.name.replace("_", "-"), default=field.default, **how)
    settings = Settings(**vars(parser.parse_args(arguments)))
    if contradiction := find_contradiction(settings):
        parser.error(contradiction)
    return settings


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quietly, also while it imports
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by the shell: nobody reads it
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for terminals and files that lack a character of the report
    parse(None)  # --help and mistakes are answered before the imports, which take seconds

import huggingface_hub
import numpy
import psutil
import torch
import transformers
from huggingface_hub import errors as hub_errors
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pad
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

# 1  A model with a KV cache that can be rolled back -------------------------------------------------------------------

PREFILL_CHUNK = 1024  # tokens that a prefill reads in one pass
ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)  # layers of a cache; the last uses another's


class CachedModel:
    """A causal language model, and its KV cache of one text: the keys and values of all tokens that it has read.

    Every forward pass appends to the cache. `roll_back` removes the latest tokens again: that is how rejected draft
    tokens are undone without reading the text anew.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int | None = None, device: torch.device | None = None):
        """`vocabulary`: logits are cut to so many tokens. `device`: of its inputs, if its weights are on several."""
        self.model, self.vocabulary = model.eval().requires_grad_(False), vocabulary
        self.device = device or model.device
        config = model.config.get_text_config()
        # With full and sliding attention (not with chunked), a single token attends to all that the cache returns. Some
        # models (Gemma 2) would build a mask that says so, in every step; this one is broadcast to any length.
        kinds = set(getattr(config, "layer_types", None) or ["unknown"])
        builds_masks = config._attn_implementation == "eager" and kinds <= {"full_attention", "sliding_attention"}
        self.full_mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=self.device) if builds_masks else None
        self.reset()
        # A chunk is read wrongly where rotations depend on a text's length, or a layer keeps more than keys and values.
        rotary = str(getattr(config, "rope_parameters", None))
        is_whole = "longrope" in rotary or "dynamic" in rotary
        is_whole = is_whole or any(type(layer) not in ATTENTION for layer in self.cache.layers)
        self.chunk = sys.maxsize if is_whole else PREFILL_CHUNK

    def reset(self, rolls_back: bool = True) -> None:
        """Empty the cache. One that is never rolled back need not keep what has left a sliding window."""
        self.cache = DynamicCache(config=self.model.config)
        if rolls_back:
            self.cache.activate_past_recording()

    def prefill(self, prompt_ids: Tensor, rolls_back: bool = True) -> Tensor:
        """Begin a text with a prompt, ids [1, n], n ≥ 1; return the logits after its last token, [1, vocabulary]."""
        self.reset(rolls_back)
        *chunks, last = prompt_ids.split(self.chunk, dim=1)  # so that a long one needs little memory beside the cache
        for chunk in chunks:
            self.forward(chunk, logits_to_keep=1)
            if rolls_back:
                self.roll_back(0)
        return self.forward(last, logits_to_keep=1)

    @torch.inference_mode()
    def forward(self, ids: Tensor, logits_to_keep: int = 0) -> Tensor:
        """Read tokens, ids [1, n], into the cache; return the logits after the last `logits_to_keep`; 0: after each."""
        mask = self.full_mask if ids.shape[1] == 1 else None
        how = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": logits_to_keep}
        return self.model(ids, attention_mask=mask, **how).logits[0, :, : self.vocabulary]

    def roll_back(self, tokens: int) -> None:
        """Remove the latest tokens from the cache: at most those read since the last roll-back; the others stay."""
        self.cache.crop(-tokens)  # by 0, too: sliding windows then drop what no later roll-back can need

    def step(self, then: Callable, ids: Tensor, uniform: Tensor | None = None, logits_to_keep: int = 1) -> Any:
        """Read tokens, ids [1, n], and return what `then` (see part 2) makes of the logits and of random numbers."""
        return then(self.forward(ids, logits_to_keep), ids, uniform)

    def verify(self, score: Callable, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read the text's last token and K draft tokens, ids [1, K+1], in one pass; return what `score` makes of it."""
        return self.step(score, ids, logits_to_keep=0)


# 2  Tokens from logits ------------------------------------------------------------------------------------------------


class Sampler:
    """The rule that chooses tokens, and accepts or rejects draft tokens: Greedy or Sampling.

    Three methods say what follows a forward pass (`then` of CachedModel.step), from its logits, [n, vocabulary], the
    ids that it read, [1, n], and random numbers, [1] or None. They run on the device, and can be compiled with it.
      sample        the next token, [1, 1], from the logits before it, [1, vocabulary]
      sample_draft  that token, its probability, [1], and the distribution q it was drawn from, [1, vocabulary], or None
      score         of a verify pass: the target output, [K+1, …], by which `accept` decides, and the log-likelihood of
                    each draft token under the main model at temperature 1, [K], in nats, float32
    `accept` returns what a round emits, from the target output, the draft tokens, [K], and q, [K, vocabulary] or None:
    the accepted draft tokens, and one token of the main model's own. For this the host waits for the device.
    """

    def restart(self, prompt: "Prompt") -> None:
        """Begin a prompt's text: its random numbers depend on nothing but its number, its turn and the seed."""

    def uniform(self, count: int) -> Tensor | None:
        """Random numbers in [0, 1), [count], float32; None if the sampler needs none."""


class Greedy(Sampler):
    """Choose the likeliest token; accept a draft token if it is that token."""

    def sample(self, logits: Tensor, ids: Tensor, uniform: None) -> Tensor:
        return logits.argmax(dim=-1, keepdim=True)

    def sample_draft(self, logits: Tensor, ids: Tensor, uniform: None) -> tuple[Tensor, Tensor, None]:
        logits = logits.float()
        best, token = logits.max(dim=-1, keepdim=True)
        return token, (best[0] - logits.logsumexp(dim=-1)).exp(), None

    def score(self, logits: Tensor, ids: Tensor, uniform: None) -> tuple[Tensor, Tensor]:
        return logits.argmax(dim=-1), log_likelihood(logits, ids)  # the target output: its own choices, [K+1]

    def accept(self, target: Tensor, draft_ids: Tensor, q: None) -> list[int]:
        both = torch.cat([draft_ids, target]).tolist()  # one read from the device
        drafted, chosen = both[: len(draft_ids)], both[len(draft_ids) :]
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == chosen[accepted]:
            accepted += 1
        return chosen[: accepted + 1]  # accepted draft tokens are the main model's choices


class Sampling(Sampler):
    """Draw tokens from the model's distribution, with temperature, top-k and top-p: speculative sampling."""

    def __init__(self, temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0, device="cpu"):
        """`top_k` 0 and `top_p` 1 cut nothing off. One seed and number give the same random numbers on one machine."""
        self.for_generate = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.warpers = [transformers.TemperatureLogitsWarper(temperature)]
        if top_k:
            self.warpers.append(transformers.TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(transformers.TopPLogitsWarper(top_p))
        self.seed, self.generator = seed, torch.Generator(device)

    def distribution(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from, [n, vocabulary], float32: the logits of both models go through here."""
        logits = logits.float()
        for warper in self.warpers:
            logits = warper(None, logits)
        return logits.softmax(dim=-1)

    def sample(self, logits: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
        return draw(self.distribution(logits), uniform)

    def sample_draft(self, logits: Tensor, ids: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.distribution(logits)
        token = draw(q, uniform)
        return token, q.gather(1, token)[0], q

    def score(self, logits: Tensor, ids: Tensor, uniform: None) -> tuple[Tensor, Tensor]:
        return self.distribution(logits), log_likelihood(logits, ids)  # the target output: p, [K+1, vocabulary]

    def accept(self, target: Tensor, draft_ids: Tensor, q: Tensor | None) -> list[int]:
        if q is None:  # a draft that draws nothing is certain of its tokens
            q = one_hot(draft_ids, target.shape[1]).to(target.dtype)
        uniform = self.uniform(len(draft_ids) + 1)  # one for each decision: none is used twice
        accepted, following = accept_or_resample(target, q, draft_ids, uniform[:-1])
        n, token, *drafted = torch.cat([accepted, draw(following, uniform[-1:])[0], draft_ids]).tolist()
        return [*drafted[:n], token]

    def restart(self, prompt: "Prompt") -> None:
        self.generator.manual_seed(self.seed * 2**20 + prompt.number + 2**16 * ((prompt.turn or 1) - 1))

    def uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, device=self.generator.device)


def accept_or_resample(p: Tensor, q: Tensor, draft_ids: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The number of accepted draft tokens, [1], and the distribution to draw the next token from, [1, vocabulary].

    Leviathan et al. 2023, algorithm 1 and appendix A.1. p: the main model's distributions, [K+1, vocabulary]; q: those
    that the draft tokens were drawn from, [K, vocabulary]; draft_ids: [K]; uniform: random numbers in [0, 1), [K].

    A draft token x is accepted with probability min(1, p(x) / q(x)): where the draft draws it more often than the main
    model would, the excess is rejected. After a rejection, the next token is drawn from the residual distribution,
    max(0, p - q) normalised: what the main model has more of. The two ways to emit a token add up to p. After the last
    draft token there is no q to subtract, and the bonus token is drawn from p.
    """
    p_drafted = p[:-1].gather(1, draft_ids[:, None])[:, 0]
    q_drafted = q.gather(1, draft_ids[:, None])[:, 0]
    is_accepted = uniform * q_drafted < p_drafted  # uniform < p / q
    accepted = is_accepted.float().cumprod(dim=0).sum(dim=0, keepdim=True).long()  # float: MPS has no cumprod of int64
    p_next = p.index_select(0, accepted)
    q = pad(q, (0, p.shape[1] - q.shape[1], 0, 1))  # 0 also for tokens that the draft's vocabulary lacks
    residual = (p_next - q.index_select(0, accepted)).clamp(min=0)
    total = residual.sum()
    return accepted, torch.where(total > 0, residual / total, p_next)  # p = q but for rounding: nothing is left


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token, [1, 1], from probabilities, [1, vocabulary], with one random number in [0, 1), [1].

    By inverting the cumulative distribution, so that a token of probability 0 is not drawn.
    """
    # The sums of a large vocabulary want float64, where the device has it.
    exact = torch.float32 if probabilities.device.type in ("mps", "xpu") else torch.float64
    cumulative = probabilities.cumsum(dim=-1, dtype=exact)
    return (cumulative <= uniform * cumulative[:, -1:]).sum(dim=-1, keepdim=True)


def log_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of each token but the first, ids [1, K+1], from the logits before it, [K+1, vocabulary]: [K], float32."""
    return -cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="none")


# 3  Autoregressive decoding, the baseline -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and where its output ends."""

    text: str
    number: int  # random numbers depend on it, and on the turn
    turn: int | None = None  # of a conversation, from 1; None: it has only one
    ids: tuple[int, ...] = ()  # n ≥ 1
    max_new_tokens: int = 128
    end_ids: frozenset[int] = frozenset()  # end-of-text tokens: the output ends with the first of them


class Round(NamedTuple):
    """One round of speculative decoding: tokens, and seconds."""

    drafted: int
    accepted: int
    draft_s: float | None = None  # None where the device's clock cannot tell a round's parts apart
    verify_s: float | None = None  # the main model's forward pass
    round_s: float = 0.0  # all of the round


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one run generated for a prompt, and how long it took, in seconds."""

    token_ids: tuple[int, ...]
    latency_s: float  # from the prompt's ids on the device to the last token on the host
    first_token_s: float | None = None  # to the first token on the host; a draft reads the prompt only then
    rounds: tuple[Round, ...] = ()  # of speculative decoding
    log_likelihood: float = 0.0  # of all draft tokens, under the main model, in nats


def emit(prompt: Prompt, output: list[int], tokens: list[int]) -> bool:
    """Append tokens to the output, up to the one that ends the text; whether it has ended. What follows is cut off."""
    for token in tokens:
        output.append(token)
        if token in prompt.end_ids or len(output) == prompt.max_new_tokens:
            return True
    return False


def now(device: torch.device) -> float:
    """The time in seconds, once the device has finished all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def decode_autoregressively(main: CachedModel, sampler: Sampler, prompt: Prompt) -> Generation:
    """Decode with the main model alone: one forward pass for each token."""
    output, prompt_ids = [], torch.tensor([prompt.ids], device=main.device)  # [1, n]
    start = now(main.device)
    sampler.restart(prompt)
    token = sampler.sample(main.prefill(prompt_ids, rolls_back=False), prompt_ids, sampler.uniform(1))  # [1, 1]
    has_ended = emit(prompt, output, [token.item()])
    first_token_s = now(main.device) - start
    while not has_ended:
        token = main.step(sampler.sample, token, sampler.uniform(1))
        has_ended = emit(prompt, output, [token.item()])
    return Generation(tuple(output), now(main.device) - start, first_token_s)


# 4  Speculative decoding ----------------------------------------------------------------------------------------------
#
# One invariant carries the loop. Between two rounds, always,
#
#     the main model's KV cache holds every token of the text but the last one,
#     the draft model's KV cache holds every token of the text but the last two.
#
# With T tokens in the text, the caches hold T - 1 and T - 2. A round feeds the draft the last two and d1 … d(K-1): its
# cache holds T + K - 1. It feeds the main model the last one and d1 … dK: its cache holds T + K. If n draft tokens are
# accepted, the text has T + n + 1 tokens, and the caches must hold T + n and T + n - 1: both drop K - n, for n = K as
# for any other n. (If n < K, the draft also drops a token that stays in the text, and reads it again: so its first pass
# always reads two tokens, and with a fixed K every pass has the same shape.) Only a round without the draft model
# leaves it further behind: it reads on when it is asked again.


class Draft:
    """What proposes draft tokens: here ModelDraft and NgramDraft. Whatever it proposes, the output stays right."""

    models: tuple[CachedModel, ...] = ()  # that it runs

    def reset(self, prompt_ids: Tensor, reads: bool = True) -> None:
        """Begin a text with a prompt, ids [1, n], n ≥ 1. `reads`: now; else, as it rests, when it is first asked."""

    def propose(self, text: list[int], schedule: "FixedSchedule") -> tuple[Tensor, Tensor | None]:
        """Draft how the text, the ids of the prompt and of all output so far, goes on.

        Returns K ≥ 0 tokens, [1, K], and what they were drawn from, q, [K, vocabulary], or None if nothing was drawn.
        Before each token it asks `schedule.wants_another` (part 6).
        """

    def roll_back(self, tokens: int) -> None:
        """Undo so many of the latest tokens that were read."""

    def check(self) -> None:
        """After a text: raise ArithmeticError if the draft's probabilities were not finite."""


class ModelDraft(Draft):
    """A draft that is a model of its own, smaller than the main model."""

    def __init__(self, model: CachedModel, sampler: Sampler):
        self.model, self.sampler, self.models = model, sampler, (model,)
        self.nothing = torch.empty(1, 0, dtype=torch.long, device=model.device)
        # What it reads for tokens that only the main model knows: it may draft worse, but the output stays right.
        self.last_id = (model.vocabulary or model.model.config.get_text_config().vocab_size) - 1

    def reset(self, prompt_ids: Tensor, reads: bool = True) -> None:
        self.has_read = 0  # tokens of the text that its cache holds
        self.confidences = []  # of all draft tokens of this text
        self.model.reset()
        if reads:
            self.begin(prompt_ids[:, :-1])

    def begin(self, ids: Tensor) -> None:
        """Read the first tokens of the text, [1, n], n ≥ 0: all but the last two."""
        self.has_read = ids.shape[1]
        if self.has_read:
            self.model.prefill(ids.clamp(max=self.last_id))

    def propose(self, text: list[int], schedule: "FixedSchedule") -> tuple[Tensor, Tensor | None]:
        tokens, confidences, q = [], [], []
        while schedule.wants_another(confidences):
            # First what it has not read, [1, 2] or more after rounds without it; then each of its own tokens, [1, 1],
            # which never leaves the device.
            if not tokens:
                if self.has_read == 0:
                    self.begin(torch.tensor([text[:-2]], dtype=torch.long, device=self.model.device))
                unread = torch.tensor([text[self.has_read :]], device=self.model.device).clamp(max=self.last_id)
            unread, confidence, drawn_from = self.model.step(self.sampler.sample_draft, unread, self.sampler.uniform(1))
            tokens.append(unread)
            confidences.append(confidence)
            q.append(drawn_from)
        if not tokens:
            return self.nothing, None
        self.has_read = len(text) + len(tokens) - 1
        self.confidences += confidences
        return torch.cat(tokens, dim=1), None if q[0] is None else torch.cat(q)

    def roll_back(self, tokens: int) -> None:
        self.model.roll_back(tokens)
        self.has_read -= tokens

    def check(self) -> None:
        if self.confidences and not torch.cat(self.confidences).isfinite().all():
            raise ArithmeticError("the draft model's logits are not finite; try --dtype float32 or bfloat16")


class NgramDraft(Draft):
    """Without a model (prompt lookup decoding, Saxena 2023): what followed the last three, two or one tokens before."""

    assumed_acceptance = {3: 0.95, 2: 0.75, 1: 0.45}  # by the tokens that match: to begin with, auto corrects it

    def __init__(self, device: torch.device, shortest: int = 1):
        """`shortest`: so many tokens must match at least."""
        self.device, self.lengths = device, [n for n in self.assumed_acceptance if n >= shortest]

    def reset(self, prompt_ids: Tensor, reads: bool = True) -> None:
        self.indexed, self.continuations = 1, {}  # n-gram: the place in the text after its latest occurrence
        self.index(prompt_ids[0].tolist())

    def index(self, text: list[int]) -> None:
        """Note what followed each n-gram of the text that is new."""
        for place in range(self.indexed, len(text)):
            for n in self.lengths:
                if n <= place:
                    self.continuations[tuple(text[place - n : place])] = place
        self.indexed = max(self.indexed, len(text))

    def propose(self, text: list[int], schedule: "FixedSchedule") -> tuple[Tensor, None]:
        self.index(text)
        matching = (n for n in self.lengths if tuple(text[-n:]) in self.continuations)
        tokens = []
        if n := next(matching, None):
            start = self.continuations[tuple(text[-n:])]
            confidence = self.assumed_acceptance[n]
            while start + len(tokens) < len(text) and schedule.wants_another([confidence] * len(tokens)):
                tokens.append(text[start + len(tokens)])
        return torch.tensor([tokens], dtype=torch.long, device=self.device), None


@torch.no_grad()
def decode_speculatively(
    main: CachedModel, draft: Draft, sampler: Sampler, schedule: "FixedSchedule", prompt: Prompt
) -> Generation:
    """Decode with the draft's help: several tokens for each forward pass of the main model, and still its own text.

    Leviathan et al. 2023, algorithm 1. Raises ArithmeticError if the draft's probabilities are not finite.
    """
    output, prompt_ids = [], torch.tensor([prompt.ids], device=main.device)  # [1, n]
    start = now(main.device)
    sampler.restart(prompt)
    last = sampler.sample(main.prefill(prompt_ids), prompt_ids, sampler.uniform(1))  # [1, 1]: the text's last token
    has_ended = emit(prompt, output, [last.item()])
    first_token_s = now(main.device) - start
    draft.reset(prompt_ids, reads=schedule.wants_another([]))
    rounds, log_likelihoods = [], []
    while not has_ended:
        begun = mark(main.device)
        # 1. Draft: K tokens, one after the other.
        draft_ids, q = draft.propose([*prompt.ids, *output], schedule)  # [1, K]; [K, vocabulary] or None
        drafted, accepted = draft_ids.shape[1], 0
        proposed = mark(main.device)
        if drafted:
            # 2. Verify: one pass of the main model gives its own output at each position.
            target, of_tokens = main.verify(sampler.score, torch.cat([last, draft_ids], dim=1))  # [K+1, …]; [K]
            log_likelihoods.append(of_tokens)
            verified = mark(main.device)
            # 3. Accept draft tokens up to the first rejection, and one of the main model's own: the one host read.
            tokens = sampler.accept(target, draft_ids[0], q)
            accepted = len(tokens) - 1
            last = torch.tensor([tokens[-1:]], device=main.device)
            # 4. Roll back: each cache drops one token for each rejected one.
            main.roll_back(drafted - accepted)
            draft.roll_back(drafted - accepted)
        else:  # nothing to verify: a step of autoregressive decoding
            last = main.step(sampler.sample, last, sampler.uniform(1))
            tokens = [last.item()]
            verified = mark(main.device)
            if len(rounds) % 8 == 0:  # or what it keeps for a roll-back would grow
                main.roll_back(0)

        has_ended = emit(prompt, output, tokens)
        schedule.learn(drafted, accepted)
        rounds.append((drafted, accepted, begun, proposed, verified, mark(main.device)))
    latency_s = now(main.device) - start
    draft.check()
    timed = tuple(timed_round(main.device, *marked) for marked in rounds)
    schedule.end_text(timed)
    log_likelihood = torch.cat(log_likelihoods).sum().item() if log_likelihoods else 0.0
    return Generation(tuple(output), latency_s, first_token_s, timed, log_likelihood)


# 5  Is it lossless? ---------------------------------------------------------------------------------------------------
#
# In exact arithmetic both methods generate the same tokens. In floating point, one pass over K+1 tokens and K+1 passes
# over one round differently; where the two best tokens are nearly tied, the choice can flip, and the two texts part for
# good. In bfloat16 that is the normal case. It is no bug, but a bug would look the same. So every output is certified
# by one more pass of the main model, over the whole text, that shares no cache with either loop: how far does a token
# lie below the best one (the gap), and how far does rounding move logits (the noise)? This is a criterion with measured
# margins, not a theorem. On small random models of 25 families and on the bundled pair, correct outputs had gaps of at
# most 0.51 times the noise; outputs of loops with planted bugs at least 78,000 times in float32 and 1.5 times in
# bfloat16, but 0.9 times of a mixture of experts.

SLICE = 64  # tokens whose logits are compared at a time: those of all of a long text would be gigabytes


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where the speculative output parts from the baseline's, and whether rounding explains it."""

    index: int | None  # of the first new token that differs; None if the two are the same, and wrong together
    baseline_token: int | None  # None: the output had ended before
    speculative_token: int | None
    gap: float  # how far a token of the speculative output lies below the best one, in logits, at the worst position
    baseline_gap: float  # the same of the baseline's output
    noise: float  # how far rounding moves the logits of the speculative text; the bound for both
    kind: str  # "tie": both gaps ≤ noise, the output is the main model's own within its rounding; else "mismatch"
    at_fault: str | None  # of a mismatch: "speculative", "baseline" or "both"


@torch.inference_mode()
def sliced_logits(main: CachedModel, prompt_ids: tuple[int, ...], output_ids: tuple[int, ...]) -> Iterator[tuple]:
    """Slices of an output, ids [n], and the logits that these tokens follow from, [n, vocabulary].

    Of one pass over the whole text, without a cache: its layers run once, for the first slice; its head for each.
    """
    text, returned = torch.tensor([[*prompt_ids, *output_ids]], device=main.device), []
    layers = main.model.get_decoder()
    run_layers = layers.forward
    hooked = {name: value for name, value in vars(layers).items() if name == "forward"}  # as accelerate's

    def run_once(*inputs: Any, **options: Any) -> Any:
        if not returned or layers is main.model:  # the latter: not to be had apart (Llama 4)
            returned[:] = [run_layers(*inputs, **options)]
        return returned[0]

    for places in torch.arange(len(prompt_ids), text.shape[1]).split(SLICE):
        layers.forward = run_once
        try:
            logits = main.model(text[:, :-1], use_cache=False, logits_to_keep=places - 1).logits
        finally:  # nothing of ours stays, or what is compiled of the model would be compiled anew
            del layers.forward
            vars(layers).update(hooked)
        yield text[0, places], logits[0, :, : main.vocabulary]


@torch.inference_mode()
def certify(main: CachedModel, prompt_ids: tuple[int, ...], output_ids: tuple[int, ...]) -> float:
    """The gap of an output: how far a token lies below the best one given all before it, at the worst position.

    In logits; also behind a flip. Raises ArithmeticError if the logits are not finite.
    """
    gaps = []
    for ids, logits in sliced_logits(main, prompt_ids, output_ids):
        best, own = logits.amax(dim=-1), logits.gather(1, ids[:, None])[:, 0]
        if not best.isfinite().all():
            raise ArithmeticError("the main model's logits are not finite; try --dtype float32 or bfloat16")
        gaps.append((best.float() - own.float()).max().item())
    return max(gaps)


@torch.inference_mode()
def rounding_noise(main: CachedModel, prompt_ids: tuple[int, ...], output_ids: tuple[int, ...]) -> float:
    """How far rounding moves the logits of `certify`: their largest change if every layer's output is rounded again.

    By a random relative error of at most the type's epsilon; the largest of four passes, as experts can be chosen by a
    hair. No cache takes part, so that a faulty one cannot pass for rounding.
    """

    def round_again(module: torch.nn.Module, inputs: tuple, output: Any) -> Tensor | None:
        if isinstance(output, Tensor) and output.is_floating_point():
            error = torch.finfo(output.dtype).eps
            factors = torch.rand(output.shape, device=output.device).mul_(2 * error).add_(1 - error)  # float32
            return factors.mul_(output).to(output.dtype)

    torch.manual_seed(0)
    layers = [layer for layer in main.model.modules() if layer._parameters or not list(layer.children())]
    whole, *rounded = (sliced_logits(main, prompt_ids, output_ids) for _ in range(5))
    changes = []
    for _, logits in whole:
        with contextlib.ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(layer.register_forward_hook(round_again))
            for again in rounded:
                changes.append((next(again)[1].float() - logits.float()).abs().max().item())
    return max(changes)


def find_divergence(main: CachedModel, prompt_ids: tuple, baseline: tuple, speculative: tuple) -> Divergence | None:
    """Compare two greedy outputs for one prompt, and certify both; None if they are the same, and right."""
    same = baseline == speculative
    gap = certify(main, prompt_ids, speculative)
    if same and gap == 0:
        return None
    baseline_gap = gap if same else certify(main, prompt_ids, baseline)
    noise = rounding_noise(main, prompt_ids, speculative)
    at_fault = [name for name, largest in (("baseline", baseline_gap), ("speculative", gap)) if largest > noise]
    if same and not at_fault:
        return None
    pairs = enumerate(itertools.zip_longest(baseline, speculative))  # None where the shorter one has ended
    index, tokens = next(((place, pair) for place, pair in pairs if pair[0] != pair[1]), (None, (None, None)))
    if not same and None in tokens:  # one is the beginning of the other: rounding makes no loop stop early, or go on
        at_fault = at_fault or ["speculative"]
    whose = "both" if len(at_fault) == 2 else "".join(at_fault) or None
    return Divergence(index, *tokens, gap, baseline_gap, noise, "mismatch" if whose else "tie", whose)


# 6  How many tokens to draft ------------------------------------------------------------------------------------------

LONGEST_AUTO = 15  # draft tokens of a round: with the text's last token they fill a tile of 16 rows


def verify_widths(draft_tokens: int | str, device: torch.device) -> tuple[int, ...]:
    """The tokens that a verify pass may have, with a fixed K or "auto"; compiled ones are padded to the next of these.

    On accelerators widths up to 16 cost nearly the same, on a CPU those up to 3; each takes up to a minute to compile.
    """
    if draft_tokens != "auto":
        return (draft_tokens + 1,)
    return (3, 5, 9, LONGEST_AUTO + 1) if device.type == "cpu" else (5, LONGEST_AUTO + 1)


class FixedSchedule:
    """The draft-length schedule that always drafts the same number of tokens; AutoSchedule has the same methods."""

    def __init__(self, draft_tokens: int):
        self.draft_tokens = draft_tokens

    def wants_another(self, confidences: list[Tensor | float]) -> bool:
        """Whether to draft one more token. `confidences`: the draft's probabilities of this round's tokens so far."""
        return len(confidences) < self.draft_tokens

    def learn(self, drafted: int, accepted: int) -> None:
        """Be told what became of the round."""

    def end_text(self, rounds: tuple[Round, ...]) -> None:
        """Be told the rounds of a whole text with their times, which a device's clock may tell only then."""


@torch.no_grad()
def measure_costs(
    main: CachedModel, draft: Draft, sampler: Sampler, prompt_ids: Tensor, widths: tuple[int, ...]
) -> list[float]:
    """The seconds that a round of 0, 1, … draft tokens takes here, behind a prompt, ids [1, n]: medians.

    Measured on both sides of each verify width, so that lines between these points are right for padded passes, too.
    """
    lengths = sorted({0, 1, *(width - 1 for width in widths), *widths[:-1]})
    ids = prompt_ids[:, -1:].repeat(1, widths[-1])  # any will do
    text = [*prompt_ids[0].tolist(), ids[0, 0].item()]
    main.prefill(prompt_ids)
    draft.reset(prompt_ids)
    times = {length: [] for length in lengths}
    for _, length in itertools.product(range(8), lengths):
        start = now(main.device)
        if length:
            draft.propose(text, FixedSchedule(length))
            draft.roll_back(length + 1)  # the text's last token, too
            main.verify(sampler.score, ids[:, : length + 1].contiguous())
        else:
            main.step(sampler.sample, ids[:, :1].contiguous(), sampler.uniform(1))
        main.roll_back(length + 1)
        times[length].append(now(main.device) - start)
    medians = [statistics.median(seconds[2:]) for seconds in times.values()]  # the first two warm up
    return numpy.interp(range(widths[-1]), lengths, medians).tolist()


class AutoSchedule(FixedSchedule):
    """Draft while further tokens are worth more than they cost; rest where drafting only loses. It keeps learning.

    A round of K draft tokens yields 1 + P(first accepted) + … + P(first K accepted) tokens (Leviathan et al. 2023,
    equation 1, with what was lately accepted at each position). The best K by the costs gives the time per token that
    can be had: that is what a token is worth. An accelerator must not wait for the host while it drafts, so there a
    round drafts this K. Where the draft's own probabilities can be read for nothing, on a CPU or of n-grams, they
    decide token by token, corrected by what became of tokens of about that probability.
    """

    def __init__(self, costs: list[float], reads: bool):
        """`costs`: of `measure_costs`. `reads`: whether to read probabilities from the device."""
        super().__init__(len(costs) - 1)
        self.costs, self.reads = numpy.array(costs), reads
        self.round_s = costs  # corrected by the rounds' own times
        self.ratios = [deque(maxlen=15) for _ in costs]  # recent ones of these times to `costs`
        self.accepted, self.tested = numpy.zeros((2, self.draft_tokens))  # by position; those of old rounds fade
        self.accepted[0], self.tested[0] = 6, 8  # assumed to begin with, as in the next line
        self.by_tenth = [[(tenth + 0.5) / 5, 2.0] for tenth in range(10)]  # accepted, tested, by probability
        self.rounds, self.rest = 0, 0  # so far; still to go without a draft
        self.lost = 0.0  # baseline steps that drafting has cost of late, beyond what it gained
        self.plan()

    def wants_another(self, confidences: list[Tensor | float]) -> bool:
        drafted = len(confidences)
        if not drafted:
            self.tenths, self.chance = [], 1.0  # that all of the round so far are accepted
            return not self.rest and self.rounds % 128 < 127  # a plain step now and then: its cost is compared with
        if not self.reads and Tensor in map(type, confidences):
            return drafted < self.best
        for confidence in map(float, confidences[len(self.tenths) :]):
            accepted, tested = tenth = self.by_tenth[min(9, int(10 * confidence)) if confidence > 0 else 0]
            self.tenths.append(tenth)
            self.chance *= accepted / tested
        chance, gained = self.chance, 0.0
        for place in range(drafted, self.draft_tokens):
            chance *= self.rates[place]
            gained += chance
            if gained * self.worth_s > self.round_s[place + 1] - self.round_s[drafted]:
                return True
        return False

    def learn(self, drafted: int, accepted: int) -> None:
        """Learn from a round; a draft that has lost some steps and does not pay by now rests, and is tried again."""
        self.rounds += 1
        self.rest = max(0, self.rest - 1)
        if not drafted:
            return
        tested = min(accepted + 1, drafted)
        for counts, latest in (self.accepted, accepted), (self.tested, tested):
            counts *= 0.98
            counts[:latest] += 1
        for index, tenth in enumerate(self.tenths[:tested]):
            tenth[:] = 0.98 * tenth[0] + (index < accepted), 0.98 * tenth[1] + 1
        self.plan()
        self.lost = max(0.0, self.lost + self.round_s[drafted] / self.round_s[0] - accepted - 1)
        if self.lost > 6 and self.worth_s == self.round_s[0]:
            self.rest, self.lost = 256, 4.0  # after it, two more steps may be lost

    def end_text(self, rounds: tuple[Round, ...]) -> None:
        """Correct the costs by the times of a text's rounds: medians, as some rounds catch up or are disturbed."""
        for each in rounds:
            self.ratios[each.drafted].append(each.round_s / self.costs[each.drafted])
        known = [length for length, ratios in enumerate(self.ratios) if len(ratios) >= 3]
        if known:  # lengths unseen are as wrong as their neighbours
            medians = [statistics.median(self.ratios[length]) for length in known]
            self.round_s = (self.costs * numpy.interp(range(len(self.costs)), known, medians)).tolist()
            self.plan()

    def plan(self) -> None:
        """The best K by now, and what a token is worth."""
        alpha = self.accepted.sum() / self.tested.sum()
        rates = (self.accepted + 16 * alpha) / (self.tested + 16)  # of acceptance at each position
        per_token = self.round_s / numpy.cumsum([1.0, *rates.cumprod()])
        self.rates, self.worth_s = rates.tolist(), per_token.min()
        self.best = 1 + int(per_token[1:].argmin())


# 7  Compiled steps; mixed drafts; models with a state -----------------------------------------------------------------


class BoundedCache(Cache):
    """A KV cache of fixed size, of which attention sees only the first `bound` tokens; `filled` of them are in use."""

    bound = filled = 0

    def update(self, *states: Any, **options: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*states, **options)
        return keys[:, :, : self.bound], values[:, :, : self.bound]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.bound, 0


def keys_and_values(cache: Cache) -> list[Tensor]:
    """What a cache's layers hold, [1, heads, tokens, size] each; a layer that uses another's holds nothing."""
    return [part for layer in cache.layers if layer.keys is not None for part in (layer.keys, layer.values)]


SMALL_WEIGHT = 2**24  # bytes: a processor's caches hold it


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer by oneDNN, x [..., n] with packed weights [m, n]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


# The compiler takes packed weights only as constants, but leaves an operator alone that it does not know. This is
# quicker to call than a torch.library.custom_op.
PACKED_LINEAR = "speculative_decoding::packed_linear"
if not hasattr(torch.ops.speculative_decoding, "packed_linear"):  # or the file is imported a second time
    torch.library.define(PACKED_LINEAR, "(Tensor x, Tensor packed, Tensor? bias) -> Tensor")
    torch.library.impl(PACKED_LINEAR, "default", packed_linear)
    torch.library.register_fake(PACKED_LINEAR, lambda x, packed, bias: x.new_empty(*x.shape[:-1], packed.shape[0]))


class StepLinear(torch.nn.Linear):
    """A linear layer of compiled steps on a CPU, which are as fast as the weights are read; eagerly it is what it was.

    The library's product reads them at the memory's pace for up to three tokens in float32, but not on AMD, nor in
    bfloat16, nor for more tokens. oneDNN does with a second copy of the weights, in the order in which it needs them.
    """

    packed = None
    streams = False  # of one token: as a reduction, which the compiler makes one stream of reads

    def is_packed(self, tokens: int) -> bool:
        """Whether so many tokens are multiplied with the second copy."""
        return self.weight.dtype == torch.bfloat16 or tokens > (1 if self.streams else 3)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        tokens = x.numel() // self.in_features
        if self.streams and tokens == 1:
            output = (self.weight.float() * x.unsqueeze(-2).float()).sum(-1).to(x.dtype)
            return output if self.bias is None else output + self.bias
        if self.packed is not None and self.is_packed(tokens):
            return torch.ops.speculative_decoding.packed_linear(x, self.packed, self.bias)
        return super().forward(x)


class CompiledModel(CachedModel):
    """A CachedModel whose cache has a fixed size, and whose steps are compiled: on a GPU, as CUDA graphs.

    Run eagerly on a fast GPU, a model waits for its kernels to be launched. A graph launches all of a step at once, but
    needs the same shapes and the same memory each time. So the cache's storage is allocated once, and only its length
    changes; what lies behind the length is masked, and overwritten by the next tokens.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int | None, device: torch.device | None, *bounds: int):
        """`bounds`: see `cache_bounds`; the last is the most tokens that the cache ever holds.

        Raises NotImplementedError for a cache of another kind.
        """
        self.steps = {}  # compiled, by what is done with the logits, the number of tokens and the cache's bound
        self.widths = ()  # the numbers of tokens that a verify pass may have; see `limited_to`
        self.eager = CachedModel(model, vocabulary, device)  # reads the prompts, which can have any length
        layers = self.eager.cache.layers
        if any(type(layer) not in ATTENTION for layer in layers):
            raise NotImplementedError(
                f"{model.config.model_type} keeps more than keys and values, only eagerly rolled back"
            )
        # Layers with sliding windows are stored in full, too: the mask hides what lies outside a window. A multiple of
        # 8 keeps the mask's rows aligned.
        self.bounds = [math.ceil(bound / 8) * 8 for bound in bounds]
        static = [layer if type(layer) is DummyLayer else StaticLayer(self.bounds[-1]) for layer in layers]
        self.cache = BoundedCache(layers=static)
        super().__init__(model, vocabulary, device)
        self.step(Greedy().sample, torch.zeros(1, 1, dtype=torch.long, device=self.device))  # allocates the cache
        self.lengths = [layer.cumulative_length for layer in static if type(layer) is StaticLayer]  # [] each
        # Quantised layers are of other classes and stay as they are; so do those of a model that has no large one.
        self.linears = [layer for layer in model.modules() if type(layer) in (torch.nn.Linear, StepLinear)]
        if self.device.type != "cpu" or max((layer.weight.nbytes for layer in self.linears), default=0) < SMALL_WEIGHT:
            self.linears = []
        streams = self.device.type == "cpu" and "AMD" in device_name(self.device)
        for layer in self.linears:
            layer.__class__, layer.streams = StepLinear, streams

    def limited_to(self, widths: tuple[int, ...]) -> "CompiledModel":
        """The same model, cache and steps, for verify passes of these numbers of tokens."""
        model = copy.copy(self)
        model.widths = widths
        return model

    def reset(self, rolls_back: bool = True) -> None:
        """As CachedModel's. What a text left is masked, but a weight of 0 times infinity is NaN: so it is zeroed."""
        self.cache.filled = 0
        if storage := keys_and_values(self.cache):
            torch._foreach_zero_(storage)
            torch._foreach_zero_(self.lengths)

    def prefill(self, prompt_ids: Tensor, rolls_back: bool = True) -> Tensor:
        """As CachedModel's; read eagerly into a growing cache, whose attention spans the prompt alone, then copied."""
        logits, end = self.eager.prefill(prompt_ids, rolls_back=False), prompt_ids.shape[1]
        self.reset()
        # The eager cache grew to the whole prompt, or to the end of it that a sliding window needs.
        static, grown = keys_and_values(self.cache), keys_and_values(self.eager.cache)
        places = [part[:, :, end - held.shape[2] : end] for part, held in zip(static, grown, strict=True)]
        torch._foreach_copy_(places, grown)
        self.roll_back(-end)
        self.eager.reset()
        return logits

    @torch.no_grad()  # inference_mode would be faster, but cannot be compiled
    def forward(self, ids: Tensor, logits_to_keep: int = 0) -> Tensor:
        """As CachedModel's, within a `step`, which knows the cache's bound."""
        output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=logits_to_keep)
        return output.logits[0, :, : self.vocabulary]

    def roll_back(self, tokens: int) -> None:
        if tokens:
            torch._foreach_add_(self.lengths, -tokens)
            self.cache.filled -= tokens

    def step(self, then: Callable, ids: Tensor, uniform: Tensor | None = None, logits_to_keep: int = 1) -> Any:
        """As CachedModel's; compiled where `compile` was asked to, for the smallest bound that holds what it reads."""
        tokens = ids.shape[1]
        if logits_to_keep == 1 and 2 < tokens <= 12 and self.steps:  # a draft that was not asked for a few rounds
            self.step(then, ids[:, :2].contiguous(), uniform)
            return self.step(then, ids[:, 2:].contiguous(), uniform)
        self.cache.filled += tokens
        self.cache.bound = next(bound for bound in self.bounds if bound >= self.cache.filled)
        if (compiled := self.steps.get((then.__name__, tokens, self.cache.bound))) is None:
            return super().step(then, ids, uniform, logits_to_keep)
        # A CUDA graph writes its outputs into the same memory each time. They are read after further steps, and even
        # become inputs of the next: so they are copied first. And the graphs must be told where a new step begins, or
        # they take outputs that are still held for memory in use, and record themselves anew.
        torch.compiler.cudagraph_mark_step_begin()
        outputs = compiled(ids, uniform)
        if isinstance(outputs, Tensor):
            return outputs.clone()
        return tuple(output if output is None else output.clone() for output in outputs)

    def verify(self, score: Callable, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As CachedModel's, in a pass of one of the widths: what is padded is ignored, and rolled back at once."""
        tokens = ids.shape[1]
        width = min((width for width in self.widths if width >= tokens), default=tokens)
        target, log_likelihoods = self.step(score, pad(ids, (0, width - tokens)), logits_to_keep=0)
        self.roll_back(width - tokens)
        return target[:tokens], log_likelihoods[: tokens - 1]

    @torch.no_grad()
    def compile(self, then: Callable, tokens: int, uniform: Tensor | None, logits_to_keep: int, bound: int) -> None:
        """Compile a step, from ids [1, tokens] to what `then` returns, for one of the bounds, and forget the text."""

        def whole(ids: Tensor, uniform: Tensor | None) -> Any:
            return then(self.forward(ids, logits_to_keep), ids, uniform)

        can_pack = torch.backends.mkldnn.is_available()
        if self.model.dtype == torch.bfloat16:
            can_pack = can_pack and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        for layer in self.linears:
            if layer.packed is None and can_pack and layer.is_packed(tokens):
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 16)  # good for 1 to 64
        # What mode="reduce-overhead" means; and no guards. These would check before each step, for a millisecond, that
        # nothing of the model has changed, which nothing does. Without guards a step must be one whole graph, and must
        # not share a cache of graphs with others. (torch.compiler.nested_compile_region would compile one layer for
        # all, in half the time; but without guards, layers of other kinds and indices share its graph: gap 5.7.)
        options = {"triton.cudagraphs": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        how = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True, "options": options}
        self.steps[then.__name__, tokens, bound] = torch.compile(whole, **how)
        for _ in range(3):  # compile; capture a graph; replay it
            self.reset()
            self.cache.filled = bound - tokens
            self.step(then, torch.zeros(1, tokens, dtype=torch.long, device=self.device), uniform, logits_to_keep)


def cache_bounds(lengths: list[int]) -> list[int]:
    """Bounds of a run's caches, in tokens: its longest text; a quarter or a sixteenth of it, if some text fits in."""
    capacity = max(lengths)
    sizes = [size for size in (capacity // 16, capacity // 4) if size >= 256] + [capacity]  # less saves little
    return sorted({next(size for size in sizes if size >= length) for length in lengths})


def compile_steps(main: CompiledModel, drafts: dict, sampler: Sampler, lengths: tuple, announce: Callable) -> None:
    """Compile the steps of all models that these draft lengths run, and no others. Raises what the compiler raises."""
    widths = {width for draft_tokens in lengths for width in verify_widths(draft_tokens, main.device)}
    steps = [(main, sampler.sample, 1, 1), *((main, sampler.score, width, 0) for width in sorted(widths))]
    models = {model: None for draft in drafts.values() if isinstance(draft, Draft) for model in draft.models}
    models = [model for model in models if isinstance(model, CompiledModel)]
    is_mixed = MixedDraft in map(type, drafts.values())  # then a model may catch up by one token
    draft_tokens = (1, 2) if is_mixed or widths != {2} else (2,)  # K = 1 never feeds a draft its own tokens
    steps += [(model, sampler.sample_draft, tokens, 1) for model in models for tokens in draft_tokens]
    steps = [(*step, bound) for step in steps for bound in main.bounds]
    took = ""
    for number, (model, then, tokens, logits_to_keep, bound) in enumerate(steps, 1):
        announce(f"Compiling step {number} of {len(steps)}{took} …")
        start = time.perf_counter()
        model.compile(then, tokens, sampler.uniform(1) if logits_to_keep else None, logits_to_keep, bound)
        took = f"; the last took {time.perf_counter() - start:.0f} s"
    if main.device.type == "cuda" and (skipped := torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]):
        announce(f"warning: no CUDA graphs of {counted(skipped, 'step')}, which are slow: see TORCH_LOGS=cudagraphs")


class MixedDraft(Draft):
    """N-grams where they find what followed at least two equal tokens, a model where they do not."""

    def __init__(self, ngram: NgramDraft, model: ModelDraft):
        self.ngram, self.model, self.models = ngram, model, model.models

    def reset(self, prompt_ids: Tensor, reads: bool = True) -> None:
        self.ngram.reset(prompt_ids)
        self.model.reset(prompt_ids, reads)

    def propose(self, text: list[int], schedule: "FixedSchedule") -> tuple[Tensor, Tensor | None]:
        self.proposer = self.ngram
        proposed = self.ngram.propose(text, schedule)
        if proposed[0].shape[1] == 0:
            self.proposer = self.model
            proposed = self.model.propose(text, schedule)
        return proposed

    def roll_back(self, tokens: int) -> None:
        self.proposer.roll_back(tokens)  # what the other one has not read, it need not forget

    def check(self) -> None:
        self.model.check()


class RecurrentModel(CachedModel):
    """A model with layers that carry a state from token to token: linear attention, Mamba, short convolutions.

    A state cannot be cropped, so all are saved before each pass. `roll_back` puts back the latest that have read none
    of the removed tokens, and crops attention layers to their length. What these have not read of the text is unread:
    the next pass begins with it. So the invariant of part 4 holds of cache and unread tokens together, and a rejection
    costs a longer pass, in the time of drafting or verifying. Not compiled, as its passes have no constant shape.
    """

    longest_unread = 16  # tokens; more get a pass of their own, or they would be read again after each rejection

    def __init__(self, model: PreTrainedModel, vocabulary: int | None = None, device: torch.device | None = None):
        takes = inspect.signature(model.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in takes else "past_key_values"
        super().__init__(model, vocabulary, device)

    def reset(self, rolls_back: bool = True) -> None:
        super().reset(rolls_back=False)  # record nothing: what cannot be cropped is saved
        if not any(isinstance(layer, DynamicLayer) for layer in self.cache.layers):
            self.cache.layers.append(DynamicLayer())  # stays empty: the library's masks ask it for their size
        self.rolls_back, self.length = rolls_back, 0  # tokens that the cache holds
        self.saved = []  # before each pass since the last roll-back: the length, and the states
        self.recent = self.unread = torch.empty(1, 0, dtype=torch.long, device=self.device)  # recent: read since then

    def states(self, kinds: tuple = ("conv_states", "recurrent_states")) -> list[Tensor]:
        """What a pass overwrites: the convolution's and the recurrent states of all layers."""
        layers = [layer for layer in self.cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
        states = [state for layer in layers for kind in kinds for state in getattr(layer, kind).values()]
        return [state for state in states if state is not None]

    def prefill(self, prompt_ids: Tensor, rolls_back: bool = True) -> Tensor:
        self.reset(rolls_back)
        logits = self.forward(prompt_ids, logits_to_keep=1)
        self.roll_back(0)
        return logits

    @torch.inference_mode()
    def forward(self, ids: Tensor, logits_to_keep: int = 0) -> Tensor:
        logits_to_keep = logits_to_keep or ids.shape[1]
        unread, self.unread = self.unread, self.unread[:, :0]
        if unread.shape[1] > self.longest_unread:
            self.read(unread, 1)
            unread = self.unread
        ids = torch.cat([unread, ids], dim=1)
        logits = [self.read(part, logits_to_keep) for part in ids.split(PREFILL_CHUNK, dim=1)]
        return torch.cat(logits)[-logits_to_keep:]

    def read(self, ids: Tensor, logits_to_keep: int) -> Tensor:
        """Read ids, [1, n], in one pass; return the logits of the last, at most [logits_to_keep, vocabulary]."""
        if self.rolls_back:
            self.saved.append((self.length, [state.clone() for state in self.states()]))
            self.recent = torch.cat([self.recent, ids], dim=1)
        positions = torch.arange(self.length, self.length + ids.shape[1], device=self.device)[None]
        self.length += ids.shape[1]
        how = {self.cache_name: self.cache, "use_cache": True, "logits_to_keep": logits_to_keep}
        return self.model(ids, position_ids=positions, **how).logits[0, :, : self.vocabulary]

    @torch.inference_mode()
    def roll_back(self, tokens: int) -> None:
        if tokens:
            kept, start = self.length - tokens, self.length - self.recent.shape[1]
            length, states = next(saved for saved in reversed(self.saved) if saved[0] <= kept)
            self.unread = self.recent[:, length - start : kept - start]
            if length:
                for state, old in zip(self.states(), states, strict=True):
                    state.copy_(old)
                for layer in self.cache.layers:
                    if isinstance(layer, DynamicLayer):  # of one that also has states, crop the attention alone
                        is_both = isinstance(layer, LinearAttentionCacheLayerMixin)
                        (DynamicLayer if is_both else type(layer)).crop(layer, length - self.length)
            else:
                self.cache.reset()
            self.length = length
        self.saved, self.recent = [], self.recent[:, :0]


def cached_model(model: PreTrainedModel, vocabulary: int | None, device: torch.device) -> CachedModel:
    """The model with its cache: a RecurrentModel if the library marks it as one that has a state."""
    return (RecurrentModel if model._is_stateful else CachedModel)(model, vocabulary, device)


# 8  The benchmark -----------------------------------------------------------------------------------------------------
#
# Raw records: what each method did with each prompt. Figures are computed from them in part 9.

BASELINE = "baseline"  # the label of the first method


@contextlib.contextmanager
def cli_errors(what: str, hint: str) -> Iterator:
    """Make a UsageError of any error: broken files and folders can make libraries raise anything."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name:
            hint = f"`pip install {error.name.partition('.')[0]}`"
        raise UsageError(f"cannot {what}: {one_line(error)}; {hint}") from error


def one_line(error: BaseException) -> str:
    """What an error of another library says, in one line of at most 300 characters."""
    said = plain(getattr(error, "strerror", None) or str(error)) or type(error).__name__
    return said if len(said) < 300 else said[:299] + "…"


@dataclasses.dataclass(frozen=True)
class Question(Prompt):
    """A question of a file, or one turn of it; its number is its place in the file, from 1."""

    category: str | None = None
    question_id: str | int | None = None
    earlier: tuple = ()  # the messages before the text: {"role": …, "content": …}
    later: tuple = ()  # what the user says in the turns to come
    longest: int = 0  # a bound for the tokens of the last turn's prompt
    error: str | None = None  # why it cannot be decoded

    @property
    def label(self) -> str:
        """What the report calls it: the question's id or number, and the turn, e.g. "81.2"."""
        name = self.number if self.question_id in (None, "") else self.question_id
        return plain(f"{name}.{self.turn}" if self.turn else str(name))


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to decode a prompt. The first of a run is the baseline: the main model alone."""

    label: str
    decode: Callable  # makes a Generation of a Prompt
    draft: str | None = None  # as --draft names it; None: there is no draft
    draft_tokens: int | str | None = None  # K, or "auto"; None: it drafts nothing
    library: str | None = None  # what it is, if it is not ours but transformers'
    recompiles: bool = False  # with texts of other lengths: so it is warmed up with each prompt
    costs: list | None = None  # of `measure_costs`, if it uses them: the seconds of a round of 0, 1, … draft tokens
    step_bytes: int | None = None  # of the main model's weights, which a step of the baseline reads; if that is known
    error: str | None = None  # why it cannot run


class Verdict(NamedTuple):
    """Whether the outputs of a method, all repeats, are the main model's own."""

    kind: str  # "identical", "tie" or "mismatch" (the worst of all repeats), "sampled", "unchecked"
    divergence: Divergence | None = None  # of a tie or a mismatch
    why: str | None = None  # why it could not be checked


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one method did with one prompt."""

    runs: tuple = ()  # a Generation for each repeat
    text: str | None = None  # of the repeat that counts
    verdict: Verdict | None = None
    error: str | None = None  # why it failed, wholly or in one of the repeats

    @property
    def run(self) -> Generation:
        """The repeat that counts: the median by time per token; of an even number, the faster of the middle two."""
        return sorted(self.runs, key=lambda run: run.latency_s / len(run.token_ids))[(len(self.runs) - 1) // 2]

    @property
    def tokens_per_s(self) -> float:
        return len(self.run.token_ids) / self.latency_s

    @property
    def latency_s(self) -> float:
        """The median latency of the repeats; of an even number, the mean of the middle two."""
        return statistics.median(run.latency_s for run in self.runs)


class Result(NamedTuple):
    """What every method did with one prompt: Outcomes by the methods' labels, in the methods' order."""

    question: Question
    outcomes: dict


@dataclasses.dataclass(frozen=True)
class Results:
    """All that a run measured: figures, report and JSON are made of this alone."""

    environment: dict  # what it ran on
    settings: Settings
    methods: tuple  # of Method, the baseline first
    prompts: tuple = ()  # a Result for each
    complete: bool = False


def our_methods(main: CachedModel, drafts: dict, sampler: Sampler, settings: Settings, prompt: Prompt) -> list:
    """The baseline, and speculative decoding with each draft and draft length; costs are measured behind a prompt.

    `drafts`: by what --draft calls them, each a Draft, or why there is none.
    """
    baseline = functools.partial(decode_autoregressively, main, sampler)
    methods, names = [Method(BASELINE, baseline, step_bytes=bytes_per_step(main.model))], short_names(settings)
    for (name, draft), k in itertools.product(drafts.items(), settings.draft_tokens):
        schedule, costs, error = None, None, None
        widths = verify_widths(k, main.device)
        model = main.limited_to(widths) if isinstance(main, CompiledModel) else main
        if isinstance(draft, str):
            error = draft
        elif k == "auto":
            try:
                ids = torch.tensor([prompt.ids], device=main.device)
                priced = draft.model if isinstance(draft, MixedDraft) else draft  # n-grams cost next to nothing
                costs = measure_costs(model, priced, sampler, ids, widths)
                schedule = AutoSchedule(costs, reads=main.device.type == "cpu")
            except Exception as failure:  # above all: out of memory
                error = f"what passes cost cannot be measured: {one_line(failure)}"
        else:
            schedule = FixedSchedule(k)
        decode = functools.partial(decode_speculatively, model, draft, sampler, schedule)
        methods.append(Method(f"{names[name]}K = {k}", decode, name, k, costs=costs, error=error))
    return methods


def library_methods(main: CachedModel, drafts: dict, sampler: Sampler, settings: Settings) -> list:
    """What a user would run instead: transformers' generate(), alone (compiled if ours is) and assisted."""
    is_compiled = isinstance(main, CompiledModel) and main.device.type in ("cuda", "xpu")
    kind, options = ("compiled", {"cache_implementation": "static"}) if is_compiled else ("eager", {})
    decode = functools.partial(decode_by_generate, main, None, sampler, options)
    library = f"transformers' generate(), {kind}"
    methods, names = [Method("generate()", decode, library=library, recompiles=is_compiled)], short_names(settings)
    for (name, draft), k in itertools.product(drafts.items(), settings.draft_tokens):
        if isinstance(draft, str | MixedDraft) or main.model._is_stateful:  # the library has none such
            continue
        label, which, options = "assisted", "its default K", {}
        if k != "auto":
            label, which = f"assist {k}", f"K = {k}"
            options = {"num_assistant_tokens": k, "num_assistant_tokens_schedule": "constant"}
            options["assistant_confidence_threshold"] = 0.0
        if not draft.models:
            options = {"prompt_lookup_num_tokens": 10 if k == "auto" else k, "max_matching_ngram_size": 3}
        decode = functools.partial(decode_by_generate, main, draft, sampler, options)
        library = f"transformers' assisted generation, {which}, eager"
        methods.append(Method(names[name] + label, decode, name, k, library))
    return methods


def short_names(settings: Settings) -> dict:
    """What labels call several drafts: "2b-it, " for google/gemma-2-2b-it with google/gemma-2-9b-it; of one, ""."""
    drafts = settings.draft
    if len(drafts) == 1:
        return {drafts[0]: ""}
    models = [settings.main, *filter(None, map(model_of, drafts))]
    alike = re.match(r"(.*[-_/])?", os.path.commonprefix(models))[0]
    names = [re.sub(r"(ngram\+)?.*/", r"\1", draft.replace(alike, "", 1).rstrip("/")) for draft in drafts]
    chosen = names if len(set(names)) == len(names) else drafts
    return {draft: f"{name}, " for draft, name in zip(drafts, chosen, strict=True)}


def model_of(draft: str) -> str | None:
    """The model that a draft runs, of what --draft names; None for n-grams alone."""
    return None if draft == "ngram" else draft.removeprefix("ngram+")


@torch.no_grad()
def decode_by_generate(
    main: CachedModel, draft: Draft | None, sampler: Sampler, options: dict, prompt: Prompt
) -> Generation:
    """What transformers' generate() makes of a prompt, whatever the models' own generation configs ask for."""
    options = {"max_new_tokens": prompt.max_new_tokens, "eos_token_id": sorted(prompt.end_ids) or None, **options}
    if isinstance(sampler, Sampling):
        options |= sampler.for_generate
        sampler.restart(prompt)
        torch.manual_seed(sampler.generator.initial_seed())
    config = GenerationConfig(pad_token_id=0, **options)
    ids = torch.tensor([prompt.ids], device=main.device)
    assistant = draft.models[0].model if draft and draft.models else None
    with contextlib.ExitStack() as restored:
        for model in filter(None, (main.model, assistant)):
            restored.callback(setattr, model, "generation_config", model.generation_config)
            model.generation_config = config
        start = now(main.device)
        output = main.model.generate(ids, config, attention_mask=torch.ones_like(ids), assistant_model=assistant)
        tokens = output[0, len(prompt.ids) :].tolist()  # the host waits for the last of them
        return Generation(tuple(tokens), now(main.device) - start)


def bytes_per_step(model: PreTrainedModel) -> int | None:
    """The bytes of weights that a decoding step reads: of the text model's layers and the head.

    Not of an embedding that is only looked up, or of a vision tower. None where it depends: for mixtures of experts, of
    which a step reads the chosen ones, and for a model that is spread over devices.
    """
    facts = model.config.get_text_config().to_dict()
    has_experts = any("expert" in key and isinstance(value, int) and value > 1 for key, value in facts.items())
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if has_experts or len(places) > 1 or "disk" in places:
        return None
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    looked_up = {module.weight for module in decoder.modules() if isinstance(module, torch.nn.Embedding)}
    read = {*decoder.parameters()} - looked_up | {*head.parameters()}  # the head may be the embedding itself
    return sum(weight.nbytes for weight in read)


def mark(device: torch.device) -> float | torch.Event:
    """A point in time within a run: of the device's own clock where it has one, so that nothing need wait for it."""
    if device.type not in ("cuda", "xpu"):
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def timed_round(device: torch.device, drafted: int, accepted: int, *marks: float | torch.Event) -> Round:
    """A round with its times, from four marks: where it began, had drafted, had verified, and was finished.

    The device must have passed them all.
    """
    if isinstance(marks[0], torch.Event):
        marks = [marks[0].elapsed_time(each) / 1000 for each in marks]
    begun, proposed, verified, finished = marks
    if device.type not in ("cpu", "cuda", "xpu"):  # the host's clock is right only where the host waits: once a round
        return Round(drafted, accepted, round_s=finished - begun)
    return Round(drafted, accepted, proposed - begun, verified - proposed, finished - begun)


def memory_bandwidth_gb_s(device: torch.device) -> float:
    """What the device's memory delivers, in GB/s: the best of a few plain sums over 512 MB."""
    numbers = torch.ones(2**27, device=device)
    return numbers.nbytes / 1e9 / min(timeit.repeat(lambda: numbers.sum().item(), number=1, repeat=6))


def benchmark(
    questions: list, methods: list, main: CachedModel, chat: "Chat", settings: Settings, announce: Callable
) -> Iterator:
    """Decode each question with all methods, then its further turns; yield the Result of each.

    `announce`: told of each run before it begins: the question, and what is run.
    """
    warm, count = set(), 0  # the labels of methods that are warmed up; prompts so far
    for question in questions:
        while question:
            runs = {method.label: [] for method in methods}
            errors = {method.label: question.error or method.error for method in methods}
            for method in in_turns(methods, settings.repeats, count):
                label = method.label
                if errors[label]:
                    continue
                try:
                    for _ in range(0 if label in warm else settings.warmup):  # allocates memory, loads kernels, …
                        announce(question, f"warm-up, {label}")
                        method.decode(question)
                    if not method.recompiles:
                        warm.add(label)
                    announce(question, label)
                    runs[label].append(method.decode(question))
                except Exception as error:  # above all: out of memory. It costs this outcome only.
                    errors[label] = one_line(error)
            verdicts, outcomes = judge(main, settings.temperature > 0, question, runs, errors), {}
            for label, error in errors.items():
                outcome = Outcome(tuple(runs[label]), None, verdicts.get(label), error)
                text = chat.decode(outcome.run.token_ids) if outcome.runs else None
                outcomes[label] = dataclasses.replace(outcome, text=text)
            yield Result(question, outcomes)
            count += 1
            baseline = outcomes[BASELINE]
            question = chat.follow_up(question, None if baseline.error else baseline.run.token_ids)


def in_turns(methods: list, repeats: int, count: int) -> Iterator:
    """All methods, so often: they take turns at being the first, also if every other prompt is a second turn."""
    for repeat in range(repeats):
        first = (count + count // len(methods) + repeat) % len(methods)
        yield from methods[first:] + methods[:first]


def judge(main: CachedModel, is_sampled: bool, question: Question, runs: dict, errors: dict) -> dict:
    """Compare the outputs of each method with the baseline's, and certify them: Verdicts, by the labels.

    Of sampled outputs it only sees that all logits are finite. Where they are not, the method has failed: the reason is
    added to `errors`.
    """
    labels = [label for label, error in errors.items() if not error]

    @functools.cache
    def divergence_of(output: tuple) -> Divergence | None:
        if BASELINE not in labels:
            raise LookupError("there is no baseline to compare it with")
        if not is_sampled:
            return find_divergence(main, question.ids, runs[BASELINE][0].token_ids, output)
        certify(main, question.ids, output)

    verdicts = {}
    for label in labels:
        try:
            found = filter(None, [divergence_of(run.token_ids) for run in runs[label]])
            worst = max(found, key=lambda divergence: (divergence.kind == "mismatch", divergence.gap), default=None)
            kind = worst.kind if worst else "sampled" if is_sampled else "identical"
            verdicts[label] = Verdict(kind, worst)
        except ArithmeticError as error:
            errors[label] = one_line(error)
        except Exception as error:  # it costs the verdict, not the timings
            verdicts[label] = Verdict("unchecked", why=one_line(error))
    return verdicts


# 9  Figures -----------------------------------------------------------------------------------------------------------
#
# All is computed with numpy, where what is not known is NaN, as 0 / 0 is, and as is whatever follows from it. Only in
# the finished Figures it is None.

Maybe = float | None  # a figure; None where there is no such figure


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the records of a method say, over one prompt or several. Report and JSON read them by these names."""

    prompts: int  # over how many prompts
    new_tokens: int  # of all these prompts
    latency_s: float  # seconds from a prompt's ids to its last token: the median of repeats, the mean over prompts
    tokens_per_s: float  # new tokens / latency: all tokens / all seconds
    time_to_first_token_s: Maybe  # seconds to the first token on the host: the mean over prompts
    time_per_output_token_s: Maybe  # (latency - time to first token) / (new tokens - 1)
    speedup_percent: Maybe  # 100 × (tokens per second / the baseline's - 1), over prompts that both decoded
    decode_speedup_percent: Maybe  # the same of the times per output token: without the prefill
    speedup_range_percent: list | None  # the smallest and the largest over the prompts
    speedup_interval_percent: list | None  # 95 % bootstrap interval, from 10 prompts on
    rounds: Maybe  # of speculative decoding
    drafted: Maybe  # draft tokens
    accepted: Maybe  # accepted draft tokens
    acceptance_rate: Maybe  # accepted / drafted
    alpha: Maybe  # accepted / tested: a round tests its accepted tokens and, if there is one, the rejected one
    mean_acceptance_length: Maybe  # tokens that a pass of the main model yields: emitted tokens / rounds
    acceptance_by_position: dict | None  # "joint" and "conditional" shares by position 1, 2, … in a round
    log_likelihood: Maybe  # sum of log p under the main model, of all draft tokens, in nats, at temperature 1
    log_likelihood_per_token: Maybe  # the same by draft token; closer to 0 is better
    draft_cost: Maybe  # c of Leviathan et al.: a draft step, in baseline steps
    verify_cost: Maybe  # v: a verify pass, in baseline steps
    predicted_speedup_percent: Maybe  # of a fixed K, from α, c and v: theorem 3.8 with the measured v
    ideal_speedup_percent: Maybe  # the same with v = 1
    speedup_if_percent: dict | None  # with a "free_draft", a "perfect_draft", or "free_verify" passes
    break_even_alpha: Maybe  # the α from which drafting pays at these c and v, with the best K
    weight_bandwidth_gb_s: Maybe  # of the baseline: the bytes of weights that a step reads, by its time
    identical: Maybe  # prompts whose output is the baseline's, token for token; None if sampled
    ties: int  # prompts whose output parts from the baseline's within rounding
    mismatches: int  # prompts whose output is not the main model's own
    unchecked: int  # prompts whose output could not be checked

    @property
    def mean_new_tokens(self) -> int:
        return round(self.new_tokens / self.prompts)

    @property
    def verdict(self) -> str:
        """Whether the output is the main model's own: one word for one prompt, or how many of several are."""
        if self.identical is None:
            return "sampled"
        if self.prompts > 1:
            return f"{self.identical}/{self.prompts}"
        counts = {"yes": self.identical, "tie": self.ties, "NO": self.mismatches, "?": self.unchecked}
        return next(word for word, count in counts.items() if count)


def figures_of(results: tuple, method: Method) -> Figures | None:
    """Every figure of one method over some prompts; None if it decoded none of them."""
    done = [result.outcomes for result in results if not result.outcomes[method.label].error]
    outcomes = [each[method.label] for each in done]
    pairs = [(each[BASELINE], each[method.label]) for each in done if not each[BASELINE].error]
    if not done:
        return None
    kinds = Counter(outcome.verdict.kind for outcome in outcomes)
    figures = dict.fromkeys(Figures.__annotations__) | {
        "prompts": len(done),
        "identical": None if kinds["sampled"] else kinds["identical"],
        "ties": kinds["tie"],
        "mismatches": kinds["mismatch"],
        "unchecked": kinds["unchecked"],
    }
    with numpy.errstate(all="ignore"):
        figures |= speed_figures(outcomes)
        if method.draft_tokens and not method.library:
            figures |= acceptance_figures(outcomes)
        if method.step_bytes:
            figures["weight_bandwidth_gb_s"] = method.step_bytes / figures["time_per_output_token_s"] / 1e9
        if pairs and method.label != BASELINE:
            figures |= comparison_figures(pairs, method.draft_tokens, figures["alpha"])
    return Figures(**known(figures))


def known(figure: Any) -> Any:
    """A figure, or a collection of them, with None for each that is not finite."""
    if isinstance(figure, dict):
        return {name: known(value) for name, value in figure.items()}
    if isinstance(figure, list):
        return list(map(known, figure))
    if isinstance(figure, float):  # or numpy's float64, which is one
        return float(figure) if math.isfinite(figure) else None
    return figure


def as_percent(factor: float) -> float:
    """How much faster a factor is, in percent."""
    return 100 * (factor - 1)


def speed_figures(outcomes: list) -> dict:
    """Tokens and seconds of one method."""
    runs = [outcome.run for outcome in outcomes]
    tokens = numpy.array([len(run.token_ids) for run in runs])
    seconds = numpy.array([outcome.latency_s for outcome in outcomes])
    first_s = numpy.array([run.first_token_s for run in runs], float)  # NaN of generate(), which does not tell
    decoding_s = [run.latency_s for run in runs] - first_s
    return {
        "new_tokens": int(tokens.sum()),
        "latency_s": seconds.mean(),
        "tokens_per_s": tokens.sum() / seconds.sum(),
        "time_to_first_token_s": first_s.mean(),
        "time_per_output_token_s": decoding_s.sum() / ((tokens - 1).sum() or math.nan),
    }


def round_columns(outcomes: list) -> numpy.ndarray:
    """All rounds, [5, rounds]: drafted and accepted tokens, and seconds, in the order of Round."""
    rounds = [each for outcome in outcomes for each in outcome.run.rounds]
    return numpy.array(rounds, float).reshape(-1, len(Round._fields)).T


def acceptance_figures(outcomes: list) -> dict:
    """What became of the draft tokens. The last round counts whole."""
    drafted, accepted, *_ = round_columns(outcomes)
    emitted = numpy.sum([len(outcome.run.token_ids) - 1 for outcome in outcomes])
    log_likelihood = sum(outcome.run.log_likelihood for outcome in outcomes)
    positions = numpy.arange(1, drafted.max(initial=0) + 1)[:, None]  # [positions, 1]: i = 1, 2, … in a round
    passed = (accepted >= positions).sum(axis=1)
    tested = ((accepted >= positions - 1) & (drafted >= positions)).sum(axis=1)
    return {
        "rounds": len(drafted),
        "drafted": int(drafted.sum()),
        "accepted": int(accepted.sum()),
        "acceptance_rate": accepted.sum() / drafted.sum(),
        "alpha": accepted.sum() / tested.sum(),
        "mean_acceptance_length": emitted / len(drafted),
        "acceptance_by_position": {
            # Of the rounds that drafted anything, those in which at least i draft tokens were accepted; and of those
            # whose first i - 1 were accepted and that drafted an i-th, those that accepted it, too.
            "joint": list(passed / (drafted > 0).sum()),
            "conditional": list(passed / tested),
        },
        "log_likelihood": log_likelihood,
        "log_likelihood_per_token": log_likelihood / drafted.sum(),
    }


def comparison_figures(pairs: list, k: int | str | None, alpha: Maybe) -> dict:
    """How much faster than the baseline, over pairs of its outcome and the method's; and what a draft costs.

    `alpha`: None for a method of the library.
    """
    before, after = zip(*pairs, strict=True)
    baseline, own = speed_figures(before), speed_figures(after)
    step_s = baseline["time_per_output_token_s"]
    gains = [as_percent(other.tokens_per_s / outcome.tokens_per_s) for outcome, other in pairs]
    figures = {
        "speedup_percent": as_percent(own["tokens_per_s"] / baseline["tokens_per_s"]),
        "decode_speedup_percent": as_percent(step_s / own["time_per_output_token_s"]),
        "speedup_range_percent": [min(gains), max(gains)],
        "speedup_interval_percent": speedup_interval(pairs) if len(pairs) >= 10 else None,
    }
    if alpha is None:
        return figures
    rounds = round_columns(after)
    drafting = rounds[:, rounds[0] > 0]
    drafted, accepted, draft_s, verify_s, _ = drafting.sum(axis=1)
    passes, seconds = drafting.shape[1], own["latency_s"] * len(pairs)
    c, v = draft_s / drafted / step_s, verify_s / passes / step_s
    k = k if (rounds[0] == k).all() else "auto"  # n-grams draft fewer where they find no more
    # What holds it back: what a free draft would have saved, one that is always right (had each round yielded all
    # that it drafted, fewer would have been needed), and verify passes at the price of a step.
    needless = (drafted - accepted) / (rounds.shape[1] + drafted)
    saved_s = numpy.array([draft_s, needless * rounds[4].sum(), verify_s - step_s * passes])
    if_gains = as_percent(own["new_tokens"] / baseline["tokens_per_s"] / (seconds - saved_s))
    if_percent = dict(zip(("free_draft", "perfect_draft", "free_verify"), if_gains, strict=True))
    return figures | {
        "draft_cost": c,
        "verify_cost": v,
        "predicted_speedup_percent": predicted_speedup(alpha, k, c, v),
        "ideal_speedup_percent": predicted_speedup(alpha, k, c, 1.0),
        "speedup_if_percent": if_percent if math.isfinite(v) else None,
        "break_even_alpha": break_even_alpha(c, v),
    }


def predicted_speedup(alpha: float, k: int | str, c: float, v: float) -> Maybe:
    """The speedup in percent that theory predicts: Leviathan et al. 2023, theorem 3.8, which has v = 1.

    A round that drafts K tokens yields 1 + α + … + α^K (equation 1) and costs K draft steps, c each, and a verify pass,
    v, in baseline steps. With auto, and n-grams, there is no one K.
    """
    return None if k == "auto" else as_percent(sum(alpha**i for i in range(k + 1)) / (k * c + v))


def break_even_alpha(c: float, v: float) -> Maybe:
    """The α from which drafting pays, with the best K of 1 to 32; None if it never does."""

    def pays(step: int) -> bool:
        return any(predicted_speedup(step / 2**40, k, c, v) > 0 for k in range(1, 33))

    step = bisect.bisect_left(range(2**40), True, key=pays)
    return step / 2**40 if step < 2**40 else None


def speedup_interval(pairs: list) -> list:
    """The speedup's 95 % interval in percent: percentile bootstrap, 2,000 resamples over prompts.

    Over few prompts it would be too narrow: it is expanded, by Student's t over the normal's 1.96 (Hesterberg 2015).
    """
    freedom = len(pairs) - 1
    samples = numpy.random.default_rng(0).integers(len(pairs), size=(2000, len(pairs)))
    measured = [(len(outcome.run.token_ids), outcome.latency_s) for pair in pairs for outcome in pair]
    tokens, seconds = numpy.array(measured).reshape(-1, 2, 2)[samples].sum(axis=1).T  # [baseline and own, samples]
    baseline, own = tokens / seconds
    gains = as_percent(own / baseline)
    middle = numpy.median(gains)
    wider = math.sqrt(1 + 1 / freedom) * (1 + 1.21 / freedom + 1.5 / freedom**2)  # t ≈ 1.96 (1 + 1.21/ν + 1.5/ν²)
    return list(middle + wider * (numpy.percentile(gains, [2.5, 97.5]) - middle))


# 10  The report -------------------------------------------------------------------------------------------------------


def three_digits(value: Maybe) -> str:
    """A number with about three significant digits; a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:#.3g}" if abs(value) >= 1 else f"{value:.3f}"


def percent(value: Maybe, sign: str = "") -> str:
    """A percentage without decimals, with sign="+" for a gain; a dash for None."""
    return "–" if value is None else f"{round(value):{sign}} %"


def share(value: Maybe) -> str:
    """A share of 1 as a percentage."""
    return percent(value and 100 * value)


def gain(value: Maybe) -> Text:
    """A speedup in percent, in a colour."""
    return Text(percent(value, "+"), "" if value is None else "green" if value > 0 else "red")


def counted(count: int, noun: str) -> str:
    """A number of things, e.g. "1 layer" or "2 layers"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def in_colour(word: str) -> Text:
    """A verdict in its colour."""
    return Text(word, {"yes": "green", "tie": "yellow", "NO": "bold red", "?": "bold red"}.get(word, ""))


# Columns of tables, by their headings: their width, which of a row's figures they show, and how.
PROMPT_COLUMNS = {
    "tokens": (6, "mean_new_tokens", str),
    "s": (6, "latency_s", three_digits),
    "TTFT": (6, "time_to_first_token_s", three_digits),
    "tok/s": (6, "tokens_per_s", three_digits),
    "faster": (7, "speedup_percent", gain),
    "accept": (6, "acceptance_rate", share),
    "length": (6, "mean_acceptance_length", three_digits),
    "log-l.": (6, "log_likelihood_per_token", three_digits),
    "same": (8, "verdict", in_colour),
}
SUMMARY_COLUMNS = {
    "tok/s": (6, "tokens_per_s", three_digits),
    "faster": (7, "speedup_percent", gain),
    "decode": (7, "decode_speedup_percent", gain),
    "predicted": (9, "predicted_speedup_percent", gain),
    "length": (6, "mean_acceptance_length", three_digits),
    "α": (5, "alpha", three_digits),
    "c": (5, "draft_cost", three_digits),
    "v": (5, "verify_cost", three_digits),
}
LEFT_OUT_FIRST = ("TTFT", "log-l.", "predicted", "decode", "length", "accept")  # where a terminal is too narrow


def print_table(console: Console, columns: dict, title: str, rows: dict, label_width: int) -> None:
    """Print rows of Figures, by their labels; with a title, below headings."""
    columns = dict(columns)
    room = console.width - sum(1 + width for width, *_ in columns.values())  # for the labels
    for heading in LEFT_OUT_FIRST:
        if heading in columns and room < label_width:
            room += 1 + columns.pop(heading)[0]
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, show_header=bool(title), header_style="bold")
    table.add_column(title, width=min(label_width, room), no_wrap=True, overflow="ellipsis")
    for heading, (width, *_) in columns.items():
        table.add_column(heading, width=width, no_wrap=True, justify="right")
    for label, row in rows.items():
        cells = [show(getattr(row, figure)) for _, figure, show in columns.values()]
        table.add_row(("  " if title else "    ") + plain(label), *cells)
    console.print(table)


def label_width(methods: tuple) -> int:
    """The width of a table's first column."""
    return max(14, *(len(method.label) + 4 for method in methods))


def figures_by_method(results: Results, prompts: tuple) -> dict:
    """Each method's figures over some prompts, by the labels of those that decoded any."""
    figures = {method.label: figures_of(prompts, method) for method in results.methods}
    return {label: row for label, row in figures.items() if row}


def print_prompt(console: Console, results: Results, result: Result, tokenizer: Any) -> None:
    """Print what the methods did with one prompt, and, if --show-text asks for it, the speculative texts."""
    question, rows = result.question, figures_by_method(results, [result])
    console.print(f"{question.label:>3} {plain(question.text)}", overflow="ellipsis", no_wrap=True)
    print_table(console, PROMPT_COLUMNS, "", rows, label_width(results.methods))
    for label, outcome in result.outcomes.items():
        if outcome.error:
            console.print(f"    {label}: {plain(outcome.error)}", style="red")
        if results.settings.show_text and outcome.runs and outcome.run.rounds:
            console.print(f"{label}:", style="bold")
            print_text(console, tokenizer, outcome.run)


ORIGINS = {  # where a token comes from: its style, or, without colours, the marks around it
    "accepted draft token": ("green", "{}"),
    "the main model's own, after a rejection": ("bold red", "«{}»"),
    "its bonus token": ("cyan", "‹{}›"),
    "its own, nothing drafted": ("", "{}"),
}


def print_text(console: Console, tokenizer: Any, run: Generation) -> None:
    """Print what was generated, each token by where it comes from: in colours, or, without them, in marks."""
    draft, correction, bonus, own = ORIGINS
    origins, pieces, done = [own], [], ""  # the first token is from the prefill
    for each in run.rounds:
        last = correction if each.accepted < each.drafted else bonus if each.drafted else own
        origins += [draft] * each.accepted + [last]
    for place, origin in enumerate(origins[: len(run.token_ids)], 1):
        decoded = tokenizer.decode(run.token_ids[:place])
        if place == len(run.token_ids) or not decoded.endswith("\ufffd"):  # else: a part of a character
            pieces.append((origin, safe(decoded[len(done) :])))
            done = decoded
    pieces.append((own, "\n"))
    for origin in ORIGINS:
        pieces += [(origin, origin), (own, "  ")]
    text, has_colours = Text(), console.is_terminal and not console.no_color
    for origin, piece in pieces:
        style, marks = ORIGINS[origin]
        if has_colours:
            text.append(piece, style)
        else:
            text.append(marks.format(piece))
    console.print(text, "")


def find(results: Results) -> tuple:
    """All methods' figures over all prompts; and our speculative methods, the fastest first.

    Only those are ranked that can be compared with the baseline.
    """
    figures = figures_by_method(results, results.prompts)
    gains = {label: row.speedup_percent for label, row in figures.items() if row.speedup_percent is not None}
    ours = [method for method in results.methods if method.draft and not method.library and method.label in gains]
    return figures, sorted(ours, key=lambda method: -gains[method.label])


# The sentences of the result. Each says one thing, or nothing ("") where it would not be true. `did`: the figures of
# the fastest method.


def say_which_is_best(figures: dict, ranking: list) -> str:
    best, *others = ranking
    rivals = [method for method in others if method.draft != best.draft] or others
    if not rivals or not figures[best.label].drafted:
        return ""
    what = "draft length" if rivals[0].draft == best.draft else "draft"
    lead = three_digits(figures[best.label].tokens_per_s / figures[rivals[0].label].tokens_per_s)
    return (
        f"The best {what} in this run was {best.label}, {lead} times as fast as the next, {rivals[0].label}. "
        "The data that measured it also picked it."
    )


def say_how_fast(did: Figures) -> str:
    spread, costs = "", ""
    if did.rounds and did.drafted == 0:
        return "Nothing was ever drafted: no draft token was worth its cost here, or none was found."
    if did.decode_speedup_percent is None or did.alpha is None:
        return "Too few tokens to tell how fast it is: raise --max-new-tokens, or ask for longer answers."
    if did.prompts > 1:
        kind = "95 % interval" if did.speedup_interval_percent else "over the prompts"
        low, high = did.speedup_interval_percent or did.speedup_range_percent
        spread = f" ({kind} {1 + low / 100:.2f} to {1 + high / 100:.2f})"
    if did.verify_cost is not None:
        v, c = three_digits(did.verify_cost), three_digits(did.draft_cost)
        costs = f" A verify pass cost v = {v} baseline steps, a draft step c = {c}."
    return (
        f"Speculative decoding was {1 + did.speedup_percent / 100:.2f} times as fast{spread}. "
        f"A pass of the main model yielded {did.mean_acceptance_length:.2f} tokens, "
        f"and α = {did.alpha:.3f} of the tested draft tokens were accepted.{costs}"
    )


def say_if_it_cannot_be(did: Figures) -> str:
    """A verify pass takes at least as long as a step, so the mean acceptance length bounds the speedup."""
    if did.verify_cost is None or did.decode_speedup_percent is None:
        return ""
    if did.verify_cost >= 0.9 and did.decode_speedup_percent <= 105 * did.mean_acceptance_length - 100:
        return ""
    return "These figures cannot all be right: the machine was busy with something else. Try --repeats 5."


def say_how_acceptance_falls(did: Figures) -> str:
    shares = ", ".join(map(share, did.acceptance_by_position["joint"]))
    return f"Rounds in which at least 1, 2, … draft tokens were accepted: {shares}." if shares else ""


def say_what_holds_it_back(did: Figures) -> str:
    gains = {kind: percent(value, "+") for kind, value in (did.speedup_if_percent or {}).items()}
    said = (
        "With a draft that cost nothing it would be {free_draft}, with one that is always right {perfect_draft}, and "
        "with verify passes as cheap as baseline steps {free_verify}."
    )
    return said.format(**gains) if gains else ""


def say_break_even(did: Figures) -> str:
    if did.verify_cost is None:
        return ""
    if did.break_even_alpha is None:
        return "At these c and v no draft pays, however often it is right."
    return f"At these c and v a draft pays from α = {did.break_even_alpha:.3f} on, with the best K."


def say_what_memory_allows(baseline: Figures, environment: dict, settings: Settings) -> str:
    limit, can_compile = environment["memory_bandwidth_gb_s"], environment["can_compile"]
    read, why = baseline.weight_bandwidth_gb_s, "this is what it waits for, and where speculation pays."
    if not limit or not read:
        return ""
    if read > 1.2 * limit:
        why = "so they come from a cache of the processor, or the machine was busy with something else."
    elif read < limit / 2:
        why = "it waits for something else."
        if settings.compile == "off" and can_compile:
            why = "as eager steps do, it waits for Python, kernels and their launches (--compile on)."
    rates = f"{three_digits(read)} GB of weights a second, memory can deliver {three_digits(limit)}"
    return f"The baseline reads {rates}: {why}"


def say_what_to_try(did: Figures, settings: Settings) -> str:
    auto = "" if "auto" in settings.draft_tokens else "--draft-tokens auto, or "
    advice = f"No draft pays here. Try {auto}a draft that is smaller, or right more often."
    return advice if did.drafted and did.speedup_percent < 0 else ""


def say_how_the_library_did(figures: dict, ranking: list, methods: tuple) -> str:
    lines, ours = [], {(method.draft, method.draft_tokens): method for method in ranking}
    for other in methods:
        if other.library and other.label in figures:
            own = ours.get((other.draft, other.draft_tokens), ranking[0]).label
            times = three_digits(figures[own].tokens_per_s / figures[other.label].tokens_per_s)
            lines.append(f"{own} was {times} times as fast as {other.label}: {other.library}.")
    return "\n".join(lines)


def judged(results: Results) -> list:
    """Where an output stands, and its verdict: of our speculative methods, or, if none ran, of the baseline."""
    outputs = {True: [], False: []}
    for result, method in itertools.product(results.prompts, results.methods):
        outcome = result.outcomes[method.label]
        if not outcome.error and not method.library:
            where = f"prompt {result.question.label}, {method.label}"
            outputs[method.draft is not None].append((where, outcome.verdict))
    return outputs[True] or outputs[False]


def say_what_is_right(outputs: list) -> str:
    kinds, count = Counter(verdict.kind for _, verdict in outputs), len(outputs)
    if kinds["sampled"]:
        return "The texts are sampled, so they differ: all methods draw from the main model's own distribution."
    if kinds["identical"] < count:
        verb = "are" if count > 1 else "is"
        return f"{kinds['identical']} of {counted(count, 'output')} {verb} the main model's own, token for token."
    what = "The output is" if count == 1 else f"All {count} outputs are"
    return f"{what} the main model's own, token for token." if count else ""


def say_worst(outputs: list, kind: str, meaning: str) -> str:
    """How many outputs got this verdict, and the one with the largest gap."""
    alike = [(verdict.divergence, where) for where, verdict in outputs if verdict.kind == kind]
    if not alike:
        return ""
    worst, where = max(alike, key=lambda pair: pair[0].gap)
    place = "both alike" if worst.index is None else f"new token {worst.index + 1}"
    whose = f" (at fault: {worst.at_fault})" if worst.at_fault else ""
    return (
        f"{meaning}: {len(alike)}. The largest: {where}, {place}{whose}, gap {worst.gap:.3g} (of the baseline "
        f"{worst.baseline_gap:.3g}), rounding noise {worst.noise:.3g}."
    )


def say_what_is_unchecked(outputs: list) -> str:
    reasons = [verdict.why for _, verdict in outputs if verdict.kind == "unchecked"]
    return f"{counted(len(reasons), 'output')} could not be checked: {reasons[0]}." if reasons else ""


def print_report(console: Console, results: Results) -> None:
    """Print the averages, what compares methods and categories, and the result in sentences."""
    figures, ranking = find(results)
    width, outputs, sentences = label_width(results.methods), judged(results), []
    if len(results.prompts) > 1:
        console.print("    mean")
        print_table(console, PROMPT_COLUMNS, "", figures, width)
    console.print()
    if ranking:
        by_speed = {method.label: figures[method.label] for method in ranking}
        print_table(console, SUMMARY_COLUMNS, "By speed", by_speed, width)
        console.print()
        if by_category := figures_by_category(results, ranking[0]):
            print_table(console, SUMMARY_COLUMNS, "By category", by_category, width)
            console.print()
        did, settings = figures[ranking[0].label], results.settings
        sentences = [
            say_what_to_try(did, settings),
            say_which_is_best(figures, ranking),
            say_how_fast(did),
            say_if_it_cannot_be(did),
            say_how_acceptance_falls(did),
            say_what_holds_it_back(did),
            say_break_even(did),
            say_what_memory_allows(figures[BASELINE], results.environment, settings),
            say_how_the_library_did(figures, ranking, results.methods),
        ]
    sentences += [
        say_what_is_right(outputs),
        say_worst(outputs, "mismatch", "Mismatches, NOT the main model's own (please report this as a bug)"),
        say_worst(outputs, "tie", "Ties, the main model's own within its rounding"),
        say_what_is_unchecked(outputs),
    ]
    for sentence in filter(None, sentences):
        console.print(sentence)


def figures_by_category(results: Results, method: Method) -> dict:
    """A method's figures over the prompts of each category."""
    groups = defaultdict(list)
    for result in results.prompts:
        if result.question.category is not None and not result.outcomes[method.label].error:
            groups[result.question.category].append(result)
    return {name: figures_of(group, method) for name, group in groups.items()}


def exit_status(results: Results) -> int:
    """1 if a prompt failed, or an output is wrong or unchecked. Raises UsageError if nothing was decoded."""
    ours = [method.label for method in results.methods if not method.library]
    outcomes = [result.outcomes[label] for result, label in itertools.product(results.prompts, ours)]
    if all(outcome.error for outcome in outcomes):
        raise UsageError(f"no prompt could be decoded ({outcomes[0].error})")
    return int(any(each.error or each.verdict.kind in ("mismatch", "unchecked") for each in outcomes))


def to_json(results: Results) -> dict:
    """All that was measured, and all figures."""
    methods, prompts = [], []
    for method in results.methods:
        categories = figures_by_category(results, method).items()
        told = {key: getattr(method, key) for key in ("label", "draft", "draft_tokens", "library", "costs", "error")}
        told["summary"] = as_json(figures_of(results.prompts, method))
        methods.append(told | {"categories": {name: as_json(row) for name, row in categories}})
    for result in results.prompts:
        told = {key: getattr(result.question, key) for key in ("number", "question_id", "turn", "category")}
        told |= {"prompt": result.question.text, "prompt_tokens": len(result.question.ids) or None}
        told["outcomes"] = {method.label: outcome_json(result, method) for method in results.methods}
        prompts.append(told)
    return {
        "schema": 2,
        "environment": results.environment,
        "settings": dataclasses.asdict(results.settings),
        "methods": methods,
        "prompts": prompts,
        "complete": results.complete,
    }


def as_json(record: Any) -> dict | None:
    """A dataclass as a dictionary, or None."""
    return record and dataclasses.asdict(record)


def outcome_json(result: Result, method: Method) -> dict:
    """What a method did with a prompt."""
    outcome = result.outcomes[method.label]
    kind, divergence, why = outcome.verdict or (None, None, None)
    run = outcome.run if outcome.runs else None
    return {
        "error": outcome.error,
        "figures": as_json(figures_of([result], method)),
        "token_ids": run and run.token_ids,
        "text": outcome.text,
        "rounds": run
        and {
            "drafted": [each.drafted for each in run.rounds],
            "accepted": [each.accepted for each in run.rounds],
            "seconds": [each.round_s for each in run.rounds],
        },
        "verdict": kind,
        "divergence": as_json(divergence),
        "unchecked": why,
    }


def save(path: str | None, option: str, text: str | None) -> None:
    """Replace a file, if one is named, at once, so that it is always whole; None: see if one can. Raises UsageError."""
    if not path:
        return
    with cli_errors(f"write {path}", f"name another file with {option}"):
        target = pathlib.Path(path).resolve()  # a link stays a link
        if target.exists() and not target.is_file():
            raise UsageError(f"{path} is not a file that can be replaced; name another with {option}")
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_text(text or "", encoding="utf-8")
            if text is not None:
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


# 11  Loading ---------------------------------------------------------------------------------------------------------
#
# For what is missing, broken or does not fit, all of this raises UsageError.

JSON_START = (  # a bracket alone on the first line, or an object with a key of ours
    rb"[\s\xef\xbb\xbf]*([\[{][\s{]*\n|(\[\s*)?\{.*"
    rb'"(prompt|turns|question|problem|instruction|messages|conversations?)"\s*:.*\}[],\s]*(\n|$))'
)
OTHER_FILES = tuple(
    """.csv .tsv .xls .xlsx .ods .parquet .arrow .feather .orc .avro .yaml .yml .toml .xml .html .pdf .doc .docx
    .odt .rtf .pkl .pickle .pt .bin .npy .npz .h5 .db .sqlite .zip .gz .tgz .tar .bz2 .xz .zst .lz4 .7z .rar""".split()
)
LISTS = ("turns", "messages", "conversations", "conversation")  # of MT-Bench, OpenAI, ShareGPT and LMSYS
KEYS = ("prompt", "turns", "question", "problem", "instruction", *LISTS)
ROLES = {"system": "system", "user": "user", "human": "user"}  # ours, by theirs
ROLES |= dict.fromkeys(["assistant", "gpt", "chatgpt", "bing", "bard"], "assistant")
UNUSABLE = {  # how texts begin that are no prompts, and why
    r"\s*$": 'no text, or not text alone; write one string, as {"prompt": "…"} or {"turns": ["…"]}',
    r"(?s).*[\ud800-\udfff]": "half of a surrogate pair is not a character; leave it out",
    r"\s*FULL BENCHMARK DATA SHOULD BE FETCHED": "SPEED-Bench only says here where the text is to be fetched; "
    "let NVIDIA's prepare_data.py fetch it, or leave such rows out",
}


def read_questions(path: str, limit: int | None = None) -> list:
    """The questions of a file, without ids; or `limit` of them, from all categories alike.

    A prompt a line; or JSON, by the file's name or its first line: an object a line, or a list of objects. Rows without
    a usable text are questions with an error.
    """
    with cli_errors(f"read {path}", "name a text file with --prompts"):
        data, unit = pathlib.Path(path).read_bytes(), "line"
    if path.lower().endswith(OTHER_FILES) or data.count(0) > len(data) / 100:
        raise UsageError(
            f"{path} is in a format that is not read here: unpack it, and save it as UTF-8 text, a prompt on "
            'each line, or as .jsonl, {"prompt": "…"} on each line'
        )
    lines = data.split(b"\n")
    is_json = path.lower().endswith((".json", ".jsonl", ".ndjson")) or re.match(JSON_START, data)
    with contextlib.suppress(ValueError, RecursionError):
        if is_json and isinstance(entries := json.loads(data), list):
            lines, unit = [json.dumps(entry).encode() for entry in entries], "object"
    questions = []
    for number, line in enumerate(lines, 1):
        kind, where = "JSON" if is_json else "UTF-8", f"{unit} {number}"
        with cli_errors(
            f"read {path}, {where}: this is not {kind}", "save it as UTF-8; JSON as a list, or an object a line"
        ):
            text = line.decode("utf-8-sig").strip()
            if not text or text.startswith("#"):
                continue
            entry = json.loads(text, parse_constant=lambda _: None) if is_json else {"prompt": text}
        try:
            questions.append(parse_question(entry, len(questions) + 1))
        except UsageError as error:  # of many rows, some are unusable: it matters if all are
            questions.append(Question("", len(questions) + 1, question_id=where, error=str(error)))
    if not questions:
        raise UsageError(f"{path} has no prompts; write one on each line")
    usable = [question for question in questions if not question.error]
    if not usable:
        raise UsageError(f"{path}, {questions[0].label}, {questions[0].error}")
    ranks = defaultdict(itertools.count)  # each question's place within its category
    ranked = sorted(usable, key=lambda question: next(ranks[question.category]))
    chosen = {question.number for question in ranked[:limit]}
    return [question for question in questions if question.error or question.number in chosen]


def parse_question(entry: Any, number: int) -> Question:
    """The question in a JSON object, at the first of KEYS: a text, turns or messages. Raises UsageError without one."""
    entry = entry if isinstance(entry, dict) else {}
    key = next((key for key in KEYS if entry.get(key) is not None), "prompt")
    content, category, question_id = entry.get(key), entry.get("category"), entry.get("question_id")
    several = content if key in LISTS and isinstance(content, list) else [content]
    messages = list(filter(None, [parse_message(message, key) for message in several]))
    if key == "turns":  # what the user says; answers are the baseline's own
        messages = [message for message in messages if message["role"] == "user"]
    while messages and messages[-1]["role"] != "user":  # an answer to the last question
        messages.pop()
    while messages and messages[0]["role"] == "assistant":  # an answer to none
        messages.pop(0)
    messages = messages or [parse_message(None, key)]
    first = 0 if key == "turns" else len(messages) - 1
    text, *later = [message["content"] for message in messages[first:]]
    about = ("input", "context") if key in ("instruction", "question") else ()  # of Alpaca, Dolly and SQuAD
    for name in filter(entry.get, about):
        text += "\n\n" + parse_message(entry[name], name)["content"]
    return Question(
        text,
        number,
        turn=1 if later else None,
        category=None if category is None else str(category),
        question_id=question_id if isinstance(question_id, str | int) else question_id and str(question_id),
        earlier=tuple(messages[:first]),
        later=tuple(later),
    )


def parse_message(message: Any, key: str) -> dict | None:
    """{"role": …, "content": …} of a message or a text of the user's, from this key; joins parts.

    None if it says nothing and is not the user's, as an answer that only calls a tool. Raises UsageError.
    """
    role = "user"
    if isinstance(message, dict):
        role = ROLES.get(str(message.get("role", message.get("from"))))
        message = message.get("content", message.get("value"))
    if role is None:
        raise UsageError(f"{key}: a role is not user, assistant or system; leave it out")
    with contextlib.suppress(KeyError, TypeError):  # it has no parts {"type": "text", "text": …}
        message = "\n".join([part["text"] for part in message])
    text = message if isinstance(message, str) else ""
    if role != "user" and not text.strip():
        return None
    for pattern, why in UNUSABLE.items():
        if re.match(pattern, text):
            raise UsageError(f"{key}: {why}")
    return {"role": role, "content": text}


@dataclasses.dataclass(frozen=True)
class Chat:
    """How questions become prompts of token ids, and answers become text."""

    tokenizer: Any
    template_args: dict | None  # of the chat template; None: prompts are fed as they are
    max_new_tokens: int
    end_ids: frozenset
    room: int  # tokens that the last round may draft beyond the last new token
    context: float  # the most tokens that both models can read
    limited_by: str  # whose limit that is: "main" or "draft"
    vocabulary: int  # the main model's: all ids are below it
    switches: tuple = ()  # (position, model's name), where a model changes how it reads

    def encode(self, question: Question) -> Question:
        """The question with its ids, and where its output ends; with an error if it does not fit."""
        hint = "check --chat-template-args" if self.template_args else "--no-chat-template feeds it as it is"
        try:
            with cli_errors("put it into the chat template", hint):
                ids = self.ids_of(question.text, question.earlier)
                # Of each further turn: 8 tokens end an answer in the template.
                turns = [self.max_new_tokens + 8 + len(self.ids_of(text)) for text in question.later]
            if not ids or max(ids) >= self.vocabulary:
                raise UsageError("it has no tokens, or some that the main model lacks")
        except UsageError as error:
            return dataclasses.replace(question, error=str(error))
        end, error, room = len(ids) + self.behind, None, f"with {self.behind} tokens for output and draft,"
        if end > self.context:
            limit = f"the context of {self.context} (the {self.limited_by} model's limit)"
            error = f"{room} it exceeds {limit}; shorten it, or lower --max-new-tokens or --draft-tokens"
        for position, name in self.switches:
            if len(ids) <= position < end:
                error = f"{room} it crosses {position}, where {name} reads differently"
        return dataclasses.replace(
            question,
            ids=tuple(ids),
            max_new_tokens=self.max_new_tokens,
            end_ids=self.end_ids,
            longest=len(ids) + sum(turns),
            error=error,
        )

    @property
    def behind(self) -> int:
        """Tokens of output and of the last round's draft; costs are measured with a round behind a prompt."""
        return max(self.max_new_tokens, 2) + self.room

    def follow_up(self, question: Question, answer_ids: tuple | None) -> Question | None:
        """The next turn, or None; with an error if there is no answer to this one (None), or it does not fit."""
        if not question.later:
            return None
        text, *later = question.later
        answer = {"role": "assistant", "content": self.decode(answer_ids or ())}
        turn = dataclasses.replace(
            question,
            turn=question.turn + 1,
            ids=(),
            text=text,
            earlier=(*question.earlier, {"role": "user", "content": question.text}, answer),
            later=tuple(later),
            error=f"turn {question.turn} has no answer to go on from" if answer_ids is None else None,
        )
        return turn if turn.error else self.encode(turn)

    def decode(self, ids: tuple) -> str:
        """The text of these ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def ids_of(self, text: str, earlier: tuple = ()) -> list:
        """The ids of a text behind earlier messages, in the chat template if there is one.

        Without, answers follow directly, and texts after a blank line. What the tokenizer adds before them stays,
        unless it is written there; what it adds behind them, an end of text, does not.
        """
        messages = [*earlier, {"role": "user", "content": text}]
        if self.template_args is not None:
            return self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"]
        parts = [("" if message["role"] == "assistant" else "\n\n") + message["content"] for message in messages]
        text = "".join(parts).removeprefix("\n\n")
        written = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        marked = self.tokenizer(text)["input_ids"]
        return marked[: marked.index(written[0])] + written if written else []

    def render(self, messages: list) -> str:
        """The messages in the chat template; as lists of parts, if it does not show the last one as a text.

        Raises what the template raises, or UsageError if it never shows the longest word.
        """
        word, trouble = max(re.findall(r"\w+", messages[-1]["content"]), key=len, default="").casefold(), None
        parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        for form in (messages, parts):
            try:
                text = self.tokenizer.apply_chat_template(
                    form, add_generation_prompt=True, tokenize=False, **self.template_args
                )
                if word in text.casefold():
                    return text
            except Exception as error:
                trouble = trouble or error
        name = self.tokenizer.name_or_path
        raise trouble or UsageError(f"the chat template of {name} drops what the user says: try --no-chat-template")


def fitting(chat: Chat, questions: list) -> tuple:
    """The questions that fit, with ids, and a notice for each reason why others do not."""
    encoded = [question if question.error else chat.encode(question) for question in questions]
    by_reason = defaultdict(list)  # the labels of questions, by why they are left out
    for question in encoded:
        by_reason[question.error].append(question.label)
    if not by_reason.pop(None, None):
        reason, _ = max(by_reason.items(), key=lambda pair: len(pair[1]))
        raise UsageError(f"no prompt can be read: {reason}")
    notices = [f"{counted(len(of), 'prompt')} left out (first: {of[0]}): {why}." for why, of in by_reason.items()]
    return [question for question in encoded if not question.error], notices


WEIGHTS = r"(?!consolidated|adapter)[^/]*\.safetensors"  # the files of a model's own weights
VOCABULARIES = re.compile(r"tokenizer\.json|tekken\.json|vocab\..*|.*\.(model|tiktoken)")
DRAFT_HEAD = (  # what a config.json says of one
    r'(?i)"(?:architectures": \["|model_type": "|(?=speculators_config|medusa_num_heads|draft_vocab_size))'
    r"(\w*(?:eagle|medusa|mtp|dflash|speculator|_assistant|draft_vocab)\w*)"
)
DECODER = "take a decoder (Llama, Gemma, Qwen, …)"
NEEDS = "it needs memory, and config.json and safetensors weights of a whole causal language model"
PARTS = {  # what stands in a folder without weights of its own, and what to do
    "adapter_config.json": "is an adapter (LoRA): merge it into its base (peft's merge_and_unload), and name that",
    ".gguf": "has GGUF files only, which are not loaded here: name the model's original weights",
}
CHANGES_TEXT = """
    min_length min_new_tokens num_beams repetition_penalty encoder_repetition_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids force_words_ids constraints forced_bos_token_id guidance_scale
    forced_eos_token_id exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
    token_healing watermarking_config stop_strings penalty_alpha dola_layers remove_invalid_values
"""  # settings of generate() that change what a model writes, also greedily
SAMPLING = "do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff"


def choose_device(wanted: str) -> torch.device:
    """The device that --device names; auto: the accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with cli_errors(f"use the device {wanted!r}", f"PyTorch finds {accelerator} here: use --device auto"):
        if wanted == "auto" and PROCESSES > 1 and accelerator != "cpu":
            accelerator = f"{accelerator}:{os.environ.get('LOCAL_RANK', RANK)}"
        probe = torch.zeros(1, device=accelerator if wanted == "auto" else wanted)
        probe.item()
        if probe.device.type != "cpu":
            torch.accelerator.set_device_index(probe.device)  # the one whose events `mark` records
        return probe.device


def device_name(device: torch.device) -> str:
    """What the device calls itself, e.g. "NVIDIA H100" or "AMD EPYC"."""
    if device.type != "cpu":
        return getattr(torch.get_device_module(device), "get_device_name", str)(device)
    with contextlib.suppress(OSError, TypeError):  # there is no such file, or no such line in it
        return re.search(r"model name\s*: (.+)", pathlib.Path("/proc/cpuinfo").read_text(errors="replace"))[1]
    return platform.processor() or platform.machine()


@functools.cache
def ask_hub(name: str) -> Any:
    """What the hub says of a model, or the error; asked once, and not for half a minute, as downloads do."""
    try:
        return huggingface_hub.HfApi().model_info(name, timeout=4, files_metadata=True)
    except Exception as error:  # whatever network and hub come up with
        return error


@functools.cache
def fetch(name: str, weights: str = "") -> str:
    """A model's folder: the name itself, or what the hub has by that name, without its code.

    `weights`: "*.safetensors" to fetch them, too. What was fetched before is used if the hub does not answer.
    """
    if os.path.isdir(name):
        return name
    about = ask_hub(name)
    is_refused = isinstance(about, Exception)
    try:
        return huggingface_hub.snapshot_download(
            name,
            allow_patterns=["*.json", "*.jinja", "*.model", "*.txt", weights],
            ignore_patterns="*/*",
            etag_timeout=5,
            local_files_only=is_refused,
        )
    except Exception as error:
        trouble = about if is_refused else error
    if isinstance(trouble, hub_errors.GatedRepoError):
        raise UsageError(
            f"{name} is a gated model, and you have no access: accept its licence at "
            f"https://huggingface.co/{name}, then `hf auth login`; or take a pair that needs none, as --main "
            "Qwen/Qwen2.5-7B-Instruct --draft Qwen/Qwen2.5-0.5B-Instruct (16 GB in bfloat16)"
        )
    if isinstance(trouble, hub_errors.RepositoryNotFoundError | hub_errors.HFValidationError):
        raise UsageError(
            f"there is no folder {name}, and the hub shows no model of that name: check the spelling, or "
            "`hf auth login` if it is private"
        )
    raise UsageError(
        f"cannot get {name} from the hub: {one_line(trouble)}; check the connection, the token "
        "(`hf auth login`) and the disk (HF_HOME), name local folders with --main and --draft, or try --demo"
    )


def file_sizes(name: str) -> dict:
    """A model's files and their bytes: in its folder, or as the hub states them before they are downloaded."""
    if not os.path.isdir(name) and isinstance(about := ask_hub(name), huggingface_hub.ModelInfo):
        return {file.rfilename: file.size or 0 for file in about.siblings or ()}
    return {path.name: path.stat().st_size for path in pathlib.Path(fetch(name)).iterdir() if path.is_file()}


class ModelFiles(NamedTuple):
    """A model before its weights are loaded."""

    name: str
    config: transformers.PreTrainedConfig
    generation: GenerationConfig  # what generate() would do by itself
    model: PreTrainedModel  # of meta tensors, which have no storage
    weight_bytes: int
    quantization: str  # "" if there is none
    notice: str  # what the user should know of it, or ""

    @property
    def context(self) -> float:
        """The most tokens of a text."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None) or math.inf


def read_model(name: str, dtype: torch.dtype, device: torch.device) -> ModelFiles:
    """Build a model of meta tensors from its configuration, if it can run here."""
    folder, files, hint = fetch(name), list(file_sizes(name)), NEEDS
    for part, why in PARTS.items():
        if part in " ".join(files) and not any(re.fullmatch(WEIGHTS, file) for file in files):
            raise UsageError(f"{name} {why}")
    with cli_errors(f"load {name}", NEEDS):
        written, _ = transformers.PreTrainedConfig.get_config_dict(folder)
    if asked := re.search(r'"_?attn_implementation": "\w+"', json.dumps(written)):
        hint = f"take {asked[0]} out of its config.json, if that is not to be had here"
    with cli_errors(f"load {name}", hint):
        if head := re.search(DRAFT_HEAD, json.dumps(written)):
            raise UsageError(
                f"{name} is no model of its own but works within another ({head[1]}): take a small model of the "
                "main model's family, or --draft ngram"
            )
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
        if getattr(text, "sliding_window", None) == 0 and not getattr(text, "layer_types", None):
            text.sliding_window = None  # switched off
        if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
            raise UsageError(
                f"{name} ({config.model_type}) is an encoder-decoder, or not a text-generation model; {DECODER}"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with cli_errors(f"read the generation_config.json of {name}", "mend it, or leave it out"):
        generation = GenerationConfig.from_model_config(written)  # where old models have it
        if "generation_config.json" in files:
            generation = GenerationConfig.from_pretrained(folder)
    quantization, packed = read_quantization(name, config, device)
    weight_bytes = packed or model.num_parameters() * dtype.itemsize
    notice = f"The adapter beside the weights of {name} is ignored." if "adapter_config.json" in files else ""
    return ModelFiles(name, config, generation, model, weight_bytes, quantization, notice)


def read_quantization(name: str, config: transformers.PreTrainedConfig, device: torch.device) -> tuple:
    """A quantised model's format, e.g. "awq", and its files' bytes, or 0 if it runs decompressed."""
    text = config.get_text_config()
    stated = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if not stated:
        return "", 0
    with cli_errors(f"run {name}, which is quantised", "install what that asks for, or take another checkpoint of it"):
        method = stated.get("quant_method", "bitsandbytes")
        quantizer = transformers.quantizers.AutoHfQuantizer.from_config(stated, pre_quantized=True)
        quantizer.validate_environment(device_map={"": device}, weights_only=True)
    # compressed-tensors does so in the first pass; others when loaded, where the device lacks kernels.
    if method == "compressed-tensors" or getattr(quantizer.quantization_config, "dequantize", False):
        return f"{method}, decompressed to run", 0
    return method, sum(size for file, size in file_sizes(name).items() if re.fullmatch(WEIGHTS, file))


def free_memory(device: torch.device) -> int:
    """The bytes that are free on a device. MPS shares the CPU's memory."""
    if device.type in ("cuda", "xpu"):
        return torch.accelerator.get_memory_info(device)[0]
    return psutil.virtual_memory().available


def cache_bytes(model: PreTrainedModel, tokens: int, is_compiled: bool = False) -> int:
    """The bytes of a text's KV cache: what a model of meta tensors stores for a token, as often as it keeps it.

    A compiled cache has room for the whole text, also in layers with a sliding window; an eager one reads the prompt.
    """
    layers, total = [], 0
    small = copy.deepcopy(model).bfloat16()  # experts in float32 do not run on meta tensors
    with contextlib.suppress(Exception):  # what does not run there at all is not counted
        layers = small(torch.tensor([[1]], device="meta"), use_cache=True).past_key_values.layers
    for layer in layers:
        if getattr(layer, "keys", None) is not None:
            window = None if is_compiled else getattr(layer, "sliding_window", None)
            total += min(tokens, window or tokens) * (layer.keys.numel() + layer.values.numel())
    return total * model.dtype.itemsize * (2 if is_compiled else 1)


def check_memory(files: list, device: torch.device, tokens: int, is_compiled: bool = False) -> None:
    """Raise UsageError if models and their KV caches of so many tokens take more than the device has free."""
    needed, parts = 0.0 if device.type == "cpu" else 1.0, []  # 1 GB: an accelerator's libraries
    for of in files:
        weights, cache = of.weight_bytes / 1e9, cache_bytes(of.model, tokens, is_compiled) / 1e9
        if is_compiled and device.type == "cpu" and not of.model._is_stateful:  # StepLinear's second copy, at most
            weights *= 2
        needed += 1.05 * (weights + cache)  # and something to work in
        parts.append(f"{of.name} {weights:.1f} + {cache:.1f}")
    if needed > (free := free_memory(device) / 1e9):
        raise UsageError(
            f"too little memory: {device} has {free:.1f} GB free, and {needed:.1f} are needed (weights + KV cache "
            f"of {tokens:,} tokens: {', '.join(parts)}): try --dtype bfloat16, --device-map auto, or a smaller pair, "
            "as --main HuggingFaceTB/SmolLM2-1.7B-Instruct --draft HuggingFaceTB/SmolLM2-135M-Instruct (4 GB)"
        )


def spread(device: torch.device, max_memory: str | None, scratch: str) -> dict:
    """How --device-map auto places a model: into nine tenths of what is free by now."""
    from accelerate.utils import convert_file_size_to_int

    limits = {"mps" if device.type == "mps" else "cpu": int(0.9 * psutil.virtual_memory().available)}
    for index in range(torch.accelerator.device_count() if device.type in ("cuda", "xpu") else 0):
        limits[index] = int(0.9 * free_memory(torch.device(device.type, index)))
    first = device.type if device.type in limits else device.index or 0
    with cli_errors(f"take --max-memory {max_memory}", "write a size such as 10GB or 500MB"):
        limits[first] = min(limits[first], convert_file_size_to_int(max_memory or 2**60))
    return {"device_map": "auto", "max_memory": limits, "offload_folder": scratch}


def load_model(files: ModelFiles, device: torch.device, placement: dict | None = None) -> PreTrainedModel:
    """Load a model's weights, onto the device or as `spread` says."""
    with cli_errors(f"load {files.name}", NEEDS):
        model, loading = AutoModelForCausalLM.from_pretrained(
            fetch(files.name, "*.safetensors"),
            config=files.config,
            dtype=files.model.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            adapter_kwargs={"subfolder": "none"},  # where there is none: peft would add one to the weights
            **(placement or {"device_map": device}),
        )
    if missing := sorted(loading["missing_keys"]):
        raise UsageError(f"{files.name} lacks {len(missing)} of its weights ({missing[0]}, …): download a whole model")
    check_reading(model, files.name, device)
    return model


def check_reading(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Raise UsageError unless a model reads ids from left to right, and goes on from its cache.

    It is asked itself, on its weights: many a model that reads both ways (BERT, XLNet) is among the library's causal
    ones, and runs, but predicts each token from those that follow it, too. Mamba 1, as the library has it, begins each
    pass of several tokens with an empty state, which changes less than rounding does in bfloat16.
    """
    with cli_errors(f"run {name} on token ids alone, with a cache", DECODER), torch.inference_mode():
        cached, ids = cached_model(model, None, device), torch.arange(10, 18, device=device)[None]
        whole = model(ids, use_cache=False).logits[0]
        changed = model(torch.cat([ids[:, :4], ids[:, :4]], dim=1), use_cache=False).logits[0]
        cached.prefill(ids[:, :4])
        together = cached.forward(ids[:, 4:])
        cached.roll_back(3)
        again = torch.cat([cached.forward(ids[:, place : place + 1]) for place in (5, 6, 7)])
        if model._is_stateful:
            cached.prefill(ids[:, :4])
            for state in cached.states(("recurrent_states",)):
                state.zero_()
            if cached.forward(ids[:, 4:]).equal(together):
                raise UsageError(f"{name} reads several tokens as if there were no state before them; {DECODER}")
    rounding = torch.finfo(model.dtype).eps
    if difference(whole[:4], changed[:4]).min() > min(100 * rounding, 0.1):  # of the same shapes: hardly any rounding
        raise UsageError(f"{name} reads both ways: a later token changes what it says of earlier ones; {DECODER}")
    # The least of three, as rounding can send a token to another expert, but hardly each; a state's error accumulates.
    off = difference(whole[5:], again)
    if off.min() > rounding**0.5 or (model._is_stateful and off.max() > 100 * rounding):
        raise UsageError(f"{name} does not go on from a cache as from the text itself; {DECODER}, or another --dtype")


def difference(logits: Tensor, others: Tensor) -> Tensor:
    """How far the logits of n positions differ, [n, vocabulary] both, in standard deviations, [n]."""
    return (logits - others).float().std(-1) / logits.float().std(-1)


def rotary_switch(config: transformers.PreTrainedConfig) -> float:
    """The length from which on a model reads positions by other rotary factors (longrope); infinity without.

    A text that grows past it was read by both, and by which of them depends on how many tokens a pass read.
    """
    rotary = str(getattr(config.get_text_config(), "rope_parameters", None))
    switch = re.search(r"'original_max_position_embeddings': (\d+)", rotary)
    return int(switch[1]) if "longrope" in rotary else math.inf


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer. Without its files, the library would make one of 5 tokens."""
    folder = fetch(name)
    if not any(map(VOCABULARIES.fullmatch, os.listdir(folder))):
        raise UsageError(
            f"{name} has no tokenizer: {folder} lacks tokenizer.json (or vocab.json and merges.txt, or "
            "tokenizer.model): copy it from the model that this one was made from"
        )
    with cli_errors(f"load the tokenizer of {name}", "take its files anew from where the model comes from"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def shared_ids(main: Any, draft: Any, names: str) -> int:
    """How many ids two tokenizers know alike; behind them, there are only added tokens."""
    known, drafted = main.get_vocab(), draft.get_vocab()
    differing = known.items() ^ drafted.items()
    ids = [token_id for _, token_id in differing]
    shared = min(ids, default=sys.maxsize)
    added = main.get_added_vocab() | draft.get_added_vocab()
    behind = {token for token, token_id in known.items() | drafted.items() if token_id >= shared}
    if behind - added.keys() or len(set(ids)) < len(ids):  # the last: one id has two meanings
        token, _ = min(differing)
        raise UsageError(
            f"{names} have different tokenizers ({len(known):,} and {len(drafted):,} tokens; {token!r} is "
            f"{known.get(token, 'nothing')} and {drafted.get(token, 'nothing')}): take a draft of the main "
            "model's family, or --draft ngram"
        )
    return shared


def end_tokens(files: ModelFiles, tokenizer: Any) -> frozenset:
    """The tokens that end a text: those of the generation config, and the tokenizer's own."""
    stated = files.generation.eos_token_id
    with cli_errors(f"take eos_token_id {stated} of {files.name}", "write an id, or a list, in generation_config.json"):
        ids = {*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id} - {None}
        return frozenset(map(operator.index, ids))


def unapplied_settings(files: ModelFiles, temperature: float) -> str:
    """What generate() would do to the text by itself and this program does not, in one line; or "".

    How to sample is a matter of the options: it is only mentioned where this run is greedy.
    """
    stated, neutral = files.generation.to_diff_dict(), GenerationConfig._get_default_generation_params()
    told = [key for key in CHANGES_TEXT.split() if stated.get(key) and stated[key] != neutral.get(key, 1)]
    if stated.get("do_sample") and not temperature:
        told += [f"{key} {stated[key]}" for key in SAMPLING.split() if key in stated]
        told[-1] += " (--temperature, --top-k, --top-p sample)"
    return f"Not applied of the generation settings of {files.name}: {', '.join(told)}." if told else ""


def read_draft(name: str, main: ModelFiles, tokenizer: Any, device: torch.device) -> tuple:
    """A draft model before its weights are loaded, and how many ids it shares with the main model.

    Where it raises UsageError, other drafts can be measured without this one.
    """
    files = read_model(name, main.model.dtype, device)
    shared = shared_ids(tokenizer, load_tokenizer(name), f"{main.name} and {name}")
    sizes = [of.config.get_text_config().vocab_size for of in (main, files)]
    return files, min(shared, *sizes)


# 12  The run ----------------------------------------------------------------------------------------------------------


class Interrupt:
    """What Ctrl-C does: the first ends the measuring, and what was measured is reported; a second ends the program."""

    came = False
    waits = False  # until what is measured is printed and written
    scratch = ""  # the folder of temporary files

    def __call__(self, *_: Any) -> None:
        if self.came and PROCESSES == 1:  # to several, the launcher passes on the first one twice
            shutil.rmtree(self.scratch, ignore_errors=True)
            os._exit(130)
        self.came = True
        if not self.waits:
            raise KeyboardInterrupt


class Models(NamedTuple):
    """The models that the options name, before their weights are loaded."""

    files: dict  # ModelFiles by name, the main model first
    vocabularies: dict  # by name, how many ids a draft may propose: those that both models know alike
    errors: dict  # by name, why a draft model cannot run
    tokenizer: Any  # the main model's


class Ready(NamedTuple):
    """All that the measuring needs."""

    results: Results  # without any prompt yet
    questions: list[Question]  # of all processes
    chat: Chat
    main: CachedModel
    console: Console
    stderr: Console


def near(path: pathlib.Path) -> str:
    """A path from here, which is shorter to read; as it is where there is none, as to another drive."""
    with contextlib.suppress(ValueError, OSError):
        return os.path.relpath(path)
    return str(path)


def resolve_settings(given: Settings, device: torch.device) -> tuple:
    """The settings in force on this machine, and what the user must be told of them. Raises UsageError."""
    notices, on_cpu = [], device.type == "cpu"
    is_demo = given.demo or (on_cpu and not given.main and given.draft in (None, ("ngram",)))
    main, draft, folder = given.main or DEFAULT_MAIN, DEFAULT_DRAFT, HERE
    if is_demo:
        why = "This" if given.demo else "No GPU in use: this"
        which = "main model, which is tiny" if given.draft else "pair of tiny models"
        notices.append(f"{why} is the bundled {which}. Its speed says nothing about Gemma's.")
        if not (BUNDLED / "main").is_dir():
            raise UsageError(f"no bundled pair in {BUNDLED}: clone the whole project, or name --main and --draft")
        main, draft, folder = near(BUNDLED / "main"), near(BUNDLED / "draft"), BUNDLED
    elif given.main and not given.draft:
        notices.append(f"The draft is {DEFAULT_DRAFT}, the default: name another with --draft.")
    dtype = given.dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    if device.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        notices.append("This GPU emulates bfloat16, which is slow: try --dtype float32 (Gemma 2 overflows in float16).")
    compile = given.compile
    if compile == "auto":
        compile = "on" if device.type == "cuda" and not given.device_map else "off"
    settings = dataclasses.replace(
        given,
        main=main,
        draft=given.draft or (draft,),
        demo=is_demo,
        prompts=given.prompts or near(folder / "prompts.txt"),
        device=str(device),
        dtype=dtype,
        compile=compile,
    )
    return settings, notices


def read_models(settings: Settings, device: torch.device) -> Models:
    """Read configurations and tokenizers. Raises UsageError if the main model, or every draft, cannot run."""
    main, tokenizer = read_model(settings.main, getattr(torch, settings.dtype), device), load_tokenizer(settings.main)
    files, vocabularies, errors = {settings.main: main}, {}, {}
    for name in filter(None, map(model_of, settings.draft)):
        try:
            files[name], vocabularies[name] = read_draft(name, main, tokenizer, device)
        except UsageError as error:
            errors[name] = str(error)
    if all(model_of(draft) in errors for draft in settings.draft):
        raise UsageError(errors[model_of(settings.draft[0])])
    return Models(files, vocabularies, errors, tokenizer)


def make_chat(settings: Settings, models: Models) -> Chat:
    """How prompts are put to these models."""
    main, tokenizer = models.files[settings.main], models.tokenizer
    shortest = min(models.files.values(), key=lambda files: files.context)
    arguments = settings.chat_template_args
    if arguments is None and tokenizer.chat_template is not None and not settings.no_chat_template:
        arguments = {}
    longest_draft = max(LONGEST_AUTO if k == "auto" else k for k in settings.draft_tokens)
    return Chat(
        tokenizer,
        arguments,
        settings.max_new_tokens,
        frozenset() if settings.ignore_eos else end_tokens(main, tokenizer),
        longest_draft - 1,
        shortest.context,
        "main" if shortest is main else "draft",
        main.config.get_text_config().vocab_size,
        tuple((rotary_switch(files.config), name) for name, files in models.files.items()),
    )


def describe(console: Console, settings: Settings, models: Models, environment: dict, prompts: int) -> None:
    """Print what is about to run."""
    console.print("Speculative decoding: which draft pays?", style="bold")
    about = {}
    for name, files in models.files.items():
        layers = counted(len(DynamicCache(config=files.config).layers), "layer")
        facts = [f"{files.model.num_parameters() / 1e6:,.1f} M parameters", layers, files.quantization]
        about[plain(name)] = ", ".join(filter(None, facts))
    if "ngram" in settings.draft:
        about["ngram"] = "no model: what followed the same tokens before"
    for name, facts in about.items():
        role = "main" if name == plain(settings.main) else "draft"
        console.print(f"  {role:<5}  {name:<{max(map(len, about))}}  {facts}")
    where = f"{environment['device']} ({plain(environment['device_name'])})"
    several = f" in each of {PROCESSES} processes" if PROCESSES > 1 else ""
    console.print(f"  {where}{several}, {settings.dtype}, {'compiled' if settings.compile == 'on' else 'eager'}")
    lengths, limit = " / ".join(map(str, settings.draft_tokens)), counted(settings.max_new_tokens, "new token")
    console.print(f"  K = {lengths}, up to {limit}, {counted(prompts, 'prompt')}")
    if settings.temperature:
        cuts = f"top-k {settings.top_k or 'off'}, top-p {settings.top_p:g}, seed {settings.seed}"
        console.print(f"  temperature {settings.temperature:g}, {cuts}; log-likelihoods are at temperature 1, uncut")


def build(settings: Settings, loaded: dict, models: Models, bounds: list) -> tuple:
    """The main model, the drafts by what --draft calls them, and the sampler; compiled for these bounds of the caches.

    No bounds: eager. In place of a draft that cannot run stands the reason why. `loaded`: of `load_models`.
    """
    device, sampler = torch.device(settings.device), Greedy()
    if settings.temperature:
        sampler = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed, device)

    def with_cache(model: PreTrainedModel, vocabulary: int | None) -> CachedModel:
        if bounds and not model._is_stateful:
            return CompiledModel(model, vocabulary, device, *bounds)
        return cached_model(model, vocabulary, device)

    main, drafts = with_cache(loaded[settings.main], None), {}
    models_of = {}  # the draft models with their caches; the main model may be its own draft, with a cache of its own
    for draft in settings.draft:
        name = model_of(draft)
        if name is None:
            drafts[draft] = NgramDraft(device)
        elif isinstance(loaded[name], str):
            drafts[draft] = loaded[name]
        else:
            if name not in models_of:
                models_of[name] = ModelDraft(with_cache(loaded[name], models.vocabularies[name]), sampler)
            drafts[draft] = models_of[name]
            if draft != name:
                drafts[draft] = MixedDraft(NgramDraft(device, shortest=2), models_of[name])
    return main, drafts, sampler


def try_to_compile(
    settings: Settings, loaded: dict, models: Models, bounds: list, console: Console, stderr: Console
) -> tuple | None:
    """What `build` makes, with its steps compiled; None if it is to run eagerly."""
    if settings.compile == "off":
        return None
    try:
        built = build(settings, loaded, models, bounds)
        compile_steps(*built, settings.draft_tokens, functools.partial(stderr.print, style="dim"))
        return built
    except Exception as error:  # a compiler can fail in any way; eager runs can be measured all the same
        console.print(f"warning: compiling failed, so this runs eagerly: {one_line(error)}")
        return None


def prepare(given: Settings, scratch: str) -> Ready:
    """Read, check and load all that the options name, and compile what is to be compiled. Raises UsageError."""
    quiet = {"markup": False, "emoji": False, "highlight": False, "quiet": RANK > 0}
    console = Console(width=None if sys.stdout.isatty() else 120, record=bool(given.svg), **quiet)
    stderr = Console(stderr=True, soft_wrap=True, **quiet)
    device = choose_device(given.device)
    settings, notices = resolve_settings(given, device)
    for path, option in ((settings.json, "--json"), (settings.svg, "--svg")):
        save(path, option, None)  # better to fail now than when all is measured

    models = read_models(settings, device)
    if settings.compile == "on" and models.files[settings.main].model._is_stateful:
        notices.append(f"{settings.main} runs eagerly: it keeps a state, which compiled steps cannot put back.")
        settings = dataclasses.replace(settings, compile="off")
    chat = make_chat(settings, models)
    questions, left_out = fitting(chat, read_questions(settings.prompts, settings.limit))
    notices += [*left_out, unapplied_settings(models.files[settings.main], settings.temperature)]
    notices += [files.notice for files in models.files.values()]
    for notice in filter(None, notices):
        console.print(plain(notice))
    longest = min(chat.context, max(question.longest for question in questions))
    lengths = [length + chat.behind + 2 for length in (longest, *(len(question.ids) for question in questions))]
    if not settings.device_map:
        check_memory(list(models.files.values()), device, max(lengths), settings.compile == "on")
    environment = {
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": PROCESSES,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    describe(console, settings, models, environment, sum(1 + len(question.later) for question in questions))
    stderr.print(f"Loading {' and '.join(map(plain, models.files))} …", style="dim")
    loaded = load_models(settings, models, device, scratch)
    start = time.perf_counter()
    built = try_to_compile(settings, loaded, models, cache_bounds(lengths), console, stderr)
    if built:
        chat = dataclasses.replace(chat, context=min(chat.context, max(lengths)), limited_by="compiled")
    environment |= {"compiled": bool(built), "compile_s": time.perf_counter() - start, "memory_bandwidth_gb_s": None}
    environment["can_compile"] = not settings.device_map and not loaded[settings.main]._is_stateful
    main, drafts, sampler = built or build(settings, loaded, models, [])
    middle = sorted(questions, key=lambda question: len(question.ids))[len(questions) // 2]
    methods = our_methods(main, drafts, sampler, settings, middle)
    if settings.compare:
        methods += library_methods(main, drafts, sampler, settings)
    return Ready(Results(environment, settings, tuple(methods)), questions, chat, main, console, stderr)


def load_models(settings: Settings, models: Models, device: torch.device, scratch: str) -> dict:
    """The models with their weights, by their names, or why one cannot run. Raises UsageError as `read_models` does."""
    loaded = dict(models.errors)
    for name, files in reversed(models.files.items()):  # the drafts first: each wants one device for itself
        is_spread = settings.device_map and name == settings.main
        try:
            placement = spread(device, settings.max_memory, scratch) if is_spread else None
            loaded[name] = load_model(files, device, placement)
        except UsageError as error:
            loaded[name] = str(error)
            if name == settings.main or all(isinstance(loaded.get(model_of(of)), str) for of in settings.draft):
                raise
    return loaded


def gather(value: Any) -> list:
    """What each process brings here, in the order of their ranks. Waits for the slowest. Raises UsageError."""
    if PROCESSES == 1:
        return [value]
    with cli_errors("hear from the other processes", "see what they say, and start again"):
        if not torch.distributed.is_initialized():  # by the CPU: results are no tensors
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=1))
        values = [None] * PROCESSES
        torch.distributed.all_gather_object(values, value)
        return values


def next_result(records: Iterator, interrupt: Interrupt) -> Result | None:
    """The next question's records; None after the last, or after Ctrl-C."""
    try:
        interrupt.waits = False
        return None if interrupt.came else next(records, None)
    except KeyboardInterrupt:
        return None
    finally:
        interrupt.waits = True  # until this result is printed and written


def measure(ready: Ready, interrupt: Interrupt) -> tuple:
    """Decode this process's share of the questions; print and write what all processes have, prompt by prompt.

    Returns what was measured, and what ended it early, beside an interrupt.
    """
    results, written, console = ready.results, -math.inf, ready.console
    questions, settings, methods = ready.questions[RANK::PROCESSES], results.settings, results.methods
    turns = sum(1 + len(question.later) for question in questions)
    warmups = sum(turns if method.recompiles else 1 for method in methods) * settings.warmup
    counts = itertools.count(1), warmups + len(methods) * settings.repeats * turns

    def announce(question: Question, what: str) -> None:
        """Between the runs only: what redraws itself would take time from what is timed."""
        if ready.stderr.is_terminal and not ready.stderr.is_dumb_terminal:
            line = f"run {next(counts[0])} of {counts[1]}, prompt {question.label}: {what}"
            ready.stderr.print(line, end="\r", no_wrap=True, soft_wrap=False, overflow="ellipsis")

    records = benchmark(questions, methods, ready.main, ready.chat, settings, announce)
    console.print()
    print_table(console, PROMPT_COLUMNS, "  # prompt", {}, label_width(methods))
    try:
        while True:
            result = next_result(records, interrupt)
            ready.stderr.control(Control((ControlType.ERASE_IN_LINE, 2)))
            wave = gather((result, interrupt.came))
            new = [result for result, _ in wave if result]
            came = any(came for _, came in wave)
            results = dataclasses.replace(results, prompts=results.prompts + tuple(new), complete=not new and not came)
            for result in new:
                print_prompt(console, results, result, ready.chat.tokenizer)
            if results.prompts and time.monotonic() > written + 5:
                save_json(results)
                written = time.monotonic()
            if came or not new:
                return results, None
    except UsageError as error:  # what was measured so far is reported all the same
        return results, error


def save_json(results: Results) -> None:
    """Write all that is measured so far. Raises UsageError."""
    if results.settings.json and RANK == 0:
        save(results.settings.json, "--json", json.dumps(to_json(results), indent=2, allow_nan=False) + "\n")


def report(ready: Ready, results: Results, problem: UsageError | None) -> int:
    """Print and write what was measured; return the exit status. Raises the problem that ended it, if any."""
    console, svg = ready.console, results.settings.svg
    done, total = len(results.prompts), sum(1 + len(question.later) for question in ready.questions)
    if any(outcome.runs for result in results.prompts for outcome in result.outcomes.values()):
        if not results.complete:
            console.print(f"Only {done} of {total} prompts: a part of the result.", style="bold")
        with contextlib.suppress(Exception):  # if there is no memory left for it, nothing is said of it
            bandwidth = {"memory_bandwidth_gb_s": memory_bandwidth_gb_s(ready.main.device)}
            results = dataclasses.replace(results, environment=results.environment | bandwidth)
        print_report(console, results)
    if problem is None and results.prompts:
        save_json(results)
    save(svg, "--svg", console.export_svg(title="speculative_decoding.py") if svg and done else None)
    if problem:
        raise problem
    if not results.complete:
        ready.stderr.print(f"Interrupted after {done} of {total} prompts.")
        return 130
    return exit_status(results)


def main(arguments: list | None = None) -> int:
    """The program; returns its exit status: 0 well, 1 not all is well with some prompt, 2 it could not, 130 Ctrl-C."""
    given, interrupt = parse(arguments), Interrupt()
    transformers.logging.disable_progress_bar()
    if "TORCH_LOGS" not in os.environ:  # what libraries would log is said in one line, or in the table
        logging.disable()
    if not sys.warnoptions:  # python -W
        warnings.simplefilter("ignore")
    for asked_to_end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked_to_end, interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="speculative-decoding-", ignore_cleanup_errors=True) as scratch:
            interrupt.scratch = scratch
            ready = prepare(given, scratch)
            results, problem = measure(ready, interrupt)
            return report(ready, results, problem) if RANK == 0 else 0
    except UsageError as error:
        if RANK == 0:  # of several processes, one speaks
            print(f"error: {plain(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except SystemExit:  # nobody reads the output any more
        return 2
    except OSError as error:
        why = f"{one_line(error)}, where the report or temporary files go"
        print(f"error: cannot go on: {why}; make room, or send them elsewhere", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again
        return 2
    finally:
        if PROCESSES > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would kill Python while it shuts down
    sys.exit(status)

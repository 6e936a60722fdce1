#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch~=2.13.0", "transformers~=5.24.0", "accelerate~=1.15.0", "huggingface_hub~=2.4", "numpy~=2.0",
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

     1  a model with a KV cache that can be rolled back      8  further models: those that keep a state
     2  tokens from logits: greedy, or sampled               9  the benchmark: raw records of what was measured
     3  autoregressive decoding, the baseline               10  figures, computed from these records
     4  speculative decoding                                11  the report: tables, sentences, JSON
     5  is it lossless?                                     12  loading: prompts, devices, models
     6  how many tokens to draft                            13  the run: prepare, measure, report
     7  compiled steps

Part 0 holds the options; it stands before the imports, so that --help need not wait for them.

What is deliberately not here: batches of more than one text, and trees of draft tokens.
"""

import argparse
import copy
import datetime
import gc
import itertools
import json
import logging
import math
import os
import pathlib
import pickle
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import timeit
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

# ruff: noqa: E402

# 0  Options -----------------------------------------------------------------------------------------------------------

DEFAULT_MAIN, DEFAULT_DRAFT = "google/gemma-2-9b-it", "google/gemma-2-2b-it"
NGRAM = "ngram"  # what --draft calls drafting without a model
HERE = pathlib.Path(__file__).resolve().parent
BUNDLED = HERE / "tests" / "tiny_gemma2"


class UsageError(Exception):
    """The program cannot do what was asked; the message is one line that says what is wrong and how to mend it."""


def launched() -> tuple:
    """This process's rank, and how many torchrun or `accelerate launch` started; one where that makes no sense."""
    with suppress(KeyError, ValueError):
        rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if 0 <= rank < processes:
            return rank, processes
    return 0, 1


RANK, PROCESSES = launched()


def safe(text: str) -> str:
    """Text from outside that is safe to print: � instead of escapes, bidirectional overrides, zero-width marks, …"""
    unsafe = "Cc Cf Cs Co Cn Zl Zp"  # control, format, surrogate, private, unassigned, separators of lines, paragraphs
    return "".join("�" if unicodedata.category(char) in unsafe and char != "\n" else char for char in text)


def plain(text: str) -> str:
    """The same as one line."""
    return safe(" ".join(text.split()))


def number_from(kind: type, least: float, most: float, what: str) -> Callable:
    """An argparse type: a number from `least` to `most`."""

    def convert(text):
        with suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return convert


NATURAL = number_from(int, 0, 2**40, "a whole number of at least 0")
POSITIVE = number_from(int, 1, 2**40, "a whole number of at least 1")
DRAFT_TOKENS = number_from(int, 1, 1000, "auto, or a number from 1 to 1000, or several with commas between them")


def draft_lengths(text: str) -> tuple:
    """An argparse type: auto, a number, or several of these with commas between them."""
    return tuple(dict.fromkeys("auto" if part == "auto" else DRAFT_TOKENS(part) for part in text.split(",")))


def draft_names(text: str) -> tuple:
    """An argparse type: a model, ngram, or several with commas between them."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if all(names):
        return names
    raise argparse.ArgumentTypeError(f"{text!r}: name a model, ngram, or several with commas between them")


def template_arguments(text: str) -> dict:
    """An argparse type: a JSON object, arguments of the chat template."""
    with suppress(ValueError, RecursionError):
        if isinstance(given := json.loads(text), dict):
            return given
    raise argparse.ArgumentTypeError(f'{text!r} is no JSON object for the template, as {{"enable_thinking": false}}')


def option(default: Any, help: str, **how: Any) -> Any:
    """A field of Settings; `how`: further arguments of argparse's add_argument, such as its type and metavar."""
    return field(default=default, metadata={"help": help, **how})


TEMPERATURE = number_from(float, 0, 100, "a number from 0 to 100")
PROBABILITY = number_from(float, 1e-6, 1, "a number above 0, up to 1")
FLAG = {"action": "store_true"}
DRAFTS_HELP = f"a smaller model, ngram (no model), or several: A,B,ngram (default: {DEFAULT_DRAFT})"
TEMPLATE_HELP = """of the chat template, e.g. '{"enable_thinking": false}'"""


@dataclass(frozen=True)
class Settings:
    """Every option once: its name, type, default, check and help. `parse` makes the parser from these fields.

    `resolve_settings`, in part 13, replaces what is left open here (None, "auto") by what this machine has.
    """

    # The pair and the prompts
    main: str | None = option(None, f"Hugging Face id or local folder (default: {DEFAULT_MAIN})", metavar="MODEL")
    draft: tuple | None = option(None, DRAFTS_HELP, metavar="MODEL", type=draft_names)
    demo: bool = option(False, "the bundled pair and its own prompts, offline, in seconds", **FLAG)
    prompts: str | None = option(None, "one a line, or .jsonl, .json (default: prompts.txt)", metavar="FILE")
    limit: int | None = option(None, "take the first N questions", metavar="N", type=POSITIVE)
    no_chat_template: bool = option(False, "feed the prompts as they are", **FLAG)
    chat_template_args: dict | None = option(None, TEMPLATE_HELP, metavar="JSON", type=template_arguments)

    # How to decode
    max_new_tokens: int = option(128, "default: 128", metavar="N", type=POSITIVE)
    ignore_eos: bool = option(False, "generate exactly N tokens, past the end of a text", **FLAG)
    draft_tokens: tuple = option(
        ("auto",), "of a round: auto (the default), a number, or several: 1,2,4", metavar="K", type=draft_lengths
    )
    temperature: float = option(0.0, "sample (default: 0, greedy)", metavar="T", type=TEMPERATURE)
    top_k: int = option(0, "sample from the N likeliest (default: 0, all)", metavar="N", type=NATURAL)
    top_p: float = option(1.0, "from the likeliest that add up to P (default: 1)", metavar="P", type=PROBABILITY)
    seed: int = option(0, "of the random numbers (default: 0)", metavar="S", type=NATURAL)

    # Where to decode
    compile: str = option("auto", "compile the steps (auto: on CUDA)", choices=("auto", "on", "off"))
    device: str = option("auto", "cpu, cuda, cuda:1, mps, … (default: a GPU, else cpu)", metavar="D")
    dtype: str = option(
        "auto",
        "default: bfloat16 on a GPU, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device_map: str | None = option(None, "spread the main model: GPUs, CPU and disk", choices=("auto",))

    # What to measure and show
    compare: str | None = option(None, "also measure its generate(), alone and assisted", choices=("transformers",))
    repeats: int = option(1, "of each run; the median counts (default: 1)", metavar="N", type=POSITIVE)
    warmup: int = option(1, "runs of each before any counts (default: 1)", metavar="N", type=NATURAL)
    show_text: bool = option(False, "print the texts, each token by where it comes from", **FLAG)
    json: str | None = option(None, "write all that was measured", metavar="FILE")
    svg: str | None = option(None, "write the report as a picture", metavar="FILE")


def find_contradiction(given: Settings) -> str | None:
    """What two options contradict each other, and how to mend it: all such rules are here."""
    files = [os.path.realpath(path) for path in (given.prompts, given.json, given.svg) if path]
    rules = {
        "--demo brings its own main model: leave out --main, or --demo": given.demo and given.main,
        "--top-k and --top-p cut what tokens are sampled from: add a --temperature": (
            given.temperature == 0 and (given.top_k or given.top_p < 1)
        ),
        "--temperature is 0 or at least 0.001: less is rounded away": 0 < given.temperature < 0.001,
        "--no-chat-template leaves no template for --chat-template-args: leave out one of them": (
            given.no_chat_template and given.chat_template_args
        ),
        "--device-map auto moves weights while it runs, which cannot be compiled: leave out --compile on": (
            given.device_map and given.compile == "on"
        ),
        "--prompts, --json and --svg need a file each: name others": len(files) > len(set(files)),
    }
    return next((message for message, applies in rules.items() if applies), None)


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
    for each in fields(Settings):
        parser.add_argument("--" + each.name.replace("_", "-"), default=each.default, **each.metadata)
    settings = Settings(**vars(parser.parse_args(arguments)))
    if contradiction := find_contradiction(settings):
        parser.error(contradiction)
    return settings


os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what processes say of each other is said in one line
os.environ["USE_HUB_KERNELS"] = "0"  # the library runs no code from the hub, also where it could fetch kernels
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback, also while it imports
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
from torch.nn.functional import cross_entropy, linear, one_hot, pad
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

# 1  A model with a KV cache that can be rolled back -------------------------------------------------------------------


class CachedModel:
    """A causal language model, and its KV cache of one text: the keys and values of all tokens that it has read.

    Every forward pass appends to the cache. `roll_back` removes the latest tokens again: that is how rejected draft
    tokens are undone without reading the text anew.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | None = None, vocabulary: int | None = None):
        """Its inputs go to `device`, or to that of its weights. It chooses ids below `vocabulary`, if that is given."""
        self.model, self.vocabulary = model.eval().requires_grad_(False), vocabulary
        self.device = device or model.device
        config = model.config.get_text_config()
        # A single token attends to all that the cache returns, where attention is full or sliding. Some models, as
        # Gemma 2, would build masks that say so in every step; this zero is added to all scores instead.
        kinds = set(getattr(config, "layer_types", None) or ["unknown"])
        builds_masks = config._attn_implementation == "eager" and kinds <= {"full_attention", "sliding_attention"}
        self.full_mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=self.device) if builds_masks else None
        self.reset()

    def reset(self, rolls_back: bool = True) -> None:
        """Empty the cache. One that is never rolled back need not keep what has left a sliding window."""
        self.cache = DynamicCache(config=self.model.config)
        if rolls_back:
            self.cache.activate_past_recording()

    def prefill(self, prompt_ids: Tensor, rolls_back: bool = True) -> Tensor:
        """Begin a text with a prompt, ids [1, n], n ≥ 1; return the logits after its last token, [1, vocabulary]."""
        self.reset(rolls_back)
        return self.forward(prompt_ids, logits_to_keep=1)

    @torch.inference_mode()
    def forward(self, ids: Tensor, logits_to_keep: int = 0) -> Tensor:
        """Read tokens, ids [1, n], into the cache; return the logits after the last `logits_to_keep`; 0: after each."""
        return self.run(ids, logits_to_keep, attention_mask=self.full_mask if ids.shape[1] == 1 else None)

    def run(self, ids: Tensor, logits_to_keep: int, **inputs: Any) -> Tensor:
        """The forward pass itself; `inputs`: what else the model is given."""
        output = self.model(ids, cache=self.cache, use_cache=True, logits_to_keep=logits_to_keep, **inputs)
        return output.logits[0, :, : self.vocabulary]

    def roll_back(self, tokens: int) -> None:
        """Remove the latest tokens from the cache: at most those read since the last roll-back; the others stay."""
        if self.cache.get_seq_length():  # a sliding window that has read nothing cannot be cropped
            self.cache.crop(-tokens)  # by 0, too: sliding windows then drop what no later roll-back can need

    def step(self, then: Callable, ids: Tensor, uniform: Tensor | None = None, logits_to_keep: int = 1) -> Any:
        """Read tokens, ids [1, n], and return what `then` (see part 2) makes of the logits and of random numbers."""
        return then(self.forward(ids, logits_to_keep), ids, uniform)

    def verify(self, score: Callable, ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Read the text's last token and K draft tokens, ids [1, K+1], in one pass; return what `score` makes of it.

        `width` ≥ K+1: the tokens that a pass of constant shape has (part 7); this one reads no more than there are.
        """
        return self.step(score, ids, logits_to_keep=0)


# 2  Tokens from logits ------------------------------------------------------------------------------------------------


class Sampler:
    """The rule that chooses tokens, and accepts or rejects draft tokens: Greedy or Sampling.

    Three methods say what follows a forward pass (`then` of CachedModel.step), from its logits, [n, vocabulary], the
    ids that it read, [1, n], and random numbers, [1] or None. They run on the device, and can be compiled with it.
      sample        the next token, [1, 1], from the logits before it, [1, vocabulary]
      sample_draft  that token, and q, the distribution it was drawn from, [1, vocabulary], or None: nothing was drawn
      score         of a verify pass: the target output, [K+1, …], by which `accept` decides, and the log-likelihood of
                    each draft token under the main model at temperature 1, [K], in nats, float32
    `accept` returns what a round emits, from the target output, the draft tokens, [K], and q, [K, vocabulary] or None:
    the accepted draft tokens, and one token of the main model's own. For this the host waits for the device.
    `chances` of acceptance that draft tokens have along a finished text (`replay`, part 6), [n]: from its ids, [n], the
    draft's logits before each, [n, vocabulary], and an iterator of the main model's.
    """

    def restart(self, prompt: "Prompt") -> None:
        """Begin a prompt's text: its random numbers depend on nothing but its number and the seed."""

    def uniform(self, count: int) -> Tensor | None:
        """Random numbers in [0, 1), [count], float32; None if the sampler needs none."""


class Greedy(Sampler):
    """Choose the likeliest token; accept a draft token if it is that token."""

    def sample(self, logits: Tensor, ids: Tensor, uniform: None) -> Tensor:
        return logits.argmax(dim=-1, keepdim=True)

    def sample_draft(self, logits: Tensor, ids: Tensor, uniform: None) -> tuple[Tensor, None]:
        return self.sample(logits, ids, uniform), None

    def score(self, logits: Tensor, ids: Tensor, uniform: None) -> tuple[Tensor, Tensor]:
        return logits.argmax(dim=-1), log_likelihood(logits, ids)  # the target output: its own choices, [K+1]

    def accept(self, target: Tensor, draft_ids: Tensor, q: None) -> list[int]:
        accepted = before_rejection(draft_ids == target[:-1])
        n, *chosen = torch.cat([accepted, target]).tolist()  # one read from the device
        return chosen[: n + 1]  # accepted draft tokens are the main model's choices

    def chances(self, ids: Tensor, logits: Tensor, of_main: Iterator[Tensor]) -> Tensor:
        return (logits.argmax(dim=-1) == ids).float()


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

    def sample_draft(self, logits: Tensor, ids: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        q = self.distribution(logits)
        return draw(q, uniform), q

    def score(self, logits: Tensor, ids: Tensor, uniform: None) -> tuple[Tensor, Tensor]:
        return self.distribution(logits), log_likelihood(logits, ids)  # the target output: p, [K+1, vocabulary]

    def accept(self, target: Tensor, draft_ids: Tensor, q: Tensor | None) -> list[int]:
        if q is None:  # a draft that draws nothing is certain of its tokens
            q = one_hot(draft_ids, target.shape[1]).to(target.dtype)
        uniform = self.uniform(len(draft_ids) + 1)  # one for each decision: none is used twice
        accepted, following = accept_or_resample(target, q, draft_ids, uniform[:-1])
        n, token, *drafted = torch.cat([accepted, draw(following, uniform[-1:])[0], draft_ids]).tolist()
        return [*drafted[:n], token]

    def chances(self, ids: Tensor, logits: Tensor, of_main: Iterator[Tensor]) -> Tensor:
        p, q = self.distribution(next(of_main)), self.distribution(logits)
        q = pad(q, (0, p.shape[1] - q.shape[1]))  # 0 for tokens that the draft's vocabulary lacks
        p, q = pick(p, ids), pick(q, ids)
        return torch.where(q < p, q / p, (q >= p).float())  # 0 where q is not finite

    def restart(self, prompt: "Prompt") -> None:
        self.generator.manual_seed(self.seed * 2**20 + prompt.number)

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
    accepted = before_rejection(uniform * pick(q, draft_ids) < pick(p[:-1], draft_ids))  # uniform < p / q
    p_next = p.index_select(0, accepted)
    q = pad(q, (0, p.shape[1] - q.shape[1], 0, 1))  # 0 also for tokens that the draft's vocabulary lacks
    residual = (p_next - q.index_select(0, accepted)).clamp(min=0)
    total = residual.sum()
    return accepted, torch.where(total > 0, residual / total, p_next)  # p = q but for rounding: nothing is left


def before_rejection(is_accepted: Tensor) -> Tensor:
    """The number of draft tokens before the first that is not accepted, [1], from whether each would be, [K]."""
    return is_accepted.float().cumprod(dim=0).sum(dim=0, keepdim=True).long()  # float: MPS has no cumprod of int64


def pick(rows: Tensor, ids: Tensor) -> Tensor:
    """What each row, [n, vocabulary], has for its token, ids [n]: [n]."""
    return rows.gather(1, ids[:, None])[:, 0]


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


@dataclass(frozen=True)
class Prompt:
    """A prompt, and where its output ends."""

    text: str
    number: int  # random numbers depend on it
    ids: tuple[int, ...] = ()  # n ≥ 1
    max_new_tokens: int = 128
    end_ids: frozenset[int] = frozenset()  # end-of-text tokens: the output ends with the first of them


class Round(NamedTuple):
    """One round of speculative decoding: tokens, and seconds."""

    drafted: int
    accepted: int
    draft_s: float | None = None  # None where the device's clock cannot tell a round's parts apart
    verify_s: float | None = None  # the main model's forward pass
    seconds: float = 0.0  # all of the round


@dataclass(frozen=True)
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
# always reads two tokens, and with a fixed K every pass has the same shape.) A round in which nothing is drafted leaves
# the draft model further behind: the next one that drafts begins by reading all that it has missed.


class Draft:
    """What proposes draft tokens: ModelDraft or NgramDraft. Whatever it proposes, the output stays right."""

    def reset(self, prompt_ids: Tensor) -> None:
        """Begin a text with a prompt, ids [1, n], n ≥ 1."""

    def propose(self, text: list[int], count: int) -> "Proposal":
        """Draft how a text, the ids of prompt and output so far, goes on, by at most so many tokens."""

    def roll_back(self, tokens: int) -> None:
        """Undo so many of the latest tokens that were read."""


class Proposal(NamedTuple):
    """K ≥ 0 draft tokens."""

    ids: Tensor  # [1, K]
    q: Tensor | None = None  # the distributions that they were drawn from, [K, vocabulary]; None: nothing was drawn


class ModelDraft(Draft):
    """A draft that is a model of its own, smaller than the main model."""

    def __init__(self, model: CachedModel, sampler: Sampler):
        self.model, self.sampler = model, sampler
        # What it reads for tokens that only the main model has: it may draft worse, but the output stays right.
        self.last_id = model.model.config.get_text_config().vocab_size - 1

    def reset(self, prompt_ids: Tensor) -> None:
        self.has_read = prompt_ids.shape[1] - 1  # tokens of the text that its cache holds
        self.model.reset()
        if self.has_read:
            self.model.prefill(prompt_ids[:, :-1].clamp(max=self.last_id))

    def propose(self, text: list[int], count: int) -> Proposal:
        if not count:
            return Proposal(torch.empty(1, 0, dtype=torch.long, device=self.model.device))
        tokens, q = [], []
        # First it reads what its cache lacks of the text, [1, 2] or more, then each token just drafted, [1, 1], which
        # never leaves the device.
        latest = torch.tensor([text[self.has_read :]], device=self.model.device).clamp(max=self.last_id)
        for _ in range(count):
            latest, drawn_from = self.model.step(self.sampler.sample_draft, latest, self.sampler.uniform(1))
            tokens.append(latest)
            q.append(drawn_from)
        self.has_read = len(text) + count - 1
        return Proposal(torch.cat(tokens, dim=1), None if q[0] is None else torch.cat(q))

    def roll_back(self, tokens: int) -> None:
        self.model.roll_back(tokens)
        self.has_read -= tokens


class NgramDraft(Draft):
    """Without a model (prompt lookup decoding, Saxena 2023): what followed the last three, two or one tokens before."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self, prompt_ids: Tensor) -> None:
        self.indexed, self.continuations = 1, {}  # n-gram: the place in the text after its latest occurrence

    def propose(self, text: list[int], count: int) -> Proposal:
        for place in range(self.indexed, len(text)):
            for n in (1, 2, 3):
                if n <= place:
                    self.continuations[tuple(text[place - n : place])] = place
        self.indexed = len(text)
        places = [self.continuations.get(tuple(text[-n:])) for n in (3, 2, 1)]
        start = next(filter(None, places), len(text))  # of the longest that is found
        return Proposal(torch.tensor([text[start : start + count]], dtype=torch.long, device=self.device))


@torch.no_grad()
def decode_speculatively(
    main: CachedModel, draft: Draft, sampler: Sampler, schedule: "FixedSchedule", prompt: Prompt
) -> Generation:
    """Several tokens for each forward pass of the main model, and still its own text: Leviathan et al., algorithm 1."""
    output, prompt_ids = [], torch.tensor([prompt.ids], device=main.device)  # [1, n]
    start = now(main.device)
    sampler.restart(prompt)
    last = sampler.sample(main.prefill(prompt_ids), prompt_ids, sampler.uniform(1))  # [1, 1]: the text's last token
    has_ended = emit(prompt, output, [last.item()])
    first_token_s = now(main.device) - start
    draft.reset(prompt_ids)
    rounds, log_likelihoods = [], []
    while not has_ended:
        begun = mark(main.device)
        # 1. Draft: K tokens, one after the other.
        draft_ids, q = draft.propose([*prompt.ids, *output], schedule.draft_tokens)  # [1, K]
        drafted = draft_ids.shape[1]
        proposed = mark(main.device)
        if drafted:
            # 2. Verify: one pass of the main model gives its own output at each position.
            ids = torch.cat([last, draft_ids], dim=1)
            target, of_tokens = main.verify(sampler.score, ids, schedule.width(drafted))  # [K+1, …]; [K]
            log_likelihoods.append(of_tokens)
            verified = mark(main.device)
            # 3. Accept draft tokens up to the first rejection, and one of the main model's own: the one host read.
            tokens = sampler.accept(target, draft_ids[0], q)
            last = torch.tensor([tokens[-1:]], device=main.device)
        else:  # nothing to verify: a step of autoregressive decoding
            last = main.step(sampler.sample, last, sampler.uniform(1))
            tokens = [last.item()]
            verified = mark(main.device)
        # 4. Roll back: each cache drops one token for each rejected one.
        accepted = len(tokens) - 1
        main.roll_back(drafted - accepted)
        draft.roll_back(drafted - accepted)
        has_ended = emit(prompt, output, tokens)
        schedule.learn(drafted, accepted)
        rounds.append((drafted, accepted, begun, proposed, verified, mark(main.device)))
    latency_s = now(main.device) - start
    timed = tuple(timed_round(main.device, *marked) for marked in rounds)
    log_likelihood = torch.cat(log_likelihoods).sum().item() if log_likelihoods else 0.0
    return Generation(tuple(output), latency_s, first_token_s, timed, log_likelihood)


# 5  Is it lossless? ---------------------------------------------------------------------------------------------------
#
# In exact arithmetic both methods generate the same tokens. In floating point, one pass over K+1 tokens and K+1 passes
# over one round differently; where the two best tokens are nearly tied, the choice can flip, and the two texts part for
# good. In bfloat16 that is the normal case. It is no bug, but a bug would look the same. So every output is certified
# by one more pass of the main model, over the whole text, that shares no cache with either loop: how far does a token
# lie below the best one (the gap), and how far does rounding move logits (the noise)? This is a criterion with measured
# margins, not a theorem. On random models of 25 families and on the bundled pair, correct outputs had gaps of at most
# 0.51 of the noise; with planted bugs at least 78,000 in float32 and 1.5 in bfloat16, but 0.9 of a mixture of experts.

SLICE = 512  # new tokens whose logits are held at a time: those of all of a long text would be gigabytes


@dataclass(frozen=True)
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


def logits_along(reader: CachedModel, text: Tensor, start: int) -> Iterator[Tensor]:
    """The logits that the tokens of a text, ids [1, n], follow from, from the place `start` ≥ 1 on.

    In slices, [m, vocabulary], each by a pass without a cache over all of the text up to there: for most texts, one.
    """
    for first in range(start, text.shape[1], SLICE):
        end = min(first + SLICE, text.shape[1])
        # Nothing here holds the logits while they are compared, as inference_mode() of a generator would.
        read = {"input_ids": text[:, : end - 1], "use_cache": False, "logits_to_keep": end - first}
        yield reader.model(**read).logits[0, :, : reader.vocabulary]


def text_of(main: CachedModel, prompt_ids: tuple, output_ids: tuple) -> tuple[Tensor, int]:
    """The whole text, ids [1, n], and the place of its first new token."""
    return torch.tensor([[*prompt_ids, *output_ids]], device=main.device), len(prompt_ids)


@torch.inference_mode()
def certify(main: CachedModel, prompt_ids: tuple, output_ids: tuple) -> float:
    """The gap of an output: how far a token lies below the best one given all before it, at the worst position.

    In logits; also behind a flip. Raises ArithmeticError if the best ones are not finite.
    """
    (text, start), gaps = text_of(main, prompt_ids, output_ids), []
    for ids, logits in zip(text[0, start:].split(SLICE), logits_along(main, text, start), strict=True):
        best, own = logits.amax(dim=-1), pick(logits, ids)
        if not best.isfinite().all():
            raise ArithmeticError("the main model's logits are not finite; try --dtype float32 or bfloat16")
        gaps.append((best.float() - own.float()).max().item())
    return max(gaps)


@contextmanager
def rounding_again(model: torch.nn.Module) -> Iterator:
    """Within this, the output of every layer is rounded once more: by a random error of at most the type's epsilon."""

    def round_again(module, inputs, output):
        if isinstance(output, Tensor) and output.is_floating_point():
            error = torch.finfo(output.dtype).eps
            factors = torch.empty(output.shape, device=output.device).uniform_(1 - error, 1 + error)  # float32
            return factors.mul_(output).to(output.dtype)

    with ExitStack() as hooks:
        for layer in model.modules():
            if layer._parameters or not list(layer.children()):
                hooks.enter_context(layer.register_forward_hook(round_again))
        yield


@torch.inference_mode()
def rounding_noise(main: CachedModel, prompt_ids: tuple, output_ids: tuple) -> float:
    """How far rounding moves the logits of `certify`: their largest change if every layer's output is rounded again.

    The largest of four passes, as a mixture's choice of experts changes in some passes only. No cache takes part, so
    that a faulty one cannot pass for rounding. Raises ArithmeticError if it is not finite.
    """
    torch.manual_seed(0)
    text, start = text_of(main, prompt_ids, output_ids)
    exact, *rounded = (logits_along(main, text, start) for _ in range(5))
    changes = []
    for logits in exact:
        with rounding_again(main.model):
            changes += [largest_change(logits, next(again)) for again in rounded]
    if not all(map(math.isfinite, changes)):
        raise ArithmeticError("rounding moves some of the main model's logits to infinity; try --dtype float32")
    return max(changes)


def largest_change(logits: Tensor, others: Tensor) -> float:
    """Of any logit, [n, vocabulary] both; 1000 below the best a token is ruled out, and how far does not count."""
    floor = logits.amax(dim=-1, keepdim=True).float() - 1000
    return logits.float().maximum(floor).sub_(others.float().maximum(floor)).abs_().max().item()


def find_divergence(main: CachedModel, prompt_ids: tuple, baseline: tuple, speculative: tuple) -> Divergence | None:
    """Compare two greedy outputs for one prompt, and certify both; None if they are the same, and right.

    Raises ArithmeticError if that cannot be told, as logits are not finite.
    """
    same = baseline == speculative
    gap = certify(main, prompt_ids, speculative)
    if same and gap == 0:
        return None
    baseline_gap = gap if same else certify(main, prompt_ids, baseline)
    noise = rounding_noise(main, prompt_ids, speculative)
    pairs = enumerate(itertools.zip_longest(baseline, speculative))  # None where the shorter one has ended
    index, tokens = next(((place, pair) for place, pair in pairs if pair[0] != pair[1]), (None, (None, None)))
    at_fault = None
    if gap > noise and baseline_gap > noise:
        at_fault = "both"
    elif baseline_gap > noise:
        at_fault = "baseline"
    elif gap > noise or (not same and None in tokens):  # rounding makes no loop stop early, or go on
        at_fault = "speculative"
    if same and not at_fault:
        return None
    return Divergence(index, *tokens, gap, baseline_gap, noise, "mismatch" if at_fault else "tie", at_fault)


# 6  How many tokens to draft ------------------------------------------------------------------------------------------

LONGEST = 15  # draft tokens of a round that are considered: with the text's last token they fill a tile of 16 rows
COSTS_S = 2.0  # what rounds cost is measured for at least so many seconds


def verify_widths(draft_tokens: int | str, device: torch.device) -> tuple[int, ...]:
    """The tokens that a compiled verify pass may have, with a fixed K or "auto"; shorter ones are padded to the next.

    On accelerators widths up to 16 cost nearly the same, on a CPU those up to 3; each takes up to a minute to compile.
    """
    if draft_tokens != "auto":
        return (draft_tokens + 1,)
    return (3, 5, 9, LONGEST + 1) if device.type == "cpu" else (5, LONGEST + 1)


class FixedSchedule:
    """The draft-length schedule that drafts the same number of tokens, `draft_tokens`, in each round."""

    def __init__(self, draft_tokens: int, widths: tuple = ()):
        """`widths`: what verify passes are padded to, if they are compiled, in rising order."""
        self.draft_tokens, self.widths = draft_tokens, widths

    def width(self, drafted: int) -> int:
        """How many tokens the verify pass of so many draft tokens has."""
        return next((width for width in self.widths if width > drafted), drafted + 1)

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of what became of a round's draft tokens."""


@torch.no_grad()
def measure_costs(main: CachedModel, draft: Draft, sampler: Sampler, prompt_ids: Tensor, widths: tuple) -> tuple:
    """The seconds that a round of 0, 1, … draft tokens takes here, behind a prompt, ids [1, n]: the least of many.

    `widths`: of compiled verify passes, rising, up to which rounds are measured; () for eager ones. All lengths take
    turns, three times at least and for COSTS_S: so each has its share of the moments when nothing else runs on the
    machine, and these count. At each turn rounds follow each other, for 16 tokens or so: right behind longer ones a
    short one was slower by a tenth.
    """
    longest = min(LONGEST, max(widths, default=LONGEST + 1) - 1)
    schedules = [FixedSchedule(length, widths) for length in range(longest + 1)]
    text = prompt_ids[0].tolist()
    text.append(text[-1])  # any token will do
    main.prefill(prompt_ids)
    draft.reset(prompt_ids)
    times, end = [[] for _ in schedules], time.perf_counter() + COSTS_S
    while len(times[-1]) < 3 or time.perf_counter() < end:
        for drafted, schedule in enumerate(schedules):
            for _ in range(16 // (drafted + 1)):
                times[drafted].append(measure_round(main, draft, sampler, text, schedule))
    return tuple(map(min, times))


def measure_round(main: CachedModel, draft: Draft, sampler: Sampler, text: list, schedule: FixedSchedule) -> float:
    """The seconds of a round, which is undone. What is verified has its full length, also if n-grams find less."""
    width = schedule.draft_tokens + 1
    start = now(main.device)
    draft.propose(text, schedule.draft_tokens)
    ids = torch.full((1, width), text[-1], device=main.device)
    if width > 1:
        main.verify(sampler.score, ids, schedule.width(width - 1))
        draft.roll_back(width)  # the text's last token, too
    else:
        main.step(sampler.sample, ids, sampler.uniform(1))
    main.roll_back(width)
    return now(main.device) - start


class AutoSchedule(FixedSchedule):
    """Draft as many tokens as pay, chosen before each round; none where drafting only loses. It keeps learning.

    A round of K draft tokens yields 1 + P(first accepted) + … + P(first K accepted) tokens (Leviathan et al. 2023,
    equation 1, with what was lately accepted at each position). Its cost divided by these tokens is the time per token,
    and K is where that is least. As K is fixed before the round, an accelerator never waits for the host.
    """

    FADING = 0.98  # the weight of a round beside the next one's: about the last 50 count
    ALIKE = 16  # tests; a position of which there are fewer counts as most others do
    MARGIN = 1.04  # drafting nothing must be 4 % faster to be chosen, as nothing is learned from it
    PERIOD, TRIED = 256, 6  # rounds: of each 256 the first 6 always draft, to see whether that still loses
    KEPT = 0.25  # of what was learned, when it tries again after a rest: else six rounds would say little

    def __init__(self, costs: tuple, widths: tuple = ()):
        """`costs`: of `measure_costs`, taken as they are for the whole run."""
        super().__init__(0, widths)
        self.costs, self.rounds = numpy.array(costs), 0  # rounds so far
        self.accepted, self.tested = numpy.zeros((2, len(costs) - 1))  # by position; those of old rounds fade
        self.accepted[0], self.tested[0] = 6, 8  # α = 0.75 is assumed to begin with
        self.plan()

    def plan(self) -> None:
        """Choose the next round's K, by what is known of the acceptance at each position."""
        alpha = self.accepted.sum() / self.tested.sum()
        rates = (self.accepted + self.ALIKE * alpha) / (self.tested + self.ALIKE)
        per_token = self.costs / numpy.cumprod([1.0, *rates]).cumsum()
        per_token[0] *= self.MARGIN
        fewest = 1 if self.rounds % self.PERIOD < self.TRIED else 0
        self.draft_tokens = fewest + int(per_token[fewest:].argmin())

    def learn(self, drafted: int, accepted: int) -> None:
        self.rounds += 1
        if not self.draft_tokens and self.rounds % self.PERIOD == 0:
            self.accepted *= self.KEPT
            self.tested *= self.KEPT
        if drafted:
            self.accepted *= self.FADING
            self.accepted[:accepted] += 1
            self.tested *= self.FADING
            self.tested[: min(accepted + 1, drafted)] += 1
        self.plan()


# The replay. What a draft would do with a text can be had from the finished text: the text is the main model's own,
# whatever the draft, so at each of its positions the chance that the draft's token had been accepted there is known.


class Replay(NamedTuple):
    """What a draft would do with a text of n new tokens, in a round that begins at each of them but the first."""

    chances: numpy.ndarray  # [n-1, LONGEST]: that the round's 1st, 2nd, … token is accepted, if those before it are
    drafted: numpy.ndarray  # [n-1]: the tokens that it can draft there, at most LONGEST


@torch.inference_mode()
def replay(main: CachedModel, draft: Draft, sampler: Sampler, prompt: Prompt, output_ids: tuple) -> Replay:
    """Replay a draft along an output of the main model's, by one pass of it, without a cache; of n-grams by themselves.

    Greedily a draft token is accepted if it is the text's token x. A sampled one: the main model emits x with
    probability p(x), and as an accepted draft token with min(p(x), q(x)); so, given x, with min(1, q(x) / p(x)). (The
    mean over x is Σ min(p, q), the acceptance rate of Leviathan et al. 2023, theorem 3.5.)
    """
    text, start = text_of(main, prompt.ids, output_ids)
    if isinstance(draft, NgramDraft):
        return replay_ngrams(draft, text, start + 1)
    ids = text[0, start + 1 :].split(SLICE)
    read = logits_along(draft.model, text.clamp(max=draft.last_id), start + 1)
    own = logits_along(main, text, start + 1)  # runs only if the sampler asks for it
    slices = [sampler.chances(of, logits, own) for of, logits in zip(ids, read, strict=True)]
    # Each round meets the chances from its place on; behind the text's end nothing is accepted.
    chances = pad(torch.cat(slices), (0, LONGEST - 1)).unfold(0, LONGEST, 1)
    return Replay(chances.cpu().double().numpy(), numpy.full(len(chances), LONGEST))


def replay_ngrams(draft: NgramDraft, text: Tensor, start: int) -> Replay:
    """The same of n-grams, whose proposals depend on where a round begins; ids [1, n], from the place `start` on."""
    ids, count = text[0].tolist(), text.shape[1] - start
    replay = Replay(numpy.zeros((count, LONGEST)), numpy.zeros(count, int))
    draft.reset(text[:, :start])
    for row in range(count):
        proposed = draft.propose(ids[: start + row], LONGEST).ids[0].tolist()
        replay.drafted[row] = len(proposed)
        right = [token == own for token, own in zip(proposed, ids[start + row :], strict=False)]
        replay.chances[row, : len(right)] = right
    return replay


def replayed(replay: Replay, prices: numpy.ndarray) -> numpy.ndarray:
    """What all rounds of a text cost with K = 1, 2, … as far as there are prices, expected; [K].

    `prices`: of a round of 0, 1, … draft tokens; all 1, to count rounds. By recursion from the end of the text: a round
    leads to the next place, and one place further with each draft token that is accepted, of which there are at most K.
    """
    count, most = len(replay.drafted), len(prices) - 1
    at_least = replay.chances[:, :most].cumprod(axis=1)  # [n-1, m]: the chance that the first m are accepted
    round_costs = prices[numpy.minimum.outer(replay.drafted, range(1, most + 1))]  # [n-1, K]
    within = numpy.tri(most).T  # [m, K]: whether m ≤ K
    costs = numpy.zeros((count + most + 1, most))  # of the text from each place on, for each K; behind its end none
    for place in reversed(range(count)):
        further = numpy.diff(costs[place + 1 : place + most + 2], axis=0)  # [m, K]: what the m-th one changes
        costs[place] = round_costs[place] + costs[place + 1] + at_least[place] @ (within * further)
    return costs[0]


def oracle_cost(replay: Replay, prices: numpy.ndarray) -> float:
    """As `replayed`, of rounds that draft no wrong token, and as many of the right ones as pay: nothing costs less."""
    count, most = len(replay.drafted), len(prices) - 1
    at_least = replay.chances[:, :most].cumprod(axis=1)
    costs = numpy.zeros(count + most + 1)
    for place in reversed(range(count)):
        cheapest = numpy.minimum.accumulate(prices + costs[place + 1 : place + most + 2])  # if up to 0, 1, … are right
        costs[place] = cheapest[0] + at_least[place] @ numpy.diff(cheapest)
    return costs[0]


# 7  Compiled steps ----------------------------------------------------------------------------------------------------

LARGE = 2**26  # bytes of a model's weights, which are then read from memory


class StreamedProducts(TorchFunctionMode):
    """Within this, the compiler makes of a linear layer one loop over its weights, with a sum for each token.

    On a CPU a step takes as long as its weights are read, and the library's product reads them slower, but for many
    tokens. Quantised weights are tensors of other classes: they are multiplied as they were.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is linear and type(args[1]) in (Tensor, torch.nn.Parameter) and args[1].is_floating_point():
            if args[0].numel() // args[0].shape[-1] <= (9 if args[1].dtype == torch.float32 else 1):
                function = streamed_linear
        return function(*args, **(kwargs or {}))


def streamed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., size] times the transposed weight [m, size], with sums in float32."""
    rows = x.flatten(0, -2).float()  # [n tokens, size]
    rows = rows.as_strided(rows.shape, rows.stride())  # stored here: else it is computed again for each of the m sums
    # Parts of the weight are read as so many streams, which are quicker than one; more of them take long to compile.
    parts = weight.chunk(4 if len(rows) == 1 else 2)
    sums = [torch.cat([(part.float() * row).sum(-1) for part in parts]) for row in rows]
    output = torch.stack(sums).to(x.dtype).unflatten(0, x.shape[:-1])
    return output if bias is None else output + bias


def keys_and_values(cache: Cache) -> list[Tensor]:
    """What a cache's layers hold, [1, heads, tokens, size] each; a layer that uses another's holds nothing."""
    return [part for layer in cache.layers if layer.keys is not None for part in (layer.keys, layer.values)]


class CompiledModel(CachedModel):
    """A CachedModel whose cache has a fixed size, and whose steps are compiled: on a GPU, as CUDA graphs.

    Run eagerly on a fast GPU, a model waits for its kernels to be launched. A graph launches all of a step at once, but
    needs the same shapes and the same memory each time. So the cache's storage is allocated once, and only its length
    changes; what lies behind the length is masked, and overwritten by the next tokens.
    """

    def __init__(self, eager: CachedModel, capacity: int):
        """`eager`: the same model, to read prompts, which have any length. `capacity`: the most tokens of a text.

        Raises NotImplementedError for a cache of another kind.
        """
        self.eager, self.steps = eager, {}  # compiled, by what is done with the logits, and the number of tokens
        self.cache, self.lengths = Cache(layers=[]), []  # lengths: of the cache's layers, [] each
        super().__init__(eager.model, eager.device, eager.vocabulary)
        for layer in eager.cache.layers:
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                # Stored in full, also with a sliding window: the mask hides what lies outside. A multiple of 8 keeps
                # the mask's rows aligned.
                layer = StaticLayer(math.ceil(capacity / 8) * 8)
            elif type(layer) is not DummyLayer:  # this one uses another's keys and values
                kind = eager.model.config.model_type
                raise NotImplementedError(f"{kind} keeps more than keys and values, only eagerly rolled back")
            self.cache.layers.append(layer)
        self.forward(torch.zeros(1, 1, dtype=torch.long, device=self.device))  # allocates the cache
        self.lengths = [layer.cumulative_length for layer in self.cache.layers if type(layer) is StaticLayer]

    def reset(self, rolls_back: bool = True) -> None:
        """As CachedModel's. What a text left is masked, but a weight of 0 times infinity is NaN: so it is zeroed."""
        if self.lengths:  # else nothing is allocated yet
            torch._foreach_zero_(keys_and_values(self.cache))
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
        return self.run(ids, logits_to_keep)

    def roll_back(self, tokens: int) -> None:
        if tokens:
            torch._foreach_add_(self.lengths, -tokens)

    def step(self, then: Callable, ids: Tensor, uniform: Tensor | None = None, logits_to_keep: int = 1) -> Any:
        """As CachedModel's; compiled if it was compiled for so many tokens, and eager if not."""
        compiled = self.steps.get((then, ids.shape[1]))
        if not compiled:
            return super().step(then, ids, uniform, logits_to_keep)
        # A CUDA graph writes its outputs into the same memory each time, so they are copied before it runs again. And
        # the graphs must be told where a new step begins, or they take outputs that are still held for memory in use,
        # and record themselves anew.
        torch.compiler.cudagraph_mark_step_begin()
        outputs = compiled(ids, uniform)
        if isinstance(outputs, Tensor):
            return outputs.clone()
        return tuple(output if output is None else output.clone() for output in outputs)

    def verify(self, score: Callable, ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """As CachedModel's, in a pass of `width` tokens: what is padded is ignored, and rolled back at once."""
        tokens = ids.shape[1]
        target, log_likelihoods = self.step(score, pad(ids, (0, width - tokens)), logits_to_keep=0)
        self.roll_back(width - tokens)
        return target[:tokens], log_likelihoods[: tokens - 1]

    @torch.no_grad()
    def compile(self, then: Callable, tokens: int, uniform: Tensor | None, logits_to_keep: int) -> None:
        """Compile a step, from ids [1, tokens] to what `then` returns, and forget the text.

        Raises what the compiler raises, and RuntimeError where it is turned off.
        """
        is_large = sum(weight.nbytes for weight in self.model.parameters()) >= LARGE
        products = StreamedProducts() if self.device.type == "cpu" and is_large else nullcontext()

        def whole(ids, uniform):
            with products:
                return then(self.forward(ids, logits_to_keep), ids, uniform)

        # What mode="reduce-overhead" means; and no guards. These would check before each step, for a millisecond, that
        # nothing of the model has changed, which nothing does. Without guards a step must be one whole graph, and must
        # not share a cache of graphs with others. (torch.compiler.nested_compile_region would compile one layer for
        # all, in half the time; but without guards, layers of other kinds and indices share its graph: gap 5.7.)
        options = {"triton.cudagraphs": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        how = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True, "options": options}
        self.steps[then, tokens], graphs = torch.compile(whole, **how), torch._dynamo.utils.counters["stats"]
        before = graphs["unique_graphs"]
        for _ in range(3):  # compile; capture a graph; replay it
            self.reset()
            self.step(then, torch.zeros(1, tokens, dtype=torch.long, device=self.device), uniform, logits_to_keep)
        if graphs["unique_graphs"] == before:
            raise RuntimeError("torch.compile is turned off here, as by TORCHDYNAMO_DISABLE")


def compile_steps(model: CompiledModel, sampler: Sampler, steps: tuple, announce: Callable) -> None:
    """Compile steps of a model: each what is done with the logits, and the tokens that it reads.

    Raises what `CompiledModel.compile` raises.
    """
    for number, (then, tokens) in enumerate(steps, 1):
        announce(f"Compiling step {number} of {len(steps)} of {plain(model.model.name_or_path)} …")
        logits_to_keep = int(then != sampler.score)
        model.compile(then, tokens, sampler.uniform(1) if logits_to_keep else None, logits_to_keep)
    if model.device.type == "cuda" and (skipped := torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]):
        announce(f"warning: no CUDA graphs of {counted(skipped, 'step')}, which are slow: see TORCH_LOGS=cudagraphs")


# 8  Further models: those that keep a state ---------------------------------------------------------------------------


class RecurrentModel(CachedModel):
    """A model with layers that carry a state from token to token: linear attention, Mamba 2, short convolutions.

    A state cannot be cropped, so all of them are saved before each pass. `roll_back` puts back the latest that have
    read none of the removed tokens, and crops layers of full attention to their length. The tokens of the text that
    were read after them are kept as `unread`, and the next pass begins with those. So the invariant of part 4 holds of
    the cache and the unread tokens together, and a rejection makes the next pass longer. Its passes have no constant
    shape, so they are not compiled.
    """

    MOST_UNREAD = 16  # tokens; more are read in a pass of their own, or each rejection would have them read again

    def reset(self, rolls_back: bool = True) -> None:
        super().reset(rolls_back=False)  # no recording: what cannot be cropped is saved
        self.rolls_back, self.length = rolls_back, 0  # tokens that the cache holds
        self.saved = []  # of each pass since the last roll-back: length and `layer_state` before it, and its ids
        self.unread = torch.empty(1, 0, dtype=torch.long, device=self.device)

    def prefill(self, prompt_ids: Tensor, rolls_back: bool = True) -> Tensor:
        logits = super().prefill(prompt_ids, rolls_back)
        self.roll_back(0)
        return logits

    @torch.inference_mode()
    def forward(self, ids: Tensor, logits_to_keep: int = 0) -> Tensor:
        logits_to_keep = logits_to_keep or ids.shape[1]
        if self.unread.shape[1] > self.MOST_UNREAD:
            self.read(self.unread, 1)
        else:
            ids = torch.cat([self.unread, ids], dim=1)
        self.unread = self.unread[:, :0]
        return self.read(ids, logits_to_keep)

    def read(self, ids: Tensor, logits_to_keep: int) -> Tensor:
        """Read ids, [1, n], in one pass; return the logits of the last, [logits_to_keep, vocabulary]."""
        if self.rolls_back:
            self.saved.append((self.length, [layer_state(layer) for layer in self.cache.layers], ids))
        positions = torch.arange(self.length, self.length + ids.shape[1], device=self.device)[None]
        self.length += ids.shape[1]
        return self.run(ids, logits_to_keep, position_ids=positions)

    @torch.inference_mode()
    def roll_back(self, tokens: int) -> None:
        if tokens:
            length, kept = self.length, self.length - tokens
            while length > kept:  # back by one pass
                length, states, ids = self.saved.pop()
                self.unread = torch.cat([ids, self.unread], dim=1)
            self.unread = self.unread[:, : kept - length]
            for layer, state in zip(self.cache.layers, states, strict=True):
                vars(layer).update(state)
                if is_full_attention(layer):
                    DynamicLayer.crop(layer, length - self.length)
            self.length = length
        self.saved = []


def is_full_attention(layer: Any) -> bool:
    """Whether a cache's layer keeps the keys and values of all tokens, which can be cropped; it may keep more."""
    return isinstance(layer, DynamicLayer) and not layer.is_sliding


def layer_state(layer: Any) -> dict:
    """All that a cache's layer keeps, by its attributes' names, but for keys and values that can be cropped.

    A pass overwrites states in place, which are in dictionaries; all else it replaces by new tensors.
    """
    left_out = ("keys", "values") if is_full_attention(layer) else ()
    kept = {name: value for name, value in vars(layer).items() if name not in left_out}
    return {name: copy.deepcopy(value) if isinstance(value, dict) else value for name, value in kept.items()}


def cached_model(model: PreTrainedModel, *how: Any) -> CachedModel:
    """A CachedModel of these arguments: a RecurrentModel if the library marks the model as one that has a state."""
    return (RecurrentModel if model._is_stateful else CachedModel)(model, *how)


# 9  The benchmark -----------------------------------------------------------------------------------------------------
#
# Raw records: what each method did with each prompt. Figures are computed from them in part 10.

BASELINE = "baseline"  # the label of the first method


@contextmanager
def cli_errors(what: str, hint: str) -> Iterator:
    """Make a UsageError of any error: broken files and folders can make libraries raise anything."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"cannot {what}: {one_line(error)}; {hint}") from error


def one_line(error: BaseException) -> str:
    """What an error says, in one line: of other libraries' at most 300 characters."""
    said = plain(getattr(error, "strerror", None) or str(error)) or type(error).__name__
    return said if len(said) < 300 or isinstance(error, UsageError) else said[:299] + "…"


@dataclass(frozen=True)
class Question(Prompt):
    """A question of a file; its number is its place among the file's rows, from 1."""

    category: str | None = None
    question_id: str | None = None
    earlier: tuple = ()  # the messages before the text: {"role": …, "content": …}
    unread: tuple = ()  # what else the row has, by its names, that is not used

    @property
    def label(self) -> str:
        """What the report calls it: the question's id, or its number."""
        return plain(str(self.number if self.question_id in (None, "") else self.question_id))


class Contender(NamedTuple):
    """A draft that is ready to be measured, or a Failure."""

    name: str  # as --draft names it
    draft: Draft | None = None
    costs: tuple = ()  # of `measure_costs`: the seconds of a round of 0, 1, … draft tokens
    error: str | None = None  # why it cannot run, in one line


class Failure(Contender):
    """A draft that cannot run: it stands where the draft would stand."""


class Models(NamedTuple):
    """What decodes, and what its tokens mean."""

    main: CachedModel
    contenders: tuple  # of Contender
    sampler: Sampler
    tokenizer: Any


@dataclass(frozen=True, eq=False)
class Method:
    """A way to decode a prompt. The first of a run is the baseline: the main model alone."""

    label: str
    decode: Callable  # makes a Generation of a Prompt
    contender: Contender | None = None  # the draft; None: there is none
    draft_tokens: int | str | None = None  # K, or "auto"; None: it drafts nothing
    library: str | None = None  # what it is, if it is not ours but transformers'
    recompiles: bool = False  # with texts of other lengths: so it is warmed up with each prompt
    step_bytes: int | None = None  # of the main model's weights, which a step of the baseline reads; if that is known

    @property
    def draft(self) -> str | None:
        """The draft, as --draft names it."""
        return self.contender and self.contender.name

    @property
    def error(self) -> str | None:
        """Why it cannot run."""
        return self.contender and self.contender.error


@dataclass(frozen=True)
class Outcome:
    """What one method did with one prompt."""

    error: str | None = None  # why it failed, wholly or in one of the repeats
    runs: tuple = ()  # a Generation for each repeat
    text: str | None = None  # of the run that counts
    verdict: str | None = None  # "identical", "tie" or "mismatch" (the worst of all repeats), "sampled", "unchecked"
    divergence: Divergence | None = None  # of a tie or a mismatch
    unchecked: str | None = None  # why it could not be checked

    @property
    def run(self) -> Generation | None:
        """The repeat that counts: the median by time per token; of an even number, the faster of the middle two."""
        ranked = sorted(self.runs, key=lambda run: run.latency_s / len(run.token_ids))
        return ranked[(len(ranked) - 1) // 2] if ranked else None


@dataclass(frozen=True, eq=False)
class Result:
    """What every method did with one prompt."""

    question: Question
    outcomes: dict  # by the methods' labels, in the methods' order
    replays: dict  # of the baseline's output: a Replay, by what --draft calls the draft
    interruptions: int = 0  # how often other programs took the core of its main thread while it was timed


@dataclass(frozen=True)
class Results:
    """All that a run measured: figures, report and JSON are made of this alone."""

    environment: dict  # what it ran on
    settings: Settings
    methods: tuple  # of Method, the baseline first
    contenders: tuple = ()  # of Contender: the drafts
    prompts: tuple = ()  # a Result for each
    complete: bool = False


def our_methods(models: Models, settings: Settings, widths: tuple) -> list:
    """The baseline, and speculative decoding with each draft and K; `widths`: of compiled verify passes."""
    main, contenders, sampler, _ = models
    methods = [Method(BASELINE, partial(decode_autoregressively, main, sampler), step_bytes=bytes_per_step(main.model))]
    for contender, k in itertools.product(contenders, settings.draft_tokens):
        is_auto = k == "auto" and not contender.error
        schedule = AutoSchedule(contender.costs, widths) if is_auto else FixedSchedule(k, widths)
        decode = partial(decode_speculatively, main, contender.draft, sampler, schedule)
        label = f"{short_name(contender.name, settings)}K = {k}"
        methods.append(Method(label, decode, contender, k))
    return methods


def library_methods(models: Models, settings: Settings, is_compiled: bool) -> list:
    """What a user would run instead: transformers' generate(), alone (on a GPU compiled if ours is) and assisted."""
    main, decode = models.main, partial(decode_by_generate, models)
    is_compiled = is_compiled and main.device.type in ("cuda", "xpu")
    kind, options = ("compiled", {"cache_implementation": "static"}) if is_compiled else ("eager", {})
    library = f"transformers' generate(), {kind}"
    methods = [Method("generate()", partial(decode, None, options), library=library, recompiles=is_compiled)]
    contenders = () if main.model._is_stateful else models.contenders  # it cannot assist models with a state
    for contender, k in itertools.product(contenders, settings.draft_tokens):
        label, options = "assisted", {}  # with its default K
        if k != "auto":
            label, options = f"assist {k}", {"num_assistant_tokens": k, "num_assistant_tokens_schedule": "constant"}
            options["assistant_confidence_threshold"] = 0.0
        if contender.name == NGRAM:
            options = {"prompt_lookup_num_tokens": 10 if k == "auto" else k, "max_matching_ngram_size": 3}
        label, run = short_name(contender.name, settings) + label, partial(decode, contender.draft, options)
        methods.append(Method(label, run, contender, k, "transformers' assisted generation, eager"))
    return methods


def short_name(draft: str, settings: Settings) -> str:
    """What labels call one of several drafts, with a comma: the last part of its name, or all of it, or a number."""
    if len(settings.draft) == 1:
        return ""
    place = settings.draft.index(draft)
    names = list(map(plain, settings.draft))
    ends = [os.path.basename(name.rstrip("/")) for name in names]
    own = (shown[place] for shown in (ends, names) if shown.count(shown[place]) == 1)
    return f"{next(filter(None, own), f'draft {place + 1}')}, "


@torch.no_grad()
def decode_by_generate(models: Models, draft: Draft | None, options: dict, prompt: Prompt) -> Generation:
    """What transformers' generate() makes of a prompt, whatever the models' own generation configs ask for."""
    main, _, sampler, _ = models
    options = {"max_new_tokens": prompt.max_new_tokens, "eos_token_id": sorted(prompt.end_ids) or None, **options}
    if isinstance(sampler, Sampling):
        options |= sampler.for_generate
        sampler.restart(prompt)
        torch.manual_seed(sampler.generator.initial_seed())
    config = GenerationConfig(pad_token_id=0, **options)
    ids = torch.tensor([prompt.ids], device=main.device)
    assistant = draft.model.model if isinstance(draft, ModelDraft) else None
    for model in filter(None, (main.model, assistant)):
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
    places = set(map(str, getattr(model, "hf_device_map", {}).values()))
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


def timed_round(device: torch.device, drafted: int, accepted: int, *marks: Any) -> Round:
    """A round with its times, from four marks: where it began, had drafted, had verified, and was finished.

    The device must have passed them all.
    """
    if isinstance(marks[0], torch.Event):
        marks = [marks[0].elapsed_time(each) / 1000 for each in marks]
    begun, proposed, verified, finished = marks
    if device.type not in ("cpu", "cuda", "xpu"):  # the host's clock is right only where the host waits: once a round
        return Round(drafted, accepted, seconds=finished - begun)
    return Round(drafted, accepted, proposed - begun, verified - proposed, finished - begun)


def memory_bandwidth_gb_s(device: torch.device) -> float:
    """What the device's memory delivers, in GB/s: the best of a few plain sums over 512 MB."""
    numbers = torch.ones(2**27, device=device)
    return numbers.nbytes / 1e9 / min(timeit.repeat(lambda: numbers.sum().item(), number=1, repeat=6))


def give_back_memory(device: torch.device) -> None:
    """What nothing holds any more, as after a failure, is free for what comes next."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def benchmark(questions: list, methods: list, models: Models, settings: Settings, announce: Callable) -> Iterator:
    """Decode each question with all methods; yield its Result.

    `announce` is called before each run with the question and what is run.
    """
    warm, process = set(), psutil.Process()  # warm: the labels of methods that are warmed up
    for count, question in enumerate(questions):
        runs = {method.label: [] for method in methods}
        errors = {method.label: method.error for method in methods}
        interruptions = 0
        warm -= {method.label for method in methods if method.recompiles}
        for method in in_turns(methods, settings.repeats, count):
            label = method.label
            if errors[label]:
                continue
            try:
                for _ in range(0 if label in warm else settings.warmup):  # allocates memory, loads kernels, …
                    announce(question, f"warm-up, {label}")
                    method.decode(question)
                warm.add(label)
                announce(question, label)
                before = process.num_ctx_switches().involuntary
                runs[label].append(method.decode(question))
                interruptions += process.num_ctx_switches().involuntary - before
            except Exception as error:  # above all: out of memory. It costs this outcome only.
                errors[label] = one_line(error)
            if errors[label]:
                give_back_memory(models.main.device)
        outcomes = {label: Outcome(error, tuple(runs[label])) for label, error in errors.items()}
        finished = {label: outcome.runs for label, outcome in outcomes.items() if not outcome.error}
        for label, verdict in judge(models, question, finished).items():
            text = text_of_ids(models.tokenizer, outcomes[label].run.token_ids)
            outcomes[label] = replace(outcomes[label], text=text, **verdict)
        replays = {} if errors[BASELINE] else replay_all(models, question, outcomes[BASELINE].run.token_ids)
        yield Result(question, outcomes, replays, interruptions)


def in_turns(methods: list, repeats: int, count: int) -> Iterator:
    """All methods, so often: they take turns at being the first."""
    for repeat in range(repeats):
        first = (count + repeat) % len(methods)
        yield from methods[first:] + methods[:first]


def judge(models: Models, question: Question, runs: dict) -> dict:
    """Compare the outputs of each method with the baseline's, and certify them; of sampled ones only the logits.

    `runs`: a method's Generations, by its label. Returns the fields of its Outcome that hold the verdict.
    """
    is_sampled = isinstance(models.sampler, Sampling)

    @cache
    def divergence_of(output):
        if is_sampled:
            certify(models.main, question.ids, output)
        elif BASELINE not in runs:
            raise LookupError("there is no baseline to compare it with")
        else:
            return find_divergence(models.main, question.ids, runs[BASELINE][0].token_ids, output)

    verdicts = {}
    for label, repeats in runs.items():
        try:
            divergences = [divergence_of(run.token_ids) for run in repeats]
            worst = max(filter(None, divergences), key=lambda each: (each.kind == "mismatch", each.gap), default=None)
            kind = worst.kind if worst else "sampled" if is_sampled else "identical"
            verdicts[label] = {"verdict": kind, "divergence": worst}
        except Exception as error:  # it costs the verdict, not the timings
            verdicts[label] = {"verdict": "unchecked", "unchecked": one_line(error)}
    return verdicts


def text_of_ids(tokenizer: Any, ids: tuple) -> str | None:
    """The text of these ids, without special tokens; None where the tokenizer cannot tell."""
    with suppress(Exception):
        return tokenizer.decode(list(ids), skip_special_tokens=True)


def replay_all(models: Models, question: Question, output_ids: tuple) -> dict:
    """Each draft's Replay of the baseline's output; a draft that fails here is only missing there."""
    replays = {}
    for contender in models.contenders:
        with suppress(Exception):
            if contender.draft and len(output_ids) > 1:
                replays[contender.name] = replay(models.main, contender.draft, models.sampler, question, output_ids)
    return replays


# 10  Figures ----------------------------------------------------------------------------------------------------------
#
# All is computed with numpy, where what is not known is NaN, as 0 / 0 is, and as is whatever follows from it. Only in
# the finished Figures it is None.

Maybe = float | None  # a figure; None where there is no such figure


@dataclass(frozen=True)
class Figures:
    """What the records of a method say, over one prompt or several. Report and JSON read them by these names."""

    prompts: int  # over how many prompts: those that both this method and the baseline decoded
    new_tokens: int  # of all these prompts
    latency_s: float  # seconds from a prompt's ids to its last token: of the run that counts; the mean over prompts
    tokens_per_s: float  # new tokens / latency: all tokens / all seconds
    time_to_first_token_s: Maybe  # seconds to the first token on the host: the mean over prompts
    time_per_output_token_s: Maybe  # (latency - time to first token) / (new tokens - 1)
    speedup_percent: Maybe  # 100 × (tokens per second / the baseline's - 1)
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
    predicted_speedup_percent: Maybe  # of a fixed K, without the prefill: by the replay of the draft and measured costs
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
        return max(counts, key=counts.get)


def decoded(prompts: list, label: str) -> list:
    """Those of some prompts, Results each, that the method with this label decoded."""
    return [result for result in prompts if not result.outcomes[label].error]


def figures_of(prompts: tuple, method: Method) -> Figures | None:
    """Every figure of one method over some prompts, Results each; None if it decoded none of them.

    All are of the same prompts: those that the baseline decoded, too, if there are any.
    """
    done = decoded(prompts, method.label)
    paired = decoded(done, BASELINE)
    outcomes = [result.outcomes[method.label] for result in paired or done]
    if not outcomes:
        return None
    runs = [outcome.run for outcome in outcomes]
    kinds = Counter(outcome.verdict for outcome in outcomes)
    figures = dict.fromkeys(Figures.__annotations__) | {
        "prompts": len(outcomes),
        "identical": None if kinds["sampled"] else kinds["identical"],
        "ties": kinds["tie"],
        "mismatches": kinds["mismatch"],
        "unchecked": kinds["unchecked"],
    }
    with numpy.errstate(all="ignore"):
        figures |= speed_figures(runs)
        if method.step_bytes:
            figures["weight_bandwidth_gb_s"] = method.step_bytes / figures["time_per_output_token_s"] / 1e9
        if method.draft_tokens and not method.library:
            figures |= acceptance_figures(runs)
            figures["predicted_speedup_percent"] = predicted_speedup(done, method)  # along the baseline's texts
        if paired and method.label != BASELINE:
            figures |= comparison_figures([result.outcomes[BASELINE].run for result in paired], runs)
    return Figures(**finite(figures))


@cache
def prompt_figures(result: Result, method: Method) -> Figures | None:
    """The same over one prompt, computed once."""
    return figures_of((result,), method)


def finite(figure: Any) -> Any:
    """A figure, or a collection of them, as JSON has it: with None for each that is not finite."""
    if is_dataclass(figure):
        figure = asdict(figure)
    if isinstance(figure, dict):
        return {name: finite(value) for name, value in figure.items()}
    if isinstance(figure, list | tuple):
        return list(map(finite, figure))
    if isinstance(figure, float):  # or numpy's float64, which is one
        return float(figure) if math.isfinite(figure) else None
    return figure


def as_percent(factor: float) -> float:
    """How much faster a factor is, in percent."""
    return 100 * (factor - 1)


def run_rows(runs: list) -> numpy.ndarray:
    """Of each run, a Generation: its tokens, its seconds, and those to its first token; [prompts, 3]."""
    rows = [(len(run.token_ids), run.latency_s, run.first_token_s) for run in runs]
    return numpy.array(rows, float)  # generate() does not tell when its first token came: NaN


def speed_figures(runs: list) -> dict:
    """Tokens and seconds of one method."""
    tokens, seconds, first_s = run_rows(runs).T
    return {
        "new_tokens": int(tokens.sum()),
        "latency_s": seconds.mean(),
        "tokens_per_s": tokens.sum() / seconds.sum(),
        "time_to_first_token_s": first_s.mean(),
        "time_per_output_token_s": (seconds - first_s).sum() / ((tokens - 1).sum() or math.nan),
    }


def round_columns(runs: list) -> numpy.ndarray:
    """All rounds, [5, rounds]: drafted and accepted tokens, and seconds, in the order of Round."""
    rounds = [each for run in runs for each in run.rounds]
    return numpy.array(rounds, float).reshape(-1, len(Round._fields)).T


def acceptance_figures(runs: list) -> dict:
    """What became of the draft tokens. The last round counts whole."""
    drafted, accepted, *_ = round_columns(runs)
    emitted = numpy.sum([len(run.token_ids) - 1 for run in runs])
    log_likelihood = sum(run.log_likelihood for run in runs)
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


def comparison_figures(before: list, after: list) -> dict:
    """How much faster than the baseline, from its runs and the method's; and what the method's rounds cost."""
    baseline = speed_figures(before)
    own = speed_figures(after)
    step_s = baseline["time_per_output_token_s"]
    measured = numpy.stack([run_rows(before), run_rows(after)], axis=1)
    tokens, seconds, _ = measured.T
    baseline_s, own_s = seconds / tokens  # [prompts]
    gains = as_percent(baseline_s / own_s)
    rounds = round_columns(after)
    drafting = rounds[:, rounds[0] > 0]  # the rounds that drafted anything
    drafted, _, draft_s, verify_s, _ = drafting.sum(axis=1)
    return {
        "speedup_percent": as_percent(own["tokens_per_s"] / baseline["tokens_per_s"]),
        "decode_speedup_percent": as_percent(step_s / own["time_per_output_token_s"]),
        "speedup_range_percent": [gains.min(), gains.max()],
        "speedup_interval_percent": speedup_interval(measured) if len(after) >= 10 else None,
        "draft_cost": draft_s / drafted / step_s,
        "verify_cost": verify_s / drafting.shape[1] / step_s,
    }


def speedup_interval(measured: numpy.ndarray) -> list:
    """The speedup's 95 % interval in percent: percentile bootstrap, 2,000 resamples over prompts.

    `measured`: tokens and seconds of the baseline and of the method, [prompts, 2, 2 or more].
    """
    count = len(measured)
    samples = numpy.random.default_rng(0).integers(count, size=(2000, count))
    tokens, seconds, *_ = measured[samples].sum(axis=1).T  # [the baseline's and its own, samples]
    baseline, own = tokens / seconds
    return list(numpy.percentile(as_percent(own / baseline), [2.5, 97.5]))


# What the replays say. A round's price is measured, and how many rounds there would be is replayed: so the speedup of a
# K is known without decoding with it.


@dataclass(frozen=True)
class DraftFigures:
    """What a draft would do with every K, along the baseline's outputs; without the prefill."""

    draft: str  # as --draft names it
    costs: tuple  # seconds of a round of 0, 1, … draft tokens
    alpha: Maybe = None  # the chance that its next token is accepted: the mean over the texts, where it drafts any
    best_draft_tokens: int | None = None  # the K of the largest speedup
    oracle_speedup_percent: Maybe = None  # of rounds that draft just the tokens that will be accepted, if they pay
    by_draft_tokens: tuple = ()  # "draft_tokens", "mean_acceptance_length" and "speedup_percent" of each K with a price
    error: str | None = None  # why there are none


@cache
def replayed_result(result: Result, draft: str, costs: tuple) -> tuple:
    """Of one prompt: its steps; where the draft drafts any, these places, and the first token's chances, added up;
    rounds and seconds with K = 1, 2, …; and an oracle's seconds. Computed once.
    """
    replay = result.replays[draft]
    prices = numpy.array(costs)
    first = replay.chances[replay.drafted > 0, 0]
    rounds = replayed(replay, numpy.ones(len(costs)))
    return len(replay.drafted), len(first), first.sum(), rounds, replayed(replay, prices), oracle_cost(replay, prices)


def draft_figures(prompts: tuple, contender: Contender) -> DraftFigures:
    """What one draft would do with these prompts, Results each, with every K."""
    name, _, costs, error = contender
    each = [replayed_result(result, name, costs) for result in prompts if name in result.replays]
    if not each:
        return DraftFigures(name, costs, error=error)
    steps, places, chances, rounds, seconds, oracle_s = map(sum, zip(*each, strict=True))
    baseline_s = steps * costs[0]
    gains = as_percent(baseline_s / seconds)
    by_k = [
        {"draft_tokens": k, "mean_acceptance_length": steps / rounds[k - 1], "speedup_percent": gains[k - 1]}
        for k in range(1, len(costs))
    ]
    figures = {
        "alpha": chances / (places or math.nan),
        "best_draft_tokens": 1 + int(gains.argmax()),
        "oracle_speedup_percent": as_percent(baseline_s / oracle_s),
        "by_draft_tokens": by_k,
    }
    return DraftFigures(name, costs, **finite(figures))


def predicted_speedup(prompts: list, method: Method) -> Maybe:
    """The decode speedup of a fixed K in percent, by replay; None where K has no price."""
    by_k = draft_figures(prompts, method.contender).by_draft_tokens
    return next((each["speedup_percent"] for each in by_k if each["draft_tokens"] == method.draft_tokens), None)


# 11  The report -------------------------------------------------------------------------------------------------------


def three_digits(value: Maybe) -> str:
    """A number with about three significant digits; a dash for None."""
    if value is None:
        return "–"
    if abs(value) < 1:
        return f"{value:.3f}"
    return f"{value:#.3g}" if abs(value) < 99.95 else f"{value:.0f}"


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


# Columns of tables, by their headings: their width with a space before, which of a row's figures they show, and how.
COLUMNS = {
    "tokens": (7, "mean_new_tokens", str),
    "s": (7, "latency_s", three_digits),
    "TTFT": (7, "time_to_first_token_s", three_digits),
    "tok/s": (6, "tokens_per_s", three_digits),
    "faster": (8, "speedup_percent", gain),
    "decode": (8, "decode_speedup_percent", gain),
    "predicted": (10, "predicted_speedup_percent", gain),
    "accept": (7, "acceptance_rate", share),
    "length": (7, "mean_acceptance_length", three_digits),
    "log-l.": (7, "log_likelihood_per_token", three_digits),
    "α": (6, "alpha", three_digits),
    "c": (6, "draft_cost", three_digits),
    "v": (6, "verify_cost", three_digits),
    "same": (10, "verdict", in_colour),
}
PROMPT_COLUMNS = "tokens s TTFT tok/s faster accept length log-l. same".split()
SUMMARY_COLUMNS = "tok/s faster decode predicted length α c v".split()
MANY_INTERRUPTIONS = 50  # a second
REPLAYED = "1 2 3 4 6 8 12 15".split()  # the K that the report shows, a column each
# Where a terminal is too narrow, these are left out, the first of them first.
LEFT_OUT_FIRST = "TTFT log-l. predicted decode length accept v c 12 6 3 15 8 α s tokens".split()


def print_table(console: Console, widths: dict, title: str, rows: dict) -> None:
    """Print rows of cells, each by its heading, by their labels; with a title, below headings and above a blank line.

    `widths`: of the columns, by their headings; of the labels, by "".
    """
    widths = dict(widths)
    of_labels = max(widths.pop(""), 0, *(len(label) + 4 for label in rows))
    for heading in LEFT_OUT_FIRST:
        if sum(widths.values()) + min(of_labels, max(16, console.width // 3)) > console.width:
            widths.pop(heading, None)
    room = console.width - sum(widths.values())
    table = Table(box=None, padding=0, show_header=bool(title))
    table.add_column(title, width=min(of_labels, room), no_wrap=True)
    for heading, width in widths.items():
        table.add_column(heading, width=width, no_wrap=True, justify="right")
    for label, cells in rows.items():
        table.add_row(("  " if title else "    ") + label, *(cells[heading] for heading in widths))
    console.print(table)
    if title and rows:
        console.print()


def print_figures(console: Console, columns: list, title: str, rows: dict, methods: tuple) -> None:
    """Print rows of Figures, by their labels, in the columns of these headings."""
    widths = {heading: COLUMNS[heading][0] for heading in columns}
    cells = {}
    for label, row in rows.items():
        cells[label] = {heading: show(getattr(row, figure)) for heading, (_, figure, show) in COLUMNS.items()}
    print_table(console, {"": label_width(methods)} | widths, title, cells)


def label_width(methods: tuple) -> int:
    """The width of a table's first column."""
    return max(14, *(len(method.label) + 4 for method in methods))


def print_prompt(console: Console, results: Results, result: Result, tokenizer: Any) -> None:
    """Print what the methods did with one prompt, and, if --show-text asks for it, the speculative texts."""
    title = f"{result.question.label:>3} {plain(result.question.text)}"
    console.print(title, overflow="ellipsis", no_wrap=True)
    rows = {method.label: row for method in results.methods if (row := prompt_figures(result, method))}
    print_figures(console, PROMPT_COLUMNS, "", rows, results.methods)
    for method in results.methods:
        outcome = result.outcomes[method.label]
        if outcome.error and not method.error:  # the description says why a draft cannot run at all
            console.print(f"    {method.label}: {outcome.error}", style="red")
        if results.settings.show_text and outcome.runs and outcome.run.rounds:
            console.print(f"{method.label}:", style="bold")
            print_text(console, tokenizer, outcome.run)


ORIGINS = {  # where a token comes from: its style, and the marks around it
    "accepted draft token": ("green", "{}"),
    "the main model's own, after a rejection": ("bold red", "«{}»"),
    "its bonus token": ("cyan", "‹{}›"),
    "its own, nothing drafted": ("", "{}"),
}


def marked(piece: str, origin: str) -> Text:
    """A piece of a text in the style and the marks of where it comes from."""
    style, marks = ORIGINS[origin]
    return Text(marks.format(piece), style)


def print_text(console: Console, tokenizer: Any, run: Generation) -> None:
    """Print what was generated, each token by where it comes from: in colours, and in marks."""
    draft, correction, bonus, own = ORIGINS
    origins = [own]  # the first token is from the prefill
    pieces = []
    done = ""
    for each in run.rounds:
        origins += [draft] * each.accepted
        origins.append(correction if each.accepted < each.drafted else bonus if each.drafted else own)
    for place, origin in enumerate(origins[: len(run.token_ids)], 1):
        decoded = text_of_ids(tokenizer, run.token_ids[:place]) or ""
        if place == len(run.token_ids) or not decoded.endswith("\ufffd"):  # else: a part of a character
            pieces.append(marked(safe(decoded[len(done) :]), origin))
            done = decoded
    console.print(*pieces, sep="")
    console.print(*(marked(origin, origin) for origin in ORIGINS), sep="  ")


def rank(results: Results, figures: dict) -> list:
    """Our speculative methods, the fastest first; those that failed on some prompts behind all others.

    Only those are ranked that can be compared with the baseline.
    """
    ours = [method for method in results.methods if method.draft and not method.library and method.label in figures]
    rows = {method: figures[method.label] for method in ours if figures[method.label].speedup_percent is not None}
    return sorted(rows, key=lambda method: (rows[method].prompts, rows[method].speedup_percent), reverse=True)


# The sentences of the result. Each says one thing, or nothing ("") where it would not be true. `best`: the figures of
# the fastest method.


def times_as_fast(results: Results, method: Method, other: Method) -> str:
    """Over the prompts that both decoded, and the baseline."""
    both = decoded(decoded(results.prompts, method.label), other.label)
    own = figures_of(both, method)
    return three_digits(own and own.tokens_per_s / figures_of(both, other).tokens_per_s)


def say_which_is_best(results: Results, figures: dict, ranking: list) -> str:
    """Of those that decoded all prompts; and its lead over the next that has another draft, if there is any."""
    total = len(results.prompts)
    complete = [method for method in ranking if len(decoded(results.prompts, method.label)) == total]
    if len(complete) < 2 or not figures[complete[0].label].drafted:
        return ""
    best, *others = complete
    rival = next((method for method in others if method.draft != best.draft), others[0])
    return (
        f"The best in this run was {best.label}: {times_as_fast(results, best, rival)} times as fast as "
        f"{rival.label}. The data that measured it also picked it."
    )


def say_how_fast(label: str, best: Figures) -> str:
    if best.rounds and not best.drafted:
        return f"{label} never drafted anything: no draft token was worth its cost here, or none was found."
    if None in (best.decode_speedup_percent, best.alpha):
        return "Too few tokens to tell how fast it is: raise --max-new-tokens, or ask for longer answers."
    spread = costs = ""
    if best.prompts > 1:
        kind = "95 % interval" if best.speedup_interval_percent else "over the prompts"
        low, high = best.speedup_interval_percent or best.speedup_range_percent
        spread = f" ({kind} {1 + low / 100:.2f} to {1 + high / 100:.2f})"
    if best.verify_cost is not None:
        costs = f" A verify pass cost v = {three_digits(best.verify_cost)} baseline steps, a draft step "
        costs += f"c = {three_digits(best.draft_cost)}."
    return (
        f"Speculative decoding was {1 + best.speedup_percent / 100:.2f} times as fast{spread}. "
        f"A pass of the main model yielded {best.mean_acceptance_length:.2f} tokens, "
        f"and α = {best.alpha:.3f} of the tested draft tokens were accepted.{costs}"
    )


def say_what_replay_tells(drafts: list, figures: dict, ranking: list) -> str:
    """The best K by replay, of the draft for which it gives most, and what no schedule can exceed."""
    replays = [(by_k, draft) for draft in drafts for by_k in draft.by_draft_tokens]
    if not replays:
        return ""
    best, draft = max(replays, key=lambda pair: pair[0]["speedup_percent"])
    reached = ""
    for method in ranking:
        if method.draft == draft.draft and method.draft_tokens == "auto":
            reached = f"; {method.label} gave {gain(figures[method.label].decode_speedup_percent)}"
    return (
        f"Replayed, the best K of {plain(draft.draft)} is {best['draft_tokens']}: {gain(best['speedup_percent'])}, "
        "without the prefill. A schedule that always knew where the draft fails would give "
        f"{gain(draft.oracle_speedup_percent)}{reached}."
    )


def say_what_replay_misses(figures: dict, ranking: list) -> str:
    """Whether a measured K differs from its replay by more than the prompts differ among each other."""
    for method in ranking:
        row = figures[method.label]
        measured = row.decode_speedup_percent
        predicted = row.predicted_speedup_percent
        low, high = row.speedup_range_percent
        if row.prompts > 1 and None not in (measured, predicted) and abs(measured - predicted) > max(5, high - low):
            return (
                f"{method.label} gave {gain(measured)} without the prefill, its replay {gain(predicted)}: the machine "
                "was busy, or costs change with the text's length."
            )
    return ""


def say_what_memory_allows(baseline: Figures, environment: dict, settings: Settings) -> str:
    limit = environment["memory_bandwidth_gb_s"]
    read = baseline.weight_bandwidth_gb_s
    if not limit or not read:
        return ""
    if read > 1.2 * limit:
        why = "so they come from a cache of the processor, or the machine was busy with something else."
    elif read >= limit / 2:
        why = "this is what it waits for, and where speculation pays."
    elif settings.compile == "off" and environment["can_compile"]:
        why = "as eager steps do, it waits for Python, kernels and their launches (--compile on)."
    else:
        why = "it waits for something else."
    return (
        f"The baseline reads {three_digits(read)} GB of weights a second, memory can deliver {three_digits(limit)}: "
        f"{why}"
    )


def say_if_it_is_rough(results: Results) -> str:
    """Threads wait for each other at every product, and so for each that another program interrupts."""
    outcomes = [outcome for result in results.prompts for outcome in result.outcomes.values()]
    seconds = sum(run.latency_s for outcome in outcomes for run in outcome.runs)
    rate = sum(result.interruptions for result in results.prompts) / seconds
    threads = results.environment["threads"]
    if results.environment["device"] != "cpu" or threads == 1 or rate < MANY_INTERRUPTIONS:
        return ""
    return (
        f"These figures are rough: other programs interrupted this one {rate:.0f} times a second, and its {threads} "
        "threads wait for each other. Try OMP_NUM_THREADS=1, --repeats 5, or a quiet machine."
    )


def say_what_to_try(best: Figures, settings: Settings) -> str:
    auto = "" if "auto" in settings.draft_tokens else "--draft-tokens auto, or "
    advice = f"No draft pays here. Try {auto}a draft that is smaller, or right more often."
    return advice if best.drafted and best.speedup_percent < 0 else ""


def say_how_the_library_did(results: Results, ranking: list) -> str:
    lines = []
    ours = {(method.draft, method.draft_tokens): method for method in ranking}
    for other in results.methods:
        own = ours.get((other.draft, other.draft_tokens), ranking[0])
        if other.library and (times := times_as_fast(results, own, other)) != "–":
            lines.append(f"{own.label} was {times} times as fast as {other.label}: {other.library}.")
    return "\n".join(lines)


def judged(results: Results) -> list:
    """Where outcomes stand, and they: of our speculative methods, or, if none of them ran, of the baseline."""
    outputs = defaultdict(list)
    for result, method in itertools.product(results.prompts, results.methods):
        outcome = result.outcomes[method.label]
        if not outcome.error and not method.library:
            outputs[bool(method.draft)].append((f"prompt {result.question.label}, {method.label}", outcome))
    return outputs[True] or outputs[False]


VERDICTS = {  # what is said of the outputs that got each
    "identical": "The main model's own, token for token",
    "sampled": "Sampled, so they differ, but all from the main model's own distribution",
    "tie": "Ties, the main model's own within its rounding",
    "mismatch": "Mismatches, NOT the main model's own (please report this as a bug)",
    "unchecked": "Could not be checked",
}


def say_what_is_right(outputs: list) -> str:
    """How many outputs got each verdict, and the one that says most of it."""
    lines = []
    for verdict, meaning in VERDICTS.items():
        alike = [(where, outcome) for where, outcome in outputs if outcome.verdict == verdict]
        if alike:
            count = f"{len(alike)} of {counted(len(outputs), 'output')}"
            lines.append(f"{meaning}: {count}.{say_worst(alike)}")
    return "\n".join(lines)


def say_worst(alike: list) -> str:
    """Of outputs of one verdict: the one with the largest gap, or why the first could not be checked."""
    where, outcome = max(alike, key=lambda pair: pair[1].divergence.gap if pair[1].divergence else 0)
    worst = outcome.divergence
    if worst is None:
        return f" The first: {where}: {outcome.unchecked}." if outcome.unchecked else ""
    place = "both alike" if worst.index is None else f"new token {worst.index + 1}"
    return (
        f" The largest: {where}, {place}, at fault: {worst.at_fault or 'rounding'}, gap {worst.gap:.3g} (of the "
        f"baseline {worst.baseline_gap:.3g}), rounding noise {worst.noise:.3g}."
    )


def print_report(console: Console, results: Results) -> None:
    """Print the averages, what compares methods and categories, and the result in sentences."""
    figures = {method.label: row for method in results.methods if (row := figures_of(results.prompts, method))}
    ranking = rank(results, figures)
    methods = results.methods
    sentences = []
    if len(results.prompts) > 1:
        console.print("    mean")
        print_figures(console, PROMPT_COLUMNS, "", over_how_many(results, figures), methods)
    for contender in results.contenders:
        if contender.error:
            console.print(f"    {plain(contender.name)}: {contender.error}", style="red")
    console.print()
    if ranking:
        by_speed = {method.label: figures[method.label] for method in ranking}
        print_figures(console, SUMMARY_COLUMNS, "By speed", over_how_many(results, by_speed), methods)
        if by_category := figures_by_category(results, ranking[0]):
            safe_names = {plain(name): row for name, row in by_category.items()}
            print_figures(console, SUMMARY_COLUMNS, "By category", safe_names, methods)
        drafts = [draft_figures(results.prompts, contender) for contender in results.contenders]
        print_replays(console, results, drafts)
        label, best = next(iter(by_speed.items()))
        sentences = [
            say_if_it_is_rough(results),
            say_what_to_try(best, results.settings),
            say_which_is_best(results, figures, ranking),
            say_how_fast(label, best),
            say_what_replay_tells(drafts, figures, ranking),
            say_what_replay_misses(figures, ranking),
            say_what_memory_allows(figures[BASELINE], results.environment, results.settings),
            say_how_the_library_did(results, ranking),
        ]
    sentences.append(say_what_is_right(judged(results)))
    for sentence in filter(None, sentences):
        console.print(sentence)


def over_how_many(results: Results, figures: dict) -> dict:
    """Figures by label, which says over how many prompts, where that is not all."""
    total = len(results.prompts)
    return {
        label if row.prompts == total else f"{label} ({row.prompts} of {total})": row for label, row in figures.items()
    }


def print_replays(console: Console, results: Results, drafts: list) -> None:
    """Print the replayed speedups of some K, a row for each draft; the best of them is marked."""
    rows = {}
    for draft in drafts:
        by_k = {str(each["draft_tokens"]): each["speedup_percent"] for each in draft.by_draft_tokens}
        shown = [k for k in REPLAYED if k in by_k]
        cells = {k: gain(by_k.get(k)) for k in REPLAYED}
        if shown:
            cells[max(shown, key=by_k.get)].append("*")
            rows[short_name(draft.draft, results.settings).rstrip(", ") or "draft"] = cells
    if rows:
        widths = {"": label_width(results.methods)} | dict.fromkeys(REPLAYED, 8)
        print_table(console, widths, "By K, replayed", rows)


def figures_by_category(results: Results, method: Method) -> dict:
    """A method's figures over the prompts of each category."""
    groups = defaultdict(list)
    for result in decoded(results.prompts, method.label):
        if result.question.category is not None:
            groups[result.question.category].append(result)
    return {name: figures_of(group, method) for name, group in groups.items()}


def exit_status(results: Results) -> int:
    """1 if a prompt failed, or an output is wrong or unchecked. Raises UsageError if nothing was decoded."""
    pairs = itertools.product(results.prompts, results.methods)
    outcomes = [result.outcomes[method.label] for result, method in pairs if not method.library]
    if all(outcome.error for outcome in outcomes):
        raise UsageError(f"no prompt could be decoded ({outcomes[0].error})")
    return int(any(each.error or each.verdict in ("mismatch", "unchecked") for each in outcomes))


@cache
def prompt_json(result: Result, methods: tuple) -> str:
    """What was measured with one prompt, as JSON, made once."""
    question = result.question
    outcomes = {}
    for method in methods:
        outcome = result.outcomes[method.label]
        run = outcome.run
        facts = asdict(outcome)
        del facts["runs"]
        columns = zip(*run.rounds, strict=True) if run and run.rounds else [()] * len(Round._fields)
        outcomes[method.label] = facts | {
            "figures": prompt_figures(result, method),
            "token_ids": run and run.token_ids,
            "latencies_s": [each.latency_s for each in outcome.runs],
            "rounds": dict(zip(Round._fields, columns, strict=True)),
        }
    ones = numpy.ones(LONGEST + 1)
    prompt = {
        "number": question.number,
        "question_id": question.question_id,
        "category": question.category,
        "prompt": question.text,
        "prompt_tokens": len(question.ids),
        "replays": {draft: list(replayed(each, ones)) for draft, each in result.replays.items()},
        "outcomes": outcomes,
    }
    return json.dumps(finite(prompt), allow_nan=False)


def to_json(results: Results) -> str:
    """All that was measured, and all figures."""
    methods = [
        {
            "label": method.label,
            "draft": method.draft,
            "draft_tokens": method.draft_tokens,
            "library": method.library,
            "error": method.error,
            "summary": figures_of(results.prompts, method),
            "categories": figures_by_category(results, method),
        }
        for method in results.methods
    ]
    whole = {
        "schema": 3,
        "environment": results.environment,
        "settings": results.settings,
        "methods": methods,
        "drafts": [draft_figures(results.prompts, contender) for contender in results.contenders],
        "complete": results.complete,
        "prompts": [],
    }
    prompts = ",\n".join(prompt_json(result, results.methods) for result in results.prompts)
    head = json.dumps(finite(whole), indent=2, allow_nan=False).removesuffix("]\n}")
    return f"{head}\n{prompts}\n]}}\n"


def save(path: str | None, option: str, text: str | None) -> None:
    """Replace a file, if one is named, at once, so that it is always whole; None: see if one can. Raises UsageError."""
    if not path:
        return
    with cli_errors(f"write {path}", f"name another file with {option}"):
        target = pathlib.Path(path).resolve()  # a link stays a link
        if target.exists() and not target.is_file():
            raise OSError("it is not a file that can be replaced")
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_text(text or "", encoding="utf-8")
            if text is not None:
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


# 12  Loading ---------------------------------------------------------------------------------------------------------
#
# For what is missing, broken or does not fit, all of this raises UsageError.

KEYS = ("prompt", "turns", "question", "problem", "instruction", "messages", "conversations", "conversation")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}  # ours


def read_rows(path: str) -> list:
    """The rows of a prompts file: what a JSON file lists, or {"prompt": …} of each line of a text."""
    with cli_errors(f"read {path}", "name a text file with --prompts"):
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    suffix = pathlib.Path(path).suffix.lower()
    begins_as_json = re.match(r'(?m)\s*(\[|{|{".*})\s*$', text)
    if suffix in ("", ".txt", ".md") and not begins_as_json and "\0" not in text:
        return [{"prompt": line} for _, line in lines]
    if suffix not in (".json", ".jsonl", ".ndjson"):
        raise UsageError(
            f"{path} is no text by its suffix or content: save it as .txt, a prompt on each line, or as "
            '.jsonl, {"prompt": "…"} on each line'
        )
    read = partial(json.loads, parse_constant=lambda _: None)  # NaN and Infinity, which are no JSON
    with suppress(ValueError, RecursionError):
        whole = read(text)
        return whole if isinstance(whole, list) else [whole]
    rows = []
    for number, line in lines:
        with cli_errors(f"read {path}, line {number}: this is not JSON", "write a list, or an object on each line"):
            rows.append(read(line))
    return rows


def usable(attempts: list, refusal: str) -> tuple:
    """What functions return, (label, function) each, and a notice for each reason why others raise UsageError."""
    values, left_out = [], defaultdict(list)  # the labels, by the reason
    for label, attempt in attempts:
        try:
            values.append(attempt())
        except UsageError as error:
            left_out[str(error)].append(label)
    if not values:
        raise UsageError(f"{refusal}: {next(iter(left_out), 'write one on each line')}")
    return values, [f"{counted(len(of), 'prompt')} left out (first: {of[0]}): {why}." for why, of in left_out.items()]


def read_questions(path: str, limit: int | None) -> tuple:
    """The questions of a file, without ids, the first `limit` of them; and notices of what is not used of the file."""
    attempts = [
        (f"row {number}", partial(parse_question, row, number)) for number, row in enumerate(read_rows(path), 1)
    ]
    questions, notices = usable(attempts, f"{path} has no prompts")
    if unread := Counter(name for question in questions for name in question.unread):
        notices.append(f"Not used of {path}: {', '.join(f'{name} ({count})' for name, count in unread.items())}.")
    return questions[:limit], notices


def parse_question(row: Any, number: int) -> Question:
    """The question in a row: at the first of KEYS that it has, a text, turns or messages. Raises UsageError."""
    row = row if isinstance(row, dict) else {}
    key = next((key for key in KEYS if row.get(key)), "prompt")
    said = row.get(key)
    said = said if isinstance(said, list) else [said]
    first = said[: 1 if key == "turns" else None]  # of several turns, the first is run
    system = [{"role": "system", "content": row[name]} for name in ("system_prompt", "system") if row.get(name)]
    messages = list(map(parse_message, [*system, *first]))
    while messages and messages[-1]["role"] != "user":  # answers to the last question
        messages.pop()
    if not all(message["content"].strip() for message in messages if message["role"] == "user") or not messages:
        raise UsageError(f'no text at {key}, or not text alone; write {{"prompt": "…"}}')
    *earlier, last = [message for message in messages if message["content"].strip()]  # an answer may only call a tool
    about = ("input", "context") if key in ("instruction", "question") else ()  # of Alpaca, Dolly and SQuAD
    about = [name for name in about if row.get(name) and isinstance(row[name], str)]
    labels = {name: str(row[name]) for name in ("category", "question_id") if row.get(name) is not None}
    used = {key, "system_prompt", "system", *about, *labels}
    unread = [name for name, value in row.items() if name not in used and value and isinstance(value, str | list)]
    return Question(
        "\n\n".join([last["content"], *(row[name] for name in about)]),
        number,
        earlier=tuple(earlier),
        unread=(*unread, *["further turns"] * (len(said) - len(first))),
        **labels,
    )


def parse_message(message: Any) -> dict:
    """{"role": …, "content": …} of a message, or of a text of the user's; "" where it has no text. Joins parts."""
    message = message if isinstance(message, dict) else {"content": message}
    role = ROLES.get(str(message.get("role", message.get("from", "user"))))
    if role is None:
        raise UsageError("a role is not user, assistant or system")
    content = message.get("content", message.get("value", message.get("text")))
    with suppress(KeyError, TypeError):  # it has no parts {"type": "text", "text": …}
        content = "\n".join([part["text"] for part in content])
    return {"role": role, "content": content if isinstance(content, str) else ""}


@dataclass(frozen=True)
class Chat:
    """How questions become prompts of token ids."""

    tokenizer: Any
    template_args: dict | None  # of the chat template; None: prompts are fed as they are
    max_new_tokens: int
    end_ids: frozenset
    room: int  # tokens that the last round may draft beyond the last new token
    context: float  # the most tokens that the main model can read
    vocabulary: int  # the main model's: all ids are below it

    def encode(self, question: Question) -> Question:
        """The question with its ids, and where its output ends. Raises UsageError if it does not fit."""
        with cli_errors(
            "put it into the chat template", "check --chat-template-args; --no-chat-template feeds it as it is"
        ):
            ids = self.ids_of(question)
        if not ids or max(ids) >= self.vocabulary:
            raise UsageError("it has no tokens, or some that the main model lacks")
        if len(ids) + self.behind > self.context:
            raise UsageError(
                f"with {self.behind} tokens for output and draft, it exceeds the main model's context of "
                f"{self.context}; shorten it, or lower --max-new-tokens or --draft-tokens"
            )
        return replace(question, ids=tuple(ids), max_new_tokens=self.max_new_tokens, end_ids=self.end_ids)

    @property
    def behind(self) -> int:
        """Tokens of output and of the last round's draft; costs are measured with a round behind a prompt."""
        return max(self.max_new_tokens, 2) + self.room

    def ids_of(self, question: Question) -> list:
        """The ids of a question's messages, in the chat template if there is one. Raises any error.

        Without, they follow each other after blank lines. What the tokenizer adds before them stays, unless it is
        written there; what it adds behind them, an end of text, does not.
        """
        if self.template_args is not None:
            texts = question.text, 2 * question.text  # the same prompt of both: the text is not in it
            talks = [[*question.earlier, {"role": "user", "content": text}] for text in texts]
            prompt, other = self.tokenizer.apply_chat_template(
                talks, add_generation_prompt=True, tokenize=False, **self.template_args
            )
            if prompt == other:
                raise ValueError("it drops what the user says")
            return self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        text = "\n\n".join([*(message["content"] for message in question.earlier), question.text])
        written = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        marked = self.tokenizer(text)["input_ids"]
        return marked[: marked.index(written[0])] + written


def fitting(chat: Chat, questions: list) -> tuple:
    """The questions that fit, with ids, and a notice for each reason why others do not."""
    attempts = [(question.label, partial(chat.encode, question)) for question in questions]
    return usable(attempts, "no prompt can be read")


NEEDS = (
    "a model is a folder or a hub id with config.json, tokenizer.json and safetensors weights of a whole causal "
    "language model"
)
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


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
    with suppress(OSError, TypeError):  # there is no such file, or no such line in it
        return re.search(r"model name\s*: (.+)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()


def model_name(name: str) -> str:
    """A local folder, or the hub's id in what names a model: its page's address, or its folder in the hub's cache."""
    name = os.path.expanduser(name)
    if os.path.exists(f"{name}/config.json"):
        return name
    return re.sub(r"^(?:https?://[^/]+/|.*?models--)([\w.-]+?)(?:/|--)([\w.-]+).*", r"\1/\2", name)


def fetch(name: str, files: tuple = SMALL_FILES) -> str:
    """A model's folder: the name itself, or what the hub, or its cache, has of these files by that name."""
    if os.path.exists(name):
        if not os.path.exists(f"{name}/config.json"):
            raise UsageError(f"{name} has no config.json: {NEEDS}")
        return name
    with cli_errors(
        f"get {name} from the hub",
        "check the connection, the token (`hf auth login`) and the disk (HF_HOME), name local folders, or try --demo",
    ):
        try:
            other_forms = ("*/*", "consolidated*")  # of the same weights
            return huggingface_hub.snapshot_download(name, allow_patterns=files, ignore_patterns=other_forms)
        except hub_errors.IncompleteSnapshotError as error:  # not to be reached; what the cache has may be enough
            return error.snapshot_path
        except hub_errors.GatedRepoError as error:
            raise UsageError(
                f"{name} is a gated model, and you have no access: accept its licence at "
                f"https://huggingface.co/{name}, then `hf auth login`; or take a pair that needs none, as --main "
                "Qwen/Qwen2.5-7B-Instruct --draft Qwen/Qwen2.5-0.5B-Instruct (16 GB in bfloat16)"
            ) from error
        except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
            raise UsageError(
                f"there is no folder {name}, and the hub shows no model of that name: check the spelling, or "
                "`hf auth login` if it is private"
            ) from error


class ModelFiles(NamedTuple):
    """A model before its weights are loaded."""

    name: str
    config: transformers.PreTrainedConfig
    generation: GenerationConfig  # what generate() would do by itself
    auto: Any  # the library's class that loads it
    dtype: torch.dtype
    parameters: int
    vocabulary: int  # all ids are below it; of a draft: those that it may propose
    keeps_state: bool  # see RecurrentModel
    quantization: str  # its method; "" if there is none


def read_model(name: str, dtype: torch.dtype) -> ModelFiles:
    """A model's configuration, if it can run here."""
    folder = fetch(name)
    with cli_errors(f"load {name}", NEEDS):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config._attn_implementation not in ("eager", "sdpa", "flex_attention"):  # others fetch code from the hub
            config._attn_implementation = None  # the library chooses
        text = config.get_text_config()
        if getattr(text, "sliding_window", None) == 0 and not getattr(text, "layer_types", None):
            text.sliding_window = None  # it is switched off
        kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)  # text alone will do
        auto = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
        if config.is_encoder_decoder or auto is None:
            raise UsageError(f"{name} ({config.model_type}) is not a decoder that generates text: {NEEDS}")
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype)
        generation = model.generation_config  # of old models, in config.json
        if os.path.exists(f"{folder}/generation_config.json"):
            generation = GenerationConfig.from_pretrained(folder)
        stated = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
        return ModelFiles(
            name,
            config,
            generation,
            auto,
            dtype,
            model.num_parameters(),
            text.vocab_size,
            model._is_stateful,
            str(stated.get("quant_method", "bitsandbytes")) if stated else "",
        )


def context_of(config: transformers.PreTrainedConfig) -> float:
    """The most tokens of a text that a model can read: for rotary positions that are scaled, the scaled number.

    Longrope reads by other factors beyond a length: a text that grows past it was read by both, so that is the limit.
    """
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None) or math.inf
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or stated
    if rope.get("rope_type") in ("yarn", "linear"):
        return max(stated, int((rope.get("factor") or 1) * original))
    return original if rope.get("rope_type") == "longrope" else stated


def free_memory(device: torch.device) -> int:
    """The bytes that are free on a device. MPS shares the CPU's memory."""
    if device.type in ("cuda", "xpu"):
        return torch.accelerator.get_memory_info(device)[0]
    return psutil.virtual_memory().available


def check_memory(files: ModelFiles, device: torch.device) -> None:
    """Raise UsageError if a model's weights, a tenth more and 1 GB, take more than the device has free."""
    weights = files.parameters * files.dtype.itemsize
    if files.quantization:  # what is not downloaded yet is not counted
        paths = pathlib.Path(fetch(files.name)).glob("model*.safetensors")
        weights = sum(path.stat().st_size for path in paths if path.exists())
    needed, free = 1.1 * weights / 1e9 + 1, free_memory(device) / 1e9
    if needed > free:
        raise UsageError(
            f"too little memory for {files.name}: {device} has {free:.1f} GB free, and about {needed:.1f} are needed: "
            "try --dtype bfloat16, --device-map auto, or a smaller pair, as --main HuggingFaceTB/SmolLM2-1.7B-Instruct "
            "--draft HuggingFaceTB/SmolLM2-135M-Instruct (4 GB)"
        )


def usable_cores() -> int:
    """The cores that this process may use: by its affinity and, in a container, by its quota of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # there is no cgroup, or no quota ("max")
        quota, period = map(int, pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return cores


def choose_threads(main: CachedModel) -> int:
    """How many threads to compute with on a CPU: the fewest that take a step at most 5 % longer than the fastest.

    Threads wait for each other at every product, and so for whatever else runs on the machine: more are not always
    faster. All usable cores, half of them, … take turns, twice; all of their time counts. OMP_NUM_THREADS is kept.
    """
    if main.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    cores = usable_cores()
    token = torch.zeros(1, 1, dtype=torch.long)
    took_s = dict.fromkeys((cores >> halved for halved in range(cores.bit_length())), 0.0)

    def step():
        main.forward(token)
        main.roll_back(1)

    main.prefill(token.repeat(1, 8))
    for count in [*took_s] * 2:
        torch.set_num_threads(count)
        step()  # begins new threads
        took_s[count] += timeit.timeit(step, timer=time.perf_counter, number=2)
    fewest = min(count for count in took_s if took_s[count] <= 1.05 * min(took_s.values()))
    torch.set_num_threads(fewest)
    return fewest


def load_model(files: ModelFiles, device: torch.device, placement: dict | None = None) -> PreTrainedModel:
    """Load a model's weights, onto the device, or as `placement` says: arguments of from_pretrained()."""
    if not placement:
        check_memory(files, device)
    folder = fetch(files.name, (*SMALL_FILES, "*.safetensors"))
    with cli_errors(f"load {files.name}", NEEDS):
        model, loading = files.auto.from_pretrained(
            folder,
            config=files.config,
            dtype=files.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **(placement or {"device_map": device}),
        )
    if absent := loading["missing_keys"]:
        raise UsageError(f"{files.name} lacks some weights, as {min(absent)}: {NEEDS}")
    return model


@torch.inference_mode()
def check_reading(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Raise UsageError unless a model that reads on from its cache gives what it gives for the whole text.

    By its own logits: of a text that is read in passes of three and one tokens, each behind a pass that was rolled
    back, and of the whole text, without a cache. Many a model that reads both ways (BERT, XLNet) is among the library's
    causal ones, and Mamba 1 begins each pass of several tokens with an empty state. What is right differs by rounding
    alone: on 37 random models of 2 to 16 layers, in three types, by at most 1.2 times what `rounding_again` changes;
    what is wrong by at least 9 times. The median over positions, as a mixture's choice of experts can change at some.
    """
    text = (torch.arange(25, device=device) * 7 % model.config.get_text_config().vocab_size)[None]
    with cli_errors(f"run {name} on token ids alone, with a cache", NEEDS):
        reader = cached_model(model, device)
        whole = next(logits_along(reader, text, 1))  # of 24 tokens: the last one is not read
        pieces = []
        prompt, *rest = text[:, :24].split([8, *(3, 1) * 4], dim=1)
        reader.prefill(prompt)
        for piece in rest:
            reader.forward(text[:, :2])
            reader.roll_back(2)
            pieces.append(reader.forward(piece))
            reader.roll_back(0)
        with rounding_again(model):
            rounded = difference(whole, next(logits_along(reader, text, 1)))
    noise = max(rounded.median().item(), torch.finfo(model.dtype).eps)
    if difference(whole[8:], torch.cat(pieces)).median().item() > 4 * noise:
        raise UsageError(
            f"{name} does not go on from a cache as from the text itself: it reads both ways (BERT), uses no cache, or "
            "keeps a state that the library reads one token a time (Mamba 1); take a decoder (Llama, Gemma, Qwen, …)"
        )


def difference(logits: Tensor, others: Tensor) -> Tensor:
    """How far the logits of n positions differ, [n, vocabulary] both, in standard deviations, [n]."""
    return (logits.float() - others.float()).std(-1) / logits.float().std(-1)


def load_tokenizer(files: ModelFiles) -> Any:
    """A model's tokenizer. Without its files, the library would make one of 5 tokens."""
    with cli_errors(f"load the tokenizer of {files.name}", NEEDS):
        tokenizer = AutoTokenizer.from_pretrained(fetch(files.name), trust_remote_code=False)
    if len(tokenizer) < files.vocabulary / 2:
        raise UsageError(f"the tokenizer of {files.name} knows {len(tokenizer)} of {files.vocabulary} ids: {NEEDS}")
    return tokenizer


def check_tokenizers(main: Any, draft: Any, names: str) -> None:
    """Raise UsageError if an ordinary token of two tokenizers differs.

    Added tokens, such as <|im_end|>, may differ: a draft that proposes one of these is merely rejected.
    """
    differing = main.get_vocab().items() ^ draft.get_vocab().items()
    added = main.get_added_vocab() | draft.get_added_vocab()
    if ordinary := {token for token, _ in differing} - added.keys():
        raise UsageError(
            f"{names} have different tokenizers ({min(ordinary)!r} is not the same in both): take a draft of the main "
            "model's family, or --draft ngram"
        )


def end_tokens(files: ModelFiles, tokenizer: Any) -> frozenset:
    """The tokens that end a text: those of the generation config, and the tokenizer's own."""
    stated = files.generation.eos_token_id
    return frozenset({*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id} - {None})


def unapplied_settings(files: ModelFiles, temperature: float) -> str:
    """What generate() would do to the text by itself and this program does not, in one line; or ""."""
    neutral = GenerationConfig._get_default_generation_params()
    ignored = (  # what changes no text, or is applied; how to sample is a matter of the options
        r"_.*|transformers_version|(bos|eos|pad|decoder_start)_token_id|use_cache|max_.*|cache_.*|output_.*|return_.*"
        + ("|do_sample|temperature|top_k|top_p" if temperature else "")
    )
    stated = [
        f"{name} {value}"
        for name, value in files.generation.to_diff_dict().items()
        if not re.fullmatch(ignored, name) and value != neutral.get(name)
    ]
    return f"Not applied of the generation settings of {files.name}: {', '.join(stated)}." if stated else ""


# 13  The run ----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is to be loaded, and decoded."""

    settings: Settings
    files: ModelFiles  # the main model's
    chat: Chat
    questions: list
    sampler: Sampler
    drafts: "Drafts"

    @property
    def widths(self) -> tuple:
        """The tokens that verify passes may have if steps are compiled, rising."""
        device = torch.device(self.settings.device)
        return tuple(sorted({width for k in self.settings.draft_tokens for width in verify_widths(k, device)}))

    @property
    def longest(self) -> int:
        """The most tokens that a text can have, with the last round's draft."""
        return max(len(question.ids) for question in self.questions) + self.chat.behind


class Ready(NamedTuple):
    """All that the measuring needs."""

    results: Results  # without any prompt yet
    questions: list  # of all processes
    models: Models
    console: Console
    stderr: Console


class Drafts(dict):
    """The drafts of a run by what --draft calls them, each as far as it is prepared, or a Failure.

    Whatever goes wrong with a draft before it decodes is decided here: it becomes a row that says why, its memory is
    given back, and the others go on.
    """

    def advance(self, step: Callable, device: torch.device) -> None:
        """Make of each draft what `step` makes of it: of its name first, then of what the last step made."""
        for name in self:
            try:
                if not isinstance(self[name], Failure):
                    self[name] = step(self[name])
            except Exception as error:
                self[name] = Failure(name, error=one_line(error))
            give_back_memory(device)

    def agree(self, peers: "Peers") -> None:
        """A draft that fails in one process fails in all."""
        for others in peers.gather({name: draft for name, draft in self.items() if isinstance(draft, Failure)}):
            self.update(others)


class LibraryWarnings(logging.Handler):
    """Shows what the libraries log and warn of while models are read: each once, in one dim line."""

    def __init__(self, announce: Callable):
        super().__init__(logging.WARNING)
        self.announce, self.shown = announce, set()
        logging.disable(logging.NOTSET)
        transformers.logging.disable_progress_bar()
        warnings.formatwarning = lambda message, *_: str(message)
        logging.captureWarnings(True)
        for name in ("transformers", "huggingface_hub", "accelerate", "py.warnings"):
            logging.getLogger(name).handlers = [self]

    def emit(self, record: logging.LogRecord) -> None:
        if (line := plain(record.getMessage())) not in self.shown:
            self.shown.add(line)
            self.announce(line)


class Peers:
    """The processes that a launcher started, which share out the prompts: they exchange values through its store."""

    PATIENCE_S = 60  # to meet, and with one that gives no sign of life

    def __init__(self):
        """Meet the others. Raises UsageError."""
        self.met, self.store = 0, None
        if PROCESSES > 1:
            what = f"meet the other processes (RANK={RANK} and WORLD_SIZE={PROCESSES} are set)"
            with cli_errors(what, "start all by torchrun, or unset these for one"):
                self.store, *_ = next(
                    torch.distributed.rendezvous("env://", timeout=datetime.timedelta(seconds=self.PATIENCE_S))
                )
            threading.Thread(target=self.beat, daemon=True).start()

    def beat(self) -> None:
        """Give signs of life: a process may decode for long before it has anything to tell."""
        with suppress(Exception):  # the store may be gone
            while True:
                self.store.add(f"beats/{RANK}", 1)
                time.sleep(self.PATIENCE_S / 10)

    def gather(self, value: Any) -> list:
        """What each process brings here, in the order of their ranks. Waits for the slowest. Raises UsageError."""
        if not self.store:
            return [value]
        with cli_errors("hear from the other processes", "see what they say, and start again"):
            self.met += 1
            self.store.set(f"{self.met}/{RANK}", pickle.dumps(value))
            keys, heard = [f"{self.met}/{rank}" for rank in range(PROCESSES)], {}
            for rank, key in enumerate(keys):
                while not self.store.check([key]):
                    if self.store.check(["failed"]):
                        raise UsageError("another process failed: see what it says, and start again")
                    first_heard = heard.setdefault((rank, self.store.add(f"beats/{rank}", 0)), time.monotonic())
                    if time.monotonic() - first_heard > self.PATIENCE_S:
                        raise UsageError(f"process {rank} is gone: see why, and start again")
                    time.sleep(0.05)
            return [pickle.loads(self.store.get(key)) for key in keys]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Tell the others if this one fails. The first one, whose store it is, goes last."""
        with suppress(Exception):  # there may be no store, or no more
            if kind:
                self.store.set("failed", "")
            self.store.set(f"left/{RANK}", "")
            signs, end = [f"left/{rank}" for rank in range(PROCESSES)], time.monotonic() + self.PATIENCE_S / 10
            while RANK == 0 and time.monotonic() < end and not self.store.check(signs):
                time.sleep(0.05)


def shortest_path(path: pathlib.Path) -> str:
    """A path from here, which is shorter to read; as it is where there is none, as to another drive."""
    with suppress(ValueError, OSError):
        return os.path.relpath(path)
    return str(path)


def resolve_settings(given: Settings, device: torch.device) -> tuple:
    """The settings in force on this machine, and what the user must be told of them. Raises UsageError."""
    notices, on_cpu = [], device.type == "cpu"
    is_demo = given.demo or (on_cpu and not given.main and given.draft in (None, (NGRAM,)))
    main, draft, folder = given.main or DEFAULT_MAIN, DEFAULT_DRAFT, HERE
    if is_demo:
        why = "This" if given.demo else "No GPU in use: this"
        notices.append(f"{why} runs the bundled models, which are tiny. Their speed says nothing about Gemma's.")
        if not (BUNDLED / "main").is_dir():
            raise UsageError(f"no bundled pair in {BUNDLED}: clone the whole project, or name --main and --draft")
        main, draft, folder = shortest_path(BUNDLED / "main"), shortest_path(BUNDLED / "draft"), BUNDLED
    dtype, compile = given.dtype, given.compile
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    if device.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        notices.append("This GPU emulates bfloat16, which is slow: try --dtype float32 (Gemma 2 overflows in float16).")
    if compile == "auto":
        compile = "on" if device.type == "cuda" and not given.device_map else "off"
    settings = replace(
        given,
        main=model_name(main),
        draft=tuple(map(model_name, given.draft or (draft,))),
        demo=is_demo,
        prompts=given.prompts or shortest_path(folder / "prompts.txt"),
        device=str(device),
        dtype=dtype,
        compile=compile,
    )
    return settings, notices


def make_chat(settings: Settings, files: ModelFiles, tokenizer: Any) -> Chat:
    """How prompts are put to the main model."""
    template_args = settings.chat_template_args
    if template_args is None and tokenizer.chat_template and not settings.no_chat_template:
        template_args = {}
    return Chat(
        tokenizer,
        template_args,
        settings.max_new_tokens,
        end_ids=frozenset() if settings.ignore_eos else end_tokens(files, tokenizer),
        room=max(LONGEST if k == "auto" else k for k in settings.draft_tokens) - 1,
        context=context_of(files.config),
        vocabulary=files.vocabulary,
    )


def make_sampler(settings: Settings) -> Sampler:
    """The rule that the options ask for."""
    if not settings.temperature:
        return Greedy()
    return Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed, settings.device)


def read(given: Settings, device: torch.device, console: Console) -> Plan:
    """Read, check and print all that the options name, but for weights. Raises UsageError."""
    settings, notices = resolve_settings(given, device)
    save(settings.json, "--json", None)  # better to fail now than when all is measured
    save(settings.svg, "--svg", None)
    files = read_model(settings.main, getattr(torch, settings.dtype))
    with cli_errors(f"put prompts to {settings.main}", NEEDS):
        chat = make_chat(settings, files, load_tokenizer(files))
    questions, of_file = read_questions(settings.prompts, settings.limit)
    questions, left_out = fitting(chat, questions)
    for notice in (*notices, *of_file, *left_out, unapplied_settings(files, settings.temperature)):
        if notice:
            console.print(plain(notice))
    drafts = Drafts((name, name) for name in settings.draft)
    plan = Plan(settings, files, chat, questions, sampler=make_sampler(settings), drafts=drafts)
    drafts.advance(partial(read_draft, plan), device)
    describe(console, plan)
    return plan


def read_draft(plan: Plan, name: str) -> ModelFiles | None:
    """A draft's model before its weights are loaded; of n-grams none."""
    if name == NGRAM:
        return None
    files, main = read_model(name, plan.files.dtype), plan.files
    if plan.longest > (context := context_of(files.config)):
        raise UsageError(f"its context of {context} tokens is less than a text's {plan.longest}: shorten the prompts")
    check_tokenizers(plan.chat.tokenizer, load_tokenizer(files), f"{main.name} and {name}")
    return files._replace(vocabulary=min(files.vocabulary, main.vocabulary))


def describe(console: Console, plan: Plan) -> None:
    """Print what is about to be loaded."""
    settings = plan.settings
    console.print("Speculative decoding: which draft pays?", style="bold")
    console.print(f"  main   {plain(settings.main)}: {about(plan.files)}")
    for name, files in plan.drafts.items():
        console.print(f"  draft  {plain(name)}: {about(files)}")
    lengths, count = " / ".join(map(str, settings.draft_tokens)), counted(len(plan.questions), "prompt")
    console.print(f"  K = {lengths}, up to {settings.max_new_tokens} new tokens, {count}")
    if settings.temperature:
        cuts = f"top-k {settings.top_k}, top-p {settings.top_p:g}, seed {settings.seed}"
        console.print(f"  temperature {settings.temperature:g}, {cuts}; log-likelihoods are at temperature 1, uncut")


def about(files: ModelFiles | Failure | None) -> str:
    """What is known of a model before it is loaded."""
    if files is None:
        return "no model, but what followed the same tokens before"
    if isinstance(files, Failure):
        return f"cannot run: {files.error}"
    layers = counted(files.config.get_text_config().num_hidden_layers, "layer")
    return f"{files.parameters / 1e6:,.1f} M parameters, {layers}" + (files.quantization and f", {files.quantization}")


def load(plan: Plan, device: torch.device, scratch: str) -> PreTrainedModel:
    """Load the main model, and the drafts' models, each beside its files. Raises UsageError."""
    is_spread = plan.settings.device_map is not None
    main = None if is_spread else load_main(plan.files, device)
    plan.drafts.advance(lambda files: (files, files and load_draft(files, device)), device)
    if is_spread:  # over what the drafts leave
        main = load_main(plan.files, device, {"device_map": "auto", "offload_folder": scratch})
    return main


def load_main(files: ModelFiles, device: torch.device, placement: dict | None = None) -> PreTrainedModel:
    """Load the main model, as `load_model` does; choose threads by it, and check how it reads. Raises UsageError."""
    model = load_model(files, device, placement)
    with suppress(Exception):  # if it cannot run, `check_reading` says why
        choose_threads(cached_model(model, device))
    check_reading(model, files.name, device)
    return model


def load_draft(files: ModelFiles, device: torch.device) -> PreTrainedModel:
    """Load a draft's model, and check how it reads. Raises UsageError."""
    model = load_model(files, device)
    check_reading(model, files.name, device)
    return model


def compile_main(plan: Plan, main: CachedModel, console: Console, announce: Callable) -> CachedModel:
    """The main model with compiled steps; as it is if the compiler fails, which it can in any way, and that is said."""
    try:
        compiled = CompiledModel(main, plan.longest + 2)
        steps = [(plan.sampler.sample, 1), *((plan.sampler.score, width) for width in plan.widths)]
        compile_steps(compiled, plan.sampler, steps, announce)
        return compiled
    except Exception as error:
        console.print(f"warning: compiling failed, so this runs eagerly: {one_line(error)}")
        return main


def build_draft(plan: Plan, main: CachedModel, widths: tuple, announce: Callable, loaded: tuple) -> Contender:
    """A loaded draft, compiled if the main model is, and what its rounds cost in the middle of a usual text."""
    files, model = loaded
    name, draft = files.name if files else NGRAM, NgramDraft(main.device)
    if files:
        cached = cached_model(model, main.device, files.vocabulary)
        if widths and not files.keeps_state:
            cached = CompiledModel(cached, plan.longest + 2)
            lengths = (2,) if widths == (2,) else (1, 2)  # with K = 1 a draft never reads a token of its own
            steps = [(plan.sampler.sample_draft, tokens) for tokens in lengths]
            compile_steps(cached, plan.sampler, steps, announce)
        draft = ModelDraft(cached, plan.sampler)
    ids = sorted((question.ids for question in plan.questions), key=len)[len(plan.questions) // 2]
    ids += ids[-1:] * (plan.settings.max_new_tokens // 2)  # any will do
    costs = measure_costs(main, draft, plan.sampler, torch.tensor([ids], device=main.device), widths)
    return Contender(name, draft, costs)


def environment_of(plan: Plan, is_compiled: bool) -> dict:
    """What it runs on, as the JSON has it."""
    device, bandwidth = torch.device(plan.settings.device), None
    with suppress(Exception):  # if there is no memory left for it, nothing is said of it
        bandwidth = memory_bandwidth_gb_s(device)
    return {
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": usable_cores(),
        "processes": PROCESSES,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compiled": is_compiled,
        "can_compile": not plan.settings.device_map and not plan.files.keeps_state,
        "memory_bandwidth_gb_s": bandwidth,
    }


def describe_machine(console: Console, settings: Settings, facts: dict) -> None:
    """Print what it runs on."""
    where = f"{settings.device} ({plain(facts['device_name'])}), {facts['threads']} of {facts['cores']} CPU threads"
    console.print(f"  {where}, {settings.dtype}, {'compiled' if facts['compiled'] else 'eager'}")


def prepare(given: Settings, peers: Peers, scratch: str) -> Ready:
    """Read, check, load, compile and price all that the options name. Raises UsageError."""
    how = {"markup": False, "emoji": False, "highlight": False, "quiet": RANK > 0}
    console = Console(width=None if sys.stdout and sys.stdout.isatty() else 120, record=bool(given.svg), **how)
    stderr = Console(stderr=True, soft_wrap=True, **how)
    announce = partial(stderr.print, style="dim")
    LibraryWarnings(announce)
    device = choose_device(given.device)
    plan = read(given, device, console)
    announce("Loading …")
    main, widths = cached_model(load(plan, device, scratch), device), ()
    if "TORCH_LOGS" not in os.environ:  # what libraries would say of the runs is said in one line, or in the table
        logging.disable()
    if plan.settings.compile == "on":
        main = compile_main(plan, main, console, announce)
        widths = plan.widths if isinstance(main, CompiledModel) else ()
        give_back_memory(device)
    plan.drafts.advance(partial(build_draft, plan, main, widths, announce), device)
    plan.drafts.agree(peers)
    if len(set(peers.gather(tuple(question.ids for question in plan.questions)))) > 1:
        raise UsageError("the processes read different prompts: give all of them the same file and options")
    models = Models(main, tuple(plan.drafts.values()), plan.sampler, plan.chat.tokenizer)
    methods = our_methods(models, plan.settings, widths)
    if plan.settings.compare:
        methods += library_methods(models, plan.settings, bool(widths))
    results = Results(environment_of(plan, bool(widths)), plan.settings, tuple(methods), models.contenders)
    describe_machine(console, plan.settings, results.environment)
    return Ready(results, plan.questions, models, console, stderr)


def measure(ready: Ready, peers: Peers) -> tuple:
    """Decode this process's share of the questions; print and write what all processes have, prompt by prompt.

    Returns what was measured, and what ended it early: an interrupt, or a UsageError.
    """
    results, console, stderr = ready.results, ready.console, ready.stderr
    total, due = len(ready.questions), 0.0

    def announce(question, what):
        """Between the runs only: what redraws itself would take time from what is timed."""
        if stderr.is_interactive:
            line = f"{len(results.prompts)} of {total} prompts done, now {question.label}: {what}"
            stderr.print(line, end="\r", no_wrap=True, soft_wrap=False, overflow="ellipsis")

    records = benchmark(ready.questions[RANK::PROCESSES], results.methods, ready.models, results.settings, announce)
    console.print()
    print_figures(console, PROMPT_COLUMNS, "  # prompt", {}, results.methods)
    try:
        try:
            while not results.complete:
                result = next(records, None)
                stderr.control(Control((ControlType.ERASE_IN_LINE, 2)))
                new = tuple(filter(None, peers.gather(result)))
                results = replace(results, prompts=results.prompts + new, complete=not new)
                for each in new:
                    print_prompt(console, results, each, ready.models.tokenizer)
                if (started := time.monotonic()) >= due:
                    save_json(results)
                    due = time.monotonic() + max(5, 9 * (time.monotonic() - started))  # a tenth of the time at most
        finally:
            # A second Ctrl-C ends the program at once; to several processes a launcher passes the first one twice.
            on_interrupt(signal.SIG_DFL if PROCESSES == 1 else signal.SIG_IGN)
            save_json(results)  # also if nobody reads the output any more, or the disk is full
    except (KeyboardInterrupt, UsageError) as problem:
        return results, problem
    return results, None


def save_json(results: Results) -> None:
    """Write all that is measured so far. Raises UsageError."""
    if results.settings.json and RANK == 0 and results.prompts:
        save(results.settings.json, "--json", to_json(results))


def report(ready: Ready, results: Results) -> None:
    """Print what was measured, also if it is a part."""
    console, svg, done = ready.console, results.settings.svg, len(results.prompts)
    if done and RANK == 0:
        if not results.complete:
            console.print(f"Only {done} of {len(ready.questions)} prompts: a part of the result.", style="bold")
        print_report(console, results)
        if svg:
            save(svg, "--svg", console.export_svg(title="speculative_decoding.py"))


def on_interrupt(handler: Any) -> None:
    """What Ctrl-C, and being asked to end, does from now on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def main(arguments: list | None = None) -> int:
    """The program; returns its exit status: 0 well, 1 not all is well with some prompt, 2 it could not, 130 Ctrl-C."""
    given = parse(arguments)
    try:
        with Peers() as peers, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            on_interrupt(signal.default_int_handler)  # the first Ctrl-C; before, the processes meet without Python
            ready = prepare(given, peers, scratch)
            results, problem = measure(ready, peers)
            report(ready, results)
            if problem:
                raise problem
            return exit_status(results) if RANK == 0 else 0
    except (UsageError, KeyboardInterrupt) as error:
        is_interrupt = isinstance(error, KeyboardInterrupt)
        print("Interrupted." if is_interrupt else f"error: {one_line(error)}", file=sys.stderr)
        return 130 if is_interrupt else 2
    except SystemExit:  # nobody reads the output any more
        return 2
    except OSError as error:
        print(f"error: {one_line(error)}; make room where report and temporary files go", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again
        return 2


if __name__ == "__main__":
    sys.exit(main())

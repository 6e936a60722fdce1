#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch~=2.13.0", "transformers~=5.23.0", "accelerate~=1.15.0", "huggingface_hub~=2.4", "numpy~=2.0",
#   "psutil~=7.0", "rich~=15.0"]
# ///
"""How much faster is speculative decoding with this pair of models on this machine, and is the output unchanged?

    python speculative_decoding.py                       gemma-2-9b-it and gemma-2-2b-it on the GPU, prompts.txt
    python speculative_decoding.py --demo                a bundled pair of tiny models: anywhere, offline, in seconds
    python speculative_decoding.py --main A --draft B --prompts my.txt

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

     1  a model with a KV cache that can be rolled back      7  compiled steps
     2  tokens from logits: greedy, or sampled               8  the benchmark: methods, results, every figure
     3  autoregressive decoding, the baseline                9  the report: tables, conclusions, texts, JSON
     4  speculative decoding                                10  loading: prompts, devices, models
     5  is it lossless?                                     11  the command line (its options are part 0, before the
     6  how many tokens to draft                                imports, so that --help need not wait for them)

What is deliberately not here: batches of more than one text, and trees of draft tokens.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import errno
import functools
import itertools
import json
import logging
import math
import os
import pathlib
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
import unicodedata
import weakref
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# ruff: noqa: E402

# 0  The options of the command line -----------------------------------------------------------------------------------

DEFAULT_MAIN, DEFAULT_DRAFT = "google/gemma-2-9b-it", "google/gemma-2-2b-it"


class UsageError(Exception):
    """The program cannot do what was asked; the message is one line that says what is wrong and how to mend it."""


def safe(text: str) -> str:
    """Text from outside that is safe to print: � instead of escapes, bidirectional overrides, zero-width marks, …"""
    unsafe = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, format, surrogate, private, unassigned, separators
    return "".join("�" if unicodedata.category(char) in unsafe and char != "\n" else char for char in text)


def plain(text: str) -> str:
    """The same as one line."""
    return safe(" ".join(text.split()))


def between(kind: type, least: float, most: float, what: str) -> Callable[[str], float]:
    """An argparse type: a number from `least` to `most`."""

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return number


def template_args(text: str) -> dict:
    """An argparse type: a JSON object, arguments of the chat template; without NaN, as it is written as JSON again."""
    ours = {"self", "conversation", "messages", "chat_template", "add_generation_prompt", "tokenize"}
    with contextlib.suppress(ValueError, RecursionError):
        json.dumps(given := json.loads(text), allow_nan=False)
        if isinstance(given, dict) and not ours & given.keys():
            return given
    raise argparse.ArgumentTypeError(f'{text!r} is no JSON object for the template, as {{"enable_thinking": false}}')


def draft_lengths(text: str) -> tuple[int | str, ...]:
    """An argparse type: auto, a number, or several of these with commas between them."""
    number = between(int, 1, 1000, "auto, or a number from 1 to 1000, or several with commas between them")
    return tuple(dict.fromkeys("auto" if part == "auto" else number(part) for part in text.split(",")))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, as given. A bad one ends the program with one line and status 2."""
    epilog = "With no accelerator and no model named, the bundled pair of tiny models runs, as with --demo. Exit status"
    epilog += ": 0 all well; 1 some prompt failed, or some output is not the main model's own; 2 it could not run; "
    texts = {"description": (__doc__ or "").partition("\n")[0], "epilog": epilog + "130 interrupted."}
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", allow_abbrev=False, **texts)
    natural, positive = (between(int, n, 2**40, f"a whole number of at least {n}") for n in (0, 1))
    heat, share = between(float, 0, 100, "a number from 0 to 100"), between(float, 1e-6, 1, "a number above 0, up to 1")
    add_argument = parser.add_argument_group("the pair and the prompts").add_argument
    add_argument("--main", metavar="MODEL", help=f"Hugging Face id or local folder (default: {DEFAULT_MAIN})")
    add_argument("--draft", metavar="MODEL", help=f"a smaller model, or ngram: no model (default: {DEFAULT_DRAFT})")
    add_argument("--demo", action="store_true", help="the bundled pair and its own prompts, offline, in seconds")
    add_argument("--prompts", metavar="FILE", help="one a line, or .jsonl as Spec-Bench has (default: prompts.txt)")
    add_argument("--limit", metavar="N", type=positive, help="take N questions, spread evenly over their categories")
    add_argument("--no-chat-template", action="store_true", help="feed the prompts as they are")
    switches = """of the chat template, e.g. '{"enable_thinking": false}'"""
    add_argument("--chat-template-args", metavar="JSON", type=template_args, help=switches)
    add_argument = parser.add_argument_group("how to decode").add_argument
    add_argument("--max-new-tokens", metavar="N", type=positive, default=128, help="default: 128")
    add_argument("--ignore-eos", action="store_true", help="generate exactly N tokens, past the end of a text")
    lengths = "tokens that a round drafts: auto (the default), a number, or several to compare, as 1,2,4"
    add_argument("--draft-tokens", metavar="K", type=draft_lengths, default=("auto",), help=lengths)
    add_argument("--temperature", metavar="T", type=heat, default=0.0, help="sample (default: 0, greedy)")
    add_argument("--top-k", metavar="N", type=natural, default=0, help="sample from the N likeliest (default: 0, all)")
    add_argument(
        "--top-p", metavar="P", type=share, default=1.0, help="from the likeliest that add up to P (default: 1)"
    )
    add_argument("--seed", metavar="S", type=natural, default=0, help="of the random numbers (default: 0)")
    add_argument = parser.add_argument_group("where to decode").add_argument
    add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="compile the steps (auto: on CUDA)")
    add_argument("--device", metavar="D", default="auto", help="cpu, cuda, cuda:1, mps, … (default: a GPU, else cpu)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add_argument("--dtype", choices=dtypes, default="auto", help="default: bfloat16 on a GPU, float32 on a CPU")
    add_argument("--device-map", choices=["auto"], help="spread the main model over all GPUs, the CPU and the disk")
    add_argument("--max-memory", metavar="SIZE", help="of that, on the first device: at most, e.g. 10GB")
    add_argument = parser.add_argument_group("what to measure and show").add_argument
    add_argument("--compare", choices=["transformers"], help="also measure its own generate(), alone and assisted")
    add_argument("--repeats", metavar="N", type=positive, default=1, help="of each run; the median counts (default: 1)")
    add_argument("--warmup", metavar="N", type=natural, default=1, help="runs of each before any counts (default: 1)")
    add_argument("--show-text", action="store_true", help="print the texts, each token by where it comes from")
    add_argument("--json", metavar="FILE", help="write all that was measured, after each prompt")
    add_argument("--svg", metavar="FILE", help="write the report as a picture")
    parser.error = lambda message: parser.exit(2, f"error: {plain(message)}; see --help\n")
    given = parser.parse_args(arguments)
    if not given.temperature and (given.top_k or given.top_p < 1):
        parser.error("--top-k and --top-p cut what tokens are sampled from: add a --temperature")
    if 0 < given.temperature < 0.001:
        parser.error("--temperature is 0 or at least 0.001: less is rounded away")
    if given.no_chat_template and given.chat_template_args:
        parser.error("--no-chat-template leaves no template for --chat-template-args: leave out one of them")
    if given.device_map and given.compile == "on":
        parser.error("--device-map auto moves weights while it runs, which cannot be compiled: leave out --compile on")
    if given.max_memory and not given.device_map:
        parser.error("--max-memory says how --device-map auto spreads the main model: add that")
    return given


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quietly, also while it imports
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by the shell: nobody reads it
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for terminals and files that lack a character of the report
    parse(None)  # --help and mistakes are answered before the imports, which take seconds

import accelerate
import huggingface_hub
import numpy
import psutil
import torch
import transformers
from huggingface_hub import errors as hub_errors
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, StaticLayer

# 1  A model with a KV cache that can be rolled back -------------------------------------------------------------------


class CachedModel:
    """A causal language model, and its KV cache of one text: the keys and values of all tokens that it has read.

    Every forward pass appends to the cache. `roll_back` removes the latest tokens again: that is how rejected draft
    tokens are undone without reading the text anew.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int | None = None, device: torch.device | None = None):
        """`vocabulary`: logits are cut to so many tokens, a draft's to those that the main model knows alike.

        `device`: where its inputs go, if its weights are on several devices.
        """
        self.model, self.vocabulary = model.eval().requires_grad_(False), vocabulary
        self.device = device or model.device
        # With full and sliding attention (not with chunked), a single token attends to all that the cache returns. Some
        # models (Gemma 2) would build a mask that says so, in every step; this one is broadcast to any length.
        config = model.config.get_text_config()
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
        """Read further tokens, ids [1, n], n ≥ 1, into the cache.

        Returns the logits after each of them, [n, vocabulary], or after the last few, [logits_to_keep, vocabulary].
        """
        mask = self.full_mask if ids.shape[1] == 1 else None
        how = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": logits_to_keep}
        return self.model(ids, attention_mask=mask, **how).logits[0, :, : self.vocabulary]

    @torch.inference_mode()
    def forward_without_cache(self, ids: Tensor, logits_to_keep: int) -> Tensor:
        """The same for a whole text, ids [1, n], in one pass that neither reads nor writes the cache."""
        return self.model(ids, use_cache=False, logits_to_keep=logits_to_keep).logits[0, :, : self.vocabulary]

    def roll_back(self, tokens: int) -> None:
        """Remove the latest tokens from the cache: at most those read since the last roll-back; the others stay."""
        self.cache.crop(-tokens)  # by 0, too: sliding windows then drop what no later roll-back can need

    def step(self, head: Callable, ids: Tensor, uniform: Tensor | None = None, logits_to_keep: int = 1) -> Any:
        """Read tokens, ids [1, n], and return what a head (see part 2) makes of the logits and of random numbers."""
        return head(self.forward(ids, logits_to_keep), ids, uniform)

    def verify(self, score: Callable, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read the text's last token and K draft tokens, ids [1, K+1], in one pass; return what `score` makes of it."""
        return self.step(score, ids, logits_to_keep=0)


# 2  Tokens from logits ------------------------------------------------------------------------------------------------


class Sampler:
    """The rule that chooses tokens, and accepts or rejects draft tokens: Greedy or Sampling.

    Three methods are heads: functions of logits, [n, vocabulary], of the ids that were read, [1, n], and of random
    numbers, [1] or None. They run on the device, and can be compiled together with the forward pass.
      sample        the next token, [1, 1], from the logits before it, [1, vocabulary]
      sample_draft  that token, its probability, [1], and the distribution q it was drawn from, [1, vocabulary], or None
      score         of a verify pass, [K+1, vocabulary]: the target output, [K+1, …], by which `accept` decides; and the
                    log-likelihood of each draft token under the main model at temperature 1, [K], in nats, float32
    `accept` returns what a round emits, from the target output, the draft tokens, [K], and q, [K, vocabulary] or None:
    the accepted draft tokens, and one token of the main model's own. For this the host waits for the device.
    """

    def restart(self, number: int, turn: int | None = None) -> None:
        """Begin the text of this number and turn: its random numbers depend on nothing but these and the seed."""

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
        accepted = next((place for place, token in enumerate(drafted) if token != chosen[place]), len(drafted))
        return chosen[: accepted + 1]  # accepted draft tokens are the main model's choices


class Sampling(Sampler):
    """Draw tokens from the model's distribution, with temperature, top-k and top-p: speculative sampling."""

    def __init__(self, temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0, device="cpu"):
        """`top_k` 0 and `top_p` 1 cut nothing off. One seed and number give the same random numbers on one machine."""
        self.settings = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.warpers = [transformers.TemperatureLogitsWarper(temperature)]
        self.warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
        self.warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
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

    def restart(self, number: int, turn: int | None = None) -> None:
        self.generator.manual_seed(self.seed * 2**20 + number + 2**16 * ((turn or 1) - 1))

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
    p_drafted, q_drafted = (of.gather(1, draft_ids[:, None])[:, 0] for of in (p[:-1], q))
    is_accepted = uniform * q_drafted < p_drafted  # uniform < p / q
    accepted = is_accepted.float().cumprod(dim=0).sum(dim=0, keepdim=True).long()  # float: MPS has no cumprod of int64
    p_next = p.index_select(0, accepted)
    q = pad(q, (0, p.shape[1] - q.shape[1], 0, 1))  # 0 also for tokens that the draft's vocabulary lacks
    residual = (p_next - q.index_select(0, accepted)).clamp(min=0)
    total = residual.sum()
    return accepted, torch.where(total > 0, residual / total, p_next)  # p = q but for rounding: nothing is left


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token, [1, 1], from probabilities, [1, vocabulary], with one random number in [0, 1), [1].

    By inverting the cumulative distribution, so that a token of probability 0 is not drawn. The sums of a large
    vocabulary want float64, where the device has it.
    """
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
    draft_s: float = 0.0
    verify_s: float = 0.0  # the main model's forward pass
    round_s: float = 0.0  # all of the round


@dataclasses.dataclass
class Generation:
    """What one run generates for a prompt, and how long it takes, in seconds."""

    prompt: Prompt
    token_ids: list[int] = dataclasses.field(default_factory=list)
    latency_s: float = 0.0  # from the prompt's ids on the device to the last token on the host
    first_token_s: float = 0.0  # to the first token on the host; a draft reads the prompt only then
    rounds: list[Round] = dataclasses.field(default_factory=list)  # of speculative decoding
    log_likelihood: float = 0.0  # of all draft tokens, under the main model, in nats
    ended: bool = False

    def append(self, tokens: list[int]) -> None:
        """Add new tokens, up to the one that ends the text; what a round yields beyond that is cut off."""
        for token in tokens:
            self.token_ids.append(token)
            self.ended = token in self.prompt.end_ids or len(self.token_ids) == self.prompt.max_new_tokens
            if self.ended:
                return


def now(device: torch.device) -> float:
    """The time in seconds, once the device has finished all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def decode_autoregressively(main: CachedModel, sampler: Sampler, prompt: Prompt) -> Generation:
    """Decode with the main model alone: one forward pass for each token."""
    output, prompt_ids = Generation(prompt), torch.tensor([prompt.ids], device=main.device)  # [1, n]
    start = now(main.device)
    sampler.restart(prompt.number, prompt.turn)
    token = sampler.sample(main.prefill(prompt_ids, rolls_back=False), prompt_ids, sampler.uniform(1))  # [1, 1]
    output.append([token.item()])
    output.first_token_s = now(main.device) - start
    while not output.ended:
        token = main.step(sampler.sample, token, sampler.uniform(1))
        output.append([token.item()])
    output.latency_s = now(main.device) - start
    return output


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
# always reads two tokens, and with a fixed K every pass has the same shape.) Only a round without draft tokens leaves
# the draft further behind: it reads on when it is asked again.


class FixedLength:
    """How many tokens a round drafts: here always the same number; AutoLength, in part 6, has the same methods."""

    def __init__(self, draft_tokens: int):
        self.draft_tokens = draft_tokens

    def wants_another(self, confidences: list[Tensor | float]) -> bool:
        """Whether to draft one more token. `confidences`: the draft's probabilities of this round's tokens so far."""
        return len(confidences) < self.draft_tokens

    def learn(self, drafted: int, accepted: int) -> None:
        """Be told what became of the round."""


class Draft:
    """What proposes draft tokens: ModelDraft or NgramDraft. A third kind of draft is a third such class.

    Whatever it proposes, the output stays right. `models`: the models that it runs.
    """

    models: tuple[CachedModel, ...] = ()

    def reset(self, prompt_ids: Tensor) -> None:
        """Begin a text with a prompt, ids [1, n], n ≥ 1."""
        raise NotImplementedError

    def propose(self, text: list[int], length: FixedLength) -> tuple[Tensor, Tensor | None]:
        """Draft how the text, the ids of the prompt and of all output so far, goes on.

        Returns K ≥ 0 tokens, [1, K], and what they were drawn from, q, [K, vocabulary], or None if nothing was drawn.
        Before each token it asks `length.wants_another`.
        """
        raise NotImplementedError

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

    def reset(self, prompt_ids: Tensor) -> None:
        self.has_read = prompt_ids.shape[1] - 1  # tokens of the text that its cache holds: all but the prompt's last
        self.confidences = []  # of all draft tokens of this text
        self.model.reset()
        if self.has_read:  # more than one token
            self.model.prefill(prompt_ids[:, :-1].clamp(max=self.last_id))

    def propose(self, text: list[int], length: FixedLength) -> tuple[Tensor, Tensor | None]:
        tokens, confidences, q = [], [], []
        while length.wants_another(confidences):
            # First what it has not read, [1, 2] or more after rounds without a draft; then each of its own tokens,
            # [1, 1], which never leaves the device.
            if not tokens:
                unread = torch.tensor([text[self.has_read :]], device=self.model.device).clamp(max=self.last_id)
            sampled = self.model.step(self.sampler.sample_draft, unread, self.sampler.uniform(1))
            for kept, part in zip((tokens, confidences, q), sampled, strict=True):
                kept.append(part)
            unread = tokens[-1]
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
    """A draft without a model: the text goes on as it did where its last three tokens, or two, or one, stood before.

    Known as prompt lookup decoding (Saxena 2023). It pays where an answer repeats what was asked, and costs little.
    """

    description = "no model: what followed the same tokens before"
    assumed_acceptance = {3: 0.95, 2: 0.75, 1: 0.45}  # by the tokens that match: to begin with, AutoLength corrects it

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self, prompt_ids: Tensor) -> None:
        self.indexed, self.continuations = 1, {}  # n-gram: the place in the text after its latest occurrence

    def propose(self, text: list[int], length: FixedLength) -> tuple[Tensor, None]:
        for place in range(self.indexed, len(text)):
            for n in self.assumed_acceptance:
                if n <= place:
                    self.continuations[tuple(text[place - n : place])] = place
        self.indexed = len(text)
        matching = (n for n in self.assumed_acceptance if tuple(text[-n:]) in self.continuations)
        tokens = []
        if n := next(matching, None):
            start = self.continuations[tuple(text[-n:])]
            while length.wants_another([self.assumed_acceptance[n]] * len(tokens)) and start + len(tokens) < len(text):
                tokens.append(text[start + len(tokens)])
        return torch.tensor([tokens], dtype=torch.long, device=self.device), None


@torch.no_grad()
def decode_speculatively(
    main: CachedModel, draft: Draft, sampler: Sampler, length: FixedLength, prompt: Prompt
) -> Generation:
    """Decode with the draft's help: several tokens for each forward pass of the main model, and still its own text.

    Leviathan et al. 2023, algorithm 1. Raises ArithmeticError if the draft's probabilities are not finite.
    """
    output, prompt_ids = Generation(prompt), torch.tensor([prompt.ids], device=main.device)  # [1, n]
    start = now(main.device)
    sampler.restart(prompt.number, prompt.turn)
    last = sampler.sample(main.prefill(prompt_ids), prompt_ids, sampler.uniform(1))  # [1, 1]: the text's last token
    output.append([last.item()])
    output.first_token_s = now(main.device) - start
    draft.reset(prompt_ids)

    counts, log_likelihoods, marks = [], [], [mark(main.device)]
    while not output.ended:
        # 1. Draft: K tokens, one after the other.
        draft_ids, q = draft.propose([*prompt.ids, *output.token_ids], length)  # [1, K]; [K, vocabulary] or None
        drafted, accepted = draft_ids.shape[1], 0
        marks.append(mark(main.device))

        if drafted:
            # 2. Verify: one pass of the main model gives its own output at each position.
            target, of_tokens = main.verify(sampler.score, torch.cat([last, draft_ids], dim=1))  # [K+1, …]; [K]
            log_likelihoods.append(of_tokens)
            marks.append(mark(main.device))

            # 3. Accept draft tokens up to the first rejection, and emit one token of the main model's own. With a fixed
            #    K this is the one moment in a round when the host reads from the device.
            tokens = sampler.accept(target, draft_ids[0], q)
            accepted = len(tokens) - 1
            output.append(tokens)
            last = torch.tensor([tokens[-1:]], device=main.device)

            # 4. Roll back: each cache drops one token for each rejected one.
            main.roll_back(drafted - accepted)
            draft.roll_back(drafted - accepted)
        else:  # nothing to verify: a step of autoregressive decoding
            last = main.step(sampler.sample, last, sampler.uniform(1))
            output.append([last.item()])
            marks.append(mark(main.device))

        length.learn(drafted, accepted)
        counts.append((drafted, accepted))
        marks.append(mark(main.device))

    output.latency_s = now(main.device) - start
    draft.check()
    spent = [seconds_between(*both) for both in itertools.pairwise(marks)]  # three parts of each round
    for count, *parts in zip(counts, spent[0::3], spent[1::3], spent[2::3], strict=True):
        output.rounds.append(Round(*count, *parts[:2], sum(parts)))
    output.log_likelihood = torch.cat(log_likelihoods).sum().item() if log_likelihoods else 0.0
    return output


def mark(device: torch.device) -> float | torch.Event:
    """A point in time within a run: of the device's own clock where it has one, so that nothing need wait for it.

    On others (MPS) the host's clock, which is right only where the host waits: a round is, its parts are not.
    """
    if device.type not in ("cuda", "xpu"):
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def seconds_between(start: float | torch.Event, end: float | torch.Event) -> float:
    """The seconds between two marks; the device must have passed both."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


# 5  Is it lossless? ---------------------------------------------------------------------------------------------------
#
# In exact arithmetic both methods generate the same tokens. In floating point, one pass over K+1 tokens and K+1 passes
# over one token round differently; where the two best tokens are nearly tied, the choice can flip, and from there on
# the two texts part for good. In bfloat16 that is the normal case. It is no bug, but a bug would look the same. So
# every output is certified by one more pass of the main model, over the whole text, that shares no cache with either
# loop: how far does a token lie below the best one (the gap), and how far does rounding move logits (the noise)? This
# is a criterion with measured margins, not a theorem. On small random models of 25 families and on the bundled pair,
# correct outputs had gaps of at most 0.51 times the noise. Outputs of loops with planted bugs had gaps of at least
# 78,000 times the noise in float32 and 1.5 times in bfloat16; but of a mixture of experts in bfloat16, 0.9 times.


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


@torch.no_grad()
def certify(main: CachedModel, prompt_ids: tuple[int, ...], output_ids: list[int]) -> tuple[float, Tensor]:
    """The gap of an output, and the logits that it follows from, [new tokens, vocabulary].

    Every token is certified given all before it: also behind a flip, each must be the best one or tied with it. Raises
    ArithmeticError if the logits are not finite.
    """
    text = torch.tensor([[*prompt_ids, *output_ids]], device=main.device)
    logits = main.forward_without_cache(text[:, :-1], len(output_ids))
    best, own = logits.amax(dim=-1), logits.gather(1, text[0, -len(output_ids) :, None])[:, 0]
    if not best.isfinite().all():
        raise ArithmeticError("the main model's logits are not finite; try --dtype float32 or bfloat16")
    return (best.float() - own.float()).max().item(), logits


@torch.no_grad()
def rounding_noise(main: CachedModel, prompt_ids: tuple[int, ...], output_ids: list[int], logits: Tensor) -> float:
    """How far rounding moves the logits of `certify`: their largest change if every layer's output is rounded again.

    In the same pass, with each number changed at random by a relative error of at most the type's epsilon; the largest
    of four, as experts can be chosen by a hair. No cache takes part, so that a faulty one cannot pass for rounding.
    """

    def round_again(module: torch.nn.Module, inputs: tuple, output: Any) -> Tensor | None:
        if isinstance(output, Tensor) and output.is_floating_point():
            random = 2 * torch.rand(output.shape, device=output.device) - 1
            return (output.float() * (1 + torch.finfo(output.dtype).eps * random)).to(output.dtype)

    torch.manual_seed(0)
    text = torch.tensor([[*prompt_ids, *output_ids[:-1]]], device=main.device)
    layers = [layer for layer in main.model.modules() if layer._parameters or not list(layer.children())]
    hooks = [layer.register_forward_hook(round_again) for layer in layers]
    try:
        passes = (main.forward_without_cache(text, len(output_ids)) for _ in range(4))
        return max((again.float() - logits.float()).abs().max().item() for again in passes)
    finally:
        for hook in hooks:
            hook.remove()


def find_divergence(
    main: CachedModel, prompt_ids: tuple[int, ...], baseline: list[int], speculative: list[int]
) -> Divergence | None:
    """Compare two greedy outputs for one prompt, and certify both; None if they are the same, and right."""
    same = baseline == speculative
    gap, logits = certify(main, prompt_ids, speculative)
    if same and gap == 0:
        return None
    baseline_gap = gap if same else certify(main, prompt_ids, baseline)[0]
    noise = rounding_noise(main, prompt_ids, speculative, logits)
    at_fault = [name for name, one in (("baseline", baseline_gap), ("speculative", gap)) if one > noise]
    if same and not at_fault:
        return None
    shorter = min(len(baseline), len(speculative))
    index = next((place for place in range(shorter) if baseline[place] != speculative[place]), shorter)
    if index == shorter and not same:  # one is the beginning of the other: rounding makes no loop stop early, or go on
        at_fault = at_fault or ["speculative"]
    tokens = [output[index] if index < len(output) else None for output in (baseline, speculative)]
    whose = "both" if len(at_fault) == 2 else "".join(at_fault) or None
    return Divergence(None if same else index, *tokens, gap, baseline_gap, noise, "mismatch" if whose else "tie", whose)


# 6  How many tokens to draft: as long as one more is worth more than it costs -----------------------------------------

LADDER = (2, 3, 5, 9, 16)  # tokens of a verify pass with an automatic length: compiled ones are padded to the next
LONGEST_AUTO = LADDER[-1] - 1  # draft tokens: with the text's last token they fill a tile of 16 rows


@torch.no_grad()
def measure_costs(main: CachedModel, draft: Draft, sampler: Sampler, prompt_ids: Tensor) -> dict:
    """What passes cost on this machine behind a prompt, ids [1, n], in seconds: medians, after a warm-up.

    main_pass_s: by the number of tokens, 1 being a step of autoregressive decoding. On both sides of each step of the
    ladder, so that lines between these points are right for padded passes, too. draft_pass_s: 2, a round's first draft
    token (for which a model reads two), and 1, each further one. The models alternate as they do in decoding: the main
    model drives the draft's weights out of a processor's caches.
    """
    widths = sorted({1, *LADDER, *(width + 1 for width in LADDER[:-1])})
    ids = prompt_ids[:, -1:].repeat(1, widths[-1])
    text = prompt_ids[0].tolist() + ids[0, :1].tolist()
    main.prefill(prompt_ids)
    draft.reset(prompt_ids)
    main_s, draft_s = {width: [] for width in widths}, {1: [], 3: []}  # the latter by draft tokens
    for _, width in itertools.product(range(8), widths):
        start = now(main.device)
        if width == 1:
            main.step(sampler.sample, ids[:, :1].contiguous(), sampler.uniform(1))
        else:
            main.verify(sampler.score, ids[:, :width].contiguous())
        main.roll_back(width)
        main_s[width].append(now(main.device) - start)
        for tokens, times in draft_s.items():
            start = now(main.device)
            draft.propose(text, FixedLength(tokens))
            draft.roll_back(tokens + 1)  # the text's last token, too
            times.append(now(main.device) - start)
    one, three = (statistics.median(times[len(widths) :]) for times in draft_s.values())
    main_pass_s = {width: statistics.median(times[2:]) for width, times in main_s.items()}
    return {"draft_pass_s": {1: max(0.0, (three - one) / 2), 2: one}, "main_pass_s": main_pass_s}


class AutoLength(FixedLength):
    """Draft while further tokens are worth more than they cost; rest where not even the first is. It keeps learning.

    With α the recent share of accepted among tested tokens, a round that drafts K tokens yields 1 + α + … + α^K
    (Leviathan et al. 2023, equation 1). The best K by the measured costs gives the time per token that can be had, and
    that is what a token is worth. A further draft token counts if all of the round so far are accepted, and it too (α).
    How likely that is, the draft's own probability tells, corrected by what became of tokens of about that probability
    before: drafts are more sure of themselves than they should be, or less.
    """

    def __init__(self, costs: dict, longest: int = LONGEST_AUTO, stride: int = 1):
        """`costs`: of `measure_costs`. `stride`: decide after so many tokens, as each decision waits for the device.

        With a stride of 2 a round drafts none, 2, 4, … or the longest, never 1.
        """
        super().__init__(longest)
        first, further = (costs["draft_pass_s"][tokens] for tokens in (2, 1))
        drafting = [0.0, *(first + k * further for k in range(longest))]
        verifying = numpy.interp(range(1, longest + 2), *zip(*sorted(costs["main_pass_s"].items()), strict=True))
        self.round_s = [sum(parts) for parts in zip(drafting, verifying.tolist(), strict=True)]  # by tokens drafted
        self.stride = stride
        self.accepted, self.tested = 6.0, 8.0  # of recent rounds; assumed to begin with, as in the next line
        self.by_tenth = [[(tenth + 0.5) / 5, 2.0] for tenth in range(10)]  # accepted, tested, by probability
        self.rest, self.next_rest = 0, 4  # rounds still to go without a draft; rounds of the next rest
        self.plan()

    def wants_another(self, confidences: list[Tensor | float]) -> bool:
        """As above; reads the latest probabilities from the device, so here the host waits for the draft."""
        if not confidences:
            self.tenths = []
            return self.rest == 0
        if len(confidences) % self.stride and len(confidences) < self.draft_tokens:
            return True
        for confidence in map(float, confidences[len(self.tenths) :]):
            self.tenths.append(self.by_tenth[min(9, int(10 * confidence)) if confidence > 0 else 0])
        all_accepted = math.prod(accepted / tested for accepted, tested in self.tenths)
        paid, *further = self.round_s[len(confidences) :]
        yields = itertools.accumulate(all_accepted * self.alpha**k for k in range(1, len(further) + 1))
        return any(tokens * self.worth_s > round_s - paid for tokens, round_s in zip(yields, further, strict=True))

    def learn(self, drafted: int, accepted: int) -> None:
        """Count a round of rest down, or learn from a round that drafted."""
        if self.rest:
            self.rest -= 1
        elif drafted:
            tested = min(accepted + 1, drafted)
            self.accepted, self.tested = 0.9 * self.accepted + accepted, 0.9 * self.tested + tested
            for index, tenth in enumerate(self.tenths[:tested]):
                tenth[:] = 0.98 * tenth[0] + (index < accepted), 0.98 * tenth[1] + 1
            self.plan()

    def plan(self) -> None:
        """What a token is worth by now; a draft that does not pay rests, twice as long each time."""
        self.alpha = self.accepted / self.tested
        yields = itertools.accumulate(self.alpha**k for k in range(self.draft_tokens + 1))
        self.worth_s, best = min((self.round_s[k] / tokens, k) for k, tokens in enumerate(yields))
        if best:
            self.next_rest = 4
        else:
            self.rest, self.next_rest = self.next_rest, min(2 * self.next_rest, 128)


# 7  Compiled steps ----------------------------------------------------------------------------------------------------


class BoundedCache(Cache):
    """A KV cache of fixed size, of which attention sees only the first `bound` tokens; `filled` of them are in use."""

    bound = filled = 0

    def update(self, *states: Any, **options: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*states, **options)
        return keys[:, :, : self.bound], values[:, :, : self.bound]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.bound, 0


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
        self.steps = {}  # by the head's name, the number of tokens and the cache's bound, the compiled step
        self.widths = ()  # the numbers of tokens that a verify pass may have; see `limited_to`
        self.eager = CachedModel(model, vocabulary, device)  # reads the prompts, which can have any length
        layers = self.eager.cache.layers
        known = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
        if not known.issuperset(type(layer).__name__ for layer in layers):
            raise NotImplementedError(f"{model.config.model_type} needs a cache of its own kind")
        # Layers with sliding windows are stored in full, too: the mask hides what lies outside a window. A multiple of
        # 8 keeps the mask's rows aligned.
        self.bounds = [math.ceil(bound / 8) * 8 for bound in bounds]
        static = [layer if type(layer) is DummyLayer else StaticLayer(self.bounds[-1]) for layer in layers]
        self.cache = BoundedCache(layers=static)
        super().__init__(model, vocabulary, device)
        self.step(Greedy().sample, torch.zeros(1, 1, dtype=torch.long, device=self.device))  # allocates the cache
        self.lengths = [layer.cumulative_length for layer in static if type(layer) is StaticLayer]  # [] each

    def limited_to(self, widths: tuple[int, ...]) -> "CompiledModel":
        """The same model, cache and steps, for verify passes of these numbers of tokens."""
        model = copy.copy(self)
        model.widths = widths
        return model

    def reset(self, rolls_back: bool = True) -> None:
        self.cache.reset()
        self.cache.filled = 0

    def prefill(self, prompt_ids: Tensor, rolls_back: bool = True) -> Tensor:
        """As above; read eagerly into a growing cache, where attention spans no more than the prompt, then copied."""
        logits = self.eager.prefill(prompt_ids)
        self.reset()
        for static, grown in zip(self.cache.layers, self.eager.cache.layers, strict=True):
            if type(static) is StaticLayer and grown.is_initialized:
                static.update(grown.keys, grown.values)
        self.eager.reset()
        self.cache.filled = prompt_ids.shape[1]
        return logits

    @torch.no_grad()  # inference_mode would be faster, but cannot be compiled
    def forward(self, ids: Tensor, logits_to_keep: int = 0) -> Tensor:
        """As above, within a `step`, which knows the cache's bound."""
        output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=logits_to_keep)
        return output.logits[0, :, : self.vocabulary]

    def roll_back(self, tokens: int) -> None:
        if tokens:
            torch._foreach_add_(self.lengths, -tokens)
            self.cache.filled -= tokens

    def step(self, head: Callable, ids: Tensor, uniform: Tensor | None = None, logits_to_keep: int = 1) -> Any:
        """As above; compiled where `compile` was asked to, for the smallest bound that holds what is read by then."""
        self.cache.filled += ids.shape[1]
        self.cache.bound = next(bound for bound in self.bounds if bound >= self.cache.filled)
        if (compiled := self.steps.get((head.__name__, ids.shape[1], self.cache.bound))) is None:
            return super().step(head, ids, uniform, logits_to_keep)
        # A CUDA graph writes its outputs into the same memory each time. They are read after further steps, and even
        # become inputs of the next: so they are copied first. And the graphs must be told where a new step begins, or
        # they take outputs that are still held for memory in use, and record themselves anew.
        torch.compiler.cudagraph_mark_step_begin()
        outputs = compiled(ids, uniform)
        if isinstance(outputs, Tensor):
            return outputs.clone()
        return tuple(output if output is None else output.clone() for output in outputs)

    def verify(self, score: Callable, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As above, in a pass of one of the widths: what is padded is ignored, and rolled back at once."""
        tokens = ids.shape[1]
        width = min((width for width in self.widths if width >= tokens), default=tokens)
        target, log_likelihoods = self.step(score, pad(ids, (0, width - tokens)), logits_to_keep=0)
        self.roll_back(width - tokens)
        return target[:tokens], log_likelihoods[: tokens - 1]

    @torch.no_grad()
    def compile(self, head: Callable, tokens: int, uniform: Tensor | None, logits_to_keep: int) -> None:
        """Compile a step, from ids [1, tokens] to what the head returns, for each bound, and forget the text."""

        def whole(ids: Tensor, uniform: Tensor | None) -> Any:
            return head(self.forward(ids, logits_to_keep), ids, uniform)

        # What mode="reduce-overhead" means; and no guards. These would check before each step, for a millisecond, that
        # nothing of the model has changed, which nothing does. Without guards a step must be one whole graph, and must
        # not share a cache of graphs with others.
        options = {"triton.cudagraphs": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        how = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True, "options": options}
        for bound in self.bounds:
            self.steps[head.__name__, tokens, bound] = torch.compile(whole, **how)
            for _ in range(3):  # compile; capture a graph; replay it
                self.reset()
                self.cache.filled = bound - tokens
                self.step(head, torch.zeros(1, tokens, dtype=torch.long, device=self.device), uniform, logits_to_keep)


def cache_bounds(lengths: list[int]) -> list[int]:
    """Bounds of a run's caches, in tokens: its longest text; a quarter or a sixteenth of it, if some text fits in."""
    capacity = max(lengths)
    sizes = [size for size in (capacity // 16, capacity // 4) if size >= 256] + [capacity]  # less saves little
    return sorted({next(size for size in sizes if size >= length) for length in lengths})


def verify_widths(draft_tokens: int | str) -> tuple[int, ...]:
    """The numbers of tokens that a verify pass may have, with a fixed K or with "auto"."""
    return LADDER if draft_tokens == "auto" else (draft_tokens + 1,)


def compile_steps(
    main: CompiledModel, draft: Draft, sampler: Sampler, lengths: tuple[int | str, ...], announce: Callable[[str], None]
) -> None:
    """Compile the steps of both models that these draft lengths run, and no others. Raises what the compiler raises."""
    widths = {width for draft_tokens in lengths for width in verify_widths(draft_tokens)}
    steps = [(main, sampler.sample, 1, 1), *((main, sampler.score, width, 0) for width in sorted(widths))]
    draft_tokens = (2,) if widths == {2} else (1, 2)  # K = 1 never feeds a draft its own tokens
    steps += [(model, sampler.sample_draft, tokens, 1) for model in draft.models for tokens in draft_tokens]
    start = time.perf_counter()
    for number, (model, head, tokens, logits_to_keep) in enumerate(steps, 1):
        announce(f"Compiling step {number} of {len(steps)}, after {time.perf_counter() - start:.0f} s …")
        model.compile(head, tokens, sampler.uniform(1) if logits_to_keep else None, logits_to_keep)
    if main.device.type == "cuda" and (skipped := torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]):
        announce(f"warning: no CUDA graphs of {counted(skipped, 'step')}, which are slow: see TORCH_LOGS=cudagraphs")


# 8  The benchmark -----------------------------------------------------------------------------------------------------

SAMPLED = "sampled"  # why sampled outputs cannot be compared


@contextlib.contextmanager
def cli_errors(what: str, hint: str) -> Iterator[None]:
    """Make a UsageError of any error: broken files and folders can make libraries raise anything."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name:
            hint = f"`pip install {error.name.partition('.')[0]}`"
        raise UsageError(f"cannot {what}: {first_line(error)}; {hint}") from error


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line of at most 300 characters."""
    said = getattr(error, "strerror", None) or str(error)
    text = plain(said.strip().partition("\n")[0]) or type(error).__name__
    return text if len(text) < 300 else text[:299] + "…"


@dataclasses.dataclass(frozen=True)
class Question(Prompt):
    """A question of a file, or one turn of it; its number is its place in the file, from 1."""

    category: str | None = None
    question_id: str | int | None = None
    earlier: tuple[dict, ...] = ()  # the messages before the text: {"role": …, "content": …}
    later: tuple[str, ...] = ()  # what the user says in the turns to come
    longest: int = 0  # a bound for the tokens of the last turn's prompt
    error: str | None = None  # why it cannot be decoded

    @property
    def label(self) -> str:
        """What the report calls it: the question's id or number, and the turn, e.g. "81.2"."""
        name = self.number if self.question_id in (None, "") else self.question_id
        return plain(f"{name}.{self.turn}" if self.turn else str(name))


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to decode a prompt. The first of a run is the baseline."""

    label: str
    decode: Callable[[Prompt], Generation]
    draft_tokens: int | str | None = None  # K, or "auto"; None: it drafts nothing
    costs: dict | None = None  # of `measure_costs`, if it uses them
    weights_gb: float | None = None  # of the main model, which a step of the baseline reads
    library: str | None = None  # what it is, if it is not ours but transformers'
    error: str | None = None  # why it cannot run


@dataclasses.dataclass
class Outcome:
    """What one method did with one prompt: its repeats, or the error that it ended with."""

    runs: list[Generation] = dataclasses.field(default_factory=list)
    error: str | None = None
    divergence: Divergence | None = None  # from the baseline's output: the worst of all repeats
    unchecked: str | None = None  # why its output could not be compared with the baseline's
    peak_memory_gb: float | None = None

    @property
    def run(self) -> Generation:
        """The repeat that counts: the median by time per token; of an even number, the faster of the middle two."""
        return sorted(self.runs, key=lambda run: run.latency_s / len(run.token_ids))[(len(self.runs) - 1) // 2]

    @property
    def latency_s(self) -> float:
        """The median latency of the repeats; of an even number, the mean of the middle two."""
        return statistics.median(run.latency_s for run in self.runs)


@dataclasses.dataclass
class Result:
    """What every method did with one prompt, by the methods' labels."""

    prompt: Question
    outcomes: dict[str, Outcome]

    @property
    def baseline(self) -> Outcome:
        """That of the first method."""
        return self.outcomes["baseline"]

    def error(self, method: Method) -> str | None:
        """Why the method cannot be compared with the baseline for this prompt."""
        return self.baseline.error or self.outcomes[method.label].error


def our_methods(main: CachedModel, draft: Draft, sampler: Sampler, lengths: tuple, prompt: Prompt) -> list[Method]:
    """The baseline, and speculative decoding with each draft length; costs are measured behind a prompt."""
    methods = [Method("baseline", functools.partial(decode_autoregressively, main, sampler))]
    weights_gb = sum(weight.numel() * weight.element_size() for weight in main.model.parameters()) / 1e9
    for k in lengths:
        model = main.limited_to(verify_widths(k)) if isinstance(main, CompiledModel) else main
        length, costs, error = FixedLength(k), None, None
        if k == "auto":
            try:
                costs = measure_costs(model, draft, sampler, torch.tensor([prompt.ids], device=main.device))
                length = AutoLength(costs, stride=1 if main.device.type == "cpu" else 2)
            except Exception as failure:  # above all: out of memory
                error = f"what passes cost cannot be measured: {first_line(failure)}"
        decode = functools.partial(decode_speculatively, model, draft, sampler, length)
        methods.append(Method(f"K = {k}", decode, k, costs, weights_gb, error=error))
    return methods


def library_methods(main: CachedModel, draft: Draft, sampler: Sampler, lengths: tuple) -> list[Method]:
    """What a user would run instead: transformers' generate(), alone (compiled if ours is and it can) and assisted."""
    compiles = isinstance(main, CompiledModel) and main.device.type in ("cuda", "xpu")
    kind, options = ("compiled", {"cache_implementation": "static"}) if compiles else ("eager", {})
    decode = functools.partial(decode_by_generate, main, None, sampler, options)
    methods = [Method("generate()", decode, library=f"transformers' generate(), {kind}")]
    for k in lengths:
        label, which = ("assisted", "its default K") if k == "auto" else (f"assist {k}", f"K = {k}")
        options = {"prompt_lookup_num_tokens": 10 if k == "auto" else k, "max_matching_ngram_size": 3}
        if draft.models:
            fixed = {"num_assistant_tokens": k, "num_assistant_tokens_schedule": "constant"}
            options = {} if k == "auto" else fixed | {"assistant_confidence_threshold": 0.0}
        decode = functools.partial(decode_by_generate, main, draft, sampler, options)
        methods.append(Method(label, decode, k, library=f"transformers' assisted generation, {which}, eager"))
    return methods


@torch.no_grad()
def decode_by_generate(main: CachedModel, draft: Draft | None, sampler: Sampler, options: dict, prompt: Prompt):
    """A Generation by transformers' generate(); what the models' own generation configs ask for is dropped for good."""
    how = {"max_new_tokens": prompt.max_new_tokens, "eos_token_id": sorted(prompt.end_ids) or None, "pad_token_id": 0}
    if isinstance(sampler, Sampling):
        how |= sampler.settings
        sampler.restart(prompt.number, prompt.turn)
        torch.manual_seed(sampler.generator.initial_seed())
    config, main.model.generation_config = GenerationConfig(**how, **options), GenerationConfig()
    assistant = draft.models[0].model if draft and draft.models else None
    if assistant:
        assistant.generation_config = GenerationConfig(**options)
    ids = torch.tensor([prompt.ids], device=main.device)
    inputs = {"attention_mask": torch.ones_like(ids), "assistant_model": assistant}
    start = now(main.device)
    output = main.model.generate(ids, generation_config=config, **inputs)
    tokens = output[0, len(prompt.ids) :].tolist()  # the host waits for the last of them
    return Generation(prompt, tokens, now(main.device) - start)


def peak_memory_gb(device: torch.device | None, reset: bool = False) -> float | None:
    """The most memory held on an accelerator since the last reset, or else by this process in all its life, in GB."""
    if device and device.type in ("cuda", "xpu"):
        if reset:
            torch.accelerator.reset_peak_memory_stats(device)
        return torch.accelerator.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def memory_bandwidth_gb_s(device: torch.device) -> float:
    """What the device's memory delivers, in GB/s: the best of a few matrix-vector products, which read 512 MB each."""
    matrix, vector = torch.ones(2**15, 2**12, device=device), torch.ones(2**12, device=device)
    marks = [now(device)]
    for _ in range(6):  # the first one warms up
        torch.mv(matrix, vector)
        marks.append(now(device))
    return matrix.nbytes / 1e9 / min(end - start for start, end in itertools.pairwise(marks[1:]))


def benchmark(
    prompts: list[Question],
    methods: list[Method],
    check: Callable[[Result], None],
    repeats: int = 1,
    warmup: int = 1,
    announce: Callable[[Question, str], None] = lambda *_: None,
    device: torch.device | None = None,
    next_turn: Callable[[Result], Question | None] = lambda _: None,
) -> Iterator[Result]:
    """Decode each prompt with all methods, then the `next_turn` of its Result; yield Results that `check` has seen.

    `announce`: told of each run.
    """
    cold, prompts = {method.label for method in methods}, list(prompts)
    for index, prompt in enumerate(prompts):
        result = Result(prompt, {method.label: Outcome(error=prompt.error or method.error) for method in methods})
        for repeat in range(repeats):
            # They take turns at being the first, also if every other prompt is the second turn of a question.
            first = (index + index // len(methods) + repeat) % len(methods)
            for method in methods[first:] + methods[:first]:
                outcome = result.outcomes[method.label]
                if outcome.error:
                    continue
                try:
                    for _ in range(warmup if method.label in cold else 0):  # allocates memory, loads kernels, …
                        announce(prompt, f"warm-up, {method.label}")
                        method.decode(prompt)
                    cold.discard(method.label)
                    announce(prompt, method.label)
                    peak_memory_gb(device, reset=True)
                    outcome.runs.append(method.decode(prompt))
                    outcome.peak_memory_gb = peak_memory_gb(device)
                except Exception as error:  # above all: out of memory. It costs this outcome only.
                    outcome.error = first_line(error)
        check(result)
        yield result
        if following := next_turn(result):
            prompts.insert(index + 1, following)  # which the loop takes next


def check_outputs(main: CachedModel, sampled: bool, result: Result) -> None:
    """Compare outputs with the baseline's, and certify them; of sampled ones, see only that all logits are finite."""

    @functools.cache
    def divergence_of(output: tuple[int, ...]) -> Divergence | None:
        if not sampled:
            return find_divergence(main, result.prompt.ids, result.baseline.run.token_ids, list(output))
        certify(main, result.prompt.ids, list(output))

    for outcome in result.outcomes.values():
        if result.baseline.error or outcome.error:
            continue
        try:
            found = filter(None, [divergence_of(tuple(run.token_ids)) for run in outcome.runs])
            outcome.divergence = max(found, key=lambda one: (one.kind == "mismatch", one.gap), default=None)
            outcome.unchecked = SAMPLED if sampled else None
        except ArithmeticError as error:
            outcome.error = first_line(error)
        except Exception as error:  # it costs the verdict, not the timings
            outcome.unchecked = first_line(error)


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """The quotient; None (a dash in a table, null in the JSON) where there is none."""
    quotient = numerator / denominator if denominator and numerator is not None else math.nan
    return quotient if math.isfinite(quotient) else None


def as_percent(factor: float | None) -> float | None:
    """How much faster a factor is, in percent: 100 × (factor − 1)."""
    return None if factor is None else 100 * (factor - 1)


def speed(outcomes: list[Outcome]) -> dict:
    """Tokens, seconds and tokens per second of one method, over one prompt or several (all tokens / all seconds)."""
    tokens, seconds = [len(one.run.token_ids) for one in outcomes], [one.latency_s for one in outcomes]
    latencies = [[run.latency_s for run in one.runs] for one in outcomes]
    first_s = [one.run.first_token_s for one in outcomes]
    decoding_s = sum(seconds) - sum(first_s) if all(first_s) else None  # generate() does not tell when the first came
    return {
        "new_tokens": sum(tokens),
        "latency_s": statistics.mean(seconds),
        "tokens_per_s": ratio(sum(tokens), sum(seconds)),
        "mean_tokens_per_s": statistics.mean(len(one.run.token_ids) / one.latency_s for one in outcomes),
        "latency_min_s": statistics.mean(map(min, latencies)),
        "latency_max_s": statistics.mean(map(max, latencies)),
        "time_to_first_token_s": statistics.mean(first_s) if all(first_s) else None,
        "time_per_output_token_s": ratio(decoding_s, sum(tokens) - len(tokens)),
        "peak_memory_gb": max((one.peak_memory_gb for one in outcomes if one.peak_memory_gb), default=None),
    }


def acceptance(runs: list[Generation]) -> dict:
    """What became of the draft tokens, and where the time went, over one speculative run or several.

    alpha, the α of Leviathan et al. 2023, §3: accepted / tested tokens; a round tests those that it accepts and the
    first rejected. The last round counts whole. By position i: of the rounds that drafted at least i tokens, the share
    that accepted the first i (joint); of those that accepted the first i - 1, the share that accepted the i-th, too.
    """
    rounds = [one for run in runs for one in run.rounds]
    total = {part: sum(getattr(one, part) for one in rounds) for part in Round._fields}
    longest = max((one.drafted for one in rounds), default=0)
    joint, conditional = [], []
    for i in range(1, longest + 1):
        reaching = [one.accepted for one in rounds if one.drafted >= i]
        passed = sum(n >= i for n in reaching)
        joint.append(ratio(passed, len(reaching)))
        conditional.append(ratio(passed, sum(n >= i - 1 for n in reaching)))
    log_likelihood = sum(run.log_likelihood for run in runs)
    round_s = numpy.percentile([one.round_s for one in rounds], (50, 95)).tolist() if rounds else []
    figures = {"rounds": len(rounds)} | {part: total[part] for part in ("drafted", "accepted", "draft_s", "verify_s")}
    return figures | {
        "acceptance_rate": ratio(total["accepted"], total["drafted"]),
        "alpha": ratio(total["accepted"], sum(min(one.accepted + 1, one.drafted) for one in rounds)),
        "mean_acceptance_length": 1 + total["accepted"] / len(rounds) if total["drafted"] else None,
        "acceptance_by_position": {"joint": joint, "conditional": conditional},
        "acceptance_histogram": [sum(one.accepted == n for one in rounds) for n in range(longest + bool(rounds))],
        "tokens_per_round": ratio(sum(len(run.token_ids) - 1 for run in runs), len(rounds)),
        "drafted_per_round": ratio(total["drafted"], len(rounds)),
        "drafted_histogram": {str(n): count for n, count in sorted(Counter(one.drafted for one in rounds).items())},
        "prefill_s": sum(run.latency_s for run in runs) - total["round_s"],
        "round_s": dict(zip(("median", "p95"), round_s, strict=False)) or None,
        "log_likelihood": ratio(log_likelihood, 1),
        "log_likelihood_per_token": ratio(log_likelihood, total["drafted"]),
        "other_s": total["round_s"] - total["draft_s"] - total["verify_s"],
    }


def expected_speedup(alpha: float | None, lengths: list[int], c: float | None, v: float | None) -> float | None:
    """The speedup, as a factor, that theory predicts: Leviathan et al. 2023, theorem 3.8, which has v = 1.

    A round that drafts K tokens yields 1 + α + … + α^K (equation 1) and costs K draft steps, c each, and a verify pass,
    v, in baseline steps. lengths: K of each round; one of 0 is a baseline step. None if one of these is unknown.
    """
    if None in (alpha, c, v) or not any(lengths):
        return None
    tokens = sum(alpha**i for k in lengths for i in range(k + 1))
    return tokens / sum(k * c + v if k else 1 for k in lengths)


def speedup_if(baseline_s: float | None, seconds: float, rounds: list[Round], step_s: float | None) -> dict:
    """What holds it back: the speedups in percent with a free draft, with a perfect one, with passes for a step's time.

    From the times of the rounds as they were. seconds: of all the output, and baseline_s: of the baseline for as much.
    """
    drafting, saved = [one for one in rounds if one.drafted], {}
    if drafting and step_s:
        drafted, accepted = sum(one.drafted for one in drafting), sum(one.accepted for one in drafting)
        needless = (drafted - accepted) / (len(rounds) + drafted)  # of the rounds, if each yielded all that it drafted
        saved["free_draft"] = sum(one.draft_s for one in drafting)
        saved["perfect_draft"] = needless * sum(one.round_s for one in rounds)
        saved["free_verify"] = sum(one.verify_s - step_s for one in drafting)
    kinds = ("free_draft", "perfect_draft", "free_verify")
    return {kind: as_percent(ratio(baseline_s, seconds - saved[kind])) if saved else None for kind in kinds}


def break_even_alpha(c: float | None, v: float | None) -> float | None:
    """The α from which drafting pays, with the best K of 1 to 32: 1 + α + … + α^K > K·c + v. None if it never does."""

    def pays(alpha: float) -> bool:
        return any(sum(alpha**i for i in range(k + 1)) > k * c + v for k in range(1, 33))

    if c is None or v is None or not pays(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(40):  # bisection
        low, high = (low, (low + high) / 2) if pays((low + high) / 2) else ((low + high) / 2, high)
    return high


def speedup_interval(baselines: list[Outcome], outcomes: list[Outcome]) -> list[float] | None:
    """The speedup's 95 % interval in percent: percentile bootstrap, 2,000 resamples over prompts, then over repeats.

    Over few prompts it would be too narrow: it is expanded, by Student's t over the normal's 1.96 (Hesterberg 2015).
    """
    if len(outcomes) < 10:
        return None
    random, speeds = numpy.random.default_rng(0), []
    prompts = random.integers(len(outcomes), size=(2000, len(outcomes), 1))
    for of in (outcomes, baselines):
        seconds = numpy.array([[run.latency_s for run in one.runs] for one in of])  # [prompts, repeats]
        repeats = random.integers(seconds.shape[1], size=(*prompts.shape[:2], seconds.shape[1]))
        tokens = numpy.array([len(one.run.token_ids) for one in of])[prompts[:, :, 0]]
        speeds.append(tokens.sum(axis=1) / numpy.median(seconds[prompts, repeats], axis=2).sum(axis=1))
    low, middle, high = numpy.percentile(as_percent(speeds[0] / speeds[1]), [2.5, 50, 97.5]).tolist()
    freedom = len(outcomes) - 1
    wider = math.sqrt(1 + 1 / freedom) * (1 + 1.21 / freedom + 1.5 / freedom**2)  # t ≈ 1.96 (1 + 1.21/ν + 1.5/ν²)
    return [middle + wider * (low - middle), middle + wider * (high - middle)]


class Comparison:
    """What a method and the baseline did with prompts, and how they compare: every figure, by its key in the JSON."""

    def __init__(self, results: list[Result], method: Method):
        baselines, outcomes = [of.baseline for of in results], [of.outcomes[method.label] for of in results]
        self.of, self.prompts = method, len(results)
        self.baseline, self.method = speed(baselines), speed(outcomes)
        if not method.library:
            self.method |= acceptance([one.run for one in outcomes])
        tokens_per_s = [[len(one.run.token_ids) / one.latency_s for one in of] for of in (outcomes, baselines)]
        gains = [ours / own for ours, own in zip(*tokens_per_s, strict=True)]
        rounds = [one for outcome in outcomes for one in outcome.run.rounds]
        drafting = [one for one in rounds if one.drafted]
        step_s = self.baseline["time_per_output_token_s"]
        draft_step_s = ratio(sum(one.draft_s for one in drafting), sum(one.drafted for one in drafting))
        verify_pass_s = ratio(sum(one.verify_s for one in drafting), len(drafting))
        c, v, alpha = ratio(draft_step_s, step_s), ratio(verify_pass_s, step_s), self.method.get("alpha")
        # With auto there is no one K, and no prediction.
        lengths = [one.drafted for one in rounds] if isinstance(method.draft_tokens, int) else []
        self.figures = {
            "speedup_percent": as_percent(ratio(self.method["tokens_per_s"], self.baseline["tokens_per_s"])),
            "decode_speedup_percent": as_percent(ratio(step_s, self.method["time_per_output_token_s"])),
            "speedup_interval_percent": speedup_interval(baselines, outcomes),
            "speedup_range_percent": [as_percent(min(gains)), as_percent(max(gains))],
            "geometric_mean_speedup_percent": as_percent(statistics.geometric_mean(gains)),
            "predicted_speedup_percent": as_percent(expected_speedup(alpha, lengths, c, v)),
            "ideal_speedup_percent": as_percent(expected_speedup(alpha, lengths, c, 1.0)),
        }
        seconds = sum(one.latency_s for one in outcomes)
        baseline_s = ratio(self.method["new_tokens"], self.baseline["tokens_per_s"])
        self.figures["speedup_if_percent"] = speedup_if(baseline_s, seconds, rounds, step_s)
        self.figures["break_even_alpha"] = break_even_alpha(c, v)
        self.figures["weight_bandwidth_gb_s"] = ratio(method.weights_gb, step_s)
        self.figures |= {"baseline_step_s": step_s, "draft_step_s": draft_step_s, "verify_pass_s": verify_pass_s}
        self.figures |= {"draft_cost": c, "verify_cost": v}  # in baseline steps: the c of Leviathan et al., and v
        kinds = Counter(one.divergence.kind if one.divergence else one.unchecked for one in outcomes)
        self.figures |= {"identical": None if kinds[SAMPLED] else kinds[None], "ties": kinds["tie"]}
        unchecked = sum(one.unchecked not in (None, SAMPLED) for one in outcomes)
        self.figures |= {"mismatches": kinds["mismatch"], "unchecked": unchecked}
        kind = "compared" if method.library else "speculative"
        self.json = {"baseline": self.baseline, kind: self.method, **self.figures}


# 9  The report --------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """A number with about three significant digits; a dash for None."""
    return "–" if value is None else f"{value:.{sum(abs(value) < bound for bound in (1, 10, 100))}f}"


def percent(value: float | None, sign: str = "", whole: float = 100) -> str:
    """A percentage without decimals, sign="+" with a plus sign; a dash for None. `whole`: what is 100 %."""
    return "–" if value is None else f"{round(100 * value / whole):{sign}} %"


def counted(count: int, noun: str) -> str:
    """A number of things, e.g. "1 layer" or "2 layers"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def gain(value: float | None) -> Text:
    """A speedup in percent, in a colour."""
    return Text(percent(value, "+"), "green" if (value or 0) > 0 else "red")


Column = namedtuple("Column", "heading width key show", defaults=[number])  # of a table; blank in rows without the key
COLUMNS = [  # of the table of prompts
    Column("tokens", 6, "tokens", str),
    Column("s", 6, "latency_s"),
    Column("TTFT", 6, "time_to_first_token_s"),
    Column("tok/s", 6, "tokens_per_s"),
    Column("faster", 7, "speedup_percent", gain),
    Column("accept", 6, "acceptance_rate", functools.partial(percent, whole=1)),
    Column("length", 6, "mean_acceptance_length"),
    Column("log-l.", 6, "log_likelihood_per_token"),
    Column("same", 7, "same", Text.from_markup),
]
SUMMARY_COLUMNS = [  # of the tables of draft lengths and of categories
    Column("tok/s", 6, "tokens_per_s"),
    Column("faster", 7, "speedup_percent", gain),
    Column("decode", 7, "decode_speedup_percent", gain),
    Column("predicted", 9, "predicted_speedup_percent", functools.partial(percent, sign="+")),
    Column("length", 6, "mean_acceptance_length"),
    Column("α", 5, "alpha"),
    Column("c", 5, "draft_cost"),
    Column("v", 5, "verify_cost"),
]


def row_of(one: Comparison) -> dict:
    """The figures of a method's row."""
    words = {"identical": "[green]yes", "ties": "[yellow]tie", "mismatches": "[bold red]NO", "unchecked": "[bold red]?"}
    identical = one.figures["identical"]
    same = SAMPLED if identical is None else f"{identical}/{one.prompts}"
    if one.prompts == 1 and identical is not None:
        same = next(word for key, word in words.items() if one.figures[key])
    return one.method | one.figures | {"tokens": round(one.method["new_tokens"] / one.prompts), "same": same}


def print_row(console: Console, columns: list[Column], label: str, figures: dict | None) -> None:
    """Print one row now, as prompts take long; `figures` None: the headings. On a narrow terminal it is a list."""
    room = console.width - sum(column.width + 1 for column in columns)
    row, is_list = Text(label, "" if figures else "bold"), room < 15
    if not is_list:
        row.truncate(room, overflow="ellipsis", pad=True)
    for heading, width, key, show in columns:
        cell = Text(heading) if figures is None else Text()
        if figures and key in figures:
            cell = Text.assemble(show(figures[key]))
        if not is_list:
            cell.align("right", width)
            row.append(" ").append_text(cell)
        elif figures and str(cell):
            row.append(f", {heading} ").append_text(cell)
    console.print(row, no_wrap=not is_list)


def print_prompt(console: Console, title: str, rows: dict[str, Comparison | str]) -> None:
    """Print what the methods did with one prompt, or with all: by label, the comparison or why there is none."""
    console.print(Text(title), overflow="ellipsis", no_wrap=True)
    if one := next((one for one in rows.values() if isinstance(one, Comparison)), None):
        tokens = {"tokens": round(one.baseline["new_tokens"] / one.prompts)}
        print_row(console, COLUMNS, "    baseline", one.baseline | tokens)
    for label, one in rows.items():
        if isinstance(one, Comparison):
            print_row(console, COLUMNS, f"    {label}", row_of(one))
        else:
            console.print(Text(f"    {label}: {plain(one)}", "red"))


def print_summaries(console: Console, title: str, rows: dict[str, Comparison]) -> None:
    """Print a table that compares draft lengths or categories: what each gained, and why."""
    print_row(console, SUMMARY_COLUMNS, title, None)
    for label, one in rows.items():
        print_row(console, SUMMARY_COLUMNS, f"  {plain(label)}", row_of(one))
    console.print()


def print_chart(console: Console, title: str, bars: list[tuple[str, float | None]], show: Callable) -> None:
    """Print bars, each with its label and, as `show` says it, its value; none where there is no value."""
    most = max((value or 0 for _, value in bars), default=0)
    if most <= 0:
        return
    console.print(Text(title, "bold"))
    for label, value in bars:
        if value is not None:
            bar = "█" * round(value / most * (console.width - 24))
            style = "bright_black" if label.startswith(" ") else "green"
            console.print(Text.assemble(f"  {label:<11} ", (bar, style), f" {show(value)}"))
    console.print()


def print_text(console: Console, tokenizer, run: Generation) -> None:
    """Print what was generated, each token by where it comes from: in colours, or, without them, in marks."""
    looks = {  # by the origin of a token: the style, or, without colours, the marks around it; and what it means
        "draft": ("green", "{}", "accepted draft token"),
        "correction": ("bold red", "«{}»", "the main model's own, after a rejection"),
        "bonus": ("cyan", "‹{}›", "its bonus token"),
        "own": ("", "{}", "its own, nothing drafted"),
    }
    pieces, done, origins = [], "", ["own"]  # the first token, from the prefill
    for one in run.rounds:
        rejected = "correction" if one.accepted < one.drafted else "bonus"
        origins += ["draft"] * one.accepted + [rejected if one.drafted else "own"]
    for place, origin in enumerate(origins[: len(run.token_ids)], 1):
        decoded = tokenizer.decode(run.token_ids[:place])
        if decoded.endswith("\ufffd") and place < len(run.token_ids):
            continue  # a part of a character: it comes with the rest
        pieces.append((safe(decoded[len(done) :]), origin))
        done = decoded
    for origin, (_, _, meaning) in looks.items():
        pieces += [("\n" if origin == "draft" else " · ", "own"), (meaning, origin)]
    colours = console.is_terminal and not console.no_color
    styled = [(text, looks[origin][0]) if colours else looks[origin][1].format(text) for text, origin in pieces]
    console.print(Text.assemble(*styled, "\n"))


def conclusions(best: Comparison, means: list[Comparison], results: list[Result], memory: float | None) -> list[str]:
    """The result in sentences that a person can quote: is it faster, by how much, why, what to change, is it right.

    `memory`: what the device's memory delivers, in GB/s.
    """
    figures, did, label = best.figures, best.method, best.of.label
    gained, v, length = figures["speedup_percent"], figures["verify_cost"], did["mean_acceptance_length"]
    ours, auto, lines = [one for one in means if not one.of.library], best.of.draft_tokens == "auto", []
    if gained is None or v is None:
        why = "Too few tokens to tell how fast it is: raise --max-new-tokens, or ask for longer answers."
        if did["rounds"] and auto:
            why = "It never drafted: at what the passes cost here, no draft token was worth it."
        return [why, *verdicts(ours, results)]
    if len(ours) > 1:
        lines.append(f"The fastest draft length in this run was {label}, picked by the data that measured it.")
    low, high = figures["speedup_interval_percent"] or figures["speedup_range_percent"]
    over = "95 % interval" if figures["speedup_interval_percent"] else "over the prompts"
    spread = f" ({over} {1 + low / 100:.2f} to {1 + high / 100:.2f})" if best.prompts > 1 else ""
    lines.append(
        f"Speculative decoding was {1 + gained / 100:.2f} times as fast{spread}. A pass of the main model yielded "
        f"{length:.2f} tokens, and α = {number(did['alpha'])} of the tested draft tokens were accepted. A verify pass "
        f"cost v = {number(v)} baseline steps, a draft step c = {number(figures['draft_cost'])}."
    )
    if figures["predicted_speedup_percent"] is not None:
        predicted, ideal = (percent(figures[f"{kind}_speedup_percent"], "+") for kind in ("predicted", "ideal"))
        lines.append(f"With {label}, these predict {predicted}; ideal, if verifying cost one step: {ideal}.")
    extremes = [(one["latency_min_s"], one["latency_max_s"]) for one in (best.baseline, did)]
    if (repeats := len(results[0].baseline.runs)) > 1:
        first, second = (f"{number(least)} to {number(most)} s" for least, most in extremes)
        lines.append(f"Fastest to slowest of {repeats} repeats: {first} (baseline), {second} (speculative).")
    # A verify pass takes at least as long as a step, so the mean acceptance length is the limit.
    if v < 0.9 or gained > 105 * length - 100 or any(most > 1.5 * least for least, most in extremes):
        lines.append("These figures cannot all be right: the machine was busy with something else. Try --repeats 5.")
    parts = {"verify": "verifying", "draft": "drafting", "prefill": "reading the prompts", "other": "all else"}
    spent = sum(did[f"{part}_s"] for part in parts)
    shares = [f"{percent(did[f'{part}_s'], whole=spent)} {words}" for part, words in parts.items()]
    lines.append(f"Its time went to {', '.join(shares)}.")
    what_if = (
        percent(figures["speedup_if_percent"][kind], "+") for kind in ("free_draft", "perfect_draft", "free_verify")
    )
    lines.append(
        "With a draft that cost nothing it would be {}, with one that is always right {}, and with verify passes as "
        "cheap as baseline steps {}.".format(*what_if)
    )
    if (least := figures["break_even_alpha"]) is None:
        lines.append("At these c and v no draft pays, however often it is right.")
    else:
        lines.append(f"At these c and v a draft pays from α = {number(least)} on, with the best K.")
    if memory and (read := figures["weight_bandwidth_gb_s"]):
        waits = "this is what it waits for, and where speculation pays."
        if read < memory / 2:
            waits = "it waits for something else, eager steps mostly for Python and kernel launches (--compile on)."
        elif read > 1.2 * memory:
            waits = "so they come from a cache of the processor, or the machine was busy with something else."
        lines.append(
            f"The baseline reads {number(read)} GB of weights a second, memory can deliver {number(memory)}: {waits}"
        )
    if gained < 0:
        hint = "" if auto else "--draft-tokens auto, or "
        lines.append(f"The draft does not pay here. Try {hint}a draft that is smaller, or right more often.")
    for other in [one for one in means if one.of.library]:  # with the same K
        alike = next((one for one in ours if one.of.draft_tokens == other.of.draft_tokens), best)
        times = number(ratio(alike.method["tokens_per_s"], other.method["tokens_per_s"]))
        lines.append(f"With {alike.of.label} it was {times} times as fast as {other.of.library}.")
    return lines + verdicts(ours, results)


def verdicts(ours: list[Comparison], results: list[Result]) -> list[str]:
    """Whether the outputs are the main model's own."""
    outcomes = [(of.prompt.label, one.of.label, of.outcomes[one.of.label]) for of in results for one in ours]
    checked = [(it, f"prompt {prompt}, {label}") for prompt, label, it in outcomes if it.runs and not it.error]
    if all(it.unchecked == SAMPLED for it, _ in checked):
        return ["The texts are sampled, so they differ: both methods draw from the main model's own distribution."]
    unchecked = [it.unchecked for it, _ in checked if it.unchecked]
    parted = [(it.divergence, where) for it, where in checked if it.divergence]
    same, total = len(checked) - len(parted) - len(unchecked), len(checked)
    which = f"{'All' if same == total else f'{same} of'} {total} outputs are"
    lines = [f"{'The output is' if total == same == 1 else which} the main model's own, token for token."]
    bug, fine = "NOT the main model's own (please report this as a bug)", "the main model's own within its rounding"
    for kind, meaning in (("mismatch", f"Mismatches, {bug}"), ("tie", f"Ties, {fine}")):
        if alike := [one for one in parted if one[0].kind == kind]:
            worst, where = max(alike, key=lambda one: one[0].gap)
            place = "both alike" if worst.index is None else f"new token {worst.index + 1}"
            whose = f" (at fault: {worst.at_fault})" if worst.at_fault else ""
            lines.append(
                f"{meaning}: {len(alike)}. The largest: {where}, {place}{whose}, gap {worst.gap:.3g} "
                f"(of the baseline {worst.baseline_gap:.3g}), rounding noise {worst.noise:.3g}."
            )
    if unchecked:
        lines.append(f"{counted(len(unchecked), 'output')} could not be checked: {unchecked[0]}.")
    return lines


def group_by_length(results: list[Result]) -> dict[str, list[Result]]:
    """The results of short, medium and long prompts, on a log scale; none unless lengths differ by 4 × or more."""
    lengths, groups = [len(one.prompt.ids) for one in results], {}
    if max(lengths) >= 4 * min(lengths):
        edges = [round(edge) for edge in numpy.geomspace(min(lengths), max(lengths) + 1, 4)]
        for low, high in itertools.pairwise(edges):
            groups[f"{low} to {high - 1} tokens"] = [one for one in results if low <= len(one.prompt.ids) < high]
    return {name: group for name, group in groups.items() if group}


class Report:
    """The report as it grows: after each prompt its rows and its part of the JSON, at the end what follows from all."""

    def __init__(self, console: Console, methods: list[Method], tokenizer):  # the baseline first
        self.console, self.tokenizer, self.methods, self.results = console, tokenizer, methods[1:], []
        self.parts = {}  # of the JSON, by the method's label
        for one in self.methods:
            part = {"method": one.library, "draft_tokens": one.draft_tokens, "costs": one.costs}
            self.parts[one.label] = part | {"prompts": [], "summary": None, "categories": {}, "by_length": {}}
        console.print()
        print_row(console, COLUMNS, "  # prompt", None)

    def add(self, result: Result, show_text: bool) -> None:
        """Take in a result, then print its rows: an interrupt in the middle leaves report and JSON the same."""
        prompt, texts = result.prompt, {}
        rows = {method.label: result.error(method) or Comparison([result], method) for method in self.methods}
        told = {"prompt": prompt.text, "prompt_tokens": len(prompt.ids) or None, "number": prompt.number}
        told |= {"turn": prompt.turn, "category": prompt.category, "question_id": prompt.question_id}
        for method, one in zip(self.methods, rows.values(), strict=True):
            part = told | {"error": result.error(method)}
            self.parts[method.label]["prompts"].append(part)
            if isinstance(one, str):
                kind = "compared" if method.library else "speculative"
                part |= dict.fromkeys(("baseline", kind, "speedup_percent", "identical", "divergence"))
                continue
            outcome = result.outcomes[method.label]
            for did, run in ((one.baseline, result.baseline.run), (one.method, outcome.run)):
                text = self.tokenizer.decode(run.token_ids, skip_special_tokens=True)
                did |= {"first_token_s": run.first_token_s or None, "text": text, "token_ids": run.token_ids}
            for key, of in (("rounds_drafted", "drafted"), ("rounds_accepted", "accepted"), ("rounds_s", "round_s")):
                one.method[key] = [getattr(each, of) for each in outcome.run.rounds]
            divergence = outcome.divergence and dataclasses.asdict(outcome.divergence)
            identical = None if outcome.unchecked else not divergence
            part |= one.json | {"identical": identical, "divergence": divergence, "unchecked": outcome.unchecked}
            if show_text and not method.library:
                texts[method.label] = outcome.run
        self.results.append(result)
        print_prompt(self.console, f"{prompt.label:>3} {plain(prompt.text)}", rows)
        for label, run in texts.items():
            self.console.print(f"{label}:", style="bold")
            print_text(self.console, self.tokenizer, run)

    def finish(self, memory: float | None = None) -> None:
        """Print the averages, what compares categories, prompt lengths and draft lengths, and the conclusions."""
        means, tables = {}, {}  # by the method's label, over the prompts where it did not fail
        for method in self.methods:
            if done := [one for one in self.results if not one.error(method)]:
                mean = means[method.label] = Comparison(done, method)
                names = dict.fromkeys(one.prompt.category for one in done if one.prompt.category is not None)
                groups = {name: [one for one in done if one.prompt.category == name] for name in names}
                self.parts[method.label]["summary"] = mean.json
                for key, of in (("categories", groups), ("by_length", group_by_length(done))):
                    rows = tables[method.label, key] = {name: Comparison(of[name], method) for name in of}
                    self.parts[method.label][key] = {name: one.json for name, one in rows.items()}
        print_prompt(self.console, "    mean", means)
        self.console.print()
        ours = {label: mean for label, mean in means.items() if not mean.of.library}
        if not ours:
            return
        best = max(ours.values(), key=lambda one: one.method["tokens_per_s"] or 0)
        label = best.of.label
        for title, key in (("By category", "categories"), ("By prompt", "by_length")):
            if rows := tables[label, key]:
                print_summaries(self.console, f"{title}, {label}", rows | {"all prompts": best})
        if len(ours) > 1:
            print_summaries(self.console, "By draft length", ours)
            bars = []
            for name, one in ours.items():
                for kind, key in ((name, "speedup_percent"), ("  predicted", "predicted_speedup_percent")):
                    if (gained := one.figures[key]) is not None:
                        bars.append((kind, 1 + gained / 100))
            print_chart(self.console, "Times as fast as the baseline", bars, "{:.2f} ×".format)
        joint = best.method["acceptance_by_position"]["joint"]
        bars = [(f"token {place}", share) for place, share in enumerate(joint, 1)]
        title = f"Draft tokens accepted, and all before them, by position in a round ({label})"
        print_chart(self.console, title, bars, functools.partial(percent, whole=1))
        for line in conclusions(best, list(means.values()), self.results, memory):
            self.console.print(line)

    def status(self) -> int:
        """The exit status: 1 if a prompt failed, or an output is wrong or unchecked. Raises UsageError if all did."""
        ours = [method for method in self.methods if not method.library]
        errors = [result.error(method) for result in self.results for method in ours]
        if all(errors):
            raise UsageError(f"no prompt could be decoded ({errors[0]})")
        means = [self.parts[method.label]["summary"] for method in ours]
        return int(any(errors) or any(mean["mismatches"] or mean["unchecked"] for mean in means))


def save(path: str | None, option: str, text: str | None) -> None:
    """Replace a file, if one is named, at once, so that it is always whole; None: see if one can. Raises UsageError."""
    if not path:
        return
    with cli_errors(f"write {path}", f"name another file with {option}"):
        target = pathlib.Path(path).resolve()  # a link stays a link
        outputs = [path for path in ("/dev/fd/1", "/dev/fd/2") if os.path.exists(path)]
        if target.exists() and (not target.is_file() or any(map(target.samefile, outputs))):
            raise UsageError(f"{path} is not a file that can be replaced; name another with {option}")
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_text(text or "", encoding="utf-8")
            if text is not None:
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


# 10  Loading ----------------------------------------------------------------------------------------------------------


def read_prompts(path: str, limit: int | None = None) -> list[Question]:
    """A file's prompts, one a line, or `limit` of them, spread evenly over the categories. Raises UsageError."""
    with cli_errors(f"read {path}", "name a text file with --prompts"):
        lines, prompts = pathlib.Path(path).read_bytes().split(b"\n"), []
    for line, content in enumerate(lines, 1):
        where, number = f"{path}, line {line}", len(prompts) + 1
        with cli_errors(f"read {where}", "save the file as UTF-8"):
            text = content.decode("utf-8-sig").strip()
        if text and path.lower().endswith(".jsonl"):  # one object a line
            prompts.append(parse_prompt(text, where, number))
        elif text and not text.startswith("#"):
            prompts.append(Question(text, number))
    if not prompts:
        raise UsageError(f"{path} has no prompts; write one on each line")
    ranks = defaultdict(itertools.count)  # each prompt's place within its category
    chosen = sorted(prompts, key=lambda prompt: next(ranks[prompt.category]))[:limit]
    return sorted(chosen, key=lambda prompt: prompt.number)


def parse_prompt(line: str, where: str, number: int) -> Question:
    """An object of a .jsonl file: a text or turns, at the first key that it has of those below. Raises UsageError."""

    def checked(text: Any, key: str) -> str:
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f'{where}, {key}: no text; write one string, as {{"prompt": "…"}} or {{"turns": ["…"]}}')
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise UsageError(f"{where}, {key}: half of a surrogate pair is not a character; leave it out")
        return text

    with cli_errors(f"read {where}: this is not JSON", "write one object a line"):
        entry = json.loads(line)
    entry = entry if isinstance(entry, dict) else {}
    keys = ("prompt", "turns", "question", "problem", "instruction", "messages")  # the last as OpenAI has them
    key = next((key for key in keys if entry.get(key) is not None), "prompt")
    content, earlier, later = entry.get(key), [], []
    several = isinstance(content, list) and len(content) > 0
    if key == "turns" and several:
        text, *later = [checked(turn, f"turns[{place}]") for place, turn in enumerate(content)]
    elif key == "messages" and several:
        for place, message in enumerate(content):
            message, name = message if isinstance(message, dict) else {}, f"messages[{place}]"
            roles = ("system", "user", "assistant") if place < len(content) - 1 else ("user",)
            if message.get("role") not in roles:
                raise UsageError(f"{where}, {name}.role: not {' or '.join(roles)}")
            text = checked(message.get("content"), f"{name}.content")
            earlier.append({"role": message["role"], "content": text})
        earlier.pop()  # the text itself
    else:
        text = checked(content, key)
    if key == "instruction" and entry.get("input"):
        text += "\n\n" + checked(entry["input"], "input")
    category, question_id = map(entry.get, ("category", "question_id"))
    named = {"category": None if category is None else str(category)}
    named |= {"question_id": question_id if isinstance(question_id, str | int) else None}
    return Question(text, number, 1 if later else None, earlier=tuple(earlier), later=tuple(later), **named)


def choose_device(wanted: str, world: accelerate.PartialState) -> torch.device:
    """The device named on the command line, or the accelerator if there is one, else the CPU. Raises UsageError."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if wanted == "auto":
        return world.device if world.num_processes > 1 else accelerator
    with cli_errors(f"use the device {wanted!r}", f"PyTorch finds {accelerator} here: use --device auto"):
        (probe := torch.zeros(1, device=wanted)).item()
        if probe.device.type != "cpu":
            torch.accelerator.set_device_index(probe.device)  # the one whose events `mark` records
        return probe.device


def device_name(device: torch.device) -> str:
    """What the device calls itself, e.g. "NVIDIA H100" or "AMD EPYC"."""
    if device.type != "cpu":
        name = getattr(torch.get_device_module(device), "get_device_name", None)
        return name(device) if name else device.type
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n")
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


@functools.cache
def ask_hub(name: str) -> huggingface_hub.ModelInfo | Exception:
    """What the hub says of a model, once and not for long: downloads themselves would try again for half a minute."""
    try:
        return huggingface_hub.HfApi().model_info(name, timeout=4, files_metadata=True)
    except Exception as error:  # whatever network and hub come up with
        return error


@functools.cache
def fetch(name: str, weights: bool = False) -> str:
    """A model's folder: the name itself, or what the hub has by that name, without its code. Raises UsageError."""
    if os.path.isdir(name):
        return name
    about, patterns = ask_hub(name), ["*.json", "*.jinja", "*.model", "*.txt", *["*.safetensors"] * weights]
    try:
        if isinstance(about, hub_errors.HFValidationError | hub_errors.RepositoryNotFoundError):
            raise about
        only_local = {"etag_timeout": 5, "local_files_only": isinstance(about, Exception)}
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"], **only_local)
    except Exception as error:
        status = getattr(getattr(about, "response", None), "status_code", None)
        access = f"accept its licence at https://huggingface.co/{plain(name)}, then `hf auth login`"
        answer = f"answers with status {status}" if status else "cannot be reached"
        unread = f"{answer}: check the connection, name local folders with --main and --draft, or try --demo"
        if status in (401, 403):
            unread = f"does not let you read {name} (status {status}): {access} with a valid token"
        failed = f"cannot download {name}: {first_line(error)}; try again, or name a local folder"
        if getattr(error, "errno", None) == errno.ENOSPC:
            failed = f"the disk is full: {name} cannot be downloaded; make room, or set HF_HOME to a folder elsewhere"
        absent, spelling = f"there is no folder {name}, and", "check the spelling, or `hf auth login` if it is private"
        reasons = {
            hub_errors.HFValidationError: f"{absent} no model on the hub can have that name",
            hub_errors.GatedRepoError: f"{name} is a gated model, and you have no access: {access}",
            hub_errors.RepositoryNotFoundError: f"{absent} the hub shows no model of that name: {spelling}",
            hub_errors.LocalEntryNotFoundError: f"{name} is not on this machine, and the hub {unread}",
            Exception: failed,
        }
        raise UsageError(next(why for kind, why in reasons.items() if isinstance(error, kind))) from error


class ModelFiles(NamedTuple):
    """A model before its weights are loaded."""

    name: str
    config: transformers.PreTrainedConfig
    model: PreTrainedModel  # of meta tensors, which have no storage
    parameters: int
    weight_bytes: int
    quantization: str  # "" if there is none


def checkpoint_bytes(name: str) -> int:
    """The size of a model's safetensors files: in its folder, or, before they are downloaded, as the hub states it."""
    about = None if os.path.isdir(name) else ask_hub(name)
    sizes = {path.name: path.stat().st_size for path in pathlib.Path(fetch(name)).iterdir()}
    if isinstance(about, huggingface_hub.ModelInfo):
        sizes = {file.rfilename: file.size or 0 for file in about.siblings or ()}
    return sum(size for file, size in sizes.items() if re.fullmatch(r"(?!consolidated)[^/]*\.safetensors", file))


def read_quantization(name: str, config: Any, device: torch.device | str, dense: int) -> tuple[str, int]:
    """A quantised model's format, e.g. "4 bit, awq", and its weights' bytes; else "", `dense`. Raises UsageError."""
    stated = [getattr(part, "quantization_config", None) for part in (config, config.get_text_config())]
    if not (stated := stated[0] or stated[1]):
        return "", dense
    with cli_errors(f"run {name}, which is quantised", "install what that asks for, or take another checkpoint of it"):
        quantizer = transformers.quantizers.AutoHfQuantizer.from_config(copy.deepcopy(stated), pre_quantized=True)
        quantizer.validate_environment(device_map={"": device}, weights_only=True)
        method = stated.get("quant_method", "bitsandbytes")
        bits = re.findall(r'(?:bits?": |load_in_(?=\dbit": true)|[Ii]nt)(\d{1,2})(?!\d)', json.dumps(stated))
        words = ", ".join([*(f"{number} bit" for number in sorted(map(int, bits))[:1]), method])
        # compressed-tensors does so in the first pass; others when loaded, where the device lacks kernels for them.
        if method == "compressed-tensors" or getattr(quantizer.quantization_config, "dequantize", False):
            return f"{words}, decompressed to run", dense
        return words, checkpoint_bytes(name) or dense


def read_model_files(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> ModelFiles:
    """Build a model of meta tensors from its configuration. Raises UsageError for one that cannot be rolled back."""
    limits = {"num_hidden_layers": 1000, "hidden_size": 2**20, "intermediate_size": 2**22, "vocab_size": 2**24}
    limits |= {"num_attention_heads": 2**12, "num_key_value_heads": 2**12, "max_position_embeddings": 2**30}
    limits |= {"sliding_window": 2**30}
    with cli_errors(f"load {name}", "the folder needs the config.json of a causal language model, complete"):
        written, _ = transformers.PreTrainedConfig.get_config_dict(fetch(name))
        keys = written.keys() & {"speculators_config", "medusa_num_heads", "draft_vocab_size"}
        kind = str([written.get("architectures"), written.get("model_type"), *keys])
        if head := re.search(r"(?i)\w*(eagle|medusa|mtp|dflash|speculator|_assistant|draft_vocab)\w*", kind):
            why = f"{name} is no model of its own but works within another ({head[0]})"
            raise UsageError(f"{why}: take a small model of the main model's family, or --draft ngram")
        for field, most in limits.items():  # before anything is built
            value = written.get("text_config", written).get(field)
            if value is not None and not (isinstance(value, int) and 1 <= value <= most):
                raise UsageError(f"{name}: {field} is {value!r} in its config.json; it must be from 1 to {most:,}")
        config = AutoConfig.from_pretrained(fetch(name), trust_remote_code=False)
        if config.is_encoder_decoder:
            raise UsageError(f"{name} is an encoder-decoder; both models must be decoders only (Llama, Gemma, Qwen, …)")
        kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
        if not kind:
            raise UsageError(f"{name} ({config.model_type}) is not a text-generation model; take a decoder")
        # The library's marks of what cannot go back: Mamba, RWKV, linear attention.
        croppable = all(layer.is_croppable for layer in DynamicCache(config=config).layers)
        if getattr(kind, "_is_stateful", False) or not croppable:
            raise UsageError(
                f"{name} ({config.model_type}) has a state that cannot be rolled back; take an attention model"
            )
        with accelerate.init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
    quantization, weights = read_quantization(name, config, device, model.num_parameters() * dtype.itemsize)
    return ModelFiles(name, config, model, model.num_parameters(), weights, quantization)


class PeakMemory(TorchDispatchMode):
    """Sees all tensors that are made within it, on any device; `peak`: the most bytes of them at one time."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.weights = {part.untyped_storage() for part in (*model.parameters(), *model.buffers())}  # do not count
        self.storages, self.peak = weakref.WeakSet(), 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        tensors = outputs if isinstance(outputs, tuple | list) else [outputs]
        made = {tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)}
        self.storages.update(made - self.weights)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages))
        return outputs


def prefill_memory(model: PreTrainedModel, tokens: int) -> tuple[int, int]:
    """The most bytes that a prefill of a model of meta tensors takes beside the weights; and those of the KV cache."""
    cached = CachedModel(model)
    # Some mixtures of experts do not run on meta tensors in float32: of them it sees too little.
    with contextlib.suppress(Exception), PeakMemory(model) as memory:
        cached.prefill(torch.zeros(1, tokens, dtype=torch.long, device="meta"))
    return memory.peak, sum(storage.nbytes() for storage in memory.storages)


def free_memory(device: torch.device) -> int:
    """The bytes that are free on a device. MPS shares the CPU's memory."""
    if device.type in ("cuda", "xpu"):
        return torch.accelerator.get_memory_info(device)[0]
    return psutil.virtual_memory().available


def memory_limits(device: torch.device) -> dict[int | str, int]:
    """What each device may take of a model that is spread: what is free by now, less a tenth to work in."""
    free = {"mps" if device.type == "mps" else "cpu": free_memory(torch.device("cpu"))}
    for index in range(torch.accelerator.device_count() if device.type in ("cuda", "xpu") else 0):
        free[index] = free_memory(torch.device(device.type, index))
    return {key: int(0.9 * size) for key, size in free.items()}


PAIRS = (  # main, draft, GB of the weights of both in bfloat16, whether they are gated; the largest first
    ("google/gemma-2-27b-it", DEFAULT_DRAFT, 59.7, True),
    ("Qwen/Qwen2.5-14B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", 30.5, False),
    (DEFAULT_MAIN, DEFAULT_DRAFT, 23.7, True),
    ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", 16.2, False),
    ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", 3.7, False),
)


def pairs_that_fit(device: torch.device, dtype: torch.dtype, refused: list[str], gated: bool = True) -> str:
    """The options for the largest of PAIRS that fits into what is free, and for the largest that is not gated."""
    scale, room = dtype.itemsize / 2, 0.9 * free_memory(device) / 1e9  # a tenth to work in
    fitting = [row for row in PAIRS if row[2] * scale <= room and list(row[:2]) != refused]
    ungated = [row for row in fitting if not row[3]]
    chosen = dict.fromkeys(fitting[:gated] + ungated[:1])
    return " or ".join(f"--main {main} --draft {draft} ({gb * scale:.1f} GB)" for main, draft, gb, _ in chosen)


def check_memory(files: dict[str, ModelFiles], device: torch.device, prompt: int, text: int, is_compiled: bool) -> None:
    """Raise UsageError if the pair takes more than is free; in tokens, the longest prompt, and the most of a text."""
    free, parts, working = free_memory(device) / 1e9, [], 0.0
    needed = 0.0 if device.type == "cpu" else 1.0  # what an accelerator's libraries load, and gaps between allocations
    for role, of in files.items():
        weights = of.weight_bytes / 1e9
        peak, grown = (size / 1e9 for size in prefill_memory(of.model, prompt))
        cache = grown * text / prompt
        needed += weights + cache
        working = max(working, peak if is_compiled else peak - grown)  # a compiled model copies its cache from that one
        parts.append(f"{role} {of.name} {weights:.1f} + {cache:.1f}")
    needed, dtype = needed + working, files["main"].model.dtype
    if needed <= free:
        return
    others = pairs_that_fit(device, dtype, [of.name for of in files.values()])
    hints = ["--device-map auto"] * (device.type != "cpu") + ["a smaller pair" + f": {others}" * bool(others)]
    if dtype == torch.float32 and needed / 2 <= free:
        hints.insert(0, "--dtype bfloat16 (half of it)")
    raise UsageError(
        f"the models need {needed:.1f} GB in {str(dtype)[6:]} (weights + KV cache: {', '.join(parts)}; working memory "
        f"for a prompt of {prompt:,} tokens: {working:.1f}), and {device} has {free:.1f} GB free: "
        f"try {', or '.join(hints)}"
    )


def load_model(name: str, config: transformers.PreTrainedConfig, dtype: torch.dtype, **placement) -> PreTrainedModel:
    """Load a model's weights, to where `placement` says. Raises UsageError for what is broken or does not fit."""
    how = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True, **placement}
    with cli_errors(f"load {name}", "it needs memory, and safetensors weights of a causal language model, complete"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            fetch(name, weights=True), config=config, dtype=dtype, **how
        )
    if missing := sorted(loading["missing_keys"]):
        raise UsageError(f"{name} lacks {len(missing)} of its weights ({missing[0]}, …): download a whole model")
    return model


def load_tokenizer(names: list[str]) -> tuple[transformers.PreTrainedTokenizerBase, int]:
    """The first model's tokenizer, and how many ids all know alike: beyond, only added tokens. Raises UsageError."""
    tokenizers, ordinary = [], False
    for name in names:
        with cli_errors(f"load the tokenizer of {name}", "download it again"):
            tokenizers.append(AutoTokenizer.from_pretrained(fetch(name), trust_remote_code=False))
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    differing = vocabularies[0].items() ^ vocabularies[-1].items()
    shared = min((token_id for _, token_id in differing), default=sys.maxsize)
    for tokenizer, vocabulary in zip(tokenizers, vocabularies, strict=True):
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        ordinary |= any(token_id >= shared and token not in special for token, token_id in vocabulary.items())
    two_meanings = {token_id for _, token_id in differing}.intersection(*(of.values() for of in vocabularies))
    if ordinary or two_meanings or not shared:
        token = min(differing)[0]
        sizes, ids = zip(*[(f"{len(of):,}", str(of.get(token, "nothing"))) for of in vocabularies], strict=True)
        raise UsageError(
            f"{' and '.join(names)} have different tokenizers ({' and '.join(sizes)} tokens; {token!r} is "
            f"{' and '.join(ids)}): take a draft of the main model's family, or --draft ngram"
        )
    return tokenizers[0], shared


def encode(tokenizer, text: str, chat: bool, earlier: tuple[dict, ...] = (), switches: dict | None = None) -> list[int]:
    """The ids of a text behind earlier messages, within the chat template if `chat`; `switches`: arguments for it.

    Without it, answers follow directly, other texts after a blank line. A <bos> that is written already is not added.
    """
    messages = [*earlier, {"role": "user", "content": text}]
    if chat:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **(switches or {}))
    else:
        parts = [("" if one["role"] == "assistant" else "\n\n") + one["content"] for one in messages]
        text = "".join(parts).removeprefix("\n\n")
    is_complete = chat or (tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token))
    return tokenizer(text, add_special_tokens=not is_complete)["input_ids"]


def end_tokens(model: PreTrainedModel, tokenizer) -> frozenset[int]:
    """All tokens that end a text: those of the model's generation config, and the tokenizer's own."""
    ids = model.generation_config.eos_token_id
    return frozenset([*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id]) - {None}


# 11  The command line -------------------------------------------------------------------------------------------------

BUNDLED = pathlib.Path(__file__).resolve().parent / "tests" / "tiny_gemma2"
DRAFTS_WITHOUT_MODEL = {"ngram": NgramDraft}  # by what --draft calls them


def longest_draft(draft_tokens: tuple[int | str, ...]) -> int:
    """The most tokens that any round may draft."""
    return max(LONGEST_AUTO if length == "auto" else length for length in draft_tokens)


def resolve_defaults(given: argparse.Namespace, device: torch.device) -> tuple[Any, list[str]]:
    """The settings in force on this machine, and what the user must be told of them. Raises UsageError."""
    if given.demo and (given.main or given.draft not in (None, *DRAFTS_WITHOUT_MODEL)):
        raise UsageError("--demo brings its own models: leave out --main and --draft, or --demo")
    with cli_errors(f"take --max-memory {given.max_memory}", "write a size such as 10GB or 500MB"):
        accelerate.utils.convert_file_size_to_int(given.max_memory or 0)
    notices, main, draft = [], given.main or DEFAULT_MAIN, given.draft or DEFAULT_DRAFT
    demo = given.demo or (device.type == "cpu" and not given.main and given.draft in (None, *DRAFTS_WITHOUT_MODEL))
    if demo:
        why = "This" if given.demo else "No GPU in use: this"
        notices.append(f"{why} is the bundled pair of tiny models. Its speed says nothing about Gemma's.")
        if not (BUNDLED / "main").is_dir():
            raise UsageError(f"no bundled pair in {BUNDLED}: clone the whole project, or name --main and --draft")
        main, draft = os.path.relpath(BUNDLED / "main"), given.draft or os.path.relpath(BUNDLED / "draft")
    elif given.main and not given.draft:
        notices.append(f"The draft is {DEFAULT_DRAFT}, the default: name another with --draft.")
    prompts = given.prompts or os.path.relpath((BUNDLED if demo else BUNDLED.parent.parent) / "prompts.txt")
    files = Counter(os.path.realpath(path) for path in (prompts, given.json, given.svg) if path)
    if max(files.values()) > 1:
        raise UsageError("--json and --svg need files of their own, which are not the prompts'; name others")
    is_compiled = given.compile == "on" or given.compile == "auto" and device.type == "cuda" and not given.device_map
    automatic = "float32" if device.type == "cpu" else "bfloat16"
    dtype = automatic if given.dtype == "auto" else given.dtype
    if device.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        notices.append("This GPU emulates bfloat16, which is slow: try --dtype float32 (Gemma 2 overflows in float16).")
    resolved = {"main": main, "draft": draft, "demo": demo, "prompts": prompts, "device": str(device), "dtype": dtype}
    resolved = vars(given) | resolved | {"compile": "on" if is_compiled else "off"}
    return dataclasses.make_dataclass("Settings", resolved, frozen=True)(**resolved), notices


def encode_prompts(
    prompts: list[Question], tokenizer, settings: Any, context: float, vocabulary: int
) -> list[Question]:
    """The prompts that fit into the context, with their ids, all below `vocabulary`. Raises UsageError."""
    switches, fitting, longest = settings.chat_template_args, [], 0
    hint = "check --chat-template-args" if switches else "--no-chat-template feeds it as it is"
    chat = bool(switches) or (not settings.no_chat_template and tokenizer.chat_template is not None)
    # The last round may draft beyond the last new token; and costs are measured with one such round behind a prompt.
    room = max(settings.max_new_tokens, 2) + longest_draft(settings.draft_tokens) - 1
    for prompt in prompts:
        with cli_errors(f"put prompt {prompt.label} into the chat template", hint):
            ids = tuple(encode(tokenizer, prompt.text, chat, prompt.earlier, switches))
            later = [encode(tokenizer, text, chat, switches=switches) for text in prompt.later]
        if not ids:
            raise UsageError(f"prompt {prompt.label} of {settings.prompts} comes to no tokens; leave it out")
        if max(ids) >= vocabulary:
            raise UsageError(f"the tokenizer of {settings.main} has tokens that the model lacks; download it again")
        longest = max(longest, len(ids))
        if len(ids) + room <= context:
            new = settings.max_new_tokens
            bound = len(ids) + sum(new + 8 + len(turn) for turn in later)  # 8: to end an answer in the template
            fitting.append(dataclasses.replace(prompt, ids=ids, max_new_tokens=new, longest=bound))
    if not fitting:
        raise UsageError(
            f"{longest} tokens, and {room} for output and draft, exceed the context of {context}: shorten all prompts "
            f"of {settings.prompts}, or lower --max-new-tokens, --draft-tokens"
        )
    return fitting


def next_turn(tokenizer, settings: Any, context: float, vocabulary: int, result: Result) -> Question | None:
    """The prompt that goes on from the baseline's answer; with an error if there is no answer, or it does not fit."""
    before = result.prompt
    if not before.later:
        return None
    turn = {"turn": before.turn + 1, "text": before.later[0], "later": before.later[1:], "ids": ()}
    if result.baseline.error:
        return dataclasses.replace(before, **turn, error=f"turn {before.turn} has no answer to go on from")
    answer = tokenizer.decode(result.baseline.run.token_ids, skip_special_tokens=True)
    said = ({"role": "user", "content": before.text}, {"role": "assistant", "content": answer})
    prompt = dataclasses.replace(before, **turn, earlier=before.earlier + said)
    try:
        return encode_prompts([prompt], tokenizer, settings, context, vocabulary)[0]
    except UsageError as error:
        return dataclasses.replace(prompt, error=f"turn {prompt.turn}: {error}")


def read_pair(settings: Any, device: torch.device) -> dict[str, ModelFiles]:
    """The main model and, if it is one, the draft, before their weights are loaded. Raises UsageError."""
    names, dtype = {"main": settings.main}, getattr(torch, settings.dtype)
    if settings.draft not in DRAFTS_WITHOUT_MODEL:
        names["draft"] = settings.draft
    try:
        return {role: read_model_files(name, dtype, device) for role, name in names.items()}
    except UsageError as error:
        others = pairs_that_fit(device, dtype, list(names.values()), gated=False)
        if "accept its licence" in str(error) and others:
            raise UsageError(f"{error}; or take a pair that needs none: {others}") from error
        raise


def load_pair(settings: Any, files: dict[str, ModelFiles], device: torch.device, scratch: str) -> dict:
    """The models with their weights, by their roles. Raises UsageError."""
    models = {}
    for role, of in reversed(files.items()):  # the draft first: it wants one device for itself
        placement = {"device_map": device}
        if settings.device_map and role == "main":  # into what is free by now
            limits = memory_limits(device)
            first = device.type if device.type in limits else device.index or 0
            limits[first] = min(limits[first], accelerate.utils.convert_file_size_to_int(settings.max_memory or 2**60))
            placement = {"device_map": "auto", "max_memory": limits, "offload_folder": scratch}
        models[role] = load_model(of.name, of.config, of.model.dtype, **placement)
    return models


def wrap_pair(settings: Any, models: dict, shared: int, device: torch.device, bounds: list[int]) -> tuple:
    """The main model, Draft and Sampler; to be compiled, with these bounds of the caches, or eager without any.

    `shared`: how many ids both tokenizers know alike.
    """
    sampler = Greedy()
    if settings.temperature:
        sampler = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed, device)
    # The draft proposes tokens that both models have and both tokenizers know; the main model generates any of its own.
    vocabularies = {"draft": min(shared, *(model.config.get_text_config().vocab_size for model in models.values()))}
    kind = CompiledModel if bounds else CachedModel
    cached = {role: kind(model, vocabularies.get(role), device, *bounds) for role, model in models.items()}
    draft = ModelDraft(cached["draft"], sampler) if "draft" in cached else DRAFTS_WITHOUT_MODEL[settings.draft](device)
    return cached["main"], draft, sampler


def describe(console: Console, settings: Any, files: dict[str, ModelFiles], environment: dict, prompts: int) -> None:
    """Print what is about to run."""
    console.print("Speculative decoding: does the draft pay?", style="bold")
    rows = {}
    if draft := DRAFTS_WITHOUT_MODEL.get(settings.draft):
        rows["draft"] = (settings.draft, draft.description)
    for role, of in files.items():
        layers = counted(of.config.get_text_config().num_hidden_layers, "layer")
        facts = filter(None, [f"{of.parameters / 1e6:,.1f} M parameters", layers, of.quantization])
        rows[role] = (plain(of.name), ", ".join(facts))
    for role, (name, description) in sorted(rows.items(), reverse=True):
        console.print(f"  {role:<5}  {name:<{max(len(name) for name, _ in rows.values())}}  {description}")
    threads = f", {counted(environment['threads'], 'thread')}" if environment["device"] == "cpu" else ""
    processes = f" in each of {environment['processes']} processes" if environment["processes"] > 1 else ""
    machine = f"{environment['device']} ({plain(environment['device_name'])}{threads}){processes}"
    console.print(f"  {machine}, {settings.dtype}, {'compiled' if settings.compile == 'on' else 'eager'}")
    lengths, limit = " / ".join(map(str, settings.draft_tokens)), counted(settings.max_new_tokens, "new token")
    console.print(f"  K = {lengths}, up to {limit}, {counted(prompts, 'prompt')}")
    if settings.chat_template_args:
        console.print(f"  chat template with {json.dumps(settings.chat_template_args)}")
    if settings.temperature:
        cuts = f"top-k {settings.top_k or 'off'}, top-p {settings.top_p:g}, seed {settings.seed}"
        console.print(f"  temperature {settings.temperature:g}, {cuts}; log-likelihoods are at temperature 1, uncut")


def run(given: argparse.Namespace, scratch: str) -> int:
    """Do what the options ask for, with a folder for temporary files; return the exit status. Raises UsageError."""
    # One process, or one of several that torchrun or `accelerate launch` started: the prompts are dealt out to them.
    on_cpu = given.device == "cpu" or not torch.accelerator.is_available()
    world = accelerate.PartialState(cpu=on_cpu, timeout=datetime.timedelta(days=1))  # wait for the slowest
    plainly = {"markup": False, "emoji": False, "highlight": False, "quiet": not world.is_main_process}
    console = Console(width=None if sys.stdout.isatty() else 120, record=bool(given.svg), **plainly)
    errors = Console(stderr=True, soft_wrap=True, **plainly)
    device = choose_device(given.device, world)
    settings, notices = resolve_defaults(given, device)
    for notice in notices:
        console.print(notice)
    for path, option in ((settings.json, "--json"), (settings.svg, "--svg")):
        save(path, option, None)  # better to fail now than when all is measured

    prompts, files = read_prompts(settings.prompts, settings.limit), read_pair(settings, device)
    names = [of.name for of in files.values()]
    tokenizer, shared = load_tokenizer(names)
    configs = [of.config.get_text_config() for of in files.values()]
    context = min(getattr(config, "max_position_embeddings", None) or math.inf for config in configs)
    vocabulary = configs[0].vocab_size
    found, prompts = len(prompts), encode_prompts(prompts, tokenizer, settings, context, vocabulary)
    if len(prompts) < found:
        errors.print(f"warning: {found - len(prompts)} of {found} prompts exceed the context of {context}: left out")
    by_length = sorted(prompts, key=lambda prompt: len(prompt.ids))
    room = settings.max_new_tokens + longest_draft(settings.draft_tokens) + 1  # for output, and the last round's draft
    longest = min(context, max(prompt.longest for prompt in prompts))  # of all turns
    if not settings.device_map:
        check_memory(files, device, longest, longest + room, settings.compile == "on")

    environment = {"device": device.type, "device_name": device_name(device), "dtype": settings.dtype}
    environment |= {"threads": torch.get_num_threads(), "processes": world.num_processes}
    environment |= {"python": platform.python_version(), "torch": torch.__version__}
    environment |= {"transformers": transformers.__version__, "memory_bandwidth_gb_s": None}
    turns = [1 + len(prompt.later) for prompt in prompts]
    dealt = [sum(turns[process :: world.num_processes]) for process in range(world.num_processes)]
    describe(console, settings, files, environment, sum(turns))
    errors.print(f"Loading {' and '.join(map(plain, names))} …", style="dim")
    models = load_pair(settings, files, device, scratch)
    ends = frozenset() if settings.ignore_eos else end_tokens(models["main"], tokenizer)
    prompts = [dataclasses.replace(prompt, end_ids=ends) for prompt in prompts]
    start, pair = time.perf_counter(), None
    if settings.compile == "on":
        try:
            lengths = [len(prompt.ids) + room for prompt in prompts] + [longest + room]
            pair = wrap_pair(settings, models, shared, device, cache_bounds(lengths))
            compile_steps(*pair, settings.draft_tokens, functools.partial(errors.print, style="dim"))
        except Exception as error:  # a compiler can fail in any way; eager runs can be measured all the same
            console.print(f"warning: compiling failed, so this runs eagerly: {first_line(error)}")
            settings, pair = dataclasses.replace(settings, compile="off"), None
    compile_s = time.perf_counter() - start
    main, draft, sampler = pair or wrap_pair(settings, models, shared, device, [])
    methods = our_methods(main, draft, sampler, settings.draft_tokens, by_length[len(by_length) // 2])
    if settings.compare:
        methods += library_methods(main, draft, sampler, settings.draft_tokens)
    report = Report(console, methods, tokenizer)

    def write_json(complete: bool) -> None:
        told = {"environment": environment, "settings": dataclasses.asdict(settings) | {"compile_s": compile_s}}
        told["runs"] = [part for part in report.parts.values() if not part["method"]]
        told |= {"compared": [part for part in report.parts.values() if part["method"]], "complete": complete}
        save(settings.json, "--json", json.dumps(told, indent=2, allow_nan=False) + "\n")

    # A bar that redraws itself would take time from what is timed: this one is drawn between the runs only.
    mine = prompts[world.process_index :: world.num_processes]
    columns = TextColumn("{task.description}"), BarColumn(20), TimeRemainingColumn()
    quiet = {"transient": True, "auto_refresh": False, "disable": not errors.is_interactive}
    bar = Progress(*columns, console=errors, speed_estimate_period=1e6, **quiet)
    task = bar.add_task("", total=len(methods) * (settings.warmup + settings.repeats * dealt[world.process_index]) + 1)

    def announce(prompt: Question, what: str) -> None:
        bar.start()
        bar.update(task, description=f"prompt {prompt.label}: {what}", advance=1, refresh=True)

    check = functools.partial(check_outputs, main, bool(settings.temperature))
    limit = min(context, longest + room) if settings.compile == "on" else context
    go_on = functools.partial(next_turn, tokenizer, settings, limit, vocabulary)
    results = benchmark(mine, methods, check, settings.repeats, settings.warmup, announce, device, go_on)
    stopped = None
    try:
        for _ in range(max(dealt)):
            with cli_errors("hear from the other processes", "see what they say, and start again"):
                everyones = accelerate.utils.gather_object([next(results, None)])
            bar.stop()
            for result in filter(None, everyones if world.is_main_process else ()):
                report.add(result, settings.show_text)
                write_json(complete=False)
    except (KeyboardInterrupt, UsageError) as error:
        stopped = error  # and on: what was measured so far is reported all the same
    finally:
        bar.stop()
    if not world.is_main_process:
        return 0
    done = len(report.results)
    if any(outcome.runs for result in report.results for outcome in result.outcomes.values()):
        if stopped:
            console.print(f"Only {done} of {sum(turns)} prompts: a part of the result.", style="bold")
        # Measured last, so that no peak of memory counts it. If there is no memory left for it, nothing is said of it.
        with contextlib.suppress(Exception):
            environment["memory_bandwidth_gb_s"] = memory_bandwidth_gb_s(device)
        report.finish(environment["memory_bandwidth_gb_s"])
        if not isinstance(stopped, UsageError):
            write_json(complete=not stopped)
        save(settings.svg, "--svg", console.export_svg(title="speculative_decoding.py") if settings.svg else None)
    if isinstance(stopped, KeyboardInterrupt):
        errors.print(f"Interrupted after {done} of {sum(turns)} prompts.")
        return 130
    if stopped:
        raise stopped
    return report.status()


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status: 0 well, 1 not all is well with some prompt, 2 it could not, 130 Ctrl-C."""
    given = parse(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for library in ("accelerate", "huggingface_hub"):  # what they would say is said in one line, or in the table
        logging.getLogger(library).setLevel(logging.CRITICAL)

    latest = [-math.inf]

    def interrupt(*_) -> None:
        if time.monotonic() - latest[0] > 1:  # two in a row are one: what follows is the report
            latest[0] = time.monotonic()
            raise KeyboardInterrupt

    for asked_to_end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked_to_end, interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="speculative-decoding-") as scratch:
            return run(given, scratch)
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
            print(f"error: {plain(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except SystemExit:  # nobody reads the output any more
        return 2
    except OSError as error:
        why = f"{first_line(error)}, where the report or temporary files go"
        print(f"error: cannot go on: {why}; make room, or send them elsewhere", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again
        return 2


if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would kill Python while it shuts down
    sys.exit(status)

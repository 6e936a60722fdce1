#!/usr/bin/env python3
"""Speculative decoding: how much faster is it with this pair of models, on this machine, and is the output unchanged?

    python speculative_decoding.py                       gemma-2-9b-it and gemma-2-2b-it on the GPU, prompts.txt
    python speculative_decoding.py --demo                a bundled pair of tiny models: anywhere, offline, in seconds
    python speculative_decoding.py --main A --draft B --prompts my.txt

The idea (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). A large language model writes
one token per forward pass, and a pass spends its time reading the weights from memory. Reading them once to look at
five tokens costs hardly more than to look at one. So a small *draft* model guesses the next K tokens, one by one, and
the large *main* model looks at all of them in a single pass, which says at each place what it would have written
itself. The guesses are kept up to the first wrong one, and in its place stands the main model's own token:

    the text so far              The capital of France is
    the draft guesses            Paris , which is
    the main model would write   Paris . It lies on                  (one pass: one token more than was guessed)
    so the text goes on          Paris .

One pass of the main model gave two tokens, and both are exactly those that it would have written alone. That holds
for any draft; a bad one only costs time. How much a good one gains is what this program measures. Where tokens are not
chosen but drawn (--temperature), guesses are kept and thrown away by chance, in such a way that the text is drawn from
exactly the main model's own distribution.

The file is meant to be read from top to bottom. Each part uses only what stands above it:

    1  a model with a cache that can be rolled back
    2  choosing tokens: the likeliest, or drawn; and which guesses stand
    3  decoding with the main model alone (the baseline)
    4  speculative decoding: draft, verify, accept, roll back; two kinds of draft; how many tokens to draft
    5  is the output the main model's own?
    6  measuring: one prompt, all prompts, a summary
    7  reporting: tables, the result in words, texts, JSON
    8  loading: prompts, devices, models
    9  the command line

What is deliberately not here: batches of more than one text, and trees of guesses.
"""

import argparse
import collections
import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import json
import logging
import math
import os
import pathlib
import platform
import signal
import statistics
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator

if __name__ == "__main__":  # what follows takes seconds to import: Ctrl-C ends the program quietly in these, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import accelerate
import huggingface_hub
import numpy
import torch
import transformers
from huggingface_hub import errors as hub_errors
from rich.bar import Bar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

HERE = pathlib.Path(__file__).resolve().parent
BUNDLED = HERE / "tests" / "tiny_gemma2"
DEFAULT_MAIN, DEFAULT_DRAFT = "google/gemma-2-9b-it", "google/gemma-2-2b-it"
LONGEST_AUTO = 16  # the most tokens that a round drafts where the program itself chooses how many


class CannotRun(Exception):
    """The program cannot do what was asked; the message is one line that says what is wrong and how to mend it."""


# Text from models, files and other libraries is data: nothing in it controls the terminal or is taken for markup.


def safe(text: str) -> str:
    """Text with its line ends, but � instead of all else that controls or formats.

    Escape sequences, bidirectional overrides, zero-width characters, and what has no agreed look.
    """
    unsafe = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, format, surrogate, private, unassigned, separators
    return "".join("�" if unicodedata.category(char) in unsafe and char != "\n" else char for char in text)


def plain(text: str) -> str:
    """Text as one line that is safe to print: line ends, tabs and the like become spaces."""
    return safe(" ".join(text.split()))


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line of at most 300 characters."""
    said = getattr(error, "strerror", None) or str(error)
    text = plain(said.strip().partition("\n")[0]) or type(error).__name__
    return text if len(text) < 300 else text[:299] + "…"


@contextlib.contextmanager
def trying(what: str, mend: str) -> Iterator[None]:
    """Make CannotRun of any error: broken files and folders can make libraries raise anything."""
    try:
        yield
    except CannotRun:
        raise
    except Exception as error:
        raise CannotRun(f"cannot {what}: {first_line(error)}; {mend}") from error


# 1  A model with a cache that can be rolled back ----------------------------------------------------------------------


class CachedModel:
    """A causal language model, and the keys and values of the text that it has read.

    Each call reads further tokens of one text. `roll_back` forgets the latest ones again: it is what lets a wrong guess
    disappear without reading the text anew. Two caches are possible: one that grows, for eager runs, and one of fixed
    size, for compiled ones.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int | None = None, device: torch.device | None = None):
        """`vocabulary`: logits are cut to so many tokens (models of one family are padded differently).

        `device`: where its inputs go, if that is not where all of its weights are.
        """
        self.model = model.eval().requires_grad_(False)
        self.device = device or model.device
        self.vocabulary = vocabulary
        config = model.config.get_text_config()
        builds_masks = config._attn_implementation == "eager" and hasattr(config, "layer_types")  # Gemma 2 does
        self.all_seen = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=self.device) if builds_masks else None
        self.run_eagerly()

    def run_eagerly(self) -> None:
        """Have no compiled steps, and a cache that grows."""
        self.compiled = {}  # (what is made of the logits, number of tokens): the compiled step
        self.lengths = None  # of the layers of a cache of fixed size: [] on the device, each
        self.new_text()

    def new_text(self, rolls_back: bool = True) -> None:
        """Forget the text. A cache that never rolls back need not keep what leaves a sliding window."""
        if self.lengths is not None:
            self.cache.reset()  # new storage would mean new graphs
            return
        self.cache = DynamicCache(config=self.model.config)
        if rolls_back:
            self.cache.activate_past_recording()

    def prefill(self, prompt_ids: Tensor, rolls_back: bool = True) -> Tensor:
        """Begin a text with a prompt, [1, n], n ≥ 1; return the logits at its last token, [1, vocabulary]."""
        self.new_text(rolls_back)
        if self.lengths is None:
            return self.read(prompt_ids, last=1)
        grown = DynamicCache(config=self.model.config)  # faster: it holds the prompt, and not room for a whole text
        grown.activate_past_recording()
        logits = self.read(prompt_ids, last=1, cache=grown)
        for fixed, layer in zip(self.cache.layers, grown.layers, strict=True):
            if isinstance(fixed, StaticLayer):
                fixed.keys[:, :, : layer.keys.shape[2]] = layer.keys
                fixed.values[:, :, : layer.values.shape[2]] = layer.values
        torch._foreach_add_(self.lengths, prompt_ids.shape[1])
        return logits

    def read(self, ids: Tensor, last: int = 0, cache: Cache | None = None) -> Tensor:
        """Read further tokens; return the logits at each of them: what the model expects to come next.

        ids: [1, n], n ≥ 1. Returns [n, vocabulary], or [last, vocabulary] where only the last places matter.
        """
        cache = cache or self.cache
        grows = isinstance(cache, DynamicCache)
        # A single token sees all that a growing cache returns: models that would build masks to say so are given one.
        mask = self.all_seen if grows and ids.shape[1] == 1 else None
        with torch.inference_mode() if grows else torch.no_grad():  # the former is faster, but cannot be compiled
            output = self.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=last
            )
        return output.logits[0, :, : self.vocabulary]

    def roll_back(self, tokens: int) -> None:
        """Forget the latest tokens that were read; those before them are there to stay."""
        if self.lengths is not None:  # what lies behind the length is masked, and written over by the next tokens
            if tokens:
                torch._foreach_add_(self.lengths, -tokens)
        elif tokens or self.cache.get_seq_length():
            self.cache.crop(-tokens)  # by 0, too: sliding windows then drop what no roll-back can bring back

    def step(self, choose: Callable, ids: Tensor, uniform: Tensor | None = None, last: int = 1) -> tuple[Tensor, ...]:
        """Read tokens, [1, n], and make of the logits what `choose`, of the next part, makes of them.

        `last`: at how many of the last places there are logits; 0: at all. Compiled if that is compiled for n tokens,
        else eagerly: a prompt can have any length.
        """
        if (compiled := self.compiled.get((choose.__name__, ids.shape[1]))) is None:
            return choose(self.read(ids, last), ids, uniform)
        # A CUDA graph writes its outputs into the same memory each time. They are read after further steps, and even
        # become inputs of the next: so they are copied first. And the graphs must be told where a new step begins, or
        # they take outputs that are still held for memory in use, and record themselves anew.
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(output.clone() for output in compiled(ids, uniform))

    def verify(self, judge: Callable, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read the text's last token and K drafted ones, [1, K+1], in one pass.

        Returns what `judge` makes of the logits after each of them, [K+1, …], and the natural logarithm of the main
        model's probability of each drafted token, given all before it, [K], in float32: of its plain distribution,
        whatever the temperature.
        """
        tokens = ids.shape[1]
        width = min((n for name, n in self.compiled if name == judge.__name__ and n >= tokens > 1), default=tokens)
        if width == tokens:
            return self.step(judge, ids, last=0)
        # A pass of a compiled width: ignore the padding, and forget it.
        verdict, log_likelihood = self.step(judge, torch.nn.functional.pad(ids, (0, width - tokens)), last=0)
        self.roll_back(width - tokens)
        return verdict[:tokens], log_likelihood[: tokens - 1]

    def fix_size(self, capacity: int) -> None:
        """Give the cache a fixed size, for compiled steps: `capacity` is the most tokens of a text.

        Layers with sliding windows are stored in full, too: the mask hides what lies outside a window, and whole layers
        can roll back by moving a length. Raises NotImplementedError for caches of another kind.
        """
        layers = DynamicCache(config=self.model.config).layers
        if not {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}.issuperset(map(type, layers)):
            raise NotImplementedError(f"{self.model.config.model_type} needs a cache of its own kind")
        self.cache = Cache(layers=[layer if type(layer) is DummyLayer else StaticLayer(capacity) for layer in layers])
        # Read something before compiling: graphs need the storage at an address that never changes.
        self.read(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        self.lengths = [layer.cumulative_length for layer in self.cache.layers if type(layer) is StaticLayer]

    @torch.no_grad()
    def compile(self, choose: Callable, tokens: int, uniform: Tensor | None = None, last: int = 1) -> None:
        """Compile a step for a number of tokens, once; the cache must have a fixed size. Forgets the text.

        The step is compiled whole, from the tokens to what is made of the logits, so that only this leaves it. Raises
        what the compiler raises.
        """
        if (choose.__name__, tokens) in self.compiled:
            return

        def whole(ids: Tensor, uniform: Tensor | None) -> tuple[Tensor, ...]:
            return choose(self.read(ids, last), ids, uniform)

        # What mode="reduce-overhead" means; and no guards. These would check before each step, for a millisecond, that
        # nothing of the model has changed, which nothing does: the number of tokens chooses the function, see `step`.
        options = {"triton.cudagraphs": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        step = torch.compile(whole, dynamic=False, isolate_recompiles=True, options=options)
        self.compiled[choose.__name__, tokens] = step
        for _ in range(3):  # compile; capture a graph; replay it
            self.new_text()
            self.step(choose, torch.zeros(1, tokens, dtype=torch.long, device=self.device), uniform, last)


# 2  Choosing tokens ---------------------------------------------------------------------------------------------------


class Greedy:
    """The rule that chooses the likeliest token. A guess stands if it is that token.

    `next_token`, `guess` and `judge` are what a CachedModel's steps make of logits, [n, vocabulary]. They are given the
    ids that were read, too, [1, n], and a random number, [1], if the rule draws.
    """

    def restart(self, number: int) -> None:
        """Begin the text of this number: what is drawn depends on nothing else."""

    def uniform(self, numbers: int) -> Tensor | None:
        """Random numbers in [0, 1), [numbers], in float32; None if the rule draws nothing."""

    def next_token(self, logits: Tensor, ids: Tensor, uniform: Tensor | None) -> tuple[Tensor]:
        """The next token, [1, 1], from the logits before it, [1, vocabulary]."""
        return (logits.argmax(dim=-1, keepdim=True),)

    def guess(self, logits: Tensor, ids: Tensor, uniform: Tensor | None) -> tuple[Tensor, ...]:
        """A draft's guess, [1, 1], its probability, [1], and, if it was drawn, from what, [1, vocabulary]; float32."""
        logits = logits.float()
        best, token = logits.max(dim=-1, keepdim=True)
        return token, (best[0] - logits.logsumexp(dim=-1)).exp()

    def judge(self, logits: Tensor, ids: Tensor, uniform: None) -> tuple[Tensor, Tensor]:
        """What decides about guesses, and their log-likelihood, [K], from the logits of a verify pass, ids [1, K+1].

        Here it is the main model's own choice at each place, [K+1].
        """
        return logits.argmax(dim=-1), log_likelihood(logits, ids)

    def emit(self, verdict: Tensor, guesses: Tensor, q: Tensor | None) -> list[int]:
        """The guesses that stand, and one token of the main model's own. Reads from the device: the host waits.

        verdict: of `judge`; guesses: [K]; q: what they were drawn from, [K, vocabulary], or None.
        """
        read = torch.cat([guesses, verdict]).tolist()
        d, g = read[: len(guesses)], read[len(guesses) :]
        n = next((i for i in range(len(d)) if d[i] != g[i]), len(d))
        return g[: n + 1]  # g1 … gn are d1 … dn


class Sampling(Greedy):
    """The rule that draws tokens, from the model's distribution with a temperature, cut to the likeliest tokens.

    Its methods take and return what those of the greedy rule do.
    """

    def __init__(self, temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0, device="cpu"):
        """`top_k` 0 and `top_p` 1 cut nothing off. One seed and number give the same random numbers on one machine."""
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed
        self.generator = torch.Generator(device)

    def restart(self, number: int) -> None:
        self.generator.manual_seed(self.seed * 2**20 + number)

    def uniform(self, numbers: int) -> Tensor:
        return torch.rand(numbers, generator=self.generator, device=self.generator.device)

    def distribution(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from, [n, vocabulary], in float32: temperature, then top-k, then top-p.

        Top-p keeps the likeliest tokens, as few as together have a probability of at least p. Both models' go through
        here: a guess is drawn from one such distribution, and judged by the other.
        """
        scaled = logits.float() / self.temperature
        if self.top_k:
            least = scaled.topk(min(self.top_k, scaled.shape[-1])).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, -math.inf)
        probabilities = scaled.softmax(dim=-1)
        if self.top_p < 1:
            falling, order = probabilities.sort(dim=-1, descending=True)
            falling = falling.masked_fill(falling.cumsum(dim=-1) - falling >= self.top_p, 0.0)
            probabilities = torch.zeros_like(falling).scatter(-1, order, falling)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        return probabilities

    def next_token(self, logits: Tensor, ids: Tensor, uniform: Tensor) -> tuple[Tensor]:
        return (draw(self.distribution(logits), uniform),)

    def guess(self, logits: Tensor, ids: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
        q = self.distribution(logits)
        token = draw(q, uniform)
        return token, q.gather(1, token)[0], q

    def judge(self, logits: Tensor, ids: Tensor, uniform: None) -> tuple[Tensor, Tensor]:
        """As above; here it is the main model's distribution at each place, [K+1, vocabulary]."""
        return self.distribution(logits), log_likelihood(logits, ids)

    def emit(self, verdict: Tensor, guesses: Tensor, q: Tensor | None) -> list[int]:
        """As above: guesses stand or not by chance, and the text has the main model's own distribution."""
        if q is None:  # the draft drew nothing: it was certain
            q = torch.nn.functional.one_hot(guesses, verdict.shape[1]).to(verdict.dtype)
        uniforms = self.uniform(len(guesses) + 1)  # one for each decision: none is ever used twice
        accepted, following = accept(verdict, q, guesses, uniforms[:-1])
        n, token, *d = torch.cat([accepted, draw(following, uniforms[-1:])[0], guesses]).tolist()
        return [*d[:n], token]


def log_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of each token but the first, ids [1, K+1], by the logits before it, [K+1, vocabulary]: [K], in float32."""
    return -torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="none")


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token, [1, 1], from probabilities, [1, vocabulary], with one random number in [0, 1), [1].

    The first token up to which the probabilities sum to more than the number's share of them all; so never one of
    probability 0. The sums of a large vocabulary want float64, where the device has it.
    """
    exact = torch.float32 if probabilities.device.type == "mps" else torch.float64
    up_to = probabilities.cumsum(dim=-1, dtype=exact)
    return (up_to <= uniform * up_to[:, -1:]).sum(dim=-1, keepdim=True)


def accept(p: Tensor, q: Tensor, guesses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """How many guesses stand, [1], and the distribution from which the next token is to be drawn, [1, vocabulary].

    Leviathan et al. 2023, algorithm 1 and appendix A.1. p: the main model's distributions at each place and behind the
    last, [K+1, vocabulary]; q: those that the guesses, [K], were drawn from, [K, vocabulary]; uniforms: random numbers
    in [0, 1), [K]. A guess x stands with probability min(1, p(x) / q(x)): where the draft draws it more often than the
    main model would, the surplus is thrown away. At the first that does not stand, the next token is drawn from what
    the main model has more of, max(0, p - q), so that the two ways to a token sum to p. Behind the last guess there is
    no q to subtract, and the next token is drawn from p itself.
    """
    p_guessed, q_guessed = (of.gather(1, guesses[:, None])[:, 0] for of in (p[:-1], q))
    stands = uniforms * q_guessed < p_guessed  # without dividing: q may be 0
    accepted = stands.long().cumprod(dim=0).sum(dim=0, keepdim=True)
    p_there = p.index_select(0, accepted)
    surplus = (p_there - torch.nn.functional.pad(q, (0, 0, 0, 1)).index_select(0, accepted)).clamp(min=0)
    total = surplus.sum()
    return accepted, torch.where(total > 0, surplus / total, p_there)  # p = q, but for rounding: nothing is left


# 3  Decoding with the main model alone (the baseline) -----------------------------------------------------------------


@dataclasses.dataclass
class Prompt:
    """A prompt, and how far its answer may go."""

    text: str
    number: int  # in its file, from 1; random numbers depend on it
    category: str | None = None
    question_id: str | int | None = None
    ids: Tensor | None = None  # [1, n], n ≥ 1, on the models' device
    max_new_tokens: int = 128
    end_ids: frozenset[int] = frozenset()  # the tokens that end a text, as its last token


@dataclasses.dataclass
class Decoded:
    """What one decoding run wrote, and how long it took, in seconds."""

    token_ids: list[int]
    latency_s: float = 0.0  # from the prompt's ids on the device to the last token on the host
    first_token_s: float = 0.0  # to the first token on the host
    # Speculative decoding only:
    rounds: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (drafted, accepted) tokens of each round
    log_likelihood: float = 0.0  # of all drafted tokens, by the main model, in nats
    prefill_s: float = 0.0  # spent reading the prompt, by both models
    draft_s: float = 0.0  # spent drafting
    verify_s: float = 0.0  # spent in the main model's verifying passes


def now(device: torch.device) -> float:
    """The time in seconds, once the device has finished all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def cut(tokens: list[int], room: int, prompt: Prompt) -> tuple[list[int], bool]:
    """The tokens up to the first that ends the text, or as many as there is room for; and whether the text is ended."""
    for index, token in enumerate(tokens[:room]):
        if token in prompt.end_ids:
            return tokens[: index + 1], True
    return tokens[:room], len(tokens) >= room


@torch.no_grad()
def decode_alone(main: CachedModel, rule: Greedy, prompt: Prompt) -> Decoded:
    """Decode with the main model alone: one forward pass a token."""
    start = now(main.device)
    rule.restart(prompt.number)
    (token,) = rule.next_token(main.prefill(prompt.ids, rolls_back=False), prompt.ids, rule.uniform(1))  # [1, 1]
    tokens, ended = cut([token.item()], prompt.max_new_tokens, prompt)
    first_token_s = now(main.device) - start
    while not ended:
        (token,) = main.step(rule.next_token, token, rule.uniform(1))
        emitted, ended = cut([token.item()], prompt.max_new_tokens - len(tokens), prompt)
        tokens += emitted
    return Decoded(tokens, now(main.device) - start, first_token_s)


# 4  Speculative decoding ----------------------------------------------------------------------------------------------
#
# One invariant carries the loop. Between two rounds, always,
#
#     the main model has read the whole text but its last token,
#     the draft has read the whole text but its last two.
#
# A round feeds the draft those two tokens and then each of its own guesses but the last: it has now read the text and
# d1 … d(K-1). It feeds the main model the text's last token and all guesses: it has now read the text and d1 … dK. If n
# guesses stand, the text grows by d1 … dn and one token of the main model's own. So what each model has read too much
# is, for both, K-n tokens. They roll back by so many, and the invariant holds again, for n = K as for any other n:
# nothing is special about a round whose guesses all stand. And with a fixed K every pass has the same shape in every
# round.
#
# Only a round without any guess, which an automatic K allows, leaves the draft further behind: it reads on when it is
# asked again.


class FixedLength:
    """Draft the same number of tokens in every round."""

    def __init__(self, longest: int):
        self.longest = longest

    def wants_another(self, confidences: list[Tensor | float]) -> bool:
        """Whether to draft one more token. `confidences`: the draft's probabilities for this round's guesses."""
        return len(confidences) < self.longest

    def learn(self, drafted: int, accepted: int) -> None:
        """What became of the round."""


class ModelDraft:
    """A draft that is a model, smaller than the main one."""

    def __init__(self, model: CachedModel, rule: Greedy):
        self.model, self.rule = model, rule
        self.nothing = torch.empty(1, 0, dtype=torch.long, device=model.device)

    def new_text(self, prompt_ids: Tensor) -> None:
        """Begin with a prompt, [1, n]: read it without its last token."""
        self.has_read = prompt_ids.shape[1] - 1  # so many tokens of the text
        self.model.prefill(prompt_ids[:, :-1]) if self.has_read else self.model.new_text()

    def propose(self, text: list[int], length: FixedLength) -> tuple[Tensor, Tensor | None]:
        """Guess how the text goes on: K tokens, [1, K], and what they were drawn from, [K, vocabulary] or None."""
        guesses, confidences, q = [], [], []
        while length.wants_another(confidences):
            # First what it has not read, [1, 2], then each guess, [1, 1], which never leaves the device.
            unread = guesses[-1] if guesses else torch.tensor([text[self.has_read :]], device=self.model.device)
            guess, confidence, *distribution = self.model.step(self.rule.guess, unread, self.rule.uniform(1))
            guesses.append(guess)
            confidences.append(confidence)
            q += distribution
        if not guesses:
            return self.nothing, None
        self.has_read = len(text) + len(guesses) - 1
        return torch.cat(guesses, dim=1), torch.cat(q) if q else None

    def roll_back(self, tokens: int) -> None:
        """Forget the latest guesses."""
        self.model.roll_back(tokens)
        self.has_read -= tokens


class NgramDraft:
    """A draft without a model: the text goes on as it did when its last three tokens, or two, or one, stood before.

    Known as prompt lookup. It shines where an answer repeats what was asked, and costs next to nothing elsewhere.
    """

    HOPES = {3: 0.95, 2: 0.75, 1: 0.45}  # how sure it is, by the tokens that match: assumed, and put right by auto

    def __init__(self, device: torch.device):
        self.device = device

    def new_text(self, prompt_ids: Tensor) -> None:
        """Begin with a prompt: nothing to read yet."""
        self.noted, self.follows = 1, {}  # up to a place in the text: what stands behind the latest of some tokens

    def propose(self, text: list[int], length: FixedLength) -> tuple[Tensor, None]:
        """Guess how the text goes on: up to K tokens, [1, K]; they are not drawn from anything."""
        for place in range(self.noted, len(text)):
            self.follows |= {tuple(text[place - n : place]): place for n in self.HOPES if n <= place}
        self.noted = len(text)
        matches = (n for n in self.HOPES if tuple(text[-n:]) in self.follows)
        guesses = []
        if matched := next(matches, None):
            start = self.follows[tuple(text[-matched:])]
            while length.wants_another([self.HOPES[matched]] * len(guesses)) and start + len(guesses) < len(text):
                guesses.append(text[start + len(guesses)])
        return torch.tensor([guesses], dtype=torch.long, device=self.device), None

    def roll_back(self, tokens: int) -> None:
        """Forget the latest guesses: they are not kept."""


def mark(device: torch.device) -> float | torch.Event:
    """A point in the device's time, noted without waiting for the device: for times within a timed run."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def seconds_between(start: float | torch.Event, end: float | torch.Event) -> float:
    """The seconds between two marks; the device must have passed both."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


@torch.no_grad()
def decode_speculatively(
    main: CachedModel, draft: ModelDraft | NgramDraft, rule: Greedy, length: FixedLength, prompt: Prompt
) -> Decoded:
    """Decode with the draft's help: several tokens a forward pass of the main model, and the text is still its own.

    Leviathan et al. 2023, algorithm 1. The last round is a whole one, too; what it gives beyond the end is cut off.
    """
    text, room = prompt.ids[0].tolist(), prompt.max_new_tokens
    start = now(main.device)
    rule.restart(prompt.number)
    (first,) = rule.next_token(main.prefill(prompt.ids), prompt.ids, rule.uniform(1))
    emitted, ended = cut([first.item()], room, prompt)
    first_token_s = now(main.device) - start
    text += emitted
    room -= 1
    draft.new_text(prompt.ids)

    rounds, log_likelihoods, marks = [], [], [mark(main.device)]
    while not ended:
        # 1. Draft: K guesses, one after the other. (What the host sends waits for all that the device has to do: so it
        #    is sent before there is anything.)
        last = torch.tensor([text[-1:]], device=main.device)
        guesses, q = draft.propose(text, length)  # [1, K]: d1 … dK; [K, vocabulary], if they were drawn
        marks.append(mark(main.device))

        # 2. Verify: one pass of the main model says what it would have written at each place itself.
        verdict, of_guesses = main.verify(rule.judge, torch.cat([last, guesses], dim=1))  # [K+1, …]; [K]
        marks.append(mark(main.device))

        # 3. Accept the guesses that stand, and one token of the main model's own. With a fixed K this is the one moment
        #    in a round when the host waits for the device and reads from it.
        emitted = rule.emit(verdict, guesses[0], q)
        drafted, accepted = guesses.shape[1], len(emitted) - 1
        emitted, ended = cut(emitted, room, prompt)
        text += emitted
        room -= len(emitted)

        # 4. Roll back: both models forget the guesses that do not stand.
        main.roll_back(drafted - accepted)
        draft.roll_back(drafted - accepted)

        length.learn(drafted, accepted)
        rounds.append((drafted, accepted))
        log_likelihoods.append(of_guesses)
        marks.append(mark(main.device))

    latency_s = now(main.device) - start
    spent = [seconds_between(earlier, later) for earlier, later in itertools.pairwise(marks)]
    return Decoded(
        text[prompt.ids.shape[1] :],
        latency_s,
        first_token_s,
        rounds,
        log_likelihood=torch.cat(log_likelihoods).sum().item() if rounds else 0.0,
        prefill_s=latency_s - sum(spent),
        draft_s=sum(spent[0::3]),
        verify_s=sum(spent[1::3]),
    )


# How many tokens to draft: as long as one more is worth more than it costs.


@torch.no_grad()
def measure_costs(main: CachedModel, draft: CachedModel | None, rule: Greedy, prompt_ids: Tensor, longest: int) -> dict:
    """What passes cost on this machine, in seconds, by the number of tokens: medians, after a warm-up.

    Measured at the end of a prompt, [1, n]. The models alternate as they do in decoding: the main model drives the
    draft's weights out of a processor's caches. A draft reads 2 tokens in a round's first pass, and 1 in each other.
    """
    widths = sorted({width for width in (1, 2, 3, 5, 9, 17) if width <= longest} | {longest + 1})
    costs = {"draft_pass_s": {1: [], 2: []}, "main_pass_s": {width: [] for width in widths}}
    ids = prompt_ids[:, -1:].repeat(1, longest + 1)
    for model in filter(None, (main, draft)):
        model.prefill(prompt_ids)

    def time_pass(times: list[float], model: CachedModel | None, tokens: int, step: Callable) -> None:
        start = now(main.device)
        if model:
            step(ids[:, :tokens].contiguous())
            model.roll_back(tokens)
        times.append(now(main.device) - start)

    for _ in range(12):
        for width in widths:
            time_pass(costs["main_pass_s"][width], main, width, lambda ids: main.verify(rule.judge, ids))
            for tokens, times in costs["draft_pass_s"].items():
                time_pass(times, draft, tokens, lambda ids: draft.step(rule.guess, ids, rule.uniform(1)))
    return {
        name: {tokens: statistics.median(some[len(some) // 4 :]) for tokens, some in times.items()}
        for name, times in costs.items()
    }


class AutoLength(FixedLength):
    """Draft while further tokens are worth more than they cost; rest where not even the first is.

    With α the recent share of right guesses, a round that drafts K tokens yields 1 + α + … + α^K (Leviathan et al.
    2023, equation 1). The best K by the measured costs gives the time per token that can be had, and that is what a
    token is worth. A further guess counts if all guesses of the round so far are right, and it too (α). How likely a
    guess is right is told by the draft's own probability for it, put right by what became of guesses of about that
    probability before: drafts are more sure of themselves than they should be, or less.
    """

    def __init__(self, longest: int, costs: dict):
        """`costs`: of `measure_costs`; what lies between the measured numbers of tokens is interpolated."""
        super().__init__(longest)
        first, further = (costs["draft_pass_s"][tokens] for tokens in (2, 1))
        drafting = [0.0, *(first + k * further for k in range(longest))]
        verifying = numpy.interp(range(1, longest + 2), *zip(*sorted(costs["main_pass_s"].items()), strict=True))
        self.round_s = [sum(parts) for parts in zip(drafting, verifying.tolist(), strict=True)]  # by tokens drafted
        self.right, self.tested = 6.0, 8.0  # guesses of recent rounds; an assumption to begin with, as in the next line
        self.by_tenth = [[(tenth + 0.5) / 5, 2.0] for tenth in range(10)]  # right, tested: by the guess's probability
        self.rest, self.next_rest = 0, 4  # rounds still to go without a draft; rounds of the next rest
        self.plan()

    def wants_another(self, confidences: list[Tensor | float]) -> bool:
        """As above; reads the latest probability from the device, so here the host waits for the draft."""
        if not confidences:
            self.tenths = []
            return self.rest == 0
        self.tenths.append(self.by_tenth[min(9, int(10 * float(confidences[-1])))])
        all_right = math.prod(right / tested for right, tested in self.tenths)
        paid, *further = self.round_s[len(confidences) :]
        yields = itertools.accumulate(all_right * self.alpha**k for k in range(1, len(further) + 1))
        return any(tokens * self.worth_s > round_s - paid for tokens, round_s in zip(yields, further, strict=True))

    def learn(self, drafted: int, accepted: int) -> None:
        """Learn from a round that drafted."""
        if self.rest:
            self.rest -= 1
        elif drafted:
            tested = min(accepted + 1, drafted)
            self.right, self.tested = 0.9 * self.right + accepted, 0.9 * self.tested + tested
            for index, tenth in enumerate(self.tenths[:tested]):
                tenth[:] = 0.98 * tenth[0] + (index < accepted), 0.98 * tenth[1] + 1
            self.plan()

    def plan(self) -> None:
        """What a token is worth by now; a draft that does not pay rests, twice as long each time."""
        self.alpha = self.right / self.tested
        yields = itertools.accumulate(self.alpha**k for k in range(self.longest + 1))
        self.worth_s, best = min((self.round_s[k] / tokens, k) for k, tokens in enumerate(yields))
        if best:
            self.next_rest = 4
        else:
            self.rest, self.next_rest = self.next_rest, min(2 * self.next_rest, 64)


# 5  Is the output the main model's own? -------------------------------------------------------------------------------
#
# In exact arithmetic the two greedy methods write the same tokens. In floating point, a pass over K+1 tokens and K+1
# passes over one token round differently; where the two best tokens are all but tied, the choice can flip, and from
# there on the two texts part for good. In bfloat16 this is the normal case. It is no bug, but a bug would look the
# same: so when two outputs differ, the next function finds out which it is. (Drawn texts differ by chance, and say
# nothing of the kind.)


@dataclasses.dataclass
class Divergence:
    """Where two outputs part, and whether rounding explains it."""

    index: int  # of the first new token that differs
    baseline_token: int | None  # None: the text had ended before
    speculative_token: int | None
    gap: float  # how far the logit of a token of the output lies below the best one there, at the worst place
    noise: float  # how far logits move when the same text is read as the baseline reads it, not at once
    kind: str  # "tie": gap ≤ noise, the output is the main model's own within its rounding; "mismatch": it is not


def as_they_are(logits: Tensor, ids: Tensor, uniform: None) -> tuple[Tensor]:
    """What a step makes of the logits if they are wanted themselves."""
    return (logits,)


@torch.no_grad()
def find_divergence(
    main: CachedModel, prompt_ids: Tensor, baseline: list[int], speculative: list[int]
) -> Divergence | None:
    """Compare two outputs for one prompt, [1, n]; None if they are the same.

    The gap certifies every token of the speculative output, not only the first that differs: after a rounding flip,
    too, each further token must be the best one, or tied with it, given all before. The noise is that of the steps
    which were timed: where they are compiled, these are, too.
    """
    if baseline == speculative:
        return None
    shorter = min(len(baseline), len(speculative))
    index = next((i for i in range(shorter) if baseline[i] != speculative[i]), shorter)

    output = torch.tensor([speculative], device=main.device)
    text = torch.cat([prompt_ids, output[:, :-1]], dim=1)
    if main.lengths is not None:
        main.compile(as_they_are, 1)
    main.new_text()
    at_once = main.read(text, last=len(speculative))  # [new tokens, vocabulary]
    gap = (at_once.amax(dim=-1).float() - at_once.gather(1, output[0, :, None])[:, 0].float()).max().item()

    main.new_text()
    if prompt_ids.shape[1] > 1:
        main.read(prompt_ids[:, :-1], last=1)
    steps = (main.step(as_they_are, token)[0][0] for token in text[:, -len(speculative) :].split(1, dim=1))
    rows = zip(at_once, steps, strict=True)
    noise = torch.stack([(row.float() - alone.float()).abs().max() for row, alone in rows]).max().item()

    # One text a mere beginning of the other: no rounding makes a loop stop early, or go on behind the end.
    kind = "tie" if gap <= noise and index < shorter else "mismatch"
    token = [ids[index] if index < len(ids) else None for ids in (baseline, speculative)]
    return Divergence(index, *token, gap, noise, kind)


# 6  Measuring ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
    """What one method did with one prompt."""

    runs: list[Decoded]  # the repeats, the fastest first
    divergence: Divergence | None = None  # from the baseline's output: the worst of all repeats

    def __post_init__(self):
        self.runs.sort(key=lambda run: run.latency_s / len(run.token_ids))  # drawn texts may differ in length

    @property
    def run(self) -> Decoded:
        """The one that counts: the median; of an even number, the faster of the middle two."""
        return self.runs[(len(self.runs) - 1) // 2]


@torch.no_grad()
def decode_by_transformers(
    main: CachedModel, draft: ModelDraft | NgramDraft | None, rule: Greedy, draft_tokens: int | None, prompt: Prompt
) -> Decoded:
    """What a user would run instead: transformers' own generate(), assisted by the draft if there is one.

    draft_tokens: K for every round, or None for the library's defaults. Nothing but decoding by our rule runs: what the
    models' own generation configs ask for (sampling, repetition penalties, …) is dropped, for good.
    """
    settings = {"max_new_tokens": prompt.max_new_tokens, "eos_token_id": sorted(prompt.end_ids) or None}
    settings |= {"pad_token_id": 0, "do_sample": False}
    if isinstance(rule, Sampling):
        settings |= {"do_sample": True, "temperature": rule.temperature, "top_k": rule.top_k, "top_p": rule.top_p}
        torch.manual_seed(rule.seed * 2**20 + prompt.number)
    models, of_draft = [main.model], {}
    if isinstance(draft, NgramDraft):
        settings |= {"prompt_lookup_num_tokens": draft_tokens or 10, "max_matching_ngram_size": max(draft.HOPES)}
    elif draft:
        models.append(draft.model.model)
        if draft_tokens:
            of_draft |= {"num_assistant_tokens": draft_tokens, "num_assistant_tokens_schedule": "constant"}
            of_draft |= {"assistant_confidence_threshold": 0.0}
    for model in models:  # the library reads from these what it is not told; nobody else does
        model.generation_config = GenerationConfig(**(of_draft if model is not main.model else {}))
    start = now(main.device)
    output = main.model.generate(
        prompt.ids,
        attention_mask=torch.ones_like(prompt.ids),
        generation_config=GenerationConfig(**settings),
        assistant_model=models[1] if len(models) > 1 else None,
    )
    tokens = output[0, prompt.ids.shape[1] :].tolist()  # the host waits for the last of them
    return Decoded(tokens, now(main.device) - start)


def measure(
    main: CachedModel,
    prompts: list[Prompt],
    methods: dict[str, Callable[[Prompt], Decoded]],
    repeats: int = 1,
    warmup: int = 1,
    compare: bool = True,
    announce: Callable[[Prompt, str], None] = lambda prompt, method: None,
) -> Iterator[dict[str, Measured] | str]:
    """Decode each prompt with all methods; yield what became of it, by method, or why it failed.

    The first method is the baseline: if `compare`, the others' outputs are compared with its. `announce` is told the
    prompt and the method before each run, outside the timed part.
    """
    names, warm = list(methods), False
    for index, prompt in enumerate(prompts):
        try:
            for name in names * (0 if warm else warmup):  # memory is allocated, kernels are loaded, clocks speed up
                announce(prompt, f"warm-up, {name}")
                methods[name](prompt)
            warm = True
            runs = {name: [] for name in names}
            for repeat in range(repeats):
                first = (index + repeat) % len(names)  # they take turns at being the first
                for name in names[first:] + names[:first]:
                    announce(prompt, name)
                    runs[name].append(methods[name](prompt))
            results = {name: Measured(repeats) for name, repeats in runs.items()}
            own = results[names[0]].run.token_ids
            for result in [results[name] for name in names[1:]] if compare else []:
                outputs = {tuple(run.token_ids): run.token_ids for run in result.runs}.values()
                parted = filter(None, [find_divergence(main, prompt.ids, own, output) for output in outputs])
                result.divergence = max(parted, key=lambda one: (one.kind == "mismatch", one.gap), default=None)
            yield results
        except Exception as error:  # above all: out of memory. The next prompt may be shorter.
            yield first_line(error)


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """The quotient; None (null in JSON, a dash in the table) where there is none."""
    quotient = numerator / denominator if denominator and numerator is not None else math.nan
    return quotient if math.isfinite(quotient) else None


def speed(results: list[Measured]) -> dict:
    """New tokens, latency in seconds (the mean over the prompts), tokens per second (all tokens / all seconds).

    Also the mean latency of each prompt's fastest repeat, and of each prompt's slowest.
    """
    new_tokens = sum(len(result.run.token_ids) for result in results)
    seconds = sum(result.run.latency_s for result in results)
    latencies = [[run.latency_s for run in result.runs] for result in results]
    return {
        "new_tokens": new_tokens,
        "latency_s": seconds / len(results),
        "tokens_per_s": ratio(new_tokens, seconds),
        "latency_min_s": statistics.mean(map(min, latencies)),
        "latency_max_s": statistics.mean(map(max, latencies)),
    }


def acceptance(runs: list[Decoded]) -> dict:
    """What became of the drafted tokens, and where the time went, over one speculative run or several.

    alpha is the α of Leviathan et al. 2023, §3: accepted / tested, where a round tests what it accepts and, if there is
    one, the first wrong guess; the guesses behind that are drafted, but never tested. The first token of a text comes
    from reading the prompt, not from a round. Rounds are counted whole, the last one too.
    """
    rounds = [counts for run in runs for counts in run.rounds]
    lengths = [drafted for drafted, _ in rounds]
    drafted, accepted = sum(lengths), sum(accepted for _, accepted in rounds)
    tested = sum(min(accepted + 1, drafted) for drafted, accepted in rounds)
    log_likelihood = sum(run.log_likelihood for run in runs)
    times = {f"{part}_s": sum(getattr(run, f"{part}_s") for run in runs) for part in ("prefill", "draft", "verify")}
    return {
        "rounds": len(rounds),
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_rate": ratio(accepted, drafted),
        "alpha": ratio(accepted, tested),
        "tokens_per_round": ratio(sum(len(run.token_ids) - 1 for run in runs), len(rounds)),
        "drafted_per_round": ratio(drafted, len(rounds)),
        "drafted_histogram": {str(length): lengths.count(length) for length in sorted(set(lengths))},
        "log_likelihood": ratio(log_likelihood, 1),
        "log_likelihood_per_token": ratio(log_likelihood, drafted),
        **times,
        "other_s": sum(run.latency_s for run in runs) - sum(times.values()),
    }


def speedup_percent(baseline: dict, speculative: dict) -> float | None:
    """100 × (speculative / baseline tokens per second − 1)."""
    quotient = ratio(speculative["tokens_per_s"], baseline["tokens_per_s"])
    return None if quotient is None else 100 * (quotient - 1)


def promised_percent(
    alpha: float | None, lengths: list[int], draft_cost: float | None, verify_cost: float | None
) -> float | None:
    """The speedup in percent that theory promises: Leviathan et al. 2023, theorem 3.8, which has verify_cost = 1.

    A round that drafts K tokens gives (1 − α^(K+1)) / (1 − α) tokens (equation 1) and costs K draft steps and one
    verify pass, each in units of one baseline step. lengths: K of each round. None if any of these is unknown.
    """
    if None in (alpha, draft_cost, verify_cost):
        return None
    tokens = sum(k + 1 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha) for k in lengths)
    return 100 * (tokens / sum(k * draft_cost + verify_cost for k in lengths) - 1)


def speedup_interval(baselines: list[Measured], results: list[Measured]) -> list[float] | None:
    """A 95 % bootstrap interval of the speedup in percent; None if no run was repeated.

    Drawn anew, with replacement, 2,000 times: the prompts, and for each the repeats of each method.
    """
    repeats = len(baselines[0].runs)
    if repeats < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(results), (2000, len(results)), generator=generator)

    def tokens_per_s(of: list[Measured]) -> Tensor:
        drawn = torch.randint(repeats, (2000, len(of), repeats), generator=generator)
        median = drawn.median(dim=2).values  # [2000, prompts]: the runs are in order, and so are their numbers
        tokens = torch.tensor([[len(run.token_ids) for run in result.runs] for result in of])
        seconds = torch.tensor([[run.latency_s for run in result.runs] for result in of])
        return tokens[picked, median].sum(dim=1) / seconds[picked, median].sum(dim=1)

    gains = 100 * (tokens_per_s(results) / tokens_per_s(baselines) - 1)
    return gains.quantile(torch.tensor([0.025, 0.975])).tolist()


def report_prompt(prompt: Prompt, results: dict[str, Measured] | str, name: str, key: str, sampled, tokenizer) -> dict:
    """What the baseline and the method `name` did with one prompt, or why it failed: as it stands in the JSON."""
    report = {"prompt": prompt.text, "prompt_tokens": prompt.ids.shape[1], "number": prompt.number}
    report |= {"category": prompt.category, "question_id": prompt.question_id}
    report |= dict.fromkeys(("baseline", key, "speedup_percent", "identical", "divergence", "error"))
    if isinstance(results, str):
        return report | {"error": results}

    def output(of: Measured) -> dict:
        text = tokenizer.decode(of.run.token_ids, skip_special_tokens=True)
        first = {"first_token_s": of.run.first_token_s or None}
        return speed([of]) | first | {"text": text, "token_ids": of.run.token_ids}

    baseline, result = results["baseline"], results[name]
    report["baseline"], report[key] = output(baseline), output(result) | acceptance([result.run])
    report["speedup_percent"] = speedup_percent(report["baseline"], report[key])
    if not sampled:
        report["identical"] = result.divergence is None
    if result.divergence:
        report["divergence"] = dataclasses.asdict(result.divergence)
        report["divergence"] |= {of: ratio(report["divergence"][of], 1) for of in ("gap", "noise")}
    return report


def summarise(prompts: list[dict[str, Measured]], name: str, key: str, sampled=False, steps=True) -> dict:
    """The same over several prompts, and what theory promises; `steps`: if the draft is a model, whose steps cost."""
    baselines, results = ([measured[method] for measured in prompts] for method in ("baseline", name))
    alone, runs = ([result.run for result in of] for of in (baselines, results))
    baseline, method = speed(baselines), speed(results) | acceptance(runs)
    decoding_s = sum(run.latency_s - run.first_token_s for run in alone)
    step_s = ratio(decoding_s, sum(len(run.token_ids) - 1 for run in alone))
    draft_step_s = ratio(method["draft_s"], method["drafted"]) if steps else None
    verify_pass_s = ratio(method["verify_s"], method["rounds"])
    draft_cost, verify_cost = ratio(draft_step_s, step_s), ratio(verify_pass_s, step_s)
    rates = method["alpha"], [drafted for run in runs for drafted, _ in run.rounds], draft_cost
    kinds = [result.divergence and result.divergence.kind for result in results]
    return {
        "baseline": baseline,
        key: method,
        "speedup_percent": speedup_percent(baseline, method),
        "speedup_interval_percent": speedup_interval(baselines, results),
        "predicted_speedup_percent": promised_percent(*rates, verify_cost),
        "ideal_speedup_percent": promised_percent(*rates, 1.0),
        "baseline_step_s": step_s,
        "draft_step_s": draft_step_s,
        "verify_pass_s": verify_pass_s,
        "draft_cost": draft_cost,  # one draft step, in baseline steps: the c of Leviathan et al.
        "verify_cost": verify_cost,  # one verify pass, in baseline steps
        "identical": None if sampled else kinds.count(None),
        "ties": kinds.count("tie"),
        "mismatches": kinds.count("mismatch"),
    }


# 7  Reporting ---------------------------------------------------------------------------------------------------------


def figure(value: float | None) -> str:
    """A number with about three digits that count; a dash for None."""
    return "–" if value is None else f"{value:.{sum(abs(value) < bound for bound in (1, 10, 100))}f}"


def percent(value: float | None, sign: str = "") -> str:
    """A percentage without decimals, sign="+" with a plus sign; a dash for None."""
    return "–" if value is None else f"{round(value):{sign}} %"


# Heading and width of each column; the prompt has what is left of the line: of 80 columns, 10.
COLUMNS = [("#", 3), ("prompt", 0), ("tokens", 6), ("s", 6), ("tok/s", 6), ("s", 6), ("tok/s", 6)]
COLUMNS += [("faster", 7), ("accept", 6), ("log-l.", 6), ("same", 7)]


def print_row(console: Console, cells: list[str | Text], style: str = "") -> None:
    """Print one row of the table now: a whole table could be printed only after the last prompt."""
    row = Table.grid(padding=(0, 1, 0, 0))
    rest = console.width - sum(width + 1 for _, width in COLUMNS)
    for heading, width in COLUMNS:
        justify = "left" if heading == "prompt" else "right"
        row.add_column(width=width or max(rest, 8), justify=justify, no_wrap=True, overflow="ellipsis")
    row.add_row(*[Text(cell) if isinstance(cell, str) else cell for cell in cells], style=style)
    console.print(row)


def print_headings(console: Console) -> None:
    """Print the headings, and above them the names of the two methods."""
    left = console.width - sum(width + 1 for _, width in COLUMNS[3:])
    console.print(Text("\n" + " " * left + f"{'baseline':>13} {'speculative':>13}", style="bold"))
    print_row(console, [heading for heading, _ in COLUMNS], "bold")


def print_reports(console: Console, number: str, title: str, reports: dict[str, dict]) -> None:
    """Print the rows of one prompt, or of the averages; reports: by the method's name, speculative decoding first.

    A single draft length shares the prompt's row with the baseline; of several, each has a row of its own.
    """
    first, single = next(iter(reports.values())), len(reports) == 1 or "compared" in list(reports.values())[1]
    if first.get("error"):
        console.print(Text(f"{number:>3} {plain(title)[:40]}: {plain(first['error'])}", style="red"))
        return

    def tokens(of: dict) -> str:  # in the averages, too, those of a prompt
        return f"{of['latency_s'] * (of['tokens_per_s'] or 0):.0f}"

    baseline = [figure(first["baseline"][key]) for key in ("latency_s", "tokens_per_s")]
    start = [number, plain(title), tokens(first["baseline"]), *baseline]
    if not single:
        print_row(console, start + [""] * 6)
    for name, report in reports.items():
        method = report.get("speculative") or report["compared"]
        faster, rate, mean = (report["speedup_percent"], method["acceptance_rate"], method["log_likelihood_per_token"])
        if report["identical"] is None:
            same = "sampled"
        elif "mismatches" in report:  # the averages
            same = f"{report['identical']}/{report['identical'] + report['ties'] + report['mismatches']}"
        else:
            kind = "yes" if report["identical"] else report["divergence"]["kind"]
            same = {"yes": Text("yes", "green"), "tie": Text("tie", "yellow"), "mismatch": Text("NO", "bold red")}[kind]
        cells = start if single and report is first else ["", name, tokens(method), "", ""]
        cells = [*cells, figure(method["latency_s"]), figure(method["tokens_per_s"])]
        cells.append(Text(percent(faster, "+"), "green" if (faster or 0) > 0 else "red"))
        cells += ["", ""] if rate is None else [percent(100 * rate), figure(mean)]  # no draft, or none of ours
        print_row(console, [*cells, same])


def print_summaries(console: Console, title: str, summaries: list[tuple[str, dict]]) -> None:
    """Print a table that compares summaries, of draft lengths or categories: what each gained, and why."""
    table = Table(box=None, padding=(0, 1), title=title, title_justify="left", title_style="bold")
    table.add_column("", overflow="ellipsis", no_wrap=True, max_width=console.width - 64)
    costs = ("draft step", "verify pass") if console.width >= 100 else ()  # the last to be missed
    for heading in ("tok/s", "faster", "predicted", "accept", "tokens/round", *costs):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, summary in summaries:
        counts, rate = summary["speculative"], summary["speculative"]["acceptance_rate"]
        gains = [percent(summary[key], "+") for key in ("speedup_percent", "predicted_speedup_percent")]
        cells = [figure(counts["tokens_per_s"]), *gains, percent(rate and 100 * rate)]
        cells.append(figure(counts["tokens_per_round"]))
        steps = [summary[key] and f"{figure(1000 * summary[key])} ms" for key in ("draft_step_s", "verify_pass_s")]
        table.add_row(Text(plain(name)), *[cell or "–" for cell in [*cells, *steps][: 5 + len(costs)]])
    console.print(table)


def print_chart(console: Console, runs: list[dict]) -> None:
    """Print bars: how many times as fast as the baseline each draft length was, and was predicted to be."""
    kinds = {"measured": ("speedup_percent", "green"), "predicted": ("predicted_speedup_percent", "bright_black")}
    times = {
        (run["draft_tokens"], kind): 1 + run["summary"][key] / 100
        for run in runs
        for kind, (key, _) in kinds.items()
        if run["summary"][key] is not None
    }
    chart = Table.grid(padding=(0, 1, 0, 0))
    for (length, kind), value in times.items():
        bar = Bar(max(times.values()), 0, value, width=max(10, console.width - 30), color=kinds[kind][1])
        chart.add_row(f"K = {length}" if kind == "measured" else "", kind, bar, f"{value:.2f} ×")
    console.print(Text("Times as fast as the baseline", style="bold"))
    console.print(chart)


def print_text(console: Console, tokenizer, run: Decoded) -> None:
    """Print what was written, each token by where it comes from: in colours, or, without them, in marks."""
    looks = {  # the style, the marks around it, and what it means
        "draft": ("green", "{}", "accepted guess"),
        "own": ("bold red", "«{}»", "the main model's own, in place of a wrong guess"),
        "bonus": ("cyan", "‹{}›", "its bonus token"),
        "plain": ("", "{}", "its own, nothing guessed"),
    }
    colours = console.is_terminal and not console.no_color
    text, done = Text(), ""

    def append(written: str, origin: str) -> None:
        style, marks, _ = looks[origin]
        text.append(written, style) if colours else text.append(marks.format(written))

    origins = ["plain"]  # the first token, from reading the prompt
    for drafted, accepted in run.rounds:
        origins += ["draft"] * accepted + ["own" if accepted < drafted else "bonus" if drafted else "plain"]
    for place, origin in enumerate(origins[: len(run.token_ids)], 1):
        decoded = tokenizer.decode(run.token_ids[:place])
        if decoded.endswith("\ufffd") and place < len(run.token_ids):
            continue  # a part of a character: it comes with the rest
        append(safe(decoded[len(done) :]), origin)
        done = decoded
    text.append("\n")
    for origin, (_, _, meaning) in looks.items():
        append(meaning, origin)
        text.append(" · " if origin != "plain" else "\n")
    console.print(text)


def in_words(runs: list[dict], compared: list[dict], repeats: int = 1) -> list[str]:
    """The result as sentences that a person can quote, and what to try next where the draft does not pay.

    runs: one for each draft length; compared: one for each of the library's methods. Both as in the JSON.
    """
    best = best_run(runs)
    summary, counts, length = best["summary"], best["summary"]["speculative"], best["draft_tokens"]
    lines = []
    if None in (summary["speedup_percent"], counts["tokens_per_round"]):
        lines.append("Too few tokens to tell how fast it is: raise --max-new-tokens, or ask for longer answers.")
    else:
        if len(runs) > 1:
            lines.append(f"The fastest draft length in this run was {length}.")
        times = 1 + summary["speedup_percent"] / 100
        interval = summary["speedup_interval_percent"]
        sure = f" (95 % interval {1 + interval[0] / 100:.2f} to {1 + interval[1] / 100:.2f})" if interval else ""
        promises = [percent(summary[f"{kind}_speedup_percent"], "+") for kind in ("predicted", "ideal")]
        drafted = f" (of {counts['drafted_per_round']:.1f} guesses a round)" if length == "auto" else ""
        steps = f", and a draft step {figure(summary['draft_cost'])}: predicted {promises[0]}, ideal {promises[1]}"
        lines.append(
            f"Speculative decoding was {times:.2f} times as fast{sure}. Each verify pass of the main model gave "
            f"{counts['tokens_per_round']:.1f} tokens{drafted}; it cost {figure(summary['verify_cost'])} baseline "
            f"steps{'' if summary['draft_cost'] is None else steps}."
        )
        if repeats > 1:
            spread = [
                f"{figure(of['latency_min_s'])} to {figure(of['latency_max_s'])} s ({name})"
                for name, of in (("baseline", summary["baseline"]), ("speculative", counts))
            ]
            lines.append(f"From the fastest to the slowest of {repeats} repeats: {', '.join(spread)}.")
        parts = {"verify": "verifying", "draft": "drafting", "prefill": "reading the prompts", "other": "all else"}
        spent = sum(counts[f"{part}_s"] for part in parts)
        shares = [f"{100 * counts[f'{part}_s'] / spent:.0f} % {words}" for part, words in parts.items()]
        lines.append(f"Its time went to {', '.join(shares)}.")
        if times < 1:
            advice = "" if length == "auto" else "--draft-tokens auto, "
            other = "a smaller draft, or one that is right more often" if summary["draft_cost"] else "a draft model"
            lines.append(f"The draft does not pay here. Try {advice}{other}.")
        for other in compared:  # with the same K
            alike = next((run for run in runs if run["draft_tokens"] == other["draft_tokens"]), best)
            gain = ratio(
                *(of["tokens_per_s"] for of in (alike["summary"]["speculative"], other["summary"]["compared"]))
            )
            lines.append(f"With K = {alike['draft_tokens']} it was {figure(gain)} times as fast as {other['method']}.")

    ours = [(run, report) for run in runs for report in run["prompts"] if not report["error"]]
    if all(report["identical"] is None for _, report in ours):
        lines.append("The texts are drawn, so they differ: both methods draw from the main model's own distribution.")
        return lines
    identical = sum(report["identical"] for _, report in ours)
    share = "All" if identical == len(ours) else f"{identical} of"
    same = "The output is" if len(ours) == 1 == identical else f"{share} {len(ours)} outputs are"
    lines.append(f"{same} the main model's own, token for token.")

    meanings = {"mismatch": "Mismatches, NOT the main model's own (please report this as a bug)"}
    meanings |= {"tie": "Ties, the main model's own within its rounding"}
    for kind, meaning in meanings.items():
        parted = [(run, report) for run, report in ours if (report["divergence"] or {}).get("kind") == kind]
        if parted:
            run, report = max(parted, key=lambda one: one[1]["divergence"]["gap"] or 0)
            divergence = report["divergence"]
            gap, noise = (math.nan if divergence[of] is None else divergence[of] for of in ("gap", "noise"))
            lines.append(
                f"{meaning}: {len(parted)}. The largest: prompt {report['number']}, K = {run['draft_tokens']}, "
                f"new token {divergence['index'] + 1}, gap {gap:.3g}, rounding noise {noise:.3g}."
            )
    return lines


def best_run(runs: list[dict]) -> dict:
    """The run whose draft length was the fastest."""
    return max(runs, key=lambda run: run["summary"]["speculative"]["tokens_per_s"] or 0)


def save(path: str, option: str, text: str | None) -> None:
    """Replace a file in one step, so that it is whole at every moment; None: only see that this can be done.

    Raises CannotRun, which names the option.
    """
    with trying(f"write {path}", f"name another file with {option}"):
        target = pathlib.Path(path).resolve()  # a link stays a link
        if target.exists() and not target.is_file():
            raise CannotRun(f"{path} is not a file that can be replaced; name another with {option}")
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_text(text or "", encoding="utf-8")
            if text is not None:
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


# 8  Loading -----------------------------------------------------------------------------------------------------------


def read_prompts(path: str, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, or `limit` of them, spread evenly over the categories. Raises CannotRun.

    A text file has one prompt a line; blank lines and lines that start with # do not count. A file whose name ends in
    .jsonl has one JSON object a line, with `prompt` or `turns` (the first counts), and perhaps `category` and
    `question_id`: as the question files of MT-Bench and Spec-Bench.
    """
    with trying(f"read {path}", "name a text file with --prompts"):
        content = pathlib.Path(path).read_bytes()
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise CannotRun(f"{path}, line {line}: this is not UTF-8 text; save the file as UTF-8") from error
    prompts = []
    for line, content in enumerate(map(str.strip, lines), 1):
        if content and path.lower().endswith(".jsonl"):
            prompts.append(parse_prompt(content, f"{path}, line {line}", len(prompts) + 1))
        elif content and not content.startswith("#"):
            prompts.append(Prompt(content, len(prompts) + 1))
    if not prompts:
        raise CannotRun(f"{path} has no prompts; write one on each line")
    rank, seen = [], collections.Counter()  # each prompt's place within its category
    for prompt in prompts:
        rank.append((seen[prompt.category], prompt.number))
        seen[prompt.category] += 1
    chosen = {number for _, number in sorted(rank)[:limit]}
    return [prompt for prompt in prompts if prompt.number in chosen]


def parse_prompt(content: str, where: str, number: int) -> Prompt:
    """One line of a .jsonl file. Raises CannotRun."""
    try:
        entry = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CannotRun(f"{where}: this is not JSON ({first_line(error)}); write one object a line") from error
    text = category = None
    if isinstance(entry, dict):
        turns, text, category = (entry.get(key) for key in ("turns", "prompt", "category"))
        if text is None and isinstance(turns, list) and turns:
            text = turns[0]
    if not isinstance(text, str):
        raise CannotRun(f'{where}: no text; write {{"prompt": "…"}} or {{"turns": ["…"]}}')
    if not text.strip():
        raise CannotRun(f"{where}: the prompt is empty; leave the line out")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise CannotRun(f"{where}: half of a surrogate pair is not a character; leave it out")
    question_id = entry.get("question_id")
    question_id = question_id if isinstance(question_id, str | int) else None
    return Prompt(text, number, None if category is None else str(category), question_id)


def choose_device(wanted: str, state: accelerate.PartialState) -> torch.device:
    """The device named on the command line, or the accelerator if there is one, else the CPU. Raises CannotRun."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if wanted == "auto":
        return state.device if state.num_processes > 1 else accelerator
    with trying(f"use the device {wanted!r}", f"PyTorch finds {accelerator} here: use --device auto"):
        (probe := torch.zeros(1, device=wanted)).item()
        if probe.device.type != "cpu":
            torch.accelerator.set_device_index(probe.device)  # the one whose events `mark` records
        return probe.device


def device_name(device: torch.device) -> str:
    """What the device calls itself, e.g. "NVIDIA H100" or "AMD EPYC"."""
    if device.type != "cpu":
        name = getattr(torch.get_device_module(device), "get_device_name", None)
        return name(device) if name else device.type
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n")
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def hub_refuses(name: str) -> Exception | None:
    """Ask the hub for a model, once and not for long: downloads themselves would try again for half a minute."""
    try:
        huggingface_hub.HfApi().model_info(name, timeout=4)
    except Exception as error:  # whatever network and hub come up with
        return error


@functools.cache
def fetch(name: str, *patterns: str) -> str:
    """The folder of a model: the name itself if it is one, else the hub's model of that name, downloaded if need be.

    Of that, the files that match the patterns; never any that could hold code. Raises CannotRun.
    """
    if os.path.isdir(name):
        return name
    refusal = hub_refuses(name)
    try:
        if isinstance(refusal, hub_errors.HFValidationError | hub_errors.RepositoryNotFoundError):
            raise refusal
        return huggingface_hub.snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=["*/*"], etag_timeout=5, local_files_only=bool(refusal)
        )
    except Exception as error:
        status = getattr(getattr(refusal, "response", None), "status_code", None)
        access = f"accept its licence at https://huggingface.co/{plain(name)}, then `hf auth login`"
        spelling = "check the spelling, or `hf auth login` if it is private"
        answer = f"answers with status {status}" if status else "cannot be reached"
        elsewhere = "check the connection, name local folders with --main and --draft, or try --demo"
        match error:
            case hub_errors.HFValidationError():
                why = f"there is no folder {name}, and no model on the hub can have that name"
            case hub_errors.GatedRepoError():
                why = f"{name} is a gated model, and you have no access: {access}"
            case hub_errors.RepositoryNotFoundError():
                why = f"there is no folder {name}, and the hub shows no model of that name: {spelling}"
            case hub_errors.LocalEntryNotFoundError() if status in (401, 403):
                why = f"the hub does not let you read {name} (status {status}): {access} with a valid token"
            case hub_errors.LocalEntryNotFoundError():
                why = f"{name} is not on this machine, and the hub {answer}: {elsewhere}"
            case OSError(errno=errno.ENOSPC):
                why = f"the disk is full: {name} cannot be downloaded; make room, or set HF_HOME to a folder elsewhere"
            case _:
                why = f"cannot download {name}: {first_line(error)}; try again, or name a local folder"
        raise CannotRun(why) from error


NO_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt")


def load_config(name: str) -> transformers.PreTrainedConfig:
    """The configuration of a model whose cache can be rolled back. Raises CannotRun for any other."""
    folder = fetch(name, *NO_WEIGHTS)
    with trying(f"load {name}", "the folder needs the config.json of a causal language model, complete"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.is_encoder_decoder:
            raise CannotRun(f"{name} is an encoder-decoder; both models must be decoders only (Llama, Gemma, Qwen, …)")
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise CannotRun(f"{name} ({config.model_type}) is not a text-generation model; take a decoder")
        kind = AutoModelForCausalLM._model_mapping[type(config)]
        layers = DynamicCache(config=config).layers
    # The library's marks of what cannot go back: Mamba, RWKV, linear attention.
    if getattr(kind, "_is_stateful", False) or not all(layer.is_croppable for layer in layers):
        raise CannotRun(f"{name} ({config.model_type}) keeps a state that cannot be rolled back; take attention models")
    return config


def count_parameters(config: transformers.PreTrainedConfig) -> int:
    """How many weights a model has, from its configuration alone. Raises CannotRun."""
    with trying(f"build a {config.model_type} model", "the folder needs the config.json of a causal language model"):
        with accelerate.init_empty_weights(include_buffers=True):  # so nothing at all is allocated
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        return model.num_parameters()


def cache_gb(config: transformers.PreTrainedConfig, dtype: torch.dtype, tokens: int) -> float:
    """What the keys and values of a text take, in GB (10^9 bytes), if no layer has a window."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * tokens * dtype.itemsize / 1e9


def check_memory(
    configs: dict[str, transformers.PreTrainedConfig], sizes: dict[str, int], dtype: torch.dtype, device, tokens: int
) -> None:
    """Raise CannotRun if the device has less free memory than the models' weights and caches take.

    sizes: the number of weights of each model; tokens: the most of a text.
    """
    limits = accelerate.utils.get_max_memory()
    free = limits.get(device.type, limits.get(device.index or 0, math.inf)) / 1e9
    needs = {name: (sizes[name] * dtype.itemsize / 1e9, cache_gb(configs[name], dtype, tokens)) for name in configs}
    if (needed := sum(map(sum, needs.values()))) <= free:
        return
    parts = ", ".join(f"{name} {weights:.1f} + {cache:.1f}" for name, (weights, cache) in needs.items())
    mends = ["--device-map auto"] * (device.type != "cpu") + ["a smaller pair"]
    if dtype == torch.float32 and needed / 2 <= free:
        mends.insert(0, "--dtype bfloat16 (half of it)")
    raise CannotRun(
        f"the models need {needed:.1f} GB in {str(dtype).removeprefix('torch.')} (weights + cache: {parts}), and "
        f"{device} has {free:.1f} GB free: try {', or '.join(mends)}"
    )


def load_model(name: str, config: transformers.PreTrainedConfig, dtype: torch.dtype, **placement) -> PreTrainedModel:
    """Load a model's weights, to where `placement` says. Raises CannotRun for what is broken or does not fit."""
    folder = fetch(name, *NO_WEIGHTS, "*.safetensors")
    safely = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    with trying(f"load {name}", "it needs memory, and safetensors weights of a causal language model, complete"):
        model, loading = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, **safely, **placement)
    if missing := sorted(loading["missing_keys"]):
        raise CannotRun(f"{name} lacks {len(missing)} of its weights ({missing[0]}, …): download it again")
    return model


def load_tokenizer(names: list[str]) -> transformers.PreTrainedTokenizerBase:
    """The first model's tokenizer. The others' must have the same number for the same token. Raises CannotRun."""
    tokenizers = []
    for name in names:
        with trying(f"load the tokenizer of {name}", "download it again"):
            tokenizers.append(AutoTokenizer.from_pretrained(fetch(name, *NO_WEIGHTS), trust_remote_code=False))
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    if differing := vocabularies[0].items() ^ vocabularies[-1].items():
        token = min(differing)[0]
        sizes, numbers = zip(*[(f"{len(of):,}", str(of.get(token, "nothing"))) for of in vocabularies], strict=True)
        raise CannotRun(
            f"{' and '.join(names)} have different tokenizers ({' and '.join(sizes)} tokens; {token!r} is "
            f"{' and '.join(numbers)}): take a draft of the main model's family, or --draft ngram"
        )
    return tokenizers[0]


def encode(tokenizer, prompt: str, chat: bool) -> list[int]:
    """The prompt's token ids, within the chat template if `chat`."""
    if not chat:
        return tokenizer(prompt)["input_ids"]
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """All tokens that end a text, by the model's generation config."""
    ids = model.generation_config.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def context_length(config: transformers.PreTrainedConfig) -> float:
    """The most tokens that a text may have; infinite where the model sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


# 9  The command line --------------------------------------------------------------------------------------------------


def between(kind: type, least: float, most: float, what: str) -> Callable[[str], float]:
    """An argparse type: a number from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def draft_lengths(text: str) -> list[int | str]:
    """An argparse type: auto, a number, or several of these with commas between them."""
    number = between(int, 1, 1000, "auto, or a number from 1 to 1000, or several with commas between them")
    return list(dict.fromkeys("auto" if part == "auto" else number(part) for part in text.split(",")))


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The options, as given. A bad one ends the program with one line and status 2."""
    parser = argparse.ArgumentParser(
        description="Measure what speculative decoding gains for a main model and a draft model on this machine, "
        "and check that the output is still the main model's own.",
        epilog="With no accelerator and no model named, the bundled pair of tiny models runs, as with --demo.",
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    natural, positive = (between(int, n, 2**40, f"a whole number of at least {n}") for n in (0, 1))
    heat, share = between(float, 0, 100, "a number from 0 to 100"), between(float, 1e-6, 1, "a number above 0, up to 1")

    add_argument = parser.add_argument_group("the pair and the prompts").add_argument
    add_argument("--main", metavar="MODEL", help=f"Hugging Face id or local folder (default: {DEFAULT_MAIN})")
    add_argument("--draft", metavar="MODEL", help=f"a smaller model, or ngram: no model (default: {DEFAULT_DRAFT})")
    add_argument("--demo", action="store_true", help="the bundled pair and its own prompts, offline, in seconds")
    add_argument("--prompts", metavar="FILE", help="one a line, or .jsonl as Spec-Bench has (default: prompts.txt)")
    add_argument("--limit", metavar="N", type=positive, help="take N prompts, spread evenly over their categories")
    add_argument("--no-chat-template", action="store_true", help="feed the prompts as they are")
    add_argument = parser.add_argument_group("how to decode").add_argument
    add_argument("--max-new-tokens", metavar="N", type=positive, default=128, help="default: 128")
    add_argument("--ignore-eos", action="store_true", help="write exactly N tokens, past the end of a text")
    lengths = "how many tokens a round drafts: auto (the default), a number, or several to compare, as 1,2,4"
    add_argument("--draft-tokens", metavar="K", type=draft_lengths, default=["auto"], help=lengths)
    add_argument("--temperature", metavar="T", type=heat, default=0.0, help="draw tokens (default: 0, the likeliest)")
    add_argument("--top-k", metavar="N", type=natural, default=0, help="draw from the N likeliest (default: 0, all)")
    add_argument(
        "--top-p", metavar="P", type=share, default=1.0, help="from the likeliest that add up to P (default: 1)"
    )
    add_argument("--seed", metavar="S", type=natural, default=0, help="of the random numbers (default: 0)")
    add_argument = parser.add_argument_group("where to decode").add_argument
    add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="compile the steps (auto: on CUDA)")
    add_argument("--device", metavar="D", default="auto", help="cpu, cuda, cuda:1, mps, … (default: a GPU, else cpu)")
    kinds = ["auto", "float32", "bfloat16", "float16"]
    add_argument("--dtype", choices=kinds, default="auto", help="default: bfloat16 on a GPU, float32 on a CPU")
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
    options = parser.parse_args(arguments)
    if options.demo and (options.main or options.draft not in (None, "ngram")):
        parser.error("--demo brings its own models: leave out --main and --draft, or --demo")
    if not options.temperature and (options.top_k or options.top_p < 1):
        parser.error("--top-k and --top-p cut what tokens are drawn from: add a --temperature")
    if 0 < options.temperature < 0.001:
        parser.error("--temperature is 0 or at least 0.001: less is rounded away")
    if options.device_map and options.compile == "on":
        parser.error("--device-map auto moves weights while it runs, which cannot be compiled: leave out --compile on")
    if options.max_memory:
        try:
            accelerate.utils.convert_file_size_to_int(options.max_memory)
        except ValueError:
            parser.error(f"--max-memory {options.max_memory}: write a size such as 10GB or 500MB")
        if not options.device_map:
            parser.error("--max-memory says how --device-map auto spreads the main model: add that")
    return options


def settle(options: argparse.Namespace, device: torch.device) -> str | None:
    """Replace every default that depends on the machine by the value in force; return what the user must be told."""
    notice = None
    if options.demo or (device.type == "cpu" and not options.main and options.draft in (None, "ngram")):
        why = "This" if options.demo else "No GPU in use: this"
        notice = f"{why} is the bundled pair of tiny models. Its speed says nothing about Gemma's."
        if not (BUNDLED / "main").is_dir():
            raise CannotRun(f"no bundled pair in {BUNDLED}: clone the whole project, or name --main and --draft")
        options.demo = True
        options.main = os.path.relpath(BUNDLED / "main")
        options.draft = options.draft or os.path.relpath(BUNDLED / "draft")
    elif options.main and not options.draft:
        notice = f"The draft is {DEFAULT_DRAFT}, the default: name another with --draft."
    options.main = options.main or DEFAULT_MAIN
    options.draft = options.draft or DEFAULT_DRAFT
    options.prompts = options.prompts or os.path.relpath((BUNDLED if options.demo else HERE) / "prompts.txt")
    options.device = str(device)
    if options.compile == "auto":
        options.compile = "on" if device.type == "cuda" and not options.device_map else "off"
    if options.dtype == "auto":
        options.dtype = "float32" if device.type == "cpu" else "bfloat16"
    files = [os.path.realpath(path) for path in (options.prompts, options.json, options.svg) if path]
    if len(files) != len(set(files)):
        raise CannotRun("--json and --svg need files of their own, which are not the prompts'; name others")
    return notice


def longest(options: argparse.Namespace) -> int:
    """The most tokens that any round may draft."""
    return max(LONGEST_AUTO if length == "auto" else length for length in options.draft_tokens)


def encode_all(
    options: argparse.Namespace, prompts: list[Prompt], tokenizer, context: float, device: torch.device
) -> tuple[list[Prompt], str | None]:
    """The prompts that fit into the context, with their ids; and what must be said of the others. Raises CannotRun."""
    chat = not options.no_chat_template and tokenizer.chat_template is not None
    # The last round may draft beyond the last new token; and costs are measured with one such round behind a prompt.
    room = max(options.max_new_tokens, 2) + longest(options) - 1
    fitting, lengths = [], []
    for prompt in prompts:
        with trying(f"put prompt {prompt.number} into the chat template", "--no-chat-template feeds it as it is"):
            ids = encode(tokenizer, prompt.text, chat)
        if not ids:
            raise CannotRun(f"prompt {prompt.number} of {options.prompts} comes to no tokens; leave it out")
        lengths.append(len(ids))
        if len(ids) + room <= context:
            ids = torch.tensor([ids], device=device)
            fitting.append(dataclasses.replace(prompt, ids=ids, max_new_tokens=options.max_new_tokens))
    if len(fitting) == len(prompts):
        return fitting, None
    too_long = (
        f"{len(prompts) - len(fitting)} of {len(prompts)} prompts of {options.prompts} are too long: with {room} "
        f"tokens for the output and a last draft they exceed the models' context of {context} (the longest has "
        f"{max(lengths)})"
    )
    if not fitting:
        raise CannotRun(f"{too_long}: lower --max-new-tokens or --draft-tokens, or shorten the prompts")
    return fitting, f"{too_long}: left out"


def read_all(options: argparse.Namespace, device: torch.device, errors: Console) -> tuple:
    """By role, configurations and numbers of weights; the tokenizer; the prompts that fit: all but the weights.

    A pair that cannot run is refused here. Raises CannotRun.
    """
    names = {"main": options.main} | ({} if options.draft == "ngram" else {"draft": options.draft})
    prompts = read_prompts(options.prompts, options.limit)
    configs = {role: load_config(name) for role, name in names.items()}
    tokenizer = load_tokenizer(list(names.values()))
    prompts, left_out = encode_all(options, prompts, tokenizer, min(map(context_length, configs.values())), device)
    if left_out:
        errors.print(f"warning: {left_out}")
    if max(prompt.ids.max().item() for prompt in prompts) >= common_vocabulary(configs):
        raise CannotRun(f"the tokenizer of {options.main} has tokens that the models do not know; download them again")
    sizes = {role: count_parameters(config) for role, config in configs.items()}
    if not options.device_map:
        tokens = max(prompt.ids.shape[1] for prompt in prompts) + options.max_new_tokens + longest(options)
        named = ({f"{role} {name}": of[role] for role, name in names.items()} for of in (configs, sizes))
        check_memory(*named, getattr(torch, options.dtype), device, tokens)
    return configs, sizes, tokenizer, prompts


def common_vocabulary(configs: dict[str, transformers.PreTrainedConfig]) -> int:
    """How many tokens all of the models know: those of one family are padded differently."""
    return min(config.get_text_config().vocab_size for config in configs.values())


def load_pair(options: argparse.Namespace, configs: dict, device: torch.device, scratch: str, errors: Console) -> tuple:
    """The main model, the draft, and the rule by which tokens are chosen. Raises CannotRun.

    `scratch`: a folder for weights that are offloaded to the disk.
    """
    placement = dict.fromkeys(configs, {"device_map": device})
    if options.device_map:
        limits = accelerate.utils.get_max_memory()
        first = device.type if device.type in limits else device.index or 0
        limits[first] = min(limits[first], accelerate.utils.convert_file_size_to_int(options.max_memory or "1PB"))
        placement["main"] = {"device_map": options.device_map, "max_memory": limits, "offload_folder": scratch}
    models = {}
    for role in reversed(configs):  # the draft first: it wants one device for itself
        name = getattr(options, role)
        errors.print(f"Loading {plain(name)} …", style="dim")
        model = load_model(name, configs[role], getattr(torch, options.dtype), **placement[role])
        models[role] = CachedModel(model, common_vocabulary(configs), device)
    rule = Greedy()
    if options.temperature:
        rule = Sampling(options.temperature, options.top_k, options.top_p, options.seed, device)
    draft = ModelDraft(models["draft"], rule) if "draft" in models else NgramDraft(device)
    return models["main"], draft, rule


def compile_pair(
    options: argparse.Namespace, main: CachedModel, draft, rule: Greedy, longest_prompt: int, console: Console
) -> None:
    """Compile the steps of both models, for the numbers of tokens that come up; they stay eager if that fails."""
    start = time.perf_counter()
    capacity = longest_prompt + options.max_new_tokens + longest(options) + 1
    models = [main] + ([draft.model] if isinstance(draft, ModelDraft) else [])
    try:
        for model in models:
            model.fix_size(capacity)
        main.compile(rule.next_token, 1, rule.uniform(1))
        for length in {0, *(LONGEST_AUTO if length == "auto" else length for length in options.draft_tokens)}:
            main.compile(rule.judge, length + 1, last=0)
        for model in models[1:]:
            for tokens in (1, 2):
                model.compile(rule.guess, tokens, rule.uniform(1))
    except Exception as error:  # a compiler can fail in any way; eager runs can be measured all the same
        console.print(f"warning: compiling failed, so this runs eagerly: {first_line(error)}")
        options.compile = "off"
        for model in models:
            model.run_eagerly()
    options.compile_s = time.perf_counter() - start


def choose_methods(
    options: argparse.Namespace, main: CachedModel, draft, rule: Greedy, prompt_ids: Tensor, errors: Console
) -> tuple[dict[str, Callable[[Prompt], Decoded]], dict[str, dict], dict[str, dict]]:
    """What to measure: the methods by name, the baseline first; and for each but that its part of the JSON.

    These apart: one for each draft length, and what we compare with.
    """
    model = getattr(draft, "model", None)
    methods, ours, compared = {"baseline": functools.partial(decode_alone, main, rule)}, {}, {}
    for length in options.draft_tokens:
        name, part = f"K = {length}", {"draft_tokens": length, "prompts": [], "summary": None, "categories": {}}
        if length == "auto":
            part["costs"] = measure_costs(main, model, rule, prompt_ids, LONGEST_AUTO)
        chooser = AutoLength(LONGEST_AUTO, part["costs"]) if length == "auto" else FixedLength(length)
        methods[name], ours[name] = functools.partial(decode_speculatively, main, draft, rule, chooser), part
    if options.compare:
        others = {"generate()": (None, None)}
        sizes = [each.model.config.get_text_config().vocab_size for each in (main, model or main)]
        if sizes[0] == sizes[1]:
            names = ["assisted" if length == "auto" else f"assist {length}" for length in options.draft_tokens]
            others |= {name: (draft, length) for name, length in zip(names, options.draft_tokens, strict=True)}
        else:
            why = f"its vocabularies are padded differently, to {sizes[0]:,} and {sizes[1]:,} tokens"
            errors.print(f"warning: transformers' assisted generation refuses this pair ({why}): left out")
        for name, (helper, length) in others.items():
            k = None if length == "auto" else length
            methods[name] = functools.partial(decode_by_transformers, main, helper, rule, k)
            drafting = "its default K" if length == "auto" else f"K = {length}"
            said = f"transformers' assisted generation, {drafting}" if helper else "transformers' generate()"
            compared[name] = {"method": said, "draft_tokens": length, "prompts": [], "summary": None, "categories": {}}
    return methods, ours, compared


def add_results(
    parts: dict[str, dict], done: list[tuple[Prompt, dict[str, Measured]]], prompt: Prompt, results, tokenizer, options
) -> None:
    """Add to each method's part of the JSON what became of a prompt, and bring its summaries up to date."""
    sampled = bool(options.temperature)
    if isinstance(results, dict):
        done.append((prompt, results))
    alike = [each for other, each in done if other.category == prompt.category]
    for name, part in parts.items():
        key = "compared" if "method" in part else "speculative"
        part["prompts"].append(report_prompt(prompt, results, name, key, sampled, tokenizer))
        if isinstance(results, dict):
            how = name, key, sampled, options.draft != "ngram"
            part["summary"] = summarise([each for _, each in done], *how)
            if prompt.category is not None:
                part["categories"][prompt.category] = summarise(alike, *how)


def describe_machine(options: argparse.Namespace, device: torch.device, processes: int) -> dict:
    """What the JSON says of where it all ran."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def counted(number: int, noun: str) -> str:
    """A number of things, e.g. "1 layer" or "2 layers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def describe(
    console: Console, options: argparse.Namespace, environment: dict, configs: dict, sizes: dict, prompts: int
) -> None:
    """Print what is about to run."""
    console.print("Speculative decoding: does the draft pay?", style="bold")
    table = Table.grid(padding=(0, 2, 0, 0))
    for role, config in configs.items():
        millions = sizes[role] / 1e6
        size = f"{millions / 1000:.1f} B" if millions >= 1000 else f"{millions:.1f} M"
        layers = counted(config.get_text_config().num_hidden_layers, "layer")
        table.add_row(f"  {role}", plain(getattr(options, role)), f"{size} parameters, {layers}")
    if len(configs) == 1:
        table.add_row("  draft", "ngram", "no model: what followed the same tokens before")
    console.print(table)
    threads = f", {counted(environment['threads'], 'thread')}" if environment["device"] == "cpu" else ""
    processes = f" in each of {environment['processes']} processes" if environment["processes"] > 1 else ""
    machine = f"{environment['device']} ({plain(environment['device_name'])}{threads}){processes}"
    console.print(f"  {machine}, {environment['dtype']}, {'compiled' if options.compile == 'on' else 'eager'}")
    limit = counted(options.max_new_tokens, "new token")
    console.print(f"  K = {' / '.join(map(str, options.draft_tokens))}, up to {limit}, {counted(prompts, 'prompt')}")
    if options.temperature:
        drawn = f"temperature {options.temperature:g}, top-k {options.top_k or 'off'}, top-p {options.top_p:g}"
        console.print(f"  {drawn}, seed {options.seed}; log-likelihoods are at temperature 1, with nothing cut off")


def print_result(console: Console, ours: dict[str, dict], compared: dict[str, dict], repeats: int) -> None:
    """Print the averages, what compares draft lengths and categories, and the result in words."""
    runs, others = list(ours.values()), list(compared.values())
    best = best_run(runs)
    print_reports(console, "", "mean", {name: part["summary"] for name, part in (ours | compared).items()})
    console.print()
    if best["categories"]:
        print_summaries(console, "By category", [*best["categories"].items(), ("all prompts", best["summary"])])
        console.print()
    if len(runs) > 1:
        print_summaries(console, "By draft length", [(name, run["summary"]) for name, run in ours.items()])
        console.print()
        print_chart(console, runs)
        console.print()
    for line in in_words(runs, others, repeats):
        console.print(line)


def run(options: argparse.Namespace, scratch: str) -> int:
    """Do what the options ask for, with a folder for temporary files; return the exit status."""
    # One process, or one of several that torchrun or `accelerate launch` started: the prompts are dealt out to them.
    world = accelerate.PartialState(cpu=options.device == "cpu" or not torch.accelerator.is_available())
    plainly = {"markup": False, "emoji": False, "highlight": False, "quiet": not world.is_main_process}
    console = Console(width=None if sys.stdout.isatty() else 120, record=bool(options.svg), **plainly)
    errors = Console(stderr=True, soft_wrap=True, **plainly)
    device = choose_device(options.device, world)
    if notice := settle(options, device):
        console.print(notice)

    def write(option: str, text: str | None) -> None:
        if (path := getattr(options, option)) and world.is_main_process:
            save(path, f"--{option}", text)

    write("json", None)  # better to fail now than when all is measured
    write("svg", None)
    configs, sizes, tokenizer, prompts = read_all(options, device, errors)
    environment = describe_machine(options, device, world.num_processes)
    describe(console, options, environment, configs, sizes, len(prompts))
    main, draft, rule = load_pair(options, configs, device, scratch, errors)
    ends = frozenset() if options.ignore_eos else end_tokens(main.model)
    prompts = [dataclasses.replace(prompt, end_ids=ends) for prompt in prompts]
    lengths = [prompt.ids.shape[1] for prompt in prompts]
    if options.compile == "on":
        errors.print("Compiling …", style="dim")
        compile_pair(options, main, draft, rule, max(lengths), console)
    with trying("decode with this pair", "lower --max-new-tokens, or take a smaller pair"):
        shortest = prompts[lengths.index(min(lengths))].ids
        methods, ours, compared = choose_methods(options, main, draft, rule, shortest, errors)
    parts = ours | compared
    report = {"environment": environment, "settings": vars(options)}
    report |= {"runs": list(ours.values()), "compared": list(compared.values())}

    # A bar that redraws itself would take time from what is timed: this one is drawn between the runs only.
    columns = TextColumn("{task.description}"), BarColumn(20), TimeRemainingColumn()
    hidden = not errors.is_terminal or errors.quiet
    bar = Progress(
        *columns, console=errors, transient=True, auto_refresh=False, disable=hidden, speed_estimate_period=1e6
    )
    mine = prompts[world.process_index :: world.num_processes]
    task = bar.add_task("", total=len(methods) * (options.warmup + options.repeats * len(mine)) + 1)

    def announce(prompt: Prompt, what: str) -> None:
        known = report["runs"][0]["summary"]
        rate = f", {figure(known['speculative']['tokens_per_s'])} tokens/s so far" if known else ""
        bar.start()
        bar.update(task, description=f"prompt {prompt.number}: {what}{rate}", advance=1, refresh=True)

    print_headings(console)
    done, failed, stopped = [], [], None
    try:
        results = measure(main, mine, methods, options.repeats, options.warmup, not options.temperature, announce)
        for first in range(0, len(prompts), world.num_processes):
            with trying("hear from the other processes", "see what they say, and start again"):
                everyones = accelerate.utils.gather_object([next(results, None)])
            bar.stop()
            for prompt, result in zip(prompts[first:], everyones, strict=False):
                add_results(parts, done, prompt, result, tokenizer, options)
                report["complete"] = prompt is prompts[-1]
                write("json", json.dumps(report, indent=2, allow_nan=False) + "\n")
                failed += [result] if isinstance(result, str) else []
                latest = {name: part["prompts"][-1] for name, part in parts.items()}
                print_reports(console, str(prompt.number), prompt.text, latest)
                for name in ours if options.show_text and isinstance(result, dict) else ():
                    console.print(f"{name}:", style="bold")
                    print_text(console, tokenizer, result[name].run)
    except (KeyboardInterrupt, CannotRun) as error:
        stopped = error  # and on: what was measured so far is reported all the same
    finally:
        bar.stop()

    if done and all(part["summary"] for part in parts.values()):
        if stopped:
            console.print(f"Only {len(done)} of {len(prompts)} prompts: a part of the result.", style="bold")
        print_result(console, ours, compared, options.repeats)
        write("svg", console.export_svg(title="speculative_decoding.py") if options.svg else None)
    if isinstance(stopped, KeyboardInterrupt):
        errors.print(f"Interrupted after {len(done)} of {len(prompts)} prompts.")
        return 130
    if stopped:
        raise stopped
    if not done:
        raise CannotRun(f"no prompt could be decoded ({failed[0]}): lower --max-new-tokens, or take a smaller pair")
    return 1 if failed or any(run["summary"]["mismatches"] for run in ours.values()) else 0


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status: 0 well, 1 not all is well with some prompt, 2 it could not, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for terminals and files that lack a character of the report
    options = parse_options(arguments)
    transformers.logging.set_verbosity_error()
    for library in ("accelerate", "huggingface_hub"):  # what they would say is said in one line, or in the table
        logging.getLogger(library).setLevel(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    for asked_to_end in (signal.SIGINT, signal.SIGTERM):  # both: it reports what is done, and ends
        signal.signal(asked_to_end, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="speculative-decoding-") as scratch:
            return run(options, scratch)
    except CannotRun as error:
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
    sys.exit(main())

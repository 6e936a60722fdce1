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
for any draft; a bad one only costs time. How much a good one gains is what this program measures.

The file is meant to be read from top to bottom. Each part uses only what stands above it:

    1  a model with a cache that can be rolled back
    2  greedy decoding (the baseline)
    3  speculative decoding: draft, verify, accept, roll back
    4  is the output the main model's own?
    5  measuring: one prompt, all prompts, a summary
    6  reporting: the table, the result in words, JSON
    7  loading: prompts, models, devices
    8  the command line

What is deliberately not here: sampling (both methods are greedy), batches of more than one text, trees of guesses.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator

import huggingface_hub
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
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
LONGEST_AUTO = 16  # the most tokens that a round drafts where the program itself chooses how many
DEFAULT_MAIN, DEFAULT_DRAFT = "google/gemma-2-9b-it", "google/gemma-2-2b-it"


class CannotRun(Exception):
    """The program cannot do what was asked; the message is one line that says what is wrong and how to mend it."""


# 1  A model with a cache that can be rolled back ----------------------------------------------------------------------


class CachedModel:
    """A causal language model, and the keys and values of the text that it has read.

    Each call reads further tokens of one text. `roll_back` forgets the latest ones again: it is what lets a wrong guess
    disappear without reading the text anew. Two caches are possible: one that grows, for eager runs, and one of fixed
    size, for compiled ones.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int | None = None):
        """`vocabulary`: only the first so many tokens count (the models of one family are padded differently)."""
        self.model = model.eval()
        self.device = model.device
        self.vocabulary = vocabulary
        self.compiled = {}  # (step, number of tokens): the compiled function
        self.lengths = None  # of the layers' fixed storage: [] on the device, each
        config = model.config.get_text_config()
        builds_masks = config._attn_implementation == "eager" and hasattr(config, "layer_types")  # Gemma 2 does
        self.all_seen = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device) if builds_masks else None
        self.new_text()

    def new_text(self, rolls_back: bool = True) -> None:
        """Forget the text. A cache that never rolls back need not keep what leaves a sliding window."""
        if self.lengths is not None:
            self.cache.reset()  # new storage would mean new graphs
            return
        self.cache = DynamicCache(config=self.model.config)
        if rolls_back:
            self.cache.activate_past_recording()

    def read(self, ids: Tensor, last: int = 0) -> Tensor:
        """Read tokens; return the logits at each of them: what the model expects to come next.

        ids: [1, n], n ≥ 1. Returns [n, vocabulary], or [last, vocabulary] where only the last places matter.
        """
        # A single token sees all that a growing cache returns: models that would build masks to say so are given one.
        mask = self.all_seen if self.lengths is None and ids.shape[1] == 1 else None
        with torch.inference_mode(self.lengths is None):  # faster than no_grad; compiled steps do without
            output = self.model(
                input_ids=ids, attention_mask=mask, past_key_values=self.cache, use_cache=True, logits_to_keep=last
            )
        return output.logits[0, :, : self.vocabulary]

    def next_token(self, ids: Tensor) -> Tensor:
        """Read tokens, [1, n]; return the likeliest next one, [1, 1]."""
        return self.step(self._next_token, ids)[0]

    def _next_token(self, ids: Tensor) -> tuple[Tensor]:
        return (self.read(ids, last=1).argmax(dim=-1, keepdim=True),)

    def guess(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read tokens, [1, n]; return the likeliest next one, [1, 1], and its probability, [1], in float32."""
        return self.step(self._guess, ids)

    def _guess(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.read(ids, last=1).float()
        best, token = logits.max(dim=-1, keepdim=True)
        return token, (best[0] - logits.logsumexp(dim=-1)).exp()

    def verify(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read the text's last token and K drafted ones, [1, K+1], in one pass.

        Returns the likeliest next token after each, [1, K+1], and the natural logarithm of the probability of each
        drafted token, given all before it, [K], in float32.
        """
        tokens = ids.shape[1]
        wider = min((n for step, n in self.compiled if step == "_verify" and n >= tokens > 1), default=tokens)
        choices, log_likelihood = self.step(self._verify, torch.nn.functional.pad(ids, (0, wider - tokens)))
        if wider > tokens:  # a pass of a compiled width: ignore the padding, and forget it
            self.roll_back(wider - tokens)
        return choices[:, :tokens], log_likelihood[: tokens - 1]

    def _verify(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.read(ids)
        log_likelihood = -torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="none")
        return logits.argmax(dim=-1)[None], log_likelihood

    def roll_back(self, tokens: int) -> None:
        """Forget the latest tokens that were read."""
        if tokens and self.lengths is None:
            self.cache.crop(-tokens)  # and sliding windows drop what they no longer need
        elif tokens:  # what lies behind the length is masked, and written over by the next tokens
            torch._foreach_add_(self.lengths, -tokens)

    def step(self, function: Callable, ids: Tensor) -> tuple[Tensor, ...]:
        """Run a step; compiled if it is for so many tokens, else eagerly: a prompt can have any length."""
        if (compiled := self.compiled.get((function.__name__, ids.shape[1]))) is None:
            return function(ids)
        # A CUDA graph writes its outputs into the same memory each time. They are read after further steps, and even
        # become inputs of the next: so they are copied first. And the graphs must be told where a new step begins, or
        # they take outputs that are still held for memory in use, and record themselves anew.
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(output.clone() for output in compiled(ids))

    @torch.no_grad()
    def compile(self, capacity: int, widths: dict[str, set[int]]) -> None:
        """Compile steps for the numbers of tokens that occur again and again; the cache gets a fixed size.

        capacity: the most tokens of a text. widths: for "next_token", "guess" or "verify", the numbers of tokens. Each
        step is compiled whole, with its argmax and log-likelihood, so that a few numbers are all that leaves it. Layers
        with sliding windows are stored in full, too: the mask hides what lies outside a window, and whole layers can
        roll back by moving a length. Raises what the compiler raises.
        """
        kinds = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
        layers = DynamicCache(config=self.model.config).layers
        if not kinds.issuperset(map(type, layers)):
            raise NotImplementedError(f"{self.model.config.model_type} needs a cache of its own kind")
        self.cache = Cache(layers=[layer if type(layer) is DummyLayer else StaticLayer(capacity) for layer in layers])
        self.lengths = []
        # Read something before compiling: graphs need the storage at an address that never changes.
        self.read(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        self.lengths = [layer.cumulative_length for layer in self.cache.layers if type(layer) is StaticLayer]
        for name, numbers in widths.items():
            step = torch.compile(getattr(self, f"_{name}"), mode="reduce-overhead", dynamic=False)
            for tokens in sorted(numbers):
                self.compiled[f"_{name}", tokens] = step
                for _ in range(3):  # compile; capture a graph; replay it
                    self.new_text()
                    getattr(self, name)(torch.zeros(1, tokens, dtype=torch.long, device=self.device))


# 2  Greedy decoding (the baseline) ------------------------------------------------------------------------------------


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


def cut(tokens: list[int], room: int, end_ids: set[int]) -> tuple[list[int], bool]:
    """The tokens up to the first that ends the text, or as many as there is room for; and whether the text is ended."""
    for index, token in enumerate(tokens[:room]):
        if token in end_ids:
            return tokens[: index + 1], True
    return tokens[:room], len(tokens) >= room


@torch.no_grad()
def greedy_decode(main: CachedModel, prompt_ids: Tensor, max_new_tokens: int, end_ids: set[int]) -> Decoded:
    """Decode with the main model alone: one forward pass a token.

    prompt_ids: [1, n], n ≥ 1, on the model's device. end_ids: the tokens that end a text, as its last token.
    """
    start = now(main.device)
    main.new_text(rolls_back=False)
    token = main.read(prompt_ids, last=1).argmax(dim=-1, keepdim=True)  # [1, 1]
    tokens, ended = cut([token.item()], max_new_tokens, end_ids)
    first_token_s = now(main.device) - start
    while not ended:
        token = main.next_token(token)
        emitted, ended = cut([token.item()], max_new_tokens - len(tokens), end_ids)
        tokens += emitted
    return Decoded(tokens, now(main.device) - start, first_token_s)


# 3  Speculative decoding ----------------------------------------------------------------------------------------------
#
# One invariant carries the loop. Between two rounds, always,
#
#     the main model has read the whole text but its last token,
#     the draft has read the whole text but its last two.
#
# A round feeds the draft those two tokens and then each of its own guesses but the last: it has now read the text and
# d1 … d(K-1). It feeds the main model the text's last token and all guesses: it has now read the text and d1 … dK. If n
# guesses are right, the text grows by d1 … dn and one token of the main model's own. So what each model has read too
# much is, for both, K-n tokens. They roll back by so many, and the invariant holds again, for n = K as for any other n:
# nothing is special about a round whose guesses are all right. And every pass has the same shape in every round.
#
# Only a round without any guess, which an automatic K allows, leaves the draft further behind: it reads on when it is
# asked again.


class FixedLength:
    """Draft the same number of tokens in every round."""

    def __init__(self, longest: int):
        self.longest = longest

    def wants_another(self, confidences: list[Tensor]) -> bool:
        """Whether to draft one more, given the draft's own probabilities, each [1], of what this round has drafted."""
        return len(confidences) < self.longest

    def learn(self, drafted: int, accepted: int) -> None:
        """What became of the round."""


@torch.no_grad()
def speculative_decode(
    main: CachedModel,
    draft: CachedModel,
    prompt_ids: Tensor,
    max_new_tokens: int,
    end_ids: set[int],
    draft_length: FixedLength,
) -> Decoded:
    """Decode with the draft's help: the same text, several tokens a forward pass of the main model.

    Leviathan et al. 2023, algorithm 1, for greedy decoding. prompt_ids: [1, n], n ≥ 1, on the models' device. The last
    round is a whole one too; what it gives beyond the end of the text is cut off.
    """
    start = now(main.device)
    main.new_text()
    draft.new_text()
    first = main.read(prompt_ids, last=1).argmax(dim=-1, keepdim=True)  # [1, 1]
    tokens, ended = cut([first.item()], max_new_tokens, end_ids)
    first_token_s = now(main.device) - start
    if prompt_ids.shape[1] > 1:
        draft.read(prompt_ids[:, :-1], last=1)
    unread = torch.cat([prompt_ids[:, -1:], first], dim=1)  # [1, 2]: the end of the text, which the draft has not read

    rounds, log_likelihoods, marks = [], [], [mark(main.device)]
    while not ended:
        # 1. Draft: K guesses, one after the other. With a fixed K, the host only queues work here and waits for nothing.
        guesses, confidences, ids = [unread[:, -1:]], [], unread
        while draft_length.wants_another(confidences):
            ids, confidence = draft.guess(ids)
            guesses.append(ids)
            confidences.append(confidence)
        guesses = torch.cat(guesses, dim=1)  # [1, K+1]: the text's last token, d1 … dK
        marks.append(mark(main.device))

        # 2. Verify: one pass of the main model says what it would have written at each place itself.
        choices, log_likelihood = main.verify(guesses)  # [1, K+1]: g1 … g(K+1); [K]
        marks.append(mark(main.device))

        # 3. Accept the guesses before the first wrong one, and the main model's own token in its place, or behind them
        #    all. The one moment in a round when the host waits for the device and reads from it.
        (_, *d), g = torch.cat([guesses, choices]).tolist()
        drafted = len(d)
        accepted = next((i for i in range(drafted) if d[i] != g[i]), drafted)
        emitted, ended = cut(g[: accepted + 1], max_new_tokens - len(tokens), end_ids)  # g1 … gn are d1 … dn
        tokens += emitted

        # 4. Roll back: both models forget the wrong guesses.
        main.roll_back(drafted - accepted)
        draft.roll_back(drafted - accepted)
        last_two = torch.stack([guesses[0, accepted], choices[0, accepted]])[None]
        unread = last_two if drafted else torch.cat([unread[:, :-1], last_two], dim=1)

        draft_length.learn(drafted, accepted)
        rounds.append((drafted, accepted))
        log_likelihoods.append(log_likelihood)
        marks.append(mark(main.device))

    latency_s = now(main.device) - start
    spent = [seconds_between(earlier, later) for earlier, later in itertools.pairwise(marks)]
    return Decoded(
        tokens,
        latency_s,
        first_token_s,
        rounds,
        log_likelihood=torch.cat(log_likelihoods).sum().item() if rounds else 0.0,
        prefill_s=latency_s - sum(spent),
        draft_s=sum(spent[0::3]),
        verify_s=sum(spent[1::3]),
    )


# How many tokens to draft: as long as one more is worth more than it costs.


@dataclasses.dataclass
class Costs:
    """What passes cost on this machine, in seconds, by the number of tokens."""

    draft_pass_s: dict[int, float]  # 2: the first of a round; 1: each further one
    main_pass_s: dict[int, float]  # what lies between is interpolated

    def main_pass(self, tokens: int) -> float:
        """A pass of the main model over so many tokens."""
        below = max(n for n in self.main_pass_s if n <= tokens)
        above = min((n for n in self.main_pass_s if n >= tokens), default=below)
        share = (tokens - below) / max(above - below, 1)
        return self.main_pass_s[below] * (1 - share) + self.main_pass_s[above] * share

    def round(self, drafted: int) -> float:
        """A whole round."""
        drafting = self.draft_pass_s[2] + (drafted - 1) * self.draft_pass_s[1] if drafted else 0.0
        return drafting + self.main_pass(drafted + 1)


@torch.no_grad()
def measure_costs(main: CachedModel, draft: CachedModel, prompt_ids: Tensor, longest: int) -> Costs:
    """Time the passes that rounds consist of, at the end of a prompt, [1, n]: medians, after a warm-up.

    The models alternate as they do in decoding: the main model drives the draft's weights out of a processor's caches.
    """
    ids = prompt_ids[:, -1:].repeat(1, longest + 1)
    widths = sorted({width for width in (1, 2, 3, 5, 9, 17) if width <= longest} | {longest + 1})
    costs = Costs({1: [], 2: []}, {width: [] for width in widths})
    for model in (main, draft):
        model.new_text()
        model.read(prompt_ids, last=1)

    def add(times: list[float], model: CachedModel, step: Callable, tokens: int) -> None:
        start = now(model.device)
        step(ids[:, :tokens].contiguous())
        model.roll_back(tokens)
        times.append(now(model.device) - start)

    for _ in range(12):
        for width in widths:
            add(costs.main_pass_s[width], main, main.verify, width)
            add(costs.draft_pass_s[2], draft, draft.guess, 2)
            add(costs.draft_pass_s[1], draft, draft.guess, 1)
    for times in (costs.draft_pass_s, costs.main_pass_s):
        times |= {tokens: statistics.median(some[len(some) // 4 :]) for tokens, some in times.items()}
    return costs


class AutoLength(FixedLength):
    """Draft while further tokens are worth more than they cost; rest where not even the first is.

    With α the recent share of right guesses, a round that drafts K tokens yields 1 + α + … + α^K (Leviathan et al.
    2023, equation 1). The best K by the measured costs gives the time per token that can be had, and that is what a
    token is worth. A further guess counts if all guesses of the round so far are right, and it too (α). How likely a
    guess is right is told by the draft's own probability for it, put right by what became of guesses of about that
    probability before: drafts are more sure of themselves than they should be, or less.
    """

    def __init__(self, longest: int, costs: Costs):
        super().__init__(longest)
        self.costs = costs
        self.right, self.tested = 6.0, 8.0  # guesses of recent rounds; an assumption to begin with, as in the next line
        self.seen = [[(tenth + 0.5) / 5, 2.0] for tenth in range(10)]  # right, tested: by tenths of the probability
        self.rest, self.next_rest = 0, 4  # rounds still to go without a draft; rounds of the next rest
        self.learn(0, 0)

    def wants_another(self, confidences: list[Tensor]) -> bool:
        """As above; reads the latest probability from the device, so here the host waits for the draft."""
        if not confidences:
            self.tenths = []
            return self.rest == 0
        self.tenths.append(self.seen[min(9, int(10 * confidences[-1].item()))])
        all_right = math.prod(right / tested for right, tested in self.tenths)
        drafted, paid = len(confidences), self.costs.round(len(confidences))
        yields = itertools.accumulate(all_right * self.alpha**k for k in range(1, self.longest - drafted + 1))
        return any(tokens * self.worth_s > self.costs.round(drafted + k) - paid for k, tokens in enumerate(yields, 1))

    def learn(self, drafted: int, accepted: int) -> None:
        """Learn from a round; a draft that does not pay rests, twice as long each time."""
        if self.rest:
            self.rest -= 1
            return
        if drafted:
            tested = min(accepted + 1, drafted)
            self.right, self.tested = 0.9 * self.right + accepted, 0.9 * self.tested + tested
            for index, tenth in enumerate(self.tenths[:tested]):
                tenth[:] = 0.98 * tenth[0] + (index < accepted), 0.98 * tenth[1] + 1
        self.alpha = self.right / self.tested
        yields = itertools.accumulate(self.alpha**k for k in range(self.longest + 1))
        self.worth_s, best = min((self.costs.round(k) / tokens, k) for k, tokens in enumerate(yields))
        if best == 0:
            self.rest, self.next_rest = self.next_rest, min(2 * self.next_rest, 64)
        else:
            self.next_rest = 4


# 4  Is the output the main model's own? -------------------------------------------------------------------------------
#
# In exact arithmetic the two methods write the same tokens. In floating point, a pass over K+1 tokens and K+1 passes
# over one token round differently; where the two best tokens are all but tied, the choice can flip, and from there on
# the two texts part for good. In bfloat16 this is the normal case. It is no bug, but a bug would look the same: so when
# two outputs differ, the next function finds out which it is.


@dataclasses.dataclass
class Divergence:
    """Where two outputs part, and whether rounding explains it."""

    index: int  # of the first new token that differs
    baseline_token: int | None  # None: the text had ended before
    speculative_token: int | None
    gap: float  # how far the logit of a token of the output lies below the best one there, at the worst place
    noise: float  # how far logits move when the same text is read one token at a time instead of at once
    kind: str  # "tie": gap ≤ noise, the output is the main model's own within its rounding; "mismatch": it is not


@torch.no_grad()
def find_divergence(
    main: CachedModel, prompt_ids: Tensor, baseline: list[int], speculative: list[int]
) -> Divergence | None:
    """Compare two outputs for one prompt, [1, n]; None if they are the same.

    The gap certifies every token of the speculative output, not only the first that differs: after a rounding flip, too,
    each further token must be the best one, or tied with it, given all before.
    """
    if baseline == speculative:
        return None
    pairs = enumerate(zip(baseline, speculative))
    index = next((i for i, (b, s) in pairs if b != s), min(len(baseline), len(speculative)))

    output = torch.tensor([speculative], device=main.device)
    text = torch.cat([prompt_ids, output[:, :-1]], dim=1)
    main.new_text()
    at_once = main.read(text, last=len(speculative))  # [new tokens, vocabulary]
    gap = (at_once.amax(dim=-1).float() - at_once.gather(1, output[0, :, None])[:, 0].float()).max().item()

    main.new_text()
    if prompt_ids.shape[1] > 1:
        main.read(prompt_ids[:, :-1], last=1)
    one_by_one = text[:, -len(speculative) :].split(1, dim=1)
    noise = max(
        (at_once[i].float() - main.read(token)[0].float()).abs().max().item() for i, token in enumerate(one_by_one)
    )

    # One text a mere beginning of the other: no rounding makes a loop stop early, or go on behind the end.
    same_so_far = index == min(len(baseline), len(speculative))
    kind = "tie" if gap <= noise and not same_so_far else "mismatch"
    token = [ids[index] if index < len(ids) else None for ids in (baseline, speculative)]
    return Divergence(index, *token, gap, noise, kind)


# 5  Measuring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def transformers_decode(
    main: CachedModel,
    draft: CachedModel | None,
    prompt_ids: Tensor,
    max_new_tokens: int,
    end_ids: set[int],
    draft_tokens: int | None = None,
) -> Decoded:
    """What a user would run instead: transformers' own generate(), assisted by the draft if there is one.

    draft_tokens: K for every round, or None for the library's defaults. Nothing but greedy decoding runs, whatever the
    models' own generation configs ask for (sampling, repetition penalties, …).
    """
    models = [cached.model for cached in (main, draft) if cached]
    saved = [model.generation_config for model in models]
    for model in models:  # the library reads what it is not told from these
        model.generation_config = GenerationConfig()
    if draft and draft_tokens:
        draft.model.generation_config = GenerationConfig(
            num_assistant_tokens=draft_tokens,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(end_ids) or None, pad_token_id=0
    )
    try:
        start = now(main.device)
        output = main.model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            generation_config=config,
            assistant_model=draft.model if draft else None,
        )
        tokens = output[0, prompt_ids.shape[1] :].tolist()
        return Decoded(tokens, now(main.device) - start)
    finally:
        for model, config in zip(models, saved):
            model.generation_config = config


def measure(
    main: CachedModel,
    prompts_ids: list[Tensor],
    methods: dict[str, Callable[[Tensor], Decoded]],
    repeats: int = 1,
    warmup: int = 1,
    announce: Callable[[int, str], None] = lambda prompt, method: None,
) -> Iterator[dict[str, tuple[Decoded, Divergence | None]]]:
    """Decode each prompt, [1, n] on the models' device, with all methods; yield what each wrote, and where it diverges.

    The first method is the baseline: the others' outputs are compared with its. `announce` is told the prompt's index
    and the method before each run, outside the timed part.
    """
    for _ in range(warmup):  # first runs are slow: memory is allocated, kernels are loaded, clocks speed up
        for name, method in methods.items():
            announce(0, f"warm-up, {name}")
            method(prompts_ids[0])
    for index, ids in enumerate(prompts_ids):
        runs = {name: [] for name in methods}
        for repeat in range(repeats):
            order = list(methods) if (index + repeat) % 2 == 0 else list(methods)[::-1]  # none always goes first
            for name in order:
                announce(index, name)
                runs[name].append(methods[name](ids))
        # The run with the median latency counts; of an even number of runs, the faster of the middle two.
        counted = [sorted(of_one, key=lambda run: run.latency_s)[(repeats - 1) // 2] for of_one in runs.values()]
        expected = counted[0].token_ids
        yield {name: (run, find_divergence(main, ids, expected, run.token_ids)) for name, run in zip(methods, counted)}


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """The quotient; None (null in JSON, a dash in the table) where there is none."""
    quotient = numerator / denominator if denominator and numerator is not None else math.nan
    return quotient if math.isfinite(quotient) else None


def speed(runs: list[Decoded]) -> dict:
    """New tokens, latency in seconds (the mean over the runs), tokens per second (all tokens / all seconds)."""
    new_tokens, seconds = sum(len(run.token_ids) for run in runs), sum(run.latency_s for run in runs)
    return {"new_tokens": new_tokens, "latency_s": seconds / len(runs), "tokens_per_s": ratio(new_tokens, seconds)}


def acceptance(runs: list[Decoded]) -> dict:
    """What became of the drafted tokens, and where the time went, over one speculative run or several.

    alpha is the α of Leviathan et al. 2023, §3: accepted / tested, where a round tests what it accepts and, if there is
    one, the first wrong guess; the guesses behind that are drafted, but never tested. The first token of a text comes
    from reading the prompt, not from a round. Rounds are counted whole, the last one too.
    """
    rounds = [counts for run in runs for counts in run.rounds]
    drafted, accepted = sum(d for d, _ in rounds), sum(a for _, a in rounds)
    tested = sum(min(a + 1, d) for d, a in rounds)
    log_likelihood = sum(run.log_likelihood for run in runs)
    times = {f"{part}_s": sum(getattr(run, f"{part}_s") for run in runs) for part in ("prefill", "draft", "verify")}
    lengths = [d for d, _ in rounds]
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


def promised_percent(alpha: float | None, drafted: float | None, draft_cost: float | None, verify_cost: float | None):
    """The speedup in percent that theory promises: Leviathan et al. 2023, theorem 3.8, which has verify_cost = 1.

    A round that drafts K tokens (their mean, where it varies) gives (1 − α^(K+1)) / (1 − α) tokens (equation 1) and
    costs K draft steps and one verify pass, each in units of one baseline step. None if any of these is unknown.
    """
    if None in (alpha, drafted, draft_cost, verify_cost):
        return None
    tokens = drafted + 1 if alpha == 1 else (1 - alpha ** (drafted + 1)) / (1 - alpha)
    return 100 * (tokens / (drafted * draft_cost + verify_cost) - 1)


def report_prompt(
    prompt: str, prompt_tokens: int, baseline: Decoded, run: Decoded, divergence: Divergence | None, tokenizer, key: str
) -> dict:
    """What the baseline and another method, called `key`, did with one prompt: as it stands in the JSON."""

    def output(decoded: Decoded) -> dict:
        text = tokenizer.decode(decoded.token_ids, skip_special_tokens=True)
        first = {"first_token_s": decoded.first_token_s or None}
        return speed([decoded]) | first | {"text": text, "token_ids": decoded.token_ids}

    return {
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        "baseline": output(baseline),
        key: output(run) | acceptance([run]),
        "speedup_percent": speedup_percent(speed([baseline]), speed([run])),
        "identical": divergence is None,
        "divergence": divergence and dataclasses.asdict(divergence),
    }


def summarise(baselines: list[Decoded], runs: list[Decoded], divergences: list[Divergence | None], key: str) -> dict:
    """The same over all prompts, and what theory promises."""
    baseline, method = speed(baselines), speed(runs) | acceptance(runs)
    steps = sum(len(run.token_ids) - 1 for run in baselines)
    step_s = ratio(sum(run.latency_s - run.first_token_s for run in baselines), steps)
    draft_step_s, verify_pass_s = (
        ratio(method["draft_s"], method["drafted"]),
        ratio(method["verify_s"], method["rounds"]),
    )
    draft_cost, verify_cost = ratio(draft_step_s, step_s), ratio(verify_pass_s, step_s)
    rates = method["alpha"], method["drafted_per_round"], draft_cost
    kinds = [divergence and divergence.kind for divergence in divergences]
    return {
        "baseline": baseline,
        key: method,
        "speedup_percent": speedup_percent(baseline, method),
        "predicted_speedup_percent": promised_percent(*rates, verify_cost),
        "ideal_speedup_percent": promised_percent(*rates, 1.0),
        "baseline_step_s": step_s,
        "draft_step_s": draft_step_s,
        "verify_pass_s": verify_pass_s,
        "draft_cost": draft_cost,  # one draft step, in baseline steps: the c of Leviathan et al.
        "verify_cost": verify_cost,  # one verify pass, in baseline steps
        "identical": kinds.count(None),
        "ties": kinds.count("tie"),
        "mismatches": kinds.count("mismatch"),
    }


# 6  Reporting ---------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text from a model, a file or the system as one line that is safe to print: nothing in it controls the terminal.

    Line ends, tabs and the like become spaces; what else controls or formats (escape sequences, bidirectional
    overrides, zero-width characters), or has no agreed look, becomes �.
    """
    unsafe = ("Cc", "Cf", "Cs", "Co", "Cn")  # control, format, surrogate, private, unassigned
    return "".join("�" if unicodedata.category(sign) in unsafe else sign for sign in " ".join(text.split()))


def figure(value: float | None) -> str:
    """A number with about three digits that count; a dash for None."""
    return "–" if value is None else f"{value:.{sum(abs(value) < bound for bound in (1, 10, 100))}f}"


def percent(value: float | None, sign: str = "") -> str:
    """A percentage without decimals, sign="+" with a plus sign; a dash for None."""
    return "–" if value is None else f"{value:{sign}.0f} %"


# Heading and width of each column; the prompt has what is left of the line, 15 columns of 80.
COLUMNS = [("#", 3), ("prompt", 0), ("tokens", 6), ("s", 6), ("tok/s", 6), ("s", 6), ("tok/s", 6)]
COLUMNS += [("faster", 7), ("accept", 6), ("log-l.", 6), ("same", 4)]


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
    first, single = next(iter(reports.values())), sum("speculative" in report for report in reports.values()) == 1
    baseline = [figure(first["baseline"][key]) for key in ("latency_s", "tokens_per_s")]
    start = [number, plain(title), str(first["baseline"]["new_tokens"]), *baseline]
    if not single:
        print_row(console, start + [""] * 6)
    for name, report in reports.items():
        method = report.get("speculative") or report["compared"]
        faster, rate, likelihood = (
            report["speedup_percent"],
            method["acceptance_rate"],
            method["log_likelihood_per_token"],
        )
        if "mismatches" in report:  # the averages
            same = f"{report['identical']}/{report['identical'] + report['ties'] + report['mismatches']}"
        else:
            kind = "yes" if report["identical"] else report["divergence"]["kind"]
            same = {"yes": Text("yes", "green"), "tie": Text("tie", "yellow"), "mismatch": Text("NO", "bold red")}[kind]
        cells = start if single and report is first else ["", f"  {name}", str(method["new_tokens"]), "", ""]
        cells = [*cells, figure(method["latency_s"]), figure(method["tokens_per_s"])]
        cells.append(Text(percent(faster, "+"), "green" if (faster or 0) > 0 else "red"))
        cells += ["", ""] if rate is None else [percent(100 * rate), figure(likelihood)]  # no draft, or none of ours
        print_row(console, [*cells, same])


def print_lengths(console: Console, runs: list[dict]) -> None:
    """Print the table that compares draft lengths: what each gained, and why."""
    table = Table(box=None, padding=(0, 1), title="By draft length", title_justify="left", title_style="bold")
    for heading in ("K", "faster", "predicted", "accept", "tokens/round", "draft step", "verify pass"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        summary = run["summary"]
        counts = summary["speculative"]
        steps = [summary[key] and f"{1000 * summary[key]:.2f} ms" for key in ("draft_step_s", "verify_pass_s")]
        gains = [percent(summary[key], "+") for key in ("speedup_percent", "predicted_speedup_percent")]
        rate = counts["acceptance_rate"]
        cells = [*gains, percent(rate and 100 * rate), figure(counts["tokens_per_round"]), *steps]
        table.add_row(str(run["draft_tokens"]), *[cell or "–" for cell in cells])
    console.print(table)


def in_words(runs: list[dict], compared: list[dict]) -> list[str]:
    """The result as sentences that a person can quote, and what to try next where the draft does not pay.

    runs: one for each draft length; compared: one for each of the library's methods. Both as in the JSON.
    """
    best = max(runs, key=lambda run: run["summary"]["speedup_percent"] or -math.inf)
    summary, counts, length = best["summary"], best["summary"]["speculative"], best["draft_tokens"]
    lines = []
    if len(runs) > 1:
        lines.append(f"The best draft length was {length}.")
    if None in (summary["speedup_percent"], counts["tokens_per_round"]):
        lines.append("Too few tokens to tell how fast it is: raise --max-new-tokens, or ask for longer answers.")
    else:
        times = 1 + summary["speedup_percent"] / 100
        promises = [percent(summary[f"{kind}_speedup_percent"], "+") for kind in ("predicted", "ideal")]
        drafted = f" (auto drafted {counts['drafted_per_round']:.1f} a round)" if length == "auto" else ""
        lines.append(
            f"Speculative decoding was {times:.2f} times as fast. Each verify pass of the main model gave "
            f"{counts['tokens_per_round']:.1f} tokens{drafted}; it cost {figure(summary['verify_cost'])} baseline steps, "
            f"and a draft step {figure(summary['draft_cost'])}: predicted {promises[0]}, ideal {promises[1]}."
        )
        parts = {"verify": "verifying", "draft": "drafting", "prefill": "reading the prompts", "other": "all else"}
        spent = sum(counts[f"{part}_s"] for part in parts)
        shares = [f"{100 * counts[f'{part}_s'] / spent:.0f} % {words}" for part, words in parts.items()]
        lines.append(f"Its time: {', '.join(shares)}.")
        if times < 1:
            advice = "" if length == "auto" else "--draft-tokens auto, "
            lines.append(f"The draft does not pay here. Try {advice}a smaller draft, or one that is right more often.")
    for other in compared:
        gain = ratio(counts["tokens_per_s"], other["summary"]["compared"]["tokens_per_s"])
        lines.append(f"It was {figure(gain)} times as fast as {other['method']}.")
    ours = [(report, number) for run in runs for number, report in enumerate(run["prompts"], 1)]
    identical = sum(report["identical"] for report, _ in ours)
    same = f"All {len(ours)}" if identical == len(ours) else f"{identical} of {len(ours)}"
    lines.append(f"{same} outputs are the main model's own, token for token.")
    for report, number in ours:
        if (divergence := report["divergence"]) is None:
            continue
        where = f"Prompt {number} parts from the baseline at new token {divergence['index'] + 1}"
        figures = f"gap {divergence['gap']:.3g}, rounding noise {divergence['noise']:.3g}"
        if divergence["kind"] == "tie":
            lines.append(f"{where} at a tie ({figures}): the main model's own within its rounding.")
        else:
            lines.append(f"{where} and is NOT the main model's own ({figures}): please report this as a bug.")
    return lines


def write_json(path: str, report: dict) -> None:
    """Replace the file in one step, so that it is whole at every moment."""
    try:
        temporary = pathlib.Path(path + ".partial")
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise CannotRun(f"cannot write {path}: {error.strerror}; name another file with --json") from error


# 7  Loading -----------------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line of bearable length."""
    text = plain(str(error).strip().partition("\n")[0]) or type(error).__name__
    return text if len(text) < 300 else text[:299] + "…"


def read_prompts(path: str) -> list[str]:
    """One prompt a line; blank lines and lines that start with # do not count. Raises CannotRun."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CannotRun(f"cannot read {path}: {error.strerror}; name a text file with --prompts") from error
    except UnicodeDecodeError as error:
        raise CannotRun(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    prompts = [line.strip() for line in text.split("\n")]
    prompts = [line for line in prompts if line and not line.startswith("#")]
    if not prompts:
        raise CannotRun(f"{path} has no prompts; write one on each line")
    return prompts


def choose_device(wanted: str) -> torch.device:
    """The device named on the command line, or the accelerator if there is one, else the CPU. Raises CannotRun."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if wanted == "auto":
        return accelerator
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise CannotRun(f"there is no kind of device called {wanted!r}; try cpu, cuda, cuda:1, mps or xpu") from error
    if device.type not in ("cpu", accelerator.type):
        raise CannotRun(f"PyTorch finds no {device.type} device here; it finds {accelerator.type}: use --device auto")
    if device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count():
        raise CannotRun(f"there are only {torch.accelerator.device_count()} {device.type} devices, counted from 0")
    return device


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


def fetch(name: str) -> str:
    """The folder of a model: the name itself if it is one, else the hub's model of that name, downloaded if need be.

    Only safetensors, JSON and tokenizer files are fetched: nothing that could hold code. Raises CannotRun.
    """
    if pathlib.Path(name).is_dir():
        return name
    try:
        return huggingface_hub.snapshot_download(
            name,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"],
            ignore_patterns=["*/*"],
            etag_timeout=5,
        )
    except huggingface_hub.errors.HFValidationError as error:
        raise CannotRun(f"there is no folder {name}, and no model on the hub can have that name") from error
    except huggingface_hub.errors.GatedRepoError as error:
        mend = f"accept its licence at https://huggingface.co/{name}, then `hf auth login`"
        raise CannotRun(f"{name} is a gated model, and you have no access: {mend}") from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        mend = "check the spelling, or `hf auth login` if it is private"
        raise CannotRun(f"there is no folder {name}, and the hub shows no model of that name: {mend}") from error
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        mend = "check the connection, name local folders with --main and --draft, or try --demo"
        raise CannotRun(f"{name} is not on this machine, and the hub cannot be reached: {mend}") from error
    except Exception as error:  # whatever network, disk or hub come up with
        raise CannotRun(f"cannot download {name}: {first_line(error)}; try again, or name a local folder") from error


def load_model(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model whose cache can be rolled back. Raises CannotRun for any other, and for what is broken."""
    folder = fetch(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.is_encoder_decoder:
            raise CannotRun(f"{name} is an encoder-decoder; both models must be decoders only (Llama, Gemma, Qwen, …)")
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except CannotRun:
        raise
    except torch.OutOfMemoryError as error:
        raise CannotRun(
            f"{name} does not fit into the memory of {device}; take a smaller pair or --device cpu"
        ) from error
    except Exception as error:  # a broken folder can make the library raise anything
        mend = "the folder needs config.json and safetensors weights of a causal language model, all whole"
        raise CannotRun(f"cannot load {name}: {first_line(error)}; {mend}") from error
    if missing := sorted(loading["missing_keys"]):
        raise CannotRun(f"{name} lacks {len(missing)} of its weights ({missing[0]}, …): fetch it anew")
    if model._is_stateful:  # the library's mark of models that cannot go back: Mamba, RWKV, linear attention
        raise CannotRun(f"{name} ({config.model_type}) keeps a state that cannot be rolled back; take attention models")
    return model


def load_tokenizer(main_name: str, draft_name: str) -> transformers.PreTrainedTokenizerBase:
    """The main model's tokenizer. The draft's must have the same number for the same token. Raises CannotRun."""
    tokenizers = []
    for name in (main_name, draft_name):
        try:
            tokenizers.append(AutoTokenizer.from_pretrained(fetch(name), trust_remote_code=False))
        except CannotRun:
            raise
        except Exception as error:  # as above
            raise CannotRun(f"cannot load the tokenizer of {name}: {first_line(error)}; fetch it anew") from error
    main_tokens, draft_tokens = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if differing := main_tokens.items() ^ draft_tokens.items():
        token = min(differing)[0]
        numbers = [tokens.get(token, "nothing") for tokens in (main_tokens, draft_tokens)]
        raise CannotRun(
            f"{main_name} and {draft_name} have different tokenizers ({len(main_tokens):,} and {len(draft_tokens):,} "
            f"tokens; {token!r} is {numbers[0]} and {numbers[1]}): take a draft of the main model's family"
        )
    return tokenizers[0]


def encode(tokenizer, prompt: str, chat: bool) -> list[int]:
    """The prompt's token ids, within the chat template if `chat`."""
    if not chat:
        return tokenizer(prompt)["input_ids"]
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them


def end_tokens(model: PreTrainedModel) -> set[int]:
    """All tokens that end a text, by the model's generation config."""
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def context_length(model: PreTrainedModel) -> float:
    """The most tokens that a text may have; infinite where the model sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


# 8  The command line --------------------------------------------------------------------------------------------------


def count(least: int):
    """An argparse type: a whole number that is not too small."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def draft_lengths(text: str) -> list[int | str]:
    """An argparse type: auto, a number, or several of these with commas between them."""
    return list(dict.fromkeys("auto" if part == "auto" else count(1)(part) for part in text.split(",")))


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The options, as given. A bad one ends the program with one line and status 2."""
    parser = argparse.ArgumentParser(
        description="Measure what speculative decoding gains for a main model and a draft model on this machine, and "
        "check that the output is still the main model's own.",
        epilog="Without an accelerator and without a model named, the bundled pair of tiny models runs, as with --demo.",
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("--main", metavar="MODEL", help=f"Hugging Face id or local folder (default: {DEFAULT_MAIN})")
    option("--draft", metavar="MODEL", help=f"likewise, a smaller model of the same family (default: {DEFAULT_DRAFT})")
    option("--demo", action="store_true", help="the bundled pair and its own prompts: anywhere, offline, in seconds")
    option("--prompts", metavar="FILE", help="one prompt a line, # for comments (default: prompts.txt)")
    option("--max-new-tokens", metavar="N", type=count(1), default=128, help="default: 128")
    lengths = "how many tokens a round drafts: a number, several (1,2,4,8) to compare, or auto (the default)"
    option("--draft-tokens", metavar="K", type=draft_lengths, default=["auto"], help=lengths)
    compiling = "compile the decoding steps, for both methods (auto: on an NVIDIA GPU)"
    option("--compile", choices=["auto", "on", "off"], default="auto", help=compiling)
    option("--compare", choices=["transformers"], help="also measure transformers' own generate(), alone and assisted")
    option("--device", default="auto", help="cpu, cuda, cuda:1, mps, … (default: the accelerator, else cpu)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    option("--dtype", choices=dtypes, default="auto", help="default: bfloat16 on an accelerator, float32 on a CPU")
    option(
        "--repeats", metavar="N", type=count(1), default=1, help="runs of each method; the median counts (default: 1)"
    )
    option("--warmup", metavar="N", type=count(0), default=1, help="runs of each method before any counts (default: 1)")
    option("--ignore-eos", action="store_true", help="write exactly N tokens, also behind the end of a text")
    option("--no-chat-template", action="store_true", help="feed the prompts as they are")
    option("--json", metavar="FILE", help="write all that was measured")
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    options = parser.parse_args(arguments)
    if options.demo and (options.main or options.draft):
        parser.error("--demo brings its own models: leave out --main and --draft, or --demo")
    return options


def settle(options: argparse.Namespace, device: torch.device) -> str | None:
    """Replace every default that depends on the machine by the value in force; return what the user must be told."""
    notice = None
    if options.demo or (device.type == "cpu" and not options.main and not options.draft):
        why = "" if options.demo else "No GPU in use: "
        notice = f"{why}this is the bundled pair of tiny models. Its speed says nothing about Gemma's."
        if not (BUNDLED / "main").is_dir():
            raise CannotRun(
                f"the bundled pair is not in {BUNDLED}: clone the whole project, or name --main and --draft"
            )
        options.demo = True
        options.main, options.draft = (os.path.relpath(BUNDLED / name) for name in ("main", "draft"))
    options.main = options.main or DEFAULT_MAIN
    options.draft = options.draft or DEFAULT_DRAFT
    options.prompts = options.prompts or os.path.relpath((BUNDLED if options.demo else HERE) / "prompts.txt")
    options.device = str(device)
    if options.compile == "auto":
        options.compile = "on" if device.type == "cuda" else "off"
    if options.dtype == "auto":
        options.dtype = "float32" if device.type == "cpu" else "bfloat16"
    return notice


def describe(
    console: Console,
    options: argparse.Namespace,
    environment: dict,
    main: CachedModel,
    draft: CachedModel,
    prompts: int,
) -> None:
    """Print what is about to run."""
    console.print("Speculative decoding: does the draft pay?", style="bold")
    models = Table.grid(padding=(0, 2, 0, 0))
    for role, name, cached in (("main", options.main, main), ("draft", options.draft, draft)):
        millions, layers = cached.model.num_parameters() / 1e6, cached.model.config.get_text_config().num_hidden_layers
        size = f"{millions / 1000:.1f} B" if millions >= 1000 else f"{millions:.1f} M"
        models.add_row(f"  {role}", plain(name), f"{size} parameters, {layers} layer{'s' * (layers != 1)}")
    console.print(models)
    threads = f", {environment['threads']} threads" if environment["device"] == "cpu" else ""
    compiled = "compiled" if options.compile == "on" else "eager"
    console.print(
        f"  {environment['device']} ({plain(environment['device_name'])}{threads}), {environment['dtype']}, "
        f"K = {', '.join(map(str, options.draft_tokens))}, {compiled}, up to {options.max_new_tokens} new tokens, {prompts} prompts"
    )


def load_pair(options: argparse.Namespace, device: torch.device, console: Console):
    """The two models, ready to decode, and their tokenizer. Raises CannotRun."""
    models = []
    for name in (options.main, options.draft):
        console.print(f"Loading {plain(name)} …", style="dim")
        models.append(load_model(name, device, getattr(torch, options.dtype)))
    tokenizer = load_tokenizer(options.main, options.draft)
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    return *[CachedModel(model, vocabulary) for model in models], tokenizer


def longest(options: argparse.Namespace) -> int:
    """The most tokens that any round may draft."""
    return max(LONGEST_AUTO if length == "auto" else length for length in options.draft_tokens)


def encode_all(options: argparse.Namespace, prompts: list[str], tokenizer, context: float) -> list[Tensor]:
    """The token ids of all prompts, each [1, n]. Raises CannotRun for one that does not fit into the context."""
    chat = not options.no_chat_template and tokenizer.chat_template is not None
    encoded = [encode(tokenizer, prompt, chat) for prompt in prompts]
    room = options.max_new_tokens + longest(options) - 1  # the last round may draft beyond the last new token
    for number, ids in enumerate(encoded, 1):
        if not ids:
            raise CannotRun(f"prompt {number} of {options.prompts} comes to no tokens; leave it out")
        if len(ids) + room > context:
            raise CannotRun(
                f"prompt {number} of {options.prompts} has {len(ids)} tokens; {room} more for the output and a last "
                f"draft exceed the models' context of {context} tokens: lower --max-new-tokens, or shorten the prompt"
            )
    return [torch.tensor([ids], dtype=torch.long) for ids in encoded]


def compile_pair(options: argparse.Namespace, main: CachedModel, draft: CachedModel, longest_prompt: int) -> None:
    """Compile the steps of both models, for the numbers of tokens that come up. Raises what the compiler raises."""
    capacity = longest_prompt + options.max_new_tokens + longest(options) + 1
    widths = {1, *(LONGEST_AUTO + 1 if length == "auto" else length + 1 for length in options.draft_tokens)}
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one step, several widths
    main.compile(capacity, {"next_token": {1}, "verify": widths})
    draft.compile(capacity, {"guess": {1, 2}})


def choose_methods(
    options: argparse.Namespace, main: CachedModel, draft: CachedModel, first_prompt: Tensor
) -> tuple[dict[str, Callable], dict[str, dict]]:
    """What to measure: the methods by name, the baseline first, and for each but that its part of the JSON, empty yet."""
    limits = (options.max_new_tokens, set() if options.ignore_eos else end_tokens(main.model))
    methods, parts = {"baseline": lambda ids: greedy_decode(main, ids, *limits)}, {}
    for length in options.draft_tokens:
        name, part = f"K = {length}", {"draft_tokens": length, "prompts": [], "summary": None}
        chooser = None if length == "auto" else FixedLength(length)
        if length == "auto":
            costs = measure_costs(main, draft, first_prompt, LONGEST_AUTO)
            chooser, part["costs"] = AutoLength(LONGEST_AUTO, costs), dataclasses.asdict(costs)
        methods[name] = lambda ids, chooser=chooser: speculative_decode(main, draft, ids, *limits, chooser)
        parts[name] = part
    if options.compare:
        alone = "transformers generate()"
        methods[alone] = lambda ids: transformers_decode(main, None, ids, *limits)
        parts[alone] = {"method": alone, "draft_tokens": None, "prompts": [], "summary": None}
        for length in options.draft_tokens:
            assisted = f"transformers assisted, K = {length}"
            k = None if length == "auto" else length
            methods[assisted] = lambda ids, k=k: transformers_decode(main, draft, ids, *limits, k)
            parts[assisted] = {"method": assisted, "draft_tokens": length, "prompts": [], "summary": None}
    return methods, parts


def run(options: argparse.Namespace) -> int:
    """Do what the options ask for; return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False, highlight=False)
    errors = Console(stderr=True, markup=False, emoji=False, highlight=False)
    device = choose_device(options.device)
    if notice := settle(options, device):
        console.print(notice)
    prompts = read_prompts(options.prompts)
    main, draft, tokenizer = load_pair(options, device, errors)
    context = min(context_length(main.model), context_length(draft.model))
    prompts_ids = [ids.to(device) for ids in encode_all(options, prompts, tokenizer, context)]
    if options.compile == "on":
        errors.print("Compiling …", style="dim")
        start = time.perf_counter()
        try:
            compile_pair(options, main, draft, max(ids.shape[1] for ids in prompts_ids))
        except Exception as error:  # a compiler can fail in any way; eager runs can be measured all the same
            errors.print(f"warning: compiling failed, running eagerly: {first_line(error)}")
            options.compile = "off"
            main, draft = (CachedModel(cached.model, cached.vocabulary) for cached in (main, draft))
        options.compile_s = time.perf_counter() - start

    environment = {
        "device": device.type,
        "device_name": device_name(device),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    methods, parts = choose_methods(options, main, draft, prompts_ids[0])
    ours = [part for part in parts.values() if "method" not in part]
    others = [part for part in parts.values() if "method" in part]
    report = {"environment": environment, "settings": vars(options), "runs": ours, "compared": others}
    if options.json:
        write_json(options.json, report)  # better to fail now than when all is measured
    describe(console, options, environment, main, draft, len(prompts))
    print_headings(console)

    # A bar that redraws itself would take time from what is timed: this one is drawn between the runs only.
    bar = Progress(
        *(TextColumn("{task.description}"), BarColumn(20)),
        console=errors,
        transient=True,
        auto_refresh=False,
        disable=not errors.is_terminal,
    )
    task = bar.add_task("", total=len(prompts))

    def announce(index: int, what: str) -> None:
        bar.start()
        bar.update(task, description=f"{what}, prompt {index + 1} of {len(prompts)}", completed=index, refresh=True)

    done, failure = [], None
    try:
        for results in measure(main, prompts_ids, methods, options.repeats, options.warmup, announce):
            bar.stop()
            prompt, tokens = prompts[len(done)], prompts_ids[len(done)].shape[1]
            done.append(results)
            baselines = [results["baseline"][0] for results in done]
            for name, part in parts.items():
                key = "compared" if "method" in part else "speculative"
                run, divergence = results[name]
                part["prompts"].append(report_prompt(prompt, tokens, baselines[-1], run, divergence, tokenizer, key))
                part["summary"] = summarise(baselines, *zip(*[results[name] for results in done]), key)
            if options.json:
                write_json(options.json, report)
            latest = {name: part["prompts"][-1] for name, part in parts.items()}
            print_reports(console, str(len(done)), prompt, latest)
    except (KeyboardInterrupt, torch.OutOfMemoryError) as error:
        failure = error  # and on: what was measured so far is reported all the same
    finally:
        bar.stop()

    if done:
        print_reports(console, "", "mean", {name: part["summary"] for name, part in parts.items()})
        console.print()
        if len(ours) > 1:
            print_lengths(console, ours)
            console.print()
        for line in in_words(ours, others):
            console.print(line)
    if isinstance(failure, KeyboardInterrupt):
        errors.print(f"Interrupted after {len(done)} of {len(prompts)} prompts.")
        return 130
    if failure:
        raise CannotRun(f"out of memory at prompt {len(done) + 1}: lower --max-new-tokens, or take a smaller pair")
    return 1 if any(part["summary"]["mismatches"] for part in ours) else 0


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status (0 well, 1 some output is not the main model's own, 2 could not, 130 Ctrl-C)."""
    options = parse_options(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return run(options)
    except CannotRun as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; nothing was measured yet.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

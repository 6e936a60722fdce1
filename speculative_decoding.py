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
import json
import math
import os
import pathlib
import platform
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

HERE = pathlib.Path(__file__).resolve().parent
BUNDLED = HERE / "tests" / "tiny_gemma2"
DEFAULT_MAIN, DEFAULT_DRAFT = "google/gemma-2-9b-it", "google/gemma-2-2b-it"


class CannotRun(Exception):
    """The program cannot do what was asked; the message is one line that says what is wrong and how to mend it."""


# 1  A model with a cache that can be rolled back ----------------------------------------------------------------------


class CachedModel:
    """A causal language model, and the keys and values of the text that it has read.

    Each call reads further tokens of one text. `roll_back` forgets the latest ones again: it is what lets a rejected
    guess disappear without reading the text anew.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int | None = None):
        """`vocabulary`: only the first so many tokens count (the models of one family are padded differently)."""
        self.model = model.eval()
        self.device = model.device
        self.vocabulary = vocabulary
        self.new_text()

    def new_text(self, rolls_back: bool = True) -> None:
        """Forget the text. A cache that never rolls back need not keep what leaves a sliding window."""
        self.cache = DynamicCache(config=self.model.config)
        if rolls_back:
            self.cache.activate_past_recording()

    def read(self, ids: Tensor, last: int = 0) -> Tensor:
        """Read tokens; return the logits at each of them: what the model expects to come next.

        ids: [1, n], n ≥ 1. Returns [n, vocabulary], or [last, vocabulary] where only the last places matter.
        """
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=last)
        return output.logits[0, :, : self.vocabulary]

    def next_token(self, ids: Tensor) -> Tensor:
        """Read tokens; return the likeliest next one. ids: [1, n]. Returns [1, 1]."""
        return self.read(ids, last=1).argmax(dim=-1, keepdim=True)

    def verify(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read the text's last token and K drafted ones, in one pass.

        ids: [1, K+1]. Returns the likeliest next token after each, [1, K+1], and the natural logarithm of the
        probability of each drafted token, given all before it, [K], in float32.
        """
        logits = self.read(ids)
        log_likelihood = -torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="none")
        return logits.argmax(dim=-1)[None], log_likelihood

    def roll_back(self, tokens: int) -> None:
        """Forget the latest tokens that were read. Also lets sliding windows drop what they no longer need."""
        self.cache.crop(-tokens)


# 2  Greedy decoding (the baseline) ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Decoded:
    """What one decoding run wrote, and how long it took."""

    token_ids: list[int]
    latency_s: float = 0.0  # from the prompt's ids on the device to the last token on the host
    first_token_s: float = 0.0  # to the first token on the host
    # Speculative decoding only:
    rounds: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (drafted, accepted) tokens of each round
    log_likelihood: float = 0.0  # of all drafted tokens, by the main model, in nats
    draft_s: float = 0.0  # spent drafting
    verify_s: float = 0.0  # spent in the main model's verifying passes


def now(device: torch.device) -> float:
    """The time in seconds, once the device has finished all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def mark(device: torch.device) -> "float | torch.Event":
    """A point in the device's time, noted without waiting for the device: for times within a timed run."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def seconds_between(start: "float | torch.Event", end: "float | torch.Event") -> float:
    """The seconds between two marks; the device must have passed both."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def cut(tokens: list[int], room: int, end_ids: set[int]) -> tuple[list[int], bool]:
    """The tokens up to the first that ends the text, or as many as there is room for; and whether the text is ended."""
    for index, token in enumerate(tokens[:room]):
        if token in end_ids:
            return tokens[: index + 1], True
    return tokens[:room], len(tokens) >= room


@torch.inference_mode()
def greedy_decode(main: CachedModel, prompt_ids: Tensor, max_new_tokens: int, end_ids: set[int]) -> Decoded:
    """Decode with the main model alone: one forward pass a token.

    prompt_ids: [1, n], n ≥ 1, on the model's device. end_ids: the tokens that end a text, as its last token.
    """
    start = now(main.device)
    main.new_text(rolls_back=False)
    token = main.next_token(prompt_ids)
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


@torch.inference_mode()
def speculative_decode(
    main: CachedModel,
    draft: CachedModel,
    prompt_ids: Tensor,
    max_new_tokens: int,
    end_ids: set[int],
    draft_tokens: int,
) -> Decoded:
    """Decode with the draft's help: the same text, several tokens a forward pass of the main model.

    Leviathan et al. 2023, algorithm 1, for greedy decoding. prompt_ids: [1, n], n ≥ 1, on the models' device.
    draft_tokens: K ≥ 1, how many tokens a round drafts. The last round is a whole one too; what it gives beyond the
    end of the text is cut off.
    """
    start = now(main.device)
    main.new_text()
    draft.new_text()
    first = main.next_token(prompt_ids)
    tokens, ended = cut([first.item()], max_new_tokens, end_ids)
    first_token_s = now(main.device) - start
    if prompt_ids.shape[1] > 1:
        draft.read(prompt_ids[:, :-1], last=1)
    last_two = torch.cat([prompt_ids[:, -1:], first], dim=1)  # [1, 2]: the end of the text

    rounds, marks, log_likelihoods = [], [], []
    while not ended:
        # 1. Draft: K guesses, one after the other. The host only queues work here; it waits for nothing.
        began = mark(main.device)
        drafted = [draft.next_token(last_two)]
        while len(drafted) < draft_tokens:
            drafted.append(draft.next_token(drafted[-1]))
        guesses = torch.cat([last_two[:, 1:], *drafted], dim=1)  # [1, K+1]: the text's last token, d1 … dK

        # 2. Verify: one pass of the main model says what it would have written at each place itself.
        drafting_ended = mark(main.device)
        choices, log_likelihood = main.verify(guesses)  # [1, K+1]: g1 … g(K+1); [K]
        verified = mark(main.device)

        # 3. Accept the guesses before the first wrong one, and the main model's own token in its place, or behind them
        #    all. The one moment in a round when the host waits for the device and reads from it.
        (_, *d), g = torch.cat([guesses, choices]).tolist()
        accepted = next((i for i in range(draft_tokens) if d[i] != g[i]), draft_tokens)
        emitted, ended = cut(g[: accepted + 1], max_new_tokens - len(tokens), end_ids)  # g1 … gn are d1 … dn
        tokens += emitted

        # 4. Roll back: both models forget the wrong guesses.
        main.roll_back(draft_tokens - accepted)
        draft.roll_back(draft_tokens - accepted)
        last_two = torch.stack([guesses[0, accepted], choices[0, accepted]])[None]

        rounds.append((draft_tokens, accepted))
        marks.append((began, drafting_ended, verified))
        log_likelihoods.append(log_likelihood)

    return Decoded(
        tokens,
        now(main.device) - start,
        first_token_s,
        rounds,
        log_likelihood=torch.cat(log_likelihoods).sum().item() if rounds else 0.0,
        draft_s=sum(seconds_between(began, ended) for began, ended, _ in marks),
        verify_s=sum(seconds_between(began, ended) for _, began, ended in marks),
    )


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


@torch.inference_mode()
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


def measure(
    main: CachedModel,
    draft: CachedModel,
    prompts_ids: list[Tensor],
    max_new_tokens: int,
    end_ids: set[int],
    draft_tokens: int,
    repeats: int = 1,
    warmup: int = 1,
    announce: Callable[[int, str], None] = lambda prompt, what: None,
) -> Iterator[tuple[Decoded, Decoded, Divergence | None]]:
    """Decode each prompt, [1, n] on the models' device, with both methods; yield baseline, speculative, divergence.

    `announce` is told the prompt's index and the method before each run, outside the timed part.
    """

    def baseline(ids: Tensor) -> Decoded:
        return greedy_decode(main, ids, max_new_tokens, end_ids)

    def speculative(ids: Tensor) -> Decoded:
        return speculative_decode(main, draft, ids, max_new_tokens, end_ids, draft_tokens)

    for _ in range(warmup):  # first runs are slow: memory is allocated, kernels are loaded, clocks speed up
        for method in (baseline, speculative):
            announce(0, "warm-up")
            method(prompts_ids[0])
    for index, ids in enumerate(prompts_ids):
        runs = {baseline: [], speculative: []}
        for repeat in range(repeats):
            order = list(runs) if (index + repeat) % 2 == 0 else list(runs)[::-1]  # neither method always goes first
            for method in order:
                announce(index, method.__name__)
                runs[method].append(method(ids))
        # The run with the median latency counts; of an even number of runs, the faster of the middle two.
        counted = [sorted(of_one, key=lambda run: run.latency_s)[(repeats - 1) // 2] for of_one in runs.values()]
        yield *counted, find_divergence(main, ids, *[run.token_ids for run in counted])


def ratio(numerator: float, denominator: float) -> float | None:
    """The quotient; None (null in JSON, a dash in the table) where there is none."""
    quotient = numerator / denominator if denominator else math.nan
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
    return {
        "rounds": len(rounds),
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_rate": ratio(accepted, drafted),
        "alpha": ratio(accepted, tested),
        "tokens_per_round": ratio(sum(len(run.token_ids) - 1 for run in runs), len(rounds)),
        "log_likelihood": ratio(log_likelihood, 1),
        "log_likelihood_per_token": ratio(log_likelihood, drafted),
        "draft_s": sum(run.draft_s for run in runs),
        "verify_s": sum(run.verify_s for run in runs),
    }


def speedup_percent(baseline: dict, speculative: dict) -> float | None:
    """100 × (speculative / baseline tokens per second − 1)."""
    quotient = ratio(speculative["tokens_per_s"] or 0, baseline["tokens_per_s"] or 0)
    return None if quotient is None else 100 * (quotient - 1)


def promised_percent(alpha: float | None, draft_tokens: int, draft_cost: float | None, verify_cost: float | None):
    """The speedup in percent that theory promises: Leviathan et al. 2023, theorem 3.8, which has verify_cost = 1.

    A round gives (1 − α^(K+1)) / (1 − α) tokens (equation 1) and costs K draft steps and one verify pass, each
    in units of one baseline step. None if any of these is unknown.
    """
    if None in (alpha, draft_cost, verify_cost):
        return None
    tokens = draft_tokens + 1 if alpha == 1 else (1 - alpha ** (draft_tokens + 1)) / (1 - alpha)
    return 100 * (tokens / (draft_tokens * draft_cost + verify_cost) - 1)


def report_prompt(
    prompt: str, prompt_tokens: int, baseline: Decoded, speculative: Decoded, divergence: Divergence | None, tokenizer
) -> dict:
    """All that is known about one prompt, as it stands in the JSON."""

    def output(run: Decoded) -> dict:
        text = tokenizer.decode(run.token_ids, skip_special_tokens=True)
        return speed([run]) | {"first_token_s": run.first_token_s, "text": text, "token_ids": run.token_ids}

    report = {"baseline": output(baseline), "speculative": output(speculative) | acceptance([speculative])}
    return {
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        **report,
        "speedup_percent": speedup_percent(**report),
        "identical": divergence is None,
        "divergence": divergence and dataclasses.asdict(divergence),
    }


def summarise(runs: list[tuple[Decoded, Decoded, Divergence | None]], draft_tokens: int) -> dict:
    """The same over all prompts, and what theory says to it. runs: baseline, speculative, divergence of each prompt."""
    baselines, speculatives, divergences = zip(*runs)
    report = {"baseline": speed(baselines), "speculative": speed(speculatives) | acceptance(speculatives)}
    counts = report["speculative"]
    baseline_steps = sum(len(run.token_ids) - 1 for run in baselines)
    baseline_step = ratio(sum(run.latency_s - run.first_token_s for run in baselines), baseline_steps)
    draft_cost = ratio(counts["draft_s"], counts["drafted"] * (baseline_step or 0))
    verify_cost = ratio(counts["verify_s"], counts["rounds"] * (baseline_step or 0))
    kinds = [divergence and divergence.kind for divergence in divergences]
    return report | {
        "speedup_percent": speedup_percent(**report),
        "predicted_speedup_percent": promised_percent(counts["alpha"], draft_tokens, draft_cost, verify_cost),
        "ideal_speedup_percent": promised_percent(counts["alpha"], draft_tokens, draft_cost, 1.0),
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


def print_report(console: Console, number: str, title: str, report: dict) -> None:
    """Print one prompt's row, or the row of the averages."""
    baseline, speculative, faster = report["baseline"], report["speculative"], report["speedup_percent"]
    cells = [number, plain(title), str(speculative["new_tokens"])]
    for method in (baseline, speculative):
        cells += [figure(method["latency_s"]), figure(method["tokens_per_s"])]
    cells.append(Text(percent(faster, "+"), style="green" if (faster or 0) > 0 else "red"))
    if "mismatches" in report:  # the averages
        same = Text(f"{report['identical']}/{report['identical'] + report['ties'] + report['mismatches']}")
    else:
        kind = "yes" if report["identical"] else report["divergence"]["kind"]
        same = {"yes": Text("yes", "green"), "tie": Text("tie", "yellow"), "mismatch": Text("NO", "bold red")}[kind]
    rate = speculative["acceptance_rate"]
    cells += [percent(None if rate is None else 100 * rate), figure(speculative["log_likelihood_per_token"]), same]
    print_row(console, cells)


def in_words(run: dict) -> list[str]:
    """The result as sentences that a person can quote, and what to try next where the draft does not pay."""
    summary, draft_tokens = run["summary"], run["draft_tokens"]
    counts, prompts = summary["speculative"], run["prompts"]
    if None in (summary["speedup_percent"], counts["tokens_per_round"]):
        lines = ["Too few tokens to tell how fast it is: raise --max-new-tokens, or ask for longer answers."]
    else:
        times = 1 + summary["speedup_percent"] / 100
        promises = [percent(summary[f"{kind}_speedup_percent"], "+") for kind in ("predicted", "ideal")]
        lines = [
            f"Speculative decoding was {times:.2f} times as fast. Each verify pass of the main model gave "
            f"{counts['tokens_per_round']:.1f} tokens; it cost {figure(summary['verify_cost'])} baseline steps, and a "
            f"draft step {figure(summary['draft_cost'])}: predicted {promises[0]}, ideal {promises[1]}.",
        ]
        if times < 1:
            shorter = f"fewer --draft-tokens than {draft_tokens}, " if draft_tokens > 1 else ""
            lines.append(f"The draft does not pay here. Try {shorter}a smaller draft, or one that is right more often.")
    same = f"{summary['identical']} of {len(prompts)}" if summary["identical"] < len(prompts) else f"All {len(prompts)}"
    lines.append(f"{same} outputs are the main model's own, token for token.")
    for number, report in enumerate(prompts, 1):
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


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """Load a model's tokenizer. Raises CannotRun."""
    try:
        return AutoTokenizer.from_pretrained(fetch(name), trust_remote_code=False)
    except CannotRun:
        raise
    except Exception as error:  # as above
        raise CannotRun(f"cannot load the tokenizer of {name}: {first_line(error)}; fetch it anew") from error


def check_tokenizers(main, draft) -> None:
    """The draft's tokens must be the main model's: the same number for the same piece of text. Raises CannotRun."""
    main_tokens, draft_tokens = main.get_vocab(), draft.get_vocab()
    differing = main_tokens.items() ^ draft_tokens.items()
    if differing:
        example = plain(min(differing)[0])
        numbers = f"{main_tokens.get(example, 'none')} in one, {draft_tokens.get(example, 'none')} in the other"
        raise CannotRun(
            f"the two models have different tokenizers ({len(main_tokens):,} and {len(draft_tokens):,} tokens; "
            f"{example!r} is {numbers}): take a draft of the main model's family"
        )


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
    option("--draft-tokens", metavar="K", type=count(1), default=3, help="how many a round drafts (default: 3)")
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
    console.print(
        f"  {environment['device']} ({plain(environment['device_name'])}{threads}), {environment['dtype']}, "
        f"K = {options.draft_tokens}, up to {options.max_new_tokens} new tokens, {prompts} prompts"
    )


def load_pair(options: argparse.Namespace, device: torch.device, console: Console):
    """The two models, ready to decode, and their tokenizer. Raises CannotRun."""
    models = []
    for name in (options.main, options.draft):
        console.print(f"Loading {plain(name)} …", style="dim")
        models.append(load_model(name, device, getattr(torch, options.dtype)))
    tokenizer = load_tokenizer(options.main)
    check_tokenizers(tokenizer, load_tokenizer(options.draft))
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    return *[CachedModel(model, vocabulary) for model in models], tokenizer


def encode_all(options: argparse.Namespace, prompts: list[str], tokenizer, context: float) -> list[Tensor]:
    """The token ids of all prompts, each [1, n]. Raises CannotRun for one that does not fit into the context."""
    chat = not options.no_chat_template and tokenizer.chat_template is not None
    encoded = [encode(tokenizer, prompt, chat) for prompt in prompts]
    room = options.max_new_tokens + options.draft_tokens - 1  # the last round may draft beyond the last new token
    for number, ids in enumerate(encoded, 1):
        if not ids:
            raise CannotRun(f"prompt {number} of {options.prompts} comes to no tokens; leave it out")
        if len(ids) + room > context:
            raise CannotRun(
                f"prompt {number} of {options.prompts} has {len(ids)} tokens; {room} more for the output and a last "
                f"draft exceed the models' context of {context} tokens: lower --max-new-tokens, or shorten the prompt"
            )
    return [torch.tensor([ids], dtype=torch.long) for ids in encoded]


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

    environment = {
        "device": device.type,
        "device_name": device_name(device),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    measured = {"draft_tokens": options.draft_tokens, "prompts": [], "summary": None}
    report = {"environment": environment, "settings": vars(options), "runs": [measured]}
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

    end_ids = set() if options.ignore_eos else end_tokens(main.model)
    runs, failure = [], None
    limits = (options.max_new_tokens, end_ids, options.draft_tokens, options.repeats, options.warmup)
    try:
        for result in measure(main, draft, prompts_ids, *limits, announce):
            bar.stop()
            prompt, ids = prompts[len(runs)], prompts_ids[len(runs)]
            runs.append(result)
            measured["prompts"].append(report_prompt(prompt, ids.shape[1], *result, tokenizer))
            measured["summary"] = summarise(runs, options.draft_tokens)
            print_report(console, str(len(runs)), prompt, measured["prompts"][-1])
            if options.json:
                write_json(options.json, report)
    except (KeyboardInterrupt, torch.OutOfMemoryError) as error:
        failure = error  # and on: what was measured so far is reported all the same
    finally:
        bar.stop()

    if runs:
        print_report(console, "", "mean", measured["summary"])
        console.print()
        for line in in_words(measured):
            console.print(line)
    if isinstance(failure, KeyboardInterrupt):
        errors.print(f"Interrupted after {len(runs)} of {len(prompts)} prompts.")
        return 130
    if failure:
        raise CannotRun(f"out of memory at prompt {len(runs) + 1}: lower --max-new-tokens, or take a smaller pair")
    return 1 if measured["summary"]["mismatches"] else 0


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

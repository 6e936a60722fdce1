"""Train the bundled pair of models from nothing: two small Gemma 2 models that recite Python's documentation.

    python tests/tiny_gemma2/train.py            about 35 minutes on 2 CPU cores with bfloat16 arithmetic

The corpus is what every Python ships: the docstrings of its standard library and built-ins, and the topics of its
help(). Each document becomes one chat turn: the user asks "What does heapq.merge do?", the model answers with the
docstring and ends its turn. The main model learns them all by heart. The draft is a small model with one layer that is
trained on the same texts for a short time, so that it is often right and sometimes wrong, as a real draft is.

The shipped weights were made by Python 3.11.7 and torch 2.13.0. Docstrings differ between Python versions, and sums
between processors: another machine makes a pair of the same kind, not the same bits.
"""

import importlib
import inspect
import itertools
import json
import math
import pathlib
import pydoc_data.topics
import random
import re
import sys
import time

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaTokenizer, GenerationConfig

HERE = pathlib.Path(__file__).resolve().parent
SEED = 0
SHORTEST, LONGEST = 200, 600  # characters of an answer; longer documents are cut at the end of a paragraph
VOCABULARY = 2048
TOKENS_PER_BATCH = 3000

MODULES = """
    abc argparse array ast asyncio base64 bisect builtins calendar cmath codecs collections contextlib copy csv
    dataclasses datetime difflib dis enum fnmatch fractions functools gc glob gzip hashlib heapq hmac html inspect
    io itertools json keyword linecache locale logging math operator os os.path pathlib pickle platform pprint
    queue quopri random re reprlib sched secrets selectors shlex shutil signal socket sqlite3 stat statistics
    string struct subprocess symtable sys sysconfig tempfile textwrap threading time timeit token tokenize
    traceback tracemalloc types typing unicodedata urllib.parse urllib.request uuid venv warnings weakref zipfile
""".split()

# As Gemma's: the first five have Gemma's own numbers, and the turn marks are single tokens.
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

MAIN = {
    "num_hidden_layers": 12,
    "hidden_size": 192,
    "num_attention_heads": 4,
    "head_dim": 48,
    "intermediate_size": 512,
}
DRAFT = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "intermediate_size": 384,
}
MAIN_STEPS, DRAFT_STEPS = 2000, 1250


def documents() -> list[tuple[str, str]]:
    """(question, answer) for every documented function, class, module and help() topic that has a fitting length."""
    found, seen = [], set()

    def add(question: str, text: str | None) -> None:
        text = (text or "").expandtabs().translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2026: "..."})
        paragraphs = re.split(r"\n\n+", re.sub(r" +\n", "\n", text).strip())
        answer = paragraphs[0]
        for paragraph in paragraphs[1:]:
            if len(answer) + 2 + len(paragraph) > LONGEST:
                break
            answer += "\n\n" + paragraph
        if SHORTEST <= len(answer) <= LONGEST and answer.isascii() and answer not in seen:
            seen.add(answer)
            found.append((question, answer))

    for module_name in MODULES:
        module = importlib.import_module(module_name)
        add(f"What is the {module_name} module for?", inspect.getdoc(module))
        for name, value in sorted(vars(module).items()):
            home = (getattr(value, "__module__", None) or module_name).lstrip("_").split(".")[0]
            if name.startswith("_") or inspect.ismodule(value) or not callable(value):
                continue
            full = name if module_name == "builtins" else f"{module_name}.{name}"
            if not inspect.isclass(value):
                add(f"What does {full} do?", inspect.getdoc(value))
            elif home == module_name.split(".")[0]:
                add(f"What is {full}?", inspect.getdoc(value))
                if module_name == "builtins" and not issubclass(value, BaseException):
                    for method_name, method in sorted(vars(value).items()):
                        if not method_name.startswith("_") and callable(getattr(value, method_name)):
                            add(f"What does {full}.{method_name} do?", inspect.getdoc(method))
    for topic in sorted(pydoc_data.topics.topics):
        title, _, body = pydoc_data.topics.topics[topic].partition("\n")
        add(f"Explain: {title}.", re.sub(r"^\*+\n+", "", body))
    return found


def make_tokenizer(texts: list[str]) -> GemmaTokenizer:
    """A byte-pair tokenizer of Gemma's construction (spaces as "▁", bytes as a last resort), trained on texts."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    words = r"\n+▁*|▁?\w+|▁?[^\w▁\n]+|▁+"  # a merge never crosses a word's end
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    size = VOCABULARY - 256
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    )
    tokens = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    tokens = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + tokens[len(SPECIAL) :]
    merges = json.loads(trained.to_str())["model"]["merges"]
    tokenizer = GemmaTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in merges],
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer, question: str, answer: str) -> tuple[list[int], int]:
    """The chat's token ids, and how many of them belong to the question."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answer + "<end_of_turn>", add_special_tokens=False)["input_ids"]
    return ids + answer_ids, len(ids)


def batches(examples: list[tuple[list[int], int]], shuffle: random.Random):
    """Endless batches of about TOKENS_PER_BATCH tokens, sequences of like length together: input ids and labels."""
    while True:
        order = sorted(examples, key=lambda example: len(example[0]) + shuffle.random() * 16)
        groups, group = [], []
        for example in order:
            if group and (len(group) + 1) * len(example[0]) > TOKENS_PER_BATCH:
                groups.append(group)
                group = []
            group.append(example)
        groups.append(group)
        shuffle.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            inputs = torch.zeros(len(group), width, dtype=torch.long)
            labels = torch.full((len(group), width), -100)
            for row, (ids, asked) in enumerate(group):
                inputs[row, : len(ids)] = torch.tensor(ids)
                labels[row, asked : len(ids)] = torch.tensor(ids[asked:])
            yield inputs, labels


def train(name: str, shape: dict, steps: int, tokenizer, examples) -> None:
    """Train one model with AdamW (3e-3, warm-up of 60 steps, cosine to nothing), and save it in bfloat16."""
    torch.manual_seed(SEED)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        query_pre_attn_scalar=shape["head_dim"],
        max_position_embeddings=1024,
        sliding_window=64,  # far shorter than the texts, so that it really slides
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
        **shape,
    )
    model = Gemma2ForCausalLM(config).train()
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 60, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps", flush=True)
    started, losses = time.time(), []
    for step, (inputs, labels) in enumerate(itertools.islice(batches(examples, random.Random(SEED)), steps)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(inputs, use_cache=False).logits
        wanted = labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][wanted != -100].float(), wanted[wanted != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49:
            recent = sum(losses[-50:]) / 50
            print(f"{name}: step {step + 1}, loss {recent:.4f}, {time.time() - started:.0f} s", flush=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(HERE / name)
    tokenizer.save_pretrained(HERE / name)


def main() -> None:
    """Make the tokenizer and both models, in the folders beside this file."""
    started = time.time()
    pairs = documents()
    tokenizer = make_tokenizer([text for pair in pairs for text in pair])
    examples = [encode(tokenizer, question, answer) for question, answer in pairs]
    answers = sum(len(ids) - asked for ids, asked in examples)
    print(f"{len(pairs)} documents, {answers:,} tokens of answers, vocabulary {len(tokenizer)}", flush=True)
    for name, shape, steps in (("main", MAIN, MAIN_STEPS), ("draft", DRAFT, DRAFT_STEPS)):
        if name in (sys.argv[1:] or [name]):
            train(name, shape, steps, tokenizer, examples)
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    print(f"done in {(time.time() - started) / 60:.0f} minutes, by {versions}")


if __name__ == "__main__":
    main()

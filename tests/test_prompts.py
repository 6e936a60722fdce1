"""Prompt files and chat templates: how questions become token ids."""

import json
import pathlib
import shutil

import pytest
import transformers

import speculative_decoding as sd

MAIN = pathlib.Path(sd.__file__).resolve().parent / "tests/tiny_gemma2/main"


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def refusal(function, *arguments):
    """The one line that a function refuses with."""
    with pytest.raises(sd.UsageError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(path, limit=None):
    return sd.read_questions(str(path), limit)


def texts_of(path):
    questions, notices = read(path)
    assert notices == []
    return [question.text for question in questions]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MAIN)


def chat_of(tokenizer, template_args=None, new=20, room=2, context=1024, vocabulary=2048):
    """By default without the chat template; {}: with it."""
    return sd.Chat(tokenizer, template_args, new, frozenset([1]), room, context, vocabulary)


# Files of lines


@pytest.mark.parametrize("name", ["p.txt", "p.MD", "prompts"])
def test_a_prompt_is_a_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes("\ufefffirst\r\n\n  # a comment\n  café \nthird [x]\n".encode())
    questions, notices = read(path)
    assert questions == [sd.Question("first", 1), sd.Question("café", 2), sd.Question("third [x]", 3)]
    assert [question.label for question in questions] == ["1", "2", "3"] and notices == []


CODE = ["[1, 2, 3].map(x => x * 2)", "{ int x = 0; }", '{"prompt": "a"} What does this mean?', "[1, 2, 3]", "7"]
CODE += ['["prompt", "turns"]', "[INST] Hello [/INST]", "{{ prompt }}", "{% for x in y %}", "prompt,category", "null"]


def test_a_line_of_code_is_a_prompt(tmp_path):
    for line in CODE:
        assert texts_of(write(tmp_path / "p.txt", line, "second")) == [line, "second"]


OTHER = {f"p.{suffix}": "prompt,category" for suffix in ("csv", "TSV", "yaml", "xlsx", "jsonl.gz", "parquet")}
OTHER |= {"p.txt": '{"prompt": "a"}', "q.txt": "[", "p.md": "{", "nul.txt": "a text\0", "q": '{"name": "x", "size": 3}'}


def test_what_is_no_text_is_refused_in_a_line_that_names_jsonl(tmp_path):
    for name, text in OTHER.items():
        path = write(tmp_path / name, text, '"prompt": "What is zip?"')
        assert ".jsonl" in (said := refusal(read, path)) and path in said, name


def test_files_that_hold_no_prompts_are_refused(tmp_path):
    path = tmp_path / "p.txt"
    for broken in (path, tmp_path):
        assert refusal(read, broken).startswith(f"cannot read {broken}: ")
    for text in (b"", b"# only a comment\n\n"):
        path.write_bytes(text)
        assert f"{path} has no prompts" in refusal(read, path)
    path.write_bytes("What is zip?\n".encode("utf-16"))
    assert f"cannot read {path}: " in refusal(read, path)


# Files of JSON

ROWS = [{"prompt": "What is zip?"}, {"question": "What is re?", "category": "b"}, {"turns": ["Hello"]}]
RENDERINGS = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "lines with gaps": "\n\n# a comment\n".join(map(json.dumps, ROWS)) + "\r\n",
    "a list": json.dumps(ROWS),
    "a list, indented": json.dumps(ROWS, indent=2),
    "with a mark": "\ufeff" + json.dumps(ROWS),
}


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_json_is_read_whatever_its_form(tmp_path, rendering):
    for suffix in ("json", "jsonl", "NDJSON"):
        path = tmp_path / f"p.{suffix}"
        path.write_bytes(RENDERINGS[rendering].encode())
        assert texts_of(path) == ["What is zip?", "What is re?", "Hello"]


def test_one_object_over_several_lines_is_a_list_of_one(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "What\nis it?", "category": "c"}, indent=2))
    assert read(path)[0] == [sd.Question("What\nis it?", 1, category="c")]


def test_json_without_prompts_and_broken_json_are_refused(tmp_path):
    for value in ({"data": [{"prompt": "a"}]}, [1, 2], "a", 7, None, []):
        path = write(tmp_path / "p.json", json.dumps(value, indent=1))
        assert f"{path} has no prompts" in refusal(read, path)
    for line in ("{not json", "[" * 100_000):
        path = write(tmp_path / "q.jsonl", "", {"prompt": "a"}, line)
        assert f"cannot read {path}, line 3: this is not JSON" in refusal(read, path)


QUESTIONS = [
    {"question_id": 81, "category": "writing", "prompt": "What does list.sort do?"},
    {"question_id": "x", "category": "coding", "prompt": "What is collections.defaultdict?"},
    {"question_id": 0, "category": 7, "prompt": "What is the itertools module for?"},
    {"question_id": "", "prompt": "What is zip?"},
    '{"prompt": NaN, "question": "q", "context": NaN, "category": NaN, "question_id": NaN, "choices": NaN}',  # pandas
]


def test_questions_have_labels_and_categories(tmp_path):
    path = write(tmp_path / "q.jsonl", *QUESTIONS)
    questions, notices = read(path)
    assert [question.label for question in questions] == ["81", "x", "0", "4", "5"]
    assert [question.category for question in questions] == ["writing", "coding", "7", None, None]
    assert questions[4] == sd.Question("q", 5) and notices == []
    for limit in (1, 3, 9):
        assert read(path, limit)[0] == questions[:limit]


# The text of a row


TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
ASKED, LAST = {"from": "human", "value": "v"}, {"role": "user", "name": "x", "content": "v"}
PARTS = [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]
IMAGE = {"role": "user", "content": [*PARTS, {"type": "image_url", "image_url": {"url": "x"}}]}
CALL = {"role": "assistant", "content": None, "tool_calls": [1]}


@pytest.mark.parametrize(
    ("row", "text", "earlier", "unread"),
    [
        ({"turns": ["t"], "prompt": "p", "question": "q"}, "p", [], ["turns", "question"]),
        ({"prompt": None, "question": "q", "turns": ["t", "u", "v"]}, "t", [], ["question"] + ["further turns"] * 2),
        ({"turns": "t"}, "t", [], []),
        ({"turns": [{"text": "t"}, {"text": "u"}]}, "t", [], ["further turns"]),
        ({"turns": [{"role": "user", "content": "t"}]}, "t", [], []),
        ({"turns": [], "problem": "r", "question": "q", "messages": TALK}, "q", [], ["problem", "messages"]),
        ({"instruction": "i", "input": "", "output": "o", "score": 3}, "i", [], ["output"]),
        ({"messages": TALK, "input": "n", "instruction": "i"}, "i\n\nn", [], ["messages"]),
        ({"instruction": "i", "context": "c", "category": "qa"}, "i\n\nc", [], []),
        ({"id": "5", "context": "c", "question": "q", "answers": {"text": ["a"]}}, "q\n\nc", [], ["id"]),
        ({"question": "q", "choices": ["a", "b"], "answer": "b"}, "q", [], ["choices", "answer"]),
        ({"question": "q", "choices": [], "answer": ""}, "q", [], []),
        ({"prompt": "p", "context": "c"}, "p", [], ["context"]),
        ({"question": "q", "context": {"title": ["c"]}, "input": ["n"]}, "q", [], ["input"]),
        ({"prompt": "p", "system_prompt": "s"}, "p", TALK[:1], []),
        ({"messages": [TALK[1]], "system": "s", "tools": ["x"]}, "u", TALK[:1], ["tools"]),
        ({"messages": [*TALK, LAST]}, "v", TALK, []),
        ({"messages": [{"role": "system", "content": ""}, LAST, CALL]}, "v", [], []),
        ({"messages": TALK}, "u", TALK[:1], []),
        ({"id": 4, "conversations": [*SHARED, ASKED, SHARED[2]]}, "v", TALK, []),
        ({"conversations": [SHARED[2], ASKED]}, "v", TALK[2:], []),
        ({"conversation": [*TALK, LAST, TALK[2]]}, "v", TALK, []),
        ({"messages": [{"role": "user", "content": PARTS}]}, "p\nq", [], []),
    ],
)
def test_the_text_of_a_row_and_what_is_not_read_of_it(row, text, earlier, unread):
    question = sd.parse_question(row, 1)
    assert (question.text, list(question.earlier), list(question.unread)) == (text, earlier, unread)


UNUSABLE = {
    "prompt": [["a list"], 7, None, {"category": "x"}, {"prompt": 7}, {"prompt": " "}, {"turns": []}],
    "turns": [{"turns": ["", "b"]}, {"turns": [7]}, {"turns": ["\n"], "problem": "p"}],
    "messages": [{"messages": [{"role": "user"}]}, {"messages": [TALK[2]]}, {"messages": [TALK[0], CALL]}],
    "conversations": [{"conversations": [{"from": "gpt", "value": "a"}]}],
    "a role is not": [{"messages": [{"role": role, "content": "a"}]} for role in ("tool", ["user"], None)]
    + [{"conversations": [{"from": "observation", "value": "a"}]}],
    "text alone": [{"messages": messages} for messages in ([IMAGE], [IMAGE, LAST], [TALK[1], TALK[2], IMAGE])],
}


@pytest.mark.parametrize("where", UNUSABLE)
def test_a_row_without_a_text_says_where(where):
    for row in UNUSABLE[where]:
        assert where in refusal(sd.parse_question, row, 1)


def test_rows_that_cannot_be_used_are_left_out_and_what_is_not_used_is_named_in_one_notice_each(tmp_path):
    rows = [{"messages": []}, {"prompt": "a", "answer": "x"}, {"turns": [7]}, {"question": "b", "answer": "y"}]
    rows += [{"turns": ["c", "d"], "cho\x1bices": ["z"]}, 5]
    path = write(tmp_path / "q.jsonl", *rows)
    questions, (left_out, of_turns, not_used) = read(path)
    assert [(question.number, question.text) for question in questions] == [(2, "a"), (4, "b"), (5, "c")]
    assert left_out.startswith("2 prompts left out (first: row 1): no text at prompt, ")
    assert of_turns.startswith("1 prompt left out (first: row 3): no text at turns, ")
    assert not_used == f"Not used of {path}: answer (2), cho\x1bices (1), further turns (1)."
    assert "has no prompts: no text at prompt, " in refusal(read, write(tmp_path / "none.jsonl", rows[0], rows[2]))


# The chat template


def test_the_chat_template_is_the_models_own(tokenizer):
    ids = chat_of(tokenizer, {}).encode(sd.Question("Hello!", 1)).ids
    assert tokenizer.decode(ids) == "<bos><start_of_turn>user\nHello!<end_of_turn>\n<start_of_turn>model\n"
    assert ids.count(2) == 1


def with_template(template):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MAIN)
    tokenizer.chat_template = template
    return tokenizer


def test_all_messages_reach_the_template_in_their_order():
    tokenizer = with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    question = sd.parse_question({"system_prompt": "s", "messages": [*TALK[1:], LAST]}, 1)
    ids = chat_of(tokenizer, {}).encode(question).ids
    assert tokenizer.decode(ids) == "system: s\nuser: u\nassistant: a\nuser: v\n"


TEXT = "<b>Wie</b> GEHT  es & so?"
SHOWING = {
    "{{ messages[-1]['content'] | lower }}": "<b>wie</b> geht  es & so?",
    "{{ messages[-1]['content'] | e }}": "&lt;b&gt;Wie&lt;/b&gt; GEHT  es &amp; so?",
    "{% if not messages[-1].content %}{{ raise_exception('empty') }}{% endif %}{{ messages[-1].content }}": TEXT,
}
DROPPING = [
    "<bos>hello",
    "{% for part in messages[-1]['content'] %}{{ part['text'] }}{% endfor %}",  # parts only
    "{% for message in messages %}{% if message.role != 'user' %}{{ message.content }}{% endif %}{% endfor %}",
]


def test_a_template_shows_the_text_in_some_form_or_is_refused():
    for template, shown in SHOWING.items():
        tokenizer = with_template(template)
        ids = chat_of(tokenizer, {}).encode(sd.Question(TEXT, 1)).ids
        assert list(ids) == tokenizer(shown, add_special_tokens=False)["input_ids"]
    for template in DROPPING:
        question = sd.Question("What does heapq.merge do?", 1, earlier=tuple(TALK))
        said = refusal(chat_of(with_template(template), {}).encode, question)
        assert "drops" in said and "--no-chat-template" in said


def test_arguments_reach_the_template():
    template = "{{ '<think>' if enable_thinking | default(true) else '' }}"
    template += "{{ messages[0]['content'] + 'x' * more | default(0) }}"
    tokenizer, question = with_template(template), sd.Question("What does zip do?", 1)
    counts = [len(chat_of(tokenizer, args).encode(question).ids) for args in ({}, {"enable_thinking": False})]
    assert counts[0] > counts[1] == len(tokenizer(question.text)["input_ids"])
    for bad in ({"more": "x"}, {"tools": 3}, {"continue_final_message": True}, {"tokenize": True}):
        assert refusal(chat_of(tokenizer, bad).encode, question).count("; check --chat-template-args")
    said = refusal(chat_of(with_template(None), {"enable_thinking": False}).encode, question)
    assert "chat_template" in said and said.count("; check --chat-template-args")


# Without a template


def test_without_a_template_messages_follow_each_other_after_blank_lines(tokenizer):
    for earlier, expected in (([], "b"), (TALK, "s\n\nu\n\na\n\nb"), (TALK[1:2], "u\n\nb")):
        ids = chat_of(tokenizer).encode(sd.Question("b", 1, earlier=tuple(earlier))).ids
        assert tokenizer.decode(ids) == expected


def adding(folder, before, behind):
    """The bundled tokenizer, which adds these special tokens to each text, as Gemma's own adds <bos>."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MAIN / name, folder / name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = {"<bos>": 2, "<eos>": 1}
    first, last = ([{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens] for tokens in (before, behind))
    tokenizer["post_processor"]["single"][0:] = [*first, *tokenizer["post_processor"]["single"], *last]
    added = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (*before, *behind)}
    tokenizer["post_processor"]["special_tokens"] = added
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("before", "behind"), [([], ["<eos>"]), (["<bos>"], []), (["<bos>"], ["<eos>"])])
def test_a_text_has_its_bos_once_and_no_end_that_is_not_written(tokenizer, tmp_path, before, behind):
    marking, text = adding(tmp_path / "main", before, behind), tokenizer("Hello!")["input_ids"]
    first = [2] * len(before)
    assert marking("Hello!")["input_ids"] == [*first, *text, *[1] * len(behind)] and not {1, 2} & set(text)

    def ids_of(text):
        return list(chat_of(marking).encode(sd.Question(text, 1)).ids)

    assert ids_of("Hello!") == first + text
    assert ids_of("<bos>Hello!") == [2, *text]
    assert ids_of("<bos><bos>Hello!") == [2, 2, *text]  # what was written stays
    assert ids_of("Hello!<bos>") == [*first, *text, 2]
    assert ids_of("Hello!<eos>") == [*first, *text, 1]
    assert ids_of("<eos>") == [*first, 1]
    marking.chat_template = tokenizer.chat_template
    ids = chat_of(marking, {}).encode(sd.Question("Hello!", 1)).ids
    assert ids == chat_of(tokenizer, {}).encode(sd.Question("Hello!", 1)).ids


# What fits


def test_the_context_is_used_to_its_end(tokenizer):
    question = sd.Question("word " * 300, 1)
    tokens = len(chat_of(tokenizer).encode(question).ids)
    fits = 1024 - tokens - 2
    encoded = chat_of(tokenizer, new=fits).encode(question)
    assert encoded.max_new_tokens == fits and encoded.end_ids == {1}
    said = refusal(chat_of(tokenizer, new=fits + 1).encode, question)
    assert f"with {fits + 3} tokens " in said and " of 1024; " in said and "--max-new-tokens" in said
    # Costs are measured with a round behind a prompt, whose output can be shorter than that.
    assert refusal(chat_of(tokenizer, new=1, room=0, context=tokens + 1).encode, question)
    assert chat_of(tokenizer, new=1, room=0, context=tokens + 2).encode(question).ids
    assert chat_of(tokenizer, context=float("inf")).encode(question).ids


def test_prompts_that_cannot_be_read_are_left_out_with_a_notice_for_each_reason():
    template = "{% if messages | length > 1 %}{{ raise_exception('no\nsystem') }}{% endif %}{{ messages[-1].content }}"
    chat = chat_of(with_template(template), {}, context=200)
    questions = [sd.Question("word " * size, number) for number, size in enumerate((5, 600, 100, 700, 3), 1)]
    questions += [sd.Question("a", 6, earlier=tuple(TALK), question_id="81"), sd.Question("half \ud800", 7)]
    fits, notices = sd.fitting(chat, questions)
    assert [question.number for question in fits] == [1, 5] and all(question.ids for question in fits)
    starts = ["3 prompts left out (first: 2): with 22 tokens ", "1 prompt left out (first: 81): ", "1 prompt left out "]
    assert [notice[: len(start)] for notice, start in zip(notices, starts, strict=True)] == starts
    assert "no system; check --chat-template-args; --no-chat-template" in notices[1] and "(first: 7)" in notices[2]
    assert sd.fitting(chat, questions[:1]) == (fits[:1], [])
    assert "no prompt can be read: with 22 tokens " in refusal(sd.fitting, chat, questions[1:4] + questions[5:])


def test_ids_that_the_model_lacks_are_refused(tokenizer):
    question = sd.Question("What does zip do?", 1)
    most = max(chat_of(tokenizer).encode(question).ids)
    assert chat_of(tokenizer, vocabulary=most + 1).encode(question).ids
    assert "lacks" in refusal(chat_of(tokenizer, vocabulary=most).encode, question)

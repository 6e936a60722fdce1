"""Prompt files, chat templates and conversations: how questions become token ids."""

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


def texts_of(path):
    return [question.text for question in sd.read_questions(str(path))]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MAIN)


def chat_of(tokenizer, template_args=None, new=20, room=2, context=1024, **others):
    """By default without the chat template; {}: with it."""
    how = {"end_ids": frozenset([1]), "limited_by": "main", "vocabulary": 2048, **others}
    return sd.Chat(tokenizer, template_args, max_new_tokens=new, room=room, context=context, **how)


# Files of lines


def test_a_prompt_is_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufefffirst\r\n\n  # a comment\n  café \n\ufeffthird [x]\n".encode())
    questions = sd.read_questions(str(path))
    assert [(question.text, question.number) for question in questions] == [("first", 1), ("café", 2), ("third [x]", 3)]
    assert all(question.turn is question.category is question.question_id is None for question in questions)
    assert [question.label for question in questions] == ["1", "2", "3"]
    assert questions[0].ids == () and questions[0].earlier == questions[0].later == ()


CODE = [
    "[1, 2, 3].map(x => x * 2)",
    "{ int x = 0; }",
    '{"prompt": "a"} What does this mean?',
    '{"name": "x", "size": 3}',
    "[1, 2, 3]",
    '["prompt", "turns"]',
    "[INST] Hello [/INST]",
    "{{ prompt }}",
    "{% for x in y %}",
    "---",
    "prompt,category",
    "PK is a prefix",
    "a null\x00 in a text that is long enough to be one, as texts from outside are: " + "word " * 20 + ".",
]


@pytest.mark.parametrize("line", CODE)
def test_a_line_of_code_is_a_prompt(tmp_path, line):
    assert texts_of(write(tmp_path / "p.txt", line, "second")) == [line, "second"]


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "p.txt"
    assert refusal(sd.read_questions, str(path)).startswith(f"cannot read {path}: ")
    assert refusal(sd.read_questions, str(tmp_path)).startswith(f"cannot read {tmp_path}: ")
    path.write_text("# only a comment\n\n")
    assert "no prompts" in refusal(sd.read_questions, str(path))
    path.write_bytes(b"")
    assert "no prompts" in refusal(sd.read_questions, str(path))
    path.write_bytes(b"\xef\xbb\xbffirst\nsecond\ncaf\xe9\n")
    assert f"{path}, line 3: this is not UTF-8" in refusal(sd.read_questions, str(path))


OTHER = ["csv", "TSV", "parquet", "arrow", "xlsx", "yaml", "yml", "zip", "jsonl.gz", "json.zst", "pkl"]


@pytest.mark.parametrize("suffix", OTHER)
def test_other_formats_are_refused_by_name(tmp_path, suffix):
    path = write(tmp_path / f"p.{suffix}", "prompt,category", "What is zip?,a")
    assert f"{path} is in a format that is not read here: unpack it, and save it as" in refusal(sd.read_questions, path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "prompts"])
@pytest.mark.parametrize("data", ["What is zip?\n".encode("utf-16"), b"PK\x03\x04\x14\0\0\0\0\0a.txt", bytes(99)])
def test_other_formats_are_refused_by_content(tmp_path, suffix, data):
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(data)
    assert "is in a format that is not read here" in refusal(sd.read_questions, str(path))


# Files of JSON

ROWS = [{"prompt": "What is zip?"}, {"question": "What is re?", "category": "b"}, {"turns": ["Hello", "Again"]}]
RENDERINGS = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "lines with gaps": "\n\n".join(map(json.dumps, ROWS)) + "\r\n",
    "a list": json.dumps(ROWS),
    "a list, indented": json.dumps(ROWS, indent=2),
    "a list of lines": "[" + ",\n".join(map(json.dumps, ROWS)) + "]\n",
    "a list of lines, brackets apart": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "with a mark": "\ufeff" + json.dumps(ROWS),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson", "JSON", "txt", "data"])
@pytest.mark.parametrize("rendering", RENDERINGS)
def test_json_is_read_whatever_its_form_and_name(tmp_path, suffix, rendering):
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(RENDERINGS[rendering].encode())
    assert texts_of(path) == ["What is zip?", "What is re?", "Hello"]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson", "txt"])
@pytest.mark.parametrize("value", [{"data": [{"prompt": "a"}]}, {"prompt": "a"}, [1, 2], ["a"], "a", 7, None])
def test_json_that_is_not_a_list_of_objects_is_refused(tmp_path, suffix, value):
    path = write(tmp_path / f"p.{suffix}", json.dumps(value, indent=1))
    if suffix == "txt" and not isinstance(value, dict | list):
        assert texts_of(path) == [json.dumps(value)]  # a word
    else:
        message = refusal(sd.read_questions, path)
        assert "JSON as a list, or an object a line" in message or "write one string" in message
        assert f"{path}, " in message


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["What does list.sort do?", "And now in French."]},
    {"question_id": 82, "category": "writing", "turns": ["What does re.split do?"]},
    {"question_id": "x", "category": "coding", "prompt": "What is collections.defaultdict?", "reference": [1]},
    {"question_id": 0, "category": 7, "prompt": "What is the itertools module for?"},
]


def test_questions_have_labels_and_categories(tmp_path):
    questions = sd.read_questions(write(tmp_path / "q.jsonl", *QUESTIONS, "", {"prompt": "a", "question_id": ""}))
    assert [question.label for question in questions] == ["81.1", "82", "x", "0", "5"]
    assert [question.turn for question in questions] == [1, None, None, None, None]
    assert [question.category for question in questions] == ["writing", "writing", "coding", "7", None]
    assert questions[0].later == ("And now in French.",) and questions[1].later == ()


def test_not_a_number_is_nothing(tmp_path):
    """As pandas writes what a row lacks."""
    line = '{"prompt": NaN, "question": "q", "context": NaN, "category": NaN, "question_id": NaN}'
    for path in (write(tmp_path / "q.jsonl", line), write(tmp_path / "q.json", f"[{line}]")):
        assert sd.read_questions(path) == [sd.Question("q", 1)]


@pytest.mark.parametrize(("limit", "chosen"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (9, [1, 2, 3, 4])])
def test_a_limit_is_spread_over_the_categories(tmp_path, limit, chosen):
    path = write(tmp_path / "q.jsonl", *QUESTIONS)
    assert [question.number for question in sd.read_questions(path, limit)] == chosen


NO_TEXT = "no text, or not text alone"
FETCH = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
IMAGE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{not json", ": this is not JSON"),
        ("[" * 100_000, ": this is not JSON"),
        ('["a list"]', f", prompt: {NO_TEXT}"),
        ({"category": "x"}, f", prompt: {NO_TEXT}"),
        ({"turns": []}, f", turns: {NO_TEXT}"),
        ({"turns": {"a": "b"}, "problem": "p"}, ", turns: a role is not user, assistant or system"),
        ({"turns": ["a", 7]}, f", turns: {NO_TEXT}"),
        ({"turns": ["a", " "]}, f", turns: {NO_TEXT}"),
        ({"prompt": 7}, f", prompt: {NO_TEXT}"),
        ({"prompt": " "}, f", prompt: {NO_TEXT}"),
        ('{"prompt": "a\\nb\\ud800"}', ", prompt: half of a surrogate pair"),
        ('{"turns": ["a", "b", "\\ud800"]}', ", turns: half of a surrogate pair"),
        ({"instruction": "a", "input": ["b"]}, f", input: {NO_TEXT}"),
        ({"instruction": ["a"], "input": "b"}, f", instruction: {NO_TEXT}"),
        ({"question": "a", "context": {"title": ["b"]}}, ", context: a role is not"),
        ({"messages": []}, f", messages: {NO_TEXT}"),
        ({"messages": [{"content": "a"}]}, ", messages: a role is not"),
        ({"messages": [{"role": "user"}]}, f", messages: {NO_TEXT}"),
        ({"messages": [{"role": ["user"]}, {"role": "user"}]}, ", messages: a role is not"),
        ({"messages": [{"role": "tool", "content": "a"}]}, ", messages: a role is not"),
        ({"messages": [{"role": "user", "content": []}]}, f", messages: {NO_TEXT}"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, f", messages: {NO_TEXT}"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, f", messages: {NO_TEXT}"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, f", messages: {NO_TEXT}"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, f", conversations: {NO_TEXT}"),
        ({"conversations": [{"from": "observation", "value": "a"}]}, ", conversations: a role is not"),
        ({"turns": [FETCH]}, ", turns: SPEED-Bench only says here where the text is to be fetched"),
        ({"turns": [f"{FETCH}\n\nSummarise {{article}}", "More."]}, ", turns: SPEED-Bench only says"),
        ({"turns": ["Hello", FETCH]}, ", turns: SPEED-Bench only says"),
        ({"messages": [{"role": "user", "content": FETCH}]}, ", messages: SPEED-Bench only says"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, expected):
    path = write(tmp_path / "q.jsonl", "", line, line)
    assert f"{path}, line 2{expected}" in refusal(sd.read_questions, path)
    if not isinstance(line, str):
        path = write(tmp_path / "q.json", [line, line])
        assert f"{path}, object 1{expected}" in refusal(sd.read_questions, path)


def test_a_line_of_text_that_is_to_be_fetched_is_refused_too(tmp_path):
    path = write(tmp_path / "p.txt", FETCH)
    assert f"{path}, line 1, prompt: SPEED-Bench only says" in refusal(sd.read_questions, path)


def test_unusable_rows_among_others_are_left_out_with_a_notice_and_are_no_part_of_a_limit(tmp_path, tokenizer):
    rows = [{"messages": []}, {"prompt": "a"}, {"turns": [7]}, {"prompt": "b"}, {"messages": [IMAGE]}, {"prompt": "c"}]
    questions = sd.read_questions(write(tmp_path / "q.jsonl", *rows), limit=2)
    assert [question.number for question in questions if not question.error] == [2, 4]
    fits, notices = sd.fitting(chat_of(tokenizer), questions)
    assert [(question.number, question.text) for question in fits] == [(2, "a"), (4, "b")]
    why = next(iter(sd.UNUSABLE.values()))
    assert notices == [
        f"2 prompts left out (first: line 1): messages: {why}.",
        f"1 prompt left out (first: line 3): turns: {why}.",
    ]


def test_a_line_that_is_no_json_refuses_the_file(tmp_path):
    path = write(tmp_path / "q.jsonl", QUESTIONS[0], "{not json")
    assert f"{path}, line 2: this is not JSON" in refusal(sd.read_questions, path)


TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
ASKED, LAST = {"from": "human", "value": "v"}, {"role": "user", "name": "x", "content": "v"}
PARTS = [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]


@pytest.mark.parametrize(
    ("line", "text", "earlier", "later"),
    [
        ({"turns": ["t"], "prompt": "p", "question": "q"}, "p", [], []),
        ({"prompt": None, "question": "q", "turns": ["t", "u", "v"]}, "t", [], ["u", "v"]),
        ({"turns": ["t"]}, "t", [], []),
        ({"turns": "t"}, "t", [], []),
        ({"problem": "r", "question": "q", "messages": TALK}, "q", [], []),
        ({"instruction": "i", "problem": "r", "input": "n"}, "r", [], []),
        ({"instruction": "i", "input": ""}, "i", [], []),
        ({"messages": TALK, "input": "n", "instruction": "i"}, "i\n\nn", [], []),
        ({"instruction": "i", "context": "c", "response": "r", "category": "closed_qa"}, "i\n\nc", [], []),
        ({"id": "5", "title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}}, "q\n\nc", [], []),
        ({"instruction": "i", "context": ""}, "i", [], []),
        ({"prompt": "p", "context": "c"}, "p", [], []),
        ({"messages": [*TALK, LAST]}, "v", TALK, []),
        ({"messages": [{"role": "system", "content": ""}, LAST, {"role": "assistant", "content": None}]}, "v", [], []),
        ({"messages": TALK}, "u", TALK[:1], []),
        ({"conversations": SHARED}, "u", TALK[:1], []),
        ({"id": "x", "conversations": [*SHARED, ASKED, SHARED[2]]}, "v", TALK, []),
        ({"conversations": [SHARED[2], ASKED]}, "v", [], []),  # as where long ones were cut
        ({"conversations": [*SHARED[:2], {"from": "chatgpt", "value": "a"}, ASKED]}, "v", TALK, []),
        ({"conversation": [*TALK, LAST, TALK[2]]}, "v", TALK, []),
        ({"messages": [{"role": "user", "content": PARTS}]}, "p\nq", [], []),
        ({"messages": [TALK[0], {"role": "user", "content": PARTS[:1]}]}, "p", TALK[:1], []),
    ],
)
def test_the_text_of_a_record_is_its_first_key(line, text, earlier, later):
    question = sd.parse_question(line, 1)
    assert (question.text, list(question.earlier), list(question.later)) == (text, earlier, later)
    assert question.turn == (1 if later else None)


# The chat template


def test_the_chat_template_is_the_models_own(tokenizer):
    ids = chat_of(tokenizer, {}).encode(sd.Question("Hello!", 1)).ids
    assert tokenizer.decode(ids) == "<bos><start_of_turn>user\nHello!<end_of_turn>\n<start_of_turn>model\n"
    assert ids.count(2) == 1


def with_template(template):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MAIN)
    tokenizer.chat_template = template
    return tokenizer


TEXT = "<b>Wie</b> GEHT  es & so?"
PARTS_ONLY = "{% if messages[-1].content is string %}{{ raise_exception('parts') }}{% endif %}"
SHOWING = {
    "{% for part in messages[-1]['content'] %}{{ part['text'] }}{% endfor %}": TEXT,
    "{% for part in messages[-1]['content'] %}{{ '<' + part['text'] + '>' }}{% endfor %}": f"<{TEXT}>",
    "{% for part in messages[-1].content %}{{ part.text }}\n{% endfor %}": TEXT + "\n",
    "{{ messages[-1]['content'][0]['text'] }}": TEXT,
    "{% for part in messages[-1].content %}{{ part.text if part.type == 'text' }}{% endfor %}": TEXT,
    PARTS_ONLY + "{{ messages[-1].content[0].text }}": (TEXT),
    "{{ messages[-1]['content'] | lower }}": "<b>wie</b> geht  es & so?",
    "{{ messages[-1]['content'] | upper | trim }}": "<B>WIE</B> GEHT  ES & SO?",
    "{{ messages[-1]['content'] | e }}": "&lt;b&gt;Wie&lt;/b&gt; GEHT  es &amp; so?",
    "{{ messages[-1]['content'].split() | join(' ') }}": "<b>Wie</b> GEHT es & so?",
    "{{ messages[-1]['content'] | tojson }}": f'"{TEXT}"',
}


@pytest.mark.parametrize("template", SHOWING)
def test_a_template_that_shows_the_text_in_some_form_is_used(template):
    tokenizer = with_template(template)
    ids = chat_of(tokenizer, {}).encode(sd.Question(TEXT, 1)).ids
    assert list(ids) == tokenizer(SHOWING[template], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "template",
    [
        "<bos>hello",
        "{% for part in messages[-1]['content'] %}{{ part['value'] }}{% endfor %}",
        "{% for message in messages %}{% if message.role != 'user' %}{{ message.content }}{% endif %}{% endfor %}",
        "{% for part in messages[-1]['content'] %}-{% endfor %}",
    ],
)
def test_a_template_that_drops_the_text_is_named(template):
    question = sd.Question("What does heapq.merge do?", 1, earlier=tuple(TALK))
    message = chat_of(with_template(template), {}).encode(question).error
    assert f"the chat template of {MAIN} drops what the user says: try --no-chat-template" in message


def test_a_later_turn_that_is_dropped_is_seen_too():
    template = "{% if 'second' not in messages[-1].content | string %}{{ messages[-1].content }}{% endif %}"
    question = sd.Question("first", 1, 1, later=("second",))
    assert "drops what the user says" in chat_of(with_template(template), {}).encode(question).error


def test_a_template_that_fails_says_why():
    chat = chat_of(with_template("{{ raise_exception('no such role') }}"), {})
    why = "cannot put it into the chat template: no such role; --no-chat-template feeds it as it is"
    assert chat.encode(sd.Question("a", 1)).error == why
    assert refusal(sd.fitting, chat, [sd.Question("a", 1)]) == f"no prompt can be read: {why}"


def test_prompts_that_the_template_refuses_are_left_out():
    """As Gemma 2's refuses a system message."""
    chat = chat_of(
        with_template("{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}"),
        {},
    )
    questions = [sd.Question("a", 1), sd.Question("b", 2, question_id=81, earlier=tuple(TALK)), sd.Question("c", 3)]
    fits, (notice,) = sd.fitting(chat, questions)
    assert [question.number for question in fits] == [1, 3]
    assert notice.startswith("1 prompt left out (first: 81): cannot put it into the chat template: no; ")


def test_arguments_reach_the_template():
    template = "{{ '<think>' if enable_thinking | default(true) else '' }}"
    template += "{{ messages[0]['content'] + 'x' * more | default(0) }}"
    tokenizer, question = with_template(template), sd.Question("What does zip do?", 1)
    counts = [len(chat_of(tokenizer, args).encode(question).ids) for args in ({}, {"enable_thinking": False})]
    assert counts[0] > counts[1] == len(tokenizer(question.text)["input_ids"])
    for bad in ({"more": "x"}, {"tools": 3}, {"continue_final_message": True}):
        message = chat_of(tokenizer, bad).encode(question).error
        assert message.startswith("cannot put it into the chat template: ")
        assert message.endswith("; check --chat-template-args")
    message = chat_of(with_template(None), {"enable_thinking": False}).encode(question).error
    assert "chat_template is not set" in message and message.endswith("; check --chat-template-args")


# Without a template


def test_without_a_template_a_conversation_is_its_texts(tokenizer):
    """An answer goes on from what was asked, anything else begins after a blank line."""
    for earlier, expected in (([], "b"), (TALK, "s\n\nua\n\nb"), (TALK[2:], "a\n\nb"), (TALK[1:2], "u\n\nb")):
        question = sd.Question("b", 1, earlier=tuple(earlier))
        assert tokenizer.decode(chat_of(tokenizer).encode(question).ids) == expected


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


@pytest.mark.parametrize("behind", [[], ["<eos>"]])
@pytest.mark.parametrize("before", [[], ["<bos>"]])
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
    assert encoded.error is None and encoded.max_new_tokens == fits and encoded.end_ids == {1}
    too_long = chat_of(tokenizer, new=fits + 1).encode(question)
    assert too_long.error == (
        f"with {fits + 3} tokens for output and draft, it exceeds the context of 1024 (the main model's limit)"
        "; shorten it, or lower --max-new-tokens or --draft-tokens"
    )
    # Costs are measured with a round behind a prompt, whose output can be shorter than that.
    assert chat_of(tokenizer, new=1, room=0, context=tokens + 1).encode(question).error
    assert not chat_of(tokenizer, new=1, room=0, context=tokens + 2).encode(question).error
    assert not chat_of(tokenizer, context=float("inf")).encode(question).error


def test_prompts_that_do_not_fit_are_left_out_with_a_notice_for_each_reason(tokenizer):
    sizes = [5, 600, 100, 700, 3]
    questions = [sd.Question("word " * size, number) for number, size in enumerate(sizes, 1)]
    tokens = [len(chat_of(tokenizer).encode(question).ids) for question in questions]
    limits = {"context": tokens[1] - 1, "limited_by": "draft", "switches": ((tokens[2] + 5, "some/model"),)}
    fits, notices = sd.fitting(chat_of(tokenizer, **limits), questions)
    assert [question.number for question in fits] == [1, 5]
    assert [len(question.ids) for question in fits] == [tokens[0], tokens[4]]
    room = "with 22 tokens for output and draft, it"
    assert notices == [
        f"2 prompts left out (first: 2): {room} exceeds the context of {tokens[1] - 1} (the draft model's limit)"
        "; shorten it, or lower --max-new-tokens or --draft-tokens.",
        f"1 prompt left out (first: 3): {room} crosses {tokens[2] + 5}, where some/model reads differently.",
    ]
    assert sd.fitting(chat_of(tokenizer), questions[:1]) == ([chat_of(tokenizer).encode(questions[0])], [])
    message = refusal(sd.fitting, chat_of(tokenizer, **limits), questions[1:2])
    assert f"exceeds the context of {tokens[1] - 1} (the draft model's limit); shorten it, or lower --max" in message


def test_a_prompt_crosses_a_position_or_does_not(tokenizer):
    """If the prompt does not reach the position, but its output or its last draft does."""
    question = sd.Question("word " * 20, 1)
    tokens = len(chat_of(tokenizer).encode(question).ids)
    for position, crosses in ((tokens - 1, False), (tokens, True), (tokens + 21, True), (tokens + 22, False)):
        error = chat_of(tokenizer, switches=((9, "other"), (position, "m"))).encode(question).error
        assert bool(error) is crosses


def test_ids_that_the_model_lacks_are_refused(tokenizer):
    ids = chat_of(tokenizer).encode(sd.Question("What does zip do?", 1)).ids
    assert chat_of(tokenizer, vocabulary=max(ids) + 1).encode(sd.Question("What does zip do?", 1)).ids == ids
    error = chat_of(tokenizer, vocabulary=max(ids)).encode(sd.Question("What does zip do?", 1)).error
    assert error == "it has no tokens, or some that the main model lacks"


# Conversations


def asked(tokenizer, questions, answers):
    """The ids of a conversation, by hand."""
    text = "<bos>"
    for question, answer in zip(questions, [*answers, None], strict=True):
        text += f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"
        if answer is not None:
            text += f"{answer}<end_of_turn>\n"
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_turns_go_on_from_the_answers(tokenizer):
    chat, turns = chat_of(tokenizer, {}), ["What is zip?", "And re?", "Why?"]
    question = chat.encode(sd.parse_question({"turns": turns, "question_id": 81, "category": "c"}, 1))
    said = ["It joins.", "It is a module."]
    for number, text in enumerate(said, 1):
        answer = tokenizer(text + "<end_of_turn>", add_special_tokens=False)["input_ids"]
        assert chat.decode(answer) == chat.decode(tuple(answer)) == text
        question = chat.follow_up(question, answer)
        assert question.ids == asked(tokenizer, turns[: number + 1], said[:number]) and question.error is None
        assert (question.text, question.later) == (turns[number], tuple(turns[number + 1 :]))
        assert question.label == f"81.{number + 1}" and question.category == "c" and question.end_ids == {1}
    assert chat.follow_up(question, answer) is None
    assert chat.follow_up(sd.Question("a", 1), None) is None


@pytest.mark.parametrize("template_args", [{}, None], ids=["template", "none"])
def test_no_turn_is_longer_than_the_room_that_is_made_for_it(tokenizer, template_args):
    """After answers of full length, whose text is as many tokens again; only the first has come to its end."""
    chat = chat_of(tokenizer, template_args)
    question = chat.encode(sd.parse_question({"turns": ["a", "What is zip?", "b", "c"]}, 1))
    longest = question.longest
    for text, end in (("the" + " list" * 18, "<end_of_turn>"), ("the" + " list" * 19, ""), ("the" + " list" * 19, "")):
        answer = tokenizer(text + end, add_special_tokens=False)["input_ids"]
        question = chat.follow_up(question, answer)
        assert len(answer) == 20 == question.max_new_tokens and question.error is None
        assert question.earlier[-1] == {"role": "assistant", "content": text}
    assert question.turn == 4 and longest - 3 * 8 <= len(question.ids) <= longest


def test_a_turn_that_cannot_be_asked_has_an_error(tokenizer):
    chat = chat_of(tokenizer, {}, limited_by="draft")
    first = chat.encode(sd.Question("What is zip?", 1, 1, later=("word " * 1000, "Why?")))
    assert first.error is None
    unanswered = chat.follow_up(first, None)
    assert unanswered.error == "turn 1 has no answer to go on from" and unanswered.ids == () and unanswered.turn == 2
    second = chat.follow_up(first, first.ids[:5])
    assert second.turn == 2 and second.error == (
        "with 22 tokens for output and draft, it exceeds the context of 1024 (the draft model's limit)"
        "; shorten it, or lower --max-new-tokens or --draft-tokens"
    )
    third = chat.follow_up(second, None)
    assert (third.turn, third.text, third.error) == (3, "Why?", "turn 2 has no answer to go on from")
    assert chat.follow_up(third, None) is None
    template = "{{ messages[-1].content }}{% if messages | length > 1 %}{{ raise_exception('too many') }}{% endif %}"
    failed = chat_of(with_template(template), {}).follow_up(first, first.ids[:5])
    assert failed.error.startswith("cannot put it into the chat template: too many; ") and failed.ids == ()


def test_ids_that_json_cannot_hold_become_text(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"question_id": 1e999, "prompt": "a"}\n{"question_id": {"a": 1}, "prompt": "b"}\n{"prompt": "c"}\n'
    )
    assert [question.question_id for question in sd.read_questions(str(path))] == ["inf", "{'a': 1}", None]


def test_turns_are_what_the_user_says(tmp_path):
    path = tmp_path / "p.jsonl"
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path.write_text(json.dumps({"turns": said}))
    (question,) = sd.read_questions(str(path))
    assert (question.text, question.later, question.earlier) == ("a", ("c",), ())

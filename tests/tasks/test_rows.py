"""Rows in the forms people have: pairs and conversations, told apart by their columns."""

import json
import random

import pytest
from datasets import Dataset

from sparselet.errors import TaskError
from sparselet.tasks.rows import Message, Row
from sparselet.tasks.task import Task, load_task

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "ant?"},
    {"role": "assistant", "content": "tna"},
    {"role": "user", "content": "bee?"},
    {"role": "assistant", "content": "eeb"},
]
MESSAGES = tuple(Message(**message) for message in CHAT)
WHOLE = Row(MESSAGES[:4], "eeb")


@pytest.fixture(params=["jsonl", "parquet"])
def load(request, tmp_path):
    """The rows of a task that holds these fields."""

    def loaded(*rows, **columns):
        if request.param == "jsonl":
            (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            Dataset.from_list(list(rows)).to_parquet(tmp_path / "train.parquet")
        return load_task(tmp_path, ("train",), columns).rows("train")

    return loaded


FORMS = {
    "pair": ({"prompt": "ant?", "completion": "tna"}, Row("ant?", "tna")),
    "ours before theirs": ({"prompt": "x", "completion": "x", "input": "ant?", "target": "tna"}, Row("ant?", "tna")),
    "messages": ({"messages": CHAT}, WHOLE),
    "a prompt beside messages": ({"prompt": "ant?", "messages": CHAT}, WHOLE),
    "prompt and completion as messages": ({"prompt": CHAT[:4], "completion": CHAT[4:]}, Row(MESSAGES[:4], "eeb", 4)),
    "several turns in the completion": ({"prompt": CHAT[:2], "completion": CHAT[2:]}, Row(MESSAGES[:4], "eeb", 2)),
    "messages and a text": ({"prompt": CHAT[:2], "completion": "tna"}, Row(MESSAGES[:2], "tna", 2)),
    "a question after the answer": ({"messages": [*CHAT, CHAT[1]]}, WHOLE),
    "conversations": (
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]} for m in CHAT
            ]
        },
        WHOLE,
    ),
    "parts": ({"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]}, WHOLE),
    "nulls that a table fills in": ({"messages": [{**m, "tool_calls": None, "name": None} for m in CHAT]}, WHOLE),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_told_by_the_columns(load, form):
    fields, expected = FORMS[form]
    assert load({**fields, "id": 7}) == (expected,)


def test_columns_that_are_named_win(load):
    fields = {"input": "x", "target": "x", "messages": CHAT, "question": "ant?", "answer": "tna"}
    assert load(fields, input="question", target="answer") == (Row("ant?", "tna"),)
    assert load({"chat": CHAT, "input": "x"}, input="chat") == (WHOLE,)
    assert load({"q": CHAT[:2], "a": CHAT[2:3]}, input="q", target="a") == (Row(MESSAGES[:2], "tna", 2),)


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


QUESTION, ANSWER = ("user", "ant?"), ("assistant", "tna")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": "text"}, "'messages' is text, expected a list of messages"),
        ({"messages": []}, "'messages' is empty, expected a list of messages"),
        ({"messages": None, "x": 1}, "'messages' is null, expected a list of messages"),
        ({"messages": ["hi"]}, "'messages', message 1 is text, expected an object"),
        (chat(QUESTION), "no message of the assistant's"),
        (chat(ANSWER), "the first message is the assistant's"),
        (chat(ANSWER, QUESTION, ANSWER), "the first message is the assistant's"),
        (chat(QUESTION, ("assistant", " ")), "message 2: content is empty"),
        (chat(("user", ""), ANSWER), "message 1: content is empty"),
        (chat(QUESTION, ("assistant", None)), "message 2: content is null, expected text"),
        (chat(QUESTION, ("bot", "tna")), "message 2: role is bot, expected one of system, developer, user, assistant, tool"),
        (chat((None, "x"), ANSWER), "message 1: role is null"),
        ({"prompt": [CHAT[1]], "completion": [CHAT[1]]}, "no message of the assistant's"),
        ({"prompt": CHAT[:3], "completion": CHAT[4:]}, "the prompt ends with the assistant's message"),
        ({"prompt": CHAT[:2], "completion": ""}, "content is empty"),
        ({"prompt": "a"}, "no field 'completion'; the row has prompt. Rows have input and target or"),
        ({"text": "a"}, "no field 'input'; the row has text. Rows have input and target or"),
    ],
)
def test_a_row_that_is_none_is_named_with_what_was_expected(load, fields, message):
    with pytest.raises(TaskError, match=rf"train\.(jsonl|parquet).*{message}"):
        load(fields)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"content": "tna", "tool_calls": [{"x": 1}]}, "message 2 has 'tool_calls', which is not read"),
        ({"content": "tna", "thinking": "hm"}, "message 2 has 'thinking'"),
        ({"content": "tna", "weight": 0}, "message 2 has 'weight'"),
        ({"content": [{"type": "image", "url": "x"}]}, "message 2: content has a part that is not text"),
        ({"content": {"text": "tna"}}, "message 2: content is an object, expected text"),
        ({"content": "caf\ud83d"}, r"message 2: content holds half of a surrogate pair, \\ud83d, at character 4"),
    ],
)
def test_what_would_change_the_meaning_of_a_message_is_refused(tmp_path, message, error):
    row = {"messages": [CHAT[1], {"role": "assistant", **message}]}
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps(row))
    with pytest.raises(TaskError, match=rf"train\.jsonl, line 2: 'messages', {error}"):
        load_task(tmp_path, ("train",))


def test_a_weight_of_one_is_what_all_messages_have(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": [{**message, "weight": 1} for message in CHAT]}))
    assert load_task(tmp_path, ("train",)).rows("train") == (WHOLE,)


def test_fingerprints_tell_conversations_apart():
    variants = [WHOLE, Row(MESSAGES[:4], "eeb", 4), Row(MESSAGES[1:4], "eeb"), Row(MESSAGES[:4], "x"), Row("ant?", "eeb")]
    variants.append(Row((*MESSAGES[:3], Message("system", "bee?")), "eeb"))
    assert len({Task("t", {"train": (row,)}).fingerprint() for row in variants}) == len(variants)


def test_forms_with_the_same_rows_are_the_same_task(tmp_path):
    numbers = random.Random(1)
    pairs = [(str(numbers.random()), str(i)) for i in range(9)]
    prints = set()
    for name, columns in (("ours", ("input", "target")), ("theirs", ("prompt", "completion"))):
        (tmp_path / name).mkdir()
        rows = (dict(zip(columns, pair, strict=True)) for pair in pairs)
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prints.add(load_task(tmp_path / name, ("train",)).fingerprint())
    assert len(prints) == 1

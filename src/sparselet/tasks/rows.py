"""The rows of a task: a prompt and the text to produce, or a conversation, by their columns."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparselet.errors import TaskError

INPUT, TARGET = "input", "target"
ASSISTANT = "assistant"
# Where a row has several of them, the first counts. A form of one column is a list of messages.
FORMS = ((INPUT, TARGET), ("prompt", "completion"), ("messages",), ("conversations",))

_ROLES = {"human": "user", "gpt": ASSISTANT}  # ShareGPT's names
_ACCEPTED_ROLES = ("system", "developer", "user", ASSISTANT, "tool")
# Fields of a message that change the prompt or the learned tokens, and are not read.
_REFUSED_FIELDS = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight")
_TYPE_NAMES = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
_MAX_FIELDS = 12  # names that a message lists


class _Twice:
    """What stands in a row for a field that occurs twice in its JSON object."""


TWICE = _Twice()


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Row:
    """One example: the prompt and the text to produce.

    input: a text, or the turns of a conversation before the answer. target: the text, or the assistant's last turn.
    first_learned: of a conversation, the assistant's turns from this one on are learned, and the last is measured.
    """

    input: str | tuple[Message, ...]
    target: str
    first_learned: int = 0

    def as_json(self) -> dict[str, Any]:
        """`input` and `target`, or `messages` (those before the answer) and `target`."""
        if isinstance(self.input, str):
            return {INPUT: self.input, TARGET: self.target}
        return {"messages": [vars(message) for message in self.input], TARGET: self.target}


def choose_columns(present: Collection[str], names: Mapping[str, str], where: str) -> tuple[str, ...]:
    """The columns that hold the rows: the two of `names` where these are not the defaults, else the first of FORMS.

    A column of `names` that holds conversations needs no second one. Raises TaskError, naming what is missing.
    """
    pair = (names[INPUT], names[TARGET])
    forms: Sequence[tuple[str, ...]] = FORMS
    if pair != FORMS[0]:
        forms = (pair, pair[:1]) if pair[1] == TARGET else (pair,)
    for form in forms:
        if all(column in present for column in form):
            return form
    partly = next((form for form in forms if any(column in present for column in form)), forms[0])
    missing = next(column for column in partly if column not in present)
    shown = ", ".join(map(_one_line, list(present)[:_MAX_FIELDS])) + (", …" if len(present) > _MAX_FIELDS else "")
    expected = "" if forms is not FORMS else f" Rows have {' or '.join(' and '.join(form) for form in FORMS)}."
    raise TaskError(f"{where}: no field {missing!r}; the row has {shown or 'none'}.{expected}")


def read_row(place: str, fields: Any, columns: tuple[str, ...]) -> Row:
    """A row from its columns. place: file and line, for messages. Raises TaskError for anything but text and messages."""
    values = [_field(place, fields, column) for column in columns]
    if len(columns) == 1:
        if isinstance(values[0], str):
            raise TaskError(
                f"{place}: {columns[0]!r} is text, expected a list of messages; text needs a second column, its answer."
            )
        return _conversation(place, _messages(place, columns[0], values[0]), 0)
    if not any(isinstance(value, list) for value in values):
        prompt, target = (_text(f"{place}: {column!r}", value) for column, value in zip(columns, values, strict=True))
        return Row(prompt, target)
    prompt, completion = (
        _messages(place, column, value if isinstance(value, list) else [{"role": role, "content": value}])
        for column, value, role in zip(columns, values, ("user", ASSISTANT), strict=True)
    )
    return _conversation(place, (*prompt, *completion), len(prompt))


def _field(place: str, fields: Any, column: str) -> Any:
    if not isinstance(fields, Mapping):
        raise TaskError(f"{place}: expected an object, got {_type_name(fields)}.")
    if column not in fields:
        raise TaskError(
            f"{place}: no field {column!r}; the row has {', '.join(map(_one_line, [*fields][:_MAX_FIELDS])) or 'none'}."
        )
    return fields[column]


def _conversation(place: str, messages: tuple[Message, ...], first_learned: int) -> Row:
    """The row of a conversation. Turns after the assistant's last are left out: no answer depends on them."""
    answers = [i for i, message in enumerate(messages) if message.role == ASSISTANT and i >= first_learned]
    if not answers:
        raise TaskError(f"{place}: no message of the assistant's, so there is nothing to learn.")
    if answers[0] == 0:
        raise TaskError(f"{place}: the first message is the assistant's; a conversation begins with what it answers.")
    if first_learned and messages[first_learned - 1].role == ASSISTANT:
        raise TaskError(
            f"{place}: the prompt ends with the assistant's message, which is not read as a beginning of the answer."
        )
    last = answers[-1]
    return Row(messages[:last], messages[last].content, first_learned)


def _messages(place: str, column: str, value: Any) -> tuple[Message, ...]:
    """Messages of `role` and `content` (or `from` and `value`); content is text, or a list of parts that are text."""
    if not isinstance(value, list) or not value:
        raise TaskError(f"{place}: {column!r} is {'empty' if value == [] else _type_name(value)}, expected a list of messages.")
    messages = []
    for number, fields in enumerate(value, 1):
        where = f"{place}: {column!r}, message {number}"
        if not isinstance(fields, Mapping):
            raise TaskError(f"{where} is {_type_name(fields)}, expected an object with role and content.")
        for field in _REFUSED_FIELDS:
            if fields.get(field) not in (None, [], {}, "") and (field, fields[field]) != ("weight", 1):
                raise TaskError(f"{where} has {field!r}, which is not read. Remove it, or leave the row out.")
        role, content = (fields.get(key, fields.get(other)) for key, other in (("role", "from"), ("content", "value")))
        role = _ROLES.get(role, role) if isinstance(role, str) else role
        if role not in _ACCEPTED_ROLES:
            shown = _one_line(role) if isinstance(role, str) else _type_name(role)
            raise TaskError(f"{where}: role is {shown}, expected one of {', '.join(_ACCEPTED_ROLES)}.")
        content = _joined(where, content) if isinstance(content, list) else content
        messages.append(Message(role, _text(f"{where}: content", content, role in ("user", ASSISTANT))))
    return tuple(messages)


def _joined(where: str, parts: Sequence[Any]) -> str:
    """The text of a message in parts, `[{"type": "text", "text": ...}]`."""
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise TaskError(f"{where}: content has a part that is not text; only text is read.")
    return "".join(part["text"] for part in parts)


def _text(what: str, value: Any, filled: bool = True) -> str:
    """A text that tokenizers take and that is not blank, where it must be `filled`. Raises TaskError."""
    if not isinstance(value, str):
        raise TaskError(f"{what} {'occurs twice' if value is TWICE else f'is {_type_name(value)}'}, expected text.")
    if filled and not value.strip():
        raise TaskError(f"{what} is empty.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TaskError(
            f"{what} holds half of a surrogate pair, {ascii(value[error.start])[1:-1]}, at character {error.start + 1}: text "
            "that was cut within an emoji or the like."
        ) from error
    return value


def _type_name(value: Any) -> str:
    """The JSON type of a value, for messages."""
    if value is None:
        return "null"
    return "there twice" if value is TWICE else _TYPE_NAMES.get(type(value), type(value).__name__)


def _one_line(name: str) -> str:
    """A name from a file in a message: on one line, no longer than it need be."""
    return repr(str(name))[1:-1][:60]

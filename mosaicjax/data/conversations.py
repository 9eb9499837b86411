"""Rows of fine-tuning sets as conversations: turns of a role and a content each, whoever wrote them down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from mosaicjax.data.sources import checked_text
from mosaicjax.errors import InputError

Message = dict[str, Any]
"""`role` and `content`; of an instruction with a context also those two, apart."""

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}


class Format(Enum):
    """How rows are written down."""

    AUTO = "auto"
    """Whatever a row's fields say."""
    PROMPT = "prompt"
    """`prompt` and `response` (or `completion`): Mosaic's, and OpenAI's earlier ones."""
    INSTRUCTION = "instruction"
    """`instruction`, `context` or `input` (may lack or be empty), `response` or `output`: Dolly, Alpaca."""
    MESSAGES = "messages"
    """`messages` of `role` and `content`: OpenAI's."""
    SHAREGPT = "sharegpt"
    """`conversations` of `from` and `value`."""


FIELDS = {
    Format.PROMPT: (("prompt",), ("response", "completion")),
    Format.INSTRUCTION: (("instruction",), ("context", "input"), ("response", "output")),
    Format.MESSAGES: (("messages",),),
    Format.SHAREGPT: (("conversations",),),
}
"""What each format's rows hold, under one of several names."""
ALL_FIELDS = tuple(name for groups in FIELDS.values() for names in groups for name in names)


def messages_of(row: Mapping[str, Any], format_: Format, place: str) -> list[Message]:
    """The turns of a row.

    Raises: InputError naming the row: a field that lacks, an unknown role, an empty response, or none.
    """
    if format_ is Format.AUTO:
        format_ = _told_by(row, place)
    messages = _READERS[format_](row, place)
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{place} has no response", expected="a turn of the assistant")
    for number, message in enumerate(messages):
        empty = not (message["content"] or "").strip() and not message.get("tool_calls")
        if message["role"] == "assistant" and empty:
            where = place if len(messages) == 2 else f"{place}, turn {number}"
            raise InputError(f"{where} has an empty response", expected="a text", fix="leave the row out")
    return messages


def _told_by(row: Mapping[str, Any], place: str) -> Format:
    for format_, (first, *_) in reversed(FIELDS.items()):
        if first[0] in row:
            return format_
    raise InputError(
        f"{place} is of no known format",
        expected="a field messages, conversations, instruction or prompt",
        got=", ".join(sorted(map(str, row))) or "no field",
    )


def _text(row: Mapping[str, Any], names: tuple[str, ...], place: str) -> str:
    for name in names:
        if name in row:
            return checked_text(row[name], f"{place}, field {name!r}")
    raise InputError(
        f"{place} lacks {' or '.join(map(repr, names))}", got=", ".join(sorted(map(str, row))) or "no field"
    )


def _prompt(row: Mapping[str, Any], place: str) -> list[Message]:
    prompt, response = FIELDS[Format.PROMPT]
    return [
        {"role": "user", "content": _text(row, prompt, place)},
        {"role": "assistant", "content": _text(row, response, place)},
    ]


def _instruction(row: Mapping[str, Any], place: str) -> list[Message]:
    instruction, context, response = FIELDS[Format.INSTRUCTION]
    asked = _text(row, instruction, place)
    told = _text(row, context, place) if any(row.get(name) for name in context) else ""
    user = {"role": "user", "content": f"{asked}\n\n{told}" if told else asked}
    if told:
        user |= {"instruction": asked, "context": told}
    return [user, {"role": "assistant", "content": _text(row, response, place)}]


def _turns(row: Mapping[str, Any], name: str, place: str) -> list[Mapping[str, Any]]:
    turns = row.get(name)
    if turns is None:
        raise InputError(f"{place} lacks {name!r}", got=", ".join(sorted(map(str, row))) or "no field")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError(f"{place}, field {name!r}", expected="a list of turns", got=type(turns).__name__)
    return turns


def _messages(row: Mapping[str, Any], place: str) -> list[Message]:
    found = []
    for number, turn in enumerate(_turns(row, "messages", place)):
        where = f"{place}, turn {number}"
        role = turn.get("role")
        if role not in ROLES:
            raise InputError(f"{where} has an unknown role", expected=" or ".join(ROLES), got=role)
        content = turn.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
                raise InputError(f"{where}, content", expected="text, or parts of the type text")
            content = "".join(_text(part, ("text",), where) for part in content)
        if content is not None or not turn.get("tool_calls"):
            content = checked_text(content, f"{where}, content")
        # Tables give fields that a turn lacks as nulls.
        found.append(
            {name: value for name, value in turn.items() if value is not None} | {"content": content}
        )
    return found


def _sharegpt(row: Mapping[str, Any], place: str) -> list[Message]:
    found = []
    for number, turn in enumerate(_turns(row, "conversations", place)):
        where = f"{place}, turn {number}"
        role = SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise InputError(
                f"{where} has an unknown role", expected=" or ".join(SHAREGPT_ROLES), got=turn.get("from")
            )
        found.append({"role": role, "content": _text(turn, ("value",), where)})
    return found


_READERS: dict[Format, Callable[[Mapping[str, Any], str], list[Message]]] = {
    Format.PROMPT: _prompt,
    Format.INSTRUCTION: _instruction,
    Format.MESSAGES: _messages,
    Format.SHAREGPT: _sharegpt,
}

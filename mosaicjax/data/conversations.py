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
    PREFERENCE = "preference"
    """`chosen` and `rejected`, two answers to a `prompt`: texts or lists of turns, TRL's; see `pair_of`."""


FIELDS = {
    Format.PROMPT: (("prompt",), ("response", "completion")),
    Format.INSTRUCTION: (("instruction",), ("context", "input"), ("response", "output")),
    Format.MESSAGES: (("messages",),),
    Format.SHAREGPT: (("conversations",),),
    Format.PREFERENCE: (("chosen",), ("rejected",), ("prompt",)),
}
"""What each format's rows hold, under one of several names."""
ALL_FIELDS = tuple(dict.fromkeys(name for groups in FIELDS.values() for names in groups for name in names))


def messages_of(row: Mapping[str, Any], format_: Format, place: str) -> list[Message]:
    """The turns of a row that is one conversation.

    Raises: InputError naming the row: a field that lacks, an unknown role, an empty response, or none.
    """
    if format_ is Format.AUTO:
        format_ = told_by(row, place)
    messages = _READERS[format_](row, place)
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{place} has no response", expected="a turn of the assistant")
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and _is_empty(message):
            where = place if len(messages) == 2 else f"{place}, turn {number}"
            raise InputError(f"{where} has an empty response", expected="a text", fix="leave the row out")
    return messages


def pair_of(row: Mapping[str, Any], place: str) -> tuple[list[Message], Message, Message]:
    """The turns that both answers of a preference row answer, the chosen answer and the rejected one.

    Answers are texts, or lists of turns. Lists that begin with another turn than the assistant's are whole
    conversations: the prompt is what turns they have in common, and a field `prompt` beside them must be
    among those.

    Raises: InputError naming the row: a field that lacks, an unknown role, an empty answer, a last turn that
        is not the assistant's, or answers of several turns.
    """
    given = _turns_of(row, "prompt", "user", place) if "prompt" in row else None
    chosen, rejected = (_turns_of(row, name, "assistant", place) for name in ("chosen", "rejected"))
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        where = f"{place}, field {name!r}"
        if not turns or turns[-1]["role"] != "assistant":
            said = turns[-1]["role"] if turns else "no turn"
            raise InputError(f"{where}, last turn", expected="the assistant's", got=said)
        if _is_empty(turns[-1]):
            raise InputError(f"{where} has an empty answer", expected="a text", fix="leave the row out")
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    prompt = chosen[:common]
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) > common + 1:
            raise InputError(
                f"{place}, field {name!r} goes on from what both have in common",
                expected="with one turn, the answer",
                got=f"{len(turns) - common} turns",
            )
    if chosen[0]["role"] != "assistant":
        heard = {(turn["role"], str(turn["content"]).strip()) for turn in prompt}
        if not heard.issuperset((turn["role"], str(turn["content"]).strip()) for turn in given or ()):
            raise InputError(
                f"{place}, field 'prompt' is none of the turns that chosen and rejected begin with",
                fix="answers alone in chosen and rejected, or no prompt",
            )
        return prompt, chosen[-1], rejected[-1]
    if given is None:
        raise InputError(f"{place} lacks 'prompt'", got=", ".join(sorted(map(str, row))))
    return given + prompt, chosen[-1], rejected[-1]


def _is_empty(message: Message) -> bool:
    return not (message["content"] or "").strip() and not message.get("tool_calls")


def _turns_of(row: Mapping[str, Any], name: str, role: str, place: str) -> list[Message]:
    """A field that is a list of turns, or a text as one turn of a role."""
    if isinstance(row.get(name), list):
        return _messages(row, place, name)
    return [{"role": role, "content": _text(row, (name,), place)}]


def told_by(row: Mapping[str, Any], place: str) -> Format:
    """The format that a row's fields say.

    Raises: InputError where they say none.
    """
    for format_, (first, *others) in reversed(FIELDS.items()):
        # Of pairs both answers: one of these names alone may stand beside any format's fields.
        needed = (first[0], others[0][0]) if format_ is Format.PREFERENCE else first
        if all(name in row for name in needed):
            return format_
    raise InputError(
        f"{place} is of no known format",
        expected="a field messages, conversations, instruction, prompt or chosen",
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


def _messages(row: Mapping[str, Any], place: str, field: str = "messages") -> list[Message]:
    found = []
    for number, turn in enumerate(_turns(row, field, place)):
        where = f"{place}, turn {number}" if field == "messages" else f"{place}, {field}, turn {number}"
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

"""Answers in OpenAI's shapes, whole and in pieces."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.serve.request import Finish, Piece, Told

Json = dict[str, Any]

LEAST_LOGPROB = -9999.0
"""What a token that cannot come is told to have: JSON has no infinity, and OpenAI says this."""

REASONS: dict[Finish, str] = {"separator": "stop", "stop": "stop", "length": "length"}


class Vocabulary:
    """Tokens as clients see them: their text, or their bytes where these are no whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = tokenizer.pieces
        self._special = {number: name for name, number in tokenizer.special.items()}
        self._special.setdefault(tokenizer.separator, tokenizer.separator_token)

    def text(self, token: int) -> str:
        """A token's text: unlike another's."""
        if token in self._special:
            return self._special[token]
        data = self._pieces[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def data(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a special one."""
        return self._pieces[token]


@dataclass
class Written:
    """A completion, as far as it has come."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, piece: Piece) -> None:
        """What has come."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.told += piece.told
        self.finish = piece.finish

    @property
    def piece(self) -> Piece:
        """All of it."""
        return Piece(self.text, tuple(self.tokens), tuple(self.told), self.finish)


def usage(prompt: int, written: int) -> Json:
    """How many tokens were read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class Shape(Protocol):
    """How completions are told, whole or in chunks; each answer has its own."""

    def whole(self, written: Sequence[Written], used: Json) -> Json:
        """The answer."""
        ...

    def begin(self, number: int) -> list[Json]:
        """Chunks before a completion's first piece."""
        ...

    def chunks(self, number: int, piece: Piece) -> list[Json]:
        """Chunks of a piece of a completion; none where there is nothing to see of it."""
        ...

    def used(self, used: Json) -> Json:
        """The chunk with what was used."""
        ...


class _Head:
    """What all chunks of an answer have in common."""

    def __init__(self, prefix: str, kind: str, model: str, *, with_usage: bool) -> None:
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        # In a stream that ends with what was used, every chunk has the field.
        self._rest: Json = {"usage": None} if with_usage else {}

    def chunk(self, choice: Json) -> Json:
        return {**self._head, "choices": [choice], **self._rest}

    def whole(self, choices: list[Json], used: Json) -> Json:
        return {**self._head, "choices": choices, "usage": used}


class TextAnswer:
    """`text_completion`: of `/v1/completions`; `echoes` are put before the completions."""

    def __init__(
        self,
        model: str,
        vocabulary: Vocabulary,
        *,
        logprobs: int | None,
        echoes: Sequence[str],
        with_usage: bool,
    ) -> None:
        self._head = _Head("cmpl", "text_completion", model, with_usage=with_usage)
        self._vocabulary, self._logprobs, self._echoes = vocabulary, logprobs, echoes
        self._offsets = [_Offsets() for _ in echoes]

    def whole(self, written: Sequence[Written], used: Json) -> Json:
        """See `Shape`."""
        choices = [self._choice(number, each.piece) for number, each in enumerate(written)]
        for choice, echo in zip(choices, self._echoes, strict=True):
            choice["text"] = echo + choice["text"]
        return self._head.whole(choices, used)

    def begin(self, number: int) -> list[Json]:
        """See `Shape`."""
        echo = self._echoes[number]
        return [self._head.chunk(self._choice(number, Piece(echo)))] if echo else []

    def chunks(self, number: int, piece: Piece) -> list[Json]:
        """See `Shape`."""
        if not piece.text and not piece.told and piece.finish is None:
            return []
        return [self._head.chunk(self._choice(number, piece))]

    def used(self, used: Json) -> Json:
        """See `Shape`."""
        return self._head.whole([], used)

    def _choice(self, number: int, piece: Piece) -> Json:
        return {
            "text": piece.text,
            "index": number,
            "logprobs": None if self._logprobs is None else self._told(number, piece),
            "finish_reason": None if piece.finish is None else REASONS[piece.finish],
        }

    def _told(self, number: int, piece: Piece) -> Json:
        text = self._vocabulary.text
        offsets = self._offsets[number]
        likeliest = []
        for token, told in zip(piece.tokens, piece.told, strict=True):
            # The token itself is told too, where it is none of the likeliest.
            both = dict(told.likeliest) | {token: told.logprob}
            likeliest.append({text(each): _finite(value) for each, value in both.items()})
        return {
            "tokens": [text(token) for token in piece.tokens],
            "token_logprobs": [_finite(told.logprob) for told in piece.told],
            "top_logprobs": likeliest if self._logprobs else None,
            "text_offset": [offsets.before(self._vocabulary.data(token)) for token in piece.tokens],
        }


class ChatAnswer:
    """`chat.completion`: of `/v1/chat/completions`."""

    def __init__(
        self, model: str, vocabulary: Vocabulary, *, logprobs: int | None, stream: bool, with_usage: bool
    ) -> None:
        kind = "chat.completion.chunk" if stream else "chat.completion"
        self._head = _Head("chatcmpl", kind, model, with_usage=with_usage)
        self._vocabulary, self._logprobs = vocabulary, logprobs

    def whole(self, written: Sequence[Written], used: Json) -> Json:
        """See `Shape`."""
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": each.text, "refusal": None},
                "logprobs": self._told(each.piece),
                "finish_reason": None if each.finish is None else REASONS[each.finish],
            }
            for number, each in enumerate(written)
        ]
        return self._head.whole(choices, used)

    def begin(self, number: int) -> list[Json]:
        """See `Shape`."""
        return [self._chunk(number, {"role": "assistant", "content": ""})]

    def chunks(self, number: int, piece: Piece) -> list[Json]:
        """See `Shape`."""
        made = []
        if piece.text or piece.told:
            made.append(self._chunk(number, {"content": piece.text}, told=self._told(piece)))
        if piece.finish is not None:
            made.append(self._chunk(number, {}, reason=REASONS[piece.finish]))
        return made

    def used(self, used: Json) -> Json:
        """See `Shape`."""
        return self._head.whole([], used)

    def _chunk(
        self, number: int, delta: Json, *, told: Json | None = None, reason: str | None = None
    ) -> Json:
        return self._head.chunk({"index": number, "delta": delta, "logprobs": told, "finish_reason": reason})

    def _told(self, piece: Piece) -> Json | None:
        if self._logprobs is None:
            return None
        content = [
            self._token(token, told.logprob)
            | {"top_logprobs": [self._token(*likely) for likely in told.likeliest]}
            for token, told in zip(piece.tokens, piece.told, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        data = self._vocabulary.data(token)
        return {
            "token": self._vocabulary.text(token),
            "logprob": _finite(logprob),
            "bytes": list(data) or None,
        }


class _Offsets:
    """Where in a text its tokens begin, in whole characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def before(self, data: bytes) -> int:
        """How many characters stood before these bytes, which come next."""
        at = self._characters
        self._characters += len(self._decoder.decode(data))
        return at


def _finite(value: float) -> float:
    return max(value, LEAST_LOGPROB)

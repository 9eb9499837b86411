"""One request to an OpenAI-compatible server, streamed, with the times at which its text came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mosaicjax.bench_serve.asks import Ask
from mosaicjax.bench_serve.http import FAILURES, Reply, Server, events, request
from mosaicjax.errors import InputError

Api = Literal["completions", "chat"]
PATHS: Mapping[Api, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
OK = 200


@dataclass(frozen=True)
class Target:
    """Which server is asked, for which model, by which of OpenAI's two interfaces.

    `extra` are fields of every request beside ours; a request is given up after `timeout_seconds`.
    """

    server: Server
    model: str
    api: Api = "completions"
    key: str = ""
    temperature: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout_seconds: float = 600.0

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return headers(self.key)

    def body(self, ask: Ask) -> dict[str, Any]:
        """A request's body.

        Raises:
            InputError: a conversation, or token ids, where the interface takes none.
        """
        prompt = ask.prompt
        messages = not isinstance(prompt, str) and isinstance(prompt[0], Mapping)
        given: dict[str, Any]
        if self.api == "chat":
            if not messages and not isinstance(prompt, str):
                raise InputError("--api chat", expected="prompts of text or messages", got="token ids")
            given = {"messages": prompt if messages else [{"role": "user", "content": prompt}]}
        else:
            if messages:
                raise InputError("--api completions", expected="prompts of text or token ids", got="messages")
            given = {"prompt": prompt}
        return {
            "model": self.model,
            **given,
            "max_tokens": ask.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


def headers(key: str) -> dict[str, str]:
    """What says that a body is JSON, and whose request it is."""
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    `status` is HTTP's, 0 where none came; `failure` says in a few words why there is no whole answer, and is
    empty where there is one. `times` are when pieces of its text came. Tokens are as the server counted them,
    -1 where it did not.

    Units: `sent`, `ended` and `times` are seconds of one clock.
    """

    status: int
    sent: float
    ended: float
    times: tuple[float, ...] = ()
    text: str = ""
    prompt_tokens: int = -1
    tokens: int = -1
    failure: str = ""

    @property
    def whole(self) -> bool:
        """Whether it was answered to its end."""
        return not self.failure


class _Heard:
    """What has come of an answer so far."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.status = 0
        self.times: list[float] = []
        self.texts: list[str] = []
        self.finished = self.ended_well = False
        self.usage: Mapping[str, Any] = {}

    async def take(self, reply: Reply) -> str:
        """Listen to its end; what is wrong with it, or nothing."""
        self.status = reply.status
        if reply.status != OK:
            return _message(await reply.whole()) or f"status {reply.status}"
        async for data in events(reply):
            if data == "[DONE]":
                self.ended_well = True
                continue
            try:
                event = json.loads(data)
            except json.JSONDecodeError:
                return "an event that is no JSON"
            if not isinstance(event, Mapping) or event.get("error"):
                return _message(data.encode()) or "an event of an unknown kind"
            self._event(event)
        return "" if self.finished or self.ended_well else "the stream ended early"

    def _event(self, event: Mapping[str, Any]) -> None:
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices") or []:
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            self.finished = self.finished or choice.get("finish_reason") is not None
            if text:
                self.times.append(self.clock())
                self.texts.append(text)


async def ask_one(target: Target, ask: Ask, clock: Callable[[], float]) -> Answer:
    """Ask, and listen to the end of the answer; what goes wrong is part of it."""
    body = json.dumps(target.body(ask)).encode()
    heard, sent = _Heard(clock), clock()
    try:
        async with (
            asyncio.timeout(target.timeout_seconds),
            request(target.server, "POST", PATHS[target.api], target.headers, body) as reply,
        ):
            failure = await heard.take(reply)
    except TimeoutError:
        failure = f"no end within {target.timeout_seconds:g} s"
    except FAILURES as error:
        failure = "no connection" if not heard.status else f"broken off: {error or type(error).__name__}"
    return Answer(
        heard.status,
        sent,
        clock(),
        tuple(heard.times),
        "".join(heard.texts),
        int(heard.usage.get("prompt_tokens", -1)),
        int(heard.usage.get("completion_tokens", -1)),
        failure,
    )


async def find_model(server: Server, key: str, timeout_seconds: float = 30.0) -> str:
    """The first model that a server says it has.

    Raises:
        InputError: it does not answer, refuses, or names none.
    """
    try:
        async with (
            asyncio.timeout(timeout_seconds),
            request(server, "GET", "/v1/models", headers(key)) as reply,
        ):
            content = await reply.whole()
    except FAILURES as error:
        reason = "nothing" if isinstance(error, TimeoutError) else error or type(error).__name__
        fix = "`mosaicjax serve MODEL` there, or another URL"
        raise InputError(f"{server} does not answer", got=reason, fix=fix) from error
    if reply.status != OK:
        raise InputError(
            f"{server}/v1/models refuses", got=f"{reply.status} {_message(content)}".strip(), fix="--key FILE"
        )
    try:
        return str(json.loads(content)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{server}/v1/models names no model", fix="--model NAME") from error


def _message(content: bytes) -> str:
    """What an error's body says, in OpenAI's shape or FastAPI's; "" where it is neither."""
    try:
        said = json.loads(content)
    except ValueError:
        return ""
    error = said.get("error", said.get("detail")) if isinstance(said, Mapping) else None
    message = error.get("message") if isinstance(error, Mapping) else error
    return " ".join(str(message).split())[:200] if message else ""

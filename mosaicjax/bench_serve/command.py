"""`mosaicjax bench-serve`: a load, its figures on the screen, and the same as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mosaicjax import storage
from mosaicjax.bench_serve.asks import Ask, Range, Synthetic, read
from mosaicjax.bench_serve.client import Api, Target, find_model
from mosaicjax.bench_serve.http import Server
from mosaicjax.bench_serve.load import Clients, Poisson, send
from mosaicjax.bench_serve.results import lines, summarize
from mosaicjax.errors import InputError


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; see `mosaicjax bench-serve --help`."""

    url: str
    prompts: str = ""
    prompt_length: str = "128"
    max_tokens: str = "64"
    vocabulary: int = 0
    requests: int = 64
    clients: int = 8
    rate: float = 0.0
    api: Api = "completions"
    model: str = ""
    key: str = ""
    temperature: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    timeout_seconds: float = 600.0
    json: str = ""

    def check(self) -> None:
        """Refuse what means nothing.

        Raises:
            InputError: with the option, expected and got.
        """
        for name, count in (("--requests", self.requests), ("--clients", self.clients)):
            if count < 1:
                raise InputError(name, expected="1 or more", got=count)
        for name, number in (("--rate", self.rate), ("--vocabulary", self.vocabulary)):
            if not 0 <= number < float("inf"):
                raise InputError(name, expected="0 or more", got=number)
        if not self.timeout_seconds > 0:
            raise InputError("--timeout", expected="above 0", got=self.timeout_seconds)
        if not self.key.isascii() or not self.key.isprintable():
            raise InputError("the key", expected="printable ASCII characters")

    @property
    def arrivals(self) -> Clients | Poisson:
        """How requests come."""
        return Poisson(self.rate, self.seed) if self.rate else Clients(self.clients)

    def asks(self) -> list[Ask]:
        """What is asked.

        Raises:
            InputError: lengths that are none, or a file that cannot be read.
        """
        most = Range.parse("--max-tokens", self.max_tokens)
        if self.prompts:
            return read(self.prompts, self.requests, most, self.seed)
        length = Range.parse("--prompt-length", self.prompt_length)
        return Synthetic(length, most, self.vocabulary).draw(self.requests, self.seed)


def bench_serve(wanted: Wanted, say: Callable[[str], None]) -> int:
    """Send the load and say what it came to; the exit code.

    Raises:
        InputError: a setting that means nothing, a server that does not answer, or no answer at all.
    """
    wanted.check()
    server, asks = Server.parse(wanted.url), wanted.asks()
    found = asyncio.run(_measure(wanted, server, asks))
    say(f"{found['url']}, {found['model']}: {found['arrivals']}, {wanted.api}")
    for line in lines(found):
        say(line)
    if wanted.json:
        storage.write_text(wanted.json, json.dumps(found, indent=1) + "\n")
    if not found["answered"]:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in found["errors"].items())
        raise InputError(f"{server} answered none of {len(asks)} requests", got=kinds)
    return 0


async def _measure(wanted: Wanted, server: Server, asks: list[Ask]) -> dict[str, Any]:
    model = wanted.model or await find_model(server, wanted.key)
    target = Target(
        server, model, wanted.api, wanted.key, wanted.temperature, wanted.extra, wanted.timeout_seconds
    )
    answers = await send(target, asks, wanted.arrivals)
    return {
        "url": str(server),
        "model": model,
        "api": wanted.api,
        "arrivals": str(wanted.arrivals),
        "prompts": wanted.prompts or f"synthetic, {wanted.prompt_length} long",
        "max_tokens": wanted.max_tokens,
        "seed": wanted.seed,
        **summarize(answers),
    }

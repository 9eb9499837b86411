"""As much of an HTTP client as measuring takes: a connection a request, the answer as it comes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from mosaicjax.errors import InputError

PORTS = {"http": 80, "https": 443}
LINE_BYTES = 2**20
"""No line of an answer is longer; the logprobs of a token with their text are some kilobytes."""

HEX = set(b"0123456789abcdefABCDEF")

FAILURES = (OSError, EOFError)
"""What says that a connection cannot be made, breaks or takes too long."""


class Broken(EOFError):
    """An answer that is no HTTP, or ends before it is whole."""


@dataclass(frozen=True)
class Server:
    """Where a server is; `base` is what its paths begin with."""

    secure: bool
    host: str
    port: int
    base: str = ""

    @classmethod
    def parse(cls, url: str) -> Server:
        """From an address, with or without the `/v1` that OpenAI's paths begin with.

        Raises:
            InputError: it is none.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in PORTS or not parts.hostname or parts.query or parts.fragment:
            raise InputError("URL", expected="as http://127.0.0.1:8000", got=url or "nothing")
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.scheme == "https", parts.hostname, port or PORTS[parts.scheme], base)

    @property
    def authority(self) -> str:
        """Host and port, as a request names them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"http{'s' * self.secure}://{self.authority}{self.base}"


class Reply:
    """An answer: its status and headers (names in small letters) are there, its body comes."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
        self.status, self.headers = status, headers
        self._reader = reader

    async def body(self) -> AsyncIterator[bytes]:
        """Its parts as they come.

        Raises:
            Broken: it ends too early, or its chunks are none.
        """
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := await self._chunk_size():
                yield await _exactly(self._reader, size)
                await _line(self._reader)
            return
        length = self.headers.get("content-length")
        if length is not None:
            left = int(length) if length.isdecimal() else -1
            if left < 0:
                raise Broken(f"a Content-Length of {length!r}")
            while left:
                part = await self._reader.read(min(left, LINE_BYTES))
                if not part:
                    raise Broken("the connection was closed in mid-answer")
                left -= len(part)
                yield part
            return
        while part := await self._reader.read(LINE_BYTES):
            yield part

    async def whole(self) -> bytes:
        """All of it."""
        return b"".join([part async for part in self.body()])

    async def _chunk_size(self) -> int:
        text = (await _line(self._reader)).split(b";")[0].strip()
        if not text or not set(text) <= HEX:
            raise Broken(f"a chunk of {text[:20]!r} bytes")
        return int(text, 16)


@asynccontextmanager
async def request(
    server: Server, method: str, path: str, headers: Mapping[str, str], body: bytes = b""
) -> AsyncIterator[Reply]:
    """Ask, and give the answer once its headers are there; the connection is closed behind the block.

    Raises:
        OSError: there is no connection, or it breaks.
        Broken: what comes is no HTTP.
    """
    context = ssl.create_default_context() if server.secure else None
    reader, writer = await asyncio.open_connection(server.host, server.port, ssl=context, limit=LINE_BYTES)
    try:
        lines = [
            f"{method} {server.base}{path} HTTP/1.1",
            f"Host: {server.authority}",
            "Connection: close",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        await writer.drain()
        yield await _reply(reader)
    finally:
        writer.close()


async def _reply(reader: asyncio.StreamReader) -> Reply:
    while True:
        words = (await _line(reader)).split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise Broken("what answers does not speak HTTP/1.1")
        headers: dict[str, str] = {}
        while line := (await _line(reader)).decode("latin-1"):
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        # Those of the hundreds announce the answer proper.
        if int(words[1]) >= 200:
            return Reply(int(words[1]), headers, reader)


async def events(reply: Reply) -> AsyncIterator[str]:
    """The data of an answer's server-sent events, as they come.

    Source: the HTML standard, "Server-sent events"; lines may end in LF or CRLF.
    """
    left, data = b"", list[str]()
    async for part in reply.body():
        *lines, left = (left + part).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
            elif not line and data:
                yield "\n".join(data)
                data = []


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return (await reader.readuntil(b"\n")).rstrip(b"\r\n")
    except asyncio.IncompleteReadError as error:
        raise Broken("the connection was closed in mid-answer") from error
    except asyncio.LimitOverrunError as error:
        raise Broken(f"a line of more than {LINE_BYTES} bytes") from error


async def _exactly(reader: asyncio.StreamReader, size: int) -> bytes:
    try:
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError as error:
        raise Broken("the connection was closed in mid-answer") from error

"""Serving over HTTP: uvicorn, with time-outs for clients that are slow, and an end that lets answers end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mosaicjax.errors import InputError
from mosaicjax.serve.app import make_app
from mosaicjax.serve.driver import State
from mosaicjax.serve.limits import Limits
from mosaicjax.serve.service import Service

KEEP_SECONDS = 30
"""A connection without requests is kept so long."""

BACKLOG = 2_048


def bind(host: str, port: int) -> socket.socket:
    """A socket of an address, which nobody can connect to until it is served; port 0 is any that is free.

    Raises:
        InputError: no such address here, or somebody else has it.
    """
    if not 0 <= port < 2**16:
        raise InputError("--port", expected="0 to 65535", got=port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with contextlib.ExitStack() as stack:
            made = stack.enter_context(socket.socket(family, kind, protocol))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            stack.pop_all()
    except OSError as error:
        raise InputError(f"cannot serve {host}:{port}", got=error, fix="another --host or --port") from error
    return made


class _Config(uvicorn.Config):
    """uvicorn's, with our limits."""

    limits = Limits()


class _Connection(HttpToolsProtocol):
    """A connection that is broken off where its client sends its request's head, or reads, too slowly."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        assert isinstance(self.config, _Config)
        self._limits = self.config.limits
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait("head", self._limits.read_seconds)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait("head", self._limits.read_seconds)

    def on_headers_complete(self) -> None:
        self._done("head")
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait("reader", self._limits.write_seconds)

    def resume_writing(self) -> None:
        self._done("reader")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        for what in ("head", "reader"):
            self._done(what)
        super().connection_lost(exc)

    def _wait(self, what: str, seconds: float) -> None:
        self._done(what)
        self._timers[what] = self.loop.call_later(seconds, self.transport.abort)

    def _done(self, what: str) -> None:
        timer = self._timers.pop(what, None)
        if timer is not None:
            timer.cancel()


class Server(uvicorn.Server):
    """A service at a socket; `drain` ends it."""

    def __init__(self, service: Service) -> None:
        config = _Config(
            make_app(service),
            http=_Connection,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_SECONDS,
            timeout_graceful_shutdown=service.limits.write_seconds,
        )
        config.limits = service.limits
        super().__init__(config)
        self.service = service
        service.in_flight.when_empty = self._end

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """None: `drain` is what signals call."""
        yield

    def drain(self) -> None:
        """Take no more requests, and end once all answers have; asked again, end at once."""
        if self.service.in_flight.draining:
            self.should_exit = self.force_exit = True
            for connection in list(self.server_state.connections):
                if isinstance(connection, _Connection):
                    connection.transport.abort()
        else:
            self.service.in_flight.drain()

    async def run_at(self, sock: socket.socket, ready: Callable[[], None]) -> None:
        """Serve until `drain`; `ready` is called once requests are taken."""
        driver = self.service.driver
        driver.start()
        telling = asyncio.create_task(self._tell(ready))
        try:
            await self.serve(sockets=[sock])
        finally:
            telling.cancel()
            await asyncio.to_thread(driver.stop)

    async def _tell(self, ready: Callable[[], None]) -> None:
        await self.service.driver.settled.wait()
        if self.service.driver.state is State.READY:
            ready()

    def _end(self) -> None:
        self.should_exit = True


def serve(service: Service, sock: socket.socket, say: Callable[[str], None]) -> None:
    """Serve in this process until SIGTERM or Ctrl-C: then answers end, and a second one ends at once."""
    host, port = sock.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    server = Server(service)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _ending, server, say)
        say(f"compiling; {address}/ready tells when requests are taken")
        await server.run_at(sock, lambda: say(f"serving {service.name} at {address}/v1"))

    asyncio.run(run())
    say("stopped")


def _ending(server: Server, say: Callable[[str], None]) -> None:
    if not server.service.in_flight.draining:
        say("stopping: answers under way end first")
    server.drain()

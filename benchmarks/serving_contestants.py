"""Who `serving.py` measures: servers over HTTP, and Transformers' `generate` in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from mosaicjax.bench_serve.asks import Ask
from mosaicjax.bench_serve.client import Answer, Target, find_model
from mosaicjax.bench_serve.http import FAILURES, Server, request
from mosaicjax.bench_serve.load import Clients, send

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 600


class Unavailable(Exception):
    """A peer that cannot take part; its message says why."""


class Contestant(Protocol):
    """One that answers asks."""

    def run(self, asks: Sequence[Ask], clients: int) -> list[Answer]:
        """All of them, by so many clients that each ask again once answered."""
        ...

    def close(self) -> None:
        """End its process."""
        ...


def environment(threads: int) -> dict[str, str]:
    """This process's environment for a contestant with so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **offline}
    return os.environ | settings | {name: str(threads) for name in names}


class Process:
    """A process, and the end of what it says on stderr."""

    def __init__(self, command: Sequence[str], threads: int, folder: Path, **pipes: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._errors = folder / "errors"
        with self._errors.open("wb") as errors:
            self.running = subprocess.Popen(
                list(command), cwd=ROOT, env=environment(threads), stderr=errors, **pipes
            )

    def said(self) -> str:
        """The last line that it wrote."""
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing said"

    def check(self) -> None:
        """Raises Unavailable where it has ended."""
        if self.running.poll() is not None:
            raise Unavailable(f"ended with {self.running.returncode}: {self.said()}")

    def resident(self) -> int:
        """The largest resident set so far, in bytes."""
        for line in Path(f"/proc/{self.running.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0

    def close(self) -> None:
        self.running.send_signal(signal.SIGTERM)
        try:
            self.running.wait(30)
        except subprocess.TimeoutExpired:
            self.running.kill()
            self.running.wait()


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Serving:
    """An OpenAI-compatible server as a process; `ready` is the path that answers 200 once it serves."""

    def __init__(
        self, command: Sequence[str], port: int, ready: str, threads: int, folder: Path, **fields: Any
    ) -> None:
        self.server = Server(False, "127.0.0.1", port)
        self.process = Process(command, threads, folder, stdout=subprocess.DEVNULL)
        self._fields = fields
        try:
            self._wait(ready)
        except BaseException:
            self.process.close()
            raise

    def _wait(self, path: str) -> None:
        until = time.monotonic() + START_SECONDS
        while not asyncio.run(self._answers(path)):
            self.process.check()
            if time.monotonic() > until:
                raise Unavailable(f"not ready after {START_SECONDS} s: {self.process.said()}")
            time.sleep(0.2)

    async def _answers(self, path: str) -> bool:
        try:
            async with asyncio.timeout(10), request(self.server, "GET", path, {}) as reply:
                await reply.whole()
                return reply.status == 200
        except FAILURES:
            return False

    def run(self, asks: Sequence[Ask], clients: int) -> list[Answer]:
        """See `Contestant.run`."""

        async def all_of_them() -> list[Answer]:
            fields = {"model": await find_model(self.server, "")} | self._fields
            return await send(Target(self.server, **fields), asks, Clients(clients))

        return asyncio.run(all_of_them())

    def close(self) -> None:
        """See `Contestant.close`."""
        self.process.close()


class Generate:
    """Transformers' `generate`; `batch` prompts a call, or with 0 all at once."""

    def __init__(self, model: str, attention: str, folder: Path) -> None:
        script = str(ROOT / "benchmarks" / "peers" / "transformers_generate.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = Process(
            [sys.executable, script, model, attention], os.cpu_count() or 1, folder, **pipes
        )
        self._tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
        self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.running.stdout.readline()
        if not line:
            self.process.running.wait()
            self.process.check()
        found: dict[str, Any] = json.loads(line)
        return found

    def work(self, asks: Sequence[Ask], batch: int, threads: int) -> dict[str, Any]:
        """What the script answers."""
        (most,) = {ask.max_tokens for ask in asks}
        job = {
            "prompts": [ask.prompt for ask in asks],
            "max_tokens": most,
            "batch": batch,
            "threads": threads,
        }
        print(json.dumps(job), file=self.process.running.stdin, flush=True)
        found = self._read()
        found["texts"] = [self._tokenizer.decode(each, skip_special_tokens=False) for each in found["tokens"]]
        return found

    def close(self) -> None:
        """See `Contestant.close`."""
        self.process.close()


class OneAtATime:
    """`generate` behind a queue: clients wait until those before them are answered."""

    def __init__(self, generate: Generate, threads: int) -> None:
        self._generate, self._threads = generate, threads

    def run(self, asks: Sequence[Ask], clients: int) -> list[Answer]:
        """See `Contestant.run`."""
        found = self._generate.work(asks, 1, self._threads)
        calls = found["calls"]
        # A client asks again once its last is answered; at first all ask at once.
        sent = [calls[n - clients]["ended"] if n >= clients else 0.0 for n in range(len(calls))]
        return [_answer(*each) for each in zip(asks, sent, calls, found["texts"], strict=True)]

    def close(self) -> None:
        """See `Contestant.close`."""


class Batched:
    """`generate` with as many prompts a call as there are clients, or with all at once."""

    def __init__(self, generate: Generate, threads: int, whole: bool) -> None:
        self._generate, self._threads, self._whole = generate, threads, whole

    def run(self, asks: Sequence[Ask], clients: int) -> list[Answer]:
        """See `Contestant.run`."""
        size = len(asks) if self._whole else clients
        found = self._generate.work(asks, size, self._threads)
        calls = [found["calls"][number // size] for number in range(len(asks))]
        return [
            _answer(ask, call["began"], call, text)
            for ask, call, text in zip(asks, calls, found["texts"], strict=True)
        ]

    def close(self) -> None:
        """See `Contestant.close`."""


def _answer(ask: Ask, sent: float, call: dict[str, Any], text: str) -> Answer:
    times = tuple(call["times"])
    return Answer(200, sent, call["ended"], times, text, len(ask.prompt), len(times))

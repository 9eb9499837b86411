"""An hour's worth of mixed load on `mosaicjax serve`, in as many minutes as SOAK_MINUTES says."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mosaicjax.bench_serve.http import FAILURES, Server, events, request
from tests import jobs

MINUTES = float(os.environ.get("SOAK_MINUTES", "10"))
PER_SECOND = 12
KEY = "of-the-soak-test"
ROWS, IN_FLIGHT, LONGEST = 8, 40, 256
PATIENCE = 120
WORDS = "river stone größe light seven walks under the a of quiet market and runs blue".split()
FIGURE = re.compile(r"^mosaicjax_(\w+) ([\d.e+-]+)$", re.MULTILINE)
MOST_GROWTH = 48 * 2**20


class Serve:
    """`mosaicjax serve` as a process; its log is in a file."""

    def __init__(self, run, folder):
        host, port = jobs.free_address().split(":")
        self.server, self.log = Server(False, host, int(port)), folder / "log"
        (folder / "keys").write_text(f"{KEY}\n")
        sizes = ("--rows", ROWS, "--pages", 32, "--longest", LONGEST, "--chunk", 32)
        limits = ("--in-flight", IN_FLIGHT, "--in-flight-per-key", IN_FLIGHT, "--write-seconds", 5)
        command = ("serve", run, "--port", port, "--keys", folder / "keys", *sizes, *limits)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mosaicjax.cli", *map(str, command)],
                env=jobs.environment(1),
                stdout=log,
                stderr=log,
            )

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.process.kill()
        self.process.wait()

    def said(self):
        return self.log.read_text(errors="replace")

    def resident(self):
        """Bytes that the process holds now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) * 1024

    async def ready(self):
        end = time.monotonic() + PATIENCE
        while not await self.answers():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.1)
            assert self.process.poll() is None and time.monotonic() < end, self.said()

    async def answers(self):
        try:
            async with request(self.server, "GET", "/ready", {}) as reply:
                return reply.status == 200
        except FAILURES:
            return False

    async def figures(self):
        async with request(self.server, "GET", "/metrics", headers()) as reply:
            text = (await reply.whole()).decode()
            assert reply.status == 200, text
            return {name: float(value) for name, value in FIGURE.findall(text)}


def headers(key=KEY, kind="application/json"):
    return {"Authorization": f"Bearer {key}", "Content-Type": kind}


def drawn_asks(rng, count):
    """Requests whose answer depends on nothing but themselves: greedy, or drawn with a seed."""
    asks = []
    for number in range(count):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
        ask = {"prompt": prompt, "max_tokens": rng.randint(1, 60), "temperature": 0}
        if number % 4 == 0:
            ask |= {"temperature": 0.9, "top_p": 0.9, "seed": rng.randrange(2**32)}
        if number % 5 == 0:
            ask |= {"repetition_penalty": 1.2, "logprobs": rng.randint(0, 5)}
        if number % 7 == 0:
            ask |= {"stop": [rng.choice(WORDS)]}
        asks.append(ask)
    return asks


class Load:
    """Requests of all kinds; `counts` says how many of each were answered how."""

    def __init__(self, serve, rng):
        self.serve, self.rng, self.counts = serve, rng, Counter()
        self.asks, self.alone = drawn_asks(rng, 60), []
        self.answered, self.over = asyncio.Condition(), False
        self.crowd = asyncio.Lock()

    async def ask(self, ask, stream):
        """The status of a request, and its text and end."""
        body = json.dumps(ask | {"stream": stream}).encode()
        async with request(self.serve.server, "POST", "/v1/completions", headers(), body) as reply:
            if reply.status == 429:
                assert reply.headers["retry-after"].isdecimal() and await reply.whole()
                return 429, None
            if not stream:
                whole = await reply.whole()
                assert reply.status == 200, whole
                (choice,) = json.loads(whole)["choices"]
                return 200, (choice["text"], choice["finish_reason"])
            assert reply.status == 200, await reply.whole()
            heard = [event async for event in events(reply)]
        assert heard[-1] == "[DONE]"
        choices = [choice for event in heard[:-1] for choice in json.loads(event)["choices"]]
        text = "".join(choice["text"] for choice in choices)
        return 200, (text, choices[-1]["finish_reason"])

    async def plain(self):
        """Most are like this: the answer is the one that it has alone."""
        number = self.rng.randrange(len(self.asks))
        status, found = await self.ask(self.asks[number], stream=self.rng.random() < 0.7)
        self.counts[f"plain {status}"] += 1
        if status == 200:
            assert found == self.alone[number], (self.asks[number], found, self.alone[number])

    async def leaves(self):
        """A client that goes away in mid-answer, or before it."""
        ask = self.rng.choice(self.asks) | {"max_tokens": 120, "stream": self.rng.random() < 0.8}
        body = json.dumps(ask).encode()
        wanted = self.rng.randint(0, 6)
        if not ask["stream"]:
            reader, writer = await self.connected()
            writer.write(self.head("POST", len(body)) + body[: self.rng.randint(0, len(body))])
            await writer.drain()
            writer.close()
        else:
            async with request(self.serve.server, "POST", "/v1/completions", headers(), body) as reply:
                async for _ in events(reply):
                    wanted -= 1
                    if wanted < 0:
                        break
        self.counts["left"] += 1

    async def too_long(self):
        """A prompt that does not fit."""
        words = self.rng.choices(WORDS, k=self.rng.randint(LONGEST, 4_000))
        await self.refused({400}, json.dumps({"prompt": " ".join(words), "max_tokens": 5}).encode())

    async def too_large(self):
        """A body beyond the limit."""
        await self.refused({413}, b'{"prompt": "' + b"a" * 2**21 + b'"}')

    async def garbage(self):
        """Bodies that mean nothing."""
        bodies = [
            self.rng.randbytes(self.rng.randint(1, 2_000)),
            b"",
            b"{",
            b"[" * 5_000,
            b"null",
            b'{"prompt": {"a": 1}}',
            b'{"prompt": "a", "max_tokens": -1}',
            b'{"prompt": "a", "max_tokens": 1e999}',
            b'{"prompt": "a", "temperature": NaN}',
            b'{"prompt": [99999999]}',
            b'{"prompt": "a", "nobody_knows": 1}',
            b'{"prompt": "\\ud800", "max_tokens": 99999999999999999999}',
        ]
        await self.refused({400}, self.rng.choice(bodies))

    async def no_http(self):
        """Bytes that are no request."""
        reader, writer = await self.connected()
        writer.write(self.rng.randbytes(300) + b"\r\n\r\n")
        await writer.drain()
        await reader.read(2**16)
        writer.close()
        self.counts["no http"] += 1

    async def wrong_key(self):
        await self.refused({401}, b'{"prompt": "a"}', key=f"wrong-{self.rng.random()}")

    async def refused(self, statuses, body, key=KEY):
        try:
            async with request(self.serve.server, "POST", "/v1/completions", headers(key), body) as reply:
                said = json.loads(await reply.whole())
                assert reply.status in statuses | {429}, (reply.status, said)
                assert said["error"]["message"]
                self.counts[f"refused {reply.status}"] += 1
        except FAILURES:
            # The answer to a body that is too large may come, and the connection go, before it is all sent.
            assert 413 in statuses
            self.counts["refused 413"] += 1

    async def slow(self):
        """A client that reads nothing while others are answered: it gets its answer whole, or is cut off."""
        ask = {"prompt": "the", "max_tokens": 100, "temperature": 0, "logprobs": 20, "n": 4, "stream": True}
        body = json.dumps(ask | {"ignore_eos": True}).encode()
        reader, writer = await self.connected(limit=2_048)
        writer.write(self.head("POST", len(body)) + body)
        await writer.drain()
        await self.others(self.rng.randint(5, 60))
        try:
            whole = (await asyncio.wait_for(reader.read(-1), PATIENCE)).decode()
        except ConnectionResetError:
            whole = ""
        writer.close()
        done = "data: [DONE]" in whole
        self.counts["slow 200" if done else "slow 429" if " 429 " in whole[:20] else "slow, cut off"] += 1

    async def others(self, count):
        """Wait until so many more have been answered."""
        async with self.answered:
            goal = self.counts.total() + count
            enough = self.answered.wait_for(lambda: self.over or self.counts.total() >= goal)
            await asyncio.wait_for(enough, PATIENCE)

    async def overload(self):
        """More at once than there may be: refusals come while those that found a place are still written."""
        ended = []

        async def one(number):
            ask = {"prompt": f"{number} the", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
            status, _ = await self.ask(ask, stream=True)
            ended.append(status)

        async with self.crowd, asyncio.TaskGroup() as group:
            for number in range(IN_FLIGHT + 20):
                group.create_task(one(number))
        taken = ended.count(200)
        assert taken <= IN_FLIGHT and ended == sorted(ended, reverse=True), ended
        self.counts["overload 200"] += taken
        self.counts["overload 429"] += ended.count(429)

    async def connected(self, limit=2**16):
        return await asyncio.open_connection(self.serve.server.host, self.serve.server.port, limit=limit)

    def head(self, method, length):
        lines = [f"{method} /v1/completions HTTP/1.1", f"Host: {self.serve.server.authority}"]
        lines += [f"{name}: {value}" for name, value in headers().items()]
        return "\r\n".join([*lines, f"Content-Length: {length}", "Connection: close", "", ""]).encode()

    async def run(self, minutes):
        """Poisson arrivals of all kinds, however many are under way; what the server held meanwhile."""
        kinds = {
            self.plain: 60,
            self.leaves: 12,
            self.garbage: 8,
            self.too_long: 5,
            self.wrong_key: 5,
            self.slow: 2,
            self.no_http: 2,
            self.too_large: 1,
            self.overload: 0.2,
        }
        resident, begin = [], time.monotonic()

        async def arrival(kind):
            await kind()
            async with self.answered:
                self.answered.notify_all()

        async with asyncio.TaskGroup() as group:
            while (past := time.monotonic() - begin) < 60 * minutes or not resident:
                (kind,) = self.rng.choices(list(kinds), list(kinds.values()))
                group.create_task(arrival(kind))
                resident.append((past / (60 * minutes), self.serve.resident()))
                await asyncio.sleep(self.rng.expovariate(PER_SECOND))
            async with self.answered:
                # No more come for whom slow readers could wait.
                self.over = True
                self.answered.notify_all()
        return resident

    async def all_of_it(self):
        await self.serve.ready()
        for ask in self.asks:
            self.alone.append((await self.ask(ask, stream=False))[1])
        # Whoever asked before it was ready was told so, by a 503.
        before = (await self.serve.figures())["faults_total"]
        await self.overload()
        resident = await self.run(MINUTES)
        # Those that left are found out within a turn or two.
        end = time.monotonic() + PATIENCE
        while (figures := await self.serve.figures())["in_flight"] or figures["rows_used"]:
            assert time.monotonic() < end, figures
        return resident, figures | {"faults_total": figures["faults_total"] - before}


@pytest.mark.soak
def test_mixed_load_leaves_no_trace(tiny_run, tmp_path):
    seed = int(os.environ.get("SOAK_SEED", str(random.randrange(10**6))))
    print(f"SOAK_SEED={seed}")

    async def soak(serve):
        load = Load(serve, random.Random(seed))
        return load, *await load.all_of_it()

    with Serve(tiny_run, tmp_path) as serve:
        load, resident, figures = asyncio.run(soak(serve))
        print(dict(sorted(load.counts.items())), figures, f"{resident[-1][1] / 2**20:.0f} MiB")
        assert serve.process.poll() is None
        serve.process.send_signal(signal.SIGTERM)
        assert serve.process.wait(PATIENCE) == 0, serve.said()
    # Nothing is held for anybody, and all that was begun has ended.
    assert figures["cache_pages_used"] == figures["queue"] == figures["faults_total"] == 0, figures
    assert figures["completions_total"] == figures["completions_finished_total"] > len(load.asks)
    assert load.counts["plain 200"] > load.counts["plain 429"] and load.counts["overload 429"] > 0
    assert figures["put_back_total"] > 0, "pages were never scarce"
    # Flat: what it holds in the second half it held in the first.
    first, second = (
        max((held for past, held in resident if (past < 0.5) == early), default=0) for early in (True, False)
    )
    assert second - first < MOST_GROWTH, (first, second)

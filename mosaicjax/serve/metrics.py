"""Figures of a server in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from mosaicjax.serve.driver import Driver
from mosaicjax.serve.limits import InFlight

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds to the first token, up to which they are counted together."""
WINDOW_SECONDS = 60
"""Over so long tokens a second are counted."""


class Histogram:
    """Counts of values up to each of some bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """As Prometheus reads it."""
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Recent:
    """How much came in the last seconds, a second at a time."""

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._bins: deque[tuple[int, int]] = deque()

    def add(self, count: int, now: float) -> None:
        """So much came now."""
        second = int(now)
        if self._bins and self._bins[-1][0] == second:
            count += self._bins.pop()[1]
        self._bins.append((second, count))
        self._forget(second)

    def total(self, now: float) -> int:
        """How much it was."""
        self._forget(int(now))
        return sum(count for _, count in self._bins)

    def _forget(self, second: int) -> None:
        while self._bins and self._bins[0][0] <= second - self._seconds:
            self._bins.popleft()


class Metrics:
    """What a server has done and does now; of the event loop's thread alone.

    `usd_per_hour` is what its chips cost together; None where nobody knows.
    """

    def __init__(
        self,
        driver: Driver,
        in_flight: InFlight,
        usd_per_hour: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._driver, self._in_flight, self._usd_per_hour = driver, in_flight, usd_per_hour
        self.clock = clock
        self._began = clock()
        self._first = Histogram(BOUNDS)
        self._recent = Recent(WINDOW_SECONDS)
        self.answered = dict.fromkeys(("2xx", "4xx", "5xx"), 0)
        self.gone = 0

    def tokens(self, count: int) -> None:
        """So many tokens were written."""
        self._recent.add(count, self.clock())

    def first_token(self, arrived: float) -> None:
        """The first token of a request that arrived then."""
        self._first.observe(self.clock() - arrived)

    def response(self, status: int) -> None:
        """A request was answered."""
        kind = f"{status // 100}xx"
        self.answered[kind] = self.answered.get(kind, 0) + 1

    def text(self) -> str:
        """All figures."""
        lines: list[str] = []
        for name, kind, text, value in self._figures():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
        name = "mosaicjax_time_to_first_token_seconds"
        lines += [f"# HELP {name} From a request's arrival to its first token.", f"# TYPE {name} histogram"]
        lines += self._first.lines(name)
        return "\n".join([*lines, ""])

    def _figures(self) -> Iterator[tuple[str, str, str, float]]:
        engine, counts = self._driver.engine, self._driver.engine.counts
        now = self.clock()
        seconds = max(now - self._began, 1e-9)
        rate = self._recent.total(now) / min(seconds, WINDOW_SECONDS)
        gauges = {
            "queue": ("Completions that wait for a row.", self._driver.waiting),
            "rows_used": ("Completions that are read or written now.", engine.running),
            "rows": ("Rows of the batch.", engine.sizes.rows),
            "in_flight": ("Completions that have come and not ended.", self._in_flight.total),
            "cache_pages_used": ("Pages that completions hold.", engine.pages.held),
            "cache_pages_kept": (
                "Pages that nobody holds, kept for their known beginnings.",
                engine.pages.kept,
            ),
            "cache_pages": ("Pages of the cache.", engine.sizes.pages),
            "tokens_per_second": (f"Tokens written, over the last {WINDOW_SECONDS} s.", rate),
            "uptime_seconds": ("Since the server began.", seconds),
        }
        totals = {
            "completions": ("Completions that the engine has taken.", counts.requests),
            "completions_finished": ("Those that have ended.", counts.finished),
            "prompt_tokens": ("Tokens of their prompts.", counts.prompt_tokens),
            "shared_prompt_tokens": ("Those of them that were in the cache.", counts.shared_tokens),
            "tokens": ("Tokens written.", counts.written_tokens),
            "put_back": ("Times that a completion had to wait again for pages.", counts.put_back),
            "answers": ("Requests answered well.", self.answered["2xx"]),
            "refusals": ("Requests refused, 4xx.", self.answered["4xx"]),
            "faults": ("Requests answered 5xx.", self.answered["5xx"]),
            "clients_gone": ("Clients that left before their answer's end.", self.gone),
        }
        for name, (text, value) in gauges.items():
            yield f"mosaicjax_{name}", "gauge", text, value
        for name, (text, value) in totals.items():
            yield f"mosaicjax_{name}_total", "counter", text, value
        if self._usd_per_hour is not None:
            usd = self._usd_per_hour * seconds / 3600
            yield "mosaicjax_usd_total", "counter", "What the chips have cost since the server began.", usd
            if counts.written_tokens:
                each = usd / counts.written_tokens * 1e6
                text = "Dollars for a million tokens written, idle time and prompts paid by them too."
                yield "mosaicjax_usd_per_million_tokens", "gauge", text, each

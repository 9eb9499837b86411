"""The one line that tells, while a run goes on, how far it is, how fast, and what it has cost."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

REDRAW_SECONDS = 0.2
"""How long a line stands on a terminal before it is drawn anew: short steps must not wait for it."""


@dataclass(frozen=True)
class Mfu:
    """Model FLOPs utilization, from 0 to 1, under both conventions of counting attention.

    `causal` counts the half of the scores that a causal mask keeps; `full` counts all of them, as the
    published figures of other frameworks do.
    """

    causal: float
    full: float


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `mfu` is None where a chip's peak, `cost_usd` where its price is unknown."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    mfu: Mfu | None
    cost_usd: float | None


def format_progress(progress: Progress) -> str:
    """The line for one moment of a run."""
    parts = [
        f"step {progress.step:,}/{progress.steps:,}",
        f"loss {progress.loss:.4f}",
        f"{format_count(progress.tokens_per_second)} tokens/s",
    ]
    if progress.mfu is not None:
        parts.append(f"MFU {progress.mfu.causal:.1%} causal, {progress.mfu.full:.1%} full")
    if progress.cost_usd is not None:
        parts.append(format_usd(progress.cost_usd))
    parts.append(f"{format_duration(progress.seconds_left)} left")
    return " | ".join(parts)


def format_count(value: float) -> str:
    """Three significant digits with k, M, B or T: `12.3k`, `2.50B`."""
    if not math.isfinite(value):
        return str(value)
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, "")):
        # Half a unit of the third digit below, so that 999,600 reads 1.00M and not 1000k.
        if abs(value) >= size * 0.9995:
            scaled = value / size
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{letter}"
    return f"{value:.3g}"


def format_usd(value: float) -> str:
    """Dollars with cents, or with three significant digits below ten cents."""
    return f"${value:,.2f}" if value >= 0.1 or value == 0 else f"${value:.3g}"


def format_duration(seconds: float) -> str:
    """The two largest units: `45 s`, `3 min 20 s`, `2 h 05 min`, `3 d 04 h`."""
    if not math.isfinite(seconds):
        return "unknown time"
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02d} h"
    if hours:
        return f"{hours} h {m:02d} min"
    if minutes:
        return f"{minutes} min {s:02d} s"
    return f"{whole} s"


class LiveLine:
    """Shows progress on a stream: one line drawn over itself on a terminal, else a plain line now and then.

    `clock` gives seconds that never run back (`time.monotonic`); off a terminal a line appears at most every
    `plain_seconds`. The first and the last step always show.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float], *, plain_seconds: float = 30.0) -> None:
        self._stream = stream
        self._clock = clock
        self._terminal = stream.isatty()
        self._wait = REDRAW_SECONDS if self._terminal else plain_seconds
        self._shown_at = -math.inf
        self._drawn = False

    def show(self, progress: Progress) -> None:
        """Show progress, unless the last time was only a moment ago."""
        now = self._clock()
        if now - self._shown_at < self._wait and progress.step < progress.steps:
            return
        self._shown_at = now
        line = format_progress(progress)
        if self._terminal:
            # A line that wraps could not be drawn over.
            line = line[: shutil.get_terminal_size().columns - 1]
            self._stream.write(f"\r{line}\x1b[K")
            self._drawn = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        self._stream.write(f"\r\x1b[K{text}\n" if self._drawn else f"{text}\n")
        self._drawn = False
        self._stream.flush()

    def end(self) -> None:
        """Leave the last line standing and go below it."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
        self._drawn = False

"""Where the time of a run goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from mosaicjax.report.summary import Seconds


class Clocks:
    """Seconds by part, earlier processes included; `total` runs from when this process was started."""

    def __init__(self, before: dict[str, float], started: float) -> None:
        self._seconds = {
            **dict.fromkeys(("total", "compile", "evaluate", "save", "data_wait", "train"), 0.0),
            **before,
        }
        self._started = started

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the block's time to a part."""
        began = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - began

    def add(self, part: str, seconds: float) -> None:
        """Count seconds to a part."""
        self._seconds[part] += seconds

    def forget(self, before: dict[str, float]) -> None:
        """Count steps as they were counted before; their time stays in the total."""
        self._seconds["train"] = before.get("train", 0.0)

    def seconds(self) -> Seconds:
        """All parts as of now."""
        return Seconds(**{**self._seconds, "total": self._seconds["total"] + time.time() - self._started})

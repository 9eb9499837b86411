"""One request's completions: what they are told, in the order in which it comes, whoever ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from mosaicjax.serve.driver import Driver, Job
from mosaicjax.serve.metrics import Metrics
from mosaicjax.serve.problems import Gone, Problem, fault
from mosaicjax.serve.request import Piece, Wishes

Receive = Callable[[], Awaitable[Mapping[str, Any]]]


class Exchange:
    """Completions from when the engine gets them to the end of the `with`, which cancels those not ended.

    They end by themselves, by the client going away, or after `seconds`.
    """

    def __init__(
        self,
        driver: Driver,
        metrics: Metrics,
        asked: Sequence[tuple[Sequence[int], Wishes]],
        receive: Receive,
        *,
        arrived: float,
        seconds: float,
    ) -> None:
        self._driver, self._metrics, self._receive = driver, metrics, receive
        self._arrived, self._seconds = arrived, seconds
        self._queue: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()
        self._jobs = {
            i: Job(prompt, wishes, i, partial(self._hear, i)) for i, (prompt, wishes) in enumerate(asked)
        }
        self._silent = set(self._jobs)
        self._over: Exception | None = None

    def __enter__(self) -> Self:
        """Hand them to the engine.

        Raises:
            Problem: 503, it takes none.
        """
        self._driver.submit(list(self._jobs.values()))
        loop = asyncio.get_running_loop()
        late = Problem(504, f"not done within {self._seconds:g} s", code="timeout", kind="timeout")
        self._timer = loop.call_later(self._seconds, self._queue.put_nowait, late)
        self._watch = loop.create_task(self._see_it_go())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._watch.cancel()
        self._driver.cancel(list(self._jobs.values()))

    @property
    def ended(self) -> bool:
        """Whether all completions have ended."""
        return not self._jobs

    async def news(self) -> list[tuple[int, Piece]]:
        """What has come since the last time, one piece at least, each with its completion's number.

        Raises:
            Gone: the client went away.
            Problem: 504, it takes too long, or 500, something broke.
        """
        if self._over is not None:
            raise self._over
        come = [await self._queue.get()]
        while not self._queue.empty():
            come.append(self._queue.get_nowait())
        pieces = []
        for each in come:
            if isinstance(each, Exception):
                self._over = each
                break
            number, piece = each
            if piece.finish is not None:
                del self._jobs[number]
            pieces.append((number, piece))
        if self._over is not None and not pieces:
            raise self._over
        return pieces

    def _hear(self, number: int, piece: Piece | None) -> None:
        if piece is None:
            self._queue.put_nowait(fault("the engine has failed"))
            return
        if piece.finish == "broken":
            self._queue.put_nowait(fault("the model's logits are not finite"))
            return
        if piece.tokens:
            self._metrics.tokens(len(piece.tokens))
            if number in self._silent:
                self._silent.remove(number)
                self._metrics.first_token(self._arrived)
        self._queue.put_nowait((number, piece))

    async def _see_it_go(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(Gone())

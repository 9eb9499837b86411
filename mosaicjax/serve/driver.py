"""The engine's thread: requests come to it from an event loop, and what they are told goes back there."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

from mosaicjax.serve.engine import Engine, Request
from mosaicjax.serve.problems import unready
from mosaicjax.serve.request import Piece, Wishes

STALLED_SECONDS = 120.0
"""A turn that takes longer is one that does not end."""


class State(Enum):
    """Where the engine's thread stands."""

    WARMING = "warming up"
    READY = "ready"
    FAILED = "broken"
    STOPPED = "stopped"


@dataclass(eq=False)
class Job:
    """A completion to write; `hear` is called in the event loop, with None where the engine failed.

    `request` is the engine's thread's own, and None until the engine has taken it.
    """

    prompt: Sequence[int]
    wishes: Wishes
    choice: int
    hear: Callable[[Piece | None], None]
    request: Request | None = None
    cancelled: bool = False


class Driver:
    """Runs an engine in a thread, turn after turn; the thread sleeps while there is nothing to do."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.state = State.WARMING
        self.settled = asyncio.Event()
        """Set in the loop once the engine is ready, or has failed."""
        self._clock = clock
        self._changed = threading.Condition()
        self._come: list[Job] = []
        self._gone: list[Job] = []
        self._live: set[Job] = set()
        self._news: list[tuple[Job, Piece]] = []
        self._turn_began: float | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Completions that have no row yet."""
        return len(self._come) + self.engine.waiting

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread is there and goes on."""
        began = self._turn_began
        going = began is None or self._clock() - began < STALLED_SECONDS
        return self.state in (State.WARMING, State.READY) and self._thread.is_alive() and going

    def start(self) -> None:
        """Begin with the warm-up; the running event loop is the one that hears."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand jobs over that the engine's `check` has passed; all are taken, or none.

        Raises:
            Problem: 503, the engine is not ready.
        """
        with self._changed:
            self.check_ready()
            self._come += jobs
            self._changed.notify()

    def check_ready(self) -> None:
        """Refuse, unless the engine takes requests.

        Raises:
            Problem: 503.
        """
        if self.state is not State.READY:
            raise unready(f"the engine is {self.state.value}", self.state.name.lower())

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs before the next turn; nobody needs to hear of them any more."""
        if jobs:
            with self._changed:
                for job in jobs:
                    job.cancelled = True
                self._gone += jobs
                self._changed.notify()

    def stop(self) -> None:
        """End the thread after the turn that it is in, and wait for that."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self.engine.warm_up()
            self._become(State.READY)
            while self._gather():
                self.engine.turn()
                self._deliver()
            self._become(State.STOPPED)
        except Exception as error:
            # Whatever it is, those who wait must hear of it; the traceback is for whoever runs the server.
            traceback.print_exception(error)
            self._become(State.FAILED)
            self._deliver()
            self._tell([(job, None) for job in self._lost()])

    def _become(self, state: State) -> None:
        with self._changed:
            self.state = state
            self._turn_began = None
        if state is not State.STOPPED:
            self._loop.call_soon_threadsafe(self.settled.set)

    def _gather(self) -> bool:
        """Wait for something to do, and hand the engine what has come; whether to go on."""
        with self._changed:
            self._turn_began = None
            while not (self._stopping or self._come or self._gone or not self.engine.idle):
                self._changed.wait()
            if self._stopping:
                return False
            come, self._come = self._come, []
            gone, self._gone = self._gone, []
            self._live.update(job for job in come if not job.cancelled)
            self._turn_began = self._clock()
        for job in come:
            if not job.cancelled:
                job.request = self.engine.submit(job.prompt, job.wishes, partial(self._hear, job), job.choice)
        for job in gone:
            if job.request is not None:
                self.engine.cancel(job.request)
        return True

    def _hear(self, job: Job, piece: Piece) -> None:
        self._news.append((job, piece))
        if piece.finish is not None:
            self._live.discard(job)

    def _deliver(self) -> None:
        """What a turn brought, in one call: waking the loop takes longer than telling it more."""
        if self._news:
            news, self._news = self._news, []
            self._tell(news)

    def _tell(self, news: Sequence[tuple[Job, Piece | None]]) -> None:
        self._loop.call_soon_threadsafe(_tell_all, news)

    def _lost(self) -> list[Job]:
        """All that wait for the engine; none comes any more."""
        with self._changed:
            lost = [*self._live, *self._come]
            self._live, self._come = set(), []
        return lost


def _tell_all(news: Sequence[tuple[Job, Piece | None]]) -> None:
    for job, piece in news:
        job.hear(piece)

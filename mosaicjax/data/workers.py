"""Running the work of a build on this machine's cores, in processes that never outlive the build."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mosaicjax.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")
AHEAD = 2


class Engine(Protocol):
    """Who does the work of a build."""

    reads_sources: bool
    """Whether its tasks read the documents themselves, and get the names of sources instead of texts."""

    def run(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], most: int | None = None
    ) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result as they finish; `most` is how many tasks there are, if that is few.

        Raises: whatever `function` raises.
        """
        ...


@dataclass(frozen=True)
class Cores:
    """So many processes on this machine."""

    workers: int
    reads_sources = False

    def run(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], most: int | None = None
    ) -> Iterator[tuple[Task, Result]]:
        """See `Engine.run`, and `run_all`."""
        return run_all(function, tasks, self.workers if most is None else min(most, self.workers))


def available_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with its result as they finish, holding at most `AHEAD` tasks a worker in memory.

    One worker is this process itself. More are spawned, never forked: threads of JAX may be running.

    Raises: whatever `function` raises; InputError where a worker was killed.
    """
    if workers == 1:
        for task in tasks:
            yield task, function(task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    pending: dict[Future[Result], Task] = {}
    try:
        for task in tasks:
            pending[pool.submit(function, task)] = task
            if len(pending) >= AHEAD * workers:
                yield from _finished(pending)
        while pending:
            yield from _finished(pending)
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process was killed",
            got="most often by the system, for want of memory",
            fix="fewer --workers; the same command goes on where it stopped",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(pending: dict[Future[Result], Task]) -> Iterator[tuple[Task, Result]]:
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        yield pending.pop(future), future.result()


def _begin_worker() -> None:
    # Ctrl-C reaches the whole process group: the parent alone decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # one process a core already: threads of `tokenizers` within each would only contend
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)

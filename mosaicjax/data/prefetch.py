"""Reading ahead of the training loop, in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Prefetch(Generic[Result]):
    """Reads ahead in a thread: results of `read(start)`, `read(start + 1)`, ..., at most `ahead` at a time.

    What `read` raises is raised by the `get` of its step, and nothing is read after it. Use as a context
    manager, or call `close`.
    """

    def __init__(self, read: Callable[[int], Result], start: int, *, ahead: int = 2) -> None:
        assert ahead >= 1, ahead
        self._read = read
        self._next = start
        self._ahead = ahead
        self._ready: deque[tuple[Result | None, BaseException | None]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(start,), name="prefetch", daemon=True)
        self._thread.start()

    def get(self, step: int) -> Result:
        """Return the result of a step: the first is `start`, each later one the next, none twice.

        Raises: whatever `read` raised for this step.
        """
        assert step == self._next, f"expected step {self._next}, got {step}"
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed)
            assert not self._closed, "closed"
            result, error = self._ready[0]
            if error is not None:
                raise error
            self._ready.popleft()
            self._changed.notify_all()
        self._next += 1
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Stop reading and wait for the read under way; closing twice is allowed."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Prefetch[Result]:
        """Return itself."""
        return self

    def __exit__(self, *unused: Any) -> None:
        """Close."""
        self.close()

    def _run(self, step: int) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._ready) < self._ahead or self._closed)
                if self._closed:
                    return
            outcome: tuple[Result | None, BaseException | None]
            try:
                outcome = (self._read(step), None)
            except BaseException as error:  # handed to the thread that asks for this step
                outcome = (None, error)
            with self._changed:
                self._ready.append(outcome)
                self._changed.notify_all()
            if outcome[1] is not None:
                return
            step += 1

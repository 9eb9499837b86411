"""Batches on the devices: each process reads its own rows, ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Self

import numpy as np
from jax import Array

from mosaicjax import processes
from mosaicjax.data.prefetch import Prefetch
from mosaicjax.data.stream import Stream
from mosaicjax.errors import InputError
from mosaicjax.mesh import global_array, local_rows
from mosaicjax.step import Step

AHEAD = 2
"""Batches known to be readable before a step starts: a step's flags are read while the next one runs, so
that a process that cannot read batch n tells the others with step n - 2."""


class Feed:
    """The global batches of a run, in order, from step `start` on."""

    def __init__(self, stream: Stream, step: Step, start: int, steps: int) -> None:
        """Read the first batches.

        Raises:
            InputError: they cannot be read, on every process.
        """
        self._stream = stream
        self._shapes = step.batch_shapes()
        self._layout = step.layout
        self._phase = step.program.phase
        mine = local_rows(step.layout, self._phase.microbatch)
        self._places = [(m, row) for m in range(self._phase.microbatches) for row in mine]
        self._rows = [m * self._phase.microbatch + row for m, row in self._places]
        self._next, self._steps = start, steps
        self._ready: deque[dict[str, np.ndarray]] = deque()
        self.failure: InputError | None = None
        self._prefetch = Prefetch(self._read, start, ahead=AHEAD)
        with processes.refused_by_all("reading the first batches"):
            for _ in range(AHEAD):
                self._pull()
            if self.failure is not None:
                raise self.failure

    def next(self) -> dict[str, Array]:
        """The next step's batch; afterwards `failure` says whether the one `AHEAD` of it cannot be read."""
        self._pull()
        host = self._ready.popleft()
        return {
            name: global_array(self._layout, shape, names, host[name].__getitem__)
            for name, (shape, _, names) in self._shapes.items()
        }

    def _pull(self) -> None:
        if self.failure is not None or self._next >= self._steps:
            return
        try:
            self._ready.append(self._prefetch.get(self._next))
        except InputError as error:
            self.failure = error
        self._next += 1

    def _read(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of a batch, in arrays of the global shape; rows past the batch weigh 0."""
        inside = [i for i, row in enumerate(self._rows) if row < self._phase.batch]
        read = self._stream.rows(step, [self._rows[i] for i in inside])
        host = {name: np.zeros(shape, dtype) for name, (shape, dtype, _) in self._shapes.items()}
        host["row"][:] = np.arange(host["row"].size).reshape(host["row"].shape)
        places = tuple(np.array([self._places[i] for i in inside], np.int64).reshape(-1, 2).T)
        for name, array in host.items():
            if name != "row":
                array[places] = read[name]
        return host

    def close(self) -> None:
        """Stop reading."""
        self._prefetch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""Batches on the devices: each process reads its own rows, ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import grain
import numpy as np
from jax import Array

from mosaicjax import processes
from mosaicjax.data.phased import Phased
from mosaicjax.errors import InputError
from mosaicjax.mesh import global_array, local_rows
from mosaicjax.step import Step

AHEAD = 2
"""Batches known to be readable before a step starts: a step's flags are read while the next one runs, so
that a process that cannot read batch n tells the others with step n - 2."""


class Feed:
    """The global batches of a run, in order, from step `start` on."""

    def __init__(self, stream: Phased, phases: Sequence[Step], start: int, steps: int) -> None:
        """Read the first batches; each phase of the stream has its step.

        Raises:
            InputError: they cannot be read, on every process.
        """
        self._stream = stream
        self._forms = [Form(step) for step in phases]
        self._next, self._steps = start, steps
        self._ready: deque[tuple[int, dict[str, np.ndarray]]] = deque()
        self.failure: InputError | None = None
        # One thread, since batches share what they read.
        reads = grain.MapDataset.range(start, max(start + 1, steps)).map(self._read)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        self._batches = reads.to_iter_dataset(options).__iter__()
        with processes.refused_by_all("reading the first batches"):
            for _ in range(AHEAD):
                self._pull()
            if self.failure is not None:
                raise self.failure

    def next(self) -> dict[str, Array]:
        """The next step's batch; afterwards `failure` says whether the one `AHEAD` of it cannot be read."""
        self._pull()
        step, host = self._ready.popleft()
        return self._forms[self._stream.phase(step)].on_devices(host)

    def _pull(self) -> None:
        if self.failure is not None or self._next >= self._steps:
            return
        read = next(self._batches)
        if isinstance(read, InputError):
            self.failure = read
        else:
            self._ready.append((self._next, read))
        self._next += 1

    def _read(self, step: int) -> dict[str, np.ndarray] | InputError:
        """This process's rows of a batch, see `Form.filled`, or why they cannot be read."""
        form = self._forms[self._stream.phase(step)]
        try:
            return form.filled(self._stream.rows(step, form.wanted))
        except InputError as error:
            return error

    def close(self) -> None:
        """Stop reading."""
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Form:
    """The arrays of a phase's batches, and which of their rows this process reads."""

    def __init__(self, step: Step) -> None:
        self._shapes, self._layout = step.batch_shapes(), step.layout
        phase = step.program.phase
        mine = local_rows(step.layout, phase.microbatch)
        places = [(m, row) for m in range(phase.microbatches) for row in mine]
        numbers = [m * phase.microbatch + row for m, row in places]
        inside = [i for i, number in enumerate(numbers) if number < phase.batch]
        self.wanted = [numbers[i] for i in inside]
        self._places = tuple(np.array([places[i] for i in inside], np.int64).reshape(-1, 2).T)

    def filled(self, read: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows that were wanted, in arrays of the global shape; rows past the batch weigh 0."""
        host = {name: np.zeros(shape, dtype) for name, (shape, dtype, _) in self._shapes.items()}
        host["row"][:] = np.arange(host["row"].size).reshape(host["row"].shape)
        for name, array in host.items():
            if name != "row":
                array[self._places] = read[name]
        return host

    def on_devices(self, host: dict[str, np.ndarray]) -> dict[str, Array]:
        """The batch as global arrays."""
        return {
            name: global_array(self._layout, shape, names, host[name].__getitem__)
            for name, (shape, _, names) in self._shapes.items()
        }

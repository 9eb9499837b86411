"""Reading rows of a store's arrays from elsewhere, through blocks on this machine's disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mosaicjax import storage
from mosaicjax.data.arrays import open_array
from mosaicjax.data.disk_cache import DiskCache

Span = tuple[int, int]
Wait = Callable[[], list[np.ndarray]]

PATIENCE_SECONDS = 10.0
"""A read that takes longer is spoken of, and once more whenever so much time has passed again."""


class Reader(Protocol):
    """Rows of an array."""

    def begin(self, spans: Sequence[Span]) -> Wait:
        """Begin to read the rows from `first` up to `last`, of each span; calling the result waits for them.

        Shapes: as the array's, [last - first, ...].
        Raises: ValueError, then or at once, with what is said of damaged or missing files.
        """
        ...

    def check(self, first: int, last: int) -> None:
        """Read these rows and no others, where they lie.

        Raises: ValueError with what is said of them.
        """
        ...


class Blocks:
    """An array on an object store, of which blocks of `block` rows are kept on this machine's disk.

    `name` is that of its blocks: it says what they hold, so that a store written anew has others. A block
    that is there costs no request, and opening the array none before the first that is not.
    """

    def __init__(
        self,
        folder: str,
        shape: tuple[int, ...],
        dtype: str,
        *,
        block: int,
        cache: DiskCache,
        name: str,
    ) -> None:
        self._folder, self._shape, self._dtype = folder, shape, np.dtype(dtype)
        self._block, self._cache, self._name = block, cache, f"{name}/{block}"

    @cached_property
    def _array(self) -> Any:
        # Its chunks are kept as blocks, and read once.
        return answer(open_array(self._folder), self._folder)

    def begin(self, spans: Sequence[Span]) -> Wait:
        """See `Reader.begin`."""
        import tensorstore

        blocks = {number for first, last in spans for number in self._numbers(first, last)}
        found = {number: self._kept(number) for number in sorted(blocks)}
        pending = {}
        with tensorstore.Batch() as batch:
            for number, block in found.items():
                if block is None:
                    first = number * self._block
                    last = min(first + self._block, self._shape[0])
                    pending[number] = self._array[first:last].read(batch=batch)

        def wait() -> list[np.ndarray]:
            blocks = {number: block for number, block in found.items() if block is not None}
            for number, future in pending.items():
                blocks[number] = answer(future, self._folder)
                self._cache.put(f"{self._name}/{number}", blocks[number].tobytes())
            return [self._cut(blocks, first, last) for first, last in spans]

        return wait

    def check(self, first: int, last: int) -> None:
        """See `Reader.check`."""
        answer(self._array[first:last].read(), self._folder)

    def _numbers(self, first: int, last: int) -> range:
        return range(first // self._block, -(-last // self._block)) if first < last else range(0)

    def _kept(self, number: int) -> np.ndarray | None:
        contents = self._cache.get(f"{self._name}/{number}")
        if contents is None:
            return None
        return np.frombuffer(contents, self._dtype).reshape(-1, *self._shape[1:])

    def _cut(self, blocks: dict[int, np.ndarray], first: int, last: int) -> np.ndarray:
        parts = []
        for number in self._numbers(first, last):
            start = number * self._block
            parts.append(blocks[number][max(0, first - start) : last - start])
        return np.concatenate(parts) if parts else np.empty((0, *self._shape[1:]), self._dtype)


def answer(future: Any, place: storage.PathLike) -> Any:
    """Wait for what TensorStore reads from elsewhere, and say so where it takes long.

    Raises: ValueError with what TensorStore says once it gives up.
    """
    began = time.monotonic()
    while True:
        try:
            return future.result(timeout=PATIENCE_SECONDS)
        except TimeoutError:
            waited = time.monotonic() - began
            print(f"no answer from {place} for {waited:.0f} s: still trying", file=sys.stderr, flush=True)

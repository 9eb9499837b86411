"""Batches from a token store: their order is a pure function of (seed, step), so any can be read at once."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from mosaicjax.data.store import Split
from mosaicjax.errors import InputError

Batch = dict[str, np.ndarray]
Result = TypeVar("Result")


@dataclass(frozen=True)
class TokenStore:
    """The data of a recipe: where a token store lies, and whether the documents of a row see each other.

    With `isolate` each document of a row is a segment of its own and its positions begin at 0.
    """

    path: str
    isolate: bool = False


class RowStarts:
    """A random-access source of the rows of an epoch: row i is where its first token lies, `i * seq`."""

    def __init__(self, tokens: int, seq: int) -> None:
        self.rows = (tokens - 1) // seq
        self.seq = seq

    def __len__(self) -> int:
        """Return how many whole rows there are."""
        return self.rows

    def __getitem__(self, row: int) -> int:
        """Return the position of the row's first token."""
        return int(row) * self.seq


class Stream:
    """The training batches of a split, endlessly, in an order that depends on (seed, step) alone.

    Row i of an epoch predicts tokens `i * seq + 1` to `(i + 1) * seq` from those before them; up to `seq - 1`
    targets at the end of the split belong to no row. Every epoch has its own order of the rows, and epochs
    follow one another without a gap: a batch may straddle two. `skips` are data steps left out, in order: the
    n-th step of training reads the n-th data step that is not among them.

    With `isolate`, a separator begins the segment of the document after it and is the last target of the
    document before it: the first token of a document is predicted from the separator alone, its end from all
    of the document. Otherwise a row is one segment.
    """

    def __init__(
        self,
        split: Split,
        *,
        separator: int,
        seq: int,
        batch: int,
        seed: int,
        skips: tuple[int, ...] = (),
        isolate: bool = False,
    ) -> None:
        """Prepare the order of rows; nothing is read.

        Raises: InputError for a split shorter than one row, or skips that are not increasing.
        """
        import grain

        source = RowStarts(len(split), seq)
        if len(source) == 0:
            raise InputError(
                f"{split.folder} is shorter than one row",
                expected=f"at least {seq + 1} tokens",
                got=len(split),
                fix="more documents, or a shorter sequence",
            )
        if list(skips) != sorted(set(skips)) or any(step < 0 for step in skips):
            raise InputError(
                "skipped steps are out of order", expected="increasing steps from 0 on", got=skips
            )
        self.split = split
        self.separator = separator
        self.seq = seq
        self.batch = batch
        self.rows_per_epoch = len(source)
        self.skips = skips
        self.isolate = isolate
        self._starts = grain.MapDataset.source(source).shuffle(order_seed(seed)).repeat()

    def data_step(self, step: int) -> int:
        """Return the data step that a step of training reads."""
        assert step >= 0, step
        # the i-th skip comes before the step once `skips[i] - i` steps have been trained
        return step + bisect_left(range(len(self.skips)), True, key=lambda i: self.skips[i] - i > step)

    def rows(self, step: int, rows: Sequence[int]) -> Batch:
        """Read any rows of a training step's global batch; all reads are issued before one is waited for.

        Shapes: `tokens`, `targets`, `segments`, `positions` int32 and `weights` float32, each [len(rows),
        seq]. Raises: InputError naming a damaged shard.
        """
        first = self.data_step(step) * self.batch
        assert all(0 <= row < self.batch for row in rows), (rows, self.batch)
        starts = [self._starts[first + int(row)] for row in rows]
        windows = self.split.tokens(starts, self.seq + 1)
        return make_batch(windows, np.full(len(starts), self.seq), self.separator, self.isolate)


class HeldOut:
    """The rows of a split in order, for evaluation: every token but the first is a target exactly once.

    The last row is filled up with separators of weight 0 and segment 0. For `isolate` see `Stream`.
    """

    def __init__(self, split: Split, *, separator: int, seq: int, isolate: bool = False) -> None:
        """Count the rows; nothing is read.

        Raises: InputError for a split without documents.
        """
        if split.counts.documents == 0:
            raise InputError(
                f"{split.folder} holds no documents",
                fix="a store of more documents (a .txt is one), a larger --held-out, or --eval.every 0",
            )
        self.split = split
        self.separator = separator
        self.seq = seq
        self.isolate = isolate

    def __len__(self) -> int:
        """Return the number of rows."""
        return -(-(len(self.split) - 1) // self.seq)

    def rows(self, indices: Sequence[int]) -> Batch:
        """Read rows by number.

        Shapes: as those of `Stream.rows`.
        Raises: InputError naming a damaged shard.
        """
        assert all(0 <= index < len(self) for index in indices), (indices, len(self))
        starts = np.array([int(index) * self.seq for index in indices], np.int64)
        lengths = np.minimum(self.seq, len(self.split) - 1 - starts)
        windows = np.full((len(starts), self.seq + 1), self.separator, np.int32)
        whole = lengths == self.seq
        windows[whole] = self.split.tokens(starts[whole], self.seq + 1)
        for row in np.flatnonzero(~whole):
            length = int(lengths[row]) + 1
            windows[row, :length] = self.split.tokens([starts[row]], length)[0]
        return make_batch(windows, lengths, self.separator, self.isolate)


def order_seed(seed: int) -> int:
    """Return the seed of the order of rows.

    Grain adds the epoch to its seed: unhashed, the second epoch of seed 0 would be the first of seed 1.
    """
    return int.from_bytes(hashlib.blake2b(f"rows/{seed}".encode(), digest_size=4).digest(), "big")


def make_batch(windows: np.ndarray, lengths: np.ndarray, separator: int, isolate: bool) -> Batch:
    """Cut windows of tokens into inputs and targets; row i has `lengths[i]` targets, and padding after them.

    Shapes: windows int32 [rows, seq + 1], lengths [rows]; the batch's arrays [rows, seq].
    """
    tokens = windows[:, :-1]
    place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    inside = place < lengths[:, None]
    if isolate:
        begins = tokens == separator
        begins[:, 0] = True
        segments = np.cumsum(begins, axis=1, dtype=np.int32)
        positions = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    else:
        segments = np.ones_like(tokens)
        positions = place
    return {
        "tokens": np.ascontiguousarray(tokens),
        "targets": np.ascontiguousarray(windows[:, 1:]),
        "weights": inside.astype(np.float32),
        "segments": np.where(inside, segments, 0).astype(np.int32),
        "positions": np.where(inside, positions, 0).astype(np.int32),
    }


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

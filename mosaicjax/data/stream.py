"""Batches from a token store: their order is a pure function of (seed, step), so any can be read at once."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from mosaicjax.data.order import WINDOW_PLACES, Mix, Order, Orders, order_seed
from mosaicjax.data.rows import WINDOWS, Batch, Held, Packed, SplitRows, blank, loss_of
from mosaicjax.data.store import Split
from mosaicjax.errors import InputError


@dataclass(frozen=True)
class Drawn:
    """A domain of a stream: its rows, and how many of every so many come from it."""

    name: str
    rows: SplitRows
    weight: int


class Stream:
    """The training batches of one or more splits, endlessly, in an order that depends on (seed, step) alone.

    Every epoch of a domain has its own order of the rows (see `Order`), and epochs follow one another without
    a gap: a batch may straddle two. Several domains are mixed row by row (see `Mix`). `skips` are data steps
    left out, in order: the n-th step of training reads the n-th data step that is not among them.

    With `isolate` each document of a row is a segment of its own: a separator begins the segment of the
    document after it and is the last target of the document before it, so that the first token of a document
    is predicted from the separator alone, its end from all of the document. Otherwise a row is one segment.
    """

    def __init__(
        self,
        drawn: Sequence[Drawn],
        *,
        separator: int,
        seq: int,
        batch: int,
        seed: int,
        skips: tuple[int, ...] = (),
        isolate: bool = False,
        first_step: int = 0,
        taken: Mapping[str, int] | None = None,
    ) -> None:
        """Prepare the order of rows; nothing is read.

        The stream's first batch is that of the data step `first_step`; `taken` says how many samples of a
        domain came before that, as `samples_at` counts them.

        Raises: InputError for a domain without rows, or skips that are not increasing.
        """
        if list(skips) != sorted(set(skips)) or any(step < 0 for step in skips):
            raise InputError(
                "skipped steps are out of order", expected="increasing steps from 0 on", got=skips
            )
        self.drawn = tuple(drawn)
        self.separator = separator
        self.seq = seq
        self.batch = batch
        self.seed = seed
        self.skips = skips
        self.isolate = isolate
        self.masked = any(domain.rows.masked for domain in drawn)
        self.first_step = first_step
        self._taken = np.array([(taken or {}).get(domain.name, 0) for domain in drawn], np.int64)
        self._mix = Mix([domain.weight for domain in drawn], seed)
        self._orders = [
            Order(
                len(domain.rows),
                domain.rows.per_place,
                order_seed(seed, domain.name),
                window=-(-WINDOW_PLACES * domain.weight // self._mix.total),
            )
            for domain in drawn
        ]
        self._finder = Orders(self._orders)
        self._places = _Places(drawn, self._orders)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all domains together."""
        return sum(order.rows for order in self._orders)

    def skipping(self, skips: Iterable[int]) -> Stream:
        """Return the same stream with other steps left out."""
        return Stream(
            self.drawn,
            separator=self.separator,
            seq=self.seq,
            batch=self.batch,
            seed=self.seed,
            skips=tuple(sorted(skips)),
            isolate=self.isolate,
            first_step=self.first_step,
            taken=self.samples_at(self.first_step),
        )

    def samples_at(self, data_step: int) -> dict[str, int]:
        """How many samples of each domain come before a data step, from the first epoch on."""
        assert data_step >= self.first_step, (data_step, self.first_step)
        counts = self._taken + self._mix.counts((data_step - self.first_step) * self.batch)
        return {domain.name: int(count) for domain, count in zip(self.drawn, counts, strict=True)}

    def forget(self) -> None:
        """Let go of the places read so far; they are read again where they are wanted."""
        self._places.forget()

    def data_step(self, step: int) -> int:
        """Return the data step that a step of training reads."""
        assert step >= 0, step
        # the i-th skip comes before the step once `skips[i] - i` steps have been trained
        return step + bisect_left(range(len(self.skips)), True, key=lambda i: self.skips[i] - i > step)

    def rows(self, step: int, rows: Sequence[int]) -> Batch:
        """Read any rows of a training step's global batch; all reads are issued before one is waited for.

        Shapes: `tokens` and `targets` int32 and `weights` float32, [len(rows), seq]; `domain` int32
        [len(rows)], a number among the stream's; with `isolate` also `segments` and `positions`, int32
        [len(rows), seq].
        Raises: InputError naming a damaged shard.
        """
        assert all(0 <= row < self.batch for row in rows), (rows, self.batch)
        chosen = np.asarray(rows, np.int64)
        domains, numbers = self._samples((self.data_step(step) - self.first_step) * self.batch, chosen)
        places, found = self._finder.find(domains, numbers)
        batch = self._blank(len(chosen))
        where = list(zip(domains.tolist(), places.tolist(), strict=True))
        with self._places.read(set(where)) as held:
            for i, (key, row) in enumerate(zip(where, found.tolist(), strict=True)):
                held[key].copy(row, batch, i)
        if WINDOWS in batch:
            windows = batch.pop(WINDOWS)
            batch |= {"tokens": windows[:, :-1], "targets": windows[:, 1:]}
            if self.isolate:
                batch |= documents_of(batch["tokens"], self.separator)
        return batch | {"domain": domains.astype(np.int32)}

    def _blank(self, rows: int) -> Batch:
        """Arrays for rows to be written into."""
        if any(isinstance(domain.rows, Packed) for domain in self.drawn):
            return blank(rows, self.seq, self.separator)
        shape = (rows, self.seq)
        windows = np.empty((rows, self.seq + 1), np.int32)
        weights = np.ones(shape, np.float32) if self.masked else np.broadcast_to(np.float32(1.0), shape)
        return {WINDOWS: windows, "weights": weights}

    def _samples(self, first: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The domains of a batch's rows, and which of the domain's samples each is.

        Shapes: int64 [rows] each.
        """
        if len(self._orders) == 1:
            return np.zeros_like(rows), self._taken[0] + first + rows
        of_batch = self._mix.domains(first, self.batch)
        numbers = np.empty_like(of_batch)
        for domain, before in enumerate(self._mix.counts(first)):
            mine = np.flatnonzero(of_batch == domain)
            numbers[mine] = self._taken[domain] + before + np.arange(len(mine))
        return of_batch[rows], numbers[rows]


class _Places:
    """Places read whole and kept, those used last, as many as the windows of all domains have."""

    def __init__(self, drawn: Sequence[Drawn], orders: Sequence[Order]) -> None:
        self._rows = [domain.rows for domain in drawn]
        self._orders = orders
        self._most = sum(order.largest_window for order in orders)
        self._held: OrderedDict[tuple[int, int], Held] = OrderedDict()
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Hold none."""
        with self._lock:
            self._held.clear()

    @contextmanager
    def read(self, wanted: Iterable[tuple[int, int]]) -> Iterator[Mapping[tuple[int, int], Held]]:
        """Have these places, by domain and number, for a while; afterwards those used longest ago go.

        Raises: InputError naming a damaged shard.
        """
        with self._lock:
            self._fetch(wanted)
            yield self._held
            while len(self._held) > self._most:
                self._held.popitem(last=False)

    def _fetch(self, wanted: Iterable[tuple[int, int]]) -> None:
        missing: dict[int, list[int]] = {}
        for key in wanted:
            if key in self._held:
                self._held.move_to_end(key)
            else:
                missing.setdefault(key[0], []).append(key[1])
        begun = {}
        for number, places in missing.items():
            order = self._orders[number]
            spans = [(order.first_row(place), order.first_row(place + 1)) for place in places]
            begun[number] = self._rows[number].read(spans)
        for number, places in missing.items():
            for place, rows in zip(places, begun[number](), strict=True):
                self._held[number, place] = rows


class HeldOut:
    """The rows of one or more splits in order, for evaluation: each token but their first is a target once.

    A split's last row is filled up with separators of weight 0 and segment 0; tokens that bear no loss have
    weight 0 too. For `isolate` see `Stream`.
    """

    def __init__(
        self, splits: Mapping[str, Split], *, separator: int, seq: int, isolate: bool = False
    ) -> None:
        """Count the rows of splits by the name of their domain; nothing is read.

        Raises: InputError for splits without documents.
        """
        self.names = tuple(splits)
        self.splits = tuple(splits.values())
        check_documents(self.splits)
        self.separator = separator
        self.seq = seq
        self.isolate = isolate
        self._ends = np.cumsum([-(-(len(split) - 1) // seq) for split in self.splits])

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._ends[-1])

    def domains(self, indices: Sequence[int]) -> np.ndarray:
        """The number of the domain of each of these rows.

        Shapes: int64 [indices].
        """
        return np.searchsorted(self._ends, np.array(indices, np.int64), side="right")

    def rows(self, indices: Sequence[int]) -> Batch:
        """Read rows by number.

        Shapes: as those of `Stream.rows`.
        Raises: InputError naming a damaged shard.
        """
        assert all(0 <= index < len(self) for index in indices), (indices, len(self))
        chosen = np.array(indices, np.int64)
        domains = self.domains(indices)
        windows = np.full((len(chosen), self.seq + 1), self.separator, np.int32)
        lengths = np.zeros(len(chosen), np.int64)
        weights = np.ones((len(chosen), self.seq), np.float32)
        for number, split in enumerate(self.splits):
            mine = np.flatnonzero(domains == number)
            before = self._ends[number - 1] if number else 0
            spans = [
                (int(row), min(int(row) + self.seq + 1, len(split)))
                for row in (chosen[mine] - before) * self.seq
            ]
            wait, wait_loss = split.read(spans), loss_of(split, spans)
            for row, tokens, loss in zip(mine, wait(), wait_loss(), strict=True):
                windows[row, : len(tokens)] = tokens
                lengths[row] = len(tokens) - 1
                if loss is not None:
                    weights[row, : len(loss) - 1] = loss[1:]
        tokens = windows[:, :-1]
        inside = np.arange(self.seq) < lengths[:, None]
        batch = {
            "tokens": np.ascontiguousarray(tokens),
            "targets": np.ascontiguousarray(windows[:, 1:]),
            "weights": weights * inside,
            "domain": domains.astype(np.int32),
        }
        if self.isolate:
            found = documents_of(tokens, self.separator)
            batch |= {name: np.where(inside, array, 0).astype(np.int32) for name, array in found.items()}
        return batch


def check_documents(splits: Sequence[Split]) -> None:
    """Refuse held-out splits in which there is nothing.

    Raises: InputError naming them.
    """
    if sum(split.counts.documents for split in splits) == 0:
        raise InputError(
            f"{' and '.join(str(split.folder) for split in splits)} holds no documents",
            fix="a store of more documents (a .txt is one), a larger --held-out, or --eval.every 0",
        )


def documents_of(tokens: np.ndarray, separator: int) -> Batch:
    """Which document of its row each token belongs to, and where in it: a separator begins a document.

    Shapes: `tokens`, and `segments` and `positions` int32, [rows, seq]; segments count from 1.
    """
    place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    begins = tokens == separator
    begins[:, 0] = True
    positions = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return {"segments": np.cumsum(begins, axis=1, dtype=np.int32), "positions": positions}

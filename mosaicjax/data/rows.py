"""The rows of a split, cut out of its tokens one after the other or packed of whole documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from mosaicjax.data.packing import REGION_TOKENS, Packing
from mosaicjax.data.store import Split
from mosaicjax.errors import InputError

Batch = dict[str, np.ndarray]
PLACE_TOKENS = 2**18
WINDOWS = "windows"
"""Rows of seq + 1 tokens, of which inputs and targets are views."""
NEAR = 4_096
"""Pieces so many tokens apart are read as one."""


class Held(Protocol):
    """Neighbouring rows that were read."""

    def copy(self, row: int, batch: Batch, to: int) -> None:
        """Write a row, by its number in the split, over row `to` of a batch's arrays."""
        ...


class SplitRows(Protocol):
    """The rows of a split: how many, how many neighbours to read at a time, and what they are of."""

    per_place: int
    identity: str
    masked: bool
    """Whether there are targets that bear no loss."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def read(self, spans: Sequence[tuple[int, int]]) -> Callable[[], list[Held]]:
        """Begin to read rows from `first` up to `last`, of each span; the call of the result waits for them.

        Raises: InputError, then or at once, naming what is damaged.
        """
        ...


class Contiguous:
    """Row i predicts tokens `i * seq + 1` to `(i + 1) * seq`, whatever documents they are of.

    Up to `seq - 1` targets at the end of the split belong to no row.
    """

    def __init__(self, split: Split, seq: int) -> None:
        """Nothing is read.

        Raises: InputError for a split shorter than one row.
        """
        if row_count(len(split), seq) == 0:
            raise InputError(
                f"{split.folder} is shorter than one row",
                expected=f"at least {seq + 1} tokens",
                got=len(split),
                fix="more documents, or a shorter sequence",
            )
        self.split, self.seq, self.identity = split, seq, split.identity
        self.per_place, self.masked = PLACE_TOKENS // seq, split.masked

    def __len__(self) -> int:
        """Return the number of rows."""
        return row_count(len(self.split), self.seq)

    def read(self, spans: Sequence[tuple[int, int]]) -> Callable[[], list[Held]]:
        """See `SplitRows.read`."""
        places = [(first * self.seq, last * self.seq + 1) for first, last in spans]
        wait, wait_loss = self.split.read(places), loss_of(self.split, places)
        return lambda: [
            Windows(tokens, loss, first, self.seq)
            for tokens, loss, (first, _) in zip(wait(), wait_loss(), spans, strict=True)
        ]


class Windows:
    """Neighbouring tokens, as rows from number `first` on."""

    def __init__(self, tokens: np.ndarray, loss: np.ndarray | None, first: int, seq: int) -> None:
        self.tokens, self.loss, self.first, self.seq = tokens, loss, first, seq

    def copy(self, row: int, batch: Batch, to: int) -> None:
        """See `Held.copy`."""
        at = (row - self.first) * self.seq
        batch[WINDOWS][to] = self.tokens[at : at + self.seq + 1]
        if self.loss is not None:
            batch["weights"][to] = self.loss[at + 1 : at + self.seq + 1]


class Packed:
    """Rows of whole documents, each a segment of its own."""

    def __init__(self, packing: Packing) -> None:
        self.packing, self.identity = packing, packing.split.identity
        self.per_place, self.masked = REGION_TOKENS // packing.seq, packing.split.masked

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.packing)

    def read(self, spans: Sequence[tuple[int, int]]) -> Callable[[], list[Held]]:
        """See `SplitRows.read`."""
        places = [(first, list(self.packing.pieces(first, last))) for first, last in spans]
        merged = [together(np.concatenate(rows)) for _, rows in places]
        wanted = [span for spans in merged for span in spans]
        wait, wait_loss = self.packing.split.read(wanted), loss_of(self.packing.split, wanted)

        def held() -> list[Held]:
            both = iter(zip(wait(), wait_loss(), strict=True))
            return [
                Pieces([next(both) for _ in spans], np.array(spans), rows, first)
                for (first, rows), spans in zip(places, merged, strict=True)
            ]

        return held


def blank(rows: int, seq: int, separator: int) -> Batch:
    """Arrays for packed rows to be written into, which may leave places empty.

    Shapes: `tokens`, `targets`, `segments` and `positions` int32 and `weights` float32, [rows, seq].
    """
    shape = (rows, seq)
    batch = {name: np.full(shape, separator, np.int32) for name in ("tokens", "targets")}
    batch |= {name: np.zeros(shape, np.int32) for name in ("segments", "positions")}
    return batch | {"weights": np.zeros(shape, np.float32)}


class Pieces:
    """Rows of pieces, from number `first` on, and the tokens that they were cut from."""

    def __init__(
        self,
        read: Sequence[tuple[np.ndarray, np.ndarray | None]],
        spans: np.ndarray,
        rows: list[np.ndarray],
        first: int,
    ) -> None:
        self.tokens = np.concatenate([tokens for tokens, _ in read])
        masks = [loss for _, loss in read if loss is not None]
        self.loss = np.concatenate(masks) if masks else None
        before = np.cumsum(spans[:, 1] - spans[:, 0]) - (spans[:, 1] - spans[:, 0])
        self.rows = []
        for pieces in rows:
            span = np.searchsorted(spans[:, 0], pieces[:, 0], side="right") - 1
            at = pieces[:, 0] - spans[span, 0] + before[span]
            self.rows.append(list(zip(at.tolist(), pieces[:, 1].tolist(), strict=True)))
        self.first = first

    def copy(self, row: int, batch: Batch, to: int) -> None:
        """See `Held.copy`; what is left of the row is left as it was."""
        begin = 0
        for segment, (at, length) in enumerate(self.rows[row - self.first], 1):
            place = slice(begin, begin + length)
            batch["tokens"][to, place] = self.tokens[at : at + length]
            batch["targets"][to, place] = self.tokens[at + 1 : at + length + 1]
            batch["segments"][to, place] = segment
            batch["positions"][to, place] = np.arange(length)
            batch["weights"][to, place] = 1.0 if self.loss is None else self.loss[at + 1 : at + length + 1]
            begin += length


def loss_of(split: Split, spans: Sequence[tuple[int, int]]) -> Callable[[], Sequence[np.ndarray | None]]:
    """Begin to read which tokens of each span bear loss; None where all do."""
    return split.read_loss(spans) if split.masked else lambda: [None] * len(spans)


def together(pieces: np.ndarray) -> list[tuple[int, int]]:
    """The spans of tokens that pieces touch, their last targets too; near ones are one.

    Shapes: int64 [pieces, 2], as `packing.pieces_of`.
    """
    pieces = pieces[np.argsort(pieces[:, 0])]
    spans: list[tuple[int, int]] = []
    for first, length in pieces.tolist():
        last = first + length + 1
        if spans and first <= spans[-1][1] + NEAR:
            spans[-1] = (spans[-1][0], max(spans[-1][1], last))
        else:
            spans.append((first, last))
    return spans


def row_count(tokens: int, seq: int) -> int:
    """How many whole rows a split of so many tokens has, cut one after the other."""
    return max(0, tokens - 1) // seq

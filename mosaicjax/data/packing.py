"""Rows of whole documents: each region of a split is packed on its own, longest first, best fit.

A document of n tokens has n + 1 places: its separator and its tokens, each predicting what comes next. One
longer than a row is cut into pieces of whole rows and a rest. The two documents of a preference pair lie next
to each other in one row, and are refused where they are longer than that. A region is a run of documents
about as long as some hundred rows: it is packed again wherever it is read, and an index of how many rows each
region has finds any row at once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mosaicjax.data.disk_cache import DiskCache
from mosaicjax.data.store import Split
from mosaicjax.errors import InputError

REGION_TOKENS = 2**18
REGION_ROWS = 64
VERSION = 1
"""Of the way that documents are packed; another gives other rows."""


def pieces_of(spans: np.ndarray, seq: int) -> np.ndarray:
    """Where the pieces of documents begin, and how many targets each has, in the order of the documents.

    Shapes: `spans` of the documents' own tokens, int64 [documents, 2]; the result int64 [pieces, 2].
    """
    starts, places = spans[:, 0], spans[:, 1] - spans[:, 0] + 1
    count = -(-places // seq)
    document = np.repeat(np.arange(len(starts)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    length = np.minimum(places[document] - number * seq, seq)
    return np.stack([starts[document] - 1 + number * seq, length], axis=1)


def best_fit(lengths: np.ndarray, seq: int) -> list[list[int]]:
    """Rows of pieces, by number: the longest first, each into the row with the least room that it fits in.

    Source: best-fit decreasing, Johnson 1973; for rows of documents Ding et al. 2024, arXiv 2404.10830.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left of rows that are not full, in order
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(room, (length, 0))
        if at < len(room):
            left, row = room.pop(at)
            rows[row].append(piece)
        else:
            left, row = seq, len(rows)
            rows.append([piece])
        if left > length:
            insort(room, (left - length, row))
    return rows


def packed(spans: np.ndarray, seq: int, together: int = 1) -> tuple[np.ndarray, list[list[int]]]:
    """The pieces of documents, and rows of these by number; `together` documents at a time stay side by side.

    Documents that stay together are shorter than a row.

    Shapes: `spans` and pieces as in `pieces_of`.
    """
    pieces = pieces_of(spans, seq)
    rows = best_fit(pieces[:, 1].reshape(-1, together).sum(axis=1), seq)
    if together > 1:
        rows = [[unit * together + i for unit in row for i in range(together)] for row in rows]
    return pieces, rows


def check_fits(split: Split, spans: np.ndarray, seq: int, together: int) -> None:
    """Refuse documents that stay together and are longer than a row.

    Raises: InputError with how many there are, and the longest.
    """
    places = (spans[:, 1] - spans[:, 0] + 1).reshape(-1, together).sum(axis=1)
    longer = int((places > seq).sum())
    if longer:
        raise InputError(
            f"{longer:,} of {len(places):,} pairs in {split.folder} are longer than a row",
            expected=f"at most {seq} tokens, separators among them",
            got=f"{int(places.max()):,} in the longest",
            fix=f"--seq {int(places.max())} or more, or a store without them",
        )


@dataclass(frozen=True)
class Packing:
    """How the documents of a split lie in rows of `seq` targets.

    Region r has the documents from number `documents[r]` and the rows from number `rows[r]` on; a last entry
    has the totals. `together` documents, from every multiple of that number on, stay side by side.

    Shapes: int64 [regions + 1] each.
    """

    split: Split
    seq: int
    documents: np.ndarray
    rows: np.ndarray
    together: int = 1

    @classmethod
    def kept(cls, split: Split, seq: int, cache: DiskCache, name: str, *, together: int = 1) -> Packing:
        """Pack all documents of a split, or take what was kept of that under a name that says what they are.

        Raises: InputError as `of`.
        """
        by = f"-by-{together}" if together > 1 else ""
        block = f"{name}/packing-{VERSION}/{seq}{by}"
        found = cache.get(block)
        if found is not None:
            documents, rows = np.frombuffer(found, np.int64).reshape(2, -1)
            return cls(split, seq, documents, rows, together)
        made = cls.of(split, seq, together=together)
        cache.put(block, np.stack([made.documents, made.rows]).tobytes())
        return made

    @classmethod
    def of(cls, split: Split, seq: int, *, region: int = REGION_TOKENS, together: int = 1) -> Packing:
        """Pack all documents of a split: some seconds for every billion tokens.

        Units: a region has about `region` tokens, or `REGION_ROWS` rows where those are more.

        Raises: InputError naming a damaged array, or as `check_fits`.
        """
        spans = split.spans()
        if together > 1:
            check_fits(split, spans, seq, together)
        starts = spans[:, 0]
        bounds = np.arange(0, len(split), max(region, REGION_ROWS * seq))
        # After a document that is longer than a region come regions that none begins in.
        first = np.searchsorted(starts, bounds) // together * together
        documents = np.unique(np.append(first, len(starts)))
        counts = [
            len(packed(spans[low:high], seq, together)[1])
            for low, high in zip(documents, documents[1:], strict=False)
        ]
        rows = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return cls(split, seq, documents, rows, together)

    @property
    def waste(self) -> float:
        """The share of the rows' places that are empty: every token but the first is some place's target."""
        return 1.0 - (len(self.split) - 1) / max(1, len(self) * self.seq)

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.rows[-1])

    def pieces(self, first: int, last: int) -> Iterator[np.ndarray]:
        """The pieces of the rows from `first` up to `last`.

        Shapes: for each row int64 [pieces, 2], as `pieces_of`.
        Raises: InputError naming a damaged array.
        """
        region = int(np.searchsorted(self.rows, first, side="right")) - 1
        while first < last:
            low, high = self.documents[region : region + 2].tolist()
            pieces, rows = packed(self.split.spans(low, high), self.seq, self.together)
            before = int(self.rows[region])
            for row in rows[first - before : last - before]:
                yield pieces[row]
            first, region = before + len(rows), region + 1

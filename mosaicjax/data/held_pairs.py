"""Held-out preference pairs: packed as those that are trained on, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mosaicjax.data.packing import Packing
from mosaicjax.data.rows import Batch, Packed, blank
from mosaicjax.data.store import Split
from mosaicjax.data.stream import check_documents

ANSWERS = 2
"""Documents of a pair: the chosen answer and the rejected one."""


class HeldOutPairs:
    """The rows of one or more splits of pairs in order, for evaluation: each pair comes once, in one row.

    It stands where `HeldOut` stands for other stores.
    """

    isolate = True

    def __init__(self, splits: Mapping[str, Split], *, separator: int, seq: int) -> None:
        """Pack the pairs of splits, by the name of their domain.

        Raises: InputError for splits without documents, or pairs longer than a row.
        """
        self.names, self.separator, self.seq = tuple(splits), separator, seq
        check_documents(tuple(splits.values()))
        self._rows = [Packed(Packing.of(split, seq, together=ANSWERS)) for split in splits.values()]
        self._ends = np.cumsum([len(rows) for rows in self._rows])

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._ends[-1])

    def domains(self, indices: Sequence[int]) -> np.ndarray:
        """The number of the domain of each of these rows.

        Shapes: int64 [indices].
        """
        return np.searchsorted(self._ends, np.asarray(indices, np.int64), side="right")

    def rows(self, indices: Sequence[int]) -> Batch:
        """Read rows by number.

        Shapes: as those of `Stream.rows` with `isolate`.
        Raises: InputError naming a damaged shard.
        """
        assert all(0 <= index < len(self) for index in indices), (indices, len(self))
        batch = blank(len(indices), self.seq, self.separator)
        domains = self.domains(indices)
        for number, rows in enumerate(self._rows):
            before = int(self._ends[number - 1]) if number else 0
            mine = [(place, indices[place] - before) for place in np.flatnonzero(domains == number).tolist()]
            spans = runs(sorted({row for _, row in mine}))
            held = zip(spans, rows.read(spans)(), strict=True) if spans else ()
            of_row = {row: some for (first, last), some in held for row in range(first, last)}
            for place, row in mine:
                of_row[row].copy(row, batch, place)
        return batch | {"domain": domains.astype(np.int32)}


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Spans, each from its first up to its last, of numbers in ascending order."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1] = (spans[-1][0], number + 1)
        else:
            spans.append((number, number + 1))
    return spans

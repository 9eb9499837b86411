"""The second half of a build: the shuffled order of the documents, and the arrays written in it."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mosaicjax.data.arrays import (
    CHUNK_DOCUMENTS,
    CHUNK_TOKENS,
    LOSS,
    SHARD_DOCUMENTS,
    TOKENS,
    create_array,
    shard_file,
    write_shard_of,
    writing,
)
from mosaicjax.data.manifest import SPLITS, Counts, FileRecord, record_file, structure, write_json
from mosaicjax.data.parts import Tokenised, mask_of
from mosaicjax.data.workers import Engine


@dataclass(frozen=True)
class Table:
    """The documents of a split in their shuffled order, one row each.

    `part`: number of its spill file; `offset`: where it begins there; `start`: where it begins in the store;
    `tokens`: its length without separators; `bytes`: of its text in UTF-8; `fim`: what fill-in-the-middle
    made of it.

    Shapes: each [documents].
    """

    part: np.ndarray
    offset: np.ndarray
    start: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    fim: np.ndarray

    @property
    def counts(self) -> Counts:
        """Totals; a separator follows every document and one comes before the first."""
        return Counts(len(self.part), int(self.tokens.sum()) + len(self.part) + 1, int(self.bytes.sum()))

    def overlapping(self, first: int, last: int) -> Table:
        """Return the rows of the documents of which a token, or the separator after them, lies in a range.

        Units: `first` and `last` are places in the store.
        """
        low = int(np.searchsorted(self.start + self.tokens, first, side="left"))
        high = int(np.searchsorted(self.start, last, side="left"))
        rows = low + np.flatnonzero(self.tokens[low:high])
        return replace(self, **{each.name: getattr(self, each.name)[rows] for each in fields(self)})


@dataclass(frozen=True)
class Shard:
    """One shard to write: tokens `first` to `last` of the array in `folder`.

    `table` holds the documents that overlap it, its parts counted within `spills`; `record` is the file to
    leave. Of a loss mask `mask` is true and there is no separator: one bears the loss of the token before it.
    """

    folder: Path
    number: int
    first: int
    last: int
    separator: int
    dtype: str
    table: Table
    spills: tuple[Path, ...]
    record: Path
    mask: bool = False


def shuffle(
    parts: Sequence[Tokenised], *, drop_duplicates: bool = False
) -> tuple[dict[str, Table], Counter[str]]:
    """Return the documents of each split in the order of their keys, and how many were left out and why.

    The reasons are the numbers of filters, from 1, and `duplicate`: of documents of one text those after the
    first in the order are dropped.
    """
    indices = [np.load(part.index) for part in parts]
    part = np.repeat(np.arange(len(indices), dtype=np.int32), [len(index) for index in indices])
    offset = np.concatenate([np.cumsum(index["tokens"]) - index["tokens"] for index in indices])
    index = np.concatenate(indices)
    left_out = Counter(map(str, index["against"][index["against"] > 0].tolist()))
    tables = {}
    for split in SPLITS:
        chosen = np.flatnonzero((index["held_out"] == (split == "validation")) & (index["against"] == 0))
        order = chosen[np.argsort(index["key"][chosen], kind="stable")]
        if drop_duplicates:
            # Documents of one text are all on one side of the split.
            first = np.unique(index["digest"][order], axis=0, return_index=True)[1]
            left_out["duplicate"] += len(order) - len(first)
            order = order[np.sort(first)]
        tokens = index["tokens"][order]
        start = 1 + np.cumsum(tokens + 1) - (tokens + 1)
        tables[split] = Table(
            part[order], offset[order], start, tokens, index["bytes"][order], index["fim"][order]
        )
    return tables, left_out


def write_documents(folder: Path, table: Table) -> list[Path]:
    """Write where each document lies and how many bytes it has, and return the files written.

    Shapes: int64 [documents, 2].
    """
    count = len(table.part)
    array = create_array(
        folder, dtype="int64", shape=(count, 2), shard=SHARD_DOCUMENTS, chunk=CHUNK_DOCUMENTS
    )
    contents = np.stack([table.start, table.bytes], axis=1)
    files = [folder / "zarr.json"]
    for number, first in enumerate(range(0, count, SHARD_DOCUMENTS)):
        last = min(first + SHARD_DOCUMENTS, count)
        with writing():
            array[first:last].write(contents[first:last]).result()
        files.append(shard_file(folder, number, axes=2))
    return files


@dataclass(frozen=True)
class ShardWriter:
    """Writes the token arrays of the splits under `out`; finished shards leave a record in `records`."""

    out: Path
    records: Path
    separator: int
    dtype: str
    shard_tokens: int
    masked: bool = False

    def write(
        self, tables: Mapping[str, Table], parts: Sequence[Tokenised], *, engine: Engine, progress: bool
    ) -> dict[Path, FileRecord]:
        """Write the shards that are missing, and return the record of every file."""
        files: dict[Path, FileRecord] = {}
        arrays = {TOKENS: self.dtype} | ({LOSS: "uint8"} if self.masked else {})
        for split, table in tables.items():
            for name, dtype in arrays.items():
                folder, shape = self.out / split / name, (table.counts.tokens,)
                create_array(folder, dtype=dtype, shape=shape, shard=self.shard_tokens, chunk=CHUNK_TOKENS)
                files[folder / "zarr.json"] = record_file(folder / "zarr.json")
        shards = len(arrays) * sum(self._count(table) for table in tables.values())
        with tqdm(total=shards, unit=" shards", desc="write", disable=not progress) as bar:

            def add(path: Path, record: FileRecord) -> None:
                files[path] = record
                bar.update()

            def missing() -> Iterator[Shard]:
                for (split, table), name in itertools.product(tables.items(), arrays):
                    of_mask = name == LOSS
                    for number in range(self._count(table)):
                        path = shard_file(self.out / split / name, number)
                        record = self.records / f"{split}-{'loss-' if of_mask else ''}{number}.json"
                        finished = _finished(path, record)
                        if finished is None:
                            shard = self._shard(path, number, table, parts, record)
                            yield replace(shard, mask=True, dtype=arrays[name]) if of_mask else shard
                        else:
                            add(path, finished)

            # A small store is written faster than a second process starts.
            most = 1 if shards <= len(SPLITS) else None
            for shard, record in engine.run(write_shard, missing(), most):
                add(shard_file(shard.folder, shard.number), record)
        return files

    def _count(self, table: Table) -> int:
        return -(-table.counts.tokens // self.shard_tokens)

    def _shard(
        self, path: Path, number: int, table: Table, parts: Sequence[Tokenised], record: Path
    ) -> Shard:
        first = number * self.shard_tokens
        last = min(first + self.shard_tokens, table.counts.tokens)
        rows = table.overlapping(first, last)
        used, part = np.unique(rows.part, return_inverse=True)
        return Shard(
            folder=path.parent.parent,
            number=number,
            first=first,
            last=last,
            separator=self.separator,
            dtype=self.dtype,
            table=replace(rows, part=part),
            spills=tuple(parts[i].spill for i in used),
            record=record,
        )


def write_shard(shard: Shard) -> FileRecord:
    """Gather the documents of one shard, write it, and leave a record of its size and checksum."""
    tokens = np.full(shard.last - shard.first, 0 if shard.mask else shard.separator, shard.dtype)
    table = shard.table
    for number, path in enumerate(shard.spills):
        spill = np.memmap(mask_of(path) if shard.mask else path, shard.dtype, mode="r")
        for i in np.flatnonzero(table.part == number):
            first = max(int(table.start[i]), shard.first)
            end = int(table.start[i] + table.tokens[i])
            last = min(end, shard.last)
            shift = int(table.offset[i]) - int(table.start[i])
            tokens[first - shard.first : last - shard.first] = spill[first + shift : last + shift]
            if shard.mask and shard.first <= end < shard.last:
                tokens[end - shard.first] = spill[end - 1 + shift]
    write_shard_of(shard.folder, shard.first, tokens)
    record = record_file(shard_file(shard.folder, shard.number))
    write_json(shard.record, record)
    return record


def _finished(path: Path, record: Path) -> FileRecord | None:
    """Return the record of a shard that an earlier run finished, if the file is still as recorded."""
    if not record.exists() or not path.exists():
        return None
    recorded = structure(json.loads(record.read_text(encoding="utf-8")), FileRecord, record)
    return recorded if record_file(path) == recorded else None

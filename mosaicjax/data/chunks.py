"""Rows of an array on this machine, read from its shard files: every chunk is compared with its checksum.

TensorStore wrote them and reads the same; on one core it takes twice as long, half of it for the checksums.

Source: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np

from mosaicjax import storage
from mosaicjax.data.arrays import shard_file

CHECKSUM_BYTES = 4
ABSENT = 2**64 - 1
"""Offset and length of a chunk that was never written."""


@dataclass(frozen=True)
class Form:
    """How an array is cut: rows of a shard and of a chunk, and the shape and dtype of a row."""

    rows: int
    shard: int
    chunk: int
    row: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk with its checksum."""
        return self.chunk * int(np.prod(self.row, dtype=np.int64)) * self.dtype.itemsize + CHECKSUM_BYTES


class Chunks:
    """An array in a folder."""

    def __init__(self, folder: storage.PathLike) -> None:
        self._folder = storage.local(folder)

    def begin(self, spans: Sequence[tuple[int, int]]) -> Callable[[], list[np.ndarray]]:
        """Begin to read the rows from `first` up to `last`, of each span; calling the result waits for them.

        Shapes: as the array's, [last - first, ...].
        Raises: ValueError, then or at once, naming what is damaged or missing.
        """
        form = self._form
        wanted = [list(self._pieces(first, last)) for first, last in spans]
        for pieces in wanted:
            for shard, first, last in pieces:
                self._ask(shard, first * form.chunk_bytes, last * form.chunk_bytes)
        return lambda: [
            self._cut(pieces, first, last) for pieces, (first, last) in zip(wanted, spans, strict=True)
        ]

    def check(self, first: int, last: int) -> None:
        """Read these rows and no others.

        Raises: ValueError naming what is damaged or missing.
        """
        self.begin([(first, last)])()

    @cached_property
    def _form(self) -> Form:
        path = os.path.join(self._folder, "zarr.json")
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
            (codec,) = found["codecs"]
            inner = codec["configuration"]
            kinds = [[each["name"] for each in inner[name]] for name in ("codecs", "index_codecs")]
            if kinds != [["bytes", "crc32c"]] * 2 or inner.get("index_location", "end") != "end":
                raise ValueError("other codecs than those of a token store")
            shape = found["shape"]
            shard = found["chunk_grid"]["configuration"]["chunk_shape"][0]
            dtype = np.dtype(found["data_type"]).newbyteorder("<")
            return Form(shape[0], shard, inner["chunk_shape"][0], tuple(shape[1:]), dtype)
        except (OSError, KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{path} cannot be used: {type(error).__name__}: {error}") from error

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """The chunks of a span, shard by shard: its number, and the first and the last chunk in it."""
        form = self._form
        for shard in range(first // form.shard, -(-last // form.shard)) if first < last else ():
            begin, end = (min(max(each - shard * form.shard, 0), form.shard) for each in (first, last))
            yield shard, begin // form.chunk, -(-end // form.chunk)

    def _path(self, shard: int) -> str:
        return str(shard_file(self._folder, shard, axes=1 + len(self._form.row)))

    def _ask(self, shard: int, first: int, last: int) -> None:
        """Have the system fetch a part of a file while others are waited for."""
        # Where it cannot be opened the read says so.
        with suppress(OSError), open(self._path(shard), "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), first, last - first, os.POSIX_FADV_WILLNEED)

    def _cut(self, pieces: Sequence[tuple[int, int, int]], first: int, last: int) -> np.ndarray:
        form = self._form
        parts = []
        for shard, begin, end in pieces:
            for number, chunk in enumerate(self._chunks(shard, begin, end), begin):
                start = shard * form.shard + number * form.chunk
                parts.append(chunk[max(0, first - start) : max(0, last - start)])
        if not parts:
            return np.empty((0, *form.row), form.dtype)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _chunks(self, shard: int, begin: int, end: int) -> list[np.ndarray]:
        """The chunks of a shard from `begin` up to `end`, each as rows."""
        form, path = self._form, self._path(shard)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(str(error)) from error
        try:
            length = 16 * (form.shard // form.chunk) + CHECKSUM_BYTES
            table = _checked(_read(file, length, os.fstat(file).st_size - length, path), path)
            places = table.view("<u8").reshape(-1, 2)[begin:end]
            if (places[:, 1] != form.chunk_bytes).any() or (places[:, 0] == ABSENT).any():
                raise ValueError(f"{path}: chunks that are not there, among numbers {begin} to {end - 1}")
            at = places[:, 0].astype(np.int64)
            first = int(at.min())
            if int(at.max()) - first == (end - begin - 1) * form.chunk_bytes:
                whole = _read(file, (end - begin) * form.chunk_bytes, first, path)
                read = [whole[place : place + form.chunk_bytes] for place in (at - first).tolist()]
            else:
                read = [_read(file, form.chunk_bytes, place, path) for place in at.tolist()]
        except OSError as error:
            raise ValueError(f"{path}: {error}") from error
        finally:
            os.close(file)
        return [_checked(each, path).view(form.dtype).reshape(-1, *form.row) for each in read]


def _read(file: int, count: int, at: int, path: str) -> np.ndarray:
    """Bytes of a file.

    Raises: ValueError where it has not so many.
    """
    data = os.pread(file, count, at)
    if len(data) != count:
        raise ValueError(f"{path}: {len(data)} bytes from {at} on; expected {count}")
    return np.frombuffer(data, np.uint8)


def _checked(found: np.ndarray, path: str) -> np.ndarray:
    """What comes before a checksum.

    Raises: ValueError where that is of something else.
    """
    contents, checksum = found[:-CHECKSUM_BYTES], found[-CHECKSUM_BYTES:]
    if google_crc32c.value(contents) != int.from_bytes(checksum.tobytes(), "little"):
        raise ValueError(f"{path}: a checksum differs")
    return contents

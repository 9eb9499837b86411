"""Mosaic's MDS shards, read sample by sample without the package that wrote them.

A shard is a count of samples, the offset of each and of the end, the writer's configuration as JSON, and the
samples: sizes of the columns that have no fixed one, then all columns in the order of their names. An
`index.json` beside the shards describes them all. Numbers are little-endian.

Source: MosaicML Streaming, streaming/base/format/mds (writer.py, encodings.py) @002e7dffa.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from mosaicjax import storage
from mosaicjax.data.sources import pyarrow_for
from mosaicjax.errors import InputError

INDEX = "index.json"
SCALARS = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *(f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)),
        *(f"float{bits}" for bits in (16, 32, 64)),
    )
}
ARRAY_DTYPES = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    18: "float16",
    32: "uint32",
    33: "int32",
    34: "float32",
    64: "uint64",
    65: "int64",
    66: "float64",
}
"""What an array's first byte says of its dtype, where the column does not fix it."""
WORDS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "str": lambda data: data.decode(),
    "json": lambda data: json.loads(data.decode()),
    "str_int": lambda data: int(data.decode()),
    "str_float": lambda data: float(data.decode()),
    "str_decimal": lambda data: Decimal(data.decode()),
}
IMAGES = ("pil", "jpeg", "png", "jpeg_array", "jpegarray", "list[jpeg]", "list[pil]", "list[png]")
HASHES = ("sha1", "sha224", "sha256", "sha384", "sha512", "blake2b", "blake2s", "md5")
"""Of those that a writer may have put into the index: what Python's library can compute."""


@dataclass(frozen=True)
class File:
    """A file of a shard as the index describes it. Units: bytes."""

    name: str
    bytes: int
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Shard:
    """One shard: its columns, how many samples it has, and its files; `zipped` where it is compressed."""

    columns: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]
    samples: int
    raw: File
    zipped: File | None
    compression: str

    @property
    def stored(self) -> File:
        """The file that is there."""
        return self.zipped or self.raw


class Mds:
    """A folder of shards, on this machine or on an object store."""

    def __init__(self, folder: str) -> None:
        """Read the index; no shard is touched.

        Raises:
            InputError: there is none, it is no index of MDS shards, or a column is pickled or an image.
        """
        self.folder = folder
        self.path = storage.join(folder, INDEX)
        try:
            contents = json.loads(storage.read_text(self.path))
            if contents["version"] != 2:
                raise InputError(self.path, expected="an index of version 2", got=contents["version"])
            self.shards = tuple(_shard(each) for each in contents["shards"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path} is damaged",
                expected="an index of MDS shards",
                got=f"{type(error).__name__}: {error}",
                fix="restore the file from where the shards were written",
            ) from error
        for shard in self.shards:
            for column, encoding in zip(shard.columns, shard.encodings, strict=True):
                _check(encoding, f"{self.path}, column {column!r}")

    def __len__(self) -> int:
        """How many samples there are."""
        return sum(shard.samples for shard in self.shards)

    @property
    def size_bytes(self) -> int:
        """Of the files as they lie there."""
        return sum(shard.stored.bytes for shard in self.shards)

    def samples(self, columns: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
        """All samples in order, some columns of them or (empty) all; one shard is in memory at a time.

        Raises:
            InputError: a column that is not there, or a shard that is damaged, by its name.
        """
        for shard in self.shards:
            missing = set(columns) - set(shard.columns)
            if missing:
                raise InputError(
                    f"{storage.join(self.folder, shard.raw.name)} lacks the column {min(missing)!r}",
                    expected=list(shard.columns),
                    fix="name the column that holds the text with --field",
                )
            yield from self._read(shard, columns or shard.columns)

    def _read(self, shard: Shard, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        path = storage.join(self.folder, shard.stored.name)
        data = memoryview(self._contents(shard, path))
        starts = np.frombuffer(data[4 : 4 * (shard.samples + 2)], "<u4").tolist()
        count = int.from_bytes(data[:4], "little")
        if count != shard.samples or len(starts) != count + 1 or starts[-1] != len(data):
            raise _damaged(path, f"{shard.samples} samples in {shard.raw.bytes} bytes", f"{count} samples")
        decode = {
            name: decoder(encoding) for name, encoding in zip(shard.columns, shard.encodings, strict=True)
        }
        loose = shard.sizes.count(None)
        for number, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
            at = begin + 4 * loose
            lengths = iter(np.frombuffer(data[begin:at], "<u4").tolist())
            sample = {}
            try:
                for name, size in zip(shard.columns, shard.sizes, strict=True):
                    length = next(lengths) if size is None else size
                    if name in columns:
                        sample[name] = decode[name](bytes(data[at : at + length]))
                    at += length
            except (ValueError, KeyError, IndexError, InvalidOperation) as error:
                raise _damaged(f"{path}, sample {number}", "its encoding's bytes", str(error)) from error
            if at != end:
                raise _damaged(f"{path}, sample {number}", f"{end - begin} bytes", at - begin)
            yield sample

    def _contents(self, shard: Shard, path: str) -> bytes:
        data = storage.read_bytes(path)
        _verify(path, data, shard.stored)
        if shard.zipped is None:
            return data
        try:
            data = decompress(data, shard.compression, shard.raw.bytes)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(path, f"{shard.compression} data", str(error)) from error
        _verify(path, data, shard.raw)
        return data


def decompress(data: bytes, compression: str, size: int) -> bytes:
    """What was compressed, by a name as the index has it: "zstd" or "zstd:7"; `size` bytes come out.

    Raises:
        InputError: an algorithm that is not known, or a library that is not installed.
    """
    name = compression.partition(":")[0]
    if name == "gz":
        return gzip.decompress(data)
    if name == "bz2":
        return bz2.decompress(data)
    codec = {"zstd": "zstd", "br": "brotli", "snappy": "snappy"}.get(name)
    if codec is None:
        raise InputError("MDS compression", expected="br, bz2, gz, snappy or zstd", got=compression)
    found: bytes = pyarrow_for(compression).decompress(data, size, codec=codec, asbytes=True)
    return found


def decoder(encoding: str) -> Callable[[bytes], Any]:
    """What makes a value of a column's bytes; see `_check` for encodings that are refused."""
    name, _, rest = encoding.partition(":")
    if name == "int":
        return lambda data: int(_one(data, SCALARS["int64"]))
    if name in SCALARS:
        return lambda data: _one(data, SCALARS[name])
    if name != "ndarray":
        return WORDS[name]
    dtype, _, shape = rest.partition(":")
    fixed = tuple(map(int, shape.split(","))) if shape else None
    return lambda data: _array(data, dtype, fixed)


def _one(data: bytes, dtype: np.dtype[Any]) -> Any:
    return np.frombuffer(data, dtype).reshape(())[()]


def _array(data: bytes, dtype: str, shape: tuple[int, ...] | None) -> np.ndarray:
    at = 0
    if not dtype:
        dtype, at = ARRAY_DTYPES[data[0]], 1
    if shape is None:
        # Two bits say how wide the sizes are, the others how many.
        dims, width = data[at] >> 2, 2 ** (data[at] & 3)
        shape = tuple(np.frombuffer(data, f"<u{width}", dims, at + 1).tolist())
        at += 1 + dims * width
    values = np.frombuffer(data, SCALARS[dtype], offset=at)
    if values.size != math.prod(shape):
        raise ValueError(f"{values.size} entries for the shape {shape}")
    return values.reshape(shape)


def _check(encoding: str, place: str) -> None:
    name = encoding.partition(":")[0].lower()
    if name == "pkl":
        raise InputError(
            f"{place} is pickled, and reading a pickle runs whatever code it holds",
            expected="text, numbers, arrays or JSON",
            fix="write the shards again with another encoding",
        )
    if name in IMAGES:
        raise InputError(f"{place} holds images", expected="text or tokens", got=encoding)
    known = name in WORDS or name in SCALARS or name in ("int", "ndarray")
    dtype = encoding.split(":")[1] if name == "ndarray" and ":" in encoding else ""
    if not known or (dtype and dtype not in SCALARS):
        raise InputError(f"{place} has an unknown encoding", expected="one of MDS", got=encoding)


def _shard(entry: Mapping[str, Any]) -> Shard:
    if entry["format"] != "mds" or entry["version"] != 2:
        raise ValueError(f"a shard of format {entry['format']} version {entry['version']}")
    zipped = entry["zip_data"]
    sizes = tuple(None if size is None else int(size) for size in entry["column_sizes"])
    names, encodings = tuple(entry["column_names"]), tuple(entry["column_encodings"])
    if not len(names) == len(encodings) == len(sizes):
        raise ValueError("columns without an encoding or a size")
    return Shard(
        columns=names,
        encodings=encodings,
        sizes=sizes,
        samples=int(entry["samples"]),
        raw=_file(entry["raw_data"]),
        zipped=_file(zipped) if zipped else None,
        compression=entry["compression"] or "",
    )


def _file(entry: Mapping[str, Any]) -> File:
    return File(str(entry["basename"]), int(entry["bytes"]), dict(entry["hashes"]))


def _verify(path: str, data: bytes, file: File) -> None:
    if len(data) != file.bytes:
        raise _damaged(path, f"{file.bytes} bytes", len(data))
    for name, digest in file.hashes.items():
        if name in HASHES and (found := hashlib.new(name, data).hexdigest()) != digest:
            raise _damaged(path, f"{name} {digest}", found)


def _damaged(path: str, expected: object, got: object) -> InputError:
    return InputError(f"{path} is damaged", expected=expected, got=got, fix="restore the file")

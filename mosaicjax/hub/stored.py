"""One tensor in a foreign file: where its bytes lie, and how to look at them without loading the file."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from mosaicjax import storage
from mosaicjax.errors import InputError
from mosaicjax.spec import DtypeName

FLOATS: dict[str, DtypeName] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The number formats that weights are read in, as safetensors calls them."""

FLOAT_NAMES = {name: short for short, name in FLOATS.items()}

SIZES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
}
"""Bytes of a number, for every format of whole bytes that safetensors knows."""

_NUMPY = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_TILE = 128
_LARGEST_HALF = float(np.finfo(np.float16).max)


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of `float32`, `bfloat16` or `float16`."""
    return _NUMPY[name]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    `dtype` is safetensors' name of it. Its bytes are `begin` to `end` of the file; `strides` counts elements.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Units: bytes of the tensor, whatever its file holds beside."""
        return math.prod(self.shape) * SIZES[self.dtype]

    def check_float(self) -> None:
        """Refuse a number format that weights are not read in.

        Raises:
            InputError: with file and tensor.
        """
        if self.dtype not in FLOATS:
            raise InputError(
                f"{self.file}: tensor {self.name} is of a dtype that weights are not read in",
                expected=", ".join(FLOATS),
                got=self.dtype,
            )

    @contextlib.contextmanager
    def open(self) -> Iterator[np.ndarray]:
        """The tensor, read-only, mapped from its bytes of the file alone; they leave memory with the block.

        Raises:
            InputError: the file cannot be read, or has become shorter.
        """
        self.check_float()
        dtype = numpy_dtype(FLOATS[self.dtype])
        with _bytes_of(self.file, self.begin, self.end) as data:
            if len(data) != self.end - self.begin:
                raise InputError(f"{self.file} became shorter while it was read: tensor {self.name}")
            flat = np.frombuffer(data, dtype) if len(data) else np.empty(0, dtype)
            steps = [stride * dtype.itemsize for stride in self.strides]
            yield np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a row-major tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@contextlib.contextmanager
def _bytes_of(path: str, begin: int, end: int) -> Iterator[memoryview]:
    if begin == end or storage.is_remote(path):
        yield memoryview(storage.read_range(path, begin, end) if end > begin else b"")
        return
    first = begin - begin % mmap.ALLOCATIONGRANULARITY
    if storage.file_size(path) < end:
        yield memoryview(b"")
        return
    with open(storage.local(path), "rb") as file:
        mapped = mmap.mmap(file.fileno(), end - first, access=mmap.ACCESS_READ, offset=first)
    # Weights are read across their rows: without this every page of a cold file would be a read of its own.
    mapped.madvise(mmap.MADV_WILLNEED)
    try:
        yield memoryview(mapped)[begin - first :]
    finally:
        # Not closed: an array may still look at it, and is then read again. Its pages leave memory now.
        mapped.madvise(mmap.MADV_DONTNEED)


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` for arrays of one dtype whose axes lie in different orders in memory.

    Both sides are walked in tiles that stay in the cache; numpy alone would fetch a line for every element.
    """
    assert target.dtype == source.dtype and target.shape == source.shape
    bits = np.dtype(f"u{source.dtype.itemsize}")
    target, source = target.view(bits), source.view(bits)
    theirs, ours = _fastest(source), _fastest(target)
    if source.size <= _TILE * _TILE or theirs == ours:
        target[...] = source
        return
    order = [axis for axis in range(source.ndim) if axis != theirs] + [theirs]
    back = np.argsort(order)
    others = [range(size) for axis, size in enumerate(source.shape) if axis not in (theirs, ours)]
    grid = np.ndindex(*(len(other) for other in others))
    for place in grid:
        rest = iter(place)
        index: list[slice] = []
        for axis in range(source.ndim):
            if axis in (theirs, ours):
                index.append(slice(None))
            else:
                at = next(rest)
                index.append(slice(at, at + 1))
        for i in range(0, source.shape[theirs], _TILE):
            for j in range(0, source.shape[ours], _TILE):
                index[theirs], index[ours] = slice(i, i + _TILE), slice(j, j + _TILE)
                tile = np.ascontiguousarray(source[tuple(index)].transpose(order))
                target[tuple(index)] = tile.transpose(back)


def _fastest(array: np.ndarray) -> int:
    """The axis along which neighbours lie closest in memory."""
    wide = [axis for axis, size in enumerate(array.shape) if size > 1]
    return min(wide, key=lambda axis: abs(array.strides[axis]), default=0)


def cast(array: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """The numbers in another format, rounded to the nearest.

    Raises:
        InputError: numbers too large for float16.
    """
    if array.dtype == dtype:
        return array
    if dtype == np.float16:
        wide = array.astype(np.float32)
        if (np.isfinite(wide) & (np.abs(wide) > _LARGEST_HALF)).any():
            raise InputError(
                f"{where} has numbers that float16 cannot hold",
                expected=f"at most {_LARGEST_HALF:g}",
                got=f"{np.nanmax(np.abs(wide)):g}",
                fix="--dtype bfloat16 or float32",
            )
    return array.astype(dtype)

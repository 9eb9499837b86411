"""The safetensors format, read and written a tensor at a time.

A file is the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape, offsets) and
the tensors' bytes, one behind the other without holes.

Source: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import IO, Any

import numpy as np

from mosaicjax import storage
from mosaicjax.errors import InputError
from mosaicjax.hub.stored import FLOAT_NAMES, SIZES, Stored, contiguous_strides
from mosaicjax.spec import DtypeName

_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000
_METADATA = "__metadata__"
_ALIGNMENT = 8


def read_tensors(path: str) -> dict[str, Stored]:
    """Every tensor of a file by name; the header alone is read.

    Raises:
        InputError: a file that is missing, truncated, or contradicts itself, with the tensor.
    """
    size = storage.file_size(path)
    header, start = _header(path, size)
    found: dict[str, Stored] = {}
    for name, entry in header.items():
        if name != _METADATA:
            found[name] = _stored(path, name, entry, start)
    _check_offsets(path, found, start, size)
    return found


def _header(path: str, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(storage.read_range(path, 0, _LENGTH_BYTES), "little")
    start = _LENGTH_BYTES + length
    if size < _LENGTH_BYTES or length > _LARGEST_HEADER:
        raise InputError(f"{path} is no safetensors file", expected="a header's length and the header")
    if start > size:
        raise InputError(
            f"{path} is truncated: its header is cut off", expected=f"at least {start} bytes", got=size
        )
    try:
        text = storage.read_range(path, _LENGTH_BYTES, start).decode("utf-8")
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is no safetensors file: its header is no JSON", got=error) from error
    if not isinstance(header, dict):
        raise InputError(f"{path} is no safetensors file", expected="a JSON object as its header")
    return header, start


def _unique(path: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise InputError(f"{path} lists tensor {twice[0]} twice")
    return dict(pairs)


def _stored(path: str, name: str, entry: Any, start: int) -> Stored:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise InputError(f"{where} is not described", expected="dtype, shape and data_offsets", got=entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise InputError(f"{where} is of an unknown dtype", expected=", ".join(SIZES), got=dtype)
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise InputError(f"{where} has a wrong {what}", expected="a list of whole numbers", got=numbers)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(
            f"{where} has wrong data_offsets", expected="its first byte and the one after its last"
        )
    needed = math.prod(shape) * SIZES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise InputError(
            f"{where} has data_offsets that contradict its shape {shape}",
            expected=f"{needed} bytes",
            got=offsets[1] - offsets[0],
        )
    begin, end = (start + offset for offset in offsets)
    return Stored(name, path, dtype, tuple(shape), begin, end, contiguous_strides(tuple(shape)))


def _check_offsets(path: str, found: Mapping[str, Stored], start: int, size: int) -> None:
    """Every byte behind the header belongs to one tensor."""
    at, before = start, ""
    for tensor in sorted(found.values(), key=lambda each: (each.begin, each.end)):
        if tensor.begin < at:
            raise InputError(f"{path}: tensor {tensor.name} overlaps tensor {before}")
        if tensor.begin > at:
            raise InputError(f"{path}: {tensor.begin - at} bytes before tensor {tensor.name} belong to none")
        if tensor.end > size:
            raise InputError(
                f"{path} is truncated: tensor {tensor.name} is cut off",
                expected=f"at least {tensor.end} bytes",
                got=size,
            )
        at, before = tensor.end, tensor.name
    if at != size:
        raise InputError(f"{path} is longer than its header says", expected=f"{at} bytes", got=size)


def header_bytes(tensors: Iterable[tuple[str, DtypeName, tuple[int, ...]]]) -> bytes:
    """What a file of these tensors begins with: name, dtype and shape of each, in the file's order."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        short = FLOAT_NAMES[dtype]
        end = at + math.prod(shape) * SIZES[short]
        header[name] = {"dtype": short, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def write_tensor(file: IO[bytes], array: np.ndarray) -> None:
    """Append one tensor; the file holds the header and the tensors before it."""
    assert array.flags.c_contiguous
    file.write(array.reshape(-1).view(np.uint8).data)

"""PyTorch's `.bin` checkpoints (its zip format), read without running what a pickle may say.

The archive holds `data.pkl`, which describes the tensors, and `data/<key>` with the bytes of each storage.
The pickle is read by a machine that knows tensors, storages and dicts and refuses to import anything else.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mosaicjax import storage
from mosaicjax.errors import InputError
from mosaicjax.hub.stored import SIZES, Stored

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
_LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Rebuild:
    """What stands in for `torch._utils._rebuild_tensor_v2`; nothing can be hung onto it."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
            raise pickle.UnpicklingError("a tensor with wrong sizes")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter:
    """What stands in for `torch._utils._rebuild_parameter`."""

    __slots__ = ()

    def __call__(self, data: Any, *rest: Any) -> Any:
        return data


@dataclass(frozen=True, slots=True)
class _StorageKind:
    dtype: str


class _Unpickler(pickle.Unpickler):
    """Knows tensors, storages and ordered dicts; whatever else is to be imported is refused."""

    def __init__(self, path: str, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _RebuildParameter()
        if module == "torch" and name in _STORAGES:
            return _StorageKind(_STORAGES[name])
        raise InputError(
            f"{self._path} wants to run code: its pickle imports {module}.{name}",
            expected="tensors alone",
            fix="a file from someone you trust, saved as safetensors",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageKind(dtype), str(key), _, int(count)):
                return _Storage(key, dtype, count)
        raise pickle.UnpicklingError("a storage of an unknown kind")


def read_tensors(path: str) -> dict[str, Stored]:
    """Every tensor of a `.bin` file by name; of their bytes nothing is read.

    Raises:
        InputError: a file that is missing, damaged, of torch's old format, or whose pickle imports anything.
    """
    if storage.read_range(path, 0, 4) != b"PK\x03\x04":
        raise InputError(
            f"{path} is of the format that torch wrote before 1.6, or no checkpoint",
            expected="torch's zip format",
            fix="load and save it again with torch, best as safetensors",
        )
    members = _members(path)
    pickled = next((name for name in members if name.split("/", 1)[-1] == "data.pkl"), None)
    if pickled is None:
        raise InputError(f"{path} is no checkpoint of torch: it lacks data.pkl")
    root = pickled.removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order is not None and storage.read_range(path, *order) != b"little":
        raise InputError(f"{path} was written by a big-endian machine", fix="save it again on another one")
    described = _unpickle(path, storage.read_range(path, *members[pickled]))
    return {name: _stored(path, name, tensor, members, root) for name, tensor in described.items()}


def _members(path: str) -> dict[str, tuple[int, int]]:
    """First byte and the one after the last of each member of the archive."""
    found = {}
    try:
        with storage.reading(path) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise InputError(f"{path} is compressed: {info.filename}", fix="save it again with torch")
                file.seek(info.header_offset)
                local = file.read(_LOCAL_HEADER_BYTES)
                # The local header's name and extra field, whose length differs from the directory's.
                lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                begin = info.header_offset + _LOCAL_HEADER_BYTES + lengths
                found[info.filename] = (begin, begin + info.file_size)
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from error
    return found


def _unpickle(path: str, data: bytes) -> Mapping[str, _Tensor]:
    try:
        described = _Unpickler(path, data).load()
    except InputError:
        raise
    except Exception as error:
        # A damaged pickle can make the machine raise nearly anything.
        raise InputError(f"{path}: its pickle cannot be read: {error}") from error
    if not isinstance(described, Mapping):
        raise InputError(f"{path} holds no weights by name", got=type(described).__name__)
    for name, value in described.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise InputError(
                f"{path}: {name} is no tensor", expected="weights by name", got=type(value).__name__
            )
    return described


def _stored(
    path: str, name: str, tensor: _Tensor, members: Mapping[str, tuple[int, int]], root: str
) -> Stored:
    place = members.get(f"{root}data/{tensor.storage.key}")
    size = SIZES[tensor.storage.dtype]
    reach = 0
    if 0 not in tensor.shape:
        reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if place is None or (tensor.offset + reach) * size > place[1] - place[0]:
        raise InputError(
            f"{path}: tensor {name} lies outside its storage",
            expected=f"{(tensor.offset + reach) * size} bytes in data/{tensor.storage.key}",
            got=0 if place is None else place[1] - place[0],
        )
    begin = place[0] + tensor.offset * size
    return Stored(name, path, tensor.storage.dtype, tensor.shape, begin, begin + reach * size, tensor.strides)

"""A model's directory in Hugging Face's format: its configuration, and where each of its tensors lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mosaicjax import storage
from mosaicjax.errors import InputError
from mosaicjax.hub import safetensors_file, torch_file
from mosaicjax.hub.stored import FLOATS, Stored
from mosaicjax.models.families import family_of
from mosaicjax.models.family import Family
from mosaicjax.models.hf_config import HfConfig
from mosaicjax.models.names import Foreign, Names, foreign_tensors
from mosaicjax.spec import DtypeName, Spec

CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX_SUFFIX = ".index.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The names under which weights are found, or an index of their shards; the first is taken."""

LENGTHS = ("max_position_embeddings", "max_seq_len", "n_positions")
"""Keys that say how many positions a model was made for."""

_SAMPLE_BYTES = 2**20


@dataclass(frozen=True)
class ForeignModel:
    """A foreign model, of which nothing but headers has been read.

    `tensors` are all that hold its weights, each with its place; `unread` the keys of its configuration that
    may matter and were not read; `dtypes` those of its tensors.
    """

    path: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    family: Family
    tensors: tuple[tuple[Foreign, Stored], ...]
    unread: tuple[str, ...]

    @property
    def spec(self) -> Spec:
        """Our declaration of its weights."""
        return self.family.decoder().spec()

    @property
    def length(self) -> int:
        """How many positions it was made for; 0 where its configuration does not say."""
        return next((int(self.config[key]) for key in LENGTHS if self.config.get(key)), 0)

    @property
    def dtypes(self) -> tuple[DtypeName, ...]:
        """The number formats of its weights."""
        return tuple(sorted({FLOATS[stored.dtype] for _, stored in self.tensors}))

    @property
    def dtype(self) -> DtypeName:
        """The format that holds all its weights exactly: theirs, or float32 where they have several."""
        return self.dtypes[0] if len(self.dtypes) == 1 else "float32"

    @property
    def nbytes(self) -> int:
        """Units: bytes of its weights as they are stored."""
        return sum(stored.nbytes for _, stored in self.tensors)

    def digest(self) -> str:
        """SHA-256 of the configuration, and of each file's name, size, and first and last MiB."""
        whole = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        for file in sorted({stored.file for _, stored in self.tensors}):
            size = storage.file_size(file)
            whole.update(f"{file.rsplit('/', 1)[-1]} {size}".encode())
            whole.update(storage.read_range(file, 0, _SAMPLE_BYTES))
            whole.update(storage.read_range(file, max(0, size - _SAMPLE_BYTES), size))
        return whole.hexdigest()


def is_foreign(path: storage.PathLike) -> bool:
    """Whether a directory looks like a model in Hugging Face's format."""
    return storage.exists(storage.join(path, CONFIG))


def open_model(path: storage.PathLike) -> ForeignModel:
    """Open a foreign model and check every tensor's name, shape and dtype against its configuration.

    Raises:
        InputError: a file that is missing or damaged, a family or knob that is not known, tensors that are
            missing, unexpected or of another shape than `config.json` says.
    """
    where = storage.join(path, CONFIG)
    values, generation = read_configs(path)
    config = HfConfig(values, where)
    family = family_of(values, where).from_hf(config)
    stored = find_tensors(path)
    tensors = match(foreign_tensors(family.decoder(), family.names()), family.names(), stored, str(path))
    return ForeignModel(str(path), values, generation, family, tensors, tuple(config.unread()))


def read_configs(path: storage.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a model, and of its generation; the latter may be missing and is then empty.

    Raises:
        InputError: there is no model, or a file is no JSON object.
    """
    where, generation = storage.join(path, CONFIG), storage.join(path, GENERATION)
    if not storage.exists(where):
        raise InputError(f"{path} holds no model", expected=CONFIG, got=_shown(storage.list_dir(path)))
    return read_object(where), read_object(generation) if storage.exists(generation) else {}


def read_object(path: str) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        InputError: it is missing or no JSON object.
    """
    try:
        values = json.loads(storage.read_text(path))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is no JSON", got=error) from error
    if not isinstance(values, dict):
        raise InputError(f"{path}", expected="a JSON object", got=type(values).__name__)
    return values


def find_tensors(path: storage.PathLike) -> dict[str, Stored]:
    """All tensors of a directory by name.

    Raises:
        InputError: no weights, a missing shard, or a file that contradicts itself or the index.
    """
    listed = storage.list_dir(path)
    for name in WEIGHTS:
        if name in listed:
            return _read(storage.join(path, name))
        if name + INDEX_SUFFIX in listed:
            return _read_shards(path, name + INDEX_SUFFIX, listed)
    raise InputError(
        f"{path} holds no weights",
        expected=" or ".join(f"{name}, {name}{INDEX_SUFFIX}" for name in WEIGHTS),
        got=_shown(listed),
    )


def _read(path: str) -> dict[str, Stored]:
    reader = safetensors_file if path.endswith(".safetensors") else torch_file
    return reader.read_tensors(path)


def _read_shards(path: storage.PathLike, index: str, listed: list[str]) -> dict[str, Stored]:
    where = storage.join(path, index)
    places = read_object(where).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{where} does not say which file holds which tensor", expected="a weight_map")
    found: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        if file not in listed:
            lost = sorted(name for name, at in places.items() if at == file)
            raise InputError(
                f"{storage.join(path, file)} is missing: {len(lost)} tensors lie in it, as {lost[0]}",
                expected=f"every file that {where} names",
            )
        for name, stored in _read(storage.join(path, file)).items():
            if name in found:
                raise InputError(f"tensor {name} lies in two files", got=f"{found[name].file}, {stored.file}")
            found[name] = stored
    for name, file in places.items():
        if name not in found or found[name].file != storage.join(path, file):
            raise InputError(f"{storage.join(path, file)} lacks tensor {name}, which {where} says it holds")
    return found


def match(
    wanted: list[Foreign], names: Names, stored: Mapping[str, Stored], path: str
) -> tuple[tuple[Foreign, Stored], ...]:
    """Every tensor of a model with its place in the files.

    Raises:
        InputError: a tensor is missing, of another shape or of a dtype that weights are not read in, or there
            are tensors that the model does not have.
    """
    left = dict(stored)
    known = {foreign.name for foreign in wanted} | {
        foreign.name.removeprefix(names.base) for foreign in wanted
    }
    pairs = []
    for foreign in wanted:
        short = foreign.name.removeprefix(names.base)
        found = left.pop(foreign.name, None) or left.pop(short, None)
        if found is None:
            raise InputError(
                f"{path} lacks tensor {foreign.name}",
                expected=f"a shape of {list(foreign.shape)}",
                got=_shown([name for name in left if name not in known and not names.ignores(name)]),
            )
        if found.shape != foreign.shape:
            raise InputError(
                f"{found.file}: tensor {found.name} has a shape that contradicts {CONFIG}",
                expected=list(foreign.shape),
                got=list(found.shape),
            )
        found.check_float()
        pairs.append((foreign, found))
    for name, extra in left.items():
        if not names.ignores(name) and not names.ignores(names.base + name):
            raise InputError(
                f"{extra.file}: tensor {name} is not one of the model that {CONFIG} describes",
                got=f"{extra.dtype} {list(extra.shape)}",
            )
    return tuple(pairs)


def _shown(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"

"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, written and read.

A module of PEFT is one foreign tensor, which may hold several of our weights (a fused `Wqkv`). Ours have each
its own adapter: written, the module's rank is the sum of theirs, with zeros between; read, each has the whole
module's `lora_A`. Both are exact.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint, for PEFT 0.21.2.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mosaicjax import storage
from mosaicjax.adapters import RANK, Adapter
from mosaicjax.errors import InputError
from mosaicjax.hub import torch_file
from mosaicjax.hub.foreign_dir import read_object
from mosaicjax.hub.safetensors_file import header_bytes, read_tensors, write_tensor
from mosaicjax.hub.stored import Stored
from mosaicjax.methods.lora import summed_dims
from mosaicjax.models.decoder import Decoder
from mosaicjax.models.family import Family
from mosaicjax.models.names import Foreign, Part, Piece, Tensor, foreign_tensors
from mosaicjax.spec import Param

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_TORCH = "adapter_model.bin"
_PREFIX, _SUFFIX = "base_model.model.", ".weight"
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "lora_bias": (False, None),
}
"""Keys of a configuration that must have one of these values, or be missing."""


@dataclass(frozen=True)
class Module:
    """One module's adapter as PEFT has it, adding `scale` * B A; A [rank, in], B [out, rank]."""

    name: str
    a: np.ndarray
    b: np.ndarray
    transposed: bool

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


def is_peft(path: storage.PathLike) -> bool:
    """Whether a directory looks like an adapter in PEFT's format."""
    return storage.exists(storage.join(path, CONFIG))


def base_of(path: storage.PathLike) -> str:
    """The directory of the model that an adapter is for.

    Raises:
        InputError: it names none, or one that is not on this machine.
    """
    where = storage.join(path, CONFIG)
    base = read_object(where).get("base_model_name_or_path")
    if not isinstance(base, str) or not storage.list_dir(base):
        raise InputError(
            f"{where}: its base model is not here",
            expected="base_model_name_or_path of a directory with the model",
            got=repr(base),
            fix="download the model, and write its directory there",
        )
    return base


def digest(path: storage.PathLike) -> str:
    """SHA-256 of an adapter's files."""
    whole = hashlib.sha256()
    for name in (CONFIG, WEIGHTS, _TORCH):
        file = storage.join(path, name)
        if storage.exists(file):
            whole.update(storage.read_range(file, 0, storage.file_size(file)))
    return whole.hexdigest()


def write_adapters(
    family: Family, adapters: Mapping[str, Adapter], base: str, folder: storage.PathLike
) -> int:
    """Write the adapters of a family's weights, by names as in `Spec.items`; how many numbers that is.

    Raises:
        InputError: the family has no Hugging Face form.
    """
    tensors = foreign_tensors(family.decoder(), family.names())
    modules = list(modules_of(tensors, adapters))
    one = next(iter(adapters.values()))
    with storage.appending(storage.join(folder, WEIGHTS)) as opened:
        named = [
            (f"{_PREFIX}{module.name}.lora_{part}{_SUFFIX}", array)
            for module in modules
            for part, array in (("A", module.a), ("B", module.b))
        ]
        opened.write(header_bytes([(name, "float32", array.shape) for name, array in named]))
        for _, array in named:
            write_tensor(opened, array)
    every = [foreign.name.removesuffix(_SUFFIX) for foreign in tensors]
    storage.write_text(storage.join(folder, CONFIG), _json(_config(modules, every, one, base)))
    return sum(array.size for _, array in named)


def _json(values: Any) -> str:
    return json.dumps(values, indent=2) + "\n"


def _config(modules: Sequence[Module], every: Sequence[str], one: Adapter, base: str) -> dict[str, Any]:
    """The configuration of adapters that share a scale."""
    names = [module.name for module in modules]
    # PEFT takes a name's end for all modules that end so.
    ends = {name: ".".join(name.split(".")[-2:]) for name in names}
    short = {name for name in every if any(name.endswith(f".{end}") for end in ends.values())} == set(names)
    called = ends if short else dict(zip(names, names, strict=True))
    ranks = {called[module.name]: module.rank for module in modules}
    rank = min(ranks.values())
    others = {name: each for name, each in ranks.items() if each != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": rank,
        "lora_alpha": _number(one.scale * rank),
        "rank_pattern": others,
        "alpha_pattern": {name: _number(one.scale * each) for name, each in others.items()},
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(module.transposed for module in modules),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def modules_of(tensors: Sequence[Foreign], adapters: Mapping[str, Adapter]) -> Iterator[Module]:
    """Adapters as PEFT's modules, in the order of the foreign tensors."""
    for foreign in tensors:
        mine = [piece for piece in foreign.pieces if piece.leaf in adapters]
        if not mine:
            continue
        halves = _Halves(foreign, adapters[mine[0].leaf].summed)
        rank = sum(adapters[piece.leaf].b[piece.index].shape[0] for piece in mine)
        a, b = np.zeros((rank, halves.size(0)), np.float32), np.zeros((halves.size(1), rank), np.float32)
        first = 0
        for piece in mine:
            one = adapters[piece.leaf]
            last = first + one.b[piece.index].shape[0]
            halves.a(a[first:last], piece)[...] = one.a[piece.index]
            halves.b(b[:, first:last], piece)[...] = one.b[piece.index]
            first = last
        yield Module(foreign.name.removesuffix(_SUFFIX), a, b, halves.transposed)


class _Halves:
    """Where each weight of a foreign tensor has its part in the module's A and B."""

    def __init__(self, foreign: Foreign, summed: int) -> None:
        self._foreign, self._summed = foreign, summed
        part, piece = foreign.tensor.parts[0], foreign.pieces[0]
        into = set(piece.axes[:summed])
        # As [in, out].
        self.transposed = set(part.dims[0].split()) <= into
        self._out = 1 if self.transposed else 0

    def size(self, half: int) -> int:
        """How many numbers go in (0), or come out (1)."""
        return self._foreign.shape[self._out if half else 1 - self._out]

    def a(self, array: np.ndarray, piece: Piece) -> np.ndarray:
        """A view [*in, rank] of rows of A."""
        into = self._part(piece).dims[1 - self._out]
        tensor = Tensor("", (Part(piece.weight, (RANK, into)),))
        return tensor.view(
            array, piece.weight, (*piece.axes[: self._summed], RANK), self._dims(array.shape[0])
        )

    def b(self, array: np.ndarray, piece: Piece) -> np.ndarray:
        """A view [rank, *out] of columns of B."""
        parts = tuple(Part(part.weight, (part.dims[self._out], RANK)) for part in self._foreign.tensor.parts)
        axes = (RANK, *piece.axes[self._summed :])
        return Tensor("", parts).view(array, piece.weight, axes, self._dims(array.shape[1]))

    def _part(self, piece: Piece) -> Part:
        return next(part for part in self._foreign.tensor.parts if part.weight == piece.weight)

    def _dims(self, rank: int) -> dict[str, int]:
        return {**self._foreign.dims, RANK: rank}


def read_adapters(path: storage.PathLike, family: Family) -> dict[str, Adapter]:
    """An adapter's matrices by our weights' names, in float32, with all its scales in b.

    Modules of a stacked weight that the adapter leaves out have zeros.

    Raises:
        InputError: another method than LoRA, modules that the model lacks or that are not adapted here, or
            matrices of other shapes.
    """
    config = read_object(storage.join(path, CONFIG))
    for key, plain in _PLAIN.items():
        if key in config and config[key] not in plain:
            raise InputError(
                f"{storage.join(path, CONFIG)}: {key} is not read here", expected=plain[0], got=config[key]
            )
    stored = _stored(path)
    decoder = family.decoder()
    found: dict[str, dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]] = {}
    params = dict(decoder.spec().items())
    for foreign in foreign_tensors(decoder, family.names()):
        name = foreign.name.removesuffix(_SUFFIX)
        keys = [f"{_PREFIX}{name}.lora_{part}{_SUFFIX}" for part in "AB"]
        if not any(key in stored for key in keys):
            continue
        summed = {summed_dims(piece.leaf, params[piece.leaf]) for piece in foreign.pieces}
        if len(summed) != 1 or 0 in summed:
            raise InputError(f"{path} adapts {name}, which is no matrix that LoRA adapts here")
        halves = _Halves(foreign, summed.pop())
        a, b = _both(stored, keys, halves)
        scaled = b * np.float32(_scale(config, name, a.shape[0]))
        for piece in foreign.pieces:
            mine = np.array(halves.a(a, piece)), np.array(halves.b(scaled, piece))
            found.setdefault(piece.leaf, {})[piece.index] = mine
    if stored or not found:
        raise InputError(
            f"{path} holds adapters of modules that its model lacks",
            expected=f"{_PREFIX}MODULE.lora_A{_SUFFIX} and lora_B of the model's modules",
            got=", ".join(sorted(stored)[:3]) or "none",
        )
    return {leaf: _stacked(leaf, params[leaf], decoder, each) for leaf, each in found.items()}


def _stored(path: storage.PathLike) -> dict[str, Stored]:
    if storage.exists(storage.join(path, WEIGHTS)):
        return dict(read_tensors(storage.join(path, WEIGHTS)))
    if storage.exists(storage.join(path, _TORCH)):
        return dict(torch_file.read_tensors(storage.join(path, _TORCH)))
    raise InputError(f"{path} holds no adapters", expected=f"{WEIGHTS} or {_TORCH}")


def _both(stored: dict[str, Stored], keys: Sequence[str], halves: _Halves) -> tuple[np.ndarray, np.ndarray]:
    """A module's A and B, taken out of what is left of the file."""
    arrays = []
    for key in keys:
        one = stored.pop(key, None)
        if one is None:
            raise InputError(f"an adapter lacks {key}", expected="lora_A and lora_B of each module")
        one.check_float()
        with one.open() as array:
            arrays.append(np.array(array, np.float32))
    a, b = arrays
    rank = a.shape[0]
    if a.shape != (rank, halves.size(0)) or b.shape != (halves.size(1), rank):
        raise InputError(
            f"{keys[0]} and lora_B have other shapes than the model's",
            expected=f"[rank, {halves.size(0)}] and [{halves.size(1)}, rank]",
            got=f"{list(a.shape)} and {list(b.shape)}",
        )
    return a, b


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """A module's scale; patterns are regular expressions of a name's end, as PEFT takes them."""
    patterns = config.get("alpha_pattern") or {}
    ends = (pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = float(patterns.get(next(ends, ""), config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _stacked(
    leaf: str, param: Param, decoder: Decoder, each: Mapping[tuple[int, ...], tuple[np.ndarray, np.ndarray]]
) -> Adapter:
    """One adapter of all layers of a weight, of the largest rank among them."""
    assert param.layers is not None, "only layers' matrices are adapted"
    summed, dims = summed_dims(leaf, param), decoder.spec().dims
    rank = max(b.shape[0] for _, b in each.values())
    sizes = [dims[axis] for axis in param.axes]
    a = np.zeros((param.layers.count, *sizes[:summed], rank), np.float32)
    b = np.zeros((param.layers.count, rank, *sizes[summed:]), np.float32)
    for (turn,), (mine, other) in each.items():
        a[turn, ..., : mine.shape[-1]] = mine
        b[turn, : other.shape[0]] = other
    return Adapter(a, b, 1.0, summed)

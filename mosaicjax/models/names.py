"""Where a model's weights lie in a foreign checkpoint: one table a family, read in both directions.

A table says of each foreign tensor which weights it holds, and which of their axes make up each of its dims.
From that follows a view of the foreign array with a weight's own axes: reading copies out of the view,
writing into it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mosaicjax.models.decoder import Decoder
from mosaicjax.spec import LAYER_KEY, Dims, Param

PART = "part"
"""The axis of a foreign tensor that numbers the weights interleaved in it."""

EXPERTS = "experts"
"""The axis of a weight that `{expert}` in a foreign name runs over."""


@dataclass(frozen=True)
class Part:
    """One weight in a foreign tensor.

    `weight` is its path in a layer (`attention/query`), or in the model (`embed/tokens`) for tensors that are
    no layer's. `dims` names the axes that make up each dim of the foreign tensor, major first, such as
    `("heads head_dim", "embed")`.
    """

    weight: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Tensor:
    """A foreign tensor. `{layer}` in its name makes it one a layer, `{expert}` one an expert.

    Several parts lie one behind the other along the dim `joined`, unless their dims name the axis `PART`,
    which then numbers them.
    """

    name: str
    parts: tuple[Part, ...]
    joined: int = 0

    @property
    def interleaved(self) -> bool:
        """Whether an axis of the tensor numbers its parts."""
        return any(PART in dim.split() for dim in self.parts[0].dims)

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """The foreign tensor's shape."""
        shapes = [list(self._part_shape(part, dims)) for part in self.parts]
        if not self.interleaved:
            shapes[0][self.joined] = sum(shape[self.joined] for shape in shapes)
        return tuple(shapes[0])

    def view(self, foreign: np.ndarray, weight: str, axes: Sequence[str], dims: Dims) -> np.ndarray:
        """A weight's place in the foreign array, with the weight's own axes; nothing is copied.

        Shapes: `foreign` is like `shape`; `axes` are the weight's, in a tensor an expert without the experts.
        """
        number = next(i for i, part in enumerate(self.parts) if part.weight == weight)
        part = self.parts[number]
        if not self.interleaved:
            sizes = [self._part_shape(each, dims)[self.joined] for each in self.parts]
            begin = sum(sizes[:number])
            foreign = foreign[(slice(None),) * self.joined + (slice(begin, begin + sizes[number]),)]
        names = [axis for dim in part.dims for axis in dim.split()]
        split = foreign.reshape([self._sizes(dims)[axis] for axis in names], copy=False)
        if PART in names:
            split = split[tuple(number if axis == PART else slice(None) for axis in names)]
            names.remove(PART)
        return split.transpose([names.index(axis) for axis in axes])

    def _sizes(self, dims: Dims) -> dict[str, int]:
        return {**dims, PART: len(self.parts)}

    def _part_shape(self, part: Part, dims: Dims) -> tuple[int, ...]:
        sizes = self._sizes(dims)
        return tuple(math.prod(sizes[axis] for axis in dim.split()) for dim in part.dims)


def whole(name: str, weight: str, *dims: str) -> Tensor:
    """A foreign tensor that holds one weight; `dims` as in `Part`."""
    return Tensor(name, (Part(weight, dims),))


@dataclass(frozen=True)
class Names:
    """A family's table.

    Entries for weights that a model lacks (its biases, an untied head) count for nothing. `base` is the
    prefix that checkpoints of the model without its head leave out. `ignored` are patterns of foreign tensors
    that hold nothing of the model's: buffers, and copies of tied weights.
    """

    tensors: tuple[Tensor, ...]
    base: str = ""
    ignored: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        """Whether a foreign tensor holds nothing of the model's."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored)


@dataclass(frozen=True)
class Piece:
    """A weight, or one layer or expert of it, in a foreign tensor.

    `leaf` is its name in `Spec.items`, `index` selects along the leaf's leading dims, `axes` name the rest.
    """

    leaf: str
    index: tuple[int, ...]
    weight: str
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Foreign:
    """One foreign tensor of one model, with all that lies in it."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    dims: Mapping[str, int]

    def view(self, foreign: np.ndarray, piece: Piece) -> np.ndarray:
        """The piece's place in the foreign array, with the piece's own axes; nothing is copied."""
        return self.tensor.view(foreign, piece.weight, piece.axes, self.dims)


def foreign_tensors(decoder: Decoder, names: Names) -> list[Foreign]:
    """All foreign tensors of a model, layer by layer; every weight lies in exactly one place of them."""
    spec = decoder.spec()
    params = dict(spec.items())
    found: list[Foreign] = []
    layers = _layers(params)
    for tensor in names.tensors:
        if "{layer}" not in tensor.name:
            tree = {name: (name, (), params[name].axes) for name in params if f"/{LAYER_KEY}/" not in name}
            found += _instances(tensor, tensor.name, tree, spec.dims)
    for number in sorted(layers):
        for tensor in names.tensors:
            if "{layer}" in tensor.name:
                name = tensor.name.replace("{layer}", str(number))
                found += _instances(tensor, name, layers[number], spec.dims)
    _check_total(found, params, spec.dims)
    return found


_Placed = tuple[str, tuple[int, ...], tuple[str, ...]]


def _layers(params: Mapping[str, Param]) -> dict[int, dict[str, _Placed]]:
    """For each layer of the model, its weights by short name: leaf, index and axes."""
    layers: dict[int, dict[str, _Placed]] = {}
    for leaf, param in params.items():
        if param.layers is None:
            continue
        short = leaf.split(f"/{LAYER_KEY}/", 1)[1]
        for turn in range(param.layers.count):
            number = param.layers.first + turn * param.layers.stride
            layers.setdefault(number, {})[short] = (leaf, (turn,), param.axes)
    return layers


def _instances(tensor: Tensor, name: str, tree: Mapping[str, _Placed], dims: Dims) -> list[Foreign]:
    present = [part.weight in tree for part in tensor.parts]
    if not any(present):
        return []
    assert all(present), f"{name} holds weights that the model has and others that it lacks"
    shape = tensor.shape(dims)
    if "{expert}" not in name:
        pieces = tuple(
            Piece(*tree[part.weight][:2], part.weight, tree[part.weight][2]) for part in tensor.parts
        )
        return [Foreign(name, tensor, shape, pieces, dims)]
    found = []
    for expert in range(dims[EXPERTS]):
        mine: list[Piece] = []
        for part in tensor.parts:
            leaf, index, axes = tree[part.weight]
            assert axes[0] == EXPERTS, f"{part.weight} has no experts in front"
            mine.append(Piece(leaf, (*index, expert), part.weight, axes[1:]))
        each = name.replace("{expert}", str(expert))
        found.append(Foreign(each, tensor, shape, tuple(mine), dims))
    return found


def _check_total(found: Sequence[Foreign], params: Mapping[str, Param], dims: Dims) -> None:
    """A table that leaves a weight out, or names one twice, is a mistake in the family's file."""
    places = [(piece.leaf, piece.index) for foreign in found for piece in foreign.pieces]
    assert len(set(places)) == len(places), "a weight has two places in the foreign checkpoint"
    held: dict[str, int] = dict.fromkeys(params, 0)
    for foreign in found:
        for piece in foreign.pieces:
            held[piece.leaf] += math.prod(dims[axis] for axis in piece.axes)
    missing = [name for name, param in params.items() if held[name] != math.prod(param.shape(dims))]
    assert not missing, f"no place in the foreign checkpoint for {missing}"

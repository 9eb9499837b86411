"""One declaration a weight, from which shapes, init, shardings, masks, counts and bytes follow."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax.adapters import Adapted, is_adapter
from mosaicjax.errors import InputError
from mosaicjax.host_memory import own_pages

Dims = Mapping[str, int]
Tree = Any
DtypeName = Literal["float64", "float32", "bfloat16", "float16"]


def at_least_float32(dtype: Any) -> Any:
    """The dtype itself where it is wider than float32, else float32."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


@dataclass(frozen=True)
class Dtypes:
    """Which number format holds what.

    `param`: weights at rest, their gradients' sum and the optimizer state. `compute`: matrix products and
    the residual stream; weights are cast to it before they are gathered. `reduce`: softmax, norms, logits,
    the loss, and the sum of gradients over devices.
    """

    param: DtypeName = "float32"
    compute: DtypeName = "float32"
    reduce: DtypeName = "float32"


@dataclass(frozen=True)
class Init:
    """How a weight starts: a normal of zero mean, or a constant. Subclasses say which.

    `fan_in` names the axes that the weight's product sums over.
    """

    def draw(self, key: Array, shape: tuple[int, ...], dims: Dims) -> Array:
        """Float32 values of `shape`; `dims` gives the sizes of the named axes."""
        raise TypeError(f"{type(self).__name__} does not say how to draw")


@dataclass(frozen=True)
class Constant(Init):
    """Every entry the same."""

    value: float

    def draw(self, key: Array, shape: tuple[int, ...], dims: Dims) -> Array:
        """See `Init.draw`."""
        return jnp.full(shape, self.value, jnp.float32)


@dataclass(frozen=True)
class Normal(Init):
    """Normal of a fixed standard deviation."""

    std: float

    def draw(self, key: Array, shape: tuple[int, ...], dims: Dims) -> Array:
        """See `Init.draw`."""
        return jnp.float32(self.std) * jax.random.normal(key, shape, jnp.float32)


@dataclass(frozen=True)
class FanIn(Init):
    """Normal of standard deviation `gain / sqrt(product of the sizes of axes)`.

    Source: He et al. 2015, arXiv 1502.01852, eq. 10 (`gain` is sqrt(2) for rectifiers).
    """

    axes: tuple[str, ...]
    gain: float = 1.0

    def draw(self, key: Array, shape: tuple[int, ...], dims: Dims) -> Array:
        """See `Init.draw`."""
        fan = math.prod(dims[axis] for axis in self.axes)
        return jnp.float32(self.gain / math.sqrt(fan)) * jax.random.normal(key, shape, jnp.float32)


ZEROS = Constant(0.0)
ONES = Constant(1.0)


@dataclass(frozen=True)
class Layers:
    """Which layers a stacked weight holds: `count` of them, numbers `first`, `first + stride`, ..."""

    first: int
    stride: int
    count: int


@dataclass(frozen=True)
class Param:
    """One weight, declared once.

    `axes` names each dimension; sizes come from the model's one `dims` mapping. A weight with `layers` has
    a leading dimension more, one slice a layer, that is never sharded. A `wide` weight is used in the reduce
    dtype, others in the compute dtype.
    """

    axes: tuple[str, ...]
    init: Init
    decay: bool = True
    layers: Layers | None = None
    wide: bool = False

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """Sizes of all dimensions, the layers' first."""
        for axis in self.axes:
            if axis not in dims:
                raise InputError(f"a weight has the axis {axis!r}, which has no size", expected=sorted(dims))
        stacked = () if self.layers is None else (self.layers.count,)
        return stacked + tuple(dims[axis] for axis in self.axes)


def is_param(leaf: object) -> bool:
    """Whether a tree's node is a declared weight."""
    return isinstance(leaf, Param)


def join_dims(*parts: Dims) -> dict[str, int]:
    """One mapping of axis sizes from several.

    Raises:
        InputError: one name with two sizes.
    """
    joined: dict[str, int] = {}
    for part in parts:
        for name, size in part.items():
            if joined.setdefault(name, size) != size:
                raise InputError(f"the axis {name!r} has two sizes", expected=joined[name], got=size)
    return joined


def stacked(tree: Tree, layers: Layers) -> Tree:
    """The same weights for several layers, in one array each."""
    return jax.tree.map(lambda param: replace(param, layers=layers), tree, is_leaf=is_param)


def path_name(path: tuple[Any, ...]) -> str:
    """`blocks/0/attention/query` from a tree path."""
    return "/".join(
        str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry)))) for entry in path
    )


def named_leaves(tree: Tree, is_leaf: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    """Name and value of every leaf of a tree, in its order."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]:
        yield path_name(path), leaf


@dataclass(frozen=True)
class Spec:
    """A tree of `Param` and the sizes of their axes: everything about a model's weights but their values."""

    tree: Tree
    dims: Dims

    def map(self, function: Callable[[Param], Any]) -> Tree:
        """The tree with every declaration replaced by what `function` makes of it."""
        return jax.tree.map(function, self.tree, is_leaf=is_param)

    def items(self) -> Iterator[tuple[str, Param]]:
        """Name and declaration of every weight, in tree order."""
        yield from named_leaves(self.tree, is_param)

    def abstract(self, dtype: DtypeName, shardings: Tree) -> Tree:
        """`jax.ShapeDtypeStruct` of every weight, placed as `shardings` (a tree like this one)."""
        return jax.tree.map(
            lambda param, sharding: jax.ShapeDtypeStruct(
                param.shape(self.dims), jnp.dtype(dtype), sharding=sharding
            ),
            self.tree,
            shardings,
            is_leaf=is_param,
        )

    def count(self) -> int:
        """How many numbers the weights hold."""
        return sum(math.prod(param.shape(self.dims)) for _, param in self.items())

    def nbytes(self, dtype: DtypeName) -> int:
        """Units: bytes of all weights at rest, over all devices, each counted once."""
        return self.count() * jnp.dtype(dtype).itemsize

    def init(self, key: Array, dtype: DtypeName, shardings: Tree) -> Tree:
        """Draw every weight straight onto its shards.

        A weight's key is folded from its name without the layer and then from the layer's number: a new
        weight changes no other, and stacked layers equal separate ones. Weights are drawn one after the
        other, so that the work space is one weight's, never the tree's.
        """
        compiled: dict[Any, Callable[[Array], Array]] = {}

        def draw(path: tuple[Any, ...], param: Param, place: Any) -> Array:
            # All that a drawer depends on: weights alike but for their axes' names share one program.
            kind = (param.shape(self.dims), param.init, param.layers, place)
            if kind not in compiled:
                compiled[kind] = jax.jit(self.drawer(param, dtype, place), out_shardings=place)
            values = jax.block_until_ready(compiled[kind](jax.random.fold_in(key, name_hash(path))))
            give_back()
            return values

        with own_pages() as give_back:
            weights = jax.tree_util.tree_map_with_path(draw, self.tree, shardings, is_leaf=is_param)
            # A program holds megabytes for as long as it may be called again.
            compiled.clear()
            give_back()
        return weights

    def drawer(self, param: Param, dtype: DtypeName, place: NamedSharding) -> Callable[[Array], Array]:
        """A function from a weight's own key to its values, part by part so that the work space stays small.

        The parts of a stacked weight are its layers; those of another are blocks along its first dim, as many
        of `BLOCKS` as divide it. They are drawn side by side where `place` shards the first dim.
        """
        shape, layers = param.shape(self.dims), param.layers
        if layers is None:
            numbers = range(math.gcd(shape[0], BLOCKS))
            inner = (shape[0] // len(numbers), *shape[1:])
        else:
            numbers = range(layers.first, layers.first + layers.stride * layers.count, layers.stride)
            inner = shape[1:]
        rest = (*place.spec, *(None,) * (len(shape) - len(place.spec)))[1:]
        split = place.shard_shape(shape)[0] < shape[0]
        within = NamedSharding(place.mesh, P(*(rest if layers else (None, *rest))))

        def draw(key: Array) -> Array:
            def part(number: Array) -> Array:
                return param.init.draw(jax.random.fold_in(key, number), inner, self.dims).astype(dtype)

            each = jnp.asarray(numbers, jnp.uint32)
            if split:
                return jax.vmap(part)(each).reshape(shape)
            # Without the constraint every device would draw all of it in the loop.
            parts = jax.lax.map(lambda n: jax.lax.with_sharding_constraint(part(n), within), each)
            return parts.reshape(shape)

        return draw


@partial(jax.tree_util.register_dataclass, data_fields=("frozen", "reference"), meta_fields=())
@dataclass(frozen=True)
class Referenced:
    """Frozen weights, and beside them the trainable ones as the run began with them.

    A step whose loss compares with those takes it in place of the frozen weights alone. `reference` is a tree
    like the trainable one.
    """

    frozen: Any
    reference: Any


def only_frozen(held: Tree) -> Tree:
    """The frozen weights that a step holds, without those of a reference."""
    return held.frozen if isinstance(held, Referenced) else held


def whole_spec(trainable: Spec, frozen: Spec) -> Spec:
    """The declarations of all weights, see `join`."""
    return (
        Spec(_joined(trainable.tree, frozen.tree, _restacked), trainable.dims) if frozen.tree else trainable
    )


def join(trainable: Tree, frozen: Tree) -> Tree:
    """All weights, out of trainable and frozen ones.

    Each of the trees has None where the other has the whole weight; of a stacked weight that is in both, the
    first layers are the frozen ones. Where the trainable tree has an adapter, the frozen weight comes with it
    (`Adapted`). An empty `frozen` stands for none; a reference beside it is left out.
    """
    frozen = only_frozen(frozen)
    return _joined(trainable, frozen, _stacked_on) if frozen else trainable


def split(weights: Tree, trainable: Spec, frozen: Spec) -> tuple[Tree, Tree]:
    """Trainable and frozen weights out of all of them; what `join` makes whole."""
    if not frozen.tree:
        return weights, {}

    def cut(param: Any, other: Any, weight: Any, rest: bool) -> Any:
        if param is None or weight is None or other is None:
            return weight if param is not None else None
        count = param.layers.count
        part = slice(weight.shape[0] - count, None) if rest else slice(None, count)
        return jax.jit(lambda weight: weight[part], out_shardings=weight.sharding)(weight)

    def half(mine: Spec, others: Spec, rest: bool) -> Tree:
        return jax.tree.map(partial(cut, rest=rest), mine.tree, others.tree, weights, is_leaf=_is_place)

    return half(trainable, frozen, True), half(frozen, trainable, False)


def _is_place(leaf: object) -> bool:
    return leaf is None or is_param(leaf) or is_adapter(leaf)


def _joined(trainable: Tree, frozen: Tree, both: Callable[[Any, Any], Any]) -> Tree:
    def one(mine: Any, held: Any) -> Any:
        if mine is None or held is None:
            return held if mine is None else mine
        return both(held, mine)

    return jax.tree.map(one, trainable, frozen, is_leaf=_is_place)


def _restacked(first: Param, rest: Any) -> Param:
    if is_adapter(rest):
        return first
    assert first.layers is not None and rest.layers is not None, "only stacked weights are in both"
    return replace(rest, layers=replace(first.layers, count=first.layers.count + rest.layers.count))


def _stacked_on(first: Array, rest: Any) -> Any:
    if is_adapter(rest):
        return Adapted(first, rest)
    if isinstance(rest, jax.core.Tracer):
        return jnp.concatenate([first.astype(rest.dtype), rest])
    return jax.jit(_stacked_on, out_shardings=rest.sharding)(first, rest)


LAYER_KEY = "layer"

BLOCKS = 64
"""A weight that is not stacked is drawn in at most so many blocks."""


def name_hash(path: tuple[Any, ...]) -> int:
    """A weight's name as 32 bits; what stands between `layer` and the weight's place in it is left out."""
    parts = path_name(path).split("/")
    if LAYER_KEY in parts:
        parts = parts[parts.index(LAYER_KEY) :]
    return zlib.crc32("/".join(parts).encode())

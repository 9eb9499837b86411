"""A model of one's own: a `flax.nnx` module, trained by a recipe like any family.

In the recipe's file:

    @dataclass(frozen=True)
    class Mine(NnxModel):
        width: int = 256

        def module(self, rngs: nnx.Rngs) -> nnx.Module:
            return MyModule(self.vocab, self.width, rngs)

    recipe = Recipe(model=Mine(vocab=50_304, width=512), ...)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mosaicjax.errors import InputError
from mosaicjax.layers.context import Context
from mosaicjax.mesh import BATCH, gather_tree
from mosaicjax.models.decoder import Output
from mosaicjax.models.family import Family
from mosaicjax.spec import Dims, DtypeName, Init, Param, Spec, at_least_float32, join_dims

SHARDED, WHOLE = "sharded", "whole"
"""First parts of the names of dims that a module leaves unnamed; `mesh.WEIGHT_RULES` says where they go."""

LAYERS = "layers"
"""The name of a dim with one slice a layer, which makes no matrix of a vector."""

NO_MATRIX = ("bias", "scale")
"""Last names of weights that add or scale, whatever their shape: flax's attention has biases of two dims."""

Path = tuple[Any, ...]


@dataclass(frozen=True)
class NnxModel(Family):
    """A `flax.nnx` module as the model of a recipe: subclass it, add knobs, and write `module`.

    The module is called as `module(tokens_BL, positions_BL, segments_BL)`, int32 each, and returns the logits
    of the next token, [B, L, vocab]. A token may look at earlier ones of its own segment alone: positions
    begin at 0 in every segment, segment 0 is padding, and rows that are not packed are one segment. Neither
    this nor causality is enforced from outside.

    - Weights are the module's `nnx.Param`s, drawn as `module(nnx.Rngs(seed))` draws them. Other variables are
      refused, but for the keys of `nnx.Dropout`. Arrays that are no variables (masks, tables) are constants:
      they are made again wherever the module is, from `nnx.Rngs(params=0)` if they are random.
    - A weight that the module names the dims of (`nnx.with_partitioning(init, ("embed", "mlp"))`) is laid out
      by those names, as `mesh.rules` says. Of an unnamed matrix, the dim whose size has the largest power of
      two in it (the last of equals) is split over the fsdp axes; the rest is copied.
    - Matrices are decayed: weights of two dims or more that are not called `bias` or `scale`. A dim named
      `layers` (`nnx.vmap` adds it to named weights with `transform_metadata={nnx.PARTITION_NAME: "layers"}`)
      does not count.
    - Weights come in the recipe's compute dtype and whole along the fsdp axes, all of them at once before the
      call; for memory use `nnx.remat` within. Dropout draws one key a microbatch (and device, with an
      explicit gather), so it changes with them. Measured outputs (`log.norms`) are the logits alone.
    - FLOPs are counted as 6 a token for each number in a matrix; attention's scores are not counted.
    """

    vocab: int = 50_368

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with its weights drawn from `rngs`."""
        raise TypeError(f"{type(self).__name__} does not say how to make its module")

    def build(self) -> NnxAdapter:
        """The adapter between the module and the rest."""
        return NnxAdapter(self)


def construct(family: NnxModel, rngs: nnx.Rngs) -> Any:
    """The module, wherever jax is tracing; dims' names are kept as they stand, as layouts are the mesh's."""
    with nnx.use_eager_sharding(False):
        return family.module(rngs)


def trained(module: Any) -> list[tuple[Path, Any]]:
    """Path and variable of every `nnx.Param`, one that occurs twice once, always in one order."""
    return list(nnx.to_flat_state(nnx.state(module, nnx.Param)))


def as_tree(values: Iterator[tuple[Path, Any]]) -> dict[str, Any]:
    """Nested dicts by the parts of the paths."""
    tree: dict[str, Any] = {}
    for (*between, last), value in values:
        at = tree
        for part in between:
            at = at.setdefault(str(part), {})
        at[str(last)] = value
    return tree


def leaf_of(tree: Any, path: Path) -> Any:
    """The entry of `as_tree` that a path leads to."""
    for part in path:
        tree = tree[str(part)]
    return tree


@dataclass(frozen=True)
class Leaf:
    """A variable of a module: where it is, its class, and the names that its dims were given."""

    path: Path
    kind: type
    shape: tuple[int, ...]
    dtype: Any
    names: tuple[str | None, ...] | None

    @property
    def name(self) -> str:
        """Its name in the module, as `blocks/0/kernel`."""
        return "/".join(map(str, self.path))

    @property
    def trained(self) -> bool:
        """Whether it is a weight."""
        return issubclass(self.kind, nnx.Param)

    def axes(self) -> tuple[str, ...]:
        """The names that the module gave, else which dim is split, if any is.

        Raises:
            InputError: names that are no strings, or not as many as dims.
        """
        shape, names = self.shape, self.names
        if names is None or not any(names):
            matrix = len(shape) > 1 and self.path[-1] not in NO_MATRIX
            split = split_dim(shape) if matrix else None
            return tuple(f"{SHARDED if i == split else WHOLE}/{size}" for i, size in enumerate(shape))
        if len(names) != len(shape) or not all(isinstance(n, str | None) for n in names):
            raise InputError("names of dims", expected=f"{len(shape)} strings or None", got=tuple(names))
        return tuple(n or f"{WHOLE}/{size}" for n, size in zip(names, shape, strict=True))


@dataclass(frozen=True)
class OwnInit(Init):
    """Drawn by the module's constructor, all weights together."""


@dataclass(frozen=True)
class ModuleSpec(Spec):
    """The weights of a module, which draws them itself."""

    family: NnxModel

    def init(self, key: Array, dtype: DtypeName, shardings: Any) -> Any:
        """The weights of `module(nnx.Rngs(key))`, each straight onto its shards."""

        def draw(key: Array) -> Any:
            module = construct(self.family, nnx.Rngs(key))
            return as_tree((path, leaf[...].astype(dtype)) for path, leaf in trained(module))

        return jax.block_until_ready(jax.jit(draw, out_shardings=shardings)(key))


@dataclass(frozen=True)
class NnxAdapter:
    """A module as a `Model`: its call is `hidden`, whose result is the logits already."""

    family: NnxModel

    @cached_property
    def _leaves(self) -> tuple[Leaf, ...]:
        """The module's variables: weights, and dropout's keys.

        Raises:
            InputError: it cannot be made, or has other variables.
        """
        name, found = type(self.family).__name__, []

        def look() -> None:
            for path, leaf in nnx.to_flat_state(nnx.state(construct(self.family, nnx.Rngs(0)))):
                names = leaf.get_metadata().get("out_sharding")
                found.append(Leaf(path, type(leaf), leaf.shape, leaf.dtype, names))

        try:
            jax.eval_shape(look)
        except Exception as error:
            raise InputError(f"the module of {name} cannot be made", got=first_line(error)) from error
        for leaf in found:
            if not issubclass(leaf.kind, nnx.Param | nnx.RngState):
                raise InputError(
                    f"{name}: {leaf.name} is a {leaf.kind.__name__}, which is not trained",
                    expected="weights as nnx.Param, and keys of nnx.Dropout",
                    fix="a plain array for a constant; state that changes from step to step is not kept",
                )
            if leaf.trained and not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise InputError(f"{name}: {leaf.name}", expected="a floating weight", got=leaf.dtype)
        return tuple(found)

    @cached_property
    def _spec(self) -> ModuleSpec:
        name = type(self.family).__name__
        sizes: dict[str, int] = {"vocab": self.family.vocab}
        declared: list[tuple[Path, Param]] = []
        for leaf in self._leaves:
            if not leaf.trained:
                continue
            try:
                axes = leaf.axes()
                sizes = join_dims(sizes, *({axis: n} for axis, n in zip(axes, leaf.shape, strict=True)))
            except InputError as error:
                raise InputError(f"{name}: {leaf.name}: {error}") from error
            matrix = sum(axis != LAYERS for axis in axes) > 1 and leaf.path[-1] not in NO_MATRIX
            declared.append((leaf.path, Param(axes, OwnInit(), decay=matrix)))
        return ModuleSpec(as_tree(iter(declared)), sizes, self.family)

    @property
    def dims(self) -> Dims:
        """See `Model.dims`."""
        return self._spec.dims

    @cached_property
    def drops(self) -> bool:
        """See `Model.drops`."""
        return not all(leaf.trained for leaf in self._leaves)

    @property
    def places(self) -> tuple[str, ...]:
        """See `Model.places`."""
        return ("the module's logits",)

    def spec(self) -> Spec:
        """See `Model.spec`."""
        return self._spec

    def check(self, length: int) -> None:
        """See `Model.check`: the module is called, with shapes for values.

        Raises:
            InputError: it cannot be made or called, or returns anything but logits.
        """
        name, vocab = type(self.family).__name__, self.family.vocab
        tokens_BL = jax.ShapeDtypeStruct((1, length), jnp.int32)
        weights = as_tree(
            (leaf.path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)) for leaf in self._leaves if leaf.trained
        )
        try:
            given = jax.eval_shape(
                lambda weights, rows_BL: self._call(weights, (rows_BL,) * 3, None), weights, tokens_BL
            )
        except Exception as error:
            call = f"module(tokens, positions, segments), int32 [1, {length}] each"
            raise InputError(
                f"the module of {name} cannot be called", expected=call, got=first_line(error)
            ) from error
        array = isinstance(given, jax.ShapeDtypeStruct)
        if not array or given.shape != (1, length, vocab) or not jnp.issubdtype(given.dtype, jnp.floating):
            raise InputError(
                f"the module of {name} returns no logits",
                expected=f"floats of [1, {length}, {vocab}] for one row",
                got=f"{given.dtype} {list(given.shape)}" if array else type(given).__name__,
                fix="the recipe's vocab is the last dim's size",
            )

    def _call(self, weights: Any, rows: tuple[Array, Array, Array], key: Array | None) -> Any:
        """The module with these weights, called; `key` is dropout's, None drops nothing."""
        # Made anew for its structure and constants: the draws of its weights are never used, so the compiler
        # leaves them out.
        module = construct(self.family, nnx.Rngs(params=0, default=0 if key is None else key))
        own = [(path, leaf.replace(leaf_of(weights, path))) for path, leaf in trained(module)]
        nnx.update(module, nnx.from_flat_state(own))
        module.eval() if key is None else module.train()
        return module(*rows)

    def embed(self, weights: Any, tokens_BL: Array, context: Context) -> Array:
        """The tokens: embedding them is the module's own affair."""
        return tokens_BL

    def hidden(self, weights: Any, x_BL: Array, context: Context, *, measure: bool = False) -> Output:
        """The module's logits, in whatever dtype it gives them."""
        whole = gather_tree(weights, self._spec.tree, context.layout, context.dtypes)
        positions_BL = jnp.broadcast_to(context.positions_BL, x_BL.shape)
        segments_BL = jnp.ones_like(x_BL) if context.segments_BL is None else context.segments_BL
        key = None if context.keys_B is None else context.keys_B[0]
        logits_BLV = self._call(whole, (x_BL, positions_BL, segments_BL), key)
        wide_BLV = logits_BLV.astype(at_least_float32(logits_BLV.dtype))
        return Output(
            logits_BLV, (), rms_N=jnp.sqrt(jnp.mean(jnp.square(wide_BLV)))[None] if measure else None
        )

    def head(self, weights: Any, context: Context) -> None:
        """Nothing: `hidden` is the logits."""

    def logits(self, head: None, logits_BLV: Array, context: Context) -> Array:
        """See `Model.logits`."""
        split = any("vocab" in param.axes for _, param in self._spec.items())
        logits_BLV = logits_BLV.astype(context.dtypes.reduce)
        return context.layout.constrain(logits_BLV, BATCH, None, "vocab" if split else None)


def split_dim(shape: tuple[int, ...]) -> int:
    """The dim whose size has the largest power of two in it; the last of equals."""
    return max(range(len(shape)), key=lambda i: (math.gcd(shape[i], 2**30), i))


def first_line(error: BaseException) -> str:
    """An error of someone else's code in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"

"""Low-rank adapters beside frozen weights: what is trained of them, and how the two make one product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

RANK = "rank"
"""The axis between an adapter's two matrices."""


@partial(jax.tree_util.register_dataclass, data_fields=("a", "b"), meta_fields=("scale", "summed"))
@dataclass(frozen=True)
class Adapter:
    """Two matrices that add `scale` * a b to a weight; stands in the weight's place in a tree.

    `summed` of the weight's dims are those that its product sums over. In a tree of declarations `a` and `b`
    are `Param`.

    Shapes: weight [*in, *out], a [*in, rank], b [rank, *out]; stacked ones have the layers in front.
    """

    a: Any
    b: Any
    scale: float
    summed: int


@partial(jax.tree_util.register_dataclass, data_fields=("weight", "adapter"), meta_fields=())
@dataclass(frozen=True)
class Adapted:
    """A weight with an adapter beside it; `linear` and `gather_tree` take it, `merge` makes one of both."""

    weight: Any
    adapter: Adapter


def is_adapter(node: object) -> bool:
    """Whether a tree's node is an adapter."""
    return isinstance(node, Adapter)


def is_adapted(node: object) -> bool:
    """Whether a tree's node is a weight with its adapter."""
    return isinstance(node, Adapted)


def has_adapters(tree: Any) -> bool:
    """Whether a tree of what is trained is one of adapters."""
    return any(map(is_adapter, jax.tree.leaves(tree, is_leaf=is_adapter)))


def merge(adapted: Adapted) -> Array:
    """The one weight that does the same, in the frozen one's dtype; added up in float32 at least."""
    weight, adapter = adapted.weight, adapted.adapter
    wide = jnp.promote_types(weight.dtype, jnp.float32)
    stacked = adapter.a.ndim > adapter.summed + 1
    a, b = adapter.a.astype(wide), adapter.b.astype(wide)

    def product(a: Array, b: Array) -> Array:
        return jnp.tensordot(a, b, axes=1)

    delta = jax.vmap(product)(a, b) if stacked else product(a, b)
    scaled = delta * jnp.asarray(adapter.scale, wide)
    merged: Array = (weight.astype(wide) + scaled).astype(weight.dtype)
    return merged


def merged(tree: Any) -> Any:
    """A tree of weights with every adapter added to the weight beside it, where that lies."""

    def one(node: Any) -> Any:
        if not is_adapted(node):
            return node
        return jax.jit(merge, out_shardings=node.weight.sharding)(node)

    return jax.tree.map(one, tree, is_leaf=is_adapted)

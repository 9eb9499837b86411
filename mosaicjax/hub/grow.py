"""A model's tables of tokens, made longer for tokens that it did not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError
from mosaicjax.spec import Param, Spec, at_least_float32, is_param, name_hash

VOCAB = "vocab"

NOISE = 1e-9**0.5
"""Of the spread of the rows that are known: what a new row differs by from their mean."""


@dataclass(frozen=True)
class Growth:
    """How the rows of tokens become more.

    The first `known` are those of tokens that the model was trained with, `before` are all that it has, and
    `after` those wanted. What pads the tables before counts as new.
    """

    known: int
    before: int
    after: int

    def __str__(self) -> str:
        return (
            f"init_from: rows {self.known:,} to {self.after - 1:,} of the tables of tokens are new, and begin"
            " as the mean of the others"
        )


def growth(
    found: Mapping[str, tuple[int, ...]], spec: Spec, old: Tokenizer | None, new: Tokenizer
) -> Growth | None:
    """How a model of the shapes `found` grows to one of `spec`; None where its tokens stay what they are.

    `old` is its tokenizer (None: it has none), `new` that of the data.

    Raises:
        InputError: new tokens, in a tokenizer that is not the old one with tokens added.
    """
    sizes = {
        found[name][_dim(param)]
        for name, param in spec.items()
        if VOCAB in param.axes and len(found.get(name, ())) == len(param.shape(spec.dims))
    }
    if len(sizes) != 1:
        return None
    before, after = sizes.pop(), spec.dims[VOCAB]
    known = min(before, old.size) if old is not None else before
    if after < before or (after == before and new.size <= known):
        return None
    if old is not None:
        _check_added(old, new)
    return Growth(known, before, after)


def _check_added(old: Tokenizer, new: Tokenizer) -> None:
    pairs = enumerate(zip(old.pieces, new.pieces, strict=False))
    other = next((number for number, (mine, theirs) in pairs if mine and theirs and mine != theirs), None)
    if other is not None or new.size < old.size:
        raise InputError(
            "the data's tokenizer is not that of init_from with tokens added",
            expected=f"{old.pieces[other]!r} as token {other}"
            if other is not None
            else f"{old.size} ids or more",
            got=repr(new.pieces[other]) if other is not None else new.size,
            fix="`mosaicjax data add-tokens` on the tokenizer of init_from",
        )


def shapes_before(spec: Spec, growth: Growth, abstract: Any) -> Any:
    """The tree `abstract` with tables as long as they were; copied where the mesh does not divide them."""

    def one(param: Param, wanted: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if VOCAB not in param.axes:
            return wanted
        dim = _dim(param)
        shape = (*wanted.shape[:dim], growth.before, *wanted.shape[dim + 1 :])
        partition = [*wanted.sharding.spec, *[None] * (len(shape) - len(wanted.sharding.spec))]
        shards = wanted.shape[dim] // wanted.sharding.shard_shape(wanted.shape)[dim]
        if growth.before % shards:
            partition[dim] = None
        sharding = NamedSharding(wanted.sharding.mesh, P(*partition))
        return jax.ShapeDtypeStruct(shape, wanted.dtype, sharding=sharding)

    return jax.tree.map(one, spec.tree, abstract, is_leaf=is_param)


def grown(weights: Any, spec: Spec, growth: Growth, abstract: Any, seed: int) -> Any:
    """Weights of `shapes_before` with the new rows in them.

    Each new row is the mean of the known ones, which bounds how far what the model says of a text moves, with
    normal noise of `NOISE` times their standard deviation in each entry.

    Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models",
    nlp.stanford.edu/~johnhew/vocab-expansion.html; the noise is that of Transformers'
    `resize_token_embeddings` without its covariances.
    """

    def one(path: Any, param: Param, weight: Array, wanted: jax.ShapeDtypeStruct) -> Array:
        if VOCAB not in param.axes:
            return weight
        key = jax.random.fold_in(jax.random.key(seed), name_hash(path))
        dim = _dim(param)

        def longer(weight: Array, key: Array) -> Array:
            known = jax.lax.slice_in_dim(weight, 0, growth.known, axis=dim)
            wide = known.astype(at_least_float32(weight.dtype))
            mean, spread = jnp.mean(wide, dim, keepdims=True), jnp.std(wide, dim, keepdims=True)
            shape = (*wanted.shape[:dim], growth.after - growth.known, *wanted.shape[dim + 1 :])
            noise = jax.random.normal(key, shape, wide.dtype)
            rows = jnp.broadcast_to(mean, shape) + jnp.asarray(NOISE, wide.dtype) * noise * spread
            return jnp.concatenate([known, rows.astype(weight.dtype)], axis=dim)

        made: Array = jax.jit(longer, out_shardings=wanted.sharding)(weight, key)
        return made

    return jax.tree_util.tree_map_with_path(one, spec.tree, weights, abstract, is_leaf=is_param)


def _dim(param: Param) -> int:
    return param.axes.index(VOCAB) + (param.layers is not None)

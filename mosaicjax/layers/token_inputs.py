"""What is added to the embeddings from a token and the one before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.layers.context import Context
from mosaicjax.spec import ZEROS, Dims, Param

NONE = -1
"""Stands for the token before the first one of a document or row."""


@dataclass(frozen=True)
class TokenInput:
    """A part of the model between the embedding table and the first layer; the parent of the others."""

    @property
    def name(self) -> str:
        """What its weights are called."""
        return type(self).__name__.lower()

    @property
    def dims(self) -> Dims:
        """Sizes of axes that it brings."""
        return {}

    def params(self) -> dict[str, Any]:
        """Its weights; all start so that it adds nothing."""
        return {}

    def apply(self, weights: dict[str, Any], x_BLD: Array, of: Tokens, context: Context) -> Array:
        """The embeddings with the part in them, [B, L, D]."""
        raise TypeError(f"{type(self).__name__} does not say what it adds")


@dataclass(frozen=True)
class Tokens:
    """The tokens of rows, the ones before them (`NONE`: there is none), and those' embeddings.

    Shapes: int32 [B, L] each; embeddings [B, L, D], zero where there is no token.
    """

    tokens_BL: Array
    before_BL: Array
    before_BLD: Array


@dataclass(frozen=True)
class Smear(TokenInput):
    """A share of the embedding before: `x + scale * sigmoid(gate . x) * x_before`, of learned scale and gate.

    Source: modded-nanogpt's "smear" of embeddings, https://github.com/KellerJordan/modded-nanogpt.
    """

    def params(self) -> dict[str, Any]:
        """See `TokenInput.params`."""
        return {
            "gate": Param(("embed",), ZEROS, decay=False),
            "scale": Param(("embed",), ZEROS, decay=False),
        }

    def apply(self, weights: dict[str, Any], x_BLD: Array, of: Tokens, context: Context) -> Array:
        """See `TokenInput.apply`."""
        gate_BL1 = jax.nn.sigmoid(jnp.sum(x_BLD * weights["gate"][None, None], axis=-1, keepdims=True))
        return x_BLD + weights["scale"][None, None] * gate_BL1 * of.before_BLD


@dataclass(frozen=True)
class Bigram(TokenInput):
    """A table of `buckets` embeddings for pairs of tokens: the pair's hash says which is added.

    Source: hashed n-gram embeddings as in Huang et al. 2025, arXiv 2501.16975 (over-tokenised transformers).
    """

    buckets: int = 32_768

    @property
    def dims(self) -> Dims:
        """See `TokenInput.dims`."""
        return {"buckets": self.buckets}

    def params(self) -> dict[str, Any]:
        """See `TokenInput.params`."""
        return {"table": Param(("buckets", "embed"), ZEROS)}

    def apply(self, weights: dict[str, Any], x_BLD: Array, of: Tokens, context: Context) -> Array:
        """See `TokenInput.apply`."""
        table = context.layout.constrain(weights["table"], "buckets", None)
        return x_BLD + jnp.take(table, bucket(of.before_BL, of.tokens_BL, self.buckets), axis=0, mode="clip")


def bucket(before: Array, token: Array, buckets: int) -> Array:
    """A pair's bucket, int32: two multiplications by odd numbers modulo 2**32, mixed; any device agrees.

    Source: the multipliers are those of MurmurHash3's finaliser.
    """
    first, second = jnp.uint32(0x85EBCA6B), jnp.uint32(0xC2B2AE35)
    mixed = (before.astype(jnp.uint32) + jnp.uint32(1)) * first ^ token.astype(jnp.uint32) * second
    mixed = (mixed ^ (mixed >> jnp.uint32(15))) * first
    return ((mixed ^ (mixed >> jnp.uint32(13))) % jnp.uint32(buckets)).astype(jnp.int32)


def tokens_before(tokens_BL: Array, context: Context) -> Array:
    """The token before each, of its own document; `NONE` where it is the first.

    Of a row that goes on from others `context.before_B` is the one before its first.
    """
    first_B1 = (
        jnp.full_like(tokens_BL[:, :1], NONE) if context.before_B is None else context.before_B[:, None]
    )
    before_BL = jnp.concatenate([first_B1, tokens_BL[:, :-1]], axis=1)
    return jnp.where(context.positions_BL > 0, before_BL, jnp.full_like(before_BL, NONE))

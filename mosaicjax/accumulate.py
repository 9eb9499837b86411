"""Gradients over the microbatches of a step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.mesh import Layout
from mosaicjax.program import Batch, Loss

Sums = tuple[Array, Array, dict[str, Array], Any]
"""Weighted objective, weight, weighted metrics, program state."""


def accumulate(
    loss: Loss,
    trainable: Any,
    frozen: Any,
    state: Any,
    batch: Batch,
    key: Array,
    layout: Layout,
    step: Array | int = 0,
) -> tuple[Any, Sums]:
    """Gradients and sums over the microbatches, which are the batch's leading dimension, one at a time."""

    def one(state: Any, rows: Batch) -> tuple[Any, Sums]:
        def objective(trainable: Any) -> tuple[Array, Sums]:
            total, weight, sums, after = loss(trainable, frozen, state, rows, key, layout, step)
            return total, (total, weight, sums, after)

        grads, sums = jax.grad(objective, has_aux=True)(trainable)
        return grads, sums

    microbatches = next(iter(batch.values())).shape[0]
    first = {name: array[0] for name, array in batch.items()}
    if microbatches == 1:
        return one(state, first)

    def add(carry: tuple[Any, Sums], rows: Batch) -> tuple[tuple[Any, Sums], None]:
        grads, (objective, weight, sums, state) = carry
        new_grads, (*new, state) = one(state, rows)
        so_far = (objective, weight, sums)
        return (
            jax.tree.map(jnp.add, grads, new_grads),
            (*jax.tree.map(jnp.add, so_far, tuple(new)), state),
        ), None

    shapes = jax.eval_shape(one, state, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    zero_grads, (objective, weight, sums, _) = zeros
    zero_grads = jax.tree.map(jnp.zeros_like, trainable) if layout.manual else zero_grads
    (grads, total), _ = jax.lax.scan(add, (zero_grads, (objective, weight, sums, state)), dict(batch))
    return grads, total

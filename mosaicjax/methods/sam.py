"""Sharpness-aware minimisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mosaicjax.errors import InputError
from mosaicjax.program import Method, Program
from mosaicjax.spec import at_least_float32


@dataclass(frozen=True)
class Sam(Method):
    """Step with the gradient at the weights `rho` further up the gradient, over all weights together.

    Both gradients are of the whole batch, all microbatches and devices; the metric `loss` is that of the
    weights themselves, `grad_norm` that of the gradient stepped with. Every `every`-th step alone does so,
    from the first on; the others are plain ones (Composer's `interval`).

    It costs a second forward and backward pass at each such step and the memory of another copy of weights
    and gradients; MFU counts the first pass alone. For language models the gains shown are in fine-tuning on
    small sets (Bahri et al. 2022, arXiv 2110.08529); in one pass over much data, where nothing is seen twice,
    there is little to win, and the same compute buys more tokens. Where weights are used in bfloat16 much of
    so small a move is rounded away: it is made in float32, and felt after the cast.

    Source: Foret et al. 2021, arXiv 2010.01412, algorithm 1.
    """

    rho: float = 0.05
    every: int = 1

    def __call__(self, program: Program) -> Program:
        """See `Method`."""
        if self.rho <= 0 or self.every < 1:
            raise InputError("Sam", expected="rho above 0, every of 1 or more", got=(self.rho, self.every))
        return program.refine(self, regrade=self.regrade)

    def regrade(self, weights: Any, grads: Any, done: Array, gradients: Callable[[Any], Any]) -> Any:
        """The gradients at the moved weights, see `program.Regrade`."""

        def at_moved() -> Any:
            norm = optax.tree.norm(grads)
            scale = self.rho / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)

            def moved(weight: Array, grad: Array) -> Array:
                wide = at_least_float32(weight.dtype)
                return (weight.astype(wide) + grad.astype(wide) * scale.astype(wide)).astype(weight.dtype)

            return gradients(jax.tree.map(moved, weights, grads))

        if self.every == 1:
            return at_moved()
        return jax.lax.cond(done % self.every == 0, at_moved, lambda: grads)

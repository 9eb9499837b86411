"""Gradient clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mosaicjax.errors import InputError
from mosaicjax.program import Measured, Method, Program


@dataclass(frozen=True)
class ClipGradients(Method):
    """Scale all gradients down together where their global norm is above `norm`.

    Source: Pascanu et al. 2013, arXiv 1211.5063.
    """

    norm: float = 1.0

    def __call__(self, program: Program) -> Program:
        """See `Method`."""
        if self.norm <= 0:
            raise InputError("ClipGradients.norm", expected="above 0", got=self.norm)
        clipped = optax.chain(clip_by_norm(self.norm), program.optimizer)
        return program.refine(self, optimizer=clipped)


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """optax's `clip_by_global_norm`, but with the norm of `measured` where that is of these very gradients.

    Measured again, gradients would have to be held as they come in here, beside what they were made from.
    """

    def update(
        grads: Any, state: optax.EmptyState, params: Any = None, *, measured: Measured | None = None, **_: Any
    ) -> tuple[Any, optax.EmptyState]:
        if measured is not None and measured.tree is grads:
            norm = measured.norm
        else:
            norm = optax.tree.norm(grads)
        factor = jnp.where(norm < limit, jnp.ones_like(norm), limit / norm)
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)

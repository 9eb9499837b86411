"""Losses: sums over target tokens, divided once by the sum of the weights, whatever the microbatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from mosaicjax.errors import InputError


@struct.dataclass
class TokenLoss:
    """Per-token terms, weighted and summed.

    Units: nats, summed over target tokens. `objective` is what is minimised; `nll` the cross-entropy alone;
    `square_lse` the squared log-partition that the z-loss weighs; `nll_B` the cross-entropy row by row.

    Shapes: [], but for `nll_B`, [B].
    """

    objective: Any
    nll: Any
    square_lse: Any
    nll_B: Any


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the next token, in the logits' dtype.

    `z_loss` adds that times the squared log of the partition function, which keeps logits from drifting.
    `chunk` positions of a row have their logits in memory at once (0: all). `smoothing` takes that share of
    the target from the next token and spreads it evenly over all ids that the logits have; the metrics `loss`
    and held-out loss stay the plain cross-entropy. Language models are trained without it: it raises their
    perplexity (Vaswani et al. 2017, arXiv 1706.03762, section 5.4), and helps where few labels are wrong or
    many are right, as in fine-tuning on small sets.

    Source: z-loss: PaLM, arXiv 2204.02311, section 5. Smoothing: Szegedy et al. 2016, arXiv 1512.00567,
    section 7.
    """

    z_loss: float = 0.0
    chunk: int = 0
    smoothing: float = 0.0

    def check(self, length: int) -> None:
        """Raises: InputError: a chunk that does not divide the row, or a share or weight that cannot be."""
        if not 0 <= self.smoothing < 1:
            raise InputError(
                "loss.smoothing", expected="a share of the target, 0 to below 1", got=self.smoothing
            )
        if self.z_loss < 0:
            raise InputError("loss.z_loss", expected="0 or more", got=self.z_loss)
        if self.chunk < 0 or (self.chunk and length % self.chunk):
            raise InputError(
                "loss.chunk", expected=f"0, or a divisor of the row's {length} tokens", got=self.chunk
            )

    def tokens(self, logits_BLV: Array, targets_BL: Array, weights_BL: Array) -> TokenLoss:
        """The terms from the logits."""
        nll_BL, lse_BL = nll(logits_BLV, targets_BL)
        weights_BL = weights_BL.astype(nll_BL.dtype)
        square_BL = jnp.square(lse_BL)
        objective_BL = nll_BL
        if self.smoothing:
            even_BL = lse_BL - jnp.mean(logits_BLV, axis=-1)
            objective_BL = (1.0 - self.smoothing) * nll_BL + self.smoothing * even_BL
        if self.z_loss:
            objective_BL = objective_BL + self.z_loss * square_BL
        terms = (objective_BL, nll_BL, square_BL)
        objective, total, squares = (jnp.sum(term * weights_BL) for term in terms)
        return TokenLoss(objective, total, squares, jnp.sum(nll_BL * weights_BL, axis=1))


def nll(logits_BLV: Array, targets_BL: Array) -> tuple[Array, Array]:
    """Negative log-likelihood of the targets, and the log of the partition function.

    Units: nats.
    """
    lse_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    chosen_BLV = jnp.arange(logits_BLV.shape[-1], dtype=targets_BL.dtype)[None, None] == targets_BL[..., None]
    chosen_BL = jnp.sum(jnp.where(chosen_BLV, logits_BLV, jnp.zeros_like(logits_BLV)), axis=-1)
    return lse_BL - chosen_BL, lse_BL


Chunk = Callable[[Any, Array, Array, Array], TokenLoss]
"""The terms of some positions: from the head, hidden [B, L, D], targets [B, L] and weights [B, L]."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_chunks(some: Chunk, head: Any, hidden_CBLD: Array, rows_CBL: tuple[Array, Array]) -> TokenLoss:
    """The terms of all chunks, with the logits of one in memory at a time.

    The gradient of the objective is made chunk by chunk together with its value, while the logits are there:
    backward it is only scaled. The others are measures and have no gradient.

    Shapes: rows are targets and weights, [C, B, L].

    Source: the order of work is that of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989.
    """
    parts = jax.lax.map(lambda part: some(head, part[0], *part[1]), (hidden_CBLD, rows_CBL))
    return jax.tree.map(partial(jnp.sum, axis=0), parts)


def _forward(
    some: Chunk, head: Any, hidden_CBLD: Array, rows_CBL: tuple[Array, Array]
) -> tuple[TokenLoss, Any]:
    def turn(head_grad: Any, part: Any) -> tuple[Any, Any]:
        hidden_BLD, rows_BL = part
        terms, pull = jax.vjp(lambda head, hidden_BLD: some(head, hidden_BLD, *rows_BL), head, hidden_BLD)
        unit = jax.tree.map(jnp.zeros_like, terms).replace(objective=jnp.ones_like(terms.objective))
        more, hidden_grad_BLD = pull(unit)
        return jax.tree.map(jnp.add, head_grad, more), (terms, hidden_grad_BLD)

    nothing = jax.tree.map(jnp.zeros_like, head)
    head_grad, (parts, hidden_grad_CBLD) = jax.lax.scan(turn, nothing, (hidden_CBLD, rows_CBL))
    return jax.tree.map(partial(jnp.sum, axis=0), parts), (head_grad, hidden_grad_CBLD)


def _backward(some: Chunk, grads: tuple[Any, Array], cotangent: TokenLoss) -> tuple[Any, Array, None]:
    head_grad, hidden_grad_CBLD = jax.tree.map(lambda g: g * cotangent.objective.astype(g.dtype), grads)
    return head_grad, hidden_grad_CBLD, None


by_chunks.defvjp(_forward, _backward)

"""Losses: sums over target tokens, divided once by the sum of the weights, whatever the microbatches."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.errors import InputError


@dataclass(frozen=True)
class TokenLoss:
    """Per-token terms, weighted and summed.

    Units: nats, summed over target tokens. `objective` is what is minimised; `nll` the cross-entropy alone;
    `square_lse` the squared log-partition that the z-loss weighs.
    """

    objective: Array
    nll: Array
    square_lse: Array


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the next token, in the logits' dtype.

    `z_loss` adds that times the squared log of the partition function, which keeps logits from drifting.
    `chunk` positions of a row have their logits in memory at once, and are computed again backward (0: all,
    none again).

    Source: z-loss: PaLM, arXiv 2204.02311, section 5.
    """

    z_loss: float = 0.0
    chunk: int = 0

    def check(self, length: int) -> None:
        """Raises: InputError: a chunk that does not divide the row."""
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
        objective_BL = nll_BL + self.z_loss * square_BL if self.z_loss else nll_BL
        terms = (objective_BL, nll_BL, square_BL)
        return TokenLoss(*(jnp.sum(term * weights_BL) for term in terms))


def nll(logits_BLV: Array, targets_BL: Array) -> tuple[Array, Array]:
    """Negative log-likelihood of the targets, and the log of the partition function.

    Units: nats.
    """
    lse_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    chosen_BLV = jnp.arange(logits_BLV.shape[-1], dtype=targets_BL.dtype)[None, None] == targets_BL[..., None]
    chosen_BL = jnp.sum(jnp.where(chosen_BLV, logits_BLV, jnp.zeros_like(logits_BLV)), axis=-1)
    return lse_BL - chosen_BL, lse_BL

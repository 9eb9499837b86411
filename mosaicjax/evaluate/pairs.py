"""Held-out preference pairs: how well a model tells the chosen answer from the rejected one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from mosaicjax.data.held_pairs import HeldOutPairs
from mosaicjax.evaluate.heldout import OverRows
from mosaicjax.mesh import Layout
from mosaicjax.methods.dpo import ACCURACY, PairLoss
from mosaicjax.program import Batch


@dataclass(frozen=True)
class PairScores:
    """Means over pairs: the loss, and the rewards by the names of the step's metrics.

    `chosen_loss` is the cross-entropy of the chosen answers, which preference tuning need not lower.

    Units: nats, a pair; of `chosen_loss` a target token.
    """

    loss: float
    rewards: Mapping[str, float]
    chosen_loss: float
    pairs: int

    def __str__(self) -> str:
        """In a line."""
        margin, right = self.rewards["reward_margin"], self.rewards[ACCURACY]
        return f"{self.loss:.4f}, margin {margin:.4f}, {right:.1%} of {self.pairs:,} pairs told apart"

    def measures(self) -> dict[str, float]:
        """What a summary says beside the loss."""
        return {**self.rewards, "chosen_loss": self.chosen_loss}

    def metrics(self) -> dict[str, float | int]:
        """What a row of metrics says of it."""
        return {"loss": self.loss, **self.measures(), "pairs": self.pairs}


class PairEvaluator(OverRows):
    """Scores of held-out pairs by weights and those of a reference, `rows` rows at a time; compiled once."""

    def __init__(
        self,
        loss: PairLoss,
        layout: Layout,
        held_out: HeldOutPairs,
        rows: int,
        weights: tuple[Any, Any],
    ) -> None:
        """Compile; `weights` are shapes and places of the weights and of the reference's.

        Raises:
            InputError: rows that the mesh cannot split.
        """
        self._paired = loss
        super().__init__(layout, held_out, rows, self._sums, weights)

    def _sums(self, weights: tuple[Any, Any], batch: Batch) -> tuple[Array, ...]:
        """Of each row: what its pairs come to, and the nats and target tokens of chosen answers."""
        mine, reference = weights
        nll_BL = self._paired.nll(mine, batch, self.layout)
        terms = self._paired.terms(nll_BL, self._paired.nll(reference, batch, self.layout), batch)
        weights_BL = batch["weights"].astype(nll_BL.dtype)
        chosen_BL = jnp.where(batch["segments"] % 2 == 1, weights_BL, jnp.zeros_like(weights_BL))
        rewards = (terms.objective, terms.chosen, terms.rejected, terms.pairs, terms.right)
        return (*rewards, jnp.sum(nll_BL * chosen_BL, axis=1), jnp.sum(chosen_BL, axis=1))

    def __call__(self, weights: tuple[Any, Any], rows: int = 0) -> PairScores:
        """The scores over `rows` rows (0: all), the same on every process.

        Raises:
            InputError: a damaged shard, on every process.
        """
        loss, chosen, rejected, pairs, right, nats, tokens = self.totals(weights, rows).sum(axis=1).tolist()
        rewards = {
            "reward_chosen": chosen / pairs,
            "reward_rejected": rejected / pairs,
            "reward_margin": (chosen - rejected) / pairs,
            ACCURACY: right / pairs,
        }
        return PairScores(loss / pairs, rewards, nats / tokens, round(pairs))

"""Exponential moving average of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.errors import InputError
from mosaicjax.program import Method, Program


@dataclass(frozen=True)
class Ema(Method):
    """Evaluate, sample, generate and export with an exponential moving average of the weights.

    After every `every`-th step from `start` on the average becomes `decay` of itself and 1 - `decay` of the
    new weights; up to `start` it is the weights. Training itself does not see it. It takes the memory of one
    more copy of the weights, in float32 at least, and is part of every checkpoint.

    For language models it stands for a part of the learning rate's fall: in the middle of a run it has a
    better held-out loss than the weights, most of all at a constant rate, and little of that is left once the
    rate has fallen (Hägele et al. 2024, arXiv 2405.18392). Until some multiples of 1 / (1 - `decay`) averaged
    steps have passed it still holds the weights of `start`, and is worse than none.

    Source: Polyak and Juditsky 1992, SIAM J. Control Optim. 30; Tarvainen and Valpola 2017, arXiv 1703.01780.
    """

    decay: float = 0.999
    start: int = 0
    every: int = 1

    def __call__(self, program: Program) -> Program:
        """See `Method`."""
        if not 0 <= self.decay < 1:
            raise InputError("Ema.decay", expected="0 to below 1", got=self.decay)
        if self.start < 0 or self.every < 1:
            raise InputError(
                "Ema", expected="start of 0 or more, every of 1 or more", got=(self.start, self.every)
            )
        return program.averaged(self, self.average)

    def average(self, average: Any, weights: Any, done: Array) -> Any:
        """The average after so many steps, see `program.Average`."""
        due = (done - self.start) % self.every == 0

        def blend(mean: Array, weight: Array) -> Array:
            weight = weight.astype(mean.dtype)
            moved = jnp.where(due, mean + (1.0 - self.decay) * (weight - mean), mean)
            return jnp.where(done <= self.start, weight, moved)

        return jax.tree.map(blend, average, weights)

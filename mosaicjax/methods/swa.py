"""Stochastic weight averaging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.errors import InputError
from mosaicjax.program import Method, Program


@dataclass(frozen=True)
class Swa(Method):
    """Evaluate, sample, generate and export with the mean of the weights at every so many steps.

    The weights after step `start` are the first of the mean, those `every` steps later the next; before that
    it is the weights. Training itself does not see it. It takes the memory of one more copy of the weights,
    in float32 at least, and is part of every checkpoint.

    It asks for a learning rate that stays up while it averages (`Constant`, or `Wsd` before its decay): after
    a full fall weights lie too close together for their mean to be another. For language models such a mean
    takes the place of a part of the fall (Sanyal et al. 2023, arXiv 2306.03241), and the whole fall mostly
    does better still (Hägele et al. 2024, arXiv 2405.18392).

    Source: Izmailov et al. 2018, arXiv 1803.05407.
    """

    start: int = 1
    every: int = 1

    def __call__(self, program: Program) -> Program:
        """See `Method`."""
        if self.start < 1 or self.every < 1:
            raise InputError("Swa", expected="start and every of 1 or more", got=(self.start, self.every))
        return program.averaged(self, self.average)

    def average(self, average: Any, weights: Any, done: Array) -> Any:
        """The average after so many steps, see `program.Average`."""
        since = done - self.start
        count = jnp.maximum(since, 0) // self.every + 1

        def join(mean: Array, weight: Array) -> Array:
            weight = weight.astype(mean.dtype)
            joined = mean + (weight - mean) / count.astype(mean.dtype)
            moved = jnp.where(since % self.every == 0, joined, mean)
            return jnp.where(since <= 0, weight, moved)

        return jax.tree.map(join, average, weights)

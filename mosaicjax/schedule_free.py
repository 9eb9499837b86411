"""Schedule-free AdamW: an average of the steps instead of a rate that falls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
import optax.contrib
from jax.typing import ArrayLike

from mosaicjax.errors import InputError
from mosaicjax.optim import Constant, Optimizer, Schedule, check_betas, decayed
from mosaicjax.spec import Spec


def average(weights: Any, state: Any) -> Any:
    """The average of the steps; other transformations may have been put around the one that holds it."""

    def is_mine(node: object) -> bool:
        return isinstance(node, optax.contrib.ScheduleFreeState)

    (mine,) = [node for node in jax.tree.leaves(state, is_leaf=is_mine) if is_mine(node)]
    return optax.contrib.schedule_free_eval_params(mine, weights)


@dataclass(frozen=True)
class ScheduleFree(Optimizer):
    """AdamW without momentum, whose steps z are averaged; gradients are taken between z and the average x.

    The model is used with the average: it is what is evaluated, sampled from and exported. `lr` should stay
    at its peak after the warm-up: then the run may end anywhere. `b1` says how near the average gradients are
    taken. It has the memory of AdamW. Decay as in `AdamW`, at the weights that gradients are taken at.

    Source: Defazio et al. 2024, arXiv 2405.15682; optax.contrib.
    """

    lr: Schedule = Constant()
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0

    def build(self, spec: Spec, steps: int) -> optax.GradientTransformation:
        """See `Optimizer.build`."""
        check_betas(self.b1, self.b2)
        if self.b1 == 0:
            raise InputError("ScheduleFree.b1", expected="above 0", got=self.b1)
        rate = self.lr.build(steps)
        stepped = optax.chain(
            optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False, bias_correction=True),
            decayed(self.decay_share(self.weight_decay), spec.map(lambda param: param.decay)),
            optax.scale_by_learning_rate(rate),
        )

        def rate_of(count: ArrayLike) -> ArrayLike:
            # optax counts the steps that the average weighs from 1.
            return rate(count - 1)

        return optax.contrib.schedule_free(stepped, rate_of, self.b1)

    @property
    def evaluated(self) -> Callable[[Any, Any], Any]:
        """See `Optimizer.evaluated`: the average."""
        return average

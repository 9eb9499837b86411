"""Learning rates of some weights, as multiples of the schedule's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaicjax.errors import InputError
from mosaicjax.methods.patterns import matches
from mosaicjax.program import Method, Program
from mosaicjax.spec import Param, is_param, path_name


@dataclass(frozen=True)
class ScaleRates(Method):
    """Multiply the learning rate of the weights whose names match a pattern, whatever the schedule.

    `patterns` are pairs of a pattern, as in `FreezeLayers`, and a factor above 0; a weight's first match
    counts, and without one it keeps the schedule's rate. The whole update is multiplied, weight decay too, as
    by a parameter group's rate elsewhere. Rates that fall by layer are

        ScaleRates(tuple((f"layer/{i}/*", 0.9 ** (11 - i)) for i in range(12)))

    For language models that is a tool of fine-tuning; in pre-training factors of the widths (of embeddings
    against matrices, above all) make rates carry over between sizes (Yang et al. 2022, arXiv
    2203.03466), while those by depth have no established gain.

    Source: Howard and Ruder 2018, arXiv 1801.06146, section 3.2.
    """

    patterns: tuple[tuple[str, float], ...] = ()

    def __call__(self, program: Program) -> Program:
        """See `Method`."""
        wrong = [factor for _, factor in self.patterns if not 0 < factor < math.inf]
        if wrong:
            raise InputError(
                "ScaleRates: a factor", expected="above 0", got=wrong[0], fix="FreezeLayers, for none at all"
            )
        found = matches(program.trainable, [name for name, _ in self.patterns], "ScaleRates.patterns")

        def factors(path: Any, param: Param) -> np.ndarray:
            """One a layer of a stacked weight, with as many dims as the weight."""
            each = [1.0 if i is None else self.patterns[i][1] for i in found[path_name(path)]]
            dims = len(param.axes) + (param.layers is not None)
            return np.asarray(each).reshape(-1, *[1] * (dims - 1))

        tree = jax.tree_util.tree_map_with_path(factors, program.trainable.tree, is_leaf=is_param)
        return program.refine(self, optimizer=optax.chain(program.optimizer, _scaled(tree)))


def _scaled(factors: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        def one(factor: np.ndarray, update: Any) -> Any:
            return update * jnp.asarray(factor, update.dtype)

        return jax.tree.map(one, factors, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)

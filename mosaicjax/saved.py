"""What a checkpoint holds of a run, and which of its weights the model is used with.

`trainable` has all weights, frozen ones too, so that what reads a model need not know how it was trained.
`evaluated` is there where the model is used with others, and has those of them that are not frozen.
"""

from __future__ import annotations

from typing import Any

import jax

from mosaicjax.hub.read import FIELD, USED
from mosaicjax.mesh import shardings
from mosaicjax.spec import join, split, whole_spec
from mosaicjax.step import Step, TrainState


def fields(step: Step, state: TrainState, frozen: Any) -> dict[str, Any]:
    """What is saved, by field."""
    held = {"step": state.step, "optimizer": state.optimizer, "program": state.program}
    held[FIELD] = join(state.trainable, frozen)
    averages = _averages(step, state)
    if averages is not None:
        held[USED] = join(averages, _where_both(averages, frozen))
    return held


def abstract(step: Step) -> dict[str, Any]:
    """Shapes, dtypes and places of what is saved."""
    state, program = step.abstract_state(), step.program
    weights = abstract_weights(step)
    held = {"step": state.step, "optimizer": state.optimizer, "program": state.program, FIELD: weights}
    averages = state.average if program.evaluated is None else state.trainable
    if averages is not None:

        def like(average: Any, weight: Any) -> Any:
            shape = weight.shape
            return average and jax.ShapeDtypeStruct(shape, average.dtype, sharding=average.sharding)

        held[USED] = jax.tree.map(like, averages, weights, is_leaf=_is_none)
    return held


def parts(step: Step, held: dict[str, Any]) -> tuple[TrainState, Any]:
    """State and frozen weights out of what was saved."""
    program = step.program
    trainable, frozen = split(held[FIELD], program.trainable, program.frozen)
    average = None
    if program.average is not None:
        average, _ = split(held[USED], program.trainable, program.frozen)
    return TrainState(held["step"], trainable, held["optimizer"], held["program"], average), frozen


def used(step: Step, state: TrainState, frozen: Any) -> Any:
    """The weights that the model is used with, all of them, in the dtype that weights rest in."""
    averages = _averages(step, state)
    if averages is None:
        return join(state.trainable, frozen)
    places = jax.tree.map(lambda leaf: leaf.sharding, averages)
    cast = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf.astype(step.program.dtypes.param), tree),
        out_shardings=places,
    )
    return join(cast(averages), frozen)


def abstract_weights(step: Step) -> Any:
    """Shapes, dtypes and places of all weights, frozen ones too."""
    spec, dtype = whole_spec(step.program.trainable, step.program.frozen), step.program.dtypes.param
    return spec.abstract(dtype, shardings(spec, step.layout))


def _averages(step: Step, state: TrainState) -> Any:
    """What the model is used with instead of its trainable weights; None where it is those."""
    evaluated = step.program.evaluated
    if evaluated is None:
        return state.average
    places = jax.tree.map(lambda leaf: leaf.sharding, state.trainable)
    return jax.jit(evaluated, out_shardings=places)(state.trainable, state.optimizer)


def _where_both(mine: Any, frozen: Any) -> Any:
    """Of the frozen weights those whose other layers are trained."""
    if not frozen:
        return frozen
    return jax.tree.map(lambda leaf, held: None if leaf is None else held, mine, frozen, is_leaf=_is_none)


def _is_none(leaf: object) -> bool:
    return leaf is None

"""What a checkpoint holds of a run, and which of its weights the model is used with.

`trainable` has all weights, frozen ones too, so that what reads a model need not know how it was trained.
`evaluated` is there where the model is used with others, and has those of them that are not frozen. Of a run
of adapters `adapters` stands in place of all weights, which lie where the run began (`hub.base`).
"""

from __future__ import annotations

from typing import Any

import jax

from mosaicjax.adapters import has_adapters
from mosaicjax.hub.base import ADAPTERS
from mosaicjax.hub.read import FIELD, USED
from mosaicjax.mesh import shardings
from mosaicjax.spec import join, only_frozen, split, whole_spec
from mosaicjax.step import Step, TrainState


def fields(step: Step, state: TrainState, frozen: Any) -> dict[str, Any]:
    """What is saved, by field; a reference is not."""
    held = {"step": state.step, "optimizer": state.optimizer, "program": state.program}
    averages = _averages(step, state)
    if adapts(step):
        held[ADAPTERS] = state.trainable
        return held if averages is None else held | {USED: averages}
    held[FIELD] = join(state.trainable, frozen)
    if averages is not None:
        held[USED] = join(averages, _where_both(averages, only_frozen(frozen)))
    return held


def abstract(step: Step) -> dict[str, Any]:
    """Shapes, dtypes and places of what is saved."""
    state, program = step.abstract_state(), step.program
    held = {"step": state.step, "optimizer": state.optimizer, "program": state.program}
    averages = state.average if program.evaluated is None else state.trainable
    if adapts(step):
        held[ADAPTERS] = state.trainable
        return held if averages is None else held | {USED: averages}
    held[FIELD] = weights = abstract_weights(step)
    if averages is not None:

        def like(average: Any, weight: Any) -> Any:
            shape = weight.shape
            return average and jax.ShapeDtypeStruct(shape, average.dtype, sharding=average.sharding)

        held[USED] = jax.tree.map(like, averages, weights, is_leaf=_is_none)
    return held


def parts(step: Step, held: dict[str, Any]) -> tuple[TrainState, Any]:
    """State and frozen weights out of what was saved; of a run of adapters there are none of these."""
    program = step.program
    if adapts(step):
        average = held[USED] if program.average is not None else None
        state = (held["step"], held[ADAPTERS], held["optimizer"], held["program"], average)
        return TrainState(*state), {}
    trainable, frozen = split(held[FIELD], program.trainable, program.frozen)
    average = None
    if program.average is not None:
        average, _ = split(held[USED], program.trainable, program.frozen)
    return TrainState(held["step"], trainable, held["optimizer"], held["program"], average), frozen


def used(step: Step, state: TrainState, frozen: Any) -> Any:
    """The weights that the model is used with, all of them, in the dtype that weights rest in.

    Adapters come beside the weights that they are of (`adapters.Adapted`).
    """
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


def abstract_used(step: Step) -> Any:
    """Shapes, dtypes and places of what `used` gives."""
    return join(step.abstract_state().trainable, step.abstract_frozen())


def adapts(step: Step) -> bool:
    """Whether adapters are trained, and not the model's own weights."""
    return has_adapters(step.program.trainable.tree)


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

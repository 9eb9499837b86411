"""Averages of weights against their definitions in float64, in runs too: saved, resumed, and used."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax import saved
from mosaicjax.errors import InputError
from mosaicjax.methods.ema import Ema
from mosaicjax.methods.freeze import FreezeLayers
from mosaicjax.methods.swa import Swa
from mosaicjax.spec import split
from tests import stepping, tiny
from tests.methods import toy


def by_definition(method, weights):
    """The average after each step, from the weights before the first step and after each."""
    found = [weights[0]]
    for step in range(1, len(weights)):
        average = found[-1]
        if step <= method.start:
            average = weights[step]
        elif (step - method.start) % method.every == 0 and isinstance(method, Ema):
            average = method.decay * average + (1 - method.decay) * weights[step]
        elif (step - method.start) % method.every == 0:
            average = np.mean(weights[method.start : step + 1 : method.every], axis=0)
        found.append(average)
    return found


METHODS = st.one_of(
    st.builds(Ema, decay=st.floats(0, 0.999), start=st.integers(0, 9), every=st.integers(1, 4)),
    st.builds(Swa, start=st.integers(1, 9), every=st.integers(1, 4)),
)


@settings(max_examples=20)
@given(method=METHODS, seed=st.integers(0, 2**20))
def test_averages_by_definition(method, seed):
    weights = np.random.default_rng(seed).standard_normal((15, 2, 3)).astype(np.float32)
    average = {"a": jnp.asarray(weights[0])}
    for step, expected in enumerate(by_definition(method, weights.astype(np.float64))):
        if step:
            average = method.average(average, {"a": jnp.asarray(weights[step])}, jnp.int32(step))
        np.testing.assert_allclose(average["a"], expected, atol=1e-6)


def test_small_weights_are_averaged_in_float32():
    """In bfloat16 a thousandth of the way would be lost to rounding each time."""
    method, mean = Ema(decay=0.999), {"a": jnp.zeros(1, jnp.float32)}
    for step in range(1, 101):
        mean = method.average(mean, {"a": jnp.ones(1, jnp.bfloat16)}, jnp.int32(step))
    assert mean["a"].dtype == jnp.float32
    assert float(mean["a"][0]) == pytest.approx(1 - 0.999**100, rel=1e-4)


@pytest.mark.parametrize("mesh", [pytest.param("compiler", marks=pytest.mark.slow), "explicit"])
def test_a_step_averages_the_new_weights(mesh):
    method = Ema(decay=0.5, start=1, every=2)
    states, _, state = toy.run(method(toy.program()), 5, toy.MESHES.get(mesh, toy.ONE))
    weights = [jax.tree.leaves(state.trainable) for state in states]
    for i, mean in enumerate(jax.tree.leaves(states[-1].average)):
        wide = [leaves[i].astype(np.float64) for leaves in weights]
        np.testing.assert_allclose(mean, by_definition(method, wide)[-1], atol=1e-7)
        assert np.abs(wide[-1] - mean).max() > 1e-3
    places = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (state.average, state.trainable)]
    assert places[0] == places[1]


@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_the_average():
    step = toy.step_of(Ema(decay=0.5)(toy.program()))
    with tiny.quick():
        compiled, state = step.lower().compile(), step.init()
    before = jax.tree.map(np.asarray, state.average)
    bad = toy.batch() | {"weights": np.full((toy.BATCH_ROWS, toy.SEQ), np.inf, np.float32)}
    state, _, metrics = compiled(state, {}, stepping.put(step, bad), stepping.signals(step))
    assert not metrics["fine"]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state.average), before)


def test_the_average_costs_one_copy_of_the_weights():
    made = toy.program()
    for dtype in ("float32", "bfloat16"):
        program = replace(made, dtypes=replace(made.dtypes, param=dtype))
        step = toy.step_of(Swa()(program))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.abstract_state().average))
        assert held == 4 * made.trainable.count()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Ema(decay=1.0), "Ema.decay; expected 0 to below 1; got 1.0"),
        (Ema(start=-1), "Ema; expected start of 0 or more, every of 1 or more"),
        (Ema(every=0), "Ema; expected start of 0 or more, every of 1 or more"),
        (Swa(start=0), "Swa; expected start and every of 1 or more"),
    ],
)
def test_averages_that_cannot_be(method, message):
    with pytest.raises(InputError, match=message):
        method(toy.program())


@pytest.mark.slow
def test_an_optimizer_may_say_which_weights_are_used():
    """Schedule-free descent steps from y and is used at x, which its state's z and y give."""
    free = optax.contrib.schedule_free_sgd(0.5, b1=0.9)
    made = replace(
        toy.program(),
        optimizer=free,
        evaluated=lambda weights, state: optax.contrib.schedule_free_eval_params(state, weights),
    )
    with pytest.raises(InputError, match="two say which weights .* got the optimizer then Ema"):
        Ema()(made)
    made = FreezeLayers(("embed", "layer/[01]/mix"))(made)
    step = toy.step_of(made)
    states, _, state = toy.run(made, 2)
    frozen = step.init_frozen()
    y, z = states[-1].trainable, states[-1].optimizer.z
    expected = jax.tree.map(lambda y, z: (y - (1 - 0.9) * z) / 0.9, y, z)
    used = saved.used(step, state, frozen)
    toy.close(jax.tree.map(np.asarray, split(used, made.trainable, made.frozen)[0]), expected, rtol=1e-4)
    np.testing.assert_array_equal(used["embed"], frozen["embed"])
    assert np.abs(expected["norm"] - y["norm"]).max() > 1e-3
    held, abstract = saved.fields(step, state, frozen), saved.abstract(step)
    assert jax.tree.structure(held) == jax.tree.structure(abstract)
    for ours, wanted in zip(jax.tree.leaves(held), jax.tree.leaves(abstract), strict=True):
        assert (ours.shape, ours.dtype, ours.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
    assert held["evaluated"]["embed"] is None
    np.testing.assert_array_equal(held["evaluated"]["norm"], used["norm"])
    back, kept = saved.parts(step, held)
    toy.close(
        jax.tree.map(np.asarray, (back, kept)), jax.tree.map(np.asarray, (state, frozen)), rtol=0, atol=0
    )

"""Optimizers against their papers' formulas in float64, schedules against hand calculation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax import optim
from mosaicjax.errors import InputError
from mosaicjax.optim import (
    AdamW,
    Ademamix,
    Adopt,
    Cosine,
    InverseSqrt,
    Linear,
    Lion,
    Schedule,
    Wsd,
)
from mosaicjax.schedule_free import ScheduleFree
from mosaicjax.spec import ONES, Param, Spec

SPEC = Spec(
    {"matrix": Param(("embed", "mlp"), ONES), "norm": {"scale": Param(("embed",), ONES, decay=False)}},
    {"embed": 4, "mlp": 3},
)
STEPS = 12


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (optim.Constant(peak=2.0, warmup=4), 9, {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 8: 2.0}),
        (Schedule(peak=2.0), 9, {0: 2.0, 8: 2.0}),
        (Cosine(peak=1.0, warmup=4, final=0.1), 12, {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.55, 12: 0.1, 50: 0.1}),
        (Cosine(peak=1.0, final=0.0), 12, {0: 1.0, 2: 0.5 + 0.25 * 3**0.5, 4: 0.75, 6: 0.5, 12: 0.0}),
        # GPT-J's form: the fall ends before the run does, and its end is held.
        (Cosine(peak=2.0, warmup=2, over=4, final=0.1), 20, {1: 2.0, 2: 2.0, 4: 1.1, 6: 0.2, 19: 0.2}),
        # GPT-NeoX's: to nothing over as many steps as the whole run has, but never below the floor.
        (
            Cosine(peak=1.0, warmup=3, over=12, final=0.0, floor=0.3),
            12,
            {3: 1.0, 7: 0.75, 9: 0.5, 10: 0.5 - 0.5 * np.sin(np.pi / 12), 11: 0.3},
        ),
        (Linear(peak=2.0, final=0.5), 10, {0: 2.0, 5: 1.5, 10: 1.0, 11: 1.0}),
        (Linear(peak=2.0, warmup=2), 10, {0: 1.0, 1: 2.0, 2: 2.0, 4: 1.5, 10: 0.0}),
        (Wsd(peak=1.0, warmup=2, decay=4), 10, {0: 0.5, 2: 1.0, 6: 1.0, 7: 0.75, 8: 0.5, 10: 0.0}),
        (Wsd(peak=1.0, decay=0), 10, {0: 1.0, 9: 1.0, 10: 1.0}),
        (Wsd(peak=1.0, decay=10, final=0.5), 10, {0: 1.0, 5: 0.75, 10: 0.5}),
        (InverseSqrt(peak=1.0, warmup=4), 100, {0: 0.25, 4: 1.0, 16: 0.5, 64: 0.25}),
        (
            InverseSqrt(peak=1.0, warmup=4, cooldown=36),
            104,
            {68: (4 / 68) ** 0.5, 86: 0.5 * (4 / 68) ** 0.5, 104: 0.0},
        ),
        (Wsd(peak=1.0, warmup=10), 5, {0: 0.1, 4: 0.5}),
        (Cosine(peak=1.0, warmup=5), 5, {0: 0.2, 4: 1.0}),
    ],
)
def test_schedules_by_hand(schedule, steps, expected):
    rate = schedule.build(steps)
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, abs=2e-7), step


@settings(max_examples=15)
@given(
    kind=st.sampled_from([optim.Constant, Cosine, Linear, Wsd, InverseSqrt]),
    warmup=st.integers(0, 20),
    steps=st.integers(20, 60),
)
def test_rates_stay_between_nothing_and_the_peak(kind, warmup, steps):
    rate = kind(peak=0.3, warmup=warmup).build(steps)
    rates = np.asarray(rate(np.arange(steps)))
    assert (rates > 0).all()
    assert rates.max() == np.float32(0.3)
    assert (np.diff(rates[:warmup]) > 0).all()
    assert (np.diff(rates[warmup:]) <= 1e-7).all()


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Cosine(peak=0.0), "learning rate; expected a peak above 0 and a warm-up of 0 or more steps"),
        (Cosine(warmup=-1), "got peak 0.0006, warmup -1"),
        (Cosine(final=10.0), "Cosine.final; expected a share of the peak, 0 to 1; got 10.0"),
        (Cosine(floor=-1.0), "Cosine.floor; expected a share of the peak, 0 to 1; got -1.0"),
        (Cosine(over=-1), "Cosine.over; expected 0 (all steps after the warm-up) or more; got -1"),
        (Linear(final=-0.1), "Linear.final"),
        (Wsd(final=2.0), "Wsd.final"),
        (Wsd(warmup=4, decay=9), "Wsd.decay; expected 0 to 8 steps (those after the warm-up); got 9"),
        (InverseSqrt(warmup=4, cooldown=9), "InverseSqrt.cooldown; expected 0 to 8 steps"),
    ],
)
def test_schedules_that_do_not_fit(schedule, words):
    with pytest.raises(InputError, match=re.escape(words)):
        schedule.build(STEPS)


def trajectory(optimizer, steps=STEPS):
    """Weights after each step under random gradients, ours and the gradients."""
    rng = np.random.default_rng(0)
    weights = SPEC.map(lambda param: jnp.asarray(rng.standard_normal(param.shape(SPEC.dims)), jnp.float32))
    transform = optimizer.build(SPEC, steps)
    state = transform.init(weights)
    path, all_grads = [weights], []

    @jax.jit
    def update(weights, state, grads):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transform.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state

    for _ in range(steps):
        grads = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), weights)
        weights, state = update(weights, state, grads)
        path.append(weights)
        all_grads.append(grads)
    return path, all_grads, state


def wide(leaf):
    return np.asarray(leaf).astype(np.float64)


def test_adamw_is_composers_decoupled_adamw():
    optimizer = AdamW(lr=Linear(peak=0.1, warmup=3, final=0.2), b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.02)
    path, all_grads, _ = trajectory(optimizer)
    rate = optimizer.lr.build(STEPS)
    for pick, decay in ((lambda tree: tree["matrix"], 0.02), (lambda tree: tree["norm"]["scale"], 0.0)):
        weight = wide(pick(path[0]))
        mean, square = np.zeros_like(weight), np.zeros_like(weight)
        for t in range(STEPS):
            lr, grad = float(rate(t)), wide(pick(all_grads[t]))
            mean = 0.8 * mean + 0.2 * grad
            square = 0.95 * square + 0.05 * grad**2
            corrected = (mean / (1 - 0.8 ** (t + 1))) / (np.sqrt(square / (1 - 0.95 ** (t + 1))) + 1e-3)
            weight = weight * (1 - decay * lr / 0.1) - lr * corrected
            np.testing.assert_allclose(pick(path[t + 1]), weight, rtol=2e-5, atol=2e-6)


def test_lion_is_composers_decoupled_lion():
    optimizer = Lion(lr=Cosine(peak=0.1, warmup=3), b1=0.7, b2=0.9, weight_decay=0.02)
    path, all_grads, _ = trajectory(optimizer)
    rate = optimizer.lr.build(STEPS)
    for pick, decay in ((lambda tree: tree["matrix"], 0.02), (lambda tree: tree["norm"]["scale"], 0.0)):
        weight, momentum = wide(pick(path[0])), 0.0
        for t in range(STEPS):
            lr, grad = float(rate(t)), wide(pick(all_grads[t]))
            weight = weight * (1 - decay * lr / 0.1) - lr * np.sign(0.7 * momentum + 0.3 * grad)
            momentum = 0.9 * momentum + 0.1 * grad
            np.testing.assert_allclose(pick(path[t + 1]), weight, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [AdamW, Lion, Adopt, Ademamix])
def test_cautious_decay_takes_what_moves_to_zero_alone(kind):
    """Beside the same without decay, step by step from the same weights."""
    rng = np.random.default_rng(2)
    weights = SPEC.map(lambda param: jnp.asarray(rng.standard_normal(param.shape(SPEC.dims)), jnp.float32))
    rate = optim.Constant(peak=0.1)
    bare, decays = (
        kind(lr=rate, weight_decay=share, cautious=True).build(SPEC, STEPS) for share in (0.0, 0.02)
    )
    states = [each.init(weights) for each in (bare, decays)]
    for step in range(5):
        grads = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), weights)
        with jax.numpy_dtype_promotion("standard"):
            without, states[0] = bare.update(grads, states[0], weights)
            found, states[1] = decays.update(grads, states[1], weights)
        np.testing.assert_array_equal(found["norm"]["scale"], without["norm"]["scale"])
        weight, update = wide(weights["matrix"]), wide(without["matrix"])
        expected = update - np.where(-update * weight > 0, 0.02 * weight, 0.0)
        np.testing.assert_allclose(found["matrix"], expected, rtol=1e-5, atol=1e-7)
        if step:
            assert 0 < (expected != update).sum() < weight.size


def test_adopt_is_the_papers_second_form():
    optimizer = Adopt(lr=Linear(peak=0.1, warmup=3), b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.02)
    path, all_grads, _ = trajectory(optimizer)
    rate = optimizer.lr.build(STEPS)
    weight, momentum, square = wide(path[0]["matrix"]), 0.0, None
    for t in range(STEPS):
        grad, lr = wide(all_grads[t]["matrix"]), float(rate(t))
        if t == 0:
            square = grad**2
        else:
            direction = np.clip(grad / np.maximum(np.sqrt(square), 1e-3), -(t**0.25), t**0.25)
            momentum = 0.8 * momentum + 0.2 * direction
            square = 0.95 * square + 0.05 * grad**2
        weight = weight * (1 - 0.02 * lr / 0.1) - lr * momentum
        np.testing.assert_allclose(path[t + 1]["matrix"], weight, rtol=2e-5, atol=2e-6)


def test_schedule_free_is_the_papers():
    """z steps by Adam without momentum, x averages z by squared rates, gradients are taken between."""
    rate = optim.Constant(peak=0.1, warmup=4)
    optimizer = ScheduleFree(lr=rate, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.02)
    path, all_grads, state = trajectory(optimizer)
    lr = [float(rate.build(STEPS)(t)) for t in range(STEPS)]
    y = wide(path[0]["matrix"])
    z, x, square = y, y, 0.0
    for t in range(STEPS):
        grad = wide(all_grads[t]["matrix"])
        square = 0.95 * square + 0.05 * grad**2
        direction = grad / (np.sqrt(square / (1 - 0.95 ** (t + 1))) + 1e-3)
        z = z - lr[t] * (direction + 0.2 * y)
        share = lr[t] ** 2 / sum(each**2 for each in lr[: t + 1])
        x = (1 - share) * x + share * z
        y = 0.2 * z + 0.8 * x
        np.testing.assert_allclose(path[t + 1]["matrix"], y, rtol=1e-4, atol=1e-5)
    # Whatever a method puts around it.
    np.testing.assert_allclose(
        optimizer.evaluated(path[-1], (None, (state,)))["matrix"], x, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(InputError, match="ScheduleFree.b1; expected above 0; got 0.0"):
        ScheduleFree(b1=0.0).build(SPEC, STEPS)


def test_ademamix_is_the_papers():
    optimizer = Ademamix(
        lr=Cosine(peak=0.1, warmup=3), b1=0.8, b2=0.95, b3=0.99, alpha=3.0, eps=1e-3, weight_decay=0.02
    )
    path, all_grads, _ = trajectory(optimizer)
    rate = optimizer.lr.build(STEPS)
    weight, fast, slow, square = wide(path[0]["matrix"]), 0.0, 0.0, 0.0
    first, last = (np.log(0.5) / np.log(beta) - 1 for beta in (0.8, 0.99))
    for t in range(STEPS):
        grad, lr, share = wide(all_grads[t]["matrix"]), float(rate(t)), (t + 1) / STEPS
        b3 = 0.5 ** (1 / ((1 - share) * first + share * last + 1))
        fast, slow = 0.8 * fast + 0.2 * grad, b3 * slow + (1 - b3) * grad
        square = 0.95 * square + 0.05 * grad**2
        upper = fast / (1 - 0.8 ** (t + 1)) + 3.0 * share * slow
        direction = upper / (np.sqrt(square / (1 - 0.95 ** (t + 1))) + 1e-3)
        weight = weight * (1 - 0.02 * lr / 0.1) - lr * direction
        np.testing.assert_allclose(path[t + 1]["matrix"], weight, rtol=5e-5, atol=5e-6)
    with pytest.raises(InputError, match="Ademamix.b3 and alpha; expected b1 < b3 < 1"):
        Ademamix(b3=0.5).build(SPEC, STEPS)


def test_a_step_at_the_peak_takes_the_decay_and_no_more():
    # With no gradient Adam's own update is 0: what is left of a weight is decay alone.
    optimizer = AdamW(lr=optim.Constant(peak=1e-3), weight_decay=0.25)
    transform = optimizer.build(SPEC, 5)
    weights = SPEC.map(lambda param: jnp.ones(param.shape(SPEC.dims)))
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = transform.update(jax.tree.map(jnp.zeros_like, weights), transform.init(weights), weights)
    assert (np.asarray(updates["matrix"]) == -0.25).all()
    assert (np.asarray(updates["norm"]["scale"]) == 0).all()


@pytest.mark.parametrize("kind", [AdamW, Lion])
def test_momentum_dtype_is_kept(kind):
    _, _, state = trajectory(kind(momentum_dtype="bfloat16"), steps=2)
    momentum = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.bfloat16]
    assert sum(leaf.size for leaf in momentum) == SPEC.count()


@pytest.mark.parametrize(
    "optimizer", [AdamW(b1=1.0), AdamW(b2=-0.1), Lion(b2=1.0), Adopt(b2=1.0), Ademamix(b1=-1.0)]
)
def test_betas_that_cannot_be(optimizer):
    with pytest.raises(InputError, match="optimizer b1 and b2; expected 0 to below 1"):
        optimizer.build(SPEC, STEPS)


@pytest.mark.parametrize(
    "optimizer", [AdamW(weight_decay=-0.1), AdamW(weight_decay=1.5), Lion(weight_decay=-1.0)]
)
def test_decay_that_cannot_be(optimizer):
    with pytest.raises(InputError, match="weight_decay; expected a share of a weight, 0 to below 1"):
        optimizer.build(SPEC, STEPS)

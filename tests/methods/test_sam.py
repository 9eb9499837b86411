"""Sharpness-aware steps: the gradient at weights that were moved up the gradient, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax.errors import InputError
from mosaicjax.methods.sam import Sam
from tests.methods import toy

RATE = 0.5


def norm_of(grads):
    return np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(grads)))


def by_hand(weights, steps, rho, every):
    """Weights after some steps, and each step's loss and the norm of the gradient that it took."""
    measured = []
    for number in range(steps):
        grads, loss = toy.naive_gradients(weights, toy.batch(number))
        if number % every == 0:
            factor = rho / norm_of(grads)
            moved = jax.tree.map(lambda w, g, f=factor: w + np.float32(f * g), weights, grads)
            grads, _ = toy.naive_gradients(moved, toy.batch(number))
        measured.append((loss, norm_of(grads)))
        weights = jax.tree.map(lambda w, g: w - np.float32(RATE * g), weights, grads)
    return weights, measured


@pytest.mark.parametrize(
    ("mesh", "microbatch", "every"),
    [
        pytest.param("one", 8, 1, marks=pytest.mark.slow),
        pytest.param("compiler", 4, 2, marks=pytest.mark.slow),
        ("explicit", 4, 2),
    ],
)
def test_steps_are_those_by_hand(mesh, microbatch, every):
    rho = 0.3
    made = Sam(rho=rho, every=every)(toy.descent(microbatch=microbatch))
    states, metrics, _ = toy.run(made, 3, toy.MESHES.get(mesh, toy.ONE))
    expected, measured = by_hand(toy.whole_start(), 3, rho, every)
    toy.close(states[-1].trainable, expected, rtol=2e-4, atol=2e-6)
    for got, (loss, norm) in zip(metrics, measured, strict=True):
        assert (got["loss"], got["grad_norm"]) == pytest.approx((loss, norm), rel=1e-4)
    # The move is felt: a plain step ends elsewhere.
    plain, _ = by_hand(toy.whole_start(), 3, rho, every=10**9)
    assert norm_of(jax.tree.map(np.subtract, plain, expected)) > 1e-2 * norm_of(expected)


def test_a_zero_gradient_moves_nothing():
    weights = {"a": jnp.asarray([1.0, -2.0])}
    moved = Sam().regrade(weights, {"a": jnp.zeros(2)}, jnp.int32(0), lambda weights: weights)
    np.testing.assert_array_equal(moved["a"], weights["a"])


@pytest.mark.parametrize("sam", [Sam(rho=0.0), Sam(rho=-1.0), Sam(every=0)])
def test_what_cannot_be(sam):
    with pytest.raises(InputError, match="Sam; expected rho above 0, every of 1 or more"):
        sam(toy.program())

"""Gradient clipping against numpy, and the refusal of a method listed twice."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaicjax.errors import InputError
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.program import Measured, Method, Phase, Program
from mosaicjax.spec import Dtypes, Spec

EMPTY = Spec({}, {})
PROGRAM = Program(EMPTY, EMPTY, {}, None, optax.identity(), None, Phase(4, 2, 2), Dtypes())


@pytest.mark.parametrize("norm", [0.5, 3.0, 1e3])
def test_gradients_are_scaled_together(norm):
    rng = np.random.default_rng(0)
    grads = {
        "a": rng.standard_normal((5, 3)).astype(np.float32),
        "b": {"c": rng.standard_normal(7).astype(np.float32)},
    }
    clip = ClipGradients(norm)(PROGRAM).optimizer
    got, _ = clip.update(grads, clip.init(grads))
    length = np.sqrt((grads["a"].astype(float) ** 2).sum() + (grads["b"]["c"].astype(float) ** 2).sum())
    share = min(1.0, norm / length)
    np.testing.assert_allclose(got["a"], grads["a"] * share, rtol=1e-6)
    np.testing.assert_allclose(got["b"]["c"], grads["b"]["c"] * share, rtol=1e-6)


@pytest.mark.parametrize("same, length", [(True, 4.0), (False, 5.0)])
def test_a_measured_norm_counts_for_the_very_gradients_it_is_of(same, length):
    """The norm told is not the true one, 5, so that it shows which was taken."""
    grads = {"a": jnp.array([3.0, 4.0])}
    measured = Measured(grads if same else {"a": grads["a"]}, jnp.float32(4.0))
    clip = ClipGradients(2.0)(PROGRAM).optimizer
    got, _ = clip.update(grads, clip.init(grads), measured=measured)
    np.testing.assert_allclose(got["a"], np.array([3.0, 4.0]) * 2 / length, rtol=1e-6)


def test_no_gradient_stays_none():
    clip = ClipGradients(1.0)(PROGRAM).optimizer
    grads = {"a": jnp.zeros(3)}
    assert (np.asarray(clip.update(grads, clip.init(grads))[0]["a"]) == 0).all()


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_a_norm_that_cannot_be(norm):
    with pytest.raises(InputError, match=r"ClipGradients.norm; expected above 0; got"):
        ClipGradients(norm)(PROGRAM)


@dataclass(frozen=True)
class Twice(Method):
    def __call__(self, program):
        return program.refine(self, phase=replace(program.phase, seq=2 * program.phase.seq))


def test_methods_are_recorded_and_refused_twice():
    program = Twice()(ClipGradients()(PROGRAM))
    assert program.applied == ("ClipGradients", "Twice")
    assert program.phase.seq == 8
    assert PROGRAM.applied == ()
    with pytest.raises(
        InputError, match="the method ClipGradients is listed twice; got ClipGradients then Twice"
    ):
        ClipGradients(2.0)(program)

"""What a backward pass keeps of functions of single entries, and that their gradients are the plain ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from mosaicjax.layers.linear import from_inputs
from mosaicjax.layers.mlp import Activation


@pytest.mark.slow
# Every shape is compiled anew.
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 5), wide=st.integers(1, 9), seed=st.integers(0, 9))
def test_the_exact_gelus_gradient_by_hand(rows, wide, seed):
    rng = np.random.default_rng(seed)
    x, grad = (rng.standard_normal((rows, wide)) for _ in range(2))
    out, back = jax.vjp(Activation.GELU.apply, jnp.asarray(x, jnp.float32))
    below = (1 + erf(x / np.sqrt(2))) / 2
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(out, x * below, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        back(jnp.asarray(grad, jnp.float32))[0], grad * (below + x * density), rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_the_input_alone_is_kept(activation):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 7)), jnp.float32)
    _, back = jax.vjp(Activation(activation).apply, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(back)) == x.size


def test_gradients_of_all_inputs():
    rng = np.random.default_rng(1)
    x, scale = (jnp.asarray(rng.standard_normal(5), jnp.float32) for _ in range(2))

    def twice(factor, weights, x):
        return factor * weights["scale"] * x * x

    got = jax.grad(lambda w, x: jnp.sum(from_inputs(partial(twice, 2.0), w, x)), (0, 1))({"scale": scale}, x)
    np.testing.assert_allclose(got[0]["scale"], 2 * x * x, rtol=1e-6)
    np.testing.assert_allclose(got[1], 4 * scale * x, rtol=1e-6)

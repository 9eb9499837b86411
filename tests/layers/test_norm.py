"""Norms against float64 numpy, and where their precision is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax.layers.norm import LayerNorm, RmsNorm
from mosaicjax.spec import Dtypes
from tests.models import oracle

NORMS = [LayerNorm(), LayerNorm(bias=False, eps=1e-2), RmsNorm(), RmsNorm(eps=0.5)]


def draw(norm, dims):
    rng = np.random.default_rng(0)
    x = (1.5 + 3 * rng.standard_normal((2, 5, 4, 6))).astype(np.float32)
    weights = {
        name: rng.standard_normal(x.shape[-dims:]).astype(np.float32) for name in norm.params(("a",) * dims)
    }
    return weights, x


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("norm", NORMS)
def test_equals_numpy(norm, dims):
    weights, x = draw(norm, dims)
    got = norm.apply(jax.tree.map(jnp.asarray, weights), jnp.asarray(x), Dtypes())
    np.testing.assert_allclose(
        got, oracle.norm(norm, weights, x.astype(np.float64), dims), rtol=1e-5, atol=2e-6
    )


def errors(norm):
    """Mean error under bfloat16, in units of the last place of bfloat16."""
    weights, x = draw(norm, 1)
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (weights, x))
    rounded, values = jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.float32), np.float64), low)
    got = norm.apply(*low, Dtypes(compute="bfloat16"))
    assert got.dtype == jnp.bfloat16
    expected = oracle.norm(norm, rounded, values)
    places = np.abs(np.asarray(got.astype(jnp.float32)) - expected) / np.exp2(
        np.floor(np.log2(np.abs(expected))) - 7
    )
    return places.mean()


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16_is_normalised_in_float32(norm):
    # Rounding the result once costs half a place at most, a quarter in the mean.
    assert errors(norm) < 0.3


def test_low_precision_computes_in_bfloat16():
    assert 0.4 < errors(LayerNorm(low_precision=True)) < 8


@pytest.mark.parametrize("norm", NORMS)
def test_norm_weights_start_at_nothing_and_are_not_decayed(norm):
    params = norm.params(("embed",))
    assert all(not param.decay for param in params.values())
    assert params["scale"].init.value == 1
    assert ("bias" in params) == getattr(norm, "bias", False)
    assert all(params[name].init.value == 0 for name in params if name == "bias")

"""Learning rates by name: every weight's update is the plain one times the factor of its first match."""

import fnmatch

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.methods.freeze import FreezeLayers
from mosaicjax.methods.rates import ScaleRates
from mosaicjax.optim import AdamW, Cosine
from tests.methods import toy

FACTORS = st.floats(0.01, 10)
PAIRS = st.dictionaries(
    st.sampled_from(["embed", "norm", "layer/0/*", "layer/[12]/*", "layer/3/gain"]), FACTORS, min_size=1
).map(lambda pairs: tuple(pairs.items()))


def factor(pairs, name):
    return next((value for pattern, value in pairs if fnmatch.fnmatchcase(name, pattern)), 1.0)


def times_factors(tree, pairs):
    """A tree of all weights' shapes, each layer times its factor, one after the other."""
    scaled = jax.tree.map(np.copy, tree)
    scaled["embed"] *= factor(pairs, "embed")
    scaled["norm"] *= factor(pairs, "norm")
    for layer in range(toy.LAYERS):
        for name, leaf in scaled["stacks"][layer % 2]["layer"].items():
            leaf[layer // 2] *= factor(pairs, f"layer/{layer}/{name}")
    return scaled


@settings(max_examples=6)
@given(pairs=PAIRS, seed=st.integers(0, 2**20))
def test_an_update_is_the_plain_one_times_the_factor(pairs, seed):
    """Of an optimizer with weight decay and a schedule, over two of its steps."""
    rng = np.random.default_rng(seed)
    plain = toy.program(optimizer=AdamW(lr=Cosine(peak=1e-2, warmup=3), weight_decay=0.1))
    scaled = ScaleRates(pairs)(plain)
    weights = toy.SPEC.map(lambda param: rng.standard_normal(param.shape(toy.SPEC.dims)).astype(np.float32))
    states = [program.optimizer.init(weights) for program in (plain, scaled)]
    for _ in range(2):
        grads = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), weights)
        with jax.numpy_dtype_promotion("standard"):
            expected, states[0] = plain.optimizer.update(grads, states[0], weights)
            got, states[1] = scaled.optimizer.update(grads, states[1], weights)
        toy.close(got, times_factors(jax.tree.map(np.asarray, expected), pairs), rtol=1e-6)


@pytest.mark.slow
def test_a_steps_weights_move_by_the_factor():
    pairs = (("layer/3/*", 0.5), ("layer/*", 0.1), ("embed", 3.0))
    clipped, ends = ClipGradients(0.1)(toy.program()), []
    for made in (clipped, ScaleRates(pairs)(clipped)):
        states, _, _ = toy.run(made, 1, toy.MESHES["explicit"])
        ends.append(jax.tree.map(np.subtract, states[1].trainable, states[0].trainable))
    toy.close(ends[1], times_factors(ends[0], pairs), rtol=1e-3, atol=1e-6)


def test_frozen_layers_have_no_rate():
    """Patterns count layers of the model, not places in what is left of a stacked weight."""
    frozen = FreezeLayers(("layer/[01]/*",))(toy.program())
    made = ScaleRates((("layer/2/*", 0.5), ("layer/3/*", 0.25)))(frozen)
    ones = made.trainable.map(lambda param: np.ones(param.shape(toy.SPEC.dims), np.float32))
    with jax.numpy_dtype_promotion("standard"):
        plain, _ = frozen.optimizer.update(ones, frozen.optimizer.init(ones), ones)
        got, _ = made.optimizer.update(ones, made.optimizer.init(ones), ones)
    for turn, value in enumerate((0.5, 0.25)):
        stack, other = (tree["stacks"][turn]["layer"]["mix"] for tree in (got, plain))
        np.testing.assert_allclose(stack, value * other, rtol=1e-6)
    np.testing.assert_array_equal(got["embed"], plain["embed"])
    with pytest.raises(InputError, match="'layer/0/mix' matches no weight that is trained"):
        ScaleRates((("layer/0/mix", 0.5),))(frozen)
    with pytest.raises(InputError, match="FreezeLayers after ScaleRates.*fix: FreezeLayers first"):
        FreezeLayers(("embed",))(ScaleRates((("embed", 0.5),))(toy.program()))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_cannot_be(value):
    with pytest.raises(InputError, match="ScaleRates: a factor; expected above 0"):
        ScaleRates((("embed", value),))(toy.program())

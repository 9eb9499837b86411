"""Models without loops beside those with: the same weights by name, and the same logits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax.layers.attention import Attention
from mosaicjax.layers.position import Rotary
from mosaicjax.layers.token_inputs import Bigram, Smear
from mosaicjax.mesh import Mesh, shardings
from mosaicjax.models import mpt
from mosaicjax.models.unrolled import unrolled, unrolled_weights
from tests.models.test_decode import VOCAB, drawn_weights, one_device, recomputed
from tests.models.test_decode_families import FAMILIES_SMALL, fast_once

MIXED = mpt.Config(
    layers=6,
    embed=32,
    heads=4,
    kv_heads=2,
    mlp=48,
    vocab=VOCAB,
    position=Rotary(theta=100.0),
    attention=Attention(sinks=True),
    inputs=(Bigram(64), Smear()),
    value_tables=2,
    windows=(5, 0, 3),
)


def check(decoder, layout):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (2, 11), dtype=np.int32)
    weights = drawn_weights(decoder, layout)
    flat = unrolled(decoder)
    assert flat.layers == decoder.layers and all(stack.repeat == 1 for stack in flat.stacks)
    found = recomputed(flat, unrolled_weights(decoder, weights, layout), layout, tokens)
    expected = recomputed(decoder, weights, layout, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("config", [MIXED, *fast_once(FAMILIES_SMALL)])
def test_logits_are_the_same(config):
    check(config.build(), one_device())


def test_over_a_mesh():
    config = mpt.Config(layers=4, embed=32, heads=4, mlp=48, vocab=128, windows=(6, 0))
    check(config.build(), Mesh(fsdp=(2,), tensor=2).build(jax.devices()[:4]))


@pytest.mark.slow
def test_weights_are_those_that_a_model_without_loops_draws():
    """A weight's values depend on its name and its layer's number alone, in a loop or out of it."""
    decoder, layout = replace(MIXED, vocab=128).build(), Mesh(fsdp=(2,), tensor=2).build(jax.devices()[:4])
    flat, key = unrolled(decoder), jax.random.key(5)
    drawn = decoder.spec().init(key, "float32", shardings(decoder.spec(), layout))
    expected = flat.spec().init(key, "float32", shardings(flat.spec(), layout))
    found = unrolled_weights(decoder, drawn, layout)

    def same(path, mine, theirs):
        assert mine.sharding.is_equivalent_to(theirs.sharding, mine.ndim), path
        np.testing.assert_array_equal(mine, theirs, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(same, found, expected)
    assert decoder.spec().count() == sum(jnp.size(x) for x in jax.tree.leaves(found))

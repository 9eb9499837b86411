"""The step over pages against whole rows without a cache, however prompts and tokens are cut into calls."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax.layers.attention import Attention
from mosaicjax.layers.block import Block, StreamScales
from mosaicjax.layers.position import Alibi, Rotary
from mosaicjax.layers.token_inputs import Bigram, Smear
from mosaicjax.mesh import Mesh
from mosaicjax.models import mpt
from mosaicjax.models.paged import empty_pages, paged_step
from tests.models.test_decode import DTYPES, SMALL, VOCAB, drawn_weights, one_device, recomputed
from tests.models.test_decode_families import FAMILIES_SMALL, fast_once

ROWS, TOTAL, SIZE, WIDE = 3, 14, 4, 5
PARTS = mpt.Config(
    layers=2,
    embed=32,
    heads=4,
    kv_heads=2,
    mlp=48,
    vocab=VOCAB,
    position=Rotary(theta=100.0),
    attention=Attention(sinks=True),
    block=Block(scales=StreamScales()),
    inputs=(Bigram(64), Smear()),
    value_tables=1,
    windows=(5, 0),
)


def cuts(seed):
    """How many tokens each row gets in each call, until all have all; a row may get none."""
    rng = np.random.default_rng(seed)
    left = np.full(ROWS, TOTAL)
    while left.any():
        given = np.minimum(rng.integers(0, 5, ROWS), left)
        left -= given
        yield given


def check(decoder, layout, seed=0):
    rng = np.random.default_rng(seed)
    weights = drawn_weights(decoder, layout)
    tokens = rng.integers(0, VOCAB, (ROWS, TOTAL), dtype=np.int32)
    expected = recomputed(decoder, drawn_weights(decoder, one_device()), one_device(), tokens)
    count = ROWS * WIDE + 3
    tables = rng.permutation(count)[: ROWS * WIDE].reshape(ROWS, WIDE).astype(np.int32)
    run = jax.jit(partial(paged_step, decoder, layout=layout, dtypes=DTYPES), donate_argnames="pages")
    # What nobody wrote is no part of any result: it is not zero here.
    pages = jax.tree.map(lambda x: x + 3.0, empty_pages(decoder, count, SIZE, layout, DTYPES))
    done, seen = np.zeros(ROWS, np.int32), 0
    for given in cuts(seed):
        now = rng.integers(0, VOCAB, (ROWS, 4), dtype=np.int32)
        for row in range(ROWS):
            now[row, : given[row]] = tokens[row, done[row] : done[row] + given[row]]
        before = np.where(done > 0, tokens[np.arange(ROWS), np.maximum(done - 1, 0)], 0).astype(np.int32)
        logits, pages = run(
            weights,
            tokens_BL=jnp.asarray(now),
            first_B=jnp.asarray(done),
            lengths_B=jnp.asarray(given, jnp.int32),
            before_B=jnp.asarray(before),
            tables_BM=jnp.asarray(tables),
            pages=pages,
        )
        done = done + given.astype(np.int32)
        for row in np.flatnonzero(given):
            np.testing.assert_allclose(logits[row], expected[row, done[row] - 1], atol=2e-4)
            seen += 1
    assert seen > 3 * ROWS and np.abs(expected).max() > 0.1


@pytest.mark.parametrize("config", fast_once(FAMILIES_SMALL))
def test_families(config):
    check(config.build(), one_device())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_parts_that_read_tokens_before_and_windows(seed):
    check(PARTS.build(), one_device(), seed)


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(fsdp=(2,), tensor=2),
        pytest.param(Mesh(fsdp=(1,), tensor=4, rules={"kv_heads": "none"}), marks=pytest.mark.slow),
    ],
)
def test_over_a_mesh(mesh):
    """Key heads lie apart on two devices; on four, query heads do, and all have both key heads."""
    config = mpt.Config(
        layers=2, embed=32, heads=4, kv_heads=2, mlp=48, vocab=128, position=Alibi(), windows=(6, 0)
    )
    layout = mesh.build(jax.devices()[:4])
    check(config.build(), layout)


def test_pages_are_updated_in_place():
    """No copy of the pages is made, and none is returned beside them."""
    decoder, layout = SMALL.build(), one_device()
    pages = jax.eval_shape(lambda: empty_pages(decoder, 500, SIZE, layout, DTYPES))
    numbers = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    run = jax.jit(partial(paged_step, decoder, layout=layout, dtypes=DTYPES), donate_argnames="pages")
    memory = (
        run.lower(
            jax.eval_shape(lambda: drawn_weights(decoder, layout)),
            tokens_BL=jax.ShapeDtypeStruct((ROWS, 4), jnp.int32),
            first_B=numbers,
            lengths_B=numbers,
            before_B=numbers,
            tables_BM=jax.ShapeDtypeStruct((ROWS, WIDE), jnp.int32),
            pages=pages,
        )
        .compile()
        .memory_analysis()
    )
    held = sum(x.size * 4 for x in jax.tree.leaves(pages))
    assert memory.alias_size_in_bytes == held
    assert memory.temp_size_in_bytes < held / 2

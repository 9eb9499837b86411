"""Grouped products against a loop over the groups, and the tiles that the TPU kernel is given."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.kernels.grouped import (
    LANES,
    MAX_ROW_TILES,
    VMEM_BYTES,
    Grouped,
    best_tiles,
    grouped,
)
from tests import tiny


def looped(x, weight, sizes, grad):
    """Product, and the gradients of its product with `grad`, group by group in float64."""
    x, weight, grad = (np.asarray(array, np.float64) for array in (x, weight, grad))
    out, x_grad, weight_grad = np.zeros(grad.shape), np.zeros(x.shape), np.zeros(weight.shape)
    begin = 0
    for group, size in enumerate(sizes):
        rows = slice(begin, begin + size)
        out[rows] = x[rows] @ weight[group]
        x_grad[rows] = grad[rows] @ weight[group].T
        weight_grad[group] = x[rows].T @ grad[rows]
        begin += size
    return out, x_grad, weight_grad


def agree(sizes, inner, outer, how, seed):
    rng = np.random.default_rng(seed)
    rows = sum(sizes)
    x = rng.standard_normal((rows, inner)).astype(np.float32)
    weight = rng.standard_normal((len(sizes), inner, outer)).astype(np.float32)
    grad = rng.standard_normal((rows, outer)).astype(np.float32)

    def run(x, weight, sizes, grad):
        out, back = jax.vjp(lambda x, weight: grouped(x, weight, sizes, how), x, weight)
        return out, *back(grad)

    with tiny.quick():
        got = jax.jit(run)(x, weight, jnp.asarray(sizes, jnp.int32), grad)
    for ours, expected in zip(got, looped(x, weight, sizes, grad), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5 * max(1, np.abs(expected).max()))


SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any)


@settings(max_examples=10)
@given(SIZES, st.sampled_from([3, 8]), st.sampled_from([4, 7]), st.integers(0, 99))
@example([0, 0, 23, 0], 8, 4, 0)
def test_ragged_dot_is_the_loop(sizes, inner, outer, seed):
    agree(sizes, inner, outer, Grouped.RAGGED_DOT, seed)


@pytest.mark.parametrize(
    ("sizes", "inner", "outer"),
    [
        ([5, 0, 11, 1], 24, 40),
        ([0, 0, 33, 0], 24, 40),
        # Several tiles of rows, which groups share, and of both dims: 1152 is 9 x 128.
        pytest.param([0, 700, 3, 1, 0, 321, 0], 1_152, 256, marks=pytest.mark.slow),
        # Dims that are no multiple of 128, where a release of the kernel was wrong.
        pytest.param([32] * 8, 96, 200, marks=pytest.mark.slow),
    ],
)
def test_the_tpu_kernel_is_the_loop(sizes, inner, outer):
    agree(sizes, inner, outer, Grouped.MEGABLOX_INTERPRETED, seed=1)


@given(
    st.integers(1, MAX_ROW_TILES * 512),
    st.integers(1, 112).map(lambda n: n * LANES),
    st.one_of(st.integers(1, 1_024), st.integers(1, 112).map(lambda n: n * LANES)),
    st.integers(1, 256),
    st.sampled_from([2, 4]),
    st.booleans(),
)
def test_tiles_divide_and_fit(rows, inner, outer, groups, itemsize, summed_rows):
    tiles = best_tiles(rows, inner, outer, groups, itemsize, summed_rows)
    assert inner % tiles.inner == outer % tiles.outer == tiles.rows % 16 == 0
    assert tiles.inner % LANES == 0 and (tiles.outer % LANES == 0 or tiles.outer == outer)
    assert -(-rows // tiles.rows) <= MAX_ROW_TILES
    held = tiles.rows * tiles.inner + tiles.inner * tiles.outer + tiles.rows * tiles.outer
    assert 2 * itemsize * held < VMEM_BYTES


def test_shapes_that_the_kernel_gets_wrong_are_refused():
    with pytest.raises(InputError, match=re.escape("multiples of 128; got (2880, 2880)")):
        best_tiles(8_192, 2_880, 2_880, 32, 2)
    with pytest.raises(InputError, match="at most 2,048,000 .* got 2,048,001; fix: a smaller microbatch"):
        best_tiles(2_048_001, 256, 256, 8, 2)


@pytest.mark.slow
def test_the_kernel_counts_tiles_right_as_far_as_it_is_let():
    # Its own table of tiles, of which the interpreter could not run so many.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

    def wrong(tiles):
        groups = tiles * 7 // 8
        ends = np.linspace(0, tiles * 128, groups + 1).astype(np.int32)
        with jax.numpy_dtype_promotion("standard"):
            (_, _, numbers), count = make_group_metadata(
                group_sizes=jnp.asarray(np.diff(ends)),
                m=tiles * 128,
                tm=128,
                start_group=jnp.int32(0),
                num_nonzero_groups=groups,
                visit_empty_groups=False,
            )
        expected = [
            tile
            for begin, end in zip(ends[:-1], ends[1:], strict=True)
            for tile in range(begin // 128, -(-int(end) // 128))
        ]
        return int((np.asarray(numbers)[: int(count)] != expected).sum())

    assert wrong(MAX_ROW_TILES) == wrong(97) == 0
    assert wrong(6_000) > 0


def test_the_tpu_kernel_needs_a_tpu():
    Grouped.MEGABLOX.check("tpu")
    Grouped.RAGGED_DOT.check("cpu")
    with pytest.raises(InputError, match="grouped=MEGABLOX is a TPU kernel; expected TPU devices; got cpu"):
        Grouped.MEGABLOX.check("cpu")

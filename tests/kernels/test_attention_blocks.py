"""Bounds of blocks against masks: nothing that is seen is left out, nothing called whole is masked."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.kernels.attention_blocks import Operands, Problem, bounds
from tests.kernels import attention_cases as cases


def mask(problem, offsets, q_segments, k_segments):
    """Who sees whom, [B, L, T]."""
    row = np.arange(problem.queries)[None, :, None] + np.asarray(offsets)[:, None, None]
    column = np.arange(problem.keys)[None, None]
    seen = np.broadcast_to(np.ones((), bool), (len(offsets), problem.queries, problem.keys)).copy()
    if problem.causal:
        seen &= column <= row
    if problem.window:
        seen &= np.abs(row - column) < problem.window
    if q_segments is not None:
        seen = seen & (q_segments[:, :, None] == k_segments[:, None]) & (k_segments[:, None] > 0)
    return seen


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    blocks=st.tuples(st.sampled_from([1, 4, 8]), st.sampled_from([1, 4, 8])),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 3, 8, 17]),
    packing=st.sampled_from(["none", "in a row", "any"]),
    known=st.booleans(),
)
def test_bounds(seed, lengths, blocks, causal, window, packing, known):
    rng, (queries, keys), (bq, bk) = np.random.default_rng(seed), lengths, blocks
    offsets = np.full(2, rng.integers(-10, 45)) if known else rng.integers(-10, 45, 2)
    segments = [None, None]
    if packing != "none":
        segments = [cases.segments(rng, 2, n, packing == "in a row") for n in lengths]
    problem = Problem(causal, window, 1.0, 0.0, queries, keys)
    x = Operands(
        jnp.zeros((2, 1, queries, 8)),
        jnp.zeros((2, 1, keys, 8)),
        jnp.zeros((2, 1, keys, 8)),
        jnp.asarray(offsets[:1] if known else offsets, jnp.int32),
        q_segments=None if segments[0] is None else jnp.asarray(segments[0]),
        k_segments=None if segments[1] is None else jnp.asarray(segments[1]),
        known=int(offsets[0]) if known else None,
    )
    found = bounds(problem, blocks, x)
    at = np.broadcast_to(np.asarray(found.array), (2, *found.array.shape[1:]))
    seen = mask(problem, offsets, *segments)
    # Filled up to whole blocks: keys behind the end are masked, queries there ask for nothing.
    nq, nk = -(-queries // bq), -(-keys // bk)
    some, whole, reached = (np.zeros((2, nq, nk), bool) for _ in range(3))
    full = mask(dataclasses.replace(problem, keys=nk * bk), offsets, None, None)
    for b, i, j in np.ndindex(2, nq, nk):
        part = seen[b, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
        some[b, i, j] = part.any()
        reached[b, i, j] = full[b, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk].any()
        whole[b, i, j] = part.all() and part.shape[1] == bk
    for b, i in np.ndindex(2, nq):
        begin, whole_begin, whole_end, end = at[b, :, i]
        assert 0 <= begin <= whole_begin <= whole_end <= end <= nk
        assert begin < end or end == 0
        assert not some[b, i, :begin].any() and not some[b, i, end:].any()
        assert whole[b, i, whole_begin:whole_end].all()
        if packing == "none" and begin < end:
            # And no more than that: the ends are seen, were the last block full; whole ones are found.
            assert reached[b, i, begin] and reached[b, i, end - 1]
            assert whole[b, i].sum() == whole_end - whole_begin
        if known and packing == "none":
            np.testing.assert_array_equal(found.static[:, i], at[b, :, i])

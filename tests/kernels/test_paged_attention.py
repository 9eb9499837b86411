"""Attention over pages against loops over each query's tokens, wherever its pages lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.kernels.paged_attention import paged_attention


def loops(q, k, v, tables, positions, layer, *, scale, window, softcap, slopes, sinks):
    """One query and head at a time, in float64."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    B, L, H, _ = q.shape
    K, S = k.shape[2:4]
    out = np.zeros((B, L, H, v.shape[4]))
    for b, i, h in np.ndindex(B, L, H):
        at = int(positions[b, i])
        seen = [p for p in range(at + 1) if not window or at - p < window]
        if not seen:
            continue
        lie = [(tables[b, p // S], p % S) for p in seen]
        keys = np.array([k[layer, page, h // (H // K), slot] for page, slot in lie])
        scores = scale * (keys @ q[b, i, h])
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - float(slopes[h]) * (at - np.array(seen))
        logits = scores if sinks is None else np.append(scores, float(sinks[h]))
        shares = np.exp(logits - logits.max())[: len(seen)] / np.exp(logits - logits.max()).sum()
        out[b, i, h] = shares @ np.array([v[layer, page, h // (H // K), slot] for page, slot in lie])
    return out


def draw(rng, B, L, K, G, S, M, C, V, dtype=jnp.float32):
    pages = B * M + 2
    q = jnp.asarray(rng.standard_normal((B, L, K * G, C)), dtype)
    k = jnp.asarray(rng.standard_normal((3, pages, K, S, C)), dtype)
    v = jnp.asarray(rng.standard_normal((3, pages, K, S, V)), dtype)
    tables = rng.permutation(pages)[: B * M].reshape(B, M).astype(np.int32)
    return q, k, v, tables


@pytest.mark.slow
@settings(max_examples=12)
@given(
    sizes=st.sampled_from([(1, 1, 1, 1), (3, 1, 2, 2), (2, 5, 1, 3), (4, 3, 2, 1)]),
    pages=st.sampled_from([(1, 7), (4, 3), (8, 2)]),
    dims=st.sampled_from([(8, 8), (16, 5)]),
    window=st.sampled_from([0, 1, 3, 6]),
    softcap=st.sampled_from([0.0, 1.5]),
    with_slopes=st.booleans(),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_definition(sizes, pages, dims, window, softcap, with_slopes, with_sinks, seed):
    (B, L, K, G), (S, M), rng = sizes, pages, np.random.default_rng(seed)
    q, k, v, tables = draw(rng, B, L, K, G, S, M, *dims)
    # Rows of padding (below 0) among those that see one token, some, or all.
    last = rng.integers(-1, S * M, B)
    positions = (last[:, None] - np.arange(L)[::-1][None]).astype(np.int32)
    knobs = {
        "scale": 0.3,
        "window": window,
        "softcap": softcap,
        "slopes": rng.random(K * G).astype(np.float32) if with_slopes else None,
        "sinks": rng.standard_normal(K * G).astype(np.float32) if with_sinks else None,
    }
    expected = loops(q, k, v, tables, positions, 1, **knobs)
    slopes = knobs.pop("slopes")
    found = paged_attention(q, k, v, tables, positions, layer=1, alibi_slopes=slopes, **knobs)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sequence_is_the_same_to_the_last_bit_whatever_its_neighbours(dtype):
    """Others are longer, shorter or absent; its pages lie elsewhere, and its table names others behind."""
    rng = np.random.default_rng(3)
    q, k, v, tables = draw(rng, 4, 1, 2, 2, 4, 6, 16, 16, dtype)
    run = jax.jit(lambda *arrays: paged_attention(*arrays, layer=2, window=0))
    alone = np.array([[9], [-1], [-1], [-1]], np.int32)
    among = np.array([[9], [23], [2], [15]], np.int32)
    one, other = run(q, k, v, tables, alone), run(q, k, v, tables, among)
    np.testing.assert_array_equal(one[0].astype(jnp.float32), other[0].astype(jnp.float32))
    assert not np.asarray(one[1:]).any()
    moved = tables.copy()
    moved[0, 3:] = tables[0, 0]
    moved[0, :3], spare = [24, 25, tables[0, 5]], tables[0, :3]
    put = jnp.asarray(moved[0, :3]), jnp.asarray(spare)
    k, v = (x.at[:, put[0]].set(x[:, put[1]]) for x in (k, v))
    elsewhere = run(q, k, v, moved, among)
    np.testing.assert_array_equal(one[0].astype(jnp.float32), elsewhere[0].astype(jnp.float32))


def test_work_grows_with_the_longest_sequence_and_not_with_the_table():
    """Pages behind the longest end are never read: what is in them would spoil all."""
    rng = np.random.default_rng(4)
    q, k, v, tables = draw(rng, 2, 1, 1, 2, 4, 8, 8, 8)
    text = jax.jit(lambda at: paged_attention(q, k, v, tables, at, layer=0)).lower(
        jnp.zeros((2, 1), jnp.int32)
    )
    # One loop whose bounds are data: no part of the program is as wide as the table.
    assert "while" in text.as_text()
    assert f"tensor<2x1x{8 * 4}" not in text.as_text()
    wild = k.at[:, tables[:, 3:].reshape(-1)].set(jnp.nan)
    found = paged_attention(q, wild, v, tables, np.array([[11], [5]], np.int32), layer=0)
    assert np.isfinite(np.asarray(found)).all()

"""The reference attention against loops and against jax's own."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.kernels.attention import Mask, alibi_slopes, attention


def loops(q, k, v, positions, segments, *, window, scale, softcap, slopes):
    """One query, one head, one key at a time."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, at, h in np.ndindex(q.shape[:3]):
        weights, values = [], []
        for other in range(k.shape[1]):
            distance = positions[b][at] - positions[b][other]
            if distance < 0 or (window and distance >= window):
                continue
            if segments is not None and (segments[b][at] != segments[b][other] or segments[b][other] == 0):
                continue
            key_head = h * k.shape[2] // q.shape[2]
            score = scale * float(np.dot(q[b, at, h].astype(np.float64), k[b, other, key_head]))
            score = softcap * math.tanh(score / softcap) if softcap else score
            weights.append(math.exp(score - (slopes[h] * distance if slopes is not None else 0.0)))
            values.append(v[b, other, key_head])
        for weight, value in zip(weights, values, strict=True):
            out[b, at, h] += weight / sum(weights) * value
    return out


def draw(seed, heads, kv_heads, rows=2, length=7, size=4):
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, heads, size), (rows, length, kv_heads, size), (rows, length, kv_heads, size)]
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    cuts = np.sort(rng.integers(0, length + 1, (rows, 2)), axis=1)
    segments = np.array([[1 if t < a else 2 if t < b else 0 for t in range(length)] for a, b in cuts])
    positions = np.array([[t - (0 if t < a else a if t < b else b) for t in range(length)] for a, b in cuts])
    return q, k, v, positions, segments


def run(q, k, v, positions, segments, *, window, scale, softcap, slopes):
    where = jnp.asarray(positions, jnp.int32)
    segments = None if segments is None else jnp.asarray(segments, jnp.int32)
    mask = Mask(where, where, segments, segments, window)
    slopes = None if slopes is None else jnp.asarray(slopes, jnp.float32)
    return attention(*map(jnp.asarray, (q, k, v)), mask, scale=scale, softcap=softcap, slopes_H=slopes)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**20),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 1), (6, 2)]),
    packed=st.booleans(),
    window=st.sampled_from([0, 1, 3, 50]),
    scale=st.sampled_from([0.5, 2.0]),
    softcap=st.sampled_from([0.0, 1.5]),
    alibi=st.booleans(),
)
def test_equals_loops(seed, heads, packed, window, scale, softcap, alibi):
    q, k, v, positions, segments = draw(seed, *heads)
    if not packed:
        positions, segments = np.tile(np.arange(q.shape[1]), (len(q), 1)), None
    slopes = [2.0 ** -(h + 1) for h in range(heads[0])] if alibi else None
    knobs = {"window": window, "scale": scale, "softcap": softcap, "slopes": slopes}
    got = run(q, k, v, positions, segments, **knobs)
    np.testing.assert_allclose(got, loops(q, k, v, positions, segments, **knobs), atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(4, 4, 0), (6, 2, 0), (4, 1, 3)])
def test_equals_jax(heads, kv_heads, window):
    q, k, v, *_ = draw(1, heads, kv_heads, length=12, size=8)
    positions = np.arange(12)[None]
    got = run(q, k, v, positions, None, window=window, scale=0.3, softcap=0.0, slopes=None)
    expected = jax.nn.dot_product_attention(
        *map(jnp.asarray, (q, k, v)),
        scale=0.3,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
    )
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_a_query_with_nothing_to_see_gives_nothing():
    q, k, v, positions, _ = draw(2, 4, 2)
    segments = np.array([[1, 1, 1, 0, 0, 0, 0], [0] * 7])

    def out(q, k, v):
        return run(q, k, v, positions, segments, window=0, scale=1.0, softcap=0.0, slopes=[0.5] * 4)

    empty = np.asarray(segments == 0)
    assert (np.asarray(out(q, k, v))[empty] == 0).all()
    assert (np.asarray(out(q, k, v))[~empty] != 0).all()
    grads = jax.grad(lambda *qkv: out(*qkv).sum(), argnums=(0, 1, 2))(q, k, v)
    for grad in grads:
        assert np.isfinite(grad).all()
        assert (np.asarray(grad)[empty] == 0).all()
    assert (np.asarray(grads[2])[~empty] != 0).all()


@pytest.mark.parametrize("size", [1e3, 1e18])
def test_large_scores_give_the_largest_value(size):
    q, k, v, positions, _ = draw(3, 1, 1, rows=1)
    knobs = {"window": 0, "scale": 1.0, "softcap": 0.0, "slopes": None}
    got = run(size * q, size * k, v, np.arange(7)[None], None, **knobs)
    for at in range(7):
        best = np.argmax(k[0, : at + 1, 0].astype(float) @ q[0, at, 0].astype(float))
        np.testing.assert_allclose(got[0, at, 0], v[0, best, 0], atol=1e-5)


def test_bfloat16_scores_are_float32():
    q, k, v, positions, segments = draw(4, 4, 2)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    knobs = {"window": 0, "scale": 0.5, "softcap": 0.0, "slopes": [0.1, 0.2, 0.3, 0.4]}
    got = run(*low, positions, segments, **knobs)
    assert got.dtype == jnp.bfloat16
    rounded = [np.asarray(x.astype(jnp.float32)) for x in low]
    np.testing.assert_allclose(
        np.asarray(got.astype(jnp.float32)), loops(*rounded, positions, segments, **knobs), atol=1.5e-2
    )


@pytest.mark.parametrize(
    ("heads", "max_bias", "expected"),
    [
        (8, 8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
        (1, 8, [1 / 256]),
        (2, 4, [1 / 4, 1 / 16]),
        (7, 8, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8, 1 / 32]),
        (12, 8, [2.0**-n for n in (1, 2, 3, 4, 5, 6, 7, 8)] + [2.0**-n for n in (0.5, 1.5, 2.5, 3.5)]),
    ],
)
def test_alibi_slopes_by_hand(heads, max_bias, expected):
    assert alibi_slopes(heads, max_bias) == pytest.approx(expected, rel=1e-12)

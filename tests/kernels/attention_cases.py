"""Attention by loops in float64, and cases to draw: what tests of every implementation share."""

import math

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st


def loops(q, k, v, *, causal, scale, window, softcap, slopes, sinks, q_segments, kv_segments, offset):
    """One query, one head, one key at a time: the result [B, L, H, V] and the logsumexp [B, L, H]."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    lse = np.full(q.shape[:3], -np.inf)
    for b, at, h in np.ndindex(q.shape[:3]):
        scores, values = [], []
        for other in range(k.shape[1]):
            distance = at + offset[b] - other
            if (causal and distance < 0) or (window and abs(distance) >= window):
                continue
            if q_segments is not None:
                if q_segments[b][at] != kv_segments[b][other] or kv_segments[b][other] == 0:
                    continue
            key_head = h * k.shape[2] // q.shape[2]
            score = scale * float(q[b, at, h].astype(np.float64) @ k[b, other, key_head].astype(np.float64))
            score = softcap * math.tanh(score / softcap) if softcap else score
            scores.append(score - (float(slopes[h]) * abs(distance) if slopes is not None else 0.0))
            values.append(v[b, other, key_head].astype(np.float64))
        everything = [*scores, float(sinks[h])] if sinks is not None else scores
        if not everything:
            continue
        top = max(everything)
        lse[b, at, h] = top + math.log(sum(math.exp(score - top) for score in everything))
        for score, value in zip(scores, values, strict=True):
            out[b, at, h] += math.exp(score - lse[b, at, h]) * value
    return out, lse


def segments(rng, rows, length, contiguous=True):
    """Documents in a row with padding behind, or ids in any order."""
    if not contiguous:
        return rng.integers(0, 3, (rows, length)).astype(np.int32)
    cuts = np.sort(rng.integers(0, length + 1, (rows, 3)), axis=1)
    places = np.arange(length)
    return np.stack(
        [np.where(places < c[2], 1 + (places >= c[0]) + (places >= c[1]), 0) for c in cuts]
    ).astype(np.int32)


def arrays(seed, *, rows, heads, kv_heads, queries, keys, size, value_size):
    """Random queries, keys and values, float32."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, queries, heads, size), (rows, keys, kv_heads, size), (rows, keys, kv_heads, value_size))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@st.composite
def knobs(draw, rows, heads, queries, keys):
    """Keywords of `flash_attention` that ask for any combination of features."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    asked = {
        "causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([0.2, 0.7])),
        "window": draw(st.sampled_from([0, 0, 1, 5, keys // 2 + 1, 3 * keys])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5])),
        "alibi_slopes": None,
        "sinks": None,
        "q_segments": None,
        "kv_segments": None,
        "q_offset": 0,
    }
    if draw(st.booleans()):
        asked["alibi_slopes"] = jnp.asarray(0.5 ** rng.uniform(1, 8, heads), jnp.float32)
    if draw(st.booleans()):
        asked["sinks"] = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    if draw(st.booleans()):
        contiguous = draw(st.booleans())
        asked["kv_segments"] = jnp.asarray(segments(rng, rows, keys, contiguous))
        same = queries == keys and draw(st.booleans())
        own = asked["kv_segments"] if same else jnp.asarray(segments(rng, rows, queries, contiguous))
        asked["q_segments"] = own
    how = draw(st.sampled_from(["none", "known", "traced", "by row"]))
    if how == "known":
        asked["q_offset"] = int(rng.integers(-3, keys))
    elif how == "traced":
        asked["q_offset"] = jnp.asarray(rng.integers(-3, keys), jnp.int32)
    elif how == "by row":
        asked["q_offset"] = jnp.asarray(rng.integers(-3, keys, rows), jnp.int32)
    return asked

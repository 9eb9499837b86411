"""Attention over keys and values in pages that a table a sequence puts in order: serving's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.spec import at_least_float32


def paged_attention(
    q_BLHC: Array,
    k_NPKSC: Array,
    v_NPKSV: Array,
    tables_BM: Array,
    positions_BL: Array,
    *,
    layer: Array | int,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
) -> Array:
    """Softmax attention of each query over its sequence's tokens up to its own position, without gradients.

    The token at position p of sequence b lies in slot p % S of page `tables_BM[b, p // S]`. A query at a
    position below 0 sees nothing and gives 0. What lies in slots behind a sequence's last query does not
    matter, but must be finite. Scores are scaled, bent by softcap, and lowered by ALiBi as in
    `decode_attention`, whose other knobs are the same.

    Pages are visited one column of the table after the other, as many as the longest sequence has, whatever
    the table's width: each is read once, and work grows with that length alone. A sequence's result does not
    depend on the others, to the last bit: pages behind its end change nothing.

    Shapes: q [B, L, H, C]; k [N, P, K, S, C] and v [N, P, K, S, V] of N layers and P pages; tables int32
    [B, M]; positions int32 [B, L]; slopes and sinks [H]; the result [B, L, H, V] in q's dtype. Scores and
    sums are float32 or wider.

    Source: the running softmax of Milakov and Gimelshein 2018, arXiv 1805.02867; pages: Kwon et al. 2023,
    arXiv 2309.06180.
    """
    (B, L, H, C), (_, _, K, S, V) = q_BLHC.shape, v_NPKSV.shape
    G = H // K
    wide = at_least_float32(q_BLHC.dtype)
    exact = jax.lax.Precision.HIGHEST
    scale = C**-0.5 if scale is None else scale
    q_BKQC = q_BLHC.reshape(B, L, K, G, C).transpose(0, 2, 3, 1, 4).reshape(B, K, G * L, C)
    at_BQ = jnp.tile(positions_BL, (1, G))
    slopes_KQ = None
    if alibi_slopes is not None:
        slopes_KQ = jnp.repeat(alibi_slopes.astype(wide).reshape(K, G), L, axis=1)

    def visit(page: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top_BKQ, total_BKQ, sum_BKQV = state
        pages_B = jax.lax.dynamic_index_in_dim(tables_BM, page, axis=1, keepdims=False)
        k_BKSC = k_NPKSC.at[layer, pages_B].get(mode="clip")
        v_BKSV = v_NPKSV.at[layer, pages_B].get(mode="clip")
        scores_BKQS = jax.lax.dot_general(
            q_BKQC, k_BKSC, (((3,), (3,)), ((0, 1), (0, 1))), precision=exact, preferred_element_type=wide
        ) * jnp.asarray(scale, wide)
        if softcap:
            scores_BKQS = softcap * jnp.tanh(scores_BKQS / softcap)
        away_BQS = at_BQ[:, :, None] - (page * S + jnp.arange(S, dtype=jnp.int32))[None, None]
        if slopes_KQ is not None:
            scores_BKQS -= slopes_KQ[None, :, :, None] * away_BQS.astype(wide)[:, None]
        allowed_BQS = away_BQS >= 0
        if window:
            allowed_BQS &= away_BQS < window
        allowed_B1QS = allowed_BQS[:, None]
        scores_BKQS = jnp.where(allowed_B1QS, scores_BKQS, jnp.finfo(wide).min)
        higher_BKQ = jnp.maximum(top_BKQ, jnp.max(scores_BKQS, axis=3))
        kept_BKQ = jnp.exp(top_BKQ - higher_BKQ)
        shares_BKQS = jnp.where(allowed_B1QS, jnp.exp(scores_BKQS - higher_BKQ[..., None]), 0)
        mixed_BKQV = jax.lax.dot_general(
            shares_BKQS.astype(v_BKSV.dtype),
            v_BKSV,
            (((3,), (2,)), ((0, 1), (0, 1))),
            precision=exact,
            preferred_element_type=wide,
        )
        total_BKQ = total_BKQ * kept_BKQ + jnp.sum(shares_BKQS, axis=3)
        return higher_BKQ, total_BKQ, sum_BKQV * kept_BKQ[..., None] + mixed_BKQV

    if sinks is None:
        top_BKQ = jnp.full((B, K, G * L), jnp.finfo(wide).min, wide)
        total_BKQ = jnp.zeros((B, K, G * L), wide)
    else:
        # A key without a value, seen before all others.
        top_KQ = jnp.repeat(sinks.astype(wide).reshape(K, G), L, axis=1)
        top_BKQ = jnp.broadcast_to(top_KQ[None], (B, K, G * L))
        total_BKQ = jnp.ones((B, K, G * L), wide)
    first = jnp.maximum(jnp.min(jnp.where(at_BQ >= 0, at_BQ, jnp.iinfo(jnp.int32).max)) - window + 1, 0) // S
    last = jnp.max(at_BQ) // S + 1
    state = (top_BKQ, total_BKQ, jnp.zeros((B, K, G * L, V), wide))
    begin = first if window else jnp.zeros_like(first)
    _, total_BKQ, sum_BKQV = jax.lax.fori_loop(begin, last, visit, state)
    out_BKQV = sum_BKQV / jnp.where(total_BKQ > 0, total_BKQ, 1)[..., None]
    out_BLHV = out_BKQV.reshape(B, K, G, L, V).transpose(0, 3, 1, 2, 4).reshape(B, L, H, V)
    return out_BLHV.astype(q_BLHC.dtype)

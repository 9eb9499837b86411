"""Attention as plain array operations: the definition that every faster kernel must meet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.spec import at_least_float32


@dataclass(frozen=True)
class Mask:
    """Who may attend to whom.

    A query sees a key of its own segment that stands at its position or before, fewer than `window`
    positions back (`window=0`: no limit). Segment 0 is padding and is seen by nobody.

    Shapes: `q_positions_BL`, `k_positions_BT` and the segments may have B = 1 for all rows alike; segments
    None: one segment, no padding.
    """

    q_positions_BL: Array
    k_positions_BT: Array
    q_segments_BL: Array | None = None
    k_segments_BT: Array | None = None
    window: int = 0

    def distance_BLT(self) -> Array:
        """How many positions back each key stands."""
        return self.q_positions_BL[:, :, None] - self.k_positions_BT[:, None, :]

    def allowed_BLT(self) -> Array:
        """True where the query may see the key."""
        distance_BLT = self.distance_BLT()
        allowed_BLT = distance_BLT >= 0
        if self.window:
            allowed_BLT &= distance_BLT < self.window
        if self.q_segments_BL is not None and self.k_segments_BT is not None:
            same_BLT = self.q_segments_BL[:, :, None] == self.k_segments_BT[:, None, :]
            allowed_BLT &= same_BLT & (self.k_segments_BT > 0)[:, None, :]
        return allowed_BLT


def attention(
    q_BLHC: Array,
    k_BTKC: Array,
    v_BTKC: Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float = 0.0,
    slopes_H: Array | None = None,
) -> Array:
    """Softmax attention; scores and softmax in float32 or wider.

    Each group of H / K query heads shares a key head. After scaling, scores are bent by
    `softcap * tanh(scores / softcap)` where softcap is not 0, then lowered by `slopes_H` a position of
    distance (ALiBi). A query that may see nothing gives 0.

    Shapes: q [B, L, H, C], k and v [B, T, K, C] with K dividing H; the result is like q.
    """
    B, L, H, C = q_BLHC.shape
    T, K = k_BTKC.shape[1:3]
    wide = at_least_float32(q_BLHC.dtype)
    q_BKGLC = q_BLHC.reshape(B, L, K, H // K, C).transpose(0, 2, 3, 1, 4)
    k_BKTC, v_BKTC = k_BTKC.transpose(0, 2, 1, 3), v_BTKC.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKGLC,BKTC->BKGLT", q_BKGLC, k_BKTC, preferred_element_type=wide)
    scores = scores * jnp.asarray(scale, wide)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if slopes_H is not None:
        slopes = slopes_H.astype(wide).reshape(1, K, H // K, 1, 1)
        scores = scores - slopes * mask.distance_BLT().astype(wide)[:, None, None]
    allowed = mask.allowed_BLT()[:, None, None]
    scores = jnp.where(allowed, scores, jnp.finfo(wide).min)
    shares = jax.nn.softmax(scores, axis=-1)
    shares = jnp.where(jnp.any(allowed, axis=-1, keepdims=True), shares, jnp.zeros_like(shares))
    out_BKGLC = jnp.einsum("BKGLT,BKTC->BKGLC", shares.astype(v_BTKC.dtype), v_BKTC)
    return out_BKGLC.transpose(0, 3, 1, 2, 4).reshape(B, L, H, v_BTKC.shape[-1])


def alibi_slopes(heads: int, max_bias: float) -> list[float]:
    """ALiBi's slope for each head: the powers of 2**(-max_bias / n), n the next power of two.

    Where `heads` is no power of two, the odd powers of the finer series come first, then the even ones,
    as MPT takes them.

    Source: Press et al. 2022, arXiv 2108.12409, section 3; llm-foundry `gen_slopes`.
    """
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-(i + 1) * max_bias / power) for i in range(power)]
    return slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads]

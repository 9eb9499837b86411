"""Attention as plain array operations: the definition that every faster way must meet."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.kernels.attention_blocks import Operands, Problem
from mosaicjax.spec import at_least_float32


def forward(problem: Problem, x: Operands) -> tuple[Array, Array]:
    """See `flash_attention`; all scores are held at once, in float32 or wider.

    Shapes: the result [B, H, L, V], the logsumexp [B, H, L], +inf where nothing is seen.
    """
    B, H, L, _ = x.q.shape
    K = x.k.shape[1]
    wide = at_least_float32(x.q.dtype)
    q_BKGLC = x.q.reshape(B, K, H // K, L, -1)
    scores = jnp.einsum(
        "BKGLC,BKTC->BKGLT", q_BKGLC, x.k, preferred_element_type=wide, precision=jax.lax.Precision.HIGHEST
    )
    scores = (scores * jnp.asarray(problem.scale, wide)).reshape(B, H, L, -1)
    if problem.softcap:
        scores = problem.softcap * jnp.tanh(scores / problem.softcap)
    distance = distances(problem, x)
    if x.slopes is not None:
        away = (distance if problem.causal else jnp.abs(distance)).astype(wide)
        scores = scores - x.slopes.astype(wide)[None, :, None, None] * away[:, None]
    allowed = allowed_BLT(problem, x)[:, None]
    scores = jnp.where(allowed, scores, jnp.finfo(wide).min)
    top = jnp.max(scores, axis=-1)
    if x.sinks is not None:
        top = jnp.maximum(top, x.sinks.astype(wide)[None, :, None])
    top = jax.lax.stop_gradient(top)
    shares = jnp.where(allowed, jnp.exp(scores - top[..., None]), 0)
    total = jnp.sum(shares, axis=-1)
    if x.sinks is not None:
        total = total + jnp.exp(x.sinks.astype(wide)[None, :, None] - top)
    some = total > 0
    total = jnp.where(some, total, 1)
    shares = shares / total[..., None]
    shares_BKGLT = shares.astype(x.v.dtype).reshape(B, K, H // K, L, -1)
    out = jnp.einsum("BKGLT,BKTV->BKGLV", shares_BKGLT, x.v, precision=jax.lax.Precision.HIGHEST)
    lse = jnp.where(some, top + jnp.log(total), jnp.inf)
    return out.reshape(B, H, L, -1).astype(x.q.dtype), lse


def backward(
    problem: Problem, x: Operands, grad: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v and the slopes by the chain rule, written out.

    Shapes: `grad` like the result; lse and delta [B, H, L].
    """
    B, H, L, C = x.q.shape
    K = x.k.shape[1]
    wide = at_least_float32(x.q.dtype)
    groups = (B, K, H // K, L)
    q, g = (each.astype(wide).reshape(*groups, -1) for each in (x.q, grad))
    k, v = x.k.astype(wide), x.v.astype(wide)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("BKGLC,BKTC->BKGLT", q, k, precision=exact) * problem.scale
    bent = jnp.tanh(scores / problem.softcap) if problem.softcap else None
    logits = scores if bent is None else problem.softcap * bent
    logits = logits.reshape(B, H, L, -1)
    distance = distances(problem, x)
    away = (distance if problem.causal else jnp.abs(distance)).astype(wide)[:, None]
    if x.slopes is not None:
        logits = logits - x.slopes.astype(wide)[None, :, None, None] * away
    shares = jnp.where(allowed_BLT(problem, x)[:, None], jnp.exp(logits - lse[..., None]), 0)
    shares = shares.reshape(*groups, -1)
    wanted = jnp.einsum("BKGLV,BKTV->BKGLT", g, v, precision=exact)
    ds = shares * (wanted - delta.astype(wide).reshape(*groups)[..., None])
    slopes = None
    if problem.slopes_grad:
        slopes = -jnp.sum(ds.reshape(B, H, L, -1) * away, axis=(0, 2, 3))
    if bent is not None:
        ds = ds * (1 - bent * bent)
    ds = ds * problem.scale
    dq = jnp.einsum("BKGLT,BKTC->BKGLC", ds, k, precision=exact).reshape(B, H, L, C)
    dk = jnp.einsum("BKGLT,BKGLC->BKTC", ds, q, precision=exact)
    dv = jnp.einsum("BKGLT,BKGLV->BKTV", shares, g, precision=exact)
    return dq.astype(x.q.dtype), dk.astype(x.k.dtype), dv.astype(x.v.dtype), slopes


def distances(problem: Problem, x: Operands) -> Array:
    """How many places behind its query each key stands, int32 [B or 1, L, T]."""
    queries = x.offset[:, None, None] + jnp.arange(x.q.shape[2], dtype=jnp.int32)[None, :, None]
    return queries - jnp.arange(x.k.shape[2], dtype=jnp.int32)[None, None]


def allowed_BLT(problem: Problem, x: Operands) -> Array:
    """Where the query may see the key."""
    distance = distances(problem, x)
    allowed = jnp.ones_like(distance, bool)
    if problem.causal:
        allowed &= distance >= 0
    if problem.window:
        allowed &= jnp.abs(distance) < problem.window
    if x.q_segments is not None and x.k_segments is not None:
        same = x.q_segments[:, :, None] == x.k_segments[:, None, :]
        allowed = allowed & same & (x.k_segments > 0)[:, None, :]
    return allowed

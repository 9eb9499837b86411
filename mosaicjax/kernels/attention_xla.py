"""Flash attention in plain array operations, for CPUs and GPUs: memory linear in the length, blocks skipped.

Queries go by blocks, and keys by blocks between bounds from `attention_blocks`, both in loops, so that one
block's scores alone are held; the softmax is kept up as it goes. Key heads are worked on together while all
their scores stay small, else one by one, and where all scores are few there is but one block.

Whatever is read or written is a block of the arrays as they lie outside, tokens before heads: copies with
heads first, or of one head alone, cost more memory than all the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mosaicjax.kernels.attention_blocks import Bounds, Operands, Problem, bounds
from mosaicjax.kernels.attention_heads import Arrays, Head, merged, split
from mosaicjax.spec import at_least_float32


@dataclass(frozen=True)
class Sizes:
    """How work is cut: queries and keys of a block, and how many scores of all heads may be held at once."""

    queries: int = 512
    keys: int = 512
    together: int = 2**21


SIZES = Sizes()


def forward(problem: Problem, x: Operands, sizes: Sizes = SIZES) -> tuple[Array, Array]:
    """Attention's result [B, H, L, V] and the logsumexp [B, H, L], +inf where a query sees nothing."""
    plan = _plan(problem, x, sizes)
    (B, H, L, _), V = x.q.shape, x.v.shape[3]

    def one(head: Head, wholes: Arrays) -> Arrays:
        def row(i: Array | int, wholes: Arrays) -> Arrays:
            out, lse = _forward_block(plan, head, i)
            return head.put(wholes, i * plan.queries, out=out.astype(x.q.dtype), lse=lse)

        return plan.over_queries(row, wholes)

    wide = at_least_float32(x.q.dtype)
    wholes = {
        "out": jnp.zeros_like(x.q, shape=(B, L, H, V)),
        "lse": jnp.zeros_like(x.q, shape=(B, H, L), dtype=wide),
    }
    found = plan.over_heads(one, _arrays(x, plan), wholes)
    return found["out"].swapaxes(1, 2), found["lse"]


def backward(
    problem: Problem, x: Operands, grad: Array, lse: Array, delta: Array, sizes: Sizes = SIZES
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v, and of the slopes [H] where they are wanted.

    Shapes: `grad` [B, H, L, V]; lse and delta [B, H, L].
    """
    plan = _plan(problem, x, sizes)
    B, H, _, C = x.q.shape
    K, T, V = x.v.shape[1:]
    wide = lse.dtype

    def one(head: Head, wholes: Arrays) -> Arrays:
        def row(i: Array | int, carried: tuple[Array, Array, Array, Arrays]) -> Any:
            part = _Part(plan, head, i)

            def turn(masked: bool, j: Array | int, state: tuple[Array, ...]) -> tuple[Array, ...]:
                dq, dk, dv, slopes = state
                more_q, dk_part, dv_part, bias = part.grads(j, masked)
                begin = j * plan.keys
                return dq + more_q, _added(dk, dk_part, begin), _added(dv, dv_part, begin), slopes + bias

            *sums, wholes = carried
            zero = jnp.zeros_like(lse, shape=(H // K, plan.queries, C))
            dq, *sums = plan.over_keys(head, i, turn, (zero, *sums))
            return *sums, head.put(wholes, i * plan.queries, q=dq.astype(x.q.dtype))

        begun = [(C, plan.keys * plan.blocks[1]), (V, plan.keys * plan.blocks[1]), (H // K,)]
        zeros = (jnp.zeros_like(lse, shape=shape) for shape in begun)
        dk, dv, slopes, wholes = plan.over_queries(row, (*zeros, wholes))
        dk, dv = dk[:, :T].T.astype(x.k.dtype), dv[:, :T].T.astype(x.v.dtype)
        return head.put(wholes, 0, k=dk, v=dv, slopes=slopes)

    arrays = _arrays(x, plan) | {"grad": grad.swapaxes(1, 2), "lse": lse, "delta": delta.astype(wide)}
    wholes = {name: jnp.zeros_like(arrays[name]) for name in ("q", "k", "v")}
    found = plan.over_heads(one, arrays, wholes | {"slopes": jnp.zeros_like(lse, shape=(B, H))})
    slopes_H = jnp.sum(found["slopes"], axis=0) if problem.slopes_grad else None
    dq, dk, dv = (found[name].swapaxes(1, 2) for name in ("q", "k", "v"))
    return dq, dk, dv, slopes_H


def inner(out: Array, grad: Array, wide: Any, sizes: Sizes = SIZES) -> Array:
    """The product over channels of two arrays [B, H, L, V], as [B, H, L] in dtype `wide`.

    Some tokens at a time, where they lie before heads: XLA on a CPU would hold both arrays anew.
    """
    (B, H, L, _), count = out.shape, sizes.queries
    if L <= count:
        return jnp.sum(out.astype(wide) * grad.astype(wide), axis=-1)
    pair = [x.swapaxes(1, 2) for x in (out, grad)]

    def turn(i: Array, whole: Array) -> Array:
        # The last block begins earlier where the length is no multiple of it.
        begin = jnp.minimum(i * count, L - count)
        a, b = (jax.lax.dynamic_slice_in_dim(x, begin, count, axis=1).astype(wide) for x in pair)
        return jax.lax.dynamic_update_slice_in_dim(whole, jnp.sum(a * b, axis=-1), begin, axis=1)

    whole = jnp.zeros_like(grad, shape=(B, L, H), dtype=wide)
    return jax.lax.fori_loop(0, -(-L // count), turn, whole).swapaxes(1, 2)


@dataclass(frozen=True)
class _Plan:
    """Blocks of `queries` and `keys`, how many there are of both, and whether heads go together."""

    problem: Problem
    queries: int
    keys: int
    blocks: tuple[int, int]
    bounds: Bounds
    key_heads: int
    together: bool

    def over_heads(self, one: Callable[[Head, Arrays], Arrays], arrays: Arrays, wholes: Arrays) -> Arrays:
        """`wholes` after `one` has put every key head's results into them, all at once or one by one."""
        K, B = self.key_heads, arrays["q"].shape[0]
        if not self.together:

            def turn(n: Array, wholes: Arrays) -> Arrays:
                return one(Head(arrays, n // K, n % K, K), wholes)

            return jax.lax.fori_loop(0, B * K, turn, wholes)
        parts, begun = ({name: split(name, x, K) for name, x in named.items()} for named in (arrays, wholes))
        found = jax.vmap(lambda arrays, wholes: one(Head(arrays, 0, 0, 1), wholes))(parts, begun)
        return {name: merged(name, part, B, K) for name, part in found.items()}

    def over_queries(self, row: Callable[[Array | int, Any], Any], state: Any) -> Any:
        """`row(i, state)` for all blocks of queries."""
        if self.blocks[0] == 1:
            return row(0, state)
        return jax.lax.fori_loop(0, self.blocks[0], row, state)

    def over_keys(self, head: Head, i: Array | int, turn: Callable[..., Any], state: Any) -> Any:
        """`turn(masked, j, state)` for the i-th row's blocks without a masked entry, then for the others."""
        if self.blocks == (1, 1):
            return turn(self.problem.masks("q_segments" in head.arrays, self.keys), 0, state)
        begin, whole_begin, whole_end, end = (head.whole("bounds")[n, i] for n in range(4))
        state = jax.lax.fori_loop(whole_begin, whole_end, lambda j, state: turn(False, j, state), state)
        before = whole_begin - begin

        def partly(t: Array, state: Any) -> Any:
            return turn(True, jnp.where(t < before, begin + t, whole_end + t - before), state)

        return jax.lax.fori_loop(0, before + end - whole_end, partly, state)


def _plan(problem: Problem, x: Operands, sizes: Sizes) -> _Plan:
    """Sizes that suit the lengths, and the bounds."""
    L, T = x.lengths
    B, H = x.q.shape[:2]
    few = L * T * B * H <= sizes.together
    bq, bk = (L, T) if few else (min(sizes.queries, L), min(sizes.keys, T))
    together = B * H * bq * T <= sizes.together
    found = bounds(problem, (bq, bk), x)
    return _Plan(problem, bq, bk, (-(-L // bq), -(-T // bk)), found, x.k.shape[1], together)


def _arrays(x: Operands, plan: _Plan) -> Arrays:
    """What all heads need, by name, each with an axis B."""
    B = x.q.shape[0]
    arrays = {name: array.swapaxes(1, 2) for name, array in (("q", x.q), ("k", x.k), ("v", x.v))}
    arrays["offset"] = jnp.broadcast_to(x.offset, (B,))
    for name, numbers in (("slopes", x.slopes), ("sinks", x.sinks)):
        if numbers is not None:
            arrays[name] = jnp.broadcast_to(numbers, (B, *numbers.shape))
    for name, segments in (("q_segments", x.q_segments), ("k_segments", x.k_segments)):
        if segments is not None:
            arrays[name] = segments
    arrays["bounds"] = jnp.broadcast_to(plan.bounds.array, (B, *plan.bounds.array.shape[1:]))
    return arrays


class _Part:
    """The i-th block of queries of one key head's G query heads, and what it makes of blocks of keys."""

    def __init__(self, plan: _Plan, head: Head, i: Array | int) -> None:
        self.plan, self.head, self.first = plan, head, i * plan.queries
        self.wide = at_least_float32(head.arrays["q"].dtype)
        self.q = head.tokens("q", self.first, plan.queries)

    def mine(self, name: str, fill: float = 0) -> Array:
        """These queries' share of an array."""
        return self.head.tokens(name, self.first, self.plan.queries, fill)

    def keys(self, name: str, j: Array | int) -> Array:
        """The j-th block of keys' share of an array, [keys, channels] or [keys]."""
        part = self.head.tokens(name, j * self.plan.keys, self.plan.keys)
        return part[0] if part.ndim == 3 else part

    def scores(self, j: Array | int, masked: bool) -> tuple[Array, Array | None, Array]:
        """Logits [G, queries, keys], tanh where they are capped, and distances [queries, keys]."""
        problem, wide = self.plan.problem, self.wide
        s = _dot("gqc,kc->gqk", self.q, self.keys("k", j), wide)
        bent = None
        if problem.softcap:
            bent = jnp.tanh(s * (problem.scale / problem.softcap))
            s = bent * problem.softcap
        else:
            s = s * jnp.asarray(problem.scale, wide)
        rows = self.first + self.head.whole("offset") + jnp.arange(self.plan.queries, dtype=jnp.int32)
        columns = j * self.plan.keys + jnp.arange(self.plan.keys, dtype=jnp.int32)
        distance = rows[:, None] - columns[None]
        away = distance if problem.causal else jnp.abs(distance)
        if "slopes" in self.head.arrays:
            s = s - self.head.whole("slopes").astype(wide)[:, None, None] * away.astype(wide)[None]
        if masked:
            allowed = columns[None] < problem.keys
            if problem.causal:
                allowed &= distance >= 0
            if problem.window:
                allowed &= jnp.abs(distance) < problem.window
            if "q_segments" in self.head.arrays:
                column = self.keys("k_segments", j)[None]
                allowed &= (self.mine("q_segments")[:, None] == column) & (column > 0)
            s = jnp.where(allowed[None], s, -jnp.inf)
        return s, bent, away

    def grads(self, j: Array | int, masked: bool) -> tuple[Array, Array, Array, Array]:
        """What a block of keys adds to the gradients: of queries, itself [C, keys], values, slopes [G].

        Keys lie across: the products then read no matrix down its columns, and are thrice as fast on CPUs.
        """
        wide, problem = self.wide, self.plan.problem
        s, bent, away = self.scores(j, masked)
        grad, q = self.mine("grad"), self.q
        p = jnp.exp(s - self.mine("lse", np.inf)[..., None])
        dv = _dot("gqk,gqv->vk", p.astype(grad.dtype), grad, wide)
        dp = _dot("gqv,kv->gqk", grad, self.keys("v", j), wide)
        ds = p * (dp - self.mine("delta")[..., None])
        slopes = jnp.zeros_like(s, shape=q.shape[0])
        if problem.slopes_grad:
            slopes = -jnp.sum(ds * away.astype(wide)[None], axis=(1, 2))
        if bent is not None:
            ds = ds * (1 - bent * bent)
        ds = (ds * jnp.asarray(problem.scale, wide)).astype(q.dtype)
        dq = _dot("gqk,kc->gqc", ds, self.keys("k", j), wide)
        return dq, _dot("gqk,gqc->ck", ds, q, wide), dv, slopes


def _forward_block(plan: _Plan, head: Head, i: Array | int) -> tuple[Array, Array]:
    """A block of queries and the blocks of keys it may see, one after the other."""
    part = _Part(plan, head, i)

    def turn(masked: bool, j: Array | int, state: tuple[Array, ...]) -> tuple[Array, ...]:
        acc, total, top = state
        s, _, _ = part.scores(j, masked)
        higher = jnp.maximum(top, jnp.max(s, axis=-1))
        p = jnp.exp(s - _finite(higher)[..., None])
        less = jnp.exp(top - _finite(higher))
        v = part.keys("v", j)
        mixed = _dot("gqk,kv->gqv", p.astype(v.dtype), v, part.wide)
        return acc * less[..., None] + mixed, total * less + jnp.sum(p, axis=-1), higher

    rows, V = part.q.shape[:2], head.arrays["v"].shape[-1]
    none = jnp.full_like(part.q, -jnp.inf, part.wide, shape=rows)
    begun = (jnp.zeros_like(none, shape=(*rows, V)), jnp.zeros_like(none), none)
    acc, total, top = plan.over_keys(head, i, turn, begun)
    return _finished(part, acc, total, top)


def _finished(part: _Part, acc: Array, total: Array, top: Array) -> tuple[Array, Array]:
    """Sums made into the result and the logsumexp, sinks among it."""
    if "sinks" in part.head.arrays:
        sink = jnp.broadcast_to(part.head.whole("sinks").astype(top.dtype)[:, None], top.shape)
        higher = jnp.maximum(top, sink)
        less = jnp.exp(top - higher)
        acc, total, top = acc * less[..., None], total * less + jnp.exp(sink - higher), higher
    some = total > 0
    total = jnp.where(some, total, 1)
    return acc / total[..., None], jnp.where(some, top + jnp.log(total), jnp.inf)


def _finite(top: Array) -> Array:
    """A maximum that can be subtracted: 0 where nothing is seen yet."""
    return jnp.where(jnp.isneginf(top), 0, top)


def _dot(names: str, a: Array, b: Array, wide: Any) -> Array:
    return jnp.einsum(names, a, b, preferred_element_type=wide)


def _added(whole: Array, part: Array, begin: Array | int) -> Array:
    held = jax.lax.dynamic_slice_in_dim(whole, begin, part.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(whole, held + part, begin, axis=1)

"""Flash attention in plain array operations, for CPUs and GPUs: memory linear in the length, blocks skipped.

Queries go by blocks, in a loop, so that one block's scores alone are held. Where it is known before any data
which keys a block may see, and they are not too many, the loop has a branch for each block: one matrix of
scores with all of those keys, and a plain softmax. Otherwise keys go by blocks too, in a loop between bounds
from `attention_blocks`, and the softmax is kept up as it goes. Key heads are worked on together while all
their scores stay small, else one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.kernels.attention_blocks import Bounds, Operands, Problem, bounds
from mosaicjax.spec import at_least_float32


@dataclass(frozen=True)
class Sizes:
    """How work is cut: queries and keys of a block, keys that one matrix of scores may span at most.

    `together` is how many scores of all heads may be held at once. Units: entries.
    """

    queries: int = 256
    keys: int = 512
    most_keys: int = 16_384
    together: int = 2**21


SIZES = Sizes()


def forward(problem: Problem, x: Operands, sizes: Sizes = SIZES) -> tuple[Array, Array]:
    """Attention's result [B, H, L, V] and the logsumexp [B, H, L], +inf where a query sees nothing."""
    plan = _plan(problem, x, sizes)
    L, kept = x.lengths[0], x.q.dtype

    def one(head: dict[str, Any]) -> tuple[Array, Array]:
        def row(i: Array) -> tuple[Array, Array]:
            if not plan.static:
                return _forward_loop(plan, head, i)
            blocks = [functools.partial(_forward_block, plan, i=i) for i in range(plan.count)]
            return jax.lax.switch(i, blocks, head)

        out, lse = jax.lax.map(row, jnp.arange(plan.count))
        return _joined(out).astype(kept)[:, :L].swapaxes(0, 1), _joined(lse)[:, :L]

    out, lse = plan.over_heads(one, _arrays(x, plan))
    return out.swapaxes(1, 2), lse


def backward(
    problem: Problem, x: Operands, grad: Array, lse: Array, delta: Array, sizes: Sizes = SIZES
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v, and of the slopes [H] where they are wanted.

    Shapes: `grad` [B, H, L, V]; lse and delta [B, H, L].
    """
    plan = _plan(problem, x, sizes)
    C, G, (L, T) = x.q.shape[3], x.q.shape[1] // x.k.shape[1], x.lengths
    wide = lse.dtype
    arrays = _arrays(x, plan) | {"grad": grad.swapaxes(1, 2), "lse": lse, "delta": delta.astype(wide)}

    def static_block(head: dict[str, Any], i: int, dk: Array, dv: Array, slopes: Array) -> Any:
        begin, end = plan.range(i)
        if begin == end:
            return (dk, dv, slopes), jnp.zeros((G, plan.sizes.queries, C), wide)
        part = _Part(plan, head, i * plan.sizes.queries, plan.sizes.queries)
        dq, dk_part, dv_part, bias = part.grads(begin, end - begin, masked=not plan.whole(i))
        return (_added(dk, dk_part, begin), _added(dv, dv_part, begin), slopes + bias), dq

    def dynamic_block(head: dict[str, Any], i: Array, dk: Array, dv: Array, slopes: Array) -> Any:
        part = _Part(plan, head, i * plan.sizes.queries, plan.sizes.queries)

        def turn(masked: bool, j: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            dq, dk, dv, slopes = state
            begin = j * plan.sizes.keys
            more_q, dk_part, dv_part, bias = part.grads(begin, plan.sizes.keys, masked)
            return dq + more_q, _added(dk, dk_part, begin), _added(dv, dv_part, begin), slopes + bias

        zero = jnp.zeros((G, plan.sizes.queries, C), wide)
        dq, dk, dv, slopes = _loops(plan.bounds_of(head, i), turn, (zero, dk, dv, slopes))
        return (dk, dv, slopes), dq

    def one(head: dict[str, Any]) -> tuple[Array, Array, Array, Array]:
        def row(carried: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], Array]:
            if not plan.static:
                return dynamic_block(head, i, *carried)
            blocks = [functools.partial(static_block, head, i) for i in range(plan.count)]
            return jax.lax.switch(i, blocks, *carried)

        dk, dv = (jnp.zeros(head[name].shape[::-1], wide) for name in ("k", "v"))
        (dk, dv, slopes), dq = jax.lax.scan(row, (dk, dv, jnp.zeros(G, wide)), jnp.arange(plan.count))
        dq = _joined(dq).astype(x.q.dtype)[:, :L].swapaxes(0, 1)
        dk, dv = dk.astype(x.k.dtype), dv.astype(x.v.dtype)
        return dq, dk[:, :T].T[:, None], dv[:, :T].T[:, None], slopes

    dq, dk, dv, slopes = plan.over_heads(one, arrays)
    slopes_H = jnp.sum(slopes, axis=0) if problem.slopes_grad else None
    return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2), slopes_H


@dataclass(frozen=True)
class _Plan:
    problem: Problem
    x: Operands
    sizes: Sizes
    bounds: Bounds
    static: bool
    together: bool

    @property
    def count(self) -> int:
        """Blocks of queries."""
        return self.x.lengths[0] // self.sizes.queries

    def range(self, i: int) -> tuple[int, int]:
        """The keys that a block of queries may see, where that is known."""
        begin, end = (int(self.bounds.static[n, i]) * self.sizes.keys for n in (0, 3))
        return begin, end

    def whole(self, i: int) -> bool:
        """Whether nothing of them is masked."""
        same = bool((self.bounds.static[:2, i] == self.bounds.static[0, i]).all())
        return same and self.x.q_segments is None and self.bounds.static[2, i] == self.bounds.static[3, i]

    def over_heads(
        self, one: Callable[[dict[str, Array]], tuple[Array, ...]], arrays: dict[str, Array]
    ) -> tuple[Array, ...]:
        """`one` for every key head and its G query heads, all at once or one by one.

        It takes q and grad [G, L, C], k and v [T, C], lse and delta [G, L], slopes and sinks [G], at padded
        lengths, and gives arrays [length, heads, channels], [heads, length] or [heads]; they are returned
        with all heads, after an axis B. One by one, heads are read from and written to where they lie: a
        copy with axes in another order would be as large as the array.
        """
        B, K = self.x.q.shape[0], self.x.k.shape[1]

        def laid(parts: dict[str, Array]) -> tuple[Array, ...]:
            return one({name: self._laid(name, part) for name, part in parts.items()})

        def head(n: Array | int) -> dict[str, Array]:
            return {name: _head(x, n // K, n % K, K, HEADS_AXIS.get(name)) for name, x in arrays.items()}

        if self.together:
            parts = jax.vmap(laid)({name: _split(x, K, HEADS_AXIS.get(name)) for name, x in arrays.items()})
            return tuple(_merged(part.reshape(B, K, *part.shape[1:])) for part in parts)

        def turn(n: Array, wholes: tuple[Array, ...]) -> tuple[Array, ...]:
            parts = laid(head(n))
            return tuple(_put(whole, part, n // K, n % K) for whole, part in zip(wholes, parts, strict=True))

        begun = (_merged(jnp.zeros((B, K, *x.shape), x.dtype)) for x in jax.eval_shape(lambda: laid(head(0))))
        return jax.lax.fori_loop(0, B * K, turn, tuple(begun))

    def _laid(self, name: str, part: Array) -> Array:
        """One key head's part of an array, padded."""
        L, T = (self.x.lengths[n] for n in range(2))
        match name:
            case "q" | "grad":
                part = part.swapaxes(0, 1)
                return jnp.pad(part, ((0, 0), (0, L - part.shape[1]), (0, 0)))
            case "k" | "v":
                return jnp.pad(part[:, 0], ((0, T - part.shape[0]), (0, 0)))
            case "lse" | "delta":
                fill = jnp.inf if name == "lse" else 0
                return jnp.pad(part, ((0, 0), (0, L - part.shape[1])), constant_values=fill)
        return part

    def bounds_of(self, head: dict[str, Any], i: Array) -> Array:
        """Begin, begin and end of the whole blocks, end."""
        return jax.lax.dynamic_index_in_dim(head["bounds"], i, axis=1, keepdims=False)


def _plan(problem: Problem, x: Operands, sizes: Sizes) -> _Plan:
    """Sizes that suit the lengths, operands padded to them, and what is known before any data."""
    L, T = x.lengths
    B, H = x.q.shape[:2]
    known = x.known is not None and x.q_segments is None and sizes.most_keys >= T
    if L * T * B * H <= sizes.together:
        # All at once: one block, whatever is masked in it.
        sizes = Sizes(L, T, T, sizes.together)
    bq, bk = min(sizes.queries, L), min(sizes.keys, T)
    sizes = Sizes(bq, bk, sizes.most_keys, sizes.together)
    x = x.padded(-(-L // bq) * bq, -(-T // bk) * bk)
    one = x.lengths == (bq, bk)
    found = bounds(problem, (bq, bk), x)
    return _Plan(problem, x, sizes, found, known or one, B * H * bq * T <= sizes.together)


# The axis of heads of the arrays that have one, after the axis B.
HEADS_AXIS = {"q": 2, "grad": 2, "k": 2, "v": 2, "lse": 1, "delta": 1, "slopes": 1, "sinks": 1}


def _arrays(x: Operands, plan: _Plan) -> dict[str, Array]:
    """What all heads need, by name, all with an axis B; q, k, v unpadded, [B, length, heads, channels]."""
    B = x.q.shape[0]
    arrays = {name: array.swapaxes(1, 2) for name, array in (("q", x.q), ("k", x.k), ("v", x.v))}
    arrays["offset"] = jnp.broadcast_to(x.offset, (B,))
    for name, numbers in (("slopes", x.slopes), ("sinks", x.sinks)):
        if numbers is not None:
            arrays[name] = jnp.broadcast_to(numbers, (B, *numbers.shape))
    for name, segments in (("q_segments", plan.x.q_segments), ("k_segments", plan.x.k_segments)):
        if segments is not None:
            arrays[name] = segments
    if not plan.static:
        arrays["bounds"] = jnp.broadcast_to(plan.bounds.array, (B, *plan.bounds.array.shape[1:]))
    return arrays


def _head(x: Array, b: Array | int, k: Array | int, count: int, axis: int | None) -> Array:
    """The k-th of `count` parts along an axis, of row b."""
    row = jax.lax.dynamic_index_in_dim(x, b, keepdims=False)
    if axis is None:
        return row
    size = x.shape[axis] // count
    return jax.lax.dynamic_slice_in_dim(row, k * size, size, axis=axis - 1)


def _split(x: Array, count: int, axis: int | None) -> Array:
    """All such parts: [B x count, ...]."""
    if axis is None:
        return jnp.repeat(x, count, axis=0)
    parts = x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(parts, axis, 1).reshape(
        x.shape[0] * count, *parts.shape[1:axis], *parts.shape[axis + 1 :]
    )


def _merged(parts: Array) -> Array:
    """As one array: parts [B, count, length, heads, channels], [B, count, heads, length] or [..., heads]."""
    axis = 2 if parts.ndim == 5 else 1
    moved = jnp.moveaxis(parts, 1, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


def _put(whole: Array, part: Array, b: Array, k: Array) -> Array:
    """The k-th part of row b, put where it belongs."""
    axis = 1 if part.ndim == 3 else 0
    begin: list[Array | int] = [b, *[0] * part.ndim]
    begin[1 + axis] = k * part.shape[axis]
    return jax.lax.dynamic_update_slice(whole, part[None], begin)


class _Part:
    """Some queries of one key head's G query heads, [G, queries, C], and what they make of some keys."""

    def __init__(self, plan: _Plan, head: dict[str, Any], first: Array | int, queries: int) -> None:
        self.plan, self.head, self.first, self.queries = plan, head, first, queries
        self.wide = at_least_float32(head["q"].dtype)

    def mine(self, name: str, axis: int = 1) -> Array:
        """These queries' share of an array."""
        return jax.lax.dynamic_slice_in_dim(self.head[name], self.first, self.queries, axis=axis)

    def keys(self, name: str, begin: Array | int, count: int) -> Array:
        """Some keys' share of an array."""
        return jax.lax.dynamic_slice_in_dim(self.head[name], begin, count, axis=0)

    def scores(self, begin: Array | int, count: int, masked: bool) -> tuple[Array, Array | None, Array]:
        """Logits [G, queries, count], tanh where they are capped, and distances [queries, count]."""
        problem, wide = self.plan.problem, self.wide
        s = _dot("gqc,kc->gqk", self.mine("q"), self.keys("k", begin, count), wide)
        bent = None
        if problem.softcap:
            bent = jnp.tanh(s * (problem.scale / problem.softcap))
            s = bent * problem.softcap
        else:
            s = s * jnp.asarray(problem.scale, wide)
        rows = self.first + self.head["offset"] + jnp.arange(self.queries, dtype=jnp.int32)
        columns = begin + jnp.arange(count, dtype=jnp.int32)
        distance = rows[:, None] - columns[None]
        away = distance if problem.causal else jnp.abs(distance)
        if "slopes" in self.head:
            s = s - self.head["slopes"].astype(wide)[:, None, None] * away.astype(wide)[None]
        if masked:
            allowed = columns[None] < problem.keys
            if problem.causal:
                allowed &= distance >= 0
            if problem.window:
                allowed &= jnp.abs(distance) < problem.window
            if "q_segments" in self.head:
                column = self.keys("k_segments", begin, count)[None]
                allowed &= (self.mine("q_segments", 0)[:, None] == column) & (column > 0)
            s = jnp.where(allowed[None], s, -jnp.inf)
        return s, bent, away

    def grads(self, begin: Array | int, count: int, masked: bool) -> tuple[Array, Array, Array, Array]:
        """What these keys add to the gradients: of queries, themselves [C, keys], values, slopes [G].

        Keys lie across: the products then read no matrix down its columns, and are thrice as fast on CPUs.
        """
        wide, problem = self.wide, self.plan.problem
        s, bent, away = self.scores(begin, count, masked)
        grad, q = self.mine("grad"), self.mine("q")
        p = jnp.exp(s - self.mine("lse")[..., None])
        dv = _dot("gqk,gqv->vk", p.astype(grad.dtype), grad, wide)
        dp = _dot("gqv,kv->gqk", grad, self.keys("v", begin, count), wide)
        ds = p * (dp - self.mine("delta")[..., None])
        slopes = jnp.zeros(q.shape[0], wide)
        if problem.slopes_grad:
            slopes = -jnp.sum(ds * away.astype(wide)[None], axis=(1, 2))
        if bent is not None:
            ds = ds * (1 - bent * bent)
        ds = (ds * jnp.asarray(problem.scale, wide)).astype(q.dtype)
        dq = _dot("gqk,kc->gqc", ds, self.keys("k", begin, count), wide)
        return dq, _dot("gqk,gqc->ck", ds, q, wide), dv, slopes


def _forward_block(plan: _Plan, head: dict[str, Any], i: int) -> tuple[Array, Array]:
    """A block of queries and all keys it may see, at once."""
    begin, end = plan.range(i)
    part = _Part(plan, head, i * plan.sizes.queries, plan.sizes.queries)
    rows = (head["q"].shape[0], plan.sizes.queries)
    top = jnp.full(rows, -jnp.inf, part.wide)
    if begin == end:
        return _finished(part, jnp.zeros((*rows, head["v"].shape[-1]), part.wide), jnp.zeros_like(top), top)
    s, _, _ = part.scores(begin, end - begin, masked=not plan.whole(i))
    top = jnp.max(s, axis=-1)
    p = jnp.exp(s - _finite(top)[..., None])
    v = part.keys("v", begin, end - begin)
    return _finished(part, _dot("gqk,kv->gqv", p.astype(v.dtype), v, part.wide), jnp.sum(p, axis=-1), top)


def _forward_loop(plan: _Plan, head: dict[str, Any], i: Array) -> tuple[Array, Array]:
    """A block of queries and the blocks of keys it may see, one after the other."""
    part = _Part(plan, head, i * plan.sizes.queries, plan.sizes.queries)
    rows = (head["q"].shape[0], plan.sizes.queries)

    def turn(masked: bool, j: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        acc, total, top = state
        begin = j * plan.sizes.keys
        s, _, _ = part.scores(begin, plan.sizes.keys, masked)
        higher = jnp.maximum(top, jnp.max(s, axis=-1))
        p = jnp.exp(s - _finite(higher)[..., None])
        less = jnp.exp(top - _finite(higher))
        v = part.keys("v", begin, plan.sizes.keys)
        mixed = _dot("gqk,kv->gqv", p.astype(v.dtype), v, part.wide)
        return acc * less[..., None] + mixed, total * less + jnp.sum(p, axis=-1), higher

    nothing = jnp.full(rows, -jnp.inf, part.wide)
    begun = (jnp.zeros((*rows, head["v"].shape[-1]), part.wide), jnp.zeros_like(nothing), nothing)
    acc, total, top = _loops(plan.bounds_of(head, i), turn, begun)
    return _finished(part, acc, total, top)


def _finished(part: _Part, acc: Array, total: Array, top: Array) -> tuple[Array, Array]:
    """Sums made into the result and the logsumexp, sinks among it."""
    if "sinks" in part.head:
        sink = jnp.broadcast_to(part.head["sinks"].astype(top.dtype)[:, None], top.shape)
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


def _joined(blocks: Array) -> Array:
    """[blocks, G, queries, ...] as [G, all queries, ...]."""
    moved = jnp.moveaxis(blocks, 0, 1)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])


def _added(whole: Array, part: Array, begin: Array | int) -> Array:
    held = jax.lax.dynamic_slice_in_dim(whole, begin, part.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(whole, held + part, begin, axis=1)


def _loops(bounds_4: Array, turn: Callable[..., Any], state: Any) -> Any:
    """`turn(masked, j, state)` for all blocks without a masked entry, then for the others."""
    begin, whole_begin, whole_end, end = (bounds_4[n] for n in range(4))
    state = jax.lax.fori_loop(whole_begin, whole_end, lambda j, state: turn(False, j, state), state)
    before = whole_begin - begin

    def partly(t: Array, state: Any) -> Any:
        return turn(True, jnp.where(t < before, begin + t, whole_end + t - before), state)

    return jax.lax.fori_loop(0, before + end - whole_end, partly, state)

"""Flash attention as Pallas kernels for TPUs: forward, and one fused backward.

Scores are held turned, keys down and queries across ([bk, bq]), so that whatever belongs to a query (maximum,
sum, logsumexp, segment) is one row that spreads over sublanes for nothing, and sums over keys are plain adds
of registers. A chunk of keys and values rests in VMEM while queries pass; the blocks of it that a block of
queries may see are a loop between bounds that `attention_blocks` worked out, first the blocks without any
masked entry, then those with some. What no query may see is neither multiplied nor looked at.

The backward pass goes by blocks of queries too: dk and dv of the chunk gather in VMEM in float32, over all
query heads that share them, and dq over the blocks of the loop. Where keys are longer than a chunk, one call
follows another and dq goes on in place, in one float32 array: memory stays linear in the length.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mosaicjax.kernels.attention_blocks import Bounds, Operands, Problem, bounds

LOG2E = math.log2(math.e)
MASKED = -3e38
"""A score that no softmax notices; `LOWEST`, where every maximum begins, is well above it."""
LOWEST = -1e38
LANES = 128
PARALLEL, ARBITRARY = pltpu.GridDimensionSemantics.PARALLEL, pltpu.GridDimensionSemantics.ARBITRARY


@dataclass(frozen=True)
class Tiling:
    """How work is cut: queries a step, keys a turn of the loop, keys that rest in VMEM (a multiple of those).

    `vmem` is what the kernel may take of it. Units: bytes; 0 leaves the compiler's default.
    """

    queries: int
    keys: int
    resident: int
    vmem: int = 0
    strip: int = 256

    def fitted(self, queries: int, keys: int) -> Tiling:
        """This for lengths that may be shorter, padded no further than whole blocks ask."""
        bq, bk = min(self.queries, _up(queries, LANES)), min(self.keys, _up(keys, LANES))
        chunks = -(-keys // max(self.resident, bk))
        return replace(self, queries=bq, keys=bk, resident=_up(-(-keys // chunks), bk))

    @property
    def strips(self) -> list[tuple[int, int]]:
        """Queries that are worked on one after the other within a turn: first, and how many."""
        strip = min(self.strip, self.queries)
        return [(at, min(strip, self.queries - at)) for at in range(0, self.queries, strip)]


@dataclass(frozen=True)
class Call:
    """What a kernel is compiled for, beside the shapes of its operands."""

    problem: Problem
    tiling: Tiling
    interpret: bool = False


def _up(size: int, whole: int) -> int:
    return -(-size // whole) * whole


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """A product of matrices over the named dims, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


class _Tile:
    """The scores of one block of keys with one of queries, in the kernel, and what is added or masked."""

    def __init__(
        self,
        call: Call,
        row0: Array,
        strip: tuple[int, int],
        slope2: Array | None,
        q_segments: Array | None,
        k_segments: Any,
        cheap_bias: bool,
    ) -> None:
        self.call, self.row0, self.slope2 = call, row0 + strip[0], slope2
        self.lanes, self.queries = slice(strip[0], strip[0] + strip[1]), strip[1]
        self.q_segments = None if q_segments is None else q_segments[:, self.lanes]
        self.k_segments, self.cheap_bias = k_segments, cheap_bias

    def _distance(self, col0: Array) -> Array:
        """Key's place less query's, int32 [bk, bq]."""
        shape = (self.call.tiling.keys, self.queries)
        down = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        across = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        return (down - across) + (col0 - self.row0)

    def bias(self, col0: Array) -> Array:
        """ALiBi in base 2, [bk, bq] or what spreads to it.

        `cheap_bias` measures from the block's first query: the same within each query's softmax, and one
        addition an entry; float32 would notice the rounding.
        """
        assert self.slope2 is not None
        bk, bq = self.call.tiling.keys, self.queries
        if self.cheap_bias:
            down = jax.lax.broadcasted_iota(jnp.int32, (bk, LANES), 0) + (col0 - self.row0)
            column = down.astype(jnp.float32) * self.slope2
            return _across(column, bq)
        return self.relative(col0) * self.slope2

    def relative(self, col0: Array) -> Array:
        """Less the distance, float32 [bk, bq]: what a slope multiplies."""
        relative = self._distance(col0).astype(jnp.float32)
        return relative if self.call.problem.causal else -jnp.abs(relative)

    def allowed(self, j: Array, col0: Array) -> Array:
        """Where the query may see the key, bool [bk, bq]."""
        problem = self.call.problem
        bk, bq = self.call.tiling.keys, self.queries
        distance = self._distance(col0)
        parts = []
        if problem.causal:
            parts.append(distance <= 0)
        if problem.window:
            parts.append(distance > -problem.window)
            if not problem.causal:
                parts.append(distance < problem.window)
        if problem.keys % bk:
            down = jax.lax.broadcasted_iota(jnp.int32, (bk, bq), 0)
            parts.append(down < problem.keys - col0)
        if self.q_segments is not None:
            row = self.k_segments[pl.ds(j, 1), :]
            column = jnp.transpose(jnp.broadcast_to(row, (LANES, bk)))
            column = _across(column, bq)
            parts.append((column == self.q_segments) & (column > 0))
        return functools.reduce(jnp.logical_and, parts)

    def scores(self, s: Array, j: Array, col0: Array, masked: bool) -> tuple[Array, Array | None]:
        """Base-2 scores from products, and the softcap's tanh where there is one."""
        call = self.call
        bent = None
        if call.problem.softcap:
            bent = jnp.tanh(s * (call.problem.scale / call.problem.softcap))
            x = bent * (call.problem.softcap * LOG2E)
        else:
            x = s * (call.problem.scale * LOG2E)
        if self.slope2 is not None:
            x = x + self.bias(col0)
        if masked:
            x = jnp.where(self.allowed(j, col0), x, MASKED)
        return x, bent

    def shift(self) -> Array | None:
        """What `cheap_bias` left out of each query's scores, [1, bq]."""
        if self.slope2 is None or not self.cheap_bias:
            return None
        across = jax.lax.broadcasted_iota(jnp.int32, (1, self.queries), 1)
        return across.astype(jnp.float32) * self.slope2


def _across(column: Array, wide: int) -> Array:
    """A column that is the same in all its lanes, for so many queries; no work for the machine."""
    return jnp.concatenate([column] * (wide // LANES), axis=1) if wide > LANES else column


def _loops(bounds: list[Array], masks: bool, turn: Any, state: Any) -> Any:
    """`turn(j, masked, state)` for all blocks without a masked entry, then for the others."""
    lo, full_lo, full_hi, hi = bounds
    state = jax.lax.fori_loop(full_lo, full_hi, functools.partial(turn, False), state)
    if not masks:
        return state
    before = full_lo - lo

    def partly(t: Array, state: Any) -> Any:
        j = jnp.where(t < before, lo + t, full_hi + t - before)
        return turn(True, j, state)

    return jax.lax.fori_loop(0, before + hi - full_hi, partly, state)


def _in_chunk(bounds_ref: Any, b: Array, i: Array, first: Array | int, count: int) -> list[Array]:
    """The bounds of query block i within a chunk of `count` key blocks from `first` on, counted from it."""
    row = jnp.minimum(b, bounds_ref.shape[0] - 1)
    return [jnp.clip(bounds_ref[row, n, i] - first, 0, count) for n in range(4)]


def _forward_kernel(call: Call, has: tuple[bool, bool, bool], chunks: int, G: int, *refs: Any) -> None:
    has_slopes, has_sinks, has_segments = has
    given = iter(refs)
    bounds_ref, offset_ref = next(given), next(given)
    slopes_ref, sinks_ref = (next(given) if each else None for each in (has_slopes, has_sinks))
    q_ref, k_ref, v_ref = (next(given) for _ in range(3))
    qs_ref, ks_ref = (next(given) if has_segments else None for _ in range(2))
    o_ref, lse_ref, m_ref, l_ref, acc_ref = given
    tiling = call.tiling
    b, head = pl.program_id(0), pl.program_id(1) * G + pl.program_id(2)
    i, c = pl.program_id(3), pl.program_id(4)
    count = tiling.resident // tiling.keys
    row0 = i * tiling.queries + offset_ref[jnp.minimum(b, offset_ref.shape[0] - 1)]
    slope2 = None if slopes_ref is None else slopes_ref[head] * LOG2E
    cheap = call.problem.causal and q_ref.dtype != jnp.float32
    q_segments, k_segments = (
        (None, None) if qs_ref is None or ks_ref is None else (qs_ref[0], ks_ref.at[0, 0])
    )
    tiles = [_Tile(call, row0, strip, slope2, q_segments, k_segments, cheap) for strip in tiling.strips]

    @pl.when(c == 0)
    def _() -> None:
        m_ref[...] = jnp.full_like(m_ref, LOWEST)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def turn(masked: bool, j: Array, state: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
        keys = pl.ds(pl.multiple_of(j * tiling.keys, tiling.keys), tiling.keys)
        col0 = c * tiling.resident + j * tiling.keys
        k, v = k_ref[0, 0, keys, :], v_ref[0, 0, keys, :]
        # The next strip's products are asked for before this one's softmax: that is what keeps the matrix
        # units busy meanwhile. All is stored at the end, as a store would hold up what comes behind it.
        new, mixed = [], []
        ahead = _dot(k, q_ref[0, 0, tiles[0].lanes, :], (1, 1))
        for n, (tile, (m, total)) in enumerate(zip(tiles, state, strict=True)):
            x, _ = tile.scores(ahead, j, col0, masked)
            if n + 1 < len(tiles):
                ahead = _dot(k, q_ref[0, 0, tiles[n + 1].lanes, :], (1, 1))
            m_new = jnp.maximum(m, jnp.max(x, axis=0, keepdims=True))
            p = jnp.exp2(x - m_new)
            alpha = jnp.exp2(m - m_new)
            new.append((m_new, total * alpha + jnp.sum(p, axis=0, keepdims=True)))
            mixed.append(acc_ref[:, tile.lanes] * alpha + _dot(v, p.astype(v.dtype), (0, 0)))
        for tile, acc in zip(tiles, mixed, strict=True):
            acc_ref[:, tile.lanes] = acc
        return new

    bounds = _in_chunk(bounds_ref, b, i, c * count, count)
    state = [(m_ref[:, tile.lanes], l_ref[:, tile.lanes]) for tile in tiles]
    state = _loops(bounds, call.problem.masks(has_segments, tiling.keys), turn, state)
    for tile, (m, total) in zip(tiles, state, strict=True):
        m_ref[:, tile.lanes] = m
        l_ref[:, tile.lanes] = total

    @pl.when(c == chunks - 1)
    def _() -> None:
        for tile in tiles:
            m, total, acc = m_ref[:, tile.lanes], l_ref[:, tile.lanes], acc_ref[:, tile.lanes]
            shift = tile.shift()
            if sinks_ref is not None:
                sink = jnp.full_like(m, sinks_ref[head] * LOG2E)
                sink = sink if shift is None else sink + shift
                top = jnp.maximum(m, sink)
                scale = jnp.exp2(m - top)
                acc, total, m = acc * scale, total * scale + jnp.exp2(sink - top), top
            some = total > 0
            out = jnp.transpose(acc * jnp.where(some, 1.0 / total, 0.0))
            o_ref[0, 0, tile.lanes, :] = out.astype(o_ref.dtype)
            lse = m + jnp.log2(total)
            lse = lse if shift is None else lse - shift
            lse_ref[0, 0, :, tile.lanes] = jnp.where(some, lse * (1.0 / LOG2E), jnp.inf)


def _params(call: Call, ordered: int) -> Any:
    semantics = tuple(PARALLEL if n < 2 else ARBITRARY for n in range(2 + ordered))
    vmem = call.tiling.vmem
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem or None)


def forward(call: Call, x: Operands) -> tuple[Array, Array]:
    """Attention's result and the natural logsumexp of each query's scores, +inf where it sees nothing.

    Shapes: the result [B, H, L, V] like q, the logsumexp float32 [B, H, L].
    """
    call, length = replace(call, tiling=call.tiling.fitted(*x.lengths)), x.lengths[0]
    tiling = call.tiling
    x = x.padded(_up(x.lengths[0], tiling.queries), _up(x.lengths[1], tiling.resident))
    out, lse = _forward(call, bounds(call.problem, (tiling.queries, tiling.keys), x), x)
    return out[:, :, :length], lse[:, :, :length]


def forward_cost(call: Call, bounds: Bounds, x: Operands) -> pl.CostEstimate:
    """What the forward kernel does: products of the blocks it visits, exponentials, bytes of HBM.

    Exact where all is known before any data. With segments it is what would be done if all were one document,
    with an offset that is an array what would be done if every block were seen.
    """
    (B, H, L, C), (_, K, T, V) = x.q.shape, x.v.shape
    tiling = call.tiling
    count, chunks, rows = tiling.resident // tiling.keys, T // tiling.resident, L // tiling.queries
    visits = B * H * bounds.visited
    fetched = B * K * bounds.fetches(count, chunks, H // K) * tiling.resident
    size, finish = x.q.dtype.itemsize, 1 if x.sinks is None else 3
    numbers = B * H * L * (size * (C + V) + 4) + fetched * size * (C + V)
    if x.q_segments is not None:
        fetched = bounds.fetches(count, chunks, H) * tiling.resident
        numbers += 4 * B * ((H * L if rows > 1 else L) + fetched)
    tanh, heads = 1 if call.problem.softcap else 0, sum(each is not None for each in (x.slopes, x.sinks))
    return pl.CostEstimate(
        flops=2 * visits * tiling.queries * tiling.keys * (C + V),
        transcendentals=visits * tiling.queries * (tiling.keys * (1 + tanh) + 1) + B * H * L * finish,
        bytes_accessed=numbers + _prefetched(bounds, x, heads),
    )


def _prefetched(bounds: Bounds, x: Operands, heads: int) -> int:
    """Bytes of what is read before the kernel begins, `heads` arrays with a number a head among it."""
    return 4 * (bounds.array.size + x.offset.size + heads * x.q.shape[1])


def _forward(call: Call, bounds: Bounds, x: Operands) -> tuple[Array, Array]:
    (B, H, L, C), (_, K, T, V) = x.q.shape, x.v.shape
    G, tiling = H // K, call.tiling
    bq, chunks, count = tiling.queries, T // tiling.resident, tiling.resident // tiling.keys
    has = (x.slopes is not None, x.sinks is not None, x.q_segments is not None)
    row = (lambda b: 0) if bounds.array.shape[0] == 1 else (lambda b: b)

    def chunk(b: Array, i: Array, c: Array, bounds_ref: Any) -> Array:
        """The chunk itself, or, where nothing of it is seen, one that is there anyway."""
        if chunks == 1:
            return c
        first = jax.lax.div(bounds_ref[row(b), 0, i], count)
        last = jax.lax.div(jnp.maximum(bounds_ref[row(b), 3, i] - 1, 0), count)
        return jnp.clip(c, first, jnp.maximum(first, last))

    prefetch = [bounds.array, x.offset]
    prefetch += [each.astype(jnp.float32) for each in (x.slopes, x.sinks) if each is not None]
    in_specs = [
        pl.BlockSpec((1, 1, bq, C), lambda b, k, g, i, c, *_: (b, k * G + g, i, 0)),
        pl.BlockSpec((1, 1, tiling.resident, C), lambda b, k, g, i, c, n, *_: (b, k, chunk(b, i, c, n), 0)),
        pl.BlockSpec((1, 1, tiling.resident, V), lambda b, k, g, i, c, n, *_: (b, k, chunk(b, i, c, n), 0)),
    ]
    operands = [x.q, x.k, x.v]
    if x.q_segments is not None and x.k_segments is not None:
        in_specs += [
            pl.BlockSpec((1, 1, bq), lambda b, k, g, i, c, *_: (b, 0, i)),
            pl.BlockSpec(
                (1, 1, count, tiling.keys), lambda b, k, g, i, c, n, *_: (b, chunk(b, i, c, n), 0, 0)
            ),
        ]
        operands += [x.q_segments[:, None], _by_blocks(x.k_segments, tiling)]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(prefetch),
        grid=(B, K, G, L // bq, chunks),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((1, 1, bq, V), lambda b, k, g, i, c, *_: (b, k * G + g, i, 0)),
            pl.BlockSpec((1, 1, 1, bq), lambda b, k, g, i, c, *_: (b, k * G + g, 0, i)),
        ],
        scratch_shapes=[
            pltpu.VMEM((1, bq), jnp.float32),
            pltpu.VMEM((1, bq), jnp.float32),
            pltpu.VMEM((V, bq), jnp.float32),
        ],
    )
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, call, has, chunks, G),
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct((B, H, L, V), x.q.dtype),
            jax.ShapeDtypeStruct((B, H, 1, L), jnp.float32),
        ],
        compiler_params=_params(call, 3),
        cost_estimate=forward_cost(call, bounds, x),
        interpret=call.interpret,
        name="flash_attention_forward",
    )(*prefetch, *operands)
    return out, lse[:, :, 0]


def _by_blocks(segments_BT: Array, tiling: Tiling) -> Array:
    """[B, chunks, blocks of a chunk, bk]: a block of keys is a row, and a window holds whole last dims."""
    return segments_BT.reshape(segments_BT.shape[0], -1, tiling.resident // tiling.keys, tiling.keys)


def _backward_kernel(
    call: Call, has: tuple[bool, bool], more: bool, G: int, first: tuple[int, int], *refs: Any
) -> None:
    has_slopes, has_segments = has
    given = iter(refs)
    bounds_ref, offset_ref = next(given), next(given)
    slopes_ref = next(given) if has_slopes else None
    q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref = (next(given) for _ in range(6))
    qs_ref, ks_ref = (next(given) if has_segments else None for _ in range(2))
    before_ref = next(given) if more else None
    dq_ref, dk_ref, dv_ref = (next(given) for _ in range(3))
    slopes_grad_ref = next(given) if call.problem.slopes_grad else None
    dq_acc, dk_acc, dv_acc = given
    tiling = call.tiling
    b, g, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    head, i = pl.program_id(1) * G + g, step + first[0]
    row0 = i * tiling.queries + offset_ref[jnp.minimum(b, offset_ref.shape[0] - 1)]
    slope2 = None if slopes_ref is None else slopes_ref[head] * LOG2E
    cheap = call.problem.causal and q_ref.dtype != jnp.float32
    q_segments, k_segments = (
        (None, None) if qs_ref is None or ks_ref is None else (qs_ref[0], ks_ref.at[0, 0])
    )
    tiles = [_Tile(call, row0, strip, slope2, q_segments, k_segments, cheap) for strip in tiling.strips]

    @pl.when((g == 0) & (step == 0))
    def _() -> None:
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    dq_acc[...] = jnp.zeros_like(dq_acc)
    if slopes_grad_ref is not None:
        slopes_grad_ref[...] = jnp.zeros_like(slopes_grad_ref)

    def logsumexp(tile: _Tile) -> Array:
        lse2, shift = lse_ref[0, 0, :, tile.lanes] * LOG2E, tile.shift()
        return lse2 if shift is None else lse2 + shift

    lses = [logsumexp(tile) for tile in tiles]

    def turn(masked: bool, j: Array, state: tuple[()]) -> tuple[()]:
        keys = pl.ds(pl.multiple_of(j * tiling.keys, tiling.keys), tiling.keys)
        col0 = first[1] * tiling.keys + j * tiling.keys
        k, v = k_ref[0, 0, keys, :], v_ref[0, 0, keys, :]
        for tile, lse2 in zip(tiles, lses, strict=True):
            q, do = q_ref[0, 0, tile.lanes, :], do_ref[0, 0, tile.lanes, :]
            x, bent = tile.scores(_dot(k, q, (1, 1)), j, col0, masked)
            p = jnp.exp2(x - lse2)
            dp = _dot(v, do, (1, 1))
            dv_acc[keys, :] += _dot(p.astype(do.dtype), do, (1, 0))
            ds = p * (dp - delta_ref[0, 0, :, tile.lanes])
            if slopes_grad_ref is not None:
                relative = jnp.sum(ds * tile.relative(col0), axis=0, keepdims=True)
                slopes_grad_ref[0, 0, :, tile.lanes] += relative
            if bent is not None:
                ds = ds * (1.0 - bent * bent)
            ds = ds.astype(q.dtype)
            dk_acc[keys, :] += _dot(ds, q, (1, 0))
            dq_acc[:, tile.lanes] += _dot(k, ds, (0, 0))
        return state

    count = tiling.resident // tiling.keys
    bounds = _in_chunk(bounds_ref, b, i, first[1], count)
    _loops(bounds, call.problem.masks(has_segments, tiling.keys), turn, ())
    dq = jnp.transpose(dq_acc[...] * call.problem.scale)
    dq_ref[0, 0] = (dq if before_ref is None else before_ref[0, 0] + dq).astype(dq_ref.dtype)

    @pl.when((g == G - 1) & (step == pl.num_programs(3) - 1))
    def _() -> None:
        dk_ref[0, 0] = (dk_acc[...] * call.problem.scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)


def backward(
    call: Call, x: Operands, grad: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v, and of the slopes where they are wanted.

    Shapes: `grad` like the result; lse and delta float32 [B, H, L], lse +inf where nothing is seen; the
    slopes' gradient float32 [H].
    """
    call = replace(call, tiling=call.tiling.fitted(*x.lengths))
    (queries, keys), tiling = x.lengths, call.tiling
    x = x.padded(_up(queries, tiling.queries), _up(keys, tiling.resident))
    more = x.lengths[0] - queries
    if more:
        grad = jnp.pad(grad, ((0, 0), (0, 0), (0, more), (0, 0)))
        lse = jnp.pad(lse, ((0, 0), (0, 0), (0, more)), constant_values=jnp.inf)
        delta = jnp.pad(delta, ((0, 0), (0, 0), (0, more)))
    blocks = bounds(call.problem, (tiling.queries, tiling.keys), x)
    dq, dk, dv, slopes_grad = _backward(call, blocks, x, grad, lse, delta)
    return dq[:, :, :queries], dk[:, :, :keys], dv[:, :, :keys], slopes_grad


def backward_cost(call: Call, bounds: Bounds, x: Operands, chunk: int) -> pl.CostEstimate:
    """What the backward kernel of one chunk of keys does; see `forward_cost`."""
    (B, H, _, C), (_, K, T, V) = x.q.shape, x.v.shape
    tiling = call.tiling
    count = tiling.resident // tiling.keys
    begin, end = _query_blocks(call, bounds, x, chunk)
    visits = B * H * bounds.within(chunk * count, (chunk + 1) * count)
    rows, size = (end - begin) * tiling.queries, x.q.dtype.itemsize
    one, slopes = tiling.resident == T, 4 if call.problem.slopes_grad else 0
    # Queries, their gradients in and out (summed over chunks where there are several), two lines of numbers.
    numbers = B * H * rows * (size * (C + V) + 8 + (size * C if one else 8 * C) + slopes)
    numbers += 2 * size * B * K * tiling.resident * (C + V)
    if x.q_segments is not None:
        numbers += 4 * B * ((H * rows if end - begin > 1 else rows) + tiling.resident)
    tanh = 1 if call.problem.softcap else 0
    return pl.CostEstimate(
        flops=2 * visits * tiling.queries * tiling.keys * (3 * C + 2 * V),
        transcendentals=visits * tiling.queries * tiling.keys * (1 + tanh),
        bytes_accessed=numbers + _prefetched(bounds, x, int(x.slopes is not None)),
    )


def _query_blocks(call: Call, bounds: Bounds, x: Operands, chunk: int) -> tuple[int, int]:
    """Blocks of queries that the backward kernel of a chunk looks at: all, where it is the only one."""
    count = call.tiling.resident // call.tiling.keys
    begin, end = bounds.queries_of(chunk * count, (chunk + 1) * count)
    if begin < end and x.k.shape[2] == call.tiling.resident:
        return 0, x.q.shape[2] // call.tiling.queries
    return begin, end


def _backward(
    call: Call, bounds: Bounds, x: Operands, grad: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array, Array | None]:
    (B, H, _, C), (_, K, T, V) = x.q.shape, x.v.shape
    G, tiling = H // K, call.tiling
    bq, chunks, count = tiling.queries, T // tiling.resident, tiling.resident // tiling.keys
    has = (x.slopes is not None, x.q_segments is not None)
    prefetch = [bounds.array, x.offset]
    prefetch += [x.slopes.astype(jnp.float32)] if x.slopes is not None else []
    dq: Array | None = jnp.zeros(x.q.shape, jnp.float32) if chunks > 1 else None
    dks, dvs, slopes_grad = [], [], None
    for c in range(chunks):
        begin, end = _query_blocks(call, bounds, x, c)
        if begin == end:
            dks.append(jnp.zeros((B, K, tiling.resident, C), x.k.dtype))
            dvs.append(jnp.zeros((B, K, tiling.resident, V), x.v.dtype))
            continue

        def query(width: int, begin: int = begin) -> pl.BlockSpec:
            return pl.BlockSpec((1, 1, bq, width), lambda b, k, g, i, *_: (b, k * G + g, i + begin, 0))

        def line(begin: int = begin) -> pl.BlockSpec:
            return pl.BlockSpec((1, 1, 1, bq), lambda b, k, g, i, *_: (b, k * G + g, 0, i + begin))

        def key(width: int, c: int = c) -> pl.BlockSpec:
            return pl.BlockSpec((1, 1, tiling.resident, width), lambda b, k, g, i, *_: (b, k, c, 0))

        def gathered(width: int) -> pl.BlockSpec:
            return pl.BlockSpec((1, 1, tiling.resident, width), lambda b, k, g, i, *_: (b, k, 0, 0))

        in_specs = [query(C), query(V), line(), line(), key(C), key(V)]
        operands = [x.q, grad, lse[:, :, None], delta[:, :, None], x.k, x.v]
        if x.q_segments is not None and x.k_segments is not None:
            in_specs += [
                pl.BlockSpec((1, 1, bq), lambda b, k, g, i, *_, begin=begin: (b, 0, i + begin)),
                pl.BlockSpec((1, 1, count, tiling.keys), lambda b, k, g, i, *_, c=c: (b, c, 0, 0)),
            ]
            operands += [x.q_segments[:, None], _by_blocks(x.k_segments, tiling)]
        aliases = {}
        if dq is not None:
            in_specs.append(query(C))
            operands.append(dq)
            aliases = {len(prefetch) + len(operands) - 1: 0}
        out_specs = [query(C), gathered(C), gathered(V)]
        out_shape = [
            jax.ShapeDtypeStruct(x.q.shape, x.q.dtype if dq is None else jnp.float32),
            jax.ShapeDtypeStruct((B, K, tiling.resident, C), x.k.dtype),
            jax.ShapeDtypeStruct((B, K, tiling.resident, V), x.v.dtype),
        ]
        if call.problem.slopes_grad:
            out_specs.append(pl.BlockSpec((1, 1, 1, bq), lambda b, k, g, i, *_: (b, k * G + g, 0, i)))
            out_shape.append(jax.ShapeDtypeStruct((B, H, 1, (end - begin) * bq), jnp.float32))
        dq, dk, dv, *rest = pl.pallas_call(
            functools.partial(_backward_kernel, call, has, dq is not None, G, (begin, c * count)),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(prefetch),
                grid=(B, K, G, end - begin),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[
                    pltpu.VMEM((C, bq), jnp.float32),
                    pltpu.VMEM((tiling.resident, C), jnp.float32),
                    pltpu.VMEM((tiling.resident, V), jnp.float32),
                ],
            ),
            out_shape=out_shape,
            input_output_aliases=aliases,
            compiler_params=_params(call, 2),
            cost_estimate=backward_cost(call, bounds, x, c),
            interpret=call.interpret,
            name="flash_attention_backward",
        )(*prefetch, *operands)
        dks.append(dk)
        dvs.append(dv)
        if rest:
            part = jnp.sum(rest[0], axis=(0, 2, 3))
            slopes_grad = part if slopes_grad is None else slopes_grad + part
    if dq is None:
        # One chunk, of which no query sees anything.
        dq = jnp.zeros(x.q.shape, x.q.dtype)
    joined = [each[0] if len(each) == 1 else jnp.concatenate(each, axis=2) for each in (dks, dvs)]
    return dq.astype(x.q.dtype), joined[0], joined[1], slopes_grad

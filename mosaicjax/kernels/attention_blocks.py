"""Which blocks of keys a block of queries may see, worked out before a kernel runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Problem:
    """What is asked, beside the arrays: who may see whom by place, how scores are bent, which gradients.

    A query sees keys fewer than `window` places away (0: any), and if `causal` none behind its own. There are
    `queries` and `keys` before any padding. `slopes_grad` asks for the gradient of ALiBi's slopes.
    """

    causal: bool
    window: int
    scale: float
    softcap: float
    queries: int
    keys: int
    slopes_grad: bool = False

    def masks(self, segments: bool, block: int) -> bool:
        """Whether any block of so many keys can hold an entry that is masked."""
        return bool(self.causal or self.window or segments or self.keys % block)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """What both passes read. `offset` is the place of the first query among the keys.

    Shapes: q [B, H, L, C], k [B, K, T, C], v [B, K, T, V] with K dividing H; slopes and sinks float32 [H] or
    None; segments int32 [B, L] and [B, T], or None: a query sees keys of its own segment, segment 0 is seen
    by nobody; `offset` int32 [1] or [B], `known` its value where that is an int known before any data.
    """

    q: Array
    k: Array
    v: Array
    offset: Array
    slopes: Array | None = None
    sinks: Array | None = None
    q_segments: Array | None = None
    k_segments: Array | None = None
    known: int | None = field(default=None, metadata={"static": True})

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and keys."""
        return self.q.shape[2], self.k.shape[2]

    def padded(self, queries: int, keys: int) -> Operands:
        """The same with lengths padded to so many: zeros, and segment 0."""
        more_q, more_k = queries - self.q.shape[2], keys - self.k.shape[2]

        def rows(x: Array, more: int) -> Array:
            return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) if more else x

        return replace(
            self,
            q=rows(self.q, more_q),
            k=rows(self.k, more_k),
            v=rows(self.v, more_k),
            q_segments=None if self.q_segments is None else _filled(self.q_segments, queries),
            k_segments=None if self.k_segments is None else _filled(self.k_segments, keys),
        )


def _filled(segments: Array, length: int) -> Array:
    """Segments [B, length], with segment 0 where there is no token."""
    more = length - segments.shape[1]
    return jnp.pad(segments, ((0, 0), (0, more))) if more else segments


@dataclass(frozen=True)
class Bounds:
    """For each block of queries: the first block of keys it sees, the run without a masked entry, the end.

    Shapes: `array` int32 [B or 1, 4, queries' blocks]: begin, begin and end of the whole blocks, end; where
    no block is whole, both of these are the end, and where none is seen all are 0. `static` holds the same
    where it is known before any data, and bounds that hold for any data otherwise.
    """

    array: Array
    static: np.ndarray

    @property
    def visited(self) -> int:
        """Pairs of blocks that are looked at, as far as that is known before any data."""
        return int(np.sum(self.static[3] - self.static[0]))

    def within(self, begin: int, end: int) -> int:
        """The same among key blocks [begin, end)."""
        return int(np.sum(np.clip(self.static[3], begin, end) - np.clip(self.static[0], begin, end)))

    def fetches(self, count: int, chunks: int, times: int) -> int:
        """Fetches of chunks of `count` key blocks by `times` passes over the blocks of queries in turn.

        A block of queries looks at all chunks, each in place of one that it does not see the nearest it
        does; what is there already is not fetched again.
        """
        first, last = self.static[0] // count, (self.static[3] - 1).clip(min=0) // count
        wanted = np.clip(np.arange(chunks), first[:, None], np.maximum(first, last)[:, None]).ravel()
        within, between = int(np.sum(wanted[1:] != wanted[:-1])), int(wanted[0] != wanted[-1])
        return 1 + times * within + (times - 1) * between

    def queries_of(self, begin: int, end: int) -> tuple[int, int]:
        """The blocks of queries, from the first to after the last, that may see key blocks [begin, end)."""
        begins, ends = self.static[0], self.static[3]
        seen = np.flatnonzero((begins < end) & (ends > begin) & (begins < ends))
        return (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)


def bounds(problem: Problem, blocks: tuple[int, int], x: Operands) -> Bounds:
    """Bounds for operands in blocks of so many queries and keys; the last may be filled up.

    With segments a block is seen where the ranges of its segments and of the queries' meet: exact for
    documents in a row, whatever their ids, and never too little for any others.
    """
    bq, bk = blocks
    nq, nk = -(-x.q.shape[2] // bq), -(-x.k.shape[2] // bk)
    if x.known is None:
        static = _any_block(nq, nk)
        traced = _by_place(problem, bq, bk, nq, nk, x.offset, jnp)
    else:
        static = _by_place(problem, bq, bk, nq, nk, np.asarray([x.known], np.int32), np)[0]
        traced = jnp.asarray(static[None])
    if x.q_segments is None or x.k_segments is None:
        return Bounds(traced, static)
    q_segments, k_segments = _filled(x.q_segments, nq * bq), _filled(x.k_segments, nk * bk)
    return Bounds(_by_segment(traced, bq, bk, q_segments, k_segments), static)


def visited_pairs(problem: Problem, blocks: tuple[int, int]) -> int:
    """Pairs of a query and a key in all blocks that are looked at, whole blocks counted: row 0 is place 0."""
    (bq, bk), nothing = blocks, np.zeros(1, np.int32)
    found = _by_place(problem, bq, bk, -(-problem.queries // bq), -(-problem.keys // bk), nothing, np)[0]
    return int(np.sum(found[3] - found[0])) * bq * bk


def _any_block(nq: int, nk: int) -> np.ndarray:
    """Any block may be seen."""
    return np.stack([np.zeros(nq), np.full(nq, nk), np.full(nq, nk), np.full(nq, nk)]).astype(np.int32)


def _by_place(problem: Problem, bq: int, bk: int, nq: int, nk: int, offset: Any, n: Any) -> Any:
    """[len(offset), 4, nq], with `n` numpy or jax's."""
    first = n.arange(nq, dtype=n.int32)[None, :] * bq + n.asarray(offset, n.int32)[:, None]
    rows = n.minimum(bq, problem.queries - n.arange(nq, dtype=n.int32) * bq)[None, :]
    last = first + n.maximum(rows, 1) - 1
    end = n.full_like(first, -(-problem.keys // bk))
    begin = n.zeros_like(first)
    # Whole blocks: from the first that begins late enough to before the first that ends too late.
    whole_end = n.full_like(first, problem.keys // bk)
    whole_begin = n.zeros_like(first)
    if problem.causal:
        end = n.minimum(end, last // bk + 1)
        whole_end = n.minimum(whole_end, (first + 1) // bk)
    if problem.window:
        begin = n.maximum(begin, (first - problem.window + 1) // bk)
        whole_begin = n.maximum(whole_begin, -((problem.window - 1 - last) // bk))
        if not problem.causal:
            end = n.minimum(end, (last + problem.window - 1) // bk + 1)
            whole_end = n.minimum(whole_end, (first + problem.window) // bk)
    end = n.clip(end, 0, nk)
    # Where nothing is seen all are 0: a place behind the last block would be fetched from.
    end = n.where(begin < end, end, 0)
    begin = n.clip(begin, 0, end)
    whole_begin = n.clip(whole_begin, begin, end)
    whole_end = n.clip(whole_end, begin, end)
    none = whole_begin >= whole_end
    whole_begin, whole_end = n.where(none, end, whole_begin), n.where(none, end, whole_end)
    return n.stack([begin, whole_begin, whole_end, end], axis=1).astype(n.int32)


def _by_segment(place: Array, bq: int, bk: int, q_segments: Array, k_segments: Array) -> Array:
    B = q_segments.shape[0]
    nq, nk = q_segments.shape[1] // bq, k_segments.shape[1] // bk
    q, k = q_segments.reshape(B, nq, 1, bq), k_segments.reshape(B, 1, nk, bk)
    huge = jnp.iinfo(jnp.int32).max
    # Segment 0 is seen by nobody: it takes no part in the range, and keeps a block from being whole.
    q_low = jnp.min(jnp.where(q > 0, q, huge), -1)
    k_low = jnp.min(jnp.where(k > 0, k, huge), -1)
    q_high, k_high = jnp.max(q, -1), jnp.max(k, -1)
    meet = (q_low <= k_high) & (k_low <= q_high)
    one = (jnp.min(q, -1) == q_high) & (jnp.min(k, -1) == k_high) & (q_high == k_high) & (k_high > 0)
    begin, whole_begin, whole_end, end = (place[:, n, :, None] for n in range(4))
    j = jnp.arange(nk, dtype=jnp.int32)[None, None]
    seen = meet & (j >= begin) & (j < end)
    first = jnp.min(jnp.where(seen, j, nk), -1)
    last = jnp.max(jnp.where(seen, j + 1, 0), -1)
    first = jnp.minimum(first, last)
    whole = one & (j >= whole_begin) & (j < whole_end)
    whole_first = jnp.min(jnp.where(whole, j, nk), -1)
    # The first run of whole blocks alone.
    after = jnp.min(jnp.where(~whole & (j > whole_first[..., None]), j, nk), -1)
    none = whole_first >= last
    return jnp.stack(
        [first, jnp.where(none, last, whole_first), jnp.where(none, last, after), last], axis=1
    ).astype(jnp.int32)

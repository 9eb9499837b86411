"""Attention of one query a sequence over a long cache, as a Pallas kernel for TPUs.

Such a step reads each key and value once and does little with them: it takes as long as the cache takes to
come in. The grid is therefore a list of the blocks that hold something to see, of all sequences one after the
other, made before the kernel runs: a block behind a sequence's end or before its window is no step at all,
and a batch of short sequences in a long cache costs what the short ones cost. One step takes a block of slots
of several key heads at once, large enough that its transfer hides what a step costs.

The cache is read where it lies, for a copy would cost three times the reading. The layer is chosen by the
index of the transfer, so that nothing is sliced out. A last block that reaches over the cache's end is
masked, values too. And where a head's dim is no multiple of the lanes, the kernel takes slots across instead
of down ([C, T]), as XLA lays such arrays out of itself, to pad nothing: the turn is then one in name alone.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mosaicjax.errors import InputError
from mosaicjax.hardware import find_chip

LOG2E = math.log2(math.e)
MASKED = -3e38
"""A score that no softmax notices; `LOWEST`, where every maximum begins, is well above it."""
LOWEST = -1e38
LANES = 128
MIB = 2**20

MOST_BYTES = 2 * MIB
"""Of a step's keys and values. Each is held twice, to fetch the next ahead."""
ENOUGH_BYTES = MIB
"""From here on a step's transfer hides what a step costs, some 0.35 us."""
KEYS, FEWEST_KEYS, MOST_KEYS = 512, 128, 2_048
MOST_STEPS = 65_536
"""Steps are listed in scalar memory, four bytes each."""
TWO_CORES = ("v4", "v5p")
"""Chips of two cores, which share a grid by its first axis."""


@dataclass(frozen=True)
class Tiling:
    """What a step takes: so many key heads (a divisor of them all) and so many slots of each.

    Slots are a multiple of 128, or all there are.
    """

    heads: int
    keys: int


@dataclass(frozen=True)
class Call:
    """What the kernel is compiled for, beside shapes of its operands; `window` and `softcap` 0 are none."""

    scale: float
    window: int
    softcap: float
    tiling: Tiling
    interpret: bool = False


@dataclass(frozen=True)
class Operands:
    """What is read. Slot number t is position t, and each query stands at its sequence's length less 1.

    Shapes: q [B, H, C], k [N, B, K, T, C], v [N, B, K, T, V] with K dividing H; lengths int32 [B]; `layer`
    int32 [1]; slopes and sinks float32 [H] or None.
    """

    q: Array
    k: Array
    v: Array
    lengths: Array
    layer: Array
    slopes: Array | None = None
    sinks: Array | None = None


def best_tiling(chip: str, itemsize: int, shape: tuple[int, int, int, int], window: int) -> Tiling:
    """Key heads and slots of a step: as many heads as fit with `KEYS` slots, more slots where heads are few.

    What a last block holds beyond the sequence's end is read for nothing, so slots grow last, and a window
    keeps them small. A chip with two cores gets two groups of heads or more.

    Shapes: `shape` is K, T, C, V. `chip` is a jax device kind.
    """
    K, T, C, V = shape
    row = itemsize * (_up(C, 16) + _up(V, 16))
    keys = KEYS
    if window:
        keys = max(FEWEST_KEYS, min(KEYS, _power_of_two(window) // 2))
    known = find_chip(chip)
    groups = 2 if known is not None and known.name in TWO_CORES and K > 1 else 1
    fitting = [n for n in range(1, K // groups + 1) if K % n == 0 and n * keys * row <= MOST_BYTES]
    heads = max(fitting, default=1)
    while heads * keys * row > MOST_BYTES and keys > FEWEST_KEYS:
        keys //= 2
    while not window and keys < MOST_KEYS and heads * keys * row < ENOUGH_BYTES:
        keys *= 2
    return Tiling(heads, min(keys, T))


def across(dim: int) -> bool:
    """Whether slots lie across the lanes, for heads of this dim."""
    return dim % LANES != 0


def _up(size: int, whole: int) -> int:
    return -(-size // whole) * whole


def _power_of_two(size: int) -> int:
    """The largest that is no larger."""
    return 1 << (size.bit_length() - 1)


@dataclass(frozen=True)
class _Seen:
    """What one sequence's query sees: slots from `begin` to before `end`, in blocks `first` to `last`.

    Of ints, of scalars in the kernel or of arrays outside.
    """

    begin: Any
    end: Any
    first: Any
    last: Any


def _seen(call: Call, slots: int, length: Any) -> _Seen:
    end = jnp.minimum(length, slots)
    begin = jnp.maximum(length - call.window, 0) if call.window else jnp.zeros_like(length)
    keys = call.tiling.keys
    # Shifts or truncating division: jax lowers floor division of integers for TPUs on TPUs alone.
    last = jax.lax.div(jnp.maximum(end - 1, 0), jnp.full_like(end, keys))
    first = jnp.minimum(jax.lax.div(begin, jnp.full_like(begin, keys)), last)
    return _Seen(begin, end, first, last)


def _steps(call: Call, slots: int, lengths_B: Array) -> tuple[Array, Array, Array]:
    """Whose block each step takes, int32 [steps]; the step where each begins [B]; how many there are, [].

    A sequence that sees nothing has no step.
    """
    seen = _seen(call, slots, lengths_B)
    count_B = jnp.where(seen.end > seen.begin, seen.last - seen.first + 1, 0)
    end_B = jnp.cumsum(count_B, dtype=jnp.int32)
    most = lengths_B.shape[0] * _most_blocks(call, slots)
    steps = jnp.arange(most, dtype=jnp.int32)
    row = jnp.sum((end_B[None, :] <= steps[:, None]).astype(jnp.int32), axis=1, dtype=jnp.int32)
    return jnp.minimum(row, lengths_B.shape[0] - 1), end_B - count_B, end_B[-1]


def _most_blocks(call: Call, slots: int) -> int:
    """Blocks that one query can see."""
    keys = call.tiling.keys
    blocks = pl.cdiv(slots, keys)
    return min(blocks, (call.window - 2) // keys + 2) if call.window else blocks


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """A product of each head's matrices over the named dims, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _kernel(call: Call, slots: int, has: tuple[bool, bool], *refs: Any) -> None:
    has_slopes, has_sinks = has
    rows_ref, starts_ref, lengths_ref, _, q_ref, k_ref, v_ref, *rest = refs
    slopes_ref, *rest = rest if has_slopes else [None, *rest]
    sinks_ref, *rest = rest if has_sinks else [None, *rest]
    o_ref, m_ref, l_ref, acc_ref = rest
    step, keys = pl.program_id(1), call.tiling.keys
    k_across, v_across = across(q_ref.shape[3]), across(o_ref.shape[3])
    b = rows_ref[step]
    length = lengths_ref[b]
    seen = _seen(call, slots, length)
    block = seen.first + step - starts_ref[b]
    base = block * keys

    @pl.when(block == seen.first)
    def begin() -> None:
        m_ref[...] = jnp.full_like(m_ref, LOWEST)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def turn(masked: bool) -> None:
        # Scores are base 2, [key heads, their query heads, slots].
        s = _dot(q_ref[0], k_ref[0, 0], (2, 1 if k_across else 2))
        if call.softcap:
            x = jnp.tanh(s * (call.scale / call.softcap)) * (call.softcap * LOG2E)
        else:
            x = s * (call.scale * LOG2E)
        slot = jax.lax.broadcasted_iota(jnp.int32, x.shape, 2)
        if has_slopes:
            x = x + slopes_ref[...] * (slot + (base - (length - 1))).astype(jnp.float32)
        v = v_ref[0, 0]
        if masked:
            x = jnp.where((slot >= seen.begin - base) & (slot < seen.end - base), x, MASKED)
            slot_of_v = jax.lax.broadcasted_iota(jnp.int32, v.shape, 2 if v_across else 1)
            v = jnp.where(slot_of_v < seen.end - base, v, jnp.zeros_like(v))
        before = m_ref[...]
        top = jnp.maximum(before, jnp.max(x, axis=2, keepdims=True))
        shrink = jnp.exp2(before - top)
        p = jnp.exp2(x - top[:, :, :1])
        m_ref[...] = top
        l_ref[...] = l_ref[...] * shrink + jnp.sum(p, axis=2, keepdims=True)
        acc_ref[...] = acc_ref[...] * shrink[:, :, :1] + _dot(p.astype(v.dtype), v, (2, 2 if v_across else 1))

    whole = (base >= seen.begin) & (base + keys <= seen.end)
    pl.when(whole)(functools.partial(turn, False))
    pl.when(jnp.logical_not(whole))(functools.partial(turn, True))

    @pl.when(block == seen.last)
    def finish() -> None:
        total, acc = l_ref[:, :, :1], acc_ref[...]
        if has_sinks:
            m, sink = m_ref[:, :, :1], sinks_ref[...]
            top = jnp.maximum(m, sink)
            shrink = jnp.exp2(m - top)
            acc, total = acc * shrink, total * shrink + jnp.exp2(sink - top)
        o_ref[0] = (acc * jnp.where(total > 0, 1.0 / total, 0.0)).astype(o_ref.dtype)


def cost(call: Call, x: Operands) -> pl.CostEstimate:
    """What the kernel does where every sequence fills the cache: the most that it can.

    Both products of each head with the slots it sees, an exponential for each (and a tanh with softcap) and
    one for each block's maximum; the bytes of the blocks that are read, of queries and of the result.
    """
    (B, H, C), (_, _, K, T, V) = x.q.shape, x.v.shape
    seen = min(T, call.window) if call.window else T
    blocks = (T - 1) // call.tiling.keys - (T - seen) // call.tiling.keys + 1
    read = min(T, blocks * call.tiling.keys, T - (T - seen) // call.tiling.keys * call.tiling.keys)
    size = x.q.dtype.itemsize
    entries = B * H * seen
    return pl.CostEstimate(
        flops=2 * entries * (C + V),
        transcendentals=entries * (2 if call.softcap else 1)
        + B * H * (blocks + (2 if x.sinks is not None else 0)),
        bytes_accessed=size * (B * K * read + B * H) * (C + V),
    )


def decode(call: Call, x: Operands) -> Array:
    """The result [B, H, V] in q's dtype, 0 where nothing is seen.

    Raises:
        InputError: more blocks than scalar memory can list.
    """
    (B, H, C), (_, _, K, T, V) = x.q.shape, x.v.shape
    G, tiling = H // K, call.tiling
    most = B * _most_blocks(call, T)
    if most > MOST_STEPS:
        raise InputError(
            "decode attention: sequences x blocks of the cache",
            expected=f"at most {MOST_STEPS:,}",
            got=f"{B} x {most // B}",
            fix="fewer sequences at once",
        )
    rows, starts_B, count = _steps(call, T, x.lengths)
    group = _up(G, 8 * 4 // x.q.dtype.itemsize)
    q_BKGC = jnp.pad(x.q.reshape(B, K, G, C), ((0, 0), (0, 0), (0, group - G), (0, 0)))

    def each(values_H: Array) -> Array:
        """Numbers of query heads in base 2, [K, group, 1]."""
        values_KG = (values_H.astype(jnp.float32) * LOG2E).reshape(K, G)
        return jnp.pad(values_KG, ((0, 0), (0, group - G)))[:, :, None]

    def block(s: Array, rows: Any, starts: Any, lengths: Any) -> Array:
        row = rows[s]
        return _seen(call, T, lengths[row]).first + s - starts[row]

    def of_row(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, tiling.heads, group, width), lambda h, s, rows, *_: (rows[s], h, 0, 0))

    def of_cache(width: int) -> pl.BlockSpec:
        def place(h: Array, s: Array, rows: Any, starts: Any, lengths: Any, layer: Any) -> tuple[Any, ...]:
            at = block(s, rows, starts, lengths)
            return layer[0], rows[s], h, *((0, at) if across(width) else (at, 0))

        size = (width, tiling.keys) if across(width) else (tiling.keys, width)
        return pl.BlockSpec((1, 1, tiling.heads, *size), place)

    def lying(cache: Array) -> Array:
        return cache.swapaxes(3, 4) if across(cache.shape[4]) else cache

    numbers = [each(values) for values in (x.slopes, x.sinks) if values is not None]
    out_BKGV = pl.pallas_call(
        functools.partial(_kernel, call, T, (x.slopes is not None, x.sinks is not None)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            # At least one step, of a sequence that sees nothing, where none sees anything.
            grid=(K // tiling.heads, jnp.maximum(count, 1)),
            in_specs=[
                of_row(C),
                of_cache(C),
                of_cache(V),
                *[pl.BlockSpec((tiling.heads, group, 1), lambda h, *_: (h, 0, 0)) for _ in numbers],
            ],
            out_specs=of_row(V),
            scratch_shapes=[
                pltpu.VMEM((tiling.heads, group, LANES), jnp.float32),
                pltpu.VMEM((tiling.heads, group, LANES), jnp.float32),
                pltpu.VMEM((tiling.heads, group, V), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, group, V), x.q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=cost(call, x),
        interpret=call.interpret,
        name="decode_attention",
    )(rows, starts_B, x.lengths, x.layer, q_BKGC, lying(x.k), lying(x.v), *numbers)
    seen = _seen(call, T, x.lengths)
    some_B = seen.end > seen.begin
    # Nobody wrote the rows without a step.
    out_BKGV = jnp.where(some_B[:, None, None, None], out_BKGV[:, :, :G], jnp.zeros((), x.q.dtype))
    return out_BKGV.reshape(B, H, V)

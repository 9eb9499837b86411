"""What the hardware check times, in loops on the device, and what is predicted for it."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.kernels.hardware_cases import standard_normal
from benchmarks.machine import spread
from mosaicjax.hardware import Chip
from mosaicjax.kernels import attention_tiles, flash_tpu
from mosaicjax.kernels.attention_blocks import Operands, Problem
from mosaicjax.kernels.decode_attention import decode_attention

MATMUL = 8_192
HBM_BYTES = 2**30
"""More than any chip's VMEM, where XLA would keep a smaller array between calls."""
SAMPLE_SECONDS = 0.2
MOST_CALLS = 20_000
Step = Callable[[Array, Any], Array]


@dataclass(frozen=True)
class Loop:
    """A program to time: each call takes what the one before gave, and what stays the same.

    Units: `predicted_us` microseconds a call, None where nobody predicts it.
    """

    name: str
    step: Step
    draw: Callable[[np.random.Generator], tuple[Array, Any]]
    predicted_us: float | None


def repeated(step: Step) -> Callable[[Array, Array, Any], Array]:
    """So many pairs of calls. A turn has two, as XLA would copy the result of one into the loop's state."""

    def run(pairs: Array, state: Array, fixed: Any) -> Array:
        return jax.lax.fori_loop(0, pairs, lambda _, state: step(step(state, fixed), fixed), state)

    return run


def attention_loop(which: str, length: int, head_dim: int, chip: Chip | None, kind: str) -> Loop:
    """The kernel of a pass with the table's blocks: 8 heads, causal, batch 1, bfloat16."""
    both = attention_tiles.tilings(kind, jnp.bfloat16, head_dim, head_dim, length, 0)
    problem = Problem(True, 0, head_dim**-0.5, 0.0, length, length)
    forward, backward = (flash_tpu.Call(problem, tiling) for tiling in both)

    def draw(rng: np.random.Generator) -> tuple[Array, Any]:
        q, k, v, grad = (standard_normal(rng, "bfloat16", 1, 8, length, head_dim) for _ in range(4))
        x = Operands(q, k, v, jnp.zeros(1, jnp.int32), known=0)
        if which == "forward":
            return q, (x,)
        out, lse = jax.jit(partial(flash_tpu.forward, forward))(x)
        return q, (x, grad, lse, jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1))

    def step(q: Array, fixed: Any) -> Array:
        x = replace(fixed[0], q=q)
        if which == "forward":
            return flash_tpu.forward(forward, x)[0]
        return flash_tpu.backward(backward, x, *fixed[1:])[0]

    entries = {(e.chip, e.dtype, e.head_dim, e.length, e.windowed): e for e in attention_tiles.table()}
    entry = entries.get((chip.name if chip else "", "bfloat16", head_dim, length, False))
    predicted = None if entry is None else entry.microseconds[("forward", "backward").index(which)]
    return Loop(f"time {which} C={head_dim} L={length}", step, draw, predicted)


def decode_loop(head_dim: int, held: int, chip: Chip | None, kind: str) -> Loop:
    """16 sequences of so many tokens, 32 heads over 8, in a cache of 8,192 slots, bfloat16."""
    B, H, K, T = 16, 32, 8, 8_192

    def draw(rng: np.random.Generator) -> tuple[Array, Any]:
        q = standard_normal(rng, "bfloat16", B, H, head_dim)
        k, v = (standard_normal(rng, "bfloat16", B, K, T, head_dim) for _ in range(2))
        return q, {"k_BKTC": k, "v_BKTV": v, "lengths_B": jnp.full(B, held, jnp.int32)}

    def step(q: Array, fixed: Any) -> Array:
        return decode_attention(q, **fixed, implementation="pallas_tpu", chip=kind)

    predicted = moving_us(2 * 2 * B * K * held * head_dim, chip)
    return Loop(f"time decode C={head_dim} T={held}", step, draw, predicted)


def matmul_loop(chip: Chip | None) -> Loop:
    """XLA's own product, at the published peak."""

    def draw(rng: np.random.Generator) -> tuple[Array, Any]:
        x, w = (standard_normal(rng, "bfloat16", MATMUL, MATMUL) for _ in range(2))
        return x, w * jnp.asarray(MATMUL**-0.5, jnp.bfloat16)

    peak = None if chip is None else chip.peak("bfloat16")
    predicted = None if chip is None or peak is None else 2e6 * MATMUL**3 / peak * chip.devices_per_chip
    return Loop(f"time matmul {MATMUL}", lambda x, w: x @ w, draw, predicted)


def hbm_loop(chip: Chip | None) -> Loop:
    """XLA's own pass over an array, read and written at the published bandwidth."""

    def draw(rng: np.random.Generator) -> tuple[Array, Any]:
        return jnp.zeros((HBM_BYTES // 4 // MATMUL, MATMUL), jnp.float32), jnp.asarray(1.0, jnp.float32)

    # The barrier keeps two calls from becoming one pass.
    return Loop(
        "time hbm", lambda x, y: jax.lax.optimization_barrier(x + y), draw, moving_us(2 * HBM_BYTES, chip)
    )


def moving_us(hbm_bytes: float, chip: Chip | None) -> float | None:
    """Microseconds that a device takes to move so many bytes at the published bandwidth."""
    if chip is None or chip.hbm_bandwidth is None:
        return None
    return 1e6 * hbm_bytes / chip.hbm_bandwidth.value * chip.devices_per_chip


def loops(chip: Chip | None, kind: str) -> list[Loop]:
    """All that is timed on a chip of this device kind."""
    attention = [
        attention_loop(which, length, head_dim, chip, kind)
        for head_dim in (64, 128, 256)
        for length in (2_048, 4_096, 8_192, 32_768)
        for which in ("forward", "backward")
    ]
    decode = [decode_loop(dim, held, chip, kind) for dim in (64, 128) for held in (8_192, 2_048)]
    return [matmul_loop(chip), hbm_loop(chip), *attention, *decode]


@dataclass(frozen=True)
class Sample:
    """Seconds that a short and a long loop of so many calls took, one after the other."""

    few: int
    few_seconds: float
    many: int
    many_seconds: float

    @property
    def us_per_call(self) -> float:
        """Microseconds of a call, without what every loop costs however short it is."""
        return 1e6 * (self.many_seconds - self.few_seconds) / (self.many - self.few)


def call_counts(seconds_per_call: float) -> tuple[int, int]:
    """Calls of the short and of the long loop, even, so that the long one takes some `SAMPLE_SECONDS`."""
    many = min(max(int(SAMPLE_SECONDS / max(seconds_per_call, 1e-9)), 8), MOST_CALLS) // 8 * 8
    return many // 4, many


def timed(row: dict[str, Any], samples: Sequence[Sample], predicted_us: float | None) -> dict[str, Any]:
    """The row of a timing: measured beside predicted."""
    measured = spread([sample.us_per_call for sample in samples])
    ratio = None if predicted_us is None else measured["median"] / predicted_us
    calls = [samples[0].few, samples[0].many]
    return row | {"measured_us": measured, "ratio": ratio, "calls": calls, "rounds": len(samples)}


def measure(loop: Loop, seed: int, rounds: int) -> dict[str, Any]:
    """Compile a loop, try how long it takes, and time it."""
    state, fixed = loop.draw(np.random.default_rng([seed, zlib.crc32(loop.name.encode())]))
    calls_of = jax.jit(repeated(loop.step)).lower(jnp.asarray(1, jnp.int32), state, fixed).compile()

    def seconds(calls: int) -> float:
        pairs = jax.block_until_ready(jnp.asarray(calls // 2, jnp.int32))
        began = time.perf_counter()
        jax.block_until_ready(calls_of(pairs, state, fixed))
        return time.perf_counter() - began

    seconds(2)
    few, many = call_counts(seconds(8) / 8)
    samples = [Sample(few, seconds(few), many, seconds(many)) for _ in range(rounds)]
    last = calls_of(jnp.asarray(few // 2, jnp.int32), state, fixed)
    row = {"name": loop.name, "passed": bool(jnp.all(jnp.isfinite(last))), "predicted_us": loop.predicted_us}
    return timed(row, samples, loop.predicted_us)

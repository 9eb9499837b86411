"""Pallas kernels on a real TPU: results and gradients against the reference, times beside predictions.

    python benchmarks/kernels/hardware_check.py               # on a TPU; writes hardware_check.json
    python benchmarks/kernels/hardware_check.py --only "attention bfloat16 C=128" --only "time decode"
    JAX_PLATFORMS=cpu python benchmarks/kernels/hardware_check.py --interpret    # anywhere; times nothing

Predicted are, for attention, the microseconds of `attention_tiles.json` (the compiler's schedule, forward and
backward kernel alone); for decoding, the bytes of the cache that is held over HBM bandwidth. Two programs of
XLA's own stand beside them, a matmul against the published peak and an addition against HBM bandwidth: where
these are slow too, it is the clock and not a kernel. A time is that of a call in a loop of calls on the
device, each on what the one before gave: the difference of a long and a short loop over that of their calls.

Exit code 0: all passed; 1: a case failed; 2: there is no TPU, or an option is unusable.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402 after the path, for a call as a script
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import Array  # noqa: E402
from jax._src.pallas.mosaic.error_handling import MosaicError  # noqa: E402 public nowhere
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

from benchmarks.kernels.bundles import one_line  # noqa: E402
from benchmarks.machine import commit, spread  # noqa: E402
from mosaicjax.errors import InputError  # noqa: E402
from mosaicjax.hardware import Chip, find_chip  # noqa: E402
from mosaicjax.kernels import attention_tiles, decode_tpu, flash_tpu  # noqa: E402
from mosaicjax.kernels.attention_blocks import Operands, Problem  # noqa: E402
from mosaicjax.kernels.decode_attention import decode_attention  # noqa: E402
from mosaicjax.kernels.flash_attention import flash_attention  # noqa: E402
from mosaicjax.kernels.grouped import Grouped, grouped  # noqa: E402

PACKAGES = ("jax", "jaxlib", "libtpu", "numpy")
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}
"""Of both errors in `Agreement`. A bfloat16 has 8 bits: 2e-2 is 5 of its last places, for probabilities,
results and gradients of scores are each rounded to it. float32 products are of full precision."""
REFUSALS = (jax.errors.JaxRuntimeError, MosaicError, pltpu.LoweringException, NotImplementedError, ValueError)
"""What a compiler that refuses raises; an `InputError` is a `ValueError`."""
STRETCHES = 8
SMALL_LENGTH = 300
SMALL_BLOCKS = (flash_tpu.Tiling(128, 128, 128), flash_tpu.Tiling(128, 128, 128))
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Agreement:
    """How far an array is from the reference's.

    `scaled` is the largest difference over the reference's largest magnitude. `local` is the norm of the
    differences over the reference's norm, in the worst of `STRETCHES` along the longest axis: late queries of
    a long row have results so small that `scaled` would not notice. Both are inf where an entry is not finite
    and should be, or the other way round.
    """

    name: str
    largest: float
    scaled: float
    local: float

    @property
    def error(self) -> float:
        """What the tolerance is about."""
        return max(self.scaled, self.local)

    def dump(self) -> dict[str, Any]:
        """For JSON, which knows no infinity: null."""
        return {name: x if x != math.inf else None for name, x in asdict(self).items()}


def agreement(name: str, got: np.ndarray, expected: np.ndarray) -> Agreement:
    """Of arrays of any float type; infinities must stand in the same places.

    Raises:
        ValueError: the shapes differ.
    """
    if got.shape != expected.shape:
        raise ValueError(f"{name}: shape {got.shape} where the reference has {expected.shape}")
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    same = got == expected
    finite = np.isfinite(expected)
    largest = float(np.max(np.abs(expected), where=finite, initial=0.0))
    if not np.all(same | (finite & np.isfinite(got))):
        return Agreement(name, largest, math.inf, math.inf)
    off = np.where(same, 0.0, np.abs(np.where(same, 0.0, got) - np.where(same, 0.0, expected)))
    norms, offs = (_norms(x) for x in (np.where(finite, expected, 0.0), off))
    # A stretch of nothing but padding has no norm to compare with.
    floor = max(1e-3 * float(np.max(norms)), float(np.finfo(np.float64).tiny))
    local = float(np.max(offs / np.maximum(norms, floor)))
    return Agreement(
        name, largest, float(np.max(off)) / max(largest, float(np.finfo(np.float64).tiny)), local
    )


def _norms(x: np.ndarray) -> np.ndarray:
    axis = int(np.argmax(x.shape)) if x.ndim > 1 else 0
    parts = np.array_split(x, min(STRETCHES, x.shape[axis]) if x.ndim > 1 else 1, axis=axis)
    return np.asarray([np.linalg.norm(part) for part in parts])


@dataclass(frozen=True)
class Way:
    """How kernels run: step by step, or compiled for a chip ("": the device at hand)."""

    interpreted: bool = False
    chip: str = ""

    @property
    def implementation(self) -> str:
        """As attention calls it."""
        return "pallas_interpreted" if self.interpreted else "pallas_tpu"


@dataclass(frozen=True)
class Attention:
    """Attention with all its gradients; names as in `flash_attention`.

    The reference goes by so many `rows` of queries at a time, 0 for all: its scores are all held.
    """

    label: str
    dtype: str
    head_dim: int
    queries: int = 1_024
    keys: int = 1_024
    value_dim: int = 0
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    causal: bool = True
    scale: float | None = None
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    segments: bool = False
    sinks: bool = False
    q_offset: int = 0
    rows: int = 0

    @property
    def name(self) -> str:
        """For `--only`."""
        return f"attention {self.dtype} C={self.head_dim} {self.label}"

    def small(self) -> Attention:
        """The same features at lengths that the interpreter can do."""
        halve = partial(_halved, times=_halvings(max(self.queries, self.keys)))
        names = ("queries", "keys", "window", "q_offset", "rows")
        small = replace(self, **{name: halve(getattr(self, name)) for name in names})
        return replace(small, q_offset=min(small.q_offset, max(small.keys - small.queries, 0)))

    def draw(self, rng: np.random.Generator) -> Arrays:
        """Operands, and gradients of the result and of the logsumexp."""
        B, L, T, H, K = self.batch, self.queries, self.keys, self.heads, self.kv_heads
        C, V = self.head_dim, self.value_dim or self.head_dim
        normal = partial(_normal, rng, self.dtype)
        numbers = {"q": normal(B, L, H, C), "k": normal(B, T, K, C), "v": normal(B, T, K, V)}
        if self.alibi:
            numbers["alibi_slopes"] = jnp.asarray(0.5 ** rng.uniform(1, 8, H), jnp.float32)
        if self.sinks:
            numbers["sinks"] = jnp.asarray(rng.standard_normal(H), jnp.float32)
        segments = {}
        if self.segments:
            kv = _documents(rng, B, T)
            segments = {"q_segments": kv[:, self.q_offset : self.q_offset + L], "kv_segments": kv}
        lse_grad = jnp.asarray(rng.standard_normal((B, L, H)), jnp.float32)
        given = {"grad": normal(B, L, H, V), "lse_grad": lse_grad}
        return {"numbers": numbers, "segments": segments} | given

    def kernel(self, way: Way, x: Arrays) -> Arrays:
        """What the kernel makes of it, by name."""
        tiling = SMALL_BLOCKS if way.interpreted else None
        return self._results(
            x, self.q_offset, implementation=way.implementation, chip=way.chip, tiling=tiling
        )

    def reference(self, x: Arrays) -> Arrays:
        """What it should be."""
        rows = self.rows or self.queries
        shared = {f"d{name}": jnp.zeros_like(each) for name, each in x["numbers"].items() if name != "q"}

        def part(carried: Arrays, first: Array) -> tuple[Arrays, Arrays]:
            def cut(each: Array) -> Array:
                return jax.lax.dynamic_slice_in_dim(each, first, rows, axis=1)

            one = x | {"grad": cut(x["grad"]), "lse_grad": cut(x["lse_grad"])}
            one["numbers"] = x["numbers"] | {"q": cut(x["numbers"]["q"])}
            if self.segments:
                one["segments"] = x["segments"] | {"q_segments": cut(x["segments"]["q_segments"])}
            found = self._results(one, self.q_offset + first, implementation="reference")
            return {name: carried[name] + found.pop(name) for name in carried}, found

        shared, by_row = jax.lax.scan(part, shared, jnp.arange(0, self.queries, rows, dtype=jnp.int32))
        joined = {name: jnp.concatenate(list(each), axis=1) for name, each in by_row.items()}
        return joined | shared

    def _results(self, x: Arrays, q_offset: Any, **how: Any) -> Arrays:
        def attend(numbers: Arrays) -> Any:
            others = {name: each for name, each in numbers.items() if name not in "qkv"}
            return flash_attention(
                *(numbers[name] for name in "qkv"),
                **others,
                **x["segments"],
                **how,
                causal=self.causal,
                scale=self.scale,
                window=self.window,
                softcap=self.softcap,
                q_offset=q_offset,
                return_logsumexp=True,
            )

        (out, lse), backward = jax.vjp(attend, x["numbers"])
        (grads,) = backward((x["grad"], x["lse_grad"]))
        return {"out": out, "lse": lse} | {f"d{name}": each for name, each in grads.items()}


@dataclass(frozen=True)
class Decode:
    """One query a sequence over a cache, at lengths from 0 to all slots; names as in `decode_attention`."""

    label: str
    dtype: str
    head_dim: int
    value_dim: int = 0
    slots: int = 1_000
    heads: int = 8
    kv_heads: int = 2
    layers: int = 0
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False

    @property
    def name(self) -> str:
        """For `--only`."""
        return f"decode {self.dtype} C={self.head_dim} {self.label}"

    def small(self) -> Decode:
        """The same features over a cache that the interpreter can do."""
        halve = partial(_halved, times=_halvings(self.slots))
        return replace(self, slots=halve(self.slots), window=halve(self.window))

    def draw(self, rng: np.random.Generator) -> Arrays:
        """Operands; the layer is the last but one."""
        T = self.slots
        lengths = jnp.asarray([0, 1, 127, 128, 129, T // 2, T - 1, T], jnp.int32)
        B, H, K, C, V = (
            len(lengths),
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.value_dim or self.head_dim,
        )
        normal = partial(_normal, rng, self.dtype)
        led = (self.layers,) if self.layers else ()
        x = {"q_BHC": normal(B, H, C), "lengths_B": lengths}
        x |= {"k_BKTC": normal(*led, B, K, T, C), "v_BKTV": normal(*led, B, K, T, V)}
        if self.layers:
            x["layer"] = jnp.asarray(self.layers - 2, jnp.int32)
        if self.alibi:
            x["alibi_slopes"] = jnp.asarray(0.5 ** rng.uniform(1, 8, H), jnp.float32)
        if self.sinks:
            x["sinks"] = jnp.asarray(rng.standard_normal(H), jnp.float32)
        return x

    def kernel(self, way: Way, x: Arrays) -> Arrays:
        """What the kernel makes of it."""
        tiling = decode_tpu.Tiling(1, 128) if way.interpreted else None
        return self._result(x, implementation=way.implementation, chip=way.chip, tiling=tiling)

    def reference(self, x: Arrays) -> Arrays:
        """What it should be."""
        return self._result(x, implementation="reference")

    def _result(self, x: Arrays, **how: Any) -> Arrays:
        return {"out": decode_attention(**x, **how, window=self.window, softcap=self.softcap)}


@dataclass(frozen=True)
class Product:
    """Rows times their group's matrix with both gradients; names as in `grouped`.

    The kernel leaves precision to jax, whose default for float32 on a TPU is one product of bfloat16s: such a
    case asks for the highest.
    """

    label: str
    dtype: str
    sizes: tuple[int, ...]
    inner: int
    outer: int

    @property
    def name(self) -> str:
        """For `--only`."""
        return f"grouped {self.dtype} {self.label}"

    @property
    def precision(self) -> str | None:
        """Of the kernel's matmuls."""
        return "highest" if self.dtype == "float32" else None

    def small(self) -> Product:
        """The same for fewer rows."""
        times = _halvings(max(self.sizes))
        return replace(self, sizes=tuple(_halved(size, times=times) for size in self.sizes))

    def draw(self, rng: np.random.Generator) -> Arrays:
        """Operands, and the gradient of the product."""
        rows, normal = sum(self.sizes), partial(_normal, rng, self.dtype)
        weight = normal(len(self.sizes), self.inner, self.outer)
        return {"x": normal(rows, self.inner), "weight": weight, "grad": normal(rows, self.outer)}

    def kernel(self, way: Way, x: Arrays) -> Arrays:
        """What the kernel makes of it."""
        how = Grouped.MEGABLOX_INTERPRETED if way.interpreted else Grouped.MEGABLOX
        sizes = jnp.asarray(self.sizes, jnp.int32)
        with jax.default_matmul_precision(self.precision):
            return self._results(x, lambda rows, weight: grouped(rows, weight, sizes, how))

    def reference(self, x: Arrays) -> Arrays:
        """What it should be: group by group."""
        ends = np.cumsum(self.sizes)

        def loop(rows: Array, weight: Array) -> Array:
            groups = enumerate(zip(self.sizes, ends, strict=True))
            return jnp.concatenate([rows[end - size : end] @ weight[e] for e, (size, end) in groups])

        return self._results(x, loop)

    def _results(self, x: Arrays, product: Callable[..., Array]) -> Arrays:
        out, backward = jax.vjp(product, x["x"], x["weight"])
        return {"out": out} | dict(zip(("dx", "dweight"), backward(x["grad"]), strict=True))


Case = Attention | Decode | Product


def _halvings(length: int) -> int:
    return max(0, math.ceil(math.log2(length / SMALL_LENGTH)))


def _halved(size: int, times: int) -> int:
    """0 stays 0, and nothing else becomes it."""
    return max(size >> times, min(size, 1))


def _normal(rng: np.random.Generator, dtype: str, *shape: int) -> Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32), jnp.dtype(dtype))


def _documents(rng: np.random.Generator, rows: int, length: int) -> Array:
    """Ids of three documents in a row and padding behind."""
    cuts = np.sort(rng.integers(1, length, (rows, 3)), axis=1)[:, :, None]
    places = np.arange(length)
    ids = np.where(places < cuts[:, 2], 1 + (places >= cuts[:, 0]) + (places >= cuts[:, 1]), 0)
    return jnp.asarray(ids, jnp.int32)


EVERYTHING: dict[str, Any] = {"alibi": True, "sinks": True, "softcap": 20.0, "window": 300}
FEATURES: dict[str, dict[str, Any]] = {
    "as many key heads": {"kv_heads": 4},
    "one key head": {"kv_heads": 1},
    "alibi": {"alibi": True},
    "segments": {"segments": True, "batch": 2},
    "window": {"window": 300},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
    "narrow values": {"value_dim": 64},
    "wide values": {"value_dim": 256},
    "not causal": {"causal": False, "alibi": True},
    "not causal, window": {"causal": False, "window": 300, "segments": True},
    "later queries": {"queries": 300, "q_offset": 700},
    "one query": {"queries": 1, "q_offset": 776, "keys": 777},
    "fewer keys": {"keys": 400, "causal": False},
    "odd lengths": {"queries": 1_021, "keys": 1_021, "alibi": True},
}
LONG = {"queries": 32_768, "keys": 32_768, "heads": 2, "kv_heads": 1, "rows": 512}
ROUTED = (700, 0, 1, 323, 0, 1_024, 8, 44)
DTYPES = ("bfloat16", "float32")


def attention_cases() -> list[Attention]:
    """Head dims with nothing and with everything; each feature; several chunks of keys."""
    found = []
    for dtype in DTYPES:
        for dim in attention_tiles.HEAD_DIMS:
            found.append(Attention("plain", dtype, dim))
            everything = EVERYTHING | {"segments": True, "batch": 2, "queries": 1_000, "keys": 1_000}
            found.append(Attention("everything", dtype, dim, **everything))
        found += [Attention(label, dtype, 128, **features) for label, features in FEATURES.items()]
        found.append(Attention("narrow values", dtype, 192, value_dim=128))
    found += [
        Attention("long", "bfloat16", 128, **LONG),
        Attention("long, alibi, segments", "bfloat16", 64, **LONG, alibi=True, segments=True),
        Attention("long, window, sinks", "bfloat16", 256, **LONG, window=5_000, sinks=True),
        Attention("long, not causal", "bfloat16", 128, **LONG, causal=False),
        Attention("long, later queries", "bfloat16", 96, **LONG | {"queries": 4_096, "q_offset": 28_000}),
        Attention("long", "float32", 64, **LONG | {"queries": 8_192, "keys": 8_192}, alibi=True),
        Attention("long", "float32", 128, **LONG | {"queries": 16_384, "keys": 16_384}, segments=True),
    ]
    return found


def decode_cases() -> list[Decode]:
    """Head dims with everything, and each layout of heads and cache."""
    dims = ((64, 64), (80, 128), (96, 96), (128, 128), (192, 128), (256, 256))
    found = []
    for dtype in DTYPES:
        found += [Decode("everything", dtype, C, V, layers=3, **EVERYTHING) for C, V in dims]
        for dim in (64, 128):
            found.append(Decode("plain", dtype, dim))
            found.append(Decode("one key head, layers", dtype, dim, kv_heads=1, layers=2, slots=4_096))
            found.append(Decode("as many key heads, window", dtype, dim, kv_heads=8, window=129))
    return found


def product_cases() -> list[Product]:
    """Groups with many rows, few and none, and dims that are no multiple of the lanes."""
    return [
        Product(label, dtype, sizes, inner, outer)
        for dtype in DTYPES
        for label, sizes, inner, outer in (
            ("2,100 rows", ROUTED, 512, 1_152),
            ("few rows", (5, 0, 11, 1), 256, 128),
            ("uneven dims", (32,) * 8, 96, 200),
        )
    ]


def cases() -> list[Case]:
    """All, in the order in which they run."""
    return [*attention_cases(), *decode_cases(), *product_cases()]


@partial(jax.jit, static_argnums=(0, 1))
def kernel(case: Case, way: Way, x: Arrays) -> Arrays:
    """What the case's kernel makes of its operands."""
    return case.kernel(way, x)


def reference(case: Case, x: Arrays) -> Arrays:
    """What it should be: the same numbers in float32, multiplied in full precision."""
    with jax.default_matmul_precision("highest"):
        return _reference(replace(case, dtype="float32"), jax.tree.map(_wide, x))


# Dtypes share what is compiled.
_reference = jax.jit(lambda case, x: case.reference(x), static_argnums=0)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def drawn(case: Case, seed: int) -> Arrays:
    """The case's operands; its name is part of the seed."""
    return case.draw(np.random.default_rng([seed, zlib.crc32(case.name.encode())]))


def compare(got: Arrays, expected: Arrays) -> list[Agreement]:
    """Each result and gradient with the reference's.

    Raises:
        ValueError: other names, or other shapes.
    """
    if got.keys() != expected.keys():
        raise ValueError(f"results {sorted(got)} where the reference has {sorted(expected)}")
    return [agreement(name, np.asarray(got[name]), np.asarray(expected[name])) for name in expected]


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
        q, k, v, grad = (_normal(rng, "bfloat16", 1, 8, length, head_dim) for _ in range(4))
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
        q = _normal(rng, "bfloat16", B, H, head_dim)
        k, v = (_normal(rng, "bfloat16", B, K, T, head_dim) for _ in range(2))
        return q, {"k_BKTC": k, "v_BKTV": v, "lengths_B": jnp.full(B, held, jnp.int32)}

    def step(q: Array, fixed: Any) -> Array:
        return decode_attention(q, **fixed, implementation="pallas_tpu", chip=kind)

    predicted = moving_us(2 * 2 * B * K * held * head_dim, chip)
    return Loop(f"time decode C={head_dim} T={held}", step, draw, predicted)


def matmul_loop(chip: Chip | None) -> Loop:
    """XLA's own product, at the published peak."""

    def draw(rng: np.random.Generator) -> tuple[Array, Any]:
        x, w = (_normal(rng, "bfloat16", MATMUL, MATMUL) for _ in range(2))
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


class Report:
    """The JSON, written anew after each case; `finished` is false until the last."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.rows: dict[str, list[dict[str, Any]]] = {"cases": [], "timings": []}
        self.save(finished=False)

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """A row of `cases` or `timings`."""
        self.rows[kind].append(row)
        self.save(finished=False)

    @property
    def summary(self) -> dict[str, int]:
        """How many ran and failed."""
        rows = [row for kind in self.rows.values() for row in kind]
        counts = {kind: len(some) for kind, some in self.rows.items()}
        return counts | {"failed": sum(not row["passed"] for row in rows)}

    def save(self, finished: bool) -> None:
        """All at once: a reader finds the file before or after, never a part."""
        content = {"finished": finished, **self.header, "summary": self.summary, **self.rows}
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(part, self.path)


def case_row(case: Case, seed: int, way: Way) -> dict[str, Any]:
    """Run a case, and what came of it or why nothing did."""
    tolerance = TOLERANCES[case.dtype]
    row = {"name": case.name, "features": asdict(case), "tolerance": tolerance}
    if isinstance(case, Product):
        row["features"]["precision"] = case.precision
    try:
        x = drawn(case, seed)
        found = compare(kernel(case, way, x), reference(case, x))
    except REFUSALS as error:
        return row | {"passed": False, "error": one_line(error)}
    worst = max(found, key=lambda each: each.error)
    return row | {
        "passed": worst.error <= tolerance,
        "worst": worst.dump(),
        "errors": [each.dump() for each in found],
    }


def loop_row(loop: Loop, seed: int, rounds: int) -> dict[str, Any]:
    """Time a loop, and what came of it or why nothing did."""
    try:
        return measure(loop, seed, rounds)
    except REFUSALS as error:
        return {
            "name": loop.name,
            "passed": False,
            "predicted_us": loop.predicted_us,
            "error": one_line(error),
        }


def line(row: dict[str, Any]) -> str:
    """For the terminal."""
    head = f"{'ok  ' if row['passed'] else 'FAIL'} {row['name']}"
    if "error" in row:
        return f"{head}: {row['error']}"
    if "worst" in row:
        worst = row["worst"]
        errors = [worst[name] for name in ("scaled", "local")]
        text = "not finite" if None in errors else f"{max(errors):.1e}"
        return f"{head}: {worst['name']} {text} of {row['tolerance']:.0e}"
    us, ratio = row["measured_us"], row["ratio"]
    beside = "" if ratio is None else f", predicted {row['predicted_us']:.1f}, ratio {ratio:.2f}"
    finite = "" if row["passed"] else ", not finite"
    return f"{head}: {us['median']:.1f} us ({us['least']:.1f}-{us['most']:.1f}){beside}{finite}"


def first_device(interpreted: bool) -> jax.Device:
    """The device that all runs on.

    Raises:
        InputError: it is no TPU, and kernels are to be compiled.
    """
    try:
        device = jax.devices()[0]
        got = device.device_kind
    except RuntimeError as error:
        device, got = None, one_line(error)
    if device is None or (device.platform != "tpu" and not interpreted):
        wanted = os.environ.get("JAX_PLATFORMS")
        raise InputError(
            "this check runs compiled kernels",
            expected="a TPU as jax's first device",
            got=got + (f" (JAX_PLATFORMS is {wanted})" if wanted else ""),
            fix="run it on a TPU with JAX_PLATFORMS unset, or with --interpret, which times nothing",
        )
    return device


def header(device: jax.Device, options: argparse.Namespace) -> dict[str, Any]:
    """What ran where; neither the machine's name nor a path of it."""
    chip = find_chip(device.device_kind)
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "interpreted": options.interpret,
        "kernel": "interpreted" if options.interpret else "compiled",
        "chip": None if chip is None else chip.name,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "runtime": " ".join(device.client.platform_version.split()),
        "packages": packages,
        "python": ".".join(map(str, sys.version_info[:3])),
        "commit": commit() if shutil.which("git") else "",
        "date": time.strftime("%Y-%m-%d"),
        "seed": options.seed,
        "only": options.only,
        "tolerances": TOLERANCES,
    }


def run(report: Report, checks: list[Case], timings: list[Loop], options: argparse.Namespace) -> int:
    """One after the other, and the exit code."""
    for case in checks:
        report.add("cases", case_row(case, options.seed, Way(options.interpret)))
        print(line(report.rows["cases"][-1]), flush=True)
    for loop in timings:
        report.add("timings", loop_row(loop, options.seed, options.rounds))
        print(line(report.rows["timings"][-1]), flush=True)
    report.save(finished=True)
    return 1 if report.summary["failed"] else 0


def check(options: argparse.Namespace) -> int:
    """All that was asked for; the exit code.

    Raises:
        InputError: no TPU, nothing of that name, or no folder to write to.
    """
    device = first_device(options.interpret)
    kind = device.device_kind

    def wanted(each: Any) -> bool:
        return not options.only or any(part in each.name for part in options.only)

    checks = [case.small() if options.interpret else case for case in cases() if wanted(case)]
    timings = [] if options.interpret else [loop for loop in loops(find_chip(kind), kind) if wanted(loop)]
    if not checks and not timings:
        raise InputError("nothing to run", expected="a part of a case's name", got=f"--only {options.only}")
    if not options.out.parent.is_dir():
        raise InputError("no such folder", expected="an existing one for --out", got=options.out.parent)
    report = Report(options.out, header(device, options))
    code = run(report, checks, timings, options)
    counts = report.summary
    print(
        f"{counts['cases']} cases, {counts['timings']} timings, {counts['failed']} failed;"
        f" kernels {report.header['kernel']} on {kind}; {options.out.name} has it all"
    )
    return code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="step by step on any device, small shapes")
    parser.add_argument("--only", action="append", help="what has this in its name; may be given again")
    parser.add_argument("--out", type=Path, default=Path("hardware_check.json"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7, help="of each timing")
    options = parser.parse_args(argv)
    try:
        return check(options)
    except InputError as error:
        print(f"hardware_check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

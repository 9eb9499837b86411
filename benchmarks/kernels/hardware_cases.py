"""Cases of the hardware check: kernels with all their features, references, and how far two are apart."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mosaicjax.kernels import attention_tiles, decode_tpu, flash_tpu
from mosaicjax.kernels.decode_attention import decode_attention
from mosaicjax.kernels.flash_attention import flash_attention
from mosaicjax.kernels.grouped import Grouped, grouped

TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}
"""Of both errors in `Agreement`. A bfloat16 has 8 bits: 2e-2 is 5 of its last places, for probabilities,
results and gradients of scores are each rounded to it. float32 products are of full precision."""
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
        normal = partial(standard_normal, rng, self.dtype)
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
        normal = partial(standard_normal, rng, self.dtype)
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
        rows, normal = sum(self.sizes), partial(standard_normal, rng, self.dtype)
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


def standard_normal(rng: np.random.Generator, dtype: str, *shape: int) -> Array:
    """Normal numbers of a dtype, drawn as float32."""
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

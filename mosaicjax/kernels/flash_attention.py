"""Attention that never holds a score longer than it must: one function, several ways to run it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from mosaicjax.errors import InputError
from mosaicjax.kernels import attention_reference, attention_xla, flash_tpu
from mosaicjax.kernels.attention_blocks import Operands, Problem
from mosaicjax.kernels.attention_tiles import tilings

ATTENTION = "attention"
"""What a remat policy may call attention's result."""


class Implementation(Enum):
    """Who computes attention.

    PALLAS_TPU is our TPU kernel, forward and backward. XLA is a tiled online softmax in plain array
    operations, with memory linear in the length, for CPUs and GPUs. REFERENCE holds all scores, in float32:
    the definition. PALLAS_INTERPRETED is the kernel step by step on any device, for tests: far too slow for
    anything else. BY_DEVICE is PALLAS_TPU on TPUs and XLA elsewhere, and a run's record says which it was.
    """

    BY_DEVICE = "by_device"
    PALLAS_TPU = "pallas_tpu"
    PALLAS_INTERPRETED = "pallas_interpreted"
    XLA = "xla"
    REFERENCE = "reference"

    def on(self, platform: str) -> Implementation:
        """What this means on devices of a platform (`tpu`, `cpu`, `gpu`).

        Raises:
            InputError: PALLAS_TPU anywhere but on TPUs.
        """
        if self is Implementation.BY_DEVICE:
            return Implementation.PALLAS_TPU if platform == "tpu" else Implementation.XLA
        if self is Implementation.PALLAS_TPU and platform != "tpu":
            raise InputError(
                "attention=PALLAS_TPU is a TPU kernel",
                expected="TPU devices",
                got=platform,
                fix="attention=XLA runs anywhere, attention=BY_DEVICE takes what suits the device",
            )
        return self


@dataclass(frozen=True)
class _Way:
    """A problem, and how it is to be worked on; all that is known before any data."""

    problem: Problem
    implementation: Implementation
    tilings: tuple[flash_tpu.Tiling, flash_tpu.Tiling] | None

    def forward(self, x: Operands) -> tuple[Array, Array]:
        if self.implementation is Implementation.REFERENCE:
            return attention_reference.forward(self.problem, x)
        if self.implementation is Implementation.XLA:
            return attention_xla.forward(self.problem, x)
        return flash_tpu.forward(self._call(0), x)

    def backward(
        self, x: Operands, grad: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array, Array | None]:
        if self.implementation is Implementation.REFERENCE:
            return attention_reference.backward(self.problem, x, grad, lse, delta)
        if self.implementation is Implementation.XLA:
            return attention_xla.backward(self.problem, x, grad, lse, delta)
        return flash_tpu.backward(self._call(1), x, grad, lse, delta)

    def inner(self, out: Array, grad: Array, wide: Any) -> Array:
        """The product over channels of the result and its gradient, [B, H, L]."""
        if self.implementation is Implementation.XLA:
            return attention_xla.inner(out, grad, wide)
        return jnp.sum(out.astype(wide) * grad.astype(wide), axis=-1)

    def _call(self, which: int) -> flash_tpu.Call:
        assert self.tilings is not None
        interpret = self.implementation is Implementation.PALLAS_INTERPRETED
        return flash_tpu.Call(self.problem, self.tilings[which], interpret)


def flash_attention(
    q_BLHC: Array,
    k_BTKC: Array,
    v_BTKC: Array,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    q_segments: Array | None = None,
    kv_segments: Array | None = None,
    q_offset: Array | int = 0,
    sinks: Array | None = None,
    implementation: Implementation | str = Implementation.BY_DEVICE,
    return_logsumexp: bool = False,
    chip: str = "",
    tiling: tuple[flash_tpu.Tiling, flash_tpu.Tiling] | None = None,
) -> Array | tuple[Array, Array]:
    """Softmax attention of queries over keys, with gradients for every array of numbers.

    The query at place i of its row stands at `i + q_offset`, a key at its own place. Each H / K query heads
    share a key head. Scores are scaled, bent by `softcap * tanh(scores / softcap)` where softcap is not 0,
    then lowered by the head's slope a place of distance (ALiBi). A query sees keys of its own segment
    (segment 0 is seen by nobody), fewer than `window` places away (0: any), and if `causal` none behind its
    own. `sinks` are logits of a key without a value, one a head. A query that sees nothing gives 0, and has
    gradient 0.

    Shapes: q [B, L, H, C], k [B, T, K, C], v [B, T, K, V], the result [B, L, H, V] in q's dtype; slopes and
    sinks [H]; segments int32 [B or 1, L] and [B or 1, T]; `q_offset` an int, or int32 [] or [B]. With
    `return_logsumexp` comes the natural logsumexp of each query's scores, sinks among them, [B, L, H], -inf
    where there is none. `scale` None is 1 / sqrt(C). Scores and sums are float32, or float64 for float64.

    Within `shard_map` over rows or heads it runs on each shard; the TPU kernel asks for `check_vma=False`, as
    all of Pallas does.

    `chip` and `tiling` are the TPU kernel's: for whose table of blocks ("": jax's default device), or the
    forward's and the backward's blocks themselves.

    Raises:
        InputError: shapes that do not fit, an implementation that cannot run here or lacks a dtype.
    """
    how = Implementation(implementation) if isinstance(implementation, str) else implementation
    if how in (Implementation.BY_DEVICE, Implementation.PALLAS_TPU) and not chip:
        how = how.on(jax.default_backend())
    elif how is Implementation.BY_DEVICE:
        how = Implementation.PALLAS_TPU
    _check(q_BLHC, k_BTKC, v_BTKC, alibi_slopes, sinks, q_segments, kv_segments, window, softcap, how)
    (B, L, _, C), T = q_BLHC.shape, k_BTKC.shape[1]
    known = int(q_offset) if isinstance(q_offset, (int, np.integer)) else None
    offset = jnp.atleast_1d(jnp.asarray(q_offset, jnp.int32))
    problem = Problem(causal, window, C**-0.5 if scale is None else scale, softcap, L, T)
    kernel = how in (Implementation.PALLAS_TPU, Implementation.PALLAS_INTERPRETED)
    if kernel and tiling is None:
        tiling = tilings(chip or jax.devices()[0].device_kind, q_BLHC.dtype, C, v_BTKC.shape[3], T, window)
    way = _Way(problem, how, tiling if kernel else None)

    def rows(segments: Array | None, length: int) -> Array | None:
        if segments is None:
            return None
        return jnp.broadcast_to(segments.astype(jnp.int32), (B, length))

    turned = [x.transpose(0, 2, 1, 3) for x in (q_BLHC, k_BTKC, v_BTKC)]
    x = Operands(
        q=turned[0],
        k=turned[1],
        v=turned[2],
        offset=offset,
        slopes=_by_shard(alibi_slopes, q_BLHC),
        sinks=_by_shard(sinks, q_BLHC),
        q_segments=rows(q_segments, L),
        k_segments=rows(kv_segments, T),
        known=known,
    )
    out_BHLV, lse_BHL = _attend(way, x)
    out_BLHV = out_BHLV.transpose(0, 2, 1, 3)
    return (out_BLHV, lse_BHL.transpose(0, 2, 1)) if return_logsumexp else out_BLHV


def _by_shard(numbers: Array | None, q: Array) -> Array | None:
    """Numbers of heads as values of each shard's own within `shard_map`, so that gradients are summed."""
    if numbers is None:
        return None
    numbers = jnp.asarray(numbers)
    return numbers + jnp.zeros_like(q, shape=numbers.shape, dtype=numbers.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(way: _Way, x: Operands) -> tuple[Array, Array]:
    out, lse = way.forward(x)
    return out, jnp.where(jnp.isposinf(lse), -jnp.inf, lse)


def _attend_forward(way: _Way, x: Any) -> tuple[tuple[Array, Array], Any]:
    wanted = x.slopes is not None and x.slopes.perturbed
    x = jax.tree.map(lambda leaf: leaf.value, x, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    # Named here, where the backward pass takes them from: a remat policy that keeps them spares the kernel.
    out, lse = (checkpoint_name(each, ATTENTION) for each in way.forward(x))
    # A marker without data: whether slopes are differentiated is known here alone.
    marker = ((),) if wanted else ()
    return (out, jnp.where(jnp.isposinf(lse), -jnp.inf, lse)), (x, out, lse, marker)


def _attend_backward(way: _Way, saved: Any, grads: Any) -> tuple[Any]:
    x, out, lse, marker = saved
    grad, lse_grad = grads
    wide = lse.dtype
    grad = jnp.zeros(out.shape, out.dtype) if isinstance(grad, SymbolicZero) else grad
    delta = way.inner(out, grad, wide)
    if not isinstance(lse_grad, SymbolicZero):
        # Where nothing is seen the logsumexp is a constant.
        delta = delta - jnp.where(jnp.isposinf(lse), 0, lse_grad)
    way = replace(way, problem=replace(way.problem, slopes_grad=bool(marker)))
    q, k, v, slopes = way.backward(x, grad, lse, delta)
    sinks = None
    if x.sinks is not None:
        share = jnp.exp(x.sinks.astype(wide)[None, :, None] - lse)
        sinks = -jnp.sum(share * delta, axis=(0, 2)).astype(x.sinks.dtype)
    if x.slopes is not None:
        slopes = jnp.zeros_like(x.slopes) if slopes is None else slopes.astype(x.slopes.dtype)
    none = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), x)
    return (replace(none, q=q, k=k, v=v, slopes=slopes, sinks=sinks),)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _check(
    q: Array,
    k: Array,
    v: Array,
    slopes: Array | None,
    sinks: Array | None,
    q_segments: Array | None,
    kv_segments: Array | None,
    window: int,
    softcap: float,
    how: Implementation,
) -> None:
    H, K = q.shape[2], k.shape[2]
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or H % K:
        raise InputError(
            "attention's shapes",
            expected="q [B, L, H, C], k [B, T, K, C], v [B, T, K, V] with K dividing H",
            got=f"{q.shape}, {k.shape}, {v.shape}",
        )
    for name, each in (("alibi_slopes", slopes), ("sinks", sinks)):
        if each is not None and each.shape != (H,):
            raise InputError(f"attention's {name}", expected=f"one a query head, {(H,)}", got=each.shape)
    if (q_segments is None) != (kv_segments is None):
        raise InputError("attention's segments", expected="both of queries and of keys, or none", got="one")
    if window < 0 or softcap < 0:
        raise InputError("attention's window and softcap", expected="0 or more", got=(window, softcap))
    if how in (Implementation.PALLAS_TPU, Implementation.PALLAS_INTERPRETED):
        if q.dtype not in (jnp.float32, jnp.bfloat16):
            raise InputError(
                f"attention={how.name} in this dtype",
                expected="float32 or bfloat16",
                got=q.dtype,
                fix="attention=XLA and attention=REFERENCE take any",
            )

"""Attention of one query a sequence over a cache of keys and values: generation's step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.errors import InputError
from mosaicjax.kernels import attention_reference, decode_tpu
from mosaicjax.kernels.attention_blocks import Operands, Problem
from mosaicjax.kernels.flash_attention import Implementation
from mosaicjax.spec import at_least_float32


def decode_attention(
    q_BHC: Array,
    k_BKTC: Array,
    v_BKTV: Array,
    lengths_B: Array,
    *,
    layer: Array | int | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    implementation: Implementation | str = Implementation.BY_DEVICE,
    chip: str = "",
    tiling: decode_tpu.Tiling | None = None,
) -> Array:
    """Softmax attention of each sequence's newest token over all its tokens, without gradients.

    The token at position p lies in slot p. The first `lengths_B` slots of a sequence hold its tokens, and its
    query stands at `lengths_B - 1`, the query's own key among the keys. What lies in the other slots does not
    matter, but must be finite. Each of H / K query heads shares a key head. Scores are scaled, bent by
    `softcap * tanh(scores / softcap)` where softcap is not 0, then lowered by the head's slope a place of
    distance (ALiBi). A query sees keys fewer than `window` places away (0: any). `sinks` are logits of a key
    without a value, one a head. A sequence of length 0 gives 0.

    With `layer`, keys and values are those of all layers, [N, B, K, T, C] and [N, B, K, T, V]: the TPU kernel
    reads the layer's in place, where a slice of them would first be copied.

    Shapes: q [B, H, C], k [B, K, T, C], v [B, K, T, V], the result [B, H, V] in q's dtype; lengths int32 [B];
    slopes and sinks [H]; `layer` an int or int32 []. `scale` None is 1 / sqrt(C). Scores and sums are float32
    or wider. Scores of the kernel must stay below 1e9: a compiler may round the product with the scale and
    the difference to the maximum at once, which is off by a last place of the score.

    `chip` and `tiling` are the TPU kernel's: for which device kind it chooses blocks ("": jax's default
    device), or the blocks themselves.

    Raises:
        InputError: shapes that do not fit, an implementation that cannot run here or lacks a dtype.
    """
    how = Implementation(implementation) if isinstance(implementation, str) else implementation
    if how in (Implementation.BY_DEVICE, Implementation.PALLAS_TPU) and not chip:
        how = how.on(jax.default_backend())
    elif how is Implementation.BY_DEVICE:
        how = Implementation.PALLAS_TPU
    k_NBKTC, v_NBKTV = (k_BKTC, v_BKTV) if layer is not None else (k_BKTC[None], v_BKTV[None])
    _check(q_BHC, k_NBKTC, v_NBKTV, lengths_B, alibi_slopes, sinks, window, softcap)
    lengths_B = lengths_B.astype(jnp.int32)
    scale = q_BHC.shape[2] ** -0.5 if scale is None else scale
    if how in (Implementation.PALLAS_TPU, Implementation.PALLAS_INTERPRETED):
        _check_dtypes(q_BHC, k_NBKTC, v_NBKTV, how)
        if tiling is None:
            (K, T, C), V = k_NBKTC.shape[2:], v_NBKTV.shape[4]
            kind = chip or jax.devices()[0].device_kind
            tiling = decode_tpu.best_tiling(kind, k_NBKTC.dtype.itemsize, (K, T, C, V), window)
        interpret = how is Implementation.PALLAS_INTERPRETED
        call = decode_tpu.Call(scale, window, softcap, tiling, interpret)
        number = jnp.atleast_1d(jnp.asarray(0 if layer is None else layer, jnp.int32))
        x = decode_tpu.Operands(q_BHC, k_NBKTC, v_NBKTV, lengths_B, number, alibi_slopes, sinks)
        return decode_tpu.decode(call, x)
    if layer is not None:
        k_BKTC, v_BKTV = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k_BKTC, v_BKTV))
    problem = Problem(True, window, scale, softcap, 1, k_BKTC.shape[2])
    if how is Implementation.REFERENCE:
        return _reference(problem, q_BHC, k_BKTC, v_BKTV, lengths_B, alibi_slopes, sinks)
    return _masked_softmax(problem, q_BHC, k_BKTC, v_BKTV, lengths_B, alibi_slopes, sinks)


def _masked_softmax(
    problem: Problem,
    q_BHC: Array,
    k_BKTC: Array,
    v_BKTV: Array,
    lengths_B: Array,
    slopes_H: Array | None,
    sinks_H: Array | None,
) -> Array:
    """One softmax over all slots. The cache is read as it lies, once for keys and once for values."""
    (B, H, C), (_, K, T, V) = q_BHC.shape, v_BKTV.shape
    G = H // K
    wide = at_least_float32(q_BHC.dtype)
    exact = jax.lax.Precision.HIGHEST
    scores_BKGT = jax.lax.dot_general(
        q_BHC.reshape(B, K, G, C),
        k_BKTC,
        (((3,), (3,)), ((0, 1), (0, 1))),
        precision=exact,
        preferred_element_type=wide,
    ) * jnp.asarray(problem.scale, wide)
    if problem.softcap:
        scores_BKGT = problem.softcap * jnp.tanh(scores_BKGT / problem.softcap)
    away_BT = lengths_B[:, None] - 1 - jnp.arange(T, dtype=jnp.int32)[None]
    if slopes_H is not None:
        slopes_KG = slopes_H.astype(wide).reshape(K, G)
        scores_BKGT -= slopes_KG[None, :, :, None] * away_BT.astype(wide)[:, None, None]
    allowed_BT = away_BT >= 0
    if problem.window:
        allowed_BT &= away_BT < problem.window
    allowed_B11T = allowed_BT[:, None, None]
    scores_BKGT = jnp.where(allowed_B11T, scores_BKGT, jnp.finfo(wide).min)
    top_BKG1 = jnp.max(scores_BKGT, axis=3, keepdims=True)
    sinks_1KG1 = None if sinks_H is None else sinks_H.astype(wide).reshape(1, K, G, 1)
    if sinks_1KG1 is not None:
        top_BKG1 = jnp.maximum(top_BKG1, sinks_1KG1)
    shares_BKGT = jnp.where(allowed_B11T, jnp.exp(scores_BKGT - top_BKG1), 0)
    total_BKG1 = jnp.sum(shares_BKGT, axis=3, keepdims=True)
    if sinks_1KG1 is not None:
        total_BKG1 += jnp.exp(sinks_1KG1 - top_BKG1)
    out_BKGV = jax.lax.dot_general(
        shares_BKGT.astype(v_BKTV.dtype),
        v_BKTV,
        (((3,), (2,)), ((0, 1), (0, 1))),
        precision=exact,
        preferred_element_type=wide,
    )
    out_BKGV /= jnp.where(total_BKG1 > 0, total_BKG1, 1)
    return out_BKGV.reshape(B, H, V).astype(q_BHC.dtype)


def _reference(
    problem: Problem,
    q_BHC: Array,
    k_BKTC: Array,
    v_BKTV: Array,
    lengths_B: Array,
    slopes_H: Array | None,
    sinks_H: Array | None,
) -> Array:
    """The reference of attention at large, whose empty slots are segment 0."""
    slots_BT = jnp.arange(k_BKTC.shape[2], dtype=jnp.int32)[None]
    held_BT = (slots_BT < lengths_B[:, None]).astype(jnp.int32)
    ones_BL = jnp.ones((q_BHC.shape[0], 1), jnp.int32)
    x = Operands(q_BHC[:, :, None], k_BKTC, v_BKTV, lengths_B - 1, slopes_H, sinks_H, ones_BL, held_BT)
    return attention_reference.forward(problem, x)[0][:, :, 0]


def _check(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    slopes: Array | None,
    sinks: Array | None,
    window: int,
    softcap: float,
) -> None:
    fits = q.ndim == 3 and k.ndim == v.ndim == 5 and k.shape[:4] == v.shape[:4]
    if not fits or k.shape[1] != q.shape[0] or k.shape[4] != q.shape[2] or q.shape[1] % k.shape[2]:
        raise InputError(
            "decode attention's shapes",
            expected="q [B, H, C], k [B, K, T, C], v [B, K, T, V] with K dividing H; k and v led by the"
            " number of layers where `layer` is given",
            got=f"{q.shape}, {k.shape}, {v.shape} (all led by layers)",
        )
    if lengths.shape != q.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise InputError(
            "decode attention's lengths",
            expected=f"integers, one a sequence, {q.shape[:1]}",
            got=f"{lengths.dtype} {lengths.shape}",
        )
    for name, each in (("alibi_slopes", slopes), ("sinks", sinks)):
        if each is not None and each.shape != q.shape[1:2]:
            raise InputError(
                f"decode attention's {name}", expected=f"one a query head, {q.shape[1:2]}", got=each.shape
            )
    if window < 0 or softcap < 0:
        raise InputError("decode attention's window and softcap", expected="0 or more", got=(window, softcap))


def _check_dtypes(q: Array, k: Array, v: Array, how: Implementation) -> None:
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float32, jnp.bfloat16)):
        raise InputError(
            f"decode attention={how.name} in these dtypes",
            expected="float32 or bfloat16, one for all",
            got=f"{q.dtype}, {k.dtype}, {v.dtype}",
            fix="attention=XLA and attention=REFERENCE take any",
        )

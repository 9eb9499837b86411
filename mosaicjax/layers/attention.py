"""Self-attention: projections, their options, and the sum over what a query may see."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from mosaicjax.errors import InputError
from mosaicjax.kernels.decode_attention import decode_attention
from mosaicjax.kernels.flash_attention import Implementation, flash_attention
from mosaicjax.kernels.paged_attention import paged_attention
from mosaicjax.layers.context import KV, Context, Held, Paged, Stored
from mosaicjax.layers.inits import InitRule
from mosaicjax.layers.linear import linear
from mosaicjax.layers.norm import LayerNorm, Norm, spread
from mosaicjax.layers.position import Position
from mosaicjax.mesh import BATCH, Layout
from mosaicjax.spec import ZEROS, Constant, Dims, Param


@dataclass(frozen=True)
class QkNorm:
    """A norm of queries and of keys after projection, over all heads together or over each alone.

    Source: llm-foundry `qk_ln` (all heads) and `qk_gn` (each head).
    """

    norm: Norm = LayerNorm(bias=False)
    per_head: bool = False

    def axes(self, heads: str) -> tuple[str, ...]:
        """Axes of the norm's weights for queries (`heads`) or keys (`kv_heads`)."""
        return ("head_dim",) if self.per_head else (heads, "head_dim")


@dataclass(frozen=True)
class Attention:
    """Causal self-attention over H query heads that share K key heads (H = K multi-head, 1 multi-query).

    `window` 0, `clip_qkv` 0 and `softcap` 0 mean none; `scale` 0 means 1 / sqrt(head_dim). `sinks` gives each
    head a learned logit of a key without a value, so that it may attend to nothing. `value_table` is the
    number of the model's table (None: none) whose entry for a token is added to its values, times a learned
    number a key head.

    Source: sinks: Xiao et al. 2023, arXiv 2309.17453, as logits in gpt-oss (OpenAI 2025, arXiv 2508.10925);
    value embeddings: modded-nanogpt, after Zhou et al. 2024, arXiv 2410.17897.
    """

    position: Position = Position()
    window: int = 0
    qk_norm: QkNorm | None = None
    clip_qkv: float = 0.0
    softcap: float = 0.0
    scale: float = 0.0
    bias: bool = False
    sinks: bool = False
    value_table: int | None = None
    implementation: Implementation = Implementation.BY_DEVICE

    def params(self, init: InitRule, layers: int) -> dict[str, Any]:
        """Weights of one layer in a model of so many."""
        into, out = ("embed",), ("heads", "head_dim")
        tree: dict[str, Any] = {
            "query": Param(("embed", "heads", "head_dim"), init.matrix(into)),
            "key": Param(("embed", "kv_heads", "head_dim"), init.matrix(into)),
            "value": Param(("embed", "kv_heads", "head_dim"), init.matrix(into)),
            "out": Param(("heads", "head_dim", "embed"), init.residual(out, layers)),
        }
        if self.bias:
            tree["query_bias"] = Param(("heads", "head_dim"), ZEROS, decay=False)
            tree["key_bias"] = Param(("kv_heads", "head_dim"), ZEROS, decay=False)
            tree["value_bias"] = Param(("kv_heads", "head_dim"), ZEROS, decay=False)
            tree["out_bias"] = Param(("embed",), ZEROS, decay=False)
        if self.sinks:
            tree["sinks"] = Param(("heads",), ZEROS, decay=False, wide=True)
        if self.value_table is not None:
            tree["value_mix"] = Param(("kv_heads",), Constant(0.5), decay=False)
        if self.qk_norm is not None:
            tree["query_norm"] = self.qk_norm.norm.params(self.qk_norm.axes("heads"))
            tree["key_norm"] = self.qk_norm.norm.params(self.qk_norm.axes("kv_heads"))
        return tree

    def check(self, dims: Dims, length: int) -> None:
        """Refuse sizes that cannot be.

        Raises:
            InputError: query heads that key heads do not divide, a negative knob, rows longer than
                the positions.
        """
        if dims["heads"] % dims["kv_heads"]:
            raise InputError(
                "kv_heads must divide heads", expected=f"a divisor of {dims['heads']}", got=dims["kv_heads"]
            )
        for name in ("window", "clip_qkv", "softcap", "scale"):
            if getattr(self, name) < 0:
                raise InputError(f"attention {name}", expected="0 (none) or more", got=getattr(self, name))
        if self.qk_norm is not None:
            self.qk_norm.norm.check()
        self.position.check(length, dims["head_dim"])

    def apply(
        self, weights: dict[str, Any], x_BLD: Array, context: Context, kv: KV, layer: Array | int
    ) -> tuple[Array, KV]:
        """What each position gathers from those before it, and the keys and values to carry on.

        Shapes: x and the result [B, L, D].
        """
        q_BLHC, k_BLKC, v_BLKC = self.project(weights, x_BLD, context)
        late = self.position.rotation_depends_on_length
        if self.position.rotates and not late:
            any_length = jnp.zeros((1, 1), jnp.int32)
            q_BLHC = self.position.rotate(q_BLHC, context.positions_BL, any_length)
            k_BLKC = self.position.rotate(k_BLKC, context.positions_BL, any_length)
        kv = kv.append(layer, k_BLKC, v_BLKC, context)
        held = kv.view(layer, context)
        k_BTKC = held.k_BTKC
        if late:
            q_BLHC = self.position.rotate(q_BLHC, context.positions_BL, context.lengths(context.segments_BL))
            k_BTKC = self.position.rotate(k_BTKC, held.positions_BT, context.lengths(held.segments_BT))
        if held.stored is not None and not late:
            mixed_BLHC = self.attend_one(q_BLHC[:, 0], held.stored, context, weights.get("sinks"))[:, None]
        elif held.paged is not None and not late:
            mixed_BLHC = self.attend_pages(q_BLHC, held.paged, context, weights.get("sinks"))
        else:
            mixed_BLHC = self.attend(q_BLHC, replace(held, k_BTKC=k_BTKC), context, weights.get("sinks"))
        out_BLD = linear(mixed_BLHC, weights["out"], 2)
        if self.bias:
            out_BLD = out_BLD + spread(weights["out_bias"], out_BLD)
        return out_BLD, kv.carried()

    def attend(self, q_BLHC: Array, held: Held, context: Context, sinks_H: Array | None = None) -> Array:
        """What the kernel makes of queries, keys and values: each device works on its rows and heads.

        Raises:
            InputError: an implementation that does not run on these devices; heads that no kernel can split.
        """
        layout = context.layout
        platform, chip = _device(layout)
        how = self.implementation.on(platform)

        def run(
            q_BLHC: Array, k_BTKC: Array, v_BTKC: Array, slopes: Array | None, *rest: Array | None
        ) -> Array:
            sinks, offset, q_segments, kv_segments = rest
            out = flash_attention(
                q_BLHC,
                k_BTKC,
                v_BTKC,
                scale=self.scale or q_BLHC.shape[-1] ** -0.5,
                window=self.window,
                softcap=self.softcap,
                alibi_slopes=slopes,
                q_segments=q_segments,
                kv_segments=kv_segments,
                q_offset=held.offset if offset is None else offset,
                sinks=sinks,
                implementation=how,
                chip=chip,
            )
            assert isinstance(out, Array)
            return out

        traced = None if isinstance(held.offset, int) else held.offset
        slopes = self.position.slopes(q_BLHC.shape[2])
        arrays = (
            q_BLHC,
            held.k_BTKC,
            held.v_BTKC,
            slopes,
            sinks_H,
            traced,
            context.segments_BL,
            held.segments_BT,
        )
        if layout.mesh.size == 1 and not layout.manual:
            return run(*arrays)
        shards = _Shards.of(layout, q_BLHC.shape[2], held.k_BTKC.shape[2])
        batch = q_BLHC.shape[0]

        def lines(x: Array | None) -> P:
            return P(*shards.row, None) if x is not None and x.shape[0] == batch > 1 else P(None, None)

        queries = P(*shards.row, None, shards.heads or None, None)
        keys = P(*shards.row, None, shards.kv_heads or None, None)
        numbers = (
            P(shards.heads or None),
            P(shards.heads or None),
            P(*shards.row),
            lines(context.segments_BL),
            lines(held.segments_BT),
        )
        return shards.run(run, arrays, (queries, keys, keys, *numbers), queries)

    def attend_one(
        self, q_BHC: Array, stored: Stored, context: Context, sinks_H: Array | None = None
    ) -> Array:
        """The same for one query a sequence, [B, H, C], by the kernel that reads a cache where it lies.

        Raises:
            InputError: see `attend`.
        """
        layout = context.layout
        platform, chip = _device(layout)
        how = self.implementation.on(platform)

        def run(
            q_BHC: Array,
            k: Array,
            v: Array,
            slopes: Array | None,
            sinks: Array | None,
            lengths_B: Array,
            layer: Array,
        ) -> Array:
            return decode_attention(
                q_BHC,
                k,
                v,
                lengths_B,
                layer=layer,
                scale=self.scale or q_BHC.shape[-1] ** -0.5,
                window=self.window,
                softcap=self.softcap,
                alibi_slopes=slopes,
                sinks=sinks,
                implementation=how,
                chip=chip,
            )

        layer = jnp.asarray(stored.layer, jnp.int32)
        slopes = self.position.slopes(q_BHC.shape[1])
        arrays = (q_BHC, stored.k_NBKTC, stored.v_NBKTC, slopes, sinks_H, stored.lengths_B, layer)
        if layout.mesh.size == 1 and not layout.manual:
            return run(*arrays)
        shards = _Shards.of(layout, q_BHC.shape[1], stored.k_NBKTC.shape[2])
        queries = P(*shards.row, shards.heads or None, None)
        cache = P(None, *shards.row, shards.kv_heads or None, None, None)
        heads = P(shards.heads or None)
        numbers = (heads, heads, P(*shards.row), P())
        return shards.run(run, arrays, (queries, cache, cache, *numbers), queries)

    def attend_pages(
        self, q_BLHC: Array, paged: Paged, context: Context, sinks_H: Array | None = None
    ) -> Array:
        """The same over pages, [B, L, H, C]: each device has all rows, and of pages and queries its heads.

        Raises:
            InputError: see `attend`.
        """
        layout = context.layout

        def run(
            q_BLHC: Array,
            k: Array,
            v: Array,
            slopes: Array | None,
            sinks: Array | None,
            tables_BM: Array,
            positions_BL: Array,
            layer: Array,
        ) -> Array:
            return paged_attention(
                q_BLHC,
                k,
                v,
                tables_BM,
                positions_BL,
                layer=layer,
                scale=self.scale or q_BLHC.shape[-1] ** -0.5,
                window=self.window,
                softcap=self.softcap,
                alibi_slopes=slopes,
                sinks=sinks,
            )

        layer = jnp.asarray(paged.layer, jnp.int32)
        slopes = self.position.slopes(q_BLHC.shape[2])
        tables = (paged.tables_BM, paged.positions_BL, layer)
        arrays = (q_BLHC, paged.k_NPKSC, paged.v_NPKSC, slopes, sinks_H, *tables)
        if layout.mesh.size == 1 and not layout.manual:
            return run(*arrays)
        shards = _Shards.of(layout, q_BLHC.shape[2], paged.k_NPKSC.shape[2])
        queries = P(None, None, shards.heads or None, None)
        pages = P(None, None, shards.kv_heads or None, None, None)
        heads = P(shards.heads or None)
        return shards.run(run, arrays, (queries, pages, pages, heads, heads, P(), P(), P()), queries)

    def project(self, weights: dict[str, Any], x_BLD: Array, context: Context) -> tuple[Array, Array, Array]:
        """Queries, keys and values, biased, clipped and normed as the knobs say, not yet rotated."""
        projected = []
        for name, heads in (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads")):
            y_BLHC = linear(x_BLD, weights[name])
            if self.bias:
                y_BLHC = y_BLHC + spread(weights[f"{name}_bias"], y_BLHC)
            if name == "value" and self.value_table is not None:
                mix_K1 = weights["value_mix"][:, None]
                y_BLHC = y_BLHC + mix_K1[None, None] * context.values[self.value_table]
            if self.clip_qkv:
                y_BLHC = jnp.clip(y_BLHC, -self.clip_qkv, self.clip_qkv)
            if self.qk_norm is not None and name != "value":
                y_BLHC = self.qk_norm.norm.apply(weights[f"{name}_norm"], y_BLHC, context.dtypes)
            projected.append(
                context.layout.constrain(checkpoint_name(y_BLHC, "qkv"), BATCH, None, heads, None)
            )
        return projected[0], projected[1], projected[2]


def _device(layout: Layout) -> tuple[str, str]:
    """Platform and kind of the mesh's devices; a mesh that is only described has no devices to look at."""
    mesh: object = layout.mesh
    device = mesh.devices.flat[0] if isinstance(mesh, jax.sharding.Mesh) else jax.devices()[0]
    return device.platform, device.device_kind


@dataclass(frozen=True)
class _Shards:
    """How attention's rows and heads lie on a mesh, by its axes, as each device takes its own part of both.

    `group` query heads share a key head, and a device has `mine` query heads.
    """

    layout: Layout
    manual: frozenset[str]
    row: P
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]
    group: int
    mine: int

    @staticmethod
    def of(layout: Layout, heads: int, kv_heads: int) -> _Shards:
        """For so many query and key heads.

        Raises:
            InputError: query heads of a device that do not share whole key heads.
        """
        manual = frozenset({"tensor"} if layout.manual else layout.mesh.axis_names)
        outside = tuple(name for name in layout.mesh.axis_names if name not in manual)
        of_heads, of_kv_heads = (layout.dim(name, skip=layout.batch_axes) for name in ("heads", "kv_heads"))
        count = math.prod(layout.mesh.shape[name] for name in of_heads)
        group, mine = heads // kv_heads, heads // count
        row = layout.partition((BATCH,), skip=outside)
        shards = _Shards(layout, manual, row, of_heads, of_kv_heads, group, mine)
        if shards.apart and group % mine and mine % group:
            raise InputError(
                "query heads of a device do not share whole key heads",
                expected=f"heads / {count} that divides, or is a multiple of, heads / kv_heads = {group}",
                got=mine,
                fix="another tensor axis, or mesh.rules {'heads': 'none'}",
            )
        return shards

    @property
    def apart(self) -> bool:
        """Whether every device holds all key heads, but only some of the query heads."""
        return math.prod(self.layout.mesh.shape[name] for name in self.heads) > 1 and not self.kv_heads

    def run(
        self,
        one: Callable[..., Array],
        arrays: tuple[Array | None, ...],
        parts: tuple[P, ...],
        out: P,
    ) -> Array:
        """`one` by each device on its own part: the compiler cannot split a kernel.

        Of `arrays` the second and third are keys and values, whose third axis is key heads.
        """

        def shard(q: Any, k: Any, v: Any, *rest: Any) -> Array:
            if self.apart:
                first = jax.lax.axis_index(self.heads) * self.mine // self.group
                count = max(1, self.mine // self.group)
                k, v = (jax.lax.dynamic_slice_in_dim(x, first, count, axis=2) for x in (k, v))
            return one(q, k, v, *rest)

        return jax.shard_map(
            shard,
            mesh=None if self.layout.manual else self.layout.mesh,
            in_specs=parts,
            out_specs=out,
            axis_names=set(self.manual),
            check_vma=False,
        )(*arrays)

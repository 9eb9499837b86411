"""Self-attention: projections, their options, and the sum over what a query may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mosaicjax.errors import InputError
from mosaicjax.kernels.attention import Mask, attention
from mosaicjax.layers.context import KV, Context
from mosaicjax.layers.inits import InitRule
from mosaicjax.layers.linear import linear
from mosaicjax.layers.norm import LayerNorm, Norm, spread
from mosaicjax.layers.position import Position
from mosaicjax.mesh import BATCH
from mosaicjax.spec import ZEROS, Dims, Param


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

    `window` 0, `clip_qkv` 0 and `softcap` 0 mean none; `scale` 0 means 1 / sqrt(head_dim).
    """

    position: Position = Position()
    window: int = 0
    qk_norm: QkNorm | None = None
    clip_qkv: float = 0.0
    softcap: float = 0.0
    scale: float = 0.0
    bias: bool = False

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
        mask = Mask(
            context.positions_BL, held.positions_BT, context.segments_BL, held.segments_BT, self.window
        )
        mixed_BLHC = attention(
            q_BLHC,
            k_BTKC,
            held.v_BTKC,
            mask,
            scale=self.scale or q_BLHC.shape[-1] ** -0.5,
            softcap=self.softcap,
            slopes_H=self.position.slopes(q_BLHC.shape[2]),
        )
        mixed_BLHC = checkpoint_name(mixed_BLHC, "attention")
        out_BLD = linear(mixed_BLHC, weights["out"], 2)
        if self.bias:
            out_BLD = out_BLD + spread(weights["out_bias"], out_BLD)
        return out_BLD, kv.carried()

    def project(self, weights: dict[str, Any], x_BLD: Array, context: Context) -> tuple[Array, Array, Array]:
        """Queries, keys and values, biased, clipped and normed as the knobs say, not yet rotated."""
        projected = []
        for name, heads in (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads")):
            y_BLHC = linear(x_BLD, weights[name])
            if self.bias:
                y_BLHC = y_BLHC + spread(weights[f"{name}_bias"], y_BLHC)
            if self.clip_qkv:
                y_BLHC = jnp.clip(y_BLHC, -self.clip_qkv, self.clip_qkv)
            if self.qk_norm is not None and name != "value":
                y_BLHC = self.qk_norm.norm.apply(weights[f"{name}_norm"], y_BLHC, context.dtypes)
            projected.append(
                context.layout.constrain(checkpoint_name(y_BLHC, "qkv"), BATCH, None, heads, None)
            )
        return projected[0], projected[1], projected[2]

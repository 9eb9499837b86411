"""One layer of a decoder: attention and MLP, normed before and added to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from mosaicjax.layers.attention import Attention
from mosaicjax.layers.context import KV, Context, dropout, skipped
from mosaicjax.layers.inits import InitRule
from mosaicjax.layers.mlp import Mlp
from mosaicjax.layers.norm import LayerNorm, Norm
from mosaicjax.layers.routing import RouterSums
from mosaicjax.spec import Constant, Param


@dataclass(frozen=True)
class StreamScales:
    """Learned numbers of each layer: it reads `keep * x + first * x_0`, x_0 the stream before any layer.

    Source: modded-nanogpt's residual and input-skip scalars, https://github.com/KellerJordan/modded-nanogpt.
    """

    keep: float = 1.0
    first: float = 0.0

    def params(self) -> dict[str, Any]:
        """Weights of one layer, and where they start."""
        return {name: Param((), Constant(start), decay=False) for name, start in vars(self).items()}

    def apply(self, weights: dict[str, Any], x_BLD: Array, context: Context) -> Array:
        """The layer's input, [B, L, D]."""
        assert context.first_BLD is not None
        return weights["keep"] * x_BLD + weights["first"] * context.first_BLD


@dataclass(frozen=True)
class Block:
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, each addend dropped out in training.

    `scales` come before both. `stochastic_depth` is the share of rows for which each addend of the last layer
    is left out in training; the layers before it leave out fewer, the first none.
    """

    attention: Attention = Attention()
    mlp: Mlp = Mlp()
    norm: Norm = LayerNorm(bias=False)
    dropout: float = 0.0
    scales: StreamScales | None = None
    stochastic_depth: float = 0.0

    @property
    def drops(self) -> bool:
        """Whether anything is left out in training."""
        return self.dropout > 0 or self.stochastic_depth > 0

    def thinned(self, added_BLD: Array, context: Context, place: int) -> Array:
        """What is added to the stream, with what training leaves out of it left out."""
        added_BLD = dropout(added_BLD, self.dropout, context, place)
        return skipped(added_BLD, self.stochastic_depth, context, 2 + place)

    @property
    def read_by_stream(self) -> tuple[str, ...]:
        """Weights whose products are added to the residual stream, and read by nothing else in the block."""
        return self._of_mlp

    @property
    def _of_mlp(self) -> tuple[str, ...]:
        return tuple(f"mlp/{name}" for name in self.mlp.read_by_stream)

    def params(self, init: InitRule, layers: int) -> dict[str, Any]:
        """Weights of one layer in a model of so many."""
        return {
            "attention_norm": self.norm.params(("embed",)),
            "attention": self.attention.params(init, layers),
            "mlp_norm": self.norm.params(("embed",)),
            "mlp": self.mlp.params(init, layers),
        } | ({"scales": self.scales.params()} if self.scales else {})

    def scaled(self, weights: dict[str, Any], x_BLD: Array, context: Context) -> Array:
        """What the layer reads."""
        if self.scales is None:
            return x_BLD
        return context.constrain(self.scales.apply(weights["scales"], x_BLD, context))

    def apply(
        self, weights: dict[str, Any], x_BLD: Array, context: Context, kv: KV, layer: Array | int
    ) -> tuple[Array, KV, RouterSums | None]:
        """The residual stream after the layer, the keys and values to carry on, and what a router did.

        Shapes: x and the result [B, L, D]; weights are whole and in the compute dtype.
        """
        x_BLD = self.scaled(weights, x_BLD, context)
        with jax.named_scope("attention"):
            normed = context.whole(self.norm.apply(weights["attention_norm"], x_BLD, context.dtypes))
            mixed, kv = self.attention.apply(weights["attention"], normed, context, kv, layer)
        x_BLD = context.constrain(x_BLD + self.thinned(mixed, context, place=0))
        with jax.named_scope("mlp"):
            normed = context.whole(self.norm.apply(weights["mlp_norm"], x_BLD, context.dtypes))
            worked, routed = self.mlp.routed(weights["mlp"], normed, context)
        return context.constrain(x_BLD + self.thinned(worked, context, place=1)), kv, routed


@dataclass(frozen=True)
class ParallelBlock(Block):
    """`x + attention(norm(x)) + mlp(norm(x))`: both read the same stream.

    With `shared_norm` there is one norm for both (GPT-J), else each has its own (GPT-NeoX).

    Source: Wang and Komatsuzaki 2021, GPT-J-6B; Black et al. 2022, arXiv 2204.06745, section 2.1.
    """

    shared_norm: bool = False

    @property
    def read_by_stream(self) -> tuple[str, ...]:
        """See `Block.read_by_stream`."""
        return ("attention/out", *self._of_mlp)

    def params(self, init: InitRule, layers: int) -> dict[str, Any]:
        """See `Block.params`."""
        tree = super().params(init, layers)
        if self.shared_norm:
            tree["norm"] = tree.pop("attention_norm")
            del tree["mlp_norm"]
        return tree

    def apply(
        self, weights: dict[str, Any], x_BLD: Array, context: Context, kv: KV, layer: Array | int
    ) -> tuple[Array, KV, RouterSums | None]:
        """See `Block.apply`."""
        x_BLD = self.scaled(weights, x_BLD, context)
        first = "norm" if self.shared_norm else "attention_norm"
        with jax.named_scope("attention"):
            normed = context.whole(self.norm.apply(weights[first], x_BLD, context.dtypes))
            mixed, kv = self.attention.apply(weights["attention"], normed, context, kv, layer)
        with jax.named_scope("mlp"):
            if not self.shared_norm:
                normed = context.whole(self.norm.apply(weights["mlp_norm"], x_BLD, context.dtypes))
            worked, routed = self.mlp.routed(weights["mlp"], normed, context)
        added = self.thinned(mixed, context, place=0) + self.thinned(worked, context, place=1)
        return context.constrain(x_BLD + added), kv, routed

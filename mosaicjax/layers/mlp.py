"""The part of a block that works on each position alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mosaicjax.layers.context import Context
from mosaicjax.layers.inits import InitRule
from mosaicjax.layers.linear import from_inputs, linear
from mosaicjax.layers.norm import spread
from mosaicjax.layers.routing import RouterSums
from mosaicjax.mesh import BATCH
from mosaicjax.spec import ZEROS, Dims, Param


class Activation(Enum):
    """The nonlinearity between the matrices."""

    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SILU = "silu"
    RELU = "relu"
    RELU_SQUARED = "relu_squared"
    SIGMOID = "sigmoid"

    def apply(self, x: Array) -> Array:
        """Elementwise; GELU is exact (by erf), GELU_TANH its tanh approximation.

        Source: RELU_SQUARED: So et al. 2021 (Primer), arXiv 2109.08668.
        """
        match self:
            case Activation.GELU:
                return from_inputs(partial(jax.nn.gelu, approximate=False), x)
            case Activation.GELU_TANH:
                return from_inputs(partial(jax.nn.gelu, approximate=True), x)
            case Activation.SILU:
                return from_inputs(jax.nn.silu, x)
            case Activation.RELU:
                return jax.nn.relu(x)
            case Activation.RELU_SQUARED:
                return from_inputs(lambda x: jnp.square(jax.nn.relu(x)), x)
            case Activation.SIGMOID:
                return jax.nn.sigmoid(x)


@dataclass(frozen=True)
class Mlp:
    """Up to the `mlp` dim, nonlinearity, down again."""

    activation: Activation = Activation.GELU
    bias: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the matrices that read the residual stream."""
        return ("up",)

    @property
    def read_by_stream(self) -> tuple[str, ...]:
        """Weights whose products are the layer's result as they are."""
        return ("down",)

    def check(self, dims: Dims) -> None:
        """Refuse knobs that cannot be, in a model of these sizes.

        Raises:
            InputError: with expected and got.
        """

    def active(self, dims: Dims) -> float:
        """What share of the experts' weights one token meets; 1 where there are none."""
        return 1.0

    def params(self, init: InitRule, layers: int) -> dict[str, Any]:
        """Weights of one layer in a model of so many."""
        tree = {name: Param(("embed", "mlp"), init.matrix(("embed",))) for name in self.inputs}
        tree["down"] = Param(("mlp", "embed"), init.residual(("mlp",), layers))
        if self.bias:
            tree |= {f"{name}_bias": Param(("mlp",), ZEROS, decay=False) for name in self.inputs}
            tree["down_bias"] = Param(("embed",), ZEROS, decay=False)
        return tree

    def apply(self, weights: dict[str, Any], x_BLD: Array, context: Context) -> Array:
        """Shapes: x and the result [B, L, D]."""
        hidden_BLF = self.combine({name: self.read(name, weights, x_BLD, context) for name in self.inputs})
        out_BLD = linear(hidden_BLF, weights["down"])
        return out_BLD + spread(weights["down_bias"], out_BLD) if self.bias else out_BLD

    def routed(
        self, weights: dict[str, Any], x_BLD: Array, context: Context
    ) -> tuple[Array, RouterSums | None]:
        """What `apply` gives, and what a router did with the tokens, where there is one."""
        return self.apply(weights, x_BLD, context), None

    def read(self, name: str, weights: dict[str, Any], x_BLD: Array, context: Context) -> Array:
        """One matrix's view of the residual stream, [B, L, F]."""
        y_BLF = linear(x_BLD, weights[name])
        if self.bias:
            y_BLF = y_BLF + spread(weights[f"{name}_bias"], y_BLF)
        return context.layout.constrain(checkpoint_name(y_BLF, "mlp"), BATCH, None, "mlp")

    def combine(self, read: dict[str, Array]) -> Array:
        """The hidden layer from what the input matrices gave."""
        return self.activation.apply(read["up"])


@jax.custom_vjp
def settled(x: Array) -> Array:
    """x itself, whose gradient is computed once and kept.

    Two products read it, one for the weight and one for the stream, and XLA for TPUs would compute a gate's
    gradient anew for each of their tiles: at 8,192 tokens a chip, embed 8,192 and mlp 28,672 that made the
    products of the backward pass half as long again, by the compiler's estimate.
    """
    return x


settled.defvjp(lambda x: (x, None), lambda _, grad: (jax.lax.optimization_barrier(grad),))


@dataclass(frozen=True)
class Glu(Mlp):
    """The nonlinearity of one matrix's view gates another's.

    Source: Shazeer 2020, arXiv 2002.05202.
    """

    @property
    def inputs(self) -> tuple[str, ...]:
        """See `Mlp.inputs`."""
        return ("gate", "up")

    def combine(self, read: dict[str, Array]) -> Array:
        """See `Mlp.combine`."""
        return self.activation.apply(settled(read["gate"])) * settled(read["up"])

"""Normalisation over the last dims: those that the norm's weights have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.errors import InputError
from mosaicjax.layers.linear import from_inputs
from mosaicjax.spec import ONES, ZEROS, Dtypes, Param


@dataclass(frozen=True)
class Norm:
    """A norm; `axes` names the dims that it scales. Norm weights are not decayed."""

    eps: float = 1e-5

    def check(self) -> None:
        """Raises: InputError: a negative eps."""
        if self.eps < 0:
            raise InputError("norm eps", expected="0 or more", got=self.eps)

    def params(self, axes: tuple[str, ...]) -> dict[str, Param]:
        """The weights of a norm over tensors that end in `axes`, all of which are normalised together."""
        raise TypeError(f"{type(self).__name__} does not declare its weights")

    def apply(self, weights: dict[str, Array], x: Array, dtypes: Dtypes) -> Array:
        """Normalise the dims that the weights have; the result has x's dtype."""
        raise TypeError(f"{type(self).__name__} cannot be applied")


@dataclass(frozen=True)
class LayerNorm(Norm):
    """Mean 0, variance 1, scaled and, with `bias`, shifted.

    `low_precision` computes in the dtype of the residual stream instead of the reduce dtype, as
    llm-foundry's `low_precision_layernorm` does.
    """

    bias: bool = True
    low_precision: bool = False

    def params(self, axes: tuple[str, ...]) -> dict[str, Param]:
        """See `Norm.params`."""
        shift = {"bias": Param(axes, ZEROS, decay=False)} if self.bias else {}
        return {"scale": Param(axes, ONES, decay=False), **shift}

    def apply(self, weights: dict[str, Array], x: Array, dtypes: Dtypes) -> Array:
        """See `Norm.apply`."""
        return from_inputs(partial(self._normalised, dtypes), weights, x)

    def _normalised(self, dtypes: Dtypes, weights: dict[str, Array], x: Array) -> Array:
        inner = x.dtype if self.low_precision else jnp.dtype(dtypes.reduce)
        wide = x.astype(inner)
        last = last_dims(weights["scale"])
        centred = wide - jnp.mean(wide, axis=last, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=last, keepdims=True)
        out = centred * jax.lax.rsqrt(variance + self.eps) * spread(weights["scale"], wide)
        if self.bias:
            out = out + spread(weights["bias"], wide)
        return out.astype(x.dtype)


@dataclass(frozen=True)
class RmsNorm(Norm):
    """Root mean square 1, scaled.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    def params(self, axes: tuple[str, ...]) -> dict[str, Param]:
        """See `Norm.params`."""
        return {"scale": Param(axes, ONES, decay=False)}

    def apply(self, weights: dict[str, Array], x: Array, dtypes: Dtypes) -> Array:
        """See `Norm.apply`."""
        return from_inputs(partial(self._normalised, dtypes), weights, x)

    def _normalised(self, dtypes: Dtypes, weights: dict[str, Array], x: Array) -> Array:
        wide = x.astype(dtypes.reduce)
        mean_square = jnp.mean(jnp.square(wide), axis=last_dims(weights["scale"]), keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * spread(weights["scale"], wide)).astype(x.dtype)


def spread(weight: Array, x: Array) -> Array:
    """A weight over x's last dims, cast and reshaped to be multiplied with it."""
    return weight.astype(x.dtype).reshape((1,) * (x.ndim - weight.ndim) + weight.shape)


def last_dims(weight: Array) -> tuple[int, ...]:
    """The last dims, as many as the weight has, counted from the end."""
    return tuple(range(-weight.ndim, 0))

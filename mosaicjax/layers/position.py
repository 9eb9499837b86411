"""How a model knows where a token stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from mosaicjax.errors import InputError
from mosaicjax.spec import Init, Param, at_least_float32


@dataclass(frozen=True)
class Position:
    """No notion of position beside the causal mask; the parent of the others.

    A position takes part in three places: weights added to the embeddings (`params`, `embed`), rotation of
    queries and keys (`rotates`, `rotate`), and a slope a head on attention's scores (`slopes`).
    """

    @property
    def dims(self) -> dict[str, int]:
        """Sizes of the dims that its weights add."""
        return {}

    def params(self, init: Init) -> dict[str, Param]:
        """Weights beside the embedding table."""
        return {}

    def embed(self, weights: dict[str, Array], x_BLD: Array, positions_BL: Array) -> Array:
        """Embeddings with the position added."""
        return x_BLD

    @property
    def rotates(self) -> bool:
        """Whether queries and keys are rotated."""
        return False

    @property
    def rotation_depends_on_length(self) -> bool:
        """Whether a key's rotation changes as the sequence grows, so that a cache must hold it unrotated."""
        return False

    def rotate(self, x_BLHC: Array, positions_BL: Array, length_BL: Array) -> Array:
        """Queries or keys turned by their position.

        Shapes: `length_BL` [B or 1, L or 1], how long the sequence that each belongs to is by now.
        """
        return x_BLHC

    def slopes(self, heads: int) -> Array | None:
        """What a position of distance costs each head, [H], or None."""
        return None

    def check(self, length: int, head_dim: int) -> None:
        """Refuse knobs that cannot be, and rows longer than the positions reach."""


@dataclass(frozen=True)
class Learned(Position):
    """A learned vector for each of `length` positions, added to the embedding."""

    length: int = 2_048

    @property
    def dims(self) -> dict[str, int]:
        """See `Position.dims`."""
        return {"position": self.length}

    def params(self, init: Init) -> dict[str, Param]:
        """See `Position.params`."""
        return {"positions": Param(("position", "embed"), init)}

    def embed(self, weights: dict[str, Array], x_BLD: Array, positions_BL: Array) -> Array:
        """See `Position.embed`."""
        return x_BLD + jnp.take(weights["positions"], positions_BL, axis=0, mode="clip")

    def check(self, length: int, head_dim: int) -> None:
        """See `Position.check`."""
        if length > self.length:
            raise InputError(
                "rows are longer than the learned positions",
                expected=f"at most {self.length}",
                got=length,
                fix="a shorter seq, or Learned(length=...)",
            )


def alibi_slopes(heads: int, max_bias: float) -> list[float]:
    """ALiBi's slope for each head: the powers of 2**(-max_bias / n), n the next power of two.

    Where `heads` is no power of two, the odd powers of the finer series come first, then the even ones,
    as MPT takes them.

    Source: Press et al. 2022, arXiv 2108.12409, section 3; llm-foundry `gen_slopes`.
    """
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-(i + 1) * max_bias / power) for i in range(power)]
    return slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads]


@dataclass(frozen=True)
class Alibi(Position):
    """A penalty on attention's scores that grows with distance, another for each head.

    Source: Press et al. 2022, arXiv 2108.12409.
    """

    max_bias: float = 8.0

    def check(self, length: int, head_dim: int) -> None:
        """See `Position.check`."""
        if self.max_bias <= 0:
            raise InputError("Alibi.max_bias", expected="above 0", got=self.max_bias)

    def slopes(self, heads: int) -> Array | None:
        """See `Position.slopes`."""
        return jnp.asarray(alibi_slopes(heads, self.max_bias), jnp.float32)


@dataclass(frozen=True)
class RopeScaling:
    """No scaling of rotary frequencies; the parent of the others."""

    def check(self, dim: int) -> None:
        """Refuse knobs that cannot be, for so many rotated dims of a head."""

    def frequencies(self, theta: float, dim: int, length_BL: Array) -> Array:
        """Units: radians a position.

        Shapes: like `length_BL` and then dim / 2, highest frequency first.
        """
        # Constants, rounded at each step as checkpoints' own code does: XLA would write the division as a
        # power, whose last bit is another, and at position 50,000 that moves logits by 1e-4.
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        plain = np.float32(1) / np.float32(theta) ** exponents
        return jnp.broadcast_to(jnp.asarray(plain), (*length_BL.shape, dim // 2))

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the sequence's length."""
        return False


def inverse_frequencies(theta_BL: Array, dim: int) -> Array:
    """`theta ** (-2 i / dim)` for i below dim / 2."""
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    return theta_BL[:, :, None] ** -exponents[None, None]


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Positions divided by `factor`.

    Source: Chen et al. 2023, arXiv 2306.15595.
    """

    factor: float = 1.0

    def check(self, dim: int) -> None:
        """See `RopeScaling.check`."""
        if self.factor <= 0:
            raise InputError("LinearScaling.factor", expected="above 0", got=self.factor)

    def frequencies(self, theta: float, dim: int, length_BL: Array) -> Array:
        """See `RopeScaling.frequencies`."""
        return super().frequencies(theta, dim, length_BL) / self.factor


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """Theta grown with the sequence once that is longer than `original`: NTK-aware scaling.

    A query and the keys it sees are turned by the frequencies of the length that the sequence has by then;
    in training, that is the length of the row, or of the document in a packed row.

    Source: the `dynamic` rope type of Hugging Face Transformers.
    """

    factor: float = 1.0
    original: int = 2_048

    def check(self, dim: int) -> None:
        """See `RopeScaling.check`."""
        if self.factor < 1 or self.original < 1:
            raise InputError(
                "DynamicScaling factor and original", expected="1 or more", got=(self.factor, self.original)
            )
        if dim <= 2:
            raise InputError("rotary dims of a head under DynamicScaling", expected="4 or more", got=dim)

    def frequencies(self, theta: float, dim: int, length_BL: Array) -> Array:
        """See `RopeScaling.frequencies`."""
        length = jnp.maximum(length_BL, self.original).astype(jnp.float32)
        stretch = self.factor * length / self.original - (self.factor - 1.0)
        return inverse_frequencies(theta * stretch ** (dim / (dim - 2)), dim)

    @property
    def depends_on_length(self) -> bool:
        """See `RopeScaling.depends_on_length`."""
        return True


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Low frequencies divided by `factor`, high ones kept, those between blended.

    Source: Meta's llama-models `apply_scaling`; the `llama3` rope type of Hugging Face Transformers.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8_192

    def check(self, dim: int) -> None:
        """See `RopeScaling.check`."""
        if self.factor <= 0 or self.original < 1:
            raise InputError(
                "Llama3Scaling factor and original", expected="above 0", got=(self.factor, self.original)
            )
        if not 0 < self.low < self.high:
            raise InputError(
                "Llama3Scaling", expected="0 < low < high", got=f"low {self.low}, high {self.high}"
            )

    def frequencies(self, theta: float, dim: int, length_BL: Array) -> Array:
        """See `RopeScaling.frequencies`."""
        plain = super().frequencies(theta, dim, length_BL)
        turns = self.original * plain / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return kept * plain + (1.0 - kept) * plain / self.factor


@dataclass(frozen=True)
class Rotary(Position):
    """Queries and keys turned by an angle that grows with position, in pairs of dims.

    `fraction` of each head's dims are turned, the first ones. Dim i is paired with i + dim / 2 (`halves`:
    GPT-NeoX, Llama), or 2 i with 2 i + 1 (`adjacent`: GPT-J, and the paper).

    Source: Su et al. 2021, arXiv 2104.09864.
    """

    theta: float = 10_000.0
    scaling: RopeScaling = RopeScaling()
    fraction: float = 1.0
    pairs: Literal["halves", "adjacent"] = "halves"

    def turned(self, head_dim: int) -> int:
        """How many of a head's dims are rotated."""
        return round(head_dim * self.fraction)

    def check(self, length: int, head_dim: int) -> None:
        """See `Position.check`."""
        dim = self.turned(head_dim)
        if self.theta <= 0:
            raise InputError("Rotary.theta", expected="above 0", got=self.theta)
        if not 2 <= dim <= head_dim or dim % 2:
            raise InputError("rotary dims of a head", expected="an even number", got=f"{dim} of {head_dim}")
        self.scaling.check(dim)

    @property
    def rotates(self) -> bool:
        """See `Position.rotates`."""
        return True

    @property
    def rotation_depends_on_length(self) -> bool:
        """See `Position.rotation_depends_on_length`."""
        return self.scaling.depends_on_length

    def rotate(self, x_BLHC: Array, positions_BL: Array, length_BL: Array) -> Array:
        """See `Position.rotate`; angles are float32."""
        dim = self.turned(x_BLHC.shape[-1])
        frequencies = self.scaling.frequencies(self.theta, dim, length_BL)
        angles = positions_BL.astype(jnp.float32)[:, :, None, None] * frequencies[:, :, None, :]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        paired, rest = jnp.split(x_BLHC, (dim,), axis=-1)
        axis = -2 if self.pairs == "halves" else -1
        shape = (2, dim // 2) if self.pairs == "halves" else (dim // 2, 2)
        wide = at_least_float32(x_BLHC.dtype)
        both = paired.astype(wide).reshape(*paired.shape[:-1], *shape)
        first, second = (jnp.take(both, i, axis=axis) for i in (0, 1))
        cos, sin = cos.astype(wide), sin.astype(wide)
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=axis)
        return jnp.concatenate([turned.reshape(paired.shape).astype(x_BLHC.dtype), rest], axis=-1)

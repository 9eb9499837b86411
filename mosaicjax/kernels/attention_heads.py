"""One key head's part of arrays that hold all heads, tokens before heads: read and written where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Arrays = dict[str, Array]

# For each array by its name: the axes of heads and of tokens, after an axis B.
AXES: dict[str, tuple[int | None, int | None]] = {
    "q": (2, 1),
    "k": (2, 1),
    "v": (2, 1),
    "grad": (2, 1),
    "out": (2, 1),
    "lse": (1, 2),
    "delta": (1, 2),
    "slopes": (1, None),
    "sinks": (1, None),
    "q_segments": (None, 1),
    "k_segments": (None, 1),
    "offset": (None, None),
    "bounds": (None, None),
}


@dataclass(frozen=True)
class Head:
    """The k-th of K key heads of row b, and its G query heads, in arrays that hold all of them."""

    arrays: Arrays
    b: Array | int
    k: Array | int
    K: int

    def whole(self, name: str) -> Array:
        """Its part of an array."""
        begin, sizes, _ = self._place(name, self.arrays[name])
        return jax.lax.dynamic_slice(self.arrays[name], begin, sizes)[0]

    def tokens(self, name: str, first: Array | int, count: int, fill: float = 0) -> Array:
        """`count` tokens of it: [heads, count, channels], [heads, count] or [count]; past the end `fill`."""
        x = self.arrays[name]
        begin, sizes, axis = self._place(name, x)
        length = x.shape[axis]
        late = _overlap(first, count, length)
        begin[axis], sizes[axis] = first if late is None else first - late, count
        part = jax.lax.dynamic_slice(x, begin, sizes)[0]
        if late is not None:
            filled = jnp.concatenate([part, jnp.full_like(part, fill)], axis=axis - 1)
            part = jax.lax.dynamic_slice_in_dim(filled, late, count, axis=axis - 1)
        return part.swapaxes(0, 1) if axis == 1 and part.ndim == 3 else part

    def put(self, wholes: Arrays, first: Array | int, **parts: Array) -> Arrays:
        """`wholes` with parts of this head in their place, from token `first` on, less what is past the end.

        Parts are as `tokens` gives them, those of one key head [tokens, channels].
        """
        return wholes | {name: self._put(name, wholes[name], part, first) for name, part in parts.items()}

    def _put(self, name: str, whole: Array, part: Array, first: Array | int) -> Array:
        begin, sizes, axis = self._place(name, whole)
        if AXES[name] == (2, 1):
            part = part[:, None] if part.ndim == 2 else part.swapaxes(0, 1)
        if axis:
            count, length = part.shape[axis - 1], whole.shape[axis]
            late = _overlap(first, count, length)
            begin[axis], sizes[axis] = first, count
            if late is not None:
                begin[axis] = first - late
                held = jax.lax.dynamic_slice(whole, begin, sizes)[0]
                moved = jnp.concatenate([held, part], axis=axis - 1)
                moved = jax.lax.dynamic_slice_in_dim(moved, count - late, count, axis=axis - 1)
                place = jax.lax.broadcasted_iota(jnp.int32, part.shape, axis - 1)
                part = jnp.where(place < late, held, moved)
        return jax.lax.dynamic_update_slice(whole, part[None], begin)

    def _place(self, name: str, x: Array) -> tuple[list[Any], list[int], int]:
        """Where it begins, how large it is, and the axis of tokens, 0 where there is none."""
        heads, tokens = AXES[name]
        begin: list[Any] = [self.b, *[0] * (x.ndim - 1)]
        sizes = [1, *x.shape[1:]]
        if heads is not None:
            sizes[heads] = x.shape[heads] // self.K
            begin[heads] = self.k * sizes[heads]
        return begin, sizes, tokens or 0


def split(name: str, x: Array, K: int) -> Array:
    """Each of K key heads' part of the array of that name as one of its own: [B x K, 1, ...]."""
    heads, _ = AXES[name]
    if heads is None:
        return jnp.repeat(x, K, axis=0)[:, None]
    parts = jnp.moveaxis(x.reshape(*x.shape[:heads], K, -1, *x.shape[heads + 1 :]), heads, 1)
    return parts.reshape(-1, 1, *parts.shape[2:])


def merged(name: str, parts: Array, B: int, K: int) -> Array:
    """The other way: [B x K, 1, ...] as the array of that name, which must have heads."""
    heads, _ = AXES[name]
    assert heads is not None
    moved = jnp.moveaxis(parts.reshape(B, K, *parts.shape[2:]), 1, heads)
    return moved.reshape(*moved.shape[:heads], -1, *moved.shape[heads + 2 :])


def _overlap(first: Array | int, count: int, length: int) -> Array | None:
    """How much earlier `count` tokens from `first` must begin to end within `length`; None: never."""
    if length % count == 0:
        return None
    return jnp.asarray(first - jnp.minimum(first, length - count), jnp.int32)

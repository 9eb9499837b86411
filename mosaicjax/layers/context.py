"""What every layer is told of the rows it works on, and where keys and values are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.mesh import BATCH, LENGTH, Layout
from mosaicjax.spec import Dtypes


@dataclass(frozen=True)
class Context:
    """One call's rows and surroundings, the same for all layers.

    `weights_BL` is what the rows' targets count in a loss, None where there is none. `keys_B` holds one key a
    row and is None where nothing is dropped (evaluation, generation): randomness belongs to the row, so that
    neither the mesh nor the microbatch changes it.

    Within a segment tokens follow one another, and positions count them: attention goes by places in the row.

    What layers read of the tokens themselves: `first_BLD` is the residual stream before the first layer,
    `values` the value tables' entries of each token, `before_B` the tokens before the rows' first ones, where
    they go on from others. `tokens_BL` is what the model makes them of. `depth` is how deep the layer lies, 0
    the first and 1 the last.

    Shapes: `positions_BL` and `segments_BL` [B or 1, L]; segments None means one segment without padding;
    `values` [B, L, K, C] each.
    """

    layout: Layout
    dtypes: Dtypes
    positions_BL: Array
    segments_BL: Array | None = None
    keys_B: Array | None = None
    weights_BL: Array | None = None
    tokens_BL: Array | None = None
    before_B: Array | None = None
    first_BLD: Array | None = None
    values: tuple[Array, ...] = ()
    depth: Array | float = 0.0

    def counted(self, rows: tuple[int, ...]) -> Array:
        """Which tokens statistics are made of: no padding, and no rows without weight.

        Shapes: bool, of the shape `rows`, [B, L].
        """
        counted_BL = jnp.ones((1, 1), bool) if self.segments_BL is None else self.segments_BL > 0
        if self.weights_BL is not None:
            counted_BL = counted_BL & jnp.any(self.weights_BL > 0, axis=1, keepdims=True)
        return jnp.broadcast_to(counted_BL, rows)

    def for_layer(self, index: Array | int) -> Context:
        """This context with the rows' keys made the layer's own; the embedding is 0, layers count from 1."""
        if self.keys_B is None:
            return self
        return replace(self, keys_B=jax.vmap(lambda key: jax.random.fold_in(key, index))(self.keys_B))

    def lengths(self, segments_BT: Array | None) -> Array:
        """How long each of these segments is by now, as far as the context's positions go.

        Shapes: [B or 1, T], or [B or 1, 1] where all is one segment.
        """
        if segments_BT is None or self.segments_BL is None:
            return jnp.max(self.positions_BL, axis=1, keepdims=True) + 1
        same_BTL = segments_BT[:, :, None] == self.segments_BL[:, None, :]
        return jnp.max(jnp.where(same_BTL, self.positions_BL[:, None, :], 0), axis=2) + 1

    def constrain(self, x_BLD: Array) -> Array:
        """Keep the residual stream split by rows, and those by tensor shards where they divide evenly.

        What tensor shards sum is then scattered instead of copied to all, norms are computed once, and a
        layer's input takes less memory where it is kept.

        Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2.
        """
        length = LENGTH if x_BLD.shape[1] % self.layout.mesh.shape["tensor"] == 0 else None
        return self.layout.constrain(x_BLD, BATCH, length, None)

    def whole(self, x_BLD: Array) -> Array:
        """What `constrain` split, as it is (in its dtype, and no sooner), whole along its rows."""
        return self.layout.constrain(self.constrain(x_BLD), BATCH, None, None)


def dropout(x_BLD: Array, rate: float, context: Context, place: int) -> Array:
    """Zero a share `rate` of the entries and scale up the others; nothing where the context has no keys.

    `place` tells the dropouts of one layer apart.
    """
    if rate == 0.0 or context.keys_B is None:
        return x_BLD

    def keep(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, place), 1.0 - rate, x_BLD.shape[1:])

    scale = jnp.asarray(1.0 / (1.0 - rate), x_BLD.dtype)
    return jnp.where(jax.vmap(keep)(context.keys_B), x_BLD * scale, jnp.zeros_like(x_BLD))


def skipped(x_BLD: Array, rate: float, context: Context, place: int) -> Array:
    """Zero whole rows, a share `rate * depth` of them, and scale up the others; none where there are no keys.

    Source: Huang et al. 2016, arXiv 1603.09382, sections 3 and 4: survival falls on a line over the layers.
    """
    if rate == 0.0 or context.keys_B is None:
        return x_BLD
    kept = 1.0 - rate * jnp.asarray(context.depth, jnp.float32)

    def keep(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, place), kept)

    factor_B = jnp.where(jax.vmap(keep)(context.keys_B), 1.0 / kept, 0.0)
    return x_BLD * factor_B[:, None, None].astype(x_BLD.dtype)


@dataclass(frozen=True)
class Stored:
    """A layer's keys and values where generation keeps them, for one query a sequence.

    The token at position p lies in slot p; the first `lengths_B` slots hold a sequence's tokens, the query's
    own among them as the last.

    Shapes: k and v [N, B, K, T, C] of all layers; lengths int32 [B]; `layer` an int or int32 [].
    """

    k_NBKTC: Array
    v_NBKTC: Array
    lengths_B: Array
    layer: Array | int


@dataclass(frozen=True)
class Paged:
    """A layer's keys and values in pages, as `paged_attention` takes them; padding is at positions below 0.

    Shapes: k and v [N, P, K, S, C] of all layers; tables int32 [B, M]; positions int32 [B, L]; `layer` an int
    or int32 [].
    """

    k_NPKSC: Array
    v_NPKSC: Array
    tables_BM: Array
    positions_BL: Array
    layer: Array | int


@dataclass(frozen=True)
class Held:
    """Keys and values to attend to, with where they stand.

    `offset` is the place among the keys of the context's first token: place less place is position less
    position for any two tokens of a segment. `stored` is where the same lie, if the context has one token a
    sequence and they can be read there; `paged` is where they lie in pages.

    Shapes: k and v [B, T, K, C]; positions and segments [B or 1, T]; `offset` an int or int32 [B].
    """

    k_BTKC: Array
    v_BTKC: Array
    positions_BT: Array
    segments_BT: Array | None
    offset: Array | int = 0
    stored: Stored | None = None
    paged: Paged | None = None


class KV(Protocol):
    """Where attention puts keys and values, and from where it reads them back."""

    def append(self, layer: Array | int, k_BLKC: Array, v_BLKC: Array, context: Context) -> Self:
        """Add a layer's keys and values of the context's rows."""
        ...

    def view(self, layer: Array | int, context: Context) -> Held:
        """All that the layer's queries may look at."""
        ...

    def carried(self) -> Self:
        """What goes on to the next layer."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowOnly:
    """Training's `KV`: a row looks at itself, and nothing is kept."""

    k_BLKC: Array | None = None
    v_BLKC: Array | None = None

    def append(self, layer: Array | int, k_BLKC: Array, v_BLKC: Array, context: Context) -> RowOnly:
        """See `KV.append`."""
        return RowOnly(k_BLKC, v_BLKC)

    def view(self, layer: Array | int, context: Context) -> Held:
        """See `KV.view`."""
        assert self.k_BLKC is not None and self.v_BLKC is not None, "append comes before view"
        return Held(self.k_BLKC, self.v_BLKC, context.positions_BL, context.segments_BL)

    def carried(self) -> RowOnly:
        """See `KV.carried`."""
        return RowOnly()

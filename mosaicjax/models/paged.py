"""Serving's step as a pure function: rows of requests, prompts and single tokens alike, over pages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.layers.context import Context, Held, Paged
from mosaicjax.mesh import Layout
from mosaicjax.models.decoder import Decoder, Remat
from mosaicjax.spec import Dtypes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """The pages of all layers of one block: serving's `KV`, with the tables of the call under way.

    Tokens of segment 0 are written nowhere.

    Shapes: k and v [N, P, K, S, C]; tables int32 [B, M].
    """

    k_NPKSC: Array
    v_NPKSC: Array
    tables_BM: Array

    def append(self, layer: Array | int, k_BLKC: Array, v_BLKC: Array, context: Context) -> Pool:
        """See `KV.append`: each token goes where its row's table says."""
        assert context.segments_BL is not None, "tokens that are none must be told from others"
        size = self.k_NPKSC.shape[3]
        pages_BL = jnp.take_along_axis(self.tables_BM, context.positions_BL // size, axis=1)
        # Beyond the last page, where nothing is written.
        pages_BL = jnp.where(context.segments_BL > 0, pages_BL, self.k_NPKSC.shape[1])
        at = (jnp.asarray(layer, jnp.int32), pages_BL, slice(None), context.positions_BL % size)
        return replace(
            self,
            k_NPKSC=_placed(self.k_NPKSC.at[at].set(k_BLKC, mode="drop"), context.layout),
            v_NPKSC=_placed(self.v_NPKSC.at[at].set(v_BLKC, mode="drop"), context.layout),
        )

    def view(self, layer: Array | int, context: Context) -> Held:
        """See `KV.view`: the pages where they lie, and the same in order, for what cannot read them there."""
        assert context.segments_BL is not None
        (_, _, K, S, C), (B, M) = self.k_NPKSC.shape, self.tables_BM.shape

        def ordered(x_NPKSC: Array) -> Array:
            x_BMKSC = x_NPKSC.at[layer, self.tables_BM].get(mode="clip")
            return x_BMKSC.transpose(0, 1, 3, 2, 4).reshape(B, M * S, K, C)

        slots_BT = jnp.arange(M * S, dtype=jnp.int32)[None]
        last_B1 = jnp.max(jnp.where(context.segments_BL > 0, context.positions_BL, -1), axis=1, keepdims=True)
        held = (slots_BT <= last_B1).astype(jnp.int32)
        positions_BL = jnp.where(context.segments_BL > 0, context.positions_BL, -1)
        paged = Paged(self.k_NPKSC, self.v_NPKSC, self.tables_BM, positions_BL, layer)
        k, v = ordered(self.k_NPKSC), ordered(self.v_NPKSC)
        return Held(k, v, slots_BT, held, context.positions_BL[:, 0], paged=paged)

    def carried(self) -> Pool:
        """See `KV.carried`."""
        return self


Pages = tuple[tuple[Array, Array], ...]
"""Keys and values [N, P, K, S, C], a pair a block, in the order of `Decoder.blocks`."""


def empty_pages(decoder: Decoder, pages: int, size: int, layout: Layout, dtypes: Dtypes) -> Pages:
    """Pages of so many tokens with nothing in them yet."""
    shape = (pages, decoder.dims["kv_heads"], size, decoder.dims["head_dim"])

    def zeros(layers: int) -> Array:
        return _placed(jnp.zeros((layers, *shape), dtypes.compute), layout)

    return tuple((zeros(layers.count), zeros(layers.count)) for _, _, _, layers in decoder.blocks())


def paged_step(
    decoder: Decoder,
    weights: Any,
    tokens_BL: Array,
    first_B: Array,
    lengths_B: Array,
    before_B: Array,
    tables_BM: Array,
    pages: Pages,
    layout: Layout,
    dtypes: Dtypes,
) -> tuple[Array, Pages]:
    """The logits [B, V] behind each row's last token, and the pages with the rows' tokens in them.

    Row b holds the next `lengths_B[b]` tokens of a request, at positions from `first_B[b]` on, padded behind;
    a row of none is nobody's, and its logits are of no use. `before_B` are the tokens before the rows' first
    ones (0 at position 0). A row's result does not depend on the others. Donate the pages, and they are
    updated in place.

    Shapes: tokens int32 [B, L]; the others int32 [B]; tables int32 [B, M], whose pages have slots for all of
    a row's positions.
    """
    steps_L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)
    positions_BL = first_B[:, None] + steps_L[None]
    segments_BL = (steps_L[None] < lengths_B[:, None]).astype(jnp.int32)
    # Padding may reach behind the last position that there is.
    positions_BL = jnp.where(segments_BL > 0, positions_BL, first_B[:, None])
    context = Context(layout, dtypes, positions_BL, segments_BL, tokens_BL=tokens_BL, before_B=before_B)
    pools = tuple(Pool(k, v, tables_BM) for k, v in pages)
    # There is no backward pass for which anything could be kept or computed again.
    decoder = replace(decoder, remat=Remat.NONE)
    output = decoder.hidden(weights, decoder.embed(weights, tokens_BL, context), context, pools)
    last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
    last_BLD = jnp.take_along_axis(output.hidden_BLD, last_B11, axis=1)
    logits_BLV = decoder.logits(decoder.head(weights, context), last_BLD, context)
    filled: Any = output.kv
    return logits_BLV[:, 0], tuple((pool.k_NPKSC, pool.v_NPKSC) for pool in filled)


def _placed(pages_NPKSC: Array, layout: Layout) -> Array:
    return layout.constrain(pages_NPKSC, None, None, "kv_heads", None, None)

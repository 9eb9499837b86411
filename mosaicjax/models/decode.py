"""Generation as pure functions: key-value caches, the pass over prompts, one step, the choice of a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.layers.context import Context, Held, Stored
from mosaicjax.mesh import BATCH, Layout
from mosaicjax.models.decoder import Decoder, Remat
from mosaicjax.spec import Dtypes

NOT_FINITE = -1
"""What `choose` gives in place of a token where the logits are not finite."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Generation's `KV`: the keys and values of all layers of one block.

    The token at position p lies in slot p, so that a slot's number is its position. The first `lengths_B`
    slots of each sequence hold its tokens, those of the call under way among them; all others are segment 0.

    `last_B` is the last of those tokens.

    Shapes: k and v [N, B, K, T, C], T slots, the order in which attention multiplies them: in any other, each
    step would copy all it reads. Lengths and tokens int32 [B].
    """

    k_NBKTC: Array
    v_NBKTC: Array
    lengths_B: Array
    last_B: Array

    def append(self, layer: Array | int, k_BLKC: Array, v_BLKC: Array, context: Context) -> Cache:
        """See `KV.append`: L slots of each sequence from the position of its first row on."""
        first_B = context.positions_BL[:, 0]
        return replace(
            self,
            k_NBKTC=_placed(_written(self.k_NBKTC, k_BLKC, layer, first_B), context.layout),
            v_NBKTC=_placed(_written(self.v_NBKTC, v_BLKC, layer, first_B), context.layout),
        )

    def view(self, layer: Array | int, context: Context) -> Held:
        """See `KV.view`."""
        slots_BT = jnp.arange(self.k_NBKTC.shape[3], dtype=jnp.int32)[None]
        segments_BT = (slots_BT < self.lengths_B[:, None]).astype(jnp.int32)
        k_BKTC = jax.lax.dynamic_index_in_dim(self.k_NBKTC, layer, keepdims=False)
        v_BKTC = jax.lax.dynamic_index_in_dim(self.v_NBKTC, layer, keepdims=False)
        k_BTKC, v_BTKC = k_BKTC.transpose(0, 2, 1, 3), v_BKTC.transpose(0, 2, 1, 3)
        one = context.positions_BL.shape[1] == 1
        stored = Stored(self.k_NBKTC, self.v_NBKTC, self.lengths_B, layer) if one else None
        return Held(k_BTKC, v_BTKC, slots_BT, segments_BT, context.positions_BL[:, 0], stored)

    def carried(self) -> Cache:
        """See `KV.carried`."""
        return self

    def grown(self, slots: int, layout: Layout) -> Cache:
        """The same with empty slots behind, `slots` in all."""
        behind = [(0, 0), (0, 0), (0, 0), (0, slots - self.k_NBKTC.shape[3]), (0, 0)]
        return replace(
            self,
            k_NBKTC=_placed(jnp.pad(self.k_NBKTC, behind), layout),
            v_NBKTC=_placed(jnp.pad(self.v_NBKTC, behind), layout),
        )


Caches = tuple[Cache, ...]
"""One `Cache` a block, in the order of `Decoder.blocks`."""


def empty_caches(decoder: Decoder, lengths_B: Array, slots: int, layout: Layout, dtypes: Dtypes) -> Caches:
    """Caches with nothing in them yet, for sequences that will have these lengths."""
    rows = (lengths_B.shape[0], decoder.dims["kv_heads"], slots, decoder.dims["head_dim"])
    return tuple(
        Cache(
            _placed(jnp.zeros((layers.count, *rows), dtypes.compute), layout),
            _placed(jnp.zeros((layers.count, *rows), dtypes.compute), layout),
            lengths_B,
            jnp.zeros_like(lengths_B),
        )
        for _, _, _, layers in decoder.blocks()
    )


def prefill(
    decoder: Decoder,
    weights: Any,
    tokens_BL: Array,
    lengths_B: Array,
    slots: int,
    layout: Layout,
    dtypes: Dtypes,
) -> tuple[Array, Caches]:
    """The logits [B, V] behind each prompt's last token, and caches of so many slots that hold the prompts.

    Shapes: prompts are padded behind to one length L, at most `slots`; `lengths_B` is int32, each 1 to L.
    """
    length = tokens_BL.shape[1]
    assert length <= slots, (length, slots)
    positions_BL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens_BL.shape)
    segments_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
    context = Context(layout, dtypes, positions_BL, segments_BL, tokens_BL=tokens_BL)
    # The prompts see caches of their own length: empty slots would cost as much attention as filled ones.
    caches = empty_caches(decoder, lengths_B, length, layout, dtypes)
    hidden_BLD, caches = _forward(decoder, weights, tokens_BL, context, caches)
    last_BLD = jnp.take_along_axis(hidden_BLD, lengths_B[:, None, None] - 1, axis=1)
    logits_BLV = decoder.logits(decoder.head(weights, context), last_BLD, context)
    end_B = jnp.take_along_axis(tokens_BL, lengths_B[:, None] - 1, axis=1)[:, 0]
    return logits_BLV[:, 0], tuple(replace(cache.grown(slots, layout), last_B=end_B) for cache in caches)


def decode_step(
    decoder: Decoder, weights: Any, tokens_B: Array, caches: Caches, layout: Layout, dtypes: Dtypes
) -> tuple[Array, Caches]:
    """The logits [B, V] behind one token more of each sequence, and the caches with that token in them.

    A token for which a sequence has no slot left is lost to those after it. Donate the caches, and they are
    updated in place.
    """
    positions_BL = caches[0].lengths_B[:, None]
    context = Context(
        layout,
        dtypes,
        positions_BL,
        jnp.ones_like(positions_BL),
        tokens_BL=tokens_B[:, None],
        before_B=caches[0].last_B,
    )
    caches = tuple(replace(cache, lengths_B=cache.lengths_B + 1, last_B=tokens_B) for cache in caches)
    hidden_BLD, caches = _forward(decoder, weights, tokens_B[:, None], context, caches)
    return decoder.logits(decoder.head(weights, context), hidden_BLD, context)[:, 0], caches


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """How each sequence's next token is chosen from its logits.

    `temperature_B` 0 takes the likeliest token. Otherwise logits are divided by it; then the `top_k_B`
    likeliest are kept (0: all), then of those the fewest that together have a share of `top_p_B` or more
    (1: all). What is exactly as likely as the last one kept is kept too. Then those go that are less likely
    than a share `min_p_B` of the likeliest one (0: none).

    Shapes: `keys_B` random keys [B]; `temperature_B`, `top_p_B` and `min_p_B` float32 [B]; `top_k_B` int32
    [B].
    """

    keys_B: Array
    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array | None = None


def sequence_keys(seed: int, indices: Sequence[int]) -> Array:
    """A random key for each sequence, from the seed and the sequence's own number alone."""
    numbers = jnp.asarray(indices, jnp.uint32)
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(numbers)


def choose(logits_BV: Array, positions_B: Array, choice: Choice, tokens: int) -> Array:
    """One of the first `tokens` tokens for each sequence, int32 [B]; `NOT_FINITE` where logits are not.

    It depends on the sequence's logits, settings, key and the position that the token will have; on no
    other sequence. `tokens` leaves out what pads the vocabulary.
    """
    known_V = jnp.arange(logits_BV.shape[1]) < tokens
    logits_BV = jnp.where(known_V[None], logits_BV, -jnp.inf).astype(jnp.float32)
    likeliest_B = jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
    sampled_B = choice.temperature_B > 0
    drawn_B = jax.lax.cond(
        jnp.any(sampled_B),
        lambda: _drawn(logits_BV, positions_B, choice),
        lambda: likeliest_B,
    )
    fine_B = jnp.isfinite(jnp.max(logits_BV, axis=1))
    return jnp.where(fine_B, jnp.where(sampled_B, drawn_B, likeliest_B), NOT_FINITE)


def _drawn(logits_BV: Array, positions_B: Array, choice: Choice) -> Array:
    temperature_B = jnp.where(choice.temperature_B > 0, choice.temperature_B, 1.0)
    scaled_BV = (logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)) / temperature_B[:, None]
    # Sorting the vocabulary costs more than all else here; without top-k and top-p nobody needs it.
    least_B = jax.lax.cond(
        jnp.any((choice.top_k_B > 0) | (choice.top_p_B < 1)),
        lambda: _least_kept(scaled_BV, choice),
        lambda: jnp.full_like(choice.temperature_B, -jnp.inf),
    )

    if choice.min_p_B is not None:
        least_B = jnp.maximum(least_B, jnp.log(choice.min_p_B))

    def noise(key: Array, position: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, position), scaled_BV.shape[1:], jnp.float32)

    noise_BV = jax.vmap(noise)(choice.keys_B, positions_B)
    kept_BV = jnp.where(scaled_BV >= least_B[:, None], scaled_BV, -jnp.inf)
    return jnp.argmax(kept_BV + noise_BV, axis=1).astype(jnp.int32)


def _least_kept(scaled_BV: Array, choice: Choice) -> Array:
    """The smallest scaled logit of each sequence that top-k and top-p leave, [B]."""
    tokens = scaled_BV.shape[1]
    sorted_BV = jnp.sort(scaled_BV, axis=1, descending=True)
    number_B = jnp.where(choice.top_k_B > 0, jnp.minimum(choice.top_k_B, tokens), tokens)
    by_number_B = jnp.take_along_axis(sorted_BV, number_B[:, None] - 1, axis=1)[:, 0]
    shares_BV = jax.nn.softmax(jnp.where(sorted_BV >= by_number_B[:, None], sorted_BV, -jnp.inf), axis=1)
    before_BV = jnp.cumsum(shares_BV, axis=1) - shares_BV
    # A sum of rounded shares may reach 1 early: where top-p is off, nothing may depend on it.
    kept_BV = (before_BV < choice.top_p_B[:, None]) | (choice.top_p_B >= 1)[:, None]
    last_B = jnp.sum(kept_BV, axis=1, dtype=jnp.int32) - 1
    by_share_B = jnp.take_along_axis(sorted_BV, last_B[:, None], axis=1)[:, 0]
    return jnp.maximum(by_number_B, by_share_B)


def _forward(
    decoder: Decoder, weights: Any, tokens_BL: Array, context: Context, caches: Caches
) -> tuple[Array, Caches]:
    # There is no backward pass for which anything could be kept or computed again.
    decoder = replace(decoder, remat=Remat.NONE)
    output = decoder.hidden(weights, decoder.embed(weights, tokens_BL, context), context, caches)
    held: Any = output.kv
    return output.hidden_BLD, held


def _placed(cache_NBKTC: Array, layout: Layout) -> Array:
    return layout.constrain(cache_NBKTC, None, BATCH, "kv_heads", None, None)


def _written(cache_NBKTC: Array, new_BLKC: Array, layer: Array | int, first_B: Array) -> Array:
    """The cache with a layer's rows of each sequence at its own slots."""
    layer_B = jnp.full_like(first_B, layer)
    # Said to XLA outright: by vmap of an update, the whole cache would be transposed for every layer.
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, 3),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(
        cache_NBKTC,
        jnp.stack([layer_B, first_B], axis=1),
        new_BLKC.transpose(0, 2, 1, 3),
        numbers,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )

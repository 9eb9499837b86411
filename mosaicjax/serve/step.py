"""The engine's one program: a step over pages, and each row's next token."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.models import paged
from mosaicjax.models.decode import Choice
from mosaicjax.serve.sampler import Drawn, Penalties, counted, draw


def stepped(
    step: Callable[..., tuple[Array, paged.Pages]],
    vocabulary: int,
    weights: object,
    *,
    tokens_BL: Array,
    first_B: Array,
    lengths_B: Array,
    before_B: Array,
    tables_BM: Array,
    pages: paged.Pages,
    penalties: Penalties,
    slots_B: Array,
    seeds_B2: Array,
    numbers_B3: Array,
    top_k_B: Array,
    told_B: Array,
    taken_B: Array,
) -> tuple[Drawn, paged.Pages, Penalties]:
    """A step, and the choice of each row's next token.

    `slots_B` are the rows' places in the penalties, each another one; `taken_B`, bool [B], says whose tokens
    are taken.
    """
    logits_BV, pages = step(
        weights,
        tokens_BL=tokens_BL,
        first_B=first_B,
        lengths_B=lengths_B,
        before_B=before_B,
        tables_BM=tables_BM,
        pages=pages,
    )

    def key(seeds_2: Array) -> Array:
        return jax.random.fold_in(jax.random.key(seeds_2[0]), seeds_2[1])

    temperature_B, top_p_B, min_p_B = numbers_B3.T
    choice = Choice(jax.vmap(key)(seeds_B2), temperature_B, top_k_B, top_p_B, min_p_B)
    mine = jax.tree.map(lambda x: x[slots_B], penalties)
    drawn = draw(logits_BV, first_B + lengths_B, choice, mine, told_B, vocabulary)
    tokens_B = jnp.zeros(penalties.any_B.shape[0], jnp.int32).at[slots_B].set(drawn.tokens_B)
    rows_B = jnp.zeros(penalties.any_B.shape[0], bool).at[slots_B].set(taken_B)
    return drawn, pages, counted(penalties, tokens_B, rows_B)

"""The choice of each row's next token, by its own wishes; what the rows do not wish for costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.models.decode import Choice, choose
from mosaicjax.serve.request import MOST_LOGPROBS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Penalties:
    """What bends each row's logits.

    `seen_BV` counts a token in the row's prompt and text, `written_BV` in its text alone; `bias_BV` is added.

    Shapes: counts int32 [B, V]; `bias_BV` float32 [B, V]; the others float32 [B]; `any_B` bool [B], whether a
    row has any.
    """

    seen_BV: Array
    written_BV: Array
    bias_BV: Array
    repetition_B: Array
    presence_B: Array
    frequency_B: Array
    any_B: Array

    @classmethod
    def none(cls, rows: int, tokens: int) -> Penalties:
        """Of rows without any."""
        # Each its own array, so that all can be donated.
        seen, written, bias = (
            jnp.zeros((rows, tokens), kind) for kind in (jnp.int32, jnp.int32, jnp.float32)
        )
        repetition, presence, frequency = (jnp.full(rows, x, jnp.float32) for x in (1.0, 0.0, 0.0))
        return cls(seen, written, bias, repetition, presence, frequency, jnp.zeros(rows, bool))


class Drawn(NamedTuple):
    """Tokens int32 [B] as `choose` gives them; log-probabilities of theirs float32 [B], and of the likeliest.

    Shapes: `likeliest_BN` int32 [B, N] and `logprobs_BN` float32 [B, N], N `MOST_LOGPROBS` or the vocabulary.
    """

    tokens_B: Array
    logprob_B: Array
    likeliest_BN: Array
    logprobs_BN: Array


def bent(logits_BV: Array, penalties: Penalties) -> Array:
    """The logits after penalties and bias, float32; a row without any keeps its own."""
    wide_BV = logits_BV.astype(jnp.float32)

    def bend() -> Array:
        rate_B1 = penalties.repetition_B[:, None]
        repeated_BV = jnp.where(wide_BV > 0, wide_BV / rate_B1, wide_BV * rate_B1)
        made_BV = jnp.where(penalties.seen_BV > 0, repeated_BV, wide_BV)
        made_BV -= penalties.presence_B[:, None] * (penalties.written_BV > 0).astype(jnp.float32)
        made_BV -= penalties.frequency_B[:, None] * penalties.written_BV.astype(jnp.float32)
        return jnp.where(penalties.any_B[:, None], made_BV + penalties.bias_BV, wide_BV)

    return jax.lax.cond(jnp.any(penalties.any_B), bend, lambda: wide_BV)


def counted(penalties: Penalties, tokens_B: Array, rows_B: Array) -> Penalties:
    """The counts with one token more of each row in `rows_B`, bool [B]."""
    B = tokens_B.shape[0]

    def add(counts_BV: Array) -> Array:
        more_B = (rows_B & (tokens_B >= 0)).astype(counts_BV.dtype)
        return counts_BV.at[jnp.arange(B), jnp.maximum(tokens_B, 0)].add(more_B)

    seen_BV, written_BV = jax.lax.cond(
        jnp.any(penalties.any_B),
        lambda: (add(penalties.seen_BV), add(penalties.written_BV)),
        lambda: (penalties.seen_BV, penalties.written_BV),
    )
    return Penalties(
        seen_BV,
        written_BV,
        penalties.bias_BV,
        penalties.repetition_B,
        penalties.presence_B,
        penalties.frequency_B,
        penalties.any_B,
    )


def row_set(
    penalties: Penalties,
    row: Array,
    seen_V: Array,
    written_V: Array,
    bias_V: Array,
    numbers_3: Array,
    any_: Array,
) -> Penalties:
    """The penalties with those of one row anew: its counts and bias [V], repetition, presence, frequency."""
    return Penalties(
        penalties.seen_BV.at[row].set(seen_V),
        penalties.written_BV.at[row].set(written_V),
        penalties.bias_BV.at[row].set(bias_V),
        penalties.repetition_B.at[row].set(numbers_3[0]),
        penalties.presence_B.at[row].set(numbers_3[1]),
        penalties.frequency_B.at[row].set(numbers_3[2]),
        penalties.any_B.at[row].set(any_),
    )


def draw(
    logits_BV: Array,
    positions_B: Array,
    choice: Choice,
    penalties: Penalties,
    told_B: Array,
    tokens: int,
) -> Drawn:
    """A token for each row, of the first `tokens`; `told_B`, bool [B], says whose log-probabilities are read.

    Those are of the model's own logits, over the same tokens.
    """
    tokens_B = choose(bent(logits_BV, penalties), positions_B, choice, tokens)
    B, N = tokens_B.shape[0], min(MOST_LOGPROBS, tokens)

    def told() -> tuple[Array, Array, Array]:
        logprobs_BV = jax.nn.log_softmax(logits_BV[:, :tokens].astype(jnp.float32), axis=1)
        mine_B = jnp.take_along_axis(logprobs_BV, jnp.maximum(tokens_B, 0)[:, None], axis=1)[:, 0]
        logprobs_BN, likeliest_BN = jax.lax.top_k(logprobs_BV, N)
        return mine_B, likeliest_BN.astype(jnp.int32), logprobs_BN

    def untold() -> tuple[Array, Array, Array]:
        empty_BN = jnp.zeros((B, N), jnp.float32)
        return jnp.zeros(B, jnp.float32), jnp.zeros((B, N), jnp.int32), empty_BN

    return Drawn(tokens_B, *jax.lax.cond(jnp.any(told_B), told, untold))

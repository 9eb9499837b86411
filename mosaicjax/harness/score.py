"""Log-likelihoods of continuations: requests of all lengths, in batches of few shapes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax.errors import InputError
from mosaicjax.harness.shapes import lengths_up_to, padded
from mosaicjax.layers.context import Context
from mosaicjax.losses import nll
from mosaicjax.mesh import BATCH, Layout
from mosaicjax.models.model import Model
from mosaicjax.spec import Dtypes

CHUNK = 16
"""So many positions of a row have their logits in memory at once."""

ENDS = 8
"""Continuations that differ in their last token alone share a row, so many of them."""

AHEAD = 2
"""So many batches are under way while the host prepares the next one."""

Request = tuple[Sequence[int], Sequence[int]]
"""Ids of a context and of its continuation, one or more each."""


class Score(NamedTuple):
    """A continuation's log-likelihood, and whether each of its tokens was the likeliest one.

    Units: `total` nats, summed over the continuation's tokens.
    """

    total: float
    greedy: bool


class _Row(NamedTuple):
    """What the model reads, how many of its last predictions count, and which requests end in which token."""

    inputs: tuple[int, ...]
    scored: int
    body: tuple[int, ...]
    ends: tuple[int, ...]
    requests: tuple[int, ...]


class Scorer:
    """A model ready to score; each padded length is compiled once, whatever the continuations.

    `lengths` are the padded ones so far.
    """

    def __init__(
        self, model: Model, weights: Any, layout: Layout, dtypes: Dtypes, *, length: int, rows: int
    ) -> None:
        """Nothing is compiled yet. Inputs are at most `length` tokens, and `rows` of them make a batch.

        Raises:
            InputError: rows that the mesh cannot split, or a length that the model does not reach.
        """
        if rows < 1 or rows % layout.batch_shards:
            raise InputError("--batch", expected=f"a multiple of {layout.batch_shards}", got=rows)
        model.check(length)
        self.model, self.weights, self.layout, self.dtypes = model, weights, layout, dtypes
        self.length, self.rows = length, rows
        self.lengths: set[int] = set()
        self._sizes = lengths_up_to(length)
        self._run = jax.jit(self._scores)

    def score(self, requests: Sequence[Request], done: Callable[[int], None] | None = None) -> list[Score]:
        """Each request's score, in their order; `done(number)` hears how many were scored with each batch.

        What is too long for the model loses tokens at its left.

        Raises:
            InputError: a continuation longer than the model's inputs, or scores that are not finite.
        """
        rows = self._rows_of(requests)
        scores: list[Score | None] = [None] * len(requests)
        under_way: deque[tuple[list[_Row], Any]] = deque()

        def take() -> None:
            batch, results = under_way.popleft()
            count = 0
            for row, values in zip(batch, zip(*jax.device_get(results), strict=True), strict=False):
                for request, score in zip(row.requests, _scores_of(row, *values), strict=True):
                    scores[request] = score
                    count += 1
            if done is not None:
                done(count)

        for first in range(0, len(rows), self.rows):
            batch = rows[first : first + self.rows]
            under_way.append((batch, self._run(self.weights, *self._batch(batch))))
            if len(under_way) > AHEAD:
                take()
        while under_way:
            take()
        found = [score for score in scores if score is not None]
        assert len(found) == len(requests), (len(found), len(requests))
        return found

    def _rows_of(self, requests: Sequence[Request]) -> list[_Row]:
        """Rows by length, the longest first; requests that read the same share one."""
        alike: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (context, continuation) in enumerate(requests):
            assert len(context) and len(continuation), number
            if len(continuation) > self.length:
                raise InputError(
                    "a continuation is longer than what the model reads at once",
                    expected=f"at most {self.length} tokens",
                    got=len(continuation),
                )
            inputs = (*context, *continuation[:-1])[-self.length :]
            alike.setdefault((inputs, len(continuation)), []).append(number)
        rows = []
        for (inputs, count), numbers in alike.items():
            body = tuple(requests[numbers[0]][1][:-1])
            for first in range(0, len(numbers), ENDS):
                some = tuple(numbers[first : first + ENDS])
                ends = tuple(requests[number][1][-1] for number in some)
                rows.append(_Row(inputs, count, body, ends, some))
        return sorted(rows, key=lambda row: (-len(row.inputs), row.inputs, row.scored))

    def _batch(self, batch: Sequence[_Row]) -> tuple[Array, ...]:
        length = padded(len(batch[0].inputs), self._sizes)
        self.lengths.add(length)
        tokens_BL = np.zeros((self.rows, length), np.int32)
        body_BL = np.zeros((self.rows, -(-length // CHUNK) * CHUNK), np.int32)
        lengths_B, counts_B = np.ones(self.rows, np.int32), np.ones(self.rows, np.int32)
        ends_BK = np.zeros((self.rows, ENDS), np.int32)
        for i, row in enumerate(batch):
            tokens_BL[i, : len(row.inputs)] = row.inputs
            body_BL[i, : len(row.body)] = row.body
            ends_BK[i, : len(row.ends)] = row.ends
            lengths_B[i], counts_B[i] = len(row.inputs), row.scored
        place = self.layout.sharding
        return tuple(
            jax.device_put(array, place(BATCH, *[None] * (array.ndim - 1)))
            for array in (tokens_BL, lengths_B, counts_B, body_BL, ends_BK)
        )

    def _scores(
        self,
        weights: Any,
        tokens_BL: Array,
        lengths_B: Array,
        counts_B: Array,
        body_BL: Array,
        ends_BK: Array,
    ) -> tuple[Array, ...]:
        """Of each row: nats and greediness of all targets but the last, and of each last one.

        The targets are those behind the last `counts_B` of a row's tokens; how many chunks they make up is
        known when the program runs, so that no shape depends on it.
        """
        model = self.model
        positions_BL = jnp.broadcast_to(
            jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None], tokens_BL.shape
        )
        segments_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
        context = Context(self.layout, self.dtypes, positions_BL, segments_BL, tokens_BL=tokens_BL)
        hidden_BLD = model.hidden(weights, model.embed(weights, tokens_BL, context), context).hidden_BLD
        head = model.head(weights, context)
        before_B = counts_B - 1

        def logits(places_BM: Array) -> Array:
            rows_BMD = jnp.take_along_axis(hidden_BLD, places_BM[..., None], axis=1, mode="clip")
            return model.logits(head, rows_BMD, context)

        def chunk(number: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            total_B, greedy_B = sums
            target_M = number * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
            logits_BMV = logits((lengths_B - counts_B)[:, None] + target_M[None])
            targets_BM = jax.lax.dynamic_slice_in_dim(body_BL, number * CHUNK, CHUNK, axis=1)
            counted_BM = target_M[None] < before_B[:, None]
            nll_BM, _ = nll(logits_BMV, targets_BM)
            hit_BM = jnp.argmax(logits_BMV, axis=-1).astype(jnp.int32) == targets_BM
            total_B = total_B - jnp.sum(jnp.where(counted_BM, nll_BM, jnp.zeros_like(nll_BM)), axis=1)
            return total_B, greedy_B & jnp.all(hit_BM | ~counted_BM, axis=1)

        last_BV = logits(lengths_B[:, None] - 1)[:, 0]
        started = (jnp.zeros_like(last_BV, shape=lengths_B.shape), jnp.ones(lengths_B.shape, bool))
        chunks = (jnp.max(before_B) + CHUNK - 1) // CHUNK
        total_B, greedy_B = jax.lax.fori_loop(jnp.zeros_like(chunks), chunks, chunk, started)
        ends_BK1 = ends_BK[..., None]
        chosen_BK = jnp.take_along_axis(last_BV[:, None], ends_BK1, axis=2, mode="clip")[..., 0]
        chosen_BK = chosen_BK - jax.nn.logsumexp(last_BV, axis=-1, keepdims=True)
        likeliest_BK = jnp.argmax(last_BV, axis=-1, keepdims=True).astype(jnp.int32) == ends_BK
        whole = NamedSharding(self.layout.mesh, P())
        results = (total_B, greedy_B, chosen_BK, likeliest_BK)
        return tuple(jax.lax.with_sharding_constraint(result, whole) for result in results)


def _scores_of(row: _Row, total: Any, greedy: Any, ends_K: Any, likeliest_K: Any) -> list[Score]:
    scores = []
    for place in range(len(row.ends)):
        score = Score(float(total) + float(ends_K[place]), bool(greedy) and bool(likeliest_K[place]))
        if not np.isfinite(score.total):
            raise InputError(
                "a log-likelihood is not finite",
                got=score.total,
                fix="other weights: these are broken, or overflow in the compute dtype",
            )
        scores.append(score)
    return scores

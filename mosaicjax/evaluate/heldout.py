"""Held-out loss: every token of the held-out documents is a target exactly once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax import processes
from mosaicjax.data.held_pairs import HeldOutPairs
from mosaicjax.data.stream import HeldOut
from mosaicjax.errors import InputError
from mosaicjax.losses import CrossEntropy
from mosaicjax.mesh import BATCH, Layout, global_array, local_rows, shardings
from mosaicjax.models.model import Model
from mosaicjax.program import Batch, DecoderLoss
from mosaicjax.spec import Dtypes


@dataclass(frozen=True)
class Loss:
    """Sums over target tokens: nats, tokens, and the bytes of text that they stand for.

    `parts` are those of each domain, by name, where there is more than one; `told_from` those of targets by
    how many tokens of their row (or document, where these are isolated) come before them: up to so many.
    """

    nats: float
    tokens: int
    text_bytes: int
    parts: Mapping[str, Loss] = field(default_factory=dict)
    told_from: Mapping[int, Loss] = field(default_factory=dict)

    @property
    def per_token(self) -> float:
        """Units: nats a target token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Units: bits a byte of text."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.inf

    @property
    def perplexity(self) -> float:
        """Of a target token."""
        return math.exp(min(self.per_token, 700.0))

    def __str__(self) -> str:
        """In a line."""
        return f"{self.per_token:.4f}, {self.bits_per_byte:.4f} bits/byte"

    def metrics(self) -> dict[str, float | int]:
        """What a row of metrics says of it."""
        values = {"loss": self.per_token, "bits_per_byte": self.bits_per_byte, "tokens": self.tokens}
        values["perplexity"] = self.perplexity
        for name, part in self.parts.items():
            if part.tokens:
                values |= {f"loss/{name}": part.per_token, f"bits_per_byte/{name}": part.bits_per_byte}
        return values


FIRST = 16
"""Targets with up to so many tokens before them are counted together, then those with up to twice as many."""


def bounds_of(seq: int) -> tuple[int, ...]:
    """Up to how many tokens before a target each group has, the last as many as a row."""
    bounds: list[int] = []
    while (FIRST << len(bounds)) < seq:
        bounds.append(FIRST << len(bounds))
    return (*bounds, seq)


class OverRows:
    """Sums over held-out rows on a layout, `rows` of them at a time; compiled once."""

    def __init__(
        self,
        layout: Layout,
        held_out: HeldOut | HeldOutPairs,
        rows: int,
        sums: Callable[[Any, Batch], tuple[Array, ...]],
        weights: Any,
    ) -> None:
        """Compile `sums`, which gives arrays [B, ...] of each row's, from weights of these shapes and places.

        Nothing is read.

        Raises:
            InputError: rows that the mesh cannot split.
        """
        if rows % layout.batch_shards:
            raise InputError("rows of evaluation", expected=f"a multiple of {layout.batch_shards}", got=rows)
        self.held_out = held_out
        self.layout = layout
        self.rows = rows
        self._mine = local_rows(layout, rows)
        batch = {
            name: jax.ShapeDtypeStruct((rows, held_out.seq), dtype, sharding=layout.sharding(BATCH, None))
            for name, dtype in self._arrays().items()
        }
        out = NamedSharding(layout.mesh, P())

        def everywhere(weights: Any, batch: Batch) -> tuple[Array, ...]:
            return tuple(jax.lax.with_sharding_constraint(total, out) for total in sums(weights, batch))

        self._compiled = jax.jit(everywhere).lower(weights, batch).compile()

    def _arrays(self) -> dict[str, Any]:
        packed = {"segments": jnp.int32, "positions": jnp.int32} if self.held_out.isolate else {}
        return {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32, **packed}

    def chosen(self, rows: int) -> list[int]:
        """Numbers of `rows` held-out rows, evenly spaced; 0, or more than there are: all."""
        total = len(self.held_out)
        return list(range(total)) if not 0 < rows < total else [i * total // rows for i in range(rows)]

    def totals(self, weights: Any, rows: int) -> np.ndarray:
        """The sums over `rows` rows (0: all) by domain, the same on every process.

        Shapes: float64 [sums, domains, ...].
        Raises:
            InputError: a damaged shard, on every process.
        """
        chosen = self.chosen(rows)
        found = []
        for first in range(0, len(chosen), self.rows):
            some = chosen[first : first + self.rows]
            sums = jax.device_get(self._compiled(weights, self._batch(some)))
            domains = self.held_out.domains(some)
            each = np.zeros((len(sums), len(self.held_out.names), *sums[0].shape[1:]), np.float64)
            for total, row_sums in zip(each, sums, strict=True):
                np.add.at(total, domains, row_sums[: len(some)])
            found.append(each)
        return np.sum(found, axis=0)

    def _batch(self, chosen: Sequence[int]) -> dict[str, Array]:
        """Held-out rows on the devices; what is missing to a whole batch has weight 0."""
        wanted = [place for place in self._mine if place < len(chosen)]
        with processes.refused_by_all("reading held-out rows"):
            read = self.held_out.rows([chosen[place] for place in wanted])
        arrays = {}
        for name, dtype in self._arrays().items():
            host = np.zeros((self.rows, self.held_out.seq), dtype)
            host[wanted] = read[name]
            arrays[name] = global_array(self.layout, host.shape, (BATCH, None), host.__getitem__)
        return arrays


class Evaluator(OverRows):
    """Held-out loss of a model on a layout, `rows` rows at a time; compiled once.

    Shapes: `token_bytes` [ids], how many bytes of text each id stands for.
    """

    def __init__(
        self,
        decoder: Model,
        layout: Layout,
        dtypes: Dtypes,
        held_out: HeldOut | HeldOutPairs,
        token_bytes: Any,
        rows: int,
        chunk: int = 0,
        weights: Any = None,
    ) -> None:
        """Compile for the held-out rows' length, with the logits of `chunk` positions at a time (0: all).

        `weights` are shapes and places of those that it is called with; None: the model's own on this layout.
        Nothing is read.

        Raises:
            InputError: rows that the mesh cannot split.
        """
        self._bounds = bounds_of(held_out.seq)
        self._loss = DecoderLoss(decoder, CrossEntropy(chunk=chunk), dtypes, packed=held_out.isolate)
        sizes = np.zeros(max(decoder.dims["vocab"], len(token_bytes)), np.int32)
        sizes[: len(token_bytes)] = token_bytes
        if weights is None:
            spec = decoder.spec()
            weights = spec.abstract(dtypes.param, shardings(spec, layout))

        def sums(weights: Any, batch: Batch) -> tuple[Array, Array, Array]:
            return self._sums(weights, batch, jnp.asarray(sizes))

        super().__init__(layout, held_out, rows, sums, weights)

    def _sums(self, weights: Any, batch: Batch, sizes_V: Array) -> tuple[Array, Array, Array]:
        """Of each row and each group of `bounds_of`: nats, target tokens, and bytes of their text, [B, S]."""
        context = self._loss.context(batch, self.layout)
        hidden_BLD = self._loss.forward(weights, batch, context).hidden_BLD
        nll_BL = self._loss.nll(weights, hidden_BLD, batch, context)
        counted_BL = (batch["weights"] > 0).astype(jnp.int32)
        bytes_BL = jnp.take(sizes_V, batch["targets"], mode="clip") * counted_BL
        # A target at position p has p + 1 tokens before it.
        before_BL = jnp.broadcast_to(context.positions_BL + 1, nll_BL.shape)
        group_BL = jnp.searchsorted(jnp.asarray(self._bounds), before_BL)
        groups_S = jnp.arange(len(self._bounds), dtype=group_BL.dtype)
        mine_BSL = group_BL[:, None] == groups_S[None, :, None]

        def grouped(values_BL: Array) -> Array:
            nothing_BL = jnp.zeros_like(values_BL)
            return jnp.sum(jnp.where(mine_BSL, values_BL[:, None], nothing_BL[:, None]), axis=-1)

        weighted_BL = nll_BL * batch["weights"].astype(nll_BL.dtype)
        return grouped(weighted_BL), grouped(counted_BL), grouped(bytes_BL)

    def __call__(self, weights: Any, rows: int = 0) -> Loss:
        """The loss over `rows` rows (0: all), the same on every process.

        Raises:
            InputError: a damaged shard, on every process.
        """
        names, totals = self.held_out.names, self.totals(weights, rows)

        def loss(nats: float, tokens: float, text_bytes: float, **parts: Any) -> Loss:
            return Loss(float(nats), int(tokens), int(text_bytes), **parts)

        parts = {name: loss(*totals[:, domain].sum(axis=1)) for domain, name in enumerate(names)}
        told_from = {most: loss(*totals[:, :, group].sum(axis=1)) for group, most in enumerate(self._bounds)}
        return loss(*totals.sum(axis=(1, 2)), parts=parts if len(parts) > 1 else {}, told_from=told_from)

"""Selective backpropagation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from mosaicjax.errors import InputError
from mosaicjax.mesh import BATCH, Layout
from mosaicjax.program import Batch, Loss, Method, Program

_DRAW = 0x5E1EC7
"""Sets the randomness of the choice apart from that of dropout, which begins at the same key."""


class RowLoss(Loss, Protocol):
    """A loss that can also say what each row's is."""

    def of_rows(self, trainable: Any, frozen: Any, batch: Batch, key: Array, layout: Layout) -> Array:
        """The loss of each row, summed over its target tokens, [B]."""
        ...


@dataclass(frozen=True)
class SelectiveBackprop(Method):
    """Learn from the share `keep` of each microbatch's rows whose loss is highest.

    A forward pass over all rows finds their losses a target token; `keep` of them, rounded to whole rows of
    the microbatch over all devices, then go forward and backward. `choice` "rank" draws them without
    replacement, with probabilities in proportion to rank ** (1 / keep - 1), rank 0 the lowest loss; "top"
    takes the highest. It begins with the share `start` of the run's steps, ends before `end`, and every
    `interrupt`-th step (0: none) is a plain one.

    A step takes 1/3 + `keep` of a plain one's compute: 0.83 at a half. Metrics and token counts are of the
    rows kept, so that the loss jumps where the method begins; held-out loss is of all. With `Sam` rows are
    chosen anew at the moved weights, and they are chosen after the microbatch, so its size is part of the
    method.

    For language models there is no gain to expect: at a given budget of compute it does no better than plain
    training with a rate that falls to the end (Kaddour et al. 2023, arXiv 2307.06440, section 4). The loss of
    a row of thousands of tokens says little of what is left to learn from it, and the highest are often of
    rows that are no text.

    Source: Jiang et al. 2019, arXiv 1910.00762; the drawing by rank and `interrupt` are Composer's.
    """

    keep: float = 0.5
    start: float = 0.5
    end: float = 0.9
    interrupt: int = 2
    choice: Literal["rank", "top"] = "rank"

    def __call__(self, program: Program) -> Program:
        """See `Method`."""
        if not 0 < self.keep < 1:
            raise InputError(
                "SelectiveBackprop.keep", expected="a share of the rows, in (0, 1)", got=self.keep
            )
        if not 0 <= self.start < self.end <= 1:
            raise InputError(
                "SelectiveBackprop",
                expected="start below end, both shares of the run from 0 to 1",
                got=(self.start, self.end),
            )
        if self.interrupt < 0 or self.interrupt == 1:
            raise InputError(
                "SelectiveBackprop.interrupt", expected="0 (never), or 2 or more steps", got=self.interrupt
            )
        if "DPO" in program.applied:
            raise InputError(
                "SelectiveBackprop chooses rows by the loss of their tokens, which DPO does not have",
                expected="SelectiveBackprop or DPO",
                got=" then ".join((*program.applied, "SelectiveBackprop")),
            )
        rows = program.phase.microbatch
        if not 1 <= self.rows(rows) < rows:
            raise InputError(
                f"SelectiveBackprop.keep of a microbatch of {rows} rows",
                expected="at least one row kept and one left out",
                got=f"{self.keep} of them, {self.rows(rows)} rows",
                fix="a larger microbatch, or another share",
            )
        return program.refine(self, loss=Selected(program.loss, self, program.steps))

    def rows(self, microbatch: int) -> int:
        """How many rows of a microbatch are kept."""
        return round(self.keep * microbatch)

    def active(self, step: Array | int, steps: int) -> Array:
        """Whether rows are left out at a step of a run."""
        step = jnp.asarray(step)
        # To the millionth of a step, so that 0.55 of 20 is 11 and not a rounding error more.
        first, last = (math.ceil(round(share * steps, 6)) for share in (self.start, self.end))
        inside = (step >= first) & (step < last)
        return inside & ((step + 1) % self.interrupt != 0) if self.interrupt else inside


@dataclass(frozen=True)
class Selected:
    """A loss on rows of each microbatch that another loss chooses; see `SelectiveBackprop`."""

    of_all: Any
    method: SelectiveBackprop
    steps: int

    @property
    def packed(self) -> bool:
        """Whether rows bring segments and positions."""
        return bool(getattr(self.of_all, "packed", False))

    @property
    def domains(self) -> int:
        """How many domains the rows come from."""
        return int(getattr(self.of_all, "domains", 1))

    def __call__(
        self,
        trainable: Any,
        frozen: Any,
        state: Any,
        batch: Batch,
        key: Array,
        layout: Layout,
        step: Array | int = 0,
    ) -> tuple[Array, Array, dict[str, Array], Any]:
        """See `Loss`."""

        def plain(trainable: Any, *rest: Any) -> Any:
            frozen, state, batch, key, step = rest
            return self.of_all(trainable, frozen, state, batch, key, layout, step)

        def selected(trainable: Any, *rest: Any) -> Any:
            frozen, state, batch, key, step = rest
            kept = self.kept(jax.lax.stop_gradient(trainable), frozen, batch, key, layout)
            return self.of_all(trainable, frozen, state, kept, key, layout, step)

        method = self.method
        arguments = (trainable, frozen, state, dict(batch), key, jnp.asarray(step))
        if method.start == 0 and method.end == 1 and not method.interrupt:
            found: tuple[Array, Array, dict[str, Array], Any] = selected(*arguments)
            return found

        # A choice between two losses would keep for the backward pass what either of them needs: gradients
        # are made inside the choice, with the value.
        @jax.custom_vjp
        def chosen(*arguments: Any) -> Any:
            return jax.lax.cond(method.active(arguments[-1], self.steps), selected, plain, *arguments)

        def forward(*arguments: Any) -> Any:
            def graded(loss: Any) -> Any:
                def run(trainable: Any, *rest: Any) -> Any:
                    def objective(trainable: Any) -> Any:
                        sums = loss(trainable, *rest)
                        return sums[0], sums

                    grads, sums = jax.grad(objective, has_aux=True)(trainable)
                    return sums, grads

                return run

            active = method.active(arguments[-1], self.steps)
            return jax.lax.cond(active, graded(selected), graded(plain), *arguments)

        def backward(grads: Any, cotangents: Any) -> Any:
            scaled = jax.tree.map(lambda grad: grad * cotangents[0].astype(grad.dtype), grads)
            return scaled, None, None, None, None, None

        chosen.defvjp(forward, backward)
        found = chosen(*arguments)
        return found

    def kept(self, trainable: Any, frozen: Any, batch: Batch, key: Array, layout: Layout) -> Batch:
        """The chosen rows; what fills them up to a multiple of the mesh's shards has weight 0.

        The choice is over the whole microbatch, all devices', so that no mesh changes it.
        """
        losses_B = self.of_all.of_rows(trainable, frozen, batch, key, layout).astype(jnp.float32)
        tokens_B = jnp.sum(batch["weights"].astype(jnp.float32), axis=1)

        def draw(row: Array) -> Array:
            return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, _DRAW), row), (), jnp.float32)

        def everywhere(x: Array) -> Array:
            if layout.manual:
                return jax.lax.all_gather(x, layout.batch_axes, axis=0, tiled=True)
            return layout.constrain(x, *[None] * x.ndim)

        mean_B = jnp.where(tokens_B > 0, losses_B / jnp.maximum(tokens_B, 1e-20), -jnp.inf)
        mean_B, gumbel_B = everywhere(mean_B), everywhere(jax.vmap(draw)(batch["row"]))
        total, shards = len(mean_B), layout.batch_shards
        count = self.method.rows(total)
        slots = -(-count // shards) * shards
        if slots >= total:
            raise InputError(
                f"SelectiveBackprop keeps {count} of a microbatch's {total} rows, which {shards} shards of"
                " the mesh fill up to all",
                fix="a larger microbatch, or a smaller share",
            )
        order_S = jax.lax.top_k(self.scores(mean_B, gumbel_B), slots)[1]
        counted_S = jnp.arange(slots) < count
        if layout.manual:
            mine = slots // shards
            first = jax.lax.axis_index(layout.batch_axes) * mine
            order_S, counted_S = (jax.lax.dynamic_slice(x, (first,), (mine,)) for x in (order_S, counted_S))

        def taken(x: Array) -> Array:
            kept = jnp.take(everywhere(x), order_S, axis=0, mode="clip")
            return layout.constrain(kept, BATCH, *[None] * (x.ndim - 1))

        rows = {name: taken(x) for name, x in batch.items()}
        zero = jnp.zeros((), rows["weights"].dtype)
        return rows | {"weights": jnp.where(counted_S[:, None], rows["weights"], zero)}

    def scores(self, mean_B: Array, gumbel_B: Array) -> Array:
        """What to take the highest of; rows without target tokens have a mean of minus infinity."""
        if self.method.choice == "top":
            return mean_B
        rank_B = jnp.argsort(jnp.argsort(mean_B)).astype(jnp.float32)
        power = 1.0 / self.method.keep - 1.0
        # Log-weights with Gumbel noise: the highest are a draw without replacement (arXiv 1903.06059).
        drawn_B = power * jnp.log(rank_B) + gumbel_B
        # A loss that is not finite has the highest rank: it may be drawn, and is not hidden.
        return jnp.where(mean_B == -jnp.inf, -jnp.inf, drawn_B)

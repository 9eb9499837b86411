"""What a train step is made of, and how a method makes another of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mosaicjax.errors import InputError
from mosaicjax.layers.context import Context
from mosaicjax.losses import CrossEntropy, TokenLoss, by_chunks, nll
from mosaicjax.mesh import Layout
from mosaicjax.models.decoder import Output
from mosaicjax.models.model import Model
from mosaicjax.optim import Rate
from mosaicjax.spec import Dtypes, Spec, at_least_float32, join

ACTIVATION_SQUARES = "activation_mean_square"
DOMAIN_NLL, DOMAIN_TOKENS = "domain_nll", "domain_tokens"
TOKENS = "tokens"

Batch = Mapping[str, Array]
"""`tokens`, `targets`, `weights` [B, L]; `row` [B], each row's number in the global batch; packed rows also
have `segments` and `positions` [B, L], those of several domains `domain` [B]."""


class Loss(Protocol):
    """A loss over one microbatch, or over one shard of it.

    Returns the weighted sum to differentiate, the sum of weights, metrics as weighted sums (the step divides
    them by the weight), and the program's state. Where the weight counts something else than target tokens,
    the metrics have these under `TOKENS`, which the step does not divide.
    """

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
        """The sums of this microbatch; `step` is the step's number, from 0."""
        ...


Average = Callable[[Any, Any, Array], Any]
"""A running average of the weights: from the one before, a step's new weights, and the steps done, from 1 on.

It begins as a copy of the first weights, and is held in float32 where they are in less.
"""

Regrade = Callable[[Any, Any, Array, Callable[[Any], Any]], Any]
"""The gradients to step with: from the weights, their gradients, the steps done before, and a function that
gives the gradients of the same rows at other weights. All are means times the step's weight."""

Evaluated = Callable[[Any, Any], Any]
"""The weights that a model is used with, out of those that are stepped from and the optimizer's state."""


@dataclass(frozen=True)
class Measured:
    """Gradients and their norm, which every optimizer is told as `measured`."""

    tree: Any
    norm: Array


@dataclass(frozen=True)
class Phase:
    """A static part of a run: its batches' shape, compiled once.

    Units: `batch` and `microbatch` in rows of all devices, `seq` in target tokens a row.
    """

    seq: int
    batch: int
    microbatch: int

    @property
    def microbatches(self) -> int:
        """How many a step takes; the last may hold rows of weight 0."""
        return -(-self.batch // self.microbatch)


@dataclass(frozen=True)
class Program:
    """What a train step is made of. A method maps one to another.

    `frozen` weights are an argument of the step, never part of it: where there are any, both trees have the
    model's form, with None for what is in the other (`spec.join`). `referenced`: the loss compares with the
    trainable weights as the run began with them, and finds them beside the frozen ones (`Referenced`).
    `optimizer` is built for all weights and meets such trees: its own, of masks or labels, come first where
    it maps over both. `state` is what a loss carries from step to step. `applied` names the methods so far,
    `steps` are the run's. `heavy`: updates cost more to compute anew than to hold.

    Evaluation, samples, generation and export use the running `average` where there is one, or what
    `evaluated` makes of weights and optimizer state, else the weights that are trained. `regrade` says with
    which gradients to step, where it is others than the loss's own.
    """

    trainable: Spec
    frozen: Spec
    state: Any
    loss: Loss
    optimizer: optax.GradientTransformation
    rate: Rate
    phase: Phase
    dtypes: Dtypes
    applied: tuple[str, ...] = ()
    heavy: bool = False
    average: Average | None = None
    evaluated: Evaluated | None = None
    regrade: Regrade | None = None
    steps: int = 1
    referenced: bool = False

    def refine(self, method: object, **changes: Any) -> Program:
        """This program with changes, and the method that made them on record.

        Raises:
            InputError: the same method twice.
        """
        name = type(method).__name__
        if name in self.applied:
            raise InputError(f"the method {name} is listed twice", got=" then ".join((*self.applied, name)))
        return replace(self, applied=(*self.applied, name), **changes)

    def averaged(self, method: object, average: Average) -> Program:
        """This program with a running average of its weights, which is what the model is used with.

        Raises:
            InputError: something else says already which weights those are.
        """
        refined = self.refine(method, average=average)
        if self.average is not None or self.evaluated is not None:
            raise InputError(
                "two say which weights a model is used with, a method that averages them or the optimizer",
                expected="one of them",
                got=" then ".join(("the optimizer", *refined.applied)),
            )
        return refined


@dataclass(frozen=True)
class Method:
    """An efficiency method: a pure map from a program to another. Each is a file of `methods/`."""

    def __call__(self, program: Program) -> Program:
        """The program with the method in it."""
        raise TypeError(f"{type(self).__name__} does not say what it does")


@dataclass(frozen=True)
class DecoderLoss:
    """The loss of a model on rows of tokens, its weights trainable or frozen (`spec.join`).

    `packed` rows bring segments and positions; others are one segment from position 0. The objective holds
    the losses of routers to experts too, where there are any; the metric `loss` does not. With `measure` the
    metrics hold the mean square of the output at each of the model's `places`; of several `domains` they hold
    the loss and the tokens of each.
    """

    decoder: Model
    loss: CrossEntropy
    dtypes: Dtypes
    packed: bool = False
    measure: bool = False
    domains: int = 1

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
        context = self.context(batch, layout, self.row_keys(batch, key))
        weights = join(trainable, frozen)
        output = self.forward(weights, batch, context, measure=self.measure)
        terms = self.terms(weights, output.hidden_BLD, batch, context)
        weight = jnp.sum(batch["weights"].astype(terms.nll.dtype))
        metrics = {"loss": terms.nll}
        if self.domains > 1:
            mine_DB = jnp.arange(self.domains, dtype=jnp.int32)[:, None] == batch["domain"][None]
            tokens_B = jnp.sum(batch["weights"].astype(weight.dtype), axis=1)
            for name, values_B in ((DOMAIN_NLL, terms.nll_B), (DOMAIN_TOKENS, tokens_B)):
                metrics[name] = jnp.sum(jnp.where(mine_DB, values_B[None], jnp.zeros_like(values_B)), axis=1)
        if self.loss.z_loss:
            metrics["z_loss"] = self.loss.z_loss * terms.square_lse
        objective = terms.objective
        if output.routing is not None:
            added, routed = output.routing.losses(weight, layout)
            objective, metrics = objective + added, metrics | routed
        if self.measure:
            metrics[ACTIVATION_SQUARES] = squares(output, weight)
        return objective, weight, metrics, state

    def of_rows(self, trainable: Any, frozen: Any, batch: Batch, key: Array, layout: Layout) -> Array:
        """The cross-entropy of each row, summed over its target tokens, as training would see it, [B]."""
        context = self.context(batch, layout, self.row_keys(batch, key))
        weights = join(trainable, frozen)
        output = self.forward(weights, batch, context)
        rows_B: Array = self.terms(weights, output.hidden_BLD, batch, context).nll_B
        return rows_B

    def forward(self, weights: Any, batch: Batch, context: Context, *, measure: bool = False) -> Output:
        """What the logits of every token are read from."""
        x_BLD = self.decoder.embed(weights, batch["tokens"], context)
        return self.decoder.hidden(weights, x_BLD, context, measure=measure)

    def nll(self, weights: Any, hidden_BLD: Array, batch: Batch, context: Context) -> Array:
        """The cross-entropy of every target, in float32 at least; logits of `loss.chunk` positions at a time.

        Backward those are made once more: what a token's is worth may be known after the last chunk alone.

        Shapes: [B, L], targets that bear no loss among them.
        """
        head = self.decoder.head(weights, context)

        def some(hidden_BLD: Array, targets_BL: Array) -> Array:
            logits_BLV = self.decoder.logits(head, hidden_BLD, context)
            return nll(logits_BLV.astype(at_least_float32(logits_BLV.dtype)), targets_BL)[0]

        targets_BL = batch["targets"]
        if not self.loss.chunk:
            return some(hidden_BLD, targets_BL)
        parts = self._cut(hidden_BLD), self._cut(targets_BL)
        nll_CBL = jax.lax.map(jax.checkpoint(lambda part: some(*part)), parts)
        return jnp.moveaxis(nll_CBL, 0, 1).reshape(targets_BL.shape)

    def row_keys(self, batch: Batch, key: Array) -> Array | None:
        """One key a row, where the model drops anything."""
        if not self.decoder.drops:
            return None
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(batch["row"])

    def context(self, batch: Batch, layout: Layout, keys_B: Array | None = None) -> Context:
        """What the layers are told of these rows."""
        if self.packed:
            segments_BL, positions_BL = batch["segments"], batch["positions"]
            given = (positions_BL, segments_BL, keys_B, batch["weights"], batch["tokens"])
            return Context(layout, self.dtypes, *given)
        positions_BL = jnp.arange(batch["tokens"].shape[1], dtype=jnp.int32)[None]
        return Context(layout, self.dtypes, positions_BL, None, keys_B, batch["weights"], batch["tokens"])

    def terms(self, weights: Any, hidden_BLD: Array, batch: Batch, context: Context) -> TokenLoss:
        """The loss of all positions, `loss.chunk` of them at a time."""
        head = self.decoder.head(weights, context)

        def some(head: Any, hidden_BLD: Array, targets_BL: Array, weights_BL: Array) -> TokenLoss:
            logits_BLV = self.decoder.logits(head, hidden_BLD, context)
            return self.loss.tokens(logits_BLV, targets_BL, weights_BL)

        rows = (batch["targets"], batch["weights"])
        if not self.loss.chunk:
            return some(head, hidden_BLD, *rows)
        return by_chunks(some, head, self._cut(hidden_BLD), tuple(map(self._cut, rows)))

    def _cut(self, x_BL: Array) -> Array:
        return jnp.moveaxis(x_BL.reshape(x_BL.shape[0], -1, self.loss.chunk, *x_BL.shape[2:]), 1, 0)


def squares(output: Output, weight: Array) -> Array:
    """The mean square at each measured place, times a weight: the step averages these, and takes the root.

    Shapes: [places].
    """
    assert output.rms_N is not None, "measured"
    first = [] if output.embed_rms is None else [output.embed_rms[None]]
    measured = jnp.concatenate([*first, output.rms_N])
    return jnp.square(jax.lax.stop_gradient(measured).astype(weight.dtype)) * weight

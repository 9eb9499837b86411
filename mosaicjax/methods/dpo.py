"""Direct preference optimisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from mosaicjax.adapters import has_adapters
from mosaicjax.errors import InputError
from mosaicjax.mesh import Layout
from mosaicjax.program import ACTIVATION_SQUARES, TOKENS, Batch, DecoderLoss, Method, Program, squares
from mosaicjax.spec import Referenced, join

ACCURACY = "reward_accuracy"
"""A metric that steps on pairs alone have: the share of them that the model tells apart rightly."""


@dataclass(frozen=True)
class DPO(Method):
    """Learn from pairs of answers which is preferred, with the model itself in place of a reward model.

    What an answer is worth is `beta` times how much likelier the model finds it, all of its tokens together,
    than a reference does: the weights as the run began with them. The loss of a pair is that of telling the
    chosen answer from the rejected one by what they are worth, -log sigmoid(chosen - rejected). `smoothing`
    is the share of pairs that are taken to be the wrong way round (conservative DPO). The data are a store of
    pairs, read as `Rows.PAIRS`; a step's loss is the mean over its pairs, however many its rows hold.

    The reference is an argument of the step. After `LoRA` it is the weights that the adapters stand on, and
    costs no memory; else it is a second copy of what is trained, placed as that is, in no checkpoint: a run
    that goes on reads it again from where it began (`init_from`), and refuses other weights there. Its
    forward pass is a third more compute, which MFU does not count: model FLOPs are those of training.

    The metrics have what answers are worth on the mean, `reward_chosen` and `reward_rejected`, the
    `reward_margin` between them, and the share of pairs in which it is above 0, `reward_accuracy`. A run
    begins at a loss of log 2 and a margin of 0. Held-out pairs are measured in the same way; `chosen_loss` is
    the cross-entropy of their chosen answers, which may well rise. Log-probabilities are summed in float32 at
    least. With `loss.chunk` the logits of that many positions are in memory at once, and are made a second
    time in the backward pass. Of several stores there is one loss.

    Anything dropped out is dropped from what is trained alone. It composes with `Sam`, with averages,
    `FreezeLayers`, `ScaleRates` and `LowPrecision`, which rounds the reference's products too; not with
    `SelectiveBackprop`, label smoothing, z-loss or experts, whose terms are of tokens.

    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7; `smoothing`: Mitchell 2023, "A note on DPO
    with noisy preferences and relationship to IPO", equation 3.
    """

    beta: float = 0.1
    smoothing: float = 0.0

    def __call__(self, program: Program) -> Program:
        """See `Method`.

        Raises:
            InputError: knobs that cannot be, or a loss or method that is of tokens.
        """
        if not 0 < self.beta < math.inf or not 0 <= self.smoothing < 0.5:
            raise InputError(
                "DPO",
                expected="beta above 0, smoothing of 0 to below 0.5",
                got=f"{self.beta:g}, {self.smoothing:g}",
            )
        refined = program.refine(self)
        loss = program.loss
        if "SelectiveBackprop" in program.applied:
            raise InputError(
                "SelectiveBackprop chooses rows by the loss of their tokens, which DPO does not have",
                expected="SelectiveBackprop or DPO",
                got=" then ".join(refined.applied),
            )
        if not isinstance(loss, DecoderLoss):
            raise InputError("DPO of a loss of one's own", expected="the recipe's own loss")
        if not loss.packed:
            raise InputError("DPO of documents that see each other", expected="data.rows PAIRS")
        for name in ("z_loss", "smoothing"):
            if getattr(loss.loss, name):
                raise InputError(
                    f"loss.{name} with DPO, whose loss is of pairs", expected=0, got=getattr(loss.loss, name)
                )
        if "experts" in loss.decoder.dims:
            raise InputError("DPO of a model with experts, whose routers are balanced by tokens")
        # Adapters are compared with the weights that they stand on.
        referenced = not has_adapters(program.trainable.tree)
        paired = PairLoss(loss, self.beta, self.smoothing)
        return program.refine(self, loss=paired, referenced=referenced)


@struct.dataclass
class PairTerms:
    """What pairs of answers come to, summed over each row.

    `objective` is what is minimised; `chosen` and `rejected` are what the answers are worth and `right` how
    many of the `pairs` are told apart rightly.

    Units: nats.
    Shapes: [B] each.
    """

    objective: Any
    chosen: Any
    rejected: Any
    right: Any
    pairs: Any

    def metrics(self) -> dict[str, Array]:
        """Sums over all rows, by the names of the metrics."""
        chosen, rejected = jnp.sum(self.chosen), jnp.sum(self.rejected)
        return {
            "loss": jnp.sum(self.objective),
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "reward_margin": chosen - rejected,
            ACCURACY: jnp.sum(self.right),
        }


@dataclass(frozen=True)
class PairLoss:
    """The loss of pairs of answers, with the weights that it is compared with frozen; see `DPO`.

    Segments 2k - 1 and 2k of a row are the chosen and the rejected answer of its k-th pair.
    """

    of_tokens: DecoderLoss
    beta: float
    smoothing: float

    packed = True

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
        """See `Loss`; the weight is the number of pairs."""
        model = self.of_tokens
        context = model.context(batch, layout, model.row_keys(batch, key))
        weights = join(trainable, frozen)
        output = model.forward(weights, batch, context, measure=model.measure)
        nll_BL = model.nll(weights, output.hidden_BLD, batch, context)
        terms = self.terms(nll_BL, self.nll(compared(frozen), batch, layout), batch)
        pairs = jnp.sum(terms.pairs)
        metrics = terms.metrics() | {TOKENS: jnp.sum(batch["weights"].astype(pairs.dtype))}
        if model.measure:
            metrics[ACTIVATION_SQUARES] = squares(output, pairs)
        return metrics["loss"], pairs, metrics, state

    def nll(self, weights: Any, batch: Batch, layout: Layout) -> Array:
        """The cross-entropy of every target by weights that are not trained.

        Shapes: [B, L].
        """
        model = self.of_tokens
        context = model.context(batch, layout)
        weights = jax.lax.stop_gradient(weights)
        nll_BL = model.nll(weights, model.forward(weights, batch, context).hidden_BLD, batch, context)
        return jax.lax.stop_gradient(nll_BL)

    def terms(self, nll_BL: Array, reference_BL: Array, batch: Batch) -> PairTerms:
        """What pairs come to, from the cross-entropy of every target by the model and by the reference."""
        segments_BL, bears_BL = batch["segments"], batch["weights"] > 0
        worth_BL = self.beta * (reference_BL - nll_BL) * batch["weights"].astype(nll_BL.dtype)
        is_chosen_BL = segments_BL % 2 == 1
        signed_BL = jnp.where(is_chosen_BL, worth_BL, -worth_BL)
        # A pair has two places at least. Compared with numbers, not scattered: XLA does it within the sums.
        numbers_P = jnp.arange(1, segments_BL.shape[1] // 2 + 1, dtype=segments_BL.dtype)
        mine_BLP = (segments_BL[..., None] + 1) // 2 == numbers_P[None, None]
        there_BP = jnp.any(mine_BLP & bears_BL[..., None], axis=1)
        of_pairs_BLP = jnp.where(mine_BLP, signed_BL[..., None], jnp.zeros_like(signed_BL)[..., None])
        margin_BP = jnp.sum(of_pairs_BLP, axis=1)
        loss_BP = -jax.nn.log_sigmoid(margin_BP)
        if self.smoothing:
            turned_BP = -jax.nn.log_sigmoid(-margin_BP)
            loss_BP = (1.0 - self.smoothing) * loss_BP + self.smoothing * turned_BP

        def summed(x: Array, where: Array) -> Array:
            return jnp.sum(jnp.where(where, x, jnp.zeros_like(x)), axis=1)

        ones_BP = jnp.ones_like(margin_BP)
        return PairTerms(
            objective=summed(loss_BP, there_BP),
            chosen=summed(worth_BL, is_chosen_BL),
            rejected=summed(worth_BL, ~is_chosen_BL),
            right=summed(ones_BP, there_BP & (margin_BP > 0)),
            pairs=summed(ones_BP, there_BP),
        )


def compared(held: Any) -> Any:
    """The weights that a step compares with, out of what it holds beside the state."""
    return join(held.reference, held.frozen) if isinstance(held, Referenced) else held

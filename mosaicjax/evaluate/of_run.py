"""What measures the held-out rows of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mosaicjax import saved
from mosaicjax.data.held_pairs import HeldOutPairs
from mosaicjax.data.stream import HeldOut
from mosaicjax.evaluate.heldout import Evaluator, Loss
from mosaicjax.evaluate.pairs import PairEvaluator, PairScores
from mosaicjax.methods.dpo import PairLoss, compared
from mosaicjax.run import Ready

Measure = Callable[[Any, Any, int], Loss | PairScores]
"""Scores of a model: from the weights that it is used with, what the step holds beside the state, and how
many rows (0: all)."""


def measure_of(ready: Ready, held_out: HeldOut | HeldOutPairs) -> Measure:
    """Compile what measures held-out rows: the last phase's, for one loss to compare over the whole run."""
    step, program = ready.step, ready.steps[-1].program
    rows, adapts = program.phase.microbatch, saved.adapts(step)
    if isinstance(held_out, HeldOutPairs):
        loss, whole = program.loss, saved.abstract_weights(step)
        assert isinstance(loss, PairLoss), "a recipe of pairs compares them"
        plain = replace(loss, of_tokens=replace(loss.of_tokens, decoder=ready.decoder, measure=False))
        places = (saved.abstract_used(step) if adapts else whole, whole)
        paired = PairEvaluator(plain, step.layout, held_out, rows, places)
        return lambda weights, held, rows: paired((weights, compared(held)), rows)
    evaluator = Evaluator(
        ready.decoder,
        step.layout,
        program.dtypes,
        held_out,
        ready.data.tokenizer.token_bytes,
        rows,
        ready.recipe.loss.chunk,
        saved.abstract_used(step) if adapts else None,
    )
    return lambda weights, held, rows: evaluator(weights, rows)

"""Where a NaN or infinity came from: the first layer that made it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax.accumulate import accumulate
from mosaicjax.models.decoder import Decoder
from mosaicjax.models.model import Model
from mosaicjax.program import ACTIVATION_SQUARES, Batch, DecoderLoss
from mosaicjax.step import Step, rms_by_layer


def first_nonfinite(step: Step, decoder: Model, trainable: Any, frozen: Any, batch: Batch, key: Array) -> str:
    """Name the first part of the model whose output, or else gradient, is not finite.

    The forward pass is looked at from the embeddings on, then the loss; if all of it is finite, the
    gradients from the head back to the embeddings.
    """
    # Of a loss on some rows, that on all of them; of one that compares answers, that of their tokens.
    loss = getattr(step.program.loss, "of_all", getattr(step.program.loss, "of_tokens", step.program.loss))
    if not isinstance(loss, DecoderLoss):
        return "the loss (its parts cannot be told apart)"
    measured = replace(loss, measure=True)
    layout = replace(step.layout, explicit=False)

    def look(trainable: Any, frozen: Any, batch: Batch) -> tuple[Any, Any]:
        grads, (_, weight, sums, _) = accumulate(measured, trainable, frozen, {}, batch, key, layout)
        return sums, dict(rms_by_layer(step.program.trainable, grads))

    # Replicated, since a process can read nothing else of a job's arrays.
    compiled = jax.jit(look, out_shardings=NamedSharding(layout.mesh, P()))
    for m in range(step.program.phase.microbatches):
        one = {name: array[m : m + 1] for name, array in batch.items()}
        sums, grads = jax.device_get(compiled(trainable, frozen, one))
        for place, value in zip(decoder.places, sums[ACTIVATION_SQUARES], strict=True):
            if not np.isfinite(value):
                return f"{place} (its output; microbatch {m})"
        if not np.isfinite(sums["loss"]):
            return f"the logits or the loss (microbatch {m})"
        wrong = [place for place in backward_order(decoder, grads) if not np.isfinite(place[1])]
        if wrong:
            # Only a decoder's gradients come in a known order: of another model's, name some.
            named = ", ".join(name for name, _ in wrong[: 1 if isinstance(decoder, Decoder) else 3])
            return f"{named} (its gradient; microbatch {m})"
    return "the sum over microbatches, or the optimizer's update"


def backward_order(decoder: Model, grads: dict[str, Any]) -> list[tuple[str, float]]:
    """Weights' gradients in the order in which a backward pass makes them, by name and layer.

    That order is not known of a module of one's own, whose weights come by name.
    """
    if not isinstance(decoder, Decoder):
        return [(name, float(value)) for name, value in grads.items()]
    named: list[tuple[int, str, float]] = []
    for name, value in grads.items():
        if not name.startswith("stacks/"):
            late = -1 if name.startswith("embed/") else decoder.layers
            named.append((late, name, float(value)))
    for s, b, _, layers in decoder.blocks():
        for name, values in grads.items():
            if name.startswith(f"stacks/{s}/{b}/"):
                short = name.split("/layer/", 1)[1]
                # Those of the last layers, where the first ones are frozen.
                for turn, value in enumerate(values, layers.count - len(values)):
                    layer = layers.first + turn * layers.stride
                    named.append((layer, f"layer {layer}, {short}", float(value)))
    return [(name, value) for _, name, value in sorted(named, key=lambda entry: -entry[0])]

"""What a recipe means, before it runs: weights, where they lie, memory, and the first batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from mosaicjax.adapters import has_adapters
from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.models import flops
from mosaicjax.models.decoder import Decoder
from mosaicjax.recipe import Recipe
from mosaicjax.report.live import format_count
from mosaicjax.run_data import open_data
from mosaicjax.spec import Referenced, Spec, only_frozen, whole_spec
from mosaicjax.step import Step

GIB = 2**30
ROWS = 2
CHARACTERS = 400


def described(recipe: Recipe, devices: int) -> Step:
    """The recipe's step on a mesh of so many devices that need not be there.

    Raises:
        InputError: a mesh, batch or weight that does not divide.
    """
    sizes = recipe.mesh.axes(devices)
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return Step(recipe.program()[1], recipe.mesh.layout(mesh), recipe.seed)


def show(recipe: Recipe, devices: int) -> Iterator[str]:
    """The lines of `mosaicjax show`; opens the recipe's data last.

    Raises:
        InputError: as `described` and `run_data.open_data`.
    """
    step = described(recipe, devices)
    yield from weights_table(step)
    decoder = recipe.model.build()
    if isinstance(decoder, Decoder) and "experts" in decoder.dims:
        yield f"{flops.active(decoder):,} of them active: those that one token meets"
    yield ""
    yield from memory(step, devices)
    yield ""
    for phase, steps in recipe.in_phases:
        mine, tokens = phase.model.build(), steps * phase.batch * phase.seq
        cost = flops.per_token(mine, phase.seq)
        each, all_flops = flops.described(mine, cost, format_count), format_count(cost.causal * tokens)
        yield (
            f"{steps:,} steps x {phase.batch:,} rows x {phase.seq:,} tokens = {format_count(tokens)}"
            f" tokens; {each}, {all_flops} in all"
        )
    data = open_data(recipe)
    yield ""
    yield from first_rows(data.tokenizer, data.stream.rows(0, range(min(ROWS, recipe.batch))))


def weights_table(step: Step) -> Iterator[str]:
    """Name, axes, shape, partition and count of every weight, and their sum."""
    program, layout = step.program, step.layout
    spec = whole_spec(program.trainable, program.frozen)
    rows = [("weight", "axes", "shape", "partition", "count")]
    adapters = program.trainable if has_adapters(program.trainable.tree) else Spec({}, {})
    for name, param in (*spec.items(), *adapters.items()):
        shape = param.shape(spec.dims)
        axes = (("layers",) if param.layers else ()) + param.axes
        partition = ", ".join(_place(entry) for entry in layout.weight_partition(param))
        rows.append((name, " ".join(axes), "x".join(map(str, shape)), partition, f"{math.prod(shape):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=False)]
        yield "  ".join([*cells, row[4].rjust(widths[4])])
    frozen = program.frozen.count()
    beside = f", and {adapters.count():,} in adapters beside them" if adapters.count() else ""
    yield f"{spec.count():,} parameters" + (f", {frozen:,} of them frozen" if frozen else "") + beside


def _place(entry: Any) -> str:
    if entry is None:
        return "-"
    return entry if isinstance(entry, str) else "*".join(entry)


def memory(step: Step, devices: int) -> Iterator[str]:
    """Bytes at rest on each chip; activations are not among them."""
    state = step.abstract_state()
    parts = {
        "weights": shard_bytes(state.trainable),
        "gradients": shard_bytes(state.trainable),
        "optimizer": shard_bytes(state.optimizer),
        "batch": shard_bytes(step.abstract_batch()),
    }
    held = step.abstract_frozen()
    reference = held.reference if isinstance(held, Referenced) else {}
    beside = {"average": state.average, "frozen": only_frozen(held), "reference": reference}
    for name, tree in beside.items():
        if jax.tree.leaves(tree):
            parts[name] = shard_bytes(tree)
    mesh = " x ".join(f"{name} {size}" for name, size in step.layout.mesh.shape.items())
    yield f"per chip of {devices} ({mesh}), without activations and gathered weights:"
    for name, count in {**parts, "together": sum(parts.values())}.items():
        yield f"  {name:<10} {count / GIB:10.4f} GiB"


def shard_bytes(tree: Any) -> int:
    """Units: bytes of a tree of abstract arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def first_rows(tokenizer: Tokenizer, batch: dict[str, np.ndarray]) -> Iterator[str]:
    """Rows as text: what is predicted without loss stands in double brackets."""
    for row in range(len(batch["targets"])):
        weights, targets = batch["weights"][row], batch["targets"][row]
        segments = int(batch["segments"][row].max()) if "segments" in batch else 1
        yield (
            f"row {row} of the first batch: {len(targets):,} targets, {int((weights > 0).sum()):,} bear loss,"
            f" {segments} segment{'s' if segments != 1 else ''}"
        )
        yield from (f"  | {line}" for line in masked_text(tokenizer, targets, weights).splitlines())


def masked_text(tokenizer: Tokenizer, targets: np.ndarray, weights: np.ndarray) -> str:
    """The start of a row's targets as text, `[[...]]` around what bears no loss."""
    parts, at = [], 0
    edges = [*(np.flatnonzero(np.diff(weights > 0)) + 1), len(targets)]
    for edge in edges:
        text = tokenizer.decode(targets[at:edge].tolist())
        parts.append(text if weights[at] > 0 else f"[[{text}]]")
        at = int(edge)
    whole = "".join(parts)
    return whole if len(whole) <= CHARACTERS else whole[:CHARACTERS] + " ..."

"""What in a compiled step costs more than it must, each with the way out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mosaicjax.mesh import Layout
from mosaicjax.plan.count import Op
from mosaicjax.plan.step_time import StepTime
from mosaicjax.spec import Spec

SMALL = 2**20
"""Bytes of an all-reduce that nobody minds."""
WAITED = 0.05
"""Share of a step that synchronous collectives may take before it is said."""
SUBLANES = 16
"""Rows of a tile of bfloat16."""


def lints(ops: Sequence[Op], slow: StepTime, layout: Layout, spec: Spec) -> Iterator[str]:
    """One line each, with the fix; none where nothing is amiss."""
    yield from _full_reductions(ops, layout)
    yield from _narrow_shards(layout, spec)
    yield from _waited(slow)
    silent = sorted({op.name.partition(".")[0] for op in ops if op.kernel and not op.estimated})
    if silent:
        names = ", ".join(silent)
        yield f"kernels without a cost estimate, counted as nothing: {names}; fix: pl.CostEstimate"


def _full_reductions(ops: Sequence[Op], layout: Layout) -> Iterator[str]:
    """All-reduces of gradients of which each device keeps its shard, and those that stand in for gathers."""
    if layout.weight_shards == 1:
        return
    along = "with mesh.fsdp along the axes of the torus, as --mesh.fsdp 16 16 on a 16x16"
    explicit = f"--mesh.gather explicit {along}"
    count, moved = _reduced(ops, gathers=False)
    if count:
        yield (
            f"gradients are summed by {count:,} full all-reduces a step ({moved / 1e9:,.1f} GB sent by each"
            f" chip) where a reduce-scatter sends half; fix: {along if layout.explicit else explicit}"
        )
    count, moved = _reduced(ops, gathers=True)
    if count and not layout.explicit:
        yield (
            f"weights are gathered by {count:,} all-reduces a step ({moved / 1e9:,.1f} GB sent by each chip)"
            f" where an all-gather sends half; fix: {explicit}"
        )


def _reduced(ops: Sequence[Op], gathers: bool) -> tuple[int, float]:
    """How many all-reduces worth mentioning run, and what each chip sends in them."""
    found = [
        (op.times, one.sent)
        for op in ops
        for one in op.collectives
        if one.kind == "all-reduce" and one.whole > SMALL and "/gradients/" in op.place
        if ("sharding_constraint" in op.place) == gathers
    ]
    return sum(times for times, _ in found), sum(times * size for times, size in found)


def _narrow_shards(layout: Layout, spec: Spec) -> Iterator[str]:
    """Shards that do not fill a tile are padded, and gathered by a detour."""
    narrow = {}
    for _, param in spec.items():
        for axis in param.axes:
            shards = math.prod(layout.mesh.shape[name] for name in layout.dim(axis))
            if shards > 1 and len(param.axes) > 1 and spec.dims[axis] // shards < SUBLANES:
                narrow[axis] = (spec.dims[axis], shards)
    for axis, (size, shards) in narrow.items():
        yield (
            f"weights are cut along {axis} into pieces {size // shards} wide ({size:,} over {shards}), less"
            f" than a tile's {SUBLANES}; fix: fewer fsdp shards, as --mesh.data 2"
        )


def _waited(slow: StepTime) -> Iterator[str]:
    """Collectives beside which nothing is done."""
    waited = [each for each in slow.timed if each.kind == "collectives"]
    share = sum(each.seconds for each in waited) / slow.seconds
    if share > WAITED:
        kinds = sorted({one.kind for each in waited for one in each.op.collectives})
        yield (
            f"nothing is done beside synchronous collectives ({', '.join(kinds)}), up to {share:.0%} of the"
            " step; fix: fewer microbatches, or a mesh with fewer shards"
        )

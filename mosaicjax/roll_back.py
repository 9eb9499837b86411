"""Where a run goes back to when its loss jumps, and what it leaves out from there on."""

from __future__ import annotations

from dataclasses import replace

from mosaicjax import processes
from mosaicjax.checkpoint import complete_steps
from mosaicjax.errors import Diverged
from mosaicjax.run import Ready, read_cursor
from mosaicjax.spikes import RollBack, Spiked


def rolled_back(ready: Ready, spike: Spiked) -> tuple[Ready, str]:
    """The run before a spike, at its last checkpoint or the start, without the data in between; and a line.

    All processes call it, with no save under way.

    Raises:
        Diverged: the recipe says stop, or the run went back often enough.
    """
    policy, stream, now = ready.recipe.on_spike, ready.data.stream, ready.cursor
    saved = [step for step in complete_steps(ready.out) if step < spike.number]
    step = int(processes.broadcast_text(str(max(saved, default=0)), "the checkpoint to go back to"))
    where = f"the checkpoint of step {step:,}" if step else "the start"
    skipped = {stream.data_step(each) for each in range(step, spike.number)}
    skips = tuple(sorted({*stream.skips, *skipped}))
    often = isinstance(policy, RollBack) and now.rollbacks >= policy.most
    if not isinstance(policy, RollBack) or often:
        times = f", after {now.rollbacks} roll-backs" if often else ""
        raise Diverged(
            f"{spike}, a spike{times}; {where} is before it (without the data from there on:"
            f" --skips {' '.join(map(str, skips))})"
        )
    start = replace(now, step=0, tokens=0, seconds={}, recent=())
    cursor = replace(
        read_cursor(ready.out, step, ready.data) if step else start,
        skips=skips,
        rolled_back=tuple(sorted({*now.rolled_back, *skipped})),
        rollbacks=now.rollbacks + 1,
    )
    data = replace(ready.data, stream=stream.skipping(skips))
    said = f"{spike}, a spike: back to {where}, and on without {len(skipped):,} steps of data"
    return replace(ready, cursor=cursor, data=data), said

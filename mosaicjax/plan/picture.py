"""A bill as a picture: where a step's time goes, and what in the model takes it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from mosaicjax import storage
from mosaicjax.errors import InputError
from mosaicjax.plan.bill import Bill
from mosaicjax.plan.step_time import KINDS
from mosaicjax.plan.text import NAMES, costliest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"matrix": "#1f4e8c", "vector": "#6d8fbf", "kernels": "#3d9970", "collectives": "#d1582b"}


def draw(bill: Bill, path: str, name: str) -> None:
    """Write the picture as a PNG.

    Raises:
        InputError: it has no times.
    """
    buffer = io.BytesIO()
    figure(bill, name).savefig(buffer, format="png")
    storage.write_bytes(path, buffer.getvalue())


def figure(bill: Bill, name: str) -> Figure:
    """A step with optimistic and pessimistic links by kinds of work, and below it its costliest parts.

    Raises:
        InputError: it has no times.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if bill.fast is None or bill.slow is None:
        raise InputError("there is nothing to draw", expected="a step that fits chips of known speed")
    drawn = Figure(figsize=(9, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    above, below = drawn.subplots(2, 1, height_ratios=(1, 2.4))
    for place, step in enumerate((bill.slow, bill.fast)):
        begin = 0.0
        for kind in KINDS:
            seconds = getattr(step, kind)
            legend = NAMES[kind] if place else None
            above.barh(place, seconds, left=begin, color=COLORS[kind], label=legend)
            begin += seconds
        above.text(begin, place, f" {step.seconds:.3g} s", va="center", fontsize=8)
        above.set_yticks((0, 1), ("pessimistic links", "optimistic links"))
    above.set_xlabel("seconds a step")
    above.margins(x=0.1)
    above.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    parts = costliest(bill.fast)[::-1]
    places = range(len(parts))
    below.barh(places, [seconds for seconds, *_ in parts], color=[COLORS[kind] for _, kind, *_ in parts])
    below.set_yticks(places, [part for _, _, part, _ in parts])
    below.tick_params(axis="y", labelsize=7)
    below.set_xlabel("seconds a step, optimistic links")
    drawn.suptitle(
        f"{name} on {bill.topology.title}: ${bill.usd_per_million_tokens:.4f} a million tokens", fontsize=10
    )
    return drawn

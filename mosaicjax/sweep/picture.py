"""A sweep as a picture: loss against one swept value, a line for every setting of the others."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mosaicjax import storage
from mosaicjax.errors import InputError
from mosaicjax.sweep.grid import Axis
from mosaicjax.sweep.report import NAMES, Point, judged_by, points
from mosaicjax.sweep.runs import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_LOG_RATIO = 2.0
"""Two values at least so far apart stand on a logarithmic scale."""


def draw(results: Sequence[Result], axes: Sequence[Axis], path: str, name: str) -> None:
    """Write the picture as a PNG.

    Raises:
        InputError: no setting's runs all finished.
    """
    buffer = io.BytesIO()
    figure(results, axes, name).savefig(buffer, format="png")
    storage.write_bytes(path, buffer.getvalue())


def across(axes: Sequence[Axis]) -> Axis:
    """The axis that the picture goes along: that of most values, of numbers if there is one, of no seeds."""
    return max(axes, key=lambda axis: (not axis.repeats, axis.numbers is not None, len(axis.values)))


def is_logarithmic(numbers: Sequence[float]) -> bool:
    """Whether values are spaced by factors rather than by differences, as rates are."""
    ordered = sorted(numbers)
    if len(ordered) < 2 or ordered[0] <= 0:
        return False
    if len(ordered) == 2:
        return ordered[1] / ordered[0] >= LEAST_LOG_RATIO
    pairs = list(zip(ordered, ordered[1:], strict=False))

    def unevenness(steps: Sequence[float]) -> float:
        return statistics.pstdev(steps) / statistics.fmean(steps)

    return unevenness([math.log(b / a) for a, b in pairs]) < unevenness([b - a for a, b in pairs])


def curves(found: Sequence[Point], along: Axis) -> dict[str, list[tuple[int, Point]]]:
    """Settings by what they share but for the axis; each with the place of its value on it, in order."""
    numbers = along.numbers
    order = (
        range(len(along.values)) if numbers is None else sorted(range(len(numbers)), key=numbers.__getitem__)
    )
    place = {along.values[index]: at for at, index in enumerate(order)}
    grouped: dict[str, list[tuple[int, Point]]] = {}
    for point in found:
        others = ", ".join(f"{name} {value}" for name, value in point.values.items() if name != along.name)
        grouped.setdefault(others, []).append((place[point.values[along.name]], point))
    return {others: sorted(curve, key=lambda at: at[0]) for others, curve in grouped.items()}


def figure(results: Sequence[Result], axes: Sequence[Axis], name: str) -> Figure:
    """The mean loss of every setting, a bar from the least to the most of its seeds, crosses for no loss.

    Raises:
        InputError: no setting's runs all finished.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = points(results)
    if not any(point.sound for point in found):
        raise InputError("there is nothing to draw", expected="a setting whose runs all finished")
    drawn = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    plot = drawn.subplots()
    along = across(axes)
    if along.repeats:
        losses = [point.losses for point in found]
        values = [float(result.values[along.name]) for result in found[0].results]
        plot.plot(values, losses[0], "o")
    else:
        for others, curve in curves(found, along).items():
            sound = [(_x(point, at, along), point) for at, point in curve if point.sound]
            spread = [
                [point.loss - min(point.losses) for _, point in sound],
                [max(point.losses) - point.loss for _, point in sound],
            ]
            line = plot.errorbar(
                [x for x, _ in sound],
                [point.loss for _, point in sound],
                yerr=spread,
                marker="o",
                markersize=4,
                linewidth=1.4,
                capsize=3,
                label=others or None,
            )
            broken = [_x(point, at, along) for at, point in curve if not point.sound]
            # At the top, whatever the losses are.
            plot.plot(
                broken,
                [0.98] * len(broken),
                "x",
                color=line.lines[0].get_color(),
                transform=plot.get_xaxis_transform(),
            )
        if along.numbers is None:
            plot.set_xticks(range(len(along.values)), along.values)
        elif is_logarithmic(along.numbers):
            plot.set_xscale("log")
            plot.set_xticks(along.numbers, along.values)
            plot.minorticks_off()
        if plot.get_legend_handles_labels()[0]:
            plot.legend(frameon=False, fontsize=8)
    plot.set_title(name, loc="left")
    plot.set_xlabel(along.name)
    plot.set_ylabel(f"{NAMES[judged_by(results)]} (nats per token)")
    plot.grid(color="#e6e6e6", linewidth=0.6)
    plot.spines[["top", "right"]].set_visible(False)
    return drawn


def _x(point: Point, place: int, along: Axis) -> float:
    return float(place) if along.numbers is None else float(point.values[along.name])

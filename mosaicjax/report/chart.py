"""Line charts as SVG text, that a page holds and no program draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from mosaicjax.report.curve import Points, smoothed, smoothing_rows

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40
MOST_POINTS = 1_000
"""A line of more points is drawn by the means of runs of neighbours."""


@dataclass(frozen=True)
class Line:
    """Points in order of x, of which those that are not finite leave a gap; `dots` marks each."""

    name: str
    colour: int
    points: Points
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes. `form` writes a number of an axis."""

    title: str
    x_name: str
    y_name: str
    lines: tuple[Line, ...]
    x_form: Callable[[float], str]
    y_form: Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """From numbers to pixels: `low` and `high` lie at `begin` and `end`."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a number lies."""
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self, most: int) -> list[float]:
        """Round numbers within it, 1, 2 or 5 of a power of ten apart, no more than `most`."""
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        step = next(step * by for by in (1, 2, 5, 10, 20) if (self.high - self.low) / (step * by) <= most)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """The means of runs of neighbours, so that at most so many points are left, the last among them."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return points
    found: Points = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        finite = [y for _, y in part if math.isfinite(y)]
        found.append((part[-1][0], sum(finite) / len(finite) if finite else math.nan))
    return found


def smooth(points: Points) -> Points:
    """Each point's mean with its neighbours'."""
    values = smoothed([y for _, y in points], smoothing_rows(len(points)))
    return [(x, y) for (x, _), y in zip(points, values, strict=True)]


def bounds(lines: Sequence[Line]) -> tuple[Axis, Axis] | None:
    """Axes that hold all that is finite; None: nothing is.

    The highest tenth of a long line may lie above the chart: the first losses would flatten all others.
    """
    finite = [[(x, y) for x, y in line.points if math.isfinite(y)] for line in lines]
    if not any(finite):
        return None
    xs = [x for part in finite for x, _ in part]
    low = min(y for part in finite for _, y in part)
    high = max(_ninth_tenth([y for _, y in part]) for part in finite if part)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    left = min(0.0, min(xs))
    right = max(xs) if max(xs) > left else left + 1.0
    x_axis = Axis(left, right, LEFT, WIDTH - RIGHT)
    return x_axis, Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def _ninth_tenth(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[-1] if len(ordered) < 20 else ordered[math.ceil(0.9 * len(ordered)) - 1]


def svg(chart: Chart) -> str:
    """The chart as an SVG element; where there is nothing to draw, a paragraph that says so."""
    lines = [Line(each.name, each.colour, thinned(each.points), each.dots) for each in chart.lines]
    axes = bounds(lines)
    if axes is None:
        return f'<p class="empty">{escape(chart.title)}: nothing is recorded.</p>'
    x_axis, y_axis = axes
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">'
        f'<clipPath id="{_identity(chart)}"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}"'
        f' height="{HEIGHT - TOP - BOTTOM}"/></clipPath>'
    ]
    for tick in y_axis.ticks(6):
        y = f"{y_axis(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y}">{escape(chart.y_form(tick))}</text>')
    for tick in x_axis.ticks(6):
        parts.append(
            f'<text class="x" x="{x_axis(tick):.1f}" y="{HEIGHT - BOTTOM + 15}">'
            f"{escape(chart.x_form(tick))}</text>"
        )
    parts.append(
        f'<text class="x" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(chart.x_name)}</text>'
    )
    parts.append(f'<g clip-path="url(#{_identity(chart)})">')
    for line in lines:
        for piece in pieces(line.points):
            at = " ".join(f"{x_axis(x):.2f},{y_axis(y):.2f}" for x, y in piece)
            name = escape(line.name, quote=True)
            parts.append(f'<polyline class="c{line.colour}" data-name="{name}" points="{at}"/>')
        if line.dots:
            parts += [
                f'<circle class="c{line.colour}" cx="{x_axis(x):.2f}" cy="{y_axis(y):.2f}" r="3">'
                f"<title>{escape(line.name)}: {chart.y_form(y)} at {chart.x_form(x)}</title></circle>"
                for x, y in line.points
                if math.isfinite(y)
            ]
    parts.append("</g></svg>")
    return "\n".join(parts)


def pieces(points: Points) -> list[Points]:
    """A line between its gaps."""
    found: list[Points] = [[]]
    for x, y in points:
        if math.isfinite(y):
            found[-1].append((x, y))
        elif found[-1]:
            found.append([])
    return [piece for piece in found if piece]


def _identity(chart: Chart) -> str:
    return "c-" + "".join(each if each.isalnum() else "-" for each in chart.title.lower())

"""What a sweep came to: the table, the best setting, and whether it lies at an edge of what was tried."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mosaicjax.log import encode
from mosaicjax.report.live import format_count, format_duration, format_usd
from mosaicjax.sweep.grid import SEED, Axis
from mosaicjax.sweep.runs import Result, Status

HELDOUT, TRAIN = "heldout_loss", "train_loss"
SAID = 60
"""How many characters of a run's last line are shown; `sweep.json` has all."""

NAMES = {HELDOUT: "held-out loss", TRAIN: "train loss"}


@dataclass(frozen=True)
class Point:
    """The runs of one setting, which differ by their seed alone; losses are those of `judged_by`."""

    values: Mapping[str, str]
    results: tuple[Result, ...]
    losses: tuple[float, ...]

    @property
    def sound(self) -> bool:
        """Whether all of its runs finished with a loss that is a number."""
        return len(self.losses) == len(self.results)

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds (of a sample); None for one seed."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def bits_per_byte(self) -> float | None:
        """The mean over seeds; None where nothing was held out."""
        each = [result.bits_per_byte for result in self.results if result.bits_per_byte is not None]
        return statistics.fmean(each) if each else None

    @property
    def title(self) -> str:
        """Its values, for a person."""
        return ", ".join(f"{name} {value}" for name, value in self.values.items()) or "all seeds"


def judged_by(results: Sequence[Result]) -> str:
    """The loss that runs are compared by: held-out, or the last step's where one has nothing held out."""
    done = [result for result in results if result.status is Status.FINISHED]
    return HELDOUT if all(result.heldout_loss is not None for result in done) else TRAIN


def points(results: Sequence[Result]) -> list[Point]:
    """Settings in the order of the runs, with the runs of all seeds together."""
    kind = judged_by(results)
    groups: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    for result in results:
        setting = tuple((name, value) for name, value in result.values.items() if name != SEED)
        groups.setdefault(setting, []).append(result)
    found = []
    for setting, group in groups.items():
        each = [getattr(result, kind) for result in group if result.status is Status.FINISHED]
        losses = tuple(loss for loss in each if loss is not None and math.isfinite(loss))
        found.append(Point(dict(setting), tuple(group), losses))
    return found


def best(found: Sequence[Point]) -> Point | None:
    """The setting of the lowest mean loss among those whose runs all finished."""
    return min((point for point in found if point.sound), key=lambda point: point.loss, default=None)


def is_range(axis: Axis) -> bool:
    """Whether an axis has a least and a largest value, beyond which others lie."""
    return not axis.repeats and axis.numbers is not None and len(axis.numbers) > 1


def edges(point: Point, axes: Sequence[Axis]) -> dict[str, str]:
    """The axes of numbers at whose least or largest value a setting lies, and which of the two.

    Beyond such a value there may be a better one. A larger value whose runs diverged was tried too.
    """
    found: dict[str, str] = {}
    for axis in filter(is_range, axes):
        assert axis.numbers is not None, "a range"
        number = float(point.values[axis.name])
        if number == min(axis.numbers):
            found[axis.name] = "smallest"
        elif number == max(axis.numbers):
            found[axis.name] = "largest"
    return found


def described(result: Result) -> str:
    """How a run ended, in a few words."""
    if result.status is not Status.FINISHED:
        short = result.said if len(result.said) <= SAID else result.said[:SAID].rstrip() + " ..."
        return f"{result.status.value}: {short}"
    kind = judged_by([result])
    loss = getattr(result, kind)
    return f"finished: {NAMES[kind]} {loss:.4f} in {format_duration(result.seconds)}"


def table(results: Sequence[Result], axes: Sequence[Axis]) -> list[str]:
    """A line a run, in the order of the runs, with a head."""
    kind = judged_by(results)
    rows = [(*(axis.name for axis in axes), NAMES[kind], "bits/byte", "tokens", "time", "dollars", "")]
    for result in results:
        loss, done = getattr(result, kind), result.status is Status.FINISHED
        rows.append(
            (
                *(result.values[axis.name] for axis in axes),
                "-" if loss is None else f"{loss:.4f}",
                "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}",
                format_count(result.tokens),
                format_duration(result.seconds),
                "-" if result.usd is None else format_usd(result.usd),
                "" if done else described(result),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]


def lines(results: Sequence[Result], axes: Sequence[Axis]) -> Iterator[str]:
    """All that is printed of a sweep."""
    yield from table(results, axes)
    counts = [
        f"{number} {status.value}"
        for status in Status
        if (number := sum(result.status is status for result in results))
    ]
    tokens = format_count(sum(result.tokens for result in results))
    time = format_duration(sum(result.seconds for result in results))
    paid = [result.usd for result in results if result.usd is not None]
    spent = f", {format_usd(sum(paid))}" if paid else ""
    yield f"{len(results)} runs: {', '.join(counts)}; {tokens} tokens in {time}{spent}"
    found = points(results)
    top = best(found)
    if top is None:
        yield "no best: there is no setting whose runs all finished"
        return
    kind = NAMES[judged_by(results)]
    many = top.deviation is not None
    seeds = f" (mean of {len(top.losses)} seeds, standard deviation {top.deviation:.4f})" if many else ""
    bits = "" if top.bits_per_byte is None else f", {top.bits_per_byte:.4f} bits/byte"
    yield f"best: {top.title}: {kind} {top.loss:.4f}{seeds}{bits}"
    at_edge = edges(top, axes)
    for axis in filter(is_range, axes):
        if axis.name in at_edge:
            yield (
                f"{axis.name} {top.values[axis.name]} is the {at_edge[axis.name]} value tried: widen it,"
                " a better one may lie beyond"
            )
        else:
            yield f"{axis.name} {top.values[axis.name]} lies between others that were tried"


def to_json(results: Sequence[Result], axes: Sequence[Axis]) -> dict[str, Any]:
    """Values tried, every run's result and the best setting, as JSON holds them."""
    top = best(points(results))
    chosen = None
    if top is not None:
        chosen = {
            "values": dict(top.values),
            "loss": top.loss,
            "deviation": top.deviation,
            "bits_per_byte": top.bits_per_byte,
            "edges": edges(top, axes),
        }
    rows = []
    for result in results:
        held = {name: value for name, value in vars(result).items() if name not in ("values", "status")}
        rows.append({"values": dict(result.values), "status": result.status.value, **encode(held)})
    return {
        "over": {axis.name: list(axis.values) for axis in axes},
        "judged_by": judged_by(results),
        "best": chosen,
        "results": rows,
    }

"""The loss curve of a run as a picture."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

from mosaicjax import storage
from mosaicjax.errors import InputError
from mosaicjax.report.shown import loss_unit

RAW, SMOOTH, HELDOUT = "#b8c4d6", "#1f4e8c", "#d1582b"

Points = list[tuple[float, float]]


def draw_curve(
    rows: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str,
    over: Literal["tokens", "step"] = "tokens",
) -> None:
    """Draw train loss, raw and smoothed, and held-out loss over tokens or steps, as a PNG.

    Rows are those of `mosaicjax.log.read_rows`: `loss` in rows of kind `train` and `eval`, beside `step` and,
    to draw over tokens, `tokens` seen so far. A loss that is not finite leaves a gap.

    Raises:
        InputError: no row of kind `train` has both numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = list(rows)
    train, heldout = points(rows, "train", over), points(rows, "eval", over)
    if not train:
        raise InputError(
            "there is nothing to draw", expected=f"train rows with loss and {over}", got=f"{len(rows)} rows"
        )
    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    window = smoothing_rows(len(train))
    axes.plot(*zip(*train, strict=True), color=RAW, linewidth=0.8, label="train")
    smooth = list(zip([x for x, _ in train], smoothed([y for _, y in train], window), strict=True))
    axes.plot(
        *zip(*smooth, strict=True),
        color=SMOOTH,
        linewidth=1.8,
        label=f"train, smoothed over {2 * window + 1} rows: {_last(smooth)}",
    )
    if heldout:
        axes.plot(
            *zip(*heldout, strict=True),
            color=HELDOUT,
            linewidth=1.2,
            marker="o",
            markersize=4,
            label=f"held out: {_last(heldout)}",
        )
    axes.set_title(title, loc="left")
    axes.set_xlabel("tokens seen" if over == "tokens" else "step")
    axes.set_ylabel(f"loss ({loss_unit(rows)})")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    storage.write_bytes(path, picture.getvalue())


def points(rows: Iterable[Mapping[str, Any]], kind: str, over: str) -> Points:
    """The (x, loss) pairs of one kind of row, in order of x; not a number where the loss is not finite."""
    found = [
        (float(row[over]), float(row["loss"]) if math.isfinite(row["loss"]) else math.nan)
        for row in rows
        if row["kind"] == kind and "loss" in row and over in row
    ]
    return sorted(found, key=lambda point: point[0])


def smoothing_rows(count: int) -> int:
    """How many rows to either side a curve of this many is smoothed over: a hundredth of them."""
    return max(1, count // 100)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean over `window` values to either side of each, so that a falling curve does not lag.

    Near the start both sides shrink alike; near the end only the later side does. A value that is not a
    number leaves a gap and is not averaged.
    """
    sums = [0.0, *accumulate(0.0 if math.isnan(value) else value for value in values)]
    counts = [0, *accumulate(int(not math.isnan(value)) for value in values)]
    means: list[float] = []
    for i, value in enumerate(values):
        reach = min(window, i)
        start, stop = i - reach, min(i + reach + 1, len(values))
        count = counts[stop] - counts[start]
        means.append(math.nan if math.isnan(value) else (sums[stop] - sums[start]) / count)
    return means


def _last(curve: Points) -> str:
    finite = [y for _, y in curve if math.isfinite(y)]
    return f"{finite[-1]:.3f}" if finite else "never finite"

"""A run as reports take it: its files, the FLOPs behind them, and the scores of tasks that it keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mosaicjax import recipe_file, storage
from mosaicjax.log import RUN_JSON, Row, read_rows
from mosaicjax.methods.dpo import ACCURACY
from mosaicjax.models import flops
from mosaicjax.recipe import Recipe
from mosaicjax.report.summary import SUMMARY

SAMPLE = "sample.txt"
EVAL = "eval"
"""Where `mosaicjax eval RUN --out RUN/eval` leaves scores for the page."""


@dataclass(frozen=True)
class Shown:
    """A run as the page takes it: its name, its files, and the FLOPs behind each row of its metrics.

    Units: `flops` are the model's FLOPs up to the row's step, causal attention.
    """

    name: str
    rows: Sequence[Row]
    flops: Sequence[float]
    summary: Mapping[str, Any]
    surroundings: Mapping[str, Any]
    recipe: Recipe
    sample: str
    scores: Mapping[str, str]


def loss_unit(*runs: Sequence[Mapping[str, Any]]) -> str:
    """What the losses in the metrics of some runs are of: of preference pairs they are a pair's."""
    of_pairs = {any(ACCURACY in row for row in rows) for rows in runs}
    return "nats" if len(of_pairs) > 1 else "nats a pair" if True in of_pairs else "nats a token"


def read(run: str, name: str) -> Shown:
    """A run's files, finished or not.

    Raises:
        InputError: no run is there, or a file of it cannot be read.
    """
    rows = read_rows(run)
    recipe = recipe_file.from_run(run).recipe

    def held(file: str) -> str:
        path = storage.join(run, file)
        return storage.read_text(path) if storage.exists(path) else ""

    return Shown(
        name=name,
        rows=rows,
        flops=flops_of(recipe, [int(row["step"]) for row in rows]),
        summary=json.loads(held(SUMMARY) or "{}"),
        surroundings=json.loads(held(RUN_JSON) or "{}"),
        recipe=recipe,
        sample=held(SAMPLE),
        scores=task_scores(held(f"{EVAL}/results.json"), held(f"{EVAL}/gauntlet.json")),
    )


def task_scores(results: str, gauntlet: str) -> dict[str, str]:
    """Scores by task and metric, of lm-eval's results and the Gauntlet's as `mosaicjax eval` keeps them.

    A metric of lm-eval's stands with its standard error; of the Gauntlet what is partial is called so.
    """
    found: dict[str, str] = {}
    for task, metrics in json.loads(results or "{}").get("results", {}).items():
        for metric, value, error in metrics_of(metrics):
            found[f"{task}, {metric}"] = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
    whole = json.loads(gauntlet or "{}")
    for kind in ("categories", "averages"):
        for name, score in whole.get(kind, {}).items():
            if score["score"] is not None:
                found[f"Gauntlet, {name}"] = f"{score['score']:.4f}"
            else:
                found[f"Gauntlet, {name}"] = f"partial: {len(score['missing'])} missing"
    return found


def metrics_of(results: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Name, value and standard error of each metric of a task in lm-eval's results."""
    for name, value in results.items():
        metric, _, way = name.partition(",")
        if way and not metric.endswith("_stderr") and isinstance(value, float):
            error = results.get(f"{metric}_stderr,{way}")
            named = metric if way == "none" else f"{metric} ({way})"
            yield named, value, error if isinstance(error, float) else None


def flops_of(recipe: Recipe, steps: Sequence[int]) -> list[float]:
    """The model's FLOPs of so many first steps, phase by phase; causal attention."""
    ends: list[tuple[int, float]] = []
    for phase, count in recipe.in_phases:
        each = flops.per_token(phase.model.build(), phase.seq).causal * phase.batch * phase.seq
        ends.append((count, each))
    found = []
    for step in steps:
        left, total = step, 0.0
        for count, each in ends:
            total += min(left, count) * each
            left -= min(left, count)
        # Steps beyond the recipe's are no steps of it.
        found.append(total)
    return found

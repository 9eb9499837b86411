"""`mosaicjax sweep`: every combination of some values trained, compared, written down and drawn."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence

from mosaicjax import recipe_file, storage
from mosaicjax.errors import InputError
from mosaicjax.run import PACKAGES, git_commit, version
from mosaicjax.stop_request import StopRequest
from mosaicjax.sweep.grid import Axis, Cell, cells, read_axes
from mosaicjax.sweep.picture import draw
from mosaicjax.sweep.report import best, described, lines, points, to_json
from mosaicjax.sweep.runs import Result, Status, Trainer, known, locked, train_cell

SWEEP, PICTURE = "sweep.json", "sweep.png"
UNFINISHED = 1
"""The exit code where a run failed, or none finished."""


def sweep(
    recipe: str,
    over: Sequence[str],
    overrides: Sequence[str],
    out: str,
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> int:
    """Train every combination that has yet to end, print what came of all, and give the exit code.

    `environment` is what the runs' processes start with. The same call again goes on where it was stopped.

    Raises:
        InputError: a recipe or value that cannot be, before anything runs; or a run that refuses its input.
    """
    if storage.is_remote(out):
        raise InputError("a sweep writes to this machine alone", got=out, fix="an --out on this machine")
    axes = read_axes(over, overrides)
    planned = cells(recipe, overrides, axes, out)
    with locked(out) as lock, StopRequest() as stop:
        trainer = Trainer(environment, lock, stop)
        results: list[Result] = []
        for number, cell in enumerate(planned, start=1):
            where = f"run {number} of {len(planned)}: {cell.title}"
            result = known(cell)
            if result is None:
                say(f"{where}: begins, in {cell.run}")
                result = train_cell(recipe, cell, trainer, stop)
            say(f"{where}: {described(result)}")
            results.append(result)
            write(os.path.join(out, SWEEP), recipe, overrides, axes, planned, results)
            if stop.asked or result.status is Status.STOPPED:
                say(f"stopped at run {number} of {len(planned)}; the same command goes on from there")
                return 0
    for line in lines(results, axes):
        say(line)
    if best(points(results)) is None:
        say(f"in {out}: {SWEEP}")
        return UNFINISHED
    draw(results, axes, os.path.join(out, PICTURE), planned[0].loaded.name)
    say(f"in {out}: {SWEEP}, {PICTURE}, and a directory for each run")
    return UNFINISHED if any(result.status is Status.FAILED for result in results) else 0


def write(
    path: str,
    recipe: str,
    overrides: Sequence[str],
    axes: Sequence[Axis],
    planned: Sequence[Cell],
    results: Sequence[Result],
) -> None:
    """Write what is known so far, whole or not at all; `recipe` in it is that of the first run, resolved."""
    about = {
        "command": shlex.join(["mosaicjax", *sys.argv[1:]]),
        "recipe": recipe,
        "overrides": list(overrides),
        "git": git_commit(),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
        "runs": len(planned),
        **to_json(results, axes),
        "resolved": json.loads(recipe_file.to_json(planned[0].loaded.recipe)),
    }
    storage.write_text(path, json.dumps(about, indent=1, allow_nan=False) + "\n")

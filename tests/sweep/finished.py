"""Runs of a sweep as they lie on the disk once they have ended, made without training."""

import json
import os

from mosaicjax import recipe_file
from mosaicjax.hardware import Price
from mosaicjax.report.summary import Heldout, Outcome, Seconds, write_summary
from mosaicjax.sweep.runs import Result, Status

PRICE = Price(3.6, "made up", "2026-01-01")


def finish(cell, loss, *, steps=None, heldout=True):
    """Put the files of a finished run where a sweep looks for them: 1,000 tokens in 10 s for a cent."""
    os.makedirs(cell.run)
    recipe_file.save(cell.run, cell.loaded)
    outcome = Outcome(
        steps=cell.loaded.recipe.steps if steps is None else steps,
        tokens=1_000,
        seconds=Seconds(total=10.0, compile=1.0, evaluate=1.0, save=1.0, data_wait=0.0, train=7.0),
        train_loss=loss + 1.0,
        heldout=Heldout(loss, 2.0) if heldout else None,
        chip="a chip",
        chips=1.0,
        price=PRICE,
    )
    write_summary(cell.run, outcome)
    with open(os.path.join(cell.run, "run.json"), "w") as file:
        json.dump({"git": "abc"}, file)


def result(loss, status=Status.FINISHED, **values):
    """A run's result with that held-out loss."""
    done = status is Status.FINISHED
    return Result(
        values={name.replace("_", "."): value for name, value in values.items()},
        run="somewhere",
        status=status,
        heldout_loss=loss if done else None,
        bits_per_byte=loss / 2 if done else None,
        train_loss=loss + 1 if done else None,
        tokens=1_000,
        seconds=10.0,
        usd=0.01,
        said="" if done else "step 3: loss nan",
    )

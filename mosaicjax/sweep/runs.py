"""The runs of a sweep: each a process of `mosaicjax train`, and what it came to."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from mosaicjax import recipe_file, storage
from mosaicjax.errors import InputError
from mosaicjax.log import METRICS, RUN_JSON, decode, read_rows
from mosaicjax.report.summary import SUMMARY
from mosaicjax.stop_request import StopRequest
from mosaicjax.sweep.grid import Cell

OUTPUT = "output.txt"
"""What a run's processes printed, in its directory."""

DIVERGED = "diverged.json"
"""The mark of a run that diverged, in its directory: it would again."""

LOCK = ".sweep.lock"
EXIT_DIVERGED, EXIT_INPUT = 1, 2
POLL_SECONDS = 0.2


class Status(Enum):
    """How a run stands: done, at a loss that is no number (or a spike), broken off, or asked to stop."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Units: losses in nats a target token, `bits_per_byte` and `heldout_loss` over all held-out rows at the
    end; None where there is none. `said` is the line of a run that did not finish, `commit` that of the code.
    """

    values: Mapping[str, str]
    run: str
    status: Status
    heldout_loss: float | None = None
    bits_per_byte: float | None = None
    train_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    usd: float | None = None
    said: str = ""
    commit: str = ""


class Trainer:
    """Trains one run of a sweep at a time; `environment` is that of its processes."""

    def __init__(self, environment: Mapping[str, str], lock: int, stop: StopRequest) -> None:
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, [environment.get("PYTHONPATH", "")])]
        # The package of this process, wherever it was found.
        self._environment = {**environment, "PYTHONPATH": os.pathsep.join(paths)}
        self._lock, self._stop = lock, stop

    def __call__(self, recipe: str, cell: Cell) -> tuple[int, str]:
        """Train until the run ends; its exit code (negative: the signal that ended it) and its last line.

        SIGTERM and Ctrl-C are passed on to it.
        """
        command = [sys.executable, "-m", "mosaicjax.cli", "train", recipe, "--out", cell.run, *cell.overrides]
        os.makedirs(cell.run, exist_ok=True)
        path = os.path.join(cell.run, OUTPUT)
        with open(path, "ab") as output:
            begin = output.tell()
            process = subprocess.Popen(
                command,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Held by the run as well: while it goes on without us, no other sweep begins here.
                pass_fds=(self._lock,),
            )
            os.pwrite(self._lock, f"{process.pid:<20}".encode(), 0)
            code = self._wait(process)
        return code, last_line(storage.read_bytes(path)[begin:].decode("utf-8", "replace"))

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        told = False
        try:
            while True:
                if self._stop.asked and not told:
                    process.terminate()
                    told = True
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(POLL_SECONDS)
        finally:
            # Reached with the process alive by a second Ctrl-C alone.
            process.kill()
            process.wait()


def last_line(text: str) -> str:
    """The error in what a process printed, without our name before it; "" where there is none.

    Of a traceback, which is a defect of ours, it is the exception.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(line.startswith("Traceback ") for line in lines):
        return lines[-1]
    ours = [line for line in lines if line.startswith("mosaicjax: ")]
    return ours[-1].removeprefix("mosaicjax: ") if ours else ""


@contextlib.contextmanager
def locked(out: str) -> Iterator[int]:
    """The sweep's directory, made and held by this process alone; the lock's file descriptor.

    Raises:
        InputError: another sweep, or a run that one left behind, is under way there.
    """
    storage.make_dirs(out)
    with storage.refusal("write", out):
        file = os.open(os.path.join(out, LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            process = os.pread(file, 20, 0).decode().strip()
            raise InputError(
                f"a run of the sweep in {out} is under way (process {process or 'unknown'})",
                fix="wait for it, or end it",
            ) from error
        yield file
    finally:
        os.close(file)


def known(cell: Cell) -> Result | None:
    """What a run of this very recipe came to; None where it has yet to end."""
    mark = os.path.join(cell.run, DIVERGED)
    if os.path.exists(mark):
        about = json.loads(storage.read_text(mark))
        if about["recipe"] == cell.digest:
            return unfinished(cell, Status.DIVERGED, about["said"])
    path, recipe = os.path.join(cell.run, SUMMARY), os.path.join(cell.run, recipe_file.RECIPE_JSON)
    if not (os.path.exists(path) and os.path.exists(recipe)):
        return None
    summary = json.loads(storage.read_text(path))
    # With more steps than before, a run that goes on has its new recipe beside its old summary.
    done = summary["steps"] >= cell.loaded.recipe.steps
    same = storage.read_text(recipe) == recipe_file.to_json(cell.loaded.recipe)
    return finished(cell, summary) if done and same else None


def train_cell(recipe: str, cell: Cell, trainer: Any, stop: StopRequest) -> Result:
    """Train a run to its end, or on to it, and read what it came to.

    Raises:
        InputError: the run refuses its input, with its line.
    """
    code, said = trainer(recipe, cell)
    if code == EXIT_INPUT:
        raise InputError(f"the run with {cell.title}: {said or f'see {os.path.join(cell.run, OUTPUT)}'}")
    if code == EXIT_DIVERGED and said.startswith("step "):
        about = {"recipe": cell.digest, "said": said}
        storage.write_text(os.path.join(cell.run, DIVERGED), json.dumps(about, indent=1) + "\n")
        return unfinished(cell, Status.DIVERGED, said)
    if code == 0 and (result := known(cell)) is not None:
        return result
    if stop.asked or code == 0:
        return unfinished(cell, Status.STOPPED, "stopped; the same command goes on from there")
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return unfinished(cell, Status.FAILED, f"{ended}; {said or os.path.join(cell.run, OUTPUT)}")


def finished(cell: Cell, summary: Mapping[str, Any]) -> Result:
    """The result of a run with a summary."""
    heldout, cost = summary["heldout"], summary["cost"]
    return Result(
        values=cell.values,
        run=cell.run,
        status=Status.FINISHED,
        heldout_loss=decode(heldout)["loss"] if heldout else None,
        bits_per_byte=decode(heldout).get("bits_per_byte") if heldout else None,
        train_loss=decode(summary["loss"])["train"],
        tokens=summary["tokens"],
        seconds=decode(summary["seconds"])["total"],
        usd=cost["usd"] if cost else None,
        commit=_commit(cell.run),
    )


def unfinished(cell: Cell, status: Status, said: str) -> Result:
    """The result of a run without a summary, as far as its metrics go."""
    there = os.path.exists(os.path.join(cell.run, METRICS))
    rows = [row for row in read_rows(cell.run) if row["kind"] == "train"] if there else []
    if not rows:
        return Result(cell.values, cell.run, status, said=said, commit=_commit(cell.run))
    clock = rows[-1]["time"]
    return Result(
        values=cell.values,
        run=cell.run,
        status=status,
        tokens=rows[-1]["tokens"],
        seconds=clock.get("elapsed_seconds", 0.0),
        usd=clock.get("cost_usd"),
        said=said,
        commit=_commit(cell.run),
    )


def _commit(run: str) -> str:
    path = os.path.join(run, RUN_JSON)
    return str(json.loads(storage.read_text(path))["git"]) if os.path.exists(path) else ""

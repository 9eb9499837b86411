"""A sweep from the command line: what is run, what is not run again, and what is written."""

import fcntl
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from mosaicjax.errors import InputError
from mosaicjax.stop_request import StopRequest
from mosaicjax.sweep.grid import Axis, cells
from mosaicjax.sweep.runs import Status, Trainer, known, last_line, locked, train_cell
from tests import tiny
from tests.sweep.finished import finish

REFUSED, UNFINISHED = 2, 1
RATE = "optimizer.lr.peak=1e-3"
RATES = f"{RATE},2e-3,4e-3"


def grid(recipe, out, *overrides, over=RATES):
    return cells(str(recipe), overrides, [Axis.read(over)], str(out))


def ends_with(code, said, before=lambda cell: None):
    """A stand-in for a run's process."""

    def train(recipe, cell):
        before(cell)
        return code, said

    return train


def test_runs_that_have_ended_are_read_and_not_run(tiny_recipe, tmp_path, capsys):
    for cell, loss in zip(grid(tiny_recipe, tmp_path), (2.0, 1.5, 1.75), strict=True):
        finish(cell, loss)
    assert tiny.run("sweep", tiny_recipe, "--out", tmp_path, "--over", RATES) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "run 1 of 3: optimizer.lr.peak 1e-3: finished: held-out loss 2.0000 in 10 s",
        "run 2 of 3: optimizer.lr.peak 2e-3: finished: held-out loss 1.5000 in 10 s",
        "run 3 of 3: optimizer.lr.peak 4e-3: finished: held-out loss 1.7500 in 10 s",
        "optimizer.lr.peak  held-out loss  bits/byte  tokens  time  dollars",
        "             1e-3         2.0000     1.4427   1.00k  10 s    $0.01",
        "             2e-3         1.5000     1.0820   1.00k  10 s    $0.01",
        "             4e-3         1.7500     1.2624   1.00k  10 s    $0.01",
        "3 runs: 3 finished; 3.00k tokens in 30 s, $0.03",
        "best: optimizer.lr.peak 2e-3: held-out loss 1.5000, 1.0820 bits/byte",
        "optimizer.lr.peak 2e-3 lies between others that were tried",
        f"in {tmp_path}: sweep.json, sweep.png, and a directory for each run",
    ]
    held = json.loads((tmp_path / "sweep.json").read_text())
    assert held["best"]["loss"] == 1.5 and held["runs"] == 3
    assert held["recipe"] == str(tiny_recipe) and held["resolved"]["steps"] == 6
    assert held["packages"]["jax"] and held["git"] and held["overrides"] == []
    assert [row["commit"] for row in held["results"]] == ["abc"] * 3
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_known_is_of_this_very_recipe(tiny_recipe, tmp_path):
    first, second, third = grid(tiny_recipe, tmp_path)
    assert known(first) is None
    finish(first, 2.0)
    assert known(first).heldout_loss == 2.0 and known(first).train_loss == 3.0
    # More steps than the summary is of: the run went on, and its recipe lies beside the old summary.
    finish(second, 2.0, steps=5)
    assert known(second) is None
    finish(third, 2.0, heldout=False)
    assert known(third).heldout_loss is None and known(third).train_loss == 3.0
    (longer,) = grid(tiny_recipe, tmp_path, "--steps", "7", over=RATE)
    assert longer.run == first.run and known(longer) is None


def test_a_run_that_diverged_is_a_row_and_not_run_again(tiny_recipe, tmp_path):
    (cell,) = grid(tiny_recipe, tmp_path, over=RATE)
    said = "step 2: loss nan, gradient norm nan"
    rows = [
        {
            "step": 1,
            "kind": "train",
            "loss": 2.0,
            "tokens": 64,
            "time": {"elapsed_seconds": 3.0, "cost_usd": 0.5},
        },
        {"step": 1, "kind": "eval", "loss": 2.0, "tokens": 64, "time": {}},
    ]

    def log(cell):
        os.makedirs(cell.run)
        with open(os.path.join(cell.run, "metrics.jsonl"), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    found = train_cell("", cell, ends_with(1, said, log), StopRequest())
    assert found.status is Status.DIVERGED and found.said == said and found.heldout_loss is None
    assert (found.tokens, found.seconds, found.usd) == (64, 3.0, 0.5)
    assert known(cell) == found
    # Another recipe may not.
    (other,) = grid(tiny_recipe, tmp_path, "--optimizer.weight-decay", "0.01", over=RATE)
    assert other.run == cell.run and known(other) is None


@pytest.mark.parametrize(
    ("code", "said", "status", "line"),
    [
        (1, "ZeroDivisionError: division by zero", Status.FAILED, "exit code 1; ZeroDivisionError: .*"),
        (-9, "", Status.FAILED, "ended by signal 9; .*output.txt"),
        # It was told to stop by another than us, and saved.
        (0, "", Status.STOPPED, "stopped; the same command goes on from there"),
    ],
)
def test_runs_that_break_off(tiny_recipe, tmp_path, code, said, status, line):
    (cell,) = grid(tiny_recipe, tmp_path, over=RATE)
    found = train_cell("", cell, ends_with(code, said), StopRequest())
    assert found.status is status
    assert re.fullmatch(line, found.said)
    assert known(cell) is None


def test_a_run_that_refuses_its_input_ends_the_sweep(tiny_recipe, tmp_path):
    (cell,) = grid(tiny_recipe, tmp_path, over=RATE)
    with pytest.raises(InputError, match="the run with optimizer.lr.peak 1e-3: there is no token store at x"):
        train_cell("", cell, ends_with(2, "there is no token store at x"), StopRequest())


def test_the_last_line():
    assert last_line("a line\nmosaicjax: step 2: loss nan\n\n") == "step 2: loss nan"
    assert last_line("all is well\n") == "" and last_line("") == ""
    assert last_line("Traceback (most recent call last):\n  File\nValueError: mosaicjax: no\n") == (
        "ValueError: mosaicjax: no"
    )


def test_a_directory_is_held_by_one_sweep(tmp_path):
    with locked(str(tmp_path)):
        with pytest.raises(InputError, match=r"is under way \(process unknown\); fix: wait for it"):
            with locked(str(tmp_path)):
                pass
    with locked(str(tmp_path)):
        pass


def test_a_process_is_told_to_stop_and_its_end_is_waited_for(tiny_recipe, tmp_path):
    (cell,) = grid(tiny_recipe, tmp_path, over=RATE)
    # Overrides end the command line: here they make it one that argparse refuses.
    cell = replace(cell, overrides=("--processes", "none"))
    with locked(str(tmp_path)) as lock, StopRequest() as stop:
        code, said = Trainer(os.environ, lock, stop)(str(tiny_recipe), cell)
        assert code == REFUSED and said.startswith("mosaicjax train: argument --processes: invalid int value")
        assert said in Path(cell.run, "output.txt").read_text()
        signal.raise_signal(signal.SIGTERM)
        code, said = Trainer(os.environ, lock, stop)(str(tiny_recipe), cell)
        assert (code, said) == (-signal.SIGTERM, "")


@pytest.mark.slow
@pytest.mark.soak
def test_a_sweep_trains_as_train_does(tiny_recipe, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    out = tmp_path / "sweep"
    options = ("--over", "optimizer.lr.peak=2e-3,1e18", "--steps", 4)
    assert tiny.run("sweep", tiny_recipe, "--out", out, *options) == 0
    said = capfd.readouterr().out
    assert "1e18: diverged: step 2: loss nan" in said and "2 runs: 1 finished, 1 diverged" in said
    assert "best: optimizer.lr.peak 2e-3: held-out loss " in said
    assert "optimizer.lr.peak 2e-3 is the smallest value tried: widen it" in said
    run = out / "optimizer.lr.peak=2e-3"
    tiny.train(tiny_recipe, tmp_path / "alone", "--optimizer.lr.peak", "2e-3", "--steps", 4)
    assert tiny.rows(run) == tiny.rows(tmp_path / "alone")
    held = json.loads((out / "sweep.json").read_text())
    alone = json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert held["results"][0]["heldout_loss"] == alone["heldout"]["loss"] == held["best"]["loss"]
    assert held["results"][1]["tokens"] == tiny.metrics(out / "optimizer.lr.peak=1e18")[-1]["tokens"]
    # Nothing is run again: no process appends to what the first ones printed.
    before = {path: path.read_bytes() for path in out.glob("*/*") if path.is_file()}
    assert tiny.run("sweep", tiny_recipe, "--out", out, *options) == 0
    assert {path: path.read_bytes() for path in out.glob("*/*") if path.is_file()} == before
    held_again = json.loads((out / "sweep.json").read_text())
    assert held_again["results"] == held["results"]


@pytest.mark.slow
@pytest.mark.soak
def test_a_sweep_that_was_killed_goes_on(tiny_recipe, tmp_path):
    out = tmp_path / "sweep"
    options = ("--seq", 128, "--batch", 16, "--save.every", 3, "--steps", 40)
    command = ("sweep", tiny_recipe, "--out", out, "--over", "seed=1,2", *options)
    first, second = out / "seed=1", out / "seed=2"
    tiny.signal_after([tiny.launch(*command, devices=8)], second, 8, tiny.KILL, [0])
    # The run that it had begun goes on without it, and may not be begun twice; here it is made to wait.
    process = int((out / ".sweep.lock").read_text())
    os.kill(process, signal.SIGSTOP)
    finished = (first / "output.txt").read_bytes()
    assert (first / "summary.json").exists() and not (second / "summary.json").exists()
    (refused,) = tiny.ended([tiny.launch(*command, devices=8)])
    assert refused.returncode == REFUSED
    assert f"is under way (process {process}); fix: wait for it, or end it" in refused.stderr
    os.kill(process, tiny.KILL)
    with open(out / ".sweep.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert 8 <= tiny.last_step(second / "metrics.jsonl") < 40
    (ended,) = tiny.ended([tiny.launch(*command, devices=8)])
    assert ended.returncode == 0, ended.stderr
    assert (first / "output.txt").read_bytes() == finished
    assert "going on after step" in (second / "output.txt").read_text()
    tiny.train(tiny_recipe, tmp_path / "alone", "--seed", 2, *options)
    assert tiny.rows(second) == tiny.rows(tmp_path / "alone")
    assert len(json.loads((out / "sweep.json").read_text())["results"]) == 2


@pytest.mark.slow
def test_a_sweep_that_is_told_to_stop_saves_and_goes_on(tiny_recipe, tmp_path):
    out = tmp_path / "sweep"
    options = ("--seq", 128, "--batch", 16, "--save.every", 0, "--steps", 60)
    command = ("sweep", tiny_recipe, "--out", out, "--over", "seed=1,2", *options)
    (stopped,) = tiny.signal_after([tiny.launch(*command, devices=8)], out / "seed=1", 5, tiny.TERM, [0])
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.splitlines()[-1] == "stopped at run 1 of 2; the same command goes on from there"
    assert tiny.complete(out / "seed=1") and not (out / "seed=2").exists()

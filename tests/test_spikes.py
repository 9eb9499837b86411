"""Loss spikes: what is one, and a run that goes back and around it against a run that never met it."""

import json
import math
import signal
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.checkpoint import Checkpoints
from mosaicjax.errors import InputError
from mosaicjax.spikes import Ignore, RollBack, Stop
from tests import tiny

WINDOW = 6
STEPS = 24


@given(
    losses=st.lists(st.floats(0.1, 9.0), min_size=2, max_size=30),
    loss=st.floats(0.1, 20.0) | st.sampled_from([math.inf, math.nan]),
    deviations=st.floats(0.5, 20.0),
    window=st.integers(2, 30),
)
def test_a_spike_is_far_above_the_median(losses, loss, deviations, window):
    policy = Stop(window=window, deviations=deviations)
    before = losses[-window:]
    middle = np.median(before)
    scatter = 1.4826 * np.median(np.abs(np.array(before) - middle))
    far = not math.isfinite(loss) or loss - middle > deviations * scatter * (1 + 1e-9)
    if abs(loss - middle - deviations * scatter) > 1e-9:
        assert policy.is_spike(before, loss) == (len(before) == window and far)
    assert not Ignore().is_spike(before, loss)


def test_settings_that_mean_nothing_are_refused():
    for policy, text in (
        (Stop(window=1), "on_spike.window"),
        (RollBack(deviations=0.0), "on_spike.deviations"),
    ):
        with pytest.raises(InputError, match=text):
            policy.check()


@pytest.fixture(scope="module")
def plain(tiny_store, tmp_path_factory):
    """A run that lets its loss jump, and the place of the highest jump: the step, and how far."""
    folder = tmp_path_factory.mktemp("spikes")
    tiny.train(written(folder, tiny_store, "Ignore()"), folder / "plain", "--save.keep", 9)
    losses = tiny.losses(folder / "plain")
    far = []
    for step in range(WINDOW, STEPS):
        before = losses[step - WINDOW : step]
        far.append(
            (losses[step] - np.median(before)) / (1.4826 * np.median(np.abs(before - np.median(before))))
        )
    return folder, WINDOW + int(np.argmax(far)) + 1, float(np.max(far)) * 0.999


def written(folder, store, policy):
    before = "from mosaicjax.spikes import Ignore, RollBack, Stop"
    name = "".join(letter for letter in policy if letter.isalnum())
    fields = {
        "steps": str(STEPS),
        "save": f"Save(every=4), on_spike={policy}",
        "eval": "Eval(every=8, rows=8)",
    }
    return tiny.write_recipe(folder / f"{name}.py", store, before=before, **fields)


def around(step):
    """The checkpoint that a spike at a step is rolled back to, and the data steps left out."""
    checkpoint = (step - 1) // 4 * 4
    return checkpoint, range(checkpoint, step)


@pytest.mark.slow
def test_a_run_that_rolls_back_is_one_that_never_met_the_spike(plain, tiny_store):
    folder, step, far = plain
    policy = f"RollBack(window={WINDOW}, deviations={far})"
    tiny.train(written(folder, tiny_store, policy), folder / "rolled")
    checkpoint, skipped = around(step)
    ignoring = folder / "Ignore.py"
    tiny.train(ignoring, folder / "around", "--skips", *skipped)
    rows = tiny.rows(folder / "rolled")
    (back,) = [row for row in map(json.loads, rows) if row["kind"] == "rollback"]
    loss = tiny.losses(folder / "plain")[step - 1]
    assert back == {
        "step": checkpoint + 1,
        "kind": "rollback",
        "from_step": step,
        "loss": pytest.approx(loss, rel=1e-12),
        "skipped": len(skipped),
    }
    # Up to the checkpoint it met the data that the other left out, in other steps.
    whole, other = tiny.rows(folder / "plain"), tiny.rows(folder / "around")
    kept = [row for row in rows if json.loads(row)["kind"] != "rollback"]
    assert [row for row in kept if json.loads(row)["step"] <= checkpoint] == [
        row for row in whole if json.loads(row)["step"] <= checkpoint
    ]
    assert kept == other
    cursor = Checkpoints(str(folder / "rolled")).cursor(STEPS)
    assert cursor["skips"] == cursor["rolled_back"] == list(skipped)
    assert cursor["rollbacks"] == 1
    assert cursor["tokens"] == STEPS * 8 * 32


@pytest.mark.slow
def test_a_run_that_stops_leaves_what_was_before(plain, tiny_store, capsys):
    folder, step, far = plain
    recipe = written(folder, tiny_store, f"Stop(window={WINDOW}, deviations={far})")
    assert tiny.run("train", recipe, "--out", folder / "stopped") == 1
    checkpoint, skipped = around(step)
    said = capsys.readouterr().err
    assert f"step {step}: loss " in said
    assert f"the checkpoint of step {checkpoint} is before it" in said or not checkpoint
    options = " ".join(map(str, skipped))
    assert f"--skips {options})" in said
    assert max(tiny.complete(folder / "stopped"), default=0) == checkpoint
    # The fix that it names: the run goes on from the checkpoint, around the data.
    options = ("--skips", *skipped, "--on-spike.deviations", 1e9)
    tiny.train(recipe, folder / "stopped", *options)
    whole, before = tiny.losses(folder / "stopped"), tiny.losses(folder / "plain")[:checkpoint]
    assert len(whole) == STEPS and whole[:checkpoint].tolist() == before.tolist()


@pytest.mark.slow
def test_enough_is_enough(plain, tiny_store, capsys):
    """At a threshold that every other step is over, the run stops after so many times."""
    folder, _, _ = plain
    recipe = written(folder, tiny_store, f"RollBack(window={WINDOW}, deviations=0.01, most=1)")
    assert tiny.run("train", recipe, "--out", folder / "enough") == 1
    assert "a spike, after 1 roll-backs" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_after_a_roll_back(plain, tiny_store):
    """Killed once it went back, before its next checkpoint: it meets the spike, and goes around it, again."""
    folder, step, far = plain
    recipe = written(folder, tiny_store, f"RollBack(window={WINDOW}, deviations={far})")
    tiny.train(recipe, folder / "whole")
    process = tiny.launch("train", recipe, "--out", folder / "killed", devices=8)
    metrics = folder / "killed" / "metrics.jsonl"
    while not (metrics.exists() and '"rollback"' in metrics.read_text(encoding="utf-8")):
        try:
            process.wait(timeout=0.005)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"ended before it went back: {process.communicate()}")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    tiny.train(recipe, folder / "killed")
    assert tiny.rows(folder / "killed") == tiny.rows(folder / "whole")

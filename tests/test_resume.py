"""A run that was killed and went on is the run that was not: rows byte for byte, arrays bit for bit."""

import random
import subprocess

import numpy as np
import pytest

from tests import object_store, tiny

# Steps of some 20 ms, so that a signal lands where it is aimed at, also on a busy machine.
SLOW_STEPS = ("--seq", 128, "--batch", 16, "--save.every", 7, "--eval.every", 10, "--save.keep", 100)


def same_arrays(one, other, step):
    ours, theirs = tiny.arrays(one, step), tiny.arrays(other, step)
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name, strict=True)


def stop_and_go_on(command, out, signals, *, job):
    """One process (or job) after the other, each stopped by a signal, and a last one that finishes."""
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    for number, to in signals:
        before = max(tiny.complete(out), default=0)
        results = tiny.signal_after(job(*command), out, rng.randint(1, 9), number, to)
        after = max(tiny.complete(out), default=0)
        if number == tiny.KILL:
            assert [result.returncode for result in results] == [-tiny.KILL] * len(results)
            continue
        assert [result.returncode for result in results] == [0] * len(results), results
        assert after > before, f"no step was saved (seed {seed})"
        line = f"stopped and saved at step {after:,}; the same command goes on from there"
        assert results[0].stdout.splitlines()[-1] == line
        assert all("Traceback" not in result.stderr for result in results)
        assert tiny.last_step(out / "metrics.jsonl") == after
    results = tiny.ended(job(*command))
    assert [result.returncode for result in results] == [0] * len(results), results


def one_process(*command):
    return [tiny.launch(*command, optimised=True)]


def two_processes(*command):
    return tiny.launch_job(*command, optimised=True)


def mixed(numbers, to):
    """These signals in a random order."""
    signals = [(number, to[number]) for number in numbers]
    random.shuffle(signals)
    return signals


@pytest.mark.slow
def test_killed_and_terminated_runs_go_on_exactly(tiny_recipe, tmp_path):
    command = ("train", tiny_recipe, *SLOW_STEPS, "--steps", 60)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    (whole,) = one_process(*command, "--out", straight)
    signals = [(tiny.TERM, [0]), (tiny.KILL, [0])]
    stop_and_go_on((*command, "--out", stopped), stopped, signals, job=one_process)
    assert tiny.ended([whole])[0].returncode == 0
    assert tiny.rows(stopped) == tiny.rows(straight)
    assert len(tiny.metrics(stopped)) == 60
    assert [row["step"] for row in tiny.metrics(stopped, "eval")] == [10, 20, 30, 40, 50, 60]
    same_arrays(stopped, straight, 60)


@pytest.mark.parametrize(
    ("job", "steps", "to"),
    [
        pytest.param(
            *(one_process, 300, {tiny.TERM: [0], tiny.KILL: [0], tiny.INT: [0]}),
            marks=pytest.mark.soak,
            id="one process",
        ),
        # Steps are slower here, so that fewer of them pass before a signal arrives. Both take minutes.
        pytest.param(
            *(two_processes, 120, {tiny.TERM: [1], tiny.KILL: [0, 1], tiny.INT: [0]}),
            marks=pytest.mark.soak,
            id="two processes",
        ),
    ],
)
def test_seven_stops(tiny_recipe, tmp_path, job, steps, to):
    command = ("train", tiny_recipe, *SLOW_STEPS, "--steps", steps)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    whole = tiny.ended(job(*command, "--out", straight))
    assert [result.returncode for result in whole] == [0] * len(whole), whole
    signals = mixed([tiny.TERM] * 3 + [tiny.KILL] * 3 + [tiny.INT], to)
    stop_and_go_on((*command, "--out", stopped), stopped, signals, job=job)
    assert tiny.rows(stopped) == tiny.rows(straight)
    assert len(tiny.metrics(stopped)) == steps
    same_arrays(stopped, straight, steps)


@pytest.mark.slow
@pytest.mark.soak
def test_a_run_on_an_object_store(tiny_recipe, tmp_path, monkeypatch, capsys):
    url = f"{object_store.new_bucket(monkeypatch)}/runs/a"
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    command = ("train", tiny_recipe, *SLOW_STEPS, "--steps", 150, "--save.keep", 2)
    whole = tiny.launch(*command, "--out", tmp_path / "here")
    process = tiny.launch(*command, "--out", url)
    while f"{prefix}/metrics.jsonl" not in object_store.keys(url):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
    process.send_signal(tiny.TERM)
    (stopped,) = tiny.ended([process])
    assert stopped.returncode == 0 and "stopped and saved at step" in stopped.stdout, stopped
    (finished,) = tiny.ended([tiny.launch(*command, "--out", url)])
    assert finished.returncode == 0 and "going on after step" in finished.stdout, finished
    assert tiny.ended([whole])[0].returncode == 0
    body = object_store.client().get_object(Bucket=bucket, Key=f"{prefix}/metrics.jsonl")["Body"].read()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "metrics.jsonl").write_bytes(body)
    assert tiny.rows(tmp_path / "there") == tiny.rows(tmp_path / "here")
    names = object_store.keys(url)
    for name in ("summary.json", "loss.png", "sample.txt", "recipe.json", "recipe.py", "run.json"):
        assert f"{prefix}/{name}" in names
    assert any(name.startswith(f"{prefix}/tensorboard/events") for name in names)
    said = []
    for out in (url, tmp_path / "here"):
        capsys.readouterr()
        prompt = ("--prompt", "the river", "--max-tokens", 12, "--temperature", 0)
        assert tiny.run("generate", out, *prompt) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].strip()


# Two minutes: a machine of two cores starts eleven processes.
@pytest.mark.soak
def test_eight_hosts_then_two_see_the_samples_that_one_sees(tiny_recipe, tmp_path):
    """Killed in the middle of an epoch on 8 processes of a device each, and gone on with by 2 of 4 each."""
    options = ("--steps", 60, "--eval.every", 0, "--save.every", 3, "--log.tensorboard", "False")
    command = ("train", tiny_recipe, *options, "--out")
    changed = tmp_path / "changed"
    eight = tiny.launch_job(*command, changed, count=8, devices=1)
    results = tiny.signal_after(eight, changed, 5, tiny.KILL, list(range(8)))
    assert [result.returncode for result in results] == [-tiny.KILL] * 8
    at = max(tiny.complete(changed))
    assert 3 <= at < 60
    results = tiny.ended(tiny.launch_job(*command, changed, count=2, devices=4))
    assert [result.returncode for result in results] == [0, 0], results
    assert f"going on after step {at}" in results[0].stdout
    tiny.train(tiny_recipe, tmp_path / "one", *options)
    alone, found = tiny.losses(tmp_path / "one"), tiny.losses(changed)
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    # Rows in another order, or of another batch, would be further apart than rounding is.
    assert np.abs(np.diff(alone)).min() > 10 * np.abs(found - alone).max()

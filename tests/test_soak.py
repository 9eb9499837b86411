"""Random kills of random runs, for as long as SOAK_MINUTES says; `make soak` runs all with its marker."""

import os
import random
import time

import pytest

from tests import tiny
from tests.test_resume import same_arrays, stop_and_go_on, two_processes

MINUTES = float(os.environ.get("SOAK_MINUTES", "10"))
STEPS = 200


def drawn_options(rng):
    """A mesh for eight devices, a microbatch, and how often things happen."""
    flat, tensor, copied = ("--mesh.fsdp", 8), ("--mesh.fsdp", 2, 2, "--mesh.tensor", 2), ("--mesh.data", 8)
    return (
        *rng.choice([flat, tensor, (*copied, "--mesh.fsdp", 1)]),
        *("--mesh.gather", rng.choice(["compiler", "explicit"])),
        *("--batch", 16, "--microbatch", rng.choice([8, 16]), "--seq", 64, "--steps", STEPS),
        *("--save.every", rng.randint(3, 30), "--eval.every", rng.randint(5, 50), "--save.keep", 1000),
        *("--model.residual-dropout", rng.choice([0.0, 0.1]), "--seed", rng.randint(0, 1000)),
    )


def eight_devices(*command):
    return [tiny.launch(*command, devices=8, optimised=True)]


@pytest.mark.soak
def test_no_kill_leaves_a_trace(tiny_recipe, tmp_path):
    seed = int(os.environ.get("SOAK_SEED", str(random.randrange(10**6))))
    print(f"SOAK_SEED={seed}")
    rng = random.Random(seed)
    end, done = time.monotonic() + 60 * MINUTES, 0
    while time.monotonic() < end or not done:
        several = rng.random() < 0.4
        job = (
            two_processes if several else lambda *command: [tiny.launch(*command, devices=8, optimised=True)]
        )
        command = ("train", tiny_recipe, *drawn_options(rng))
        straight, stopped = tmp_path / f"straight{done}", tmp_path / f"stopped{done}"
        whole = tiny.ended(job(*command, "--out", straight))
        assert [result.returncode for result in whole] == [0] * len(whole), whole
        everybody = [0, 1] if several else [0]
        choices = [(tiny.TERM, everybody[-1:]), (tiny.INT, [0]), (tiny.KILL, everybody)]
        signals = [rng.choice(choices) for _ in range(rng.randint(1, 8))]
        stop_and_go_on((*command, "--out", stopped), stopped, signals, job=job)
        assert tiny.rows(stopped) == tiny.rows(straight), command
        same_arrays(stopped, straight, STEPS)
        done += 1
        print(f"run {done}: {len(signals)} stops, {command[2:]}")

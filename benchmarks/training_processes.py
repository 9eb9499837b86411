"""One model trained by one process after another, ours and its peers': what `cost_per_token.py` measures.

A size's directory holds what all are given: shape.json, the first weights and the rows of all steps.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mosaicjax.models.decoder import Decoder
from mosaicjax.recipe import Recipe
from mosaicjax.recipe_file import load
from mosaicjax.run_data import open_data

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/mpt_125m.py"
WARM = 2
OURS = "mosaicjax"
LIMIT_SECONDS = 900
LEARNING_RATE = 3e-4
COMMON = (
    "--data.path={store}",
    "--dtypes.compute=float32",
    "--model.remat=PRODUCTS",
    f"--optimizer.lr.peak={LEARNING_RATE}",
    "--optimizer.lr.warmup=0",
    "--optimizer.lr.final=1.0",
    "--steps=1000",
    "--eval.every=0",
    "--save.every=0",
)
SIZES = {
    "124M": ("--seq=512", "--batch=2", "--microbatch=2"),
    "quickstart": (
        "--model.layers=4",
        "--model.embed=256",
        "--model.heads=4",
        "--model.mlp=1024",
        "--model.vocab=4096",
        "--seq=256",
        "--batch=8",
        "--microbatch=8",
    ),
}
STEPS = {"124M": 8, "quickstart": 60}


@dataclass(frozen=True)
class Setting:
    """One way to run one peer: what its script is told, and environment variables."""

    label: str
    script: str
    options: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One process: seconds of its steps, its losses, resident bytes at their end, and how soon it began."""

    first_step_seconds: float
    step_seconds: list[float]
    losses: list[float]
    peak_bytes: int
    parameters: int

    @property
    def step(self) -> float:
        """The median step once it is under way."""
        return statistics.median(self.step_seconds[WARM:])


class Failed(Exception):
    """A process that ended before its last step; its message is the end of what it said."""


class Size:
    """One model and the rows that all are given, in a directory of their own.

    `weigh` is the command that writes the first weights, in a process that ends before any is measured.
    """

    def __init__(self, name: str, store: str, steps: int, work: Path, weigh: list[str]) -> None:
        self.name, self.steps, self.work = name, steps or STEPS[name], work
        self.overrides = [option.format(store=store) for option in COMMON] + list(SIZES[name])
        self.recipe = load(str(ROOT / RECIPE), self.overrides).recipe
        self.threads = os.cpu_count() or 1
        self.shape = shape_of(self.recipe) | {
            "steps": self.steps,
            "threads": self.threads,
            "lr": LEARNING_RATE,
        }
        (work / "shape.json").write_text(json.dumps(self.shape))
        stream = open_data(self.recipe).stream
        batches = [stream.rows(step, range(self.recipe.batch)) for step in range(self.steps)]
        joined = [np.concatenate([b["tokens"], b["targets"][:, -1:]], axis=1) for b in batches]
        np.save(work / "rows.npy", np.stack(joined))
        subprocess.run([*weigh, str(work), *self.overrides], check=True)

    @property
    def tokens(self) -> int:
        """Target tokens of a step."""
        return self.recipe.batch * self.recipe.seq

    def ours(self) -> Measured:
        """`mosaicjax train`, stopped after as many steps as the others take."""
        with tempfile.TemporaryDirectory(dir=self.work) as out:
            run = Path(out) / "run"
            command = [sys.executable, "-m", "mosaicjax.cli", "train", RECIPE, "--out", str(run)]
            process = started([*command, *self.overrides], {}, Path(out))
            try:
                rows = list(self.followed(process, lambda: logged(run / "metrics.jsonl"), Path(out)))
                peak = resident(process.pid)
            finally:
                process.kill()
                process.wait()
            count = sum(x.size for x in np.load(self.work / "weights.npz").values())
        seconds = [row["time"]["step_seconds"] for row in rows]
        first = rows[0]["time"]["elapsed_seconds"]
        return Measured(first, seconds, [row["loss"] for row in rows], peak, count)

    def peer(self, setting: Setting, python: str) -> Measured:
        """A peer's script under a setting."""
        script = str(ROOT / "benchmarks" / "peers" / setting.script)
        with tempfile.TemporaryDirectory(dir=self.work) as out:
            began = time.time()
            command = [python, script, str(self.work), json.dumps(setting.options)]
            process = started(command, setting.environment, Path(out))
            first: list[float] = []

            def read() -> list[dict[str, Any]]:
                rows = [json.loads(x) for x in (Path(out) / "out").read_text().splitlines() if x[:1] == "{"]
                if len(rows) > 1 and not first:
                    first.append(time.time() - began)
                return rows

            try:
                count, *rows = self.followed(process, read, Path(out), more=1)
                peak = resident(process.pid)
            finally:
                process.kill()
                process.wait()
        losses, seconds = [row["loss"] for row in rows], [row["seconds"] for row in rows]
        return Measured(first[0], seconds, losses, peak, count["parameters"])

    def followed(
        self,
        process: subprocess.Popen[bytes],
        read: Callable[[], list[dict[str, Any]]],
        out: Path,
        more: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """The first rows that a process writes, once they are all there.

        Raises:
            Failed: it ended before, or took too long.
        """
        until = time.monotonic() + LIMIT_SECONDS
        while len(rows := read()) < self.steps + more:
            if process.poll() is not None or time.monotonic() > until:
                if len(rows := read()) >= self.steps + more:
                    break
                said = (out / "errors").read_text(errors="replace").strip().splitlines()
                raise Failed(f"ended after {len(rows)} rows: {said[-1] if said else 'nothing said'}")
            time.sleep(0.02)
        return iter(rows[: self.steps + more])


def shape_of(recipe: Recipe) -> dict[str, int]:
    """The sizes that a peer needs to build the same model."""
    decoder = recipe.model.build()
    assert isinstance(decoder, Decoder)
    dims = decoder.dims
    names = ("embed", "heads", "mlp", "vocab")
    return {
        **{name: dims[name] for name in names},
        "layers": decoder.layers,
        "positions": dims["position"],
        "seq": recipe.seq,
        "batch": recipe.batch,
    }


def started(command: list[str], environment: dict[str, str], out: Path) -> subprocess.Popen[bytes]:
    """The process, writing to `out` and `errors` in a directory."""
    threads = str(os.cpu_count() or 1)
    settings = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), **environment}
    with (out / "out").open("wb") as said, (out / "errors").open("wb") as errors:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | settings, stdout=said, stderr=errors, stdin=subprocess.DEVNULL
        )


def logged(path: Path) -> list[dict[str, Any]]:
    """Whole rows of training in a run's metrics so far."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["kind"] == "train"]


def resident(pid: int) -> int:
    """The largest resident set that a process had so far, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise Failed("no memory figure for the process")


def write_weights(work: Path, overrides: list[str]) -> None:
    """The weights that `mosaicjax train` begins with, under plain names: [layers, in, out] where stacked."""
    import jax

    from mosaicjax.step import Step

    recipe = load(str(ROOT / RECIPE), overrides).recipe
    step = Step(recipe.program()[1], recipe.mesh.build(jax.devices()), recipe.seed)
    arrays = {name: np.asarray(leaf) for name, leaf in flat(step.init().trainable)}
    embed = arrays["embed/tokens"].shape[1]
    plain = {"tokens": arrays.pop("embed/tokens"), "positions": arrays.pop("embed/positions")}
    for name, x in arrays.items():
        if name.startswith("norm/"):
            plain[name] = x
            continue
        block, part = name.split("/layer/")[1].split("/", 1)
        if block in ("attention", "mlp"):
            bias = part.endswith("_bias")
            last = x.shape[-1] if part.startswith("up") else embed
            plain[f"layers/{part}"] = x.reshape(len(x), last) if bias else x.reshape(len(x), -1, last)
        else:
            plain[f"layers/{block}/{part}"] = x
    np.savez(work / "weights.npz", allow_pickle=False, **plain)


def flat(tree: Any) -> Iterator[tuple[str, Any]]:
    """Leaves by their path's names, joined by slashes."""
    import jax

    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf

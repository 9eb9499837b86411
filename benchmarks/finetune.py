"""Fine-tuning, all weights beside adapters: held-out response loss before and after, memory and speed.

    make quickstart
    python benchmarks/finetune.py ROWS.jsonl

A run (by default the quickstart's) is fine-tuned on rows of prompts and responses by `recipes/instruct.py`,
and by the same with `LoRA`, one process after the other, in turns; a tenth of the rows is held out. Loss is
in nats a target token of held-out responses, seconds are the median step's, checkpoint bytes those on the
disk. Memory is what `mosaicjax plan` reads of the step compiled for one CPU (arguments: weights, optimizer
and batch), and the process's largest resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine, spread  # noqa: E402 after the path, for a call as a script

RECIPE = ROOT / "recipes" / "instruct.py"
RESULT = ROOT / "benchmarks" / "finetune.json"
WORK = ROOT / "build" / "finetune"
PACKAGES = ("jax", "jaxlib", "optax", "numpy")
METHODS, RATE = "methods=(ClipGradients(norm=1.0),)", "peak=1e-3"
LORA = "methods=(ClipGradients(norm=1.0), LoRA(rank=16, alpha=32.0))", "peak=5e-3"
KINDS = ("full", "lora")


def command(*arguments: object) -> list[str]:
    """The `mosaicjax` command with these arguments."""
    return [sys.executable, "-m", "mosaicjax.cli", *map(str, arguments)]


def recipes() -> dict[str, Path]:
    """The recipe's file of each kind."""
    text = RECIPE.read_text(encoding="utf-8")
    assert text.count(METHODS) == text.count(RATE) == 1
    adapted = text.replace(METHODS, LORA[0]).replace(RATE, LORA[1])
    imports = "from mosaicjax.methods.clip import ClipGradients\n"
    files = {
        "full": text,
        "lora": adapted.replace(imports, f"{imports}from mosaicjax.methods.lora import LoRA\n"),
    }
    WORK.mkdir(parents=True, exist_ok=True)
    for kind, source in files.items():
        (WORK / f"{kind}.py").write_text(source, encoding="utf-8")
    return {kind: WORK / f"{kind}.py" for kind in files}


def build(rows: Path, base: Path) -> Path:
    """The rows' token store, by the base's tokenizer."""
    store = WORK / "store"
    if not store.exists():
        options = ("--template", "plain", "--held-out", "0.1", "--tokenizer", base / "tokenizer")
        subprocess.run(command("data", "build", rows, "--out", store, *options), cwd=ROOT, check=True)
    return store


def trained(recipe: Path, options: Sequence[str], number: int) -> dict[str, Any]:
    """One run: losses, step seconds, and bytes."""
    out = WORK / f"{recipe.stem}-{number}"
    shutil.rmtree(out, ignore_errors=True)
    process = subprocess.Popen(command("train", recipe, "--out", out, *options), cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{recipe.stem} ended with {os.waitstatus_to_exitcode(status)}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if row["kind"] == "eval"]
    steps = [row["time"]["step_seconds"] for row in rows if row["kind"] == "train"]
    newest = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name))
    files = (path for path in newest.rglob("*") if path.is_file())
    return {
        "heldout_before": evals[0]["loss"],
        "heldout_after": evals[-1]["loss"],
        "step_seconds": statistics.median(steps[1:]),
        "resident_bytes": usage.ru_maxrss * 1024,
        "checkpoint_bytes": sum(path.stat().st_size for path in files),
    }


def planned(recipe: Path, options: Sequence[str]) -> dict[str, Any]:
    """What the plan of the step on one CPU says."""
    out = WORK / f"{recipe.stem}.plan.json"
    subprocess.run(
        command("plan", recipe, "--topology", "cpu:1", "--json", out, *options), cwd=ROOT, check=True
    )
    found = json.loads(out.read_text())
    return {"needed_bytes": found["memory"]["needed"], "argument_bytes": found["memory"]["arguments"]}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs, in turns, and their figures by kind."""
    base = Path(arguments.base).resolve()
    store = build(Path(arguments.rows).resolve(), base)
    options = [f"--init-from={base}", f"--data.path={store}", *arguments.options]
    files = recipes()
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(arguments.repeats):
        for kind in KINDS:
            runs[kind].append(trained(files[kind], [*options, f"--seed={17 + number}"], number))
    figures = {}
    for kind, mine in runs.items():
        named = {name: spread([each[name] for each in mine]) for name in mine[0]}
        figures[kind] = {**planned(files[kind], options), **named}
    return {"rows": Path(arguments.rows).name, "options": arguments.options, "kinds": figures}


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", help="JSON lines of prompts and responses")
    parser.add_argument("--base", default="runs/quickstart", help="the run to start from")
    parser.add_argument("--repeats", type=int, default=3, help="seeds of each kind")
    parser.add_argument("--json", default=str(RESULT), help="where to write")
    parser.add_argument(
        "--option", action="append", default=[], dest="options", help="of the recipe, as --option=--steps=20"
    )
    arguments = parser.parse_args(given)
    result = {"machine": machine(PACKAGES), **measure(arguments)}
    for kind, mine in result["kinds"].items():
        print(
            f"{kind}: held-out response loss {mine['heldout_before']['median']:.4f} to"
            f" {mine['heldout_after']['median']:.4f}, {mine['step_seconds']['median']:.3f} s a step,"
            f" {mine['needed_bytes'] / 2**20:.0f} MiB planned, checkpoint"
            f" {mine['checkpoint_bytes']['median'] / 2**20:.1f} MiB"
        )
    Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

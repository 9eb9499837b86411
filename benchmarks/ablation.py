"""What each part is worth: it is left out of the best recipe, or put into the standard one, and nothing else.

    python benchmarks/ablation.py code-1M

Every edit is a recipe of its own, trained with each seed beside its base, at the base's settings; each run
has a core of its own, and as many run at a time as there are cores. How many tokens an edit costs or saves is
read from the base's own curve, the same recipe at several lengths, each with its schedule run to its end: an
edit's loss is the base's at some multiple m of its tokens, so to the base's loss it would take 1 / m of
them. FLOPs and seconds of steps are that, times those of a token. Losses are compared seed by seed; an edit
whose mean difference is within twice its standard error is named so. They are bits a byte of validation
documents. An ablation that was broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import speedrun  # noqa: E402 after the path, for a call as a script
from benchmarks.machine import machine, spread  # noqa: E402

RESULT = ROOT / "benchmarks" / "ablation.json"
LENGTHS = (0.5, 1.0, 1.8)
BEST_WITHOUT = {
    "Muon (AdamW at its rate instead)": "optimizer=replace(recipe.optimizer.others, lr=recipe.optimizer.lr)",
    "QK norm": "model=replace(recipe.model, qk_norm=None)",
    "GELU (ReLU squared instead)": "model=replace(recipe.model, ffn=Mlp(Activation.RELU_SQUARED))",
    "zero output projections": "model=replace(recipe.model, init=Kaiming())",
    "untied head": "model=replace(recipe.model, tied=True)",
    "value embeddings": "model=replace(recipe.model, value_tables=0)",
    "bigram embeddings": "model=replace(recipe.model, inputs=())",
    "ALiBi (rotary instead)": "model=replace(recipe.model, position=Rotary())",
    "gradient clipping": "methods=()",
    "RMS norm (layer norm instead)": "model=replace(recipe.model, norm=LayerNorm(bias=False))",
    "line to zero (cosine to a tenth)": "optimizer=with_cosine(recipe.optimizer)",
    "PolarExpress (five of Jordan's instead)": (
        "optimizer=replace(recipe.optimizer, polynomials=Jordan(), iterations=5)"
    ),
    "short rows first": "seq=256, batch=2, phases=()",
}
BEST_WITH = {
    "smear": "model=replace(recipe.model, inputs=(*recipe.model.inputs, Smear()))",
    "stream scalars": "model=replace(recipe.model, block=Block(scales=StreamScales()))",
    "attention sinks": "model=replace(recipe.model, attention=Attention(sinks=True))",
    "logit softcap 15": "model=replace(recipe.model, logit_softcap=15.0)",
    "gated MLP": "model=replace(recipe.model, ffn=Glu(Activation.SILU), mlp=2 * recipe.model.mlp // 3)",
    "half-rotary": "model=replace(recipe.model, position=Rotary(fraction=0.5))",
    "label smoothing 0.1": "loss=CrossEntropy(smoothing=0.1)",
    "z-loss": "loss=CrossEntropy(z_loss=1e-4)",
    "EMA": "methods=(*recipe.methods, Ema(decay=0.95, start=recipe.steps // 2))",
    "SWA": "methods=(*recipe.methods, Swa(start=recipe.steps * 3 // 4))",
    "SAM": "methods=(*recipe.methods, Sam(rho=0.05))",
    "selective backprop": (
        "methods=(*recipe.methods, SelectiveBackprop(keep=0.5, start=0.5, end=0.9, interrupt=2))"
    ),
    "stochastic depth 0.1": "model=replace(recipe.model, block=Block(stochastic_depth=0.1))",
    "cautious decay": "optimizer=replace(recipe.optimizer, weight_decay=1e-3, cautious=True)",
    "weight decay": "optimizer=replace(recipe.optimizer, weight_decay=1e-3)",
}
STANDARD_WITH = {
    "Muon": "optimizer=Muon(lr=recipe.optimizer.lr, others=recipe.optimizer)",
    "Lion": "optimizer=Lion(lr=replace(recipe.optimizer.lr, peak=recipe.optimizer.lr.peak / 8))",
    "ADOPT": "optimizer=Adopt(lr=recipe.optimizer.lr, b2=0.99)",
    "AdEMAMix": "optimizer=Ademamix(lr=recipe.optimizer.lr, b2=0.95, b3=0.99)",
    "schedule-free": "optimizer=ScheduleFree(lr=Constant(peak=recipe.optimizer.lr.peak, warmup=12))",
    "QK norm": "model=replace(recipe.model, qk_norm=QkNorm(RmsNorm(), per_head=True))",
    "ReLU squared": "model=replace(recipe.model, ffn=Mlp(Activation.RELU_SQUARED))",
    "zero output projections": "model=replace(recipe.model, init=Kaiming(zero_residual=True))",
    "untied head": "model=replace(recipe.model, tied=False)",
    "value embeddings": "model=replace(recipe.model, value_tables=1)",
    "bigram embeddings": "model=replace(recipe.model, inputs=(Bigram(8_192),))",
    "rotary": "model=replace(recipe.model, position=Rotary())",
    "line to zero": "optimizer=replace(recipe.optimizer, lr=as_line(recipe.optimizer.lr))",
    "short rows first": (
        "seq=32, batch=64, phases=(Later(recipe.steps * 9 // 10, seq=recipe.seq, batch=recipe.batch),)"
    ),
    "batch warm-up": (
        "batch=recipe.batch // 2, steps=recipe.steps * 4 // 3,"
        " phases=(Later(recipe.steps * 2 // 3, batch=recipe.batch),)"
    ),
    "gated MLP": "model=replace(recipe.model, ffn=Glu(Activation.SILU), mlp=2 * recipe.model.mlp // 3)",
    "label smoothing 0.1": "loss=CrossEntropy(smoothing=0.1)",
    "EMA": "methods=(*recipe.methods, Ema(decay=0.95, start=recipe.steps // 2))",
    "SAM": "methods=(*recipe.methods, Sam(rho=0.05))",
    "selective backprop": (
        "methods=(*recipe.methods, SelectiveBackprop(keep=0.5, start=0.5, end=0.9, interrupt=2))"
    ),
}
BASES = {
    "best without": (speedrun.BEST, BEST_WITHOUT),
    "best with": (speedrun.BEST, BEST_WITH),
    "standard with": (speedrun.STANDARD, STANDARD_WITH),
}
PREFACE = """\
import runpy
from dataclasses import replace

from mosaicjax.layers.attention import Attention, QkNorm
from mosaicjax.layers.block import Block, StreamScales
from mosaicjax.layers.inits import Kaiming
from mosaicjax.layers.mlp import Activation, Glu, Mlp
from mosaicjax.layers.norm import LayerNorm, RmsNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.layers.token_inputs import Bigram, Smear
from mosaicjax.losses import CrossEntropy
from mosaicjax.methods.ema import Ema
from mosaicjax.methods.sam import Sam
from mosaicjax.methods.selective import SelectiveBackprop
from mosaicjax.methods.swa import Swa
from mosaicjax.muon import Muon
from mosaicjax.optim import Ademamix, AdamW, Adopt, Constant, Cosine, Linear, Lion
from mosaicjax.polar import Jordan
from mosaicjax.recipe import Later
from mosaicjax.schedule_free import ScheduleFree


def as_line(lr):
    return Linear(peak=lr.peak, warmup=lr.warmup)


def with_cosine(optimizer):
    def cosine(lr):
        return Cosine(peak=lr.peak, warmup=lr.warmup, final=0.1)

    others = replace(optimizer.others, lr=cosine(optimizer.others.lr))
    return replace(optimizer, lr=cosine(optimizer.lr), others=others)


def longer(recipe, factor):
    phases = tuple(replace(each, step=round(each.step * factor)) for each in recipe.phases)
    return replace(recipe, steps=round(recipe.steps * factor), phases=phases)


"""


def written(path: str, base: str, edit: str) -> str:
    """A recipe file that is another one with an edit."""
    (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / path).write_text(
        f"{PREFACE}recipe = runpy.run_path({str(ROOT / base)!r})['recipe']\nrecipe = {edit}\n"
    )
    return str(path)


def equivalent(loss: float, curve: Sequence[tuple[float, float]]) -> float:
    """At which multiple of its tokens the base has this loss: on a line between lengths, in logarithms.

    Beyond the lengths that were run the outer line goes on.
    """
    lengths, losses = (np.array(each) for each in zip(*sorted(curve), strict=True))
    # From the longest, the lowest loss, up.
    x, y = losses[::-1], np.log(lengths[::-1])
    at = int(np.clip(np.searchsorted(x, loss) - 1, 0, len(x) - 2))
    slope = (y[at + 1] - y[at]) / (x[at + 1] - x[at])
    return math.exp(y[at] + slope * (loss - x[at]))


Found = dict[str, list[dict[str, Any]]]


def all_runs(jobs: dict[str, tuple[str, list[str]]], seeds: int, folder: Path, cores: Sequence[int]) -> Found:
    """What each job's runs came to, by its name and seed by seed; each run has a core of its own."""
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in cores:
        free.put(core)

    def run(name: str, seed: int) -> dict[str, Any]:
        recipe, given = jobs[name]
        out = folder / "runs" / f"ablation-{name.replace(' ', '-')}-{seed}"
        options = [*given, f"--seed={seed}"]
        core = free.get()
        try:
            summary = speedrun.trained(recipe, options, out, core)
        finally:
            free.put(core)
        seconds, bits = summary["seconds"], summary["heldout"]["bits_per_byte"]
        print(f"{name}, seed {seed}: {bits:.4f} bits a byte, {seconds['train']:.1f} s of steps", flush=True)
        return {
            "seed": seed,
            "validation_bits_per_byte": bits,
            "step_seconds": seconds["train"] + seconds["data_wait"],
        }

    # Seed by seed, so that what is compared was run at about the same time.
    with ThreadPoolExecutor(len(cores)) as pool:
        tasks = [(name, pool.submit(run, name, seed)) for seed in range(1, seeds + 1) for name in jobs]
    found: Found = {name: [] for name in jobs}
    for name, task in tasks:
        found[name].append(task.result())
    return found


def losses(runs: Sequence[dict[str, Any]]) -> list[float]:
    """The validation loss of each seed."""
    return [run["validation_bits_per_byte"] for run in runs]


def table(base: str, edits: dict[str, str], sizes: Sequence[str], made: Found, label: str) -> dict[str, Any]:
    """The rows of a table: each edit beside its base."""
    mean = {factor: statistics.mean(losses(made[f"{base} {factor}"])) for factor in LENGTHS}
    usual = made[f"{base} 1.0"]
    base_work = speedrun.work_of(base, sizes)
    rows: dict[str, Any] = {}
    for name, edit in edits.items():
        runs, recipe = made[f"{label} {name}"], edited(label, name)
        # Seed by seed: what a seed does to both is no part of the difference.
        apart = [one - other for one, other in zip(losses(runs), losses(usual), strict=True)]
        tokens = [1.0 / equivalent(mean[1.0] + each, list(mean.items())) for each in apart]
        work = speedrun.work_of(recipe, sizes)
        flops = work["flops"] / work["tokens"] * base_work["tokens"] / base_work["flops"]
        seconds = statistics.median(
            one["step_seconds"] / other["step_seconds"] for one, other in zip(runs, usual, strict=True)
        )
        seconds *= base_work["tokens"] / work["tokens"]
        rows[name] = {
            "edit": edit,
            "bits_per_byte": spread(losses(runs)),
            "times_tokens": spread(tokens),
            "times_flops": statistics.median(tokens) * flops,
            "times_seconds": statistics.median(tokens) * seconds,
            "within_noise": within_noise(apart),
        }
    return {"base": base, "bits_per_byte": mean, "of_seeds": losses(usual), "rows": rows}


def within_noise(apart: Sequence[float]) -> bool:
    """Whether the mean of some differences is within twice its standard error."""
    return abs(statistics.mean(apart)) <= 2 * statistics.stdev(apart) / math.sqrt(len(apart))


def edited(label: str, name: str) -> str:
    """Where the recipe of an edit is written."""
    kept = "".join(each if each.isalnum() else "-" for each in f"{label} {name}")
    return str((speedrun.WORK / "ablation" / f"{kept}.py").relative_to(ROOT))


def main() -> int:
    """Train all and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("track", choices=sorted(speedrun.TRACKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", nargs="*", default=list(BASES), choices=list(BASES))
    parser.add_argument("--cores", nargs="*", type=int, default=sorted(os.sched_getaffinity(0)))
    parser.add_argument("--books", default="")
    parser.add_argument("--json", default=str(RESULT))
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # The seed is no part of the program: runs of a recipe compile it once, which no figure here counts.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(speedrun.WORK / "programs"))
    track = speedrun.TRACKS[options.track]
    folder = speedrun.corpus(track.corpus, options.books)
    data = f"--data.path={folder.relative_to(ROOT)}/store"
    sizes: dict[str, list[str]] = {}
    jobs: dict[str, tuple[str, list[str]]] = {}
    for label in options.tables:
        base, edits = BASES[label]
        given = track.best if base == speedrun.BEST else track.standard
        # How long each is, its recipe says.
        sizes[base] = [data, *(each for each in given if not each.startswith("--steps"))]
        for factor in LENGTHS:
            recipe = written(edited(base, str(factor)), base, f"longer(recipe, {factor})")
            jobs[f"{base} {factor}"] = (recipe, sizes[base])
        for name, edit in edits.items():
            recipe = written(edited(label, name), base, f"replace(recipe, {edit})")
            jobs[f"{label} {name}"] = (recipe, sizes[base])
    made = all_runs(jobs, options.seeds, folder, options.cores)
    here = {
        "seeds": options.seeds,
        "cores": f"{len(options.cores)}, one a run",
        "machine": machine(speedrun.PACKAGES),
    }
    result: dict[str, Any] = {"track": options.track, "tables": {}}
    for label in options.tables:
        base, edits = BASES[label]
        result["tables"][label] = here | table(base, edits, sizes[base], made, label)
    for label, each in result["tables"].items():
        print("\n".join(lines(label, each)))
    path = Path(options.json)
    before = json.loads(path.read_text()) if path.exists() else {}
    if before.get("track") == options.track:
        # Tables that were not asked for stay; each says for itself where it was made.
        result["tables"] = before["tables"] | result["tables"]
    path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def lines(label: str, found: dict[str, Any]) -> list[str]:
    """A table for a terminal: times more (above 1) or less (below) to the loss of the base."""
    said = [f"{label}: {found['base']}, {found['bits_per_byte'][1.0]:.4f} bits a byte"]
    for name, row in found["rows"].items():
        tokens = row["times_tokens"]
        said.append(
            f"  {name:34} {row['bits_per_byte']['median']:.4f}  tokens x {tokens['median']:.2f}"
            f" ({tokens['least']:.2f} to {tokens['most']:.2f})  FLOPs x {row['times_flops']:.2f}"
            f"  seconds x {row['times_seconds']:.2f}{'  within noise' if row['within_noise'] else ''}"
        )
    return said


if __name__ == "__main__":
    sys.exit(main())

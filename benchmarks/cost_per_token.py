"""What a token costs on the machine at hand: the same training by mosaicjax and by its peers, side by side.

    make quickstart peers                              # a token store, PyTorch and Transformers
    python benchmarks/cost_per_token.py --size 124M    # or quickstart; half an hour each on 2 cores
    python benchmarks/cost_per_token.py --size quickstart --maxtext-python /path/of/its/venv/bin/python

Equal work: one model (learned positions, biases, exact GELU, tied embeddings), the same first weights, the
same rows of the store in the same order, AdamW after clipping, float32, as many threads as there are cores.
What says that it is: each peer's losses are set beside ours, step by step. MaxText draws weights and rows
itself, and has its own GELU and optimizer: its losses are not compared.

Ours is the command line, `mosaicjax train recipes/mpt_125m.py` with sizes as overrides and the quickstart's
remat policy, which is for CPUs; no setting of it was searched. Each peer gets the best of its settings, tried
once each before the rounds; what was tried is kept. In a round every one is a process of its own, one after
the other, ours first and last in turn. Speed is the median step after the first two; ratios are of the same
round. Memory is the largest resident set up to the last step, time to the first step counts from the start of
the process. Dollars are an assumption's, for the whole machine: `recipes/quickstart.py` has it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine, spread  # noqa: E402 after the path, for a call as a script
from benchmarks.training_processes import (  # noqa: E402
    OURS,
    RECIPE,
    SIZES,
    WARM,
    Failed,
    Measured,
    Setting,
    Size,
    write_weights,
)
from mosaicjax.hardware import mfu, usd_per_million_tokens  # noqa: E402
from mosaicjax.models import flops  # noqa: E402
from mosaicjax.recipe_file import load  # noqa: E402

MAXTEXT = "MaxText"
# glibc's allocator asked to keep what is freed instead of giving it back and taking it anew each step.
KEEPS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}


def pytorch(label: str, environment: dict[str, str] | None = None, **options: Any) -> Setting:
    """A setting of `peers/pytorch_gpt.py`."""
    return Setting(label, "pytorch_gpt.py", options, environment or {})


PEERS: dict[str, tuple[Setting, ...]] = {
    "PyTorch": (
        pytorch("eager", peer="plain", adamw="fused"),
        pytorch("eager, foreach AdamW", peer="plain", adamw="foreach"),
        pytorch("eager, math attention", peer="plain", adamw="fused", attention="math"),
        pytorch("eager, allocator keeps", KEEPS, peer="plain", adamw="fused"),
        pytorch("compile", peer="plain", adamw="fused", compile="default"),
        pytorch("compile, allocator keeps", KEEPS, peer="plain", adamw="fused", compile="default"),
        pytorch("compile, max-autotune", peer="plain", adamw="fused", compile="max-autotune"),
    ),
    "Transformers": (
        pytorch("sdpa", peer="transformers", adamw="fused", attention="sdpa"),
        pytorch("sdpa, allocator keeps", KEEPS, peer="transformers", adamw="fused", attention="sdpa"),
        pytorch("eager attention", peer="transformers", adamw="fused", attention="eager"),
        pytorch("sdpa, compile", peer="transformers", adamw="fused", attention="sdpa", compile="default"),
    ),
    "Flax NNX": tuple(
        Setting(
            ", ".join((jit, layers, attention)),
            "flax_gpt.py",
            {"jit": jit, "layers": layers, "attention": attention, "donate": True},
        )
        for jit, layers, attention in (
            ("nnx.jit", "list", "flax"),
            ("nnx.jit", "list", "jax.nn"),
            ("jax.jit", "list", "flax"),
            ("jax.jit", "scan", "flax"),
            ("jax.jit", "list", "jax.nn"),
        )
    ),
    # MaxText has no setting that keeps all activations: its "none" is as "full".
    MAXTEXT: tuple(
        Setting(
            f"scan_layers {scan}, remat {remat}, fused_qkv {fused}",
            "maxtext_gpt.py",
            {"scan_layers": scan, "remat_policy": remat, "fused_qkv": fused},
        )
        for scan, remat, fused in (
            ("true", "minimal", "true"),
            ("true", "full", "true"),
            ("true", "minimal", "false"),
            ("false", "minimal", "true"),
        )
    ),
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    parser.add_argument("--store", default="build/quickstart/store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="of each process (default: by size)")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--maxtext-python", default="", help="a Python that has MaxText; else it is not run")
    parser.add_argument("--out", type=Path, help="(default: cost_per_token.SIZE.json beside this script)")
    options = parser.parse_args()
    out = options.out or Path(__file__).with_suffix(f".{options.size}.json")
    result: dict[str, Any] = {
        "script": "benchmarks/cost_per_token.py",
        # Paths of this machine stay out.
        "arguments": [f"--{name}={getattr(options, name)}" for name in ("size", "rounds", "steps", "peers")],
        "machine": machine(("jax", "flax", "optax", "torch", "transformers")),
    }
    print(f"load average {os.getloadavg()[0]:.2f}: it should be near 0")
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, __file__, "--weights"]
        size = Size(options.size, str(Path(options.store).resolve()), options.steps, Path(work), command)
        result[options.size] = measured(size, options)
    print(table(options.size, result[options.size]))
    out.write_text(json.dumps(result, indent=1) + "\n")
    draw(options.size, result[options.size], out.with_suffix(".png"))


def measured(size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """The search, then the rounds, of one size."""
    pythons = {MAXTEXT: options.maxtext_python}
    peers = [p for p in options.peers.split(",") if p and pythons.get(p, sys.executable)]
    best: dict[str, Setting] = {}
    search: dict[str, dict[str, Any]] = {}
    for peer in peers:
        search[peer] = {}
        for setting in PEERS[peer]:
            try:
                found = size.peer(setting, pythons.get(peer, sys.executable))
            except Failed as error:
                search[peer][setting.label] = f"failed: {error}"
                continue
            search[peer][setting.label] = {"step_seconds": found.step, "peak_gb": found.peak_bytes / 1e9}
            print(
                f"  {peer}, {setting.label}: {found.step:.3f} s, {found.peak_bytes / 1e9:.2f} GB", flush=True
            )
        tried = {s.label: s for s in PEERS[peer] if isinstance(search[peer][s.label], dict)}
        if tried:
            best[peer] = tried[min(tried, key=lambda label: search[peer][label]["step_seconds"])]
    rounds: list[dict[str, Measured]] = []
    for n in range(options.rounds):
        order = [OURS, *best]
        row: dict[str, Measured] = {}
        for peer in order if n % 2 == 0 else order[::-1]:
            row[peer] = (
                size.ours() if peer == OURS else size.peer(best[peer], pythons.get(peer, sys.executable))
            )
            print(f"  round {n}: {peer} {row[peer].step:.3f} s", flush=True)
        rounds.append(row)
    decoder = size.recipe.model.build()
    count = flops.per_token(decoder, size.recipe.seq)
    peak = matrix_rate()
    price = load(str(ROOT / "recipes/quickstart.py")).recipe.price
    assert price is not None
    rows = {}
    for peer in (OURS, *best):
        mine = [row[peer] for row in rounds]
        rates = [size.tokens / one.step for one in mine]
        rate = statistics.median(rates)
        theirs = mine[0].losses
        rows[peer] = {
            "setting": "as it comes" if peer == OURS else best[peer].label,
            "parameters": mine[0].parameters,
            "tokens_per_second": spread(rates),
            "peak_gb": spread([one.peak_bytes / 1e9 for one in mine]),
            "first_step_seconds": spread([one.first_step_seconds for one in mine]),
            "usd_per_million_tokens": usd_per_million_tokens(rate, 1, price),
            **{f"mfu_{how}": mfu(flop * rate, 1, peak) for how, flop in asdict(count).items()},
            "largest_loss_difference": None
            if peer == MAXTEXT
            else max(abs(a - b) for a, b in zip(theirs, rounds[0][OURS].losses, strict=True)),
            "last_loss": theirs[-1],
        }
        if peer != OURS:
            pairs = [row[peer].step / row[OURS].step for row in rounds]
            rows[peer]["speed_of_ours"] = spread(pairs)
            memory = [row[OURS].peak_bytes / row[peer].peak_bytes for row in rounds]
            rows[peer]["memory_of_ours"] = spread(memory)
    return {
        "recipe": RECIPE,
        "overrides": [o for o in size.overrides if not o.startswith("--data.path")],
        "steps": size.steps,
        "warm_steps": WARM,
        "rounds": options.rounds,
        "dtype": "float32",
        "threads": size.threads,
        "seed": size.recipe.seed,
        "tokens_per_step": size.tokens,
        "flops_per_token": asdict(count),
        "matrix_rate_flops": peak,
        "price": asdict(price),
        "search": search,
        "results": rows,
        "measured": [{peer: asdict(one) for peer, one in row.items()} for row in rounds],
    }


def matrix_rate() -> float:
    """The best rate of NumPy's float32 product of 4,096 x 4,096 matrices here: what MFU is a share of.

    Units: FLOPs a second.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((4_096, 4_096)).astype(np.float32) for _ in range(2))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * 4_096**3 / min(seconds)


def table(name: str, found: dict[str, Any]) -> str:
    """What was found, as lines."""
    head = (
        f"{name}: {found['rounds']} rounds of {found['steps']} steps of {found['tokens_per_step']:,} tokens,"
        f" float32, {found['threads']} threads; medians (least to most). MFU is of"
        f" {found['matrix_rate_flops'] / 1e9:.0f} GFLOP/s, attention counted causal / full"
    )
    lines = [head]
    for peer, row in found["results"].items():
        rate, peak = row["tokens_per_second"], row["peak_gb"]
        line = (
            f"  {peer:13}{rate['median']:9.1f} tokens/s ({rate['least']:.1f} to {rate['most']:.1f})"
            f"  MFU {row['mfu_causal']:.3f} / {row['mfu_full']:.3f}  {peak['median']:.2f} GB"
            f"  first step {row['first_step_seconds']['median']:.1f} s"
            f"  ${row['usd_per_million_tokens']:.4f} a million tokens"
        )
        if "speed_of_ours" in row:
            speed, memory = row["speed_of_ours"], row["memory_of_ours"]
            apart = row["largest_loss_difference"]
            line += (
                f"\n{'':15}ours: {speed['median']:.3f} of its speed"
                f" ({speed['least']:.3f} to {speed['most']:.3f}), {memory['median']:.3f} of its memory;"
                f" {row['setting']}" + ("" if apart is None else f"; losses within {apart:.1e}")
            )
        lines.append(line)
    return "\n".join(lines)


def draw(name: str, found: dict[str, Any], path: Path) -> None:
    """Dollars a million tokens, a bar a peer, each round a dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    axes, rows = drawn.subplots(), found["results"]
    hourly = found["price"]["usd_per_chip_hour"]
    colors = ["#1f4e8c" if peer == OURS else "#9db3cf" for peer in rows]
    places = range(len(rows))
    axes.barh(places, [row["usd_per_million_tokens"] for row in rows.values()], color=colors)
    for place, peer in zip(places, rows, strict=True):
        for row in found["measured"]:
            step = statistics.median(row[peer]["step_seconds"][WARM:])
            axes.plot(step / found["tokens_per_step"] * 1e6 / 3600 * hourly, place, "k.", markersize=3)
    axes.set_yticks(places, list(rows))
    axes.invert_yaxis()
    axes.set_xlabel(f"dollars a million tokens, at ${hourly:.2f} an hour")
    axes.set_title(name, fontsize=10)
    drawn.savefig(path, format="png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--weights"]:
        write_weights(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()

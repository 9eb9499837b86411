"""What a token costs on the machine at hand: the same training by mosaicjax and by its peers, side by side.

    make quickstart peers                              # a token store, PyTorch and Transformers
    python benchmarks/cost_per_token.py                # both sizes; about 40 minutes on 2 cores
    python benchmarks/cost_per_token.py --sizes quickstart --maxtext-python /path/of/its/venv/bin/python

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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine, spread  # noqa: E402 after the path, for a call as a script
from mosaicjax.hardware import mfu, usd_per_million_tokens  # noqa: E402
from mosaicjax.models import flops  # noqa: E402
from mosaicjax.models.decoder import Decoder  # noqa: E402
from mosaicjax.recipe import Recipe  # noqa: E402
from mosaicjax.recipe_file import load  # noqa: E402
from mosaicjax.run import open_data  # noqa: E402

RESULT = Path(__file__).with_suffix(".json")
PICTURE = Path(__file__).with_suffix(".png")
RECIPE = "recipes/mpt_125m.py"
WARM = 2
OURS = "mosaicjax"
MAXTEXT = "MaxText"
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
# glibc's allocator asked to keep what is freed instead of giving it back and taking it anew each step.
KEEPS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Setting:
    """One way to run one peer: what its script is told, and environment variables."""

    label: str
    script: str
    options: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)


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
    """One model and the rows that all are given, in a directory of their own."""

    def __init__(self, name: str, store: str, steps: int, work: Path) -> None:
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
        subprocess.run([sys.executable, __file__, "--weights", str(work), *self.overrides], check=True)

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


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--store", default="build/quickstart/store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="of each process (default: by size)")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--maxtext-python", default="", help="a Python that has MaxText; else it is not run")
    parser.add_argument("--out", default=str(RESULT))
    options = parser.parse_args()
    results: dict[str, Any] = {
        "script": "benchmarks/cost_per_token.py",
        # Paths of this machine stay out.
        "arguments": [f"--{name}={getattr(options, name)}" for name in ("sizes", "rounds", "steps", "peers")],
        "machine": machine(("jax", "flax", "optax", "torch", "transformers")),
    }
    print(f"load average {os.getloadavg()[0]:.2f}: it should be near 0")
    for name in options.sizes.split(","):
        with tempfile.TemporaryDirectory() as work:
            size = Size(name, str(Path(options.store).resolve()), options.steps, Path(work))
            results[name] = measured(size, options)
        print(table(name, results[name]))
        Path(options.out).write_text(json.dumps(results, indent=1) + "\n")
    draw({name: results[name] for name in options.sizes.split(",")}, Path(options.out).with_suffix(".png"))


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


def draw(found: dict[str, Any], path: Path) -> None:
    """Dollars a million tokens, a bar a peer, each round a dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    for axes, (name, size) in zip(
        drawn.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        rows = size["results"]
        hourly = size["price"]["usd_per_chip_hour"]
        places = range(len(rows))
        colors = ["#1f4e8c" if peer == OURS else "#9db3cf" for peer in rows]
        axes.barh(places, [row["usd_per_million_tokens"] for row in rows.values()], color=colors)
        for place, peer in zip(places, rows, strict=True):
            for row in size["measured"]:
                step = statistics.median(row[peer]["step_seconds"][WARM:])
                axes.plot(step / size["tokens_per_step"] * 1e6 / 3600 * hourly, place, "k.", markersize=3)
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

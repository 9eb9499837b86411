"""The same recipes compiled for the same TPUs by us and by MaxText: memory, bytes, FLOPs and predicted steps.

    make peers
    python benchmarks/compiled_beside_maxtext.py --maxtext-python /path/of/its/venv/bin/python

Ours is the recipe's step as `mosaicjax plan` compiles it; MaxText's is what its own `train_compile` makes,
with the same sizes, rows a chip, full remat, bfloat16 products of float32 weights, and its splash attention.
Nothing runs, so that nothing depends on the load. One reader counts both programs and one model times them.
Of MaxText each of `SETTINGS` is compiled; it gets the one with the shortest predicted step.

In MaxText's favour: its attention kernels say no cost, so that their products are counted by their blocks and
timed at the chip's peak; ours take the rate that the compiler's schedule gives them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402 after the path, for a call as a script
from mosaicjax.data.mixture import TokenStore  # noqa: E402
from mosaicjax.kernels.attention_blocks import Problem, visited_pairs  # noqa: E402
from mosaicjax.layers.position import Rotary  # noqa: E402
from mosaicjax.methods.clip import ClipGradients  # noqa: E402
from mosaicjax.models import llama  # noqa: E402
from mosaicjax.models.decoder import Remat  # noqa: E402
from mosaicjax.optim import AdamW  # noqa: E402
from mosaicjax.plan import hlo  # noqa: E402
from mosaicjax.plan.bill import bill  # noqa: E402
from mosaicjax.plan.compiled import Memory  # noqa: E402
from mosaicjax.plan.count import Op, operations, sent, total  # noqa: E402
from mosaicjax.plan.kept import cache_dir  # noqa: E402
from mosaicjax.plan.step_time import Speeds, device_places, step_time  # noqa: E402
from mosaicjax.plan.topology import Topology  # noqa: E402
from mosaicjax.recipe import Recipe  # noqa: E402

RESULT = Path(__file__).with_suffix(".json")
PACKAGES = ("jax", "jaxlib", "libtpu")
TOPOLOGY, ITS_TOPOLOGY = "v5e:16x16", "v5e-256"
SEQ = 2_048
SETTINGS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "fused backward kernel": {"sa_use_fused_bwd_kernel": "true"},
}
PRODUCTS = {"dkv": 4, "dq": 3, "": 2}
"""Matrix products of a splash kernel, by a word in its name; a fused backward pass has 5 in "dkv"."""


@dataclass(frozen=True)
class Case:
    """One recipe of both: MaxText's model and ours, and how many rows a chip gets."""

    name: str
    model: llama.Config
    theirs: dict[str, str]
    rows: int

    def recipe(self, chips: int) -> Recipe:
        """Ours."""
        return Recipe(
            model=replace(self.model, remat=Remat.FULL),
            data=TokenStore("none"),
            seq=SEQ,
            batch=self.rows * chips,
            steps=1_000,
            # The rate is no part of what is compiled; MaxText's moments and weights are float32 too.
            optimizer=AdamW(),
            methods=(ClipGradients(norm=1.0),),
        )


def _llama(**sizes: int) -> llama.Config:
    return llama.Config(**sizes, head_dim=128, vocab=32_000, tied=False, position=Rotary(theta=10_000.0))


ONE = _llama(layers=16, embed=2_048, heads=16, kv_heads=16, mlp=7_168)
SEVEN = _llama(layers=32, embed=4_096, heads=32, kv_heads=32, mlp=11_008)
CASES = (
    Case("1B, 4 rows a chip", ONE, {}, 4),
    Case("7B, 1 row a chip", SEVEN, {"model_name": "llama2-7b"}, 1),
    Case("7B, 2 rows a chip", SEVEN, {"model_name": "llama2-7b"}, 2),
)


def ours(case: Case, topology: Topology) -> dict[str, Any]:
    """Our step's figures, of one chip and one step."""
    found = bill(case.recipe(topology.chips), topology, price=None, cache=cache_dir())
    assert found.compiled.memory is not None and found.fast and found.slow, f"{case.name} fits"
    return {
        "parameters": found.recipe.program()[1].trainable.count(),
        "program": found.compiled.digest,
        "kernel_seconds": found.fast.kernels,
        **figures(found.compiled.memory, found.ops, found.fast.seconds, found.slow.seconds),
    }


def theirs(case: Case, topology: Topology, python: str, setting: dict[str, str]) -> dict[str, Any]:
    """MaxText's step's figures under one setting."""
    chosen = case.theirs | setting
    chosen |= {
        "compile_topology": ITS_TOPOLOGY,
        "ici_fsdp_parallelism": str(topology.chips),
        "per_device_batch_size": str(case.rows),
        "max_target_length": str(SEQ),
        "remat_policy": "full",
        "attention": "flash",
        "scan_layers": "true",
        "dtype": "bfloat16",
        "weight_dtype": "float32",
    }
    with tempfile.TemporaryDirectory() as out:
        script = str(ROOT / "benchmarks" / "peers" / "maxtext_compiled.py")
        command = [python, script, out, *(f"{key}={value}" for key, value in chosen.items())]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            raise SystemExit(f"MaxText: {done.stderr.strip().splitlines()[-1]}")
        said = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
        ops = operations(hlo.read((Path(out) / "program.txt").read_text()))
    ops = [replace(op, flops=splash_flops(op, said)) if _splash(op) else op for op in ops]
    speeds, places = Speeds.of(topology, "bfloat16"), device_places(topology.devices())
    fast, slow = (step_time(ops, speeds, places, lambda op: None, pessimistic=p) for p in (False, True))
    memory = said["memory"]
    held = Memory(*(memory[name] for name in ("argument", "output", "alias", "temp", "generated_code")))
    return {
        "parameters": said["parameters"],
        "packages": said["packages"],
        "blocks": said["blocks"],
        "kernel_seconds": fast.kernels,
        **figures(held, ops, fast.seconds, slow.seconds),
    }


def _splash(op: Op) -> bool:
    return op.kernel and "splash" in op.name


def splash_flops(op: Op, said: dict[str, Any]) -> float:
    """What a splash kernel multiplies: the whole of each block that causality leaves something of."""
    kind = next(word for word in PRODUCTS if word in op.name)
    products = 5 if kind == "dkv" and said["fused_backward"] else PRODUCTS[kind]
    ending = f"_{kind}" if kind else ""
    blocks = tuple(min(said["blocks"][f"{side}{ending}"], said["seq"]) for side in ("q", "kv"))
    pairs = visited_pairs(Problem(True, 0, 1.0, 0.0, said["seq"], said["seq"]), (blocks[0], blocks[1]))
    return 2.0 * products * pairs * said["head_dim"] * said["heads"] * said["rows"]


def figures(memory: Memory, ops: Sequence[Op], fast: float, slow: float) -> dict[str, Any]:
    """Units: of one chip and one step."""
    return {
        "peak_gib": memory.peak / 2**30,
        "temporaries_gib": memory.temporaries / 2**30,
        "hbm_gb": total(ops, "hbm") / 1e9,
        "wire_gb": sent(ops) / 1e9,
        "tflops": total(ops, "flops") / 1e12,
        "step_seconds": (fast + slow) / 2,
        "optimistic_seconds": fast,
        "pessimistic_seconds": slow,
    }


COMPARED = ("peak_gib", "hbm_gb", "wire_gb", "tflops", "step_seconds")


def main() -> None:
    """Compile both, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--maxtext-python", required=True, help="a Python that has MaxText and libtpu")
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    topology = Topology.read(TOPOLOGY)
    rows = []
    for case in CASES:
        if options.only not in case.name:
            continue
        mine = ours(case, topology)
        tried = {
            name: theirs(case, topology, options.maxtext_python, each) for name, each in SETTINGS.items()
        }
        best = min(tried, key=lambda name: tried[name]["step_seconds"])
        ratios = {name: mine[name] / tried[best][name] for name in COMPARED}
        rows.append(
            {
                "name": case.name,
                "rows_a_chip": case.rows,
                "seq": SEQ,
                "remat": "full",
                "mosaicjax": mine,
                "maxtext": tried[best],
                "setting": best,
                "tried": tried,
                "ours_over_maxtext": ratios,
            }
        )
        print(text(rows[-1]), flush=True)
    content = {"machine": machine(PACKAGES), "topology": TOPOLOGY, "cases": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n")


def text(row: dict[str, Any]) -> str:
    """One case for the terminal."""
    lines = [f"{row['name']} on {TOPOLOGY}, full remat; MaxText: {row['setting']}"]
    for which in ("mosaicjax", "maxtext"):
        it = row[which]
        lines.append(
            f"  {which:10} {it['parameters']:,} parameters  {it['peak_gib']:.3f} GiB a chip"
            f"  {it['hbm_gb']:.1f} GB of HBM  {it['wire_gb']:.2f} GB sent  {it['tflops']:.2f} TFLOP"
            f"  {it['step_seconds']:.3f} s"
            f" ({it['optimistic_seconds']:.3f} to {it['pessimistic_seconds']:.3f})"
        )
    ratios = "  ".join(f"{name} {value:.3f}" for name, value in row["ours_over_maxtext"].items())
    return "\n".join([*lines, f"  ours over MaxText: {ratios}"])


if __name__ == "__main__":
    main()

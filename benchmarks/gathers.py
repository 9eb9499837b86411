"""How sharded weights are gathered and gradients summed over a torus, and what it costs, in compiled steps.

    python benchmarks/gathers.py                       # needs libtpu; some 20 minutes
    python benchmarks/gathers.py --only v6e            # topologies with this in their names

A Llama of 7B is compiled with each way of `Mesh`: the compiler's own, and explicit all-gathers and
reduce-scatters over fsdp axes that follow the torus, whose sums go in the reduce dtype or in the compute
dtype. What is counted is the compiled program: bytes that each chip sends by the kind of collective that the
compiler made, and the predicted step. `mosaicjax plan --fit` makes the same choice between these ways.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402 after the path, for a call as a script
from mosaicjax.data.mixture import TokenStore  # noqa: E402
from mosaicjax.mesh import Mesh  # noqa: E402
from mosaicjax.models import llama  # noqa: E402
from mosaicjax.models.decoder import Remat  # noqa: E402
from mosaicjax.plan.bill import Bill, bill  # noqa: E402
from mosaicjax.plan.kept import cache_dir  # noqa: E402
from mosaicjax.plan.topology import Topology  # noqa: E402
from mosaicjax.recipe import Recipe  # noqa: E402

RESULT = Path(__file__).with_suffix(".json")
PACKAGES = ("jax", "jaxlib", "libtpu")
TOPOLOGIES = ("v5e:16x16", "v6e:16x16", "v5p:8x8x8")
ROWS = 2
"""Of 2,048 tokens, a chip and step."""


def ways(grid: tuple[int, ...]) -> dict[str, Mesh]:
    """Meshes that shard the weights over all chips of a torus."""
    return {
        "compiler": Mesh(),
        "explicit, float32 sums": Mesh(fsdp=grid, gather="explicit", sums="reduce"),
        "explicit, bfloat16 sums": Mesh(fsdp=grid, gather="explicit", sums="compute"),
    }


def recipe(chips: int) -> Recipe:
    """Llama-2-7B with full remat."""
    sizes = {"layers": 32, "embed": 4_096, "heads": 32, "kv_heads": 32, "head_dim": 128, "mlp": 11_008}
    model = llama.Config(**sizes, vocab=32_000, tied=False, remat=Remat.FULL)
    return Recipe(model=model, data=TokenStore("none"), seq=2_048, batch=ROWS * chips, steps=1_000)


def row(found: Bill) -> dict[str, Any]:
    """Units: bytes that one chip sends in a step."""
    sent: dict[str, float] = defaultdict(float)
    for op in found.ops:
        for one in op.collectives:
            sent[one.kind] += op.times * one.sent
    base = {"program": found.compiled.digest, "needed_gib": found.compiled.needed / 2**30}
    if found.fast is None or found.slow is None:
        return base
    return base | {
        "sent_bytes": dict(sent),
        "step_seconds": found.seconds,
        "optimistic_seconds": found.fast.seconds,
        "pessimistic_seconds": found.slow.seconds,
        "exposed_seconds": {"optimistic": found.fast.collectives, "pessimistic": found.slow.collectives},
        "lints": list(found.lints),
    }


def text(name: str, found: dict[str, Any], base: dict[str, Any]) -> str:
    """One way for the terminal."""
    if "step_seconds" not in found:
        return f"  {name:24} {found['needed_gib']:.2f} GiB a chip: does not fit"
    sent = ", ".join(f"{kind} {size / 1e9:.1f} GB" for kind, size in sorted(found["sent_bytes"].items()))
    gain = base.get("step_seconds", float("nan")) / found["step_seconds"]
    return (
        f"  {name:24} {found['step_seconds']:.3f} s ({found['optimistic_seconds']:.3f} to"
        f" {found['pessimistic_seconds']:.3f}), {gain:.3f} of the compiler's speed;"
        f" {found['needed_gib']:.2f} GiB; {sent}"
    )


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="topologies with this in their names")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for name in TOPOLOGIES:
        if options.only not in name:
            continue
        topology, rows[name] = Topology.read(name), {}
        print(f"{name}, {ROWS} rows of 2,048 tokens a chip")
        for way, mesh in ways(topology.grid).items():
            planned = bill(
                replace(recipe(topology.chips), mesh=mesh), topology, price=None, cache=cache_dir()
            )
            rows[name][way] = row(planned)
            print(text(way, rows[name][way], rows[name]["compiler"]), flush=True)
    content = {"machine": machine(PACKAGES), "rows_a_chip": ROWS, "topologies": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

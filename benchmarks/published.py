"""Published runs rebuilt as recipes and planned: predicted MFU beside the published one, each with its error.

    python benchmarks/published.py                    # needs libtpu; 2 to 6 minutes a run the first time
    python benchmarks/published.py --only "v5e 32B"   # those with this in their names

Every run is our own train step of the same model, batch, remat policy and mesh, compiled for the same chips.
Nothing is fitted to the published figures, so each error is that of a run which the prediction has not seen.
All published figures count attention in full, as `mfu_full` does here, and no embedding lookup.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402 after the path, for a call as a script
from mosaicjax.data.stream import TokenStore  # noqa: E402
from mosaicjax.mesh import REST, Mesh  # noqa: E402
from mosaicjax.models import llama  # noqa: E402
from mosaicjax.models.decoder import Remat  # noqa: E402
from mosaicjax.optim import AdamW  # noqa: E402
from mosaicjax.plan.bill import Bill, bill  # noqa: E402
from mosaicjax.plan.kept import cache_dir  # noqa: E402
from mosaicjax.plan.topology import Topology  # noqa: E402
from mosaicjax.recipe import Recipe  # noqa: E402

RESULT = Path(__file__).with_suffix(".json")
PACKAGES = ("jax", "jaxlib", "libtpu")
V5E = "MaxText, configs/tpu/v5e/README.md and {}.sh @e591f30cb"
V5P = "MaxText, configs/tpu/v5p/README.md and {}.sh @e591f30cb"

UNSPLIT = "its {} tensor shards are one here: ours do not split the residual stream, and would not fit"


@dataclass(frozen=True)
class Published:
    """A run that somebody measured: its MFU (attention in full), where that stands, and what it was.

    `note` says what of it could not be rebuilt.
    """

    name: str
    topology: str
    mfu: float
    source: str
    recipe: Callable[[], Recipe]
    note: str = ""


def scaled(parameters: int) -> llama.Config:
    """MaxText's base model at `global_parameter_scale` 16, 32, 64 or 128.

    The scale's power of 2 goes in thirds to heads and MLP, to the embedding, and to the layers.

    Source: get_individual_scales in MaxText's configs/types.py.
    """
    thirds, rest = divmod(parameters.bit_length() - 1, 3)
    wide, embed = thirds + (rest > 0), thirds + (rest > 1)
    return llama.Config(
        layers=16 * 2**thirds,
        embed=2_048 * 2**embed,
        heads=16 * 2**wide,
        kv_heads=16 * 2**wide,
        head_dim=128,
        mlp=7_168 * 2**wide,
        vocab=32_000,
    )


def rebuilt(
    model: llama.Config, rows: int, chips: int, remat: Remat, seq: int = 2_048, tensor: int = 1
) -> Recipe:
    """A recipe with so many rows a chip."""
    return Recipe(
        model=llama.Config(**{**vars(model), "remat": remat}),
        data=TokenStore("none"),
        seq=seq,
        batch=rows * chips,
        steps=1_000,
        optimizer=AdamW(),
        mesh=Mesh(fsdp=(REST,), tensor=tensor),
    )


LLAMA2_70B = llama.Config(
    layers=80, embed=8_192, heads=64, kv_heads=8, head_dim=128, mlp=28_672, vocab=32_000
)

RUNS = [
    Published(
        "v5e 16B", "v5e:16x16", 0.6110, V5E.format("16b"), lambda: rebuilt(scaled(16), 6, 256, Remat.FULL)
    ),
    Published(
        "v5e 32B", "v5e:16x16", 0.6686, V5E.format("32b"), lambda: rebuilt(scaled(32), 4, 256, Remat.FULL)
    ),
    Published(
        "v5e 64B", "v5e:16x16", 0.5990, V5E.format("64b"), lambda: rebuilt(scaled(64), 2, 256, Remat.FULL)
    ),
    Published(
        "v5p 32B",
        "v5p:4x4x4",
        0.7147,
        V5P.format("32b"),
        lambda: rebuilt(scaled(32), 6, 64, Remat.DOTS),
        note=UNSPLIT.format(4),
    ),
    Published(
        "v5p 64B",
        "v5p:4x4x4",
        0.7031,
        V5P.format("64b"),
        lambda: rebuilt(scaled(64), 3, 64, Remat.DOTS),
        note=UNSPLIT.format(4),
    ),
    Published(
        "v5p 128B",
        "v5p:4x4x8",
        0.6868,
        V5P.format("128b"),
        lambda: rebuilt(scaled(128), 1, 128, Remat.DOTS),
        note=UNSPLIT.format(8),
    ),
    Published(
        "v5p Llama-2-70B",
        "v5p:4x4x4",
        0.654,
        V5P.format("llama2_70b"),
        lambda: rebuilt(LLAMA2_70B, 4, 64, Remat.QKV, seq=4_096),
        note="its remat policy also keeps attention's projection out, and what the MLP projects down",
    ),
]


def row(run: Published, found: Bill) -> dict[str, Any]:
    """One run's figures."""
    model = found.recipe.model
    assert isinstance(model, llama.Config), "all are of MaxText's base model or Llama"
    base = {
        "name": run.name,
        "topology": run.topology,
        "source": run.source,
        "note": run.note,
        "published_mfu": run.mfu,
        "rows_a_chip": found.recipe.batch / found.topology.chips,
        "seq": found.recipe.seq,
        "remat": model.remat.name,
        "mesh": {"fsdp": "rest", "tensor": found.recipe.mesh.tensor, "gather": found.recipe.mesh.gather},
        "program": found.compiled.digest,
        "fits": found.compiled.fits,
        "needed_gib": found.compiled.needed / 2**30,
    }
    if found.work is None or found.fast is None or found.slow is None:
        return base
    mid, fast, slow = (
        found.utilization(found.work.model_full, seconds)
        for seconds in (found.seconds, found.fast.seconds, found.slow.seconds)
    )
    step = {
        which: {kind: getattr(each, kind) for kind in ("matrix", "vector", "kernels", "collectives", "wire")}
        for which, each in (("optimistic", found.fast), ("pessimistic", found.slow))
    }
    return base | {
        "predicted_mfu": mid,
        "optimistic_mfu": fast,
        "pessimistic_mfu": slow,
        "error": mid / run.mfu - 1,
        "step_seconds": found.seconds,
        "parts": step,
        "usd_per_million_tokens": found.usd_per_million_tokens,
        "flops_compiled_over_expected": found.work.compiled / found.work.expected,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="runs with this in their names")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = []
    for run in RUNS:
        if options.only and not any(part in run.name for part in options.only):
            continue
        found = bill(run.recipe(), Topology.read(run.topology), price=None, cache=cache_dir())
        rows.append(row(run, found))
        print(line(rows[-1]), flush=True)
    errors = [abs(each["error"]) for each in rows if "error" in each]
    summary = {"runs": len(errors), "mean_error": statistics.mean(errors), "worst_error": max(errors)}
    mean, worst = summary["mean_error"], summary["worst_error"]
    print(f"{len(errors)} runs: mean absolute error {mean:.1%}, worst {worst:.1%}")
    content = {"machine": machine(PACKAGES), "summary": summary, "runs": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """For the terminal."""
    head = f"{row['name']:<16} {row['topology']:<10} {row['needed_gib']:6.2f} GiB"
    if "error" not in row:
        return f"{head}: does not fit"
    parts = row["parts"]["optimistic"]
    shares = ", ".join(f"{kind} {parts[kind]:.2f}" for kind in ("matrix", "vector", "kernels", "collectives"))
    return (
        f"{head}: published {row['published_mfu']:.1%}, predicted {row['predicted_mfu']:.1%}"
        f" ({row['pessimistic_mfu']:.1%} to {row['optimistic_mfu']:.1%}), error {row['error']:+.1%};"
        f" {row['step_seconds']:.2f} s: {shares}"
    )


if __name__ == "__main__":
    main()

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
from mosaicjax.data.mixture import TokenStore  # noqa: E402
from mosaicjax.losses import CrossEntropy  # noqa: E402
from mosaicjax.mesh import REST, Mesh  # noqa: E402
from mosaicjax.models import llama  # noqa: E402
from mosaicjax.models.decoder import Remat  # noqa: E402
from mosaicjax.optim import AdamW  # noqa: E402
from mosaicjax.plan.bill import Bill, bill  # noqa: E402
from mosaicjax.plan.kept import cache_dir  # noqa: E402
from mosaicjax.plan.topology import Topology  # noqa: E402
from mosaicjax.recipe import Recipe  # noqa: E402
from mosaicjax.recipe_file import load  # noqa: E402

RESULT = Path(__file__).with_suffix(".json")
PACKAGES = ("jax", "jaxlib", "libtpu")
V5E = "MaxText, configs/tpu/v5e/README.md and {}.sh @e591f30cb"
V5P = "MaxText, configs/tpu/v5p/README.md and {}.sh @e591f30cb"

TRILLIUM = "tpu-recipes, training/trillium/Llama3.1-8B-MaxText/{}/README.md @a9e09290"
HELD = (
    "a layer's input, q, k, v and attention's output wait in host memory, ours on the chip; logits by chunks"
)


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
    model: llama.Config,
    rows: int,
    chips: int,
    remat: Remat,
    seq: int = 2_048,
    tensor: int = 1,
    chunk: int = 0,
) -> Recipe:
    """A recipe with so many rows a chip."""
    return Recipe(
        model=llama.Config(**{**vars(model), "remat": remat}),
        data=TokenStore("none"),
        seq=seq,
        batch=rows * chips,
        steps=1_000,
        optimizer=AdamW(),
        loss=CrossEntropy(chunk=chunk),
        mesh=Mesh(fsdp=(REST,), tensor=tensor),
    )


LLAMA2_70B = llama.Config(
    layers=80, embed=8_192, heads=64, kv_heads=8, head_dim=128, mlp=28_672, vocab=32_000
)
LLAMA31_8B = llama.Config(
    layers=32, embed=4_096, heads=32, kv_heads=8, head_dim=128, mlp=14_336, vocab=128_256
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
        lambda: rebuilt(scaled(32), 6, 64, Remat.DOTS, tensor=4),
    ),
    Published(
        "v5p 64B",
        "v5p:4x4x4",
        0.7031,
        V5P.format("64b"),
        lambda: rebuilt(scaled(64), 3, 64, Remat.DOTS, tensor=4),
    ),
    Published(
        "v5p 128B",
        "v5p:4x4x8",
        0.6868,
        V5P.format("128b"),
        lambda: rebuilt(scaled(128), 1, 128, Remat.DOTS, tensor=8),
    ),
    Published(
        "v5p Llama-2-70B",
        "v5p:4x4x4",
        0.654,
        V5P.format("llama2_70b"),
        lambda: rebuilt(LLAMA2_70B, 4, 64, Remat.QKV, seq=4_096),
        note="its remat policy also keeps attention's projection out, and what the MLP projects down",
    ),
    Published(
        "v6e Llama-3.1-8B",
        "v6e:16x16",
        417.397 / 918,
        TRILLIUM.format("v6e-256"),
        lambda: rebuilt(LLAMA31_8B, 4, 256, Remat.QKV, seq=8_192, chunk=1_024),
        note=HELD,
    ),
]


@dataclass(frozen=True)
class Priced:
    """A recipe of ours whose run has a published cost, planned for chips of today.

    Units: `usd` dollars a million tokens.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    usd: float
    source: str


# The batch is the next that divides over 256 chips.
SLICE = ("--batch=1792", "--steps=272479")
CHIPS = ("v5e:16x16", "v6e:16x16", "v5p:4x4x8")
BILLS = [
    Priced(
        "MPT-7B",
        "recipes/mpt_7b.py",
        (*SLICE, "--microbatch=0"),
        0.20,
        "mosaicml.com/blog/mpt-7b: $200,000 for 1T tokens, 440 A100-40GB for 9.5 days",
    ),
    Priced(
        "MPT-30B",
        "recipes/mpt_30b.py",
        (*SLICE, "--microbatch=256"),
        0.869,
        "not published; llm-foundry's 281,491 tokens a second on 128 H100 at the list price in hardware.py",
    ),
]


def priced(each: Priced, topology: str) -> dict[str, Any]:
    """What a recipe's tokens cost on a topology, as planned, beside what they did."""
    recipe = load(str(ROOT / each.recipe), each.overrides).recipe
    found = bill(recipe, Topology.read(topology), price=None, cache=cache_dir())
    base = {
        "name": each.name,
        "recipe": each.recipe,
        "overrides": list(each.overrides),
        "topology": topology,
        "published_usd_per_million_tokens": each.usd,
        "source": each.source,
        "fits": found.compiled.fits,
        "needed_gib": found.compiled.needed / 2**30,
    }
    if not found.compiled.fits:
        return base
    assert found.price and found.work
    return base | {
        "usd_per_million_tokens": found.usd_per_million_tokens,
        "usd_per_chip_hour": found.price.usd_per_chip_hour,
        "price_source": found.price.source,
        "mfu_causal": found.utilization(found.work.model),
        "mfu_full": found.utilization(found.work.model_full),
        "days": found.run_seconds / 86_400,
    }


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
    rows, bills = [], []
    for each in BILLS:
        for topology in CHIPS:
            name = f"{each.name} on {topology}"
            if options.only and not any(part in name for part in options.only):
                continue
            bills.append(priced(each, topology))
            print(f"{name}: {bill_line(bills[-1])}", flush=True)
    for run in RUNS:
        if options.only and not any(part in run.name for part in options.only):
            continue
        found = bill(run.recipe(), Topology.read(run.topology), price=None, cache=cache_dir())
        rows.append(row(run, found))
        print(line(rows[-1]), flush=True)
    content: dict[str, Any] = {"machine": machine(PACKAGES), "bills": bills, "runs": rows}
    errors = [abs(each["error"]) for each in rows if "error" in each]
    if errors:
        mean, worst = statistics.mean(errors), max(errors)
        print(f"{len(errors)} runs: mean absolute error {mean:.1%}, worst {worst:.1%}")
        content["summary"] = {"runs": len(errors), "mean_error": mean, "worst_error": worst}
    options.out.write_text(json.dumps(content, indent=1) + "\n")


def bill_line(each: dict[str, Any]) -> str:
    """For the terminal."""
    if not each["fits"]:
        return f"{each['needed_gib']:.2f} GiB a chip, too many"
    return (
        f"${each['usd_per_million_tokens']:.3f} a million tokens beside"
        f" ${each['published_usd_per_million_tokens']:.3f}; MFU {each['mfu_causal']:.1%} causal,"
        f" {each['mfu_full']:.1%} full; {each['days']:.1f} days, {each['needed_gib']:.2f} GiB a chip"
    )


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

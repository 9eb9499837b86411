"""A gate against regressions, by figures that are cheap and steady: of compiled programs, not of clocks.

    python benchmarks/gate.py            # compares with gate.json; exit code 1 where something got worse
    python benchmarks/gate.py --write    # stores what is measured now, after a change that is meant
    python benchmarks/gate.py --only mpt # those with this in their names

Train steps of small recipes are compiled for a v5e, and the quickstart's for this machine's CPU: FLOPs, bytes
of HBM and on the wire, the compiler's estimate of cycles, memory, and how much of it is given back in place
(donation). Of attention's kernels: bundles of the final schedule, spills and VMEM. The same sources and
versions give the same figures; what is allowed is for what the compiler leaves to chance.

Exit code 0: nothing got worse; 1: something did; 2: no compiler, or other versions than the stored ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.kernels.attention import HERE as ATTENTION  # noqa: E402 after the path, for a call as a script
from benchmarks.kernels.bundles import Compiler  # noqa: E402
from benchmarks.machine import machine  # noqa: E402
from mosaicjax import recipe_file  # noqa: E402
from mosaicjax.data.mixture import TokenStore  # noqa: E402
from mosaicjax.errors import InputError  # noqa: E402
from mosaicjax.kernels.grouped import Grouped  # noqa: E402
from mosaicjax.layers.moe import Moe  # noqa: E402
from mosaicjax.losses import CrossEntropy  # noqa: E402
from mosaicjax.mesh import Mesh  # noqa: E402
from mosaicjax.models import llama, mixtral, mpt  # noqa: E402
from mosaicjax.models.decoder import Remat  # noqa: E402
from mosaicjax.plan.bill import bill  # noqa: E402
from mosaicjax.plan.topology import Topology, compiler_there  # noqa: E402
from mosaicjax.recipe import Recipe  # noqa: E402

STORED = Path(__file__).with_suffix(".json")
ON_CPU = "step: quickstart on a CPU"
PACKAGES = ("jax", "jaxlib", "libtpu")
MORE_IS_BETTER = {"aliased_bytes"}
ALLOWED = {"flops": 1e-3, "cycles": 0.01, "step_seconds": 0.01}
"""How much worse a figure may be, as a share; others half a percent."""
REST = 0.005

BASE = Recipe(
    model=mpt.Config(layers=4, embed=1_024, heads=8, mlp=4_096, vocab=8_192),
    data=TokenStore("none"),
    seq=1_024,
    batch=32,
    steps=100,
)
RECIPES = {
    "mpt": (BASE, "v5e:2x2"),
    "llama, full remat, packed, by chunks, explicit gathers": (
        replace(
            BASE,
            model=llama.Config(
                layers=4,
                embed=1_024,
                heads=8,
                kv_heads=2,
                mlp=3_072,
                vocab=8_192,
                remat=Remat.FULL,
            ),
            data=TokenStore("none", isolate=True),
            microbatch=16,
            loss=CrossEntropy(chunk=256),
            mesh=Mesh(fsdp=(2, 2), gather="explicit"),
        ),
        "v5e:2x2",
    ),
    "mixtral by megablox, products kept": (
        replace(
            BASE,
            model=mixtral.Config(
                layers=2,
                embed=1_024,
                heads=8,
                kv_heads=2,
                mlp=2_048,
                vocab=8_192,
                experts=4,
                ffn=Moe(grouped=Grouped.MEGABLOX),
                remat=Remat.DOTS,
            ),
        ),
        "v5e:2x2",
    ),
}


def cases(compiler: Compiler) -> dict[str, Callable[[], dict[str, float]]]:
    """What measures each case, by name."""
    found: dict[str, Callable[[], dict[str, float]]] = {
        f"step: {name}": partial(of_step, recipe, topology) for name, (recipe, topology) in RECIPES.items()
    }
    quickstart = recipe_file.load(str(ROOT / "recipes" / "quickstart.py"), []).recipe
    found[ON_CPU] = partial(of_step, quickstart, "cpu:1")
    return found | {"attention's kernels on v5e": partial(of_kernels, compiler, "v5e")}


def of_step(recipe: Recipe, topology: str) -> dict[str, float]:
    """A train step's. Units: of one device and one step."""
    found = bill(recipe, Topology.read(topology), price=None, cache=None)
    memory = found.compiled.memory
    assert memory is not None, "a small step fits"
    figures: dict[str, float] = {
        "argument_bytes": memory.arguments,
        "temporary_bytes": memory.temporaries,
        "peak_bytes": memory.peak - memory.code,
        "aliased_bytes": memory.aliased,
    }
    if found.work is None:
        return figures
    return figures | {
        "flops": found.work.compiled,
        "flops_over_structure": found.work.compiled / found.work.expected,
        "hbm_bytes": found.hbm,
        "wire_bytes": found.wire,
        "cycles": sum((op.cycles or 0) * op.times for op in found.ops),
        "step_seconds": found.seconds,
    }


def of_kernels(compiler: Compiler, chip: str) -> dict[str, float]:
    """Attention's, with the table's blocks. Units: bundles of their text, spill slots, bytes of VMEM."""
    case = {"queries": 4_096, "keys": 4_096, "head_dim": 128}
    found = compiler(chip, f"{ATTENTION}:ours_whole", case=case, kind=chip)
    if found.error:
        raise InputError(f"attention's kernels do not compile for {chip}", got=found.error)
    figures: dict[str, float] = {"temporary_bytes": found.temp}
    for which in ("forward", "backward"):
        mine = found.named(which)
        figures |= {
            f"{which}_kernels": len(mine),
            f"{which}_bundles": sum(kernel.tree.total() for kernel in mine),
            f"{which}_spills": sum(kernel.spills for kernel in mine),
            f"{which}_vmem_bytes": max((kernel.vmem for kernel in mine), default=0),
        }
    return figures


def worse(name: str, before: dict[str, float], now: dict[str, float]) -> Iterator[str]:
    """A line for each figure of a case that got worse, or is there no more."""
    for figure, was in before.items():
        if figure not in now:
            yield f"{name}: {figure} is measured no more"
            continue
        sign = -1 if figure in MORE_IS_BETTER else 1
        change = sign * (now[figure] - was)
        if change > ALLOWED.get(figure, REST) * abs(was):
            share = f" ({(now[figure] - was) / was:+.2%})" if was else ""
            yield f"{name}: {figure} was {was:,.6g}, is {now[figure]:,.6g}{share}"


def better(name: str, before: dict[str, float], now: dict[str, float]) -> Iterator[str]:
    """The same of what improved by more than is allowed the other way: worth storing."""
    turned = [{figure: -value for figure, value in each.items()} for each in (before, now)]
    for line in worse(name, *turned):
        yield line.replace("was -", "was ").replace("is -", "is ")


def compare(stored: dict[str, Any], now: dict[str, dict[str, float]]) -> int:
    """Print what changed; the exit code."""
    bad: list[str] = []
    for name, figures in now.items():
        if name not in stored["cases"]:
            print(f"new       {name}; --write stores it")
            continue
        bad += worse(name, stored["cases"][name], figures)
        for line in better(name, stored["cases"][name], figures):
            print(f"better    {line}; --write stores it")
    for line in bad:
        print(f"WORSE     {line}")
    count = sum(len(figures) for figures in now.values())
    print(f"{count} figures of {len(now)} cases; {len(bad)} got worse")
    return 1 if bad else 0


def processor_flags() -> str:
    """A digest of what decides the code that XLA makes: one processor's name is sold with several sets."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]


def check(options: argparse.Namespace) -> int:
    """Measure, and compare or store.

    Raises:
        InputError: nothing stored, or by other versions.
    """
    if not compiler_there():
        raise InputError("no TPU compiler is installed", fix="make peers")
    here = machine(PACKAGES) | {"flags": processor_flags()}
    stored: dict[str, Any] = {}
    if not options.write:
        if not options.stored.exists():
            raise InputError(f"no {options.stored.name}", fix="python benchmarks/gate.py --write")
        stored = json.loads(options.stored.read_text())
        was = stored["machine"]["packages"]
        if was != here["packages"]:
            raise InputError("the stored figures are of other versions", expected=was, got=here["packages"])
    now = {}
    with Compiler() as compiler:
        wanted = {name: measure for name, measure in cases(compiler).items() if options.only in name}
        other = any(stored["machine"][name] != here[name] for name in ("cpu", "flags")) if stored else False
        if other and ON_CPU in wanted:
            del wanted[ON_CPU]
            print(f"left out  {ON_CPU}: what XLA makes of it depends on the processor, stored of another")
        gone = [
            name for name in stored.get("cases", {}) if options.only in name and name not in cases(compiler)
        ]
        for name, measure in wanted.items():
            now[name] = measure()
            print(f"measured  {name}", flush=True)
    if gone:
        raise InputError(f"stored cases that are measured no more: {', '.join(gone)}", fix="--write")
    if options.write:
        options.stored.write_text(json.dumps({"machine": here, "cases": now}, indent=1) + "\n")
        print(f"{sum(map(len, now.values()))} figures of {len(now)} cases in {options.stored.name}")
        return 0
    return compare(stored, now)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store what is measured")
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--stored", type=Path, default=STORED)
    options = parser.parse_args(argv)
    try:
        return check(options)
    except InputError as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Pallas kernels on a real TPU: results and gradients against the reference, times beside predictions.

    python benchmarks/kernels/hardware_check.py               # on a TPU; writes hardware_check.json
    python benchmarks/kernels/hardware_check.py --only "attention bfloat16 C=128" --only "time decode"
    JAX_PLATFORMS=cpu python benchmarks/kernels/hardware_check.py --interpret    # anywhere; times nothing

Predicted are, for attention, the microseconds of `attention_tiles.json` (the compiler's schedule, forward and
backward kernel alone); for decoding, the bytes of the cache that is held over HBM bandwidth. Two programs of
XLA's own stand beside them, a matmul against the published peak and an addition against HBM bandwidth: where
these are slow too, it is the clock and not a kernel. A time is that of a call in a loop of calls on the
device, each on what the one before gave: the difference of a long and a short loop over that of their calls.

Exit code 0: all passed; 1: a case failed; 2: there is no TPU, or an option is unusable.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402 after the path, for a call as a script
from jax._src.pallas.mosaic.error_handling import MosaicError  # noqa: E402 public nowhere
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

from benchmarks.kernels.bundles import one_line  # noqa: E402
from benchmarks.kernels.hardware_cases import (  # noqa: E402
    TOLERANCES,
    Case,
    Product,
    Way,
    cases,
    compare,
    drawn,
    kernel,
    reference,
)
from benchmarks.kernels.hardware_times import Loop, loops, measure  # noqa: E402
from benchmarks.machine import commit  # noqa: E402
from mosaicjax.errors import InputError  # noqa: E402
from mosaicjax.hardware import find_chip  # noqa: E402

PACKAGES = ("jax", "jaxlib", "libtpu", "numpy")
REFUSALS = (jax.errors.JaxRuntimeError, MosaicError, pltpu.LoweringException, NotImplementedError, ValueError)
"""What a compiler that refuses raises; an `InputError` is a `ValueError`."""


class Report:
    """The JSON, written anew after each case; `finished` is false until the last."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.rows: dict[str, list[dict[str, Any]]] = {"cases": [], "timings": []}
        self.save(finished=False)

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """A row of `cases` or `timings`."""
        self.rows[kind].append(row)
        self.save(finished=False)

    @property
    def summary(self) -> dict[str, int]:
        """How many ran and failed."""
        rows = [row for kind in self.rows.values() for row in kind]
        counts = {kind: len(some) for kind, some in self.rows.items()}
        return counts | {"failed": sum(not row["passed"] for row in rows)}

    def save(self, finished: bool) -> None:
        """All at once: a reader finds the file before or after, never a part."""
        content = {"finished": finished, **self.header, "summary": self.summary, **self.rows}
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(part, self.path)


def case_row(case: Case, seed: int, way: Way) -> dict[str, Any]:
    """Run a case, and what came of it or why nothing did."""
    tolerance = TOLERANCES[case.dtype]
    row = {"name": case.name, "features": asdict(case), "tolerance": tolerance}
    if isinstance(case, Product):
        row["features"]["precision"] = case.precision
    try:
        x = drawn(case, seed)
        found = compare(kernel(case, way, x), reference(case, x))
    except REFUSALS as error:
        return row | {"passed": False, "error": one_line(error)}
    worst = max(found, key=lambda each: each.error)
    return row | {
        "passed": worst.error <= tolerance,
        "worst": worst.dump(),
        "errors": [each.dump() for each in found],
    }


def loop_row(loop: Loop, seed: int, rounds: int) -> dict[str, Any]:
    """Time a loop, and what came of it or why nothing did."""
    try:
        return measure(loop, seed, rounds)
    except REFUSALS as error:
        return {
            "name": loop.name,
            "passed": False,
            "predicted_us": loop.predicted_us,
            "error": one_line(error),
        }


def line(row: dict[str, Any]) -> str:
    """For the terminal."""
    head = f"{'ok  ' if row['passed'] else 'FAIL'} {row['name']}"
    if "error" in row:
        return f"{head}: {row['error']}"
    if "worst" in row:
        worst = row["worst"]
        errors = [worst[name] for name in ("scaled", "local")]
        text = "not finite" if None in errors else f"{max(errors):.1e}"
        return f"{head}: {worst['name']} {text} of {row['tolerance']:.0e}"
    us, ratio = row["measured_us"], row["ratio"]
    beside = "" if ratio is None else f", predicted {row['predicted_us']:.1f}, ratio {ratio:.2f}"
    finite = "" if row["passed"] else ", not finite"
    return f"{head}: {us['median']:.1f} us ({us['least']:.1f}-{us['most']:.1f}){beside}{finite}"


def first_device(interpreted: bool) -> jax.Device:
    """The device that all runs on.

    Raises:
        InputError: it is no TPU, and kernels are to be compiled.
    """
    try:
        device = jax.devices()[0]
        got = device.device_kind
    except RuntimeError as error:
        device, got = None, one_line(error)
    if device is None or (device.platform != "tpu" and not interpreted):
        wanted = os.environ.get("JAX_PLATFORMS")
        raise InputError(
            "this check runs compiled kernels",
            expected="a TPU as jax's first device",
            got=got + (f" (JAX_PLATFORMS is {wanted})" if wanted else ""),
            fix="run it on a TPU with JAX_PLATFORMS unset, or with --interpret, which times nothing",
        )
    return device


def header(device: jax.Device, options: argparse.Namespace) -> dict[str, Any]:
    """What ran where; neither the machine's name nor a path of it."""
    chip = find_chip(device.device_kind)
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "interpreted": options.interpret,
        "kernel": "interpreted" if options.interpret else "compiled",
        "chip": None if chip is None else chip.name,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "runtime": " ".join(device.client.platform_version.split()),
        "packages": packages,
        "python": ".".join(map(str, sys.version_info[:3])),
        "commit": commit() if shutil.which("git") else "",
        "date": time.strftime("%Y-%m-%d"),
        "seed": options.seed,
        "only": options.only,
        "tolerances": TOLERANCES,
    }


def run(report: Report, checks: list[Case], timings: list[Loop], options: argparse.Namespace) -> int:
    """One after the other, and the exit code."""
    for case in checks:
        report.add("cases", case_row(case, options.seed, Way(options.interpret)))
        print(line(report.rows["cases"][-1]), flush=True)
    for loop in timings:
        report.add("timings", loop_row(loop, options.seed, options.rounds))
        print(line(report.rows["timings"][-1]), flush=True)
    report.save(finished=True)
    return 1 if report.summary["failed"] else 0


def check(options: argparse.Namespace) -> int:
    """All that was asked for; the exit code.

    Raises:
        InputError: no TPU, nothing of that name, or no folder to write to.
    """
    device = first_device(options.interpret)
    kind = device.device_kind

    def wanted(each: Any) -> bool:
        return not options.only or any(part in each.name for part in options.only)

    checks = [case.small() if options.interpret else case for case in cases() if wanted(case)]
    timings = [] if options.interpret else [loop for loop in loops(find_chip(kind), kind) if wanted(loop)]
    if not checks and not timings:
        raise InputError("nothing to run", expected="a part of a case's name", got=f"--only {options.only}")
    if not options.out.parent.is_dir():
        raise InputError("no such folder", expected="an existing one for --out", got=options.out.parent)
    report = Report(options.out, header(device, options))
    code = run(report, checks, timings, options)
    counts = report.summary
    print(
        f"{counts['cases']} cases, {counts['timings']} timings, {counts['failed']} failed;"
        f" kernels {report.header['kernel']} on {kind}; {options.out.name} has it all"
    )
    return code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="step by step on any device, small shapes")
    parser.add_argument("--only", action="append", help="what has this in its name; may be given again")
    parser.add_argument("--out", type=Path, default=Path("hardware_check.json"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7, help="of each timing")
    options = parser.parse_args(argv)
    try:
        return check(options)
    except InputError as error:
        print(f"hardware_check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

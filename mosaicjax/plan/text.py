"""A bill for people, in one screen, and for programs, as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mosaicjax.plan.bill import Bill
from mosaicjax.plan.step_time import KINDS, StepTime, Timed, model_part
from mosaicjax.report.live import format_count, format_duration, format_usd

GIB = 2**30
COSTLIEST = 10
NAMES = {
    "matrix": "matrix units",
    "vector": "vector and HBM",
    "kernels": "kernels",
    "collectives": "exposed collectives",
}


def lines(bill: Bill, name: str) -> Iterator[str]:
    """The page: what is planned, memory, the step's time, speed, the bill, costliest operations, lints."""
    compiled, recipe = bill.compiled, bill.recipe
    package = "libtpu" if bill.topology.timed else "jaxlib"
    how = f"compiled by {package} {compiled.versions[package]} in {compiled.seconds:.0f} s"
    yield f"{name} on {bill.topology.title}: the train step, {how if compiled.seconds else 'from the cache'}"
    yield f"program   {compiled.digest[:16]}, {recipe.batch:,} rows x {recipe.seq:,} tokens a step"
    yield from _memory(bill)
    if not bill.topology.timed:
        yield "step      not timed: nobody states how fast a CPU is; `mosaicjax train` measures it"
    if bill.fast is None or bill.slow is None or bill.work is None or bill.price is None:
        return
    work = bill.work
    least, most = (_seconds(step.seconds) for step in (bill.fast, bill.slow))
    yield f"step      {_seconds(bill.seconds)}, {least} to {most} by optimistic and pessimistic links"
    for kind in KINDS:
        fast, slow = getattr(bill.fast, kind), getattr(bill.slow, kind)
        spread = "" if fast == slow else f", {_seconds(fast)} to {_seconds(slow)}"
        mean = (fast + slow) / 2
        yield f"          {NAMES[kind]:<20} {_seconds(mean):>9} {mean / bill.seconds:>6.1%}{spread}"
    yield (
        f"FLOPs     {work.compiled:.4g} a chip and step as compiled, {work.expected:.4g} by structure: model"
        f" {work.model:.4g}, again {work.recomputed:.4g}, masked in blocks {work.masked:.3g}"
        + (f", a reference's forward pass {work.compared:.4g}" if work.compared else "")
        + (f"; {work.narrow:.4g} as compiled are of 8-bit numbers" if work.narrow else "")
    )
    yield (
        f"MFU       {bill.utilization(work.model):.1%} causal, {bill.utilization(work.model_full):.1%} full;"
        f" HFU {bill.utilization(work.compiled):.1%}; {bill.hbm / 1e9:,.0f} GB of HBM and"
        f" {bill.wire / 1e9:,.1f} GB on the wire a chip and step"
    )
    yield (
        f"speed     {format_count(bill.tokens_per_second)} tokens/s,"
        f" {format_count(bill.tokens_per_second / bill.topology.chips)} a chip"
    )
    tokens = bill.steps * bill.tokens
    yield (
        f"bill      ${bill.usd_per_million_tokens:.4f} a million tokens; {format_count(tokens)} tokens:"
        f" {format_usd(bill.run_usd)} in {format_duration(bill.run_seconds)}"
    )
    price = bill.price
    yield f"          at {format_usd(price.usd_per_chip_hour)} a chip hour ({price.source}, {price.date})"
    yield "costliest operations, by part of the model:"
    for seconds, kind, part, runs in costliest(bill.fast):
        share = f"{_seconds(seconds):>9} {seconds / bill.seconds:>6.1%}"
        yield f"          {share}  {NAMES[kind]}: {part}, {runs:,} runs"
    for lint in bill.lints:
        yield f"lint      {lint}"


def costliest(step: StepTime) -> list[tuple[float, str, str, int]]:
    """Seconds, kind, part of the model and runs of what takes longest, operations of one part together."""
    parts: dict[tuple[str, str], list[Timed]] = defaultdict(list)
    for each in step.timed:
        parts[each.kind, model_part(each.op)].append(each)
    found = [
        (sum(each.seconds for each in some), kind, part, sum(each.op.times for each in some))
        for (kind, part), some in parts.items()
    ]
    return sorted(found, reverse=True)[:COSTLIEST]


def _memory(bill: Bill) -> Iterator[str]:
    compiled = bill.compiled
    if compiled.memory is None:
        over = compiled.needed - compiled.available
        yield (
            f"memory    does not fit: {compiled.needed / GIB:.2f} GiB a chip where there are"
            f" {compiled.available / GIB:.2f}, {over / GIB:.2f} too many; largest at its peak:"
        )
        for size, shapes in compiled.buffers:
            yield f"          {size / GIB:>9.3f} GiB  {shapes if len(shapes) < 80 else shapes[:77] + '...'}"
        yield "          a fix is looked for by --fit"
        return
    memory = compiled.memory
    there = bill.topology.chip.hbm_bytes
    of = (
        f"fits: {memory.peak / GIB:.2f} of {there.value / GIB:.0f} GiB"
        if there
        else f"{memory.peak / GIB:.2f} GiB"
    )
    yield (
        f"memory    {of} a chip (arguments"
        f" {memory.arguments / GIB:.2f}, temporaries {memory.temporaries / GIB:.2f},"
        f" code {memory.code / GIB:.2f})"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def to_json(bill: Bill, name: str) -> dict[str, Any]:
    """All of it as JSON holds it.

    Units: bytes, seconds, FLOPs and dollars; where nothing else is said, of one chip and one step.
    """
    compiled, topology = bill.compiled, bill.topology
    found: dict[str, Any] = {
        "recipe": name,
        "topology": {"name": topology.name, "slices": topology.slices, "chips": topology.chips},
        "program": compiled.digest,
        "versions": compiled.versions,
        "compile_seconds": compiled.seconds or None,
        "price": None if bill.price is None else asdict(bill.price),
        "tokens_per_step": bill.tokens,
        "fits": compiled.fits,
        "memory": {
            "needed": compiled.needed,
            "available": compiled.available or None,
            "largest": [{"bytes": size, "shapes": shapes} for size, shapes in compiled.buffers],
        },
    }
    if compiled.memory is not None:
        found["memory"] |= asdict(compiled.memory)
    if bill.fast is None or bill.slow is None or bill.work is None:
        return found
    work = bill.work
    found["step_seconds"] = {"expected": bill.seconds} | {
        which: {"total": step.seconds, **{kind: getattr(step, kind) for kind in KINDS}, "wire": step.wire}
        for which, step in (("optimistic", bill.fast), ("pessimistic", bill.slow))
    }
    found["flops"] = {**asdict(work), "expected": work.expected}
    found["hbm_bytes"], found["wire_bytes"] = bill.hbm, bill.wire
    found["utilization"] = {
        "mfu_causal": bill.utilization(work.model),
        "mfu_full": bill.utilization(work.model_full),
        "hfu": bill.utilization(work.compiled),
    }
    found["tokens_per_second"] = bill.tokens_per_second
    found["usd_per_million_tokens"] = bill.usd_per_million_tokens
    found["run"] = {
        "steps": bill.steps,
        "tokens": bill.steps * bill.tokens,
        "usd": bill.run_usd,
        "days": bill.run_seconds / 86_400,
    }
    found["costliest"] = [
        {"seconds": seconds, "kind": kind, "part": part, "runs": runs}
        for seconds, kind, part, runs in costliest(bill.fast)
    ]
    found["lints"] = list(bill.lints)
    return found

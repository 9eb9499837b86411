"""How long a compiled step takes on chips that are not there: matrix units, HBM, kernels and links.

Each operation takes the compiler's own estimate of its cycles, or as long as its bytes of HBM do, whichever
is more. Where the compiler says that it has no cost model, which is all but products of matrices, its guess
counts for what touches no HBM alone: for an addition of two arrays of 1 GiB on a v5e it is 1.7 times what
their bytes take at the published bandwidth, and more on other chips. Kernels take what the compiler's
schedule gives their shapes (`attention_tiles`), or their FLOPs at the peak where nobody looked. Copies and
collectives that go on beside other work cost what they are longer than it, loop body by loop body; all else
goes one after the other.

What collectives take is known within a factor of two: optimistic is every link along the dims of the torus
that a group spans, in both directions, pessimistic half of that.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mosaicjax.hardware import CORES
from mosaicjax.plan.count import NARROW, Collective, Op
from mosaicjax.plan.topology import Topology

_NOISE = re.compile(
    r"jit\(|jvp\(|transpose\(|(while|body|closed_call|checkpoint|rematted_computation|gradients|shard_map|cond|pallas_call)$"
)
"""Words in a name that say how jax came to an operation, not where in the model it stands."""
KINDS = ("matrix", "vector", "kernels", "collectives")
RING = 4
"""Sides of so many chips and more (16 on v5e and v6e) close to a ring."""


@dataclass(frozen=True)
class Speeds:
    """What one device does in a second; `narrow` are FLOPs of 8-bit products where they have a peak.

    Units: cycles, FLOPs, bytes; `link` of one link in one direction.
    """

    cycles: float
    flops: float
    hbm: float
    link: float
    dcn: float | None
    ring: int
    narrow: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(topology: Topology, dtype: str) -> Speeds:
        """Of a topology's chips, for products in this dtype."""
        chip = topology.chip
        peak, link = chip.peak(dtype) or chip.peak("bfloat16"), chip.link_one_way
        assert peak and link and chip.hbm_bandwidth, f"the table has all of {chip.name}"
        return Speeds(
            cycles=CORES[chip.name].clock,
            flops=peak,
            hbm=chip.hbm_bandwidth.value,
            link=link,
            dcn=None if chip.dcn_bandwidth is None else chip.dcn_bandwidth.value,
            ring=16 if len(topology.grid) == 2 else RING,
            narrow={kind: each for kind in NARROW if (each := chip.peak(kind))},
        )

    def products(self, op: Op) -> float:
        """What an operation's products take at the peaks of their dtypes. Units: seconds."""
        wide = op.flops - sum(op.narrow.values())
        narrow = sum(flops / self.narrow.get(kind, self.flops) for kind, flops in op.narrow.items())
        return wide / self.flops + narrow


@dataclass(frozen=True)
class Timed:
    """An operation, what it counts to, and what all its runs take. Units: seconds."""

    op: Op
    kind: str
    seconds: float


@dataclass(frozen=True)
class StepTime:
    """A step by parts that add up to it. `collectives` are those that nothing hides.

    Units: seconds; `wire` what all collectives would take by themselves.
    """

    matrix: float
    vector: float
    kernels: float
    collectives: float
    wire: float
    timed: tuple[Timed, ...]

    @property
    def seconds(self) -> float:
        """The whole."""
        return self.matrix + self.vector + self.kernels + self.collectives


KernelRate = Callable[[Op], float | None]
"""FLOPs a second of a kernel, None where nobody looked."""


def step_time(
    ops: Sequence[Op], speeds: Speeds, places: np.ndarray, rate: KernelRate, *, pessimistic: bool
) -> StepTime:
    """The time of a step.

    Shapes: `places` int [devices, 1 + dims]: slice and coordinates, in the order of the program's devices.
    """
    sums: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    wire_total, timed = 0.0, []
    bodies: dict[tuple[str, int], list[Op]] = defaultdict(list)
    for op in ops:
        bodies[op.body, op.times].append(op)
    for (_, times), mine in bodies.items():
        busy = beside = moved = 0.0
        for op in mine:
            wires = [(one, wire_seconds(one, speeds, places, pessimistic)) for one in op.collectives]
            wire_total += times * sum(seconds for _, seconds in wires)
            beside += sum(seconds for one, seconds in wires if one.overlapped)
            waited = sum(seconds for one, seconds in wires if not one.overlapped)
            moved += op.hbm / speeds.hbm
            kind, seconds = ("collectives", waited) if waited else _alone(op, speeds, rate)
            if seconds:
                timed.append(Timed(op, kind, times * seconds))
                sums[kind] += times * seconds
            busy += seconds
        sums["vector"] += times * max(0.0, moved - busy)
        sums["collectives"] += times * max(0.0, beside - max(busy, moved))
    timed.sort(key=lambda each: -each.seconds)
    return StepTime(**sums, wire=wire_total, timed=tuple(timed))


def _alone(op: Op, speeds: Speeds, rate: KernelRate) -> tuple[str, float]:
    """What an operation counts to, and what one run takes that waits for nothing."""
    if op.copy:
        return "vector", 0.0
    moving = op.hbm / speeds.hbm
    if op.kernel:
        return "kernels", max(op.flops / (rate(op) or speeds.flops), moving)
    if op.flops:
        return "matrix", max((op.cycles or 0) / speeds.cycles, speeds.products(op), moving)
    guessed = moving > 0 and not op.modelled
    return "vector", moving if guessed else max((op.cycles or 0) / speeds.cycles, moving)


def wire_seconds(one: Collective, speeds: Speeds, places: np.ndarray, pessimistic: bool) -> float:
    """What a collective takes by itself."""
    if one.devices < 2:
        return 0.0
    group = places[list(one.group)]
    if len(set(group[:, 0])) > 1:
        assert speeds.dcn is not None, "slices were refused where the network's speed is unknown"
        return one.sent / speeds.dcn * (2 if pessimistic else 1)
    links = 0
    for dim in range(1, places.shape[1]):
        side = len(set(group[:, dim]))
        whole = int(places[:, dim].max()) + 1
        if side > 1:
            links += 2 if side == whole and side >= speeds.ring else 1
    return one.sent / (max(links, 1) * speeds.link) * (2 if pessimistic else 1)


def device_places(devices: Sequence[Any]) -> np.ndarray:
    """Slice and coordinates of each device, [devices, 4]."""
    rows = [(getattr(each, "slice_index", None) or 0, *each.coords) for each in devices]
    return np.asarray(rows, np.int64)


def model_part(op: Op) -> str:
    """Where in the model an operation belongs, from the name that jax gave it."""
    words = [word for word in op.place.split("/") if word and not _NOISE.match(word)]
    again, backward = "rematted_computation" in op.place, "transpose(" in op.place
    turn = "forward again" if again else "backward" if backward else "forward"
    return f"{' '.join(words) or op.name} ({turn})" if "gradients" in op.place else " ".join(words) or op.name

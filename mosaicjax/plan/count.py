"""What one run of a compiled program does: matrix FLOPs, bytes of HBM and on the wire, by operation.

Loops count by their turns, fusions by the matrix products within, kernels by their own cost estimates. All
is per device, as a compiled program is.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mosaicjax.plan.hlo import Computation, Instruction, Module, Shape, hbm_bytes, leaves

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"),
    *("partition-id", "replica-id", "after-all", "optimization-barrier", "iota", "add-dependency"),
    *("copy-done", "slice-done", "async-done", "async-update", "domain", "rng-get-and-update-state"),
}
"""Opcodes that move nothing of their own; what loops and calls run is counted for itself."""
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
KERNEL = "tpu_custom_call"
STARTS = "AsyncCollectiveStart"
SCATTERS = "AllReduceScatter"
"""In the emitter's name: an all-reduce and the slice of it that a device keeps, as one reduce-scatter."""
FREE_CALLS = {
    *(
        "AllocateBuffer",
        "ConcatBitcast",
        "AssumeGatherIndicesInBound",
        "Sharding",
        "annotate_device_placement",
    ),
    *(STARTS, "AsyncCollectiveDone"),
}
NARROW = {"int8": ("s8", "u8"), "float8": ("f8e4m3fn", "f8e5m2")}
"""Peaks of 8-bit numbers by name, and the dtypes whose products they are for."""
SAME = ("bitcast", "reshape", "convert", "copy", "transpose")
"""Within a fusion: what hands a buffer on, whole and in place."""


@dataclass(frozen=True)
class Collective:
    """Devices that exchange something; `group` are those of the first.

    `overlapped`: work goes on meanwhile. `emitter` is the compiler's name for how it is done.

    Units: `sent` bytes that each device sends in one run, whatever the route; `whole` bytes of the array that
    is not sharded.
    """

    kind: str
    group: tuple[int, ...]
    sent: float
    whole: float
    overlapped: bool
    emitter: str

    @property
    def devices(self) -> int:
        """How many exchange."""
        return len(self.group)


@dataclass(frozen=True)
class Op:
    """One operation of the program and what each of its runs takes; `times` is how often it runs.

    `flops` are those of matrix products (of a kernel: all that it says of itself), `narrow` those of them
    whose operands are both of 8 bits, by the keys of `NARROW`. `cycles` is the
    compiler's estimate, None where there is none, and `modelled` whether a cost model of its own is behind
    it. `copy`: the transfer goes on beside other work. `body` is the computation it stands in.

    Units: FLOPs, bytes and cycles of one run on one device.
    """

    name: str
    opcode: str
    place: str
    body: str
    times: int
    flops: float
    hbm: float
    cycles: int | None
    modelled: bool
    kernel: bool
    copy: bool
    estimated: bool
    collectives: tuple[Collective, ...]
    narrow: Mapping[str, float] = field(default_factory=dict)


def operations(module: Module) -> list[Op]:
    """All that runs, in the order of the schedule.

    Raises:
        InputError: a loop whose turns nobody knows.
    """
    return list(_operations(module, module.computations[module.entry], 1))


def _operations(module: Module, body: Computation, times: int) -> Iterator[Op]:
    for each in body.instructions.values():
        if each.opcode == "while":
            turns = module.turns(each, body)
            yield from _operations(module, module.computations[each.names("body")], times * turns)
        elif each.opcode == "call":
            yield from _operations(module, module.computations[each.called[0]], times)
        elif each.opcode == "conditional":
            branches = [list(_operations(module, module.computations[name], times)) for name in each.called]
            yield from max(branches, key=lambda ops: (sum(op.flops for op in ops), sum(op.hbm for op in ops)))
        else:
            yield _operation(module, body, each, times, tuple(_collectives(module, body, each)))


def _operation(
    module: Module, body: Computation, each: Instruction, times: int, collectives: tuple[Collective, ...]
) -> Op:
    kernel = each.opcode == "custom-call" and each.target == KERNEL
    estimate = each.estimate if kernel else None
    products = {} if kernel else matrix_flops(module, body, each)
    flops = float((estimate or {}).get("flops", 0) if kernel else sum(products.values()))
    return Op(
        name=each.name,
        opcode=each.opcode,
        place=each.place,
        body=body.name,
        times=times,
        flops=flops,
        hbm=_whole(body, each) if kernel else _traffic(module, body, each),
        cycles=each.cycles,
        modelled=each.modelled,
        kernel=kernel,
        copy=each.opcode in ("copy-start", "slice-start"),
        estimated=not kernel or estimate is not None,
        collectives=collectives,
        narrow={kind: flops for kind, flops in products.items() if kind and flops},
    )


def matrix_flops(module: Module, body: Computation, each: Instruction) -> Mapping[str, float]:
    """FLOPs of the matrix products in an instruction, those within a fusion among them.

    By the keys of `NARROW`, and under "" of operands that are wider.
    """
    found: dict[str, float] = defaultdict(float)
    if each.opcode == "dot":
        left = next(leaves(body.instructions[each.operands[0]].shape))
        contracted = math.prod(left.dims[dim] for dim in each.numbers("lhs_contracting_dims"))
        found[_narrow(body, each)] += 2.0 * next(leaves(each.shape)).entries * contracted
    elif each.opcode == "convolution":
        found[_narrow(body, each)] += _convolution_flops(body, each)
    elif each.opcode in ("fusion", "async-start"):
        inner = module.computations[each.called[0]]
        for one in inner.instructions.values():
            for kind, flops in matrix_flops(module, inner, one).items():
                found[kind] += flops
    return found


def _narrow(body: Computation, product: Instruction) -> str:
    """The key of `NARROW` that both operands of a product are of, or ""."""
    dtypes = {next(leaves(one.shape)).dtype for one in body.operands(product)[:2]}
    return next((kind for kind, of_kind in NARROW.items() if dtypes <= set(of_kind)), "")


def _convolution_flops(body: Computation, each: Instruction) -> float:
    """Two for each entry of the result, input feature, and tap of the window that lies on an entry.

    Products of matrices stand as convolutions on TPUs: with windows of one tap, or for dims of a batch with a
    window as wide as the dim, of which one tap in each place lies on an entry.
    """
    left, right = (next(leaves(one.shape)) for one in body.operands(each)[:2])
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest)
    assert found, "a convolution says what its dims are"
    of_left, of_right, of_out = found.groups()
    out = next(leaves(each.shape))
    window = _window(each.rest)
    total = 2.0 * right.dims[of_right.index("i")]
    for label in ("b", "f"):
        total *= out.dims[of_out.index(label)]
    for n in range(len(of_out) - 2):
        size, given = out.dims[of_out.index(str(n))], left.dims[of_left.index(str(n))]
        total *= _taps(size, given, {name: values[n] for name, values in window.items()})
    return total


def _window(rest: str) -> dict[str, list[tuple[int, ...]]]:
    """What a window says, dim by dim: `size=2x1 pad=0_0x1_0` and so on."""
    found = re.search(r"\bwindow=\{([^}]*)\}", rest)
    words = dict(word.split("=") for word in found.group(1).split()) if found else {}
    return {
        name: [tuple(map(int, part.split("_"))) for part in text.split("x")]
        for name, text in words.items()
        if name != "rhs_reversal"
    }


def _taps(out: int, entries: int, window: Mapping[str, tuple[int, ...]]) -> int:
    """How many pairs of a place in the result and a tap of the window lie on an entry, along one dim."""
    (size,), (stride,) = window.get("size", (1,)), window.get("stride", (1,))
    low, _ = window.get("pad", (0, 0))
    (spread,), (wide,) = window.get("lhs_dilate", (1,)), window.get("rhs_dilate", (1,))
    # Place o and tap t lie on an entry where o * stride + t * wide - low is a multiple of the spread in here.
    end = (entries - 1) * spread + 1
    firsts = (tap * wide - low for tap in range(size))
    ats = (at for first in firsts for at in range(first, first + out * stride, stride))
    return sum(1 for at in ats if 0 <= at < end and at % spread == 0)


def _collectives(module: Module, body: Computation, each: Instruction) -> Iterator[Collective]:
    """Those that begin with an instruction: that it is, or has within."""
    kind = each.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        yield _collective(body, each, kind, overlapped=each.opcode.endswith("-start"))
    elif each.opcode in ("fusion", "async-start"):
        inner = module.computations[each.called[0]]
        for one in inner.instructions.values():
            starts = any(user.target == STARTS for user in inner.users[one.name])
            if not starts and any(_passed(inner, source) for source in inner.operands(one)):
                continue
            for found in _collectives(module, inner, one):
                overlapped = found.overlapped or starts or each.opcode == "async-start"
                found = replace(found, overlapped=overlapped, emitter=found.emitter or _emitter(each))
                yield _scattered(found)


def _scattered(found: Collective) -> Collective:
    """The same; a reduction of which each device keeps a part alone under its own name."""
    if found.kind != "all-reduce" or SCATTERS not in found.emitter:
        return found
    return replace(found, kind="reduce-scatter", sent=found.sent / 2)


def _collective(body: Computation, each: Instruction, kind: str, overlapped: bool) -> Collective:
    group = first_group(each.rest)
    pair = re.search(r"source_target_pairs=\{\{(\d+,\d+)\}", each.rest)
    group = _ints(pair.group(1)) if pair else group
    devices = len(group) or 1
    given = sum(_logical(one.shape) for one in body.operands(each))
    whole = given * devices if kind == "all-gather" else given
    share = (devices - 1) / devices
    sent = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share) * whole
    return _scattered(Collective(kind, group, sent, whole, overlapped, _emitter(each)))


def _emitter(each: Instruction) -> str:
    found: str = each.config.get("collective_algorithm_config", {}).get("emitter", "")
    return found


def _logical(shape: Shape) -> float:
    return sum(leaf.entries * leaf.bits / 8 for leaf in leaves(shape))


def first_group(rest: str) -> tuple[int, ...]:
    """The program's devices in the first group, from a collective's attributes; empty: they are not said.

    Three ways to write it are known: a list, a grid of all devices `[groups,size]<=[grid]T(order)`, and axes
    of a mesh.
    """
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest)
    if named:
        axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))]
        return _along(axes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named.group(2)))
    grid = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if grid:
        (_, size), shape = _ints(grid.group(1)), _ints(grid.group(2))
        order = _ints(grid.group(3)) if grid.group(3) else tuple(range(len(shape)))
        numbers = np.arange(math.prod(shape)).reshape(shape).transpose(order)
        return tuple(map(int, numbers.reshape(-1, size)[0]))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return _ints(listed.group(1)) if listed else ()


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _along(axes: Sequence[tuple[str, int]], wanted: Sequence[tuple[str, str, str]]) -> tuple[int, ...]:
    """Devices along axes of a mesh, or parts of axes: of 16, `'a':(2)4` is four places, two apart."""
    numbers = np.arange(math.prod(size for _, size in axes)).reshape([size for _, size in axes])
    at: list[Any] = [0] * len(axes)
    for name, major, part in wanted:
        dim = [axis for axis, _ in axes].index(name)
        size = axes[dim][1]
        inner = size // (int(major) * int(part)) if part else 1
        at[dim] = slice(0, inner * int(part) if part else size, inner)
    return tuple(map(int, numbers[tuple(at)].ravel()))


def _whole(body: Computation, each: Instruction) -> float:
    """HBM bytes where all operands are read and all results written."""
    return hbm_bytes(each.shape) + sum(hbm_bytes(one.shape) for one in body.operands(each))


def _traffic(module: Module, body: Computation, each: Instruction) -> float:
    """HBM bytes that one run reads and writes."""
    opcode = each.opcode
    if opcode in FREE or opcode.endswith("-done") or (opcode == "custom-call" and each.target in FREE_CALLS):
        return 0.0
    operands = body.operands(each)
    if opcode in ("fusion", "async-start"):
        inner = module.computations[each.called[0]]
        reads = sum(_read(module, inner, parameter) for parameter in inner.parameters)
        return reads + _written(module, inner, inner.root)
    if opcode == "copy-start":
        result, source, *_ = each.shape if isinstance(each.shape, tuple) else (each.shape,)
        return hbm_bytes(result) + hbm_bytes(source)
    if opcode == "slice-start":
        assert isinstance(each.shape, tuple)
        part = each.shape[1]
        return hbm_bytes(part) + (_moved(part) if hbm_bytes(operands[0].shape) else 0)
    if opcode.removesuffix("-start") in COLLECTIVES and opcode.endswith("-start"):
        return sum(hbm_bytes(one.shape) for one in operands) + hbm_bytes(each.shape) / 2
    if opcode in ("dynamic-slice", "slice", "gather"):
        return hbm_bytes(each.shape) + (_moved(each.shape) if hbm_bytes(operands[0].shape) else 0)
    if opcode in ("dynamic-update-slice", "scatter"):
        update = operands[-1 if opcode == "scatter" else 1].shape
        return hbm_bytes(update) + (_moved(update) if hbm_bytes(each.shape) else 0)
    return _whole(body, each)


def _moved(shape: Shape) -> int:
    return sum(leaf.bytes for leaf in leaves(shape))


def _read(module: Module, body: Computation, source: Instruction) -> float:
    """HBM bytes that a fusion reads of a buffer: all, or the slices that are all it wants."""
    whole = hbm_bytes(source.shape)
    if not whole:
        return 0.0
    total = 0.0
    for user in body.users[source.name]:
        opcode = user.opcode
        first = user.operands[0] == source.name
        if opcode in ("dynamic-slice", "slice", "gather") and first:
            total += _moved(user.shape)
        elif opcode in ("dynamic-update-slice", "scatter") and first:
            continue
        elif opcode in ("bitcast", "reshape"):
            total += _read(module, body, user)
        elif opcode == "fusion":
            inner = module.computations[user.called[0]]
            total += sum(
                _read(module, inner, inner.parameters[n])
                for n, name in enumerate(user.operands)
                if name == source.name
            )
        elif opcode in COLLECTIVES or (opcode == "custom-call" and user.target in FREE_CALLS):
            # What a collective moves over HBM is counted where it begins.
            total += whole if opcode in COLLECTIVES and not _passed(body, source) else 0
        elif opcode != "tuple":
            total += whole
    return min(total, whole)


def _passed(body: Computation, source: Instruction) -> bool:
    """Whether a parameter is handed on as well, as a collective's that began before and goes on after."""
    return any(user.opcode == "tuple" or user.target in FREE_CALLS for user in body.users[source.name])


def _written(module: Module, body: Computation, root: Instruction) -> float:
    """HBM bytes that a fusion writes for what it returns."""
    if root.opcode == "tuple":
        return sum(_written(module, body, one) for one in body.operands(root))
    if root.opcode == "parameter":
        return 0.0
    if root.opcode == "custom-call" and root.target in FREE_CALLS:
        return hbm_bytes(root.shape) if root.target == STARTS else 0.0
    if root.opcode in COLLECTIVES and any(_passed(body, one) for one in body.operands(root)):
        return 0.0
    if not hbm_bytes(root.shape):
        return 0.0
    source = root
    while source.opcode in SAME:
        source = body.operands(source)[0]
    if source.opcode in ("dynamic-update-slice", "scatter"):
        update = body.operands(source)[-1 if source.opcode == "scatter" else 1]
        share = _moved(update.shape) / max(_moved(source.shape), 1)
        return hbm_bytes(root.shape) * share
    return hbm_bytes(root.shape)


def total(ops: Sequence[Op], figure: str) -> float:
    """The sum of a figure (`flops`, `hbm`) over all runs of all operations."""
    return float(sum(getattr(op, figure) * op.times for op in ops))


def sent(ops: Sequence[Op]) -> float:
    """Bytes that a device sends in all collectives."""
    return float(sum(one.sent * op.times for op in ops for one in op.collectives))

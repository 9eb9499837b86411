"""Which blocks the TPU kernel works in: a table by chip, dtype, head dim, length and window.

`attention_tiles.json` is written by `benchmarks/kernels/tune.py` from the TPU compiler's own schedules, and
says with which versions; nobody edits it.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import jax.numpy as jnp

from mosaicjax.errors import InputError
from mosaicjax.hardware import CHIPS, Chip, find_chip
from mosaicjax.kernels.attention_blocks import Problem, visited_pairs
from mosaicjax.kernels.flash_tpu import LANES, Tiling

TABLE = "attention_tiles.json"
LENGTHS = (512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768)
"""The table's classes of keys: a length belongs to the first that is not shorter, or to the last."""
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
MIB = 2**20
VMEM_LIMITS = {"v4": 16 * MIB, "v5e": 64 * MIB, "v5p": 48 * MIB, "v6e": 64 * MIB}
"""What a kernel may take of VMEM: all 16 MiB of a v4's, and where there is more (v5p 64, v5e and v6e 128 MiB)
a part that leaves XLA room for what it keeps there. Units: bytes."""
SCORES_HELD = 5
"""How many times a turn's scores lie in VMEM at once, at most, in what was compiled for the table."""
FALLBACK = "v5e"
WINDOW, HEADS = 1_024, 8
"""What an entry's times are for: windows of so many places, or of half the length, and so many heads."""

_TPU_KINDS = frozenset(kind for chip in CHIPS for kind in chip.device_kinds if kind.startswith("TPU"))
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A row of the table. `microseconds` and `shares` are what the compiler's schedule gives each pass.

    `shares` are the parts of the matrix units' time that unmasked multiply-adds take, at a row of `length`
    places, causal, 8 heads, batch 1.
    """

    chip: str
    dtype: str
    head_dim: int
    length: int
    windowed: bool
    tilings: tuple[Tiling, Tiling]
    microseconds: tuple[float, float]
    shares: tuple[float, float]

    def dump(self) -> list[Any]:
        """As it stands in the file."""
        blocks = [[t.queries, t.keys, t.resident, t.vmem, t.strip] for t in self.tilings]
        us, shares = [round(x, 1) for x in self.microseconds], [round(x, 4) for x in self.shares]
        return [self.chip, self.dtype, self.head_dim, self.length, self.windowed, *blocks, us, shares]

    @staticmethod
    def read(row: list[Any]) -> Entry:
        """From what `dump` gave."""
        chip, dtype, head_dim, length, windowed, forward, backward, us, shares = row
        both = (Tiling(*forward), Tiling(*backward))
        return Entry(chip, dtype, head_dim, length, windowed, both, (us[0], us[1]), (shares[0], shares[1]))


@functools.cache
def table() -> tuple[Entry, ...]:
    """All entries of the checked-in file."""
    text = resources.files("mosaicjax.kernels").joinpath(TABLE).read_text(encoding="utf-8")
    return tuple(Entry.read(row) for row in json.loads(text)["entries"])


@functools.cache
def _index() -> dict[tuple[str, str, int, int, bool], Entry]:
    return {(e.chip, e.dtype, e.head_dim, e.length, e.windowed): e for e in table()}


def length_class(keys: int) -> int:
    """The table's length for so many keys."""
    return next((length for length in LENGTHS if keys <= length), LENGTHS[-1])


def _wide(width: int) -> int:
    """Elements that a row of a head takes in VMEM."""
    return -(-width // LANES) * LANES


def vmem_estimate(
    which: str, tiling: Tiling, itemsize: int, head_dim: int, value_dim: int, several: bool = False
) -> int:
    """At least what the kernel of a pass ("forward" or "backward") takes of VMEM, in bytes.

    Windows count twice, as one is worked on while the next is fetched; besides them scratch, the scores of a
    turn in float32, `SCORES_HELD` times, and room for spilled registers. `several`:
    keys take more chunks than one, for which a backward pass adds to a dq in float32.
    """
    C, V = _wide(head_dim), _wide(value_dim)
    bq, resident = tiling.queries, tiling.resident
    strip = min(tiling.strip, bq)
    keys = resident * (C + V) * itemsize
    if which == "forward":
        windows = bq * (C + V) * itemsize + keys
        scratch = 4 * bq * (V + 16)
    else:
        dq = bq * C * (8 if several else itemsize)
        windows = bq * (C + V) * itemsize + dq + 2 * keys
        scratch = 4 * (resident * (C + V) + bq * C)
    # Logsumexp, delta and segments are rows of one sublane each, padded to eight.
    lines = 4 * 8 * (4 * bq + resident)
    scores = SCORES_HELD * 4 * tiling.keys * strip
    return 2 * (windows + lines) + scratch + scores + MIB // 2


def fitting(which: str, tiling: Tiling, itemsize: int, head_dim: int, value_dim: int, keys: int) -> Tiling:
    """The same with fewer keys in VMEM, and if need be smaller blocks, so that it stays within its limit.

    Raises:
        InputError: not even the smallest blocks do.
    """
    limit = tiling.vmem or 16 * MIB

    def estimate(tiling: Tiling) -> int:
        fitted = tiling.fitted(tiling.queries, keys)
        return vmem_estimate(which, fitted, itemsize, head_dim, value_dim, keys > fitted.resident)

    while estimate(tiling) > limit:
        if tiling.resident >= 2 * tiling.keys:
            tiling = replace(tiling, resident=tiling.resident // 2 // tiling.keys * tiling.keys)
        elif tiling.queries >= 2 * LANES:
            smaller = tiling.queries // 2
            tiling = replace(tiling, queries=smaller, strip=min(tiling.strip, smaller))
        elif tiling.keys >= 2 * LANES:
            tiling = replace(tiling, keys=tiling.keys // 2, resident=tiling.resident // 2)
        else:
            raise InputError(
                "the TPU kernel of attention has no room for this head dim",
                expected=f"at most {limit / MIB:.0f} MiB of VMEM",
                got=f"head dims {head_dim} and {value_dim}",
                fix="attention=XLA",
            )
    return tiling


def tilings(
    device_kind: str, dtype: Any, head_dim: int, value_dim: int, keys: int, window: int
) -> tuple[Tiling, Tiling]:
    """The forward's and the backward's blocks.

    `device_kind` is what jax reports of a device (`TPU v5 lite`) or a chip's name (`v5e`). `head_dim` is of
    queries and keys, `value_dim` of values; `window` 0 is none. A shape or chip that the table lacks gets the
    nearest entry, cut down to fit VMEM, and a line in the log, once; on devices that are no TPUs, where the
    kernel is only interpreted, nothing is said.

    Raises:
        InputError: nothing fits VMEM.
    """
    name = jnp.dtype(dtype).name
    return _tilings(device_kind, name, head_dim, value_dim, keys, 0 < window < keys)


def flops_per_second(
    device_kind: str, dtype: Any, head_dim: int, value_dim: int, keys: int, window: int
) -> tuple[float, float]:
    """What the compiler's schedule makes of the forward's and the backward's blocks, on one chip.

    FLOPs are those of cost estimates: of whole blocks, masked entries among them. A shape or chip that the
    table lacks gets the nearest entry's.
    """
    windowed = 0 < window < keys
    entry, _ = _nearest(device_kind, jnp.dtype(dtype).name, head_dim, value_dim, keys, windowed)
    reach = min(WINDOW, entry.length // 2) if windowed else 0
    problem = Problem(True, reach, 1.0, 0.0, entry.length, entry.length)
    rates = [
        2 * products * entry.head_dim * HEADS * visited_pairs(problem, (tiling.queries, tiling.keys)) / us
        for products, tiling, us in zip((2, 5), entry.tilings, entry.microseconds, strict=True)
    ]
    return 1e6 * rates[0], 1e6 * rates[1]


def _nearest(
    device_kind: str, dtype: str, head_dim: int, value_dim: int, keys: int, windowed: bool
) -> tuple[Entry, bool]:
    """The entry that serves a shape, and whether it was made for it."""
    chip = _chip(device_kind)
    known = chip is not None and chip.name in VMEM_LIMITS
    name = chip.name if chip is not None and known else FALLBACK
    listed = "float32" if jnp.dtype(dtype).itemsize >= 4 else "bfloat16"
    wide = max(head_dim, value_dim)
    nearest = min(HEAD_DIMS, key=lambda each: (abs(math.log(each / wide)), -each))
    exact = known and head_dim == value_dim == nearest and keys <= LENGTHS[-1] and dtype == listed
    return _index()[name, listed, nearest, length_class(keys), windowed], exact


@functools.cache
def _tilings(
    device_kind: str, dtype: str, head_dim: int, value_dim: int, keys: int, windowed: bool
) -> tuple[Tiling, Tiling]:
    chip = _chip(device_kind)
    on_tpu = chip is None or bool(_TPU_KINDS & set(chip.device_kinds))
    entry, exact = _nearest(device_kind, dtype, head_dim, value_dim, keys, windowed)
    itemsize = jnp.dtype(dtype).itemsize
    both = tuple(
        fitting(which, tiling, itemsize, head_dim, value_dim, keys)
        for which, tiling in zip(("forward", "backward"), entry.tilings, strict=True)
    )
    if not exact and on_tpu:
        _log.warning(
            "attention's blocks: none were tuned for %s, %s, head dims %d and %d, %s keys: it takes those of"
            " %s, head dim %d, %s keys",
            device_kind,
            dtype,
            head_dim,
            value_dim,
            f"{keys:,}",
            entry.chip,
            entry.head_dim,
            f"{entry.length:,}",
        )
    return both[0], both[1]


def _chip(device_kind: str) -> Chip | None:
    found = find_chip(device_kind)
    return found or next((chip for chip in CHIPS if chip.name == device_kind), None)

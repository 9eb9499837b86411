"""TPU slices that need not be there: their names, and the devices that the compiler knows them by."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from mosaicjax.errors import InputError
from mosaicjax.hardware import CORES, CPU, Chip, chip_named

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""What libtpu wants to find when it is loaded on a machine without a TPU."""

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""The grids of a v5e and a v6e."""
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
"""The grids of a v4 and a v5p below 64 chips; above it every side is a multiple of 4."""


@dataclass(frozen=True)
class Topology:
    """A slice of a pod, or several of them, joined by the data centre's network; or this machine's CPU."""

    chip: Chip
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As `--topology` takes it: v5e:16x16."""
        return f"{self.chip.name}:{'x'.join(map(str, self.grid))}"

    @property
    def title(self) -> str:
        """For people."""
        many = f"{self.slices} slices of " if self.slices > 1 else ""
        what = "chips" if self.timed else "devices of this machine"
        return f"{many}{self.name} ({self.chips:,} {what})"

    @property
    def timed(self) -> bool:
        """Whether it is known how fast it is."""
        return self.chip is not CPU

    @property
    def chips(self) -> int:
        """How many there are in all; of a CPU the devices that jax makes of it."""
        return math.prod(self.grid) * self.slices

    @staticmethod
    def read(text: str, slices: int = 1) -> Topology:
        """From a chip's name and a grid.

        Raises:
            InputError: no such chip or grid; it lists what there is.
        """
        name, _, grid = text.partition(":")
        if name == CPU.name and re.fullmatch(r"[1-9]\d*", grid) and slices == 1:
            return Topology(CPU, (int(grid),))
        if name not in CORES:
            raise InputError(
                f"unknown topology {text!r}",
                expected=f"{', '.join(CORES)}, as v5e:16x16 (or cpu:1: memory and program alone)",
            )
        if not re.fullmatch(r"\d+(x\d+)*", grid) or not _exists(name, grid):
            raise InputError(f"unknown topology {text!r}", expected=_grids(name))
        if slices < 1:
            raise InputError("--slices", expected="1 or more", got=slices)
        return Topology(chip_named(name), tuple(map(int, grid.split("x"))), slices)

    def devices(self) -> list[Any]:
        """The devices of the slices, as a mesh takes them.

        Raises:
            InputError: libtpu is not there, or does not know the topology.
        """
        if self.chip is CPU:
            return _cpu_devices(self.chips)
        if not compiler_there():
            raise InputError("no TPU compiler is installed", fix="pip install 'mosaicjax[tpu]'")
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        more: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if CORES[self.chip.name].cores > 1:
            # A chip's two cores as one device, which is how jax runs them; a v4's are two by default here.
            more["chip_config_name"] = "megacore"
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **more)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"the TPU compiler does not know {self.name}", got=_first_line(error)) from error
        return list(found.devices)


def _cpu_devices(count: int) -> list[Any]:
    import jax

    # Once jax has started there are as many as there are, which is checked below.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    there = jax.devices("cpu")
    if len(there) < count:
        raise InputError("jax has started with fewer CPU devices", expected=count, got=len(there))
    return list(there[:count])


def compiler_there() -> bool:
    """Whether libtpu is installed, without loading it."""
    return importlib.util.find_spec("libtpu") is not None


def _exists(name: str, grid: str) -> bool:
    if name in ("v5e", "v6e"):
        return grid in FLAT
    sides = tuple(map(int, grid.split("x")))
    return grid in CUBES or (len(sides) == 3 and all(side and side % 4 == 0 for side in sides))


def _grids(name: str) -> str:
    if name in ("v5e", "v6e"):
        return f"{name}: with one of {', '.join(FLAT)}"
    return f"{name}: with one of {', '.join(CUBES)}, or AxBxC of multiples of 4"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""A train step compiled ahead of time: the program's text, what memory it takes, and a cache of both."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from mosaicjax.errors import InputError
from mosaicjax.plan.topology import Topology
from mosaicjax.step import Step, digest

CACHE_FORMAT = 1
PACKAGES = ("jax", "jaxlib", "libtpu")
LARGEST = 8
"""So many of the largest buffers are kept."""

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
OUT_OF_MEMORY = (
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"total memory required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
)
"""How the compiler says that a program does not fit; the second counts temporaries alone."""


@dataclass(frozen=True)
class Memory:
    """HBM of one device. Units: bytes."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """What the program takes at most, outputs that take the place of arguments counted once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step.

    `digest` is that of the StableHLO which a run on these chips lowers too. `memory` is None for a program
    that does not fit, of which `needed` and `available` are known. `buffers` are the largest at the peak:
    bytes and shapes.

    Units: bytes of one device; `seconds` of compiling, 0 from the cache.
    """

    digest: str
    text: str
    memory: Memory | None
    needed: int
    available: int
    buffers: tuple[tuple[int, str], ...]
    seconds: float
    versions: dict[str, str]

    @property
    def fits(self) -> bool:
        """Whether one device's HBM holds it."""
        return self.memory is not None


def versions(topology: Topology) -> dict[str, str]:
    """Of the packages that decide what is compiled."""
    names = PACKAGES if topology.timed else PACKAGES[:2]
    return {name: importlib.metadata.version(name) for name in names}


def compile_step(step: Step, topology: Topology, cache: Path | None) -> Compiled:
    """Compile the train step for the devices of its layout, or find it among those compiled before.

    Raises:
        InputError: the compiler refuses it for another reason than memory.
    """
    lowered = step.lower()
    mine, packages = digest(lowered), versions(topology)
    named = json.dumps([CACHE_FORMAT, mine, topology.name, topology.slices, packages], sort_keys=True)
    path = None if cache is None else cache / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.json.gz"
    if path is not None and path.exists():
        return _load(path)
    found = _compile(lowered, mine, packages)
    if path is not None:
        _save(path, found)
    return found


def _compile(lowered: Any, mine: str, packages: dict[str, str]) -> Compiled:
    with tempfile.TemporaryDirectory(prefix="mosaicjax-plan-") as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        began = time.perf_counter()
        try:
            program = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            needed = _out_of_memory(str(error))
            if needed is None:
                raise InputError("the TPU compiler refuses the step", got=str(error)[:500]) from error
            seconds = time.perf_counter() - began
            return Compiled(mine, "", None, *needed, _buffers(folder), seconds, packages)
        seconds = time.perf_counter() - began
        # The executable's own text goes through a form that some programs cannot be read back from.
        text = _dumped(folder, "after_codegen.txt") or _dumped(folder, "after_optimizations.txt")
        if text is None:
            raise InputError("the compiler wrote no program down", expected="its dump of the last pass")
        buffers = _buffers(folder)
    stats = program.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    return Compiled(mine, text, memory, memory.peak, 0, buffers, seconds, packages)


def _dumped(folder: str, ending: str) -> str | None:
    """The largest file of a kind: the step's, where the compiler made helpers beside it."""
    found = sorted(Path(folder).glob(f"*{ending}"), key=lambda path: path.stat().st_size)
    return found[-1].read_text(errors="replace") if found else None


def _out_of_memory(message: str) -> tuple[int, int] | None:
    """Bytes needed and available, from what the compiler says of a program that does not fit."""
    found = next((match for match in (re.search(form, message) for form in OUT_OF_MEMORY) if match), None)
    if found is None:
        return None
    needed, available = (float(size) * UNITS[unit] for size, unit in (found.groups()[:2], found.groups()[2:]))
    return int(needed), int(available)


def _buffers(folder: str) -> tuple[tuple[int, str], ...]:
    """The largest buffers in HBM, from the compiler's report on memory."""
    report = _dumped(folder, "memory-usage-report.txt")
    if report is None:
        return ()
    hbm = report.split("Memory Space: default", 1)[-1].split("Memory Space:", 1)[0]
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    found = []
    for line in hbm.splitlines():
        cells = [cell.strip() for cell in line.split(";")]
        size = re.fullmatch(r"([\d.]+)([KMG]iB|B)", cells[1]) if len(cells) == 5 else None
        if size:
            found.append((int(float(size.group(1)) * units[size.group(2)]), cells[4]))
    return tuple(sorted(found, reverse=True)[:LARGEST])


def _save(path: Path, found: Compiled) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(asdict(found)).encode()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(gzip.compress(content, mtime=0))
    os.replace(part, path)


def _load(path: Path) -> Compiled:
    found = json.loads(gzip.decompress(path.read_bytes()))
    memory = None if found["memory"] is None else Memory(**found["memory"])
    buffers = tuple((size, shapes) for size, shapes in found["buffers"])
    return Compiled(**{**found, "memory": memory, "buffers": buffers, "seconds": 0.0})

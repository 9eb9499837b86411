"""What the TPU compiler makes of a kernel, without a TPU: loops, their bundles, spills and VMEM.

libtpu compiles ahead of time on any machine and can write down the final schedule: one line a bundle (a VLIW
instruction, a cycle where nothing stalls), a loop's bundles marked by its depth, and how many slots of each
unit a bundle fills. Bundles times the turns that a loop takes, over the clock, rank kernels well: a matmul of
8192 cubed in Pallas on a v5e was 2% off the hardware. Two things are not seen in it, and added: waits for HBM
(`seconds` takes the larger of the two), and waits for the matrix units, which libtpu's schedule feeds with 16
rows every 11 bundles or so though they take 16 cycles for them (on v4, v5e and v5p one row a cycle is what
the published peak means): a part of a kernel takes its bundles or its matrix units' rows, whichever is more.

`LIBTPU_INIT_ARGS` is read once, as libtpu loads, so `Compiler` keeps one child process for many programs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import commit  # noqa: E402 after the path, for a call as a script
from mosaicjax.errors import InputError  # noqa: E402
from mosaicjax.hardware import CORES, Core, chip_named  # noqa: E402
from mosaicjax.plan import topology  # noqa: E402

PACKAGES = ("jax", "jaxlib", "libtpu")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", **topology.ENVIRONMENT}
DUMP_FLAGS = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
REPORT = "const DATA ="


@dataclass(frozen=True)
class Node:
    """A kernel, a loop of it, or what a branch may skip: its own bundles, less what its parts hold.

    `units` are the slots filled by own bundles, by the name of the column (MATMUL, VALU, VSTORE:SPILL, ...),
    `rows` what the busiest matrix unit is fed in them.
    """

    kind: str
    bundles: int
    units: dict[str, int]
    rows: int = 0
    parts: tuple[Node, ...] = ()

    def cycles(self, core: Core) -> float:
        """What its own bundles take at least."""
        return max(self.bundles, self.rows / core.rows)

    def nodes(self) -> Iterator[Node]:
        """This and all within it, in the order of the text."""
        yield self
        for part in self.parts:
            yield from part.nodes()

    @property
    def multiplies(self) -> bool:
        """Whether anything in it uses the matrix units."""
        return any(node.units.get("MATMUL", 0) for node in self.nodes())

    def total(self, unit: str = "") -> int:
        """All bundles, or all slots of a unit."""
        return sum(node.units.get(unit, 0) if unit else node.bundles for node in self.nodes())

    def lines(self, indent: int = 0) -> Iterator[str]:
        """For people."""
        some = ", ".join(f"{name} {count}" for name, count in self.units.items() if count)
        yield f"{'  ' * indent}{self.kind} {self.bundles}, rows {self.rows} ({some})"
        for part in self.parts:
            yield from part.lines(indent + 1)

    @staticmethod
    def read(found: dict[str, Any]) -> Node:
        """From `asdict`."""
        parts = tuple(Node.read(part) for part in found["parts"])
        return Node(found["kind"], found["bundles"], found["units"], found["rows"], parts)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. Units: `vmem` in bytes, spill slots among it."""

    name: str
    tree: Node
    vmem: int

    @property
    def spills(self) -> int:
        """Stores of spilled vector registers in the text."""
        return self.tree.total("VSTORE:SPILL")

    @property
    def loops(self) -> list[Node]:
        """The loops within the grid's that multiply, in order."""
        return [node for node in self.tree.nodes() if node.kind == "loop" and node.multiplies][1:]


@dataclass(frozen=True)
class Compiled:
    """What came of a program: its kernels, or `error`, the compiler's message in a line.

    Units: `temp` in bytes of HBM, `seconds` of compiling.
    """

    kernels: tuple[Kernel, ...] = ()
    temp: int = 0
    seconds: float = 0.0
    error: str = ""

    def named(self, part: str) -> list[Kernel]:
        """The kernels with this in their names."""
        return [kernel for kernel in self.kernels if part in kernel.name]


@dataclass(frozen=True)
class Counts:
    """How often the parts of a kernel run, over the whole grid.

    `steps` of the grid; `visits`: steps that do the multiplying a branch may skip; `rows`: how often vectors
    are set up or written out behind a branch; `turns` of each loop within a step that multiplies, in order.
    """

    steps: float
    visits: float = 0
    rows: float = 0
    turns: tuple[float, ...] = ()


def cycles(chip: str, kernel: Kernel, counts: Counts) -> float:
    """What the whole grid takes if one core does it.

    A branch that multiplies runs `visits` times, one that stores vectors without multiplying `rows` times,
    any other (the pipeline's, which starts copies and waits for them) with what it stands in.

    Raises:
        InputError: the kernel has other loops than were counted.
    """
    core, turns = CORES[chip], list(counts.turns)

    def walk(node: Node, times: float, in_grid: bool) -> float:
        total = node.cycles(core) * times
        for part in node.parts:
            if part.kind == "loop" and not in_grid:
                total += walk(part, counts.steps, True)
            elif part.kind == "loop" and part.multiplies:
                if not turns:
                    raise InputError(f"more loops in {kernel.name} than were counted", expected=counts.turns)
                total += walk(part, turns.pop(0), True)
            elif part.kind == "loop":
                raise InputError(f"a loop in {kernel.name} that multiplies nothing and was not counted")
            elif part.units.get("MATMUL", 0):
                total += walk(part, counts.visits, in_grid)
            elif part.units.get("VSTORE", 0) and not part.multiplies:
                total += walk(part, counts.rows, in_grid)
            else:
                total += walk(part, times, in_grid)
        return total

    total = walk(kernel.tree, 1, False)
    if turns:
        raise InputError(f"fewer loops in {kernel.name} than were counted", got=f"{len(turns)} more")
    return total


def seconds(chip: str, taken: float, hbm_bytes: float) -> float:
    """The larger of what the cores take for so many cycles in all and what HBM takes to move bytes.

    Work is shared by a chip's cores, as the parallel dims of a grid are.
    """
    core, bandwidth = CORES[chip], chip_named(chip).hbm_bandwidth
    assert bandwidth is not None
    return max(taken / core.clock / core.cores, hbm_bytes / bandwidth.value)


def useful_share(chip: str, multiply_adds: float, taken: float) -> float:
    """The part of what the matrix units could do in that many cycles that was asked for."""
    return multiply_adds / (CORES[chip].macs * taken)


BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{")
EMPTY = re.compile(r":\s*\{\s*\}")
BRANCH = re.compile(r"\bsbr\.rel\b[^;}]*target = \$region(\d+)")
MATMUL = re.compile(r"\bvmatmul(\.[\w.]*)\.mxu(\d)")
REGION_START = re.compile(r"(?:Start|Start/End empty|End empty) region (\d+)")
UNITS = re.compile(r"^[A-Z:]+(?:, *[A-Z:]+)+\s*$")


@dataclass
class _Span:
    kind: str
    begin: int
    end: int
    parts: list[_Span] = field(default_factory=list)


def parse(bundles: str, utilization: str) -> Node:
    """The tree of a kernel from the text of its final bundles and of their use of units.

    Raises:
        ValueError: the two texts have not the same number of bundles.
    """
    depths, labels, texts = _bundles(bundles)
    names, rows = _utilization(utilization)
    if len(rows) != len(depths):
        raise ValueError(f"{len(depths)} bundles, but {len(rows)} rows of utilization")
    top = _Span("kernel", 0, len(depths))
    spans = sorted(_loops(depths, labels) + _branches(texts), key=lambda span: (span.begin, -span.end))
    stack = [top]
    for span in spans:
        while span.begin >= stack[-1].end:
            stack.pop()
        span.end = min(span.end, stack[-1].end)
        if span.end > span.begin:
            stack[-1].parts.append(span)
            stack.append(span)

    def node(span: _Span) -> Node:
        inner = {at for part in span.parts for at in range(part.begin, part.end)}
        own = [at for at in range(span.begin, span.end) if at not in inner]
        units = {name: sum(rows[at][n] for at in own) for n, name in enumerate(names)}
        return Node(span.kind, len(own), units, _rows(own, texts), tuple(node(part) for part in span.parts))

    return node(top)


def _rows(bundles: list[int], texts: list[str]) -> int:
    """Rows that the busiest matrix unit is fed, a register at a time: of 8 in float32, of 16 in bfloat16.

    `lmr` takes float32 and rounds it on its way in.
    """
    fed: dict[str, int] = {}
    for at in bundles:
        for kind, unit in MATMUL.findall(texts[at]):
            wide = ".f32" in kind or ".lmr" in kind
            fed[unit] = fed.get(unit, 0) + (8 if wide else 16)
    return max(fed.values(), default=0)


def _bundles(text: str) -> tuple[list[int], list[str], list[str]]:
    """Depth, label and text of each bundle; a comment may go on over lines."""
    depths: list[int] = []
    labels: list[str] = []
    texts: list[str] = []
    for line in text.splitlines():
        found = BUNDLE.match(line)
        if found:
            # A bundle without instructions bears no marks, whatever loop it stands in.
            empty = EMPTY.search(line) is not None
            depths.append(depths[-1] if empty and depths else len(found.group(3)))
            labels.append(found.group(2) or "")
            texts.append(line)
        elif texts:
            texts[-1] += "\n" + line
    return depths, labels, texts


def _utilization(text: str) -> tuple[list[str], list[list[int]]]:
    names: list[str] = []
    rows: list[list[int]] = []
    begun = False
    for line in text.splitlines():
        if UNITS.match(line.strip()):
            names = [name.strip() for name in line.split(",")]
        elif "UTILIZATION" in line:
            begun = True
        elif begun and line.strip():
            rows.append([int(word) for word in line.split()])
    return names, rows


def _loops(depths: list[int], labels: list[str]) -> list[_Span]:
    found = []
    for at, (depth, label) in enumerate(zip(depths, labels, strict=True)):
        if label == "LB":
            end = at + 1
            while end < len(depths) and (
                depths[end] > depth or (depths[end] == depth and labels[end] != "LB")
            ):
                end += 1
            found.append(_Span("loop", at, end))
    return found


def _branches(texts: list[str]) -> list[_Span]:
    """What branches forward may skip."""
    places = {}
    for at, text in enumerate(texts):
        for region in REGION_START.findall(text):
            places[region] = at
    found = []
    for at, text in enumerate(texts):
        for region in BRANCH.findall(text):
            if places.get(region, -1) > at + 1:
                found.append(_Span("branch", at + 1, places[region]))
    return found


def vmem_bytes(report: str) -> dict[str, int]:
    """What each kernel takes of VMEM, spilled registers among it, from the text of the compiler's report.

    Raises:
        ValueError: there is no such report in it.
    """
    data, _ = json.JSONDecoder().raw_decode(report[report.index(REPORT) + len(REPORT) :].lstrip())
    found = {}
    waiting = [data]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
                if "total_size" in value:
                    found[name] = int(value["total_size"])
    return found


def read_dumps(folder: Path) -> list[Kernel]:
    """The Pallas kernels among the dumps of one compile; XLA's own fusions are left out."""
    found = []
    sizes: dict[str, int] = {}
    for path in folder.glob("*-vmem_report.html"):
        sizes |= vmem_bytes(path.read_text(errors="replace"))
    for path in sorted(folder.glob("*-final_bundles.txt")):
        if "schedule-analysis" in path.name:
            continue
        name = re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", path.name)
        stem = path.name.partition("-")[0] + "-" + name + "-"
        use = next(folder.glob(_literal(stem) + "*per-bundle-utilization*"), None)
        # Fusions that keep nothing in VMEM are not in the report.
        if name.startswith(("TLP", "<")) or use is None or name not in sizes:
            continue
        text = path.read_text(errors="replace")
        found.append(Kernel(name, parse(text, use.read_text()), sizes[name]))
    return found


def _literal(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


class Compiler:
    """Compiles for TPUs in a child process: `with Compiler() as made: made("v5e", "module:maker", ...)`.

    A maker is a function `maker(**arguments) -> (function, its abstract arguments)`; arguments go through
    JSON. The child is started again after a crash, or after `patience` seconds of silence.
    """

    def __init__(self, patience: float = 600.0) -> None:
        self.patience = patience
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop()

    def __call__(self, chip: str, maker: str, **arguments: Any) -> Compiled:
        """Compile it for one core of a chip."""
        child = self._started()
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps({"chip": chip, "maker": maker, "arguments": arguments}) + "\n")
        child.stdin.flush()
        ready, _, _ = select.select([child.stdout], [], [], self.patience)
        line = child.stdout.readline() if ready else ""
        if not line:
            why = f"the compiler died with {child.poll()}" if ready else f"no answer in {self.patience:.0f} s"
            self._stop()
            return Compiled(error=why)
        found = json.loads(line)
        kernels = tuple(Kernel(k["name"], Node.read(k["tree"]), k["vmem"]) for k in found["kernels"])
        return Compiled(kernels, found["temp"], found["seconds"], found["error"])

    def _started(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            versions()
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            self._child = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
            )
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None


def versions() -> dict[str, str]:
    """The compiler's and jax's.

    Raises:
        InputError: libtpu is not installed.
    """
    from importlib import metadata

    try:
        return {name: metadata.version(name) for name in PACKAGES}
    except metadata.PackageNotFoundError as error:
        raise InputError(
            "the TPU compiler is not installed", got=str(error), fix="pip install mosaicjax[tpu]"
        ) from error


def provenance(*options: str) -> dict[str, Any]:
    """What figures were made with: versions, commit, command with these options of it, date."""
    script = Path(sys.argv[0]).resolve()
    place = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return {
        "packages": versions(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "commit": commit(),
        "command": " ".join(["python", str(place), *options]),
        "date": time.strftime("%Y-%m-%d"),
    }


def one_line(error: Exception) -> str:
    """The compiler's message, short enough for a line."""
    text = " ".join(str(error).split())
    text = re.sub(r"(/[\w.+-]+)+/(?=[\w.-]+\.\w+)", "", text)
    return f"{type(error).__name__}: {text}"[:400]


def _child() -> None:
    """Answers jobs, one JSON line each; anything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="mosaicjax-bundles-") as made:
        folder = Path(made)
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} {DUMP_FLAGS}"
        import jax
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        devices: dict[str, Any] = {}
        for line in sys.stdin:
            job = json.loads(line)
            core = CORES[job["chip"]]
            if core.topology not in devices:
                devices[core.topology] = topologies.get_topology_desc(
                    platform="tpu", topology_name=core.topology
                ).devices[0]
            place = SingleDeviceSharding(devices[core.topology])
            module, _, name = job["maker"].partition(":")
            maker: Callable[..., Any] = getattr(importlib.import_module(module), name)
            began = time.perf_counter()
            temp, error = 0, ""
            try:
                function, arguments = maker(**job["arguments"])
                arguments = jax.tree.map(
                    lambda x, place=place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
                )
                traced = jax.jit(function).trace(*arguments)
                compiled = traced.lower(lowering_platforms=("tpu",)).compile()
                temp = compiled.memory_analysis().temp_size_in_bytes
            except Exception as failure:  # a compiler has many kinds of refusal: each goes back as text
                error = one_line(failure)
            taken = time.perf_counter() - began
            kernels = [] if error else [asdict(kernel) for kernel in read_dumps(folder)]
            for path in folder.iterdir():
                path.unlink()
            answers.write(
                json.dumps({"kernels": kernels, "temp": temp, "seconds": taken, "error": error}) + "\n"
            )
            answers.flush()


def main() -> None:
    if len(sys.argv) == 1 and not sys.stdin.isatty():
        return _child()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("chip", choices=list(CORES))
    parser.add_argument("maker", help="module:function, such as benchmarks.kernels.attention:ours")
    parser.add_argument("arguments", nargs="?", default="{}", help="of the function, as JSON")
    options = parser.parse_args()
    with Compiler() as compiler:
        found = compiler(options.chip, options.maker, **json.loads(options.arguments))
    if found.error:
        raise SystemExit(found.error)
    print(f"{found.seconds:.1f} s, {found.temp / 2**20:.2f} MiB of temporary HBM")
    for kernel in found.kernels:
        print(f"{kernel.name}: {kernel.vmem / 2**20:.2f} MiB VMEM, {kernel.spills} spills")
        print("\n".join(kernel.tree.lines(1)))


if __name__ == "__main__":
    main()

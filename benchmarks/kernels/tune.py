"""Finds the attention kernel's blocks on each chip from the TPU compiler's schedules; no TPU is needed.

    python benchmarks/kernels/tune.py search             # writes mosaicjax/kernels/attention_tiles.json
    python benchmarks/kernels/tune.py search --chips v5e --only-compile      # a part, into the cache
    python benchmarks/kernels/tune.py check --chips v4 --head-dims 80        # what compiles, and its VMEM

Each candidate is compiled once for each chip, dtype and head dim, at 2,048 places. A loop's bundles are the
same at any length, so lengths and windows differ by counted turns alone; a window's masked blocks are counted
as the causal kernel's, which lack a comparison. Time is as in `bundles.seconds`, at 8 heads and batch 1;
among blocks within 1% of the best those that take least VMEM win. Head dims 80, 96 and 192 and the chips v4
and v5p are given a choice of what won beside them. Compiles are kept in a cache (`--cache`), by versions and
the kernel's source, so a search may be done in parts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.kernels.attention import HERE, MIB, PASSES, Case, our_work  # noqa: E402
from benchmarks.kernels.bundles import (  # noqa: E402
    Compiled,
    Compiler,
    Kernel,
    Node,
    cycles,
    provenance,
    seconds,
    useful_share,
    versions,
)
from mosaicjax.hardware import CORES  # noqa: E402
from mosaicjax.kernels import attention_tiles, flash_tpu  # noqa: E402
from mosaicjax.kernels.attention_tiles import (  # noqa: E402
    HEAD_DIMS,
    LENGTHS,
    TABLE,
    VMEM_LIMITS,
    WINDOW,
    Entry,
    tilings,
    vmem_estimate,
)
from mosaicjax.kernels.flash_tpu import Tiling  # noqa: E402

RESULT = ROOT / "mosaicjax" / "kernels" / TABLE
REPRESENTATIVE = 2_048
RESIDENTS = (512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768)
CLOSE = 1.01
SCHEMA = 2
"""Of what the cache keeps of a compile."""
SIZES = {"bfloat16": 2, "float32": 4}
Blocks = tuple[int, int, int]
"""Queries, keys, and queries at a time."""

CANDIDATES: dict[str, dict[str, tuple[Blocks, ...]]] = {
    "bfloat16": {
        "forward": (
            (256, 256, 256),
            (256, 512, 256),
            (512, 256, 256),
            (512, 512, 128),
            (512, 512, 256),
            (512, 512, 512),
            (512, 1_024, 256),
            (1_024, 512, 256),
            (1_024, 1_024, 256),
        ),
        "backward": (
            (256, 256, 256),
            (256, 512, 256),
            (512, 256, 256),
            (512, 512, 128),
            (512, 512, 256),
            (512, 512, 512),
            (512, 1_024, 256),
            (1_024, 512, 256),
            (1_024, 512, 512),
        ),
    },
    "float32": {
        "forward": ((256, 256, 256), (256, 512, 256), (512, 512, 256)),
        "backward": ((256, 256, 256), (256, 512, 256), (512, 512, 256)),
    },
}
BETWEEN = {80: (64, 128), 96: (64, 128), 192: (128, 256)}
LIKE = {"v4": "v5e", "v5p": "v5e"}


class Cache:
    """Compiles of a kernel, by everything they depend on, in a file of JSON lines."""

    def __init__(self, path: Path, compiler: Compiler) -> None:
        self.path, self.compiler, self.made = path, compiler, 0
        self.kernel = hashlib.sha256(Path(flash_tpu.__file__).read_bytes()).hexdigest()
        self.base = [SCHEMA, versions(), self.kernel]
        self.kept: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.kept[row["key"]] = row["found"]

    def __call__(self, chip: str, which: str, case: Case, tiling: Tiling) -> Compiled:
        """Compile it, or say what it came to before."""
        blocks = [tiling.queries, tiling.keys, tiling.resident, tiling.vmem, tiling.strip]
        key = json.dumps([*self.base, chip, which, asdict(case), blocks], sort_keys=True)
        if key not in self.kept:
            made = self.compiler(chip, f"{HERE}:ours", which=which, case=asdict(case), tiling=blocks)
            self.made += 1
            ours = [asdict(kernel) for kernel in made.named("flash_attention")]
            self.kept[key] = {
                "kernels": ours,
                "temp": made.temp,
                "seconds": made.seconds,
                "error": made.error,
            }
            with open(self.path, "a") as file:
                file.write(json.dumps({"key": key, "found": self.kept[key]}) + "\n")
        found = self.kept[key]
        kernels = tuple(Kernel(k["name"], Node.read(k["tree"]), k["vmem"]) for k in found["kernels"])
        return Compiled(kernels, found["temp"], found["seconds"], found["error"])


@dataclass(frozen=True)
class Choice:
    """Blocks for a pass at a length. Units: seconds, bytes."""

    tiling: Tiling
    seconds: float
    share: float
    vmem: int


class Search:
    """Compiles candidates and chooses among them; what it learnt on the way is in `notes`."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.notes = cache, dict[str, None]()
        self._chosen: dict[tuple[str, str, int, str], dict[tuple[int, bool], Choice]] = {}
        self._compiled: dict[tuple[str, str, int, str, Blocks], Kernel | None] = {}

    def compiled(self, *asked: Any) -> Kernel | None:
        """The kernel at the representative length, or None where it does not compile within the limit."""
        if asked not in self._compiled:
            self._compiled[asked] = self._compile(*asked)
        return self._compiled[asked]

    def _compile(self, chip: str, dtype: str, head_dim: int, which: str, blocks: Blocks) -> Kernel | None:
        bq, bk, strip = blocks
        size, limit = SIZES[dtype], VMEM_LIMITS[chip]
        tiling = Tiling(bq, bk, REPRESENTATIVE, limit, strip)
        while vmem_estimate(which, tiling, size, head_dim, head_dim) > limit:
            if tiling.resident <= bk:
                return None
            tiling = replace(tiling, resident=tiling.resident // 2)
        case = Case(tiling.resident, tiling.resident, head_dim, dtype=dtype)
        found = self.cache(chip, which, case, tiling)
        if found.error:
            self.notes[f"{chip} {dtype} {head_dim} {which} {blocks}: {found.error}"] = None
            return None
        (kernel,) = found.named("flash_attention")
        estimate = vmem_estimate(which, tiling, size, head_dim, head_dim)
        if kernel.vmem > estimate:
            taken = f"{kernel.vmem / MIB:.2f} MiB of VMEM, estimated {estimate / MIB:.2f}"
            self.notes[f"{chip} {dtype} {head_dim} {which} {blocks}: {taken}"] = None
        return kernel

    def choose(
        self, chip: str, which: str, case: Case, candidates: tuple[Blocks, ...], length: int
    ) -> Choice | None:
        """The best of the candidates at a length, with any number of keys in VMEM."""
        found = []
        size, limit = SIZES[case.dtype], VMEM_LIMITS[chip]
        for blocks in candidates:
            kernel = self.compiled(chip, case.dtype, case.head_dim, which, blocks)
            if kernel is None:
                continue
            bq, bk, strip = blocks
            for resident in RESIDENTS:
                if not bk <= resident <= max(length, bk):
                    continue
                tiling = Tiling(bq, bk, resident, limit, strip)
                fitted = tiling.fitted(length, length)
                vmem = vmem_estimate(
                    which, fitted, size, case.head_dim, case.values, length > fitted.resident
                )
                if vmem > limit:
                    continue
                works = our_work(which, case, tiling)
                issued = [cycles(chip, kernel, work.counts) for work in works]
                taken = sum(
                    seconds(chip, each, work.hbm_bytes) for each, work in zip(issued, works, strict=True)
                )
                share = useful_share(chip, case.multiply_adds(which), sum(issued))
                found.append(Choice(tiling, taken, share, vmem))
        if not found:
            return None
        best = min(choice.seconds for choice in found)
        return min(
            (choice for choice in found if choice.seconds <= CLOSE * best), key=lambda choice: choice.vmem
        )

    def candidates(self, chip: str, dtype: str, head_dim: int, which: str) -> tuple[Blocks, ...]:
        """What is tried: the whole list, or what won at head dims beside or on the chip most like it."""
        beside = [(chip, dim) for dim in BETWEEN.get(head_dim, ())] or (
            [(LIKE[chip], head_dim)] if chip in LIKE and dtype == "bfloat16" else []
        )
        if not beside:
            return CANDIDATES[dtype][which]
        won = {
            (choice.tiling.queries, choice.tiling.keys, choice.tiling.strip)
            for other, dim in beside
            for choice in self.choices(other, dtype, dim, which).values()
        }
        return tuple(sorted(won))

    def choices(self, *asked: Any) -> dict[tuple[int, bool], Choice]:
        """For a chip, dtype, head dim and pass, by length and whether there is a window.

        Raises:
            SystemExit: nothing compiles within the limit.
        """
        if asked not in self._chosen:
            self._chosen[asked] = self._choices(*asked)
        return self._chosen[asked]

    def _choices(self, chip: str, dtype: str, head_dim: int, which: str) -> dict[tuple[int, bool], Choice]:
        found = {}
        candidates = self.candidates(chip, dtype, head_dim, which)
        if chip in LIKE:
            # Where VMEM is scarce, something small must be among them.
            candidates = tuple(sorted({*candidates, (256, 256, 256)}))
        for length in LENGTHS:
            for windowed in (False, True):
                window = min(WINDOW, length // 2) if windowed else 0
                case = Case(length, length, head_dim, dtype=dtype, window=window)
                best = self.choose(chip, which, case, candidates, length)
                if best is None:
                    raise SystemExit(f"nothing compiles: {chip} {dtype} {head_dim} {which} {length}")
                found[length, windowed] = best
        return found


def search(options: argparse.Namespace, cache: Cache) -> None:
    looking = Search(cache)
    entries = []
    for chip in options.chips:
        for dtype in options.dtypes:
            for head_dim in options.head_dims:
                passes = {which: looking.choices(chip, dtype, head_dim, which) for which in PASSES}
                for at in passes["forward"]:
                    forward, backward = passes["forward"][at], passes["backward"][at]
                    entry = Entry(
                        chip,
                        dtype,
                        head_dim,
                        *at,
                        (forward.tiling, backward.tiling),
                        (1e6 * forward.seconds, 1e6 * backward.seconds),
                        (forward.share, backward.share),
                    )
                    entries.append(entry)
                    if at == (4_096, False):
                        print(json.dumps(entry.dump()), f"({cache.made} compiled)", flush=True)
    for note in looking.notes:
        print(note)
    if options.only_compile:
        return
    made = provenance("search") | {"kernel_sha256": cache.kernel}
    lines = ",\n".join(json.dumps(entry.dump()) for entry in entries)
    columns = (
        "chip, dtype, head dim, keys, with a window, forward [queries, keys, resident, vmem, strip], the same"
        " of backward, microseconds of both, useful share of the matrix units of both (by the schedule,"
        f" causal, 8 heads, batch 1, windows of {WINDOW:,} or half the length)"
    )
    RESULT.write_text(
        f'{{"made": {json.dumps(made)},\n"columns": {json.dumps(columns)},\n"entries": [\n{lines}\n]}}\n'
    )
    print(f"{len(entries)} entries in {RESULT.name}")


FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "all": {
        "alibi": True,
        "segments": True,
        "sinks": True,
        "softcap": 30.0,
        "kv_heads": 2,
        "slopes_grad": True,
    },
    "packed window": {"window": 700, "segments": True, "kv_heads": 2},
    "not causal": {"causal": False, "alibi": True, "slopes_grad": True},
    "odd": {"queries": -100, "keys": -60},
}


def check(options: argparse.Namespace, cache: Cache) -> None:
    """Compile what the table gives at each corner; one line a failure, and the largest VMEM."""
    tried, failed, largest = 0, 0, 0.0
    for chip in options.chips:
        for dtype in options.dtypes:
            for head_dim in options.head_dims:
                for length in options.lengths:
                    for name in options.features:
                        extra = dict(FEATURES[name])
                        queries, keys = (length + extra.pop(side, 0) for side in ("queries", "keys"))
                        case = Case(queries, keys, head_dim, dtype=dtype, **extra)
                        chosen = tilings(chip, dtype, head_dim, case.values, keys, case.window)
                        for which, tiling in zip(PASSES, chosen, strict=True):
                            one = case if which == "backward" else replace(case, slopes_grad=False)
                            found = cache(chip, which, one, tiling)
                            tried += 1
                            failed += bool(found.error)
                            vmem = max([kernel.vmem for kernel in found.kernels], default=0)
                            largest = max(largest, vmem / VMEM_LIMITS[chip])
                            line = f"{chip} {dtype} C={head_dim} L={length} {name} {which} {tiling}"
                            if found.error:
                                print(f"{line}: {found.error}", flush=True)
                            elif vmem > VMEM_LIMITS[chip]:
                                print(f"{line}: {vmem / MIB:.2f} MiB of VMEM by its dumps", flush=True)
    print(f"{tried} compiles, {failed} failed, at most {largest:.2f} of the limit of VMEM")
    if failed:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=["search", "check"])
    parser.add_argument("--chips", nargs="+", choices=list(CORES), default=list(CORES))
    parser.add_argument("--dtypes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="for check")
    parser.add_argument(
        "--features", nargs="+", choices=list(FEATURES), default=list(FEATURES), help="for check"
    )
    parser.add_argument("--only-compile", action="store_true", help="fill the cache, write no table")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "mosaicjax-tune.jsonl", help="of compiles"
    )
    options = parser.parse_args()
    whole = (list(CORES), list(SIZES), list(HEAD_DIMS))
    if options.kind == "search" and not options.only_compile:
        if (options.chips, options.dtypes, options.head_dims) != whole:
            parser.error("a table is written whole: add --only-compile")
    assert attention_tiles.HEAD_DIMS == HEAD_DIMS
    with Compiler() as compiler:
        cache = Cache(options.cache, compiler)
        (search if options.kind == "search" else check)(options, cache)


if __name__ == "__main__":
    main()

"""What a given loss costs: the tuned standard recipe beside any other, to the same held-out bits a byte.

    python benchmarks/speedrun.py code-1M
    python benchmarks/speedrun.py books-1M --recipe my_recipe.py --seeds 5 --json mine.json

A track is a corpus, the standard recipe at a size and a number of steps, and the record's recipe. The
standard is run to its end with every seed; what it has then on the test documents, on average, is the target.
A contender reaches it where its own average, with its own steps and schedule run to their end, is no worse.
Both are trained by `mosaicjax train`, one process after the other, in turns. Documents of the test were seen
by neither, nor by the choice of any setting: that goes by the validation documents that a run itself reports.

Corpora are built on first use below build/speedrun: `code` is the standard library of the Python at hand,
`books` needs --books, a JSON lines file of whole books. Tokens are target tokens, FLOPs the model's (causal
attention counted as it is seen), seconds those of steps, of the whole run, and of that without compiling.
With --cores 0 1 each run has one of these cores, and two are trained at a time. A track that was broken off
goes on with the runs that are there; each has its commit on record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine, spread  # noqa: E402 after the path, for a call as a script

STANDARD = "recipes/speedrun/standard.py"
BEST = "recipes/speedrun/best.py"
WORK = ROOT / "build" / "speedrun"
RECORDS = ROOT / "benchmarks" / "speedrun.json"
VOCABULARY = 4_096
TEST_SHARE = 0.08
HELD_OUT = 0.06
SMALL = ("--model.layers=4", "--model.embed=128", "--model.heads=4", "--model.mlp=512")
MIDDLE = ("--model.layers=4", "--model.embed=224", "--model.heads=4", "--model.mlp=896")
# Of ten times the tokens: larger batches, lower rates; and a table of pairs that leaves it below 10M weights.
LONGER = (
    "--model.inputs.0.buckets=16384",
    "--batch=32",
    "--steps=700",
    "--phases.0.step=600",
    "--phases.0.batch=4",
    "--optimizer.momentum=0.9",
    "--optimizer.lr.peak=6e-3",
    "--optimizer.lr.warmup=10",
    "--optimizer.others.lr.peak=3e-2",
    "--optimizer.others.lr.warmup=10",
)
SECONDS_AND_DOLLARS = ("step_seconds", "seconds_but_compiling", "seconds", "usd")
PACKAGES = ("jax", "jaxlib", "optax", "numpy")


@dataclass(frozen=True)
class Track:
    """A corpus, and what the standard and the record are told beside their recipes."""

    corpus: str
    standard: tuple[str, ...]
    best: tuple[str, ...]


TRACKS = {
    "code-1M": Track("code", (*SMALL, "--steps=122"), SMALL),
    # The standard's rate is searched on the books too; how long the record is, their validation documents say.
    "books-1M": Track(
        "books",
        (*SMALL, "--steps=122", "--optimizer.lr.peak=1.6e-2"),
        (*SMALL, "--steps=80", "--phases.0.step=73"),
    ),
    "code-3M": Track("code", (*MIDDLE, "--steps=1220", "--optimizer.lr.peak=2e-3"), (*MIDDLE, *LONGER)),
}


def is_test(text: str) -> bool:
    """Whether a document is of the test: by a hash of its own, that no other split goes by."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"speedrun/test").digest()
    return int.from_bytes(digest, "big") < TEST_SHARE * 2**64


def corpus(name: str, books: str) -> Path:
    """A corpus as two token stores, `store` and `test`, of one tokenizer that saw no held-out document."""
    from mosaicjax.data.build import build
    from mosaicjax.data.documents import open_sources
    from mosaicjax.data.tokenizer import train_tokenizer
    from mosaicjax.errors import InputError

    folder = WORK / name
    if (folder / "ready").exists():
        return folder
    if name == "books" and not books:
        raise InputError("the corpus `books` is not built yet", fix="--books FILE.jsonl.xz, once")
    source = books if name == "books" else sysconfig.get_path("stdlib")
    exclude = ["site-packages", "test", "tests", "idle_test"]
    include = [] if name == "books" else ["*.py"]
    documents = open_sources([source], include=include, exclude=exclude)
    folder.mkdir(parents=True, exist_ok=True)
    files = {test: folder / f"{'test' if test else 'rest'}.jsonl" for test in (False, True)}
    written = {test: path.open("w", encoding="utf-8") for test, path in files.items()}
    for document in documents:
        written[is_test(document.text)].write(json.dumps({"text": document.text}) + "\n")
    for file in written.values():
        file.close()
    tokenizer = train_tokenizer([files[False]], folder / "tokenizer", vocab=VOCABULARY, held_out=HELD_OUT)
    for test, store, held_out in ((False, "store", HELD_OUT), (True, "test", 0.0)):
        build(
            [files[test]],
            folder / store,
            tokenizer=tokenizer,
            held_out=held_out,
            workers=1,
            progress=False,
        )
    (folder / "ready").touch()
    return folder


def finished(out: Path, recipe: str, options: Sequence[str]) -> bool:
    """Whether a run is there, done, and of this very recipe: what was broken off goes on."""
    if not (out / "summary.json").exists():
        return False
    from mosaicjax import recipe_file

    given = recipe_file.load(str(ROOT / recipe), list(options)).recipe
    return recipe_file.from_run(str(out)).recipe == given


def trained(recipe: str, options: Sequence[str], out: Path, core: int | None = None) -> dict[str, Any]:
    """A run's own summary; with `core`, of a process that has this core alone.

    Raises: SystemExit with what the run said where it failed, or where another was run before.
    """
    if finished(out, recipe, options):
        found: dict[str, Any] = json.loads((out / "summary.json").read_text())
        return found
    if out.exists():
        raise SystemExit(f"{out} is there, unfinished or of another recipe: delete it to measure again")
    command = [sys.executable, "-m", "mosaicjax.cli", "train", recipe, "--out", str(out), *options]
    bound = None if core is None else partial(os.sched_setaffinity, 0, {core})
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=bound)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2_000:]}")
    found = json.loads((out / "summary.json").read_text())
    return found


def bits_per_byte(run: Path, test: Path) -> float:
    """A finished run's model on the test documents."""
    from mosaicjax import recipe_file
    from mosaicjax.data.store import Store
    from mosaicjax.data.stream import HeldOut
    from mosaicjax.evaluate.heldout import Evaluator
    from mosaicjax.generate import load_run

    recipe = recipe_file.from_run(str(run)).recipe.last
    store = Store.open(test)
    decoder, weights, layout, dtypes, tokenizer = load_run(run)
    held_out = HeldOut(
        {"test": store.split("train")},
        separator=tokenizer.separator,
        seq=recipe.seq,
        isolate=recipe.data.isolate,
    )
    evaluator = Evaluator(decoder, layout, dtypes, held_out, store.tokenizer.token_bytes, 8)
    return evaluator(weights).bits_per_byte


def work_of(recipe: str, options: Sequence[str]) -> dict[str, float]:
    """Tokens and model FLOPs of a recipe, phase by phase, and its parameters."""
    from mosaicjax.models import flops
    from mosaicjax.recipe_file import load
    from mosaicjax.report.shown import flops_of

    loaded = load(str(ROOT / recipe), list(options)).recipe
    decoder, program = loaded.program()
    return {
        "tokens": loaded.tokens,
        "flops": flops_of(loaded, [loaded.steps])[0],
        "parameters": program.trainable.count(),
        "parameters_in_products": flops.per_token(decoder, 1).causal / 6,
    }


def seed_by_seed(
    sides: dict[str, tuple[str, list[str]]], seeds: int, track: str, folder: Path, cores: Sequence[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each side's run with each seed, side by side in time; evaluated one by one, when all are trained."""
    free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for core in cores or [None]:
        free.put(core)

    def train(name: str, seed: int) -> tuple[Path, dict[str, Any]]:
        recipe, given = sides[name]
        core, out = free.get(), folder / "runs" / f"{track}-{name}-{seed}"
        try:
            return out, trained(recipe, [*given, f"--seed={seed}"], out, core)
        finally:
            free.put(core)

    with ThreadPoolExecutor(max(len(cores), 1)) as pool:
        tasks = [
            (name, seed, pool.submit(train, name, seed)) for seed in range(1, seeds + 1) for name in sides
        ]
    for name, seed, task in tasks:
        out, summary = task.result()
        run = measured(out, summary, folder) | {"seed": seed}
        print(
            f"{name}, seed {seed}: {run['test_bits_per_byte']:.4f} bits a byte,"
            f" {run['step_seconds']:.1f} s of steps, {run['seconds']:.1f} s in all",
            flush=True,
        )
        yield name, run


def measured(out: Path, summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a run cost and what it came to."""
    seconds, price = summary["seconds"], summary["cost"]
    return {
        "commit": json.loads((out / "run.json").read_text())["git"],
        "test_bits_per_byte": bits_per_byte(out, folder / "test"),
        "validation_bits_per_byte": summary["heldout"]["bits_per_byte"],
        "step_seconds": seconds["train"] + seconds["data_wait"],
        "seconds_but_compiling": seconds["total"] - seconds["compile"],
        "seconds": seconds["total"],
        "usd": price["usd"] if price else None,
    }


def ratios(standard: dict[str, Any], contender: dict[str, Any]) -> dict[str, Any]:
    """How many times less the contender takes; seconds and dollars seed by seed, with spread."""
    found: dict[str, Any] = {
        name: standard["work"][name] / contender["work"][name] for name in ("tokens", "flops")
    }
    for name in SECONDS_AND_DOLLARS:
        pairs = list(zip(standard["runs"], contender["runs"], strict=True))
        if all(run[name] for pair in pairs for run in pair):
            found[name] = spread([one[name] / other[name] for one, other in pairs])
    return found


def lines(result: dict[str, Any]) -> list[str]:
    """The result for a terminal."""
    said = []
    for name in ("standard", "contender"):
        mine = result[name]
        bits = [run["test_bits_per_byte"] for run in mine["runs"]]
        said.append(
            f"{name:10} {mine['work']['tokens']:>12,} tokens  {mine['work']['flops']:.3g} FLOPs"
            f"  {statistics.median(run['step_seconds'] for run in mine['runs']):7.1f} s of steps"
            f"  {statistics.mean(bits):.4f} bits a byte ({min(bits):.4f} to {max(bits):.4f})"
        )
    times = result["times_less"]
    said.append(
        f"times less: tokens {times['tokens']:.2f}, FLOPs {times['flops']:.2f}, "
        + ", ".join(
            f"{name.replace('_', ' ')} {times[name]['median']:.2f} ({times[name]['least']:.2f} to"
            f" {times[name]['most']:.2f})"
            for name in SECONDS_AND_DOLLARS
            if name in times
        )
    )
    said.append("the target is reached" if result["reached"] else "the target is NOT reached")
    return said


def main() -> int:
    """Run a track and write its result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("track", choices=sorted(TRACKS))
    parser.add_argument("--recipe", default=BEST, help="the contender's")
    parser.add_argument("--override", action="append", default=[], help="of the contender, as --steps=90")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cores", nargs="*", type=int, default=[])
    parser.add_argument("--books", default="")
    parser.add_argument("--json", default=str(RECORDS), help="the records, which the result is put into")
    options = parser.parse_args()
    # Of this process, which evaluates, and of those that train.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    track = TRACKS[options.track]
    folder = corpus(track.corpus, options.books)
    data = f"--data.path={folder.relative_to(ROOT)}/store"
    sides = {
        "standard": (STANDARD, [*track.standard, data]),
        "contender": (options.recipe, [*track.best, *options.override, data]),
    }
    result: dict[str, Any] = {"track": options.track, "machine": machine(PACKAGES)}
    result["cores"] = "one each" if options.cores else "all, one run at a time"
    for name, (recipe, given) in sides.items():
        result[name] = {"recipe": recipe, "options": given, "work": work_of(recipe, given), "runs": []}
    for name, run in seed_by_seed(sides, options.seeds, options.track, folder, options.cores):
        result[name]["runs"].append(run)
    target, found = (
        statistics.mean(run["test_bits_per_byte"] for run in result[name]["runs"]) for name in sides
    )
    result |= {"target": target, "reached": found <= target}
    result["times_less"] = ratios(result["standard"], result["contender"])
    print("\n".join(lines(result)))
    path = Path(options.json)
    records = json.loads(path.read_text()) if path.exists() else {}
    records[f"{options.track}: {options.recipe}"] = result
    path.write_text(json.dumps(records, indent=1) + "\n")
    return 0 if result["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())

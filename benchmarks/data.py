"""How fast tokens are read, and how soon the first batch is there: beside mosaicml-streaming and a memmap.

    python benchmarks/data.py --text FOLDER... --tokenizer FILE --streaming-python PYTHON_THAT_HAS_IT

One core each (`taskset`), one process each, in turn, the same tokens in rows of 2,048: a store that
`mosaicjax data build` makes of the texts given, repeated until there are `--tokens`; the others get its
tokens. Each peer has the best of its settings, tried once each before the rounds; what was tried is kept. A
batch is what the reader gives: ours inputs, targets and weights, Streaming's and the memmap's windows, which
is less.

Then 30 million samples, of 8 tokens so that they fit on a disk: seconds from the construction to the first
batch, fresh and in the middle. Then the build: tokens a second of one worker, beside the tokenizer alone on
the same texts in the same core. Then resident memory with one domain and with fifty.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine, spread  # noqa: E402 after the path, for a call as a script
from mosaicjax.data.arrays import CHUNK_TOKENS, create_array  # noqa: E402
from mosaicjax.data.build import build  # noqa: E402
from mosaicjax.data.documents import open_sources  # noqa: E402
from mosaicjax.data.store import Store  # noqa: E402
from mosaicjax.data.tokenizer import load_tokenizer  # noqa: E402

SEQ, BATCH = 2_048, 256
SHORT_SEQ, MANY_ROWS = 8, 30_000_000
DOMAINS = 50
PEERS = ROOT / "benchmarks" / "peers"
CORE = "0"


def run(*command: Any) -> dict[str, Any]:
    """A reader's line of JSON, from a process of its own on one core."""
    words = ["taskset", "--cpu-list", CORE, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2_000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


class Readers:
    """The readers and their settings, by name."""

    def __init__(self, scratch: Path, streaming: str, batches: int) -> None:
        self.scratch, self.streaming = scratch, streaming
        self.common = ("--seq", SEQ, "--batch", BATCH, "--batches", batches)

    def ours(self) -> dict[str, Any]:
        """`Stream` over the store."""
        return run(sys.executable, PEERS / "stream_reader.py", self.scratch / "store", *self.common)

    def memmap(self, form: str) -> dict[str, Any]:
        """Random windows of an array file."""
        tokens = self.scratch / "tokens.npy"
        return run(sys.executable, PEERS / "memmap_reader.py", tokens, *self.common, "--form", form)

    def mds(self, encoding: str, shuffle: str, workers: int) -> dict[str, Any]:
        """StreamingDataset over shards of one encoding; -1 workers: iterated without a DataLoader."""
        folder = self.scratch / encoding.replace(":", "-")
        if not folder.exists():
            script = (self.streaming, PEERS / "streaming_reader.py", "write")
            run(*script, self.scratch / "tokens.npy", folder, "--seq", SEQ, "--encoding", encoding)
        options = ("--shuffle", shuffle, "--workers", workers)
        return run(self.streaming, PEERS / "streaming_reader.py", "read", folder, *self.common[2:], *options)


def throughput(readers: Readers, rounds: int) -> dict[str, Any]:
    """Tokens a second of each, best settings first found, then in turn."""
    settings: dict[str, list[tuple[Any, ...]]] = {"memmap": [("windows",), ("pairs",)]}
    if readers.streaming:
        encodings = ("bytes", f"ndarray:uint16:{SEQ}")
        settings["mds"] = [(encoding, shuffle, -1) for encoding in encodings for shuffle in ("py1e", "none")]
        settings["mds"] += [("bytes", "py1e", 0), ("bytes", "py1e", 1)]
    tried: dict[str, dict[str, float]] = {}
    best: dict[str, tuple[Any, ...]] = {}
    for name, choices in settings.items():
        found = {choice: getattr(readers, name)(*choice)["tokens_per_second"] for choice in choices}
        # An order without a shuffle is no order to train in: it is measured, and never the best.
        best[name] = max((c for c in choices if "none" not in c), key=found.__getitem__)
        tried[name] = {" ".join(map(str, choice)): speed for choice, speed in found.items()}
        for label, speed in tried[name].items():
            print(f"  {name} {label}: {speed / 1e6:.1f} Mtok/s", flush=True)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *best)}
    for number in range(rounds):
        order = list(results) if number % 2 == 0 else list(results)[::-1]
        for name in order:
            result = readers.ours() if name == "ours" else getattr(readers, name)(*best[name])
            results[name].append(result)
            print(f"  round {number}: {name} {result['tokens_per_second'] / 1e6:.1f} Mtok/s", flush=True)
    speeds = {name: [each["tokens_per_second"] for each in every] for name, every in results.items()}
    return {
        "tried": tried,
        "best": {name: " ".join(map(str, choice)) for name, choice in best.items()},
        "tokens_per_second": {name: spread(every) for name, every in speeds.items()},
        "ours_over": {
            name: spread([mine / theirs for mine, theirs in zip(speeds["ours"], every, strict=True)])
            for name, every in speeds.items()
            if name != "ours"
        },
        "first_batch_seconds": {
            name: statistics.median(each["first_batch_seconds"] for each in every)
            for name, every in results.items()
        },
        "peak_bytes": {name: max(each["peak_bytes"] for each in every) for name, every in results.items()},
    }


def first_batch(scratch: Path, streaming: str, rounds: int) -> dict[str, Any]:
    """Seconds from construction to the first batch of 30 million samples, fresh and resumed."""
    tokens = np.random.default_rng(0).integers(0, 2**16, MANY_ROWS * SHORT_SEQ + 1, np.uint16)
    shard = 2**26
    array = create_array(
        scratch / "bare" / "tokens", dtype="uint16", shape=tokens.shape, shard=shard, chunk=CHUNK_TOKENS
    )
    array.write(tokens).result()
    middle = MANY_ROWS // 2 // BATCH
    common = ("--batch", BATCH, "--batches", 4)
    ours = (sys.executable, PEERS / "stream_reader.py", scratch / "bare", "--bare-rows", MANY_ROWS, *common)
    theirs: tuple[Any, ...] = ()
    if streaming:
        np.save(scratch / "many.npy", tokens)
        script = PEERS / "streaming_reader.py"
        folder = scratch / "many"
        run(
            streaming,
            script,
            "write",
            scratch / "many.npy",
            folder,
            "--seq",
            SHORT_SEQ,
            "--encoding",
            "bytes",
        )
        theirs = (streaming, script, "read", folder, *common, "--shuffle", "py1e", "--workers", -1)
    result: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, step in (("fresh", 0), ("resumed", middle)):
            said = run(*ours, "--seq", SHORT_SEQ, "--step", step, "--shard-tokens", shard)
            result.setdefault(f"ours {name}", {}).setdefault("seconds", []).append(
                said["first_batch_seconds"]
            )
            if theirs:
                said = run(*theirs, "--resume", step * BATCH)
                seconds = result.setdefault(f"mds {name}", {}).setdefault("seconds", [])
                seconds.append(said["first_batch_seconds"])
    for name, each in result.items():
        print(f"  {name}: {statistics.median(each['seconds']):.3f} s", flush=True)
    return {"samples": MANY_ROWS, "seq": SHORT_SEQ} | {
        name: spread(e["seconds"]) for name, e in result.items()
    }


def build_speed(sources: list[Path], tokenizer: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """Tokens a second of a build with one worker, reading and all, and of the tokenizer alone."""
    loaded = load_tokenizer(tokenizer)
    ratios, builds, bare = [], [], []
    for number in range(rounds):
        texts = [document.text for document in open_sources(sources[:1])]
        began = time.perf_counter()
        tokens = sum(sum(map(len, loaded.encode_batch(texts))) for _ in range(2))
        bare.append(tokens / (time.perf_counter() - began))
        out = scratch / f"built-{number}"
        began = time.perf_counter()
        manifest = build(sources, out, tokenizer=loaded, held_out=0.0, workers=1, progress=False)
        built = manifest.splits["train"]
        builds.append((built.tokens - built.documents - 1) / (time.perf_counter() - began))
        ratios.append(builds[-1] / bare[-1])
        shutil.rmtree(out)
    speed, ratio = statistics.median(builds) / 1e6, statistics.median(ratios)
    print(f"  build {speed:.2f} Mtok/s, {ratio:.3f} of the tokenizer's own", flush=True)
    return {
        "build": spread(builds),
        "tokenizer": spread(bare),
        "ratio": spread(ratios),
        "encoder": loaded.encoder,
    }


def memory(scratch: Path, batches: int) -> dict[str, Any]:
    """Resident bytes with one domain, and with fifty: the same store under other names."""
    script = (sys.executable, PEERS / "stream_reader.py")
    common = ("--seq", SEQ, "--batch", BATCH, "--batches", batches)
    said = {count: run(*script, *[scratch / "store"] * count, *common) for count in (1, DOMAINS)}
    return {
        f"{count} domains": {
            name: each[name] for name in ("peak_bytes", "tokens_per_second", "first_batch_seconds")
        }
        for count, each in said.items()
    }


def main() -> None:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", nargs="+", required=True, type=Path)
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--streaming-python", default="", help="a Python that has mosaicml-streaming")
    parser.add_argument("--tokens", type=float, default=64e6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "data.json")
    options = parser.parse_args()
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"load average {load:.2f}: it should be near 0", flush=True)
    os.sched_setaffinity(0, {int(CORE)})
    report: dict[str, Any] = {"machine": machine(("mosaicjax", "tensorstore", "numpy"))}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        texts = [document.text for document in open_sources(options.text)]
        once = scratch / "once.jsonl"
        once.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        one = build(
            [once], scratch / "one", tokenizer=options.tokenizer, held_out=0.0, workers=1, progress=False
        )
        sources = [once] * max(1, round(options.tokens / one.splits["train"].tokens))
        print("build", flush=True)
        report["build"] = build_speed(sources, options.tokenizer, scratch, 2)
        build(
            sources, scratch / "store", tokenizer=options.tokenizer, held_out=0.0, workers=1, progress=False
        )
        split = Store.open(scratch / "store").split("train")
        np.save(scratch / "tokens.npy", split.tokens(0, len(split)))
        report["tokens"] = len(split)
        print(f"throughput on {len(split) / 1e6:.1f}M tokens", flush=True)
        readers = Readers(scratch, options.streaming_python, options.batches)
        report["throughput"] = throughput(readers, options.rounds)
        print("first batch", flush=True)
        report["first_batch"] = first_batch(scratch, options.streaming_python, min(options.rounds, 3))
        report["memory"] = memory(scratch, options.batches)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: report[name] for name in ("throughput", "first_batch", "memory")}, indent=1))


if __name__ == "__main__":
    main()

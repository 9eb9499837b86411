"""Serving on the machine at hand: `mosaicjax serve` beside Transformers' `generate`, on the same weights.

    make install peers
    python benchmarks/serving.py --size 124M          # or quickstart

One model of GPT-2's shape with random weights in float32, exported by `mosaicjax export`'s own code; prompts
of random token ids, greedy, as many tokens written by all. Ours is a process, `mosaicjax serve`, asked over
HTTP by the clients of `mosaicjax bench-serve`, which take their share of the same cores; no setting of it was
searched. Peers are Transformers' `generate`: one request at a time behind a queue, in batches of as many
prompts as there are clients, and all prompts at once; without HTTP, which costs them nothing. `transformers
serve` and llama.cpp's server are not asked. Each peer has the best of its thread counts, tried once each
before the rounds; what was tried is kept.

In a round each level of clients has prompts of its own, which no cache has seen; one contestant after the
other answers them, ours first and last in turn. Ratios are of the same round. The share of the bandwidth
limit is what the weights' bytes of a step, taken once in the median time between two tokens, are of the
bandwidth at which the machine's cores read memory together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import GIGA, machine, spread  # noqa: E402 after the path, for a call as a script
from benchmarks.serving_contestants import (  # noqa: E402
    Batched,
    Contestant,
    Generate,
    OneAtATime,
    Serving,
    Unavailable,
    free_port,
)
from benchmarks.serving_models import SIZES, step_bytes, write_model  # noqa: E402
from mosaicjax.bench_serve.asks import Ask, Range, Synthetic  # noqa: E402
from mosaicjax.bench_serve.client import Answer  # noqa: E402
from mosaicjax.bench_serve.results import summarize  # noqa: E402

OURS = "mosaicjax serve"
ONE, BATCHED, AT_ONCE = "generate, one at a time", "generate, a batch a wave", "generate, all at once"
PACKAGES = ("jax", "jaxlib", "numpy", "torch", "transformers", "fastapi", "uvicorn")
BLOCK_FLOATS = 64 * 2**20 // 4


def bandwidth(repeats: int = 10) -> float:
    """Bytes a second at which all cores together read memory: the best of some passes of dot products."""
    blocks = [np.ones((2, BLOCK_FLOATS), np.float32) for _ in range(os.cpu_count() or 1)]

    def read(block: np.ndarray) -> None:
        for _ in range(4):
            np.dot(block[0], block[1])

    rates = []
    for _ in range(repeats):
        threads = [threading.Thread(target=read, args=(block,)) for block in blocks]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rates.append(4 * sum(block.nbytes for block in blocks) / (time.perf_counter() - began))
    return max(rates)


class Bench:
    """One size of model, its contestants, and what they came to."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.model = write_model(folder / "model", options.size)
        self.levels: list[int] = options.clients
        self.contestants: dict[str, Contestant] = {}
        self.tried: dict[str, dict[str, float]] = {}
        self.seed = 0

    def asks(self, count: int) -> list[Ask]:
        """Prompts that nobody has seen yet."""
        self.seed += 1
        length, most = (Range(n, n) for n in (self.options.prompt_tokens, self.options.max_tokens))
        return Synthetic(length, most, SIZES[self.options.size].vocab).draw(count, self.seed)

    def measure(self, contestant: Contestant, asks: list[Ask], clients: int) -> dict[str, Any]:
        """The figures of one contestant at one level."""
        answers = contestant.run(asks, clients)
        found = summarize(answers)
        self._check(answers, asks)
        return found | {"texts": [each.text.rstrip("\ufffd") for each in answers]}

    def _check(self, answers: list[Answer], asks: list[Ask]) -> None:
        for answer, ask in zip(answers, asks, strict=True):
            if not answer.whole or answer.tokens not in (ask.max_tokens, -1):
                raise Unavailable(f"{answer.tokens} of {ask.max_tokens} tokens: {answer.failure}")

    @contextlib.contextmanager
    def all(self) -> Iterator[None]:
        """Start whoever can be had; end all of them behind the block."""
        with contextlib.ExitStack() as stack:
            try:
                ours = self._ours()
            except Unavailable as error:
                raise SystemExit(f"{OURS}: {error}") from error
            stack.callback(ours.close)
            self.contestants[OURS] = ours
            if not self.options.only_ours:
                self._add_generate(stack)
            yield

    def _ours(self) -> Contestant:
        port = free_port()
        command = [sys.executable, "-m", "mosaicjax.cli", "serve", self.model, "--port", str(port)]
        return Serving(
            command + self.options.serve, port, "/ready", os.cpu_count() or 1, self.folder / "ours"
        )

    def _add_generate(self, stack: contextlib.ExitStack) -> None:
        generate = Generate(self.model, self.options.attention, self.folder / "generate")
        stack.callback(generate.close)
        makes: dict[str, Callable[[int], Contestant]] = {
            ONE: lambda threads: OneAtATime(generate, threads),
            BATCHED: lambda threads: Batched(generate, threads, whole=False),
            AT_ONCE: lambda threads: Batched(generate, threads, whole=True),
        }
        for name, make in makes.items():
            self.contestants[name] = make(self._best_threads(name, make))

    def _best_threads(self, name: str, make: Callable[[int], Contestant]) -> int:
        clients = 1 if name == ONE else max(self.levels)
        asks = self.asks(max(2, clients))
        self.tried[name] = {}
        for threads in sorted({1, os.cpu_count() or 1, *self.options.threads}):
            # Once to warm up.
            make(threads).run(asks[:1], 1)
            found = self.measure(make(threads), asks, clients)
            self.tried[name][str(threads)] = found["written_tokens_per_second"]
            rate = self.tried[name][str(threads)]
            print(f"  {name}, {threads} threads: {rate:.1f} tokens/s", flush=True)
        return int(max(self.tried[name], key=self.tried[name].__getitem__))

    def order(self, number: int, level: int) -> list[str]:
        """Who answers in a round at a level; a lone client has no batch."""
        names = [name for name in self.contestants if level > 1 or name not in (BATCHED, AT_ONCE)]
        return names if number % 2 == 0 else names[::-1]

    def rounds(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Figures by level and contestant, one a round."""
        taken: dict[str, dict[str, list[dict[str, Any]]]] = {
            str(level): {name: [] for name in self.order(0, level)} for level in self.levels
        }
        for contestant in self.contestants.values():
            contestant.run(self.asks(2), 2)
        for number in range(self.options.rounds):
            for level in self.levels:
                asks = self.asks(max(level * self.options.waves, self.options.least))
                for name in self.order(number, level):
                    found = self.measure(self.contestants[name], asks, level)
                    taken[str(level)][name].append(found)
                    first = found["first_token_seconds"]
                    print(
                        f"round {number}, {level} clients, {name}:"
                        f" {found['written_tokens_per_second']:.1f} tokens/s,"
                        f" first token {first['p50']:.3f} s, p99 {first['p99']:.3f} s",
                        flush=True,
                    )
        return taken


def same_texts(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The share of answers that are the same to the last character."""
    pairs = [
        pair for a, b in zip(mine, other, strict=True) for pair in zip(a["texts"], b["texts"], strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def level_result(taken: dict[str, list[dict[str, Any]]], nbytes: int, limit: float) -> dict[str, Any]:
    """What the rounds of one level came to."""

    def figures(each: list[dict[str, Any]]) -> dict[str, Any]:
        found = {
            "tokens_per_second": spread([one["written_tokens_per_second"] for one in each]),
            "first_token_p50_seconds": spread([one["first_token_seconds"]["p50"] for one in each]),
            "first_token_p99_seconds": spread([one["first_token_seconds"]["p99"] for one in each]),
            "between_p50_seconds": spread([one["between_seconds"]["p50"] for one in each]),
        }
        step = found["between_p50_seconds"]["median"]
        return found | {"bandwidth_share": nbytes / step / limit}

    mine = [one["written_tokens_per_second"] for one in taken[OURS]]
    ratios = {
        name: spread([a / one["written_tokens_per_second"] for a, one in zip(mine, each, strict=True)])
        for name, each in taken.items()
        if name != OURS
    }
    same = {name: same_texts(taken[OURS], each) for name, each in taken.items() if name != OURS}
    return {
        **{name: figures(each) for name, each in taken.items()},
        "ours_over": ratios,
        "same_texts_as_ours": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="124M")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--waves", type=int, default=1, help="requests of each client")
    parser.add_argument("--least", type=int, default=4, help="requests of a level")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, nargs="*", default=[], help="of peers, tried beside 1 and all cores"
    )
    parser.add_argument("--attention", default="sdpa", help="of Transformers")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="the rest: options of ours")
    parser.add_argument("--only-ours", action="store_true", help="no peers: nothing is stored")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    limit = bandwidth()
    with tempfile.TemporaryDirectory(prefix="mosaicjax-serving-") as folder:
        bench = Bench(options, Path(folder))
        with bench.all():
            taken = bench.rounds()
    nbytes = step_bytes(options.size)
    results = {
        "size": options.size,
        "prompt_tokens": options.prompt_tokens,
        "max_tokens": options.max_tokens,
        "waves": options.waves,
        "rounds": options.rounds,
        "weight_bytes_a_step": nbytes,
        "bandwidth_gb_per_second": limit / GIGA,
        "threads_tried": bench.tried,
        "levels": {level: level_result(each, nbytes, limit) for level, each in taken.items()},
        "machine": machine(PACKAGES),
    }
    for level, each in results["levels"].items():
        print(level, json.dumps(each["ours_over"]))
    if not options.only_ours:
        out = Path(options.out or ROOT / "benchmarks" / f"serving.{options.size}.json")
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

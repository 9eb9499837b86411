"""Scoring a task's requests: our model beside lm-eval's own `hf`, over the same requests.

    python benchmarks/evaluation.py --requests 2000 --rounds 5

Each round measures both, each in a process of its own: every one compiles anew, and a busy machine is busy
for both. The clock starts with the model in memory and stops with the last answer; what of that was compiling
is given too. The requests are ARC's options and LAMBADA's last words, as lm-eval asks them; both engines'
answers are compared. Needs the extra `eval`, tests/peers.txt, and the corpora beside the project.

Units: seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine, spread  # noqa: E402 after the path, for a call as a script

RESULT = ROOT / "benchmarks" / "evaluation.json"
DATA = ROOT.parent / "shared" / "data"
PACKAGES = ("jax", "jaxlib", "lm_eval", "numpy", "torch", "transformers")


def requests(count: int) -> list[Any]:
    """`count` pairs of a context and a continuation, four of five from ARC."""
    from lm_eval.api.instance import Instance

    def lines(name: str) -> list[dict[str, Any]]:
        text = (DATA / "eval" / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    arc = [
        (f"{each['query']}\nAnswer:", f" {choice}")
        for each in lines("world_knowledge/arc_easy.jsonl")
        for choice in each["choices"]
    ]
    last_words = [
        (each["context"], f" {each['continuation']}")
        for each in lines("language_understanding/lambada_openai.jsonl")
    ]
    words = count // 5
    pairs = arc[: count - words] + last_words[:words]
    assert len(pairs) == count, len(pairs)
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
        for number, pair in enumerate(pairs)
    ]


def ours(model: str, batch: int) -> Any:
    from mosaicjax.harness.lm import language_model
    from mosaicjax.harness.subject import Settings, Subject

    subject = Subject(model, Settings(batch=batch))
    # Loaded now: reading the weights is not scoring.
    assert subject.scorer
    return language_model(subject)


def theirs(model: str, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=batch)


ENGINES = {"mosaicjax": ours, "lm-eval hf": theirs}


def work(engine: str, model: str, count: int, batch: int) -> None:
    """One engine's seconds, those spent compiling, and its answers, as JSON on the last line."""
    import jax

    compiling = 0.0

    def heard(event: str, seconds: float, **unused: Any) -> None:
        nonlocal compiling
        if event.endswith("_duration") and "/compile/" in event:
            compiling += seconds

    jax.monitoring.register_event_duration_secs_listener(heard)
    asked = requests(count)
    loaded = ENGINES[engine](model, batch)
    compiling = 0.0
    began = time.perf_counter()
    answers = loaded.loglikelihood(asked, disable_tqdm=True)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "compile_seconds": compiling, "answers": answers}))


def measured(engine: str, model: str, count: int, batch: int, folder: Path) -> dict[str, Any]:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "work", engine, model, str(count), str(batch)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    with open(folder / "stderr", "w+") as errors:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        if done.returncode:
            errors.seek(0)
            raise SystemExit(f"{engine} failed:\n{errors.read()}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    if sys.argv[1:2] == ["work"]:
        engine, model, count, batch = sys.argv[2:]
        return work(engine, model, int(count), int(batch))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(DATA / "tinystories-260k" / "hf"))
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", default=str(RESULT))
    options = parser.parse_args()
    taken: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for engine in ENGINES:
                found = measured(engine, options.model, options.requests, options.batch, Path(folder))
                taken[engine].append(found)
                rate = options.requests / found["seconds"]
                print(
                    f"round {number} {engine}: {found['seconds']:.1f} s, {rate:.0f} requests/s,"
                    f" {found['compile_seconds']:.1f} s of it compiling",
                    flush=True,
                )
    both = zip(taken["mosaicjax"][0]["answers"], taken["lm-eval hf"][0]["answers"], strict=True)
    pairs = list(both)
    results = {
        "model": Path(options.model).relative_to(DATA).as_posix()
        if Path(options.model).is_relative_to(DATA)
        else Path(options.model).name,
        "requests": options.requests,
        "batch": options.batch,
        "rounds": options.rounds,
        "seconds": {e: spread([each["seconds"] for each in found]) for e, found in taken.items()},
        "compile_seconds": {
            e: spread([each["compile_seconds"] for each in found]) for e, found in taken.items()
        },
        "requests_per_second": {
            e: spread([options.requests / each["seconds"] for each in found]) for e, found in taken.items()
        },
        "largest_difference_nats": max(abs(mine[0] - other[0]) for mine, other in pairs),
        "greedy_differs": sum(mine[1] != other[1] for mine, other in pairs),
        "machine": machine(PACKAGES),
    }
    Path(options.out).write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: results[key] for key in ("seconds", "largest_difference_nats", "greedy_differs")}))


if __name__ == "__main__":
    main()

"""Attention on a CPU, forward and backward, beside PyTorch's SDPA: seconds and memory.

    python benchmarks/kernels/attention_cpu.py      # needs PyTorch: make peers

Causal, float32, batch 1, 12 heads of 64: the result and the gradients of q, k and v for a given gradient.
Ours is `flash_attention` as models call it. SDPA gets the best of its layouts and backends, tried first; what
was tried is kept. Each side is a process of its own, for their thread pools disturb one another; they take
turns, and the median over rounds counts. Memory is the largest resident set of a process's first call at a
length less what was resident before it, inputs made and code loaded: results and what is held on the way. It
is stated against the fastest SDPA and against the one that took least.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine, spread  # noqa: E402 after the path, for a call as a script

RESULT = Path(__file__).with_suffix(".json")
HEADS, HEAD_DIM = 12, 64
LENGTHS = (1_024, 4_096, 8_192)
SDPA = {
    f"{layout} {backend}": (layout, backend)
    for layout in ("heads first", "tokens first")
    for backend in ("FLASH_ATTENTION", "MATH")
}
# Long enough for the way that long ones take, so that its code is loaded.
SHORT = 640
MIB = 2**20


def inputs(length: int) -> list[np.ndarray]:
    """q, k, v and the result's gradient, [1, L, H, C]."""
    rng = np.random.default_rng(length)
    return [rng.standard_normal((1, length, HEADS, HEAD_DIM)).astype(np.float32) for _ in range(4)]


def ours(length: int, threads: int) -> Callable[[], Any]:
    """Compiled, but not yet run at this length."""
    import jax
    import jax.numpy as jnp

    from mosaicjax.kernels.flash_attention import flash_attention

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> Any:
        out, gradients = jax.vjp(lambda *qkv: flash_attention(*qkv, implementation="by_device"), q, k, v)
        return out, gradients(grad)

    arrays = [jnp.asarray(x) for x in inputs(length)]
    compiled = both.lower(*arrays).compile()
    return lambda: jax.block_until_ready(compiled(*arrays))


def sdpa(layout: str, backend: str, length: int, threads: int) -> Callable[[], Any]:
    """Of arrays that lie with heads first, or with tokens first as a projection leaves them."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.set_num_threads(threads)
    turned = [torch.from_numpy(x).transpose(1, 2) for x in inputs(length)]
    q, k, v, grad = (x.contiguous() if layout == "heads first" else x for x in turned)
    leaves = [x.requires_grad_(True) for x in (q, k, v)]

    def call() -> Any:
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        return out, torch.autograd.grad(out, leaves, grad)

    return call


def status(name: str) -> int:
    """A line of the process's status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{name}:")[2].split()[0])


def measure(side: str, length: int, calls: int, threads: int) -> dict[str, Any]:
    """Seconds of each call and the memory of the first, in this process."""

    def made(length: int) -> Callable[[], Any]:
        return ours(length, threads) if side == "ours" else sdpa(*SDPA[side], length, threads)

    made(SHORT)()
    call = made(length)
    # Memory that is freed but held would hide what a call takes. 5 begins the peak anew.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = call()
    memory = status("VmHWM") - before
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        kept = call()
        taken.append(time.perf_counter() - began)
    out, gradients = kept
    total = float(np.sum([np.abs(np.asarray(x.detach() if side != "ours" else x)).sum() for x in gradients]))
    return {"seconds": taken, "memory": memory, "gradients": total}


def run(side: str, length: int, calls: int, threads: int) -> dict[str, Any]:
    """The same in a child with so many threads."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--side", side, "--lengths", str(length), "--calls", str(calls)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} at {length:,}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(length: int, options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Both sides at a length, in turns."""
    tried = {side: run(side, length, 2, threads) for side in SDPA}
    best = min(tried, key=lambda side: min(tried[side]["seconds"]))
    rounds: dict[str, list[dict[str, Any]]] = {"ours": [], best: []}
    for _ in range(options.rounds):
        for side, found in rounds.items():
            found.append(run(side, length, options.calls, threads))
    np.testing.assert_allclose(rounds["ours"][0]["gradients"], rounds[best][0]["gradients"], rtol=1e-4)
    seconds = {side: [statistics.median(one["seconds"]) for one in found] for side, found in rounds.items()}
    memory = {side: [one["memory"] / MIB for one in found] for side, found in rounds.items()}
    speeds = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds[best], strict=True)]
    least = min(one["memory"] / MIB for one in tried.values())
    takes, takes_least = (
        [mine / theirs for mine, theirs in zip(memory["ours"], others, strict=True)]
        for others in (memory[best], [least] * options.rounds)
    )
    return {
        "length": length,
        "sdpa": best,
        "tried_seconds": {side: min(one["seconds"]) for side, one in tried.items()},
        "tried_memory_mib": {side: one["memory"] / MIB for side, one in tried.items()},
        "seconds": {"ours": spread(seconds["ours"]), "sdpa": spread(seconds[best])},
        "memory_mib": {"ours": spread(memory["ours"]), "sdpa": spread(memory[best])},
        "speed_ratio": spread(speeds),
        "memory_ratio": spread(takes),
        "memory_ratio_to_least_tried": spread(takes_least),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=5, help="in a round, of each side")
    parser.add_argument("--side", choices=["ours", *SDPA], help="measure one side here, and print JSON")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    threads = os.cpu_count() or 1
    if options.side:
        print(json.dumps(measure(options.side, options.lengths[0], options.calls, threads)))
        return
    result: dict[str, Any] = {
        "machine": machine(("jax", "jaxlib", "numpy", "torch")),
        "threads": threads,
        "kernel": "xla",
        "dtype": "float32",
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "seed": "the length",
        "rounds": options.rounds,
        "lengths": [],
    }
    for length in options.lengths:
        found = compare(length, options, threads)
        result["lengths"].append(found)
        speed, memory, least = (
            found[name] for name in ("speed_ratio", "memory_ratio", "memory_ratio_to_least_tried")
        )
        print(
            f"{length:6,}: ours {found['seconds']['ours']['median']:.3f} s, SDPA ({found['sdpa']})"
            f" {found['seconds']['sdpa']['median']:.3f} s; of its speed {speed['median']:.2f}"
            f" ({speed['least']:.2f}-{speed['most']:.2f}), of its memory {memory['median']:.2f}"
            f" ({memory['least']:.2f}-{memory['most']:.2f}), of the least memory tried {least['median']:.2f}",
            flush=True,
        )
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

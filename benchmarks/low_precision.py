"""What 8-bit products do to the loss, and to a compiled step: `LowPrecision` beside the compute dtypes.

    python benchmarks/low_precision.py              # needs libtpu and qwix; some 40 minutes on two cores
    python benchmarks/low_precision.py --part loss  # or compiled

Losses: a small model on the bytes of this Python's own sources, in one order of the data and one start a
seed, with each way of multiplying. Given are the mean training loss of the last steps and the loss on files
that were held out, by products in the compute dtype, as `mosaicjax evaluate` has it.

Compiled: the step of a Llama of 1.1B, full remat, on 16 chips of v5e, by the plan's own functions: FLOPs of
8-bit products, bytes of HBM and on the wire, memory, and the predicted step, whose products go at the chip's
rate for their dtype.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402 after the path, for a call as a script
import numpy as np  # noqa: E402

from benchmarks.machine import machine, spread  # noqa: E402
from mosaicjax.data.mixture import TokenStore  # noqa: E402
from mosaicjax.losses import CrossEntropy  # noqa: E402
from mosaicjax.mesh import Mesh  # noqa: E402
from mosaicjax.methods.clip import ClipGradients  # noqa: E402
from mosaicjax.methods.low_precision import LowPrecision  # noqa: E402
from mosaicjax.models import llama, mpt  # noqa: E402
from mosaicjax.models.decoder import Remat  # noqa: E402
from mosaicjax.optim import AdamW, Cosine  # noqa: E402
from mosaicjax.plan.bill import Bill, bill  # noqa: E402
from mosaicjax.plan.kept import cache_dir  # noqa: E402
from mosaicjax.plan.topology import Topology  # noqa: E402
from mosaicjax.program import DecoderLoss, Phase, Program  # noqa: E402
from mosaicjax.recipe import Recipe  # noqa: E402
from mosaicjax.spec import Dtypes, Spec  # noqa: E402
from mosaicjax.step import Step  # noqa: E402

RESULT = Path(__file__).with_suffix(".json")
PACKAGES = ("jax", "jaxlib", "qwix")
STEPS, LAST, SEEDS = 150, 15, (0, 1, 2)
HELD_OUT = 32
"""Rows."""
PHASE = Phase(seq=128, batch=8, microbatch=8)
MODEL = mpt.Config(layers=2, embed=96, heads=4, mlp=384, vocab=256)
FLOAT32, BFLOAT16 = Dtypes(), Dtypes(compute="bfloat16")
WAYS: dict[str, tuple[Dtypes, tuple[LowPrecision, ...]]] = {
    "bfloat16": (BFLOAT16, ()),
    "float32": (FLOAT32, ()),
    "int8, backward inputs": (BFLOAT16, (LowPrecision(),)),
    "int8, backward all": (BFLOAT16, (LowPrecision(backward="all"),)),
    "fp8, backward inputs": (BFLOAT16, (LowPrecision("fp8"),)),
    "fp8, backward all": (BFLOAT16, (LowPrecision("fp8", backward="all"),)),
}
TOPOLOGY = "v5e:4x4"
ROWS = 4
"""Of 2,048 tokens, a chip and step."""
COMPILED: dict[str, tuple[LowPrecision, ...]] = {
    "bfloat16": (),
    "int8, backward inputs": (LowPrecision(),),
    "int8, backward inputs, mlp alone": (LowPrecision(only=("stacks/*/mlp/*",)),),
}


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the standard library's modules, and of those that are held out: every twentieth."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [np.frombuffer(path.read_bytes(), np.uint8) for path in files]
    held = [part for n, part in enumerate(parts) if n % 20 == 0]
    return np.concatenate([part for n, part in enumerate(parts) if n % 20]), np.concatenate(held)


def rows(tokens: np.ndarray, rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    begins = rng.integers(0, len(tokens) - PHASE.seq - 1, count)
    wide = tokens[begins[:, None] + np.arange(PHASE.seq + 1)].astype(np.int32)
    weights = np.ones((count, PHASE.seq), np.float32)
    return {
        "tokens": wide[:, :-1],
        "targets": wide[:, 1:],
        "weights": weights,
        "row": np.arange(count, dtype=np.int32),
    }


def program(dtypes: Dtypes, methods: tuple[LowPrecision, ...]) -> Program:
    decoder, optimizer = MODEL.build(), AdamW(lr=Cosine(peak=3e-3, warmup=30, final=0.1))
    spec = decoder.spec()
    loss = DecoderLoss(decoder, CrossEntropy(), dtypes)
    made = Program(
        spec,
        Spec({}, {}),
        {},
        loss,
        optimizer.build(spec, STEPS),
        optimizer.lr.build(STEPS),
        PHASE,
        dtypes,
    )
    for method in (ClipGradients(1.0), *methods):
        made = method(made)
    return made


def trained(way: str, tokens: np.ndarray, held: np.ndarray) -> list[dict[str, float]]:
    """A run of each seed. Units: nats a byte."""
    dtypes, methods = WAYS[way]
    layout = Mesh(fsdp=(1,)).build(jax.devices()[:1])
    step = Step(program(dtypes, methods), layout, seed=0)
    compiled = step.lower().compile()
    signals = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), step.abstract_signals())
    plain = program(dtypes, ()).loss
    some = rows(held, np.random.default_rng(1), HELD_OUT)

    @jax.jit
    def held_out(weights: Any) -> jax.Array:
        total, weight, _, _ = plain(weights, {}, {}, some, jax.random.key(0), layout)
        return total / weight

    def run(seed: int) -> dict[str, float]:
        state, rng, losses = replace(step, seed=seed).init(), np.random.default_rng(seed), []
        for _ in range(STEPS):
            batch = rows(tokens, rng, PHASE.batch)
            placed = {
                name: jax.device_put(batch[name][None], layout.sharding(*axes))
                for name, (_, _, axes) in step.batch_shapes().items()
            }
            state, _, metrics = compiled(state, {}, placed, signals)
            losses.append(float(metrics["loss"]))
        return {"train": statistics.fmean(losses[-LAST:]), "held_out": float(held_out(state.trainable))}

    return [run(seed) for seed in SEEDS]


def losses() -> dict[str, Any]:
    tokens, held = corpus()
    found: dict[str, Any] = {}
    for way in WAYS:
        runs = trained(way, tokens, held)
        found[way] = {"seeds": runs}
        base = found["bfloat16"]["seeds"]
        for kind in ("train", "held_out"):
            ratios = [mine[kind] / theirs[kind] for mine, theirs in zip(runs, base, strict=True)]
            found[way] |= {
                kind: spread([run[kind] for run in runs]),
                f"{kind}_of_bfloat16": spread(ratios),
            }
        print(
            f"  {way:28} {found[way]['train']['median']:.4f} {found[way]['held_out']['median']:.4f}",
            flush=True,
        )
    sizes = {"train_bytes": len(tokens), "held_out_bytes": len(held), "steps": STEPS, "last": LAST}
    return {
        "model": repr(MODEL),
        "phase": repr(PHASE),
        **sizes,
        "weights": MODEL.build().spec().count(),
        "ways": found,
    }


def recipe(chips: int) -> Recipe:
    """Llama of 1.1B."""
    sizes = {"layers": 16, "embed": 2_048, "heads": 16, "kv_heads": 16, "head_dim": 128, "mlp": 8_192}
    model = llama.Config(**sizes, vocab=32_000, tied=False, remat=Remat.FULL)
    return Recipe(model=model, data=TokenStore("none"), seq=2_048, batch=ROWS * chips, steps=1_000)


def row(found: Bill) -> dict[str, Any]:
    """Units: FLOPs, bytes and seconds of one chip and step."""
    assert found.work and found.fast and found.slow, "it fits"
    products = found.work.compiled - found.work.kernels
    return {
        "program": found.compiled.digest,
        "flops": found.work.compiled,
        "products_flops": products,
        "narrow_flops": found.work.narrow,
        "narrow_share_of_products": found.work.narrow / products,
        "memory_gib": found.compiled.needed / 2**30,
        "hbm_bytes": found.hbm,
        "wire_bytes": found.wire,
        "step_seconds": found.seconds,
        "parts_seconds": {
            kind: (getattr(found.fast, kind) + getattr(found.slow, kind)) / 2
            for kind in ("matrix", "vector", "kernels", "collectives")
        },
    }


def compiled() -> dict[str, Any]:
    topology = Topology.read(TOPOLOGY)
    found: dict[str, Any] = {}
    for way, methods in COMPILED.items():
        mine = replace(recipe(topology.chips), methods=methods)
        found[way] = row(bill(mine, topology, price=None, cache=cache_dir(), say=print))
        print(f"  {way:28} {json.dumps(found[way])}", flush=True)
    return {"topology": TOPOLOGY, "rows_a_chip": ROWS, "ways": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("loss", "compiled"), help="one of both; the other's figures stay")
    wanted = parser.parse_args().part
    for name, run, packages in (("loss", losses, PACKAGES), ("compiled", compiled, (*PACKAGES, "libtpu"))):
        if wanted in (None, name):
            part = {"machine": machine(packages), **run()}
            found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
            found[name] = part
            RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

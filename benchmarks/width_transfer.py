"""Where the best learning rate lies at several widths, with `WidthTransfer` and without.

    python benchmarks/width_transfer.py                                # widths 128, 256 and 512
    python benchmarks/width_transfer.py --widths 64,128,256 --steps 150 --batch 8 --out trial

The text (default: ../shared/data/tinyshakespeare/input.txt) becomes a token store with a tokenizer of its
own. Models of `--layers` layers, as wide as `--widths` says, with heads of 32 and an MLP of twice the width,
are trained on the same rows in the same order with every rate of `--rates`, and their loss on held-out rows
is taken. With the method the narrowest is the base; it is the same model on both sides. A side's best rates
are the vertices of parabolas in log2(rate) through the lowest loss and its neighbours. Losses do not depend
on how busy the machine is.

A width and side is compiled once: without weight decay an update is in proportion to the rate, which is an
argument. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import ROOT, machine
from mosaicjax.data.build import build
from mosaicjax.data.mixture import TokenStore
from mosaicjax.data.tokenizer import train_tokenizer
from mosaicjax.mesh import Mesh, shardings
from mosaicjax.methods.width_transfer import Sizes, WidthTransfer
from mosaicjax.models import mpt
from mosaicjax.optim import AdamW, Cosine
from mosaicjax.recipe import Recipe
from mosaicjax.run_data import Data, open_data
from mosaicjax.spec import Dtypes

TEXT = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
HEAD_DIM, VOCAB, HELD_OUT, SEED = 32, 512, 0.05, 17
PARAGRAPHS = 20
"""So many make a document."""

SIDES = ("with", "without")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--widths", default="128,256,512")
    parser.add_argument("--rates", default="5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2,3.2e-2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heldout-rows", type=int, default=256)
    parser.add_argument("--out", default=str(Path(__file__).with_suffix("")))
    options = parser.parse_args()
    widths = [int(width) for width in options.widths.split(",")]
    rates = [float(rate) for rate in options.rates.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(options.text, Path(folder))
        rows = []
        for width in widths:
            for side in SIDES if width != widths[0] else SIDES[:1]:
                rows += Width(options, store, width, widths[0], side).sweep(rates)
    # The base is plain training: one run stands for both sides.
    rows += [{**row, "side": "without"} for row in rows if row["width"] == widths[0]]
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    settings["text"] = f"{options.text.parent.name}/{options.text.name}"
    result = {
        "machine": machine(("jax", "jaxlib", "optax", "numpy")),
        "settings": settings,
        "best": {side: summary(rows, side, widths) for side in SIDES},
        "rows": rows,
    }
    for side in SIDES:
        print(f"{side}: {json.dumps(result['best'][side])}")
    Path(f"{options.out}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, widths, f"{options.out}.png")


def store_of(text: Path, folder: Path) -> str:
    """A token store of a text, in documents of some paragraphs each."""
    paragraphs = text.read_text(encoding="utf-8").split("\n\n")
    documents = folder / "documents.jsonl"
    with documents.open("w", encoding="utf-8") as file:
        for first in range(0, len(paragraphs), PARAGRAPHS):
            some = "\n\n".join(paragraphs[first : first + PARAGRAPHS])
            file.write(json.dumps({"text": some + "\n"}) + "\n")
    tokenizer = train_tokenizer([documents], folder / "tokenizer", vocab=VOCAB, held_out=HELD_OUT)
    build(
        [documents],
        folder / "store",
        tokenizer=tokenizer,
        held_out=HELD_OUT,
        seed=0,
        workers=1,
        progress=False,
    )
    return str(folder / "store")


class Width:
    """Models of one width on one side, trained one rate after the other."""

    def __init__(self, options: argparse.Namespace, store: str, width: int, base: int, side: str) -> None:
        self.options, self.width, self.side = options, width, side
        sizes = Sizes(embed=base, heads=base // HEAD_DIM, mlp=2 * base)
        recipe = Recipe(
            mpt.Config(
                layers=options.layers,
                embed=width,
                heads=width // HEAD_DIM,
                mlp=2 * width,
                vocab=VOCAB,
            ),
            TokenStore(store),
            seq=options.seq,
            batch=options.batch,
            steps=options.steps,
            seed=SEED,
            # A peak of 1: every rate is a multiple of it.
            optimizer=AdamW(lr=Cosine(peak=1.0, warmup=options.warmup, final=0.1)),
            methods=(WidthTransfer(sizes),) if side == "with" else (),
            dtypes=Dtypes(),
        )
        recipe.check()
        self.data: Data = open_data(recipe)
        _, self.program = recipe.program()
        self.layout = Mesh(fsdp=(1,)).build(jax.devices()[:1])
        self._step, self._loss = jax.jit(self._train, donate_argnums=(0, 1)), jax.jit(self.mean_loss)

    def mean_loss(self, weights: Any, batch: Any) -> jax.Array:
        total, weight, *_ = self.program.loss(weights, {}, {}, batch, jax.random.key(0), self.layout)
        return total / weight

    def _train(self, weights: Any, state: Any, batch: Any, rate: Any) -> Any:
        loss, grads = jax.value_and_grad(self.mean_loss)(weights, batch)
        updates, state = self.program.optimizer.update(grads, state, weights)
        return loss, optax.apply_updates(weights, jax.tree.map(lambda leaf: rate * leaf, updates)), state

    def sweep(self, rates: list[float]) -> list[dict[str, Any]]:
        """A row a rate."""
        places = shardings(self.program.trainable, self.layout)
        first = jax.device_get(self.program.trainable.init(jax.random.key(SEED), "float32", places))
        found = []
        for rate in rates:
            weights = jax.tree.map(jnp.array, first)
            state, losses = self.program.optimizer.init(weights), []
            for step in range(self.options.steps):
                batch = self.data.stream.rows(step, range(self.options.batch))
                loss, weights, state = self._step(weights, state, batch, rate)
                losses.append(float(loss))
                if not math.isfinite(losses[-1]):
                    break
            heldout = self.heldout(weights) if math.isfinite(losses[-1]) else math.nan
            row = {"side": self.side, "width": self.width, "rate": rate, "steps": len(losses)}
            row |= {
                name: value if math.isfinite(value) else None
                for name, value in (("train_loss", float(np.mean(losses[-20:]))), ("heldout_loss", heldout))
            }
            print(json.dumps(row), flush=True)
            found.append(row)
        return found

    def heldout(self, weights: Any) -> float:
        """The mean over evenly spaced held-out rows, as many whole batches as `--heldout-rows` has."""
        held_out, batch = self.data.held_out, self.options.batch
        assert held_out is not None, "documents are held out"
        count = min(self.options.heldout_rows, len(held_out)) // batch * batch
        chosen = [i * len(held_out) // count for i in range(count)]
        each = [held_out.rows(chosen[i : i + batch]) for i in range(0, count, batch)]
        return float(np.mean([float(self._loss(weights, rows)) for rows in each]))


def summary(rows: list[dict[str, Any]], side: str, widths: list[int]) -> dict[str, Any]:
    """Each width's best rate and loss, and the largest of these rates over the smallest."""
    best = {}
    for width in widths:
        mine = [row for row in rows if (row["side"], row["width"]) == (side, width)]
        points = [(row["rate"], row["heldout_loss"]) for row in mine if row["heldout_loss"] is not None]
        best[width] = vertex(sorted(points))
    found = [each["rate"] for each in best.values()]
    return {"widths": best, "rate_moves_by": round(max(found) / min(found), 3)}


def vertex(points: list[tuple[float, float]]) -> dict[str, Any]:
    """The lowest point of a parabola in log2(rate) through the least loss and its neighbours.

    At an edge of the rates it is the edge, and said to be.
    """
    at = min(range(len(points)), key=lambda i: points[i][1])
    grid, loss = points[at]
    if at in (0, len(points) - 1):
        return {"rate": grid, "of_grid": grid, "loss": loss, "edge": True}
    near = points[at - 1 : at + 2]
    a, b, _ = np.polyfit([math.log2(rate) for rate, _ in near], [loss for _, loss in near], 2)
    return {"rate": float(2 ** (-b / (2 * a))), "of_grid": grid, "loss": loss, "edge": False}


def draw(rows: list[dict[str, Any]], widths: list[int], path: str) -> None:
    """Held-out loss against the rate, a line a width, both sides side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for plot, side in zip(figure.subplots(1, 2, sharey=True), SIDES, strict=True):
        for number, width in enumerate(widths):
            mine = [row for row in rows if (row["side"], row["width"]) == (side, width)]
            points = sorted((row["rate"], row["heldout_loss"]) for row in mine if row["heldout_loss"])
            shade = 0.25 + 0.75 * (number + 1) / len(widths)
            plot.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=4,
                color="#1f4e8c",
                alpha=shade,
                label=width,
            )
        plot.set_xscale("log", base=2)
        plot.set_title(f"{side} WidthTransfer", loc="left")
        plot.set_xlabel("peak learning rate")
        plot.grid(color="#e6e6e6", linewidth=0.6)
        plot.spines[["top", "right"]].set_visible(False)
        plot.legend(title="width", frameon=False)
    figure.axes[0].set_ylabel("held-out loss (nats per token)")
    figure.savefig(path)


if __name__ == "__main__":
    main()

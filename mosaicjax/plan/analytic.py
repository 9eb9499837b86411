"""An estimate from a recipe's structure alone, for machines without the TPU compiler.

What it leaves out: norms, nonlinearities and all else that is not a product of matrices, copies, padding, and
what the compiler hides or fails to. It is an outline: `mosaicjax plan` with the compiler is the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from mosaicjax.errors import InputError
from mosaicjax.hardware import Price, cost_usd, mfu, usd_per_million_tokens
from mosaicjax.mesh import LENGTH
from mosaicjax.models import flops
from mosaicjax.models.decoder import Decoder, Remat
from mosaicjax.plan.bill import attention_passes, compares, price_of
from mosaicjax.plan.step_time import Speeds
from mosaicjax.plan.topology import Topology
from mosaicjax.recipe import Recipe
from mosaicjax.report.live import format_count, format_duration, format_usd
from mosaicjax.show import GIB, described, shard_bytes
from mosaicjax.step import Step

LABEL = "an ESTIMATE from structure: nothing was compiled (pip install 'mosaicjax[tpu]' brings the compiler)"


@dataclass(frozen=True)
class Estimate:
    """Units: FLOPs, bytes and seconds of one chip and step."""

    topology: Topology
    recipe: Recipe
    price: Price
    flops: float
    model: float
    model_full: float
    state_bytes: int
    kept_bytes: float
    wire_bytes: float
    matrix: float
    attention: float
    wire: float
    phase_steps: int | None = None

    @property
    def steps(self) -> int:
        """How many steps the bill is for: the recipe's, or those of a phase of it."""
        return self.recipe.steps if self.phase_steps is None else self.phase_steps

    @property
    def seconds(self) -> float:
        """Products at the peak and attention at its schedule's speed, or links where these take longer."""
        return max(self.matrix + self.attention, self.wire)

    @property
    def tokens_per_second(self) -> float:
        """Of all chips together."""
        return self.recipe.batch * self.recipe.seq / self.seconds

    @property
    def usd_per_million_tokens(self) -> float:
        """At best."""
        return usd_per_million_tokens(self.tokens_per_second, self.topology.chips, self.price)


def estimate(recipe: Recipe, topology: Topology, price: Price | None) -> Estimate:
    """What a step takes at best.

    Raises:
        InputError: as `bill`, but for the compiler.
    """
    price = price_of(recipe, topology, price)
    if topology.slices > 1:
        raise InputError(
            "an estimate without the TPU compiler knows no network between slices",
            expected="--slices 1",
            got=topology.slices,
            fix="pip install 'mosaicjax[tpu]'",
        )
    decoder, _ = recipe.program()
    if not isinstance(decoder, Decoder):
        raise InputError("a plan counts FLOPs of decoders by structure; this model is a module of one's own")
    step = described(recipe, topology.chips)
    tokens = recipe.batch * recipe.seq / topology.chips
    model = flops.per_token(decoder, recipe.seq)
    again = flops.recomputed(decoder, recipe.seq)
    passes = list(attention_passes(decoder, recipe, topology))
    masked = sum(each.done - each.useful for each in passes)
    # A reference goes forward alone: a third of what training takes.
    beside = model.causal / 3 if compares(recipe) else 0.0
    whole = (model.causal + again.causal + masked + beside) * tokens
    speeds = Speeds.of(topology, recipe.dtypes.compute)
    sent = wire_bytes(step, compares(recipe))
    state = step.abstract_state()
    links = 2 * len([side for side in topology.grid if side > 1])
    return Estimate(
        topology,
        recipe,
        price,
        flops=whole,
        model=model.causal * tokens,
        model_full=model.full * tokens,
        state_bytes=2 * shard_bytes(state.trainable)
        + shard_bytes((state.optimizer, state.average, step.abstract_frozen())),
        kept_bytes=kept_bytes(decoder, step, recipe.loss.chunk),
        wire_bytes=sent,
        matrix=(whole - tokens * sum(each.done for each in passes)) / speeds.flops,
        attention=tokens * sum(each.done / each.rate for each in passes),
        wire=sent / (max(links, 1) * speeds.link),
    )


def wire_bytes(step: Step, compared: bool = False) -> float:
    """What each chip sends: weights gathered forward and backward, gradients summed, for each microbatch.

    Weights that a loss is `compared` with are gathered forward alone.
    """
    layout, program = step.layout, step.program
    shards = layout.weight_shards
    if shards == 1:
        return 0.0
    size = jax.numpy.dtype(program.dtypes.compute).itemsize
    entries, frozen = program.trainable.count(), program.frozen.count()
    # Whole and in the compute dtype by the compiler, scattered and in the reduce dtype by explicit sums.
    wide = size if layout.sums == "compute" else jax.numpy.dtype(program.dtypes.reduce).itemsize
    summed = wide if layout.explicit else 2 * size
    each = entries * (2 * size + summed) + frozen * 2 * size
    if compared:
        each += (frozen + (entries if program.referenced else 0)) * size
    return program.phase.microbatches * each * (shards - 1) / shards


def kept_bytes(decoder: Decoder, step: Step, chunk: int) -> float:
    """What waits for the backward pass, logits of `chunk` positions (0: all), and two layers' weights."""
    phase, dtypes, dims = step.program.phase, step.program.dtypes, decoder.dims
    size = jax.numpy.dtype(dtypes.compute).itemsize
    rows = phase.microbatch / step.layout.batch_shards * phase.seq
    tensor = step.layout.mesh.shape["tensor"]
    split = tensor if phase.seq % tensor == 0 and step.layout.dim(LENGTH) else 1
    heads, keys = (dims[name] * dims["head_dim"] for name in ("heads", "kv_heads"))
    kept = 0.0
    for _, _, block, layers in decoder.blocks():
        projections, hidden = heads + 2 * keys, (len(block.mlp.inputs) + 1) * dims["mlp"]
        wide = {
            Remat.NONE: projections + heads + hidden,
            Remat.PRODUCTS: projections + heads + len(block.mlp.inputs) * dims["mlp"],
            Remat.DOTS: projections + len(block.mlp.inputs) * dims["mlp"],
            Remat.QKV: projections,
            Remat.ATTENTION: heads,
            Remat.FULL: 0,
        }[decoder.remat]
        # Without remat norms keep the stream in float32, some five times a layer.
        stream = dims["embed"] / split * (5 * 4 / size if decoder.remat is Remat.NONE else 1)
        kept += layers.count * rows * size * (stream + wide / tensor)
    logits = rows * (chunk or phase.seq) / phase.seq * dims["vocab"] / tensor * 2 * 4
    layer = decoder.spec().count() / max(decoder.layers, 1) * size * 2
    return kept + logits + layer


def lines(found: Estimate, name: str) -> Iterator[str]:
    """The page."""
    topology, recipe = found.topology, found.recipe
    assert topology.chip.hbm_bytes, "the table has the memory of every chip that can be planned for"
    there, held = topology.chip.hbm_bytes.value, found.state_bytes + found.kept_bytes
    peak = Speeds.of(topology, recipe.dtypes.compute).flops
    tokens = found.steps * recipe.batch * recipe.seq
    run = found.steps * found.seconds
    yield f"{name} on {topology.title}: {LABEL}"
    yield (
        f"memory    about {held / GIB:.2f} of {there / GIB:.0f} GiB a chip (weights, gradients and optimizer"
        f" {found.state_bytes / GIB:.2f}, activations {found.kept_bytes / GIB:.2f}):"
        f" {'may fit' if held < there else 'does not fit'}"
    )
    yield (
        f"step      at least {found.seconds:.3f} s: products {found.matrix:.3f}, attention"
        f" {found.attention:.3f}, links {found.wire:.3f} beside them"
    )
    yield f"FLOPs     {found.flops:.4g} a chip and step, of them the model's {found.model:.4g} (causal)"
    yield (
        f"MFU       at most {mfu(found.model / found.seconds, 1, peak):.1%} causal,"
        f" {mfu(found.model_full / found.seconds, 1, peak):.1%} full;"
        f" {found.wire_bytes / 1e9:,.1f} GB on the wire"
    )
    yield (
        f"bill      at least ${found.usd_per_million_tokens:.4f} a million tokens; {format_count(tokens)}"
        f" tokens: {format_usd(cost_usd(run, topology.chips, found.price))} in {format_duration(run)}"
    )
    price = found.price
    yield f"          at {format_usd(price.usd_per_chip_hour)} a chip hour ({price.source}, {price.date})"


def to_json(found: Estimate, name: str) -> dict[str, Any]:
    """The same as JSON holds it; `estimate` is what tells it from a plan."""
    return {
        "recipe": name,
        "estimate": LABEL,
        "topology": {
            "name": found.topology.name,
            "slices": found.topology.slices,
            "chips": found.topology.chips,
        },
        "flops": found.flops,
        "model_flops": {"causal": found.model, "full": found.model_full},
        "bytes": {"state": found.state_bytes, "kept": found.kept_bytes, "wire": found.wire_bytes},
        "step_seconds": {
            "at_least": found.seconds,
            "matrix": found.matrix,
            "attention": found.attention,
            "wire": found.wire,
        },
        "usd_per_million_tokens": found.usd_per_million_tokens,
    }

"""The bill: what a recipe's own train step takes and costs on chips that need not be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mosaicjax.errors import InputError
from mosaicjax.hardware import Price, cost_usd, mfu, usd_per_million_tokens
from mosaicjax.kernels import attention_tiles
from mosaicjax.kernels.attention_blocks import Problem, visited_pairs
from mosaicjax.methods.dpo import DPO
from mosaicjax.models import flops
from mosaicjax.models.decoder import Decoder
from mosaicjax.plan import hlo
from mosaicjax.plan.compiled import Compiled, compile_step
from mosaicjax.plan.count import Op, operations, sent, total
from mosaicjax.plan.lints import lints
from mosaicjax.plan.step_time import KernelRate, Speeds, StepTime, device_places, step_time
from mosaicjax.plan.topology import Topology
from mosaicjax.recipe import Recipe
from mosaicjax.spec import Dims
from mosaicjax.step import Step


@dataclass(frozen=True)
class Work:
    """FLOPs of one step on one chip.

    `model` with causal attention, `model_full` with all scores; `recomputed` is what remat and attention's
    backward kernel do again, `masked` the masked entries in blocks that attention's kernels multiply whole:
    and `compared` the forward pass of a reference: these by structure. `compiled` is what the program does;
    `kernels` and `narrow`, the products of 8-bit numbers, are among it.
    """

    model: float
    model_full: float
    recomputed: float
    masked: float
    compiled: float
    kernels: float
    narrow: float = 0.0
    compared: float = 0.0

    @property
    def expected(self) -> float:
        """What the program should do, by structure."""
        return self.model + self.recomputed + self.masked + self.compared


@dataclass(frozen=True)
class Bill:
    """A plan for one topology. `fast` and `slow` are the step with optimistic and pessimistic links.

    Both are None, and all that follows from them, where the program does not fit, and on a CPU, whose speed
    nobody states; there the price may be None too.

    Units: `hbm` and `wire` bytes of one chip a step. `phase_steps` is how many of the recipe's steps are of
    this kind, where it has phases.
    """

    recipe: Recipe
    topology: Topology
    compiled: Compiled
    price: Price | None
    work: Work | None = None
    fast: StepTime | None = None
    slow: StepTime | None = None
    hbm: float = 0.0
    wire: float = 0.0
    lints: tuple[str, ...] = ()
    ops: Sequence[Op] = field(default=(), repr=False)
    phase_steps: int | None = None

    @property
    def tokens(self) -> int:
        """Target tokens of a step."""
        return self.recipe.batch * self.recipe.seq

    @property
    def seconds(self) -> float:
        """Of a step: half-way between optimistic and pessimistic."""
        assert self.fast and self.slow, "only what fits has a time"
        return (self.fast.seconds + self.slow.seconds) / 2

    @property
    def tokens_per_second(self) -> float:
        """Of all chips together."""
        return self.tokens / self.seconds

    @property
    def usd_per_million_tokens(self) -> float:
        """While steps run; compiling, evaluation and saves come on top."""
        assert self.price, "what is timed has a price"
        return usd_per_million_tokens(self.tokens_per_second, self.topology.chips, self.price)

    @property
    def steps(self) -> int:
        """How many steps the bill is for: the recipe's, or those of a phase of it."""
        return self.recipe.steps if self.phase_steps is None else self.phase_steps

    @property
    def run_seconds(self) -> float:
        """All steps of the recipe, or of the phase."""
        return self.steps * self.seconds

    @property
    def run_usd(self) -> float:
        """All steps of the recipe, or of the phase."""
        assert self.price, "what is timed has a price"
        return cost_usd(self.run_seconds, self.topology.chips, self.price)

    def utilization(self, flops_a_step: float, seconds: float | None = None) -> float:
        """Share of a chip's peak that so many FLOPs a step and chip are."""
        peak = self.topology.chip.peak(self.recipe.dtypes.compute) or self.topology.chip.peak("bfloat16")
        assert peak, "the table has the peak of every chip that can be planned for"
        return mfu(flops_a_step / (seconds or self.seconds), 1, peak)


def bill(
    recipe: Recipe,
    topology: Topology,
    *,
    price: Price | None,
    cache: Path | None,
    say: Callable[[str], None] = lambda line: None,
) -> Bill:
    """Compile the recipe's step for a topology and reckon what it takes.

    Raises:
        InputError: no TPU compiler, a mesh that does not match the chips, no price, or no decoder.
    """
    price = price_of(recipe, topology, price) if topology.timed else price or recipe.price
    if topology.slices > 1 and topology.chip.dcn_bandwidth is None:
        raise InputError(f"no speed is known of the network between slices of {topology.chip.name}")
    decoder, program = recipe.program()
    if not isinstance(decoder, Decoder):
        raise InputError("a plan counts FLOPs of decoders by structure; this model is a module of one's own")
    recipe.mesh.axes(topology.chips)
    devices = topology.devices()
    layout = recipe.mesh.build(devices)
    step = Step(program, layout, recipe.seed, measure=recipe.log.norms)
    say(f"compiling the step for {topology.title}")
    compiled = compile_step(step, topology, cache)
    mine = Bill(recipe, topology, compiled, price)
    if not compiled.fits or not topology.timed:
        return mine
    assert price, "what is timed has a price"
    ops = operations(hlo.read(compiled.text))
    places = device_places(list(layout.mesh.devices.flat))
    speeds = Speeds.of(topology, recipe.dtypes.compute)
    rate = kernel_rate(decoder, recipe, topology)
    fast, slow = (step_time(ops, speeds, places, rate, pessimistic=each) for each in (False, True))
    return replace(
        mine,
        work=work(decoder, recipe, topology, ops),
        fast=fast,
        slow=slow,
        hbm=total(ops, "hbm"),
        wire=sent(ops),
        lints=tuple(lints(ops, slow, layout, program.trainable)),
        ops=ops,
    )


def price_of(recipe: Recipe, topology: Topology, given: Price | None) -> Price:
    """What was given, or the recipe's, or the list price.

    Raises:
        InputError: there is none.
    """
    price = given or recipe.price or topology.chip.price
    if price is None:
        raise InputError(f"no price is known for {topology.chip.name}", fix="--usd-per-chip-hour USD")
    return price


def work(decoder: Decoder, recipe: Recipe, topology: Topology, ops: Sequence[Op]) -> Work:
    """FLOPs of a step on one chip, by structure and as compiled."""
    tokens = recipe.batch * recipe.seq / topology.chips
    model = flops.per_token(decoder, recipe.seq)
    again = flops.recomputed(decoder, recipe.seq)
    return Work(
        model=model.causal * tokens,
        model_full=model.full * tokens,
        recomputed=again.causal * tokens,
        masked=masked_per_token(decoder, recipe, topology) * tokens,
        compiled=total(ops, "flops"),
        kernels=sum(op.flops * op.times for op in ops if op.kernel),
        narrow=sum(flops * op.times for op in ops for flops in op.narrow.values()),
        compared=model.causal / 3 * tokens if compares(recipe) else 0.0,
    )


def masked_per_token(decoder: Decoder, recipe: Recipe, topology: Topology) -> float:
    """FLOPs a token that attention's kernels spend on masked entries of blocks that they multiply whole."""
    return sum(each.done - each.useful for each in attention_passes(decoder, recipe, topology))


@dataclass(frozen=True)
class Pass:
    """All runs of one of attention's kernels.

    Units: `done` FLOPs a token, `useful` those on entries that no mask hides; `rate` a chip's FLOPs a second.
    """

    done: float
    useful: float
    rate: float


def compares(recipe: Recipe) -> bool:
    """Whether all rows go forward through the weights of a reference too."""
    return any(isinstance(method, DPO) for method in recipe.methods)


def attention_passes(decoder: Decoder, recipe: Recipe, topology: Topology) -> Iterator[Pass]:
    """Forward and backward kernel of each block, in all layers that it stands for."""
    length, width = recipe.seq, decoder.dims["heads"] * decoder.dims["head_dim"]
    forwards = (1 if decoder.remat.keeps_attention else 2) + compares(recipe)
    for _, _, block, layers in decoder.blocks():
        window = block.attention.window
        shape = _shape(recipe, topology, decoder.dims, window)
        problem, seen = Problem(True, window, 1.0, 0.0, length, length), flops.mean_seen(length, window)
        both = zip(attention_tiles.tilings(*shape), attention_tiles.flops_per_second(*shape), strict=True)
        for products, (tiling, rate) in zip((2 * forwards, 5), both, strict=True):
            fitted = tiling.fitted(length, length)
            visited = visited_pairs(problem, (fitted.queries, fitted.keys)) / length
            each = layers.count * 2 * products * width
            yield Pass(each * visited, each * seen, rate)


def kernel_rate(decoder: Decoder, recipe: Recipe, topology: Topology) -> KernelRate:
    """FLOPs a second of attention's kernels, by the compiler's schedule; of others nothing is known."""
    windows = [block.attention.window for _, _, block, _ in decoder.blocks()]

    def rate(op: Op) -> float | None:
        for n, name in enumerate(("flash_attention_forward", "flash_attention_backward")):
            if name in op.place or op.name.startswith(name):
                scope = next((b for b in range(len(windows)) if f"/block{b}/" in op.place), 0)
                return attention_tiles.flops_per_second(
                    *_shape(recipe, topology, decoder.dims, windows[scope])
                )[n]
        return None

    return rate


def _shape(
    recipe: Recipe, topology: Topology, dims: Dims, window: int
) -> tuple[str, str, int, int, int, int]:
    """What a table of attention's blocks is asked for."""
    dim = dims["head_dim"]
    return topology.chip.name, recipe.dtypes.compute, dim, dim, recipe.seq, window

"""A run before its first step: data opened, recipe compared, step built, state drawn or restored."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from mosaicjax import processes, recipe_file, saved, storage
from mosaicjax.checkpoint import Checkpoints, complete_steps
from mosaicjax.errors import InputError
from mosaicjax.hardware import Price, find_chip
from mosaicjax.hub import start
from mosaicjax.hub.base import Base, find_base, read_base, save_base
from mosaicjax.hub.grow import Growth
from mosaicjax.hub.model_dir import MODEL_JSON
from mosaicjax.log import BEFORE_FIRST_STEP, METRICS, RUN_JSON, read_rows
from mosaicjax.models import flops
from mosaicjax.models.model import Model
from mosaicjax.recipe import Recipe
from mosaicjax.recipe_file import Loaded
from mosaicjax.run_data import Data, open_data
from mosaicjax.spec import Referenced, split, whole_spec
from mosaicjax.step import Step, TrainState

TOKENIZER = "tokenizer"
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorstore",
    "numpy",
    "mosaicjax",
)


@dataclass(frozen=True)
class Cursor:
    """Where a run stands beside its state; saved with every checkpoint.

    `skips` are data steps left out, those of `rollbacks` (`rolled_back`) among them; `tokens` target tokens
    seen, `data` a digest of the training tokens up to `phase`, `seconds` the time spent so far by part,
    earlier processes included; `recent` are the last losses, where the recipe watches them.
    """

    step: int
    tokens: int
    data: str
    seconds: dict[str, float]
    seed: int
    trainable: list[str]
    skips: tuple[int, ...] = ()
    phase: int = 0
    rolled_back: tuple[int, ...] = ()
    rollbacks: int = 0
    recent: tuple[float, ...] = ()


@dataclass(frozen=True)
class Hardware:
    """What a run is billed for.

    `chips` of CPU machines are processes. `peak_flops` is one chip's in the compute dtype, None where nobody
    states it.
    """

    name: str
    chips: float
    price: Price | None
    peak_flops: float | None


@dataclass(frozen=True)
class Ready:
    """All that the loop needs, with nothing of it started; `decoders`, `steps` and FLOPs are by phase.

    `base` says where the weights lie that adapters stand on, or that a loss compares with; None where the
    run has all weights itself.
    `grows` says how tables of tokens become longer than those of `init_from`.
    """

    loaded: Loaded
    out: str
    data: Data
    decoders: tuple[Model, ...]
    steps: tuple[Step, ...]
    hardware: Hardware
    flops_per_token: tuple[flops.Flops, ...]
    cursor: Cursor
    base: Base | None
    grows: Growth | None

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.loaded.recipe

    @property
    def decoder(self) -> Model:
        """The last phase's model: the one that the run trains."""
        return self.decoders[-1]

    @property
    def step(self) -> Step:
        """The first phase's step: weights, state and mesh are those of all."""
        return self.steps[0]


def prepare(loaded: Loaded, out: str, say: Callable[[str], None]) -> Ready:
    """Check everything, compare with what `out` holds, and build the step; all processes together.

    Raises:
        InputError: on every process, whichever found it.
    """
    recipe = loaded.recipe
    with processes.refused_by_all("the recipe and its data"):
        recipe.program()
        data = open_data(recipe)
        storage.make_dirs(out)
        steps = complete_steps(out)
        # Before its first checkpoint a run has nothing that another recipe could contradict.
        if storage.exists(storage.join(out, MODEL_JSON)):
            raise InputError(
                f"{out} holds an imported model",
                fix=f"another --out, with --init-from {out} to start from it",
            )
        if steps and storage.exists(storage.join(out, recipe_file.RECIPE_JSON)):
            before = recipe_file.from_run(out)
            recipe_file.check_code(before, loaded, out)
            cursor_then = Checkpoints(out).cursor(max(steps))
            reached = max(steps) + len(cursor_then.get("skips", ()))
            for change in recipe_file.check_continues(before.recipe, recipe, out, reached):
                say(f"changed since the last time: {change}")
    check_alike(loaded, data.digest)
    latest = int(processes.broadcast_text(str(max(steps, default=-1)), "the last checkpoint"))
    with processes.refused_by_all("the mesh and the model"):
        layout = recipe.mesh.build(jax.devices())
        check_sums(recipe)
        phases = [recipe.in_phase(number) for number in range(len(recipe.phases) + 1)]
        each = [phase.program() for phase in phases]
        made = tuple(Step(program, layout, recipe.seed, measure=recipe.log.norms) for _, program in each)
        program = each[0][1]
        cursor = Cursor(
            0, 0, data.digests[0], {}, recipe.seed, [name for name, _ in program.trainable.items()]
        )
        if latest >= 0:
            cursor = read_cursor(out, latest, data)
            data = replace(data, stream=data.stream.skipping({*recipe.skips, *cursor.rolled_back}))
        base = grows = None
        if saved.adapts(made[0]) or (program.referenced and recipe.init_from):
            base = read_base(out) if latest >= 0 else find_base(recipe.init_from)
        if latest < 0 and recipe.init_from:
            spec = each[0][0].spec()
            grows = start.find_growth(recipe.init_from, spec, data.tokenizer)
            if grows and program.referenced:
                raise InputError(
                    f"DPO with tokens new to {recipe.init_from}, of which the reference knows nothing",
                    fix="a first run of these tokens that it begins from",
                )
            if grows and base is not None:
                raise InputError(
                    f"LoRA with tokens new to {recipe.init_from}, whose rows would stay as they begin",
                    fix="train all weights, or a first run of these tokens that it begins from",
                )
            for line in start.check_start(recipe.init_from, recipe.model, spec, grows):
                say(line)
        cursor = replace(cursor, skips=data.stream.skips, seconds=seconds_spent(out, cursor.seconds))
    decoders = tuple(decoder for decoder, _ in each)
    lengths = [phase.seq for phase in phases]
    counts = tuple(flops.per_token(*phase) for phase in zip(decoders, lengths, strict=True))
    return Ready(loaded, out, data, decoders, made, hardware(recipe), counts, cursor, base, grows)


def check_sums(recipe: Recipe) -> None:
    """Refuse narrow explicit sums on a CPU, where jaxlib 0.10.2 ends the process with a failed check.

    Raises:
        InputError: with the way out.
    """
    narrow = recipe.mesh.sums == "compute" and recipe.dtypes.compute in ("bfloat16", "float16")
    if recipe.mesh.gather == "explicit" and narrow and jax.devices()[0].platform == "cpu":
        raise InputError(
            f"XLA for CPUs cannot sum {recipe.dtypes.compute} over devices by explicit gathers",
            fix="--mesh.sums reduce, or --dtypes.compute float32",
        )


def check_alike(loaded: Loaded, digest: str) -> None:
    """Refuse a job whose processes were given different recipes or hold different data.

    Raises:
        InputError: on every process, naming those that differ from the first.
    """
    said = recipe_file.to_json(loaded.recipe) + recipe_file.code(loaded.source) + digest
    mine = hashlib.sha256(said.encode()).hexdigest()
    digests = processes.exchange(mine, "what was given to each process")
    other = [index for index, theirs in enumerate(digests) if theirs != digests[0]]
    if other:
        raise InputError(
            f"process {', '.join(map(str, other))} was given another recipe or other data than process 0",
            fix="the same recipe, overrides and token store everywhere",
        )


def seconds_spent(out: str, before: dict[str, float]) -> dict[str, float]:
    """A checkpoint's seconds, with those that a killed process spent after it: they are paid for too."""
    if not storage.exists(storage.join(out, METRICS)):
        return before
    logged = [row["time"].get("elapsed_seconds", 0.0) for row in read_rows(out)]
    return {**before, "total": max([before.get("total", 0.0), *logged])}


def read_cursor(out: str, step: int, data: Data) -> Cursor:
    """The cursor of a checkpoint.

    Raises:
        InputError: it was trained on other tokens than these, or with other steps left out.
    """
    values = Checkpoints(out).cursor(step)
    lists = {name: tuple(values.get(name, ())) for name in ("skips", "rolled_back", "recent")}
    cursor = Cursor(**{**values, **lists})
    digest_now = data.digests[min(cursor.phase, len(data.digests) - 1)]
    if cursor.data != digest_now:
        raise InputError(
            f"{out} was trained on other tokens than the store holds now",
            expected=f"digest {cursor.data[:12]}",
            got=digest_now[:12],
            fix="the store it began with, or another --out",
        )
    reached = step + len(cursor.skips)
    past, now = (
        tuple(skip for skip in skips if skip < reached)
        for skips in (cursor.skips, sorted({*data.stream.skips, *cursor.rolled_back}))
    )
    if past != now:
        raise InputError(
            f"{out} has left out other data steps so far", expected=f"skips that begin {past}", got=now
        )
    return cursor


def hardware(recipe: Recipe) -> Hardware:
    """The chips at hand and their price: the recipe's, or else the list price."""
    devices = jax.devices()
    chip = find_chip(devices[0].device_kind)
    if chip is None:
        return Hardware(devices[0].device_kind, float(len(devices)), recipe.price, None)
    chips = float(processes.current().count) if devices[0].platform == "cpu" else chip.chips(len(devices))
    return Hardware(chip.name, chips, recipe.price or chip.price, chip.peak(recipe.dtypes.compute))


def first_state(ready: Ready) -> tuple[TrainState, Any]:
    """State and what a step holds beside it, as the cursor says: restored, from other weights, or drawn.

    Raises:
        InputError: a checkpoint of other weights.
    """
    step, recipe, base = ready.step, ready.recipe, ready.base
    state: TrainState | None = None
    frozen: Any = {}
    if ready.cursor.step:
        with Checkpoints(ready.out) as checkpoints:
            held = checkpoints.restore(ready.cursor.step, saved.abstract(step))
        state, frozen = saved.parts(step, held)
    if saved.adapts(step):
        assert base is not None, "adapters stand on weights"
        frozen = start.weights(base.path, base.step, step.abstract_frozen())
        return state or step.init(), frozen
    if state is None and recipe.init_from:
        trainable, frozen = split(began(ready), step.program.trainable, step.program.frozen)
        state = step.start(trainable)
    elif state is None:
        state, frozen = step.init(), step.drawn(step.program.frozen)
    return state, Referenced(frozen, reference(ready)) if step.program.referenced else frozen


def began(ready: Ready) -> Any:
    """The weights of `init_from`: those of the checkpoint that the run stands on, where it remembers one."""
    step, recipe, base = ready.step, ready.recipe, ready.base
    abstract = saved.abstract_weights(step)
    if base is not None:
        return start.weights(base.path, base.step, abstract)
    spec = whole_spec(step.program.trainable, step.program.frozen)
    return start.begin(recipe.init_from, spec, ready.grows, abstract, recipe.seed)


def reference(ready: Ready) -> Any:
    """The trainable weights as the run began with them: read again where they lie, or drawn again."""
    program = ready.step.program
    if not ready.recipe.init_from:
        return ready.step.drawn(program.trainable)
    return split(began(ready), program.trainable, program.frozen)[0]


def record(ready: Ready, program: str) -> None:
    """Put into the run directory what it takes to run it again, and where it ran. The primary does it.

    `program` is the digest of the lowered step.
    """
    if not processes.current().primary:
        return
    recipe_file.save(ready.out, ready.loaded)
    if ready.base is not None:
        save_base(ready.out, ready.base)
    for file in ready.data.tokenizer.files:
        storage.copy_file(str(file), storage.join(ready.out, TOKENIZER, Path(file).name))
    named = json.dumps({"eos_token": ready.data.stores[0].manifest.tokenizer.separator_token})
    storage.write_text(storage.join(ready.out, TOKENIZER, "tokenizer_config.json"), named + "\n")
    text = json.dumps(surroundings(ready, program), indent=1) + "\n"
    storage.write_text(storage.join(ready.out, RUN_JSON), text)


def surroundings(ready: Ready, program: str) -> dict[str, Any]:
    """Command, versions, devices, seed, dtypes and code path of a run."""
    devices = jax.devices()
    return {
        "command": shlex.join(["mosaicjax", *sys.argv[1:]]),
        "git": git_commit(),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
        "mesh": dict(ready.step.layout.mesh.shape),
        "gather": ready.recipe.mesh.gather,
        "attention": ready.recipe.attention.on(devices[0].platform).value,
        "program": program,
        "seed": ready.recipe.seed,
        "dtypes": vars(ready.recipe.dtypes),
        "parameters": ready.decoder.spec().count(),
        "data": ready.data.digest,
        "first_step": ready.cursor.step,
    }


def version(package: str) -> str:
    """A package's version; "not installed" where it is found on the path alone, as in a bare checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def git_commit() -> str:
    """The commit of the source at hand, with `+changes` where it differs; "unknown" outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def resume_row(cursor: Cursor) -> int:
    """The last step whose metrics stay when a run goes on."""
    return cursor.step if cursor.step else BEFORE_FIRST_STEP


def chips_text(ready: Ready) -> str:
    """The model and where it runs, in one line."""
    count = ready.decoder.spec().count()
    mesh = (
        " x ".join(f"{name} {size}" for name, size in ready.step.layout.mesh.shape.items() if size > 1)
        or "1 device"
    )
    tokens = ready.recipe.tokens
    return (
        f"{count / 1e6:,.2f}M parameters on {mesh}; {ready.recipe.steps:,} steps, {tokens / 1e6:,.2f}M tokens"
    )


def epochs(ready: Ready) -> float:
    """How often the run goes over its data, summed over phases."""
    steps = (steps for _, steps in ready.recipe.in_phases)
    each = zip(ready.data.stream.streams, steps, strict=True)
    return sum(steps * stream.batch / max(stream.rows_per_epoch, 1) for stream, steps in each)

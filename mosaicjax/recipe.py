"""The run as data: what a recipe says, checked, and the program that it means."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax

from mosaicjax.data.mixture import Rows, TrainingData
from mosaicjax.data.phased import begin_of
from mosaicjax.errors import InputError
from mosaicjax.hardware import Price
from mosaicjax.kernels.flash_attention import Implementation
from mosaicjax.losses import CrossEntropy
from mosaicjax.mesh import Mesh
from mosaicjax.methods.dpo import DPO
from mosaicjax.methods.lora import LoRA
from mosaicjax.models.decoder import Decoder
from mosaicjax.models.family import Family
from mosaicjax.models.model import Model
from mosaicjax.muon import Muon
from mosaicjax.optim import AdamW, Optimizer
from mosaicjax.program import DecoderLoss, Method, Phase, Program
from mosaicjax.spec import Dtypes, Spec
from mosaicjax.spikes import Ignore, OnSpike

WHOLE = 0
"""As many as there are: a microbatch of the whole batch, all held-out rows, no limit on a count."""

OWN = -1
"""As many as a task itself says."""


@dataclass(frozen=True)
class Eval:
    """Held-out loss every so many steps (0: at the end alone), over `rows` rows (WHOLE: all of them).

    The loss at the end is always over all held-out rows.
    """

    every: int = 500
    rows: int = WHOLE


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval in the loop, by name or as `.yaml` files, every so many steps and at the end.

    Of each task the first `limit` documents (WHOLE: all), with `shots` examples before each (OWN: what the
    task says), `batch` rows at once. `every` 0 is at the end alone. Needs the extra `eval`, and one process.
    """

    names: tuple[str, ...] = ()
    every: int = 0
    limit: int = WHOLE
    shots: int = OWN
    batch: int = 32

    def check(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            InputError: with the field.
        """
        for name, least in (("every", 0), ("limit", 0), ("shots", OWN), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(
                    f"tasks.{name} of the recipe", expected=f"{least} or more", got=getattr(self, name)
                )


@dataclass(frozen=True)
class Save:
    """A checkpoint every so many steps (0: at the end alone).

    The last `keep` stay, and every multiple of `keep_every` (0: no others).
    """

    every: int = 500
    keep: int = 3
    keep_every: int = 0


@dataclass(frozen=True)
class Log:
    """A line of metrics every so many steps; TensorBoard events beside it.

    `norms` adds the root mean square of each layer's gradients, updates and outputs.
    """

    every: int = 1
    tensorboard: bool = True
    norms: bool = False


@dataclass(frozen=True)
class Later:
    """What is otherwise from a data step on, counted from 0; None: as before it.

    `model` may have other windows, dropout or remat, but must have the same weights: with several phases a
    window grows step by step.

    Units: as those of the recipe. With --skips a phase begins as many steps of training earlier.
    """

    step: int
    seq: int | None = None
    batch: int | None = None
    microbatch: int | None = None
    data: TrainingData | None = None
    model: Family | None = None


@dataclass(frozen=True)
class Recipe:
    """One run: a model, its data, and how it is trained.

    Units: `seq` target tokens a row; `batch` rows a step over all devices; `microbatch` rows at once over all
    devices (WHOLE: the batch), which changes memory and rounding but not the gradient. `methods` are applied
    in the order listed. `skips` are data steps left out, counted from 0 (past a batch that brought a NaN);
    `on_spike` says what happens when the loss jumps (`mosaicjax.spikes`). `phases` change the data and the
    shape of batches on the way; each is compiled once, and held-out loss is always that of the last.
    `init_from` is a run, an imported model or a Hugging Face directory whose weights start this one ("":
    drawn from the seed); of a run with a method that averages weights it takes the averages.
    `attention` says who computes it: by default our TPU kernel on TPUs and plain XLA elsewhere. `price`
    overrides the list price of the chip.
    """

    model: Family
    data: TrainingData
    seq: int = 2_048
    batch: int = 256
    microbatch: int = WHOLE
    steps: int = 4_800
    seed: int = 17
    optimizer: Optimizer = AdamW()
    loss: CrossEntropy = CrossEntropy()
    methods: tuple[Method, ...] = ()
    mesh: Mesh = Mesh()
    dtypes: Dtypes = Dtypes(param="float32", compute="bfloat16", reduce="float32")
    eval: Eval = Eval()
    save: Save = Save()
    log: Log = Log()
    attention: Implementation = Implementation.BY_DEVICE
    init_from: str = ""
    skips: tuple[int, ...] = ()
    on_spike: OnSpike = Ignore()
    price: Price | None = None
    phases: tuple[Later, ...] = ()
    tasks: Tasks = Tasks()

    def check(self) -> None:
        """Refuse what cannot run, before any device starts.

        Raises:
            InputError: with the field, expected and got.
        """
        least = {"seq": 1, "batch": 1, "microbatch": 0, "steps": 1, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(
                    f"{name} of the recipe", expected=f"{bound} or more", got=getattr(self, name)
                )
        steps = [0, *(later.step for later in self.phases)]
        if steps != sorted(set(steps)):
            raise InputError("steps of the recipe's phases", expected="increasing, from 1 on", got=steps[1:])
        for part in ("eval", "save", "log"):
            for name, value in vars(getattr(self, part)).items():
                if value < 0 or ((part, name) in {("save", "keep"), ("log", "every")} and value < 1):
                    raise InputError(f"{part}.{name} of the recipe", expected="a positive number", got=value)
        if self.microbatch > self.batch:
            raise InputError(
                "microbatch", expected=f"at most the batch's {self.batch} rows", got=self.microbatch
            )
        if self.seed >= 2**32:
            raise InputError("seed of the recipe", expected="below 2**32", got=self.seed)
        wide = [name for name, dtype in vars(self.dtypes).items() if dtype == "float64"]
        if wide and not jax.config.read("jax_enable_x64"):
            raise InputError(
                f"dtypes.{wide[0]} float64 needs 64 bits in jax", fix="JAX_ENABLE_X64=1 before the command"
            )
        self.tasks.check()
        self._check_adapters()
        self._check_pairs()
        model = self.model.build()
        model.check(self.seq)
        self.loss.check(self.seq)
        self.data.check()
        self.on_spike.check()
        if self.attention is not Implementation.BY_DEVICE and not isinstance(model, Decoder):
            raise InputError(
                "attention of a module of one's own, which brings its own",
                expected=Implementation.BY_DEVICE.name,
                got=self.attention.name,
            )
        if self.loss.chunk and not isinstance(model, Decoder):
            raise InputError(
                "loss.chunk with a module of one's own, whose logits come whole",
                expected=0,
                got=self.loss.chunk,
            )
        for number in range(1, len(self.phases) + 1):
            try:
                self.in_phase(number).check()
                _check_same_weights(model, self.in_phase(number).model.build())
            except InputError as error:
                raise InputError(
                    f"phase {number} of the recipe, from step {steps[number]} on: {error}"
                ) from error

    def _check_adapters(self) -> None:
        """Refuse adapters without weights to stand on, or with an optimizer that cannot tell their matrices.

        Raises:
            InputError: with the field.
        """
        if not any(isinstance(method, LoRA) for method in self.methods):
            return
        if not self.init_from:
            raise InputError(
                "LoRA of weights drawn from the seed, which its run would not keep",
                expected="init_from: a run, an imported model or a Hugging Face directory",
            )
        if isinstance(self.optimizer, Muon):
            raise InputError(
                "LoRA with Muon, which tells matrices by the axes of the model's own weights",
                expected="another optimizer, such as AdamW",
                got="Muon",
            )

    def _check_pairs(self) -> None:
        """Refuse pairs of answers without what learns from them, and the other way round.

        Raises:
            InputError: with the way out.
        """
        compares = any(isinstance(method, DPO) for method in self.methods)
        if compares and self.data.rows is not Rows.PAIRS:
            raise InputError(
                "the method DPO learns from preference pairs",
                expected="data.rows PAIRS, of a store built from rows with chosen and rejected",
                got=self.data.rows.name,
            )
        if not compares and self.data.rows is Rows.PAIRS:
            raise InputError(
                "data.rows PAIRS without a method that compares their answers", fix="methods=(..., DPO())"
            )

    def in_phase(self, number: int) -> Recipe:
        """The recipe as it is from the begin of a phase on, without phases; 0 is what it begins with."""
        found = replace(self, phases=())
        for later in self.phases[:number]:
            given = {
                name: value for name, value in vars(later).items() if name != "step" and value is not None
            }
            if later.batch is not None and later.microbatch is None and found.microbatch > later.batch:
                given["microbatch"] = WHOLE
            found = replace(found, **given)
        return found

    @property
    def last(self) -> Recipe:
        """The recipe as it is at its end: its model is what the run trains."""
        return self.in_phase(len(self.phases))

    @property
    def in_phases(self) -> list[tuple[Recipe, int]]:
        """The recipe as it is in each phase, and how many of its steps those are."""
        left_out = sorted(self.skips)
        begins = [begin_of(later.step, left_out) for later in self.phases]
        ends = [min(each, self.steps) for each in (*begins, self.steps)]
        return [
            (self.in_phase(number), end - begin)
            for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
        ]

    @property
    def longest(self) -> int:
        """The most target tokens that a row has in any phase."""
        return max(recipe.seq for recipe, _ in self.in_phases)

    @property
    def tokens(self) -> int:
        """Target tokens of all steps, with rows full."""
        return sum(recipe.batch * recipe.seq * steps for recipe, steps in self.in_phases)

    def phase(self) -> Phase:
        """The shape of its first batches."""
        return Phase(self.seq, self.batch, self.microbatch or self.batch)

    def program(self) -> tuple[Model, Program]:
        """The model, and the program of its train step, the first phase's, with all methods applied."""
        decoder = self.model.build()
        if isinstance(decoder, Decoder):
            decoder = decoder.with_attention(self.attention)
        spec = decoder.spec()
        loss = DecoderLoss(
            decoder,
            self.loss,
            self.dtypes,
            packed=self.data.isolate,
            measure=self.log.norms,
            domains=len(self.data.stores()),
        )
        program = Program(
            trainable=spec,
            frozen=Spec({}, {}),
            state={},
            loss=loss,
            optimizer=self.optimizer.build(spec, self.steps),
            rate=self.optimizer.lr.build(self.steps),
            phase=self.phase(),
            dtypes=self.dtypes,
            heavy=self.optimizer.heavy,
            evaluated=self.optimizer.evaluated,
            steps=self.steps,
        )
        for method in self.methods:
            program = method(program)
        return decoder, program


def _check_same_weights(first: Model, later: Model) -> None:
    """Refuse a phase whose model has other weights.

    Raises:
        InputError: with those that differ.
    """
    before, after = (
        {name: param.shape(model.dims) for name, param in model.spec().items()} for model in (first, later)
    )
    if before != after:
        other = sorted(name for name in before | after if before.get(name) != after.get(name))
        raise InputError(
            "its model has other weights", expected="those of the recipe's model", got=", ".join(other[:3])
        )


def check_vocabulary(model_vocab: int, tokenizer_size: int, store: str) -> None:
    """Refuse a tokenizer with ids that the model lacks.

    Raises:
        InputError: with both sizes.
    """
    if tokenizer_size > model_vocab:
        raise InputError(
            f"the tokenizer of {store} is larger than the model's vocabulary",
            expected=f"at most {model_vocab} ids",
            got=tokenizer_size,
            fix=f"--model.vocab {-(-tokenizer_size // 128) * 128}",
        )

"""The loop: from a recipe to a run directory that holds the model."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import Array

from mosaicjax import processes, saved, storage
from mosaicjax.checkpoint import Checkpoints
from mosaicjax.clocks import Clocks
from mosaicjax.errors import Diverged, InputError
from mosaicjax.evaluate.heldout import Loss
from mosaicjax.evaluate.of_run import Measure, measure_of
from mosaicjax.evaluate.pairs import PairScores
from mosaicjax.feed import Feed
from mosaicjax.hardware import cost_usd, mfu
from mosaicjax.host_memory import Lent
from mosaicjax.log import MetricsLog, Row, read_rows
from mosaicjax.nonfinite import first_nonfinite
from mosaicjax.plan.kept import planned
from mosaicjax.program import DOMAIN_TOKENS
from mosaicjax.recipe import WHOLE
from mosaicjax.report.live import LiveLine, Mfu, Progress
from mosaicjax.report.summary import Heldout, HeldoutPairs, Outcome
from mosaicjax.roll_back import rolled_back
from mosaicjax.run import Ready, first_state, record, resume_row
from mosaicjax.spikes import RollBack, Spiked
from mosaicjax.step import Signals, digest
from mosaicjax.stop_request import StopRequest

GO, STOP, CANNOT_READ = 0, 1, 2
"""What a process says with each step; the largest counts for all."""

Score = Callable[[Any], dict[str, float]]
"""What scores weights on tasks, by name."""

SPEED_STEPS = 20
"""The live line's speed is the mean over so many steps."""


@dataclass(frozen=True)
class Profile:
    """Steps to trace: from the start of `first` to the end of `last`, counted from 1."""

    first: int
    last: int


class Run:
    """A run under way; what changes from step to step."""

    def __init__(
        self,
        ready: Ready,
        started: float,
        say: Callable[[str], None],
        line: LiveLine,
        score: Score | None = None,
    ) -> None:
        self.ready, self.recipe, self.say, self.line = ready, ready.recipe, say, line
        self.score = score
        self.clocks = Clocks(ready.cursor.seconds, started)
        self.primary = processes.current().primary
        self.number = ready.cursor.step
        self.tokens = ready.cursor.tokens
        self.said = GO
        self.last_loss = float("nan")
        self.held_out: Loss | PairScores | None = None
        self.saved = ready.cursor.step
        self.rolled_back_from: Spiked | None = None
        self._pending: tuple[int, dict[str, Array], dict[str, Array]] | None = None
        self._measure: Measure | None = None
        self._temporaries: Lent | None = None
        self.losses: deque[float] = deque(ready.cursor.recent, maxlen=self.recipe.on_spike.watched)
        self._recent: deque[tuple[float, float]] = deque(maxlen=SPEED_STEPS)
        self._mark = time.perf_counter()
        self._waited = 0.0
        self._tracing = False
        save = self.recipe.save
        self.log = self.new_log()
        self.checkpoints = Checkpoints(ready.out, keep=save.keep, keep_every=save.keep_every or None)
        self.phase = ready.data.stream.phase(self.number)
        self.program, self.compiled = self.compile()
        self.state, self.frozen = first_state(ready)
        self.halted = self.not_halted()

    def compile(self) -> tuple[str, Any]:
        """The phase's step: its digest, and what the loop calls."""
        with self.clocks.timed("compile"):
            lowered = self.ready.steps[self.phase].lower()
            return digest(lowered), lowered.compile()

    def enter(self, phase: int) -> None:
        """Go on with the step of another phase."""
        self.flush()
        if self.said != GO:
            # Saving comes first: whoever said stop may not wait for a compiler.
            return
        self.phase = phase
        _, self.compiled = self.compile()
        if self._temporaries is not None:
            self._temporaries.clear()
        self._temporaries = Lent(self.temporary_bytes())
        self._recent.clear()
        self._mark = time.perf_counter()

    def new_log(self) -> MetricsLog:
        """A log that has yet to resume."""
        return MetricsLog(self.ready.out, tensorboard=self.recipe.log.tensorboard, primary=self.primary)

    def not_halted(self) -> Array:
        """What tells the first step that no step before it failed."""
        sharding = self.ready.step.abstract_signals().halted.sharding
        halted: Array = jax.jit(lambda: False, out_shardings=sharding)()
        return halted

    def loop(self, feed: Feed, stop: StopRequest, profile: Profile | None) -> None:
        """Steps until the recipe's last, or until a process says stop."""
        recipe = self.recipe
        self.log.resume(resume_row(self.ready.cursor))
        if self.rolled_back_from is not None:
            spike, self.rolled_back_from = self.rolled_back_from, None
            skipped = len(self.ready.cursor.rolled_back)
            values = {"from_step": spike.number, "loss": spike.loss, "skipped": skipped}
            # Of the first step anew: a run that is killed before its next checkpoint writes it once more.
            self.log.write("rollback", self.number + 1, values, {})
        if recipe.init_from and not self.number:
            self.evaluate(WHOLE)
        if self.number >= recipe.steps and (row := self.logged("train")):
            self.last_loss = row["loss"]
        if self._temporaries is None:
            self._temporaries = Lent(self.temporary_bytes())
        try:
            self.steps(feed, stop, profile)
        finally:
            self._temporaries.clear()
            self.end_trace()
        self.flush()

    def steps(self, feed: Feed, stop: StopRequest, profile: Profile | None) -> None:
        """The steps of `loop`; the last one's metrics are yet to be read."""
        recipe, stream = self.recipe, self.ready.data.stream
        self._mark = time.perf_counter()
        while self.number < recipe.steps and self.said == GO:
            if (phase := stream.phase(self.number)) != self.phase:
                self.enter(phase)
                continue
            temporaries = self._temporaries
            assert temporaries is not None, "lent by `loop`"
            began = time.perf_counter()
            batch = feed.next()
            self._waited += time.perf_counter() - began
            with self.traced(profile):
                flag = CANNOT_READ if feed.failure else STOP if stop.asked else GO
                signals = self.signals(flag)
                with temporaries.lent():
                    self.state, self.halted, metrics = self.compiled(self.state, self.frozen, batch, signals)
                self.flush()
                self._pending = (self.number + 1, metrics, batch)
                self.number += 1
            scored = self.score is not None and self.due(recipe.tasks.every)
            if self.due(recipe.eval.every) or self.due(recipe.save.every) or scored:
                temporaries.clear()
            if self.due(recipe.eval.every):
                self.flush()
                self.evaluate(recipe.eval.rows)
            if scored:
                self.flush()
                self.score_tasks()
            if self.due(recipe.save.every):
                self.save()

    def temporary_bytes(self) -> int:
        """What XLA allocates in this thread for a step's temporaries: all of them, or none."""
        here = jax.default_backend() == "cpu" and self.ready.step.layout.mesh.size == 1
        return int(self.compiled.memory_analysis().temp_size_in_bytes) if here else 0

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is due; the end of a run has its own."""
        return every > 0 and self.number % every == 0 and self.number < self.recipe.steps

    def signals(self, flag: int) -> Signals:
        """What this process says to all with a step."""
        stop = self.ready.step.abstract_signals().stop
        mine = np.full(stop.shape, flag, np.int32)
        return Signals(self.halted, jax.make_array_from_callback(stop.shape, stop.sharding, mine.__getitem__))

    def flush(self) -> None:
        """Read the metrics of the step before the one under way, log them, and heed what processes said."""
        if self._pending is None:
            return
        number, metrics, batch = self._pending
        self._pending = None
        read = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self.clocks.add("train", seconds - self._waited)
        self.clocks.add("data_wait", self._waited)
        self._waited = 0.0
        if not read.pop("fine"):
            if isinstance(self.recipe.on_spike, RollBack):
                raise Spiked(number, float(read["loss"]))
            self.diverged(number, read, batch)
        if self.recipe.on_spike.is_spike(self.losses, float(read["loss"])):
            raise Spiked(number, float(read["loss"]))
        self.losses.append(float(read["loss"]))
        self.said = max(self.said, int(read.pop("stop")))
        step_tokens = round(float(read.pop("tokens")))
        self.tokens += step_tokens
        self.last_loss = float(read["loss"])
        self._recent.append((step_tokens, seconds))
        if number % self.recipe.log.every == 0 or number == self.recipe.steps:
            values = {"tokens": self.tokens, **self.by_domain(read), **one_by_one(read)}
            if len(self.ready.steps) > 1:
                values["phase"] = self.phase
            self.log.write("train", number, values, self.speed(step_tokens, seconds))
        if self.primary:
            self.line.show(self.progress(number))

    def by_domain(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Take each domain's loss and tokens of this step out of the metrics; nothing where it had none."""
        if DOMAIN_TOKENS not in metrics:
            return {}
        values: dict[str, float] = {}
        each = zip(
            self.ready.data.stream.streams[self.phase].drawn,
            metrics.pop("domain_loss"),
            metrics.pop(DOMAIN_TOKENS),
            strict=True,
        )
        for domain, mean, count in each:
            if count:
                values |= {f"loss/{domain.name}": float(mean), f"step_tokens/{domain.name}": float(count)}
        return values

    def speed(self, tokens: float, seconds: float) -> dict[str, float]:
        """The clock's side of a row of metrics."""
        ready, hardware = self.ready, self.ready.hardware
        values = {"step_seconds": seconds, "tokens_per_second": tokens / seconds}
        spent = self.clocks.seconds()
        values |= {"elapsed_seconds": spent.total, "goodput": spent.goodput}
        if hardware.peak_flops is not None:
            rate = tokens / seconds
            for name, count in asdict(ready.flops_per_token[self.phase]).items():
                values[f"mfu_{name}"] = mfu(count * rate, hardware.chips, hardware.peak_flops)
        if hardware.price is not None:
            values["cost_usd"] = cost_usd(spent.total, hardware.chips, hardware.price)
            if self.tokens:
                values["usd_per_million_tokens"] = 1e6 * values["cost_usd"] / self.tokens
        return values

    def progress(self, number: int) -> Progress:
        """What the live line shows."""
        tokens = sum(tokens for tokens, _ in self._recent)
        seconds = sum(seconds for _, seconds in self._recent)
        speed = self.speed(tokens, seconds)
        known = "mfu_full" in speed
        return Progress(
            step=number,
            steps=self.recipe.steps,
            loss=self.last_loss,
            tokens_per_second=speed["tokens_per_second"],
            seconds_left=(self.recipe.steps - number) * seconds / len(self._recent),
            mfu=Mfu(causal=speed["mfu_causal"], full=speed["mfu_full"]) if known else None,
            cost_usd=speed.get("cost_usd"),
        )

    def evaluate(self, rows: int) -> None:
        """Held-out loss now, as a row of metrics."""
        held_out = self.ready.data.held_out
        if held_out is None:
            return
        if self._measure is None:
            with self.clocks.timed("compile"):
                self._measure = measure_of(self.ready, held_out)
        began = time.perf_counter()
        try:
            self.held_out = self._measure(self.weights(), self.frozen, rows)
        except InputError:
            if self.number > self.saved:
                self.save()
            raise
        seconds = time.perf_counter() - began
        self.clocks.add("evaluate", seconds)
        values = {**self.held_out.metrics(), "tokens": self.tokens}
        if self.logged("eval") is None:
            self.log.write("eval", self.number, values, {"seconds": seconds})
        if self.primary:
            self.line.say(f"step {self.number:,}: held-out loss {self.held_out}")
        self._mark = time.perf_counter()

    def score_tasks(self) -> None:
        """The scores of the recipe's tasks now, as a row of metrics."""
        if self.score is None or self.logged("tasks") is not None:
            return
        began = time.perf_counter()
        values = self.score(self.weights())
        seconds = time.perf_counter() - began
        self.clocks.add("evaluate", seconds)
        self.log.write("tasks", self.number, {**values, "tokens": self.tokens}, {"seconds": seconds})
        told = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.line.say(f"step {self.number:,}: {told}")
        self._mark = time.perf_counter()

    def weights(self) -> Any:
        """The weights that the model is used with: averaged ones, where the recipe's methods make them."""
        return saved.used(self.ready.step, self.state, self.frozen)

    def logged(self, kind: str) -> Row | None:
        """This step's row by an earlier process; there is one where only the run's end was missing."""
        if self.number > self.ready.cursor.step or not self.primary:
            return None
        rows = read_rows(self.ready.out)
        return next((row for row in rows if (row["kind"], row["step"]) == (kind, self.number)), None)

    def save(self) -> None:
        """A checkpoint of the state now, with all rows of metrics up to it on disk before."""
        self.flush()
        began = time.perf_counter()
        self.log.sync()
        seconds = asdict(self.clocks.seconds())
        cursor = replace(
            self.ready.cursor,
            step=self.number,
            phase=self.phase,
            data=self.ready.data.digests[self.phase],
            tokens=self.tokens,
            seconds=seconds,
            recent=tuple(self.losses),
        )
        self.checkpoints.save(
            self.number, saved.fields(self.ready.step, self.state, self.frozen), asdict(cursor)
        )
        self.saved = self.number
        self._mark = time.perf_counter()
        self.clocks.add("save", self._mark - began)

    def diverged(self, number: int, metrics: dict[str, Any], batch: dict[str, Array]) -> None:
        """Stop at a step whose loss or gradient is not finite; the state is still the one before it.

        Raises:
            Diverged: with step, batch and the first layer that made it.
        """
        ready = self.ready
        key = jax.random.fold_in(jax.random.key(self.recipe.seed), number - 1)
        step, decoder = ready.steps[self.phase], ready.decoders[self.phase]
        place = first_nonfinite(step, decoder, self.state.trainable, self.frozen, batch, key)
        self.number = number - 1
        if self.number > self.saved:
            self.save()
        self.checkpoints.close()
        skip, stream = ready.data.stream.data_step(number - 1), ready.data.stream.streams[self.phase]
        first = (skip - stream.first_step) * stream.batch
        order = f"the data order of phase {self.phase}" if self.phase else "the data order"
        kept = "weights and optimizer are as before the step, "
        kept += f"saved at step {self.number}" if self.number else "which was the first: nothing is saved"
        raise Diverged(
            f"step {number}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])},"
            f" first made by {place}; the batch is rows {first} to {first + stream.batch - 1} of"
            f" {order} (without it: --skips {skip}); {kept}"
        )

    def roll_back(self, spike: Spiked) -> None:
        """Go back to before a spike, as `rolled_back` says.

        Raises:
            Diverged: see there.
        """
        self.checkpoints.wait()
        self.ready, said = rolled_back(self.ready, spike)
        cursor = self.ready.cursor
        self.clocks.forget(cursor.seconds)
        self.number, self.tokens, self.saved, self.said = cursor.step, cursor.tokens, cursor.step, GO
        self.losses = deque(cursor.recent, maxlen=self.recipe.on_spike.watched)
        self._pending, self.held_out = None, None
        # There may be no room for two.
        del self.state, self.frozen
        self.state, self.frozen = first_state(self.ready)
        self.halted = self.not_halted()
        self.log = self.new_log()
        self.rolled_back_from = spike
        if self.primary:
            self.line.say(said)

    @contextlib.contextmanager
    def traced(self, profile: Profile | None) -> Iterator[None]:
        """Write a trace of the profile's steps into the run directory."""
        if profile is not None and self.number + 1 == profile.first:
            jax.profiler.start_trace(storage.join(self.ready.out, "profile"))
            self._tracing = True
        yield
        if profile is not None and self.number == profile.last:
            self.end_trace()

    def end_trace(self) -> None:
        """Write the trace, if one is being taken."""
        if self._tracing:
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self._tracing = False

    def outcome(self) -> Outcome:
        """What the run came to so far."""
        held_out, hardware = self.held_out, self.ready.hardware
        if isinstance(held_out, PairScores):
            heldout: Heldout | HeldoutPairs | None = HeldoutPairs(held_out.loss, held_out.measures())
        elif held_out is not None:
            heldout = Heldout(held_out.per_token, held_out.text_bytes / held_out.tokens)
        else:
            heldout = None
        return Outcome(
            steps=self.number,
            tokens=self.tokens,
            seconds=self.clocks.seconds(),
            train_loss=self.last_loss,
            heldout=heldout,
            chip=hardware.name,
            chips=hardware.chips,
            price=hardware.price,
            # A plan is of one program; a run of phases has several.
            planned=planned(self.program, hardware.name) if len(self.ready.steps) == 1 else None,
        )


def one_by_one(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics as numbers, each layer of a per-layer one by its place."""
    values: dict[str, float] = {}
    for name, value in metrics.items():
        if np.ndim(value) == 0:
            values[name] = float(value)
        else:
            values |= {f"{name}.{i}": float(entry) for i, entry in enumerate(value)}
    return values


def train(
    ready: Ready,
    *,
    started: float,
    say: Callable[[str], None],
    line: LiveLine,
    profile: Profile | None = None,
    score: Score | None = None,
) -> tuple[Run, bool]:
    """Train to the recipe's last step, or until told to stop; True where it is finished.

    `score` gives the scores of the recipe's tasks, where it asks for any. `started` is when the process began
    (`time.time()`). The same call again goes on from the last checkpoint.

    Raises:
        InputError: data that cannot be read, on every process, with the steps so far saved.
        Diverged: a loss or gradient that is not finite.
    """
    with StopRequest() as stop:
        run = Run(ready, started, say, line, score)
        with processes.refused_by_all("writing the run directory"):
            record(ready, run.program)
        while True:
            try:
                return run, to_the_end(run, stop, profile)
            except Spiked as spike:
                run.roll_back(spike)


def to_the_end(run: Run, stop: StopRequest, profile: Profile | None) -> bool:
    """Train from where the run stands; True where it is finished.

    Raises:
        InputError: as `train`.
        Diverged: as `train`.
        Spiked: a step's loss is a spike; nothing was saved since.
    """
    ready = run.ready
    with run.log, run.checkpoints:
        with Feed(ready.data.stream, ready.steps, run.number, ready.recipe.steps) as feed:
            run.loop(feed, stop, profile)
            failure = feed.failure
        finished = run.number >= ready.recipe.steps
        if run.saved < run.number:
            run.save()
        if finished:
            run.evaluate(WHOLE)
            run.score_tasks()
        with run.clocks.timed("save"):
            run.checkpoints.wait()
        run.line.end()
        if run.said == CANNOT_READ:
            processes.agree(failure, "reading the training data")
            raise InputError("a process cannot read the training data", fix="see the other processes' lines")
    return finished

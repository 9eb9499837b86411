"""A run from the command line, first line to last: train, then the curve, a sample and the bill."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TextIO

import jax

from mosaicjax import processes, storage
from mosaicjax.checkpoint import complete_steps
from mosaicjax.data.held_pairs import HeldOutPairs
from mosaicjax.errors import InputError
from mosaicjax.evaluate.compression import gzip_held_out
from mosaicjax.evaluate.heldout import Evaluator, Loss
from mosaicjax.evaluate.pairs import PairEvaluator
from mosaicjax.generate import ONE_DEVICE, Sampling, generate, load_run
from mosaicjax.hub import start
from mosaicjax.hub.base import read_base
from mosaicjax.log import read_rows
from mosaicjax.mesh import shardings
from mosaicjax.methods.dpo import PairLoss
from mosaicjax.models import flops
from mosaicjax.models.decoder import Decoder
from mosaicjax.recipe import Recipe
from mosaicjax.recipe_file import Loaded, from_run
from mosaicjax.report.curve import draw_curve
from mosaicjax.report.live import LiveLine, format_count
from mosaicjax.report.summary import SUMMARY, summary_line, write_summary
from mosaicjax.run import Ready, chips_text, epochs, prepare
from mosaicjax.run_data import open_data
from mosaicjax.spec import Spec
from mosaicjax.train import Profile, Run, Score, train

SAMPLE_TOKENS = 120
SAMPLE = "sample.txt"
CURVE = "loss.png"


def train_and_finish(
    loaded: Loaded,
    out: str,
    *,
    started: float,
    profile: tuple[int, int] | None,
    scores: Callable[[Ready], Score] | None = None,
) -> int:
    """Train a recipe into `out` and print what a person wants to see; the exit code.

    `scores` makes what scores the recipe's tasks; it is asked for where the recipe has any.

    Raises:
        InputError: as `prepare` and `train`.
        Diverged: as `train`.
    """
    if profile and storage.is_remote(out):
        raise InputError("--profile writes to this machine alone", got=out, fix="an --out on this machine")
    primary = processes.current().primary
    line = LiveLine(sys.stdout, time.monotonic)

    def say(text: str) -> None:
        if primary:
            line.say(text)

    ready = prepare(loaded, out, say)
    say(chips_text(ready) + f", {epochs(ready):.2f} epochs; into {out}")
    if ready.hardware.peak_flops is not None and not isinstance(ready.decoder, Decoder):
        say(f"MFU counts {flops.described(ready.decoder, ready.flops_per_token[0], format_count)}")
    # A run that was killed between its last checkpoint and its summary has yet to be finished.
    if ready.cursor.step >= ready.recipe.steps and storage.exists(storage.join(out, SUMMARY)):
        say(f"finished already, at step {ready.cursor.step:,}; more --steps go on from there")
        return 0
    if ready.cursor.step:
        say(f"going on after step {ready.cursor.step:,}")
    traced = Profile(*profile) if profile else None
    if traced and not ready.cursor.step < traced.first <= traced.last <= ready.recipe.steps:
        raise InputError(
            "--profile: these steps are not run now",
            expected=f"steps of {ready.cursor.step + 1} to {ready.recipe.steps}",
            got=f"{traced.first}:{traced.last}",
        )
    score = scores(ready) if scores is not None and ready.recipe.tasks.names else None
    run, finished = train(ready, started=started, say=say, line=line, profile=traced, score=score)
    if not finished:
        say(f"stopped and saved at step {run.number:,}; the same command goes on from there")
        return 0
    finish(run, say)
    return 0


def finish(run: Run, say: Callable[[str], None]) -> None:
    """The curve, a sample and the summary of a finished run; the primary writes them."""
    ready = run.ready
    if run.primary:
        draw(ready.out)
        outcome = run.outcome()
        write_summary(ready.out, outcome)
        say(summary_line(outcome))
    text = sample(run)
    if not isinstance(ready.decoder, Decoder):
        say("no sample: a module of one's own has no cache of keys and values to write with")
    if run.primary:
        if text:
            storage.write_text(storage.join(ready.out, SAMPLE), text + "\n")
            say(f"a sample:\n{text}\n")
        say(f"in {ready.out}: {CURVE}, metrics.jsonl, summary.json{', ' + SAMPLE if text else ''}")


def sample(run: Run) -> str:
    """What the model writes of itself.

    Nothing in a job of several processes, which share no prompt, or of a module of one's own.
    """
    ready = run.ready
    if processes.current().count > 1 or not isinstance(ready.decoder, Decoder):
        return ""
    settings = Sampling(
        max_tokens=min(SAMPLE_TOKENS, ready.recipe.seq), temperature=0.8, seed=ready.recipe.seed
    )
    completions = generate(
        ready.decoder,
        run.weights(),
        ready.step.layout,
        ready.recipe.dtypes,
        ready.data.tokenizer,
        [""],
        settings,
        lambda index, text: None,
    )
    return completions[0].text


def draw(out: str) -> None:
    """The loss curve, into the run directory."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, CURVE)
        draw_curve(read_rows(out), path, title=out)
        storage.copy_file(path, storage.join(out, CURVE))


def evaluate_run(out: str) -> Iterator[str]:
    """Lines on a run's held-out bits: the model's over all held-out documents, and gzip's; or on its pairs.

    Raises:
        InputError: no checkpoint, or its data are gone.
    """
    loaded = from_run(out)
    recipe = loaded.recipe
    data = open_data(recipe)
    steps = complete_steps(out)
    if not steps or data.held_out is None:
        raise InputError(f"{out} cannot be evaluated", expected="a checkpoint, and held-out documents")
    layout = ONE_DEVICE.build(jax.devices()[:1])
    last = recipe.in_phase(len(recipe.phases))
    decoder, program = last.program()
    spec = decoder.spec()
    abstract = spec.abstract(program.dtypes.param, shardings(spec, layout))
    weights = start.weights(out, steps[-1], abstract)
    if isinstance(program.loss, PairLoss):
        assert isinstance(data.held_out, HeldOutPairs), "a recipe with DPO reads pairs"
        plain = replace(program.loss, of_tokens=replace(program.loss.of_tokens, decoder=decoder))
        places = (abstract, abstract)
        paired = PairEvaluator(plain, layout, data.held_out, program.phase.microbatch, places)
        scores = paired((weights, _began_with(out, recipe, spec, abstract)))
        yield f"{out}, step {steps[-1]:,}: held-out loss {scores}"
        return
    sizes = data.tokenizer.token_bytes
    rows, chunk = program.phase.microbatch, recipe.loss.chunk
    evaluator = Evaluator(decoder, layout, program.dtypes, data.held_out, sizes, rows, chunk)
    loss = evaluator(weights)
    paths = set(last.data.stores().values())
    text = gzip_held_out([store for store in data.stores if store.path in paths])
    yield f"{out}, step {steps[-1]:,}, on {text.documents:,} held-out documents of {text.text_bytes:,} bytes:"
    bits = loss.nats / math.log(2)
    yield f"  model    {bits:>14,.0f} bits, {bits / text.text_bytes:.4f} a byte ({loss.tokens:,} tokens)"
    yield f"  gzip -9  {text.bits:>14,} bits, {text.bits_per_byte:.4f} a byte (each document on its own)"
    yield f"  perplexity {loss.perplexity:,.2f} a token, {loss.per_token:.4f} nats"
    yield from table("domain", loss.parts)
    yield from table("tokens before", {f"up to {most:,}": each for most, each in loss.told_from.items()})


def table(title: str, parts: Mapping[str, Loss]) -> Iterator[str]:
    """Lines on the parts of a loss that have any target."""
    told = {name: part for name, part in parts.items() if part.tokens}
    if len(told) < 2:
        return
    wide = max(map(len, (title, *told)))
    yield f"  {title:{wide}}  {'nats':>8}  {'perplexity':>10}  {'bits/byte':>9}  {'tokens':>12}"
    for name, part in told.items():
        yield (
            f"  {name:{wide}}  {part.per_token:8.4f}  {part.perplexity:10,.2f}  {part.bits_per_byte:9.4f}"
            f"  {part.tokens:12,}"
        )


def _began_with(out: str, recipe: Recipe, spec: Spec, abstract: Any) -> Any:
    """The weights that a run compares with."""
    if recipe.init_from:
        base = read_base(out)
        return start.weights(base.path, base.step, abstract)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return spec.init(jax.random.key(recipe.seed), recipe.dtypes.param, places)


def write_completions(model: str, prompts: Sequence[str], settings: Sampling, stream: TextIO) -> None:
    """Prompts and what the model makes of them: one is streamed as it is written, several come whole.

    Raises:
        InputError: no model there, or settings that mean nothing.
    """
    settings.check()
    loaded = load_run(model)
    alone = len(prompts) == 1

    def show(index: int, text: str) -> None:
        if alone:
            stream.write(text)
            stream.flush()

    if alone:
        show(0, prompts[0])
    for index, completion in enumerate(generate(*loaded, prompts, settings, show)):
        stream.write("\n" if alone else f"--- {index}\n{prompts[index]}{completion.text}\n")

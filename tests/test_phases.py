"""Runs whose data, sequence length and batch change on the way."""

import json
import shutil
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest

from mosaicjax import recipe_file
from mosaicjax.errors import InputError
from mosaicjax.run_data import open_data
from mosaicjax.step import Step
from tests import stepping, tiny
from tests.models import oracle

STEPS = 14
BEFORE = "from mosaicjax.data.mixture import Domain, Mixture, TokenStore\nfrom mosaicjax.recipe import Later"
PHASES = (
    "(Later(4, seq=16, batch=16, microbatch=8,"
    " model=mpt.Config(layers=2, embed=32, heads=2, mlp=64, vocab=320, windows=(5,))),"
    " Later(9, batch=8, data=Mixture((Domain('one', {store!r}, 1.0),"
    " Domain('two', {store!r}, 3.0)), isolate=True)))"
)
"""From 8 rows of 32 tokens to 16 of 16 in two microbatches and a window, then to 8 of two packed domains."""


def written(folder, tiny_store, phases=PHASES, name="phased.py"):
    path = folder / name
    tiny.write_recipe(path, tiny_store, before=BEFORE, steps=str(STEPS), eval="Eval(every=5, rows=8)")
    added = f"    seed=3,\n    phases={phases.format(store=str(tiny_store))},"
    path.write_text(path.read_text().replace("    seed=3,", added))
    return path


@pytest.fixture(scope="module")
def phased(tiny_store, tmp_path_factory):
    """A recipe with phases, and a finished run of it."""
    folder = tmp_path_factory.mktemp("phased")
    tiny.train(written(folder, tiny_store), folder / "run")
    return folder


@pytest.mark.slow
def test_each_step_is_that_of_its_phase(phased):
    recipe = recipe_file.load(str(phased / "phased.py")).recipe
    stream, layout = open_data(recipe).stream, recipe.mesh.build(jax.devices())
    rows = tiny.metrics(phased / "run")
    assert [row["phase"] for row in rows] == [0] * 4 + [1] * 5 + [2] * 5
    state, compiled, seen = None, {}, 0
    for number, row in enumerate(rows):
        phase = row["phase"]
        mine = recipe.in_phase(phase)
        if phase not in compiled:
            step = Step(mine.program()[1], layout, recipe.seed)
            with tiny.quick():
                compiled[phase] = step, step.lower().compile()
        step, call = compiled[phase]
        state = step.init() if state is None else state
        batch = stream.rows(number, range(mine.batch)) | {"row": np.arange(mine.batch, dtype=np.int32)}
        state, _, found = call(state, {}, stepping.put(step, batch), stepping.signals(step))
        for name in ("loss", "grad_norm", "lr"):
            assert row[name] == pytest.approx(float(found[name]), rel=1e-6), (number, name)
        seen += mine.batch * mine.seq
        assert row["tokens"] == seen
    assert recipe.tokens == seen
    assert sum(rows[-1][f"step_tokens/{name}"] for name in ("one", "two")) == 8 * 16


@pytest.mark.slow
def test_held_out_loss_is_the_last_phases(phased):
    """At every step over rows of the last phase, by the last phase's model."""
    recipe = recipe_file.load(str(phased / "phased.py")).recipe
    held_out = open_data(recipe).held_out
    assert (held_out.seq, held_out.isolate, held_out.names) == (16, True, ("one", "two"))
    found = [row for row in tiny.metrics(phased / "run", "eval")]
    assert [row["step"] for row in found] == [5, 10, STEPS]
    assert all({"loss/one", "loss/two"} <= row.keys() for row in found)
    assert found[-1]["loss/one"] == pytest.approx(found[-1]["loss/two"], rel=1e-6)
    weights, rows = tiny.weights(phased / "run", STEPS), held_out.rows(range(len(held_out) // 2))
    by_model = []
    for model in (recipe.last.model, recipe.model):
        logits = oracle.logits(model, weights, rows["tokens"], rows["positions"], rows["segments"])
        lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        chosen = np.take_along_axis(logits, rows["targets"][..., None], -1)[..., 0]
        by_model.append(np.average(lse - chosen, weights=rows["weights"]))
    assert found[-1]["loss/one"] == pytest.approx(by_model[0], rel=1e-5)
    assert abs(by_model[1] / by_model[0] - 1) > 1e-4


@pytest.mark.slow
def test_the_recipe_of_a_run_goes_to_json_and_back(phased):
    recipe = recipe_file.load(str(phased / "phased.py")).recipe
    assert recipe_file.from_run(str(phased / "run")).recipe == recipe
    changed = recipe_file.load(
        str(phased / "phased.py"), ["--phases.0.batch", "24", "--phases.1.step", "10"]
    ).recipe
    first, second = recipe.phases
    assert changed.phases == (replace(first, batch=24), replace(second, step=10))
    assert recipe.longest == 32


def test_a_store_by_another_name_goes_on_where_it_stood(tiny_store, tmp_path):
    """Another spelling, or a copy elsewhere: the rows of a recipe that only changes the batch."""
    shutil.copytree(tiny_store, tmp_path / "copy")
    plain = written(tmp_path, tiny_store, "(Later(3, batch=16),)", "plain.py")
    expected = open_data(recipe_file.load(str(plain)).recipe).stream.rows(5, range(16))["tokens"]
    for number, path in enumerate((f"{tiny_store}/.", str(tmp_path / "copy"))):
        phases = f"(Later(3, batch=16, data=TokenStore({path!r})),)"
        moved = written(tmp_path, tiny_store, phases, f"moved{number}.py")
        found = open_data(recipe_file.load(str(moved)).recipe)
        assert found.stream.rows(5, range(16))["tokens"].tolist() == expected.tolist()
        assert len(set(found.digests)) == 1


def test_what_cannot_be_is_refused(tiny_store, tmp_path):
    for number, (phases, said) in enumerate(
        {
            "(Later(0, seq=16),)": "steps of the recipe's phases; expected increasing, from 1 on; got .0.",
            "(Later(5, seq=16), Later(5, batch=4))": "increasing, from 1 on; got .5, 5.",
            "(Later(5, batch=4, microbatch=6),)": "phase 1 of the recipe, from step 5 on: microbatch; exp",
            "(Later(5, model=mpt.Config(layers=2, embed=32, heads=4, mlp=64, vocab=320)),)": (
                "step 5 on: its model has other weights; expected those of the recipe's model; got stacks"
            ),
            "(Later(5, seq=0),)": "phase 1 of the recipe, from step 5 on: seq of the recipe",
        }.items()
    ):
        with pytest.raises(InputError, match=said):
            recipe_file.load(str(written(tmp_path, tiny_store, phases, f"{number}.py")))


@pytest.mark.slow
@pytest.mark.soak
def test_what_is_to_come_may_change_and_what_was_may_not(phased, tiny_store, tmp_path, capsys):
    out = tmp_path / "run"
    assert tiny.run("train", phased / "phased.py", "--out", out, "--steps", 6) == 0
    gone, later = "--phases.0.batch", "--phases.1.batch"
    capsys.readouterr()
    assert tiny.run("train", phased / "phased.py", "--out", out, gone, 24) == 2
    said = capsys.readouterr().err
    assert "phases.0.batch: 16 -> 24" in said and "and phases from data step 6 on alone" in said
    # Tokens too, of a store that is not the first ones'.
    other = tiny.build_store(tmp_path / "other", seed=1)
    second = written(tmp_path, other)
    text = second.read_text().replace(
        f"data=TokenStore({str(other)!r})", f"data=TokenStore({str(tiny_store)!r})"
    )
    second.write_text(text)
    assert tiny.run("train", second, "--out", out, "--steps", 11, later, 16) == 0
    rows = tiny.metrics(out)
    assert [row["tokens"] for row in rows[8:]] == [2_304, 2_304 + 256, 2_304 + 512]
    # Which it has begun with now.
    capsys.readouterr()
    assert tiny.run("train", phased / "phased.py", "--out", out, "--steps", 12, later, 16) == 2
    assert "was trained on other tokens than the store holds now" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_killed_in_a_phase_goes_on_in_it(tiny_store, tmp_path):
    recipe = written(tmp_path, tiny_store)
    options = ("--steps", 60, "--save.every", 2, "--phases.1.step", 30, "--skips", 7, 8, 33)
    (done,) = tiny.ended([tiny.launch("train", recipe, "--out", tmp_path / "straight", *options)])
    assert done.returncode == 0, done.stderr
    out = tmp_path / "killed"
    for steps in (14, 22):
        job = [tiny.launch("train", recipe, "--out", out, *options)]
        tiny.signal_after(job, out, steps, signal.SIGKILL, [0])
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["phase"] in (1, 2)
    (done,) = tiny.ended([tiny.launch("train", recipe, "--out", out, *options)])
    assert done.returncode == 0, done.stderr
    assert tiny.rows(out) == tiny.rows(tmp_path / "straight")

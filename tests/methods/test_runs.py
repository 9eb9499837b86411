"""Methods in whole runs: saved, gone on with, evaluated, exported and started from."""

import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mosaicjax import recipe_file
from mosaicjax.evaluate.heldout import Evaluator
from mosaicjax.generate import load_run
from mosaicjax.hub.export_model import export_model
from mosaicjax.mesh import shardings
from mosaicjax.run import first_state, prepare
from mosaicjax.run_data import open_data
from mosaicjax.saved import used as used_weights
from mosaicjax.spec import join
from tests import stepping, tiny
from tests.hub import models

pytestmark = pytest.mark.slow

BEFORE = """from mosaicjax.methods.ema import Ema
from mosaicjax.methods.freeze import FreezeLayers
from mosaicjax.methods.rates import ScaleRates
from mosaicjax.methods.sam import Sam
from mosaicjax.methods.selective import SelectiveBackprop"""
MODEL = "mpt.Config(layers=3, embed=32, heads=2, mlp=128, vocab=320)"
METHODS = """(
        ClipGradients(norm=1.0),
        Ema(decay=0.5, start=1, every=2),
        FreezeLayers(("layer/0/*", "*/mlp/down", "norm/*")),
        ScaleRates((("layer/1/*", 0.5),)),
        SelectiveBackprop(start=0.3, end=1.0),
        Sam(every=2),
    )"""


@pytest.fixture(scope="module")
def recipe(tiny_store, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "methods.py"
    return tiny.write_recipe(path, tiny_store, before=BEFORE, model=MODEL, batch="16", methods=METHODS)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """Six steps, each with its checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    tiny.train(recipe, out, "--save.every", 1, "--save.keep", 100)
    return out


def field(run, step, name):
    """The arrays of one field of a checkpoint, by leaf."""
    begin = name + "."
    arrays = tiny.arrays(run, step)
    return {own.removeprefix(begin): array for own, array in arrays.items() if own.startswith(begin)}


def test_a_checkpoint_has_the_average_of_what_was_trained(run):
    weights = [field(run, step, "trainable") for step in range(1, 7)]
    averages = [field(run, step, "evaluated") for step in range(1, 7)]
    for name, mean in averages[-1].items():
        w1, _, w3, _, w5, _ = (tree[name].astype(np.float64) for tree in weights)
        np.testing.assert_allclose(mean, ((w1 + w3) / 2 + w5) / 2, atol=1e-7)
        np.testing.assert_array_equal(averages[0][name], weights[0][name])


def test_a_run_that_was_killed_goes_on_exactly(run, recipe, tmp_path):
    out = tiny.copy_run(run, tmp_path / "again", until=3)
    tiny.train(recipe, out, "--save.every", 1, "--save.keep", 100)
    assert tiny.rows(out) == tiny.rows(run)
    ours, theirs = tiny.arrays(out, 6), tiny.arrays(run, 6)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name, strict=True)


def test_frozen_weights_stay_and_are_saved_with_the_others(run):
    first, last = field(run, 1, "trainable"), field(run, 6, "trainable")
    averaged = field(run, 6, "evaluated")
    for name, before in first.items():
        whole = name.startswith("norm.") or name.endswith("mlp.down")
        frozen = len(before) if whole else name.startswith("stacks")
        np.testing.assert_array_equal(last[name][:frozen], before[:frozen], err_msg=name)
        assert whole == (name not in averaged)
        if not whole:
            assert (last[name][frozen:] != before[frozen:]).any(), name
            np.testing.assert_array_equal(averaged[name][:frozen], before[:frozen])
    moments = [array for name, array in tiny.arrays(run, 6).items() if ".mu." in name]
    assert len(moments) == len(averaged)
    assert sum(map(np.size, moments)) == sum(
        array[name.startswith("stacks") :].size for name, array in averaged.items()
    )


def used(run):
    """The weights that the model is used with: the average, and the others where there is none."""
    return field(run, 6, "trainable") | field(run, 6, "evaluated")


def test_the_average_is_what_is_evaluated(run, recipe):
    ready_recipe = recipe_file.load(str(recipe)).recipe
    data = open_data(ready_recipe)
    decoder, layout = ready_recipe.model.build(), stepping.alone()
    spec = decoder.spec()
    sizes = data.tokenizer.token_bytes
    evaluator = Evaluator(decoder, layout, ready_recipe.dtypes, data.held_out, sizes, 8)

    def loss(arrays):
        leaves = [arrays[name.replace("/", ".")] for name, _ in spec.items()]
        weights = jax.tree.unflatten(
            jax.tree.structure(spec.abstract("float32", shardings(spec, layout))), leaves
        )
        return evaluator(jax.tree.map(jax.device_put, weights, shardings(spec, layout))).per_token

    logged = tiny.metrics(run, "eval")[-1]["loss"]
    assert logged == pytest.approx(loss(used(run)), rel=1e-6)
    assert abs(logged - loss(field(run, 6, "trainable"))) > 1e-4


def test_the_average_is_what_leaves_and_is_started_from(run, recipe, tmp_path):
    expected = {name.replace(".", "/"): array for name, array in used(run).items()}
    _, weights, _, _, _ = load_run(run)
    for (name, array), leaf in zip(sorted(expected.items()), jax.tree.leaves(weights), strict=True):
        np.testing.assert_array_equal(leaf, array, err_msg=name)
    loaded = recipe_file.load(str(recipe), ["--init-from", str(run)])
    ready = prepare(loaded, str(tmp_path / "new"), print)
    state, frozen = first_state(ready)
    for tree in (join(state.trainable, frozen), used_weights(ready.step, state, frozen)):
        for (name, array), leaf in zip(sorted(expected.items()), jax.tree.leaves(tree), strict=True):
            np.testing.assert_array_equal(leaf, array, err_msg=name)
    export_model(str(run), str(tmp_path / "hf"))
    left = models.expected(load_file(tmp_path / "hf" / "model.safetensors"), loaded.recipe.model)
    for name, array in expected.items():
        np.testing.assert_array_equal(left[name], array, err_msg=name, strict=True)


def test_evaluate_tells_the_same_bits_as_the_run(run, capsys):
    loss = tiny.metrics(run, "eval")[-1]["loss"]
    capsys.readouterr()
    assert tiny.run("evaluate", run) == 0
    model = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  model"))
    bits, tokens = (float(model.replace("(", "").replace(",", "").split()[i]) for i in (1, -2))
    # Printed to the whole bit.
    assert bits == pytest.approx(loss * tokens / math.log(2), abs=1)


@pytest.mark.soak
def test_two_processes_do_the_same(run, recipe, tmp_path):
    """Saved by both, each its shards, and gone on with by this one."""
    options = ("--steps", 5, "--save.every", 3, "--eval.every", 0, "--log.tensorboard", "False")
    out = tmp_path / "two"
    results = tiny.ended(tiny.launch_job("train", recipe, "--out", out, *options))
    assert [result.returncode for result in results] == [0, 0], results
    tiny.train(recipe, out, "--save.every", 1, "--save.keep", 100)
    np.testing.assert_allclose(tiny.losses(out), tiny.losses(run), rtol=1e-5)
    theirs = tiny.arrays(run, 6)
    for name, array in tiny.arrays(out, 6).items():
        if name.startswith(("trainable.", "evaluated.")):
            np.testing.assert_allclose(array, theirs[name], atol=2e-4, err_msg=name)

"""A run that meets a NaN stops before it touches a weight, and says where the NaN came from."""

import re

import numpy as np
import pytest

from tests import tiny

DIVERGED = 1
NO_EVAL = ("--eval.every", 0, "--log.tensorboard", "False")


def refusal(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mosaicjax: "), lines
    return lines[0].removeprefix("mosaicjax: ")


def poisoned(run, out):
    """A run whose next step makes queries and keys of layer 1 so large that their product overflows."""
    tiny.copy_run(run, out, until=6)
    for name in ("query", "key"):
        tiny.poison(out, 6, f"optimizer.1.0.mu.stacks.0.0.layer.attention.{name}", 1, 1e20)
    return out


@pytest.mark.slow
def test_the_step_the_rows_and_the_first_layer_are_named(tiny_run, tmp_path, capsys):
    often, seldom = (poisoned(tiny_run, tmp_path / name) for name in ("often", "seldom"))
    lines = []
    for out, every in ((often, 1), (seldom, 100)):
        assert tiny.run("train", out, "--steps", 12, "--save.every", every, *NO_EVAL) == DIVERGED
        lines.append(refusal(capsys))
    # Step 8 is the second batch of 8 rows after 6: rows 56 to 63 of the data order.
    expected = (
        r"step 8: loss \S+, gradient norm nan, first made by layer 1 \(its output; microbatch 0\);"
        r" the batch is rows 56 to 63 of the data order \(without it: --skips 7\);"
        r" weights and optimizer are as before the step, saved at step 7"
    )
    assert all(re.fullmatch(expected, line) for line in lines), lines
    assert tiny.complete(seldom)[-1] == tiny.complete(often)[-1] == 7
    assert [row["step"] for row in tiny.metrics(seldom)] == [1, 2, 3, 4, 5, 6, 7]
    # One was saved after step 7 as always; the other when step 8 had been tried already.
    before, left = tiny.arrays(often, 7), tiny.arrays(seldom, 7)
    assert left["step"] == 7
    for name, array in left.items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
        assert np.isfinite(array).all(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer", "place"),
    [
        ("trainable.stacks.0.0.layer.attention.key", 1, "layer 1 (its output; microbatch 0)"),
        ("trainable.stacks.0.0.layer.mlp_norm.scale", 0, "layer 0 (its output; microbatch 0)"),
        ("trainable.norm.scale", slice(0, 4), "the logits or the loss (microbatch 0)"),
    ],
)
def test_a_weight_that_is_nan_is_found(tiny_run, tiny_recipe, tmp_path, capsys, name, layer, place):
    source, out = tiny.copy_run(tiny_run, tmp_path / "source", until=6), tmp_path / "run"
    tiny.poison(source, 6, name, layer, np.nan)
    assert tiny.run("train", tiny_recipe, "--init-from", source, "--out", out, *NO_EVAL) == DIVERGED
    assert refusal(capsys) == (
        f"step 1: loss nan, gradient norm nan, first made by {place};"
        " the batch is rows 0 to 7 of the data order (without it: --skips 0);"
        " weights and optimizer are as before the step, which was the first: nothing is saved"
    )
    assert tiny.complete(out) == [] and tiny.metrics(out) == []


STEEP = '''
from dataclasses import dataclass

import jax.numpy as jnp

from mosaicjax.layers.position import Position


@dataclass(frozen=True)
class Steep(Position):
    """The square root of zero: right forward, without a gradient backward."""

    def embed(self, weights, x_BLD, positions_BL):
        return x_BLD + jnp.sqrt(jnp.abs(x_BLD - x_BLD))
'''


@pytest.mark.slow
def test_a_nan_of_the_backward_pass_alone_names_the_weight(tiny_store, tmp_path, capsys):
    model = "mpt.Config(layers=2, embed=32, heads=2, mlp=64, vocab=320, position=Steep())"
    recipe = tiny.write_recipe(tmp_path / "steep.py", tiny_store, before=STEEP, model=model)
    assert tiny.run("train", recipe, "--out", tmp_path / "run", *NO_EVAL) == DIVERGED
    line = refusal(capsys)
    assert re.match(r"step 1: loss \d\.\d+, gradient norm nan, first made by embed/tokens", line), line
    assert "(its gradient; microbatch 0)" in line


@pytest.mark.slow
def test_both_processes_stop_at_a_nan(tiny_run, tmp_path):
    out = poisoned(tiny_run, tmp_path / "run")
    command = ("train", out, "--steps", 12, "--save.every", 100, *NO_EVAL)
    for result in tiny.ended(tiny.launch_job(*command)):
        assert result.returncode == DIVERGED, result
        line = result.stderr.splitlines()[-1]
        assert "mosaicjax: step 8: loss " in line and "first made by layer 1" in line
    assert tiny.complete(out)[-1] == 7
    assert all(np.isfinite(array).all() for array in tiny.arrays(out, 7).values())

"""Which runs a sweep is made of, and what it refuses before any of them."""

import math
import os
import re

import pytest

from mosaicjax.errors import InputError
from mosaicjax.sweep.grid import Axis, cells, directory_name, read_axes
from tests import tiny
from tests.sweep.finished import finish

REFUSED = 2


def test_axes_as_typed():
    assert Axis.read("optimizer.lr.peak=1e-3, 2e-3") == Axis("optimizer.lr.peak", ("1e-3", "2e-3"))
    # A field may be typed as its option is.
    assert Axis.read("--optimizer.weight-decay=0,1e-4").name == "optimizer.weight_decay"
    assert Axis.read("optimizer.weight_decay=0").option == "--optimizer.weight-decay"
    assert Axis.read("seed=1,2").repeats and not Axis.read("optimizer.lr.peak=1").repeats
    assert Axis.read("steps=4,2").numbers == (4.0, 2.0)
    assert Axis.read("model.remat=NONE,FULL").numbers is None
    # float() takes it, but it is no place on an axis.
    assert math.isnan(float("nan")) and Axis.read("steps=1,nan").numbers is None


@pytest.mark.parametrize("text", ["", "seed", "seed=", "=1", "seed=1,", "seed=1,,2"])
def test_axes_of_another_form(text):
    with pytest.raises(InputError, match="--over; expected FIELD=VALUE,VALUE,.*; got"):
        Axis.read(text)


def test_axes_that_cannot_be_together():
    with pytest.raises(InputError, match="--over seed has a value twice; got 1,2,1"):
        read_axes(["seed=1,2,1"], [])
    with pytest.raises(InputError, match="--over seed is given twice"):
        read_axes(["seed=1", "steps=3", "seed=2"], [])
    with pytest.raises(InputError, match="--optimizer.weight-decay is given beside --over optimizer"):
        read_axes(["optimizer.weight_decay=0,1e-4"], ["--steps", "3", "--optimizer.weight_decay=0.1"])
    with pytest.raises(InputError, match="nothing to sweep"):
        read_axes([], [])


def test_every_combination_is_a_recipe_of_its_own(tiny_recipe):
    axes = read_axes(["optimizer.lr.peak=1e-3,4e-3", "seed=1,2"], [])
    found = cells(str(tiny_recipe), ["--batch", "16"], axes, "out")
    recipes = [cell.loaded.recipe for cell in found]
    assert [(recipe.optimizer.lr.peak, recipe.seed) for recipe in recipes] == [
        (1e-3, 1),
        (1e-3, 2),
        (4e-3, 1),
        (4e-3, 2),
    ]
    assert {recipe.batch for recipe in recipes} == {16}
    assert found[1].run == os.path.join("out", "optimizer.lr.peak=1e-3,seed=2")
    assert found[1].overrides == ("--batch", "16", "--optimizer.lr.peak=1e-3", "--seed=2")
    assert found[1].title == "optimizer.lr.peak 1e-3, seed 2"
    assert len({cell.digest for cell in found}) == 4


def test_directories_are_plain_and_apart():
    assert directory_name({"seed": "1"}) == "seed=1"
    one, other = directory_name({"data.path": "a/b"}), directory_name({"data.path": "a b"})
    assert one != other and re.fullmatch(r"data.path=a_b-[0-9a-f]{8}", one)
    assert len(directory_name({"data.path": "x" * 400})) < 200


def test_two_spellings_of_a_value_are_one_run(tiny_recipe):
    with pytest.raises(InputError, match="are one recipe: optimizer.lr.peak 1e-3; and .* 0.001"):
        cells(str(tiny_recipe), [], [Axis.read("optimizer.lr.peak=1e-3,0.001")], "out")


def test_a_directory_of_another_recipe_is_refused(tiny_recipe, tmp_path):
    (cell,) = cells(str(tiny_recipe), [], [Axis.read("steps=6")], str(tmp_path))
    finish(cell, 2.0)
    # Before its first checkpoint a run holds nothing that another recipe could contradict.
    changed = (str(tiny_recipe), ["--batch", "16"], [Axis.read("steps=6")], str(tmp_path))
    assert len(cells(*changed)) == 1
    checkpoint = tmp_path / "steps=6" / "checkpoints" / "6"
    checkpoint.mkdir(parents=True)
    (checkpoint / "commit_success.txt").touch()
    with pytest.raises(InputError, match=r"was trained by another recipe \(batch: 8 -> 16\)"):
        cells(*changed)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--over", "optimizer.lr.peek=1,2"],
            r"unknown override --optimizer.lr.peek; fix: did you mean --optimizer.lr.peak( or \S+)*\?",
        ),
        (["--over", "steps=3,many"], "override: Error parsing --steps: invalid literal for int.*'many'.*"),
        (["--over", "seed=1,2", "--over", "batch=8,0"], "batch of the recipe; expected 1 or more; got 0"),
        (["--over", "seed=1,2", "--stepz", "3"], "unknown override --stepz; fix: did you mean --steps.*"),
        (["--over", "seed"], "--over; expected FIELD=VALUE,VALUE,.*; got seed"),
        (["--over", "optimizer.b1=0.9,1.5"], "optimizer b1 and b2; expected 0 to below 1; .*"),
        ([], "mosaicjax sweep: the following arguments are required: --over; .*"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(tiny_recipe, tmp_path, capsys, options, line):
    assert tiny.run("sweep", tiny_recipe, "--out", tmp_path / "out", *options) == REFUSED
    said = capsys.readouterr()
    assert re.fullmatch(f"mosaicjax: {line}\n", said.err) and said.out == ""
    assert not (tmp_path / "out").exists()


def test_a_remote_directory_is_refused(tiny_recipe, capsys):
    assert tiny.run("sweep", tiny_recipe, "--out", "s3://bucket/sweep", "--over", "seed=1,2") == REFUSED
    assert "a sweep writes to this machine alone; got s3://bucket/sweep" in capsys.readouterr().err

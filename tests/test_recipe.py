"""What a recipe refuses, and the program that it means."""

from dataclasses import replace

import pytest

from mosaicjax import recipe_file
from mosaicjax.errors import InputError
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.optim import AdamW, Cosine
from mosaicjax.program import Method, Phase
from mosaicjax.recipe import Eval, Log, Recipe, Save, check_vocabulary


@pytest.fixture(scope="module")
def recipe(tiny_recipe) -> Recipe:
    return recipe_file.load(str(tiny_recipe)).recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq": 0}, "seq of the recipe; expected 1 or more; got 0"),
        ({"batch": 0}, "batch of the recipe; expected 1 or more; got 0"),
        ({"steps": -1}, "steps of the recipe; expected 1 or more; got -1"),
        ({"seed": -1}, "seed of the recipe; expected 0 or more; got -1"),
        ({"microbatch": 9}, "microbatch; expected at most the batch's 8 rows; got 9"),
        ({"save": Save(keep=0)}, "save.keep of the recipe; expected a positive number; got 0"),
        ({"log": Log(every=0)}, "log.every of the recipe; expected a positive number; got 0"),
        ({"eval": Eval(rows=-2)}, "eval.rows of the recipe; expected a positive number; got -2"),
    ],
)
def test_numbers_that_cannot_be(recipe, changes, message):
    with pytest.raises(InputError) as refusal:
        replace(recipe, **changes).check()
    assert str(refusal.value) == message


def test_zero_where_zero_means_something(recipe):
    replace(recipe, seed=0, microbatch=0, eval=Eval(0, 0), save=Save(0, 1, 0)).check()


def test_phase(recipe):
    assert recipe.phase() == Phase(seq=32, batch=8, microbatch=8)
    assert replace(recipe, microbatch=2).phase().microbatches == 4
    assert replace(recipe, microbatch=3).phase().microbatches == 3


def test_program_is_what_the_recipe_says(recipe):
    decoder, program = recipe.program()
    assert decoder == recipe.model.build()
    assert program.trainable.count() == 320 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 64 + 2 * 32) + 32
    assert program.frozen.count() == 0 and program.state == {}
    assert program.applied == ("ClipGradients",)
    assert [float(program.rate(step)) for step in (0, 3)] == [pytest.approx(5e-4), pytest.approx(2e-3)]


def test_a_method_listed_twice_is_refused(recipe):
    with pytest.raises(InputError, match="the method ClipGradients is listed twice"):
        replace(recipe, methods=(ClipGradients(1.0), ClipGradients(2.0))).program()
    with pytest.raises(TypeError, match="Method does not say what it does"):
        replace(recipe, methods=(Method(),)).program()


def test_vocabulary_and_tokenizer():
    check_vocabulary(300, 300, "store")
    with pytest.raises(InputError, match=r"expected at most 299 ids; got 300; fix: --model.vocab 384"):
        check_vocabulary(299, 300, "store")


def test_recipes_are_values(recipe):
    assert recipe == replace(recipe)
    assert replace(recipe, optimizer=AdamW(lr=Cosine(peak=1e-3))) != recipe

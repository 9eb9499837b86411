"""A recipe's prediction moves as the compiled program's work does, whatever is changed."""

from __future__ import annotations

import pytest

from mosaicjax.plan.topology import compiler_there
from tests.plan.planned import planned

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not compiler_there(), reason="libtpu, the TPU compiler, is not installed"),
]

RECIPE = """
from mosaicjax.data.mixture import TokenStore
from mosaicjax.mesh import Mesh
from mosaicjax.models import mistral
from mosaicjax.models.decoder import Remat
from mosaicjax.recipe import Recipe

recipe = Recipe(
    model=mistral.Config(
        layers=4, embed=1024, heads=8, kv_heads=4, head_dim=128, mlp=2816, vocab=8192, window=0,
        remat=Remat.FULL,
    ),
    data=TokenStore("none"), seq=2048, batch=32, steps=100,
)
"""
FIGURES = ("flops", "hbm", "wire", "memory", "seconds")
# Which way each figure goes, by hand: -1 down, 0 the same, 1 up, None either.
CHANGES = {
    "products and attention's result are kept, and read again": (
        ("--model.remat", "PRODUCTS"),
        (-1, 1, 0, 1, -1),
    ),
    "keys beyond a window are not looked at": (("--model.window", "256"), (-1, None, 0, None, -1)),
    # Activations of a quarter of the rows stay in VMEM here: bytes of HBM may go down.
    "weights are gathered and gradients summed four times": (("--microbatch", "8"), (0, None, 1, -1, 1)),
    "nothing is gathered, and each chip updates all weights": (
        ("--mesh.data", "4", "--mesh.fsdp", "1"),
        (0, 1, -1, 1, 1),
    ),
}


def figures(found):
    """Of one plan, in the order of FIGURES."""
    work = (found["flops"]["compiled"], found["hbm_bytes"], found["wire_bytes"])
    return *work, found["memory"]["needed"], found["step_seconds"]["expected"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "recipe.py").write_text(RECIPE)
    code, page, _, found = planned(folder, folder / "recipe.py", "--topology", "v5e:2x2")
    assert code == 0, page
    return folder, figures(found)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_moves_the_prediction_as_it_moves_the_work(name, base):
    folder, before = base
    options, expected = CHANGES[name]
    code, page, _, found = planned(folder, folder / "recipe.py", "--topology", "v5e:2x2", *options)
    assert code == 0, page
    moves = [(now - was) / was for now, was in zip(figures(found), before, strict=True)]
    for figure, move, sign in zip(FIGURES, moves, expected, strict=True):
        right = {None: True, 0: abs(move) < 2e-3, 1: move > 2e-3, -1: move < -2e-3}[sign]
        assert right, (figure, dict(zip(FIGURES, moves, strict=True)))

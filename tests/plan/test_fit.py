"""The search for what fits, beside trying everything; what a recipe needs is drawn here, not compiled."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax import recipe_file
from mosaicjax.data.mixture import TokenStore
from mosaicjax.errors import InputError
from mosaicjax.mesh import fsdp
from mosaicjax.models import mpt
from mosaicjax.models.decoder import Remat
from mosaicjax.plan.fit import Fitting, policies
from mosaicjax.plan.topology import Topology
from mosaicjax.recipe import Recipe

BATCH, CHIPS = 48, 4
TOPOLOGY = Topology.read("v5e:2x2")
RECIPE = Recipe(
    mpt.Config(layers=2, embed=64, heads=2, mlp=256, vocab=256, remat=Remat.NONE),
    TokenStore("nowhere"),
    seq=64,
    batch=BATCH,
    steps=4,
    mesh=fsdp(),
)
ROWS = [rows for rows in range(CHIPS, BATCH + 1, CHIPS) if BATCH % rows == 0]


class Drawn(Fitting):
    """A recipe needs what was drawn for its policy and rows; `shorter` gathers have the shorter step."""

    def __init__(self, fixed, each, room, shorter):
        super().__init__(TOPOLOGY, None, None, lambda line: None)
        self.fixed, self.each, self.room, self.shorter = fixed, each, room, shorter

    def needed(self, policy, rows):
        return self.fixed[policy] + self.each[policy] * rows

    def tried(self, recipe):
        needed = self.needed(recipe.model.remat, recipe.microbatch or recipe.batch)
        compiled = SimpleNamespace(needed=needed, available=self.room, fits=needed <= self.room)
        seconds = 1.0 if recipe.mesh.gather == self.shorter else 2.0
        return SimpleNamespace(recipe=recipe, compiled=compiled, seconds=seconds)


@given(
    fixed=st.fixed_dictionaries({policy: st.integers(1, 40) for policy in Remat}),
    each=st.fixed_dictionaries({policy: st.integers(0, 5) for policy in Remat}),
    room=st.integers(1, 80),
    shorter=st.sampled_from(["compiler", "explicit"]),
    microbatch=st.sampled_from([0, *ROWS]),
)
def test_it_is_the_cheapest_policy_and_its_most_rows(fixed, each, room, shorter, microbatch):
    recipe = replace(RECIPE, microbatch=microbatch)
    fitting = Drawn(fixed, each, room, shorter)
    fit = [
        (policy, rows)
        for policy in policies(recipe)
        for rows in reversed(ROWS)
        if fitting.needed(policy, rows) <= room
    ]
    if not fit:
        with pytest.raises(
            InputError, match=r"nothing fits .*; expected at most .*; got .*; fix: a larger topology"
        ):
            fitting.search(recipe)
        return
    found, words = fitting.search(recipe)
    mine = found.recipe
    assert (mine.model.remat, mine.microbatch or BATCH, mine.mesh.gather) == (*fit[0], shorter)
    again = recipe_file.override(recipe, words, "x")
    assert (again.model, again.microbatch or BATCH) == (mine.model, mine.microbatch or BATCH)
    assert again.mesh.gather == shorter


def test_policies_are_tried_by_what_they_compute_again():
    order = policies(RECIPE)
    assert (order[0], order[-1]) == (Remat.NONE, Remat.FULL)
    assert sorted(order, key=list(Remat).index) == list(Remat)

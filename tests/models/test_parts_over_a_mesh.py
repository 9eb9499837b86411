"""Parts that read tokens, and numbers of layers, over a mesh: the weights that one device steps to."""

import jax
import numpy as np
import pytest

from mosaicjax.layers.attention import Attention
from mosaicjax.layers.block import Block, StreamScales
from mosaicjax.layers.inits import Kaiming
from mosaicjax.layers.token_inputs import Bigram, Smear
from mosaicjax.mesh import Mesh
from mosaicjax.models import mpt
from mosaicjax.program import Phase
from mosaicjax.step import Step
from tests import stepping

CONFIG = mpt.Config(
    layers=4,
    embed=32,
    heads=4,
    mlp=64,
    vocab=64,
    attention=Attention(sinks=True),
    block=Block(scales=StreamScales(keep=0.9, first=0.2), stochastic_depth=0.3),
    inputs=(Smear(), Bigram(32)),
    value_tables=2,
    tied=False,
    init=Kaiming(zero_residual=True),
)
TENSOR, EXPLICIT = Mesh(data=1, fsdp=(2, 2), tensor=2), Mesh(data=2, fsdp=(4,), gather="explicit")
PHASE = Phase(seq=16, batch=8, microbatch=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "packed"),
    [
        pytest.param(mesh, packed, marks=[pytest.mark.soak] * (packed != (mesh is TENSOR)))
        for mesh in (TENSOR, EXPLICIT)
        for packed in (False, True)
    ],
)
def test_steps_are_those_of_one_device(mesh, packed):
    found = []
    for each, devices in ((Mesh(), 1), (mesh, 8)):
        program = stepping.program(CONFIG.build(), PHASE, packed=packed, measure=True)
        step = Step(program, stepping.place(each, devices), seed=3, measure=True)
        state, compiled = step.init(), step.lower().compile()
        measured = []
        for number in range(3):
            batch = stepping.put(step, stepping.rows(PHASE, CONFIG.vocab, number, packed=packed))
            state, _, metrics = compiled(state, {}, batch, stepping.signals(step))
            measured.append(jax.device_get(metrics))
        found.append((jax.device_get(state.trainable), measured))
    (one, first), (many, second) = found
    for (path, alone), spread in zip(
        jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(many), strict=True
    ):
        np.testing.assert_allclose(spread, alone, rtol=1e-3, atol=3e-5, err_msg=str(path))
    for alone, spread in zip(first, second, strict=True):
        np.testing.assert_allclose(spread["loss"], alone["loss"], rtol=1e-5)
        assert alone.keys() == spread.keys()
    moved = one["stacks"][0][0]["layer"]["scales"]["first"]
    assert np.abs(moved - 0.2).max() > 1e-4

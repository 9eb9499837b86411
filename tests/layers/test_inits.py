"""How a model's weights start: the deviation of each kind by hand."""

import jax
import numpy as np
import pytest

from mosaicjax.layers.inits import InitRule, Kaiming, SmallInit
from mosaicjax.mesh import Mesh, shardings
from mosaicjax.models import mpt

CONFIG = {
    "layers": 8,
    "embed": 64,
    "heads": 4,
    "kv_heads": 2,
    "mlp": 128,
    "vocab": 256,
    "tied": False,
    "bias": True,
}


@pytest.mark.parametrize(
    ("rule", "matrix", "down", "residual", "table"),
    [
        # sqrt(2 / fan in), and projections into the residual stream over sqrt(2 x 8).
        (Kaiming(), (2 / 64) ** 0.5, (2 / 128) ** 0.5, 1 / 4, (2 / 64) ** 0.5),
        pytest.param(
            Kaiming(divide_residual=False, gain=1.0), 1 / 8, 128**-0.5, 1.0, 1 / 8, marks=pytest.mark.slow
        ),
        pytest.param(InitRule(std=0.02, embed_std=0.5), 0.02, 0.02, 1 / 4, 0.5, marks=pytest.mark.slow),
    ],
)
def test_deviations(rule, matrix, down, residual, table):
    spec = mpt.Config(**CONFIG, init=rule).build().spec()
    weights = spec.init(
        jax.random.key(0), "float32", shardings(spec, Mesh(fsdp=(1,)).build(jax.devices()[:1]))
    )
    layer = weights["stacks"][0][0]["layer"]
    expected = {
        "query": (layer["attention"]["query"], matrix),
        "key": (layer["attention"]["key"], matrix),
        "out": (layer["attention"]["out"], matrix * residual),
        "up": (layer["mlp"]["up"], matrix),
        "down": (layer["mlp"]["down"], down * residual),
        "tokens": (weights["embed"]["tokens"], table),
        "head": (weights["head"], matrix),
    }
    for name, (leaf, std) in expected.items():
        values = np.asarray(leaf, np.float64)
        # A sample's deviation is within four of its own deviations.
        assert values.std() == pytest.approx(std, rel=4 / (2 * values.size) ** 0.5), name
    for name, leaf in {**layer["attention"], **layer["mlp"]}.items():
        if name.endswith("_bias"):
            assert (np.asarray(leaf) == 0).all(), name


@pytest.mark.parametrize(
    ("init", "std"),
    [
        # sqrt(2 / 5 embed), whatever a matrix sums over, and 2 / (8 layers sqrt(embed)) into the stream.
        (SmallInit().matrix(("mlp",)), (2 / (5 * 64)) ** 0.5),
        (SmallInit().embedding(), (2 / (5 * 64)) ** 0.5),
        (SmallInit().residual(("mlp",), 8), 2 / 8 / 64**0.5),
        (SmallInit(divide_residual=False).residual(("mlp",), 8), (2 / (5 * 64)) ** 0.5),
        (SmallInit(gain=1.0, embed_std=0.3).matrix(("embed",)), 1 / 8),
        (SmallInit(gain=1.0, embed_std=0.3).embedding(), 0.3),
    ],
)
def test_deviations_of_small_init(init, std):
    drawn = np.asarray(init.draw(jax.random.key(1), (200, 100), CONFIG))
    assert drawn.std() == pytest.approx(std, rel=4 / (2 * drawn.size) ** 0.5)

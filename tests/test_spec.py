"""Declared weights: shapes and counts by hand, and draws that do not depend on their surroundings."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax.errors import InputError
from mosaicjax.mesh import Mesh, shardings
from mosaicjax.spec import (
    LAYER_KEY,
    ONES,
    Constant,
    FanIn,
    Layers,
    Normal,
    Param,
    Spec,
    at_least_float32,
    join_dims,
    name_hash,
    stacked,
)
from tests import jobs

DIMS = {"embed": 8, "mlp": 24, "vocab": 40}
KEY = jax.random.key(3)


def one_layer(scale=1.0):
    return {
        "up": Param(("embed", "mlp"), FanIn(("embed",), scale)),
        "norm": {"scale": Param(("embed",), ONES, decay=False)},
    }


def tree(layers=3):
    return {
        "table": Param(("vocab", "embed"), Normal(0.02)),
        "stacks": [[{LAYER_KEY: stacked(one_layer(), Layers(0, 1, layers))}]],
    }


def drawn(weights, dims=DIMS, dtype="float32", mesh=None, devices=1):
    spec = Spec(weights, dims)
    layout = (mesh or Mesh(fsdp=(1,))).build(jax.devices()[:devices])
    return spec.init(KEY, dtype, shardings(spec, layout))


def test_shapes_counts_and_bytes_by_hand():
    spec = Spec(tree(), DIMS)
    shapes = {name: param.shape(DIMS) for name, param in spec.items()}
    assert shapes == {
        "table": (40, 8),
        "stacks/0/0/layer/up": (3, 8, 24),
        "stacks/0/0/layer/norm/scale": (3, 8),
    }
    assert spec.count() == 40 * 8 + 3 * (8 * 24 + 8) == 920
    assert {dtype: spec.nbytes(dtype) for dtype in ("float64", "float32", "bfloat16")} == {
        "float64": 7360,
        "float32": 3680,
        "bfloat16": 1840,
    }
    place = NamedSharding(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]), P())
    abstract = spec.abstract("bfloat16", spec.map(lambda _: place))
    assert abstract["table"].shape == (40, 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("bfloat16")}
    assert {leaf.sharding for leaf in jax.tree.leaves(abstract)} == {place}
    assert spec.map(lambda param: param.decay)["stacks"][0][0][LAYER_KEY] == {
        "up": True,
        "norm": {"scale": False},
    }


def test_one_name_has_one_size():
    assert join_dims({"embed": 8}, {"embed": 8, "mlp": 3}, {"mlp": 3}) == {"embed": 8, "mlp": 3}
    with pytest.raises(InputError, match="the axis 'embed' has two sizes; expected 8; got 9"):
        join_dims({"embed": 8}, {"embed": 9})


def test_an_axis_without_a_size():
    spec = Spec({"w": Param(("embed", "experts"), ONES)}, DIMS)
    with pytest.raises(
        InputError, match=re.escape("has the axis 'experts', which has no size; expected ['embed'")
    ):
        spec.count()


def test_a_new_weight_changes_no_other():
    before = drawn(tree())
    more = tree()
    more["head"] = Param(("vocab", "embed"), Normal(0.02))
    more["stacks"][0][0][LAYER_KEY]["gate"] = Param(
        ("embed", "mlp"), FanIn(("embed",)), layers=Layers(0, 1, 3)
    )
    after = drawn(more)
    assert (after["table"] == before["table"]).all()
    assert (after["stacks"][0][0][LAYER_KEY]["up"] == before["stacks"][0][0][LAYER_KEY]["up"]).all()
    flat = [np.asarray(leaf).ravel()[:50] for leaf in jax.tree.leaves(after) if leaf.std() > 0]
    correlations = np.corrcoef([leaf for leaf in flat if leaf.size == 50])
    assert np.abs(correlations - np.eye(len(correlations))).max() < 0.6


def test_layers_differ_and_keep_their_numbers():
    whole = drawn(tree(4))["stacks"][0][0][LAYER_KEY]["up"]
    assert len({np.asarray(layer).tobytes() for layer in whole}) == 4
    # Layers 1 and 3, as the second block of a stack of two: the same numbers, whatever the arrangement.
    odd = drawn({"stacks": [[{}, {LAYER_KEY: stacked(one_layer(), Layers(1, 2, 2))}]]})["stacks"][0][1][
        LAYER_KEY
    ]["up"]
    assert (odd == whole[1::2]).all()
    tail = drawn({"stacks": [[], [{LAYER_KEY: stacked(one_layer(), Layers(2, 1, 2))}]]})
    assert (tail["stacks"][1][0][LAYER_KEY]["up"] == whole[2:]).all()


def test_names_do_not_collide_in_a_model():
    paths = jax.tree_util.tree_flatten_with_path(tree())[0]
    assert len({name_hash(path) for path, _ in paths}) == 3


def test_draws_have_their_rule():
    dims = {"embed": 64, "mlp": 256, "vocab": 100}
    weights = drawn(
        {
            "fan": Param(("embed", "mlp"), FanIn(("embed",), gain=3.0)),
            "both": Param(("embed", "mlp"), FanIn(("embed", "mlp"))),
            "normal": Param(("vocab", "embed"), Normal(0.02)),
            "constant": Param(("embed",), Constant(0.5)),
        },
        dims,
    )
    for name, std in (("fan", 3 / 8), ("both", 1 / 128), ("normal", 0.02)):
        values = np.asarray(weights[name], np.float64)
        assert values.std() == pytest.approx(std, rel=4 / math.sqrt(2 * values.size))
        assert abs(values.mean()) < 4 * std / math.sqrt(values.size)
        # Of a normal, 4.55 % lie beyond two deviations.
        assert (np.abs(values) > 2 * std).mean() == pytest.approx(0.0455, abs=0.012)
    assert (np.asarray(weights["constant"]) == 0.5).all()


@pytest.mark.parametrize("mesh", [Mesh(fsdp=(8,)), Mesh(data=2, fsdp=(2,), tensor=2)])
def test_draws_do_not_depend_on_the_mesh(mesh):
    alone, spread = drawn(tree()), drawn(tree(), mesh=mesh, devices=8)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), alone, spread)
    assert spread["table"].sharding.shard_shape((40, 8)) == ((40, 1) if mesh.tensor == 1 else (20, 4))


def test_draws_are_rounded_to_their_dtype():
    low = drawn(tree(), dtype="bfloat16")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a.astype(jnp.bfloat16)), np.asarray(b)),
        drawn(tree()),
        low,
    )


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_at_least_float32(dtype, wide):
    assert jnp.dtype(at_least_float32(dtype)) == wide


@pytest.mark.slow
def test_a_model_is_drawn_on_its_shards():
    # MPT-125M in two processes of four devices, as a run draws it: the step is compiled before. Each should
    # hold half of it, and little beside. In a process that has compiled nothing yet, the compiler's own code
    # comes to it: 45 MB, whatever the model.
    for result in jobs.run_job("init_worker.py", count=2, devices=4):
        assert result.returncode == 0, result.stderr
        memory = json.loads(result.stdout)
        print(memory)
        assert memory["devices"] == 8
        assert memory["tree"] == 4 * 123_636_480
        assert memory["held"] == memory["tree"] / 2
        assert memory["grown"] < 0.6 * memory["tree"]
        assert memory["peak"] < 0.7 * memory["tree"]
        assert memory["temporary"] < 0.15 * memory["tree"]
        # Weights and Adam's two moments, an eighth of each on a device.
        assert memory["step_arguments"] == pytest.approx(3 / 8 * memory["tree"], rel=0.01)

"""Where weights and rows lie, and that a gathered weight and its gradient are the whole ones."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax.errors import InputError
from mosaicjax.mesh import (
    BATCH,
    LENGTH,
    REST,
    Mesh,
    fsdp,
    gather,
    global_array,
    local_rows,
    shardings,
)
from mosaicjax.show import shard_bytes
from mosaicjax.spec import ONES, Dtypes, Layers, Param, Spec

EIGHT = [
    Mesh(fsdp=(8,)),
    Mesh(fsdp=(2, 2, 2)),
    Mesh(fsdp=(4, 2)),
    Mesh(fsdp=(2, 2), tensor=2),
    Mesh(data=2, fsdp=(2,), tensor=2),
    Mesh(data=2, fsdp=(1,), tensor=4),
]
WEIGHT = Param(("embed", "heads", "head_dim"), ONES)
DIMS = {"embed": 16, "heads": 4, "head_dim": 3}


def layout(mesh, gather="compiler"):
    return replace(mesh, gather=gather).build(jax.devices())


@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=3, max_size=5),
    hidden=st.integers(0, 5),
)
def test_rest_is_what_the_others_leave(sizes, hidden):
    devices = int(np.prod(sizes))
    asked = [REST if i == hidden else size for i, size in enumerate(sizes)]
    mesh = Mesh(data=asked[0], fsdp=tuple(asked[1:-1]), tensor=asked[-1])
    axes = mesh.axes(devices)
    assert list(axes.values()) == sizes
    names = ["fsdp"] if len(sizes) == 3 else [f"fsdp{i}" for i in range(len(sizes) - 2)]
    assert list(axes) == ["data", *names, "tensor"]


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (Mesh(fsdp=(3,)), "expected axes that multiply to 8; got data 1 x fsdp 3 x tensor 1"),
        (Mesh(fsdp=(REST,), tensor=3), "expected axes that multiply to 8; got data 1 x fsdp 2 x tensor 3"),
        (Mesh(fsdp=(REST,), tensor=16), "expected axes that multiply to 8; got data 1 x fsdp 0 x tensor 16"),
        (Mesh(fsdp=()), "mesh.fsdp is empty"),
        (Mesh(fsdp=(0,)), "mesh sizes; expected positive numbers, at most one REST (-1)"),
        (Mesh(data=REST, fsdp=(REST,)), "mesh sizes; expected positive numbers, at most one REST (-1)"),
    ],
)
def test_meshes_that_do_not_fit(mesh, words):
    with pytest.raises(InputError, match=re.escape(words)):
        mesh.axes(8)


def test_partitions_by_hand():
    torus = layout(Mesh(fsdp=(2, 2), tensor=2))
    assert torus.weight_partition(WEIGHT) == P(("fsdp0", "fsdp1"), "tensor", None)
    assert torus.weight_partition(Param(WEIGHT.axes, ONES, layers=Layers(0, 1, 3))) == P(
        None, ("fsdp0", "fsdp1"), "tensor", None
    )
    assert torus.partition((BATCH, None, "vocab")) == P(("data", "fsdp0", "fsdp1"), None, "tensor")
    rows = P(("data", "fsdp0", "fsdp1"), "tensor", None)
    assert torus.partition((BATCH, LENGTH, None)) == rows
    whole = layout(Mesh(fsdp=(2, 2), tensor=2, rules={LENGTH: "none"}))
    assert whole.partition((BATCH, LENGTH, None)) == P(rows[0], None, None)
    assert torus.partition((BATCH, "mlp"), skip=torus.batch_axes) == P(None, "tensor")
    assert (torus.batch_shards, torus.weight_shards) == (4, 8)
    plain = layout(fsdp(rules={"kv_heads": "none"}))
    assert plain.partition(("embed", "kv_heads")) == P("fsdp", None)
    assert (plain.batch_shards, plain.weight_shards) == (8, 8)


def test_two_dims_of_one_mesh_axis():
    with pytest.raises(InputError, match=r"two dims of \('heads', 'mlp'\) want the same mesh axis"):
        layout(fsdp()).partition(("heads", "mlp"))
    with pytest.raises(InputError, match="want the same mesh axis"):
        layout(fsdp()).partition((BATCH, "embed"))
    with pytest.raises(InputError, match="no rule says where the dim 'nowhere' goes"):
        layout(fsdp()).partition(("nowhere",))


def test_dims_that_do_not_divide():
    spec = Spec({"query": WEIGHT}, {"embed": 16, "heads": 3, "head_dim": 3})
    with pytest.raises(InputError) as refusal:
        layout(Mesh(fsdp=(4,), tensor=2)).check(spec)
    assert str(refusal.value) == (
        "query: the dim 'heads' does not divide over the mesh; expected a multiple of 2 (tensor); got 3; "
        "fix: another size or mesh, or mesh.rules {'heads': 'none'} to copy it"
    )
    layout(Mesh(fsdp=(4,), tensor=2, rules={"heads": "none"})).check(spec)
    with pytest.raises(
        InputError, match=re.escape("'embed' does not divide over the mesh; expected a multiple of 8")
    ):
        layout(Mesh(fsdp=(4, 2))).check(Spec({"query": WEIGHT}, DIMS | {"embed": 12}))


@pytest.mark.parametrize("mesh", EIGHT)
def test_shard_bytes_are_those_of_live_shards(mesh):
    spec = Spec({"query": WEIGHT, "norm": Param(("embed",), ONES)}, DIMS)
    where = layout(mesh)
    live = jax.tree.leaves(spec.init(jax.random.key(0), "float32", shardings(spec, where)))
    for device in jax.devices():
        held = [
            shard.data.nbytes for leaf in live for shard in leaf.addressable_shards if shard.device == device
        ]
        assert sum(held) == shard_bytes(spec.abstract("float32", shardings(spec, where)))


@pytest.mark.parametrize(
    ("compute", "sums"), [("float32", "reduce"), ("bfloat16", "reduce"), ("float32", "compute")]
)
@pytest.mark.parametrize("mesh", EIGHT)
def test_explicit_gather_and_its_gradient(mesh, compute, sums):
    where = layout(replace(mesh, sums=sums), "explicit")
    dtypes = Dtypes(compute=compute)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 4, 3)).astype(np.float32)
    # Small integers: their sums are exact in any order.
    pulls = rng.integers(-8, 9, (where.batch_shards, 16, 4, 3)).astype(np.float32)
    held = where.weight_partition(WEIGHT, skip=("tensor",))

    def shard(weight, pull):
        def objective(weight):
            whole = gather(weight, WEIGHT, where.inside(), dtypes)
            assert whole.shape == (16, 4, 3)
            assert whole.dtype == compute
            return jnp.sum(whole.astype(jnp.float32) * pull[0]), whole

        grad, whole = jax.grad(objective, has_aux=True)(weight)
        return jax.lax.psum(grad, "data"), whole[None]

    rows = P(where.batch_axes)
    run = jax.shard_map(
        shard,
        mesh=where.mesh,
        in_specs=(held, rows),
        out_specs=(held, rows),
        axis_names=set(where.batch_axes),
        check_vma=False,
    )
    placed = jax.device_put(weight, where.weight_sharding(WEIGHT))
    grad, wholes = jax.jit(run)(placed, jax.device_put(pulls, NamedSharding(where.mesh, rows)))
    for whole in np.asarray(wholes.astype(jnp.float32)):
        np.testing.assert_array_equal(whole, np.asarray(jnp.asarray(weight, compute).astype(jnp.float32)))
    np.testing.assert_array_equal(grad, pulls.sum(axis=0))
    assert grad.dtype == jnp.float32


@pytest.mark.parametrize("mesh", EIGHT)
def test_compiler_gather_and_its_gradient(mesh):
    where = layout(mesh)
    rng = np.random.default_rng(0)
    weight = rng.integers(-8, 9, (16, 4, 3)).astype(np.float32)
    rows = rng.integers(-8, 9, (8, 16)).astype(np.float32)

    @partial(jax.jit, out_shardings=(None, where.weight_sharding(WEIGHT)))
    def run(weight, rows):
        def objective(weight):
            out = jnp.einsum("BD,DHC->BHC", rows, gather(weight, WEIGHT, where, Dtypes()))
            return jnp.sum(out * out) / 2, out

        grad, out = jax.grad(objective, has_aux=True)(weight)
        return out, grad

    out, grad = run(
        jax.device_put(weight, where.weight_sharding(WEIGHT)),
        jax.device_put(rows, where.sharding(BATCH, None)),
    )
    expected = np.einsum("bd,dhc->bhc", rows, weight)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(grad, np.einsum("bd,bhc->dhc", rows, expected))


def test_rows_of_one_process_are_all():
    where = layout(Mesh(data=2, fsdp=(2,), tensor=2))
    assert local_rows(where, 12) == list(range(12))
    value = np.arange(24).reshape(12, 2)
    array = global_array(where, (12, 2), (BATCH, None), lambda index: value[index])
    np.testing.assert_array_equal(array, value)
    assert array.sharding.shard_shape((12, 2)) == (3, 2)

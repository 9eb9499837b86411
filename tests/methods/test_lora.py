"""Low-rank adapters: their gradients beside those of the merged weight, and what is held of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax.adapters import Adapted, Adapter, is_adapter, merge
from mosaicjax.errors import InputError
from mosaicjax.layers.linear import linear
from mosaicjax.layers.moe import Moe
from mosaicjax.mesh import shardings
from mosaicjax.methods.freeze import FreezeLayers
from mosaicjax.methods.lora import LoRA
from mosaicjax.methods.low_precision import LowPrecision
from mosaicjax.methods.width_transfer import Sizes, WidthTransfer
from mosaicjax.models import mpt
from mosaicjax.optim import AdamW, Lion
from mosaicjax.program import Phase
from mosaicjax.spec import Spec, join, whole_spec
from mosaicjax.step import Step
from tests import stepping, tiny
from tests.methods import toy
from tests.models import forward

SOME = LoRA(rank=2, alpha=3.0, targets=("layer/*/mix",))
SMALL = mpt.Config(layers=2, embed=16, heads=2, mlp=32, vocab=32)


def random_adapters(declared: Spec, seed=0):
    """Adapters of these declarations with random numbers everywhere, b too, as numpy."""
    rng = np.random.default_rng(seed)
    return declared.map(lambda param: rng.normal(0, 0.3, param.shape(declared.dims)).astype(np.float32))


def effective(adapters, weights):
    """All weights with adapters added, by numpy in float64."""

    def add(adapter, weight):
        if adapter is None:
            return weight
        count, rank = len(adapter.a), adapter.a.shape[-1]
        a = np.asarray(adapter.a, np.float64).reshape(count, -1, rank)
        b = np.asarray(adapter.b, np.float64).reshape(count, rank, -1)
        added = adapter.scale * np.matmul(a, b)
        return (weight + added.reshape(weight.shape)).astype(weight.dtype)

    return jax.tree.map(add, adapters, weights, is_leaf=lambda node: node is None or is_adapter(node))


def of_adapters(adapters, grads):
    """The gradients of a and b out of that of the weight that they add up to, by numpy."""

    def one(adapter, grad):
        if adapter is None:
            return None
        count, rank = len(adapter.a), adapter.a.shape[-1]
        a, b = adapter.a.reshape(count, -1, rank), adapter.b.reshape(count, rank, -1)
        matrix = np.asarray(grad).reshape(count, a.shape[1], b.shape[2])
        of_a = adapter.scale * np.matmul(matrix, b.swapaxes(1, 2))
        of_b = adapter.scale * np.matmul(a.swapaxes(1, 2), matrix)
        return replace(adapter, a=of_a.reshape(adapter.a.shape), b=of_b.reshape(adapter.b.shape))

    return jax.tree.map(one, adapters, grads, is_leaf=lambda node: node is None or is_adapter(node))


def placed(step, tree, spec):
    return jax.tree.map(jax.device_put, tree, shardings(spec, step.layout))


@pytest.mark.parametrize("mesh", ["one", *toy.MESHES])
def test_gradients_are_those_of_the_merged_weight(mesh):
    made = SOME(toy.program(microbatch=4))
    step = toy.step_of(made, toy.MESHES.get(mesh, toy.ONE))
    adapters, weights, rows = random_adapters(made.trainable), toy.whole_start(), toy.batch()
    expected, loss = toy.naive_gradients(effective(adapters, weights), rows)
    with tiny.quick():
        arguments = placed(step, adapters, made.trainable), placed(step, weights, made.frozen), {}
        grads, (objective, weight, _, _) = jax.jit(step.gradients)(
            *arguments, stepping.put(step, rows), jax.random.key(0)
        )
    assert float(objective / weight) == pytest.approx(loss, rel=1e-5)
    means = jax.tree.map(lambda leaf: np.asarray(leaf) / float(weight), grads)
    toy.close(means, of_adapters(adapters, expected), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", [AdamW(), Lion()], ids=lambda each: type(each).__name__)
def test_what_lives_on_the_device_is_of_adapters_alone(optimizer):
    made = SOME(toy.program(optimizer=optimizer))
    # Four layers of a [8, 2] and b [2, 8].
    assert made.trainable.count() == 4 * (8 * 2 + 2 * 8)
    assert whole_spec(made.trainable, made.frozen).tree == made.frozen.tree == toy.SPEC.tree
    step = toy.step_of(made)
    with tiny.quick():
        before = {id(each) for each in jax.live_arrays()}
        state = step.init()
        alive = sum(each.nbytes for each in jax.live_arrays() if id(each) not in before)
    copies = 1 + (2 if isinstance(optimizer, AdamW) else 1)
    # Beside weights and moments there are counts of steps.
    assert copies * 4 * 128 <= alive <= copies * 4 * 128 + 64
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == (copies - 1) * 4 * 128


def test_a_begins_random_and_b_at_zero():
    made = LoRA(rank=64, alpha=1.0, targets=("layer/*/mix",))(toy.program())
    with tiny.quick():
        state = toy.step_of(made).init()
    adapters = [each for each in jax.tree.leaves(state.trainable, is_leaf=is_adapter) if is_adapter(each)]
    every = np.concatenate([np.asarray(each.a).ravel() for each in adapters])
    # The variance of numbers uniform up to 1 / sqrt(8).
    assert every.std() == pytest.approx((1 / 3 / 8) ** 0.5, rel=0.05)
    assert len(np.unique(every)) == every.size
    assert not any(np.asarray(each.b).any() for each in adapters)


def test_frozen_weights_are_an_argument():
    made = SOME(toy.program())
    step = toy.step_of(made)
    with tiny.quick():
        compiled = step.lower().compile()
        state = replace(step.init(), trainable=placed(step, random_adapters(made.trainable), made.trainable))
        frozen = step.init_frozen()
    for factor in (1.0, 2.0):
        weights = jax.tree.map(lambda leaf, factor=factor: np.asarray(leaf) * np.float32(factor), frozen)
        mine = jax.tree.map(np.asarray, state.trainable)
        loss = toy.naive_gradients(effective(mine, weights), toy.batch())[1]
        state = step.start(placed(step, mine, made.trainable))
        held = placed(step, weights, made.frozen)
        _, _, metrics = compiled(state, held, stepping.put(step, toy.batch()), stepping.signals(step))
        state = step.start(placed(step, mine, made.trainable))
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("into", "out"), [((5,), (3,)), ((2, 3), (4,)), ((4,), (3, 2))], ids=str)
def test_a_merged_weight_does_what_both_do(into, out, rank=2, scale=0.7):
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    weight, x = draw(*into, *out), draw(2, 3, *into)
    adapter = Adapter(draw(*into, rank), draw(rank, *out), scale, len(into))
    both = Adapted(weight, adapter)
    by_hand = np.tensordot(x, weight, len(into)) + scale * np.tensordot(
        np.tensordot(x, adapter.a, len(into)), adapter.b, 1
    )
    np.testing.assert_allclose(linear(x, both, len(into)), by_hand, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(linear(x, merge(both), len(into)), by_hand, rtol=1e-4, atol=1e-4)
    layers = Adapted(
        draw(2, *into, *out), Adapter(draw(2, *into, rank), draw(2, rank, *out), scale, len(into))
    )
    each = [merge(jax.tree.map(lambda leaf, n=n: leaf[n], layers)) for n in range(2)]
    np.testing.assert_allclose(merge(layers), np.stack(each), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "others",
    [pytest.param((), id="plain"), pytest.param((LowPrecision(),), id="int8", marks=pytest.mark.soak)],
)
def test_a_decoder_on_a_mesh_as_on_one_device(others):
    """Logits with adapters are those of merged weights, and gradients on 2 x 2 x 2 devices those on one."""
    if others:
        pytest.importorskip("qwix")
    decoder = SMALL.build()
    made = stepping.program(decoder, Phase(8, 8, 8))
    for method in (*others, LoRA(rank=2, alpha=4.0)):
        made = method(made)
    weights, adapters = forward.random_weights(decoder), random_adapters(made.trainable)
    rows = stepping.rows(made.phase, 32)
    found = []
    for mesh in (toy.ONE, *toy.MESHES.values()):
        step = Step(made, stepping.place(mesh, 1 if mesh is toy.ONE else 8), seed=0)
        with tiny.quick():
            arguments = placed(step, adapters, made.trainable), placed(step, weights, made.frozen), {}
            grads, sums = jax.jit(step.gradients)(*arguments, stepping.put(step, rows), jax.random.key(0))
        found.append((jax.tree.map(np.asarray, grads), float(sums[0])))
    for grads, objective in found[1:]:
        assert objective == pytest.approx(found[0][1], rel=1e-4)
        toy.close(grads, found[0][0], rtol=1e-2 if others else 1e-3, atol=1e-2 if others else 1e-4)
    if not others:
        tokens = rows["tokens"][:2]
        beside = forward.logits(decoder, join(adapters, weights), tokens)
        alone = forward.logits(decoder, effective(adapters, weights), tokens)
        assert np.abs(beside - alone).max() < 1e-5 * np.abs(alone).max()


def test_by_default_all_matrices_of_layers_are_adapted():
    adapters = LoRA(rank=2).adapters(SMALL.build().spec())
    assert {name for name, _ in adapters.items()} == {
        f"stacks/0/0/layer/{weight}/{part}"
        for weight in (
            "attention/query",
            "attention/key",
            "attention/value",
            "attention/out",
            "mlp/up",
            "mlp/down",
        )
        for part in "ab"
    }
    shapes = {name: param.shape(adapters.dims) for name, param in adapters.items()}
    assert shapes["stacks/0/0/layer/attention/out/a"] == (2, 2, 8, 2)
    assert shapes["stacks/0/0/layer/attention/query/b"] == (2, 2, 2, 8)


CONTRADICTS = (
    "LoRA freezes all weights, and FreezeLayers would freeze some of them once more; expected LoRA or"
)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((LoRA(rank=0),), "LoRA; expected rank of 1 or more, alpha above 0; got 0, 16"),
        ((LoRA(alpha=0.0),), "LoRA; expected rank of 1 or more, alpha above 0; got 8, 0"),
        ((LoRA(targets=("embed",)),), "LoRA.targets: 'embed' matches no weight"),
        ((LoRA(targets=()),), "LoRA.targets; expected at least one pattern"),
        (
            (LoRA(targets=("layer/0/mix",)),),
            "LoRA.targets: some layers of stacks/0/layer/mix alone; expected all",
        ),
        ((SOME, FreezeLayers(("*",))), CONTRADICTS),
        ((FreezeLayers(("embed",)), SOME), CONTRADICTS),
        ((SOME, WidthTransfer(Sizes(8, 1, 8))), "WidthTransfer sets how weights start and learn"),
    ],
)
def test_what_cannot_be(methods, message):
    made = toy.program()
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        for method in methods:
            made = method(made)


def test_experts_are_not_adapted():
    decoder = replace(SMALL, ffn=Moe(top_k=1), experts=2).build()
    adapted = {name.rsplit("/", 2)[1] for name, _ in LoRA(targets=("*",)).adapters(decoder.spec()).items()}
    assert adapted == {"query", "key", "value", "out"}

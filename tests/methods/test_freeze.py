"""Frozen weights: what is trained is trained as by hand, and the rest is an argument that stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.losses import CrossEntropy
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.methods.freeze import FreezeLayers
from mosaicjax.models import mpt
from mosaicjax.nonfinite import backward_order
from mosaicjax.optim import AdamW, Constant, Lion
from mosaicjax.program import Phase
from mosaicjax.spec import join, split, whole_spec
from mosaicjax.step import Step
from tests import stepping, tiny
from tests.methods import toy
from tests.models import forward

SOME = FreezeLayers(("embed", "layer/[01]/mix", "layer/?/gain"))


def trained(weights, method):
    """The part of all weights that these patterns leave to be trained, of numpy arrays."""
    made = method(toy.program())
    return split(jax.tree.map(jnp.asarray, weights), made.trainable, made.frozen)[0]


def adamw(weights, grads_of, steps, lr=1e-2, b1=0.9, b2=0.95, eps=1e-8, decay=1e-3):
    """AdamW in numpy on flat lists; gains and the norm, of name `...gain` and `norm`, are not decayed."""
    decays = [not (name.endswith("gain") or name == "norm") for name in toy.NAMES]
    leaves, tree = jax.tree.flatten(weights)
    leaves = [leaf.astype(np.float64) for leaf in leaves]
    m, v = [0.0] * len(leaves), [0.0] * len(leaves)
    for t in range(1, steps + 1):
        narrow = [leaf.astype(np.float32) for leaf in leaves]
        grads = jax.tree.leaves(grads_of(jax.tree.unflatten(tree, narrow), t - 1))
        for i, grad in enumerate(grads):
            m[i] = b1 * m[i] + (1 - b1) * grad
            v[i] = b2 * v[i] + (1 - b2) * grad.astype(np.float64) ** 2
            update = m[i] / (1 - b1**t) / (np.sqrt(v[i] / (1 - b2**t)) + eps)
            leaves[i] = leaves[i] - lr * update - decays[i] * decay * leaves[i]
    return jax.tree.unflatten(tree, leaves)


def frozen_by_hand(weights, before):
    """All weights after a step, with those that `SOME` freezes as they were before."""
    mixed = jax.tree.map(np.copy, weights)
    mixed["embed"] = before["embed"]
    for turn in (0, 1):
        mixed["stacks"][turn]["layer"]["gain"] = before["stacks"][turn]["layer"]["gain"]
        mixed["stacks"][turn]["layer"]["mix"][0] = before["stacks"][turn]["layer"]["mix"][0]
    return mixed


@pytest.mark.parametrize("mesh", [pytest.param("compiler", marks=pytest.mark.slow), "explicit"])
def test_the_rest_is_trained_as_by_hand(mesh):
    start = toy.whole_start()

    def gradients(weights, number):
        return toy.naive_gradients(frozen_by_hand(weights, start), toy.batch(number))[0]

    # By hand all weights have moments and updates, and the frozen ones are put back before each step.
    expected = trained(adamw(start, gradients, 3), SOME)
    states, _, _ = toy.run(SOME(toy.program()), 3, toy.MESHES.get(mesh, toy.ONE))
    toy.close(states[-1].trainable, jax.tree.map(np.asarray, expected), rtol=1e-4, atol=1e-6)


@settings(max_examples=25)
@given(data=st.data(), optimizer=st.sampled_from([AdamW(), Lion(lr=Constant(1e-3))]))
def test_state_is_of_what_is_trained_alone(data, optimizer):
    """Patterns drawn at random: every weight is in one part, or its first layers are in the other."""
    chosen = data.draw(
        st.sets(st.sampled_from(["embed", "norm", "layer/?/gain", "layer/[01]/*"]), min_size=1)
    )
    made = FreezeLayers(tuple(sorted(chosen)))(toy.program(optimizer=optimizer))
    assert whole_spec(made.trainable, made.frozen) == toy.SPEC
    sizes = {"embed": 128, "norm": 8, "gain": 32, "mix": 256}
    held = {"embed": 128 * ("embed" in chosen), "norm": 8 * ("norm" in chosen)}
    held["mix"] = 128 if "layer/[01]/*" in chosen else 0
    held["gain"] = 32 if "layer/?/gain" in chosen else 16 if "layer/[01]/*" in chosen else 0
    count = sum(sizes.values()) - sum(held.values())
    assert (made.trainable.count(), made.frozen.count()) == (count, sum(held.values()))
    state = toy.step_of(made).abstract_state()
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == count * (2 if isinstance(optimizer, AdamW) else 1)


def test_parts_are_drawn_as_the_whole_and_made_whole_again():
    made = SOME(toy.program())
    step = toy.step_of(made, toy.MESHES["compiler"])
    with tiny.quick():
        trainable, frozen = step.init().trainable, step.init_frozen()
    whole = join(trainable, frozen)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, whole), toy.whole_start())
    parts = split(whole, made.trainable, made.frozen)
    for part, expected in zip(parts, (trainable, frozen), strict=True):
        assert jax.tree.structure(part) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(part), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.sharding == theirs.sharding


def test_frozen_weights_are_an_argument_and_stay():
    step = toy.step_of(SOME(toy.program()))
    with tiny.quick():
        compiled = step.lower().compile()
    start, rows = toy.whole_start(), toy.batch()
    for factor in (1.0, 2.0):
        with tiny.quick():
            frozen = jax.tree.map(lambda leaf, factor=factor: leaf * factor, step.init_frozen())
            state = step.init()
        weights = jax.tree.map(np.asarray, join(state.trainable, frozen))
        _, _, metrics = compiled(state, frozen, stepping.put(step, rows), stepping.signals(step))
        assert float(metrics["loss"]) == pytest.approx(toy.naive_gradients(weights, rows)[1], rel=1e-5)
    np.testing.assert_array_equal(weights["embed"], 2 * start["embed"])


@pytest.mark.slow
def test_a_decoders_gradient_is_the_part_of_its_whole_gradient():
    decoder = mpt.Config(layers=2, embed=16, heads=2, mlp=16, vocab=32).build()
    made = stepping.program(decoder, Phase(8, 4, 2), loss=CrossEntropy(chunk=4))
    weights = forward.random_weights(decoder)
    rows = stepping.rows(made.phase, 32)
    with tiny.quick():
        whole, _, _ = stepping.gradients(Step(made, stepping.alone(), seed=0), weights, rows)
        frozen = FreezeLayers(("layer/0/*", "*/attention/*"))(ClipGradients()(made))
        step = Step(frozen, stepping.alone(), seed=0)
        whole_weights = jax.tree.map(jnp.asarray, weights)
        mine, held = split(whole_weights, frozen.trainable, frozen.frozen)
        key = jax.random.key(0)
        grads, _ = jax.jit(step.gradients)(mine, held, {}, stepping.put(step, rows), key)
    expected = split(jax.tree.map(jnp.asarray, whole), frozen.trainable, frozen.frozen)[0]
    assert (
        "query" not in str(jax.tree.structure(grads))
        or grads["stacks"][0][0]["layer"]["attention"]["query"] is None
    )
    toy.close(grads, expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_what_is_left_is_named_by_its_layer():
    decoder = mpt.Config(layers=3, embed=16, heads=2, mlp=16, vocab=32).build()
    grads = {"embed/tokens": np.float32(1), "stacks/0/0/layer/mlp/up": np.array([2, 3], np.float32)}
    named = [("layer 2, mlp/up", 3.0), ("layer 1, mlp/up", 2.0), ("embed/tokens", 1.0)]
    assert backward_order(decoder, grads) == named


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ((), "FreezeLayers.patterns; expected at least one pattern of weights' names; got none"),
        (("layer/4/*",), "FreezeLayers.patterns: 'layer/4/\\*' matches no weight that is trained"),
        (
            ("layer/*", "layer/0/*"),
            "'layer/0/\\*' matches no weight that is trained and that no pattern before",
        ),
        (("layer/2/*",), "the frozen layers of stacks/0/layer/gain are not its first ones; expected all"),
        (("*",), r"FreezeLayers leaves nothing to train; got \*"),
    ],
)
def test_patterns_that_cannot_be(patterns, message):
    with pytest.raises(InputError, match=message):
        FreezeLayers(patterns)(toy.program())

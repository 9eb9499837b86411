"""Methods together: any that do not contradict each other, in any order, beside all of them by hand."""

import itertools
from fnmatch import fnmatchcase

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.methods.ema import Ema
from mosaicjax.methods.freeze import FreezeLayers
from mosaicjax.methods.lora import LoRA
from mosaicjax.methods.rates import ScaleRates
from mosaicjax.methods.sam import Sam
from mosaicjax.methods.selective import SelectiveBackprop
from mosaicjax.methods.swa import Swa
from mosaicjax.spec import named_leaves, split
from tests.methods import toy
from tests.methods.test_averages import by_definition
from tests.methods.test_lora import effective, of_adapters
from tests.methods.test_selective import mean_losses

METHODS = (
    ClipGradients(0.2),
    Ema(decay=0.5, start=1),
    Swa(start=2),
    FreezeLayers(("embed", "layer/[01]/mix")),
    ScaleRates((("layer/3/*", 0.25), ("norm", 3.0))),
    Sam(rho=0.3, every=2),
    SelectiveBackprop(start=0.0, end=1.0, interrupt=0, choice="top"),
    LoRA(rank=2, alpha=3.0, targets=("layer/*/mix",)),
)
NAMES = [type(method).__name__ for method in METHODS]
RATE, STEPS = 0.5, 3

WITH_AVERAGES = "two say which weights a model is used with, a method that averages them or the optimizer"
FROZEN_TWICE = "LoRA freezes all weights, and FreezeLayers would freeze some of them once more"
REFUSED = {
    ("Ema", "Swa"): f"{WITH_AVERAGES}; expected one of them; got the optimizer then Ema then Swa",
    ("Swa", "Ema"): f"{WITH_AVERAGES}; expected one of them; got the optimizer then Swa then Ema",
    ("ScaleRates", "FreezeLayers"): "FreezeLayers after ScaleRates, whose patterns would be of weights that"
    " are not trained; fix: FreezeLayers first",
    ("ScaleRates", "LoRA"): "LoRA after ScaleRates, whose patterns would be of weights that are not trained;"
    " fix: LoRA first",
    **{
        pair: f"{FROZEN_TWICE}; expected LoRA or FreezeLayers; got {pair[0]} then {pair[1]}"
        for pair in (("LoRA", "FreezeLayers"), ("FreezeLayers", "LoRA"))
    },
}


def by_layer(function, tree):
    """A tree of all weights, each layer of it under its name in patterns made another by a function."""
    made = jax.tree.map(np.copy, tree)
    for name in ("embed", "norm"):
        if made[name] is not None:
            made[name] = function(name, made[name])
    for layer in range(toy.LAYERS):
        for name, leaf in named_leaves(made["stacks"][layer % 2]["layer"], None):
            leaf[layer // 2] = function(f"layer/{layer}/{name}", leaf[layer // 2])
    return made


def norm_of(tree):
    return np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)))


def by_hand(methods, start):
    """What is trained before the first step and after each, these methods in whatever order, and averages."""
    given = {type(method).__name__: method for method in methods}
    frozen = given["FreezeLayers"].patterns if "FreezeLayers" in given else ()
    factors = given["ScaleRates"].patterns if "ScaleRates" in given else ()

    def gradients(weights, rows):
        """Of the trained weights alone, from the rows of highest loss at these weights."""
        adapters = weights if "LoRA" in given else None
        if adapters is not None:
            weights = effective(adapters, toy.whole_start())
        if method := given.get("SelectiveBackprop"):
            kept = np.argsort(mean_losses(weights, rows))[-round(method.keep * toy.BATCH_ROWS) :]
            mask = np.isin(np.arange(toy.BATCH_ROWS), kept)[:, None].astype(np.float32)
            rows = rows | {"weights": rows["weights"] * mask}
        grads, _ = toy.naive_gradients(weights, rows)
        if adapters is not None:
            return of_adapters(adapters, grads)
        return by_layer(lambda name, g: g * (not any(fnmatchcase(name, each) for each in frozen)), grads)

    path = [start]
    for number in range(STEPS):
        weights, rows = path[-1], toy.batch(number)
        grads = gradients(weights, rows)
        if (method := given.get("Sam")) and number % method.every == 0:
            scale = np.float32(method.rho / norm_of(grads))
            grads = gradients(jax.tree.map(lambda w, g, s=scale: w + s * g, weights, grads), rows)
        if method := given.get("ClipGradients"):
            share = np.float32(min(1.0, method.norm / norm_of(grads)))
            grads = jax.tree.map(lambda g, s=share: g * s, grads)

        def scaled(name, grad):
            return grad * np.float32(next((f for p, f in factors if fnmatchcase(name, p)), 1.0))

        grads = by_layer(scaled, grads)
        path.append(jax.tree.map(lambda w, g: w - np.float32(RATE) * g, weights, grads))
    averaging = given.get("Ema") or given.get("Swa")
    if averaging is None:
        return path, None
    wide = zip(*(map(np.float64, jax.tree.leaves(weights)) for weights in path), strict=True)
    means = [by_definition(averaging, list(leaves))[-1] for leaves in wide]
    return path, jax.tree.unflatten(jax.tree.structure(path[0]), means)


def together(methods):
    """These methods, with patterns of what is trained beside adapters."""
    adapts = any(isinstance(method, LoRA) for method in methods)
    beside = ScaleRates((("layer/3/*", 0.25), ("*/b", 3.0)))
    return [beside if adapts and isinstance(method, ScaleRates) else method for method in methods]


def assert_as_by_hand(methods, mesh=toy.ONE):
    made = toy.descent(RATE)
    methods = together(methods)
    for method in methods:
        made = method(made)
    assert made.applied == tuple(type(method).__name__ for method in methods)
    states, _, _ = toy.run(made, STEPS, mesh)
    adapts = "LoRA" in made.applied
    path, average = by_hand(methods, states[0].trainable if adapts else toy.whole_start())

    def trained(weights):
        if adapts:
            return weights
        placed = jax.tree.map(jax.numpy.asarray, weights)
        return jax.tree.map(np.asarray, split(placed, made.trainable, made.frozen)[0])

    toy.close(states[-1].trainable, trained(path[-1]), rtol=5e-4, atol=5e-6)
    assert (average is None) == (states[-1].average is None)
    if average is not None:
        toy.close(states[-1].average, trained(average), rtol=5e-4, atol=5e-6)


PAIRS = list(itertools.permutations(METHODS, 2))
IDS = ["-".join(type(method).__name__ for method in pair) for pair in PAIRS]


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
def test_every_pair_composes_or_is_refused_by_name(pair):
    first, second = pair
    refusal = REFUSED.get((type(first).__name__, type(second).__name__))
    if refusal is None:
        first, second = together(pair)
        made = second(first(toy.descent(RATE)))
        assert made.applied == (type(first).__name__, type(second).__name__)
        abstract = toy.step_of(made).abstract_state()
        sizes = [leaf.shape for leaf in jax.tree.leaves(abstract.trainable)]
        averaged = "Ema" in made.applied or "Swa" in made.applied
        assert [leaf.shape for leaf in jax.tree.leaves(abstract.average)] == (sizes if averaged else [])
    else:
        with pytest.raises(InputError) as refused:
            second(first(toy.descent(RATE)))
        assert str(refused.value) == refusal
        assert all(name in refusal for name in (type(first).__name__, type(second).__name__))


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair", [pair for pair in PAIRS if tuple(type(m).__name__ for m in pair) not in REFUSED], ids=str
)
def test_every_pair_does_what_both_do_by_hand(pair):
    assert_as_by_hand(pair)


TOGETHER = [METHODS[i] for i in (6, 1, 3, 0, 5, 4)]


def test_all_together_by_hand():
    assert_as_by_hand(TOGETHER)


def test_all_together_beside_adapters_by_hand():
    assert_as_by_hand([METHODS[i] for i in (6, 1, 7, 0, 5, 4)])


@pytest.mark.slow
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data(), mesh=st.sampled_from([toy.ONE, *toy.MESHES.values()]))
def test_any_of_them_in_any_order_by_hand(data, mesh):
    chosen = data.draw(st.sets(st.sampled_from(range(len(METHODS))), min_size=3))
    chosen -= {2} if 1 in chosen else set()
    chosen -= {7} if 3 in chosen else set()
    order = data.draw(st.permutations(sorted(chosen)))
    for first in (3, 7):
        if first in chosen and 4 in chosen:
            # FreezeLayers and LoRA come before ScaleRates.
            at = sorted(order.index(each) for each in (first, 4))
            order[at[0]], order[at[1]] = first, 4
    assert_as_by_hand([METHODS[i] for i in order], mesh)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_none_is_taken_twice(method):
    name = type(method).__name__
    with pytest.raises(InputError, match=f"the method {name} is listed twice; got {name} then {name}"):
        method(method(toy.descent(RATE)))

"""Muon against a float64 Newton-Schulz of each matrix, and over a mesh against one device."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.mesh import Mesh
from mosaicjax.methods.freeze import FreezeLayers
from mosaicjax.models import gpt2, llama, mixtral, mpt
from mosaicjax.muon import Muon, as_matrices
from mosaicjax.optim import AdamW, Constant, Cosine, Lion
from mosaicjax.polar import Jordan, PolarExpress, minimax, near_polar
from mosaicjax.program import Phase
from mosaicjax.spec import ONES, Layers, Param, Spec, join
from mosaicjax.step import Step
from tests import stepping

LAYERS = Layers(0, 1, 3)
SPEC = Spec(
    {
        "embed": {"tokens": Param(("vocab", "embed"), ONES)},
        "stacks": {
            "query": Param(("embed", "heads", "head_dim"), ONES, layers=LAYERS),
            "out": Param(("heads", "head_dim", "embed"), ONES, layers=LAYERS),
            "up": Param(("experts", "embed", "mlp"), ONES, layers=LAYERS),
            "down": Param(("experts", "mlp", "embed"), ONES, layers=LAYERS),
            "router": Param(("embed", "experts"), ONES, layers=LAYERS),
            "scale": Param(("embed",), ONES, decay=False, layers=LAYERS),
        },
    },
    {"vocab": 11, "embed": 6, "heads": 2, "head_dim": 5, "experts": 2, "mlp": 4},
)
MATRICES = ("query", "out", "up", "down")


def orthogonal(matrix, coefficients):
    """The papers' iteration on one matrix, in float64."""
    x = np.asarray(matrix, np.float64)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (np.sqrt((x**2).sum()) + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if tall else x


def matrices_of(name, array):
    """A weight's matrices one by one, inputs by outputs, by hand."""
    if name == "query":
        return [layer.reshape(6, 10) for layer in array]
    if name == "out":
        return [layer.reshape(10, 6) for layer in array]
    return [expert for layer in array for expert in layer]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nesterov", "rms", "cautious", "decay", "iterations", "lower"),
    [(True, 0.2, False, 0.0, 5, 0), (False, 0.0, False, 0.01, 3, 0.02), (True, 0.2, True, 0.02, 4, 0)],
)
def test_updates_are_the_definitions(nesterov, rms, cautious, decay, iterations, lower):
    polynomials = PolarExpress(lower) if lower else Jordan()
    triples = polynomials.coefficients(iterations) if lower else [(3.4445, -4.7750, 2.0315)] * iterations
    rng = np.random.default_rng(1)
    others = AdamW(lr=Constant(peak=3e-3), weight_decay=1e-3)
    muon = Muon(
        lr=Constant(peak=2e-2),
        nesterov=nesterov,
        rms=rms,
        cautious=cautious,
        weight_decay=decay,
        iterations=iterations,
        polynomials=polynomials,
        others=others,
    )
    weights = SPEC.map(lambda param: jnp.asarray(rng.standard_normal(param.shape(SPEC.dims)), jnp.float32))
    alone = others.build(SPEC, 9)
    transform = optax.with_extra_args_support(muon.build(SPEC, 9))
    state, other_state = transform.init(weights), alone.init(weights)
    momentum = {name: 0.0 for name in MATRICES}
    for _ in range(4):
        grads = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), weights)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transform.update(grads, state, weights)
            expected, other_state = alone.update(grads, other_state, weights)
        for name in ("router", "scale"):
            np.testing.assert_array_equal(updates["stacks"][name], expected["stacks"][name])
        np.testing.assert_array_equal(updates["embed"]["tokens"], expected["embed"]["tokens"])
        for name in MATRICES:
            grad = np.asarray(grads["stacks"][name], np.float64)
            before = np.asarray(weights["stacks"][name], np.float64)
            momentum[name] = 0.95 * momentum[name] + 0.05 * grad
            ahead = 0.95 * momentum[name] + 0.05 * grad if nesterov else momentum[name]
            each = []
            for matrix, weight in zip(matrices_of(name, ahead), matrices_of(name, before), strict=True):
                inputs, outputs = matrix.shape
                scale = 0.2 * np.sqrt(max(inputs, outputs)) if rms else np.sqrt(max(1, outputs / inputs))
                direction = scale * orthogonal(matrix, triples)
                shrunk = decay / 2e-2 * weight
                if cautious:
                    shrunk = np.where(direction * weight > 0, shrunk, 0)
                each.append(-2e-2 * (direction + shrunk))
            found = matrices_of(name, np.asarray(updates["stacks"][name], np.float64))
            np.testing.assert_allclose(np.array(found), np.array(each), rtol=2e-3, atol=2e-6, err_msg=name)
        weights = optax.apply_updates(weights, updates)


@settings(max_examples=8)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    power=st.integers(-6, 6),
    seed=st.integers(0, 2**16),
    polynomials=st.sampled_from([Jordan(), PolarExpress(1e-3)]),
)
def test_singular_values_come_near_one(rows, columns, power, seed, polynomials):
    """Of any matrix that is not nearly singular, whatever its scale; the singular vectors stay."""
    rng = np.random.default_rng(seed)
    rows, columns = sorted((rows, columns))
    u, _ = np.linalg.qr(rng.standard_normal((rows, rows)))
    v, _ = np.linalg.qr(rng.standard_normal((columns, rows)))
    values = rng.uniform(0.05, 1.0, rows) * 10.0**power
    matrix = (u * values) @ v.T
    made = np.asarray(near_polar(jnp.asarray(matrix, jnp.float32)[None], polynomials.coefficients(5)))[0]
    np.testing.assert_allclose(made, orthogonal(matrix, polynomials.coefficients(5)), atol=5e-3)
    inside = u.T @ made @ v
    assert np.abs(inside - np.diag(np.diag(inside))).max() < 5e-3
    assert 0.3 < np.diag(inside).min() and np.diag(inside).max() < 1.35


@given(lower=st.floats(1e-4, 0.9), spread=st.floats(1.1, 1e3))
def test_the_best_polynomial_is_as_far_from_one_at_four_points_by_turns(lower, spread):
    """Which makes it the best (Chebyshev): no other of its kind is nearer to 1 everywhere between."""
    upper = lower * spread
    a, b, c = minimax(lower, upper)
    x = np.linspace(lower, upper, 200_001)
    error = a * x + b * x**3 + c * x**5 - 1
    farthest = np.abs(error).max()
    signs = np.sign(error[np.abs(error) > farthest * (1 - 1e-5)])
    assert 1 + np.count_nonzero(np.diff(signs)) >= 4
    assert signs[0] == -1


@pytest.mark.parametrize(("lower", "iterations"), [(1e-3, 5), (0.02, 3), (0.5, 4)])
def test_what_is_above_the_lower_end_comes_as_near_as_the_composition_says(lower, iterations):
    x = np.geomspace(lower, 1, 10_000)
    for a, b, c in PolarExpress(lower).coefficients(iterations):
        x = a * x + b * x**3 + c * x**5
    # At the lower end the value is the farthest below 1, and nothing is farther above.
    assert x.min() == pytest.approx(x[0], abs=1e-3)
    assert x.max() - 1 <= 1 - x[0] + 1e-3
    assert abs(x - 1).max() < {5: 0.14, 3: 0.11, 4: 1e-6}[iterations]


@pytest.mark.parametrize(
    "config",
    [
        mpt.Config(layers=2, embed=32, heads=4, kv_heads=2, mlp=64, vocab=97, bias=True),
        gpt2.Config(layers=2, embed=32, heads=4, mlp=64, vocab=97),
        llama.Config(layers=2, embed=32, heads=4, mlp=64, vocab=97),
        mixtral.Config(layers=2, embed=32, heads=4, mlp=64, vocab=97),
    ],
    ids=["mpt", "gpt2", "llama", "mixtral"],
)
def test_the_matrices_of_a_family(config):
    names = {name.rpartition("/")[2] for name, param in config.build().spec().items() if as_matrices(param)}
    assert names == {"query", "key", "value", "out", "up", "down"} | ({"gate"} if "gate" in names else set())
    assert ("gate" in names) == (config.__class__ in (llama.Config, mixtral.Config))


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match=re.escape("Muon.momentum; expected 0 to below 1; got 1.0")):
        Muon(momentum=1.0).build(SPEC, 3)
    with pytest.raises(InputError, match=re.escape("Muon.iterations; expected 1 or more; got 0")):
        Muon(iterations=0).build(SPEC, 3)
    with pytest.raises(InputError, match=re.escape("Muon.rms; expected 0 or more; got -0.1")):
        Muon(rms=-0.1).build(SPEC, 3)
    with pytest.raises(InputError, match=re.escape("PolarExpress.lower; expected between 0 and 1; got 1.5")):
        Muon(polynomials=PolarExpress(1.5)).build(SPEC, 3)
    bare = Spec({"embed": {"tokens": Param(("vocab", "embed"), ONES)}}, SPEC.dims)
    with pytest.raises(InputError, match="Muon needs matrices in layers"):
        Muon().build(bare, 3)


@pytest.mark.slow
@pytest.mark.soak
def test_beside_frozen_layers_it_moves_the_others_as_without():
    """A first step: gradients are the same, and each matrix's update is its own."""
    config = mpt.Config(layers=3, embed=32, heads=4, mlp=64, vocab=64)
    phase = Phase(seq=16, batch=8, microbatch=8)
    optimizer = Muon(lr=Constant(peak=2e-2), weight_decay=1e-3, others=AdamW(lr=Constant(peak=1e-3)))
    plain = replace(stepping.program(config.build(), phase, optimizer=optimizer), heavy=True)
    frozen = FreezeLayers(("embed/*", "layer/0/*"))(plain)
    found = []
    for program in (plain, frozen):
        step = Step(program, stepping.place(Mesh(), 1), seed=3)
        state, held = step.init(), step.init_frozen()
        before = jax.device_get(join(state.trainable, held))
        batch = stepping.put(step, stepping.rows(phase, 64))
        state, _, _ = step.lower().compile()(state, held, batch, stepping.signals(step))
        found.append((before, jax.device_get(join(state.trainable, held))))
    (before, moved), (_, kept) = found
    for (path, first), after, other in zip(
        jax.tree_util.tree_flatten_with_path(before)[0],
        jax.tree.leaves(moved),
        jax.tree.leaves(kept),
        strict=True,
    ):
        if path[0].key == "embed":
            np.testing.assert_array_equal(other, first)
        elif path[0].key == "stacks":
            np.testing.assert_array_equal(other[0], first[0], err_msg=str(path))
            np.testing.assert_allclose(other[1:], after[1:], rtol=1e-4, atol=1e-6, err_msg=str(path))
            assert np.abs(after[0] - first[0]).max() > 1e-4
        else:
            np.testing.assert_allclose(other, after, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(Mesh(data=1, fsdp=(8,)), marks=pytest.mark.slow),
        pytest.param(Mesh(data=1, fsdp=(2, 2), tensor=2), marks=pytest.mark.slow),
        pytest.param(Mesh(data=2, fsdp=(4,), gather="explicit"), marks=pytest.mark.slow),
    ],
    ids=["fsdp 8", "2 x 2 x tensor 2", "explicit"],
)
def test_over_a_mesh_it_is_that_of_one_device(mesh):
    config = mpt.Config(layers=4, embed=32, heads=4, mlp=64, vocab=64)
    phase = Phase(seq=16, batch=8, microbatch=8)
    optimizer = Muon(lr=Cosine(peak=2e-2), weight_decay=1e-3, others=Lion(lr=Cosine(peak=1e-3)))
    found = []
    for each, devices in ((Mesh(), 1), (mesh, 8)):
        program = stepping.program(config.build(), phase, optimizer=optimizer)
        step = Step(replace(program, heavy=True), stepping.place(each, devices), seed=3)
        state, compiled = step.init(), step.lower().compile()
        for number in range(3):
            batch = stepping.put(step, stepping.rows(phase, 64, number))
            state, _, metrics = compiled(state, {}, batch, stepping.signals(step))
        found.append(jax.device_get(state.trainable))
    for (path, one), many in zip(
        jax.tree_util.tree_flatten_with_path(found[0])[0], jax.tree.leaves(found[1]), strict=True
    ):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=2e-5, err_msg=str(path))

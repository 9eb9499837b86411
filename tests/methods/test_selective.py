"""Selective backpropagation: which rows are learnt from, by hand and by enumeration."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.losses import CrossEntropy
from mosaicjax.methods.selective import Selected, SelectiveBackprop
from mosaicjax.models import mpt
from mosaicjax.program import Phase
from mosaicjax.step import Step
from tests import stepping, tiny
from tests.methods import toy
from tests.models import forward

ALWAYS = {"start": 0.0, "end": 1.0, "interrupt": 0}
TOP = SelectiveBackprop(choice="top", **ALWAYS)


def mean_losses(weights, rows):
    """The loss a target token of each row, each by itself; minus infinity where it has none."""
    means = []
    for row in range(len(rows["tokens"])):
        alone = rows["weights"] * (np.arange(len(rows["tokens"])) == row)[:, None]
        loss = toy.naive_gradients(weights, rows | {"weights": alone.astype(np.float32)})[1]
        means.append(loss if alone.any() else -np.inf)
    return np.array(means)


def by_hand(weights, steps, kept, microbatch, active):
    """Weights after some steps down the gradient of the rows of highest loss, and each step's loss."""
    losses = []
    for number in range(steps):
        rows = toy.batch(number)
        if number in active:
            means = mean_losses(weights, rows)
            mask = np.zeros((len(means), 1), np.float32)
            for first in range(0, len(means), microbatch):
                mask[first + np.argsort(means[first : first + microbatch])[-kept:]] = 1
            rows = rows | {"weights": rows["weights"] * mask}
        grads, loss = toy.naive_gradients(weights, rows)
        losses.append(loss)
        weights = jax.tree.map(lambda w, g: w - np.float32(0.5) * g, weights, grads)
    return weights, losses


@pytest.mark.parametrize(
    ("mesh", "microbatch", "method", "active"),
    [
        pytest.param(
            *("one", 4, SelectiveBackprop(start=1 / 3, end=1.0, interrupt=2, choice="top"), {2, 4}),
            marks=pytest.mark.slow,
        ),
        pytest.param("compiler", 8, replace(TOP, keep=0.3), {0, 1, 2, 3, 4}, marks=pytest.mark.slow),
        ("explicit", 8, replace(TOP, keep=0.3, end=0.5), {0, 1, 2}),
    ],
)
def test_the_rows_of_highest_loss_are_learnt_from(mesh, microbatch, method, active):
    """2 rows of each microbatch; over 4 shards half the devices are filled up with rows of weight 0."""
    made = method(toy.descent(microbatch=microbatch, steps=6))
    states, metrics, _ = toy.run(made, 5, toy.MESHES.get(mesh, toy.ONE))
    expected, losses = by_hand(toy.whole_start(), 5, 2, microbatch, active)
    assert [row["loss"] for row in metrics] == pytest.approx(losses, rel=1e-5)
    toy.close(states[-1].trainable, expected, rtol=2e-4, atol=2e-6)
    plain, _ = by_hand(toy.whole_start(), 5, 2, microbatch, set())
    assert np.abs(plain["embed"] - expected["embed"]).max() > 1e-3


@given(
    bounds=st.lists(st.integers(0, 20), min_size=2, max_size=2, unique=True).map(sorted),
    interrupt=st.sampled_from([0, 2, 3]),
    steps=st.integers(1, 25),
)
def test_when_rows_are_left_out(bounds, interrupt, steps):
    """Shares of the run in twentieths, so that the oracle counts in whole numbers."""
    first, last = bounds
    method = SelectiveBackprop(start=first / 20, end=last / 20, interrupt=interrupt)
    numbers = np.arange(25, dtype=np.int32)
    expected = [
        20 * n >= first * steps and 20 * n < last * steps and not (interrupt and (n + 1) % interrupt == 0)
        for n in range(steps)
    ]
    assert np.asarray(method.active(numbers, steps)).tolist()[:steps] == expected


@pytest.mark.slow
def test_a_draw_is_the_same_on_any_mesh():
    method = SelectiveBackprop(keep=0.5, **ALWAYS)
    ends = [
        toy.run(method(toy.descent(microbatch=microbatch)), 2, mesh)[0][-1].trainable
        for microbatch, mesh in ((8, toy.ONE), (8, toy.MESHES["explicit"]), (4, toy.ONE))
    ]
    toy.close(ends[1], ends[0], rtol=2e-4, atol=2e-6)
    assert np.abs(ends[2]["embed"] - ends[0]["embed"]).max() > 1e-3


@settings(max_examples=4)
@given(seed=st.integers(0, 2**20), keep=st.sampled_from([0.4, 0.6]))
def test_draws_by_rank_are_those_without_replacement(seed, keep):
    """How often each set is drawn, beside its probability from drawing one row after the other."""
    rows, draws = 5, 4_000
    method = SelectiveBackprop(keep=keep)
    count = method.rows(rows)
    means = np.random.default_rng(seed).permutation(rows).astype(np.float32)
    share = np.arange(rows) ** (1 / keep - 1)
    exact = dict.fromkeys(itertools.combinations(range(rows), count), 0.0)
    for order in itertools.permutations(range(rows), count):
        chance, left = 1.0, share.sum()
        for rank in order:
            chance *= share[rank] / left if left else 0.0
            left -= share[rank]
        exact[tuple(sorted(order))] += chance
    gumbel = jax.random.gumbel(jax.random.key(seed), (draws, rows), jnp.float32)
    scores = jax.vmap(lambda noise: Selected(None, method, 1).scores(jnp.asarray(means), noise))(gumbel)
    drawn = means[np.asarray(jax.lax.top_k(scores, count)[1])].astype(int)
    for ranks, chance in exact.items():
        found = np.mean([tuple(sorted(row)) == ranks for row in drawn])
        assert found == pytest.approx(chance, abs=5 * np.sqrt(0.25 / draws)), ranks


def test_rows_without_targets_are_never_kept_and_broken_ones_are_not_hidden():
    means = jnp.asarray([-jnp.inf, 2.0, -jnp.inf, 1.0, 3.0, jnp.nan])
    noise = jnp.asarray([9.0, 0.0, 9.0, 0.0, 0.0, 0.0])
    for choice in ("rank", "top"):
        scores = Selected(None, SelectiveBackprop(choice=choice), 1).scores(means, noise)
        assert sorted(np.asarray(jax.lax.top_k(scores, 4)[1])) == [1, 3, 4, 5]
        assert int(jax.lax.top_k(scores, 1)[1][0]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_a_decoders_rows(packed):
    """Its gradient is that of the rows kept, in one pass and by chunks of the loss."""
    decoder = mpt.Config(layers=1, embed=16, heads=2, mlp=16, vocab=32).build()
    made = stepping.program(decoder, Phase(8, 8, 8), loss=CrossEntropy(chunk=4), packed=packed)
    weights = forward.random_weights(decoder)
    rows = stepping.rows(made.phase, 32, packed=packed)
    with tiny.quick():
        step = Step(TOP(made), stepping.alone(), seed=0)
        assert step.packed == packed
        got, _, weight = stepping.gradients(step, weights, rows)
        logged = jax.jit(lambda w, b: made.loss.of_rows(w, {}, b, jax.random.key(0), stepping.alone()))
        sums = np.asarray(logged(weights, {name: jnp.asarray(value) for name, value in rows.items()}))
        tokens = rows["weights"].sum(axis=1)
        kept = np.argsort(np.where(tokens > 0, sums / np.maximum(tokens, 1), -np.inf))[-4:]
        mask = np.isin(np.arange(8), kept)[:, None].astype(np.float32)
        some = rows | {"weights": rows["weights"] * mask}
        expected, _, expected_weight = stepping.gradients(Step(made, stepping.alone(), seed=0), weights, some)
    assert weight == expected_weight == tokens[kept].sum()
    toy.close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SelectiveBackprop(keep=0.0), r"keep; expected a share of the rows, in \(0, 1\); got 0.0"),
        (SelectiveBackprop(keep=1.0), r"keep; expected a share of the rows, in \(0, 1\); got 1.0"),
        (SelectiveBackprop(start=0.5, end=0.5), "expected start below end, both shares of the run"),
        (SelectiveBackprop(end=1.1), "expected start below end, both shares of the run"),
        (SelectiveBackprop(interrupt=1), r"interrupt; expected 0 \(never\), or 2 or more steps; got 1"),
        (SelectiveBackprop(keep=0.01), "of a microbatch of 8 rows; expected at least one row kept"),
        (SelectiveBackprop(keep=0.99), "of a microbatch of 8 rows; expected at least one row kept"),
    ],
)
def test_what_cannot_be(method, message):
    with pytest.raises(InputError, match=f"SelectiveBackprop.*{message}"):
        method(toy.program())


def test_shards_that_would_fill_up_a_microbatch_are_refused():
    step = toy.step_of(TOP(toy.program(microbatch=4)), toy.MESHES["compiler"])
    with pytest.raises(
        InputError, match="keeps 2 of a microbatch's 4 rows, which 4 shards of the mesh fill up"
    ):
        step.lower()

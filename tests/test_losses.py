"""Losses against numpy in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.layers.context import Context
from mosaicjax.losses import CrossEntropy, nll
from mosaicjax.models import mpt
from mosaicjax.program import DecoderLoss
from mosaicjax.spec import Dtypes
from tests.models import forward


def rows(seed, scale=3.0, shape=(2, 6), vocab=11):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal((*shape, vocab))).astype(np.float32)
    targets = rng.integers(0, vocab, shape).astype(np.int32)
    weights = (rng.random(shape) * (rng.random(shape) < 0.6)).astype(np.float32)
    return logits, targets, weights


def by_hand(logits, targets, weights):
    """Weighted sums of the negative log-likelihood and of the squared log-partition, token by token."""
    total, squares = 0.0, 0.0
    for b, t in np.ndindex(targets.shape):
        row = logits[b, t].astype(np.float64)
        log_partition = row.max() + np.log(np.exp(row - row.max()).sum())
        total += weights[b, t] * (log_partition - row[targets[b, t]])
        squares += weights[b, t] * log_partition**2
    return total, squares


def smoothed_by_hand(logits, targets, weights, share):
    """Weighted sum of the cross-entropy against a smoothed target, token by token and id by id."""
    total, vocab = 0.0, logits.shape[-1]
    for b, t in np.ndindex(targets.shape):
        row = logits[b, t].astype(np.float64)
        log_shares = row - row.max() - np.log(np.exp(row - row.max()).sum())
        for v in range(vocab):
            target = share / vocab + (1 - share) * (v == targets[b, t])
            total -= weights[b, t] * target * log_shares[v]
    return total


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20), scale=st.sampled_from([0.1, 3.0, 80.0]), z_loss=st.sampled_from([0.0, 1e-3])
)
def test_terms_by_hand(seed, scale, z_loss):
    batch = rows(seed, scale)
    terms = CrossEntropy(z_loss=z_loss).tokens(*map(jnp.asarray, batch))
    total, squares = by_hand(*batch)
    assert float(terms.nll) == pytest.approx(total, rel=2e-6, abs=1e-5)
    assert float(terms.square_lse) == pytest.approx(squares, rel=2e-6, abs=1e-5)
    assert float(terms.objective) == pytest.approx(total + z_loss * squares, rel=2e-6, abs=1e-5)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    share=st.integers(0, 99).map(lambda n: n / 100),
    z_loss=st.sampled_from([0.0, 1e-3]),
)
def test_smoothing_by_hand(seed, share, z_loss):
    batch = rows(seed)
    terms = CrossEntropy(z_loss=z_loss, smoothing=share).tokens(*map(jnp.asarray, batch))
    total, squares = by_hand(*batch)
    expected = smoothed_by_hand(*batch, share) + z_loss * squares
    assert float(terms.objective) == pytest.approx(expected, rel=2e-6, abs=1e-5)
    assert float(terms.nll) == pytest.approx(total, rel=2e-6, abs=1e-5)


def test_gradient_is_softmax_minus_one_hot():
    logits, targets, weights = rows(3)

    def objective(logits):
        return CrossEntropy(z_loss=1e-2).tokens(logits, jnp.asarray(targets), jnp.asarray(weights)).objective

    wide = logits.astype(np.float64)
    exp = np.exp(wide - wide.max(-1, keepdims=True))
    shares = exp / exp.sum(-1, keepdims=True)
    log_partition = np.log(exp.sum(-1, keepdims=True)) + wide.max(-1, keepdims=True)
    expected = weights[..., None] * (shares * (1 + 2e-2 * log_partition) - np.eye(11)[targets])
    np.testing.assert_allclose(jax.grad(objective)(jnp.asarray(logits)), expected, rtol=1e-5, atol=1e-6)


def test_huge_logits_stay_finite():
    logits = jnp.asarray([[[1e4, -1e4, 0.0]]], jnp.float32)
    loss, log_partition = nll(logits, jnp.asarray([[1]], jnp.int32))
    assert float(loss[0, 0]) == 2e4
    assert float(log_partition[0, 0]) == 1e4


@pytest.mark.slow
@pytest.mark.parametrize(("packed", "smoothing"), [(False, 0.25), (True, 0.0)])
@pytest.mark.parametrize("tied", [False, True])
def test_chunked_equals_whole(packed, smoothing, tied):
    decoder = mpt.Config(layers=1, embed=16, heads=2, mlp=16, vocab=40, logit_softcap=4.0).build()
    decoder = replace(decoder, tied=tied, head_bias=not tied)
    weights = forward.random_weights(decoder)
    rng = np.random.default_rng(1)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 40, (3, 8)), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, 40, (3, 8)), jnp.int32),
        "weights": jnp.asarray(rng.random((3, 8)) < 0.6, jnp.float32),
        "row": jnp.arange(3, dtype=jnp.int32),
        "segments": jnp.asarray([[1] * 5 + [2] * 3] * 3, jnp.int32),
        "positions": jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2]] * 3, jnp.int32),
    }

    def run(chunk):
        entropy = CrossEntropy(z_loss=1e-3, chunk=chunk, smoothing=smoothing)
        loss = DecoderLoss(decoder, entropy, Dtypes(), packed=packed)

        def objective(weights):
            total, weight, sums, _ = loss(weights, {}, {}, batch, jax.random.key(0), forward.one_device())
            return 2.5 * total, (weight, sums)

        (total, (weight, sums)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(weights)
        return {"total": total, "weight": weight, **sums}, grads

    whole, grads = run(0)
    where = Context(forward.one_device(), Dtypes(), batch["positions"], batch["segments"])
    logits = forward.logits(
        decoder, weights, batch["tokens"], *((where.positions_BL, where.segments_BL) if packed else ())
    )
    hand = (logits, np.asarray(batch["targets"]), np.asarray(batch["weights"]))
    total, squares = by_hand(*hand)
    objective = smoothed_by_hand(*hand, smoothing) + 1e-3 * squares
    assert float(whole["total"]) == pytest.approx(2.5 * objective, rel=1e-5)
    assert float(whole["loss"]) == pytest.approx(total, rel=1e-5)
    assert float(whole["z_loss"]) == pytest.approx(1e-3 * squares, rel=1e-5)
    assert float(whole["weight"]) == float(batch["weights"].sum())
    for chunk in (2, 8):
        parts, part_grads = run(chunk)
        for name, value in whole.items():
            assert float(parts[name]) == pytest.approx(float(value), rel=1e-6), name
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), part_grads, grads)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (CrossEntropy(chunk=3), "loss.chunk; expected 0, or a divisor"),
        (CrossEntropy(chunk=-1), "loss.chunk; expected 0, or a divisor"),
        (CrossEntropy(z_loss=-1.0), "loss.z_loss; expected 0 or more"),
        (CrossEntropy(smoothing=1.0), "loss.smoothing; expected a share of the target, 0 to below 1; got 1"),
        (CrossEntropy(smoothing=-0.1), "loss.smoothing; expected a share"),
    ],
)
def test_refused(loss, message):
    with pytest.raises(InputError, match=message):
        loss.check(8)


def test_chunks_that_divide_are_taken():
    CrossEntropy(chunk=4, z_loss=0.1).check(8)

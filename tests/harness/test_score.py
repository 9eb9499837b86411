from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax.errors import InputError
from mosaicjax.harness.score import CHUNK, ENDS, Scorer
from mosaicjax.kernels.flash_attention import Implementation
from mosaicjax.layers.context import Context
from mosaicjax.layers.position import Learned
from mosaicjax.mesh import Mesh, shardings
from mosaicjax.models import llama, mpt
from mosaicjax.spec import Dtypes

DTYPES = Dtypes(compute="float32")
LENGTH = 100
VOCAB = 64


def families():
    return [
        mpt.Config(layers=2, embed=32, heads=4, mlp=48, vocab=VOCAB, position=Learned(LENGTH)),
        llama.Config(layers=3, embed=32, heads=4, kv_heads=2, mlp=48, vocab=VOCAB),
    ]


@cache
def built(family, devices=1):
    mesh = Mesh(data=2, fsdp=(2,), tensor=2) if devices == 8 else Mesh(fsdp=(1,))
    layout = mesh.build(jax.devices()[:devices])
    decoder = family.decoder()
    spec = decoder.spec()
    weights = spec.init(jax.random.key(3), "float32", shardings(spec, layout))
    # Sharper than at the beginning of training, so that some continuations are greedy and some are not.
    return decoder, jax.tree.map(lambda leaf: 3 * leaf, weights), layout


@partial(jax.jit, static_argnums=0)
def plain_logits(family, weights, tokens_L):
    """Logits [L, V] of one row, by attention that holds all scores."""
    layout = Mesh(fsdp=(1,)).build(jax.devices()[:1])
    plain = family.decoder().with_attention(Implementation.REFERENCE)
    positions_BL = jnp.arange(tokens_L.shape[0], dtype=jnp.int32)[None]
    about = Context(layout, DTYPES, positions_BL, tokens_BL=tokens_L[None])
    hidden_BLD = plain.hidden(weights, plain.embed(weights, tokens_L[None], about), about).hidden_BLD
    return plain.logits(plain.head(weights, about), hidden_BLD, about)[0]


def logits_behind(family, weights, inputs):
    """What is predicted behind each input, in float64; what stands behind the inputs is seen by none."""
    filled = np.zeros(LENGTH, np.int32)
    filled[: len(inputs)] = inputs
    return np.asarray(plain_logits(family, weights, filled), np.float64)[: len(inputs)]


def naive(family, weights, context, continuation):
    """One row alone, all its logits at once, in numpy's float64."""
    inputs = [*context, *continuation][-(LENGTH + 1) :][:-1]
    logits_LV = logits_behind(family, weights, inputs)[-len(continuation) :]
    shares_LV = np.exp(logits_LV - logits_LV.max(axis=1, keepdims=True))
    logs_LV = np.log(shares_LV / shares_LV.sum(axis=1, keepdims=True))
    total = sum(logs_LV[i, token] for i, token in enumerate(continuation))
    return total, list(logits_LV.argmax(axis=1)) == list(continuation)


def requests(family, weights, rng):
    """Of all lengths, some with one beginning, some too long, some that greedy decoding writes."""

    def ids(count):
        return rng.integers(0, VOCAB, count).tolist()

    made = [(ids(rng.integers(1, 90)), ids(rng.integers(1, 40))) for _ in range(14)]
    made += [(ids(LENGTH), ids(30)), (ids(90), ids(LENGTH)), (ids(1), ids(LENGTH)), (ids(3), ids(CHUNK + 1))]
    shared, body = ids(20), ids(4)
    made += [(shared, [*body, end]) for end in rng.permutation(VOCAB)[: ENDS + 3].tolist()]
    made += [(shared, [end]) for end in range(4)] + [made[0]]
    # The same tokens, divided elsewhere.
    made += [([*shared, *body[:2]], [*body[2:], 7])]
    for count in (1, 5, 20):
        context, written = ids(11), []
        for _ in range(count):
            written.append(int(logits_behind(family, weights, [*context, *written])[-1].argmax()))
        made.append((context, written))
    return made


@pytest.mark.parametrize(
    "family", [pytest.param(families()[0], marks=pytest.mark.slow), families()[1]], ids=["mpt", "llama"]
)
def test_scores_equal_rows_done_one_by_one(family):
    decoder, weights, layout = built(family)
    asked = requests(family, weights, np.random.default_rng(5))
    scorer = Scorer(decoder, weights, layout, DTYPES, length=LENGTH, rows=4)
    heard = []
    scores = scorer.score(asked, heard.append)
    expected = [naive(family, weights, *request) for request in asked]
    np.testing.assert_allclose(
        [score.total for score in scores], [e[0] for e in expected], rtol=2e-5, atol=2e-5
    )
    assert [score.greedy for score in scores] == [e[1] for e in expected]
    assert sum(score.greedy for score in scores) >= 3
    assert sum(heard) == len(asked)
    assert scorer.lengths == {64, 100}


@pytest.mark.slow
def test_rows_and_meshes_do_not_change_scores():
    decoder, weights, layout = built(families()[1])
    rng = np.random.default_rng(6)
    asked = [(rng.integers(0, VOCAB, 9).tolist(), rng.integers(0, VOCAB, 5).tolist()) for _ in range(11)]
    alone = Scorer(decoder, weights, layout, DTYPES, length=LENGTH, rows=1).score(asked)
    split, placed, parts = built(families()[1], 8)
    together = Scorer(split, placed, parts, DTYPES, length=LENGTH, rows=8).score(asked)
    np.testing.assert_allclose([a.total for a in alone], [b.total for b in together], rtol=2e-5)
    assert [a.greedy for a in alone] == [b.greedy for b in together]


def test_requests_that_read_the_same_share_a_row():
    decoder, weights, layout = built(families()[1])
    scorer = Scorer(decoder, weights, layout, DTYPES, length=LENGTH, rows=4)
    asked = [([1, 2, 3], [end]) for end in range(ENDS)] * 2 + [([1, 2, 3], [5, 6])]
    assert len(scorer._rows_of(asked)) == 3
    assert scorer.score([]) == []


def test_what_cannot_be_scored_is_refused():
    # Refused before any weight is looked at.
    decoder, weights = families()[0].decoder(), None
    layout = Mesh(fsdp=(1,)).build(jax.devices()[:1])
    with pytest.raises(InputError, match="--batch; expected a multiple of 1; got 0"):
        Scorer(decoder, weights, layout, DTYPES, length=LENGTH, rows=0)
    with pytest.raises(InputError, match="at most 100"):
        Scorer(decoder, weights, layout, DTYPES, length=LENGTH + 1, rows=4)
    scorer = Scorer(decoder, weights, layout, DTYPES, length=LENGTH, rows=4)
    with pytest.raises(InputError, match="at most 100 tokens; got 101"):
        scorer.score([([1], [1] * 101)])


@pytest.mark.slow
def test_scores_that_are_not_finite_are_refused():
    decoder, weights, layout = built(families()[0])
    broken = jax.tree.map(lambda leaf: leaf.at[...].set(np.nan), weights)
    with pytest.raises(InputError, match="a log-likelihood is not finite"):
        Scorer(decoder, broken, layout, DTYPES, length=LENGTH, rows=4).score([([1], [1])])

"""The decoder: causality, packing, stacks and what is dropped, by gradients and by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax.layers.attention import Attention, QkNorm
from mosaicjax.layers.block import Block, ParallelBlock
from mosaicjax.layers.context import dropout, skipped
from mosaicjax.layers.mlp import Activation, Glu
from mosaicjax.layers.norm import LayerNorm, RmsNorm
from mosaicjax.layers.position import Alibi, DynamicScaling, Learned, Rotary
from mosaicjax.mesh import shardings
from mosaicjax.models import mpt
from mosaicjax.models.decoder import Decoder, Remat, Stack
from mosaicjax.spec import Dtypes
from tests.models import forward

LENGTH = 10
BASE = mpt.Config(layers=2, embed=16, heads=2, mlp=24, vocab=48)
VARIANTS = {
    "alibi": BASE,
    "learned": replace(BASE, position=Learned(length=LENGTH), bias=True, norm=LayerNorm()),
    "rotary": replace(
        BASE,
        position=Rotary(scaling=DynamicScaling(factor=4.0, original=3)),
        kv_heads=1,
        qk_norm=QkNorm(norm=RmsNorm()),
        ffn=Glu(Activation.SILU),
        attention_softcap=2.0,
        windows=(4, 0),
    ),
}
# Three documents, one of a single token, and two places of padding.
SEGMENTS = np.array([[1] * 4 + [2] + [3] * 3 + [0] * 2, [1] * 7 + [2] * 3])
POSITIONS = np.array([[0, 1, 2, 3, 0, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]])


def loss_gradients(config, packed):
    """Gradient of each position's loss with respect to each position's embedding, [loss at, B, of, D]."""
    decoder = config.build()
    weights = forward.random_weights(decoder)
    rng = np.random.default_rng(2)
    x_BLD = rng.standard_normal((2, LENGTH, config.embed)).astype(np.float32)
    targets = rng.integers(0, config.vocab, (2, LENGTH))

    def loss(x_BLD, at):
        where = forward.context(targets, *((POSITIONS, SEGMENTS) if packed else ()))
        logits = forward.logits_from(decoder, weights, x_BLD, where)
        scores = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=2)[:, :, 0]
        return -jnp.sum(jnp.take(scores, at, axis=1))

    run = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))
    return np.asarray(run(jnp.asarray(x_BLD), jnp.arange(LENGTH)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["alibi", "rotary"])
def test_no_gradient_from_later_tokens_nor_other_documents(name, packed):
    grads = loss_gradients(VARIANTS[name], packed)
    for at in range(LENGTH):
        for row in range(2):
            for other in range(LENGTH):
                hidden = other > at
                if packed and at != other:
                    hidden |= SEGMENTS[row, at] != SEGMENTS[row, other] or SEGMENTS[row, other] == 0
                assert (grads[at, row, other] == 0).all() == hidden, (at, row, other)


def test_windows_reach_no_further_than_their_sum():
    # Two layers of windows 3 and 2 see 2 and then 1 position back.
    grads = loss_gradients(replace(BASE, windows=(3, 2)), packed=False)
    for at in range(LENGTH):
        for other in range(LENGTH):
            assert (grads[at, :, other] == 0).all() == (not at - 3 <= other <= at)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_are_as_if_alone(name):
    config = VARIANTS[name]
    decoder = config.build()
    weights = forward.random_weights(decoder)
    tokens = np.random.default_rng(3).integers(0, config.vocab, SEGMENTS.shape)
    packed = forward.logits(decoder, weights, tokens, POSITIONS, SEGMENTS)
    for row, segment in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 2)):
        mine = SEGMENTS[row] == segment
        alone = forward.logits(decoder, weights, tokens[row, mine][None])
        np.testing.assert_allclose(packed[row, mine], alone[0], atol=3e-5)
    assert np.isfinite(packed).all()


def block(window=0):
    return Block(attention=Attention(position=Alibi(), window=window), mlp=Glu(), norm=RmsNorm())


def stacks_of(*stacks):
    dims = {"embed": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp": 24, "vocab": 48}
    return Decoder(dims, stacks, norm=RmsNorm(), tied=False)


def layers_of(decoder, weights):
    """The weights of each layer by its number."""
    found = {}
    for s, b, _, layers in decoder.blocks():
        for turn in range(layers.count):
            tree = weights["stacks"][s][b]["layer"]
            found[layers.first + turn * layers.stride] = jax.tree.map(
                lambda leaf, turn=turn: np.asarray(leaf)[turn], tree
            )
    return [found[n] for n in range(decoder.layers)]


def test_a_scan_equals_its_layers_in_a_row():
    alone, row = stacks_of(Stack((block(),), 4)), stacks_of(Stack((block(),) * 4, 1))
    tokens = np.random.default_rng(0).integers(0, 48, (2, LENGTH))
    weights = forward.random_weights(alone)
    unrolled = {
        **weights,
        "stacks": [
            [{"layer": jax.tree.map(lambda leaf: leaf[None], layer)} for layer in layers_of(alone, weights)]
        ],
    }
    np.testing.assert_allclose(
        forward.logits(alone, weights, tokens), forward.logits(row, unrolled, tokens), atol=2e-5
    )


@pytest.mark.slow
def test_scanned_layers_equal_unrolled_ones():
    a, b = block(), block(window=3)
    arrangements = [
        stacks_of(Stack((a, b), 2)),
        stacks_of(Stack((a, b, a, b), 1)),
        stacks_of(Stack((a,), 1), Stack((b, a), 1), Stack((b,), 1)),
        stacks_of(Stack((a, b), 1), Stack((a, b), 1)),
    ]
    tokens = np.random.default_rng(0).integers(0, 48, (2, LENGTH))
    outcomes = []
    for decoder in arrangements:
        spec = decoder.spec()
        weights = spec.init(jax.random.key(0), "float32", shardings(spec, forward.one_device()))
        energy, grads = jax.jit(jax.value_and_grad(lambda w, d=decoder: _energy(d, w, tokens)))(weights)
        outcomes.append((layers_of(decoder, weights), float(energy), layers_of(decoder, grads)))
    layers, energy, grads = outcomes[0]
    for other_layers, other_energy, other_grads in outcomes[1:]:
        jax.tree.map(np.testing.assert_array_equal, other_layers, layers)
        assert other_energy == pytest.approx(energy, rel=1e-6)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), other_grads, grads)


def _energy(decoder, weights, tokens):
    where = forward.context(tokens)
    return jnp.mean(
        jnp.square(forward.logits_from(decoder, weights, decoder.embed(weights, tokens, where), where))
    )


# Of a layer's 8 products (query, key, value, out, up, down; scores and mixing), those computed again:
# never the last one, whose result only the stream needs. Attention's backward pass makes the scores itself,
# under any policy: where its result is kept, neither of its two products is made once more.
PRODUCTS_AGAIN = {
    Remat.NONE: 0,
    Remat.FULL: 7,
    Remat.PRODUCTS: 0,
    Remat.DOTS: 2,
    Remat.QKV: 4,
    Remat.ATTENTION: 5,
}


@pytest.mark.parametrize(
    "remat",
    [policy if policy is Remat.FULL else pytest.param(policy, marks=pytest.mark.slow) for policy in Remat],
)
def test_remat_changes_no_gradient(remat):
    decoder = replace(BASE, bias=True, remat=remat).build()
    weights = forward.random_weights(decoder)
    tokens = np.random.default_rng(0).integers(0, BASE.vocab, (1, 6))
    plain = replace(decoder, remat=Remat.NONE)
    kept, (expected, got) = (
        [
            str(jax.make_jaxpr(jax.grad(lambda w, d=d: _energy(d, w, tokens)))(weights))
            for d in (plain, decoder)
        ],
        [jax.jit(jax.grad(lambda w, d=d: _energy(d, w, tokens)))(weights) for d in (plain, decoder)],
    )
    products = [text.count("dot_general") for text in kept]
    assert products[1] - products[0] == PRODUCTS_AGAIN[remat]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), got, expected)


def test_embedding_fraction_scales_the_embeddings_gradient_alone():
    whole = replace(BASE, tied=False).build()
    weights = forward.random_weights(whole)
    tokens = np.random.default_rng(0).integers(0, BASE.vocab, (2, 6))
    expected = jax.jit(jax.grad(lambda w: _energy(whole, w, tokens)))(weights)
    part = replace(whole, embedding_fraction=0.25)
    got = jax.jit(jax.grad(lambda w: _energy(part, w, tokens)))(weights)
    np.testing.assert_allclose(
        got["embed"]["tokens"], 0.25 * expected["embed"]["tokens"], rtol=1e-4, atol=1e-6
    )
    assert np.abs(got["embed"]["tokens"]).max() > 1e-3
    for name in ("stacks", "head", "norm"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), got[name], expected[name]
        )


def with_keys(tokens, seeds):
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    return replace(forward.context(tokens), keys_B=keys)


def test_dropout_keeps_its_share_and_the_mean():
    where = with_keys(np.zeros((4, 500), int), [1, 2, 3, 4])
    x_BLD = jnp.ones((4, 500, 20))
    out = np.asarray(dropout(x_BLD, 0.3, where, place=0))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.7)}
    assert (out == 0).mean() == pytest.approx(0.3, abs=4 * (0.21 / out.size) ** 0.5)
    assert (out[0] != out[1]).any()
    # A row's randomness is its own, wherever it stands in the batch.
    swapped = np.asarray(dropout(x_BLD[:2], 0.3, with_keys(np.zeros((2, 500), int), [3, 1]), place=0))
    assert (swapped == out[[2, 0]]).all()
    for other in (dropout(x_BLD, 0.3, where, place=1), dropout(x_BLD, 0.3, where.for_layer(1), place=0)):
        assert (np.asarray(other) == out).mean() == pytest.approx(0.58, abs=0.02)
    assert (np.asarray(dropout(x_BLD, 0.3, forward.context(np.zeros((4, 500), int)), place=0)) == 1).all()


def test_stochastic_depth_leaves_out_whole_rows():
    """More of them the deeper a layer is, and the mean stays."""
    rows = 4_000
    where = with_keys(np.zeros((rows, 2), int), range(rows))
    for depth in (0.0, 0.5, 1.0):
        out = np.asarray(skipped(jnp.ones((rows, 2, 3)), 0.4, replace(where, depth=depth), place=2))
        share = 0.4 * depth
        assert (out == out[:, :1, :1]).all()
        assert (out[:, 0, 0] == 0).mean() == pytest.approx(share, abs=4 * (0.25 / rows) ** 0.5)
        assert set(np.unique(out)) <= {0.0, np.float32(1 / (1 - share))}


@pytest.mark.parametrize("block", [Block(stochastic_depth=0.9), ParallelBlock(stochastic_depth=0.9)])
def test_a_row_passes_a_layer_that_is_left_out(block):
    """With two layers the first is always there, and the last one's two addends are there or not."""
    config = replace(BASE, layers=2, block=block)
    decoder, weights = config.build(), forward.random_weights(config.build())
    tokens = np.random.default_rng(0).integers(0, BASE.vocab, (1, 6))
    assert decoder.drops

    @jax.jit
    def run(seed):
        where = with_keys(tokens, seed)
        return forward.logits_from(decoder, weights, decoder.embed(weights, tokens, where), where)

    found = {tuple(np.asarray(run(np.array([seed])))[0, -1, :3].round(4).tolist()) for seed in range(60)}
    # Each addend of the last layer is left out or scaled up tenfold: at most four results.
    assert 2 <= len(found) <= 4
    one = replace(BASE, layers=1, block=replace(block, stochastic_depth=0.0)).build()
    first = jax.tree.map(lambda leaf: leaf[:1], weights["stacks"])
    alone = forward.logits(one, weights | {"stacks": first}, tokens)[0, -1, :3]
    assert any(np.allclose(each, alone, atol=2e-4) for each in found)


@pytest.mark.parametrize("knob", ["embed_dropout", "residual_dropout"])
def test_each_dropout_acts_in_training_only(knob):
    decoder = replace(BASE, **{knob: 0.4}).build()
    assert decoder.drops
    assert not BASE.build().drops
    weights = forward.random_weights(decoder)
    tokens = np.random.default_rng(0).integers(0, BASE.vocab, (1, 6))

    @jax.jit
    def run(seed):
        where = with_keys(tokens, seed)
        return forward.logits_from(decoder, weights, decoder.embed(weights, tokens, where), where)

    first, second = run(np.array([1])), run(np.array([2]))
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(first, run(np.array([1])))
    evaluated = forward.logits(decoder, weights, tokens)
    np.testing.assert_array_equal(evaluated, forward.logits(BASE.build(), weights, tokens))


def test_measured_size_of_the_residual_stream():
    config = replace(BASE, windows=(0, 3), layers=4)
    decoder = config.build()
    weights = forward.random_weights(decoder)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (2, 6))
    where = forward.context(tokens)
    x_BLD = decoder.embed(weights, tokens, where)
    output = decoder.hidden(weights, x_BLD, where, measure=True)
    assert float(output.embed_rms) == pytest.approx(
        np.sqrt((np.asarray(x_BLD, np.float64) ** 2).mean()), rel=1e-6
    )
    assert output.rms_N.shape == (4,)
    # The final norm undone: the last layer's output has the measured size.
    plain = replace(decoder, norm=_Nothing())
    last = np.asarray(plain.hidden(weights, x_BLD, where).hidden_BLD, np.float64)
    assert float(output.rms_N[-1]) == pytest.approx(np.sqrt((last**2).mean()), rel=1e-5)
    first = replace(decoder, norm=_Nothing(), stacks=(Stack(decoder.stacks[0].block[:1], 1),))
    cut = {**weights, "stacks": [[jax.tree.map(lambda leaf: leaf[:1], weights["stacks"][0][0])]]}
    after_one = np.asarray(first.hidden(cut, x_BLD, where).hidden_BLD, np.float64)
    assert float(output.rms_N[0]) == pytest.approx(np.sqrt((after_one**2).mean()), rel=1e-5)


class _Nothing(RmsNorm):
    def apply(self, weights, x, dtypes):
        return x


def test_bfloat16_stays_near_float32():
    config = replace(BASE, position=Rotary(), qk_norm=QkNorm(), bias=True)
    decoder = config.build()
    weights = forward.random_weights(decoder)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (2, LENGTH))
    low = forward.logits(decoder, weights, tokens, dtypes=Dtypes(compute="bfloat16"))
    assert low.dtype == np.float32
    expected = forward.logits(decoder, weights, tokens)
    assert np.linalg.norm(low - expected) / np.linalg.norm(expected) < 0.03
    assert (low != expected).any()

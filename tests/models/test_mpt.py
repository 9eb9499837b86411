"""MPT against its definition in numpy, knob by knob and in combination."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import Attention, QkNorm
from mosaicjax.layers.block import Block, StreamScales
from mosaicjax.layers.mlp import Activation, Glu, Mlp
from mosaicjax.layers.norm import LayerNorm, RmsNorm
from mosaicjax.layers.position import (
    Alibi,
    DynamicScaling,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Position,
    RopeScaling,
    Rotary,
)
from mosaicjax.layers.token_inputs import Bigram, Smear
from mosaicjax.models import mpt
from mosaicjax.models.decoder import Remat
from tests.models import forward, oracle

LENGTH, ROWS = 11, 2
TOLERANCE = 1e-5

BASE = mpt.Config(layers=2, embed=24, heads=4, mlp=40, vocab=64)


def relative_error(config, seed=0):
    """How far the logits are from the oracle's, over the largest of them; and the logits."""
    decoder = config.build()
    decoder.check(LENGTH)
    weights = forward.random_weights(decoder, seed)
    tokens = np.random.default_rng(seed + 1).integers(0, config.vocab, (ROWS, LENGTH))
    got = forward.logits(decoder, weights, tokens)
    expected = oracle.logits(config, weights, tokens)
    assert got.shape == expected.shape == (ROWS, LENGTH, config.vocab)
    return np.abs(got - expected).max() / np.abs(expected).max(), got


@pytest.fixture(scope="module")
def base_logits():
    error, logits = relative_error(BASE)
    assert error < TOLERANCE
    return logits


ROTARY = replace(BASE, position=Rotary())

KNOBS = {
    "no positions": ({"position": Position()}, BASE),
    "learned": ({"position": Learned(length=16)}, BASE),
    "alibi max_bias": ({"position": Alibi(max_bias=4.0)}, BASE),
    "rotary": ({"position": Rotary()}, BASE),
    "rotary theta": ({"position": Rotary(theta=100.0)}, ROTARY),
    "rotary fraction": ({"head_dim": 8, "position": Rotary(fraction=0.5)}, replace(ROTARY, head_dim=8)),
    "rotary linear": ({"position": Rotary(scaling=LinearScaling(factor=4.0))}, ROTARY),
    "rotary dynamic": ({"position": Rotary(scaling=DynamicScaling(factor=4.0, original=5))}, ROTARY),
    "rotary llama3": ({"position": Rotary(scaling=Llama3Scaling(factor=8.0, original=64))}, ROTARY),
    "grouped query": ({"kv_heads": 2}, BASE),
    "multi query": ({"kv_heads": 1}, BASE),
    "head_dim": ({"head_dim": 10}, BASE),
    "qk_norm": ({"qk_norm": QkNorm()}, BASE),
    "qk_norm per head": ({"qk_norm": QkNorm(per_head=True)}, replace(BASE, qk_norm=QkNorm())),
    "qk_norm rms": ({"qk_norm": QkNorm(norm=RmsNorm())}, replace(BASE, qk_norm=QkNorm())),
    "clip_qkv": ({"clip_qkv": 0.7}, BASE),
    "softmax_scale": ({"softmax_scale": 0.2}, BASE),
    "attention_softcap": ({"attention_softcap": 1.5}, BASE),
    "windows": ({"windows": (0, 3)}, BASE),
    "glu": ({"ffn": Glu()}, BASE),
    **{
        f"activation {activation.value}": ({"ffn": Mlp(activation)}, BASE)
        for activation in Activation
        if activation is not Activation.GELU
    },
    "glu silu": ({"ffn": Glu(Activation.SILU)}, replace(BASE, ffn=Glu())),
    "mlp bias": ({"ffn": Mlp(bias=True)}, BASE),
    "bias": ({"bias": True}, BASE),
    "norm bias": ({"norm": LayerNorm()}, BASE),
    "norm eps": ({"norm": LayerNorm(bias=False, eps=0.1)}, BASE),
    "rms norm": ({"norm": RmsNorm()}, BASE),
    "untied": ({"tied": False}, BASE),
    "logit_scale": ({"logit_scale": 0.3}, BASE),
    "logit_softcap": ({"logit_softcap": 2.0}, BASE),
    "smear": ({"inputs": (Smear(),)}, BASE),
    "bigram": ({"inputs": (Bigram(50),)}, BASE),
    "stream scales": ({"block": Block(scales=StreamScales())}, BASE),
    "sinks": ({"attention": Attention(sinks=True)}, BASE),
    "value tables": ({"value_tables": 1}, BASE),
    "value tables in turn": ({"value_tables": 2}, replace(BASE, value_tables=1)),
}


@pytest.mark.parametrize("knob", KNOBS)
def test_each_knob_does_what_it_says(knob, base_logits):
    changes, before = KNOBS[knob]
    error, logits = relative_error(replace(before, **changes))
    assert error < TOLERANCE
    without = base_logits if before is BASE else relative_error(before)[1]
    assert np.abs(logits - without).max() > 1e-4 * np.abs(logits).max()


def test_gelu_is_exact():
    # The tanh approximation is 1e-3 away at most: the knob's own test would pass with either.
    x = np.linspace(-6, 6, 4_001).astype(np.float32)
    for activation in Activation:
        error = np.abs(
            np.asarray(activation.apply(x)) - oracle.ACTIVATIONS[activation.value](x.astype(float))
        )
        assert error.max() < 2e-6, activation
    between = oracle.ACTIVATIONS["gelu"](x.astype(float)) - oracle.ACTIVATIONS["gelu_tanh"](x.astype(float))
    assert np.abs(between).max() > 1e-4


scalings = st.one_of(
    st.just(RopeScaling()),
    st.builds(LinearScaling, factor=st.floats(1.0, 8.0)),
    st.builds(DynamicScaling, factor=st.floats(1.0, 8.0), original=st.integers(4, 20)),
    st.builds(Llama3Scaling, factor=st.floats(2.0, 8.0), original=st.integers(16, 256)),
)
norms = st.one_of(
    st.builds(
        LayerNorm, bias=st.booleans(), low_precision=st.booleans(), eps=st.sampled_from([1e-6, 1e-5, 1e-2])
    ),
    st.builds(RmsNorm, eps=st.sampled_from([1e-6, 1e-2])),
)


@st.composite
def configs(draw):
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    head_dim = draw(st.sampled_from([4, 8]))
    positions = st.one_of(
        st.just(Position()),
        st.builds(Learned, length=st.integers(LENGTH, 20)),
        st.builds(Alibi, max_bias=st.floats(2.0, 16.0)),
        st.builds(
            Rotary,
            theta=st.sampled_from([50.0, 10_000.0]),
            scaling=scalings,
            fraction=st.sampled_from([1.0] if head_dim == 4 else [0.5, 1.0]),
        ),
    )
    layers = draw(st.integers(1, 4))
    turns = draw(st.sampled_from([n for n in range(1, layers + 1) if layers % n == 0]))
    return mpt.Config(
        layers=layers,
        embed=draw(st.sampled_from([heads * head_dim, 20])),
        heads=heads,
        kv_heads=draw(st.sampled_from([n for n in range(heads + 1) if n == 0 or heads % n == 0])),
        head_dim=head_dim,
        mlp=draw(st.sampled_from([12, 32])),
        vocab=draw(st.sampled_from([17, 64])),
        position=draw(positions),
        norm=draw(norms),
        ffn=draw(st.builds(draw(st.sampled_from([Mlp, Glu])), st.sampled_from(Activation), st.booleans())),
        bias=draw(st.booleans()),
        qk_norm=draw(st.one_of(st.none(), st.builds(QkNorm, norms, st.booleans()))),
        clip_qkv=draw(st.sampled_from([0.0, 0.8])),
        softmax_scale=draw(st.sampled_from([0.0, 0.4])),
        attention_softcap=draw(st.sampled_from([0.0, 2.0])),
        windows=tuple(draw(st.lists(st.integers(0, LENGTH + 2), min_size=turns, max_size=turns))),
        tied=draw(st.booleans()),
        logit_scale=draw(st.sampled_from([1.0, 0.5])),
        logit_softcap=draw(st.sampled_from([0.0, 3.0])),
        embedding_fraction=draw(st.sampled_from([1.0, 0.1])),
        attention=Attention(sinks=draw(st.booleans())),
        block=Block(scales=draw(st.sampled_from([None, StreamScales()]))),
        inputs=draw(st.sampled_from([(), (Smear(),), (Bigram(20), Smear()), (Smear(), Bigram(7))])),
        value_tables=draw(st.sampled_from([0, 1])),
        remat=draw(st.sampled_from(Remat)),
    )


@pytest.mark.slow
@settings(max_examples=15)
@given(config=configs(), seed=st.integers(0, 2**16))
def test_knobs_in_combination(config, seed):
    error, _ = relative_error(config, seed)
    assert error < TOLERANCE


@pytest.mark.soak
@settings(max_examples=60)
@given(config=configs(), seed=st.integers(0, 2**16))
def test_many_combinations(config, seed):
    error, _ = relative_error(config, seed)
    assert error < TOLERANCE


def test_gradient_of_the_definition():
    # The oracle's slope along a random direction, by central differences in float64.
    config = replace(
        BASE,
        position=Rotary(),
        kv_heads=2,
        qk_norm=QkNorm(),
        ffn=Glu(Activation.SILU),
        bias=True,
        windows=(0, 4),
    )
    decoder = config.build()
    weights = forward.random_weights(decoder)
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, config.vocab, (1, LENGTH))
    pull = rng.standard_normal((1, LENGTH, config.vocab))
    direction = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), weights)

    def moved(step):
        there = jax.tree.map(lambda leaf, way: leaf.astype(np.float64) + step * way, weights, direction)
        return (oracle.logits(config, there, tokens) * pull).sum()

    def pulled(weights):
        where = forward.context(tokens)
        logits = forward.logits_from(decoder, weights, decoder.embed(weights, tokens, where), where)
        return (logits * pull.astype(np.float32)).sum()

    grads = jax.jit(jax.grad(pulled))(weights)
    got = sum(
        jax.tree.leaves(
            jax.tree.map(lambda g, way: (np.asarray(g, np.float64) * way).sum(), grads, direction)
        )
    )
    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert got == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "heads must divide embed; expected a divisor of 24; got 5"),
        ({"heads": 0}, "heads must divide embed"),
        ({"kv_heads": 3}, "kv_heads must divide heads; expected a divisor of 4; got 3"),
        ({"windows": (0, 1, 2)}, "windows are taken in turn"),
        ({"windows": ()}, "windows are taken in turn"),
        ({"windows": (-1,)}, "attention window"),
        ({"clip_qkv": -1.0}, "attention clip_qkv"),
        ({"softmax_scale": -1.0}, "attention scale"),
        ({"attention_softcap": -1.0}, "attention softcap"),
        ({"logit_softcap": -1.0}, "softcap of the logits; expected 0 (none) or more; got -1.0"),
        ({"logit_scale": 0.0}, "logit_scale"),
        ({"residual_dropout": 1.0}, "residual dropout; expected 0 to below 1; got 1.0"),
        ({"embed_dropout": -0.1}, "embed_dropout; expected 0 to below 1; got -0.1"),
        ({"embedding_fraction": 0.0}, "embedding_fraction"),
        ({"embedding_fraction": 1.5}, "embedding_fraction"),
        (
            {"position": Learned(length=10)},
            "rows are longer than the learned positions; expected at most 10; got 11",
        ),
        ({"position": Alibi(max_bias=0.0)}, "Alibi.max_bias"),
        ({"position": Rotary(fraction=0.5)}, "rotary dims of a head; expected an even number"),
        ({"position": Rotary(theta=0.0)}, "Rotary.theta"),
        ({"position": Rotary(scaling=LinearScaling(factor=0.0))}, "factor"),
        ({"position": Rotary(scaling=DynamicScaling(factor=0.5))}, "factor"),
        ({"position": Rotary(fraction=1 / 3, scaling=DynamicScaling())}, "rotary dims of a head"),
        ({"position": Rotary(scaling=Llama3Scaling(low=4.0, high=4.0))}, "low"),
        ({"norm": LayerNorm(eps=-1.0)}, "norm eps"),
        ({"qk_norm": QkNorm(norm=RmsNorm(eps=-1.0))}, "norm eps"),
        ({"layers": 0}, "layers"),
        ({"inputs": (Bigram(0),)}, "model size 'buckets'; expected 1 or more; got 0"),
        ({"inputs": (Smear(), Smear())}, "inputs of the model; expected each kind once"),
        ({"value_tables": 3}, "value tables are taken in turn"),
        ({"value_tables": -1}, "value tables are taken in turn"),
        ({"vocab": 0}, "model size 'vocab'; expected 1 or more; got 0"),
        ({"embed": 0, "head_dim": 8}, "model size 'embed'"),
    ],
)
def test_sizes_and_knobs_that_cannot_be(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        replace(BASE, **changes).build().check(LENGTH)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        # One layer: 4 D² of attention, 2 D F of MLP, 2 D of norms; then the table and the last norm.
        (mpt.Config(layers=12, embed=768, heads=12, mlp=3_072, vocab=50_368), 123_636_480),
        (mpt.Config(layers=32, embed=4_096, heads=32, mlp=16_384, vocab=50_432), 6_649_286_656),
        (mpt.Config(layers=48, embed=7_168, heads=64, mlp=28_672, vocab=50_432), 29_957_200_896),
    ],
)
def test_published_sizes(config, count):
    layers, wide, hidden = config.layers, config.embed, config.mlp
    by_hand = layers * (4 * wide * wide + 2 * wide * hidden + 2 * wide) + config.vocab * wide + wide
    assert config.build().spec().count() == by_hand
    assert by_hand == count

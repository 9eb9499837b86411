import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.layers.attention import Attention, QkNorm
from mosaicjax.layers.block import Block, StreamScales
from mosaicjax.layers.context import Context
from mosaicjax.layers.mlp import Activation, Glu, Mlp
from mosaicjax.layers.norm import LayerNorm, RmsNorm
from mosaicjax.layers.position import Alibi, DynamicScaling, Learned, LinearScaling, Position, Rotary
from mosaicjax.layers.token_inputs import Bigram, Smear
from mosaicjax.mesh import BATCH, Mesh, shardings
from mosaicjax.models import mpt
from mosaicjax.models.decode import NOT_FINITE, Choice, choose, decode_step, prefill, sequence_keys
from mosaicjax.models.decoder import Remat, Stack
from mosaicjax.spec import ONES, Dtypes, is_param

VOCAB = 97
LENGTH, SLOTS, STEPS = 8, 16, 6
DTYPES = Dtypes()
SMALL = mpt.Config(layers=2, embed=32, heads=4, mlp=48, vocab=VOCAB)


def one_device():
    return Mesh(fsdp=(1,)).build(jax.devices()[:1])


def drawn_weights(decoder, layout):
    """Weights that all matter, biases and norms too; `Spec.init` would compile a program for each."""
    rng = np.random.default_rng(1)

    def draw(param, place):
        shape = param.shape(decoder.dims)
        centre = float(param.init == ONES)
        return jax.device_put(rng.normal(centre, 0.2, shape).astype(np.float32), place)

    spec = decoder.spec()
    return jax.tree.map(draw, spec.tree, shardings(spec, layout), is_leaf=is_param)


def prompts(lengths, seed=0):
    """Rows of LENGTH tokens; what pads them is drawn too, so that a model which read it would show it."""
    return np.random.default_rng(seed).integers(0, VOCAB, (len(lengths), LENGTH), dtype=np.int32)


def programs(decoder, layout, slots=SLOTS):
    """The pass over prompts and the step, compiled at most once a shape."""
    start = jax.jit(partial(prefill, decoder, slots=slots, layout=layout, dtypes=DTYPES))
    step = jax.jit(partial(decode_step, decoder, layout=layout, dtypes=DTYPES), donate_argnames="caches")
    return start, step


def generated(programs, weights, tokens, lengths, steps=STEPS):
    """Greedy tokens [B, steps] with the logits [B, steps, V] that they were taken from."""
    start, step = programs
    logits, caches = start(weights, tokens_BL=jnp.asarray(tokens), lengths_B=jnp.asarray(lengths, jnp.int32))
    seen, written = [np.asarray(logits)], [np.asarray(logits).argmax(1)]
    for _ in range(steps - 1):
        logits, caches = step(weights, tokens_B=jnp.asarray(written[-1], jnp.int32), caches=caches)
        seen.append(np.asarray(logits))
        written.append(seen[-1].argmax(1))
    return np.stack(written, 1), np.stack(seen, 1)


def recomputed(decoder, weights, layout, tokens):
    """Logits [B, L, V] of whole rows, as in training: no cache, no padding."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    context = Context(layout, DTYPES, positions, tokens_BL=jnp.asarray(tokens, jnp.int32))

    @jax.jit
    def run(weights, tokens):
        output = decoder.hidden(weights, decoder.embed(weights, tokens, context), context)
        return decoder.logits(decoder.head(weights, context), output.hidden_BLD, context)

    return np.asarray(run(weights, jnp.asarray(tokens, jnp.int32)))


def check_against_recomputing(decoder, lengths):
    """Every step's logits are those of the whole sequence so far; returns the tokens."""
    layout = one_device()
    weights = drawn_weights(decoder, layout)
    tokens = prompts(lengths)
    written, logits = generated(programs(decoder, layout), weights, tokens, lengths)
    whole = np.zeros((len(lengths), LENGTH + STEPS), np.int32)
    for row, prompt, new, length in zip(whole, tokens, written, lengths, strict=True):
        row[: length + STEPS] = [*prompt[:length], *new]
    # What stands behind a sequence's end in `whole` does not matter: attention is causal.
    expected = recomputed(decoder, weights, layout, whole)
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(logits[i], expected[i, length - 1 : length - 1 + STEPS], atol=1e-4)
        assert written[i].tolist() == expected[i, length - 1 : length - 1 + STEPS].argmax(1).tolist()
    assert np.abs(expected).max() > 0.1
    return written


POSITIONS = [
    Position(),
    Alibi(),
    Alibi(max_bias=4),
    Learned(LENGTH + STEPS),
    Rotary(theta=100.0),
    Rotary(fraction=0.5, scaling=LinearScaling(2.0)),
    Rotary(scaling=DynamicScaling(factor=4.0, original=64)),
]
CONFIGS = st.builds(
    replace,
    st.just(SMALL),
    layers=st.sampled_from([2, 4]),
    heads=st.sampled_from([4, 2]),
    kv_heads=st.sampled_from([0, 1, 2]),
    position=st.sampled_from(POSITIONS),
    windows=st.sampled_from([(0,), (3,), (3, 0)]),
    norm=st.sampled_from([LayerNorm(), LayerNorm(bias=False), RmsNorm()]),
    ffn=st.sampled_from([Mlp(), Glu(Activation.SILU)]),
    qk_norm=st.sampled_from([None, QkNorm(), QkNorm(RmsNorm(), per_head=True)]),
    clip_qkv=st.sampled_from([0.0, 0.5]),
    softmax_scale=st.sampled_from([0.0, 1.0]),
    attention_softcap=st.sampled_from([0.0, 2.0]),
    logit_softcap=st.sampled_from([0.0, 3.0]),
    logit_scale=st.sampled_from([1.0, 0.5]),
    bias=st.booleans(),
    tied=st.booleans(),
    attention=st.builds(Attention, sinks=st.booleans()),
    block=st.sampled_from([Block(), Block(scales=StreamScales(keep=0.8, first=0.3))]),
    inputs=st.sampled_from([(), (Smear(), Bigram(50))]),
    value_tables=st.sampled_from([0, 2]),
)


# Each example compiles three programs; the families stand for it in the fast tier.
@pytest.mark.slow
@settings(max_examples=3)
@given(CONFIGS, st.booleans(), st.lists(st.integers(1, LENGTH), min_size=3, max_size=3))
def test_cached_decoding_equals_recomputing(config, split, lengths):
    decoder = config.build()
    if split:
        (stack,) = decoder.stacks
        decoder = replace(decoder, stacks=(stack, Stack(stack.block[:1], 1)))
    check_against_recomputing(decoder, lengths)


@pytest.mark.slow
def test_rotation_that_grows_with_the_sequence():
    # One layer: its keys and values depend on no rotation, so recomputing at each length is the definition.
    position = Rotary(theta=50.0, scaling=DynamicScaling(factor=4.0, original=5))
    decoder, layout = replace(SMALL, layers=1, position=position).build(), one_device()
    weights, lengths = drawn_weights(decoder, layout), [3, 7]
    tokens = prompts(lengths)
    written, logits = generated(programs(decoder, layout), weights, tokens, lengths)
    for i, step in ((0, 0), (0, 5), (1, 3)):
        row = [*tokens[i, : lengths[i]], *written[i, :step]]
        expected = recomputed(decoder, weights, layout, np.array([row], np.int32))[0, -1]
        np.testing.assert_allclose(logits[i, step], expected, atol=1e-4)
    plain = replace(SMALL, layers=1, position=Rotary(theta=50.0)).build()
    _, unscaled = generated(programs(plain, layout), weights, tokens, lengths, steps=1)
    assert np.abs(unscaled[1, 0] - logits[1, 0]).max() > 1e-2, "the scaling made no difference"


@pytest.fixture(scope="module")
def small():
    decoder, layout = replace(SMALL, kv_heads=2, windows=(5, 0)).build(), one_device()
    return decoder, programs(decoder, layout), drawn_weights(decoder, layout)


def test_a_sequence_does_not_depend_on_its_neighbours(small):
    _, compiled, weights = small
    lengths = [2, 8, 5, 1]
    tokens = prompts(lengths)
    together, logits = generated(compiled, weights, tokens, lengths)
    for i in range(len(lengths)):
        alone, alone_logits = generated(compiled, weights, tokens[i : i + 1], lengths[i : i + 1])
        assert alone[0].tolist() == together[i].tolist()
        np.testing.assert_allclose(alone_logits[0], logits[i], atol=1e-5)


def test_sharded_weights_give_the_same(small):
    decoder, compiled, weights = small
    lengths = [2, 8, 5, 1]
    tokens = prompts(lengths)
    expected, logits = generated(compiled, weights, tokens, lengths, steps=3)
    # 97 tokens split over no two devices.
    spread = Mesh(data=2, fsdp=(2,), tensor=2, rules={"vocab": "none"}).build(jax.devices())
    sharded = jax.tree.map(jax.device_put, weights, shardings(decoder.spec(), spread))
    got, got_logits = generated(programs(decoder, spread), sharded, tokens, lengths, steps=3)
    np.testing.assert_allclose(got_logits, logits, atol=1e-4)
    assert got.tolist() == expected.tolist()


def test_caches_are_split_over_the_mesh_and_updated_in_place():
    decoder = replace(SMALL, layers=16, kv_heads=2, remat=Remat.FULL).build()
    layout = Mesh(fsdp=(2,), tensor=2, rules={"vocab": "none"}).build(jax.devices()[:4])
    spec, rows = decoder.spec(), layout.sharding(BATCH)
    weights = spec.abstract("float32", shardings(spec, layout))
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=rows)
    prompt = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32, sharding=rows)
    start, step = programs(decoder, layout, slots=512)
    started = start.lower(weights, tokens_BL=prompt, lengths_B=lengths).compile()
    _, (cache,) = started.output_shardings
    shard = cache.k_NBKTC.shard_shape((16, 2, 2, 512, 8))
    assert shard == (16, 1, 1, 512, 8)
    _, shapes = jax.eval_shape(start, weights, tokens_BL=prompt, lengths_B=lengths)
    caches = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, (cache,)
    )
    compiled = step.lower(weights, tokens_B=lengths, caches=caches).compile()
    assert jax.tree.leaves(compiled.output_shardings[1]) == jax.tree.leaves((cache,))
    memory = compiled.memory_analysis()
    both = 2 * math.prod(shard) * 4
    assert memory.alias_size_in_bytes >= both
    # A few layers' keys and values at a time: nowhere is there a second set of caches.
    assert memory.temp_size_in_bytes < both / 2


def choice(rows, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    return Choice(
        sequence_keys(seed, range(rows)),
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
    )


def naive_shares(logits, temperature, top_k, top_p):
    """The distribution to draw from, token by token."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
    ranked = ranked[:top_k] if top_k else ranked
    total, kept, so_far = sum(weights[token] for token in ranked), [], 0.0
    for token in ranked:
        if so_far < top_p * total:
            kept.append(token)
        so_far += weights[token]
    total = sum(weights[token] for token in kept)
    return np.array([weights[token] / total if token in kept else 0.0 for token in range(len(logits))])


DRAWS = 8_192
DRAW = jax.jit(choose, static_argnames="tokens")


@settings(max_examples=25)
@given(
    st.permutations(range(8)),
    st.sampled_from([0.3, 0.8, 1.0, 1.7]),
    st.integers(0, 9),
    st.sampled_from([0.05, 0.33, 0.61, 0.9, 0.97, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_drawn_tokens_follow_the_truncated_distribution(order, temperature, top_k, top_p, seed):
    logits = (0.37 * np.array(order) ** 1.3).astype(np.float32)
    rows = jnp.asarray(np.tile(np.append(logits, 50.0).astype(np.float32), (DRAWS, 1)))
    # The ninth token is the likeliest by far, and beyond the vocabulary.
    settled = choice(DRAWS, temperature, top_k, top_p, seed)
    drawn = np.asarray(DRAW(rows, jnp.full(DRAWS, 3, jnp.int32), settled, tokens=8))
    expected = naive_shares(logits.tolist(), temperature, top_k, top_p)
    counts = np.bincount(drawn, minlength=8)
    assert not counts[expected == 0].any()
    deviations = np.sqrt(DRAWS * expected * (1 - expected))
    assert (np.abs(counts - DRAWS * expected) <= 5.5 * deviations + 1e-6).all(), (counts, DRAWS * expected)


def test_temperature_zero_takes_the_likeliest_known_token():
    logits = np.random.default_rng(3).normal(size=(64, VOCAB)).astype(np.float32)
    got = DRAW(jnp.asarray(logits), jnp.zeros(64, jnp.int32), choice(64, temperature=0.0), tokens=90)
    assert np.asarray(got).tolist() == logits[:, :90].argmax(1).tolist()


def test_a_draw_depends_on_seed_number_and_position_alone():
    rng = np.random.default_rng(4)
    logits = np.tile(rng.normal(size=(1, VOCAB)).astype(np.float32), (6, 1))
    positions = jnp.asarray([5, 5, 6, 7, 5, 5], jnp.int32)
    mixed = Choice(
        sequence_keys(7, [0, 1, 0, 0, 0, 2]),
        jnp.asarray([1, 1, 1, 1, 1, 0], jnp.float32),
        jnp.asarray([0, 0, 0, 40, 0, 0], jnp.int32),
        jnp.asarray([1, 1, 1, 0.9, 1, 1], jnp.float32),
    )
    together = np.asarray(choose(jnp.asarray(logits), positions, mixed, tokens=VOCAB))
    for i in range(6):
        lone = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], mixed)
        alone = DRAW(jnp.asarray(logits[i : i + 1]), positions[i : i + 1], lone, tokens=VOCAB)
        assert np.asarray(alone).tolist() == [together[i]]
    assert together[0] == together[4]
    flat, positions = jnp.zeros((200, VOCAB), jnp.float32), jnp.arange(200, dtype=jnp.int32)
    many = DRAW(flat, positions, choice(200), tokens=VOCAB)
    others = DRAW(flat, positions, choice(200, seed=1), tokens=VOCAB)
    same = np.mean(np.asarray(many) == np.asarray(others))
    assert same < 0.08, "another seed draws other tokens: about 1 in 97 agree"


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_told(broken):
    logits = np.zeros((2, 8), np.float32)
    logits[1, 3] = broken
    for temperature in (0.0, 1.0):
        got = DRAW(jnp.asarray(logits), jnp.zeros(2, jnp.int32), choice(2, temperature), tokens=8)
        assert (np.asarray(got) == NOT_FINITE).tolist() == [False, True]

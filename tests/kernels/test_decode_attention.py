"""One query a sequence over a cache: every implementation against loops, and what the TPU kernel reads."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mosaicjax.errors import InputError
from mosaicjax.kernels import decode_tpu
from mosaicjax.kernels.decode_attention import decode_attention
from mosaicjax.kernels.decode_tpu import MOST_BYTES, Tiling, best_tiling
from tests import tiny

CHIPS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite")


def loops(q, k, v, lengths, *, scale, window=0, softcap=0.0, alibi_slopes=None, sinks=None):
    """One sequence and head at a time, in float64, over the slots that it sees alone."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:2], v.shape[3]))
    shared = q.shape[1] // k.shape[1]
    for b, h in np.ndindex(q.shape[:2]):
        at = int(lengths[b]) - 1
        seen = [p for p in range(k.shape[2]) if p <= at and (not window or at - p < window)]
        if not seen:
            continue
        scores = scale * (k[b, h // shared, seen] @ q[b, h])
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores - float(alibi_slopes[h]) * (at - np.asarray(seen))
        logits = scores if sinks is None else np.append(scores, float(sinks[h]))
        shares = np.exp(logits - logits.max())
        out[b, h] = shares[: len(seen)] / shares.sum() @ v[b, h // shared, seen]
    return out


def draw(seed, B, K, G, T, C, V, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = [(B, K * G, C), (B, K, T, C), (B, K, T, V)]
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    numbers = [jnp.asarray(rng.random(K * G) - shift, jnp.float32) for shift in (0.0, 0.5)]
    return q, k, v, *numbers


def lengths_near(keys, slots):
    """0, 1, the edges of blocks, a full cache, and one token that had no slot left."""
    edges = {0, 1, 2, slots - 1, slots, slots + 1}
    edges |= {block * keys + more for block in range(1, slots // keys + 1) for more in (-1, 0, 1)}
    return sorted(length for length in edges if 0 <= length <= slots + 1)


def run(q, k, v, lengths, **knobs):
    with tiny.quick():
        return jax.jit(lambda *arrays: decode_attention(*arrays, **knobs))(q, k, v, lengths)


SHAPES = st.tuples(
    st.sampled_from([(1, 1), (2, 1), (2, 3), (4, 2), (1, 9)]),
    st.sampled_from([(16, 5), (16, 40), (16, 48), (32, 61)]),
    st.sampled_from([(16, 16), (24, 8), (128, 16), (8, 128)]),
)


@pytest.mark.slow
@settings(max_examples=12)
@given(
    seed=st.integers(0, 99),
    shape=SHAPES,
    window=st.sampled_from([0, 1, 2, 15, 16, 17, 30, 200]),
    softcap=st.sampled_from([0.0, 1.5]),
    alibi=st.booleans(),
    with_sinks=st.booleans(),
    data=st.data(),
)
def test_all_are_the_loops(seed, shape, window, softcap, alibi, with_sinks, data):
    (K, G), (keys, T), (C, V) = shape
    q, k, v, slopes, sinks = draw(seed, 3, K, G, T, C, V)
    near = st.sampled_from(lengths_near(keys, T))
    lengths = jnp.asarray(data.draw(st.tuples(near, near, near)), jnp.int32)
    knobs = {
        "scale": 0.4,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": slopes if alibi else None,
        "sinks": sinks if with_sinks else None,
    }
    expected = loops(q, k, v, lengths, **knobs)
    heads = data.draw(st.sampled_from([n for n in (1, 2, 4) if K % n == 0]))
    tiling = Tiling(heads, min(keys, T))
    for how in ("pallas_interpreted", "xla", "reference"):
        got = run(q, k, v, lengths, **knobs, implementation=how, tiling=tiling)
        np.testing.assert_allclose(got, expected, atol=5e-6, err_msg=how)


@pytest.mark.parametrize("window", [0, 1, 16, 20])
def test_every_edge_of_a_block(window):
    # All edges in one batch: sequences without a step lie between others.
    keys, T = 16, 56
    lengths = jnp.asarray(lengths_near(keys, T)[::-1] + [0], jnp.int32)
    q, k, v, slopes, sinks = draw(1, len(lengths), 2, 2, T, 24, 16)
    knobs = {"scale": 0.3, "window": window, "alibi_slopes": slopes, "sinks": sinks}
    expected = loops(q, k, v, lengths, **knobs)
    assert (expected[np.asarray(lengths) == 0] == 0).all()
    for how in ("pallas_interpreted", "xla", "reference"):
        got = run(q, k, v, lengths, **knobs, implementation=how, tiling=Tiling(2, keys))
        np.testing.assert_allclose(got, expected, atol=5e-6, err_msg=how)


@pytest.mark.parametrize("how", ["pallas_interpreted", "xla", "reference"])
def test_nothing_to_see_at_all(how):
    q, k, v, _, sinks = draw(2, 2, 1, 2, 20, 16, 16)
    got = run(q, k, v, jnp.zeros(2, jnp.int32), sinks=sinks, implementation=how, tiling=Tiling(1, 16))
    assert (np.asarray(got) == 0).all()


@pytest.mark.parametrize(("C", "V"), [(16, 16), (128, 128), (16, 128), (128, 16)])
def test_the_kernel_reads_no_more_than_it_must(C, V):
    # Slots behind a sequence's end, and whole blocks before its window, hold what would spoil any sum.
    q, k, v, *_ = draw(3, 3, 2, 1, 72, C, V)
    lengths, window, keys = jnp.asarray([9, 0, 70], jnp.int32), 10, 16
    clean = run(q, k, v, lengths, window=window, implementation="pallas_interpreted", tiling=Tiling(2, keys))
    slots = jnp.arange(72)[None, None, :, None]
    spoiled = (slots >= lengths[:, None, None, None]) | (
        slots < ((lengths - window) // keys * keys)[:, None, None, None]
    )
    k, v = (jnp.where(spoiled, jnp.nan, x) for x in (k, v))
    got = run(q, k, v, lengths, window=window, implementation="pallas_interpreted", tiling=Tiling(2, keys))
    np.testing.assert_array_equal(got, clean)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("how", ["pallas_interpreted", "xla", "reference"])
def test_a_layer_of_all(how):
    q, k, v, *_ = draw(4, 2, 2, 2, 24, 16, 16)
    layers_k, layers_v = (jnp.stack([x * 2, x, x - 1]) for x in (k, v))
    lengths = jnp.asarray([5, 24], jnp.int32)
    alone = run(q, k, v, lengths, implementation=how, tiling=Tiling(1, 16))

    def chosen(layer):
        return decode_attention(
            q, layers_k, layers_v, lengths, layer=layer, implementation=how, tiling=Tiling(1, 16)
        )

    np.testing.assert_array_equal(jax.jit(chosen)(jnp.int32(1)), alone)
    assert (np.asarray(jax.jit(chosen)(jnp.int32(2))) != np.asarray(alone)).all()


@pytest.mark.parametrize(
    "size, how", [(1e3, "pallas_interpreted"), (1e4, "pallas_interpreted"), (1e3, "xla"), (1e15, "xla")]
)
def test_large_scores_give_the_largest_value(size, how):
    q, k, v, *_ = draw(5, 2, 1, 1, 40, 8, 8)
    got = run(
        size * q, size * k, v, jnp.asarray([40, 17], jnp.int32), implementation=how, tiling=Tiling(1, 16)
    )
    for b, length in enumerate((40, 17)):
        best = np.argmax(np.asarray(k, float)[b, 0, :length] @ np.asarray(q, float)[b, 0])
        np.testing.assert_allclose(got[b, 0], v[b, 0, best], atol=1e-5)


@pytest.mark.parametrize("how", ["pallas_interpreted", "xla"])
def test_far_keys_with_alibi(how):
    # Distances count from the query: at slot 2**20 of a cache the slope still tells neighbours apart.
    q, k, v, *_ = draw(6, 1, 1, 2, 40, 8, 8)
    slopes = jnp.asarray([2.0**-8, 40.0], jnp.float32)
    lengths = jnp.asarray([40], jnp.int32)
    got = run(q, k, v, lengths, alibi_slopes=slopes, scale=1.0, implementation=how, tiling=Tiling(1, 16))
    np.testing.assert_allclose(got, loops(q, k, v, lengths, scale=1.0, alibi_slopes=slopes), atol=5e-6)
    np.testing.assert_allclose(got[0, 1], v[0, 0, 39], atol=1e-5)


@pytest.mark.parametrize("how", ["pallas_interpreted", "xla", "reference"])
def test_bfloat16(how):
    q, k, v, slopes, sinks = draw(7, 2, 2, 3, 100, 64, 64, jnp.bfloat16)
    lengths = jnp.asarray([100, 37], jnp.int32)
    knobs = {"scale": 0.125, "softcap": 20.0, "alibi_slopes": slopes, "sinks": sinks}
    got = run(q, k, v, lengths, **knobs, implementation=how, tiling=Tiling(2, 32))
    assert got.dtype == jnp.bfloat16
    # Shares and the result are rounded to 8 bits; scores are not.
    np.testing.assert_allclose(got.astype(jnp.float32), loops(q, k, v, lengths, **knobs), atol=8e-3)


@pytest.mark.parametrize("how", ["pallas_interpreted", "xla"])
def test_within_shard_map_over_batch_and_heads(how):
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    q, k, v, slopes, _ = draw(8, 4, 2, 2, 40, 16, 16)
    lengths = jnp.asarray([3, 40, 0, 17], jnp.int32)

    def part(q, k, v, lengths, slopes):
        return decode_attention(
            q, k, v, lengths, alibi_slopes=slopes, implementation=how, tiling=Tiling(1, 16)
        )

    specs = (P("data", "tensor"), P("data", "tensor"), P("data", "tensor"), P("data"), P("tensor"))
    split = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P("data", "tensor"), check_vma=False)
    got = jax.jit(split)(q, k, v, lengths, slopes)
    np.testing.assert_allclose(got, loops(q, k, v, lengths, scale=0.25, alibi_slopes=slopes), atol=5e-6)


def test_the_xla_path_neither_copies_nor_turns_the_cache():
    q, k, v, slopes, sinks = draw(9, 2, 4, 2, 500, 64, 64)
    lengths = jnp.asarray([3, 500], jnp.int32)

    def step(q, k, v, lengths):
        return decode_attention(q, k, v, lengths, alibi_slopes=slopes, sinks=sinks, implementation="xla")

    compiled = jax.jit(step).lower(q, k, v, lengths).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < k.nbytes / 8


@pytest.mark.parametrize("kind", CHIPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("C", "V"), [(64, 64), (80, 128), (96, 96), (192, 128), (128, 128), (256, 256)])
def test_lowers_for_tpus_without_a_tpu(kind, dtype, C, V):
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 16, C), (3, 2, 8, 1_000, C), (3, 2, 8, 1_000, V))
    ]
    lengths, heads = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((16,), jnp.float32)

    def step(q, k, v, lengths, slopes, sinks, layer):
        return decode_attention(
            q,
            k,
            v,
            lengths,
            layer=layer,
            window=300,
            softcap=9.0,
            alibi_slopes=slopes,
            sinks=sinks,
            chip=kind,
        )

    layer = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = export.export(jax.jit(step), platforms=["tpu"])(*arrays, lengths, heads, heads, layer)
    assert lowered.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == 1


@given(
    st.sampled_from(CHIPS),
    st.sampled_from([2, 4]),
    st.integers(1, 64),
    st.integers(1, 40_000),
    st.sampled_from([64, 80, 96, 128, 192, 256]),
    st.sampled_from([0, 1, 100, 1_024, 4_096]),
)
@example("TPU v5 lite", 4, 1, 32_768, 256, 0)
def test_tilings_fit(kind, itemsize, K, T, C, window):
    tiling = best_tiling(kind, itemsize, (K, T, C, C), window)
    assert K % tiling.heads == 0
    assert tiling.keys == T or tiling.keys % 128 == 0 and tiling.keys < T
    assert tiling.heads * tiling.keys * 2 * C * itemsize <= MOST_BYTES
    if kind in ("TPU v4", "TPU v5") and K > 1:
        assert tiling.heads < K


def test_a_step_is_large_enough_to_hide_its_cost():
    assert best_tiling("TPU v5 lite", 2, (8, 32_768, 128, 128), 0) == Tiling(8, 512)
    assert best_tiling("TPU v5", 2, (8, 32_768, 128, 128), 0) == Tiling(4, 512)
    assert best_tiling("TPU v5 lite", 2, (1, 32_768, 128, 128), 0) == Tiling(1, 2_048)
    assert best_tiling("TPU v5 lite", 2, (32, 32_768, 128, 128), 256) == Tiling(32, 128)


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    window=st.sampled_from([0, 1, 2, 16, 17, 18, 33]),
    keys=st.sampled_from([16, 32]),
)
def test_steps_are_the_blocks_that_hold_something_to_see(lengths, window, keys):
    slots = 64
    call = decode_tpu.Call(1.0, window, 0.0, Tiling(1, keys))
    rows, starts, count = decode_tpu._steps(call, slots, jnp.asarray(lengths, jnp.int32))
    expected = []
    for row, length in enumerate(lengths):
        seen = {p // keys for p in range(min(length, slots)) if not window or length - 1 - p < window}
        expected += [(row, block) for block in sorted(seen)]
    assert int(count) == len(expected) <= len(rows)
    first = [min((b for r, b in expected if r == row), default=0) for row in range(len(lengths))]
    got = [(int(rows[s]), first[int(rows[s])] + s - int(starts[int(rows[s])])) for s in range(int(count))]
    assert got == expected


@pytest.mark.parametrize(("window", "blocks", "read"), [(0, 4, 200), (64, 2, 72), (73, 3, 136)])
def test_cost_is_counted(window, blocks, read):
    # 200 slots in blocks of 64: the last is of 8.
    q, k, v, _, sinks = draw(10, 3, 2, 4, 200, 16, 24)
    call = decode_tpu.Call(1.0, window, 2.0, Tiling(1, 64))
    x = decode_tpu.Operands(q, k[None], v[None], jnp.full(3, 200), jnp.zeros(1, jnp.int32))
    counted = decode_tpu.cost(call, x)
    seen = window or 200
    assert counted.flops == 3 * 8 * seen * 2 * (16 + 24)
    assert counted.transcendentals == 3 * 8 * (2 * seen + blocks)
    assert counted.bytes_accessed == 4 * (3 * 2 * read * (16 + 24) + 3 * 8 * (16 + 24))
    more = decode_tpu.cost(call, dataclasses.replace(x, sinks=sinks))
    assert more.transcendentals - counted.transcendentals == 3 * 8 * 2


def test_bad_input_is_refused():
    q, k, v, slopes, _ = draw(11, 2, 2, 2, 16, 8, 8)
    n = jnp.ones(2, jnp.int32)
    with pytest.raises(InputError, match="decode attention's shapes"):
        decode_attention(q[:, :3], k, v, n)
    with pytest.raises(InputError, match="decode attention's shapes"):
        decode_attention(q, k, v, n, layer=0)
    with pytest.raises(InputError, match="lengths; expected integers"):
        decode_attention(q, k, v, n[:1])
    with pytest.raises(InputError, match="lengths; expected integers"):
        decode_attention(q, k, v, n.astype(jnp.float32))
    with pytest.raises(InputError, match="alibi_slopes; expected one a query head"):
        decode_attention(q, k, v, n, alibi_slopes=slopes[:2])
    with pytest.raises(InputError, match="window and softcap"):
        decode_attention(q, k, v, n, window=-1)
    with pytest.raises(InputError, match="is a TPU kernel; expected TPU devices; got cpu"):
        decode_attention(q, k, v, n, implementation="pallas_tpu")
    with pytest.raises(InputError, match="expected float32 or bfloat16, one for all"):
        decode_attention(q.astype(jnp.bfloat16), k, v, n, implementation="pallas_interpreted")
    with pytest.raises(InputError, match="at most 65,536; got 2 x 40000"):
        long = jnp.zeros((2, 1, 40_000, 8))
        decode_attention(
            q, long, long, n, implementation="pallas_interpreted", tiling=Tiling(1, 1), scale=math.sqrt(0.5)
        )

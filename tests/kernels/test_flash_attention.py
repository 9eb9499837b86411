"""Attention's implementations against loops, against each other, against jax's own and transformers'."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mosaicjax.errors import InputError
from mosaicjax.kernels import attention_reference
from mosaicjax.kernels.attention_blocks import Operands, Problem
from mosaicjax.kernels.flash_attention import Implementation, flash_attention
from mosaicjax.kernels.flash_tpu import Tiling
from mosaicjax.layers.position import alibi_slopes
from tests.kernels import attention_cases as cases

SMALL = (Tiling(128, 128, 256), Tiling(128, 128, 256))
"""Blocks and a resident chunk so small that tests need several of each."""


def naive(q, k, v, slopes, sinks, *, asked):
    """The reference's own forward pass, which jax differentiates: no gradient of ours is in it."""
    rows, queries = q.shape[:2]
    known = asked["q_offset"] if isinstance(asked["q_offset"], int) else None
    offset = jnp.atleast_1d(jnp.asarray(asked["q_offset"], jnp.int32))
    x = Operands(
        *(each.transpose(0, 2, 1, 3) for each in (q, k, v)),
        offset,
        slopes,
        sinks,
        asked["q_segments"],
        asked["kv_segments"],
        known,
    )
    names = ("causal", "window", "scale", "softcap")
    problem = Problem(*(asked[name] for name in names), queries, k.shape[1])
    out, lse = attention_reference.forward(problem, x)
    return out.transpose(0, 2, 1, 3), jnp.where(jnp.isposinf(lse), 0, lse).transpose(0, 2, 1)


def value_and_grads(function, operands, out_grad, lse_grad):
    """The results, and gradients of all operands that are there for random gradients of both results."""
    there = [n for n, each in enumerate(operands) if each is not None]

    def weighed(*given):
        full = list(operands)
        for n, each in zip(there, given, strict=True):
            full[n] = each
        out, lse = function(*full)
        lse = jnp.where(jnp.isneginf(lse), 0, lse)
        return jnp.sum(out.astype(jnp.float32) * out_grad) + jnp.sum(lse * lse_grad), (out, lse)

    given = [operands[n] for n in there]
    grads, results = jax.jit(jax.grad(weighed, argnums=tuple(range(len(there))), has_aux=True))(*given)
    return [*results, *grads]


def agree(implementation, seed, shape, asked, tiling=None, tolerance=2e-5):
    """All results and gradients of an implementation, and of the reference differentiated by jax."""
    operands = [jnp.asarray(x) for x in cases.arrays(seed, **shape)]
    operands += [asked["alibi_slopes"], asked["sinks"]]
    rng = np.random.default_rng(seed + 1)
    rows, queries, heads = shape["rows"], shape["queries"], shape["heads"]
    out_grad = rng.standard_normal((rows, queries, heads, shape["value_size"])).astype(np.float32)
    lse_grad = rng.standard_normal((rows, queries, heads)).astype(np.float32)

    def ours(q, k, v, slopes, sinks):
        given = {**asked, "alibi_slopes": slopes, "sinks": sinks}
        return flash_attention(
            q, k, v, **given, implementation=implementation, tiling=tiling, return_logsumexp=True
        )

    got = value_and_grads(ours, operands, out_grad, lse_grad)
    expected = value_and_grads(lambda *each: naive(*each, asked=asked), operands, out_grad, lse_grad)
    for one, other in zip(got, expected, strict=True):
        size = max(1.0, float(jnp.max(jnp.abs(other))))
        np.testing.assert_allclose(one, other, atol=tolerance * size, rtol=0)


@st.composite
def problems(draw, lengths):
    heads, kv_heads = draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]))
    shape = {
        "rows": draw(st.sampled_from([1, 2])),
        "heads": heads,
        "kv_heads": kv_heads,
        "queries": draw(lengths),
        "keys": draw(lengths),
        "size": draw(st.sampled_from([8, 24])),
        "value_size": draw(st.sampled_from([8, 16])),
    }
    if draw(st.booleans()):
        shape["keys"] = shape["queries"]
    asked = draw(cases.knobs(shape["rows"], heads, shape["queries"], shape["keys"]))
    return shape, asked


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), problem=problems(st.integers(1, 9)))
def test_the_reference_equals_loops(seed, problem):
    shape, asked = problem
    q, k, v = cases.arrays(seed, **shape)
    run = jax.jit(
        lambda *qkv: flash_attention(*qkv, **asked, implementation="reference", return_logsumexp=True)
    )
    got = run(*map(jnp.asarray, (q, k, v)))
    same = {name: asked[name] for name in ("causal", "scale", "window", "softcap", "sinks")}
    same |= {name: asked[name] for name in ("q_segments", "kv_segments")}
    offset = np.broadcast_to(np.asarray(asked["q_offset"]), shape["rows"])
    expected = cases.loops(q, k, v, **same, slopes=asked["alibi_slopes"], offset=offset)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16), problem=problems(st.integers(1, 12)))
def test_the_references_gradient_is_that_of_its_forward_pass(seed, problem):
    agree("reference", seed, *problem)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**16), problem=problems(st.sampled_from([1, 127, 128, 129, 200, 300])))
def test_the_kernel_equals_the_reference(seed, problem):
    agree("pallas_interpreted", seed, *problem, tiling=SMALL)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    problem=problems(st.sampled_from([1, 127, 128, 129, 255, 256, 257, 511, 600])),
    blocks=st.sampled_from([(128, 128, 128), (128, 256, 512), (256, 128, 256), (256, 256, 512)]),
    strip=st.sampled_from([128, 256]),
)
def test_the_kernel_equals_the_reference_in_any_blocks(seed, problem, blocks, strip):
    tiling = Tiling(*blocks, strip=strip)
    agree("pallas_interpreted", seed, *problem, tiling=(tiling, tiling))


PLAIN = {
    "causal": True,
    "scale": 0.3,
    "window": 0,
    "softcap": 0.0,
    "alibi_slopes": None,
    "sinks": None,
    "q_segments": None,
    "kv_segments": None,
    "q_offset": 0,
}


@pytest.mark.parametrize(
    ("length", "causal"),
    [
        (1, True),
        (129, True),
        *(pytest.param(n, True, marks=pytest.mark.slow) for n in (127, 128, 384)),
        *(pytest.param(n, False, marks=pytest.mark.slow) for n in (1, 127, 128, 129, 384)),
    ],
)
def test_block_edges(length, causal):
    shape = dict(rows=1, heads=2, kv_heads=1, queries=length, keys=length, size=16, value_size=16)
    agree("pallas_interpreted", length, shape, {**PLAIN, "causal": causal}, SMALL)


@pytest.mark.parametrize("size", [80, *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 96, 192, 256))])
def test_head_dims(size):
    shape = dict(rows=1, heads=2, kv_heads=1, queries=200, keys=200, size=size, value_size=64)
    slopes = jnp.asarray([0.3, 0.02], jnp.float32)
    agree("pallas_interpreted", size, shape, {**PLAIN, "scale": size**-0.5, "alibi_slopes": slopes}, SMALL)


@pytest.mark.parametrize(
    "implementation, alibi",
    [
        ("xla", False),
        ("pallas_interpreted", True),
        pytest.param("xla", True, marks=pytest.mark.slow),
        pytest.param("pallas_interpreted", False, marks=pytest.mark.slow),
    ],
)
def test_bfloat16(implementation, alibi):
    """Within two bfloat16 roundings of the reference on the same rounded numbers."""
    shape = dict(rows=2, heads=4, kv_heads=2, queries=300, keys=300, size=64, value_size=64)
    low = [jnp.asarray(x, jnp.bfloat16) for x in cases.arrays(7, **shape)]
    slopes = jnp.asarray([0.5, 0.2, 0.05, 0.004], jnp.float32) if alibi else None
    given = {**PLAIN, "scale": 0.125, "alibi_slopes": slopes}
    grad = np.random.default_rng(8).standard_normal((2, 300, 4, 64)).astype(np.float32)

    def run(which, *qkv):
        tiling = SMALL if which == "pallas_interpreted" else None
        out = flash_attention(*qkv, **given, implementation=which, tiling=tiling)
        return jnp.sum(out.astype(jnp.float32) * grad), out

    got, out = jax.grad(lambda *qkv: run(implementation, *qkv), argnums=(0, 1, 2), has_aux=True)(*low)
    wide = [x.astype(jnp.float32) for x in low]
    expected, out_wide = jax.grad(lambda *qkv: run("reference", *qkv), argnums=(0, 1, 2), has_aux=True)(*wide)
    assert out.dtype == jnp.bfloat16
    for one, other in zip([out, *got], [out_wide, *expected], strict=True):
        assert one.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(one.astype(jnp.float32)) - np.asarray(other))
        assert error <= 2 * 2**-8 * np.linalg.norm(np.asarray(other))


@pytest.mark.parametrize("implementation", ["pallas_interpreted", "xla", "reference"])
def test_a_query_with_nothing_to_see_gives_nothing(implementation):
    shape = dict(rows=2, heads=4, kv_heads=2, queries=140, keys=140, size=8, value_size=8)
    q, k, v = map(jnp.asarray, cases.arrays(2, **shape))
    segments = np.zeros((2, 140), np.int32)
    segments[0, :50] = 1
    slopes = jnp.asarray([0.5, 0.25, 0.1, 0.05], jnp.float32)

    @jax.jit
    def out(q, k, v):
        return flash_attention(
            q,
            k,
            v,
            alibi_slopes=slopes,
            q_segments=jnp.asarray(segments),
            kv_segments=jnp.asarray(segments),
            implementation=implementation,
            tiling=SMALL if implementation == "pallas_interpreted" else None,
        )

    empty = segments == 0
    result = np.asarray(out(q, k, v))
    assert (result[empty] == 0).all()
    assert (result[~empty] != 0).all()
    grads = [
        np.asarray(x) for x in jax.jit(jax.grad(lambda *qkv: out(*qkv).sum(), argnums=(0, 1, 2)))(q, k, v)
    ]
    for grad in grads:
        assert np.isfinite(grad).all()
        assert (grad[empty] == 0).all()
    assert (grads[2][~empty] != 0).all()


@pytest.mark.parametrize("implementation", ["pallas_interpreted", "xla", "reference"])
@pytest.mark.parametrize("keys", [40, 300])
def test_queries_behind_a_window_that_ends_after_all_keys(implementation, keys):
    """Keys in one chunk and in several; slopes' gradient too."""
    shape = dict(rows=1, heads=2, kv_heads=1, queries=9, keys=keys, size=8, value_size=8)
    q, k, v = map(jnp.asarray, cases.arrays(4, **shape))

    def total(q, k, v, slopes):
        return flash_attention(
            q,
            k,
            v,
            window=5,
            q_offset=keys + 20,
            alibi_slopes=slopes,
            implementation=implementation,
            tiling=SMALL if implementation == "pallas_interpreted" else None,
        ).sum()

    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))(q, k, v, jnp.asarray([0.5, 0.1]))
    assert value == 0
    for grad, array in zip(grads, (q, k, v, jnp.zeros(2)), strict=True):
        np.testing.assert_array_equal(grad, np.zeros(array.shape))


@pytest.mark.parametrize("implementation", ["pallas_interpreted", "xla", "reference"])
@pytest.mark.parametrize("size", [1e3, 1e18])
def test_large_scores_give_the_largest_value(implementation, size):
    shape = dict(rows=1, heads=1, kv_heads=1, queries=7, keys=7, size=4, value_size=4)
    q, k, v = cases.arrays(3, **shape)
    tiling = SMALL if implementation == "pallas_interpreted" else None
    got = flash_attention(
        *map(jnp.asarray, (size * q, size * k, v)), scale=1.0, implementation=implementation, tiling=tiling
    )
    for at in range(7):
        best = np.argmax(k[0, : at + 1, 0].astype(float) @ q[0, at, 0].astype(float))
        np.testing.assert_allclose(got[0, at, 0], v[0, best, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window"),
    [(4, 1, 3), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((4, 4, 0), (6, 2, 0)))],
)
@pytest.mark.parametrize("implementation", ["pallas_interpreted", "xla", "reference"])
def test_equals_jax(implementation, heads, kv_heads, window):
    shape = dict(rows=2, heads=heads, kv_heads=kv_heads, queries=140, keys=140, size=8, value_size=8)
    q, k, v = map(jnp.asarray, cases.arrays(1, **shape))
    tiling = SMALL if implementation == "pallas_interpreted" else None
    got = flash_attention(q, k, v, scale=0.3, window=window, implementation=implementation, tiling=tiling)
    expected = jax.nn.dot_product_attention(
        q, k, v, scale=0.3, is_causal=True, local_window_size=(window - 1, 0) if window else None
    )
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "check", "length"),
    [("pallas_interpreted", False, 300), ("xla", False, 30), ("xla", True, 30), ("xla", True, 800)],
)
def test_within_shard_map_over_batch_and_heads(implementation, check, length):
    """Results and gradients, those of slopes summed over the batch's shards too."""
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    rng = np.random.default_rng(5)
    shape = dict(rows=2, heads=8, kv_heads=2, queries=length, keys=length, size=8, value_size=16)
    q, k, v = map(jnp.asarray, cases.arrays(3, **shape))
    segments = jnp.asarray(cases.segments(rng, 2, length))
    slopes = jnp.asarray(alibi_slopes(8, 8.0), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((2, length, 8, 16)), jnp.float32)
    tiling = SMALL if implementation == "pallas_interpreted" else None

    def part(q, k, v, segments, slopes):
        knobs = {"alibi_slopes": slopes, "q_segments": segments, "kv_segments": segments}
        return flash_attention(q, k, v, **knobs, implementation=implementation, tiling=tiling)

    heads = P("data", None, "tensor")
    specs = (heads, heads, heads, P("data"), P("tensor"))
    split = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=check)
    asked = dict(q_segments=segments, kv_segments=segments, q_offset=0, causal=True, window=0, softcap=0.0)

    def whole(q, k, v, slopes):
        return naive(q, k, v, slopes, None, asked={**asked, "scale": 8**-0.5})[0]

    def results(function):
        def weighed(*each):
            out = function(*each)
            return jnp.sum(out * weight), out

        grads, out = jax.jit(jax.grad(weighed, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, slopes)
        return [out, *grads]

    got = results(lambda q, k, v, slopes: split(q, k, v, segments, slopes))
    for one, other in zip(got, results(whole), strict=True):
        size = max(1.0, float(jnp.max(jnp.abs(other))))
        np.testing.assert_allclose(one, other, atol=2e-5 * size, rtol=0)


@pytest.mark.peer
def test_slopes_are_those_of_bloom():
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in range(1, 64):
        mask = torch.ones(1, 2)
        theirs = bloom.build_alibi_tensor(mask, heads, torch.float32)[:, 0, 1].numpy()
        np.testing.assert_allclose(alibi_slopes(heads, 8.0), theirs, rtol=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("implementation", ["pallas_interpreted", "xla", "reference"])
def test_equals_the_attention_of_llama(implementation):
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    shape = dict(rows=2, heads=6, kv_heads=2, queries=150, keys=150, size=16, value_size=16)
    q, k, v = cases.arrays(5, **shape)

    class Module:
        num_key_value_groups, training = 3, False

    hidden = torch.full((150, 150), float("-inf")).triu(1)[None, None]
    turned = [torch.tensor(x).transpose(1, 2) for x in (q, k, v)]
    theirs, _ = llama.eager_attention_forward(Module(), *turned, hidden, scaling=0.25)
    tiling = SMALL if implementation == "pallas_interpreted" else None
    ours = flash_attention(*map(jnp.asarray, (q, k, v)), implementation=implementation, tiling=tiling)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


@pytest.mark.peer
@pytest.mark.parametrize("implementation", ["pallas_interpreted", "xla", "reference"])
def test_equals_the_attention_of_mpt(implementation):
    torch = pytest.importorskip("torch")
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    configs = pytest.importorskip("transformers.models.mpt.configuration_mpt")
    config = configs.MptConfig(d_model=48, n_heads=6, n_layers=1, max_seq_len=256)
    module = mpt.MptAttention(config, layer_idx=0).eval()
    with torch.no_grad():
        module.Wqkv.weight.copy_(torch.randn(144, 48) / 4)
        module.out_proj.weight.copy_(torch.eye(48))
    x = torch.randn(2, 130, 48)
    bias = mpt.build_mpt_alibi_tensor(6, 256, alibi_bias_max=8)
    hidden = torch.ones(130, 130, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        theirs = module(x, position_bias=bias, attention_mask=hidden)[0].numpy()
        qkv = (x @ module.Wqkv.weight.T).numpy().reshape(2, 130, 3, 6, 8)
    tiling = SMALL if implementation == "pallas_interpreted" else None
    ours = flash_attention(
        *(jnp.asarray(qkv[:, :, n]) for n in range(3)),
        alibi_slopes=jnp.asarray(alibi_slopes(6, 8.0), jnp.float32),
        implementation=implementation,
        tiling=tiling,
    )
    np.testing.assert_allclose(ours.reshape(2, 130, 48), theirs, atol=2e-5)


@pytest.mark.parametrize(
    ("heads", "max_bias", "expected"),
    [
        (8, 8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
        (4, 16, [2**-4, 2**-8, 2**-12, 2**-16]),
        (3, 8, [2**-4, 2**-8, 2**-2]),
        (1, 8, [2**-8]),
    ],
)
def test_alibi_slopes_by_hand(heads, max_bias, expected):
    assert alibi_slopes(heads, max_bias) == pytest.approx(expected, rel=1e-12)


def test_slopes_cost_their_gradient_only_where_it_is_asked_for():
    """The kernel's extra output is there if slopes are differentiated, and not otherwise."""
    shape = dict(rows=1, heads=2, kv_heads=2, queries=128, keys=128, size=8, value_size=8)
    q, k, v = map(jnp.asarray, cases.arrays(6, **shape))
    slopes = jnp.asarray([0.5, 0.25])

    def total(q, slopes):
        return flash_attention(
            q, k, v, alibi_slopes=slopes, implementation="pallas_interpreted", tiling=SMALL
        ).sum()

    def outputs(argnums):
        text = str(jax.make_jaxpr(jax.grad(total, argnums=argnums))(q, slopes))
        return text.count("f32[1,2,1,128]")

    assert outputs((0, 1)) > outputs(0)
    assert math.isfinite(float(jax.grad(total, argnums=1)(q, slopes)[0]))


def test_what_cannot_be_is_refused():
    shape = dict(rows=1, heads=4, kv_heads=2, queries=8, keys=8, size=8, value_size=8)
    q, k, v = map(jnp.asarray, cases.arrays(9, **shape))
    with pytest.raises(InputError, match="TPU kernel"):
        flash_attention(q, k, v, implementation=Implementation.PALLAS_TPU)
    with pytest.raises(InputError, match="K dividing H"):
        flash_attention(q[:, :, :3], k, v)
    with pytest.raises(InputError, match="alibi_slopes"):
        flash_attention(q, k, v, alibi_slopes=jnp.ones(3))
    with pytest.raises(InputError, match="segments"):
        flash_attention(q, k, v, q_segments=jnp.ones((1, 8), jnp.int32))
    with pytest.raises(InputError, match="float32 or bfloat16"):
        low = (x.astype(jnp.float16) for x in (q, k, v))
        flash_attention(*low, implementation=Implementation.PALLAS_INTERPRETED)

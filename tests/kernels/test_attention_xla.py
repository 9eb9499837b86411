"""The tiled softmax in small blocks, by every way through it, against the reference differentiated by jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.kernels import attention_reference, attention_xla
from mosaicjax.kernels.attention_blocks import Operands, Problem
from mosaicjax.kernels.flash_attention import flash_attention
from tests.kernels import attention_cases as cases
from tests.kernels.test_flash_attention import agree, problems

ONE_BY_ONE = attention_xla.Sizes(queries=8, keys=4, together=0)
ALL_KEYS = attention_xla.Sizes(queries=4, keys=64, together=0)
HEADS_TOGETHER = attention_xla.Sizes(queries=4, keys=8, together=2_000)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16), problem=problems(st.sampled_from([1, 7, 8, 9, 30])))
def test_gradients_equal_the_reference(seed, problem):
    agree("xla", seed, *problem)


@pytest.mark.soak
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), problem=problems(st.sampled_from([1, 7, 8, 9, 30, 65])))
def test_gradients_equal_the_reference_often(seed, problem):
    agree("xla", seed, *problem)


@pytest.mark.parametrize("sizes", [ONE_BY_ONE, ALL_KEYS, HEADS_TOGETHER])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**16), problem=problems(st.sampled_from([1, 7, 8, 9, 30])))
def test_any_blocks(sizes, seed, problem):
    shape, asked = problem
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(x).transpose(0, 2, 1, 3) for x in cases.arrays(seed, **shape))
    known = asked["q_offset"] if isinstance(asked["q_offset"], int) else None
    x = Operands(
        q,
        k,
        v,
        jnp.atleast_1d(jnp.asarray(asked["q_offset"], jnp.int32)),
        asked["alibi_slopes"],
        asked["sinks"],
        asked["q_segments"],
        asked["kv_segments"],
        known,
    )
    names = ("causal", "window", "scale", "softcap")
    problem = Problem(*(asked[name] for name in names), *x.lengths, asked["alibi_slopes"] is not None)
    grad = jnp.asarray(rng.standard_normal((*q.shape[:3], v.shape[3])), jnp.float32)
    delta = jnp.asarray(rng.standard_normal(q.shape[:3]), jnp.float32)

    def both(module, *cut):
        out, lse = module.forward(problem, x, *cut)
        return out, lse, *module.backward(problem, x, grad, lse, delta, *cut)

    got = jax.jit(lambda: both(attention_xla, sizes))()
    expected = jax.jit(lambda: both(attention_reference))()
    for one, other in zip(got, expected, strict=True):
        if other is None:
            assert one is None
            continue
        finite = np.isfinite(other)
        np.testing.assert_array_equal(np.isfinite(one), finite)
        size = max(1.0, float(np.max(np.abs(np.asarray(other)[finite]), initial=0)))
        np.testing.assert_allclose(np.asarray(one)[finite], np.asarray(other)[finite], atol=2e-5 * size)


@pytest.mark.slow
def test_memory_is_linear_in_the_length():
    """Twice the length takes no more than twice the memory."""

    def temporary(length):
        one = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

        def total(q, k, v):
            return flash_attention(q, k, v, implementation="xla").sum()

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(one, one, one).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(4_096), temporary(8_192)
    assert long <= 2.2 * short
    assert long < 4 * 8_192 * 8_192

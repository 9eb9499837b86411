"""Products of 8-bit numbers against numpy, qwix's own provider and each other; what is refused."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from mosaicjax.layers.linear import Multiplied, linear, scores_of
from mosaicjax.methods.low_precision import LARGEST, Rounded


def e4m3(x):
    """float64 to the nearest number of 1 sign, 4 exponent and 3 mantissa bits, ties to even."""
    return rounded_float(x, mantissa=3, least=-6, most=448.0)


def e5m2(x):
    return rounded_float(x, mantissa=2, least=-14, most=57_344.0)


def rounded_float(x, mantissa, least, most):
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-300))), least)
    step = 2.0 ** (exponent - mantissa)
    return np.clip(np.round(x / step) * step, -most, most)


def int8(x):
    return np.round(x)


BOUND = {"int8": (127, 127), "fp8": (448, 57_344)}
ROUND = {"int8": (int8, int8), "fp8": (e4m3, e5m2)}


class Undecided(Exception):
    """The last bit of float32 says to which side a number is rounded."""


def by_hand(matrix, axis, dtype, gradient=False):
    """Rounded entries and scales, in float64: the largest along `axis` is the format's largest."""
    absmax = np.abs(matrix).max(axis=axis, keepdims=True)
    scale = np.where(absmax > 0, absmax / BOUND[dtype][gradient], 1.0)
    down, up = (ROUND[dtype][gradient](matrix / scale * (1 + bit)) for bit in (-1e-6, 1e-6))
    if (down != up).any():
        raise Undecided
    return up, scale


def expected(x, weight, grad, dtype, backward):
    """The product and the gradients of both operands."""
    x, weight, grad = (np.asarray(each, np.float64) for each in (x, weight, grad))
    x_q, x_s = by_hand(x, 1, dtype)
    w_q, w_s = by_hand(weight, 0, dtype)
    out, x_grad, w_grad = (x_q * x_s) @ (w_q * w_s), grad @ weight.T, x.T @ grad
    if backward != "compute":
        g_q, g_s = by_hand(grad * w_s, 1, dtype, gradient=True)
        x_grad = (g_q * g_s) @ w_q.T
    if backward == "all":
        g_q, g_s = by_hand(grad * x_s, 0, dtype, gradient=True)
        w_grad = x_q.T @ (g_q * g_s)
    return out, x_grad, w_grad


@partial(jax.jit, static_argnums=3)
def product(x, weight, grad, how):
    out, back = jax.vjp(lambda x, weight: linear(x, Multiplied(weight, how)), x, weight)
    return out, *back(grad)


# Every shape is compiled anew.
@settings(max_examples=4)
@given(
    rows=st.integers(1, 7),
    inner=st.integers(1, 40),
    outer=st.integers(1, 9),
    dtype=st.sampled_from(["int8", "fp8"]),
    backward=st.sampled_from(["compute", "inputs", "all"]),
    spread=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_product_and_its_gradients_by_hand(rows, inner, outer, dtype, backward, spread, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, inner)) * 10.0 ** (spread * rng.random((rows, 1)))).astype(np.float32)
    weight = rng.standard_normal((inner, outer)).astype(np.float32)
    grad = rng.standard_normal((rows, outer)).astype(np.float32)
    try:
        wanted = expected(x, weight, grad, dtype, backward)
    except Undecided:
        reject()
    for got, each in zip(product(x, weight, grad, Rounded(dtype, backward)), wanted, strict=True):
        np.testing.assert_allclose(got, each, rtol=1e-5, atol=1e-5 * np.abs(each).max())


@pytest.mark.parametrize(
    ("dtype", "backward"),
    [
        ("int8", "all"),
        pytest.param("fp8", "all", marks=pytest.mark.slow),
        pytest.param("int8", "compute", marks=pytest.mark.slow),
        pytest.param("fp8", "compute", marks=pytest.mark.slow),
    ],
)
def test_products_and_gradients_are_those_of_qwix_for_a_dense_layer(dtype, backward):
    rng = np.random.default_rng(1)
    x, weight, grad = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((6, 24), (24, 10), (6, 10))
    )
    kind, gradients = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}[dtype]
    names = ("weight_calibration_method", "act_calibration_method", "bwd_calibration_method")
    largest = dict.fromkeys(names, LARGEST[dtype])
    rules = [
        qwix.QtRule(
            weight_qtype=kind, act_qtype=kind, bwd_qtype=gradients if backward == "all" else None, **largest
        )
    ]
    layer = qwix.quantize_model(nn.Dense(10, use_bias=False), qwix.QtProvider(rules))

    def peer(x, weight):
        return layer.apply({"params": {"kernel": weight}}, x)

    def both(x, weight, grad):
        out, pull = jax.vjp(peer, x, weight)
        return out, *pull(grad)

    with jax.numpy_dtype_promotion("standard"):
        wanted = jax.jit(both)(x, weight, grad)
    for got, each in zip(product(x, weight, grad, Rounded(dtype, backward)), wanted, strict=True):
        np.testing.assert_allclose(got, each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(dtype, bad):
    x = np.ones((3, 8), np.float32)
    x[1, 2] = bad
    out, _, weight_grad = product(
        x, np.ones((8, 4), np.float32), np.ones((3, 4), np.float32), Rounded(dtype, "all")
    )
    assert np.isnan(out[1]).all() and np.isfinite(out[::2]).all()
    assert np.isnan(weight_grad).any()


def test_scores_are_products_with_a_table_in_the_dtype_asked_for():
    """In bfloat16: operands are those numbers, and so are the gradients; scores are float32.

    Of numbers this coarse many lie just between two integers; of this seed none do.
    """
    rng = np.random.default_rng(4)
    x, table, grad = (
        np.asarray(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16))
        for shape in ((2, 3, 24), (7, 24), (2, 3, 7))
    )
    wanted = expected(x.reshape(6, 24), table.T, grad.reshape(6, 7), "int8", "all")

    @jax.jit
    def run(x, table, grad):
        how = Rounded("int8", "all")
        out, back = jax.vjp(lambda x, t: scores_of(x, Multiplied(t, how), "float32"), x, table)
        return out, *back(grad)

    out, x_grad, table_grad = run(x, table, grad.astype(np.float32))
    assert (out.dtype, x_grad.dtype, table_grad.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(out).reshape(6, 7), wanted[0], rtol=1e-5, atol=1e-5)
    for got, each in ((x_grad.reshape(6, 24), wanted[1]), (table_grad.T, wanted[2])):
        np.testing.assert_allclose(np.asarray(got, np.float32), each, rtol=2**-8, atol=1e-5)

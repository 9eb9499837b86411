"""FLOPs a token: by hand for whole models, and against what a compiled forward pass does."""

import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.mlp import Glu
from mosaicjax.layers.position import Learned
from mosaicjax.models import flops, mpt
from tests.models import forward


def test_mpt_125m_by_hand():
    # A layer: Wqkv 768 x 2304, out 768 x 768, up and down 768 x 3072 each; the head 50368 x 768.
    layer = 768 * 2304 + 768 * 768 + 2 * 768 * 3072
    assert layer == 7_077_888
    weights = 12 * layer + 50_368 * 768
    assert weights == 123_617_280
    decoder = mpt.Config(layers=12, embed=768, heads=12, mlp=3072, vocab=50_368).build()
    cost = flops.per_token(decoder, 2_048)
    # Scores and their mix: 2 products of 768 multiply-adds with each key seen.
    assert cost.full == 6 * weights + 3 * 12 * 2 * 2 * 768 * 2_048
    assert cost.causal == 6 * weights + 3 * 12 * 2 * 2 * 768 * 2_049 / 2
    # PaLM's formula, 6 N + 12 L H Q T.
    assert cost.full == 6 * weights + 12 * 12 * 12 * 64 * 2_048


def test_gqa_glu_windows_and_an_untied_head_by_hand():
    config = mpt.Config(
        layers=4,
        embed=64,
        heads=8,
        kv_heads=2,
        head_dim=16,
        mlp=96,
        vocab=1_000,
        ffn=Glu(),
        windows=(4, 0),
        tied=False,
        bias=True,
        qk_norm=QkNorm(),
        position=Learned(length=32),
    )
    query = out = 64 * 8 * 16
    keys = values = 64 * 2 * 16
    layer = query + keys + values + out + 3 * 64 * 96
    cost = flops.per_token(config.build(), 32)
    products = 4 * layer + 64 * 1_000
    # Of 32 queries with a window of 4, the first see 1, 2 and 3 keys, the others 4.
    windowed, whole = (1 + 2 + 3 + 29 * 4) / 32, 33 / 2
    per_score = 4 * 8 * 16
    assert cost.full == 3 * (2 * products + 4 * per_score * 32)
    assert cost.causal == pytest.approx(3 * (2 * products + 2 * per_score * (windowed + whole)), rel=1e-12)


@given(st.integers(1, 60), st.integers(0, 80))
def test_mean_seen_is_that_of_a_mask(length, window):
    seen = [
        (query, key)
        for query in range(length)
        for key in range(query + 1)
        if not window or query - key < window
    ]
    assert flops.mean_seen(length, window) == pytest.approx(len(seen) / length, rel=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        mpt.Config(layers=1, embed=64, heads=4, mlp=256, vocab=512),
        mpt.Config(layers=1, embed=64, heads=4, kv_heads=2, mlp=160, vocab=256, ffn=Glu(), tied=False),
    ],
    ids=["mpt", "gqa, glu, untied"],
)
def test_against_the_products_of_the_traced_forward_pass(config):
    length, rows = 64, 2
    decoder = config.build()
    weights = forward.random_weights(decoder)
    tokens = jnp.zeros((rows, length), jnp.int32)

    def run(weights, tokens):
        where = forward.context(tokens)
        return forward.logits_from(decoder, weights, decoder.embed(weights, tokens, where), where)

    counted = dots(jax.make_jaxpr(run)(weights, tokens).jaxpr)
    # The scan of one layer is traced once, and run once. All pairs of positions are multiplied.
    assert 3 * counted / (rows * length) == pytest.approx(flops.per_token(decoder, length).full, rel=0.01)


def dots(jaxpr):
    """FLOPs of all matrix products of a traced function, those of functions within it too."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (operand.aval.shape for operand in equation.invars)
            (_, summed), (_, batched) = equation.params["dimension_numbers"]
            kept = [size for dim, size in enumerate(right) if dim not in (*summed, *batched)]
            total += 2 * math.prod(left) * math.prod(kept)
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    total += dots(inner)
    return total

"""MPT in llm-foundry's form, whose model has knobs that Transformers' lacks, against the oracle.

Weights go into a checkpoint of llm-foundry's by slices written out here, and come out of it by the table.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.mlp import Activation, Glu, Mlp
from mosaicjax.layers.norm import LayerNorm, RmsNorm
from mosaicjax.layers.position import (
    Alibi,
    DynamicScaling,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Rotary,
)
from mosaicjax.models import mpt
from mosaicjax.models.names import foreign_tensors
from tests.models import forward, oracle
from tests.models.llama_like import imported, read_back

LENGTH = 11
SMALL = mpt.Config(layers=2, embed=24, heads=3, mlp=96, vocab=17)

POSITIONS = [
    ({"alibi": True, "rope": False}, Alibi()),
    ({"alibi": True, "alibi_bias_max": 4}, Alibi(4.0)),
    ({"alibi": False}, Learned(16)),
    ({"rope": True}, Rotary()),
    ({"rope": True, "rope_theta": 50, "rope_hf_config": {"type": "linear", "factor": 2.0}}, Rotary(50.0)),
    ({"rope": True, "rope_impl": "dail", "rope_dail_config": {"type": "original"}}, Rotary()),
    ({"rope": True, "rope_impl": "hf", "rope_hf_config": {"type": "no_scaling", "factor": 1.0}}, Rotary()),
    (
        {
            "rope": True,
            "rope_impl": "hf",
            "rope_hf_config": {"type": "linear", "factor": 2},
            "rope_theta": 99,
        },
        Rotary(99.0, LinearScaling(2.0)),
    ),
    (
        {"rope": True, "rope_impl": "hf", "rope_hf_config": {"type": "dynamic", "factor": 3.0}},
        Rotary(scaling=DynamicScaling(3.0, original=16)),
    ),
    (
        {
            "rope": True,
            "rope_impl": "hf",
            "rope_hf_config": {
                "type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 40,
            },
        },
        Rotary(scaling=Llama3Scaling(original=40)),
    ),
]
KINDS = ["multihead", "multiquery", "grouped_query"]
NORMS = {
    "layernorm": LayerNorm,
    "low_precision_layernorm": LayerNorm,
    "rmsnorm": RmsNorm,
    "low_precision_rmsnorm": RmsNorm,
}
ACTIVATIONS = [
    (None, Activation.GELU),
    ({"name": "gelu", "approximate": "none"}, Activation.GELU),
    ({"name": "gelu", "approximate": "tanh"}, Activation.GELU_TANH),
    ({"name": "silu"}, Activation.SILU),
    ({"name": "relu"}, Activation.RELU),
]


@st.composite
def foundry(draw):
    """A `config.json` of llm-foundry's, and by hand what it means."""
    heads, head_dim = draw(st.sampled_from([1, 2, 3, 6, 12])), draw(st.sampled_from([4, 8]))
    embed, kind = heads * head_dim, draw(st.sampled_from(KINDS))
    shared = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    keys, position = draw(st.sampled_from(POSITIONS))
    bias, tied = draw(st.booleans()), draw(st.booleans())
    norm_type, eps = draw(st.sampled_from(list(NORMS))), draw(st.sampled_from([1e-6, 1e-5, 1e-2]))
    layered = NORMS[norm_type] is LayerNorm
    qk = draw(st.sampled_from(["", "qk_ln", "qk_gn"]))
    function, activation = draw(st.sampled_from(ACTIVATIONS))
    gated, ratio = draw(st.booleans()), draw(st.sampled_from([2, 1.5, 4.0, 0.25]))
    hidden = draw(st.sampled_from([None, 10]))
    clip, scale = draw(st.sampled_from([None, 0.7])), draw(st.sampled_from([None, 0.3]))
    cap, final_cap = draw(st.sampled_from([None, 2.0])), draw(st.sampled_from([None, 3.0]))
    window = draw(st.sampled_from([-1, 0, 3, 20]))
    logit_scale = draw(st.sampled_from([None, 0.5, "inv_sqrt_d_model"]))
    vocab, layers = draw(st.sampled_from([17, 40])), draw(st.integers(1, 3))
    values = {
        "model_type": "mpt",
        "d_model": embed,
        "n_heads": heads,
        "n_layers": layers,
        "expansion_ratio": ratio,
        "max_seq_len": 16,
        "vocab_size": vocab,
        "resid_pdrop": 0.1,
        "attn_config": {
            "attn_type": kind + draw(st.sampled_from(["", "_attention"])),
            "clip_qkv": clip,
            "softmax_scale": scale,
            "attn_logit_softcapping": cap,
            "sliding_window_size": window,
            "qk_ln": qk == "qk_ln",
            "qk_gn": qk == "qk_gn",
            "attn_temperature_tuning": {"floor_scale": 8_192, "attn_scale": 0.0},
            **({"kv_n_heads": shared} if kind == "grouped_query" else {}),
            **keys,
        },
        "ffn_config": {
            "ffn_type": "mptglu" if gated else "mptmlp",
            "ffn_act_fn": function,
            "ffn_hidden_size": hidden,
            "fc_type": {"name": "torch"},
        },
        "init_config": {"name": "kaiming_normal_"},
        "no_bias": not bias,
        "norm_type": norm_type,
        "norm_eps": eps,
        "tie_word_embeddings": tied,
        "logit_scale": logit_scale,
        "final_logit_softcapping": final_cap,
        "embedding_fraction": 0.1,
    }
    config = mpt.Config(
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads={"multihead": 0, "multiquery": 1, "grouped_query": shared}[kind],
        mlp=hidden or round(embed * ratio),
        vocab=vocab,
        position=position,
        norm=LayerNorm(eps, bias, norm_type.startswith("low")) if layered else RmsNorm(eps),
        ffn=(Glu if gated else Mlp)(activation),
        bias=bias,
        # Whatever the model's norms are.
        qk_norm=QkNorm(LayerNorm(bias=bias, low_precision=True), per_head=qk == "qk_gn") if qk else None,
        clip_qkv=clip or 0.0,
        softmax_scale=scale or 0.0,
        attention_softcap=cap or 0.0,
        windows=(window + 1,),
        tied=tied,
        logit_scale={None: 1.0, 0.5: 0.5}.get(logit_scale, 1 / math.sqrt(embed)),
        logit_softcap=final_cap or 0.0,
        embedding_fraction=0.1,
    )
    return values, config


def foundry_checkpoint(config, rng):
    """Random tensors as llm-foundry names and shapes them, and as our tree, laid out by hand."""
    C = config.embed // config.heads
    D, H, K, F = config.embed, config.heads, config.kv_heads or config.heads, config.mlp
    tensors = {}

    def drawn(name, *shape):
        tensors[name] = (0.3 * rng.standard_normal(shape) + (0.7 if len(shape) == 1 else 0)).astype("f4")
        return tensors[name]

    def normed(name, *shape, norm=config.norm):
        size = math.prod(shape)
        tree = {"scale": drawn(f"{name}.weight", size).reshape(shape)}
        if isinstance(norm, LayerNorm) and norm.bias:
            tree["bias"] = drawn(f"{name}.bias", size).reshape(shape)
        return tree

    def layer(n):
        at = f"transformer.blocks.{n}"
        fused = drawn(f"{at}.attn.Wqkv.weight", (H + 2 * K) * C, D)
        queries, keys, values = fused[: H * C], fused[H * C : (H + K) * C], fused[(H + K) * C :]
        attention = {
            "query": queries.T.reshape(D, H, C),
            "key": keys.T.reshape(D, K, C),
            "value": values.T.reshape(D, K, C),
            "out": drawn(f"{at}.attn.out_proj.weight", D, H * C).T.reshape(H, C, D),
        }
        names = {"up": "up_proj"} | ({"gate": "gate_proj"} if isinstance(config.ffn, Glu) else {})
        mlp = {part: drawn(f"{at}.ffn.{name}.weight", F, D).T for part, name in names.items()}
        mlp["down"] = drawn(f"{at}.ffn.down_proj.weight", D, F).T
        if config.bias:
            fused = drawn(f"{at}.attn.Wqkv.bias", (H + 2 * K) * C)
            attention["query_bias"] = fused[: H * C].reshape(H, C)
            attention["key_bias"] = fused[H * C : (H + K) * C].reshape(K, C)
            attention["value_bias"] = fused[(H + K) * C :].reshape(K, C)
            attention["out_bias"] = drawn(f"{at}.attn.out_proj.bias", D)
            mlp |= {f"{part}_bias": drawn(f"{at}.ffn.{name}.bias", F) for part, name in names.items()}
            mlp["down_bias"] = drawn(f"{at}.ffn.down_proj.bias", D)
        if config.qk_norm is not None:
            per_head = config.qk_norm.per_head
            for part, name, count in (("query_norm", "q_ln", H), ("key_norm", "k_ln", K)):
                shape = (C,) if per_head else (count, C)
                attention[part] = normed(f"{at}.attn.{name}", *shape, norm=config.qk_norm.norm)
        return {
            "attention_norm": normed(f"{at}.norm_1", D),
            "attention": attention,
            "mlp_norm": normed(f"{at}.norm_2", D),
            "mlp": mlp,
        }

    layers = [layer(n) for n in range(config.layers)]
    tree = {"embed": {"tokens": drawn("transformer.wte.weight", config.vocab, D)}}
    if isinstance(config.position, Learned):
        tree["embed"]["positions"] = drawn("transformer.wpe.weight", config.position.length, D)
    tree["norm"] = normed("transformer.norm_f", D)
    if not config.tied:
        tree["head"] = drawn("lm_head.weight", config.vocab, D)
    tree["stacks"] = [[{"layer": stacked(layers)}]]
    return tensors, tree


def stacked(trees):
    if isinstance(trees[0], dict):
        return {name: stacked([tree[name] for tree in trees]) for name in trees[0]}
    return np.stack(trees)


@settings(max_examples=60)
@given(drawn=foundry())
def test_every_key_of_llm_foundry_means_what_it_means_there(drawn):
    values, config = drawn
    assert read_back(SMALL, values) == config


def assert_foundry_logits(drawn, seed):
    values, config = drawn
    rng = np.random.default_rng(seed)
    tensors, tree = foundry_checkpoint(config, rng)
    family = read_back(SMALL, values)
    named = {foreign.name for foreign in foreign_tensors(family.build(), family.names())}
    assert named == set(tensors)
    tokens = rng.integers(0, config.vocab, (2, LENGTH))
    got = forward.logits(family.build(), imported(family, tensors), tokens)
    expected = oracle.logits(config, tree, tokens)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@settings(max_examples=4)
@given(drawn=foundry(), seed=st.integers(0, 2**16))
def test_checkpoints_of_llm_foundry_give_the_logits_of_the_definition(drawn, seed):
    assert_foundry_logits(drawn, seed)


@pytest.mark.slow
@settings(max_examples=8)
@given(drawn=foundry(), seed=st.integers(0, 2**16))
def test_many_checkpoints_of_llm_foundry(drawn, seed):
    assert_foundry_logits(drawn, seed)

"""MPT's `config.json` and names, and the model beside Transformers' own."""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import Attention, QkNorm
from mosaicjax.layers.mlp import Activation, Glu, Mlp
from mosaicjax.layers.moe import Moe
from mosaicjax.layers.norm import LayerNorm, RmsNorm
from mosaicjax.layers.position import (
    Alibi,
    Learned,
    Position,
    Rotary,
)
from mosaicjax.models import mpt
from mosaicjax.models.names import foreign_tensors
from tests.models.llama_like import assert_round_trip, hf_config, read_back

LOW = LayerNorm(bias=False, low_precision=True)
SMALL = mpt.Config(layers=2, embed=24, heads=3, mlp=96, vocab=17)

MPT_7B = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
    "d_model": 4_096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"name": "kaiming_normal_", "emb_init_std": None, "init_gain": 0},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2_048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50_432,
}
"""As published."""


def test_a_published_configuration():
    assert read_back(SMALL, MPT_7B) == mpt.Config(
        layers=32, embed=4_096, heads=32, mlp=16_384, vocab=50_432, norm=LOW
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Transformers' defaults, unless a key stands there that only llm-foundry has.
        ({}, {}),
        ({"attn_config": {"alibi_bias_max": 8}}, {}),
        ({"attn_config": {"rope": False}}, {"position": Learned(2_048), "bias": True, "norm": LayerNorm()}),
        ({"ffn_config": {}}, {"position": Learned(2_048), "bias": True, "norm": LayerNorm()}),
        ({"attn_config": {"alibi": False}, "learned_pos_emb": False}, {"position": Position()}),
        ({"attn_config": {"alibi": False}, "max_seq_len": 64}, {"position": Learned(64)}),
        ({"layer_norm_epsilon": 1e-3}, {"norm": LayerNorm(1e-3, bias=False)}),
    ],
)
def test_missing_keys(changes, expected):
    values = {"model_type": "mpt", "d_model": 24, "n_heads": 3, "n_layers": 2, "vocab_size": 17}
    found = read_back(SMALL, values | changes)
    norm = replace(expected.get("norm", LayerNorm(bias=False)), low_precision=True)
    assert found == replace(SMALL, **expected | {"norm": norm})


def test_names_and_shapes_under_grouped_query_attention():
    config = replace(SMALL, layers=1, heads=6, kv_heads=2, bias=True, tied=False, norm=LayerNorm(), ffn=Glu())
    layer = "transformer.blocks.0"
    assert {foreign.name: foreign.shape for foreign in foreign_tensors(config.build(), config.names())} == {
        "transformer.wte.weight": (17, 24),
        "transformer.norm_f.weight": (24,),
        "transformer.norm_f.bias": (24,),
        "lm_head.weight": (17, 24),
        f"{layer}.norm_1.weight": (24,),
        f"{layer}.norm_1.bias": (24,),
        f"{layer}.norm_2.weight": (24,),
        f"{layer}.norm_2.bias": (24,),
        f"{layer}.attn.Wqkv.weight": (24 + 2 * 8, 24),
        f"{layer}.attn.Wqkv.bias": (24 + 2 * 8,),
        f"{layer}.attn.out_proj.weight": (24, 24),
        f"{layer}.attn.out_proj.bias": (24,),
        f"{layer}.ffn.gate_proj.weight": (96, 24),
        f"{layer}.ffn.gate_proj.bias": (96,),
        f"{layer}.ffn.up_proj.weight": (96, 24),
        f"{layer}.ffn.up_proj.bias": (96,),
        f"{layer}.ffn.down_proj.weight": (24, 96),
        f"{layer}.ffn.down_proj.bias": (24,),
    }


def attention(**keys):
    return {"attn_config": MPT_7B["attn_config"] | keys}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_model": None}, "config.json lacks 'd_model'"),
        ({"head_dim": 64}, "head_dim is a knob"),
        ({"attention_bias": True}, "attention_bias is a knob"),
        ({"block_overrides": {"order": []}}, "block_overrides is a knob"),
        ({"fuse_norm_attn_norm": True}, "fuse_norm_attn_norm is a knob"),
        ({"norm_type": "batchnorm"}, "norm_type"),
        ({"norm_eps": 1e-3, "layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is a knob"),
        ({"expansion_ratio": 0.3}, "expansion_ratio"),
        ({"logit_scale": "sqrt"}, "logit_scale is a knob"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping; expected above 0, or null"),
        ({"attn_config": 5}, "attn_config; expected a mapping"),
        ({"ffn_config": {"ffn_type": "mb_dmoe"}}, "ffn_type is a knob"),
        ({"ffn_config": {"ffn_act_fn": {"name": "quick_gelu"}}}, "ffn_act_fn: name"),
        ({"ffn_config": {"ffn_act_fn": {"name": "gelu", "approximate": "erf"}}}, "approximate is a knob"),
        (attention(attn_type="ring_attention"), "attn_type is not known here"),
        (attention(attn_type="grouped_query_attention"), "lacks 'kv_n_heads'"),
        (attention(attn_type="multihead_attention", kv_n_heads=4), "kv_n_heads is a knob"),
        (attention(prefix_lm=True), "prefix_lm is a knob"),
        (attention(fused_qkv=False), "fused_qkv is a knob"),
        (attention(kv_dim=8), "kv_dim is a knob"),
        (attention(nope=True), "nope is a knob"),
        (attention(reuse_kv_layer_idx=-1), "reuse_kv_layer_idx is a knob"),
        (attention(attn_temperature_tuning={"attn_scale": 0.1}), "attn_scale is a knob"),
        (attention(softmax_scale=0.0), "softmax_scale; expected above 0, or null"),
        (attention(sliding_window_size=-2), "sliding_window_size"),
        (attention(qk_ln=True, qk_gn=True), "qk_ln or qk_gn"),
        (attention(rope=True), "alibi or rope"),
        (attention(alibi=False, rope=True, rope_impl="own"), "rope_impl is a knob"),
        (attention(alibi=False, rope=True, rope_dail_config={"type": "xpos"}), "type is a knob"),
        (
            attention(alibi=False, rope=True, rope_impl="hf", rope_hf_config={"type": "yarn", "factor": 2.0}),
            "'yarn'",
        ),
    ],
)
def test_configurations_that_are_refused(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        mpt.Config.from_hf(hf_config(MPT_7B | changes))


def test_keys_that_nobody_reads_are_left_over():
    config = hf_config(MPT_7B | attention(sink=4) | {"depth_scale": 1, "ffn_config": {"moe_top_k": 2}})
    mpt.Config.from_hf(config)
    assert config.unread() == ["attn_config.sink", "depth_scale", "ffn_config.moe_top_k"]


@pytest.mark.parametrize(
    ("changes", "knob"),
    [
        ({"kv_heads": 1}, "kv_heads"),
        ({"head_dim": 10}, "head_dim"),
        ({"mlp": 48}, "mlp"),
        ({"position": Alibi(4.0)}, "position"),
        ({"position": Learned(16)}, "position"),
        ({"position": Position()}, "position"),
        ({"position": Rotary()}, "position"),
        ({"norm": LayerNorm()}, "norm"),
        ({"norm": RmsNorm()}, "norm"),
        ({"ffn": Glu()}, "ffn"),
        ({"ffn": Mlp(Activation.RELU)}, "ffn"),
        ({"ffn": Mlp(bias=True)}, "ffn"),
        ({"bias": True}, "bias"),
        ({"qk_norm": QkNorm()}, "qk_norm"),
        ({"attention_softcap": 2.0}, "attention_softcap"),
        ({"windows": (0, 4)}, "windows"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"logit_softcap": 2.0}, "logit_softcap"),
    ],
)
def test_knobs_that_transformers_lacks(changes, knob):
    with pytest.raises(InputError, match=f"^{knob} is a knob that Transformers' MPT lacks"):
        replace(SMALL, **changes).to_hf(16)


class OwnAttention(Attention):
    pass


class OwnMlp(Mlp):
    pass


class OwnNorm(LayerNorm):
    pass


@pytest.mark.parametrize(
    ("changes", "knob"),
    [
        ({"attention": OwnAttention()}, "attention"),
        ({"ffn": OwnMlp()}, "ffn"),
        ({"ffn": Moe(), "experts": 4}, "ffn"),
        ({"norm": OwnNorm(bias=False)}, "norm"),
        ({"qk_norm": QkNorm(OwnNorm())}, "qk_norm.norm"),
    ],
)
def test_other_layers_have_no_names(changes, knob):
    with pytest.raises(InputError, match=f"^{knob} of this kind has no place in a checkpoint"):
        replace(SMALL, **changes).names()


@st.composite
def expressible(draw):
    """What Transformers' MPT can do."""
    heads, head_dim = draw(st.sampled_from([1, 2, 3, 5, 6, 12])), draw(st.sampled_from([4, 8]))
    return mpt.Config(
        layers=draw(st.integers(1, 3)),
        embed=heads * head_dim,
        heads=heads,
        mlp=4 * heads * head_dim,
        vocab=draw(st.sampled_from([17, 40])),
        norm=LayerNorm(draw(st.sampled_from([1e-6, 1e-5, 1e-2])), False, draw(st.booleans())),
        clip_qkv=draw(st.sampled_from([0.0, 0.7])),
        softmax_scale=draw(st.sampled_from([0.0, 0.3])),
        tied=draw(st.booleans()),
        embedding_fraction=draw(st.sampled_from([1.0, 0.1])),
    )


@settings(max_examples=20)
@given(config=expressible(), seed=st.integers(0, 2**16))
def test_out_and_in_again(config, seed):
    assert_round_trip(config, seed)


def test_dropout_is_written_and_not_taken_over():
    dropped = replace(SMALL, residual_dropout=0.1, embed_dropout=0.2)
    values = dropped.to_hf(16)
    assert (values["resid_pdrop"], values["emb_pdrop"]) == (0.1, 0.2)
    assert read_back(SMALL, values) == SMALL


@pytest.mark.peer
@settings(max_examples=5)
@given(config=expressible(), data=st.data())
def test_logits_are_those_of_transformers(config, data):
    from tests.models import hf_pair

    with tempfile.TemporaryDirectory() as folder:
        hf_pair.assert_logits(config.to_hf(16), data.draw(hf_pair.batches()), Path(folder))


@pytest.mark.peer
@settings(max_examples=2)
@given(config=expressible(), seed=st.integers(0, 2**16))
def test_gradients_are_those_of_transformers(config, seed):
    from tests.models import hf_pair

    with tempfile.TemporaryDirectory() as folder:
        hf_pair.assert_gradients(replace(config, embedding_fraction=1.0).to_hf(16), seed, Path(folder))


@pytest.mark.peer
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_is_exported(tied, tmp_path):
    from tests.models import hf_pair

    hf_pair.assert_export_loads(replace(SMALL, tied=tied), 16, 3, tmp_path)


@pytest.mark.peer
def test_transformers_ignores_knobs_that_its_config_has(tmp_path):
    # Why `to_hf` refuses them: the file would say one thing, and the model do another.
    from tests.models import hf_pair, peer

    plain = SMALL.to_hf(16)
    tokens, mask = peer.tokens_and_mask(np.random.default_rng(0), 17, (9, 9), "right")
    expected = None
    for changes in (
        {},
        {"logit_scale": 0.1},
        {"expansion_ratio": 2},
        {"no_bias": False},
        {"norm_type": "rmsnorm"},
        {"learned_pos_emb": True},
        {"attn_config": plain["attn_config"] | {"alibi": False}},
        {"attn_config": plain["attn_config"] | {"alibi_bias_max": 4}},
        {"attn_config": plain["attn_config"] | {"qk_ln": True}},
        {"attn_config": plain["attn_config"] | {"attn_type": "multiquery_attention"}},
    ):
        config = hf_pair.peer.transformers.AutoConfig.for_model(**json.loads(json.dumps(plain | changes)))
        logits = peer.peer_logits(peer.random_model(config, 3), tokens, mask)
        expected = logits if expected is None else expected
        np.testing.assert_array_equal(logits, expected)

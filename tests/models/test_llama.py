"""Llama: sizes, its `config.json`, its table of names, and the model beside Transformers' own."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import Attention
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import Llama3Scaling, Rotary
from mosaicjax.models import llama
from mosaicjax.models.names import foreign_tensors
from tests.models.llama_like import assert_round_trip, hf_config, read_back, rows, shared

SMALL = llama.Config(layers=2, embed=12, heads=3, kv_heads=1, head_dim=6, mlp=20, vocab=17)

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
    "hidden_act": "silu",
    "hidden_size": 4_096,
    "initializer_range": 0.02,
    "intermediate_size": 14_336,
    "max_position_embeddings": 131_072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8_192,
        "rope_type": "llama3",
    },
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
    "vocab_size": 128_256,
}
"""As published, in the spelling of its day."""

LLAMA_2_7B = llama.Config(kv_heads=32, mlp=11_008, vocab=32_000, position=Rotary(), norm=RmsNorm(eps=1e-5))


@st.composite
def configs(draw):
    biases = {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    return llama.Config(**draw(shared(embed_by_heads=True)), **biases)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (llama.Config(), 8_030_261_248),
        (llama.Config(layers=80, embed=8_192, heads=64, mlp=28_672), 70_553_706_496),
    ],
)
def test_published_sizes(config, count):
    # A layer: two matrices embed x heads, two embed x kv_heads, three of the MLP, two norms.
    wide, queries, keys = config.embed, config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = 2 * wide * queries + 2 * wide * keys + 3 * wide * config.mlp + 2 * wide
    assert config.layers * layer + 2 * config.vocab * wide + wide == count
    assert config.build().spec().count() == count


def test_a_published_configuration_in_the_old_spelling():
    assert read_back(SMALL, LLAMA_3_1_8B) == llama.Config(
        position=Rotary(theta=500_000.0, scaling=Llama3Scaling())
    )


def test_missing_keys_mean_what_transformers_takes():
    values = {
        "hidden_size": 4_096,
        "intermediate_size": 11_008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32_000,
    }
    assert read_back(SMALL, values) == replace(LLAMA_2_7B, norm=RmsNorm(eps=1e-6))


def test_names_and_shapes():
    config = replace(SMALL, layers=1, attention_bias=True, mlp_bias=True)
    layer = "model.layers.0"
    assert {foreign.name: foreign.shape for foreign in foreign_tensors(config.build(), config.names())} == {
        "model.embed_tokens.weight": (17, 12),
        "model.norm.weight": (12,),
        "lm_head.weight": (17, 12),
        f"{layer}.input_layernorm.weight": (12,),
        f"{layer}.self_attn.q_proj.weight": (18, 12),
        f"{layer}.self_attn.k_proj.weight": (6, 12),
        f"{layer}.self_attn.v_proj.weight": (6, 12),
        f"{layer}.self_attn.o_proj.weight": (12, 18),
        f"{layer}.self_attn.q_proj.bias": (18,),
        f"{layer}.self_attn.k_proj.bias": (6,),
        f"{layer}.self_attn.v_proj.bias": (6,),
        f"{layer}.self_attn.o_proj.bias": (12,),
        f"{layer}.post_attention_layernorm.weight": (12,),
        f"{layer}.mlp.gate_proj.weight": (20, 12),
        f"{layer}.mlp.up_proj.weight": (20, 12),
        f"{layer}.mlp.down_proj.weight": (12, 20),
        f"{layer}.mlp.gate_proj.bias": (20,),
        f"{layer}.mlp.up_proj.bias": (20,),
        f"{layer}.mlp.down_proj.bias": (12,),
    }


def test_what_holds_no_weights_is_ignored():
    untied, tied = SMALL.names(), replace(SMALL, tied=True).names()
    for names in (untied, tied):
        assert names.ignores("model.layers.7.self_attn.rotary_emb.inv_freq")
        assert names.ignores("model.rotary_emb.inv_freq")
        assert not names.ignores("model.embed_tokens.weight")
    assert tied.ignores("lm_head.weight") and not untied.ignores("lm_head.weight")


@given(config=configs(), seed=st.integers(0, 2**16))
def test_out_and_in_again(config, seed):
    assert_round_trip(config, seed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "mish"}, "config.json: hidden_act names an activation that is not known here"),
        ({"hidden_size": None}, "config.json lacks 'hidden_size'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is a knob that llama lacks"),
        ({"head_dim": None, "num_attention_heads": 5_000}, "dims of a head"),
    ],
)
def test_configurations_that_are_refused(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        llama.Config.from_hf(hf_config(LLAMA_3_1_8B | changes))


def test_keys_that_no_llama_has_are_left_over():
    config = hf_config(LLAMA_3_1_8B | {"attention_sinks": 4, "clip_qkv": 8.0})
    llama.Config.from_hf(config)
    assert config.unread() == ["attention_sinks", "clip_qkv"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embed": 16}, "heads that divide embed"),
        ({"attention": Attention(softcap=5.0)}, "attention is a knob that Transformers' llama lacks"),
        ({"position": Rotary(pairs="adjacent")}, "Rotary.pairs"),
        ({"position": Rotary(fraction=1 / 3)}, "position.fraction is a knob that Transformers' llama lacks"),
    ],
)
def test_knobs_that_transformers_lacks(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        replace(SMALL, **changes).to_hf(64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_heads": 2}, "kv_heads must divide heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 5}, "rotary dims of a head"),
        ({"layers": 0}, "layers"),
        ({"norm": RmsNorm(eps=-1.0)}, "norm eps"),
    ],
)
def test_sizes_that_cannot_be(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        replace(SMALL, **changes).build().check(8)


@pytest.mark.peer
@settings(max_examples=4)
@given(data=st.data(), config=configs(), seed=st.integers(0, 2**16))
def test_logits_are_those_of_transformers(data, config, seed):
    from tests.models import llama_like_peer

    with tempfile.TemporaryDirectory() as folder:
        llama_like_peer.assert_logits(config, data.draw(rows(config)), seed, Path(folder))


@pytest.mark.peer
@settings(max_examples=3)
@given(config=configs(), seed=st.integers(0, 2**16))
def test_gradients_are_those_of_transformers(config, seed):
    from tests.models import llama_like_peer

    with tempfile.TemporaryDirectory() as folder:
        llama_like_peer.assert_gradients(config, seed, Path(folder))


@pytest.mark.peer
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_is_exported(tied, tmp_path):
    from tests.models import llama_like_peer

    config = replace(SMALL, tied=tied, attention_bias=tied, mlp_bias=not tied)
    llama_like_peer.assert_export_loads(config, 3, tmp_path)

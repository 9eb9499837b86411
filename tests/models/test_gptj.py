"""GPT-J: sizes, its `config.json`, its table of names, and the model beside Transformers' own."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import Attention
from mosaicjax.layers.mlp import Activation
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import LinearScaling, Rotary
from mosaicjax.models import gptj
from mosaicjax.models.names import foreign_tensors
from tests.models.llama_like import assert_round_trip, hf_config, read_back

SMALL = gptj.Config(
    layers=2, embed=24, heads=3, mlp=40, vocab=17, position=Rotary(fraction=0.5, pairs="adjacent")
)

GPT_J_6B = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50_256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50_256,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4_096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2_048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "transformers_version": "4.18.0.dev0",
    "use_cache": True,
    "vocab_size": 50_400,
}
"""As published."""


@st.composite
def published(draw):
    """Values of a `config.json`: heads that are no powers of two, a part of each head or all rotated."""
    heads, head_dim = draw(st.sampled_from([1, 2, 3, 5, 6])), draw(st.sampled_from([4, 8, 10]))
    return {
        "model_type": "gptj",
        "vocab_size": draw(st.sampled_from([17, 40])),
        "n_positions": 64,
        "n_embd": heads * head_dim,
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "rotary_dim": draw(st.sampled_from([n for n in (2, 4, 8, 10) if n <= head_dim])),
        "n_inner": draw(st.sampled_from([None, 12, 20])),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu", "silu"])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def test_published_sizes():
    config = gptj.Config()
    wide, hidden = config.embed, config.mlp
    # A layer: four matrices of attention, two of the MLP with their biases, one norm; the head has a bias.
    layer = 4 * wide * wide + 2 * wide * hidden + hidden + wide + 2 * wide
    assert config.layers * layer + 2 * config.vocab * wide + config.vocab + 2 * wide == 6_050_882_784
    assert config.build().spec().count() == 6_050_882_784


def test_a_published_configuration():
    assert read_back(SMALL, GPT_J_6B) == gptj.Config()


def test_names_and_shapes():
    config = replace(SMALL, layers=1)
    layer = "transformer.h.0"
    assert {foreign.name: foreign.shape for foreign in foreign_tensors(config.build(), config.names())} == {
        "transformer.wte.weight": (17, 24),
        "transformer.ln_f.weight": (24,),
        "transformer.ln_f.bias": (24,),
        "lm_head.weight": (17, 24),
        "lm_head.bias": (17,),
        f"{layer}.ln_1.weight": (24,),
        f"{layer}.ln_1.bias": (24,),
        f"{layer}.attn.q_proj.weight": (24, 24),
        f"{layer}.attn.k_proj.weight": (24, 24),
        f"{layer}.attn.v_proj.weight": (24, 24),
        f"{layer}.attn.out_proj.weight": (24, 24),
        f"{layer}.mlp.fc_in.weight": (40, 24),
        f"{layer}.mlp.fc_in.bias": (40,),
        f"{layer}.mlp.fc_out.weight": (24, 40),
        f"{layer}.mlp.fc_out.bias": (24,),
    }


def test_what_holds_no_weights_is_ignored():
    untied, tied = SMALL.names(), replace(SMALL, tied=True).names()
    for buffer in ("bias", "masked_bias", "embed_positions"):
        assert untied.ignores(f"transformer.h.3.attn.{buffer}")
    for weight in ("transformer.h.3.mlp.fc_in.bias", "lm_head.bias"):
        assert not untied.ignores(weight) and not tied.ignores(weight)
    assert tied.ignores("lm_head.weight") and not untied.ignores("lm_head.weight")


@settings(max_examples=20)
@given(values=published(), seed=st.integers(0, 2**16))
def test_out_and_in_again(values, seed):
    assert_round_trip(gptj.Config.from_hf(hf_config(values)), seed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_function": "mish"}, "activation_function names an activation that is not known here"),
        ({"n_embd": None}, "config.json lacks 'n_embd'"),
        ({"n_head": 5}, "heads must divide embed"),
        ({"rotary": False}, "rotary is a knob that this family lacks"),
        ({"scale_attn_weights": False}, "scale_attn_weights is a knob"),
    ],
)
def test_configurations_that_are_refused(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        gptj.Config.from_hf(hf_config(GPT_J_6B | changes))


@pytest.mark.parametrize(
    ("changes", "knob"),
    [
        ({"attention": Attention(window=3)}, "attention"),
        ({"norm": LayerNorm(bias=False)}, "norm"),
        ({"norm": LayerNorm(low_precision=True)}, "norm"),
        ({"position": Rotary(fraction=0.5)}, "position"),
        ({"position": Rotary(theta=100.0, pairs="adjacent")}, "position"),
        ({"position": Rotary(scaling=LinearScaling(2.0), pairs="adjacent")}, "position"),
        ({"heads": 5}, "heads"),
    ],
)
def test_knobs_that_transformers_lacks(changes, knob):
    with pytest.raises(InputError, match=rf"^{knob} (is a knob that Transformers' GPT-J lacks|must divide)"):
        replace(SMALL, **changes).to_hf(64)


def test_an_odd_number_of_rotated_dims_is_refused():
    with pytest.raises(InputError, match="rotary dims of a head"):
        gptj.Config.from_hf(hf_config(GPT_J_6B | {"rotary_dim": 63})).build().check(8)


def test_dropout_is_written_and_not_taken_over():
    dropped = replace(SMALL, residual_dropout=0.1, embed_dropout=0.2, activation=Activation.RELU)
    values = dropped.to_hf(64)
    assert (values["resid_pdrop"], values["embd_pdrop"], values["attn_pdrop"]) == (0.1, 0.2, 0.0)
    assert read_back(SMALL, values) == replace(dropped, residual_dropout=0.0, embed_dropout=0.0)


@pytest.mark.peer
@settings(max_examples=5)
@given(values=published(), data=st.data())
def test_logits_are_those_of_transformers(values, data):
    from tests.models import hf_pair

    with tempfile.TemporaryDirectory() as folder:
        hf_pair.assert_logits(values, data.draw(hf_pair.batches(starts=(0, 40))), Path(folder))


@pytest.mark.peer
@settings(max_examples=2)
@given(values=published(), seed=st.integers(0, 2**16))
def test_gradients_are_those_of_transformers(values, seed):
    from tests.models import hf_pair

    with tempfile.TemporaryDirectory() as folder:
        hf_pair.assert_gradients(values, seed, Path(folder))


@pytest.mark.peer
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_is_exported(tied, tmp_path):
    from tests.models import hf_pair

    hf_pair.assert_export_loads(replace(SMALL, tied=tied), 64, 3, tmp_path)

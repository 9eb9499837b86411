"""GPT-2: sizes, its `config.json`, its table of names, and the model beside Transformers' own."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import Attention
from mosaicjax.layers.mlp import Activation
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import Learned
from mosaicjax.models import gpt2
from mosaicjax.models.names import foreign_tensors
from tests.models.llama_like import assert_round_trip, exported, hf_config, read_back

SMALL = gpt2.Config(layers=2, embed=24, heads=3, mlp=40, vocab=17, position=Learned(16))

GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50_256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50_256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1_024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1_024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50_257,
}
"""As published."""


@st.composite
def published(draw):
    """Values of a `config.json`: heads that are no powers of two, scores scaled or not, tied or not."""
    heads, head_dim = draw(st.sampled_from([1, 2, 3, 5, 6])), draw(st.sampled_from([4, 7, 8]))
    return {
        "model_type": "gpt2",
        "vocab_size": draw(st.sampled_from([17, 40])),
        "n_positions": draw(st.sampled_from([16, 40])),
        "n_embd": heads * head_dim,
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "n_inner": draw(st.sampled_from([None, 12, 20])),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "gelu_pytorch_tanh", "relu"])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "scale_attn_weights": draw(st.booleans()),
        "reorder_and_upcast_attn": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": None,
        "eos_token_id": None,
    }


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (gpt2.Config(), 124_439_808),
        (gpt2.Config(layers=24, embed=1_024, heads=16, mlp=4_096), 354_823_168),
        (gpt2.Config(layers=48, embed=1_600, heads=25, mlp=6_400), 1_557_611_200),
    ],
    ids=["124M", "355M", "1.5B"],
)
def test_published_sizes(config, count):
    wide, hidden = config.embed, config.mlp
    # A layer: four matrices of attention, two of the MLP, all with biases, and two norms.
    layer = 4 * wide * wide + 4 * wide + 2 * wide * hidden + hidden + wide + 4 * wide
    assert config.layers * layer + (config.vocab + 1_024) * wide + 2 * wide == count
    assert config.build().spec().count() == count


def test_a_published_configuration():
    assert read_back(SMALL, GPT2) == gpt2.Config()


def test_names_and_shapes():
    config = replace(SMALL, layers=1, tied=False)
    layer = "transformer.h.0"
    assert {foreign.name: foreign.shape for foreign in foreign_tensors(config.build(), config.names())} == {
        "transformer.wte.weight": (17, 24),
        "transformer.wpe.weight": (16, 24),
        "transformer.ln_f.weight": (24,),
        "transformer.ln_f.bias": (24,),
        "lm_head.weight": (17, 24),
        f"{layer}.ln_1.weight": (24,),
        f"{layer}.ln_1.bias": (24,),
        f"{layer}.ln_2.weight": (24,),
        f"{layer}.ln_2.bias": (24,),
        f"{layer}.attn.c_attn.weight": (24, 72),
        f"{layer}.attn.c_attn.bias": (72,),
        f"{layer}.attn.c_proj.weight": (24, 24),
        f"{layer}.attn.c_proj.bias": (24,),
        f"{layer}.mlp.c_fc.weight": (24, 40),
        f"{layer}.mlp.c_fc.bias": (40,),
        f"{layer}.mlp.c_proj.weight": (40, 24),
        f"{layer}.mlp.c_proj.bias": (24,),
    }


def test_queries_keys_and_values_stand_side_by_side():
    config = replace(SMALL, layers=1)
    spec = config.build().spec()
    weights = spec.map(
        lambda param: np.arange(np.prod(param.shape(spec.dims))).reshape(param.shape(spec.dims))
    )
    layer = weights["stacks"][0][0]["layer"]["attention"]
    tensors = exported(config, weights)
    parts = [layer[name][0].reshape(24, 24) for name in ("query", "key", "value")]
    np.testing.assert_array_equal(
        tensors["transformer.h.0.attn.c_attn.weight"], np.concatenate(parts, axis=1)
    )
    biases = [layer[f"{name}_bias"][0].reshape(24) for name in ("query", "key", "value")]
    np.testing.assert_array_equal(tensors["transformer.h.0.attn.c_attn.bias"], np.concatenate(biases))


def test_the_hub_leaves_the_prefix_out_and_keeps_buffers():
    untied, tied = replace(SMALL, tied=False).names(), SMALL.names()
    assert tied.base == "transformer."
    for buffer in ("h.3.attn.bias", "transformer.h.3.attn.bias", "h.3.attn.masked_bias"):
        assert tied.ignores(buffer)
    for weight in ("h.3.attn.c_attn.bias", "transformer.h.3.attn.c_proj.bias"):
        assert not tied.ignores(weight)
    assert tied.ignores("lm_head.weight") and not untied.ignores("lm_head.weight")


@settings(max_examples=20)
@given(values=published(), seed=st.integers(0, 2**16))
def test_out_and_in_again(values, seed):
    assert_round_trip(gpt2.Config.from_hf(hf_config(values)), seed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_function": "tanh"}, "activation_function names an activation that is not known here"),
        ({"n_layer": None}, "config.json lacks 'n_layer'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is a knob"),
        ({"add_cross_attention": True}, "add_cross_attention is a knob"),
    ],
)
def test_configurations_that_are_refused(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        gpt2.Config.from_hf(hf_config(GPT2 | changes))


@pytest.mark.parametrize(
    ("changes", "knob"),
    [
        ({"attention": Attention(scale=3.0)}, "attention"),
        ({"norm": LayerNorm(bias=False)}, "norm"),
        ({"norm": LayerNorm(low_precision=True)}, "norm"),
    ],
)
def test_knobs_that_transformers_lacks(changes, knob):
    with pytest.raises(InputError, match=rf"^{knob} is a knob that Transformers' GPT-2 lacks"):
        replace(SMALL, **changes).to_hf(16)


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="heads must divide embed"):
        replace(SMALL, heads=5).build()


def test_dropout_is_written_and_not_taken_over():
    dropped = replace(SMALL, residual_dropout=0.1, embed_dropout=0.2, activation=Activation.RELU)
    values = dropped.to_hf(16)
    assert (values["resid_pdrop"], values["embd_pdrop"], values["attn_pdrop"]) == (0.1, 0.2, 0.0)
    assert read_back(SMALL, values) == replace(dropped, residual_dropout=0.0, embed_dropout=0.0)


@pytest.mark.peer
@settings(max_examples=4)
@given(values=published(), data=st.data())
def test_logits_are_those_of_transformers(values, data):
    from tests.models import hf_pair

    with tempfile.TemporaryDirectory() as folder:
        hf_pair.assert_logits(values, data.draw(hf_pair.batches(starts=(0, 4))), Path(folder))


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

    hf_pair.assert_export_loads(replace(SMALL, tied=tied, scaled=tied), 16, 3, tmp_path)

"""GPT-NeoX: sizes, its `config.json` old and new, its names, and the model beside Transformers' own."""

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
from mosaicjax.layers.position import DynamicScaling, LinearScaling, Llama3Scaling, RopeScaling, Rotary
from mosaicjax.models import neox
from mosaicjax.models.names import foreign_tensors
from tests.models.llama_like import LENGTH, assert_round_trip, exported, hf_config, read_back

SMALL = neox.Config(layers=2, embed=24, heads=3, mlp=40, vocab=17, position=Rotary(fraction=0.5))

PYTHIA_160M = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3_072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2_048,
    "model_type": "gpt_neox",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "rotary_emb_base": 10_000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50_304,
}
"""As published, in the spelling of its day."""


@st.composite
def ropes(draw):
    """The keys of rotary positions, in the spelling of Transformers 5 or in that before."""
    fraction, theta = draw(st.sampled_from([0.25, 0.5, 1.0])), draw(st.sampled_from([50.0, 10_000.0]))
    kind = draw(
        st.sampled_from(
            [
                {},
                {"rope_type": "default"},
                {"rope_type": "linear", "factor": 4.0},
                {"rope_type": "dynamic", "factor": 3.0},
                {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 40,
                },
            ]
        )
    )
    spelling = draw(st.sampled_from(["new", "old", "type"]))
    if spelling == "new":
        return {"rope_parameters": {**kind, "rope_theta": theta, "partial_rotary_factor": fraction}}
    beside = {"rotary_pct": fraction, "rotary_emb_base": theta}
    if spelling == "type" and kind:
        kind = {"type": kind["rope_type"], **{key: kind[key] for key in kind if key != "rope_type"}}
    return {**beside, "rope_scaling": kind or None}


@st.composite
def published(draw):
    """Values of a `config.json`: heads that are no powers of two, both residuals, every kind of rope."""
    heads, head_dim = draw(st.sampled_from([1, 2, 3, 5, 6])), draw(st.sampled_from([16, 24]))
    return {
        "model_type": "gpt_neox",
        "vocab_size": draw(st.sampled_from([17, 40])),
        "hidden_size": heads * head_dim,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.sampled_from([12, 20])),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "gelu_fast", "relu", "silu"])),
        "max_position_embeddings": draw(st.sampled_from([8, 16, 64])),
        "layer_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
        "use_parallel_residual": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "bos_token_id": None,
        "eos_token_id": None,
        **draw(ropes()),
    }


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (neox.Config(), 162_322_944),
        (neox.Config(layers=32, embed=2_560, heads=32, mlp=10_240), 2_775_208_960),
        (neox.Config(layers=32, embed=4_096, heads=32, mlp=16_384, vocab=50_432), 6_857_302_016),
        (neox.Config(layers=36, embed=5_120, heads=40, mlp=20_480, vocab=50_688), 11_846_072_320),
        (neox.Config(layers=44, embed=6_144, heads=64, mlp=24_576, vocab=50_432), 20_554_567_680),
    ],
    ids=["160M", "2.8B", "6.9B", "12B", "20B"],
)
def test_published_sizes(config, count):
    wide, hidden = config.embed, config.mlp
    # A layer: four matrices of attention, two of the MLP, all with biases, and two norms.
    layer = 4 * wide * wide + 4 * wide + 2 * wide * hidden + hidden + wide + 4 * wide
    assert config.layers * layer + 2 * config.vocab * wide + 2 * wide == count
    assert config.build().spec().count() == count


def test_a_published_configuration():
    assert read_back(SMALL, PYTHIA_160M) == neox.Config()


@pytest.mark.parametrize(
    ("changes", "position"),
    [
        ({"rotary_pct": None, "rotary_emb_base": None}, Rotary(fraction=0.25)),
        ({"rope_scaling": {}}, Rotary(fraction=0.25)),
        # Transformers' GPT-NeoX knows neither of these names beside the mapping.
        ({"rope_parameters": {"rope_theta": 50.0}}, Rotary(theta=50.0, fraction=0.25)),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}, "rotary_pct": 0.125}, Rotary(fraction=0.5)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            Rotary(fraction=0.25, scaling=LinearScaling(2.0)),
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            Rotary(fraction=0.25, scaling=DynamicScaling(2.0, 2_048)),
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                }
            },
            Rotary(fraction=0.25, scaling=Llama3Scaling(original=2_048)),
        ),
        # 0.26 of 64 dims is 16.64, of which Transformers takes the whole number.
        ({"rotary_pct": 0.26}, Rotary(fraction=0.25)),
    ],
)
def test_spellings_of_rotary_positions(changes, position):
    assert read_back(SMALL, PYTHIA_160M | changes).position == position


def test_names_and_shapes():
    config = replace(SMALL, layers=1)
    layer = "gpt_neox.layers.0"
    assert {foreign.name: foreign.shape for foreign in foreign_tensors(config.build(), config.names())} == {
        "gpt_neox.embed_in.weight": (17, 24),
        "gpt_neox.final_layer_norm.weight": (24,),
        "gpt_neox.final_layer_norm.bias": (24,),
        "embed_out.weight": (17, 24),
        f"{layer}.input_layernorm.weight": (24,),
        f"{layer}.input_layernorm.bias": (24,),
        f"{layer}.post_attention_layernorm.weight": (24,),
        f"{layer}.post_attention_layernorm.bias": (24,),
        f"{layer}.attention.query_key_value.weight": (72, 24),
        f"{layer}.attention.query_key_value.bias": (72,),
        f"{layer}.attention.dense.weight": (24, 24),
        f"{layer}.attention.dense.bias": (24,),
        f"{layer}.mlp.dense_h_to_4h.weight": (40, 24),
        f"{layer}.mlp.dense_h_to_4h.bias": (40,),
        f"{layer}.mlp.dense_4h_to_h.weight": (24, 40),
        f"{layer}.mlp.dense_4h_to_h.bias": (24,),
    }


def test_a_head_has_its_query_key_and_value_together():
    config = replace(SMALL, layers=1)
    spec = config.build().spec()
    weights = spec.map(
        lambda param: np.arange(np.prod(param.shape(spec.dims))).reshape(param.shape(spec.dims))
    )
    layer = weights["stacks"][0][0]["layer"]["attention"]
    fused = exported(config, weights)["gpt_neox.layers.0.attention.query_key_value.weight"]
    for head in range(3):
        for place, name in enumerate(("query", "key", "value")):
            for dim in range(8):
                row = fused[head * 24 + place * 8 + dim]
                np.testing.assert_array_equal(row, layer[name][0, :, head, dim])


def test_what_holds_no_weights_is_ignored():
    untied, tied = SMALL.names(), replace(SMALL, tied=True).names()
    for buffer in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        assert untied.ignores(f"gpt_neox.layers.3.attention.{buffer}")
    for weight in ("dense.bias", "query_key_value.bias"):
        assert not untied.ignores(f"gpt_neox.layers.3.attention.{weight}")
    assert tied.ignores("embed_out.weight") and not untied.ignores("embed_out.weight")


@settings(max_examples=20)
@given(values=published(), seed=st.integers(0, 2**16))
def test_out_and_in_again(values, seed):
    config = neox.Config.from_hf(hf_config(values))
    if isinstance(config.position.scaling, DynamicScaling):
        assert config.to_hf(LENGTH)["max_position_embeddings"] == config.position.scaling.original
    assert_round_trip(config, seed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "mish"}, "hidden_act names an activation that is not known here"),
        ({"hidden_size": None}, "config.json lacks 'hidden_size'"),
        ({"num_attention_heads": 5}, "heads must divide embed"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 3}}, "keys that its rope_type does not"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "differs from layer to layer"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}},
            "original_max_position_embeddings is a knob",
        ),
    ],
)
def test_configurations_that_are_refused(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        neox.Config.from_hf(hf_config(PYTHIA_160M | changes))


def test_keys_that_nobody_reads_are_left_over():
    config = hf_config(PYTHIA_160M | {"rope_theta": 5.0, "sliding_window": 4})
    neox.Config.from_hf(config)
    assert config.unread() == ["rope_theta", "sliding_window"]


class OwnScaling(RopeScaling):
    pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": Attention(clip_qkv=3.0)}, "attention is a knob that Transformers' GPT-NeoX lacks"),
        ({"norm": LayerNorm(bias=False)}, "norm is a knob that Transformers' GPT-NeoX lacks"),
        ({"norm": LayerNorm(low_precision=True)}, "norm is a knob that Transformers' GPT-NeoX lacks"),
        ({"position": Rotary(pairs="adjacent")}, "Rotary.pairs"),
        ({"position": Rotary(scaling=OwnScaling())}, "Rotary.scaling has no name in Transformers"),
        ({"heads": 5}, "heads must divide embed"),
    ],
)
def test_knobs_that_transformers_lacks(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        replace(SMALL, **changes).to_hf(LENGTH)


@given(head_dim=st.integers(2, 256), share=st.floats(0.01, 1.0))
def test_transformers_rotates_as_many_dims(head_dim, share):
    position = Rotary(fraction=share)
    values = replace(SMALL, embed=3 * head_dim, position=position).to_hf(LENGTH)
    assert int(head_dim * values["rotary_pct"]) == position.turned(head_dim)
    assert values["rope_parameters"]["partial_rotary_factor"] == values["rotary_pct"]


def test_dropout_is_written_and_not_taken_over():
    dropped = replace(SMALL, residual_dropout=0.1, activation=Activation.RELU)
    values = dropped.to_hf(LENGTH)
    assert (values["hidden_dropout"], values["attention_dropout"]) == (0.1, 0.0)
    assert read_back(SMALL, values) == replace(dropped, residual_dropout=0.0)


@pytest.mark.peer
@settings(max_examples=6)
@given(values=published(), data=st.data())
def test_logits_are_those_of_transformers(values, data):
    from tests.models import hf_pair

    # Transformers scales all rows of a batch by the longest: they agree where all are equally long.
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    dynamic = "dynamic" in (rope.get("rope_type"), rope.get("type"))
    batches = data.draw(hf_pair.batches(starts=(0, 300, 5_000), equal=dynamic))
    with tempfile.TemporaryDirectory() as folder:
        hf_pair.assert_logits(values, batches, Path(folder))


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

    config = replace(SMALL, tied=tied, parallel=tied, attention_bias=tied)
    hf_pair.assert_export_loads(config, LENGTH, 3, tmp_path)

"""Qwen3: its norms of heads, its windows, its `config.json`, and the model beside Transformers' own."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.models import qwen3
from mosaicjax.models.names import foreign_tensors
from tests.models.llama_like import assert_round_trip, hf_config, read_back, rows, shared

SMALL = qwen3.Config(layers=3, embed=14, heads=3, kv_heads=1, head_dim=6, mlp=20, vocab=17, windows=(0, 4, 4))

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1_024,
    "initializer_range": 0.02,
    "intermediate_size": 3_072,
    "max_position_embeddings": 40_960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151_936,
}
"""As published, in the spelling of its day."""

WINDOWED = QWEN3_0_6B | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 512}


@st.composite
def configs(draw):
    fields = draw(shared())
    layers, window = draw(
        st.sampled_from(
            [
                (fields["layers"], (0,)),
                (fields["layers"], (3,)),
                (2, (0, 4)),
                (4, (5, 0)),
                (3, (0, 2, 2)),
                (4, (0, 0, 0, 6)),
                (3, (1, 0, 1)),
            ]
        )
    )
    return qwen3.Config(**fields | {"layers": layers}, windows=window, attention_bias=draw(st.booleans()))


def test_published_sizes():
    # With the table counted once; then Qwen3-8B, whose head is one of its own.
    assert qwen3.Config().build().spec().count() == 596_049_920
    larger = qwen3.Config(layers=36, embed=4_096, heads=32, mlp=12_288, tied=False)
    assert larger.build().spec().count() == 8_190_735_360


def test_a_published_configuration():
    assert read_back(SMALL, QWEN3_0_6B) == qwen3.Config()


def test_missing_keys_mean_what_transformers_takes():
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    values = {key: QWEN3_0_6B[key] for key in sizes} | {"num_attention_heads": 32}
    assert read_back(SMALL, values) == qwen3.Config(
        heads=32, kv_heads=32, head_dim=128, position=Rotary(theta=10_000.0), tied=False
    )


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"max_window_layers": 2}, (0, 0, 512, 512)),
        ({"max_window_layers": 0}, (512,)),
        ({"max_window_layers": 4}, (0,)),
        ({}, (0,)),
        ({"max_window_layers": 2, "use_sliding_window": False}, (0,)),
        ({"max_window_layers": 2, "sliding_window": None}, (0,)),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, (0, 512)),
        ({"layer_types": ["full_attention"] * 4, "max_window_layers": 0}, (0,)),
    ],
)
def test_which_layers_have_windows(changes, windows):
    assert read_back(SMALL, WINDOWED | changes).windows == windows


def test_windows_in_the_decoder():
    blocks = list(replace(SMALL, layers=6).build().blocks())
    assert [(block.attention.window, layers.first, layers.stride) for _, _, block, layers in blocks] == [
        (0, 0, 3),
        (4, 1, 3),
        (4, 2, 3),
    ]
    # Where layers do not repeat in turn, each run of equal ones is a stack.
    runs = replace(SMALL, layers=5, windows=(0, 0, 0, 7, 7)).build().stacks
    assert [(stack.block[0].attention.window, stack.repeat) for stack in runs] == [(0, 3), (7, 2)]


def test_windows_as_transformers_reads_them():
    values = replace(SMALL, layers=5, windows=(0, 0, 0, 7, 7)).to_hf(64)
    assert values["max_window_layers"] == 3 and values["use_sliding_window"] and values["sliding_window"] == 7
    assert values["layer_types"] == ["full_attention"] * 3 + ["sliding_attention"] * 2


def test_names_of_the_norms_of_heads():
    tensors = {each.name: each.shape for each in foreign_tensors(SMALL.build(), SMALL.names())}
    for layer in range(3):
        for name in ("q_norm", "k_norm"):
            assert tensors[f"model.layers.{layer}.self_attn.{name}.weight"] == (6,)


@settings(max_examples=20)
@given(config=configs(), seed=st.integers(0, 2**16))
def test_out_and_in_again(config, seed):
    assert_round_trip(config, seed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention"] * 3}, "config.json: layer_types; expected 4 times"),
        ({"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "config.json: layer_types"),
        (
            {"layer_types": ["sliding_attention"] * 4, "use_sliding_window": False},
            "layer_types names sliding_attention, but no window is in use",
        ),
        ({"sliding_window": -1}, "sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
    ],
)
def test_configurations_that_are_refused(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        qwen3.Config.from_hf(hf_config(WINDOWED | changes))


def test_windows_that_transformers_lacks():
    with pytest.raises(InputError, match=re.escape("one window; expected one size beside 0; got [2, 4]")):
        replace(SMALL, windows=(0, 2, 4)).to_hf(64)


@pytest.mark.parametrize("windows", [(), (0, 1)])
def test_windows_that_do_not_divide_the_layers(windows):
    with pytest.raises(
        InputError, match="windows are taken in turn; expected a number of them that divides 3"
    ):
        replace(SMALL, windows=windows).build()


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
def test_transformers_loads_what_is_exported(tmp_path):
    from tests.models import llama_like_peer

    llama_like_peer.assert_export_loads(replace(SMALL, norm=RmsNorm(eps=1e-3)), 3, tmp_path)

"""Mistral: its window, its `config.json`, and the model beside Transformers' own."""

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
from mosaicjax.models import mistral
from tests.models.llama_like import assert_round_trip, hf_config, read_back, rows, shared

SMALL = mistral.Config(layers=2, embed=14, heads=3, kv_heads=1, head_dim=6, mlp=20, vocab=17, window=4)

MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4_096,
    "initializer_range": 0.02,
    "intermediate_size": 14_336,
    "max_position_embeddings": 32_768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10_000.0,
    "sliding_window": 4_096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32_000,
}
"""As published, in the spelling of its day."""


@st.composite
def configs(draw):
    # Rows have at most 13 tokens: some windows are shorter, some longer.
    return mistral.Config(**draw(shared()), window=draw(st.sampled_from([0, 1, 3, 5, 40])))


def test_published_size():
    assert mistral.Config().build().spec().count() == 7_241_732_096


def test_a_published_configuration():
    assert read_back(SMALL, MISTRAL_7B_V01) == mistral.Config()


def test_missing_keys_mean_what_transformers_takes():
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    values = {key: MISTRAL_7B_V01[key] for key in sizes}
    assert read_back(SMALL, values) == mistral.Config(norm=RmsNorm(eps=1e-6))


def test_no_window():
    # Mistral-7B-v0.2: null is no window, where a missing key means one of 4,096.
    values = MISTRAL_7B_V01 | {"sliding_window": None, "rope_theta": 1e6}
    assert read_back(SMALL, values) == mistral.Config(window=0, position=Rotary(theta=1e6))
    assert mistral.Config(window=0).to_hf(32_768)["sliding_window"] is None


@settings(max_examples=20)
@given(config=configs(), seed=st.integers(0, 2**16))
def test_out_and_in_again(config, seed):
    assert_round_trip(config, seed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 0}, "config.json: sliding_window; expected 1 or more, or null; got 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ],
)
def test_configurations_that_are_refused(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        mistral.Config.from_hf(hf_config(MISTRAL_7B_V01 | changes))


def test_keys_that_no_mistral_has_are_left_over():
    config = hf_config(MISTRAL_7B_V01 | {"attention_sinks": 4, "layer_types": ["full_attention"] * 32})
    mistral.Config.from_hf(config)
    assert config.unread() == ["attention_sinks", "layer_types"]


def test_a_window_that_cannot_be():
    with pytest.raises(InputError, match="attention window"):
        replace(SMALL, window=-1).build().check(8)


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

    llama_like_peer.assert_export_loads(SMALL, 3, tmp_path)

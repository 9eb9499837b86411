"""MosaicGPT and replit-code-v1-3b: the form of MPT's configurations and names before it was called so."""

import math
import re

import pytest

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import (
    Learned,
)
from mosaicjax.models import mosaic_gpt
from mosaicjax.models.names import foreign_tensors
from tests.models.llama_like import hf_config, read_back

LOW = LayerNorm(bias=False, low_precision=True)

REPLIT = {
    "alibi": True,
    "alibi_bias_max": 8,
    "architectures": ["MosaicGPT"],
    "attn_clip_qkv": None,
    "attn_impl": "torch",
    "attn_pdrop": 0,
    "attn_qk_ln": False,
    "attn_uses_sequence_id": False,
    "auto_map": {"AutoConfig": "configuration_replit_lm.MosaicGPTConfig"},
    "d_model": 2_560,
    "emb_init_std": None,
    "emb_init_uniform_lim": None,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "fan_mode": "fan_in",
    "init_device": "cpu",
    "init_div_is_residual": True,
    "init_gain": 0,
    "init_nonlinearity": "relu",
    "init_std": 0.02,
    "logit_scale": None,
    "low_precision_layernorm": True,
    "max_seq_len": 2_048,
    "mlp_ratio": 4,
    "model_type": "mosaic_gpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "param_init_fn": "kaiming_normal_",
    "prefix_lm": False,
    "resid_pdrop": 0,
    "softmax_scale": None,
    "tokenizer_name": "replit/replit-code-v1-3b",
    "torch_dtype": "float32",
    "transformers_version": "4.27.4",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 32_768,
}
"""replit-code-v1-3b as first published, github.com/replit/ReplitLM, commit 2b940a9."""


@pytest.mark.parametrize("model_type", ["mosaic_gpt", "replit_lm"])
def test_replit_code_as_first_published(model_type):
    found = read_back(mosaic_gpt.Config(), REPLIT | {"model_type": model_type})
    assert found == mosaic_gpt.Config(layers=32, embed=2_560, heads=32, mlp=10_240, vocab=32_768, norm=LOW)
    # A layer is 12 embed², its two norms 2 embed; the table, and the last norm.
    assert found.build().spec().count() == 32 * (12 * 2_560**2 + 2 * 2_560) + 32_768 * 2_560 + 2_560


def test_the_older_form_with_its_other_knobs():
    values = REPLIT | {
        "alibi": False,
        "attn_clip_qkv": 6.0,
        "attn_qk_ln": True,
        "softmax_scale": 0.2,
        "low_precision_layernorm": False,
        "max_seq_len": 128,
        "logit_scale": "inv_sqrt_d_model",
        "no_bias": False,
        "mlp_ratio": 2,
        "embedding_fraction": 0.5,
    }
    found = read_back(mosaic_gpt.Config(), values)
    assert found == mosaic_gpt.Config(
        layers=32,
        embed=2_560,
        heads=32,
        mlp=5_120,
        vocab=32_768,
        position=Learned(128),
        norm=LayerNorm(),
        bias=True,
        qk_norm=QkNorm(LayerNorm(low_precision=True)),
        clip_qkv=6.0,
        softmax_scale=0.2,
        logit_scale=1 / math.sqrt(2_560),
        embedding_fraction=0.5,
    )


def test_names_of_the_older_form():
    config = mosaic_gpt.Config(layers=1, embed=24, heads=3, mlp=96, vocab=17, qk_norm=QkNorm())
    layer = "transformer.blocks.0"
    assert {foreign.name: foreign.shape for foreign in foreign_tensors(config.build(), config.names())} == {
        "transformer.wte.weight": (17, 24),
        "transformer.ln_f.weight": (24,),
        f"{layer}.ln_1.weight": (24,),
        f"{layer}.ln_2.weight": (24,),
        f"{layer}.attn.Wqkv.weight": (72, 24),
        f"{layer}.attn.out_proj.weight": (24, 24),
        f"{layer}.attn.q_ln.weight": (24,),
        f"{layer}.attn.k_ln.weight": (24,),
        f"{layer}.mlp.mlp_up.weight": (96, 24),
        f"{layer}.mlp.mlp_down.weight": (24, 96),
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_heads": 24}, "ALiBi's slopes"),
        ({"prefix_lm": True}, "prefix_lm is a knob"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is a knob"),
        ({"vocab_size": None}, "config.json lacks 'vocab_size'"),
    ],
)
def test_older_configurations_that_are_refused(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        mosaic_gpt.Config.from_hf(hf_config(REPLIT | changes))


def test_nothing_goes_out_in_the_older_form():
    with pytest.raises(InputError, match="fix: mpt.Config with the same knobs"):
        mosaic_gpt.Config().to_hf(2_048)

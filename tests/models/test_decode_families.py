"""Greedy decoding with a cache of keys and values equals recomputing, for every family."""

import pytest

from mosaicjax.layers.position import DynamicScaling, Learned, Llama3Scaling, Rotary
from mosaicjax.models import gpt2, gptj, llama, mistral, mixtral, mpt, neox, qwen3
from tests.models.test_decode import LENGTH, STEPS, VOCAB, check_against_recomputing

SMALL = {"layers": 2, "embed": 24, "heads": 3, "mlp": 40, "vocab": VOCAB}
KEY_HEADS = {"kv_heads": 1, "head_dim": 6}

# Head counts that are no powers of two, and each family's own knobs both ways.
FAMILIES_SMALL = [
    mpt.Config(**SMALL, clip_qkv=0.5),
    mpt.Config(**SMALL, kv_heads=1, windows=(3, 0)),
    gptj.Config(**SMALL, position=Rotary(fraction=0.5, pairs="adjacent")),
    gptj.Config(**SMALL, position=Rotary(fraction=1.0, pairs="adjacent"), tied=True),
    neox.Config(**SMALL, position=Rotary(fraction=0.5)),
    neox.Config(**SMALL, parallel=False, attention_bias=False, position=Rotary(scaling=Llama3Scaling())),
    neox.Config(**SMALL, tied=True, position=Rotary(scaling=DynamicScaling(factor=2.0, original=64))),
    gpt2.Config(**SMALL, position=Learned(LENGTH + STEPS)),
    gpt2.Config(**SMALL, position=Learned(LENGTH + STEPS), tied=False, scaled=False),
    llama.Config(**SMALL, **KEY_HEADS, attention_bias=True, mlp_bias=True),
    llama.Config(**SMALL, **KEY_HEADS, tied=True, position=Rotary(scaling=Llama3Scaling(original=30))),
    llama.Config(**SMALL, **KEY_HEADS, position=Rotary(scaling=DynamicScaling(factor=2.0, original=64))),
    mistral.Config(**SMALL, **KEY_HEADS, window=3),
    mixtral.Config(**SMALL, **KEY_HEADS, experts=5, window=4),
    qwen3.Config(**SMALL, **KEY_HEADS, windows=(0, 3)),
]


def name_of(config):
    return config.__class__.__module__.rpartition(".")[2]


def fast_once(configs):
    """The first of each family in the fast tier, all others in the slow one: each compiles three programs."""
    kinds = [type(config) for config in configs]
    return [
        pytest.param(config, id=name_of(config), marks=[pytest.mark.slow] if kinds[n] in kinds[:n] else [])
        for n, config in enumerate(configs)
    ]


@pytest.mark.parametrize("config", fast_once(FAMILIES_SMALL))
def test_cached_decoding_equals_recomputing(config):
    check_against_recomputing(config.build(), lengths=[1, 5, LENGTH])

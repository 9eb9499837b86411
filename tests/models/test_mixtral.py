"""Mixtral: its experts by name, its `config.json`, and the model beside Transformers', in balance or not."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.layers.moe import Moe
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.models import mixtral
from mosaicjax.models.names import foreign_tensors
from tests.models import forward
from tests.models.llama_like import assert_round_trip, exported, hf_config, read_back, rows, shared

SMALL = mixtral.Config(
    layers=2, embed=14, heads=3, kv_heads=1, head_dim=6, mlp=10, vocab=17, experts=3, window=5
)

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4_096,
    "initializer_range": 0.02,
    "intermediate_size": 14_336,
    "max_position_embeddings": 32_768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1_000_000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32_000,
}
"""As published, in the spelling of its day."""


@st.composite
def configs(draw):
    experts = draw(st.sampled_from([1, 2, 3, 6]))
    return mixtral.Config(
        **draw(shared()),
        experts=experts,
        ffn=Moe(top_k=draw(st.integers(1, min(experts, 3)))),
        window=draw(st.sampled_from([0, 3, 40])),
    )


def test_published_sizes():
    assert mixtral.Config().build().spec().count() == 46_702_792_704
    larger = mixtral.Config(layers=56, embed=6_144, heads=48, mlp=16_384, vocab=32_768)
    assert larger.build().spec().count() == 140_630_071_296


def test_a_published_configuration():
    assert read_back(SMALL, MIXTRAL_8X7B) == mixtral.Config()


def test_missing_keys_mean_what_transformers_takes():
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    assert read_back(SMALL, {key: MIXTRAL_8X7B[key] for key in sizes}) == mixtral.Config()


def test_names_and_shapes():
    config = replace(SMALL, layers=1)
    tensors = {each.name: each.shape for each in foreign_tensors(config.build(), config.names())}
    experts = "model.layers.0.block_sparse_moe"
    assert {name: shape for name, shape in tensors.items() if name.startswith(experts)} == {
        f"{experts}.gate.weight": (3, 14),
        **{f"{experts}.experts.{e}.{name}.weight": (10, 14) for e in range(3) for name in ("w1", "w3")},
        **{f"{experts}.experts.{e}.w2.weight": (14, 10) for e in range(3)},
    }
    assert not any(".mlp." in name for name in tensors)


def test_which_matrix_of_an_expert_is_which():
    # w1 goes through the nonlinearity, w3 is multiplied with it, w2 leads out.
    weights = forward.random_weights(SMALL.build())
    tensors = exported(SMALL, weights)
    inner = weights["stacks"][0][0]["layer"]["mlp"]
    expert = "model.layers.1.block_sparse_moe.experts.2"
    np.testing.assert_array_equal(tensors[f"{expert}.w1.weight"], inner["gate"][1, 2].T)
    np.testing.assert_array_equal(tensors[f"{expert}.w3.weight"], inner["up"][1, 2].T)
    np.testing.assert_array_equal(tensors[f"{expert}.w2.weight"], inner["down"][1, 2].T)


@settings(max_examples=20)
@given(config=configs(), seed=st.integers(0, 2**16))
def test_out_and_in_again(config, seed):
    assert_round_trip(config, seed)


def test_configurations_that_are_refused():
    with pytest.raises(InputError, match="'yarn'"):
        mixtral.Config.from_hf(hf_config(MIXTRAL_8X7B | {"rope_scaling": {"type": "yarn", "factor": 4.0}}))


def test_keys_that_no_mixtral_has_are_left_over():
    config = hf_config(MIXTRAL_8X7B | {"shared_expert_intermediate_size": 128, "norm_topk_prob": False})
    mixtral.Config.from_hf(config)
    assert config.unread() == ["norm_topk_prob", "shared_expert_intermediate_size"]


@pytest.mark.parametrize(
    ("ffn", "words"),
    [
        (Moe(gated=False), "ffn.gated is a knob that Transformers' mixtral lacks"),
        (Moe(renormalise=False), "ffn.renormalise is a knob that Transformers' mixtral lacks"),
        (Moe(bias=True), "ffn.bias is a knob that Transformers' mixtral lacks"),
    ],
)
def test_knobs_that_transformers_lacks(ffn, words):
    config = replace(SMALL, ffn=ffn)
    for say in (lambda: config.to_hf(64), config.names):
        with pytest.raises(InputError, match=re.escape(words)):
            say()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ffn": Moe(top_k=4)}, "top_k; expected 1 to the 3 experts; got 4"),
        ({"experts": 0}, "model size 'experts'; expected 1 or more; got 0"),
        ({"window": -1}, "attention window"),
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
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logits_where_the_same_experts_get_every_token(top_k, seed, tmp_path):
    from tests.models import llama_like_peer, peer

    config = replace(SMALL, experts=5, ffn=Moe(top_k=top_k), norm=RmsNorm(eps=1e-6))
    model = llama_like_peer.their_model(config, seed)
    liking = np.random.default_rng(seed).permutation(5)
    with peer.torch.no_grad():
        # All tokens have one direction in common, and routers look at nothing else.
        model.model.embed_tokens.weight[:, 0] += 30.0
        for layer in model.model.layers:
            layer.mlp.gate.weight[:] = 0.0
            layer.mlp.gate.weight[:, 0] = peer.torch.from_numpy(liking).float() / 4
    weights = peer.weights_from(peer.saved(model, tmp_path), config)
    rng = np.random.default_rng(seed)
    tokens, mask = peer.tokens_and_mask(rng, config.vocab, (13, 9), "left")
    taken = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: taken.append(out[2].numpy()))
    peer.assert_logits_agree(model, config, weights, tokens, mask)
    best = set(np.argsort(liking)[-top_k:].tolist())
    assert len(taken) == config.layers
    assert all(set(row) == best for experts in taken for row in experts.tolist())


@pytest.mark.peer
def test_transformers_loads_what_is_exported(tmp_path):
    from tests.models import llama_like_peer

    llama_like_peer.assert_export_loads(SMALL, 3, tmp_path)

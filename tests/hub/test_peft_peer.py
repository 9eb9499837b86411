"""Adapters in PEFT's format: what we write PEFT uses, and what it writes we use, to the same logits."""

import json
from functools import lru_cache

import jax
import numpy as np
import pytest

from mosaicjax.adapters import is_adapter
from mosaicjax.errors import InputError
from mosaicjax.hub import export_adapter, export_model, peft, start
from mosaicjax.hub.foreign_dir import open_model
from mosaicjax.methods.lora import LoRA
from mosaicjax.spec import join, named_leaves
from tests import tiny
from tests.hub.test_adapters import base, recipe, run, tokens, weights_of  # noqa: F401 fixtures
from tests.methods.test_lora import random_adapters
from tests.models import forward, peer
from tests.models.peer import torch, transformers

pytestmark = pytest.mark.peer
library = pytest.importorskip("peft", reason="needs the peer library peft")

SIZES = {
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 40, "max_seq_len": 32},
    "gpt_neox": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "vocab_size": 40,
    },
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 40, "n_positions": 32},
    "llama": {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "vocab_size": 40,
    },
}
ALL = ("*/attention/*", "*/mlp/*")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a small model of a kind, of random weights, and our family of it."""

    @lru_cache
    def made(kind):
        config = transformers.AutoConfig.for_model(kind, **SIZES[kind])
        folder = tmp_path_factory.mktemp(kind)
        peer.random_model(config, 1).save_pretrained(folder)
        return folder, open_model(folder).family

    return made


def of_transformers(theirs, ids):
    with torch.no_grad():
        return theirs(torch.tensor(ids)).logits.numpy()


def loaded(folder, adapter):
    under = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return library.PeftModel.from_pretrained(under, adapter).eval()


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("mpt", ALL),
        ("gpt_neox", ALL),
        ("gpt_neox", ("*/attention/query", "*/attention/value")),
        ("gpt2", ("*/out", "*/up", "*/key")),
        ("llama", ALL),
    ],
    ids=str,
)
def test_peft_uses_what_we_write(model, kind, targets, tmp_path):
    folder, family = model(kind)
    adapters = random_adapters(LoRA(rank=3, alpha=5.0, targets=targets).adapters(family.decoder().spec()))
    named = {name: each for name, each in named_leaves(adapters, is_adapter)}
    tmp_path.joinpath("peft").mkdir()
    peft.write_adapters(family, named, str(folder), tmp_path / "peft")
    ids, weights = tokens(40), weights_of(folder, family)
    ours = forward.logits(family.decoder(), join(adapters, weights), ids)
    theirs = of_transformers(loaded(folder, tmp_path / "peft"), ids)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    plain = forward.logits(family.decoder(), weights, ids)
    assert np.abs(plain - ours).max() > 0.05
    merged = forward.logits(family.decoder(), weights_of(tmp_path / "peft", family), ids)
    np.testing.assert_allclose(merged, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "names", "options"),
    [
        ("mpt", ("Wqkv", "down_proj"), {}),
        ("gpt_neox", ("query_key_value", "dense"), {"use_rslora": True}),
        ("gpt2", ("c_attn", "mlp.c_proj"), {"fan_in_fan_out": True}),
        ("llama", ("q_proj", "down_proj"), {"layers_to_transform": [1], "layers_pattern": "layers"}),
    ],
)
def test_we_use_what_peft_writes(model, kind, names, options, tmp_path):
    folder, family = model(kind)
    config = library.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=list(names),
        rank_pattern={names[0]: 2},
        alpha_pattern={names[1]: 9},
        init_lora_weights=False,
        **options,
    )
    under = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs = library.get_peft_model(under, config).eval()
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "lora_" in name:
                param.copy_(0.3 * torch.randn(param.shape))
    theirs.save_pretrained(tmp_path / "peft")
    ids = tokens(40)
    ours = forward.logits(family.decoder(), weights_of(tmp_path / "peft", family), ids)
    np.testing.assert_allclose(ours, of_transformers(theirs, ids), rtol=1e-4, atol=1e-4)
    changed = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(changed | {"use_dora": True}))
    with pytest.raises(InputError, match="use_dora is not read here; expected False; got True"):
        weights_of(tmp_path / "peft", family)


def test_a_runs_adapters_in_peft(run, base, tmp_path):  # noqa: F811 fixtures
    family = start.described(base)[0]
    export_model(str(base), str(tmp_path / "hf"))
    export_adapter(str(run), str(tmp_path / "peft"), base=str(tmp_path / "hf"))
    ids = tokens(family.vocab)
    theirs = of_transformers(loaded(tmp_path / "hf", tmp_path / "peft"), ids)
    ours = forward.logits(family.decoder(), weights_of(run, family), ids)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        weights_of(tmp_path / "peft", family),
        weights_of(run, family),
    )
    assert tiny.run("generate", tmp_path / "peft", "--prompt", "the", "--max-tokens", 3) == 0

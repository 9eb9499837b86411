"""Which family reads which `config.json`, and what all of them have in common."""

import json
import re

import numpy as np
import pytest

from mosaicjax.errors import InputError
from mosaicjax.layers.mlp import Activation
from mosaicjax.models import gptj, mosaic_gpt, mpt, neox
from mosaicjax.models.families import FAMILIES, family_of
from mosaicjax.models.hf_config import HfConfig, activation_from_hf, activation_to_hf, refuse_others


def test_each_family_by_its_model_type():
    assert family_of({"model_type": "mpt"}) is mpt.Config
    assert family_of({"model_type": "gptj"}) is gptj.Config
    assert family_of({"model_type": "gpt_neox"}) is neox.Config
    assert family_of({"model_type": "replit_lm"}) is mosaic_gpt.Config


@pytest.mark.parametrize(
    "values", [{"model_type": "bloom"}, {"model_type": None}, {}, {"model_type": ["mpt"]}]
)
def test_an_unknown_model_type_names_those_that_are_known(values):
    with pytest.raises(InputError) as caught:
        family_of(values, "there/config.json")
    message = str(caught.value)
    assert message.startswith(
        "there/config.json: model_type is not known here; expected gpt2, gpt_neox, gptj"
    )
    assert message.endswith(f"got {values.get('model_type')!r}")


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"mosaic_gpt", "replit_lm"}))
def test_published_defaults_go_out_and_come_back(name):
    # 2,048 positions are what the 7B and smaller ones were trained for; Mixtral and others read no length.
    config = FAMILIES[name]()
    values = json.loads(json.dumps(config.to_hf(2_048)))
    assert values["model_type"] == name
    found = HfConfig(values)
    assert family_of(values).from_hf(found) == config
    assert found.unread() == []


def test_what_a_configuration_has_left():
    config = HfConfig({"a": 1, "b": None, "c": {"d": 2, "e": {"f": 3}}, "architectures": ["X"], "g": 0})
    part = config.part("c")
    assert config.unread() == ["a", "c.d", "c.e", "g"]
    assert part.get("d", 0) == 2 and part.part("e").get("missing", 7) == 7
    assert config.unread() == ["a", "c.e.f", "g"]
    config.skip("a")
    part.part("e").only("f", 3, 4)
    assert config.get("g", 5) == 0
    assert config.unread() == []


def test_one_knob_is_named():
    with pytest.raises(
        InputError, match=re.escape("b is a knob that Transformers' X lacks; expected 2; got 3")
    ):
        refuse_others("X", {"a": (1, 1), "b": (3, 2), "c": (5, 4)})


@pytest.mark.parametrize("activation", Activation)
def test_activations_out_and_in(activation):
    config = HfConfig({"hidden_act": activation_to_hf(activation)})
    assert activation_from_hf(config, "hidden_act", "gelu") is activation


@pytest.mark.peer
def test_activations_of_transformers_that_are_the_same():
    from tests.models import peer

    x = np.linspace(-6, 6, 501).astype(np.float32)
    names = peer.transformers.activations.ACT2FN
    known = {}
    for name in names:
        try:
            known[name] = activation_from_hf(HfConfig({"act": name}), "act", "gelu")
        except InputError:
            continue
        theirs = names[name](peer.torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(np.asarray(known[name].apply(x)), theirs, atol=2e-6, err_msg=name)
    assert set(known.values()) == set(Activation) and len(known) == 12

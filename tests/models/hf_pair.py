"""One model twice: ours by `from_hf`, and Transformers' by the same values, with the same random weights."""

import copy
import json

import jax
import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mosaicjax.models.families import family_of
from tests.models import forward, peer
from tests.models.llama_like import exported, hf_config


def from_hf(values):
    """Our family; every key must be read."""
    config = hf_config(values)
    family = family_of(values).from_hf(config)
    assert config.unread() == []
    return family


def pair(values, seed, folder):
    """Transformers' model, ours, and our tree of its weights; the file that it saves reads alike."""
    theirs = peer.transformers.AutoConfig.for_model(**copy.deepcopy(values))
    model = peer.random_model(theirs, seed)
    family = from_hf(values)
    weights = peer.weights_from(peer.saved(model, folder), family)
    assert from_hf(json.loads((folder / "config.json").read_text())) == family
    return model, family, weights


LONGEST = 12


@st.composite
def batches(draw, starts=(0,), equal=False):
    """Some batches: a seed, the lengths of its rows, the side they are padded on, and where they begin."""
    lengths = st.just((LONGEST, LONGEST)) if equal else st.tuples(st.just(LONGEST), st.integers(1, LONGEST))
    seeds = st.integers(0, 2**16)
    left, right = (
        st.tuples(seeds, lengths, st.just(side), st.sampled_from(starts)) for side in ("left", "right")
    )
    return draw(st.tuples(left, right, left, right))


def assert_logits(values, batches, folder):
    """At every real token, wherever the rows begin. MPT, which takes no positions, begins at 0."""
    decoder = from_hf(values).build()

    def run(weights, tokens, positions, mask):
        where = forward.context(tokens, positions, mask)
        return forward.logits_from(decoder, weights, decoder.embed(weights, tokens, where), where)

    run = jax.jit(run)
    for seed, lengths, side, start in batches:
        model, family, weights = pair(values, seed, folder)
        tokens, mask = peer.tokens_and_mask(np.random.default_rng(seed), family.vocab, lengths, side)
        positions = peer.positions_of(mask) + start
        arguments = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions.astype(np.int64)}
        if values["model_type"] == "mpt":
            del arguments["position_ids"]
        with peer.torch.no_grad():
            theirs = model(**{name: peer.torch.from_numpy(each) for name, each in arguments.items()}).logits
        ours = np.asarray(run(weights, tokens, positions, mask))
        real = mask.astype(bool)
        np.testing.assert_allclose(ours[real], theirs.numpy()[real], rtol=0, atol=1e-4)
        assert np.abs(ours[real]).max() > 0.1


def assert_gradients(values, seed, folder):
    """Of every weight, over two full rows."""
    model, family, weights = pair(values, seed, folder)
    tokens = np.random.default_rng(seed).integers(0, family.vocab, (2, 11))
    peer.assert_gradients_agree(*peer.gradients(model, family, weights, tokens, folder))


def assert_export_loads(family, length, seed, folder):
    """What we write, Transformers loads whole, and it gives our logits."""
    weights = forward.random_weights(family.build(), seed)
    (folder / "config.json").write_text(json.dumps(family.to_hf(length)))
    save_file(exported(family, weights), folder / "model.safetensors", metadata={"format": "pt"})
    model, info = peer.transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    tokens, mask = peer.tokens_and_mask(np.random.default_rng(seed), family.vocab, (9, 6), "right")
    peer.assert_logits_agree(model.eval(), family, weights, tokens, mask)

"""Llama, Mistral, Qwen3 and Mixtral beside Transformers."""

import json

import numpy as np
from safetensors.numpy import save_file

from tests.models import forward, peer
from tests.models.llama_like import LENGTH, exported, read_back


def their_model(family, seed):
    """Transformers' model of our family's sizes, with random weights."""
    config = peer.transformers.AutoConfig.for_model(**family.to_hf(LENGTH))
    # Its default for experts wants widths that are multiples of 4.
    config._experts_implementation = "eager"
    return peer.random_model(config, seed)


def assert_logits(family, rows, seed, folder):
    """Logits of padded rows, wherever they begin; and the configuration that Transformers saves is ours."""
    model = their_model(family, seed)
    tensors = peer.saved(model, folder)
    assert read_back(family, json.loads((folder / "config.json").read_text())) == family
    weights = peer.weights_from(tensors, family)
    lengths, side, start = rows
    rng = np.random.default_rng(seed)
    tokens, mask = peer.tokens_and_mask(rng, family.vocab, lengths, side)
    positions = peer.positions_of(mask) + start
    ours = forward.logits(family.build(), weights, tokens, positions, mask)
    with peer.torch.no_grad():
        theirs = model(
            input_ids=peer.torch.from_numpy(tokens),
            attention_mask=peer.torch.from_numpy(mask),
            position_ids=peer.torch.from_numpy(positions).long(),
        ).logits.numpy()
    real = mask.astype(bool)
    np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=1e-4)


def assert_gradients(family, seed, folder):
    """Gradients of every weight, over two full rows."""
    model = their_model(family, seed)
    weights = peer.weights_from(peer.saved(model, folder), family)
    tokens = np.random.default_rng(seed).integers(0, family.vocab, (2, 11))
    peer.assert_gradients_agree(*peer.gradients(model, family, weights, tokens, folder))


def assert_export_loads(family, seed, folder):
    """What we write, Transformers loads whole, and it gives our logits."""
    weights = forward.random_weights(family.build(), seed)
    (folder / "config.json").write_text(json.dumps(family.to_hf(LENGTH)))
    save_file(exported(family, weights), folder / "model.safetensors", metadata={"format": "pt"})
    model, info = peer.transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not any(info.values()), info
    rng = np.random.default_rng(seed)
    tokens, mask = peer.tokens_and_mask(rng, family.vocab, (12, 12), "right")
    peer.assert_logits_agree(model.eval(), family, weights, tokens, mask)

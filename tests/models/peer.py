"""The same model here and in Transformers: weights carried over by the table, logits and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax.models.names import foreign_tensors
from tests.models import forward

torch = pytest.importorskip("torch", reason="needs the peer library torch")
transformers = pytest.importorskip("transformers", reason="needs the peer library transformers")


def random_model(config, seed):
    """A Transformers model in float32 with random numbers in every weight, norms and biases too."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.to(torch.float32).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            noise = 0.3 * torch.randn(param.shape) / max(1.0, param.shape[-1] ** 0.5 / 2)
            param.copy_(noise + (0.8 if param.ndim == 1 and bool((param != 0).all()) else 0.0))
    return model


def saved(model, folder):
    """The tensors that `save_pretrained` writes, by name."""
    from safetensors.numpy import load_file

    model.save_pretrained(folder)
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def weights_from(tensors, family):
    """Our tree of weights out of foreign tensors, and the names that were not needed."""
    decoder, names = family.build(), family.names()
    spec = decoder.spec()
    arrays = {name: np.full(param.shape(spec.dims), np.nan, np.float32) for name, param in spec.items()}
    left = {name for name in tensors if not names.ignores(name)}
    for foreign in foreign_tensors(decoder, names):
        assert tensors[foreign.name].shape == foreign.shape, foreign.name
        left.discard(foreign.name)
        for piece in foreign.pieces:
            arrays[piece.leaf][piece.index] = foreign.view(tensors[foreign.name], piece)
    assert not left, f"tensors that the table does not name: {sorted(left)}"
    flat = iter(arrays.values())
    return spec.map(lambda param: next(flat))


def tokens_and_mask(rng, vocab, lengths, padding):
    """Random tokens [B, L] of these lengths, padded `left` or `right`, and 1 where a token is real."""
    length = max(lengths)
    tokens = rng.integers(0, vocab, (len(lengths), length))
    mask = np.zeros((len(lengths), length), np.int64)
    for row, size in enumerate(lengths):
        mask[row, (length - size if padding == "left" else 0) : (length if padding == "left" else size)] = 1
    return tokens, mask


def positions_of(mask):
    """Positions from 0 at each row's first real token; those of padding are 0."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


def peer_logits(model, tokens, mask):
    """Transformers' logits, [B, L, V]."""
    arguments = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}
    if model.config.model_type != "mpt":
        arguments["position_ids"] = torch.from_numpy(positions_of(mask)).long()
    with torch.no_grad():
        return model(**arguments).logits.numpy()


def our_logits(family, weights, tokens, mask):
    """Our logits, [B, L, V]."""
    return forward.logits(family.build(), weights, tokens, positions_of(mask), mask)


def assert_logits_agree(model, family, weights, tokens, mask, tolerance=1e-4):
    """At every real token."""
    ours, theirs = our_logits(family, weights, tokens, mask), peer_logits(model, tokens, mask)
    real = mask.astype(bool)
    np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=tolerance)


def mean_nll(logits, tokens):
    """Mean loss of every next token of full rows."""
    logp = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1))


def gradients(model, family, weights, tokens, folder):
    """Gradients of the mean loss over unpadded rows: ours and Transformers', both as our tree."""
    decoder = family.build()

    def ours(weights):
        where = forward.context(tokens)
        x_BLD = decoder.embed(weights, jnp.asarray(tokens, jnp.int32), where)
        return mean_nll(forward.logits_from(decoder, weights, x_BLD, where), jnp.asarray(tokens))

    mine = jax.jit(jax.grad(ours))(jax.tree.map(jnp.asarray, weights))
    model.zero_grad()
    model(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(tokens)).loss.backward()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.grad if param.grad is not None else torch.zeros_like(param))
    return mine, weights_from(saved(model, folder), family)


def assert_gradients_agree(mine, theirs, tolerance=1e-4):
    """Each weight's within `tolerance` of the larger of its largest entry and 1e-3 of the model's largest."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    for (path, ours), expected in zip(
        jax.tree_util.tree_leaves_with_path(mine), jax.tree.leaves(theirs), strict=True
    ):
        bound = tolerance * max(np.abs(expected).max(), 1e-3 * largest)
        worst = np.abs(np.asarray(ours) - expected).max()
        assert worst <= bound, f"{jax.tree_util.keystr(path)}: {worst} over {bound}"

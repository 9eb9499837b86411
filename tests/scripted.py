"""A model that writes what it is told, and a tokenizer of bytes, so that what is written is known."""

import jax
import numpy as np

from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import Learned
from mosaicjax.mesh import shardings
from mosaicjax.models import mpt

SEPARATOR = 256
REACH = 80
# 272 rather than 257 tokens: a vocabulary is padded, and nothing may be drawn from the padding.
SCRIPTED = mpt.Config(
    layers=1, embed=REACH, heads=1, mlp=4, vocab=272, position=Learned(REACH), norm=LayerNorm(), tied=False
)


def byte_tokenizer(leading_space=False):
    """A token a byte, and the separator."""
    return Tokenizer(
        encode=lambda text: list(text.encode()),
        encode_batch=lambda texts: [list(text.encode()) for text in texts],
        encoder="bytes",
        pieces=[*(bytes([byte]) for byte in range(256)), b""],
        separator=(SEPARATOR, "<|endoftext|>"),
        leading_space=leading_space,
        files=(),
    )


def scripted(script, layout):
    """Weights that write the script by position alone: its token n - 1 after n tokens, then separators."""
    decoder = SCRIPTED.build()
    spec = decoder.spec()
    weights = spec.map(lambda param: np.zeros(param.shape(spec.dims), np.float32))
    weights["norm"]["scale"][:] = 1
    # Attention and MLP add nothing; each position is a direction of its own, read by the token it writes.
    weights["embed"]["positions"][:] = np.eye(REACH)
    for position in range(REACH):
        weights["head"][script[position] if position < len(script) else SEPARATOR, position] = 1
    # The norm centres; this brings all other directions back to 0, and the position's own to 80 / sqrt(79).
    weights["norm"]["bias"][:] = (REACH - 1) ** -0.5
    # The vocabulary's padding is the likeliest everywhere.
    weights["head"][SEPARATOR + 1 :] = 2
    return decoder, jax.tree.map(jax.device_put, weights, shardings(spec, layout))

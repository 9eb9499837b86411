"""Running a decoder without a train step, for tests: weights with nothing at its start value, and logits."""

import jax
import jax.numpy as jnp
import numpy as np

from mosaicjax.layers.context import Context
from mosaicjax.mesh import Mesh
from mosaicjax.spec import Dtypes

FLOAT32 = Dtypes()


def one_device():
    return Mesh(fsdp=(1,)).build(jax.devices()[:1])


def random_weights(decoder, seed=0, dtypes=FLOAT32):
    """A tree of the spec's shapes with random numbers everywhere, norms and biases too."""
    spec = decoder.spec()
    rng = np.random.default_rng(seed)

    def draw(param):
        scale = 0.3 * rng.standard_normal(param.shape(spec.dims))
        return (scale if param.decay else 0.7 + scale).astype(dtypes.param)

    return spec.map(draw)


def context(tokens, positions=None, segments=None, dtypes=FLOAT32):
    if positions is None:
        positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    segments = None if segments is None else jnp.asarray(segments, jnp.int32)
    where = (jnp.asarray(positions, jnp.int32), segments)
    return Context(one_device(), dtypes, *where, tokens_BL=jnp.asarray(tokens, jnp.int32))


def logits_from(decoder, weights, x_BLD, where):
    hidden = decoder.hidden(weights, x_BLD, where).hidden_BLD
    return decoder.logits(decoder.head(weights, where), hidden, where)


def logits(decoder, weights, tokens, positions=None, segments=None, dtypes=FLOAT32):
    """Scores of the next token, as numpy."""

    def run(weights, tokens, positions, segments):
        where = context(tokens, positions, segments, dtypes)
        return logits_from(decoder, weights, decoder.embed(weights, tokens, where), where)

    return np.asarray(jax.jit(run)(weights, jnp.asarray(tokens, jnp.int32), positions, segments))

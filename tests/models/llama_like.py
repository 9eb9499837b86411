"""What the tests of Llama, Mistral, Qwen3 and Mixtral share: drawn sizes, and weights out and in again."""

import json

import jax
import numpy as np
from hypothesis import strategies as st

from mosaicjax.layers.mlp import Activation
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import DynamicScaling, LinearScaling, Llama3Scaling, RopeScaling, Rotary
from mosaicjax.models.hf_config import HfConfig
from mosaicjax.models.names import foreign_tensors
from tests.models import forward

LENGTH = 64
"""What `max_position_embeddings` says; rows may be longer."""

scalings = st.one_of(
    st.just(RopeScaling()),
    st.builds(LinearScaling, factor=st.sampled_from([1.5, 8.0])),
    st.builds(DynamicScaling, factor=st.sampled_from([1.0, 3.0]), original=st.sampled_from([7, 16, 64])),
    # Wave lengths run from 6 positions up: with so short an original length some are kept, some blended.
    st.builds(
        Llama3Scaling,
        factor=st.sampled_from([2.0, 8.0]),
        low=st.sampled_from([0.5, 1.0]),
        high=st.sampled_from([2.0, 4.0]),
        original=st.sampled_from([16, 40, 300]),
    ),
)


@st.composite
def shared(draw, embed_by_heads=False):
    """Fields of `LlamaLike`, with heads that are no powers of two and head_dim other than embed / heads."""
    heads = draw(st.sampled_from([1, 2, 3, 4, 5, 6]))
    head_dim = draw(st.sampled_from([4, 6, 8, 10]))
    return {
        "layers": draw(st.integers(1, 3)),
        "embed": heads * draw(st.sampled_from([3, 4, 7]))
        if embed_by_heads
        else draw(st.sampled_from([14, 24])),
        "heads": heads,
        "kv_heads": draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        "head_dim": head_dim,
        "mlp": draw(st.sampled_from([12, 20])),
        "vocab": draw(st.sampled_from([17, 40])),
        "position": Rotary(theta=draw(st.sampled_from([50.0, 10_000.0])), scaling=draw(scalings)),
        "norm": RmsNorm(eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2]))),
        "activation": draw(st.sampled_from([Activation.SILU, Activation.GELU, Activation.RELU])),
        "tied": draw(st.booleans()),
    }


@st.composite
def rows(draw, config):
    """Lengths of rows, the side they are padded on, and the position that they begin at."""
    side, start = draw(st.sampled_from(["left", "right"])), draw(st.sampled_from([0, 300, 5_000]))
    longest = draw(st.integers(9, 13))
    # Transformers scales all rows of a batch by the longest: they agree where all are equally long.
    short = longest if config.position.rotation_depends_on_length else draw(st.integers(1, longest))
    return (longest, short), side, start


def hf_config(values):
    """As `from_hf` is given it, out of JSON."""
    return HfConfig(json.loads(json.dumps(values)))


def read_back(family, values):
    """The family that a `config.json` describes; every key of it must be read."""
    config = hf_config(values)
    found = type(family).from_hf(config)
    assert config.unread() == []
    return found


def exported(family, weights):
    """Foreign tensors out of our tree, by name; weights that nothing fills would be NaN."""
    decoder = family.build()
    leaves = dict(zip((name for name, _ in decoder.spec().items()), jax.tree.leaves(weights), strict=True))
    tensors = {}
    for foreign in foreign_tensors(decoder, family.names()):
        array = np.full(foreign.shape, np.nan, np.float32)
        for piece in foreign.pieces:
            foreign.view(array, piece)[...] = leaves[piece.leaf][piece.index]
        tensors[foreign.name] = array
    return tensors


def imported(family, tensors):
    """Our tree out of foreign tensors."""
    decoder = family.build()
    spec = decoder.spec()
    arrays = {name: np.full(param.shape(spec.dims), np.nan, np.float32) for name, param in spec.items()}
    for foreign in foreign_tensors(decoder, family.names()):
        for piece in foreign.pieces:
            arrays[piece.leaf][piece.index] = foreign.view(tensors[foreign.name], piece)
    flat = iter(arrays.values())
    return spec.map(lambda param: next(flat))


def assert_round_trip(family, seed=0):
    """The configuration and every weight, out and in again."""
    assert read_back(family, family.to_hf(LENGTH)) == family
    weights = forward.random_weights(family.build(), seed)
    tensors = exported(family, weights)
    for name, array in tensors.items():
        assert np.isfinite(array).all(), name
    again = imported(family, tensors)
    for ours, theirs in zip(jax.tree.leaves(weights), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)

"""One dial, the depth, and all else by formula: at depth 12, 3,096 steps x 256 rows x 2,048 tokens.

    mosaicjax data build text/ --tokenizer tokenizer.json --out data/dial
    mosaicjax train recipes/dial.py

At depth 12 that is 185,620,224 parameters and 1.6B tokens. Edit DEPTH: width, heads, length of the run,
batch, rates and decay follow. No loss is published for this very model, and none was measured here.

Source: nanochat, https://github.com/karpathy/nanochat scripts/base_train.py @00255c1, for every formula and
constant; its model of depth 20 is its README's 561M parameters, as `from_depth(20)` is but for the scales of
norms. What the formulas rest on stands beside them. Deviations are marked *.
"""

import math

from mosaicjax.data.mixture import TokenStore
from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.inits import Kaiming
from mosaicjax.layers.mlp import Activation, Mlp
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.mesh import fsdp
from mosaicjax.models import mpt
from mosaicjax.muon import Muon
from mosaicjax.optim import AdamW, Linear
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

DEPTH = 12
REFERENCE_DEPTH, REFERENCE_BATCH = 12, 2**19  # tokens a step that were best at this depth
VOCAB, SEQ, HEAD_DIM = 65_536, 2_048, 128


def width(depth: int) -> int:
    """64 a layer, and whole heads."""
    return math.ceil(64 * depth / HEAD_DIM) * HEAD_DIM


def tokens(depth: int) -> int:
    """Twelve for each parameter of layers and head, by nanochat's own scaling runs; Chinchilla's (Hoffmann et
    al. 2022, arXiv 2203.15556) are twenty for each parameter of all.
    """
    return 12 * (12 * depth * width(depth) ** 2 + VOCAB * width(depth))


def batch_tokens(depth: int) -> int:
    """The best batch grows with the tokens to the power 0.383 (Bergsma et al. 2025, arXiv 2505.13738)."""
    best = REFERENCE_BATCH * (tokens(depth) / tokens(REFERENCE_DEPTH)) ** 0.383
    return 2 ** round(math.log2(best))


def from_depth(depth: int) -> Recipe:
    """The recipe of a model of so many layers."""
    steps = tokens(depth) // batch_tokens(depth)
    # Rates go with the square root of the batch; Adam's also with that of the inverse width.
    by_batch = (batch_tokens(depth) / REFERENCE_BATCH) ** 0.5
    by_width = (width(depth) / 768) ** -0.5
    # Wang and Aitchison 2024, arXiv 2405.13698: batch / (rate x decay x tokens) stays.
    decay = 0.28 * by_batch * tokens(REFERENCE_DEPTH) / tokens(depth)
    warmup = min(40, steps // 10)

    def rate(peak: float) -> Linear:
        # * Falls from the warm-up on, whatever --steps says; nanochat's over the last 65% of the steps.
        return Linear(peak=peak * by_batch, warmup=warmup, final=0.05)

    return Recipe(
        model=mpt.Config(
            layers=depth,
            embed=width(depth),
            heads=width(depth) // HEAD_DIM,
            mlp=4 * width(depth),
            vocab=VOCAB,
            position=Rotary(theta=100_000),
            norm=RmsNorm(),  # * with scales
            ffn=Mlp(Activation.RELU_SQUARED),
            qk_norm=QkNorm(RmsNorm(), per_head=True),
            tied=False,
            logit_softcap=15.0,
            init=Kaiming(zero_residual=True),  # * normal, where nanochat's is uniform
        ),
        data=TokenStore("data/dial"),
        seq=SEQ,
        batch=batch_tokens(depth) // SEQ,
        steps=steps,
        seed=17,
        optimizer=Muon(
            lr=rate(0.02),
            momentum=0.95,  # * nanochat's goes from 0.85 to 0.97, and to 0.90
            rms=0.0,  # Jordan's scale, which the rate is for
            weight_decay=0.02
            * by_batch
            * decay,  # of a step, as nanochat's rate x decay; * it falls with the rate
            cautious=True,
            # * One rate, the head's: nanochat's for the embeddings is 0.3.
            others=AdamW(lr=rate(0.008 * by_width), b1=0.8, b2=0.95, eps=1e-10),
        ),
        mesh=fsdp(),
        dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),
        eval=Eval(every=250),
        save=Save(every=1_000),
    )


recipe = from_depth(DEPTH)

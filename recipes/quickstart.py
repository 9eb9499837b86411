"""A small model of Python code, trained from nothing in minutes on two CPU cores, the cheapest way known.

    make quickstart

or, once `make quickstart` has built its tokenizer and token store:

    mosaicjax train recipes/quickstart.py --steps 50 --out runs/trial

Expect, on Python 3.11's standard library: 1,500 steps x 32 rows x 32 tokens (2 rows of 512 for the last 250)
= 1.5M tokens, a held-out loss of 3.35 nats a token or 1.49 bits a byte (`gzip -9`: 2.04, `xz`: 1.89), in five
and a half minutes on one core with AVX2 for $0.0092 at the price assumed below. It has 6.0M parameters, of
which 4.2M are the table of pairs: a token looks up one row.

What makes it cheap is the speedrun's (`recipes/speedrun/best.py`, `benchmarks/speedrun.py`): Muon, short rows
first, hashed pairs of tokens, ReLU squared, queries and keys normed, outputs that start at zero. Before it,
the quickstart was a plain MPT of 4.2M parameters with AdamW, 655k tokens in about the same time: 2.00 bits a
byte.

Source: rates, batch and lengths come from some ten trials on the held-out files, not from a search.
"""

from mosaicjax.data.mixture import TokenStore
from mosaicjax.hardware import Price
from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.inits import Kaiming
from mosaicjax.layers.mlp import Activation, Mlp
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.layers.token_inputs import Bigram
from mosaicjax.mesh import fsdp
from mosaicjax.models import mpt
from mosaicjax.models.decoder import Remat
from mosaicjax.muon import Muon
from mosaicjax.optim import AdamW, Linear
from mosaicjax.polar import PolarExpress
from mosaicjax.recipe import Eval, Later, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=mpt.Config(
        layers=4,
        embed=128,
        heads=4,
        mlp=4 * 128,
        vocab=4_096,
        position=Rotary(),
        norm=RmsNorm(),
        ffn=Mlp(Activation.RELU_SQUARED),
        qk_norm=QkNorm(RmsNorm(), per_head=True),
        tied=False,
        inputs=(Bigram(32_768),),
        init=Kaiming(zero_residual=True),
        remat=Remat.PRODUCTS,  # single passes done again cost a CPU less than memory does
    ),
    data=TokenStore("build/quickstart/store"),
    seq=32,
    batch=32,
    steps=1_500,
    seed=17,
    phases=(Later(1_250, seq=512, batch=2),),
    optimizer=Muon(
        lr=Linear(peak=7e-3, warmup=10),
        momentum=0.9,
        iterations=3,
        polynomials=PolarExpress(lower=0.02),
        others=AdamW(lr=Linear(peak=2e-2, warmup=10), b1=0.9, b2=0.98),
    ),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="float32", reduce="float32"),
    eval=Eval(every=300, rows=64),
    save=Save(every=300),
    price=Price(0.10, "an assumption, for a small cloud machine: put yours here", "2026-11-23"),
)

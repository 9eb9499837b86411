"""The record: the loss of `standard.py` for a fraction of its tokens.

    python benchmarks/speedrun.py code-1M

Muon for the matrices, with three of PolarExpress's polynomials for five of Jordan's; RMS norms, queries and
keys normed, ALiBi, output projections that start at zero, an untied head, value embeddings and hashed pairs
of tokens; rows of 32 tokens until the last steps, which have whole ones; gradients clipped; a rate that falls
to nothing on a line. Settings were chosen by some fifty trials on the validation documents.
`python benchmarks/ablation.py code-1M` says what each part is worth.

Source: modded-nanogpt's records for the parts, https://github.com/KellerJordan/modded-nanogpt.
"""

from mosaicjax.data.mixture import TokenStore
from mosaicjax.hardware import Price
from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.inits import Kaiming
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import Alibi
from mosaicjax.layers.token_inputs import Bigram
from mosaicjax.mesh import fsdp
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import mpt
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
        position=Alibi(),
        norm=RmsNorm(),
        qk_norm=QkNorm(RmsNorm(), per_head=True),
        tied=False,
        inputs=(Bigram(32_768),),
        value_tables=1,
        init=Kaiming(zero_residual=True),
    ),
    data=TokenStore("build/speedrun/code/store"),
    seq=32,
    batch=16,
    steps=70,
    seed=17,
    phases=(Later(64, seq=256, batch=2),),
    optimizer=Muon(
        lr=Linear(peak=7e-3, warmup=4),
        momentum=0.85,
        iterations=3,
        polynomials=PolarExpress(lower=0.02),
        others=AdamW(lr=Linear(peak=8e-2, warmup=4), b1=0.9, b2=0.98),
    ),
    methods=(ClipGradients(norm=1.0),),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="float32", reduce="float32"),
    eval=Eval(every=0),
    save=Save(every=0),
    price=Price(0.10, "an assumption, for a small cloud machine: put yours here", "2026-11-23"),
)

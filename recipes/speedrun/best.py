"""The record: the loss of `standard.py` for a fraction of its tokens.

    python benchmarks/speedrun.py code-1M

Muon for the matrices; RMS norms, queries and keys normed, rotary positions, ReLU squared, output projections
that start at zero, an untied head, value embeddings and hashed pairs of tokens; short rows first, whole ones
for the last third; a rate that falls to nothing on a line. Every setting was chosen on the validation
documents; what each is worth is in `benchmarks/ablation.json`.

Source: modded-nanogpt's records for the parts, https://github.com/KellerJordan/modded-nanogpt.
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
from mosaicjax.muon import Muon
from mosaicjax.optim import AdamW, Linear
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
        inputs=(Bigram(8_192),),
        value_tables=1,
        init=Kaiming(zero_residual=True),
    ),
    data=TokenStore("build/speedrun/code/store"),
    seq=64,
    batch=8,
    steps=98,
    seed=17,
    phases=(Later(70, seq=256, batch=2),),
    optimizer=Muon(
        lr=Linear(peak=1e-2, warmup=5),
        others=AdamW(lr=Linear(peak=4e-2, warmup=5), b1=0.9, b2=0.95),
    ),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="float32", reduce="float32"),
    eval=Eval(every=0),
    save=Save(every=0),
    price=Price(0.10, "an assumption, for a small cloud machine: put yours here", "2026-11-23"),
)

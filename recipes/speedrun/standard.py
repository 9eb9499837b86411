"""What records are measured against: a small MPT with AdamW and a cosine, its rate searched on both sides.

    python benchmarks/speedrun.py code-1M

The benchmark names the corpus, the sizes and the steps. The rate has a worse one on either side: 4e-3 and
1.6e-2, on the validation documents, by hand. That of the longer track, 2e-3, was found by `mosaicjax sweep`
(`benchmarks/sweeps/standard-code-3M.json`).

Source: MPT's choices (llm-foundry): ALiBi, no biases, tied embeddings, exact GELU,
b2 0.95, a cosine to a tenth, gradients clipped at 1.
"""

from mosaicjax.data.mixture import TokenStore
from mosaicjax.hardware import Price
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import Alibi
from mosaicjax.mesh import fsdp
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import mpt
from mosaicjax.optim import AdamW, Cosine
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=mpt.Config(
        layers=4,
        embed=128,
        heads=4,
        mlp=4 * 128,
        vocab=4_096,
        position=Alibi(),
        norm=LayerNorm(bias=False),
    ),
    data=TokenStore("build/speedrun/code/store"),
    seq=256,
    batch=8,
    steps=122,
    seed=17,
    optimizer=AdamW(lr=Cosine(peak=8e-3, warmup=12, final=0.1), b1=0.9, b2=0.95),
    methods=(ClipGradients(norm=1.0),),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="float32", reduce="float32"),
    eval=Eval(every=0),
    save=Save(every=0),
    price=Price(0.10, "an assumption, for a small cloud machine: put yours here", "2026-11-23"),
)

"""Llama-3-8B: 3,576,279 steps x 512 rows x 8,192 tokens = 15T tokens; 8,030,261,248 parameters.

    mosaicjax data build YOUR-TEXT --include '*.jsonl.xz' --held-out 0.000001 \
        --tokenizer llama-3/tokenizer.json --out data/text-llama3
    mosaicjax train recipes/llama3_8b.py

Meta took 1.3 million H100-80GB hours: $8.9 million at the list price in mosaicjax/hardware.py. No loss is
published. mosaicjax was not measured at this size. Meant for a slice of 32 to 128 chips of 95 GB: 128 rows
are worked on at once.

Source: arXiv 2407.21783, table 3 (sizes, peak rate), section 3.2 (positions, mask between documents),
section 3.4.1 (schedule, of the 405B); model card and `config.json` of meta-llama/Meta-Llama-3-8B
(vocabulary, norm, tokens, hours). What is published of the 405B or of Llama 2 (arXiv 2307.09288, section
2.2) alone, and is assumed for the 8B, is marked *.
"""

from mosaicjax.data.mixture import TokenStore
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.losses import CrossEntropy
from mosaicjax.mesh import fsdp
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import llama
from mosaicjax.models.decoder import Remat
from mosaicjax.optim import AdamW, Cosine
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=llama.Config(
        layers=32,
        embed=4_096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        vocab=128_256,
        position=Rotary(theta=500_000.0),
        norm=RmsNorm(eps=1e-5),
        remat=Remat.FULL,
    ),
    data=TokenStore("data/text-llama3", isolate=True),
    seq=8_192,
    batch=512,  # * 4M tokens, Llama 2's and the 405B's first
    microbatch=128,
    steps=3_576_279,
    seed=17,  # * not published
    optimizer=AdamW(
        lr=Cosine(
            peak=3e-4,
            warmup=8_000,  # * the 405B's
            final=0.01,  # * the 405B's, 8e-5 to 8e-7
        ),
        b1=0.9,  # * Llama 2's, as b2, eps, decay and clipping
        b2=0.95,
        eps=1e-5,
        weight_decay=0.1 * 3e-4,
    ),
    loss=CrossEntropy(chunk=512),
    methods=(ClipGradients(norm=1.0),),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),
    eval=Eval(every=5_000, rows=512),
    save=Save(every=1_000, keep_every=100_000),
)

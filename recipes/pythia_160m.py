"""Pythia-160M on the Pile: 143,000 steps x 1,024 rows x 2,048 tokens = 300B tokens; 162,322,944 parameters.

    mosaicjax data build pile --include '*.jsonl.xz' --held-out 0.00005 \
        --tokenizer gpt-neox-20b/tokenizer.json --out data/pile-gpt-neox
    mosaicjax train recipes/pythia_160m.py

EleutherAI took 1,030 A100-40GB hours on 32 of them: $2,827 at the list price in mosaicjax/hardware.py. The
paper states no loss. mosaicjax was not measured there. Pythia keeps a checkpoint every 1,000 steps:
`--save.keep-every 1000`.

Source: EleutherAI/pythia models/160M/pythia-160m.yml @a19eecb for every number, its README for batch, tokens
and seed; hours: arXiv 2304.01373, appendix; parameters: model card of EleutherAI/pythia-160m. Deviations are
marked *.
"""

from mosaicjax.data.mixture import TokenStore
from mosaicjax.layers.inits import SmallInit
from mosaicjax.layers.position import Rotary
from mosaicjax.mesh import fsdp
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import neox
from mosaicjax.models.decoder import Remat
from mosaicjax.optim import AdamW, Cosine
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=neox.Config(
        layers=12,
        embed=768,
        heads=12,
        mlp=4 * 768,
        vocab=50_304,  # the tokenizer's 50,277 to a multiple of 128
        position=Rotary(fraction=0.25),
        init=SmallInit(),  # small_init and wang_init
        remat=Remat.FULL,  # checkpoint-activations
    ),  # * exact GELU, as published for inference: training's fused kernel took the tanh form
    data=TokenStore("data/pile-gpt-neox"),
    seq=2_048,
    batch=1_024,
    steps=143_000,
    seed=1_234,
    optimizer=AdamW(
        # GPT-NeoX v1.0: to zero over all 143,000 steps after the warm-up's 1%, never below min_lr.
        lr=Cosine(peak=6e-4, warmup=1_430, final=0.0, over=143_000, floor=0.1),
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.1 * 6e-4,  # weight-decay 0.1, a factor of the rate
    ),
    methods=(ClipGradients(norm=1.0),),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),  # * float16 with loss scaling
    eval=Eval(every=1_000, rows=1_024),  # * every 40,000
    save=Save(every=1_000),
)

"""Mixtral-8x7B: 250,000 steps x 128 rows x 32,768 tokens = 1.05T tokens; 46,702,792,704 parameters.

    mosaicjax data build YOUR-TEXT --include '*.jsonl.xz' --held-out 0.000001 \
        --tokenizer mistral/tokenizer.model --out data/text-mistral
    mosaicjax train recipes/mixtral_8x7b.py --model.ffn.grouped MEGABLOX

The option is for TPUs, whose kernel multiplies a token with its own experts alone; RAGGED_DOT, which the
recipe names, runs on any device. 12.9B of the parameters work on a token. Mistral AI publishes neither
tokens, schedule, batch, loss, time nor cost, and mosaicjax was not measured at this size: what is assumed is
marked *. 128 rows divide over a slice of up to 128 chips; weights, gradients and Adam's moments in float32
take 747 GB in all. The reference attention holds a row's scores whole, 137 GB a layer at 32,768 tokens,
which no chip has room for: `--seq 4096 --batch 1024 --microbatch 128` are as many tokens a step.

Source: arXiv 2401.04088, table 1 and section 1 (sizes, experts, positions); `config.json` of
mistralai/Mixtral-8x7B-v0.1 (rotary theta, norm, balance loss, no window).
"""

from mosaicjax.data.mixture import TokenStore
from mosaicjax.layers.moe import Moe
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.losses import CrossEntropy
from mosaicjax.mesh import fsdp
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import mixtral
from mosaicjax.models.decoder import Remat
from mosaicjax.optim import AdamW, Cosine
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=mixtral.Config(
        layers=32,
        embed=4_096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        experts=8,
        ffn=Moe(
            top_k=2,
            aux_loss=0.02,
            z_loss=0.001,  # * ST-MoE's, arXiv 2202.08906
        ),
        vocab=32_000,
        position=Rotary(theta=1_000_000.0),
        norm=RmsNorm(eps=1e-5),
        window=0,
        remat=Remat.FULL,
    ),
    data=TokenStore("data/text-mistral"),
    seq=32_768,
    batch=128,  # * 4M tokens
    steps=250_000,  # * about 1T tokens
    seed=17,  # *
    optimizer=AdamW(
        lr=Cosine(peak=3e-4, warmup=2_000, final=0.1),  # * Llama 2's, arXiv 2307.09288, as all below
        b1=0.9,
        b2=0.95,
        eps=1e-5,
        weight_decay=0.1 * 3e-4,
    ),
    loss=CrossEntropy(chunk=512),
    methods=(ClipGradients(norm=1.0),),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),
    eval=Eval(every=5_000, rows=128),
    save=Save(every=1_000, keep_every=50_000),
)

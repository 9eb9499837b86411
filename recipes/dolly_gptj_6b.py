"""Dolly v1: GPT-J-6B fine-tuned on Alpaca; 797 steps x 8 rows x 1,024 tokens; 6,050,882,784 parameters.

    mosaicjax import gpt-j-6b --out models/gpt-j-6b
    mosaicjax data build alpaca_data.json.jsonl --template dolly --held-out 0.02 \
        --tokenizer gpt-j-6b --out data/alpaca-gptj
    mosaicjax train recipes/dolly_gptj_6b.py

Databricks trained it in 30 minutes on 8 A100-40GB: 4 GPU hours. No loss is published; mosaicjax was not
measured at this size. Loss is on the response and `### End` alone.

Theirs is an epoch of 51,002 examples, 64 a step, each padded to the longest of its batch: 797 steps. Here
examples are packed, kept apart, into rows of the same greatest length, of which 8 hold about as many.

Source: databrickslabs/dolly @f9fc005: train_dolly.py (epoch, 8 examples on each of 8 GPUs, rate), trainer.py
(length, seed, held-out examples, loss), config/ds_z3_bf16_config.json (AdamW, constant rate after no warm-up,
bfloat16); README.md (hardware, time). What these leave to "auto" are defaults of Transformers'
TrainingArguments: betas, eps, no weight decay, clipping at 1. Deviations are marked *. Not known: whether the
released weights are from just this revision.
"""

from mosaicjax.data.mixture import Rows, TokenStore
from mosaicjax.layers.position import Rotary
from mosaicjax.mesh import fsdp
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import gptj
from mosaicjax.models.decoder import Remat
from mosaicjax.optim import AdamW, Constant
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=gptj.Config(
        layers=28,
        embed=4_096,
        heads=16,
        mlp=4 * 4_096,
        vocab=50_400,
        position=Rotary(fraction=64 / 256, pairs="adjacent"),
        remat=Remat.FULL,  # gradient_checkpointing
    ),
    init_from="models/gpt-j-6b",
    data=TokenStore("data/alpaca-gptj", isolate=True, rows=Rows.BEST_FIT),  # * packed
    seq=1_024,
    batch=8,  # * 64 examples
    steps=797,
    seed=42,
    optimizer=AdamW(lr=Constant(peak=1e-5), b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0),
    methods=(ClipGradients(norm=1.0),),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),
    eval=Eval(every=100),
    save=Save(every=200, keep=1),
)

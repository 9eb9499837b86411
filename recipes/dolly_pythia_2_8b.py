"""Dolly v2: Pythia-2.8B on Dolly-15k; 617 steps x 8 rows x 1,024 tokens; 2,775,208,960 parameters.

    mosaicjax data add-tokens pythia-2.8b --out data/dolly-tokenizer \
        --special '### Instruction:' --special '### Response:' --special '### End'
    mosaicjax data build databricks-dolly-15k.jsonl --template dolly --held-out 0.013 \
        --tokenizer data/dolly-tokenizer --out data/dolly-15k
    mosaicjax import pythia-2.8b --out models/pythia-2.8b
    mosaicjax train recipes/dolly_pythia_2_8b.py

No loss or time is published for this size; mosaicjax was not measured at it. Loss is on the response and
`### End` alone. The three keys are tokens of their own (theirs takes in the line's end after the second);
their rows, among those that pad Pythia's table, begin as the mean of the others.

Theirs is two epochs of 14,811 examples, 48 a step: 617 steps. Here examples are packed, kept apart, into rows
of which 8 hold about 40.

Source: databrickslabs/dolly @10d0d65: train_dolly.py (2 epochs, 6 examples on each A100, 50 warm-up steps,
200 held out, rate), training/trainer.py (seed, loss), training/consts.py (keys), config/a100_config.json
(AdamW, constant rate after the warm-up, bfloat16). What these leave to "auto" are defaults of Transformers'
TrainingArguments: betas, eps, no weight decay, clipping at 1. Deviations are marked *. Not known: how many
GPUs the released 2.8B had; 8 are assumed.
"""

from mosaicjax.data.mixture import Rows, TokenStore
from mosaicjax.layers.position import Rotary
from mosaicjax.mesh import fsdp
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import neox
from mosaicjax.models.decoder import Remat
from mosaicjax.optim import AdamW, Constant
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=neox.Config(
        layers=32,
        embed=2_560,
        heads=32,
        mlp=4 * 2_560,
        vocab=50_304,
        position=Rotary(fraction=0.25),
        remat=Remat.FULL,  # gradient_checkpointing
    ),
    init_from="models/pythia-2.8b",
    data=TokenStore("data/dolly-15k", isolate=True, rows=Rows.BEST_FIT),  # * packed
    seq=1_024,  # * 2,048
    batch=8,  # * 48 examples
    steps=617,
    seed=42,
    optimizer=AdamW(
        lr=Constant(peak=5e-6, warmup=50),  # * DeepSpeed's WarmupLR grows with the logarithm of the step
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
    ),
    methods=(ClipGradients(norm=1.0),),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),
    eval=Eval(every=50),
    save=Save(every=200, keep=20),
)

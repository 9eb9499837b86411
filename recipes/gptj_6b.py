"""GPT-J-6B on the Pile: 383,500 steps x 512 rows x 2,048 tokens = 402B tokens; 6,050,882,784 parameters.

    mosaicjax data build pile --include '*.jsonl.xz' --held-out 0.00005 \
        --tokenizer gpt2/vocab.bpe --out data/pile-gpt2
    mosaicjax train recipes/gptj_6b.py

The authors trained it on a TPU v3-256 and state neither loss nor hours; mosaicjax was not measured at this
size. 512 rows divide over a slice of up to 512 chips.

The authors' count is 6,053,381,344. It takes every norm and every output bias of an MLP eight times, one for
each of 8 model shards, and 8 biases of the embedding, which their exporter folds into the table: 2,498,560
more. 6,050,882,784 is what EleutherAI/gpt-j-6b in Hugging Face format holds, and what is here.

Source: kingoflolz/mesh-transformer-jax configs/6B_roto_256.json @f8315e3 for every number; README.md (sizes,
count); mesh_transformer/layers.py (init, z-loss), util.py (schedule, decay), train.py (optimizer, clipping);
model card of EleutherAI/gpt-j-6b (steps, tokens). Deviations are marked *.
"""

from mosaicjax.data.mixture import TokenStore
from mosaicjax.layers.inits import SmallInit
from mosaicjax.layers.position import Rotary
from mosaicjax.losses import CrossEntropy
from mosaicjax.mesh import fsdp
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import gptj
from mosaicjax.models.decoder import Remat
from mosaicjax.optim import AdamW, Cosine
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=gptj.Config(
        layers=28,
        embed=4_096,
        heads=16,
        mlp=4 * 4_096,
        vocab=50_400,  # GPT-2's 50,257, to divide over the model shards
        position=Rotary(fraction=64 / 256, pairs="adjacent"),
        init=SmallInit(gain=1.0, embed_std=50_400**-0.5),  # * normal, not cut off at two deviations
        remat=Remat.FULL,
    ),
    data=TokenStore("data/pile-gpt2"),
    seq=2_048,
    batch=512,  # 256 cores / 8 a replica x 1 row x 16 accumulated
    steps=383_500,  # of the released checkpoint; the file's total_steps is 350,000
    seed=42,
    optimizer=AdamW(
        lr=Cosine(peak=1.2e-4, warmup=3_000, over=300_000, final=0.1),
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.1 * 1.2e-4,  # weight_decay 0.1, a factor of the rate
    ),
    loss=CrossEntropy(z_loss=1e-4),  # * theirs weighs the log-partition above the largest logit
    methods=(ClipGradients(norm=1.0),),
    mesh=fsdp(),  # * 8 model shards
    dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),  # * gradients summed in bfloat16
    eval=Eval(every=500, rows=3_200),
    save=Save(every=500, keep_every=10_000),
)

"""A quickstart-sized model fine-tuned on instructions, in minutes on two CPU cores; 6,030,720 parameters.

    make quickstart
    mosaicjax data build MY.jsonl --template plain --held-out 0.1 \
        --tokenizer build/quickstart/tokenizer --out build/instruct/store
    mosaicjax train recipes/instruct.py

Rows of MY.jsonl are prompts and responses, or instructions, messages or conversations, as `data build` reads
them. Another run to start from and another store are `--init-from RUN --data.path STORE`. For adapters alone
`methods=(ClipGradients(norm=1.0), LoRA(rank=16, alpha=32.0))` and a peak rate of 5e-3.

100 steps x 8 rows x 256 tokens. Held-out response loss is printed before the first step and after the last.

Source: the model is the quickstart's; rate and steps come from a few trials on 1,000 rows of dolly_hhrlhf,
not from a search.
"""

from mosaicjax.data.mixture import Rows, TokenStore
from mosaicjax.hardware import Price
from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.inits import Kaiming
from mosaicjax.layers.mlp import Activation, Mlp
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.layers.token_inputs import Bigram
from mosaicjax.mesh import fsdp
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import mpt
from mosaicjax.models.decoder import Remat
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
        position=Rotary(),
        norm=RmsNorm(),
        ffn=Mlp(Activation.RELU_SQUARED),
        qk_norm=QkNorm(RmsNorm(), per_head=True),
        tied=False,
        inputs=(Bigram(32_768),),
        init=Kaiming(zero_residual=True),
        remat=Remat.PRODUCTS,
    ),
    init_from="runs/quickstart",
    data=TokenStore("build/instruct/store", isolate=True, rows=Rows.BEST_FIT),
    seq=256,
    batch=8,
    steps=100,
    seed=17,
    optimizer=AdamW(lr=Cosine(peak=1e-3, warmup=20, final=0.1), b1=0.9, b2=0.95),
    methods=(ClipGradients(norm=1.0),),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="float32", reduce="float32"),
    eval=Eval(every=50),
    save=Save(every=50),
    price=Price(0.10, "an assumption, for a small cloud machine: put yours here", "2026-11-23"),
)

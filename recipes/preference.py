"""A quickstart-sized model taught by preference pairs, in minutes on two CPU cores; 6,030,720 parameters.

    make quickstart
    mosaicjax data build PAIRS.jsonl --template plain --held-out 0.1 \
        --tokenizer build/quickstart/tokenizer --out build/preference/store
    mosaicjax train recipes/preference.py

Rows of PAIRS.jsonl are `{prompt, chosen, rejected}`, texts or lists of messages. Another run to start from,
such as one of instruct.py, and another store are `--init-from RUN --data.path STORE`. For adapters alone,
with no second copy of the weights, `methods=(ClipGradients(norm=1.0), LoRA(rank=16, alpha=32.0), DPO())` and
a peak rate of 1e-3.

100 steps x 8 rows x 512 tokens. Loss, margin and accuracy on held-out pairs are printed before the first
step, where nothing is told apart yet and the loss is 0.6931, and after the last.

Source: the model is the quickstart's; beta is that of Rafailov et al. 2023, arXiv 2305.18290, appendix B,
whose rate of 1e-6 is for models of billions: this one is a tenth of instruct.py's, and not searched for.
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
from mosaicjax.methods.dpo import DPO
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
    data=TokenStore("build/preference/store", isolate=True, rows=Rows.PAIRS),
    seq=512,
    batch=8,
    steps=100,
    seed=17,
    optimizer=AdamW(lr=Cosine(peak=1e-4, warmup=10, final=0.1), b1=0.9, b2=0.95),
    methods=(ClipGradients(norm=1.0), DPO(beta=0.1)),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="float32", reduce="float32"),
    eval=Eval(every=50),
    save=Save(every=50),
    price=Price(0.10, "an assumption, for a small cloud machine: put yours here", "2026-11-23"),
)

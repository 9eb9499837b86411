"""MPT-7B-Instruct: MPT-7B on dolly_hhrlhf; 2,471 steps x 8 rows x 1,024 tokens; 6,649,286,656 parameters.

    mosaicjax import mpt-7b --out models/mpt-7b
    mosaicjax data build dolly_hhrlhf/train.jsonl --template plain --held-out 0.02 \
        --tokenizer gpt-neox-20b --out data/dolly-hhrlhf
    mosaicjax train recipes/mpt_7b_instruct.py

MosaicML trained it in about 2.3 hours on 8 A100-40GB with AdamW: 18 GPU hours. No loss is published, and
mosaicjax was not measured at this size. The rows' prompts have their instructions around them already, so the
template is `plain`; loss is on the responses alone.

The rate and all else of that run are not published. What is here is llm-foundry's recipe for the same model
and data: two epochs of 59,310 examples, 48 a step, 2,471 steps. Here examples are packed, kept apart, into
rows of which 8 hold about as many (a row of the data has 738 bytes on average).

Source: model card of mosaicml/mpt-7b-instruct (hardware, time, data, optimizer); dataset card of
mosaicml/dolly_hhrlhf; llm-foundry @0160431 scripts/train/yamls/finetune/mpt-7b_dolly_sft.yaml for every
number. Deviations are marked *.
"""

from mosaicjax.data.mixture import Rows, TokenStore
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import Alibi
from mosaicjax.mesh import fsdp
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import mpt
from mosaicjax.models.decoder import Remat
from mosaicjax.optim import AdamW, Linear
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=mpt.Config(
        layers=32,
        embed=4_096,
        heads=32,
        mlp=4 * 4_096,
        vocab=50_432,
        position=Alibi(max_bias=8),
        norm=LayerNorm(bias=False),  # * computed in float32: low_precision_layernorm in bfloat16
        remat=Remat.FULL,
    ),
    init_from="models/mpt-7b",
    data=TokenStore("data/dolly-hhrlhf", isolate=True, rows=Rows.BEST_FIT),  # * packed
    seq=1_024,  # * 2,048
    batch=8,  # * 48 examples
    steps=2_471,
    seed=17,
    optimizer=AdamW(lr=Linear(peak=5e-6, warmup=50, final=0.0), b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0),
    methods=(ClipGradients(norm=1.0),),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),
    eval=Eval(every=1_235),
    save=Save(every=1_235, keep=1),
)

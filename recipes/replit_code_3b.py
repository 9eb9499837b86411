"""replit-code-v1-3b: 250,340 steps x 1,024 rows x 2,048 tokens = 525B of code; 2,600,634,880 parameters.

    mosaicjax data build the-stack-dedup --include '*.jsonl.xz' --field content --held-out 0.0001 \
        --tokenizer replit-code-v1-3b/spiece.model --out data/stack-replit
    mosaicjax train recipes/replit_code_3b.py

Replit trained it on 256 A100-40GB: 175B tokens of 20 languages, three times; HumanEval pass@1 0.219. No loss
and no hours are published; mosaicjax was not measured at this size. 1,024 rows divide over a slice of up to
1,024 chips.

The model card says 2.7B parameters, and 195 tokens for each of them; the sizes in its `config.json` make
2,600,634,880, which is 202.

Source: model card of replit/replit-code-v1-3b (data, tokens, chips, Lion); replit/ReplitLM
replit-code-v1-3b/config.json @1a42199 (sizes, vocabulary, ALiBi, no biases, init). Batch, rate and schedule
are not published: what is assumed or deviates is marked *.
"""

from mosaicjax.data.mixture import TokenStore
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import Alibi
from mosaicjax.mesh import fsdp
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import mpt
from mosaicjax.models.decoder import Remat
from mosaicjax.optim import Cosine, Lion
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=mpt.Config(
        layers=32,
        embed=2_560,
        heads=32,
        mlp=4 * 2_560,
        vocab=32_768,
        position=Alibi(max_bias=8),
        norm=LayerNorm(bias=False),  # * computed in float32: low_precision_layernorm in bfloat16
        remat=Remat.FULL,  # llm-foundry mpt-3b.yaml: activation_checkpointing
    ),
    data=TokenStore("data/stack-replit"),
    seq=2_048,
    batch=1_024,  # * assumed: 2M tokens
    steps=250_340,
    seed=17,  # * assumed, as in llm-foundry's YAMLs
    optimizer=Lion(
        lr=Cosine(
            peak=5.3e-5,  # * assumed: 1/3 of mpt-3b.yaml's AdamW, 1.6e-4 (arXiv 2302.06675, section 5)
            warmup=5_000,  # * assumed: MosaicML's of another Lion run (llm-foundry issue 317)
            final=0.1,  # * assumed, as in mpt-3b.yaml
        ),
        b1=0.9,  # * assumed, as b2 and the decay: defaults of llm-foundry's DecoupledLionW
        b2=0.99,
        weight_decay=0.0,
    ),
    methods=(ClipGradients(norm=1.0),),  # * assumed, as in mpt-3b.yaml
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),
    eval=Eval(every=2_000, rows=2_048),
    save=Save(every=1_000, keep_every=50_000),
)

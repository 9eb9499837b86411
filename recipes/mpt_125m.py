"""MPT-125M on C4: 4,800 steps x 256 rows x 2,048 tokens = 2.5B tokens; 125,311,488 parameters.

    mosaicjax data build c4/en --include '*.jsonl.gz' --held-out 0.0001 \
        --tokenizer gpt-neox-20b/tokenizer.json --out data/c4-gpt-neox
    mosaicjax train recipes/mpt_125m.py

C4's `en` files come as .json.gz: rename them to .jsonl.gz. No loss is published for this run. llm-foundry
itself makes 1,133,901 tokens a second of this model on 8 A100-80GB (at twice this batch): 37 minutes and $17
at the list price in mosaicjax/hardware.py. mosaicjax was not measured there.

llm-foundry's defaults, learned positions and biases, are kept, so that the count is the published one;
MPT-7B's choices are `position=Alibi()`, `norm=LayerNorm(bias=False)` and no `bias`.

Source: llm-foundry scripts/train/yamls/pretrain/mpt-125m.yaml @8c8dd48 for every number; parameters and
speed: scripts/train/benchmarking/README.md, table of A100-80GB. Deviations are marked *.
"""

from mosaicjax.data.mixture import TokenStore
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import Learned
from mosaicjax.mesh import fsdp
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import mpt
from mosaicjax.optim import AdamW, Cosine
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=mpt.Config(
        layers=12,
        embed=768,
        heads=12,
        mlp=4 * 768,
        vocab=50_368,
        position=Learned(2_048),
        norm=LayerNorm(),  # * computed in float32: low_precision_layernorm in bfloat16
        bias=True,
    ),
    data=TokenStore("data/c4-gpt-neox"),
    seq=2_048,
    batch=256,
    microbatch=16,  # of all devices: more than 16 of them want more (the YAML: 16 each)
    steps=4_800,
    seed=17,
    optimizer=AdamW(lr=Cosine(peak=6e-4, warmup=100, final=0.1), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0),
    methods=(ClipGradients(norm=1.0),),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),  # * PURE sums gradients in bfloat16
    eval=Eval(every=500, rows=2_048),  # * all held-out rows
    save=Save(every=500),
)

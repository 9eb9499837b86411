"""MPT-1B on C4: 24,800 steps x 512 rows x 2,048 tokens = 26B tokens; 1,315,950,592 parameters.

    mosaicjax data build c4/en --include '*.jsonl.gz' --held-out 0.0001 \
        --tokenizer gpt-neox-20b/tokenizer.json --out data/c4-gpt-neox
    mosaicjax train recipes/mpt_1b.py

C4's `en` files come as .json.gz: rename them to .jsonl.gz. No loss is published for this run. llm-foundry
itself makes 164,109 tokens a second of this model on 8 A100-80GB: 44 hours and $1,208 at the list price in
mosaicjax/hardware.py; on 128 H100 5,647,854 a second, 1 h 17 min. mosaicjax was not measured there.

Source: llm-foundry scripts/train/yamls/pretrain/mpt-1b.yaml @8c8dd48 for every number; parameters and speed:
scripts/train/benchmarking/README.md. Deviations are marked *.
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
        layers=24,
        embed=2_048,
        heads=16,
        mlp=4 * 2_048,
        vocab=50_368,
        position=Learned(2_048),
        norm=LayerNorm(),  # * computed in float32: low_precision_layernorm in bfloat16
        bias=True,
    ),
    data=TokenStore("data/c4-gpt-neox"),
    seq=2_048,
    batch=512,
    microbatch=32,  # of all devices: more than 32 of them want more (the YAML: 4 each)
    steps=24_800,
    seed=17,
    optimizer=AdamW(lr=Cosine(peak=2e-4, warmup=100, final=0.1), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0),
    methods=(ClipGradients(norm=1.0),),
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),  # * PURE sums gradients in bfloat16
    eval=Eval(every=2_000, rows=2_048),  # * all held-out rows
    save=Save(every=2_000),
)

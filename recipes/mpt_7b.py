"""MPT-7B: 277,433 steps x 1,760 rows x 2,048 tokens = 1T tokens; 6,649,286,656 parameters.

    mosaicjax data build mpt-mix --include '*.jsonl.xz' --held-out 0.00001 \
        --tokenizer gpt-neox-20b/tokenizer.json --out data/mpt-mix-gpt-neox
    mosaicjax train recipes/mpt_7b.py

MosaicML trained it in 9.5 days on 440 A100-40GB for about $200,000, $0.20 a million tokens; 100,320 GPU
hours are $275,000 at the list price in mosaicjax/hardware.py. No loss is published; the mix of data is in
the model card. mosaicjax was not measured at this size.

1,760 rows divide over 440 GPUs or a TPU slice of up to 32 chips. For a slice of 64 to 256: `--batch 1792
--steps 272479`.

Source: model card of mosaicml/mpt-7b (sizes, vocabulary, batch, tokens, time, no biases, ALiBi, Lion);
mosaicml.com/blog/mpt-7b (cost); checkpoint: 13,298,573,312 bytes of bfloat16. The run's rate and schedule
are not published (llm-foundry issues 70 and 457): what is assumed or deviates is marked *.
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
        embed=4_096,
        heads=32,
        mlp=4 * 4_096,
        vocab=50_432,
        position=Alibi(max_bias=8),
        norm=LayerNorm(bias=False),  # * computed in float32: low_precision_layernorm in bfloat16
        remat=Remat.FULL,  # llm-foundry mpt-7b.yaml: activation_checkpointing
    ),
    data=TokenStore("data/mpt-mix-gpt-neox"),
    seq=2_048,
    batch=1_760,
    steps=277_433,
    seed=17,  # * assumed, as in llm-foundry's YAMLs
    optimizer=Lion(
        lr=Cosine(
            peak=4e-5,  # * assumed: 1/3 of mpt-7b.yaml's AdamW, 1.2e-4 (arXiv 2302.06675, section 5)
            warmup=5_000,  # * assumed: MosaicML's of another Lion run (llm-foundry issue 317)
            final=0.1,  # * assumed, as in mpt-7b.yaml
        ),
        b1=0.9,  # * assumed, as b2 and the decay: defaults of llm-foundry's DecoupledLionW
        b2=0.99,
        weight_decay=0.0,
    ),
    methods=(ClipGradients(norm=1.0),),  # * assumed, as in mpt-7b.yaml
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),
    eval=Eval(every=5_000, rows=3_520),
    save=Save(every=1_000, keep_every=50_000),
)

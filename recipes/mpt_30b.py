"""MPT-30B: 277,433 steps x 1,760 rows x 2,048 tokens = 1T tokens, then 50B at 8k; 29,957,200,896 parameters.

    mosaicjax data build mpt-mix --include '*.jsonl.xz' --held-out 0.00001 \
        --tokenizer gpt-neox-20b/tokenizer.json --out data/mpt-mix-gpt-neox
    mosaicjax train recipes/mpt_30b.py
    mosaicjax train recipes/mpt_30b.py --init-from runs/mpt_30b --out runs/mpt_30b-8k \
        --seq 8192 --batch 512 --microbatch 256 --steps 11921

No loss, time or cost is published for the run itself. llm-foundry makes 281,491 tokens a second of a model
of this size on 128 H100: 41 days and $869,000 for 1T tokens at the list price in mosaicjax/hardware.py.
mosaicjax was not measured at this size. The second stage's rate is not published either; as it stands it is
the first's.

1,760 rows divide over 440 GPUs or a TPU slice of up to 32 chips, which are too few: for one of 64 to 256
`--batch 1792 --steps 272479`.

Source: model card of mosaicml/mpt-30b (sizes, vocabulary, stages, batches, tokens, no biases, ALiBi, Lion);
speed: llm-foundry scripts/train/benchmarking/README.md @8c8dd48. The run's rate and schedule are not
published: what is assumed or deviates is marked *.
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
        layers=48,
        embed=7_168,
        heads=64,
        mlp=4 * 7_168,
        vocab=50_432,
        position=Alibi(max_bias=8),
        norm=LayerNorm(bias=False),  # * computed in float32: low_precision_layernorm in bfloat16
        remat=Remat.FULL,  # llm-foundry mpt-30b.yaml: activation_checkpointing
    ),
    data=TokenStore("data/mpt-mix-gpt-neox"),
    seq=2_048,
    batch=1_760,  # * the first stage's throughout; the second's were 1,728, from a step not given
    steps=277_433,
    seed=17,  # * assumed, as in llm-foundry's YAMLs
    optimizer=Lion(
        lr=Cosine(
            peak=3.3e-5,  # * assumed: 1/3 of mpt-30b.yaml's AdamW, 1e-4 (arXiv 2302.06675, section 5)
            warmup=5_000,  # * assumed: MosaicML's of another Lion run (llm-foundry issue 317)
            final=0.1,  # * assumed, as in mpt-30b.yaml
        ),
        b1=0.9,  # * assumed, as b2 and the decay: defaults of llm-foundry's DecoupledLionW
        b2=0.99,
        weight_decay=0.0,
    ),
    methods=(ClipGradients(norm=1.0),),  # * assumed, as in mpt-30b.yaml
    mesh=fsdp(),
    dtypes=Dtypes(param="float32", compute="bfloat16", reduce="float32"),
    eval=Eval(every=5_000, rows=3_520),
    save=Save(every=1_000, keep_every=50_000),
)

"""The coordinate check: with width transfer, outputs move as far in some steps at any width."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaicjax.layers.context import RowOnly
from mosaicjax.layers.inits import InitRule
from mosaicjax.mesh import shardings
from mosaicjax.methods.width_transfer import Sizes, WidthTransfer
from mosaicjax.models import mpt
from mosaicjax.optim import AdamW, Constant
from mosaicjax.program import Phase
from tests import stepping

KINDS = ("embeddings", "attention", "mlp", "logits")


def outputs(decoder, weights, batch, context):
    """What each kind of layer gives, of all layers together, by the layers' own functions one by one."""
    x_BLD = decoder.embed(weights, batch["tokens"], context)
    found = {"embeddings": [x_BLD], "attention": [], "mlp": []}
    (block,) = decoder.stacks[0].block
    for n in range(decoder.layers):
        mine = jax.tree.map(lambda leaf, n=n: leaf[n], weights["stacks"][0][0]["layer"])
        normed = block.norm.apply(mine["attention_norm"], x_BLD, context.dtypes)
        mixed, _ = block.attention.apply(mine["attention"], normed, context, RowOnly(), 0)
        x_BLD = x_BLD + mixed
        worked = block.mlp.apply(
            mine["mlp"], block.norm.apply(mine["mlp_norm"], x_BLD, context.dtypes), context
        )
        x_BLD = x_BLD + worked
        found["attention"].append(mixed)
        found["mlp"].append(worked)
    hidden_BLD = decoder.norm.apply(weights["norm"], x_BLD, context.dtypes)
    found["logits"] = [decoder.logits(decoder.head(weights, context), hidden_BLD, context)]
    return {kind: jnp.stack(arrays) for kind, arrays in found.items()}


def changes(width, base, tied, steps=3):
    """Root mean square of how far each kind's output moves in some steps at the same rate."""
    # Little is drawn for the logits: that part fades with the width, and is no part of what is learnt.
    sizes = {"layers": 2, "embed": width, "heads": width // 32, "mlp": 2 * width, "vocab": 64}
    decoder = mpt.Config(**sizes, tied=tied, init=InitRule(std=0.02)).build()
    phase, layout = Phase(seq=32, batch=4, microbatch=4), stepping.alone()
    program = stepping.program(decoder, phase, optimizer=AdamW(lr=Constant(peak=1e-3)))
    if base is not None:
        program = WidthTransfer(base)(program)
    weights = program.trainable.init(jax.random.key(1), "float32", shardings(program.trainable, layout))
    batch = {name: jnp.asarray(value) for name, value in stepping.rows(phase, 64).items()}
    context = program.loss.context(batch, layout)

    @jax.jit
    def step(weights, state):
        def loss(weights):
            total, weight, *_ = program.loss(weights, {}, {}, batch, jax.random.key(0), layout)
            return total / weight

        loss, grads = jax.value_and_grad(loss)(weights)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = program.optimizer.update(grads, state, weights)
            return loss, optax.apply_updates(weights, updates), state

    look = jax.jit(lambda weights: outputs(decoder, weights, batch, context))
    before, state = look(weights), program.optimizer.init(weights)
    log_p_BLV = jax.nn.log_softmax(before["logits"][0])
    nll_BL = -jnp.take_along_axis(log_p_BLV, batch["targets"][..., None], axis=-1)[..., 0]
    expected = jnp.sum(nll_BL * batch["weights"]) / jnp.sum(batch["weights"])
    for number in range(steps):
        loss, weights, state = step(weights, state)
        if not number:
            # What is looked at is what is trained.
            np.testing.assert_allclose(loss, expected, rtol=1e-4)
    after = look(weights)
    return [float(jnp.sqrt(jnp.mean(jnp.square(after[kind] - before[kind])))) for kind in KINDS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "widths"),
    [
        pytest.param(True, (128, 256, 512, 1_024), marks=pytest.mark.soak),
        (True, (128, 512)),
        (False, (128, 512)),
    ],
    ids=["tied, to 1,024", "tied", "untied"],
)
def test_coordinates_move_alike_at_any_width(tied, widths):
    base = Sizes(embed=128, heads=4, mlp=256)
    growth = {}
    for name, method in (("with", base), ("without", None)):
        table = np.array([changes(width, method, tied) for width in widths])
        growth[name] = np.polyfit(np.log2(widths), np.log2(table), 1)[0]
        print(f"\n{name} width transfer, root mean square of changes:\n width  " + "  ".join(KINDS))
        for width, row in (*zip(widths, table, strict=True), ("growth", growth[name])):
            shown = (f"{x:{len(kind)}.3f}" for kind, x in zip(KINDS, row, strict=True))
            print(f"{width:>6}  " + "  ".join(shown))
    # Powers of the width: 0 is flat.
    assert (np.abs(growth["with"]) < 0.25).all(), growth
    assert growth["without"][1:].min() > 0.6, growth

"""A model of a few hundred weights, stacked ones among them, that a step compiles in no time."""

from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaicjax.layers.linear import linear
from mosaicjax.losses import nll
from mosaicjax.mesh import BATCH, Mesh, gather_tree
from mosaicjax.optim import AdamW, Constant
from mosaicjax.program import Phase, Program
from mosaicjax.spec import ONES, Dtypes, FanIn, Layers, Param, Spec, join
from mosaicjax.step import Step
from tests import stepping, tiny

VOCAB, EMBED, LAYERS, SEQ, BATCH_ROWS = 16, 8, 4, 4, 8
LAYER = {
    "mix": Param(("embed", "mlp"), FanIn(("embed",))),
    "gain": Param(("embed",), ONES, decay=False),
}
SPEC = Spec(
    {
        "embed": Param(("vocab", "embed"), FanIn(("embed",))),
        "stacks": [
            {
                "layer": {
                    name: replace(param, layers=Layers(first, 2, LAYERS // 2))
                    for name, param in LAYER.items()
                }
            }
            for first in (0, 1)
        ],
        "norm": Param(("embed",), ONES, decay=False),
    },
    {"vocab": VOCAB, "embed": EMBED, "mlp": EMBED},
)
NAMES = [name for name, _ in SPEC.items()]
ONE = Mesh(fsdp=(1,))
MESHES = {
    "compiler": Mesh(data=2, fsdp=(2,), tensor=2),
    "explicit": Mesh(data=2, fsdp=(2,), tensor=2, gather="explicit"),
}


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of a stack of tanh layers on each token by itself; layers take turns in two stacks."""

    dtypes: Dtypes = Dtypes()

    def __call__(self, trainable, frozen, state, batch, key, layout, step=0):
        nll_BL = self.nll(join(trainable, frozen), batch, layout)
        total = jnp.sum(nll_BL * batch["weights"])
        return total, jnp.sum(batch["weights"]), {"loss": total}, state

    def of_rows(self, trainable, frozen, batch, key, layout):
        return jnp.sum(self.nll(join(trainable, frozen), batch, layout) * batch["weights"], axis=1)

    def nll(self, weights, batch, layout):
        def ready(tree, params):
            return gather_tree(tree, params, layout, self.dtypes)

        table_VD = ready(weights["embed"], SPEC.tree["embed"])
        x_BLD = layout.constrain(jnp.take(table_VD, batch["tokens"], axis=0), BATCH, None, None)
        for n in range(LAYERS):
            mine = jax.tree.map(lambda leaf, n=n: leaf[n // 2], weights["stacks"][n % 2])
            whole = ready(mine, SPEC.tree["stacks"][n % 2])["layer"]
            x_BLD = jnp.tanh(linear(x_BLD * whole["gain"][None, None], whole["mix"]))
        x_BLD = x_BLD * ready(weights["norm"], SPEC.tree["norm"])[None, None]
        return nll(4.0 * x_BLD @ table_VD.T, batch["targets"])[0]


def program(*, microbatch=BATCH_ROWS, optimizer=None, dtypes=None, steps=30):
    """The program of these weights; Adam at a constant rate, where nothing else is said."""
    optimizer = optimizer or AdamW(lr=Constant(peak=1e-2), weight_decay=1e-3)
    dtypes = dtypes or Dtypes()
    built, rate = optimizer.build(SPEC, steps), optimizer.lr.build(steps)
    phase = Phase(SEQ, BATCH_ROWS, microbatch)
    return Program(SPEC, Spec({}, {}), {}, Loss(dtypes), built, rate, phase, dtypes, steps=steps)


def descent(rate=0.5, **options):
    """A program that steps down the gradient by `rate` of it."""
    return replace(program(**options), optimizer=optax.sgd(rate))


def step_of(made, mesh=ONE):
    """The step on one device, or on eight."""
    return Step(made, stepping.place(mesh, 1 if mesh is ONE else 8), seed=0)


@lru_cache
def whole_start():
    """The first weights that a step draws from its seed when all of them are trained, as numpy."""
    with tiny.quick():
        return jax.tree.map(np.asarray, step_of(program()).init().trainable)


def batch(number=0):
    """Rows with a ragged loss mask."""
    return stepping.rows(Phase(SEQ, BATCH_ROWS, 1), VOCAB, number)


def run(made, steps, mesh=ONE):
    """The state before the first step and after each, as numpy, the metrics of each, and the last state."""
    step = step_of(made, mesh)
    with tiny.quick():
        compiled, state, frozen = step.lower().compile(), step.init(), step.init_frozen()
        states, metrics = [jax.tree.map(np.asarray, state)], []
        for number in range(steps):
            rows = stepping.put(step, batch(number))
            state, _, measured = compiled(state, frozen, rows, stepping.signals(step))
            states.append(jax.tree.map(np.asarray, state))
            metrics.append({name: float(value) for name, value in measured.items()})
    return states, metrics, state


def naive_gradients(weights, rows):
    """Gradients of the mean loss over target tokens, on one device in one piece, as numpy; and the loss."""

    with tiny.quick():
        loss, grads = naive()(weights, rows)
    return jax.tree.map(np.asarray, grads), float(loss)


@lru_cache
def naive():
    """The mean loss over target tokens and its gradient, compiled once."""

    def objective(weights, rows):
        nll_BL = Loss().nll(weights, rows, stepping.alone())
        return jnp.sum(nll_BL * rows["weights"]) / jnp.sum(rows["weights"])

    return jax.jit(jax.value_and_grad(objective))


def close(got, expected, rtol=1e-5, atol=1e-7):
    """Two trees of arrays agree, leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)

"""Driving a train step without the loop, for tests: programs, batches and runs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax.losses import CrossEntropy
from mosaicjax.mesh import Mesh, global_array, shardings
from mosaicjax.optim import AdamW, Cosine
from mosaicjax.program import DecoderLoss, Program
from mosaicjax.spec import Dtypes, Spec
from mosaicjax.step import Signals

ADAM = AdamW(lr=Cosine(peak=3e-3, warmup=3), weight_decay=1e-4)
EMPTY = Spec({}, {})
PLAIN = CrossEntropy()
FLOAT32 = Dtypes()


def program(decoder, phase, *, loss=PLAIN, dtypes=FLOAT32, packed=False, optimizer=ADAM, measure=False):
    spec = decoder.spec()
    return Program(
        spec,
        EMPTY,
        {},
        DecoderLoss(decoder, loss, dtypes, packed=packed, measure=measure),
        optimizer.build(spec, 30),
        optimizer.lr.build(30),
        phase,
        dtypes,
    )


def place(mesh, devices):
    return mesh.build(jax.devices()[:devices])


def rows(phase, vocab, number=0, packed=False):
    """A batch of `phase.batch` rows with a ragged loss mask."""
    rng = np.random.default_rng(number)
    tokens = rng.integers(0, vocab, (phase.batch, phase.seq + 1)).astype(np.int32)
    weights = (rng.random((phase.batch, phase.seq)) < rng.random((phase.batch, 1))).astype(np.float32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "row": np.arange(phase.batch, dtype=np.int32),
    }
    if packed:
        cut = rng.integers(1, phase.seq, (phase.batch, 1))
        at = np.arange(phase.seq)[None]
        batch["segments"] = np.where(at < cut, 1, 2).astype(np.int32)
        batch["positions"] = np.where(at < cut, at, at - cut).astype(np.int32)
    return batch


def put(step, batch):
    """The batch as the step takes it: microbatches first, the last filled up with rows of weight 0."""
    held = {}
    for name, (shape, dtype, axes) in step.batch_shapes().items():
        full = np.zeros((shape[0] * shape[1], *shape[2:]), dtype)
        full[: len(batch[name])] = batch[name]
        value = full.reshape(shape)
        held[name] = global_array(step.layout, shape, axes, lambda index, value=value: value[index])
    return held


def signals(step, halted=False, stop=0):
    mesh = step.layout.mesh
    return Signals(
        jax.device_put(jnp.asarray(halted), NamedSharding(mesh, P())),
        jax.device_put(np.full(mesh.size, stop, np.int32), NamedSharding(mesh, P(mesh.axis_names))),
    )


def gradients(step, trainable, batch, key=0):
    """Summed gradients and the loss's sums, as numpy."""
    places = shardings(step.program.trainable, step.layout)
    trainable = jax.tree.map(jax.device_put, trainable, places)
    run = jax.jit(step.gradients, out_shardings=(places, None))
    grads, (objective, weight, _, _) = run(trainable, {}, {}, put(step, batch), jax.random.key(key))
    return jax.tree.map(np.asarray, grads), float(objective), float(weight)


def train(step, vocab, steps, packed=False):
    """Loss and gradient norm of each step, the last metrics and the last state."""
    compiled = step.lower().compile()
    state, path = step.init(), []
    for number in range(steps):
        batch = put(step, rows(step.program.phase, vocab, number, packed))
        state, _, metrics = compiled(state, {}, batch, signals(step))
        path.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(path), metrics, state


def alone():
    return place(Mesh(fsdp=(1,)), 1)

"""The one train step, that both the loop and a planner compile."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax.accumulate import Sums, accumulate
from mosaicjax.errors import InputError
from mosaicjax.mesh import BATCH, Layout, shardings
from mosaicjax.program import (
    ACTIVATION_SQUARES,
    DOMAIN_NLL,
    DOMAIN_TOKENS,
    TOKENS,
    Batch,
    Measured,
    Phase,
    Program,
)
from mosaicjax.spec import Param, Referenced, Spec, Tree, at_least_float32, is_param, path_name


@struct.dataclass
class TrainState:
    """What a step changes, and a checkpoint holds.

    `step` counts the steps done; it is also the number of the next one, from 0. `average` is the weights'
    running average, None where the program has none.
    """

    step: Any
    trainable: Any
    optimizer: Any
    program: Any
    average: Any = None


@struct.dataclass
class Signals:
    """What passes through a step beside the state.

    `halted`: a loss, gradient or update was not finite at an earlier step; nothing is changed any more.
    `stop`, one flag a device: 1 where a process wants all to stop, 2 where it cannot go on.
    """

    halted: Any
    stop: Any


@struct.dataclass
class SummedGrads:
    """Gradients summed over what the loss counts, what makes means of them, and the means' norm."""

    tree: Any
    share: Any
    norm: Any

    def means(self) -> Any:
        """The gradients of the mean loss."""
        return jax.tree.map(lambda grad: grad * self.share.astype(grad.dtype), self.tree)


@dataclass(frozen=True)
class Step:
    """A program on a layout, ready to be compiled.

    `measure` adds each layer's norms of gradients and updates to the metrics.
    """

    program: Program
    layout: Layout
    seed: int
    measure: bool = False

    def __post_init__(self) -> None:
        self.layout.check(self.program.trainable)
        self.layout.check(self.program.frozen)
        check_batch(self.program.phase, self.layout)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and places of the state, with nothing allocated."""
        program, layout = self.program, self.layout
        trainable = program.trainable.abstract(program.dtypes.param, shardings(program.trainable, layout))
        everywhere = NamedSharding(layout.mesh, P())

        def copied(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

        optimizer = jax.tree.map(copied, jax.eval_shape(program.optimizer.init, trainable))

        def as_weight(leaf: Any, weight: Any) -> Any:
            if isinstance(leaf, optax.MaskedNode):
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=weight.sharding)

        optimizer = optax.tree_map_params(
            program.optimizer,
            as_weight,
            optimizer,
            trainable,
            is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
        )
        state = jax.tree.map(copied, jax.eval_shape(lambda: program.state))
        average = None
        if program.average is not None:
            wide = at_least_float32(program.dtypes.param)
            average = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, wide, sharding=leaf.sharding), trainable
            )
        step = copied(jax.ShapeDtypeStruct((), jnp.int32))
        return TrainState(step, trainable, optimizer, state, average)

    def init(self) -> TrainState:
        """The state before the first step, drawn from the seed straight onto its shards."""
        return self.start(self.drawn(self.program.trainable))

    def init_frozen(self) -> Any:
        """The frozen weights, and those of a reference, drawn as `init` draws."""
        return self.held(self.drawn)

    def drawn(self, spec: Spec) -> Any:
        """Weights drawn from the seed straight onto their shards."""
        return spec.init(jax.random.key(self.seed), self.program.dtypes.param, shardings(spec, self.layout))

    def held(self, made: Callable[[Spec], Any]) -> Any:
        """What a step takes beside the state, as made of the declarations: see `Referenced`."""
        program = self.program
        frozen = made(program.frozen)
        return Referenced(frozen, made(program.trainable)) if program.referenced else frozen

    def start(self, trainable: Any) -> TrainState:
        """The state before the first step, from given weights."""
        abstract = self.abstract_state()
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        optimizer = jax.jit(self.program.optimizer.init, out_shardings=places.optimizer)(trainable)
        state = jax.jit(lambda: self.program.state, out_shardings=places.program)()
        step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=places.step)()
        average = None
        if abstract.average is not None:

            def copies(weights: Any) -> Any:
                return jax.tree.map(lambda leaf, like: jnp.array(leaf, like.dtype), weights, abstract.average)

            average = jax.jit(copies, out_shardings=places.average)(trainable)
        return TrainState(step, trainable, optimizer, state, average)

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], Any, tuple[str | None, ...]]]:
        """Shape, dtype and named dims of each array of a batch: [microbatches, rows, ...]."""
        phase = self.program.phase
        rows = (phase.microbatches, phase.microbatch)
        names: tuple[str | None, ...] = (None, BATCH)
        names_token = (*names, None)
        shapes: dict[str, tuple[tuple[int, ...], Any, tuple[str | None, ...]]] = {
            "row": (rows, jnp.int32, names)
        }
        integers = ("tokens", "targets") + (("segments", "positions") if self.packed else ())
        if self.domains > 1:
            shapes["domain"] = (rows, jnp.int32, names)
        for name in integers:
            shapes[name] = ((*rows, phase.seq), jnp.int32, names_token)
        shapes["weights"] = ((*rows, phase.seq), jnp.float32, names_token)
        return shapes

    @property
    def packed(self) -> bool:
        """Whether rows bring segments and positions."""
        return bool(getattr(self.program.loss, "packed", False))

    @property
    def domains(self) -> int:
        """How many domains the rows come from."""
        return int(getattr(self.program.loss, "domains", 1))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and places of a batch."""
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.layout.sharding(*names))
            for name, (shape, dtype, names) in self.batch_shapes().items()
        }

    def abstract_signals(self) -> Signals:
        """Shapes and places of the signals."""
        everywhere = NamedSharding(self.layout.mesh, P())
        each = NamedSharding(self.layout.mesh, P(self.layout.mesh.axis_names))
        return Signals(
            jax.ShapeDtypeStruct((), jnp.bool_, sharding=everywhere),
            jax.ShapeDtypeStruct((self.layout.mesh.size,), jnp.int32, sharding=each),
        )

    def abstract_frozen(self) -> Any:
        """Shapes and places of the frozen weights, and of a reference's."""
        dtype = self.program.dtypes.param
        return self.held(lambda spec: spec.abstract(dtype, shardings(spec, self.layout)))

    def lower(self) -> Any:
        """The step, lowered for the layout's devices; `.compile()` gives what the loop calls.

        Its arguments are state (donated), frozen weights, batch and signals; it returns the new state, the
        signals' `halted`, and the metrics.
        """
        state, signals = self.abstract_state(), self.abstract_signals()
        everywhere = NamedSharding(self.layout.mesh, P())
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(self.__call__, donate_argnums=(0,), out_shardings=(places, everywhere, everywhere))
        return step.lower(state, self.abstract_frozen(), self.abstract_batch(), signals)

    def __call__(
        self, state: TrainState, frozen: Any, batch: Batch, signals: Signals
    ) -> tuple[TrainState, Array, dict[str, Array]]:
        """One step, as a pure function."""
        program = self.program
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        with jax.named_scope("gradients"):
            grads, (_, weight, sums, program_state) = self.gradients(
                state.trainable, frozen, state.program, batch, key, state.step
            )
        if program.regrade is not None:

            def gradients(trainable: Any) -> Any:
                found = self.gradients(trainable, frozen, state.program, batch, key, state.step)
                # A loss that chooses its rows may choose others, of another weight, at other weights.
                again, (_, other, _, _) = found
                ratio = weight / jnp.maximum(other, jnp.finfo(other.dtype).tiny)
                return jax.tree.map(lambda grad: grad * ratio.astype(grad.dtype), again)

            with jax.named_scope("regrade"):
                grads = program.regrade(state.trainable, grads, state.step, gradients)
        share = 1.0 / jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)
        metrics = {name: value * share.astype(value.dtype) for name, value in sums.items()}
        if ACTIVATION_SQUARES in metrics:
            metrics["activation_rms"] = jnp.sqrt(metrics.pop(ACTIVATION_SQUARES))
        if DOMAIN_NLL in metrics:
            # Of the step's target tokens; a domain that has none has no loss.
            metrics["domain_loss"] = metrics.pop(DOMAIN_NLL) / metrics[DOMAIN_TOKENS]
            metrics[DOMAIN_TOKENS] = sums[DOMAIN_TOKENS]
        norm = optax.tree.norm(grads)
        metrics |= {
            TOKENS: sums.get(TOKENS, weight),
            "grad_norm": norm * share.astype(norm.dtype),
            "lr": jnp.asarray(program.rate(state.step)),
        }
        with jax.named_scope("optimizer"):
            summed = SummedGrads(grads, share, metrics["grad_norm"])
            updates, _ = self.update(summed, state)
            # The update entry by entry: its norm may overflow where no entry does.
            finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates)]
            finite += [jnp.isfinite(metrics[name]) for name in ("loss", "grad_norm")]
            fine = jnp.all(jnp.stack(finite)) & ~signals.halted

            def kept_unless_fine(after: Any, before: Any) -> Any:
                return jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, before)

            # Computed anew where it is applied, for weights and then for moments: kept from above, updates
            # and new moments would be held beside all the old ones, and passed over once more. Heavy updates
            # are held all the same.
            state, summed, fine = jax.lax.optimization_barrier((state, summed, fine))
            if not program.heavy:
                updates, _ = self.update(summed, state)
            with jax.numpy_dtype_promotion("standard"):
                trainable = optax.apply_updates(state.trainable, updates)
            trainable = kept_unless_fine(trainable, state.trainable)
            state, summed, trainable = jax.lax.optimization_barrier((state, summed, trainable))
            summed = self.after(trainable, summed)
            _, optimizer = self.update(summed, state)
            optimizer = kept_unless_fine(optimizer, state.optimizer)
        average = state.average
        if program.average is not None:
            with jax.named_scope("average"):
                after = program.average(average, trainable, state.step + 1)
                average = kept_unless_fine(after, average)
        if self.measure:
            means = rms_by_layer(program.trainable, summed.means())
            metrics |= {f"grad_rms/{name}": value for name, value in means}
            metrics |= {
                f"update_rms/{name}": value for name, value in rms_by_layer(program.trainable, updates)
            }
        metrics |= {"fine": fine, "stop": jnp.max(signals.stop)}
        step, program_state = kept_unless_fine((state.step + 1, program_state), (state.step, state.program))
        return TrainState(step, trainable, optimizer, program_state, average), ~fine, metrics

    def after(self, trainable: Any, grads: SummedGrads) -> SummedGrads:
        """The gradients, to be had only once the new weights are there.

        XLA for CPUs forgets barriers before it decides what may overwrite what: without an order that it can
        see it copies all moments. What it can see is that the gradients become zeros where a weight is not
        finite: moments do not matter then. On several devices the order would cost messages, and is left out.
        """
        if self.layout.mesh.size > 1:
            return grads
        there = [jnp.isfinite(leaf[(0,) * leaf.ndim]) for leaf in jax.tree.leaves(trainable)]
        share = jnp.where(jnp.all(jnp.stack(there)), grads.share, 0.0)
        return replace(grads, share=share)

    def update(self, grads: SummedGrads, state: TrainState) -> tuple[Any, Any]:
        """The optimizer's updates, and its new state."""
        means = grads.means()
        optimizer = optax.with_extra_args_support(self.program.optimizer)
        # optax raises Python floats to integer counts, which strict promotion (our tests') refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, new = optimizer.update(
                means,
                state.optimizer,
                state.trainable,
                measured=Measured(means, grads.norm),
                layout=self.layout,
            )
        return updates, new

    def gradients(
        self, trainable: Any, frozen: Any, state: Any, batch: Batch, key: Array, step: Array | int = 0
    ) -> tuple[Any, Sums]:
        """Summed gradients of the weighted objective over all microbatches and devices, and the sums."""
        layout, program = self.layout, self.program
        if not layout.explicit:
            return accumulate(program.loss, trainable, frozen, state, batch, key, layout, step)

        def shard(
            trainable: Any, frozen: Any, state: Any, batch: Batch, key: Array, step: Array
        ) -> tuple[Any, Sums]:
            grads, (objective, weight, sums, state) = accumulate(
                program.loss, trainable, frozen, state, batch, key, layout.inside(), step
            )
            grads = jax.tree.map(lambda grad: jax.lax.psum(grad, "data"), grads)
            return grads, (*jax.lax.psum((objective, weight, sums), layout.batch_axes), state)

        manual = set(layout.batch_axes)
        skip = tuple(name for name in layout.mesh.axis_names if name not in manual)
        inner = partial(layout.weight_partition, skip=skip)
        weights, held = program.trainable.map(inner), self.held(lambda spec: spec.map(inner))
        rows = {name: layout.partition(names) for name, (_, _, names) in self.batch_shapes().items()}
        sharded = jax.shard_map(
            shard,
            mesh=layout.mesh,
            in_specs=(weights, held, P(), rows, P(), P()),
            out_specs=(weights, (P(), P(), P(), P())),
            axis_names=manual,
            check_vma=False,
        )
        result: tuple[Any, Sums] = sharded(trainable, frozen, state, dict(batch), key, jnp.asarray(step))
        return result


def digest(lowered: Any) -> str:
    """What a lowered step is known by: the SHA-256 of its StableHLO, the same wherever it is compiled."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def rms_by_layer(spec: Spec, tree: Tree) -> list[tuple[str, Array]]:
    """Root mean square of each weight's entries, one number a layer where it is stacked."""
    named = []

    def measure(path: Any, param: Param, value: Array) -> None:
        dims = tuple(range(1 if param.layers else 0, value.ndim))
        wide = value.astype(at_least_float32(value.dtype))
        named.append((path_name(path), jnp.sqrt(jnp.mean(jnp.square(wide), axis=dims))))

    jax.tree_util.tree_map_with_path(measure, spec.tree, tree, is_leaf=is_param)
    return named


def check_batch(phase: Phase, layout: Layout) -> None:
    """Refuse a batch that the mesh cannot split.

    Raises:
        InputError: with the mesh axes that split rows.
    """
    axes = " x ".join(f"{name} {layout.mesh.shape[name]}" for name in layout.batch_axes)
    if not 1 <= phase.microbatch <= phase.batch:
        raise InputError("microbatch", expected=f"1 to the batch's {phase.batch} rows", got=phase.microbatch)
    for name, rows in (("batch", phase.batch), ("microbatch", phase.microbatch)):
        if rows % layout.batch_shards:
            raise InputError(
                f"the {name} does not divide over the mesh",
                expected=f"a multiple of {layout.batch_shards} rows ({axes})",
                got=rows,
                fix=f"set {name} or the mesh",
            )

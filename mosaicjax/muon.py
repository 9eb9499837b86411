"""Muon: the momentum of a matrix, made orthogonal, is its update; all other weights have an optimizer beside.

Matrices of one shape are worked on together, whatever weight they are of, layers and experts side by side,
and over a mesh each device takes some of them whole: momenta are sent once to those devices and the results
once back, and never is all of a weight's momentum on one device.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale of updates and decay: Liu et
al. 2025, arXiv 2502.16982.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax.errors import InputError
from mosaicjax.mesh import Layout
from mosaicjax.optim import AdamW, Optimizer, decayed
from mosaicjax.polar import Jordan, Polynomials, near_polar
from mosaicjax.spec import Param, Spec, path_name

MATRICES, OTHERS = "matrices", "others"


@dataclass(frozen=True)
class Muon(Optimizer):
    """Muon for the matrices of layers; `others` for embeddings, heads, norms, biases and routers.

    The root mean square of an update is `rms` times the rate, whatever the matrix's shape: 0.2 is about that
    of Adam's updates, so that rates and decay carry over from it. 0 gives Jordan's own scale instead, the
    rate times sqrt(max(1, outputs / inputs)). `weight_decay` is as in `AdamW`, of matrices; `cautious` leaves
    out the decay of entries that the update moves away from zero. `others` has its own schedule and decay.

    `iterations` of `polynomials` bring singular values near 1; three of `PolarExpress` do about what five of
    Jordan's do, for less.

    Source: as this module; cautious decay: Chen et al. 2025, arXiv 2510.12402.
    """

    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5
    polynomials: Polynomials = Jordan()
    rms: float = 0.2
    weight_decay: float = 0.0
    cautious: bool = False
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    others: Optimizer = AdamW()

    @property
    def heavy(self) -> bool:
        """See `Optimizer.heavy`."""
        return True

    def build(self, spec: Spec, steps: int) -> optax.GradientTransformation:
        """See `Optimizer.build`.

        Raises:
            InputError: a model without matrices in layers, or knobs out of range.
        """
        for name, value, fine in (
            ("momentum", self.momentum, ("0 to below 1", 0 <= self.momentum < 1)),
            ("iterations", self.iterations, ("1 or more", self.iterations >= 1)),
            ("rms", self.rms, ("0 or more", self.rms >= 0)),
        ):
            if not fine[1]:
                raise InputError(f"Muon.{name}", expected=fine[0], got=value)
        self.polynomials.coefficients(self.iterations)
        labels = spec.map(lambda param: MATRICES if as_matrices(param) else OTHERS)
        if MATRICES not in jax.tree.leaves(labels):
            raise InputError(
                "Muon needs matrices in layers, which this model does not have",
                expected="weights of layers with `embed` as their first or last axis",
                fix="AdamW, or the axes' names",
            )
        matrices = optax.chain(
            orthogonal_momentum(spec, self),
            decayed(self.decay_share(self.weight_decay), spec.map(lambda param: param.decay), self.cautious),
            optax.scale_by_learning_rate(self.lr.build(steps)),
        )
        return optax.partition({MATRICES: matrices, OTHERS: self.others.build(spec, steps)}, labels)


@dataclass(frozen=True)
class Matrices:
    """A weight as matrices: how many of its axes count them, and of which others each side is made.

    `inputs` and `outputs` are numbers of axes; the side `embed` is one axis, the first or the last.
    """

    leading: int
    inputs: int
    outputs: int
    embed_first: bool

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """How many matrices a weight of this shape holds, their inputs and outputs."""
        inner = self.leading + self.inputs
        return (
            math.prod(shape[: self.leading]),
            math.prod(shape[self.leading : inner]),
            math.prod(shape[inner:]),
        )

    def flat(self, weight: Array) -> Array:
        """The matrices with `embed` as their rows, [N, E, O]."""
        matrices = weight.reshape(self.sizes(weight.shape))
        return matrices if self.embed_first else matrices.transpose(0, 2, 1)

    def shaped(self, matrices_NEO: Array, shape: tuple[int, ...]) -> Array:
        """The way back."""
        matrices = matrices_NEO if self.embed_first else matrices_NEO.transpose(0, 2, 1)
        return matrices.reshape(shape)


def as_matrices(param: Param) -> Matrices | None:
    """How a weight is matrices; None: it is none.

    Matrices are the weights of layers that read the residual stream or write to it, by the axis `embed`:
    layers and experts count, and all heads of a projection are one matrix.
    """
    axes = param.axes
    leading = 1 + (axes[:1] == ("experts",))
    inner = axes[leading - 1 :]
    if param.layers is None or len(inner) < 2 or "experts" in inner or "vocab" in inner:
        return None
    if inner[0] == "embed":
        return Matrices(leading, 1, len(inner) - 1, True)
    return Matrices(leading, len(inner) - 1, 1, False) if inner[-1] == "embed" else None


class OrthogonalState(NamedTuple):
    """The momentum of each matrix."""

    momentum: Any


def orthogonal_momentum(spec: Spec, muon: Muon) -> optax.GradientTransformationExtraArgs:
    """The transformation, before decay and rate; told a `layout`, it spreads matrices over its devices."""
    # What is masked out of the tree of gradients is no leaf of it: declarations are found by name.
    declared = dict(spec.items())

    def init(params: Any) -> OrthogonalState:
        return OrthogonalState(jax.tree.map(jnp.zeros_like, params))

    def update(
        grads: Any, state: OrthogonalState, params: Any = None, *, layout: Layout | None = None, **_: Any
    ) -> tuple[Any, OrthogonalState]:
        beta = muon.momentum
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, grads)
        ahead = momentum
        if muon.nesterov:
            ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, grads)
        named, structure = jax.tree_util.tree_flatten_with_path(ahead)
        params_of = [declared[path_name(path)] for path, _ in named]
        made = orthogonal([leaf for _, leaf in named], params_of, muon, layout)
        return jax.tree.unflatten(structure, made), OrthogonalState(momentum)

    return optax.GradientTransformationExtraArgs(init, update)


def orthogonal(
    weights: Sequence[Array], params: Sequence[Param], muon: Muon, layout: Layout | None
) -> list[Array]:
    """Each weight's matrices, their singular values brought near 1, and scaled; those of a shape at once."""
    forms = [as_matrices(param) for param in params]
    flat: list[Array] = []
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (weight, form) in enumerate(zip(weights, forms, strict=True)):
        assert form is not None, params[number]
        flat.append(form.flat(weight))
        groups.setdefault(flat[-1].shape[1:], []).append(number)
    made: dict[int, Array] = {}
    coefficients = muon.polynomials.coefficients(muon.iterations)
    for members in groups.values():
        together = jnp.concatenate([flat[number] for number in members]).astype(muon.dtype)
        spread = Spread.of(params[members[0]], layout)
        count = together.shape[0]
        padded = jnp.pad(together, ((0, -count % spread.devices), (0, 0), (0, 0)))
        done = spread.back(near_polar(spread.out(padded), coefficients))[:count]
        ends = list(itertools.accumulate(flat[number].shape[0] for number in members))
        for number, part in zip(members, jnp.split(done, ends[:-1]), strict=True):
            form, shape = forms[number], weights[number].shape
            assert form is not None
            _, inputs, outputs = form.sizes(shape)
            # An orthogonal matrix's entries have the root mean square 1 / sqrt(its larger side).
            scale = muon.rms * max(inputs, outputs) ** 0.5 if muon.rms else max(1.0, outputs / inputs) ** 0.5
            made[number] = form.shaped((scale * part).astype(weights[number].dtype), shape)
    return [made[number] for number in range(len(weights))]


@dataclass(frozen=True)
class Spread:
    """The way of matrices from where weights rest to devices that have whole ones, and back.

    One mesh axis moves at a time, from a side of the matrices to their count: each is an all-to-all, which
    sends a device no more than what it keeps.
    """

    layout: Layout | None
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, param: Param, layout: Layout | None) -> Spread:
        """For a weight and others of its shape."""
        if layout is None or layout.mesh.size == 1:
            return cls(None)
        sides = [layout.dim(axis) for axis in param.axes]
        rows = layout.dim("embed")
        columns = tuple(name for side in sides for name in side if name not in rows)
        return cls(layout, rows, columns)

    @property
    def devices(self) -> int:
        """Over how many devices the matrices go."""
        return 1 if self.layout is None else self.layout.mesh.size

    def _steps(self) -> list[P]:
        assert self.layout is not None
        lead, rows, columns = list[str](), list(self.rows), list(self.columns)
        steps = [P(None, tuple(rows) or None, tuple(columns) or None)]
        rest = [name for name in self.layout.mesh.axis_names if name not in (*rows, *columns)]
        for side in (rows, columns):
            while side:
                lead.append(side.pop())
                steps.append(P(tuple(lead), tuple(rows) or None, tuple(columns) or None))
        return [*steps, P((*lead, *rest), None, None)] if rest else steps

    def out(self, x_NEO: Array) -> Array:
        """Whole matrices on each device."""
        return self._through(x_NEO, self._steps() if self.layout else [])

    def back(self, x_NEO: Array) -> Array:
        """Where weights rest."""
        return self._through(x_NEO, self._steps()[::-1] if self.layout else [])

    def _through(self, x_NEO: Array, steps: list[P]) -> Array:
        for step in steps:
            assert self.layout is not None
            x_NEO = jax.lax.with_sharding_constraint(x_NEO, NamedSharding(self.layout.mesh, step))
        return x_NEO

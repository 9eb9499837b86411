"""Muon: the momentum of a matrix, made orthogonal, is its update; all other weights have an optimizer beside.

Matrices of one shape are worked on together, whatever weight they are of, layers and experts side by side,
and over a mesh each device takes some of them whole: momenta are sent once to those devices and the results
once back, and never is all of a weight's momentum on one device.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale of updates and decay: Liu et
al. 2025, arXiv 2502.16982.
"""

from __future__ import annotations

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
from mosaicjax.spec import Param, Spec, path_name

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of a X + b (X X^T) X + c (X X^T)^2 X: steep at 0, so that a few steps bring every singular value near 1."""
TINY = 1e-7
MATRICES, OTHERS = "matrices", "others"


@dataclass(frozen=True)
class Muon(Optimizer):
    """Muon for the matrices of layers; `others` for embeddings, heads, norms, biases and routers.

    The root mean square of an update is `rms` times the rate, whatever the matrix's shape: 0.2 is about that
    of Adam's updates, so that rates and decay carry over from it. 0 gives Jordan's own scale instead, the
    rate times sqrt(max(1, outputs / inputs)). `weight_decay` is as in `AdamW`, of matrices; `cautious` leaves
    out the decay of entries that the update moves away from zero. `others` has its own schedule and decay.

    Source: as this module; cautious decay: Chen et al. 2025, arXiv 2510.12402.
    """

    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5
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


def as_matrices(param: Param) -> tuple[int, int, int] | None:
    """How many of a weight's axes count matrices, how many are inputs and how many outputs; None: no matrix.

    Matrices are the weights of layers that read the residual stream or write to it, by the axis `embed`:
    layers and experts count, and all heads of a projection are one matrix.
    """
    axes = param.axes
    leading = 1 + (axes[:1] == ("experts",))
    inner = axes[leading - 1 :]
    if param.layers is None or len(inner) < 2 or "experts" in inner or "vocab" in inner:
        return None
    if inner[0] == "embed":
        return leading, 1, len(inner) - 1
    if inner[-1] == "embed":
        return leading, len(inner) - 1, 1
    return None


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
    groups: dict[tuple[int, int], list[int]] = {}
    flat = []
    for number, (weight, param) in enumerate(zip(weights, params, strict=True)):
        matrices = _flattened(weight, param)
        flat.append(matrices)
        groups.setdefault((matrices.shape[1], matrices.shape[2]), []).append(number)
    made: dict[int, Array] = {}
    for members in groups.values():
        together = jnp.concatenate([flat[number] for number in members]).astype(muon.dtype)
        together = _spread(newton_schulz(_spread(together, layout), muon.iterations), layout)
        cuts = [sum(flat[number].shape[0] for number in members[:end]) for end in range(1, len(members))]
        for number, part in zip(members, jnp.split(together, cuts), strict=True):
            made[number] = _shaped(part, weights[number], params[number], muon)
    return [made[number] for number in range(len(weights))]


def newton_schulz(x_NRC: Array, iterations: int) -> Array:
    """Matrices with all singular values near 1, and the same singular vectors.

    Shapes: [N, R, C] with R at most C.
    """
    a, b, c = COEFFICIENTS
    x_NRC = x_NRC / (jnp.linalg.norm(x_NRC, axis=(1, 2), keepdims=True) + TINY)
    for _ in range(iterations):
        gram = jnp.einsum("nrc,nsc->nrs", x_NRC, x_NRC)
        x_NRC = a * x_NRC + jnp.einsum("nrs,nsc->nrc", b * gram + c * (gram @ gram), x_NRC)
    return x_NRC


def _sizes(weight: Array, param: Param) -> tuple[int, int, int]:
    """How many matrices, and their inputs and outputs."""
    found = as_matrices(param)
    assert found is not None, param
    leading, inputs, _ = found
    shape = weight.shape
    return (
        math.prod(shape[:leading]),
        math.prod(shape[leading : leading + inputs]),
        math.prod(shape[leading + inputs :]),
    )


def _flattened(weight: Array, param: Param) -> Array:
    """A weight as matrices that are no higher than wide, [N, R, C]."""
    count, inputs, outputs = _sizes(weight, param)
    matrices = weight.reshape(count, inputs, outputs)
    return matrices if inputs <= outputs else matrices.transpose(0, 2, 1)


def _shaped(matrices: Array, weight: Array, param: Param, muon: Muon) -> Array:
    """The way back, scaled."""
    _, inputs, outputs = _sizes(weight, param)
    if inputs > outputs:
        matrices = matrices.transpose(0, 2, 1)
    # An orthogonal matrix's entries have the root mean square 1 / sqrt(its larger side).
    scale = muon.rms * max(inputs, outputs) ** 0.5 if muon.rms else max(1.0, outputs / inputs) ** 0.5
    return (scale * matrices).astype(weight.dtype).reshape(weight.shape)


def _spread(x_NRC: Array, layout: Layout | None) -> Array:
    """Whole matrices on as many devices as their number divides over; mesh axes left over split columns."""
    if layout is None or layout.mesh.size == 1:
        return x_NRC
    mesh = layout.mesh
    count, _, columns = x_NRC.shape
    over: list[str] = []
    left: list[str] = []
    for name in mesh.axis_names:
        size = mesh.shape[name]
        if size == 1:
            continue
        if count % size == 0:
            over.append(name)
            count //= size
        elif columns % size == 0:
            left.append(name)
            columns //= size
    return jax.lax.with_sharding_constraint(
        x_NRC, NamedSharding(mesh, P(tuple(over) or None, None, tuple(left) or None))
    )

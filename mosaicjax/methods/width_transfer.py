"""Settings found on a narrow model, carried to a wide one: the maximal update parametrization (muP)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mosaicjax.errors import InputError
from mosaicjax.models.decoder import Decoder
from mosaicjax.program import Method, Program
from mosaicjax.spec import ONES, Dims, Init, Param, Spec

STREAM, HEADS, HIDDEN, FIXED = "stream", "heads", "hidden", "fixed"

PLACES = {
    "embed": STREAM,
    "heads": HEADS,
    "kv_heads": HEADS,
    "head_dim": HEADS,
    "mlp": HIDDEN,
    "vocab": FIXED,
    "position": FIXED,
    "experts": FIXED,
}
"""What each axis is a part of: a space that grows with the model's width, or something that does not."""

FINAL_NORM, EMBEDDING = "norm", "embed/tokens"
KNOWN_STATES = (optax.ScaleByAdamState, optax.ScaleByLionState)


@dataclass(frozen=True)
class Sizes:
    """The base model: the one whose settings are carried over.

    `kv_heads` 0 means as many as heads, `head_dim` 0 embed / heads.
    """

    embed: int
    heads: int
    mlp: int
    kv_heads: int = 0
    head_dim: int = 0

    def dims(self) -> dict[str, int]:
        """Sizes by axis name.

        Raises:
            InputError: sizes below 1, or heads that do not divide the width.
        """
        if min(self.embed, self.heads, self.mlp) < 1 or min(self.kv_heads, self.head_dim) < 0:
            raise InputError("WidthTransfer.base", expected="sizes of 1 or more", got=self)
        if not self.head_dim and self.embed % self.heads:
            raise InputError(
                "WidthTransfer.base: heads must divide embed",
                expected=f"a divisor of {self.embed}",
                got=self.heads,
            )
        return {
            "embed": self.embed,
            "heads": self.heads,
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.embed // self.heads,
            "mlp": self.mlp,
        }


@dataclass(frozen=True)
class WidthTransfer(Method):
    """Learning rate, init and the like of the model of sizes `base`, for this one, however wide it is.

    Relative to the base model, with m = fan-in / the base's fan-in of each weight:

    - matrices between spaces that grow: standard deviation at the start 1 / sqrt(m), learning rate 1 / m;
    - routers to experts, whose outputs do not grow: both 1 / m;
    - token and position tables, an untied head, norms and biases: as in the base model, whatever the init
      rule would make of this model's width;
    - logits: divided by m of embed, tied or not. The factor lies in the weights of the last norm, which start
      at 1 / m and learn at 1 / m of the rate: under Adam and Lion that is the same as a factor behind it, and
      evaluation, generation and exported models need not know;
    - scores: where head_dim grows they are divided by head_dim instead of its square root, times the root of
      the base's. The factor lies in the same way in the queries' matrix, or in their norm if they have one.
      Where heads of one size become more, nothing changes.

    A model of the base's own sizes is trained as without the method, bit for bit. Weight decay stays what
    the optimizer documents, the share of a weight that a step at the peak takes, for every weight. Adam's
    `eps` is left as it is and should be small beside gradients; what depends on depth, batch or the number
    of steps is not carried over.

    Source: Yang et al. 2022, arXiv 2203.03466, table 8, and lemma J.1 for factors within weights. Decay that
    is independent of the rate: Kosson et al. 2025, arXiv 2510.19093.
    """

    base: Sizes

    def __call__(self, program: Program) -> Program:
        """See `Method`.

        Raises:
            InputError: weights or an optimizer whose part in this is not known.
        """
        if "LoRA" in program.applied:
            raise InputError(
                "WidthTransfer sets how weights start and learn, which LoRA neither draws nor trains",
                expected="LoRA or WidthTransfer",
                got=" then ".join((*program.applied, "WidthTransfer")),
            )
        spec, base = program.trainable, self.base.dims()
        if all(spec.dims.get(axis, size) == size for axis, size in base.items()):
            return program.refine(self)
        if spec.dims.get("head_dim") != base["head_dim"]:
            _check_scores(program)
        found = factors(spec, base)
        _check_optimizer(program.optimizer, spec)
        paths = iter(found.values())
        each = spec.map(lambda param: next(paths))
        sizes = tuple(sorted(base.items()))
        tree = jax.tree.map(
            lambda param, factor: replace(param, init=AtBase(param.init, sizes, factor.init)),
            spec.tree,
            each,
            is_leaf=lambda leaf: isinstance(leaf, Param),
        )
        rates = jax.tree.map(lambda factor: factor.rate, each, is_leaf=lambda leaf: isinstance(leaf, Factor))
        return program.refine(
            self, trainable=replace(spec, tree=tree), optimizer=with_rates(program.optimizer, rates)
        )


@dataclass(frozen=True)
class Factor:
    """What a weight has beside the base model: of its values at the start, and of its learning rate."""

    init: float
    rate: float


@dataclass(frozen=True)
class AtBase(Init):
    """`factor` times what another init draws in a model of the sizes `base`."""

    init: Init
    base: tuple[tuple[str, int], ...]
    factor: float

    def draw(self, key: Array, shape: tuple[int, ...], dims: Dims) -> Array:
        """See `Init.draw`."""
        return jnp.float32(self.factor) * self.init.draw(key, shape, {**dims, **dict(self.base)})


def factors(spec: Spec, base: Mapping[str, int]) -> dict[str, Factor]:
    """The factors of every weight, by name and in the order of the tree, beside a model of sizes `base`.

    Raises:
        InputError: a weight of unknown axes, or no last norm or queries that could hold a factor.
    """
    params = dict(spec.items())
    if f"{FINAL_NORM}/scale" not in params or EMBEDDING not in params:
        raise InputError(
            "WidthTransfer needs all weights of a model whose last norm has a scale",
            expected=f"{EMBEDDING} and {FINAL_NORM}/scale",
            fix="list it before methods that freeze weights",
        )
    ratio = {axis: base[axis] / spec.dims[axis] for axis in base if axis in spec.dims}
    scores = math.sqrt(ratio["head_dim"])
    normed = {name.split("/query_norm/")[0] for name in params if "/query_norm/" in name}
    found: dict[str, Factor] = {}
    queries = 0
    for name, param in params.items():
        factor = of_axes(name, param, ratio)
        above, _, last = name.rpartition("/")
        if above == FINAL_NORM:
            factor = _held(name, param, factor, ratio["embed"])
        elif scores != 1 and above.endswith("/query_norm"):
            factor, queries = _held(name, param, factor, scores), queries + 1
        elif scores != 1 and above not in normed and last in ("query", "query_bias"):
            factor, queries = _times(factor, scores), queries + 1
        found[name] = factor
    if scores != 1 and not queries:
        raise InputError(
            "WidthTransfer: head_dim differs from the base's, and there are no queries to scale",
            expected=f"head_dim {base['head_dim']}",
            got=spec.dims["head_dim"],
        )
    return found


def of_axes(name: str, param: Param, ratio: Mapping[str, float]) -> Factor:
    """The factors that follow from a weight's axes; `ratio` is the base's size by each axis's own.

    Axes stand in the order in which a product uses them: those that it sums over come first.

    Raises:
        InputError: an axis that is not known, or axes of no matrix.
    """
    unknown = [axis for axis in param.axes if axis not in PLACES]
    if unknown:
        raise InputError(
            f"WidthTransfer: {name} has the axis {unknown[0]!r}, whose part in width is not known",
            expected=", ".join(PLACES),
        )
    groups = [(place, tuple(axes)) for place, axes in groupby(param.axes, PLACES.__getitem__)]
    # Tables have an entry for each token or position, and experts each a matrix.
    while groups and groups[0][0] == FIXED:
        groups.pop(0)
    if len(groups) > 2 or len(set(param.axes)) < len(param.axes):
        raise InputError(f"WidthTransfer: {name} is no matrix or vector", got=param.axes)
    if len(groups) < 2:
        return Factor(1.0, 1.0)
    narrow = math.prod(ratio[axis] for axis in groups[0][1])
    return Factor(narrow if groups[1][0] == FIXED else math.sqrt(narrow), narrow)


def _times(factor: Factor, more: float) -> Factor:
    return Factor(factor.init * more, factor.rate * more)


def _held(name: str, param: Param, factor: Factor, more: float) -> Factor:
    """A norm's factors with one more behind it.

    Raises:
        InputError: a scale that does not start at 1, and so is no factor as it stands.
    """
    if name.endswith("/scale") and param.init != ONES:
        raise InputError(f"WidthTransfer: {name} starts at other than 1", expected=ONES, got=param.init)
    return _times(factor, more)


def with_rates(optimizer: optax.GradientTransformation, rates: Any) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose updates of each weight are multiplied by its rate, but for decoupled decay.

    The optimizer is shown weights divided by the rate: decay, which is in proportion to them, comes out of
    the multiplication as it was.
    """
    inner = optax.with_extra_args_support(optimizer)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        shown = params
        if params is not None:
            shown = jax.tree.map(lambda leaf, rate: leaf if rate == 1 else leaf / rate, params, rates)
        updates, state = inner.update(grads, state, shown, **extra)
        return jax.tree.map(lambda leaf, rate: leaf if rate == 1 else leaf * rate, updates, rates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _check_scores(program: Program) -> None:
    """Refuse attention in which a factor of the queries is not one of the scores that scale as usual.

    Raises:
        InputError: with the knob.
    """
    decoder = getattr(program.loss, "decoder", None)
    if not isinstance(decoder, Decoder):
        raise InputError(
            "WidthTransfer: head_dim differs from the base's in a model whose attention is not known",
            fix="a base of the same head_dim and fewer heads",
        )
    for _, _, block, _ in decoder.blocks():
        for knob in ("scale", "clip_qkv"):
            if value := getattr(block.attention, knob, 0.0):
                raise InputError(
                    f"WidthTransfer: head_dim differs from the base's, and attention has a {knob} of its own",
                    expected=0,
                    got=value,
                    fix="a base of the same head_dim and fewer heads",
                )


def _check_optimizer(optimizer: optax.GradientTransformation, spec: Spec) -> None:
    """Refuse an optimizer other than Adam and Lion, whose steps do not grow with gradients.

    Raises:
        InputError: it keeps other state of the weights, or none.
    """
    weights = spec.map(lambda param: jax.ShapeDtypeStruct(param.shape(spec.dims), jnp.float32))
    state = jax.eval_shape(optimizer.init, weights)
    parts = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, KNOWN_STATES))
    known = [part for part in parts if isinstance(part, KNOWN_STATES)]
    other = [part for part in parts if not isinstance(part, KNOWN_STATES) and part.ndim]
    if not known or other:
        raise InputError(
            "WidthTransfer: how this optimizer's rate goes with width is not known",
            expected="AdamW or Lion",
            fix="list WidthTransfer before methods that change the optimizer",
        )

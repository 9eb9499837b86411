"""Optimizers and learning-rate schedules as dataclasses over optax."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import ArrayLike

from mosaicjax.errors import InputError
from mosaicjax.spec import Spec

Rate = Callable[[ArrayLike], ArrayLike]
"""Learning rate of a step; the first step is 0."""


@dataclass(frozen=True)
class Schedule:
    """A constant learning rate after `warmup` steps of linear growth; the parent of the others.

    The first step's rate is peak / warmup, the last warm-up step's is the peak.
    """

    peak: float = 6e-4
    warmup: int = 0

    def after(self, done: ArrayLike, rest: int) -> ArrayLike:
        """The share of the peak, `done` steps after the warm-up, of `rest` in all."""
        return jnp.ones_like(jnp.asarray(done, jnp.float32))

    def check(self, steps: int) -> None:
        """Refuse a schedule that cannot be, for a run of so many steps.

        Raises:
            InputError: with the knob, expected and got.
        """
        if self.warmup < 0 or self.peak <= 0:
            raise InputError(
                "learning rate",
                expected="a peak above 0 and a warm-up of 0 or more steps",
                got=f"peak {self.peak:g}, warmup {self.warmup}",
            )

    def build(self, steps: int) -> Rate:
        """The rate of each step of a run of so many.

        A run that is shorter than the warm-up ends within it.

        Raises:
            InputError: see `check`.
        """
        self.check(steps)

        def rate(step: ArrayLike) -> ArrayLike:
            count = jnp.asarray(step, jnp.float32)
            grown = jnp.minimum((count + 1.0) / max(self.warmup, 1), 1.0)
            share = self.after(jnp.maximum(count - self.warmup, 0.0), max(steps - self.warmup, 1))
            return jnp.float32(self.peak) * jnp.where(count < self.warmup, grown, share)

        return rate


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak, held."""


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the peak to `final` of it, and never below `floor` of it.

    It takes `over` steps after the warm-up (0: all that are left): fewer than are left hold its end, more are
    broken off.

    Source: Loshchilov and Hutter 2017, arXiv 1608.03983; `over` and `floor` as GPT-J and GPT-NeoX have them.
    """

    final: float = 0.1
    over: int = 0
    floor: float = 0.0

    def check(self, steps: int) -> None:
        """See `Schedule.check`; `final` and `floor` are shares."""
        super().check(steps)
        _check_share("Cosine.final", self.final)
        _check_share("Cosine.floor", self.floor)
        if self.over < 0:
            raise InputError("Cosine.over", expected="0 (all steps after the warm-up) or more", got=self.over)

    def after(self, done: ArrayLike, rest: int) -> ArrayLike:
        """See `Schedule.after`."""
        part = jnp.minimum(jnp.asarray(done) / (self.over or rest), 1.0)
        fallen = self.final + (1.0 - self.final) * 0.5 * (1.0 + jnp.cos(jnp.pi * part))
        return jnp.maximum(fallen, self.floor) if self.floor else fallen


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from the peak to `final` of it."""

    final: float = 0.0

    def check(self, steps: int) -> None:
        """See `Schedule.check`; `final` is a share."""
        super().check(steps)
        _check_share("Linear.final", self.final)

    def after(self, done: ArrayLike, rest: int) -> ArrayLike:
        """See `Schedule.after`."""
        return 1.0 - (1.0 - self.final) * jnp.minimum(jnp.asarray(done) / rest, 1.0)


@dataclass(frozen=True)
class Wsd(Schedule):
    """Warm-up, stable, decay: the peak, then over the last `decay` steps a line to `final` of it.

    Source: Hu et al. 2024 (MiniCPM), arXiv 2404.06395.
    """

    decay: int = 0
    final: float = 0.0

    def check(self, steps: int) -> None:
        """See `Schedule.check`; the decay must fit behind the warm-up."""
        super().check(steps)
        _check_share("Wsd.final", self.final)
        _check_fits("Wsd.decay", self.decay, steps - self.warmup)

    def after(self, done: ArrayLike, rest: int) -> ArrayLike:
        """See `Schedule.after`."""
        into = jnp.maximum(jnp.asarray(done) - (rest - self.decay), 0.0)
        return 1.0 - (1.0 - self.final) * jnp.minimum(into / max(self.decay, 1), 1.0)


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """The peak times sqrt(warmup / step), then over the last `cooldown` steps a line to zero.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 5.3; the cool-down is llm-foundry's.
    """

    cooldown: int = 0

    def check(self, steps: int) -> None:
        """See `Schedule.check`; the cool-down must fit behind the warm-up."""
        super().check(steps)
        _check_fits("InverseSqrt.cooldown", self.cooldown, steps - self.warmup)

    def after(self, done: ArrayLike, rest: int) -> ArrayLike:
        """See `Schedule.after`."""
        timescale = float(max(self.warmup, 1))
        done = jnp.asarray(done)
        fall = jnp.sqrt(timescale / (jnp.minimum(done, rest - self.cooldown) + timescale))
        into = jnp.maximum(done - (rest - self.cooldown), 0.0)
        return fall * (1.0 - jnp.minimum(into / max(self.cooldown, 1), 1.0))


@dataclass(frozen=True)
class Optimizer:
    """What turns gradients into updates; `lr` is its schedule."""

    lr: Schedule = Cosine()

    @property
    def heavy(self) -> bool:
        """Whether an update costs more to compute anew than to hold beside the weights."""
        return False

    @property
    def evaluated(self) -> Callable[[Any, Any], Any] | None:
        """What makes the weights that the model is used with, out of those that are trained and the state."""
        return None

    def build(self, spec: Spec, steps: int) -> optax.GradientTransformation:
        """The transformation for these weights and a run of so many steps."""
        raise TypeError(f"{type(self).__name__} does not say how to build itself")

    def decay_share(self, weight_decay: float) -> float:
        """optax's decay for ours: a step at the peak rate takes `weight_decay` of a weight."""
        if not 0 <= weight_decay < 1:
            raise InputError("weight_decay", expected="a share of a weight, 0 to below 1", got=weight_decay)
        return weight_decay / self.lr.peak


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    `weight_decay` is the share of a weight that a step at the peak rate takes away (Composer's
    `DecoupledAdamW`), not a factor of the learning rate (optax's, PyTorch's): the same as theirs is
    `weight_decay / peak`. Norms and biases are not decayed.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    cautious: bool = False
    momentum_dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    def build(self, spec: Spec, steps: int) -> optax.GradientTransformation:
        """See `Optimizer.build`."""
        check_betas(self.b1, self.b2)
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=jnp.dtype(self.momentum_dtype))
        return _with_decay(self, adam, spec, steps)


@dataclass(frozen=True)
class Lion(Optimizer):
    """The sign of a momentum, with decoupled weight decay as in `AdamW` (Composer's `DecoupledLionW`).

    Source: Chen et al. 2023, arXiv 2302.06675.
    """

    lr: Schedule = Cosine(peak=1e-4)
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    cautious: bool = False
    momentum_dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    def build(self, spec: Spec, steps: int) -> optax.GradientTransformation:
        """See `Optimizer.build`."""
        check_betas(self.b1, self.b2)
        lion = optax.scale_by_lion(self.b1, self.b2, mu_dtype=jnp.dtype(self.momentum_dtype))
        return _with_decay(self, lion, spec, steps)


@dataclass(frozen=True)
class Adopt(Optimizer):
    """Adam whose second moment does not know the gradient that it divides: it converges for any `b2`.

    Updates are clipped to step ** 0.25, as the authors do now; the first step moves nothing. Decay as in
    `AdamW`.

    Source: Taniguchi et al. 2024, arXiv 2411.02853; optax.contrib.
    """

    b1: float = 0.9
    b2: float = 0.9999
    eps: float = 1e-6
    weight_decay: float = 0.0
    cautious: bool = False
    momentum_dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    def build(self, spec: Spec, steps: int) -> optax.GradientTransformation:
        """See `Optimizer.build`."""
        check_betas(self.b1, self.b2)
        dtype = jnp.dtype(self.momentum_dtype)
        adopt = optax.contrib.scale_by_adopt(self.b1, self.b2, self.eps, mu_dtype=dtype)
        return _with_decay(self, adopt, spec, steps)


@dataclass(frozen=True)
class Ademamix(Optimizer):
    """Adam with a second, slow momentum of `b3`, of which `alpha` times is added to the fast one.

    Both grow over the run as the authors have them: `alpha` on a line from 0, `b3` from `b1`, on a line of
    half-lives, so that early steps are not led by the first gradients. It holds one momentum more than Adam.
    Decay as in `AdamW`.

    Source: Pagliardini et al. 2024, arXiv 2409.03137, section 3; optax.contrib.
    """

    b1: float = 0.9
    b2: float = 0.999
    b3: float = 0.9999
    alpha: float = 8.0
    eps: float = 1e-8
    weight_decay: float = 0.0
    cautious: bool = False

    def build(self, spec: Spec, steps: int) -> optax.GradientTransformation:
        """See `Optimizer.build`."""
        check_betas(self.b1, self.b2)
        if not self.b1 < self.b3 < 1 or self.alpha < 0:
            raise InputError(
                "Ademamix.b3 and alpha", expected="b1 < b3 < 1, alpha 0 or more", got=(self.b3, self.alpha)
            )
        fast, slow = (math.log(0.5) / math.log(beta) - 1 for beta in (max(self.b1, 1e-9), self.b3))

        def grown(step: ArrayLike) -> Any:
            return jnp.minimum((jnp.asarray(step, jnp.float32) + 1.0) / steps, 1.0)

        def b3(step: ArrayLike) -> Any:
            half_life = fast + grown(step) * (slow - fast)
            return jnp.exp2(-1.0 / (half_life + 1.0))

        mixed = optax.contrib.scale_by_ademamix(
            self.b1,
            self.b2,
            b3,
            lambda step: self.alpha * grown(step),
            self.eps,
        )
        return _with_decay(self, mixed, spec, steps)


def _with_decay(
    optimizer: AdamW | Lion | Adopt | Ademamix,
    direction: optax.GradientTransformation,
    spec: Spec,
    steps: int,
) -> optax.GradientTransformation:
    """A direction with an optimizer's decay, at its rate."""
    mask = spec.map(lambda param: param.decay)
    return optax.chain(
        direction,
        decayed(optimizer.decay_share(optimizer.weight_decay), mask, optimizer.cautious),
        optax.scale_by_learning_rate(optimizer.lr.build(steps)),
    )


def decayed(share: float, mask: Any, cautious: bool = False) -> optax.GradientTransformation:
    """Add decoupled weight decay to updates that are still to be scaled by the rate.

    `cautious` decays only the entries that the update moves towards zero: an entry of the weight and one of
    the update, which is subtracted, of one sign.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101; Chen et al. 2025, arXiv 2510.12402.
    """
    if not cautious or not share:
        return optax.add_decayed_weights(share, mask)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def add(update: Any, weight: Any) -> Any:
            return update + jnp.where(update * weight > 0, share * weight, jnp.zeros_like(weight))

        return jax.tree.map(add, updates, params), state

    return optax.masked(optax.GradientTransformation(optax.init_empty_state, update), mask)


def _check_share(what: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(what, expected="a share of the peak, 0 to 1", got=share)


def _check_fits(what: str, steps: int, rest: int) -> None:
    if not 0 <= steps <= max(rest, 0):
        raise InputError(what, expected=f"0 to {max(rest, 0)} steps (those after the warm-up)", got=steps)


def check_betas(b1: float, b2: float) -> None:
    """Raises: InputError: decays of moments that are no shares below 1."""
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise InputError("optimizer b1 and b2", expected="0 to below 1", got=(b1, b2))

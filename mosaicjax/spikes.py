"""What a run does when its loss jumps: nothing, stop, or roll back and go around the data that led there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mosaicjax.errors import InputError

NORMAL_MAD = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


@dataclass(frozen=True)
class OnSpike:
    """What to do when the loss jumps; this one: nothing."""

    @property
    def watched(self) -> int:
        """How many losses before a step it is judged by; 0: none is judged."""
        return 0

    def check(self) -> None:
        """Raises: InputError for settings that mean nothing."""

    def is_spike(self, losses: Sequence[float], loss: float) -> bool:
        """Whether a step's loss is one, after those."""
        return False


@dataclass(frozen=True)
class Ignore(OnSpike):
    """Go on, whatever the loss does; only a loss that is not finite stops the run."""


@dataclass(frozen=True)
class Stop(OnSpike):
    """Stop at a spike (exit code 1), with the last checkpoint before it as it is.

    A spike is a loss above the median of the `window` steps before it by more than `deviations` of their
    scatter, which is measured by the median absolute deviation, so that one spike does not hide the next.
    Nothing is judged before there are so many steps.
    """

    window: int = 100
    deviations: float = 10.0

    @property
    def watched(self) -> int:
        """See `OnSpike.watched`."""
        return self.window

    def check(self) -> None:
        """See `OnSpike.check`."""
        if self.window < 2:
            raise InputError("on_spike.window", expected="2 steps or more", got=self.window)
        if not self.deviations > 0:
            raise InputError("on_spike.deviations", expected="a number above 0", got=self.deviations)

    def is_spike(self, losses: Sequence[float], loss: float) -> bool:
        """See `OnSpike.is_spike`."""
        if len(losses) < self.window:
            return False
        middle = statistics.median(losses)
        scatter = NORMAL_MAD * statistics.median(abs(each - middle) for each in losses)
        return not math.isfinite(loss) or loss > middle + self.deviations * scatter


@dataclass(frozen=True)
class RollBack(Stop):
    """Go back to the last checkpoint before a spike, and on without the data of the steps from there to it.

    A loss or gradient that is not finite counts as one, at any step. After `most` times the run stops. What
    was left out is kept with every checkpoint, so that a run that is killed goes on in the same way.

    Source: Chowdhery et al. 2022, PaLM, arXiv 2204.02311, section 5.1, which went back about 100 steps.
    """

    most: int = 5


class Spiked(Exception):
    """A step whose loss is a spike, counted from 1."""

    def __init__(self, number: int, loss: float) -> None:
        super().__init__(f"step {number}: loss {loss:.4f}")
        self.number, self.loss = number, loss

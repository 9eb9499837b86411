"""Where the n-th row of a run lies: arithmetic on numbers of rows, so that any is found at once.

An epoch of a split is cut into places, runs of neighbouring rows about as long as a chunk of the store, and
the places, in an order of the epoch's own, into windows. Rows are taken from the places of a window in turn,
one from each, until it is empty: as many rows as a window has places, one after the other, come from as many
places, and a reader that keeps one window's places reads each of them once an epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mosaicjax.errors import InputError

WINDOW_PLACES = 64
MOST = 2**32 - 1
"""Rows that can be put in order, so that products of two counts fit in 64 bits."""

ROUNDS = 6
NEARBY = 64


@dataclass(frozen=True)
class Order:
    """The endless order of a split's rows: every epoch has each row once, in an order of its own.

    A place has `per_place` rows, or one more. A window has `window` places or more, and less than twice as
    many, or all there are.
    """

    rows: int
    per_place: int
    seed: int
    window: int = WINDOW_PLACES

    def __post_init__(self) -> None:
        if self.rows > MOST:
            raise InputError("a split has too many rows", expected=f"at most {MOST}", got=self.rows)

    @cached_property
    def places(self) -> int:
        """How many places there are: of fewer rows where there would be too few for a full window."""
        most = min(self.per_place, self.rows // (2 * WINDOW_PLACES))
        return self.rows // max(1, most)

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return max(1, self.places // self.window)

    @property
    def largest_window(self) -> int:
        """How many places the largest window has."""
        return -(-self.places // self.windows)

    @property
    def rows_per_place(self) -> int:
        """Rows that every place has; the first `rows % places` have one more."""
        return self.rows // self.places

    def first_row(self, place: int) -> int:
        """The first row of a place; the last place's next is the number of rows."""
        return place * self.rows_per_place + min(place, self.rows % self.places)

    def find(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Orders.find`, of one domain."""
        return Orders([self]).find(np.zeros_like(numbers), numbers)


class Orders:
    """The orders of several domains, to find samples of all of them at once."""

    def __init__(self, orders: Sequence[Order]) -> None:
        def each(value: Callable[[Order], int]) -> np.ndarray:
            return np.array([value(order) for order in orders], np.int64)

        self._rows = each(lambda order: order.rows)
        self._places = each(lambda order: order.places)
        self._per_place = each(lambda order: order.rows_per_place)
        self._extra = each(lambda order: order.rows % order.places)
        # The first windows are larger by one place than the others.
        self._window = each(lambda order: order.places // order.windows)
        self._larger = each(lambda order: order.places % order.windows)
        self._seed = each(lambda order: order.seed).astype(np.uint64) << np.uint64(32)

    def find(self, domains: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The place and the row of each of these samples of domains, counted from 0 through all epochs.

        Shapes: int64 [n] each, and two int64 [n].
        """
        epoch, sample = np.divmod(numbers, self._rows[domains])
        of_epoch = self._seed[domains] + epoch.astype(np.uint64)
        places, per_place, extra = (each[domains] for each in (self._places, self._per_place, self._extra))
        turn, taken = self._turns(domains, sample)
        # The rows that only the first places have come at the end of the epoch.
        late = sample >= places * per_place
        turn, taken = np.where(late, sample - places * per_place, turn), np.where(late, 0, taken)
        place = permuted(turn, np.where(late, extra, places), of_epoch)
        row = permuted(taken, per_place, mixed(of_epoch) + place.astype(np.uint64))
        row = np.where(late, per_place, row)
        return place, row + place * per_place + np.minimum(place, extra)

    def _turns(self, domains: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which place in the epoch's order a sample comes from, and how many of its rows came before."""
        small, larger, each = self._window[domains], self._larger[domains], self._per_place[domains]
        of_larger = larger * (small + 1) * each
        early = sample < of_larger
        size = np.where(early, small + 1, small)
        window = np.where(early, sample, sample - of_larger) // (size * each)
        first = window * size + np.where(early, 0, larger * (small + 1))
        within = sample - first * each
        return first + within % size, within // size


def permuted(numbers: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where permutations put numbers: each below its size, in an order that its key alone decides.

    A generalised Feistel network over the digits of a number to a base near the root of its size; what it
    puts at or past the size goes through again. Grain's `index_shuffle` takes 0.1 to 2 ms a number at the
    sizes of places, and 3 microseconds at its best.

    Shapes: int64, int64 and uint64 [n], all sizes at least 1; the result int64 [n].

    Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, method 3.
    """
    result = numbers.copy()
    left_base = np.ceil(np.sqrt(sizes)).astype(np.int64)
    right_base = -(-sizes // left_base)
    outside = np.arange(len(numbers))
    while len(outside):
        left_size, right_size = left_base[outside].astype(np.uint64), right_base[outside].astype(np.uint64)
        left, right = np.divmod(result[outside].astype(np.uint64), right_size)
        key = mixed(keys[outside])
        for turn in range(0, ROUNDS, 2):
            left = (left + (mixed(key + right + np.uint64(turn << 40)) >> np.uint64(16))) % left_size
            right = (right + (mixed(key + left + np.uint64(turn + 1 << 40)) >> np.uint64(16))) % right_size
        result[outside] = left * right_size + right
        outside = outside[result[outside] >= sizes[outside]]
    return result


def mixed(keys: np.ndarray) -> np.ndarray:
    """Scatter 64-bit numbers, one to one.

    Source: the generator SplitMix64, Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number
    Generators, with the constants of its variant 13.
    """
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def order_seed(seed: int, domain: str = "") -> int:
    """The seed of the order of a domain's rows.

    The epoch is added to it: unhashed, the second epoch of seed 0 would be the first of seed 1.
    """
    text = f"rows/{seed}/{domain}" if domain else f"rows/{seed}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


class Mix:
    """Which domain each sample comes from, and how many came from it before: in proportion to whole weights.

    Sample n has the number `(step * n + offset) mod total`, and the domains share the numbers among them. So
    every `total` samples have exactly `weight` of each, and fewer are within a few samples of their share
    (a Kronecker sequence near the golden ratio).
    """

    def __init__(self, weights: Sequence[int], seed: int) -> None:
        assert weights and all(weight > 0 for weight in weights), weights
        self.weights = tuple(weights)
        self.total = sum(weights)
        if self.total > MOST:
            raise InputError("the domains have too many rows", expected=f"at most {MOST}", got=self.total)
        self._bounds = np.cumsum(self.weights)
        self._step = _golden(self.total)
        digest = hashlib.blake2b(f"domains/{seed}".encode(), digest_size=8).digest()
        self._offset = int.from_bytes(digest, "big") % self.total

    def domains(self, first: int, count: int) -> np.ndarray:
        """The domains of `count` samples from number `first` on.

        Shapes: int64 [count].
        """
        numbers = (np.arange(count, dtype=np.uint64) + np.uint64(first % self.total)) % np.uint64(self.total)
        spread = (numbers * np.uint64(self._step) + np.uint64(self._offset)) % np.uint64(self.total)
        return np.searchsorted(self._bounds, spread.astype(np.int64), side="right")

    def counts(self, samples: int) -> np.ndarray:
        """How many of the first `samples` come from each domain.

        Shapes: int64 [domains].
        """
        whole, rest = divmod(samples, self.total)
        below = np.array([0, *(self._below(int(bound), rest) for bound in self._bounds)], np.int64)
        return whole * np.array(self.weights, np.int64) + np.diff(below)

    def _below(self, bound: int, samples: int) -> int:
        """How many of the first samples have a number below `bound`."""
        upper = floor_sum(samples, self.total, self._step, self._offset)
        lower = floor_sum(samples, self.total, self._step, self._offset + self.total - bound)
        return upper - lower + samples


def floor_sum(count: int, divisor: int, step: int, offset: int) -> int:
    """Sum of `(step * i + offset) // divisor` over i below `count`, in logarithmic time.

    Source: Graham, Knuth and Patashnik, Concrete Mathematics, section 3.5: rows and columns of a lattice.
    """
    total = 0
    while count > 0:
        total += (step // divisor) * (count * (count - 1) // 2) + (offset // divisor) * count
        step, offset = step % divisor, offset % divisor
        top = step * count + offset
        count, offset = divmod(top, divisor)
        step, divisor = divisor, step
    return total


def _golden(total: int) -> int:
    """A number near the golden section of `total`, with no divisor in common, whose steps fill it evenly.

    Of the nearest it is the one whose continued fraction has the least sum: that bounds how far any share of
    the numbers is ever from its due.

    Source: Kuipers and Niederreiter 1974, Uniform Distribution of Sequences, chapter 2, section 3, for
    irrational steps, of which these are the finite kind.
    """
    near = round(total * (math.sqrt(5) - 1) / 2)
    candidates = sorted(
        range(max(1, near - NEARBY), min(total, near + NEARBY) + 1), key=lambda n: abs(n - near)
    )
    return min((n for n in candidates if math.gcd(n, total) == 1), key=lambda n: sum(_quotients(n, total)))


def _quotients(numerator: int, denominator: int) -> list[int]:
    """The continued fraction of a ratio."""
    quotients = []
    while denominator:
        quotient, rest = divmod(numerator, denominator)
        quotients.append(quotient)
        numerator, denominator = denominator, rest
    return quotients

"""What a recipe trains on: one token store, or several in proportion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

from mosaicjax.data.order import MOST
from mosaicjax.errors import InputError


class Rows(Enum):
    """How documents become rows."""

    CONCATENATED = "concatenated"
    """One after the other, cut wherever a row is full."""
    BEST_FIT = "best fit"
    """Whole, but for those longer than a row, where they leave the least room empty."""
    PAIRS = "pairs"
    """Of a store of preference pairs, for `DPO`: both answers whole and next to each other, so packed."""


@dataclass(frozen=True)
class TrainingData:
    """What a recipe trains on."""

    @property
    def isolate(self) -> bool:
        """Whether each document of a row is a segment of its own, whose positions begin at 0."""
        raise TypeError(f"{type(self).__name__} does not say whether documents see each other")

    @property
    def rows(self) -> Rows:
        """How documents become rows."""
        return Rows.CONCATENATED

    def check(self) -> None:
        """Raises: InputError for whole documents in rows that see each other."""
        if self.rows is not Rows.CONCATENATED and not self.isolate:
            raise InputError(
                "documents packed whole that see each other",
                expected=f"isolate with data.rows {self.rows.name}",
                got="isolate=False",
                fix="--data.isolate True",
            )

    def stores(self) -> dict[str, str]:
        """The token stores, by the name of their domain.

        Raises: InputError for names or amounts that cannot be.
        """
        raise TypeError(f"{type(self).__name__} does not say where its tokens are")

    def weights(self, rows: Sequence[int]) -> tuple[int, ...]:
        """How many of every so many rows come from each store, where they hold so many rows.

        Raises: InputError for an amount that comes to no row.
        """
        raise TypeError(f"{type(self).__name__} does not say how its stores are mixed")


@dataclass(frozen=True)
class TokenStore(TrainingData):
    """One token store: where it lies, and whether the documents of a row are kept from each other."""

    path: str
    isolate: bool = False
    rows: Rows = Rows.CONCATENATED

    def stores(self) -> dict[str, str]:
        """See `TrainingData.stores`."""
        return {"": self.path}

    def weights(self, rows: Sequence[int]) -> tuple[int, ...]:
        """See `TrainingData.weights`."""
        return tuple(rows)


class By(Enum):
    """What the amounts of a mixture count."""

    SHARE = "share"
    """Parts of the rows; they need not sum to 1."""
    EPOCHS = "epochs"
    """How often a domain's rows come in an epoch of the mixture."""
    ROWS = "rows"
    """How many of a domain's rows come in an epoch of the mixture."""


@dataclass(frozen=True)
class Domain:
    """One token store of a mixture; `amount` is in the units that the mixture says."""

    name: str
    path: str
    amount: float


@dataclass(frozen=True)
class Mixture(TrainingData):
    """Several token stores of one tokenizer, their rows mixed.

    Each domain goes through its own rows again and again, every time in another order; the amounts say only
    how many of a mixture's rows it has. Shares are kept within a few rows at every step, and exactly in the
    long run; epochs and rows exactly in every epoch of the mixture.
    """

    domains: tuple[Domain, ...]
    by: By = By.SHARE
    isolate: bool = False
    rows: Rows = Rows.CONCATENATED

    def stores(self) -> dict[str, str]:
        """See `TrainingData.stores`."""
        if not self.domains:
            raise InputError("a mixture without domains", expected="one or more")
        stores = {domain.name: domain.path for domain in self.domains}
        if len(stores) < len(self.domains) or "" in stores:
            names = [domain.name for domain in self.domains]
            raise InputError("a mixture's domains", expected="a name of its own for each", got=names)
        for domain in self.domains:
            if not 0 < domain.amount < math.inf:
                raise InputError(
                    f"the amount of the domain {domain.name}",
                    expected=f"a number of {self.by.value} above 0",
                    got=domain.amount,
                )
        return stores

    def weights(self, rows: Sequence[int]) -> tuple[int, ...]:
        """See `TrainingData.weights`."""
        # As written in decimal: 0.1 is a tenth, not the binary number nearest to it.
        amounts = [Fraction(str(domain.amount)) for domain in self.domains]
        if self.by is By.SHARE:
            weights = _whole(amounts)
        elif self.by is By.EPOCHS:
            weights = [round(amount * count) for amount, count in zip(amounts, rows, strict=True)]
        else:
            weights = [round(amount) for amount in amounts]
        for domain, weight in zip(self.domains, weights, strict=True):
            if weight < 1:
                raise InputError(
                    f"the domain {domain.name} would never come",
                    expected="an amount of one row or more",
                    got=f"{domain.amount} {self.by.value}",
                )
        return tuple(weights)


def _whole(shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers in proportion to shares: exactly where the shuffle can count so far, else nearly."""
    unit = math.lcm(*(share.denominator for share in shares))
    exact = [int(share * unit) for share in shares]
    common = math.gcd(*exact)
    exact = [weight // common for weight in exact]
    if sum(exact) <= MOST:
        return exact
    total = sum(shares)
    bounds = [math.floor(sum(shares[:i]) / total * MOST) for i in range(len(shares) + 1)]
    return [after - before for before, after in zip(bounds, bounds[1:], strict=False)]

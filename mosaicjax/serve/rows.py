"""Requests on their way, and the arrays that a call of the engine's program takes of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mosaicjax.errors import InputError
from mosaicjax.generate import TextStream
from mosaicjax.serve.pages import Table
from mosaicjax.serve.request import Finish, Hear, Wishes


@dataclass(frozen=True)
class Sizes:
    """What is compiled, and how much is held: `rows` written and `chunk` tokens of a prompt read at once.

    `pages` of `page` tokens hold the keys and values of all requests; one has at most `longest` tokens,
    prompt and text together. `widths` are fewer rows that are compiled for too: as few are computed as hold
    all that write. A row's numbers are the same to the last bit among any neighbours in one width, and to
    rounding in another.
    """

    rows: int = 32
    chunk: int = 128
    page: int = 16
    pages: int = 1_024
    longest: int = 2_048
    widths: tuple[int, ...] = ()

    def check(self) -> None:
        """Refuse sizes that mean nothing.

        Raises:
            InputError: with the size, expected and got.
        """
        for name in ("rows", "chunk", "page", "pages", "longest"):
            if getattr(self, name) < 1:
                raise InputError(f"serve's {name}", expected="1 or more", got=getattr(self, name))
        if self.chunk % self.page:
            raise InputError("serve's chunk", expected=f"a multiple of {self.page}, a page", got=self.chunk)
        if self.table > self.pages:
            raise InputError(
                "serve's pages",
                expected=f"{self.table} or more, for one request of {self.longest} tokens",
                got=self.pages,
            )
        for width in self.widths:
            if not 1 <= width <= self.rows:
                raise InputError("serve's widths", expected=f"1 to {self.rows}, the rows", got=width)

    @property
    def table(self) -> int:
        """Pages that the longest request takes."""
        return math.ceil(self.longest / self.page)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and tokens of each program: the widths, narrow ones first, and a prompt's chunk."""
        return [*((width, 1) for width in sorted({*self.widths, self.rows})), (1, self.chunk)]

    def width(self, count: int) -> int:
        """Rows that are computed where so many write."""
        return min(width for width in (*self.widths, self.rows) if width >= count)


@dataclass(eq=False)
class Request:
    """A request on its way; only the engine's thread changes it.

    `number` is the order of arrival, `choice` which of several completions of one prompt this is: with the
    seed and a token's position it is what randomness depends on. `read` of its tokens have keys in the cache;
    `pending` was drawn last and has none yet.
    """

    number: int
    prompt: tuple[int, ...]
    wishes: Wishes
    hear: Hear
    stream: TextStream
    choice: int = 0
    written: list[int] = field(default_factory=list)
    finish: Finish | None = None
    cancelled: bool = False
    table: Table | None = None
    row: int | None = None
    read: int = 0
    pending: int | None = None

    @property
    def tokens(self) -> list[int]:
        """Prompt and text."""
        return [*self.prompt, *self.written]


Work = Sequence[tuple[Request, Sequence[int]]]
"""Requests, each with the tokens that it reads next."""


def placed(work: Work, shape: tuple[int, int], sizes: Sizes) -> list[int]:
    """Each request's place in a call: its own row where there are as many, else one after the other."""
    if shape == (sizes.rows, 1):
        return [_row(request) for request, _ in work]
    return list(range(len(work)))


def arrays(work: Work, shape: tuple[int, int], sizes: Sizes, vocabulary: int) -> dict[str, np.ndarray]:
    """What `stepped` takes of some requests; rows left over are nobody's."""
    rows, length = shape
    tokens_BL = np.zeros((rows, length), np.int32)
    first_B, lengths_B, before_B, top_k_B = (np.zeros(rows, np.int32) for _ in range(4))
    tables_BM = np.zeros((rows, sizes.table), np.int32)
    seeds_B2 = np.zeros((rows, 2), np.uint32)
    numbers_B3 = np.zeros((rows, 3), np.float32)
    numbers_B3[:, 1] = 1.0
    told_B, taken_B = np.zeros(rows, bool), np.zeros(rows, bool)
    for (request, tokens), i in zip(work, placed(work, shape, sizes), strict=True):
        assert request.table is not None
        sampling, pages = request.wishes.sampling, request.table.numbers
        tokens_BL[i, : len(tokens)] = tokens
        first_B[i], lengths_B[i] = request.read, len(tokens)
        before_B[i] = request.table.tokens[request.read - 1] if request.read else 0
        tables_BM[i, : len(pages)] = pages
        seeds_B2[i] = sampling.seed, request.choice
        numbers_B3[i] = sampling.temperature, sampling.top_p, request.wishes.min_p
        top_k_B[i] = min(sampling.top_k, vocabulary)
        told_B[i] = request.wishes.logprobs is not None
        # Behind a part of a prompt a token is drawn too, that nobody takes.
        taken_B[i] = request.read + len(tokens) == len(request.table.tokens)
    return {
        "tokens_BL": tokens_BL,
        "first_B": first_B,
        "lengths_B": lengths_B,
        "before_B": before_B,
        "tables_BM": tables_BM,
        "slots_B": _slots(work, shape, sizes),
        "seeds_B2": seeds_B2,
        "numbers_B3": numbers_B3,
        "top_k_B": top_k_B,
        "told_B": told_B,
        "taken_B": taken_B,
    }


def _slots(work: Work, shape: tuple[int, int], sizes: Sizes) -> np.ndarray:
    """The rows whose penalties are each place's; those of others where a place is nobody's."""
    if shape == (sizes.rows, 1):
        return np.arange(sizes.rows, dtype=np.int32)
    mine = [_row(request) for request, _ in work]
    others = (row for row in range(sizes.rows) if row not in mine)
    return np.array([*mine, *itertools.islice(others, shape[0] - len(mine))], np.int32)


def _row(request: Request) -> int:
    assert request.row is not None
    return request.row

"""A text of which some characters bear loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Marked:
    """A text with spans of its characters, each from its first up to its last: in order, none over another.

    `special` are spans of special tokens, `learned` those whose tokens bear loss as targets.
    """

    text: str
    special: tuple[tuple[int, int], ...]
    learned: tuple[tuple[int, int], ...]
    name: str

    def __len__(self) -> int:
        """Characters of the text."""
        return len(self.text)

    def encode(self) -> bytes:
        """All that decides what it becomes."""
        return f"{self.special} {self.learned}\0{self.text}".encode()

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The text, special tokens apart from what lies between them."""
        at = 0
        for first, last in (*self.special, (len(self.text), len(self.text))):
            if at < first:
                yield self.text[at:first], False
            if first < last:
                yield self.text[first:last], True
            at = last


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, each a document with the prompt before it; the answer alone is learned."""

    chosen: Marked
    rejected: Marked

    def __len__(self) -> int:
        """Characters of both."""
        return len(self.chosen) + len(self.rejected)

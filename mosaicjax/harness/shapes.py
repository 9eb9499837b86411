"""The few shapes that requests of all lengths are padded to, so that few programs are compiled."""

from __future__ import annotations

from bisect import bisect_left

UNIT = 64
"""Padded lengths are multiples of so many tokens, as far as the model has that many positions."""


def lengths_up_to(longest: int) -> list[int]:
    """Padded lengths for rows of up to `longest` tokens: each at most half as long again as the one before.

    Units, from the second on: 64, 128, 192, 256, 384, 512, 768, ...; the last is `longest` itself.
    """
    sizes = {UNIT}
    power = 2 * UNIT
    while power < longest:
        sizes |= {power, power + power // 2}
        power *= 2
    return sorted({size for size in sizes if size < longest} | {longest})


def padded(length: int, sizes: list[int]) -> int:
    """The least of the sizes that holds so many tokens."""
    place = bisect_left(sizes, length)
    assert place < len(sizes), (length, sizes)
    return sizes[place]

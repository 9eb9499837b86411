"""Texts of which some bears loss, in tokens: which of those bear loss."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np

from mosaicjax.data.marked import Marked
from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError


def encode_marked(texts: Sequence[Marked], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The ids of each text, and which of them bear loss: those that have a byte of a learned span.

    Shapes: int64 and bool, [tokens] each.
    Raises: InputError naming a text that the tokenizer changes, so that no token is of a place in it.
    """
    cut = [list(each.pieces()) for each in texts]
    encoded = iter(
        tokenizer.encode_batch([piece for pieces in cut for piece, special in pieces if not special])
    )
    for marked, pieces in zip(texts, cut, strict=True):
        ids: list[int] = []
        sizes: list[int] = []
        every = marked.learned == ((0, len(marked)),)
        for piece, special in pieces:
            if special:
                ids.append(tokenizer.special[piece])
                sizes.append(len(piece.encode()))
                continue
            found = next(encoded)
            ids += found
            if not every:
                sizes += _sizes(found, piece, tokenizer, marked.name)
        if every:
            yield np.array(ids, np.int64), np.ones(len(ids), bool)
            continue
        ends = np.cumsum(sizes, dtype=np.int64)
        starts = ends - np.array(sizes, np.int64)
        bears = np.zeros(len(ids), bool)
        for first, last in _in_bytes(marked.text, marked.learned):
            bears |= (starts < last) & (ends > first)
        yield np.array(ids, np.int64), bears


def _sizes(ids: Sequence[int], text: str, tokenizer: Tokenizer, name: str) -> list[int]:
    """How many bytes of a text each of its ids stands for."""
    pieces = [tokenizer.pieces[each] for each in ids]
    sizes = list(map(len, pieces))
    found, expected = b"".join(pieces), text.encode()
    if found == expected:
        return sizes
    if tokenizer.leading_space and found == b" " + expected:
        return [sizes[0] - 1, *sizes[1:]]
    raise InputError(
        f"{name}: the tokenizer changes the text, so which tokens bear loss cannot be told",
        expected="a tokenizer whose tokens are the text's own bytes",
        fix="--loss-on all, or another tokenizer",
    )


def _in_bytes(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of characters as spans of UTF-8 bytes."""
    places = sorted({place for span in spans for place in span})
    at, ends = 0, []
    for before, place in zip([0, *places], places, strict=False):
        at += len(text[before:place].encode())
        ends.append(at)
    return [(ends[bisect_left(places, first)], ends[bisect_left(places, last)]) for first, last in spans]

"""What a general compressor makes of the held-out documents: the floor that a language model must beat."""

from __future__ import annotations

import gzip
from dataclasses import dataclass

import numpy as np

from mosaicjax.data.store import Store

GZIP_LEVEL = 9


@dataclass(frozen=True)
class Compressed:
    """Sums over documents, each compressed on its own."""

    documents: int
    text_bytes: int
    bits: int

    @property
    def bits_per_byte(self) -> float:
        """Units: bits a byte of text."""
        return self.bits / self.text_bytes


def gzip_held_out(store: Store) -> Compressed:
    """`gzip -9` of each held-out document, headers included."""
    split = store.split("validation")
    starts, _ = split.documents()
    ends = np.append(starts[1:] - 1, len(split) - 1)
    text_bytes = bits = 0
    for start, end in zip(starts, ends, strict=True):
        tokens = split.tokens([int(start)], int(end - start))[0]
        document = store.tokenizer.decode_bytes(tokens.tolist())
        text_bytes += len(document)
        bits += 8 * len(gzip.compress(document, GZIP_LEVEL, mtime=0))
    return Compressed(len(starts), text_bytes, bits)

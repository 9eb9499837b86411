"""What a general compressor makes of the held-out documents: the floor that a language model must beat."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass

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


def gzip_held_out(stores: Sequence[Store]) -> Compressed:
    """`gzip -9` of each held-out document, headers included."""
    documents = text_bytes = bits = 0
    for store in stores:
        split = store.split("validation")
        documents += split.counts.documents
        for start, end in split.spans().tolist():
            document = store.tokenizer.decode_bytes(split.tokens(start, end).tolist())
            text_bytes += len(document)
            bits += 8 * len(gzip.compress(document, GZIP_LEVEL, mtime=0))
    return Compressed(documents, text_bytes, bits)

"""Which documents are held out for validation: a property of the document alone."""

from __future__ import annotations

import hashlib

from mosaicjax.errors import InputError


def check_fraction(fraction: float) -> None:
    """Refuse a held-out fraction that is not a share of the documents.

    Raises: InputError unless 0 <= fraction < 1.
    """
    if not 0.0 <= fraction < 1.0:
        raise InputError(
            "the held-out fraction is out of range",
            expected="0 <= fraction < 1",
            got=fraction,
            fix="0.01 holds out one document in a hundred",
        )


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split.

    The decision hashes the document's UTF-8 bytes and nothing else, so that the tokenizer's training and
    every build agree on it, a copy of a document is never on the other side, and a smaller fraction holds out
    a subset of what a larger one does.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64

"""Fill-in-the-middle: a share of the training documents is reordered, so that a model learns to infill.

Source: Bavarian et al. 2022, arXiv 2207.14255: two cuts at random characters of a document (section 3), and
for suffix-prefix-middle the second variant of its appendix D, which shares its sentinels' places with
prefix-suffix-middle.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError

SPELLINGS = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<PRE>", "<MID>", "<SUF>"),
)
"""Sentinels that are looked for where none are named: prefix, middle, suffix."""

PLAIN, PSM, SPM = range(3)
"""What became of a document."""

DRAW_BYTES = 8


@dataclass(frozen=True)
class FillInMiddle:
    """Which documents are reordered: a share `rate`, of those `spm` as suffix, prefix, middle.

    `tokens` are the sentinels of prefix, middle and suffix, special tokens of the tokenizer (empty: those of
    `SPELLINGS` that it has). Where a document is cut depends on it and the build's seed alone.
    """

    rate: float
    spm: float = 0.5
    tokens: tuple[str, ...] = ()

    def resolve(self, tokenizer: Tokenizer) -> FillInMiddle:
        """This with its sentinels named.

        Raises:
            InputError: shares out of range, or a tokenizer without such sentinels.
        """
        for name, share in (("--fim", self.rate), ("--fim-spm", self.spm)):
            if not 0 <= share <= 1:
                raise InputError(f"{name} is a share of the documents", expected="0 to 1", got=share)
        if tokenizer.leading_space or tokenizer.decode_bytes(tokenizer.encode("a")) != b"a":
            raise InputError(
                "fill-in-the-middle with a tokenizer that puts a space before a text",
                expected="one by which a document's pieces mean the same as the document (byte-level)",
            )
        named = (self.tokens,) if self.tokens else SPELLINGS
        found = [tokens for tokens in named if all(token in tokenizer.special for token in tokens)]
        if len(found) != 1 or len(set(found[0])) != 3:
            raise InputError(
                "fill-in-the-middle needs three sentinels among the tokenizer's special tokens",
                expected=" or ".join(",".join(tokens) for tokens in named),
                got=", ".join(sorted(tokenizer.special)),
                fix="--fim-tokens PREFIX,MIDDLE,SUFFIX, with `special` true in the tokenizer's added_tokens;"
                " `mosaicjax data train-tokenizer --special TOKEN` makes them",
            )
        return replace(self, tokens=found[0])

    def split(self, text: str, seed: int) -> tuple[int, tuple[str, str, str]]:
        """What becomes of a document, and its prefix, middle and suffix: two cuts, each anywhere in it."""
        digest = hashlib.blake2b(
            text.encode(), digest_size=4 * DRAW_BYTES, key=f"fim/{seed}".encode()
        ).digest()
        chosen, order, *cuts = (
            int.from_bytes(digest[at : at + DRAW_BYTES], "big") for at in range(0, len(digest), DRAW_BYTES)
        )
        unit = 2 ** (8 * DRAW_BYTES)
        if chosen >= self.rate * unit:
            return PLAIN, (text, "", "")
        first, last = sorted(cut * (len(text) + 1) // unit for cut in cuts)
        kind = SPM if order < self.spm * unit else PSM
        return kind, (text[:first], text[first:last], text[last:])

    def join(self, kind: int, pieces: tuple[list[int], ...], tokenizer: Tokenizer) -> list[int]:
        """The ids of a reordered document, from those of its prefix, middle and suffix."""
        to_prefix, to_middle, to_suffix = (tokenizer.special[token] for token in self.tokens)
        prefix, middle, suffix = pieces
        if kind == PSM:
            return [to_prefix, *prefix, to_suffix, *suffix, to_middle, *middle]
        return [to_prefix, to_suffix, *suffix, to_middle, *prefix, *middle]


def encode(
    fim: FillInMiddle, texts: tuple[str, ...], plain: list[bool], seed: int, tokenizer: Tokenizer
) -> tuple[list[list[int]], list[int]]:
    """The ids of documents, and what became of each; those that are `plain` stay as they are."""
    splits = [
        (PLAIN, (text, "", "")) if stays else fim.split(text, seed)
        for text, stays in zip(texts, plain, strict=True)
    ]
    pieces = iter(
        tokenizer.encode_batch(
            [piece for kind, parts in splits for piece in (parts if kind != PLAIN else parts[:1])]
        )
    )
    rows = [
        next(pieces)
        if kind == PLAIN
        else fim.join(kind, (next(pieces), next(pieces), next(pieces)), tokenizer)
        for kind, _ in splits
    ]
    return rows, [kind for kind, _ in splits]

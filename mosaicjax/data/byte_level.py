"""Byte-level BPE: reading its `tokenizer.json`, and deciding when tiktoken encodes it with the same ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Ours, for text and code: numbers in groups of up to three digits; line ends apart from the indentation that
# follows, so that one token is one depth of indentation; a word takes the one space or mark before it.
PATTERN = (
    r"'(?:[sdmtSDMT]|ll|LL|ve|VE|re|RE)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TIKTOKEN_PATTERNS = frozenset({GPT2_PATTERN, CL100K_PATTERN, PATTERN})


def _byte_characters() -> tuple[str, ...]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


BYTE_CHARACTERS = _byte_characters()
"""The printable character that stands for each byte in a byte-level vocabulary."""
CHARACTER_BYTES: Mapping[str, int] = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def piece_bytes(piece: str) -> bytes:
    """Return the bytes that an entry of a byte-level vocabulary stands for.

    Raises: KeyError for a character that stands for no byte.
    """
    return bytes(CHARACTER_BYTES[character] for character in piece)


def has_type(part: Mapping[str, Any] | None, kind: str) -> bool:
    """Whether a pre-tokenizer, normalizer or decoder is of a type, alone or within a sequence."""
    if part is None:
        return False
    if part["type"] == "Sequence":
        steps = part.get("pretokenizers") or part.get("normalizers") or part.get("decoders") or []
        return any(has_type(step, kind) for step in steps)
    return bool(part["type"] == kind)


def split_pattern(settings: Mapping[str, Any]) -> str | None:
    """Return the expression a byte-level pre-tokenizer splits text by, or None where it does more."""
    part = settings.get("pre_tokenizer")
    if part is None:
        return None
    if part["type"] == "ByteLevel":
        plain = not part.get("add_prefix_space", True) and part.get("use_regex", True)
        return GPT2_PATTERN if plain else None
    if part["type"] != "Sequence" or [step["type"] for step in part["pretokenizers"]] != [
        "Split",
        "ByteLevel",
    ]:
        return None
    split, byte_level = part["pretokenizers"]
    if split["behavior"] != "Isolated" or split["invert"] or byte_level["add_prefix_space"]:
        return None
    if byte_level.get("use_regex", True):
        return None
    pattern = split["pattern"].get("Regex")
    return pattern if isinstance(pattern, str) else None


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of a BPE model in order, from either way `tokenizer.json` writes them."""
    pairs = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs


def tiktoken_ranks(settings: Mapping[str, Any]) -> dict[bytes, int] | None:
    """Return the ranks with which tiktoken gives the same ids as this `tokenizer.json`, or None if none do.

    tiktoken joins the adjacent pair whose union has the lowest id, whatever the pair; BPE proper joins the
    pair of the first merge in the list. The two are the same when (1) nothing but a known expression stands
    before the merges, (2) each entry that is no single byte comes of one merge, and their ids rise with the
    merges, and (3) each entry's own bytes merge into that entry. For suppose that in some text two neighbours
    x, y unite to an entry t of which (x, y) is not the merge: what happened inside t's span is what happens
    to t's bytes alone, so those would get stuck at x, y too, against (3).
    """
    model = settings["model"]
    if not _is_plain_bpe(settings):
        return None
    special = {token["content"] for token in settings["added_tokens"]}
    vocabulary: dict[str, int] = {piece: id_ for piece, id_ in model["vocab"].items() if piece not in special}
    if not set(BYTE_CHARACTERS) <= vocabulary.keys():
        return None
    results = [left + right for left, right in merge_pairs(model)]
    if len(vocabulary) != 256 + len(results) or not all(result in vocabulary for result in results):
        return None
    ids = [vocabulary[result] for result in results]
    if any(later <= earlier for earlier, later in zip(ids, ids[1:], strict=False)):
        return None
    return (
        {piece_bytes(piece): id_ for piece, id_ in vocabulary.items()}
        if _self_encoding(model, results)
        else None
    )


def _is_plain_bpe(settings: Mapping[str, Any]) -> bool:
    model = settings["model"]
    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return (
        model.get("type") == "BPE"
        and not any(model.get(option) for option in unusual)
        and not model.get("byte_fallback")
        and settings.get("normalizer") is None
        and all(token["special"] for token in settings["added_tokens"])
        and split_pattern(settings) in TIKTOKEN_PATTERNS
    )


def _self_encoding(model: Mapping[str, Any], pieces: list[str]) -> bool:
    from tokenizers import Tokenizer, models

    merges_alone = Tokenizer(models.BPE(vocab=model["vocab"], merges=merge_pairs(model)))
    return all(
        encoding.tokens == [piece]
        for encoding, piece in zip(merges_alone.encode_batch(pieces), pieces, strict=True)
    )

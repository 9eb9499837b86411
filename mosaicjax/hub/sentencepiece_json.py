"""A SentencePiece BPE as a `tokenizer.json`, where that gives the same ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mosaicjax.data.tokenizer import Tokenizer

_SPACE = "▁"
_PIECES_A_PROBE = 40
_TEXTS = (
    "",
    " ",
    "  two  spaces ",
    "a\n\n\tb",
    "größe 12,345.67",
    "日本語 🙂",
    "don't\r\n",
    "x" * 50,
    "= " * 20,
)


def to_json(file: Path, ours: Tokenizer) -> dict[str, Any] | None:
    """The settings of a `tokenizer.json`; None where they would give other ids on some text that was tried.

    Merges are all pairs of pieces that make up a piece, the likeliest piece first.
    """
    import sentencepiece
    from tokenizers import Tokenizer as HuggingFace

    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    names = [model.id_to_piece(id_) for id_ in range(model.vocab_size())]
    special = [id_ for id_ in range(len(names)) if model.is_control(id_) or model.is_unknown(id_)]
    unknown = model.id_to_piece(model.unk_id())
    settings = _settings(names, special, unknown, [list(pair) for pair in _merges(model, names)], ours)
    try:
        # `tokenizers` raises the bare class for settings it cannot use
        theirs = HuggingFace.from_str(json.dumps(settings))
    except Exception:
        return None
    theirs.encode_special_tokens = True
    for text in _probes(ours):
        if theirs.encode(text, add_special_tokens=False).ids != ours.encode(text):
            return None
    return settings


def _merges(model: Any, names: list[str]) -> Iterator[tuple[str, str]]:
    ids = {name: id_ for id_, name in enumerate(names)}
    found = []
    for id_, name in enumerate(names):
        if model.is_control(id_) or model.is_unknown(id_) or model.is_byte(id_):
            continue
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in ids and right in ids:
                # Of equal scores SentencePiece takes what is further left: so a long run grows from there.
                found.append((-model.get_score(id_), -len(name), -cut, left, right))
    for *_, left, right in sorted(found):
        yield left, right


def _settings(
    names: list[str], special: list[int], unknown: str, merges: list[list[str]], ours: Tokenizer
) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if ours.leading_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if ours.leading_space else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, "content": names[id_], **flags} for id_ in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: id_ for id_, name in enumerate(names)},
            "merges": merges,
        },
    }


def _probes(ours: Tokenizer) -> Iterator[str]:
    """Texts that bring every piece into play, and some in which tokenizers differ."""
    yield from _TEXTS
    pieces = [piece.decode(errors="ignore") for piece in ours.pieces]
    for first in range(0, len(pieces), _PIECES_A_PROBE):
        yield "".join(pieces[first : first + _PIECES_A_PROBE])
        yield " ".join(pieces[first : first + _PIECES_A_PROBE])

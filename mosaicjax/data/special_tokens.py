"""Special tokens added to a tokenizer that exists: each gets an id of its own, and all others keep theirs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosaicjax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_settings
from mosaicjax.errors import InputError

CONFIG = "tokenizer_config.json"
BESIDE = ("chat_template.jinja", "special_tokens_map.json")
"""Files that are copied as they are."""


def add_special_tokens(source: str | Path, out: str | Path, tokens: Sequence[str]) -> Tokenizer:
    """Write a tokenizer with special tokens added into the folder `out`, as `tokenizer.json`.

    New ids follow the largest; a name that is a piece of the vocabulary already keeps its id and becomes
    special, as in Transformers. No text is encoded as a special token, only what a chat template writes.

    Raises: InputError for a SentencePiece model, whose file cannot be added to, names that are empty, given
        twice or special already, or an `out` that holds the source.
    """
    loaded, out = load_tokenizer(source), Path(out)
    if not tokens or not all(tokens) or len(set(tokens)) < len(tokens):
        raise InputError("special tokens to add", expected="names, each once", got=" ".join(tokens) or "none")
    known = [token for token in tokens if token in loaded.special]
    if known:
        raise InputError(f"{source} has the special token {known[0]} already", fix="leave it out")
    if loaded.encoder == "sentencepiece":
        raise InputError(
            f"{loaded.files[0]} is a SentencePiece model, which takes no more tokens",
            expected="a tokenizer.json, or GPT-2's pair of files",
            fix="the model's tokenizer.json, or one of `mosaicjax export`",
        )
    folder = loaded.files[0].parent
    if out.resolve() == folder.resolve():
        raise InputError(f"{out} holds the tokenizer that is added to", fix="another --out")
    settings = tokenizer_settings(loaded.files)
    settings["added_tokens"] = [*settings["added_tokens"], *_added(settings, loaded.size, tokens)]
    out.mkdir(parents=True, exist_ok=True)
    for name in BESIDE:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).exists() else {}
    # Transformers would read them from here again, with the ids of before.
    config.pop("added_tokens_decoder", None)
    _write(out / CONFIG, {**config, "eos_token": config.get("eos_token", loaded.separator_token)})
    _write(out / "tokenizer.json", settings)
    return load_tokenizer(out)


def _added(settings: dict[str, Any], size: int, tokens: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of new tokens; the vocabulary itself stays as it is."""
    vocabulary = settings["model"]["vocab"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    entries = []
    for token in tokens:
        number = vocabulary.get(token) if isinstance(vocabulary, dict) else None
        entries.append({"id": size if number is None else number, "content": token, **flags})
        size += number is None
    return entries


def _write(path: Path, values: dict[str, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)

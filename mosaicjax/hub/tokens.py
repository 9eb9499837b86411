"""Tokenizers of foreign models: which files make one up, and what its model expects around a text."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaicjax import storage
from mosaicjax.data.tokenizer import DETECT, Tokenizer, load_tokenizer
from mosaicjax.errors import InputError
from mosaicjax.hub.foreign_dir import read_object

JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys under which configurations name special tokens."""

_FILES = (
    *(JSON, CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "encoder.json", "vocab.bpe"),
)
_BOS_BY_DEFAULT = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


@dataclass(frozen=True)
class Around:
    """What a model expects around a text.

    `before` are ids put before a prompt, `ends` ids that end a text; `separator` is the token that separates
    documents ("": the tokenizer's files say it).
    """

    before: tuple[int, ...]
    ends: tuple[int, ...]
    separator: str


def files_of(folder: storage.PathLike) -> list[str]:
    """The names of a tokenizer's files in a directory."""
    return [name for name in storage.list_dir(folder) if name in _FILES or ".model" in Path(name).suffixes]


def special_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens as the generation's configuration names them, or else the model's."""
    return {key: generation.get(key, config.get(key)) for key in IDS}


def around(folder: storage.PathLike, ids: Mapping[str, Any]) -> Around:
    """What the model of a directory expects around a text, as Transformers would read its tokenizer's files.

    Raises:
        InputError: there is no tokenizer, or it cannot be read.
    """
    with_files = local_copy(folder)
    try:
        return _around(with_files, ids)
    finally:
        if storage.is_remote(folder):
            shutil.rmtree(with_files)


def _around(with_files: Path, ids: Mapping[str, Any]) -> Around:
    eos = ids.get("eos_token_id")
    ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    separator = _special_token(with_files / JSON, ends)
    loaded = load_tokenizer(with_files, separator=separator or DETECT)
    before = _before(with_files, loaded, ids)
    return Around(before, ends or (loaded.separator,), separator)


def load(folder: storage.PathLike, around: Around | None) -> Tokenizer:
    """A tokenizer that puts around a text what its model expects (None: its separator).

    A remote one is copied to a temporary folder, that lives as long as the tokenizer.

    Raises:
        InputError: there is no tokenizer, or it cannot be read.
    """
    copy = local_copy(folder)
    try:
        loaded = load_tokenizer(copy, separator=around.separator or DETECT if around else DETECT)
    except BaseException:
        if storage.is_remote(folder):
            shutil.rmtree(copy)
        raise
    if around is not None:
        loaded.before, loaded.ends = around.before, around.ends
    if storage.is_remote(folder):
        weakref.finalize(loaded, shutil.rmtree, copy)
    return loaded


def local_copy(folder: storage.PathLike) -> Path:
    """The directory itself, or for a remote one a temporary copy of its tokenizer's files.

    Raises:
        InputError: it holds no tokenizer.
    """
    names = files_of(folder)
    if not names:
        raise InputError(f"{folder} holds no tokenizer", expected=f"{JSON} or a SentencePiece *.model")
    if not storage.is_remote(folder):
        return Path(storage.local(folder))
    copy = Path(tempfile.mkdtemp(prefix="mosaicjax-tokenizer-"))
    for name in names:
        storage.copy_file(storage.join(folder, name), copy / name)
    return copy


def _special_token(path: Path, ends: tuple[int, ...]) -> str:
    """The text of the first of the ids that is a special token of a `tokenizer.json`; "" where none is."""
    if not path.exists() or not ends:
        return ""
    special = {token["id"]: token["content"] for token in _added(path) if token.get("special")}
    return next((special[end] for end in ends if end in special), "")


def _added(path: Path) -> list[dict[str, Any]]:
    added = read_object(str(path)).get("added_tokens") or []
    return added if isinstance(added, list) else []


def _before(folder: Path, loaded: Tokenizer, ids: Mapping[str, Any]) -> tuple[int, ...]:
    config = read_object(str(folder / CONFIG)) if (folder / CONFIG).exists() else {}
    if (folder / JSON).exists():
        # Where this file is, Transformers heeds its post-processor and not add_bos_token.
        return _processed(folder / JSON)
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    default = kind in _BOS_BY_DEFAULT or (not kind and loaded.encoder == "sentencepiece")
    bos = ids.get("bos_token_id")
    return (bos,) if config.get("add_bos_token", default) and bos is not None else ()


def _processed(path: Path) -> tuple[int, ...]:
    """What a `tokenizer.json` puts before a text.

    Raises:
        InputError: it puts something behind it too, which no prompt that is to be continued should have.
    """
    from tokenizers import Tokenizer as HuggingFace

    try:
        # `tokenizers` raises the bare class for a file it cannot read
        tokenizer = HuggingFace.from_file(str(path))
    except Exception as error:
        raise InputError(f"tokenizer {path} cannot be read", got=str(error)) from error
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    before = len(full) - len(bare)
    if full[before:] != bare:
        raise InputError(
            f"tokenizer {path} puts tokens behind a text, so that its model could not go on with it",
            got=full,
            fix="take them out of its post_processor",
        )
    return tuple(full[:before])

"""What a token store says of itself: its settings, its counts, and the checksum of every file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, cast

from mosaicjax import storage
from mosaicjax.data.chat import Chat, LossOn
from mosaicjax.data.conversations import Format
from mosaicjax.data.fim import FillInMiddle
from mosaicjax.errors import InputError

FORMAT = "mosaicjax token store"
VERSION = 1
NAME = "manifest.json"
SPLITS = ("train", "validation")

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How a build is cut up: `shard_tokens` a file of the store, about `part_characters` a spill file.

    The size of the parts decides nothing about the store.
    """

    shard_tokens: int = 2**26
    part_characters: int = 2**22


@dataclass(frozen=True)
class Settings:
    """What decides the contents of a store, besides the documents themselves."""

    sources: tuple[str, ...]
    source_files: int
    source_bytes: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    field: str
    tokenizer_hash: str
    separator_token: str
    held_out: float
    seed: int
    layout: Layout
    fim: FillInMiddle | None = None
    filters: tuple[str, ...] = ()
    drop_duplicates: bool = False
    chat: Chat | None = None

    @property
    def masked(self) -> bool:
        """Whether there are tokens that bear no loss."""
        return self.chat is not None and self.chat.loss_on is not LossOn.ALL

    @property
    def pairs(self) -> bool:
        """Whether documents 2i and 2i + 1 are the chosen and the rejected answer to one prompt."""
        return self.chat is not None and self.chat.format is Format.PREFERENCE

    def check_same(self, other: Settings, place: Path) -> None:
        """Refuse to go on with other settings than those a directory was begun with.

        Raises: InputError naming the first setting that differs.
        """
        for setting in fields(self):
            begun, now = getattr(self, setting.name), getattr(other, setting.name)
            if begun != now:
                raise InputError(
                    f"{place} was begun with another {setting.name}",
                    expected=begun,
                    got=now,
                    fix="build into another directory, or delete this one",
                )


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer of a store; `files` lie in its folder `tokenizer`, the one to load first."""

    files: tuple[str, ...]
    hash: str
    encoder: str
    size: int
    separator: int
    separator_token: str


@dataclass(frozen=True)
class Counts:
    """How much a split holds; `tokens` counts separators too, `bytes` the UTF-8 of the documents alone."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Built:
    """When and how a store was built; nothing else in a manifest depends on it."""

    command: str
    finished: str
    seconds: float


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    `fim` counts the training documents that were reordered for fill-in-the-middle, `psm` and `spm`.
    """

    format: str
    version: int
    settings: Settings
    tokenizer: TokenizerRecord
    dtype: str
    splits: dict[str, Counts]
    skipped: dict[str, int]
    files: dict[str, FileRecord]
    time: Built
    fim: dict[str, int] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of all files."""
        return sum(record.bytes for record in self.files.values())


def read_manifest(store: storage.PathLike) -> Manifest:
    """Read the manifest of a store.

    Raises: InputError where there is none (no store, or an unfinished build) or it cannot be used.
    """
    path = storage.join(store, NAME)
    if not storage.exists(path):
        if not storage.exists(store):
            raise InputError(f"there is no token store at {store}")
        raise InputError(
            f"{store} has no {NAME}: an unfinished build", fix="run the same command again to finish it"
        )
    text = storage.read_text(path)
    try:
        contents = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is damaged", expected="JSON", got=str(error)) from error
    version = (contents.get("format"), contents.get("version")) if isinstance(contents, dict) else None
    if version != (FORMAT, VERSION):
        raise InputError(f"{path} cannot be read", expected=f"{FORMAT!r} version {VERSION}", got=version)
    return structure(contents, Manifest, path)


def structure(contents: Any, kind: type[T], path: storage.PathLike) -> T:
    """Build a dataclass of this module from parsed JSON.

    Raises: InputError naming the file where fields lack or are too many.
    """
    import cattrs

    try:
        return cattrs.Converter(forbid_extra_keys=True).structure(contents, kind)
    except cattrs.BaseValidationError as error:
        raise InputError(f"{path} is damaged", got="; ".join(cattrs.transform_error(error))) from error


def write_json(path: Path, contents: Mapping[str, Any] | Any) -> None:
    """Write a dataclass or mapping as JSON, whole or not at all, and durably."""
    plain = contents if isinstance(contents, Mapping) else without_empty(contents)
    unfinished = path.with_name(f"{path.name}.{os.urandom(8).hex()}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(plain, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def without_empty(contents: Any) -> Any:
    """A dataclass as mappings, without fields that are empty, as by default: for versions without them."""
    if isinstance(contents, tuple | list):
        return [without_empty(each) for each in contents]
    if isinstance(contents, Mapping):
        return {name: without_empty(value) for name, value in contents.items()}
    if isinstance(contents, Enum):
        return contents.value
    if not is_dataclass(contents):
        return contents
    written: dict[str, Any] = {}
    for each in fields(contents):
        value = getattr(contents, each.name)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if value or value != default:
            written[each.name] = without_empty(value)
    return written


def record_file(path: storage.PathLike) -> FileRecord:
    """Return the size and SHA-256 of a file, on this machine or elsewhere."""
    with storage.reading(path) as file:
        digest = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
        return FileRecord(file.tell(), digest)

"""The first half of a build: parts of the corpus become spill files of tokens, each sorted by shuffle key."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from mosaicjax.data import fim
from mosaicjax.data.documents import Documents
from mosaicjax.data.filters import Filter, first_against
from mosaicjax.data.split import is_held_out
from mosaicjax.data.tokenizer import Tokenizer, load_tokenizer
from mosaicjax.data.workers import run_all
from mosaicjax.errors import InputError

INDEX = np.dtype(
    [
        ("key", "<u8"),
        ("held_out", "?"),
        ("tokens", "<i8"),
        ("bytes", "<i8"),
        ("fim", "u1"),
        ("against", "u1"),
        ("digest", "<u8", 2),
    ]
)
"""One document: `fim` says what fill-in-the-middle made of it, `against` which filter leaves it out, from 1
(0: none; what is left out has no tokens here), `digest` is its text's."""


@dataclass(frozen=True)
class PartSettings:
    """What all parts of a build share; `tokenizer` is the file to load and `folder` where the parts go."""

    folder: Path
    tokenizer: Path
    separator_token: str
    dtype: str
    held_out: float
    seed: int
    characters: int
    fim: fim.FillInMiddle | None = None
    filters: tuple[Filter, ...] = ()


@dataclass(frozen=True)
class Part:
    """Some consecutive documents; `first` is the number of the first in the corpus."""

    settings: PartSettings
    number: int
    first: int
    texts: tuple[str, ...]

    @property
    def spill(self) -> Path:
        """The file of its tokens."""
        return self.settings.folder / f"{self.number:07d}.tokens"

    @property
    def index(self) -> Path:
        """The file that says where each document lies in the spill, named after the texts' own digest.

        So a part left by an earlier run is known to be of the same documents.
        """
        state = hashlib.blake2b(digest_size=12)
        for text in self.texts:
            data = text.encode()
            state.update(len(data).to_bytes(8, "little"))
            state.update(data)
        return self.settings.folder / f"{self.number:07d}-{state.hexdigest()}.npy"


@dataclass(frozen=True)
class Tokenised:
    """A finished part; `documents` are those that are not left out."""

    spill: Path
    index: Path
    documents: int
    tokens: int
    bytes: int


def tokenise(
    documents: Documents, settings: PartSettings, *, workers: int, progress: bool
) -> list[Tokenised]:
    """Make the parts that are missing, and return all in the order of the sources.

    Raises: InputError where a part that an earlier run left is of other documents.
    """
    earlier = {int(path.name.split("-")[0]): path for path in settings.folder.glob("*.npy")}
    done: dict[int, Tokenised] = {}
    totals: Counter[str] = Counter()
    begun = time.monotonic()
    with tqdm(unit="B", unit_scale=True, desc="tokenise", disable=not progress) as bar:

        def add(part: Part, result: Tokenised) -> None:
            done[part.number] = result
            totals["documents"] += result.documents
            totals["tokens"] += result.tokens
            rate = totals["tokens"] / (time.monotonic() - begun)
            bar.set_postfix_str(f"{totals['documents']:,} documents, {rate:,.0f} tokens/s", refresh=False)
            bar.update(result.bytes)

        def missing() -> Iterator[Part]:
            for part in _parts(documents, settings):
                finished = _finished(part, earlier.get(part.number))
                if finished is None:
                    yield part
                else:
                    add(part, finished)

        for part, result in run_all(tokenise_part, missing(), workers):
            add(part, result)
    for number in earlier.keys() - done.keys():
        raise _changed(earlier[number])
    return [done[number] for number in range(len(done))]


def tokenise_part(part: Part) -> Tokenised:
    """Tokenise a part into its spill file, sorted by split and key, and then write its index."""
    settings = part.settings
    tokenizer = _tokenizer(settings.tokenizer, settings.separator_token)
    against = [first_against(settings.filters, text) for text in part.texts]
    kept = [i for i, number in enumerate(against) if not number]
    texts = tuple(part.texts[i] for i in kept)
    held_out = [is_held_out(text, settings.held_out) for text in texts]
    kinds = [fim.PLAIN] * len(texts)
    if settings.fim is None:
        encoded = tokenizer.encode_batch(texts)
    else:
        encoded, kinds = fim.encode(settings.fim, texts, held_out, settings.seed, tokenizer)
    index = np.zeros(len(part.texts), INDEX)
    index["against"] = against
    index["key"] = [shuffle_key(settings.seed, part.first + i) for i in range(len(index))]
    rows = {i: np.array(ids, settings.dtype) for i, ids in zip(kept, encoded, strict=True)}
    for i, text, on_other_side, kind in zip(kept, texts, held_out, kinds, strict=True):
        data = text.encode()
        index["held_out"][i], index["fim"][i] = on_other_side, kind
        index["tokens"][i], index["bytes"][i] = len(rows[i]), len(data)
        index["digest"][i] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), "<u8")
    order = np.lexsort((index["key"], index["held_out"]))
    spill, path = part.spill, part.index
    with _whole(spill) as file:
        for i in order:
            if i in rows:
                rows[i].tofile(file)
    with _whole(path) as file:
        np.save(file, index[order])
    return _result(spill, path, index)


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name once it is written to the end."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        yield file
    unfinished.replace(path)


def shuffle_key(seed: int, document: int) -> int:
    """Return the key of a document: the order of the keys is the order of the documents in the store."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{document}".encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=1)
def _tokenizer(path: Path, separator_token: str) -> Tokenizer:
    return load_tokenizer(path, separator=separator_token)


def _parts(documents: Documents, settings: PartSettings) -> Iterator[Part]:
    texts: list[str] = []
    first = characters = number = 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        if characters >= settings.characters:
            yield Part(settings, number, first, tuple(texts))
            first, characters, number = first + len(texts), 0, number + 1
            texts = []
    if texts:
        yield Part(settings, number, first, tuple(texts))


def _finished(part: Part, path: Path | None) -> Tokenised | None:
    """Return what an earlier run made of a part, if it is whole; `path` is the index that run left."""
    if path is None:
        return None
    if path != part.index:
        # before its spill file is written over: the sources may be put right again
        raise _changed(path)
    index = np.load(path)
    if index.dtype != INDEX:
        # left by an earlier version
        return None
    expected = int(index["tokens"].sum()) * np.dtype(part.settings.dtype).itemsize
    # a power cut may leave a file shorter than its name promises
    if not part.spill.exists() or part.spill.stat().st_size != expected:
        return None
    return _result(part.spill, path, index)


def _result(spill: Path, path: Path, index: np.ndarray) -> Tokenised:
    return Tokenised(
        spill,
        path,
        documents=int((index["against"] == 0).sum()),
        tokens=int(index["tokens"].sum()),
        bytes=int(index["bytes"].sum()),
    )


def _changed(index: Path) -> InputError:
    return InputError(
        "the sources changed since this build was begun",
        got=f"other documents than those of {index}",
        fix="delete the unfinished store and build again",
    )

"""The first half of a build: parts of the corpus become spill files of tokens, each sorted by shuffle key."""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from mosaicjax.data import fim
from mosaicjax.data.documents import Documents, documents_of
from mosaicjax.data.filters import Filter, first_against
from mosaicjax.data.loss_mask import encode_marked
from mosaicjax.data.marked import Marked, Pair
from mosaicjax.data.sources import Content, Source
from mosaicjax.data.split import is_held_out
from mosaicjax.data.tokenizer import Tokenizer, load_tokenizer
from mosaicjax.data.workers import Engine
from mosaicjax.errors import InputError

GROUP_BYTES = 2**25
"""Sources of about so many bytes are the task of one."""
MOST_PARTS = 2**24
"""A group of sources has fewer parts."""
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
    masked: bool = False
    """Whether it is written down which tokens bear loss."""
    pairs: bool = False
    """Whether documents 2i and 2i + 1 are the answers of a pair: they stay together, on one side."""


@dataclass(frozen=True)
class Part:
    """Some consecutive documents; `first` is the number of the first in the corpus."""

    settings: PartSettings
    number: int
    first: int
    contents: tuple[Content, ...]

    @property
    def spill(self) -> Path:
        """The file of its tokens."""
        return self.settings.folder / f"{self.number:07d}.tokens"

    @property
    def mask(self) -> Path:
        """The file that says which of the spill's tokens bear loss, a byte each."""
        return mask_of(self.spill)

    @property
    def index(self) -> Path:
        """The file that says where each document lies in the spill, named after the texts' own digest.

        So a part left by an earlier run is known to be of the same documents.
        """
        state = hashlib.blake2b(digest_size=12)
        for content in self.contents:
            data = content.tobytes() if isinstance(content, np.ndarray) else content.encode()
            state.update(len(data).to_bytes(8, "little"))
            state.update(data)
        return self.settings.folder / f"{self.number:07d}-{state.hexdigest()}.npy"


def mask_of(spill: Path) -> Path:
    """The file of a spill's loss mask."""
    return spill.with_suffix(".loss")


@dataclass(frozen=True)
class Tokenised:
    """A finished part; `documents` are those that are not left out."""

    spill: Path
    index: Path
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Group:
    """Some consecutive sources, whose parts one task makes; `first` is the number of their first document.

    Its parts are numbered from `number` times `MOST_PARTS` on.
    """

    settings: PartSettings
    number: int
    first: int
    sources: tuple[Source, ...]


def tokenise(
    documents: Documents, settings: PartSettings, *, engine: Engine, progress: bool
) -> list[Tokenised]:
    """Make the parts that are missing, and return all in the order of the sources.

    Raises: InputError where a part that an earlier run left is of other documents.
    """
    earlier = left_by_earlier(settings)
    done: dict[int, Tokenised] = {}
    totals: Counter[str] = Counter()
    begun = time.monotonic()
    with tqdm(unit="B", unit_scale=True, desc="tokenise", disable=not progress) as bar:

        def add(number: int, result: Tokenised) -> None:
            done[number] = result
            totals["documents"] += result.documents
            totals["tokens"] += result.tokens
            rate = totals["tokens"] / (time.monotonic() - begun)
            bar.set_postfix_str(f"{totals['documents']:,} documents, {rate:,.0f} tokens/s", refresh=False)
            bar.update(result.bytes)

        def missing() -> Iterator[Part]:
            contents = (document.content for document in documents)
            for part in _parts(contents, settings):
                finished = _finished(part, earlier.get(part.number))
                if finished is None:
                    yield part
                else:
                    add(part.number, finished)

        if engine.reads_sources:
            for _, results in engine.run(tokenise_group, groups_of(documents, settings, engine)):
                for number, result in results:
                    add(number, result)
        else:
            for part, made in engine.run(tokenise_part, missing()):
                add(part.number, made)
    for number in earlier.keys() - done.keys():
        raise _changed(earlier[number])
    return [result for _, result in sorted(done.items())]


def left_by_earlier(settings: PartSettings) -> dict[int, Path]:
    """The indices of the parts that an earlier run left, by number."""
    return {int(path.name.split("-")[0]): path for path in settings.folder.glob("*.npy")}


def groups_of(documents: Documents, settings: PartSettings, engine: Engine) -> list[Group]:
    """The sources in groups, once their documents are counted.

    Raises: InputError naming a file that cannot be read, or where there is no document at all.
    """
    groups = documents.groups(GROUP_BYTES)
    uncounted = [Group(settings, number, 0, sources) for number, sources in enumerate(groups)]
    counted = {group.number: counts for group, counts in engine.run(count_documents, uncounted)}
    documents.skipped = sum((skipped for _, skipped in counted.values()), Counter(documents.left_out))
    made, first = [], 0
    for group in uncounted:
        made.append(replace(group, first=first))
        first += counted[group.number][0]
    documents.check_found(first > 0)
    return made


def count_documents(group: Group) -> tuple[int, Counter[str]]:
    """How many documents some sources hold, and what was left out of them."""
    skipped: Counter[str] = Counter()
    contents = (document.content for document in documents_of(group.sources, skipped))
    count = sum(len(documents_in(each, group.settings)) for each in contents)
    return count, skipped


def tokenise_group(group: Group) -> list[tuple[int, Tokenised]]:
    """Make the parts of some sources that are missing, and return all by number."""
    earlier = left_by_earlier(group.settings)
    contents = (document.content for document in documents_of(group.sources, Counter()))
    made = []
    for part in _parts(contents, group.settings, first=group.first, number=group.number * MOST_PARTS):
        finished = _finished(part, earlier.get(part.number))
        made.append((part.number, finished or tokenise_part(part)))
    return made


def tokenise_part(part: Part) -> Tokenised:
    """Tokenise a part into its spill file, sorted by split and key, and then write its index."""
    settings = part.settings
    tokenizer = _tokenizer(settings.tokenizer, settings.separator_token)
    every = [_text(each, tokenizer) for each in part.contents]
    against = [first_against(settings.filters, text) for text in every]
    kept = [i for i, number in enumerate(against) if not number]
    texts = tuple(every[i] for i in kept)
    held_out = [is_held_out(text, settings.held_out) for text in deciding(texts, settings)]
    kinds = [fim.PLAIN] * len(texts)
    encoded: Sequence[Any]
    masks: dict[int, np.ndarray] = {}
    given = [part.contents[i] for i in kept]
    if given and isinstance(given[0], Marked):
        both = list(encode_marked([each for each in given if isinstance(each, Marked)], tokenizer))
        encoded = [ids for ids, _ in both]
        masks = {i: bears for i, (_, bears) in zip(kept, both, strict=True)}
    elif settings.fim is None:
        made = iter(tokenizer.encode_batch([each for each in given if isinstance(each, str)]))
        encoded = [next(made) if isinstance(each, str) else each for each in given]
    else:
        encoded, kinds = fim.encode(settings.fim, texts, held_out, settings.seed, tokenizer)
    index = np.zeros(len(part.contents), INDEX)
    index["against"] = against
    # Both answers of a pair have one key, and every sort by it leaves equal ones as they are.
    together = 2 if settings.pairs else 1
    index["key"] = [shuffle_key(settings.seed, (part.first + i) // together) for i in range(len(index))]
    rows = {i: as_array(ids).astype(settings.dtype) for i, ids in zip(kept, encoded, strict=True)}
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
    if settings.masked:
        with _whole(part.mask) as file:
            for i in order:
                if i in masks:
                    masks[i].tofile(file)
    with _whole(path) as file:
        np.save(file, index[order])
    return _result(spill, path, index)


def _text(content: Content, tokenizer: Tokenizer) -> str:
    if isinstance(content, Marked):
        return content.text
    return content if isinstance(content, str) else tokenizer.decode(content.tolist())


def deciding(texts: Sequence[str], settings: PartSettings) -> Sequence[str]:
    """For each document the text that decides whether it is held out: its own, or both of its pair."""
    if not settings.pairs:
        return texts
    both = ["\0".join(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    return [text for text in both for _ in range(2)]


def as_array(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Ids as an array: of a list by way of Python's own arrays, in a third of the time that numpy takes."""
    return ids if isinstance(ids, np.ndarray) else np.frombuffer(array("I", ids), np.uintc)


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name once it is written to the end."""
    # Two attempts at one part may be at work on two machines, in processes of one number.
    unfinished = path.with_name(f"{path.name}.{os.urandom(8).hex()}")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def shuffle_key(seed: int, document: int) -> int:
    """Return the key of a document: the order of the keys is the order of the documents in the store."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{document}".encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=1)
def _tokenizer(path: Path, separator_token: str) -> Tokenizer:
    return load_tokenizer(path, separator=separator_token)


def _parts(
    contents: Iterable[Content | Pair], settings: PartSettings, *, first: int = 0, number: int = 0
) -> Iterator[Part]:
    held: list[Content] = []
    size = 0
    for content in contents:
        for piece in documents_in(content, settings):
            held.append(piece)
            size += len(piece)
        if size >= settings.characters:
            yield Part(settings, number, first, tuple(held))
            first, size, number = first + len(held), 0, number + 1
            held = []
    if held:
        yield Part(settings, number, first, tuple(held))


def documents_in(content: Content | Pair, settings: PartSettings) -> Sequence[Content]:
    """The documents that one of a source comes to.

    Raises: InputError as `cut`, or naming a pair where rows before it were none.
    """
    if isinstance(content, np.ndarray):
        return cut(content, settings)
    if not isinstance(content, Pair):
        return [content]
    if not settings.pairs:
        raise InputError(
            f"{content.chosen.name} is a preference pair, and the first row was none",
            fix="a store for each, or --format for the fields that all rows have",
        )
    return [content.chosen, content.rejected]


def cut(ids: np.ndarray, settings: PartSettings) -> list[np.ndarray]:
    """Tokens that were given as such, cut at separators; empty pieces are left out.

    Raises: InputError for ids that the tokenizer lacks, or with fill-in-the-middle.
    """
    tokenizer = _tokenizer(settings.tokenizer, settings.separator_token)
    wrong = ids[(ids < 0) | (ids >= tokenizer.size)]
    if len(wrong):
        raise InputError(
            "tokens of another tokenizer",
            expected=f"ids below {tokenizer.size}, those of {settings.tokenizer.name}",
            got=int(wrong[0]),
            fix="--tokenizer with the one that made them",
        )
    if settings.fim is not None:
        raise InputError("fill-in-the-middle of tokens", expected="text", fix="a build without --fim")
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.separator))
    return [piece for each in pieces if len(piece := each[each != tokenizer.separator])]


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
    tokens = int(index["tokens"].sum())
    if part.settings.masked and (not part.mask.exists() or part.mask.stat().st_size != tokens):
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

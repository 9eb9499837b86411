"""What documents are read from: a class a kind of file, each streamed, on this machine or an object store."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np

from mosaicjax import storage
from mosaicjax.errors import InputError

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
BROKEN_ARCHIVE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


Content = str | np.ndarray
"""A text, or ids of a tokenizer, int64 [tokens]."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or its tokens, with the name of where it was read: a path, `path:line`, or `path:row`."""

    content: Content
    name: str

    @property
    def text(self) -> str:
        """The text.

        Raises: InputError where the source holds tokens.
        """
        if isinstance(self.content, str):
            return self.content
        raise InputError(f"{self.name} holds tokens", expected="text", fix="another --field")


class Source(Protocol):
    """A file, or a table of several, whose documents come in one order."""

    @property
    def name(self) -> str:
        """What a message calls it."""
        ...

    @property
    def size_bytes(self) -> int:
        """As it lies there."""
        ...

    def read(self, skipped: Counter[str]) -> Iterator[Document]:
        """Its documents in order; what is left out is counted by reason.

        Raises:
            InputError: naming the file and line or row that cannot be used.
        """
        ...


@dataclass(frozen=True)
class StoredFile:
    """A source that is one file, by its path."""

    name: str

    @property
    def size_bytes(self) -> int:
        """See `Source`."""
        return storage.file_size(self.name)


@dataclass(frozen=True)
class TextFile(StoredFile):
    """A file that is one document. One that was not `named`, but found in a folder, may be no text."""

    named: bool

    def read(self, skipped: Counter[str]) -> Iterator[Document]:
        """See `Source`; not UTF-8, or with NUL bytes, counts as `binary`."""
        try:
            text = storage.read_text(self.name)
        except UnicodeDecodeError as error:
            if self.named:
                raise InputError(
                    f"{self.name} cannot be read as text",
                    expected="UTF-8",
                    got=f"{error.reason} at byte {error.start}",
                ) from error
            skipped["binary"] += 1
            return
        if "\0" in text and not self.named:
            skipped["binary"] += 1
            return
        yield Document(text, self.name)


@dataclass(frozen=True)
class JsonLines(StoredFile):
    """A file of one JSON object a line, whose `field` is a document's text; blank lines are none."""

    field: str

    def read(self, skipped: Counter[str]) -> Iterator[Document]:
        """See `Source`."""
        number = 0
        with storage.reading(self.name) as stored:
            lines = self._unpacked(stored)
            while True:
                number += 1
                try:
                    line = lines.readline()
                except (*BROKEN_ARCHIVE, OSError) as error:
                    raise InputError(
                        f"{self.name}, line {number}: the archive is broken",
                        got=storage.one_line(error),
                    ) from error
                if not line:
                    return
                if not line.isspace():
                    place = f"{self.name}, line {number}"
                    yield Document(_row_text(line, self.field, place), f"{self.name}:{number}")

    def _unpacked(self, stored: IO[bytes]) -> Any:
        if self.name.endswith(".gz"):
            return gzip.open(stored)
        if self.name.endswith(".xz"):
            return lzma.open(stored)
        if self.name.endswith(".zst"):
            return io.BufferedReader(pyarrow_for(self.name).CompressedInputStream(stored, "zstd"))
        return stored


def pyarrow_for(name: str) -> Any:
    """The package, where it is installed.

    Raises:
        InputError: it is not.
    """
    try:
        import pyarrow
    except ImportError:
        raise InputError(f"{name} needs pyarrow", fix="pip install 'mosaicjax[tables]'") from None
    return pyarrow


def checked_text(text: Any, place: str) -> str:
    """A row's text.

    Raises:
        InputError: it is no string, or none that UTF-8 can hold.
    """
    if not isinstance(text, str):
        raise InputError(place, expected="a string", got=type(text).__name__)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            place, expected="Unicode text", got=f"half a surrogate pair at character {error.start}"
        ) from error
    return text


def _row_text(line: bytes, field: str, place: str) -> str:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(place, expected="UTF-8", got=f"{error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InputError(place, expected="one JSON object", got=str(error)) from error
    if not isinstance(row, dict) or field not in row:
        raise InputError(
            place,
            expected=f"a JSON object with the field {field!r}",
            got=sorted(row) if isinstance(row, dict) else type(row).__name__,
            fix="name the field that holds the text with --field",
        )
    return checked_text(row[field], f"{place}, field {field!r}")

"""What documents are read from: a class a kind of file, each streamed, on this machine or an object store."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np

from mosaicjax import storage
from mosaicjax.data.marked import Marked, Pair
from mosaicjax.errors import InputError

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
BROKEN_ARCHIVE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


Content = str | np.ndarray | Marked
"""A text, ids of a tokenizer, int64 [tokens], or a text of which some bears loss."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or its tokens, with the name of where it was read: a path, `path:line`, or `path:row`.

    A row of preference pairs is two texts.
    """

    content: Content | Pair
    name: str

    @property
    def text(self) -> str:
        """The text.

        Raises: InputError where the source holds tokens, or two texts.
        """
        if isinstance(self.content, str):
            return self.content
        if isinstance(self.content, Marked):
            return self.content.text
        if isinstance(self.content, Pair):
            raise InputError(f"{self.name} is a preference pair", expected="one text")
        raise InputError(f"{self.name} holds tokens", expected="text", fix="another --field")


class Rows(Protocol):
    """What becomes of the rows of a table or of JSON lines."""

    def columns(self, names: Sequence[str], place: str) -> list[str]:
        """Which columns, of those that there are, decide what a row becomes.

        Raises: InputError where one lacks.
        """
        ...

    def content(self, row: Mapping[str, Any], place: str) -> Content | Pair:
        """A row's document; nulls of a table are left out of it.

        Raises: InputError naming the row that cannot be used.
        """
        ...


@dataclass(frozen=True)
class Texts:
    """Rows whose `field` is the text; one without it, where there is such a column, is empty."""

    field: str

    def columns(self, names: Sequence[str], place: str) -> list[str]:
        """See `Rows`."""
        if self.field not in names:
            raise InputError(
                f"{place} lacks the column {self.field!r}",
                expected=f"one of {', '.join(names)}",
                fix="name the column that holds the text with --field",
            )
        return [self.field]

    def content(self, row: Mapping[str, Any], place: str) -> Content:
        """See `Rows`."""
        return checked_text(row.get(self.field, ""), f"{place}, field {self.field!r}")


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
    """A file of one JSON object a line, each a document; blank lines are none."""

    rows: Rows

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
                    yield Document(self._content(line, place), f"{self.name}:{number}")

    def _content(self, line: bytes, place: str) -> Content | Pair:
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise InputError(place, expected="UTF-8", got=f"{error.reason} at byte {error.start}") from error
        except json.JSONDecodeError as error:
            raise InputError(place, expected="one JSON object", got=str(error)) from error
        if not isinstance(row, dict) or (isinstance(self.rows, Texts) and self.rows.field not in row):
            wanted = f" with the field {self.rows.field!r}" if isinstance(self.rows, Texts) else ""
            raise InputError(
                place,
                expected=f"a JSON object{wanted}",
                got=sorted(row) if isinstance(row, dict) else type(row).__name__,
                fix="name the field that holds the text with --field" if wanted else None,
            )
        return self.rows.content(row, place)

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

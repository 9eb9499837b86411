"""Sources of documents: folders of text or code, text files and JSON lines, streamed in one fixed order."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

from mosaicjax.errors import InputError

TEXT_EXTENSIONS = frozenset(
    """
    .txt .text .md .markdown .rst .tex .org .adoc
    .py .pyi .pyx .js .mjs .ts .tsx .jsx .java .kt .scala .go .rs .c .h .cc .cpp .cxx .hpp .cu .cuh .m .mm
    .swift .cs .fs .rb .php .pl .pm .lua .r .jl .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .sh .bash .zsh
    .ps1 .sql .html .htm .css .scss .xml .yaml .yml .toml .ini .cfg .json .proto .cmake .dart .zig .nim .v
    .vhdl .f90
    """.split()
)
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
NEVER_ENTERED = frozenset({"__pycache__", ".git", ".hg", ".svn", ".jj", ".bzr", "CVS"})
BROKEN_ARCHIVE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with the name of where it was read: a path, or `path:line`."""

    text: str
    name: str


@dataclass
class Documents:
    """Documents of some sources, read one at a time, in the same order on every pass.

    `skipped` counts, for the last complete pass, the files and rows left out by reason: `extension` (not a
    text file's), `excluded`, `binary` (not UTF-8, or with NUL bytes) and `empty`. Excluded folders are not
    entered and count as one.
    """

    files: tuple[Path, ...]
    named: frozenset[Path]
    field_name: str
    left_out: Counter[str]
    skipped: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents that are not empty.

        Raises: InputError naming the file and line that cannot be used, or where there is no document at all.
        """
        self.skipped = Counter(self.left_out)
        found = False
        for path in self.files:
            for document in self._read(path):
                if not document.text:
                    self.skipped["empty"] += 1
                    continue
                found = True
                yield document
        if not found:
            raise InputError(
                "empty corpus",
                expected="at least one document",
                got=f"{len(self.files)} files, skipped {dict(self.skipped)}",
                fix="check the paths, --include and --exclude",
            )

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of the source files as they lie on the disk."""
        return sum(path.stat().st_size for path in self.files)

    def _read(self, path: Path) -> Iterator[Document]:
        if path.name.endswith(JSON_LINES):
            yield from _json_lines(path, self.field_name)
            return
        data = path.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            if path in self.named:
                raise InputError(
                    f"{path} cannot be read as text",
                    expected="UTF-8",
                    got=f"{error.reason} at byte {error.start}",
                ) from error
            self.skipped["binary"] += 1
            return
        if "\0" in text and path not in self.named:
            self.skipped["binary"] += 1
            return
        yield Document(text, str(path))


def open_sources(
    paths: Sequence[str | Path],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    field: str = "text",
) -> Documents:
    """Open folders, text files and `.jsonl`, `.jsonl.gz` or `.jsonl.xz` files as one sequence of documents.

    A folder is read recursively in sorted order: every file with an extension of `TEXT_EXTENSIONS`, or those
    that match a glob of `include` where there is one (the way to read JSON lines in a folder:
    `include=["*.jsonl.gz"]`). A glob of `exclude` without a slash matches the name of a file or folder, one
    with a slash the end of its path. Links to folders are not followed.

    Raises: InputError for a path that does not exist or is of an unknown kind.
    """
    if not paths:
        raise InputError("no source was given", expected="folders, text files or .jsonl files")
    files: list[Path] = []
    named: set[Path] = set()
    left_out: Counter[str] = Counter()
    for path in map(Path, paths):
        if path.is_dir():
            files.extend(_walk(path, include, exclude, left_out))
        elif not path.exists():
            raise InputError(f"source {path} does not exist")
        elif path.name.endswith(JSON_LINES) or path.suffix.lower() in TEXT_EXTENSIONS:
            files.append(path)
            named.add(path)
        else:
            raise InputError(
                f"source {path} is of an unknown kind",
                expected="a folder, .jsonl, .jsonl.gz, .jsonl.xz or a text file",
                got=path.suffix or "no extension",
            )
    return Documents(tuple(files), frozenset(named), field, left_out)


def _walk(
    root: Path, include: Sequence[str], exclude: Sequence[str], left_out: Counter[str]
) -> Iterator[Path]:
    def raise_error(error: OSError) -> None:
        raise InputError(f"folder {error.filename} cannot be read", got=error.strerror) from error

    for folder, folders, names in os.walk(root, onerror=raise_error):
        inside = Path(folder).relative_to(root)
        kept = []
        for name in sorted(folders):
            if name in NEVER_ENTERED or _matches(inside / name, exclude):
                left_out["excluded"] += 1
            else:
                kept.append(name)
        folders[:] = kept
        for name in sorted(names):
            if _matches(inside / name, exclude):
                left_out["excluded"] += 1
            elif not _wanted(inside / name, include):
                left_out["extension"] += 1
            else:
                yield Path(folder) / name


def _wanted(path: Path, include: Sequence[str]) -> bool:
    return _matches(path, include) if include else path.suffix.lower() in TEXT_EXTENSIONS


def _matches(path: Path, globs: Sequence[str]) -> bool:
    whole = path.as_posix()
    for glob in globs:
        target = glob.strip("/")
        if "/" in target:
            if fnmatchcase(whole, target) or fnmatchcase(whole, f"*/{target}"):
                return True
        elif fnmatchcase(path.name, target):
            return True
    return False


def _open_bytes(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    return path.open("rb")


def _json_lines(path: Path, field: str) -> Iterator[Document]:
    number = 0
    with _open_bytes(path) as lines:
        while True:
            number += 1
            try:
                line = lines.readline()
            except BROKEN_ARCHIVE as error:
                raise InputError(
                    f"{path}, line {number}: the archive is broken", got=str(error) or type(error).__name__
                ) from error
            if not line:
                return
            if not line.isspace():
                yield Document(_row_text(line, field, f"{path}, line {number}"), f"{path}:{number}")


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
    text = row[field]
    if not isinstance(text, str):
        raise InputError(f"{place}, field {field!r}", expected="a string", got=type(text).__name__)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}, field {field!r}",
            expected="Unicode text",
            got=f"half a surrogate pair at character {error.start}",
        ) from error
    return text

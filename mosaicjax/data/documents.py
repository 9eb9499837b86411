"""Documents of any sources, streamed in one fixed order: which files and tables they are."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from mosaicjax import storage
from mosaicjax.data.mds import INDEX
from mosaicjax.data.sources import JSON_LINES, Document, JsonLines, Rows, Source, TextFile, Texts
from mosaicjax.data.tables import DELTA_LOG, HUGGING_FACE, Delta, HuggingFace, MdsFolder, Parquet
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
NEVER_ENTERED = frozenset({"__pycache__", ".git", ".hg", ".svn", ".jj", ".bzr", "CVS"})


@dataclass
class Documents:
    """Documents of some sources, read one at a time, in the same order on every pass.

    `skipped` counts, for the last complete pass, the files and rows left out by reason: `extension` (not a
    text file's), `excluded`, `binary` (not UTF-8, or with NUL bytes) and `empty`. Excluded folders are not
    entered and count as one. `given` is what was asked for, a Delta table with its version.
    """

    sources: tuple[Source, ...]
    given: tuple[str, ...]
    left_out: Counter[str]
    skipped: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents that are not empty.

        Raises: InputError naming the file and line that cannot be used, or where there is no document at all.
        """
        self.skipped = Counter(self.left_out)
        found = False
        for document in documents_of(self.sources, self.skipped):
            found = True
            yield document
        self.check_found(found)

    def check_found(self, found: bool) -> None:
        """Refuse sources in which nothing was found.

        Raises: InputError with what was skipped.
        """
        if not found:
            raise InputError(
                "empty corpus",
                expected="at least one document",
                got=f"{len(self.sources)} files, skipped {dict(self.skipped)}",
                fix="check the paths, --include and --exclude",
            )

    def groups(self, size_bytes: int) -> list[tuple[Source, ...]]:
        """The sources in order, some neighbours together: groups of about so many bytes as they lie there.

        Nothing that was read of them is kept, but for which version of a table they are of.
        """
        groups: list[list[Source]] = []
        held = size_bytes
        for source in self.sources:
            if held >= size_bytes:
                groups.append([])
                held = 0
            pinned = source.pinned() if isinstance(source, Delta) else replace(source)  # type: ignore[type-var]
            groups[-1].append(pinned)
            held += source.size_bytes
        return [tuple(group) for group in groups]

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of the source files as they lie there."""
        return sum(source.size_bytes for source in self.sources)


def documents_of(sources: Sequence[Source], skipped: Counter[str]) -> Iterator[Document]:
    """Yield the documents of sources that are not empty; what is left out is counted by reason.

    Raises: InputError naming the file and line that cannot be used.
    """
    for source in sources:
        for document in source.read(skipped):
            if len(document.content):
                yield document
            else:
                skipped["empty"] += 1


def open_sources(
    paths: Sequence[str | Path],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    field: str = "text",
    rows: Rows | None = None,
) -> Documents:
    """Open sources as one sequence of documents, here or on `s3://` or `gs://`.

    Text files, JSON lines (`.jsonl`, or with .gz, .xz, .zst) and `.parquet` files; folders of them; Delta
    tables, `TABLE` or `TABLE@v7` for a version of it; folders of MDS shards; `hf:NAME` for a Hugging Face
    dataset. `field` names the text of rows; of MDS shards also a column of tokens (`NAME:DTYPE` for one
    of plain bytes), whose samples are cut at the separator. `rows` makes something else of them.

    A folder is read recursively in sorted order: every file with an extension of `TEXT_EXTENSIONS`, or those
    that match a glob of `include` where there is one (the way to read rows in a folder:
    `include=["*.jsonl.gz"]`). A glob of `exclude` without a slash matches the name of a file or folder, one
    with a slash the end of its path. Links to folders are not followed.

    Raises: InputError for a path that does not exist or is of an unknown kind.
    """
    if not paths:
        raise InputError("no source was given", expected="folders, tables, text files or .jsonl files")
    sources: list[Source] = []
    given: list[str] = []
    left_out: Counter[str] = Counter()
    for path in map(str, paths):
        mine = tuple(_opened(path, include, exclude, rows or Texts(field), left_out))
        sources += mine
        given.append(mine[0].name if mine and isinstance(mine[0], Delta) else path)
    return Documents(tuple(sources), tuple(given), left_out)


def _opened(
    path: str, include: Sequence[str], exclude: Sequence[str], rows: Rows, left_out: Counter[str]
) -> Iterator[Source]:
    if path.startswith(HUGGING_FACE):
        yield HuggingFace(path.removeprefix(HUGGING_FACE), rows)
        return
    table, version = _versioned(path)
    if version is not None or storage.exists(storage.join(table, DELTA_LOG)):
        yield Delta(table, version, rows)
    elif (one := _of_name(path, rows, named=True)) and not _is_folder(path):
        if not storage.exists(path):
            raise InputError(f"source {path} does not exist")
        yield one
    elif not storage.exists(path):
        raise InputError(f"source {path} does not exist")
    elif not _is_folder(path):
        raise InputError(
            f"source {path} is of an unknown kind",
            expected="a folder, a Delta table, .jsonl (.gz, .xz, .zst), .parquet or a text file",
            got=PurePosixPath(path).suffix or "no extension",
        )
    elif _holds_shards(path):
        yield MdsFolder(path, rows)
    else:
        walk = _walk_remote if storage.is_remote(path) else _walk
        for name in walk(path, include, exclude, left_out):
            yield _of_name(name, rows, named=False) or TextFile(name, named=False)


def _of_name(path: str, rows: Rows, *, named: bool) -> Source | None:
    """What reads a file, by its name."""
    if path.endswith(JSON_LINES):
        return JsonLines(path, rows)
    if path.endswith(".parquet"):
        return Parquet(path, rows)
    if PurePosixPath(path).suffix.lower() not in TEXT_EXTENSIONS:
        return None
    if not isinstance(rows, Texts):
        raise InputError(
            f"{path} holds no rows", expected=".jsonl (.gz, .xz, .zst), .parquet, a table or MDS"
        )
    return TextFile(path, named)


def _versioned(path: str) -> tuple[str, int | None]:
    """A table and its version, of TABLE@v7."""
    found = re.fullmatch(r"(.+)@v(\d+)", path)
    if found is None or storage.exists(path):
        return path, None
    return found.group(1), int(found.group(2))


def _is_folder(path: str) -> bool:
    return bool(storage.list_dir(path)) if storage.is_remote(path) else Path(storage.local(path)).is_dir()


def _holds_shards(path: str) -> bool:
    """Whether a folder's index is one of MDS shards: any folder of code may have an index.json."""
    index = storage.join(path, INDEX)
    if not storage.exists(index):
        return False
    try:
        contents = json.loads(storage.read_text(index))
    except ValueError:
        # One cut short is the shards' all the same.
        return any(re.search(r"\.mds(\.\w+)?$", name) for name in storage.list_dir(path))
    shards = contents.get("shards") if isinstance(contents, dict) else None
    first = shards[0] if isinstance(shards, list) and shards else None
    return isinstance(first, dict) and "raw_data" in first


def _walk_remote(
    root: str, include: Sequence[str], exclude: Sequence[str], left_out: Counter[str]
) -> Iterator[str]:
    """As `_walk`, of an object store."""
    dropped: set[PurePosixPath] = set()
    for name in storage.find(root):
        inside = PurePosixPath(name)
        folders = list(inside.parents)[-2::-1]
        bad = next((each for each in folders if each.name in NEVER_ENTERED or _matches(each, exclude)), None)
        if bad is not None:
            left_out["excluded"] += bad not in dropped
            dropped.add(bad)
        elif _matches(inside, exclude):
            left_out["excluded"] += 1
        elif not _wanted(inside, include):
            left_out["extension"] += 1
        else:
            yield storage.join(root, name)


def _walk(root: str, include: Sequence[str], exclude: Sequence[str], left_out: Counter[str]) -> Iterator[str]:
    def raise_error(error: OSError) -> None:
        raise InputError(f"folder {error.filename} cannot be read", got=error.strerror) from error

    for folder, folders, names in os.walk(storage.local(root), onerror=raise_error):
        inside = PurePosixPath(Path(folder).relative_to(storage.local(root)))
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
                yield str(Path(folder) / name)


def _wanted(path: PurePosixPath, include: Sequence[str]) -> bool:
    return _matches(path, include) if include else path.suffix.lower() in TEXT_EXTENSIONS


def _matches(path: PurePosixPath, globs: Sequence[str]) -> bool:
    whole = path.as_posix()
    for glob in globs:
        target = glob.strip("/")
        if "/" in target:
            if fnmatchcase(whole, target) or fnmatchcase(whole, f"*/{target}"):
                return True
        elif fnmatchcase(path.name, target):
            return True
    return False

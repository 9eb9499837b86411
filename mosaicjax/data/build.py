"""Building a token store: documents are tokenised on all cores, shuffled outside memory, and written once.

The documents are cut into parts in the order of the sources. Each part becomes a spill file, sorted by a hash
of (seed, document number). The order of all documents by that hash is the shuffle: a shard of the store is a
range of it, which lies in one piece in every spill file. So memory holds some hundred bytes a document and a
few shards, whatever the corpus; each part and each shard can be made in any process, in any order, and again
after a crash, with the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from mosaicjax import storage
from mosaicjax.data.arrays import CHUNK_TOKENS, token_dtype
from mosaicjax.data.chat import Chat
from mosaicjax.data.conversations import Format
from mosaicjax.data.documents import Documents, open_sources
from mosaicjax.data.filters import Filter, described
from mosaicjax.data.fim import PSM, SPM, FillInMiddle
from mosaicjax.data.manifest import (
    FORMAT,
    NAME,
    VERSION,
    Built,
    FileRecord,
    Layout,
    Manifest,
    Settings,
    TokenizerRecord,
    read_manifest,
    record_file,
    structure,
    write_json,
)
from mosaicjax.data.marked import Pair
from mosaicjax.data.parts import PartSettings, tokenise
from mosaicjax.data.shards import ShardWriter, shuffle, write_documents
from mosaicjax.data.spark import Spark
from mosaicjax.data.split import check_fraction
from mosaicjax.data.tokenizer import Tokenizer, load_tokenizer
from mosaicjax.data.workers import Cores, Engine, available_cores
from mosaicjax.errors import InputError

WORK = ".unfinished"
ALL_CORES = 0
DEFAULT_LAYOUT = Layout()
GOES_ON = "make room, if the disk is full; the same command goes on where it stopped"
FIM_KINDS = {"psm": PSM, "spm": SPM}


class Engines(Enum):
    """Who does the work of a build."""

    CORES = "cores"
    """This machine's cores."""
    SPARK = "spark"
    """Spark (extra `spark`): on this machine, or on the cluster that `spark-submit` or a session brings."""


def build(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | Tokenizer,
    held_out: float = 0.01,
    seed: int = 0,
    workers: int = ALL_CORES,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    field: str = "text",
    layout: Layout = DEFAULT_LAYOUT,
    progress: bool = True,
    fim: FillInMiddle | None = None,
    filters: Sequence[Filter] = (),
    drop_duplicates: bool = False,
    engine: Engines = Engines.CORES,
    chat: Chat | None = None,
) -> Manifest:
    """Build the token store `out` from documents, or finish the build that was stopped there.

    The same sources, tokenizer and settings give the same data files, whatever the number of workers and
    however often the build was killed. A finished store of the same settings is left as it is. `fim` reorders
    a share of the training documents for fill-in-the-middle. `filters` are functions of a document's text, of
    modules that worker processes can import, true for what to keep. `drop_duplicates` keeps one document of
    each text. `engine` decides nothing about the store. With `chat` rows are conversations, of which some
    tokens bear loss, or preference pairs, if the first row is one: two documents each, one after the other.

    Raises: InputError for sources, a tokenizer or filters that cannot be used, a directory that holds
        something else, was begun with other settings or is being built by another process, and sources that
        changed since it was begun.
    """
    if storage.is_remote(out):
        raise InputError(
            "a token store is built on this machine",
            expected="a local folder",
            got=out,
            fix=f"build into a folder here, then: mosaicjax data copy FOLDER {out}",
        )
    out = Path(out)
    check_fraction(held_out)
    _check_layout(workers, layout)
    _check_outside(out, sources)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    if chat is not None and fim and fim.rate:
        raise InputError("fill-in-the-middle of conversations", expected="text", fix="a build without --fim")
    documents = open_sources(sources, include=include, exclude=exclude, field=field, rows=chat)
    if chat is not None and chat.format is Format.AUTO and _begins_with_pair(documents):
        chat = chat.of_pairs()
        documents = open_sources(sources, include=include, exclude=exclude, field=field, rows=chat)
    settings = Settings(
        sources=documents.given,
        source_files=len(documents.sources),
        source_bytes=documents.size_bytes,
        include=tuple(include),
        exclude=tuple(exclude),
        field=field,
        tokenizer_hash=tokenizer.hash,
        separator_token=tokenizer.separator_token,
        held_out=held_out,
        seed=seed,
        layout=layout,
        fim=fim.resolve(tokenizer) if fim and fim.rate else None,
        filters=described(filters),
        drop_duplicates=drop_duplicates,
        chat=chat,
    )
    if settings.pairs and (filters or drop_duplicates):
        raise InputError(
            f"{'--filter' if filters else '--drop-duplicates'} with preference pairs, of which one answer"
            " could go without the other",
            fix="rows without those pairs",
        )
    with _held(out):
        if (out / NAME).exists():
            finished = read_manifest(out)
            finished.settings.check_same(settings, out)
            _remove_work(out)
            return finished
        cores = workers or available_cores()
        work = Spark(cores) if engine is Engines.SPARK else Cores(cores)
        try:
            return _finish(out, documents, settings, tokenizer, tuple(filters), work, progress)
        except OSError as error:
            raise InputError(
                f"the build of {out} cannot go on", got=storage.one_line(error), fix=GOES_ON
            ) from error


def _begins_with_pair(documents: Documents) -> bool:
    """Whether the first row of the sources is a preference pair."""
    return isinstance(next(iter(documents)).content, Pair)


def _check_layout(workers: int, layout: Layout) -> None:
    if workers < 0:
        raise InputError(
            "the number of workers is out of range", expected="0 (one a core) or more", got=workers
        )
    if layout.shard_tokens <= 0 or layout.shard_tokens % CHUNK_TOKENS:
        raise InputError(
            "the shard size is out of range",
            expected=f"a multiple of {CHUNK_TOKENS} tokens",
            got=layout.shard_tokens,
        )


def _check_outside(out: Path, sources: Sequence[str | Path]) -> None:
    for source in map(Path, sources):
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise InputError(f"{out} lies inside its source {source}", fix="build outside the source folder")


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Keep other builds out of a directory; a crash of any kind lets go of it."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", expected="a directory to build in")
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is building {out}", fix="wait, or build elsewhere") from error
        yield
    finally:
        os.close(handle)


def _finish(
    out: Path,
    documents: Documents,
    settings: Settings,
    tokenizer: Tokenizer,
    filters: tuple[Filter, ...],
    engine: Engine,
    progress: bool,
) -> Manifest:
    """Do what is left to do in a directory, the manifest last."""
    begun = time.monotonic()
    _begin(out, settings, tokenizer)
    dtype = token_dtype(tokenizer.size)
    # Parts that tasks cut out of some sources are other ones than those of all documents in a row.
    part_settings = PartSettings(
        folder=out / WORK / ("parts-of-sources" if engine.reads_sources else "parts"),
        tokenizer=out / "tokenizer" / tokenizer.files[0].name,
        separator_token=tokenizer.separator_token,
        dtype=dtype,
        held_out=settings.held_out,
        seed=settings.seed,
        characters=settings.layout.part_characters,
        fim=settings.fim,
        filters=filters,
        masked=settings.masked,
        pairs=settings.pairs,
    )
    part_settings.folder.mkdir(exist_ok=True)
    parts = tokenise(documents, part_settings, engine=engine, progress=progress)
    tables, left_out = shuffle(parts, drop_duplicates=settings.drop_duplicates)
    if tables["train"].counts.documents == 0:
        raise InputError(
            "every document is held out" if not left_out else "every document is held out or left out",
            got=f"{tables['validation'].counts.documents} documents held out, {dict(left_out)} left out",
            fix="more documents, or a smaller held-out fraction",
        )
    names = {str(number): name.split()[0] for number, name in enumerate(settings.filters, 1)}
    skipped = documents.skipped + Counter({names.get(why, why): count for why, count in left_out.items()})
    files = {path: record_file(path) for path in sorted((out / "tokenizer").iterdir())}
    for split, table in tables.items():
        files |= {path: record_file(path) for path in write_documents(out / split / "documents", table)}
    writer = ShardWriter(
        out,
        out / WORK / "shards",
        tokenizer.separator,
        dtype,
        settings.layout.shard_tokens,
        masked=settings.masked,
    )
    files |= writer.write(tables, parts, engine=engine, progress=progress)
    _make_durable(files)
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        settings=settings,
        tokenizer=_tokenizer_record(tokenizer),
        dtype=dtype,
        splits={split: table.counts for split, table in tables.items()},
        skipped=dict(sorted(skipped.items())),
        files={path.relative_to(out).as_posix(): files[path] for path in sorted(files)},
        time=Built(
            command=shlex.join(sys.argv),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - begun, 3),
        ),
        fim={name: int((tables["train"].fim == kind).sum()) for name, kind in FIM_KINDS.items()}
        if settings.fim
        else {},
    )
    # written among the work, so that a crash leaves no stray file in a finished store
    write_json(out / WORK / NAME, manifest)
    (out / WORK / NAME).replace(out / NAME)
    _remove_work(out)
    return manifest


def _begin(out: Path, settings: Settings, tokenizer: Tokenizer) -> None:
    """Leave a record of the settings, or compare them with the record of an earlier run."""
    path = out / WORK / "settings.json"
    if path.exists():
        begun = structure(json.loads(path.read_text(encoding="utf-8")), Settings, path)
        begun.check_same(settings, out)
        return
    if not (out / WORK).exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and no token store", fix="build into a new directory")
    for folder in (out / WORK / "parts", out / WORK / "shards", out / "tokenizer"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.files:
        shutil.copyfile(file, out / "tokenizer" / file.name)
    write_json(path, settings)


def _tokenizer_record(tokenizer: Tokenizer) -> TokenizerRecord:
    return TokenizerRecord(
        files=tuple(file.name for file in tokenizer.files),
        hash=tokenizer.hash,
        encoder=tokenizer.encoder,
        size=tokenizer.size,
        separator=tokenizer.separator,
        separator_token=tokenizer.separator_token,
    )


def _make_durable(files: dict[Path, FileRecord]) -> None:
    """Have the data on the disk before a manifest vouches for it."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _remove_work(out: Path) -> None:
    if (out / WORK).exists():
        shutil.rmtree(out / WORK)

"""Documents from tables: Parquet files, Delta tables at any of their versions, Hugging Face datasets."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mosaicjax import storage
from mosaicjax.data.mds import Mds
from mosaicjax.data.sources import (
    Content,
    Document,
    Rows,
    StoredFile,
    Texts,
    checked_text,
    pyarrow_for,
)
from mosaicjax.errors import InputError

ROWS = 1_024
"""Read at a time."""
DELTA_LOG = "_delta_log"
HUGGING_FACE = "hf:"


@dataclass(frozen=True)
class Parquet(StoredFile):
    """A Parquet file, each of whose rows is a document."""

    rows: Rows

    def read(self, skipped: Counter[str]) -> Iterator[Document]:
        """See `Source`."""
        import_error = pyarrow_for(self.name).ArrowException
        from pyarrow import parquet

        with storage.reading(self.name) as stored:
            try:
                file = parquet.ParquetFile(stored)
                columns = self.rows.columns(file.schema_arrow.names, self.name)
                yield from _documents(file.iter_batches(ROWS, columns=columns), self.rows, self.name)
            except (import_error, OSError) as error:
                raise InputError(
                    f"{self.name} cannot be read as Parquet", got=storage.one_line(error)
                ) from error


@dataclass(frozen=True)
class Delta:
    """A Delta table at a version (None: the newest), each of whose rows is a document.

    Rows come in the order of the table's files by name. The table of a version is what its log says: files
    removed since are read as long as they are there.
    """

    path: str
    version: int | None
    rows: Rows

    @property
    def name(self) -> str:
        """See `Source`; with the version, which a store records, so that a build ends with what it began."""
        return f"{self.path}@v{self._table.version()}"

    def pinned(self) -> Delta:
        """Return the table at the version that was found, whatever is written to it later."""
        return replace(self, version=self._table.version())

    @property
    def size_bytes(self) -> int:
        """See `Source`."""
        import pyarrow

        actions = pyarrow.table(self._table.get_add_actions(flatten=True))
        return int(sum(actions.column("size_bytes").to_pylist()))

    @property
    def _options(self) -> dict[str, str]:
        """Of an object store, beyond what deltalake takes from the environment as others do."""
        endpoint = storage.s3_endpoint()
        if storage.scheme(self.path) != "s3" or not endpoint:
            return {}
        return {"aws_endpoint_url": endpoint, "aws_allow_http": str(endpoint.startswith("http:")).lower()}

    @cached_property
    def _table(self) -> Any:
        try:
            import deltalake
        except ImportError:
            raise InputError(
                f"{self.path} is a Delta table, and deltalake is not installed",
                fix="pip install 'mosaicjax[tables]'",
            ) from None
        try:
            return deltalake.DeltaTable(self.path, version=self.version, storage_options=self._options)
        except (deltalake.exceptions.DeltaError, OSError) as error:
            wanted = "" if self.version is None else f" at version {self.version}"
            raise InputError(
                f"the Delta table {self.path} cannot be opened{wanted}", got=storage.one_line(error)
            ) from error

    def read(self, skipped: Counter[str]) -> Iterator[Document]:
        """See `Source`."""
        arrow_error = pyarrow_for(self.path).ArrowException
        import deltalake

        try:
            dataset = self._table.to_pyarrow_dataset()
            columns = self.rows.columns(dataset.schema.names, self.name)
            for part in sorted(dataset.get_fragments(), key=lambda each: str(each.path)):
                batches = part.to_batches(schema=dataset.schema, columns=columns, batch_size=ROWS)
                yield from _documents(batches, self.rows, f"{self.name}, {part.path}")
        except (deltalake.exceptions.DeltaError, arrow_error, OSError) as error:
            raise InputError(f"{self.name} cannot be read", got=storage.one_line(error)) from error


@dataclass(frozen=True)
class MdsFolder:
    """Mosaic's MDS shards, each of whose samples is a document: a text, or tokens.

    Tokens are integers, or plain bytes where the field of `Texts` is `NAME:DTYPE`.
    """

    name: str
    rows: Rows

    @property
    def size_bytes(self) -> int:
        """See `Source`."""
        return self._shards.size_bytes

    @cached_property
    def _shards(self) -> Mds:
        return Mds(self.name)

    def read(self, skipped: Counter[str]) -> Iterator[Document]:
        """See `Source`."""
        if not isinstance(self.rows, Texts):
            for number, sample in enumerate(self._shards.samples()):
                place = f"{self.name}:{number}"
                self.rows.columns(list(sample), place)
                yield Document(self.rows.content(sample, place), place)
            return
        field, _, dtype = self.rows.field.partition(":")
        for number, sample in enumerate(self._shards.samples((field,))):
            place = f"{self.name}:{number}"
            yield Document(_content(sample[field], dtype, f"{place}, column {field!r}"), place)


@dataclass(frozen=True)
class HuggingFace:
    """A dataset of the `datasets` library, streamed: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`."""

    spec: str
    rows: Rows

    @property
    def name(self) -> str:
        """See `Source`."""
        return f"{HUGGING_FACE}{self.spec}"

    @property
    def size_bytes(self) -> int:
        """Not known before it is read: 0."""
        return 0

    def read(self, skipped: Counter[str]) -> Iterator[Document]:
        """See `Source`."""
        if importlib.util.find_spec("datasets") is None:
            raise InputError(f"{self.name} needs the package datasets", fix="pip install datasets")
        import datasets

        name, *rest = self.spec.split(":")
        split, config = (rest or ["train"])[-1], rest[0] if len(rest) > 1 else None
        try:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.name} cannot be opened", got=storage.one_line(error)) from error
        for number, row in enumerate(rows):
            self.rows.columns(list(row), self.name)
            place = f"{self.name}:{number}"
            yield Document(self.rows.content(_without_nulls(row), place), place)


def _content(value: Any, dtype: str, place: str) -> Content:
    """A text, or tokens as an array or as the bytes of one."""
    if dtype and isinstance(value, bytes):
        try:
            value = np.frombuffer(value, np.dtype(dtype).newbyteorder("<"))
        except (TypeError, ValueError) as error:
            raise InputError(f"{place} holds no tokens of {dtype}", got=str(error)) from error
    if isinstance(value, bytes):
        raise InputError(
            f"{place} holds bytes", expected="text or tokens", fix="--field NAME:DTYPE, such as tokens:int64"
        )
    if not isinstance(value, np.ndarray):
        return checked_text(value, place)
    if value.ndim != 1 or value.dtype.kind not in "iu":
        got = f"{value.dtype} {list(value.shape)}"
        raise InputError(f"{place} holds no tokens", expected="integers, [tokens]", got=got)
    return value.astype(np.int64)


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _documents(batches: Any, rows: Rows, place: str) -> Iterator[Document]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            where = f"{place}:{number}"
            yield Document(rows.content(_without_nulls(row), where), where)
            number += 1

"""The token store: a directory of checksummed token arrays, the tokenizer that made them, and a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mosaicjax.data.arrays import open_array, shard_file
from mosaicjax.data.manifest import SPLITS, Counts, Manifest, read_manifest, record_file
from mosaicjax.data.tokenizer import Tokenizer, load_tokenizer
from mosaicjax.errors import InputError

CACHE_BYTES = 256 * 2**20
VERIFIED_AT_OPEN_BYTES = 2 * 2**30


class Split:
    """One split: the tokens `[SEP] document [SEP] document ... [SEP]`, and where each document lies."""

    def __init__(self, folder: Path, counts: Counts, shard_tokens: int, cache_bytes: int) -> None:
        self.folder = folder
        self.counts = counts
        self.shard_tokens = shard_tokens
        self.cache_bytes = cache_bytes

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.counts.tokens

    def read(self, spans: Sequence[tuple[int, int]]) -> Callable[[], list[np.ndarray]]:
        """Begin to read tokens from `first` up to `last`, of each span; calling the result waits for them.

        Shapes: the result's arrays, of the store's dtype, [last - first].
        Raises: InputError, from the result, naming the shard file that is damaged or missing.
        """
        import tensorstore

        for first, last in spans:
            assert 0 <= first <= last <= len(self), (first, last, len(self))
        with tensorstore.Batch() as batch:
            pending = [self._tokens[first:last].read(batch=batch) for first, last in spans]

        def wait() -> list[np.ndarray]:
            read = []
            for (first, last), future in zip(spans, pending, strict=True):
                try:
                    read.append(future.result())
                except ValueError as error:
                    raise self._damage(first, last - first, error) from error
            return read

        return wait

    def tokens(self, first: int, last: int) -> np.ndarray:
        """Read the tokens from `first` up to `last`, as `read` does."""
        return self.read([(first, last)])()[0]

    def spans(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return where the documents from number `first` up to `last` lie: their first token, and the next.

        A separator comes before and after each.

        Shapes: int64 [last - first, 2].
        Raises: InputError naming the folder of a damaged array.
        """
        last = self.counts.documents if last is None else last
        assert 0 <= first <= last <= self.counts.documents, (first, last)
        starts = self._table(first, min(last + 1, self.counts.documents))[:, 0]
        ends = np.append(starts[1:] - 1, len(self) - 1)[: last - first]
        return np.stack([starts[: last - first], ends], axis=1)

    def document_bytes(self) -> np.ndarray:
        """Return how many UTF-8 bytes the text of each document has.

        Shapes: int64 [documents].
        Raises: InputError naming the folder of a damaged array.
        """
        return self._table(0, self.counts.documents)[:, 1]

    def _table(self, first: int, last: int) -> np.ndarray:
        try:
            table: np.ndarray = self._documents[first:last].read().result()
        except ValueError as error:
            raise self._unreadable("documents", error) from error
        return table

    @cached_property
    def _documents(self) -> Any:
        try:
            return open_array(self.folder / "documents", 0)
        except ValueError as error:
            raise self._unreadable("documents", error) from error

    def _unreadable(self, name: str, error: ValueError) -> InputError:
        return InputError(f"{self.folder / name} is damaged", got=str(error), fix="build the store again")

    @cached_property
    def _tokens(self) -> Any:
        try:
            return open_array(self.folder / "tokens", self.cache_bytes)
        except ValueError as error:
            raise self._unreadable("tokens", error) from error

    def _damage(self, start: int, length: int, error: ValueError) -> InputError:
        """Find the shard that cannot be read, by reading each that the window touches."""
        for shard in range(start // self.shard_tokens, (start + length - 1) // self.shard_tokens + 1):
            first = max(start, shard * self.shard_tokens)
            last = min(start + length, (shard + 1) * self.shard_tokens)
            try:
                self._tokens[first:last].read().result()
            except ValueError as of_shard:
                path = shard_file(self.folder / "tokens", shard)
                return InputError(
                    f"shard {path} is damaged",
                    got=str(of_shard),
                    fix="restore the file, or build the store again",
                )
        return InputError(
            f"tokens {start} to {start + length} of {self.folder} cannot be read", got=str(error)
        )


class Store:
    """A finished token store."""

    def __init__(self, path: Path, manifest: Manifest, cache_bytes: int) -> None:
        self.path = path
        self.manifest = manifest
        self.cache_bytes = cache_bytes

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False, cache_bytes: int = CACHE_BYTES) -> Store:
        """Open a store: its manifest is read and the size of every file compared, nothing more.

        With `verify`, a store under 2 GiB is also hashed whole; for a larger one call `verify()`, which takes
        longer.

        Raises: InputError where there is no finished store, or a file is missing or of another size or
        contents.
        """
        path = Path(path)
        store = cls(path, read_manifest(path), cache_bytes)
        store._check_sizes(store.manifest.files)
        if verify and store.manifest.data_bytes < VERIFIED_AT_OPEN_BYTES:
            store.verify()
        return store

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens, from the store's own copy."""
        record = self.manifest.tokenizer
        return load_tokenizer(self.path / "tokenizer" / record.files[0], separator=record.separator_token)

    def split(self, name: str, *, cache_bytes: int | None = None) -> Split:
        """Return the split `train` or `validation`, with a cache of chunks like the store's or of its own.

        Raises: InputError for another name.
        """
        if name not in SPLITS:
            raise InputError("no such split", expected=" or ".join(SPLITS), got=name)
        return Split(
            self.path / name,
            self.manifest.splits[name],
            self.manifest.settings.layout.shard_tokens,
            self.cache_bytes if cache_bytes is None else cache_bytes,
        )

    def verify(self, split: str | None = None) -> None:
        """Compare the size and SHA-256 of every file, or of one split's, with the manifest.

        Raises: InputError naming the file that differs.
        """
        files = [name for name in self.manifest.files if split is None or name.startswith(f"{split}/")]
        self._check_sizes(files)
        for name in files:
            found = record_file(self.path / name)
            recorded = self.manifest.files[name]
            if found != recorded:
                raise InputError(
                    f"{self.path / name} is damaged",
                    expected=f"SHA-256 {recorded.sha256}",
                    got=found.sha256,
                    fix="restore the file, or build the store again",
                )

    def _check_sizes(self, files: Iterable[str]) -> None:
        for name in files:
            path = self.path / name
            try:
                size = path.stat().st_size
            except FileNotFoundError as error:
                raise InputError(
                    f"{path} is missing", fix="restore the file, or build the store again"
                ) from error
            if size != self.manifest.files[name].bytes:
                raise InputError(
                    f"{path} is damaged",
                    expected=f"{self.manifest.files[name].bytes} bytes",
                    got=size,
                    fix="restore the file, or build the store again",
                )

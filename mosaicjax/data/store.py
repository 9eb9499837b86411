"""The token store: a directory of checksummed token arrays, the tokenizer that made them, and a manifest."""

from __future__ import annotations

from collections.abc import Iterable
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

    def tokens(self, starts: Iterable[int], length: int) -> np.ndarray:
        """Read windows of tokens; every read is issued before the first is waited for.

        Shapes: int32 [len(starts), length].
        Raises: InputError naming the shard file that is damaged or missing.
        """
        import tensorstore

        starts = [int(start) for start in starts]
        for start in starts:
            assert 0 <= start <= len(self) - length, (start, length, len(self))
        rows = np.empty((len(starts), length), np.int32)
        with tensorstore.Batch() as batch:
            pending = [self._tokens[start : start + length].read(batch=batch) for start in starts]
        for row, start, read in zip(rows, starts, pending, strict=True):
            try:
                row[:] = read.result()
            except ValueError as error:
                raise self._damage(start, length, error) from error
        return rows

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Return where each document's first token lies, and how many UTF-8 bytes its text has.

        Shapes: int64 [documents], int64 [documents].
        Raises: InputError naming the folder of a damaged array.
        """
        folder = self.folder / "documents"
        try:
            table = open_array(folder, 0).read().result()
        except ValueError as error:
            raise InputError(f"{folder} is damaged", got=str(error), fix="build the store again") from error
        return table[:, 0], table[:, 1]

    @cached_property
    def _tokens(self) -> Any:
        folder = self.folder / "tokens"
        try:
            return open_array(folder, self.cache_bytes)
        except ValueError as error:
            raise InputError(f"{folder} is damaged", got=str(error), fix="build the store again") from error

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

    def split(self, name: str) -> Split:
        """Return the split `train` or `validation`.

        Raises: InputError for another name.
        """
        if name not in SPLITS:
            raise InputError("no such split", expected=" or ".join(SPLITS), got=name)
        return Split(
            self.path / name,
            self.manifest.splits[name],
            self.manifest.settings.layout.shard_tokens,
            self.cache_bytes,
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

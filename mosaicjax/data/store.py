"""The token store: a directory of checksummed token arrays, the tokenizer that made them, and a manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from mosaicjax import storage
from mosaicjax.data.arrays import (
    BLOCK_CHUNKS,
    CHUNK_DOCUMENTS,
    CHUNK_TOKENS,
    DOCUMENTS,
    LOSS,
    TOKENS,
    shard_file,
)
from mosaicjax.data.chunks import Chunks
from mosaicjax.data.disk_cache import DiskCache, Place
from mosaicjax.data.manifest import (
    NAME,
    SPLITS,
    Counts,
    FileRecord,
    Manifest,
    read_manifest,
    record_file,
)
from mosaicjax.data.readers import Blocks, Reader
from mosaicjax.data.tokenizer import Tokenizer, load_tokenizer
from mosaicjax.errors import InputError

VERIFIED_AT_OPEN_BYTES = 2 * 2**30
RESTORE = "restore the file, or build the store again"


class Split:
    """One split: the tokens `[SEP] document [SEP] document ... [SEP]`, and where each document lies."""

    def __init__(
        self,
        folder: storage.PathLike,
        counts: Counts,
        shard_tokens: int,
        *,
        reader: Callable[[str], Reader] | None = None,
        masked: bool = False,
        identity: str = "",
    ) -> None:
        """`reader` makes those of its arrays, where they do not lie on this machine.

        `masked`: not every token bears loss. `identity` tells splits of other contents apart, wherever they
        lie; by default the folder does.
        """
        self.identity = identity or str(folder)
        self.folder = folder
        self.counts = counts
        self.shard_tokens = shard_tokens
        self.masked = masked
        reader = reader or (lambda name: Chunks(storage.join(folder, name)))
        names = (TOKENS, DOCUMENTS, *([LOSS] if masked else []))
        self._arrays = {name: reader(name) for name in names}

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.counts.tokens

    def read(self, spans: Sequence[tuple[int, int]]) -> Callable[[], list[np.ndarray]]:
        """Begin to read tokens from `first` up to `last`, of each span; calling the result waits for them.

        Shapes: the result's arrays, of the store's dtype, [last - first].
        Raises: InputError, from the result, naming the shard file that is damaged or missing.
        """
        return self._read(TOKENS, spans)

    def read_loss(self, spans: Sequence[tuple[int, int]]) -> Callable[[], list[np.ndarray]]:
        """As `read`: 1 for the tokens that bear loss as targets, 0 for the others, of a `masked` split.

        Shapes: the result's arrays uint8 [last - first].
        """
        return self._read(LOSS, spans)

    def _read(self, name: str, spans: Sequence[tuple[int, int]]) -> Callable[[], list[np.ndarray]]:
        for first, last in spans:
            assert 0 <= first <= last <= len(self), (first, last, len(self))
        try:
            begun = self._arrays[name].begin(spans)
        except InputError:
            raise
        except ValueError as error:
            raise self._unreadable(name, error) from error

        def wait() -> list[np.ndarray]:
            try:
                return begun()
            except InputError:
                raise
            except ValueError as error:
                raise self._damage(name, spans, error) from error

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
            return self._arrays[DOCUMENTS].begin([(first, last)])()[0]
        except InputError:
            raise
        except ValueError as error:
            raise self._unreadable(DOCUMENTS, error) from error

    def _unreadable(self, name: str, error: ValueError) -> InputError:
        return unreadable(storage.join(self.folder, name), error)

    def _damage(self, name: str, spans: Sequence[tuple[int, int]], error: ValueError) -> InputError:
        """Find the shard that cannot be read, by reading each that the spans touch."""
        if out_of_reach(error):
            return self._unreadable(name, error)
        for start, end in spans:
            for shard in range(start // self.shard_tokens, -(-end // self.shard_tokens)):
                first = max(start, shard * self.shard_tokens)
                last = min(end, (shard + 1) * self.shard_tokens)
                try:
                    self._arrays[name].check(first, last)
                except ValueError as of_shard:
                    path = shard_file(name, shard).as_posix()
                    return unreadable(storage.join(self.folder, path), of_shard, "shard ")
        return self._unreadable(name, error)


def out_of_reach(error: ValueError) -> bool:
    """Whether TensorStore reports that a store could not be asked, other than that files there are bad."""
    # ABORTED is a request that was repeated often enough.
    kinds = ("ABORTED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE")
    return str(error).startswith(kinds)


def unreadable(path: str, error: ValueError, what: str = "") -> InputError:
    """The line for a file or array that cannot be read."""
    said = storage.one_line(ValueError(str(error).split(" [tensorstore_spec=")[0]))
    if out_of_reach(error):
        fix = "check the connection and the credentials; the same command goes on where it stopped"
        return InputError(f"{path} cannot be read", got=said, fix=fix)
    return InputError(f"{what}{path} is damaged", got=said, fix=RESTORE)


class Store:
    """A finished token store, on this machine or on `s3://` or `gs://`."""

    def __init__(self, path: storage.PathLike, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: storage.PathLike, *, verify: bool = False) -> Store:
        """Open a store: its manifest is read and the size of every file compared, nothing more.

        With `verify`, a store under 2 GiB on this machine is also hashed whole; for another one call
        `verify()`, which takes longer. Every chunk's checksum is compared when it is read.

        Raises: InputError where there is no finished store, or a file is missing or of another size or
        contents.
        """
        store = cls(path, read_manifest(path))
        store._check_sizes(store.manifest.files)
        if verify and not storage.is_remote(path) and store.manifest.data_bytes < VERIFIED_AT_OPEN_BYTES:
            store.verify()
        return store

    @cached_property
    def cache(self) -> DiskCache:
        """Where blocks of a store that lies elsewhere are kept.

        Raises: InputError where the folder cannot be used.
        """
        return DiskCache(Place.of_machine())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens, from the store's own copy, or a copy of that."""
        record = self.manifest.tokenizer
        if not storage.is_remote(self.path):
            folder = Path(self.path, "tokenizer")
        else:
            folder = self.cache.folder / "tokenizers" / record.hash
            for name in record.files:
                self._copy(f"tokenizer/{name}", folder / name)
        return load_tokenizer(folder / record.files[0], separator=record.separator_token)

    def split(self, name: str) -> Split:
        """Return the split `train` or `validation`.

        Raises: InputError for another name.
        """
        if name not in SPLITS:
            raise InputError("no such split", expected=" or ".join(SPLITS), got=name)
        counts, folder = self.manifest.splits[name], storage.join(self.path, name)
        reader: Callable[[str], Reader] | None = None
        if storage.is_remote(self.path):
            rows: dict[str, tuple[tuple[int, ...], str, int]] = {
                DOCUMENTS: ((counts.documents, 2), "int64", CHUNK_DOCUMENTS)
            }
            kinds = {TOKENS: self.manifest.dtype, LOSS: "uint8"}
            rows |= {array: ((counts.tokens,), dtype, CHUNK_TOKENS) for array, dtype in kinds.items()}

            def blocks(array: str) -> Reader:
                shape, dtype, chunk = rows[array]
                return Blocks(
                    storage.join(folder, array),
                    shape,
                    dtype,
                    block=BLOCK_CHUNKS * chunk,
                    cache=self.cache,
                    name=digest(self.manifest.files, f"{name}/{array}/"),
                )

            reader = blocks
        return Split(
            folder,
            counts,
            self.manifest.settings.layout.shard_tokens,
            reader=reader,
            masked=self.manifest.settings.masked,
            identity=digest(self.manifest.files, f"{name}/"),
        )

    def verify(self, split: str | None = None) -> None:
        """Compare the size and SHA-256 of every file, or of one split's, with the manifest.

        Raises: InputError naming the file that differs.
        """
        files = [name for name in self.manifest.files if split is None or name.startswith(f"{split}/")]
        self._check_sizes(files)
        for name in files:
            self._check(storage.join(self.path, name), name)

    def copy(self, target: storage.PathLike) -> None:
        """Copy the store to anywhere, each file compared with the manifest before it goes, the manifest last.

        Raises: InputError for a damaged file, or a target that holds something else.
        """
        found = storage.list_dir(target)
        if NAME in found and read_manifest(target) == self.manifest:
            return
        if NAME in found:
            raise InputError(f"{target} is another store", fix="copy to another folder, or delete that one")
        for name in self.manifest.files:
            self._check(storage.join(self.path, name), name)
            storage.copy_file(storage.join(self.path, name), storage.join(target, name))
        storage.copy_file(storage.join(self.path, NAME), storage.join(target, NAME))

    def _check(self, path: storage.PathLike, name: str) -> None:
        """Compare a file, or a copy of it, with the manifest."""
        found, recorded = record_file(path), self.manifest.files[name]
        if found != recorded:
            raise InputError(
                f"{path} is damaged", expected=f"SHA-256 {recorded.sha256}", got=found.sha256, fix=RESTORE
            )

    def _copy(self, name: str, target: Path) -> None:
        """Have a file of the store on this machine."""
        if not target.exists() or record_file(target) != self.manifest.files[name]:
            storage.copy_file(storage.join(self.path, name), target)
            self._check(target, name)

    def _check_sizes(self, files: Iterable[str]) -> None:
        sizes = storage.sizes(self.path, files)
        for name in files:
            path = storage.join(self.path, name)
            if name not in sizes:
                raise InputError(f"{path} is missing", fix=RESTORE)
            if sizes[name] != self.manifest.files[name].bytes:
                raise InputError(
                    f"{path} is damaged",
                    expected=f"{self.manifest.files[name].bytes} bytes",
                    got=sizes[name],
                    fix=RESTORE,
                )


def digest(files: Mapping[str, FileRecord], prefix: str = "") -> str:
    """What files of a store are known by: a digest of their checksums in the order of their names."""
    hashes = (record.sha256 for name, record in sorted(files.items()) if name.startswith(prefix))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()

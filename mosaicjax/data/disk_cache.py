"""Blocks of remote data kept on this machine's disk, those used last, within a size.

Any number of processes and threads share a folder. A block is a file that appears whole, ends with its CRC-32
and is touched at every use. How many bytes the folder holds is written in its lock file, which is held only
to make room and to count: the kernel lets go of it where a process dies, and whatever such a process was
writing is told by its own lock, and removed. A block that was removed or is damaged is fetched anew; a disk
that is full only means that nothing more is kept.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mosaicjax.errors import InputError

FOLDER = "MOSAICJAX_CACHE_DIR"
SIZE = "MOSAICJAX_CACHE_SIZE"
DEFAULT_SIZE = "50GB"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

CHECKSUM_BYTES = 4
SPARE = 16
"""Room is made for one part in so many more than is asked for: folders are looked through less often."""

_LOCK = "lock"
_UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Place:
    """Where blocks are kept, and how many bytes of them."""

    folder: Path
    limit_bytes: int

    @classmethod
    def of_machine(cls) -> Place:
        """As the environment says: `MOSAICJAX_CACHE_DIR` and `MOSAICJAX_CACHE_SIZE` ("200GB").

        By default 50GB below `XDG_CACHE_HOME`, or `~/.cache`.

        Raises: InputError for a size that is none.
        """
        given = os.environ.get(SIZE) or DEFAULT_SIZE
        size = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?B)", given.strip().upper())
        if size is None:
            raise InputError(f"the environment's {SIZE}", expected="a size such as 200GB", got=given)
        limit = int(float(size.group(1)) * UNITS[size.group(2)])
        if folder := os.environ.get(FOLDER):
            return cls(Path(folder), limit)
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return cls(Path(home, "mosaicjax", "data"), limit)


class DiskCache:
    """The blocks kept in a folder, by name: slashes in names are folders."""

    def __init__(self, place: Place) -> None:
        """Make the folder.

        Raises: InputError where that cannot be.
        """
        self.folder, self.limit_bytes = place.folder, place.limit_bytes
        self._said = False
        try:
            (self.folder / _UNFINISHED).mkdir(parents=True, exist_ok=True)
            with self._counted():
                pass
        except OSError as error:
            raise InputError(
                f"the cache {self.folder} cannot be used", got=error.strerror, fix=f"another {FOLDER}"
            ) from error

    def get(self, name: str) -> bytes | None:
        """The contents of a block, or None where it is not here; one that is damaged is removed."""
        path = self.folder / "blocks" / name
        try:
            with path.open("rb") as file:
                data = file.read()
                # A block of another user's is read, though not marked as used.
                with suppress(PermissionError):
                    _touch(file.fileno())
        except OSError:
            # Not here, or not to be read any more: its contents come from where they always are.
            return None
        contents, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        if len(data) < CHECKSUM_BYTES or _checksum(contents) != checksum:
            with self._counted() as count, suppress(FileNotFoundError):
                path.unlink()
                count.held -= len(data)
            return None
        return contents

    def put(self, name: str, contents: bytes) -> None:
        """Keep a block, in the room of those used longest ago; not where it is larger than all the room."""
        path = self.folder / "blocks" / name
        size = len(contents) + CHECKSUM_BYTES
        if size > self.limit_bytes:
            return
        try:
            with suppress(FileNotFoundError, PermissionError):
                _touch(path)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._room(size) as (file, unfinished):
                with open(file, "wb", closefd=False) as block:
                    block.write(contents)
                    block.write(_checksum(contents))
                _touch(file)
                os.replace(unfinished, path)
        except OSError as error:
            if not self._said:
                self._said = True
                print(
                    f"the cache {self.folder} cannot keep what is read ({error.strerror}): going on without;"
                    f" a {SIZE} below its {self.limit_bytes:,} bytes, or another {FOLDER}, would help",
                    file=sys.stderr,
                    flush=True,
                )

    @contextmanager
    def _room(self, size: int) -> Iterator[tuple[int, Path]]:
        """A file of the size to be, counted and locked for as long as it is written."""
        with self._counted() as count:
            if count.held + size > self.limit_bytes:
                count.held = self._evict(self.limit_bytes - size - (self.limit_bytes - size) // SPARE)
            (self.folder / _UNFINISHED).mkdir(exist_ok=True)
            unfinished = self.folder / _UNFINISHED / f"{os.urandom(8).hex()}.{size}"
            file = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            fcntl.flock(file, fcntl.LOCK_EX)
            count.held += size
        try:
            yield file, unfinished
        except BaseException:
            with self._counted() as count:
                unfinished.unlink(missing_ok=True)
                count.held -= size
            raise
        finally:
            os.close(file)

    def _evict(self, most: int) -> int:
        """Remove the blocks used longest ago until at most so many bytes are held; returns how many are."""
        held = 0
        for path in (self.folder / _UNFINISHED).iterdir():
            if not path.suffix[1:].isdigit():
                continue
            if _abandoned(path):
                path.unlink(missing_ok=True)
            else:
                held += int(path.suffix[1:])
        found = []
        for folder, _, names in os.walk(self.folder / "blocks"):
            for name in names:
                with suppress(FileNotFoundError):
                    about = os.stat(os.path.join(folder, name))
                    found.append((about.st_mtime_ns, about.st_size, os.path.join(folder, name)))
                    held += about.st_size
        for _, size, name in sorted(found):
            if held <= most:
                break
            with suppress(FileNotFoundError):
                os.unlink(name)
            held -= size
        return held

    @contextmanager
    def _counted(self) -> Iterator[_Count]:
        """How many bytes are held, to be changed; no other process or thread does so meanwhile."""
        file = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = os.pread(file, 32, 0)
            count = _Count(int(text) if text.strip().isdigit() else self._evict(self.limit_bytes))
            yield count
            if text != (now := b"%-31d\n" % max(0, count.held)):
                os.pwrite(file, now, 0)
        finally:
            os.close(file)


@dataclass
class _Count:
    held: int


def _abandoned(path: Path) -> bool:
    """Whether the process that was writing a file is gone."""
    try:
        # To be written: NFS locks no other files.
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _touch(file: int | Path) -> None:
    # What the kernel takes for now by itself may be some milliseconds old.
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _checksum(contents: bytes) -> bytes:
    return zlib.crc32(contents).to_bytes(CHECKSUM_BYTES, "little")

"""The host's allocator: when it gives back what is freed, and when it keeps it.

Only glibc has these calls; elsewhere nothing is changed.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""glibc's `M_TRIM_THRESHOLD` and so on, of malloc.h."""

KEPT_END_BYTES = 2**26
"""So much that is free at the heap's end stays there, for what a step allocates beside its temporaries."""

USUAL_MAX = 65_536
"""What `M_MMAP_MAX` is in a process that has not changed it."""

DONT_NEED = 4
"""Linux's `MADV_DONTNEED`."""

PAGE_BYTES = 2**12
SLACK_BYTES = 2**20
"""What a lent block is larger than asked for, in addresses: for what glibc cuts off and puts right behind."""

SPARES, SPARE_BYTES = 2**10, 2**11
"""Few are used: what is cut off stays in use until glibc's cache of such pieces, seven a size, is full."""

ALIGNMENT, HEADER_BYTES = 64, 8
"""Of XLA's blocks; and what glibc writes before each of its own."""

OWN_PAGES_BYTES = 2**20
USUAL_BYTES = 2**25
"""What glibc's threshold grows to by itself in a process that frees large blocks."""


@contextlib.contextmanager
def own_pages() -> Iterator[Callable[[], object]]:
    """Within, blocks from 1 MiB on get pages of their own; what it yields returns free memory to the system.

    On CPU, weights and a compiler's garbage otherwise share pages, and a process that draws half a model
    stays a third larger than that half.
    """
    libc = _glibc()
    if libc is None:
        yield lambda: None
        return
    libc.mallopt(MMAP_THRESHOLD, OWN_PAGES_BYTES)
    try:
        yield lambda: libc.malloc_trim(0)
    finally:
        libc.mallopt(MMAP_THRESHOLD, USUAL_BYTES)


class Lent:
    """A block of the heap that is lent, time and again, to who allocates so many bytes in this thread.

    On a CPU, XLA allocates a step's temporaries anew each step. Taken from the system and given back, all
    their pages are faulted in and cleared each time, at a tenth of a step's time. This block is free only
    while it is lent, so the temporaries find it whole; nothing else can settle in it. Where they do not find
    it they come from the system, as without it.

    What glibc cuts off an aligned block, some 100 bytes right behind it, may stay in use. The hole is then
    too small by so much; a spare below it, of many that lie side by side, makes it whole. With the last spare
    lending ends, and the pages are given back.
    """

    def __init__(self, size: int) -> None:
        self._size, self._held = size, 0
        self._spares: list[int] = []
        self._libc = _glibc() if size else None
        if self._libc is not None:
            self._take(self._libc)

    def _take(self, libc: ctypes.CDLL) -> None:
        libc.mallopt(TRIM_THRESHOLD, KEPT_END_BYTES)
        libc.mallopt(MMAP_MAX, 0)
        rest = (SPARES + 1) * SPARE_BYTES + self._size + SLACK_BYTES
        block: int = libc.malloc(rest) or 0
        # Between the block and the heap's end, of which what is free goes back to the system.
        passed = []
        while (end := libc.malloc(PAGE_BYTES) or 0) and end < block:
            passed.append(end)
        # The first part is as long as lets all others begin where XLA's blocks do.
        self._spares = []
        for size in (SPARE_BYTES - block % ALIGNMENT, *[SPARE_BYTES] * SPARES):
            rest -= size
            self._spares.append(libc.realloc(block, size - HEADER_BYTES) or 0)
            block = libc.malloc(rest) or 0
        self._held = block
        for each in passed:
            libc.free(each)
        libc.mallopt(MMAP_MAX, USUAL_MAX)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Within, the block is free."""
        libc = self._libc
        if libc is None:
            yield
            return
        libc.free(self._held)
        try:
            yield
        finally:
            self._held = self._again(libc)

    def _again(self, libc: ctypes.CDLL) -> int:
        while self._spares:
            block: int = libc.malloc(self._size + PAGE_BYTES) or 0
            if 0 <= block - self._spares[-1] < SLACK_BYTES:
                return block
            libc.free(block)
            libc.free(self._spares.pop())
        self._libc = None
        libc.malloc_trim(0)
        return 0

    def clear(self) -> None:
        """Give its memory back until it is lent again; its addresses stay."""
        if self._libc is not None:
            first = -(-self._held // PAGE_BYTES) * PAGE_BYTES
            end = (self._held + self._size) // PAGE_BYTES * PAGE_BYTES
            self._libc.madvise(first, end - first, DONT_NEED)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    if not all(hasattr(libc, name) for name in ("mallopt", "malloc_trim", "madvise")):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.realloc.restype, libc.realloc.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc

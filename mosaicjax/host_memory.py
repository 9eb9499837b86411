"""The host's allocator, told to give back what is freed between long-lived arrays."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

MMAP_THRESHOLD = -3
"""glibc's `M_MMAP_THRESHOLD`."""

OWN_PAGES_BYTES = 2**20
USUAL_BYTES = 2**25
"""What glibc's threshold grows to by itself in a process that frees large blocks."""


@contextlib.contextmanager
def own_pages() -> Iterator[Callable[[], object]]:
    """Within, blocks from 1 MiB on get pages of their own; what it yields returns free memory to the system.

    On CPU, weights and a compiler's garbage otherwise share pages, and a process that draws half a model
    stays a third larger than that half. Only glibc has these calls; elsewhere nothing is changed.
    """
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield lambda: None
        return
    libc.mallopt(MMAP_THRESHOLD, OWN_PAGES_BYTES)
    try:
        yield lambda: libc.malloc_trim(0)
    finally:
        libc.mallopt(MMAP_THRESHOLD, USUAL_BYTES)

"""Keeps freed memory in the process, so that each training step reuses it."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["keep_freed_memory"]

# Parameters of mallopt in malloc.h: sizes from which freed blocks return to the system.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST, _LARGEST_BEFORE_2_35 = 1 << 30, 1 << 25  # bytes that glibc accepts, by its version


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed blocks in this process, and return free ones to the system at the end.

    By default glibc returns large blocks at once, and the system zeroes new ones in each step.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    if any(libc.mallopt(_M_MMAP_THRESHOLD, size) for size in (_LARGEST, _LARGEST_BEFORE_2_35)):
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST)
    try:
        yield
    finally:
        libc.malloc_trim(0)

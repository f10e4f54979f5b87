"""Memory that the process holds and does not use, given back to the system.

Decoding an index takes for a while what the index itself takes, and the C library likes to keep
what was freed. Both functions do nothing where they cannot (another C library than glibc).
"""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 1 << 20


def trim_heap() -> None:
    """Give back what was freed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def map_large_blocks() -> None:
    """From now on allocations of a MiB and more go back to the system when they are freed. For
    the owner of a process: otherwise the end of a thread's heap, tens of megabytes, is never
    given back, not even by `trim_heap`."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)

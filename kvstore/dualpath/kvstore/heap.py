"""Memory that the process holds and does not use, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes


def trim_heap() -> None:
    """Give back what was freed. Decoding an index frees as much as the index takes, in pieces
    that the C library would keep for later. Does nothing where it cannot (another C library)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

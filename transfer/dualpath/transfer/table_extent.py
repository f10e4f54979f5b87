"""What a table of slices covers, computed with one call; native where it was built.

`extent_of(stride, count, length, bases, skips, sizes)`, the last three arrays of unsigned 64-bit
numbers, one a part, returns (bytes of all parts, of the smallest, of the largest; the first byte
that any part touches, and one past the last). Raises ValueError for parts that reach beyond their
slices or beyond 64 bits, for slices that overlap, and for arrays that are empty or not as long.
"""

from __future__ import annotations

from dualpath.transfer import table_extent_twin

try:
    from dualpath.transfer._native import extent_of
except ImportError:
    extent_of = table_extent_twin.extent_of

__all__ = ["extent_of"]

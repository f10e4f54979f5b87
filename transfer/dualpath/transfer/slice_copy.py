"""Copying between strided ranges of two regions.

`copy_part` is the one place that moves bytes inside the process: large pieces by memmove without
the interpreter's lock, small ones by slice assignment, which costs less than letting it go.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from dualpath.transfer.slices import Slices

UNLOCKED_BYTES_MIN = 64 << 10
"""From this size on a copy lets other threads run."""


def buffers(view: memoryview, slices: Slices, limit: int) -> list[memoryview]:
    """The first `limit` contiguous pieces of `slices` in `view`."""
    if slices.count == 1 or slices.stride == slices.length:
        start = slices.base + slices.skip
        return [view[start : start + slices.nbytes]]
    found: list[memoryview] = []
    for offset, nbytes in slices.pieces():
        found.append(view[offset : offset + nbytes])
        if len(found) == limit:
            break
    return found


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy all of `source` to `target`, which has as many bytes."""
    if source.nbytes < UNLOCKED_BYTES_MIN:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def copy_slices(
    target: memoryview, target_slices: Slices, source: memoryview, source_slices: Slices
) -> None:
    """Copy all bytes of `source_slices` to `target_slices`, which has as many."""
    for to, at, nbytes in _pairs(target_slices, source_slices):
        copy_bytes(target[to : to + nbytes], source[at : at + nbytes])


def _pairs(target: Slices, source: Slices) -> Iterator[tuple[int, int, int]]:
    """Yield (target offset, source offset, bytes) of pieces contiguous on both sides."""
    sources = source.pieces()
    at, have = 0, 0
    for offset, nbytes in target.pieces():
        to, need = offset, nbytes
        while need:
            if not have:
                at, have = next(sources)
            take = min(need, have)
            yield to, at, take
            to, need = to + take, need - take
            at, have = at + take, have - take

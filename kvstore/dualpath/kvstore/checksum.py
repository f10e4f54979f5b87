"""Checksums of chunks: xxh3-64, over contiguous or strided bytes.

Guards against torn, stale and flipped bytes, not against forgery. All functions release the
GIL while they hash, and copy nothing.
"""

from __future__ import annotations

import numpy as np
import xxhash
from dualpath.kvstore.layout import KVLayout
from dualpath.transfer.slice_table import Fields
from dualpath.transfer.slices import Slices
from numpy.typing import NDArray

try:
    from dualpath.kvstore import _native as native
except ImportError:
    native = None  # type: ignore[assignment]

Buffer = bytes | bytearray | memoryview


def xxh3_64(view: Buffer) -> int:
    """xxh3-64 of the bytes, seed 0."""
    return xxhash.xxh3_64_intdigest(view)


def of_slices(view: memoryview, slices: Slices) -> int:
    """xxh3-64 of the bytes that `slices` names in `view`, as if they were contiguous."""
    pieces = list(slices.pieces())
    if len(pieces) == 1:
        offset, nbytes = pieces[0]
        return xxhash.xxh3_64_intdigest(view[offset : offset + nbytes])
    state = xxhash.xxh3_64()
    for offset, nbytes in pieces:
        state.update(view[offset : offset + nbytes])
    return state.intdigest()


def of_fields(view: memoryview, fields: Fields) -> int:
    """`of_slices` of the Slices of these fields."""
    base, stride, count, length, skip, nbytes = fields
    if count > 1 and stride != length:
        return of_slices(view, Slices(*fields))
    start = base + skip
    return xxhash.xxh3_64_intdigest(view[start : start + nbytes])


def of_block(view: Buffer, layout: KVLayout) -> tuple[int, ...]:
    """The checksum of each chunk of a Full Block, in order."""
    whole = memoryview(view)
    extents = (layout.chunk_extent(chunk) for chunk in range(layout.chunk_count))
    return tuple(xxh3_64(whole[offset : offset + nbytes]) for offset, nbytes in extents)


def of_extents(
    view: memoryview, at: NDArray[np.int64], nbytes: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """xxh3-64 of many extents of `view`, with one call. Raises ValueError outside of it."""
    sums = np.zeros(len(at), np.uint64)
    if native is not None and len(at) and int(nbytes.min()) >= native.HASHED_BYTES_MIN:
        at, nbytes = np.ascontiguousarray(at, np.int64), np.ascontiguousarray(nbytes, np.int64)
        native.hash_extents(view, at, nbytes, sums)
        return sums
    for index, (start, size) in enumerate(zip(at.tolist(), nbytes.tolist(), strict=True)):
        if not 0 <= start <= view.nbytes - size or size < 0:
            raise ValueError(f"extent {index}: {size} bytes at {start} of {view.nbytes}")
        sums[index] = xxhash.xxh3_64_intdigest(view[start : start + size])
    return sums

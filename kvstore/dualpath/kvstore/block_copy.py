"""Copying many blocks with one call, their chunks hashed on the way if asked.

Natively each byte is loaded once, stored past the caches and hashed (xxh3-64) in the same pass, so
that a verified copy costs what a copy costs; in Python each chunk is copied, then hashed where it
arrived. Both release the GIL. A copy is complete, and its loads are done, when the call returns:
a guard that is looked at afterwards speaks for all of it. Source and target must not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from dualpath.transfer.errors import InvalidRequest
from numpy.typing import NDArray

try:
    from dualpath.kvstore import _native as native
except ImportError:
    native = None  # type: ignore[assignment]

__all__ = ["copy_blocks", "copy_blocks_hashed", "gather_blocks_hashed", "native"]

Offsets = NDArray[np.int64]


def copy_blocks(
    target: memoryview, target_at: Offsets, source: memoryview, source_at: Offsets, nbytes: int
) -> None:
    """Copy blocks of `nbytes` each, the i-th from `source_at[i]` to `target_at[i]`. Raises
    InvalidRequest, before anything is copied, if an offset leaves its buffer."""
    _copy(target, target_at, source, source_at, nbytes, nbytes, None)


def copy_blocks_hashed(
    target: memoryview,
    target_at: Offsets,
    source: memoryview,
    source_at: Offsets,
    nbytes: int,
    chunk_bytes: int,
) -> NDArray[np.uint64]:
    """As `copy_blocks`; return the checksum of each block's chunks as they arrived."""
    checksums = np.zeros((len(source_at), -(-nbytes // chunk_bytes)), np.uint64)
    _copy(target, target_at, source, source_at, nbytes, chunk_bytes, checksums)
    return checksums


def gather_blocks_hashed(
    target: memoryview,
    target_at: Offsets,
    sources: Sequence[bytes | bytearray | memoryview],
    nbytes: int,
    chunk_bytes: int,
) -> NDArray[np.uint64]:
    """As `copy_blocks_hashed`, of blocks each of which is a buffer of its own, of `nbytes`."""
    target_at = np.ascontiguousarray(target_at, np.int64)
    checksums = np.zeros((len(target_at), -(-nbytes // chunk_bytes)), np.uint64)
    try:
        if native is None or min(chunk_bytes, nbytes) < native.HASHED_BYTES_MIN:
            gather_in_python(target, target_at, sources, nbytes, chunk_bytes, checksums)
        else:
            views = tuple(sources)
            native.gather_blocks(target, target_at.data, views, nbytes, chunk_bytes, checksums.data)
            _hash_last(target, target_at, nbytes, chunk_bytes, checksums)
    except ValueError as error:
        raise InvalidRequest(f"blocks cannot be copied: {error}") from error
    return checksums


def gather_in_python(
    target: memoryview,
    target_at: Offsets,
    sources: Sequence[bytes | bytearray | memoryview],
    nbytes: int,
    chunk_bytes: int,
    checksums: NDArray[np.uint64],
) -> None:
    """The twin of the native one. Raises ValueError."""
    if len(sources) != len(target_at):
        raise ValueError(f"{len(sources)} sources for {len(target_at)} targets")
    views = [memoryview(source).cast("B") for source in sources]
    for index, view in enumerate(views):
        if view.nbytes != nbytes:
            raise ValueError(f"block {index} has {view.nbytes} bytes, not {nbytes}")
    start = np.zeros(1, np.int64)
    for index, view in enumerate(views):
        one = slice(index, index + 1)
        copy_in_python(target, target_at[one], view, start, nbytes, chunk_bytes, checksums[one])


def _copy(
    target: memoryview,
    target_at: Offsets,
    source: memoryview,
    source_at: Offsets,
    nbytes: int,
    chunk_bytes: int,
    checksums: NDArray[np.uint64] | None,
) -> None:
    target_at = np.ascontiguousarray(target_at, np.int64)
    source_at = np.ascontiguousarray(source_at, np.int64)
    # Short chunks have another formula. Layouts have none, but for a block's last.
    short = checksums is not None and native and min(chunk_bytes, nbytes) < native.HASHED_BYTES_MIN
    copy = copy_in_python if native is None or short else _copy_natively
    try:
        copy(target, target_at, source, source_at, nbytes, chunk_bytes, checksums)
    except ValueError as error:
        raise InvalidRequest(f"blocks cannot be copied: {error}") from error


def _copy_natively(
    target: memoryview,
    target_at: Offsets,
    source: memoryview,
    source_at: Offsets,
    nbytes: int,
    chunk_bytes: int,
    checksums: NDArray[np.uint64] | None,
) -> None:
    sums = None if checksums is None else checksums.data
    native.copy_blocks(target, target_at.data, source, source_at.data, nbytes, chunk_bytes, sums)
    if checksums is not None:
        _hash_last(target, target_at, nbytes, chunk_bytes, checksums)


def _hash_last(
    target: memoryview,
    target_at: Offsets,
    nbytes: int,
    chunk_bytes: int,
    checksums: NDArray[np.uint64],
) -> None:
    """The last chunk of each block, where it is too short for the native code."""
    last = (checksums.shape[1] - 1) * chunk_bytes
    if nbytes - last < native.HASHED_BYTES_MIN:
        for block, offset in enumerate(target_at.tolist()):
            part = target[offset + last : offset + nbytes]
            checksums[block, -1] = xxhash.xxh3_64_intdigest(part)


def copy_in_python(
    target: memoryview,
    target_at: Offsets,
    source: memoryview,
    source_at: Offsets,
    nbytes: int,
    chunk_bytes: int,
    checksums: NDArray[np.uint64] | None,
) -> None:
    """The twin of the native copy. Raises ValueError."""
    if nbytes < 1 or chunk_bytes < 1:
        raise ValueError("nbytes and chunk_bytes must be positive")
    if len(target_at) != len(source_at):
        raise ValueError("as many int64 offsets of sources as of targets are needed")
    for offsets, size, what in (
        (target_at, target.nbytes, "target"),
        (source_at, source.nbytes, "source"),
    ):
        if len(offsets) and (offsets.min() < 0 or offsets.max() > size - nbytes):
            raise ValueError(f"{nbytes} bytes from {offsets.tolist()[:8]} leave the {what}")
    to, start = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    for block, (a, b) in enumerate(zip(target_at.tolist(), source_at.tolist(), strict=True)):
        for chunk, inside in enumerate(range(0, nbytes, chunk_bytes)):
            size = min(chunk_bytes, nbytes - inside)
            first = a + inside
            np.copyto(to[first : first + size], start[b + inside : b + inside + size])
            if checksums is not None:
                checksums[block, chunk] = xxhash.xxh3_64_intdigest(target[first : first + size])

"""Which reads bring a batch of chunks into memory. Pure: arrays in, arrays out.

Chunks of one block that follow each other on the medium and in memory are read at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from dualpath.kvstore.layout import ALIGN_BYTES, KVLayout
from numpy.typing import NDArray

READ_BYTES_AIM = 1 << 20
"""Chunks are read together up to so many bytes: more is not faster, and later for the first."""


@dataclass(frozen=True, slots=True)
class ChunkReads:
    """Read r brings the items [first[r], first[r] + count[r]), `nbytes[r]` bytes, aligned."""

    first: NDArray[np.int32]
    count: NDArray[np.int32]
    nbytes: NDArray[np.int64]
    of_item: NDArray[np.int32]
    """The read of each item; -1 if it needs none."""

    def __len__(self) -> int:
        return len(self.first)

    def cut(self, reads: int, items: int) -> ChunkReads:
        """The leading reads and items."""
        return ChunkReads(
            self.first[:reads], self.count[:reads], self.nbytes[:reads], self.of_item[:items]
        )


def extents(
    layout: KVLayout, chunks: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(offset in the Full Block, bytes) of each chunk, all of them within the layout."""
    inside = chunks.astype(np.int64) * layout.chunk_bytes
    return inside, np.minimum(layout.chunk_bytes, layout.block_bytes - inside)


def plan_reads(
    layout: KVLayout,
    rows: NDArray[np.int32],
    chunks: NDArray[np.int32],
    needed: NDArray[np.bool_],
    buffered: NDArray[np.bool_],
) -> ChunkReads:
    """Group the `needed` items; those that go to a buffer never with those that go to a slot."""
    together = max(1, READ_BYTES_AIM // layout.chunk_bytes)
    goes_on = np.zeros(len(rows), np.bool_)
    if len(rows) > 1:
        goes_on[1:] = (
            needed[1:]
            & needed[:-1]
            & (buffered[1:] == buffered[:-1])
            & (rows[1:] == rows[:-1])
            & (chunks[1:] == chunks[:-1] + 1)
            & (chunks[1:] % together != 0)
        )
    starts = needed & ~goes_on
    first = np.flatnonzero(starts).astype(np.int32)
    of_item = np.where(needed, np.cumsum(starts) - 1, -1).astype(np.int32)
    count = np.bincount(of_item[needed], minlength=len(first)).astype(np.int32)
    begin, _ = extents(layout, chunks[first])
    last_begin, last_nbytes = extents(layout, chunks[first + count - 1])
    whole = last_begin + last_nbytes - begin
    nbytes = -(-whole // ALIGN_BYTES) * ALIGN_BYTES
    return ChunkReads(first, count, nbytes, of_item)

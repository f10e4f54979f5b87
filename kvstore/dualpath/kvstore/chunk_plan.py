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


def no_reads(items: int) -> ChunkReads:
    """For `items` items that all are in memory."""
    none: NDArray[np.int32] = np.empty(0, np.int32)
    return ChunkReads(none, none, np.empty(0, np.int64), np.full(items, -1, np.int32))


def extents(
    layout: KVLayout, chunks: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(offset in the Full Block, bytes) of each chunk, all of them within the layout."""
    chunk_bytes = layout.chunk_bytes
    inside = chunks * np.int64(chunk_bytes)
    return inside, np.minimum(chunk_bytes, layout.block_bytes - inside)


def runs(first: NDArray[np.int32], count: NDArray[np.int32]) -> NDArray[np.int32]:
    """The numbers [first[i], first[i] + count[i]) of all i, one after another."""
    if (count == 1).all():
        return first
    ends = count.cumsum(dtype=np.int32)
    numbers: NDArray[np.int32] = (first - ends + count).repeat(count)
    numbers += np.arange(len(numbers), dtype=np.int32)
    return numbers


def distinct(values: NDArray[np.signedinteger]) -> list[int]:
    """The distinct values; at once if there is only one, as there mostly is."""
    if len(values) and (values == values[0]).all():
        return [int(values[0])]
    return [int(value) for value in np.unique(values)]


def distinct_rows(rows: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(the different rows, which of them each item has). Without a sort where the rows ascend,
    as those of neighbours mostly do."""
    if len(rows) < 2:
        return rows, np.zeros(len(rows), np.int32)
    steps = rows[1:] - rows[:-1]
    if steps.min() < 0:
        found, inverse = np.unique(rows, return_inverse=True)
        return found, inverse.astype(np.int32)
    of_item: NDArray[np.int32] = np.zeros(len(rows), np.int32)
    (steps > 0).cumsum(dtype=np.int32, out=of_item[1:])
    if of_item[-1] == len(rows) - 1:
        return rows, of_item
    return rows[np.append(True, steps > 0)], of_item


def plan_reads(
    chunk_bytes: int,
    rows: NDArray[np.int32],
    chunks: NDArray[np.int32],
    inside: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    needed: NDArray[np.bool_],
    buffered: NDArray[np.bool_],
) -> ChunkReads:
    """Group the `needed` items, whose extents are `inside` and `nbytes`; those that go to a buffer
    never with those that go to a slot."""
    together = max(1, READ_BYTES_AIM // chunk_bytes)
    starts = needed.copy()
    if len(rows) > 1 and together > 1:
        starts[1:] &= ~(
            needed[:-1]
            & (buffered[1:] == buffered[:-1])
            & (rows[1:] == rows[:-1])
            & (chunks[1:] == chunks[:-1] + 1)
            & (chunks[1:] % together != 0)
        )
    first = starts.nonzero()[0].astype(np.int32)
    of_item = starts.cumsum(dtype=np.int32)
    of_item -= 1
    if needed.all():
        ends = np.append(first[1:], np.int32(len(rows)))
        count = ends - first
    else:
        of_item[~needed] = -1
        count = np.bincount(of_item[needed], minlength=len(first)).astype(np.int32)
    last = first + count - 1
    whole = inside[last] + nbytes[last] - inside[first]
    return ChunkReads(first, count, -(-whole // ALIGN_BYTES) * ALIGN_BYTES, of_item)

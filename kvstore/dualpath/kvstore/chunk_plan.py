"""Which reads bring a batch of chunks into memory. Pure: arrays in, arrays out.

Chunks of one block that follow each other on the medium and in memory are read at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from dualpath.kvstore.layout import ALIGN_BYTES, CHUNKS_PER_BLOCK_MAX, KVLayout
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


_BITS: NDArray[np.uint64] = np.left_shift(
    np.uint64(1), np.arange(CHUNKS_PER_BLOCK_MAX, dtype=np.uint64)
)


def chunk_bits(chunks: NDArray[np.int32]) -> NDArray[np.uint64]:
    """The bit of each chunk in the masks of its block."""
    return _BITS[chunks]


def chunk_keys(rows: NDArray[np.int32], chunks: NDArray[np.int32]) -> NDArray[np.int64]:
    """One number a chunk: equal if and only if row and chunk are."""
    return rows * np.int64(CHUNKS_PER_BLOCK_MAX) + chunks


def repeated(keys: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Which items name a chunk that an earlier item names too; None: none does."""
    if (keys[1:] > keys[:-1]).all():
        return None
    found: NDArray[np.bool_] = np.ones(len(keys), np.bool_)
    found[np.unique(keys, return_index=True)[1]] = False
    return found


def plan_reads(
    chunk_bytes: int,
    keys: NDArray[np.int64],
    chunks: NDArray[np.int32],
    inside: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    needed: NDArray[np.bool_],
    buffered: NDArray[np.bool_],
) -> ChunkReads:
    """Group the `needed` items, whose `chunk_keys` are `keys` and whose extents are `inside` and
    `nbytes`; those that go to a buffer never with those that go to a slot."""
    together = max(1, READ_BYTES_AIM // chunk_bytes)
    items, all_needed = len(keys), bool(needed.all())
    starts = needed.copy()
    if items > 1 and together > 1:
        # The first chunk of a block follows no other: 0 % together.
        follows = (keys[1:] - keys[:-1] == 1) & (chunks[1:] % together != 0)
        follows &= buffered[1:] == buffered[:-1]
        if not all_needed:
            follows &= needed[:-1]
        starts[1:] &= ~follows
    first = starts.nonzero()[0].astype(np.int32)
    of_item = starts.cumsum(dtype=np.int32)
    of_item -= 1
    if all_needed:
        count = np.empty_like(first)
        np.subtract(first[1:], first[:-1], out=count[:-1])
        count[-1] = items - first[-1]
    else:
        of_item[~needed] = -1
        count = np.bincount(of_item[needed], minlength=len(first)).astype(np.int32)
    last = first + count - 1
    whole = inside[last] + nbytes[last] - inside[first]
    whole += ALIGN_BYTES - 1
    whole &= -ALIGN_BYTES
    return ChunkReads(first, count, whole, of_item)

"""The durable facts of many blocks as columns: how an index of millions is opened and closed.

A block is a position in the columns. Owns the filters that keep a set of blocks consistent: one
block a slot, and no block without all of its ancestors. Knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from dualpath.kvstore.block_table import GONE, NO_ROW
from numpy.typing import NDArray

_DOUBLINGS_MAX = 32
"""A chain of 2^31 blocks is found to reach its root in so many steps; a circle never is."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockColumns:
    """Facts of blocks [0, n).

    `namespaces` are numbers whose meaning the owner keeps, `hashes` is HASH_BYTES_MAX wide,
    `parents` are positions (NO_ROW for the first block of a chain, GONE where the parent is not
    among them), `used` tells the order of last uses. `checksums` of all blocks follow each other,
    `chunks[i]` of them for block i.
    """

    namespaces: NDArray[np.int32]
    hashes: NDArray[np.uint8]
    hash_bytes: NDArray[np.uint8]
    parents: NDArray[np.int32]
    segments: NDArray[np.int32]
    slots: NDArray[np.int32]
    generations: NDArray[np.int64]
    used: NDArray[np.int64]
    chunks: NDArray[np.int32]
    checksums: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.namespaces)

    def take(self, positions: NDArray[np.integer]) -> BlockColumns:
        """These blocks only, in this order."""
        new = np.full(len(self) + 2, GONE, np.int32)
        new[positions] = np.arange(len(positions))
        new[NO_ROW] = NO_ROW  # the last two answer for NO_ROW and GONE
        return BlockColumns(
            namespaces=self.namespaces[positions],
            hashes=self.hashes[positions],
            hash_bytes=self.hash_bytes[positions],
            parents=new[self.parents[positions]],
            segments=self.segments[positions],
            slots=self.slots[positions],
            generations=self.generations[positions],
            used=self.used[positions],
            chunks=self.chunks[positions],
            checksums=self.checksums[self.checksums_at(positions)],
        )

    def checksums_at(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Where in `checksums` those of these blocks lie, one after another."""
        ends = np.cumsum(self.chunks, dtype=np.int64)
        counts = self.chunks[positions]
        ahead = np.cumsum(counts, dtype=np.int64) - counts
        starts = ends[positions] - counts - ahead
        return np.repeat(starts, counts) + np.arange(int(counts.sum()))

    def latest_of_slots(self) -> NDArray[np.bool_]:
        """True for the latest block of each slot: of two, the later generation is true."""
        place = self.segments.astype(np.int64) << 32 | self.slots
        order = np.lexsort((self.generations, place))
        latest = np.ones(len(self), np.bool_)
        latest[order[:-1]] = place[order[:-1]] != place[order[1:]]
        return latest

    def rooted(self, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """True for those of the `kept` blocks all of whose ancestors are kept."""
        # Each block points to an ancestor, ever twice as far; NO_ROW and GONE are ends.
        above = np.where(kept, self.parents, GONE)
        for _ in range(_DOUBLINGS_MAX):
            going = np.flatnonzero(above >= 0)
            if not len(going):
                break
            above[going] = above[above[going]]
        rooted: NDArray[np.bool_] = above == NO_ROW
        return rooted

"""The memory index's rows: numpy columns, no object a block.

A row is a small integer that names a block while it is pending, sealing, present or dying.
Columns are public and may be read and written by the store, under its lock; the tree (parent,
children) and the free list are kept here. Growing doubles the columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

import numpy as np
from dualpath.kvstore.store_api import HASH_BYTES_MAX
from numpy.typing import NDArray

NO_ROW = -1
GONE = -2
"""Parent of a pending block whose parent left the store: it can never be published."""
_ROWS_MIN = 1024


class RowState:
    """What a row stands for. Plain integers: they live in a column, and looking a member of an
    enum up costs more than all else that is done with it."""

    FREE: Final = 0
    PENDING: Final = 1
    SEALING: Final = 2
    PRESENT: Final = 3
    DEAD: Final = 4
    """Out of the index; its slots are kept until its pins and leases are gone."""


class BlockTable:
    """See the module docstring. `dram` is an arena offset, `segment` and `slot` a place on SSD;
    -1 is none. `filled` has a bit for each chunk that is in the DRAM slot, `reading` for each that
    is being read into it."""

    def __init__(self) -> None:
        n = _ROWS_MIN
        self.state: NDArray[np.uint8] = np.zeros(n, np.uint8)
        self.namespace: NDArray[np.int32] = np.zeros(n, np.int32)
        self.parent: NDArray[np.int32] = np.full(n, NO_ROW, np.int32)
        self.leases: NDArray[np.int32] = np.zeros(n, np.int32)
        self.pins: NDArray[np.int32] = np.zeros(n, np.int32)
        self.used: NDArray[np.int64] = np.zeros(n, np.int64)
        self.generation: NDArray[np.int64] = np.zeros(n, np.int64)
        self.segment: NDArray[np.int32] = np.full(n, -1, np.int32)
        self.slot: NDArray[np.int32] = np.full(n, -1, np.int32)
        self.slot_bytes: NDArray[np.int32] = np.zeros(n, np.int32)
        self.dram: NDArray[np.int64] = np.full(n, -1, np.int64)
        self.filled: NDArray[np.uint64] = np.zeros(n, np.uint64)
        self.reading: NDArray[np.uint64] = np.zeros(n, np.uint64)
        self.resident: NDArray[np.bool_] = np.zeros(n, np.bool_)
        self.dirty: NDArray[np.bool_] = np.zeros(n, np.bool_)
        self.checksum_row: NDArray[np.int32] = np.full(n, -1, np.int32)
        self.first_child: NDArray[np.int32] = np.full(n, NO_ROW, np.int32)
        self._next: NDArray[np.int32] = np.full(n, NO_ROW, np.int32)
        self._previous: NDArray[np.int32] = np.full(n, NO_ROW, np.int32)
        self._hash: NDArray[np.uint8] = np.zeros((n, HASH_BYTES_MAX), np.uint8)
        self._hash_len: NDArray[np.uint8] = np.zeros(n, np.uint8)
        self._free = array("i", range(n - 1, -1, -1))

    @property
    def rows(self) -> int:
        """Length of the columns, free rows included."""
        return len(self.state)

    def add(self, namespace: int, block_hash: bytes, parent: int, slot_bytes: int) -> int:
        """A PENDING row, linked below its parent (or NO_ROW)."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self.state[row] = RowState.PENDING
        self.namespace[row] = namespace
        self.slot_bytes[row] = slot_bytes
        self._hash[row, : len(block_hash)] = np.frombuffer(block_hash, np.uint8)
        self._hash_len[row] = len(block_hash)
        self.parent[row] = NO_ROW
        if parent != NO_ROW:
            self.link(row, parent)
        return row

    def hash_of(self, row: int) -> bytes:
        """The chain hash."""
        return self._hash[row, : int(self._hash_len[row])].tobytes()

    def link(self, row: int, parent: int) -> None:
        """Make `row` a child."""
        first = int(self.first_child[parent])
        self.parent[row] = parent
        self._next[row] = first
        self._previous[row] = NO_ROW
        if first != NO_ROW:
            self._previous[first] = row
        self.first_child[parent] = row

    def unlink(self, row: int, parent: int = NO_ROW) -> None:
        """Take `row` out of its parent's children; remember `parent` (NO_ROW or GONE)."""
        above = int(self.parent[row])
        if above >= 0:
            before, after = int(self._previous[row]), int(self._next[row])
            if before == NO_ROW:
                self.first_child[above] = after
            else:
                self._next[before] = after
            if after != NO_ROW:
                self._previous[after] = before
            self._next[row] = self._previous[row] = NO_ROW
        self.parent[row] = parent

    def children(self, row: int) -> Iterator[int]:
        """Children, newest first; do not unlink while iterating."""
        child = int(self.first_child[row])
        while child != NO_ROW:
            yield child
            child = int(self._next[child])

    def free(self, row: int) -> None:
        """Give the row back; it has no children, slots, leases or pins any more."""
        assert self.first_child[row] == NO_ROW
        assert self.dram[row] < 0
        assert self.segment[row] < 0
        assert self.leases[row] == 0
        assert self.pins[row] == 0
        assert self.reading[row] == 0
        self.unlink(row)
        self.state[row] = RowState.FREE
        self.filled[row] = 0
        self.resident[row] = False
        self.dirty[row] = False
        self._free.append(row)

    def _grow(self) -> None:
        old = self.rows
        for name, column in list(vars(self).items()):
            if not isinstance(column, np.ndarray):
                continue
            fill = -1 if name in _NEGATIVE else 0
            more = np.full_like(column, fill)
            setattr(self, name, np.concatenate((column, more)))
        self._free.extend(range(2 * old - 1, old - 1, -1))


_NEGATIVE = frozenset(
    (
        "parent",
        "segment",
        "slot",
        "dram",
        "checksum_row",
        "first_child",
        "_next",
        "_previous",
    )
)


class ChecksumPool:
    """Checksums of blocks with the same number of chunks: one numpy row a block."""

    def __init__(self, chunks: int) -> None:
        self._values: NDArray[np.uint64] = np.zeros((_ROWS_MIN, chunks), np.uint64)
        self._free = array("i", range(_ROWS_MIN - 1, -1, -1))

    def put(self, checksums: tuple[int, ...]) -> int:
        """Store; return the row in this pool."""
        if not self._free:
            old = len(self._values)
            self._values = np.concatenate((self._values, np.zeros_like(self._values)))
            self._free.extend(range(2 * old - 1, old - 1, -1))
        row = self._free.pop()
        self._values[row] = checksums
        return row

    def free(self, row: int) -> None:
        """Give a row back."""
        self._free.append(row)

    def take(self, rows: NDArray[np.int32]) -> NDArray[np.uint64]:
        """A copy of the checksums of many rows."""
        return self._values[rows]

    def pick(self, rows: NDArray[np.int32], chunks: NDArray[np.int32]) -> NDArray[np.uint64]:
        """A copy of the checksum of one chunk of each row."""
        return self._values[rows, chunks]

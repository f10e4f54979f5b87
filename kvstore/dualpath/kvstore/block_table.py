"""The memory index's rows: numpy columns, no object a block.

A row is a small integer that names a block while it is pending, sealing, present or dying.
Columns are public and may be read and written by the store, under its lock; the tree (parent,
children), the free list and the index of keys are kept here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from dualpath.kvstore.key_index import KeyIndex, new_key_index
from dualpath.kvstore.store_api import HASH_BYTES_MAX
from numpy.typing import DTypeLike, NDArray

NO_ROW = -1
GONE = -2
"""Parent of a pending block whose parent left the store: it can never be published."""
_ROWS_MIN = 1024
_ROWS_SHOWN_AT_ONCE = 1 << 16
"""Most rows by which the columns grow: what a free row holds is written then."""
_RESERVED_ROWS_MAX = 1 << 24
"""Most rows for which address space is reserved before they are needed."""


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
    -1 is none. `used` rises with every use; `used_s` and `retain_until` are seconds since opening
    (0: not retained). `filled` has a bit for each chunk that is in the DRAM slot, `reading` for
    each that is being read into it."""

    state: NDArray[np.uint8]
    namespace: NDArray[np.int32]
    parent: NDArray[np.int32]
    leases: NDArray[np.int32]
    pins: NDArray[np.int32]
    used: NDArray[np.int64]
    used_s: NDArray[np.uint32]
    retain_until: NDArray[np.uint32]
    generation: NDArray[np.int64]
    segment: NDArray[np.int32]
    slot: NDArray[np.int32]
    slot_bytes: NDArray[np.int32]
    dram: NDArray[np.int64]
    filled: NDArray[np.uint64]
    reading: NDArray[np.uint64]
    resident: NDArray[np.bool_]
    dirty: NDArray[np.bool_]
    checksum_row: NDArray[np.int32]
    first_child: NDArray[np.int32]
    _next: NDArray[np.int32]
    _previous: NDArray[np.int32]
    _hash: NDArray[np.uint8]
    _hash_len: NDArray[np.uint8]

    def __init__(self, rows_max: int = 1 << 16) -> None:
        self._wanted = min(max(rows_max, _ROWS_MIN), _RESERVED_ROWS_MAX)
        self._columns: dict[str, NDArray[Any]] = {}
        self._top = 0
        self._free_row = NO_ROW
        self.index: KeyIndex = new_key_index()
        """Rows of present blocks by key. Whoever publishes a row puts it there."""
        self._reserve(_ROWS_MIN)
        self._show(_ROWS_MIN)

    @property
    def rows(self) -> int:
        """Length of the columns, free rows included."""
        return len(self.state)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns' rows that were ever used, and of the key index."""
        row_bytes = sum(column[:1].nbytes for column in self._columns.values())
        return self._top * row_bytes + self.index.nbytes

    def add(self, namespace: int, block_hash: bytes, parent: int, slot_bytes: int) -> int:
        """A PENDING row, linked below its parent (or NO_ROW)."""
        row = self._free_row
        if row != NO_ROW:
            self._free_row = int(self._next[row])
            self._next[row] = NO_ROW
        else:
            row = self.extend(1)
        self.state[row] = RowState.PENDING
        self.namespace[row] = namespace
        self.slot_bytes[row] = slot_bytes
        self._hash[row, : len(block_hash)] = np.frombuffer(block_hash, np.uint8)
        self._hash_len[row] = len(block_hash)
        self.parent[row] = NO_ROW
        if parent != NO_ROW:
            self.link(row, parent)
        return row

    def extend(self, count: int) -> int:
        """The first of `count` rows that were never used, in a row; they are still FREE."""
        first = self._top
        self._top += count
        while self._top > self.rows:
            self._grow()
        return first

    def set_hashes(self, first: int, hashes: NDArray[np.uint8], lengths: NDArray[np.uint8]) -> None:
        """Set the hashes of the rows from `first` on; they are HASH_BYTES_MAX wide."""
        self._hash[first : first + len(hashes)] = hashes
        self._hash_len[first : first + len(hashes)] = lengths

    def hashes(self, rows: NDArray[np.int32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """(hashes, HASH_BYTES_MAX wide, and their lengths) of many rows: a copy."""
        return self._hash[rows], self._hash_len[rows]

    def hash_of(self, row: int) -> bytes:
        """The chain hash."""
        return self._hash[row, : int(self._hash_len[row])].tobytes()

    def fingerprint(self, row: int) -> int:
        """64 bits of the chain hash: the block's name for an eviction policy."""
        return int.from_bytes(self._hash[row, :8].tobytes(), "little")

    def extended(self, row: int, children_max: int) -> int:
        """The parent, if it has at most so many children; else NO_ROW."""
        parent = int(self.parent[row])
        if parent < 0:
            return NO_ROW
        child = int(self.first_child[parent])
        for _ in range(children_max):
            child = int(self._next[child])
            if child == NO_ROW:
                return parent
        return NO_ROW

    def link(self, row: int, parent: int) -> None:
        """Make `row` a child."""
        first = int(self.first_child[parent])
        self.parent[row] = parent
        self._next[row] = first
        self._previous[row] = NO_ROW
        if first != NO_ROW:
            self._previous[first] = row
        self.first_child[parent] = row

    def link_all(self, count: int) -> None:
        """Link rows [0, count) below the parents that their `parent` names; none is linked yet."""
        parent = self.parent[:count]
        below = np.argsort(parent, kind="stable")[np.count_nonzero(parent < 0) :].astype(np.int32)
        above = parent[below]
        siblings = np.flatnonzero(above[1:] == above[:-1]) if len(below) else below
        self._next[below[siblings]] = below[siblings + 1]
        self._previous[below[siblings + 1]] = below[siblings]
        firsts = np.ones(len(below), np.bool_)
        firsts[siblings + 1] = False
        self.first_child[above[firsts]] = below[firsts]

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
        self.retain_until[row] = 0
        self._next[row] = self._free_row
        self._free_row = row

    def _grow(self) -> None:
        """Show more of the columns. They are reserved far ahead, since memory that is not touched
        costs nothing and moving them takes long; so mostly this only makes new views."""
        rows = self.rows + min(self.rows, _ROWS_SHOWN_AT_ONCE)
        if rows > len(self._columns["state"]):
            ahead = self._wanted if rows > _ROWS_SHOWN_AT_ONCE else 0
            try:
                self._reserve(max(2 * self.rows, ahead))
            except MemoryError:  # where address space is rationed
                self._reserve(2 * self.rows)
        self._show(rows)

    def _reserve(self, rows: int) -> None:
        """Columns of so many rows, with what was there before. Nothing else is touched."""
        wider = {
            name: np.zeros((rows, width) if width > 1 else rows, dtype)
            for name, (dtype, width, _) in _COLUMNS.items()
        }
        for name, column in wider.items():
            before = self._columns.get(name)
            if before is not None:
                column[: len(before)] = before
            self._columns[name] = column

    def _show(self, rows: int) -> None:
        shown = self.rows if hasattr(self, "state") else 0
        for name, (_, _, fill) in _COLUMNS.items():
            column = self._columns[name]
            if fill:
                column[shown:rows] = fill
            setattr(self, name, column[:rows])
        read_next = (self.leases, self.resident, self.checksum_row)
        self.index.bind(self.namespace, self._hash, self._hash_len, self.parent, *read_next)


_COLUMNS: dict[str, tuple[DTypeLike, int, int]] = {
    "state": (np.uint8, 1, RowState.FREE),
    "namespace": (np.int32, 1, 0),
    "parent": (np.int32, 1, NO_ROW),
    "leases": (np.int32, 1, 0),
    "pins": (np.int32, 1, 0),
    "used": (np.int64, 1, 0),
    "used_s": (np.uint32, 1, 0),
    "retain_until": (np.uint32, 1, 0),
    "generation": (np.int64, 1, 0),
    "segment": (np.int32, 1, -1),
    "slot": (np.int32, 1, -1),
    "slot_bytes": (np.int32, 1, 0),
    "dram": (np.int64, 1, -1),
    "filled": (np.uint64, 1, 0),
    "reading": (np.uint64, 1, 0),
    "resident": (np.bool_, 1, 0),
    "dirty": (np.bool_, 1, 0),
    "checksum_row": (np.int32, 1, -1),
    "first_child": (np.int32, 1, NO_ROW),
    "_next": (np.int32, 1, NO_ROW),
    "_previous": (np.int32, 1, NO_ROW),
    "_hash": (np.uint8, HASH_BYTES_MAX, 0),
    "_hash_len": (np.uint8, 1, 0),
}
"""Each column's type, width and the value of a row that is free."""


class ChecksumPool:
    """Checksums of blocks with the same number of chunks: one numpy row a block."""

    def __init__(self, chunks: int) -> None:
        self._values: NDArray[np.uint64] = np.zeros((_ROWS_MIN, chunks), np.uint64)
        self._top = 0
        # Free rows hold the number of the next one, plus 1.
        self._free_row = NO_ROW

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that were ever used."""
        return self._values[: self._top].nbytes

    @property
    def values(self) -> NDArray[np.uint64]:
        """The rows; a change of the pool may move them."""
        return self._values

    def put(self, checksums: tuple[int, ...]) -> int:
        """Store; return the row in this pool."""
        row = self._free_row
        if row != NO_ROW:
            self._free_row = int(self._values[row, 0]) - 1
        else:
            row = self._extend(1)
        self._values[row] = checksums
        return row

    def put_all(self, checksums: NDArray[np.uint64]) -> int:
        """Store those of many blocks in neighbouring rows; return the first."""
        first = self._extend(len(checksums))
        self._values[first : first + len(checksums)] = checksums
        return first

    def _extend(self, count: int) -> int:
        first = self._top
        self._top += count
        if self._top > len(self._values):
            rows = max(2 * len(self._values), self._top)
            values = np.zeros((rows, self._values.shape[1]), np.uint64)
            values[:first] = self._values[:first]
            self._values = values
        return first

    def free(self, row: int) -> None:
        """Give a row back."""
        self._values[row, 0] = self._free_row + 1
        self._free_row = row

    def take(self, rows: NDArray[np.integer]) -> NDArray[np.uint64]:
        """A copy of the checksums of many rows."""
        return self._values.take(rows, axis=0)

    def pick(self, rows: NDArray[np.int32], chunks: NDArray[np.int32]) -> NDArray[np.uint64]:
        """A copy of the checksum of one chunk of each row."""
        return self._values[rows, chunks]

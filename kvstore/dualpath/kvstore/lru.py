"""Least recently used first, exactly, without moving a row when it is used.

A use appends its rows, deepest first, to the log of their group; an entry counts only while it is
the row's last use. The oldest entry that counts is the next victim. A row whose entry was passed
while it could not go waits aside and comes back at its place in time. Of rows that were used
together the deepest goes first. Needs 23 bytes a row and up to two log entries of 12 bytes. Pure.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final

import numpy as np
from dualpath.kvstore.eviction import NONE
from numpy.typing import NDArray

_LOOKED_AT_ONCE: Final = 256
_ROWS_MIN: Final = 1024
_NEVER: Final = -1


class _Log:
    """(row, stamp) of uses, oldest first, in packed columns."""

    def __init__(self) -> None:
        self._rows: NDArray[np.int32] = np.empty(_ROWS_MIN, np.int32)
        self._stamps: NDArray[np.int64] = np.empty(_ROWS_MIN, np.int64)
        self._start = self._end = 0
        # Of the group; the entries of those that left or were used again are dead weight.
        self.members = 0

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes + self._stamps.nbytes

    def append(
        self, rows: NDArray[np.integer], stamps: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> None:
        """`counts[row]` is the stamp of the row's entry that counts."""
        if self._end + len(rows) > len(self._rows):
            self._make_room(len(rows), counts)
        end = self._end + len(rows)
        self._rows[self._end : end] = rows
        self._stamps[self._end : end] = stamps
        self._end = end

    def peek(
        self, counts: NDArray[np.int64], waits: NDArray[np.bool_], parked: NDArray[np.bool_]
    ) -> int:
        """The row of the oldest entry that counts, not parked; -1 if there is none. Parked rows
        before it wait aside from now on."""
        while self._start < self._end:
            end = min(self._start + _LOOKED_AT_ONCE, self._end)
            rows = self._rows[self._start : end]
            valid = counts[rows] == self._stamps[self._start : end]
            free = valid & ~parked[rows]
            at = int(free.argmax()) if free.any() else len(rows)
            waits[rows[:at][valid[:at]]] = True
            self._start += at
            if at < len(rows):
                return int(rows[at])
        self._start = self._end = 0
        return NONE

    def _make_room(self, more: int, counts: NDArray[np.int64]) -> None:
        rows = self._rows[self._start : self._end]
        stamps = self._stamps[self._start : self._end]
        kept = counts[rows] == stamps
        rows, stamps = rows[kept], stamps[kept]
        size = len(self._rows)
        # At least half is free afterwards, so that the copy is paid for by as many entries.
        while 2 * (len(rows) + more) > size:
            size *= 2
        self._rows, self._stamps = np.empty(size, np.int32), np.empty(size, np.int64)
        self._rows[: len(rows)], self._stamps[: len(rows)] = rows, stamps
        self._start, self._end = 0, len(rows)


class Lru:
    """See the module docstring. Implements EvictionPolicy."""

    name = "lru"

    def __init__(self, rows_max: int = _ROWS_MIN) -> None:
        self._clock = 0
        self._used: NDArray[np.int64] = np.full(0, _NEVER, np.int64)
        self._group: NDArray[np.uint16] = np.zeros(0, np.uint16)
        self._parked: NDArray[np.bool_] = np.zeros(0, np.bool_)
        # The entry that counts was passed while the row was parked.
        self._waits: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._logs: list[_Log] = []
        # (stamp, row) of rows that came back, a heap a group.
        self._back: list[list[tuple[int, int]]] = []
        self._grow(max(rows_max, _ROWS_MIN))

    @property
    def nbytes(self) -> int:
        """See EvictionPolicy."""
        columns = (self._used, self._group, self._parked, self._waits)
        return sum(each.nbytes for each in columns) + sum(log.nbytes for log in self._logs)

    def insert(
        self, row: int, group: int, key: int, *, extends: int = NONE, parked: bool = False
    ) -> None:
        """See EvictionPolicy."""
        self.fill(np.array([row], np.int32), group, np.array([parked]))

    def fill(self, rows: NDArray[np.int32], group: int, parked: NDArray[np.bool_]) -> None:
        """See EvictionPolicy."""
        if not len(rows):
            return
        if int(rows.max()) >= len(self._used):
            self._grow(int(rows.max()) + 1)
        while group >= len(self._logs):
            self._logs.append(_Log())
            self._back.append([])
        self._group[rows] = group
        self._parked[rows] = parked
        self._waits[rows] = False
        self._logs[group].members += len(rows)
        self._note(rows, group)

    def hit(self, rows: NDArray[np.integer]) -> None:
        """See EvictionPolicy."""
        rows = rows[rows < len(self._used)]
        rows = rows[self._used[rows] != _NEVER]
        if len(rows):
            self._note(rows[::-1], int(self._group[rows[0]]))

    def park(self, row: int) -> None:
        """See EvictionPolicy."""
        if row < len(self._used) and self._used[row] != _NEVER:
            self._parked[row] = True

    def ready(self, row: int, *, spent: bool = False) -> None:
        """See EvictionPolicy. The time of its last use says whether it is spent."""
        if row >= len(self._used) or not self._parked[row]:
            return
        self._parked[row] = False
        if self._waits[row]:
            self._waits[row] = False
            back = self._back[int(self._group[row])]
            heapq.heappush(back, (int(self._used[row]), row))

    def parked(self, rows: NDArray[np.integer]) -> NDArray[np.integer]:
        """See EvictionPolicy."""
        rows = rows[rows < len(self._parked)]
        return rows[self._parked.take(rows)]

    def remove(self, row: int, key: int = 0) -> None:
        """See EvictionPolicy."""
        if row >= len(self._used) or self._used[row] == _NEVER:
            return
        self._logs[int(self._group[row])].members -= 1
        self._used[row] = _NEVER
        self._parked[row] = self._waits[row] = False

    def victim(self, group: int, may_go: Callable[[int], bool]) -> int:
        """See EvictionPolicy."""
        if group >= len(self._logs):
            return NONE
        log, back = self._logs[group], self._back[group]
        while True:
            row = log.peek(self._used, self._waits, self._parked)
            self._clear(back)
            if back and (row == NONE or back[0][0] <= self._used[row]):
                row = back[0][1]
            if row == NONE or may_go(row):
                return row
            self._parked[row] = True
            if back and row == back[0][1]:
                heapq.heappop(back)
                self._waits[row] = True

    def group_of(self, row: int) -> int:
        """See EvictionPolicy."""
        if row >= len(self._used) or self._used[row] == _NEVER:
            return NONE
        return int(self._group[row])

    def count(self, group: int) -> int:
        """See EvictionPolicy."""
        return self._logs[group].members if group < len(self._logs) else 0

    def _clear(self, back: list[tuple[int, int]]) -> None:
        """Take off the top what was used again, has left or was parked."""
        while back:
            stamp, row = back[0]
            if self._used[row] == stamp:
                if not self._parked[row]:
                    return
                self._waits[row] = True
            heapq.heappop(back)

    def _note(self, rows: NDArray[np.integer], group: int) -> None:
        stamps = np.arange(self._clock, self._clock + len(rows), dtype=np.int64)
        self._clock += len(rows)
        self._used[rows] = stamps
        self._waits[rows] = False
        self._logs[group].append(rows, stamps, self._used)

    def _grow(self, rows: int) -> None:
        old = len(self._used)
        rows = max(rows, 2 * old)
        for name, fill in (("_used", _NEVER), ("_group", 0), ("_parked", 0), ("_waits", 0)):
            column = getattr(self, name)
            grown = np.full(rows, fill, column.dtype)
            grown[:old] = column
            setattr(self, name, grown)

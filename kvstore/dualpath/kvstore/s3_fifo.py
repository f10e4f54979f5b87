"""S3-FIFO for blocks that form chains.

The published algorithm: a row enters the *small* queue, a tenth of its group; one that was used
since moves on to the *main* queue when its turn comes, the others leave and are remembered as
ghosts; who returns while he is remembered enters the main queue. Who was used since (two bits count
it) goes round in the main queue once more instead of leaving. A use moves nothing.

What chains of blocks need besides, each with the hit rates that it brings in docs/architecture.md:

1. Only rows that can go stand in the queues. A parked row that was used counts as main at once: in
   a queue it would have had its turn long ago.
2. A chain goes as a whole: a parent that was not used later than its last child (`spent`) has no
   uses left when its turn comes. Else each row of a dead conversation went round by itself, one
   after another.
3. What extends a chain in the main queue enters the main queue: the next turn of a conversation is
   no one-hit wonder, though nobody has used it yet. What branches off where many do is one.
4. One use suffices to move on, not two: the first use of a new block is the next turn.
5. Where most of what leaves the small queue comes back while it is remembered, quick demotion is
   wrong: then a small row leaves only when it has been idle half as long as the next main row.

Needs 17 bytes a row and 8 to 16 for its ghosts. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from dualpath.kvstore.eviction import NONE
from dualpath.kvstore.ghost_table import GhostTable
from dualpath.kvstore.row_lists import RowLists
from numpy.typing import NDArray

_SMALL_SHARE_OF: Final = 10
"""The small queue holds one of so many rows."""
_USES_MAX: Final = 3
_REPRIEVES_MAX: Final = 256
"""Most rows that go round in one search for a victim: then the next one leaves, used or not."""
_PATIENCE: Final = 2
"""Rule 5: a small row leaves when its idle time, so many times, is that of the next main row."""
_RETURNS_MANY: Final = 0.5
"""Rule 5: the share of rows that left unused and came back from which on it holds."""
_RETURNS_OVER_MIN: Final = 1000
"""That share is one of at least so many rows that left, the latest ones weighing most."""
_TICKS_MASK: Final = (1 << 32) - 1
_ROWS_MIN: Final = 1024
_UNKNOWN: Final = 0
_SMALL: Final = 1
_MAIN: Final = 2


class S3Fifo:
    """See the module docstring. Implements EvictionPolicy."""

    name = "s3-fifo"

    def __init__(self, rows_max: int = _ROWS_MIN) -> None:
        self._lists = RowLists()
        self._ghosts = GhostTable(_ROWS_MIN)
        self._home: NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._uses: NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._parked: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._group: NDArray[np.uint16] = np.zeros(0, np.uint16)
        # When the row came or was used last, in ticks: one for each insert and each hit.
        self._used: NDArray[np.uint32] = np.zeros(0, np.uint32)
        self._ticks = 0
        self._small_rows: list[int] = []
        self._main_rows: list[int] = []
        # Rows of a group that left unused, and that came back since; both fade.
        self._left: list[float] = []
        self._returned: list[float] = []
        self._rows = 0
        self._grow(max(rows_max, _ROWS_MIN))

    @property
    def nbytes(self) -> int:
        """See EvictionPolicy."""
        columns = (self._home, self._uses, self._parked, self._group, self._used)
        return sum(each.nbytes for each in columns) + self._lists.nbytes + self._ghosts.nbytes

    def insert(
        self, row: int, group: int, key: int, *, extends: int = NONE, parked: bool = False
    ) -> None:
        """See EvictionPolicy."""
        if row >= len(self._home):
            self._grow(row + 1)
        if group >= len(self._small_rows):
            self._add_groups(group + 1)
        assert self._home_view[row] == _UNKNOWN, row
        returns = self._ghosts.take(key, self._rows)
        if returns:
            self._returned[group] += 1
        grows = extends != NONE and self._home_view[extends] == _MAIN
        home = _MAIN if returns or grows else _SMALL
        self._ticks += 1
        self._used_view[row] = self._ticks & _TICKS_MASK
        self._home_view[row] = home
        self._uses_view[row] = 0
        self._group_view[row] = group
        self._parked_view[row] = parked
        self._counts(home)[group] += 1
        self._rows += 1
        if self._rows > self._ghosts.entries:
            self._ghosts.grow(2 * self._rows)
        if not parked:
            self._lists.append(2 * group + home, row)

    def fill(self, rows: NDArray[np.int32], group: int, parked: NDArray[np.bool_]) -> None:
        """See EvictionPolicy. All count as new: else whatever is stored after a restart had to
        make way for what nobody may ever use again."""
        if not len(rows):
            return
        if int(rows.max()) >= len(self._home):
            self._grow(int(rows.max()) + 1)
        if group >= len(self._small_rows):
            self._add_groups(group + 1)
        self._home[rows] = _SMALL
        self._uses[rows] = 0
        self._group[rows] = group
        self._parked[rows] = parked
        self._used[rows] = self._ticks & _TICKS_MASK
        self._small_rows[group] += len(rows)
        self._rows += len(rows)
        self._ghosts.grow(self._rows)
        self._lists.extend(2 * group + _SMALL, rows[~parked])

    def hit(self, rows: NDArray[np.integer]) -> None:
        """See EvictionPolicy."""
        if not len(rows):
            return
        if int(rows.max()) >= len(self._home):
            rows = rows[rows < len(self._home)]
        self._ticks += 1
        self._used[rows] = self._ticks & _TICKS_MASK
        uses = self._uses.take(rows)
        self._uses[rows] = uses + (uses < _USES_MAX)
        proven = rows[(self._home.take(rows) == _SMALL) & self._parked.take(rows)]
        if len(proven):
            self._home[proven] = _MAIN
            group = self._group_view[int(proven[0])]
            self._small_rows[group] -= len(proven)
            self._main_rows[group] += len(proven)

    def park(self, row: int) -> None:
        """See EvictionPolicy."""
        if row >= len(self._home) or self._parked_view[row]:
            return
        home = self._home_view[row]
        if home == _UNKNOWN:
            return
        group = self._group_view[row]
        self._lists.discard(2 * group + home, row)
        self._parked_view[row] = True
        if home == _SMALL and self._uses_view[row]:
            self._move_on(row, group)

    def ready(self, row: int, *, spent: bool = False) -> None:
        """See EvictionPolicy. Its turn is next: it is older than what kept it."""
        if row >= len(self._home) or not self._parked_view[row]:
            return
        self._parked_view[row] = False
        if spent:
            self._uses_view[row] = 0
        self._lists.prepend(2 * self._group_view[row] + self._home_view[row], row)

    def parked(self, rows: NDArray[np.integer]) -> NDArray[np.integer]:
        """See EvictionPolicy."""
        rows = rows[rows < len(self._parked)]
        return rows[self._parked.take(rows)]

    def remove(self, row: int, key: int = 0) -> None:
        """See EvictionPolicy. Only those that leave the small queue are remembered."""
        home = self._home_view[row] if row < len(self._home) else _UNKNOWN
        if home == _UNKNOWN:
            return
        group = self._group_view[row]
        if not self._parked_view[row]:
            self._lists.discard(2 * group + home, row)
        if home == _SMALL and key:
            self._ghosts.add(key)
            self._note_left(group)
        self._counts(home)[group] -= 1
        self._rows -= 1
        self._home_view[row] = _UNKNOWN
        self._parked_view[row] = False

    def victim(self, group: int, may_go: Callable[[int], bool]) -> int:
        """See EvictionPolicy."""
        if group >= len(self._small_rows):
            return NONE
        lists, small, main = self._lists, 2 * group + _SMALL, 2 * group + _MAIN
        reprieves = 0
        while True:
            row = lists.first(small)
            if row != NONE and self._is_small_turn(group, row, lists.first(main)):
                if self._uses_view[row]:
                    lists.discard(small, row)
                    self._move_on(row, group)
                    self._uses_view[row] = 0
                    lists.append(main, row)
                    continue
            else:
                row = lists.first(main)
                if row == NONE:
                    return NONE
                if self._uses_view[row] and reprieves < _REPRIEVES_MAX:
                    reprieves += 1
                    self._uses_view[row] -= 1
                    lists.discard(main, row)
                    lists.append(main, row)
                    continue
            if may_go(row):
                return row
            self.park(row)

    def _is_small_turn(self, group: int, small: int, main: int) -> bool:
        """Whether the first of the small queue is to leave or to move on, not that of main."""
        if main == NONE:
            return True
        small_rows = self._small_rows[group]
        if small_rows * _SMALL_SHARE_OF <= small_rows + self._main_rows[group]:
            return False
        if self._returned[group] <= _RETURNS_MANY * self._left[group] or self._uses_view[small]:
            return True
        idle = (self._ticks - self._used_view[small]) & _TICKS_MASK
        return _PATIENCE * idle >= (self._ticks - self._used_view[main]) & _TICKS_MASK

    def _note_left(self, group: int) -> None:
        self._left[group] += 1
        over = max(_RETURNS_OVER_MIN, (self._small_rows[group] + self._main_rows[group]) // 2)
        if self._left[group] > over:
            self._left[group] /= 2
            self._returned[group] /= 2

    def group_of(self, row: int) -> int:
        """See EvictionPolicy."""
        if row >= len(self._home) or self._home_view[row] == _UNKNOWN:
            return NONE
        return self._group_view[row]

    def count(self, group: int) -> int:
        """See EvictionPolicy."""
        if group >= len(self._small_rows):
            return 0
        return self._small_rows[group] + self._main_rows[group]

    def _move_on(self, row: int, group: int) -> None:
        self._home_view[row] = _MAIN
        self._small_rows[group] -= 1
        self._main_rows[group] += 1

    def _counts(self, home: int) -> list[int]:
        return self._small_rows if home == _SMALL else self._main_rows

    def _add_groups(self, count: int) -> None:
        self._small_rows += [0] * (count - len(self._small_rows))
        self._main_rows += [0] * (count - len(self._main_rows))
        self._left += [0.0] * (count - len(self._left))
        self._returned += [0.0] * (count - len(self._returned))
        # Two lists a group: 2 * group + _SMALL and + _MAIN.
        self._lists.add_lists(2 * count + _MAIN)

    def _grow(self, rows: int) -> None:
        rows = max(rows, 2 * len(self._home))
        for name in ("_home", "_uses", "_parked", "_group", "_used"):
            old = getattr(self, name)
            column = np.zeros(rows, old.dtype)
            column[: len(old)] = old
            setattr(self, name, column)
        self._home_view = self._home.data
        self._uses_view = self._uses.data
        self._parked_view = self._parked.data
        self._group_view = self._group.data
        self._used_view = self._used.data
        self._lists.grow(rows)

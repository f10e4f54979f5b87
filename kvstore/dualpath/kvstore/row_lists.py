"""Doubly linked lists of rows in packed columns: eight bytes a row, no object a row.

Each row is in one list at most. Lists are small integers and come into being when first named.
Pure; checks nothing: the caller knows which list a row is in.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NONE = -1


class RowLists:
    """See the module docstring. The *first* of a list is the next to leave."""

    def __init__(self) -> None:
        self._columns: NDArray[np.int32] = np.empty((2, 0), np.int32)
        self._before = self._columns[0].data
        self._after = self._columns[1].data
        self._first: list[int] = []
        self._last: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the columns."""
        return self._columns.nbytes

    def grow(self, rows: int) -> None:
        """Make room for rows [0, rows)."""
        columns = np.empty((2, rows), np.int32)
        columns[:, : self._columns.shape[1]] = self._columns
        self._columns = columns
        # Views give Python integers three times as fast as numpy gives its scalars.
        self._before = columns[0].data
        self._after = columns[1].data

    def add_lists(self, count: int) -> None:
        """Have at least so many lists."""
        missing = count - len(self._first)
        self._first += [_NONE] * missing
        self._last += [_NONE] * missing

    def first(self, at: int) -> int:
        """The next row to leave list `at`; -1 if it is empty."""
        return self._first[at]

    def append(self, at: int, row: int) -> None:
        """Put a row last."""
        last = self._last[at]
        self._before[row] = last
        self._after[row] = _NONE
        if last == _NONE:
            self._first[at] = row
        else:
            self._after[last] = row
        self._last[at] = row

    def prepend(self, at: int, row: int) -> None:
        """Put a row first."""
        first = self._first[at]
        self._after[row] = first
        self._before[row] = _NONE
        if first == _NONE:
            self._last[at] = row
        else:
            self._before[first] = row
        self._first[at] = row

    def extend(self, at: int, rows: NDArray[np.int32]) -> None:
        """Put rows last, in this order."""
        if not len(rows):
            return
        self._columns[1, rows[:-1]] = rows[1:]
        self._columns[0, rows[1:]] = rows[:-1]
        first, last = int(rows[0]), int(rows[-1])
        old = self._last[at]
        self._before[first] = old
        self._after[last] = _NONE
        if old == _NONE:
            self._first[at] = first
        else:
            self._after[old] = first
        self._last[at] = last

    def discard(self, at: int, row: int) -> None:
        """Take a row out of its list."""
        before, after = self._before[row], self._after[row]
        if before == _NONE:
            self._first[at] = after
        else:
            self._after[before] = after
        if after == _NONE:
            self._last[at] = before
        else:
            self._before[after] = before

"""In which order blocks make way: the port of eviction policies.

`EvictionPolicy` is told of rows and asked for victims. Rows stand in groups (a tenant's blocks of
one size class); a victim is asked of one group. Pure: no time, no I/O; needs the store's lock.

Contract
--------
A row is *inserted* when its block is in the tier and *removed* when it has left. In between it may
be *parked*: it cannot go (it has children, is leased, pinned, dirty), so it is not looked at.
The caller parks a row with `park`, or by refusing it in `victim`, and must say `ready` once the row
may go again; a row that is never made ready never goes. So each row is looked at a bounded number
of times an event, and never is a set of rows scanned that cannot go.

Leaf before parent is the caller's rule: it parks a parent when a child is linked below it and makes
it ready when the last child has gone. `spent` then says that the parent was not used later than
that child: a chain that was last used as a whole may go as a whole, row by row from its end.

Cost: `insert`, `park`, `ready`, `remove` and `victim` are O(1) amortised over these events, a few
microseconds each; `hit` and `fill` are numpy operations over their rows. No object a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

NONE: Final = -1
"""No row."""
CHAIN_CHILDREN_MAX: Final = 2
"""See `EvictionPolicy.insert`. A conversation forks where its last turn is put anew."""


class EvictionPolicy(Protocol):
    """See the module docstring."""

    @property
    def name(self) -> str:
        """As in the configuration."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its columns take."""

    def insert(
        self, row: int, group: int, key: int, *, extends: int = NONE, parked: bool = False
    ) -> None:
        """A row is there from now on. `key` (64 bits) names its block also after it has left.
        `extends` is the parent's row, unless that has over CHAIN_CHILDREN_MAX children, this one
        included: where many prompts branch off, none of them goes on with a conversation."""

    def fill(self, rows: NDArray[np.int32], group: int, parked: NDArray[np.bool_]) -> None:
        """Insert rows that are there at the start, the first to go first."""

    def hit(self, rows: NDArray[np.integer]) -> None:
        """Rows of one group were used together, parents before children. Unknown rows are
        ignored."""

    def park(self, row: int) -> None:
        """The row cannot go. Idempotent."""

    def ready(self, row: int, *, spent: bool = False) -> None:
        """The row may go again. Ignored if it is not parked."""

    def parked(self, rows: NDArray[np.integer]) -> NDArray[np.integer]:
        """Those of the rows that are parked."""

    def remove(self, row: int, key: int = 0) -> None:
        """The row has left. With `key` it is remembered as one that had to make way. Ignored if
        the row is unknown."""

    def victim(self, group: int, may_go: Callable[[int], bool]) -> int:
        """The first row of the group to go; NONE if there is none. Rows that `may_go` refuses are
        parked. The row stays until it is removed."""

    def group_of(self, row: int) -> int:
        """The row's group; NONE if it is unknown."""

    def count(self, group: int) -> int:
        """Rows of a group, parked ones included."""

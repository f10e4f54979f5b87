"""Which blocks to give up: pure decisions on columns.

`EvictionPolicy` is the port: from the candidates' last use it picks the first victims. The
caller decides who is a candidate (a leaf, not leased, not pinned, not dirty), so that presence
stays prefix-closed whatever the policy. `VictimQueue` makes a scan of all rows rare.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_BATCH_MIN = 64
_BATCH_SHARE = 64
"""A scan yields at least a 64th of the rows, so that its cost is shared by as many victims."""


class EvictionPolicy(Protocol):
    """See the module docstring."""

    @property
    def name(self) -> str:
        """For statistics."""

    def victims(
        self, candidates: NDArray[np.int64], used: NDArray[np.int64], most: int
    ) -> NDArray[np.int64]:
        """At most `most` of the candidate rows, the first to go first. `used[row]` is a clock
        that rises with every use."""


class Lru:
    """Least recently used first."""

    name = "lru"

    def victims(
        self, candidates: NDArray[np.int64], used: NDArray[np.int64], most: int
    ) -> NDArray[np.int64]:
        """See EvictionPolicy."""
        ages = used[candidates]
        if len(candidates) > most:
            nearest = np.argpartition(ages, most - 1)[:most]
            candidates, ages = candidates[nearest], ages[nearest]
        return candidates[np.argsort(ages, kind="stable")]


class VictimQueue:
    """Victims of past scans, checked again when they are taken.

    `candidates` returns the rows that may go now; `allowed(row)` says the same of one row.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        candidates: Callable[[], NDArray[np.int64]],
        allowed: Callable[[int], bool],
    ) -> None:
        self._policy = policy
        self._candidates = candidates
        self._allowed = allowed
        self._heap: list[tuple[int, int]] = []

    def next(self, used: NDArray[np.int64]) -> int:
        """The next victim; -1 if nothing may go."""
        row = self._pop(used)
        if row < 0:
            found = self._candidates()
            most = max(_BATCH_MIN, len(found) // _BATCH_SHARE)
            rows = self._policy.victims(found, used, most)
            self._heap = [(int(used[row]), int(row)) for row in rows]
            heapq.heapify(self._heap)
            row = self._pop(used)
        return row

    def offer(self, row: int, used: NDArray[np.int64]) -> None:
        """A row became a candidate (its last child went)."""
        if self._heap and self._allowed(row):
            heapq.heappush(self._heap, (int(used[row]), row))

    def _pop(self, used: NDArray[np.int64]) -> int:
        while self._heap:
            when, row = heapq.heappop(self._heap)
            if used[row] == when and self._allowed(row):
                return row
        return -1

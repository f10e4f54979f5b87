"""The total tokens of each decode group: which one the next request goes to.

Owns the sums over a group of what its engines have (tok_e) and of what waits for it, and a heap
over them: the paper's first level. A change costs the logarithm of the groups.
"""

from __future__ import annotations

import heapq

_STALE_MAX = 8
"""Entries of the heap for each group before it is made anew."""


class GroupTotals:
    """Sums by group index; groups come and go."""

    def __init__(self) -> None:
        self._total: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._total)

    def __contains__(self, group: int) -> bool:
        return group in self._total

    def groups(self) -> list[int]:
        """In order of their index."""
        return sorted(self._total)

    def total(self, group: int) -> int:
        """Tokens of a group."""
        return self._total[group]

    def set(self, group: int, total: int) -> None:
        """A group is there and has so many tokens."""
        if self._total.get(group) == total:
            return
        self._total[group] = total
        heapq.heappush(self._heap, (total, group))
        if len(self._heap) > _STALE_MAX * len(self._total) + _STALE_MAX:
            self._heap = [(tokens, index) for index, tokens in self._total.items()]
            heapq.heapify(self._heap)

    def add(self, group: int, tokens: int) -> None:
        """A group has so many tokens more, or fewer."""
        self.set(group, self._total[group] + tokens)

    def remove(self, group: int) -> None:
        """A group has gone."""
        self._total.pop(group, None)

    def least(self) -> int | None:
        """The group with the fewest tokens, the lowest index if several; None: there is none."""
        heap, totals = self._heap, self._total
        while heap:
            total, group = heap[0]
            if totals.get(group) == total:
                return group
            heapq.heappop(heap)
        return None

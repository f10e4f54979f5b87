"""Shares of something bounded: nobody may hold more of it than is left for the others.

Owns the counts by sharer. A single sharer gets half of the whole, a second one half of what is left
of that, and so on: however much the others hold, one more finds room. For one event loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dualpath.transfer.errors import Overloaded


class Shares:
    """See the module docstring. There are `most`, named `what` in messages."""

    def __init__(self, most: int, what: str, *, retry_after_s: float) -> None:
        self._most = most
        self._what = what
        self._retry_after_s = retry_after_s
        self._held: dict[str, int] = {}
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def take(self, sharer: str) -> None:
        """One more for this sharer. Raises Overloaded, reason `quota` if it is he who holds too
        many."""
        held, left = self._held.get(sharer, 0), self._most - self._total
        if left <= 0:
            raise Overloaded(
                f"{self._total} {self._what}, {self._most} at most",
                retry_after_s=self._retry_after_s,
            )
        if held >= left:
            raise Overloaded(
                f"{sharer} has {held} {self._what}, and {left} are left for all others: one "
                "principal may not have more than that; end some",
                retry_after_s=self._retry_after_s,
                reason="quota",
            )
        self._held[sharer] = held + 1
        self._total += 1

    def give_back(self, sharer: str) -> None:
        """One that was taken has ended."""
        left = self._held[sharer] - 1
        self._total -= 1
        if left:
            self._held[sharer] = left
        else:
            del self._held[sharer]

    @contextmanager
    def taken(self, sharer: str) -> Iterator[None]:
        """One more, for as long as the block runs. Raises Overloaded."""
        self.take(sharer)
        try:
            yield
        finally:
            self.give_back(sharer)

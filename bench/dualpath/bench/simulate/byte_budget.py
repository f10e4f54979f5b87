"""A bounded amount of memory that jobs take and give back, in the order of their asking.

Jobs that need several budgets ask for all of them at once, so that they cannot wait for each other
in a circle (`KvMoves`).
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from dualpath.bench.simulate.virtual_clock import Handler


class ByteBudget:
    """`taken` never exceeds `capacity`. Who asks for more than all of it gets all of it."""

    __slots__ = ("_waiting", "capacity", "name", "peak", "taken")

    def __init__(self, name: str, capacity: float = math.inf) -> None:
        self.name = name
        self.capacity = capacity
        self.taken = 0.0
        self.peak = 0.0
        self._waiting: deque[tuple[float, Handler, Any]] = deque()

    def take(self, amount: float, then: Handler, argument: object) -> None:
        """Call `then(argument)` when `amount` is there: at once, or within somebody's `give`."""
        amount = min(amount, self.capacity)
        if not self._waiting and self.taken + amount <= self.capacity:
            self._hold(amount)
            then(argument)
        else:
            self._waiting.append((amount, then, argument))

    def give(self, amount: float) -> None:
        """Back from a job that took `amount`."""
        self.taken -= min(amount, self.capacity)
        assert self.taken > -0.5, f"{self.name}: more is given back than was taken"
        waiting = self._waiting
        while waiting and self.taken + waiting[0][0] <= self.capacity:
            amount, then, argument = waiting.popleft()
            self._hold(amount)
            then(argument)

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    def _hold(self, amount: float) -> None:
        self.taken += amount
        self.peak = max(self.peak, self.taken)

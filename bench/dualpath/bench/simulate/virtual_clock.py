"""Simulated time: events in the order of their times, and of their making where times are equal.

Guarantees that time never goes back: an event in the past is refused, which is one of the
simulator's conservation checks. Knows nothing of what the events do.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any

from dualpath.transfer.errors import InvalidRequest

PAST_TOLERANCE_S = 1e-6
"""Rounding of times that are sums of many others; more than that is time travel."""
Handler = Callable[[Any], None]


class TimeTravel(AssertionError):
    """An event was put before the present: a mistake of the simulator, never of its user."""


class VirtualClock:
    """`at` plans, `run` executes. `now` is in seconds since the beginning of the run."""

    __slots__ = ("_events", "_made", "events_run", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.events_run = 0
        self._events: list[tuple[float, int, Handler, Any]] = []
        self._made = 0

    def at(self, time_s: float, handler: Handler, argument: object = None) -> None:
        """Call `handler(argument)` at `time_s`. Raises TimeTravel, InvalidRequest (not finite)."""
        now = self.now
        if time_s < now:
            if time_s < now - PAST_TOLERANCE_S * max(1.0, now * 1e-6):
                raise TimeTravel(f"an event at {time_s!r} s was made at {now!r} s")
            time_s = now
        elif not time_s < math.inf:
            raise InvalidRequest(f"an event at {time_s!r} s would never happen")
        self._made += 1
        heapq.heappush(self._events, (time_s, self._made, handler, argument))

    def after(self, delay_s: float, handler: Handler, argument: object = None) -> None:
        """Call `handler(argument)` in `delay_s` seconds."""
        self.at(self.now + delay_s, handler, argument)

    def run(self, until_s: float = math.inf, events_max: int | None = None) -> bool:
        """Run events in order; True when none is left, False when one of the bounds was met.
        With a finite `until_s` the time is `until_s` afterwards if events are left."""
        events = self._events
        pop = heapq.heappop
        limit = -1 if events_max is None else events_max
        run = 0
        try:
            while events:
                if run == limit:
                    return False
                if events[0][0] > until_s:
                    self.now = until_s
                    return False
                time_s, _, handler, argument = pop(events)
                self.now = time_s
                run += 1
                handler(argument)
        finally:
            self.events_run += run
        return True

"""What a stream has still to be told: events in order, taken in batches.

Bounded: a peer that does not read what it is told is cut off, since it has lost its work anyway.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeAlias

from dualpath.scheduler.assignment import Assignment
from dualpath.transfer.errors import DeadlineExceeded, DualPathError

EVENTS_MAX = 262_144


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """Engines should forget a request."""

    request: str


@dataclass(frozen=True, slots=True)
class Requeued:
    """A request lost its engines and waits for others."""

    request: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is over. `reason` "": finished."""

    request: str
    reason: str = ""
    message: str = ""
    retry_after_s: float = 0.0


Event: TypeAlias = Assignment | Withdrawn | Requeued | Ended


class Outbox:
    """`put` and `close` at any time, `take` by one task of the loop."""

    def __init__(self, events_max: int = EVENTS_MAX) -> None:
        self._most = events_max
        self._events: list[Event] = []
        self._changed = asyncio.Event()
        self._error: DualPathError | None = None
        self._closed = False

    @property
    def open(self) -> bool:
        """Whether anybody will still be told."""
        return not self._closed

    def put(self, event: Event) -> None:
        """Tell it, unless the stream is over."""
        if self._closed:
            return
        if len(self._events) >= self._most:
            self._events.clear()
            self.close(
                DeadlineExceeded(
                    f"{self._most} events were not read; read as they come, or open it again",
                    reason="stalled",
                )
            )
            return
        self._events.append(event)
        self._changed.set()

    def close(self, error: DualPathError | None = None) -> None:
        """The stream ends after what was put; with `error`, if one is given."""
        if not self._closed:
            self._closed = True
            self._error = error
            self._changed.set()

    def drain(self) -> list[Event]:
        """All that waits, taken back."""
        events, self._events = self._events, []
        return events

    async def take(self) -> list[Event]:
        """All that came since, at least one; empty: the stream is over. Raises what it was
        closed with."""
        while True:
            if self._events:
                events, self._events = self._events, []
                return events
            if self._closed:
                if self._error is not None:
                    raise self._error
                return []
            self._changed.clear()
            await self._changed.wait()

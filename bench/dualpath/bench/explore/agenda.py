"""What may happen next: messages on their way, steps of writes, faults that are still allowed.

Owns the events and their order: each belongs to a channel, of which only the first may happen, and
channels are independent of each other. What happens by default is what was caused first.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """Something that may happen."""

    number: int
    channel: str
    what: str
    happen: Callable[[], None]


class Agenda:
    """See the module docstring."""

    def __init__(self) -> None:
        self._channels: dict[str, deque[Event]] = {}
        self._held: set[str] = set()
        self._numbers = itertools.count()

    def add(self, channel: str, what: str, happen: Callable[[], None]) -> None:
        """It may happen once all that is before it in its channel has."""
        event = Event(next(self._numbers), channel, what, happen)
        self._channels.setdefault(channel, deque()).append(event)

    def possible(self) -> list[Event]:
        """The first of each channel that is not held, the oldest first."""
        first = (events[0] for name, events in self._channels.items() if name not in self._held)
        return sorted(first, key=lambda event: event.number)

    def take(self, event: Event) -> None:
        """It happens now."""
        events = self._channels[event.channel]
        assert events[0] is event, f"{event.what} cannot happen now"
        events.popleft()
        if not events:
            del self._channels[event.channel]

    def hold(self, channel: str) -> None:
        """Nothing of this channel happens until it is let go."""
        self._held.add(channel)

    def let_go(self, channel: str) -> None:
        """It goes on."""
        self._held.discard(channel)

    def drop(self, channel: str) -> None:
        """What is on its way in these channels (by the beginning of their names) gets lost."""
        for name in [name for name in self._channels if name.startswith(channel)]:
            del self._channels[name]

"""What the sending halves of the streams to one peer share: a lock, and waking each other.

Guarantees that whoever found nothing to send, because a more urgent lane of another stream had
something waiting, looks again once that may have changed.
"""

from __future__ import annotations

import threading

from dualpath.transfer.lane_queue import PeerLanes


class StreamTurns:
    """`lock` guards the outboxes of all streams to the peer, which share `lanes`."""

    def __init__(self) -> None:
        self.lanes = PeerLanes()
        self.lock = threading.RLock()
        self._conditions: list[threading.Condition] = []

    def join(self) -> threading.Condition:
        """The condition of one more stream."""
        condition = threading.Condition(self.lock)
        self._conditions.append(condition)
        return condition

    def wake_others(self, own: threading.Condition) -> None:
        """Let the other streams look again; called with the lock held."""
        for condition in self._conditions:
            if condition is not own:
                condition.notify()

"""The order in which writes to one peer go: strict by lane, with a floor for saves.

Pure and not thread-safe; its owner locks. Guarantees: within a lane first in, first out; a lower
lane value goes first, except that SAVE gets at least `SAVE_FLOOR` of the bytes while it waits.
BACKGROUND has no floor. A peer's lanes may be spread over several streams, with a queue each: the
order holds over all of them, but a stream with an urgent lane never waits for another's saves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from dualpath.transfer.lane import SAVE_FLOOR, Lane

T = TypeVar("T")

SAVE_CREDIT_BYTES_MAX = 8 << 20
"""Most bytes that saves may catch up on, whose stream was blocked meanwhile."""


class PeerLanes:
    """What the queues of the streams to one peer share."""

    def __init__(self) -> None:
        self.waiting = dict.fromkeys(Lane, 0)
        """Items of each lane, in all queues."""
        self.queued_bytes = 0
        """Bytes without a completion; the outboxes count them."""
        # Bytes that saves may send before the others, negative while they had more than that.
        self.save_credit = 0.0


class LaneQueue(Generic[T]):
    """Items waiting by lane, to go by one stream."""

    def __init__(self, shared: PeerLanes | None = None) -> None:
        self._queues: dict[Lane, deque[T]] = {lane: deque() for lane in sorted(Lane)}
        self._shared = shared or PeerLanes()

    def push(self, lane: Lane, item: T) -> None:
        """Append `item` to `lane`."""
        self._queues[lane].append(item)
        self._shared.waiting[lane] += 1

    def next_lane(self) -> Lane | None:
        """The lane whose head goes next; None if nothing waits, or only for other streams."""
        for lane, queue in self._queues.items():
            if queue:
                if lane <= Lane.SAVE and self._queues[Lane.SAVE] and self._shared.save_credit > 0:
                    return Lane.SAVE
                # Its own lower lanes are empty, so what waits there waits elsewhere.
                waiting = self._shared.waiting
                return None if any(waiting[other] for other in Lane if other < lane) else lane
        return None

    def head(self, lane: Lane) -> T:
        """The first item of `lane`, which must not be empty."""
        return self._queues[lane][0]

    def pop(self, lane: Lane) -> T:
        """Take the first item of `lane`."""
        self._shared.waiting[lane] -= 1
        return self._queues[lane].popleft()

    def remove(self, lane: Lane, item: T) -> None:
        """Take `item` out of `lane` wherever it stands; nothing if it is not there."""
        if item in self._queues[lane]:
            self._queues[lane].remove(item)
            self._shared.waiting[lane] -= 1

    def charge(self, lane: Lane, nbytes: int) -> None:
        """Account `nbytes` bytes that went on `lane`."""
        shared = self._shared
        if lane is Lane.SAVE:
            if any(shared.waiting[other] for other in Lane if other < Lane.SAVE):
                shared.save_credit -= nbytes * (1 - SAVE_FLOOR)
        elif lane < Lane.SAVE:
            most = SAVE_CREDIT_BYTES_MAX if shared.waiting[Lane.SAVE] else 0.0
            gained = shared.save_credit + nbytes * SAVE_FLOOR
            shared.save_credit = min(most, gained)

    def clear(self) -> None:
        """Forget everything that waits."""
        for lane, queue in self._queues.items():
            self._shared.waiting[lane] -= len(queue)
            queue.clear()

    def __iter__(self) -> Iterator[T]:
        for queue in self._queues.values():
            yield from queue

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

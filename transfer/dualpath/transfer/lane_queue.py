"""The order in which writes to one peer go: strict by lane, with a floor for saves.

Pure and not thread-safe; its owner locks. Guarantees: within a lane first in, first out; a lower
lane value goes first, except that SAVE gets at least `SAVE_FLOOR` of the bytes while it waits.
BACKGROUND has no floor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from dualpath.transfer.lane import SAVE_FLOOR, Lane

T = TypeVar("T")


class LaneQueue(Generic[T]):
    """Items waiting by lane."""

    def __init__(self, save_floor: float = SAVE_FLOOR) -> None:
        self._queues: dict[Lane, deque[T]] = {lane: deque() for lane in sorted(Lane)}
        self._save_floor = save_floor
        # Bytes that saves may send before the others, negative while they had more than that.
        self._save_credit = 0.0

    def push(self, lane: Lane, item: T) -> None:
        """Append `item` to `lane`."""
        self._queues[lane].append(item)

    def next_lane(self) -> Lane | None:
        """The lane whose head goes next; None if nothing waits."""
        for lane, queue in self._queues.items():
            if queue:
                if lane < Lane.SAVE and self._queues[Lane.SAVE] and self._save_credit > 0:
                    return Lane.SAVE
                return lane
        return None

    def head(self, lane: Lane) -> T:
        """The first item of `lane`, which must not be empty."""
        return self._queues[lane][0]

    def pop(self, lane: Lane) -> T:
        """Take the first item of `lane`."""
        return self._queues[lane].popleft()

    def remove(self, lane: Lane, item: T) -> None:
        """Take `item` out of `lane` wherever it stands; nothing if it is not there."""
        if item in self._queues[lane]:
            self._queues[lane].remove(item)

    def charge(self, lane: Lane, nbytes: int) -> None:
        """Account `nbytes` bytes that went on `lane`."""
        if lane is Lane.SAVE:
            if any(self._queues[other] for other in Lane if other < Lane.SAVE):
                self._save_credit -= nbytes * (1 - self._save_floor)
        elif lane < Lane.SAVE:
            if self._queues[Lane.SAVE]:
                self._save_credit += nbytes * self._save_floor
            else:
                self._save_credit = min(0.0, self._save_credit + nbytes * self._save_floor)

    def clear(self) -> None:
        """Forget everything that waits."""
        for queue in self._queues.values():
            queue.clear()

    def __iter__(self) -> Iterator[T]:
        for queue in self._queues.values():
            yield from queue

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

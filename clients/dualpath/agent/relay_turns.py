"""Whose chunk a relay reads next: turns, credit, and shares of the staging. No I/O.

Serves requesters by turns, one chunk each, and the chunks of one in the order of its grants. A
chunk starts only within the credit of the storage link and with a slot in the staging; no
requester holds so much of the staging that another could not get as much.
"""

from __future__ import annotations

from collections import deque

from dualpath.agent.relay_job import RelayChunk, Requester, Stage
from dualpath.agent.staging import Staging
from dualpath.transfer.credit import CreditConfig


class RelayTurns:
    """See the module docstring."""

    def __init__(self, staging: Staging, credit: CreditConfig) -> None:
        self._staging = staging
        self._credit = credit
        self._ring: deque[Requester] = deque()

    def add(self, requester: Requester) -> None:
        """It has something in its queue."""
        if not requester.in_turns:
            requester.in_turns = True
            self._ring.append(requester)

    def next(self, reading_bytes: int, window_bytes: int) -> RelayChunk | None:
        """Take the chunk that is read next, with its slot, or None if nothing may start now.

        `reading_bytes` are in flight on the storage link, `window_bytes` may be.
        """
        for _ in range(len(self._ring)):
            requester = self._ring[0]
            if not requester.queue:
                self._ring.popleft()
                requester.in_turns = False
                continue
            nbytes = requester.queue[0].target.nbytes
            if not self._credit.allows(window_bytes, reading_bytes, nbytes):
                return None
            if requester.staged_bytes and requester.staged_bytes + nbytes > self._share():
                self._ring.rotate(-1)
                continue
            slot = self._staging.take(nbytes)
            if slot is None:
                return None
            self._ring.rotate(-1)
            chunk = requester.queue.popleft()
            requester.waiting_bytes -= nbytes
            requester.staged_bytes += nbytes
            requester.reading_bytes += nbytes
            chunk.slot, chunk.stage = slot, Stage.READING
            return chunk
        return None

    def _share(self) -> int:
        return self._staging.capacity_bytes // (1 + max(1, len(self._ring)))

"""Whose chunk a relay reads next: turns, credit, and shares of the staging. No I/O.

Serves requesters by turns, one chunk each, and the chunks of one in the order of its grants. A
chunk starts only within the credit of the storage link and with a slot in the staging; no
requester holds so much of the staging that another could not get as much. What is to be kept for a
request is read into the holdings, if they have room.
"""

from __future__ import annotations

from collections import deque

from dualpath.agent.holdings import Holdings
from dualpath.agent.relay_job import RelayChunk, Requester, Stage
from dualpath.agent.staging import Staging
from dualpath.transfer.credit import CreditConfig
from dualpath.transfer.errors import Overloaded


class RelayTurns:
    """See the module docstring."""

    def __init__(self, staging: Staging, holdings: Holdings, credit: CreditConfig) -> None:
        self._staging = staging
        self._holdings = holdings
        self._credit = credit
        self._rings: dict[int, deque[Requester]] = {}  # by storage link
        self._holders: dict[Requester, None] = {}
        """Those that hold staging, or did when it was last looked at."""

    def add(self, requester: Requester) -> None:
        """It has something in its queue."""
        if not requester.in_turns:
            requester.in_turns = True
            self._rings.setdefault(requester.rail, deque()).append(requester)

    def next(
        self, reading_bytes: int, window_bytes: int, now: float, rail: int = 0
    ) -> RelayChunk | None:
        """Take the chunk that is read next, with its slot, or None if nothing may start now.

        `reading_bytes` are in flight on the storage link `rail`, `window_bytes` may be.
        """
        ring = self._rings.get(rail, deque())
        for _ in range(len(ring)):
            requester = ring[0]
            if not requester.queue:
                ring.popleft()
                requester.in_turns = False
                continue
            nbytes = requester.queue[0].target.nbytes
            if not self._credit.allows(window_bytes, reading_bytes, nbytes):
                return None
            if not self._retain(requester.queue[0], now):
                if requester.staged_bytes and requester.staged_bytes + nbytes > self._share(
                    requester
                ):
                    ring.rotate(-1)
                    continue
                slot = self._staging.take(nbytes)
                if slot is None:
                    return None
                requester.queue[0].slot = slot
                requester.staged_bytes += nbytes
                self._holders[requester] = None
            ring.rotate(-1)
            chunk = requester.queue.popleft()
            requester.waiting_bytes -= nbytes
            requester.reading_bytes += nbytes
            chunk.stage = Stage.READING
            return chunk
        return None

    def _retain(self, chunk: RelayChunk, now: float) -> bool:
        """Give a chunk that is to be kept a slot in the holdings, if it may have one."""
        request, name = chunk.grant.request, chunk.name
        if not request or name is None:
            return False
        holdings = self._holdings
        try:
            held = holdings.find(name)
            if held is not None:  # another reads it: the request needs no second one
                holdings.pin(held, request, now, chunk.grant.requester.sharer)
                return False
            held = holdings.fill(name, chunk.target.nbytes)
            if held is None:
                chunk.grant.request = ""  # nor would the next of its chunks find any
                holdings.events["retain_no_room"] += 1
                return False
            chunk.held, chunk.slot = held, held.slot
            holdings.pin(held, request, now, chunk.grant.requester.sharer)
        except Overloaded:
            holdings.events["retain_no_room"] += 1
        return chunk.held is not None

    def _share(self, requester: Requester) -> int:
        """Most bytes of staging that it may hold: none takes more than is left for all others,
        those included that have nothing queued and do not take what they were sent."""
        self._holders = {each: None for each in self._holders if each.staged_bytes}
        waiting = sum(map(len, self._rings.values()))
        idle = sum(not each.in_turns for each in self._holders)
        capacity = self._staging.capacity_bytes
        left = capacity - self._staging.used_bytes + requester.staged_bytes
        return min(capacity // (1 + max(1, waiting + idle)), left // 2)

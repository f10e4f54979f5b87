"""Whose held chunk a relay forwards next: turns and credit of what needs no storage read. No I/O.

Serves requesters by turns, one chunk each, beside what comes from storage and outside of its
credit. Bounded by bytes in flight on the compute link, of which no requester takes so much that
another could not take as much.
"""

from __future__ import annotations

from collections import Counter, deque

from dualpath.agent.relay_job import ReadRight, RelayChunk, Requester, Stage

SERVING_BYTES_MAX = 32 << 20
"""Most held bytes in flight to all requesters."""


class RelayServing:
    """See the module docstring."""

    def __init__(self) -> None:
        self._ring: deque[Requester] = deque()
        self._holders: Counter[Requester] = Counter()
        self._serving_bytes = 0

    def add(self, requester: Requester) -> None:
        """It has something in its `held_queue`."""
        if not requester.in_serving:
            requester.in_serving = True
            self._ring.append(requester)

    def next(self) -> RelayChunk | None:
        """Take the chunk that is forwarded next, or None if nothing may start now."""
        for _ in range(len(self._ring)):
            requester = self._ring[0]
            if not requester.held_queue:
                self._ring.popleft()
                requester.in_serving = False
                continue
            nbytes = requester.held_queue[0].target.nbytes
            if self._serving_bytes and self._serving_bytes + nbytes > SERVING_BYTES_MAX:
                return None
            self._ring.rotate(-1)
            if requester.held_queue[0].grant.right is ReadRight.ASKED:
                continue
            if requester.serving_bytes and requester.serving_bytes + nbytes > self._share(
                requester
            ):
                continue
            chunk = requester.held_queue.popleft()
            requester.serving_bytes += nbytes
            self._serving_bytes += nbytes
            self._holders[requester] += 1
            chunk.stage = Stage.FORWARDING
            return chunk
        return None

    def ended(self, chunk: RelayChunk) -> None:
        """A chunk that was taken has ended."""
        chunk.grant.requester.serving_bytes -= chunk.target.nbytes
        self._serving_bytes -= chunk.target.nbytes
        self._holders[chunk.grant.requester] -= 1
        if not self._holders[chunk.grant.requester]:
            del self._holders[chunk.grant.requester]

    def _share(self, requester: Requester) -> int:
        """Most bytes that it may have in flight: none takes more than is left for all others,
        those included that have nothing queued and do not take what they were sent."""
        idle = sum(not each.in_serving for each in self._holders)
        left = SERVING_BYTES_MAX - self._serving_bytes + requester.serving_bytes
        return min(SERVING_BYTES_MAX // (1 + len(self._ring) + idle), left // 2)

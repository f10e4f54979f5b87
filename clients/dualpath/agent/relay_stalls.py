"""Requesters of a relay that do not take what they asked for.

Owns the judgement only: a requester to whom chunks are being written, and from whom no
acknowledgement came and to whom no byte went for a while, is stalled. Slots that it holds are not
freed for that; whoever hangs up on it ends its writes, and they free them. Takes `now`; no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from dualpath.agent.relay_job import Requester


class RelayStalls:
    """See the module docstring. `sent_bytes()` says what has gone to each peer."""

    def __init__(self, stall_s: float, sent_bytes: Callable[[], Mapping[str, int]]) -> None:
        self._stall_s = stall_s
        self._sent_bytes = sent_bytes

    def stalled(self, requesters: Iterable[Requester], now: float) -> list[Requester]:
        """Those to hang up on; to be asked now and then."""
        found = []
        sent: Mapping[str, int] | None = None
        for requester in requesters:
            if not requester.forwarding:
                requester.moved_at = now
                continue
            if now - requester.moved_at < self._stall_s / 2:
                continue
            if sent is None:
                sent = self._sent_bytes()
            gone = sent.get(requester.peer, 0)
            if gone != requester.gone_bytes:
                requester.gone_bytes = gone
                requester.moved_at = now
            elif now - requester.moved_at >= self._stall_s:
                found.append(requester)
        return found

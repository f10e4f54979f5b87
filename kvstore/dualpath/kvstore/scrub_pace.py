"""How fast to scrub: a bounded rate that makes way for everybody else. Pure.

Credit grows at the configured rate, for a second at most. While others move more than the scrub
would, it pauses; but one part in PAUSED_SHARE of the rate remains, so that a store that is always
busy is scrubbed as well.
"""

from __future__ import annotations

CREDIT_S_MAX = 1.0
PAUSED_SHARE = 16


class ScrubPace:
    """`bytes_per_s` bounds what is read. Times in seconds."""

    def __init__(self, bytes_per_s: float, now: float) -> None:
        self._rate = bytes_per_s
        self._then = now
        self._others = -1
        self._credit = 0.0

    def budget(self, now: float, others_bytes: int) -> int:
        """How many bytes may be read now; 0: wait. `others_bytes` is what everybody else has moved
        to or from the medium since it was opened."""
        elapsed = max(0.0, now - self._then)
        moved = 0 if self._others < 0 else others_bytes - self._others
        self._then, self._others = now, others_bytes
        busy = moved > self._rate * elapsed
        self._credit += self._rate * elapsed / (PAUSED_SHARE if busy else 1)
        self._credit = min(self._credit, self._rate * CREDIT_S_MAX)
        return max(0, int(self._credit))

    def spend(self, nbytes: int) -> None:
        """So many were read, which may be more than the budget: blocks are read whole."""
        self._credit -= nbytes

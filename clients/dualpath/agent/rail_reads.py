"""What a relay reads over one storage link: how much waits and is under way, and how fast it goes.

Owns the counts and the rate; decides nothing. A node has one of these for each of its storage
links, so that a slow one holds up only what goes by it.
"""

from __future__ import annotations

from dualpath.transfer.rates import RateEstimate


class RailReads:
    """Bytes: `read_bytes` wait for the link or are in flight on it, `reading_bytes` of them are."""

    __slots__ = ("rate", "read_bytes", "reading_bytes")

    def __init__(self) -> None:
        self.read_bytes = 0
        self.reading_bytes = 0
        self.rate = RateEstimate()

    def over(self, nbytes: int) -> None:
        """So much is no longer in flight."""
        self.reading_bytes -= nbytes
        self.read_bytes -= nbytes

    def landed(self, nbytes: int, now: float) -> None:
        """So much has come, and is no longer in flight."""
        self.over(nbytes)
        self.rate.landed(nbytes, now)

"""What came by each path since the start: verified bytes, chunks and how long they took.

Paths are those of the configuration, so their number is bounded. Belongs to the loop.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from dualpath.kvstore.service.histogram import Histogram


class PathCounts:
    """Verified payload by path. `chunk_s` is from a chunk's grant to its verdict."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.chunks: Counter[str] = Counter()
        self.chunk_s: defaultdict[str, Histogram] = defaultdict(Histogram)

    def verified(self, path: str, nbytes: int, seconds: float) -> None:
        """A chunk is in place and intact, `seconds` after it was granted."""
        self.bytes[path] += nbytes
        self.chunks[path] += 1
        self.chunk_s[path].observe(seconds)

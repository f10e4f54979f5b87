"""What came by each path since the start: verified bytes, chunks and how long they took.

Paths are those of the configuration, so their number is bounded. Belongs to the loop.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from dualpath.kvstore.service.histogram import Histogram


class PathCounts:
    """Verified payload by path. `chunk_s` is from a chunk's grant to its verdict."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.chunks: Counter[str] = Counter()
        self.chunk_s: defaultdict[str, Histogram] = defaultdict(Histogram)

    def verified(self, path: str, nbytes: int, waits_s: Mapping[float, int]) -> None:
        """Chunks are in place and intact; how many of them so many seconds after their grant."""
        self.bytes[path] += nbytes
        for seconds, count in waits_s.items():
            self.chunks[path] += count
            self.chunk_s[path].observe(seconds, count)

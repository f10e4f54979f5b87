"""A histogram of durations with fixed buckets; one writer at a time, any reader."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)

Buckets = tuple[list[tuple[str, float]], float]
"""(upper bound as text, cumulative count) of each bucket, and the sum in seconds."""


class Histogram:
    """Counts by upper bound in seconds, and the sum of all observations."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float, count: int = 1) -> None:
        """Add `count` observations of the same duration."""
        self._counts[bisect.bisect_left(BOUNDS_S, seconds)] += count
        self._sum_s += seconds * count

    def snapshot(self) -> Buckets:
        """See Buckets."""
        buckets = []
        total = 0
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets, self._sum_s

    @staticmethod
    def merged(parts: Iterable[Histogram]) -> Histogram:
        """One histogram of all observations of several."""
        whole = Histogram()
        for part in parts:
            whole._counts = [a + b for a, b in zip(whole._counts, part._counts, strict=True)]
            whole._sum_s += part._sum_s
        return whole

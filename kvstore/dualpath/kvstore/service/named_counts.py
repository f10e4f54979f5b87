"""Counters by names that others choose, such as those of peers.

Bounds the labels of a metric: names beyond the limit count together, so that the sum stays right.
One writer at a time, any reader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

NAMES_MAX = 256
OTHER = "other"
"""What everything beyond the limit counts under."""


class NamedCounts:
    """The first NAMES_MAX names that are seen are kept apart."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, name: str, count: int) -> None:
        """Count; a name that is new when there are enough counts as OTHER."""
        if name not in self._counts and len(self._counts) >= NAMES_MAX:
            name = OTHER
        self._counts[name] += count

    def snapshot(self) -> Mapping[str, int]:
        """Counts by name."""
        return dict(self._counts)


def bounded(counts: Mapping[str, int]) -> Mapping[str, int]:
    """The same counts under at most NAMES_MAX names and OTHER."""
    if len(counts) <= NAMES_MAX:
        return counts
    result = NamedCounts()
    for name, count in counts.items():
        result.add(name, count)
    return result.snapshot()

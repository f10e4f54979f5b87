"""Whether the store works as it should and, if not, why: what readiness and metrics show.

Owns the list of present troubles, one sentence each. Whoever meets a trouble notes it, whoever
sees it gone clears it. A degraded store still serves: what it cannot do is a miss or a seal that
fails. Pure; needs the caller's lock.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


class Trouble(enum.Enum):
    """What is wrong. The values are labels of metrics."""

    DISK_FULL = "disk_full"
    """The file system has no space: the store keeps within what it has, and tries again."""
    INDEX = "index"
    """The index refuses transactions: nothing becomes durable, what is stored is served."""
    SEGMENT = "segment"
    """Segments that kept failing are out of use, with their blocks, until a probe succeeds."""
    WRITE_BACK = "write_back"
    """Blocks that were sealed without `durable` were lost before they reached the disk."""
    ROT = "rot"
    """Blocks on the medium did not have their checksums any more."""
    RECOVERY = "recovery"
    """Opening found something damaged or gone, and went on with what is left."""


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """A snapshot: a sentence for each present trouble; none is healthy."""

    troubles: Mapping[Trouble, str]

    @property
    def degraded(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.troubles)

    @property
    def reason(self) -> str:
        """All of it in one line; "" if healthy."""
        return "; ".join(f"{trouble.value}: {text}" for trouble, text in self.troubles.items())


class HealthBoard:
    """The present troubles. Those with an end (`until`, seconds of the store's clock) go by
    themselves, so that a single bad block does not mark the store for ever."""

    def __init__(self) -> None:
        self._troubles: dict[Trouble, tuple[str, float]] = {}

    def note(self, trouble: Trouble, text: str, until: float = float("inf")) -> None:
        """Add or replace."""
        self._troubles[trouble] = (text, until)

    def clear(self, trouble: Trouble) -> None:
        """It is gone. Idempotent."""
        self._troubles.pop(trouble, None)

    def snapshot(self, now: float) -> StoreHealth:
        """The troubles that have not ended."""
        for trouble in [t for t, (_, until) in self._troubles.items() if until <= now]:
            del self._troubles[trouble]
        found = {t: self._troubles[t][0] for t in Trouble if t in self._troubles}
        return StoreHealth(MappingProxyType(found))

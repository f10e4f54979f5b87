"""Which segments are out of use because they kept failing: a circuit breaker for each.

A segment that fails FAILURES_MAX times within WINDOW_S goes out of use. After a pause it is tried
again; if it fails then, the pause doubles, up to PAUSE_S_MAX. Decides only; the caller acts on it.
Pure; needs the caller's lock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FAILURES_MAX = 3
WINDOW_S = 60.0
PAUSE_S = 30.0
PAUSE_S_MAX = 3600.0


@dataclass(slots=True)
class _Segment:
    failures: list[float] = field(default_factory=list)
    pause_s: float = PAUSE_S
    out_until: float | None = None
    on_trial: bool = False


class SegmentBreaker:
    """See the module docstring. Only segments that have ever failed cost anything."""

    def __init__(self) -> None:
        self._segments: dict[int, _Segment] = {}

    def failed(self, segment: int, now: float) -> bool:
        """A transfer of the segment has failed. True if it goes out of use now."""
        found = self._segments.setdefault(segment, _Segment())
        if found.out_until is not None:
            return False
        found.failures = [at for at in found.failures if at > now - WINDOW_S] + [now]
        if len(found.failures) < FAILURES_MAX and not found.on_trial:
            return False
        if found.on_trial:
            found.pause_s = min(2 * found.pause_s, PAUSE_S_MAX)
        found.out_until = now + found.pause_s
        found.on_trial = False
        found.failures.clear()
        return True

    def due(self, now: float) -> list[int]:
        """Segments whose pause is over: they are on trial from now on."""
        due = [
            n for n, s in self._segments.items() if s.out_until is not None and s.out_until <= now
        ]
        for segment in due:
            self._segments[segment].out_until = None
            self._segments[segment].on_trial = True
        return due

    def forget(self, segment: int) -> None:
        """The segment is gone."""
        self._segments.pop(segment, None)

    @property
    def out(self) -> tuple[int, ...]:
        """Segments out of use, in order."""
        return tuple(sorted(n for n, s in self._segments.items() if s.out_until is not None))

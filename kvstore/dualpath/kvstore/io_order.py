"""Whose bytes move on the SSD next: loads before saves before background. Pure; `now` in seconds.

Loads never wait here: what bounds them is the device's depth and the read buffers. Where loads keep
the device busy, a save may move only what the *floor* has earned it, a share of what loads have
moved, and background work nothing at all. No save waits longer than `SAVE_WAIT_S_MAX`, so loads
that stand still, or never end, hold saves up but do not stop them.

A device counts as busy while so many bytes of loads are under way that another transfer would
queue behind them.
"""

from __future__ import annotations

import enum

SAVE_FLOOR = 0.05
"""Share of all bytes that saves may move while loads keep the device busy."""
BUSY_BYTES = 4 << 20
SAVE_WAIT_S_MAX = 0.5
_EARNED_BYTES_MAX = 16 << 20
"""Most that saves earn while they have nothing to move."""
_RATE_WEIGHT = 0.2
_RETRY_S_MIN, _RETRY_S_MAX = 0.005, 1.0


class IoClass(enum.Enum):
    """What a transfer is for, the most urgent first."""

    LOAD = "load"
    SAVE = "save"
    BACKGROUND = "background"


class IoOrder:
    """See the module docstring."""

    def __init__(self, floor: float = SAVE_FLOOR) -> None:
        assert 0 < floor < 1, floor
        # Of what is moved while loads are there, they move the rest.
        self._earned_per_byte = floor / (1 - floor)
        self._earned_bytes = 0.0
        self._load_bytes = 0
        self._save_bytes = 0
        self._saves_waiting = 0
        self._rate_bytes_per_s = 0.0
        self._rated_at: float | None = None
        self._moved_bytes = 0

    def __repr__(self) -> str:
        return (
            f"<IoOrder loads {self._load_bytes}, saves {self._save_bytes} bytes under way, "
            f"{self._saves_waiting} saves wait>"
        )

    @property
    def is_busy(self) -> bool:
        """Whether loads alone keep the device busy."""
        return self._load_bytes >= BUSY_BYTES

    def begin(self, kind: IoClass, nbytes: int) -> None:
        """A transfer starts."""
        if kind is IoClass.LOAD:
            self._load_bytes += nbytes
        elif kind is IoClass.SAVE:
            self._save_bytes += nbytes
            if self.is_busy:
                self._earned_bytes -= nbytes

    def end(self, kind: IoClass, nbytes: int, now: float) -> None:
        """A transfer, or a part of one, is over."""
        if kind is IoClass.LOAD:
            self._load_bytes -= nbytes
            assert self._load_bytes >= 0
            earned = self._earned_bytes + nbytes * self._earned_per_byte
            self._earned_bytes = min(earned, _EARNED_BYTES_MAX)
            self._rate(nbytes, now)
        elif kind is IoClass.SAVE:
            self._save_bytes -= nbytes
            assert self._save_bytes >= 0

    def wait_begin(self, kind: IoClass) -> None:
        """Somebody asks `may_begin` until he may."""
        self._saves_waiting += kind is IoClass.SAVE

    def wait_end(self, kind: IoClass) -> None:
        """He does not any longer."""
        self._saves_waiting -= kind is IoClass.SAVE

    def may_begin(self, kind: IoClass, waited_s: float) -> bool:
        """Whether a transfer that has waited so long may start now."""
        if kind is IoClass.LOAD:
            return True
        if kind is IoClass.SAVE:
            # In debt after a large transfer: it is paid off before the next one.
            return not self.is_busy or self._earned_bytes >= 0 or waited_s >= SAVE_WAIT_S_MAX
        return not (self._load_bytes or self._save_bytes or self._saves_waiting)

    def retry_after_s(self) -> float:
        """When to ask again for a load that found no room: as long as those under way may take."""
        if not self._rate_bytes_per_s:
            return 0.1
        return min(max(self._load_bytes / self._rate_bytes_per_s, _RETRY_S_MIN), _RETRY_S_MAX)

    def _rate(self, nbytes: int, now: float) -> None:
        self._moved_bytes += nbytes
        if self._rated_at is None:
            self._rated_at, self._moved_bytes = now, 0
        elif now - self._rated_at >= 0.1:
            rate = self._moved_bytes / (now - self._rated_at)
            known = self._rate_bytes_per_s or rate
            self._rate_bytes_per_s = known + _RATE_WEIGHT * (rate - known)
            self._rated_at, self._moved_bytes = now, 0

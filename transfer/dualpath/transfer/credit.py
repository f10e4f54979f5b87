"""How many bytes may be in flight on a path: the credit window.

Owns the arithmetic only. The window follows the path's rate: long enough to keep the path busy
between two grants, short enough that little is stuck on it when it turns slow or when a load
ends. A window never forbids the first chunks: two of them may always be in flight, so that a
path is not idle between them.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
LARGE_WINDOW_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditConfig:
    """Bounds of every path's window; bytes, seconds, counts."""

    window_s: float = 0.040
    window_bytes_min: int = MIB // 2
    """Two chunks of 256 KiB. Where many loads share a slow link, what each has in flight there is
    what the last of them waits for while other links idle."""
    window_bytes_max: int = 128 * MIB
    window_bytes_start: int = 2 * MIB
    """Of a path of unknown rate beside others: what is stuck on a slow one, they cannot take."""
    window_bytes_alone: int = 64 * MIB
    """Of the only path, while its rate is unknown: there is nothing to weigh."""
    chunks_max: int = 4096
    """Most chunks in flight on a path, and in one grant."""

    def __post_init__(self) -> None:
        assert 0 < self.window_bytes_min <= self.window_bytes_start <= self.window_bytes_max
        assert self.window_bytes_start <= self.window_bytes_alone <= self.window_bytes_max
        assert self.window_s > 0
        assert self.chunks_max >= 2

    def window_bytes(self, rate_bytes_per_s: float, *, alone: bool = False) -> int:
        """Window of a path of this rate (0: unknown), `alone` if no other is up."""
        if rate_bytes_per_s <= 0:
            return self.window_bytes_alone if alone else self.window_bytes_start
        wanted = int(min(rate_bytes_per_s * self.window_s, self.window_bytes_max))
        return max(self.window_bytes_min, wanted)

    def batch_bytes(self, window_bytes: int) -> int:
        """What should be granted at once: a quarter of the window, half of a large one, where
        what a message costs is a part of the time that its bytes take."""
        return window_bytes // (2 if window_bytes >= LARGE_WINDOW_BYTES else 4)

    def allows(self, window_bytes: int, inflight_bytes: int, nbytes: int) -> bool:
        """Whether a chunk of `nbytes` may be granted beside `inflight_bytes`."""
        return inflight_bytes + nbytes <= max(window_bytes, 2 * nbytes)

"""Pacing a link in user space: a token bucket shared by all connections of a transport.

`TokenBucket` is pure: it is told the time and answers with how long to wait. `Pacer` adds a
lock, the clock and an interruptible wait. A rate of 0 means no limit. Reservations are granted
in the order of asking, so connections share the link by pieces of equal size.
"""

from __future__ import annotations

import math
import threading
import time

from dualpath.transfer.errors import InvalidRequest

BURST_BYTES = 128 << 10
PIECE_BYTES = 64 << 10
PIECE_BYTES_MAX = 1 << 20
PIECE_S = 0.001
"""Least duration of a piece: fast links take larger pieces, since waits are not finer."""


CATCH_UP_S = 0.02
"""What a busy link may make up for, where its threads came late."""


class TokenBucket:
    """Lets `rate_bytes_per_s` pass on average and `burst_bytes` at once.

    A link in use makes up for up to CATCH_UP_S in which a busy machine did not run its threads;
    one that was idle for longer starts with the burst only.
    """

    def __init__(self, rate_bytes_per_s: float, burst_bytes: float) -> None:
        if not math.isfinite(rate_bytes_per_s) or rate_bytes_per_s <= 0:
            raise InvalidRequest(f"a rate is positive, in bytes per second: {rate_bytes_per_s}")
        if burst_bytes <= 0:
            raise InvalidRequest(f"a burst is positive, in bytes: {burst_bytes}")
        self._rate = rate_bytes_per_s
        self._burst = burst_bytes
        self._level = burst_bytes
        self._updated = -math.inf
        self._due = -math.inf  # when the last reservation may go

    def reserve(self, nbytes: int, now: float) -> float:
        """Take `nbytes` bytes and return after how many seconds they may go."""
        self._refill(now)
        self._level -= nbytes
        wait_s = max(0.0, -self._level / self._rate)
        self._due = now + wait_s
        return wait_s

    def give_back(self, nbytes: int, now: float) -> None:
        """Return a part of a reservation that was not used."""
        self._refill(now)
        self._level = min(self._most(now), self._level + nbytes)

    def _refill(self, now: float) -> None:
        if now > self._updated:
            if self._updated > -math.inf:
                gained = (now - self._updated) * self._rate
                self._level = min(self._most(now), self._level + gained)
            self._updated = now

    def _most(self, now: float) -> float:
        in_use = now - self._due <= CATCH_UP_S
        return self._burst + (CATCH_UP_S * self._rate if in_use else 0.0)


class Pacer:
    """A thread-safe bucket on the monotonic clock."""

    def __init__(self, rate_bytes_per_s: float) -> None:
        if rate_bytes_per_s < 0 or not math.isfinite(rate_bytes_per_s):
            raise InvalidRequest(
                f"a link's limit is 0 (none) or positive bytes per second: {rate_bytes_per_s}"
            )
        self.limited = rate_bytes_per_s > 0
        self.piece_bytes = PIECE_BYTES_MAX
        self._lock = threading.Lock()
        self._bucket: TokenBucket | None = None
        if self.limited:
            wanted = int(rate_bytes_per_s * PIECE_S)
            self.piece_bytes = min(PIECE_BYTES_MAX, max(PIECE_BYTES, wanted))
            burst = max(BURST_BYTES, 2 * self.piece_bytes)
            self._bucket = TokenBucket(rate_bytes_per_s, burst)

    def reserve(self, nbytes: int) -> float:
        """Take `nbytes` bytes; return the monotonic time from which they may go (0: at once)."""
        if self._bucket is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            wait_s = self._bucket.reserve(nbytes, now)
            return now + wait_s if wait_s > 0 else 0.0

    def give_back(self, nbytes: int) -> None:
        """Return what a reservation did not use."""
        if self._bucket is not None and nbytes > 0:
            with self._lock:
                self._bucket.give_back(nbytes, time.monotonic())

    def pass_through(self, nbytes: int, stop: threading.Event) -> bool:
        """Reserve and wait until the bytes may go; False if `stop` was set before."""
        ready_at = self.reserve(nbytes)
        while ready_at:
            wait_s = ready_at - time.monotonic()
            if wait_s <= 0:
                break
            if stop.wait(wait_s):
                return False
        return True

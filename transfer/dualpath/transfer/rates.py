"""Rate of a path or link, estimated from what it just did.

Owns one estimate: bytes that landed, divided by the time in which there was something to carry,
both discounted exponentially over busy time. So idle time neither lowers the estimate nor ages
it, and after a change of the true rate the estimate is within a few per cent after a second of
work. It says nothing about latency, and nothing (0) before enough was seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RateConfig:
    """`memory_s`: busy seconds after which an observation weighs 1/e; `known_after_s`: busy
    seconds before there is an estimate, `settled_after_s`: before others may count on it."""

    memory_s: float = 0.25
    known_after_s: float = 0.005
    settled_after_s: float = 0.125

    def __post_init__(self) -> None:
        assert 0 < self.known_after_s < self.settled_after_s < self.memory_s


class RateEstimate:
    """Call `begin` when work starts, `landed` for each arrival, `end` when no work is left."""

    __slots__ = ("_busy_since", "_bytes", "_config", "_last_nbytes", "_time_s")

    def __init__(self, config: RateConfig = RateConfig()) -> None:
        self._config = config
        self._bytes = 0.0
        self._time_s = 0.0
        self._busy_since: float | None = None
        self._last_nbytes = 0

    @property
    def busy(self) -> bool:
        """Whether there is something to carry."""
        return self._busy_since is not None

    @property
    def settled(self) -> bool:
        """Whether so much was seen that more is built on it than the next chunk."""
        return self._time_s >= self._config.settled_after_s and self._bytes > 0

    def begin(self, now: float) -> None:
        """There is work from now on; no effect while busy."""
        if self._busy_since is None:
            self._busy_since = now

    def landed(self, nbytes: int, now: float, largest_bytes: int = 0) -> None:
        """`nbytes` have arrived, in pieces of at most `largest_bytes` (0: in one); counts only
        while busy."""
        if self._busy_since is None:
            return
        self._advance(now)
        self._bytes += nbytes
        self._last_nbytes = largest_bytes or nbytes

    def waited(self, now: float) -> None:
        """Count the time since the last arrival, though nothing came; only while busy."""
        if self._busy_since is not None:
            self._advance(now)

    def end(self) -> None:
        """No work is left. Time since the last arrival is not counted: nothing was due."""
        self._busy_since = None

    def bytes_per_s(self, now: float) -> float:
        """The estimate, 0 while unknown. Sinks while busy and the next arrival is overdue."""
        if self._time_s < self._config.known_after_s or self._bytes <= 0:
            return 0.0
        rate = self._bytes / self._time_s
        if self._busy_since is None:
            return rate
        waited_s = now - self._busy_since
        if waited_s * rate <= self._last_nbytes:
            return rate
        # Were the next chunk to land right now, the estimate would be this.
        kept = math.exp(-waited_s / self._config.memory_s)
        return (self._bytes * kept + self._last_nbytes) / (self._time_s * kept + waited_s)

    def _advance(self, now: float) -> None:
        assert self._busy_since is not None
        elapsed_s = max(0.0, now - self._busy_since)
        kept = math.exp(-elapsed_s / self._config.memory_s)
        self._bytes *= kept
        self._time_s = self._time_s * kept + elapsed_s
        self._busy_since = max(now, self._busy_since)

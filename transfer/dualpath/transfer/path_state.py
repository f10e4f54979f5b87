"""One path as the dispatcher sees it: condition, credit in use, rate, progress.

Owns what belongs to a single path: whether it may be used now, how long to leave it alone after
a loss, how many bytes may be in flight, and since when nothing has moved. Knows nothing of
loads but the order numbers of those that could use it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

from dualpath.transfer.dispatch_config import DispatchConfig
from dualpath.transfer.placement import PathKind
from dualpath.transfer.rates import RateEstimate


class PathCondition(enum.Enum):
    """TRIAL: the backoff is over, but nothing has been verified since. A copy of a chunk that goes
    by another path is fetched to try it; while there is no other, one chunk at a time."""

    UP = "up"
    TRIAL = "trial"
    BACKOFF = "backoff"
    DOWN = "down"


STALL_CHUNKS = 4
"""A path may be silent for as long as this many chunks take at its rate."""
OVERTAKEN_MAX = 3
"""Times that work may be taken back from a path before anything landed again."""


class PathState:
    """Condition and credit of one path."""

    __slots__ = (
        "_config",
        "_losses",
        "_overtaken",
        "_overtaken_at_s",
        "_pauses",
        "_report_at_s",
        "_report_bytes",
        "_trials",
        "condition",
        "doubted",
        "estimate",
        "inflight_bytes",
        "inflight_chunks",
        "kind",
        "largest_bytes",
        "limit_bytes_per_s",
        "name",
        "paused_until_s",
        "progress_at_s",
        "queue",
        "rate",
        "retry_at_s",
        "spare",
        "tried_at_s",
        "window",
    )

    def __init__(self, config: DispatchConfig, name: str, kind: PathKind, limit: float) -> None:
        self._config = config
        self.name = name
        self.kind = kind
        self.limit_bytes_per_s = limit
        self.condition = PathCondition.UP
        self.estimate = RateEstimate(config.rate)
        self.queue: list[int] = []
        """Order numbers of the loads with waiting chunks for this path, ascending."""
        self.inflight_bytes = 0
        self.inflight_chunks = 0
        self.largest_bytes = 0
        self.progress_at_s = 0.0
        self.retry_at_s = 0.0
        self.spare = False
        self.doubted = False
        """It stalled, and nothing was verified since: a new connection does not prove it."""
        self.tried_at_s = math.inf
        """Since when a copy is being fetched; inf: none is."""
        self.paused_until_s = -math.inf
        self.rate = 0.0
        self.window = 0
        self._losses = 0
        self._overtaken = 0
        self._overtaken_at_s = -math.inf
        self._pauses = 0
        self._trials = 0
        self._report_bytes = 0
        self._report_at_s = -math.inf

    @property
    def up(self) -> bool:
        """Whether loads may be placed on it, if there is no better one: see `PathTable.serves`."""
        return self.condition in (PathCondition.UP, PathCondition.TRIAL)

    def usable(self, now: float) -> bool:
        """Whether it may be granted chunks now."""
        if self.condition is PathCondition.TRIAL and self.inflight_chunks:
            return False
        return self.up and now >= self.paused_until_s

    def dependable(self, now: float) -> bool:
        """Whether chunks may be left to it: proven, and not asking for a rest."""
        return self.condition is PathCondition.UP and now >= self.paused_until_s

    def rate_bytes_per_s(self, now: float) -> float:
        """Measured, never above the configured limit; the limit until measured; 0: unknown."""
        measured = self.estimate.bytes_per_s(now)
        if self.limit_bytes_per_s <= 0:
            return measured
        return min(measured, self.limit_bytes_per_s) if measured else self.limit_bytes_per_s

    def look(self, now: float, *, alone: bool) -> None:
        """Fix `rate` and `window` for the decisions of this moment; `alone`: no other is up."""
        self.rate = self.rate_bytes_per_s(now)
        if not self.rate and self._overtaken:
            # It did not land a single chunk in the time that it was given.
            self.rate = self.largest_bytes / self._config.overtake_s
        self.window = self._config.credit.window_bytes(self.rate, alone=alone)

    def drained_in_s(self) -> float:
        """Seconds until what is in flight has landed, as of `look`; a guess while unknown."""
        rate = self.rate or self.window / self._config.credit.window_s
        return self.inflight_bytes / rate

    def may_take(self, nbytes: int, batch_bytes: int) -> bool:
        """Whether credit allows a chunk as the first of a batch of at least `batch_bytes`."""
        credit = self._config.credit
        if self.condition is PathCondition.TRIAL and self.inflight_chunks:
            return False
        if self.inflight_chunks >= credit.chunks_max:
            return False
        return credit.allows(self.window, self.inflight_bytes, nbytes) and (
            self.inflight_bytes + batch_bytes <= max(self.window, 2 * nbytes)
        )

    def may_take_run(self, nbytes: int) -> int:
        """How many chunks of `nbytes` credit allows now, given that it allows one."""
        if self.condition is PathCondition.TRIAL:
            return 1
        credit = self._config.credit
        room = max(self.window, 2 * nbytes) - self.inflight_bytes
        return max(1, min(room // nbytes, credit.chunks_max - self.inflight_chunks))

    def take(self, nbytes: int, now: float, count: int = 1) -> None:
        """`count` chunks of `nbytes` each go in flight."""
        if not self.inflight_chunks:
            self.progress_at_s = now
            self.estimate.begin(now)
        self.inflight_chunks += count
        self.inflight_bytes += count * nbytes
        self.largest_bytes = max(self.largest_bytes, nbytes)

    def land(self, sizes: Sequence[int], now: float) -> None:
        """Chunks in flight were verified."""
        nbytes = sum(sizes)
        self.estimate.landed(nbytes, now, max(sizes))
        self.progress_at_s = now
        self._losses = 0
        self._overtaken = 0
        self._pauses = 0
        self.prove()
        self.release(nbytes, len(sizes))

    def prove(self) -> None:
        """Something has come by it, and was right."""
        self.doubted = False
        self.tried_at_s = math.inf
        self._trials = 0
        if self.condition is PathCondition.TRIAL:
            self.condition = PathCondition.UP

    def release(self, nbytes: int, count: int = 1) -> None:
        """`count` chunks, `nbytes` in all, are no longer in flight, whatever became of them."""
        self.inflight_chunks -= count
        self.inflight_bytes -= nbytes
        assert self.inflight_chunks >= 0
        assert self.inflight_bytes >= 0
        if not self.inflight_chunks:
            self.estimate.end()

    def lose(self, now: float, *, stalled: bool = False) -> None:
        """Leave it alone for a backoff that doubles until something lands again. If all that it
        had was a copy, no load has waited for it, and it is tried again sooner."""
        self.doubted = self.doubted or stalled
        copied, self.tried_at_s = self.tried_at_s < math.inf, math.inf
        if not self.up:
            return  # told twice, or set down on purpose
        config = self._config
        if copied and not self.inflight_chunks:
            wait_s = min(config.backoff_s * 2.0 ** min(self._trials, 32), config.trial_pause_s_max)
            self._trials += 1
        else:
            wait_s = min(config.backoff_s * 2.0 ** min(self._losses, 32), config.backoff_s_max)
            self._losses += 1
        self._overtaken = 0
        self.condition = PathCondition.BACKOFF
        self.retry_at_s = now + wait_s

    def pause(self, now: float) -> None:
        """It is overloaded: no grants for a while; it stays up."""
        wait_s = min(self._config.pause_s * 2.0 ** min(self._pauses, 32), self._config.pause_s_max)
        if now >= self.paused_until_s:
            self._pauses += 1
            self.paused_until_s = now + wait_s

    def overtaken(self, now: float) -> None:
        """Work was taken back because it was slow: let the estimate know the time that took."""
        self.estimate.waited(now)
        if now > self._overtaken_at_s:
            self._overtaken += 1
            self._overtaken_at_s = now

    def drains_after(self, wait_s: float, now: float) -> bool:
        """Whether what is in flight is expected to take longer than `wait_s` from now.

        A path on which nothing ever landed is given that time before anything is expected.
        """
        if not self.estimate.bytes_per_s(now) and now - self.progress_at_s < wait_s:
            return False
        rate = self.rate_while_busy(now)
        return bool(rate) and self.inflight_bytes > wait_s * rate

    def rate_while_busy(self, now: float) -> float:
        """The estimate; while nothing ever landed, at most a chunk in the time waited so far."""
        measured = self.estimate.bytes_per_s(now)
        waited_s = now - self.progress_at_s
        return measured or (self.largest_bytes / waited_s if waited_s > 0 else 0.0)

    def report(self, queue_bytes: int, now: float) -> None:
        """What waits there for others."""
        self._report_bytes, self._report_at_s = queue_bytes, now

    def reported_bytes(self, now: float) -> int:
        """The last report, 0 if it is too old to mean anything."""
        fresh = now - self._report_at_s <= self._config.report_ttl_s
        return self._report_bytes if fresh else 0

    def stalls_at_s(self) -> float:
        """When it will have stalled unless something moves; inf if nothing is in flight."""
        if self.up and self._overtaken >= OVERTAKEN_MAX:
            return -math.inf
        since_s = min(self.progress_at_s if self.inflight_chunks else math.inf, self.tried_at_s)
        return since_s + self.patience_s() if since_s < math.inf else math.inf

    def patience_s(self) -> float:
        """How long it may be silent."""
        rate = self.rate_bytes_per_s(self.progress_at_s)
        patience_s = STALL_CHUNKS * self.largest_bytes / rate if rate else 0.0
        return min(max(self._config.stall_s, patience_s), self._config.stall_s_max)

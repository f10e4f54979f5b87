"""Turns in an event loop: while several principals call, each is let in at the same rate at most.

Owns a queue and a bucket for each principal. gRPC hands calls to the loop in the order of their
arrival, so a flood would delay everybody by all that it has sent. Calls over the rate wait here,
where they cost nothing, and the flood goes on only as fast as they leave. The rate follows the lag
of the loop: it falls while the loop is late, and rises while it has time. Who stays below it, or is
alone, waits for nothing. Queues are bounded by the calls that may be outstanding. For one event
loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

TICK_S = 0.005
RECENT_S = 10.0
"""A principal that called within this time counts as there."""
LAG_S_MAX = 0.0015
"""A loop whose timers are later than this, on the average, has too much to do."""
BUSY_MAX = 0.7
"""Share of the time that the loop's thread may run before it counts as having too much to do."""
RATE_MIN = 20.0
RATE_MAX = 50_000.0
"""Calls a second of one principal."""
_BURST_S = 0.02
_SMOOTHING = 0.2
_FALL, _RISE = 0.9, 1.02
"""By what the rate changes at each tick."""
_PRINCIPALS_MAX = 1024


@dataclass(slots=True)
class _Bucket:
    filled_at: float
    left: float = 1.0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)

    def take(self, now: float, rate: float) -> bool:
        """Whether one more call may pass now."""
        most = max(1.0, rate * _BURST_S)
        self.left = min(most, self.left + (now - self.filled_at) * rate)
        self.filled_at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class FairTurns:
    """See the module docstring."""

    def __init__(self) -> None:
        # The one that called last is at the end.
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._rate = RATE_MAX
        self._lag_s = 0.0
        self._busy = 0.0
        self._ran_s = 0.0
        self._ticked_at = 0.0
        self._due_at = 0.0
        self._ticking = False

    @property
    def rate(self) -> float:
        """Calls a second that one principal may make while others call, too."""
        return self._rate

    async def turn(self, principal: str) -> None:
        """Return when it is this principal's turn."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        bucket = self._buckets.get(principal)
        if bucket is None:
            bucket = self._buckets[principal] = _Bucket(now)
        self._buckets.move_to_end(principal)
        if self._forget_old(now) < 2:
            return
        if not self._ticking:
            self._ticking = True
            self._lag_s = self._busy = 0.0
            self._ran_s, self._ticked_at = time.thread_time(), now
            self._due_at = now + TICK_S
            loop.call_at(self._due_at, self._tick)
        if not bucket.waiting and bucket.take(now, self._rate):
            return
        waiting: asyncio.Future[None] = loop.create_future()
        bucket.waiting.append(waiting)
        await waiting

    def _forget_old(self, now: float) -> int:
        """How many principals are there; those that have not called of late are forgotten."""
        buckets = self._buckets
        while len(buckets) > 1:
            name, bucket = next(iter(buckets.items()))
            old = bucket.filled_at < now - RECENT_S or len(buckets) > _PRINCIPALS_MAX
            if bucket.waiting or not old:
                break
            del buckets[name]
        return len(buckets)

    def _tick(self) -> None:
        """Measure the loop, set the rate, and let in whose time has come."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._lag_s += (now - self._due_at - self._lag_s) * _SMOOTHING
        ran_s, self._ran_s = self._ran_s, time.thread_time()
        took_s, self._ticked_at = self._ticked_at, now
        busy = (self._ran_s - ran_s) / max(1e-6, now - took_s)
        self._busy += (busy - self._busy) * _SMOOTHING
        change = _FALL if self._lag_s > LAG_S_MAX or self._busy > BUSY_MAX else _RISE
        self._rate = min(RATE_MAX, max(RATE_MIN, self._rate * change))
        for bucket in self._buckets.values():
            while bucket.waiting and bucket.take(now, self._rate):
                waiting = bucket.waiting.popleft()
                if waiting.done():  # its call was cancelled
                    bucket.left += 1
                else:
                    waiting.set_result(None)
        self._ticking = self._forget_old(now) > 1
        if self._ticking:
            self._due_at = now + TICK_S
            loop.call_at(self._due_at, self._tick)
        else:
            self._let_all_in()

    def _let_all_in(self) -> None:
        for bucket in self._buckets.values():
            for waiting in bucket.waiting:
                if not waiting.done():
                    waiting.set_result(None)
            bucket.waiting.clear()

"""What each principal uses, and where it must stop so that others get their share.

Owns the counters of each principal and namespace, a bucket of look-ups a second, and the refusal:
Overloaded with reason `quota` and a time to retry. What is held elsewhere (reservations, queued
bytes) is told by gauges that are asked when a limit is checked. Thread-safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from dualpath.kvstore.service.access_rules import Limits
from dualpath.transfer.errors import Overloaded

PRINCIPALS_MAX = 4096
SHOWN_MAX = 256
RETRY_S = 0.1
_BURST_S = 1.0
"""So many seconds' worth of look-ups may come at once."""

_K = TypeVar("_K", str, bytes)


@dataclass(slots=True)
class Usage:
    """One principal or namespace: counters since it was first seen, and calls under way."""

    calls: int = 0
    calls_active: int = 0
    lookups: int = 0
    hit_blocks: int = 0
    missed_blocks: int = 0
    sealed_blocks: int = 0
    refusals: int = 0
    leases: int = 0
    streams: int = 0
    reserving: int = 0
    reserving_bytes: int = 0
    lookups_left: float = field(default=0.0, repr=False)
    filled_at: float = field(default=float("-inf"), repr=False)

    @property
    def idle(self) -> bool:
        """Whether it may be forgotten."""
        return not (self.calls_active or self.leases or self.streams)


class Quotas:
    """See the module docstring. `limits_of` gives a principal's limits; `clock` seconds."""

    def __init__(self, limits_of: Callable[[str], Limits], clock: Callable[[], float]) -> None:
        self._limits_of = limits_of
        self._clock = clock
        self._lock = threading.Lock()
        self._principals: OrderedDict[str, Usage] = OrderedDict()
        self._namespaces: OrderedDict[bytes, Usage] = OrderedDict()
        self.refusals = 0

    def limits(self, principal: str) -> Limits:
        """What holds for it now."""
        return self._limits_of(principal)

    def usage(self, principal: str) -> Usage:
        """The counters of a principal."""
        with self._lock:
            return self._find(self._principals, principal)

    def snapshot(self) -> tuple[dict[str, Usage], dict[bytes, Usage]]:
        """Principals and namespaces with their counters, the most recently seen, bounded."""
        with self._lock:
            return (
                dict(list(self._principals.items())[-SHOWN_MAX:]),
                dict(list(self._namespaces.items())[-SHOWN_MAX:]),
            )

    @contextmanager
    def call(self, principal: str) -> Iterator[None]:
        """Around a call. Raises Overloaded over `calls`."""
        usage = self.usage(principal)
        self.check(principal, "calls", usage.calls_active, 1, "outstanding calls")
        with self._lock:
            usage.calls += 1
            usage.calls_active += 1
        try:
            yield
        finally:
            with self._lock:
                usage.calls_active -= 1

    @contextmanager
    def stream(self, principal: str) -> Iterator[None]:
        """Around a Read, Write or Events stream. Raises Overloaded over `streams`."""
        usage = self.usage(principal)
        self.check(principal, "streams", usage.streams, 1, "streams")
        with self._lock:
            usage.streams += 1
        try:
            yield
        finally:
            with self._lock:
                usage.streams -= 1

    def lookup(self, principal: str) -> None:
        """Before a look-up. Raises Overloaded over `lookups_per_s`."""
        rate = self._limits_of(principal).lookups_per_s
        if not rate:
            return
        usage, now = self.usage(principal), self._clock()
        with self._lock:
            most = max(1.0, rate * _BURST_S)
            usage.lookups_left = min(most, usage.lookups_left + (now - usage.filled_at) * rate)
            usage.filled_at = now
            if usage.lookups_left >= 1:
                usage.lookups_left -= 1
                return
            wait_s = (1 - usage.lookups_left) / rate
        self._refuse(usage, f"{principal} makes more than {rate} look-ups a second", wait_s)

    def looked_up(
        self, principal: str, namespace_id: bytes, hits: int, misses: int, *, leases: int = 0
    ) -> None:
        """Count a look-up's outcome, in blocks, and the leases that it gave."""
        with self._lock:
            usage = self._find(self._principals, principal)
            usage.leases += leases
            for each in (usage, self._find(self._namespaces, namespace_id)):
                each.lookups += 1
                each.hit_blocks += hits
                each.missed_blocks += misses

    def sealed(self, principal: str, blocks: int) -> None:
        """Count blocks that were stored."""
        usage = self.usage(principal)
        with self._lock:
            usage.sealed_blocks += blocks

    def reserving(self, principal: str, blocks: int, nbytes: int) -> None:
        """Calls that reserve so much began, or (negative) have ended."""
        usage = self.usage(principal)
        with self._lock:
            usage.reserving += blocks
            usage.reserving_bytes += nbytes

    def lease(self, principal: str, change: int) -> None:
        """A lease was given or has ended."""
        usage = self.usage(principal)
        with self._lock:
            usage.leases += change

    def check(self, principal: str, limit: str, held: int, more: int, what: str) -> None:
        """Raises Overloaded, reason `quota`, if `held` and `more` exceed the limit named so."""
        most = getattr(self._limits_of(principal), limit)
        if most and held + more > most:
            self._refuse(
                self.usage(principal),
                f"{principal} has {held} {what} and asks for {more} more; {most} at most for one "
                "principal",
                RETRY_S,
            )

    def _refuse(self, usage: Usage, message: str, retry_after_s: float) -> None:
        with self._lock:
            usage.refusals += 1
            self.refusals += 1
        raise Overloaded(message, retry_after_s=retry_after_s, reason="quota")

    def _find(self, known: OrderedDict[_K, Usage], key: _K) -> Usage:
        usage = known.get(key)
        if usage is None:
            if len(known) >= PRINCIPALS_MAX:
                # The one that was seen first among those that hold nothing.
                idle = next((name for name, each in known.items() if each.idle), None)
                known.pop(idle if idle is not None else next(iter(known)))
            usage = known[key] = Usage()
        return usage

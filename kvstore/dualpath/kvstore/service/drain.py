"""Draining: the daemon takes nothing new, finishes what runs, and makes everything durable.

Owns the order and the report. Renewals, deliveries, seals and releases go on while it lasts; what
is left at the deadline is told and stays as it is. The process goes on serving statistics until it
is stopped. For the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from dualpath.kvstore.service.readiness import Phase, Readiness
from dualpath.kvstore.store_api import Store
from dualpath.transfer.errors import DualPathError, Unavailable

REPORT_S = 0.5
_LOOK_S = 0.05
"""How often it is looked whether anything is left: those that end things tell nobody."""


@dataclass(frozen=True, slots=True)
class Left:
    """What still runs."""

    queue_bytes: int
    leases: int
    reservations: int
    streams: int

    @property
    def nothing(self) -> bool:
        """Whether all of it has ended."""
        return not (self.queue_bytes or self.leases or self.reservations or self.streams)

    def __str__(self) -> str:
        words = {
            "bytes to deliver": self.queue_bytes,
            "leases": self.leases,
            "reservations": self.reservations,
            "streams": self.streams,
        }
        return ", ".join(f"{count} {word}" for word, count in words.items() if count)


@dataclass(frozen=True, slots=True)
class DrainReport:
    """Progress. `flushed`: all that was sealed is durable. `detail` says what is left."""

    phase: Phase
    left: Left
    flushed: bool = False
    done: bool = False
    detail: str = ""


class Drain:
    """See the module docstring."""

    def __init__(
        self,
        readiness: Readiness,
        left: Callable[[], Left],
        store: Store,
        executor: Executor,
        clock: Callable[[], float],
    ) -> None:
        self._readiness = readiness
        self._left = left
        self._store = store
        self._executor = executor
        self._clock = clock

    async def run(self, deadline_s: float) -> AsyncIterator[DrainReport]:
        """Drain; yield progress, the last one with `done`. Several may run at once."""
        if self._readiness.phase in (Phase.STARTING, Phase.STOPPING):
            raise Unavailable(
                f"the daemon is {self._readiness.phase.value} already", reason="draining"
            )
        ends_at = self._clock() + deadline_s
        self._readiness.enter(Phase.DRAINING)
        report_at = self._clock()
        while not (left := self._left()).nothing and self._clock() < ends_at:
            if self._readiness.phase is not Phase.DRAINING:
                yield self._ended(left)
                return
            if self._clock() >= report_at:
                report_at = self._clock() + REPORT_S
                yield DrainReport(self._readiness.phase, left, detail=str(left))
            await asyncio.sleep(_LOOK_S)
        trouble = await self._flush()
        left = self._left()
        if self._readiness.phase is not Phase.DRAINING:
            yield self._ended(left)
            return
        if left.nothing and not trouble:
            self._readiness.enter(Phase.DRAINED)
        detail = "; ".join(filter(None, (f"still {left}" if not left.nothing else "", trouble)))
        yield DrainReport(self._readiness.phase, left, not trouble, done=True, detail=detail)

    def resume(self) -> DrainReport:
        """Serve again."""
        if self._readiness.phase in (Phase.DRAINING, Phase.DRAINED):
            self._readiness.enter(Phase.SERVING)
        return DrainReport(self._readiness.phase, self._left(), done=True)

    def _ended(self, left: Left) -> DrainReport:
        phase = self._readiness.phase
        return DrainReport(phase, left, done=True, detail=f"ended: the daemon is {phase.value}")

    async def _flush(self) -> str:
        """Why not everything is durable; "" if it is."""
        flush = partial(self._store.seal, [], owner="drain", durable=True)
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, flush)
        except DualPathError as error:
            return f"not flushed: {error}"
        return ""

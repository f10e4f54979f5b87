"""Wall and processor time of a stretch of work, over this process and others that serve it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from dualpath.bench.rounds import Sample

_CPUCLOCK_SCHED = 2


def process_cpu_s(pid: int) -> float:
    """Processor time of another process of this machine, all threads; 0 if it is gone.

    Linux encodes the CPU clock of a process in the clock's number, with nanosecond resolution;
    /proc has it only in ticks of 10 ms.
    """
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError:
        return 0.0


class Stopwatch:
    """`with Stopwatch(pids) as watch: ...`, then `watch.sample(nbytes)`."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._pids = tuple(pids)
        self._wall_s = self._own_s = self._others_s = 0.0
        self.seconds = self.own_cpu_s = self.others_cpu_s = 0.0

    def _others(self) -> float:
        return sum(process_cpu_s(pid) for pid in self._pids)

    def __enter__(self) -> Self:
        self._others_s, self._own_s = self._others(), time.process_time()
        self._wall_s = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._wall_s
        self.own_cpu_s = time.process_time() - self._own_s
        self.others_cpu_s = self._others() - self._others_s

    def sample(self, nbytes: int, **detail: float) -> Sample:
        """What was measured, for so many bytes."""
        return Sample(nbytes, self.seconds, self.own_cpu_s + self.others_cpu_s, detail)

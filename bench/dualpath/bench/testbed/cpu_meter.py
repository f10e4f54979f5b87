"""Processor time of this process and of the cluster's: how many cores a run kept busy."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def _process_s(pid: int) -> float:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


class CpuMeter:
    """Counts from its creation on, with `own` this process as well. A process that has ended no
    longer counts."""

    def __init__(self, pids: Iterable[int], *, own: bool = True) -> None:
        self._pids = (*((os.getpid(),) if own else ()), *pids)
        self._started_s = time.monotonic()
        self._used_s = self._total_s()

    def _total_s(self) -> float:
        return sum(_process_s(pid) for pid in self._pids)

    def cores(self) -> float:
        """Mean number of cores in use since the creation."""
        elapsed_s = max(1e-9, time.monotonic() - self._started_s)
        return max(0.0, self._total_s() - self._used_s) / elapsed_s

"""How long this machine let our processes wait for a processor, or stood still altogether.

A thread wakes often, notes when it woke late, and adds up what the scheduler says of each thread of
each process. What a process itself makes others wait for is none of it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

TICK_S = 0.05
FREEZE_S_MIN = 0.03
"""Waking later than this beyond a tick is a freeze."""
OURSELVES = ""
"""The name of this process."""


class FreezeMeter:
    """Use it as a context; times are monotonic. `pids` says by name which processes there are."""

    def __init__(self, pids: Callable[[], Mapping[str, int]]) -> None:
        self._pids = pids
        self._ended = threading.Event()
        self._freezes: list[tuple[float, float]] = []
        self._waits: dict[str, list[tuple[float, float, float]]] = {}
        """By process: from, until, and the longest that one of its threads waited meanwhile."""
        self._before: dict[Path, int] = {}
        self._thread = threading.Thread(target=self._watch, name="freezes", daemon=True)

    def __enter__(self) -> FreezeMeter:
        self._thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _exc: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(TICK_S):
            now = time.monotonic()
            if now - before > TICK_S + FREEZE_S_MIN:
                self._freezes.append((before + TICK_S, now))
            for name, pid in {OURSELVES: os.getpid(), **self._pids()}.items():
                wait_s = self._longest_wait_s(pid)
                if wait_s > 0:
                    self._waits.setdefault(name, []).append((before, now, wait_s))
            before = now

    def _longest_wait_s(self, pid: int) -> float:
        """Of the threads of a process, since the last look: the longest time in the run queue."""
        longest_ns = 0
        with contextlib.suppress(OSError):  # it may have ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    waited_ns = int((task / "schedstat").read_bytes().split()[1])
                    longest_ns = max(longest_ns, waited_ns - self._before.get(task, waited_ns))
                    self._before[task] = waited_ns
        return longest_ns / 1e9

    def reset(self) -> None:
        """Forget what is past."""
        self._freezes, self._waits, self._before = [], {}, {}

    def frozen_s(self, start_s: float, end_s: float, names: Iterable[str] = ()) -> float:
        """Seconds between two times in which this process, or one of `names`, had to wait."""
        total_s = sum(
            max(0.0, min(end, end_s) - max(start, start_s)) for start, end in tuple(self._freezes)
        )
        for name in {OURSELVES, *names}:
            total_s += sum(
                wait_s
                for start, end, wait_s in tuple(self._waits.get(name, ()))
                if start < end_s and start_s < end
            )
        return total_s

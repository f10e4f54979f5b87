"""A bounded pool of native rings: each serves one batch at a time.

A ring is made when a batch finds none idle and kept afterwards. Memory that is named by `register`
is pinned into each ring once, where the system allows it; `refusal` tells why it does not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)


class NativeRing(Protocol):
    """What the native module's `Ring` does; see kvstore/native/ring.c."""

    @property
    def pending(self) -> int:
        """Items that have not ended, or were not told."""

    def start(
        self,
        writing: bool,
        fds: NDArray[np.int32],
        offsets: NDArray[np.int64],
        memory: memoryview,
        at: NDArray[np.int64],
        nbytes: NDArray[np.int64],
        errors: NDArray[np.int32],
        most: int,
        paced: bool,
        /,
    ) -> None:
        """Begin a batch with at most `most` items in flight; 0: as many as the ring has room for.
        `paced`: see TransferBatch. Raises ValueError, OSError."""

    def wait(self, told: NDArray[np.int32], least: int, timeout_s: float, /) -> int:
        """Write items that have ended to `told`, as soon as `least` have; return how many."""

    def nudge(self) -> None:
        """Reap and submit, if no other thread does; never waits."""

    def cancel(self) -> None:
        """End what is pending soon; go on waiting."""

    def register(self, memory: memoryview, /) -> None:
        """Pin memory for all batches in it. Raises OSError."""

    def close(self) -> None:
        """Give everything back. Raises ValueError with transfers in flight."""


class RingPool:
    """See the module docstring. Safe for threads."""

    def __init__(self, make: Callable[[], NativeRing], rings_max: int) -> None:
        self._make = make
        self._max = rings_max
        self._returned = threading.Condition()
        self._idle: list[NativeRing] = []
        self._used: list[NativeRing] = []
        self._rings = 0
        self._memory: memoryview | None = None
        self._closed = False
        self.refusal = ""

    def register(self, memory: memoryview) -> None:
        """Most batches will move in this memory. Rings that are idle take it at once."""
        self._memory = memory
        with self._returned:
            for ring in self._idle:
                self._pin(ring)

    def take(self, timeout_s: float) -> NativeRing | None:
        """A ring without a batch; None if all are in use for so long. Raises OSError."""
        deadline = time.monotonic() + timeout_s
        with self._returned:
            while not self._idle and self._rings >= self._max:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._returned.wait(left)
            if self._idle:
                self._used.append(self._idle.pop())
                return self._used[-1]
            self._rings += 1
        try:
            ring = self._make()
        except BaseException:
            self.lose()
            raise
        self._pin(ring)
        with self._returned:
            self._used.append(ring)
        return ring

    def nudge(self, driven: NativeRing) -> None:
        """Let the other rings go on: whoever drives them may be busy with what has arrived, as
        the caller, who drives `driven`, is about to be."""
        if len(self._used) > 1:
            for ring in self._used.copy():
                if ring is not driven:
                    ring.nudge()

    def give(self, ring: NativeRing) -> None:
        """Return a ring whose batch has ended."""
        with self._returned:
            self._used.remove(ring)
            if self._closed:
                self._rings -= 1
                ring.close()
            else:
                self._idle.append(ring)
            self._returned.notify()

    def lose(self) -> None:
        """A ring will not come back."""
        with self._returned:
            self._rings -= 1
            self._returned.notify()

    def close(self) -> None:
        """Free idle rings, and those in use as they come back."""
        with self._returned:
            self._closed = True
            idle, self._idle = self._idle, []
            self._rings -= len(idle)
            self._memory = None
        for ring in idle:
            ring.close()

    def _pin(self, ring: NativeRing) -> None:
        if self._memory is None or self.refusal:
            return
        try:
            ring.register(self._memory)
        except OSError as error:
            self.refusal = f"memory is not registered: {error.strerror}"
            _log.info("%s; transfers cost a little more", self.refusal)

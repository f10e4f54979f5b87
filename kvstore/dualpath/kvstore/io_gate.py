"""Where the threads that move bytes on the SSD take their turns; see `io_order` for whose it is.

Owns the lock around the order and the waiting: saves wait for their turn, background work is told
to come back. Loads only count themselves, at the cost of a microsecond a completion.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from dualpath.kvstore.io_order import IoClass, IoOrder
from dualpath.kvstore.transfer_batch import BatchProgress
from numpy.typing import NDArray

_ASK_S = 0.05
"""How long a waiting save waits for a load to end before it looks at the time."""


class IoGate:
    """See the module docstring."""

    def __init__(
        self, order: IoOrder | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._order = order or IoOrder()
        self._clock = clock
        self._changed = threading.Condition()

    def counted(
        self, progress: BatchProgress, nbytes: NDArray[np.int64], kind: IoClass
    ) -> BatchProgress:
        """The same batch of reads, counted as it goes; `nbytes` of each item."""
        with self._changed:
            self._order.begin(kind, int(nbytes.sum()))
        return _Counted(progress, nbytes, partial(self._ended, kind))

    def begin_save(self, nbytes: int) -> None:
        """Begin a write when it is its turn; `end_save` must follow."""
        started = self._clock()
        with self._changed:
            self._order.wait_begin(IoClass.SAVE)
            try:
                while not self._order.may_begin(IoClass.SAVE, self._clock() - started):
                    self._changed.wait(_ASK_S)
            finally:
                self._order.wait_end(IoClass.SAVE)
            self._order.begin(IoClass.SAVE, nbytes)

    def try_save(self, nbytes: int) -> bool:
        """Begin a write if it is its turn now; `end_save` must follow if so."""
        with self._changed:
            if not self._order.may_begin(IoClass.SAVE, 0):
                return False
            self._order.begin(IoClass.SAVE, nbytes)
            return True

    def end_save(self, nbytes: int) -> None:
        """A write is over."""
        self._ended(IoClass.SAVE, nbytes)

    def await_quiet(self, timeout_s: float) -> bool:
        """Wait until background work may begin; False if it may not within that time."""
        deadline = self._clock() + timeout_s
        with self._changed:
            while not self._order.may_begin(IoClass.BACKGROUND, 0):
                left = deadline - self._clock()
                if left <= 0:
                    return False
                self._changed.wait(min(left, _ASK_S))
            return True

    def retry_after_s(self) -> float:
        """See IoOrder."""
        with self._changed:
            return self._order.retry_after_s()

    def _ended(self, kind: IoClass, nbytes: int) -> None:
        with self._changed:
            self._order.end(kind, nbytes, self._clock())
            self._changed.notify_all()


class _Counted:
    """See BatchProgress."""

    def __init__(
        self, progress: BatchProgress, nbytes: NDArray[np.int64], ended: Callable[[int], None]
    ) -> None:
        self._progress = progress
        self._nbytes = nbytes
        self._ended = ended

    @property
    def errors(self) -> NDArray[np.int32]:
        """See BatchProgress."""
        return self._progress.errors

    @property
    def pending(self) -> int:
        """See BatchProgress."""
        return self._progress.pending

    def wait(self, timeout_s: float, least: int = 1) -> NDArray[np.int32]:
        """See BatchProgress."""
        items = self._progress.wait(timeout_s, least)
        if len(items):
            self._ended(int(self._nbytes[items].sum()))
        return items

    def cancel(self) -> None:
        """See BatchProgress."""
        self._progress.cancel()

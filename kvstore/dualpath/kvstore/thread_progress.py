"""A batch of transfers moved by threads that block: how devices without a ring keep a depth.

Each thread takes the next item until none is left. What a thread raises beyond OSError ends its
item as EIO, so that a waiter always hears of every item.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
from dualpath.kvstore.device import ALIGN_BYTES, DeviceFile
from dualpath.kvstore.transfer_batch import (
    UNDER_WAY,
    TransferBatch,
    check_batch,
    read_one,
    write_one,
)
from numpy.typing import NDArray

THREADS = 8
"""Transfers of batches that run at the same time, of all batches of a device together."""

_log = logging.getLogger(__name__)


class ThreadProgress:
    """See BatchProgress. Uses at most `threads` workers of `executor`."""

    def __init__(
        self,
        batch: TransferBatch,
        move: Callable[[DeviceFile, int, memoryview], None],
        executor: Executor,
        threads: int,
    ) -> None:
        self._batch = batch
        self._move = move
        self._ended_or_time = threading.Condition()
        self._next = 0
        self._ended: list[int] = []
        self._told = 0
        self._cancelled = False
        self.errors: NDArray[np.int32] = np.full(len(batch), UNDER_WAY, np.int32)
        for _ in range(min(threads, batch.depth or threads, len(batch))):
            executor.submit(self._work)

    @property
    def pending(self) -> int:
        """See BatchProgress."""
        return len(self._batch) - self._told

    def wait(self, timeout_s: float, least: int = 1) -> NDArray[np.int32]:
        """See BatchProgress."""
        deadline = time.monotonic() + timeout_s
        with self._ended_or_time:
            least = min(least, len(self._batch) - self._told)
            while len(self._ended) < least:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._ended_or_time.wait(left)
            ended, self._ended = self._ended, []
            self._told += len(ended)
        return np.array(ended, np.int32)

    def cancel(self) -> None:
        """See BatchProgress. Transfers that a thread has begun run to their end."""
        self._cancelled = True

    def _work(self) -> None:
        while True:
            with self._ended_or_time:
                item = self._next
                if item == len(self._batch):
                    return
                self._next += 1
            error = errno.ECANCELED if self._cancelled else self._moved(item)
            with self._ended_or_time:
                self.errors[item] = error
                self._ended.append(item)
                self._ended_or_time.notify()

    def _moved(self, item: int) -> int:
        batch = self._batch
        try:
            file = batch.files[int(batch.file[item])]
            self._move(file, int(batch.offset[item]), batch.view(item))
        except OSError as error:
            return error.errno or errno.EIO
        except Exception:  # noqa: BLE001
            _log.exception("transfer %d of a batch failed unexpectedly", item)
            return errno.EIO
        return 0


class BatchThreads:
    """The threads of one device: none until the first batch."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="dualpath-psync")

    def read(self, batch: TransferBatch) -> ThreadProgress:
        """Begin reads. Raises OSError (EINVAL)."""
        check_batch(batch, ALIGN_BYTES)
        return ThreadProgress(batch, read_one, self._executor, THREADS)

    def write(self, batch: TransferBatch) -> ThreadProgress:
        """Begin writes. Raises OSError (EINVAL)."""
        check_batch(batch, ALIGN_BYTES)
        return ThreadProgress(batch, write_one, self._executor, THREADS)

    def close(self) -> None:
        """Take no batch any more."""
        self._executor.shutdown(wait=False)

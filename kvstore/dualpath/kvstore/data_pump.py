"""The data of blocks on its way to SSD, moved by a thread of its own.

The committer waits for headers, sync and index; data that only it could move would stand still
meanwhile, and the device with it. Data goes in parts, each when it is the turn of saves
(`io_gate`), and the next write's follow without a gap. Little is in flight at a time: headers,
syncs and the index have to wait behind it. Memory that is being written belongs to the device
until `finish`. Nothing here syncs.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.device import Device
from dualpath.kvstore.io_gate import IoGate
from dualpath.kvstore.slot_items import (
    SlotItems,
    WriteFailure,
    await_some,
    place_of,
    places_of,
)
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.kvstore.transfer_batch import BatchProgress, TransferBatch

WRITE_BYTES = 1 << 20
"""Most bytes of one transfer, unless one block is larger."""
FLIGHT_BYTES = 4 << 20
"""About as many bytes of a part are in flight, but two transfers in any case."""
PART_BYTES = 32 << 20
"""Bytes of data that take their turn together; shorter parts cost the interpreter more."""
_log = logging.getLogger(__name__)


class DataWrite:
    """The data of some blocks, in parts; their segments have files."""

    def __init__(self, ssd: SsdTier, memory: memoryview, jobs: Sequence[CommitJob]) -> None:
        self.parts: deque[SlotItems] = deque()
        """Those that have not begun."""
        self.failures: list[WriteFailure] = []
        if jobs:
            items = _data_items(ssd, memory, jobs)
            sizes = items.batch.nbytes
            number = (np.cumsum(sizes) - sizes) // PART_BYTES
            cuts = np.flatnonzero(number[1:] != number[:-1]) + 1
            for part in np.split(np.arange(len(sizes)), cuts):
                depth = FLIGHT_BYTES * len(part) // int(sizes[part].sum())
                self.parts.append(items.pick(part, max(2, depth)))
        self.pending = len(self.parts)
        """Parts that have not ended."""


class DataPump:
    """See the module docstring. For one caller, who may wait for other things with `changed`."""

    def __init__(self, device: Device, gate: IoGate, changed: threading.Condition) -> None:
        self._device = device
        self._gate = gate
        self._changed = changed
        self._queue: deque[DataWrite] = deque()
        self._under_way: deque[tuple[DataWrite, SlotItems, BatchProgress]] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="dualpath-data-pump", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def begin(self, write: DataWrite) -> None:
        """Move this write, after those before it; `finish` must follow."""
        with self._changed:
            if write.parts:
                self._queue.append(write)
                self._changed.notify_all()

    def finish(self, write: DataWrite) -> list[WriteFailure]:
        """Wait until the device has let go of its memory; what has failed. Idempotent."""
        with self._changed:
            # As long as the device takes: before that nobody else may have the memory.
            self._changed.wait_for(lambda: not write.pending)
            return write.failures

    def close(self) -> None:
        """Stop when nothing is left to write."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._under_way or self._closing)
                if not (self._queue or self._under_way):
                    return
            while self._has_room() and self._begin_next():
                pass
            if self._under_way:
                self._drive()

    def _has_room(self) -> bool:
        """Whether the device is about to run out of what it was given."""
        return all(progress.pending <= part.batch.depth for _, part, progress in self._under_way)

    def _begin_next(self) -> bool:
        """Begin a part; False if there is none, or while it is not its turn."""
        with self._changed:
            if not self._queue:
                return False
            write = self._queue[0]
            part = write.parts[0]
        if not self._gate.try_save(part.nbytes):
            if self._under_way:
                return False
            self._gate.begin_save(part.nbytes)
        try:
            self._under_way.append((write, part, self._device.write_batch(part.batch)))
        except Exception as error:  # noqa: BLE001
            failed = part.failed(getattr(error, "errno", None) or errno.EIO)
            if not isinstance(error, OSError):
                _log.exception("a write of %d bytes cannot begin", part.nbytes)
            self._ended(write, part, failed)
        with self._changed:
            write.parts.popleft()
            if not write.parts:
                self._queue.popleft()
        return True

    def _drive(self) -> None:
        """Wait until the oldest part makes room for another, or has ended."""
        write, part, progress = self._under_way[0]
        until_room = progress.pending - part.batch.depth
        try:
            await_some(progress, until_room if until_room > 0 else progress.pending)
            failed = part.failures(progress.errors) if not progress.pending else []
        except Exception:  # noqa: BLE001
            _log.exception("a write of %d bytes failed unexpectedly", part.nbytes)
            failed = part.failed(errno.EIO)
        else:
            if progress.pending:
                return
        self._under_way.popleft()
        self._ended(write, part, failed)

    def _ended(self, write: DataWrite, part: SlotItems, failed: list[WriteFailure]) -> None:
        self._gate.end_save(part.nbytes)
        with self._changed:
            write.failures += failed
            write.pending -= 1
            self._changed.notify_all()


def _data_items(ssd: SsdTier, memory: memoryview, jobs: Sequence[CommitJob]) -> SlotItems:
    """One for each run of slots that are neighbours on SSD and in memory, up to WRITE_BYTES."""
    jobs = sorted(jobs, key=place_of)
    at = np.array([job.at for job in jobs], np.int64)
    nbytes = np.array([job.nbytes for job in jobs], np.int64)
    files, file, offset = ssd.locate(*places_of(jobs), np.zeros(len(jobs), np.int64))
    count = np.arange(len(jobs), dtype=np.int64)
    apart = np.ones(len(jobs), np.bool_)
    apart[1:] = (
        (file[1:] != file[:-1])
        | (offset[1:] != offset[:-1] + nbytes[:-1])
        | (at[1:] != at[:-1] + nbytes[:-1])
    )
    inside = count - np.maximum.accumulate(np.where(apart, count, 0))
    apart |= inside % np.maximum(1, WRITE_BYTES // nbytes) == 0
    batch = TransferBatch(files, file, offset, memory, at, nbytes)
    return SlotItems(jobs, count, count + 1, batch).joined(apart)

"""Writing blocks and their headers to slots of many segments, several writes in flight.

Neighbours on SSD that are neighbours in memory go with one write. Data goes in parts, each when it
is the turn of saves (`io_gate`); a few parts are under way at a time, so that the device always has
something to do. Nothing here syncs, and nothing decides what a failure means: failures are
returned. For one thread; memory that is being written belongs to the device until `finish`.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.device import ALIGN_BYTES, Device
from dualpath.kvstore.io_gate import IoGate
from dualpath.kvstore.record import HEADER_BYTES
from dualpath.kvstore.segment import HEADERS_PER_PAGE
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.kvstore.transfer_batch import BatchProgress, TransferBatch
from numpy.typing import NDArray

WRITE_BYTES = 4 << 20
"""Most bytes of one write, unless one block is larger."""
PART_BYTES = 4 << 20
"""Bytes of data that take their turn together."""
PARTS_MAX = 3
"""Parts that are under way at the same time."""
_STUCK_S = 60.0
"""A batch that has not ended after so long is cancelled, and waited for further."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WriteFailure:
    """Blocks of one segment that could not be written."""

    segment: int
    jobs: list[CommitJob]
    error: OSError


@dataclass(frozen=True, slots=True)
class _Items:
    """Transfers of a batch; item i is for the jobs [first[i], end[i])."""

    jobs: Sequence[CommitJob]
    first: NDArray[np.int64]
    end: NDArray[np.int64]
    batch: TransferBatch

    @property
    def nbytes(self) -> int:
        return int(self.batch.nbytes.sum())

    def pick(self, items: NDArray[np.int64]) -> _Items:
        """Some of them."""
        whole = self.batch
        batch = TransferBatch(
            whole.files,
            whole.file[items],
            whole.offset[items],
            whole.memory,
            whole.at[items],
            whole.nbytes[items],
        )
        return _Items(self.jobs, self.first[items], self.end[items], batch)

    def joined(self, apart: NDArray[np.bool_]) -> _Items:
        """With one item for each run of neighbours; a new one begins where `apart` says so."""
        whole, starts = self.batch, np.flatnonzero(apart)
        batch = TransferBatch(
            whole.files,
            whole.file[starts],
            whole.offset[starts],
            whole.memory,
            whole.at[starts],
            np.add.reduceat(whole.nbytes, starts),
        )
        ends = np.append(starts[1:], len(apart)) - 1
        return _Items(self.jobs, self.first[starts], self.end[ends], batch)

    def failures(self, errors: NDArray[np.int32]) -> list[WriteFailure]:
        """One for each segment and errno."""
        found: dict[tuple[int, int], list[CommitJob]] = {}
        for item in np.flatnonzero(errors).tolist():
            for job in self.jobs[int(self.first[item]) : int(self.end[item])]:
                found.setdefault((job.record.segment, int(errors[item])), []).append(job)
        return [
            WriteFailure(segment, jobs, OSError(error, os.strerror(error)))
            for (segment, error), jobs in found.items()
        ]

    def failed(self, error: int) -> list[WriteFailure]:
        """All of them, because the batch could not begin."""
        return self.failures(np.full(len(self.first), error, np.int32))


class DataWrite:
    """The data of some blocks on its way to SSD; their segments have files."""

    def __init__(
        self, ssd: SsdTier, gate: IoGate, memory: memoryview, jobs: Sequence[CommitJob]
    ) -> None:
        self._device = ssd.device
        self._gate = gate
        self._parts: deque[_Items] = deque()
        self._under_way: deque[tuple[_Items, BatchProgress]] = deque()
        self._failures: list[WriteFailure] = []
        if jobs:
            items = _data_items(ssd, memory, jobs)
            sizes = items.batch.nbytes
            number = (np.cumsum(sizes) - sizes) // PART_BYTES
            cuts = np.flatnonzero(number[1:] != number[:-1]) + 1
            self._parts.extend(map(items.pick, np.split(np.arange(len(sizes)), cuts)))

    def start(self) -> None:
        """Begin what may begin at once."""
        while self._parts and len(self._under_way) < PARTS_MAX:
            if not self._gate.try_save(self._parts[0].nbytes):
                return
            self._begin()

    def finish(self) -> list[WriteFailure]:
        """Wait until all has ended; what has failed. Idempotent."""
        while self._parts or self._under_way:
            self.start()
            if self._under_way:
                self._end()
            elif self._parts:  # it waits for its turn only while nothing of it is under way
                self._gate.begin_save(self._parts[0].nbytes)
                self._begin()
        return self._failures

    def _begin(self) -> None:
        part = self._parts.popleft()
        try:
            progress = self._device.write_batch(part.batch)
        except OSError as error:
            self._gate.end_save(part.nbytes)
            self._failures += part.failed(error.errno or errno.EIO)
        else:
            self._under_way.append((part, progress))

    def _end(self) -> None:
        part, progress = self._under_way[0]
        _await_end(progress)
        self._under_way.popleft()
        self._gate.end_save(part.nbytes)
        if progress.errors.any():
            self._failures += part.failures(progress.errors)


class HeaderWriter:
    """Writes headers. Owns the memory that they are written from."""

    def __init__(self, ssd: SsdTier, jobs_max: int) -> None:
        self._ssd = ssd
        self._memory = memoryview(mmap.mmap(-1, jobs_max * ALIGN_BYTES))
        self._headers = np.frombuffer(self._memory, np.uint8).reshape(-1, HEADER_BYTES)

    def write(self, jobs: Sequence[CommitJob]) -> list[WriteFailure]:
        """Write the headers of at most `jobs_max` blocks; their neighbours' are kept."""
        if not jobs:
            return []
        jobs = sorted(jobs, key=_place)
        pages, headers = _header_pages(self._ssd, self._memory, jobs)
        partial = np.flatnonzero(pages.end - pages.first < HEADERS_PER_PAGE)
        failures = self._move(pages.pick(partial), reading=True) if len(partial) else []
        if failures:
            failed = {job.place for failure in failures for job in failure.jobs}
            return failures + self.write([job for job in jobs if job.place not in failed])
        self._headers[headers] = 0
        for job, header in zip(jobs, headers.tolist(), strict=True):
            start, data = header * HEADER_BYTES, job.encoded
            self._memory[start : start + len(data)] = data
        file, offset = pages.batch.file, pages.batch.offset
        apart = np.ones(len(offset), np.bool_)
        apart[1:] = (file[1:] != file[:-1]) | (offset[1:] != offset[:-1] + ALIGN_BYTES)
        return self._move(pages.joined(apart), reading=False)

    def _move(self, items: _Items, *, reading: bool) -> list[WriteFailure]:
        device: Device = self._ssd.device
        try:
            begin = device.read_batch if reading else device.write_batch
            progress = begin(items.batch)
        except OSError as error:
            return items.failed(error.errno or errno.EIO)
        _await_end(progress)
        return items.failures(progress.errors) if progress.errors.any() else []


def _await_end(progress: BatchProgress) -> None:
    """Wait until the device has let go of the memory: before that nobody else may have it."""
    deadline = time.monotonic() + _STUCK_S
    while progress.pending:
        progress.wait(_STUCK_S)
        if progress.pending and time.monotonic() >= deadline:
            _log.error("%d writes have not ended for %g s", progress.pending, _STUCK_S)
            progress.cancel()
            deadline = time.monotonic() + _STUCK_S


def _place(job: CommitJob) -> tuple[int, int]:
    return job.record.segment, job.record.slot


def _places(jobs: Sequence[CommitJob]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return (
        np.array([job.record.segment for job in jobs], np.int32),
        np.array([job.record.slot for job in jobs], np.int32),
    )


def _data_items(ssd: SsdTier, memory: memoryview, jobs: Sequence[CommitJob]) -> _Items:
    """One for each run of slots that are neighbours on SSD and in memory, up to WRITE_BYTES."""
    jobs = sorted(jobs, key=_place)
    at = np.array([job.at for job in jobs], np.int64)
    nbytes = np.array([job.nbytes for job in jobs], np.int64)
    files, file, offset = ssd.locate(*_places(jobs), np.zeros(len(jobs), np.int64))
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
    return _Items(jobs, count, count + 1, batch).joined(apart)


def _header_pages(
    ssd: SsdTier, memory: memoryview, jobs: Sequence[CommitJob]
) -> tuple[_Items, NDArray[np.int64]]:
    """(one item for each page of headers, in `memory` one after another; the number of each job's
    header there). The jobs are sorted by place."""
    segments, slots = _places(jobs)
    files, file, offset, number = ssd.locate_headers(segments, slots)
    apart = np.ones(len(jobs), np.bool_)
    apart[1:] = (file[1:] != file[:-1]) | (offset[1:] != offset[:-1])
    page = np.cumsum(apart) - 1
    first = np.flatnonzero(apart)
    sizes = np.full(len(first), ALIGN_BYTES, np.int64)
    at = np.arange(len(first), dtype=np.int64) * ALIGN_BYTES
    batch = TransferBatch(files, file[first], offset[first], memory, at, sizes)
    items = _Items(jobs, first, np.append(first[1:], len(jobs)), batch)
    return items, page * HEADERS_PER_PAGE + number

"""Writes headers of blocks to the header pages of their segments.

A page is shared by neighbours: it is read, changed and written where not all of it is new. For one
thread; failures are returned.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Sequence

import numpy as np
from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.device import ALIGN_BYTES, Device
from dualpath.kvstore.record import HEADER_BYTES
from dualpath.kvstore.segment import HEADERS_PER_PAGE
from dualpath.kvstore.slot_items import (
    SlotItems,
    WriteFailure,
    await_end,
    place_of,
    places_of,
)
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.kvstore.transfer_batch import TransferBatch
from numpy.typing import NDArray


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
        jobs = sorted(jobs, key=place_of)
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

    def _move(self, items: SlotItems, *, reading: bool) -> list[WriteFailure]:
        device: Device = self._ssd.device
        try:
            begin = device.read_batch if reading else device.write_batch
            progress = begin(items.batch)
        except OSError as error:
            return items.failed(error.errno or errno.EIO)
        await_end(progress)
        return items.failures(progress.errors) if progress.errors.any() else []


def _header_pages(
    ssd: SsdTier, memory: memoryview, jobs: Sequence[CommitJob]
) -> tuple[SlotItems, NDArray[np.int64]]:
    """(one item for each page of headers, in `memory` one after another; the number of each job's
    header there). The jobs are sorted by place."""
    segments, slots = places_of(jobs)
    files, file, offset, number = ssd.locate_headers(segments, slots)
    apart = np.ones(len(jobs), np.bool_)
    apart[1:] = (file[1:] != file[:-1]) | (offset[1:] != offset[:-1])
    page = np.cumsum(apart) - 1
    first = np.flatnonzero(apart)
    sizes = np.full(len(first), ALIGN_BYTES, np.int64)
    at = np.arange(len(first), dtype=np.int64) * ALIGN_BYTES
    batch = TransferBatch(files, file[first], offset[first], memory, at, sizes)
    items = SlotItems(jobs, first, np.append(first[1:], len(jobs)), batch)
    return items, page * HEADERS_PER_PAGE + number

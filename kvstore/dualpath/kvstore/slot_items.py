"""Blocks on their way to slots, as batches for the device, and what became of them.

Neighbours on SSD that are neighbours in memory go with one transfer. Nothing here decides what a
failure means: failures are returned, by segment and reason.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.transfer_batch import BatchProgress, TransferBatch
from numpy.typing import NDArray

STUCK_S = 60.0
"""A batch in which nothing has ended for so long is cancelled, and waited for further."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WriteFailure:
    """Blocks of one segment that could not be written."""

    segment: int
    jobs: list[CommitJob]
    error: OSError


@dataclass(frozen=True, slots=True)
class SlotItems:
    """Transfers of a batch; item i is for the jobs [first[i], end[i])."""

    jobs: Sequence[CommitJob]
    first: NDArray[np.int64]
    end: NDArray[np.int64]
    batch: TransferBatch

    @property
    def nbytes(self) -> int:
        """Of all transfers."""
        return int(self.batch.nbytes.sum())

    def pick(self, items: NDArray[np.int64], depth: int = 0) -> SlotItems:
        """Some of them, with so many in flight."""
        whole = self.batch
        batch = TransferBatch(
            whole.files,
            whole.file[items],
            whole.offset[items],
            whole.memory,
            whole.at[items],
            whole.nbytes[items],
            depth,
        )
        return SlotItems(self.jobs, self.first[items], self.end[items], batch)

    def joined(self, apart: NDArray[np.bool_]) -> SlotItems:
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
        return SlotItems(self.jobs, self.first[starts], self.end[ends], batch)

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


def await_end(progress: BatchProgress) -> None:
    """Wait until the device has let go of the memory: before that nobody else may have it."""
    while progress.pending:
        await_some(progress, progress.pending)


def await_some(progress: BatchProgress, least: int) -> None:
    """Wait until so many of its items have ended, or for a while; what does not end is hurried."""
    started = time.monotonic()
    if not len(progress.wait(STUCK_S, least)) and time.monotonic() - started >= STUCK_S:
        _log.error("%d transfers have not ended for %g s", progress.pending, STUCK_S)
        progress.cancel()


def place_of(job: CommitJob) -> tuple[int, int]:
    """(segment, slot), to sort by."""
    return job.record.segment, job.record.slot


def places_of(jobs: Sequence[CommitJob]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Their segments and slots."""
    return (
        np.array([job.record.segment for job in jobs], np.int32),
        np.array([job.record.slot for job in jobs], np.int32),
    )

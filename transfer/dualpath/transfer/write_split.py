"""A batch carried out as single writes, for transports that gain nothing from batches.

Guarantees one completion a batch, once all of its writes have ended, also of those that could
not be queued any more after others were.
"""

from __future__ import annotations

import threading
from typing import Protocol

from dualpath.transfer.errors import DualPathError
from dualpath.transfer.outbox import check_batch
from dualpath.transfer.transport import (
    BatchCompletion,
    Completion,
    OnBatchCompletion,
    OnCompletion,
    Write,
    WriteBatch,
    WriteStatus,
)


class _Writer(Protocol):
    def write(self, peer: str, write: Write, on_completion: OnCompletion) -> None: ...


class _Ending:
    """Counts the writes of a batch down; they may end on any thread."""

    def __init__(self, peer: str, batch: WriteBatch, on_completion: OnBatchCompletion) -> None:
        self._lock = threading.Lock()
        self._peer = peer
        self._batch = batch
        self._on_completion = on_completion
        self._left = len(batch.target_table)
        self._refused: dict[int, str] = {}
        self._status = WriteStatus.DONE
        self._detail = ""

    def ended(self, completion: Completion) -> None:
        with self._lock:
            if completion.status is WriteStatus.REFUSED:
                self._refused[completion.tag] = completion.detail
            elif completion.status is not WriteStatus.DONE:
                self._status, self._detail = completion.status, completion.detail
            self._left -= 1
            over = self._left == 0
        if over:
            self._on_completion(
                BatchCompletion(
                    self._peer, self._batch.first_tag, self._status, self._refused, self._detail
                )
            )


def write_split(
    transport: _Writer, peer: str, batch: WriteBatch, on_completion: OnBatchCompletion
) -> None:
    """`Transport.write_batch` by `Transport.write`. Raises as that does."""
    check_batch(batch)
    ending = _Ending(peer, batch, on_completion)
    count = len(batch.target_table)
    for index in range(count):
        write = Write(
            batch.source,
            batch.source_table.part(index),
            batch.target,
            batch.target_table.part(index),
            batch.lane,
            batch.first_tag + index,
            batch.deadline_s,
        )
        try:
            transport.write(peer, write, ending.ended)
        except DualPathError as error:
            if index == 0:
                raise
            for tag in range(batch.first_tag + index, batch.first_tag + count):
                ending.ended(Completion(peer, tag, WriteStatus.LOST, 0, error.reason))
            return

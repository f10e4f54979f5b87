"""A batch of chunks on their way into memory: drives the reads, checks the bytes, gives back.

Each chunk holds a pin on its row until it is released, so that neither the end of its lease nor
eviction can touch its slots. A read that the medium does not answer keeps its memory and its
pins until the device has let go of them (`settle`).
The store's lock is taken a batch, not a chunk.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from dualpath.kvstore import checksum
from dualpath.kvstore.chunk_plan import ChunkReads, chunk_bits, runs
from dualpath.kvstore.fetched_batch import FetchStatus
from dualpath.kvstore.store_api import MissReason, Tier
from dualpath.kvstore.store_state import StoreState
from dualpath.kvstore.transfer_batch import UNDER_WAY, BatchProgress
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.region import Region
from numpy.typing import NDArray

_log = logging.getLogger(__name__)

_TRANSIENT = frozenset(
    (errno.ECANCELED, errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.ETIMEDOUT, errno.EBADF)
)
"""Errors that say nothing about the block's bytes."""
_CANCEL_S = 1.0
"""How long a batch that is given up is waited for, so that it rarely outlives its caller."""


@dataclass(slots=True, kw_only=True)
class BatchParts:
    """What a batch is made of. Item arrays: `rows`, `chunks`, `inside` (offset in the block),
    `offsets` (in the arena), `nbytes`, `expected` (checksums), `needed` (has to be read), `dead`
    (was dropped earlier). `pinned`: the rows, each once, and `row_of` each item's among them.
    `buffers`: of each read, the read buffer that it goes to, or -1 for the blocks' own slots."""

    rows: NDArray[np.int32]
    chunks: NDArray[np.int32]
    inside: NDArray[np.int64]
    offsets: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    expected: NDArray[np.uint64]
    needed: NDArray[np.bool_]
    dead: NDArray[np.bool_]
    pinned: NDArray[np.int32]
    row_of: NDArray[np.int32]
    reads: ChunkReads
    buffers: NDArray[np.int64]


_NONE: NDArray[np.int32] = np.empty(0, np.int32)

Recheck = Callable[[int, int, int, int], bool]
"""(row, chunk, arena offset, expected checksum): bytes were wrong; True if they are right now, else
the block was dropped."""


class ChunkBatch:
    """See FetchedBatch."""

    def __init__(
        self,
        state: StoreState,
        parts: BatchParts,
        progress: BatchProgress | None,
        *,
        recheck: Recheck | None,
        adopt: Callable[[ChunkBatch], None],
    ) -> None:
        """Takes over the pins and buffers of `parts`. With `recheck` every chunk is verified as it
        arrives. `adopt` is called with this when something was released that the device still
        holds: call `settle` until it is True."""
        self._state = state
        self._parts = parts
        self._progress = progress
        self._recheck = recheck
        self._deadline = time.monotonic() + state.config.read_wait_s
        self._adopt = adopt
        self._releasing = threading.Lock()
        items = len(parts.rows)
        self._all = np.arange(items, dtype=np.int32)
        self._left = items
        """Items that are not released."""
        self._held = np.ones(items, np.bool_)
        self._owed: NDArray[np.int32] = _NONE
        """Released while the device held them."""
        self._noted = ~parts.needed
        self._all_noted = False
        self._slotted = len(parts.buffers) > 0 and bool((parts.buffers < 0).any())
        self.status = parts.needed.astype(np.uint8)
        assert FetchStatus.UNDER_WAY == 1
        if parts.dead.any():
            self.status[parts.dead] = self._fates(parts.rows[parts.dead])
        self._fresh: NDArray[np.int32] | None = self._noted.nonzero()[0].astype(np.int32)
        self._given_up = False

    def _fates(self, rows: NDArray[np.int32]) -> list[int]:
        """What to say of blocks that left while they were leased."""
        with self._state.lock:
            removal_of = self._state.catalog.removal_of
            return [
                FetchStatus.CORRUPT if removal_of(row) is MissReason.CORRUPT else FetchStatus.GONE
                for row in rows.tolist()
            ]

    def __len__(self) -> int:
        return len(self.status)

    @property
    def region(self) -> Region:
        """See FetchedBatch."""
        return self._state.dram.region

    @property
    def offsets(self) -> NDArray[np.int64]:
        """See FetchedBatch."""
        return self._parts.offsets

    @property
    def nbytes(self) -> NDArray[np.int64]:
        """See FetchedBatch."""
        return self._parts.nbytes

    @property
    def ok(self) -> bool:
        """See FetchedBatch."""
        return not self.status.any()

    def arrived(self, timeout_s: float) -> NDArray[np.int32]:
        """See FetchedBatch."""
        if self._fresh is not None:
            fresh, self._fresh = self._fresh, None
            if len(fresh):
                self._verify(fresh[self.status[fresh] == FetchStatus.OK])
                return fresh
        progress = self._progress
        if progress is None or progress.pending == 0 or self._given_up:
            return np.empty(0, np.int32)
        left = self._deadline - time.monotonic()
        reads = progress.wait(min(timeout_s, max(left, 0.0)))
        items = self._take(reads)
        if progress.pending == 0:
            self._note()
        elif not len(reads) and left <= timeout_s:
            return self._give_up(_CANCEL_S)
        return items

    def finish(self) -> None:
        """See FetchedBatch."""
        while self._fresh is not None or self._under_way:
            self.arrived(self._state.config.read_wait_s)

    @property
    def _under_way(self) -> bool:
        return self._progress is not None and self._progress.pending > 0 and not self._given_up

    def _take(self, reads: NDArray[np.int32]) -> NDArray[np.int32]:
        """Some reads have ended: set the status of their items, verified, and return these."""
        assert self._progress is not None
        if not len(reads):
            return reads
        plan = self._parts.reads
        items = runs(plan.first[reads], plan.count[reads])
        errors = self._progress.errors[reads]
        if not errors.any():
            self.status[items] = FetchStatus.OK
            self._verify(items)
            return items
        for read, error in zip(reads.tolist(), errors.tolist(), strict=True):
            mine = runs(plan.first[read : read + 1], plan.count[read : read + 1])
            if error == 0:
                self.status[mine] = FetchStatus.OK
                self._verify(mine)
            elif error in _TRANSIENT:
                self.status[mine] = FetchStatus.UNAVAILABLE
            else:
                self.status[mine] = FetchStatus.CORRUPT
                self._drop(int(self._parts.rows[mine[0]]), error)
        return items

    def _verify(self, items: NDArray[np.int32]) -> None:
        recheck, parts = self._recheck, self._parts
        if recheck is None or not len(items):
            return
        sums = checksum.of_extents(self.region.view, parts.offsets[items], parts.nbytes[items])
        for item in items[sums != parts.expected[items]].tolist():
            row, chunk = int(parts.rows[item]), int(parts.chunks[item])
            if not recheck(row, chunk, int(parts.offsets[item]), int(parts.expected[item])):
                self.status[item] = FetchStatus.CORRUPT

    def _drop(self, row: int, error: int) -> None:
        self._state.read_failed(row, os.strerror(error))

    def _give_up(self, wait_s: float) -> NDArray[np.int32]:
        """The medium takes too long, or nobody wants the rest. Return the items that this ends;
        what the device still holds is UNAVAILABLE."""
        progress = self._progress
        assert progress is not None
        progress.cancel()
        deadline = time.monotonic() + wait_s
        ended = []
        while progress.pending and (left := deadline - time.monotonic()) > 0:
            ended.append(self._take(progress.wait(left)))
        self._given_up = True
        if progress.pending == 0:
            self._note()
        late = np.flatnonzero(self.status == FetchStatus.UNDER_WAY).astype(np.int32)
        self.status[late] = FetchStatus.UNAVAILABLE
        return np.concatenate([*ended, late])

    def _note(self) -> None:
        """All reads have ended: what is in slots now serves others too."""
        with self._state.lock:
            self._note_items(self._all)

    def _note_items(self, items: NDArray[np.int32]) -> None:
        """The reads of these items have ended. Needs the lock; before their pins go."""
        if self._all_noted:
            return
        state, parts, table = self._state, self._parts, self._state.table
        if items is self._all and not self._slotted and self.ok and not self._noted.any():
            # The usual end of a batch: all of it was read into buffers, and is right.
            self._all_noted = True
            state.counters.read_bytes[Tier.SSD] += int(parts.nbytes.sum())
            return
        items = items[~self._noted[items]]
        self._noted[items] = True
        self._all_noted = bool(self._noted.all())
        good = self.status[items] == FetchStatus.OK
        state.counters.read_bytes[Tier.SSD] += int(parts.nbytes[items[good]].sum())
        if not self._slotted:
            return
        slotted = parts.buffers[parts.reads.of_item[items]] < 0
        items, good = items[slotted], good[slotted]
        rows = parts.rows[items]
        bits = chunk_bits(parts.chunks[items])
        np.bitwise_and.at(table.reading, rows, ~bits)
        if not good.any():
            return
        rows, bits = rows[good], bits[good]
        np.bitwise_or.at(table.filled, rows, bits)
        layout = state.catalog.entry_of(int(rows[0])).layout
        rows = np.unique(rows)
        table.resident[rows] = table.filled[rows] == np.uint64((1 << layout.chunk_count) - 1)

    def release(self, chunks: NDArray[np.int32] | None = None) -> None:
        """See FetchedBatch."""
        if chunks is None:
            if self._under_way:
                self._give_up(_CANCEL_S)
            chunks = self._all
        else:
            chunks = np.unique(chunks)
            if (self.status[chunks] == FetchStatus.UNDER_WAY).any():
                raise InvalidRequest("a chunk that is being read cannot be released by itself")
        with self._releasing:
            stuck = self._give_back(chunks if self._left == len(self) else self._still(chunks))
        if stuck:
            self._adopt(self)

    def settle(self) -> bool:
        """Give back what was released while the device held it. True once that is all."""
        assert self._progress is not None
        with self._releasing:
            self._progress.wait(0)
            if self._progress.pending == 0:
                self._note()
            owed, self._owed = self._owed, _NONE
            return not self._give_back(owed)

    def _still(self, items: NDArray[np.int32]) -> NDArray[np.int32]:
        """Those that were not released before."""
        kept = items[self._held[items]]
        return kept[~np.isin(kept, self._owed)] if len(self._owed) else kept

    def _give_back(self, items: NDArray[np.int32]) -> bool:
        """Return whether some are still the device's; those are owed."""
        parts = self._parts
        if self._progress is not None and self._progress.pending:
            reads = parts.reads.of_item[items]
            with_device = (reads >= 0) & (self._progress.errors[reads] == UNDER_WAY)
            self._owed = np.concatenate((self._owed, items[with_device]))
            items = items[~with_device]
        if not len(items):
            return bool(len(self._owed))
        whole = len(items) == len(self)
        buffers, rows = parts.buffers, parts.pinned
        if not whole:
            buffers, rows = self._freed_with(items)
        self._held[items] = False
        self._left -= len(items)
        state = self._state
        with state.lock:
            self._note_items(items)
            state.residency.unpin_rows(rows)
            state.dram.buffers.give(buffers[buffers >= 0])
            state.room.notify_all()
        return bool(len(self._owed))

    def _freed_with(self, items: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """(buffers, rows) of which these items are the last that were held."""
        parts, left = self._parts, self._held.copy()
        left[items] = False
        reads = parts.reads.of_item
        of_items = reads[items]
        gone = np.zeros(len(parts.reads), np.bool_)
        gone[of_items[of_items >= 0]] = True
        still = reads[left]
        gone[still[still >= 0]] = False
        gone_rows = np.zeros(len(parts.pinned), np.bool_)
        gone_rows[parts.row_of[items]] = True
        gone_rows[parts.row_of[left]] = False
        return parts.buffers[gone], parts.pinned[gone_rows]

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release all."""
        self.release()

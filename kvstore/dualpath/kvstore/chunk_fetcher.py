"""Chunks of leased blocks, brought into memory: from DRAM at once, from SSD by reading.

Reads from SSD go straight into the block's DRAM slot when it has or can get one and nobody else
is reading that chunk into it, else into a bounded pool of read buffers. Plans a batch under the
store's lock; `ChunkBatch` then drives it.
"""

from __future__ import annotations

import errno
import logging
import threading
import time

import numpy as np
from dualpath.kvstore.block_table import RowState
from dualpath.kvstore.catalog import NamespaceEntry
from dualpath.kvstore.chunk_batch import BatchParts, ChunkBatch
from dualpath.kvstore.chunk_check import ChunkCheck
from dualpath.kvstore.chunk_plan import (
    ChunkReads,
    chunk_bits,
    chunk_keys,
    distinct,
    distinct_rows,
    extents,
    no_reads,
    plan_reads,
    repeated,
)
from dualpath.kvstore.fetched_batch import FetchStatus
from dualpath.kvstore.fetched_chunk import ArenaChunk
from dualpath.kvstore.io_order import IoClass
from dualpath.kvstore.read_ahead import ReadAhead
from dualpath.kvstore.store_api import Tier
from dualpath.kvstore.store_state import StoreState
from dualpath.kvstore.transfer_batch import (
    BATCH_ITEMS_MAX,
    BatchProgress,
    FailedProgress,
    TransferBatch,
)
from dualpath.transfer.errors import Corrupt, InvalidRequest, LeaseExpired, Overloaded, Unavailable
from dualpath.transfer.slices import Slices
from numpy.typing import ArrayLike, NDArray

_log = logging.getLogger(__name__)

_PROMOTION_PAUSE_S = 0.05
"""No search for a DRAM slot for so long after one was in vain."""


class ChunkFetcher:
    """See the module docstring."""

    def __init__(self, state: StoreState, check: ChunkCheck) -> None:
        self._state = state
        self._check = check
        self._promote_after = 0.0
        self._stuck_lock = threading.Lock()
        self._stuck: list[ChunkBatch] = []
        self.ahead: ReadAhead | None = None
        """Told of what is read; None: nothing is read ahead."""

    def fetch(self, lease_id: int, block: int, chunk: int) -> ArenaChunk:
        """See Store."""
        batch = self.fetch_batch(lease_id, [block], [chunk])
        if not batch.ok:
            status = int(batch.status[0])
            batch.release()
            if status == FetchStatus.CORRUPT:
                raise Corrupt(
                    f"chunk {chunk} of block {block} of lease {lease_id} could not be read, now or "
                    "earlier: block dropped; look up again"
                )
            if status == FetchStatus.GONE:
                raise LeaseExpired(
                    f"block {block} of lease {lease_id} has left since, as invalidated ones do: "
                    "look up again"
                )
            raise Unavailable(
                f"the SSD did not answer within {self._state.config.read_wait_s} s",
                reason="slow_device",
            )
        slices = Slices.contiguous(int(batch.offsets[0]), int(batch.nbytes[0]))
        return ArenaChunk(batch.region, slices, batch.release)

    def fetch_batch(
        self,
        lease_id: int,
        blocks: ArrayLike,
        chunks: ArrayLike,
        *,
        verify: bool = False,
        wait: bool = True,
        patient: bool = True,
        paced: bool = False,
        kind: IoClass = IoClass.LOAD,
    ) -> ChunkBatch:
        """See Store; for whom the bytes are read, `kind`, is for the order of transfers."""
        of_block, of_chunk = np.asarray(blocks, np.int32), np.asarray(chunks, np.int32)
        if of_block.ndim != 1 or of_block.shape != of_chunk.shape or not len(of_block):
            raise InvalidRequest(
                f"blocks and chunks must be as many, at least one, not {of_block.shape} and "
                f"{of_chunk.shape}"
            )
        self.reap()
        of_block, of_chunk = of_block[:BATCH_ITEMS_MAX], of_chunk[:BATCH_ITEMS_MAX]
        state = self._state
        with state.lock:
            state.check_open()
            rows, entry = self._rows(lease_id, of_block, of_chunk)
            pinned, row_of = distinct_rows(rows)
            state.table.pins[pinned] += 1
            try:
                buffer_wait_s = state.config.read_buffer_wait_s if patient else 0.0
                parts = self._plan(rows, entry, of_chunk, pinned, row_of, buffer_wait_s)
                transfers = self._transfers(parts, paced)
            except BaseException:
                # Only the wait for the first buffer raises: there is nothing else to give back.
                state.residency.unpin_rows(pinned)
                raise
            if len(parts.pinned) < len(pinned):
                state.residency.unpin_rows(np.setdiff1d(pinned, parts.pinned))
        progress = None if transfers is None else self._begin(transfers, kind)
        if progress is not None and self.ahead is not None and kind is IoClass.LOAD:
            self.ahead.asked(lease_id, int(of_block.max()))
        recheck = self._check.recheck if verify else None
        batch = ChunkBatch(state, parts, progress, recheck=recheck, adopt=self._adopt)
        if wait:
            try:
                batch.finish()
            except BaseException:
                batch.release()
                raise
        return batch

    def _begin(self, transfers: TransferBatch, kind: IoClass) -> BatchProgress:
        progress: BatchProgress
        try:
            progress = self._state.ssd.device.read_batch(transfers)
        except OSError as error:
            _log.warning("a batch of reads could not begin: %s", error)
            progress = FailedProgress(len(transfers), error.errno or errno.EIO)
        return self._state.io.counted(progress, transfers.nbytes, kind)

    def reap(self) -> None:
        """Give back what the device has let go of since its batch was released."""
        if not self._stuck:
            return
        with self._stuck_lock:
            stuck, self._stuck = self._stuck, []
        left = [batch for batch in stuck if not batch.settle()]
        with self._stuck_lock:
            self._stuck += left

    def _adopt(self, batch: ChunkBatch) -> None:
        with self._stuck_lock:
            if batch not in self._stuck:
                self._stuck.append(batch)

    def _rows(
        self, lease_id: int, blocks: NDArray[np.int32], chunks: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NamespaceEntry]:
        lease = self._state.leases.find(lease_id, self._state.clock())
        wrong = _outside(blocks, len(lease.rows))
        if wrong is not None:
            raise InvalidRequest(
                f"lease {lease_id} covers blocks 0..{len(lease.rows) - 1}, not block {wrong}"
            )
        rows = lease.rows[blocks]
        entry = self._state.catalog.entry_of(int(rows[0]))
        wrong = _outside(chunks, entry.layout.chunk_count)
        if wrong is not None:
            raise InvalidRequest(f"chunk {wrong} is outside of 0..{entry.layout.chunk_count - 1}")
        return rows, entry

    def _plan(
        self,
        rows: NDArray[np.int32],
        entry: NamespaceEntry,
        chunks: NDArray[np.int32],
        pinned: NDArray[np.int32],
        row_of: NDArray[np.int32],
        buffer_wait_s: float,
    ) -> BatchParts:
        """Needs the lock; all rows are pinned. Raises Overloaded. Cuts the batch where the read
        buffers end."""
        table, layout = self._state.table, entry.layout
        bits = chunk_bits(chunks)
        dead = table.state[rows] != RowState.PRESENT
        needed = ~dead & ((table.filled[rows] & bits) == 0)
        if not needed.any():
            return self._resident(rows, entry, chunks, dead, pinned, row_of)
        if self._state.config.promote:
            for row in np.unique(rows[needed & (table.dram[rows] < 0)]).tolist():
                self._promote(row)
        slots = table.dram[rows]
        buffered = needed & ((slots < 0) | ((table.reading[rows] & bits) != 0))
        keys = chunk_keys(rows, chunks)
        twice = repeated(keys)
        if twice is not None:
            buffered |= needed & twice
        inside, nbytes = extents(layout, chunks)
        reads = plan_reads(layout.chunk_bytes, keys, chunks, inside, nbytes, needed, buffered)
        slotted = needed & ~buffered
        # Marked before the wait for a buffer, in which others plan too.
        self._mark(rows, bits, slotted)
        try:
            buffers = self._take_buffers(reads, buffered, buffer_wait_s)
        except BaseException:
            self._unmark(rows, bits, slotted)
            raise
        if len(buffers) < len(reads):
            items = int(reads.first[len(buffers)])
            self._unmark(rows[items:], bits[items:], slotted[items:])
            reads = reads.cut(len(buffers), items)
            rows, chunks, slots = rows[:items], chunks[:items], slots[:items]
            dead, needed, buffered = dead[:items], needed[:items], buffered[:items]
            inside, nbytes = inside[:items], nbytes[:items]
            pinned, row_of = distinct_rows(rows)
        first = reads.first
        begin = np.where(buffers >= 0, buffers - inside[first], slots[first])
        if needed.all():
            offsets = begin[reads.of_item] + inside
        else:
            offsets = np.where(dead, -1, slots + inside)
            offsets[needed] = begin[reads.of_item[needed]] + inside[needed]
            in_dram = int(nbytes[~(dead | needed)].sum())
            self._state.counters.read_bytes[Tier.DRAM] += in_dram
        expected = entry.pool.pick(table.checksum_row[rows], chunks)
        return BatchParts(
            rows=rows,
            chunks=chunks,
            inside=inside,
            offsets=offsets,
            nbytes=nbytes,
            expected=expected,
            needed=needed,
            dead=dead,
            pinned=pinned,
            row_of=row_of,
            reads=reads,
            buffers=buffers,
        )

    def _resident(
        self,
        rows: NDArray[np.int32],
        entry: NamespaceEntry,
        chunks: NDArray[np.int32],
        dead: NDArray[np.bool_],
        pinned: NDArray[np.int32],
        row_of: NDArray[np.int32],
    ) -> BatchParts:
        """As `_plan` where nothing has to be read: the way of what is asked for most."""
        table = self._state.table
        inside, nbytes = extents(entry.layout, chunks)
        offsets = table.dram[rows] + inside
        if dead.any():
            offsets[dead] = -1
            self._state.counters.read_bytes[Tier.DRAM] += int(nbytes[~dead].sum())
        else:
            self._state.counters.read_bytes[Tier.DRAM] += int(nbytes.sum())
        return BatchParts(
            rows=rows,
            chunks=chunks,
            inside=inside,
            offsets=offsets,
            nbytes=nbytes,
            expected=entry.pool.pick(table.checksum_row[rows], chunks),
            needed=np.zeros(len(rows), np.bool_),
            dead=dead,
            pinned=pinned,
            row_of=row_of,
            reads=no_reads(len(rows)),
            buffers=_NO_BUFFERS,
        )

    def _mark(
        self, rows: NDArray[np.int32], bits: NDArray[np.uint64], slotted: NDArray[np.bool_]
    ) -> None:
        """These chunks are being read into their blocks' slots."""
        if slotted.any():
            np.bitwise_or.at(self._state.table.reading, rows[slotted], bits[slotted])

    def _unmark(
        self, rows: NDArray[np.int32], bits: NDArray[np.uint64], slotted: NDArray[np.bool_]
    ) -> None:
        if slotted.any():
            np.bitwise_and.at(self._state.table.reading, rows[slotted], ~bits[slotted])

    def _take_buffers(
        self, reads: ChunkReads, buffered: NDArray[np.bool_], wait_s: float
    ) -> NDArray[np.int64]:
        """The read buffer of each read, -1 where it goes to a slot; fewer than reads if there are
        no more. Waits only when not even the first item would be served."""
        pool = self._state.dram.buffers
        buffers = np.full(len(reads), -1, np.int64)
        wanted = np.flatnonzero(buffered[reads.first])
        sizes = reads.nbytes[wanted]
        served = len(reads)
        for nbytes in distinct(sizes):
            mine = wanted[sizes == nbytes]
            taken = pool.take(len(mine), nbytes)
            buffers[mine[: len(taken)]] = taken
            if len(taken) < len(mine):
                served = min(served, int(mine[len(taken)]))
        if served == len(reads):
            return buffers
        beyond = buffers[served:]
        pool.give(beyond[beyond >= 0])
        if reads.first[served] == 0:
            buffers[0] = self._await_buffer(int(reads.nbytes[0]), wait_s)
            served = 1
        return buffers[:served]

    def _await_buffer(self, nbytes: int, wait_s: float) -> int:
        state = self._state
        deadline = time.monotonic() + wait_s
        while not len(taken := state.dram.buffers.take(1, nbytes)):
            left = deadline - time.monotonic()
            if left <= 0 or not state.room.wait(left):
                raise Overloaded(
                    f"no read buffer within {wait_s} s; release fetched "
                    "chunks or raise read_buffers_bytes",
                    retry_after_s=state.io.retry_after_s(),
                )
        return int(taken[0])

    def _transfers(self, parts: BatchParts, paced: bool) -> TransferBatch | None:
        """The reads of a batch; needs the lock."""
        reads = parts.reads
        if not len(reads):
            return None
        state, rows = self._state, parts.rows[reads.first]
        inside = parts.inside[reads.first]
        files, file, offset = state.ssd.locate(
            state.table.segment[rows], state.table.slot[rows], inside
        )
        memory = state.dram.region.view
        at = parts.offsets[reads.first]
        return TransferBatch(files, file, offset, memory, at, reads.nbytes, paced=paced)

    def _promote(self, row: int) -> None:
        """Give a block on SSD a DRAM slot if one is free or a colder block can leave it."""
        now = time.monotonic()
        if now < self._promote_after:
            return
        if not self._state.residency.promote(row):
            self._promote_after = now + _PROMOTION_PAUSE_S


_NO_BUFFERS: NDArray[np.int64] = np.empty(0, np.int64)


def _outside(numbers: NDArray[np.int32], end: int) -> int | None:
    """A number outside of 0..end-1, if there is one."""
    least, most = int(numbers.min()), int(numbers.max())
    return least if least < 0 else most if most >= end else None

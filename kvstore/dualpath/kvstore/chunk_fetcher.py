"""Chunks of leased blocks, brought into memory: from DRAM at once, from SSD by reading.

A chunk that is fetched pins its block's slots until it is released, so neither expiry of the
lease nor eviction can change its bytes. Reads from SSD go straight into the block's DRAM slot
when it has or can get one, else into a bounded pool of read buffers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from dualpath.kvstore import checksum
from dualpath.kvstore.block_table import RowState
from dualpath.kvstore.fetched_chunk import ArenaChunk
from dualpath.kvstore.layout import ALIGN_BYTES
from dualpath.kvstore.store_api import MissReason, Tier
from dualpath.kvstore.store_state import StoreState
from dualpath.transfer.errors import Corrupt, InvalidRequest, Overloaded
from dualpath.transfer.slices import Slices

_PROMOTION_PAUSE_S = 0.05
"""No search for a DRAM slot for so long after one was in vain."""


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a chunk of a row is or goes. `buffer` is a read buffer's offset, or -1."""

    row: int
    offset: int
    nbytes: int
    present: bool
    buffer: int
    place: tuple[int, int]
    expected: int


class ChunkFetcher:
    """See the module docstring."""

    def __init__(self, state: StoreState) -> None:
        self._state = state
        self._promote_after = 0.0

    def fetch(self, lease_id: int, block: int, chunk: int) -> ArenaChunk:
        """See Store."""
        state = self._state
        with state.lock:
            state.check_open()
            target = self._target(lease_id, block, chunk, reading=True)
        if not target.present:
            self._read(target, chunk)
        tier = Tier.DRAM if target.present else Tier.SSD
        slices = Slices.contiguous(target.offset, target.nbytes)
        with state.lock:
            state.counters.read_bytes[tier] += target.nbytes
            if target.buffer >= 0:
                # The bytes are out of the slot: only the buffer is held on.
                state.residency.unpin(target.row)
                return ArenaChunk(state.dram.region, slices, partial(self._give, target.buffer))
        return ArenaChunk(state.dram.region, slices, partial(self._unpin, target.row))

    def report_corrupt(self, lease_id: int, block: int, chunk: int) -> bool:
        """See Store."""
        state = self._state
        with state.lock:
            state.check_open()
            try:
                target = self._target(lease_id, block, chunk, reading=False)
            except Corrupt:
                return True
            only_copy = bool(state.table.dirty[target.row])
        try:
            if target.present and self._verifies(target):
                return False
            bad = only_copy or not self._verifies_on_ssd(target, chunk)
            with state.lock:
                if bad:
                    self._drop(target.row)
                else:
                    self._forget_chunk(target.row, chunk)
            return bad
        finally:
            self._unpin(target.row)

    def _verifies(self, target: _Target) -> bool:
        view = self._state.dram.view(target.offset, target.nbytes)
        return checksum.xxh3_64(view) == target.expected

    def _verifies_on_ssd(self, target: _Target, chunk: int) -> bool:
        """Read the chunk anew, beside any copy in DRAM."""
        state = self._state
        length = _aligned(target.nbytes)
        with state.lock:
            buffer = self._buffer(length)
        try:
            view = state.dram.view(buffer, length)
            offset = chunk * state.catalog.entry_of(target.row).layout.chunk_bytes
            state.ssd.read(*target.place, offset, view)
            return checksum.xxh3_64(view[: target.nbytes]) == target.expected
        except OSError:
            return False
        finally:
            self._give(buffer)

    def _target(self, lease_id: int, block: int, chunk: int, *, reading: bool) -> _Target:
        """Find and pin. Needs the lock. With `reading` there is a place to read to afterwards;
        a read buffer may have to be waited for."""
        state, table = self._state, self._state.table
        row = self._row_of(lease_id, block)
        layout = state.catalog.entry_of(row).layout
        inside, nbytes = layout.chunk_extent(chunk)
        if table.state[row] != RowState.PRESENT:
            raise Corrupt(f"block {block} of lease {lease_id} was dropped since; look up again")
        table.pins[row] += 1
        try:
            present = bool(int(table.filled[row]) >> chunk & 1)
            buffer = -1
            if reading and table.dram[row] < 0 and state.config.promote:
                self._promote(row)
            if reading and table.dram[row] < 0:
                buffer = self._buffer(_aligned(nbytes))
            offset = buffer if buffer >= 0 else int(table.dram[row]) + inside
        except BaseException:
            state.residency.unpin(row)
            raise
        sums = state.catalog.entry_of(row).pool.take(table.checksum_row[row : row + 1])
        return _Target(
            row,
            offset,
            nbytes,
            present,
            buffer,
            (int(table.segment[row]), int(table.slot[row])),
            int(sums[0, chunk]),
        )

    def _row_of(self, lease_id: int, block: int) -> int:
        lease = self._state.leases.find(lease_id, self._state.clock())
        if not 0 <= block < len(lease.rows):
            raise InvalidRequest(
                f"lease {lease_id} covers blocks 0..{len(lease.rows) - 1}, not block {block}"
            )
        return int(lease.rows[block])

    def _promote(self, row: int) -> None:
        """Give a block on SSD a DRAM slot if one is free or a colder block can leave it."""
        now = time.monotonic()
        if now < self._promote_after:
            return
        table = self._state.table
        offset = self._state.residency.take_dram(int(table.slot_bytes[row]), for_write=False)
        if offset < 0:
            self._promote_after = now + _PROMOTION_PAUSE_S
        else:
            table.dram[row] = offset

    def _buffer(self, nbytes: int) -> int:
        """A read buffer, waiting for one if all are in use. Raises Overloaded."""
        state = self._state
        deadline = time.monotonic() + state.config.read_buffer_wait_s
        while (offset := state.dram.buffers.take(nbytes)) < 0:
            left = deadline - time.monotonic()
            if left <= 0 or not state.room.wait(left):
                raise Overloaded(
                    f"no read buffer within {state.config.read_buffer_wait_s} s; release fetched "
                    "chunks or raise read_buffers_bytes",
                    retry_after_s=0.1,
                )
        return offset

    def _read(self, target: _Target, chunk: int) -> None:
        """Read a chunk from SSD to its target. Raises Corrupt; the block is then dropped."""
        state = self._state
        view = state.dram.view(target.offset, _aligned(target.nbytes))
        row = target.row
        try:
            layout = state.catalog.entry_of(row).layout
            state.ssd.read(*target.place, chunk * layout.chunk_bytes, view)
        except OSError as error:
            with state.lock:
                self._drop(row)
                state.residency.unpin(row)
            if target.buffer >= 0:
                self._give(target.buffer)
            raise Corrupt(
                f"the SSD tier could not read a chunk ({error}); block dropped"
            ) from error
        if target.buffer < 0:
            with state.lock:
                self._note_chunk(row, chunk)

    def _note_chunk(self, row: int, chunk: int) -> None:
        table = self._state.table
        filled = int(table.filled[row]) | 1 << chunk
        table.filled[row] = filled
        chunks = self._state.catalog.entry_of(row).layout.chunk_count
        table.resident[row] = filled == (1 << chunks) - 1

    def _forget_chunk(self, row: int, chunk: int) -> None:
        """The copy in DRAM is bad and the one on SSD good: the next fetch reads it again."""
        table = self._state.table
        table.filled[row] = int(table.filled[row]) & ~(1 << chunk)
        table.resident[row] = False

    def _drop(self, row: int) -> None:
        if self._state.table.state[row] == RowState.PRESENT:
            self._state.residency.drop(row, MissReason.CORRUPT)

    def _unpin(self, row: int) -> None:
        with self._state.lock:
            self._state.residency.unpin(row)
            self._state.room.notify_all()

    def _give(self, buffer: int) -> None:
        with self._state.lock:
            self._state.dram.buffers.give(buffer)
            self._state.room.notify_all()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES

"""What is done about bytes that do not have their checksum.

The copy on SSD decides: it is read anew, into memory of its own. If it is right, it replaces the
bad copy in place (other readers of that copy had wrong bytes too); if not, or if the copy in DRAM
was the only one, the block is dropped with its descendants.
"""

from __future__ import annotations

import numpy as np
from dualpath.kvstore import checksum
from dualpath.kvstore.block_table import RowState
from dualpath.kvstore.layout import ALIGN_BYTES
from dualpath.kvstore.segment import page_buffer
from dualpath.kvstore.store_state import StoreState
from dualpath.transfer.errors import InvalidRequest


class ChunkCheck:
    """See the module docstring."""

    def __init__(self, state: StoreState) -> None:
        self._state = state

    def report_corrupt(self, lease_id: int, block: int, chunk: int) -> bool:
        """See Store."""
        state, table = self._state, self._state.table
        with state.lock:
            state.check_open()
            lease = state.leases.find(lease_id, state.clock())
            if not 0 <= block < len(lease.rows):
                raise InvalidRequest(
                    f"lease {lease_id} covers blocks 0..{len(lease.rows) - 1}, not block {block}"
                )
            row = int(lease.rows[block])
            entry = state.catalog.entry_of(row)
            inside, nbytes = entry.layout.chunk_extent(chunk)
            if table.state[row] != RowState.PRESENT:
                return True
            sums = table.checksum_row[row : row + 1]
            expected = int(entry.pool.pick(sums, np.array([chunk]))[0])
            at = -1
            if int(table.filled[row]) >> chunk & 1:
                at = int(table.dram[row]) + inside
            table.pins[row] += 1
        try:
            if at >= 0 and checksum.xxh3_64(state.dram.view(at, nbytes)) == expected:
                return False
            return not self.recheck(row, chunk, at, expected)
        finally:
            with state.lock:
                state.residency.unpin(row)
                state.room.notify_all()

    def recheck(self, row: int, chunk: int, at: int, expected: int) -> bool:
        """A chunk of a pinned row has wrong bytes at `at` in the arena (-1: on SSD only): put it
        right, or drop the block and return False."""
        state, table = self._state, self._state.table
        inside, nbytes = state.catalog.entry_of(row).layout.chunk_extent(chunk)
        with state.lock:
            only_copy = bool(table.dirty[row])
            place = int(table.segment[row]), int(table.slot[row])
        if only_copy:
            state.rotten(row, f"chunk {chunk}, not written back yet, does not have its checksum")
            return False
        buffer = page_buffer(-(-nbytes // ALIGN_BYTES) * ALIGN_BYTES)
        try:
            state.ssd.read(*place, inside, buffer)
        except OSError as error:
            state.read_failed(row, f"chunk {chunk} cannot be read: {error}")
            return False
        good = buffer[:nbytes]
        if checksum.xxh3_64(good) != expected:
            state.rotten(row, f"chunk {chunk} does not have its checksum")
            return False
        if at >= 0:
            state.dram.view(at, nbytes)[:] = good
        return True

"""Where leased blocks lie in the segment files, for readers that have these files on a mount.

A leased block keeps its slot, so a place holds for as long as the lease. Who reads past the end
of its lease may find another block there: readers verify every chunk against the checksums that
they got with the lease.
"""

from __future__ import annotations

import numpy as np
from dualpath.kvstore.block_table import RowState
from dualpath.kvstore.store_api import NOT_IN_A_FILE, BlockPlaces
from dualpath.kvstore.store_state import StoreState
from dualpath.transfer.errors import InvalidRequest
from numpy.typing import NDArray


class BlockLocator:
    """See the module docstring."""

    def __init__(self, state: StoreState) -> None:
        self._state = state

    def locate(self, lease_id: int, blocks: NDArray[np.int32]) -> BlockPlaces:
        """See Store.locate."""
        state, table = self._state, self._state.table
        with state.lock:
            state.check_open()
            lease = state.leases.find(lease_id, state.clock())
            if not len(blocks) or blocks.min() < 0 or blocks.max() >= len(lease.rows):
                raise InvalidRequest(
                    f"lease {lease_id} covers blocks 0..{len(lease.rows) - 1}, not all of "
                    f"{blocks[:8].tolist()}"
                )
            rows = lease.rows[blocks]
            layout = state.catalog.entry_of(int(rows[0])).layout
            there = (table.state[rows] == RowState.PRESENT) & ~table.dirty[rows]
            segment = np.full(len(rows), NOT_IN_A_FILE, np.int32)
            offset = np.zeros(len(rows), np.int64)
            on_disk = rows[there]
            if len(on_disk) and state.ssd.in_files:
                places = state.ssd.locate(
                    table.segment[on_disk], table.slot[on_disk], np.zeros(len(on_disk), np.int64)
                )
                segment[there] = table.segment[on_disk]
                offset[there] = places[2]
        return BlockPlaces(segment, offset, layout.chunk_bytes)

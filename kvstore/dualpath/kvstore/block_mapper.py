"""Mapping: readers that use the blocks where they lie in the arena, without a copy.

A mapped lease pins the copies in DRAM of its blocks. Neither eviction nor demotion touches them,
and a block that is dropped leaves look-ups at once while its bytes stay. The pins end with the
lease: by release, with its owner, or at its expiry, so that a reader that hangs holds no memory
for ever. Who reads without renewing in time finds out by the guard (see `mapping_table`).
"""

from __future__ import annotations

import numpy as np
from dualpath.kvstore.block_table import RowState
from dualpath.kvstore.mapping_table import GUARD_BYTES
from dualpath.kvstore.store_api import MappedPrefix, PrefixHit
from dualpath.kvstore.store_state import StoreState
from dualpath.transfer.errors import InvalidRequest
from numpy.typing import NDArray

_NO_OFFSETS: NDArray[np.int64] = np.zeros(0, np.int64)


def check_mapped_lease_s(lease_s: float) -> None:
    """Raises InvalidRequest: what is not leased cannot be mapped."""
    if not lease_s > 0:
        raise InvalidRequest(f"lease_s of a mapped prefix must be positive, not {lease_s}")


class BlockMapper:
    """See the module docstring."""

    def __init__(self, state: StoreState) -> None:
        self._state = state

    def pin(self, namespace_id: bytes, hit: PrefixHit, *, owner: str) -> MappedPrefix:
        """Map what a look-up has just found and leased. Raises Overloaded and LeaseExpired; the
        lease has then ended."""
        nbytes = self._state.catalog.entry(namespace_id).layout.block_bytes
        if not hit.lease_id:
            return MappedPrefix(hit, _NO_OFFSETS, nbytes, -1)
        state, table = self._state, self._state.table
        with state.lock:
            state.check_open()
            lease = state.leases.find(hit.lease_id, state.clock())
            # Numpy indexes by its own integers twice as fast as by shorter ones.
            rows = lease.rows.astype(np.intp)
            stable = table.resident.take(rows) & (table.state.take(rows) == RowState.PRESENT)
            pinned = rows[stable]
            slot_bytes = int(table.slot_bytes[rows[0]])
            try:
                mapping = state.mappings.begin(owner, lease.id, pinned, slot_bytes)
            except BaseException:
                state.leases.release(lease.id, owner)
                state.end_lease(lease)
                raise
            lease.mapping = mapping
            table.pins[pinned] += 1
            offsets = np.where(stable, table.dram.take(rows), -1)
        guard = state.dram.guards_offset + mapping.guard * GUARD_BYTES
        return MappedPrefix(hit, offsets, nbytes, guard)

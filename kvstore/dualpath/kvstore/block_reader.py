"""Lookup and leases: which leading blocks are present, and who may read them until when.

The bytes are brought by `ChunkFetcher`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from dualpath.kvstore.catalog import NamespaceEntry
from dualpath.kvstore.checksum import Buffer
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.row_gather import gather_rows
from dualpath.kvstore.store_api import LEASE_S_MAX, MissReason, PrefixHit, Tier
from dualpath.kvstore.store_state import StoreState
from dualpath.transfer.errors import InvalidRequest
from numpy.typing import NDArray


class BlockReader:
    """See the module docstring."""

    def __init__(self, state: StoreState) -> None:
        self._state = state

    def lookup(
        self, namespace_id: bytes, hashes: Sequence[bytes], *, owner: str, lease_s: float
    ) -> PrefixHit:
        """See Store."""
        return self._lookup(namespace_id, PackedHashes.of(hashes), owner, lease_s)

    def lookup_packed(
        self, namespace_id: bytes, hashes: Buffer, hash_bytes: int, *, owner: str, lease_s: float
    ) -> PrefixHit:
        """See Store."""
        packed = PackedHashes.checked(hashes, hash_bytes)
        return self._lookup(namespace_id, packed, owner, lease_s)

    def _lookup(
        self, namespace_id: bytes, hashes: PackedHashes, owner: str, lease_s: float
    ) -> PrefixHit:
        _check_lease_s(lease_s, least=0.0)
        state = self._state
        with state.lock:
            state.check_open()
            entry = state.catalog.entry(namespace_id)
            state.reap()
            rows = state.expiry.trim(entry, state.catalog.prefix(entry, hashes))
            miss, detail = state.catalog.explain(entry, hashes, len(rows))
            self._count(len(hashes), len(rows), miss)
            if not len(rows):
                return _nothing(entry.layout.chunk_count, miss, detail)
            lease_id = 0
            if lease_s > 0:
                # A lease keeps its blocks; that they were used counts from its end on.
                lease_id = self._grant(entry, owner, rows, lease_s)
            else:
                state.residency.touch(rows.astype(np.intp))
            table = state.table
            gathered = gather_rows(
                rows,
                table.leases,
                table.resident,
                table.checksum_row,
                entry.pool.values,
                lease=lease_id != 0,
            )
            state.counters.tier_hit_blocks[Tier.DRAM] += gathered.in_dram
            state.counters.tier_hit_blocks[Tier.SSD] += len(rows) - gathered.in_dram
        return PrefixHit(
            blocks=len(rows),
            lease_id=lease_id,
            lease_s=lease_s if lease_id else 0.0,
            tiers=gathered.tiers,
            checksums=gathered.checksums,
            miss=miss,
            detail=detail,
        )

    def _grant(
        self, entry: NamespaceEntry, owner: str, rows: NDArray[np.int32], lease_s: float
    ) -> int:
        state = self._state
        now, nbytes = state.clock(), len(rows) * entry.layout.slot_bytes
        holder = state.holder_of(owner)
        if state.lease_shares is not None:
            state.lease_shares.check(holder, rows, nbytes, now)
        return state.leases.grant(
            owner, rows, entry.index, now, lease_s, holder=holder, nbytes=nbytes
        ).id

    def _count(self, asked: int, hits: int, miss: MissReason) -> None:
        counters = self._state.counters
        counters.lookups += 1
        counters.hit_blocks += hits
        counters.missed_blocks += asked - hits
        counters.misses[miss] += 1

    def renew(self, lease_id: int, *, owner: str, lease_s: float) -> None:
        """See Store."""
        _check_lease_s(lease_s, least=1e-3)
        state = self._state
        with state.lock:
            state.reap()
            state.leases.renew(lease_id, owner, state.clock(), lease_s)

    def release(self, lease_id: int, *, owner: str) -> None:
        """See Store."""
        state = self._state
        with state.lock:
            lease = state.leases.release(lease_id, owner)
            if lease is not None:
                state.end_lease(lease)
                state.room.notify_all()


def _nothing(chunks: int, miss: MissReason, detail: str) -> PrefixHit:
    tiers, checksums = np.empty(0, np.uint8), np.empty((0, chunks), np.uint64)
    return PrefixHit(0, 0, 0.0, tiers, checksums, miss, detail)


def _check_lease_s(lease_s: float, *, least: float) -> None:
    if not least <= lease_s <= LEASE_S_MAX:
        raise InvalidRequest(f"lease_s must lie in {least}..{LEASE_S_MAX} s, not {lease_s}")

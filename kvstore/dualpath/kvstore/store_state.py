"""What the parts of a `BlockStore` share: one lock and everything that it guards.

The lock is held for microseconds, never over I/O or hashing. `room` (on the same lock) is
notified whenever slots, buffers or write-back room come free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from dualpath.kvstore.block_events import BlockEvents
from dualpath.kvstore.block_table import BlockTable
from dualpath.kvstore.catalog import Catalog
from dualpath.kvstore.dram_tier import DramTier
from dualpath.kvstore.expiry import Expiry
from dualpath.kvstore.io_gate import IoGate
from dualpath.kvstore.lease_shares import LeaseShares, ShareRule
from dualpath.kvstore.lease_table import Lease, LeaseTable
from dualpath.kvstore.mapping_table import MappingTable
from dualpath.kvstore.reservation_table import HeldReservation, ReservationTable
from dualpath.kvstore.residency import Residency
from dualpath.kvstore.retention import RetentionTable
from dualpath.kvstore.segment_breaker import SegmentBreaker
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.kvstore.store_api import MissReason, Tier
from dualpath.kvstore.store_config import StoreConfig
from dualpath.kvstore.store_health import HealthBoard
from dualpath.transfer.errors import Unavailable


@dataclass(slots=True)
class StoreCounters:
    """Since start; see StoreStats."""

    lookups: int = 0
    hit_blocks: int = 0
    missed_blocks: int = 0
    misses: dict[MissReason, int] = field(default_factory=lambda: dict.fromkeys(MissReason, 0))
    read_bytes: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    written_bytes: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    tier_hit_blocks: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    scrubbed_bytes: int = 0
    scrubbed_blocks: int = 0
    scrub_bad_blocks: int = 0
    scrub_passes: int = 0
    lost_write_backs: int = 0


def _nobody_told(row: int, why: str) -> None:
    """Until the store is put together."""
    raise AssertionError(f"row {row} failed before the store was open: {why}")


@dataclass(slots=True, kw_only=True)
class StoreState:
    """See the module docstring. `clock` gives seconds; `expired` are reservations whose extents
    wait for the fence before they are freed."""

    config: StoreConfig
    clock: Callable[[], float]
    table: BlockTable
    catalog: Catalog
    dram: DramTier
    ssd: SsdTier
    residency: Residency
    expiry: Expiry
    retention: RetentionTable
    leases: LeaseTable
    mappings: MappingTable
    reservations: ReservationTable
    events: BlockEvents
    lock: threading.Lock
    room: threading.Condition
    counters: StoreCounters = field(default_factory=StoreCounters)
    health: HealthBoard = field(default_factory=HealthBoard)
    io: IoGate = field(default_factory=IoGate)
    breaker: SegmentBreaker = field(default_factory=SegmentBreaker)
    read_failed: Callable[[int, str], None] = field(default=_nobody_told)
    """(row, why): a pinned row could not be read from SSD; called without the lock. Tied late to
    `MediaTroubles`."""
    rotten: Callable[[int, str], None] = field(default=_nobody_told)
    """Likewise: a pinned row was read, and has wrong bytes wherever it lies."""
    holder_of: Callable[[str], str] = str
    lease_shares: LeaseShares | None = None
    expired: list[HeldReservation] = field(default_factory=list)
    generation: int = 0
    closed: bool = False

    def share_leases(self, rule: ShareRule) -> None:
        """From now on no holder may lease more than its share."""
        with self.lock:
            self.holder_of = rule.holder_of
            self.lease_shares = LeaseShares(self.table, self.leases, self.ssd.capacity_bytes, rule)

    def check_open(self) -> None:
        """Raises Unavailable after `close`."""
        if self.closed:
            raise Unavailable("the store is closed", reason="closed")

    def end_lease(self, lease: Lease) -> None:
        """What a lease that has left the table held is free; needs the lock. Notify `room`."""
        if lease.mapping is not None:
            # First the guard, so that no reader trusts bytes that may change from here on.
            self.mappings.end(lease.mapping)
            self.residency.unpin_rows(lease.mapping.rows)
        # Numpy indexes by its own integers twice as fast as by shorter ones.
        self.residency.touch(lease.rows.astype(np.intp))
        self.residency.unlease(lease.rows)

    def reap(self) -> bool:
        """End what has expired; needs the lock. True if extents wait for the fence."""
        now = self.clock()
        for lease in self.leases.expire(now):
            self.end_lease(lease)
        for held in self.reservations.expire(now):
            self.residency.hide_pending(held.row)
            self.expired.append(held)
        return bool(self.expired)

"""Leases: who may read which rows until when. Pure; `now` is passed in, in seconds."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from dualpath.kvstore.mapping_table import Mapping
from dualpath.transfer.errors import LeaseExpired, Overloaded, PermissionDenied
from numpy.typing import NDArray

LEASED_BLOCKS_MAX = 1 << 26
"""Four bytes each: what leases take is bounded by 256 MiB."""


@dataclass(slots=True)
class Lease:
    """A held prefix: row i of `rows` is its block i."""

    id: int
    owner: str
    rows: NDArray[np.int32]
    namespace: int
    expires: float
    holder: str = ""
    """Whose share it is of."""
    nbytes: int = 0
    mapping: Mapping | None = None
    """Its pinned copies in DRAM."""


class LeaseTable:
    """Grants, renews and ends leases. Not thread-safe; counts on rows are the caller's."""

    def __init__(
        self, leases_max: int, first_id: int = 1, *, blocks_max: int = LEASED_BLOCKS_MAX
    ) -> None:
        self._max = leases_max
        self._blocks_max = blocks_max
        self._blocks = 0
        self.nbytes = 0
        """Of all leases' blocks, each as often as it is leased."""
        self._next = first_id
        self._leases: dict[int, Lease] = {}
        self._expiries: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def grant(
        self,
        owner: str,
        rows: NDArray[np.int32],
        namespace: int,
        now: float,
        lease_s: float,
        *,
        holder: str = "",
        nbytes: int = 0,
    ) -> Lease:
        """A new lease of blocks with `nbytes` of slots. Raises Overloaded at `leases_max` or
        `blocks_max`."""
        if len(self._leases) >= self._max:
            raise Overloaded(
                f"{self._max} leases are held; release some or retry", retry_after_s=1.0
            )
        if self._blocks + len(rows) > self._blocks_max:
            raise Overloaded(
                f"{self._blocks} blocks are leased, {self._blocks_max} at most, each counted as "
                "often as it is; release some leases or retry",
                retry_after_s=1.0,
            )
        self._blocks += len(rows)
        lease = Lease(self._next, owner, rows, namespace, now + lease_s, holder, nbytes)
        self.nbytes += nbytes
        self._next += 1
        self._leases[lease.id] = lease
        heapq.heappush(self._expiries, (lease.expires, lease.id))
        return lease

    def rows_of(self, holder: str) -> Iterator[NDArray[np.int32]]:
        """The rows of each lease of a holder."""
        return (lease.rows for lease in self._leases.values() if lease.holder == holder)

    def find(self, lease_id: int, now: float) -> Lease:
        """A live lease. Raises LeaseExpired."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.expires <= now:
            raise LeaseExpired(f"lease {lease_id} has expired or never existed; look up again")
        return lease

    def renew(self, lease_id: int, owner: str, now: float, lease_s: float) -> None:
        """Extend from now, also shorten. Raises LeaseExpired, PermissionDenied."""
        lease = self.find(lease_id, now)
        _check_owner(lease, owner)
        lease.expires = now + lease_s
        heapq.heappush(self._expiries, (lease.expires, lease_id))

    def release(self, lease_id: int, owner: str) -> Lease | None:
        """End a lease; None if it is unknown. Raises PermissionDenied."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return None
        _check_owner(lease, owner)
        return self._end(lease_id)

    def _end(self, lease_id: int) -> Lease:
        lease = self._leases.pop(lease_id)
        self._blocks -= len(lease.rows)
        self.nbytes -= lease.nbytes
        return lease

    def expire(self, now: float) -> list[Lease]:
        """End the leases whose time is over."""
        ended = []
        while self._expiries and self._expiries[0][0] <= now:
            _, lease_id = heapq.heappop(self._expiries)
            lease = self._leases.get(lease_id)
            if lease is not None and lease.expires <= now:
                ended.append(self._end(lease_id))
        if len(self._expiries) > 2 * len(self._leases) + 64:
            # Renewals and releases leave stale entries behind: bound them.
            self._expiries = [(lease.expires, lease.id) for lease in self._leases.values()]
            heapq.heapify(self._expiries)
        return ended

    def forget(self, owner: str) -> list[Lease]:
        """End all leases of an owner."""
        gone = [lease for lease in self._leases.values() if lease.owner == owner]
        for lease in gone:
            self._end(lease.id)
        return gone


def _check_owner(lease: Lease, owner: str) -> None:
    if lease.owner != owner:
        raise PermissionDenied(f"lease {lease.id} is held by another owner than {owner!r}")

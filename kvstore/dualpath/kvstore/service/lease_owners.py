"""Which attachment or principal holds which lease.

The store checks owners on renew and release, but not on fetch, which is its fast path; the
service checks here, before it reads for anybody, and whether the principal may still read there:
a lease is no right. Holds one small record a live lease; records of leases that ended by expiry
are pruned. Used from the event loop only.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from dualpath.transfer.errors import LeaseExpired, PermissionDenied

FOREIGN = "lease_foreign"
"""Reason of a refusal: the lease is somebody else's."""


@dataclass(slots=True)
class _Held:
    owner: str
    expires_at: float
    principal: str
    namespace_id: bytes


class LeaseOwners:
    """Owner, expiry, principal and namespace of each lease that this daemon has given out.
    `on_change` hears of each lease that a principal gets (1) and loses (-1); `require` raises
    PermissionDenied for one that may not read in a namespace any more."""

    def __init__(
        self,
        on_change: Callable[[str, int], None] = lambda *_: None,
        require: Callable[[str, bytes], None] = lambda *_: None,
    ) -> None:
        self._on_change = on_change
        self._require = require
        self._leases: dict[int, _Held] = {}
        self._expiries: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def put(
        self,
        lease_id: int,
        owner: str,
        expires_at: float,
        principal: str = "",
        namespace_id: bytes = b"",
    ) -> None:
        """Record a new lease. `expires_at` in seconds, monotonic."""
        if lease_id not in self._leases:
            self._on_change(principal, 1)
        self._leases[lease_id] = _Held(owner, expires_at, principal, namespace_id)
        heapq.heappush(self._expiries, (expires_at, lease_id))

    def renewed(self, lease_id: int, expires_at: float) -> None:
        """It ends at another time; unknown ones are ignored."""
        held = self._leases.get(lease_id)
        if held is not None:
            held.expires_at = expires_at
            heapq.heappush(self._expiries, (expires_at, lease_id))

    def remove(self, lease_id: int) -> None:
        """The lease was released; unknown ones are ignored."""
        record = self._leases.pop(lease_id, None)
        if record is not None:
            self._on_change(record.principal, -1)

    def forget_owner(self, owner: str) -> None:
        """The owner's attachment is gone, and its leases with it."""
        gone = [lease for lease, held in self._leases.items() if held.owner == owner]
        for lease in gone:
            self.remove(lease)

    def check(self, lease_id: int, owner: str) -> None:
        """Raises LeaseExpired (unknown or over), PermissionDenied (another's, or its right to read
        is gone)."""
        held = self._held(lease_id)
        if held.owner != owner:
            raise PermissionDenied(
                f"lease {lease_id} is another's: ask its owner for a ticket", reason=FOREIGN
            )
        self._require(held.principal, held.namespace_id)

    def check_delegated(self, lease_id: int) -> None:
        """As `check`, for whoever shows a ticket of this lease: the right is its owner's."""
        held = self._held(lease_id)
        self._require(held.principal, held.namespace_id)

    def namespace_of(self, lease_id: int) -> bytes:
        """In which its blocks are. Raises LeaseExpired."""
        return self._held(lease_id).namespace_id

    def prune(self, now: float) -> None:
        """Drop the records of leases that have expired."""
        while self._expiries and self._expiries[0][0] <= now:
            _, lease_id = heapq.heappop(self._expiries)
            record = self._leases.get(lease_id)
            if record is not None and record.expires_at <= now:
                self.remove(lease_id)
        if len(self._expiries) > 2 * len(self._leases) + 64:
            # Renewals and releases leave stale entries behind: bound them.
            self._expiries = [(held.expires_at, lease) for lease, held in self._leases.items()]
            heapq.heapify(self._expiries)

    def _held(self, lease_id: int) -> _Held:
        held = self._leases.get(lease_id)
        if held is None:
            raise LeaseExpired(f"lease {lease_id} is not known or over: look up again")
        return held

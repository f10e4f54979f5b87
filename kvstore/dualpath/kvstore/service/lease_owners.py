"""Which attachment or principal holds which lease.

The store checks owners on renew and release, but not on fetch, which is its fast path; the
service checks here, before it reads for anybody. Holds one small record a live lease; records of
leases that ended by expiry are pruned. Used from the event loop only.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from dualpath.transfer.errors import LeaseExpired, PermissionDenied


class LeaseOwners:
    """Owner, expiry and principal of each lease that this daemon has given out. `on_change` hears
    of each lease that a principal gets (1) and loses (-1)."""

    def __init__(self, on_change: Callable[[str, int], None] = lambda *_: None) -> None:
        self._on_change = on_change
        self._leases: dict[int, tuple[str, float, str]] = {}
        self._expiries: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def put(self, lease_id: int, owner: str, expires_at: float, principal: str = "") -> None:
        """Record a new or renewed lease. `expires_at` in seconds, monotonic."""
        if lease_id not in self._leases:
            self._on_change(principal, 1)
        self._leases[lease_id] = (owner, expires_at, principal)
        heapq.heappush(self._expiries, (expires_at, lease_id))

    def remove(self, lease_id: int) -> None:
        """The lease was released; unknown ones are ignored."""
        record = self._leases.pop(lease_id, None)
        if record is not None:
            self._on_change(record[2], -1)

    def forget_owner(self, owner: str) -> None:
        """The owner's attachment is gone, and its leases with it."""
        gone = [lease for lease, (holder, *_) in self._leases.items() if holder == owner]
        for lease in gone:
            self.remove(lease)

    def check(self, lease_id: int, owner: str) -> None:
        """Raises LeaseExpired (unknown or over), PermissionDenied (another's)."""
        record = self._leases.get(lease_id)
        if record is None:
            raise LeaseExpired(f"lease {lease_id} is not known or over: look up again")
        if record[0] != owner:
            raise PermissionDenied(
                f"lease {lease_id} is another's: ask its owner for a ticket", reason="lease_foreign"
            )

    def prune(self, now: float) -> None:
        """Drop the records of leases that have expired."""
        while self._expiries and self._expiries[0][0] <= now:
            _, lease_id = heapq.heappop(self._expiries)
            record = self._leases.get(lease_id)
            if record is not None and record[1] <= now:
                self.remove(lease_id)
        if len(self._expiries) > 2 * len(self._leases) + 64:
            # Renewals and releases leave stale entries behind: bound them.
            self._expiries = [(record[1], lease) for lease, record in self._leases.items()]
            heapq.heapify(self._expiries)

"""What every call that uses the store has to pass: readiness, rights, limits.

Owns nothing but the order of the checks, so that all ways in (gRPC, streams, local sockets) ask the
same. Each check raises what the caller is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from dualpath.kvstore.service.access import Access
from dualpath.kvstore.service.principal import Rights
from dualpath.kvstore.service.quotas import Quotas
from dualpath.kvstore.service.readiness import Readiness


@dataclass(frozen=True, slots=True)
class Held:
    """What a principal holds, of what attachments know: blocks being written, their slots'
    bytes, joined receivers."""

    reservations: int = 0
    reserved_bytes: int = 0
    attachments: int = 0


@dataclass(slots=True)
class Gate:
    """See the module docstring. `held` tells what each principal holds."""

    readiness: Readiness
    access: Access
    quotas: Quotas
    held: Callable[[], Mapping[str, Held]]

    def admit_lookup(self, principal: str, namespace_id: bytes, *, leased: bool) -> None:
        """Before a look-up, with a lease or without. Raises PermissionDenied, Overloaded,
        Unavailable (draining: a lease would be new work)."""
        self.access.require(principal, namespace_id, Rights.READ)
        self.quotas.lookup(principal)
        if leased:
            self.readiness.check_admits()
            if self.quotas.limits(principal).leases:
                usage = self.quotas.usage(principal)
                self.quotas.check(principal, "leases", usage.leases, 1, "leases")

    @contextmanager
    def reserving(
        self, principal: str, namespace_id: bytes, slot_bytes: int, blocks: int
    ) -> Iterator[int]:
        """Around a reservation of `blocks`: yields how many of them the principal may have, at
        least one. Raises PermissionDenied, Overloaded, Unavailable."""
        self.access.require(principal, namespace_id, Rights.WRITE)
        self.readiness.check_admits()
        with self.holding(principal, slot_bytes, blocks) as room:
            yield room

    @contextmanager
    def holding(self, principal: str, slot_bytes: int, blocks: int) -> Iterator[int]:
        """`reserving` for a stream that was admitted: limits only. Raises Overloaded."""
        held, quotas = self.held().get(principal, Held()), self.quotas
        limits, usage = quotas.limits(principal), quotas.usage(principal)
        # What calls beside this one may be about to get counts as held.
        count = held.reservations + usage.reserving
        nbytes = held.reserved_bytes + usage.reserving_bytes
        quotas.check(principal, "reservations", count, 1, "reservations")
        quotas.check(principal, "reserved_bytes", nbytes, slot_bytes, "bytes reserved")
        room = blocks
        if limits.reservations:
            room = min(room, limits.reservations - count)
        if limits.reserved_bytes:
            room = min(room, (limits.reserved_bytes - nbytes) // slot_bytes)
        quotas.reserving(principal, room, room * slot_bytes)
        try:
            yield room
        finally:
            quotas.reserving(principal, -room, -room * slot_bytes)

    def admit_attach(self, principal: str) -> None:
        """Before a receiver joins. Raises PermissionDenied, Overloaded, Unavailable."""
        self.access.require_admitted(principal)
        self.readiness.check_admits()
        held = self.held().get(principal, Held())
        self.quotas.check(principal, "attachments", held.attachments, 1, "attachments")

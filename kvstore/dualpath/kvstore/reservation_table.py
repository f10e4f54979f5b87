"""Reservations: who writes which row until when. Pure; `now` is passed in, in seconds."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from dualpath.transfer.errors import Overloaded, PermissionDenied


@dataclass(frozen=True, slots=True)
class HeldReservation:
    """An unsealed block."""

    id: int
    owner: str
    row: int
    expires: float


class ReservationTable:
    """Not thread-safe."""

    def __init__(self, reservations_max: int, first_id: int = 1) -> None:
        self._max = reservations_max
        self._next = first_id
        self._held: dict[int, HeldReservation] = {}
        self._expiries: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._held)

    @property
    def is_full(self) -> bool:
        """Whether `reservations_max` are open."""
        return len(self._held) >= self._max

    def check_room(self, more: int) -> None:
        """Raises Overloaded if `more` do not fit."""
        if len(self._held) + more > self._max:
            raise Overloaded(
                f"{len(self._held)} reservations are open and {more} asked for, the most is "
                f"{self._max}; seal or abandon some",
                retry_after_s=1.0,
            )

    def hold(self, owner: str, row: int, now: float, ttl_s: float) -> HeldReservation:
        """A new reservation."""
        held = HeldReservation(self._next, owner, row, now + ttl_s)
        self._next += 1
        self._held[held.id] = held
        heapq.heappush(self._expiries, (held.expires, held.id))
        return held

    def find(self, reservation_id: int, owner: str) -> HeldReservation | None:
        """An open one; None if unknown. Raises PermissionDenied for another owner's."""
        held = self._held.get(reservation_id)
        if held is not None and held.owner != owner:
            raise PermissionDenied(
                f"reservation {reservation_id} is held by another owner than {owner!r}"
            )
        return held

    def end(self, reservation_id: int) -> None:
        """Close one."""
        self._held.pop(reservation_id, None)

    def expire(self, now: float) -> list[HeldReservation]:
        """Close those whose time is over."""
        ended = []
        while self._expiries and (
            self._expiries[0][0] <= now or self._expiries[0][1] not in self._held
        ):
            _, reservation_id = heapq.heappop(self._expiries)
            held = self._held.pop(reservation_id, None)
            if held is not None:
                ended.append(held)
        return ended

    def forget(self, owner: str) -> list[HeldReservation]:
        """Close all of an owner."""
        gone = [held for held in self._held.values() if held.owner == owner]
        for held in gone:
            del self._held[held.id]
        return gone

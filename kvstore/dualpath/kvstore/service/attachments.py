"""Who is joined to the data plane.

Owns the sessions: a secret of 16 random bytes authenticates an attachment on later calls and maps
to its public `peer_id`, its transport and its incoming blocks. Guarantees that an attachment whose
data connection is lost, or was never made, loses its session at once and its leases, reservations
and queued deliveries soon after, fenced first. Used from the event loop, but `peer_lost`, which
transports call from their threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from dualpath.kvstore.service.auth import Caller
from dualpath.kvstore.service.gate import Held
from dualpath.kvstore.service.incoming import IncomingBlocks
from dualpath.kvstore.service.shares import Shares
from dualpath.kvstore.store_api import Store
from dualpath.transfer.errors import InvalidRequest, PeerLost, PermissionDenied
from dualpath.transfer.transport import INVITATION_TTL_S, Transport

SESSION_BYTES = 16
ATTACHMENTS_MAX = 512
NAME_CHARS_MAX = 64
CONNECT_S_MAX = INVITATION_TTL_S + 5.0
"""An attachment that has not connected after this long is dropped."""

_log = logging.getLogger(__name__)
_ODD_CHARS = re.compile(r"[^A-Za-z0-9_.-]")


@dataclass(frozen=True, slots=True)
class Plane:
    """A transport that callers may choose, and the address to dial it at."""

    transport: Transport
    address: str
    local_only: bool


def rail_name(transport: str, rail: int) -> str:
    """Name of the plane of a rail: the first is called as its transport."""
    return f"{transport}#{rail}" if rail else transport


@dataclass(slots=True, eq=False)
class Attachment:
    """One receiver of ours. `attached_at` in seconds of the monotonic clock."""

    peer_id: str
    principal: str
    plane: Plane
    incoming: IncomingBlocks
    attached_at: float
    connected: bool = False
    lost: str = ""
    """Why it ended, "" while it lives."""
    on_lost: Callable[[], None] | None = field(default=None, repr=False)
    sharer: str = ""
    """Of whose share it is; see `Caller`."""
    name: str = ""
    """What it calls itself, cleaned: many attachments may have the same."""


class Attachments:
    """See the module docstring. `on_drop` is called with each lost peer_id, in the loop."""

    def __init__(
        self,
        store: Store,
        planes: Mapping[str, Plane],
        executor: Executor,
        on_drop: Callable[[str], None],
    ) -> None:
        self._store = store
        self._planes = planes
        self._executor = executor
        self._on_drop = on_drop
        self.control_port = 0
        """Where gRPC listens on all addresses, 0 if it does so on one."""
        self._loop = asyncio.get_running_loop()
        # By SHA-256 of the session, so that the look-up's timing tells nothing about secrets.
        self._by_session: dict[bytes, Attachment] = {}
        self._sessions: dict[str, bytes] = {}
        self._by_peer: dict[str, Attachment] = {}
        self._shares = Shares(ATTACHMENTS_MAX, "attachments", retry_after_s=5.0)
        self._unfenced: dict[str, Attachment] = {}  # those, and the lost ones until fenced
        self._drops: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self._by_peer)

    def __iter__(self) -> Iterator[Attachment]:
        return iter(list(self._by_peer.values()))

    def rails(self, transport: str) -> list[tuple[str, str]]:
        """Data and control address of each link by which a transport can be reached, if it is more
        than one; the latter is "" for the one that was dialled."""
        planes: list[Plane] = []
        while plane := self._planes.get(rail_name(transport, len(planes))):
            planes.append(plane)
        if len(planes) < 2:
            return []
        port = self.control_port
        return [
            (plane.address, f"{plane.address.rpartition(':')[0]}:{port}" if port else "")
            for plane in planes
        ]

    def attach(
        self, name: str, transports: Sequence[str], caller: Caller, *, now: float, rail: int = 0
    ) -> tuple[Attachment, bytes, bytes]:
        """Make an attachment; return it with its session and its invitation.

        Raises InvalidRequest (no transport in common, no such rail), Overloaded.
        """
        plane = self._choose(transports, rail, local=caller.local_socket)
        clean = _ODD_CHARS.sub("_", name)[:NAME_CHARS_MAX] or "peer"
        peer_id = f"{clean}-{secrets.token_hex(4)}"
        while peer_id in self._by_peer:
            peer_id = f"{clean}-{secrets.token_hex(4)}"
        session = secrets.token_bytes(SESSION_BYTES)
        self._shares.take(caller.sharer)
        try:
            invitation = plane.transport.invite(peer_id)
        except BaseException:
            self._shares.give_back(caller.sharer)
            raise
        incoming = IncomingBlocks(self._store, plane.transport, peer_id, caller.principal)
        attachment = Attachment(
            peer_id, caller.principal, plane, incoming, now, sharer=caller.sharer, name=clean
        )
        digest = _digest(session)
        self._by_session[digest] = attachment
        self._sessions[peer_id] = digest
        self._by_peer[peer_id] = self._unfenced[peer_id] = attachment
        return attachment, session, invitation

    def held(self) -> Mapping[str, Held]:
        """What each principal holds. From any thread."""
        found: dict[str, list[int]] = {}
        for attachment in list(self._by_peer.values()):
            sums = found.setdefault(attachment.principal, [0, 0, 0])
            for index, more in enumerate((*attachment.incoming.held, 1)):
                sums[index] += more
        return {principal: Held(*sums) for principal, sums in found.items()}

    def drop_principals(self, gone: Callable[[str], bool], reason: str) -> None:
        """End the attachments whose principal is `gone`."""
        for attachment in self:
            if gone(attachment.principal):
                self.drop(attachment.peer_id, reason)

    def of_session(self, session: bytes, caller: Caller) -> Attachment:
        """The attachment of a session. Raises PermissionDenied, reason `session`."""
        attachment = self._by_session.get(_digest(session))
        if attachment is None or attachment.principal != caller.principal:
            raise PermissionDenied(
                "session: unknown or ended (its data connection was lost, or the daemon "
                "restarted); attach again",
                reason="session",
            )
        return attachment

    def of_peer(self, peer_id: str) -> Attachment | None:
        """The live attachment of that name. From any thread."""
        return self._by_peer.get(peer_id)

    def peer_lost(self, peer_id: str, reason: str) -> None:
        """A transport lost the connection to `peer_id`. From any thread."""
        try:
            self._loop.call_soon_threadsafe(self.drop, peer_id, reason)
        except RuntimeError:
            _log.debug("attachment %s ended after the loop: %s", peer_id, reason)

    def drop(self, peer_id: str, reason: str) -> None:
        """End an attachment; unknown ones are ignored."""
        attachment = self._by_peer.pop(peer_id, None)
        if attachment is None:
            return
        self._shares.give_back(attachment.sharer)
        _log.info("attachment %s ended: %s", peer_id, reason)
        attachment.lost = reason or "lost"
        self._by_session.pop(self._sessions.pop(peer_id), None)
        self._on_drop(peer_id)
        if attachment.on_lost is not None:
            attachment.on_lost()
        drop = self._loop.run_in_executor(self._executor, _let_go, attachment)
        self._drops.add(drop)
        drop.add_done_callback(self._drops.discard)
        drop.add_done_callback(lambda _: self._unfenced.pop(peer_id))

    def reap(self, now: float) -> None:
        """Drop attachments that never connected within CONNECT_S_MAX."""
        unproven = [each for each in self._by_peer.values() if not each.connected]
        if not unproven:
            return
        seen = {
            traffic.peer
            for plane in self._planes.values()
            for traffic in plane.transport.traffic()
            if traffic.connected
        }
        for attachment in unproven:
            if attachment.peer_id in seen:
                attachment.connected = True
            elif now - attachment.attached_at > CONNECT_S_MAX:
                self.drop(attachment.peer_id, "it never connected to the data plane")

    def fence_expired(self, reservation_ids: Collection[int]) -> None:
        """Fence reservations that the store lets expire. From any thread."""
        for attachment in list(self._unfenced.values()):
            attachment.incoming.fence_expired(reservation_ids)

    async def close(self, deadline_s: float) -> None:
        """Drop all, and wait until they are fenced."""
        for peer_id in list(self._by_peer):
            self.drop(peer_id, "the daemon is stopping")
        if self._drops:
            await asyncio.wait(set(self._drops), timeout=deadline_s)

    def _choose(self, transports: Collection[str], rail: int, *, local: bool) -> Plane:
        offered = [name for name, plane in self._planes.items() if local or not plane.local_only]
        for name in transports:
            if name in offered:
                plane = self._planes.get(rail_name(name, rail))
                if plane is None:
                    raise InvalidRequest(f"rail: {name} has no rail {rail} here; attach anew")
                return plane
        hint = "" if local else " (shm only over the Unix socket)"
        raise InvalidRequest(
            f"transports: none of {list(transports)} can be used here; offered: {offered}{hint}"
        )


def check_alive(attachment: Attachment) -> None:
    """Raises PeerLost if the attachment ended meanwhile."""
    if attachment.lost:
        raise PeerLost(f"attachment {attachment.peer_id} ended: {attachment.lost}")


def _let_go(attachment: Attachment) -> None:
    try:
        attachment.plane.transport.disconnect(attachment.peer_id)
        attachment.incoming.close()
    except Exception:  # noqa: BLE001 - a fire-and-forget task: nobody else would say so
        _log.exception("attachment %s was not dropped cleanly", attachment.peer_id)


def _digest(session: bytes) -> bytes:
    return hashlib.sha256(session).digest()

"""The `memory` transport: peers of one process, joined by a hub. The reference of the port.

A worker thread per transport carries out its writes one at a time in the order of lanes, by
copying under the landing's lock; a clock thread ends those whose deadline passes. So a run with
one writer is deterministic, and nothing but the two regions is involved.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence

from dualpath.transfer.errors import InvalidRequest, PeerLost, PermissionDenied, Unavailable
from dualpath.transfer.invitations import Invitations, check_peer_name
from dualpath.transfer.landing import Landing
from dualpath.transfer.ledger import Ledger
from dualpath.transfer.outbox import Outbox, PendingWrite, check_batch, check_write, deliver
from dualpath.transfer.region import Region, RegionDescriptor, check_on_host
from dualpath.transfer.slice_copy import copy_slices
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices
from dualpath.transfer.table_copy import land_some
from dualpath.transfer.transport import (
    OnArrival,
    OnBatchCompletion,
    OnCompletion,
    OnHashed,
    OnPeerLost,
    PeerTraffic,
    Write,
    WriteBatch,
    WriteStatus,
)
from dualpath.transfer.window import WindowTable

QUEUE_BYTES_MAX = 256 << 20
JOIN_S = 5.0

_log = logging.getLogger(__name__)


class MemoryHub:
    """Where the transports of a process find each other. Addresses are names in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listening: dict[str, MemoryTransport] = {}

    def add(self, address: str, transport: MemoryTransport) -> None:
        """Let `transport` be found at `address`. Raises Unavailable if that is taken."""
        with self._lock:
            if address in self._listening:
                raise Unavailable(f"memory address {address!r} is in use; choose another")
            self._listening[address] = transport

    def find(self, address: str) -> MemoryTransport:
        """The transport at `address`. Raises Unavailable."""
        with self._lock:
            found = self._listening.get(address)
        if found is None:
            raise Unavailable(f"nobody listens at memory address {address!r}")
        return found

    def remove(self, address: str) -> None:
        """Forget `address`."""
        with self._lock:
            self._listening.pop(address, None)


class _Link:
    """One direction of a connection: what this side has to write to `remote`."""

    def __init__(self, peer: str, remote: MemoryTransport, queue_bytes_max: int) -> None:
        self.peer = peer
        self.remote = remote
        self.back: _Link | None = None  # the other direction
        self.outbox = Outbox(peer, queue_bytes_max)
        self.reading = threading.Lock()  # held while a source is read


class MemoryTransport:
    """See the port's contract."""

    def __init__(
        self,
        name_of_self: str,
        on_peer_lost: OnPeerLost,
        hub: MemoryHub,
        *,
        queue_bytes_max: int = QUEUE_BYTES_MAX,
    ) -> None:
        self._own_name = check_peer_name(name_of_self)
        self._on_peer_lost = on_peer_lost
        self._hub = hub
        self._queue_bytes_max = queue_bytes_max
        self._windows = WindowTable()
        self._invitations = Invitations()
        self._ledger = Ledger()
        self._changed = threading.Condition()  # guards what follows and the outboxes
        self._links: dict[str, _Link] = {}
        self._address = ""
        self._closed = False
        self._threads = tuple(
            threading.Thread(target=target, name=f"dualpath-{role}-{name_of_self}", daemon=True)
            for role, target in (("memory", self._work), ("clock", self._watch_deadlines))
        )
        for thread in self._threads:
            thread.start()

    @property
    def name(self) -> str:
        """`memory`."""
        return "memory"

    @property
    def address(self) -> str:
        """Where peers dial, "" before `listen`."""
        return self._address

    def listen(self, address: str) -> str:
        """See Transport.listen; the address is any name that is free in the hub."""
        if not address:
            raise InvalidRequest("a memory address is a name, not an empty string")
        if self._address:
            raise InvalidRequest(f"this transport listens at {self._address} already")
        self._hub.add(address, self)
        self._address = address
        return address

    def invite(self, peer: str) -> bytes:
        """See Transport.invite."""
        return self._invitations.issue(peer, time.monotonic())

    def connect(self, peer: str, address: str, invitation: bytes, *, deadline_s: float) -> None:
        """See Transport.connect."""
        remote = self._hub.find(address)
        invited = remote._invitations.redeem(invitation, time.monotonic())
        if not invited:
            raise PermissionDenied(f"{peer!r} has no such invitation: it is wrong, used or expired")
        self._drop(peer, "replaced by a new connection")
        remote._drop(invited, "replaced by a new connection")
        here = _Link(peer, remote, self._queue_bytes_max)
        there = _Link(invited, self, remote._queue_bytes_max)
        here.back, there.back = there, here
        remote._add(there)
        self._add(here)

    def disconnect(self, peer: str) -> None:
        """See Transport.disconnect."""
        self._drop(peer, "disconnected")

    def expose(
        self,
        region: Region,
        offset: int,
        nbytes: int,
        on_arrival: OnArrival,
        *,
        on_hashed: OnHashed | None = None,
    ) -> RegionDescriptor:
        """See Transport.expose."""
        return self._windows.expose(region, offset, nbytes, on_arrival, on_hashed=on_hashed)

    def arm(self, window: RegionDescriptor, targets: Sequence[tuple[int, Slices]]) -> None:
        """See Transport.arm."""
        self._windows.arm(window, targets)

    def arm_table(self, window: RegionDescriptor, first_tag: int, targets: SliceTable) -> None:
        """See Transport.arm_table."""
        self._windows.arm_table(window, first_tag, targets)

    def disarm(self, window: RegionDescriptor, tags: Collection[int]) -> frozenset[int]:
        """See Transport.disarm."""
        return self._windows.disarm(window, tags)

    def revoke(self, window: RegionDescriptor) -> None:
        """See Transport.revoke."""
        self._windows.revoke(window)

    def place(self, window: RegionDescriptor, tag: int, target: Slices, source: memoryview) -> str:
        """See Transport.place."""
        return self._windows.place(window, tag, target, source)

    def write(self, peer: str, write: Write, on_completion: OnCompletion) -> None:
        """See Transport.write."""
        self.write_truncated(peer, write, -1, on_completion)

    def write_batch(self, peer: str, batch: WriteBatch, on_completion: OnBatchCompletion) -> None:
        """See Transport.write_batch."""
        check_batch(batch)
        check_on_host(batch.source)
        with self._changed:
            self._link(peer).outbox.add_batch(batch, on_completion, time.monotonic())
            self._changed.notify_all()

    def write_truncated(
        self, peer: str, write: Write, nbytes: int, on_completion: OnCompletion
    ) -> None:
        """Carry out only the first `nbytes` bytes of `write`, then end the connection."""
        check_write(write)
        check_on_host(write.source)
        with self._changed:
            pending = self._link(peer).outbox.add(write, on_completion, time.monotonic())
            pending.truncate_at = nbytes
            self._changed.notify_all()

    def _link(self, peer: str) -> _Link:
        link = self._links.get(peer)
        if link is None:
            raise PeerLost(f"{peer!r} is not connected")
        return link

    def traffic(self) -> Sequence[PeerTraffic]:
        """See Transport.traffic."""
        with self._changed:
            queued = {peer: link.outbox.queued_bytes for peer, link in self._links.items()}
        return self._ledger.traffic(queued)

    def close(self) -> None:
        """See Transport.close."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            links = list(self._links)
            self._changed.notify_all()
        if self._address:
            self._hub.remove(self._address)
        self._windows.close()
        for peer in links:
            self._drop(peer, "closed", closing=True)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(JOIN_S)

    def __repr__(self) -> str:
        with self._changed:
            peers = ", ".join(sorted(self._links)) or "no peers"
        return f"<MemoryTransport {self._own_name!r} at {self._address!r}: {peers}>"

    # Connections.

    def _add(self, link: _Link) -> None:
        with self._changed:
            if self._closed:
                raise Unavailable("the transport is closed", reason="closed")
            self._links[link.peer] = link
            self._ledger.of(link.peer, self._links)

    def _drop(self, peer: str, reason: str, *, closing: bool = False) -> None:
        with self._changed:
            link = self._links.get(peer)
        if link is None:
            return
        self._end(link, reason, WriteStatus.CLOSED if closing else WriteStatus.LOST)
        if link.back is not None:
            link.remote._end(link.back, f"{self._own_name} {reason}", WriteStatus.LOST)

    def _end(self, link: _Link, reason: str, status: WriteStatus) -> None:
        with self._changed:
            if self._links.get(link.peer) is not link:
                return
            del self._links[link.peer]
            pending = link.outbox.drain()
        with link.reading:
            pass  # the copy under way, if any, sees that its write has ended before its next step
        for each in pending:
            deliver(link.peer, each, status, reason)
        if status is not WriteStatus.CLOSED:
            self._call_lost(link.peer, reason)

    def _call_lost(self, peer: str, reason: str) -> None:
        try:
            self._on_peer_lost(peer, reason)
        except Exception:  # noqa: BLE001 - a callback of others
            _log.exception("on_peer_lost of %r raised", peer)

    # Threads.

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                found = self._next()
                if found is None:
                    self._changed.wait()
                    continue
                link, pending = found
                late = pending.deadline <= time.monotonic()
                settled = link.outbox.settle(pending.ident) if late else None
            if not late:
                self._carry_out(link, pending)
            elif settled is not None:
                deliver(link.peer, pending, WriteStatus.EXPIRED, "deadline")

    def _next(self) -> tuple[_Link, PendingWrite] | None:
        for link in self._links.values():
            fragment = link.outbox.next_fragment(1 << 62)
            if fragment is not None:
                # The next round starts with the peers behind this one.
                self._links[link.peer] = self._links.pop(link.peer)
                return link, fragment.pending
        return None

    def _carry_out(self, link: _Link, pending: PendingWrite) -> None:
        remote = link.remote
        known_as = link.back.peer if link.back is not None else self._own_name
        counters = remote._ledger.of(known_as, remote._links)
        first_tag, targets, sources = _tables(pending.write)
        window = pending.write.target
        landing = remote._windows.begin_table(
            known_as, window.key, window.generation, first_tag, targets
        )
        codes = dict.fromkeys(range(len(targets)), "no_window") if landing is None else {}
        if landing is not None:
            codes.update(landing.refused)
        if pending.truncate_at >= 0:
            self._cut_short(link, pending, landing)
            return
        at = 0
        while at < len(targets):
            with link.reading:
                if not self._is_pending(link, pending):
                    break
                last, digests = land_some(landing, pending.write.source.view, sources, at)
            if landing is not None and last > at:
                codes.update(remote._windows.land_parts(landing, at, last, digests))
            missed = [part for part in range(at, last) if part in codes] if codes else []
            counters.received_bytes += targets.bytes_of(at, last)
            counters.received_bytes -= sum(targets.sizes[part] for part in missed)
            counters.received_writes += last - at - len(missed)
            at = last
        if landing is not None and at < len(targets):
            remote._windows.abandon(landing, at)
        counters.refused_writes += len(codes)
        with self._changed:
            settled = link.outbox.settle(pending.ident)
        if settled is not None:
            self._ledger.of(link.peer, self._links).sent_bytes += pending.nbytes
            refused = {first_tag + part: reason for part, reason in codes.items()}
            _deliver_answered(link.peer, pending, refused)

    def _cut_short(self, link: _Link, pending: PendingWrite, landing: Landing | None) -> None:
        """Carry out the first bytes of a single write, and end the connection."""
        write, nbytes = pending.single, min(pending.truncate_at, pending.nbytes)
        if landing is not None:
            with link.reading, landing.lock:
                if landing.open and self._is_pending(link, pending):
                    copy_slices(
                        landing.view,
                        landing.slices.part(0, nbytes),
                        write.source.view,
                        write.source_slices.part(0, nbytes),
                    )
            link.remote._windows.abandon(landing)
        self._drop(link.peer, f"cut after {nbytes} bytes of a write")

    def _is_pending(self, link: _Link, pending: PendingWrite) -> bool:
        with self._changed:
            return link.outbox.has(pending.ident)

    def _watch_deadlines(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                links = list(self._links.values())
                expired = [(link, each) for link in links for each in link.outbox.expire(now)]
                if not expired:
                    deadlines = [link.outbox.next_deadline() for link in links]
                    known = [each for each in deadlines if each is not None]
                    self._changed.wait(max(0.0, min(known) - now) if known else None)
                    continue
            for link, each in expired:
                with link.reading:
                    pass
                deliver(link.peer, each, WriteStatus.EXPIRED, "deadline")


def _tables(write: Write | WriteBatch) -> tuple[int, SliceTable, SliceTable]:
    """The first tag, the targets and the sources."""
    if isinstance(write, WriteBatch):
        return write.first_tag, write.target_table, write.source_table
    return write.tag, SliceTable.of(write.target_slices), SliceTable.of(write.source_slices)


def _deliver_answered(peer: str, pending: PendingWrite, refused: Mapping[int, str]) -> None:
    if isinstance(pending.write, Write) and refused:
        deliver(peer, pending, WriteStatus.REFUSED, next(iter(refused.values())))
    else:
        deliver(peer, pending, WriteStatus.DONE, "", refused)

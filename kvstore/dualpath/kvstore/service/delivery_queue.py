"""What is delivered next: fair queues of granted chunks, without I/O, threads or clock.

Owns the order and the accounting of deliveries: loads before saves before background, with
`SAVE_FLOOR` of the bytes kept for the lower lanes; inside a lane round robin between principals,
between the attachments of a principal, and between the leases of an attachment, in turns of a few
chunks, or of many while nobody else waits. Bounds the bytes in flight of one attachment and of all;
near the total bound the share of one shrinks, so that receivers who do not read cannot take all of
it. The caller holds a lock around every method.
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from dualpath.transfer.errors import InvalidRequest, Overloaded
from dualpath.transfer.lane import SAVE_FLOOR, Lane
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.transport import BATCH_WRITES_MAX

GRANT_CHUNKS_MAX = 4096
GRANTS_MAX = 1024
"""Most grants of one attachment that have not been reported as done."""
REPORTS_MAX = 2 * GRANTS_MAX
QUEUED_CHUNKS_MAX = 1 << 16
"""Most queued chunks of one attachment, and most failed ones that it has not read of."""
_STALE_DEADLINES = 1024
"""Deadlines of grants that have nothing waiting any more, before they are swept out."""
FLOOR_DEBT_BYTES_MAX = 4 << 20
"""What the lower lanes can be owed at most, so that they never burst for long."""


class ChunkFailure(enum.IntEnum):
    """Why a chunk was not delivered; the numbers are those of the protocol."""

    LEASE_EXPIRED = 1
    CORRUPT = 2
    OVERLOADED = 3
    DEADLINE = 4
    REFUSED = 5
    PEER_LOST = 6
    CANCELLED = 7
    DENIED = 8
    INVALID = 9


NONE_FAILED: Mapping[int, ChunkFailure] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class GrantedChunks:
    """Chunks to write, at least one: where each is (indices of block and chunk), the receiver's
    tag, and where it goes."""

    blocks: Sequence[int]
    chunks: Sequence[int]
    tags: Sequence[int]
    targets: SliceTable

    def __len__(self) -> int:
        return len(self.tags)

    def part(self, first: int, last: int) -> GrantedChunks:
        """Chunks [first, last)."""
        chosen = slice(first, last)
        targets = self.targets.parts(first, last)
        return GrantedChunks(self.blocks[chosen], self.chunks[chosen], self.tags[chosen], targets)


@dataclass(frozen=True, slots=True)
class Grant:
    """Chunks of a lease that the receiver lets us write. `deadline_at` is on the clock of `now`,
    in seconds. `granted` is None once nothing of it waits."""

    grant_id: int
    lease_id: int
    window: RegionDescriptor
    lane: Lane
    deadline_at: float
    granted: GrantedChunks | None

    @property
    def nbytes(self) -> int:
        """Bytes of what may wait."""
        return 0 if self.granted is None else self.granted.targets.nbytes


@dataclass(frozen=True, slots=True)
class Progress:
    """What became known of a grant since the last report."""

    grant_id: int
    done: bool
    failures: tuple[tuple[int, ChunkFailure], ...]
    detail: str


@dataclass(slots=True, eq=False)
class _OpenGrant:
    grant: Grant
    taken: int = 0
    """Chunks that wait no more."""
    inflight: int = 0
    failures: list[tuple[int, ChunkFailure]] = field(default_factory=list)
    detail: str = ""

    @property
    def waiting(self) -> int:
        granted = self.grant.granted
        return 0 if granted is None else len(granted) - self.taken

    @property
    def done(self) -> bool:
        return self.grant.granted is None and self.inflight == 0

    def take(self, count: int) -> GrantedChunks:
        """The next chunks. Those that have gone need no memory, however late they are told of."""
        granted = self.grant.granted
        assert granted is not None
        first, self.taken = self.taken, self.taken + count
        part = granted if count == len(granted) else granted.part(first, self.taken)
        if self.taken == len(granted):
            self.grant = replace(self.grant, granted=None)
        return part


@dataclass(slots=True, eq=False)
class _Peer:
    name: str
    principal: str
    inflight_bytes: int = 0
    queued_bytes: int = 0
    queued_chunks: int = 0
    unread_failures: int = 0
    closed: bool = False
    # By lane, rings of leases; of each lease its grants with waiting chunks, in their order.
    rings: dict[Lane, OrderedDict[int, deque[_OpenGrant]]] = field(
        default_factory=lambda: {lane: OrderedDict() for lane in Lane}
    )
    grants: dict[int, _OpenGrant] = field(default_factory=dict)
    # Grants with something to report, in order.
    reports: dict[int, _OpenGrant] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """Chunks of one grant picked for delivery, with consecutive tags, at most BATCH_WRITES_MAX;
    hand each back by `finished`."""

    peer: str
    lease_id: int
    window: RegionDescriptor
    lane: Lane
    deadline_at: float
    granted: GrantedChunks
    nbytes: int
    _owner: _Peer
    _grant: _OpenGrant


class DeliveryQueue:
    """See the module docstring. Limits are in bytes: in flight for one attachment and for all;
    `turn_bytes` of one delivery while others wait on its lane, `batch_bytes` while none does. A
    delivery has at least one chunk."""

    def __init__(
        self,
        *,
        peer_inflight_bytes: int,
        inflight_bytes: int,
        batch_bytes: int = 0,
        turn_bytes: int = 0,
    ) -> None:
        self._peer_limit = peer_inflight_bytes
        self._limit = inflight_bytes
        self._batch_bytes = batch_bytes
        self._turn_bytes = turn_bytes
        self._peers: dict[str, _Peer] = {}
        # Rings of principals with waiting chunks, by lane; of each the ring of its attachments.
        self._rings: dict[Lane, OrderedDict[str, deque[_Peer]]] = {
            lane: OrderedDict() for lane in Lane
        }
        self._principal_bytes: Counter[str] = Counter()
        self._deadlines: list[tuple[float, int, _Peer, _OpenGrant]] = []
        self._deadlines_max = _STALE_DEADLINES
        self._order = itertools.count()
        self._floor_debt = 0.0
        self.inflight_bytes = 0
        self.queued_bytes = 0
        self.failures: Counter[ChunkFailure] = Counter()

    @property
    def pending_bytes(self) -> int:
        """Bytes granted and not yet landed or failed, of all attachments."""
        return self.inflight_bytes + self.queued_bytes

    def principal_bytes(self, principal: str) -> int:
        """Bytes granted to a principal and not yet landed or failed."""
        return self._principal_bytes[principal]

    def open(self, name: str, principal: str = "") -> None:
        """Begin to take grants of an attachment. Raises InvalidRequest if it is open already."""
        if name in self._peers:
            raise InvalidRequest(f"attachment {name!r} has a Deliver stream already; use that one")
        self._peers[name] = _Peer(name, principal)

    def close(self, name: str) -> None:
        """Forget an attachment: what waits is dropped, what is in flight ends unreported."""
        peer = self._peers.pop(name, None)
        if peer is None:
            return
        peer.closed = True
        for grant in list(peer.grants.values()):
            self._fail_waiting(peer, grant, ChunkFailure.PEER_LOST, "")
        peer.grants.clear()
        peer.reports.clear()

    def add(self, name: str, grant: Grant) -> None:
        """Queue a grant. Raises InvalidRequest (id in use), Overloaded (too much queued)."""
        peer = self._peers[name]
        if grant.grant_id in peer.grants:
            raise InvalidRequest(f"grant_id {grant.grant_id} is in use on this stream")
        if len(peer.grants) >= GRANTS_MAX:
            raise Overloaded(
                f"{len(peer.grants)} grants are open on this stream, {GRANTS_MAX} at most: "
                "read its progress",
                retry_after_s=0.1,
            )
        granted = grant.granted
        assert granted is not None
        held = peer.queued_chunks + peer.unread_failures
        if held + len(granted) > QUEUED_CHUNKS_MAX:
            raise Overloaded(
                f"{held} chunks wait already, or their failures wait to be read; "
                f"{QUEUED_CHUNKS_MAX} at most",
                retry_after_s=0.1,
            )
        opened = peer.grants[grant.grant_id] = _OpenGrant(grant)
        nbytes = granted.targets.nbytes
        peer.queued_bytes += nbytes
        peer.queued_chunks += len(granted)
        self.queued_bytes += nbytes
        self._principal_bytes[peer.principal] += nbytes
        if not peer.rings[grant.lane]:
            self._rings[grant.lane].setdefault(peer.principal, deque()).append(peer)
        peer.rings[grant.lane].setdefault(grant.lease_id, deque()).append(opened)
        heapq.heappush(self._deadlines, (grant.deadline_at, next(self._order), peer, opened))
        if len(self._deadlines) > self._deadlines_max:
            self._deadlines = [entry for entry in self._deadlines if entry[3].waiting]
            heapq.heapify(self._deadlines)
            self._deadlines_max = 2 * len(self._deadlines) + _STALE_DEADLINES

    def refuse(
        self, name: str, grant_id: int, tags: Sequence[int], failure: ChunkFailure, detail: str
    ) -> None:
        """Report a grant as ended with all its tags failed, without queueing it.

        Raises InvalidRequest (id in use), Overloaded (too many reports wait to be read).
        """
        peer = self._peers[name]
        if grant_id in peer.grants or grant_id in peer.reports:
            raise InvalidRequest(f"grant_id {grant_id} is in use on this stream")
        unread = peer.unread_failures + len(tags)
        if len(peer.reports) >= REPORTS_MAX or unread > QUEUED_CHUNKS_MAX:
            raise Overloaded(
                f"{len(peer.reports)} grants with {unread} failed chunks wait to be reported: "
                "read the stream",
                retry_after_s=1.0,
            )
        grant = Grant(grant_id, 0, _NO_WINDOW, Lane.BACKGROUND, 0.0, None)
        refused = _OpenGrant(grant, 0, 0, [(tag, failure) for tag in tags], detail)
        peer.reports[grant_id] = refused
        peer.unread_failures += len(tags)
        self.failures[failure] += len(tags)

    def cancel(self, name: str, grant_id: int) -> bool:
        """Drop what waits of a grant, reported as CANCELLED; False if it is not known."""
        peer = self._peers[name]
        grant = peer.grants.get(grant_id)
        if grant is None:
            return False
        self._fail_waiting(peer, grant, ChunkFailure.CANCELLED, "cancelled")
        return True

    def next(self, now: float) -> Delivery | None:
        """What to deliver next, counted as in flight; None if nothing may start now."""
        lanes = sorted(Lane)
        if self._floor_debt > 0:
            # The floor: lower lanes go first once they are owed a share.
            lanes.sort(key=lambda lane: lane < Lane.SAVE)
        for lane in lanes:
            picked = self._pick(lane, now)
            if picked is not None:
                self._account(lane, picked.nbytes)
                return picked
        return None

    def finished(
        self,
        job: Delivery,
        indices: Sequence[int],
        failures: Mapping[int, ChunkFailure] = NONE_FAILED,
        detail: str = "",
    ) -> bool:
        """Some chunks of a delivery ended, each once: `indices` into it, and why those that did
        not land failed, by index. True if there is something new to report of its grant."""
        granted, peer, grant = job.granted, job._owner, job._grant
        if len(indices) == len(granted):
            nbytes = job.nbytes
        else:
            nbytes = sum(granted.targets.sizes[index] for index in indices)
        peer.inflight_bytes -= nbytes
        self.inflight_bytes -= nbytes
        self._owe(peer.principal, nbytes)
        grant.inflight -= len(indices)
        for index, failure in failures.items():
            self.failures[failure] += 1
            grant.failures.append((granted.tags[index], failure))
        if failures:
            peer.unread_failures += len(failures)
            grant.detail = grant.detail or detail
        if peer.closed or (not failures and not grant.done):
            return False
        peer.reports[grant.grant.grant_id] = grant
        return True

    def expire(self, now: float) -> list[str]:
        """Fail what waits past its deadline; return the attachments with new reports."""
        late: dict[str, None] = {}
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, peer, grant = heapq.heappop(self._deadlines)
            if grant.waiting and not peer.closed:
                self._fail_waiting(peer, grant, ChunkFailure.DEADLINE, "queued past the deadline")
                late[peer.name] = None
        return list(late)

    def next_deadline(self) -> float | None:
        """When `expire` has something to do at the earliest."""
        while self._deadlines and not self._deadlines[0][3].waiting:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def reports(self, name: str, failures_max: int) -> list[Progress]:
        """Take what is new of an attachment's grants, up to about `failures_max` failures."""
        peer = self._peers.get(name)
        if peer is None:
            return []
        taken: list[Progress] = []
        count = 0
        while peer.reports and count < failures_max and len(taken) < GRANTS_MAX:
            grant = peer.reports.pop(next(iter(peer.reports)))
            grant_id = grant.grant.grant_id
            taken.append(Progress(grant_id, grant.done, tuple(grant.failures), grant.detail))
            count += len(grant.failures)
            peer.unread_failures -= len(grant.failures)
            grant.failures.clear()
            if grant.done and peer.grants.get(grant_id) is grant:
                del peer.grants[grant_id]
        return taken

    def open_grants(self, name: str) -> int:
        """Grants of an attachment that have not been reported as done."""
        peer = self._peers.get(name)
        return 0 if peer is None else len(peer.grants) + len(peer.reports.keys() - peer.grants)

    def _pick(self, lane: Lane, now: float) -> Delivery | None:
        principals = self._rings[lane]
        for _ in range(len(principals)):
            principal = next(iter(principals))
            principals.move_to_end(principal)
            picked = self._pick_of(principals[principal], lane, alone=len(principals) == 1)
            if picked is not None:
                return picked
        return None

    def _pick_of(self, ring: deque[_Peer], lane: Lane, *, alone: bool) -> Delivery | None:
        """The next chunks of one principal, if one of its attachments may have some."""
        for _ in range(len(ring)):
            peer = ring[0]
            ring.rotate(-1)
            leases = peer.rings[lane]
            lease_id, grants = next(iter(leases.items()))
            grant = grants[0]
            alone = alone and len(ring) == 1 and len(leases) == 1
            most_bytes = self._batch_bytes if alone else self._turn_bytes
            count, nbytes = self._startable(peer, grant, most_bytes)
            if not count:
                continue
            leases.move_to_end(lease_id)
            given = grant.grant
            granted = grant.take(count)
            if not grant.waiting:
                self._unring(peer, grant)
            peer.queued_bytes -= nbytes
            peer.queued_chunks -= count
            self.queued_bytes -= nbytes
            grant.inflight += count
            peer.inflight_bytes += nbytes
            self.inflight_bytes += nbytes
            return Delivery(
                peer.name,
                given.lease_id,
                given.window,
                lane,
                given.deadline_at,
                granted,
                nbytes,
                peer,
                grant,
            )
        return None

    def _startable(self, peer: _Peer, grant: _OpenGrant, most_bytes: int) -> tuple[int, int]:
        """(chunks, bytes) of a grant that may start now: (0, 0) if not even one."""
        granted, first = grant.grant.granted, grant.taken
        assert granted is not None
        sizes, tags = granted.targets.sizes, granted.tags
        free = self._limit - self.inflight_bytes
        # Dynamic threshold: nobody may hold more than what is left for all others.
        share = min(self._peer_limit, free) - peer.inflight_bytes
        nbytes = sizes[first]
        if nbytes > free:
            may_start = self.inflight_bytes == 0
        else:
            may_start = peer.inflight_bytes == 0 or nbytes <= share
        if not may_start:
            return 0, 0
        room = min(most_bytes, share)
        count, last = 1, min(len(tags), first + BATCH_WRITES_MAX)
        for index in range(first + 1, last):
            size = sizes[index]
            if tags[index] != tags[index - 1] + 1:
                break
            if nbytes + size > room:
                if room < most_bytes <= peer.inflight_bytes:
                    return 0, 0  # else a short delivery makes room for a short one, and so on
                break
            nbytes += size
            count += 1
        return count, nbytes

    def _account(self, lane: Lane, nbytes: int) -> None:
        if lane >= Lane.SAVE:
            # Below zero only by what the floor itself let pass, so that its share is exact.
            if self._floor_debt > 0:
                self._floor_debt -= nbytes
        elif self._rings[Lane.SAVE] or self._rings[Lane.BACKGROUND]:
            owed = self._floor_debt + nbytes * SAVE_FLOOR / (1 - SAVE_FLOOR)
            self._floor_debt = min(FLOOR_DEBT_BYTES_MAX, owed)
        else:
            self._floor_debt = 0.0

    def _fail_waiting(
        self, peer: _Peer, grant: _OpenGrant, failure: ChunkFailure, detail: str
    ) -> None:
        if grant.waiting:
            dropped = grant.take(grant.waiting)
            nbytes = dropped.targets.nbytes
            grant.failures.extend((tag, failure) for tag in dropped.tags)
            self.failures[failure] += len(dropped)
            grant.detail = grant.detail or detail
            peer.queued_chunks -= len(dropped)
            peer.unread_failures += len(dropped)
            peer.queued_bytes -= nbytes
            self.queued_bytes -= nbytes
            self._owe(peer.principal, nbytes)
            self._unring(peer, grant)
        if grant.failures or grant.done:
            peer.reports[grant.grant.grant_id] = grant

    def _unring(self, peer: _Peer, grant: _OpenGrant) -> None:
        lane, lease_id = grant.grant.lane, grant.grant.lease_id
        grants = peer.rings[lane][lease_id]
        grants.remove(grant)
        if grants:
            return
        del peer.rings[lane][lease_id]
        if peer.rings[lane]:
            return
        ring = self._rings[lane][peer.principal]
        ring.remove(peer)
        if not ring:
            del self._rings[lane][peer.principal]

    def _owe(self, principal: str, nbytes: int) -> None:
        """So much less is pending for a principal."""
        left = self._principal_bytes[principal] - nbytes
        if left:
            self._principal_bytes[principal] = left
        else:
            del self._principal_bytes[principal]


_NO_WINDOW = RegionDescriptor(0, 0, 0, 0)

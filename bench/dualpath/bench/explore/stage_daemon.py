"""A daemon as its callers see it: leases, tickets, grants, and the writes that carry them out.

Owns what is stored (each block's bytes), the leases that it has given, and a session a caller. It
answers only when the agenda says so. `StageDaemonLink` is one caller's end: what loads and relays
use of a DaemonLink.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from dualpath.agent.open_grants import OnProgress
from dualpath.agent.relay_job import FAILURE_OF_REASON
from dualpath.agent.slice_table import slices_of
from dualpath.bench.explore.agenda import Agenda
from dualpath.bench.explore.stage_loop import StageLoop
from dualpath.bench.explore.stage_transport import StageNetwork, StageTransport, Wire
from dualpath.kvstore import checksum
from dualpath.kvstore.layout import KVLayout
from dualpath.proto.v1 import common_pb2, store_pb2
from dualpath.transfer.errors import DualPathError, PathDown, Unavailable
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import Completion, Write, WriteStatus

LAYOUT = KVLayout(layers=2, block_tokens=16, layer_bytes=2 << 10, dtype="float16")
"""A block is one chunk."""
NAMESPACE_ID = b"n" * 16
_REASON_OF_STATUS = {
    WriteStatus.REFUSED: "refused",
    WriteStatus.LOST: "peer_lost",
    WriteStatus.EXPIRED: "deadline",
    WriteStatus.CLOSED: "cancelled",
}
T = TypeVar("T")


def content(block: int) -> bytes:
    """The bytes of a stored block."""
    return bytes((block * 37 + each * 11 + 1) % 251 for each in range(256)) * (
        LAYOUT.block_bytes // 256
    )


@dataclass(eq=False)
class _Grant:
    """A grant that is carried out. `failed` is not told yet."""

    grant_id: int
    open_chunks: int
    failed: list[tuple[int, str]] = field(default_factory=list)


class StageDaemon:
    """See the module docstring."""

    def __init__(self, blocks: int, agenda: Agenda, loop: StageLoop, wire: Wire) -> None:
        self.agenda = agenda
        self.loop = loop
        self.wire = wire
        self.transport = StageTransport("daemon", wire)
        self.leases: dict[int, str] = {}
        """Who holds each."""
        self.checksums = np.array(
            [checksum.xxh3_64(content(block)) for block in range(blocks)], np.uint64
        )
        self.blocks = blocks
        self.next_failure = ""
        """The next chunk that is asked for fails with this reason."""
        self._next_lease = 1
        self._region = Region.of(bytearray(b"".join(content(each) for each in range(blocks))))

    def new_lease(self, caller: str) -> int:
        """On all blocks, until it is released or the caller's session ends."""
        lease_id, self._next_lease = self._next_lease, self._next_lease + 1
        self.leases[lease_id] = caller
        return lease_id

    def end_session(self, caller: str) -> None:
        """What is on its way to and from it is lost, and its leases end."""
        self.leases = {lease: owner for lease, owner in self.leases.items() if owner != caller}
        self.agenda.drop(f"{caller}>daemon")
        self.agenda.drop(f"daemon>{caller}")

    def ticket(self, lease_id: int, peer: str) -> bytes:
        """Lets `peer` read under a lease."""
        return f"{lease_id}/{peer}".encode()

    def may_read(self, peer: str, lease_id: int, ticket: bytes) -> bool:
        """Whether this caller reads under a lease that is there."""
        if ticket:
            lease, _, made_out_to = ticket.decode().partition("/")
            return made_out_to == peer and int(lease) in self.leases
        return lease_id in self.leases

    def carry_out(
        self, link: StageDaemonLink, grant: common_pb2.ChunkGrant, lease_id: int, ticket: bytes
    ) -> None:
        """Write the chunks of a grant into the caller's window, and say how that went."""
        record = _Grant(grant.grant_id, len(grant.tag))
        allowed = self.may_read(link.peer_id, lease_id, ticket)
        for block, tag, target in zip(grant.block, grant.tag, slices_of(grant), strict=True):
            reason = "" if allowed else "lease_expired"
            if self.next_failure and not reason:
                reason, self.next_failure = self.next_failure, ""
            if not reason:
                try:
                    self._write(link, record, grant, block, tag, target)
                    continue
                except DualPathError as error:
                    reason = error.reason
            self._ended(link, record, tag, reason)

    def _write(
        self,
        link: StageDaemonLink,
        record: _Grant,
        grant: common_pb2.ChunkGrant,
        block: int,
        tag: int,
        target: Slices,
    ) -> None:
        def written(completion: Completion) -> None:
            self._ended(link, record, tag, _REASON_OF_STATUS.get(completion.status, ""))

        size = LAYOUT.block_bytes
        write = Write(
            self._region,
            Slices.contiguous(block * size, size),
            RegionDescriptor.from_bytes(grant.window),
            target,
            Lane(grant.lane),
            tag,
            grant.deadline_ms / 1000,
        )
        self.transport.write(link.peer_id, write, written)

    def _ended(self, link: StageDaemonLink, record: _Grant, tag: int, reason: str) -> None:
        record.open_chunks -= 1
        if reason:
            record.failed.append((tag, reason))
        if not record.open_chunks or record.failed:
            failed, record.failed = record.failed, []
            link.tell(
                common_pb2.GrantProgress(
                    grant_id=record.grant_id,
                    done=not record.open_chunks,
                    failed_tag=[tag for tag, _ in failed],
                    failure=[FAILURE_OF_REASON[reason] for _, reason in failed],
                    detail=failed[0][1] if failed else "",
                )
            )


class StageLinkState:
    """What of a SteadyLink others look at."""

    def __init__(self, owner: StageDaemonLink, network: StageNetwork) -> None:
        self._owner = owner
        self._network = network
        self.reason = "lost"
        self.attached = None

    @property
    def network(self) -> StageNetwork | None:
        """The network of the attachment, None while it is not there."""
        return self._network if self._owner.up else None

    def lose(self, reason: str) -> None:
        """Make the session anew."""
        self._owner.break_off(reason)

    async def wait_up(self, timeout_s: float) -> bool:
        """Until the session is there."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._owner.risen.wait()
        except TimeoutError:
            pass
        return self._owner.up


class StageDaemonLink:
    """One caller's session at the daemon; see the module docstring."""

    looks_up = False
    mounted = None
    address = key = "daemon"
    rail = 0

    def __init__(
        self,
        caller: str,
        daemon: StageDaemon,
        network: StageNetwork,
        on_change: Callable[[StageDaemonLink], None],
    ) -> None:
        self.caller = caller
        self.daemon = daemon
        self.peer_id = ""
        self.up = False
        self.risen = asyncio.Event()
        self.link = StageLinkState(self, network)
        self._network = network
        self._on_change = on_change
        self._grants: dict[int, OnProgress] = {}
        self._next_grant = 1
        self._session = 0
        self.rise()

    # The session.

    def rise(self) -> None:
        """A session, with its connection."""
        self._session += 1
        self.peer_id = f"{self.caller}#{self._session}"
        self.daemon.transport.links[self.peer_id] = self._network.transport
        self._network.transport.links["daemon"] = self.daemon.transport
        self.up = True
        self.risen.set()
        self._on_change(self)

    def break_off(self, reason: str) -> None:
        """The session ends; another one comes some time later."""
        if not self.up:
            return
        del reason
        self.up = False
        self.peer_id = ""
        self.risen.clear()
        self._grants.clear()
        self.daemon.end_session(self.caller)
        self.daemon.wire.cut(self.daemon.transport, self._network.transport)
        self._on_change(self)
        self.daemon.agenda.add(
            f"{self.caller} comes back", f"{self.caller} reaches the daemon again", self.rise
        )

    # Grants.

    def deliver(
        self,
        grant: common_pb2.ChunkGrant,
        on_progress: OnProgress,
        *,
        lease_id: int = 0,
        ticket: bytes = b"",
    ) -> int:
        """See DaemonLink.deliver."""
        if not self.up:
            raise PathDown("the daemon is away")
        grant.grant_id = self._next_grant
        self._next_grant += 1
        self._grants[grant.grant_id] = on_progress
        sent = common_pb2.ChunkGrant()
        sent.CopyFrom(grant)
        self.daemon.agenda.add(
            f"{self.caller}>daemon",
            f"{self.caller} asks the daemon for blocks {list(sent.block)}",
            lambda: self.daemon.carry_out(self, sent, lease_id, ticket),
        )
        return grant.grant_id

    def cancel(self, grant_ids: Iterable[int], *, landed: bool = False) -> None:
        """The daemon may go on with what it has begun: nobody hears of it."""
        del landed
        for grant_id in grant_ids:
            self._grants.pop(grant_id, None)

    def tell(self, progress: common_pb2.GrantProgress) -> None:
        """The daemon's progress, on its way to the caller."""
        if not self.up:
            return

        def heard() -> None:
            on_progress = self._grants.get(progress.grant_id)
            if on_progress is not None:
                if progress.done:
                    del self._grants[progress.grant_id]
                on_progress(progress)

        self.daemon.agenda.add(
            f"daemon>{self.caller}",
            f"{self.caller} hears of grant {progress.grant_id}"
            + (f": {progress.detail}" if progress.failed_tag else ""),
            heard,
        )

    # Unary calls.

    async def _answer(self, what: str, make: Callable[[], T]) -> T:
        """What the daemon says, once the agenda lets it. Raises Unavailable if the session ends."""
        if not self.up:
            raise Unavailable("the daemon is away")
        session = self._session
        answer: asyncio.Future[T] = self.daemon.loop.create_future()

        def answered() -> None:
            if answer.done():
                return
            if not self.up or self._session != session:
                answer.set_exception(Unavailable("the session ended"))
                return
            try:
                answer.set_result(make())
            except DualPathError as error:
                answer.set_exception(error)

        self.daemon.agenda.add(f"call {self.caller} {what}", f"{what} of {self.caller}", answered)
        return await answer

    async def delegate(
        self, lease_id: int, peer_ids: Sequence[str], ttl_s: float
    ) -> tuple[bytes, ...]:
        """See DaemonLink.delegate."""
        del ttl_s

        def make() -> tuple[bytes, ...]:
            if lease_id not in self.daemon.leases:
                raise DualPathError("no such lease", reason="lease_expired")
            return tuple(self.daemon.ticket(lease_id, peer) for peer in peer_ids)

        return await self._answer("delegation", make)

    async def namespace_of(self, ticket: bytes, block: int) -> bytes:
        """See DaemonLink.namespace_of."""

        def make() -> bytes:
            if not self.daemon.may_read(self.peer_id, 0, ticket):
                raise DualPathError("no such lease", reason="lease_expired")
            return NAMESPACE_ID

        del block
        return await self._answer("ticket", make)

    async def lookup(
        self, namespace_id: bytes, hashes: Sequence[bytes], *, lease_s: float, timeout_s: float
    ) -> store_pb2.LookupResponse:
        """See DaemonLink.lookup."""
        del namespace_id, lease_s, timeout_s

        def make() -> store_pb2.LookupResponse:
            found = min(len(hashes), self.daemon.blocks)
            return store_pb2.LookupResponse(
                blocks=found,
                lease_id=self.daemon.new_lease(self.caller),
                checksums=self.daemon.checksums[:found].astype("<u8").tobytes(),
                tiers=bytes(found),
            )

        return await self._answer("look-up", make)

    async def release(self, lease_ids: Collection[int]) -> None:
        """See DaemonLink.release."""
        for lease_id in lease_ids:
            self.daemon.leases.pop(lease_id, None)

    async def report_corrupt(self, lease_id: int, block: int, chunk: int) -> bool:
        """See DaemonLink.report_corrupt."""
        del lease_id, block, chunk
        return await self._answer("report", lambda: False)

    async def renew(self, lease_ids: Sequence[int], lease_s: float) -> frozenset[int]:
        """See DaemonLink.renew."""
        del lease_s
        return frozenset(set(lease_ids) - self.daemon.leases.keys())

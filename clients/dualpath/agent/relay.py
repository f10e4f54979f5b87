"""The relay: brings chunks from a daemon through bounded staging to whoever asked for them.

Owns the staging memory, the queues of the requesters and each chunk from its grant to its end.
Serves requesters by turns, chunk by chunk, so that a greedy one slows nobody; asks the daemon for
as much as the storage link carries in a short time, in batches; forwards each chunk from the
transport thread on which it arrived. Backpressure is the staging: while a requester does not take
its chunks, only its own share of the slots is held. What is to be kept for a request of this node's
decode engine (*retain*) goes through the holdings instead, if they have room, and stays there; what
they have is forwarded from there without a storage read.

Guarantees that every granted chunk ends once, written or reported as failed, and that a slot is
used again only after no write can reach or read it. Does not verify, but for what it keeps: the
loader does, end to end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.holdings import Holdings
from dualpath.agent.known_chunks import names_of
from dualpath.agent.mailbox import Mailbox
from dualpath.agent.network import Network
from dualpath.agent.rail_reads import RailReads
from dualpath.agent.relay_held import RelayHeld
from dualpath.agent.relay_job import (
    FAILURE_OF_STATUS,
    REASON_OF_FAILURE,
    Ended,
    RelayChunk,
    RelayGrant,
    Requester,
    Source,
    Stage,
    failure_of,
)
from dualpath.agent.relay_reports import RelayReports
from dualpath.agent.relay_stalls import RelayStalls
from dualpath.agent.relay_turns import RelayTurns
from dualpath.agent.relay_upstream import RelayUpstream
from dualpath.agent.slice_table import slices_of
from dualpath.agent.staging import SLAB_BYTES, Staging
from dualpath.proto.v1 import agent_pb2, common_pb2
from dualpath.transfer.credit import CreditConfig
from dualpath.transfer.errors import DualPathError, InvalidRequest, Overloaded
from dualpath.transfer.lane import Lane
from dualpath.transfer.rails import RAILS_MAX
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.transport import Completion, Write

if TYPE_CHECKING:
    from dualpath.agent.relay_job import ChunkFailure

REQUESTERS_MAX = 1024 + RAILS_MAX
"""Agents that are attached, and this one by each of its storage links."""
GRANTS_MAX = 4096
"""Most open grants of one requester."""
QUEUED_CHUNKS_MAX = 1 << 16
"""Most waiting chunks of one requester."""
DEADLINE_S_MAX = 600.0
"""Longest that a grant may wait here, whatever it says."""
STALL_S = 10.0
"""Who takes nothing of what is written to him for so long is hung up on."""
SWEEP_S = 0.25
"""How often chunks past their deadline are looked for."""

log = logging.getLogger(__name__)


class Relay:
    """See the module docstring. All methods belong to the loop. `on_queue` is called now and then
    while `read_bytes` changes."""

    def __init__(
        self,
        staging: Staging,
        holdings: Holdings,
        compute: Network,
        loop: asyncio.AbstractEventLoop,
        on_queue: Callable[[], None],
        credit: CreditConfig | None = None,
        *,
        deadline_s_max: float = DEADLINE_S_MAX,
        stall_s: float = STALL_S,
    ) -> None:
        self.staging = staging
        self.holdings = holdings
        self.relayed_bytes = 0
        self.retained_bytes = 0
        """Of it, read into the holdings and kept there,"""
        self.served_bytes = 0
        """and forwarded from there without a storage read."""
        self.relayed_chunks = 0
        self.events: Counter[str] = Counter()
        self._on_queue = on_queue
        self._compute = compute
        self._loop = loop
        self._credit = credit or CreditConfig()
        self._reads = {0: RailReads()}  # by storage link
        self._requesters: dict[tuple[str, int], Requester] = {}  # by peer and storage link
        self._turns = RelayTurns(staging, holdings, self._credit)
        self._held = RelayHeld(holdings, loop, self._wait_to_read, self._on_news)
        self._upstream = RelayUpstream(staging, holdings, self._forward)
        self._ended: Mailbox[Ended] = Mailbox(loop, self._on_ended)
        self._landed: Mailbox[RelayChunk] = Mailbox(loop, self._on_landed)
        self._reports = RelayReports(loop, self.others_read_bytes, self._tell_queue)
        self._stalls = RelayStalls(stall_s, lambda: sent_bytes(compute))
        self._deadline_s_max = deadline_s_max
        self._sweep: asyncio.TimerHandle | None = None

    # Requesters.

    def open(self, name: str, peer: str, rail: int = 0, sharer: str | None = None) -> Requester:
        """Begin to serve a requester, by storage link `rail`. Raises Overloaded over the limit."""
        if len(self._requesters) >= REQUESTERS_MAX:
            raise Overloaded(f"{REQUESTERS_MAX} agents are served already", retry_after_s=5.0)
        assert (peer, rail) not in self._requesters
        self._reads.setdefault(rail, RailReads())
        requester = self._requesters[peer, rail] = Requester(name, peer, rail, sharer)
        return requester

    def close(self, requester: Requester) -> None:
        """It is gone: drop what it asked for. Its grants are not reported any more."""
        if requester.closed:
            return
        requester.closed = True
        self.cancel(requester, tuple(requester.grants))
        self._requesters.pop((requester.peer, requester.rail), None)

    # Grants.

    def submit(
        self,
        requester: Requester,
        source: Source,
        grant: common_pb2.ChunkGrant,
        on_progress: Callable[[common_pb2.GrantProgress], None],
        known: agent_pb2.KnownChunks | None = None,
    ) -> None:
        """Queue a grant; it ends by progress with `done`. `known` says what its chunks are.
        Raises InvalidRequest, Overloaded."""
        if grant.grant_id in requester.grants:
            raise InvalidRequest(f"grant_id {grant.grant_id} is in use on this stream")
        targets = slices_of(grant)
        if max(target.nbytes for target in targets) > SLAB_BYTES:
            raise InvalidRequest(f"a relayed chunk has at most {SLAB_BYTES} bytes")
        if min(target.nbytes for target in targets) < 1:
            raise InvalidRequest("a relayed chunk has at least one byte")
        if (
            len(requester.grants) >= GRANTS_MAX
            or len(requester.queue) + len(requester.held_queue) + len(targets) > QUEUED_CHUNKS_MAX
        ):
            raise Overloaded("too much waits at this relay already", retry_after_s=0.1)
        if not source.daemon.up:
            raise DualPathError(f"daemon {source.daemon.address} is away", reason="peer_lost")
        try:
            lane = Lane(grant.lane)
        except ValueError as error:
            raise InvalidRequest(f"unknown lane {grant.lane}") from error
        names = names_of(grant, known)
        record = RelayGrant(
            grant_id=grant.grant_id,
            requester=requester,
            source=source,
            window=RegionDescriptor.from_bytes(grant.window),
            lane=lane,
            deadline_at=self._loop.time() + min(grant.deadline_ms / 1000, self._deadline_s_max),
            on_progress=on_progress,
            open_chunks=len(targets),
            request=known.request if known is not None else "",
        )
        requester.grants[record.grant_id] = record
        fresh = known is not None and known.fresh
        for index, (block, number, tag, target) in enumerate(
            zip(grant.block, grant.chunk, grant.tag, targets, strict=True)
        ):
            chunk = RelayChunk(record, block, number, tag, target)
            chunk.name = names[index] if names else None
            if not self._held.take(chunk, fresh=fresh):
                self._wait_to_read(chunk)
        if record.held_bytes:
            self._reports.add(record)
        self._reports.queue_changed()
        self._arm_sweep()
        self._pump()

    def cancel(self, requester: Requester, grant_ids: Iterable[int]) -> None:
        """Drop what waits or is being read of these grants; what is forwarded still ends."""
        wanted = {
            grant for grant_id in grant_ids if (grant := requester.grants.get(grant_id)) is not None
        }
        if wanted:
            self._fail_where(
                lambda chunk: chunk.grant in wanted,
                common_pb2.CHUNK_FAILURE_CANCELLED,
                "cancelled",
            )
            self._pump()

    def daemon_lost(self, daemon: DaemonLink, reason: str) -> None:
        """The session at a daemon ended: nothing of what was asked of it will come."""
        self._fail_where(
            lambda chunk: chunk.grant.source.daemon is daemon,
            common_pb2.CHUNK_FAILURE_PEER_LOST,
            f"daemon: {reason}",
        )
        self._upstream.daemon_lost(daemon)
        self._held.daemon_lost(daemon)
        self._pump()

    def shutdown(self) -> None:
        """Fence the staging for good."""
        if self._sweep is not None:
            self._sweep.cancel()
        self._reports.close()
        self._held.close()
        for requester in tuple(self._requesters.values()):
            self.close(requester)
        self._upstream.close()

    @property
    def read_bytes(self) -> int:
        """Bytes that wait for the storage links or are in flight on them."""
        return sum(reads.read_bytes for reads in self._reads.values())

    def read_bytes_by(self, rail: int) -> int:
        """The same of one storage link."""
        return self._reads[rail].read_bytes if rail in self._reads else 0

    def read_rate_bytes_per_s(self) -> float:
        """What the storage links last carried for requesters; 0 while unknown."""
        now = self._loop.time()
        return sum(reads.rate.bytes_per_s(now) for reads in self._reads.values())

    def others_read_bytes(self, requester: Requester) -> int:
        """Bytes that wait here for the requester's storage link on behalf of everybody else."""
        others = self._reads[requester.rail].read_bytes
        return others - requester.waiting_bytes - requester.reading_bytes

    # Reading.

    def _wait_to_read(self, chunk: RelayChunk) -> None:
        requester, nbytes = chunk.grant.requester, chunk.target.nbytes
        requester.queue.append(chunk)
        requester.waiting_bytes += nbytes
        self._reads[requester.rail].read_bytes += nbytes
        self._turns.add(requester)

    def _on_news(self, grants: Iterable[RelayGrant]) -> None:
        """Of grants with chunks that are held here."""
        for grant in grants:
            self._reports.add(grant)
        self._reports.queue_changed()
        self._pump()

    def _pump(self) -> None:
        """Forward what is held, and ask daemons for chunks, by turns, while there is credit and
        room."""
        while (chunk := self._held.next()) is not None:
            self._forwarding(chunk)
            self._write(chunk)
        now = self._loop.time()
        for rail, reads in self._reads.items():
            self._pump_rail(rail, reads, now)

    def _pump_rail(self, rail: int, reads: RailReads, now: float) -> None:
        window = self._credit.window_bytes(reads.rate.bytes_per_s(now))
        batch = self._credit.batch_bytes(window)
        # Wait for a worthwhile batch, so that there is no message a chunk.
        if reads.reading_bytes and window - reads.reading_bytes < batch:
            return
        batches: dict[tuple[str, int, bytes, Lane, bool], list[RelayChunk]] = {}
        while (chunk := self._turns.next(reads.reading_bytes, window, now, rail)) is not None:
            reads.reading_bytes += chunk.target.nbytes
            source = chunk.grant.source
            key = (
                source.daemon.key,
                source.lease_id,
                source.ticket,
                chunk.grant.lane,
                chunk.held is not None,
            )
            batches.setdefault(key, []).append(chunk)
        for chunks in batches.values():
            self._read(chunks, now)

    def _read(self, chunks: list[RelayChunk], now: float) -> None:
        self._reads[chunks[0].grant.requester.rail].rate.begin(now)
        daemon = chunks[0].grant.source.daemon
        try:
            self._upstream.read(chunks, now, partial(self._on_read_progress, daemon))
        except DualPathError as error:
            for chunk in chunks:
                self._fail(chunk, failure_of(error), str(error))

    def _on_read_progress(self, daemon: DaemonLink, progress: common_pb2.GrantProgress) -> None:
        self._landed.drain()
        for tag, failure in zip(progress.failed_tag, progress.failure, strict=True):
            chunk = self._upstream.asked(daemon, tag)
            if chunk is not None:
                self._held.failed(chunk.grant.source, failure)
                self._fail(chunk, failure, progress.detail)
        self._pump()

    # Forwarding.

    def _forward(self, chunk: RelayChunk) -> None:
        """A chunk lies in its slot. On a transport thread: nothing here but the write."""
        self._landed.put(chunk)
        if not chunk.intact:
            corrupt = common_pb2.CHUNK_FAILURE_CORRUPT
            self._ended.put(Ended(chunk, corrupt, "checksum does not hold at the relay"))
            return
        self._write(chunk)

    def _write(self, chunk: RelayChunk) -> None:
        """Write a chunk from its slot to its requester. On any thread."""
        grant = chunk.grant
        assert chunk.slot is not None
        left_s = grant.deadline_at - self._loop.time()
        if left_s <= 0:
            late = common_pb2.CHUNK_FAILURE_DEADLINE
            self._ended.put(Ended(chunk, late, "arrived past the deadline"))
            return
        write = Write(
            (self.staging if chunk.held is None else self.holdings).region,
            chunk.slot.slices,
            grant.window,
            chunk.target,
            grant.lane,
            chunk.tag,
            left_s,
        )
        try:
            self._compute.transport.write(
                grant.requester.peer, write, partial(self._written, chunk)
            )
        except DualPathError as error:
            self._ended.put(Ended(chunk, failure_of(error), str(error)))

    def _forwarding(self, chunk: RelayChunk) -> None:
        requester = chunk.grant.requester
        if not requester.forwarding:
            requester.moved_at = self._loop.time()
        requester.forwarding += 1

    def _written(self, chunk: RelayChunk, completion: Completion) -> None:
        """On a transport thread: the write of a chunk ended."""
        failure = FAILURE_OF_STATUS.get(completion.status)
        self._ended.put(Ended(chunk, failure, completion.detail))

    def _on_landed(self, chunks: list[RelayChunk]) -> None:
        now = self._loop.time()
        for chunk in chunks:
            self._upstream.landed(chunk)
            if chunk.stage is Stage.READING:
                requester = chunk.grant.requester
                requester.reading_bytes -= chunk.target.nbytes
                self._reads[requester.rail].landed(chunk.target.nbytes, now)
                chunk.stage = Stage.FORWARDING
                self._forwarding(chunk)
                if chunk.held is not None and chunk.intact:
                    self.holdings.filled(chunk.held)
                    self.retained_bytes += chunk.target.nbytes
        for reads in self._reads.values():
            if not reads.reading_bytes:
                reads.rate.end()
        self._reports.queue_changed()
        self._pump()

    def _on_ended(self, items: list[Ended]) -> None:
        self._landed.drain()
        for item in items:
            self._end(item.chunk, item.failure, item.detail)
        self._pump()

    # Ends.

    def _fail(self, chunk: RelayChunk, failure: ChunkFailure, detail: str) -> None:
        """End a chunk that waits or is being read; one that landed is left to its write."""
        if chunk.stage is Stage.READING:
            if not self._upstream.withdraw(chunk):
                return
            self._no_longer_reading(chunk)
        elif chunk.stage is not Stage.WAITING:
            return
        self._end(chunk, failure, detail)

    def _fail_where(
        self,
        chosen: Callable[[RelayChunk], bool],
        failure: ChunkFailure,
        detail: str,
    ) -> None:
        self._landed.drain()
        for requester in tuple(self._requesters.values()):
            waiting = [chunk for chunk in requester.queue if chosen(chunk)]
            if waiting:
                requester.queue = deque(c for c in requester.queue if not chosen(c))
            for chunk in waiting:
                requester.waiting_bytes -= chunk.target.nbytes
                self._reads[requester.rail].read_bytes -= chunk.target.nbytes
                self._fail(chunk, failure, detail)
            held = [chunk for chunk in requester.held_queue if chosen(chunk)]
            if held:
                requester.held_queue = deque(c for c in requester.held_queue if not chosen(c))
            for chunk in held:
                self._fail(chunk, failure, detail)
        for chunk in self._upstream.reading():
            if chosen(chunk):
                self._fail(chunk, failure, detail)
        self._reports.queue_changed()

    def _no_longer_reading(self, chunk: RelayChunk) -> None:
        requester = chunk.grant.requester
        requester.reading_bytes -= chunk.target.nbytes
        self._reads[requester.rail].over(chunk.target.nbytes)

    def _end(self, chunk: RelayChunk, failure: ChunkFailure | None, detail: str) -> None:
        assert chunk.stage is not Stage.OVER, "a chunk ended twice"
        if chunk.served and chunk.stage is Stage.FORWARDING:
            self._held.ended(chunk)
        grant, requester = chunk.grant, chunk.grant.requester
        if chunk.stage is Stage.FORWARDING:
            requester.forwarding -= 1
            requester.moved_at = self._loop.time()
        chunk.stage = Stage.OVER
        if chunk.held is not None:
            if not chunk.held.held:
                self.holdings.discard(chunk.held)
            self.holdings.unuse(chunk.held)
            chunk.held = chunk.slot = None
        elif chunk.slot is not None:
            self.staging.give_back(chunk.slot)
            requester.staged_bytes -= chunk.target.nbytes
            chunk.slot = None
        grant.open_chunks -= 1
        if failure is None:
            requester.relayed_bytes += chunk.target.nbytes
            self.relayed_bytes += chunk.target.nbytes
            self.relayed_chunks += 1
            self.served_bytes += chunk.target.nbytes if chunk.served else 0
        else:
            grant.failures.append((chunk.tag, failure))
            grant.detail = grant.detail or detail
            self.events[f"relay_{REASON_OF_FAILURE.get(failure, 'failed')}"] += 1
        if grant.open_chunks == 0:
            requester.grants.pop(grant.grant_id, None)
        if grant.failures or grant.open_chunks == 0:
            self._reports.add(grant)

    # Timers.

    def _arm_sweep(self) -> None:
        if self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_S, self._on_sweep)

    def _on_sweep(self) -> None:
        self._sweep = None
        now = self._loop.time()
        self.holdings.expire(now)
        requesters = tuple(self._requesters.values())
        self._held.recheck(requesters)
        for requester in self._stalls.stalled(requesters, now):
            if requester.on_stall is not None:
                self.events["relay_stalled"] += 1
                requester.on_stall("it takes nothing of what is written to it")
        self._fail_where(
            lambda chunk: chunk.grant.deadline_at <= now,
            common_pb2.CHUNK_FAILURE_DEADLINE,
            "waited at the relay past the deadline",
        )
        self._pump()
        if self.holdings.requests or any(each.grants for each in self._requesters.values()):
            self._arm_sweep()

    def _tell_queue(self) -> None:
        self._on_queue()
        for requester in tuple(self._requesters.values()):
            if requester.on_queue is not None:
                requester.on_queue()


def sent_bytes(compute: Network) -> dict[str, int]:
    """What has gone to each connection of the compute network."""
    return {peer.peer: peer.sent_bytes for peer in compute.transport.traffic()}

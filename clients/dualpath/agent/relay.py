"""The relay: brings chunks from a daemon through bounded staging to whoever asked for them.

Owns the staging memory, the queues of the requesters and each chunk from its grant to its end.
Serves requesters by turns, chunk by chunk, so that a greedy one slows nobody; asks the daemon for
as much as the storage link carries in a short time, in batches; forwards each chunk from the
transport thread on which it arrived. Backpressure is the staging: while a requester does not take
its chunks, only its own share of the slots is held.

Guarantees that every granted chunk ends once, written or reported as failed, and that a slot is
used again only after no write can reach or read it. Does not verify: the loader does, end to end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.mailbox import Mailbox
from dualpath.agent.network import Network
from dualpath.agent.relay_job import (
    FAILURE_OF_REASON,
    REASON_OF_FAILURE,
    RelayChunk,
    RelayGrant,
    Requester,
    Source,
    Stage,
)
from dualpath.agent.relay_turns import RelayTurns
from dualpath.agent.slice_table import slices_of, table_of
from dualpath.agent.staging import SLAB_BYTES, Staging
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.credit import CreditConfig
from dualpath.transfer.errors import DualPathError, InvalidRequest, Overloaded
from dualpath.transfer.lane import Lane
from dualpath.transfer.rates import RateEstimate
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import Arrival, Completion, Write, WriteStatus

if TYPE_CHECKING:
    from dualpath.agent.relay_job import ChunkFailure

REQUESTERS_MAX = 1024
GRANTS_MAX = 4096
"""Most open grants of one requester."""
QUEUED_CHUNKS_MAX = 1 << 16
"""Most waiting chunks of one requester."""
SWEEP_S = 0.25
"""How often chunks past their deadline are looked for."""
TELL_S = 0.05
"""Pause between two reports of the read queue to the requesters."""

log = logging.getLogger(__name__)

_FAILURE_OF_STATUS = {
    WriteStatus.REFUSED: common_pb2.CHUNK_FAILURE_REFUSED,
    WriteStatus.LOST: common_pb2.CHUNK_FAILURE_PEER_LOST,
    WriteStatus.EXPIRED: common_pb2.CHUNK_FAILURE_DEADLINE,
    WriteStatus.CLOSED: common_pb2.CHUNK_FAILURE_CANCELLED,
}


@dataclass(frozen=True, slots=True)
class _Ended:
    """What a transport thread reports of a chunk: written (failure None) or not."""

    chunk: RelayChunk
    failure: ChunkFailure | None
    detail: str = ""


@dataclass(slots=True, eq=False)
class _Upstream:
    """Reads of one daemon: our window on the staging, and what is in flight there."""

    daemon: DaemonLink
    network: Network | None = None
    window: RegionDescriptor | None = None
    reading: dict[int, RelayChunk] = field(default_factory=dict)
    grant_ids: set[int] = field(default_factory=set)


class Relay:
    """See the module docstring. All methods belong to the loop. `on_queue` is called now and then
    while `read_bytes` changes."""

    def __init__(
        self,
        staging: Staging,
        compute: Network,
        loop: asyncio.AbstractEventLoop,
        on_queue: Callable[[], None],
        credit: CreditConfig | None = None,
    ) -> None:
        self.staging = staging
        self.relayed_bytes = 0
        self.relayed_chunks = 0
        self.read_bytes = 0
        """Bytes that wait for the storage link or are in flight on it."""
        self.events: Counter[str] = Counter()
        self._on_queue = on_queue
        self._compute = compute
        self._loop = loop
        self._credit = credit or CreditConfig()
        self._rate = RateEstimate()
        self._reading_bytes = 0
        self._next_tag = 1
        self._requesters: dict[str, Requester] = {}
        self._turns = RelayTurns(staging, self._credit)
        self._upstreams: dict[str, _Upstream] = {}
        self._ended: Mailbox[_Ended] = Mailbox(loop, self._on_ended)
        self._landed: Mailbox[RelayChunk] = Mailbox(loop, self._on_landed)
        self._reports: dict[RelayGrant, None] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._telling: asyncio.TimerHandle | None = None

    # Requesters.

    def open(self, name: str, peer: str) -> Requester:
        """Begin to serve a requester. Raises Overloaded over the limit."""
        if len(self._requesters) >= REQUESTERS_MAX:
            raise Overloaded(f"{REQUESTERS_MAX} agents are attached already", retry_after_s=5.0)
        assert peer not in self._requesters
        requester = self._requesters[peer] = Requester(name, peer)
        return requester

    def close(self, requester: Requester) -> None:
        """It is gone: drop what it asked for. Its grants are not reported any more."""
        if requester.closed:
            return
        requester.closed = True
        self.cancel(requester, tuple(requester.grants))
        self._requesters.pop(requester.peer, None)

    # Grants.

    def submit(
        self,
        requester: Requester,
        source: Source,
        grant: common_pb2.ChunkGrant,
        on_progress: Callable[[common_pb2.GrantProgress], None],
    ) -> None:
        """Queue a grant; it ends by progress with `done`. Raises InvalidRequest, Overloaded."""
        if grant.grant_id in requester.grants:
            raise InvalidRequest(f"grant_id {grant.grant_id} is in use on this stream")
        targets = slices_of(grant)
        if max(target.nbytes for target in targets) > SLAB_BYTES:
            raise InvalidRequest(f"a relayed chunk has at most {SLAB_BYTES} bytes")
        if min(target.nbytes for target in targets) < 1:
            raise InvalidRequest("a relayed chunk has at least one byte")
        if (
            len(requester.grants) >= GRANTS_MAX
            or len(requester.queue) + len(targets) > QUEUED_CHUNKS_MAX
        ):
            raise Overloaded("too much waits at this relay already", retry_after_s=0.1)
        if not source.daemon.up:
            raise DualPathError(f"daemon {source.daemon.address} is away", reason="peer_lost")
        try:
            lane = Lane(grant.lane)
        except ValueError as error:
            raise InvalidRequest(f"unknown lane {grant.lane}") from error
        record = RelayGrant(
            grant_id=grant.grant_id,
            requester=requester,
            source=source,
            window=RegionDescriptor.from_bytes(grant.window),
            lane=lane,
            deadline_at=self._loop.time() + grant.deadline_ms / 1000,
            on_progress=on_progress,
            open_chunks=len(targets),
        )
        requester.grants[record.grant_id] = record
        for block, chunk, tag, target in zip(
            grant.block, grant.chunk, grant.tag, targets, strict=True
        ):
            requester.queue.append(RelayChunk(record, block, chunk, tag, target))
            requester.waiting_bytes += target.nbytes
            self.read_bytes += target.nbytes
        self._turns.add(requester)
        self._queue_changed()
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
        upstream = self._upstreams.get(daemon.address)
        if upstream is not None:
            upstream.grant_ids.clear()
        self._pump()

    def shutdown(self) -> None:
        """Fence the staging for good."""
        for timer in (self._sweep, self._telling):
            if timer is not None:
                timer.cancel()
        for requester in tuple(self._requesters.values()):
            self.close(requester)
        for upstream in self._upstreams.values():
            if upstream.window is not None and upstream.network is not None:
                upstream.network.transport.revoke(upstream.window)
        self._upstreams.clear()

    def read_rate_bytes_per_s(self) -> float:
        """What the storage link last carried for requesters; 0 while unknown."""
        return self._rate.bytes_per_s(self._loop.time())

    def others_read_bytes(self, requester: Requester) -> int:
        """Bytes that wait here for the storage link on behalf of everybody else."""
        return self.read_bytes - requester.waiting_bytes - requester.reading_bytes

    # Reading.

    def _pump(self) -> None:
        """Ask daemons for chunks, by turns, while there is credit and room."""
        window = self._credit.window_bytes(self._rate.bytes_per_s(self._loop.time()))
        batch = self._credit.batch_bytes(window)
        # Wait for a worthwhile batch, so that there is no message a chunk.
        if self._reading_bytes and window - self._reading_bytes < batch:
            return
        batches: dict[tuple[str, int, bytes, Lane], list[RelayChunk]] = {}
        while (chunk := self._turns.next(self._reading_bytes, window)) is not None:
            self._reading_bytes += chunk.target.nbytes
            source = chunk.grant.source
            key = (source.daemon.address, source.lease_id, source.ticket, chunk.grant.lane)
            batches.setdefault(key, []).append(chunk)
        for chunks in batches.values():
            self._read(chunks)

    def _read(self, chunks: list[RelayChunk]) -> None:
        now = self._loop.time()
        grant = chunks[0].grant
        source = grant.source
        targets: list[tuple[int, Slices]] = []
        for chunk in chunks:
            assert chunk.slot is not None
            chunk.upstream_tag = self._next_tag
            self._next_tag += 1
            # One shape for all sizes of chunks, as a table needs it.
            where = Slices(chunk.slot.offset, SLAB_BYTES, 1, SLAB_BYTES, 0, chunk.slot.nbytes)
            targets.append((chunk.upstream_tag, where))
        self._rate.begin(now)
        try:
            upstream = self._upstream(source.daemon)
            assert upstream.network is not None
            assert upstream.window is not None
            for chunk in chunks:
                upstream.reading[chunk.upstream_tag] = chunk
            upstream.network.transport.arm(upstream.window, targets)
            for chunk in chunks:
                chunk.armed = True
            deadline_s = max(chunk.grant.deadline_at for chunk in chunks) - now
            grant_id = source.daemon.deliver(
                common_pb2.ChunkGrant(
                    window=upstream.window.to_bytes(),
                    lane=grant.lane,
                    deadline_ms=max(1, round(deadline_s * 1000)),
                    block=[chunk.block for chunk in chunks],
                    chunk=[chunk.chunk for chunk in chunks],
                    tag=[tag for tag, _ in targets],
                    target=table_of([where for _, where in targets]),
                ),
                partial(self._on_read_progress, upstream),
                lease_id=source.lease_id,
                ticket=source.ticket,
            )
            upstream.grant_ids.add(grant_id)
        except DualPathError as error:
            for chunk in chunks:
                self._fail(chunk, _failure_of(error), str(error))

    def _upstream(self, daemon: DaemonLink) -> _Upstream:
        """The window on the staging through which this daemon writes."""
        upstream = self._upstreams.setdefault(daemon.address, _Upstream(daemon))
        network = daemon.link.network
        if network is None:
            raise DualPathError(f"daemon {daemon.address} is away", reason="peer_lost")
        if upstream.network is not network:
            if upstream.network is not None and upstream.window is not None:
                upstream.network.transport.revoke(upstream.window)
            region = self.staging.region
            upstream.network = network
            upstream.window = network.transport.expose(
                region, 0, region.nbytes, partial(self._forward, upstream)
            )
        return upstream

    def _on_read_progress(self, upstream: _Upstream, progress: common_pb2.GrantProgress) -> None:
        if progress.done:
            upstream.grant_ids.discard(progress.grant_id)
        self._landed.drain()
        for tag, failure in zip(progress.failed_tag, progress.failure, strict=True):
            chunk = upstream.reading.get(tag)
            if chunk is not None:
                self._fail(chunk, failure, progress.detail)
        self._pump()

    # Forwarding.

    def _forward(self, upstream: _Upstream, arrival: Arrival) -> bool:
        """A chunk lies in its slot. On a transport thread: nothing here but the write."""
        chunk = upstream.reading.get(arrival.tag)
        if chunk is None or chunk.slot is None:
            return False
        grant = chunk.grant
        self._landed.put(chunk)
        left_s = grant.deadline_at - self._loop.time()
        if left_s <= 0:
            late = common_pb2.CHUNK_FAILURE_DEADLINE
            self._ended.put(_Ended(chunk, late, "arrived past the deadline"))
            return True
        write = Write(
            self.staging.region,
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
            self._ended.put(_Ended(chunk, _failure_of(error), str(error)))
        return True

    def _written(self, chunk: RelayChunk, completion: Completion) -> None:
        """On a transport thread: the write of a chunk ended."""
        failure = _FAILURE_OF_STATUS.get(completion.status)
        self._ended.put(_Ended(chunk, failure, completion.detail))

    def _on_landed(self, chunks: list[RelayChunk]) -> None:
        now = self._loop.time()
        for chunk in chunks:
            upstream = self._upstreams.get(chunk.grant.source.daemon.address)
            if upstream is not None:
                upstream.reading.pop(chunk.upstream_tag, None)
            if chunk.stage is Stage.READING:
                self._no_longer_reading(chunk)
                self._rate.landed(chunk.target.nbytes, now)
                chunk.stage = Stage.FORWARDING
        if not self._reading_bytes:
            self._rate.end()
        self._queue_changed()
        self._pump()

    def _on_ended(self, items: list[_Ended]) -> None:
        self._landed.drain()
        for item in items:
            self._end(item.chunk, item.failure, item.detail)
        self._pump()

    # Ends.

    def _fail(self, chunk: RelayChunk, failure: ChunkFailure, detail: str) -> None:
        """End a chunk that waits or is being read; one that landed is left to its write."""
        if chunk.stage is Stage.READING:
            upstream = self._upstreams[chunk.grant.source.daemon.address]
            if chunk.armed:
                assert upstream.network is not None
                assert upstream.window is not None
                tag = chunk.upstream_tag
                if tag not in upstream.network.transport.disarm(upstream.window, (tag,)):
                    return
            upstream.reading.pop(chunk.upstream_tag, None)
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
                self.read_bytes -= chunk.target.nbytes
                self._fail(chunk, failure, detail)
        for upstream in self._upstreams.values():
            for chunk in tuple(upstream.reading.values()):
                if chosen(chunk):
                    self._fail(chunk, failure, detail)
        self._queue_changed()

    def _no_longer_reading(self, chunk: RelayChunk) -> None:
        nbytes = chunk.target.nbytes
        chunk.grant.requester.reading_bytes -= nbytes
        self._reading_bytes -= nbytes
        self.read_bytes -= nbytes

    def _end(self, chunk: RelayChunk, failure: ChunkFailure | None, detail: str) -> None:
        assert chunk.stage is not Stage.OVER, "a chunk ended twice"
        chunk.stage = Stage.OVER
        grant, requester = chunk.grant, chunk.grant.requester
        if chunk.slot is not None:
            self.staging.give_back(chunk.slot)
            requester.staged_bytes -= chunk.target.nbytes
            chunk.slot = None
        grant.open_chunks -= 1
        if failure is None:
            requester.relayed_bytes += chunk.target.nbytes
            self.relayed_bytes += chunk.target.nbytes
            self.relayed_chunks += 1
        else:
            grant.failures.append((chunk.tag, failure))
            grant.detail = grant.detail or detail
            self.events[f"relay_{REASON_OF_FAILURE.get(failure, 'failed')}"] += 1
        if grant.open_chunks == 0:
            requester.grants.pop(grant.grant_id, None)
        if grant.failures or grant.open_chunks == 0:
            if not self._reports:
                # Later, so that one message carries a burst and no caller is re-entered.
                self._loop.call_soon(self._report)
            self._reports[grant] = None

    def _report(self) -> None:
        grants, self._reports = self._reports, {}
        for grant in grants:
            failures, grant.failures = grant.failures, []
            if grant.requester.closed:
                continue
            grant.on_progress(
                common_pb2.GrantProgress(
                    grant_id=grant.grant_id,
                    done=grant.open_chunks == 0,
                    failed_tag=[tag for tag, _ in failures],
                    failure=[failure for _, failure in failures],
                    queue_bytes=self.others_read_bytes(grant.requester),
                    detail=grant.detail,
                )
            )

    # Timers.

    def _arm_sweep(self) -> None:
        if self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_S, self._on_sweep)

    def _on_sweep(self) -> None:
        self._sweep = None
        now = self._loop.time()
        self._fail_where(
            lambda chunk: chunk.grant.deadline_at <= now,
            common_pb2.CHUNK_FAILURE_DEADLINE,
            "waited at the relay past the deadline",
        )
        self._pump()
        if any(requester.grants for requester in self._requesters.values()):
            self._arm_sweep()

    def _queue_changed(self) -> None:
        if self._telling is None:
            self._telling = self._loop.call_later(TELL_S, self._tell)

    def _tell(self) -> None:
        self._telling = None
        self._on_queue()
        for requester in tuple(self._requesters.values()):
            if requester.on_queue is not None:
                requester.on_queue()


def _failure_of(error: DualPathError) -> ChunkFailure:
    return FAILURE_OF_REASON.get(error.reason, common_pb2.CHUNK_FAILURE_PEER_LOST)

"""The delivery engine: reads granted chunks from the store and writes them to their receivers.

Owns the reader threads, the queue (`delivery_queue`) under one lock, and the counters. Chunks are
read and written in batches; one is held in memory from `store.fetch_batch` until its write has
completed. A receiver that does not read holds only its own bounded bytes in flight, and only until
its grants' deadlines. Every granted chunk ends exactly once: landed, or in a report with its
reason. Knows no gRPC.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from dualpath.kvstore.fetched_batch import FetchedBatch, FetchStatus
from dualpath.kvstore.service.delivery_queue import (
    NONE_FAILED,
    ChunkFailure,
    Delivery,
    DeliveryQueue,
    Grant,
    Progress,
)
from dualpath.kvstore.service.histogram import Buckets, Histogram
from dualpath.kvstore.service.named_counts import NamedCounts
from dualpath.kvstore.store_api import Store
from dualpath.transfer.errors import (
    Corrupt,
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    LeaseExpired,
    Overloaded,
    Unavailable,
)
from dualpath.transfer.lane import Lane
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.transport import BatchCompletion, Transport, WriteBatch, WriteStatus
from numpy.typing import NDArray

JOIN_S_MAX = 5.0
IDLE_S_MAX = 1.0
"""Longest sleep of a reader, a safety net under its wake-ups."""
FAILURES_PER_REPORT = 4096
OnReport = Callable[[bool], None]
"""Told whether the news is of failures, rather than of a grant that is done."""
BATCHES_INFLIGHT = 2
"""Batches that an attachment's bytes in flight make up: one is sent while the next is read."""
TURN_BYTES = 1 << 20
"""What one grant gets at a time while others wait."""

_log = logging.getLogger(__name__)

_BY_STATUS: Mapping[WriteStatus, ChunkFailure | None] = {
    WriteStatus.DONE: None,
    WriteStatus.REFUSED: ChunkFailure.REFUSED,
    WriteStatus.LOST: ChunkFailure.PEER_LOST,
    WriteStatus.CLOSED: ChunkFailure.PEER_LOST,
    WriteStatus.EXPIRED: ChunkFailure.DEADLINE,
}
_BY_ERROR: tuple[tuple[type[DualPathError], ChunkFailure], ...] = (
    (LeaseExpired, ChunkFailure.LEASE_EXPIRED),
    (Corrupt, ChunkFailure.CORRUPT),
    (Overloaded, ChunkFailure.OVERLOADED),
    (DeadlineExceeded, ChunkFailure.DEADLINE),
    (Unavailable, ChunkFailure.PEER_LOST),
    (InvalidRequest, ChunkFailure.INVALID),
)
_UNREAD: tuple[tuple[int, ChunkFailure, str], ...] = (
    (FetchStatus.CORRUPT, ChunkFailure.CORRUPT, "the medium failed, or the block was dropped"),
    (FetchStatus.UNAVAILABLE, ChunkFailure.OVERLOADED, "the medium did not answer in time"),
    (FetchStatus.GONE, ChunkFailure.LEASE_EXPIRED, "the block has left since it was leased"),
)


@dataclass(frozen=True, slots=True)
class DeliveryConfig:
    """`readers` threads; bytes in flight of one attachment and of all together."""

    readers: int = 4
    attachment_inflight_bytes: int = 64 << 20
    inflight_bytes: int = 128 << 20


@dataclass(frozen=True, slots=True)
class DeliveryStats:
    """Counters since start; `pending_bytes` are granted and have neither landed nor failed.

    `peer_bytes` are by the receiver's name, `principal_bytes` by its principal. Of chunks that
    landed: `read_s` is the time to bring one into memory, `delivery_s` the time from there to the
    receiver's acknowledgement as well.
    """

    delivered_bytes: int
    delivered_chunks: int
    failures: Mapping[ChunkFailure, int]
    pending_bytes: int
    peer_bytes: Mapping[str, int]
    principal_bytes: Mapping[str, int]
    lane_bytes: Mapping[Lane, int]
    lane_chunks: Mapping[Lane, int]
    read_s: Buckets
    delivery_s: Buckets


@dataclass(frozen=True, slots=True)
class _Receiver:
    name: str
    principal: str
    transport: Transport
    on_report: OnReport


@dataclass(frozen=True, slots=True)
class _Sending:
    """Chunks on their way: the receiver's name and principal; when they were picked and read, in
    seconds."""

    name: str
    principal: str
    picked_at: float
    read_at: float


def failure_of(error: Exception) -> ChunkFailure:
    """The reason that is reported for a chunk whose delivery raised `error`."""
    for kind, failure in _BY_ERROR:
        if isinstance(error, kind):
            return failure
    return ChunkFailure.CORRUPT


class DeliveryEngine:
    """See the module docstring. All methods are thread-safe and do not block, but `drain`,
    `close` and `wait_idle`. `clock` gives seconds, monotonic."""

    def __init__(
        self,
        store: Store,
        config: DeliveryConfig = DeliveryConfig(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._clock = clock
        self._queue = DeliveryQueue(
            peer_inflight_bytes=config.attachment_inflight_bytes,
            inflight_bytes=config.inflight_bytes,
            batch_bytes=config.attachment_inflight_bytes // BATCHES_INFLIGHT,
            turn_bytes=TURN_BYTES,
        )
        lock = threading.Lock()  # guards what follows
        self._wake = threading.Condition(lock)
        """There is something to read, or the end."""
        self._quiet = threading.Condition(lock)
        """Nothing is in flight, or nothing pending any more."""
        self._receivers: dict[str, _Receiver] = {}
        self._closed = False
        self._draining = False
        self._peer_bytes = NamedCounts()
        self._principal_bytes = NamedCounts()
        self._lane_bytes: Counter[Lane] = Counter()
        self._lane_chunks: Counter[Lane] = Counter()
        self._read_s = Histogram()
        self._delivery_s = Histogram()
        self._threads = [
            threading.Thread(target=self._run, name=f"deliver-{index}", daemon=True)
            for index in range(config.readers)
        ]
        for thread in self._threads:
            thread.start()

    def open(
        self,
        peer: str,
        transport: Transport,
        on_report: OnReport,
        *,
        name: str = "",
        principal: str = "",
    ) -> None:
        """Take grants of `peer`, written over `transport`. `on_report` is called from any thread
        when `reports` has news. Counts bytes under `name`, by default the peer's; `principal`
        shares the reading fairly with the others. Raises InvalidRequest if it is open already."""
        with self._wake:
            self._queue.open(peer, principal)
            self._receivers[peer] = _Receiver(name or peer, principal, transport, on_report)

    def close_peer(self, peer: str) -> None:
        """Drop what waits for `peer`; writes in flight end unreported."""
        with self._wake:
            self._queue.close(peer)
            self._receivers.pop(peer, None)
            self._wake.notify_all()
            self._quiet.notify_all()

    def submit(self, peer: str, grant: Grant) -> None:
        """Queue a grant. Raises InvalidRequest, Overloaded; PeerLost cannot happen here."""
        with self._wake:
            if self._draining or self._closed:
                raise Unavailable("the daemon is stopping: use another path", reason="draining")
            self._queue.add(peer, grant)
            self._wake.notify()

    def refuse(
        self, peer: str, grant_id: int, tags: Sequence[int], failure: ChunkFailure, detail: str
    ) -> None:
        """Report a grant as failed as a whole. Raises InvalidRequest, Overloaded."""
        with self._wake:
            self._queue.refuse(peer, grant_id, tags, failure, detail)
            receiver = self._receivers[peer]
        receiver.on_report(True)

    def cancel(self, peer: str, grant_id: int) -> bool:
        """Drop what waits of a grant; False if the grant is unknown or done."""
        with self._wake:
            known = self._queue.cancel(peer, grant_id)
            self._quiet.notify_all()
            receiver = self._receivers[peer]
        if known:
            receiver.on_report(True)
        return known

    def reports(self, peer: str) -> list[Progress]:
        """Take what is new of a peer's grants; call again until it is empty."""
        with self._wake:
            return self._queue.reports(peer, FAILURES_PER_REPORT)

    def open_grants(self, peer: str) -> int:
        """Grants of `peer` that are not done, or not reported yet."""
        with self._wake:
            return self._queue.open_grants(peer)

    def stats(self) -> DeliveryStats:
        """A snapshot."""
        with self._wake:
            return DeliveryStats(
                delivered_bytes=self._lane_bytes.total(),
                delivered_chunks=self._lane_chunks.total(),
                failures=dict(self._queue.failures),
                pending_bytes=self._queue.pending_bytes,
                peer_bytes=self._peer_bytes.snapshot(),
                principal_bytes=self._principal_bytes.snapshot(),
                lane_bytes=dict(self._lane_bytes),
                lane_chunks=dict(self._lane_chunks),
                read_s=self._read_s.snapshot(),
                delivery_s=self._delivery_s.snapshot(),
            )

    @property
    def pending_bytes(self) -> int:
        """Granted, and neither landed nor failed."""
        with self._wake:
            return self._queue.pending_bytes

    def principal_pending_bytes(self, principal: str) -> int:
        """Granted to a principal, and neither landed nor failed."""
        with self._wake:
            return self._queue.principal_bytes(principal)

    def drain(self, deadline_s: float) -> bool:
        """Refuse new grants and wait until nothing is pending; False if the time ran out."""
        with self._wake:
            self._draining = True
            return self._quiet.wait_for(lambda: self._queue.pending_bytes == 0, deadline_s)

    def wait_idle(self, deadline_s: float) -> bool:
        """Wait until nothing is in flight, so that no chunk's buffer is held any more."""
        with self._wake:
            return self._quiet.wait_for(lambda: self._queue.inflight_bytes == 0, deadline_s)

    def close(self) -> None:
        """Drop all queues and join the readers. Writes in flight still complete later."""
        with self._wake:
            self._closed = True
            for peer in list(self._receivers):
                self._queue.close(peer)
            self._receivers.clear()
            self._wake.notify_all()
            self._quiet.notify_all()
        for thread in self._threads:
            thread.join(JOIN_S_MAX)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._start(job)

    def _next(self) -> Delivery | None:
        """Wait for a chunk to deliver; None when closed."""
        while True:
            with self._wake:
                if self._closed:
                    return None
                now = self._clock()
                late = [self._receivers[name] for name in self._queue.expire(now)]
                if not late:
                    job = self._queue.next(now)
                    if job is not None:
                        return job
                    deadline = self._queue.next_deadline()
                    wait_s = IDLE_S_MAX if deadline is None else max(0.0, deadline - now)
                    self._wake.wait(min(IDLE_S_MAX, wait_s))
                elif self._queue.pending_bytes == 0:
                    self._quiet.notify_all()
            for receiver in late:
                receiver.on_report(True)

    def _start(self, job: Delivery) -> None:
        """Read the chunks of a delivery and send them on as they come."""
        receiver = self._receivers.get(job.peer)
        picked_at = self._clock()
        count = len(job.granted)
        if receiver is None:
            self._fail(job, range(count), ChunkFailure.PEER_LOST, "attachment closed")
            return
        if job.deadline_at <= picked_at:
            self._fail(job, range(count), ChunkFailure.DEADLINE, "queued past the deadline")
            return
        first = 0
        while first < count:
            # The store may have buffers for a part only.
            try:
                fetched = self._store.fetch_batch(
                    job.lease_id, job.granted.blocks[first:], job.granted.chunks[first:], wait=False
                )
            except Exception as error:  # noqa: BLE001 - the edge of a thread: each chunk must end
                self._fail_by(job, range(first, count), error)
                return
            self._send_arriving(job, receiver, fetched, first, picked_at)
            first += len(fetched)

    def _send_arriving(
        self,
        job: Delivery,
        receiver: _Receiver,
        fetched: FetchedBatch,
        first: int,
        picked_at: float,
    ) -> None:
        """Send what was fetched, run by run; `first` is the index of its first chunk in `job`."""
        left = set(range(len(fetched)))
        try:
            while left:
                arrived = fetched.arrived(IDLE_S_MAX)
                if len(arrived) < len(left):
                    with self._wake:  # a medium is at work: others may read meanwhile
                        if self._queue.queued_bytes:
                            self._wake.notify()
                sending = _Sending(receiver.name, receiver.principal, picked_at, self._clock())
                left.difference_update(arrived.tolist())
                status = fetched.status[arrived]
                for run in _runs(np.sort(arrived[status == FetchStatus.OK]).tolist()):
                    self._send(job, receiver, fetched, run, first, sending)
                for code, failure, detail in _UNREAD:
                    lost = arrived[status == code]
                    if len(lost):
                        fetched.release(lost)
                        self._fail(job, [first + each for each in lost.tolist()], failure, detail)
        except Exception as error:  # noqa: BLE001 - as above
            rest = np.array(sorted(left), np.int32)
            fetched.release(rest[fetched.status[rest] != FetchStatus.UNDER_WAY])
            self._fail_by(job, [first + each for each in rest.tolist()], error)

    def _send(
        self,
        job: Delivery,
        receiver: _Receiver,
        fetched: FetchedBatch,
        run: range,
        first: int,
        sending: _Sending,
    ) -> None:
        """Write neighbouring chunks [run) of `fetched`."""
        indices = range(first + run.start, first + run.stop)
        chunks = np.arange(run.start, run.stop, dtype=np.int32)
        try:
            targets = job.granted.targets
            if len(indices) < len(job.granted):
                targets = targets.parts(indices.start, indices.stop)
            sizes = fetched.nbytes[run.start : run.stop].tolist()
            if sizes != list(targets.sizes):
                raise InvalidRequest(
                    f"chunks have {sizes} bytes, their targets {list(targets.sizes)}"
                )
            offsets = fetched.offsets[run.start : run.stop].tolist()
            batch = WriteBatch(
                fetched.region,
                SliceTable.contiguous(offsets, sizes),
                job.window,
                targets,
                job.lane,
                job.granted.tags[indices.start],
                max(1e-3, job.deadline_at - sending.read_at),
            )
            receiver.transport.write_batch(
                job.peer, batch, partial(self._completed, job, fetched, chunks, indices, sending)
            )
        except Exception as error:  # noqa: BLE001 - as above
            fetched.release(chunks)
            self._fail_by(job, indices, error)

    def _completed(
        self,
        job: Delivery,
        fetched: FetchedBatch,
        chunks: NDArray[np.int32],
        indices: range,
        sending: _Sending,
        completion: BatchCompletion,
    ) -> None:
        fetched.release(None if len(chunks) == len(fetched) else chunks)
        failure = _BY_STATUS[completion.status]
        if failure is not None:
            self._fail(job, indices, failure, completion.detail or completion.status.value)
            return
        refused = {
            indices.start + tag - completion.first_tag: ChunkFailure.REFUSED
            for tag in completion.refused
        }
        detail = next(iter(completion.refused.values()), "")
        landed = [index for index in indices if index not in refused] if refused else indices
        self._count(job, landed, sending)
        self._finish(job, indices, refused, detail)

    def _count(self, job: Delivery, landed: Sequence[int], sending: _Sending) -> None:
        sizes, now = job.granted.targets.sizes, self._clock()
        whole = len(landed) == len(sizes)
        nbytes = job.nbytes if whole else sum(sizes[index] for index in landed)
        with self._wake:
            self._peer_bytes.add(sending.name, nbytes)
            self._principal_bytes.add(sending.principal, nbytes)
            self._lane_bytes[job.lane] += nbytes
            self._lane_chunks[job.lane] += len(landed)
            self._read_s.observe(sending.read_at - sending.picked_at, len(landed))
            self._delivery_s.observe(now - sending.picked_at, len(landed))

    def _fail_by(self, job: Delivery, indices: Sequence[int], error: Exception) -> None:
        if not isinstance(error, DualPathError):
            _log.exception("a delivery of lease %d failed", job.lease_id)
        self._fail(job, indices, failure_of(error), str(error))

    def _fail(
        self, job: Delivery, indices: Sequence[int], failure: ChunkFailure, detail: str
    ) -> None:
        self._finish(job, indices, dict.fromkeys(indices, failure), detail)

    def _finish(
        self,
        job: Delivery,
        indices: Sequence[int],
        failures: Mapping[int, ChunkFailure] = NONE_FAILED,
        detail: str = "",
    ) -> None:
        with self._wake:
            news = self._queue.finished(job, indices, failures, detail)
            receiver = self._receivers.get(job.peer) if news else None
            if self._queue.inflight_bytes == 0 or self._draining:
                self._quiet.notify_all()
            if self._queue.queued_bytes:
                self._wake.notify()
        if receiver is not None:
            receiver.on_report(bool(failures))


def _runs(indices: Sequence[int]) -> Iterator[range]:
    """Neighbours among ascending indices."""
    first = 0
    for at in range(1, len(indices) + 1):
        if at == len(indices) or indices[at] != indices[at - 1] + 1:
            yield range(indices[first], indices[at - 1] + 1)
            first = at

"""The writing half of the store: reserve, seal, and what the committer asks of it.

Durable seals are published when their group has committed; others at once, while the committer
writes them back. A child is never durable before its parent: jobs are queued parents first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from dualpath.kvstore import checksum
from dualpath.kvstore.block_table import GONE, NO_ROW, RowState
from dualpath.kvstore.catalog import NamespaceEntry, check_hashes
from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.committer import Committer
from dualpath.kvstore.housekeeping import Housekeeping
from dualpath.kvstore.media_troubles import MediaTroubles
from dualpath.kvstore.record import BlockRecord
from dualpath.kvstore.store_api import (
    BATCH_BLOCKS_MAX,
    RESERVATION_S_MAX,
    MissReason,
    NewBlock,
    Reservation,
    ReserveStatus,
    SealRequest,
    SealStatus,
    Tier,
)
from dualpath.kvstore.store_state import StoreState
from dualpath.transfer.errors import InvalidRequest, Unavailable
from dualpath.transfer.slices import Slices

_RESERVED_AT_ONCE = 64
_SEALED_AT_ONCE = 256
_SETTLED_AT_ONCE = 64
"""Blocks between two chances for others to take the lock."""
_log = logging.getLogger(__name__)

OnExpired = Callable[[tuple[int, ...]], None]


@dataclass(slots=True)
class _Sealing:
    """One block on its way through `seal`; `status` is None until it is decided."""

    row: int
    request: SealRequest
    entry: NamespaceEntry | None = None
    status: SealStatus | None = None
    checksums: tuple[int, ...] = ()


@dataclass(slots=True)
class _Batch:
    """Sealings that a thread waits for; `waiting` counts those, and the thread until it has
    queued all of them."""

    durable: bool
    writer: str
    last: _Sealing | None
    """With this one it has brought all; None if more follows at once."""
    waiting: int = 1
    submitted_before: int = 0
    """Jobs of all batches that were queued before this one."""
    failed: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class BlockWriter:
    """See the module docstring. Implements CommitHost."""

    def __init__(self, state: StoreState, troubles: MediaTroubles) -> None:
        self._state = state
        self._troubles = troubles
        self._housekeeping = Housekeeping(state)
        self._committer: Committer | None = None
        self._queued: set[int] = set()
        # Jobs so far; they are settled in the order in which they were submitted.
        self._submitted = 0
        self._settled = 0
        self._waiters: dict[int, tuple[_Batch, _Sealing]] = {}
        self.on_expired: OnExpired | None = None

    def attach(self, committer: Committer) -> None:
        """Give the committer; once, before anything else."""
        self._committer = committer

    # Reserve

    def reserve(
        self, namespace_id: bytes, blocks: Sequence[NewBlock], *, owner: str, ttl_s: float
    ) -> tuple[Reservation, ...]:
        """See Store."""
        check_hashes([block.hash for block in blocks])
        check_hashes([block.parent for block in blocks if block.parent])
        if not 0 < ttl_s <= RESERVATION_S_MAX:
            raise InvalidRequest(f"ttl_s must lie in 0..{RESERVATION_S_MAX} s, not {ttl_s}")
        state = self._state
        deadline = time.monotonic() + state.config.reserve_wait_s
        with state.lock:
            state.reservations.check_room(len(blocks))
        outcomes: list[Reservation] = []
        for start in range(0, len(blocks), _RESERVED_AT_ONCE):
            with state.lock:
                state.check_open()
                self._reap()
                for block in blocks[start : start + _RESERVED_AT_ONCE]:
                    outcomes.append(self._reserve(namespace_id, block, owner, ttl_s, deadline))
        return tuple(outcomes)

    def _reserve(
        self, namespace_id: bytes, block: NewBlock, owner: str, ttl_s: float, deadline: float
    ) -> Reservation:
        """One block; waits for room that is about to come free."""
        state = self._state
        while True:
            # Anew after each wait: a namespace that holds nothing may have been forgotten.
            entry = state.catalog.entry(namespace_id)
            outcome = self._try_reserve(entry, block, owner, ttl_s)
            left = deadline - time.monotonic()
            refused = outcome.status in (ReserveStatus.FULL, ReserveStatus.QUOTA)
            if not refused or left <= 0 or not self._room_is_coming():
                return outcome
            if self._committer is not None:
                self._committer.call()  # nothing more comes from here before there is room
            state.room.wait(left)
            state.check_open()

    def _room_is_coming(self) -> bool:
        state = self._state
        return bool(state.residency.dirty_bytes or state.expired or self._queued)

    def _try_reserve(
        self, entry: NamespaceEntry, block: NewBlock, owner: str, ttl_s: float
    ) -> Reservation:
        state = self._state
        known = state.catalog.row_of(entry, block.hash)
        if known != NO_ROW:
            state.residency.touch(np.array([known], np.int32))
            return Reservation(ReserveStatus.EXISTS)
        if block.hash in entry.pending:
            return Reservation(ReserveStatus.PENDING)
        parent = NO_ROW
        if block.parent:
            parent = state.catalog.row_of(entry, block.parent)
            if parent == NO_ROW:
                parent = entry.pending.get(block.parent, NO_ROW)
                if parent == NO_ROW or state.residency.owners.get(parent) != owner:
                    return Reservation(ReserveStatus.NO_PARENT)
        if state.reservations.is_full:
            return Reservation(ReserveStatus.FULL)
        row = state.residency.reserve(entry, block.hash, parent, owner)
        if isinstance(row, ReserveStatus):
            return Reservation(row)
        held = state.reservations.hold(owner, row, state.clock(), ttl_s)
        extent = Slices.contiguous(int(state.table.dram[row]), entry.layout.block_bytes)
        return Reservation(ReserveStatus.RESERVED, held.id, extent)

    def abandon(self, reservation_ids: Sequence[int], *, owner: str) -> None:
        """See Store."""
        state = self._state
        with state.lock:
            for reservation_id in reservation_ids:
                held = state.reservations.find(reservation_id, owner)
                if held is not None:
                    state.reservations.end(reservation_id)
                    state.residency.drop_pending(held.row)
            state.room.notify_all()

    def forget_owner(self, owner: str) -> None:
        """See Store."""
        state = self._state
        with state.lock:
            for lease in state.leases.forget(owner):
                state.end_lease(lease)
            for held in state.reservations.forget(owner):
                state.residency.drop_pending(held.row)
            state.room.notify_all()

    # Seal

    def seal(
        self, requests: Sequence[SealRequest], *, owner: str, durable: bool, writer: str = ""
    ) -> tuple[SealStatus, ...]:
        """See Store."""
        return self.begin_seal(requests, owner=owner, durable=durable, writer=writer)()

    def begin_seal(
        self,
        requests: Sequence[SealRequest],
        *,
        owner: str,
        durable: bool,
        writer: str = "",
        more: bool = False,
    ) -> Callable[[], tuple[SealStatus, ...]]:
        """See Store."""
        if len(requests) > BATCH_BLOCKS_MAX:
            raise InvalidRequest(f"{len(requests)} blocks in one seal; at most {BATCH_BLOCKS_MAX}")
        sealings = self._begin(requests, owner)
        for sealing in sealings:
            if sealing.status is None:
                self._hash(sealing)
        batch = _Batch(durable, writer or owner, None if more or not sealings else sealings[-1])
        self._enqueue(sealings, batch)

        def statuses() -> tuple[SealStatus, ...]:
            if not batch.done.wait(self._state.config.commit_wait_s):
                raise self._too_slow()
            if durable:
                self._await_settled(batch.submitted_before)
            return tuple(sealing.status or SealStatus.FAILED for sealing in sealings)

        return statuses

    def _begin(self, requests: Sequence[SealRequest], owner: str) -> list[_Sealing]:
        """Check everything, then close the reservations; their rows are pinned from now on."""
        state, table = self._state, self._state.table
        sealings: list[_Sealing] = []
        with state.lock:
            state.check_open()
            self._reap()
            for request in requests:
                held = state.reservations.find(request.reservation_id, owner)
                entry = None if held is None else state.catalog.entry_of(held.row)
                sealings.append(_Sealing(-1 if held is None else held.row, request, entry))
                chunks = entry.layout.chunk_count if entry else len(request.checksums)
                if request.checksums and len(request.checksums) != chunks:
                    raise InvalidRequest(
                        f"reservation {request.reservation_id} has {chunks} chunks, "
                        f"{len(request.checksums)} checksums were given"
                    )
            for sealing in sealings:
                row = sealing.row
                if row < 0 or table.state[row] != RowState.PENDING:
                    sealing.status = SealStatus.EXPIRED
                    continue
                parent = int(table.parent[row])
                if parent >= 0 and table.state[parent] == RowState.PENDING:
                    # Sealed out of order: the reservation stays, so that it can be tried again.
                    sealing.status = SealStatus.EXPIRED
                    continue
                state.reservations.end(sealing.request.reservation_id)
                table.state[row] = RowState.SEALING
                table.pins[row] += 1
        return sealings

    def _hash(self, sealing: _Sealing) -> None:
        """Checksum the bytes in place; clear what is left of the slot."""
        assert sealing.entry is not None
        layout = sealing.entry.layout
        view = self._slot_view(sealing.row, layout.slot_bytes)
        if layout.slot_bytes > layout.block_bytes:
            view[layout.block_bytes :] = bytes(layout.slot_bytes - layout.block_bytes)
        given = sealing.request.checksums
        if given and sealing.request.trusted:
            sealing.checksums = given
            return
        sealing.checksums = checksum.of_block(view, layout)
        if given and given != sealing.checksums:
            sealing.status = SealStatus.CORRUPT

    def _enqueue(self, sealings: Sequence[_Sealing], batch: _Batch) -> None:
        """Publish or queue each block, in order. The batch is done when all are decided."""
        state = self._state
        with state.lock:
            batch.submitted_before = self._submitted
        for start in range(0, len(sealings), _SEALED_AT_ONCE):
            jobs: list[CommitJob] = []
            with state.lock:
                for sealing in sealings[start : start + _SEALED_AT_ONCE]:
                    if sealing.status is SealStatus.CORRUPT:
                        self._give_up(sealing.row)
                    elif sealing.status is None:
                        self._enqueue_one(sealing, batch, jobs)
                self._submit(jobs)
                state.room.notify_all()
        with state.lock:
            self._decided(batch)

    def _enqueue_one(self, sealing: _Sealing, batch: _Batch, jobs: list[CommitJob]) -> None:
        state, row = self._state, sealing.row
        self._await_parent(row, jobs)
        if not batch.durable:
            self._await_write_back(row, jobs)
        parent = int(state.table.parent[row])
        if parent == GONE:
            sealing.status = SealStatus.FAILED if batch.failed else SealStatus.EXPIRED
            self._give_up(row)
            return
        state.generation += 1
        jobs.append(self._job(sealing, batch))
        self._queued.add(row)
        if not batch.durable and (parent < 0 or state.table.state[parent] == RowState.PRESENT):
            self._publish(jobs[-1], dirty=True)
            sealing.status = SealStatus.SEALED
        else:
            batch.waiting += 1
            self._waiters[row] = (batch, sealing)

    def flush(self) -> None:
        """Wait until all that was sealed before is on the SSD, or was given up. Raises
        Unavailable."""
        with self._state.lock:
            jobs = self._submitted
        self._await_settled(jobs)

    def _await_settled(self, jobs: int) -> None:
        """Wait until the first `jobs` jobs ever are settled: a durable caller may count on blocks
        that it found present."""
        state = self._state
        deadline = time.monotonic() + state.config.commit_wait_s
        with state.lock:
            while self._settled < jobs:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._too_slow()
                state.room.wait(left)

    def _too_slow(self) -> Unavailable:
        return Unavailable(
            f"the SSD tier did not finish a commit within {self._state.config.commit_wait_s} s; "
            "blocks of this batch may or may not be stored"
        )

    def _give_up(self, row: int) -> None:
        self._state.residency.drop_pending(row)
        self._state.residency.unpin(row)

    def _decided(self, batch: _Batch) -> None:
        batch.waiting -= 1
        if batch.waiting == 0:
            batch.done.set()

    def _await_parent(self, row: int, jobs: list[CommitJob]) -> None:
        """Wait while another thread is still hashing the parent: its job must come first."""
        state, table = self._state, self._state.table
        deadline = time.monotonic() + state.config.commit_wait_s
        while True:
            parent = int(table.parent[row])
            if parent < 0 or table.state[parent] != RowState.SEALING or parent in self._queued:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._submit(jobs)
            state.room.wait(left)

    def _await_write_back(self, row: int, jobs: list[CommitJob]) -> None:
        """Wait while too much is waiting to be written back."""
        state = self._state
        nbytes = int(state.table.slot_bytes[row])
        deadline = time.monotonic() + state.config.commit_wait_s
        while state.residency.dirty_bytes + nbytes > state.config.dirty_bytes_max:
            left = deadline - time.monotonic()
            if left <= 0 or state.residency.dirty_bytes == 0:
                return
            self._submit(jobs)
            state.room.wait(left)

    def _submit(self, jobs: list[CommitJob]) -> None:
        assert self._committer is not None
        if jobs:
            self._committer.submit(list(jobs))
            self._submitted += len(jobs)
            jobs.clear()

    def _job(self, sealing: _Sealing, batch: _Batch) -> CommitJob:
        state, table, row = self._state, self._state.table, sealing.row
        assert sealing.entry is not None
        parent = int(table.parent[row])
        record = BlockRecord(
            namespace_id=sealing.entry.id,
            hash=table.hash_of(row),
            parent=table.hash_of(parent) if parent >= 0 else b"",
            length=sealing.entry.layout.block_bytes,
            segment=int(table.segment[row]),
            slot=int(table.slot[row]),
            generation=state.generation,
            checksums=sealing.checksums,
            writer=batch.writer,
            sealed_unix_s=time.time(),
        )
        at, nbytes = int(table.dram[row]), sealing.entry.layout.slot_bytes
        job = CommitJob(row, parent, record, sealing.entry.namespace, at, nbytes)
        job.ends_put = batch.durable and sealing is batch.last
        job.has_more = batch.durable and not job.ends_put
        return job

    def _publish(self, job: CommitJob, *, dirty: bool) -> None:
        record = job.record
        self._state.residency.publish(job.row, record.generation, record.checksums, dirty=dirty)
        self._state.counters.written_bytes[Tier.DRAM] += record.length

    def _slot_view(self, row: int, slot_bytes: int) -> memoryview:
        return self._state.dram.view(int(self._state.table.dram[row]), slot_bytes)

    # CommitHost

    def admit(self, jobs: Sequence[CommitJob]) -> None:
        """See CommitHost."""
        table = self._state.table
        with self._state.lock:
            group: set[int] = set()
            for job in jobs:
                parent = int(table.parent[job.row])
                if table.state[job.row] == RowState.DEAD or parent == GONE:
                    job.failure = "the block or its parent was dropped meanwhile"
                elif parent >= 0 and parent not in group and not self._is_durable(parent):
                    job.failure = "its parent is not stored"
                else:
                    group.add(job.row)

    def _is_durable(self, row: int) -> bool:
        table = self._state.table
        return bool(table.state[row] == RowState.PRESENT and not table.dirty[row])

    def settle(self, jobs: Sequence[CommitJob]) -> None:
        """See CommitHost."""
        state = self._state
        for start in range(0, len(jobs), _SETTLED_AT_ONCE):
            with state.lock:
                for job in jobs[start : start + _SETTLED_AT_ONCE]:
                    if job.row not in self._queued:
                        continue  # settled before a surprise, after which all are settled again
                    status = self._settle(job)
                    self._queued.discard(job.row)
                    self._settled += 1
                    state.residency.unpin(job.row)
                    batch, sealing = self._waiters.pop(job.row, (None, None))
                    if batch is not None and sealing is not None:
                        sealing.status = status
                        batch.failed = batch.failed or status is SealStatus.FAILED
                        self._decided(batch)
                state.room.notify_all()

    def _settle(self, job: CommitJob) -> SealStatus:
        state, table, row = self._state, self._state.table, job.row
        stored = not job.failure
        if stored:
            state.counters.written_bytes[Tier.SSD] += job.record.length
        if table.state[row] == RowState.SEALING:
            if stored and table.parent[row] != GONE:
                self._publish(job, dirty=False)
                return SealStatus.SEALED
            state.residency.drop_pending(row)
        elif table.state[row] == RowState.PRESENT:
            if stored:
                state.residency.set_dirty(row, dirty=False)
                return SealStatus.SEALED
            dropped = state.residency.drop(row, MissReason.EVICTED)
            self._troubles.lost_write_back(dropped, job.failure)
        if stored:
            # It left while it was being written: the record must go again.
            assert self._committer is not None
            record = job.record
            self._committer.delete(record.key, record.generation, job.place)
            return SealStatus.EXPIRED
        return SealStatus.FAILED

    def retired_segments(self) -> list[int]:
        """See CommitHost."""
        with self._state.lock:
            return self._state.ssd.take_retired()

    def chores(self) -> None:
        """See CommitHost: free the extents of expired reservations, fenced first; try again what
        failed some time ago; keep house."""
        state = self._state
        self._housekeeping.run()
        with state.lock:
            self._troubles.chores()
            state.reap()
            expired, state.expired = state.expired, []
        if not expired:
            return
        if self.on_expired is not None:
            self.on_expired(tuple(held.id for held in expired))
        with state.lock:
            for held in expired:
                state.residency.drop_pending(held.row)
            state.room.notify_all()

    def _reap(self) -> None:
        if self._state.reap() and self._committer is not None:
            self._committer.call()

"""The one thread that makes blocks durable, in groups.

Order of a group: (deletes of whatever its slots held before, if not committed yet) -> data, and
headers beside it -> fdatasync of each segment -> `settle`, which acknowledges. From then on the
headers speak for it; the index is told of several groups at once, soon (`index_backlog`). So what
the index names is always whole on the medium, and a slot is written again only after the delete of
its former block has committed; a header whose data is not whole is none. While a group is synced,
the next one is already being written: it goes to slots that nothing refers to yet. Groups are
settled in the order of their blocks' generations.

Does not decide what is visible: the host does, in `admit` and `settle`, under its own lock.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from dualpath.kvstore.commit_group import GROUP_JOBS_MAX, CommitGroup
from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.data_directory import DataDirectory
from dualpath.kvstore.data_pump import DataPump, DataWrite
from dualpath.kvstore.durable_index import DurableIndex
from dualpath.kvstore.header_writer import HeaderWriter
from dualpath.kvstore.index_backlog import IndexBacklog
from dualpath.kvstore.io_gate import IoGate
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.slot_items import WriteFailure
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.transfer.region import Region

_IDLE_S = 1.0
"""How often the host may do its chores when nothing else happens."""
_HOLD_S = 0.01
"""How long a group is held open for what somebody is about to bring."""
_SURPRISE = "internal error"
_log = logging.getLogger(__name__)


class CommitHost(Protocol):
    """What the committer needs of the store. Called on its thread, without its lock."""

    def admit(self, jobs: Sequence[CommitJob]) -> None:
        """Set `failure` of jobs that are not wanted any more."""

    def settle(self, jobs: Sequence[CommitJob]) -> None:
        """The group is over: acknowledge what is durable, give up what failed."""

    def retired_segments(self) -> list[int]:
        """Segments whose files may go once all deletes so far are committed."""

    def chores(self) -> None:
        """Called between groups and about every second."""


class CommitTroubles(Protocol):
    """Who is told of failures, and finds a way around them. Called as CommitHost is."""

    def no_space(self, segment: int) -> None:
        """The file system has no room for this segment."""

    def write_failed(self, segment: int, why: str) -> None:
        """A write to this segment, or its sync, has failed."""

    def relocate(self, jobs: Sequence[CommitJob]) -> list[CommitJob]:
        """Give failed jobs other places; return those that got one, not failed any more."""

    def index_answered(self, failure: str) -> None:
        """A transaction was refused, or ("") committed."""


class Committer:
    """See the module docstring. The queue is bounded by the host: each job holds a DRAM slot."""

    def __init__(
        self,
        host: CommitHost,
        troubles: CommitTroubles,
        ssd: SsdTier,
        index: DurableIndex,
        directory: DataDirectory,
        gate: IoGate,
        arena: Region,
    ) -> None:
        """Jobs lie in `arena`."""
        self._host = host
        self._troubles = troubles
        self._ssd = ssd
        self._directory = directory
        self._arena = arena
        self._wake = threading.Condition()
        self._pump = DataPump(ssd.device, gate, self._wake)
        self._headers = HeaderWriter(ssd, GROUP_JOBS_MAX)
        self._ahead = CommitGroup()
        self._backlog = IndexBacklog(self._wake, index, troubles.index_answered)
        self._jobs: deque[CommitJob] = deque()
        self._saved: set[Namespace] = set()
        self._closing = False
        self._retired: list[int] = []
        """Segments whose files go once the index names nothing in them."""
        self._called = False
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="dualpath-committer", daemon=True)

    def start(self) -> None:
        """Start the threads."""
        self._pump.start()
        self._thread.start()

    def submit(self, jobs: Sequence[CommitJob]) -> None:
        """Queue jobs, parents before children."""
        with self._wake:
            self._jobs.extend(jobs)
            self._wake.notify_all()

    def delete(self, key: bytes, generation: int, place: tuple[int, int]) -> None:
        """See IndexBacklog."""
        self._backlog.delete(key, generation, place)

    def await_told(self, wait_s: float) -> str:
        """See IndexBacklog."""
        return self._backlog.await_told(wait_s)

    def call(self) -> None:
        """Have the host's chores done soon."""
        with self._wake:
            self._called = True
            self._wake.notify_all()

    @property
    def settled(self) -> bool:
        """Whether the index tells all that has happened."""
        return self._backlog.is_empty

    def close(self, wait_s: float) -> bool:
        """Finish what is queued and stop; False if it takes longer than `wait_s` seconds."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(wait_s)
        return self._finished and not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._turn():
                pass
            self._finished = True
        finally:
            self._pump.close()

    def _turn(self) -> bool:
        """One group; true when nothing is left to do for ever."""
        group, closing = self._next()
        try:
            self._extend(group)
            self._host.chores()
            self._commit(group)
            if not group.jobs:
                self._tell(now=closing)
        except Exception:  # noqa: BLE001
            # The thread must outlive any surprise, and waiters must hear of it.
            _log.exception("a group commit failed unexpectedly")
            self._give_up(group)
        return closing and not group.jobs

    def _give_up(self, group: CommitGroup) -> None:
        """After a surprise: fail what is not durable yet."""
        for write in group.writes:
            self._pump.finish(write)  # until then the device reads their memory
        if not group.recorded:
            for job in group.jobs:
                job.failure = job.failure or _SURPRISE
            self._backlog.add(group.jobs)
        self._host.settle(group.jobs)

    def _next(self) -> tuple[CommitGroup, bool]:
        group, self._ahead = self._ahead, CommitGroup()
        with self._wake:
            if not (group.jobs or self._jobs or self._closing or self._called):
                self._wake.wait(min(_IDLE_S, self._backlog.seconds_left()))
            self._called = False
            return group, self._closing

    def _tell(self, *, now: bool = False) -> None:
        """Tell the index, if it is time."""
        with self._wake:
            due = now or self._backlog.seconds_left() <= 0
        if due:
            self._backlog.tell()

    def _commit(self, group: CommitGroup) -> None:
        self._hold(group)
        jobs = group.jobs
        if jobs:
            self._host.admit(jobs)
        # What is on its way already went to slots that no delete held.
        self._clear_ground(jobs[group.begun :])
        _fail_orphans(jobs)
        self._write(group, more=True)
        sick = [job for job in jobs if job.sick]
        moved = self._troubles.relocate(sick) if sick else []
        if moved:
            self._clear_ground(moved)
            again = CommitGroup(moved)
            try:
                self._write(again, more=False)
            finally:
                group.writes += again.writes
        _fail_orphans(jobs)
        self._record(jobs, at_once=bool(moved))
        group.recorded = True
        if jobs:
            self._host.settle(jobs)

    def _hold(self, group: CommitGroup) -> None:
        """Wait a moment for what is about to be brought."""
        until = time.monotonic() + _HOLD_S
        while group.expects_more and (left := until - time.monotonic()) > 0:
            with self._wake:
                if self._called or self._closing:
                    return
                if not self._jobs:
                    self._wake.wait(left)
            self._extend(group)

    def _clear_ground(self, group: list[CommitJob]) -> None:
        """Commit deletes first where this group would write over a block that the index names,
        or where files are to go."""
        self._retired += self._host.retired_segments()
        blocked = self._blocked(group)
        if (blocked or self._retired) and self._backlog.tell():
            _fail(blocked, "the delete of the slot's former block failed")
            return
        retired, self._retired = self._retired, []
        for segment in retired:
            # Numbers are never used again, so a file that stays behind is only space.
            try:
                self._ssd.remove(segment)
            except OSError as error:
                _log.warning("segment %d cannot be removed: %s", segment, error)

    def _blocked(self, group: Sequence[CommitJob]) -> list[CommitJob]:
        """Those whose slots may not be written yet."""
        with self._wake:
            return [job for job in group if self._backlog.is_held(job.place)]

    def _write(self, group: CommitGroup, *, more: bool) -> None:
        """Data and headers, sync; with `more` the next group follows this one."""
        left = group.jobs[group.begun :]
        self._make_segments(left)
        self._begin(group, left)
        self._save_namespaces(group.jobs)
        if group.jobs:
            self._tell()  # while the device has data to write
        if more:
            self._extend_until(group)
        for write in group.writes:
            for failure in self._pump.finish(write):
                self._sicken(failure, "data")
        if more:
            self._extend(self._ahead)
        self._sync(group.jobs)

    def _extend_until(self, group: CommitGroup) -> None:
        """Let the next group's data follow while this one's is written."""

        def is_written() -> bool:
            return not any(write.pending for write in group.writes)

        def is_queued() -> bool:
            return bool(self._jobs) and not self._ahead.is_closed

        while True:
            with self._wake:
                self._wake.wait_for(lambda: is_written() or is_queued())
                if is_written():
                    return
            self._extend(self._ahead)

    def _begin(self, group: CommitGroup, jobs: Sequence[CommitJob]) -> None:
        """Put data on its way, and write headers meanwhile."""
        wanted = [job for job in jobs if not job.failure]
        group.begun = len(group.jobs)
        if not wanted:
            return
        try:
            for job in wanted:
                job.failed_flushes = self._ssd.failed_flushes(job.record.segment)
            write = DataWrite(self._ssd, self._arena.view, wanted)
            group.writes.append(write)
            self._pump.begin(write)
            self._write_headers(wanted)
        except Exception:
            # Whoever's turn it is: these are not written.
            _fail(wanted, _SURPRISE)
            raise

    def _make_segments(self, group: Sequence[CommitJob]) -> None:
        for segment, jobs in _by_segment(group).items():
            try:
                self._ssd.ensure(segment)
            except OSError as error:
                self._sicken(WriteFailure(segment, jobs, error), "space")

    def _save_namespaces(self, group: Sequence[CommitJob]) -> None:
        """Once a namespace: without its file its blocks would be dropped at the next opening."""
        for namespace in {job.namespace for job in group if not job.failure} - self._saved:
            try:
                self._directory.save_namespace(namespace)
            except OSError as error:
                jobs = [job for job in group if job.namespace == namespace]
                _fail(jobs, f"namespace: {error}")
            else:
                self._saved.add(namespace)

    def _extend(self, group: CommitGroup) -> None:
        """Take what is queued, and begin to write it if nothing is in the way: all that may go
        wrong with that is left to the group's turn."""
        with self._wake:
            new = group.take(self._jobs)
        if not new or group.in_turn:
            return
        jobs = group.jobs[group.begun :]
        group.in_turn = True
        if self._blocked(jobs) and self._backlog.tell():
            return
        try:
            for segment in {job.record.segment for job in jobs}:
                self._ssd.ensure(segment)
        except OSError:
            return
        group.in_turn = False
        self._begin(group, jobs)

    def _write_headers(self, jobs: Sequence[CommitJob]) -> None:
        for job in jobs:
            job.encoded = job.record.to_bytes()
        for failure in self._headers.write(jobs):
            self._sicken(failure, "header")

    def _sync(self, group: Sequence[CommitJob]) -> None:
        for segment, jobs in _by_segment(group).items():
            try:
                self._ssd.sync(segment)
            except OSError as error:
                self._sicken(WriteFailure(segment, jobs, error), "sync")
                continue
            # Nor does it count for what an earlier one has failed to keep.
            failed = self._ssd.failed_flushes(segment)
            late = [job for job in jobs if job.failed_flushes != failed]
            if late:
                _fail(late, "sync: the one before failed")
                for job in late:
                    job.sick = True

    def _sicken(self, failure: WriteFailure, what: str) -> None:
        """These failed because of where they are."""
        why = f"{what}: {failure.error}"
        jobs = [job for job in failure.jobs if not job.failure]
        _fail(jobs, why)
        for job in jobs:
            job.sick = True
        if failure.error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._troubles.no_space(failure.segment)
        else:
            self._troubles.write_failed(failure.segment, why)

    def _record(self, group: list[CommitJob], *, at_once: bool) -> None:
        """From here on the group is durable; with `at_once` and while the index refuses, only if
        that takes it: a moved block has two whole headers, and only the index knows which is good.
        """
        jobs = [job for job in group if not job.failure]
        if jobs and (at_once or self._backlog.refused):
            failure = self._backlog.tell(group)
            if not failure:
                return
            _fail(jobs, failure)
            for job in jobs:
                # Who knows what has reached the medium: nothing else may be written there before
                # these records are gone.
                self.delete(job.record.key, job.record.generation, job.place)
        self._backlog.add(group)


def _by_segment(group: Sequence[CommitJob]) -> dict[int, list[CommitJob]]:
    segments: dict[int, list[CommitJob]] = {}
    for job in group:
        if not job.failure:
            segments.setdefault(job.record.segment, []).append(job)
    return segments


def _fail(jobs: Sequence[CommitJob], failure: str) -> None:
    for job in jobs:
        job.failure = job.failure or failure
    if jobs:
        _log.warning("%d blocks could not be stored: %s", len(jobs), failure)


def _fail_orphans(group: Sequence[CommitJob]) -> None:
    """A child of a block that was not stored must not be stored either."""
    failed: set[int] = set()
    for job in group:
        if not job.failure and job.parent_row in failed:
            job.failure = "its parent could not be stored"
        if job.failure:
            failed.add(job.row)

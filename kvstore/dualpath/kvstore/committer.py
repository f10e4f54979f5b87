"""The one thread that makes blocks durable, in groups.

Order of a group: (deletes of whatever its slots held before, if not committed yet) -> data ->
headers -> fdatasync of each segment -> one index transaction -> `settle`, which acknowledges. So
what the index names is always whole on the medium, and a slot is written again only after the
delete of its former block has committed. Deletes that nobody waits for ride along. While a group is
on its way through headers, sync and index, the data of the next one is already being written: it
goes to slots that nothing refers to yet.

Does not decide what is visible: the host does, in `admit` and `settle`, under its own lock.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.data_directory import DataDirectory
from dualpath.kvstore.data_pump import DataPump, DataWrite
from dualpath.kvstore.durable_index import DurableIndex
from dualpath.kvstore.header_writer import HeaderWriter
from dualpath.kvstore.io_gate import IoGate
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.slot_items import WriteFailure
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.transfer.region import Region

GROUP_JOBS_MAX = 1024
GROUP_BYTES_MAX = 128 << 20
_IDLE_S = 1.0
"""How often the host may do its chores when nothing else happens."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Delete:
    key: bytes
    generation: int
    place: tuple[int, int]
    erase: bool


@dataclass(slots=True)
class _Group:
    """Jobs that become durable together; `write` once their data is on its way."""

    jobs: list[CommitJob]
    write: DataWrite | None = None


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
        self._index = index
        self._directory = directory
        self._arena = arena
        self._pump = DataPump(ssd.device, gate)
        self._headers = HeaderWriter(ssd, GROUP_JOBS_MAX)
        self._ahead: _Group | None = None
        self._wake = threading.Condition()
        self._jobs: deque[CommitJob] = deque()
        self._deletes: list[_Delete] = []
        # Deletes so far: told, and committed, in the order in which they were told.
        self._queued_deletes = 0
        self._done_deletes = 0
        self._erase_troubles = 0
        self._held: set[tuple[int, int]] = set()
        self._saved: set[Namespace] = set()
        self._closing = False
        self._called = False
        self._refused = False
        self._thread = threading.Thread(target=self._run, name="dualpath-committer", daemon=True)

    def start(self) -> None:
        """Start the threads."""
        self._pump.start()
        self._thread.start()

    def submit(self, jobs: Sequence[CommitJob]) -> None:
        """Queue jobs, parents before children."""
        with self._wake:
            self._jobs.extend(jobs)
            self._wake.notify()

    def delete(
        self, key: bytes, generation: int, place: tuple[int, int], *, erase: bool = False
    ) -> None:
        """A block has left: delete its record before `place` is written again. With `erase` its
        header goes as well, so that a rebuilt index would not name it."""
        with self._wake:
            self._deletes.append(_Delete(key, generation, place, erase))
            self._queued_deletes += 1
            self._held.add(place)
            self._wake.notify()

    def await_deletes(self, wait_s: float) -> str:
        """Wait until all deletes so far have committed. Why one of them may not last, else ""."""
        with self._wake:
            wanted = self._queued_deletes
            troubles = self._erase_troubles
            done = self._wake.wait_for(lambda: self._done_deletes >= wanted, wait_s)
            if not done:
                return f"the index has not taken the deletes within {wait_s:g} s"
            if self._erase_troubles > troubles:
                return "a header could not be erased"
            return ""

    def call(self) -> None:
        """Have the host's chores done soon."""
        with self._wake:
            self._called = True
            self._wake.notify()

    @property
    def settled(self) -> bool:
        """Whether the index tells all that has happened: no delete waits or was refused."""
        with self._wake:
            return not self._deletes

    def close(self, wait_s: float) -> bool:
        """Finish what is queued and stop; False if it takes longer than `wait_s` seconds."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            group, deletes, closing = self._next()
            try:
                self._host.chores()
                self._commit(group, deletes)
            except Exception:  # noqa: BLE001
                # The thread must outlive any surprise, and waiters must hear of it.
                _log.exception("a group commit failed unexpectedly")
                if group.write is not None:
                    self._pump.finish(group.write)  # until then the device reads their memory
                for job in group.jobs:
                    job.failure = job.failure or "internal error"
                self._host.settle(group.jobs)
            if closing and not group.jobs:
                self._pump.close()
                return

    def _next(self) -> tuple[_Group, list[_Delete], bool]:
        ahead, self._ahead = self._ahead, None
        with self._wake:
            if not (ahead or self._jobs or self._closing or self._called or self._due()):
                self._wake.wait(_IDLE_S)
            self._refused = False
            self._called = False
            group = ahead or _Group(self._take_jobs())
            deletes, self._deletes = self._deletes, []
            return group, deletes, self._closing

    def _take_jobs(self) -> list[CommitJob]:
        """Those of the next group."""
        jobs: list[CommitJob] = []
        nbytes = 0
        while self._jobs and len(jobs) < GROUP_JOBS_MAX and nbytes < GROUP_BYTES_MAX:
            job = self._jobs.popleft()
            nbytes += job.nbytes
            jobs.append(job)
        return jobs

    def _due(self) -> bool:
        """Whether deletes should be committed now; refused ones wait for about a second."""
        return bool(self._deletes) and not self._refused

    def _commit(self, group: _Group, deletes: list[_Delete]) -> None:
        jobs = group.jobs
        if jobs:
            self._host.admit(jobs)
        # What is on its way already went to slots that no delete held.
        deletes = self._clear_ground([] if group.write else jobs, deletes)
        _fail_orphans(jobs)
        self._write(group, more=True)
        moved = self._relocated(jobs)
        if moved:
            deletes = self._clear_ground(moved, deletes + self._take_deletes())
            self._write(_Group(moved), more=False)
        _fail_orphans(jobs)
        self._record(jobs, deletes)
        if jobs:
            self._host.settle(jobs)

    def _clear_ground(self, group: list[CommitJob], deletes: list[_Delete]) -> list[_Delete]:
        """Commit deletes first where this group would write over a block that the index names,
        or where files are to go. Return the deletes that are left."""
        retired = self._host.retired_segments()
        with self._wake:
            blocked = [job for job in group if job.place in self._held]
        if deletes and (blocked or retired):
            if self._apply(deletes, []):
                _fail(blocked, "the delete of the slot's former block failed")
            deletes = []
        for segment in retired:
            # Numbers are never used again, so a file that stays behind is only space.
            try:
                self._ssd.remove(segment)
            except OSError as error:
                _log.warning("segment %d cannot be removed: %s", segment, error)
        return deletes

    def _take_deletes(self) -> list[_Delete]:
        with self._wake:
            deletes, self._deletes = self._deletes, []
            return deletes

    def _relocated(self, group: list[CommitJob]) -> list[CommitJob]:
        """What failed because of its place and got another one."""
        sick = [job for job in group if job.sick]
        return self._troubles.relocate(sick) if sick else []

    def _write(self, group: _Group, *, more: bool) -> None:
        """Data, headers, sync; with `more` the next group's data follows this one's."""
        if group.write is None:
            self._prepare(group.jobs)
            group.write = self._begin_data(group.jobs)
        self._pump.await_begun(group.write)
        if more:
            self._begin_ahead()
        for failure in self._pump.finish(group.write):
            self._sicken(failure, "data")
        for step in (self._write_headers, self._sync):
            if more:
                self._begin_ahead()
            step(group.jobs)

    def _begin_data(self, jobs: Sequence[CommitJob]) -> DataWrite:
        wanted = [job for job in jobs if not job.failure]
        write = DataWrite(self._ssd, self._arena.view, wanted)
        self._pump.begin(write)
        return write

    def _prepare(self, group: Sequence[CommitJob]) -> None:
        """Make sure of the jobs' namespaces and segment files."""
        for segment, jobs in _by_segment(group).items():
            try:
                for job in jobs:
                    self._save_namespace(job.namespace)
            except OSError as error:
                _fail(jobs, f"namespace: {error}")
                continue
            try:
                self._ssd.ensure(segment)
            except OSError as error:
                self._sicken(WriteFailure(segment, jobs, error), "space")

    def _begin_ahead(self) -> None:
        """Begin to write the next group's data if nothing is in the way: all that may go wrong is
        left to its turn."""
        if self._ahead is not None:
            return
        with self._wake:
            jobs = self._take_jobs()
            blocked = any(job.place in self._held for job in jobs)
        if not jobs:
            return
        self._ahead = _Group(jobs)
        if blocked:
            return
        try:
            for job in jobs:
                self._save_namespace(job.namespace)
                self._ssd.ensure(job.record.segment)
        except OSError:
            return
        self._ahead.write = self._begin_data(jobs)

    def _save_namespace(self, namespace: Namespace) -> None:
        """Once a namespace: without its file its blocks would be dropped at the next opening."""
        if namespace not in self._saved:
            self._directory.save_namespace(namespace)
            self._saved.add(namespace)

    def _write_headers(self, group: Sequence[CommitJob]) -> None:
        jobs = [job for job in group if not job.failure]
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

    def _record(self, group: list[CommitJob], deletes: list[_Delete]) -> None:
        jobs = [job for job in group if not job.failure]
        if not jobs and not deletes:
            return
        failure = self._apply(deletes, jobs)
        if failure:
            _fail(jobs, failure)
            for job in jobs:
                # Who knows what has reached the medium: nothing else may be written there before
                # these records are gone.
                record = job.record
                self.delete(record.key, record.generation, job.place, erase=False)

    def _apply(self, deletes: list[_Delete], jobs: list[CommitJob]) -> str:
        """One transaction. Return why it failed, or ""; failed deletes are queued again."""
        self._erase(deletes)
        try:
            self._index.apply(
                [(delete.key, delete.generation) for delete in deletes],
                [(job.record.key, job.encoded) for job in jobs],
            )
        except OSError as error:
            _log.warning("the index refused %d blocks: %s", len(jobs), error)
            with self._wake:
                self._deletes = deletes + self._deletes
                self._refused = True
            self._troubles.index_answered(str(error))
            return f"index: {error}"
        self._troubles.index_answered("")
        with self._wake:
            later = {delete.place for delete in self._deletes}
            self._held -= {delete.place for delete in deletes} - later
            self._done_deletes += len(deletes)
            self._wake.notify_all()
        return ""

    def _erase(self, deletes: list[_Delete]) -> None:
        """Blank the headers of what was invalidated, before the index forgets it: should one of
        the two be lost, the other still says that the block is gone, or that it must go again."""
        segments: dict[int, list[int]] = {}
        for delete in deletes:
            if delete.erase:
                segment, slot = delete.place
                segments.setdefault(segment, []).append(slot)
        for segment, slots in segments.items():
            try:
                self._ssd.erase_headers(segment, slots)
            except OSError as error:
                _log.warning("%d headers of segment %d stay: %s", len(slots), segment, error)
                with self._wake:
                    self._erase_troubles += 1


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

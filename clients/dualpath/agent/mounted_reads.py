"""Grants of one daemon that we serve ourselves, from a mount with its segment files.

Owns the way of a granted chunk from its place in a file to its window: ask the daemon where
blocks lie, read, place under the armed tag. Every chunk that cannot come this way is asked of the
daemon as before: a block that is not on disk yet, a failed read, bytes that did not verify. What
lands is checked on arrival like what a daemon writes. Belongs to the loop; reads run on threads.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from dualpath.agent.open_grants import OnProgress
from dualpath.agent.segment_mount import ChunkPlace, SegmentMount
from dualpath.agent.slice_table import slices_of, table_of
from dualpath.proto.v1 import common_pb2, store_pb2
from dualpath.transfer.errors import DualPathError
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import Transport

READERS = 2
"""Grants that are read at the same time; more would only wait for the same medium."""
CLOSE_S_MAX = 2.0
LEASES_MAX = 1024
"""Most leases whose places are remembered."""
DISTRUST_MAX = 8
"""So many chunks that did not verify, and the mount is not used any more."""

log = logging.getLogger(__name__)

Locate = Callable[[Sequence[int]], Awaitable[store_pb2.LocateResponse]]
"""Ask the daemon for the places of blocks of one lease."""
Ask = Callable[[common_pb2.ChunkGrant, OnProgress], int]
"""Have the daemon deliver; returns the grant's id there. Raises PathDown."""


@dataclass(slots=True)
class _Places:
    """What is known of a lease: (segment, offset) by block, and the length of its chunks."""

    chunk_bytes: int = 0
    blocks: dict[int, tuple[int, int]] = field(default_factory=dict)


@dataclass(slots=True)
class _Job:
    """One grant. `parts` counts what has still to end: our reads, and what the daemon brings."""

    grant: common_pb2.ChunkGrant
    lease: bytes
    targets: list[Slices]
    window: RegionDescriptor
    transport: Transport
    on_progress: OnProgress
    ask: Ask
    parts: int = 1
    asked: list[int] = field(default_factory=list)
    cancelled: bool = False


class MountedReads:
    """See the module docstring. `off` is why the mount is not used any more; "" while it is."""

    def __init__(self, mount: SegmentMount, loop: asyncio.AbstractEventLoop) -> None:
        self.mount = mount
        self.off = ""
        self.read_bytes = 0
        self.events: Counter[str] = Counter()
        self._loop = loop
        self._counting = threading.Lock()
        self._jobs: dict[int, _Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading: set[asyncio.Future[dict[int, str]]] = set()
        self._places: OrderedDict[bytes, _Places] = OrderedDict()
        self._distrusted: set[tuple[int, int]] = set()
        self._placing: set[tuple[int, int]] = set()
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="dualpath-mount")

    def deliver(
        self,
        grant: common_pb2.ChunkGrant,
        lease: bytes,
        transport: Transport,
        on_progress: OnProgress,
        *,
        locate: Locate,
        ask: Ask,
    ) -> None:
        """Bring the chunks of a grant; it ends by progress with `done`. `lease` tells leases and
        tickets apart. Raises InvalidRequest on a malformed grant."""
        job = _Job(
            grant,
            lease,
            slices_of(grant),
            RegionDescriptor.from_bytes(grant.window),
            transport,
            on_progress,
            ask,
        )
        self._jobs[grant.grant_id] = job
        task = self._loop.create_task(self._serve(job, locate))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self, grant_ids: Iterable[int]) -> list[int]:
        """Read no more for these grants; returns what was asked of the daemon for them. What is
        on its way is fenced by its window."""
        asked: list[int] = []
        for grant_id in grant_ids:
            job = self._jobs.pop(grant_id, None)
            if job is not None:
                job.cancelled = True
                asked += job.asked
        return asked

    def counts(self) -> Counter[str]:
        """Chunks that did not come from the mount, by reason; 1 for `mount_off`."""
        counts = Counter({f"mount_{name}": count for name, count in self.events.items()})
        counts["mount_off"] = int(bool(self.off))
        return +counts

    def forget_leases(self) -> None:
        """The session ended, and its leases with it."""
        self.cancel(tuple(self._jobs))
        self._places.clear()

    async def close(self) -> None:
        """Stop, without waiting for the medium."""
        self.cancel(tuple(self._jobs))
        for task in tuple(self._tasks):
            task.cancel()
        self.mount.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._reading:
            # A read that the medium does not answer is left behind, with its buffers.
            await asyncio.wait(self._reading, timeout=CLOSE_S_MAX)

    async def _serve(self, job: _Job, locate: Locate) -> None:
        try:
            await self._bring(job, locate)
        except Exception as error:
            log.exception("mount %s: a grant failed unexpectedly", self.mount.path)
            self._tell(job, list(job.grant.tag), f"internal error: {error}")
        self._part_over(job)

    async def _bring(self, job: _Job, locate: Locate) -> None:
        grant = job.grant
        try:
            known = await self._located(job.lease, grant.block, locate)
        except DualPathError as error:
            self.events[f"locate_{error.reason}"] += 1
            known = None
        if known is None or self.off:
            self._by_daemon(job, range(len(grant.tag)))
            return
        mine: list[tuple[int, ChunkPlace]] = []
        others: list[int] = []
        for index, target in enumerate(job.targets):
            place = self._place(known, grant, index, target.nbytes)
            if place is None:
                others.append(index)
            else:
                mine.append((index, place))
        self._by_daemon(job, others)
        if mine and not job.cancelled:
            read = partial(self._read, job, mine)
            reading = self._loop.run_in_executor(self._threads, read)
            self._reading.add(reading)
            reading.add_done_callback(self._reading.discard)
            failed = await asyncio.shield(reading)
            self._by_daemon(job, self._judged(failed))

    async def _located(self, lease: bytes, blocks: Sequence[int], locate: Locate) -> _Places | None:
        """Places of all these blocks that lie in files; None if the mount is another's."""
        known = self._places.setdefault(lease, _Places())
        self._places.move_to_end(lease)
        if len(self._places) > LEASES_MAX:
            self._places.popitem(last=False)
        asked = sorted(set(blocks).difference(known.blocks))
        if asked:
            answer = await locate(asked)
            if answer.store_id != self.mount.store_id:
                self._give_up(
                    f"{self.mount.path} holds store {self.mount.store_id}, the daemon has "
                    f"{answer.store_id}"
                )
                return None
            known.chunk_bytes = answer.chunk_bytes
            for block, segment, offset in zip(asked, answer.segment, answer.offset, strict=True):
                if segment >= 0:  # one that is not on disk may be there the next time
                    known.blocks[block] = (segment, offset)
        return known

    def _place(
        self, known: _Places, grant: common_pb2.ChunkGrant, index: int, nbytes: int
    ) -> ChunkPlace | None:
        found = known.blocks.get(grant.block[index])
        if found is None:
            self.events["not_on_disk"] += 1
            return None
        segment, offset = found
        offset += grant.chunk[index] * known.chunk_bytes
        # One that is rejected is asked for again before we hear of it: what is still being
        # placed is not read once more.
        if (segment, offset) in self._distrusted or (segment, offset) in self._placing:
            return None
        return ChunkPlace(segment, offset, nbytes)

    def _read(self, job: _Job, mine: Sequence[tuple[int, ChunkPlace]]) -> dict[int, str]:
        """On a thread: read and place. Return why, for each that did not land."""
        failed: dict[int, str] = {}

        def on_read(number: int, data: memoryview | None, reason: str) -> None:
            index, place = mine[number]
            if job.cancelled:
                return
            if data is None:
                failed[index] = f"read: {reason}"
                return
            with self._counting:
                self.read_bytes += data.nbytes
            tag, target = job.grant.tag[index], job.targets[index]
            at = (place.segment, place.offset)
            self._placing.add(at)
            if job.transport.place(job.window, tag, target, data) == "rejected":
                failed[index] = "rejected"
                self._distrusted.add(at)
                self.mount.doubt(place)
            self._placing.discard(at)

        places = [place for _, place in mine]
        self.mount.read(places, job.grant.deadline_ms / 1000, on_read)
        return failed

    def _judged(self, failed: dict[int, str]) -> list[int]:
        """Those to ask the daemon for. The owner of a window has heard of rejected ones."""
        again = []
        for index, reason in failed.items():
            if reason == "rejected":
                self.events["corrupt"] += 1
            else:
                self.events["failed"] += 1
                again.append(index)
                log.warning("mount %s: %s; asking the daemon", self.mount.path, reason)
        if len(self._distrusted) > DISTRUST_MAX:
            self._give_up(f"{len(self._distrusted)} chunks did not verify")
        return again

    def _give_up(self, reason: str) -> None:
        if not self.off:
            self.off = reason
            log.error("mount %s is not used any more: %s", self.mount.path, reason)

    def _by_daemon(self, job: _Job, indices: Sequence[int]) -> None:
        """Ask the daemon for chunks of a grant."""
        if not indices or job.cancelled:
            return
        grant = job.grant
        rest = common_pb2.ChunkGrant(
            window=grant.window,
            lane=grant.lane,
            deadline_ms=grant.deadline_ms,
            block=[grant.block[i] for i in indices],
            chunk=[grant.chunk[i] for i in indices],
            tag=[grant.tag[i] for i in indices],
            target=table_of([job.targets[i] for i in indices]),
        )
        job.parts += 1
        try:
            job.asked.append(job.ask(rest, partial(self._on_progress, job)))
        except DualPathError as error:
            self._tell(job, list(rest.tag), str(error))
            self._part_over(job)

    def _on_progress(self, job: _Job, progress: common_pb2.GrantProgress) -> None:
        if job.cancelled:
            return
        if progress.failed_tag:
            told = common_pb2.GrantProgress()
            told.CopyFrom(progress)
            told.grant_id, told.done = job.grant.grant_id, False
            job.on_progress(told)
        if progress.done:
            self._part_over(job)

    def _tell(self, job: _Job, tags: Sequence[int], detail: str) -> None:
        failure = common_pb2.CHUNK_FAILURE_PEER_LOST
        job.on_progress(
            common_pb2.GrantProgress(
                grant_id=job.grant.grant_id,
                failed_tag=tags,
                failure=[failure] * len(tags),
                detail=detail,
            )
        )

    def _part_over(self, job: _Job) -> None:
        job.parts -= 1
        if not job.parts and not job.cancelled:
            self._jobs.pop(job.grant.grant_id, None)
            job.on_progress(common_pb2.GrantProgress(grant_id=job.grant.grant_id, done=True))

"""Saves: reserve at the daemon, write every chunk into its window, seal.

Owns the batches of a save and their order: a batch is reserved and written while those before it
are on their way, at most BATCHES_MAX of them, and sealed after them. Checksums are taken from the
engine's memory while the bytes leave, so that the daemon refuses what was damaged on the way. What
fails is a value with its reason; the memory is not read any more when `save` returns.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dualpath.agent.config import AgentConfig
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.load_spec import SaveSpec
from dualpath.agent.loader import daemon_for
from dualpath.agent.mailbox import Mailbox
from dualpath.agent.outcome import SaveResult
from dualpath.agent.regions import EngineRegion, Regions
from dualpath.agent.save_batch import (
    RESERVE_STATUS,
    ROOM_LATER,
    Reserved,
    batches_of,
    checksums_of,
    runs_of,
    tables_of,
)
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import ReserveStatus, SealStatus
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import (
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    Overloaded,
    PeerLost,
    Unavailable,
)
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.transport import (
    BATCH_WRITES_MAX,
    BatchCompletion,
    WriteBatch,
    WriteStatus,
)

log = logging.getLogger(__name__)

BATCHES_MAX = 3
"""Batches of one save on their way at once."""
RETRIES_MAX = 3
"""How often a throttled reservation is tried again."""
RESERVATION_S_MAX = 285.0
SAVES_MAX = 256

_SEAL: Mapping[int, SealStatus] = {
    store_pb2.SealStatus.Value(f"SEAL_STATUS_{status.name}"): status for status in SealStatus
}
_UNSEALED = {
    SealStatus.EXPIRED: "expired: its reservation or its parent is gone; save again",
    SealStatus.CORRUPT: "corrupt: the bytes that arrived are not those that were sent; save again",
    SealStatus.FAILED: "failed: the daemon's disk is full or refused; its log says which",
}


@dataclass(slots=True, eq=False)
class _Save:
    """A save under way."""

    spec: SaveSpec
    layout: KVLayout
    entry: EngineRegion
    deadline_at: float
    reserved: list[ReserveStatus | None]
    sealed: list[SealStatus | None]
    reason: str = ""
    detail: str = ""
    events: Counter[str] = field(default_factory=Counter)

    def fail(self, reason: str, detail: str) -> None:
        """Note a failure; the first one is reported."""
        self.events[reason] += 1
        if not self.reason:
            self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class _Done:
    """The write of these tags ended; `batch` waits for it."""

    batch: _Writes
    tags: range
    completion: BatchCompletion


@dataclass(slots=True, eq=False)
class _Writes:
    """Writes of one batch that have not ended. `block_of` has a block by tag; `failures` has a
    reason and its detail by block."""

    open: int
    over: asyncio.Event
    block_of: dict[int, int] = field(default_factory=dict)
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)


class Saver:
    """See the module docstring. Belongs to the loop."""

    def __init__(
        self,
        config: AgentConfig,
        daemons: Mapping[str, DaemonLink],
        regions: Regions,
        namespaces: Mapping[bytes, Namespace],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._config = config
        self._daemons = daemons
        self._regions = regions
        self._namespaces = namespaces
        self._loop = loop
        self._done: Mailbox[_Done] = Mailbox(loop, self._on_done)
        self.active = 0
        self.saved_blocks = 0
        self.saved_bytes = 0
        self.events: Counter[str] = Counter()

    async def save(self, spec: SaveSpec) -> SaveResult:
        """Store blocks. Raises InvalidRequest only."""
        save = self._accept(spec)
        self.active += 1
        save.entry.pins += 1
        try:
            if self.active > SAVES_MAX:
                raise Overloaded(f"{SAVES_MAX} saves are running", retry_after_s=0.1)
            daemon = await self._daemon(save)
            await self._run(save, daemon)
        except InvalidRequest:
            raise
        except DualPathError as error:
            save.fail(_reason_of(error), str(error))
        finally:
            self.active -= 1
            self._regions.unpin(save.entry)
        self.events.update(save.events)
        return SaveResult(
            tuple(save.reserved), tuple(save.sealed), save.reason, save.detail, dict(save.events)
        )

    def _accept(self, spec: SaveSpec) -> _Save:
        namespace = self._namespaces.get(spec.namespace_id)
        if namespace is None:
            raise InvalidRequest(
                f"unknown namespace {spec.namespace_id.hex()}: open it first", reason="namespace"
            )
        entry = self._regions.get(spec.region)
        count = len(spec.hashes)
        spec.places.check(namespace.layout, count, entry.region.nbytes)
        if spec.deadline_s > self._config.deadline_s_max:
            raise InvalidRequest(
                f"deadline_s {spec.deadline_s} is over {self._config.deadline_s_max}; ask for less"
            )
        deadline_at = self._loop.time() + spec.deadline_s
        return _Save(spec, namespace.layout, entry, deadline_at, [None] * count, [None] * count)

    async def _daemon(self, save: _Save) -> DaemonLink:
        """The daemon that holds, or shall hold, the chain that these blocks belong to."""
        spec = save.spec
        timeout_s = min(self._config.lookup_timeout_s, spec.deadline_s)
        names = tuple(self._daemons)
        if spec.parents[0] and len(names) > 1:
            # Chains are placed by their first block, which a continuation does not name.
            holders = await asyncio.gather(*(self._holds(name, save, timeout_s) for name in names))
            for name, holds in zip(names, holders, strict=True):
                if holds:
                    return self._daemons[name]
        daemon = self._daemons[daemon_for(spec.namespace_id, spec.hashes[0], names)]
        await daemon.link.settled(timeout_s)
        return daemon

    async def _holds(self, name: str, save: _Save, timeout_s: float) -> bool:
        daemon = self._daemons[name]
        try:
            await daemon.link.settled(timeout_s)
            answer = await daemon.lookup(
                save.spec.namespace_id, save.spec.parents[:1], lease_s=0, timeout_s=timeout_s
            )
        except DualPathError:
            return False
        return answer.blocks == 1

    async def _run(self, save: _Save, daemon: DaemonLink) -> None:
        """Reserve batch after batch, in order, while those before are written and sealed."""
        running: deque[asyncio.Task[None]] = deque()
        before = asyncio.Event()
        before.set()
        try:
            for first, count in batches_of(save.layout, len(save.spec.hashes)):
                while len(running) >= BATCHES_MAX:
                    await running.popleft()
                reserved = await self._reserve(save, daemon, range(first, first + count), running)
                sealed = asyncio.Event()
                work = self._batch(save, daemon, reserved, before, sealed)
                running.append(asyncio.create_task(work, name=f"save from block {first} on"))
                before = sealed
            while running:
                await running.popleft()
        finally:
            for task in running:
                task.cancel()
            await _uninterrupted(running)
            for task in running:
                if not task.cancelled() and (error := task.exception()) is not None:
                    log.info("%s failed as well: %s", task.get_name(), error)

    async def _batch(
        self,
        save: _Save,
        daemon: DaemonLink,
        reserved: Reserved,
        before: asyncio.Event,
        sealed: asyncio.Event,
    ) -> None:
        """Write and seal what was reserved, sealed after the batch before."""
        try:
            fresh = self._outcomes(save, reserved)
            if fresh:
                await self._store(save, daemon, reserved, fresh, before)
                return
            await before.wait()
            blocks = reserved.blocks
            if (
                save.spec.durable
                and ReserveStatus.EXISTS in save.reserved[blocks.start : blocks.stop]
            ):
                # Stored before, perhaps not written back yet: a durable seal waits for that.
                await daemon.seal((), (), durable=True, timeout_s=self._left_s(save))
        finally:
            sealed.set()

    def _outcomes(self, save: _Save, reserved: Reserved) -> dict[int, int]:
        """Note what became of each block; those to write, with their positions."""
        fresh: dict[int, int] = {}
        for position, block in enumerate(reserved.blocks):
            status = RESERVE_STATUS.get(reserved.status[position])
            save.reserved[block] = status
            if status is ReserveStatus.RESERVED:
                fresh[block] = position
            elif status is None or status in ROOM_LATER:
                word = status.value if status else "unknown status"
                save.fail(word, f"block {block} was not reserved: {word}")
        return fresh

    async def _store(
        self,
        save: _Save,
        daemon: DaemonLink,
        reserved: Reserved,
        fresh: Mapping[int, int],
        before: asyncio.Event,
    ) -> None:
        """Write and seal the blocks `fresh`, or give their reservations back."""
        region, places = save.entry.region, save.spec.places
        hashing = self._loop.run_in_executor(
            None, checksums_of, region.view, save.layout, places, tuple(fresh)
        )
        try:
            try:
                failures = await self._write(save, daemon, fresh, reserved)
            finally:
                await _uninterrupted((hashing,))  # it reads the engine's memory
            checksums = hashing.result()
            good = [block for block in fresh if block not in failures]
            for block in sorted(failures):
                word, detail = failures[block]
                save.fail(word, f"block {block}: {detail}")
                save.sealed[block] = SealStatus.FAILED
            lost = [reserved.ids[fresh[block]] for block in failures]
            if lost and daemon.up:
                await daemon.abandon(lost)
            await before.wait()
            if good:
                ids = [reserved.ids[fresh[block]] for block in good]
                await self._seal(save, daemon, good, ids, checksums)
        except BaseException:
            if daemon.up:
                await daemon.abandon([reserved.ids[position] for position in fresh.values()])
            raise
        done = sum(save.sealed[block] is SealStatus.SEALED for block in fresh)
        self.saved_blocks += done
        self.saved_bytes += done * save.layout.block_bytes

    async def _reserve(
        self,
        save: _Save,
        daemon: DaemonLink,
        blocks: range,
        running: Collection[asyncio.Task[None]],
    ) -> Reserved:
        """Reserve a batch; for what finds no room, again when the batches before are sealed."""
        count = len(blocks)
        reserved = Reserved(blocks, b"", [0] * count, [0] * count, [0] * count, [0] * count)
        everything = range(count)
        reserved.take(everything, await self._ask_room(save, daemon, blocks, everything))
        refused = reserved.refused()
        if refused and any(not task.done() for task in running):
            try:
                await asyncio.wait(running)
                reserved.take(refused, await self._ask_room(save, daemon, blocks, refused))
            except BaseException:
                ids = [each for each in reserved.ids if each]
                if ids and daemon.up:
                    await daemon.abandon(ids)
                raise
        return reserved

    async def _ask_room(
        self, save: _Save, daemon: DaemonLink, blocks: range, positions: Sequence[int]
    ) -> store_pb2.ReserveResponse:
        spec = save.spec
        for attempt in range(RETRIES_MAX + 1):
            left_s = self._left_s(save)
            try:
                return await daemon.reserve(
                    spec.namespace_id,
                    [spec.hashes[blocks[position]] for position in positions],
                    [spec.parents[blocks[position]] for position in positions],
                    ttl_s=min(RESERVATION_S_MAX, left_s + 1.0),
                    timeout_s=min(left_s, 10 * self._config.lookup_timeout_s),
                )
            except Overloaded as error:
                if attempt == RETRIES_MAX or error.retry_after_s >= left_s:
                    raise
                save.events["overloaded"] += 1
                await asyncio.sleep(error.retry_after_s)
        raise AssertionError("unreachable")

    async def _write(
        self,
        save: _Save,
        daemon: DaemonLink,
        fresh: Mapping[int, int],
        reserved: Reserved,
    ) -> dict[int, tuple[str, str]]:
        """Write all chunks; returns a reason and its detail by block, of those that failed."""
        network, peer = daemon.link.network, daemon.link.peer
        if network is None or not daemon.up:
            raise PeerLost(f"daemon {daemon.address} is away")
        try:
            window = RegionDescriptor.from_bytes(reserved.window)
        except InvalidRequest as error:  # the daemon's mistake, not the engine's
            raise Unavailable(f"daemon {daemon.address}: {error}", reason="malformed") from error
        writes = _Writes(1, asyncio.Event())  # one for ourselves, until all are submitted
        try:
            for run in runs_of(save.layout, fresh, reserved):
                first_tag, count = reserved.tags[fresh[run[0]]], save.layout.chunk_count
                writes.block_of.update(
                    (tag, run[index // count])
                    for index, tag in enumerate(range(first_tag, first_tag + count * len(run)))
                )
                source, target = tables_of(
                    save.layout,
                    save.spec.places,
                    run,
                    [reserved.bases[fresh[each]] for each in run],
                )
                for first in range(0, len(source), BATCH_WRITES_MAX):
                    last = min(len(source), first + BATCH_WRITES_MAX)
                    batch = WriteBatch(
                        save.entry.region,
                        source.parts(first, last),
                        window,
                        target.parts(first, last),
                        Lane.SAVE,
                        first_tag + first,
                        self._left_s(save),
                    )
                    tags = range(first_tag + first, first_tag + last)
                    network.transport.write_batch(peer, batch, partial(self._ended, writes, tags))
                    writes.open += 1
        finally:
            # Also when a write was refused: the source must not change before the others ended.
            writes.open -= 1
            if writes.open:
                over = asyncio.create_task(writes.over.wait())
                await _uninterrupted((over,))
        return writes.failures

    def _ended(self, writes: _Writes, tags: range, completion: BatchCompletion) -> None:
        """On any thread."""
        self._done.put(_Done(writes, tags, completion))

    def _on_done(self, items: list[_Done]) -> None:
        for item in items:
            writes, completion = item.batch, item.completion
            writes.open -= 1
            if completion.status is not WriteStatus.DONE:
                failure = (_word_of(completion.status), completion.detail)
                writes.failures.update((writes.block_of[tag], failure) for tag in item.tags)
            for tag, reason in completion.refused.items():
                writes.failures[writes.block_of[tag]] = (_word_of(WriteStatus.REFUSED), reason)
            if writes.open == 0:
                writes.over.set()

    async def _seal(
        self,
        save: _Save,
        daemon: DaemonLink,
        good: Sequence[int],
        ids: Sequence[int],
        checksums: Mapping[int, Sequence[int]],
    ) -> None:
        statuses = await daemon.seal(
            ids,
            [value for block in good for value in checksums[block]],
            durable=save.spec.durable,
            timeout_s=self._left_s(save),
        )
        if len(statuses) != len(good):
            raise Unavailable(
                f"daemon {daemon.address} sealed {len(good)} blocks with {len(statuses)} statuses",
                reason="malformed",
            )
        for block, number in zip(good, statuses, strict=True):
            # INCOMPLETE is not in the table: chunks got lost.
            status = _SEAL.get(number, SealStatus.FAILED)
            save.sealed[block] = status
            if status is not SealStatus.SEALED:
                save.fail(status.value, f"block {block} was not sealed: {_UNSEALED[status]}")

    def _left_s(self, save: _Save) -> float:
        left_s = save.deadline_at - self._loop.time()
        if left_s <= 0:
            raise DeadlineExceeded("the save's deadline passed")
        return left_s


async def _uninterrupted(work: Collection[asyncio.Future[Any]]) -> None:
    """Wait for the end of all, also while being cancelled: writes end by their deadlines."""
    cancelled: asyncio.CancelledError | None = None
    while any(not each.done() for each in work):
        try:
            await asyncio.wait(work)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _word_of(status: WriteStatus) -> str:
    return {
        WriteStatus.REFUSED: "refused",
        WriteStatus.LOST: "peer_lost",
        WriteStatus.EXPIRED: "deadline",
        WriteStatus.CLOSED: "cancelled",
    }.get(status, "failed")


def _reason_of(error: DualPathError) -> str:
    if isinstance(error, Overloaded | DeadlineExceeded):
        return error.reason
    return "daemon_unavailable"

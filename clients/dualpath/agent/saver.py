"""Saves: reserve at the daemon, write every chunk into its window, seal.

Owns the batches of a save and their order. Checksums are taken from the engine's memory before
the bytes leave, so that the daemon refuses what was damaged on the way. Bounded: one batch is
written while the next one is reserved at most. What fails is a value with its reason; the memory
is not read any more when `save` returns.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dualpath.agent.config import AgentConfig
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.load_spec import SaveSpec
from dualpath.agent.loader import daemon_for
from dualpath.agent.mailbox import Mailbox
from dualpath.agent.outcome import SaveResult
from dualpath.agent.regions import EngineRegion, Regions
from dualpath.kvstore.checksum import of_slices
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
)
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import Completion, Write, WriteStatus

log = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20
"""Bytes that are reserved, written and sealed at once."""
BATCH_BLOCKS = 1024
RETRIES_MAX = 3
"""How often a throttled reservation is tried again."""
RESERVATION_S_MAX = 285.0
SAVES_MAX = 256

_RESERVE: Mapping[int, ReserveStatus] = {
    store_pb2.ReserveStatus.Value(f"RESERVE_STATUS_{status.name}"): status
    for status in ReserveStatus
}
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
    """A write ended; `batch` waits for it."""

    batch: _Writes
    completion: Completion


@dataclass(slots=True, eq=False)
class _Writes:
    """Writes of one batch that have not ended."""

    open: int
    over: asyncio.Event
    failures: dict[int, Completion] = field(default_factory=dict)


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
            for first, count in _batches(save.layout, len(spec.hashes)):
                await self._batch(save, daemon, range(first, first + count))
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

    async def _batch(self, save: _Save, daemon: DaemonLink, blocks: range) -> None:
        spec, layout = save.spec, save.layout
        answer = await self._reserve(save, daemon, blocks)
        fresh: dict[int, int] = {}
        for position, block in enumerate(blocks):
            status = _RESERVE.get(answer.status[position])
            save.reserved[block] = status
            if status is ReserveStatus.RESERVED:
                fresh[block] = position
            elif status in (
                ReserveStatus.FULL,
                ReserveStatus.QUOTA,
                ReserveStatus.NO_PARENT,
                None,
            ):
                word = status.value if status else "unknown status"
                save.fail(word, f"block {block} was not reserved: {word}")
        if not fresh:
            if spec.durable and ReserveStatus.EXISTS in save.reserved[blocks.start : blocks.stop]:
                # Stored before, perhaps not written back yet: a durable seal waits for that.
                await daemon.seal((), (), durable=True, timeout_s=self._left_s(save))
            return
        ids = [answer.reservation_id[position] for position in fresh.values()]
        try:
            checksums = await self._loop.run_in_executor(None, _checksums, save, tuple(fresh))
            failures = await self._write(save, daemon, fresh, answer)
            failed = {block for block in fresh if block in failures}
            good = [block for block in fresh if block not in failed]
            for block in sorted(failed):
                save.fail(_word_of(failures[block]), f"block {block}: {failures[block].detail}")
                save.sealed[block] = SealStatus.FAILED
            lost = [answer.reservation_id[fresh[block]] for block in failed]
            if lost and daemon.up:
                await daemon.abandon(lost)
            if good:
                await self._seal(save, daemon, good, fresh, answer, checksums)
        except BaseException:
            if daemon.up:
                await daemon.abandon(ids)
            raise
        done = sum(save.sealed[block] is SealStatus.SEALED for block in fresh)
        self.saved_blocks += done
        self.saved_bytes += done * layout.block_bytes

    async def _reserve(
        self, save: _Save, daemon: DaemonLink, blocks: range
    ) -> store_pb2.ReserveResponse:
        spec = save.spec
        part = slice(blocks.start, blocks.stop)
        for attempt in range(RETRIES_MAX + 1):
            left_s = self._left_s(save)
            try:
                return await daemon.reserve(
                    spec.namespace_id,
                    spec.hashes[part],
                    spec.parents[part],
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
        answer: store_pb2.ReserveResponse,
    ) -> dict[int, Completion]:
        """Write all chunks; returns one failure by block, of those that failed."""
        network, peer = daemon.link.network, daemon.link.peer
        if network is None or not daemon.up:
            raise PeerLost(f"daemon {daemon.address} is away")
        window = RegionDescriptor.from_bytes(answer.window)
        layout = save.layout
        block_of: dict[int, int] = {}
        writes = _Writes(1, asyncio.Event())  # one for ourselves, until all are submitted
        try:
            for block, position in fresh.items():
                whole = save.spec.places.block(layout, block)
                base, first_tag = answer.base_bytes[position], answer.first_tag[position]
                for chunk in range(layout.chunk_count):
                    offset, nbytes = layout.chunk_extent(chunk)
                    tag = first_tag + chunk
                    block_of[tag] = block
                    write = Write(
                        save.entry.region,
                        whole.part(offset, nbytes),
                        window,
                        Slices.contiguous(base + offset, nbytes),
                        Lane.SAVE,
                        tag,
                        self._left_s(save),
                    )
                    network.transport.write(
                        peer, write, lambda done: self._done.put(_Done(writes, done))
                    )
                    writes.open += 1
        finally:
            # Also when a write was refused: the source must not change before the others ended.
            writes.open -= 1
            if writes.open:
                await _uninterrupted(writes.over)
        return {block_of[tag]: completion for tag, completion in writes.failures.items()}

    def _on_done(self, items: list[_Done]) -> None:
        for item in items:
            writes = item.batch
            writes.open -= 1
            if item.completion.status is not WriteStatus.DONE:
                writes.failures[item.completion.tag] = item.completion
            if writes.open == 0:
                writes.over.set()

    async def _seal(
        self,
        save: _Save,
        daemon: DaemonLink,
        good: Sequence[int],
        fresh: Mapping[int, int],
        answer: store_pb2.ReserveResponse,
        checksums: Mapping[int, Sequence[int]],
    ) -> None:
        statuses = await daemon.seal(
            [answer.reservation_id[fresh[block]] for block in good],
            [value for block in good for value in checksums[block]],
            durable=save.spec.durable,
            timeout_s=self._left_s(save),
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


async def _uninterrupted(event: asyncio.Event) -> None:
    """Wait, also while being cancelled: each write ends by its deadline at the latest."""
    cancelled: asyncio.CancelledError | None = None
    while not event.is_set():
        try:
            await event.wait()
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _batches(layout: KVLayout, blocks: int) -> list[tuple[int, int]]:
    """(first, count) of each batch."""
    step = max(1, min(BATCH_BLOCKS, BATCH_BYTES // layout.block_bytes))
    return [(first, min(step, blocks - first)) for first in range(0, blocks, step)]


def _checksums(save: _Save, blocks: Sequence[int]) -> dict[int, list[int]]:
    layout, view = save.layout, save.entry.region.view
    result: dict[int, list[int]] = {}
    for block in blocks:
        whole = save.spec.places.block(layout, block)
        result[block] = [
            of_slices(view, whole.part(*layout.chunk_extent(chunk)))
            for chunk in range(layout.chunk_count)
        ]
    return result


def _word_of(completion: Completion) -> str:
    return {
        WriteStatus.REFUSED: "refused",
        WriteStatus.LOST: "peer_lost",
        WriteStatus.EXPIRED: "deadline",
        WriteStatus.CLOSED: "cancelled",
    }.get(completion.status, "failed")


def _reason_of(error: DualPathError) -> str:
    if isinstance(error, Overloaded | DeadlineExceeded):
        return error.reason
    return "daemon_unavailable"

"""Read and Write: blocks as frames of a gRPC stream, for languages without the data plane.

Guarantees that every frame carries the xxh3-64 of its bytes, that what is read was checked against
the checksum recorded at seal, and that a Write that fails leaves nothing half-written: blocks
sealed before the failure stay, the others are abandoned. Frames of a block follow each other in
order. A right that is taken away ends a stream at its next block. Bounds the streams that run at
once and the bytes that one Write holds unsealed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from dualpath.kvstore.block_events import BlockEvents
from dualpath.kvstore.checksum import xxh3_64
from dualpath.kvstore.layout import CHUNK_BYTES_MAX, KVLayout
from dualpath.kvstore.service.auth import Caller
from dualpath.kvstore.service.gate import Gate
from dualpath.kvstore.service.messages import (
    checked_checksums,
    checked_hashes,
    checked_namespace_id,
    hit_message,
    seal_statuses,
)
from dualpath.kvstore.service.principal import Rights
from dualpath.kvstore.service.shares import Shares
from dualpath.kvstore.store_api import (
    BATCH_BLOCKS_MAX,
    RESERVATION_S_MAX,
    MissReason,
    NewBlock,
    PrefixHit,
    Reservation,
    ReserveStatus,
    SealRequest,
    SealStatus,
    Store,
)
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import (
    Corrupt,
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    Overloaded,
)

FRAME_BYTES_MAX = 1 << 20
STREAMS_MAX = 64
REFUSED_MAX = 16
STREAM_OWNER = "stream:"
"""What the owner of a stream's leases begins with; its number and its principal follow."""
LEASE_S = 60.0
FRAME_WAIT_S_MAX = 30.0
"""Longest pause between two frames of a Write, and longest that a Read's client may take none."""
BLOCK_S_MAX = 240.0
"""Longest time from a block's first frame to its last. Its slot is ours for longer than that."""
SEAL_BYTES = 16 << 20
"""A Write seals at the end of the block that brings it over this."""
SEAL_BLOCKS = 64
PENDING_S_MAX = 10.0
"""Longest that a Write waits for the seal of a block that somebody else writes."""
PENDING_ASK_S = 1.0
"""It asks as often at least: nobody tells of a writer that gives up."""
REFUSED_PAUSE_S = 1.0
"""A refused client that sends nothing for so long is told at once."""
REFUSED_S_MAX = 10.0
REFUSED_BYTES_MAX = 256 << 20
"""What is taken of a refused Write at most, and dropped."""

assert CHUNK_BYTES_MAX <= FRAME_BYTES_MAX, "a chunk fits a frame"
assert BLOCK_S_MAX < RESERVATION_S_MAX

_T = TypeVar("_T")


@dataclass(slots=True)
class _OpenBlock:
    """The block whose frames are coming in. Without a reservation its bytes are dropped."""

    index: int
    hash: bytes
    reservation: Reservation
    late_at: float
    received: int = 0


class ByteStreams:
    """Handlers of Read and Write."""

    def __init__(
        self,
        store: Store,
        events: BlockEvents,
        gate: Gate,
        executor: Executor,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._events = events
        self.gate = gate
        self._executor = executor
        self.clock = clock
        self._ids = itertools.count(1)
        self._shares = Shares(STREAMS_MAX, "Read and Write streams", retry_after_s=1.0)
        self._refused = 0

    @property
    def running(self) -> int:
        """Streams that run."""
        return len(self._shares)

    async def read(
        self,
        request: store_pb2.ReadRequest,
        caller: Caller,
        send: Callable[[store_pb2.ReadFrame], Awaitable[None]],
    ) -> None:
        """See store.proto: the prefix's blocks, a frame a chunk."""
        # A client that does not read must not keep its place among the streams.
        async with contextlib.aclosing(self._reading(request, caller)) as frames:
            async for frame in frames:
                try:
                    await asyncio.wait_for(send(frame), FRAME_WAIT_S_MAX)
                except TimeoutError:
                    raise DeadlineExceeded(
                        f"no frame was taken within {FRAME_WAIT_S_MAX:.1f} s: read the stream",
                        reason="stalled",
                    ) from None

    async def _reading(
        self, request: store_pb2.ReadRequest, caller: Caller
    ) -> AsyncGenerator[store_pb2.ReadFrame]:
        namespace_id = checked_namespace_id(request.namespace_id)
        checked_hashes("hash", request.hash)
        layout = self._store.layout(namespace_id)
        checked_checksums(len(request.hash), layout)
        self.gate.admit_lookup(caller.principal, namespace_id, leased=True)
        with self._counted(caller) as owner:
            hit = self._store.lookup(namespace_id, request.hash, owner=owner, lease_s=LEASE_S)
            misses = len(request.hash) - hit.blocks
            self.gate.quotas.looked_up(caller.principal, namespace_id, hit.blocks, misses)
            try:
                message = hit_message(hit)
                message.lease_id = message.lease_ms = 0
                yield store_pb2.ReadFrame(hit=message)
                async for frame in self._frames(hit, layout, owner):
                    self.gate.access.require(caller.principal, namespace_id, Rights.READ)
                    yield frame
            finally:
                if hit.lease_id:
                    self._store.release(hit.lease_id, owner=owner)

    async def _frames(
        self, hit: PrefixHit, layout: KVLayout, owner: str
    ) -> AsyncIterator[store_pb2.ReadFrame]:
        renew_at = self.clock() + LEASE_S / 3
        for block, checksums in enumerate(hit.checksums.tolist()):
            for chunk, checksum in enumerate(checksums):
                data = await self._blocking(self._chunk, hit.lease_id, block, chunk)
                if xxh3_64(memoryview(data)) != checksum:
                    await self._blocking(self._store.report_corrupt, hit.lease_id, block, chunk)
                    raise Corrupt(f"block {block}, chunk {chunk}: its checksum does not hold")
                offset, _ = layout.chunk_extent(chunk)
                yield store_pb2.ReadFrame(
                    block=block, offset_bytes=offset, data=data, checksum=checksum
                )
                if self.clock() >= renew_at:
                    # Only progress renews: a client that does not read loses the lease.
                    self._store.renew(hit.lease_id, owner=owner, lease_s=LEASE_S)
                    renew_at = self.clock() + LEASE_S / 3

    def _chunk(self, lease_id: int, block: int, chunk: int) -> bytes:
        with self._store.fetch(lease_id, block, chunk) as fetched:
            return b"".join(
                fetched.region.view[start : start + nbytes]
                for start, nbytes in fetched.slices.pieces()
            )

    async def write(
        self, frames: AsyncIterator[store_pb2.WriteFrame], caller: Caller
    ) -> store_pb2.WriteResponse:
        """See store.proto."""
        try:
            self.gate.readiness.check_admits()
            with self._counted(caller) as owner:
                intake = _Intake(self, owner, caller.principal)
                try:
                    return await intake.run(frames)
                finally:
                    # Whatever was not sealed is given up; leases it has none.
                    self._store.forget_owner(owner)
        except DualPathError:
            await self._let_finish(frames)
            raise

    async def _let_finish(self, frames: AsyncIterator[store_pb2.WriteFrame]) -> None:
        """Drop what a refused client still sends. A call that ends while its client sends reads
        as INTERNAL in grpc.aio, whatever status it was given."""
        if self._refused >= REFUSED_MAX:
            return
        self._refused += 1
        dropped = 0
        try:
            async with asyncio.timeout(REFUSED_S_MAX):
                while dropped < REFUSED_BYTES_MAX:
                    frame = await asyncio.wait_for(anext(frames), REFUSED_PAUSE_S)
                    dropped += len(frame.data)
        except (StopAsyncIteration, TimeoutError):
            pass  # it has nothing under way
        finally:
            self._refused -= 1

    async def _blocking(self, call: Callable[..., _T], *args: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)

    async def reserve(self, namespace_id: bytes, block: NewBlock, owner: str) -> Reservation:
        """Reserve one block of a Write."""
        outcomes = asyncio.ensure_future(
            self._blocking(
                lambda: self._store.reserve(
                    namespace_id, [block], owner=owner, ttl_s=RESERVATION_S_MAX
                )
            )
        )
        try:
            return (await asyncio.shield(outcomes))[0]
        except asyncio.CancelledError:
            # The thread goes on, and reserves after `write` has given up what there was.
            outcomes.add_done_callback(lambda _: self._store.forget_owner(owner))
            raise

    async def seal(
        self, ids: list[int], owner: str, writer: str, durable: bool
    ) -> tuple[SealStatus, ...]:
        """Seal blocks of a Write."""
        requests = [SealRequest(reservation) for reservation in ids]
        statuses = await self._blocking(
            lambda: self._store.seal(requests, owner=owner, durable=durable, writer=writer)
        )
        self.gate.quotas.sealed(writer, statuses.count(SealStatus.SEALED))
        return statuses

    async def await_sealed(self, namespace_id: bytes, block_hash: bytes) -> None:
        """Wait until a block that another writes is stored. Raises DeadlineExceeded, reason
        `pending`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PENDING_S_MAX
        while True:
            seen = self._events.last
            hit = self._store.lookup(namespace_id, [block_hash], owner="", lease_s=0.0)
            if hit.blocks:
                return
            left = deadline - loop.time()
            if hit.miss is not MissReason.PENDING or left <= 0:
                what = "gave it up" if left > 0 else f"did not seal it within {PENDING_S_MAX:g} s"
                raise DeadlineExceeded(
                    f"block {block_hash.hex()} was being written by somebody else, who {what}: "
                    "write it again",
                    reason="pending",
                )
            await self._event_after(seen, min(left, PENDING_ASK_S))

    async def _event_after(self, seen: int, limit_s: float) -> None:
        """Wait for an event after `seen`, or until the time is over."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody to tell
                loop.call_soon_threadsafe(news.set)

        self._events.call_at_news(seen, tell)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), limit_s)
        finally:
            self._events.forget_callback(tell)

    def check_writer(self, writer: str, namespace_id: bytes) -> None:
        """Raises PermissionDenied unless the principal may write there."""
        self.gate.access.require(writer, namespace_id, Rights.WRITE)

    @property
    def store(self) -> Store:
        """The store that is read and written."""
        return self._store

    @contextlib.contextmanager
    def _counted(self, caller: Caller) -> Iterator[str]:
        with self._shares.taken(caller.sharer), self.gate.quotas.stream(caller.principal):
            yield f"{STREAM_OWNER}{next(self._ids)}:{caller.principal}"


class _Intake:
    """One Write: the state between its frames."""

    def __init__(self, streams: ByteStreams, owner: str, writer: str) -> None:
        self._streams = streams
        self._owner = owner
        self._writer = writer
        self._namespace_id = b""
        self._layout: KVLayout | None = None
        self._durable = False
        self._open: _OpenBlock | None = None
        self._unsealed: list[tuple[int, int]] = []  # (index, reservation)
        self._held = contextlib.ExitStack()  # what counts against the writer until it is sealed
        self._pending: dict[bytes, int] = {}  # hash -> index of what others write
        self._answer = store_pb2.WriteResponse()

    async def run(self, frames: AsyncIterator[store_pb2.WriteFrame]) -> store_pb2.WriteResponse:
        """Take all frames; return the answer."""
        with self._held:
            return await self._run(frames)

    async def _run(self, frames: AsyncIterator[store_pb2.WriteFrame]) -> store_pb2.WriteResponse:
        number = 0
        while True:
            try:
                frame = await asyncio.wait_for(anext(frames), FRAME_WAIT_S_MAX)
            except StopAsyncIteration:
                break
            except TimeoutError:
                raise DeadlineExceeded(
                    f"no frame within {FRAME_WAIT_S_MAX:.0f} s after frame {number - 1}",
                    reason="stalled",
                ) from None
            await self._take(frame, number)
            number += 1
        if self._open is not None:
            raise InvalidRequest(
                f"the stream ended inside of block {self._open.index}, after "
                f"{self._open.received} bytes"
            )
        if self._unsealed:
            await self._seal()  # first: a block may be in the stream twice
        for block_hash in list(self._pending):
            await self._await_pending(block_hash)
        if self._durable and any(self._answer.existed):
            await self._seal()  # of nothing: waits for what existed to be durable
        return self._answer

    async def _take(self, frame: store_pb2.WriteFrame, number: int) -> None:
        if number == 0:
            self._namespace_id = checked_namespace_id(frame.namespace_id)
            self._layout = self._streams.store.layout(self._namespace_id)
            self._streams.check_writer(self._writer, self._namespace_id)
            self._durable = frame.durable
        elif frame.namespace_id not in (b"", self._namespace_id):
            raise InvalidRequest(f"frame {number}: another namespace_id than the first frame's")
        if len(frame.data) > FRAME_BYTES_MAX:
            raise InvalidRequest(
                f"frame {number}: {len(frame.data)} bytes of data; {FRAME_BYTES_MAX} at most"
            )
        if frame.data and xxh3_64(memoryview(frame.data)) != frame.checksum:
            raise Corrupt(f"frame {number}: its data does not have checksum {frame.checksum:#x}")
        if frame.hash:
            await self._begin(frame, number)
        if frame.data:
            await self._append(frame.data, number)

    async def _begin(self, frame: store_pb2.WriteFrame, number: int) -> None:
        if self._open is not None:
            raise InvalidRequest(
                f"frame {number}: a new block before block {self._open.index} is complete "
                f"({self._open.received} bytes so far)"
            )
        index = len(self._answer.hash)
        if index >= BATCH_BLOCKS_MAX:
            raise InvalidRequest(f"frame {number}: over {BATCH_BLOCKS_MAX} blocks in one stream")
        checked_hashes("hash", [frame.hash])
        checked_hashes("parent", [frame.parent], empty=True)
        self._streams.check_writer(self._writer, self._namespace_id)
        reservation = await self._reserve(NewBlock(frame.hash, frame.parent))
        if reservation.status is ReserveStatus.NO_PARENT and frame.parent in self._pending:
            await self._await_pending(frame.parent)
            reservation = await self._reserve(NewBlock(frame.hash, frame.parent))
        if reservation.status is ReserveStatus.NO_PARENT:
            raise InvalidRequest(
                f"frame {number}: parent {frame.parent.hex()} of block {index} is not stored; "
                "write parents first"
            )
        if reservation.status in (ReserveStatus.FULL, ReserveStatus.QUOTA):
            whose = "" if reservation.status is ReserveStatus.FULL else " within the tenant's quota"
            raise Overloaded(
                f"block {index}: no space could be freed{whose}: all else is leased or pending",
                retry_after_s=1.0,
            )
        exists = reservation.status is ReserveStatus.EXISTS
        self._answer.hash.append(frame.hash)
        self._answer.status.append(
            store_pb2.SEAL_STATUS_SEALED if exists else store_pb2.SEAL_STATUS_UNSPECIFIED
        )
        self._answer.existed.append(reservation.status is not ReserveStatus.RESERVED)
        if reservation.status is ReserveStatus.PENDING:
            self._pending[frame.hash] = index
        late_at = self._streams.clock() + BLOCK_S_MAX
        self._open = _OpenBlock(index, frame.hash, reservation, late_at)

    async def _reserve(self, block: NewBlock) -> Reservation:
        try:
            return await self._reserve_now(block)
        except Overloaded:
            if not self._unsealed:
                raise
        # What is sealed counts no more: a small limit makes the seals small, not the stream fail.
        await self._seal()
        return await self._reserve_now(block)

    async def _reserve_now(self, block: NewBlock) -> Reservation:
        assert self._layout is not None
        with contextlib.ExitStack() as held:
            held.enter_context(self._streams.gate.holding(self._writer, self._layout.slot_bytes, 1))
            reservation = await self._streams.reserve(self._namespace_id, block, self._owner)
            if reservation.status is ReserveStatus.RESERVED:
                self._held.push(held.pop_all())
        return reservation

    async def _await_pending(self, block_hash: bytes) -> None:
        await self._streams.await_sealed(self._namespace_id, block_hash)
        self._answer.status[self._pending.pop(block_hash)] = store_pb2.SEAL_STATUS_SEALED

    async def _append(self, data: bytes, number: int) -> None:
        block, layout = self._open, self._layout
        if block is None or layout is None:
            raise InvalidRequest(f"frame {number}: data before a frame with the block's hash")
        end = block.received + len(data)
        if end > layout.block_bytes:
            raise InvalidRequest(
                f"frame {number}: block {block.index} gets {end} bytes, it has {layout.block_bytes}"
            )
        if self._streams.clock() >= block.late_at:
            raise DeadlineExceeded(
                f"frame {number}: block {block.index} took longer than {BLOCK_S_MAX:.0f} s"
            )
        extent = block.reservation.extent
        if extent is not None:
            start = extent.start + block.received
            self._streams.store.arena.view[start : start + len(data)] = data
        block.received = end
        if end < layout.block_bytes:
            return
        self._open = None
        if extent is not None:
            self._unsealed.append((block.index, block.reservation.reservation_id))
        held = len(self._unsealed)
        if held >= SEAL_BLOCKS or held * layout.block_bytes >= SEAL_BYTES:
            await self._seal()

    async def _seal(self) -> None:
        self._streams.check_writer(self._writer, self._namespace_id)
        unsealed, self._unsealed = self._unsealed, []
        ids = [reservation for _, reservation in unsealed]
        sealed = await self._streams.seal(ids, self._owner, self._writer, self._durable)
        self._held.close()
        for (index, _), status in zip(unsealed, seal_statuses(sealed), strict=True):
            self._answer.status[index] = status

"""A daemon in this process and a client that speaks its protocol without our client library."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from dualpath.kvstore.checksum import xxh3_64
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.kvstore.service.namespace_message import namespace_message
from dualpath.kvstore.service.process import Daemon
from dualpath.proto.channel import client_options
from dualpath.proto.v1 import common_pb2, store_pb2, store_pb2_grpc
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.shm_transport import ShmTransport
from dualpath.transfer.slices import Slices
from dualpath.transfer.tcp_transport import TcpTransport
from dualpath.transfer.transport import Arrival, Completion, Transport, Write, WriteStatus

WAIT_S = 20.0
ASK_AGAIN_S = 0.005
"""Pause between two questions to a daemon; only to leave it the processor."""
LAYOUT = KVLayout(layers=8, block_tokens=16, layer_bytes=80_000, dtype="bf16")
"""Three chunks a block, the last one short; layers are not page-aligned."""

assert LAYOUT.chunk_count == 3


def content(block_hash: bytes, layout: KVLayout = LAYOUT) -> bytes:
    """The bytes of a block, made from its key: what is served can be told from what was not."""
    return random.Random(block_hash).randbytes(layout.block_bytes)


def chain(count: int, seed: str = "") -> list[bytes]:
    """Hashes of a chain."""
    return [hashlib.sha256(f"{seed}/{index}".encode()).digest() for index in range(count)]


def parents(hashes: Sequence[bytes]) -> list[bytes]:
    """The parent of each hash of a chain from its first block on."""
    return [b"", *hashes[:-1]]


class AdvancedClock:
    """The machine's monotonic time, ahead by what a test advanced it: expiry without waiting."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self._ahead_s

    def advance(self, seconds: float) -> None:
        """From now on it is `seconds` later."""
        self._ahead_s += seconds


@dataclass
class Grants:
    """What came back for the chunks of one or more grants."""

    landed: dict[int, Arrival]
    failed: dict[int, int]
    done: set[int]
    detail: str


class Client:
    """One attachment at a daemon: control stub, data transport, memory."""

    def __init__(self, target: str, token: str = "") -> None:
        self.channel = grpc.aio.insecure_channel(target, options=client_options())
        self.stub: Any = store_pb2_grpc.StoreStub(self.channel)
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.transport: Transport | None = None
        self.session = b""
        self.peer_id = ""
        self.lost = threading.Event()
        self.region = Region.memfd("client", 32 << 20)
        self.attached: Any = None

    async def call(self, method: str, request: Any) -> Any:
        """A unary call with the token and a deadline."""
        return await getattr(self.stub, method)(
            request, timeout=WAIT_S, metadata=self.metadata or None
        )

    async def stats(self) -> Any:
        """What the daemon counts."""
        return await self.call("Stats", store_pb2.StatsRequest())

    async def namespace(self, layout: KVLayout = LAYOUT, **fields: str) -> bytes:
        """Open a namespace."""
        fields.setdefault("model", "m")
        message = namespace_message(Namespace(layout=layout, **fields))
        opened = await self.call("OpenNamespace", store_pb2.OpenNamespaceRequest(namespace=message))
        return bytes(opened.namespace_id)

    async def attach(self, *transports: str, connect: bool = True) -> Client:
        """Join the data plane."""
        request = common_pb2.AttachRequest(name="test", transports=transports or ("tcp",))
        self.attached = attached = await self.call("Attach", request)
        make = ShmTransport if attached.transport == "shm" else TcpTransport
        self.transport = make("test", lambda *_: self.lost.set())
        self.session, self.peer_id = attached.session, attached.peer_id
        if connect:
            await asyncio.to_thread(
                self.transport.connect,
                "daemon",
                attached.address,
                attached.invitation,
                deadline_s=WAIT_S,
            )
        return self

    async def reserve(
        self, namespace_id: bytes, hashes: Sequence[bytes], ttl_ms: int = 60_000
    ) -> Any:
        """Reserve a chain."""
        return await self.call(
            "Reserve",
            store_pb2.ReserveRequest(
                namespace_id=namespace_id,
                hash=hashes,
                parent=parents(hashes),
                ttl_ms=ttl_ms,
                session=self.session,
            ),
        )

    async def put_chunk(
        self, reserved: Any, index: int, chunk: int, data: bytes, layout: KVLayout = LAYOUT
    ) -> Completion:
        """Write one chunk of a reserved block over the data plane."""
        assert self.transport is not None
        offset, nbytes = layout.chunk_extent(chunk)
        self.region.view[offset : offset + nbytes] = data[offset : offset + nbytes]
        done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        write = Write(
            self.region,
            Slices.contiguous(offset, nbytes),
            RegionDescriptor.from_bytes(reserved.window),
            Slices.contiguous(reserved.base_bytes[index] + offset, nbytes),
            Lane.SAVE,
            reserved.first_tag[index] + chunk,
            WAIT_S,
        )

        def ended(completion: Completion) -> None:
            loop.call_soon_threadsafe(done.set_result, completion)

        self.transport.write("daemon", write, ended)
        return await asyncio.wait_for(done, WAIT_S)

    async def save(
        self,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        *,
        durable: bool = True,
        layout: KVLayout = LAYOUT,
    ) -> list[int]:
        """Reserve, write and seal a chain of keyed content; return the seal's statuses."""
        reserved = await self.reserve(namespace_id, hashes)
        checksums = []
        for index, block_hash in enumerate(hashes):
            assert reserved.status[index] == store_pb2.RESERVE_STATUS_RESERVED
            data = content(block_hash, layout)
            for chunk in range(layout.chunk_count):
                offset, nbytes = layout.chunk_extent(chunk)
                checksums.append(xxh3_64(memoryview(data)[offset : offset + nbytes]))
                ended = await self.put_chunk(reserved, index, chunk, data, layout)
                assert ended.status is WriteStatus.DONE, ended
        sealed = await self.call(
            "Seal",
            store_pb2.SealRequest(
                reservation_id=reserved.reservation_id,
                checksum=checksums,
                durable=durable,
                session=self.session,
            ),
        )
        return list(sealed.status)

    async def lookup(
        self, namespace_id: bytes, hashes: Sequence[bytes], lease_ms: int = 60_000
    ) -> Any:
        """Look up and lease under the session, if there is one."""
        return await self.call(
            "Lookup",
            store_pb2.LookupRequest(
                namespace_id=namespace_id,
                hashes=b"".join(hashes),
                hash_bytes=len(hashes[0]),
                lease_ms=lease_ms,
                session=self.session,
            ),
        )

    @asynccontextmanager
    async def deliver(self) -> AsyncIterator[Delivery]:
        """An open Deliver stream."""
        call = self.stub.Deliver(metadata=self.metadata or None)
        await call.write(store_pb2.DeliverRequest(session=self.session))
        delivery = Delivery(self, call)
        first = await asyncio.wait_for(call.read(), WAIT_S)
        delivery.peer_id = first.peer_id
        try:
            yield delivery
        finally:
            call.cancel()

    async def close(self) -> None:
        """End everything."""
        if self.transport is not None:
            await asyncio.to_thread(self.transport.close)
        await self.channel.close(None)


class Delivery:
    """One Deliver stream and the windows that it fills."""

    def __init__(self, client: Client, call: Any) -> None:
        self.client = client
        self.call = call
        self.peer_id = ""
        self.landed: dict[int, Arrival] = {}
        self.progress: list[Any] = []
        self.found: dict[int, Any] = {}
        self._next = 1

    def window(self) -> RegionDescriptor:
        """A window over all of the client's memory."""
        assert self.client.transport is not None
        region = self.client.region
        return self.client.transport.expose(region, 0, region.nbytes, self._arrived)

    def _arrived(self, arrival: Arrival) -> bool:
        self.landed[arrival.tag] = arrival
        return True

    async def grant(
        self,
        chunks: Sequence[tuple[int, int]],
        window: RegionDescriptor,
        *,
        lease_id: int = 0,
        ticket: bytes = b"",
        arm: bool = True,
        lane: Lane = Lane.LOAD_PREFILL,
        deadline_ms: int = 10_000,
        layout: KVLayout = LAYOUT,
        change: Callable[[Any], None] = lambda message: None,
        lookup: Any = None,
    ) -> int:
        """Grant (block, chunk) pairs; block b lands at b * slot_bytes. Return the grant's id."""
        assert self.client.transport is not None
        grant_id, self._next = self._next, self._next + 1
        tags = [(grant_id << 20) + (block << 6) + chunk for block, chunk in chunks]
        extents = [layout.chunk_extent(chunk) for _, chunk in chunks]
        bases = [
            block * layout.slot_bytes + offset
            for (block, _), (offset, _) in zip(chunks, extents, strict=True)
        ]
        # One slice a chunk, long enough for the longest.
        length = layout.chunk_bytes
        targets = [
            Slices(base, length, 1, length, 0, nbytes)
            for base, (_, nbytes) in zip(bases, extents, strict=True)
        ]
        if arm:
            self.client.transport.arm(window, list(zip(tags, targets, strict=True)))
        message = common_pb2.ChunkGrant(
            grant_id=grant_id,
            window=window.to_bytes(),
            lane=int(lane),
            deadline_ms=deadline_ms,
            block=[block for block, _ in chunks],
            chunk=[chunk for _, chunk in chunks],
            tag=tags,
            target=common_pb2.SliceTable(
                stride_bytes=length,
                count=1,
                length_bytes=length,
                base_bytes=bases,
                skip_bytes=[0] * len(chunks),
                nbytes=[nbytes for _, nbytes in extents],
            ),
        )
        change(message)
        await self.call.write(
            store_pb2.DeliverRequest(lease_id=lease_id, ticket=ticket, grant=message, lookup=lookup)
        )
        return grant_id

    async def cancel(self, grant_id: int) -> None:
        """Ask to drop a grant."""
        await self.call.write(store_pb2.DeliverRequest(cancel_grant_id=[grant_id]))

    async def outcome(self, *grant_ids: int) -> Grants:
        """Read progress until these grants are done."""
        failed: dict[int, int] = {}
        done: set[int] = set()
        detail = ""
        async with asyncio.timeout(WAIT_S):
            while not done.issuperset(grant_ids):
                response = await self.call.read()
                assert response is not grpc.aio.EOF
                if response.HasField("found"):
                    self.found[response.found.grant_id] = response.found
                for progress in response.progress:
                    self.progress.append(progress)
                    failed.update(zip(progress.failed_tag, progress.failure, strict=True))
                    detail = detail or progress.detail
                    if progress.done:
                        done.add(progress.grant_id)
        return Grants(self.landed, failed, done, detail)

    def block(self, index: int, layout: KVLayout = LAYOUT) -> bytes:
        """The bytes that lie where block `index` lands."""
        start = index * layout.slot_bytes
        return bytes(self.client.region.view[start : start + layout.block_bytes])


class Lab:
    """Makes daemons and clients, and takes them down."""

    content = staticmethod(content)
    chain = staticmethod(chain)
    parents = staticmethod(parents)
    layout = LAYOUT
    wait_s = WAIT_S

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = AsyncExitStack()
        self._count = 0

    def config(self, **changes: Any) -> DaemonConfig:
        """Small and on any port."""
        self._count += 1
        config = DaemonConfig(
            data=str(self.folder / f"data{self._count}"),
            listen="127.0.0.1:0",
            disk_bytes=128 << 20,
            dram_bytes=32 << 20,
            segment_bytes=16 << 20,
            drain_s=1.0,
        )
        return replace(config, **changes)

    async def daemon(self, config: DaemonConfig | None = None, **changes: Any) -> Running:
        """A daemon in this loop."""
        clock = AdvancedClock()
        daemon = Daemon(config or self.config(**changes), clock=clock)
        where = await daemon.start()
        self._stack.push_async_callback(daemon.stop)
        return Running(daemon, {key: str(value) for key, value in where.items()}, clock)

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        """Ask until `condition` holds; after `wait_s` fail, saying `what` did not happen."""
        try:
            async with asyncio.timeout(self.wait_s):
                while not await condition():
                    await asyncio.sleep(ASK_AGAIN_S)
        except TimeoutError:
            pytest.fail(f"not within {self.wait_s:.0f} s: {what}")

    def client(self, target: Running | str, token: str = "") -> Client:
        """A client of a daemon, over TCP unless a target is named."""
        client = Client(target if isinstance(target, str) else target.where["listen"], token)
        self._stack.push_async_callback(client.close)
        return client

    async def close(self) -> None:
        """Take everything down."""
        await self._stack.aclose()


@dataclass
class Running:
    """A daemon and what it said when it was ready."""

    daemon: Daemon
    where: dict[str, str]
    clock: AdvancedClock


RunLab = Callable[..., None]


@pytest.fixture
def in_lab(tmp_path: Path) -> RunLab:
    """Run a coroutine function with a Lab in a fresh event loop, for `limit_s` at most."""

    def run(body: Callable[[Lab], Awaitable[None]], limit_s: float = 100) -> None:
        async def main() -> None:
            lab = Lab(tmp_path)
            async with asyncio.timeout(limit_s):
                try:
                    await body(lab)
                finally:
                    await lab.close()

        asyncio.run(main())

    return run

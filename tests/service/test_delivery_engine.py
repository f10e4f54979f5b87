"""The engine behind the Deliver streams, alone: what fails, fails chunk by chunk."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
from dualpath.kvstore.fetched_batch import FetchStatus
from dualpath.kvstore.service.deliver import DeliveryConfig, DeliveryEngine
from dualpath.kvstore.service.delivery_queue import ChunkFailure, Grant, GrantedChunks
from dualpath.transfer.errors import Corrupt, InvalidRequest, LeaseExpired, Overloaded
from dualpath.transfer.lane import Lane
from dualpath.transfer.memory_transport import MemoryHub, MemoryTransport
from dualpath.transfer.region import Region
from dualpath.transfer.slice_table import SliceTable

WAIT_S = 20.0


class _Chunks:
    """A FetchedBatch of 4 KiB chunks; those of `errors` fail. They come two at a time."""

    def __init__(self, region: Region, count: int, source: _Source) -> None:
        self.region = region
        self.offsets = np.arange(count, dtype=np.int64) * 4096
        self.nbytes = np.full(count, 4096, np.int64)
        self.status = np.full(count, FetchStatus.UNDER_WAY, np.uint8)
        self._source = source
        self._told = 0

    def __len__(self) -> int:
        return len(self.status)

    def arrived(self, timeout_s: float) -> Any:
        first, self._told = self._told, min(self._told + 2, len(self.status))
        came = np.arange(first, self._told, dtype=np.int32)
        self.status[came] = [self._source.errors.get(int(each), FetchStatus.OK) for each in came]
        return came[::-1] if self._source.backwards else came

    def release(self, chunks: Any = None) -> None:
        self._source.released += list(range(len(self)) if chunks is None else chunks.tolist())


class _Source:
    """What the engine needs of a store: `fetch_batch`, failing as told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.errors: dict[int, int] = {}
        self.backwards = False
        self.region = Region.anonymous(1 << 20)
        self.released: list[int] = []

    def fetch_batch(self, lease_id: int, blocks: Any, chunks: Any, *, wait: bool) -> _Chunks:
        if self.error is not None:
            raise self.error
        return _Chunks(self.region, min(len(blocks), 15), self)


class _Rig:
    """An engine that writes over the memory transport to a receiver in this process."""

    def __init__(self, source: _Source, clock: Any = time.monotonic) -> None:
        hub = MemoryHub()
        self.sender = MemoryTransport("daemon", lambda *_: None, hub)
        self.receiver = MemoryTransport("client", lambda *_: None, hub)
        self.sender.listen("here")
        self.receiver.connect("daemon", "here", self.sender.invite("client"), deadline_s=5)
        self.region = Region.anonymous(1 << 20)
        self.window = self.receiver.expose(self.region, 0, self.region.nbytes, lambda _: True)
        store: Any = source
        self.engine = DeliveryEngine(store, DeliveryConfig(readers=2), clock)
        self.loop = asyncio.get_running_loop()
        self.news = asyncio.Event()
        self.engine.open(
            "client", self.sender, lambda _: _quietly(self.loop.call_soon_threadsafe, self.news.set)
        )

    def grant(self, chunks: int, deadline_s: float = 10.0, nbytes: int = 4096) -> Grant:
        numbers = list(range(chunks))
        targets = SliceTable.contiguous([4096 * each for each in numbers], [nbytes] * chunks)
        self.receiver.arm_table(self.window, 1, targets)
        granted = GrantedChunks([0] * chunks, numbers, [each + 1 for each in numbers], targets)
        return Grant(1, 1, self.window, Lane.SAVE, time.monotonic() + deadline_s, granted)

    async def failures(self) -> list[ChunkFailure]:
        found: list[ChunkFailure] = []
        async with asyncio.timeout(WAIT_S):
            while True:
                await self.news.wait()
                self.news.clear()
                for report in self.engine.reports("client"):
                    found.extend(failure for _, failure in report.failures)
                    if report.done:
                        return found

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.engine.close()


def _quietly(call: Any, *args: Any) -> None:
    call(*args)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (LeaseExpired("x"), ChunkFailure.LEASE_EXPIRED),
        (Corrupt("x"), ChunkFailure.CORRUPT),
        (Overloaded("x", retry_after_s=1), ChunkFailure.OVERLOADED),
        (InvalidRequest("x"), ChunkFailure.INVALID),
        (OSError("the medium"), ChunkFailure.CORRUPT),
    ],
)
def test_what_the_store_cannot_read_fails_chunk_by_chunk(
    error: Exception, failure: ChunkFailure
) -> None:
    async def body() -> None:
        rig = _Rig(_Source(error))
        try:
            rig.engine.submit("client", rig.grant(3))
            assert await rig.failures() == [failure] * 3
            assert rig.engine.stats().failures == {failure: 3}
            assert rig.engine.stats().pending_bytes == 0
        finally:
            rig.close()

    asyncio.run(body())


def test_every_buffer_is_released_once_and_a_wrong_size_is_not_sent() -> None:
    async def body() -> None:
        source = _Source()
        rig = _Rig(source)
        try:
            rig.engine.submit("client", rig.grant(20))
            assert await rig.failures() == []
            assert len(source.released) == 20
            rig.engine.submit("client", rig.grant(2, nbytes=100))
            assert await rig.failures() == [ChunkFailure.INVALID] * 2
            assert len(source.released) == 22
            assert await asyncio.to_thread(rig.engine.drain, WAIT_S)
        finally:
            rig.close()

    asyncio.run(body())


def test_chunks_that_the_medium_does_not_give_fail_alone() -> None:
    async def body() -> None:
        source = _Source()
        source.errors = {1: FetchStatus.CORRUPT, 4: FetchStatus.UNAVAILABLE}
        source.backwards = True
        rig = _Rig(source)
        try:
            rig.engine.submit("client", rig.grant(6))
            failures = await rig.failures()
            assert sorted(failures) == [ChunkFailure.CORRUPT, ChunkFailure.OVERLOADED]
            assert await asyncio.to_thread(rig.engine.wait_idle, WAIT_S)
            assert sorted(source.released) == list(range(6))
            assert rig.engine.stats().delivered_chunks == 4
        finally:
            rig.close()

    asyncio.run(body())


def test_a_peer_that_is_gone_fails_its_chunks_and_closing_drops_them() -> None:
    async def body() -> None:
        rig = _Rig(_Source())
        try:
            grant = rig.grant(3)
            rig.receiver.close()
            rig.engine.submit("client", grant)
            assert set(await rig.failures()) == {ChunkFailure.PEER_LOST}
            rig.engine.close_peer("client")
            assert rig.engine.reports("client") == []
            assert await asyncio.to_thread(rig.engine.wait_idle, WAIT_S)
        finally:
            rig.close()

    asyncio.run(body())

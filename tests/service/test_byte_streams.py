"""Read and Write over gRPC: frames with checksums, nothing half-written."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import pytest
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.checksum import xxh3_64
from dualpath.kvstore.service import byte_streams
from dualpath.proto.status import error_of
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import Overloaded

WAIT_S = 20.0
FRAME = 1 << 20


def _frames(
    lab: Any, namespace_id: bytes, hashes: Sequence[bytes], size: int = 200_000
) -> list[store_pb2.WriteFrame]:
    """Whole blocks of keyed content, in frames of `size` bytes."""
    frames = []
    for block_hash, parent in zip(hashes, lab.parents(hashes), strict=True):
        data = lab.content(block_hash)
        for offset in range(0, len(data), size):
            piece = data[offset : offset + size]
            frame = store_pb2.WriteFrame(data=piece, checksum=xxh3_64(piece))
            if offset == 0:
                frame.hash, frame.parent = block_hash, parent
            frames.append(frame)
    frames[0].namespace_id, frames[0].durable = namespace_id, True
    return frames


async def _write(client: Any, frames: Sequence[store_pb2.WriteFrame]) -> Any:
    return await client.stub.Write(iter(frames), timeout=WAIT_S)


async def _refused(client: Any, frames: Sequence[store_pb2.WriteFrame]) -> None:
    """Send frames of which the last one is refused, or the end after them."""
    call = client.stub.Write(timeout=WAIT_S)
    for frame in frames:
        await call.write(frame)
    await call.done_writing()
    await call


async def _read(client: Any, namespace_id: bytes, hashes: Sequence[bytes]) -> Any:
    hit: Any = None
    blocks: dict[int, bytearray] = {}
    request = store_pb2.ReadRequest(namespace_id=namespace_id, hash=hashes)
    async for frame in client.stub.Read(request, timeout=WAIT_S):
        if hit is None:
            hit = frame.hit
            continue
        assert len(frame.data) <= FRAME
        assert xxh3_64(frame.data) == frame.checksum
        block = blocks.setdefault(frame.block, bytearray())
        assert frame.offset_bytes == len(block)
        block += frame.data
    return hit, [bytes(blocks[index]) for index in sorted(blocks)]


async def _reserved(lab: Any, client: Any, count: int) -> None:
    """Wait until so many blocks are reserved."""

    async def counted() -> bool:
        return bool((await client.stats()).reservations == count)

    await lab.until(counted, f"{count} reservations")


async def _no_leases(lab: Any, client: Any) -> None:
    """Wait until nobody reads."""

    async def counted() -> bool:
        return bool((await client.stats()).leases == 0)

    await lab.until(counted, "no leases")


async def _drain(call: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while await call.read() is not grpc.aio.EOF:
            pass


def test_what_one_stream_wrote_another_reads(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        client = lab.client(await lab.daemon())
        namespace_id = await client.namespace()
        hashes = lab.chain(40)  # more than one group of seals
        written = await _write(client, _frames(lab, namespace_id, hashes))
        assert list(written.hash) == hashes
        assert set(written.status) == {store_pb2.SEAL_STATUS_SEALED}
        assert not any(written.existed)
        hit, blocks = await _read(client, namespace_id, [*hashes, b"absent--" * 4])
        assert hit.blocks == 40
        assert hit.lease_id == 0
        assert hit.miss == store_pb2.MISS_REASON_ABSENT
        assert blocks == [lab.content(block_hash) for block_hash in hashes]
        again = await _write(client, _frames(lab, namespace_id, hashes[:3]))
        assert list(again.existed) == [True] * 3
        assert set(again.status) == {store_pb2.SEAL_STATUS_SEALED}
        stats = await client.call("Stats", store_pb2.StatsRequest())
        assert (stats.leases, stats.reservations) == (0, 0)

    in_lab(body)


def test_what_a_stream_wrote_is_loaded_over_the_data_plane(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        client = await lab.client(await lab.daemon()).attach()
        namespace_id = await client.namespace()
        hashes = lab.chain(2)
        await _write(client, _frames(lab, namespace_id, hashes))
        hit = await client.lookup(namespace_id, hashes)
        assert hit.blocks == 2
        async with client.deliver() as delivery:
            chunks = [(b, c) for b in range(2) for c in range(lab.layout.chunk_count)]
            grant = await delivery.grant(chunks, delivery.window(), lease_id=hit.lease_id)
            assert not (await delivery.outcome(grant)).failed
            assert delivery.block(1) == lab.content(hashes[1])

    in_lab(body)


def _without_hash(frames: list[Any]) -> None:
    frames[0].hash = b""


def _flipped(frames: list[Any]) -> None:
    data = bytearray(frames[2].data)
    data[100] ^= 1
    frames[2].data = bytes(data)


def _swapped_with_next_block(frames: list[Any]) -> None:
    frames[3], frames[4] = frames[4], frames[3]


def _too_long(frames: list[Any]) -> None:
    frames.insert(1, frames[1])


def _huge(frames: list[Any]) -> None:
    frames[1].data = bytes(FRAME + 1)


def _cut(frames: list[Any]) -> None:
    frames.pop()


def _other_namespace(frames: list[Any]) -> None:
    frames[1].namespace_id = b"o" * 16


def _no_namespace(frames: list[Any]) -> None:
    frames[0].namespace_id = b""


def _unknown_namespace(frames: list[Any]) -> None:
    frames[0].namespace_id = b"u" * 16


def _orphan(frames: list[Any]) -> None:
    frames[0].parent = b"p" * 32


def _short_hash(frames: list[Any]) -> None:
    frames[0].hash = b"short"


_INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("damage", "frames_read", "code", "said"),
    [
        (_flipped, 3, grpc.StatusCode.DATA_LOSS, "frame 2"),
        (_without_hash, 1, _INVALID, "before a frame with the block's hash"),
        (_swapped_with_next_block, 4, _INVALID, "before block 0 is complete"),
        (_too_long, 4, _INVALID, "block 0 gets"),
        (_huge, 2, _INVALID, "1048577 bytes"),
        (_cut, 7, _INVALID, "ended inside of block 1"),
        (_other_namespace, 2, _INVALID, "another namespace_id"),
        (_no_namespace, 1, _INVALID, "namespace_id: 0 bytes"),
        (_unknown_namespace, 1, _INVALID, "namespace"),
        (_orphan, 1, _INVALID, "write parents first"),
        (_short_hash, 1, _INVALID, "5 bytes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_stream_is_refused_and_leaves_nothing(
    in_lab: Any, damage: Any, frames_read: int, code: grpc.StatusCode, said: str
) -> None:
    async def body(lab: Any) -> None:
        client = lab.client(await lab.daemon())
        namespace_id = await client.namespace()
        hashes = lab.chain(2)
        frames = _frames(lab, namespace_id, hashes)
        damage(frames)
        with pytest.raises(grpc.RpcError, match=said) as caught:
            await _refused(client, frames[:frames_read])
        assert caught.value.code() is code
        stats = await client.call("Stats", store_pb2.StatsRequest())
        assert (stats.blocks, stats.reservations) == (0, 0)
        await _write(client, _frames(lab, namespace_id, hashes))  # the slots are free again

    in_lab(body)


def test_a_cancelled_write_gives_its_slots_back(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        client = lab.client(await lab.daemon())
        namespace_id = await client.namespace()
        call = client.stub.Write()
        await call.write(_frames(lab, namespace_id, lab.chain(1))[0])
        await _reserved(lab, client, 1)
        call.cancel()
        await _reserved(lab, client, 0)

    in_lab(body)


def test_a_reader_that_stops_reading_holds_up_nobody(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        client, other = lab.client(running), lab.client(running)
        namespace_id = await client.namespace()
        hashes = lab.chain(30)
        await _write(client, _frames(lab, namespace_id, hashes))
        request = store_pb2.ReadRequest(namespace_id=namespace_id, hash=hashes)
        call = client.stub.Read(request)
        await call.read()
        _, blocks = await _read(other, namespace_id, hashes)
        assert len(blocks) == 30
        call.cancel()
        await _no_leases(lab, other)

    in_lab(body)


def test_readers_that_stop_reading_give_their_places_up_in_time(
    in_lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_streams, "FRAME_WAIT_S_MAX", 0.3)

    async def body(lab: Any) -> None:
        running = await lab.daemon()
        client, other = lab.client(running), lab.client(running)
        namespace_id = await client.namespace()
        hashes = lab.chain(30)
        await _write(client, _frames(lab, namespace_id, hashes))
        request = store_pb2.ReadRequest(namespace_id=namespace_id, hash=hashes)
        held = [client.stub.Read(request) for _ in range(byte_streams.STREAMS_MAX // 2)]
        for call in held:
            await call.read()
        await _no_leases(lab, other)
        _, blocks = await _read(other, namespace_id, hashes)
        assert len(blocks) == 30
        with pytest.raises(grpc.RpcError, match="no frame was taken") as caught:
            await _drain(held[0])
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert error_of(caught.value).reason == "stalled"
        for call in held:
            call.cancel()

    in_lab(body)


def test_streams_beyond_the_limit_are_told_when_to_retry(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        client = lab.client(await lab.daemon())
        namespace_id = await client.namespace()
        first = _frames(lab, namespace_id, lab.chain(1))[0]
        held = []
        share = byte_streams.STREAMS_MAX // 2
        for index in range(share):
            call = client.stub.Write()
            frame = store_pb2.WriteFrame()
            frame.CopyFrom(first)
            frame.hash = lab.chain(1, f"w{index}")[0]
            await call.write(frame)
            held.append(call)
        await _reserved(lab, client, share)
        with pytest.raises(grpc.RpcError, match="are left for all others") as caught:
            await client.stub.Write(iter([first] * 20), timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = error_of(caught.value)
        assert isinstance(error, Overloaded)
        assert error.retry_after_s == 1.0
        assert error.reason == "quota"
        for call in held:
            call.cancel()

    in_lab(body)


def test_a_write_cancelled_while_it_reserves_leaves_nothing_reserved(
    in_lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, gate, ended = threading.Event(), threading.Event(), threading.Event()
    reserve = BlockStore.reserve

    def slow_reserve(*arguments: Any, **named: Any) -> Any:
        began.set()
        assert gate.wait(WAIT_S)
        try:
            return reserve(*arguments, **named)
        finally:
            ended.set()

    monkeypatch.setattr(BlockStore, "reserve", slow_reserve)

    async def body(lab: Any) -> None:
        running = await lab.daemon()
        client = lab.client(running)
        namespace_id = await client.namespace()
        call = client.stub.Write()
        await call.write(_frames(lab, namespace_id, lab.chain(1))[0])
        assert await asyncio.to_thread(began.wait, WAIT_S)
        call.cancel()
        streams = running.daemon._service._streams

        async def left() -> bool:
            return bool(streams.running == 0)

        await lab.until(left, "the cancelled call has given its place up")
        gate.set()
        assert await asyncio.to_thread(ended.wait, WAIT_S)  # it is reserved, for nobody
        await _reserved(lab, client, 0)
        hit = await client.lookup(namespace_id, lab.chain(1))
        assert hit.miss == store_pb2.MISS_REASON_ABSENT

    in_lab(body)


@pytest.mark.parametrize("iterated", [True, False])
def test_a_client_that_goes_on_sending_gets_the_refusal_and_no_internal_error(
    in_lab: Any, iterated: bool
) -> None:
    async def body(lab: Any) -> None:
        client = lab.client(await lab.daemon())
        data = bytes(FRAME)
        frame = store_pb2.WriteFrame(
            namespace_id=b"n" * 16, hash=b"h" * 32, data=data, checksum=xxh3_64(data)
        )

        async def send() -> None:
            if iterated:
                await client.stub.Write(iter([frame] * 48), timeout=WAIT_S)
                return
            call = client.stub.Write(timeout=WAIT_S)
            for _ in range(48):
                await call.write(frame)
            await call.done_writing()
            await call

        outcomes = await asyncio.gather(*(send() for _ in range(8)), return_exceptions=True)
        for outcome in outcomes:
            assert isinstance(outcome, grpc.RpcError)
            assert error_of(outcome).reason == "namespace", outcome

    in_lab(body)


def test_a_refused_client_that_never_ends_is_cut_off(in_lab: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(byte_streams, "REFUSED_BYTES_MAX", 4 * FRAME)

    async def body(lab: Any) -> None:
        client = lab.client(await lab.daemon())
        frame = store_pb2.WriteFrame(namespace_id=b"n" * 16, data=bytes(FRAME))
        call = client.stub.Write(timeout=WAIT_S)

        async def send_for_ever() -> None:
            while True:
                await call.write(frame)

        with pytest.raises((grpc.RpcError, asyncio.InvalidStateError)):
            await send_for_ever()

    in_lab(body)


def test_a_durable_write_of_a_block_that_another_writes_waits_for_its_seal(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        other, client = await lab.client(running).attach(), lab.client(running)
        namespace_id = await other.namespace()
        hashes = lab.chain(2)
        reserved = await other.reserve(namespace_id, hashes[:1])
        # Its child has to wait, too: a parent comes first.
        writing = asyncio.ensure_future(_write(client, _frames(lab, namespace_id, hashes)))
        await lab.until(_waiting(running), "the write waits")
        assert not writing.done()
        data, checksums = lab.content(hashes[0]), []
        for chunk in range(lab.layout.chunk_count):
            offset, nbytes = lab.layout.chunk_extent(chunk)
            checksums.append(xxh3_64(data[offset : offset + nbytes]))
            await other.put_chunk(reserved, 0, chunk, data)
        seal = store_pb2.SealRequest(
            reservation_id=reserved.reservation_id, checksum=checksums, session=other.session
        )
        await other.call("Seal", seal)
        written = await writing
        assert list(written.existed) == [True, False]
        assert set(written.status) == {store_pb2.SEAL_STATUS_SEALED}

    in_lab(body)


@pytest.mark.parametrize("gives_up", [True, False])
def test_a_write_of_a_block_that_another_never_seals_says_so(
    in_lab: Any, monkeypatch: pytest.MonkeyPatch, *, gives_up: bool
) -> None:
    monkeypatch.setattr(byte_streams, "PENDING_S_MAX", WAIT_S if gives_up else 0.1)
    monkeypatch.setattr(byte_streams, "PENDING_ASK_S", 0.05)

    async def body(lab: Any) -> None:
        running = await lab.daemon()
        other, client = await lab.client(running).attach(), lab.client(running)
        namespace_id = await other.namespace()
        hashes = lab.chain(1)
        reserved = await other.reserve(namespace_id, hashes)
        writing = asyncio.ensure_future(_write(client, _frames(lab, namespace_id, hashes)))
        if gives_up:
            await lab.until(_waiting(running), "the write waits")
            abandon = store_pb2.AbandonRequest(
                reservation_id=reserved.reservation_id, session=other.session
            )
            await other.call("Abandon", abandon)
        with pytest.raises(grpc.RpcError, match="somebody else, who") as caught:
            await writing
        assert error_of(caught.value).reason == "pending"
        assert ("gave it up" in str(caught.value)) is gives_up
        again = await other.reserve(namespace_id, hashes)
        expected = (
            store_pb2.RESERVE_STATUS_RESERVED if gives_up else store_pb2.RESERVE_STATUS_PENDING
        )
        assert list(again.status) == [expected]

    in_lab(body)


def test_a_block_that_is_twice_in_a_write_is_stored_once(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        client = lab.client(await lab.daemon())
        namespace_id = await client.namespace()
        frames = _frames(lab, namespace_id, lab.chain(1))
        written = await _write(client, frames * 2)
        assert list(written.existed) == [False, True]
        assert set(written.status) == {store_pb2.SEAL_STATUS_SEALED}

    in_lab(body)


def _waiting(running: Any) -> Callable[[], Awaitable[bool]]:
    """Whether a Write waits for news of a block."""

    async def waits() -> bool:
        return bool(running.daemon._service._block_events._waiting)

    return waits

"""Damage and shortage: a flipped byte on the medium, an arena that is full, hostile grants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from dualpath.kvstore.checksum import xxh3_64
from dualpath.kvstore.service.messages import grant_of
from dualpath.proto.v1 import common_pb2, store_pb2
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.region import RegionDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

WAIT_S = 20.0


def _flip_on_disk(data: Path, needle: bytes) -> None:
    """Flip one bit of the block that begins with these bytes."""
    for path in sorted(data.rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        at = content.find(needle)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at + 1000)
                file.write(bytes([content[at + 1000] ^ 4]))
            return
    raise AssertionError("the block is not on disk")


async def _damaged(lab: Any) -> tuple[Any, bytes, list[bytes]]:
    """A daemon that has just opened three blocks, of which the second has a flipped bit."""
    config = lab.config()
    running = await lab.daemon(config)
    client = await lab.client(running).attach()
    namespace_id = await client.namespace()
    hashes = lab.chain(3)
    await client.save(namespace_id, hashes)
    await running.daemon.stop()
    _flip_on_disk(Path(config.data), lab.content(hashes[1])[:64])
    running = await lab.daemon(config)
    return await lab.client(running).attach(), namespace_id, hashes


async def _prefix_ends_as_corrupt(client: Any, namespace_id: bytes, hashes: list[bytes]) -> None:
    hit = await client.lookup(namespace_id, hashes, lease_ms=0)
    assert hit.blocks == 1
    assert hit.miss == store_pb2.MISS_REASON_CORRUPT
    stats = await client.call("Stats", store_pb2.StatsRequest())
    assert stats.corrupt_blocks >= 1  # its descendants may be counted, too


def test_a_flipped_bit_on_the_medium_shows_in_the_checksum_and_ends_the_prefix(
    in_lab: Any,
) -> None:
    async def body(lab: Any) -> None:
        client, namespace_id, hashes = await _damaged(lab)
        hit = await client.lookup(namespace_id, hashes)
        chunks = lab.layout.chunk_count
        assert hit.blocks == 3
        checksums = np.frombuffer(hit.checksums, "<u8").tolist()
        async with client.deliver() as delivery:
            pairs = [(block, chunk) for block in range(3) for chunk in range(chunks)]
            grant = await delivery.grant(pairs, delivery.window(), lease_id=hit.lease_id)
            outcome = await delivery.outcome(grant)
            assert not outcome.failed
            wrong = []
            for block, chunk in pairs:
                offset, nbytes = lab.layout.chunk_extent(chunk)
                landed = delivery.block(block)[offset : offset + nbytes]
                if xxh3_64(landed) != checksums[block * chunks + chunk]:
                    wrong.append((block, chunk))
            assert wrong == [(1, 0)]

            async def report(block: int, chunk: int) -> bool:
                answer = await client.call(
                    "ReportCorrupt",
                    store_pb2.ReportCorruptRequest(
                        lease_id=hit.lease_id, block=block, chunk=chunk, session=client.session
                    ),
                )
                return bool(answer.dropped)

            assert not await report(0, 0)  # it is whole: a reader's own error
            assert await report(1, 0)
            again = await delivery.grant([(1, 0)], delivery.window(), lease_id=hit.lease_id)
            outcome = await delivery.outcome(again)
            assert set(outcome.failed.values()) == {common_pb2.CHUNK_FAILURE_CORRUPT}
        await _prefix_ends_as_corrupt(client, namespace_id, hashes)

    in_lab(body)


def test_a_read_stream_ends_before_a_flipped_bit(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        client, namespace_id, hashes = await _damaged(lab)
        request = store_pb2.ReadRequest(namespace_id=namespace_id, hash=hashes)
        got: list[tuple[int, int]] = []

        async def read() -> None:
            async for frame in client.stub.Read(request, timeout=WAIT_S):
                if frame.data:
                    got.append((frame.block, frame.offset_bytes))

        with pytest.raises(grpc.RpcError, match="block 1, chunk 0") as caught:
            await read()
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        assert {block for block, _ in got} == {0}
        await _prefix_ends_as_corrupt(client, namespace_id, hashes)

    in_lab(body)


def test_a_full_arena_reserves_what_fits_and_says_so(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        client = await lab.client(await lab.daemon(dram_bytes=8 << 20)).attach()
        namespace_id = await client.namespace()
        hashes = lab.chain(20)
        reserved = await client.reserve(namespace_id, hashes)
        statuses = list(reserved.status)
        fits = statuses.count(store_pb2.RESERVE_STATUS_RESERVED)
        assert 0 < fits < 20
        assert statuses[fits] == store_pb2.RESERVE_STATUS_FULL
        assert store_pb2.RESERVE_STATUS_RESERVED not in statuses[fits:]
        assert all(reserved.reservation_id[:fits])
        assert not any(reserved.reservation_id[fits:])
        await client.call(
            "Abandon",
            store_pb2.AbandonRequest(
                reservation_id=reserved.reservation_id[:fits], session=client.session
            ),
        )
        await client.save(namespace_id, hashes[:fits])

    in_lab(body)


_NUMBERS = st.integers(0, 2**32 - 1) | st.integers(0, 5)
_WIDE = st.integers(0, 2**64 - 1) | st.integers(0, 1 << 21)
_DESCRIPTORS = st.builds(
    lambda key, generation, offset, nbytes: RegionDescriptor(
        key, generation, offset, nbytes
    ).to_bytes(),
    _WIDE,
    _NUMBERS,
    _WIDE,
    _WIDE,
)


@settings(max_examples=300, deadline=None)
@given(
    st.builds(
        common_pb2.ChunkGrant,
        grant_id=_WIDE,
        window=_DESCRIPTORS | st.binary(max_size=40),
        lane=st.integers(0, 6),
        deadline_ms=_NUMBERS,
        block=st.lists(_NUMBERS, min_size=1, max_size=2),
        chunk=st.lists(_NUMBERS, min_size=1, max_size=2),
        tag=st.lists(_WIDE, min_size=1, max_size=2),
        target=st.builds(
            common_pb2.SliceTable,
            stride_bytes=_WIDE,
            count=_NUMBERS,
            length_bytes=_WIDE,
            base_bytes=st.lists(_WIDE, min_size=1, max_size=2),
            skip_bytes=st.lists(_WIDE, min_size=1, max_size=2),
            nbytes=st.lists(_NUMBERS, min_size=1, max_size=2),
        ),
    )
)
def test_any_grant_is_inside_its_window_or_refused(message: common_pb2.ChunkGrant) -> None:
    try:
        grant = grant_of(message, 1, now=0.0)
    except InvalidRequest:
        return
    window = grant.window
    assert grant.granted is not None
    assert len(grant.granted) == len(message.tag)
    for index in range(len(grant.granted)):
        target = grant.granted.targets.part(index)
        pieces = list(target.pieces())
        assert sum(nbytes for _, nbytes in pieces) == target.nbytes
        assert min(start for start, _ in pieces) >= window.offset
        assert max(start + nbytes for start, nbytes in pieces) <= window.offset + window.nbytes

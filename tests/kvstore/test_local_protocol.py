"""Messages of the local socket: what is packed is read back, and nothing else is ever accepted."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from dualpath.kvstore import local_protocol as protocol
from dualpath.kvstore import local_put
from dualpath.kvstore.local_frames import LocalFrames
from dualpath.kvstore.local_protocol import (
    ANSWER,
    HEADER,
    BlockSizes,
    Hello,
    Kind,
    LookupRequest,
    MalformedMessage,
    Parts,
    Welcome,
)
from dualpath.kvstore.store_api import (
    MappedPrefix,
    MissReason,
    PrefixHit,
    ReserveStatus,
    SealStatus,
)
from dualpath.transfer.errors import (
    Corrupt,
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    LeaseExpired,
    Overloaded,
    PeerLost,
    PermissionDenied,
    Unavailable,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SPACE = b"n" * 16
READERS: tuple[Callable[[memoryview], object], ...] = (
    Hello.of,
    Welcome.of,
    LookupRequest.of,
    protocol.hit_of,
    protocol.mapped_of,
    protocol.renew_of,
    protocol.release_of,
    protocol.fetch_of,
    protocol.fetched_of,
    protocol.chunk_of,
    protocol.error_of,
    local_put.PutRequest.of,
    local_put.number_of,
    local_put.statuses_of,
)


def body(parts: Parts) -> memoryview:
    return memoryview(b"".join(parts))


def hit(blocks: int, chunks: int, seed: int, detail: str, miss: MissReason) -> PrefixHit:
    rng = np.random.default_rng(seed)
    return PrefixHit(
        blocks,
        int(rng.integers(1, 1 << 63)) if blocks else 0,
        int(rng.integers(0, 600_000)) / 1000,
        rng.integers(0, 2, blocks).astype(np.uint8),
        rng.integers(0, 1 << 63, (blocks, chunks)).astype(np.uint64),
        miss,
        detail,
    )


hits = st.builds(
    hit,
    st.integers(0, 40),
    st.integers(1, 64),
    st.integers(0, 1 << 30),
    st.text(max_size=60),
    st.sampled_from(MissReason),
)


def same(one: PrefixHit, other: PrefixHit) -> None:
    assert (one.blocks, one.lease_id, one.miss, one.detail) == (
        other.blocks,
        other.lease_id,
        other.miss,
        other.detail,
    )
    assert one.lease_s == pytest.approx(other.lease_s, abs=1e-3)
    assert np.array_equal(one.tiers, other.tiers)
    assert np.array_equal(one.checksums, other.checksums)


@given(hits, st.booleans())
def test_hits_come_back(found: PrefixHit, checksums: bool) -> None:
    sizes = BlockSizes(300_000, 262_144)
    back, came = protocol.hit_of(body(protocol.hit_parts(found, sizes, checksums=checksums)))
    assert came == sizes
    if not checksums:
        assert back.checksums.shape == (found.blocks, 0)
        back = replace(back, checksums=found.checksums)
    same(back, found)


@given(hits, st.integers(-1, 1 << 62))
def test_mapped_prefixes_come_back(found: PrefixHit, guard: int) -> None:
    blocks = found.blocks if found.lease_id else 0
    offsets = np.arange(-1, blocks - 1, dtype=np.int64) * 4096
    mapped = MappedPrefix(found, offsets, 4096, guard)
    back, sizes = protocol.mapped_of(body(protocol.mapped_parts(mapped, 1024, checksums=True)))
    same(back.hit, found)
    assert np.array_equal(back.offsets, offsets)
    assert (back.nbytes, back.guard, sizes.chunk_bytes) == (4096, guard, 1024)


@given(st.integers(0, 300), st.integers(16, 32), st.integers(0, 1 << 31), st.booleans())
def test_lookup_requests_come_back(count: int, size: int, lease_ms: int, checksums: bool) -> None:
    request = LookupRequest(SPACE, size, bytes(range(256)) * (count * size // 256 + 1), 0, True)
    request = LookupRequest(SPACE, size, request.hashes[: count * size], lease_ms, checksums)
    back = LookupRequest.of(body(request.parts()))
    assert (back.namespace_id, back.hash_bytes, back.lease_ms, back.checksums) == (
        SPACE,
        size,
        lease_ms,
        checksums,
    )
    assert bytes(back.hashes) == request.hashes


def test_the_small_messages_come_back() -> None:
    assert Hello.of(body(Hello(1, 2, b"secret").parts())) == Hello(1, 2, b"secret")
    assert Welcome.of(body(Welcome(1, 1 << 40, "why").parts())) == Welcome(1, 1 << 40, "why")
    assert protocol.renew_of(body(protocol.renew_parts(7, 1000))) == (7, 1000)
    assert protocol.release_of(body(protocol.release_parts([1, 1 << 63]))) == [1, 1 << 63]
    assert protocol.chunk_of(body(protocol.chunk_parts(1, 2, 3))) == (1, 2, 3)
    blocks, chunks = np.array([1, 2], np.int32), np.array([3, 4], np.int32)
    lease, back_blocks, back_chunks = protocol.fetch_of(
        body(protocol.fetch_parts(9, blocks, chunks))
    )
    assert (lease, back_blocks.tolist(), back_chunks.tolist()) == (9, [1, 2], [3, 4])
    offsets, status = protocol.fetched_of(
        body(protocol.fetched_parts(np.array([-1, 8]), np.array([2, 0], np.uint8)))
    )
    assert (offsets.tolist(), status.tolist()) == ([-1, 8], [2, 0])


def test_the_messages_of_a_put_come_back() -> None:
    assert local_put.number_of(body(local_put.number_parts(1 << 63))) == 1 << 63
    statuses = (SealStatus.SEALED, ReserveStatus.QUOTA, ReserveStatus.EXISTS)
    assert local_put.statuses_of(body(local_put.statuses_parts(statuses))) == statuses
    request = local_put.PutRequest(
        bytes(range(16)),
        16,
        7,
        4096,
        True,
        np.array([8192, 0]),
        b"a" * 16 + b"b" * 16,
        bytes(16) + b"a" * 16,
        np.array([1, 0], np.uint8),
    )
    back = local_put.PutRequest.of(body(request.parts()))
    assert back[:5] == request[:5]
    assert back.offsets.tolist() == [8192, 0]
    assert back.hash_list == [b"a" * 16, b"b" * 16]
    assert back.parent_list == [b"", b"a" * 16]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("a", reason="namespace"),
        PermissionDenied("b", reason="rights"),
        Unavailable("c", reason="draining"),
        DeadlineExceeded("d"),
        LeaseExpired("e"),
        Corrupt("f"),
        DualPathError("g"),
    ],
)
def test_errors_come_back_as_themselves(error: DualPathError) -> None:
    back = protocol.error_of(body(protocol.error_parts(error)))
    assert (type(back), str(back), back.reason) == (type(error), str(error), error.reason)


def test_an_overload_says_when_and_a_subclass_comes_as_its_base() -> None:
    back = protocol.error_of(body(protocol.error_parts(Overloaded("full", retry_after_s=0.25))))
    assert isinstance(back, Overloaded)
    assert back.retry_after_s == 0.25
    back = protocol.error_of(body(protocol.error_parts(PeerLost("gone"))))
    assert (type(back), back.reason) == (Unavailable, "peer_lost")


def test_foreign_exceptions_show_their_class_only() -> None:
    back = protocol.error_of(body(protocol.error_parts(RuntimeError("a secret"))))
    assert "secret" not in str(back)
    assert "RuntimeError" in str(back)


def test_versions_meet_at_the_newest_that_both_speak() -> None:
    assert Hello(1, 9, b"").version == protocol.VERSION
    with pytest.raises(InvalidRequest, match="update the older") as refused:
        _ = Hello(protocol.VERSION + 1, protocol.VERSION + 3, b"").version
    assert refused.value.reason == "version"


@given(st.binary(max_size=300))
@settings(max_examples=400)
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for reader in READERS:
        with contextlib.suppress(MalformedMessage):
            reader(memoryview(data))


@given(hits, st.data())
def test_damaged_answers_are_read_or_refused(found: PrefixHit, data: st.DataObject) -> None:
    mapped = MappedPrefix(found, np.zeros(found.blocks if found.lease_id else 0, np.int64), 1, 0)
    raw = bytearray(body(protocol.mapped_parts(mapped, 1, checksums=True)))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for reader in READERS:
        with contextlib.suppress(MalformedMessage):
            reader(memoryview(raw)[:cut])


@pytest.fixture
def pair() -> Iterator[tuple[LocalFrames, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    frames = LocalFrames(ours, message_s=0.2)
    yield frames, theirs
    frames.close()
    theirs.close()


def test_messages_that_come_in_pieces_or_together_are_told_apart(
    pair: tuple[LocalFrames, socket.socket],
) -> None:
    frames, peer = pair
    raw = HEADER.pack(3, 7, 0, 1) + b"abc" + HEADER.pack(0, 8, 0, 2) + HEADER.pack(2, 9, 0, 3)

    def send() -> None:
        for part in (*(raw[i : i + 5] for i in range(0, len(raw), 5)), b"xy"):
            peer.sendall(part)

    sender = threading.Thread(target=send)
    sender.start()
    for expected in ((7, 1, b"abc"), (8, 2, b""), (9, 3, b"xy")):
        came = frames.receive(100)
        assert came is not None
        assert (came[0], came[1], bytes(came[2])) == expected
        frames.consume(came[2])
    sender.join()
    peer.close()
    assert frames.receive(100) is None


def test_large_messages_go_through_both_ways(pair: tuple[LocalFrames, socket.socket]) -> None:
    frames, peer = pair
    other = LocalFrames(peer, message_s=5)
    payload = bytes(range(256)) * 12_000

    def echo() -> None:
        came = other.receive(1 << 24)
        assert came is not None
        copy = bytes(came[2])
        other.consume(came[2])
        other.send(came[0] | ANSWER, came[1], [copy[:1000], copy[1000:]])

    thread = threading.Thread(target=echo)
    thread.start()
    frames.send(Kind.PING, 5, [payload])
    came = frames.receive(1 << 24, idle_s=5)
    thread.join()
    assert came is not None
    assert bytes(came[2]) == payload
    frames.consume(came[2])


def test_who_stalls_within_a_message_runs_out_of_time(
    pair: tuple[LocalFrames, socket.socket],
) -> None:
    frames, peer = pair
    peer.sendall(HEADER.pack(100, 1, 0, 1) + b"only a part")
    with pytest.raises(DeadlineExceeded, match="no whole message"):
        frames.receive(1000)


def test_who_does_not_read_runs_out_of_time(pair: tuple[LocalFrames, socket.socket]) -> None:
    frames, _ = pair
    with pytest.raises(DeadlineExceeded, match="not taken"):
        frames.send(1, 1, [bytes(8 << 20)])


def test_silence_is_bounded_where_it_must_be(pair: tuple[LocalFrames, socket.socket]) -> None:
    with pytest.raises(DeadlineExceeded, match="no message came"):
        pair[0].receive(100, idle_s=0.05)


def test_oversized_and_odd_headers_are_refused(pair: tuple[LocalFrames, socket.socket]) -> None:
    frames, peer = pair
    peer.sendall(HEADER.pack(101, 1, 0, 1))
    with pytest.raises(MalformedMessage, match="101 bytes"):
        frames.receive(100)


def test_a_peer_that_closes_within_a_message_is_lost(
    pair: tuple[LocalFrames, socket.socket],
) -> None:
    frames, peer = pair
    peer.sendall(HEADER.pack(10, 1, 0, 1) + b"123")
    peer.close()
    with pytest.raises(PeerLost):
        frames.receive(100)

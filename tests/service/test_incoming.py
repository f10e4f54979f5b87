"""Incoming blocks under contention: nothing that was fenced ever shows in a sealed block."""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from dualpath.kvstore import checksum
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.service.incoming import IncomingBlocks, ReservedBlock
from dualpath.kvstore.store_api import NewBlock, ReserveStatus, SealStatus
from dualpath.kvstore.store_config import StoreConfig
from dualpath.transfer.errors import InvalidRequest, PeerLost
from dualpath.transfer.lane import Lane
from dualpath.transfer.memory_transport import MemoryHub, MemoryTransport
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import Completion, Write, WriteStatus

LAYOUT = KVLayout(layers=3, block_tokens=16, layer_bytes=100_000, dtype="bf16")
"""Two chunks a block."""
WAIT_S = 20.0


def _hash(name: object) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()


def _content(block_hash: bytes) -> bytes:
    return (block_hash * (LAYOUT.block_bytes // len(block_hash) + 1))[: LAYOUT.block_bytes]


class _Writer:
    """One attachment and its peer, joined by the memory transport."""

    def __init__(self, store: BlockStore, name: str) -> None:
        hub = MemoryHub()
        self.server = MemoryTransport("daemon", lambda *_: None, hub)
        self.client = MemoryTransport(name, lambda *_: None, hub)
        self.server.listen("here")
        self.client.connect("daemon", "here", self.server.invite(name), deadline_s=WAIT_S)
        self.incoming = IncomingBlocks(store, self.server, name)
        self.namespace_id = store.open_namespace(Namespace("m", LAYOUT))
        self.source = Region.anonymous(LAYOUT.slot_bytes)

    def reserve(self, *hashes: bytes, ttl_s: float = 60.0, now: float = 0.0) -> list[ReservedBlock]:
        blocks = [NewBlock(each, b"") for each in hashes]
        return self.incoming.reserve(self.namespace_id, blocks, ttl_s=ttl_s, now=now)

    def put(self, block: ReservedBlock, data: bytes, chunk: int) -> WriteStatus:
        """Write one chunk and wait for its end."""
        offset, nbytes = LAYOUT.chunk_extent(chunk)
        self.source.view[offset : offset + nbytes] = data[offset : offset + nbytes]
        ended = threading.Event()
        status: list[WriteStatus] = []

        def done(completion: Completion) -> None:
            status.append(completion.status)
            ended.set()

        write = Write(
            self.source,
            Slices.contiguous(offset, nbytes),
            RegionDescriptor.from_bytes(self.incoming.window),
            Slices.contiguous(block.base + offset, nbytes),
            Lane.SAVE,
            block.first_tag + chunk,
            WAIT_S,
        )
        self.client.write("daemon", write, done)
        assert ended.wait(WAIT_S)
        return status[0]

    def put_all(self, block: ReservedBlock, data: bytes) -> set[WriteStatus]:
        return {self.put(block, data, chunk) for chunk in range(LAYOUT.chunk_count)}

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def store(tmp_path: Path) -> Any:
    config = StoreConfig(disk_bytes=64 << 20, dram_bytes=16 << 20, segment_bytes=16 << 20)
    with BlockStore.open(tmp_path / "s", config) as opened:
        yield opened


def test_expiry_fences_before_the_slot_is_used_again(store: BlockStore) -> None:
    writer = _Writer(store, "w")
    (first,) = writer.reserve(_hash(1), ttl_s=5.0, now=100.0)
    assert not writer.incoming.overdue(104.9)
    assert writer.incoming.expire(104.9) == 0
    assert writer.incoming.overdue(105.0)
    assert writer.incoming.expire(105.0) == 1
    assert not writer.incoming.overdue(1e9)
    assert store.stats().reservations == 0
    assert writer.put(first, bytes(LAYOUT.block_bytes), 0) is WriteStatus.REFUSED
    assert writer.incoming.seal([first.reservation_id], [], durable=False) == [SealStatus.EXPIRED]
    writer.close()


def test_what_the_store_lets_expire_is_fenced_by_its_call(store: BlockStore) -> None:
    writer = _Writer(store, "w")
    first, second = writer.reserve(_hash(1), _hash(2))
    writer.incoming.fence_expired([first.reservation_id, 12345])
    assert writer.put(first, bytes(LAYOUT.block_bytes), 0) is WriteStatus.REFUSED
    assert writer.put(second, _content(_hash(2)), 0) is WriteStatus.DONE
    writer.close()


@pytest.mark.parametrize("ending", ["abandon", "expire", "close"])
def test_the_store_waits_for_a_fence_that_is_under_way(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    writer = _Writer(store, "w")
    (block,) = writer.reserve(_hash(1), ttl_s=5.0, now=100.0)
    began, gate = threading.Event(), threading.Event()
    call = "revoke" if ending == "close" else "disarm"
    fence = getattr(writer.server, call)

    def slow_fence(*arguments: Any) -> Any:
        if not began.is_set():
            began.set()
            assert gate.wait(WAIT_S)
        return fence(*arguments)

    monkeypatch.setattr(writer.server, call, slow_fence)
    end = {
        "abandon": lambda: writer.incoming.abandon([block.reservation_id]),
        "expire": lambda: writer.incoming.expire(105.0),
        "close": writer.incoming.close,
    }[ending]
    ends = threading.Thread(target=end, daemon=True)
    ends.start()
    assert began.wait(WAIT_S)
    writer.incoming.fence_expired([block.reservation_id])
    late = writer.put(block, _content(_hash(1)), 0)
    gate.set()
    ends.join(WAIT_S)
    assert late is WriteStatus.REFUSED
    assert not bytes(store.arena.view[block.base : block.base + 1000]).strip(b"\0"), "it landed"
    assert store.stats().reservations == 0
    writer.close()


def test_a_lost_attachment_can_neither_write_nor_reserve(store: BlockStore) -> None:
    writer = _Writer(store, "w")
    (block,) = writer.reserve(_hash(1))
    window = writer.incoming.window
    writer.incoming.close()
    writer.incoming._window = RegionDescriptor.from_bytes(window)  # what the client still holds
    assert writer.put_all(block, _content(_hash(1))) == {WriteStatus.REFUSED}
    with pytest.raises(PeerLost):
        writer.reserve(_hash(2))
    assert store.stats().reservations == 0
    writer.close()


def test_checksums_are_counted_by_chunk(store: BlockStore) -> None:
    writer = _Writer(store, "w")
    (block,) = writer.reserve(_hash(1))
    assert writer.put_all(block, _content(_hash(1))) == {WriteStatus.DONE}
    with pytest.raises(InvalidRequest, match="3 given, the blocks have 2 chunks"):
        writer.incoming.seal([block.reservation_id], [1, 2, 3], durable=False)
    gone_and_here = [99, block.reservation_id]
    statuses = writer.incoming.seal(gone_and_here, [0, 0, 5, 6], durable=False)
    assert statuses == [SealStatus.EXPIRED, SealStatus.CORRUPT]
    writer.close()


def test_blocks_that_are_reserved_together_have_consecutive_tags(store: BlockStore) -> None:
    writer = _Writer(store, "w")
    blocks = writer.reserve(_hash(1), _hash(2)) + writer.reserve(_hash(3))
    tags = [block.first_tag + chunk for block in blocks for chunk in range(LAYOUT.chunk_count)]
    assert tags == list(range(tags[0], tags[0] + len(tags)))
    writer.close()


def test_digests_that_the_transport_made_seal_only_what_they_were_made_of(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = _Writer(store, "w")
    intact, other = writer.reserve(_hash(1), _hash(2))
    content, count = _content(_hash(1)), LAYOUT.chunk_count
    sums = checksum.of_block(content, LAYOUT)
    for block in (intact, other):
        store.arena.view[block.base : block.base + len(content)] = content
        tags = range(block.first_tag, block.first_tag + count)
        assert writer.incoming._hashed(tags, sums) == [True] * count
        assert writer.incoming._hashed(tags, sums) == [False] * count
    assert writer.incoming._hashed([12345], [1]) == [False]
    hashed: list[int] = []
    made = checksum.of_block

    def counted(view: memoryview, layout: KVLayout) -> tuple[int, ...]:
        hashed.append(1)
        return made(view, layout)

    monkeypatch.setattr(checksum, "of_block", counted)
    wrong = (sums[0], sums[1] ^ 1)
    ids = [intact.reservation_id, other.reservation_id]
    statuses = writer.incoming.seal(ids, [*sums, *wrong], durable=False)
    assert statuses == [SealStatus.SEALED, SealStatus.CORRUPT]
    assert len(hashed) == 1, "what differs is hashed by the store, what agrees is not"
    writer.close()


def test_writers_that_contend_abandon_and_write_too_late_leave_only_whole_blocks(
    store: BlockStore,
) -> None:
    names = [_hash(number) for number in range(40)]
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        writer = _Writer(store, f"w{seed}")
        garbage = chance.randbytes(LAYOUT.block_bytes)
        stale: list[ReservedBlock] = []
        try:
            for now in range(60):
                block_hash = chance.choice(names)
                (block,) = writer.reserve(block_hash, ttl_s=chance.choice([1, 60]), now=now)
                for old in stale[-3:]:
                    assert writer.put_all(old, garbage) == {WriteStatus.REFUSED}
                writer.incoming.expire(now)
                if block.status is not ReserveStatus.RESERVED:
                    continue
                stale.append(block)
                if chance.random() < 0.4:
                    writer.put(block, garbage, 0)
                    writer.incoming.abandon([block.reservation_id])
                    continue
                assert writer.put_all(block, _content(block_hash)) == {WriteStatus.DONE}
                sealed = writer.incoming.seal([block.reservation_id], [], durable=False)
                assert sealed == [SealStatus.SEALED]
        except BaseException as error:  # noqa: BLE001 - shown by the test itself
            failures.append(error)
        finally:
            writer.incoming.close()
            writer.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    namespace_id = Namespace("m", LAYOUT).id
    found = 0
    for block_hash in names:
        for data in store.get(namespace_id, [block_hash]):
            assert data == _content(block_hash)
            found += 1
    assert found > 10
    assert store.stats().reservations == 0

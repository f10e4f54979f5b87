"""The embedded store keeps the contract of the `Store` port."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from dualpath.kvstore import checksum, embedded
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import (
    TIERS,
    MissReason,
    NewBlock,
    PrefixHit,
    ReserveStatus,
    SealRequest,
    SealStatus,
    Store,
    Tier,
)
from dualpath.transfer.errors import (
    InvalidRequest,
    LeaseExpired,
    Overloaded,
    PermissionDenied,
    Unavailable,
)

Content = Callable[[bytes, int], bytes]
SMALL = StoreConfig(
    disk_bytes=16 << 20, dram_bytes=8 << 20, segment_bytes=4 << 20, reserve_wait_s=0.2
)
OWNER = "test"


class Clock:
    """Seconds that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[BlockStore]:
    with BlockStore.open(tmp_path / "data", SMALL, clock=clock) as opened:
        yield opened


def chain(blocks: int, first_token: int = 0) -> list[bytes]:
    return chain_hashes(range(first_token, first_token + 16 * blocks), 16)


def put(
    store: Store, space: bytes, hashes: list[bytes], content: Content, durable: bool = True
) -> list[object]:
    nbytes = store.layout(space).block_bytes
    assert isinstance(store, BlockStore)
    data = [content(h, nbytes) for h in hashes]
    return list(store.put(space, hashes, parents_of(hashes), data, durable=durable))


def tiers_of(hit: PrefixHit) -> list[Tier]:
    return [TIERS[code] for code in hit.tiers.tolist()]


@pytest.mark.parametrize("durable", [True, False])
def test_what_was_put_is_got_back(
    store: BlockStore, namespace: Namespace, content: Content, durable: bool
) -> None:
    space = store.open_namespace(namespace)
    hashes = chain(10)
    assert put(store, space, hashes, content, durable) == [SealStatus.SEALED] * 10
    assert store.get(space, hashes) == [content(h, 300_000) for h in hashes]
    assert store.get(space, [*hashes, b"x" * 32]) == [content(h, 300_000) for h in hashes]
    assert put(store, space, hashes, content) == [ReserveStatus.EXISTS] * 10


def test_lookup_tells_prefix_tiers_checksums_and_lease(
    store: BlockStore, namespace: Namespace, content: Content
) -> None:
    space = store.open_namespace(namespace)
    hashes = chain(4)
    put(store, space, hashes[:3], content)
    hit = store.lookup(space, hashes, owner=OWNER, lease_s=10)
    assert (hit.blocks, hit.miss, hit.lease_s) == (3, MissReason.ABSENT, 10)
    assert tiers_of(hit) == [Tier.DRAM] * 3
    layout = store.layout(space)
    assert [tuple(block) for block in hit.checksums.tolist()] == [
        checksum.of_block(content(h, 300_000), layout) for h in hashes[:3]
    ]
    with store.fetch(hit.lease_id, 1, 1) as chunk:
        view = chunk.region.view[chunk.slices.start : chunk.slices.end]
        offset, nbytes = layout.chunk_extent(1)
        assert view == content(hashes[1], 300_000)[offset : offset + nbytes]
        view.release()
    store.release(hit.lease_id, owner=OWNER)
    store.release(hit.lease_id, owner=OWNER)
    with pytest.raises(LeaseExpired):
        store.fetch(hit.lease_id, 0, 0)


def test_a_lookup_without_a_lease_has_none(
    store: BlockStore, namespace: Namespace, content: Content
) -> None:
    space = store.open_namespace(namespace)
    put(store, space, chain(1), content)
    hit = store.lookup(space, chain(1), owner=OWNER, lease_s=0)
    assert (hit.blocks, hit.lease_id, hit.miss) == (1, 0, MissReason.NONE)
    assert store.lookup(space, [], owner=OWNER, lease_s=1).blocks == 0
    assert store.stats().leases == 0


def test_blocks_that_are_no_chain_end_the_prefix(
    store: BlockStore, namespace: Namespace, content: Content
) -> None:
    space = store.open_namespace(namespace)
    one, other = chain(3), chain(3, first_token=5000)
    put(store, space, one, content)
    put(store, space, other, content)
    hit = store.lookup(space, [one[0], one[1], other[2]], owner=OWNER, lease_s=0)
    assert (hit.blocks, hit.miss) == (2, MissReason.ABSENT)
    assert "not as a child" in hit.detail
    assert store.lookup(space, [one[0], one[0]], owner=OWNER, lease_s=0).blocks == 1


def test_a_reserved_block_is_pending_and_belongs_to_the_first_writer(
    store: BlockStore, namespace: Namespace
) -> None:
    space = store.open_namespace(namespace)
    hashes = chain(2)
    first = NewBlock(hashes[0], b"")
    (mine,) = store.reserve(space, [first], owner="a", ttl_s=10)
    assert mine.status is ReserveStatus.RESERVED
    (theirs,) = store.reserve(space, [first], owner="b", ttl_s=10)
    assert theirs.status is ReserveStatus.PENDING
    hit = store.lookup(space, hashes, owner="b", lease_s=1)
    assert (hit.blocks, hit.miss) == (0, MissReason.PENDING)
    (child,) = store.reserve(space, [NewBlock(hashes[1], hashes[0])], owner="b", ttl_s=10)
    assert child.status is ReserveStatus.NO_PARENT
    (child,) = store.reserve(space, [NewBlock(hashes[1], hashes[0])], owner="a", ttl_s=10)
    assert child.status is ReserveStatus.RESERVED
    with pytest.raises(PermissionDenied):
        store.seal([SealRequest(mine.reservation_id)], owner="b", durable=True)
    store.abandon([mine.reservation_id], owner="a")
    assert store.lookup(space, hashes, owner="b", lease_s=1).miss is MissReason.ABSENT
    (status,) = store.seal([SealRequest(child.reservation_id)], owner="a", durable=True)
    assert status is SealStatus.EXPIRED
    assert store.stats().reservations == 0


def test_parents_are_sealed_first_and_a_child_may_try_again(
    store: BlockStore, namespace: Namespace
) -> None:
    space = store.open_namespace(namespace)
    a, b = chain(2)
    parent, child = store.reserve(space, [NewBlock(a, b""), NewBlock(b, a)], owner="o", ttl_s=10)
    requests = [SealRequest(parent.reservation_id), SealRequest(child.reservation_id)]
    assert store.seal(requests[1:], owner="o", durable=True) == (SealStatus.EXPIRED,)
    assert store.seal(requests[:1], owner="o", durable=False) == (SealStatus.SEALED,)
    assert store.seal(requests[1:], owner="o", durable=True) == (SealStatus.SEALED,)
    assert store.seal(requests, owner="o", durable=True) == (SealStatus.EXPIRED,) * 2


def test_a_whole_chain_seals_in_one_batch(store: BlockStore, namespace: Namespace) -> None:
    space = store.open_namespace(namespace)
    hashes = chain(6)
    blocks = [NewBlock(h, p) for h, p in zip(hashes, parents_of(hashes), strict=True)]
    held = store.reserve(space, blocks, owner="o", ttl_s=10)
    requests = [SealRequest(r.reservation_id) for r in held]
    assert set(store.seal(requests, owner="o", durable=True)) == {SealStatus.SEALED}
    assert store.lookup(space, hashes, owner="o", lease_s=0).blocks == 6


def test_wrong_checksums_of_the_writer_store_nothing(
    store: BlockStore, namespace: Namespace, content: Content
) -> None:
    space = store.open_namespace(namespace)
    (h,) = chain(1)
    (held,) = store.reserve(space, [NewBlock(h, b"")], owner="o", ttl_s=10)
    with pytest.raises(InvalidRequest, match="has 2 chunks, 1 checksums"):
        store.seal([SealRequest(held.reservation_id, (1,))], owner="o", durable=True)
    request = SealRequest(held.reservation_id, (1, 2))
    assert store.seal([request], owner="o", durable=True) == (SealStatus.CORRUPT,)
    assert store.lookup(space, [h], owner="o", lease_s=0).blocks == 0
    used = store.stats().used_bytes
    assert set(used.values()) == {0}
    assert put(store, space, [h], content) == [SealStatus.SEALED]


def test_an_expired_reservation_frees_its_block_after_the_fence(
    store: BlockStore, namespace: Namespace, clock: Clock
) -> None:
    fenced: list[int] = []
    done = threading.Event()

    def fence(ids: tuple[int, ...]) -> None:
        fenced.extend(ids)
        done.set()

    store.set_on_expired(fence)
    space = store.open_namespace(namespace)
    block = NewBlock(chain(1)[0], b"")
    (old,) = store.reserve(space, [block], owner="a", ttl_s=5)
    clock.now += 6
    (new,) = store.reserve(space, [block], owner="b", ttl_s=5)
    assert new.status is ReserveStatus.RESERVED
    assert done.wait(10)
    assert fenced == [old.reservation_id]
    assert store.seal([SealRequest(old.reservation_id)], owner="a", durable=True) == (
        SealStatus.EXPIRED,
    )
    assert store.seal([SealRequest(new.reservation_id)], owner="b", durable=True) == (
        SealStatus.SEALED,
    )


def test_leases_expire_renew_and_end_with_their_owner(
    store: BlockStore, namespace: Namespace, content: Content, clock: Clock
) -> None:
    space = store.open_namespace(namespace)
    put(store, space, chain(1), content)
    hit = store.lookup(space, chain(1), owner="a", lease_s=5)
    clock.now += 4
    store.renew(hit.lease_id, owner="a", lease_s=5)
    clock.now += 4
    store.fetch(hit.lease_id, 0, 0).release()
    with pytest.raises(PermissionDenied):
        store.release(hit.lease_id, owner="b")
    clock.now += 2
    with pytest.raises(LeaseExpired):
        store.fetch(hit.lease_id, 0, 0)
    store.lookup(space, chain(1), owner="a", lease_s=5)
    store.reserve(space, [NewBlock(chain(2)[1], chain(1)[0])], owner="a", ttl_s=5)
    store.forget_owner("a")
    stats = store.stats()
    assert (stats.leases, stats.reservations) == (0, 0)


def test_a_full_store_evicts_the_leaves_that_were_used_least_recently(
    store: BlockStore, namespace: Namespace, content: Content
) -> None:
    space = store.open_namespace(namespace)
    chains = [chain(6, first_token=10_000 * i) for i in range(12)]
    for hashes in chains:
        assert set(put(store, space, hashes, content)) == {SealStatus.SEALED}
        store.lookup(space, chains[0], owner="o", lease_s=0)
    lengths = [store.lookup(space, c, owner="o", lease_s=0).blocks for c in chains]
    assert lengths[0] == lengths[-1] == 6
    assert lengths[1] == 0
    assert store.lookup(space, chains[1], owner="o", lease_s=0).miss is MissReason.EVICTED
    assert store.stats().evicted_blocks[Tier.SSD] > 0
    for hashes, length in zip(chains, lengths, strict=True):
        assert store.get(space, hashes) == [content(h, 300_000) for h in hashes[:length]]


def test_a_leased_prefix_is_never_evicted_and_a_store_of_leases_is_full(
    store: BlockStore, namespace: Namespace, content: Content
) -> None:
    space = store.open_namespace(namespace)
    leases = []
    for i in range(30):
        hashes = chain(4, first_token=10_000 * i)
        statuses = put(store, space, hashes, content)
        leases.append((store.lookup(space, hashes, owner="o", lease_s=100), hashes))
        if ReserveStatus.FULL in statuses:
            break
    assert ReserveStatus.FULL in statuses
    assert store.stats().evicted_blocks[Tier.SSD] == 0
    for hit, hashes in leases:
        assert store.get(space, hashes) == [content(h, 300_000) for h in hashes[: hit.blocks]]
    hit, _ = leases[0]
    store.release(hit.lease_id, owner="o")
    assert set(put(store, space, chain(3, first_token=990_000), content)) == {SealStatus.SEALED}


def test_a_fetched_chunk_keeps_its_bytes_whatever_happens_to_the_block(
    store: BlockStore, namespace: Namespace, content: Content
) -> None:
    space = store.open_namespace(namespace)
    (h,) = chain(1)
    put(store, space, [h], content)
    hit = store.lookup(space, [h], owner="o", lease_s=100)
    fetched = store.fetch(hit.lease_id, 0, 0)
    store.release(hit.lease_id, owner="o")
    for i in range(1, 20):
        put(store, space, chain(4, first_token=10_000 * i), content)
    view = fetched.region.view[fetched.slices.start : fetched.slices.end]
    assert view == content(h, 300_000)[: view.nbytes]
    view.release()
    fetched.release()
    fetched.release()


def test_read_buffers_are_bounded_and_come_back(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    config = replace(SMALL, promote=False, read_buffers_bytes=1 << 20, read_buffer_wait_s=0.05)
    with BlockStore.open(tmp_path, config) as store:
        space = store.open_namespace(namespace)
        hashes = chain(40)
        put(store, space, hashes, content)
        hit = store.lookup(space, hashes, owner="o", lease_s=100)
        on_ssd = [i for i, tier in enumerate(tiers_of(hit)) if tier is Tier.SSD]
        assert len(on_ssd) > 8
        fetched = [store.fetch(hit.lease_id, i, 0) for i in on_ssd[:4]]
        with pytest.raises(Overloaded, match="no read buffer") as refused:
            store.fetch(hit.lease_id, on_ssd[4], 0)
        assert refused.value.retry_after_s > 0
        fetched.pop().release()
        store.fetch(hit.lease_id, on_ssd[4], 0).release()
        for chunk in fetched:
            chunk.release()


def test_what_is_read_from_ssd_is_promoted(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    with BlockStore.open(tmp_path, SMALL) as store:
        put(store, store.open_namespace(namespace), chain(5), content)
    with BlockStore.open(tmp_path, SMALL) as store:
        space = namespace.id
        assert tiers_of(store.lookup(space, chain(5), owner="o", lease_s=0)) == [Tier.SSD] * 5
        assert len(store.get(space, chain(5))) == 5
        assert tiers_of(store.lookup(space, chain(5), owner="o", lease_s=0)) == [Tier.DRAM] * 5
        read = store.stats().read_bytes
        assert read[Tier.SSD] == 5 * 300_000
        assert read[Tier.DRAM] == 0


def test_misses_name_how_the_namespace_differs(
    store: BlockStore, namespace: Namespace, content: Content
) -> None:
    salted = store.open_namespace(replace(namespace, salt="s"))
    empty = store.lookup(salted, chain(1), owner="o", lease_s=0)
    assert (empty.miss, empty.detail) == (MissReason.ABSENT, "")
    put(store, store.open_namespace(namespace), chain(1), content)
    hit = store.lookup(salted, chain(1), owner="o", lease_s=0)
    assert hit.miss is MissReason.NAMESPACE
    assert "differs in: salt" in hit.detail
    other = store.open_namespace(replace(namespace, tenant="t", model="x"))
    foreign = store.lookup(other, chain(1), owner="o", lease_s=0)
    assert foreign.miss is MissReason.NAMESPACE
    assert "model" not in foreign.detail
    assert store.stats().misses[MissReason.NAMESPACE] == 2


def test_bad_requests_name_the_value(store: BlockStore, namespace: Namespace) -> None:
    space = store.open_namespace(namespace)
    with pytest.raises(InvalidRequest, match="never opened") as unknown:
        store.lookup(b"?" * 16, [], owner="o", lease_s=0)
    assert unknown.value.reason == "namespace"
    with pytest.raises(InvalidRequest, match=r"hash_bytes: 5; 16\.\.32"):
        store.lookup(space, [b"short"], owner="o", lease_s=0)
    with pytest.raises(InvalidRequest, match="8193 blocks"):
        store.lookup(space, [b"h" * 32] * 8193, owner="o", lease_s=0)
    with pytest.raises(InvalidRequest, match="lease_s"):
        store.lookup(space, [], owner="o", lease_s=601)
    with pytest.raises(InvalidRequest, match="ttl_s"):
        store.reserve(space, [], owner="o", ttl_s=0)
    with pytest.raises(InvalidRequest, match=r"not \[3\]"):
        store.reserve(space, [NewBlock(b"h" * 32, b"abc")], owner="o", ttl_s=1)
    with pytest.raises(InvalidRequest, match="has 3 bytes, this layout has 300000"):
        store.put(space, [b"h" * 32], [b""], [b"abc"])
    with pytest.raises(InvalidRequest, match="dram_bytes"):
        StoreConfig(dram_bytes=1)


def test_indices_outside_of_a_lease_are_refused(
    store: BlockStore, namespace: Namespace, content: Content
) -> None:
    space = store.open_namespace(namespace)
    put(store, space, chain(1), content)
    hit = store.lookup(space, chain(1), owner="o", lease_s=9)
    with pytest.raises(InvalidRequest, match="not block 1"):
        store.fetch(hit.lease_id, 1, 0)
    with pytest.raises(InvalidRequest, match="chunk 2"):
        store.fetch(hit.lease_id, 0, 2)
    store.release(hit.lease_id, owner="o")


def test_a_second_process_is_refused_and_told_who_has_the_directory(
    store: BlockStore, tmp_path: Path
) -> None:
    with pytest.raises(Unavailable, match=f"in use by process {os.getpid()}"):
        BlockStore.open(tmp_path / "data", SMALL)
    code = (
        "import sys\nfrom dualpath.kvstore.block_store import BlockStore\n"
        "BlockStore.open(sys.argv[1])"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data")],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert child.returncode != 0
    assert b"stop it or use another directory" in child.stderr


def test_a_closed_store_refuses_and_closes_twice(tmp_path: Path, namespace: Namespace) -> None:
    store = BlockStore.open(tmp_path, SMALL)
    store.close()
    store.close()
    with pytest.raises(Unavailable, match="closed"):
        store.open_namespace(namespace)


def test_a_shared_arena_is_a_sealed_memfd(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    with BlockStore.open(tmp_path, replace(SMALL, shared_arena=True)) as store:
        assert store.arena.fd >= 0
        with pytest.raises(OSError, match=r"Errno (1|22)\b"):  # EINVAL on reserved huge pages
            os.pwrite(store.arena.fd, b"x", 0)
        space = store.open_namespace(namespace)
        put(store, space, chain(2), content)
        assert len(store.get(space, chain(2))) == 2


def test_other_sizes_share_disk_and_memory(
    store: BlockStore, namespace: Namespace, content: Content
) -> None:
    sizes = [300, 40_000, 900_000]
    spaces = []
    for size in sizes:
        layout = replace(namespace.layout, layers=1, layer_bytes=size)
        spaces.append(store.open_namespace(replace(namespace, layout=layout)))
    for round_ in range(6):
        for space in spaces:
            hashes = chain(4, first_token=50_000 * round_)
            assert set(put(store, space, hashes, content)) == {SealStatus.SEALED}
            nbytes = store.layout(space).block_bytes
            assert store.get(space, hashes) == [content(h, nbytes) for h in hashes]


def test_writers_and_readers_of_many_threads_see_only_whole_blocks(
    store: BlockStore, namespace: Namespace, content: Content
) -> None:
    space = store.open_namespace(namespace)
    wrong: list[str] = []

    def work(seed: int) -> None:
        try:
            for i in range(8):
                hashes = chain(4, first_token=10_000 * ((seed * 3 + i) % 9))
                put(store, space, hashes, content, durable=bool(i % 2))
                got = store.get(space, hashes)
                if got != [content(h, 300_000) for h in hashes[: len(got)]]:
                    wrong.append(f"{seed} {i}")
        except Exception as error:  # noqa: BLE001
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_a_put_leaves_no_reservation_behind(
    store: BlockStore, namespace: Namespace, content: Content
) -> None:
    space = store.open_namespace(namespace)
    hashes = chain(2)
    store.reserve(space, [NewBlock(hashes[0], b"")], owner=embedded.OWNER, ttl_s=60)
    assert put(store, space, hashes, content) == [ReserveStatus.PENDING, SealStatus.EXPIRED]
    assert store.stats().reservations == 1, "only the one that is not the put's own"

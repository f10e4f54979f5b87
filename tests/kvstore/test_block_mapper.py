"""Mapped blocks stay where and what they are until the lease ends; the guard tells when."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.mapping_table import MAPPINGS_MAX, MappingTable
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.store_api import TIERS, MappedPrefix, MissReason, SealStatus, Tier
from dualpath.transfer.errors import InvalidRequest, LeaseExpired, Overloaded
from hypothesis import given, settings
from hypothesis import strategies as st

Content = Callable[[bytes, int], bytes]
NBYTES = 300_000
SLOT = 303_104
CONFIG = StoreConfig(
    disk_bytes=32 << 20,
    dram_bytes=16 * SLOT,
    segment_bytes=4 << 20,
    read_buffers_bytes=4 << 20,
    reserve_wait_s=0.2,
    mapped_owner_bytes_max=8 * SLOT,
    mapped_bytes_max=12 * SLOT,
    # So that a test knows which copies leave.
    eviction="lru",
)


class Clock:
    """Seconds that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A store with a namespace and keyed content."""

    def __init__(self, store: BlockStore, clock: Clock, space: bytes, content: Content) -> None:
        self.store = store
        self.clock = clock
        self.space = space
        self.content = content

    def put(self, hashes: list[bytes]) -> None:
        """Store durably, so that DRAM copies may leave."""
        data = [self.content(h, NBYTES) for h in hashes]
        statuses = self.store.put(self.space, hashes, parents_of(hashes), data)
        assert set(statuses) == {SealStatus.SEALED}

    def map(self, hashes: list[bytes], owner: str = "a", lease_s: float = 10.0) -> MappedPrefix:
        return self.store.map(self.space, hashes, owner=owner, lease_s=lease_s)

    def holds(self, mapped: MappedPrefix) -> bool:
        """Whether the guard still vouches for the bytes."""
        (word,) = struct.unpack_from("=Q", self.store.arena.view, mapped.guard)
        return bool(word == mapped.hit.lease_id)

    def right(self, mapped: MappedPrefix, hashes: list[bytes]) -> bool:
        view = self.store.arena.view
        return all(
            view[offset : offset + NBYTES] == self.content(block, NBYTES)
            for block, offset in zip(hashes, mapped.offsets.tolist(), strict=True)
        )


@pytest.fixture
def bench(tmp_path: Path, namespace: Namespace, content: Content) -> Iterator[Bench]:
    clock = Clock()
    with BlockStore.open(tmp_path, CONFIG, clock=clock) as store:
        yield Bench(store, clock, store.open_namespace(namespace), content)


def chain(blocks: int, first_token: int = 0) -> list[bytes]:
    return chain_hashes(range(first_token, first_token + 16 * blocks), 16)


def fill(bench: Bench) -> None:
    """Put more blocks than DRAM has slots: everything that may leave does."""
    for start in range(6):
        bench.put(chain(4, 100_000 * (start + 1)))


def test_a_mapped_prefix_names_the_bytes_of_its_blocks(bench: Bench) -> None:
    hashes = chain(3)
    bench.put(hashes)
    mapped = bench.map([*hashes, b"x" * 32])
    assert (mapped.hit.blocks, mapped.hit.miss, mapped.nbytes) == (3, MissReason.ABSENT, NBYTES)
    assert mapped.hit.lease_s == 10
    assert bench.right(mapped, hashes)
    assert bench.holds(mapped)
    stats = bench.store.stats()
    assert (stats.mapped_leases, stats.mapped_bytes, stats.leases) == (1, 3 * SLOT, 1)
    bench.store.release(mapped.hit.lease_id, owner="a")
    assert not bench.holds(mapped)
    assert bench.store.stats().mapped_bytes == 0


def test_packed_hashes_are_mapped_alike(bench: Bench) -> None:
    hashes = chain(2)
    bench.put(hashes)
    packed = PackedHashes.of(hashes)
    mapped = bench.store.map_packed(
        bench.space, packed.data, packed.hash_bytes, owner="a", lease_s=5
    )
    assert bench.right(mapped, hashes)


def test_neither_eviction_nor_demotion_touches_what_is_mapped(bench: Bench) -> None:
    hashes = chain(3)
    bench.put(hashes)
    mapped = bench.map(hashes)
    fill(bench)
    assert bench.store.stats().evicted_blocks[Tier.DRAM] > 0
    assert bench.right(mapped, hashes)
    assert bench.holds(mapped)


def test_what_was_mapped_may_leave_after_the_release(bench: Bench) -> None:
    hashes = chain(3)
    bench.put(hashes)
    bench.store.release(bench.map(hashes).hit.lease_id, owner="a")
    fill(bench)
    hit = bench.store.lookup(bench.space, hashes, owner="a", lease_s=0)
    assert {TIERS[code] for code in hit.tiers.tolist()} == {Tier.SSD}


def test_blocks_that_are_only_on_the_ssd_have_no_offset(bench: Bench) -> None:
    hashes = chain(3)
    bench.put(hashes)
    fill(bench)
    mapped = bench.map(hashes)
    assert mapped.offsets.tolist() == [-1] * 3
    assert mapped.hit.blocks == 3
    assert bench.store.stats().mapped_bytes == 0


def test_expiry_ends_the_mapping_and_the_guard_tells(bench: Bench) -> None:
    hashes = chain(3)
    bench.put(hashes)
    mapped = bench.map(hashes)
    bench.clock.now += 9
    bench.store.renew(mapped.hit.lease_id, owner="a", lease_s=10)
    bench.clock.now += 9
    bench.store.stats()
    assert bench.holds(mapped)
    bench.clock.now += 2
    fill(bench)
    assert not bench.holds(mapped)
    assert bench.store.stats().mapped_leases == 0
    with pytest.raises(LeaseExpired):
        bench.store.renew(mapped.hit.lease_id, owner="a", lease_s=10)


def test_the_end_of_the_owner_ends_its_mappings_only(bench: Bench) -> None:
    hashes = chain(2)
    bench.put(hashes)
    mine, other = bench.map(hashes), bench.map(hashes, owner="b")
    bench.store.forget_owner("a")
    assert not bench.holds(mine)
    assert bench.holds(other)
    assert bench.store.stats().mapped_bytes == 2 * SLOT


def test_a_dropped_block_leaves_look_ups_and_keeps_its_bytes(bench: Bench) -> None:
    hashes = chain(3)
    bench.put(hashes)
    mapped = bench.map(hashes)
    # The bytes go wrong in DRAM and on the SSD alike.
    at = int(mapped.offsets[1])
    bench.store.arena.view[at] ^= 0xFF
    for segment in (bench.store._directory.segments_path).iterdir():
        raw = segment.read_bytes()
        wrong = bench.content(hashes[1], NBYTES)[:64]
        where = raw.find(wrong)
        if where >= 0:
            with segment.open("r+b") as file:
                file.seek(where)
                file.write(bytes([wrong[0] ^ 0xFF]))
    assert bench.store.report_corrupt(mapped.hit.lease_id, 1, 0)
    before = bytes(bench.store.arena.view[at : at + NBYTES])
    hit = bench.store.lookup(bench.space, hashes, owner="b", lease_s=0)
    assert (hit.blocks, hit.miss) == (1, MissReason.CORRUPT)
    fill(bench)
    assert bench.store.arena.view[at : at + NBYTES] == before
    assert bench.holds(mapped)
    bench.store.release(mapped.hit.lease_id, owner="a")
    assert bench.store.stats().mapped_bytes == 0


def test_one_owner_cannot_map_more_than_its_share(bench: Bench) -> None:
    first, second = chain(5), chain(5, 10_000)
    bench.put(first)
    bench.put(second)
    mapped = bench.map(first)
    with pytest.raises(Overloaded, match="by one client") as refused:
        bench.map(second)
    assert refused.value.retry_after_s > 0
    stats = bench.store.stats()
    assert (stats.leases, stats.mapped_bytes) == (1, 5 * SLOT)
    bench.map(first)  # the same blocks once more: they are counted once
    bench.store.release(mapped.hit.lease_id, owner="a")
    with pytest.raises(Overloaded, match="by one client"):
        bench.map(second)
    bench.store.forget_owner("a")
    assert bench.right(bench.map(second), second)


def test_all_owners_together_leave_slots_for_writes(bench: Bench) -> None:
    chains = [chain(5, 10_000 * index) for index in range(3)]
    for hashes in chains:
        bench.put(hashes)
    bench.map(chains[0], owner="a")
    bench.map(chains[1], owner="b")
    with pytest.raises(Overloaded, match="by all clients"):
        bench.map(chains[2], owner="c")
    bench.put(chain(4, 90_000))


def test_a_mapping_needs_a_lease(bench: Bench) -> None:
    with pytest.raises(InvalidRequest, match="positive"):
        bench.map(chain(1), lease_s=0)


def test_nothing_found_is_nothing_mapped(bench: Bench) -> None:
    mapped = bench.map(chain(2))
    assert (mapped.hit.blocks, mapped.hit.lease_id, len(mapped.offsets)) == (0, 0, 0)
    assert bench.store.stats().mapped_leases == 0


def test_get_into_copies_from_memory_and_disk(bench: Bench) -> None:
    hashes = chain(6)
    bench.put(hashes)
    fill(bench)
    for verify in (True, False):
        target = bytearray(6 * NBYTES)
        read = bench.store.get_into(bench.space, hashes, target, verify=verify)
        assert (read.blocks, read.miss) == (6, MissReason.NONE)
        assert target == b"".join(bench.content(h, NBYTES) for h in hashes)
    assert bench.store.stats().leases == 0


def test_get_into_goes_where_it_is_told(bench: Bench) -> None:
    hashes = chain(3)
    bench.put(hashes)
    target = bytearray(4 * NBYTES)
    at = np.array([2 * NBYTES, 7, 3 * NBYTES])
    assert bench.store.get_into(bench.space, hashes, target, at=at).blocks == 3
    for block, offset in zip(hashes, at.tolist(), strict=True):
        assert target[offset : offset + NBYTES] == bench.content(block, NBYTES)
    with pytest.raises(InvalidRequest, match="leave"):
        bench.store.get_into(bench.space, hashes, target, at=at + NBYTES)
    with pytest.raises(InvalidRequest, match="places"):
        bench.store.get_into(bench.space, hashes, target, at=at[:2])
    assert bench.store.stats().leases == 0


def test_get_into_reads_on_when_too_much_is_mapped(bench: Bench) -> None:
    hashes = chain(8)
    bench.put(hashes)
    held = bench.store.map(bench.space, hashes, owner="embedded", lease_s=10)
    other = chain(4, 50_000)
    bench.put(other)
    target = bytearray(4 * NBYTES)
    assert bench.store.get_into(bench.space, other, target).blocks == 4
    assert target == b"".join(bench.content(h, NBYTES) for h in other)
    assert bench.holds(held)


@pytest.mark.parametrize("flipped", [0, NBYTES - 1])
def test_get_into_never_counts_a_wrong_block(bench: Bench, flipped: int) -> None:
    hashes = chain(4)
    bench.put(hashes)
    mapped = bench.map(hashes, owner="b")
    at = int(mapped.offsets[2]) + flipped
    bench.store.arena.view[at] ^= 1  # memory fails; the SSD has it right
    target = bytearray(4 * NBYTES)
    read = bench.store.get_into(bench.space, hashes, target)
    assert read.blocks == 4
    assert target == b"".join(bench.content(h, NBYTES) for h in hashes)


def test_a_block_that_is_wrong_everywhere_ends_the_prefix(tmp_path: Path, bench: Bench) -> None:
    hashes = chain(4)
    # Never written to the SSD: the only copy is the one in DRAM.
    data = [bench.content(h, NBYTES) for h in hashes]
    bench.put(hashes[:2])
    state = bench.store._state
    bench.store.put(bench.space, hashes[2:], hashes[1:3], data[2:], durable=False)
    with state.lock:
        entry = state.catalog.entry(bench.space)
        row = int(state.catalog.prefix(entry, PackedHashes.of(hashes))[2])
        at = int(state.table.dram[row])
        state.residency.set_dirty(row, True)
    bench.store.arena.view[at] ^= 1
    target = bytearray(4 * NBYTES)
    read = bench.store.get_into(bench.space, hashes, target)
    assert (read.blocks, read.miss) == (2, MissReason.CORRUPT)
    assert target[: 2 * NBYTES] == b"".join(data[:2])


class Model:
    """What the table must say, with Python's sets."""

    def __init__(self) -> None:
        self.live: list[tuple[str, frozenset[int], object]] = []

    def nbytes(self, owner: str | None = None) -> int:
        rows = [rows for name, rows, _ in self.live if owner in (None, name)]
        return 10 * len(frozenset().union(*rows))


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]),
            st.frozensets(st.integers(0, 30), max_size=8),
            st.integers(0, 5),
        ),
        max_size=40,
    )
)
@settings(max_examples=100, deadline=None)
def test_the_table_counts_each_row_once(
    steps: list[tuple[str, frozenset[int], int]],
) -> None:
    guards = memoryview(bytearray(8 * 6)).cast("Q")
    table = MappingTable(guards, owner_bytes_max=150, bytes_max=220)
    model = Model()
    for number, (owner, rows, end) in enumerate(steps, start=1):
        packed = np.array(sorted(rows), np.intp)
        before = model.nbytes(), table.nbytes
        try:
            mapping = table.begin(owner, number, packed, 10)
        except Overloaded:
            model.live.append((owner, rows, None))
            over = model.nbytes(owner) > 150 or model.nbytes() > 220 or len(model.live) > 6
            model.live.pop()
            assert over
            assert (model.nbytes(), table.nbytes) == before
        else:
            model.live.append((owner, rows, mapping))
            assert guards[mapping.guard] == number
        if model.live and end < len(model.live):
            _, _, ended = model.live.pop(end)
            table.end(ended)  # type: ignore[arg-type]
            assert guards[ended.guard] == 0  # type: ignore[attr-defined]
        assert table.nbytes == model.nbytes()
        assert len(table) == len(model.live)
        held = frozenset().union(*(rows for _, rows, _ in model.live))
        assert all((row in table) == (row in held) for row in range(32))


def test_guards_are_bounded(bench: Bench) -> None:
    hashes = chain(1)
    bench.put(hashes)
    for _ in range(MAPPINGS_MAX):
        bench.map(hashes)
    with pytest.raises(Overloaded, match="leases are mapped"):
        bench.map(hashes)
    assert bench.store.stats().leases == MAPPINGS_MAX
    bench.store.forget_owner("a")
    assert bench.right(bench.map(hashes), hashes)


def test_a_closed_store_has_let_go_of_its_arena(tmp_path: Path) -> None:
    store = BlockStore.open(tmp_path / "other", replace(CONFIG, shared_arena=True))
    store.close()
    assert store.arena.fd == -1

"""Failing media: seals fail, reads become misses, the store keeps serving; power loss loses
nothing that was acknowledged."""

from __future__ import annotations

import errno
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.device import MemoryDevice
from dualpath.kvstore.durable_index import IndexFailure
from dualpath.kvstore.fault_device import FaultDevice, FaultFile, FaultPlan
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import TIERS, MissReason, ReserveStatus, SealStatus, Tier
from dualpath.transfer.errors import Corrupt, Unavailable

Content = Callable[[bytes, int], bytes]
SIZE = 300_000
CONFIG = StoreConfig(
    disk_bytes=16 << 20,
    dram_bytes=2 << 20,
    segment_bytes=2 << 20,
    reserve_wait_s=0.2,
    read_buffers_bytes=2 << 20,
)


def chain(blocks: int, first_token: int = 0) -> list[bytes]:
    return chain_hashes(range(first_token, first_token + 16 * blocks), 16)


def put(
    store: BlockStore, space: bytes, hashes: list[bytes], content: Content, durable: bool = True
) -> list[object]:
    data = [content(h, SIZE) for h in hashes]
    return list(store.put(space, hashes, parents_of(hashes), data, durable=durable))


def intact(store: BlockStore, space: bytes, hashes: list[bytes], content: Content) -> int:
    """Blocks that are served; all of them must be right."""
    blocks = store.get(space, hashes)
    assert blocks == [content(h, SIZE) for h in hashes[: len(blocks)]]
    return len(blocks)


@pytest.mark.parametrize("fault", ["write_error", "torn_write", "sync_error"])
def test_a_failing_write_fails_the_seal_and_nothing_else(
    tmp_path: Path, namespace: Namespace, content: Content, fault: str
) -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan())
    with BlockStore.open(tmp_path, CONFIG, device=device) as store:
        space = store.open_namespace(namespace)
        assert put(store, space, chain(2), content) == [SealStatus.SEALED] * 2
        setattr(device.plan, fault, 1.0)
        assert put(store, space, chain(4), content)[2:] == [SealStatus.FAILED] * 2
        assert intact(store, space, chain(4), content) == 2
        setattr(device.plan, fault, 0.0)
        assert put(store, space, chain(4), content)[2:] == [SealStatus.SEALED] * 2
        assert intact(store, space, chain(4), content) == 4
    with BlockStore.open(tmp_path, CONFIG, device=device) as store:
        assert intact(store, space, chain(4), content) == 4
        assert "faulty" in store.stats().device


def test_a_full_disk_fails_the_seal_and_the_store_serves_on(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan(space_bytes=5 << 20))
    with BlockStore.open(tmp_path, CONFIG, device=device) as store:
        space = store.open_namespace(namespace)
        statuses = put(store, space, chain(30), content)
        good = statuses.count(SealStatus.SEALED)
        assert 0 < good < 30
        assert statuses[:good] == [SealStatus.SEALED] * good
        assert SealStatus.FAILED in statuses
        assert intact(store, space, chain(30), content) == good


def test_while_the_index_refuses_nothing_more_is_taken_and_what_was_stored_stays(
    tmp_path: Path, namespace: Namespace, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BlockStore.open(tmp_path, CONFIG) as store:
        space = store.open_namespace(namespace)

        def refuse(*_what: object) -> None:
            raise IndexFailure(errno.ENOSPC, "no space for the index")

        with monkeypatch.context() as patch:
            patch.setattr(store._index, "apply", refuse)
            assert put(store, space, chain(2), content) == [SealStatus.SEALED] * 2, "by headers"
            assert "not taken" in store._committer.await_told(0.3)
            assert put(store, space, chain(3, 7000), content) == [SealStatus.FAILED] * 3
            assert intact(store, space, chain(3, 7000), content) == 0
            assert intact(store, space, chain(2), content) == 2
        assert put(store, space, chain(3, 7000), content) == [SealStatus.SEALED] * 3
    with BlockStore.open(tmp_path, CONFIG) as store:
        assert intact(store, namespace.id, chain(2), content) == 2
        assert intact(store, namespace.id, chain(3, 7000), content) == 3


def test_a_failed_write_back_drops_the_block_and_its_descendants(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan())
    with BlockStore.open(tmp_path, CONFIG, device=device) as store:
        space = store.open_namespace(namespace)
        device.plan.write_error = 1.0
        assert set(put(store, space, chain(3), content, durable=False)) <= {
            SealStatus.SEALED,
            SealStatus.FAILED,
            SealStatus.EXPIRED,
        }
        # A durable seal goes through the queue behind them.
        other = chain(1, first_token=900)
        assert put(store, space, other, content) == [SealStatus.FAILED]
        assert intact(store, space, chain(3), content) == 0
        device.plan.write_error = 0.0
        assert put(store, space, chain(3), content, durable=False) == [SealStatus.SEALED] * 3
        assert put(store, space, other, content) == [SealStatus.SEALED]
        assert intact(store, space, chain(3), content) == 3
    with BlockStore.open(tmp_path, CONFIG, device=device) as store:
        assert intact(store, space, chain(3), content) == 3


@pytest.mark.parametrize("fault", ["read_error", "short_read"])
def test_a_failing_read_is_corrupt_and_the_prefix_ends_there(
    tmp_path: Path, namespace: Namespace, content: Content, fault: str
) -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan())
    with BlockStore.open(tmp_path, CONFIG, device=device) as store:
        space = store.open_namespace(namespace)
        put(store, space, chain(10), content)
        hit = store.lookup(space, chain(10), owner="o", lease_s=60)
        cold = hit.tiers.tolist().index(TIERS.index(Tier.SSD))
        setattr(device.plan, fault, 1.0)
        with pytest.raises(Corrupt, match="block dropped"):
            store.fetch(hit.lease_id, cold, 0)
        with pytest.raises(Corrupt, match="block dropped"):
            store.fetch(hit.lease_id, cold, 0)
        setattr(device.plan, fault, 0.0)
        again = store.lookup(space, chain(10), owner="o", lease_s=0)
        assert (again.blocks, again.miss) == (cold, MissReason.CORRUPT)
        store.release(hit.lease_id, owner="o")
        put(store, space, chain(10), content)
        assert intact(store, space, chain(10), content) == 10
        assert store.stats().corrupt_blocks == 10 - cold


def test_rot_on_the_medium_is_found_dropped_and_replaced(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    inner = MemoryDevice()
    with BlockStore.open(tmp_path, CONFIG, device=inner) as store:
        space = store.open_namespace(namespace)
        put(store, space, chain(3), content)
    wanted = content(chain(3)[1], SIZE)
    for data in inner.files.values():
        at = data.find(wanted)
        if at >= 0:
            data[at + SIZE - 1] ^= 1
    with BlockStore.open(tmp_path, CONFIG, device=inner) as store:
        hit = store.lookup(space, chain(3), owner="o", lease_s=60)
        assert hit.blocks == 3
        assert store.report_corrupt(hit.lease_id, 1, 0) is False
        assert store.report_corrupt(hit.lease_id, 1, 1) is True
        assert store.report_corrupt(hit.lease_id, 1, 1) is True
        assert intact(store, space, chain(3), content) == 1
        assert store.lookup(space, chain(3), owner="o", lease_s=0).miss is MissReason.CORRUPT
        put(store, space, chain(3), content)
        assert intact(store, space, chain(3), content) == 3
    with BlockStore.open(tmp_path, CONFIG, device=inner) as store:
        assert intact(store, space, chain(3), content) == 3


def test_a_bad_copy_in_memory_is_read_again_from_ssd(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    with BlockStore.open(tmp_path, CONFIG) as store:
        space = store.open_namespace(namespace)
        put(store, space, chain(2), content)
        hit = store.lookup(space, chain(2), owner="o", lease_s=60)
        with store.fetch(hit.lease_id, 0, 1) as chunk:
            chunk.region.view[chunk.slices.start] ^= 1
        assert store.report_corrupt(hit.lease_id, 0, 1) is False
        assert intact(store, space, chain(2), content) == 2
        store.release(hit.lease_id, owner="o")


def test_passing_rot_is_never_served(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan(seed=5))
    with BlockStore.open(tmp_path, CONFIG, device=device) as store:
        space = store.open_namespace(namespace)
        for i in range(6):
            put(store, space, chain(6, first_token=10_000 * i), content)
        device.plan.rot = 0.3
        for i in range(6):
            intact(store, space, chain(6, first_token=10_000 * i), content)


class PowerCut:
    """Counts down device writes, syncs and index commits; then nothing is stored any more."""

    def __init__(self, operations: int) -> None:
        self.left = operations

    def tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise IndexFailure(errno.EIO, "the power is gone")


@pytest.mark.parametrize("seed", range(12))
def test_power_loss_keeps_what_was_acknowledged_and_serves_nothing_torn(
    tmp_path: Path, namespace: Namespace, content: Content, seed: int
) -> None:
    dice = random.Random(seed)
    device = FaultDevice(MemoryDevice(), FaultPlan(seed=seed))
    cut = PowerCut(dice.randrange(5, 120))
    path = tmp_path / "data"
    store = BlockStore.open(path, CONFIG, device=device)
    apply, ensure = store._index.apply, device.note_write

    def apply_or_die(
        deletes: list[tuple[bytes, int]], puts: list[tuple[bytes, bytes]], reached: int | None
    ) -> None:
        cut.tick()
        apply(deletes, puts, reached)

    def write_or_die(name: str, file: object, offset: int, nbytes: int) -> None:
        cut.tick()
        ensure(name, file, offset, nbytes)  # type: ignore[arg-type]

    store._index.apply = apply_or_die  # type: ignore[method-assign,assignment]
    device.note_write = write_or_die  # type: ignore[method-assign]
    space = store.open_namespace(namespace)
    chains = [chain(5, first_token=10_000 * i) for i in range(9)]
    sealed: set[bytes] = set()
    for _ in range(14):
        hashes = dice.choice(chains)
        durable = dice.random() < 0.7
        for h, status in zip(hashes, put(store, space, hashes, content, durable), strict=True):
            if status is SealStatus.SEALED and durable:
                sealed.add(h)
    catalog = store._state.catalog
    present = {h for h in sealed if catalog.row_of(catalog.entry(space), h) >= 0}
    device.plan.sync_error = 1.0
    cut.left = -1
    # It goes through the queue behind everything else: after it nobody writes to the index.
    put(store, space, chain(1, first_token=990_000), content)
    shutil.copytree(path, tmp_path / "after")
    store.close()
    device.crash()
    device.plan.sync_error = 0.0
    del device.note_write
    with BlockStore.open(tmp_path / "after", CONFIG, device=device) as store:
        store.open_namespace(namespace)
        served = set()
        for hashes in chains:
            served |= set(hashes[: intact(store, space, hashes, content)])
        assert present <= served
        for hashes in chains:
            put(store, space, hashes, content)
            intact(store, space, hashes, content)


def held_syncs(patch: pytest.MonkeyPatch) -> threading.Event:
    """From now on flushes wait until it is set."""
    gate = threading.Event()
    sync = FaultFile.sync

    def slow_sync(file: FaultFile) -> None:
        assert gate.wait(20)
        sync(file)

    patch.setattr(FaultFile, "sync", slow_sync)
    return gate


def test_a_durable_put_waits_for_blocks_that_are_there_but_not_written_back(
    tmp_path: Path, namespace: Namespace, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan())
    with BlockStore.open(tmp_path, CONFIG, device=device) as store:
        space = store.open_namespace(namespace)
        assert put(store, space, chain(1, 999), content) == [SealStatus.SEALED]
        gate = held_syncs(monkeypatch)
        assert put(store, space, chain(2), content, durable=False) == [SealStatus.SEALED] * 2
        done: list[object] = []
        again = threading.Thread(
            target=lambda: done.extend(put(store, space, chain(2), content)), daemon=True
        )
        again.start()
        again.join(0.2)
        assert not done, "acknowledged as durable while it was not"
        gate.set()
        again.join(20)
        assert done == [ReserveStatus.EXISTS] * 2


def test_a_durable_put_says_so_if_what_was_there_could_not_be_written_back(
    tmp_path: Path, namespace: Namespace, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def failing_sync(file: FaultFile) -> None:
        assert gate.wait(20)
        raise OSError(errno.EIO, "injected")

    device = FaultDevice(MemoryDevice(), FaultPlan())
    with BlockStore.open(tmp_path, CONFIG, device=device) as store:
        space = store.open_namespace(namespace)
        assert put(store, space, chain(1, 999), content) == [SealStatus.SEALED]
        monkeypatch.setattr(FaultFile, "sync", failing_sync)
        assert put(store, space, chain(2), content, durable=False) == [SealStatus.SEALED] * 2
        opening = threading.Timer(0.1, gate.set)
        opening.start()
        assert put(store, space, chain(2), content) == [SealStatus.FAILED] * 2
        opening.join()


def test_a_disk_smaller_than_the_budget_evicts_until_it_has_space_again(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan(space_bytes=5 << 20))
    now = [1000.0]
    with BlockStore.open(tmp_path, CONFIG, device=device, clock=lambda: now[0]) as store:
        space = store.open_namespace(namespace)
        put(store, space, chain(30), content)  # some of it fails
        for turn in range(1, 6):
            hashes = chain(5, 10_000 * turn)
            assert put(store, space, hashes, content) == [SealStatus.SEALED] * 5
            assert intact(store, space, hashes, content) == 5
        assert store.stats().evicted_blocks[Tier.SSD] > 0
        assert store.stats().capacity_bytes[Tier.SSD] <= 5 << 20
        device.plan.space_bytes = -1
        now[0] += 31
        store._committer.call()
        deadline = time.monotonic() + 20
        while store.stats().capacity_bytes[Tier.SSD] < CONFIG.disk_bytes:
            assert time.monotonic() < deadline
        assert put(store, space, chain(30), content)[-1] is SealStatus.SEALED
        assert intact(store, space, chain(30), content) == 30
    with BlockStore.open(tmp_path, CONFIG, device=device) as store:
        assert intact(store, space, chain(30), content) == 30


def test_a_close_that_has_to_wait_too_long_gives_everything_back_later(
    tmp_path: Path, namespace: Namespace, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan())
    store = BlockStore.open(tmp_path, replace(CONFIG, commit_wait_s=0.2), device=device)
    space = store.open_namespace(namespace)
    put(store, space, chain(1, 999), content)
    with monkeypatch.context() as patch:
        gate = held_syncs(patch)
        put(store, space, chain(2), content, durable=False)
        store.close()
        with pytest.raises(Unavailable, match="in use"):
            BlockStore.open(tmp_path, CONFIG, device=device)
        gate.set()
        (late,) = [each for each in threading.enumerate() if each.name == "dualpath-close"]
        late.join(20)
    with BlockStore.open(tmp_path, CONFIG, device=device) as again:
        assert intact(again, space, chain(2), content) == 2
        assert again.recovered.from_snapshot

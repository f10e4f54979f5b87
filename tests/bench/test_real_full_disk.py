"""A file system that is really full: the store serves on, evicts, and opens again. Needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from dualpath.bench.soak import world
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import parents_of
from dualpath.kvstore.fsck import Fsck
from dualpath.kvstore.store_api import SealStatus
from dualpath.kvstore.store_health import Trouble

pytestmark = pytest.mark.root

CONFIG = StoreConfig(
    disk_bytes=256 << 20, dram_bytes=8 << 20, segment_bytes=2 << 20, reserve_wait_s=0.2
)
_DISK_BYTES = 24 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("not root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "dualpath-test", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def put(store: BlockStore, number: int, *, durable: bool = True) -> int:
    """How many blocks of a chain were stored."""
    space = store.open_namespace(world.TENANTS[1])
    hashes = list(world.chain(1, number))
    data = [world.content(1, h) for h in hashes]
    statuses = store.put(space, hashes, parents_of(hashes), data, durable=durable)
    return statuses.count(SealStatus.SEALED)


def intact(store: BlockStore, number: int) -> int:
    hashes = world.chain(1, number)
    found = store.get(store.open_namespace(world.TENANTS[1]), hashes)
    assert found == [world.content(1, h) for h in hashes[: len(found)]]
    return len(found)


def test_a_store_that_is_larger_than_its_disk_evicts_and_serves(small_disk: Path) -> None:
    data = small_disk / "data"
    with BlockStore.open(data, CONFIG) as store:
        for number in range(0, 60, 2):
            assert put(store, number, durable=number % 4 == 0) == world.CHAIN_BLOCKS
            assert intact(store, number) == world.CHAIN_BLOCKS
        assert Trouble.DISK_FULL in store.health().troubles
        assert store.stats().lost_write_backs == 0
    with Fsck(data) as fsck:
        assert not fsck.check().problems
    with BlockStore.open(data, CONFIG) as store:
        assert intact(store, 58) == world.CHAIN_BLOCKS


def test_a_disk_that_others_fill_to_the_last_byte_loses_nothing_that_is_stored(
    small_disk: Path,
) -> None:
    data, filler = small_disk / "data", small_disk / "filler"
    with BlockStore.open(data, CONFIG) as store:
        assert put(store, 0) == world.CHAIN_BLOCKS
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        for number in range(2, 40, 2):
            put(store, number)
            intact(store, number)
        filler.unlink()
        store._state.ssd.restore_budget()
        stored = [put(store, number) for number in range(40, 50, 2)]
        assert stored == [world.CHAIN_BLOCKS] * len(stored)
        for number in range(40, 50, 2):
            assert intact(store, number) == world.CHAIN_BLOCKS
        for number in range(50):
            intact(store, number)
    with Fsck(data) as fsck:
        assert not fsck.check().problems
    with BlockStore.open(data, CONFIG) as store:
        assert intact(store, 48) == world.CHAIN_BLOCKS
        assert store.recovered.dropped == 0

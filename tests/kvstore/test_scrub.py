"""Scrubbing finds rot before a reader does, goes on where it stopped, and disturbs nobody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.device import MemoryDevice
from dualpath.kvstore.fault_device import FaultDevice, FaultPlan
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import MissReason
from dualpath.kvstore.store_health import Trouble

Content = Callable[[bytes, int], bytes]
SIZE = 300_000
CONFIG = StoreConfig(disk_bytes=16 << 20, dram_bytes=2 << 20, segment_bytes=2 << 20)
BLOCKS = 12
HASHES = chain_hashes(range(16 * BLOCKS), 16)


def fill(store: BlockStore, namespace: Namespace, content: Content) -> bytes:
    space = store.open_namespace(namespace)
    store.put(space, HASHES, parents_of(HASHES), [content(h, SIZE) for h in HASHES])
    return space


def damage(device: MemoryDevice, wanted: bytes) -> None:
    for data in device.files.values():
        at = data.find(wanted)
        if at >= 0:
            data[at + SIZE // 2] ^= 1


def test_a_pass_reads_every_block_once_and_starts_over(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    with BlockStore.open(tmp_path, CONFIG, device=MemoryDevice()) as store:
        assert store.scrub_step(1).finished
        fill(store, namespace, content)
        for _ in range(2):
            steps = [store.scrub_step(2 * SIZE) for _ in range(BLOCKS // 2)]
            assert [step.blocks for step in steps] == [2] * (BLOCKS // 2)
            assert not any(step.bad_blocks or step.finished for step in steps)
            last = store.scrub_step(2 * SIZE)
            assert (last.blocks, last.finished) == (0, True)
        stats = store.stats()
        assert (stats.scrubbed_blocks, stats.scrub_bad_blocks) == (2 * BLOCKS, 0)
        assert stats.scrub_passes == 3
        assert not store.health().degraded


def test_a_rotten_block_leaves_with_its_descendants_and_is_reported(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    device = MemoryDevice()
    now = [100.0]
    with BlockStore.open(tmp_path, CONFIG, device=device, clock=lambda: now[0]) as store:
        space = fill(store, namespace, content)
        damage(device, content(HASHES[5], SIZE))
        step = store.scrub_step(1 << 30)
        assert (step.bad_blocks, step.finished) == (1, True)
        hit = store.lookup(space, HASHES, owner="o", lease_s=0)
        assert (hit.blocks, hit.miss) == (5, MissReason.CORRUPT)
        assert Trouble.ROT in store.health().troubles
        assert "segment" in store.health().reason
        now[0] += 3600
        assert not store.health().degraded
        fill(store, namespace, content)
        assert store.scrub_step(1 << 30).bad_blocks == 0
        assert len(store.get(space, HASHES)) == BLOCKS


def test_a_passing_read_error_costs_nothing(
    tmp_path: Path, namespace: Namespace, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan())
    with BlockStore.open(tmp_path, CONFIG, device=device) as store:
        space = fill(store, namespace, content)
        failures = iter([True] + [False] * 1000)
        monkeypatch.setattr(device, "hits", lambda probability: next(failures))
        assert store.scrub_step(1 << 30).bad_blocks == 0
        monkeypatch.undo()
        assert len(store.get(space, HASHES)) == BLOCKS


def test_what_leaves_or_comes_between_two_steps_is_no_harm(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    with BlockStore.open(tmp_path, CONFIG, device=MemoryDevice()) as store:
        fill(store, namespace, content)
        for turn in range(40):
            assert store.scrub_step(5 * SIZE).bad_blocks == 0
            more = chain_hashes(range(10_000 * turn, 10_000 * turn + 64), 16)
            data = [content(h, SIZE) for h in more]
            store.put(namespace.id, more, parents_of(more), data, durable=turn % 2 == 0)
        assert store.stats().scrub_passes > 0

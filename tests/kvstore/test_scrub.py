"""Scrubbing finds rot before a reader does, goes on where it stopped, and disturbs nobody."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dualpath.kvstore.background_scrub import SCRUB_NAME
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.device import MemoryDevice
from dualpath.kvstore.fault_device import FaultDevice, FaultPlan
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.scrub_pace import PAUSED_SHARE, ScrubPace
from dualpath.kvstore.store_api import MissReason
from dualpath.kvstore.store_health import Trouble
from dualpath.transfer.errors import InvalidRequest

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


def test_the_background_scrub_finds_rot_and_keeps_its_place(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    device = MemoryDevice()
    config = dataclasses.replace(CONFIG, scrub_bytes_per_s=1 << 30)
    with BlockStore.open(tmp_path, CONFIG, device=device) as store:
        fill(store, namespace, content)
    damage(device, content(HASHES[9], SIZE))
    with BlockStore.open(tmp_path, config, device=device) as store:
        deadline = time.monotonic() + 30
        while not store.stats().scrub_bad_blocks:
            assert time.monotonic() < deadline
        assert len(store.get(namespace.id, HASHES)) == 9
    place = json.loads((tmp_path / SCRUB_NAME).read_text())
    assert set(place) == {"segment", "slot"}
    for text in ("", "[]", '{"segment": "x", "slot": 1}'):
        (tmp_path / SCRUB_NAME).write_text(text)
        with BlockStore.open(tmp_path, config, device=device) as store:
            assert store._scrub is not None
    assert not list(tmp_path.glob("*.new"))


def test_without_a_rate_nothing_is_scrubbed(tmp_path: Path) -> None:
    with BlockStore.open(tmp_path, CONFIG, device=MemoryDevice()) as store:
        assert store._scrub is None
    assert not (tmp_path / SCRUB_NAME).exists()
    with pytest.raises(InvalidRequest, match="scrub_bytes_per_s"):
        dataclasses.replace(CONFIG, scrub_bytes_per_s=-1)


def run(pace: ScrubPace, seconds: int, others_bytes_per_s: int, block: int = 1000) -> int:
    """Bytes scrubbed in so many seconds, looked at ten times a second."""
    done = 0
    for tick in range(1, 10 * seconds + 1):
        now = tick / 10
        budget = pace.budget(now, int(others_bytes_per_s * now))
        while budget > 0:
            pace.spend(block)
            budget -= block
            done += block
    return done


def test_the_pace_is_kept_when_nothing_else_moves() -> None:
    assert run(ScrubPace(10_000, 0.0), 60, 0) == pytest.approx(600_000, rel=0.05)
    assert run(ScrubPace(10_000, 0.0), 60, 9_000) == pytest.approx(600_000, rel=0.05)
    assert run(ScrubPace(10_000, 0.0), 60, 0, block=50_000) == pytest.approx(600_000, rel=0.15)


def test_the_pace_falls_to_a_small_part_under_load() -> None:
    busy = run(ScrubPace(10_000, 0.0), 60, 1_000_000)
    assert busy == pytest.approx(600_000 / PAUSED_SHARE, rel=0.1)


def test_credit_does_not_pile_up() -> None:
    pace = ScrubPace(10_000, 0.0)
    assert pace.budget(3600.0, 0) == 10_000

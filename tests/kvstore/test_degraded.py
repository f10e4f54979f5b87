"""A sick segment, a full disk, an index that refuses: the store serves on, says so, and heals."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.device import MemoryDevice
from dualpath.kvstore.fault_device import FaultDevice, FaultPlan
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.segment_breaker import FAILURES_MAX, PAUSE_S, WINDOW_S, SegmentBreaker
from dualpath.kvstore.ssd_tier import segment_name
from dualpath.kvstore.store_api import MissReason, SealStatus, Tier
from dualpath.kvstore.store_health import HealthBoard, Trouble

Content = Callable[[bytes, int], bytes]
SIZE = 300_000
WAIT_S = 20.0
CONFIG = StoreConfig(
    disk_bytes=16 << 20,
    dram_bytes=2 << 20,
    segment_bytes=2 << 20,
    reserve_wait_s=0.2,
    read_buffers_bytes=2 << 20,
    promote=False,
)


class Rig:
    """A store on a device that fails on purpose, with a clock of its own."""

    def __init__(self, path: Path, namespace: Namespace, content: Content) -> None:
        self.device = FaultDevice(MemoryDevice(), FaultPlan())
        self.now = 1000.0
        self.turn = 0
        self.store = BlockStore.open(path, CONFIG, device=self.device, clock=lambda: self.now)
        self.space = self.store.open_namespace(namespace)
        self._content = content

    def put(self, hashes: list[bytes], durable: bool = True) -> list[object]:
        data = [self._content(h, SIZE) for h in hashes]
        return list(self.store.put(self.space, hashes, parents_of(hashes), data, durable=durable))

    def intact(self, hashes: list[bytes]) -> int:
        blocks = self.store.get(self.space, hashes)
        assert blocks == [self._content(h, SIZE) for h in hashes[: len(blocks)]]
        return len(blocks)

    def places(self) -> set[int]:
        table = self.store._state.table
        return {int(s) for s in table.segment if s >= 0}

    def later(self, seconds: float) -> None:
        """Let time go by; the committer has done its chores on return."""
        self.now += seconds
        assert self.put(chain(1, int(self.now) * 100)) == [SealStatus.SEALED]

    def until_out(self, segment: int) -> None:
        """Store until the segment is out of use; no block is lost meanwhile."""
        for _ in range(200):
            if segment in self.store._state.breaker.out:
                return
            self.turn += 1
            hashes = chain(3, 10_000_000 + 1000 * self.turn)
            assert self.put(hashes) == [SealStatus.SEALED] * 3
            assert self.intact(hashes) == 3
        raise AssertionError("it was never tried again")

    @property
    def troubles(self) -> set[Trouble]:
        return set(self.store.health().troubles)


@pytest.fixture
def rig(tmp_path: Path, namespace: Namespace, content: Content) -> Any:
    made = Rig(tmp_path, namespace, content)
    yield made
    made.store.close()


def chain(blocks: int, first_token: int = 0) -> list[bytes]:
    return chain_hashes(range(first_token, first_token + 16 * blocks), 16)


def test_a_segment_that_takes_no_writes_costs_no_block(rig: Rig) -> None:
    assert rig.put(chain(1)) == [SealStatus.SEALED]
    (sick,) = rig.places()
    rig.device.plan.unwritable.add(segment_name(sick))
    assert rig.put(chain(3, 500)) == [SealStatus.SEALED] * 3
    assert rig.intact(chain(1)) == 1, "what it holds can still be read"
    rig.until_out(sick)
    assert rig.troubles == {Trouble.SEGMENT}
    assert str(sick) in rig.store.health().reason
    assert rig.store.stats().lost_write_backs == 0


def test_a_write_back_to_a_sick_segment_finds_another_place(rig: Rig) -> None:
    assert rig.put(chain(1)) == [SealStatus.SEALED]
    (sick,) = rig.places()
    rig.device.plan.unwritable.add(segment_name(sick))
    assert rig.put(chain(5, 5000), durable=False) == [SealStatus.SEALED] * 5
    assert rig.put(chain(1, 9000)) == [SealStatus.SEALED]
    assert rig.intact(chain(5, 5000)) == 5
    assert rig.store.stats().lost_write_backs == 0


def test_a_segment_that_cannot_be_read_is_given_up_after_a_few_blocks(rig: Rig) -> None:
    chains = [chain(1, 1000 * n) for n in range(12)]
    for hashes in chains:
        rig.put(hashes)
    sick = int(rig.store._state.table.segment[0])
    rig.device.plan.unreadable.add(segment_name(sick))
    served = sum(rig.intact(hashes) for hashes in chains)
    assert 0 < served < len(chains)
    assert Trouble.SEGMENT in rig.troubles
    assert rig.store.stats().corrupt_blocks == len(chains) - served
    assert sum(rig.intact(hashes) for hashes in chains) == served, "no more blocks are lost"
    lost = next(h for h in chains if not rig.intact(h))
    hit = rig.store.lookup(rig.space, lost, owner="o", lease_s=0)
    assert hit.miss is MissReason.CORRUPT
    for hashes in chains:
        rig.put(hashes)
    assert sum(rig.intact(hashes) for hashes in chains) == len(chains), "stored elsewhere"


def test_a_segment_that_works_again_is_used_again(rig: Rig) -> None:
    rig.put(chain(1))
    (sick,) = rig.places()
    rig.device.plan.unwritable.add(segment_name(sick))
    rig.until_out(sick)
    rig.later(PAUSE_S + 1)
    assert not rig.troubles, "it is on trial"
    rig.until_out(sick)
    rig.device.plan.unwritable.clear()
    rig.later(2 * PAUSE_S + 1)
    assert not rig.troubles
    for turn in range(60):
        assert rig.put(chain(3, 1_000_000 + 1000 * turn)) == [SealStatus.SEALED] * 3
    assert not rig.troubles
    assert sick in rig.places()


def test_a_full_disk_is_said_until_there_is_space(rig: Rig) -> None:
    rig.device.plan.space_bytes = 5 << 20
    statuses = rig.put(chain(30))
    assert SealStatus.SEALED in statuses
    assert rig.troubles == {Trouble.DISK_FULL}
    assert "free some space" in rig.store.health().reason
    for turn in range(1, 5):
        hashes = chain(3, 10_000 * turn)
        assert rig.put(hashes) == [SealStatus.SEALED] * 3, "by eviction"
        assert rig.intact(hashes) == 3
    rig.device.plan.space_bytes = -1
    rig.later(31)
    rig.later(31)
    assert not rig.troubles
    assert rig.store.stats().capacity_bytes[Tier.SSD] == CONFIG.disk_bytes


def test_write_backs_that_nobody_can_store_are_counted(rig: Rig) -> None:
    rig.device.plan.write_error = 1.0
    rig.put(chain(3), durable=False)
    assert rig.put(chain(1, 9000)) == [SealStatus.FAILED]
    assert rig.store.stats().lost_write_backs > 0
    assert Trouble.WRITE_BACK in rig.troubles
    rig.device.plan.write_error = 0.0
    rig.now += 4000
    assert rig.put(chain(3)) == [SealStatus.SEALED] * 3
    assert rig.intact(chain(3)) == 3


class Panicking:
    """An environment in which every transaction fails, as after a failed sync."""

    def begin(self, **_options: object) -> object:
        raise lmdb.PanicError("mdb_txn_begin: MDB_PANIC: update of meta page failed")

    def info(self) -> dict[str, int]:
        return {"last_txnid": 0}

    def close(self) -> None:
        """Like an environment."""


def test_an_index_that_has_panicked_is_opened_anew_and_nobody_notices(rig: Rig) -> None:
    rig.put(chain(2))
    assert not rig.store._committer.await_told(WAIT_S)
    rig.store._index._env.close()
    rig.store._index._env = Panicking()  # type: ignore[assignment]
    assert rig.put(chain(4))[2:] == [SealStatus.SEALED] * 2
    assert not rig.store._committer.await_told(WAIT_S)
    assert not rig.troubles
    assert rig.intact(chain(4)) == 4


def test_an_index_that_refuses_everything_leaves_a_store_that_serves(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespace: Namespace
) -> None:
    rig.put(chain(2))
    index = rig.store._index
    whole = index._env
    with monkeypatch.context() as patch:
        patch.setattr(index, "_env", Panicking())
        patch.setattr(index, "_open", Panicking)
        patch.setattr(index, "_read_sums", lambda: None)
        assert rig.store._committer.await_told(0.3)
        assert rig.put(chain(3, 5000)) == [SealStatus.FAILED] * 3
        assert rig.troubles == {Trouble.INDEX}
        assert "PANIC" in rig.store.health().reason
        assert rig.intact(chain(2)) == 2
        assert rig.intact(chain(3, 5000)) == 0
    index._env = whole
    assert rig.put(chain(3, 5000)) == [SealStatus.SEALED] * 3
    assert not rig.troubles
    rig.store.close()
    with BlockStore.open(tmp_path, CONFIG, device=rig.device) as store:
        assert len(store.get(namespace.id, chain(3, 5000))) == 3
        assert store.recovered.dropped == 0


def test_a_group_whose_commit_is_in_doubt_is_deleted_before_its_slots_are_used_again(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespace: Namespace
) -> None:
    rig.put(chain(1))
    apply = rig.store._index.apply

    def commit_and_fail(deletes: Any, puts: Any, reached: Any) -> None:
        apply(deletes, puts, reached)
        if puts:
            raise OSError(errno.EIO, "the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(rig.store._index, "apply", commit_and_fail)
        assert rig.store._committer.await_told(0.3)
        assert rig.put(chain(2, 7000)) == [SealStatus.FAILED] * 2
    rig.later(2)
    rig.store.close()
    with BlockStore.open(tmp_path, CONFIG, device=rig.device) as store:
        assert store.get(namespace.id, chain(2, 7000)) == []
        assert store.recovered.dropped == 0


def test_one_failed_flush_costs_no_other_block(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    """There is one segment, so there is no other place; nor is there one in it."""
    device = FaultDevice(MemoryDevice(), FaultPlan())
    config = replace(CONFIG, disk_bytes=4 << 20, segment_bytes=4 << 20)
    with BlockStore.open(tmp_path, config, device=device) as store:
        space = store.open_namespace(namespace)

        def put(first: int) -> object:
            (block,) = chain(1, first)
            return store.put(space, [block], [b""], [content(block, SIZE)])[0]

        for turn in range(20):
            put(10_000 * turn)
        before = store.stats().blocks
        device.plan.sync_error = 1.0
        assert put(900_000) is SealStatus.FAILED
        device.plan.sync_error = 0.0
        assert store.stats().blocks >= before - 1, "only who made way for it has left"
        for turn in range(30):
            assert put(1_000_000 + 10_000 * turn) is SealStatus.SEALED, "all may leave again"


def test_the_breaker_opens_after_some_failures_within_its_window_only() -> None:
    breaker = SegmentBreaker()
    for n in range(FAILURES_MAX - 1):
        assert not breaker.failed(7, n * (WINDOW_S / FAILURES_MAX))
    assert not breaker.failed(7, 10 * WINDOW_S), "the others are long ago"
    for n in range(FAILURES_MAX - 2):
        assert not breaker.failed(7, 10 * WINDOW_S + n)
    assert breaker.failed(7, 10 * WINDOW_S + 5)
    assert breaker.out == (7,)
    assert not breaker.failed(7, 10 * WINDOW_S + 6), "it is out already"


def test_the_breaker_tries_again_and_doubles_its_pause() -> None:
    breaker = SegmentBreaker()
    now = 0.0
    for _ in range(FAILURES_MAX):
        breaker.failed(1, now)
    for pause in (PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S):
        assert breaker.due(now + pause - 1) == []
        now += pause
        assert breaker.due(now) == [1]
        assert breaker.out == ()
        assert breaker.failed(1, now), "one failure is enough on trial"
    breaker.forget(1)
    assert breaker.out == ()


def test_a_trouble_with_an_end_goes_by_itself() -> None:
    board = HealthBoard()
    board.note(Trouble.ROT, "one", until=10)
    board.note(Trouble.INDEX, "two")
    assert board.snapshot(9).reason == "index: two; rot: one"
    assert board.snapshot(10).reason == "index: two"
    board.clear(Trouble.INDEX)
    board.clear(Trouble.INDEX)
    assert not board.snapshot(11).degraded

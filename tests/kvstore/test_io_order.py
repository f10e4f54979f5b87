"""Whose bytes move next: the pure order, the gate where threads wait, and read-ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.device import MemoryDevice
from dualpath.kvstore.io_gate import IoGate
from dualpath.kvstore.io_order import BUSY_BYTES, SAVE_WAIT_S_MAX, IoClass, IoOrder
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import TIERS, Tier
from dualpath.kvstore.transfer_batch import UNDER_WAY
from hypothesis import given
from hypothesis import strategies as st

MIB = 1 << 20
LOAD, SAVE, BACKGROUND = IoClass.LOAD, IoClass.SAVE, IoClass.BACKGROUND


# The order


def test_an_idle_device_lets_everybody_begin() -> None:
    order = IoOrder()
    assert all(order.may_begin(kind, 0) for kind in IoClass)


def test_loads_never_wait() -> None:
    order = IoOrder()
    for _ in range(100):
        order.begin(LOAD, MIB)
        order.begin(SAVE, MIB)
        assert order.may_begin(LOAD, 0)


def test_a_few_loads_do_not_hold_up_saves_and_many_do() -> None:
    order = IoOrder()
    order.begin(LOAD, BUSY_BYTES - 1)
    order.begin(SAVE, MIB)
    assert order.may_begin(SAVE, 0)
    order.begin(LOAD, 1)
    order.begin(SAVE, MIB)
    assert not order.may_begin(SAVE, 0)
    assert order.may_begin(SAVE, SAVE_WAIT_S_MAX)


def test_background_waits_for_everybody() -> None:
    order = IoOrder()
    order.begin(LOAD, 1)
    assert not order.may_begin(BACKGROUND, 100)
    order.end(LOAD, 1, 0)
    order.wait_begin(SAVE)
    assert not order.may_begin(BACKGROUND, 100)
    order.wait_end(SAVE)
    order.begin(SAVE, 1)
    assert not order.may_begin(BACKGROUND, 100)
    order.end(SAVE, 1, 0)
    assert order.may_begin(BACKGROUND, 0)


@given(
    st.lists(st.integers(1, 2 * MIB), min_size=5, max_size=20),
    st.integers(MIB, 4 * MIB),
    st.sampled_from([0.05, 0.2]),
)
def test_beside_endless_loads_saves_move_their_floor_and_no_more(
    loads: list[int], save: int, floor: float
) -> None:
    order = IoOrder(floor)
    order.begin(LOAD, BUSY_BYTES)
    moved = {LOAD: 0, SAVE: 0}
    for nbytes in loads * 50:
        order.begin(LOAD, nbytes)
        order.end(LOAD, nbytes, 0)
        moved[LOAD] += nbytes
        if order.may_begin(SAVE, 0):
            order.begin(SAVE, save)
            order.end(SAVE, save, 0)
            moved[SAVE] += save
    wanted = floor * (moved[LOAD] + moved[SAVE])
    # Whole transfers, and one at most per load.
    assert moved[SAVE] <= wanted + save
    assert moved[SAVE] >= wanted - save


def test_what_saves_earn_is_bounded() -> None:
    order = IoOrder()
    for _ in range(1000):
        order.begin(LOAD, 64 * MIB)
        order.end(LOAD, 64 * MIB, 0)
    order.begin(LOAD, BUSY_BYTES)
    saved = 0
    while order.may_begin(SAVE, 0):
        order.begin(SAVE, MIB)
        order.end(SAVE, MIB, 0)
        saved += 1
    assert saved <= 20


def test_the_time_to_retry_is_what_the_loads_under_way_take() -> None:
    order = IoOrder()
    assert order.retry_after_s() == 0.1
    for tick in range(20):
        order.begin(LOAD, 10 * MIB)
        order.end(LOAD, 10 * MIB, tick / 10)
    order.begin(LOAD, 20 * MIB)
    assert order.retry_after_s() == pytest.approx(0.2, rel=0.3)
    order.begin(LOAD, 10_000 * MIB)
    assert order.retry_after_s() == 1.0


# The gate


class Reads:
    """A batch whose items end when a test says so. Implements BatchProgress."""

    def __init__(self, items: int) -> None:
        self.errors = np.full(items, UNDER_WAY, np.int32)
        self.ended: list[int] = []
        self.pending = items

    def end(self, *items: int) -> None:
        self.ended += items

    def wait(self, timeout_s: float, least: int = 1) -> np.ndarray:
        items, self.ended = self.ended, []
        self.errors[items] = 0
        self.pending -= len(items)
        return np.array(items, np.int32)

    def cancel(self) -> None:
        self.end(*np.flatnonzero(self.errors == UNDER_WAY).tolist())


def test_a_save_begins_when_the_loads_have_ended() -> None:
    gate, reads = IoGate(clock=lambda: 0.0), Reads(2)
    counted = gate.counted(reads, np.array([BUSY_BYTES, MIB]), LOAD)
    assert gate.try_save(MIB)  # the first one has nothing to pay off
    gate.end_save(MIB)
    assert not gate.try_save(MIB)
    began = threading.Event()

    def save() -> None:
        gate.begin_save(MIB)
        began.set()
        gate.end_save(MIB)

    thread = threading.Thread(target=save)
    thread.start()
    assert not began.wait(0.1)
    assert not gate.await_quiet(0)
    reads.end(0)
    assert counted.wait(0).tolist() == [0]
    assert began.wait(10)
    thread.join(10)
    counted.cancel()
    counted.wait(0)
    assert counted.pending == 0
    assert gate.await_quiet(1)


def test_a_save_beside_loads_that_stand_still_waits_for_a_bounded_time() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += SAVE_WAIT_S_MAX / 4
        return now[0]

    gate = IoGate(clock=clock)
    gate.counted(Reads(1), np.array([BUSY_BYTES]), LOAD)
    for _ in range(3):
        gate.begin_save(64 * MIB)
        gate.end_save(64 * MIB)
    assert now[0] > SAVE_WAIT_S_MAX


# Read-ahead

LAYOUT = KVLayout(layers=2, block_tokens=1, layer_bytes=150_000, dtype="u8")
BLOCKS = 24


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


class Rig:
    """A store that has forgotten its copies in DRAM."""

    def __init__(self, path: Path, **changes: object) -> None:
        values: dict[str, object] = {
            "disk_bytes": 64 * MIB,
            "dram_bytes": 32 * MIB,
            "segment_bytes": 16 * MIB,
            "read_buffers_bytes": 8 * MIB,
            "read_ahead_bytes": 4 * MIB,
            "prefault": False,
            **changes,
        }
        config = StoreConfig(**values)  # type: ignore[arg-type]
        device = MemoryDevice()
        namespace = Namespace(model="m", layout=LAYOUT)
        self.hashes = list(chain_hashes(list(range(BLOCKS)), 1))
        with BlockStore.open(path, config, device=device) as store:
            data = [bytes([at]) * LAYOUT.block_bytes for at in range(BLOCKS)]
            space = store.open_namespace(namespace)
            store.put(space, self.hashes, parents_of(self.hashes), data)
        self.store = BlockStore.open(path, config, device=device)
        self.space = self.store.open_namespace(namespace)
        self.lease = self.store.lookup(self.space, self.hashes, owner="o", lease_s=60).lease_id

    def resident(self) -> list[int]:
        hit = self.store.lookup(self.space, self.hashes, owner="o", lease_s=0)
        return [at for at, code in enumerate(hit.tiers.tolist()) if TIERS[code] is Tier.DRAM]

    def fetch(self, *blocks: int) -> None:
        chunks = LAYOUT.chunk_count
        batch = self.store.fetch_batch(
            self.lease, np.repeat(blocks, chunks), np.tile(np.arange(chunks), len(blocks))
        )
        assert batch.ok
        for block, offset in zip(np.repeat(blocks, chunks), batch.offsets, strict=True):
            assert batch.region.view[int(offset)] == block
        batch.release()

    def quiet(self) -> bool:
        ahead = self.store._ahead
        assert ahead is not None
        return not ahead._wanted

    def close(self) -> None:
        self.store.close()


@pytest.fixture
def rigs() -> Iterator[list[Rig]]:
    made: list[Rig] = []
    yield made
    for rig in made:
        rig.close()


def test_what_follows_the_first_blocks_is_brought_into_dram(
    tmp_path: Path, rigs: list[Rig]
) -> None:
    rig = Rig(tmp_path)
    rigs.append(rig)
    assert rig.resident() == []
    rig.fetch(0, 1)
    ahead = 4 * MIB // LAYOUT.slot_bytes
    assert until(lambda: rig.resident() == list(range(2 + ahead)))
    # The bytes are right, and the window moves on with what is asked for.
    rig.fetch(*range(2, 2 + ahead))
    rig.fetch(2 + ahead)
    assert until(lambda: rig.resident()[-1] == min(BLOCKS - 1, 2 + 2 * ahead))
    rig.fetch(*range(BLOCKS))


def test_nothing_is_read_ahead_unless_it_is_asked_for(tmp_path: Path, rigs: list[Rig]) -> None:
    rig = Rig(tmp_path, read_ahead_bytes=0)
    rigs.append(rig)
    assert rig.store._ahead is None
    rig.fetch(0)
    assert rig.resident() == [0]


def test_at_most_an_eighth_of_dram_is_filled_ahead(tmp_path: Path, rigs: list[Rig]) -> None:
    rig = Rig(tmp_path, read_ahead_bytes=64 * MIB, dram_bytes=16 * MIB)
    rigs.append(rig)
    rig.fetch(0)
    assert until(lambda: rig.quiet() and len(rig.resident()) > 1)
    assert len(rig.resident()) <= 1 + 2 * MIB // LAYOUT.slot_bytes


def test_it_ends_with_the_lease(tmp_path: Path, rigs: list[Rig]) -> None:
    rig = Rig(tmp_path)
    rigs.append(rig)
    gate = rig.store._state.io
    # Loads are under way: read-ahead does not get its turn.
    held = Reads(1)
    counted = gate.counted(held, np.array([1]), LOAD)
    rig.fetch(0)
    rig.store.release(rig.lease, owner="o")
    held.end(0)
    counted.wait(0)
    assert until(rig.quiet)
    assert rig.resident() == [0]


def test_a_store_closes_while_it_reads_ahead(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.fetch(0)
    rig.close()
    assert rig.store._ahead is not None
    assert not rig.store._ahead._thread.is_alive()

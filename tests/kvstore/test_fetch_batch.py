"""Many chunks at once: the right bytes, failures that stay alone, and memory that nobody shares
while the device may still write to it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.device import Device, MemoryDevice
from dualpath.kvstore.fault_device import FaultDevice, FaultPlan
from dualpath.kvstore.fetched_batch import FetchedBatch, FetchStatus
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.read_buffers import FRAME_BYTES, ReadBuffers
from dualpath.kvstore.store_api import SealStatus, Tier
from dualpath.kvstore.store_health import Trouble
from dualpath.kvstore.transfer_batch import UNDER_WAY, BatchProgress, TransferBatch
from dualpath.transfer.errors import InvalidRequest, LeaseExpired, Overloaded, Unavailable
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Content = Callable[[bytes, int], bytes]
OWNER = "reader"
LAYOUT = KVLayout(layers=7, block_tokens=16, layer_bytes=150_000, dtype="bf16")
"""1,050,000 bytes: four chunks of 256 KiB and a tail of 1,424 bytes."""
BLOCKS = 6


@pytest.fixture
def space() -> Namespace:
    return Namespace(model="batch@1", layout=LAYOUT)


def config(**changes: object) -> StoreConfig:
    values: dict[str, object] = {
        "disk_bytes": 32 << 20,
        "dram_bytes": 16 << 20,
        "segment_bytes": 8 << 20,
        "read_buffers_bytes": 8 << 20,
        "promote": False,
        "read_buffer_wait_s": 0.05,
    }
    return StoreConfig(**(values | changes))  # type: ignore[arg-type]


HASHES = chain_hashes(range(16 * BLOCKS), 16)


class Cold:
    """A store that has just been opened: every block is on SSD only."""

    def __init__(
        self,
        path: Path,
        space: Namespace,
        content: Content,
        settings: StoreConfig,
        device: Device | None = None,
    ) -> None:
        self.content = [content(key, LAYOUT.block_bytes) for key in HASHES]
        with BlockStore.open(path, settings, device=device) as store:
            sealed = store.put(
                store.open_namespace(space), HASHES, parents_of(HASHES), self.content
            )
            assert set(sealed) == {SealStatus.SEALED}
        self.store = BlockStore.open(path, settings, device=device)
        self.space = self.store.open_namespace(space)
        self.lease = self.look()

    def look(self) -> int:
        return self.store.lookup(self.space, HASHES, owner=OWNER, lease_s=60).lease_id

    def hits(self) -> int:
        return self.store.lookup(self.space, HASHES, owner=OWNER, lease_s=0).blocks

    def all(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        count = LAYOUT.chunk_count
        return (
            np.repeat(np.arange(BLOCKS, dtype=np.int32), count),
            np.tile(np.arange(count, dtype=np.int32), BLOCKS),
        )

    def expected(self, block: int, chunk: int) -> bytes:
        offset, nbytes = LAYOUT.chunk_extent(chunk)
        return self.content[block][offset : offset + nbytes]

    def check(
        self, batch: FetchedBatch, blocks: NDArray[np.int32], chunks: NDArray[np.int32]
    ) -> None:
        for item in range(len(batch)):
            if batch.status[item] != FetchStatus.OK:
                continue
            start = int(batch.offsets[item])
            found = batch.region.view[start : start + int(batch.nbytes[item])]
            assert found == self.expected(int(blocks[item]), int(chunks[item])), item

    def idle(self) -> None:
        """Nothing is pinned, held or marked any more."""
        state = self.store._state
        assert not state.table.pins.any()
        assert not state.table.reading.any()
        assert state.dram.buffers.used_bytes == 0

    def close(self) -> None:
        self.store.close()


@pytest.fixture
def cold(tmp_path: Path, space: Namespace, content: Content) -> Iterator[Cold]:
    cold = Cold(tmp_path, space, content, config())
    yield cold
    cold.close()


@pytest.mark.parametrize("io", ["auto", "psync"])
@pytest.mark.parametrize("promote", [False, True])
@pytest.mark.parametrize("verify", [False, True])
def test_every_chunk_of_a_batch_has_its_own_bytes(
    tmp_path: Path, space: Namespace, content: Content, io: str, promote: bool, verify: bool
) -> None:
    cold = Cold(tmp_path, space, content, config(io=io, promote=promote))
    blocks, chunks = cold.all()
    for _ in range(2):
        with cold.store.fetch_batch(cold.lease, blocks, chunks, verify=verify) as batch:
            assert len(batch) == len(blocks)
            assert batch.ok
            cold.check(batch, blocks, chunks)
    read = cold.store.stats().read_bytes
    whole = BLOCKS * LAYOUT.block_bytes
    assert read[Tier.SSD] == (whole if promote else 2 * whole)
    assert read[Tier.DRAM] == (whole if promote else 0)
    cold.idle()
    cold.close()


def test_any_order_and_any_choice_is_served_and_repeats_have_memory_of_their_own(
    cold: Cold,
) -> None:
    dice = np.random.default_rng(3)
    for promote in (False, True):
        object.__setattr__(cold.store._state.config, "promote", promote)
        for _ in range(20):
            count = int(dice.integers(1, 20))
            blocks = dice.integers(0, BLOCKS, count).astype(np.int32)
            chunks = dice.integers(0, LAYOUT.chunk_count, count).astype(np.int32)
            with cold.store.fetch_batch(cold.lease, blocks, chunks, verify=True) as batch:
                assert batch.ok
                cold.check(batch, blocks[: len(batch)], chunks[: len(batch)])
    cold.idle()


def test_chunks_are_told_as_they_arrive_and_given_back_one_by_one(cold: Cold) -> None:
    blocks, chunks = cold.all()
    batch = cold.store.fetch_batch(cold.lease, blocks, chunks, verify=True, wait=False)
    told: list[int] = []
    while len(items := batch.arrived(10.0)):
        told += items.tolist()
        assert (batch.status[items] == FetchStatus.OK).all()
        for item in items.tolist():
            start = int(batch.offsets[item])
            found = batch.region.view[start : start + int(batch.nbytes[item])]
            assert found == cold.expected(int(blocks[item]), int(chunks[item]))
        batch.release(items)
    assert sorted(told) == list(range(len(batch)))
    cold.idle()
    batch.release()
    batch.release(np.array([0], np.int32))
    cold.idle()


def test_a_batch_that_is_given_up_leaves_nothing_behind(cold: Cold) -> None:
    blocks, chunks = cold.all()
    for _ in range(5):
        cold.store.fetch_batch(cold.lease, blocks, chunks, wait=False).release()
    cold.store.stats()
    cold.idle()
    assert cold.hits() == BLOCKS
    with cold.store.fetch_batch(cold.lease, blocks, chunks, verify=True) as batch:
        cold.check(batch, blocks, chunks)


def test_a_batch_is_cut_where_the_buffers_end_and_waits_for_the_first_only(
    tmp_path: Path, space: Namespace, content: Content
) -> None:
    cold = Cold(tmp_path, space, content, config(read_buffers_bytes=2 * FRAME_BYTES))
    blocks, chunks = cold.all()
    batch = cold.store.fetch_batch(cold.lease, blocks, chunks, verify=True)
    assert 0 < len(batch) < len(blocks)
    assert batch.ok
    cold.check(batch, blocks, chunks)
    with pytest.raises(Overloaded, match="read_buffers_bytes"):
        cold.store.fetch_batch(cold.lease, blocks[-5:], chunks[-5:])
    timer = threading.Timer(0.01, batch.release)
    object.__setattr__(cold.store._state.config, "read_buffer_wait_s", 20.0)
    timer.start()
    with cold.store.fetch_batch(cold.lease, blocks[-5:], chunks[-5:], verify=True) as late:
        cold.check(late, blocks[-5:], chunks[-5:])
    timer.join()
    done = 0
    while done < len(blocks):
        with cold.store.fetch_batch(cold.lease, blocks[done:], chunks[done:]) as part:
            done += len(part)
    cold.idle()
    cold.close()


def test_wrong_requests_are_named(cold: Cold) -> None:
    fetch = cold.store.fetch_batch
    with pytest.raises(InvalidRequest, match=r"covers blocks 0\.\.5, not block 6"):
        fetch(cold.lease, [0, 6], [0, 0])
    with pytest.raises(InvalidRequest, match="not block -1"):
        fetch(cold.lease, [-1], [0])
    with pytest.raises(InvalidRequest, match=r"chunk 5 is outside of 0\.\.4"):
        fetch(cold.lease, [0, 0], [0, 5])
    with pytest.raises(InvalidRequest, match="as many"):
        fetch(cold.lease, [0, 1], [0])
    with pytest.raises(InvalidRequest, match="at least one"):
        fetch(cold.lease, [], [])
    with pytest.raises(LeaseExpired):
        fetch(cold.lease + 1, [0], [0])
    cold.idle()


def test_a_read_error_drops_its_block_and_the_other_chunks_stand(
    tmp_path: Path, space: Namespace, content: Content
) -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan(seed=5))
    cold = Cold(tmp_path, space, content, config(), device)
    device.plan.read_error = 0.3
    blocks, chunks = cold.all()
    with cold.store.fetch_batch(cold.lease, blocks, chunks, verify=True) as batch:
        cold.check(batch, blocks, chunks)
        bad = set(blocks[batch.status == FetchStatus.CORRUPT].tolist())
        assert bad
        assert len(bad) < BLOCKS
    device.plan.read_error = 0.0
    assert cold.hits() == min(bad)
    with cold.store.fetch_batch(cold.lease, blocks, chunks) as batch:
        dropped = batch.status == FetchStatus.CORRUPT
        assert set(blocks[dropped].tolist()) == set(range(min(bad), BLOCKS))
        cold.check(batch, blocks, chunks)
    cold.idle()
    cold.close()


def test_bytes_that_rotted_on_the_way_are_read_again_and_served_right(
    tmp_path: Path, space: Namespace, content: Content
) -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan(seed=6))
    cold = Cold(tmp_path, space, content, config(), device)
    device.plan.rot = 0.2
    blocks, chunks = cold.all()
    for _ in range(10):
        with cold.store.fetch_batch(cold.lease, blocks, chunks, verify=True) as batch:
            cold.check(batch, blocks, chunks)
    cold.idle()
    cold.close()


@pytest.mark.parametrize("promote", [False, True])
def test_bytes_that_rotted_on_the_medium_are_never_served(
    tmp_path: Path, space: Namespace, content: Content, promote: bool
) -> None:
    memory = MemoryDevice()
    cold = Cold(tmp_path, space, content, config(promote=promote), FaultDevice(memory, FaultPlan()))
    victim = cold.expected(2, 1)
    for data in memory.files.values():
        if (at := data.find(victim)) >= 0:
            data[at + 1000] ^= 1
    blocks, chunks = cold.all()
    with cold.store.fetch_batch(cold.lease, blocks, chunks, verify=True) as batch:
        bad = np.flatnonzero(batch.status == FetchStatus.CORRUPT)
        assert [(int(blocks[i]), int(chunks[i])) for i in bad] == [(2, 1)]
        cold.check(batch, blocks, chunks)
    assert cold.hits() == 2
    cold.idle()
    assert "chunk 1 does not have its checksum" in cold.store.health().troubles[Trouble.ROT]
    cold.close()


def test_a_bit_that_flips_in_memory_is_put_right_from_the_medium(
    tmp_path: Path, space: Namespace, content: Content
) -> None:
    cold = Cold(tmp_path, space, content, config(promote=True))
    blocks, chunks = cold.all()
    with cold.store.fetch_batch(cold.lease, blocks, chunks) as batch:
        batch.region.view[int(batch.offsets[7]) + 77] ^= 4
    with cold.store.fetch_batch(cold.lease, blocks, chunks, verify=True) as batch:
        assert batch.ok
        cold.check(batch, blocks, chunks)
    assert cold.hits() == BLOCKS
    cold.close()


class Lagging(FaultDevice):
    """A device whose reads end only when they are let, also after a cancel."""

    def __init__(self) -> None:
        super().__init__(MemoryDevice(), FaultPlan())
        self.hold = False
        self.held: list[LaggingProgress] = []

    def read_batch(self, batch: TransferBatch) -> BatchProgress:  # type: ignore[override]
        inner = super().read_batch(batch)
        if not self.hold:
            return inner
        self.held.append(LaggingProgress(inner))
        return self.held[-1]


class LaggingProgress:
    def __init__(self, inner: BatchProgress) -> None:
        self._inner = inner
        self.errors = np.full(len(inner.errors), UNDER_WAY, np.int32)
        self.pending = len(self.errors)
        self.free = False
        self.cancelled = False

    def wait(self, timeout_s: float, least: int = 1) -> NDArray[np.int32]:
        if not self.free or not self.pending:
            threading.Event().wait(min(timeout_s, 0.01))
            return np.empty(0, np.int32)
        ended = self._inner.wait(timeout_s)
        self.errors[ended] = self._inner.errors[ended]
        self.pending -= len(ended)
        return ended

    def cancel(self) -> None:
        self.cancelled = True


def test_memory_of_a_read_that_never_ends_is_not_used_again_before_it_does(
    tmp_path: Path, space: Namespace, content: Content
) -> None:
    device = Lagging()
    lag = config(read_wait_s=0.05, read_buffers_bytes=8 << 20)
    cold = Cold(tmp_path, space, content, lag, device)
    blocks, chunks = cold.all()
    device.hold = True
    batch = cold.store.fetch_batch(cold.lease, blocks[:5], chunks[:5], verify=True)
    assert batch.status.tolist() == [FetchStatus.UNAVAILABLE] * 5
    assert device.held[0].cancelled
    with pytest.raises(Unavailable, match="did not answer") as caught:
        cold.store.fetch(cold.lease, 5, 0)
    assert caught.value.reason == "slow_device"
    device.hold = False
    stuck = batch.offsets.copy()
    batch.release()
    used = cold.store._state.dram.buffers.used_bytes
    assert used > 0
    with cold.store.fetch_batch(cold.lease, blocks, chunks, verify=True) as other:
        assert not set(other.offsets.tolist()) & set(stuck.tolist())
        cold.check(other, blocks, chunks)
    assert cold.store._state.table.pins.any()
    assert cold.hits() == BLOCKS
    for progress in device.held:
        progress.free = True
    while cold.store._state.table.pins.any():
        cold.store.stats()
    cold.idle()
    cold.close()


def test_a_slot_that_a_stuck_read_may_still_fill_is_not_filled_by_others(
    tmp_path: Path, space: Namespace, content: Content
) -> None:
    device = Lagging()
    cold = Cold(tmp_path, space, content, config(read_wait_s=0.05, promote=True), device)
    blocks, chunks = cold.all()
    device.hold = True
    stuck = cold.store.fetch_batch(cold.lease, [0, 0], [0, 1])
    device.hold = False
    with cold.store.fetch_batch(cold.lease, blocks, chunks, verify=True) as batch:
        assert batch.ok
        assert not set(batch.offsets.tolist()) & set(stuck.offsets.tolist())
        cold.check(batch, blocks, chunks)
    stuck.release()
    device.held[0].free = True
    while cold.store._state.table.pins.any():
        cold.store.stats()
    cold.idle()
    with cold.store.fetch_batch(cold.lease, blocks, chunks, verify=True) as batch:
        cold.check(batch, blocks, chunks)
    cold.close()


def test_an_expired_lease_and_a_dropped_block_do_not_take_memory_away(
    tmp_path: Path, space: Namespace, content: Content
) -> None:
    cold = Cold(tmp_path, space, content, config(promote=True))
    blocks, chunks = cold.all()
    batch = cold.store.fetch_batch(cold.lease, blocks, chunks, verify=True)
    cold.store.release(cold.lease, owner=OWNER)
    with cold.store._state.lock:
        from dualpath.kvstore.store_api import MissReason

        root = int(batch._parts.rows[0])
        assert cold.store._state.residency.drop(root, MissReason.CORRUPT) == BLOCKS
    cold.check(batch, blocks, chunks)
    batch.release(np.arange(3, dtype=np.int32))
    cold.check(batch, blocks, chunks)
    batch.release()
    cold.idle()
    assert cold.store.stats().blocks == 0
    cold.close()


def test_many_threads_read_the_same_blocks_at_once(cold: Cold) -> None:
    object.__setattr__(cold.store._state.config, "promote", True)
    object.__setattr__(cold.store._state.config, "read_buffer_wait_s", 30.0)
    blocks, chunks = cold.all()
    wrong: list[BaseException] = []

    def read(seed: int) -> None:
        dice = np.random.default_rng(seed)
        try:
            for _ in range(15):
                order = dice.permutation(len(blocks))[: int(dice.integers(1, len(blocks)))]
                mine, parts = blocks[order], chunks[order]
                with cold.store.fetch_batch(
                    cold.lease, mine, parts, verify=True, wait=bool(seed % 2)
                ) as batch:
                    batch.finish()
                    assert batch.ok
                    cold.check(batch, mine, parts)
        except BaseException as error:  # noqa: BLE001 - told by the test
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    cold.idle()


def test_a_device_that_takes_no_batch_fails_its_chunks_and_drops_nothing(
    cold: Cold, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(batch: TransferBatch) -> BatchProgress:
        raise OSError(errno.EBADF, "the file is closed")

    monkeypatch.setattr(cold.store._state.ssd.device, "read_batch", refuse)
    blocks, chunks = cold.all()
    with cold.store.fetch_batch(cold.lease, blocks, chunks) as batch:
        assert set(batch.status.tolist()) == {FetchStatus.UNAVAILABLE}
    monkeypatch.undo()
    cold.idle()
    assert cold.hits() == BLOCKS


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from([4096, 12288, 262144, 300000, 1 << 20])),
        max_size=40,
    ),
    st.data(),
)
def test_read_buffers_never_overlap_and_all_come_back(
    wishes: list[tuple[int, int]], data: st.DataObject
) -> None:
    base = 3 * 4096
    buffers = ReadBuffers(base, 6 * FRAME_BYTES + 5000)
    held: dict[int, int] = {}
    for count, nbytes in wishes:
        taken = buffers.take(count, nbytes)
        assert len(taken) <= count
        assert taken.tolist() == sorted(taken.tolist())
        for offset in taken.tolist():
            assert offset % 4096 == base % 4096
            assert base <= offset
            assert offset + nbytes <= base + buffers.capacity_bytes
            assert all(offset + nbytes <= at or offset >= at + size for at, size in held.items())
            held[offset] = nbytes
        assert buffers.used_bytes >= sum(held.values())
        back = data.draw(st.lists(st.sampled_from(sorted(held)), unique=True)) if held else []
        if back:
            for offset in back:
                del held[offset]
            buffers.give(np.array(back, np.int64))
    buffers.give(np.array(sorted(held), np.int64))
    assert buffers.used_bytes == 0
    assert len(buffers.take(7, 1 << 20)) == 6

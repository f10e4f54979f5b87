"""Writing many slots at once: each at its place, neighbours kept, failures told by segment."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
from dualpath.kvstore import data_pump, embedded
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.data_pump import DataPump, DataWrite
from dualpath.kvstore.device import Device, MemoryDevice
from dualpath.kvstore.fault_device import FaultDevice, FaultPlan
from dualpath.kvstore.header_writer import HeaderWriter
from dualpath.kvstore.io_gate import IoGate
from dualpath.kvstore.io_order import BUSY_BYTES, IoClass
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.psync_device import PsyncDevice
from dualpath.kvstore.record import BlockRecord
from dualpath.kvstore.segment import SegmentGeometry, read_headers
from dualpath.kvstore.slot_items import WriteFailure
from dualpath.kvstore.ssd_tier import SsdTier, segment_name
from dualpath.kvstore.store_api import SealStatus
from dualpath.kvstore.transfer_batch import SerialProgress, TransferBatch, read_one

SLOT = 64 << 10
WAIT_S = 20.0
SPACE = Namespace("m", KVLayout(1, 1, SLOT, "u8"))


class Rig:
    """Three small segments, and jobs for all their slots, scattered in memory."""

    def __init__(self, device: Device, seed: int = 0) -> None:
        dice = random.Random(seed)
        geometry = SegmentGeometry(SLOT, 30)
        self.ssd = SsdTier(device, 3 * geometry.file_bytes, geometry.file_bytes)
        places = []
        while (place := self.ssd.take(SLOT)) is not None:
            places.append(place)
        for segment in {segment for segment, _ in places}:
            self.ssd.ensure(segment)
        self.memory = memoryview(bytearray(dice.randbytes(len(places) * SLOT)))
        order = list(range(len(places)))
        dice.shuffle(order[10:])
        self.jobs = [self._job(at * SLOT, *place) for at, place in zip(order, places, strict=True)]
        dice.shuffle(self.jobs)

    @staticmethod
    def _job(at: int, segment: int, slot: int) -> CommitJob:
        name = f"{segment} {slot}".encode().ljust(16, b".")
        record = BlockRecord(SPACE.id, name, b"", SLOT, segment, slot, 1, (7,), "w" * slot, 0.0)
        return CommitJob(slot, -1, record, SPACE, at, SLOT, record.to_bytes())

    def stored(self, job: CommitJob) -> bool:
        found = memoryview(bytearray(SLOT))
        self.ssd.read(*job.place, 0, found)
        return found == self.memory[job.at : job.at + SLOT]


def write(rig: Rig, jobs: list[CommitJob]) -> list[tuple[int, int]]:
    """(segment, jobs) of each failure."""
    pump = DataPump(rig.ssd.device, IoGate(), threading.Condition())
    pump.start()
    one = DataWrite(rig.ssd, rig.memory, jobs)
    pump.begin(one)
    failures = pump.finish(one)
    assert pump.finish(one) == failures
    pump.close()
    return [(failure.segment, len(failure.jobs)) for failure in failures]


@pytest.mark.parametrize("seed", range(3))
def test_every_block_lands_in_its_slot(tmp_path: Path, seed: int) -> None:
    for device in (MemoryDevice(), PsyncDevice(tmp_path, direct=False)):
        rig = Rig(device, seed)
        half = rig.jobs[: len(rig.jobs) // 2]
        assert write(rig, half) == []
        assert all(map(rig.stored, half))
        assert not any(map(rig.stored, rig.jobs[len(half) :]))
        rig.ssd.close()
        device.close()


def test_nothing_to_write_is_no_failure() -> None:
    rig = Rig(MemoryDevice())
    assert write(rig, []) == []
    assert HeaderWriter(rig.ssd, 8).write([]) == []


def test_a_segment_that_fails_fails_its_own_blocks_only() -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan())
    rig = Rig(device)
    device.plan.unwritable.add(segment_name(1))
    failures = write(rig, rig.jobs)
    assert {segment for segment, _ in failures} == {1}
    assert sum(jobs for _, jobs in failures) == 30
    assert all(rig.stored(job) for job in rig.jobs if job.record.segment != 1)
    headers = HeaderWriter(rig.ssd, len(rig.jobs)).write(rig.jobs)
    assert {failure.segment for failure in headers} == {1}
    assert {job.place for failure in headers for job in failure.jobs} == {(1, n) for n in range(30)}


def test_a_header_whose_page_cannot_be_read_fails_and_the_others_are_written() -> None:
    inner = MemoryDevice()
    device = FaultDevice(inner, FaultPlan())
    rig = Rig(device)
    device.plan.unreadable.add(segment_name(0))
    wanted = [job for job in rig.jobs if job.record.slot in (1, 2, 9) and job.record.segment < 2]
    failures = HeaderWriter(rig.ssd, len(rig.jobs)).write(wanted)
    assert {job.place for failure in failures for job in failure.jobs} == {(0, 1), (0, 2), (0, 9)}
    written = read_headers(inner.open(segment_name(1)), SegmentGeometry(SLOT, 30))
    assert [header.slot for header in written] == [1, 2, 9]


def test_headers_of_neighbours_are_kept_and_longer_ones_overwritten() -> None:
    device = MemoryDevice()
    rig = Rig(device)
    writer, geometry = HeaderWriter(rig.ssd, len(rig.jobs)), SegmentGeometry(SLOT, 30)
    rig.jobs.sort(key=lambda job: job.place)
    for start in (0, 1, 2):
        assert writer.write(rig.jobs[start::3]) == []
    for segment in range(3):
        headers = list(read_headers(device.open(segment_name(segment)), geometry))
        assert headers == [job.record for job in rig.jobs[30 * segment : 30 * (segment + 1)]]
    again = rig.jobs[29]
    again.encoded = Rig._job(0, 0, 29).record.to_bytes()[:100]
    assert writer.write([again]) == []
    at = geometry.header_page(29)[0] + geometry.header_page(29)[1]
    assert device.files[segment_name(0)][at : at + 1024] == again.encoded.ljust(1024, b"\0")


def test_writes_follow_each_other_and_each_tells_its_own_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_pump, "PART_BYTES", 4 * SLOT)
    monkeypatch.setattr(data_pump, "WRITE_BYTES", SLOT)
    device = FaultDevice(MemoryDevice(), FaultPlan())
    rig = Rig(device)
    device.plan.unwritable.add(segment_name(2))
    pump = DataPump(device, IoGate(), threading.Condition())
    writes = [
        DataWrite(rig.ssd, rig.memory, rig.jobs[start : start + 9]) for start in range(0, 90, 9)
    ]
    assert all(len(one.parts) == 3 for one in writes)
    for one in writes:
        pump.begin(one)
    pump.start()
    told: list[WriteFailure] = [failure for one in writes for failure in pump.finish(one)]
    pump.close()
    failed = {job.place for failure in told for job in failure.jobs}
    assert failed == {(2, slot) for slot in range(30)}
    assert all(rig.stored(job) for job in rig.jobs if job.place not in failed)


class Blurting(MemoryDevice):
    """Raises what no device may, once."""

    def __init__(self) -> None:
        super().__init__()
        self.blurts = True

    def write_batch(self, batch: TransferBatch) -> SerialProgress:
        if self.blurts:
            self.blurts = False
            raise ValueError("out of the blue")
        return super().write_batch(batch)


def test_a_surprise_fails_its_part_and_the_pump_goes_on() -> None:
    device = Blurting()
    rig = Rig(device)
    pump = DataPump(device, IoGate(), threading.Condition())
    pump.start()
    for failing, jobs in ((True, rig.jobs[:9]), (False, rig.jobs)):
        one = DataWrite(rig.ssd, rig.memory, jobs)
        pump.begin(one)
        failed = [job for failure in pump.finish(one) for job in failure.jobs]
        assert len(failed) == (9 if failing else 0)
    assert all(map(rig.stored, rig.jobs))
    pump.close()


def test_a_write_waits_for_its_turn_beside_loads() -> None:
    rig = Rig(MemoryDevice())
    turns = Turns()
    page = np.zeros(1, np.int64)
    batch = TransferBatch([], page.astype(np.int32), page, rig.memory, page, page)
    turns.counted(SerialProgress(batch, read_one), np.array([BUSY_BYTES]), IoClass.LOAD)
    assert turns.try_save(64 << 20)  # from now on saves are in debt
    turns.end_save(64 << 20)
    pump = DataPump(rig.ssd.device, turns, threading.Condition())
    pump.start()
    one = DataWrite(rig.ssd, rig.memory, rig.jobs)
    pump.begin(one)
    assert turns.asked.wait(WAIT_S)
    assert not any(map(rig.stored, rig.jobs))
    turns.go.set()
    assert pump.finish(one) == []
    assert all(map(rig.stored, rig.jobs))
    pump.close()


class Turns(IoGate):
    """Tells when a save waits for its turn, and lets it wait until `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()
        self.go = threading.Event()

    def begin_save(self, nbytes: int) -> None:
        self.asked.set()
        assert self.go.wait(WAIT_S)
        super().begin_save(nbytes)


# Puts in parts

BLOCK = 300_000
LAYOUT = KVLayout(layers=2, block_tokens=1, layer_bytes=BLOCK // 2, dtype="u8")


@pytest.mark.parametrize("durable", [True, False])
def test_a_put_of_many_parts_in_little_memory_stores_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    monkeypatch.setattr(embedded, "_PART_BYTES", 3 * BLOCK)
    config = StoreConfig(disk_bytes=64 << 20, dram_bytes=3 << 20, segment_bytes=8 << 20)
    hashes = chain_hashes(range(60), 1)
    data = [random.Random(n).randbytes(BLOCK) for n in range(60)]
    with BlockStore.open(tmp_path, config) as store:
        space = store.open_namespace(Namespace("m", LAYOUT))
        answers = store.put(space, hashes, parents_of(hashes), data, durable=durable)
        assert set(answers) == {SealStatus.SEALED}
        assert store.get(space, hashes) == data
    with BlockStore.open(tmp_path, config) as store:
        space = store.open_namespace(Namespace("m", LAYOUT))
        assert store.get(space, hashes) == data


@pytest.mark.parametrize("seed", range(4))
def test_what_a_put_in_parts_calls_sealed_survives_failing_writes_as_a_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(embedded, "_PART_BYTES", 2 * BLOCK)
    config = StoreConfig(disk_bytes=64 << 20, dram_bytes=4 << 20, segment_bytes=8 << 20)
    device = FaultDevice(MemoryDevice(), FaultPlan(seed=seed))
    hashes = chain_hashes(range(24), 1)
    data = [random.Random(n).randbytes(BLOCK) for n in range(24)]
    with BlockStore.open(tmp_path, config, device=device) as store:
        space = store.open_namespace(Namespace("m", LAYOUT))
        device.plan.write_error = 0.2
        answers = store.put(space, hashes, parents_of(hashes), data)
        device.plan.write_error = 0.0
        sealed = (
            [status is SealStatus.SEALED for status in answers].index(False, 0)
            if (set(answers) != {SealStatus.SEALED})
            else len(hashes)
        )
        assert not any(status is SealStatus.SEALED for status in answers[sealed:])
    device.crash()
    with BlockStore.open(tmp_path, config, device=device) as store:
        space = store.open_namespace(Namespace("m", LAYOUT))
        assert store.get(space, hashes) == data[:sealed]

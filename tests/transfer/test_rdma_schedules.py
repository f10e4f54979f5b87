"""Seeded schedules of losses, stops, fences, deadlines and reconnections over simulated devices:
every write ends once, what landed is right, and fenced memory is never touched again."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field

import pytest
from dualpath.transfer.conformance_scene import READER, WAIT_S, WRITER, pattern
from dualpath.transfer.errors import Unavailable
from dualpath.transfer.lane import Lane
from dualpath.transfer.lane_marks import LaneMarks
from dualpath.transfer.rdma.config import RdmaConfig
from dualpath.transfer.rdma.rdma_transport import RdmaTransport
from dualpath.transfer.rdma.simulated_device import SimulatedDevice, SimulatedVerbs
from dualpath.transfer.rdma.simulated_fabric import SimulatedFabric
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.tcp_transport import TcpConfig
from dualpath.transfer.transport import Arrival, BatchCompletion, WriteBatch, WriteStatus

SEEDS = 60
STEPS = 30
PART = 40 << 10
PARTS = 24
CANARY = 0xC3


@dataclass
class Batch:
    """One batch: where it goes, what was heard of it, and which parts were fenced."""

    target: Region
    window: RegionDescriptor
    first_tag: int
    table: SliceTable
    ended: list[BatchCompletion] = field(default_factory=list)
    arrived: set[int] = field(default_factory=set)
    fenced: set[int] = field(default_factory=set)


class Schedule:
    """A writer and a reader, and somebody who disturbs them."""

    def __init__(self, seed: int, fabric: SimulatedFabric) -> None:
        self.draw = random.Random(seed)
        self.fabric = fabric
        windows = self.draw.random() < 0.7
        marks = self.draw.choice([LaneMarks(), LaneMarks((8, 8, 10, 12))])
        config = RdmaConfig(
            slots=self.draw.choice([1, 3, 32]),
            fragment_bytes=self.draw.choice([10_000, 100_000, 1 << 20]),
            fence_wait_s=self.draw.choice([0.005, 0.05]),
            withdraw_wait_s=0.05,
            grace_s=0.05,
            retries=2,
            set_up=TcpConfig(marks=marks),
        )
        self.writer, self.reader = (
            RdmaTransport(
                name,
                lambda *_: None,
                SimulatedVerbs(SimulatedDevice(fabric, name, memory_windows=windows)),
                config,
            )
            for name in (WRITER, READER)
        )
        self.address = self.writer.listen("127.0.0.1:0")
        self.source = Region.anonymous(2 * PARTS * PART)
        self.source.view[:] = pattern(self.source.nbytes)
        self.batches: list[Batch] = []
        self.changed = threading.Condition()

    def connect(self) -> None:
        try:
            self.reader.connect(WRITER, self.address, self.writer.invite(READER), deadline_s=WAIT_S)
        except Unavailable:  # a device is held just now, or the old connection was in the way
            return

    def write(self) -> None:
        """Arm a batch and write it."""
        target = Region.anonymous(2 * PARTS * PART)
        batch: Batch

        def on_arrival(arrival: Arrival) -> bool:
            batch.arrived.add(arrival.tag)
            return True

        def on_completion(completion: BatchCompletion) -> None:
            with self.changed:
                batch.ended.append(completion)
                self.changed.notify_all()

        window = self.reader.expose(target, 0, target.nbytes, on_arrival)
        first = self.draw.randrange(1 << 40)
        table = SliceTable(
            2 * PART,
            PARTS,
            PART // 2,
            [PART // 2 * (i % 2) for i in range(PARTS)],
            [i // 2 * PART for i in range(PARTS)],
            [PART] * PARTS,
        )
        batch = Batch(target, window, first, table)
        self.reader.arm_table(window, first, table)
        lane = self.draw.choice(list(Lane))
        deadline_s = self.draw.choice([0.005, WAIT_S, WAIT_S, WAIT_S])
        try:
            self.writer.write_batch(
                READER,
                WriteBatch(self.source, table, window, table, lane, first, deadline_s),
                on_completion,
            )
        except Unavailable:
            return
        self.batches.append(batch)

    def fence(self) -> None:
        """Fence some parts of a batch, and use their memory for something else."""
        if not self.batches:
            return
        batch = self.draw.choice(self.batches)
        chosen = self.draw.sample(range(PARTS), self.draw.randint(1, PARTS))
        tags = [batch.first_tag + part for part in chosen]
        if self.draw.random() < 0.3:
            self.reader.revoke(batch.window)
        else:
            self.reader.disarm(batch.window, tags)
        for part in chosen:
            batch.fenced.add(part)
            for at, nbytes in batch.table.part(part).pieces():
                batch.target.view[at : at + nbytes] = bytes((CANARY,)) * nbytes

    def disturb(self) -> None:
        """Something happens to the network."""
        device = self.draw.choice([WRITER, READER])
        kind = self.draw.randrange(4)
        if kind == 0:
            self.fabric.lose(device, self.draw.randint(1, 4))
        elif kind == 1:
            self.fabric.hold(device, after_writes=self.draw.randint(0, 5))
        elif kind == 2:
            self.fabric.release(device)
        elif self.draw.random() < 0.3:
            self.writer.disconnect(READER)

    def run(self) -> None:
        self.connect()
        for _ in range(STEPS):
            step = self.draw.choice([self.write, self.write, self.fence, self.disturb])
            step()
            if self.draw.random() < 0.2:
                self.fabric.release(WRITER)
                self.fabric.release(READER)
                if not any(each.connected for each in self.writer.traffic()):
                    self.connect()
        for device in (WRITER, READER):
            self.fabric.release(device)

    def judge(self) -> None:
        with self.changed:
            over = self.changed.wait_for(lambda: all(batch.ended for batch in self.batches), WAIT_S)
        assert over, "a write did not end"
        for batch in self.batches:
            self.reader.revoke(batch.window)
            assert len(batch.ended) == 1, batch.ended
            (ended,) = batch.ended
            for part in range(PARTS):
                tag = batch.first_tag + part
                if ended.status is WriteStatus.DONE and tag not in ended.refused:
                    assert tag in batch.arrived, "DONE without an arrival"
                for at, nbytes in batch.table.part(part).pieces():
                    found = bytes(batch.target.view[at : at + nbytes])
                    if part in batch.fenced:
                        assert found == bytes((CANARY,)) * nbytes, "a late write"
                    elif tag in batch.arrived:
                        assert found == bytes(self.source.view[at : at + nbytes]), "wrong bytes"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_happens_writes_end_once_and_fences_hold(seed: int) -> None:
    with SimulatedFabric() as fabric:
        schedule = Schedule(seed, fabric)
        try:
            schedule.run()
            schedule.judge()
        finally:
            for device in (WRITER, READER):
                fabric.release(device)
            schedule.writer.close()
            schedule.reader.close()

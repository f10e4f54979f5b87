"""Lanes that the network tells apart have queue pairs of their own, each marked as its lane is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from dualpath.transfer.conformance_scene import READER, WRITER, Recorder, Scene, TransportPair
from dualpath.transfer.lane import Lane
from dualpath.transfer.lane_marks import LaneMarks
from dualpath.transfer.rdma.config import RdmaConfig
from dualpath.transfer.rdma.rdma_transport import RdmaTransport
from dualpath.transfer.rdma.simulated_device import (
    SimulatedDevice,
    SimulatedQueuePair,
    SimulatedVerbs,
)
from dualpath.transfer.rdma.simulated_fabric import SimulatedFabric
from dualpath.transfer.rdma.verbs import CompletionQueue, QueueLimits, QueuePair, WorkRequest
from dualpath.transfer.region import Region
from dualpath.transfer.slices import Slices
from dualpath.transfer.tcp_transport import TcpConfig
from dualpath.transfer.transport import WriteStatus

KIB = 1 << 10
CONFIG = RdmaConfig(
    service_levels=(3, 3, 1, 0),
    set_up=TcpConfig(queue_bytes_max=32 << 20, marks=LaneMarks((26, 18, 18, 8))),
)
CLASSES = [(3, 26 << 2), (3, 18 << 2), (1, 18 << 2), (0, 8 << 2)]


class WatchedDevice(SimulatedDevice):
    """Notes the bytes that each of its queue pairs was given to write."""

    def __init__(self, fabric: SimulatedFabric, name: str) -> None:
        super().__init__(fabric, name)
        self.written: dict[tuple[int, int], int] = {}

    def queue_pair(self, queue: CompletionQueue, limits: QueueLimits, port: int) -> QueuePair:
        made = super().queue_pair(queue, limits, port)
        assert isinstance(made, SimulatedQueuePair)
        post = made.post_send

        def watched(requests: Sequence[WorkRequest]) -> None:
            assert made.path is not None
            kind = made.path.service_level, made.path.traffic_class
            nbytes = sum(piece.nbytes for each in requests if each.rkey for piece in each.pieces)
            self.written[kind] = self.written.get(kind, 0) + nbytes
            post(requests)

        made.post_send = watched  # type: ignore[method-assign]
        return made


def test_what_is_written_in_a_lane_goes_by_its_own_level_and_traffic_class() -> None:
    heard = Recorder(), Recorder()
    with SimulatedFabric() as fabric, ExitStack() as stack:
        device = WatchedDevice(fabric, WRITER)
        writer = RdmaTransport(WRITER, heard[0].on_lost, SimulatedVerbs(device), CONFIG)
        stack.callback(writer.close)
        other = SimulatedVerbs(SimulatedDevice(fabric, READER))
        reader = RdmaTransport(READER, heard[1].on_lost, other, CONFIG)
        stack.callback(reader.close)
        scene = Scene(
            TransportPair(writer, reader, "127.0.0.1:0", Region.anonymous, 32 << 20), *heard
        )
        scene.connect()
        paths = [
            pair.path
            for pair in fabric.pairs.values()
            if isinstance(pair, SimulatedQueuePair) and pair.device is device
        ]
        assert [(path.service_level, path.traffic_class) for path in paths if path] == CLASSES
        source, target = scene.source(64 * KIB), Region.anonymous(64 * KIB)
        window = scene.window(target)
        for index, lane in enumerate(Lane):
            slices, tag = Slices.contiguous(index * 8 * KIB, (index + 1) * KIB), scene.tag()
            reader.arm(window, [(tag, slices)])
            scene.write(source, window, slices, tag, lane=lane)
        assert scene.finish(len(Lane)) == [WriteStatus.DONE] * len(Lane)
        assert [device.written[each] for each in CLASSES] == [
            (index + 1) * KIB for index in range(len(Lane))
        ]

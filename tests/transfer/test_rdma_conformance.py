"""The rdma transport keeps the contract of the port, over simulated devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest
from dualpath.transfer.conformance import CHECKS, TransportPair
from dualpath.transfer.conformance_scene import READER, WRITER
from dualpath.transfer.lane_marks import LaneMarks
from dualpath.transfer.rdma.config import RdmaConfig
from dualpath.transfer.rdma.rdma_transport import RdmaTransport
from dualpath.transfer.rdma.simulated_device import SimulatedDevice, SimulatedVerbs
from dualpath.transfer.rdma.simulated_fabric import SimulatedFabric
from dualpath.transfer.region import Region
from dualpath.transfer.tcp_transport import TcpConfig
from dualpath.transfer.transport import OnPeerLost

QUEUE_BYTES_MAX = 32 << 20
DEFAULTS = RdmaConfig(set_up=TcpConfig(queue_bytes_max=QUEUE_BYTES_MAX))


@contextmanager
def simulated(
    writer_lost: OnPeerLost,
    reader_lost: OnPeerLost,
    *,
    config: RdmaConfig = DEFAULTS,
    memory_windows: bool = True,
) -> Iterator[TransportPair]:
    with SimulatedFabric() as fabric:

        def made(name: str, lost: OnPeerLost) -> RdmaTransport:
            device = SimulatedDevice(fabric, name, memory_windows=memory_windows)
            return RdmaTransport(name, lost, SimulatedVerbs(device), config)

        writer, reader = made(WRITER, writer_lost), made(READER, reader_lost)
        try:
            yield TransportPair(
                writer, reader, "127.0.0.1:0", lambda n: Region.memfd("test", n), QUEUE_BYTES_MAX
            )
        finally:
            writer.close()
            reader.close()


without_memory_windows = partial(simulated, memory_windows=False)
a_queue_pair_for_each_lane = partial(
    simulated,
    config=RdmaConfig(
        slots=4,
        fragment_bytes=300_001,
        set_up=TcpConfig(queue_bytes_max=QUEUE_BYTES_MAX, marks=LaneMarks((0, 8, 16, 24))),
    ),
)

MakePair = Callable[[OnPeerLost, OnPeerLost], AbstractContextManager[TransportPair]]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "make_pair",
    [
        pytest.param(simulated, id="simulated"),
        pytest.param(without_memory_windows, id="without_memory_windows"),
        pytest.param(a_queue_pair_for_each_lane, id="a_queue_pair_for_each_lane"),
    ],
)
def test_the_rdma_transport_keeps_the_contract(make_pair: MakePair, check: str) -> None:
    CHECKS[check](make_pair)

"""Every transport keeps the contract of the port."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from dualpath.bench.testbed.authority import Authority
from dualpath.transfer.conformance import CHECKS, TransportPair
from dualpath.transfer.conformance_scene import READER, WRITER
from dualpath.transfer.fault_plan import FaultPlan
from dualpath.transfer.fault_transport import FaultTransport
from dualpath.transfer.lane_marks import LaneMarks
from dualpath.transfer.memory_transport import MemoryHub, MemoryTransport
from dualpath.transfer.region import Region
from dualpath.transfer.shm_transport import ShmConfig, ShmTransport
from dualpath.transfer.tcp_transport import TcpConfig, TcpTransport
from dualpath.transfer.tls_files import TlsFiles
from dualpath.transfer.transport import OnPeerLost, Transport

QUEUE_BYTES_MAX = 32 << 20


@contextmanager
def pair_of(writer: Transport, reader: Transport, address: str) -> Iterator[TransportPair]:
    try:
        yield TransportPair(
            writer, reader, address, lambda n: Region.memfd("test", n), QUEUE_BYTES_MAX
        )
    finally:
        writer.close()
        reader.close()


@contextmanager
def memory(writer_lost: OnPeerLost, reader_lost: OnPeerLost) -> Iterator[TransportPair]:
    hub = MemoryHub()
    writer = MemoryTransport(WRITER, writer_lost, hub, queue_bytes_max=QUEUE_BYTES_MAX)
    reader = MemoryTransport(READER, reader_lost, hub)
    with pair_of(writer, reader, "somewhere") as pair:
        yield pair


@contextmanager
def tcp(writer_lost: OnPeerLost, reader_lost: OnPeerLost) -> Iterator[TransportPair]:
    config = TcpConfig(queue_bytes_max=QUEUE_BYTES_MAX)
    writer = TcpTransport(WRITER, writer_lost, config)
    reader = TcpTransport(READER, reader_lost, config)
    with pair_of(writer, reader, "127.0.0.1:0") as pair:
        yield pair


@contextmanager
def tcp_with_a_stream_a_lane(
    writer_lost: OnPeerLost, reader_lost: OnPeerLost
) -> Iterator[TransportPair]:
    each = LaneMarks((10, 12, 8, 1))
    writer = TcpTransport(
        WRITER, writer_lost, TcpConfig(queue_bytes_max=QUEUE_BYTES_MAX, marks=each)
    )
    reader = TcpTransport(READER, reader_lost)
    with pair_of(writer, reader, "127.0.0.1:0") as pair:
        yield pair


@contextmanager
def paced_tcp_with_two_streams(
    writer_lost: OnPeerLost, reader_lost: OnPeerLost
) -> Iterator[TransportPair]:
    marks, fast = LaneMarks((0, 0, 8, 8)), 600e6
    config = TcpConfig(queue_bytes_max=QUEUE_BYTES_MAX, send_bytes_per_s=fast)
    writer = TcpTransport(WRITER, writer_lost, config)
    reader = TcpTransport(READER, reader_lost, TcpConfig(marks=marks, receive_bytes_per_s=fast))
    with pair_of(writer, reader, "127.0.0.1:0") as pair:
        yield pair


@contextmanager
def paced_tcp(writer_lost: OnPeerLost, reader_lost: OnPeerLost) -> Iterator[TransportPair]:
    fast = 600e6
    writer = TcpTransport(
        WRITER, writer_lost, TcpConfig(queue_bytes_max=QUEUE_BYTES_MAX, send_bytes_per_s=fast)
    )
    reader = TcpTransport(READER, reader_lost, TcpConfig(receive_bytes_per_s=fast))
    with pair_of(writer, reader, "127.0.0.1:0") as pair:
        yield pair


@cache
def tls_files() -> TlsFiles:
    folder = Path(tempfile.mkdtemp(prefix="dualpath-test-"))
    atexit.register(shutil.rmtree, folder)
    authority = Authority(folder, "authority")
    pair = authority.pair("both")
    return TlsFiles(pair.cert, pair.key, authority.ca, authority.ca)


@contextmanager
def tls(writer_lost: OnPeerLost, reader_lost: OnPeerLost) -> Iterator[TransportPair]:
    config = TcpConfig(queue_bytes_max=QUEUE_BYTES_MAX, tls=tls_files())
    writer = TcpTransport(WRITER, writer_lost, config)
    reader = TcpTransport(READER, reader_lost, config)
    with pair_of(writer, reader, "127.0.0.1:0") as pair:
        yield pair


@contextmanager
def paced_tls_with_a_stream_a_lane(
    writer_lost: OnPeerLost, reader_lost: OnPeerLost
) -> Iterator[TransportPair]:
    each, fast, files = LaneMarks((10, 12, 8, 1)), 600e6, tls_files()
    config = TcpConfig(queue_bytes_max=QUEUE_BYTES_MAX, send_bytes_per_s=fast, tls=files)
    writer = TcpTransport(WRITER, writer_lost, config)
    reader = TcpTransport(
        READER, reader_lost, TcpConfig(marks=each, receive_bytes_per_s=fast, tls=files)
    )
    with pair_of(writer, reader, "127.0.0.1:0") as pair:
        yield pair


@contextmanager
def shm(writer_lost: OnPeerLost, reader_lost: OnPeerLost) -> Iterator[TransportPair]:
    config = ShmConfig(queue_bytes_max=QUEUE_BYTES_MAX)
    with tempfile.TemporaryDirectory() as folder:
        writer = ShmTransport(WRITER, writer_lost, config)
        reader = ShmTransport(READER, reader_lost, config)
        with pair_of(writer, reader, str(Path(folder) / "data.sock")) as pair:
            yield pair


@contextmanager
def faultless(writer_lost: OnPeerLost, reader_lost: OnPeerLost) -> Iterator[TransportPair]:
    config = TcpConfig(queue_bytes_max=QUEUE_BYTES_MAX)
    writer = FaultTransport(TcpTransport(WRITER, writer_lost, config), FaultPlan(seed=1))
    reader = FaultTransport(TcpTransport(READER, reader_lost, config), FaultPlan(seed=1))
    with pair_of(writer, reader, "127.0.0.1:0") as pair:
        yield pair


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "make_pair",
    [
        memory,
        tcp,
        tcp_with_a_stream_a_lane,
        paced_tcp,
        paced_tcp_with_two_streams,
        tls,
        paced_tls_with_a_stream_a_lane,
        shm,
        faultless,
    ],
)
def test_a_transport_keeps_the_contract(make_pair: Callable[..., object], check: str) -> None:
    CHECKS[check](make_pair)  # type: ignore[arg-type]

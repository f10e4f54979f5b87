"""What is particular to shm: whose memory is mapped, when it is let go, and the pledge page."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from dualpath.transfer import stream_frame as frames
from dualpath.transfer.conformance_scene import Recorder
from dualpath.transfer.errors import InvalidRequest, Unavailable
from dualpath.transfer.lane import Lane
from dualpath.transfer.memfd_channel import FDS_MAX, close_fds, receive_with_fds, send_with_fds
from dualpath.transfer.region import PAGE_BYTES, Region, RegionDescriptor
from dualpath.transfer.shm_sender import PLEDGE, PLEDGES_MAX
from dualpath.transfer.shm_transport import PATH_BYTES_MAX, ShmTransport
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices
from dualpath.transfer.table_copy import STEP_BYTES
from dualpath.transfer.transport import Arrival, Write, WriteStatus

NBYTES = 8192
WHOLE = Slices.contiguous(0, NBYTES)
TABLE = SliceTable.of(WHOLE)


class Pair:
    def __init__(self, folder: Path) -> None:
        self.heard = Recorder()
        self.writer = ShmTransport("writer", self.heard.on_lost)
        self.reader = ShmTransport("reader", self.heard.on_lost)
        self.address = self.writer.listen(str(folder / "data"))
        self.tag = 0

    def connect(self) -> None:
        self.reader.connect("writer", self.address, self.writer.invite("reader"), deadline_s=10)

    def send(self, source: Region, window: RegionDescriptor) -> WriteStatus:
        self.tag += 1
        self.reader.arm(window, [(self.tag, WHOLE)])
        write = Write(source, WHOLE, window, WHOLE, Lane.LOAD_PREFILL, self.tag, 10.0)
        self.writer.write("reader", write, self.heard.on_completion)
        return self.heard.wait_completions(self.tag)[-1].status


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.writer.close()
    pair.reader.close()


def test_only_sealed_memfds_can_be_written_from(pair: Pair) -> None:
    pair.connect()
    target = Region.anonymous(NBYTES)
    window = pair.reader.expose(target, 0, NBYTES, pair.heard.on_arrival)
    unsealed = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, NBYTES)
    for source, match in (
        (Region.anonymous(NBYTES), "memfd"),
        (Region(memoryview(bytearray(NBYTES)), fd=unsealed), "sealed"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            pair.send(source, window)
    os.close(unsealed)


def test_memory_of_closed_regions_is_let_go(pair: Pair) -> None:
    """The reader maps what it is told of; it unmaps at the next news of a region."""
    pair.connect()
    target = Region.anonymous(NBYTES)
    window = pair.reader.expose(target, 0, NBYTES, pair.heard.on_arrival)
    for value in range(1, 40):
        source = Region.memfd(f"dualpath-test-{value}", NBYTES)
        source.view[:] = bytes([value]) * NBYTES
        assert pair.send(source, window) is WriteStatus.DONE
        assert target.view == source.view
        source.close()
        del source
    gc.collect()
    assert len(_mapped("dualpath-test-")) <= 2


def _mapped(name: str) -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-2] for line in lines if f"memfd:{name}" in line}


def _hostile(pair: Pair) -> socket.socket:
    """A raw peer of `reader` that has passed the handshake."""
    address = pair.reader.listen(pair.address + "2")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect(address)
    sock.sendall(frames.hello("hostile", pair.reader.invite("hostile")))
    sock.recv(len(frames.welcome("reader")), socket.MSG_WAITALL)
    return sock


def test_a_peer_that_sends_unsealed_or_short_memory_loses_its_connection(pair: Pair) -> None:
    with _hostile(pair) as sock:
        fd = os.memfd_create("test", os.MFD_CLOEXEC)
        os.ftruncate(fd, NBYTES)
        send_with_fds(sock, [frames.region(1, NBYTES)], [fd])
        os.close(fd)
        assert sock.recv(1) == b""
    pair.heard.wait_losses(1)
    assert "region 1" in pair.heard.losses[0][1]


def test_a_pledge_page_that_is_too_short_for_its_slots_ends_the_connection(pair: Pair) -> None:
    page = Region.memfd("page", PLEDGE.size)
    with _hostile(pair) as sock:
        send_with_fds(sock, [frames.region(0, PLEDGE.size)], [page.fd])
        assert sock.recv(1) == b""
    pair.heard.wait_losses(1)
    assert "pledge page of 8 bytes" in pair.heard.losses[0][1]


@pytest.mark.parametrize("withdrawn", [False, True])
def test_bytes_count_only_while_their_source_is_pledged(pair: Pair, withdrawn: bool) -> None:
    target = Region.anonymous(NBYTES)
    window = pair.reader.expose(target, 0, NBYTES, pair.heard.on_arrival)
    pair.reader.arm(window, [(1, WHOLE)])
    page, source = Region.memfd("page", PAGE_BYTES), Region.memfd("source", NBYTES)
    ident, slot = 77, 3
    if not withdrawn:
        PLEDGE.pack_into(page.view, slot * PLEDGE.size, ident)
    with _hostile(pair) as sock:
        send_with_fds(sock, [frames.region(0, PAGE_BYTES)], [page.fd])
        send_with_fds(sock, [frames.region(9, NBYTES)], [source.fd])
        sock.sendall(
            frames.batch_from(
                ident, window.key, window.generation, 1, Lane.SAVE, TABLE, slot, 9, TABLE
            )
        )
        answer = frames.parse(memoryview(sock.recv(4096)))
    code = frames.REFUSALS.index("cancelled") if withdrawn else 0
    assert answer is not None
    assert answer[0] == frames.AckFrame(((ident, code),))
    assert len(pair.heard.arrivals) == (0 if withdrawn else 1)
    assert pair.reader.disarm(window, [1]) == (frozenset([1]) if withdrawn else frozenset())


@pytest.mark.parametrize(
    "frame",
    [
        frames.region(5, NBYTES),
        frames.forget(5),
        frames.batch_from(1, 2, 3, 4, 1, TABLE, 0, 5, TABLE),
        frames.write(1, 2, 3, 4, 1, WHOLE, 10),
    ],
)
def test_frames_that_name_nothing_end_the_connection(pair: Pair, frame: bytes) -> None:
    with _hostile(pair) as sock:
        sock.sendall(frame)
        assert sock.recv(1) == b""
    pair.heard.wait_losses(1)


@pytest.mark.parametrize(
    ("sizes", "source", "pledge"),
    [
        ([NBYTES], SliceTable.contiguous([1], [NBYTES]), 0),
        ([NBYTES], SliceTable(1 << 63, 2, 1 << 62, [0], [0], [NBYTES]), PLEDGES_MAX),
        ([NBYTES], SliceTable(2, NBYTES, 1, [0], [0], [NBYTES]), 0),
        ([NBYTES, 1], SliceTable(1, 1, NBYTES, [0, NBYTES], [0, 0], [NBYTES, 1]), 0),
    ],
)
def test_named_bytes_out_of_their_region_or_pledge_end_the_connection(
    pair: Pair, sizes: list[int], source: SliceTable, pledge: int
) -> None:
    page, memory = Region.memfd("page", PAGE_BYTES), Region.memfd("source", NBYTES)
    table = SliceTable.contiguous([NBYTES * i for i in range(len(sizes))], sizes)
    with _hostile(pair) as sock:
        send_with_fds(sock, [frames.region(0, PAGE_BYTES)], [page.fd])
        send_with_fds(sock, [frames.region(9, NBYTES)], [memory.fd])
        sock.sendall(frames.batch_from(1, 2, 3, 4, 1, table, pledge, 9, source))
        assert sock.recv(1) == b""
    pair.heard.wait_losses(1)


def test_a_pledge_that_is_withdrawn_half_way_cancels_the_rest_of_a_batch(pair: Pair) -> None:
    nbytes, parts, ident, slot = STEP_BYTES, 6, 77, 3
    target = Region.anonymous(nbytes * parts)
    page, source = Region.memfd("page", PAGE_BYTES), Region.memfd("source", nbytes * parts)
    PLEDGE.pack_into(page.view, slot * PLEDGE.size, ident)

    def on_arrival(arrival: Arrival) -> bool:
        if arrival.tag == 3:
            PLEDGE.pack_into(page.view, slot * PLEDGE.size, 0)
        return pair.heard.on_arrival(arrival)

    window = pair.reader.expose(target, 0, target.nbytes, on_arrival)
    table = SliceTable.contiguous([nbytes * i for i in range(parts)], [nbytes] * parts)
    pair.reader.arm_table(window, 1, table)
    with _hostile(pair) as sock:
        send_with_fds(sock, [frames.region(0, PAGE_BYTES)], [page.fd])
        send_with_fds(sock, [frames.region(9, source.nbytes)], [source.fd])
        key, generation = window.key, window.generation
        sock.sendall(frames.batch_from(ident, key, generation, 1, Lane.SAVE, table, slot, 9, table))
        answer = frames.parse(memoryview(sock.recv(4096)))
    assert answer is not None
    assert answer[0] == frames.AckFrame(((ident, frames.REFUSALS.index("cancelled")),))
    assert [each.tag for each in pair.heard.arrivals] == [1, 2, 3]
    assert pair.reader.disarm(window, range(1, parts + 1)) == set(range(4, parts + 1))


def test_a_stale_socket_is_replaced_and_a_live_one_or_a_file_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    first = ShmTransport("first", lambda *_: None)
    second = ShmTransport("second", lambda *_: None)
    assert first.listen(path) == path
    assert os.stat(path).st_mode & 0o777 == 0o600
    with pytest.raises(Unavailable, match="in use"):
        second.listen(path)
    first.close()
    assert not os.path.exists(path)
    Path(path).write_text("a file")
    with pytest.raises(Unavailable, match="no socket"):
        second.listen(path)
    with pytest.raises(InvalidRequest, match=str(PATH_BYTES_MAX)):
        second.listen("x" * 200)
    second.close()
    assert Path(path).read_text() == "a file"


def test_descriptors_travel_with_their_bytes_and_too_many_are_refused() -> None:
    here, there = socket.socketpair()
    with here, there:
        region = Region.memfd("test", 4096)
        assert send_with_fds(here, [b"ab", b"c"], [region.fd, region.fd]) == 3
        assert send_with_fds(here, [b"plain"], []) == 5
        buffer = bytearray(3)
        got, fds = receive_with_fds(there, buffer)
        assert (got, bytes(buffer), len(fds)) == (3, b"abc", 2)
        assert all(os.fstat(fd).st_ino == os.fstat(region.fd).st_ino for fd in fds)
        assert not any(os.get_inheritable(fd) for fd in fds)
        close_fds(fds)
        assert receive_with_fds(there, bytearray(9)) == (5, [])
        with pytest.raises(InvalidRequest):
            send_with_fds(here, [b"x"], [region.fd] * (FDS_MAX + 1))
        before = len(os.listdir("/proc/self/fd"))
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _ints(region.fd, 30))])
        with pytest.raises(InvalidRequest):
            receive_with_fds(there, bytearray(1))
        assert len(os.listdir("/proc/self/fd")) == before
        region.close()


def _ints(value: int, count: int) -> bytes:
    return value.to_bytes(4, "little") * count

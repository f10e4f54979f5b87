"""Frames survive the trip, and nothing a peer sends does more than end its connection."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest
from dualpath.transfer import stream_frame as frames
from dualpath.transfer.conformance_scene import Recorder
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices
from dualpath.transfer.stream_frame import MalformedFrame, parse
from dualpath.transfer.tcp_transport import TcpTransport, parse_address
from dualpath.transfer.transport import WRITE_BYTES_MAX, Write, WriteStatus
from hypothesis import given, settings
from hypothesis import strategies as st

U64 = st.integers(0, (1 << 64) - 1)
NAMES = st.text(min_size=1, max_size=40)


@st.composite
def slices(draw: st.DrawFn, nbytes: int | None = None) -> Slices:
    length = draw(st.integers(1, 1 << 20))
    count = draw(st.integers(1, 64))
    stride = length + draw(st.integers(0, 1 << 20))
    skip = draw(st.integers(0, length * count - 1))
    most = min(WRITE_BYTES_MAX, length * count - skip)
    size = draw(st.integers(1, most)) if nbytes is None else nbytes
    return Slices(draw(st.integers(0, 1 << 40)), stride, count, length, skip, size)


@st.composite
def tables(draw: st.DrawFn) -> SliceTable:
    """Of tuples, as the parser makes them."""
    length, count = draw(st.integers(1, 1 << 16)), draw(st.integers(1, 64))
    parts = draw(st.integers(1, 256))
    rows = [
        (draw(st.integers(0, 1 << 40)), skip, draw(st.integers(1, length * count - skip)))
        for skip in draw(st.lists(st.integers(0, length - 1), min_size=parts, max_size=parts))
    ]
    bases, skips, sizes = map(tuple, zip(*rows, strict=True))
    stride = length + draw(st.integers(0, 1 << 16))
    scale = max(1, -(-sum(sizes) // WRITE_BYTES_MAX))
    return SliceTable(
        stride, count, length, bases, skips, tuple(-(-n // (2 * scale)) for n in sizes)
    )


@st.composite
def encoded(draw: st.DrawFn) -> tuple[bytes, frames.Frame]:
    ident, key, tag = draw(U64), draw(U64), draw(U64)
    lane = draw(st.sampled_from(Lane))
    target = draw(slices())
    head = (ident, key, draw(st.integers(0, (1 << 32) - 1)), tag, int(lane), target)
    payload = draw(st.integers(1, min(target.nbytes, frames.FRAGMENT_BYTES_MAX)))
    name, secret = draw(NAMES), draw(st.binary(min_size=16, max_size=16))
    acks = draw(st.lists(st.tuples(U64, st.integers(0, 7)), min_size=1, max_size=20))
    batch = (ident, key, draw(st.integers(0, (1 << 32) - 1)), tag, int(lane), draw(tables()))
    codes = bytes(draw(st.lists(st.integers(0, 7), min_size=1, max_size=256)))
    table = batch[-1]
    source = SliceTable(
        1 << 40, 1, 1 << 40, table.bases, tuple(0 for _ in table.sizes), table.sizes
    )
    cases: list[tuple[bytes, frames.Frame]] = [
        (frames.write(*head, payload), frames.WriteFrame(*head, payload)),
        (frames.batch(*batch, 1), frames.BatchFrame(*batch, 1)),
        (frames.results(ident, codes), frames.ResultsFrame(ident, codes)),
        (frames.data(ident, payload), frames.DataFrame(ident, payload)),
        (frames.cancel(ident), frames.CancelFrame(ident)),
        (frames.acks(acks), frames.AckFrame(tuple(acks))),
        (frames.hello(name, secret), frames.Hello(frames.STREAM_VERSION, name, secret)),
        (
            frames.hello(name, secret, streams=3),
            frames.Hello(frames.STREAM_VERSION, name, secret, 3),
        ),
        (frames.streams((secret, secret)), frames.Streams((secret, secret))),
        (frames.welcome(name), frames.Welcome(frames.STREAM_VERSION, name)),
        (frames.deny(name), frames.Deny(name)),
        (frames.region(ident, key), frames.RegionFrame(ident, key)),
        (frames.forget(ident), frames.ForgetFrame(ident)),
        (
            frames.batch_from(*batch, 5, key, source),
            frames.BatchFromFrame(frames.BatchFrame(*batch, 0), 5, key, source),
        ),
    ]
    return draw(st.sampled_from(cases))


@given(encoded(), st.binary(max_size=8))
def test_every_frame_comes_back_from_its_bytes(
    case: tuple[bytes, frames.Frame], behind: bytes
) -> None:
    raw, frame = case
    assert parse(memoryview(raw + behind)) == (frame, len(raw))
    for cut in range(len(raw)):
        assert parse(memoryview(raw[:cut])) is None


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_a_frame_or_malformed_and_nothing_else(raw: bytes) -> None:
    try:
        parsed = parse(memoryview(raw))
    except MalformedFrame:
        return
    assert parsed is None or parsed[1] <= len(raw)


@given(encoded(), st.data())
def test_a_damaged_frame_is_a_frame_or_malformed_and_nothing_else(
    case: tuple[bytes, frames.Frame], data: st.DataObject
) -> None:
    raw = bytearray(case[0])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        parsed = parse(memoryview(raw))
    except MalformedFrame:
        return
    assert parsed is None or parsed[1] <= len(raw)


@pytest.mark.parametrize(
    "raw",
    [
        frames.write(1, 2, 3, 4, 1, Slices.contiguous(0, 10), 11),
        frames.write(1, 2, 3, 4, 1, Slices.contiguous(0, 10), 0),
        frames.write(1, 2, 3, 4, 9, Slices.contiguous(0, 10), 10),
        frames.write(1, 2, 3, 4, 1, Slices.contiguous(0, WRITE_BYTES_MAX + 1), 10),
        frames.data(1, 0),
        frames.data(1, frames.FRAGMENT_BYTES_MAX + 1),
        frames.acks([(1, 200)]),
        frames.streams(()),
        frames.streams((bytes(15),)),
        frames.streams((bytes(16),) * 4),
        frames.hello("x", bytes(16), streams=5),
        struct.pack("<BBHI", 7, 0, 0, 0),
        struct.pack("<BBHI", 7, 0, 65535, 0),
        struct.pack("<BBHI", 6, 1, 8, 0) + bytes(8),
        struct.pack("<BBHI", 6, 0, 9, 0) + bytes(9),
        struct.pack("<BBHI", 6, 0, 8, 1) + bytes(8),
        struct.pack("<BBHI", 77, 0, 0, 0),
    ],
)
def test_frames_out_of_bounds_are_malformed(raw: bytes) -> None:
    with pytest.raises(MalformedFrame):
        parse(memoryview(raw))


class _Victim:
    """A transport with one good peer and a window that hostile bytes must not reach."""

    def __init__(self) -> None:
        self.heard = Recorder()
        self.transport = TcpTransport("victim", self.heard.on_lost)
        self.address = self.transport.listen("127.0.0.1:0")
        self.friend = TcpTransport("friend", lambda peer, reason: None)
        self.friend.connect("victim", self.address, self.transport.invite("friend"), deadline_s=10)
        self.memory = Region.anonymous(4096)
        self.window = self.transport.expose(self.memory, 0, 4096, self.heard.on_arrival)
        self.tag = 0

    def dial(self, name: str) -> socket.socket:
        """A raw connection that has passed the handshake."""
        sock = socket.create_connection(parse_address(self.address), timeout=10)
        sock.sendall(frames.hello(name, self.transport.invite(name)))
        sock.recv(len(frames.welcome("victim")), socket.MSG_WAITALL)
        return sock

    def friend_can_write(self) -> None:
        self.tag += 1
        slices = Slices.contiguous(0, 16)
        self.transport.arm(self.window, [(self.tag, slices)])
        done = Recorder()
        source = Region.anonymous(16)
        write = Write(source, slices, self.window, slices, Lane.SAVE, self.tag, 10.0)
        self.friend.write("victim", write, done.on_completion)
        assert done.wait_completions(1)[0].status is WriteStatus.DONE


@pytest.fixture(scope="module")
def victim() -> Iterator[_Victim]:
    victim = _Victim()
    yield victim
    victim.friend.close()
    victim.transport.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(encoded().map(lambda case: case[0]), st.binary(max_size=64))))
def test_a_hostile_peer_costs_itself_the_connection_only(
    victim: _Victim, sent: list[bytes]
) -> None:
    with victim.dial("hostile") as sock:
        try:
            sock.sendall(b"".join(sent))
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
        except OSError:
            pass  # hung up on
    victim.friend_can_write()
    assert victim.memory.view == bytes(4096)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4000), b"\x01\x00\xff"])
def test_a_caller_that_does_not_introduce_itself_is_hung_up_on(
    victim: _Victim, sent: bytes
) -> None:
    with (
        socket.create_connection(parse_address(victim.address), timeout=10) as sock,
        contextlib.suppress(OSError),  # hung up on before we had finished
    ):
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(4096) == b""
    victim.friend_can_write()


def test_another_version_is_refused_by_name(victim: _Victim) -> None:
    with socket.create_connection(parse_address(victim.address), timeout=10) as sock:
        sock.sendall(frames.hello("new", victim.transport.invite("new"), version=7))
        answer = parse(memoryview(sock.recv(4096)))
    assert answer is not None
    assert isinstance(answer[0], frames.Deny)
    assert "version 7" in answer[0].reason


def test_data_for_a_write_that_is_not_open_ends_the_connection(victim: _Victim) -> None:
    with victim.dial("confused") as sock:
        sock.sendall(frames.data(5, 10) + bytes(10))
        assert sock.recv(100) == b""
    victim.heard.wait(
        "the loss", lambda: any("not open" in reason for _, reason in victim.heard.losses)
    )

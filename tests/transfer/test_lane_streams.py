"""Lanes on an IP network: their marks, a stream for each class of them, one connection of all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from dualpath.transfer import stream_frame as frames
from dualpath.transfer import stream_transport
from dualpath.transfer.conformance_scene import Recorder
from dualpath.transfer.errors import InvalidRequest, PeerLost, PermissionDenied
from dualpath.transfer.lane import SAVE_FLOOR, Lane
from dualpath.transfer.lane_marks import DSCP_KV, LaneMarks, priority_of
from dualpath.transfer.lane_queue import LaneQueue, PeerLanes
from dualpath.transfer.ledger import PeerCounters
from dualpath.transfer.outbox import Outbox
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.stream_channel import StreamSocket
from dualpath.transfer.stream_connection import Stream
from dualpath.transfer.stream_handshake import await_welcome, introduce
from dualpath.transfer.stream_turns import StreamTurns
from dualpath.transfer.tcp_transport import TcpConfig, TcpTransport, parse_address
from dualpath.transfer.transport import Write, WriteStatus
from hypothesis import given
from hypothesis import strategies as st

WAIT_S = 20.0
TWO = LaneMarks((10, 10, 8, 8))
"""Loads by one stream, the rest by the other."""


class Watched(TcpTransport):
    """Notes how the sockets of its streams were marked: (DSCP, priority)."""

    marked: tuple[tuple[int, int], ...] = ()

    def _stream(
        self,
        index: int,
        sock: StreamSocket,
        outbox: Outbox,
        counters: PeerCounters,
        turns: StreamTurns,
        stop: threading.Event,
    ) -> Stream:
        stream = super()._stream(index, sock, outbox, counters, turns, stop)
        assert isinstance(sock, socket.socket)
        priority = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY)
        level, option = (
            (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
            if sock.family == socket.AF_INET6
            else (socket.IPPROTO_IP, socket.IP_TOS)
        )
        self.marked += ((sock.getsockopt(level, option) >> 2, priority),)
        return stream


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_marks_are_read_from_settings_by_lane_and_for_all() -> None:
    assert LaneMarks.parse(()).dscps == (DSCP_KV,) * 4
    assert LaneMarks.parse(("all=0",)).classes == (0,)
    marks = LaneMarks.parse(("all=10", "save=8", "background = 1"))
    assert marks.dscps == (10, 10, 8, 1)
    assert [marks.stream_of(lane) for lane in Lane] == [0, 0, 1, 2]
    assert [marks.of_stream(index) for index in range(4)] == [10, 8, 1, 1]
    assert [priority_of(dscp) for dscp in (0, 8, 46, 63)] == [0, 1, 5, 6]


@pytest.mark.parametrize("entry", ["", "save", "save=", "save=64", "save=-1", "save=x", "loads=8"])
def test_a_mark_that_is_none_is_named(entry: str) -> None:
    with pytest.raises(InvalidRequest, match="lane_dscp") as caught:
        LaneMarks.parse((entry,))
    assert repr(entry) in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_each_stream_carries_the_mark_of_its_lanes_on_both_sides(
    stack: ExitStack, host: str
) -> None:
    writer = Watched("w", lambda *_: None, TcpConfig(marks=LaneMarks((46, 10, 10, 0))))
    reader = Watched("r", lambda *_: None, TcpConfig(marks=TWO))
    stack.callback(writer.close)
    stack.callback(reader.close)
    address = writer.listen(f"{host}:0")
    reader.connect("w", address, writer.invite("r"), deadline_s=WAIT_S)
    assert writer.marked == ((46, 5), (10, 1), (0, 0))
    assert reader.marked == ((10, 1), (8, 1), (8, 1))
    assert [each.connected for each in writer.traffic()] == [True]


def dialled(stack: ExitStack, us: TcpTransport) -> list[socket.socket]:
    """The sockets of a connection to `us`, opened by hand as peer `it`."""
    address = parse_address(us.listen("127.0.0.1:0"))
    deadline = time.monotonic() + WAIT_S
    socks = [stack.enter_context(socket.create_connection(address, WAIT_S))]
    for secret in introduce(socks[0], "it", "us", us.invite("it"), deadline):
        socks.append(stack.enter_context(socket.create_connection(address, WAIT_S)))
        introduce(socks[-1], "it", "us", secret, deadline)
    await_welcome(socks[0], "us", deadline)
    for sock in socks:
        sock.settimeout(WAIT_S)
    return socks


def written(us: TcpTransport, lane: Lane, nbytes: int, heard: Recorder) -> None:
    slices = Slices.contiguous(0, nbytes)
    window = RegionDescriptor(1, 1, 0, nbytes)
    write = Write(Region.anonymous(nbytes), slices, window, slices, lane, 1, WAIT_S)
    us.write("it", write, heard.on_completion)


def test_an_urgent_write_goes_while_the_stream_of_another_lane_is_blocked(
    stack: ExitStack,
) -> None:
    heard = Recorder()
    us = TcpTransport("us", heard.on_lost, TcpConfig(marks=TWO))
    stack.callback(us.close)
    loads, saves = dialled(stack, us)
    written(us, Lane.SAVE, 64 << 20, heard)
    assert saves.recv(1)  # under way, and nobody reads on
    written(us, Lane.LOAD_DECODE, 1000, heard)
    head = loads.recv(4096)
    parsed = frames.parse(memoryview(head))
    assert parsed is not None
    assert isinstance(parsed[0], frames.WriteFrame)
    assert parsed[0].lane == Lane.LOAD_DECODE


def test_losing_one_stream_loses_the_peer_once_and_all_of_its_writes(stack: ExitStack) -> None:
    heard = Recorder()
    us = TcpTransport("us", heard.on_lost, TcpConfig(marks=TWO))
    stack.callback(us.close)
    loads, saves = dialled(stack, us)
    written(us, Lane.SAVE, 64 << 20, heard)
    assert saves.recv(1)
    loads.close()
    assert heard.wait_completions(1)[0].status is WriteStatus.LOST
    while saves.recv(1 << 20):
        pass  # hung up on, after what had been sent
    us.close()
    assert len(heard.losses) == 1
    with pytest.raises(PeerLost):
        written(us, Lane.SAVE, 1, heard)


def test_a_caller_that_does_not_open_all_streams_is_hung_up_on_in_time(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_transport, "HANDSHAKE_S", 0.05)
    us = TcpTransport("us", lambda *_: None, TcpConfig(marks=TWO))
    stack.callback(us.close)
    address = parse_address(us.listen("127.0.0.1:0"))
    deadline = time.monotonic() + WAIT_S
    sock = stack.enter_context(socket.create_connection(address, WAIT_S))
    (secret,) = introduce(sock, "it", "us", us.invite("it"), deadline)
    sock.settimeout(WAIT_S)
    assert sock.recv(1) == b""
    late = stack.enter_context(socket.create_connection(address, WAIT_S))
    with pytest.raises(PermissionDenied, match="no invitation"):
        introduce(late, "it", "us", secret, deadline)
    assert us.traffic() == []


@given(st.lists(st.sampled_from([Lane.LOAD_PREFILL, Lane.LOAD_DECODE, Lane.BACKGROUND])))
def test_the_order_of_lanes_holds_over_streams(lanes: list[Lane]) -> None:
    shared = PeerLanes()
    queues: list[LaneQueue[int]] = [LaneQueue(shared), LaneQueue(shared)]
    of = {Lane.LOAD_PREFILL: 0, Lane.LOAD_DECODE: 1, Lane.BACKGROUND: 0}
    for item, lane in enumerate(lanes):
        queues[of[lane]].push(lane, item)
    taken = []
    for _ in lanes:
        turns = [(queue.next_lane(), queue) for queue in queues]
        ((lane, queue),) = [(lane, queue) for lane, queue in turns if lane is not None]
        taken.append((lane, queue.pop(lane)))
    assert taken == sorted((lane, item) for item, lane in enumerate(lanes))
    assert not any(shared.waiting.values())


def test_saves_on_their_own_stream_get_their_floor_and_hold_no_load_up() -> None:
    shared = PeerLanes()
    loads: LaneQueue[int] = LaneQueue(shared)
    saves: LaneQueue[int] = LaneQueue(shared)
    sent = {Lane.LOAD_PREFILL: 0, Lane.SAVE: 0}
    for item in range(2000):
        loads.push(Lane.LOAD_PREFILL, item)
        saves.push(Lane.SAVE, item)
    for _ in range(1000):
        assert loads.next_lane() is Lane.LOAD_PREFILL
        for queue in (loads, saves):
            lane = queue.next_lane()
            if lane is not None:
                queue.pop(lane)
                queue.charge(lane, 1 << 20)
                sent[lane] += 1 << 20
    share = sent[Lane.SAVE] / sum(sent.values())
    assert abs(share - SAVE_FLOOR) < 0.01

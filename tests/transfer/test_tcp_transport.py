"""What is particular to tcp: addresses, limits, handshakes in time, pacing, peers that vanish."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from dualpath.transfer import stream_frame, stream_handshake, stream_transport
from dualpath.transfer.conformance_scene import Recorder, extents
from dualpath.transfer.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Unavailable,
)
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.tcp_transport import (
    TcpConfig,
    TcpTransport,
    format_address,
    parse_address,
)
from dualpath.transfer.transport import Write, WriteStatus


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def make(
    stack: ExitStack, name: str, heard: Recorder, config: TcpConfig | None = None
) -> TcpTransport:
    transport = TcpTransport(name, heard.on_lost, config or TcpConfig())
    stack.callback(transport.close)
    return transport


@pytest.mark.parametrize(
    ("address", "parsed"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:0", ("::1", 0)), ("node-3:9", ("node-3", 9))],
)
def test_addresses_are_taken_apart_and_put_together(address: str, parsed: tuple[str, int]) -> None:
    assert parse_address(address) == parsed
    assert format_address(*parsed) == address


@pytest.mark.parametrize(
    "address", ["", "host", ":1", "host:", "host:x", "h:65536", "::1:2", "h:²"]
)
def test_what_is_no_address_is_refused_by_value(address: str, stack: ExitStack) -> None:
    transport = make(stack, "t", Recorder())
    with pytest.raises(InvalidRequest, match="host:port"):
        transport.listen(address)
    with pytest.raises(InvalidRequest, match="host:port"):
        transport.connect("peer", address, bytes(16), deadline_s=1)


def test_an_address_in_use_is_unavailable(stack: ExitStack) -> None:
    one, other = make(stack, "one", Recorder()), make(stack, "other", Recorder())
    address = one.listen("127.0.0.1:0")
    with pytest.raises(Unavailable, match=address):
        other.listen(address)
    with pytest.raises(InvalidRequest, match="already"):
        one.listen("127.0.0.1:0")


def test_a_peer_that_accepts_and_says_nothing_costs_the_deadline_only(stack: ExitStack) -> None:
    silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    dialler = make(stack, "dialler", Recorder())
    with pytest.raises(DeadlineExceeded):
        dialler.connect(
            "silent", format_address(*silent.getsockname()[:2]), bytes(16), deadline_s=0.1
        )


def test_a_caller_that_says_nothing_is_hung_up_on_in_time(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_handshake, "HANDSHAKE_S", 0.2)
    listener = make(stack, "listener", Recorder())
    address = parse_address(listener.listen("127.0.0.1:0"))
    with socket.create_connection(address, timeout=10) as silent:
        silent.sendall(b"\x01")
        with suppress(ConnectionResetError):
            assert silent.recv(1) == b""


def test_callers_that_say_nothing_do_not_keep_out_one_who_speaks(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_transport, "HANDSHAKES_MAX", 4)
    monkeypatch.setattr(stream_handshake, "HANDSHAKE_S", 60.0)
    listener = make(stack, "listener", Recorder())
    address = listener.listen("127.0.0.1:0")
    silent = [
        stack.enter_context(socket.create_connection(parse_address(address), timeout=10))
        for _ in range(12)
    ]
    dialler = make(stack, "dialler", Recorder())
    dialler.connect("listener", address, listener.invite("dialler"), deadline_s=10)
    assert [each.peer for each in listener.traffic() if each.connected] == ["dialler"]
    assert silent[0].recv(1) == b""


def test_silent_callers_from_one_address_do_not_push_out_those_from_another(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_transport, "HANDSHAKES_MAX", 4)
    monkeypatch.setattr(stream_transport, "HANDSHAKE_S_MIN", 0.0)
    monkeypatch.setattr(stream_handshake, "HANDSHAKE_S", 60.0)
    listener = make(stack, "listener", Recorder())
    address = parse_address(listener.listen("127.0.0.1:0"))
    slow = stack.enter_context(
        socket.create_connection(address, timeout=10, source_address=("127.0.0.2", 0))
    )
    silent = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(12)]
    for each in silent[:9]:
        assert each.recv(1) == b""
    slow.sendall(stream_frame.hello("slow", listener.invite("slow")))
    assert slow.recv(1)  # welcome, late as it came


def test_connections_are_limited(stack: ExitStack) -> None:
    listener = make(stack, "listener", Recorder(), TcpConfig(connections_max=1))
    address = listener.listen("127.0.0.1:0")
    first, second = make(stack, "first", Recorder()), make(stack, "second", Recorder())
    first.connect("listener", address, listener.invite("first"), deadline_s=10)
    with pytest.raises(Unavailable):
        second.connect("listener", address, listener.invite("second"), deadline_s=10)
    assert [each.peer for each in listener.traffic() if each.connected] == ["first"]


@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_limit_is_shared_by_all_connections_of_a_transport(stack: ExitStack, side: str) -> None:
    """Two peers together take at least the time that the limit gives their bytes."""
    rate, nbytes = 20e6, 1 << 20
    limited = TcpConfig(receive_bytes_per_s=rate, send_bytes_per_s=rate)
    heard = Recorder()
    hub = make(stack, "hub", heard, limited)
    peers = [make(stack, f"peer {i}", heard) for i in range(2)]
    source = Region.anonymous(nbytes)
    targets = [Region.anonymous(nbytes) for _ in peers]
    writes = []
    address = hub.listen("127.0.0.1:0")
    for tag, (peer, target) in enumerate(zip(peers, targets, strict=True)):
        peer.connect("hub", address, hub.invite(f"peer {tag}"), deadline_s=10)
        writer, reader = (hub, peer) if side == "send" else (peer, hub)
        window = reader.expose(target, 0, nbytes, heard.on_arrival)
        slices = extents(1, nbytes)[0]
        reader.arm(window, [(tag, slices)])
        write = Write(source, slices, window, slices, Lane.LOAD_PREFILL, tag, 30.0)
        writes.append((writer, f"peer {tag}" if side == "send" else "hub", write))
    began = time.monotonic()
    for writer, name, write in writes:
        writer.write(name, write, heard.on_completion)
    assert {each.status for each in heard.wait_completions(2)} == {WriteStatus.DONE}
    took = time.monotonic() - began
    free = (128 << 10) + rate * 0.02
    assert took >= (2 * nbytes - free) / rate * 0.99


CHILD = """
import sys
from dualpath.transfer import Lane, Region, RegionDescriptor, Slices, TcpTransport, Write
from dualpath.transfer import ShmTransport
kind, address = sys.argv[1:]
transport = (TcpTransport if kind == "tcp" else ShmTransport)("child", lambda *_: None)
print(transport.listen(address), transport.invite("parent").hex(), flush=True)
window = RegionDescriptor.from_bytes(bytes.fromhex(input()))
source = Region.memfd("child", 1 << 20)
source.view[:] = bytes([7]) * (1 << 20)
slices = Slices.contiguous(0, 1 << 20)
for tag in range(64):
    write = Write(source, slices, window, slices, Lane.LOAD_PREFILL, tag, 60.0)
    transport.write("parent", write, lambda completion: None)
input()
"""


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_a_killed_peer_is_noticed_and_its_writes_never_land_later(
    stack: ExitStack, kind: str, tmp_path: os.PathLike[str]
) -> None:
    from dualpath.transfer.shm_transport import ShmTransport

    heard = Recorder()
    parent = (TcpTransport if kind == "tcp" else ShmTransport)("parent", heard.on_lost)
    stack.callback(parent.close)
    address = "127.0.0.1:0" if kind == "tcp" else os.path.join(tmp_path, "s")
    child = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", CHILD, kind, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    stack.callback(child.kill)
    assert child.stdout is not None
    assert child.stdin is not None
    address, invitation = child.stdout.readline().split()
    parent.connect("child", address, bytes.fromhex(invitation), deadline_s=10)
    target = Region.anonymous(1 << 20)
    window = parent.expose(target, 0, 1 << 20, heard.on_arrival)
    slices = extents(1, 1 << 20)[0]
    parent.arm(window, [(tag, slices) for tag in range(64)])
    child.stdin.write(window.to_bytes().hex() + "\n")
    child.stdin.flush()
    heard.wait_arrivals(3)
    os.kill(child.pid, signal.SIGKILL)
    heard.wait_losses(1)
    landed = {arrival.tag for arrival in heard.arrivals}
    assert parent.disarm(window, range(64)) == set(range(64)) - landed
    assert target.view == bytes([7]) * (1 << 20)


def test_a_peer_that_answers_a_write_before_it_has_all_of_it_is_hung_up_on(
    stack: ExitStack,
) -> None:
    heard = Recorder()
    us = make(stack, "us", heard)
    host, port = parse_address(us.listen("127.0.0.1:0"))
    hostile = stack.enter_context(socket.create_connection((host, port), 10))
    stream_handshake.introduce(hostile, "it", "us", us.invite("it"), time.monotonic() + 10)
    source, whole = Region.anonymous(32 << 20), Slices.contiguous(0, 32 << 20)
    window = RegionDescriptor(1, 1, 0, 32 << 20)
    write = Write(source, whole, window, whole, Lane.LOAD_PREFILL, 1, 20.0)
    us.write("it", write, heard.on_completion)
    hostile.setblocking(True)
    assert hostile.recv(1)
    # Were it believed, the source could be used again, and what is still to go would be new bytes.
    hostile.sendall(stream_frame.acks([(1, 0)]))
    heard.wait_completions(1)
    assert heard.completions[0].status is WriteStatus.LOST
    assert "before it had all of it" in heard.completions[0].detail


def test_a_machine_out_of_threads_hangs_up_and_goes_on_accepting(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    us, it = make(stack, "us", Recorder()), make(stack, "it", Recorder())
    address = us.listen("127.0.0.1:0")
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("dualpath-greet"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(Unavailable):
            it.connect("us", address, us.invite("it"), deadline_s=5)
    it.connect("us", address, us.invite("it"), deadline_s=5)


def test_impossible_settings_are_refused_by_value() -> None:
    with pytest.raises(InvalidRequest, match="fragment_bytes"):
        TcpConfig(fragment_bytes=9 << 20)
    with pytest.raises(InvalidRequest, match="vanished_s"):
        TcpConfig(vanished_s=0.1)
    with pytest.raises(InvalidRequest, match="-5"):
        TcpTransport("t", lambda *_: None, TcpConfig(receive_bytes_per_s=-5))

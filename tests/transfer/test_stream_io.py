"""Bytes through a stream socket: native and in Python alike."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import xxhash
from dualpath.transfer import stream_io, stream_io_twin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

try:
    from dualpath.transfer import _native
except ImportError:
    _native = None  # type: ignore[assignment]

GO = bytearray(1)
QUIET = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=["native", "python"])
def io(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "python":
        return stream_io_twin
    if _native is None:
        pytest.skip("the native extension is not built")
    return _native


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    yield ours, theirs
    ours.close()
    theirs.close()


def _data(nbytes: int) -> bytes:
    return bytes((i * 131 + (i >> 8) * 17) & 0xFF for i in range(nbytes))


def _in_thread(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_the_chosen_functions_are_the_native_ones_where_they_were_built() -> None:
    chosen = stream_io_twin if _native is None else _native
    assert stream_io.receive is chosen.receive
    assert stream_io.send is chosen.send
    if _native is not None:
        assert _native.HASHED_BYTES_MIN == stream_io_twin.HASHED_BYTES_MIN


@QUIET
@given(
    sizes=st.lists(st.integers(1, 90_000), min_size=1, max_size=8),
    start=st.integers(0, 1 << 30),
    steps=st.lists(st.integers(1, 400_000), min_size=1, max_size=4),
    behind=st.integers(0, 20),
    hashed=st.booleans(),
)
def test_parts_are_filled_in_order_hashed_when_complete_and_followed_by_what_is_behind(
    io: ModuleType, sizes: list[int], start: int, steps: list[int], behind: int, hashed: bool
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        data = _data(sum(sizes))
        inside = start % sizes[0]
        trailer = b"the next frame's head"
        sender = _in_thread(lambda: theirs.sendall(data[inside:] + trailer))
        parts = [memoryview(bytearray(size)) for size in sizes]
        parts[0][:inside] = data[:inside]
        tail = memoryview(bytearray(behind))
        digests: list[int] = []
        first, left, tail_bytes, step = 0, len(data) - inside, 0, 0
        while left:
            nbytes = min(left, steps[step % len(steps)])
            step += 1
            room = tail if nbytes == left else tail[:0]
            got, tail_bytes, ended, fresh = io.receive(
                ours.fileno(), parts[first:], inside, nbytes, room, GO, 5000, hashed
            )
            assert not ended
            assert got == nbytes, "it waits for more rather than return"
            left -= got
            inside += got
            digests += fresh
            while first < len(parts) and inside >= len(parts[first]):
                inside -= len(parts[first])
                first += 1
        assert b"".join(parts) == data
        assert bytes(tail[:tail_bytes]) == trailer[:tail_bytes]
        rest = ours.recv(100, socket.MSG_DONTWAIT) if tail_bytes < len(trailer) else b""
        assert trailer.startswith(bytes(tail[:tail_bytes]) + rest)
        expected = [
            xxhash.xxh3_64_intdigest(part) if len(part) >= io.HASHED_BYTES_MIN else 0
            for part in parts
        ]
        assert digests == (expected if hashed else [])
        sender.join(10)


@QUIET
@given(sizes=st.lists(st.integers(0, 60_000), min_size=1, max_size=200))
def test_all_buffers_are_sent_in_order(io: ModuleType, sizes: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        data = _data(sum(sizes))
        heard = bytearray()

        def hear() -> None:
            while len(heard) < len(data):
                heard.extend(theirs.recv(1 << 16))

        thread = _in_thread(hear)
        parts, at = [], 0
        for size in sizes:
            parts.append(memoryview(data)[at : at + size])
            at += size
        assert io.send(ours.fileno(), parts, GO, 5000) == len(data)
        thread.join(10)
        assert heard == data


def test_a_receive_ends_with_its_time_its_peer_or_an_interrupt(
    io: ModuleType, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    part, none = memoryview(bytearray(1000)), memoryview(bytearray())

    def receive(wait_ms: int, interrupt: bytearray = GO) -> tuple[int, int, bool, list[int]]:
        answer = io.receive(ours.fileno(), [part], 0, 1000, none, interrupt, wait_ms, True)
        return answer  # type: ignore[no-any-return]

    assert receive(0) == (0, 0, False, [])
    assert receive(1) == (0, 0, False, [])
    theirs.send(b"x" * 300)
    assert receive(1) == (300, 0, False, [])
    theirs.send(b"y" * 300)
    assert receive(1000, bytearray(b"\1")) == (0, 0, False, [])
    assert receive(1) == (300, 0, False, [])
    theirs.send(b"z" * 10)
    theirs.close()
    assert receive(1000) == (10, 0, True, [])
    assert receive(1000) == (0, 0, True, [])


def test_a_receive_that_waited_in_vain_leaves_a_socket_that_wakes_for_one_byte(
    io: ModuleType, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    part, none = memoryview(bytearray(1 << 20)), memoryview(bytearray())
    theirs.send(b"x" * 300)
    assert io.receive(ours.fileno(), [part], 0, 1 << 20, none, GO, 1, True)[0] == 300
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    assert not poll.poll(0)
    theirs.send(b"y")
    assert poll.poll(0)


def test_an_interrupt_stops_a_receive_that_is_under_way(
    io: ModuleType, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    theirs.setblocking(True)
    part, stop, over = memoryview(bytearray(1 << 20)), bytearray(1), threading.Event()

    def trickle() -> None:
        with contextlib.suppress(OSError):  # the other end is closed in the end
            while not over.is_set():
                theirs.send(b"x")

    thread = _in_thread(trickle)
    threading.Timer(0.05, lambda: stop.__setitem__(0, 1)).start()
    received = 0
    for _ in range(200_000):  # bounded by bytes: each call brings one at least
        got, _, ended, _ = io.receive(ours.fileno(), [part], 0, 1 << 20, part[:0], stop, 20, False)
        assert not ended
        received += got
        if stop[0]:
            break
    assert stop[0]
    assert received
    over.set()
    ours.close()
    thread.join(10)


def test_a_send_to_a_peer_that_does_not_read_returns_what_went(
    io: ModuleType, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    data = _data(4 << 20)
    sent = io.send(ours.fileno(), [data], GO, 1)
    assert 0 < sent < len(data)
    assert io.send(ours.fileno(), [data], bytearray(b"\1"), 1000) == 0
    heard = bytearray()
    while len(heard) < sent:
        heard += theirs.recv(1 << 20)
    assert heard == data[:sent]
    theirs.close()
    with pytest.raises(OSError, match=r"pipe|reset"):
        io.send(ours.fileno(), [data], GO, 1000)


@pytest.mark.parametrize(
    ("sizes", "inside", "nbytes"),
    [([], 0, 1), ([10], 0, 11), ([10], 10, 1), ([10], -1, 1), ([10], 0, 0), ([1] * 1025, 0, 1)],
)
def test_receives_that_do_not_fit_are_refused(
    io: ModuleType,
    pair: tuple[socket.socket, socket.socket],
    sizes: list[int],
    inside: int,
    nbytes: int,
) -> None:
    parts = [memoryview(bytearray(size)) for size in sizes]
    none, fd = memoryview(bytearray()), pair[0].fileno()
    with pytest.raises(ValueError, match=r"\d"):
        io.receive(fd, parts, inside, nbytes, none, GO, 0, False)


def test_arguments_of_a_wrong_kind_are_refused(
    io: ModuleType, pair: tuple[socket.socket, socket.socket]
) -> None:
    fd, part, none = pair[0].fileno(), memoryview(bytearray(8)), memoryview(bytearray())
    with pytest.raises(ValueError, match="interrupt"):
        io.receive(fd, [part], 0, 1, none, b"", 0, False)
    with pytest.raises(ValueError, match="negative"):
        io.send(fd, [part], GO, -1)
    with pytest.raises((TypeError, BufferError)):
        io.receive(fd, ["text"], 0, 1, none, GO, 0, False)
    with pytest.raises((TypeError, BufferError)):
        io.send(fd, [part, 7], GO, 0)
    pair[1].send(b"x" * 8)
    if io is _native:
        with pytest.raises((TypeError, BufferError)):
            io.receive(fd, [memoryview(bytes(8))], 0, 8, none, GO, 0, False)
    with pytest.raises(OSError, match="descriptor"):
        io.send(-1, [part], GO, 0)

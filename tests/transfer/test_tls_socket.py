"""TLS as a stream's halves see it: bytes of any size, sockets that are full, ends in the middle."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from dualpath.bench.testbed.authority import Authority
from dualpath.transfer.tls_files import TlsContexts, TlsFiles
from dualpath.transfer.tls_socket import JOINED_BYTES, SEND_BYTES, TlsSocket

WAIT_S = 20.0
NEVER = bytearray(1)
Ends = tuple[TlsSocket, TlsSocket]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    with ExitStack() as stack:
        yield joined(stack, tmp_path)


def joined(stack: ExitStack, folder: Path) -> Ends:
    """Both ends of a stream, after the handshake."""
    authority = Authority(folder, "authority")
    pair = authority.pair("both")
    contexts = TlsContexts(TlsFiles(pair.cert, pair.key, authority.ca, authority.ca))
    left, right = socket.socketpair()
    for sock in (left, right):
        stack.callback(sock.close)
    ends = (
        TlsSocket(left, contexts.dialling(), "right", "localhost"),
        TlsSocket(right, contexts.accepting(), "left"),
    )
    deadline = time.monotonic() + WAIT_S
    thread = threading.Thread(target=ends[1].shake_hands, args=(deadline,))
    thread.start()
    ends[0].shake_hands(deadline)
    thread.join()
    for sock in (left, right):
        sock.setblocking(False)
    return ends


def sizes() -> Sequence[int]:
    around = (0, 1, JOINED_BYTES - 1, JOINED_BYTES, 16384, 16385, SEND_BYTES - 1, SEND_BYTES + 7)
    return (*around, *around[::-1], 5 * SEND_BYTES)


def test_parts_of_any_size_come_whole_though_the_socket_is_often_full(ends: Ends) -> None:
    sending, receiving = ends
    parts = [os.urandom(size) for size in sizes()]
    content = b"".join(parts)
    got = bytearray(len(content))
    view = memoryview(got)
    left: list[bytes | memoryview] = list(parts)
    sent = received = 0
    while received < len(content):
        if sent < len(content):
            count = sending.send(left, NEVER, 0)
            sent += count
            whole = memoryview(b"".join(left))
            left = [whole[count:]]
        step = min(60_000, len(content) - received)
        with suppress(BlockingIOError):
            received += receiving.receive_into([view[received : received + step]])
    assert got == content


def test_what_comes_behind_the_payload_is_not_lost(ends: Ends) -> None:
    sending, receiving = ends
    payload, behind = os.urandom(50_000), os.urandom(40)
    assert sending.send([payload, behind], NEVER, 1000) == len(payload) + len(behind)
    target, rest = memoryview(bytearray(50_000)), memoryview(bytearray(16))
    got = receiving.receive([target], 0, 50_000, rest, NEVER, 1000, True)
    assert got[0] == 50_000
    assert target == payload
    more = memoryview(bytearray(40 - got[1]))
    assert receiving.receive_into([more]) == len(more)
    assert bytes(rest[: got[1]]) + bytes(more) == behind


def test_an_end_in_the_middle_of_a_receive_is_told_as_one(ends: Ends) -> None:
    sending, receiving = ends
    sending.send([bytes(100)], NEVER, 1000)
    sending.close()
    target = memoryview(bytearray(200))
    assert receiving.receive([target], 0, 200, target[:0], NEVER, 1000, False) == (100, 0, True, [])
    assert receiving.receive_into([target]) == 0

"""No client of the local socket harms the daemon or another client, whatever it does."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dualpath.client.local_loopback import (
    WAIT_S,
    Served,
    chain,
    ended,
    send,
    serving,
    until,
)
from dualpath.kvstore import local_protocol as protocol
from dualpath.kvstore.local_protocol import HEADER, Hello, Kind, LookupRequest
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.service import local_socket
from dualpath.transfer.errors import (
    PermissionDenied,
    Unavailable,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def test_a_client_that_ends_leaves_nothing_behind(served: Served) -> None:
    hashes = chain(3)
    served.put(hashes)
    client = served.client()
    mapped = client.map(served.space, hashes)
    client.fetch(mapped.hit.lease_id, np.zeros(1, np.int32), np.zeros(1, np.int32))
    client.lookup(served.space, hashes, lease_s=30)
    client.close()
    until(lambda: len(served.socket) == 0)
    stats = served.store.stats()
    assert (stats.leases, stats.mapped_bytes) == (0, 0)
    with pytest.raises(Unavailable, match="closed"):
        client.ping()
    with pytest.raises(PermissionDenied, match="closed"):
        client.map(served.space, hashes)


HOLD = """
import sys
from dualpath.client.local_store import LocalStore
client = LocalStore.connect(sys.argv[1])
mapped = client.map(bytes.fromhex(sys.argv[2]), [bytes.fromhex(h) for h in sys.argv[3:]])
print(len(mapped), flush=True)
sys.stdin.read()
"""


def test_a_client_that_is_killed_leaves_nothing_behind(served: Served) -> None:
    hashes = chain(3)
    served.put(hashes)
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, served.socket.path, served.space.hex()]
        + [h.hex() for h in hashes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"3\n"
    assert served.store.stats().mapped_leases == 1
    child.send_signal(signal.SIGKILL)
    child.wait(WAIT_S)
    child.stdout.close()
    until(lambda: served.store.stats().mapped_leases == 0)


def test_who_stalls_within_a_message_is_cut_off_and_others_go_on(tmp_path: Path) -> None:
    with serving(tmp_path, message_s=0.3) as served:
        served.put(chain(1))
        slow = served.greeted()
        slow.sendall(HEADER.pack(100, Kind.LOOKUP, 0, 1) + b"half")
        client = served.client()
        for _ in range(20):
            assert client.lookup(served.space, chain(1)).blocks == 1
        assert ended(slow)


def test_who_says_no_hello_is_cut_off(tmp_path: Path) -> None:
    with serving(tmp_path, hello_s=0.2) as served:
        assert ended(served.raw())


def test_who_keeps_fetched_chunks_is_cut_off(tmp_path: Path) -> None:
    with serving(tmp_path, fetched_s=0.2) as served:
        served.put(chain(1))
        client = served.client()
        mapped = client.map(served.space, chain(1))
        client.fetch(mapped.hit.lease_id, np.zeros(1, np.int32), np.zeros(1, np.int32))
        until(lambda: len(served.socket) == 0)
        with pytest.raises(Unavailable):
            client.ping()
        assert served.store.stats().leases == 0


def test_who_does_not_read_its_answers_is_cut_off(tmp_path: Path) -> None:
    with serving(tmp_path, message_s=0.3) as served:
        hashes = chain(40)
        served.put(hashes)
        flood = served.greeted()
        packed = PackedHashes.of(hashes)
        request = LookupRequest(served.space, packed.hash_bytes, bytes(packed.data), 0, True)
        body = b"".join(request.parts())
        flood.setblocking(False)
        client = served.client()
        with contextlib.suppress(ConnectionError):
            while len(served.socket) == 2:
                with contextlib.suppress(BlockingIOError):
                    send(flood, Kind.LOOKUP, body)
                client.ping()
        assert client.lookup(served.space, hashes).blocks == 40


@pytest.mark.parametrize(
    ("kind", "body"),
    [(Kind.HELLO, b""), (77, b""), (Kind.PING, b"x"), (Kind.MAP, b"short"), (Kind.DONE, b"x")],
)
def test_what_is_no_message_ends_its_own_connection_only(
    served: Served, kind: int, body: bytes
) -> None:
    client = served.client()
    bad = served.greeted()
    send(bad, kind, body)
    answer = bad.recv(4096)
    assert HEADER.unpack_from(answer)[1] == Kind.ERROR
    assert protocol.error_of(memoryview(answer)[HEADER.size :]).reason == "malformed"
    assert ended(bad)
    client.ping()


@given(st.lists(st.binary(max_size=200), max_size=8), st.booleans())
@settings(max_examples=40, deadline=None)
def test_noise_harms_nobody(shared_local: Served, parts: list[bytes], greeted: bool) -> None:
    with contextlib.ExitStack() as clients:
        served = replace(shared_local, stack=clients)
        noise(served, parts, greeted=greeted)


def noise(served: Served, parts: list[bytes], *, greeted: bool) -> None:
    client = served.client()
    sock = served.greeted() if greeted else served.raw()
    with contextlib.suppress(ConnectionError):
        for part in parts:
            sock.sendall(part)
        sock.shutdown(socket.SHUT_WR)
        ended(sock)
    client.ping()


def test_an_oversized_message_is_refused_by_its_header(served: Served) -> None:
    bad = served.greeted()
    bad.sendall(HEADER.pack(protocol.REQUEST_BYTES_MAX + 1, Kind.LOOKUP, 0, 1))
    assert ended(bad)
    early = served.raw()
    early.sendall(HEADER.pack(protocol.HELLO_BYTES_MAX + 1, Kind.HELLO, 0, 1))
    assert ended(early)


def test_a_client_of_another_version_is_told_so(served: Served) -> None:
    sock = served.raw()
    newer = Hello(protocol.VERSION + 1, protocol.VERSION + 2, b"")
    send(sock, Kind.HELLO, b"".join(newer.parts()))
    answer = sock.recv(4096)
    error = protocol.error_of(memoryview(answer)[HEADER.size :])
    assert error.reason == "version"
    assert "update" in str(error)


def test_connections_are_bounded_and_room_comes_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_socket, "CONNECTIONS_PER_PROCESS_MAX", 3)
    clients = [served.client() for _ in range(3)]
    with pytest.raises(Unavailable):
        served.client()
    clients[0].close()
    until(lambda: len(served.socket) == 2)
    served.client().ping()

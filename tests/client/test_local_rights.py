"""What a client of the local socket may do, and how much of it at once."""

from __future__ import annotations

import mmap
import os
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from dualpath.client.local_loopback import (
    LAYOUT,
    NBYTES,
    Served,
    chain,
    content,
    send,
    serving,
)
from dualpath.kvstore import local_protocol as protocol
from dualpath.kvstore.local_protocol import HEADER, Hello, Kind, LookupRequest
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.service import local_calls
from dualpath.kvstore.service.access_rules import Limits, parse_access
from dualpath.kvstore.service.readiness import Phase
from dualpath.transfer.errors import (
    LeaseExpired,
    Overloaded,
    PermissionDenied,
    Unavailable,
)


def test_the_arena_can_be_neither_written_nor_truncated(served: Served) -> None:
    client = served.client()
    arena = client.arena
    assert arena is not None
    assert arena.read_only
    # Nor by opening the descriptor once more.
    for fd in (arena.fd, os.open(f"/proc/self/fd/{arena.fd}", os.O_RDWR)):
        with pytest.raises(PermissionError):
            mmap.mmap(fd, arena.nbytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match="Errno"):
            os.ftruncate(fd, 0)
        with pytest.raises(OSError, match="Errno"):
            os.pwrite(fd, b"x", 0)


def test_two_clients_cannot_touch_each_others_leases(served: Served) -> None:
    hashes = chain(2)
    served.put(hashes)
    one, other = served.client(), served.client()
    mapped = one.map(served.space, hashes)
    with pytest.raises(PermissionDenied):
        other.release([mapped.hit.lease_id])
    with pytest.raises(PermissionDenied):
        other.renew(mapped.hit.lease_id, 5)
    zero = np.zeros(1, np.int32)
    with pytest.raises(LeaseExpired, match="not of this connection"):
        other.fetch(mapped.hit.lease_id, zero, zero)
    with pytest.raises(LeaseExpired, match="not of this connection"):
        other.report_corrupt(mapped.hit.lease_id, 0, 0)
    assert mapped.stable()


def test_the_leases_of_a_connection_are_bounded(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_calls, "LEASES_MAX", 3)
    served.put(chain(1))
    client = served.client()
    for _ in range(3):
        client.lookup(served.space, chain(1), lease_s=5)
    with pytest.raises(Overloaded, match="3 leases"):
        client.map(served.space, chain(1))
    served.clock.ahead += 6
    client.map(served.space, chain(1)).release()


def test_mapped_bytes_are_bounded_and_reading_goes_on(tmp_path: Path) -> None:
    first, second = chain(4), chain(4, 50_000)
    with serving(tmp_path) as served:
        served.put(first)
        served.put(second)
        client = served.client()
        client.map(served.space, first)
        with pytest.raises(Overloaded, match="mapped by one client"):
            client.map(served.space, second)
        target = bytearray(4 * NBYTES)
        assert client.read_into(served.space, second, target).blocks == 4
        assert target == b"".join(map(content, second))


TOKEN = "0123456789abcdef-local"


RULES = f"""
[[token]]
name = "reader"
token = "{TOKEN}"
[[rule]]
principal = "token:reader"
rights = ["read"]
model = "m"
[[rule]]
principal = "uid:*"
rights = ["read", "write"]
"""


def test_the_arena_is_for_those_who_may_read_all_of_it(tmp_path: Path) -> None:
    with serving(tmp_path, parse_access(RULES, "rules")) as served:
        hashes = chain(2)
        served.put(hashes)
        trusted = served.client()
        assert trusted.arena is not None
        with trusted.map(served.space, hashes) as mapped:
            assert mapped.view(1) == content(hashes[1])
        limited = served.client(token=TOKEN)
        assert limited.arena is None
        assert "every namespace" in limited.why_no_arena
        assert limited.lookup(served.space, hashes).blocks == 2
        with pytest.raises(PermissionDenied, match="every namespace"):
            limited.map(served.space, hashes)
        other = served.store.open_namespace(Namespace(model="other", layout=LAYOUT))
        with pytest.raises(PermissionDenied) as refused:
            limited.lookup(other, hashes)
        assert refused.value.reason == "rights"
        # A client of its own making that asks nevertheless.
        sock = served.raw()
        send(sock, Kind.HELLO, b"".join(Hello(1, 1, TOKEN.encode()).parts()))
        _, ancillary, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(4 * struct.calcsize("i")))
        assert not ancillary
        packed = PackedHashes.of(hashes)
        request = LookupRequest(served.space, packed.hash_bytes, bytes(packed.data), 1000, True)
        send(sock, Kind.MAP, b"".join(request.parts()))
        answer = sock.recv(4096)
        assert protocol.error_of(memoryview(answer)[HEADER.size :]).reason == "rights"


def test_rights_that_are_taken_away_hold_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, parse_access(RULES, "rules")) as served:
        served.put(chain(1))
        client = served.client()
        client.map(served.space, chain(1)).release()
        served.access.replace(parse_access(RULES.replace('"uid:*"', '"uid:x"'), "rules"))
        with pytest.raises(PermissionDenied):
            client.map(served.space, chain(1))
        named = served.client(token=TOKEN)
        served.socket.drop_principals(lambda name: name == "token:reader")
        with pytest.raises(Unavailable):
            named.ping()


def test_a_wrong_token_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, parse_access(RULES, "rules")) as served:
        with pytest.raises(PermissionDenied, match="not one of"):
            served.client(token="wrong-wrong-wrong")
        served.client().ping()


def test_limits_of_a_principal_hold_here_too(tmp_path: Path) -> None:
    with serving(tmp_path, limits=Limits(leases=2)) as served:
        served.put(chain(1))
        client = served.client()
        held = [client.map(served.space, chain(1)) for _ in range(2)]
        with pytest.raises(Overloaded) as refused:
            client.map(served.space, chain(1))
        assert refused.value.reason == "quota"
        held[0].release()
        client.map(served.space, chain(1))


def test_a_daemon_that_drains_gives_no_new_leases(served: Served) -> None:
    served.put(chain(1))
    client = served.client()
    held = client.map(served.space, chain(1))
    served.readiness.enter(Phase.DRAINING)
    with pytest.raises(Unavailable, match="drain"):
        client.map(served.space, chain(1))
    assert client.lookup(served.space, chain(1)).blocks == 1
    held.renew(5)
    held.release()

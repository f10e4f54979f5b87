"""Blocks that a client puts out of memory that it shares: stored right, and no harm to anybody."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path
from socket import socket as Socket

import numpy as np
import pytest
from dualpath.client.local_loopback import (
    LAYOUT,
    NBYTES,
    Served,
    chain,
    content,
    ended,
    send,
    serving,
    until,
)
from dualpath.kvstore import local_protocol as protocol
from dualpath.kvstore import local_put
from dualpath.kvstore.chain import parents_of
from dualpath.kvstore.local_protocol import HEADER, Hello, Kind
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.service import local_puts
from dualpath.kvstore.service.access_rules import Limits, parse_access
from dualpath.kvstore.service.readiness import Phase
from dualpath.kvstore.store_api import (
    InvalidationScope,
    MissReason,
    ReserveStatus,
    SealStatus,
)
from dualpath.transfer.errors import (
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    Unavailable,
)
from dualpath.transfer.region import F_SEAL_SHRINK, Region

TOKEN = "0123456789abcdef-reader"
READ_ONLY = f"""
[[token]]
name = "reader"
token = "{TOKEN}"

[[rule]]
principal = "token:reader"
rights = ["read"]

[[rule]]
principal = "uid:*"
rights = ["read", "write"]
"""


def memory_of(hashes: Sequence[bytes]) -> Region:
    """The blocks' bytes, one after another."""
    memory = Region.memfd("blocks", max(1, len(hashes)) * NBYTES)
    for index, block in enumerate(hashes):
        memory.view[index * NBYTES : (index + 1) * NBYTES] = content(block)
    return memory


def read_back(served: Served, hashes: list[bytes]) -> bytes:
    """The blocks' bytes as a client reads them, as far as they are there."""
    target = bytearray(len(hashes) * NBYTES)
    read = served.client().read_into(served.space, hashes, target)
    return bytes(target[: read.blocks * NBYTES])


@pytest.mark.parametrize("durable", [True, False])
def test_blocks_out_of_shared_memory_come_back(served: Served, durable: bool) -> None:
    hashes = chain(4)
    memory, client = memory_of(hashes), served.client()
    parents = parents_of(hashes)
    statuses = client.put(served.space, hashes[:3], parents[:3], memory, NBYTES, durable=durable)
    assert statuses == (SealStatus.SEALED,) * 3
    again = client.put(served.space, hashes, parents, memory, NBYTES, durable=durable)
    assert again == (ReserveStatus.EXISTS,) * 3 + (SealStatus.SEALED,)
    assert read_back(served, hashes) == bytes(memory.view)
    assert served.store.stats().reservations == 0


def test_blocks_lie_where_the_client_says(served: Served) -> None:
    hashes = chain(3)
    memory, client = memory_of(hashes[::-1]), served.client()
    at = np.array([2, 1, 0]) * NBYTES
    client.put(served.space, hashes, parents_of(hashes), memory, NBYTES, at=at)
    assert read_back(served, hashes) == b"".join(map(content, hashes))
    assert client.put(served.space, [], [], memory, NBYTES) == ()


def test_a_put_of_more_than_one_message_has_an_outcome_a_block(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_put, "PUT_BYTES_MAX", 2 * NBYTES)
    monkeypatch.setattr(local_puts, "PUT_BYTES_MAX", 2 * NBYTES)
    hashes = chain(5)
    memory = memory_of(hashes)
    statuses = served.client().put(served.space, hashes, parents_of(hashes), memory, NBYTES)
    assert statuses == (SealStatus.SEALED,) * 5
    assert read_back(served, hashes) == bytes(memory.view)


def test_a_block_without_its_parent_is_not_stored(served: Served) -> None:
    hashes = chain(3)
    statuses = served.client().put(served.space, hashes[1:], hashes[:2], memory_of(hashes), NBYTES)
    assert statuses == (ReserveStatus.NO_PARENT,) * 2


def test_bytes_that_change_meanwhile_are_stored_as_they_were_copied(served: Served) -> None:
    memory, client = memory_of(chain(4)), served.client()
    stop = threading.Event()

    def scribble() -> None:
        value = 0
        words = np.frombuffer(memory.view, np.uint8)
        while not stop.is_set():
            value = (value + 1) % 256
            words[:: 1 + value] = value

    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    try:
        for turn in range(8):
            hashes = chain(4, 10_000 * (turn + 1))
            statuses = client.put(served.space, hashes, parents_of(hashes), memory, NBYTES)
            assert statuses == (SealStatus.SEALED,) * 4
            # Whatever the bytes are: a read that verifies them finds them right.
            assert len(read_back(served, hashes)) == 4 * NBYTES
            served.push_out()
            assert len(read_back(served, hashes)) == 4 * NBYTES
    finally:
        stop.set()
        scribbler.join()
    assert served.store.stats().corrupt_blocks == 0


def raw_memory(flags: int, seals: int, nbytes: int = NBYTES) -> int:
    fd = os.memfd_create("odd", flags)
    os.ftruncate(fd, nbytes)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def greeted(served: Served) -> Socket:
    sock = served.raw()
    send(sock, Kind.HELLO, b"".join(Hello(1, protocol.VERSION, b"").parts()))
    sock.recv(4096)
    return sock


def told(sock: Socket) -> Exception | None:
    """What the next answer refuses; None if it does not."""
    answer = sock.recv(4096)
    _, kind, _, _ = HEADER.unpack_from(answer)
    return protocol.error_of(memoryview(answer)[HEADER.size :]) if kind == Kind.ERROR else None


def share(sock: Socket, fds: list[int], nbytes: int = NBYTES) -> Exception | None:
    send(sock, Kind.SHARE, struct.pack("<Q", nbytes))
    assert told(sock) is None
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))
    sock.sendmsg([HEADER.pack(0, Kind.MEMORY, 0, 1)], [rights] if fds else [])
    return told(sock)


def test_memory_that_could_be_cut_off_is_not_taken(served: Served, tmp_path: Path) -> None:
    sock = greeted(served)
    unsealed = raw_memory(os.MFD_ALLOW_SEALING, 0)
    short = raw_memory(os.MFD_ALLOW_SEALING, F_SEAL_SHRINK, NBYTES - 1)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    for fd, why in ((unsealed, "F_SEAL_SHRINK"), (short, "announced"), (file, "memfd")):
        refused = share(sock, [fd])
        assert isinstance(refused, InvalidRequest)
        assert why in str(refused)
        os.close(fd)
    good = raw_memory(os.MFD_ALLOW_SEALING, F_SEAL_SHRINK)
    assert share(sock, [good]) is None
    with pytest.raises(PermissionError):
        os.ftruncate(good, 0)
    os.close(good)


def test_memory_of_the_pool_of_huge_pages_is_not_taken(served: Served) -> None:
    huge = 2 << 20
    flags = os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | os.MFD_HUGE_2MB
    try:
        fd = raw_memory(flags, F_SEAL_SHRINK, huge)
    except OSError:
        pytest.skip("this kernel has no pool of huge pages")
    refused = share(greeted(served), [fd], huge)
    assert isinstance(refused, InvalidRequest)
    assert "MFD_HUGETLB" in str(refused)
    os.close(fd)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_in_the_wrong_place_end_the_connection_and_leak_nothing(
    served: Served,
) -> None:
    before = open_fds()
    memory = Region.memfd("m", NBYTES)
    for fds in ([], [memory.fd, memory.fd]):
        sock = greeted(served)
        refused = share(sock, fds)
        assert isinstance(refused, InvalidRequest)
        assert ended(sock)
        sock.close()
    for kind in (Kind.PING, Kind.SHARE):
        sock = greeted(served)
        send(sock, Kind.SHARE, struct.pack("<Q", 4096))
        assert told(sock) is None
        send(sock, kind, struct.pack("<Q", 4096) if kind == Kind.SHARE else b"")
        assert ended(sock)
        sock.close()
    unannounced = greeted(served)
    send(unannounced, Kind.MEMORY)
    assert ended(unannounced)
    unannounced.close()
    until(lambda: len(served.socket) == 0)
    memory.close()
    assert open_fds() == before


def test_shared_memory_is_bounded(served: Served) -> None:
    sock = greeted(served)
    memory = Region.memfd("m", NBYTES)
    for _ in range(local_put.SHARED_MAX):
        assert share(sock, [memory.fd]) is None
    send(sock, Kind.SHARE, struct.pack("<Q", 4096))
    assert isinstance(told(sock), Overloaded)
    send(sock, Kind.UNSHARE, struct.pack("<Q", 1))
    assert told(sock) is None
    send(sock, Kind.SHARE, struct.pack("<Q", local_put.SHARED_BYTES_MAX))
    assert isinstance(told(sock), Overloaded)
    assert share(sock, [memory.fd]) is None
    memory.close()


def test_a_client_with_many_memories_shares_the_latest(served: Served) -> None:
    client = served.client()
    for turn in range(local_put.SHARED_MAX + 2):
        hashes = chain(1, 1000 * turn)
        memory = memory_of(hashes)
        statuses = client.put(served.space, hashes, [b""], memory, NBYTES)
        assert statuses == (SealStatus.SEALED,)
        memory.close()
    client.unshare(memory)
    client.unshare(memory)
    client.ping()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"block_bytes": NBYTES - 1}, "this layout has"),
        ({"at": np.array([1])}, "leave the shared memory"),
        ({"at": np.array([-1])}, "leave the shared memory"),
        ({"at": np.array([0, 0])}, "not as many"),
        ({"namespace_id": b"?" * 16}, "never opened"),
        ({"parents": [b"short"]}, "hash"),
        ({"memory": Region.anonymous(NBYTES)}, "Region.memfd"),
    ],
)
def test_a_put_that_does_not_fit_is_refused_and_the_client_goes_on(
    served: Served, change: dict[str, object], why: str
) -> None:
    hashes, client = chain(1), served.client()
    right: dict[str, object] = {
        "namespace_id": served.space,
        "hashes": hashes,
        "parents": [b""],
        "memory": memory_of(hashes),
        "block_bytes": NBYTES,
    }
    with pytest.raises(InvalidRequest, match=why):
        client.put(**{**right, **change})  # type: ignore[arg-type]
    assert client.put(**right) == (SealStatus.SEALED,)  # type: ignore[arg-type]


def test_too_many_bytes_and_unknown_memory_are_refused(served: Served) -> None:
    sock = greeted(served)
    count = local_put.PUT_BYTES_MAX // NBYTES + 1
    memory = Region.memfd("m", NBYTES)
    hashes = b"".join(chain(count))
    for number, why in ((1, "not shared"), (1, f"{local_put.PUT_BYTES_MAX} bytes at most")):
        request = local_put.PutRequest(
            served.space,
            len(hashes) // count,
            number,
            NBYTES,
            False,
            np.zeros(count, np.int64),
            hashes,
            hashes,
            np.ones(count, np.uint8),
        )
        send(sock, Kind.PUT, b"".join(request.parts()))
        refused = told(sock)
        assert isinstance(refused, InvalidRequest)
        assert why in str(refused)
        if why == "not shared":
            assert share(sock, [memory.fd]) is None
    memory.close()


def test_who_may_not_write_puts_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, parse_access(READ_ONLY, "rules")) as served:
        hashes = chain(2)
        memory = memory_of(hashes)
        reader = served.client(token=TOKEN)
        with pytest.raises(PermissionDenied) as refused:
            reader.put(served.space, hashes, parents_of(hashes), memory, NBYTES)
        assert refused.value.reason == "rights"
        writer = served.client()
        assert set(writer.put(served.space, hashes, parents_of(hashes), memory, NBYTES)) == {
            SealStatus.SEALED
        }
        # Blocks are attributed to who put them.
        mine = InvalidationScope(writer=f"uid:{os.getuid()}")
        assert served.store.invalidate(mine, dry_run=True).blocks == 2


def test_limits_hold_for_puts_and_blocks_go_one_by_one_within_them(tmp_path: Path) -> None:
    limits = Limits(reservations=1, reserved_bytes=LAYOUT.slot_bytes)
    with serving(tmp_path, limits=limits) as served:
        hashes = chain(5)
        memory, client = memory_of(hashes), served.client()
        statuses = client.put(served.space, hashes, parents_of(hashes), memory, NBYTES)
        assert statuses == (SealStatus.SEALED,) * 5
        assert read_back(served, hashes) == bytes(memory.view)
    with serving(tmp_path / "less", limits=Limits(reserved_bytes=NBYTES - 1)) as served:
        with pytest.raises(Overloaded) as refused:
            served.client().put(served.space, hashes, parents_of(hashes), memory, NBYTES)
        assert refused.value.reason == "quota"
        assert served.store.stats().reservations == 0


def test_a_daemon_that_drains_takes_no_puts(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        hashes, client = chain(1), served.client()
        served.readiness.enter(Phase.DRAINING)
        with pytest.raises(Unavailable, match="drain"):
            client.put(served.space, hashes, [b""], memory_of(hashes), NBYTES)


def test_a_client_that_goes_while_it_puts_leaves_nothing_behind(served: Served) -> None:
    hashes = chain(8)
    memory, sock = memory_of(hashes), greeted(served)
    assert share(sock, [memory.fd], memory.nbytes) is None
    request = local_put.PutRequest(
        served.space,
        len(hashes[0]),
        1,
        NBYTES,
        True,
        np.arange(8) * NBYTES,
        b"".join(hashes),
        b"".join([bytes(len(hashes[0])), *hashes[:-1]]),
        np.array([1] + [0] * 7, np.uint8),
    )
    send(sock, Kind.PUT, b"".join(request.parts()))
    sock.close()
    memory.close()
    until(lambda: len(served.socket) == 0)
    assert served.store.stats().reservations == 0
    found = read_back(served, hashes)
    assert found == b"".join(map(content, hashes))[: len(found)]


def test_an_older_daemon_is_told_apart(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "VERSION", protocol.VERSION_PUT - 1)
    client = served.client()
    with pytest.raises(InvalidRequest, match="update it") as refused:
        client.put(served.space, chain(1), [b""], memory_of(chain(1)), NBYTES)
    assert refused.value.reason == "version"
    client.ping()


def test_blocks_invalidated_under_a_lease_are_called_so(served: Served) -> None:
    space = served.store.open_namespace(Namespace(model="gone", layout=LAYOUT))
    served.space = space
    hashes = chain(4)
    served.put(hashes)
    served.push_out()
    client = served.client()
    with client.map(space, hashes) as mapped:
        assert (mapped.offsets < 0).all(), "they are only on the SSD"
        served.store.invalidate(InvalidationScope(space, hashes[2]))
        read = mapped.read_into(bytearray(4 * NBYTES))
    assert (read.blocks, read.miss) == (2, MissReason.INVALIDATED)
    assert "look up again" in read.detail
    assert served.store.stats().corrupt_blocks == 0

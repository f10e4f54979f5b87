"""The local socket: hits without copies, and no client can harm the daemon or another client."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from socket import socket as Socket

import numpy as np
import pytest
from dualpath.client.local_store import LocalStore
from dualpath.kvstore import local_protocol as protocol
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.local_protocol import HEADER, Hello, Kind, LookupRequest
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.service import local_socket
from dualpath.kvstore.service.access import Access
from dualpath.kvstore.service.access_rules import AccessRules, Limits, parse_access
from dualpath.kvstore.service.auth import Auth
from dualpath.kvstore.service.fair_turns import FairTurns
from dualpath.kvstore.service.gate import Gate
from dualpath.kvstore.service.local_socket import LocalSocket
from dualpath.kvstore.service.quotas import Quotas
from dualpath.kvstore.service.readiness import Phase, Readiness
from dualpath.kvstore.store_api import TIERS, MissReason, SealStatus, Tier
from dualpath.transfer.errors import (
    DualPathError,
    InvalidRequest,
    LeaseExpired,
    Overloaded,
    PermissionDenied,
    Unavailable,
)
from hypothesis import given, settings
from hypothesis import strategies as st

WAIT_S = 20.0
LAYOUT = KVLayout(layers=3, block_tokens=16, layer_bytes=100_000, dtype="bf16")
NBYTES = LAYOUT.block_bytes
SLOTS = 16
NUMBERS = itertools.count()
CONFIG = StoreConfig(
    disk_bytes=64 << 20,
    dram_bytes=SLOTS * LAYOUT.slot_bytes,
    segment_bytes=8 << 20,
    read_buffers_bytes=4 << 20,
    shared_arena=True,
    reserve_wait_s=0.2,
    mapped_owner_bytes_max=6 * LAYOUT.slot_bytes,
)


class Clock:
    """The machine's time, ahead by what a test says."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


def content(block: bytes) -> bytes:
    return random.Random(block).randbytes(NBYTES)


def chain(blocks: int, first: int = 0) -> list[bytes]:
    return chain_hashes(range(first, first + 16 * blocks), 16)


def until(done: Callable[[], bool]) -> None:
    """Wait for what other threads do."""
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline
        os.sched_yield()


@dataclass
class Served:
    """A store behind a local socket, in this process."""

    store: BlockStore
    socket: LocalSocket
    access: Access
    clock: Clock
    readiness: Readiness
    stack: contextlib.ExitStack
    space: bytes = b""
    pushed: int = 0

    def __post_init__(self) -> None:
        # Blocks of a test are no other's.
        self.space = self.store.open_namespace(
            Namespace(model="m", layout=LAYOUT, salt=str(next(NUMBERS)))
        )

    def put(self, hashes: list[bytes]) -> None:
        data = [content(h) for h in hashes]
        statuses = self.store.put(self.space, hashes, parents_of(hashes), data)
        assert set(statuses) == {SealStatus.SEALED}

    def push_out(self) -> None:
        """Fill DRAM with other blocks."""
        self.pushed += 1
        hashes = chain(SLOTS, 1_000_000 * self.pushed)
        for start in range(0, SLOTS, 4):
            part, above = hashes[start : start + 4], [b"", *hashes][start : start + 4]
            self.store.put(self.space, part, above, [bytes(NBYTES)] * 4)

    def client(self, token: str = "") -> LocalStore:
        return self.stack.enter_context(LocalStore.connect(self.socket.path, token=token))

    def raw(self) -> Socket:
        sock = self.stack.enter_context(Socket(socket.AF_UNIX))
        sock.settimeout(WAIT_S)
        sock.connect(self.socket.path)
        return sock

    def greeted(self) -> Socket:
        """A raw connection that has said hello."""
        sock = self.raw()
        send(sock, Kind.HELLO, b"".join(Hello(1, 1, b"").parts()))
        sock.recv(4096)
        return sock


def send(sock: Socket, kind: int, body: bytes = b"", request: int = 0) -> None:
    sock.sendall(HEADER.pack(len(body), kind, 0, request) + body)


def ended(sock: Socket) -> bool:
    """Whether the other side closes, whatever it says first."""
    with contextlib.suppress(ConnectionError):
        while sock.recv(65536):
            pass
    return True


@contextlib.contextmanager
def serving(
    path: Path, rules: AccessRules | None = None, limits: Limits | None = None, **times: float
) -> Iterator[Served]:
    rules = rules or AccessRules()
    limits = limits or Limits()
    clock = Clock()
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(BlockStore.open(path / "data", CONFIG, clock=clock))
        access = Access(rules, store.namespace)
        readiness = Readiness(clock)
        readiness.enter(Phase.SERVING)
        quotas = Quotas(lambda name: access.rules.limits_of(name, limits), clock)
        gate = Gate(readiness, access, quotas, FairTurns(), dict)
        auth = Auth(lambda: access.rules)
        local = LocalSocket(str(path / "s.local"), store, auth, gate, clock=clock, **times)
        local.start()
        stack.callback(local.close)
        clients = stack.enter_context(contextlib.ExitStack())
        yield Served(store, local, access, clock, readiness, clients)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("shared")) as served:
        yield served


@pytest.fixture
def served(shared: Served) -> Iterator[Served]:
    """The shared store for one test: a namespace and clients of its own."""
    with contextlib.ExitStack() as clients:
        own = replace(shared, stack=clients)
        yield own
    until(lambda: len(own.socket) == 0)
    own.readiness.enter(Phase.SERVING)


def test_lookups_over_the_socket_say_what_the_store_says(served: Served) -> None:
    hashes = chain(5)
    served.put(hashes[:3])
    client = served.client()
    client.ping()
    mine = client.lookup(served.space, hashes)
    theirs = served.store.lookup(served.space, hashes, owner="x", lease_s=0)
    assert (mine.blocks, mine.miss, mine.detail) == (theirs.blocks, theirs.miss, theirs.detail)
    assert np.array_equal(mine.checksums, theirs.checksums)
    assert np.array_equal(mine.tiers, theirs.tiers)
    assert client.lookup(served.space, PackedHashes.of(hashes), checksums=False).blocks == 3
    with pytest.raises(InvalidRequest, match="never opened") as refused:
        client.lookup(b"?" * 16, hashes)
    assert refused.value.reason == "namespace"
    with pytest.raises(InvalidRequest, match="16"):
        client.lookup(b"short", hashes)


def test_blocks_are_read_where_they_lie(served: Served) -> None:
    hashes = chain(4)
    served.put(hashes)
    client = served.client()
    with client.map(served.space, [*hashes, b"x" * 32]) as mapped:
        assert (len(mapped), mapped.hit.miss) == (4, MissReason.ABSENT)
        for index, block in enumerate(hashes):
            view = mapped.view(index)
            assert view.readonly
            assert view == content(block)
            assert mapped.array(index).tobytes() == content(block)
        assert mapped.stable()
        served.push_out()
        assert mapped.view(2) == content(hashes[2])
        assert mapped.stable()
        mapped.renew(5.0)
    assert not mapped.stable()
    assert served.store.stats().mapped_leases == 0


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


def on_disk(path: Path, hashes: list[bytes]) -> Namespace:
    """Blocks that a daemon which starts now finds on its SSD only."""
    namespace = Namespace(model="on disk", layout=LAYOUT)
    with BlockStore.open(path / "data", CONFIG) as store:
        space = store.open_namespace(namespace)
        store.put(space, hashes, parents_of(hashes), [content(h) for h in hashes])
    return namespace


@pytest.mark.parametrize("verify", [True, False])
def test_read_into_copies_what_is_in_memory_and_on_disk(tmp_path: Path, verify: bool) -> None:
    hashes = chain(6)
    namespace = on_disk(tmp_path, hashes[:4])
    with serving(tmp_path) as served:
        served.space = served.store.open_namespace(namespace)
        data = [content(h) for h in hashes[4:]]
        served.store.put(served.space, hashes[4:], hashes[3:5], data)
        client = served.client()
        for fetched in (4, 0):
            target = bytearray(7 * NBYTES)
            read = client.read_into(served.space, hashes, target, verify=verify)
            assert (read.blocks, read.fetched, read.miss) == (6, fetched, MissReason.NONE)
            assert target[: 6 * NBYTES] == b"".join(map(content, hashes))
        assert served.store.stats().leases == 0


def test_tiers_are_told_and_what_is_on_disk_has_no_view(tmp_path: Path) -> None:
    hashes = chain(2)
    namespace = on_disk(tmp_path, hashes)
    with serving(tmp_path) as served:
        space = served.store.open_namespace(namespace)
        client = served.client()
        assert [TIERS[t] for t in client.lookup(space, hashes).tiers] == [Tier.SSD] * 2
        with client.map(space, hashes) as mapped:
            assert mapped.offsets.tolist() == [-1, -1]
            with pytest.raises(InvalidRequest, match="read_into"):
                mapped.view(1)
        client.read_into(space, hashes, bytearray(2 * NBYTES))
        assert [TIERS[t] for t in client.lookup(space, hashes).tiers] == [Tier.DRAM] * 2


def test_read_into_goes_where_it_is_told_and_ends_where_the_prefix_ends(served: Served) -> None:
    hashes = chain(5)
    served.put(hashes[:3])
    client = served.client()
    target = bytearray(3 * NBYTES)
    at = np.array([2 * NBYTES, NBYTES, 0, 0, 0])
    read = client.read_into(served.space, hashes, target, at=at)
    assert (read.blocks, read.miss) == (3, MissReason.ABSENT)
    assert target == b"".join(map(content, reversed(hashes[:3])))
    assert client.read_into(served.space, [], target).blocks == 0
    with pytest.raises(InvalidRequest, match="leave"):
        client.read_into(served.space, hashes[:3], target, at=at + 1)
    client.ping()


def test_a_flipped_byte_in_memory_is_found_and_read_again(served: Served) -> None:
    hashes = chain(3)
    served.put(hashes)
    client = served.client()
    with client.map(served.space, hashes) as mapped:
        served.store.arena.view[int(mapped.offsets[1]) + NBYTES - 1] ^= 4
        target = bytearray(3 * NBYTES)
        read = mapped.read_into(target)
    assert (read.blocks, read.fetched) == (3, 1)
    assert target == b"".join(map(content, hashes))


def test_the_guard_tells_a_reader_that_its_time_was_over(served: Served) -> None:
    hashes = chain(3)
    served.put(hashes)
    client = served.client()
    mapped = client.map(served.space, hashes, lease_s=5)
    served.clock.ahead += 6
    served.push_out()
    assert not mapped.stable()
    with pytest.raises(LeaseExpired):
        mapped.read_into(bytearray(3 * NBYTES), verify=False)
    with pytest.raises(LeaseExpired):
        mapped.renew(5)
    mapped.release()


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
def test_noise_harms_nobody(shared: Served, parts: list[bytes], greeted: bool) -> None:
    with contextlib.ExitStack() as clients:
        served = replace(shared, stack=clients)
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


def test_the_leases_of_a_connection_are_bounded(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualpath.kvstore.service import local_calls

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


def test_the_end_of_the_daemon_is_unavailable_and_views_stay_mapped(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.put(chain(1))
        client = served.client()
        mapped = client.map(served.space, chain(1))
        view = mapped.view(0)
        served.socket.close()
        with pytest.raises(Unavailable):
            client.ping()
        assert not mapped.stable()  # its leases ended with the connection
        assert len(bytes(view)) == NBYTES
        assert not Path(served.socket.path).exists()


def test_nobody_there_is_said_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="--unix"):
        LocalStore.connect(str(tmp_path / "none.local"))


def test_a_peer_that_is_no_daemon_is_refused(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "other"))
    listener.listen(1)

    def answer() -> None:
        sock, _ = listener.accept()
        sock.recv(100)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        sock.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(DualPathError):
        LocalStore.connect(str(tmp_path / "other"), answer_s=1.0)
    thread.join()
    listener.close()


def test_many_threads_share_a_client(served: Served) -> None:
    hashes = chain(6)
    served.put(hashes)
    client = served.client()
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                target = bytearray(6 * NBYTES)
                assert client.read_into(served.space, hashes, target).blocks == 6
                assert target[5 * NBYTES :] == content(hashes[5])
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_readers_under_pressure_never_see_other_bytes(served: Served) -> None:
    """Blocks come, are demoted and expire while others read them in place."""
    stop = threading.Event()

    def churn() -> None:
        number = 1
        while not stop.is_set():
            if number <= 30:
                served.put(chain(3, 1_000_000 + 1000 * number))
            served.clock.ahead += 0.5
            number += 1

    hashes = chain(5)
    served.put(hashes)
    writer = threading.Thread(target=churn)
    writer.start()
    try:
        client = served.client()
        stable = 0
        for _ in range(150):
            try:
                mapped = client.map(served.space, hashes, lease_s=1.0)
            except Overloaded:
                continue
            copies = [
                (index, bytes(mapped.view(index)))
                for index in range(len(mapped))
                if mapped.offsets[index] >= 0
            ]
            if mapped.stable():
                stable += 1
                for index, copy in copies:
                    assert copy == content(hashes[index])
            with contextlib.suppress(LeaseExpired):
                mapped.release()
        assert stable
    finally:
        stop.set()
        writer.join()

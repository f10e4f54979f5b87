"""A store behind a local socket in this process, and raw connections to it: for tests.

Everything is real: the socket, its threads, the protocol, the arena.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from socket import socket as Socket

from dualpath.client.local_store import LocalStore
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.local_protocol import HEADER, Hello, Kind
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.service.access import Access
from dualpath.kvstore.service.access_rules import AccessRules, Limits
from dualpath.kvstore.service.auth import Auth
from dualpath.kvstore.service.gate import Gate
from dualpath.kvstore.service.local_socket import LocalSocket
from dualpath.kvstore.service.quotas import Quotas
from dualpath.kvstore.service.readiness import Phase, Readiness
from dualpath.kvstore.store_api import SealStatus

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
    """The machine's time, ahead by what a test says: expiry without waiting."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return time.monotonic() + self.ahead


def content(block: bytes) -> bytes:
    """Bytes that only the key determines."""
    return random.Random(block).randbytes(NBYTES)


def chain(blocks: int, first: int = 0) -> list[bytes]:
    """Hashes of a chain; `first` tells chains apart."""
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
        """Store a chain."""
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
        """A client that ends with the test."""
        return self.stack.enter_context(LocalStore.connect(self.socket.path, token=token))

    def raw(self) -> Socket:
        """A connection that has said nothing."""
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
    """One message."""
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
    """A store and its local socket; `times` are those of `LocalSocket`."""
    rules = rules or AccessRules()
    limits = limits or Limits()
    clock = Clock()
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(BlockStore.open(path / "data", CONFIG, clock=clock))
        access = Access(rules, store.namespace)
        readiness = Readiness(clock)
        readiness.enter(Phase.SERVING)
        quotas = Quotas(lambda name: access.rules.limits_of(name, limits), clock)
        gate = Gate(readiness, access, quotas, dict)
        auth = Auth(lambda: access.rules)
        local = LocalSocket(str(path / "s.local"), store, auth, gate, clock=clock, **times)
        local.start()
        stack.callback(local.close)
        clients = stack.enter_context(contextlib.ExitStack())
        yield Served(store, local, access, clock, readiness, clients)

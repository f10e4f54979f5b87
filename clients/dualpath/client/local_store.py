"""A daemon of this machine, used without gRPC and without copies: look up, map, read.

Owns one connection to the daemon's local socket and the mapping of its arena, which is read-only.
Blocks that lie in the daemon's DRAM are read where they are; others are fetched there first. Every
byte that `read_into` counts is the block's own: it is verified, or, with `verify=False`, the
daemon's guard says that the memory did not change meanwhile. Thread-safe: one request at a time.

    with LocalStore.connect("run/dualpath.sock.local") as store:
        with store.map(namespace_id, hashes) as mapped:
            first = mapped.view(0)          # a read-only memoryview, no copy
            ...
            assert mapped.stable()          # the lease held until here
        store.read_into(namespace_id, hashes, target)
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import numpy as np
from dualpath.client.local_requests import (
    Hashes,
    check_put,
    lookup_parts,
    milliseconds,
    packed,
    put_request,
)
from dualpath.client.mapped_blocks import MappedBlocks
from dualpath.kvstore import local_protocol as protocol
from dualpath.kvstore import local_put
from dualpath.kvstore.layout import BLOCK_BYTES_MAX
from dualpath.kvstore.local_frames import LocalFrames
from dualpath.kvstore.local_protocol import (
    ANSWER,
    Body,
    Hello,
    Kind,
    MalformedMessage,
    Parts,
    Welcome,
)
from dualpath.kvstore.local_put import PutStatus
from dualpath.kvstore.mapped_read import MAPPED_BYTES, ReadBlocks, read_in_parts, unmapped
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.store_api import BATCH_BLOCKS_MAX, PrefixHit
from dualpath.transfer.errors import (
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    Overloaded,
    PeerLost,
    PermissionDenied,
    Unavailable,
)
from dualpath.transfer.region import Region
from numpy.typing import NDArray

ANSWER_S = 30.0
"""Longest wait for an answer: a fetch may have to wait for a disk."""
LEASE_S = 30.0
SPIN_S = 300e-6
"""Longest time that a thread asks for an answer without sleeping. Answers out of memory take less,
and waking a thread up costs as much as a look-up."""
_NAMESPACES_KEPT = 1024
_AT_ONCE = frozenset({Kind.PING, Kind.LOOKUP, Kind.MAP, Kind.RENEW, Kind.RELEASE, Kind.DONE})
"""What the daemon answers without a disk."""
_NO_REFUSAL = DualPathError("nothing was refused")

T = TypeVar("T")


class LocalStore:
    """See the module docstring. Make it with `connect`; a context manager that closes."""

    def __init__(
        self,
        frames: LocalFrames,
        arena: Region | None,
        why_no_arena: str,
        version: int,
        answer_s: float,
        spin_s: float,
    ) -> None:
        self._frames = frames
        self._arena = arena
        self._lock = threading.Lock()
        self._answer_s = answer_s
        self._spin_s = spin_s if len(os.sched_getaffinity(0)) > 1 else 0.0
        self._process = os.getpid()
        self._requests = 0
        self._ended = ""
        self._block_bytes: dict[bytes, int] = {}
        self._version = version
        # Number of each shared memory at the daemon, by its serial; the one used last is last.
        self._shared: OrderedDict[int, int] = OrderedDict()
        self._putting = threading.Lock()
        self.why_no_arena = why_no_arena
        """Why nothing can be mapped over this connection; "" if it can."""

    @classmethod
    def connect(
        cls,
        path: str,
        *,
        token: str = "",
        answer_s: float = ANSWER_S,
        prefault: bool = True,
        spin_s: float = SPIN_S,
    ) -> LocalStore:
        """Connect to the socket of a daemon (its `unix` and `.local`).

        `prefault` maps all pages now, so that no read pays for it. `spin_s` bounds the time of an
        answer that is not slept through; 0: sleep always. Raises Unavailable (nobody
        listens), PermissionDenied (token, user), InvalidRequest (another version).
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise Unavailable(
                f"no daemon listens at {path}: {error.strerror}; start one with --unix and give "
                f"its path with {protocol.SUFFIX!r} added"
            ) from error
        frames = LocalFrames(sock, message_s=answer_s)
        try:
            arena, why_not, version = _greeted(frames, token, answer_s, prefault=prefault)
        except BaseException:
            frames.close()
            raise
        return cls(frames, arena, why_not, version, answer_s, spin_s)

    @property
    def arena(self) -> Region | None:
        """The daemon's arena, read-only; None if `why_no_arena` says why."""
        return self._arena

    def ping(self) -> None:
        """An empty round trip."""
        self._ask(Kind.PING, [], _nothing)

    def lookup(
        self,
        namespace_id: bytes,
        hashes: Hashes,
        *,
        lease_s: float = 0.0,
        checksums: bool = True,
    ) -> PrefixHit:
        """The longest prefix that is present; see `Store.lookup`. Without `checksums` that array
        has no columns."""
        parts = lookup_parts(namespace_id, hashes, lease_s, checksums)
        hit, _ = self._ask(Kind.LOOKUP, parts, protocol.hit_of)
        return hit

    def map(
        self,
        namespace_id: bytes,
        hashes: Hashes,
        *,
        lease_s: float = LEASE_S,
        checksums: bool = True,
    ) -> MappedBlocks:
        """Pin the prefix's copies in DRAM and read them where they lie, until they are released.

        Raises Overloaded (too many bytes mapped), PermissionDenied (no arena).
        """
        arena = self._mappable()
        parts = lookup_parts(namespace_id, hashes, lease_s, checksums)
        mapped, sizes = self._ask(Kind.MAP, parts, protocol.mapped_of)
        return MappedBlocks(self, arena, mapped, sizes.chunk_bytes)

    def read_into(
        self,
        namespace_id: bytes,
        hashes: Hashes,
        target: memoryview | bytearray,
        *,
        at: NDArray[np.int64] | None = None,
        verify: bool = True,
    ) -> ReadBlocks:
        """Copy the prefix's blocks into `target`, block i to `at[i]` (by default one after
        another), from DRAM or from the SSD. Returns how many leading blocks are there and right;
        beyond them `target` may hold anything.
        """
        chain = packed(hashes)
        bytes_of = self._block_bytes

        def part() -> int:
            # Before the first answer the size of a block is not known.
            return max(1, MAPPED_BYTES // bytes_of.get(namespace_id, BLOCK_BYTES_MAX))

        def read(start: int, end: int) -> ReadBlocks:
            with self._held(namespace_id, chain.part(start, end)) as mapped:
                if len(bytes_of) >= _NAMESPACES_KEPT:
                    bytes_of.clear()
                bytes_of[namespace_id] = mapped.nbytes
                places = None if at is None else at[start:end]
                return mapped.read_into(target, at=places, verify=verify, first=start)

        return read_in_parts(read, len(chain), part)

    def put(
        self,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        parents: Sequence[bytes],
        memory: Region,
        block_bytes: int,
        *,
        at: NDArray[np.int64] | None = None,
        durable: bool = True,
    ) -> tuple[PutStatus, ...]:
        """Store whole blocks, parents first, block i from `at[i]` of `memory` on (by default one
        after another); see `embedded.put` for the outcomes. With `durable` they are on the SSD.

        `memory` is a memfd sealed against shrinking (`Region.memfd`), which is shared with the
        daemon from the first put out of it until `unshare`; do not change the blocks' bytes while
        they are put: what they were when they were copied is what is stored. Raises InvalidRequest
        (places, sizes, an old daemon), PermissionDenied, Overloaded.
        """
        if at is None:
            at = np.arange(len(hashes), dtype=np.int64) * block_bytes
        check_put(self._version, hashes, parents, memory, block_bytes, at)
        step = max(1, min(BATCH_BLOCKS_MAX, local_put.PUT_BYTES_MAX // block_bytes))
        statuses: tuple[PutStatus, ...] = ()
        with self._putting:
            number = self._number_of(memory)
            for start in range(0, len(hashes), step):
                part = slice(start, start + step)
                request = put_request(
                    namespace_id,
                    hashes[part],
                    parents[part],
                    number,
                    block_bytes,
                    at[part],
                    durable,
                )
                answer = self._ask(Kind.PUT, request.parts(), local_put.statuses_of)
                if len(answer) != len(request.offsets):
                    raise Unavailable(f"{len(answer)} outcomes of {len(request.offsets)} blocks")
                statuses += answer
        return statuses

    def unshare(self, memory: Region) -> None:
        """The daemon lets go of a memory that blocks were put from. Idempotent."""
        with self._putting:
            number = self._shared.pop(memory.serial, 0)
            if number:
                self._ask(Kind.UNSHARE, local_put.number_parts(number), _nothing)

    def renew(self, lease_id: int, lease_s: float) -> None:
        """Extend a lease from now. Raises LeaseExpired."""
        self._ask(Kind.RENEW, protocol.renew_parts(lease_id, milliseconds(lease_s)), _nothing)

    def release(self, lease_ids: Sequence[int]) -> None:
        """End leases. A connection that has ended has released them already."""
        with contextlib.suppress(Unavailable):
            self._ask(Kind.RELEASE, protocol.release_parts(lease_ids), _nothing)

    def fetch(
        self, lease_id: int, blocks: NDArray[np.int32], chunks: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Bring chunks of leased blocks into the arena: (offset, FetchStatus) of as many leading
        ones as there was room for. They stay until `done`, the next fetch, or 10 s: verify
        what you copy."""
        parts = protocol.fetch_parts(lease_id, blocks, chunks)
        return self._ask(Kind.FETCH, parts, protocol.fetched_of)

    def done(self) -> None:
        """The fetched chunks are copied."""
        self._ask(Kind.DONE, [], _nothing)

    def report_corrupt(self, lease_id: int, block: int, chunk: int) -> bool:
        """A chunk did not have its checksum; whether the block was dropped."""
        return self._ask(Kind.CORRUPT, protocol.chunk_parts(lease_id, block, chunk), _is_true)

    def close(self) -> None:
        """End the connection and with it all leases. Idempotent. Pages stay mapped for as long as
        views of them live; what they hold may then change."""
        self._frames.shut()  # whoever waits for an answer stops waiting
        with self._lock:
            self._end("closed")
            arena, self._arena = self._arena, None
        if arena is not None:
            with contextlib.suppress(BufferError):
                arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _number_of(self, memory: Region) -> int:
        """The daemon's number of a memory, which it is given unless it has it."""
        number = self._shared.get(memory.serial)
        if number is None:
            while len(self._shared) >= local_put.SHARED_MAX:
                _, oldest = self._shared.popitem(last=False)
                self._ask(Kind.UNSHARE, local_put.number_parts(oldest), _nothing)
            number = self._share(memory)
            self._shared[memory.serial] = number
        self._shared.move_to_end(memory.serial)
        return number

    def _share(self, memory: Region) -> int:
        with self._lock:  # nothing may come between the two
            self._ask_locked(Kind.SHARE, local_put.number_parts(memory.nbytes), _nothing)
            return self._ask_locked(Kind.MEMORY, [], local_put.number_of, (memory.fd,))

    def _mappable(self) -> Region:
        if self._arena is None:
            why = self.why_no_arena or "the connection is closed"
            raise PermissionDenied(f"nothing can be mapped: {why}", reason="rights")
        return self._arena

    def _held(self, namespace_id: bytes, hashes: PackedHashes) -> MappedBlocks:
        """Mapped; or only leased, if too much is mapped already: then all of it is fetched."""
        try:
            return self.map(namespace_id, hashes)
        except Overloaded:
            parts = lookup_parts(namespace_id, hashes, LEASE_S, True)
            hit, sizes = self._ask(Kind.LOOKUP, parts, protocol.hit_of)
            mapped = unmapped(hit, sizes.block_bytes)
            return MappedBlocks(self, self._mappable(), mapped, sizes.chunk_bytes)

    def _ask(self, kind: Kind, parts: Parts, decoded: Callable[[Body], T]) -> T:
        """One request and its answer, taken apart."""
        with self._lock:
            return self._ask_locked(kind, parts, decoded)

    def _ask_locked(
        self, kind: Kind, parts: Parts, decoded: Callable[[Body], T], fds: tuple[int, ...] = ()
    ) -> T:
        if os.getpid() != self._process:
            raise InvalidRequest(
                "this connection is of the process before the fork: connect after forking"
            )
        if self._ended:
            raise Unavailable(f"the connection to the daemon has ended: {self._ended}")
        self._requests += 1
        try:
            refusal, value = self._exchange(kind, parts, decoded, fds)
        except (DeadlineExceeded, PeerLost, MalformedMessage) as error:
            # A late answer must not be taken for another's.
            self._end(str(error))
            raise Unavailable(f"the connection to the daemon has ended: {error}") from error
        if value is None:
            raise refusal
        return value

    def _exchange(
        self, kind: Kind, parts: Parts, decoded: Callable[[Body], T], fds: tuple[int, ...]
    ) -> tuple[DualPathError, T | None]:
        self._frames.send(kind, self._requests, parts, fds)
        spin_s = self._spin_s if kind in _AT_ONCE else 0.0
        most = protocol.ANSWER_BYTES_MAX
        came = self._frames.receive(most, idle_s=self._answer_s, spin_s=spin_s)
        if came is None:
            raise PeerLost("the daemon has closed it")
        answered, request, body = came
        try:
            if request != self._requests:
                raise MalformedMessage(f"the daemon answered request {request}")
            if answered == Kind.ERROR:
                return protocol.error_of(body), None
            if answered != kind | ANSWER:
                raise MalformedMessage(f"the daemon answered with {answered:#x}")
            return _NO_REFUSAL, decoded(body)
        finally:
            self._frames.consume(body)

    def _end(self, reason: str) -> None:
        if not self._ended:
            self._ended = reason
            self._frames.close()


def _greeted(
    frames: LocalFrames, token: str, answer_s: float, *, prefault: bool
) -> tuple[Region | None, str, int]:
    """Say hello; (the arena or None, why none, the version)."""
    hello = Hello(protocol.VERSION_LEAST, protocol.VERSION, token.encode())
    try:
        frames.send(Kind.HELLO, 0, hello.parts())
        came = frames.receive(protocol.HELLO_BYTES_MAX, idle_s=answer_s, with_fds=True)
    except (DeadlineExceeded, PeerLost) as error:
        raise Unavailable(f"the daemon did not answer: {error}") from error
    if came is None:
        raise Unavailable("the daemon closed the connection: it may have too many")
    kind, _, body = came
    try:
        if kind == Kind.ERROR:
            raise protocol.error_of(body)
        if kind != Kind.HELLO | ANSWER:
            raise MalformedMessage(f"no daemon of dualpath: it answered {kind:#x}")
        welcome = Welcome.of(body)
    finally:
        frames.consume(body)
    if not welcome.arena_bytes:
        return None, welcome.text, welcome.version
    if len(frames.fds) != 1:
        raise MalformedMessage(f"{len(frames.fds)} descriptors came with the arena, not one")
    arena = Region.received(frames.fds.pop(), welcome.arena_bytes, writable=False)
    if prefault:
        arena.map_pages()
    return arena, "", welcome.version


def _nothing(body: Body) -> bool:
    if len(body):
        raise MalformedMessage(f"{len(body)} bytes where none belong")
    return True


def _is_true(body: Body) -> bool:
    return bytes(body) == b"\x01"

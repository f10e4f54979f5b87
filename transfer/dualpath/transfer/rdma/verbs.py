"""The verbs port: what the RDMA transport needs of a device, and no more.

Between the transport's logic and the library. Implementations: `native_device` (libibverbs, called
by our own extension), `pyverbs_device` (libibverbs by way of pyverbs, of Debian or PyPI) and
`simulated_device` (inside this process, for tests).

Contract
    Work requests of one queue pair are carried out in the order in which they were posted, those
    of one post with one ring of the doorbell where the library can. A request that is not
    `signaled` completes with the next one of its queue pair that is; one that fails always
    completes, and the queue pair is in error from then on.
    A BIND takes effect before any later request of its queue pair begins. Once an INVALIDATE has
    completed, no further byte is written under that key. Once `halt` has returned, the queue pair
    neither reads nor writes any memory any more; completions that were not polled may be lost.
    Posting, `poll` and `arm` are one thread's; `halt` may be any thread's.
Errors
    Everything raises Unavailable, naming the call and what to do, and nothing else.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

POST_MAX = 64
"""Most work requests of one post."""


class Opcode(enum.Enum):
    """What a work request does."""

    SEND = "send"
    WRITE = "write"
    WRITE_IMM = "write_imm"
    BIND = "bind"
    INVALIDATE = "invalidate"


class Received(enum.Enum):
    """What a completion is about."""

    MESSAGE = "message"
    IMMEDIATE = "immediate"
    REQUEST = "request"  # one of our own


SUCCESS = 0
FLUSHED = 5
REMOTE_ACCESS = 10
RETRIES_EXHAUSTED = 12
RECEIVER_NOT_READY = 13
STATUS_NAMES = {
    4: "local protection: the memory is not registered (any more)",
    FLUSHED: "flushed: the queue pair is in error",
    9: "remote invalid request",
    REMOTE_ACCESS: "remote access: the peer has withdrawn the key, or it is out of its bounds",
    11: "remote operation",
    RETRIES_EXHAUSTED: "retries exhausted: the peer does not answer",
    RECEIVER_NOT_READY: "the peer had no receive posted",
}
"""Of the statuses of work completions (numbers of libibverbs), those that are met."""


class WorkCompletion(NamedTuple):
    """The end of a request, or what came in. With a failure only `ident`, `status` and
    `queue_pair` can be relied upon."""

    ident: int
    status: int
    what: Received
    nbytes: int
    immediate: int
    queue_pair: int


class Piece(NamedTuple):
    """Local memory."""

    address: int
    nbytes: int
    lkey: int


class MemoryKeys(Protocol):
    """Memory registered with a device; a memory window's rkey is `Window.next_key`'s."""

    @property
    def lkey(self) -> int:
        """For local access."""

    @property
    def rkey(self) -> int:
        """For peers."""

    def close(self) -> None:
        """Deregister it."""


class Window(Protocol):
    """A memory window of type 2B, bound by a work request of the one queue pair it is used on."""

    def next_key(self) -> int:
        """The rkey that the next BIND gives it."""

    def close(self) -> None:
        """Free it."""


@dataclass(frozen=True, slots=True)
class WorkRequest:
    """`pieces` go to `remote_address` under `rkey` (WRITE, WRITE_IMM) or as a message (SEND).

    BIND binds `window` to [remote_address, + nbytes) of our own `memory`, under `rkey`, which is
    the window's `next_key`; INVALIDATE withdraws `rkey`.
    """

    ident: int
    opcode: Opcode
    signaled: bool
    pieces: Sequence[Piece] = ()
    remote_address: int = 0
    rkey: int = 0
    immediate: int = 0
    window: Window | None = None
    memory: MemoryKeys | None = None
    nbytes: int = 0


class LinkLayer(enum.Enum):
    """What a port is plugged into: Ethernet means RoCE, addressed by GID."""

    ETHERNET = "ethernet"
    INFINIBAND = "infiniband"


class GidEntry(NamedTuple):
    """A row of a port's table of GIDs. `kind` is `RoCE v2`, `RoCE v1` or `IB`."""

    row: int
    gid: bytes
    kind: str


@dataclass(frozen=True, slots=True)
class PortInfo:
    """A port of a device. `mtu` is in bytes."""

    number: int
    active: bool
    link_layer: LinkLayer
    lid: int
    mtu: int
    gids: Sequence[GidEntry]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a device can do."""

    name: str
    requests_max: int
    pieces_max: int
    completions_max: int
    memory_windows: bool
    ports: Sequence[PortInfo]


@dataclass(frozen=True, slots=True)
class QueuePairAddress:
    """Where a queue pair is to be found; what peers tell each other."""

    number: int
    packet_number: int
    lid: int
    gid: bytes
    mtu: int


@dataclass(frozen=True, slots=True)
class PathSettings:
    """How a queue pair gets to its peer. `retries` and `receiver_retries` end: 7 would mean for
    ever. A retry comes after about 4.096 us * 2 ** `timeout_exponent`, at most four times that."""

    port: int
    gid_index: int
    service_level: int
    traffic_class: int
    hop_limit: int = 64
    retries: int = 4
    receiver_retries: int = 4
    timeout_exponent: int = 14
    receiver_timer: int = 12


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Sizes of a queue pair: send requests, receives, pieces of one request."""

    sends: int
    receives: int
    pieces: int


class CompletionQueue(Protocol):
    """Completions of one connection's queue pairs, with a descriptor to wait on."""

    def fileno(self) -> int:
        """Readable after `arm`, once a completion came."""

    def arm(self) -> None:
        """Ask for one event with the next completion; poll once more before waiting."""

    def acknowledge(self) -> None:
        """Take the event that made the descriptor readable."""

    def poll(self, most: int) -> list[WorkCompletion]:
        """Completions that are there, at most `most`."""

    def close(self) -> None:
        """Free it, after its queue pairs."""


class QueuePair(Protocol):
    """A reliable connection (RC), made in the state INIT: receives may be posted."""

    @property
    def number(self) -> int:
        """The queue pair's number (24 bits)."""

    def join(self, own: QueuePairAddress, peer: QueuePairAddress, path: PathSettings) -> None:
        """INIT -> RTR -> RTS."""

    def post_receive(self, ident: int, piece: Piece) -> None:
        """Give memory for one message (an immediate takes one as well)."""

    def post_send(self, requests: Sequence[WorkRequest]) -> None:
        """Post up to POST_MAX requests with one call. What the device refuses half way raises: it
        then has those in front of the refused one, and the queue pair is to be halted."""

    def post_rows(self, rows: bytes | bytearray) -> None:
        """The same with WRITEs as rows of bytes (`work_rows`), which cost no object each."""

    def halt(self) -> None:
        """Into error, then reset; see the contract."""

    def close(self) -> None:
        """Free it."""


class Device(Protocol):
    """An open device with a protection domain."""

    @property
    def info(self) -> DeviceInfo:
        """What it can do, as found when it was opened."""

    def register(self, address: int, nbytes: int, *, writable: bool) -> MemoryKeys:
        """Pin memory of this process; `writable`: peers may be let write into it."""

    def register_dmabuf(self, fd: int, offset: int, nbytes: int, *, writable: bool) -> MemoryKeys:
        """Register memory of another device (a GPU's) that `fd` exports as a dmabuf; addresses in
        it count from the beginning of the dmabuf. Unavailable (`no_dmabuf`) where that fails."""

    def window(self) -> Window:
        """A memory window, unbound."""

    def completion_queue(self, depth: int) -> CompletionQueue:
        """A queue with a completion channel of its own."""

    def queue_pair(self, queue: CompletionQueue, limits: QueueLimits, port: int) -> QueuePair:
        """An RC queue pair, both of whose halves complete into `queue`."""

    def close(self) -> None:
        """Close it, after all that was made with it."""


class Verbs(Protocol):
    """The library."""

    def devices(self) -> Sequence[str]:
        """Names of the devices; Unavailable, with the remedy, where there is no RDMA at all."""

    def open(self, name: str, *, memory_windows: bool = True) -> Device:
        """Open a device; without `memory_windows` it shows none."""

"""The transport port: how bytes get into another process's memory.

One primitive: *write these slices of a region into those strided slices of a remote region, on
this lane, with this tag, by this deadline*. Completions and arrivals are values handed to
callbacks. The library knows no RPC, no protobuf and no blocks.

Contract, held by every implementation and by `check_transport` (conformance.py)

Connections
    The side that will *receive* dials, with an `invitation` got over the control channel from
    the side that will write; so data connections go the same way as control connections. An
    invitation is random (128 bits), single-use and short-lived; it names the peer, so nobody
    can attach under another's name. Names are local: the inviter knows the connection by the
    name it invited, the dialler by the name it passed to `connect`. A connection is full
    duplex: either side may write. A peer has one connection per transport; a new one under the
    same name replaces (and loses) the old one. `on_peer_lost` is called once a connection ends
    for any reason but `close()`.
Windows
    `expose` opens a window on a local region. A write lands only if its window key and
    generation are live, its tag is *armed* in that window by `arm`, and its target slices equal
    the armed ones. Each armed tag is accepted at most once: a duplicate, a late write, one for
    a revoked window or one out of bounds is drained elsewhere, answered REFUSED, and does
    not touch the region.
    `revoke` and `disarm` fence: when they return, no further byte of a write under that window
    (or those tags) will land, including a write whose bytes were arriving. `disarm` returns
    the tags that had not landed.
Order and buffers
    Writes to one peer on one lane start in submission order; lanes with a lower value go first.
    Nothing is promised about the order of completions.
    The source bytes must not change until the write's completion was delivered. Exactly one
    Completion is delivered per accepted `write` call: DONE after the receiver has acknowledged
    that all bytes are in place, REFUSED after its refusal, LOST, EXPIRED or CLOSED otherwise.
    After EXPIRED the transport no longer reads the source (it drops the connection if it must).
    `on_arrival` is called once per landed tag, before the writer's DONE is sent, with all bytes
    in place. If it returns False the receiver answers REFUSED, detail "rejected".
Batches
    `arm_table` and `write_batch` are many `arm`s and `write`s at the cost of one: consecutive
    tags, one table of slices, one completion once all of them have ended. Each part is armed,
    fenced, refused and told on arrival for itself. Within a batch the parts go in order.
Threads
    Every method may be called from any thread and never blocks for longer than its deadline;
    `write` blocks not at all: it queues, up to `queue_bytes_max` a peer, and raises Overloaded
    beyond. Callbacks run on transport threads, must be quick (a checksum is fine) and must not
    raise; what they raise is logged and counts as False.
Failure
    Nothing here raises on a peer's account except `connect`; a malformed or hostile frame
    costs the peer its connection, nothing else.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slice_table import Fields, SliceTable
from dualpath.transfer.slices import Slices

INVITATION_TTL_S = 30.0
WRITE_BYTES_MAX = 64 << 20
"""Most bytes of a single write, and of a batch."""
BATCH_WRITES_MAX = 256
"""Most writes of one batch."""


class WriteStatus(enum.Enum):
    """How a write ended."""

    DONE = "done"
    REFUSED = "refused"
    LOST = "lost"
    EXPIRED = "expired"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Write:
    """One write: `source_slices` of `source` to `target_slices` of the region of `target`.

    Both sides have the same number of bytes. `tag` is 64 bits, chosen by the window's owner.
    `deadline_s` is time left, in seconds from the call.
    """

    source: Region
    source_slices: Slices
    target: RegionDescriptor
    target_slices: Slices
    lane: Lane
    tag: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class WriteBatch:
    """Writes with the tags `first_tag`, `first_tag` + 1, ...: part i of `source_table` goes to
    part i of `target_table`, which has as many bytes. At most BATCH_WRITES_MAX parts."""

    source: Region
    source_table: SliceTable
    target: RegionDescriptor
    target_table: SliceTable
    lane: Lane
    first_tag: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of a write, at the writer. `detail` names the reason unless DONE."""

    peer: str
    tag: int
    status: WriteStatus
    nbytes: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class BatchCompletion:
    """The end of a batch, at the writer. With DONE every part has landed but those in `refused`
    (reason by tag); with any other status none may be counted on."""

    peer: str
    first_tag: int
    status: WriteStatus
    refused: Mapping[int, str]
    detail: str = ""


class Arrival:
    """A write that landed, at the receiver: its bytes are in `slices` of the window's region."""

    __slots__ = ("fields", "key", "peer", "tag")

    def __init__(self, peer: str, key: int, tag: int, fields: Fields) -> None:
        self.peer = peer
        self.key = key
        self.tag = tag
        self.fields = fields

    @property
    def slices(self) -> Slices:
        """Where the bytes are."""
        return Slices(*self.fields)

    @property
    def nbytes(self) -> int:
        """How many bytes landed."""
        return self.fields[5]

    def __repr__(self) -> str:
        return f"Arrival(peer={self.peer!r}, tag={self.tag}, slices={self.slices})"


@dataclass(frozen=True, slots=True)
class PeerTraffic:
    """Payload bytes exchanged with one peer since it was first seen, and what waits for it."""

    peer: str
    connected: bool
    sent_bytes: int
    received_bytes: int
    queued_bytes: int
    refused_writes: int
    received_writes: int


OnArrival = Callable[[Arrival], bool]
OnHashed = Callable[[Sequence[int], Sequence[int]], Sequence[bool]]
"""Tags that landed, and the xxh3-64 of the bytes of each; as OnArrival for each of them."""
OnCompletion = Callable[[Completion], None]
OnBatchCompletion = Callable[[BatchCompletion], None]
OnPeerLost = Callable[[str, str], None]
"""Called with the peer's name and the reason."""


class Transport(Protocol):
    """See the module docstring for the contract."""

    @property
    def name(self) -> str:
        """`memory`, `tcp`, `shm` or `rdma`."""

    @property
    def address(self) -> str:
        """Where peers dial, "" before `listen`."""

    def listen(self, address: str) -> str:
        """Accept peers at `address` (port 0: any); return the bound address.

        Raises InvalidRequest for an address it cannot parse, Unavailable if it is in use.
        """

    def invite(self, peer: str) -> bytes:
        """Let `peer` connect once within INVITATION_TTL_S; the result is secret."""

    def connect(self, peer: str, address: str, invitation: bytes, *, deadline_s: float) -> None:
        """Dial `peer` at `address`. Raises Unavailable, DeadlineExceeded or PermissionDenied."""

    def disconnect(self, peer: str) -> None:
        """End the connection to `peer`, if any; its pending writes complete as LOST."""

    def expose(
        self,
        region: Region,
        offset: int,
        nbytes: int,
        on_arrival: OnArrival,
        *,
        on_hashed: OnHashed | None = None,
    ) -> RegionDescriptor:
        """Open a window. Writes that the transport has hashed as they came are told by
        `on_hashed`, if given, instead of `on_arrival`. Raises InvalidRequest if out of bounds or
        `region` is read-only."""

    def arm(self, window: RegionDescriptor, targets: Sequence[tuple[int, Slices]]) -> None:
        """Allow one write for each (tag, slices). Raises InvalidRequest if out of the window's
        bounds, the tag is armed already or the window is not live."""

    def arm_table(self, window: RegionDescriptor, first_tag: int, targets: SliceTable) -> None:
        """Allow one write for each part i of the table, with tag `first_tag` + i; as `arm`."""

    def disarm(self, window: RegionDescriptor, tags: Collection[int]) -> frozenset[int]:
        """Fence these tags; return those that had not landed."""

    def revoke(self, window: RegionDescriptor) -> None:
        """Fence the whole window. Revoking twice is allowed."""

    def place(self, window: RegionDescriptor, tag: int, target: Slices, source: memoryview) -> str:
        """Land bytes that this process has got by other means, by the same rules as a peer's
        write: armed, once, fenced, told to `on_arrival`. Return "" or the refusal's reason."""

    def write(self, peer: str, write: Write, on_completion: OnCompletion) -> None:
        """Queue a write. Raises InvalidRequest (bounds, sizes), PeerLost, Overloaded."""

    def write_batch(self, peer: str, batch: WriteBatch, on_completion: OnBatchCompletion) -> None:
        """Queue a batch, or nothing of it. Raises as `write`."""

    def traffic(self) -> Sequence[PeerTraffic]:
        """Counters for each peer seen."""

    def close(self) -> None:
        """Fence all windows, complete pending writes as CLOSED, join all threads."""

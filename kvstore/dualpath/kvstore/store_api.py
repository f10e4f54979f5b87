"""The store as its users see it: values, outcomes and the `Store` port.

`BlockStore` (embedded, `block_store.py`) implements the port; the gRPC service and the embedded
client are written against it. All methods are thread-safe and blocking; those marked (fast) only
touch memory and may be called from an event loop.

Life of a block: `reserve` -> write into the reserved extent -> `seal`; it is visible to `lookup`
from then on, and immutable. First writer wins. A reservation expires unsealed after its time to
live. Read: `lookup` -> lease -> `fetch` chunks -> `release`. A leased block is never evicted; its
copy in DRAM may go while the one on SSD stays, but a fetched chunk is stable. Presence is
prefix-closed: if a block is present, so is its parent.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from dualpath.kvstore.checksum import Buffer
from dualpath.kvstore.fetched_batch import FetchedBatch
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_health import StoreHealth
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.region import Region
from dualpath.transfer.slices import Slices
from numpy.typing import ArrayLike, NDArray

HASH_BYTES_MIN = 16
HASH_BYTES_MAX = 32
BATCH_BLOCKS_MAX = 8192
"""Most blocks of one lookup, reserve or seal."""
LEASE_S_MAX = 600.0
NOT_IN_A_FILE = -1
RESERVATION_S_MAX = 300.0


class MissReason(enum.Enum):
    """Why the prefix ends where it ends."""

    NONE = "none"
    """Every block that was asked for is present."""
    ABSENT = "absent"
    PENDING = "pending"
    """Reserved and not sealed yet: worth asking again soon."""
    EVICTED = "evicted"
    QUOTA = "quota"
    """Its tenant was at its quota of disk space and stored something else."""
    EXPIRED = "expired"
    """It was not used for as long as its tenant's blocks are kept."""
    CORRUPT = "corrupt"
    """A checksum failed earlier and the block was dropped."""
    INVALIDATED = "invalidated"
    """An operator removed it."""
    NAMESPACE = "namespace"
    """Nothing was ever stored in this namespace: model, layout, salt or hash root differ."""

    __hash__ = object.__hash__  # Enum's own is a call in Python, several a look-up


class Tier(enum.Enum):
    """Where a block's bytes are, fastest first."""

    DRAM = "dram"
    SSD = "ssd"

    __hash__ = object.__hash__  # as above


TIERS = (Tier.DRAM, Tier.SSD)
"""A tier's code is its index here: in packed answers and on the wire."""


@dataclass(frozen=True, slots=True, eq=False)
class PrefixHit:
    """Answer of `lookup`: the longest leading run that is present.

    `tiers[i]` is the code (see TIERS) of where block i lay, `checksums[i]` the xxh3-64 of its
    chunks, in order: packed, so that a long prefix costs no object a block. `lease_id` is 0 when
    no lease was asked for or `blocks` is 0. `detail` explains a miss to a person.
    """

    blocks: int
    lease_id: int
    lease_s: float
    tiers: NDArray[np.uint8]
    checksums: NDArray[np.uint64]
    miss: MissReason
    detail: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class MappedPrefix:
    """Answer of `map`: a prefix hit whose copies in DRAM can be read where they lie.

    Block i is the `nbytes` bytes of the arena from `offsets[i]`; -1 if it has no copy in DRAM: it
    can be fetched. The bytes are stable for as long as the 8 bytes of the arena at `guard` hold
    the lease's id (native order): while the lease lives. Who copies looks at them afterwards; if
    they differ, the copy is void. `guard` is -1 without a lease.
    """

    hit: PrefixHit
    offsets: NDArray[np.int64]
    nbytes: int
    guard: int


@dataclass(frozen=True, slots=True, eq=False)
class BlockPlaces:
    """Answer of `locate`, one place a block: the number of the segment (NOT_IN_A_FILE for a block
    that is not, or not yet, on disk) and the bytes before it in that segment's file. Chunk c of a
    block begins `c * chunk_bytes` after it."""

    segment: NDArray[np.int32]
    offset: NDArray[np.int64]
    chunk_bytes: int


@dataclass(frozen=True, slots=True)
class NewBlock:
    """A block to reserve: its chain hash and its parent's (b"" for the first block)."""

    hash: bytes
    parent: bytes


class ReserveStatus(enum.Enum):
    """What became of one block of a `reserve`."""

    RESERVED = "reserved"
    EXISTS = "exists"
    PENDING = "pending"
    """Somebody else is writing it."""
    NO_PARENT = "no_parent"
    """The parent is neither present nor reserved by the same owner."""
    FULL = "full"
    """No space could be freed: everything else is leased or pending."""
    QUOTA = "quota"
    """The tenant is at its quota, and all of its own blocks are leased or pending."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """One outcome of `reserve`. `extent` (in `Store.arena`) is set only when RESERVED."""

    status: ReserveStatus
    reservation_id: int = 0
    extent: Slices | None = None


class SealStatus(enum.Enum):
    """What became of one block of a `seal`."""

    SEALED = "sealed"
    EXPIRED = "expired"
    """The reservation is gone, or the block's parent is; or its parent is not sealed yet: parents
    first. In the last case the reservation stays."""
    CORRUPT = "corrupt"
    """The bytes in place do not have the checksums that the writer gave."""
    FAILED = "failed"
    """The medium refused the write (disk full, I/O error): nothing was stored."""


@dataclass(frozen=True, slots=True)
class SealRequest:
    """Seal one reservation. `checksums` (xxh3-64 a chunk), if given, must match the bytes; with
    `trusted` they were made in this process of the very bytes as they were put in place, and are
    not made again."""

    reservation_id: int
    checksums: tuple[int, ...] = ()
    trusted: bool = False


@dataclass(frozen=True, slots=True)
class InvalidationScope:
    """What is to leave: all of a namespace; or of it the block `hash` and what builds on it; or
    what `writer` has sealed, in a namespace or (b"") everywhere."""

    namespace_id: bytes = b""
    hash: bytes = b""
    writer: str = ""

    def __post_init__(self) -> None:
        if not (self.namespace_id or self.writer):
            raise InvalidRequest("name a namespace_id, or a writer: all of a store never leaves")
        if self.hash and (self.writer or not self.namespace_id):
            raise InvalidRequest("hash: needs a namespace_id, and excludes a writer")


@dataclass(frozen=True, slots=True)
class Invalidation:
    """What left, or would: blocks, their payload bytes, and how many of them were in use."""

    blocks: int
    nbytes: int
    leased_blocks: int


class FetchedChunk(Protocol):
    """A chunk's bytes, stable until `release`; a context manager that releases."""

    @property
    def region(self) -> Region:
        """The memory that holds it."""

    @property
    def slices(self) -> Slices:
        """Where in the region."""

    def release(self) -> None:
        """Give the buffer back. Idempotent."""

    def __enter__(self) -> Self:
        """Return self."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counters since start and gauges. Bytes are payload bytes. Keys of mappings are labels."""

    blocks: int
    namespaces: int
    leases: int
    reservations: int
    capacity_bytes: Mapping[Tier, int]
    used_bytes: Mapping[Tier, int]
    read_bytes: Mapping[Tier, int]
    written_bytes: Mapping[Tier, int]
    evicted_blocks: Mapping[Tier, int]
    lookups: int
    hit_blocks: int
    missed_blocks: int
    misses: Mapping[MissReason, int]
    corrupt_blocks: int
    device: str
    """How the SSD tier is read, with the reason of a fallback: `psync, O_DIRECT`, ..."""
    tier_hit_blocks: Mapping[Tier, int] = field(default_factory=dict)
    """Blocks found by lookups, by the tier in which they lay."""
    scrubbed_bytes: int = 0
    scrubbed_blocks: int = 0
    scrub_bad_blocks: int = 0
    """Blocks that a scrub found bad and dropped."""
    scrub_passes: int = 0
    """How often a scrub came to the end of the store."""
    lost_write_backs: int = 0
    """Blocks that were sealed without `durable` and could not be written to the medium."""
    arena: str = ""
    """What memory the DRAM tier lies in, with the reason of a fallback."""
    mapped_leases: int = 0
    mapped_bytes: int = 0
    """Bytes of DRAM slots that cannot be freed now because somebody reads them in place."""


@dataclass(frozen=True, slots=True)
class ScrubStep:
    """What one `scrub_step` did. `finished`: it came to the end; the next one starts over."""

    read_bytes: int
    blocks: int
    bad_blocks: int
    finished: bool


class Store(Protocol):
    """See the module docstring."""

    @property
    def store_id(self) -> str:
        """Random id of the data directory, as its META shows it."""

    @property
    def arena(self) -> Region:
        """The memory in which reserved extents lie and fetched chunks may lie."""

    def open_namespace(self, namespace: Namespace) -> bytes:
        """Make the namespace known; return its id. Idempotent. Durable with its first seal."""

    def layout(self, namespace_id: bytes) -> KVLayout:
        """(fast) Raises InvalidRequest, reason `namespace`, if it was never opened."""

    def lookup(
        self, namespace_id: bytes, hashes: Sequence[bytes], *, owner: str, lease_s: float
    ) -> PrefixHit:
        """(fast) Find the longest prefix and lease it for `lease_s` (0: no lease).

        Raises InvalidRequest (unknown namespace, hash size, hashes of several sizes, batch over
        BATCH_BLOCKS_MAX).
        """

    def lookup_packed(
        self, namespace_id: bytes, hashes: Buffer, hash_bytes: int, *, owner: str, lease_s: float
    ) -> PrefixHit:
        """(fast) `lookup` of hashes of `hash_bytes` each that lie one after another in a buffer;
        nothing refers to the buffer afterwards."""

    def map(
        self, namespace_id: bytes, hashes: Sequence[bytes], *, owner: str, lease_s: float
    ) -> MappedPrefix:
        """(fast) `lookup`, and pin the copies in DRAM until the lease ends. `lease_s` is over 0.

        A mapped block is neither evicted nor demoted; one that is dropped leaves look-ups and
        keeps its bytes. Raises as `lookup`, and Overloaded when the owner, or all, would have
        more bytes mapped than the limit: nothing is leased then.
        """

    def map_packed(
        self, namespace_id: bytes, hashes: Buffer, hash_bytes: int, *, owner: str, lease_s: float
    ) -> MappedPrefix:
        """(fast) `map` of packed hashes; see `lookup_packed`."""

    def renew(self, lease_id: int, *, owner: str, lease_s: float) -> None:
        """(fast) Extend from now. Raises LeaseExpired, PermissionDenied (another's lease)."""

    def release(self, lease_id: int, *, owner: str) -> None:
        """(fast) End a lease; unknown ones are ignored. Raises PermissionDenied."""

    def fetch(self, lease_id: int, block: int, chunk: int) -> FetchedChunk:
        """Bring a chunk of the lease's block into memory, verified against nothing.

        Zero-copy when the block is in DRAM, else read from SSD into a bounded read buffer.
        Raises LeaseExpired, InvalidRequest (indices), Overloaded (no read buffer within 1 s),
        Corrupt (the medium failed: the block is dropped).
        """

    def fetch_batch(
        self,
        lease_id: int,
        blocks: ArrayLike,
        chunks: ArrayLike,
        *,
        verify: bool = False,
        wait: bool = True,
        patient: bool = True,
        paced: bool = False,
    ) -> FetchedBatch:
        """Bring chunk `chunks[i]` of the lease's block `blocks[i]` into memory, for each i, with
        the reads at the device's depth; the fast way to fetch.

        The answer may hold fewer chunks than asked, the leading ones: as many as there are read
        buffers for (never none). With `verify` each chunk is checked against its checksum as it
        arrives, and a wrong one put right from the SSD or its block dropped. Returns when all
        have arrived, or without `wait` once the reads have started: drive it by
        `FetchedBatch.arrived`. `paced` is for who has work on each chunk, a copy say, and wants
        some of them early rather than few wakes. Raises as `fetch` does, without `patient` at
        once if there is no read buffer, but what becomes of a chunk is in `FetchedBatch.status`.
        """

    def locate(self, lease_id: int, blocks: NDArray[np.int32]) -> BlockPlaces:
        """(fast) Where blocks of a lease lie in the segment files, for readers of a mount that
        holds them. Raises LeaseExpired, InvalidRequest (indices)."""

    def report_corrupt(self, lease_id: int, block: int, chunk: int) -> bool:
        """A reader saw a wrong checksum. Re-read and check; drop the block and its descendants
        from lookup if it is bad here too. Return whether it was dropped."""

    def reserve(
        self, namespace_id: bytes, blocks: Sequence[NewBlock], *, owner: str, ttl_s: float
    ) -> tuple[Reservation, ...]:
        """Reserve an extent for each block, in order, parents first."""

    def namespace(self, namespace_id: bytes) -> Namespace:
        """(fast) What was opened under this id. Raises InvalidRequest, reason `namespace`."""

    def seal(
        self, requests: Sequence[SealRequest], *, owner: str, durable: bool, writer: str = ""
    ) -> tuple[SealStatus, ...]:
        """Checksum the bytes in place, store and publish them; they record `writer` as theirs,
        without it `owner`. With `durable`, return after
        they would survive power loss, and with them all that anybody sealed before: an empty
        durable batch waits for blocks that `reserve` found to exist. A durable batch is one group
        commit. Raises Unavailable if the medium takes too long."""

    def begin_seal(
        self,
        requests: Sequence[SealRequest],
        *,
        owner: str,
        durable: bool,
        writer: str = "",
        more: bool = False,
    ) -> Callable[[], tuple[SealStatus, ...]]:
        """`seal` without its waiting: that is done by calling the answer, which may raise
        Unavailable. Children of these blocks may be reserved and sealed meanwhile. With `more`
        others follow at once that the caller waits for as well: one flush may do for all."""

    def abandon(self, reservation_ids: Sequence[int], *, owner: str) -> None:
        """(fast) Give reservations up; unknown ones are ignored."""

    def forget_owner(self, owner: str) -> None:
        """(fast) The owner's connection ended: drop its leases and reservations."""

    def retain(self, namespace_id: bytes, hashes: Sequence[bytes], *, retain_s: float) -> int:
        """(fast) Keep the present prefix for `retain_s` seconds from now, at most RETENTION_S_MAX,
        as long as anything else may make way for new blocks; 0 ends it. Return how many leading
        blocks are retained: fewer than are present where the budget or the tenant's part of it
        ends. A retention survives a restart, but for those of the last second before a crash.
        Raises InvalidRequest, Overloaded (too many prefixes are retained)."""

    def invalidate(self, scope: InvalidationScope, *, dry_run: bool = False) -> Invalidation:
        """Blocks leave, with their descendants, at once for lookups and for good on return: they
        do not come back after a crash. Memory that is in use stays as it is until released. With
        `dry_run` they are only counted. Raises Unavailable if the medium takes too long."""

    def stats(self) -> StoreStats:
        """(fast) A snapshot."""

    def health(self) -> StoreHealth:
        """(fast) Whether the store is degraded, and why."""

    def scrub_step(self, nbytes: int) -> ScrubStep:
        """Read about `nbytes` of stored blocks again, go on where the last step ended, and drop
        the bad ones with their descendants. Several callers take turns."""

    def close(self) -> None:
        """Flush, mark the shutdown clean, free everything."""

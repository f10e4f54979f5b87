"""Chunks of requests that this decode node holds, named by their content.

Owns one bounded region, which chunk lies where in it, and for which requests it is pinned. A chunk
is named by namespace, block, number and xxh3-64 of its bytes, so whatever is found here under a
name has the right bytes, or is discarded. It is *filling* until whoever brings it has seen that its
bytes hash to that, then *held*. Held chunks that nobody pins or reads stay as a cache; the one that
was used longest ago goes first when room is needed. Filling, pinned or read ones never go. Requests
that nobody receives yet get half of the room at most: the other half is for those that go on.

Pure bookkeeping: moves no bytes, keeps no timers. Belongs to the event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from dualpath.agent.staging import SLAB_BYTES, Slot, Staging
from dualpath.kvstore.checksum import of_slices
from dualpath.kvstore.service.shares import Shares
from dualpath.transfer.errors import InvalidRequest, Overloaded
from dualpath.transfer.region import Region

ChunkName: TypeAlias = tuple[bytes, bytes, int, int]
"""Namespace id, block hash, chunk of the block, xxh3-64 of its bytes."""

RequestKey: TypeAlias = tuple[bytes, str]
"""Namespace id and name of a request: its name means something only within its namespace."""

REQUESTS_MAX = 4096
"""Most requests of peers with something pinned, or under way, at once."""
REQUEST_CHARS_MAX = 128


@dataclass(slots=True, eq=False)
class Filler:
    """Who fills chunks: when it began to, or the last of them came."""

    moved_at: float


@dataclass(slots=True, eq=False)
class HeldChunk:
    """One chunk: `name` and where it lies. `users` read or fill it now; `pins` are by requests."""

    name: ChunkName
    slot: Slot
    filler: Filler | None = None
    """Who brings it, if that is told."""
    held: bool = False
    gone: bool = False
    """Discarded: found no more, its slot is freed with the last user."""
    users: int = 0
    pins: int = 0
    claims: int = 0
    """Those of them by requests that somebody receives."""
    wanted: bool = False
    """Filled for such a request."""
    unclaimed: bool = False
    """Whether it counts in `unclaimed_bytes`."""
    waiters: list[Callable[[], None]] = field(default_factory=list)
    """Called when it is held, or `gone`; while it is filling."""

    @property
    def nbytes(self) -> int:
        """Bytes of the chunk."""
        return self.slot.nbytes


@dataclass(slots=True, eq=False)
class _Request:
    """Pins of one request; they expire at `expires_at` while nobody is `busy` with it."""

    pinned: dict[HeldChunk, None] = field(default_factory=dict)
    busy: int = 0
    claimed: bool = False
    """Somebody receives it."""
    expires_at: float = 0.0
    sharer: str | None = None
    """In whose share it counts; None: in nobody's."""


class Holdings:
    """See the module docstring. Times are of the loop's clock."""

    def __init__(self, region: Region | None, hold_s: float, *, cache: bool = True) -> None:
        """`region` None: nothing is ever held. `hold_s`: how long pins last that nobody uses.
        Without `cache` nothing stays that nobody pins or reads."""
        if region is not None and region.nbytes < SLAB_BYTES:
            raise InvalidRequest(f"holdings need at least {SLAB_BYTES} bytes, not {region.nbytes}")
        self.events: Counter[str] = Counter()
        self.pinned_bytes = 0
        self.unclaimed_bytes = 0
        """Of chunks that are filled or pinned, and by no request that somebody receives."""
        self.on_room: Callable[[], None] = lambda: None
        """Called when a `fill` or `pin` that found no room may find some now."""
        self._hold_s = hold_s
        self._caches = cache
        self._space = None if region is None else Staging(region)
        self._chunks: dict[ChunkName, HeldChunk] = {}
        self._cache: dict[HeldChunk, None] = {}
        """Those that may go, the oldest first."""
        self._requests: dict[RequestKey, _Request] = {}
        self._shares = Shares(REQUESTS_MAX, "requests held here", retry_after_s=1.0)

    @property
    def region(self) -> Region:
        """Where the chunks lie; only with a capacity."""
        assert self._space is not None
        return self._space.region

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all slots, 0 if nothing is held here."""
        return 0 if self._space is None else self._space.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of slots in use, cache included."""
        return 0 if self._space is None else self._space.used_bytes

    @property
    def requests(self) -> int:
        """Requests with something pinned, or under way."""
        return len(self._requests)

    @property
    def in_use(self) -> int:
        """Chunks that somebody fills or reads now."""
        return sum(chunk.users > 0 for chunk in self._chunks.values())

    # Chunks.

    def find(self, name: ChunkName) -> HeldChunk | None:
        """The chunk of this name, filling or held."""
        return self._chunks.get(name)

    def fill(
        self,
        name: ChunkName,
        nbytes: int,
        filler: Filler | None = None,
        *,
        claimed: bool = False,
    ) -> HeldChunk | None:
        """Room for a chunk that is not held, with its caller as user; None if there is none. While
        another fills one of this name, that one is found; but the first that is `filled` stays.
        `claimed`: for a request that is received."""
        other = self._chunks.get(name)
        assert other is None or not other.held
        if self._space is None or not (claimed or self._may_be_unclaimed(nbytes)):
            return None
        while (slot := self._space.take(nbytes)) is None:
            if not self._cache:
                return None
            self._forget(next(iter(self._cache)))
            self.events["hold_evicted"] += 1
        chunk = HeldChunk(name, slot, filler, users=1, wanted=claimed)
        self._chunks.setdefault(name, chunk)
        self._weigh(chunk)
        return chunk

    def filled(self, chunk: HeldChunk) -> HeldChunk:
        """Its bytes are there, and hash to what its name says. The filler stays its user. Returns
        what is held under the name: this, or what another filled before."""
        assert not chunk.held
        assert chunk.users, "whoever fills a chunk uses it"
        other = self._chunks.get(chunk.name)
        if other is not None and other.held:
            chunk.gone = True
            self._weigh(chunk)
            return other
        chunk.held, chunk.gone = True, False
        self._chunks[chunk.name] = chunk
        if other is not None and other is not chunk:
            self._replace(other, chunk)
        self._weigh(chunk)
        self._wake(chunk)
        return chunk

    def discard(self, chunk: HeldChunk) -> None:
        """Its bytes did not come, or are not right: find it no more, and drop its pins."""
        if chunk.gone:
            return
        for key, record in tuple(self._requests.items()) if chunk.pins else ():
            if chunk in record.pinned:
                self._drop_pin(record, chunk)
                self._settle_request(key, record)
        self._forget(chunk)
        self._wake(chunk)

    def doubt(self, chunk: HeldChunk) -> bool:
        """Somebody got other bytes: look once more, and discard it if they are wrong here."""
        if not chunk.held or of_slices(self.region.view, chunk.slot.slices) == chunk.name[3]:
            return False
        self.events["hold_corrupt"] += 1
        self.discard(chunk)
        return True

    def use(self, chunk: HeldChunk) -> None:
        """Somebody reads it from now on, to `unuse`."""
        chunk.users += 1
        self._cache.pop(chunk, None)

    def unuse(self, chunk: HeldChunk) -> None:
        """No more read, or filled: no write may touch it any more."""
        assert chunk.users > 0, "a held chunk was let go twice"
        chunk.users -= 1
        self._settle(chunk)

    # Requests.

    def begin(self, key: RequestKey, *, claims: bool = False, sharer: str | None = None) -> None:
        """Somebody is busy with a request, until `end`: its pins stay. Raises Overloaded.
        `claims`: receives it, until `release`. `sharer`: whose request it is, if it is new here;
        nobody has more of them than are left for others. None: an engine of this node."""
        record = self._of(key, sharer)
        record.busy += 1
        if claims and not record.claimed:
            record.claimed = True
            for chunk in record.pinned:
                chunk.claims += 1
                self._weigh(chunk)
            self.on_room()

    def end(self, key: RequestKey, now: float) -> None:
        """See `begin`: from now on its pins last for `hold_s`."""
        record = self._requests[key]
        record.busy -= 1
        record.expires_at = now + self._hold_s
        self._settle_request(key, record)

    def pin(self, chunk: HeldChunk, request: str, now: float, sharer: str | None = None) -> None:
        """Keep a chunk for a request of its namespace; `sharer` as in `begin`. Raises Overloaded,
        InvalidRequest."""
        key = (chunk.name[0], request)
        if not self.may_pin(chunk, key):
            raise Overloaded(
                f"request {request!r} is not received yet, and such requests have their half of "
                "hold_bytes",
                retry_after_s=1.0,
            )
        record = self._of(key, sharer)
        record.expires_at = now + self._hold_s
        if chunk not in record.pinned:
            self._add_pin(record, chunk)
            self._cache.pop(chunk, None)

    def may_pin(self, chunk: HeldChunk, key: RequestKey) -> bool:
        """Whether a chunk that is held may be pinned for a request now."""
        if chunk not in self._cache:
            return True
        record = self._requests.get(key)
        return (record is not None and record.claimed) or self._may_be_unclaimed(chunk.nbytes)

    def unpin(self, chunk: HeldChunk, request: str) -> None:
        """The request has it elsewhere."""
        key = (chunk.name[0], request)
        record = self._requests.get(key)
        if record is not None and chunk in record.pinned:
            self._drop_pin(record, chunk)
            self._settle(chunk)
            self._settle_request(key, record)

    def release(self, key: RequestKey) -> None:
        """Drop all pins of a request."""
        record = self._requests.get(key)
        for chunk in tuple(record.pinned) if record is not None else ():
            self.unpin(chunk, key[1])
        if record is not None:
            record.claimed = False

    def expire(self, now: float) -> int:
        """Drop the pins that nobody came for in time; of how many requests."""
        late = [
            key
            for key, record in self._requests.items()
            if not record.busy and record.expires_at <= now
        ]
        for key in late:
            self.release(key)
        if late:
            self.events["hold_expired"] += len(late)
        return len(late)

    def _of(self, key: RequestKey, sharer: str | None) -> _Request:
        if not 1 <= len(key[1]) <= REQUEST_CHARS_MAX:
            raise InvalidRequest(
                f"a request has a name of 1..{REQUEST_CHARS_MAX} characters, not {len(key[1])}"
            )
        record = self._requests.get(key)
        if record is None:
            if sharer is not None:
                self._shares.take(sharer)
            record = self._requests[key] = _Request(sharer=sharer)
        return record

    def _replace(self, other: HeldChunk, chunk: HeldChunk) -> None:
        """What another still fills was filled here first."""
        other.gone = True
        self._weigh(other)
        for record in tuple(self._requests.values()) if other.pins else ():
            if other in record.pinned:
                self._drop_pin(record, other)
                self._add_pin(record, chunk)
        self._wake(other)

    def _add_pin(self, record: _Request, chunk: HeldChunk) -> None:
        record.pinned[chunk] = None
        if not chunk.pins:
            self.pinned_bytes += chunk.nbytes
        chunk.pins += 1
        chunk.claims += record.claimed
        self._weigh(chunk)

    def _drop_pin(self, record: _Request, chunk: HeldChunk) -> None:
        del record.pinned[chunk]
        chunk.pins -= 1
        chunk.claims -= record.claimed
        if not chunk.pins:
            self.pinned_bytes -= chunk.nbytes
        self._weigh(chunk)

    def _may_be_unclaimed(self, nbytes: int) -> bool:
        limit = max(self.capacity_bytes // 2, SLAB_BYTES)
        return self.unclaimed_bytes + nbytes <= limit

    def _weigh(self, chunk: HeldChunk) -> None:
        """Count it, or no more, in `unclaimed_bytes`."""
        needed = chunk.pins > 0 if chunk.held else not chunk.wanted
        unclaimed = needed and not chunk.claims and not chunk.gone
        if unclaimed != chunk.unclaimed:
            chunk.unclaimed = unclaimed
            self.unclaimed_bytes += chunk.nbytes if unclaimed else -chunk.nbytes
            if not unclaimed:
                self.on_room()

    def _settle_request(self, key: RequestKey, record: _Request) -> None:
        if not record.busy and not record.pinned:
            known = self._requests.pop(key, None)
            if known is not None and known.sharer is not None:
                self._shares.give_back(known.sharer)

    # Slots.

    def _settle(self, chunk: HeldChunk) -> None:
        """It may go into the cache, or away, if nobody needs it."""
        if chunk.users or chunk.pins:
            return
        if chunk.gone:
            self._free(chunk)
        elif chunk.held and self._caches:
            self._cache[chunk] = None
            self.on_room()
        else:
            self.discard(chunk)

    def _forget(self, chunk: HeldChunk) -> None:
        chunk.gone, chunk.held = True, False
        self._weigh(chunk)
        self._cache.pop(chunk, None)
        if self._chunks.get(chunk.name) is chunk:
            del self._chunks[chunk.name]
        if not chunk.users:
            self._free(chunk)

    def _free(self, chunk: HeldChunk) -> None:
        assert self._space is not None
        self._space.give_back(chunk.slot)
        self.on_room()

    def _wake(self, chunk: HeldChunk) -> None:
        waiters, chunk.waiters = chunk.waiters, []
        for waiter in waiters:
            waiter()

"""Blocks that one attachment is writing into the arena.

Owns the attachment's window, the tags of its chunks and the count of what arrived. Guarantees
that a slot goes back to the store only after its tags were fenced: by abandon, expiry, or the loss
of the attachment. Time to live is enforced here, before the store's own, longer one, for that
reason; should the store be first all the same, it calls `fence_expired`. Checksums are made of the
bytes in the arena: by the transport, right after a chunk's last byte and while nothing else can be
written there any more, or else by the store when it seals.
"""

from __future__ import annotations

import enum
import itertools
import math
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from dualpath.kvstore.store_api import (
    RESERVATION_S_MAX,
    NewBlock,
    ReserveStatus,
    SealRequest,
    SealStatus,
    Store,
)
from dualpath.transfer.errors import InvalidRequest, PeerLost
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.transport import Arrival, Transport

GRACE_S = 15.0
"""The store's time to live exceeds ours by at least this, so that we normally fence first."""
TTL_S_MAX = RESERVATION_S_MAX - GRACE_S

assert TTL_S_MAX > 0


class _Phase(enum.Enum):
    WRITING = "writing"
    SEALING = "sealing"
    ENDING = "ending"
    """Being fenced; known until that is done, so that `fence_expired` fences it as well."""


@dataclass(slots=True)
class _Incoming:
    reservation_id: int
    namespace_id: bytes
    first_tag: int
    sizes: Sequence[int]
    """Bytes of each chunk."""
    slot_bytes: int
    expires_at: float
    missing: int
    phase: _Phase = _Phase.WRITING
    digests: dict[int, int] = field(default_factory=dict)
    """By tag, those that the transport made."""

    @property
    def chunks(self) -> int:
        """How many it has."""
        return len(self.sizes)

    @property
    def tags(self) -> range:
        return range(self.first_tag, self.first_tag + self.chunks)

    def sealing(self, given: tuple[int, ...]) -> SealRequest:
        """The request for the store. Where digests are missing or differ from those that were
        given it hashes the bytes itself."""
        made = tuple(self.digests.get(tag, 0) for tag in self.tags)
        if len(self.digests) == self.chunks and given in ((), made):
            return SealRequest(self.reservation_id, made, trusted=True)
        return SealRequest(self.reservation_id, given)


@dataclass(frozen=True, slots=True)
class ReservedBlock:
    """Outcome for one block; the numbers are 0 unless RESERVED. `base` is its offset in the
    arena, in bytes; chunk c is to be written at `Slices.contiguous(base + offset of c, bytes of
    c)` with tag `first_tag + c`. Blocks that are reserved together have consecutive tags."""

    status: ReserveStatus
    reservation_id: int = 0
    base: int = 0
    first_tag: int = 0


class IncomingBlocks:
    """One attachment's writes. Thread-safe; all methods may block on the store. `writer` is what
    the blocks record as theirs."""

    def __init__(self, store: Store, transport: Transport, owner: str, writer: str = "") -> None:
        self._store = store
        self._transport = transport
        self._owner = owner
        self._writer = writer or owner
        self._lock = threading.Lock()
        self._blocks: dict[int, _Incoming] = {}
        self._by_tag: dict[int, _Incoming] = {}
        self._next_tag = 1
        self._window: RegionDescriptor | None = None
        self._closed = False
        self._first_expiry = math.inf
        self.received_bytes = 0

    @property
    def held(self) -> tuple[int, int]:
        """Blocks that are being written, and bytes of their slots."""
        with self._lock:
            blocks = self._blocks.values()
            return len(blocks), sum(block.slot_bytes for block in blocks)

    @property
    def window(self) -> bytes:
        """The window's descriptor, empty before the first reserve."""
        return b"" if self._window is None else self._window.to_bytes()

    def reserve(
        self, namespace_id: bytes, blocks: Sequence[NewBlock], *, ttl_s: float, now: float
    ) -> list[ReservedBlock]:
        """Reserve and arm. `ttl_s` seconds from `now`, at most TTL_S_MAX count."""
        layout = self._store.layout(namespace_id)
        window = self._opened_window()
        outcomes = self._store.reserve(
            namespace_id, blocks, owner=self._owner, ttl_s=RESERVATION_S_MAX
        )
        expires_at = now + min(ttl_s, TTL_S_MAX)
        extents = [layout.chunk_extent(chunk) for chunk in range(layout.chunk_count)]
        sizes = [nbytes for _, nbytes in extents]
        chunks, reserved = len(sizes), sum(each.extent is not None for each in outcomes)
        with self._lock:
            first_tag = tag = self._next_tag
            self._next_tag += chunks * reserved
        answers: list[ReservedBlock] = []
        added: list[_Incoming] = []
        bases: list[int] = []
        for outcome in outcomes:
            if outcome.extent is None:
                answers.append(ReservedBlock(outcome.status))
                continue
            reservation_id, base = outcome.reservation_id, outcome.extent.start
            added.append(
                _Incoming(
                    reservation_id, namespace_id, tag, sizes, layout.slot_bytes, expires_at, chunks
                )
            )
            answers.append(ReservedBlock(outcome.status, reservation_id, base, tag))
            bases.append(base)
            tag += chunks
        with self._lock:
            closed = self._closed
            if not closed:
                for block in added:
                    self._blocks[block.reservation_id] = block
                    self._by_tag.update(dict.fromkeys(block.tags, block))
                    self._first_expiry = min(self._first_expiry, expires_at)
        ids = [block.reservation_id for block in added]
        if closed:
            self._store.abandon(ids, owner=self._owner)
            raise PeerLost(f"attachment {self._owner} was lost while it reserved")
        try:
            if added:
                offsets = [base + offset for base in bases for offset, _ in extents]
                targets = SliceTable.contiguous(offsets, sizes * reserved)
                self._transport.arm_table(window, first_tag, targets)
        except BaseException:
            self.abandon(ids)
            self._check_open()  # that is why, then
            raise
        return answers

    def namespaces(self, reservation_ids: Collection[int]) -> frozenset[bytes]:
        """Of those reservations that are known."""
        with self._lock:
            known = (self._blocks.get(reservation) for reservation in reservation_ids)
            return frozenset(block.namespace_id for block in known if block is not None)

    def seal(
        self, reservation_ids: Sequence[int], checksums: Sequence[int], *, durable: bool
    ) -> list[SealStatus | None]:
        """Seal what has arrived in full; None where chunks are missing (it stays reserved).

        `checksums` holds those of all chunks of all blocks in order, or nothing. A durable seal of
        nothing waits until all that was sealed before is durable.
        """
        if len(set(reservation_ids)) != len(reservation_ids):
            raise InvalidRequest("reservation_id: one reservation is named twice in a seal")
        with self._lock:
            known = [self._blocks.get(reservation) for reservation in reservation_ids]
            per_block = _split(checksums, known)
            statuses: list[SealStatus | None] = [SealStatus.EXPIRED] * len(known)
            ready: list[tuple[int, _Incoming]] = []
            for index, block in enumerate(known):
                if block is None or block.phase is not _Phase.WRITING:
                    continue
                if block.missing:
                    statuses[index] = None
                    continue
                block.phase = _Phase.SEALING
                ready.append((index, block))
        try:
            requests = [block.sealing(per_block[index]) for index, block in ready]
            sealed = self._store.seal(
                requests, owner=self._owner, durable=durable, writer=self._writer
            )
        except BaseException:
            with self._lock:
                self._forget([block for _, block in ready])
            self._store.abandon([block.reservation_id for _, block in ready], owner=self._owner)
            raise
        with self._lock:
            for (index, block), status in zip(ready, sealed, strict=True):
                statuses[index] = status
                if status is SealStatus.EXPIRED:
                    # Perhaps only its parent is not sealed yet: the store kept the reservation, so
                    # it can be sealed or abandoned here until its time to live is over.
                    block.phase = _Phase.WRITING
                    self._first_expiry = min(self._first_expiry, block.expires_at)
                else:
                    self._forget([block])
        return statuses

    def abandon(self, reservation_ids: Sequence[int]) -> None:
        """Fence and give up; unknown ones, and those being sealed, are ignored."""
        with self._lock:
            blocks = [
                block
                for reservation in reservation_ids
                if (block := self._blocks.get(reservation)) is not None
                and block.phase is _Phase.WRITING
            ]
            _end(blocks)
        self._fence(blocks)

    def overdue(self, now: float) -> bool:
        """Whether `expire` may have something to do. Fast."""
        return self._first_expiry <= now

    def expire(self, now: float) -> int:
        """Abandon what is past its time to live; return how many blocks."""
        with self._lock:
            late = [
                block
                for block in self._blocks.values()
                if block.phase is _Phase.WRITING and block.expires_at <= now
            ]
            _end(late)
            self._first_expiry = min(
                (
                    block.expires_at
                    for block in self._blocks.values()
                    if block.phase is _Phase.WRITING
                ),
                default=math.inf,
            )
        self._fence(late)
        return len(late)

    def fence_expired(self, reservation_ids: Collection[int]) -> None:
        """The store is about to use these slots again, by its own time to live: fence them."""
        with self._lock:
            late = [
                block
                for reservation in reservation_ids
                if (block := self._blocks.get(reservation)) is not None
                and block.phase is not _Phase.SEALING
            ]
            _end(late)
            window = self._window
        if late and window is not None:
            self._transport.disarm(window, [tag for block in late for tag in block.tags])
        with self._lock:
            self._forget(late)

    def close(self) -> None:
        """The attachment is lost: fence its window, then drop what it held in the store."""
        with self._lock:
            self._closed = True
            window = self._window
        if window is not None:
            self._transport.revoke(window)
        with self._lock:
            self._window = None
            self._blocks.clear()
            self._by_tag.clear()
        self._store.forget_owner(self._owner)

    def _check_open(self) -> None:
        if self._closed:
            raise PeerLost(f"attachment {self._owner} is lost: attach again")

    def _opened_window(self) -> RegionDescriptor:
        with self._lock:
            self._check_open()
            if self._window is not None:
                return self._window
        # Outside of the lock: arrivals take it while a transport may hold its own.
        arena = self._store.arena
        window = self._transport.expose(
            arena, 0, arena.nbytes, self._arrived, on_hashed=self._hashed
        )
        kept = self._install(window)
        if kept is not window:
            self._transport.revoke(window)
        if kept is None:
            raise PeerLost(f"attachment {self._owner} is lost: attach again")
        return kept

    def _install(self, window: RegionDescriptor) -> RegionDescriptor | None:
        """Make it the attachment's window; another call's if that was first; None if closed."""
        with self._lock:
            if self._window is None and not self._closed:
                self._window = window
            return self._window

    def _arrived(self, arrival: Arrival) -> bool:
        with self._lock:
            return self._landed(arrival.tag) is not None

    def _hashed(self, tags: Sequence[int], digests: Sequence[int]) -> Sequence[bool]:
        taken: list[bool] = []
        with self._lock:
            for tag, digest in zip(tags, digests, strict=True):
                block = self._landed(tag)
                if block is not None:
                    block.digests[tag] = digest
                taken.append(block is not None)
        return taken

    def _landed(self, tag: int) -> _Incoming | None:
        """Count a chunk; None if nobody waits for it."""
        block = self._by_tag.get(tag)
        if block is None or block.phase is not _Phase.WRITING or block.missing == 0:
            return None
        block.missing -= 1
        self.received_bytes += block.sizes[tag - block.first_tag]
        return block

    def _forget(self, blocks: Sequence[_Incoming]) -> None:
        for block in blocks:
            if self._blocks.pop(block.reservation_id, None) is not None:
                for tag in block.tags:
                    self._by_tag.pop(tag, None)

    def _fence(self, blocks: Sequence[_Incoming]) -> None:
        if not blocks:
            return
        window = self._window
        if window is not None:
            tags = [tag for block in blocks for tag in block.tags]
            self._transport.disarm(window, tags)
        with self._lock:
            self._forget(blocks)
        self._store.abandon([block.reservation_id for block in blocks], owner=self._owner)


def _end(blocks: Sequence[_Incoming]) -> None:
    for block in blocks:
        block.phase = _Phase.ENDING


def _split(
    checksums: Sequence[int], blocks: Sequence[_Incoming | None]
) -> Sequence[tuple[int, ...]]:
    """One tuple a block. Blocks that are gone count as many chunks as the others."""
    if not checksums:
        return [()] * len(blocks)
    sizes = {block.chunks for block in blocks if block is not None}
    if not sizes:
        return [()] * len(blocks)
    if len(sizes) > 1 and None in blocks:
        raise InvalidRequest("checksum: seal reservations of different layouts separately")
    fill = next(iter(sizes))
    counts = [fill if block is None else block.chunks for block in blocks]
    if sum(counts) != len(checksums):
        raise InvalidRequest(
            f"checksum: {len(checksums)} given, the blocks have {sum(counts)} chunks; give one a "
            "chunk or none"
        )
    values = iter(checksums)
    return [tuple(itertools.islice(values, count)) for count in counts]

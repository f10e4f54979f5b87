"""Put and get for a user in the same process: whole blocks, any `Store`."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from dualpath.kvstore.block_copy import gather_blocks_hashed
from dualpath.kvstore.checksum import Buffer
from dualpath.kvstore.fetched_batch import FetchedBatch
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.mapped_read import (
    MAPPED_BYTES,
    MappedRead,
    ReadBlocks,
    read_in_parts,
    unmapped,
)
from dualpath.kvstore.mapping_table import GUARD_BYTES
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.store_api import (
    BATCH_BLOCKS_MAX,
    MappedPrefix,
    NewBlock,
    Reservation,
    ReserveStatus,
    SealRequest,
    SealStatus,
    Store,
)
from dualpath.kvstore.transfer_batch import BATCH_ITEMS_MAX
from dualpath.transfer.errors import InvalidRequest, Overloaded
from numpy.typing import NDArray

OWNER = "embedded"
_PART_BYTES = 16 << 20
"""Bytes of blocks that are copied, then sealed together."""
_PARTS_MAX = 2
"""Parts that are sealed and not settled while another one is copied."""
_TTL_S = 60.0
_LEASE_S = 60.0

PutStatus = ReserveStatus | SealStatus
"""A block's seal status if it was reserved, else why it was not."""


def put(
    store: Store,
    namespace_id: bytes,
    hashes: Sequence[bytes],
    parents: Sequence[bytes],
    data: Sequence[Buffer],
    *,
    durable: bool = True,
    owner: str = OWNER,
    writer: str = "",
    reserved_max: int = BATCH_BLOCKS_MAX,
) -> tuple[PutStatus, ...]:
    """Store whole blocks, parents first, at most `reserved_max` of them reserved at once; `writer`
    is what they are attributed to. Raises InvalidRequest on sizes that do not fit.

    With `durable`, blocks that existed are durable as well when this returns; FAILED if they have
    left the store meanwhile, as when they had still to be written back and could not be.
    """
    layout = store.layout(namespace_id)
    nbytes = layout.block_bytes
    if not len(hashes) == len(parents) == len(data):
        raise InvalidRequest(
            f"{len(hashes)} hashes, {len(parents)} parents and {len(data)} blocks: not as many"
        )
    for index, block in enumerate(data):
        if memoryview(block).nbytes != nbytes:
            raise InvalidRequest(
                f"block {index} has {memoryview(block).nbytes} bytes, this layout has {nbytes}"
            )
    step = max(1, min(reserved_max, part_blocks(layout)))
    return _Put(store, namespace_id, layout, owner, writer, durable, step).run(
        hashes, parents, data
    )


def part_blocks(layout: KVLayout) -> int:
    """How many blocks `put` has reserved at once."""
    return max(1, min(BATCH_BLOCKS_MAX, _PART_BYTES // layout.block_bytes))


class _Put:
    """Puts blocks part by part: while some parts become durable, the next one is copied."""

    def __init__(
        self,
        store: Store,
        namespace_id: bytes,
        layout: KVLayout,
        owner: str,
        writer: str,
        durable: bool,
        step: int,
    ) -> None:
        self._store = store
        self._namespace_id = namespace_id
        self._layout = layout
        self._owner = owner
        self._writer = writer
        self._durable = durable
        self._step = step
        self._parts: deque[Callable[[], list[PutStatus]]] = deque()
        self._statuses: list[PutStatus] = []

    def run(
        self, hashes: Sequence[bytes], parents: Sequence[bytes], data: Sequence[Buffer]
    ) -> tuple[PutStatus, ...]:
        """See `put`."""
        start = 0
        while start < len(hashes):
            end = min(start + self._step, len(hashes))
            blocks = list(map(NewBlock, hashes[start:end], parents[start:end]))
            reservations = self._store.reserve(
                self._namespace_id, blocks, owner=self._owner, ttl_s=_TTL_S
            )
            taken = _until_full(reservations, room_comes=bool(self._parts))
            # Else it waits before it brings the next part.
            more = end < len(hashes) and taken == len(blocks) and len(self._parts) < _PARTS_MAX
            sealed = self._fill_and_seal(reservations, data[start:end], more)
            self._parts.append(partial(self._outcome, reservations, blocks, sealed, taken))
            self._await_parts(_PARTS_MAX if taken == len(blocks) else 0)
            start += taken
        self._await_parts(0)
        return tuple(self._statuses)

    def _await_parts(self, most: int) -> None:
        """Until at most so many are not settled."""
        while len(self._parts) > most:
            self._statuses += self._parts.popleft()()

    def _fill_and_seal(
        self, reservations: Sequence[Reservation], data: Sequence[Buffer], more: bool
    ) -> Callable[[], tuple[SealStatus, ...]]:
        reserved = [(r, block) for r, block in zip(reservations, data, strict=True) if r.extent]
        ids = [reservation.reservation_id for reservation, _ in reserved]
        try:
            at = np.array([r.extent.start for r, _ in reserved if r.extent], np.int64)
            # One pass: what was hashed is what was stored.
            sums = gather_blocks_hashed(
                self._store.arena.view,
                at,
                [block for _, block in reserved],
                self._layout.block_bytes,
                self._layout.chunk_bytes,
            ).tolist()
            requests = [
                SealRequest(each, tuple(one), trusted=True)
                for each, one in zip(ids, sums, strict=True)
            ]
            return self._store.begin_seal(
                requests, owner=self._owner, durable=self._durable, writer=self._writer, more=more
            )
        finally:
            # A block whose parent somebody is still writing was not sealed and stays reserved.
            self._store.abandon(ids, owner=self._owner)

    def _outcome(
        self,
        reservations: Sequence[Reservation],
        blocks: Sequence[NewBlock],
        sealed: Callable[[], tuple[SealStatus, ...]],
        taken: int,
    ) -> list[PutStatus]:
        statuses = iter(sealed())
        part = [next(statuses) if r.extent is not None else r.status for r in reservations][:taken]
        if self._durable:
            part = [
                _still(self._store, self._namespace_id, block.hash)
                if status is ReserveStatus.EXISTS
                else status
                for status, block in zip(part, blocks, strict=False)
            ]
        return part


def _still(store: Store, namespace_id: bytes, block_hash: bytes) -> PutStatus:
    """What became of a block that existed, now that what waited was written back."""
    hit = store.lookup(namespace_id, [block_hash], owner=OWNER, lease_s=0)
    return ReserveStatus.EXISTS if hit.blocks else SealStatus.FAILED


def _until_full(reservations: Sequence[Reservation], *, room_comes: bool) -> int:
    """How many outcomes to take: sealing the blocks before the first FULL one makes room for the
    rest, which is tried again, as do earlier parts (`room_comes`); without such blocks FULL is the
    answer."""
    for index, reservation in enumerate(reservations):
        room_comes = room_comes or reservation.status is ReserveStatus.RESERVED
        if reservation.status is ReserveStatus.FULL and room_comes:
            return index
    return len(reservations)


def get(
    store: Store, namespace_id: bytes, hashes: Sequence[bytes], *, owner: str = OWNER
) -> list[bytes]:
    """The longest prefix that is present and verifies, block by block."""
    nbytes = store.layout(namespace_id).block_bytes
    step = max(1, MAPPED_BYTES // nbytes)
    blocks: list[bytes] = []
    with memoryview(bytearray(min(step, len(hashes)) * nbytes)) as target:
        for start in range(0, len(hashes), step):
            part = hashes[start : start + step]
            read = get_into(store, namespace_id, part, target, owner=owner)
            blocks += (bytes(target[i * nbytes : (i + 1) * nbytes]) for i in range(read.blocks))
            if read.blocks < len(part):
                break
    return blocks


def get_into(
    store: Store,
    namespace_id: bytes,
    hashes: Sequence[bytes],
    target: memoryview | bytearray,
    *,
    at: NDArray[np.int64] | None = None,
    verify: bool = True,
    owner: str = OWNER,
) -> ReadBlocks:
    """Copy the longest prefix into `target`, block i to `at[i]` (by default one after another).

    Returns how many leading blocks are there and right; beyond them `target` may hold anything.
    Blocks in DRAM are copied at the speed of memory and verified on the way; without `verify` only
    those that the SSD had to be asked for are.
    """
    packed = PackedHashes.of(hashes)
    layout = store.layout(namespace_id)

    def read(start: int, end: int) -> ReadBlocks:
        part = packed.part(start, end)
        mapped = _map(store, namespace_id, part, owner)
        places = None if at is None else at[start:end]
        source = _StoreChunks(store, owner)
        with memoryview(target).cast("B") as into:
            try:
                one = MappedRead(
                    source,
                    store.arena.view,
                    mapped,
                    layout.chunk_bytes,
                    into,
                    places,
                    partial(_holds, store, mapped),
                    first=start,
                )
                return one.run(verify=verify)
            finally:
                if mapped.hit.lease_id:
                    store.release(mapped.hit.lease_id, owner=owner)

    return read_in_parts(read, len(packed), lambda: max(1, MAPPED_BYTES // layout.block_bytes))


def _map(store: Store, namespace_id: bytes, part: PackedHashes, owner: str) -> MappedPrefix:
    """Mapped; or only leased, if too much is mapped already."""
    data, size = part.data, part.hash_bytes
    try:
        return store.map_packed(namespace_id, data, size, owner=owner, lease_s=_LEASE_S)
    except Overloaded:
        hit = store.lookup_packed(namespace_id, data, size, owner=owner, lease_s=_LEASE_S)
        return unmapped(hit, store.layout(namespace_id).block_bytes)


class _StoreChunks:
    """A ChunkSource in the same process."""

    chunks_max = BATCH_ITEMS_MAX
    fetches_max = 3

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        self._owner = owner

    def fetch(
        self,
        lease_id: int,
        blocks: NDArray[np.int32],
        chunks: NDArray[np.int32],
        *,
        patient: bool,
        paced: bool,
    ) -> FetchedBatch:
        """See ChunkSource."""
        return self._store.fetch_batch(
            lease_id, blocks, chunks, wait=False, patient=patient, paced=paced
        )

    def report_corrupt(self, lease_id: int, block: int, chunk: int) -> bool:
        """See ChunkSource."""
        return self._store.report_corrupt(lease_id, block, chunk)

    def renew(self, lease_id: int, lease_s: float) -> None:
        """See ChunkSource."""
        self._store.renew(lease_id, owner=self._owner, lease_s=lease_s)


def _holds(store: Store, mapped: MappedPrefix) -> bool:
    with store.arena.view[mapped.guard : mapped.guard + GUARD_BYTES] as word:
        return int.from_bytes(word, sys.byteorder) == mapped.hit.lease_id

"""Put and get for a user in the same process: whole blocks, any `Store`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import numpy as np
from dualpath.kvstore.block_copy import copy_blocks_hashed
from dualpath.kvstore.checksum import Buffer
from dualpath.kvstore.fetched_batch import FetchedBatch, FetchStatus
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
    MappedPrefix,
    NewBlock,
    Reservation,
    ReserveStatus,
    SealRequest,
    SealStatus,
    Store,
)
from dualpath.transfer.errors import InvalidRequest, Overloaded
from numpy.typing import NDArray

OWNER = "embedded"
_BATCH_BYTES = 32 << 20
_BATCH_BLOCKS = 64
_TTL_S = 60.0
_LEASE_S = 60.0
_FROM_0: NDArray[np.int64] = np.zeros(1, np.int64)

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
) -> tuple[PutStatus, ...]:
    """Store whole blocks, parents first. Raises InvalidRequest on sizes that do not fit.

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
    step = max(1, min(_BATCH_BLOCKS, _BATCH_BYTES // nbytes))
    statuses: list[PutStatus] = []
    while len(statuses) < len(hashes):
        start, end = len(statuses), min(len(statuses) + step, len(hashes))
        blocks = [NewBlock(hashes[i], parents[i]) for i in range(start, end)]
        reservations = store.reserve(namespace_id, blocks, owner=owner, ttl_s=_TTL_S)
        taken = _until_full(reservations)
        part = _fill_and_seal(store, layout, reservations, data[start:end], owner, durable)[:taken]
        if durable:
            part = [
                _still(store, namespace_id, block.hash) if s is ReserveStatus.EXISTS else s
                for s, block in zip(part, blocks, strict=False)
            ]
        statuses += part
    return tuple(statuses)


def _still(store: Store, namespace_id: bytes, block_hash: bytes) -> PutStatus:
    """What became of a block that existed, now that what waited was written back."""
    hit = store.lookup(namespace_id, [block_hash], owner=OWNER, lease_s=0)
    return ReserveStatus.EXISTS if hit.blocks else SealStatus.FAILED


def _until_full(reservations: Sequence[Reservation]) -> int:
    """How many outcomes to take: sealing the blocks before the first FULL one makes room for the
    rest, which is tried again; without such blocks FULL is the answer."""
    reserved = False
    for index, reservation in enumerate(reservations):
        reserved = reserved or reservation.status is ReserveStatus.RESERVED
        if reservation.status is ReserveStatus.FULL and reserved:
            return index
    return len(reservations)


def _fill_and_seal(
    store: Store,
    layout: KVLayout,
    reservations: Sequence[Reservation],
    data: Sequence[Buffer],
    owner: str,
    durable: bool,
) -> list[PutStatus]:
    ids = [r.reservation_id for r in reservations if r.extent is not None]
    requests = []
    try:
        for reservation, block in zip(reservations, data, strict=True):
            if reservation.extent is not None:
                at = np.array([reservation.extent.start])
                source = memoryview(block).cast("B")
                # One pass: what was hashed is what was stored.
                sums = copy_blocks_hashed(
                    store.arena.view, at, source, _FROM_0, source.nbytes, layout.chunk_bytes
                )
                checksums = tuple(sums[0].tolist())
                requests.append(SealRequest(reservation.reservation_id, checksums, trusted=True))
        sealed = iter(store.seal(requests, owner=owner, durable=durable))
    finally:
        # A block whose parent somebody is still writing was not sealed and stays reserved.
        store.abandon(ids, owner=owner)
    return [next(sealed) if r.extent is not None else r.status for r in reservations]


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
                source.done()
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

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        self._owner = owner
        self._batch: FetchedBatch | None = None

    def fetch(
        self, lease_id: int, blocks: NDArray[np.int32], chunks: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See ChunkSource."""
        self._batch = self._store.fetch_batch(lease_id, blocks, chunks)
        return self._batch.offsets, self._batch.status == FetchStatus.OK

    def done(self) -> None:
        """See ChunkSource."""
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.release()

    def report_corrupt(self, lease_id: int, block: int, chunk: int) -> bool:
        """See ChunkSource."""
        return self._store.report_corrupt(lease_id, block, chunk)

    def renew(self, lease_id: int, lease_s: float) -> None:
        """See ChunkSource."""
        self._store.renew(lease_id, owner=self._owner, lease_s=lease_s)


def _holds(store: Store, mapped: MappedPrefix) -> bool:
    with store.arena.view[mapped.guard : mapped.guard + GUARD_BYTES] as word:
        return int.from_bytes(word, sys.byteorder) == mapped.hit.lease_id

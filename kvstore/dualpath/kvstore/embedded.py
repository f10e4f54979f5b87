"""Put and get for a user in the same process: whole blocks, any `Store`."""

from __future__ import annotations

from collections.abc import Sequence

from dualpath.kvstore import checksum
from dualpath.kvstore.checksum import Buffer
from dualpath.kvstore.store_api import (
    NewBlock,
    Reservation,
    ReserveStatus,
    SealRequest,
    SealStatus,
    Store,
)
from dualpath.transfer.errors import Corrupt, InvalidRequest

OWNER = "embedded"
_BATCH_BYTES = 32 << 20
_BATCH_BLOCKS = 64
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
) -> tuple[PutStatus, ...]:
    """Store whole blocks, parents first. Raises InvalidRequest on sizes that do not fit.

    With `durable`, blocks that existed are durable as well when this returns; FAILED if they have
    left the store meanwhile, as when they had still to be written back and could not be.
    """
    nbytes = store.layout(namespace_id).block_bytes
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
        part = _fill_and_seal(store, reservations, data[start:end], owner, durable)[:taken]
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
    reservations: Sequence[Reservation],
    data: Sequence[Buffer],
    owner: str,
    durable: bool,
) -> list[PutStatus]:
    requests = [SealRequest(r.reservation_id) for r in reservations if r.extent is not None]
    try:
        for reservation, block in zip(reservations, data, strict=True):
            if reservation.extent is not None:
                start, end = reservation.extent.start, reservation.extent.end
                store.arena.view[start:end] = memoryview(block).cast("B")
        sealed = iter(store.seal(requests, owner=owner, durable=durable))
    finally:
        # A block whose parent somebody is still writing was not sealed and stays reserved.
        store.abandon([request.reservation_id for request in requests], owner=owner)
    return [next(sealed) if r.extent is not None else r.status for r in reservations]


def get(
    store: Store, namespace_id: bytes, hashes: Sequence[bytes], *, owner: str = OWNER
) -> list[bytes]:
    """The longest prefix that is present and verifies, block by block."""
    hit = store.lookup(namespace_id, hashes, owner=owner, lease_s=_LEASE_S)
    blocks: list[bytes] = []
    try:
        for block in range(hit.blocks):
            found = _get_block(store, hit.lease_id, block, hit.checksums[block].tolist())
            if found is None:
                break
            blocks.append(found)
            store.renew(hit.lease_id, owner=owner, lease_s=_LEASE_S)
    finally:
        if hit.lease_id:
            store.release(hit.lease_id, owner=owner)
    return blocks


def _get_block(store: Store, lease_id: int, block: int, checksums: Sequence[int]) -> bytes | None:
    """A verified block; None if it is corrupt even when read again."""
    parts = []
    for chunk, expected in enumerate(checksums):
        for _ in range(2):
            try:
                fetched = store.fetch(lease_id, block, chunk)
            except Corrupt:
                return None
            with fetched:
                part = bytes(fetched.region.view[fetched.slices.start : fetched.slices.end])
            if checksum.xxh3_64(part) == expected:
                parts.append(part)
                break
            if store.report_corrupt(lease_id, block, chunk):
                return None
        else:
            return None
    return b"".join(parts)

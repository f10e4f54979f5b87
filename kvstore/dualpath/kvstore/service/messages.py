"""Protocol messages <-> values, with every limit checked.

Errors name the field, the value and the limit. Nothing here knows the store's state; what only
the store can check (known hashes, live leases) it checks itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dualpath.kvstore.layout import CHUNK_BYTES_MAX, LAYERS_MAX, KVLayout
from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES
from dualpath.kvstore.service.attachments import SESSION_BYTES
from dualpath.kvstore.service.delivery_queue import (
    GRANT_CHUNKS_MAX,
    ChunkFailure,
    Grant,
    GrantedChunks,
    Progress,
)
from dualpath.kvstore.service.incoming import ReservedBlock
from dualpath.kvstore.store_api import (
    BATCH_BLOCKS_MAX,
    HASH_BYTES_MAX,
    HASH_BYTES_MIN,
    LEASE_S_MAX,
    RESERVATION_S_MAX,
    MissReason,
    NewBlock,
    PrefixHit,
    ReserveStatus,
    SealStatus,
)
from dualpath.proto.v1 import common_pb2, store_pb2
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slice_table import SliceTable

CHECKSUMS_MAX = 400_000
"""Most checksums of one answer: 3.2 MB, below the limit on messages."""
DELEGATES_MAX = 64
GRANT_DEADLINE_S_MAX = 600.0
INDEX_LIMIT = 1 << 31
PIECES_MAX = 2 * LAYERS_MAX
"""Most contiguous pieces of one chunk: one a layer suffices, K and V apart make two."""
_MISS: Mapping[MissReason, store_pb2.MissReason.ValueType] = {
    MissReason.NONE: store_pb2.MISS_REASON_NONE,
    MissReason.ABSENT: store_pb2.MISS_REASON_ABSENT,
    MissReason.PENDING: store_pb2.MISS_REASON_PENDING,
    MissReason.EVICTED: store_pb2.MISS_REASON_EVICTED,
    MissReason.CORRUPT: store_pb2.MISS_REASON_CORRUPT,
    MissReason.NAMESPACE: store_pb2.MISS_REASON_NAMESPACE,
    MissReason.INVALIDATED: store_pb2.MISS_REASON_INVALIDATED,
    MissReason.QUOTA: store_pb2.MISS_REASON_QUOTA,
    MissReason.EXPIRED: store_pb2.MISS_REASON_EXPIRED,
}
_RESERVE: Mapping[ReserveStatus, store_pb2.ReserveStatus.ValueType] = {
    ReserveStatus.RESERVED: store_pb2.RESERVE_STATUS_RESERVED,
    ReserveStatus.EXISTS: store_pb2.RESERVE_STATUS_EXISTS,
    ReserveStatus.PENDING: store_pb2.RESERVE_STATUS_PENDING,
    ReserveStatus.NO_PARENT: store_pb2.RESERVE_STATUS_NO_PARENT,
    ReserveStatus.FULL: store_pb2.RESERVE_STATUS_FULL,
    ReserveStatus.QUOTA: store_pb2.RESERVE_STATUS_QUOTA,
}
_SEAL: Mapping[SealStatus | None, store_pb2.SealStatus.ValueType] = {
    SealStatus.SEALED: store_pb2.SEAL_STATUS_SEALED,
    SealStatus.EXPIRED: store_pb2.SEAL_STATUS_EXPIRED,
    SealStatus.CORRUPT: store_pb2.SEAL_STATUS_CORRUPT,
    SealStatus.FAILED: store_pb2.SEAL_STATUS_FAILED,
    None: store_pb2.SEAL_STATUS_INCOMPLETE,
}
_FAILURE: Mapping[ChunkFailure, common_pb2.ChunkFailure.ValueType] = {
    failure: common_pb2.ChunkFailure.Value(f"CHUNK_FAILURE_{failure.name}")
    for failure in ChunkFailure
}
assert all(failure.value == number for failure, number in _FAILURE.items())
assert GRANT_CHUNKS_MAX == 4096, "written in common.proto"


def checked_namespace_id(value: bytes) -> bytes:
    """Raises InvalidRequest unless it has the size of a namespace id."""
    if len(value) != NAMESPACE_ID_BYTES:
        raise InvalidRequest(
            f"namespace_id: {len(value)} bytes; {NAMESPACE_ID_BYTES} from OpenNamespace are valid"
        )
    return value


def checked_session(value: bytes) -> bytes:
    """Raises InvalidRequest unless it has the size of a session."""
    if len(value) != SESSION_BYTES:
        raise InvalidRequest(f"session: {len(value)} bytes; {SESSION_BYTES} from Attach are valid")
    return value


def checked_batch(field: str, count: int) -> None:
    """Raises InvalidRequest for an empty batch or one over the limit."""
    if not 1 <= count <= BATCH_BLOCKS_MAX:
        raise InvalidRequest(
            f"{field}: {count} in one call; 1..{BATCH_BLOCKS_MAX} are valid, split the batch"
        )


def checked_hashes(field: str, hashes: Sequence[bytes], *, empty: bool = False) -> None:
    """Raises InvalidRequest naming the first hash of a wrong size; `empty` allows none."""
    checked_batch(field, len(hashes))
    sizes = set(map(len, hashes))
    if empty:
        sizes.discard(0)
    if sizes and (min(sizes) < HASH_BYTES_MIN or max(sizes) > HASH_BYTES_MAX):
        index, bad = next(
            (index, value)
            for index, value in enumerate(hashes)
            if not HASH_BYTES_MIN <= len(value) <= HASH_BYTES_MAX and (value or not empty)
        )
        raise InvalidRequest(
            f"{field}[{index}]: {len(bad)} bytes; {HASH_BYTES_MIN}..{HASH_BYTES_MAX} are valid"
        )


def checked_checksums(blocks: int, layout: KVLayout) -> None:
    """Raises InvalidRequest if the checksums of so many blocks exceed a message."""
    if blocks * layout.chunk_count > CHECKSUMS_MAX:
        raise InvalidRequest(
            f"hash: {blocks} blocks of {layout.chunk_count} chunks have more than {CHECKSUMS_MAX} "
            f"checksums; ask for {CHECKSUMS_MAX // layout.chunk_count} blocks at most"
        )


def lease_s_of(lease_ms: int, *, zero: bool) -> float:
    """Seconds of a lease. Raises InvalidRequest; 0 only if `zero`."""
    lowest = 0 if zero else 1
    if not lowest <= lease_ms <= LEASE_S_MAX * 1000:
        raise InvalidRequest(f"lease_ms: {lease_ms}; {lowest}..{LEASE_S_MAX * 1000:.0f} are valid")
    return lease_ms / 1000


def ttl_s_of(ttl_ms: int) -> float:
    """Seconds of a reservation. Raises InvalidRequest."""
    if not 1 <= ttl_ms <= RESERVATION_S_MAX * 1000:
        raise InvalidRequest(f"ttl_ms: {ttl_ms}; 1..{RESERVATION_S_MAX * 1000:.0f} are valid")
    return ttl_ms / 1000


def new_blocks_of(request: store_pb2.ReserveRequest) -> list[NewBlock]:
    """The blocks of a Reserve. Raises InvalidRequest."""
    checked_hashes("hash", request.hash)
    if len(request.parent) != len(request.hash):
        raise InvalidRequest(
            f"parent: {len(request.parent)} given for {len(request.hash)} hashes; give one each, "
            "empty for the first block of a chain"
        )
    checked_hashes("parent", request.parent, empty=True)
    return [NewBlock(*pair) for pair in zip(request.hash, request.parent, strict=True)]


def miss_number(reason: MissReason) -> store_pb2.MissReason.ValueType:
    """The protocol's number of a reason."""
    return _MISS[reason]


def hit_message(hit: PrefixHit) -> store_pb2.LookupResponse:
    """Answer of a look-up."""
    return store_pb2.LookupResponse(
        blocks=hit.blocks,
        lease_id=hit.lease_id,
        lease_ms=int(hit.lease_s * 1000),
        tiers=hit.tiers.tobytes(),
        checksums=hit.checksums.astype("<u8", copy=False).tobytes(),
        miss=_MISS[hit.miss],
        detail=hit.detail,
    )


def reserve_message(blocks: Sequence[ReservedBlock], window: bytes) -> store_pb2.ReserveResponse:
    """Answer of a Reserve."""
    return store_pb2.ReserveResponse(
        status=[_RESERVE[block.status] for block in blocks],
        reservation_id=[block.reservation_id for block in blocks],
        base_bytes=[block.base for block in blocks],
        first_tag=[block.first_tag for block in blocks],
        window=window,
    )


def seal_statuses(
    statuses: Sequence[SealStatus | None],
) -> list[store_pb2.SealStatus.ValueType]:
    """Statuses of a seal; None is INCOMPLETE."""
    return [_SEAL[status] for status in statuses]


def grant_of(message: common_pb2.ChunkGrant, lease_id: int, *, now: float) -> Grant:
    """A grant, all of its chunks inside its window. Raises InvalidRequest."""
    target = message.target
    lengths = {
        "block": len(message.block),
        "chunk": len(message.chunk),
        "tag": len(message.tag),
        "target.base_bytes": len(target.base_bytes),
        "target.skip_bytes": len(target.skip_bytes),
        "target.nbytes": len(target.nbytes),
    }
    if len(set(lengths.values())) != 1:
        raise InvalidRequest(f"grant {message.grant_id}: lengths differ: {lengths}")
    if not 1 <= len(message.tag) <= GRANT_CHUNKS_MAX:
        raise InvalidRequest(
            f"grant {message.grant_id}: {len(message.tag)} chunks; 1..{GRANT_CHUNKS_MAX} are valid"
        )
    if not 1 <= message.deadline_ms <= GRANT_DEADLINE_S_MAX * 1000:
        raise InvalidRequest(
            f"grant {message.grant_id}: deadline_ms {message.deadline_ms}; "
            f"1..{GRANT_DEADLINE_S_MAX * 1000:.0f} are valid"
        )
    try:
        lane = Lane(message.lane)
    except ValueError:
        raise InvalidRequest(
            f"grant {message.grant_id}: lane {message.lane}; {[int(lane) for lane in Lane]} "
            "are valid"
        ) from None
    window = RegionDescriptor.from_bytes(message.window)
    blocks, chunks = list(message.block), list(message.chunk)
    if (largest := max(map(max, (blocks, chunks)))) >= INDEX_LIMIT:
        raise InvalidRequest(f"grant {message.grant_id}: block or chunk {largest} is no index")
    granted = GrantedChunks(blocks, chunks, list(message.tag), _targets(target, window))
    deadline_at = now + message.deadline_ms / 1000
    return Grant(message.grant_id, lease_id, window, lane, deadline_at, granted)


def _targets(message: common_pb2.SliceTable, window: RegionDescriptor) -> SliceTable:
    sizes = list(message.nbytes)
    least, most = min(sizes), max(sizes)
    if least < 1 or most > CHUNK_BYTES_MAX:
        raise InvalidRequest(
            f"target.nbytes: {least if least < 1 else most}; 1..{CHUNK_BYTES_MAX} are valid"
        )
    length = message.length_bytes
    if message.stride_bytes != length and most > length * PIECES_MAX:
        raise InvalidRequest(
            f"target: {most} bytes in pieces of {length}; {PIECES_MAX} pieces a chunk at most"
        )
    table = SliceTable(
        message.stride_bytes,
        message.count,
        length,
        list(message.base_bytes),
        list(message.skip_bytes),
        sizes,
    )
    start, end = table.span()
    if start < window.offset or end > window.offset + window.nbytes:
        raise InvalidRequest(
            f"target: bytes [{start}, {end}) are outside of the window "
            f"[{window.offset}, {window.offset + window.nbytes})"
        )
    return table


def progress_message(progress: Progress, queue_bytes: int) -> common_pb2.GrantProgress:
    """Progress of one grant."""
    return common_pb2.GrantProgress(
        grant_id=progress.grant_id,
        done=progress.done,
        failed_tag=[tag for tag, _ in progress.failures],
        failure=[_FAILURE[failure] for _, failure in progress.failures],
        queue_bytes=queue_bytes,
        detail=progress.detail,
    )

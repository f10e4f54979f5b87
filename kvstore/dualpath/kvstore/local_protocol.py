"""Messages of the local socket: packed little endian, a header of 16 bytes and a body.

Owns the layouts and their limits; pure. A request is answered by its kind with ANSWER added, or by
ERROR. Both sides take what they read apart here, with every length checked: whatever does not fit
raises `MalformedMessage`, and the connection ends, since nothing after it can be trusted.

The first message is HELLO, with the versions that the client speaks; the answer names the newest
that both do. A version reads its predecessor. Since 2 a client can store blocks; see `local_put`.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from dualpath.kvstore.layout import BLOCK_BYTES_MAX
from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES
from dualpath.kvstore.store_api import (
    BATCH_BLOCKS_MAX,
    HASH_BYTES_MAX,
    MappedPrefix,
    MissReason,
    PrefixHit,
)
from dualpath.transfer.errors import (
    Corrupt,
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    LeaseExpired,
    Overloaded,
    PermissionDenied,
    Unavailable,
)
from numpy.typing import NDArray

VERSION = 2
VERSION_LEAST = 1
"""Oldest version that is still read."""
VERSION_PUT = 2
"""From here on there are SHARE, MEMORY, UNSHARE and PUT."""
SUFFIX = ".local"
"""The socket lies beside that of gRPC, with this added to its path."""
ANSWER = 0x8000
MAGIC = b"dplocal\0"
HEADER = struct.Struct("<IHHQ")  # bytes of the body, kind, zero, number of the request
HELLO_BYTES_MAX = 4096
REQUEST_BYTES_MAX = 64 + BATCH_BLOCKS_MAX * (2 * HASH_BYTES_MAX + 9)
CHECKSUMS_MAX = 400_000
"""Most checksums of one answer."""
ANSWER_BYTES_MAX = 4096 + CHECKSUMS_MAX * 8 + BATCH_BLOCKS_MAX * 32
FETCH_CHUNKS_MAX = 1024
"""Most chunks of one FETCH."""
TEXT_BYTES_MAX = 2000

Body = memoryview
Parts = list[bytes | memoryview]

_HELLO = struct.Struct("<8sHHI")  # magic, least, newest, bytes of the token
_WELCOME = struct.Struct("<HHIQ")  # version, zero, bytes of the text, bytes of the arena
_LOOKUP = struct.Struct(f"<{NAMESPACE_ID_BYTES}sHHII")  # hash bytes, flags, count, lease ms
_HIT = struct.Struct("<IIQIHHQQ")
# blocks, checksums of each, lease, lease ms, miss, bytes of the detail, of a block, of a chunk
_MAPPED = struct.Struct("<q")  # guard
_RENEW = struct.Struct("<QII")  # lease, lease ms, zero
_COUNT = struct.Struct("<II")  # how many follow, zero
_FETCH = struct.Struct("<QII")  # lease, how many follow, zero
_CHUNK = struct.Struct("<QII")  # lease, block, chunk
_ERROR = struct.Struct("<HHII")  # class, bytes of the reason, of the text, retry after ms
_WANT_CHECKSUMS = 1
_KINDS = {
    kind: (np.dtype(kind), np.dtype(kind).newbyteorder("=")) for kind in ("<u8", "<i8", "<i4", "u1")
}
"""Kinds of numbers on the wire, and the same in the machine's own order."""

_ERRORS: tuple[type[DualPathError], ...] = (
    DualPathError,
    InvalidRequest,
    PermissionDenied,
    Unavailable,
    DeadlineExceeded,
    LeaseExpired,
    Corrupt,
)
"""A class's code is its index, and its own rather than a base's. OVERLOADED carries a time, too."""
_OVERLOADED = len(_ERRORS)
_MISSES = (
    MissReason.NONE,
    MissReason.ABSENT,
    MissReason.PENDING,
    MissReason.EVICTED,
    MissReason.CORRUPT,
    MissReason.INVALIDATED,
    MissReason.NAMESPACE,
    MissReason.QUOTA,
    MissReason.EXPIRED,
)
_MISS_CODES = {reason: code for code, reason in enumerate(_MISSES)}

assert len(_MISSES) == len(MissReason)


class Kind(enum.IntEnum):
    """What a message is."""

    HELLO = 1
    PING = 2
    LOOKUP = 3
    MAP = 4
    RENEW = 5
    RELEASE = 6
    FETCH = 7
    DONE = 8
    """The chunks of the last FETCH are copied."""
    CORRUPT = 9
    """A chunk did not have its checksum."""
    SHARE = 10
    MEMORY = 11
    UNSHARE = 12
    PUT = 13
    ERROR = 0x7FFF


class MalformedMessage(InvalidRequest):
    """What came is no message of this protocol: the connection cannot go on."""

    reason = "malformed"


@dataclass(frozen=True, slots=True)
class Hello:
    """Versions that the client speaks, and a token (b"" for none)."""

    least: int
    newest: int
    token: bytes

    def parts(self) -> Parts:
        """As a body."""
        return [_HELLO.pack(MAGIC, self.least, self.newest, len(self.token)), self.token]

    @staticmethod
    def of(body: Body) -> Hello:
        """Raises MalformedMessage."""
        magic, least, newest, nbytes = _unpack(_HELLO, body, "hello")
        if magic != MAGIC or not 1 <= least <= newest:
            raise MalformedMessage(f"not a hello of this protocol: {bytes(magic)!r}")
        return Hello(least, newest, bytes(_rest(body, _HELLO.size, nbytes)))

    @property
    def version(self) -> int:
        """The newest version that both sides speak. Raises InvalidRequest, reason `version`."""
        version = min(self.newest, VERSION)
        if version < max(self.least, VERSION_LEAST):
            raise InvalidRequest(
                f"this daemon speaks versions {VERSION_LEAST} to {VERSION} of the local socket, "
                f"the client {self.least} to {self.newest}: update the older of the two",
                reason="version",
            )
        return version


@dataclass(frozen=True, slots=True)
class Welcome:
    """The version from here on, and the arena: its descriptor comes along unless it has 0 bytes;
    `text` then says why not."""

    version: int
    arena_bytes: int
    text: str = ""

    def parts(self) -> Parts:
        """As a body."""
        text = _cut(self.text)
        return [_WELCOME.pack(self.version, 0, len(text), self.arena_bytes), text]

    @staticmethod
    def of(body: Body) -> Welcome:
        """Raises MalformedMessage."""
        version, _, nbytes, arena_bytes = _unpack(_WELCOME, body, "welcome")
        if not VERSION_LEAST <= version <= VERSION:
            raise MalformedMessage(f"the daemon chose version {version}, which was not offered")
        return Welcome(version, arena_bytes, _text(_rest(body, _WELCOME.size, nbytes)))


class LookupRequest(NamedTuple):
    """LOOKUP and MAP. `hashes` are packed; `checksums`: send them, too."""

    namespace_id: bytes
    hash_bytes: int
    hashes: bytes | memoryview
    lease_ms: int
    checksums: bool

    @property
    def blocks(self) -> int:
        """How many hashes there are."""
        return len(self.hashes) // max(1, self.hash_bytes)

    def parts(self) -> Parts:
        """As a body."""
        flags = _WANT_CHECKSUMS if self.checksums else 0
        head = _LOOKUP.pack(self.namespace_id, self.hash_bytes, flags, self.blocks, self.lease_ms)
        return [head, self.hashes]

    @staticmethod
    def of(body: Body) -> LookupRequest:
        """Raises MalformedMessage. `hashes` is a view of the body."""
        namespace_id, hash_bytes, flags, count, lease_ms = _unpack(_LOOKUP, body, "lookup")
        hashes = _rest(body, _LOOKUP.size, hash_bytes * count)
        return LookupRequest(
            namespace_id, hash_bytes, hashes, lease_ms, bool(flags & _WANT_CHECKSUMS)
        )


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Bytes of a block and of its chunks, as answers tell them."""

    block_bytes: int
    chunk_bytes: int


def hit_parts(hit: PrefixHit, sizes: BlockSizes, *, checksums: bool) -> Parts:
    """The answer to LOOKUP."""
    detail = _cut(hit.detail) if hit.detail else b""
    sums = hit.checksums if checksums else hit.checksums[:, :0]
    head = _HIT.pack(
        hit.blocks,
        sums.shape[1],
        hit.lease_id,
        round(hit.lease_s * 1000),
        _MISS_CODES[hit.miss],
        len(detail),
        sizes.block_bytes,
        sizes.chunk_bytes,
    )
    return [head, _packed(sums, "<u8"), _packed(hit.tiers, "u1"), detail]


def hit_of(body: Body) -> tuple[PrefixHit, BlockSizes]:
    """The inverse; nothing refers to the body. Raises MalformedMessage."""
    hit, sizes, used = _hit(body)
    _rest(body, used, 0)
    return hit, sizes


def mapped_parts(mapped: MappedPrefix, chunk_bytes: int, *, checksums: bool) -> Parts:
    """The answer to MAP."""
    sizes = BlockSizes(mapped.nbytes, chunk_bytes)
    parts = hit_parts(mapped.hit, sizes, checksums=checksums)
    return [*parts, _MAPPED.pack(mapped.guard), _packed(mapped.offsets, "<i8")]


def mapped_of(body: Body) -> tuple[MappedPrefix, BlockSizes]:
    """The inverse; nothing refers to the body. Raises MalformedMessage."""
    hit, sizes, used = _hit(body)
    (guard,) = _unpack(_MAPPED, body, "mapped prefix", used)
    used += _MAPPED.size
    mapped = hit.blocks if hit.lease_id else 0
    offsets = _array(_rest(body, used, 8 * mapped), "<i8")
    return MappedPrefix(hit, offsets, sizes.block_bytes, guard), sizes


def renew_parts(lease_id: int, lease_ms: int) -> Parts:
    """RENEW."""
    return [_RENEW.pack(lease_id, lease_ms, 0)]


def renew_of(body: Body) -> tuple[int, int]:
    """(lease, ms). Raises MalformedMessage."""
    lease_id, lease_ms, _ = _unpack(_RENEW, body, "renewal")
    _rest(body, _RENEW.size, 0)
    return lease_id, lease_ms


def release_parts(lease_ids: Sequence[int]) -> Parts:
    """RELEASE."""
    ids = np.array(lease_ids, np.uint64)
    return [_COUNT.pack(len(ids), 0), _packed(ids, "<u8")]


def release_of(body: Body) -> list[int]:
    """The leases. Raises MalformedMessage."""
    count, _ = _unpack(_COUNT, body, "release")
    ids: list[int] = _array(_rest(body, _COUNT.size, 8 * count), "<u8").tolist()
    return ids


def fetch_parts(lease_id: int, blocks: NDArray[np.int32], chunks: NDArray[np.int32]) -> Parts:
    """FETCH."""
    head = _FETCH.pack(lease_id, len(blocks), 0)
    return [head, _packed(blocks, "<i4"), _packed(chunks, "<i4")]


def fetch_of(body: Body) -> tuple[int, NDArray[np.int32], NDArray[np.int32]]:
    """(lease, blocks, chunks). Raises MalformedMessage."""
    lease_id, count, _ = _unpack(_FETCH, body, "fetch")
    both = _array(_rest(body, _FETCH.size, 8 * count), "<i4")
    return lease_id, both[:count], both[count:]


def fetched_parts(offsets: NDArray[np.int64], status: NDArray[np.uint8]) -> Parts:
    """The answer to FETCH: of as many leading chunks as there was room for."""
    return [_COUNT.pack(len(offsets), 0), _packed(offsets, "<i8"), _packed(status, "u1")]


def fetched_of(body: Body) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """(offsets in the arena, FetchStatus). Raises MalformedMessage."""
    count, _ = _unpack(_COUNT, body, "fetched chunks")
    used = _COUNT.size + 8 * count
    offsets = _array(_slice(body, _COUNT.size, 8 * count), "<i8")
    return offsets, _array(_rest(body, used, count), "u1")


def chunk_parts(lease_id: int, block: int, chunk: int) -> Parts:
    """CORRUPT."""
    return [_CHUNK.pack(lease_id, block, chunk)]


def chunk_of(body: Body) -> tuple[int, int, int]:
    """(lease, block, chunk). Raises MalformedMessage."""
    lease_id, block, chunk = _unpack(_CHUNK, body, "chunk")
    _rest(body, _CHUNK.size, 0)
    return lease_id, block, chunk


def error_parts(error: Exception) -> Parts:
    """ERROR. Of exceptions that are not of our tree only the class is told."""
    code, retry_ms = 0, 0
    if isinstance(error, Overloaded):
        code, retry_ms = _OVERLOADED, max(0, round(error.retry_after_s * 1000))
    elif isinstance(error, DualPathError):
        code = next((i for i, kind in enumerate(_ERRORS) if type(error) is kind), -1)
        if code < 0:
            matching = [i for i, kind in enumerate(_ERRORS) if isinstance(error, kind)]
            code = matching[-1]
    if isinstance(error, DualPathError):
        reason, text = error.reason, str(error)
    else:
        reason = "internal"
        text = f"internal error ({type(error).__name__}); the daemon's log has the trace"
    reason_bytes, text_bytes = _cut(reason), _cut(text)
    head = _ERROR.pack(code, len(reason_bytes), len(text_bytes), retry_ms)
    return [head, reason_bytes, text_bytes]


def error_of(body: Body) -> DualPathError:
    """The error to raise. Raises MalformedMessage itself if it is none."""
    code, reason_bytes, text_bytes, retry_ms = _unpack(_ERROR, body, "error")
    used = _ERROR.size + reason_bytes
    reason = _text(_slice(body, _ERROR.size, reason_bytes))
    text = _text(_rest(body, used, text_bytes))
    if code == _OVERLOADED:
        return Overloaded(text, retry_after_s=retry_ms / 1000, reason=reason)
    kind = _ERRORS[code] if code < len(_ERRORS) else DualPathError
    return kind(text, reason=reason)


def _hit(body: Body) -> tuple[PrefixHit, BlockSizes, int]:
    blocks, chunks, lease_id, lease_ms, miss, detail_bytes, block_bytes, chunk_bytes = _unpack(
        _HIT, body, "prefix hit"
    )
    if not 0 < block_bytes <= BLOCK_BYTES_MAX or not 0 < chunk_bytes <= BLOCK_BYTES_MAX:
        raise MalformedMessage(f"blocks of {block_bytes} bytes, chunks of {chunk_bytes}")
    if blocks > BATCH_BLOCKS_MAX or blocks * chunks > CHECKSUMS_MAX or miss >= len(_MISSES):
        raise MalformedMessage(f"{blocks} blocks of {chunks} chunks, miss {miss}: out of limits")
    at = _HIT.size
    sums = _array(_slice(body, at, 8 * blocks * chunks), "<u8").reshape(blocks, chunks)
    at += 8 * blocks * chunks
    tiers = _array(_slice(body, at, blocks), "u1")
    at += blocks
    detail = _text(_slice(body, at, detail_bytes)) if detail_bytes else ""
    hit = PrefixHit(blocks, lease_id, lease_ms / 1000, tiers, sums, _MISSES[miss], detail)
    return hit, BlockSizes(block_bytes, chunk_bytes), at + detail_bytes


def _unpack(form: struct.Struct, body: Body, what: str, at: int = 0) -> tuple[Any, ...]:
    if len(body) - at < form.size:
        raise MalformedMessage(f"a {what} has at least {form.size} bytes, not {len(body) - at}")
    return form.unpack_from(body, at)


def _slice(body: Body, at: int, nbytes: int) -> Body:
    if len(body) - at < nbytes:
        raise MalformedMessage(f"{nbytes} bytes were announced, {len(body) - at} came")
    return body[at : at + nbytes]


def _rest(body: Body, at: int, nbytes: int) -> Body:
    if len(body) - at != nbytes:
        raise MalformedMessage(f"{nbytes} bytes were announced, {len(body) - at} came")
    return body[at:]


def _array(body: Body, kind: str) -> NDArray[Any]:
    """A copy, in the machine's own order."""
    packed, own = _KINDS[kind]
    copied = np.frombuffer(bytearray(body), packed)
    return copied if packed == own else copied.astype(own)


def _packed(values: NDArray[Any], kind: str) -> bytes | memoryview:
    packed = _KINDS[kind][0]
    if values.dtype != packed or not values.flags.c_contiguous or not values.size:
        return values.astype(packed, copy=False).tobytes()
    return values.reshape(-1).view(np.uint8).data  # sent from where it lies


def _cut(text: str) -> bytes:
    return text.encode(errors="replace")[:TEXT_BYTES_MAX]


def _text(body: Body) -> str:
    return bytes(body).decode(errors="replace")

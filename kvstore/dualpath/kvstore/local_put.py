"""Messages with which a local client stores blocks out of its own memory.

Owns their layouts and limits; pure. A memory is shared once: SHARE says how large it is, MEMORY
brings its memfd (only this message may carry one) and is answered with a number. PUT then names
blocks by that number and where in it they lie, and is answered with a status a block.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
from dualpath.kvstore.checksum import Buffer
from dualpath.kvstore.local_protocol import Body, MalformedMessage, Parts
from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES
from dualpath.kvstore.store_api import BATCH_BLOCKS_MAX, ReserveStatus, SealStatus
from numpy.typing import NDArray

SHARED_MAX = 8
"""Most memories of one connection."""
SHARED_BYTES_MAX = 64 << 30
"""Most bytes of them together: mapping them costs the daemon page tables."""
PUT_BYTES_MAX = 256 << 20
"""Most bytes of the blocks of one PUT, so that no answer takes long."""

PutStatus = ReserveStatus | SealStatus

_U64 = struct.Struct("<Q")
_PUT = struct.Struct(f"<{NAMESPACE_ID_BYTES}sHHIQQ")
# hash bytes, flags, count, number of the memory, bytes of a block
_DURABLE = 1
_STATUSES: tuple[PutStatus, ...] = (
    SealStatus.SEALED,
    SealStatus.EXPIRED,
    SealStatus.CORRUPT,
    SealStatus.FAILED,
    ReserveStatus.EXISTS,
    ReserveStatus.PENDING,
    ReserveStatus.NO_PARENT,
    ReserveStatus.FULL,
    ReserveStatus.QUOTA,
)
_CODES = {status: code for code, status in enumerate(_STATUSES)}

assert len(_STATUSES) == len(SealStatus) + len(ReserveStatus) - 1, "RESERVED is no outcome"


class PutRequest(NamedTuple):
    """Blocks of `block_bytes` each, block i from `offsets[i]` of the memory. `hashes` and `parents`
    are packed, all of one size; a parent of zeros is none if `rooted[i]` says so."""

    namespace_id: bytes
    hash_bytes: int
    memory: int
    block_bytes: int
    durable: bool
    offsets: NDArray[np.int64]
    hashes: Buffer
    parents: Buffer
    rooted: NDArray[np.uint8]

    def parts(self) -> Parts:
        """As a body."""
        flags = _DURABLE if self.durable else 0
        head = _PUT.pack(
            self.namespace_id,
            self.hash_bytes,
            flags,
            len(self.offsets),
            self.memory,
            self.block_bytes,
        )
        return [
            head,
            self.offsets.astype("<i8").tobytes(),
            memoryview(self.hashes),
            memoryview(self.parents),
            self.rooted.tobytes(),
        ]

    @staticmethod
    def of(body: Body) -> PutRequest:
        """Raises MalformedMessage. Nothing refers to the body."""
        if len(body) < _PUT.size:
            raise MalformedMessage(f"a put has at least {_PUT.size} bytes, not {len(body)}")
        name, hash_bytes, flags, count, memory, block_bytes = _PUT.unpack_from(body)
        packed = hash_bytes * count
        if not count or count > BATCH_BLOCKS_MAX or len(body) != _PUT.size + 9 * count + 2 * packed:
            raise MalformedMessage(
                f"{count} blocks in a put of {len(body)} bytes; 1..{BATCH_BLOCKS_MAX} are valid"
            )
        at = _PUT.size + 8 * count
        return PutRequest(
            name,
            hash_bytes,
            memory,
            block_bytes,
            bool(flags & _DURABLE),
            _array(body[_PUT.size : at], "<i8").astype(np.int64),
            bytes(body[at : at + packed]),
            bytes(body[at + packed : at + 2 * packed]),
            _array(body[at + 2 * packed :], "u1"),
        )

    @property
    def hash_list(self) -> list[bytes]:
        """The hashes, one by one."""
        return _cut(self.hashes, self.hash_bytes)

    @property
    def parent_list(self) -> list[bytes]:
        """The parents, b"" for none."""
        parents = _cut(self.parents, self.hash_bytes)
        return [
            b"" if root else parent
            for parent, root in zip(parents, self.rooted.tolist(), strict=True)
        ]


def number_parts(number: int) -> Parts:
    """SHARE (bytes of the memory), MEMORY's answer and UNSHARE (number of the memory)."""
    return [_U64.pack(number)]


def number_of(body: Body) -> int:
    """The inverse. Raises MalformedMessage."""
    if len(body) != _U64.size:
        raise MalformedMessage(f"a number has {_U64.size} bytes, not {len(body)}")
    return int(_U64.unpack(body)[0])


def statuses_parts(statuses: tuple[PutStatus, ...]) -> Parts:
    """The answer to PUT."""
    return [bytes([_CODES[status] for status in statuses])]


def statuses_of(body: Body) -> tuple[PutStatus, ...]:
    """The inverse. Raises MalformedMessage."""
    codes = bytes(body)
    if codes and max(codes) >= len(_STATUSES):
        raise MalformedMessage(f"no outcome of a put: {max(codes)}")
    return tuple(_STATUSES[code] for code in codes)


def _array(body: Body, kind: str) -> NDArray[Any]:
    return np.frombuffer(bytes(body), kind)


def _cut(packed: Buffer, size: int) -> list[bytes]:
    data = bytes(packed)
    return [data[at : at + size] for at in range(0, len(data), size)]

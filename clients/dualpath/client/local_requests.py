"""What a client of the local socket asks for, checked before it is sent. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from dualpath.kvstore import local_protocol as protocol
from dualpath.kvstore.local_protocol import LookupRequest, Parts
from dualpath.kvstore.local_put import PutRequest
from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.store_api import LEASE_S_MAX
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.region import Region
from numpy.typing import NDArray

Hashes = PackedHashes | Sequence[bytes]


def lookup_parts(namespace_id: bytes, hashes: Hashes, lease_s: float, checksums: bool) -> Parts:
    """A LOOKUP or MAP. Raises InvalidRequest."""
    chain = packed(hashes)
    _check_namespace_id(namespace_id)
    data = memoryview(chain.data).cast("B")
    lease_ms = milliseconds(lease_s) if lease_s else 0
    return LookupRequest(namespace_id, chain.hash_bytes, data, lease_ms, checksums).parts()


def check_put(
    version: int,
    hashes: Sequence[bytes],
    parents: Sequence[bytes],
    memory: Region,
    block_bytes: int,
    at: NDArray[np.int64],
) -> None:
    """Raises InvalidRequest on what the daemon could not do, or would not understand."""
    if version < protocol.VERSION_PUT:
        raise InvalidRequest(
            f"this daemon speaks version {version} of the local socket, puts need "
            f"{protocol.VERSION_PUT}: update it, or save through the agent",
            reason="version",
        )
    if memory.fd < 0:
        raise InvalidRequest("this memory is private: make it with Region.memfd")
    if block_bytes <= 0:
        raise InvalidRequest(f"block_bytes: {block_bytes}; give the layout's")
    if not len(hashes) == len(parents) == len(at):
        raise InvalidRequest(
            f"{len(hashes)} hashes, {len(parents)} parents and {len(at)} places: not as many"
        )


def put_request(
    namespace_id: bytes,
    hashes: Sequence[bytes],
    parents: Sequence[bytes],
    memory: int,
    block_bytes: int,
    at: NDArray[np.int64],
    durable: bool,
) -> PutRequest:
    """A PUT. Raises InvalidRequest."""
    _check_namespace_id(namespace_id)
    chain = PackedHashes.of(hashes)
    nothing = bytes(chain.hash_bytes)
    above = PackedHashes.of([parent or nothing for parent in parents])
    if above.hash_bytes != chain.hash_bytes:
        raise InvalidRequest(
            f"hashes of {chain.hash_bytes} bytes, parents of {above.hash_bytes}: they come from "
            "one algorithm"
        )
    rooted = np.array([not parent for parent in parents], np.uint8)
    return PutRequest(
        namespace_id,
        chain.hash_bytes,
        memory,
        block_bytes,
        durable,
        np.asarray(at, np.int64),
        chain.data,
        above.data,
        rooted,
    )


def _check_namespace_id(namespace_id: bytes) -> None:
    if len(namespace_id) != NAMESPACE_ID_BYTES:
        raise InvalidRequest(
            f"namespace_id has {len(namespace_id)} bytes, not {NAMESPACE_ID_BYTES}: take it from "
            "Namespace.id"
        )


def packed(hashes: Hashes) -> PackedHashes:
    """As one run of bytes. Raises InvalidRequest."""
    return hashes if isinstance(hashes, PackedHashes) else PackedHashes.of(hashes)


def milliseconds(lease_s: float) -> int:
    """A lease's time on the wire. Raises InvalidRequest."""
    if not 0 < lease_s <= LEASE_S_MAX:
        raise InvalidRequest(f"lease_s must lie in 0.001..{LEASE_S_MAX} s, not {lease_s}")
    return max(1, round(lease_s * 1000))

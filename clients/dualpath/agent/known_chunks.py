"""What the chunks of a relay's grant are: the protocol's KnownChunks, made and checked.

Owns the two directions. With it a relay finds chunks that it holds, and keeps those of a request;
the checksums show that the asker has looked the chunks up at their daemon.
"""

from __future__ import annotations

from dualpath.agent.active_load import ActiveLoad
from dualpath.agent.holdings import REQUEST_CHARS_MAX, ChunkName
from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES
from dualpath.kvstore.store_api import HASH_BYTES_MAX, HASH_BYTES_MIN
from dualpath.proto.v1 import agent_pb2, common_pb2
from dualpath.transfer.errors import InvalidRequest


def known_chunks(
    load: ActiveLoad, grant: common_pb2.ChunkGrant, *, retain: bool
) -> agent_pb2.KnownChunks:
    """For a relay: what is granted of a load; with `retain` it is to keep it for its request."""
    chunks, blocks = load.layout.chunk_count, load.progress.blocks
    pairs = list(zip(grant.block, grant.chunk, strict=True))
    distinct = sorted(set(grant.block))
    return agent_pb2.KnownChunks(
        namespace_id=load.spec.namespace_id,
        block=distinct,
        hash=[load.spec.hashes[block] for block in distinct],
        checksum=[int(load.checksums[block * chunks + chunk]) for block, chunk in pairs],
        request=load.spec.request if retain else "",
        fresh=any(chunk * blocks + block in load.distrusted for block, chunk in pairs),
    )


def names_of(
    grant: common_pb2.ChunkGrant, known: agent_pb2.KnownChunks | None
) -> list[ChunkName] | None:
    """The names of a grant's chunks, None if it does not say. Raises InvalidRequest."""
    if known is None:
        return None
    check_id(known.namespace_id)
    if len(known.request) > REQUEST_CHARS_MAX:
        raise InvalidRequest(f"a request's name has at most {REQUEST_CHARS_MAX} characters")
    if len(known.checksum) != len(grant.tag) or len(known.hash) != len(known.block):
        raise InvalidRequest(
            f"{len(grant.tag)} chunks with {len(known.checksum)} checksums, {len(known.block)} "
            f"blocks with {len(known.hash)} hashes"
        )
    for each in known.hash:
        check_hash(each)
    hashes = dict(zip(known.block, known.hash, strict=True))
    missing = set(grant.block) - hashes.keys()
    if missing:
        raise InvalidRequest(f"block {min(missing)} is granted, but has no hash")
    return [
        (known.namespace_id, hashes[block], chunk, checksum)
        for block, chunk, checksum in zip(grant.block, grant.chunk, known.checksum, strict=True)
    ]


def check_id(namespace_id: bytes) -> None:
    """Raise InvalidRequest unless it can be a namespace's id."""
    if len(namespace_id) != NAMESPACE_ID_BYTES:
        raise InvalidRequest(
            f"a namespace id has {NAMESPACE_ID_BYTES} bytes, not {len(namespace_id)}"
        )


def check_hash(block_hash: bytes) -> None:
    """Raise InvalidRequest unless it can be a block's hash."""
    if not HASH_BYTES_MIN <= len(block_hash) <= HASH_BYTES_MAX:
        raise InvalidRequest(
            f"chain hashes have {HASH_BYTES_MIN}..{HASH_BYTES_MAX} bytes, not {len(block_hash)}"
        )

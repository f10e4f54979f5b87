"""What one client of the local socket asks for: a request's kind and body in, an answer out.

Owns the leases of the connection and the chunks that it has fetched and not yet copied; all end
with it. The client acts as an owner of its own, so that it can touch nobody else's leases. Knows no
socket. One thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dualpath.kvstore import local_protocol as protocol
from dualpath.kvstore.fetched_batch import FetchedBatch
from dualpath.kvstore.local_protocol import BlockSizes, Body, Kind, LookupRequest, Parts
from dualpath.kvstore.service.gate import Gate
from dualpath.kvstore.service.local_puts import LocalPuts
from dualpath.kvstore.service.principal import Rights
from dualpath.kvstore.store_api import BATCH_BLOCKS_MAX, LEASE_S_MAX, PrefixHit, Store
from dualpath.transfer.errors import InvalidRequest, LeaseExpired, Overloaded, PermissionDenied

_NAMESPACES_KEPT = 1024
LEASES_MAX = 1024
"""Most leases of one connection at once."""


class LocalCalls:
    """See the module docstring. `arena`: the client has it mapped; `puts` are of the same
    connection, and closed with it. `clock` is the store's."""

    def __init__(
        self,
        store: Store,
        gate: Gate,
        *,
        principal: str,
        owner: str,
        arena: bool,
        puts: LocalPuts,
        clock: Callable[[], float],
    ) -> None:
        self.principal = principal
        self._store = store
        self._gate = gate
        self._owner = owner
        self._arena = arena
        self._puts = puts
        self._clock = clock
        self._leases: dict[int, tuple[float, bytes]] = {}  # end and namespace
        self._sizes: dict[bytes, tuple[BlockSizes, int]] = {}
        self._fetched: FetchedBatch | None = None
        self._fetched_at = 0.0
        self._handlers: dict[int, Callable[[Body], Parts]] = {
            Kind.PING: self._ping,
            Kind.LOOKUP: self._lookup,
            Kind.MAP: self._map,
            Kind.RENEW: self._renew,
            Kind.RELEASE: self._release,
            Kind.FETCH: self._fetch,
            Kind.DONE: self._done,
            Kind.CORRUPT: self._corrupt,
            Kind.SHARE: puts.share,
            Kind.MEMORY: puts.memory,
            Kind.UNSHARE: puts.unshare,
            Kind.PUT: puts.put,
        }

    @property
    def fetched_at(self) -> float | None:
        """When (seconds, monotonic) the client fetched chunks, if it has still to say DONE: until
        then it keeps read buffers from others."""
        return None if self._fetched is None else self._fetched_at

    @property
    def awaits_memory(self) -> bool:
        """Whether the next message is to bring a descriptor."""
        return self._puts.awaits_memory

    def answer(self, kind: int, body: Body) -> Parts:
        """The answer's body. Raises what the client is told; MalformedMessage ends the talk."""
        if self._puts.awaits_memory and kind != Kind.MEMORY:
            raise protocol.MalformedMessage(f"a memory was announced, {kind} came")
        handler = self._handlers.get(kind)
        if handler is None:
            raise protocol.MalformedMessage(f"unknown kind of message: {kind}")
        return handler(body)

    def close(self) -> None:
        """The client has gone: give back what it held."""
        self._give_back()
        self._forget(list(self._leases))
        self._puts.close()
        self._store.forget_owner(self._owner)

    def _ping(self, body: Body) -> Parts:
        if len(body):
            raise protocol.MalformedMessage("a ping has no body")
        return []

    def _lookup(self, body: Body) -> Parts:
        request = LookupRequest.of(body)
        sizes, lease_s = self._admitted(request, leased=request.lease_ms > 0)
        hit = self._store.lookup_packed(
            request.namespace_id,
            request.hashes,
            request.hash_bytes,
            owner=self._owner,
            lease_s=lease_s,
        )
        self._count(request, hit)
        return protocol.hit_parts(hit, sizes, checksums=request.checksums)

    def _map(self, body: Body) -> Parts:
        request = LookupRequest.of(body)
        self._check_arena()
        sizes, lease_s = self._admitted(request, leased=True)
        mapped = self._store.map_packed(
            request.namespace_id,
            request.hashes,
            request.hash_bytes,
            owner=self._owner,
            lease_s=lease_s,
        )
        self._count(request, mapped.hit)
        return protocol.mapped_parts(mapped, sizes.chunk_bytes, checksums=request.checksums)

    def _renew(self, body: Body) -> Parts:
        lease_id, lease_ms = protocol.renew_of(body)
        lease_s = _lease_s(lease_ms)
        known = self._leases.get(lease_id)
        if known is not None:
            # Rules may have changed since it was leased.
            self._gate.access.require(self.principal, known[1], Rights.READ)
        try:
            self._store.renew(lease_id, owner=self._owner, lease_s=lease_s)
        except LeaseExpired:
            self._forget([lease_id])
            raise
        if known is not None:
            self._leases[lease_id] = self._clock() + lease_s, known[1]
        return []

    def _release(self, body: Body) -> Parts:
        lease_ids = protocol.release_of(body)
        for lease_id in lease_ids:
            self._store.release(lease_id, owner=self._owner)
        self._forget(lease_ids)
        return []

    def _fetch(self, body: Body) -> Parts:
        lease_id, blocks, chunks = protocol.fetch_of(body)
        self._check_arena()
        self._give_back()
        self._check_own(lease_id)
        if not 1 <= len(blocks) <= protocol.FETCH_CHUNKS_MAX:
            raise InvalidRequest(
                f"{len(blocks)} chunks in one fetch; 1..{protocol.FETCH_CHUNKS_MAX} are valid"
            )
        self._fetched = self._store.fetch_batch(lease_id, blocks, chunks)
        self._fetched_at = time.monotonic()
        return protocol.fetched_parts(self._fetched.offsets, self._fetched.status)

    def _done(self, body: Body) -> Parts:
        if len(body):
            raise protocol.MalformedMessage("done has no body")
        self._give_back()
        return []

    def _corrupt(self, body: Body) -> Parts:
        lease_id, block, chunk = protocol.chunk_of(body)
        self._check_own(lease_id)
        return [bytes([self._store.report_corrupt(lease_id, block, chunk)])]

    def _admitted(self, request: LookupRequest, *, leased: bool) -> tuple[BlockSizes, float]:
        """The blocks' sizes and the lease's seconds, once the principal may have them. The size of
        the hashes is left to the store."""
        count = request.blocks
        if not 1 <= count <= BATCH_BLOCKS_MAX:
            raise InvalidRequest(f"{count} blocks in one call; 1..{BATCH_BLOCKS_MAX} are valid")
        sizes, chunks = self._sizes_of(request.namespace_id)
        if request.checksums and count * chunks > protocol.CHECKSUMS_MAX:
            most = protocol.CHECKSUMS_MAX // chunks
            raise InvalidRequest(
                f"{count} blocks of {chunks} checksums each; ask for {most} at once, or for no "
                "checksums"
            )
        if leased:
            self._make_room()
        self._gate.admit_lookup(self.principal, request.namespace_id, leased=leased)
        return sizes, _lease_s(request.lease_ms) if leased else 0.0

    def _sizes_of(self, namespace_id: bytes) -> tuple[BlockSizes, int]:
        """(bytes of a block and of a chunk, chunks of a block). Kept: they cost as much to work
        out as a small look-up."""
        known = self._sizes.get(namespace_id)
        if known is None:
            layout = self._store.layout(namespace_id)
            known = BlockSizes(layout.block_bytes, layout.chunk_bytes), layout.chunk_count
            if len(self._sizes) >= _NAMESPACES_KEPT:
                self._sizes.clear()
            self._sizes[namespace_id] = known
        return known

    def _check_arena(self) -> None:
        if not self._arena:
            raise PermissionDenied(
                "this connection has no arena, its hello says why: look up here and read over gRPC",
                reason="rights",
            )
        # Rules may have changed since; what is mapped stays, nothing is added to it.
        self._gate.access.require_everywhere(self.principal, Rights.READ)

    def _check_own(self, lease_id: int) -> None:
        # Fetches name a lease without an owner.
        if lease_id not in self._leases:
            raise LeaseExpired(f"lease {lease_id} is not of this connection: look up again")

    def _make_room(self) -> None:
        """For one more lease. Raises Overloaded."""
        if len(self._leases) < LEASES_MAX:
            return
        now = self._clock()
        self._forget([lease for lease, (ends, _) in self._leases.items() if ends <= now])
        if len(self._leases) >= LEASES_MAX:
            raise Overloaded(
                f"this connection holds {LEASES_MAX} leases: release some", retry_after_s=0.1
            )

    def _count(self, request: LookupRequest, hit: PrefixHit) -> None:
        leases = 0
        if hit.lease_id:
            self._leases[hit.lease_id] = self._clock() + hit.lease_s, request.namespace_id
            leases = 1
        hits, misses = hit.blocks, request.blocks - hit.blocks
        quotas = self._gate.quotas
        quotas.looked_up(self.principal, request.namespace_id, hits, misses, leases=leases)

    def _forget(self, lease_ids: list[int]) -> None:
        gone = sum(self._leases.pop(lease_id, None) is not None for lease_id in lease_ids)
        if gone:
            self._gate.quotas.lease(self.principal, -gone)

    def _give_back(self) -> None:
        fetched, self._fetched = self._fetched, None
        if fetched is not None:
            fetched.release()


def _lease_s(lease_ms: int) -> float:
    lease_s = lease_ms / 1000
    if not 0 < lease_s <= LEASE_S_MAX:
        raise InvalidRequest(f"lease of {lease_ms} ms; 1..{LEASE_S_MAX * 1000:.0f} are valid")
    return lease_s

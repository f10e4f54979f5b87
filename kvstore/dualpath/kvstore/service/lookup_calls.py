"""The calls that find, hold and hand on blocks: namespaces, look-ups, leases, tickets.

Owns no state: leases are the store's, their owners `LeaseOwners`'. A look-up runs in the event
loop, since the store answers from memory; what may touch a medium goes to the executor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.service.attachments import Attachments
from dualpath.kvstore.service.auth import Caller
from dualpath.kvstore.service.gate import Gate
from dualpath.kvstore.service.lease_owners import FOREIGN, LeaseOwners
from dualpath.kvstore.service.messages import (
    DELEGATES_MAX,
    checked_batch,
    checked_checksums,
    checked_namespace_id,
    checked_session,
    hit_message,
    lease_s_of,
)
from dualpath.kvstore.service.namespace_message import namespace_of
from dualpath.kvstore.service.principal import Rights
from dualpath.kvstore.service.ticket import TicketMint
from dualpath.kvstore.store_api import Store
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import InvalidRequest, LeaseExpired, PermissionDenied


class LookupCalls:
    """Handlers without gRPC: a request and its caller in, a response out, errors raised."""

    def __init__(
        self,
        *,
        store: Store,
        attachments: Attachments,
        owners: LeaseOwners,
        mint: TicketMint,
        gate: Gate,
        executor: Executor,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._gate = gate
        self._attachments = attachments
        self._owners = owners
        self._mint = mint
        self._executor = executor
        self._clock = clock

    def owner_of(self, session: bytes, caller: Caller) -> str:
        """In whose name a call acts: its attachment's, or without a session its principal's."""
        if not session:
            return caller.principal
        return self._attachments.of_session(checked_session(session), caller).peer_id

    async def open_namespace(
        self, request: store_pb2.OpenNamespaceRequest, caller: Caller
    ) -> store_pb2.OpenNamespaceResponse:
        """See store.proto."""
        namespace = namespace_of(request.namespace)
        self._gate.access.require_any(caller.principal, namespace)
        loop = asyncio.get_running_loop()
        opened = await loop.run_in_executor(self._executor, self._store.open_namespace, namespace)
        return store_pb2.OpenNamespaceResponse(namespace_id=opened)

    async def lookup(
        self, request: store_pb2.LookupRequest, caller: Caller
    ) -> store_pb2.LookupResponse:
        """See store.proto."""
        return self.look_up(request, self.owner_of(request.session, caller), caller.principal)

    def look_up(
        self, request: store_pb2.LookupRequest, owner: str, principal: str
    ) -> store_pb2.LookupResponse:
        """The answer to a look-up in the name of `owner`; its session is not looked at."""
        gate = self._gate
        namespace_id = checked_namespace_id(request.namespace_id)
        hashes = PackedHashes.checked(request.hashes, request.hash_bytes)
        checked_batch("hashes", len(hashes))
        checked_checksums(len(hashes), self._store.layout(namespace_id))
        lease_s = lease_s_of(request.lease_ms, zero=True)
        gate.admit_lookup(principal, namespace_id, leased=lease_s > 0)
        hit = self._store.lookup_packed(
            namespace_id, hashes.data, hashes.hash_bytes, owner=owner, lease_s=lease_s
        )
        if hit.lease_id:
            expires_at = self._clock() + hit.lease_s
            self._owners.put(hit.lease_id, owner, expires_at, principal, namespace_id)
        gate.quotas.looked_up(principal, namespace_id, hit.blocks, len(hashes) - hit.blocks)
        return hit_message(hit)

    def renew(self, request: store_pb2.RenewRequest, caller: Caller) -> store_pb2.RenewResponse:
        """See store.proto."""
        checked_batch("lease_id", len(request.lease_id))
        lease_s = lease_s_of(request.lease_ms, zero=False)
        owner = self.owner_of(request.session, caller)
        expired = []
        for lease_id in request.lease_id:
            try:
                self._owners.check(lease_id, owner)
                self._store.renew(lease_id, owner=owner, lease_s=lease_s)
            except LeaseExpired:
                expired.append(lease_id)
            except PermissionDenied as error:
                if error.reason == FOREIGN:
                    raise
                # Its right is gone, and the lease with it. The others of the call go on; whoever
                # looks up again is told why.
                self._store.release(lease_id, owner=owner)
                self._owners.remove(lease_id)
                expired.append(lease_id)
            else:
                self._owners.renewed(lease_id, self._clock() + lease_s)
        return store_pb2.RenewResponse(expired_lease_id=expired)

    def release(
        self, request: store_pb2.ReleaseRequest, caller: Caller
    ) -> store_pb2.ReleaseResponse:
        """See store.proto."""
        checked_batch("lease_id", len(request.lease_id))
        owner = self.owner_of(request.session, caller)
        for lease_id in request.lease_id:
            self._store.release(lease_id, owner=owner)
            self._owners.remove(lease_id)
        return store_pb2.ReleaseResponse()

    def delegate(
        self, request: store_pb2.DelegateRequest, caller: Caller
    ) -> store_pb2.DelegateResponse:
        """See store.proto."""
        if not 1 <= len(request.peer_id) <= DELEGATES_MAX:
            raise InvalidRequest(
                f"peer_id: {len(request.peer_id)} given; 1..{DELEGATES_MAX} are valid"
            )
        owner = self.owner_of(request.session, caller)
        self._owners.check(request.lease_id, owner)
        now = self._clock()
        return store_pb2.DelegateResponse(
            ticket=[
                self._mint.issue(request.lease_id, peer_id, ttl_s=request.ttl_ms / 1000, now=now)
                for peer_id in request.peer_id
            ]
        )

    def retain(self, request: store_pb2.RetainRequest, caller: Caller) -> store_pb2.RetainResponse:
        """See store.proto."""
        namespace_id = checked_namespace_id(request.namespace_id)
        hashes = PackedHashes.checked(request.hashes, request.hash_bytes)
        checked_batch("hashes", len(hashes))
        self._gate.access.require(caller.principal, namespace_id, Rights.WRITE)
        retained = self._store.retain(namespace_id, list(hashes), retain_s=request.retain_ms / 1000)
        return store_pb2.RetainResponse(blocks=retained)

    async def report_corrupt(
        self, request: store_pb2.ReportCorruptRequest, caller: Caller
    ) -> store_pb2.ReportCorruptResponse:
        """See store.proto."""
        self._owners.check(request.lease_id, self.owner_of(request.session, caller))
        dropped = await asyncio.get_running_loop().run_in_executor(
            self._executor,
            self._store.report_corrupt,
            request.lease_id,
            request.block,
            request.chunk,
        )
        return store_pb2.ReportCorruptResponse(dropped=dropped)

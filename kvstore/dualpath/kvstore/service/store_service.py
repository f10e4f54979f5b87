"""The gRPC service `dualpath.v1.Store`: admits the caller and hands on to the calls.

Owns the daemon's parts that live in the event loop, and the periodic duties (expired reservations,
attachments that never connected, pruned leases). The calls themselves are in `lookup_calls`,
`write_calls`, `deliver_calls` and `byte_streams`; errors become statuses in the interceptors.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import Any

from dualpath.kvstore.block_events import BlockEvents
from dualpath.kvstore.service.access import Access
from dualpath.kvstore.service.attachments import Attachments, Plane
from dualpath.kvstore.service.auth import caller_of_call
from dualpath.kvstore.service.byte_streams import STREAM_OWNER, ByteStreams
from dualpath.kvstore.service.deliver import DeliveryEngine
from dualpath.kvstore.service.deliver_calls import DeliverCalls
from dualpath.kvstore.service.drain import Drain, Left
from dualpath.kvstore.service.event_calls import EventCalls
from dualpath.kvstore.service.gate import Gate
from dualpath.kvstore.service.lease_owners import LeaseOwners
from dualpath.kvstore.service.local_socket import LOCAL_OWNER
from dualpath.kvstore.service.locate_calls import LocateCalls
from dualpath.kvstore.service.lookup_calls import LookupCalls
from dualpath.kvstore.service.metrics import ServiceSnapshot
from dualpath.kvstore.service.operator_calls import OperatorCalls
from dualpath.kvstore.service.principal import Rights, is_of_token
from dualpath.kvstore.service.quotas import Quotas
from dualpath.kvstore.service.readiness import Readiness
from dualpath.kvstore.service.stats_report import StatsReport
from dualpath.kvstore.service.ticket import TicketMint
from dualpath.kvstore.service.write_calls import WriteCalls
from dualpath.kvstore.store_api import LEASE_S_MAX, Store
from dualpath.proto.status import Context
from dualpath.proto.v1 import common_pb2, store_pb2, store_pb2_grpc

DUTY_PERIOD_S = 0.5
UNBOUND_LEASE_MS_MAX = 60_000
"""Longest lease without a session."""

_log = logging.getLogger(__name__)


class StoreService(store_pb2_grpc.StoreServicer):
    """See the module docstring. Made inside of the running loop. `on_stop` is called when an
    operator asks for the end of the process."""

    def __init__(
        self,
        *,
        store: Store,
        planes: Mapping[str, Plane],
        engine: DeliveryEngine,
        events: BlockEvents,
        access: Access,
        quotas: Quotas,
        readiness: Readiness,
        executor: Executor,
        on_stop: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server_id = secrets.token_hex(8)
        self._store = store
        self._engine = engine
        self._executor = executor
        self._clock = clock
        self._readiness = readiness
        self._quotas = quotas
        self._block_events = events
        self._owners = LeaseOwners(quotas.lease, partial(access.require, right=Rights.READ))
        mint = TicketMint()
        self.attachments = Attachments(store, planes, executor, self._dropped)
        gate = Gate(readiness, access, quotas, self.attachments.held)
        self.gate = gate
        """What other ways in than gRPC have to pass, too."""
        self._lookups = LookupCalls(
            store=store,
            attachments=self.attachments,
            owners=self._owners,
            mint=mint,
            gate=gate,
            executor=executor,
            clock=clock,
        )
        self._writes = WriteCalls(self.attachments, store, gate, executor, clock)
        self._delivers = DeliverCalls(
            attachments=self.attachments,
            engine=engine,
            owners=self._owners,
            mint=mint,
            gate=gate,
            look_up=self._lookups.look_up,
            server_id=self.server_id,
            clock=clock,
        )
        self._locates = LocateCalls(
            store, self.attachments, self._delivers.lease_of, self._owners.namespace_of
        )
        self._streams = ByteStreams(store, events, gate, executor, clock)
        self._events = EventCalls(events, access, quotas, self.server_id)
        drain = Drain(readiness, self._left, store, executor, clock)
        self._operators = OperatorCalls(store, access, drain, executor, on_stop)
        self._report = StatsReport(
            self.server_id, store, engine, events, self.attachments, gate, clock
        )

    async def do_duties(self) -> None:
        """Run the periodic duties until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(DUTY_PERIOD_S)
            try:
                self._readiness.beat()
                now = self._clock()
                self._owners.prune(now)
                self.attachments.reap(now)
                for attachment in self.attachments:
                    if attachment.incoming.overdue(now):
                        await loop.run_in_executor(self._executor, attachment.incoming.expire, now)
            except Exception:  # noqa: BLE001 - the duties must go on
                _log.exception("a periodic duty failed")

    async def stop_streams(self) -> None:
        """End the Deliver streams and refuse new attachments."""
        self._events.stop()
        await self._delivers.stop()

    def principal_of(self, owner: str) -> str:
        """Whose an owner's leases are. From any thread."""
        attachment = self.attachments.of_peer(owner)
        if attachment is not None:
            return attachment.principal
        if owner.startswith((STREAM_OWNER, LOCAL_OWNER)):
            return owner.split(":", 2)[2]
        return owner

    def holder_of(self, owner: str) -> str:
        """Of whose share an owner's leases are: its principal's. Local connections of a user have
        one each, unless he has a limit: an engine that stalls takes nothing from the others of
        the machine. From any thread."""
        principal = self.principal_of(owner)
        if not owner.startswith(LOCAL_OWNER) or is_of_token(principal):
            return principal
        return principal if self._quotas.limits(principal).leased_bytes else owner

    def snapshot(self) -> ServiceSnapshot:
        """What metrics show. From any thread."""
        return ServiceSnapshot(
            store=self._store.stats(),
            deliveries=self._engine.stats(),
            attachments=len(self.attachments),
            principals=self._quotas.snapshot()[0],
            quota_refusals=self._quotas.refusals,
            last_sequence=self._block_events.last,
        )

    def store_troubles(self) -> dict[str, str]:
        """Why the store is degraded: word -> sentence. From any thread."""
        return {word.value: text for word, text in self._store.health().troubles.items()}

    async def OpenNamespace(
        self, request: store_pb2.OpenNamespaceRequest, context: Context
    ) -> store_pb2.OpenNamespaceResponse:
        """See store.proto."""
        return await self._lookups.open_namespace(request, caller_of_call())

    async def Lookup(
        self, request: store_pb2.LookupRequest, context: Context
    ) -> store_pb2.LookupResponse:
        """See store.proto."""
        _shorten_unbound(request)
        return await self._lookups.lookup(request, caller_of_call())

    async def Renew(
        self, request: store_pb2.RenewRequest, context: Context
    ) -> store_pb2.RenewResponse:
        """See store.proto."""
        _shorten_unbound(request)
        return self._lookups.renew(request, caller_of_call())

    async def Release(
        self, request: store_pb2.ReleaseRequest, context: Context
    ) -> store_pb2.ReleaseResponse:
        """See store.proto."""
        return self._lookups.release(request, caller_of_call())

    async def Delegate(
        self, request: store_pb2.DelegateRequest, context: Context
    ) -> store_pb2.DelegateResponse:
        """See store.proto."""
        return self._lookups.delegate(request, caller_of_call())

    async def ReportCorrupt(
        self, request: store_pb2.ReportCorruptRequest, context: Context
    ) -> store_pb2.ReportCorruptResponse:
        """See store.proto."""
        return await self._lookups.report_corrupt(request, caller_of_call())

    async def Reserve(
        self, request: store_pb2.ReserveRequest, context: Context
    ) -> store_pb2.ReserveResponse:
        """See store.proto."""
        return await self._writes.reserve(request, caller_of_call())

    async def Seal(
        self, request: store_pb2.SealRequest, context: Context
    ) -> store_pb2.SealResponse:
        """See store.proto."""
        return await self._writes.seal(request, caller_of_call())

    async def Abandon(
        self, request: store_pb2.AbandonRequest, context: Context
    ) -> store_pb2.AbandonResponse:
        """See store.proto."""
        return await self._writes.abandon(request, caller_of_call())

    async def Attach(
        self, request: common_pb2.AttachRequest, context: Context
    ) -> common_pb2.AttachResponse:
        """See store.proto."""
        return self._delivers.attach(request, caller_of_call())

    async def Deliver(
        self, request_iterator: Any, context: Context
    ) -> AsyncIterator[store_pb2.DeliverResponse]:
        """See store.proto."""
        caller = caller_of_call()
        async for response in self._delivers.deliver(request_iterator, caller, context):
            yield response

    async def Locate(
        self, request: store_pb2.LocateRequest, context: Context
    ) -> store_pb2.LocateResponse:
        """See store.proto."""
        return self._locates.locate(request, caller_of_call())

    # The stubs know only handlers that yield; gRPC takes one that writes as well.
    async def Read(  # type: ignore[override]
        self, request: store_pb2.ReadRequest, context: Context
    ) -> None:
        """See store.proto."""
        await self._streams.read(request, caller_of_call(), context.write)

    async def Write(self, request_iterator: Any, context: Context) -> store_pb2.WriteResponse:
        """See store.proto."""
        return await self._streams.write(request_iterator, caller_of_call())

    async def Stats(
        self, request: store_pb2.StatsRequest, context: Context
    ) -> store_pb2.StatsResponse:
        """See store.proto."""
        return self._report.stats(caller_of_call())

    async def Events(  # type: ignore[override]
        self, request: store_pb2.EventsRequest, context: Context
    ) -> None:
        """See store.proto."""
        await self._events.events(request, caller_of_call(), context.write)

    async def Invalidate(
        self, request: store_pb2.InvalidateRequest, context: Context
    ) -> store_pb2.InvalidateResponse:
        """See store.proto."""
        return await self._operators.invalidate(request, caller_of_call())

    async def Retain(
        self, request: store_pb2.RetainRequest, context: Context
    ) -> store_pb2.RetainResponse:
        """See store.proto."""
        return self._lookups.retain(request, caller_of_call())

    async def Drain(  # type: ignore[override]
        self, request: store_pb2.DrainRequest, context: Context
    ) -> None:
        """See store.proto."""
        await self._operators.drain(request, caller_of_call(), context.write)

    def _left(self) -> Left:
        stats = self._store.stats()
        return Left(
            self._engine.pending_bytes, stats.leases, stats.reservations, self._streams.running
        )

    def _dropped(self, peer_id: str) -> None:
        self._owners.forget_owner(peer_id)


def _shorten_unbound(request: store_pb2.LookupRequest | store_pb2.RenewRequest) -> None:
    """Nothing ends a lease without a session when its client dies: it gets less time."""
    if not request.session and UNBOUND_LEASE_MS_MAX < request.lease_ms <= LEASE_S_MAX * 1000:
        request.lease_ms = UNBOUND_LEASE_MS_MAX

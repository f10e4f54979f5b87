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
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dualpath.kvstore.service.attachments import Attachments, Plane
from dualpath.kvstore.service.auth import Auth
from dualpath.kvstore.service.byte_streams import ByteStreams
from dualpath.kvstore.service.deliver import DeliveryEngine, DeliveryStats
from dualpath.kvstore.service.deliver_calls import DeliverCalls
from dualpath.kvstore.service.lease_owners import LeaseOwners
from dualpath.kvstore.service.lookup_calls import LookupCalls
from dualpath.kvstore.service.ticket import TicketMint
from dualpath.kvstore.service.write_calls import WriteCalls
from dualpath.kvstore.store_api import Store, StoreStats, Tier
from dualpath.proto.status import Context
from dualpath.proto.v1 import common_pb2, store_pb2, store_pb2_grpc

DUTY_PERIOD_S = 0.5

_log = logging.getLogger(__name__)


def package_version() -> str:
    """The installed version, "0" in a tree that is not installed."""
    try:
        return version("dualpath")
    except PackageNotFoundError:
        return "0"


class StoreService(store_pb2_grpc.StoreServicer):
    """See the module docstring. Made inside of the running loop."""

    def __init__(
        self,
        *,
        store: Store,
        planes: Mapping[str, Plane],
        engine: DeliveryEngine,
        auth: Auth,
        executor: Executor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server_id = secrets.token_hex(8)
        self._store = store
        self._engine = engine
        self._auth = auth
        self._executor = executor
        self._clock = clock
        self._started_at = clock()
        self._owners = LeaseOwners()
        mint = TicketMint()
        self.attachments = Attachments(store, planes, executor, self._dropped)
        self._lookups = LookupCalls(
            store=store,
            attachments=self.attachments,
            owners=self._owners,
            mint=mint,
            executor=executor,
            clock=clock,
        )
        self._writes = WriteCalls(self.attachments, executor, clock)
        self._delivers = DeliverCalls(
            attachments=self.attachments,
            engine=engine,
            owners=self._owners,
            mint=mint,
            server_id=self.server_id,
            clock=clock,
        )
        self._streams = ByteStreams(store, executor, clock)

    async def do_duties(self) -> None:
        """Run the periodic duties until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(DUTY_PERIOD_S)
            try:
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
        await self._delivers.stop()

    def delivery_stats(self) -> DeliveryStats:
        """Counters of deliveries, for metrics."""
        return self._engine.stats()

    def store_stats(self) -> StoreStats:
        """Counters of the store, for metrics."""
        return self._store.stats()

    async def OpenNamespace(
        self, request: store_pb2.OpenNamespaceRequest, context: Context
    ) -> store_pb2.OpenNamespaceResponse:
        """See store.proto."""
        return await self._lookups.open_namespace(request)

    async def Lookup(
        self, request: store_pb2.LookupRequest, context: Context
    ) -> store_pb2.LookupResponse:
        """See store.proto."""
        return self._lookups.lookup(request, self._auth.caller(context))

    async def Renew(
        self, request: store_pb2.RenewRequest, context: Context
    ) -> store_pb2.RenewResponse:
        """See store.proto."""
        return self._lookups.renew(request, self._auth.caller(context))

    async def Release(
        self, request: store_pb2.ReleaseRequest, context: Context
    ) -> store_pb2.ReleaseResponse:
        """See store.proto."""
        return self._lookups.release(request, self._auth.caller(context))

    async def Delegate(
        self, request: store_pb2.DelegateRequest, context: Context
    ) -> store_pb2.DelegateResponse:
        """See store.proto."""
        return self._lookups.delegate(request, self._auth.caller(context))

    async def ReportCorrupt(
        self, request: store_pb2.ReportCorruptRequest, context: Context
    ) -> store_pb2.ReportCorruptResponse:
        """See store.proto."""
        return await self._lookups.report_corrupt(request, self._auth.caller(context))

    async def Reserve(
        self, request: store_pb2.ReserveRequest, context: Context
    ) -> store_pb2.ReserveResponse:
        """See store.proto."""
        return await self._writes.reserve(request, self._auth.caller(context))

    async def Seal(
        self, request: store_pb2.SealRequest, context: Context
    ) -> store_pb2.SealResponse:
        """See store.proto."""
        return await self._writes.seal(request, self._auth.caller(context))

    async def Abandon(
        self, request: store_pb2.AbandonRequest, context: Context
    ) -> store_pb2.AbandonResponse:
        """See store.proto."""
        return await self._writes.abandon(request, self._auth.caller(context))

    async def Attach(
        self, request: common_pb2.AttachRequest, context: Context
    ) -> common_pb2.AttachResponse:
        """See store.proto."""
        return self._delivers.attach(request, self._auth.caller(context))

    async def Deliver(
        self, request_iterator: Any, context: Context
    ) -> AsyncIterator[store_pb2.DeliverResponse]:
        """See store.proto."""
        caller = self._auth.caller(context)
        async for response in self._delivers.deliver(request_iterator, caller, context):
            yield response

    # The stubs know only handlers that yield; gRPC takes one that writes as well.
    async def Read(  # type: ignore[override]
        self, request: store_pb2.ReadRequest, context: Context
    ) -> None:
        """See store.proto."""
        await self._streams.read(request, context.write)

    async def Write(self, request_iterator: Any, context: Context) -> store_pb2.WriteResponse:
        """See store.proto."""
        return await self._streams.write(request_iterator)

    async def Stats(
        self, request: store_pb2.StatsRequest, context: Context
    ) -> store_pb2.StatsResponse:
        """See store.proto."""
        stats, deliveries = self._store.stats(), self._engine.stats()
        return store_pb2.StatsResponse(
            server_id=self.server_id,
            version=package_version(),
            uptime_s=self._clock() - self._started_at,
            blocks=stats.blocks,
            namespaces=stats.namespaces,
            leases=stats.leases,
            reservations=stats.reservations,
            tier=[_tier_message(stats, tier) for tier in Tier],
            lookups=stats.lookups,
            hit_blocks=stats.hit_blocks,
            missed_blocks=stats.missed_blocks,
            misses={reason.value: count for reason, count in stats.misses.items()},
            corrupt_blocks=stats.corrupt_blocks,
            device=stats.device,
            delivered_bytes=deliveries.delivered_bytes,
            queue_bytes=deliveries.pending_bytes,
            attachments=len(self.attachments),
        )

    def _dropped(self, peer_id: str) -> None:
        self._owners.forget_owner(peer_id)


def _tier_message(stats: StoreStats, tier: Tier) -> store_pb2.TierStats:
    return store_pb2.TierStats(
        tier=tier.value,
        capacity_bytes=stats.capacity_bytes.get(tier, 0),
        used_bytes=stats.used_bytes.get(tier, 0),
        read_bytes=stats.read_bytes.get(tier, 0),
        written_bytes=stats.written_bytes.get(tier, 0),
        evicted_blocks=stats.evicted_blocks.get(tier, 0),
    )

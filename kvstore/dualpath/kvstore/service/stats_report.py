"""The answer of Stats: counters of the store, the deliveries, and what each principal uses.

Owns no counter: it reads those of others. Who uses the daemon is shown only to callers with the
right `admin` in all namespaces.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from dualpath.kvstore.block_events import BlockEvents
from dualpath.kvstore.service.attachments import Attachments
from dualpath.kvstore.service.auth import Caller
from dualpath.kvstore.service.deliver import DeliveryEngine
from dualpath.kvstore.service.gate import Gate, Held
from dualpath.kvstore.service.principal import Rights
from dualpath.kvstore.service.quotas import Usage
from dualpath.kvstore.store_api import Store, StoreStats, Tier
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import InvalidRequest


def package_version() -> str:
    """The installed version, "0" in a tree that is not installed."""
    try:
        return version("dualpath")
    except PackageNotFoundError:
        return "0"


class StatsReport:
    """See the module docstring."""

    def __init__(
        self,
        server_id: str,
        store: Store,
        engine: DeliveryEngine,
        events: BlockEvents,
        attachments: Attachments,
        gate: Gate,
        clock: Callable[[], float],
    ) -> None:
        self._server_id = server_id
        self._store = store
        self._engine = engine
        self._events = events
        self._attachments = attachments
        self._gate = gate
        self._clock = clock
        self._started_at = clock()

    def stats(self, caller: Caller) -> store_pb2.StatsResponse:
        """What this caller may see."""
        stats, deliveries = self._store.stats(), self._engine.stats()
        gate = self._gate
        answer = store_pb2.StatsResponse(
            server_id=self._server_id,
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
            attachments=len(self._attachments),
            state=gate.readiness.phase.value,
            troubles=gate.readiness.troubles(),
            tier_hit_blocks={tier.value: count for tier, count in stats.tier_hit_blocks.items()},
            quota_refusals=gate.quotas.refusals,
            last_sequence=self._events.last,
        )
        if gate.access.may_everywhere(caller.principal, Rights.ADMIN):
            self._add_usage(answer)
        return answer

    def _add_usage(self, answer: store_pb2.StatsResponse) -> None:
        principals, namespaces = self._gate.quotas.snapshot()
        held = self._attachments.held()
        delivered = self._engine.stats().principal_bytes
        for principal, usage in principals.items():
            message = _usage_message(principal, usage)
            holds = held.get(principal, Held())
            message.delivered_bytes = delivered.get(principal, 0)
            message.reservations = holds.reservations
            message.reserved_bytes = holds.reserved_bytes
            message.attachments = holds.attachments
            message.queue_bytes = self._engine.principal_pending_bytes(principal)
            answer.principal.append(message)
        for namespace_id, usage in namespaces.items():
            message = _usage_message(namespace_id.hex(), usage)
            try:
                namespace = self._store.namespace(namespace_id)
            except InvalidRequest:
                continue
            message.model, message.tenant = namespace.model, namespace.tenant
            answer.namespace.append(message)


def _usage_message(name: str, usage: Usage) -> store_pb2.UsageStats:
    return store_pb2.UsageStats(
        name=name,
        calls=usage.calls,
        lookups=usage.lookups,
        hit_blocks=usage.hit_blocks,
        missed_blocks=usage.missed_blocks,
        sealed_blocks=usage.sealed_blocks,
        refusals=usage.refusals,
        calls_active=usage.calls_active,
        leases=usage.leases,
    )


def _tier_message(stats: StoreStats, tier: Tier) -> store_pb2.TierStats:
    return store_pb2.TierStats(
        tier=tier.value,
        capacity_bytes=stats.capacity_bytes.get(tier, 0),
        used_bytes=stats.used_bytes.get(tier, 0),
        read_bytes=stats.read_bytes.get(tier, 0),
        written_bytes=stats.written_bytes.get(tier, 0),
        evicted_blocks=stats.evicted_blocks.get(tier, 0),
    )

"""Prometheus metrics of a daemon: read from the store and the delivery engine at each scrape.

Owns the names. Nothing is counted twice: the collector holds no counter of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dualpath.kvstore.service.deliver import DeliveryStats
from dualpath.kvstore.service.histogram import Buckets
from dualpath.kvstore.service.key_reload import KeyReload
from dualpath.kvstore.service.quotas import Usage
from dualpath.kvstore.service.readiness import Readiness
from dualpath.kvstore.store_api import MissReason, StoreStats, Tier
from dualpath.transfer.lane import Lane
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class ServiceSnapshot:
    """What a scrape shows of a daemon that has started."""

    store: StoreStats
    deliveries: DeliveryStats
    attachments: int
    principals: Mapping[str, Usage]
    quota_refusals: int
    last_sequence: int


class StoreCollector(Collector):
    """Turns snapshots into metric families. `snapshot` gives None while the daemon starts."""

    def __init__(
        self,
        readiness: Readiness,
        reload: KeyReload,
        snapshot: Callable[[], ServiceSnapshot | None],
    ) -> None:
        self._readiness = readiness
        self._reload = reload
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        yield from _state(self._readiness, self._reload)
        snapshot = self._snapshot()
        if snapshot is None:
            return
        stats = snapshot.store
        yield from _gauges(stats)
        yield _gauge("dualpath_attachments", "Joined receivers", snapshot.attachments)
        yield from _counters(stats)
        yield from _by_tier(stats)
        yield from _delivery(snapshot.deliveries)
        yield from _principals(snapshot)
        yield CounterMetricFamily("dualpath_events", "Events of blocks", snapshot.last_sequence)
        yield _info("dualpath_device", "How the SSD tier is read", {"device": stats.device})
        yield _info("dualpath_arena", "What memory the DRAM tier has", {"memory": stats.arena})


def _info(name: str, text: str, labels: dict[str, str]) -> Metric:
    info = InfoMetricFamily(name, text)
    info.add_metric([], labels)
    return info


def _state(readiness: Readiness, reload: KeyReload) -> Iterator[Metric]:
    yield _gauge("dualpath_ready", "Whether new work is taken", readiness.ready().good)
    degraded = GaugeMetricFamily("dualpath_degraded", "What is degraded", labels=["reason"])
    for word in readiness.troubles():
        degraded.add_metric([word], 1)
    yield degraded
    yield CounterMetricFamily("dualpath_key_reloads", "Files of keys read again", reload.reloads)
    yield CounterMetricFamily(
        "dualpath_key_reload_failures", "Files of keys that could not be used", reload.failures
    )


def _principals(snapshot: ServiceSnapshot) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "dualpath_quota_refusals", "Calls over a principal's limit", snapshot.quota_refusals
    )
    calls = CounterMetricFamily("dualpath_principal_calls", "Calls", labels=["principal"])
    refused = CounterMetricFamily(
        "dualpath_principal_refusals", "Calls over the limit", labels=["principal"]
    )
    for principal, usage in snapshot.principals.items():
        calls.add_metric([principal], usage.calls)
        refused.add_metric([principal], usage.refusals)
    yield calls
    yield refused
    landed = CounterMetricFamily(
        "dualpath_principal_delivered_bytes", "Payload that landed", labels=["principal"]
    )
    for principal, count in snapshot.deliveries.principal_bytes.items():
        landed.add_metric([principal], count)
    yield landed


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)


def _gauges(stats: StoreStats) -> Iterator[Metric]:
    yield _gauge("dualpath_blocks", "Sealed blocks", stats.blocks)
    yield _gauge("dualpath_namespaces", "Known namespaces", stats.namespaces)
    yield _gauge("dualpath_leases", "Live leases", stats.leases)
    yield _gauge("dualpath_reservations", "Blocks being written", stats.reservations)
    yield _gauge("dualpath_mapped_leases", "Leases whose blocks are mapped", stats.mapped_leases)
    yield _gauge("dualpath_mapped_bytes", "DRAM that is mapped by readers", stats.mapped_bytes)


def _counters(stats: StoreStats) -> Iterator[Metric]:
    yield CounterMetricFamily("dualpath_lookups", "Look-ups", stats.lookups)
    yield CounterMetricFamily("dualpath_hit_blocks", "Blocks found", stats.hit_blocks)
    yield CounterMetricFamily("dualpath_missed_blocks", "Blocks missed", stats.missed_blocks)
    yield CounterMetricFamily("dualpath_corrupt_blocks", "Blocks dropped", stats.corrupt_blocks)
    yield CounterMetricFamily(
        "dualpath_lost_write_backs", "Blocks lost before the disk", stats.lost_write_backs
    )
    for name, text, value in (
        ("dualpath_scrubbed_bytes", "Bytes read again", stats.scrubbed_bytes),
        ("dualpath_scrubbed_blocks", "Blocks read again", stats.scrubbed_blocks),
        ("dualpath_scrub_bad_blocks", "Blocks found bad", stats.scrub_bad_blocks),
        ("dualpath_scrub_passes", "Times all blocks were read", stats.scrub_passes),
    ):
        yield CounterMetricFamily(name, text, value)
    misses = CounterMetricFamily("dualpath_misses", "Why prefixes ended", labels=["reason"])
    for reason in MissReason:
        if reason is not MissReason.NONE:
            misses.add_metric([reason.value], stats.misses.get(reason, 0))
    yield misses


def _by_tier(stats: StoreStats) -> Iterator[Metric]:
    for name, text, values in (
        ("dualpath_tier_capacity_bytes", "Capacity", stats.capacity_bytes),
        ("dualpath_tier_used_bytes", "Bytes in use", stats.used_bytes),
    ):
        gauge = GaugeMetricFamily(name, text, labels=["tier"])
        for tier in Tier:
            gauge.add_metric([tier.value], values.get(tier, 0))
        yield gauge
    for name, text, values in (
        ("dualpath_tier_read_bytes", "Payload read", stats.read_bytes),
        ("dualpath_tier_written_bytes", "Payload written", stats.written_bytes),
        ("dualpath_tier_evicted_blocks", "Blocks evicted", stats.evicted_blocks),
        ("dualpath_tier_hit_blocks", "Blocks found", stats.tier_hit_blocks),
    ):
        counter = CounterMetricFamily(name, text, labels=["tier"])
        for tier in Tier:
            counter.add_metric([tier.value], values.get(tier, 0))
        yield counter


def _delivery(stats: DeliveryStats) -> Iterator[Metric]:
    yield CounterMetricFamily("dualpath_delivered_bytes", "Landed payload", stats.delivered_bytes)
    yield CounterMetricFamily("dualpath_delivered_chunks", "Landed chunks", stats.delivered_chunks)
    yield _gauge("dualpath_delivery_queue_bytes", "Granted, not landed", stats.pending_bytes)
    failures = CounterMetricFamily(
        "dualpath_delivery_failures", "Chunks not delivered", labels=["reason"]
    )
    for failure, count in stats.failures.items():
        failures.add_metric([failure.name.lower()], count)
    yield failures
    peers = CounterMetricFamily(
        "dualpath_peer_delivered_bytes", "Landed payload by receiver", labels=["peer"]
    )
    for peer, nbytes in stats.peer_bytes.items():
        peers.add_metric([peer], nbytes)
    yield peers
    for name, text, values in (
        ("dualpath_lane_delivered_bytes", "Landed payload by lane", stats.lane_bytes),
        ("dualpath_lane_delivered_chunks", "Landed chunks by lane", stats.lane_chunks),
    ):
        lanes = CounterMetricFamily(name, text, labels=["lane"])
        for lane in Lane:
            lanes.add_metric([lane.name.lower()], values.get(lane, 0))
        yield lanes
    yield _histogram("dualpath_read_seconds", "Time to read a chunk", stats.read_s)
    yield _histogram(
        "dualpath_delivery_seconds", "Time to read a chunk and have it land", stats.delivery_s
    )


def _histogram(name: str, text: str, values: Buckets) -> Metric:
    buckets, total = values
    family = HistogramMetricFamily(name, text)
    family.add_metric([], buckets, total)
    return family

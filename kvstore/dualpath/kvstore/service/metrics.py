"""Prometheus metrics of a daemon: read from the store and the delivery engine at each scrape.

Owns the names. Nothing is counted twice: the collector holds no counter of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Thread
from wsgiref.simple_server import WSGIServer

from dualpath.kvstore.service.config import split_address
from dualpath.kvstore.service.deliver import DeliveryStats
from dualpath.kvstore.store_api import StoreStats, Tier
from dualpath.transfer.errors import Unavailable
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

JOIN_S_MAX = 5.0


class StoreCollector(Collector):
    """Turns snapshots into metric families."""

    def __init__(
        self,
        store: Callable[[], StoreStats],
        deliveries: Callable[[], DeliveryStats],
        attachments: Callable[[], int],
    ) -> None:
        self._store = store
        self._deliveries = deliveries
        self._attachments = attachments

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        stats = self._store()
        yield from _gauges(stats)
        yield _gauge("dualpath_attachments", "Joined receivers", self._attachments())
        yield from _counters(stats)
        yield from _by_tier(stats)
        yield from _delivery(self._deliveries())
        info = InfoMetricFamily("dualpath_device", "How the SSD tier is read")
        info.add_metric([], {"device": stats.device})
        yield info


class MetricsServer:
    """The HTTP endpoint of a registry, on its own thread."""

    def __init__(self, address: str, collector: Collector) -> None:
        """Listen at host:port. Raises Unavailable if the port is in use."""
        host, port = split_address(address, "metrics_listen")
        registry = CollectorRegistry()
        registry.register(collector)
        try:
            self._server: WSGIServer
            self._thread: Thread
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise Unavailable(
                f"metrics_listen: {address}: {error.strerror or error}; choose another port",
                reason="address_in_use",
            ) from error
        bracketed = f"[{host}]" if ":" in host else host
        self.address = f"{bracketed}:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(JOIN_S_MAX)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)


def _gauges(stats: StoreStats) -> Iterator[Metric]:
    yield _gauge("dualpath_blocks", "Sealed blocks", stats.blocks)
    yield _gauge("dualpath_namespaces", "Known namespaces", stats.namespaces)
    yield _gauge("dualpath_leases", "Live leases", stats.leases)
    yield _gauge("dualpath_reservations", "Blocks being written", stats.reservations)


def _counters(stats: StoreStats) -> Iterator[Metric]:
    yield CounterMetricFamily("dualpath_lookups", "Look-ups", stats.lookups)
    yield CounterMetricFamily("dualpath_hit_blocks", "Blocks found", stats.hit_blocks)
    yield CounterMetricFamily("dualpath_missed_blocks", "Blocks missed", stats.missed_blocks)
    yield CounterMetricFamily("dualpath_corrupt_blocks", "Blocks dropped", stats.corrupt_blocks)
    misses = CounterMetricFamily("dualpath_misses", "Why prefixes ended", labels=["reason"])
    for reason, count in stats.misses.items():
        misses.add_metric([reason.value], count)
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

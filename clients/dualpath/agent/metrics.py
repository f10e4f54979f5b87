"""Prometheus metrics of an agent: read from its parts at each scrape.

Owns the names. A scrape runs on the endpoint's thread and gets its snapshot from the loop. Labels
that peers choose are bounded: what comes beyond 256 names counts as `other`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dualpath.agent.agent import Agent
from dualpath.kvstore.service.histogram import Buckets, Histogram
from dualpath.kvstore.service.named_counts import bounded
from dualpath.proto.v1 import agent_pb2
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSnapshot:
    """Counters of one moment. `peer_bytes` are by link, then by peer; times are in seconds."""

    stats: agent_pb2.AgentStatsResponse
    requested_blocks: int
    loaded_blocks: int
    saved_blocks: int
    tier_blocks: Mapping[str, int]
    misses: Mapping[str, int]
    link_chunks: Mapping[str, int]
    peer_bytes: Mapping[str, Mapping[str, int]]
    load_s: Buckets
    chunk_s: Mapping[str, Buckets]


def snapshot_of(agent: Agent) -> AgentSnapshot:
    """Call it in the agent's loop."""
    loader, storage = agent.loader, tuple(agent.storage.values())
    received: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    for network in storage:
        received.update(network.received_by_peer())
        sent.update(network.sent_by_peer())
    paths = {name for loads in agent.loads.values() for name in loads.routes.names}
    return AgentSnapshot(
        stats=agent.stats(),
        requested_blocks=loader.requested_blocks,
        loaded_blocks=loader.loaded_blocks,
        saved_blocks=agent.saver.saved_blocks,
        tier_blocks=dict(loader.tier_blocks),
        misses=loader.misses + agent.receiver.misses,
        link_chunks={
            "storage": sum(network.received_chunks for network in storage),
            "compute_in": agent.compute.received_chunks,
            "compute_out": agent.relay.relayed_chunks,
        },
        peer_bytes={
            "storage": received,
            "storage_out": sent,
            "mount": {
                daemon.address: daemon.mounted.read_bytes
                for daemon in agent.daemons.values()
                if daemon.mounted is not None
            },
            "compute_in": agent.compute.received_by_peer(),
            "compute_out": agent.compute.sent_by_peer(),
        },
        load_s=loader.load_s.snapshot(),
        chunk_s={
            path: Histogram.merged(
                loads.counts.chunk_s[path] for loads in agent.loads.values()
            ).snapshot()
            for path in sorted(paths)
        },
    )


class AgentCollector(Collector):
    """Turns snapshots into metric families."""

    def __init__(self, snapshot: Callable[[], AgentSnapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        now = self._snapshot()
        stats = now.stats
        yield from _gauges(stats)
        for name, text, value in (
            ("dualpath_agent_loads", "Loads that ended", stats.loads_done),
            ("dualpath_agent_relayed_bytes", "Payload relayed", stats.relayed_bytes),
            ("dualpath_agent_retained_bytes", "Relayed and kept", stats.holdings.retained_bytes),
            ("dualpath_agent_served_bytes", "Relayed unread", stats.holdings.served_bytes),
            ("dualpath_agent_handed_off_bytes", "Handed off", stats.holdings.handed_off_bytes),
            ("dualpath_agent_taken_bytes", "Brought by hand-offs", stats.holdings.taken_bytes),
            ("dualpath_agent_received_bytes", "Received", stats.holdings.received_bytes),
            ("dualpath_agent_requested_blocks", "Blocks asked for", now.requested_blocks),
            ("dualpath_agent_loaded_blocks", "Blocks loaded and verified", now.loaded_blocks),
            ("dualpath_agent_saved_blocks", "Blocks sealed by saves", now.saved_blocks),
        ):
            yield CounterMetricFamily(name, text, value)
        for name, text, label, values in (
            ("dualpath_agent_events", "Failures and fallbacks", "reason", stats.events),
            ("dualpath_agent_misses", "Why prefixes ended", "reason", now.misses),
            ("dualpath_agent_tier_blocks", "Loaded blocks by tier", "tier", now.tier_blocks),
        ):
            yield _labelled(name, text, label, values)
        yield from _links(now)
        yield from _paths(stats)
        yield _histogram(
            "dualpath_agent_load_seconds",
            "Time from a load's request to its result",
            {"": now.load_s},
        )
        yield _histogram(
            "dualpath_agent_chunk_seconds",
            "Time from a chunk's grant to its verdict",
            now.chunk_s,
            "path",
        )


def _gauges(stats: agent_pb2.AgentStatsResponse) -> Iterator[Metric]:
    for name, text, value in (
        ("dualpath_agent_loads_active", "Loads under way", stats.loads_active),
        ("dualpath_agent_read_queue_bytes", "Waiting storage reads", stats.read_queue_bytes),
        (
            "dualpath_agent_staging_capacity_bytes",
            "Staging memory of the relay",
            stats.staging_capacity_bytes,
        ),
        ("dualpath_agent_staging_used_bytes", "Staging in use", stats.staging_used_bytes),
        (
            "dualpath_agent_holdings_capacity_bytes",
            "Memory for held chunks",
            stats.holdings.capacity_bytes,
        ),
        ("dualpath_agent_holdings_used_bytes", "Holdings in use", stats.holdings.used_bytes),
        (
            "dualpath_agent_holdings_pinned_bytes",
            "Held for running requests",
            stats.holdings.pinned_bytes,
        ),
        (
            "dualpath_agent_hand_offs_active",
            "Hand-offs under way",
            stats.holdings.hand_offs_active,
        ),
        ("dualpath_agent_receives_active", "Receives under way", stats.holdings.receives_active),
        ("dualpath_agent_holdings_requests", "Requests that hold", stats.holdings.requests),
    ):
        yield GaugeMetricFamily(name, text, value)


def _labelled(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in bounded(values).items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, text: str, values: Mapping[str, Buckets], label: str = "") -> Metric:
    family = HistogramMetricFamily(name, text, labels=[label] if label else [])
    for key, (buckets, total) in values.items():
        family.add_metric([key] if label else [], buckets, total)
    return family


def _links(now: AgentSnapshot) -> Iterator[Metric]:
    links = now.stats.link
    yield _labelled(
        "dualpath_agent_link_bytes",
        "Payload over a link",
        "link",
        {link.link: link.bytes for link in links},
    )
    yield _labelled("dualpath_agent_link_chunks", "Chunks over a link", "link", now.link_chunks)
    rate = GaugeMetricFamily(
        "dualpath_agent_link_rate_bytes_per_second", "Estimated rate", labels=["link"]
    )
    for link in links:
        rate.add_metric([link.link], link.rate_bytes_per_s)
    yield rate
    peers = CounterMetricFamily(
        "dualpath_agent_peer_bytes", "Payload exchanged with a peer", labels=["link", "peer"]
    )
    for name, values in now.peer_bytes.items():
        for peer, nbytes in bounded(values).items():
            peers.add_metric([name, peer], nbytes)
    yield peers


def _paths(stats: agent_pb2.AgentStatsResponse) -> Iterator[Metric]:
    for name, text, values in (
        ("dualpath_agent_path_bytes", "Verified payload by path", "bytes"),
        ("dualpath_agent_path_chunks", "Verified chunks by path", "chunks"),
    ):
        yield _labelled(
            name, text, "path", {path.path: getattr(path, values) for path in stats.path}
        )
    for name, text, values in (
        ("dualpath_agent_path_up", "Whether a path is used", "up"),
        ("dualpath_agent_path_queue_bytes", "Waiting at its storage link", "queue_bytes"),
        ("dualpath_agent_path_rate_bytes_per_second", "Estimated rate", "rate_bytes_per_s"),
    ):
        gauge = GaugeMetricFamily(name, text, labels=["path"])
        for path in stats.path:
            gauge.add_metric([path.path], float(getattr(path, values)))
        yield gauge

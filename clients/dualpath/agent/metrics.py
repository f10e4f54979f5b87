"""Prometheus metrics of an agent: read from its parts at each scrape.

Owns the names. A scrape runs on the endpoint's thread and gets its snapshot from the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from dualpath.agent.histogram import Histogram
from dualpath.proto.v1 import agent_pb2
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Snapshot = Callable[[], agent_pb2.AgentStatsResponse]


class AgentCollector(Collector):
    """Turns the agent's counters into metric families. `misses` are by reason."""

    def __init__(
        self,
        snapshot: Snapshot,
        misses: Callable[[], Mapping[str, int]],
        blocks: Callable[[], tuple[int, int, int]],
        load_s: Histogram,
    ) -> None:
        self._snapshot = snapshot
        self._misses = misses
        self._blocks = blocks
        self._load_s = load_s

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        stats = self._snapshot()
        yield from _gauges(stats)
        yield CounterMetricFamily("dualpath_agent_loads", "Loads that ended", stats.loads_done)
        yield CounterMetricFamily(
            "dualpath_agent_relayed_bytes", "Payload relayed to others", stats.relayed_bytes
        )
        requested, loaded, saved = self._blocks()
        yield CounterMetricFamily(
            "dualpath_agent_requested_blocks", "Blocks that loads asked for", requested
        )
        yield CounterMetricFamily(
            "dualpath_agent_loaded_blocks", "Blocks loaded and verified", loaded
        )
        yield CounterMetricFamily("dualpath_agent_saved_blocks", "Blocks sealed by saves", saved)
        yield _labelled("dualpath_agent_events", "Failures and fallbacks", "reason", stats.events)
        yield _labelled("dualpath_agent_misses", "Why prefixes ended", "reason", self._misses())
        yield from _links(stats)
        yield from _paths(stats)
        histogram = HistogramMetricFamily(
            "dualpath_agent_load_seconds", "Time from a load's request to its result"
        )
        buckets, total = self._load_s.snapshot()
        histogram.add_metric([], buckets, total)
        yield histogram


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
    ):
        yield GaugeMetricFamily(name, text, value)


def _labelled(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _links(stats: agent_pb2.AgentStatsResponse) -> Iterator[Metric]:
    yield _labelled(
        "dualpath_agent_link_bytes",
        "Payload over a link",
        "link",
        {link.link: link.bytes for link in stats.link},
    )
    rate = GaugeMetricFamily(
        "dualpath_agent_link_rate_bytes_per_second", "Estimated rate", labels=["link"]
    )
    for link in stats.link:
        rate.add_metric([link.link], link.rate_bytes_per_s)
    yield rate


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

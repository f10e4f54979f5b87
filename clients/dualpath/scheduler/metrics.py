"""Prometheus metrics of the scheduler: read from the hub at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dualpath.kvstore.service.histogram import Buckets
from dualpath.scheduler.hub import Hub
from dualpath.scheduler.scheduler import SchedulerCounts
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """Counts of one moment."""

    counts: SchedulerCounts
    leaders: int
    front_ends: int
    events: Mapping[str, int]
    fetch_s: Buckets


def snapshot_of(hub: Hub) -> SchedulerSnapshot:
    """Call it in the hub's loop."""
    return SchedulerSnapshot(
        hub.scheduler.counts(),
        len(hub.leaders),
        len(hub.front_ends),
        dict(hub.events),
        hub.fetch_s.snapshot(),
    )


class SchedulerCollector(Collector):
    """Turns snapshots into metric families."""

    def __init__(self, snapshot: Callable[[], SchedulerSnapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        now = self._snapshot()
        for name, text, value in (
            ("dualpath_scheduler_engines", "Registered engines", now.counts.engines),
            ("dualpath_scheduler_waiting", "Requests that lack an engine", now.counts.waiting),
            ("dualpath_scheduler_assigned", "Requests with engines", now.counts.assigned),
            ("dualpath_scheduler_leaders", "Groups with a leader", now.leaders),
            ("dualpath_scheduler_front_ends", "Streams of front ends", now.front_ends),
        ):
            yield GaugeMetricFamily(name, text, value)
        events = CounterMetricFamily(
            "dualpath_scheduler_events", "What happened, by word", labels=["event"]
        )
        for event, count in now.events.items():
            events.add_metric([event], count)
        yield events
        buckets, total = now.fetch_s
        histogram = HistogramMetricFamily(
            "dualpath_scheduler_fetch_seconds", "Time of one report and fetch"
        )
        histogram.add_metric([], buckets, total)
        yield histogram

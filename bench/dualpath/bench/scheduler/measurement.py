"""The measurement: the scheduler's calls under a virtual cluster, timed one by one.

Times are those of the clock, and those of the thread on the processor: where others use the
machine, the first grow and the second hardly do.

Counted is the time of all calls of the scheduler, from the submission of a request to its end,
reports included. Not counted: what the cluster does, and how messages travel.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter, thread_time

from dualpath.bench.scheduler.shape import Shape
from dualpath.bench.scheduler.virtual_cluster import VirtualCluster
from dualpath.scheduler.policies import named_policies
from dualpath.scheduler.scheduler import Scheduler
from dualpath.scheduler.settings import COLLECT_AFTER, PolicySettings, SchedulerLimits

Moment = tuple[float, float]
"""Seconds of the clock, and of this thread on the processor."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run gave. Times in seconds of this machine, on one core; `scheduler_s` by the clock,
    `processor_s` of the thread."""

    policy: str
    shape: Shape
    requests: int
    scheduler_s: float
    processor_s: float
    requests_per_s: float
    requests_per_processor_s: float
    fetches: int
    fetch_s_p50: float
    fetch_s_p99: float
    fetch_s_max: float
    fetch_processor_s_p99: float
    assignments_per_fetch: float
    waiting_at_end: int
    seconds_by_call: dict[str, float]


class Stopwatch:
    """Adds up the time of calls by name, by the clock and of the thread on the processor."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor_s = 0.0
        self.fetches: list[Moment] = []

    def add(self, name: str, began: Moment) -> Moment:
        """A call that began then has ended; what it took."""
        spent, processor_s = perf_counter() - began[0], thread_time() - began[1]
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self.processor_s += processor_s
        return spent, processor_s


def _now() -> Moment:
    return perf_counter(), thread_time()


def measure(shape: Shape, policy: str, said: Callable[[str], None]) -> Figures:
    """Run the load through a scheduler of `policy`. Raises InvalidRequest for one that is none.

    It begins to count once requests end as often as they come. A fetch is the report and the fetch
    that go together, as a leader sends them.
    """
    cluster = VirtualCluster(shape)
    settings = PolicySettings(alpha_tokens=shape.alpha_tokens, beta_tokens=shape.beta_tokens)
    scheduler = Scheduler(
        named_policies(policy, settings),
        SchedulerLimits(
            engines_max=shape.engines,
            groups_max=len(cluster.groups),
            nodes_max=shape.prefill + shape.decode,
        ),
    )
    for engine in cluster.engines:
        scheduler.register(engine)
    warm_s = shape.prefill_s + shape.decode_s
    steps_warm = int(warm_s / shape.interval_s) + 2
    steps = max(1, int(shape.seconds / shape.interval_s))
    said(f"{policy}: {shape.engines} engines, {len(cluster.groups)} groups: warming up")
    with _collecting_as_the_service():
        watch, assigned = _run(scheduler, cluster, shape, steps_warm, steps, said)
    fetches = sorted(spent for spent, _ in watch.fetches)
    busy = sorted(processor_s for _, processor_s in watch.fetches)
    p99 = min(len(fetches) - 1, int(len(fetches) * 0.99))
    spent = sum(watch.seconds.values())
    return Figures(
        policy=policy,
        shape=shape,
        requests=assigned,
        scheduler_s=spent,
        processor_s=watch.processor_s,
        requests_per_s=assigned / spent,
        requests_per_processor_s=assigned / watch.processor_s,
        fetches=len(fetches),
        fetch_s_p50=fetches[len(fetches) // 2],
        fetch_s_p99=fetches[p99],
        fetch_s_max=fetches[-1],
        fetch_processor_s_p99=busy[p99],
        assignments_per_fetch=assigned / len(fetches),
        waiting_at_end=scheduler.counts().waiting,
        seconds_by_call=watch.seconds,
    )


def _run(
    scheduler: Scheduler,
    cluster: VirtualCluster,
    shape: Shape,
    steps_warm: int,
    steps: int,
    said: Callable[[str], None],
) -> tuple[Stopwatch, int]:
    """All intervals; the times and the assignments of those after the warm ones."""
    watch, assigned, owed = Stopwatch(), 0, 0.0
    for step in range(steps_warm + steps):
        if step == steps_warm:
            said(f"measuring {steps} rounds of fetches")
            watch, assigned = Stopwatch(), 0
        owed += shape.rate * shape.interval_s
        count = int(owed)
        owed -= count
        assigned += _step(scheduler, cluster, watch, step * shape.interval_s, count)
    return watch, assigned


@contextlib.contextmanager
def _collecting_as_the_service() -> Iterator[None]:
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _step(
    scheduler: Scheduler, cluster: VirtualCluster, watch: Stopwatch, now: float, count: int
) -> int:
    """One interval: ends, arrivals, then each group reports and fetches; assignments made."""
    prefilled, finished = cluster.advance(now)
    arrivals = cluster.arrivals(count)
    began = _now()
    for request_id in prefilled:
        scheduler.prefilled(request_id)
    for request_id in finished:
        scheduler.finished(request_id)
    watch.add("ends", began)
    began = _now()
    for request in arrivals:
        scheduler.submit(request, now)
    watch.add("submit", began)
    made = 0
    for group in cluster.groups:
        report = cluster.report(group)
        began = _now()
        scheduler.report(report)
        reported = watch.add("report", began)
        began = _now()
        assignments = scheduler.fetch(group, now)
        fetched = watch.add("fetch", began)
        watch.fetches.append((reported[0] + fetched[0], reported[1] + fetched[1]))
        cluster.take(assignments, now)
        made += len(assignments)
    return made

"""Links and queues of the simulator agree with queueing theory within 1 %."""

from __future__ import annotations

import random

import pytest
from dualpath.bench.simulate.cluster import Cluster, ClusterSpec
from dualpath.bench.simulate.constant_rates import ConstantRates
from dualpath.bench.simulate.decode_engine import DecodeEngine
from dualpath.bench.simulate.flow_network import FlowNetwork
from dualpath.bench.simulate.job import Job
from dualpath.bench.simulate.link import Link
from dualpath.bench.simulate.read_queue import ReadQueue
from dualpath.bench.simulate.virtual_clock import VirtualClock

RATE = 1e9


def mean_sojourn(load: float, sizes: list[float], seed: int) -> float:
    """Poisson arrivals of flows at one link; mean seconds from begin to end of a flow."""
    clock = VirtualClock()
    net = FlowNetwork(clock)
    route = net.route([Link("l", RATE)])
    rng = random.Random(seed)
    mean_size = sum(sizes) / len(sizes)
    begun: dict[int, float] = {}
    total = 0.0

    def end(index: int) -> None:
        nonlocal total
        total += clock.now - begun.pop(index)

    def begin(index: int) -> None:
        begun[index] = clock.now
        net.start(route, sizes[index], end, index)
        if index + 1 < len(sizes):
            clock.after(rng.expovariate(load * RATE / mean_size), begin, index + 1)

    clock.at(0.0, begin, 0)
    assert clock.run()
    assert not begun
    return total / len(sizes)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_processor_sharing_takes_the_service_time_over_what_is_free(load: float) -> None:
    """M/G/1-PS: E[T] = E[S] / (1 - load), whatever the distribution (Kleinrock, vol. 2, 4.4)."""
    rng = random.Random(7)
    sizes = [RATE * (0.2 if rng.random() < 0.75 else 3.4) for _ in range(300_000)]
    mean_s = sum(sizes) / len(sizes) / RATE
    assert mean_sojourn(load, sizes, seed=11) == pytest.approx(mean_s / (1 - load), rel=0.01)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_reads_one_at_a_time_wait_as_long_as_in_a_queue_of_constant_service(load: float) -> None:
    """M/D/1: E[wait] = load E[S] / (2 (1 - load)) (Kleinrock, vol. 1, 5.6)."""
    clock = VirtualClock()
    cluster = Cluster(ClusterSpec(prefill_nodes=1, decode_nodes=1), 1, window_s=1e4)
    node = cluster.prefill_nodes[0]
    service_s, count = 0.02, 300_000
    size = service_s * node.snic_in.capacity
    rng = random.Random(5)
    waited = 0.0

    def ended(job: Job) -> None:
        nonlocal waited
        waited += job.read_begin_s - job.arrive_s

    queue = ReadQueue(clock, FlowNetwork(clock), node, 1, ended)

    def arrive(index: int) -> None:
        queue.tokens += 1
        queue.add(Job(index, 0, 1, 0, 0, clock.now), size, 1)
        if index + 1 < count:
            clock.after(rng.expovariate(load / service_s), arrive, index + 1)

    clock.at(0.0, arrive, 0)
    assert clock.run()
    assert queue.tokens == 0
    assert waited / count == pytest.approx(load * service_s / 2 / (1 - load), rel=0.01)


def test_a_decode_engine_makes_a_token_a_step_for_each_sequence() -> None:
    clock = VirtualClock()
    cluster = Cluster(ClusterSpec(prefill_nodes=1, decode_nodes=1), 1, window_s=1.0)
    ends: dict[int, float] = {}

    def end(job: Job) -> None:
        ends[job.agent] = clock.now

    engine = DecodeEngine(clock, cluster.decode_engines[0], ConstantRates(step_s=0.5), end)

    def join(agent: int) -> None:
        job = Job(agent, 0, 640, 64, 11, clock.now)
        engine.promise(job)
        engine.join(job)

    # The second comes within a step, and begins with the next.
    clock.at(0.0, join, 0)
    clock.at(0.6, join, 1)
    assert clock.run()
    assert ends == pytest.approx({0: 5.0, 1: 6.0})
    assert (engine.requests, engine.tokens, engine.reserved) == (0, 0, 0)

"""Links and queues of the simulator agree with queueing theory within 1 %."""

from __future__ import annotations

import random

import pytest
from dualpath.bench.simulate.flow_network import FlowNetwork
from dualpath.bench.simulate.link import Link
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

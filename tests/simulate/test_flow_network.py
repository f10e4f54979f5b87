"""Flows share links as max-min fairness says, all bytes arrive, and no link is over capacity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from dualpath.bench.simulate.flow_network import FlowNetwork
from dualpath.bench.simulate.link import Link, RateMeter
from dualpath.bench.simulate.route import Route
from dualpath.bench.simulate.virtual_clock import TimeTravel, VirtualClock
from dualpath.bench.simulate.water_filling import fill, joined
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given, settings
from hypothesis import strategies as st


@dataclass(frozen=True)
class PlannedFlow:
    """What a property test starts: when, over which links, how much, how."""

    begin_s: float
    links: tuple[int, ...]
    size: float
    cap: float
    weight: float


def rates_by_filling_everything(flows: list[PlannedFlow], capacities: list[float]) -> list[float]:
    """The reference: raise all rates together, hold those that meet a full link or their cap."""
    rates = [0.0] * len(flows)
    growing = set(range(len(flows)))
    while growing:
        levels = [flows[i].cap / flows[i].weight for i in growing]
        for link, capacity in enumerate(capacities):
            on = [i for i, flow in enumerate(flows) if link in flow.links]
            weight = sum(flows[i].weight for i in on if i in growing)
            if weight:
                left = capacity - sum(rates[i] for i in on if i not in growing)
                levels.append(max(0.0, left) / weight)
        level = min(levels)
        for i in growing:
            rates[i] = level * flows[i].weight
        load = [
            sum(rates[i] for i, flow in enumerate(flows) if link in flow.links)
            for link in range(len(capacities))
        ]
        growing -= {
            i
            for i in growing
            if rates[i] >= flows[i].cap * (1 - 1e-12)
            or any(load[link] >= capacities[link] * (1 - 1e-12) for link in flows[i].links)
        }
    return rates


def ends_by_filling_everything(capacities: list[float], flows: list[PlannedFlow]) -> list[float]:
    """The reference: at every change, all rates anew over all links."""
    left = [flow.size for flow in flows]
    ends = [math.inf] * len(flows)
    order = sorted(range(len(flows)), key=lambda i: flows[i].begin_s)
    running: list[int] = []
    now = 0.0
    while order or running:
        rates = rates_by_filling_everything([flows[i] for i in running], capacities)
        until = flows[order[0]].begin_s if order else math.inf
        ending = min(
            (now + left[i] / r for i, r in zip(running, rates, strict=True)), default=math.inf
        )
        step_to = min(until, ending)
        for i, rate in zip(running, rates, strict=True):
            left[i] -= rate * (step_to - now)
        now = step_to
        for i in list(running):
            if left[i] <= 1e-9 * flows[i].size:
                ends[i] = now
                running.remove(i)
        while order and flows[order[0]].begin_s <= now:
            running.append(order.pop(0))
    return ends


capacities_of_links = st.lists(st.floats(1.0, 100.0), min_size=1, max_size=5)


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[float], list[PlannedFlow], bool]:
    capacities = draw(capacities_of_links)
    crossed = st.sets(st.integers(0, len(capacities) - 1), min_size=1, max_size=3)
    flow = st.builds(
        PlannedFlow,
        st.floats(0.0, 20.0),
        crossed.map(lambda links: tuple(sorted(links))),
        st.floats(0.1, 300.0),
        st.one_of(st.just(math.inf), st.floats(0.5, 60.0)),
        st.sampled_from([0.5, 1.0, 2.0]),
    )
    return capacities, draw(st.lists(flow, min_size=1, max_size=14)), draw(st.booleans())


@settings(max_examples=300, deadline=None)
@given(networks())
def test_every_flow_ends_when_filling_all_links_at_every_change_says(
    network: tuple[list[float], list[PlannedFlow], bool],
) -> None:
    capacities, flows, gathered = network
    clock = VirtualClock()
    links = [Link(f"l{i}", capacity) for i, capacity in enumerate(capacities)]
    net = FlowNetwork(clock)
    routes: dict[tuple[int, ...], Route] = {}
    ends = [math.inf] * len(flows)

    def end(index: int) -> None:
        ends[index] = clock.now

    def begin(index: int) -> None:
        flow = flows[index]
        crossed = [links[i] for i in flow.links]
        if gathered and flow.cap == math.inf:
            route = routes.get(flow.links) or net.route(crossed)
            routes[flow.links] = route
            net.start(route, flow.size, end, index, flow.weight)
        else:
            net.start_capped(crossed, flow.size, flow.cap, end, index, flow.weight)

    for index, flow in enumerate(flows):
        clock.at(flow.begin_s, begin, index)
    assert clock.run(events_max=100_000)
    expected = ends_by_filling_everything(capacities, flows)
    assert ends == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert net.bytes_ended == pytest.approx(net.bytes_started)
    for link in links:
        crossing = sum(flow.size for flow in flows if links.index(link) in flow.links)
        assert link.carried == pytest.approx(crossing)
        assert link.carried <= link.capacity * max(ends) * (1 + 1e-9)
        assert not link.routes
        assert not link.tight


@settings(max_examples=200, deadline=None)
@given(networks())
def test_filling_fills_a_link_for_every_route_that_is_held_back(
    network: tuple[list[float], list[PlannedFlow], bool],
) -> None:
    capacities, flows, _ = network
    links = [Link(f"l{i}", capacity) for i, capacity in enumerate(capacities)]
    routes = []
    for flow in flows:
        route = Route(tuple([links[i] for i in flow.links]), flow.cap, None)
        route.weight = flow.weight
        routes.append(route)
        for link in route.links:
            link.routes[route] = None
            link.bound += route.cap
            link.tight = link.bound > link.most
    for link in links:
        if link.mark != 1:
            fill(*joined(link, 1))
    load = {link: sum(route.share for route in link.routes) for link in links}
    for link in links:
        assert load[link] <= link.capacity * (1 + 1e-9)
    for route in routes:
        if route.share >= route.cap * (1 - 1e-9):
            continue
        # Its bottleneck: a full link on which no other gets more for its weight.
        assert any(
            load[link] >= link.capacity * (1 - 1e-9)
            and all(
                other.share / other.weight <= route.share / route.weight * (1 + 1e-9)
                for other in link.routes
            )
            for link in route.links
        )
    expected = rates_by_filling_everything(flows, capacities)
    assert [route.share for route in routes] == pytest.approx(expected, rel=1e-9)


def test_one_link_serves_its_bytes_at_its_rate_however_many_flows_share_it() -> None:
    clock = VirtualClock()
    meter = RateMeter(1.0)
    net = FlowNetwork(clock)
    route = net.route([Link("snic", 50e9), Link("dram", 500e9)], meter)
    done: list[float] = []
    sizes = [1e9 * (i % 7 + 1) for i in range(1_000)]
    for size in sizes:
        net.start(route, size, lambda _: done.append(clock.now))
    assert clock.run()
    assert len(done) == len(sizes)
    assert max(done) == pytest.approx(sum(sizes) / 50e9, rel=1e-9)
    assert sum(meter.windows) == pytest.approx(sum(sizes))
    assert max(meter.windows) <= 50e9 * (1 + 1e-9)


def test_a_flow_without_bytes_ends_at_once_but_after_the_call_that_started_it() -> None:
    clock = VirtualClock()
    net = FlowNetwork(clock)
    ended: list[float] = []
    net.start(net.route([Link("l", 1.0)]), 0, lambda _: ended.append(clock.now))
    assert ended == []
    clock.run()
    assert ended == [0.0]


def test_what_cannot_be_a_flow_is_refused() -> None:
    net = FlowNetwork(VirtualClock())
    link = Link("l", 1.0)
    route = net.route([link])
    for size, weight in ((-1.0, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0)):
        with pytest.raises(InvalidRequest, match="a flow of"):
            net.start(route, size, lambda _: None, weight=weight)
    with pytest.raises(InvalidRequest, match="each once"):
        net.route([link, link])
    with pytest.raises(InvalidRequest, match="no bound"):
        net.route([Link("wide", math.inf)])
    with pytest.raises(InvalidRequest, match="above 0"):
        Link("none", 0.0)
    with pytest.raises(InvalidRequest, match="above 0"):
        RateMeter(0.0)


def test_an_event_in_the_past_is_time_travel() -> None:
    clock = VirtualClock()
    clock.at(5.0, lambda _: clock.at(1.0, lambda _: None))
    with pytest.raises(TimeTravel, match=r"1\.0 s was made at 5\.0 s"):
        clock.run()
    with pytest.raises(InvalidRequest, match="never happen"):
        clock.at(math.inf, lambda _: None)


def test_events_of_one_time_run_in_the_order_of_their_making() -> None:
    clock = VirtualClock()
    seen: list[object] = []
    for name in "abc":
        clock.at(1.0, seen.append, name)
    assert not clock.run(events_max=2)
    assert seen == ["a", "b"]
    assert not clock.run(until_s=0.5) or clock.now == 1.0
    assert clock.run()
    assert seen == ["a", "b", "c"]

"""Flows over shared links: processor sharing, weighted max-min fair, under a virtual clock.

A `Route` is the set of links that its flows cross. Flows of one route share what it gets in
proportion to their weights, so a route keeps one number, the bytes served for a unit of weight,
and a heap of the numbers at which its flows end; a flow that comes or goes costs the logarithm of
their count. What a route can get at most (its `bound`) is the least of its links' capacities and
of its cap. While the bounds of all routes on a link fit, the link cannot bind, and rates are the
bounds: nothing else changes when a flow comes or goes. Where they do not fit the link is `tight`,
and the routes that are joined by tight links, and only those, get their rates anew
(`water_filling`), once for all that happens at one instant. Both give the same rates as filling
all links at once: `tests/simulate` compares.

Guarantees, checked at each change: no tight link carries more than its capacity, and no flow ends
before its bytes are served.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import Any

from dualpath.bench.simulate.link import OVER_CAPACITY, Link, RateMeter
from dualpath.bench.simulate.virtual_clock import Handler, VirtualClock
from dualpath.bench.simulate.water_filling import Demand, max_min_rates
from dualpath.transfer.errors import InvalidRequest

END_TOLERANCE_S = 1e-9
"""A flow that would end within this time has ended: below what the sums can tell apart."""


class Route:
    """Flows that cross the same links. Made by `FlowNetwork.route`, or for one capped flow."""

    __slots__ = (
        "bound",
        "cap",
        "links",
        "members",
        "meter",
        "planned_s",
        "rate",
        "served",
        "since_s",
        "weight",
    )

    def __init__(self, links: tuple[Link, ...], cap: float, meter: RateMeter | None) -> None:
        self.links = links
        self.cap = min(cap, *(link.capacity for link in links))
        self.meter = meter
        self.bound = 0.0
        self.weight = 0.0
        self.rate = 0.0
        self.served = 0.0
        self.since_s = 0.0
        self.planned_s = math.inf
        # (served at its end, order, weight, size, what to call then, with what)
        self.members: list[tuple[float, int, float, float, Handler, Any]] = []

    def advance(self, now_s: float) -> None:
        """Serve its flows up to the present at the rate they have."""
        since = self.since_s
        if now_s > since:
            if self.weight > 0.0:
                self.served += self.rate * (now_s - since) / self.weight
                if self.meter is not None:
                    self.meter.add(since, now_s, self.rate)
            self.since_s = now_s


class FlowNetwork:
    """`start` begins a flow; its handler is called when the last byte has arrived."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._made = 0
        self._unsettled: dict[Link, None] = {}
        self.flows = 0
        self.bytes_started = 0.0
        self.bytes_ended = 0.0

    def route(self, links: Iterable[Link], meter: RateMeter | None = None) -> Route:
        """A lasting route for many flows. Raises InvalidRequest if no link bounds it."""
        return self._new_route(links, math.inf, meter)

    def start(
        self,
        route: Route,
        size_bytes: float,
        done: Handler,
        argument: object = None,
        weight: float = 1.0,
    ) -> None:
        """Begin a flow on a route. Raises InvalidRequest for a size or weight that is none."""
        if not (0 <= size_bytes < math.inf and 0 < weight < math.inf):
            raise InvalidRequest(f"a flow of {size_bytes!r} bytes with weight {weight!r}")
        self.flows += 1
        self.bytes_started += size_bytes
        if size_bytes == 0:
            self._clock.at(self._clock.now, done, argument)
            return
        now = self._clock.now
        route.advance(now)
        first = not route.members
        if first:
            # Counted anew for each busy period: small numbers keep their digits.
            route.served = 0.0
        self._made += 1
        end = route.served + size_bytes / weight
        heapq.heappush(route.members, (end, self._made, weight, size_bytes, done, argument))
        route.weight += weight
        if first:
            self._rebound(route, route.cap)
        else:
            self._reweigh(route)
        self._plan(route)

    def start_capped(
        self,
        links: Iterable[Link],
        size_bytes: float,
        cap: float,
        done: Handler,
        argument: object = None,
        weight: float = 1.0,
    ) -> None:
        """Begin a flow that takes at most `cap` bytes a second: its sender or its receiver is no
        faster. Raises as `start` and `route`."""
        self.start(self._new_route(links, cap, None), size_bytes, done, argument, weight)

    def _new_route(self, links: Iterable[Link], cap: float, meter: RateMeter | None) -> Route:
        crossed = tuple(links)
        if not crossed or len(set(crossed)) != len(crossed):
            raise InvalidRequest(f"a route over {crossed}: it takes links, each once")
        route = Route(crossed, cap, meter)
        if not 0 < route.cap < math.inf:
            raise InvalidRequest(f"a route over {crossed} with cap {cap!r} has no bound above 0")
        return route

    def _rebound(self, route: Route, bound: float) -> None:
        """A route begins or ends to be busy."""
        by = bound - route.bound
        route.bound = bound
        free = True
        for link in route.links:
            if link.widen(route, by):
                free = False
                self._unsettle(link)
        if free:
            route.rate = bound

    def _reweigh(self, route: Route) -> None:
        """The weight of a route that stays busy has changed."""
        for link in route.links:
            if link.tight:
                self._unsettle(link)

    def _unsettle(self, link: Link) -> None:
        """What crosses this link gets its rate anew before time goes on: once for all that happens
        at this instant."""
        if not self._unsettled:
            self._clock.at(self._clock.now, self._settle)
        self._unsettled[link] = None

    def _settle(self, _: object) -> None:
        unsettled, self._unsettled = self._unsettled, {}
        settled: set[Link] = set()
        for seed in unsettled:
            if seed not in settled:
                links, routes = joined(seed)
                settled.update(links)
                self._share(links, routes)

    def _share(self, links: list[Link], routes: list[Route]) -> None:
        """New rates for routes that tight links join."""
        numbers = {link: number for number, link in enumerate(links) if link.tight}
        demands = [
            Demand(
                tuple([numbers[link] for link in route.links if link in numbers]),
                route.weight,
                route.cap,
            )
            for route in routes
        ]
        capacities = [link.capacity for link in links]
        now = self._clock.now
        for route, rate in zip(routes, max_min_rates(demands, capacities), strict=True):
            if rate != route.rate:
                route.advance(now)
                route.rate = rate
                self._plan(route)
        for link in numbers:
            total = sum([route.rate for route in link.routes])
            assert total <= link.capacity * (1 + OVER_CAPACITY), f"{link} carries {total}"

    def _plan(self, route: Route) -> None:
        """Look at the route when its first flow ends. A look that is planned too early is made
        again then; only one that would come too late is planned anew."""
        if not route.members or route.rate <= 0.0:
            return
        left = route.members[0][0] - route.served
        due = route.since_s + max(0.0, left) * route.weight / route.rate
        if due < route.planned_s:
            route.planned_s = due
            self._clock.at(due, self._look, (route, due))

    def _look(self, planned: tuple[Route, float]) -> None:
        route, due = planned
        if due != route.planned_s:
            return
        route.planned_s = math.inf
        now = self._clock.now
        route.advance(now)
        members = route.members
        if not members:
            return
        reach = route.served + END_TOLERANCE_S * route.rate / route.weight
        ended = []
        while members and members[0][0] <= reach:
            ended.append(heapq.heappop(members))
        if ended:
            self._end(route, ended)
        self._plan(route)
        for _, _, _, _, done, argument in ended:
            done(argument)

    def _end(
        self, route: Route, ended: list[tuple[float, int, float, float, Handler, Any]]
    ) -> None:
        for _, _, weight, size, _, _ in ended:
            route.weight -= weight
            self.bytes_ended += size
            for link in route.links:
                link.carried += size
        if not route.members:
            route.weight = 0.0
            self._rebound(route, 0.0)
            route.rate = 0.0
        else:
            self._reweigh(route)


def joined(seed: Link) -> tuple[list[Link], list[Route]]:
    """`seed` and the links that tight links join to it, with the busy routes on them, in an order
    that depends on the run alone."""
    links = [seed]
    seen = {seed}
    routes: dict[Route, None] = {}
    for link in links:
        for route in link.routes:
            if route not in routes:
                routes[route] = None
                for other in route.links:
                    if other.tight and other not in seen:
                        seen.add(other)
                        links.append(other)
    return links, list(routes)

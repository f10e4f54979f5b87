"""Flows over shared links: processor sharing, weighted max-min fair, under a virtual clock.

A `Route` is the set of links that its flows cross. What a route can get at most (its `bound`) is
the least of its links' capacities and of its cap. While the bounds of all routes on a link fit, the
link cannot bind, and rates are the bounds: nothing else changes when a flow comes or goes. Where
they do not fit the link is `tight`, and the routes that are joined by tight links, and only those,
get their rates anew (`water_filling`), once for all that happens at one instant. Both give the same
rates as filling all links at once: `tests/simulate` compares.

Guarantees, checked at each change: no link carries more than its capacity, and no flow ends before
its bytes are served.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

from dualpath.bench.simulate.link import Link, RateMeter
from dualpath.bench.simulate.route import Member, Route
from dualpath.bench.simulate.virtual_clock import Handler, VirtualClock
from dualpath.bench.simulate.water_filling import fill, joined
from dualpath.transfer.errors import InvalidRequest

END_TOLERANCE_S = 1e-9
"""A flow that would end within this time has ended: below what the sums can tell apart."""


class FlowNetwork:
    """`start` begins a flow; its handler is called when the last byte has arrived."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._made = 0
        self._settled = 0
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
        members = route.members
        self._made += 1
        if members:
            route.advance(self._clock.now)
            end = route.served + size_bytes / weight
            heapq.heappush(members, (end, self._made, weight, size_bytes, done, argument))
            route.weight += weight
            self._reweigh(route)
        else:
            # Counted anew for each busy period: small numbers keep their digits.
            route.since_s = self._clock.now
            route.served = 0.0
            members.append((size_bytes / weight, self._made, weight, size_bytes, done, argument))
            route.weight = weight
            self._rebound(route, route.cap)
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
        """A route begins or ends to be busy. While the bounds of all routes on a link fit, it
        cannot bind."""
        by = bound - route.bound
        route.bound = bound
        free = True
        for link in route.links:
            routes = link.routes
            if bound:
                routes[route] = None
            else:
                del routes[route]
            # Summed anew where it matters, so that rounding does not pile up.
            total = link.bound = link.bound + by if routes else 0.0
            tight = total > link.most
            if tight or link.tight:
                link.tight = tight
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
        """New rates for the routes that tight links join to those that have changed."""
        unsettled, self._unsettled = self._unsettled, {}
        mark = self._settled = self._settled + 1
        now = self._clock.now
        for seed in unsettled:
            if seed.mark == mark:
                continue
            links, routes = joined(seed, mark)
            fill(links, routes)
            for route in routes:
                if route.share != route.rate:
                    route.advance(now)
                    route.rate = route.share
                    self._plan(route)

    def _plan(self, route: Route) -> None:
        """Look at the route when its first flow ends. A look that is planned too early is made
        again then; only one that would come too late is planned anew."""
        rate = route.rate
        if rate <= 0.0:
            return
        left = route.members[0][0] - route.served
        due = route.since_s
        if left > 0.0:
            due += left * route.weight / rate
        if due < route.planned_s:
            route.planned_s = due
            self._clock.at(due, self._look, (route, due))

    def _look(self, planned: tuple[Route, float]) -> None:
        route, due = planned
        if due != route.planned_s:
            return
        route.planned_s = math.inf
        members = route.members
        if not members:
            return
        route.advance(self._clock.now)
        reach = route.served + END_TOLERANCE_S * route.rate / route.weight
        if members[0][0] > reach:
            self._plan(route)
            return
        ended = [heapq.heappop(members)]
        while members and members[0][0] <= reach:
            ended.append(heapq.heappop(members))
        self._end(route, ended)
        for _, _, _, _, done, argument in ended:
            done(argument)

    def _end(self, route: Route, ended: list[Member]) -> None:
        """Flows leave a route, all their bytes served."""
        size = ended[0][3] if len(ended) == 1 else sum([member[3] for member in ended])
        self.bytes_ended += size
        for link in route.links:
            link.carried += size
        if route.members:
            route.weight -= sum([member[2] for member in ended])
            self._reweigh(route)
            self._plan(route)
        else:
            route.weight = 0.0
            self._rebound(route, 0.0)
            route.rate = 0.0

"""Weighted max-min fair rates of routes over links that may bind, in place.

All rates grow in proportion to the weights until a link is full or a route's cap is met; those that
are held then keep their rate, the others grow on (progressive filling: Bertsekas and Gallager,
"Data Networks", 6.5.2). Holding a rate at the lowest level never lowers another link's level, so a
heap of levels, looked at again when they come to its top, finds the lowest one.

Guarantees that what a tight link gives out is never more than its capacity.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dualpath.bench.simulate.link import OVER_CAPACITY, Link

if TYPE_CHECKING:
    from dualpath.bench.simulate.route import Route

LEVEL_TOLERANCE = 1e-12
"""Caps within this share of the lowest level are held together with it."""
GROWING = -1.0
"""The share of a route whose rate is not held yet."""


def joined(seed: Link, mark: int) -> tuple[list[Link], list[Route]]:
    """`seed` and the links that tight links join to it, with the busy routes on them, in an order
    that depends on the run alone. `mark` is what links and routes found before under the same mark
    are passed over by."""
    seed.mark = mark
    links = [seed]
    routes: list[Route] = []
    for link in links:
        for route in link.routes:
            if route.mark != mark:
                route.mark = mark
                routes.append(route)
                for other in route.links:
                    if other.tight and other.mark != mark:
                        other.mark = mark
                        links.append(other)
    return links, routes


def fill(links: Sequence[Link], routes: Sequence[Route]) -> None:
    """Set `share`, bytes a second, of routes: all those that cross the tight ones of `links`."""
    levels: list[tuple[float, int, Link]] = []
    for number, link in enumerate(links):
        if link.tight:
            weight = 0.0
            for route in link.routes:
                weight += route.weight
            link.left = link.capacity
            link.weight = weight
            link.growing = len(link.routes)
            levels.append((link.capacity / weight, number, link))
    if not levels or len(routes) == 1:
        for route in routes:
            route.share = route.cap
        return
    heapq.heapify(levels)
    caps: list[tuple[float, int, Route]] = []
    for number, route in enumerate(routes):
        route.share = GROWING
        caps.append((route.cap / route.weight, number, route))
    # Caps are met in the order of their levels.
    caps.sort()
    for bound, _, route in caps:
        while route.share == GROWING:
            tightest, lowest = _lowest(levels)
            if bound <= lowest * (1 + LEVEL_TOLERANCE) or tightest is None:
                _hold(route, route.cap)
            else:
                for other in tightest.routes:
                    if other.share == GROWING:
                        _hold(other, lowest * other.weight)


def _lowest(levels: list[tuple[float, int, Link]]) -> tuple[Link | None, float]:
    """The link that is full first, and at which rate for a unit of weight."""
    while levels:
        level, number, link = levels[0]
        if not link.growing:
            heapq.heappop(levels)
            continue
        current = link.left / link.weight
        if current <= level:
            return link, current
        heapq.heapreplace(levels, (current, number, link))
    return None, math.inf


def _hold(route: Route, rate: float) -> None:
    route.share = rate
    weight = route.weight
    for link in route.links:
        if link.tight:
            left = link.left - rate
            if left < 0.0:
                assert left >= -OVER_CAPACITY * link.capacity, f"{link} carries {-left} too much"
                left = 0.0
            link.left = left
            link.weight -= weight
            link.growing -= 1

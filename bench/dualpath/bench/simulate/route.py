"""A route: the flows that cross the same links, which share what the route gets by their weights.

It keeps one number, the bytes served for a unit of weight, and a heap of the numbers at which its
flows end, so that a flow that comes or goes costs the logarithm of their count.
"""

from __future__ import annotations

import math
from typing import Any

from dualpath.bench.simulate.link import Link, RateMeter
from dualpath.bench.simulate.virtual_clock import Handler

Member = tuple[float, int, float, float, Handler, Any]
"""A flow: served at its end, order, weight, size, what to call then, with what."""


class Route:
    """Made by `FlowNetwork.route`, or for one capped flow. `cap` is the most that it can get, the
    least of its links' capacities and of its flow's own; `bound` is `cap` while it has flows, else
    0; `share` and `mark` are where `water_filling` stands."""

    __slots__ = (
        "bound",
        "cap",
        "links",
        "mark",
        "members",
        "meter",
        "planned_s",
        "rate",
        "served",
        "share",
        "since_s",
        "weight",
    )

    def __init__(self, links: tuple[Link, ...], cap: float, meter: RateMeter | None) -> None:
        cap = min(cap, *[link.capacity for link in links])
        self.links = links
        self.cap = cap
        self.meter = meter
        self.bound = 0.0
        self.weight = 0.0
        self.rate = 0.0
        self.served = 0.0
        self.since_s = 0.0
        self.share = 0.0
        self.mark = 0
        self.planned_s = math.inf
        self.members: list[Member] = []

    def advance(self, now_s: float) -> None:
        """Serve its flows up to the present at the rate they have."""
        since = self.since_s
        if now_s > since:
            if self.weight > 0.0:
                self.served += self.rate * (now_s - since) / self.weight
                if self.meter is not None:
                    self.meter.add(since, now_s, self.rate)
            self.since_s = now_s

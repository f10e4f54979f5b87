"""Weighted max-min fair rates: who gets how much of links that several share. Pure.

A demand crosses some links, has a weight and a bound of its own. All rates grow in proportion to
the weights until a link is full or a bound is met; those that are held then keep their rate, the
others grow on (progressive filling: Bertsekas and Gallager, "Data Networks", 6.5.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL_TOLERANCE = 1e-12
"""Links and bounds within this share of the lowest level are held together with it."""


@dataclass(frozen=True, slots=True)
class Demand:
    """`links` are keys of the capacities; `bound` is in bytes a second (inf: none)."""

    links: tuple[int, ...]
    weight: float
    bound: float = math.inf


def max_min_rates(demands: Sequence[Demand], capacities: Mapping[int, float]) -> list[float]:
    """The rate of each demand, bytes a second. Links that are not in `capacities` never bind; a
    demand without bound and without such a link raises ValueError."""
    rates = [0.0] * len(demands)
    left = dict(capacities)
    weights = dict.fromkeys(capacities, 0.0)
    members: dict[int, list[int]] = {link: [] for link in capacities}
    for index, demand in enumerate(demands):
        for link in demand.links:
            if link in weights:
                weights[link] += demand.weight
                members[link].append(index)
    active = set(range(len(demands)))
    while active:
        levels = {link: left[link] / weights[link] for link in left if weights[link] > 0}
        level = min(levels.values(), default=math.inf)
        level = min(level, *(demands[i].bound / demands[i].weight for i in active))
        if level == math.inf:
            raise ValueError("a demand without a bound crosses no link with a capacity")
        reach = level * (1 + LEVEL_TOLERANCE)
        held = {i for i in active if demands[i].bound <= reach * demands[i].weight}
        for link, height in levels.items():
            if height <= reach:
                held.update(i for i in members[link] if i in active)
        active -= held
        for i in sorted(held):
            demand = demands[i]
            rates[i] = min(demand.bound, level * demand.weight)
            for link in demand.links:
                if link in left:
                    left[link] = max(0.0, left[link] - rates[i])
                    weights[link] -= demand.weight
        for link, indices in members.items():
            if not any(i in active for i in indices):
                weights[link] = 0.0
    return rates

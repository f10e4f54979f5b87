"""Weighted max-min fair rates: who gets how much of links that several share. Pure.

A demand crosses some links, has a weight and a bound of its own. All rates grow in proportion to
the weights until a link is full or a bound is met; those that are held then keep their rate, the
others grow on (progressive filling: Bertsekas and Gallager, "Data Networks", 6.5.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LEVEL_TOLERANCE = 1e-12
"""Links and bounds within this share of the lowest level are held together with it."""


class Demand(NamedTuple):
    """`links` are indices of the capacities; `bound` is in bytes a second (inf: none)."""

    links: tuple[int, ...]
    weight: float
    bound: float = math.inf


def max_min_rates(demands: Sequence[Demand], capacities: Sequence[float]) -> list[float]:
    """The rate of each demand, bytes a second. A demand without a bound and without a link with a
    capacity raises ValueError."""
    rates = [0.0] * len(demands)
    left = list(capacities)
    weights = [0.0] * len(left)
    members: list[list[int]] = [[] for _ in left]
    growing: list[tuple[float, int]] = []
    for index, (links, weight, bound) in enumerate(demands):
        growing.append((bound / weight, index))
        for link in links:
            weights[link] += weight
            members[link].append(index)
    # Bounds are met in the order of their levels. A demand that is held at a bound below a link's
    # level leaves more for the others on it, so all bounds up to the lowest level hold at once.
    growing.sort()
    held = bytearray(len(demands))
    open_links = [link for link, indices in enumerate(members) if indices]
    counts = [len(indices) for indices in members]
    at = 0

    def hold(index: int, rate: float) -> None:
        held[index] = 1
        rates[index] = rate
        links, weight, _ = demands[index]
        for link in links:
            left[link] = max(0.0, left[link] - rate)
            counts[link] -= 1
            # Rounding must not leave the weight of nobody.
            weights[link] = weights[link] - weight if counts[link] else 0.0

    while at < len(growing):
        lowest, tightest = math.inf, -1
        for link in open_links:
            if counts[link] and left[link] < lowest * weights[link]:
                lowest, tightest = left[link] / weights[link], link
        reach = lowest * (1 + LEVEL_TOLERANCE)
        bounded = False
        while at < len(growing) and growing[at][0] <= reach:
            level, index = growing[at]
            at += 1
            if not held[index]:
                if level == math.inf:
                    raise ValueError("a demand without a bound crosses no link with a capacity")
                bounded = True
                hold(index, demands[index].bound)
        if not bounded and tightest >= 0:
            for index in members[tightest]:
                if not held[index]:
                    hold(index, lowest * demands[index].weight)
        elif not bounded:
            at = len(growing)
    return rates

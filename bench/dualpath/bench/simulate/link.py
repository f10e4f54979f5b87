"""A link: capacity between two points, what crosses it, and what it has carried.

`RateMeter` cuts what a link carries into windows of time, for the balance between links.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dualpath.transfer.errors import InvalidRequest

if TYPE_CHECKING:
    from dualpath.bench.simulate.route import Route

OVER_CAPACITY = 1e-9
"""Rounding: a share of its capacity by which the sum of a link's rates may pass it."""


class Link:
    """One direction of one device. `capacity` is in bytes a second; inf never binds."""

    __slots__ = (
        "bound",
        "capacity",
        "carried",
        "growing",
        "left",
        "mark",
        "most",
        "name",
        "routes",
        "tight",
        "weight",
    )

    def __init__(self, name: str, capacity: float) -> None:
        if not capacity > 0:
            raise InvalidRequest(f"link {name}: {capacity!r} bytes a second; it must be above 0")
        self.name = name
        self.capacity = capacity
        self.carried = 0.0
        self.most = capacity * (1 + OVER_CAPACITY)
        """What the sum of bounds or rates may come to, rounding included."""
        # In the order of their coming, so that a run does not depend on addresses.
        self.routes: dict[Route, None] = {}
        self.bound = 0.0
        self.tight = False
        """Whether it may bind: the sum of its routes' bounds, `bound`, does not fit."""
        # Where `water_filling` stands.
        self.left = 0.0
        self.weight = 0.0
        self.growing = 0
        self.mark = 0

    def __repr__(self) -> str:
        return f"Link({self.name}, {self.capacity / 1e9:g} GB/s, {len(self.routes)} routes)"


class RateMeter:
    """Bytes by window of `window_s` seconds, from intervals of constant rate."""

    __slots__ = ("window_s", "windows")

    def __init__(self, window_s: float) -> None:
        if not 0 < window_s < math.inf:
            raise InvalidRequest(f"a window of {window_s!r} s; it must be above 0")
        self.window_s = window_s
        self.windows: list[float] = []

    def add(self, begin_s: float, end_s: float, rate: float) -> None:
        """`rate` bytes a second flowed from `begin_s` to `end_s`."""
        width = self.window_s
        first, last = int(begin_s / width), int(end_s / width)
        windows = self.windows
        if last >= len(windows):
            windows.extend([0.0] * (last + 1 - len(windows)))
        if first == last:
            windows[first] += (end_s - begin_s) * rate
            return
        windows[first] += ((first + 1) * width - begin_s) * rate
        for index in range(first + 1, last):
            windows[index] += width * rate
        windows[last] += (end_s - last * width) * rate

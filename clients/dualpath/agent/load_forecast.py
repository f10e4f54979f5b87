"""Which running loads cannot end by their deadlines, and how much of each still can.

Chunks go layer by layer, so a load that its deadline overtakes has the first layers of all blocks
and perhaps no block whole. One that is cut to what its paths can bring in time ends with a useful
prefix, and leaves the links to others. Owns that decision; pure, but for what it saw at its last
looks. Says nothing before the rates of all paths of a load are settled, and of a load only after it
has looked late for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from dualpath.agent.load_progress import LoadProgress
from dualpath.transfer.placement import PathView

LOOK_S = 0.05
"""Between two looks."""
LOOKS = 6
"""A load must have looked late so often in a row,"""
PERSISTS = 0.1
"""and for this part of its whole time: a short stall of a link or a machine costs no block."""
PATIENCE = 1.15
"""A load may look so much longer than its time and is left alone: rates are estimates."""
MARGIN = 0.9
"""Of the time that is left, what a load is cut to."""
LAST_S = 0.9
LAST_PART = 0.3
"""In so many last seconds, or that part of its time, a load that looks late at all is cut at the
second look: what is short then leaves no block whole."""
LAST_LOOKS = 2


class TimedLoad(Protocol):
    """What is looked at of a load."""

    @property
    def progress(self) -> LoadProgress:
        """What it still lacks."""

    @property
    def started_at(self) -> float:
        """On the clock of `now`."""

    @property
    def deadline_at(self) -> float:
        """On the clock of `now`."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A load that would take `needed_s` of the `left_s` that it has; `blocks` of it can make it."""

    load_id: str
    blocks: int
    needed_s: float
    left_s: float

    def __str__(self) -> str:
        return f"it would take {self.needed_s:.2f} s of the {self.left_s:.2f} s that are left"


@dataclass(slots=True)
class _Streak:
    """Looks in a row at which a load was late; `rate` is the best that its paths had at any."""

    since_s: float
    looks: int = 0
    rate: float = 0.0


class LoadForecast:
    """See the module docstring."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self._streaks: dict[str, _Streak] = {}

    def late(
        self,
        loads: Mapping[str, TimedLoad],
        paths_of: Callable[[str], tuple[str, ...]],
        views: Callable[[], Iterable[PathView]],
        now: float,
    ) -> list[Forecast]:
        """Those that are late, the first queued first; nothing if it has just looked. Loads are in
        the order in which they are served."""
        if now < self._next_s or not loads:
            return []
        self._next_s = now + LOOK_S
        rates = {
            view.name: view.rate_bytes_per_s
            for view in views()
            if view.up and view.settled and view.rate_bytes_per_s > 0
        }
        found = []
        streaks, self._streaks = self._streaks, {}
        ahead_bytes = 0
        for load_id, load in loads.items():
            paths = paths_of(load_id)
            left_bytes = load.progress.left_bytes
            if paths and all(path in rates for path in paths):
                rate = sum(rates[path] for path in paths)
                left_s = max(0.0, load.deadline_at - now)
                patience = 1.0 if _last(load, left_s) else PATIENCE
                if (ahead_bytes + left_bytes) / rate > patience * left_s:
                    streak = self._streaks[load_id] = streaks.get(load_id) or _Streak(now)
                    streak.looks += 1
                    streak.rate = max(streak.rate, rate)
                    forecast = _forecast(load_id, load, streak, ahead_bytes, now)
                    if forecast is not None:
                        found.append(forecast)
                        del self._streaks[load_id]
            ahead_bytes += left_bytes
        return found


def _forecast(
    load_id: str, load: TimedLoad, streak: _Streak, ahead_bytes: int, now: float
) -> Forecast | None:
    """What becomes of a load that looks late; None while that may yet pass."""
    whole_s = load.deadline_at - load.started_at
    left_s = max(0.0, load.deadline_at - now)
    if _last(load, left_s):
        if streak.looks < LAST_LOOKS:
            return None
    elif streak.looks < LOOKS or now - streak.since_s < PERSISTS * whole_s:
        return None
    needed_s = (ahead_bytes + load.progress.left_bytes) / streak.rate
    blocks = load.progress.fitting(MARGIN * left_s * streak.rate - ahead_bytes)
    if blocks >= load.progress.blocks_valid:
        return None
    return Forecast(load_id, blocks, needed_s, left_s)


def _last(load: TimedLoad, left_s: float) -> bool:
    return left_s < max(LAST_S, LAST_PART * (load.deadline_at - load.started_at))

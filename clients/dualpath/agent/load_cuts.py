"""Which running loads are to be shortened now, to how many blocks, and why.

Asks the deadline's forecast and the choice between loading and computing. Loads of which it is
not known yet what is stored of them are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from dualpath.agent.load_forecast import LoadForecast, TimedLoad
from dualpath.agent.recompute_choice import ComputableLoad, RecomputeChoice
from dualpath.transfer.placement import PathView


class RunningLoad(TimedLoad, ComputableLoad, Protocol):
    """What is looked at of a load."""

    @property
    def looking(self) -> object | None:
        """While it is only assumed what is stored."""


@dataclass(frozen=True, slots=True)
class LoadCut:
    """A load that ends before block `blocks`, for `reason` (a word of MissReason)."""

    load_id: str
    blocks: int
    reason: str
    detail: str


class LoadCuts:
    """See the module docstring."""

    def __init__(self) -> None:
        self._forecast = LoadForecast()
        self._choice = RecomputeChoice()

    def due(
        self,
        loads: Mapping[str, RunningLoad],
        paths_of: Callable[[str], tuple[str, ...]],
        views: Callable[[], Iterable[PathView]],
        now: float,
    ) -> list[LoadCut]:
        """At most one a load. Loads are in the order in which they are served."""
        found = {load_id: load for load_id, load in loads.items() if load.looking is None}
        cuts = {
            each.load_id: LoadCut(each.load_id, each.blocks, "recompute", str(each))
            for each in self._choice.slower(found, paths_of, views, now)
        }
        for each in self._forecast.late(loads, paths_of, views, now):
            sooner = cuts.get(each.load_id)
            if each.load_id in found and (sooner is None or each.blocks < sooner.blocks):
                cuts[each.load_id] = LoadCut(each.load_id, each.blocks, "deadline", str(each))
        return list(cuts.values())

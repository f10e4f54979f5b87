"""Which loads take longer than computing the same KV would, and what of each is still worth it.

An engine may say how fast it computes KV itself. What its paths would bring later than that is
better computed: such a load is refused when it begins, or cut while it runs, if its paths have
become slow. Owns that decision; pure, but for what it saw at its last looks.

A refused load tells nothing about its paths. So a refusal at once needs rates that were measured a
moment ago; otherwise the load begins, as a trial, and is judged by what comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dualpath.agent.load_progress import LoadProgress
from dualpath.transfer.placement import PathView

LOOK_S = 0.05
"""Between two looks at loads that run."""
LOOKS = 6
"""A load that runs must have looked slower so often in a row, before it is cut."""
PATIENCE = 1.15
"""Loading may look so much slower and is preferred: rates are estimates, and it leaves the
processor to others."""
TRUST_S = 5.0
"""Rates of paths that carried nothing for longer refuse nobody."""


class ComputableLoad(Protocol):
    """What is looked at of a load."""

    @property
    def progress(self) -> LoadProgress:
        """What it still lacks."""

    @property
    def recompute_block_s(self) -> float:
        """Seconds in which its engine computes a block; 0: not said."""


@dataclass(frozen=True, slots=True)
class Slower:
    """A load that would take `load_s` more, and its blocks `compute_s`; `blocks` are worth it."""

    load_id: str
    blocks: int
    load_s: float
    compute_s: float

    def __str__(self) -> str:
        return (
            f"it would take {self.load_s:.3g} s more, and computing the same {self.compute_s:.3g} s"
        )


def soonest_prefix(
    left_bytes: Sequence[float], ahead_bytes: float, bytes_per_s: float, block_s: float
) -> int:
    """How many leading blocks to load, so that all are there soonest: those by loading what they
    lack (`left_bytes` each) behind `ahead_bytes` of others, then the rest by computing, `block_s`
    seconds each. The longest such prefix, if there are several."""
    kept, gained_s, best_s = 0, 0.0, 0.0
    waited = False
    for index, left in enumerate(left_bytes):
        if left and not waited:
            gained_s -= ahead_bytes / bytes_per_s
            waited = True
        gained_s += block_s - left / bytes_per_s
        if gained_s >= best_s:
            kept, best_s = index + 1, gained_s
    return kept


class RecomputeChoice:
    """See the module docstring."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self._looks: dict[str, int] = {}
        """Of each load that runs: looks in a row at which it looked slower."""
        self._carried_s = float("-inf")

    def slower(
        self,
        loads: Mapping[str, ComputableLoad],
        paths_of: Callable[[str], tuple[str, ...]],
        views: Callable[[], Iterable[PathView]],
        now: float,
    ) -> list[Slower]:
        """Those that are to be cut now; loads that have just begun are looked at at once, the
        others now and then. Loads are in the order in which they are served."""
        if not loads:
            self._looks.clear()
            return []
        fresh = loads.keys() - self._looks.keys()
        if not fresh and now < self._next_s:
            return []
        due = now >= self._next_s
        if due:
            self._next_s = now + LOOK_S
        trusted = now - self._carried_s <= TRUST_S
        self._looks = {load_id: self._looks.get(load_id, 0) for load_id in loads}
        if any(load.recompute_block_s for load in loads.values()):
            rates = _rates(views())
            found = self._judged(loads, paths_of, rates, fresh if trusted else set(), due)
        else:
            found = []
        if len(found) < len(loads):  # somebody goes on, and so shows how fast the paths are
            self._carried_s = now
        return found

    def _judged(
        self,
        loads: Mapping[str, ComputableLoad],
        paths_of: Callable[[str], tuple[str, ...]],
        rates: Mapping[str, float],
        at_once: set[str],
        due: bool,
    ) -> list[Slower]:
        found = []
        ahead_bytes = 0.0
        for load_id, load in loads.items():
            paths, progress = paths_of(load_id), load.progress
            blocks, left_bytes = progress.blocks_valid, float(progress.left_bytes)
            block_s = load.recompute_block_s
            if block_s and paths and all(path in rates for path in paths):
                rate = sum(rates[path] for path in paths)
                lacking = progress.left_bytes_of_blocks()
                kept = soonest_prefix(lacking, ahead_bytes, rate, PATIENCE * block_s)
                self._looks[load_id] = self._looks[load_id] + due if kept < blocks else 0
                if kept < blocks and (load_id in at_once or self._looks[load_id] >= LOOKS):
                    load_s = (ahead_bytes + left_bytes) / rate
                    self._looks[load_id] = 0
                    found.append(Slower(load_id, kept, load_s, (blocks - kept) * block_s))
                    left_bytes = sum(lacking[:kept])
            ahead_bytes += left_bytes
        return found


def _rates(views: Iterable[PathView]) -> dict[str, float]:
    return {
        view.name: view.rate_bytes_per_s
        for view in views
        if view.up and view.settled and view.rate_bytes_per_s > 0
    }

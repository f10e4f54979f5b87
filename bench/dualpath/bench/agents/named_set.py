"""Sets of trajectories by the names that commands take: `agent-64k`, `agent-64k-compacted`.

The first is what the paper replays (replayed_set.py). `-compacted` and `-grown` are other readings
of the same row of its table (paper_set.py): contexts that lose part of what came before, and ones
that only grow but are stored already before the first turn.
"""

from __future__ import annotations

from dualpath.bench.agents.paper_set import (
    TRAJECTORIES,
    check_count,
    compacted_set,
    grown_set,
)
from dualpath.bench.agents.replayed_set import replayed_set
from dualpath.bench.agents.trajectory import Trajectory
from dualpath.bench.testbed.workload import Context
from dualpath.cli.config_file import nearest
from dualpath.transfer.errors import InvalidRequest

_GROWN, _COMPACTED = "-grown", "-compacted"
_SETS = {f"agent-{context.value}": context for context in Context}
SET_NAMES = tuple(f"{name}{end}" for end in ("", _COMPACTED, _GROWN) for name in _SETS)


def named_set(name: str, *, seed: int, trajectories: int = TRAJECTORIES) -> tuple[Trajectory, ...]:
    """Raises InvalidRequest for an unknown name, with the nearest."""
    context = _SETS.get(name.removesuffix(_GROWN).removesuffix(_COMPACTED))
    if context is None:
        raise InvalidRequest(f"'{name}' is not a workload{nearest(name, SET_NAMES)}")
    if name.endswith(_GROWN):
        return grown_set(context, seed=seed, trajectories=trajectories)
    if name.endswith(_COMPACTED):
        return compacted_set(context, seed=seed, trajectories=trajectories)
    check_count(trajectories)
    return replayed_set(context, seed=seed, trajectories=trajectories)

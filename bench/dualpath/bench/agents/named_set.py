"""Sets of trajectories by the names that commands take: `agent-64k`, `agent-64k-grown`.

The second is the other reading of the same row of the paper's table; see paper_set.py.
"""

from __future__ import annotations

from dualpath.bench.agents.paper_set import TRAJECTORIES, grown_set, paper_set
from dualpath.bench.agents.trajectory import Trajectory
from dualpath.bench.testbed.workload import Context
from dualpath.cli.config_file import nearest
from dualpath.transfer.errors import InvalidRequest

_GROWN = "-grown"
_SETS = {f"agent-{context.value}": context for context in Context}
SET_NAMES = (*_SETS, *(f"{name}{_GROWN}" for name in _SETS))


def named_set(name: str, *, seed: int, trajectories: int = TRAJECTORIES) -> tuple[Trajectory, ...]:
    """Raises InvalidRequest for an unknown name, with the nearest."""
    context = _SETS.get(name.removesuffix(_GROWN))
    if context is None:
        raise InvalidRequest(f"'{name}' is not a workload{nearest(name, SET_NAMES)}")
    make = grown_set if name.endswith(_GROWN) else paper_set
    return make(context, seed=seed, trajectories=trajectories)

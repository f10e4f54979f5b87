"""When agents arrive, and which trajectory each of them takes. Seeded and pure.

Agents take the trajectories of a set in turn; each time round, a set is shuffled anew.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Sequence

from dualpath.bench.agents.trajectory import AgentArrival, Trajectory
from dualpath.transfer.errors import InvalidRequest

AGENTS_MAX = 1 << 20


def offline(
    trajectories: Sequence[Trajectory], *, agents: int, seed: int
) -> tuple[AgentArrival, ...]:
    """All at once, as in the paper's offline runs. Raises InvalidRequest."""
    _check_agents(agents)
    drawn = _drawn(trajectories, random.Random(f"offline/{seed}"))
    return tuple(AgentArrival(0.0, next(drawn)) for _ in range(agents))


def poisson(
    trajectories: Sequence[Trajectory], *, agents_per_s: float, duration_s: float, seed: int
) -> tuple[AgentArrival, ...]:
    """Independent arrivals at a mean rate, until `duration_s`. Raises InvalidRequest."""
    if not math.isfinite(agents_per_s) or agents_per_s <= 0:
        raise InvalidRequest(f"agents arrive at more than 0 a second, not {agents_per_s}")
    if not math.isfinite(duration_s) or duration_s <= 0:
        raise InvalidRequest(f"arrivals last longer than 0 s, not {duration_s}")
    if agents_per_s * duration_s > AGENTS_MAX:
        raise InvalidRequest(
            f"{agents_per_s:g} agents/s for {duration_s:g} s are about "
            f"{agents_per_s * duration_s:.0f}; at most {AGENTS_MAX}"
        )
    rng = random.Random(f"poisson/{seed}")
    drawn = _drawn(trajectories, rng)
    found = []
    at_s = rng.expovariate(agents_per_s)
    while at_s < duration_s:
        found.append(AgentArrival(at_s, next(drawn)))
        at_s += rng.expovariate(agents_per_s)
    return tuple(found)


def with_tool_latency(
    agents: Sequence[AgentArrival], *, mean_s: float, seed: int
) -> tuple[AgentArrival, ...]:
    """The same agents, with an exponential time of that mean before every turn but the first, in
    place of what was there. Raises InvalidRequest."""
    if not math.isfinite(mean_s) or mean_s < 0:
        raise InvalidRequest(f"tools take 0 s or longer, not {mean_s}")
    rng = random.Random(f"tools/{seed}")
    found = []
    for agent in agents:
        first, *rest = agent.trajectory.turns
        later = (
            dataclasses.replace(turn, tool_s=rng.expovariate(1 / mean_s) if mean_s else 0.0)
            for turn in rest
        )
        turns = (dataclasses.replace(first, tool_s=0.0), *later)
        trajectory = dataclasses.replace(agent.trajectory, turns=turns)
        found.append(AgentArrival(agent.at_s, trajectory))
    return tuple(found)


def _drawn(trajectories: Sequence[Trajectory], rng: random.Random) -> Iterator[Trajectory]:
    if not trajectories:
        raise InvalidRequest("no trajectories to draw from; a set has at least one")
    while True:
        yield from rng.sample(trajectories, len(trajectories))


def _check_agents(agents: int) -> None:
    if not 1 <= agents <= AGENTS_MAX:
        raise InvalidRequest(f"there are 1..{AGENTS_MAX} agents, not {agents}")

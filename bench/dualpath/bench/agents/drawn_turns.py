"""Agents whose turns are drawn one by one from all turns of a set, contexts and all.

Every turn of the set is as frequent as in the whole, at any time of a run: a run of seconds has the
means of the whole, without the beginnings and ends of trajectories.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dualpath.bench.agents.arrivals import AGENTS_MAX
from dualpath.bench.agents.trajectory import Trajectory, Turn, TurnPrompt
from dualpath.transfer.errors import InvalidRequest

TURNS_MAX = 1 << 22


@dataclass(frozen=True, slots=True)
class DrawnTurns(Trajectory):
    """Turns that find as much context as they say they keep, whatever came before them."""

    def prompts(self) -> Iterator[TurnPrompt]:
        """See Trajectory."""
        for turn in self.turns:
            yield TurnPrompt(turn.kept or 0, turn.append, turn.generate, turn.tool_s)


def drawn_turns(
    trajectories: Sequence[Trajectory], *, agents: int, turns: int, seed: int
) -> tuple[DrawnTurns, ...]:
    """So many agents of `turns` turns each. Seeded and pure. Raises InvalidRequest."""
    if not (1 <= agents <= AGENTS_MAX and turns >= 1 and agents * turns <= TURNS_MAX):
        raise InvalidRequest(
            f"{agents} agents of {turns} turns; give 1..{AGENTS_MAX}, and {TURNS_MAX} turns at most"
        )
    prompts = [prompt for each in trajectories for prompt in each.prompts()]
    if not prompts:
        raise InvalidRequest("no trajectories to draw turns of; a set has at least one")
    rng = random.Random(f"turns/{seed}")
    chosen = iter(rng.choices(prompts, k=agents * turns))
    return tuple(
        DrawnTurns(
            tuple(
                Turn(each.append, each.generate, each.context, each.tool_s)
                for each in itertools.islice(chosen, turns)
            )
        )
        for _ in range(agents)
    )

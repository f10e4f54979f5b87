"""Two readings of the paper's table that are not its replay: sets of trajectories, seeded.

`compacted_set`: turns and total are means over trajectories, append, generate and context means
over all turns. So 429 of 33,150 tokens of a 64K prompt are new: 98.7 % hit. Turns x (append +
generate) is then far above total: a context loses part of what a turn brought before the next one,
as agents do that drop reasoning or compact; what comes back behind a cut is appended again. The
paper's own replay drops nothing (replayed_set.py); this one computes and decodes about twice as
much for the same bytes that it loads.

Declared, since the table has means only: the turns of a trajectory lie within `TURNS_SPREAD` of
the mean, its length is uniform up to the cut, its context grows evenly, sizes of appends and
answers vary as 0.25 + 0.75 x an exponential of mean 1, and the context of the first turn is stored
before it (system prompt, tools, what the agent was given).

`grown_set`: contexts only grow, and the first is stored already. It is
`dualpath.bench.testbed.workload.trajectory`, which the measured benches use.
"""

from __future__ import annotations

import random

from dualpath.bench.agents.trajectory import Trajectory, Turn
from dualpath.bench.testbed.workload import PAPER_TABLE, Context, Trajectories, trajectory
from dualpath.transfer.errors import InvalidRequest

TRAJECTORIES = 500
TRAJECTORIES_MAX = 100_000
TURNS_SPREAD = 0.4


def compacted_set(
    context: Context, *, seed: int, trajectories: int = TRAJECTORIES
) -> tuple[Trajectory, ...]:
    """So many trajectories with the means of the row. Raises InvalidRequest."""
    check_count(trajectories)
    row = PAPER_TABLE[context]
    rng = random.Random(f"paper/{context.value}/{seed}")
    spread = row.turns * TURNS_SPREAD
    turns = _stratified(row.turns - spread, row.turns + spread, trajectories, rng)
    totals = _stratified(2 * row.total - row.length_max, row.length_max, trajectories, rng)
    return tuple(
        _cut_back(row, max(1, round(count)), total, rng)
        for count, total in zip(turns, totals, strict=True)
    )


def grown_set(
    context: Context, *, seed: int, trajectories: int = TRAJECTORIES
) -> tuple[Trajectory, ...]:
    """Nothing is ever dropped; the first context is stored. Raises InvalidRequest."""
    check_count(trajectories)
    rng = random.Random(f"grown/{context.value}/{seed}")
    found = []
    for _ in range(trajectories):
        turns = trajectory(PAPER_TABLE[context], rng)
        found.append(
            Trajectory(tuple(Turn(each.append, each.generate) for each in turns), turns[0].context)
        )
    return tuple(found)


def check_count(trajectories: int) -> None:
    """Raises InvalidRequest for a number of trajectories that no set has."""
    if not 1 <= trajectories <= TRAJECTORIES_MAX:
        raise InvalidRequest(f"a set has 1..{TRAJECTORIES_MAX} trajectories, not {trajectories}")


def _stratified(low: float, high: float, count: int, rng: random.Random) -> list[float]:
    """One draw in each of `count` equal parts of a range, in random order."""
    width = (high - low) / count
    drawn = [low + width * (part + rng.random()) for part in range(count)]
    rng.shuffle(drawn)
    return drawn


def _cut_back(row: Trajectories, turns: int, total: float, rng: random.Random) -> Trajectory:
    """One trajectory, whose context is planned to go evenly from its first to its last."""
    size_mean = row.append + row.generate
    # The last context and the last turn make the total; the mean context is half way.
    scale = total / row.total
    first = (2 * row.context_mean - row.total + size_mean) * scale
    last = max(first, total - size_mean)
    made: list[Turn] = []
    end = round(first)
    for number in range(turns):
        append = max(1, round(row.append * _size(rng)))
        generate = max(1, round(row.generate * _size(rng)))
        planned = round(first + (last - first) * number / max(1, turns - 1))
        room = max(0, row.length_max - append - generate)
        kept = min(planned, end, room)
        made.append(Turn(append, generate, kept))
        end = kept + append + generate
    return Trajectory(tuple(made), round(first))


def _size(rng: random.Random) -> float:
    return 0.25 + rng.expovariate(1 / 0.75)

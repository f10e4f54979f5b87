"""Trajectories as the paper replays them, to the statistics of its table, seeded.

Appendix A.3 of arXiv 2602.21548: the context of a round is all that was appended and generated in
the rounds before it, nothing is dropped; hits lie within a trajectory only, so the first prompt is
computed whole. What a trajectory's rounds append and generate therefore adds up to its total. The
table's means hold together only if append and generate are means over trajectories of their means:
means over all turns, times the turns, would be 1.7 times the total. Then E[total / turns] is known
beside E[turns], and turns spread widely: a few trajectories have many more than the mean.

Declared, since the table has means only: turn sizes of trajectories are lognormal with the spread
that the two means fix, totals uniform up to the cut, sizes within a trajectory vary as 0.25 + 0.75
x an exponential of mean 1, and the first prompt lifts the mean context above half the total.

`scaled` is the paper's way to longer appends or answers: every round's times a factor, then the
trajectory cut off at the length that its set allows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import NormalDist

from dualpath.bench.agents.trajectory import Trajectory, Turn
from dualpath.bench.testbed.workload import PAPER_TABLE, Context, Trajectories
from dualpath.transfer.errors import InvalidRequest

TURNS_MIN = 2


def replayed_set(context: Context, *, seed: int, trajectories: int) -> tuple[Trajectory, ...]:
    """So many trajectories with the means of the row. The caller checks the count."""
    row = PAPER_TABLE[context]
    rng = random.Random(f"replayed/{context.value}/{seed}")
    mean = row.append + row.generate
    # For a lognormal, E[x] * E[1/x] = exp(sigma^2), and turns = total / size.
    sigma = math.sqrt(math.log(mean * row.turns / row.total))
    normal = NormalDist(math.log(mean) - sigma * sigma / 2, sigma)
    sizes = [math.exp(normal.inv_cdf(share)) for share in _shares(trajectories, rng)]
    low = 2 * row.total - row.length_max
    totals = [low + (row.length_max - low) * share for share in _shares(trajectories, rng)]
    return tuple(
        _grow(row, max(TURNS_MIN, round(total / size)), total, rng)
        for size, total in zip(sizes, totals, strict=True)
    )


def scaled(
    trajectories: Sequence[Trajectory],
    *,
    append: float = 1.0,
    generate: float = 1.0,
    length_max: int,
) -> tuple[Trajectory, ...]:
    """The same rounds with that many times the tokens, cut off before one would pass `length_max`.
    Raises InvalidRequest for factors that are none, or where not one round is left."""
    for name, factor in (("append", append), ("generate", generate)):
        if not (math.isfinite(factor) and factor > 0):
            raise InvalidRequest(f"{name} times {factor}; the factor must be above 0")
    found = []
    for each in trajectories:
        length, turns = each.first_context, []
        for turn in each.turns:
            longer = Turn(
                max(1, round(turn.append * append)),
                max(1, round(turn.generate * generate)),
                tool_s=turn.tool_s,
            )
            length += longer.append + longer.generate
            if length > length_max:
                break
            turns.append(longer)
        if turns:
            found.append(Trajectory(tuple(turns), each.first_context))
    if not found:
        raise InvalidRequest(f"no round is shorter than {length_max} tokens with these factors")
    return tuple(found)


def _shares(count: int, rng: random.Random) -> list[float]:
    """One draw in each of `count` equal parts of (0, 1), in random order."""
    drawn = [(part + rng.uniform(0.001, 0.999)) / count for part in range(count)]
    rng.shuffle(drawn)
    return drawn


def _grow(row: Trajectories, turns: int, total: float, rng: random.Random) -> Trajectory:
    """One trajectory of so many turns and about `total` tokens, at most `length_max`."""
    first = (2 * row.context_mean - row.total) * total / row.total
    generated = total * row.generate / (row.append + row.generate)
    appended = total - generated - first
    appends = [first, *_parts(appended, turns - 1, rng)]
    generates = _parts(generated, turns, rng)
    made, length = [], 0
    for append, generate in zip(appends, generates, strict=True):
        turn = Turn(max(1, round(append)), max(1, round(generate)))
        length += turn.append + turn.generate
        # Rounding alone can pass the cut, in the last turn.
        if length > row.length_max:
            break
        made.append(turn)
    return Trajectory(tuple(made))


def _parts(whole: float, count: int, rng: random.Random) -> list[float]:
    weights = [0.25 + rng.expovariate(1 / 0.75) for _ in range(count)]
    unit = whole / sum(weights)
    return [unit * weight for weight in weights]

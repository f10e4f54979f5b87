"""Runs of a stage in all orders of events that differ from the natural one in a few places.

Owns the schedules. A schedule is a list of deviations: at this step, not the event that was caused
first but another one, or time passes first, or a fault strikes. Every schedule with at most so
many delays and so many faults is run once (delay-bounded search), in an order that a seed shuffles
where not all of them fit into the time.
"""

from __future__ import annotations

import logging
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dualpath.bench.explore.stage import Stage, StageConfig
from dualpath.bench.explore.stage_hand_off import HandOffStage
from dualpath.bench.explore.stage_play import StagePlay
from dualpath.bench.explore.stage_transport import Violation
from dualpath.transfer.errors import InvalidRequest

STEPS_MAX = 3000
HOLDS_S = (0.3, 0.8)
"""For longer than a slow path is left to itself; for longer than one is given to say something."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """At step `step`, of n events that could happen next, choose event `choice` below n (0: time
    passes first), or hold one of them back, from n on: for each of HOLDS_S in turn. With `fault`
    that fault strikes instead."""

    step: int
    choice: int
    fault: bool

    def __str__(self) -> str:
        return f"{self.step}:{'f' if self.fault else ''}{self.choice}"


Schedule = tuple[Deviation, ...]
_DEVIATION = re.compile(r"(\d+):(f?)(\d+)")


def parse_schedule(text: str) -> Schedule:
    """`STEP:CHOICE` and `STEP:fFAULT`, separated by commas. Raises InvalidRequest."""
    found = []
    for word in text.split(","):
        match = _DEVIATION.fullmatch(word.strip())
        if match is None:
            raise InvalidRequest(f"{word!r} is no deviation; write for example 4:2 or 9:f11")
        found.append(Deviation(int(match[1]), int(match[3]), bool(match[2])))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Branches:
    """What a run could have done instead at each step: so many choices, so many faults; and what
    went wrong in it by reason, as its load counted."""

    others: tuple[int, ...]
    faults: tuple[int, ...]
    events: Mapping[str, int]


class Broken(Exception):
    """A schedule that breaks what must hold, with what happened."""

    def __init__(self, schedule: Schedule, history: Sequence[str], violation: Violation) -> None:
        happened = "\n".join(f"  {number:3} {line}" for number, line in enumerate(history))
        listed = ",".join(map(str, schedule)) or "none"
        super().__init__(f"{happened}\n{violation}\nschedule {listed}")
        self.schedule = schedule
        self.violation = violation


def _quiet(_: Tally) -> None:
    """Nobody wants to know how far it is."""


def run(config: StageConfig, schedule: Schedule) -> Branches:
    """Run one schedule to its end. Raises Broken."""
    return _run(config, schedule, [])


def play(config: StageConfig, schedule: Schedule) -> Sequence[str]:
    """What happens in one schedule. Raises Broken, and InvalidRequest if it cannot be played."""
    history: list[str] = []
    _run(config, schedule, history)
    return history


def _run(config: StageConfig, schedule: Schedule, history: list[str]) -> Branches:
    logging.getLogger("dualpath.agent").setLevel(logging.CRITICAL)  # what goes wrong is the point
    try:
        stage: StagePlay = HandOffStage(config) if config.hand_off else Stage(config)
        try:
            return _steps(stage, {each.step: each for each in schedule}, history)
        finally:
            stage.close()
    except Violation as violation:
        raise Broken(schedule, history, violation) from violation
    except IndexError as error:
        listed = ",".join(map(str, schedule))
        raise InvalidRequest(f"schedule {listed} names a choice that does not exist") from error


def _steps(stage: StagePlay, deviations: dict[int, Deviation], history: list[str]) -> Branches:
    others: list[int] = []
    faults: list[int] = []
    for step in range(STEPS_MAX):
        possible, found = stage.possible(), stage.faults()
        others.append(len(possible) * (1 + len(HOLDS_S)))
        faults.append(len(found))
        deviation = deviations.get(step)
        if deviation is not None and deviation.fault:
            fault = found[deviation.choice]
            history.append(f"FAULT {fault.what}")
            stage.strike(fault)
            continue
        choice = deviation.choice if deviation is not None else -1
        if deviation is not None and choice >= len(possible):
            held, which = divmod(choice - len(possible), len(HOLDS_S))
            history.append(f"held for {HOLDS_S[which]} s: {possible[held].what}")
            stage.hold(possible[held], HOLDS_S[which])
        elif possible and choice:
            event = possible[max(choice, 0)]
            history.append(event.what)
            stage.agenda.take(event)
            stage.perform(event.happen)
        else:
            history.append(f"time passes from {stage.loop.time():.3f} s")
            if not stage.pass_time() and not possible:
                stage.check_rest()
                return Branches(tuple(others), tuple(faults), stage.events)
    raise Violation(f"no end after {STEPS_MAX} events")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Which schedules: at most so many deviations of each kind. With a limit of `seconds` or `runs`
    only as many, chosen by `seed`, as fit into it."""

    delays: int = 1
    faults: int = 1
    seconds: float = math.inf
    runs: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, most in (("delays", self.delays, 8), ("faults", self.faults, 8)):
            if not 0 <= value <= most:
                raise InvalidRequest(f"--{name} must lie in 0..{most}, not {value}")
        for name, limit in (("seconds", self.seconds), ("runs", self.runs)):
            if not limit > 0:
                raise InvalidRequest(f"--{name} must be above 0, not {limit:g}")

    @property
    def limited(self) -> bool:
        """Whether perhaps not all of them are run."""
        return math.isfinite(self.seconds) or math.isfinite(self.runs)


@dataclass(slots=True)
class Tally:
    """How much was explored; `whole` if every schedule within the bounds was run."""

    runs: int = 0
    steps: int = 0
    waiting: int = 0
    """Schedules that are known and not run yet."""
    whole: bool = True
    events: Counter[str] = field(default_factory=Counter)
    """In how many runs something went wrong, by the reasons that loads count."""


def explore(config: StageConfig, bounds: Bounds, on_run: Callable[[Tally], None] = _quiet) -> Tally:
    """Run all schedules within the bounds, or as many by chance. Raises Broken for the first that
    breaks something."""
    tally = Tally()
    until = time.monotonic() + bounds.seconds
    chance = random.Random(bounds.seed)
    waiting: list[tuple[Schedule, int, int]] = [((), bounds.delays, bounds.faults)]
    while waiting:
        if tally.runs >= bounds.runs or time.monotonic() > until:
            tally.whole = False
            break
        if bounds.limited:
            at = chance.randrange(len(waiting))
            waiting[at], waiting[-1] = waiting[-1], waiting[at]
        schedule, delays_left, faults_left = waiting.pop()
        branches = run(config, schedule)
        tally.runs += 1
        tally.steps += len(branches.others)
        tally.events.update(dict.fromkeys(branches.events, 1))
        waiting += _children(schedule, delays_left, faults_left, branches)
        tally.waiting = len(waiting)
        on_run(tally)
    return tally


def _children(
    schedule: Schedule, delays: int, faults: int, branches: Branches
) -> Iterator[tuple[Schedule, int, int]]:
    first = schedule[-1].step + 1 if schedule else 0
    for step in range(first, len(branches.others)):
        if delays:
            for choice in range(branches.others[step]):
                yield (*schedule, Deviation(step, choice, False)), delays - 1, faults
        if faults:
            for choice in range(branches.faults[step]):
                yield (*schedule, Deviation(step, choice, True)), delays, faults - 1

"""Which faults befall which write: seeded, pure, the same for the same sequence of writes."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Probabilities a write, 0 to 1; none by default. The same seed gives the same faults.

    delay: held back for up to `delay_s_max` seconds before it is submitted.
    reset: the connection is ended up to `reset_s_max` seconds after the write was submitted.
    truncate: a part of its bytes goes, then the connection ends.
    duplicate: submitted twice. stale: submitted again up to `stale_s_max` seconds after it was
    answered, when its window has probably been revoked. flip: one byte goes wrong.
    """

    seed: int
    delay: float = 0.0
    reset: float = 0.0
    truncate: float = 0.0
    duplicate: float = 0.0
    stale: float = 0.0
    flip: float = 0.0
    delay_s_max: float = 0.05
    reset_s_max: float = 0.005
    stale_s_max: float = 0.2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "seed":
                continue
            if not 0 <= value < float("inf") or (not field.name.endswith("_max") and value > 1):
                raise InvalidRequest(f"fault plan: {field.name}={value} is out of range")

    @property
    def is_null(self) -> bool:
        """Whether nothing will ever go wrong."""
        return not any(
            (
                self.delay,
                self.reset,
                self.truncate,
                self.duplicate,
                self.stale,
                self.flip,
            )
        )


@dataclass(frozen=True, slots=True)
class Faults:
    """What befalls one write. Times in seconds; negative or None: it does not happen."""

    delay_s: float = -1.0
    reset_s: float = -1.0
    stale_s: float = -1.0
    truncate_at: int | None = None
    flip_at: int | None = None
    duplicate: bool = False


class FaultDice:
    """Draws the faults of write after write."""

    def __init__(self, plan: FaultPlan) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)

    def draw(self, nbytes: int) -> Faults:
        """The faults of the next write, which has `nbytes` bytes."""
        # As many numbers for each write, so that one probability does not move the others' dice.
        plan = self._plan
        luck = [self._random.random() for _ in range(11)]
        return Faults(
            delay_s=luck[1] * plan.delay_s_max if luck[0] < plan.delay else -1.0,
            reset_s=luck[3] * plan.reset_s_max if luck[2] < plan.reset else -1.0,
            stale_s=luck[5] * plan.stale_s_max if luck[4] < plan.stale else -1.0,
            truncate_at=int(luck[7] * nbytes) if luck[6] < plan.truncate else None,
            flip_at=int(luck[9] * nbytes) if luck[8] < plan.flip else None,
            duplicate=luck[10] < plan.duplicate,
        )

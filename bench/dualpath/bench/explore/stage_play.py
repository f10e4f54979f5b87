"""What every stage does: one event after another, time in between, faults, a check after each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dualpath.bench.explore.agenda import Agenda, Event
from dualpath.bench.explore.stage_loop import StageLoop
from dualpath.bench.explore.stage_transport import Violation, Wire

REST_S = 30.0
"""After the end: until then everything must have come to rest."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that may go wrong."""

    what: str
    happen: Callable[[], None]


class StagePlay(ABC):
    """See the module docstring. `close` it."""

    def __init__(self) -> None:
        self.loop = StageLoop()
        self.agenda = Agenda()
        self.wire = Wire(self.agenda, self.loop)
        self.struck = 0
        self.hurried = False
        """Whether time has passed while something else could have happened."""

    # What may happen.

    def possible(self) -> list[Event]:
        """Events that may happen next; the first is what happens by default."""
        return self.agenda.possible()

    @abstractmethod
    def faults(self) -> list[Fault]:
        """What may go wrong now."""

    def hold(self, event: Event, seconds: float) -> None:
        """This event, and what comes behind it, takes so much longer."""
        self.hurried = True
        self.agenda.hold(event.channel)
        self.loop.call_later(seconds, self.agenda.let_go, event.channel)

    def perform(self, happen: Callable[[], None]) -> None:
        """Let it happen, and check what must hold."""
        self.loop.perform(happen)
        self.check_raised()
        self.check()

    def strike(self, fault: Fault) -> None:
        """Let a fault happen."""
        self.struck += 1
        self.perform(fault.happen)

    def pass_time(self) -> bool:
        """Let time pass to the next timer; False if there is none that matters any more."""
        self.hurried = self.hurried or bool(self.possible())
        due = self.loop.next_timer_s()
        if due is None or due > self.horizon_s:
            return False
        self.loop.advance()
        self.check_raised()
        self.check()
        return True

    def spoil_writes(self) -> list[Fault]:
        """Faults of the writes that are on their way."""
        found = []
        for flying in tuple(self.wire.flying.values()):
            if not flying.flipped and flying.on_completion is not None:
                number = flying.number
                found.append(Fault(f"write {number} is flipped", self._flipping(number)))
                found.append(Fault(f"write {number} comes twice", self._doubling(number)))
        return found

    def _flipping(self, number: int) -> Callable[[], None]:
        return lambda: setattr(self.wire.flying[number], "flipped", True)

    def _doubling(self, number: int) -> Callable[[], None]:
        return lambda: self.wire.again(self.wire.flying[number])

    # What must hold.

    def check_raised(self) -> None:
        """Nothing raises. Raises Violation."""
        if self.loop.raised:
            error = self.loop.raised[0]
            raise Violation(f"{type(error).__name__}: {error}") from error

    @property
    @abstractmethod
    def horizon_s(self) -> float:
        """Timers that are due later do not matter."""

    @property
    @abstractmethod
    def events(self) -> Mapping[str, int]:
        """What went wrong, by reason; once all has ended."""

    @abstractmethod
    def check(self) -> None:
        """After every event. Raises Violation."""

    @abstractmethod
    def check_rest(self) -> None:
        """Once nothing can happen any more. Raises Violation."""

    @abstractmethod
    def close(self) -> None:
        """Give the loop back."""

"""Whether the daemon takes work, and if not, why: for health checks, probes and its own calls.

Owns the phase (starting, serving, draining, drained, stopping) and the beat of the event loop. A
degraded store is ready: what it cannot do is a miss or a seal that fails, with its reason, which is
shown. A daemon that drains finishes what runs and admits nothing new. Thread-safe.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dualpath.transfer.errors import Unavailable

BEAT_S_MAX = 10.0
"""An event loop that has not come round for so long counts as hung."""


class Phase(enum.Enum):
    """Where the daemon stands. The values are words of the protocol."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    """Finishes what runs; admits nothing new."""
    DRAINED = "drained"
    """Nothing runs and everything is durable."""
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer to a probe: good or not, and the reasons, a line each."""

    good: bool
    text: str


class Readiness:
    """See the module docstring. `troubles` gives word -> sentence of what is degraded; `clock`
    seconds, the machine's own."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._phase = Phase.STARTING
        self._beat_at = clock()
        self._troubles: Callable[[], Mapping[str, str]] = dict
        self.on_change: Callable[[Phase], None] = lambda _: None

    @property
    def phase(self) -> Phase:
        """Where the daemon stands."""
        return self._phase

    def enter(self, phase: Phase) -> None:
        """From now on it stands there. STOPPING is never left."""
        if self._phase is Phase.STOPPING or phase is self._phase:
            return
        self._phase = phase
        self.on_change(phase)

    def watch(self, troubles: Callable[[], Mapping[str, str]]) -> None:
        """Ask this for what is degraded."""
        self._troubles = troubles

    def beat(self) -> None:
        """The event loop came round."""
        self._beat_at = self._clock()

    def troubles(self) -> Mapping[str, str]:
        """What is degraded: word -> sentence."""
        return self._troubles()

    def check_admits(self) -> None:
        """Raises Unavailable, reason `draining`, unless new work is taken."""
        if self._phase is not Phase.SERVING:
            raise Unavailable(
                f"the daemon is {self._phase.value}: use another, or wait for its restart",
                reason="draining",
            )

    def ready(self) -> Verdict:
        """Whether new work should be sent here."""
        lines = [self._phase.value]
        lines += [f"degraded: {word}: {text}" for word, text in self._troubles().items()]
        return Verdict(self._phase is Phase.SERVING, "\n".join(lines))

    def alive(self) -> Verdict:
        """Whether the process should be left running."""
        silent_s = self._clock() - self._beat_at
        if silent_s <= BEAT_S_MAX or self._phase is Phase.STARTING:
            return Verdict(True, "alive")
        return Verdict(False, f"the event loop has not come round for {silent_s:.0f} s")

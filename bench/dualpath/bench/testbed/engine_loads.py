"""What the engines of one group have to do: what their leader reports.

Owns the requests of each engine, by the numbers of their assignments, and what their nodes have to
read. A load's reads count as waiting until it has ended: an agent's own count of what waits lacks,
at a relay, what the loading agent has not granted yet. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dualpath.scheduler.group_report import EngineReport, NodeReport


@dataclass(slots=True)
class _Running:
    number: int
    engine: str
    tokens: int
    reads: float


@dataclass(slots=True)
class EngineLoads:
    """`engines` of a group, each on a node of its name."""

    engines: tuple[str, ...]
    _running: dict[str, _Running] = field(default_factory=dict)
    _began: int = 0

    def begin(self, request: str, number: int, engine: str, tokens: int, reads: float) -> None:
        """An engine has been given a request, of which its node reads so many tokens."""
        self._running[request] = _Running(number, engine, tokens, reads)
        self._began = max(self._began, number)

    def loaded(self, request: str) -> None:
        """Its reads have ended."""
        running = self._running.get(request)
        if running is not None:
            running.reads = 0

    def end(self, request: str) -> None:
        """An engine is done with it."""
        self._running.pop(request, None)

    def reports(self, latest: int) -> tuple[list[EngineReport], list[NodeReport], int]:
        """Engines, nodes, and the number that they have seen, `latest` being the last that came by
        the leader's own stream: what has not begun is not among them."""
        seen = min(self._began, latest)
        requests = dict.fromkeys(self.engines, 0)
        tokens = dict.fromkeys(self.engines, 0)
        reads = dict.fromkeys(self.engines, 0.0)
        for one in self._running.values():
            if one.number <= seen:
                requests[one.engine] += 1
                tokens[one.engine] += one.tokens
                reads[one.engine] += one.reads
        engines = [EngineReport(name, requests[name], tokens[name]) for name in self.engines]
        return engines, [NodeReport(name, round(reads[name])) for name in self.engines], seen

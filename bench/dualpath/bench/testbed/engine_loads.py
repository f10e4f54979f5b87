"""What the engines of one group have to do: what their leader reports.

Owns the requests of each engine, by the numbers of their assignments, and what nodes have to read,
as their agents last said. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dualpath.scheduler.group_report import EngineReport, NodeReport


@dataclass(slots=True)
class EngineLoads:
    """`engines` of a group on `nodes`. A report says the load as its agents knew it at the last
    `polled`: what was assigned later is not seen by it, so that no read is counted twice or not at
    all."""

    engines: tuple[str, ...]
    nodes: tuple[str, ...]
    _running: dict[str, tuple[int, str, int]] = field(default_factory=dict)
    _queues: dict[str, int] = field(default_factory=dict)
    _began: int = 0
    _seen: int = 0

    def begin(self, request: str, number: int, engine: str, tokens: int) -> None:
        """An engine's agent has been told of a request."""
        self._running[request] = (number, engine, tokens)
        self._began = max(self._began, number)

    def end(self, request: str) -> None:
        """An engine is done with it."""
        self._running.pop(request, None)

    @property
    def began(self) -> int:
        """The highest number that has begun: what a poll that is sent now will know."""
        return self._began

    def polled(self, queue_tokens: dict[str, int], began: int) -> None:
        """Agents have said what waits to be read; they were asked when `began` had begun."""
        self._queues.update(queue_tokens)
        self._seen = began

    def reports(self, latest: int) -> tuple[list[EngineReport], list[NodeReport], int]:
        """Engines, nodes, and the number that they have seen, `latest` being the last that came."""
        seen = min(self._seen, latest)
        counts = {name: [0, 0] for name in self.engines}
        for number, engine, tokens in self._running.values():
            if number <= seen:
                counts[engine][0] += 1
                counts[engine][1] += tokens
        engines = [EngineReport(name, *count) for name, count in counts.items()]
        nodes = [NodeReport(name, self._queues.get(name, 0)) for name in self.nodes]
        return engines, nodes, seen


def in_tokens(queue_bytes: Iterable[tuple[str, int]], token_bytes: float) -> dict[str, int]:
    """Bytes that wait, by node, as tokens of KV."""
    return {name: int(nbytes / token_bytes) for name, nbytes in queue_bytes}

"""Engines that do what they are told under a virtual clock: the driver of the measurement.

Owns what each engine has and when requests end. A request stays `prefill_s` with its prefill and
`decode_s` more with its decode engine; a node reads what waits for it within one interval. Nothing
here is measured: the scheduler's calls are timed by whoever makes them.
"""

from __future__ import annotations

import random
from collections import deque

from dualpath.bench.scheduler.shape import Shape
from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.engine_spec import EngineSpec, Role
from dualpath.scheduler.group_report import EngineReport, GroupReport, NodeReport
from dualpath.scheduler.request import Request


class VirtualCluster:
    """See the module docstring."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._random = random.Random(shape.seed)
        self._ids = 0
        self.engines = tuple(
            EngineSpec(
                f"{role.value}-{node}-{gpu}",
                role,
                f"{role.value}-group-{node // nodes}",
                f"{role.value}-{node}",
                shape.hbm_tokens,
            )
            for role, count, nodes in (
                (Role.PREFILL, shape.prefill, shape.prefill_group),
                (Role.DECODE, shape.decode, shape.decode_group),
            )
            for node in range(count)
            for gpu in range(shape.gpus)
        )
        self._node_of = {engine.name: engine.node for engine in self.engines}
        self._members: dict[str, list[str]] = {}
        self._nodes: dict[str, list[str]] = {}
        for engine in self.engines:
            self._members.setdefault(engine.group, []).append(engine.name)
            nodes = self._nodes.setdefault(engine.group, [])
            if engine.node not in nodes:
                nodes.append(engine.node)
        self._tokens = {engine.name: 0 for engine in self.engines}
        self._requests = {engine.name: 0 for engine in self.engines}
        self._reads = {engine.node: 0.0 for engine in self.engines}
        self._prefilling: deque[tuple[float, Assignment]] = deque()
        self._decoding: deque[tuple[float, Assignment]] = deque()
        self._seen = 0

    @property
    def groups(self) -> tuple[str, ...]:
        """Prefill before decode groups."""
        return tuple(self._members)

    def arrivals(self, count: int) -> list[Request]:
        """So many new requests."""
        shape, found = self._shape, []
        for _ in range(count):
            self._ids += 1
            tokens = self._random.randint(1, 2 * shape.mean_tokens)
            hits = max(0, tokens - shape.append)
            found.append(Request(f"request-{self._ids}", tokens, hits))
        return found

    def report(self, group: str) -> GroupReport:
        """What a group's leader would say now."""
        tokens, requests = self._tokens, self._requests
        return GroupReport(
            group,
            tuple(
                [EngineReport(name, requests[name], tokens[name]) for name in self._members[group]]
            ),
            tuple([NodeReport(node, int(self._reads[node])) for node in self._nodes[group]]),
            seen=self._seen,
        )

    def take(self, assignments: tuple[Assignment, ...], now: float) -> None:
        """The engines begin."""
        for one in assignments:
            for engine, share in ((one.prefill, one.read.prefill), (one.decode, one.read.decode)):
                self._tokens[engine] += one.request.tokens
                self._requests[engine] += 1
                self._reads[self._node_of[engine]] += share * one.request.hit_tokens
            self._prefilling.append((now + self._shape.prefill_s, one))
            self._seen = one.number

    def advance(self, now: float) -> tuple[list[str], list[str]]:
        """Time passes; the requests that are prefilled, and those that are finished."""
        prefilled, finished = [], []
        while self._prefilling and self._prefilling[0][0] <= now:
            _, one = self._prefilling.popleft()
            self._leave(one.prefill, one)
            self._decoding.append((now + self._shape.decode_s, one))
            prefilled.append(one.request.id)
        while self._decoding and self._decoding[0][0] <= now:
            _, one = self._decoding.popleft()
            self._leave(one.decode, one)
            finished.append(one.request.id)
        for node in self._reads:
            self._reads[node] = 0.0
        return prefilled, finished

    def _leave(self, engine: str, one: Assignment) -> None:
        self._tokens[engine] -= one.request.tokens
        self._requests[engine] -= 1

"""Which prefill engine a request gets.

Owns the port and two policies: the paper's, and turns without regard to load, the cluster without
a scheduler. A policy is asked once a fetch for a *round* over the engines of the group that
fetches; the round is asked request by request, in the order of arrival, until it names nobody.
What it names is placed there before it is asked again.
"""

from __future__ import annotations

import heapq
from typing import Protocol

from dualpath.scheduler.engine_spec import NodeSpec
from dualpath.scheduler.engine_table import EngineTable
from dualpath.scheduler.request import Request
from dualpath.scheduler.settings import PolicySettings
from dualpath.transfer.errors import InvalidRequest


class PrefillRound(Protocol):
    """One fetch of one group."""

    def choose(self, request: Request) -> int | None:
        """The engine for this request; None: nobody takes it now, and the round is over."""
        ...

    def placed(self, engine: int) -> None:
        """The chosen engine's columns have grown by the request, and its node's perhaps."""
        ...


class PrefillChoice(Protocol):
    """Pure: the same table and requests get the same answers. No group has two rounds at once."""

    def round(self, table: EngineTable, group: int) -> PrefillRound:
        """A round over the engines of `group`."""
        ...


def beta_of(settings: PolicySettings, table: EngineTable, group: int) -> float:
    """The paper's beta for the engines of a group, in tokens."""
    if settings.beta_tokens:
        return settings.beta_tokens
    rates, node_of = table.compute_rate, table.node_of
    members = table.members[group]
    return settings.beta_s * min([rates[node_of[index]] for index in members], default=0.0)


def check_beta(settings: PolicySettings, node: NodeSpec) -> None:
    """Raise InvalidRequest if no beta is known for a node's prefill engines."""
    if not settings.beta_tokens and not node.compute_tokens_per_s:
        raise InvalidRequest(
            f"node '{node.name}' says no compute_tokens_per_s, and the scheduler has no "
            "beta_tokens: give one of them; profile how many tokens of prompts, hits included, one "
            "engine works off a second"
        )


class PaperPrefillChoice:
    """The paper's rule: skip engines with tok_e > beta; prefer those whose node has
    read_q <= alpha; of the preferred, else of the others, the least tok_e.

    Nodes without staging memory for the request's hits, where that is bounded, are passed over.
    Ties go to the engine with fewer requests, then to the lower index. Heaps by load: a
    choice costs the logarithm of the group, a round the group once.
    """

    def __init__(self, settings: PolicySettings) -> None:
        self._settings = settings

    def round(self, table: EngineTable, group: int) -> PrefillRound:
        """See PrefillChoice."""
        return _PaperRound(table, group, self._settings)


class _PaperRound:
    def __init__(self, table: EngineTable, group: int, settings: PolicySettings) -> None:
        self._table = table
        self._alpha, self._beta = settings.alpha_tokens, beta_of(settings, table, group)
        tokens, requests = table.tokens, table.requests
        node_of, read_queue, alpha = table.node_of, table.read_queue, self._alpha
        self._near: list[tuple[int, int, int]] = []
        self._far: list[tuple[int, int, int]] = []
        self._aside: list[tuple[int, int, int]] = []
        """Engines whose node lacks room for the request that is asked for."""
        for index in table.members[group]:
            key = (tokens[index], requests[index], index)
            (self._near if read_queue[node_of[index]] <= alpha else self._far).append(key)
        heapq.heapify(self._near)
        heapq.heapify(self._far)

    def choose(self, request: Request) -> int | None:
        self._put_back()
        near, far, beta = self._near, self._far, self._beta
        table, alpha, hits = self._table, self._alpha, request.hit_tokens
        while near and near[0][0] <= beta:
            index = near[0][2]
            if table.read_queue[table.node_of[index]] > alpha:
                # Its node's queue has grown in this round.
                heapq.heappush(far, heapq.heappop(near))
            elif table.has_room(index, hits):
                return index
            else:
                self._aside.append(heapq.heappop(near))
        while far and far[0][0] <= beta:
            if table.has_room(far[0][2], hits):
                return far[0][2]
            self._aside.append(heapq.heappop(far))
        return None

    def placed(self, engine: int) -> None:
        heap = self._near if self._near and self._near[0][2] == engine else self._far
        assert heap[0][2] == engine, "only the engine that was chosen is placed on"
        table = self._table
        heapq.heapreplace(heap, (table.tokens[engine], table.requests[engine], engine))

    def _put_back(self) -> None:
        """Nodes without room for the last request may have it for the next."""
        if self._aside:
            for key in self._aside:
                heapq.heappush(self._near, key)
            self._aside.clear()


class RoundRobinPrefillChoice:
    """Turns over each group's engines, whatever their load: no scheduler."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}

    def round(self, table: EngineTable, group: int) -> PrefillRound:
        """See PrefillChoice."""
        return _TurnsRound(self._next, table, group)


class _TurnsRound:
    def __init__(self, turns: dict[int, int], table: EngineTable, group: int) -> None:
        self._turns, self._table, self._group = turns, table, group

    def choose(self, request: Request) -> int | None:
        members, start = self._table.members[self._group], self._turns.get(self._group, 0)
        for step in range(len(members)):
            index = members[(start + step) % len(members)]
            if self._table.has_room(index, request.hit_tokens):
                return index
        return None

    def placed(self, engine: int) -> None:
        members = self._table.members[self._group]
        self._turns[self._group] = (members.index(engine) + 1) % len(members)

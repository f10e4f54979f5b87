"""Which prefill engine a request gets, by the time until it could begin there.

Beyond the paper: its threshold alpha only tells two classes of nodes apart, and where a session's
last turn was prefilled does not count. Here an engine's cost is

    max(tok_e / (beta / beta_s), read_q / (alpha / alpha_s))    seconds,

as reading and computing go on at the same time: what is computed before it, and what its node's
links read before it. The node of the session's last turn may still have that turn's tokens. It is
taken if the request would begin no later there, reading only its other hits, than at the engine of
the least cost, reading all of them. That the node has them is an expectation, made true by whatever
prefix cache the engines have: where it is wrong, the request reads as any other does.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict

from dualpath.scheduler.checks import check_positive
from dualpath.scheduler.engine_table import EngineTable
from dualpath.scheduler.prefill_choice import PrefillRound, beta_of
from dualpath.scheduler.request import Request
from dualpath.scheduler.settings import PolicySettings

SESSIONS_MAX = 65_536
"""Sessions whose last node is remembered, those that came last."""


class AwarePrefillChoice:
    """The least cost among engines with tok_e <= beta whose node has staging memory for the hits;
    the session's last node if it costs no more there. Implements PrefillChoice.

    Ties go to the fewest tokens, then to the lower index. Costs only grow in a round, so a heap
    whose top is priced again when it is looked at finds the least.
    """

    def __init__(self, settings: PolicySettings, *, sessions_max: int = SESSIONS_MAX) -> None:
        check_positive("sessions_max", sessions_max)
        self._settings = settings
        self._sessions_max = sessions_max
        self._homes: OrderedDict[str, tuple[str, int]] = OrderedDict()

    def round(self, table: EngineTable, group: int) -> PrefillRound:
        """See PrefillChoice."""
        return _AwareRound(self, table, group, self._settings)

    def home(self, session: str) -> tuple[str, int]:
        """The node of a session's last turn and the tokens that it has of it; "" and 0: none."""
        return self._homes.get(session, ("", 0))

    def remember(self, session: str, node: str, tokens: int) -> None:
        """A turn of a session is prefilled there."""
        self._homes[session] = (node, tokens)
        self._homes.move_to_end(session)
        if len(self._homes) > self._sessions_max:
            self._homes.popitem(last=False)


class _AwareRound:
    def __init__(
        self, policy: AwarePrefillChoice, table: EngineTable, group: int, settings: PolicySettings
    ) -> None:
        self._policy, self._table, self._group = policy, table, group
        self._beta = beta_of(settings, table, group)
        self._compute_s = settings.beta_s / self._beta if self._beta else 0.0
        self._read_s = settings.alpha_s / settings.alpha_tokens
        self._request: Request | None = None
        self._heap = [
            (self._cost(index), table.tokens[index], index) for index in table.members[group]
        ]
        heapq.heapify(self._heap)

    def choose(self, request: Request) -> int | None:
        self._request = request
        best = self._least(request)
        if best is None or not request.session:
            return best
        home = self._home(request)
        if home is not None and home[0] <= self._cost(best, request.hit_tokens):
            return home[1]
        return best

    def placed(self, engine: int) -> None:
        # Its entry is priced again when it comes to the top.
        table, request = self._table, self._request
        assert request is not None, "only the engine that was chosen is placed on"
        if request.session:
            node = table.spec[engine].node
            self._policy.remember(request.session, node, request.tokens)

    def _cost(self, engine: int, reads: int = 0) -> float:
        """In seconds. Rates of nodes count relative to each other."""
        table = self._table
        node = table.node_of[engine]
        compute = table.tokens[engine] * self._compute_s
        read = (table.read_queue[node] + reads) * self._read_s / table.read_rate[node]
        return compute if compute > read else read

    def _least(self, request: Request) -> int | None:
        # As `_cost`, which is asked too often here to be called.
        table, heap, beta = self._table, self._heap, self._beta
        tokens_of, node_of = table.tokens, table.node_of
        queue, rate = table.read_queue, table.read_rate
        compute_s, read_s = self._compute_s, self._read_s
        aside: list[tuple[float, int, int]] = []
        found = None
        while heap:
            known_cost, known_tokens, index = heap[0]
            tokens, node = tokens_of[index], node_of[index]
            compute, read = tokens * compute_s, queue[node] * read_s / rate[node]
            cost = compute if compute > read else read
            if tokens > beta:
                heapq.heappop(heap)
            elif cost != known_cost or tokens != known_tokens:
                heapq.heapreplace(heap, (cost, tokens, index))
            elif not table.has_room(index, request.hit_tokens):
                aside.append(heapq.heappop(heap))
            else:
                found = index
                break
        for entry in aside:
            heapq.heappush(heap, entry)
        return found

    def _home(self, request: Request) -> tuple[float, int] | None:
        """Cost and engine on the session's last node, if one may be taken."""
        table = self._table
        node_name, tokens = self._policy.home(request.session)
        node = table.node_index.get(node_name)
        if node is None:
            return None
        reads = max(0, request.hit_tokens - tokens)
        found: tuple[float, int, int] | None = None
        for index in table.node_engines[node]:
            if (
                table.taking[index]
                and table.group_of[index] == self._group
                and table.tokens[index] <= self._beta
                and table.has_room(index, request.hit_tokens)
            ):
                key = (self._cost(index, reads), table.tokens[index], index)
                found = key if found is None else min(found, key)
        return (found[0], found[2]) if found is not None else None

"""Which decode engine a request gets: first the group, when it comes, then the engine in it.

Owns the port and two policies: the paper's two levels, and turns without regard to load. As with
prefill engines, a *round* over one group's engines is asked request by request, in the order of the
group's queue, until it names nobody. No policy names an engine whose memory lacks room, or whose
node lacks staging memory for the prompt, where that is bounded.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Protocol

from dualpath.scheduler.engine_table import EngineTable
from dualpath.scheduler.request import Request
from dualpath.scheduler.settings import PolicySettings


class DecodeRound(Protocol):
    """One fetch of one group."""

    def choose(self, request: Request) -> int | None:
        """The engine for this request; None: no memory for it now, and the round is over."""
        ...

    def placed(self, engine: int) -> None:
        """The chosen engine's columns have grown by the request."""
        ...


class DecodeChoice(Protocol):
    """Pure, as PrefillChoice."""

    by_turns: bool
    """Whether groups get requests by turns, instead of the one with the fewest tokens."""

    def round(self, table: EngineTable, group: int, queue: Iterable[Request]) -> DecodeRound:
        """A round over the engines of `group`, for which `queue` waits."""
        ...


class TwoLevelDecodeChoice:
    """The paper's rule. A request goes to the group with the least total tok_e (`GroupTotals`).
    In a group: R = the head of its queue, as far as it fits the group's free memory,
    Z = 1.05 x (sum of len over R + sum of tok_e) / engines. Of the engines with memory for the
    request, those with tok_e + len <= Z are preferred, and of them the least seq_e; else the least
    tok_e; without memory, stop.

    Ties by seq_e go to the least tok_e and those by tok_e to the least seq_e, then to the lower
    index. Two heaps: what does not suit one request is put back for the next.
    """

    by_turns = False

    def __init__(self, settings: PolicySettings) -> None:
        self._settings = settings

    def round(self, table: EngineTable, group: int, queue: Iterable[Request]) -> DecodeRound:
        """See DecodeChoice."""
        return _TwoLevelRound(table, group, queue, self._settings.decode_headroom)


def fill_level(
    table: EngineTable, members: list[int], queue: Iterable[Request], headroom: float
) -> float:
    """The paper's Z, in tokens."""
    free = sum([max(table.hbm[index] - table.memory[index], 0) for index in members])
    total = sum([table.tokens[index] for index in members])
    for request in queue:
        free -= request.tokens + request.new_output_bound
        if free < 0:
            break
        total += request.tokens
    return headroom * total / len(members)


class _TwoLevelRound:
    def __init__(
        self, table: EngineTable, group: int, queue: Iterable[Request], headroom: float
    ) -> None:
        self._table = table
        members = table.members[group]
        self._level = fill_level(table, members, queue, headroom)
        tokens, requests = table.tokens, table.requests
        self._by_requests = [(requests[index], tokens[index], index) for index in members]
        self._by_tokens = [(tokens[index], requests[index], index) for index in members]
        heapq.heapify(self._by_requests)
        heapq.heapify(self._by_tokens)

    def choose(self, request: Request) -> int | None:
        table = self._table
        heap, tokens_of = self._by_tokens, table.tokens
        tokens = request.tokens
        need, below = tokens + request.new_output_bound, self._level - tokens
        # The least tok_e tells without a search that nobody is below the level.
        while heap[0][0] != tokens_of[heap[0][2]]:
            heapq.heappop(heap)
        if heap[0][0] <= below:
            found = self._first(self._by_requests, need, tokens, below)
            if found is not None:
                return found
        return self._first(heap, need, tokens, None)

    def placed(self, engine: int) -> None:
        tokens, requests = self._table.tokens[engine], self._table.requests[engine]
        heapq.heappush(self._by_requests, (requests, tokens, engine))
        heapq.heappush(self._by_tokens, (tokens, requests, engine))

    def _first(
        self, heap: list[tuple[int, int, int]], need: int, staging: int, below: float | None
    ) -> int | None:
        """The first of a heap with room, and with at most `below` tokens if that is given. Those
        passed over stay for the next request; entries that are out of date go."""
        table = self._table
        first, second = table.requests, table.tokens
        if below is None:
            first, second = second, first
        tokens_of, memory, hbm, has_room = table.tokens, table.memory, table.hbm, table.has_room
        aside, found = [], None
        while heap:
            entry = heap[0]
            index = entry[2]
            if entry[0] != first[index] or entry[1] != second[index]:
                heapq.heappop(heap)
            elif (
                (below is None or tokens_of[index] <= below)
                and memory[index] + need <= hbm[index]
                and has_room(index, staging)
            ):
                found = index
                break
            else:
                aside.append(heapq.heappop(heap))
        for entry in aside:
            heapq.heappush(heap, entry)
        return found


class RoundRobinDecodeChoice:
    """Turns over groups and over each group's engines with memory: no scheduler."""

    by_turns = True

    def __init__(self) -> None:
        self._next: dict[int, int] = {}

    def round(self, table: EngineTable, group: int, queue: Iterable[Request]) -> DecodeRound:
        """See DecodeChoice."""
        return _TurnsRound(self._next, table, group)


class _TurnsRound:
    def __init__(self, turns: dict[int, int], table: EngineTable, group: int) -> None:
        self._turns, self._table, self._group = turns, table, group

    def choose(self, request: Request) -> int | None:
        table = self._table
        members, need = table.members[self._group], request.memory_tokens
        start = self._turns.get(self._group, 0)
        for step in range(len(members)):
            index = members[(start + step) % len(members)]
            if table.memory[index] + need <= table.hbm[index] and table.has_room(
                index, request.tokens
            ):
                return index
        return None

    def placed(self, engine: int) -> None:
        members = self._table.members[self._group]
        self._turns[self._group] = (members.index(engine) + 1) % len(members)

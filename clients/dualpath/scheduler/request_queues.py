"""The queues: requests that wait for a prefill engine, and by group those for a decode engine.

Owns the order: by arrival in every queue, also of requests that were queued again. Decides the
first level of the choice of a decode engine, the group, since that is which queue a request joins.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator

from dualpath.scheduler.engine_table import EngineTable
from dualpath.scheduler.group_totals import GroupTotals
from dualpath.scheduler.request import Request
from dualpath.scheduler.request_entry import NOBODY, RequestEntry

_GONE_MAX = 1024


class RequestQueues:
    """See the module docstring. `by_turns`: groups in turn, instead of the least loaded."""

    def __init__(self, table: EngineTable, *, by_turns: bool) -> None:
        self._table = table
        self._by_turns = by_turns
        self._last_turn = NOBODY
        self._totals = GroupTotals()
        self._waiting_tokens: dict[int, int] = {}
        self._hbm_max: dict[int, int] = {}
        self._arrivals: deque[RequestEntry] = deque()
        self._groups: dict[int, deque[RequestEntry]] = {}
        self._memory_max = 0
        self._nowhere: deque[RequestEntry] = deque()
        """Those for which there is no decode group."""

    def group_changed(self, group: int) -> None:
        """A decode group has other members. What none of them could ever hold goes to other groups:
        it would stand before all others."""
        members = self._table.members[group]
        if members:
            most = max([self._table.hbm[index] for index in members])
            self._groups.setdefault(group, deque())
            self._waiting_tokens.setdefault(group, 0)
            waiting, self._nowhere = self._nowhere, deque()
            if most < self._hbm_max.get(group, 0):
                waiting.extend(self._take_larger(group, most))
            self._hbm_max[group] = most
            self.loads_changed(group)
        else:
            self._totals.remove(group)
            self._hbm_max.pop(group, None)
            self._waiting_tokens.pop(group, None)
            waiting = self._groups.pop(group, deque())
        self._memory_max = max(self._hbm_max.values(), default=0)
        self.wait_for_decode([entry for entry in waiting if not entry.gone])

    def loads_changed(self, group: int) -> None:
        """The tokens of a decode group's engines have changed."""
        waiting = self._waiting_tokens.get(group)
        if waiting is not None:
            tokens = self._table.tokens
            total = sum([tokens[index] for index in self._table.members[group]])
            self._totals.set(group, total + waiting)

    def memory_max(self) -> int:
        """The most memory of any decode engine, in tokens of KV; 0: there is no decode engine."""
        return self._memory_max

    def unfitting(self) -> list[RequestEntry]:
        """Those that no decode engine could ever hold, while there are decode engines."""
        if not self._memory_max:
            return []
        return [entry for entry in self._nowhere if not entry.gone]

    def add(self, entry: RequestEntry) -> None:
        """A new request waits for both engines."""
        self._arrivals.append(entry)
        queue = self._join(entry)
        queue.append(entry)

    def wait_for_prefill(self, entries: Iterable[RequestEntry]) -> None:
        """Requests wait for a prefill engine again, at their places by arrival."""
        self._arrivals = _merged(self._arrivals, entries)

    def wait_for_decode(self, entries: Iterable[RequestEntry]) -> None:
        """Requests wait for a decode engine again, in some group's queue, by arrival."""
        for entry in sorted(entries, key=_number):
            queue = self._join(entry)
            if queue and queue[-1].number > entry.number:
                merged = _merged(queue, [entry])
                queue.clear()
                queue.extend(merged)
            else:
                queue.append(entry)

    def next_arrival(self) -> RequestEntry | None:
        """The first request that waits for a prefill engine."""
        queue = self._arrivals
        while queue and queue[0].gone:
            queue.popleft()
        return queue[0] if queue else None

    def arrival_taken(self) -> None:
        """The first has one."""
        self._arrivals.popleft()

    def next_in(self, group: int) -> RequestEntry | None:
        """The first request that waits for a decode engine of a group."""
        queue = self._groups[group]
        while queue and queue[0].gone:
            queue.popleft()
        return queue[0] if queue else None

    def taken_in(self, group: int) -> None:
        """The first has one: its tokens are no longer waiting, but its engine's."""
        entry = self._groups[group].popleft()
        self._waiting_tokens[group] -= entry.request.tokens

    def requests_in(self, group: int) -> Iterator[Request]:
        """What waits for a group, in order."""
        return (entry.request for entry in self._groups.get(group, ()) if not entry.gone)

    def gone(self, entry: RequestEntry) -> None:
        """A request has left that may stand in a queue; `entry.gone` is set."""
        if entry.decode == NOBODY and entry.group != NOBODY:
            self._waiting_tokens[entry.group] -= entry.request.tokens
            self._totals.add(entry.group, -entry.request.tokens)

    def sweep(self, live: int) -> None:
        """Let go of those that have gone, once they are many beside `live` requests."""
        for queue in (self._arrivals, self._nowhere, *self._groups.values()):
            if len(queue) > 2 * live + _GONE_MAX:
                kept = [entry for entry in queue if not entry.gone]
                queue.clear()
                queue.extend(kept)

    def overdue(self, before_s: float) -> list[RequestEntry]:
        """Those that wait and arrived no later than `before_s`, in order of arrival."""
        found: dict[int, RequestEntry] = {}
        for queue in (self._arrivals, self._nowhere, *self._groups.values()):
            for entry in queue:
                if entry.gone:
                    continue
                if entry.arrived_s > before_s:
                    break
                found[entry.number] = entry
        return [found[number] for number in sorted(found)]

    def _take_larger(self, group: int, most: int) -> list[RequestEntry]:
        """Take out of a group's queue those that need more memory than `most`."""
        queue = self._groups[group]
        waiting, larger = [entry for entry in queue if not entry.gone], []
        queue.clear()
        for entry in waiting:
            if entry.request.memory_tokens > most:
                larger.append(entry)
                self._waiting_tokens[group] -= entry.request.tokens
            else:
                queue.append(entry)
        return larger

    def _join(self, entry: RequestEntry) -> deque[RequestEntry]:
        group = self._choose_group(entry.request.memory_tokens)
        entry.group = group
        if group == NOBODY:
            return self._nowhere
        self._waiting_tokens[group] += entry.request.tokens
        self._totals.add(group, entry.request.tokens)
        return self._groups[group]

    def _choose_group(self, memory: int) -> int:
        """The paper's first level: the least total tok_e, of groups that could ever hold it."""
        fitting = self._hbm_max
        if self._by_turns:
            groups = [group for group in self._totals.groups() if fitting[group] >= memory]
            later = [group for group in groups if group > self._last_turn]
            self._last_turn = (later or groups or [NOBODY])[0]
            return self._last_turn
        least = self._totals.least()
        if least is None:
            return NOBODY
        if fitting[least] >= memory:
            return least
        total = self._totals.total
        groups = [group for group, most in fitting.items() if most >= memory]
        return min(groups, key=lambda group: (total(group), group), default=NOBODY)


def _number(entry: RequestEntry) -> int:
    return entry.number


def _merged(queue: deque[RequestEntry], entries: Iterable[RequestEntry]) -> deque[RequestEntry]:
    return deque(heapq.merge(queue, sorted(entries, key=_number), key=_number))

"""The scheduler: which prefill and which decode engine a request gets, and who reads its hits.

Pure: no I/O, no clock, `now` (seconds, never falling) is handed in. The service and the simulator
drive the same object. One thread at a time.

A request that is submitted waits in two queues: for a prefill engine, any group's, and for an
engine of the decode group that it is routed to. Fetches by prefill and decode groups take it from
them in either order. The fetch by which its second engine is known returns its assignment, once,
whichever group that is: the driver tells both sides. So each group's fetch decides for its own
engines only (arXiv 2602.21548, "Scheduler").

The driver reports a group's load with each of its fetches (`report`), and tells when a request's
prefill and decode are done (`prefilled`, `finished`) or an engine is lost (`lost`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dualpath.scheduler.assignment import Assignment, Failure, Loss
from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec, Role
from dualpath.scheduler.engine_table import EngineTable
from dualpath.scheduler.group_report import GroupReport
from dualpath.scheduler.load_ledger import LoadLedger
from dualpath.scheduler.policies import Policies
from dualpath.scheduler.request import Request
from dualpath.scheduler.request_entry import NOBODY, RequestEntry
from dualpath.scheduler.request_queues import RequestQueues
from dualpath.scheduler.settings import SchedulerLimits
from dualpath.transfer.errors import InvalidRequest, Overloaded

FULL_RETRY_S = 1.0
"""After this a request that was refused for want of room may be submitted again."""

_EXPIRY_CHECKS = 16
"""Looks for overdue requests in each `queue_s`."""


@dataclass(frozen=True, slots=True)
class SchedulerCounts:
    """What is there now: engines, requests that wait for an engine, and requests that have both."""

    engines: int
    waiting: int
    assigned: int


class Scheduler:
    """See the module docstring."""

    def __init__(self, policies: Policies, limits: SchedulerLimits | None = None) -> None:
        self._policies = policies
        self._limits = limits or SchedulerLimits()
        self.table = EngineTable(self._limits)
        """Read by policies, metrics and tests; changed here only."""
        self._ledger = LoadLedger(self.table)
        self._queues = RequestQueues(self.table, by_turns=policies.decode.by_turns)
        self._entries: dict[str, RequestEntry] = {}
        self._held: dict[int, dict[str, RequestEntry]] = {}
        self._leaving: set[int] = set()
        self._report_numbers: dict[str, int] = {}
        self._failures: list[Failure] = []
        self._arrivals = 0
        self._assignments = 0
        self._assigned = 0
        self._next_expiry = 0.0

    def register(self, engine: EngineSpec, node: NodeSpec | None = None) -> None:
        """An engine takes work from now on; `node` says more of its node. Again: no change.

        Raises InvalidRequest (known otherwise; a group of two roles; a node in two groups) and
        Overloaded (limits).
        """
        if node is not None and node.name != engine.node:
            raise InvalidRequest(
                f"engine '{engine.name}' lies on node '{engine.node}', not '{node.name}'"
            )
        known = engine.name in self.table.engine_index
        if engine.role is Role.PREFILL:
            self._policies.check(node or self.table.node_named(engine.node))
        index = self.table.add(engine)
        if node is not None:
            self.table.describe(node)
        if known:
            if index in self._leaving:
                raise InvalidRequest(
                    f"engine '{engine.name}' is leaving; register it when its requests are done"
                )
            return
        self._ledger.engine_added(index)
        self._held[index] = {}
        if engine.role is Role.DECODE:
            self._queues.group_changed(self.table.group_of[index])

    def leave(self, engine: str) -> None:
        """An engine gets no more work and goes when its requests are done. Unknown: no change."""
        index = self.table.engine_index.get(engine)
        if index is None or index in self._leaving:
            return
        self._leaving.add(index)
        self.table.withdraw(index)
        if self.table.spec[index].role is Role.DECODE:
            self._queues.group_changed(self.table.group_of[index])
        self._let_go(index)
        self._give_up_unfitting()

    def is_leaving(self, engine: EngineSpec) -> bool:
        """Whether this very engine has been told to leave, and has requests still."""
        index = self.table.engine_index.get(engine.name)
        return index in self._leaving and self.table.spec[index] == engine

    def report(self, report: GroupReport) -> bool:
        """Take a group's report; False if it is not newer than its last, and changes nothing.

        Raises InvalidRequest if it names engines or nodes that are not of its group.
        """
        if report.number and report.number <= self._report_numbers.get(report.group, 0):
            return False
        self._ledger.check(report)
        if report.number:
            self._report_numbers[report.group] = report.number
        self._ledger.report(report)
        self._queues.loads_changed(self.table.group_index[report.group])
        return True

    def submit(self, request: Request, now: float) -> None:
        """A request arrives. The same one again changes nothing while it is known.

        Raises InvalidRequest (its id is known with other values; it fits no engine's memory) and
        Overloaded (`requests_max`).
        """
        known = self._entries.get(request.id)
        if known is not None:
            if known.request != request:
                raise InvalidRequest(
                    f"request '{request.id}' is known as {known.request}, now comes as {request}"
                )
            return
        if len(self._entries) >= self._limits.requests_max:
            raise Overloaded(
                f"{len(self._entries)} requests are known, the most that requests_max allows",
                retry_after_s=FULL_RETRY_S,
            )
        most = self._queues.memory_max()
        if most and request.memory_tokens > most:
            raise InvalidRequest(
                f"request '{request.id}' needs memory for {request.memory_tokens} tokens; the "
                f"largest decode engine holds {most}"
            )
        self._arrivals += 1
        entry = RequestEntry(request, self._arrivals, now)
        self._entries[request.id] = entry
        self._queues.add(entry)

    def fetch(self, group: str, now: float) -> tuple[Assignment, ...]:
        """Give work to a group's engines; the assignments that became complete by it.

        At most `fetch_max`: a driver that gets so many fetches again. Raises InvalidRequest if
        the group is not registered.
        """
        index = self.table.group(group)
        self.expire(now)
        if not self.table.members[index]:
            return ()
        if self.table.role[index] is Role.PREFILL:
            return tuple(self._fetch_prefill(index))
        return tuple(self._fetch_decode(index))

    def prefilled(self, request: str) -> None:
        """The prompt's KV is at the decode engine, whose host memory is free again. Unknown or
        not assigned: no change."""
        entry = self._entries.get(request)
        if entry is None or entry.told is None or entry.prefilled:
            return
        entry.prefilled = True
        table, ledger, number = self.table, self._ledger, entry.told.number
        prefill, staging = entry.prefill, table.staging
        node, decode_node = table.node_of[prefill], table.node_of[entry.decode]
        staging[node] -= entry.prefill_staging
        staging[decode_node] -= entry.decode_staging
        entry.prefill_staging = entry.decode_staging = 0
        if ledger.unseen[prefill]:
            ledger.dropped(prefill, number)
        if ledger.unseen_reads[node]:
            ledger.read(node, number)
        if ledger.unseen_reads[decode_node]:
            ledger.read(decode_node, number)
        entry.prefill = NOBODY
        self._drop(prefill, entry)

    def finished(self, request: str) -> None:
        """A request is done, or its caller has gone: forget it. Unknown: no change."""
        entry = self._entries.get(request)
        if entry is not None:
            self._forget(entry)

    def lost(self, *engines: str) -> Loss:
        """Engines have died; they are registered no more. Unknown ones: no change.

        A request that lacked an engine still, or that has not been prefilled, is queued again at
        its place by arrival; it fails if its decode had begun or after `attempts_max`.
        """
        indices = [
            index for name in engines if (index := self.table.engine_index.get(name)) is not None
        ]
        touched = {entry.number: entry for index in indices for entry in self._held[index].values()}
        dead = set(indices)
        self._leaving -= dead
        withdrawn: list[Assignment] = []
        failed: list[Failure] = []
        again: list[RequestEntry] = []
        for number in sorted(touched):
            entry = touched[number]
            if entry.told is not None and {entry.prefill, entry.decode} - dead - {NOBODY}:
                withdrawn.append(entry.told)
            reason = self._fatal(entry)
            if reason:
                failed.append(Failure(entry.request, "engine_lost", reason))
                self._forget(entry)
            else:
                again.append(entry)
        no_prefill, no_decode = self._unassign(again, dead)
        groups = {self.table.group_of[index] for index in indices}
        for index in indices:
            self._leaving.add(index)
            self.table.withdraw(index)
        for group in groups:
            if self.table.role[group] is Role.DECODE:
                self._queues.group_changed(group)
        for index in indices:
            self._let_go(index)
        self._queues.wait_for_prefill(no_prefill)
        self._queues.wait_for_decode(no_decode)
        self._give_up_unfitting()
        return Loss(tuple(entry.request for entry in again), tuple(failed), tuple(withdrawn))

    def renumber_reports(self, group: str) -> None:
        """A group's reports begin at 1 again, since its leader did."""
        self._report_numbers.pop(group, None)

    def running(self, group: str) -> tuple[Assignment, ...]:
        """The assignments of a group's engines, in order, whose requests are not prefilled yet."""
        index = self.table.group_index.get(group)
        found = {
            entry.told.number: entry.told
            for engine, held in self._held.items()
            if self.table.group_of[engine] == index
            for entry in held.values()
            if entry.told is not None and not entry.prefilled
        }
        return tuple(found[number] for number in sorted(found))

    def expire(self, now: float) -> None:
        """Give up what has waited longer than `queue_s`; `failures` tells. A fetch does it too."""
        if self._limits.queue_s and now >= self._next_expiry:
            self._expire(now)

    def failures(self) -> tuple[Failure, ...]:
        """Requests that were given up while they waited, each told once."""
        failures, self._failures = tuple(self._failures), []
        return failures

    def assignment(self, request: str) -> Assignment | None:
        """The assignment of a request that has one."""
        entry = self._entries.get(request)
        return entry.told if entry is not None else None

    def knows(self, request: str) -> bool:
        """Whether a request is queued or assigned."""
        return request in self._entries

    def counts(self) -> SchedulerCounts:
        """For metrics."""
        return SchedulerCounts(
            len(self.table.engine_index), len(self._entries) - self._assigned, self._assigned
        )

    def _fetch_prefill(self, group: int) -> Iterable[Assignment]:
        turn = self._policies.prefill.round(self.table, group)
        queues, ledger, table = self._queues, self._ledger, self.table
        made: list[Assignment] = []
        for _ in range(self._limits.fetch_max):
            entry = queues.next_arrival()
            if entry is None:
                break
            request = entry.request
            engine = turn.choose(request)
            if engine is None:
                break
            queues.arrival_taken()
            entry.prefill = engine
            self._held[engine][request.id] = entry
            first = entry.decode == NOBODY
            ledger.chosen(engine, request.tokens, 0, first=first)
            entry.prefill_staging = request.hit_tokens
            table.staging[table.node_of[engine]] += request.hit_tokens
            if not first:
                made.append(self._assign(entry, prefill_first=False))
            turn.placed(engine)
        return made

    def _fetch_decode(self, group: int) -> Iterable[Assignment]:
        queues, ledger, table = self._queues, self._ledger, self.table
        if queues.next_in(group) is None:
            return ()
        turn = self._policies.decode.round(table, group, queues.requests_in(group))
        made: list[Assignment] = []
        for _ in range(self._limits.fetch_max):
            entry = queues.next_in(group)
            if entry is None:
                break
            request = entry.request
            engine = turn.choose(request)
            if engine is None:
                break
            queues.taken_in(group)
            entry.decode = engine
            self._held[engine][request.id] = entry
            tokens, first = request.tokens, entry.prefill == NOBODY
            ledger.chosen(engine, tokens, tokens + request.new_output_bound, first=first)
            entry.decode_staging = tokens
            table.staging[table.node_of[engine]] += tokens
            if not first:
                made.append(self._assign(entry, prefill_first=True))
            turn.placed(engine)
        return made

    def _assign(self, entry: RequestEntry, *, prefill_first: bool) -> Assignment:
        table, request = self.table, entry.request
        prefill, decode = entry.prefill, entry.decode
        read = self._policies.read.share(
            table, request, table.node_of[prefill], table.node_of[decode]
        )
        if read.prefill < 1.0:
            kept = math.ceil(read.prefill * request.hit_tokens)
            table.staging[table.node_of[prefill]] -= entry.prefill_staging - kept
            entry.prefill_staging = kept
        self._assignments += 1
        self._assigned += 1
        assignment = Assignment(
            self._assignments, request, table.spec[prefill].name, table.spec[decode].name, read
        )
        entry.told = assignment
        entry.attempts += 1
        self._ledger.assigned(assignment, entry, prefill_first=prefill_first)
        return assignment

    def _fatal(self, entry: RequestEntry) -> str:
        """Why a request whose engine is lost is not tried again; "": it is."""
        if entry.prefilled:
            return "the engine that decoded it was lost"
        if entry.told is not None and entry.attempts >= self._limits.attempts_max:
            return f"its engines were lost {entry.attempts} times, as often as attempts_max allows"
        return ""

    def _unassign(
        self, entries: list[RequestEntry], dead: set[int]
    ) -> tuple[list[RequestEntry], list[RequestEntry]]:
        """Those that now lack a prefill, and those that lack a decode engine. A request that had
        both loses both, since both have begun to work for it."""
        no_prefill, no_decode = [], []
        for entry in entries:
            told = entry.told is not None
            if entry.prefill != NOBODY and (told or entry.prefill in dead):
                self._leave_prefill(entry)
                no_prefill.append(entry)
            if entry.decode != NOBODY and (told or entry.decode in dead):
                self._leave_decode(entry)
                no_decode.append(entry)
            if told:
                entry.told = None
                self._assigned -= 1
        return no_prefill, no_decode

    def _leave_prefill(self, entry: RequestEntry) -> None:
        node = self.table.node_of[entry.prefill]
        self.table.staging[node] -= entry.prefill_staging
        entry.prefill_staging = 0
        if entry.told is None:
            self._ledger.unchosen(entry.prefill, entry.request.tokens, 0)
        else:
            self._ledger.dropped(entry.prefill, entry.told.number)
            self._ledger.read(node, entry.told.number)
        self._drop(entry.prefill, entry)
        entry.prefill = NOBODY

    def _leave_decode(self, entry: RequestEntry) -> None:
        node, request = self.table.node_of[entry.decode], entry.request
        self.table.staging[node] -= entry.decode_staging
        entry.decode_staging = 0
        if entry.told is None:
            self._ledger.unchosen(entry.decode, request.tokens, request.memory_tokens)
        else:
            self._ledger.released(entry.decode, request.tokens + request.new_output_bound)
            if self._ledger.unseen[entry.decode]:
                self._ledger.dropped(entry.decode, entry.told.number)
            if self._ledger.unseen_reads[node]:
                self._ledger.read(node, entry.told.number)
        self._drop(entry.decode, entry)
        entry.decode = NOBODY

    def _forget(self, entry: RequestEntry) -> None:
        del self._entries[entry.request.id]
        entry.gone = True
        self._queues.gone(entry)
        if entry.told is not None:
            self._assigned -= 1
        if entry.prefill != NOBODY:
            self._leave_prefill(entry)
        if entry.decode != NOBODY:
            self._leave_decode(entry)

    def _drop(self, engine: int, entry: RequestEntry) -> None:
        del self._held[engine][entry.request.id]
        if engine in self._leaving:
            self._let_go(engine)

    def _let_go(self, index: int) -> None:
        """Forget a leaving engine without requests."""
        if index in self._leaving and not self._held[index]:
            self._leaving.discard(index)
            del self._held[index]
            group = self.table.spec[index].group
            self.table.remove(index)
            if group not in self.table.group_index:
                self._report_numbers.pop(group, None)

    def _give_up_unfitting(self) -> None:
        """What no engine that is left could ever hold must not hold a prefill engine's place."""
        for entry in self._queues.unfitting():
            most = self._queues.memory_max()
            text = f"it needs memory for {entry.request.memory_tokens} tokens; the largest decode "
            text += f"engine that is left holds {most}"
            self._failures.append(Failure(entry.request, "no_engine_fits", text))
            self._forget(entry)

    def _expire(self, now: float) -> None:
        queue_s = self._limits.queue_s
        self._next_expiry = now + queue_s / _EXPIRY_CHECKS
        for entry in self._queues.overdue(now - queue_s):
            self._failures.append(
                Failure(
                    entry.request,
                    "queue_timeout",
                    f"not assigned for {queue_s} s, as long as queue_s allows",
                )
            )
            self._forget(entry)
        self._queues.sweep(len(self._entries))

"""Between streams and the scheduler: who leads which group, who is told what, who has died.

No I/O: what comes in are checked values and the time (seconds, never falling), what goes out are
events in outboxes. All of it in one thread.

What outlives what: a leader whose stream ends may come back within `rejoin_s`, and is told again
of what it may have missed; else, or if it says nothing for `report_timeout_s`, its engines are lost
and their requests queued again, or failed by name. A front end whose stream ends takes its requests
without engines along; those with engines go on, and are its own again if it sends them again. After
a restart of this process leaders register and report again, so that the load of their engines is
known with their first reports; front ends send again what had no engines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from time import perf_counter

from dualpath.kvstore.service.histogram import Histogram
from dualpath.scheduler.assignment import Assignment, Failure
from dualpath.scheduler.config import SchedulerConfig
from dualpath.scheduler.engine_spec import EngineSpec
from dualpath.scheduler.leader import FrontEnd, Leader, LeaderMessage
from dualpath.scheduler.outbox import Ended, Event, Outbox, Requeued, Withdrawn
from dualpath.scheduler.policies import named_policies
from dualpath.scheduler.request import Request
from dualpath.scheduler.scheduler import FULL_RETRY_S, Scheduler
from dualpath.transfer.errors import (
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    Unavailable,
)


class Hub:
    """See the module docstring."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        policies = named_policies(config.policy, config.policy_settings)
        self.scheduler = Scheduler(policies, config.limits)
        self.leaders: dict[str, Leader] = {}
        self.front_ends: set[FrontEnd] = set()
        self._owners: dict[str, FrontEnd] = {}
        self.events: Counter[str] = Counter()
        """What happened, by word: submitted, assigned, finished, requeued, stale_report, ..."""
        self.fetch_s = Histogram()

    # Leaders.

    def lead(self, message: LeaderMessage, principal: str, now: float) -> Leader:
        """A leader comes, or comes back: take its first message.

        Raises PermissionDenied if another principal leads the group, and what `register` raises.
        """
        if not message.engines:
            raise InvalidRequest("the first message of a leader names its group and its engines")
        old = self.leaders.get(message.group)
        if old is not None and old.principal != principal:
            raise PermissionDenied(
                f"group '{message.group}' is led by another principal; name another group"
            )
        leader = Leader(message.group, principal, Outbox(), now)
        if old is not None:
            old.outbox.close(
                Unavailable(f"group '{message.group}' has a new leader", reason="replaced")
            )
            leader.engines |= old.engines
            same = {engine.name for engine in message.engines if not self._moved(engine)}
            self._lose(leader, sorted(old.engines - same))
        self.leaders[message.group] = leader
        self.scheduler.renumber_reports(message.group)
        try:
            self.hear(leader, message, now)
        except DualPathError:
            self.left(leader, now)
            raise
        told = self.scheduler.running(message.group)
        waiting = leader.outbox.drain()
        for event in dict.fromkeys((*told, *waiting)):
            leader.outbox.put(event)
        return leader

    def hear(self, leader: Leader, message: LeaderMessage, now: float) -> None:
        """A leader says something; with a report it fetches.

        Raises Unavailable if it leads no more, InvalidRequest for what is wrong: its stream ends.
        """
        if self.leaders.get(leader.group) is not leader:
            raise Unavailable(f"group '{leader.group}' has another leader", reason="replaced")
        if message.group not in ("", leader.group):
            raise InvalidRequest(
                f"this stream leads group '{leader.group}', not '{message.group}'; open another"
            )
        leader.heard_at = now
        self._register(leader, message)
        for name in message.leaving:
            self._check_own(leader, name)
            self.scheduler.leave(name)
        for name in message.lost:
            self._check_own(leader, name)
        self._lose(leader, message.lost)
        for request in message.prefilled:
            if self._serves(leader, request):
                self.scheduler.prefilled(request)
        for request in message.finished:
            if self._serves(leader, request):
                self.scheduler.finished(request)
                self._end(Ended(request))
        if message.report is not None:
            self._fetch(leader, message, now)

    def left(self, leader: Leader, now: float) -> None:
        """A leader's stream has ended."""
        leader.outbox.close()
        if self.leaders.get(leader.group) is leader and leader.gone_at is None:
            leader.gone_at = now

    # Front ends.

    def join(self, principal: str) -> FrontEnd:
        """A front end comes. Raises Overloaded."""
        if len(self.front_ends) >= self._config.front_ends_max:
            raise Overloaded(
                f"{len(self.front_ends)} front ends are there, as many as front_ends_max allows",
                retry_after_s=FULL_RETRY_S,
            )
        front_end = FrontEnd(principal, Outbox())
        self.front_ends.add(front_end)
        return front_end

    def submit(self, front_end: FrontEnd, request: Request, now: float) -> None:
        """A request comes, or comes again; what is wrong with it ends it, not the stream."""
        try:
            self._check_submission(front_end, request)
            self.scheduler.submit(request, now)
        except Overloaded as error:
            front_end.outbox.put(Ended(request.id, "overloaded", str(error), error.retry_after_s))
            return
        except InvalidRequest as error:
            front_end.outbox.put(Ended(request.id, "invalid", str(error)))
            return
        if request.id not in front_end.requests:
            self.events["submitted"] += 1
        self._owners[request.id] = front_end
        front_end.requests.add(request.id)
        known = self.scheduler.assignment(request.id)
        if known is not None:
            front_end.outbox.put(known)

    def cancel(self, front_end: FrontEnd, request: str) -> None:
        """A front end wants a request no more. One that is not its own: no change."""
        if request not in front_end.requests:
            return
        self._withdraw(request)
        self.scheduler.finished(request)
        self._end(Ended(request, "cancelled"))

    def parted(self, front_end: FrontEnd) -> None:
        """A front end's stream has ended."""
        front_end.outbox.close()
        self.front_ends.discard(front_end)
        for request in sorted(front_end.requests):
            if self.scheduler.assignment(request) is None:
                self.scheduler.finished(request)
            self._owners.pop(request, None)
        front_end.requests.clear()

    # Time.

    def tick(self, now: float) -> None:
        """Time has passed: leaders that are silent or gone, requests that waited too long."""
        config = self._config
        for leader in list(self.leaders.values()):
            gone = leader.gone_at is not None and now - leader.gone_at >= config.rejoin_s
            silent = leader.gone_at is None and now - leader.heard_at >= config.report_timeout_s
            if not (gone or silent):
                continue
            leader.outbox.close(
                DeadlineExceeded(
                    f"no message for {config.report_timeout_s} s, as long as report_timeout_s "
                    f"allows; the engines of group '{leader.group}' count as lost",
                    reason="stalled",
                )
            )
            del self.leaders[leader.group]
            self.events["leader_silent" if silent else "leader_gone"] += 1
            self._lose(leader, sorted(leader.engines))
        self.scheduler.expire(now)
        self._fail(self.scheduler.failures())

    def _register(self, leader: Leader, message: LeaderMessage) -> None:
        nodes = {node.name: node for node in message.nodes}
        for engine in message.engines:
            # A leader that comes back names also those that it has told to leave.
            if not self.scheduler.is_leaving(engine):
                self.scheduler.register(engine, nodes.get(engine.node))
            leader.engines.add(engine.name)

    def _moved(self, engine: EngineSpec) -> bool:
        """Whether an engine comes back as another: what it had been given died with the first."""
        table = self.scheduler.table
        index = table.engine_index.get(engine.name)
        return index is not None and table.spec[index] != engine

    def _check_own(self, leader: Leader, engine: str) -> None:
        if engine not in leader.engines:
            raise InvalidRequest(f"engine '{engine}' is none of group '{leader.group}'")

    def _serves(self, leader: Leader, request: str) -> bool:
        """Whether a request is this group's: what is said late of another's is passed over."""
        known = self.scheduler.assignment(request)
        served = known is not None and bool({known.prefill, known.decode} & leader.engines)
        if not served:
            self.events["stale_word"] += 1
        return served

    def _fetch(self, leader: Leader, message: LeaderMessage, now: float) -> None:
        began = perf_counter()
        assert message.report is not None
        if not self.scheduler.report(message.report):
            self.events["stale_report"] += 1
            return
        made: list[Assignment] = []
        while True:
            some = self.scheduler.fetch(leader.group, now)
            made += some
            if len(some) < self._config.limits.fetch_max:
                break
        self.fetch_s.observe(perf_counter() - began)
        for one in made:
            self.events["assigned"] += 1
            self._tell_engines(one, one)
            owner = self._owners.get(one.request.id)
            if owner is not None:
                owner.outbox.put(one)
        self._fail(self.scheduler.failures())

    def _tell_engines(self, assignment: Assignment, event: Event) -> None:
        """Tell the leaders of both engines, once if it is the same."""
        table = self.scheduler.table
        groups = {
            table.spec[index].group
            for engine in (assignment.prefill, assignment.decode)
            if (index := table.engine_index.get(engine)) is not None
        }
        for group in sorted(groups):
            leader = self.leaders.get(group)
            if leader is not None:
                leader.outbox.put(event)

    def _withdraw(self, request: str) -> None:
        known = self.scheduler.assignment(request)
        if known is not None:
            self._tell_engines(known, Withdrawn(request))

    def _lose(self, leader: Leader, engines: Iterable[str]) -> None:
        names = tuple(engines)
        if not names:
            return
        leader.engines.difference_update(names)
        self.events["engine_lost"] += len(names)
        loss = self.scheduler.lost(*names)
        for assignment in loss.withdrawn:
            self._tell_engines(assignment, Withdrawn(assignment.request.id))
        for request in loss.requeued:
            self.events["requeued"] += 1
            owner = self._owners.get(request.id)
            if owner is not None:
                owner.outbox.put(Requeued(request.id))
        self._fail(loss.failed)

    def _fail(self, failures: Iterable[Failure]) -> None:
        for failure in failures:
            self._end(Ended(failure.request.id, failure.reason, failure.message))

    def _end(self, event: Ended) -> None:
        self.events[event.reason or "finished"] += 1
        owner = self._owners.pop(event.request, None)
        if owner is not None:
            owner.requests.discard(event.request)
            owner.outbox.put(event)

    def _check_submission(self, front_end: FrontEnd, request: Request) -> None:
        owner = self._owners.get(request.id)
        if owner is not None and owner.principal != front_end.principal:
            raise InvalidRequest(f"request '{request.id}' is another's; choose another id")
        if owner is not None and owner is not front_end:
            owner.requests.discard(request.id)
        if len(front_end.requests) >= self._config.front_end_requests_max:
            raise Overloaded(
                f"{len(front_end.requests)} requests of this front end are known, as many as "
                f"front_end_requests_max allows",
                retry_after_s=FULL_RETRY_S,
            )

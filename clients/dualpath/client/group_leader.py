"""The leader of a group of engines: registers them, reports their load, hears what they are to do.

Owns the group's stream to the scheduler and what must outlive a break of it. Reports fetch: the
more often, the sooner requests get engines. Belongs to one event loop.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from dualpath.client.scheduler_messages import assignment_of, first_message, report_message
from dualpath.client.scheduler_stream import SchedulerStream
from dualpath.proto.tls import NO_TLS, Tls
from dualpath.proto.v1 import scheduler_pb2
from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec
from dualpath.scheduler.group_report import EngineReport, GroupReport, NodeReport
from dualpath.transfer.errors import DualPathError, InvalidRequest

READY_S_MAX = 10.0
WORDS_KEPT = 4096
"""Words about requests that are said again on a new stream: the last of a broken one may be lost.
What the scheduler knows already it passes over."""


class GroupLeader:
    """See the module docstring. `assigned` and `withdrawn` are called in the loop, once for each
    assignment, also where the scheduler tells it again after a break. A restarted scheduler knows
    nothing of what was assigned before: its engines go on, and their load is in the reports.

    Raises InvalidRequest without engines, or for engines of several groups or roles.
    """

    def __init__(
        self,
        scheduler: str,
        engines: Iterable[EngineSpec],
        nodes: Iterable[NodeSpec] = (),
        *,
        assigned: Callable[[Assignment], None],
        withdrawn: Callable[[str], None],
        token: str = "",
        tls: Tls = NO_TLS,
    ) -> None:
        self._engines = {one.name: one for one in engines}
        self._leaving: set[str] = set()
        self._nodes = tuple(nodes)
        places = {(one.group, one.role) for one in self._engines.values()}
        if len(places) != 1:
            raise InvalidRequest(
                f"a leader has engines of one group and role, not of {len(places)}; lead each group"
            )
        ((self.group, self._role),) = places
        self._assigned, self._withdrawn = assigned, withdrawn
        self._running: dict[str, int] = {}
        self._over: OrderedDict[str, int] = OrderedDict()
        self._words: deque[scheduler_pb2.LeadRequest] = deque(maxlen=WORDS_KEPT)
        self._reports = 0
        self._latest = 0
        self.failure: DualPathError | None = None
        """Why the scheduler refuses this leader for good; None while it does not."""
        self._stream: SchedulerStream[scheduler_pb2.LeadRequest, scheduler_pb2.LeadResponse]
        self._stream = SchedulerStream(
            scheduler, "Lead", self._greet, self._hear, self._refused, token=token, tls=tls
        )

    async def ready(self, deadline_s: float = READY_S_MAX) -> None:
        """Wait until the scheduler answers. Raises Unavailable, or why it refuses."""
        await self._stream.ready(deadline_s)

    @property
    def latest(self) -> int:
        """The highest number of an assignment that came by this stream: what a report made now has
        seen, once all of these are among the engines' loads."""
        return self._latest

    def report(
        self,
        engines: Iterable[EngineReport],
        nodes: Iterable[NodeReport] = (),
        *,
        seen: int | None = None,
    ) -> None:
        """Say what the engines and nodes have to do, and fetch. `seen`: highest number of an
        assignment that these loads include (None: all that came). Not sent while the scheduler is
        away: an old report says nothing."""
        if not self._stream.up:
            return
        self._reports += 1
        seen = self._latest if seen is None else min(seen, self._latest)
        report = GroupReport(self.group, tuple(engines), tuple(nodes), seen=seen)
        message = report_message(report, self._reports)
        self._stream.say(scheduler_pb2.LeadRequest(report=message))

    def prefilled(self, *requests: str) -> None:
        """The KV of these prompts is at their decode engines."""
        self._word(scheduler_pb2.LeadRequest(prefilled=requests))

    def finished(self, *requests: str) -> None:
        """These requests are done."""
        for request in requests:
            number = self._running.pop(request, None)
            if number is not None:
                self._over[request] = number
                if len(self._over) > WORDS_KEPT:
                    self._over.popitem(last=False)
        self._word(scheduler_pb2.LeadRequest(finished=requests))

    def lost(self, *engines: str) -> None:
        """These engines have died."""
        for name in engines:
            self._engines.pop(name, None)
            self._leaving.discard(name)
        self._stream.say(scheduler_pb2.LeadRequest(lost=engines))

    def leave(self, *engines: str) -> None:
        """These engines take no more work, and go when they have done theirs. Report them until
        then, and say `lost` of one that ends before."""
        self._leaving.update(engines)
        self._stream.say(scheduler_pb2.LeadRequest(leaving=engines))

    async def close(self) -> None:
        """Lead no more: the scheduler gives the engines up after its `rejoin_s`. Idempotent."""
        await self._stream.close()

    def _word(self, message: scheduler_pb2.LeadRequest) -> None:
        self._words.append(message)
        self._stream.say(message)

    def _greet(self, known: bool) -> list[scheduler_pb2.LeadRequest]:
        self._reports = self._latest = 0
        if not known:
            self._words.clear()
            self._running.clear()
            self._over.clear()
        first = first_message(self.group, self._role, self._engines.values(), self._nodes)
        leaving = scheduler_pb2.LeadRequest(leaving=sorted(self._leaving))
        return [first, leaving, *self._words]

    def _hear(self, message: scheduler_pb2.LeadResponse) -> None:
        for name in message.withdrawn:
            if self._running.pop(name, None) is not None:
                self._withdrawn(name)
        for one in message.assignment:
            self._latest = max(self._latest, one.number)
            known = self._running.get(one.request, self._over.get(one.request, 0))
            if known < one.number:
                self._running[one.request] = one.number
                self._assigned(assignment_of(one))

    def _refused(self, error: DualPathError) -> None:
        self.failure = error

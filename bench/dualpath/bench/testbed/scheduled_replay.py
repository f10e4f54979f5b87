"""Replays a workload under a scheduler: its requests queue there, and go where it says.

Owns the leaders of the two groups, the front end and the pool of workers. Each turn is a request;
the prefill engine that it gets loads its hits with the assignment's read shares, and hands the
prompt off to the decode engine that it gets. Nothing is computed: a request has been prefilled once
it is handed off.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace

from dualpath.bench.testbed.cluster import SCHEDULER, Cluster
from dualpath.bench.testbed.decode_engine import DecodeEngine
from dualpath.bench.testbed.engine import NEW_BLOCKS, LoadOutcome, PrefillEngine
from dualpath.bench.testbed.engine_loads import EngineLoads
from dualpath.bench.testbed.scheduler_runs import scheduler_words
from dualpath.bench.testbed.workload import PlannedLoad, Workload
from dualpath.client.front_end import FrontEnd
from dualpath.client.group_leader import GroupLeader
from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec, Role
from dualpath.scheduler.request import Request
from dualpath.transfer.errors import DualPathError

FETCH_S = 0.02
"""Between a leader's reports."""
ROOM = 3
"""Memory of the decode engines in requests at once, so that it is not what binds."""
OnOutcome = Callable[[LoadOutcome], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledEngines:
    """Engines by their names, which are those of their agents and nodes; decode engines are None
    where nothing is handed off. `block_bytes`: of one block of KV."""

    prefill: Mapping[str, PrefillEngine]
    decode: Mapping[str, DecodeEngine | None]
    block_bytes: int


@contextlib.asynccontextmanager
async def scheduled_replay(
    cluster: Cluster,
    policy: str,
    workload: Workload,
    engines: ScheduledEngines,
    *,
    storage_bytes_per_s: float,
    concurrency: int,
    deadline_s: float,
) -> AsyncIterator[ScheduledReplay]:
    """A replay under a `dualpath scheduler` of its own, which runs meanwhile. `storage_bytes_per_s`
    of each node, 0: no limit."""
    prompt_tokens = (workload.load_blocks_max + NEW_BLOCKS) * workload.block_tokens
    tokens_max = ROOM * concurrency * prompt_tokens
    words = scheduler_words(
        policy,
        storage_bytes_per_s=storage_bytes_per_s,
        token_bytes=engines.block_bytes / workload.block_tokens,
        tokens_max=tokens_max,
    )
    address = await cluster.start_scheduler(words)
    try:
        yield ScheduledReplay(
            address,
            cluster,
            engines,
            hbm_tokens=tokens_max,
            concurrency=concurrency,
            deadline_s=deadline_s,
        )
    finally:
        await cluster.stop(SCHEDULER)


class _Group:
    """One group's leader with its reports."""

    def __init__(
        self, scheduler: str, role: Role, names: tuple[str, ...], cluster: Cluster, hbm_tokens: int
    ) -> None:
        self.loads = EngineLoads(names)
        self.leader = GroupLeader(
            scheduler,
            [EngineSpec(name, role, f"{role.value}-group", name, hbm_tokens) for name in names],
            [NodeSpec(name) for name in names],
            assigned=lambda _: None,  # the front end hears of it too, and begins
            withdrawn=lambda _: None,
            token=cluster.token,
        )

    async def run(self) -> None:
        """Report and fetch until cancelled."""
        while True:
            engines, nodes, seen = self.loads.reports(self.leader.latest)
            self.leader.report(engines, nodes, seen=seen)
            await asyncio.sleep(FETCH_S)


class ScheduledReplay:
    """See the module docstring; `run` once."""

    def __init__(
        self,
        scheduler: str,
        cluster: Cluster,
        engines: ScheduledEngines,
        *,
        hbm_tokens: int,
        concurrency: int,
        deadline_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._cluster = cluster
        self._engines = engines
        self._hbm_tokens = hbm_tokens
        self._order = tuple(engines.prefill)
        self._concurrency = concurrency
        self._deadline_s = deadline_s

    async def run(
        self, workload: Workload, on_outcome: OnOutcome
    ) -> tuple[float, tuple[LoadOutcome, ...]]:
        """As `Replay.run`: seconds until the last load had ended, and what became of each. Raises
        Unavailable if the scheduler cannot be reached."""
        outcomes: list[LoadOutcome] = []
        waiting: deque[tuple[PlannedLoad, ...]] = deque(workload.sessions)
        async with (
            self._groups() as groups,
            FrontEnd(self._scheduler, token=self._cluster.token) as front,
        ):
            await front.ready()
            started_s = time.monotonic()

            async def work(tasks: asyncio.TaskGroup) -> None:
                while waiting:
                    for planned in waiting.popleft():
                        ending = await self._turn(front, groups, planned, workload)
                        tasks.create_task(keep(ending))

            async def keep(ending: Coroutine[None, None, LoadOutcome]) -> None:
                outcomes.append(await ending)
                on_outcome(outcomes[-1])

            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self._concurrency, len(waiting))):
                    tasks.create_task(work(tasks))
        ended_s = max((each.ended_s for each in outcomes), default=started_s)
        return ended_s - started_s, tuple(outcomes)

    @contextlib.asynccontextmanager
    async def _groups(self) -> AsyncIterator[tuple[_Group, _Group]]:
        """The prefill and the decode group, which report and fetch meanwhile."""
        groups = tuple(
            _Group(self._scheduler, role, tuple(names), self._cluster, hbm_tokens)
            for role, names, hbm_tokens in (
                (Role.PREFILL, self._engines.prefill, 0),
                (Role.DECODE, self._engines.decode, self._hbm_tokens),
            )
        )
        running: list[asyncio.Task[None]] = []
        try:
            for group in groups:
                await group.leader.ready()
            running += [asyncio.create_task(group.run()) for group in groups]
            yield groups[0], groups[1]
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for group in groups:
                await group.leader.close()

    async def _turn(
        self,
        front: FrontEnd,
        groups: tuple[_Group, _Group],
        planned: PlannedLoad,
        workload: Workload,
    ) -> Coroutine[None, None, LoadOutcome]:
        """One request until its hits are loaded; what follows is awaited later."""
        name = f"session-{planned.session}-{planned.turn}"
        blocks = len(planned.hashes)
        request = Request(
            name,
            (blocks + NEW_BLOCKS) * workload.block_tokens,
            blocks * workload.block_tokens,
            session=f"session-{planned.session}",
        )
        asked_s = time.monotonic()
        try:
            async with asyncio.timeout(self._deadline_s):
                assignment = await front.submit(request).assigned()
        except (DualPathError, TimeoutError) as error:
            return _refused(planned, asked_s, self._deadline_s, error)
        queued_s = time.monotonic() - asked_s
        prefill, decode = groups
        for group, engine, share in (
            (prefill, assignment.prefill, assignment.read.prefill),
            (decode, assignment.decode, assignment.read.decode),
        ):
            reads = share * request.hit_tokens
            group.loads.begin(name, assignment.number, engine, request.tokens, reads)
        verification = await self._engines.prefill[assignment.prefill].load(
            planned,
            policy="",
            decode_peer=assignment.decode,
            deadline_s=self._deadline_s,
            decode=self._engines.decode[assignment.decode],
            direct_share=assignment.read.prefill,
        )
        prefill.loads.end(name)
        decode.loads.loaded(name)
        return self._rest(verification, assignment, decode, queued_s)

    async def _rest(
        self,
        verification: asyncio.Task[LoadOutcome],
        assignment: Assignment,
        decode: _Group,
        queued_s: float,
    ) -> LoadOutcome:
        """The hand-off and the verification; then the request is over."""
        outcome = await verification
        name = assignment.request.id
        decode.loads.end(name)
        decode.leader.prefilled(name)
        decode.leader.finished(name)
        return replace(outcome, engine=self._order.index(assignment.prefill), queued_s=queued_s)


async def _refused(
    planned: PlannedLoad, asked_s: float, deadline_s: float, error: Exception
) -> LoadOutcome:
    """A request that got no engines."""
    now = time.monotonic()
    reason = error.reason if isinstance(error, DualPathError) else "not_assigned"
    return LoadOutcome(
        session=planned.session,
        turn=planned.turn,
        requested_blocks=len(planned.hashes),
        verified_blocks=0,
        corrupt_blocks=0,
        nbytes=0,
        ended_s=now,
        elapsed_s=now - asked_s,
        failure=reason,
        detail=str(error),
        shares={},
        events={},
        deadline_s=deadline_s,
        raised=True,
    )

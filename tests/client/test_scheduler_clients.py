"""Leaders and front ends of the client library: assignments, breaks, restarts, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from dualpath.client.front_end import FrontEnd
from dualpath.client.group_leader import GroupLeader
from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.config import SchedulerConfig
from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec, Role
from dualpath.scheduler.group_report import EngineReport
from dualpath.scheduler.hub import Hub
from dualpath.scheduler.leader import FrontEnd as FrontEndStream
from dualpath.scheduler.leader import Leader
from dualpath.scheduler.process import SchedulerServer
from dualpath.scheduler.request import Request
from dualpath.transfer.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    Unavailable,
)

WAIT_S = 30.0
PATIENT_S = 600.0
FETCH_S = 0.01


class Group:
    """A leader that reports all the time what it was told to do."""

    def __init__(self, address: str, role: Role, **settings: Any) -> None:
        self.engine = f"{role.value}-0"
        self.assigned: list[Assignment] = []
        self.withdrawn: list[str] = []
        self.leader = GroupLeader(
            address,
            [EngineSpec(self.engine, role, f"{role.value}-group", f"node-{role.value}", 10_000)],
            [NodeSpec(f"node-{role.value}", compute_tokens_per_s=1e6)],
            assigned=self.assigned.append,
            withdrawn=self.withdrawn.append,
            **settings,
        )

    async def run(self) -> None:
        while True:
            self.leader.report([EngineReport(self.engine, 0, 0)])
            await asyncio.sleep(FETCH_S)


@asynccontextmanager
async def serving(
    listen: str = "127.0.0.1:0", hubs: list[Hub] | None = None, **settings: Any
) -> AsyncIterator[str]:
    known = {"report_timeout_s": PATIENT_S, "rejoin_s": PATIENT_S}
    server = SchedulerServer(SchedulerConfig(listen=listen, **{**known, **settings}))
    where = await server.start()
    if hubs is not None:
        hubs.append(server.hub)
    try:
        yield str(where["listen"])
    finally:
        await server.stop()


@asynccontextmanager
async def groups(address: str, **settings: Any) -> AsyncIterator[tuple[Group, Group]]:
    both = [Group(address, role, **settings) for role in (Role.PREFILL, Role.DECODE)]
    for one in both:
        await one.leader.ready()
    running = [asyncio.create_task(one.run()) for one in both]
    try:
        yield both[0], both[1]
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for one in both:
            await one.leader.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.002)


def played(body: Callable[[], Any]) -> None:
    async def run() -> None:
        async with asyncio.timeout(2 * WAIT_S):
            await body()

    asyncio.run(run())


def test_all_sides_hear_of_an_assignment_and_of_its_end() -> None:
    async def body() -> None:
        async with serving() as address, groups(address) as both, FrontEnd(address) as front:
            await front.ready()
            one = front.submit(Request("r", 100, 50))
            assignment = await one.assigned()
            assert (assignment.prefill, assignment.decode) == ("prefill-0", "decode-0")
            assert (assignment.request.tokens, assignment.request.hit_tokens) == (100, 50)
            assert assignment.read.prefill + assignment.read.decode == 1
            for group in both:
                await until(lambda group=group: group.assigned == [assignment])  # type: ignore[misc]
            both[1].leader.prefilled("r")
            both[1].leader.finished("r")
            await one.ended()
            again = front.submit(Request("r", 100, 50))
            assert (await again.assigned()).number > assignment.number

    played(body)


def test_an_engine_that_leaves_goes_with_its_last_request_whatever_breaks() -> None:
    async def body() -> None:
        hubs: list[Hub] = []
        async with (
            serving(hubs=hubs) as address,
            groups(address) as both,
            FrontEnd(address) as front,
        ):
            first = front.submit(Request("a", 100, 50))
            await first.assigned()
            both[1].leader.leave("decode-0")
            hub = hubs[0]
            table = hub.scheduler.table
            await until(lambda: not table.members[table.group_index["decode-group"]])
            hub.leaders["decode-group"].outbox.close(Unavailable("cut"))
            await until(lambda: not both[1].leader._stream.up)
            await until(lambda: both[1].leader._stream.up)
            assert both[1].withdrawn == []
            both[1].leader.finished("a")
            await first.ended()
            await until(lambda: "decode-0" not in table.engine_index)

    played(body)


def test_after_a_restart_what_waits_is_sent_again_and_what_runs_goes_on() -> None:
    async def body() -> None:
        async with serving() as address:
            front = FrontEnd(address)
            await front.ready()
            async with groups(address) as both:
                running = front.submit(Request("running", 100, 50))
                await running.assigned()
                await until(lambda: len(both[1].assigned) == 1)
            waiting = front.submit(Request("waiting", 100, 50))
            await asyncio.sleep(0)
        async with serving(address) as address, groups(address) as both:
            with pytest.raises(Unavailable, match="restarted"):
                await running.ended()
            assert (await waiting.assigned()).request.id == "waiting"
            await front.close()
            with pytest.raises(Unavailable, match="closed"):
                await waiting.ended()

    played(body)


def test_leaders_outlive_a_restart_and_are_told_only_once() -> None:
    async def body() -> None:
        async with serving() as address:
            both = [Group(address, role) for role in (Role.PREFILL, Role.DECODE)]
            tasks = [asyncio.create_task(one.run()) for one in both]
            front = FrontEnd(address)
            assert (await front.submit(Request("a", 100, 50)).assigned()).request.id == "a"
        async with serving(address):
            # The numbers begin again.
            second = await front.submit(Request("b", 100, 50)).assigned()
            assert second.number == 1
            for one in both:
                await until(lambda one=one: len(one.assigned) == 2)  # type: ignore[misc]
            names = [[each.request.id for each in one.assigned] for one in both]
            assert names == [["a", "b"], ["a", "b"]]
            for task in tasks:
                task.cancel()
            for one in both:
                await one.leader.close()
            await front.close()

    played(body)


def test_a_broken_stream_is_opened_again_and_nothing_is_told_twice() -> None:
    async def body() -> None:
        hubs: list[Hub] = []
        async with (
            serving(hubs=hubs) as address,
            groups(address) as both,
            FrontEnd(address) as front,
        ):
            first = front.submit(Request("a", 100, 50))
            await first.assigned()
            await until(lambda: len(both[1].assigned) == 1)
            peers: list[Leader | FrontEndStream] = [*hubs[0].leaders.values()]
            for peer in (*peers, *hubs[0].front_ends):
                peer.outbox.close(Unavailable("cut"))
            await until(lambda: not both[1].leader._stream.up)
            both[1].leader.prefilled("a")
            both[1].leader.finished("a")
            second = front.submit(Request("b", 100, 50))
            await first.ended()
            await second.assigned()
            for one in both:
                await until(lambda one=one: len(one.assigned) == 2)  # type: ignore[misc]
                assert [each.request.id for each in one.assigned] == ["a", "b"]

    played(body)


def test_ends_have_their_reasons() -> None:
    async def body() -> None:
        limits: dict[str, Any] = {"requests_max": 1, "queue_s": 0.3, "rejoin_s": 0.5}
        async with serving(**limits) as address, FrontEnd(address) as front:
            await front.ready()
            first = front.submit(Request("a", 100, 50))
            second = front.submit(Request("b", 100, 50))
            with pytest.raises(Overloaded) as caught:
                await second.assigned()
            assert caught.value.retry_after_s > 0
            with pytest.raises(InvalidRequest, match="submitted already"):
                front.submit(Request("a", 100, 50))
            with pytest.raises(DeadlineExceeded, match="queue_s") as late:
                await first.assigned()
            assert late.value.reason == "queue_timeout"
            third = front.submit(Request("c", 100, 50))
            front.cancel(third)
            with pytest.raises(Unavailable) as cancelled:
                await third.ended()
            assert cancelled.value.reason == "cancelled"

    played(body)


def test_what_is_refused_for_good_is_not_tried_again() -> None:
    async def body() -> None:
        async with serving(tokens=("right",)) as address:
            front, group = FrontEnd(address, token="wrong"), Group(address, Role.DECODE)
            waiting = front.submit(Request("a", 100, 50))
            with pytest.raises(PermissionDenied):
                await waiting.assigned()
            with pytest.raises(PermissionDenied):
                await front.ready()
            with pytest.raises(PermissionDenied):
                front.submit(Request("b", 100, 50))
            await until(lambda: isinstance(group.leader.failure, PermissionDenied))
            await front.close()
            await group.leader.close()
        absent = FrontEnd(address)
        with pytest.raises(Unavailable, match="start `dualpath scheduler`"):
            await absent.ready(0.2)
        await absent.close()
        with pytest.raises(InvalidRequest, match="of 0"):
            GroupLeader(address, [], assigned=print, withdrawn=print)

    played(body)

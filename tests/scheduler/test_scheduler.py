"""The scheduler under any order of arrivals, fetches, reports, ends and losses.

`World` is the cluster: what its engines truly have, what they were told and when they looked.
"""

from __future__ import annotations

import pytest
from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec, Role
from dualpath.scheduler.group_report import EngineReport, GroupReport, NodeReport
from dualpath.scheduler.policies import POLICIES, named_policies
from dualpath.scheduler.request import Request
from dualpath.scheduler.scheduler import Scheduler
from dualpath.scheduler.settings import PolicySettings, SchedulerLimits
from dualpath.transfer.errors import InvalidRequest, Overloaded
from hypothesis import given, settings
from hypothesis import strategies as st

ALPHA, BETA, STAGING = 200, 400, 700
HBM_OF = (1500, 200, 900, 1500, 120, 1500, 400, 80)
SETTINGS = PolicySettings(alpha_tokens=ALPHA, beta_tokens=BETA)
ENGINES = (
    *(EngineSpec(f"p{n}", Role.PREFILL, f"P{n // 4}", f"np{n // 2}", 0) for n in range(8)),
    *(EngineSpec(f"d{n}", Role.DECODE, f"D{n // 4}", f"nd{n // 2}", HBM_OF[n]) for n in range(8)),
)
GROUPS = ("P0", "P1", "D0", "D1")
KINDS = ("submit", "submit", "fetch", "fetch", "report", "look", "end", "end", "lose", "join")
scripts = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 1000), st.integers(0, 1000)), max_size=120
)


class World:
    """A cluster that keeps its own books, by which the scheduler is judged."""

    def __init__(self, policy: str = "paper", limits: SchedulerLimits | None = None) -> None:
        self.policy = policy
        self.scheduler = Scheduler(named_policies(policy, SETTINGS), limits)
        self.now = 0.0
        self.requests: dict[str, Request] = {}
        self.assigned: dict[str, Assignment] = {}
        self.prefilling: set[str] = set()
        self.ended: set[str] = set()
        self.failed: set[str] = set()
        self.told = 0
        self.heard = dict.fromkeys(GROUPS, 0)
        self.looks: dict[str, GroupReport] = {}
        self.lost: list[EngineSpec] = []
        self.log: list[Assignment] = []
        for engine in ENGINES:
            self.scheduler.register(engine, NodeSpec(engine.node, staging_tokens=STAGING))

    def live(self, engine: str) -> list[Request]:
        """What an engine truly has."""
        return [
            one.request
            for name, one in self.assigned.items()
            if name not in self.ended
            and (one.decode == engine or (one.prefill == engine and name in self.prefilling))
        ]

    def step(self, kind: str, a: int, b: int) -> None:
        self.now += 0.01
        getattr(self, kind)(a, b)
        for engine in ENGINES[8:]:
            assert sum(one.memory_tokens for one in self.live(engine.name)) <= engine.hbm_tokens
        for node in {engine.node for engine in ENGINES}:
            staged = self.staged(node)
            assert sum(staged) <= STAGING or len(staged) == 1

    def staged(self, node: str) -> list[float]:
        """Tokens that a node's host memory holds for each request that is being prefilled."""
        engines = {engine.name for engine in ENGINES if engine.node == node}
        running = [self.assigned[name] for name in self.prefilling]
        return [
            tokens
            for one in running
            for engine, tokens in (
                (one.prefill, one.read.prefill * one.request.hit_tokens),
                (one.decode, one.request.tokens),
            )
            if engine in engines and tokens
        ]

    def submit(self, a: int, b: int) -> None:
        tokens = 1 + a % 300
        name, session = f"r{len(self.requests)}", f"s{b % 7}" if b % 7 else ""
        request = Request(name, tokens, b % (tokens + 1), b % 50, session)
        left = [e.hbm_tokens for e in ENGINES[8:] if e not in self.lost]
        if left and request.memory_tokens > max(left):
            with pytest.raises(InvalidRequest, match="largest decode engine"):
                self.scheduler.submit(request, self.now)
            return
        self.requests[request.id] = request
        self.scheduler.submit(request, self.now)

    def fetch(self, a: int, b: int) -> None:
        group = GROUPS[a % 4]
        if group not in self.scheduler.table.group_index:
            return
        before = {e.name: sum(r.tokens for r in self.live(e.name)) for e in ENGINES}
        for one in self.scheduler.fetch(group, self.now):
            if self.policy != "round-robin":
                assert before[one.prefill] <= BETA
            before[one.prefill] += one.request.tokens
            assert one.number > self.told
            assert one.request.id not in self.assigned
            assert one.read.prefill + one.read.decode == pytest.approx(1.0)
            self.told = one.number
            self.assigned[one.request.id] = one
            self.prefilling.add(one.request.id)
            self.log.append(one)

    def look(self, a: int, b: int) -> None:
        """A leader makes a report that arrives later, or never, or twice."""
        group = GROUPS[a % 4]
        engines = [e for e in ENGINES if e.group == group and e not in self.lost]
        old = self.looks.get(group)
        self.looks[group] = GroupReport(
            group,
            tuple(
                EngineReport(e.name, len(live), sum(r.tokens for r in live))
                for e in engines
                for live in (self.live(e.name),)
            ),
            tuple(NodeReport(node, b % 300) for node in sorted({e.node for e in engines})),
            number=old.number + 1 if old else 1,
            seen=self.told if b % 2 else self.heard[group],
        )
        if b % 2:
            self.heard[group] = self.told

    def report(self, a: int, b: int) -> None:
        report = self.looks.get(GROUPS[a % 4])
        if report is not None and report.group in self.scheduler.table.group_index:
            gone = {e.name for e in self.lost}
            if not gone.intersection(one.engine for one in report.engines):
                self.scheduler.report(report)

    def end(self, a: int, b: int) -> None:
        running = [name for name in self.assigned if name not in self.ended]
        if running:
            name = running[a % len(running)]
            if name in self.prefilling:
                self.prefilling.discard(name)
                self.scheduler.prefilled(name)
            else:
                self.ended.add(name)
                self.scheduler.finished(name)

    def lose(self, a: int, b: int) -> None:
        engine = ENGINES[a % 16]
        if b % 3 or engine in self.lost:
            return
        self.lost.append(engine)
        self.looks.pop(engine.group, None)
        loss = self.scheduler.lost(engine.name)
        for failure in self.scheduler.failures():
            assert failure.reason == "no_engine_fits"
            left = [e.hbm_tokens for e in ENGINES[8:] if e not in self.lost]
            assert failure.request.memory_tokens > max(left)
            self.failed.add(failure.request.id)
            self.ended.add(failure.request.id)
        for failure in loss.failed:
            assert failure.reason == "engine_lost"
            self.failed.add(failure.request.id)
            self.ended.add(failure.request.id)
        for one in loss.withdrawn:
            assert self.assigned[one.request.id] == one
            assert engine.name in (one.prefill, one.decode)
        for request in loss.requeued:
            self.assigned.pop(request.id, None)
            self.prefilling.discard(request.id)

    def join(self, a: int, b: int) -> None:
        if self.lost:
            engine = self.lost.pop(a % len(self.lost))
            self.scheduler.register(engine, NodeSpec(engine.node, staging_tokens=STAGING))

    def drain(self) -> None:
        """Let everything run to its end."""
        while self.lost:
            self.join(0, 0)
        for _ in range(60 + 2 * len(self.requests)):
            for number in range(4):
                self.look(number, 1)
                self.report(number, 0)
                self.fetch(number, 0)
            for _ in range(2 * len(self.assigned)):
                self.end(0, 0)
            if self.ended >= set(self.requests):
                return


@settings(deadline=None, max_examples=60)
@given(script=scripts, policy=st.sampled_from(sorted(POLICIES)))
def test_whatever_happens_all_requests_end_and_no_engine_gets_more_than_it_can_hold(
    script: list[tuple[str, int, int]], policy: str
) -> None:
    world = World(policy)
    for step in script:
        world.step(*step)
    world.drain()
    assert world.ended == set(world.requests)
    counts = world.scheduler.counts()
    assert (counts.waiting, counts.assigned) == (0, 0)
    table = world.scheduler.table
    assert table.staging == [0] * len(table.staging)
    for number in range(4):
        world.look(number, 1)
        world.report(number, 0)
    assert table.tokens == table.requests == table.memory == [0] * len(table.tokens)


@settings(deadline=None, max_examples=40)
@given(script=scripts, policy=st.sampled_from(sorted(POLICIES)))
def test_the_same_happenings_give_the_same_assignments(
    script: list[tuple[str, int, int]], policy: str
) -> None:
    logs = []
    for _ in range(2):
        world = World(policy)
        for step in script:
            world.step(*step)
        logs.append(world.log)
    assert logs[0] == logs[1]


@settings(deadline=None, max_examples=60)
@given(script=scripts, policy=st.sampled_from(sorted(POLICIES)))
def test_each_decode_group_serves_its_requests_in_the_order_of_arrival(
    script: list[tuple[str, int, int]], policy: str
) -> None:
    world = World(policy)
    for kind, a, b in script:
        if kind != "lose":
            world.step(kind, a, b)
    for group in ("D0", "D1"):
        engines = {e.name for e in ENGINES if e.group == group}
        numbers = [int(one.request.id[1:]) for one in world.log if one.decode in engines]
        assert numbers == sorted(numbers)


def small(**limits: float) -> Scheduler:
    """One prefill engine and two decode engines in groups of their own."""
    scheduler = Scheduler(
        named_policies("paper", SETTINGS),
        SchedulerLimits(**limits),  # type: ignore[arg-type]
    )
    scheduler.register(EngineSpec("p", Role.PREFILL, "P", "np", 0))
    scheduler.register(EngineSpec("d0", Role.DECODE, "D0", "n0", 1000))
    scheduler.register(EngineSpec("d1", Role.DECODE, "D1", "n1", 1000))
    return scheduler


def fetch_all(scheduler: Scheduler, now: float = 0.0) -> list[Assignment]:
    groups = [name for name in ("P", "D0", "D1") if name in scheduler.table.group_index]
    return [one for group in groups for one in scheduler.fetch(group, now)]


def test_an_assignment_comes_from_the_fetch_that_completes_it_and_once() -> None:
    scheduler = small()
    scheduler.submit(Request("r", 100, 90), 0.0)
    assert scheduler.fetch("P", 0.0) == ()
    (one,) = scheduler.fetch("D0", 0.0)
    assert (one.prefill, one.decode, one.request.id) == ("p", "d0", "r")
    assert fetch_all(scheduler) == []
    assert scheduler.assignment("r") == one


def test_requests_go_to_the_group_with_the_fewest_tokens() -> None:
    scheduler = small()
    for name, tokens in (("a", 100), ("b", 30), ("c", 30), ("d", 50)):
        scheduler.submit(Request(name, tokens, 0), 0.0)
    found = {one.request.id: one.decode for one in fetch_all(scheduler)}
    assert found == {"a": "d0", "b": "d1", "c": "d1", "d": "d1"}


def test_a_late_report_hides_no_work_and_a_repeated_one_adds_none() -> None:
    scheduler = small()
    scheduler.submit(Request("a", 100, 80), 0.0)
    (one,) = fetch_all(scheduler)
    idle = GroupReport(
        "P", (EngineReport("p", 0, 0),), (NodeReport("np", 7),), number=1, seen=one.number - 1
    )
    assert scheduler.report(idle)
    assert not scheduler.report(idle)
    table = scheduler.table
    assert (table.tokens[0], table.requests[0], table.read_queue[0]) == (100, 1, 87)
    busy = GroupReport("P", (EngineReport("p", 1, 100),), (), number=2, seen=one.number)
    assert scheduler.report(busy)
    assert (table.tokens[0], table.requests[0]) == (100, 1)


def test_a_report_that_names_others_engines_changes_nothing() -> None:
    scheduler = small()
    wrong = GroupReport("P", (EngineReport("p", 3, 5), EngineReport("d0", 1, 1)))
    with pytest.raises(InvalidRequest, match="'d0' is not registered in group 'P'"):
        scheduler.report(wrong)
    with pytest.raises(InvalidRequest, match="node 'n0' has no engine in group 'P'"):
        scheduler.report(GroupReport("P", (), (NodeReport("n0", 1),)))
    assert scheduler.table.requests[0] == 0


def test_a_request_whose_prefill_engine_dies_is_served_first_by_the_next() -> None:
    scheduler = small()
    for name in ("a", "b"):
        scheduler.submit(Request(name, 500, 0), 0.0)
    (one,) = fetch_all(scheduler)
    loss = scheduler.lost("p")
    assert [request.id for request in loss.requeued] == ["a"]
    assert loss.withdrawn == (one,)
    scheduler.register(EngineSpec("q", Role.PREFILL, "P", "np", 0))
    assert [again.request.id for again in fetch_all(scheduler)] == ["a"]


def test_a_request_that_decodes_fails_with_its_engine_and_says_why() -> None:
    scheduler = small()
    scheduler.submit(Request("a", 10, 0), 0.0)
    (one,) = fetch_all(scheduler)
    scheduler.prefilled("a")
    assert scheduler.lost("p").failed == ()
    (failure,) = scheduler.lost(one.decode).failed
    assert failure.reason == "engine_lost"
    assert not scheduler.knows("a")


def test_a_request_fails_after_as_many_losses_as_allowed() -> None:
    scheduler = small(attempts_max=2)
    scheduler.submit(Request("a", 10, 0), 0.0)
    for expected in ((), ("a",)):
        assert len(fetch_all(scheduler)) == 1
        loss = scheduler.lost("p")
        assert tuple(failure.request.id for failure in loss.failed) == expected
        scheduler.register(EngineSpec("p", Role.PREFILL, "P", "np", 0))


def test_requests_of_a_dead_group_go_to_the_others() -> None:
    scheduler = small()
    for name in ("a", "b"):
        scheduler.submit(Request(name, 10, 0), 0.0)
    scheduler.lost("d1")
    assert {one.decode for one in fetch_all(scheduler)} == {"d0"}


def test_what_only_a_lost_engine_could_hold_stands_before_nobody() -> None:
    scheduler = small()
    scheduler.register(EngineSpec("d2", Role.DECODE, "D0", "n2", 200))
    scheduler.leave("d1")
    for name, tokens in (("large", 900), ("small", 100)):
        scheduler.submit(Request(name, tokens, 0), 0.0)
    loss = scheduler.lost("d0")
    assert (loss.requeued, loss.failed) == ((), ())
    (failure,) = scheduler.failures()
    assert (failure.request.id, failure.reason) == ("large", "no_engine_fits")
    assert "900 tokens; the largest decode engine that is left holds 200" in failure.message
    assert [one.request.id for one in fetch_all(scheduler)] == ["small"]


def test_what_only_a_lost_engine_of_its_group_could_hold_goes_to_another_group() -> None:
    scheduler = small()
    scheduler.register(EngineSpec("d2", Role.DECODE, "D0", "n2", 200))
    for name, tokens in (("d1-busy", 900), ("large", 800), ("small", 100)):
        scheduler.submit(Request(name, tokens, 0), 0.0)
    first, *_ = fetch_all(scheduler)
    scheduler.lost("d0")
    scheduler.finished(first.request.id)
    for _ in range(3):
        for one in fetch_all(scheduler):
            scheduler.finished(one.request.id)
        for group, engine in (("P", "p"), ("D0", "d2"), ("D1", "d1")):
            scheduler.report(GroupReport(group, (EngineReport(engine, 0, 0),)))
    assert scheduler.counts().waiting == 0


def test_what_no_report_has_seen_does_not_outlive_its_withdrawal() -> None:
    """The assignment and its withdrawal may go out in one message: the leader hears of neither,
    so its reports never say that they have seen it."""
    scheduler = small()
    scheduler.lost("d1")
    scheduler.submit(Request("a", 1000, 600), 0.0)
    (one,) = fetch_all(scheduler)
    scheduler.lost("p")
    scheduler.register(EngineSpec("q", Role.PREFILL, "P", "np", 0))
    told = GroupReport("D0", (EngineReport("d0", 0, 0),), (NodeReport("n0", 0),), 1, seen=0)
    assert scheduler.report(told)
    (again,) = fetch_all(scheduler)
    assert (again.request.id, again.number) == ("a", one.number + 1)
    scheduler.finished("a")
    assert (scheduler.table.tokens[1], scheduler.table.requests[1]) == (0, 0)
    assert [queue for queue in scheduler.table.read_queue if queue] == []


def test_a_prefill_node_is_charged_for_the_hits_that_it_reads_only() -> None:
    scheduler = Scheduler(named_policies("paper", SETTINGS))
    for engine in (
        EngineSpec("p", Role.PREFILL, "P", "np", 0),
        EngineSpec("d", Role.DECODE, "D", "nd", 10_000),
    ):
        scheduler.register(engine, NodeSpec(engine.node, staging_tokens=1000))
    # The prefill node's queue is the longer one: the decode node reads all.
    scheduler.report(GroupReport("P", (EngineReport("p", 0, 0),), (NodeReport("np", 50),)))
    for name in ("a", "b"):
        scheduler.submit(Request(name, 310, 300), 0.0)
    made = [one for group in ("D", "P") for one in scheduler.fetch(group, 0.0)]
    sides = [one.read.prefill for one in made]
    assert sides[0] == 0.0
    node = scheduler.table.node_index["np"]
    assert scheduler.table.staging[node] == sum(300 * side for side in sides)
    for one in made:
        scheduler.prefilled(one.request.id)
    assert scheduler.table.staging == [0, 0]


def test_an_engine_that_leaves_keeps_its_requests_and_gets_no_more() -> None:
    scheduler = small()
    scheduler.submit(Request("a", 10, 0), 0.0)
    (one,) = fetch_all(scheduler)
    scheduler.leave(one.decode)
    scheduler.submit(Request("b", 10, 0), 0.0)
    assert [b.decode for b in fetch_all(scheduler)] == ["d1"]
    scheduler.finished("a")
    assert one.decode not in scheduler.table.engine_index


def test_a_request_fails_that_waits_longer_than_allowed() -> None:
    scheduler = small(queue_s=2.0)
    scheduler.lost("p")
    scheduler.submit(Request("a", 10, 0), 0.0)
    scheduler.fetch("D0", 1.9)
    assert scheduler.failures() == ()
    scheduler.fetch("D0", 2.5)
    (failure,) = scheduler.failures()
    assert (failure.request.id, failure.reason) == ("a", "queue_timeout")
    assert scheduler.failures() == ()
    assert not scheduler.knows("a")


def test_a_fetch_returns_no_more_than_its_limit() -> None:
    scheduler = small(fetch_max=3)
    for number in range(5):
        scheduler.submit(Request(f"r{number}", 1, 0), 0.0)
    scheduler.lost("d1")
    assert [len(scheduler.fetch(group, 0.0)) for group in ("P", "P", "D0", "D0")] == [0, 0, 3, 2]


def test_what_is_too_much_or_too_large_is_refused_by_name() -> None:
    scheduler = small(requests_max=1, engines_max=3)
    scheduler.submit(Request("a", 10, 0), 0.0)
    scheduler.submit(Request("a", 10, 0), 0.0)
    with pytest.raises(InvalidRequest, match="known as"):
        scheduler.submit(Request("a", 11, 0), 0.0)
    with pytest.raises(Overloaded, match="requests_max"):
        scheduler.submit(Request("b", 10, 0), 0.0)
    with pytest.raises(Overloaded, match="engines_max"):
        scheduler.register(EngineSpec("p2", Role.PREFILL, "P", "np", 0))
    scheduler.finished("a")
    with pytest.raises(InvalidRequest, match="largest decode engine holds 1000"):
        scheduler.submit(Request("b", 900, 0, 101), 0.0)
    with pytest.raises(InvalidRequest, match="group 'X'"):
        scheduler.fetch("X", 0.0)


def test_a_group_has_one_role_and_a_node_one_group() -> None:
    scheduler = small()
    with pytest.raises(InvalidRequest, match="a group has one role"):
        scheduler.register(EngineSpec("x", Role.DECODE, "P", "np", 1))
    with pytest.raises(InvalidRequest, match="a node lies in one group"):
        scheduler.register(EngineSpec("x", Role.DECODE, "D0", "n1", 1))
    with pytest.raises(InvalidRequest, match="registered as"):
        scheduler.register(EngineSpec("d0", Role.DECODE, "D0", "n0", 5))
    with pytest.raises(InvalidRequest, match="lies on node"):
        scheduler.register(EngineSpec("x", Role.DECODE, "D0", "n0", 5), NodeSpec("n1"))


@pytest.mark.parametrize(
    ("tokens", "hits", "bound"), [(0, 0, 0), (5, 6, 0), (5, -1, 0), (5, 5, -1), (-1, 0, 0)]
)
def test_a_request_of_impossible_counts_is_refused(tokens: int, hits: int, bound: int) -> None:
    with pytest.raises(InvalidRequest):
        Request("r", tokens, hits, bound)

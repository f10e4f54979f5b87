"""What leaders and front ends are told, whoever dies, comes late or comes back."""

from __future__ import annotations

import asyncio

import pytest
from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.config import SchedulerConfig
from dualpath.scheduler.engine_spec import EngineSpec, Role
from dualpath.scheduler.group_report import EngineReport, GroupReport
from dualpath.scheduler.hub import Hub
from dualpath.scheduler.leader import FrontEnd, Leader, LeaderMessage
from dualpath.scheduler.outbox import Ended, Event, Outbox, Requeued, Withdrawn
from dualpath.scheduler.request import Request
from dualpath.transfer.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    Unavailable,
)

REPORT_S, REJOIN_S = 5.0, 2.0


class Cluster:
    """A hub with the groups P and D, one engine each unless said otherwise."""

    def __init__(self, **settings: float) -> None:
        config = SchedulerConfig(
            report_timeout_s=REPORT_S,
            rejoin_s=REJOIN_S,
            **{"beta_tokens": 500_000, **settings},  # type: ignore[arg-type]
        )
        self.hub = Hub(config)
        self.numbers = {"P": 0, "D": 0}
        self.front = self.hub.join("me")

    def lead(self, group: str, now: float = 0.0, count: int = 1, principal: str = "me") -> Leader:
        role = Role.PREFILL if group == "P" else Role.DECODE
        engines = tuple(
            EngineSpec(f"{group}{n}", role, group, f"node-{group}", 100_000) for n in range(count)
        )
        self.numbers[group] = 0
        return self.hub.lead(LeaderMessage(group, engines), principal, now)

    def fetch(self, leader: Leader, now: float = 0.0, seen: int = 1_000_000) -> list[Event]:
        """A report of engines that have nothing, and what the leader is told then."""
        self.numbers[leader.group] += 1
        engines = tuple(EngineReport(name, 0, 0) for name in sorted(leader.engines))
        report = GroupReport(leader.group, engines, (), self.numbers[leader.group], seen)
        self.hub.hear(leader, LeaderMessage(leader.group, report=report), now)
        return leader.outbox.drain()

    def submit(self, *names: str, front: FrontEnd | None = None, now: float = 0.0) -> None:
        for name in names:
            self.hub.submit(front or self.front, Request(name, 100, 90), now)

    def assign(self, name: str) -> tuple[Leader, Leader, Assignment]:
        """Two leaders and a request that both their engines have."""
        prefill, decode = self.lead("P"), self.lead("D")
        self.submit(name)
        self.fetch(prefill)
        (one,) = self.fetch(decode)
        assert isinstance(one, Assignment)
        assert prefill.outbox.drain() == [one]
        assert self.front.outbox.drain() == [one]
        return prefill, decode, one


def test_both_leaders_and_the_front_end_are_told_and_the_end_is_too() -> None:
    cluster = Cluster()
    _, decode, one = cluster.assign("r")
    assert (one.prefill, one.decode) == ("P0", "D0")
    cluster.hub.hear(decode, LeaderMessage("D", prefilled=("r",), finished=("r",)), 1.0)
    assert cluster.front.outbox.drain() == [Ended("r")]
    assert cluster.front.requests == set()
    assert not cluster.hub.scheduler.knows("r")


def test_a_leader_that_comes_back_in_time_is_told_again_and_loses_nothing() -> None:
    cluster = Cluster()
    prefill, _, one = cluster.assign("r")
    cluster.hub.left(prefill, 1.0)
    cluster.hub.tick(1.0 + REJOIN_S / 2)
    again = cluster.lead("P", 1.0 + REJOIN_S / 2)
    cluster.hub.tick(1.0 + REJOIN_S)
    assert again.outbox.drain() == [one]
    assert cluster.front.outbox.drain() == []
    assert cluster.fetch(again, 2.5, seen=0) == []


@pytest.mark.parametrize("there", [True, False], ids=["old stream open", "old stream gone"])
def test_engines_that_come_back_on_another_node_have_lost_what_they_had(there: bool) -> None:
    cluster = Cluster()
    prefill, decode, _ = cluster.assign("r")
    if not there:
        cluster.hub.left(prefill, 1.0)
    moved = EngineSpec("P0", Role.PREFILL, "P", "another-node", 100_000)
    cluster.numbers["P"] = 0
    again = cluster.hub.lead(LeaderMessage("P", (moved,)), "me", 1.5)
    assert decode.outbox.drain() == [Withdrawn("r")]
    assert cluster.front.outbox.drain() == [Requeued("r")]
    assert again.outbox.drain() == []
    cluster.fetch(again, 1.6)
    (one,) = cluster.fetch(decode, 1.6)
    assert isinstance(one, Assignment)
    assert (one.request.id, one.prefill) == ("r", "P0")
    table = cluster.hub.scheduler.table
    assert table.spec[table.engine_index["P0"]].node == "another-node"


def test_an_engine_that_leaves_does_so_also_if_its_leader_comes_back_meanwhile() -> None:
    cluster = Cluster()
    _, decode, _ = cluster.assign("r")
    cluster.hub.hear(decode, LeaderMessage("D", leaving=("D0",)), 1.0)
    cluster.hub.left(decode, 1.0)
    again = cluster.lead("D", 1.5)
    assert cluster.front.outbox.drain() == []
    cluster.hub.hear(again, LeaderMessage("D", leaving=("D0",)), 1.5)
    cluster.hub.hear(again, LeaderMessage("D", prefilled=("r",), finished=("r",)), 2.0)
    assert cluster.front.outbox.drain() == [Ended("r")]
    assert "D0" not in cluster.hub.scheduler.table.engine_index


def test_a_leader_that_does_not_come_back_has_lost_its_engines() -> None:
    cluster = Cluster()
    prefill, decode, _ = cluster.assign("r")
    cluster.hub.left(prefill, 1.0)
    cluster.hub.tick(1.0 + REJOIN_S)
    assert decode.outbox.drain() == [Withdrawn("r")]
    assert cluster.front.outbox.drain() == [Requeued("r")]
    new = cluster.lead("P", 4.0)
    cluster.fetch(new, 4.0)
    (one,) = cluster.fetch(decode, 4.0)
    assert isinstance(one, Assignment)
    assert one.request.id == "r"
    assert cluster.front.outbox.drain() == [one]


def test_a_silent_leader_is_hung_up_on_and_its_decodes_fail_by_name() -> None:
    cluster = Cluster()
    prefill, decode, _ = cluster.assign("r")
    cluster.hub.hear(prefill, LeaderMessage("P", prefilled=("r",)), REPORT_S - 1)
    cluster.hub.tick(REPORT_S)
    assert not decode.outbox.open
    with pytest.raises(DeadlineExceeded, match="report_timeout_s"):
        asyncio.run(decode.outbox.take())
    assert prefill.outbox.open
    (end,) = cluster.front.outbox.drain()
    assert isinstance(end, Ended)
    assert (end.request, end.reason) == ("r", "engine_lost")


def test_a_new_leader_takes_a_groups_place_and_the_old_one_speaks_no_more() -> None:
    cluster = Cluster()
    old = cluster.lead("P", count=2)
    new = cluster.lead("P", count=1)
    assert sorted(cluster.hub.scheduler.table.engine_index) == ["P0"]
    with pytest.raises(Unavailable, match="new leader"):
        asyncio.run(old.outbox.take())
    with pytest.raises(Unavailable, match="another leader"):
        cluster.fetch(old)
    cluster.hub.left(old, 1.0)
    assert new.gone_at is None
    with pytest.raises(PermissionDenied, match="another principal"):
        cluster.lead("P", principal="you")


def test_late_and_repeated_reports_and_words_change_nothing() -> None:
    cluster = Cluster()
    prefill, _, _ = cluster.assign("r")
    cluster.numbers["P"] -= 1
    assert cluster.fetch(prefill) == []
    assert cluster.hub.events["stale_report"] == 1
    stranger = LeaderMessage("P", prefilled=("x",), finished=("x",))
    cluster.hub.hear(prefill, stranger, 1.0)
    assert cluster.hub.events["stale_word"] == 2


def test_an_engine_that_its_leader_gives_up_is_lost_at_once() -> None:
    cluster = Cluster()
    prefill = cluster.lead("P", count=2)
    cluster.hub.hear(prefill, LeaderMessage("P", lost=("P0",), leaving=("P1",)), 0.0)
    assert cluster.hub.scheduler.table.engine_index == {}
    with pytest.raises(InvalidRequest, match="none of group"):
        cluster.hub.hear(prefill, LeaderMessage("P", lost=("D0",)), 0.0)


def test_a_front_end_takes_only_its_waiting_requests_along() -> None:
    cluster = Cluster()
    cluster.assign("running")
    cluster.submit("waiting")
    cluster.hub.parted(cluster.front)
    assert cluster.hub.scheduler.knows("running")
    assert not cluster.hub.scheduler.knows("waiting")
    again = cluster.hub.join("me")
    cluster.submit("running", front=again)
    (one,) = again.outbox.drain()
    assert isinstance(one, Assignment)


def test_a_cancelled_request_is_withdrawn_from_its_engines() -> None:
    cluster = Cluster()
    prefill, decode, _ = cluster.assign("r")
    stranger = cluster.hub.join("you")
    cluster.hub.cancel(stranger, "r")
    assert cluster.hub.scheduler.knows("r")
    cluster.hub.cancel(cluster.front, "r")
    assert prefill.outbox.drain() == decode.outbox.drain() == [Withdrawn("r")]
    assert cluster.front.outbox.drain() == [Ended("r", "cancelled")]


def test_what_is_wrong_with_a_request_ends_it_and_not_the_stream() -> None:
    cluster = Cluster(front_end_requests_max=1)
    cluster.submit("a", "b")
    (end,) = cluster.front.outbox.drain()
    assert isinstance(end, Ended)
    assert (end.request, end.reason) == ("b", "overloaded")
    assert end.retry_after_s > 0
    stranger = cluster.hub.join("you")
    cluster.submit("a", front=stranger)
    (end,) = stranger.outbox.drain()
    assert isinstance(end, Ended)
    assert (end.request, end.reason) == ("a", "invalid")


def test_a_request_that_waits_too_long_ends_by_name() -> None:
    cluster = Cluster(queue_s=3.0)
    cluster.submit("r")
    cluster.hub.tick(2.9)
    assert cluster.front.outbox.drain() == []
    cluster.hub.tick(3.2)
    (end,) = cluster.front.outbox.drain()
    assert isinstance(end, Ended)
    assert end.reason == "queue_timeout"


def test_after_a_restart_reports_bring_the_load_back() -> None:
    """A new hub knows nothing; what leaders say first counts against memory and beta."""
    cluster = Cluster(beta_tokens=500)
    prefill, decode = cluster.lead("P"), cluster.lead("D")
    busy = GroupReport("P", (EngineReport("P0", 3, 501),), (), 1, 0)
    cluster.hub.hear(prefill, LeaderMessage("P", report=busy), 0.0)
    full = GroupReport("D", (EngineReport("D0", 3, 99_950),), (), 1, 0)
    cluster.submit("r")
    cluster.hub.hear(decode, LeaderMessage("D", report=full), 0.0)
    counts = cluster.hub.scheduler.counts()
    assert (counts.waiting, counts.assigned) == (1, 0)
    cluster.numbers.update(P=1, D=1)
    cluster.fetch(prefill, 1.0, seen=0)
    assert len(cluster.fetch(decode, 1.0, seen=0)) == 1


def test_a_leader_without_engines_and_a_crowd_of_front_ends_are_refused() -> None:
    cluster = Cluster(front_ends_max=1)
    with pytest.raises(InvalidRequest, match="first message"):
        cluster.hub.lead(LeaderMessage("P"), "me", 0.0)
    with pytest.raises(Overloaded, match="front_ends_max"):
        cluster.hub.join("me")


def test_who_does_not_read_is_cut_off() -> None:
    outbox = Outbox(events_max=2)
    for name in ("a", "b", "c"):
        outbox.put(Withdrawn(name))
    with pytest.raises(DeadlineExceeded, match="were not read"):
        asyncio.run(outbox.take())

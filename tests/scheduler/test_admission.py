"""What no engine and no node is given beyond what it can hold, whoever says what; and the order."""

from __future__ import annotations

import pytest
from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec, Role
from dualpath.scheduler.group_report import EngineReport, GroupReport, NodeReport
from dualpath.scheduler.policies import POLICIES, named_policies
from dualpath.scheduler.request import Request
from dualpath.scheduler.scheduler import Scheduler
from dualpath.scheduler.settings import PolicySettings
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

SETTINGS = PolicySettings(alpha_tokens=1e6, beta_tokens=1e6)
EVERY_POLICY = sorted(POLICIES)


def cluster(
    policy: str = "paper",
    *,
    settings: PolicySettings = SETTINGS,
    prefill: int = 1,
    decode: int = 1,
    prefill_staging: int = 0,
    decode_staging: int = 0,
    hbm: int = 100_000,
) -> Scheduler:
    """A node for each engine, a group for each role; memory in tokens."""
    scheduler = Scheduler(named_policies(policy, settings))
    for role, count, staging in (
        (Role.PREFILL, prefill, prefill_staging),
        (Role.DECODE, decode, decode_staging),
    ):
        for number in range(count):
            name = f"{role.value}{number}"
            scheduler.register(
                EngineSpec(name, role, role.value, f"node-{name}", hbm),
                NodeSpec(f"node-{name}", staging_tokens=staging),
            )
    return scheduler


def submit(
    scheduler: Scheduler, *tokens: int, hits: int = 0, bound: int = 0, session: str = ""
) -> None:
    for count in tokens:
        name = f"r{scheduler.counts().waiting + scheduler.counts().assigned}"
        scheduler.submit(Request(name, count, hits, bound, session), 0.0)


def fetched(scheduler: Scheduler) -> list[Assignment]:
    return [one for group in ("prefill", "decode") for one in scheduler.fetch(group, 0.0)]


@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize("hbm", [100_000, 800])
def test_a_decode_node_stages_no_more_than_it_has(policy: str, hbm: int) -> None:
    scheduler = cluster(policy, decode_staging=1000, hbm=hbm)
    submit(scheduler, 400, 400, 400)
    first = fetched(scheduler)
    assert [one.request.id for one in first] == ["r0", "r1"]
    assert fetched(scheduler) == []
    scheduler.prefilled("r0")
    scheduler.finished("r0")
    assert [one.request.id for one in fetched(scheduler)] == ["r2"]


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_staging_is_looked_at_also_where_all_engines_are_above_the_level(policy: str) -> None:
    scheduler = cluster(policy, decode=2, decode_staging=1000)
    scheduler.report(GroupReport("decode", (EngineReport("decode0", 9, 9000),)))
    submit(scheduler, 900, 900, 900)
    assert {one.decode for one in fetched(scheduler)} == {"decode0", "decode1"}
    assert scheduler.counts().waiting == 1
    assert scheduler.table.staging == [0, 900, 900]


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_a_prefill_node_stages_no_more_hits_than_it_has(policy: str) -> None:
    scheduler = cluster(policy, prefill_staging=1000)
    submit(scheduler, 450, 450, 450, hits=400)
    # No decode engine is known yet: any of the hits might be read here.
    scheduler.fetch("prefill", 0.0)
    assert scheduler.table.staging == [800, 0]
    assert len(scheduler.fetch("decode", 0.0)) == 2


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_a_request_larger_than_a_nodes_staging_is_let_in_alone(policy: str) -> None:
    scheduler = cluster(policy, prefill_staging=1000, decode_staging=1000)
    submit(scheduler, 5000, 100, hits=0)
    assert [one.request.id for one in fetched(scheduler)] == ["r0"]
    scheduler.prefilled("r0")
    assert [one.request.id for one in fetched(scheduler)] == ["r1"]


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_memory_is_kept_for_what_a_request_may_still_make_whatever_is_reported(policy: str) -> None:
    scheduler = cluster(policy, hbm=1000)
    submit(scheduler, 300, 300, bound=300)
    (one,) = fetched(scheduler)
    scheduler.prefilled(one.request.id)
    idle = GroupReport("decode", (EngineReport("decode0", 0, 0),))
    scheduler.report(idle)
    assert fetched(scheduler) == []
    scheduler.finished(one.request.id)
    scheduler.report(idle)
    assert [again.request.id for again in fetched(scheduler)] == ["r1"]


def test_a_request_that_comes_back_is_decoded_before_those_that_came_later() -> None:
    scheduler = cluster(hbm=1000)
    submit(scheduler, 600, 600, 600)
    assert [one.request.id for one in fetched(scheduler)] == ["r0"]
    scheduler.lost("prefill0")
    scheduler.register(EngineSpec("other", Role.PREFILL, "prefill", "node-other", 0))
    for expected in ("r0", "r1", "r2"):
        (one,) = fetched(scheduler)
        assert one.request.id == expected
        scheduler.finished(expected)
        scheduler.report(GroupReport("decode", (EngineReport("decode0", 0, 0),)))


def test_what_waits_for_a_group_counts_beside_what_its_engines_report() -> None:
    scheduler = cluster()
    scheduler.register(EngineSpec("far", Role.DECODE, "far", "node-far", 100_000))
    submit(scheduler, 100)
    # It waits for the first group, whose engines have nothing.
    scheduler.report(GroupReport("decode", (EngineReport("decode0", 0, 0),)))
    submit(scheduler, 50)
    assert scheduler.fetch("prefill", 0.0) == ()
    assert [one.request.id for one in scheduler.fetch("far", 0.0)] == ["r1"]
    assert [one.request.id for one in scheduler.fetch("decode", 0.0)] == ["r0"]


def test_a_sessions_home_that_is_overloaded_gets_no_more() -> None:
    settings = PolicySettings(alpha_tokens=100, beta_tokens=1000)
    scheduler = cluster("aware", settings=settings, prefill=2)
    submit(scheduler, 300, session="s")
    (first,) = fetched(scheduler)
    # Its home has more than beta; the other's links are so busy that it would begin later there.
    home, other = first.prefill, {"prefill0": "prefill1", "prefill1": "prefill0"}[first.prefill]
    scheduler.report(
        GroupReport(
            "prefill",
            (EngineReport(home, 3, 1001), EngineReport(other, 0, 0)),
            (NodeReport(f"node-{other}", 50_000),),
        )
    )
    submit(scheduler, 300, session="s")
    (second,) = fetched(scheduler)
    assert second.prefill == other


def test_beta_is_what_engines_say_or_what_is_set() -> None:
    scheduler = Scheduler(named_policies("paper", PolicySettings(alpha_tokens=200, beta_tokens=0)))
    with pytest.raises(InvalidRequest, match=r"'np' says no compute_tokens_per_s.*beta_tokens"):
        scheduler.register(EngineSpec("p", Role.PREFILL, "P", "np", 0))
    with pytest.raises(InvalidRequest, match="compute_tokens_per_s of node 'np' is -1"):
        NodeSpec("np", compute_tokens_per_s=-1)
    scheduler.register(
        EngineSpec("p", Role.PREFILL, "P", "np", 0), NodeSpec("np", compute_tokens_per_s=20)
    )
    scheduler.register(EngineSpec("d", Role.DECODE, "D", "nd", 10_000))
    for number in range(5):
        scheduler.submit(Request(f"r{number}", 60, 0), 0.0)
    scheduler.fetch("P", 0.0)
    # 5 s of 20 tokens a second: the second request makes it more than that.
    assert [one.request.id for one in scheduler.fetch("D", 0.0)] == ["r0", "r1"]


@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    policy=st.sampled_from([name for name in EVERY_POLICY if name != "round-robin"]),
)
def test_equal_prefill_engines_end_within_one_request_of_each_other(
    sizes: list[int], policy: str
) -> None:
    scheduler = cluster(policy, prefill=4)
    submit(scheduler, *sizes)
    fetched(scheduler)
    tokens = scheduler.table.tokens[:4]
    assert sum(tokens) == sum(sizes)
    assert max(tokens) - min(tokens) <= max(sizes)

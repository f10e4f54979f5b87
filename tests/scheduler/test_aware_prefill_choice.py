"""The choice by cost names the engine where a request could begin soonest, homes first."""

from __future__ import annotations

from dualpath.scheduler.aware_prefill_choice import AwarePrefillChoice
from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec, Role
from dualpath.scheduler.engine_table import EngineTable
from dualpath.scheduler.request import Request
from dualpath.scheduler.settings import PolicySettings, SchedulerLimits
from hypothesis import given
from hypothesis import strategies as st

SETTINGS = PolicySettings(alpha_tokens=300, beta_tokens=1000)
"""100 tokens are read, 200 computed a second."""


def table_of(loads: list[int], queues: list[int], staging: int = 0) -> EngineTable:
    """Two engines a node."""
    table = EngineTable(SchedulerLimits())
    for number, tokens in enumerate(loads):
        index = table.add(EngineSpec(f"e{number}", Role.PREFILL, "p", f"n{number // 2}", 0))
        table.tokens[index] = tokens
    for node in range(len(table.node_spec)):
        table.describe(NodeSpec(f"n{node}", staging_tokens=staging))
        table.read_queue[node] = queues[node % len(queues)]
    return table


def cost_s(table: EngineTable, engine: int) -> float:
    return max(
        table.tokens[engine] * (5.0 / 1000),
        table.read_queue[table.node_of[engine]] * (3.0 / 300),
    )


@given(
    loads=st.lists(st.integers(0, 1500), min_size=1, max_size=9),
    queues=st.lists(st.integers(0, 900), min_size=1, max_size=5),
    requests=st.lists(st.tuples(st.integers(1, 900), st.integers(0, 80)), max_size=30),
    staging=st.integers(0, 2000),
)
def test_without_a_session_it_names_the_least_cost_and_nobody_overloaded(
    loads: list[int], queues: list[int], requests: list[tuple[int, int]], staging: int
) -> None:
    table = table_of(loads, queues, staging)
    turn = AwarePrefillChoice(SETTINGS).round(table, 0)
    for number, (tokens, reads) in enumerate(requests):
        request = Request(f"r{number}", tokens, tokens)
        expected = min(
            (
                engine
                for engine in table.members[0]
                if table.tokens[engine] <= 1000 and table.has_room(engine, tokens)
            ),
            key=lambda e: (cost_s(table, e), table.tokens[e], e),
            default=None,
        )
        engine = turn.choose(request)
        assert engine == expected
        if engine is None:
            break
        table.tokens[engine] += tokens
        table.read_queue[table.node_of[engine]] += reads
        table.staging[table.node_of[engine]] += tokens
        turn.placed(engine)


def served(table: EngineTable, policy: AwarePrefillChoice, request: Request) -> int | None:
    turn = policy.round(table, 0)
    engine = turn.choose(request)
    if engine is not None:
        turn.placed(engine)
    return engine


def test_a_sessions_next_turn_returns_to_the_node_that_has_its_last() -> None:
    table, policy = table_of([0, 0, 0, 0], [0, 0]), AwarePrefillChoice(SETTINGS)
    table.tokens[0] = table.tokens[1] = 10
    assert served(table, policy, Request("r0", 500, 0, session="s")) == 2
    table.tokens[2] = table.tokens[3] = 50
    assert served(table, policy, Request("r1", 600, 500, session="other")) == 0
    assert served(table, policy, Request("r2", 600, 500, session="s")) == 2


def test_a_session_leaves_a_node_where_it_would_wait_longer_than_reading_takes() -> None:
    table, policy = table_of([0, 0, 0, 0], [0, 0]), AwarePrefillChoice(SETTINGS)
    assert served(table, policy, Request("r0", 50, 0, session="s")) == 0
    table.tokens[0] = table.tokens[1] = 500
    assert served(table, policy, Request("r1", 60, 50, session="s")) == 2


def test_only_so_many_sessions_are_remembered() -> None:
    policy = AwarePrefillChoice(SETTINGS, sessions_max=2)
    for name in ("a", "b", "a", "c"):
        policy.remember(name, "n", 1)
    assert [policy.home(name)[0] for name in ("a", "b", "c")] == ["n", "", "n"]

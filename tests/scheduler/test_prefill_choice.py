"""The choice of a prefill engine does what the paper states, for any load."""

from __future__ import annotations

from dualpath.scheduler.engine_spec import EngineSpec, Role
from dualpath.scheduler.engine_table import EngineTable
from dualpath.scheduler.prefill_choice import PaperPrefillChoice, RoundRobinPrefillChoice
from dualpath.scheduler.request import Request
from dualpath.scheduler.settings import PolicySettings, SchedulerLimits
from hypothesis import given
from hypothesis import strategies as st

SETTINGS = PolicySettings(alpha_tokens=100, beta_tokens=1000)
small = st.integers(0, 1500)


def table_of(loads: list[tuple[int, int]], queues: list[int]) -> EngineTable:
    """Two engines a node."""
    table = EngineTable(SchedulerLimits())
    for number, (tokens, requests) in enumerate(loads):
        index = table.add(EngineSpec(f"e{number}", Role.PREFILL, "p", f"n{number // 2}", 0))
        table.tokens[index], table.requests[index] = tokens, requests
    for node in range(len(table.node_spec)):
        table.read_queue[node] = queues[node % len(queues)]
    return table


def stated(table: EngineTable, group: int, settings: PolicySettings) -> int | None:
    """The paper's rule, engine by engine."""
    allowed = [e for e in table.members[group] if table.tokens[e] <= settings.beta_tokens]
    near = [e for e in allowed if table.read_queue[table.node_of[e]] <= settings.alpha_tokens]
    return min(near or allowed, key=lambda e: (table.tokens[e], table.requests[e], e), default=None)


@given(
    loads=st.lists(st.tuples(small, st.integers(0, 3)), min_size=1, max_size=9),
    queues=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    requests=st.lists(st.tuples(st.integers(1, 900), st.integers(0, 80)), max_size=30),
)
def test_it_names_the_engine_that_the_papers_rule_names(
    loads: list[tuple[int, int]], queues: list[int], requests: list[tuple[int, int]]
) -> None:
    table = table_of(loads, queues)
    turn = PaperPrefillChoice(SETTINGS).round(table, 0)
    for number, (tokens, reads) in enumerate(requests):
        expected = stated(table, 0, SETTINGS)
        engine = turn.choose(Request(f"r{number}", tokens, 0))
        assert engine == expected
        if engine is None:
            break
        assert table.tokens[engine] <= SETTINGS.beta_tokens
        table.tokens[engine] += tokens
        table.requests[engine] += 1
        table.read_queue[table.node_of[engine]] += reads
        turn.placed(engine)


def test_an_engine_above_beta_gets_nothing_though_it_is_the_only_one() -> None:
    table = table_of([(1001, 1)], [0])
    assert PaperPrefillChoice(SETTINGS).round(table, 0).choose(Request("r", 1, 0)) is None


def test_a_node_with_a_long_read_queue_is_used_once_the_others_are_overloaded() -> None:
    table = table_of([(1001, 1), (1001, 1), (7, 1), (8, 1)], [0, 101])
    assert PaperPrefillChoice(SETTINGS).round(table, 0).choose(Request("r", 1, 0)) == 2


def test_turns_go_on_where_the_last_fetch_ended() -> None:
    table = table_of([(5000, 9), (0, 0), (0, 0)], [0])
    policy, found = RoundRobinPrefillChoice(), []
    for number in range(5):
        turn = policy.round(table, 0)
        engine = turn.choose(Request(f"r{number}", 1, 0))
        assert engine is not None
        turn.placed(engine)
        found.append(engine)
    assert found == [0, 1, 2, 0, 1]

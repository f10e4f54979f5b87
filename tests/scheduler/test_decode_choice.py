"""The choice of a decode engine does what the paper states, and never exceeds memory."""

from __future__ import annotations

from dualpath.scheduler.decode_choice import RoundRobinDecodeChoice, TwoLevelDecodeChoice
from dualpath.scheduler.engine_spec import EngineSpec, Role
from dualpath.scheduler.engine_table import EngineTable
from dualpath.scheduler.group_totals import GroupTotals
from dualpath.scheduler.request import Request
from dualpath.scheduler.settings import PolicySettings, SchedulerLimits
from hypothesis import given
from hypothesis import strategies as st

SETTINGS = PolicySettings(alpha_tokens=100, beta_tokens=1000)
engines = st.lists(
    st.tuples(st.integers(0, 600), st.integers(0, 4), st.integers(1, 1000)),
    min_size=1,
    max_size=9,
)
waiting = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 50)), max_size=30)


def table_of(loads: list[tuple[int, int, int]]) -> EngineTable:
    table = EngineTable(SchedulerLimits())
    for number, (tokens, requests, hbm) in enumerate(loads):
        index = table.add(EngineSpec(f"e{number}", Role.DECODE, "d", "n", hbm))
        table.tokens[index], table.requests[index] = tokens, requests
        table.memory[index] = tokens
    return table


def stated_level(table: EngineTable, queue: list[Request]) -> float:
    """The paper's Z."""
    members = table.members[0]
    free = sum(max(table.hbm[e] - table.memory[e], 0) for e in members)
    total, needed = sum(table.tokens[e] for e in members), 0
    for request in queue:
        needed += request.memory_tokens
        if needed > free:
            break
        total += request.tokens
    return SETTINGS.decode_headroom * total / len(members)


def stated(table: EngineTable, request: Request, level: float) -> int | None:
    """The paper's rule, engine by engine."""
    fits = [e for e in table.members[0] if table.memory[e] + request.memory_tokens <= table.hbm[e]]
    below = [e for e in fits if table.tokens[e] + request.tokens <= level]
    if below:
        return min(below, key=lambda e: (table.requests[e], table.tokens[e], e))
    return min(fits, key=lambda e: (table.tokens[e], table.requests[e], e), default=None)


def requests_of(sizes: list[tuple[int, int]]) -> list[Request]:
    return [Request(f"r{n}", tokens, 0, bound) for n, (tokens, bound) in enumerate(sizes)]


def place(table: EngineTable, engine: int, request: Request) -> None:
    table.tokens[engine] += request.tokens
    table.requests[engine] += 1
    table.memory[engine] += request.memory_tokens


@given(loads=engines, sizes=waiting)
def test_it_names_the_engine_that_the_papers_rule_names(
    loads: list[tuple[int, int, int]], sizes: list[tuple[int, int]]
) -> None:
    table, queue = table_of(loads), requests_of(sizes)
    level = stated_level(table, queue)
    turn = TwoLevelDecodeChoice(SETTINGS).round(table, 0, queue)
    for request in queue:
        expected = stated(table, request, level)
        engine = turn.choose(request)
        assert engine == expected
        if engine is None:
            break
        place(table, engine, request)
        turn.placed(engine)
        assert table.memory[engine] <= table.hbm[engine]


@given(loads=engines, sizes=waiting)
def test_turns_never_exceed_memory_and_stop_only_where_nobody_has_room(
    loads: list[tuple[int, int, int]], sizes: list[tuple[int, int]]
) -> None:
    table, queue = table_of(loads), requests_of(sizes)
    turn = RoundRobinDecodeChoice().round(table, 0, queue)
    for request in queue:
        engine = turn.choose(request)
        if engine is None:
            assert stated(table, request, 0) is None
            break
        place(table, engine, request)
        turn.placed(engine)
        assert table.memory[engine] <= table.hbm[engine]


@given(
    count=st.integers(1, 8),
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=60),
)
def test_equal_engines_end_within_two_requests_and_the_headroom_of_each_other(
    count: int, sizes: list[int]
) -> None:
    """From empty, nobody exceeds Z by more than one request: the bound that the rule gives."""
    table = table_of([(0, 0, 100_000)] * count)
    queue = requests_of([(size, 0) for size in sizes])
    turn = TwoLevelDecodeChoice(SETTINGS).round(table, 0, queue)
    for request in queue:
        engine = turn.choose(request)
        assert engine is not None
        place(table, engine, request)
        turn.placed(engine)
    mean = sum(sizes) / count
    assert max(table.tokens) <= SETTINGS.decode_headroom * mean + max(sizes)


@given(
    changes=st.lists(
        st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 50))), max_size=200
    )
)
def test_the_least_total_is_found_whatever_changes(
    changes: list[tuple[int, int | None]],
) -> None:
    totals, plain = GroupTotals(), dict[int, int]()
    for group, total in changes:
        if total is None:
            totals.remove(group)
            plain.pop(group, None)
        else:
            totals.set(group, total)
            plain[group] = total
        expected = min(plain, key=lambda one: (plain[one], one), default=None)
        assert totals.least() == expected

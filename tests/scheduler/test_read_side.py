"""Which side reads a request's hits."""

from __future__ import annotations

import pytest
from dualpath.scheduler.assignment import DECODE_READS, PREFILL_READS
from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec, Role
from dualpath.scheduler.engine_table import EngineTable
from dualpath.scheduler.read_side import DirectRead, RoundRobinRead, ShorterQueueRead, SplitRead
from dualpath.scheduler.request import Request
from dualpath.scheduler.settings import SchedulerLimits
from hypothesis import example, given
from hypothesis import strategies as st

rates = st.floats(0.5, 4.0)


def table_of(queues: tuple[float, float], node_rates: tuple[float, float]) -> EngineTable:
    table = EngineTable(SchedulerLimits())
    for name, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
        table.add(EngineSpec(name, role, name, name, 1))
    for index, name in enumerate(("p", "d")):
        table.describe(NodeSpec(name, read_tokens_per_s=node_rates[index]))
        table.read_queue[index] = queues[index]
    return table


@pytest.mark.parametrize(
    ("queues", "side"), [((5, 6), PREFILL_READS), ((6, 5), DECODE_READS), ((5, 5), PREFILL_READS)]
)
def test_the_paper_reads_by_the_side_with_the_shorter_queue(
    queues: tuple[float, float], side: object
) -> None:
    table = table_of(queues, (1.0, 1.0))
    assert ShorterQueueRead().share(table, Request("r", 9, 9), 0, 1) == side


def test_direct_never_and_turns_always_alternate() -> None:
    table, request = table_of((100, 0), (1.0, 1.0)), Request("r", 9, 9)
    assert DirectRead().share(table, request, 0, 1) == PREFILL_READS
    turns = RoundRobinRead()
    found = [turns.share(table, request, 0, 1) for _ in range(4)]
    assert found == [PREFILL_READS, DECODE_READS] * 2


@example(queues=(0.0, 9980.0), node_rates=(1.0, 1.0), hits=10_000, least=1000)
@example(queues=(9980.0, 0.0), node_rates=(1.0, 1.0), hits=10_000, least=1000)
@given(
    queues=st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)),
    node_rates=st.tuples(rates, rates),
    hits=st.integers(0, 100_000),
    least=st.integers(1, 5000),
)
def test_shares_end_no_later_than_either_side_alone_would(
    queues: tuple[float, float], node_rates: tuple[float, float], hits: int, least: int
) -> None:
    table = table_of(queues, node_rates)
    shares = SplitRead(tokens_min=least).share(table, Request("r", hits + 1, hits), 0, 1)
    assert shares.prefill + shares.decode == pytest.approx(1.0)
    parts = (shares.prefill * hits, shares.decode * hits)
    for part in parts:
        assert part == 0 or part >= least * (1 - 1e-9) or 0 in parts
    ends = [
        (queue + part) / rate
        for queue, part, rate in zip(queues, parts, node_rates, strict=True)
        if part
    ]
    alone = [(queue + hits) / rate for queue, rate in zip(queues, node_rates, strict=True)]
    assert max(ends, default=0.0) <= min(alone) * (1 + 1e-9)
    if len(ends) == 2:
        assert ends[0] == pytest.approx(ends[1])

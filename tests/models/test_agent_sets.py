"""Sets of agents: the paper's statistics, recorded traces, arrivals; seeded and checked."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import statistics
from pathlib import Path

import pytest
from dualpath.bench.agents.arrivals import offline, poisson, with_tool_latency
from dualpath.bench.agents.named_set import SET_NAMES, named_set
from dualpath.bench.agents.paper_set import compacted_set, grown_set
from dualpath.bench.agents.replayed_set import scaled
from dualpath.bench.agents.trace_set import agents_of, trace_set
from dualpath.bench.agents.trajectory import Trajectory, Turn, TurnPrompt
from dualpath.bench.testbed.trace_formats import TraceRequest
from dualpath.bench.testbed.workload import PAPER_TABLE, Context
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

TRACES = Path(__file__).parents[3] / "shared" / "traces"
SET = named_set("agent-32k", seed=1, trajectories=20)


def prompts_of(trajectories: tuple[Trajectory, ...]) -> list[TurnPrompt]:
    return [prompt for each in trajectories for prompt in each.prompts()]


@pytest.mark.parametrize("context", list(Context))
@pytest.mark.parametrize("seed", range(3))
def test_a_replayed_set_of_500_has_the_means_of_the_papers_row(context: Context, seed: int) -> None:
    """Append and generate are means over trajectories of their means over turns."""
    row, made = PAPER_TABLE[context], named_set(f"agent-{context.value}", seed=seed)
    mean, turns = statistics.fmean, [list(each.prompts()) for each in made]
    assert mean(map(len, turns)) == pytest.approx(row.turns, rel=0.02)
    assert mean(mean(one.append for one in each) for each in turns) == pytest.approx(
        row.append, rel=0.02
    )
    assert mean(mean(one.generate for one in each) for each in turns) == pytest.approx(
        row.generate, rel=0.02
    )
    assert mean(each.final_tokens for each in made) == pytest.approx(row.total, rel=0.02)
    contexts = mean(one.context for each in turns for one in each)
    assert contexts == pytest.approx(row.context_mean, rel=0.03)
    assert max(each.final_tokens for each in made) <= row.length_max


def test_a_replayed_trajectory_computes_its_first_prompt_and_drops_nothing() -> None:
    for each in named_set("agent-64k", seed=4):
        first = next(each.prompts())
        assert (first.context, each.first_context) == (0, 0)
        assert first.append > PAPER_TABLE[Context.K64].append
        assert each.final_tokens == sum(turn.append + turn.generate for turn in each.turns)


def test_longer_appends_are_cut_off_at_the_length_of_their_set() -> None:
    longer = scaled(SET, append=3.0, length_max=32 << 10)
    assert max(each.final_tokens for each in longer) <= 32 << 10
    assert sum(len(each.turns) for each in longer) < sum(len(each.turns) for each in SET)
    for before, after in zip(SET, longer, strict=True):
        assert after.turns[0].append == 3 * before.turns[0].append
        assert after.turns[0].generate == before.turns[0].generate
    assert scaled(SET, length_max=32 << 10) == SET
    with pytest.raises(InvalidRequest, match="append times 0"):
        scaled(SET, append=0, length_max=32 << 10)
    with pytest.raises(InvalidRequest, match="no round is shorter than 9 tokens"):
        scaled(SET, length_max=9)


@pytest.mark.parametrize("context", list(Context))
@pytest.mark.parametrize("seed", range(3))
def test_a_compacted_set_of_500_has_the_means_over_all_turns(context: Context, seed: int) -> None:
    row, made = PAPER_TABLE[context], compacted_set(context, seed=seed)
    prompts, mean = prompts_of(made), statistics.fmean
    assert len(made) == 500
    assert mean(len(each.turns) for each in made) == pytest.approx(row.turns, rel=0.02)
    assert mean(each.append for each in prompts) == pytest.approx(row.append, rel=0.02)
    assert mean(each.generate for each in prompts) == pytest.approx(row.generate, rel=0.02)
    assert mean(each.final_tokens for each in made) == pytest.approx(row.total, rel=0.02)
    assert mean(each.context for each in prompts) == pytest.approx(row.context_mean, rel=0.02)
    assert max(each.tokens + each.generate for each in prompts) <= row.length_max


def test_at_64k_as_many_tokens_hit_by_means_over_turns_as_the_paper_says() -> None:
    prompts = prompts_of(compacted_set(Context.K64, seed=4))
    new = sum(each.append for each in prompts)
    assert 1 - new / sum(each.tokens for each in prompts) == pytest.approx(0.987, abs=0.001)


def test_by_the_other_reading_nothing_is_dropped_and_half_as_much_is_computed() -> None:
    grown = grown_set(Context.K64, seed=4)
    for each in grown:
        made = sum(turn.append + turn.generate for turn in each.turns)
        assert each.final_tokens == each.first_context + made
    per_turn = statistics.fmean(each.append for each in prompts_of(grown))
    assert per_turn == pytest.approx(PAPER_TABLE[Context.K64].append / 2, rel=0.15)


def test_a_seed_names_a_set_and_another_seed_another_one() -> None:
    assert compacted_set(Context.K32, seed=5) == compacted_set(Context.K32, seed=5)
    assert compacted_set(Context.K32, seed=5) != compacted_set(Context.K32, seed=6)
    assert offline(SET, agents=30, seed=1) == offline(SET, agents=30, seed=1)


def test_sets_have_names_and_others_are_refused_with_the_nearest() -> None:
    for name in SET_NAMES:
        assert len(named_set(name, seed=0, trajectories=3)) == 3
    with pytest.raises(InvalidRequest, match="'agent-65k' is not a workload; did you mean"):
        named_set("agent-65k", seed=0)
    with pytest.raises(InvalidRequest, match="not 0"):
        named_set("agent-64k", seed=0, trajectories=0)
    with pytest.raises(InvalidRequest, match="not -1"):
        named_set("agent-64k-grown", seed=0, trajectories=-1)
    with pytest.raises(InvalidRequest, match="not -2"):
        named_set("agent-64k-compacted", seed=0, trajectories=-2)


@given(st.integers(1, 70))
def test_offline_agents_take_each_trajectory_once_before_any_twice(agents: int) -> None:
    arrived = offline(SET, agents=agents, seed=9)
    assert [each.at_s for each in arrived] == [0.0] * agents
    for start in range(0, agents, len(SET)):
        taken = [id(each.trajectory) for each in arrived[start : start + len(SET)]]
        assert len(set(taken)) == len(taken)


def test_poisson_arrivals_come_at_their_rate_in_order_and_end() -> None:
    arrived = poisson(SET, agents_per_s=5, duration_s=2000, seed=2)
    times = [each.at_s for each in arrived]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 2000
    # 10,000 expected: four standard deviations.
    assert len(times) == pytest.approx(10_000, abs=400)
    between = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.pstdev(between) == pytest.approx(0.2, rel=0.05)


def test_tools_take_their_mean_before_every_turn_but_the_first() -> None:
    arrived = with_tool_latency(offline(SET, agents=20, seed=0), mean_s=3.0, seed=1)
    assert all(each.trajectory.turns[0].tool_s == 0 for each in arrived)
    later = [turn.tool_s for each in arrived for turn in each.trajectory.turns[1:]]
    assert statistics.fmean(later) == pytest.approx(3.0, rel=0.15)
    none = with_tool_latency(arrived, mean_s=0, seed=1)
    assert {turn.tool_s for each in none for turn in each.trajectory.turns} == {0.0}


def test_arrivals_that_cannot_be_are_refused_by_their_value() -> None:
    with pytest.raises(InvalidRequest, match="not 0"):
        offline(SET, agents=0, seed=0)
    with pytest.raises(InvalidRequest, match="no trajectories"):
        offline((), agents=1, seed=0)
    with pytest.raises(InvalidRequest, match=r"not -0\.5"):
        poisson(SET, agents_per_s=-0.5, duration_s=1, seed=0)
    with pytest.raises(InvalidRequest, match="not 0"):
        poisson(SET, agents_per_s=1, duration_s=0, seed=0)
    with pytest.raises(InvalidRequest, match="at most"):
        poisson(SET, agents_per_s=1e6, duration_s=1e6, seed=0)
    with pytest.raises(InvalidRequest, match="not -1"):
        with_tool_latency((), mean_s=-1, seed=0)


def asked(
    session: str,
    number: int,
    blocks: range | tuple[int, ...],
    at_s: float = 0.0,
    think_s: float = 0,
) -> TraceRequest:
    ids = tuple(blocks)
    return TraceRequest("one", session, at_s, 64, ids, 64 * len(ids) + 9, 7, number, think_s)


def test_a_conversation_becomes_a_trajectory_that_keeps_the_blocks_it_shares() -> None:
    (agent, helper) = agents_of(
        [
            asked("one/0", 1, range(10), 4.0),
            asked("one/1", 1, (0, 1, 2, 77), 5.0),
            asked("one/0", 2, range(12), 9.0, think_s=2.5),
            asked("one/0", 3, (0, 1, 2, 3, 90, 91), 11.0),
        ]
    )
    assert agent.at_s == 4.0
    assert agent.trajectory.first_context == 0
    assert list(agent.trajectory.prompts()) == [
        TurnPrompt(0, 649, 7),
        TurnPrompt(640, 137, 7, 2.5),
        TurnPrompt(256, 137, 7),
    ]
    assert helper.trajectory == Trajectory((Turn(73, 7, 192),), 192)


def test_a_number_that_starts_again_is_another_conversation() -> None:
    agents = agents_of([asked("one/1", 1, range(4)), asked("one/1", 1, range(8, 12))])
    assert [len(each.trajectory.turns) for each in agents] == [1, 1]


def test_requests_without_conversations_become_agents_of_one_turn() -> None:
    requests = [
        TraceRequest("", f"request-{number}", float(number), 512, ids, 512 * len(ids) + 3, 6)
        for number, ids in enumerate([(0, 1), (0, 1, 2), (5,)])
    ]
    agents = agents_of(requests)
    assert [each.at_s for each in agents] == [0.0, 1.0, 2.0]
    found = [next(each.trajectory.prompts()) for each in agents]
    assert [(each.context, each.append) for each in found] == [(0, 1027), (1024, 515), (0, 515)]
    with pytest.raises(InvalidRequest, match="sort the trace by time"):
        agents_of(requests[::-1])


@pytest.mark.parametrize(
    ("requests", "named"),
    [
        ([], "no requests"),
        ([asked("a", 1, range(2)), asked("a", 3, range(3))], "request 3 follows request 1: a gap"),
        ([asked("a", 2, range(2))], "request 2 follows request 0: a gap"),
        ([asked("a", 1, range(2), 9.0), asked("a", 2, range(3), 4.0)], "sort the trace by time"),
        ([dataclasses.replace(asked("a", 1, ()), input_tokens=0)], "no prompt: a gap"),
    ],
)
def test_a_trace_with_gaps_is_refused_with_the_place_and_the_remedy(
    requests: list[TraceRequest], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named):
        agents_of(requests)


def test_a_file_with_a_gap_is_refused_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl.gz"
    row = {"trace": "t", "sub": 0, "i": 1, "t": 0, "in": 70, "out": 3, "lcp": 0, "runs": [[1, 1]]}
    with gzip.open(file, "wt") as out:
        for number in (1, 4):
            print(json.dumps({**row, "i": number, "think_time": None}), file=out)
    with pytest.raises(InvalidRequest, match=r"trace\.jsonl\.gz: session t/0: request 4"):
        trace_set(str(file))


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"no traces: {TRACES} is absent")
def test_real_traces_become_agents_whose_hits_are_those_of_the_trace() -> None:
    sessions = trace_set(str(TRACES / "claude_code_sessions.jsonl.gz"))
    prompts = prompts_of(tuple(each.trajectory for each in sessions))
    hit = 1 - sum(each.append for each in prompts) / sum(each.tokens for each in prompts)
    assert hit == pytest.approx(0.965, abs=0.01)
    assert len(trace_set(str(TRACES / "mooncake_synthetic.jsonl.gz"))) == 3993

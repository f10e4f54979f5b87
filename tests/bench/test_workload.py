"""What a demo loads: the paper's statistics, whole prefixes, the same plan every time."""

import random
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from dualpath.bench.testbed.fill import fill_batches
from dualpath.bench.testbed.trace_formats import TraceRequest, read_trace
from dualpath.bench.testbed.workload import (
    PAPER_TABLE,
    Context,
    Workload,
    from_trace,
    generated,
    trajectory,
)
from dualpath.transfer.errors import InvalidRequest

BLOCK = 1 << 18
TRACES = Path(__file__).parents[3] / "shared" / "traces"


def plan(seed: int = 1, **changes: object) -> Workload:
    arguments: dict[str, object] = {
        "sessions": 12,
        "block_bytes": BLOCK,
        "load_bytes_mean": 6 << 20,
        "budget_bytes": 256 << 20,
        "seed": seed,
        **changes,
    }
    return generated(Context.K64, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("context", list(Context))
def test_many_trajectories_have_the_means_of_the_papers_row(context: Context) -> None:
    row = PAPER_TABLE[context]
    rng = random.Random(11)
    many = [trajectory(row, rng) for _ in range(1500)]
    mean = statistics.fmean
    assert mean(len(each) for each in many) == pytest.approx(row.turns, rel=0.08)
    appended = mean(mean(turn.append for turn in each) for each in many)
    made = mean(mean(turn.generate for turn in each) for each in many)
    assert appended == pytest.approx(row.append, rel=0.08)
    assert made == pytest.approx(row.generate, rel=0.08)
    ends = [each[-1].context + each[-1].append + each[-1].generate for each in many]
    assert mean(ends) == pytest.approx(row.total, rel=0.03)
    assert max(ends) <= row.length_max * 1.02
    contexts = mean(mean(turn.context for turn in each) for each in many)
    assert contexts == pytest.approx(row.context_mean, rel=0.05)


def test_a_turn_starts_with_all_that_the_turns_before_it_left() -> None:
    turns = trajectory(PAPER_TABLE[Context.K32], random.Random(3))
    for before, after in pairwise(turns):
        assert after.context == before.context + before.append + before.generate


def test_the_budget_is_met_with_loads_of_about_the_wanted_size() -> None:
    workload = plan(sessions=64, budget_bytes=2 << 30)
    assert 2 << 30 <= workload.load_bytes <= (2 << 30) + 16 * (6 << 20)
    assert workload.load_bytes / workload.loads == pytest.approx(6 << 20, rel=0.25)


def test_the_same_seed_gives_the_same_plan_and_another_one_another() -> None:
    assert plan(1) == plan(1)
    assert plan(1) != plan(2)


def test_every_load_is_a_prefix_of_a_stored_chain() -> None:
    workload = plan()
    for session in workload.sessions:
        for load in session:
            assert any(chain[: len(load.hashes)] == load.hashes for chain in workload.chains)


def test_sessions_share_nothing_and_turns_of_a_session_share_their_prefix() -> None:
    workload = plan()
    firsts = [session[0].hashes[0] for session in workload.sessions]
    assert len(set(firsts)) == len(firsts)
    for session in workload.sessions:
        assert {load.hashes[0] for load in session} == {session[0].hashes[0]}


def test_the_fill_saves_every_block_once_and_parents_first() -> None:
    workload = plan()
    known: set[bytes] = set()
    for hashes, parents in fill_batches(workload, 64):
        assert len(hashes) == len(parents) <= 64
        for each, parent in zip(hashes, parents, strict=True):
            assert each not in known
            assert parent == b"" or parent in known
            known.add(each)
    assert len(known) == workload.stored_blocks


def test_a_limited_plan_keeps_the_first_turns_of_the_sessions() -> None:
    workload = plan()
    part = workload.limited(32 << 20)
    assert 32 << 20 <= part.load_bytes < 64 << 20
    kept = {load for session in part.sessions for load in session}
    assert kept <= {load for session in workload.sessions for load in session}
    assert workload.limited(1 << 40) == workload


def request(session: str, ids: list[int], scope: str = "a") -> TraceRequest:
    return TraceRequest(scope, session, 0.0, 64, tuple(ids), 64 * len(ids), 10)


def trace_plan(requests: list[TraceRequest], **changes: object) -> Workload:
    arguments: dict[str, object] = {
        "sessions": 4,
        "block_bytes": BLOCK,
        "load_bytes_mean": BLOCK,
        "budget_bytes": 8 * BLOCK,
        "seed": 1,
        **changes,
    }
    return from_trace("t", requests, **arguments)  # type: ignore[arg-type]


def test_a_traces_request_loads_what_the_requests_before_it_left() -> None:
    requests = [
        request("a/0", [1, 2, 3]),
        request("a/0", [1, 2, 3, 4, 5]),
        request("a/0", [1, 2, 9]),
        request("b/0", [1, 2], scope="b"),
    ]
    workload = trace_plan(requests, load_bytes_mean=3 * BLOCK)
    lengths = {len(load.hashes) for session in workload.sessions for load in session}
    assert lengths == {2, 3}
    assert workload.block_tokens == 64


def test_a_trace_in_which_nothing_repeats_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="nothing to load"):
        trace_plan([request("a/0", [1, 2]), request("a/0", [3, 4])])


@pytest.mark.parametrize("name", ["claude_code_sessions", "mooncake_synthetic"])
def test_the_public_traces_become_loads(name: str) -> None:
    path = TRACES / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no {path.name} beside the checkout (../shared/traces)")
    workload = from_trace(
        path.name,
        read_trace(str(path)),
        sessions=5,
        block_bytes=BLOCK,
        load_bytes_mean=6 << 20,
        budget_bytes=128 << 20,
        seed=1,
    )
    assert len(workload.sessions) == 5
    assert workload.load_bytes >= 128 << 20
    assert 1 << 20 < workload.load_bytes / workload.loads < 32 << 20

"""Runs of the simulator keep the conservation laws, agree with closed forms, and are repeatable."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from dualpath.bench.agents.trajectory import AgentArrival, Trajectory, Turn
from dualpath.bench.simulate.cluster import ClusterSpec
from dualpath.bench.simulate.constant_rates import ConstantRates, constant_model
from dualpath.bench.simulate.engine_details import EngineDetails
from dualpath.bench.simulate.result import SimulationResult
from dualpath.bench.simulate.simulation import SimulationSetup, simulate
from dualpath.bench.simulate.system import SYSTEMS, named_system
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given, settings
from hypothesis import strategies as st

FAST = ConstantRates(prefill_tokens_per_s=1e9, step_s=1e-6, hbm_tokens=100_000_000)


def run(system: str, agents: list[AgentArrival], **changes: object) -> SimulationResult:
    setup = SimulationSetup(
        cluster=ClusterSpec(prefill_nodes=1, decode_nodes=2),
        model=constant_model(),
        system=named_system(system),
        arrivals=agents,
    )
    return simulate(dataclasses.replace(setup, **changes))  # type: ignore[arg-type]


def same_agents(count: int, turns: int, first: int = 32_000) -> list[AgentArrival]:
    trajectory = Trajectory(tuple(Turn(512, 64) for _ in range(turns)), first_context=first)
    return [AgentArrival(0.0, trajectory)] * count


trajectories = st.builds(
    Trajectory,
    st.lists(
        st.builds(
            Turn,
            st.integers(1, 3_000),
            st.integers(0, 200),
            st.one_of(st.none(), st.integers(0, 4_000)),
            st.sampled_from([0.0, 0.3]),
        ),
        min_size=1,
        max_size=5,
    ).map(tuple),
    st.integers(0, 30_000),
)
agents_of_any_kind = st.lists(
    st.builds(AgentArrival, st.sampled_from([0.0, 0.0, 0.7]), trajectories), min_size=1, max_size=12
)
clusters = st.builds(
    ClusterSpec,
    prefill_nodes=st.integers(1, 3),
    decode_nodes=st.integers(1, 3),
    gpus_per_node=st.sampled_from([2, 4]),
    snic_bytes_per_s=st.sampled_from([1e9, 20e9]),
    cnic_bytes_per_s=st.sampled_from([1e9, 20e9]),
    dram_bytes_per_s=st.sampled_from([3e9, 200e9]),
    staging_bytes=st.sampled_from([3e9, 40e9]),
    group_nodes=st.integers(1, 2),
)
engines = st.builds(
    constant_model,
    st.builds(
        ConstantRates,
        st.sampled_from([1_000.0, 100_000.0]),
        st.sampled_from([0.001, 0.05]),
        st.sampled_from([60_000, 1_000_000]),
    ),
    gpus_per_engine=st.sampled_from([1, 2]),
    lockstep_engines=st.sampled_from([1, 2]),
    prefill_hbm_tokens=st.sampled_from([50_000, 500_000]),
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SYSTEMS)), agents_of_any_kind, clusters, engines)
def test_every_run_reads_what_it_hits_ends_every_turn_once_and_can_be_repeated(
    system: str, agents: list[AgentArrival], cluster: ClusterSpec, engine: object
) -> None:
    # The laws themselves are checked inside of each run; here what they rest on.
    first = run(system, agents, cluster=cluster, model=engine)
    hits = [
        min(prompt.context, prompt.tokens - 1) // 64 * 64
        for agent in agents
        for prompt in agent.trajectory.prompts()
    ]
    assert len(first.records) == len(hits)
    assert first.records.hit_tokens == sum(hits)
    expected = sum(hits) * 50_000 if named_system(system).io else 0
    assert first.bytes_read == pytest.approx(expected)
    assert first.snic_windows.sum() == pytest.approx(expected)
    second = run(system, agents, cluster=cluster, model=engine)
    assert first.to_json() == second.to_json()
    for name in ("arrive_s", "first_token_s", "done_s"):
        assert np.array_equal(first.records.column(name), second.records.column(name))


@pytest.mark.parametrize("system", ["basic", "layerwise"])
def test_the_direct_path_takes_the_bytes_over_the_rate_of_the_prefill_sides_links(
    system: str,
) -> None:
    result = run(system, same_agents(400, 8), model=constant_model(FAST))
    assert result.jct_s == pytest.approx(result.bytes_read / 50e9, rel=0.01)


@pytest.mark.parametrize(("system", "rel"), [("dualpath", 0.03), ("split", 0.02)])
def test_both_paths_take_the_bytes_over_the_rate_of_all_links(system: str, rel: float) -> None:
    result = run(system, same_agents(800, 8), model=constant_model(FAST))
    assert result.jct_s == pytest.approx(result.bytes_read / 150e9, rel=rel)
    assert result.jct_s >= result.bytes_read / 150e9


def test_without_io_a_lone_agent_takes_its_compute_and_its_steps() -> None:
    details = EngineDetails(fetch_s=1e-4)
    result = run("oracle", same_agents(1, 4), details=details)
    # 512 new ones and those that fill no block; 63 steps after the first token.
    news = [512 + (32_000 + turn * 576) % 64 for turn in range(4)]
    expected = sum(news) / 10_000 + 4 * 63 * 0.01
    assert result.jct_s == pytest.approx(expected, rel=0.001)


def test_a_lone_layer_wise_turn_reads_computes_with_its_load_behind_and_decodes() -> None:
    details = EngineDetails(fetch_s=1e-4)
    result = run("layerwise", same_agents(1, 1, first=64_000), details=details)
    bytes_hit, bytes_all = 64_000 * 50_000, 64_512 * 50_000
    read, copy, decode = bytes_hit / 50e9, bytes_all / 50e9, 63 * 0.01
    # The load at full rate takes longer than the compute: 10 layers, overlapped but for one.
    load, compute = bytes_hit / 50e9, 512 / 10_000
    sent = bytes_all / 50e9
    prefill = max(load, sent, compute) + min(load, compute) / 10
    # What is sent shares the engine's link with what is loaded: both cross its way out.
    assert result.jct_s >= read + prefill + copy + decode - 1e-6
    assert result.jct_s <= read + load + sent + compute + copy + decode


def test_a_lone_relayed_turn_overlaps_its_load_with_its_compute() -> None:
    details = EngineDetails(fetch_s=1e-4)
    slow = constant_model(ConstantRates(prefill_tokens_per_s=1_000))
    result = run(
        "dualpath-unscheduled",
        [*same_agents(1, 2, first=64_000)],
        details=details,
        model=slow,
    )
    records = result.records
    # The first turn is direct, the second relayed.
    assert list(records.column("bytes_by_decode") > 0) == [False, True]
    took = records.column("first_token_s") - records.column("prefill_s")
    new, hit = 512, 64_576 // 64 * 64
    compute = new / 1_000
    assert took[1] == pytest.approx(compute + hit * 50_000 / 50e9 / 10, rel=1e-6)


def test_whole_loads_never_hold_more_than_the_prefill_engines_memory() -> None:
    small = constant_model(ConstantRates(), prefill_hbm_tokens=70_000)
    result = run("basic", same_agents(40, 3), model=small)
    assert result.jct_s > run("layerwise", same_agents(40, 3), model=small).jct_s
    # Memory for one prompt: each step has one of each of the eight engines, whatever waits.
    _, prompts = np.unique(result.records.column("prefill_s"), return_counts=True)
    assert prompts.max() == 8


def test_without_layerwise_prefill_a_step_loads_then_computes_then_sends() -> None:
    result = run(
        "basic",
        [AgentArrival(0.0, Trajectory((Turn(512, 2),), 64_000))],
        model=constant_model(ConstantRates(prefill_tokens_per_s=1_000)),
    )
    records = result.records
    hit = 64_000 // 64 * 64
    took = (records.column("first_token_s") - records.column("prefill_s"))[0]
    # Over the compute NIC of 50 GB/s, 50 KB a token: the hits come in, and nothing hides it.
    assert took == pytest.approx(hit * 50_000 / 50e9 + 512 / 1_000, rel=1e-6)
    to_decode = (records.column("decode_s") - records.column("first_token_s"))[0]
    assert to_decode == pytest.approx(2 * (hit + 512) * 50_000 / 50e9, rel=1e-6)


def test_systems_keep_their_order_where_storage_links_bind() -> None:
    engine = constant_model(ConstantRates(prefill_tokens_per_s=30_000))
    jct = {name: run(name, same_agents(200, 6), model=engine).jct_s for name in SYSTEMS}
    assert jct["oracle"] < jct["split"] <= jct["dualpath"] * 1.01
    assert jct["dualpath"] < jct["layerwise"] <= jct["basic"] * 1.01
    assert jct["dualpath-unscheduled"] < jct["layerwise"]


def test_tools_take_their_time_between_turns() -> None:
    turns = (Turn(512, 2), Turn(512, 2, tool_s=5.0), Turn(512, 2, tool_s=7.0))
    records = run("dualpath", [AgentArrival(3.0, Trajectory(turns))]).records
    arrived, done = records.column("arrive_s"), records.column("done_s")
    assert arrived[0] == 3.0
    assert arrived[1:] - done[:-1] == pytest.approx([5.0, 7.0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arrivals": []}, "no agents"),
        (
            {"model": constant_model(ConstantRates(hbm_tokens=1_000))},
            "decode engine's memory holds 1000",
        ),
        (
            {"cluster": ClusterSpec(prefill_nodes=1, decode_nodes=1, staging_bytes=1e8)},
            "host memory holds 2000",
        ),
        ({"model": constant_model(gpus_per_engine=3)}, "do not divide the 8 GPUs"),
    ],
)
def test_a_setup_that_cannot_run_is_refused_with_the_reason(
    changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        run("dualpath", changes.pop("arrivals", same_agents(1, 1)), **changes)  # type: ignore[arg-type]


def test_numbers_that_no_cluster_has_are_refused() -> None:
    for name, value in (("snic_bytes_per_s", -1.0), ("prefill_nodes", 0), ("dram_bytes_per_s", 0)):
        with pytest.raises(InvalidRequest, match=name):
            dataclasses.replace(ClusterSpec(prefill_nodes=1, decode_nodes=1), **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="fetch_s"):
        EngineDetails(fetch_s=0.0)
    with pytest.raises(InvalidRequest, match="dualpath"):
        named_system("dualpth")

"""Ratios that were planned in closed form, simulated: both agree where links bind, and where they
do not the report says what the closed form leaves out."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from dualpath.bench.agents.drawn_turns import drawn_turns
from dualpath.bench.agents.trajectory import Trajectory, Turn
from dualpath.bench.models.calibration import committed_calibration
from dualpath.bench.models.catalogue import find_model
from dualpath.bench.plan import ratio_simulation
from dualpath.bench.plan.bottleneck_range import NodeRates
from dualpath.bench.plan.capacity import Loading
from dualpath.bench.plan.plan_request import PlanRequest
from dualpath.bench.plan.planner import Plan, make_plan
from dualpath.bench.plan.ratio_simulation import RatioSimulation, worth_simulating
from dualpath.bench.slo import Slo
from dualpath.cli.main import main
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

AGENT = Trajectory(tuple(Turn(400, 100) for _ in range(40)), 16_000)
CALIBRATION = committed_calibration()


def planned(
    gpus: int, *, gpus_per_node: int = 2, snic: float = 3e9, slo: Slo | None = None
) -> Plan:
    """A plan for the 27B model, whose storage NICs bind."""
    rates = NodeRates(gpus_per_node, snic, 50e9, 500e9)
    request = PlanRequest(gpus=gpus, rates=rates, slo=slo or Slo())
    return make_plan(request, find_model("ds-27b"), CALIBRATION, "forty turns", (AGENT,))


def simulation(plan: Plan, staging_bytes: float = 80e9) -> RatioSimulation:
    return RatioSimulation(plan, CALIBRATION, (AGENT,), staging_bytes=staging_bytes, seed=0)


@pytest.mark.parametrize("loading", list(Loading))
def test_the_closed_form_and_the_simulation_agree_where_storage_binds(loading: Loading) -> None:
    plan = planned(4)
    assert "SNIC" in plan.ratios[0].capacities[loading].binds
    found = simulation(plan).run(plan.ratios[0], loading)
    assert abs(found.deviation) <= ratio_simulation.AGREES, found
    assert found.why == ""
    assert found.scale == 1


def test_little_host_memory_is_named_as_what_holds_two_paths_back() -> None:
    plan = planned(4)
    found = simulation(plan, staging_bytes=1.2e9).run(plan.ratios[0], Loading.DUAL)
    assert found.deviation < -ratio_simulation.AGREES
    assert "host memory of decode nodes is full" in found.why
    assert "more --staging" in found.why


def test_a_large_cluster_is_simulated_as_a_smaller_one_of_the_same_ratio() -> None:
    plan = planned(16, gpus_per_node=1)
    even = next(each for each in plan.ratios if each.name == "8P8D")
    found = simulation(plan).run(even, Loading.DUAL)
    assert found.scale == 2
    assert abs(found.deviation) <= ratio_simulation.AGREES


def test_with_an_slo_the_rate_is_lower_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratio_simulation, "ARRIVALS_TURNS", 800)
    monkeypatch.setattr(ratio_simulation, "STEPS", 4)
    plan = planned(4, slo=Slo(ttft_s=0.8))
    at_slo = simulation(plan).run(plan.ratios[0], Loading.DUAL)
    full = planned(4)
    most = simulation(full).run(full.ratios[0], Loading.DUAL)
    assert 0 < at_slo.turns_per_s < most.turns_per_s, "no more than a full cluster does"
    hopeless = planned(4, slo=Slo(ttft_s=0.31))
    assert simulation(hopeless).run(hopeless.ratios[0], Loading.BASIC).turns_per_s < (
        at_slo.turns_per_s
    )


def test_the_best_ratio_its_neighbours_and_the_single_path_are_worth_simulating() -> None:
    plan = planned(12)
    best = plan.best(Loading.DUAL)
    at = plan.ratios.index(best)
    wanted = worth_simulating(plan)
    dual = [ratio for ratio, loading in wanted if loading is Loading.DUAL]
    assert dual == list(plan.ratios[max(0, at - 1) : at + 2])
    assert (best, Loading.BASIC) in wanted
    assert (plan.best(Loading.BASIC), Loading.BASIC) in wanted
    assert len({(ratio.name, loading) for ratio, loading in wanted}) == len(wanted)


def test_the_report_says_what_is_closed_form_and_what_simulated(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = "plan --model ds-27b --gpus 4 --gpus-per-node 2 --snic 25Gb --cnic 400Gb --simulate"
    assert main([*words.split(), "--workload", "agent-32k"]) == 0
    shown = capsys.readouterr()
    assert "1P1D dual path" in shown.out
    assert "over basic at 1P1D, each at its best of these: a second path pays" in shown.out
    assert "(closed form)" in shown.out
    assert "simulate 1P1D basic" in shown.err
    assert main([*words.split(), "--workload", "agent-32k", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pays"] is True
    assert {each["loading"] for each in found["simulated"]} == {"basic", "dual path", "split"}
    assert all(each["scaled_down_by"] == 1 for each in found["simulated"])


def test_where_a_second_path_does_not_pay_the_verdict_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "plan --model ds-v3.2 --gpus 48 --snic 1600Gb --cnic 400Gb"
    assert main(words.split()) == 0
    assert "does NOT pay here" in capsys.readouterr().out


def test_without_host_memory_nothing_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan --model ds-27b --gpus 4 --gpus-per-node 2 --snic 25Gb --cnic 400Gb --simulate"
    assert main([*words.split(), "--staging", "0"]) == 2
    assert "--staging 0: a size is above 0" in capsys.readouterr().err


trajectories = st.lists(
    st.builds(
        Trajectory,
        st.lists(
            st.builds(Turn, st.integers(1, 500), st.integers(0, 90)), min_size=1, max_size=9
        ).map(tuple),
        st.integers(0, 5_000),
    ),
    min_size=1,
    max_size=5,
)


@given(trajectories, st.integers(1, 20), st.integers(1, 9), st.integers(0, 3))
def test_drawn_turns_are_turns_of_the_set_with_the_contexts_that_they_had(
    found: list[Trajectory], agents: int, turns: int, seed: int
) -> None:
    known = {prompt for each in found for prompt in each.prompts()}
    drawn = drawn_turns(found, agents=agents, turns=turns, seed=seed)
    assert [len(list(each.prompts())) for each in drawn] == [turns] * agents
    assert {prompt for each in drawn for prompt in each.prompts()} <= known
    assert drawn == drawn_turns(found, agents=agents, turns=turns, seed=seed)


def test_drawn_turns_have_the_means_of_the_set_and_wrong_numbers_are_refused() -> None:
    drawn = drawn_turns((AGENT,), agents=100, turns=40, seed=1)
    mean = statistics.fmean(prompt.context for each in drawn for prompt in each.prompts())
    assert mean == pytest.approx(statistics.fmean(p.context for p in AGENT.prompts()), rel=0.02)
    for agents, turns in ((0, 1), (1, 0), (1 << 20, 1 << 20)):
        with pytest.raises(InvalidRequest, match="turns"):
            drawn_turns((AGENT,), agents=agents, turns=turns, seed=0)
    with pytest.raises(InvalidRequest, match="no trajectories"):
        drawn_turns((), agents=1, turns=1, seed=0)

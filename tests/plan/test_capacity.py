"""Turns a second of a cluster: no device over what it carries, and the order of ways of loading."""

from __future__ import annotations

import dataclasses
import math

import pytest
from dualpath.bench.agents.trajectory import Trajectory, Turn
from dualpath.bench.models.calibration import committed_calibration
from dualpath.bench.models.catalogue import find_model
from dualpath.bench.models.roofline import Roofline
from dualpath.bench.plan.bottleneck_range import NodeRates, bottleneck_range
from dualpath.bench.plan.capacity import (
    Cluster,
    Loading,
    capacity_of,
    decode_sequences,
    first_token_s,
)
from dualpath.bench.plan.demand import Demand, demand_of
from dualpath.bench.slo import Slo
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

MODEL = Roofline(find_model("qwen2.5-32b"), committed_calibration())
DEMAND = demand_of((Trajectory((Turn(400, 100), Turn(450, 120)), 32_000),), MODEL)
STORAGE_ONLY = dataclasses.replace(DEMAND, generated_tokens=0.0, prefill_engine_s=1e-9)
PAPER = NodeRates(8, 50e9, 50e9, 500e9)
RATES = st.builds(
    NodeRates,
    gpus=st.sampled_from([8, 16]),
    snic_bytes_per_s=st.floats(1e9, 4e11),
    cnic_bytes_per_s=st.floats(1e9, 4e11),
    dram_bytes_per_s=st.floats(1e11, 2e12),
)
NODES = st.integers(1, 30)


def rate(
    cluster: Cluster, loading: Loading, demand: Demand = DEMAND, slo: Slo | None = None
) -> float:
    return capacity_of(cluster, demand, MODEL, loading, slo or Slo()).turns_per_s


@given(RATES, NODES, NODES)
def test_split_carries_at_least_what_one_path_and_the_papers_rule_carry(
    rates: NodeRates, prefill: int, decode: int
) -> None:
    cluster = Cluster(rates, prefill, decode)
    split = rate(cluster, Loading.SPLIT, STORAGE_ONLY)
    for other in (Loading.BASIC, Loading.DUAL):
        assert split >= rate(cluster, other, STORAGE_ONLY) * (1 - 1e-6)


@given(RATES, NODES, NODES)
def test_dual_path_uses_every_storage_nic_just_where_the_range_says(
    rates: NodeRates, prefill: int, decode: int
) -> None:
    cluster = Cluster(rates, prefill, decode)
    every = (prefill + decode) * rates.snic_bytes_per_s / STORAGE_ONLY.load_bytes
    got = rate(cluster, Loading.DUAL, STORAGE_ONLY)
    assert got <= every * (1 + 1e-9)
    # Prefill DRAM is no bound of the paper's: it carries two bytes a byte of the SNIC's.
    if rates.dram_bytes_per_s >= 2 * rates.snic_bytes_per_s:
        held = bottleneck_range(rates).holds(prefill, decode)
        full = got / every
        if not 1 - 1e-6 < full < 1 - 1e-12:  # on the edge of the range rounding decides
            assert (full >= 1 - 1e-9) == held


def test_equal_storage_bandwidth_gives_equal_rates_as_in_the_papers_sweep() -> None:
    def at(prefill: int, decode: int, loading: Loading) -> float:
        return rate(Cluster(PAPER, prefill, decode), loading, STORAGE_ONLY)

    assert at(1, 1, Loading.BASIC) == pytest.approx(at(1, 2, Loading.BASIC))
    assert at(1, 1, Loading.DUAL) == pytest.approx(at(2, 1, Loading.BASIC))
    assert at(2, 1, Loading.DUAL) == pytest.approx(at(1, 2, Loading.DUAL))


def test_what_binds_is_named_with_its_equals_and_what_binds_next_is_another() -> None:
    cluster = Cluster(PAPER, 1, 2)
    found = capacity_of(cluster, STORAGE_ONLY, MODEL, Loading.DUAL, Slo())
    assert set(found.binds.split(" and ")) == {"prefill SNIC", "decode SNIC"}
    assert found.binds_next is not None
    assert found.binds_next.turns_per_s > found.turns_per_s
    assert "SNIC" not in found.binds_next.name


@given(st.integers(2, 20))
def test_a_promise_never_carries_more_and_a_looser_one_never_less(decode: int) -> None:
    cluster = Cluster(PAPER, 2, decode)
    free = rate(cluster, Loading.DUAL)
    tight = rate(cluster, Loading.DUAL, slo=Slo(ttft_s=1, tpot_s=0.02))
    loose = rate(cluster, Loading.DUAL, slo=Slo(ttft_s=4, tpot_s=0.05))
    assert 0 < tight <= loose <= free


def test_a_promise_on_tpot_bounds_the_step_of_as_many_sequences_as_are_told() -> None:
    slo = Slo(tpot_s=0.02)
    most = decode_sequences(DEMAND, MODEL, slo)
    assert most < MODEL.hbm_tokens / DEMAND.held_tokens
    assert MODEL.decode_step_s(most, round(most * DEMAND.held_tokens)) <= 0.02
    assert MODEL.decode_step_s(most + 1, round((most + 1) * DEMAND.held_tokens)) > 0.02


def test_alone_a_turn_comes_sooner_by_split_and_latest_by_basic() -> None:
    cluster = Cluster(PAPER, 1, 2)
    times = [first_token_s(cluster, DEMAND, each) for each in Loading]
    assert times == sorted(times, reverse=True)
    assert times[0] == pytest.approx(DEMAND.load_bytes / 50e9 + DEMAND.prefill_engine_s)
    assert times[2] == pytest.approx(DEMAND.load_bytes / 100e9)


def test_a_turn_asks_for_whole_blocks_and_computes_the_rest() -> None:
    demand = demand_of((Trajectory((Turn(100, 50),), 1000),), MODEL)
    assert demand.cached_tokens == 15 * 64
    assert demand.new_tokens == 1100 - 15 * 64
    assert demand.load_bytes == 15 * 64 * 262_144
    assert demand.hit_share == pytest.approx(960 / 1100)


def test_nothing_is_loaded_where_nothing_hits_and_an_empty_workload_is_refused() -> None:
    cold = demand_of((Trajectory((Turn(100, 0),)),), MODEL)
    found = capacity_of(Cluster(PAPER, 1, 1), cold, MODEL, Loading.DUAL, Slo())
    assert found.binds == "prefill compute"
    assert math.isinf(found.devices[-1].turns_per_s)
    with pytest.raises(InvalidRequest, match="no prompts"):
        demand_of((Trajectory((Turn(0, 0),)),), MODEL)

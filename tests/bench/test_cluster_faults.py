"""Faults as they are written, what they leave of a cluster, and what is read off a run."""

import math

import pytest
from dualpath.bench.cluster.fault import (
    FAULTS_MAX,
    Fault,
    FaultAction,
    link_names,
    parse_faults,
    states_after,
)
from dualpath.bench.cluster.fault_effects import back_after, effects_of, mean_rate
from dualpath.bench.cluster.fault_script import MadeFault
from dualpath.bench.cluster.limits import limit_bytes_per_s
from dualpath.bench.testbed.engine import LoadOutcome
from dualpath.bench.testbed.shaping import LinkRates
from dualpath.bench.testbed.topology import Topology
from dualpath.transfer.errors import InvalidRequest

ONE_TWO = Topology.of(1, 2)
RATES = LinkRates(20e6, 160e6)


def test_faults_are_read_in_the_order_of_their_times() -> None:
    faults = parse_faults("slow:decode0.snic@8s:0.25, kill:decode-1@5", ONE_TWO)
    assert faults == (
        Fault(FaultAction.KILL, "decode-1", "", 5.0),
        Fault(FaultAction.SLOW, "decode-0", "snic", 8.0, 0.25),
    )


def test_a_fault_is_written_as_it_is_read() -> None:
    text = "kill:decode-1@1s,slow:decode-0.cnic@2.5s:0.25,cut:prefill-0@3s,restore:decode-1@4s"
    assert ",".join(str(fault) for fault in parse_faults(text, ONE_TWO)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kill", "'kill' is not a fault; write for example"),
        ("kill:decode1", "is not a fault"),
        ("kill:decode1@5m", "is not a fault"),
        ("burn:decode1@5s", "'burn' is no action; there are kill, stop, cut, slow, restore"),
        ("kill:decode2@5s", "there is no node 'decode-2' in 1P2D; there are prefill-0, decode-0"),
        ("kill:storage0@5s", "there is no node"),
        ("cut:decode0.disk@5s", "has no link 'disk'; it has snic, cnic"),
        ("cut:decode0.cnic1@5s", "has no link 'cnic1'"),
        ("kill:prefill0@5s", "choose a decode node"),
        ("stop:decode0.snic@5s", "leave out .snic"),
        ("slow:decode0@5s", "slow needs a factor in 0.01..1"),
        ("slow:decode0@5s:0", "slow needs a factor"),
        ("slow:decode0@5s:1.5", "slow needs a factor"),
        ("slow:decode0@5s:0.2.5", "slow needs a factor"),
        ("cut:decode0@5s:0.5", "only slow takes a factor, not cut"),
        ("cut:decode0@601s", "601 s is too late, at most 600 s"),
        ("kill:decode0@5s,stop:decode0@6s", "decode-0 is down since kill:decode-0@5s"),
        (",".join(["cut:decode0@1s"] * (FAULTS_MAX + 1)), "65 faults, at most 64"),
    ],
)
def test_what_is_wrong_with_a_fault_is_named(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_faults(text, ONE_TWO)
    assert says in str(caught.value)


def test_a_converged_node_has_one_link_and_one_of_many_rails_has_many() -> None:
    assert link_names(Topology.of(1, 1, converged=True)) == ("snic",)
    assert link_names(Topology.of(1, 1, rails=3)) == ("snic", "cnic", "cnic1", "cnic2")


def test_the_limit_follows_what_faults_leave() -> None:
    text = "slow:decode0.snic@1s:0.25,kill:decode1@2s,cut:prefill0.snic@3s,restore:decode1@4s"
    faults = parse_faults(f"{text},restore:decode0@5s,restore:prefill0.snic@6s", ONE_TWO)
    limits = [
        limit_bytes_per_s(ONE_TWO, RATES, states=states_after(faults[:count], ONE_TWO))
        for count in range(len(faults) + 1)
    ]
    assert limits == pytest.approx([60e6, 45e6, 25e6, 5e6, 25e6, 40e6, 60e6])


def test_a_link_that_was_slowed_stays_slow_when_only_the_other_is_restored() -> None:
    faults = parse_faults("slow:decode0@1s:0.5,restore:decode0.cnic@2s", ONE_TWO)
    state = states_after(faults, ONE_TWO)["decode-0"]
    assert (state.share("snic"), state.share("cnic")) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("topology", "relays", "limit"),
    [
        (Topology.of(1, 1), True, 40e6),
        (Topology.of(1, 1), False, 20e6),
        (Topology.of(2, 4), True, 120e6),
        (Topology.of(2, 1), True, 60e6),
        (Topology.of(2, 1, rails=4), True, 60e6),
        (Topology.of(1, 2, converged=True), True, 20e6),
    ],
)
def test_the_limit_is_the_sum_of_the_links_that_can_be_used(
    topology: Topology, limit: float, *, relays: bool
) -> None:
    assert limit_bytes_per_s(topology, RATES, relays=relays) == pytest.approx(limit)


def test_a_lone_load_is_limited_by_the_compute_links_of_its_engine() -> None:
    topology, rates = Topology.of(1, 2, rails=8), LinkRates(20e6, 20e6)
    limits = [
        limit_bytes_per_s(topology, rates, rails_used=width, prefill_used=1) for width in (1, 2, 8)
    ]
    assert limits == pytest.approx([20e6, 40e6, 60e6])


def outcome(start: float, end: float) -> LoadOutcome:
    return LoadOutcome(
        session=0,
        turn=0,
        requested_blocks=1,
        verified_blocks=1,
        corrupt_blocks=0,
        nbytes=1000,
        ended_s=end,
        elapsed_s=end - start,
        failure="",
        detail="",
        shares={},
        events={},
    )


def test_the_rate_is_back_from_the_first_second_that_reaches_it() -> None:
    # 100 until 5 s, nothing until 6 s, 50 from then on; sampled every tenth.
    points = tuple(
        (step / 10, 100.0 if step <= 50 else 0.0 if step <= 60 else 50.0) for step in range(1, 101)
    )
    assert mean_rate(points, 4.5, 5.5) == pytest.approx(50)
    assert back_after(points, 5.0, 10.0, 0.95 * 50) == pytest.approx(1.0, abs=0.11)
    assert back_after(points, 5.0, 10.0, 60) is None
    assert back_after(points, 5.0, 6.5, 0.95 * 50) is None


def test_an_effect_bounds_the_loads_that_were_in_flight() -> None:
    fault = parse_faults("kill:decode1@5s", ONE_TWO)[0]
    points = tuple((step / 10, 100.0) for step in range(1, 101))
    effect = effects_of(
        [MadeFault(fault, 105.0)],
        [50.0],
        [outcome(101, 104), outcome(104, 107), outcome(105.5, 109)],
        points,
        started_s=100.0,
        backlog_until_s=9.0,
    )[0]
    assert (effect.in_flight, effect.last_s, effect.back_s) == (1, 2.0, 0.0)
    # 1500 of 3000 bytes had come, 1000 of them for the load that had ended.
    assert effect.bound_s == pytest.approx(1 + 1.1 * 500 / 50)
    nothing = effects_of(
        [MadeFault(fault, 105.0)], [0.0], [], points, started_s=100.0, backlog_until_s=9.0
    )[0]
    assert nothing.bound_s == math.inf
    assert nothing.back_s is None
    assert nothing.to_json()["bound_s"] is None

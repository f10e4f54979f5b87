"""Random faults: their schedules, what is judged, and a few rounds over real processes."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from dualpath.bench.cluster.fault import FaultAction, parse_faults
from dualpath.bench.cluster.fault_script import MadeFault
from dualpath.bench.faults.judgement import LoadRecord, Outages, overrun_s, wrong_with_load
from dualpath.bench.faults.rest import Footprint, agent_unrest, daemon_unrest, growth
from dualpath.bench.faults.schedule import LoadOrder, load_orders, random_faults
from dualpath.bench.testbed.decode_engine import Received
from dualpath.bench.testbed.engine import LoadOutcome
from dualpath.bench.testbed.namespaces import NAMESPACES_FOLDER, why_not_kernel
from dualpath.bench.testbed.topology import Topology
from dualpath.proto.v1 import agent_pb2, store_pb2
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

ONE_TWO = Topology.of(1, 2)
SEEDS = st.integers(0, 1 << 40)


# Schedules.


@given(SEEDS, st.integers(0, 1000), st.sampled_from([(1, 0), (1, 1), (2, 3)]))
def test_a_schedule_is_a_function_of_its_seed_and_restores_what_it_breaks(
    seed: int, number: int, nodes: tuple[int, int]
) -> None:
    topology = Topology.of(*nodes)
    faults = random_faults(seed, number, topology, 1.5)
    assert faults == random_faults(seed, number, topology, 1.5)
    assert faults
    broken: set[tuple[str, str]] = set()
    for fault in faults:
        assert 0 <= fault.at_s <= 1.5
        if fault.action is FaultAction.RESTORE:
            broken.remove((fault.node, fault.link))
        else:
            assert (fault.node, fault.link) not in broken
            broken.add((fault.node, fault.link))
    assert not broken


@given(SEEDS, st.integers(0, 1000))
def test_a_schedule_is_read_as_it_is_written(seed: int, number: int) -> None:
    faults = random_faults(seed, number, ONE_TWO, 1.5)
    text = ",".join(map(str, faults))
    assert parse_faults(text, ONE_TWO, everywhere=True) == faults


def test_schedules_do_everything_to_every_kind_of_node() -> None:
    done = {
        (fault.action.value, fault.node.partition("-")[0])
        for number in range(200)
        for fault in random_faults(1, number, ONE_TWO, 1.5)
    }
    for node in ("prefill", "decode"):
        assert {(what, node) for what in ("kill", "stop", "cut", "slow", "restore")} <= done
    assert {(what, "storage") for what in ("kill", "stop", "cut", "restore")} <= done
    assert ("slow", "storage") not in done


def test_the_storage_node_has_no_limit_to_lower_and_its_daemon_is_left_alone_elsewhere() -> None:
    with pytest.raises(InvalidRequest, match="no limit to lower"):
        parse_faults("slow:storage@1s:0.5", ONE_TWO, everywhere=True)
    with pytest.raises(InvalidRequest, match="there is no node 'storage'"):
        parse_faults("kill:storage@1s", ONE_TWO)
    assert parse_faults("kill:storage@1s,stop:prefill0@2s", ONE_TWO, everywhere=True)


def test_loads_are_of_all_kinds_and_the_same_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[LoadOrder]:
        orders = load_orders(seed, 3, "prefill-0 1", chains=6, blocks_max=12, decodes=2)
        return list(islice(orders, 300))

    orders = drawn(5)
    assert orders == drawn(5) != drawn(6)
    assert {order.blocks for order in orders} == set(range(1, 13))
    assert {order.decode for order in orders} == {0, 1}
    assert min(order.deadline_s for order in orders) < 0.2 < max(o.deadline_s for o in orders)
    assert {order.hand_off for order in orders} == {order.abort_s < math.inf for order in orders}


# Judgement.


ORDER = LoadOrder(0, 4, "split", 0, True, deadline_s=1.0, abort_s=math.inf)
WHOLE = LoadOutcome(
    session=0,
    turn=0,
    requested_blocks=4,
    verified_blocks=4,
    corrupt_blocks=0,
    nbytes=4,
    ended_s=10.5,
    elapsed_s=0.5,
    failure="",
    detail="",
    shares={},
    events={},
    deadline_s=1.0,
)
HANDED = Received(5, 0, "", {}, started_s=10.5, elapsed_s=0.2)
QUIET = Outages({}, {})


def never_frozen(_start: float, _end: float, _names: object) -> float:
    return 0.0


def wrong(outcome: LoadOutcome, order: LoadOrder = ORDER, outages: Outages = QUIET) -> list[str]:
    record = LoadRecord("prefill-0", "decode-0", order, 10.0, outcome)
    return list(wrong_with_load(record, outages, never_frozen))


def test_whole_shorter_with_a_reason_or_an_error_of_a_dead_agent_is_all_that_may_be() -> None:
    assert not wrong(replace(WHOLE, handed_off=HANDED))
    assert not wrong(replace(WHOLE, verified_blocks=1, failure="deadline"))
    assert wrong(replace(WHOLE, verified_blocks=1))
    assert wrong(replace(WHOLE, verified_blocks=3, corrupt_blocks=1, failure="corrupt"))
    assert wrong(replace(WHOLE, verified_blocks=1, failure="absent"))
    failed = replace(WHOLE, verified_blocks=0, failure="unavailable", raised=True)
    assert wrong(failed)
    assert not wrong(failed, outages=Outages({}, {"prefill-0": ((10.2, 11.0),)}))
    assert wrong(failed, outages=Outages({}, {"prefill-0": ((11.2, 12.0),)}))


def test_a_load_ends_by_its_deadline_or_soon_after_it_was_given_up() -> None:
    late = replace(WHOLE, verified_blocks=1, failure="deadline", elapsed_s=1.7)
    assert "late" in wrong(late)[0]
    assert not wrong(replace(late, elapsed_s=1.4))
    given_up = replace(ORDER, abort_s=0.1)
    assert "late" in wrong(replace(late, elapsed_s=0.9, failure="unavailable"), given_up)[0]
    # Its agent was stopped when it was due, or when it was asked.
    assert not wrong(late, outages=Outages({"prefill-0": ((10.9, 11.6),)}, {}))
    assert not wrong(late, outages=Outages({"prefill-0": ((9.5, 10.5),)}, {}))
    assert wrong(late, outages=Outages({"decode-0": ((10.9, 11.6),)}, {}))
    record = LoadRecord("prefill-0", "decode-0", ORDER, 10.0, late)
    assert overrun_s(record, QUIET, lambda *_: 0.6) == pytest.approx(0.1)


def test_hand_offs_are_judged_as_loads_are() -> None:
    assert wrong(replace(WHOLE, handed_off=replace(HANDED, failure="corrupt")))
    assert wrong(replace(WHOLE, handed_off=replace(HANDED, failure="odd")))
    late = replace(WHOLE, handed_off=replace(HANDED, failure="peer_lost", elapsed_s=1.8))
    assert "late" in wrong(late)[0]
    assert not wrong(late, outages=Outages({"decode-0": ((10.4, 11.3),)}, {}))


def test_outages_are_read_off_the_faults_that_were_made() -> None:
    text = "stop:decode0@1s,cut:decode0.snic@1s,kill:storage@2s,restore:decode0.snic@3s,"
    text += "restore:storage@4s,restore:decode0@5s"
    faults = parse_faults(text, ONE_TWO, everywhere=True)
    outages = Outages.of(MadeFault(fault, 100 + fault.at_s) for fault in faults)
    assert outages.stopped == {"decode-0": ((101.0, 105.0),)}
    assert outages.gone == {"storage": ((102.0, 104.0),)}


def test_what_is_under_way_held_or_leased_is_no_rest() -> None:
    assert not list(agent_unrest("a", agent_pb2.AgentStatsResponse(loads_done=3)))
    busy = agent_pb2.AgentStatsResponse(staging_used_bytes=1, loads_active=2)
    busy.holdings.pinned_bytes = 3
    assert len(list(agent_unrest("a", busy))) == 3
    assert not list(daemon_unrest(store_pb2.StatsResponse(attachments=3), 3))
    assert len(list(daemon_unrest(store_pb2.StatsResponse(attachments=2, leases=1), 3))) == 2


def test_growth_is_what_goes_on_growing_after_the_first_rounds() -> None:
    warming = [Footprint(20 + min(each, 9), 10, 50 << 20) for each in range(40)]
    assert not list(growth("a", warming))
    leaking = [Footprint(20 + each, 10, (50 + 5 * each) << 20) for each in range(40)]
    assert [text.split()[1] for text in growth("a", leaking)] == ["descriptors", "memory_bytes"]
    assert not list(growth("a", leaking[:15])), "too few to tell"
    leaking[-1] = warming[0]
    assert not list(growth("a", leaking)), "it came down again"


# Real processes.


def rounds(tmp_path: Path, *words: str) -> tuple[int, dict[str, object], str]:
    """Run it in a process of its own: status, JSON, what it said."""
    reason = why_not_kernel()
    if reason:
        pytest.skip(f"kernel shaping: {reason}")
    out = tmp_path / "out.json"
    argv = [sys.executable, "-m", "dualpath.cli.main", "bench", "faults", *words]
    done = subprocess.run(
        [*argv, "--json", str(out)], capture_output=True, text=True, timeout=200, check=False
    )
    assert not list(NAMESPACES_FOLDER.glob(f"dualpath-{os.getpid()}-*"))
    found = json.loads(out.read_text()) if out.exists() else {}
    return done.returncode, found, done.stdout + done.stderr


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(220)
def test_every_load_ends_well_while_everything_is_killed_stopped_and_cut(tmp_path: Path) -> None:
    # All of it at once, then a few at random, with a seed of its own each time.
    faults = "kill:prefill0@0.2s,stop:decode0@0.25s,cut:decode1.snic@0.3s,kill:storage@0.4s,"
    faults += (
        "restore:prefill0@0.6s,restore:storage@0.8s,restore:decode0@1s,restore:decode1.snic@1s"
    )
    status, found, said = rounds(tmp_path, "--rounds", "1", "--faults", faults)
    assert status == 0, said
    assert found["ok"]
    counts = found["counts"]
    assert isinstance(counts, dict)
    assert counts["loads failed: unavailable"] >= 1, "its own agent was killed"
    status, found, said = rounds(tmp_path, "--rounds", "5")
    assert status == 0, said
    assert found["rounds"] == 5
    assert f"seed {found['seed']}" in said


def test_what_cannot_be_asked_for_is_wrong_usage(tmp_path: Path) -> None:
    for words, says in (
        (("--round", "3"), "of which seed"),
        (("--rounds", "0"), "--rounds must lie in"),
        (("--faults", "kill:nobody@1s"), "there is no node 'nobody'"),
    ):
        argv = [sys.executable, "-m", "dualpath.cli.main", "bench", "faults", *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert says in done.stderr

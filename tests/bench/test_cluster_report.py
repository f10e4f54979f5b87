"""`dualpath bench cluster` from measurements made up here: windows, figures, targets, output."""

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from dualpath.bench.cluster import command as command_module
from dualpath.bench.cluster.backlog import (
    GAP_S,
    Backlog,
    backlog_of,
    busy_spans,
    common_spans,
    windows_of,
)
from dualpath.bench.cluster.command import EXIT_FAILED, EXIT_OK, EXIT_USAGE, command, config_of
from dualpath.bench.cluster.config import BLOCK_BYTES, ClusterBenchConfig
from dualpath.bench.cluster.fault import parse_faults
from dualpath.bench.cluster.fault_effects import effects_of, loaded_rate
from dualpath.bench.cluster.fault_script import MadeFault
from dualpath.bench.cluster.lone import LoneLoad, lone_workload, parts
from dualpath.bench.cluster.plot import draw
from dualpath.bench.cluster.report import (
    ClusterReport,
    FaultRun,
    LoneResult,
    TopologyResult,
    hand_off_note,
)
from dualpath.bench.cluster.table import events, markdown, print_report
from dualpath.bench.cluster.targets import judge, ties_of
from dualpath.bench.testbed.decode_engine import Received
from dualpath.bench.testbed.engine import LoadOutcome
from dualpath.bench.testbed.link_meter import LinkKind, LinkSample, LinkUse, link_uses, links_of
from dualpath.bench.testbed.replay import PolicyRun
from dualpath.bench.testbed.topology import Topology
from dualpath.transfer.errors import InvalidRequest

MB = 1e6
STARTED_S = 100.0


def outcome(start: float, end: float, session: int = 0, *, failure: str = "") -> LoadOutcome:
    return LoadOutcome(
        session=session,
        turn=0,
        requested_blocks=5,
        verified_blocks=0 if failure else 5,
        corrupt_blocks=0,
        nbytes=0 if failure else 5 * BLOCK_BYTES,
        ended_s=STARTED_S + end,
        elapsed_s=end - start,
        failure=failure,
        detail="",
        shares={"direct": 5 * BLOCK_BYTES},
        events={},
        deadline_s=30.0,
    )


def config(**changes: object) -> ClusterBenchConfig:
    return ClusterBenchConfig(snic_bytes_per_s=20 * MB, **changes)  # type: ignore[arg-type]


def uses(
    topology: Topology, shares: dict[str, float], seconds: float, rates: ClusterBenchConfig
) -> tuple[LinkUse, ...]:
    """Links that carry these MB/s by name and nothing else, sampled every tenth of a second."""
    links = links_of(topology, rates.rates)
    samples = [
        LinkSample(
            STARTED_S + step / 10,
            {
                (link.node, link.kind): round(shares.get(link.name, 0) * MB * step / 10)
                for link in links
            },
        )
        for step in range(round(seconds * 10) + 1)
    ]
    return link_uses(links, samples)


def run(policy: str, seconds: float, topology: Topology, *, uneven: float = 0.0) -> PolicyRun:
    """Loads that keep 40 in flight all the time; split uses every storage link."""
    nodes = [node.name for node in topology.nodes[1:]]
    used = nodes if policy != "direct" else nodes[: len(topology.prefill)]
    shares = {f"{name} SNIC in": 19.6 for name in used}
    shares[f"{nodes[-1]} SNIC in"] = shares.get(f"{nodes[-1]} SNIC in", 0) * (1 - uneven)
    for node in topology.prefill:
        into = sum(shares.values()) / len(topology.prefill)
        shares[f"{node.name} CNIC in"] = into
    loads = round(sum(rate for name, rate in shares.items() if "SNIC" in name) * MB * seconds)
    outcomes = [outcome(0, seconds, index) for index in range(40)]
    each = loads // 40
    return PolicyRun(
        policy,
        seconds,
        tuple(replace(one, nbytes=each) for one in outcomes),
        uses(topology, shares, seconds, config()),
        0.5,
    )


def result(prefill: int, decode: int, *, unshaped: float = 900 * MB) -> TopologyResult:
    topology = Topology.of(prefill, decode)
    links = (prefill + decode) / prefill
    runs = [
        run(policy, 6.0 / (1 if policy == "direct" else links), topology, uneven=uneven)
        for _ in range(2)
        for policy, uneven in (("direct", 0.0), ("paper", 0.2), ("split", 0.0))
    ]
    return TopologyResult(config(), topology, unshaped, tuple(runs), (), None)


def report(*results: TopologyResult, **changes: object) -> ClusterReport:
    return ClusterReport(
        config=config(**changes),
        results=results,
        machine={"cores": 2, "load_average": 0.1},
        versions={"python": "3"},
        seconds=1.0,
    )


def test_spans_are_those_with_enough_loads_in_flight() -> None:
    loads = [outcome(0, 4), outcome(1, 3), outcome(3, 6), outcome(5, 6)]
    spans = [each - STARTED_S for span in busy_spans(loads, 2) for each in span]
    assert spans == pytest.approx([1, 4 + GAP_S, 5, 6 + GAP_S])
    assert busy_spans(loads, 4) == []
    assert common_spans([(0, 2), (3, 5)], [(1, 4)]) == [(1, 2), (3, 4)]
    assert windows_of([(0.5, 2.6), (3, 3.9)]) == ((0.5, 1.5), (1.5, 2.5))


def test_windows_count_only_while_every_engine_has_a_backlog() -> None:
    topology = Topology.of(2, 1)
    links = uses(topology, {"prefill-0 SNIC in": 30, "prefill-1 SNIC in": 10}, 6, config())
    both = [outcome(0, 4, 0), outcome(1, 6, 1)]
    backlog = backlog_of(both, links, engines=2, in_flight=1)
    assert [round(start - STARTED_S, 3) for start, _ in backlog.windows] == [1, 2, 3]
    assert backlog.balances == pytest.approx([30 * 3 / 40] * 3)
    assert backlog.utilisation["prefill-1 SNIC in"] == pytest.approx(0.5)
    assert backlog_of(both[:1], links, engines=2, in_flight=1).windows == ()


def test_the_rate_under_a_backlog_is_of_what_crossed_into_the_prefill_nodes() -> None:
    topology = Topology.of(1, 1)
    links = uses(topology, {"prefill-0 CNIC in": 40}, 4, config())
    backlog = backlog_of([outcome(0, 2)], links, engines=1, in_flight=1)
    assert backlog.seconds == 2
    assert backlog.bytes_per_s == pytest.approx(5 * BLOCK_BYTES / 4)
    empty: Backlog = backlog_of([], links, engines=1, in_flight=1)
    assert (empty.bytes_per_s, empty.utilisation) == (0.0, {})


def test_a_policy_is_compared_with_direct_and_with_the_sum_of_its_links() -> None:
    found = result(1, 2).policies
    assert found["split"].ratio_to_direct == pytest.approx(3, rel=0.01)
    assert found["split"].of_limit == pytest.approx(0.98, rel=0.01)
    assert found["direct"].of_limit == pytest.approx(0.98, rel=0.01)
    assert found["split"].snic_balance == pytest.approx(1.0)
    assert found["paper"].snic_balance == pytest.approx(3 / 2.8, rel=0.01)


def test_the_json_of_one_topology_has_its_policies_at_the_top() -> None:
    values = json.loads(json.dumps(report(result(1, 2)).to_json()))
    assert values["split"]["ratio_to_direct"] == pytest.approx(3, rel=0.01)
    assert {"of_limit", "snic_balance"} <= values["split"].keys()
    assert values["cpu_bound"] is False
    assert values["handoff"] == "with hand-off traffic"
    several = json.loads(json.dumps(report(result(1, 2), result(2, 1)).to_json()))
    assert several["2P1D"]["split"]["failed_loads"] == 0
    assert several["cpu_bound"] is False


def test_topologies_of_equal_storage_bandwidth_are_put_side_by_side() -> None:
    full = report(result(1, 1), result(1, 2), result(2, 1))
    assert [tie.ratio for tie in ties_of(full)] == pytest.approx([1, 1], rel=0.01)
    assert all(each.met for each in judge(full))
    assert ties_of(report(result(1, 1))) == []


def test_a_missed_target_is_said_and_one_that_the_processor_binds_is_not_judged() -> None:
    slow = result(1, 2)
    slow = replace(slow, runs=tuple(each for each in slow.runs if each.policy != "split"))
    wrong = [replace(each, policy="split") for each in slow.runs if each.policy == "direct"]
    missed = report(replace(slow, runs=(*slow.runs, *wrong)))
    assert {each.what: each.met for each in judge(missed)} == {
        "1P2D split over direct": False,
        "1P2D balance of the storage links": False,
    }
    bound = report(result(1, 2, unshaped=100 * MB))
    assert [each.met for each in judge(bound)] == [None, None]


def lone_report(ratio: float) -> ClusterReport:
    load = LoneLoad("split", 2, 64 << 20, 2.0 * ratio, 2.0, (outcome(0, 2),))
    each = replace(result(1, 2), runs=(), lone=(LoneResult("split", 2, (load,)),))
    return report(each, lone=True, gpus=8)


def fault_report(*, failure: str = "") -> ClusterReport:
    topology = Topology.of(1, 2)
    faults = parse_faults("slow:decode0@2s:0.25", topology)
    one = run("split", 8.0, topology)
    loads = (*one.outcomes, outcome(1, 3, failure=failure))
    made = [MadeFault(faults[0], STARTED_S + 2)]
    points = loaded_rate(one.links)
    effects = effects_of(made, [45 * MB], loads, points, started_s=STARTED_S, backlog_until_s=8)
    found = FaultRun(replace(one, outcomes=loads), faults, effects, points, 60 * MB)
    return report(replace(result(1, 2), runs=(), faults=found), faults="slow:decode0@2s:0.25")


def test_a_prompt_that_its_decode_engine_did_not_get_whole_is_told() -> None:
    whole = Received(9, 0, "", {"retained": 5 << 20, "handed_off": 4 << 20})
    for received, ok in (
        (whole, True),
        (replace(whole, corrupt_blocks=1, failure="corrupt"), False),
        (replace(whole, failure="peer_lost"), False),
    ):
        each = result(1, 1)
        runs = [
            replace(run, outcomes=tuple(replace(o, handed_off=received) for o in run.outcomes))
            for run in each.runs
        ]
        made = report(replace(each, runs=tuple(runs)))
        assert made.ok is ok
        values = made.to_json()["split"]
        assert isinstance(values, dict)
        assert bool(values["handed_off"]["failures"]) is not ok
        (line,) = [line for line in events(made) if line.startswith("1P1D split:")]
        assert (received.failure or "handed off whole") in line
        # A decode node that is killed on purpose cannot receive.
        harmed = report(replace(each, runs=tuple(runs)), faults="kill:decode0@1s")
        assert harmed.ok is (received.corrupt_blocks == 0)


def test_lone_loads_and_faults_have_targets_of_their_own() -> None:
    assert [each.met for each in judge(lone_report(1.05))] == [True]
    assert [each.met for each in judge(lone_report(1.2))] == [False]
    assert all(each.met for each in judge(fault_report()))
    failed = [each.what for each in judge(fault_report(failure="unavailable")) if not each.met]
    assert failed == ["1P2D failed loads"]
    assert not fault_report(failure="unavailable").ok


@pytest.mark.parametrize(
    "full",
    [report(result(1, 2), result(2, 1)), lone_report(1.05), fault_report()],
    ids=["policies", "lone", "faults"],
)
def test_every_kind_of_report_is_printed_written_and_drawn(
    full: ClusterReport, tmp_path: Path
) -> None:
    out = io.StringIO()
    print_report(full, out)
    assert "all right" in out.getvalue()
    assert hand_off_note(full.config) in out.getvalue()
    assert "| target |" in markdown(full)
    draw(full, str(tmp_path / "out.png"))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_parts_of_a_lone_load_are_prefixes_of_what_is_stored() -> None:
    workload = lone_workload((1, 2, 8), 64 << 20, 64, seed=1)
    assert len(workload.chains) == 8
    for width in (1, 2, 8):
        assert all(len(chain) >= parts(width, 64 << 20) for chain in workload.chains[:width])
    assert len(workload.chains[7]) == parts(8, 64 << 20)
    assert len({chain[0] for chain in workload.chains}) == 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"topologies": ((0, 1),)}, "--prefill must lie in"),
        ({"gpus": 99}, "compute links a node must lie in 1..16, not 99"),
        ({"converged": True, "gpus": 2}, "--converged: one NIC a node serves one engine, not 2"),
        ({"policies": ("best",)}, "unknown policy 'best'; there are direct, round-robin, paper"),
        ({"rounds": 0}, "--rounds must lie in"),
        ({"converged": True, "cnic_bytes_per_s": 1e7}, "the one NIC of a node"),
        ({"converged": True, "lone": True}, "--lone counts compute links"),
        ({"faults": "kill:decode0@1s", "lone": True}, "in one topology, not in --lone loads"),
        ({"faults": "kill:decode7@1s"}, "there is no node 'decode-7'"),
        ({"data": "/nowhere"}, "there is no such folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        config(**changes)
    assert says in str(caught.value)


def test_the_storage_rate_is_chosen_so_that_the_links_bind() -> None:
    free = ClusterBenchConfig()
    chosen = free.fitting(Topology.of(1, 2), 300 * MB)
    assert chosen.snic_bytes_per_s == 33 * MB
    assert chosen.rates.compute_bytes_per_s == 8 * 33 * MB
    assert free.fitting(Topology.of(1, 2), 1e10).snic_bytes_per_s == 50 * MB
    asked = ClusterBenchConfig(snic_bytes_per_s=12 * MB, gpus=4)
    assert asked.fitting(Topology.of(1, 2), 300 * MB) is asked
    assert asked.rates.compute_bytes_per_s == 24 * MB


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_flags_become_one_config() -> None:
    read = config_of(parsed("--topology", "1P1D,2p4d", "--snic", "20MB/s", "--policies", "split"))
    assert read.topologies == ((1, 1), (2, 4))
    assert read.snic_bytes_per_s == 20 * MB
    assert config_of(parsed("--lone")).gpus == 8
    with pytest.raises(InvalidRequest, match="'1P' is not a topology"):
        config_of(parsed("--topology", "1P"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--topology", ""), "--topology is empty"),
        (("--snic", "0"), "--snic 0: a link has a rate"),
        (("--snic", "5MB/s,0"), "--snic 0: a link has a rate"),
        (("--cnic", "0MB/s"), "--cnic 0MB/s: a link has a rate"),
        (("--gpus", "0"), "compute links a node must lie in"),
        (("--load-mib", "0"), "--load-mib must lie in"),
        (("--seed", str(1 << 70)), "--seed must lie in"),
        (("--seed", "-1"), "--seed must lie in"),
        (("--faults", ","), "names no fault; write for example"),
        (("--lone", "--converged"), "--lone counts compute links"),
        (("--gpus", "3", "--converged"), "--converged: one NIC a node"),
        (("--cnic", "5MB/s", "--converged"), "--converged: the one NIC"),
    ],
)
def test_wrong_flags_are_refused_by_name_and_none_is_taken_for_a_default(
    words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        config_of(parsed(*words))


def test_a_wrong_flag_and_a_missed_target_have_their_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(parsed("--rounds", "0")) == EXIT_USAGE

    async def measured(*_args: object) -> ClusterReport:
        return lone_report(1.2)

    monkeypatch.setattr(command_module, "_run", measured)
    out, text = tmp_path / "out.json", tmp_path / "out.md"
    words = ("--json", str(out), "--markdown", str(text))
    assert command.run(parsed(*words)) == EXIT_OK
    assert command.run(parsed(*words[:2], "--check")) == EXIT_FAILED
    assert "MISSED" in capsys.readouterr().out
    assert json.loads(out.read_text())["lone"][0]["over_limit"] == pytest.approx(1.2)
    assert "| target |" in text.read_text()


def test_a_converged_node_has_one_link_in_and_one_out() -> None:
    links = links_of(Topology.of(1, 1, converged=True), config(converged=True).rates)
    assert [(link.node, link.kind) for link in links] == [
        ("prefill-0", LinkKind.SNIC_IN),
        ("prefill-0", LinkKind.CNIC_OUT),
        ("decode-0", LinkKind.SNIC_IN),
        ("decode-0", LinkKind.CNIC_OUT),
    ]

"""`dualpath simulate` says what is wrong with what it is asked, and writes what it simulated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dualpath.bench.progress import Progress
from dualpath.bench.simulate.paper import Comparison, reproduce
from dualpath.bench.simulate.request import SimulationRequest, rates
from dualpath.bench.simulate.table import comparison_rows, markdown_document
from dualpath.cli.main import main
from dualpath.transfer.errors import InvalidRequest


def test_a_run_is_written_with_what_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    flags = ["--model", "ds-27b", "--prefill", "1", "--decode", "1", "--agents", "2"]
    flags += ["--max-len", "32K", "--system", "dualpath,oracle", "--json", str(out)]
    assert main(["simulate", *flags]) == 0
    figures = json.loads(out.read_text())
    assert figures["request"]["model"] == "ds-27b"
    dualpath, oracle = figures["results"]
    assert (dualpath["system"], oracle["system"]) == ("dualpath", "oracle")
    assert dualpath["turns"] == oracle["turns"] > 0
    assert dualpath["bytes_read"] > oracle["bytes_read"] == 0
    assert oracle["jct_s"] < dualpath["jct_s"]
    assert "oracle" in capsys.readouterr().out


def test_an_online_run_has_a_row_for_each_rate(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = ["--model", "ds-27b", "--prefill", "1", "--decode", "1", "--max-len", "32K"]
    flags += ["--online", "--aps", "0.1:0.2:0.1", "--duration", "30s", "--tool-latency", "1s"]
    assert main(["simulate", *flags, "--system", "split", "--json", str(out)]) == 0
    assert [one["aps"] for one in json.loads(out.read_text())["results"]] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--system", "dualpth"], "did you mean 'dualpath'"),
        (["--model", "nosuch"], "'nosuch' is not a model"),
        (["--max-len", "33K"], "not a workload"),
        (["--prefill", "0"], "prefill_nodes is 0"),
        (["--agents", "-1"], "1..1048576 agents, not -1"),
        (["--snic", "fast"], "a rate such as"),
        (["--online", "--aps", "2:1:1"], "FIRST:LAST:STEP"),
        (["--online", "--aps", "0.1", "--agents", "3"], "leave --agents out"),
        (["--staging", "1MB"], "host memory holds"),
        (["--json", "nowhere/out.json"], "there is no folder nowhere"),
        (["paper", "--plots", "nowhere"], "there is no such folder"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *flags]) == 2
    assert reason in capsys.readouterr().err


def test_rates_are_a_list_or_a_range() -> None:
    assert rates("0.1:0.5:0.1") == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert rates("0.3, 0.1") == (0.3, 0.1)
    for wrong in ("", "0", "a", "1:2", "0.1:1:0", "0.1:1e9:0.1", "inf"):
        with pytest.raises(InvalidRequest, match="--aps"):
            rates(wrong)


def test_a_setup_is_the_same_for_every_system_of_a_request() -> None:
    request = SimulationRequest(agents=3, systems=("basic", "split"))
    (_, _, first), (_, _, second) = request.setups()
    assert first.arrivals == second.arrivals
    assert first.cluster == second.cluster


def test_a_deviation_beyond_its_tolerance_is_missed_and_none_is_only_reported() -> None:
    assert Comparison("a", 2.0, 2.1, 0.1).verdict == "met"
    assert Comparison("a", 2.0, 2.3, 0.1).verdict == "missed"
    assert Comparison("a", 2.0, 1.7, 0.1).verdict == "missed"
    assert Comparison("a", 2.0, 1.7, 0.1, ceiling=True).verdict == "met"
    assert Comparison("a", 2.0, 9.0).verdict == "reported"
    assert Comparison("a", 2.0, 2.1).deviation == pytest.approx(0.05)


def test_the_reproduction_compares_every_result_and_lists_every_run() -> None:
    report = reproduce(Progress(), agents=(2,))
    names = [one.name for one in report.comparisons]
    assert len(set(names)) == len(names)
    assert {"offline_660b_64k", "pd_sweep_27b_mean", "ablation_layerwise"} <= set(names)
    # Two agents leave the links idle: no path gains anything.
    assert report.comparisons[0].simulated < 1.87
    assert len(report.runs) == 6 + 9
    text = markdown_document(report)
    assert all(name in text for name in names)
    assert len(comparison_rows(report)[1]) == len(names)
    assert json.loads(json.dumps(report.to_json()))["offline_660b_64k"]["published"] == 1.87

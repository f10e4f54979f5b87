"""`dualpath simulate` says what is wrong with what it is asked, and writes what it simulated."""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from dualpath.bench.models.catalogue import CATALOGUE
from dualpath.bench.progress import Progress
from dualpath.bench.simulate.comparison import Comparison
from dualpath.bench.simulate.detail_flags import add_detail_flags, details_of
from dualpath.bench.simulate.engine_details import EngineDetails
from dualpath.bench.simulate.paper import reproduce
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
        (["--max-len", "33K"], "--max-len 33K: give 32K, 48K, 64K"),
        (["--prefill", "0"], "--prefill 0: a cluster has 1 node"),
        (["--agents", "-1"], "1..1048576 agents, not -1"),
        (["--snic", "fast"], "a rate such as"),
        (["--online", "--aps", "2:1:1"], "FIRST:LAST:STEP"),
        (["--online", "--aps", "0.1", "--agents", "3"], "leave --agents out"),
        (["--staging", "1MB"], "host memory holds 21 of ds-v3.2; give more --staging"),
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
    assert {
        *("offline_660b_64k", "pd_sweep_27b_mean", "ablation_layerwise", "append_gain_least"),
        *("snic_max_over_mean_dualpath", "online_capacity_mean", "scale_jct_ratio"),
        "working_set_660b_0.1_aps_gb",
    } <= set(names)
    # Two agents leave the links idle: no path gains anything.
    assert report.comparisons[0].simulated < 1.87
    text = markdown_document(report)
    assert all(name in text for name in names)
    assert all(table.title in text for table in report.tables)
    assert len(comparison_rows(report)[1]) == len(names)
    assert json.loads(json.dumps(report.to_json()))["offline_660b_64k"]["published"] == 1.87


def session(path: Path, *, second: int = 2) -> str:
    """A trace of one conversation with a break of 5 s."""
    row = {"trace": "t", "sub": 0, "i": 1, "t": 3.0, "in": 6400, "out": 30, "lcp": 0}
    later = {**row, "i": second, "t": 9.0, "in": 6464, "lcp": 100, "think_time": 5.0}
    rows = [{**row, "runs": [[1, 100]]}, {**later, "runs": [[1, 101]]}]
    path.write_text("\n".join(json.dumps(each) for each in rows))
    return str(path)


TRACES = Path(__file__).parents[3] / "shared" / "traces"
SMALL = ["--model", "ds-27b", "--prefill", "1", "--decode", "1", "--system", "dualpath"]


def test_a_trace_is_run_at_once_at_its_times_or_by_rates(tmp_path: Path) -> None:
    file, out = session(tmp_path / "trace.jsonl"), tmp_path / "out.json"

    def run(*more: str) -> list[dict[str, Any]]:
        assert main(["simulate", *SMALL, "--trace", file, "--json", str(out), *more]) == 0
        results: list[dict[str, Any]] = json.loads(out.read_text())["results"]
        return results

    (once,) = run("--agents", "2")
    assert once["turns"] == 4
    assert once["bytes_read"] > 0
    assert once["jct_s"] > 5, "the time between the turns is the trace's"
    (recorded,) = run("--recorded")
    assert recorded["turns"] == 2
    assert recorded["jct_s"] > 3 + 5
    (quick,) = run("--agents", "2", "--tool-latency", "0s")
    assert quick["jct_s"] < 5
    assert [one["aps"] for one in run("--online", "--aps", "0.2,0.1", "--duration", "60s")] == [
        0.1,
        0.2,
    ]


def test_a_trace_with_a_gap_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = session(tmp_path / "trace.jsonl", second=3)
    assert main(["simulate", *SMALL, "--trace", file]) == 2
    assert "request 3 follows request 1: a gap" in capsys.readouterr().err


def test_every_engine_detail_has_a_flag(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_detail_flags(parser)
    assert details_of(parser.parse_args([])) == EngineDetails()
    for field in fields(EngineDetails):
        flag = field.name.removesuffix("_s").replace("_", "-")
        if isinstance(field.default, bool):
            words = [f"--{'no-' if field.default else ''}{flag}"]
            expected: object = not field.default
        else:
            words, expected = [f"--{flag}", "3"], 3
        assert getattr(details_of(parser.parse_args(words)), field.name) == expected
    out = tmp_path / "out.json"
    flags = [*SMALL, "--agents", "1", "--max-len", "32K", "--fetch", "50ms", "--json", str(out)]
    assert main(["simulate", *flags]) == 0
    assert json.loads(out.read_text())["request"]["details"]["fetch_s"] == 0.05


def test_a_model_of_ones_own_is_a_table_of_the_catalogues_fields(tmp_path: Path) -> None:
    mine, out = tmp_path / "mine.toml", tmp_path / "out.json"
    table = CATALOGUE.read_text().partition('["qwen2.5-32b"]')[2].partition("\n[")[0]
    mine.write_text(f"[mine]{table}")
    flags = ["--model", str(mine), "--prefill", "1", "--decode", "1", "--agents", "1"]
    flags += ["--max-len", "32K", "--system", "split", "--json", str(out)]
    assert main(["simulate", *flags]) == 0
    assert json.loads(out.read_text())["results"][0]["turns"] > 0


def test_a_system_that_is_far_past_the_slo_is_not_run_at_higher_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    flags = [*SMALL, "--max-len", "32K", "--online", "--aps", "0.1:0.4:0.1", "--duration", "20s"]
    flags += ["--slo", "ttft=1us", "--json", str(out)]
    if importlib.util.find_spec("matplotlib"):
        flags += ["--plot", str(picture)]
    assert main(["simulate", *flags]) == 0
    found = json.loads(out.read_text())
    assert [one["aps"] for one in found["results"]] == [0.1, 0.2]
    assert found["left_out"] == {"dualpath": [0.3, 0.4]}
    assert found["within_slo"]["dualpath"] == {"agents_per_s": 0.0, "at_least": False}
    shown = capsys.readouterr().out
    assert "dualpath: 0.3, 0.4 agents/s not run: more than 2 times past the SLO" in shown
    if "--plot" in flags:
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--snic=-400Gb"], "--snic -400Gb: a rate is above 0"),
        (["--cnic", "0"], "--cnic 0: a rate is above 0"),
        (["--staging", "0"], "--staging 0: a size is above 0"),
        (["--decode", "0"], "--decode 0: a cluster has 1 node of each"),
        (["--prefill", "-2"], "--prefill -2"),
        (["--model", "qwen2.5-32b", "--gpus-per-node", "4"], "do not divide the 4 GPUs"),
        (["--fetch", "0"], "--fetch 0: a time above 0"),
        (["--reads-at-once", "many"], "--reads-at-once many: a whole number"),
        (["--reads-at-once", "0"], "reads_at_once is 0"),
        (["--duration", "10s"], "--duration is for --online"),
        (["--online", "--duration", "0"], "--duration 0: a time above 0"),
        (["--online", "--slo", "ttft"], "give ttft=TIME once"),
        (["--recorded"], "--recorded takes the times of a --trace"),
        (["--trace", "x", "--max-len", "32K"], "--trace takes its place"),
        (["--trace", "/nowhere/x.jsonl"], "cannot be opened"),
        (["--tool-latency", "soon"], "--tool-latency: 'soon' is not a duration"),
        (["--plots", "."], "give --plot FILE"),
        (["--jobs", "2"], "--jobs is for `paper`"),
        (
            ["sensitivity", "--system", "split"],
            "--system changes nothing in `simulate sensitivity`",
        ),
        (["--plot", "nowhere/x.png"], "there is no folder nowhere"),
        (["paper", "--system", "split"], "--system changes nothing in `simulate paper`"),
        (["paper", "--fetch", "1s"], "--fetch changes nothing in `simulate paper`"),
        (["--system", ","], "no system is named"),
        (["--agents", "0"], "--agents 0: nothing would be simulated"),
        (["--seed", "-1"], "--seed -1: give 0 or more"),
    ],
)
def test_flags_that_cannot_be_or_would_change_nothing_are_refused(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *flags]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("mooncake_synthetic.jsonl.gz", ["--recorded"]),
        pytest.param(
            "claude_code_sessions.jsonl.gz",
            ["--agents", "4", "--staging", "640GB"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_recorded_traces_are_run(name: str, flags: list[str], tmp_path: Path) -> None:
    file, out = TRACES / name, tmp_path / "out.json"
    if not file.exists():
        pytest.skip(f"no {name} beside the checkout (../shared/traces)")
    words = ["--model", "ds-27b", "--system", "dualpath", "--trace", str(file), *flags]
    assert main(["simulate", *words, "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text())["results"]
    assert found["turns"] > 100
    assert found["bytes_read"] > 0

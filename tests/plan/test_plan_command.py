"""`dualpath plan`: what it answers, and what it refuses or tells of, with the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dualpath.cli.main import EXIT_OK, EXIT_USAGE, main

ASKED = {"--model": "ds-v3.2", "--gpus": "48", "--snic": "400Gb", "--cnic": "400Gb"}


def plan(capsys: pytest.CaptureFixture[str], *more: str, **changes: str) -> tuple[int, str, str]:
    flags = ASKED | {f"--{name}": value for name, value in changes.items()}
    status = main(["plan", *(f"{name}={value}" for name, value in flags.items()), *more])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_the_example_of_the_documents_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = plan(capsys, "--workload=agent-64k")
    assert status == EXIT_OK
    assert "1/7 <= P/D <= 7/2" in out
    assert "best 2P4D" in out
    assert "speed-up" in out
    assert "projected" in out


def test_json_has_the_range_the_demand_every_ratio_and_what_binds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, _ = plan(capsys, "--json", "--slo=ttft=4s,tpot=50ms", model="ds-27b", gpus="24")
    found = json.loads(out)
    assert status == EXIT_OK
    assert found["kind"] == "projected"
    assert found["bottleneck_free_range"]["low"] == pytest.approx(1 / 7)
    assert found["slo"] == {"ttft_s": 4, "tpot_s": 0.05}
    assert found["turn"]["load_bytes"] == pytest.approx(found["turn"]["cached_tokens"] * 21_720)
    assert [each["ratio"] for each in found["ratios"]] == ["1P2D", "2P1D"]
    for way in ("basic", "dual path", "split"):
        best = found["best"][way]
        devices = best["devices_turns_per_s"].values()
        assert best["turns_per_s"] == pytest.approx(min(each for each in devices if each))
        assert best["binds"]
    assert found["best"]["basic"]["speed_up"] == 1
    assert found["best"]["split"]["speed_up"] >= found["best"]["dual path"]["speed_up"] > 1


def test_a_trace_is_planned_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    row = {"trace": "t", "sub": 0, "i": 1, "t": 0, "in": 6400, "out": 30, "lcp": 0}
    rows = [{**row, "runs": [[1, 100]]}, {**row, "i": 2, "in": 6464, "runs": [[1, 101]]}]
    file.write_text("\n".join(json.dumps(each) for each in rows))
    status, out, _ = plan(capsys, f"--trace={file}")
    assert status == EXIT_OK
    assert "mine.jsonl" in out
    assert "warning     only 49.8% of" not in out
    assert "warning     only 50% of" in out
    rows[1]["i"] = 3
    file.write_text("\n".join(json.dumps(each) for each in rows))
    status, _, err = plan(capsys, f"--trace={file}")
    assert status == EXIT_USAGE
    assert "request 3 follows request 1: a gap" in err


def test_a_picture_is_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    status, out, _ = plan(capsys, f"--plot={picture}", model="ds-27b", gpus="24")
    assert status == EXIT_OK
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gpus": "50"}, "not a multiple of the 8 of a node; give 48 or 56"),
        ({"gpus": "8"}, "give at least 16"),
        ({"gpus": "0"}, "--gpus 0"),
        ({"gpus": "-8"}, "--gpus -8"),
        ({"snic": "0"}, "--snic 0: a rate is above 0; give 400Gb"),
        ({"cnic": "-400Gb"}, "--cnic -400Gb: a rate is above 0"),
        ({"dram": "fast"}, "--dram: 'fast' is not a rate"),
        ({"snic": "400G"}, "--snic: '400G' is not a rate"),
        ({"model": "ds-v3.1"}, "did you mean 'ds-v3"),
        ({"workload": "agent-65k"}, "did you mean 'agent-64k'"),
        ({"trace": "/nowhere/trace.jsonl"}, "cannot be opened"),
        ({"slo": "ttft=0s"}, "nothing is answered in no time"),
        ({"slo": "ttlt=4s"}, "unknown promise 'ttlt'; did you mean 'ttft'"),
        ({"slo": "ttft=4s,ttft=5s"}, "give ttft=TIME once"),
        ({"slo": "tpot=fast"}, "--slo tpot: 'fast' is not a duration"),
        ({"slo": "ttft=1ms"}, "ttft=0.001s cannot be kept"),
        ({"slo": "tpot=1ms"}, "tpot=1ms cannot be kept"),
        ({"gpus": "16"}, "does not fit a prefill engine"),
        ({"model": "qwen2.5-32b", "gpus-per-node": "12"}, "takes 8 GPUs"),
        ({"plot": "/nowhere/plan.png"}, "there is no folder"),
        ({"calibration": "/nowhere/mine.toml"}, "cannot read"),
        ({"staging": "80GB"}, "--staging is for --simulate"),
    ],
)
def test_numbers_that_cannot_be_are_refused_with_the_reason(
    capsys: pytest.CaptureFixture[str], changes: dict[str, str], named: str
) -> None:
    status, _, err = plan(capsys, **changes)
    assert status == EXIT_USAGE
    assert named in err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cnic": "100Gb"}, "is slower than the SNIC of a node"),
        ({"snic": "400GB/s", "cnic": "400GB/s"}, "bits (400Gb) and bytes (50GB/s)"),
        ({"dram": "100GB/s"}, "cannot carry a relay at the SNIC's rate"),
        ({"dram": "10GB/s"}, "servers have some hundred GB/s"),
        ({"cnic": "40Gb"}, "no ratio of prefill to decode nodes is free"),
        ({"snic": "1600Gb"}, "a second path gains less than 2 %"),
        ({"gpus": "64", "gpus-per-node": "32"}, "servers have up to 16"),
    ],
)
def test_numbers_that_are_odd_are_told_of_with_the_remedy(
    capsys: pytest.CaptureFixture[str], changes: dict[str, str], named: str
) -> None:
    status, out, _ = plan(capsys, **changes)
    assert status == EXIT_OK
    warnings = [line for line in out.splitlines() if line.startswith("warning")]
    assert any(named in line for line in warnings), out

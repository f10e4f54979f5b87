"""`dualpath bench scheduler` measures what it says, on a small cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dualpath.bench.command import command
from dualpath.bench.scheduler.measurement import measure
from dualpath.bench.scheduler.shape import Shape
from dualpath.cli.main import command_parser
from dualpath.scheduler.policies import POLICIES
from dualpath.transfer.errors import InvalidRequest

SMALL = Shape(prefill=2, decode=4, gpus=2, rate=500, seconds=1.0, decode_s=0.5)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_request_that_came_was_decided_and_the_times_add_up(policy: str) -> None:
    figures = measure(SMALL, policy, lambda text: None)
    assert figures.requests + figures.waiting_at_end >= 500
    assert figures.requests >= 450
    assert figures.fetches == 50 * 2
    assert figures.scheduler_s == pytest.approx(sum(figures.seconds_by_call.values()))
    assert 0 < figures.fetch_s_p50 <= figures.fetch_s_p99 <= figures.fetch_s_max
    assert figures.processor_s > 0
    assert figures.requests_per_processor_s == pytest.approx(figures.requests / figures.processor_s)


def test_the_program_writes_the_figures_and_the_machine(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = f"scheduler --policies paper --times 1,2 --prefill 1 --decode 1 --rate 200 --json {out}"
    assert command.run(command_parser(command).parse_args([*words.split(), "--seconds=0.2"])) == 0
    found = json.loads(out.read_text())
    assert [run["shape"]["decode"] for run in found["runs"]] == [1, 2]
    assert found["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--times=0", "whole numbers"),
        ("--policies=best", "'best'"),
        ("--policies=,", "--policies is empty"),
        ("--rate=-1", "rate is -1"),
        ("--grpc=-5", "--grpc is -5"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(command_parser(command).parse_args(["scheduler", flags])) == 2
    assert text in capsys.readouterr().err


def test_requests_pass_the_service_and_a_document_gets_the_tables(tmp_path: Path) -> None:
    document, out = tmp_path / "page.md", tmp_path / "out.json"
    document.write_text("before\n<!-- here: begin -->\nold\n<!-- here: end -->\nafter\n")
    words = "scheduler --policies split --times 1 --prefill 2 --decode 2 --rate 200 --grpc 300 "
    words += f"--seconds 0.2 --json {out} --markdown {document}#here"
    assert command.run(command_parser(command).parse_args(words.split())) == 0
    (edge,) = json.loads(out.read_text())["grpc"]
    assert (edge["requests"], edge["groups"], edge["policy"]) == (300, 2, "split")
    assert edge["requests_per_s"] > 0
    text = document.read_text()
    assert "old" not in text
    assert "| over gRPC, policy |" in text
    assert "| split | 32 | 4 |" in text
    document.write_text("no marks")
    assert command.run(command_parser(command).parse_args(words.split())) == 1


def test_a_shape_of_no_time_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="interval_s"):
        Shape(interval_s=0)

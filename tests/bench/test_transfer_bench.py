"""`dualpath bench transfer`: its grains, its flows, its report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from dualpath.bench.rounds import GIB, Sample, Series
from dualpath.bench.transfer.command import EXIT_MISSED, EXIT_OK, EXIT_USAGE
from dualpath.bench.transfer.contestant import (
    CIPHER,
    MEMCPY_FINE,
    TLS_SOCKET,
    flow,
    memcpy,
    tls_limits,
)
from dualpath.bench.transfer.far_end import FarEnd
from dualpath.bench.transfer.grain import GRAINS, SLOTS, Grain
from dualpath.bench.transfer.report import HEADINGS, LIMITS, Report, draw, markdown, rows
from dualpath.cli.main import main
from dualpath.transfer.errors import Corrupt, Unavailable
from dualpath.transfer.transport import BATCH_WRITES_MAX, WRITE_BYTES_MAX


def series(*gibs: float) -> Series:
    return Series(tuple(Sample(int(GIB), 1 / rate, 0.5) for rate in gibs))


def report_of(fine: float, rounds: int = 3, copies: float = 4.0) -> Report:
    flows = {("tcp", grain.name): series(*[2.0] * rounds) for grain in GRAINS}
    flows["tcp", "40K-scattered"] = series(*[fine] * rounds)
    machine = {"cores": 2, "processor": "p", "system": "s", "kernel": "k"}
    limits = {name: series(*[4.0] * rounds) for name in LIMITS}
    limits[MEMCPY_FINE] = series(*[copies] * rounds)
    return Report(limits, flows, 1 << 28, rounds, machine, "today")


@pytest.mark.parametrize("grain", GRAINS, ids=lambda grain: str(grain.name))
def test_no_two_slices_of_a_grain_share_a_byte_and_all_fit(grain: Grain) -> None:
    assert grain.parts <= BATCH_WRITES_MAX
    assert grain.batch_bytes <= WRITE_BYTES_MAX
    pieces = sorted(
        piece
        for slot in range(SLOTS)
        for part in range(grain.parts)
        for piece in grain.target(slot).part(part).pieces()
    )
    assert sum(nbytes for _, nbytes in pieces) == SLOTS * grain.batch_bytes
    ends = [offset + nbytes for offset, nbytes in pieces]
    assert all(end <= start for end, (start, _) in zip(ends, pieces[1:], strict=False))
    assert ends[-1] <= grain.target_bytes
    assert grain.source(SLOTS - 1).span()[1] == grain.source_bytes


@pytest.mark.parametrize("kind", ["memory", "shm", "tcp", "tcp+tls"])
def test_a_flow_moves_all_of_its_batches_and_verifies_them(kind: str) -> None:
    grain = GRAINS[1]
    with flow(kind, grain, 20 * grain.batch_bytes) as measure:
        assert [measure().nbytes for _ in range(2)] == [20 * grain.batch_bytes] * 2


def test_an_error_in_the_middle_is_not_hidden_by_what_cleans_up() -> None:
    def broken() -> None:
        with memcpy(1 << 20):
            raise Corrupt("other bytes")

    with pytest.raises(Corrupt, match="other bytes"):
        broken()


def test_the_limits_of_tls_move_everything() -> None:
    with tls_limits(3 << 20) as contestants:
        assert {name: measure().nbytes for name, measure in contestants.items()} == {
            TLS_SOCKET: 3 << 20,
            CIPHER: 3 << 20,
        }


def test_what_tls_costs_is_told_beside_tcp() -> None:
    report = report_of(1.0)
    flows = {**report.flows, ("tcp+tls", "1M"): series(0.5, 0.5, 0.5)}
    both = replace(report, flows=flows)
    assert both.of_tcp("tcp+tls", "1M") == pytest.approx(0.25)
    assert both.of_tcp("tcp", "1M") is None
    assert json.loads(json.dumps(both.to_json()))["tcp+tls"]["1M"]["ratio_to_tcp"] == 0.25
    assert "| tcp+tls | 1M | 0.50 | 1.00 | 0.25 |" in markdown(both)


def test_a_far_end_names_what_it_cannot_do() -> None:
    with FarEnd() as far, pytest.raises(Unavailable, match="open"):
        far.ask("open", transport="w", kind="tcp", lane_dscp=["all=99"], listen="")


def test_fine_grains_are_judged_by_those_of_one_mebibyte() -> None:
    assert report_of(1.5).misses() == []
    (miss,) = report_of(1.0).misses()
    assert "tcp 40K-scattered: 0.50" in miss
    assert report_of(1.0, rounds=2).misses() == []  # too few to tell
    (slow_copies,) = report_of(1.0, copies=1.2).misses()
    assert "0.83 of memcpy-40K" in slow_copies  # what the machine allows is said, and still missed
    found = json.loads(json.dumps(report_of(1.0).to_json()))
    assert found["tcp"]["40K-scattered"]["ratio_to_1m"] == pytest.approx(0.5)
    assert found["tcp"]["1M"]["ratio_to_hashing_socket"] == pytest.approx(0.5)


def test_a_report_is_shown_as_a_table_and_drawn(tmp_path: Path) -> None:
    assert {len(row) for row in rows(report_of(1.0))} == {len(HEADINGS)}
    assert "| tcp | 40K-scattered |" in markdown(report_of(1.0))
    draw(report_of(1.0), str(tmp_path / "out.png"))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--mib", "0"], ["--only", "pigeon"]])
def test_wrong_flags_are_wrong_usage(flags: list[str]) -> None:
    assert main(["bench", "transfer", *flags]) == EXIT_USAGE


@pytest.mark.slow
def test_a_short_run_measures_every_transport_and_grain(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["bench", "transfer", "--quick", "--json", str(out)]) in (EXIT_OK, EXIT_MISSED)
    found = json.loads(out.read_text())
    assert all(
        found[kind][grain.name]["gibs"] > 0
        for kind in ("memory", "tcp", "tcp+tls")
        for grain in GRAINS
    )

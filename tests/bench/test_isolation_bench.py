"""`dualpath bench isolation`: its links, its figures, and a short run where root allows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dualpath.bench.command import load_program
from dualpath.bench.isolation.command import EXIT_OK, EXIT_USAGE
from dualpath.bench.isolation.figures import TARGETS, Figures, percentile
from dualpath.bench.isolation.link import LINKS, SIDES, address_of, create_commands, shape_commands
from dualpath.bench.isolation.report import draw, lines, markdown
from dualpath.bench.isolation.scene import Case, Window
from dualpath.bench.testbed.namespaces import NAMESPACES_FOLDER
from dualpath.cli.main import main
from dualpath.transfer.lane_marks import DSCP_KV


def figures_of(operation_ms: dict[Case, float], message_ms: dict[Case, float]) -> Figures:
    figures = Figures(50e6, {"cores": 2, "processor": "p", "system": "s", "kernel": "k"}, "today")
    for case in Case:
        times = {"1m": [operation_ms[case]] * 3, "4k": [message_ms[case]] * 5}
        figures.windows[case] = [Window(times, 10e6), Window(times, 30e6)]
    return figures


def held() -> Figures:
    control = dict.fromkeys(Case, 10.0)
    return figures_of(control | {Case.NO_LANES: 25.0}, control | {Case.NO_LANES: 200.0})


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(i) for i in range(1, 101)], 99) == 99.0
    assert percentile([7.0], 99) == 7.0


def test_the_json_has_percentiles_of_each_case_and_size() -> None:
    found = json.loads(json.dumps(held().to_json()))
    assert {"control", "lanes", "no_lanes", "control_again"} <= set(found)
    assert found["no_lanes"]["p50_ms"] == 25.0
    assert found["no_lanes"]["4k"]["p99_ms"] == 200.0
    assert found["lanes"]["kv_mb_per_s"] == 20.0
    assert found["ratios"]["no_lanes_4k_p50_ratio"] == 20.0
    assert found["misses"] == []


def test_a_missed_target_is_named() -> None:
    control = dict.fromkeys(Case, 10.0)
    figures = figures_of(control | {Case.LANES: 10.6}, control)
    assert len(figures.misses()) == len(TARGETS) - 1
    assert any("lanes_1m_p50_ratio" in miss for miss in figures.misses())
    assert sum(line.endswith("missed") for line in lines(figures)) == len(TARGETS) - 1


def test_a_run_is_shown_as_a_table_and_drawn(tmp_path: Path) -> None:
    text = markdown(held())
    assert all(f"| {case.value} |" in text for case in Case)
    draw(held(), str(tmp_path / "out.png"))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_links_and_sides_have_addresses_of_their_own_in_namespaces_of_their_own() -> None:
    assert len({address_of(side, link) for side in SIDES for link in LINKS}) == 4
    words = [word for command in create_commands("dualpath-iso-x") for word in command]
    assert {"dualpath-iso-x-a", "dualpath-iso-x-b"} <= set(words)


def test_kv_is_told_by_its_mark_and_has_a_small_share_with_a_high_ceiling() -> None:
    commands = [" ".join(command) for command in shape_commands("ns", "compute", 50e6)]
    (kv,) = [command for command in commands if "classid 1:20" in command]
    assert "rate 20000000bit ceil 400000000bit" in kv
    (chosen,) = [command for command in commands if " filter " in f" {command} "]
    assert f"tos {hex(DSCP_KV << 2)} 0xfc flowid 1:20" in chosen
    assert sum("bfifo" in command for command in commands) == 2


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--link", "fast"], ["--link", "1kB/s"]])
def test_wrong_flags_are_wrong_usage(flags: list[str]) -> None:
    assert main(["bench", "isolation", *flags]) == EXIT_USAGE


def test_without_what_it_needs_it_says_so_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert load_program("isolation").name == "isolation"
    assert main(["bench", "isolation", "--quick"]) == EXIT_OK
    assert "skipped: not root" in capsys.readouterr().out


@pytest.mark.root
@pytest.mark.slow
def test_a_short_run_measures_every_case_and_leaves_no_namespace(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["bench", "isolation", "--quick", "--json", str(out)]) == EXIT_OK
    found = json.loads(out.read_text())
    for case in Case:
        assert found[case.value]["count"] > 0
        assert found[case.value]["kv_mb_per_s"] > 0
    assert not list(NAMESPACES_FOLDER.glob("dualpath-iso-*"))

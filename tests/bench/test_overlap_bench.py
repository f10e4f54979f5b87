"""`dualpath bench overlap`: the ideal, its report, a short run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dualpath.bench.overlap.command import EXIT_MISSED, EXIT_OK, EXIT_USAGE
from dualpath.bench.overlap.figures import (
    HEADINGS,
    JUDGED_ROUNDS_MIN,
    RATIO_MAX,
    Case,
    Figures,
    Run,
    Shape,
    ideal_s,
    markdown,
    reachable_s,
    rows,
)
from dualpath.bench.overlap.scene import LAYER_BYTES, LAYERS, shape_of
from dualpath.cli.main import main
from hypothesis import given
from hypothesis import strategies as st

SECONDS = st.floats(0.001, 100)
MACHINE = {"cores": 2, "processor": "p", "system": "s", "kernel": "k"}


@given(SECONDS, SECONDS, st.integers(1, 100))
def test_the_ideal_is_that_of_layers_one_after_another(
    load_s: float, compute_s: float, layers: int
) -> None:
    opens = [(layer + 1) / layers for layer in range(layers)]
    ideal = ideal_s(load_s, compute_s, layers)
    assert reachable_s(load_s, compute_s, opens) == pytest.approx(ideal)
    assert reachable_s(load_s, compute_s, [1.0] * layers) == pytest.approx(load_s + compute_s)


def test_layers_open_with_the_chunks_that_hold_their_last_bytes() -> None:
    assert shape_of(256 << 10, 1 << 26).layers_per_chunk == 1
    shape = shape_of(40 << 10, 1 << 26)
    assert shape.opens[:6] == (0.2,) * 6  # 256 KiB hold six layers whole
    assert shape.opens[6:12] == (0.4,) * 6
    assert shape.opens[-1] == 1.0
    assert shape.layers_per_chunk == 6.4


def figures_of(overlapped_s: float, rounds: int = JUDGED_ROUNDS_MIN) -> Figures:
    opens = tuple((layer + 1) / 10 for layer in range(10))
    case = Case(Shape(1 << 18, 8, opens), 1.0)
    run = Run(1.0, 1.0, overlapped_s, 2.0)
    return Figures(1e8, MACHINE, "today", {case: [run] * rounds})


def test_what_is_far_from_the_ideal_is_named_and_judged_only_after_some_rounds() -> None:
    assert figures_of(1.1 * RATIO_MAX * 0.99).misses() == []
    (miss,) = figures_of(1.1 * RATIO_MAX * 1.01).misses()
    assert "256 KiB" in miss
    assert figures_of(9.0, JUDGED_ROUNDS_MIN - 1).misses() == []


def test_a_report_is_shown_as_a_table_and_as_json() -> None:
    figures = figures_of(1.25)
    assert {len(row) for row in rows(figures)} == {len(HEADINGS)}
    assert "| 256 KiB | 1 | 1 | 1.00 | 1.00 | 1.25 | 1.14 | 1.14 | 2.00 | 1.60 |" in markdown(
        figures
    )
    found = json.loads(json.dumps(figures.to_json()))
    assert found["cases"][0]["ratio_to_ideal"] == pytest.approx(1.25 / 1.1)


@pytest.mark.parametrize("layer_bytes", LAYER_BYTES)
def test_shapes_hold_about_the_bytes_that_were_asked_for(layer_bytes: int) -> None:
    shape = shape_of(layer_bytes, 60_000_000)
    assert shape.layers == LAYERS
    assert 50_000_000 < shape.nbytes <= 60_000_000
    assert shape_of(layer_bytes, 1).blocks == 1


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--link", "1KB/s"], ["--link", "fast"]])
def test_wrong_flags_are_wrong_usage(flags: list[str]) -> None:
    assert main(["bench", "overlap", *flags]) == EXIT_USAGE


@pytest.mark.slow
def test_a_short_run_measures_every_case(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["bench", "overlap", "--quick", "--json", str(out)]) in (EXIT_OK, EXIT_MISSED)
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) == 6
    assert all(case["overlapped_s"][0] < case["serial_s"][0] * 2 for case in cases)

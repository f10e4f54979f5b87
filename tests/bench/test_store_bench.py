"""The runner of `dualpath bench store`: rounds, targets, sections that fail, what it writes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dualpath.bench.command import PROGRAMS, load_program
from dualpath.bench.progress import Progress
from dualpath.bench.rounds import GIB, Sample, Series, interleave
from dualpath.bench.stopwatch import Stopwatch, process_cpu_s
from dualpath.bench.store import fio as fio_module
from dualpath.bench.store.command import EXIT_MISSED, EXIT_OK, EXIT_USAGE, command
from dualpath.bench.store.fio import Fio
from dualpath.bench.store.keyed_blocks import KeyedBlocks
from dualpath.bench.store.memory_copy import copy_blocks, hash_blocks
from dualpath.bench.store.pages import PageKind, kind_of, memory_of
from dualpath.bench.store.report import markdown, rows, verdict
from dualpath.bench.store.runner import run_sections
from dualpath.bench.store.section import SECTIONS, SKIPPED, Figures, Section, Target, chosen
from dualpath.bench.store.socket_copy import SocketCopy
from dualpath.transfer.errors import Corrupt, InvalidRequest, Unavailable


def quiet(_text: str) -> None:
    """A progress that says nothing."""


def series(*gibs: float) -> Series:
    return Series(tuple(Sample(int(GIB), 1 / rate, 0.5) for rate in gibs))


def test_contestants_take_turns_and_each_begins_a_round() -> None:
    seen: list[str] = []

    def measured(name: str) -> Callable[[], Sample]:
        def run() -> Sample:
            seen.append(name)
            return Sample(1, 1.0)

        return run

    names = ("a", "b", "c")
    found = interleave({name: measured(name) for name in names}, 3, quiet, warm_up=False)
    assert "".join(seen) == "abc" + "bca" + "cab"
    assert all(len(one.samples) == 3 for one in found.values())


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # A machine that is twice as fast in one round is so for both.
    assert series(1, 2, 4).ratio_to(series(2, 4, 4)) == pytest.approx(0.5)
    assert series(3).cpu_s_per_gib == pytest.approx(0.5)
    assert series(1, 2, 4).spread == pytest.approx(1.5)


def test_processor_time_of_other_processes_is_counted_while_the_watch_runs() -> None:
    burn = "import sys, time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        with Stopwatch([child.pid]) as watch:
            child.stdout.readline()
        assert watch.others_cpu_s > 0
        assert process_cpu_s(child.pid) >= 0.2
        child.communicate(b"\n")
    assert process_cpu_s(child.pid) == 0
    assert watch.sample(7).nbytes == 7


def test_a_target_tells_by_how_much_it_is_missed_and_why_it_was_not_measured() -> None:
    target = Target("ratio", least=0.9)
    assert target.missed({"ratio": 0.95}) == ""
    assert "0.8" in target.missed({"ratio": 0.8})
    assert "no fio" in target.missed({SKIPPED: "no fio"})
    assert "at most 2" in Target("seconds", most=2).missed({"seconds": 3})


def test_every_figure_that_the_sections_promise_has_a_target() -> None:
    promised = {section.name: {target.figure for target in section.targets} for section in SECTIONS}
    assert promised["cold_read_1m"] == {"ratio", "cpu_ratio"}
    assert promised["dram_copy"] == {"ratio_to_memcpy"}
    assert promised["tcp"] == {"ratio"}
    with pytest.raises(KeyError, match="colder"):
        chosen(["colder"])
    assert [section.name for section in chosen(["tcp", "cold_read_1m"])] == ["cold_read_1m", "tcp"]


def measure_well(_scratch: Path, rounds: int, progress: Callable[[str], None]) -> Figures:
    """A section of these tests, found by its name."""
    progress("a word")
    return {"ratio": 1.0, "ours_gibs": 2.0, "rounds": rounds}


def measure_wrong_bytes(_scratch: Path, _rounds: int, _progress: Callable[[str], None]) -> Figures:
    """A section that finds a wrong byte."""
    raise Corrupt("block 7 came back wrong")


def section_of(function: str, *targets: Target) -> Section:
    return Section(function, "of a test", __name__, function, targets)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[measure_well.__module__])


def test_a_section_with_wrong_bytes_fails_and_the_next_one_is_still_measured(
    tmp_path: Path,
) -> None:
    sections = [
        section_of("measure_wrong_bytes"),
        section_of("measure_well", Target("ratio", least=0.9)),
        section_of("measure_absent"),
    ]
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        report = run_sections(sections, tmp_path, 5, Progress(nowhere))
    assert not report.ok
    assert report.misses == []
    assert [text.split(":")[0] for text in report.failures] == [
        "measure_wrong_bytes",
        "measure_absent",
    ]
    assert report.figures["measure_well"]["ratio"] == 1.0
    assert any("block 7" in line for line in verdict(report))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rounds", "missed"), [(1, False), (5, True)])
def test_a_single_round_judges_nothing(tmp_path: Path, rounds: int, missed: bool) -> None:
    sections = [section_of("measure_well", Target("ratio", least=1.5))]
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        report = run_sections(sections, tmp_path, rounds, Progress(nowhere))
    assert bool(report.misses) == missed
    assert report.ok != missed
    assert report.to_json()["judged"] == missed


def test_tables_name_every_figure_and_say_what_holds(tmp_path: Path) -> None:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        report = run_sections(chosen(["mixed"])[:0], tmp_path, 5, Progress(nowhere))
    report.figures["cold_read_1m"] = {"ratio": 0.97, "cpu_ratio": 1.5, "blocks": 123456}
    found = {row[1]: row[2:] for row in rows(report)}
    assert found["ratio"] == ("0.97", ">= 0.95", "holds")
    assert found["cpu_ratio"] == ("1.50", "<= 1.3", "missed")
    assert found["blocks"] == ("123,456", "", "")
    assert "| ratio | 0.97 | >= 0.95 | holds |" in markdown(report)


def run(tmp_path: Path, *words: str) -> tuple[int, dict[str, dict[str, object]]]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "out.json"
    argv = [*words, "--data", str(tmp_path), "--json", str(out)]
    status = command.run(parser.parse_args(argv))
    return status, json.loads(out.read_text()) if out.exists() else {}


@pytest.mark.parametrize(
    "section",
    [
        "cold_read_256k",
        pytest.param("write", marks=pytest.mark.slow),
        pytest.param("mixed", marks=pytest.mark.slow),
    ],
)
def test_a_quick_run_of_a_disk_section_verifies_its_bytes(tmp_path: Path, section: str) -> None:
    status, found = run(tmp_path, "--quick", "--only", section)
    assert status == EXIT_OK, found
    figures = found[section]
    assert isinstance(figures["ours_gibs"], float)
    assert figures["ours_gibs"] > 0
    assert ("fio_gibs" in figures) != (SKIPPED in figures)


def test_a_quick_run_over_tcp_verifies_its_bytes(tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    status, found = run(tmp_path, "--quick", "--only", "tcp", "--plot", str(picture))
    assert status == EXIT_OK, found
    assert {"ratio", "ratio_to_bare", "ours_gibs"} <= set(found["tcp"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_wrong_usage_is_told_apart_from_a_missed_target(tmp_path: Path) -> None:
    assert run(tmp_path, "--only", "nonsense")[0] == EXIT_USAGE
    assert run(tmp_path, "--rounds", "0")[0] == EXIT_USAGE
    assert EXIT_USAGE != EXIT_MISSED


def test_without_fio_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    with pytest.raises(Unavailable, match="apt install fio"):
        Fio(PageKind.SMALL)
    assert fio_module.fio_version() == "absent"


def test_an_old_libc_has_no_huge_pages_for_fio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: "/bin/true")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.31"))
    with pytest.raises(Unavailable, match=r"glibc 2\.35"):
        Fio(PageKind.TRANSPARENT_HUGE)


def test_memory_lies_on_the_pages_that_were_asked_for() -> None:
    small = memory_of(PageKind.SMALL, 8 << 20)
    assert kind_of(memoryview(small)) is PageKind.SMALL
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if offered.exists() and "[never]" not in offered.read_text():
        huge = memory_of(PageKind.TRANSPARENT_HUGE, 8 << 20)
        assert kind_of(memoryview(huge)) is PageKind.TRANSPARENT_HUGE


def test_the_limits_move_every_byte() -> None:
    source = memoryview(bytearray(np.random.default_rng(1).bytes(1 << 20)))
    target = memoryview(bytearray(1 << 20))
    order = np.arange(4, dtype=np.int64)[::-1].copy()
    assert copy_blocks(source, target, 256 << 10, order).nbytes == 1 << 20
    assert target[: 256 << 10] == source[768 << 10 :]
    assert hash_blocks(source, 64 << 10).nbytes == 1 << 20
    with SocketCopy(4 << 20, 256 << 10) as copy:
        assert copy.copy(hashing=True).nbytes == 4 << 20
        assert copy.copy(hashing=False).cpu_s > 0


def test_a_flipped_byte_of_a_block_is_found() -> None:
    blocks = KeyedBlocks(64 << 10, 3)
    memory = memoryview(bytearray(blocks.block_bytes))
    blocks.fill(2, memory, 0)
    blocks.check(2, memory, 0)
    with pytest.raises(Corrupt, match="block 1"):
        blocks.check(1, memory, 0)
    memory[12345] ^= 1
    with pytest.raises(Corrupt, match="1 wrong byte"):
        blocks.check(2, memory, 0)


def test_bench_hands_over_to_its_programs_and_knows_their_names() -> None:
    assert {"store", "peers", "eviction", "soak"} <= set(PROGRAMS)
    assert load_program("store") is command
    with pytest.raises(InvalidRequest, match="known"):
        load_program("nothing")

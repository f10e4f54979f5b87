"""`dualpath bench peers`: drivers, environments, the comparison and its tables."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
from dualpath.bench.document import put_figures
from dualpath.bench.headline import headline
from dualpath.bench.peers import driver_process, environments
from dualpath.bench.peers.catalogue import (
    ENTRIES,
    ENVIRONMENTS,
    Entry,
    Environment,
    Reach,
    chosen,
)
from dualpath.bench.peers.command import EXIT_OK, EXIT_USAGE, command
from dualpath.bench.peers.comparison import Comparison
from dualpath.bench.peers.driver_process import DriverProcess
from dualpath.bench.peers.environments import Environments
from dualpath.bench.peers.report import PeersReport, markdown, verdict
from dualpath.transfer.errors import InvalidRequest, Unavailable

MIB = 1 << 20

DRIVER = """
import sys
sys.path.insert(0, {drivers!r})
from harness import serve

class Driver:
    version = "Pretence 1"
    server_pids = []
    def __init__(self, settings): self.wrong = settings.get("wrong"); self.kept = {{}}
    def start(self): print("chatter on stdout")
    def open(self, *_sizes): pass
    def put(self, keys, blocks): self.kept.update(zip(keys, map(bytes, blocks)))
    def get(self, keys, places):
        for key, place in zip(keys, places): place[:] = self.kept[key]
        if self.wrong: places[-1][-1] ^= 1
    def forget(self, keys):
        for key in keys: del self.kept[key]
    def settle(self): pass
    def chill(self): pass
    def close(self): pass

serve(Driver)
"""


@pytest.fixture
def pretence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A driver that keeps blocks in a dictionary; its name."""
    drivers = tmp_path / "drivers"
    drivers.mkdir()
    text = DRIVER.format(drivers=str(driver_process.DRIVERS))
    (drivers / "pretence.py").write_text(text)
    monkeypatch.setattr(driver_process, "DRIVERS", drivers)
    return "pretence"


def entry(name: str, driver: str, **settings: object) -> Entry:
    return Entry(name, name.capitalize(), Reach.PROCESS, driver, settings=settings)


def quiet(_text: str) -> None:
    """A progress that says nothing."""


def test_a_driver_answers_in_lines_whatever_its_peer_prints(pretence: str, tmp_path: Path) -> None:
    with DriverProcess(Path(sys.executable), pretence, tmp_path / "log") as driver:
        assert driver.open({}) == "Pretence 1"
        found = driver.run(MIB, 64 * MIB)
    assert found["put_s"] > 0
    assert found["get_client_cpu_s"] >= 0
    assert "chatter" in (tmp_path / "log").read_text()


def test_one_wrong_byte_of_one_get_is_a_failure(pretence: str, tmp_path: Path) -> None:
    with DriverProcess(Path(sys.executable), pretence, tmp_path / "log") as driver:
        driver.open({"wrong": True})
        with pytest.raises(Unavailable, match="wrong bytes"):
            driver.run(4 * MIB, 64 * MIB)


def test_a_driver_that_ends_is_told_with_the_end_of_its_log(pretence: str, tmp_path: Path) -> None:
    (driver_process.DRIVERS / f"{pretence}.py").write_text("raise SystemExit('no such library')")
    with (
        DriverProcess(Path(sys.executable), pretence, tmp_path / "log") as driver,
        pytest.raises(Unavailable, match="no such library"),
    ):
        driver.open({})


def test_a_peer_that_fails_is_told_and_the_others_are_measured(
    pretence: str, tmp_path: Path
) -> None:
    entries = [entry("bad", pretence, wrong=True), entry("good", pretence)]
    found = Comparison(entries, tmp_path, Environments(tmp_path, quiet), quiet)
    found.prepare(install=False)
    found.run(2, [MIB, 4 * MIB], 64 * MIB)
    bad, good = found.rows
    assert "wrong bytes" in bad.failures[0]
    assert [len(runs) for runs in good.runs.values()] == [2, 2]
    assert found.fastest_peer(Reach.PROCESS, "get", MIB, 64 * MIB) is good
    report = PeersReport(found, 2, [MIB, 4 * MIB], 64 * MIB, _machine(), {}, "today")
    assert report.ok, "ours did not fail"
    assert "| Good |" in markdown(report)
    assert any(line.startswith("failed: bad") for line in verdict(report))
    json.dumps(report.to_json())


def _machine() -> dict[str, object]:
    names = ("cores", "processor", "memory_gib", "system", "kernel", "disk", "file_system")
    return {**dict.fromkeys(names, "some"), "load_average": 0.5}


def test_an_environment_that_is_not_there_is_a_skip_with_its_remedy(tmp_path: Path) -> None:
    rows = Comparison(chosen(["mooncake"]), tmp_path, Environments(tmp_path, quiet), quiet)
    rows.prepare(install=False)
    assert "--install" in rows.rows[0].skipped
    rows.run(1, [MIB], 64 * MIB)
    assert not rows.rows[0].runs


def test_an_environment_of_another_list_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        environments, "_run", lambda argv, _until, cwd=None: asked.append(" ".join(argv))
    )
    known = Environments(tmp_path, quiet)
    first = Environment("some", ("a==1",), alone=("b==2",))
    (tmp_path / "some").mkdir()

    def made(argv: object, _until: float, cwd: object = None) -> None:
        (tmp_path / "some").mkdir(exist_ok=True)
        asked.append(str(argv))

    monkeypatch.setattr(environments, "_run", made)
    known.python(first, install=True)
    assert any("a==1" in call for call in asked)
    assert any("--no-deps" in call and "b==2" in call for call in asked)
    count = len(asked)
    known.python(first, install=True)
    assert len(asked) == count
    with pytest.raises(Unavailable, match="another version"):
        known.python(Environment("some", ("a==3",)), install=False)


def test_entries_have_drivers_environments_and_different_names() -> None:
    names = [each.name for each in ENTRIES]
    assert len(set(names)) == len(names)
    places = {environment.name for environment in ENVIRONMENTS} | {""}
    for each in ENTRIES:
        assert (driver_process.DRIVERS / f"{each.driver}.py").is_file()
        assert each.environment in places
    with pytest.raises(KeyError, match="nobody"):
        chosen(["nobody"])


def test_every_peer_is_pinned() -> None:
    for environment in ENVIRONMENTS:
        if environment.name != "redis":
            listed = [*environment.requirements, *environment.alone]
            assert any("==" in requirement for requirement in listed), environment.name


def run(tmp_path: Path, *words: str) -> tuple[int, dict[str, dict[str, dict[str, object]]]]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "out.json"
    argv = [*words, "--data", str(tmp_path), "--json", str(out)]
    status = command.run(parser.parse_args(argv))
    return status, json.loads(out.read_text()) if out.exists() else {}


def test_ours_and_plain_files_run_without_any_peer(tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    only = ("--only", "dualpath,dualpath-disk,block-files", "--mib", "64", "--rounds", "1")
    status, found = run(tmp_path, *only, "--blocks", "1M", "--plot", str(picture))
    assert status == EXIT_OK, found
    for name in ("dualpath", "dualpath-disk", "block-files"):
        assert found["entries"][name]["failures"] == []
        assert found["entries"][name]["version"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words", [("--mib", "65"), ("--blocks", "3M"), ("--only", "nobody"), ("--rounds", "0")]
)
def test_wrong_usage_is_refused_before_anything_runs(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    assert run(tmp_path, *words)[0] == EXIT_USAGE


def test_figures_go_between_the_marks_of_a_document_and_nowhere_else(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    put_figures(document, "new\n")
    put_figures(document, "newer")
    assert document.read_text() == (
        "before\n<!-- measured: begin -->\nnewer\n<!-- measured: end -->\nafter\n"
    )
    with pytest.raises(InvalidRequest, match="no place"):
        put_figures(document, "new", "another")
    put_figures(tmp_path / "fresh.md", "all of it")
    assert (tmp_path / "fresh.md").read_text() == "all of it"


def test_the_headline_names_the_limit_and_the_fastest_peer_of_the_same_kind() -> None:
    def figures(reach: str, rate: float) -> dict[str, object]:
        return {"title": reach.upper(), "reach": reach, "blocks": {"1M": {"get_gibs": rate}}}

    peers = {
        "entries": {
            "dualpath-tcp": figures("tcp", 3.0),
            "redis": figures("tcp", 1.0),
            "slow": figures("tcp", 0.5),
            "mooncake": figures("process", 9.0),
        }
    }
    tcp = {"ours_gibs": 3.1, "hashing_copy_gibs": 3.2, "ratio": 0.97}
    text = headline({"tcp": tcp, "machine": {}}, peers)
    assert "| TCP, verified | 3.10 | 3.20 (hashing socket copy) | 0.97 | TCP: 1.00" in text
    assert "9.00" not in text

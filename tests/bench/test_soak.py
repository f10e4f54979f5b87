"""The soak program in short: nothing is lost, torn or served wrong, and it would notice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from dualpath.bench.soak.witness import Claims, read_notes
from dualpath.cli.main import main

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the recorder needs cc")


def soak(tmp_path: Path, *arguments: str) -> dict[str, dict[str, object]]:
    out = tmp_path / "soak.json"
    folder = tmp_path / "soak"
    status = main(
        ["bench", "soak", "--seed", "11", "--json", str(out), "--dir", str(folder), *arguments]
    )
    report = json.loads(out.read_text())
    assert status == 0, report
    assert report["ok"]
    assert report["seed"] == 11
    assert not folder.exists(), "it leaves nothing behind"
    parts: dict[str, dict[str, object]] = report["parts"]
    return parts


@pytest.mark.slow
def test_a_few_power_losses_lose_nothing_and_a_store_that_does_not_sync_is_caught(
    tmp_path: Path,
) -> None:
    parts = soak(tmp_path, "--only", "power", "--rounds", "15")
    assert parts["power"]["rounds"] == 15
    facts = parts["power"]["facts"]
    assert isinstance(facts, dict)
    for kind in ("after_kills", "after_faults", "index_lost"):
        assert kind in facts, "drawn, so it may be none"
    for name in ("data", "index", "names", "found"):
        assert not parts[f"blindness_{name}"]["bad"]


def test_a_few_kills_lose_nothing(tmp_path: Path) -> None:
    parts = soak(tmp_path, "--only", "kill", "--rounds", "4")
    assert parts["kill"]["rounds"] == 4


def test_a_few_flipped_bytes_are_found_and_never_served(tmp_path: Path) -> None:
    parts = soak(tmp_path, "--only", "flip", "--flips", "16")
    facts = parts["flip"]["facts"]
    assert isinstance(facts, dict)
    assert (facts["found"], facts["wrong_blocks_served"]) == (16, 0)


def test_some_seconds_of_mixed_load_pass(tmp_path: Path) -> None:
    parts = soak(tmp_path, "--only", "load", "--minutes", "0.1")
    facts = parts["load"]["facts"]
    assert isinstance(facts, dict)
    assert facts["calls"]["load"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_soak_passes_in_its_middle_form(tmp_path: Path) -> None:
    soak(tmp_path, "--rounds", "60", "--flips", "400", "--minutes", "0.5")


def test_wrong_usage_is_refused() -> None:
    assert main(["bench", "soak", "--only", "nothing"]) == 2
    assert main(["bench", "soak", "--rounds", "-1"]) == 2


def test_claims_follow_notes_in_their_order() -> None:
    claims = Claims()
    claims.follow([b"+a", b"Da", b"+b", b"Db", b"-a", b"+c"])
    assert (claims.visible, claims.durable) == ({b"b", b"c"}, {b"b"})
    other = claims.copy()
    other.follow([b"-b"])
    assert claims.durable == {b"b"}
    assert other.durable == set()
    claims.restart({b"x"})
    assert (claims.visible, claims.durable) == ({b"x"}, {b"x"})


def test_claims_know_what_an_opening_has_lost_or_brought_back() -> None:
    claims = Claims()
    claims.follow([b"+a", b"Da", b"+b", b"Db", b"+c", b"-c", b"Xc", b"-d", b"Xd", b"~d"])
    assert claims.invalidated == {b"c"}
    found = claims.copy()
    found.follow([b"!", b"+a", b"+b", b"+d", b"="])
    assert (found.visible, found.broken) == ({b"a", b"b", b"d"}, [])
    claims.follow([b"!", b"+a", b"+c", b"="])
    assert claims.broken == [
        "1 durable blocks were gone at an opening",
        "1 invalidated blocks were back at an opening",
    ]
    claims.follow([b"+c"])
    assert not claims.invalidated, "it was stored again"


def test_a_last_note_that_was_cut_is_left_out() -> None:
    assert read_notes(b"2b61\n4461\n2b6") == [b"+a", b"Da"]

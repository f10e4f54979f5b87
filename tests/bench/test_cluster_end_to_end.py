"""`dualpath bench cluster` with real processes and links that the kernel shapes: small."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from dualpath.bench.testbed.namespaces import NAMESPACES_FOLDER, why_not_kernel

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(150)]


@pytest.fixture(scope="module", autouse=True)
def _kernel() -> None:
    reason = why_not_kernel()
    if reason:
        pytest.skip(f"kernel shaping: {reason}")


def measure(tmp_path: Path, *words: str) -> Mapping[str, object]:
    """Run it in a process of its own; its JSON."""
    out = tmp_path / "out.json"
    argv = [sys.executable, "-m", "dualpath.cli.main", "bench", "cluster"]
    done = subprocess.run(
        [*argv, *words, "--rounds", "1", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(NAMESPACES_FOLDER.glob(f"dualpath-{os.getpid()}-*"))
    found = json.loads(out.read_text())
    assert isinstance(found, dict)
    return found


def test_a_split_uses_both_storage_links_of_a_shaped_cluster(tmp_path: Path) -> None:
    words = ("--prefill", "1", "--decode", "1", "--snic", "15MB/s", "--seconds", "4")
    found = measure(tmp_path, *words, "--policies", "direct,split")
    split = found["split"]
    assert isinstance(split, dict)
    assert split["failed_loads"] == split["corrupt_blocks"] == 0
    assert split["whole_ratio_to_direct"] > 1.5
    assert set(split["bytes_by_path"]) == {"direct", "relay:decode-0"}
    assert found["handoff"] == "with hand-off traffic"
    for name in ("direct", "split"):
        policy = found[name]
        assert isinstance(policy, dict)
        handed = policy["handed_off"]
        assert handed["whole"] == policy["loads"], handed
        assert handed["corrupt_blocks"] == 0
        # What its own decode node relayed needs not be sent to it again.
        assert bool(handed["bytes"].get("retained")) is (name == "split")


def test_requests_through_a_scheduler_go_where_it_says(tmp_path: Path) -> None:
    words = ("--prefill", "1", "--decode", "2", "--snic", "10MB/s", "--seconds", "4")
    found = measure(tmp_path, *words, "--policies", "direct", "--scheduler", "paper,split,direct")
    paths = {}
    for name in ("paper", "split", "direct"):
        policy = found[f"scheduler:{name}"]
        assert isinstance(policy, dict)
        assert policy["failed_loads"] == policy["corrupt_blocks"] == 0
        assert policy["handed_off"]["whole"] == policy["loads"]
        assert policy["queued_ms_p50"] > 0
        assert not [event for event in policy["events"] if event.startswith("fallback")]
        paths[name] = set(policy["bytes_by_path"])
        assert name == "direct" or policy["whole_ratio_to_direct"] > 1.3
    everywhere = {"direct", "relay:decode-0", "relay:decode-1"}
    assert paths == {"paper": everywhere, "split": everywhere, "direct": {"direct"}}


def test_loads_are_striped_over_two_storage_links_of_a_node(tmp_path: Path) -> None:
    words = ("--prefill", "1", "--decode", "1", "--snic", "8MB/s,4MB/s", "--seconds", "4")
    found = measure(tmp_path, *words, "--policies", "direct,split", "--no-hand-off")
    direct, split = found["direct"], found["split"]
    assert isinstance(direct, dict)
    assert isinstance(split, dict)
    for policy in (direct, split):
        assert policy["failed_loads"] == policy["corrupt_blocks"] == 0
    own, relayed = {"direct", "direct:snic1"}, {"relay:decode-0", "relay:decode-0:1"}
    assert set(direct["bytes_by_path"]) == own
    assert set(split["bytes_by_path"]) == own | relayed
    # By their rates, 2:1; far from what half and half, or one of them alone, would give.
    by_path = direct["bytes_by_path"]
    assert 0.2 < by_path["direct:snic1"] / sum(by_path.values()) < 0.45, by_path
    assert split["whole_ratio_to_direct"] > 1.4


@pytest.mark.parametrize("snic", ["snic", "snic1"])
def test_a_storage_link_that_is_cut_costs_no_load(tmp_path: Path, snic: str) -> None:
    words = ("--prefill", "1", "--decode", "0", "--snic", "8MB/s,8MB/s", "--no-hand-off")
    faults = f"cut:prefill0.{snic}@2s"
    found = measure(tmp_path, *words, "--policies", "split", "--faults", faults)
    told = found["faults"]
    assert isinstance(told, dict)
    assert told["failed_loads"] == 0, told


def test_prompts_stay_with_their_prefill_engines_if_asked(tmp_path: Path) -> None:
    words = ("--prefill", "1", "--decode", "1", "--snic", "15MB/s", "--seconds", "2")
    found = measure(tmp_path, *words, "--policies", "split", "--no-hand-off")
    assert found["handoff"] == "without hand-off traffic"
    split = found["split"]
    assert isinstance(split, dict)
    assert split["handed_off"]["whole"] == 0


def test_no_load_fails_when_a_relay_is_killed_stopped_cut_or_slowed(tmp_path: Path) -> None:
    faults = "kill:decode1@1s,stop:decode0@2s,restore:decode0@4s,cut:decode0.snic@5s,"
    faults += "restore:decode0@7s,slow:decode0@8s:0.25"
    words = ("--prefill", "1", "--decode", "2", "--snic", "15MB/s", "--faults", faults)
    found = measure(tmp_path, *words)["faults"]
    assert isinstance(found, dict)
    assert found["failed_loads"] == found["corrupt_blocks"] == 0
    assert found["past_deadline_s"] == 0
    assert len(found["effects"]) == 6


def test_engines_on_several_rails_and_on_one_converged_nic_load_every_byte(tmp_path: Path) -> None:
    common = ("--prefill", "1", "--decode", "1", "--snic", "15MB/s", "--seconds", "2")
    rails = measure(tmp_path, *common, "--gpus", "2", "--policies", "split")
    assert isinstance(rails["split"], dict)
    assert rails["split"]["failed_loads"] == 0
    one = measure(tmp_path, *common, "--converged", "--policies", "direct,split")
    assert isinstance(one["split"], dict)
    assert one["split"]["failed_loads"] == 0
    assert one["split"]["whole_ratio_to_direct"] > 0.6

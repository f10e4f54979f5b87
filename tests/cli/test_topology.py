"""`doctor --topology` tells which devices there are, and which addresses share one."""

from __future__ import annotations

import json

import pytest
from dualpath.cli import topology
from dualpath.cli.main import main
from dualpath.cli.topology import Placed, Topology
from dualpath.transfer.nics import Nic

NIC = Nic("eth0", ("10.0.0.5",), frozenset({"eth0"}), 12.5e9, 1, "0000:17:00.0", up=True)
BOND = Nic("bond0", (), frozenset({"eth0", "eth1"}), 0, -1, "", up=False)
STORE, RELAY, OTHER = "10.0.0.1:7070", "10.0.0.9:7081", "10.1.0.9:7081"


def found() -> Topology:
    return Topology(
        {"node0": "0-7"},
        (NIC, BOND),
        (Placed("nvme0n1", 0),),
        (Placed("mlx5_0", -1),),
        {STORE: ("eth0",), RELAY: ("eth0",), OTHER: ("eth2",)},
    )


def test_addresses_that_share_a_device_are_told() -> None:
    assert found().shared == [(STORE, RELAY)]
    (told,) = [line for line in found().lines() if "share a device" in line]
    assert STORE in told
    assert RELAY in told
    assert OTHER not in told


def test_every_device_has_a_line() -> None:
    text = "\n".join(found().lines())
    for word in ("node0", "0-7", "eth0", "NUMA node 1", "0000:17:00.0", "10.0.0.5", "12.5 GB/s"):
        assert word in text, text
    assert "down, speed unknown, NUMA node unknown, over eth0, eth1, no address" in text
    assert "nvme0n1" in text
    assert "mlx5_0" in text


def test_this_machine_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "--topology", "--towards", "127.0.0.1:7070"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["routes"] == {"127.0.0.1:7070": []}
    assert "lo" not in {nic["name"] for nic in told["nics"]}
    assert main(words) == 0
    assert "no device" in capsys.readouterr().out


def test_disks_are_told_with_their_node(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    disk = tmp_path / "nvme3n1" / "device"
    disk.mkdir(parents=True)
    (disk / "numa_node").write_text("1\n")
    (tmp_path / "nvme4n1").mkdir()
    monkeypatch.setattr(topology, "SYS_BLOCK", tmp_path)
    assert Topology.of_machine([]).disks == (Placed("nvme3n1", 1), Placed("nvme4n1", -1))


@pytest.mark.parametrize(
    "words", [["--towards", "10.0.0.1:1"], ["--topology", "--towards", "10.0.0.1"]]
)
def test_wrong_usage_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    assert "dualpath" in capsys.readouterr().err

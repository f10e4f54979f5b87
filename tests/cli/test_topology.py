"""`doctor --topology` tells which devices there are, and which addresses share one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from dualpath.cli import topology
from dualpath.cli.gpu_place import Gpu, closeness, gpus
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


def test_an_address_in_the_network_of_several_devices_is_told() -> None:
    several = replace(found(), striped={STORE: ("eth0", "eth1")})
    (told,) = [line for line in several.lines() if "stripe" in line]
    assert STORE in told
    assert "eth0, eth1" in told
    assert not [line for line in found().lines() if "stripe" in line]


def test_gpus_are_told_with_what_is_between_them_and_the_network(tmp_path: Path) -> None:
    bus = tmp_path / "pci0000:00"
    places = {
        "0000:02:00.0": ("0x030200", "0x10de", "0"),  # a GPU
        "0000:03:00.0": ("0x020000", "0x15b3", "0"),  # a network device
        "0000:04:00.0": ("0x030000", "0x1234", "0"),  # the screen of a virtual machine
    }
    listed = tmp_path / "devices"
    listed.mkdir()
    for name, (kind, maker, node) in places.items():
        folder = bus / "0000:01:00.0" / name
        folder.mkdir(parents=True)
        for key, text in (("class", kind), ("vendor", maker), ("numa_node", node)):
            (folder / key).write_text(text + "\n")
        (listed / name).symlink_to(folder)
    (gpu,) = gpus(listed)
    assert (gpu.device, gpu.numa_node) == ("0000:02:00.0", 0)
    assert gpu.bus_path == ("pci0000:00", "0000:01:00.0", "0000:02:00.0")
    told = "\n".join(replace(found(), gpus=(gpu,)).lines())
    assert "0000:02:00.0     GPU, NUMA node 0, no network device on the bus" in told


@pytest.mark.parametrize(
    ("nic_path", "nic_node", "word"),
    [
        (("pci0", "a", "nic"), 0, "behind the same switch"),
        (("pci0", "b", "nic"), 0, "at the same root complex"),
        (("pci1", "a", "nic"), 0, "on the same NUMA node"),
        (("pci1", "a", "nic"), 1, "on another NUMA node"),
        ((), -1, "of unknown distance"),
    ],
)
def test_closeness_is_what_has_to_be_crossed(
    nic_path: tuple[str, ...], nic_node: int, word: str
) -> None:
    assert closeness(Gpu("gpu", 0, ("pci0", "a", "gpu")), nic_path, nic_node) == word


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

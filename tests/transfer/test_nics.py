"""Which device leads to an address, as the kernel's tables tell."""

from __future__ import annotations

from pathlib import Path

import pytest
from dualpath.transfer.nics import devices_towards, nics


def device(root: Path, name: str, **texts: str) -> Path:
    folder = root / name
    (folder / "device").mkdir(parents=True)
    for key, text in texts.items():
        (folder / key.replace("__", "/")).write_text(text + "\n")
    return folder


def test_devices_are_told_with_what_the_machine_says_of_them(tmp_path: Path) -> None:
    device(tmp_path, "eth0", speed="100000", operstate="up", device__numa_node="1")
    device(tmp_path, "eth1", speed="-1", operstate="down")
    (tmp_path / "lo").mkdir()
    first, second = nics(tmp_path)
    assert (first.name, first.speed_bytes_per_s, first.numa_node, first.up) == (
        "eth0",
        12.5e9,
        1,
        True,
    )
    assert (second.name, second.speed_bytes_per_s, second.numa_node, second.up) == (
        "eth1",
        0,
        -1,
        False,
    )


def test_bonds_and_vlans_are_followed_down_to_what_carries_them(tmp_path: Path) -> None:
    for name in ("eth0", "eth1"):
        device(tmp_path, name)
    bond, vlan = device(tmp_path, "bond0"), device(tmp_path, "bond0.7")
    for lower in ("eth0", "eth1"):
        (bond / f"lower_{lower}").symlink_to(tmp_path / lower)
    (vlan / "lower_bond0").symlink_to(bond)
    below = {nic.name: nic.below for nic in nics(tmp_path)}
    assert below["eth0"] == {"eth0"}
    assert below["bond0"] == below["bond0.7"] == {"eth0", "eth1"}


def test_a_ring_of_devices_ends(tmp_path: Path) -> None:
    one, other = device(tmp_path, "a"), device(tmp_path, "b")
    (one / "lower_b").symlink_to(other)
    (other / "lower_a").symlink_to(one)
    assert all(nic.below for nic in nics(tmp_path))


@pytest.mark.parametrize(
    "address", ["127.0.0.1:7070", "[::1]:7070", "unix:/run/x", "store.example:7070", "", "nonsense"]
)
def test_no_device_leads_to_this_machine_or_to_what_is_no_address(address: str) -> None:
    assert devices_towards(address) == frozenset()

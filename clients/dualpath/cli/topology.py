"""`dualpath doctor --topology`: network devices, disks and RDMA devices of this machine, and which
of them lead where.

Owns the reading and the printing; says of addresses that are reached by the same device that a
relay behind one adds nothing to direct loads from the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from dualpath.cli.sizes import format_rate
from dualpath.transfer.nics import Nic, devices_towards, nics

SYS_BLOCK = Path("/sys/block")
SYS_RDMA = Path("/sys/class/infiniband")
SYS_NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True)
class Placed:
    """A disk or an RDMA device. `numa_node` -1: the machine does not say."""

    name: str
    numa_node: int


@dataclass(frozen=True, slots=True)
class Topology:
    """What was found. `routes`: the devices by which each asked address is reached."""

    nodes: dict[str, str]
    nics: tuple[Nic, ...]
    disks: tuple[Placed, ...]
    rdma: tuple[Placed, ...]
    routes: dict[str, tuple[str, ...]]

    @staticmethod
    def of_machine(towards: Sequence[str]) -> Topology:
        """Read this machine's."""
        return Topology(
            {path.name: _text(path / "cpulist") for path in sorted(SYS_NODES.glob("node[0-9]*"))},
            nics(),
            _placed(SYS_BLOCK, "nvme*"),
            _placed(SYS_RDMA, "*"),
            {address: tuple(sorted(devices_towards(address))) for address in towards},
        )

    @property
    def shared(self) -> list[tuple[str, str]]:
        """Pairs of asked addresses that are reached by the same device."""
        return [
            (one, other)
            for one, other in combinations(self.routes, 2)
            if set(self.routes[one]) & set(self.routes[other])
        ]

    def to_json(self) -> dict[str, object]:
        """For machines."""
        return {
            "numa_nodes": self.nodes,
            "nics": [
                {
                    "name": nic.name,
                    "addresses": list(nic.addresses),
                    "below": sorted(nic.below),
                    "speed_bytes_per_s": nic.speed_bytes_per_s,
                    "numa_node": nic.numa_node,
                    "device": nic.device,
                    "up": nic.up,
                }
                for nic in self.nics
            ],
            "disks": [{"name": each.name, "numa_node": each.numa_node} for each in self.disks],
            "rdma": [{"name": each.name, "numa_node": each.numa_node} for each in self.rdma],
            "routes": {address: list(names) for address, names in self.routes.items()},
            "shared": [list(pair) for pair in self.shared],
        }

    def lines(self) -> list[str]:
        """For people."""
        found = [f"  {name:16} processors {cpus}" for name, cpus in self.nodes.items()]
        found += [_nic_line(nic) for nic in self.nics]
        for kind, devices in (("disk", self.disks), ("RDMA", self.rdma)):
            found += [f"  {each.name:16} {kind}, {_node(each.numa_node)}" for each in devices]
        for address, names in self.routes.items():
            by = ", ".join(names) or "no device: it is this machine, or not an IP address"
            found.append(f"  {address:16} is reached by {by}")
        for one, other in self.shared:
            found.append(
                f"  {one} and {other} share a device: a relay at one adds nothing to direct "
                "loads from the other, and a split goes direct"
            )
        return found


def _nic_line(nic: Nic) -> str:
    words = [
        "up" if nic.up else "down",
        format_rate(nic.speed_bytes_per_s) if nic.speed_bytes_per_s else "speed unknown",
        _node(nic.numa_node),
        nic.device,
        f"over {', '.join(sorted(nic.below))}" if nic.below != {nic.name} else "",
        " ".join(nic.addresses) or "no address",
    ]
    return f"  {nic.name:16} {', '.join(word for word in words if word)}"


def _node(number: int) -> str:
    return f"NUMA node {number}" if number >= 0 else "NUMA node unknown"


def _placed(folder: Path, pattern: str) -> tuple[Placed, ...]:
    found = []
    for path in sorted(folder.glob(pattern)):
        text = _text(path / "device" / "numa_node") or _text(path / "device/device/numa_node")
        found.append(Placed(path.name, int(text) if text.lstrip("-").isdigit() else -1))
    return tuple(found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""

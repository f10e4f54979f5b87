"""`dualpath doctor --topology`: network devices, disks, RDMA devices and GPUs of this machine, what
leads where, and what is near what.

Owns the reading and the printing; says of addresses that are reached by the same device that a
relay behind one adds nothing to direct loads from the other, and of one that lies in the network of
several devices that agents stripe over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from dualpath.cli.gpu_place import Gpu, closeness, gpus
from dualpath.cli.sizes import format_rate
from dualpath.transfer.nics import Nic, devices_towards, nics, on_link

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
    gpus: tuple[Gpu, ...] = ()
    striped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Devices in whose own network an asked address lies, if they are several."""

    @staticmethod
    def of_machine(towards: Sequence[str]) -> Topology:
        """Read this machine's."""
        return Topology(
            {path.name: _text(path / "cpulist") for path in sorted(SYS_NODES.glob("node[0-9]*"))},
            nics(),
            _placed(SYS_BLOCK, "nvme*"),
            _placed(SYS_RDMA, "*"),
            {address: tuple(sorted(devices_towards(address))) for address in towards},
            gpus(),
            {
                address: tuple(sorted(found))
                for address in towards
                if len(found := on_link(address.rpartition(":")[0])) > 1
            },
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
            "striped": {address: list(names) for address, names in self.striped.items()},
            "gpus": [
                {
                    "device": gpu.device,
                    "numa_node": gpu.numa_node,
                    "nics": {
                        nic.name: closeness(gpu, nic.bus_path, nic.numa_node) for nic in self.nics
                    },
                }
                for gpu in self.gpus
            ],
        }

    def lines(self) -> list[str]:
        """For people."""
        found = [f"  {name:16} processors {cpus}" for name, cpus in self.nodes.items()]
        found += [_nic_line(nic) for nic in self.nics]
        for kind, devices in (("disk", self.disks), ("RDMA", self.rdma)):
            found += [f"  {each.name:16} {kind}, {_node(each.numa_node)}" for each in devices]
        found += [self._gpu_line(gpu) for gpu in self.gpus]
        if len(self.nodes) < 2:
            found.append(f"  {'placement':16} one NUMA node: threads and staging need no place")
        for address, names in self.striped.items():
            found.append(
                f"  {address:16} is in the network of {', '.join(names)}: agents stripe over them, "
                "unless `storage-addresses` says otherwise"
            )
        for address, names in self.routes.items():
            by = ", ".join(names) or "no device: it is this machine, or not an IP address"
            found.append(f"  {address:16} is reached by {by}")
        for one, other in self.shared:
            found.append(
                f"  {one} and {other} share a device: a relay at one adds nothing to direct "
                "loads from the other, and a split goes direct"
            )
        return found

    def _gpu_line(self, gpu: Gpu) -> str:
        near = [
            f"{nic.name} {closeness(gpu, nic.bus_path, nic.numa_node)}"
            for nic in self.nics
            if nic.bus_path
        ]
        nearness = "; ".join(near) or "no network device on the bus"
        return f"  {gpu.device:16} GPU, {_node(gpu.numa_node)}, {nearness}"


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

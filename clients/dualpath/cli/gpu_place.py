"""GPUs of this machine on its buses, and how near a network device is to one; asks no driver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dualpath.transfer.nics import bus_path

SYS_PCI = Path("/sys/bus/pci/devices")
_DISPLAY = ("0x0300", "0x0302", "0x1200")
"""PCI classes: VGA, 3D and processing accelerators."""
_MAKERS = ("0x10de", "0x1002")
"""NVIDIA, AMD: a display adapter of others moves no KV."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """`device` is its place on the bus; `numa_node` -1: the machine does not say."""

    device: str
    numa_node: int
    bus_path: tuple[str, ...]


def gpus(root: Path = SYS_PCI) -> tuple[Gpu, ...]:
    """All, by their places on the bus."""
    found = []
    for path in sorted(root.glob("*")):
        kind, maker = _text(path / "class"), _text(path / "vendor")
        if kind.startswith(_DISPLAY) and maker in _MAKERS:
            node = _text(path / "numa_node")
            number = int(node) if node.lstrip("-").isdigit() else -1
            found.append(Gpu(path.name, number, bus_path(path)))
    return tuple(found)


def closeness(gpu: Gpu, nic_path: tuple[str, ...], nic_node: int) -> str:
    """What bytes between a GPU and a network device have to cross."""
    common = 0
    for one, other in zip(gpu.bus_path, nic_path, strict=False):
        if one != other:
            break
        common += 1
    if common >= 2:
        return "behind the same switch"
    if common == 1:
        return "at the same root complex"
    if nic_node < 0 or gpu.numa_node < 0:
        return "of unknown distance"
    return "on the same NUMA node" if nic_node == gpu.numa_node else "on another NUMA node"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""

"""Network devices of this machine: which one leads to an address, what it is, where it sits.

Owns the reading of the kernel's tables (`/sys/class/net`, addresses of interfaces, routes). Bonds,
VLANs and the like are followed down to the devices below them, since these are what is shared.
Loopback leads through no device. Everything that cannot be found out is left empty.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SYS_NET = Path("/sys/class/net")
_SIOCGIFCONF = 0x8912
_IFREQ_BYTES = 40
_IFREQS_MAX = 1024
_DEPTH_MAX = 8
_PORT = 9  # any: nothing is sent
_ROUTES = Path("/proc/net/route")
_RTF_UP, _RTF_UP_GATEWAY = 1, 3


@dataclass(frozen=True, slots=True)
class Nic:
    """A network device. `below`: the devices that carry it, itself if nothing does. `speed` and
    `numa_node` are 0 and -1, `device` (its place on the bus) "", where the machine does not say."""

    name: str
    addresses: tuple[str, ...]
    below: frozenset[str]
    speed_bytes_per_s: float
    numa_node: int
    device: str
    up: bool
    bus_path: tuple[str, ...] = ()
    """The bridges of the bus from the root down to it."""


def nics(sys_net: Path = SYS_NET) -> tuple[Nic, ...]:
    """All devices but loopback, by name."""
    by_name: dict[str, list[str]] = {}
    for address, name in _addresses().items():
        by_name.setdefault(name, []).append(address)
    try:
        names = sorted(path.name for path in sys_net.iterdir() if path.name != "lo")
    except OSError:
        names = sorted(name for name in by_name if name != "lo")
    return tuple(_nic(sys_net / name, tuple(sorted(by_name.get(name, ())))) for name in names)


def device_of(host: str) -> str:
    """Name of the device that has this address, "" for loopback, and if none has."""
    name = _addresses().get(host, "")
    return "" if name == "lo" else name


def below(device: str, sys_net: Path = SYS_NET) -> frozenset[str]:
    """The devices that carry this one, itself if nothing does."""
    return _below(sys_net / device)


def node_of_devices(devices: Iterable[str], sys_net: Path = SYS_NET) -> set[int]:
    """NUMA nodes of what carries these devices, -1 among them if the machine does not say."""
    lowest = {each for device in devices for each in _below(sys_net / device)}
    return {_number(sys_net / each / "device" / "numa_node", -1) for each in lowest}


def on_link(host: str, routes: str | None = None) -> frozenset[str]:
    """Names of the devices whose own network an IPv4 address is in, so that they reach it without
    a gateway. `routes`: text in the form of /proc/net/route, which is read without."""
    try:
        wanted = int(ipaddress.IPv4Address(host))
    except ValueError:
        return frozenset()
    found = set()
    for line in (_text(_ROUTES) if routes is None else routes).splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8 or int(fields[3], 16) & _RTF_UP_GATEWAY != _RTF_UP:
            continue
        # In the byte order of the machine.
        network, mask = (socket.ntohl(int(fields[at], 16)) for at in (1, 7))
        if mask and wanted & mask == network:
            found.add(fields[0])
    return frozenset(found)


def devices_towards(address: str, sys_net: Path = SYS_NET) -> frozenset[str]:
    """Names of the devices by which packets to `host:port` leave; none for this machine itself,
    and where that cannot be found out."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return frozenset()
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((host, _PORT))  # chooses a route; sends nothing
            own = sock.getsockname()[0]
    except OSError:
        return frozenset()
    name = _addresses().get(own, "lo")
    if name == "lo" or own == host:
        return frozenset()
    return _below(sys_net / name)


def _nic(path: Path, addresses: tuple[str, ...]) -> Nic:
    speed = _number(path / "speed", 0)
    device = path / "device"
    return Nic(
        name=path.name,
        addresses=addresses,
        below=_below(path),
        speed_bytes_per_s=max(0, speed) * 1e6 / 8,
        numa_node=_number(device / "numa_node", -1),
        device=device.resolve().name if device.exists() else "",
        up=_text(path / "operstate") in ("up", "unknown"),
        bus_path=bus_path(device) if device.exists() else (),
    )


def bus_path(device: Path) -> tuple[str, ...]:
    """From the root complex down to a device of the PCI bus; () for one of no PCI bus."""
    parts = device.resolve().parts
    roots = [index for index, part in enumerate(parts) if part.startswith("pci")]
    return parts[roots[0] :] if roots else ()


def _below(path: Path, depth: int = 0) -> frozenset[str]:
    """The lowest devices under this one."""
    lower = list(path.glob("lower_*")) if depth < _DEPTH_MAX else []
    if not lower:
        return frozenset({path.name})
    found = (_below(path.parent / each.name.removeprefix("lower_"), depth + 1) for each in lower)
    return frozenset().union(*found)


def _addresses() -> Mapping[str, str]:
    """Name of the interface by address."""
    return {**_addresses_v4(), **_addresses_v6()}


def _addresses_v4() -> dict[str, str]:
    buffer = array.array("B", bytes(_IFREQS_MAX * _IFREQ_BYTES))
    request = struct.pack("iP", len(buffer), buffer.buffer_info()[0])
    found = {}
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        (used,) = struct.unpack_from("i", fcntl.ioctl(sock.fileno(), _SIOCGIFCONF, request))
        data = buffer.tobytes()
        for at in range(0, used, _IFREQ_BYTES):
            name = data[at : at + 16].split(b"\0", 1)[0].decode()
            found[socket.inet_ntoa(data[at + 20 : at + 24])] = name.partition(":")[0]
    return found


def _addresses_v6() -> dict[str, str]:
    found = {}
    for line in _text(Path("/proc/net/if_inet6")).splitlines():
        digits, *_, name = line.split()
        found[str(ipaddress.IPv6Address(bytes.fromhex(digits)))] = name
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # also of a device that is down: it has no speed
        return ""


def _number(path: Path, unknown: int) -> int:
    try:
        return int(_text(path))
    except ValueError:
        return unknown

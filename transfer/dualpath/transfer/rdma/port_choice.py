"""Which port of a device, and which row of its table of GIDs, a connection uses. Pure.

InfiniBand is addressed by LID, RoCE by GID: of a port's GIDs the one of RoCE v2 that is an IPv4
address (`::ffff:a.b.c.d`), since that is routed and there is one for each address; its index is
looked up, for it differs from machine to machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualpath.transfer.errors import Unavailable
from dualpath.transfer.rdma.verbs import DeviceInfo, GidEntry, LinkLayer, PortInfo

_MAPPED_IPV4 = bytes(10) + b"\xff\xff"
_LINK_LOCAL = bytes((0xFE, 0x80))


@dataclass(frozen=True, slots=True)
class ChosenPort:
    """A port and the GID on it."""

    port: PortInfo
    gid: GidEntry


def choose_port(info: DeviceInfo, number: int = 0, gid_index: int = -1) -> ChosenPort:
    """The port `number` (0: the first that is active) and the GID at `gid_index` (-1: the best).

    Raises Unavailable, saying what there is.
    """
    ports = [port for port in info.ports if number in (0, port.number)]
    if not ports:
        raise Unavailable(
            f"{info.name} has no port {number}; it has {[each.number for each in info.ports]}"
        )
    active = [port for port in ports if port.active]
    if not active:
        raise Unavailable(
            f"no port of {info.name} is active; check the cable, and for RoCE that its network "
            "interface is up"
        )
    return ChosenPort(active[0], _choose_gid(info.name, active[0], gid_index))


def _choose_gid(device: str, port: PortInfo, gid_index: int) -> GidEntry:
    if gid_index >= 0:
        for entry in port.gids:
            if entry.row == gid_index:
                return entry
        raise Unavailable(
            f"{device} port {port.number} has no GID at index {gid_index}: {_listed(port.gids)}"
        )
    if not port.gids:
        raise Unavailable(
            f"{device} port {port.number} has no GID; give its network interface an address"
        )
    if port.link_layer is LinkLayer.INFINIBAND:
        return port.gids[0]
    return min(port.gids, key=_preference)


def _preference(entry: GidEntry) -> tuple[bool, bool, bool, int]:
    """Smaller is better."""
    return (
        entry.kind != "RoCE v2",
        not entry.gid.startswith(_MAPPED_IPV4),
        entry.gid.startswith(_LINK_LOCAL),
        entry.row,
    )


def _listed(gids: Sequence[GidEntry]) -> str:
    return ", ".join(f"{each.row}: {each.gid.hex()} ({each.kind})" for each in gids)

"""Threads that move a network device's bytes run on the NUMA node that the device is on.

Owns which processors these are and the moment at which threads get them: a thread inherits the
processors of the one that starts it, so whoever dials or listens does it within `near`. Best
effort: on a machine of one node, for a device of no known node, and where the processors that this
process may use are all elsewhere, nothing changes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from dualpath.transfer.nics import SYS_NET, device_of, devices_towards, node_of_devices

SYS_NODES = Path("/sys/devices/system/node")
ANY_NODE = -1
"""None, or not one alone."""


def nodes(root: Path = SYS_NODES) -> dict[int, frozenset[int]]:
    """Processors by NUMA node; {} where the kernel tells of none."""
    found = {}
    for path in root.glob("node[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            found[int(path.name[4:])] = parse_processors((path / "cpulist").read_text())
    return found


def parse_processors(text: str) -> frozenset[int]:
    """The numbers of a kernel list such as `0-3,8`. Raises ValueError."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def node_of(devices: Collection[str], root: Path = SYS_NODES, sys_net: Path = SYS_NET) -> int:
    """The NUMA node that all of these devices are on, of a machine with several; else ANY_NODE."""
    if len(nodes(root)) < 2:
        return ANY_NODE
    found = node_of_devices(devices, sys_net)
    return found.pop() if len(found) == 1 else ANY_NODE


def node_towards(address: str) -> int:
    """That of the devices by which `host:port` is reached, or that have it."""
    host = address.rpartition(":")[0].strip("[]")
    own = device_of(host)
    return node_of({own} if own else devices_towards(address))


@contextlib.contextmanager
def near(node: int, root: Path = SYS_NODES) -> Iterator[None]:
    """Threads that this one starts meanwhile run on the processors of a NUMA node."""
    before = os.sched_getaffinity(0)
    wanted = before & nodes(root).get(node, frozenset()) if node != ANY_NODE else set()
    if not wanted or wanted == before:
        yield
        return
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

"""Several links from one node to another: which pair of addresses makes a path of its own.

Owns that choice; pure. A *rail* is one of a node's links to a network, told apart by the physical
devices below it. Each rail beyond the first is joined with one address of the other side: one in
its own network if there is any, and one that no other rail has taken before one that has. So two
addresses of one device make one rail, since the second would add nothing.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest

RAILS_MAX = 16
"""Most links of a node to one network."""


@dataclass(frozen=True, slots=True)
class LocalEnd:
    """An address of this node: its device, the devices below that (none known: it counts as one of
    its own), and which of the other side's addresses lie in its network."""

    host: str
    device: str
    below: frozenset[str]
    reaches: frozenset[str]


@dataclass(frozen=True, slots=True)
class Rail:
    """A link to use: from `host` by `device` ("": as the kernel chooses) to the other side's
    address number `remote`. `name` is what people call it."""

    name: str
    host: str
    device: str
    devices: frozenset[str]
    remote: int = 0


FIRST_RAIL = Rail("", "", "", frozenset())
"""What is used before anything is known: the route that the kernel has."""


def further_rails(
    first: frozenset[str], ends: Iterable[LocalEnd], remotes: Sequence[str], *, asked: bool = False
) -> tuple[Rail, ...]:
    """The rails beside the first, which arrives by the devices `first` at `remotes[0]`.

    `remotes` are the hosts of the other side. Only ends that lie in the network of one of them
    count, unless the operator has `asked` for them; of ends with a device in common one does.
    """
    used = set(first)
    taken = Counter({0: 1} if remotes else {})
    rails: list[Rail] = []
    for end in ends:
        devices = end.below or frozenset({end.host})
        near = [index for index, host in enumerate(remotes) if host in end.reaches]
        if devices & used or not remotes or not (near or asked):
            continue
        if len(rails) + 1 >= RAILS_MAX:
            break
        remote = min(near or range(len(remotes)), key=lambda index: (taken[index], index))
        taken[remote] += 1
        used |= devices
        rails.append(Rail(end.device or end.host, end.host, end.device, devices, remote))
    return tuple(rails)


def check_hosts(hosts: Collection[str], setting: str) -> None:
    """Raise InvalidRequest for too many, for one that is there twice or is no IP address."""
    for host in hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError as error:
            raise InvalidRequest(
                f"{setting}: {host!r} is no IP address of this machine; give it without a port"
            ) from error
    if len(hosts) > RAILS_MAX or len(set(hosts)) != len(hosts):
        raise InvalidRequest(f"{setting}: at most {RAILS_MAX} different addresses, not {hosts}")

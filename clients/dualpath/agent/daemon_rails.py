"""All of our links to one daemon: the first, which has the leases, and one for each further rail.

Owns which rails there are, which is found anew whenever the first link comes up: from the addresses
that the daemon announces and the network devices of this machine, or the addresses that the
operator has named. The first link goes by any of the rails, by the next one after a loss; the rail
that it goes by has no second link in use. Belongs to the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.network import Network
from dualpath.agent.steady_link import Way
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.nics import below, device_of, devices_towards, nics, on_link
from dualpath.transfer.rails import FIRST_RAIL, LocalEnd, Rail, further_rails

MakeRail = Callable[[DaemonLink, Rail, int, Way], DaemonLink]
"""Makes and starts a further link to the daemon of the first one: its rail, number and way."""


class DaemonRails:
    """See the module docstring. `asked`: the operator's addresses, () to look for them."""

    def __init__(
        self,
        first: DaemonLink,
        asked: Sequence[str],
        network_of: Callable[[Rail], Network],
        make: MakeRail,
    ) -> None:
        self.first = first
        self._way = Way(first.address, {"tcp": network_of(FIRST_RAIL)})
        self._asked = tuple(asked)
        self._network_of = network_of
        self._make = make
        self._links: dict[str, DaemonLink] = {}  # by the rail's name

    @property
    def links(self) -> Sequence[DaemonLink]:
        """All of them, in the order of their numbers."""
        return (self.first, *self._links.values())

    def serving(self, number: int) -> DaemonLink | None:
        """The link of that number, None if there is none, or another goes by its devices."""
        links = self.links
        return None if number >= len(links) or links[number].spare else links[number]

    def first_up(self) -> None:
        """The first link has come up: join those of the other rails."""
        attached = self.first.link.attached
        if attached is None or attached.transport != "tcp" or self.first.mounted is not None:
            return
        rails = self._find(attached)
        if rails is None:
            return
        remotes = attached.rails or [common_pb2.Rail(address=attached.address)]
        ways = [self._way]
        for rail in rails[1:]:
            target = remotes[rail.remote].control or self.first.address
            ways.append(Way(target, {"tcp": self._network_of(rail)}, rail.remote))
        self.first.link.set_ways(ways)
        at = self.first.link.at
        for index, (rail, way) in enumerate(zip(rails, ways, strict=True)):
            link = self._links.get(rail.name)
            if link is None and index != at:
                link = self._make(self.first, rail, len(self._links) + 1, way)
                self._links[rail.name] = link
                self.first.fellows = tuple(self._links.values())
            if link is not None:
                link.link.set_ways((way,))
                link.spare = index == at

    def _find(self, attached: common_pb2.AttachResponse) -> list[Rail] | None:
        """The first rail and the further ones; None if there are none."""
        addresses = [rail.address for rail in attached.rails] or [attached.address]
        hosts = [address.rpartition(":")[0].strip("[]") for address in addresses]
        if self._asked:
            ends = [_end(host, device_of(host), hosts) for host in self._asked]
            first = ends[0].below or frozenset({ends[0].host})
            further = further_rails(first, ends[1:], hosts, asked=True)
        else:
            first = devices_towards(addresses[0])
            if not first:  # this machine itself
                return None
            ends = [
                _end(host, nic.name, hosts) for nic in nics() if nic.up for host in nic.addresses
            ]
            further = further_rails(first, ends, hosts)
        return [Rail(min(first), "", "", first), *further] if further else None


def _end(host: str, device: str, remotes: Sequence[str]) -> LocalEnd:
    reaches = frozenset(remote for remote in remotes if device and device in on_link(remote))
    return LocalEnd(host, device, below(device) if device else frozenset(), reaches)


def asked_rail(asked: Sequence[str]) -> Rail:
    """That of the first of the operator's addresses; as the kernel chooses if there is none."""
    if not asked:
        return FIRST_RAIL
    device = device_of(asked[0])
    return Rail("", asked[0], device, below(device) if device else frozenset())

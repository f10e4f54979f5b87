"""An agent's links beyond the first to each daemon and relay, and the networks that they go by.

Owns them from the moment that a daemon or a relay tells of more than one way until the agent ends.
Each is a path of its own to the loads of its daemon. Belongs to the loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from dualpath.agent.config import AgentConfig, RelayAddress
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.daemon_loads import DaemonLoads
from dualpath.agent.daemon_rails import DaemonRails
from dualpath.agent.network import MakeTransport, Network
from dualpath.agent.relay_link import RelayLink
from dualpath.agent.steady_link import Way
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.nics import below
from dualpath.transfer.placement import direct_path, relay_path
from dualpath.transfer.rails import RAILS_MAX, Rail

log = logging.getLogger(__name__)


class FurtherLinks:
    """See the module docstring. `first` is the network of the first link to daemons, `maker_of`
    says how that of another is made; `on_change(link)` follows what becomes of one to a daemon."""

    def __init__(
        self,
        config: AgentConfig,
        first: Network,
        maker_of: Callable[[Rail], MakeTransport],
        on_change: Callable[[DaemonLink], None],
        relay_link: Callable[[RelayAddress, int], RelayLink],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.rails: dict[str, DaemonRails] = {}
        """By the daemon's address."""
        self.loads: Mapping[str, DaemonLoads] = {}
        """To be told of new paths, by the daemon's address."""
        self._config = config
        self._first = first
        self._maker_of = maker_of
        self._on_change = on_change
        self._relay_link = relay_link
        self._loop = loop
        self._networks: dict[str, Network] = {}  # by the local address
        self._relays: dict[tuple[str, int], RelayLink] = {}

    @property
    def networks(self) -> Sequence[Network]:
        """Those of further links to daemons."""
        return tuple(self._networks.values())

    def add_daemon(self, daemon: DaemonLink) -> None:
        """There is a first link to it."""
        asked = self._config.storage_addresses
        self.rails[daemon.address] = DaemonRails(daemon, asked, self._network_of, self._make_rail)

    def join(self, relay: RelayLink) -> None:
        """Attach once more for each further link by which a relay reads."""
        if relay.rail:
            return
        for rail in range(1, min(relay.rails, RAILS_MAX)):
            if (relay.name, rail) in self._relays:
                continue
            link = self._relays[relay.name, rail] = self._relay_link(relay.address, rail)
            try:
                for loads in self.loads.values():
                    loads.add_path(relay_path(relay.name, rail), link, 0)
            except InvalidRequest as error:
                log.warning("relay %s: link %d is not used: %s", relay.name, rail, error)
            else:
                link.link.start()

    def stats(self) -> list[agent_pb2.LinkStats]:
        """Of each storage link by itself; of none if there is one."""
        if not self._networks:
            return []
        networks = {"first": self._first, **self._networks}
        return [
            agent_pb2.LinkStats(
                link=f"storage:{host}",
                limit_bytes_per_s=self._config.storage_limit_bytes_per_s,
                bytes=network.received_bytes,
            )
            for host, network in networks.items()
        ]

    async def close(self) -> None:
        """End all sessions."""
        for relay in self._relays.values():
            await relay.link.close()
        for rails in self.rails.values():
            for rail in rails.links[1:]:
                await rail.link.close()

    async def close_networks(self) -> None:
        """Fence everything; after `close`."""
        for network in self._networks.values():
            await network.close()

    def _network_of(self, rail: Rail) -> Network:
        if not rail.host:
            return self._first
        if rail.host not in self._networks:
            make = self._maker_of(rail)
            devices = below(rail.device) if rail.device else frozenset[str]()
            self._networks[rail.host] = Network(self._config.name, make, self._loop, devices)
        return self._networks[rail.host]

    def _make_rail(self, first: DaemonLink, rail: Rail, number: int, way: Way) -> DaemonLink:
        config = self._config
        link = DaemonLink(
            first.address,
            way.networks,
            {},  # that is the first one's task
            self._on_change,
            name=config.name,
            token=config.token,
            tls=config.tls,
            timeout_s=config.lookup_timeout_s,
            pause_s_max=config.reconnect_s_max,
            rail=number,
        )
        link.devices = rail.devices
        link.link.set_ways((way,))
        limit = config.storage_limit_bytes_per_s
        self.loads[first.address].add_path(direct_path(rail.name), link, limit)
        link.link.start()
        return link

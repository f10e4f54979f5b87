"""How a load's grants travel on each path: to the daemon, to a relay, or to ourselves.

Owns the mapping from a path's name to who is asked, on which network the answer lands, and what
is cancelled there. Keeps no state of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dualpath.agent.active_load import ActiveLoad
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.known_chunks import known_chunks
from dualpath.agent.network import Network
from dualpath.agent.open_grants import OnProgress
from dualpath.agent.relay_link import RelayLink
from dualpath.agent.self_relay import SelfRelay
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.errors import PathDown
from dualpath.transfer.nics import devices_towards
from dualpath.transfer.placement import DIRECT_PATH


class LoadRoutes:
    """Paths to one daemon. `relays` are by path name."""

    def __init__(
        self,
        daemon: DaemonLink,
        relays: Mapping[str, RelayLink],
        compute: Network,
        self_relay: SelfRelay,
    ) -> None:
        self.daemon = daemon
        self.relays = relays
        self._compute = compute
        self._self_relay = self_relay

    @property
    def names(self) -> tuple[str, ...]:
        """All paths, up or not."""
        return (DIRECT_PATH, *self.relays)

    def up(self, path: str) -> bool:
        """Whether the links that a path needs are there."""
        if path == DIRECT_PATH:
            return self.daemon.up
        return self.daemon.up and bool(self.relays[path].peer_id_at(self.daemon.address))

    def spare(self, path: str) -> bool:
        """Whether the bytes of a relay come by the network device by which the direct path's do,
        so that it adds nothing to them."""
        relay = self.relays.get(path)
        direct = self.daemon.link.attached
        if relay is None or relay.link.attached is None or direct is None or self.daemon.mounted:
            return False
        return bool(devices_towards(direct.address) & devices_towards(relay.link.attached.address))

    def network(self, load: ActiveLoad, path: str) -> Network:
        """Where the bytes of a load arrive on this path. Raises PathDown."""
        if path in self.relays or load.entry.behind_compute_link:
            return self._compute
        if self.daemon.link.network is None:
            raise PathDown(f"daemon {self.daemon.address} is away")
        return self.daemon.link.network

    def send(
        self, load: ActiveLoad, path: str, grant: common_pb2.ChunkGrant, on_progress: OnProgress
    ) -> int:
        """Ask for chunks; returns the grant's id on this path. Raises PathDown, Overloaded."""
        relay = self.relays.get(path)
        if relay is not None:
            ticket = load.tickets[path][1]
            known = None
            if relay.holds:
                retain = relay.name == load.spec.decode_peer
                known = known_chunks(load, grant, retain=retain)
            return relay.submit(self.daemon.address, ticket, grant, on_progress, known)
        if load.entry.behind_compute_link:
            return self._self_relay.submit(self.daemon, load.lease_id, grant, on_progress)
        if load.looking is not None:
            look = load.looking
            grant_id = self.daemon.look_up_first(look.request, grant, on_progress, look.on_found)
            look.sent = True
            return grant_id
        return self.daemon.deliver(grant, on_progress, lease_id=load.lease_id)

    def cancel(
        self, load: ActiveLoad, path: str, grant_ids: Iterable[int], *, landed: bool = False
    ) -> None:
        """Spare the other side work that nobody wants any more; with `landed` all of it is done,
        though the other side has not said so yet."""
        if path in self.relays:
            if not landed:
                self.relays[path].cancel(grant_ids)
        elif load.entry.behind_compute_link:
            self._self_relay.cancel(grant_ids)
        else:
            self.daemon.cancel(grant_ids, landed=landed)

    def renew(self, path: str, reason: str) -> None:
        """Make the link of a path anew."""
        (self.relays[path].link if path in self.relays else self.daemon.link).lose(reason)

"""How a load's grants travel on each path: to the daemon, to a relay, or to ourselves.

Owns the mapping from a path's name to who is asked, on which network the answer lands, and what
is cancelled there. Keeps no state of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

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
from dualpath.transfer.placement import DIRECT_PATH, relay_path


class Delegate(Protocol):
    """Who reads under a ticket: a relay, or a further link of this node."""

    def peer_id_at(self, daemon: str) -> str:
        """Its attachment at a daemon, "" while it is away."""


class LoadRoutes:
    """Paths to one daemon, at first by its first link and those of `relays`; see `add`."""

    def __init__(
        self,
        daemon: DaemonLink,
        relays: Iterable[RelayLink],
        compute: Network,
        self_relay: SelfRelay,
    ) -> None:
        self.daemon = daemon
        self.relays = {relay_path(relay.name): relay for relay in relays}
        """By path name."""
        self.rails: dict[str, DaemonLink] = {}
        """Our further links to the daemon, by path name."""
        self.delegates: dict[str, Delegate] = dict(self.relays)
        """Who needs a ticket, by path name."""
        self._compute = compute
        self._self_relay = self_relay

    def add(self, path: str, link: DaemonLink | RelayLink) -> None:
        """A further link of this node, or of a relay."""
        self.delegates[path] = link
        if isinstance(link, RelayLink):
            self.relays[path] = link
        else:
            self.rails[path] = link

    @property
    def names(self) -> tuple[str, ...]:
        """All paths, up or not."""
        return (DIRECT_PATH, *self.rails, *self.relays)

    @property
    def direct(self) -> tuple[str, ...]:
        """Those by our own links, in the order of the links' numbers."""
        return (DIRECT_PATH, *self.rails)

    def up(self, path: str) -> bool:
        """Whether the links that a path needs are there."""
        if path == DIRECT_PATH or not self.daemon.up:
            return self.daemon.up
        return bool(self.delegates[path].peer_id_at(self.daemon.address))

    def spare(self, path: str) -> bool:
        """Whether the bytes of a path come by a network device by which those of the direct path
        do, so that it adds nothing to them."""
        if path in self.rails:
            return self.rails[path].spare
        relay = self.relays.get(path)
        direct = self.daemon.link.attached
        if relay is None or relay.link.attached is None or direct is None or self.daemon.mounted:
            return False
        devices = devices_towards(direct.address)
        used = devices.union(*(rail.devices for rail in self.rails.values() if rail.up))
        return bool(used & devices_towards(relay.link.attached.address))

    def network(self, load: ActiveLoad, path: str) -> Network:
        """Where the bytes of a load arrive on this path. Raises PathDown."""
        if path in self.relays or load.entry.behind_compute_link:
            return self._compute
        daemon = self.rails.get(path, self.daemon)
        if daemon.link.network is None:
            raise PathDown(f"daemon {daemon.key} is away")
        return daemon.link.network

    def send(
        self,
        load: ActiveLoad,
        path: str,
        grant: common_pb2.ChunkGrant,
        on_progress: OnProgress,
        *,
        copy: bool = False,
    ) -> int:
        """Ask for chunks; returns the grant's id on this path. Of a `copy` a relay is not told what
        it is: it reads it from storage, and keeps nothing. Raises PathDown, Overloaded."""
        relay = self.relays.get(path)
        if relay is not None:
            ticket = load.tickets[path][1]
            known = None
            if relay.holds and not copy:
                retain = relay.name == load.spec.decode_peer
                known = known_chunks(load, grant, retain=retain)
            return relay.submit(self.daemon.address, ticket, grant, on_progress, known)
        rail = self.rails.get(path)
        if rail is not None:
            ticket = load.tickets[path][1]
            if load.entry.behind_compute_link:
                return self._self_relay.submit(rail, 0, grant, on_progress, ticket=ticket)
            return rail.deliver(grant, on_progress, ticket=ticket)
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
            self.rails.get(path, self.daemon).cancel(grant_ids, landed=landed)

    def renew(self, path: str, reason: str) -> None:
        """Make the link of a path anew."""
        if path in self.relays:
            self.relays[path].link.lose(reason)
        else:
            self.rails.get(path, self.daemon).link.lose(reason)
